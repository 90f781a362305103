"""Checkpoints: each is one file, written whole or not at all, and checked before it is used."""

import os
import re
import warnings
import zipfile
from collections.abc import Sequence
from pathlib import Path

import torch

CHECKPOINT_NAME = re.compile(r"step-[0-9]{9}\.pt")  # other files are left alone
UNFINISHED_NAME = re.compile(r"step-[0-9]{9}\.unfinished")


def checkpoint_paths(out: Path) -> list[Path]:
    """Returns the checkpoints in a run's folder, the oldest first."""
    folder = out / "checkpoints"
    return sorted(path for path in folder.glob("*") if CHECKPOINT_NAME.fullmatch(path.name))


def checkpoint_path(out: Path, step: int) -> Path:
    return out / "checkpoints" / f"step-{step:09}.pt"


def save_checkpoint(out: Path, state: dict, previous_step: int) -> None:
    """Writes a checkpoint, completely or not at all, and keeps the one of `previous_step`, which
    this run has saved or was resumed from.

    1. Note how long metrics.jsonl is. A resumed run cuts off what is added later.
    2. Write a temporary file, and force it to disk.
    3. Rename it, and force the folder to disk, which holds the new name.
    4. Delete all others of earlier steps: they are older, or damaged, or the run would have been
       resumed from them. Those of later steps must be damaged, too, and are left alone. Temporary
       files that a killed process left are deleted.
    """
    folder = out / "checkpoints"
    folder.mkdir(exist_ok=True)
    with (out / "metrics.jsonl").open("a") as file:
        os.fsync(file.fileno())
        state["metrics_bytes"] = file.tell()
    path = checkpoint_path(out, state["step"])
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
    force_to_disk(folder)
    kept = checkpoint_path(out, previous_step)
    for other in checkpoint_paths(out):
        if other < path and other != kept:
            other.unlink()
    for other in folder.glob("*"):
        if UNFINISHED_NAME.fullmatch(other.name):
            other.unlink()


def force_to_disk(*paths: Path) -> None:
    """Waits until these files and folders would survive a power cut. A folder holds the names."""
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def read_checkpoint(path: Path, names: Sequence[str]) -> dict:
    """Returns the content of a checkpoint. Raises one of many errors if the file is damaged."""
    with zipfile.ZipFile(path) as archive:
        broken = archive.testzip()  # torch does not verify checksums
    if broken:
        raise OSError(f"{broken} has another checksum")
    state = torch.load(path, map_location="cpu", weights_only=True)
    missing = set(names) - set(state)
    if missing:
        raise OSError(f"it lacks {', '.join(sorted(missing))}")
    return state


def load_checkpoint(out: Path, identity: dict, names: Sequence[str]) -> dict:
    """Returns the newest checkpoint that is complete and has all of `names`.

    Raises ValueError if there is none, or if it belongs to a run with another identity.
    """
    for path in reversed(checkpoint_paths(out)):
        try:
            state = read_checkpoint(path, names)
        except Exception as error:  # torch, zipfile and pickle raise many kinds
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            warnings.warn(f"{path} is damaged ({reason})", stacklevel=2)
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
