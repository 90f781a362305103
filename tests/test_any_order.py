"""A run's folder with events in any order: runs that end, are killed at a write or find the disk
full, checkpoints that are damaged, renamed or lost, other options, another process in the folder.

hypothesis draws the orders. The runs train one number, so that a hundred orders take seconds.
Kills, full disks and the other process are simulated; test_resume.py kills real processes.
"""

import errno
import json
import shutil
import warnings
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest import mock

import pytest
import torch
from helpers import contents
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from tqdm import tqdm

import support.folder
import support.run
from support.checkpoints import checkpoint_paths, read_checkpoint
from support.folder import run_folder, write_whole
from support.run import Run

STEPS = 6
RATES = (1.0, 0.5)
SAVE_EVERY = (1, 2, 3, 4)  # as a signal may also save at any step
WRITES = st.integers(0, 45)  # no run makes as many
# The real ones.
torch_save, write_line, write_text = torch.save, support.folder.write_line, Path.write_text


@dataclass
class Options:
    out: str
    rate: float
    save_every: int
    resume: bool


class Killed(BaseException):
    """Ends a simulated process: no `except` of the code handles it."""


def weights_after(rate: float, step: int) -> float:
    """Returns the trained number of a run that was never interrupted."""
    weight = 0.0
    for before in range(step):
        weight += rate * (before + 1)
    return weight


def train(options: Options) -> None:
    """Trains a number as train_pretrain.py trains a model, with the same calls."""
    with run_folder(options) as out:
        run = Run(out, 0, 1, STEPS, {"rate": options.rate})
        model = torch.nn.Linear(1, 1, bias=False)
        torch.nn.init.zeros_(model.weight)
        if options.resume:
            run.resume(model=model)
        run.begin(options)
        for step in range(run.step, STEPS + 1):
            is_due = step % options.save_every == 0 or step == STEPS
            if step != run.saved_step and is_due:
                run.save(step, None, model=model)
            if step == STEPS:
                break
            with torch.no_grad():
                model.weight += options.rate * (step + 1)
            run.tokens += 10
            run.write("train", step, loss=float(model.weight))
        write_whole(out / "model", str(float(model.weight)))
        run.end()


class Writes:
    """Counts a run's writes, and the moments before and after each rename or deletion. At number
    `last`, from 0, the process dies or the disk is full; a write is half done then."""

    def __init__(self, last: int | None, full: bool = False) -> None:
        self.last, self.full, self.done = last, full, 0

    def ends_here(self) -> bool:
        self.done += 1
        return self.last is not None and self.done > self.last

    def end(self) -> None:
        if self.full:
            raise OSError(errno.ENOSPC, "No space left on device")
        raise Killed

    def save(self, state, file) -> None:
        torch_save(state, file)
        if self.ends_here():
            file.truncate(file.tell() // 2)
            self.end()

    def write_text(self, path: Path, text: str, **named) -> None:
        ends = self.ends_here()
        write_text(path, text[: len(text) // 2] if ends else text, **named)
        if ends:
            self.end()

    def write_line(self, out: Path, **values) -> None:
        if self.ends_here():
            with (out / "metrics.jsonl").open("a") as file:
                file.write('{"split": "tra')
            self.end()
        write_line(out, **values)

    def before_and_after(self, function):
        def write(*arguments, **named):
            if self.ends_here():
                self.end()
            result = function(*arguments, **named)
            if self.ends_here():
                self.end()
            return result

        return write

    def patches(self) -> list:
        found = [
            mock.patch.object(torch, "save", self.save),
            mock.patch.object(support.run, "write_line", self.write_line),
            mock.patch.object(Path, "write_text", lambda *a, **k: self.write_text(*a, **k)),
        ]
        if not self.full:  # on a full disk, renaming and deleting still work
            for name in ("replace", "unlink"):
                function = self.before_and_after(getattr(Path, name))
                found.append(mock.patch.object(Path, name, function))
        return found


def step_in(path: Path) -> int | None:
    """Returns the step that a checkpoint holds, or None if it is damaged."""
    try:
        return read_checkpoint(path, ["step", "run", "model"])["step"]
    except Exception:
        return None


class RunFolder(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.folder = TemporaryDirectory()
        self.out = Path(self.folder.name) / "run"
        self.rate: float | None = None  # of the run in the folder

    def teardown(self) -> None:
        self.folder.cleanup()

    def newest(self) -> int:
        """Returns the step of the newest checkpoint that can be read, or -1."""
        steps = [step_in(path) for path in checkpoint_paths(self.out)]
        return max((step for step in steps if step is not None), default=-1)

    def unreadable(self) -> set[Path]:
        return {path for path in checkpoint_paths(self.out) if step_in(path) is None}

    def attempt(
        self, rate: float, resume: bool, writes: Writes, save_every: int = 2, in_use: bool = False
    ) -> None:
        """Runs a command, and checks that it has done its work, died, or changed nothing."""
        before, newest = contents(self.out), self.newest()
        unreadable = self.unreadable()
        has_lines = bool(before.get("metrics.jsonl"))
        holds_run = "model" in before or has_lines or bool(checkpoint_paths(self.out))
        allowed = newest >= 0 and rate == self.rate if resume else not holds_run
        options = Options(str(self.out), rate, save_every, resume)
        silent = mock.patch.object(support.run, "progress_bar", return_value=tqdm(disable=True))
        signals = mock.patch.object(support.run, "note_signals", list)
        locked = mock.patch.object(
            support.folder.fcntl, "lockf", side_effect=BlockingIOError if in_use else None
        )
        with silent, signals, locked, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            patches = writes.patches()
            for patch in patches:
                patch.start()
            error = None
            try:
                train(options)
            except (Killed, ValueError, OSError) as raised:
                error = raised
            finally:
                for patch in patches:
                    patch.stop()

        assert writes.full or not isinstance(error, OSError)
        assert isinstance(error, ValueError) == (in_use or not allowed)
        if isinstance(error, ValueError):
            assert "\n" not in str(error)
            assert contents(self.out) == before
            return
        self.rate = rate
        assert self.newest() >= newest
        assert self.unreadable() <= unreadable
        if error is None:
            self.assert_is_finished()
            if newest < STEPS:  # it has saved
                assert len(checkpoint_paths(self.out)) == 2
                assert not self.unreadable()

    def assert_is_finished(self) -> None:
        """Metrics, model and newest checkpoint are as in a run that was never interrupted."""
        assert self.newest() == STEPS
        losses = [weights_after(self.rate, step + 1) for step in range(STEPS)]
        lines = [json.loads(line) for line in (self.out / "metrics.jsonl").read_text().splitlines()]
        assert [line["step"] for line in lines] == list(range(STEPS))
        assert [line["loss"] for line in lines] == losses
        assert [line["tokens"] for line in lines] == [10 * (step + 1) for step in range(STEPS)]
        assert (self.out / "model").read_text() == str(losses[-1])

    # ---- Commands ----

    @rule(
        rate=st.sampled_from(RATES),
        save_every=st.sampled_from(SAVE_EVERY),
        last=st.none() | WRITES,
    )
    def start(self, rate, save_every, last):
        self.attempt(rate, False, Writes(last), save_every)

    @rule(save_every=st.sampled_from(SAVE_EVERY), last=st.none() | WRITES)
    def resume(self, save_every, last):
        self.attempt(self.rate or RATES[0], True, Writes(last), save_every)

    @rule(rate=st.sampled_from(RATES))
    def resume_with_some_options(self, rate):
        self.attempt(rate, resume=True, writes=Writes(None))

    @rule(resume=st.booleans(), last=WRITES)
    def run_out_of_disk(self, resume, last):
        self.attempt(self.rate or RATES[0], resume, Writes(last, full=True))

    @rule(resume=st.booleans())
    def run_while_another_process_does(self, resume):
        self.attempt(self.rate or RATES[0], resume, Writes(None), in_use=True)

    # ---- What happens to the files ----

    @precondition(lambda self: checkpoint_paths(self.out))
    @rule(data=st.data(), how=st.sampled_from(["cut", "flip", "empty", "delete", "rename"]))
    def damage(self, data, how):
        path = data.draw(st.sampled_from(checkpoint_paths(self.out)))
        content = path.read_bytes()
        if how == "delete":
            path.unlink()
        elif how == "rename":
            path.rename(path.with_name("step-best.pt"))
        elif how == "flip" and content:
            position = data.draw(st.integers(0, len(content) - 1))
            path.write_bytes(
                content[:position] + bytes([content[position] ^ 255]) + content[position + 1 :]
            )
        else:
            path.write_bytes(content[: len(content) // 2] if how == "cut" else b"")

    @precondition(lambda self: len(checkpoint_paths(self.out)) > 1)
    @rule()
    def damage_all_but_the_oldest(self):
        for path in checkpoint_paths(self.out)[1:]:
            path.write_bytes(b"")

    @precondition(lambda self: self.out.exists() and self.newest() < 0)
    @rule()
    def give_up_and_empty_the_folder(self):
        shutil.rmtree(self.out)
        self.rate = None

    @precondition(lambda self: checkpoint_paths(self.out))
    @rule(name=st.sampled_from(["step-best.pt", "step-7.pt", "step-000000009.pt.bak"]))
    def copy(self, name):
        newest = checkpoint_paths(self.out)[-1]
        newest.with_name(name).write_bytes(newest.read_bytes())

    # ---- What always holds ----

    @invariant()
    def every_checkpoint_is_of_a_run_that_was_never_interrupted(self):
        for path in checkpoint_paths(self.out):
            step = step_in(path)
            if step is not None:
                state = read_checkpoint(path, [])
                assert path.name == f"step-{step:09}.pt"
                assert float(state["model"]["weight"]) == weights_after(self.rate, step)
                assert (state["tokens"], state["run"]) == (10 * step, {"rate": self.rate})

    @invariant()
    def the_files_of_a_run_are_whole(self):
        config, model = self.out / "config.json", self.out / "model"
        assert not config.exists() or json.loads(config.read_text())["rate"] in RATES
        assert not model.exists() or model.read_text() == str(weights_after(self.rate, STEPS))


TestRunFolder = pytest.mark.slow(RunFolder.TestCase)
TestRunFolder.settings = settings(
    RunFolder.TestCase.settings, max_examples=100, stateful_step_count=15
)
