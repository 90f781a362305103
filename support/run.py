"""A run of many steps: how far it is, what it writes on the way, and how it is resumed."""

import contextlib
import json
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

from support.checkpoints import load_checkpoint, save_checkpoint
from support.folder import write_line, write_whole
from support.processes import note_signals, total


def set_seed(*numbers: int) -> None:
    """Seeds torch with a hash of these numbers, so that what is drawn next (dropout, for example)
    does not depend on what was drawn before.
    """
    torch.manual_seed(int(np.random.SeedSequence(numbers).generate_state(1)[0]))


class Display:
    """A stream for what people see of a run. What cannot be written is dropped: a full disk under a
    log, or a pipe that was closed (Ctrl-C also ends the tee of `| tee log`), must not end training.
    """

    def __init__(self, stream: Any) -> None:
        self.stream = stream

    def write(self, text: str) -> None:
        with contextlib.suppress(OSError):
            self.stream.write(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError):
            self.stream.flush()

    def __getattr__(self, name: str) -> Any:  # encoding, isatty, fileno
        return getattr(self.stream, name)

    def __eq__(self, other: object) -> bool:
        # tqdm.write clears a bar only if the bar's stream equals the one that it writes to.
        return self.stream == getattr(other, "stream", other)


def show(text: str, stream: Any = None) -> None:
    """Prints a line on standard output, or on another stream, if it can be written to."""
    print(text, file=Display(stream or sys.stdout))


def progress_bar(steps: int, name: str | None = None, **more: Any) -> tqdm:
    """Returns a bar of the steps done, steps per second and time left. In a log file, or wherever
    there is no terminal, it is drawn at most once in 30 seconds.
    """
    return tqdm(
        total=steps,
        unit="step",
        desc=name,
        dynamic_ncols=True,
        mininterval=0.5 if sys.stderr.isatty() else 30.0,
        file=Display(sys.stderr),
        **more,
    )


class FiniteGuard:
    """Remembers, on the device, the first step whose gradient was not finite.

    `note` is called after every step and does not wait for a GPU. `check` is called before anything
    is written down, and waits.
    """

    def __init__(self, device: torch.device, advice: str = "try a lower --learning-rate") -> None:
        """advice: what the message of an error ends with."""
        self.advice = advice
        self.first_bad_step = torch.full((), -1, dtype=torch.int64, device=device)

    def note(self, step: int, norm: torch.Tensor) -> None:
        is_first = (self.first_bad_step < 0) & ~norm.isfinite()
        self.first_bad_step.masked_fill_(is_first, step)

    def check(self, model: torch.nn.Module | None = None) -> None:
        """Raises ValueError if there was such a step, or if a weight of `model` is not finite."""
        step = int(self.first_bad_step)
        if step >= 0:
            raise ValueError(
                f"step {step}: the gradient was not finite, so it was skipped; {self.advice}"
            )
        if model is None:
            return
        for name, parameter in model.named_parameters():
            if not parameter.isfinite().all():
                raise ValueError(f"a weight in {name} is no longer finite; {self.advice}")


class Run:
    """How far a run is, and what it writes. Every rank has one; only rank 0 writes."""

    def __init__(self, out: Path, rank: int, world_size: int, steps: int, identity: dict) -> None:
        """identity: everything that must be the same when the run is resumed."""
        self.out, self.rank, self.world_size, self.steps = out, rank, world_size, steps
        self.identity = identity
        self.step = 0  # the one at which this process starts; the loop counts on by itself
        self.tokens = 0  # that have been trained on, by all ranks
        self.saved_step = -1  # of the newest checkpoint; -1 without one
        self.seconds_before = 0.0  # that earlier processes of the run took
        self.metrics_bytes = 0  # length of metrics.jsonl at the checkpoint
        self.signals: list[int] = []

    def resume(self, **parts: Any) -> list:
        """Loads the newest complete checkpoint into the run and into `parts`, such as model and
        optimizer. Returns what each rank saved of its own.
        """
        names = ("step", "tokens", "seconds", "metrics_bytes", "run", "own", *parts)
        state = load_checkpoint(self.out, self.identity, names)
        self.step = self.saved_step = state["step"]
        self.tokens = state["tokens"]
        self.seconds_before = state["seconds"]
        self.metrics_bytes = state["metrics_bytes"]
        for name, part in parts.items():
            part.load_state_dict(state[name])
        return state["own"]

    def begin(self, options: Any) -> None:
        """Prepares the folder before the first step: writes config.json, and cuts metrics.jsonl to
        the length that the checkpoint knows. From here on, signals are noted and the clock runs.
        """
        # All ranks start at the same step if the sum of their steps is so many times this one.
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
        """Seconds of training, over all processes of the run."""
        return round(time.perf_counter() - self.started, 2)

    def write(self, split: str, step: int, **values: Any) -> None:
        """Adds a line to metrics.jsonl."""
        if self.rank == 0:
            progress = {"tokens": self.tokens, "seconds": self.seconds}
            write_line(self.out, split=split, step=step, **progress, **values)

    def show_above_bar(self, text: str) -> None:
        self.bar.write(text, file=Display(sys.stdout))

    def show(self, loss: str) -> None:
        """Sets the text behind the bar, which appears when the bar is drawn next."""
        rate = self.tokens / self.seconds
        self.bar.set_postfix_str(f"{loss}, {rate:,.0f} tokens/s", refresh=False)

    def save(self, step: int, own: Any, **parts: Any) -> None:
        """Writes a checkpoint. parts: what is the same in every rank, such as model and optimizer.
        own: what this rank keeps for itself.
        """
        gathered = [own]
        if self.world_size > 1:
            gathered = [None] * self.world_size
            dist.all_gather_object(gathered, own)
        if self.rank == 0:
            state: dict = {"step": step, "tokens": self.tokens, "seconds": self.seconds}
            state |= {"run": self.identity, "own": gathered}
            state |= {name: part.state_dict() for name, part in parts.items()}
            save_checkpoint(self.out, state, self.saved_step)  # adds "metrics_bytes"
        self.saved_step = step

    def asked_to_stop(self) -> bool:
        """Returns whether any rank has received a signal to stop."""
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
        """Ends the process after a signal, with the exit status that belongs to it."""
        self.bar.close()
        message = f"stopped before step {step}; --resume continues from there"
        show(message, sys.stderr)
        sys.exit(128 + max(self.signals, default=0))
