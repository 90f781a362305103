"""The folder of a run: one process at a time uses it, and no run overwrites another."""

import contextlib
import fcntl
import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from support.checkpoints import checkpoint_paths, force_to_disk


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
            can_resume = hasattr(options, "resume")
            try:
                if not resume:  # before anything is made, so that a rejected run changes nothing
                    check_holds_no_run(out, can_resume)
                out.mkdir(parents=True, exist_ok=True)
                stack.enter_context(lock(out))
            except OSError as error:
                raise ValueError(f"--out {out} cannot be written: {error}") from error
            if not resume:  # again, since another process may have been faster
                check_holds_no_run(out, can_resume)
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


def check_lies_outside(out: str, source: str | None, flag: str) -> None:
    """Raises ValueError if a run's folder lies inside a folder of its data: the files of the run
    would be read as data by the next run, and when this one is resumed.

    source: a directory, or a name of data that is not one, such as "sample".
    """
    if source in (None, "sample") or not Path(source).is_dir():
        return
    if Path(out).resolve().is_relative_to(Path(source).resolve()):
        raise ValueError(f"--out {out} lies inside {flag} {source}, and may become a part of it")


def check_holds_no_run(out: Path, can_resume: bool) -> None:
    """Raises ValueError if a folder has what a new run would overwrite: metrics, a model, or
    checkpoints. A config.json alone is overwritten if a run wrote it, which died early; that of a
    model, or of something else, is not.
    """
    metrics = out / "metrics.jsonl"
    has_metrics = metrics.exists() and metrics.stat().st_size > 0
    if has_metrics or (out / "model").exists() or checkpoint_paths(out):
        advice = "name a new folder, or --resume" if can_resume else "name a new folder"
        if (out / "model.before").exists():
            advice += "; it holds the model of a killed run in model.before"
        raise ValueError(f"--out {out} holds another run; {advice}")
    config = out / "config.json"
    if config.exists() and not is_of_a_run(config):
        raise ValueError(f"--out {out} has a config.json that no run wrote; name a new folder")


def is_of_a_run(config: Path) -> bool:
    """Returns whether a config.json has the options of a run."""
    try:
        content = json.loads(config.read_text(encoding="utf-8"))
    except ValueError:
        return False
    return isinstance(content, dict) and "out" in content


def write_model(model: Any, tokenizer: Any, folder: Path) -> None:
    """Writes a model with its tokenizer. The one before it stays until this one is on the disk and
    has its name. (A folder cannot be replaced at once: a process that is killed between the two
    renamings leaves both models, complete, as .before and .unfinished.)
    """
    unfinished = folder.with_name(folder.name + ".unfinished")
    before = folder.with_name(folder.name + ".before")
    model.save_pretrained(unfinished, tokenizer)
    force_to_disk(*unfinished.iterdir(), unfinished)
    if folder.is_symlink():  # someone has moved the one before, and left a link: drop the link
        folder.unlink()
    elif folder.exists():
        shutil.rmtree(before, ignore_errors=True)
        folder.rename(before)
    unfinished.rename(folder)
    force_to_disk(folder.parent)
    shutil.rmtree(before, ignore_errors=True)


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
