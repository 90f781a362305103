"""The command line of a training script, and what a user sees of a mistake."""

import io
import math
import os
import re
import signal
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

import tyro
from tqdm import tqdm

from support.processes import signals_to_handle

LARGEST_INTEGER = 2**63 - 1  # torch and numpy both accept it
LARGEST_SIZE = 1_000_000  # of a batch, a sequence, a table: more is a typing error


def parse_options(cls: type, arguments: Sequence[str] | None = None) -> Any:
    """Returns an options dataclass, filled from a command line.

    Each field is a flag: its name with dashes, its default, its docstring as help. A wrong flag or
    value, and a ValueError of the class's own `__post_init__`, end the process with one message and
    exit status 2.
    """
    return tyro.cli(cls, args=arguments, config=(tyro.conf.FlagCreatePairsOff,))


def check_limits(options: Any, limits: Mapping[str, tuple[float, float]]) -> None:
    """Raises ValueError if a number in `options` is below the smallest or above the largest that
    `limits` has for it, if it is infinite or NaN, or if a text is empty, as --weights "$MODEL" is
    when the shell has no such variable. None passes: the option was not given.
    """
    for name, value in vars(options).items():
        if value == "":
            raise ValueError(f"--{name.replace('_', '-')} is empty")
    for name, (smallest, largest) in limits.items():
        given = getattr(options, name)
        values = given if isinstance(given, list | tuple) else [given]
        flag = "--" + name.replace("_", "-")
        for value in values:
            if value is None:
                continue
            if isinstance(value, float) and math.isinf(value):
                raise ValueError(f"{flag} must be finite, got {value}")
            if not value >= smallest:  # NaN fails here
                raise ValueError(f"{flag} must be at least {smallest}, got {value}")
            if not value <= largest:
                raise ValueError(f"{flag} must be at most {largest}, got {value}")


def fail(message: str) -> NoReturn:
    """Ends the process with one line and exit status 2."""
    tqdm.write(f"error: {message}", file=sys.stderr)  # on a line of its own, if there is a bar
    sys.exit(2)


def run_script(main: Callable, cls: type, arguments: Sequence[str] | None = None) -> None:
    """Runs a script's main function with the options of its command line.

    User errors (ValueError), system errors (OSError) and the death of a data worker become one
    message and exit status 2. Anything else is a bug and keeps its traceback.

    Ctrl-C, SIGTERM and SIGHUP (a closed terminal) end the process quietly, with status 130, 143 and
    129. The processes that tokenize are forked, so they inherit the handler, and it ends them too.
    Pretraining replaces the handler by its own: see `note_signals`.
    """
    prepare_streams()
    options = parse_options(cls, arguments)
    received: list[int] = []
    main_process = os.getpid()

    def stop(signal_number: int, frame: Any) -> NoReturn:
        if os.getpid() != main_process:  # it tokenizes, and nothing of it is to be kept
            os._exit(128 + signal_number)
        received.append(signal_number)
        sys.exit(128 + signal_number)

    handlers_before = {number: signal.signal(number, stop) for number in signals_to_handle()}
    try:
        try:
            main(options)
        finally:
            # torch's handler would raise the death of a worker once more, within our own messages.
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    except UnicodeDecodeError as error:
        source = f"--dataset {options.dataset}"
        if getattr(options, "test_dataset", None):
            source += f" or --test-dataset {options.test_dataset}"
        fail(f"{source} has a text that is not UTF-8: {error}")
    except Exception as error:
        if received:  # the signal ended a process that tokenizes, and whoever waited for it raised
            sys.exit(128 + received[0])
        if worker_died(error):
            cause = str(error).strip(" .") or "end of its messages"
            fail(
                f"a DataLoader worker died ({cause}). Out of memory? Try fewer --workers, and"
                " --resume"
            )
        if isinstance(error, ValueError | OSError):
            fail(without_worker_traceback(str(error)))
        raise
    finally:
        for number, handler in handlers_before.items():
            signal.signal(number, handler)


def prepare_streams() -> None:
    """Makes every text printable: a character that the terminal's encoding lacks is escaped, and a
    stream that was closed by the caller leads nowhere.
    """
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def without_worker_traceback(message: str) -> str:
    """Returns a message without the traceback that DataLoader adds to an error of a worker."""
    return re.sub(r"(?s)^Caught \w+ in DataLoader worker.*\n[\w.]+: ", "", message.strip())


def worker_died(error: Exception) -> bool:
    """Returns whether an error means that a DataLoader worker was killed.

    torch says so itself, or reading a message that was cut off raises one of many errors.
    """
    functions = [frame.name for frame in traceback.extract_tb(error.__traceback__)]
    told_by_torch = re.match(r"DataLoader worker \(pid", str(error))
    return bool(told_by_torch) or "_try_get_data" in functions
