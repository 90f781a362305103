"""The folder of a run: one process at a time uses it, and no run overwrites another."""

import contextlib
import fcntl
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from support.checkpoints import checkpoint_paths


@contextlib.contextmanager
def run_folder(options: Any, rank: int = 0) -> Iterator[Path]:
    """Yields the folder --out, locked for this run: no other process can use it meanwhile.

    A new run needs a folder that holds no run, and --resume one that holds a checkpoint. Otherwise
    raises ValueError and changes nothing. Only rank 0 locks the folder.
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
    """Locks a folder. The lock ends with this process, however it ends.

    It is a POSIX record lock. Forked data workers inherit a lock of `flock`, and would keep it when
    the process is killed; they do not inherit this one.
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
    """Writes a text file. If the process is killed, the file is either complete or as before."""
    unfinished = path.with_name(path.name + ".unfinished")
    unfinished.write_text(text, encoding="utf-8")
    unfinished.replace(path)


def write_line(out: Path, **values: Any) -> None:
    """Adds a line to the run's metrics.jsonl. JSON has no infinity: such a number becomes null."""
    finite = {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in values.items()
    }
    with (out / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(finite, allow_nan=False) + "\n")
