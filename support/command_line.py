"""The command line of a training script, and what a user sees of a mistake."""

import argparse
import math
import os
import re
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import field, fields
from typing import Any, NoReturn, get_args, get_type_hints

from tqdm import tqdm


LARGEST_SEED = 2**63 - 1  # what torch and numpy both take
LARGEST_SIZE = 1_000_000  # of a batch, a sequence, a table: more is a slip of the keyboard


def option(
    default: Any,
    help: str,
    at_least: float | None = None,
    choices: Any = None,
    at_most: float | None = None,
) -> Any:
    """Returns a field of an options class, with what its `--flag` says and accepts."""
    accepts = {"least": at_least, "most": at_most, "choices": choices}
    return field(default=default, metadata={"help": help, **accepts})


def parse_options(cls: type, arguments: Sequence[str] | None = None) -> Any:
    """The options of a command line; any mistake ends it with one line and exit status 2."""
    parser = argparse.ArgumentParser(allow_abbrev=False)
    kinds = get_type_hints(cls)
    for f in fields(cls):
        kind = next(iter(get_args(kinds[f.name])), kinds[f.name])  # of a tuple, of X | None
        shown = f" (default: {f.default})" if f.default not in (None, False, ()) else ""
        name, text = "--" + f.name.replace("_", "-"), f.metadata["help"] + shown
        if kind is bool:
            parser.add_argument(name, help=text, action="store_true")
        else:
            nargs = "+" if isinstance(f.default, tuple) else None
            parser.add_argument(
                name,
                help=text,
                type=kind,
                default=f.default,
                nargs=nargs,
                choices=f.metadata["choices"],
            )
    parser.error = fail  # type: ignore[method-assign]  # argparse's own prints the whole usage
    chosen = vars(parser.parse_args(arguments))
    for f in fields(cls):
        value, least = chosen[f.name], f.metadata["least"]
        values = value if isinstance(value, list | tuple) else [value]
        flag = f"--{f.name.replace('_', '-')}"
        if least is not None and any(v is not None and not v >= least for v in values):
            fail(f"{flag} must be at least {least}, got {value}")
        most = f.metadata["most"]
        if most is not None and any(v is not None and v > most for v in values):
            fail(f"{flag} must be at most {most}, got {value}")
        if any(isinstance(v, float) and math.isinf(v) for v in values):
            fail(f"{flag} must be finite, got {value}")
    return cls(**chosen)


def fail(message: str) -> NoReturn:
    tqdm.write(f"error: {message}", file=sys.stderr)  # on a line of its own, if there is a bar
    sys.exit(2)


def run_script(main: Callable, cls: type, arguments: Sequence[str] | None = None) -> None:
    """Runs a script's main function with the options of its command line.

    A user's mistake is a ValueError and a machine's an OSError: they become one message and exit
    status 2. Anything else is a bug and keeps its traceback. Ctrl-C and SIGTERM end quietly, with
    status 130 and 143, and end the processes that tokenize: these inherit the handler. (Training
    replaces it: see `note_signals`.)
    """
    options = parse_options(cls, arguments)
    received: list[int] = []
    main_process = os.getpid()

    def stop(number: int, frame: Any) -> NoReturn:
        if os.getpid() != main_process:  # one that tokenizes: nothing of it is to be kept
            os._exit(128 + number)
        received.append(number)
        sys.exit(128 + number)

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        try:
            main(options)
        finally:  # from here on, torch's handler would raise the death of a worker in our own
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    except UnicodeDecodeError as error:
        fail(f"--dataset {options.dataset} has a text that is not UTF-8: {error}")
    except Exception as error:
        if received:  # processes that tokenize were ended, and whoever waited for one complains
            sys.exit(128 + received[0])
        if worker_died(error):
            cause = str(error).strip(" .") or "end of its messages"
            fail(f"a DataLoader worker died ({cause}). Out of memory? Try fewer --workers, and "
                 "--resume")  # fmt: skip
        if isinstance(error, ValueError | OSError):  # a worker's comes with its whole traceback
            fail(re.sub(r"(?s)^Caught \w+ in DataLoader worker.*\n\w+: ", "", str(error).strip()))
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def worker_died(error: Exception) -> bool:
    """Told by torch's own message, or by an error while a message of a worker was read: then it
    was cut off, which has many names."""
    places = (frame.name for frame in traceback.extract_tb(error.__traceback__))
    return bool(re.match(r"DataLoader worker \(pid", str(error))) or "_try_get_data" in places
