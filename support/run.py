"""What keeps a run: its command line, its folder, its processes, its checkpoints.

Nothing here knows of BERT. Both training scripts import it.
"""

import argparse
import contextlib
import ctypes
import fcntl
import json
import math
import os
import re
import signal
import sys
import time
import traceback
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, field, fields
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn, get_args, get_type_hints

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

# ---- The command line ---------------------------------------------------------------------------


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


# ---- The folder of a run ------------------------------------------------------------------------


@contextlib.contextmanager
def run_folder(options: Any, rank: int = 0) -> Iterator[Path]:
    """Holds the folder --out for one run: no other process can use it at the same time.

    A new run needs a folder that holds no run, --resume one that holds a checkpoint. Raises
    ValueError, and changes nothing, otherwise. Only the first rank locks the folder.
    """
    out = Path(options.out)
    resume = getattr(options, "resume", False)
    if resume and not out.exists():
        raise ValueError(f"--resume: --out {out} does not exist; start a run without --resume")
    if resume and not checkpoint_paths(out):
        raise ValueError(
            f"--resume: --out {out} holds no checkpoint of a run of pretraining, and is left as it"
            " is; start a run in a new folder, without --resume"
        )
    with contextlib.ExitStack() as stack:
        if rank == 0:
            try:
                out.mkdir(parents=True, exist_ok=True)
                stack.enter_context(lock(out))
            except OSError as error:
                raise ValueError(f"--out {out} cannot be written: {error}") from error
            if not resume:
                check_holds_no_run(out)
        yield out


@contextlib.contextmanager
def lock(out: Path) -> Iterator[None]:
    """Holds a lock on a folder that ends with this process, however it ends.

    A POSIX record lock: unlike that of `flock`, forked data workers do not inherit it, so they
    cannot keep it when the process is killed.
    """
    with (out / ".lock").open("a") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:
            raise ValueError(f"--out {out} is in use by another process") from error
        yield


def check_holds_no_run(out: Path) -> None:
    """Raises ValueError if a folder has anything that a new run would overwrite."""
    metrics = out / "metrics.jsonl"
    has_metrics = metrics.exists() and metrics.stat().st_size > 0
    if has_metrics or (out / "model").exists() or checkpoint_paths(out):
        raise ValueError(f"--out {out} holds another run; name a new folder, or --resume")


def write_whole(path: Path, text: str) -> None:
    """Writes a text file that is whole or, if the process is killed, as it was before."""
    unfinished = path.with_name(path.name + ".unfinished")
    unfinished.write_text(text, encoding="utf-8")
    unfinished.replace(path)


# ---- Device and precision -----------------------------------------------------------------------


def choose_device(name: str | None) -> torch.device:
    """Returns the device of --device; without a name, the GPU if there is one."""
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if not re.fullmatch(r"cpu|cuda(:\d+)?", name):
        raise ValueError(f"--device {name} is not cpu, cuda or cuda:0")
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"--device {name}, but torch sees no GPU here")
    device = torch.device(name)
    if device.index is not None and device.index >= torch.cuda.device_count():
        raise ValueError(f"--device {name}, but torch sees {torch.cuda.device_count()} GPUs here")
    return device


PRECISIONS = ["auto", "float32", "medium", "bfloat16"]


def cpu_capabilities() -> Mapping[str, Any]:
    """Returns which instruction sets this CPU has, by name; nothing where torch cannot tell."""
    get_capabilities = getattr(torch.cpu, "get_capabilities", dict)
    return get_capabilities()


def choose_precision(name: str, device: torch.device) -> str:
    """Returns a run's precision, "float32", "medium" or "bfloat16", and sets torch up for it.

    - float32: all products of matrices in float32.
    - medium: float32 in memory, but products of matrices may round their factors to bfloat16.
    - bfloat16: autocast, see `autocast`.
    - auto: what is fastest. A training step of mini and of base is so many times as fast as in
      float32: on a CPU with AMX 1.64 and 1.72 with medium, 1.28 and 1.45 with bfloat16; on one with
      AVX512-BF16 alone 1.0 and 1.0, 1.34 and 1.43. Other CPUs emulate bfloat16, forty times slower.
    """
    if name == "auto":
        capabilities = cpu_capabilities() if device.type == "cpu" else {}
        if device.type == "cuda":
            name = "bfloat16"
        elif capabilities.get("amx_bf16"):
            name = "medium"
        elif capabilities.get("avx512_bf16"):
            name = "bfloat16"
        else:
            name = "float32"
    torch.set_float32_matmul_precision("medium" if name == "medium" else "highest")
    return name


def autocast(precision: str, device_type: str) -> contextlib.AbstractContextManager:
    """Returns the context of a forward pass. With bfloat16, products of matrices are computed in
    it; weights, gradients and the optimizer's state stay float32."""
    if precision == "bfloat16":
        return torch.autocast(device_type, torch.bfloat16)
    return contextlib.nullcontext()


def keep_freed_memory() -> None:
    """Linux with glibc: freed memory stays with the process. Else large tensors are given back and
    taken anew in every step, a page fault for each 4 KiB: a tenth to a quarter of a step's time."""
    with contextlib.suppress(AttributeError, OSError, TypeError):  # another C library
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-4, 0)  # M_MMAP_MAX: no block has a mapping of its own
        mallopt(-1, -1)  # M_TRIM_THRESHOLD: the heap never shrinks


def set_seed(*numbers: int) -> None:
    """What is drawn next, as dropout, depends on the numbers alone, not on what ran before."""
    torch.manual_seed(int(np.random.SeedSequence(numbers).generate_state(1)[0]))


def progress_bar(steps: int, name: str | None = None, **more: Any) -> tqdm:
    """Steps done, steps a second and the time that is left; in a log file, a line now and then."""
    interval = 0.5 if sys.stderr.isatty() else 30.0
    return tqdm(
        total=steps, unit="step", desc=name, dynamic_ncols=True, mininterval=interval, **more
    )


def write_line(out: Path, **values: Any) -> None:
    """Adds a line to the run's metrics.jsonl. JSON has no infinity: such a number becomes null."""
    finite = {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in values.items()
    }
    with (out / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(finite, allow_nan=False) + "\n")


class FiniteGuard:
    """Remembers the first step whose gradient was not finite, on the device: no step waits for it.

    `note` after every step; `check` before anything is written down, which waits for a GPU.
    """

    def __init__(self, device: torch.device) -> None:
        self.first_bad_step = torch.full((), -1, dtype=torch.int64, device=device)

    def note(self, step: int, norm: torch.Tensor) -> None:
        is_first = (self.first_bad_step < 0) & ~norm.isfinite()
        self.first_bad_step.masked_fill_(is_first, step)

    def check(self, model: torch.nn.Module | None = None) -> None:
        """Raises ValueError if there was such a step, or if a weight of `model` is not finite."""
        advice = "the last checkpoint is good; try a lower --learning-rate or more --warmup-steps"
        step = int(self.first_bad_step)
        if step >= 0:
            raise ValueError(
                f"step {step}: the gradient was not finite, so it was skipped; {advice}"
            )
        for name, parameter in model.named_parameters() if model else ():
            if not parameter.isfinite().all():
                raise ValueError(f"a weight in {name} is no longer finite; {advice}")


# ---- Processes and signals ----------------------------------------------------------------------


def process_group_backend(device: str | None, has_cuda: bool) -> str:
    """Returns the backends of the group of ranks: gloo for tensors on the CPU, nccl for GPUs.

    Both are named. Without a name, torch would register the accelerator's alone, and every sum of
    numbers on the CPU would fail.
    """
    if has_cuda and device != "cpu":
        return "cpu:gloo,cuda:nccl"
    return "gloo"


def join_processes(device: str | None = None) -> tuple[int, int]:
    """Returns this process's rank and the number of ranks, as torchrun set them, and forms their
    group; without torchrun, 0 and 1. A single rank forms a group, too, so that one GPU tests nccl.
    """
    variables = [name for name in ("RANK", "WORLD_SIZE") if name in os.environ]
    if not variables:
        return 0, 1
    if len(variables) == 1:
        raise ValueError(
            f"{variables[0]} is set in the environment, but RANK and WORLD_SIZE belong together:"
            " use torchrun, or unset it"
        )
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if world_size > 1 and device not in (None, "cpu", "cuda"):
        raise ValueError(
            f"--device {device} would put all {world_size} ranks on one GPU; with --device cuda"
            " each takes its own"
        )

    import torch.distributed.nn  # later, its default arguments would keep the group for ever

    if torch.cuda.is_available() and device != "cpu":
        local_rank, gpus = int(os.environ.get("LOCAL_RANK", rank)), torch.cuda.device_count()
        if local_rank >= gpus:
            raise ValueError(f"--nproc_per_node: {gpus} GPUs for {local_rank + 1} ranks or more")
        torch.cuda.set_device(local_rank)
    backend = process_group_backend(device, torch.cuda.is_available())
    dist.init_process_group(backend, timeout=timedelta(days=1))  # the others wait for a tokenizer
    return rank, world_size


def need_one_process() -> None:
    """Raises ValueError under torchrun with several ranks: all would do and write the same."""
    world_size = os.environ.get("WORLD_SIZE", "1")
    if world_size != "1":
        raise ValueError(
            f"fine-tuning runs in one process, not in {world_size}: start it with python"
        )


@contextlib.contextmanager
def first_process_first(rank: int) -> Iterator[None]:
    """The others wait until the first one is done with the same."""
    if dist.is_initialized() and rank > 0:
        dist.barrier()
    yield
    if dist.is_initialized() and rank == 0:
        dist.barrier()


def total(*numbers: int) -> list[int]:
    """Returns each number's sum over all ranks; on the CPU, so that no GPU is waited for."""
    if not dist.is_initialized():
        return list(numbers)
    sums = torch.tensor(numbers)
    dist.all_reduce(sums)
    return sums.tolist()


def note_signals() -> list[int]:
    """Where Ctrl-C and SIGTERM are noted, for the loop to end between two steps. Of each several
    may come: torchrun passes on what its processes have got themselves."""
    noted: list[int] = []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, frame: noted.append(number))
    return noted


def leave_group(worker: int) -> None:
    """For a data worker: Ctrl-C goes to a whole group of processes, and the worker has to go on
    until the loop ends."""
    os.setpgrp()


# ---- Checkpoints --------------------------------------------------------------------------------

CHECKPOINT_NAME = re.compile(r"step-[0-9]{9}\.pt")  # any other file is not one of ours


def checkpoint_paths(out: Path) -> list[Path]:
    """Returns the checkpoints in a run's folder, the oldest first."""
    folder = out / "checkpoints"
    return sorted(path for path in folder.glob("*") if CHECKPOINT_NAME.fullmatch(path.name))


def save_checkpoint(out: Path, state: dict) -> None:
    """Whole or not at all: written beside its place, forced to disk, renamed. Two are kept."""
    (folder := out / "checkpoints").mkdir(exist_ok=True)
    with (out / "metrics.jsonl").open("a") as file:  # what is added later, a resumed run cuts off
        os.fsync(file.fileno())
        state["metrics_bytes"] = file.tell()
    path = folder / f"step-{state['step']:09}.pt"
    unfinished = path.with_suffix(".unfinished")
    try:
        with unfinished.open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
    except (OSError, RuntimeError) as error:  # torch's own, for a full disk
        unfinished.unlink(missing_ok=True)
        raise OSError(f"{path} not saved, the one before it stays: {error}") from error
    unfinished.replace(path)
    directory = os.open(folder, os.O_RDONLY)
    os.fsync(directory)  # the new name, too
    os.close(directory)
    for old in checkpoint_paths(out)[:-2]:
        old.unlink()


def read_checkpoint(path: Path, names: Sequence[str]) -> dict:
    """Returns what a checkpoint holds. Raises an error of many kinds if it is damaged."""
    with zipfile.ZipFile(path) as archive:
        broken = archive.testzip()  # torch checks no checksums
    if broken:
        raise OSError(f"{broken} has another checksum")
    state = torch.load(path, map_location="cpu", weights_only=True)
    missing = set(names) - set(state)
    if missing:
        raise OSError(f"it lacks {', '.join(sorted(missing))}")
    return state


def load_checkpoint(out: Path, identity: dict, names: Sequence[str]) -> dict:
    """Returns the newest checkpoint that is whole, with all these names.

    Raises ValueError if there is none, or if it is of a run with another identity.
    """
    for path in reversed(checkpoint_paths(out)):
        try:
            state = read_checkpoint(path, names)
        except Exception as error:  # torch, zipfile and pickle raise many kinds
            warnings.warn(f"{path} is damaged ({type(error).__name__})", stacklevel=2)
            continue
        then = state["run"]
        changed = [
            f"{name} {then.get(name)}, not {value}"
            for name, value in identity.items()
            if then.get(name) != value
        ]
        if changed:
            raise ValueError(f"--resume: the run in {out} has {'; '.join(changed)}")
        return state
    raise ValueError(f"--resume: all checkpoints in {out} are damaged")


# ---- A run of many steps ------------------------------------------------------------------------


class Run:
    """How far a run is, and what it keeps of that. Every process has one; the first one writes."""

    def __init__(self, out: Path, rank: int, world_size: int, steps: int, identity: dict) -> None:
        """`identity`: what may not change when the run is resumed."""
        self.out, self.rank, self.world_size, self.steps = out, rank, world_size, steps
        self.identity, self.step, self.tokens = identity, 0, 0
        self.saved_step = -1
        self.seconds_before, self.metrics_bytes = 0.0, 0
        self.signals: list[int] = []

    def resume(self, **parts: Any) -> list:
        """Sets run and `parts` to the newest whole checkpoint; returns each rank's own state."""
        names = ("step", "tokens", "seconds", "metrics_bytes", "run", "own", *parts)
        state = load_checkpoint(self.out, self.identity, names)
        self.step = self.saved_step = state["step"]
        self.tokens = state["tokens"]
        self.seconds_before, self.metrics_bytes = state["seconds"], state["metrics_bytes"]
        for name, part in parts.items():
            part.load_state_dict(state[name])
        return state["own"]

    def begin(self, options: Any) -> None:
        """Before the first step: config.json has the options, metrics.jsonl is cut to what the
        checkpoint knows of, signals are noted from here on, and the clock runs."""
        if total(self.step) != [self.step * self.world_size]:
            raise ValueError(
                f"--resume: not all ranks see the checkpoint of step {self.step} in {self.out}"
            )
        if self.rank == 0:
            write_whole(self.out / "config.json", json.dumps(asdict(options), indent=2) + "\n")
            with (self.out / "metrics.jsonl").open("a") as file:
                file.truncate(min(self.metrics_bytes, file.tell()))
        self.signals = note_signals()
        self.bar = progress_bar(self.steps, initial=self.step, disable=self.rank > 0)
        self.started = time.perf_counter() - self.seconds_before

    @property
    def seconds(self) -> float:
        return round(time.perf_counter() - self.started, 2)

    def write(self, split: str, step: int, **values: Any) -> None:
        if self.rank == 0:
            place = {"tokens": self.tokens, "seconds": self.seconds}
            write_line(self.out, split=split, step=step, **place, **values)

    def show(self, loss: str) -> None:
        """In the bar, when it is drawn next."""
        self.bar.set_postfix_str(f"{loss}, {self.tokens / self.seconds:,.0f} tokens/s", False)

    def save(self, step: int, own: Any, **parts: Any) -> None:
        """A checkpoint of `parts`, as model and optimizer, which are the same in every process, and
        of what each has of its `own`."""
        gathered = [own]
        if self.world_size > 1:
            gathered = [None] * self.world_size
            dist.all_gather_object(gathered, own)
        if self.rank == 0:
            state: dict = {"step": step, "tokens": self.tokens, "seconds": self.seconds}
            state |= {"run": self.identity, "own": gathered}
            state |= {name: part.state_dict() for name, part in parts.items()}
            save_checkpoint(self.out, state)
        self.saved_step = step

    def asked_to_stop(self) -> bool:
        """By Ctrl-C or SIGTERM, in any of the processes."""
        return total(len(self.signals)) != [0]

    def add_up(self, numbers: torch.Tensor) -> list[float]:
        """Returns each number's sum over all ranks."""
        if dist.is_initialized():
            dist.all_reduce(numbers)
        return numbers.tolist()

    def end(self) -> None:
        self.bar.close()
        if dist.is_initialized():
            dist.destroy_process_group()

    def stop(self, step: int) -> NoReturn:
        self.bar.close()
        print(f"stopped before step {step}; --resume goes on from there", file=sys.stderr)
        sys.exit(128 + max(self.signals, default=0))
