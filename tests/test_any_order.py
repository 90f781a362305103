"""Any order of what can happen to a run's folder: runs that end, are killed at a write or find the
disk full, files that are damaged, renamed or lost, other options, another process.

hypothesis draws the orders. The runs train one number, so that a hundred orders take seconds, and a
kill is an exception that nothing handles; test_resume.py kills real processes.
"""

import errno
import json
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
torch_save, write_line = torch.save, support.folder.write_line  # the real ones


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
    """The writes of a run, counted. The one with index `last` is the last: half of it is done, and
    the process dies, or the disk is full."""

    def __init__(self, last: int | None, full: bool = False) -> None:
        self.last, self.full, self.done = last, full, 0

    def ends_here(self) -> bool:
        self.done += 1
        return self.last is not None and self.done > self.last

    def end(self) -> None:
        raise OSError(errno.ENOSPC, "No space left on device") if self.full else Killed

    def save(self, state, file) -> None:
        path = Path(file.name)
        ends = self.ends_here()
        torch_save(state, file)
        if ends:
            file.flush()
            content = path.read_bytes()
            file.truncate(len(content) // 2)
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
        return [
            mock.patch.object(torch, "save", self.save),
            mock.patch.object(support.run, "write_line", self.write_line),
            mock.patch.object(Path, "replace", self.before_and_after(Path.replace)),
            # A full disk still deletes.
            mock.patch.object(
                Path, "unlink", Path.unlink if self.full else self.before_and_after(Path.unlink)
            ),
        ]


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

    def attempt(
        self, rate: float, resume: bool, writes: Writes, save_every: int = 2, in_use: bool = False
    ) -> None:
        """Runs a command, and checks that it has done its work, died, or changed nothing."""
        before, newest = contents(self.out), self.newest()
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
        if isinstance(error, ValueError):
            assert "\n" not in str(error)
            assert contents(self.out) == before
            assert in_use or not resume or newest < 0 or rate != self.rate
            return
        assert not in_use
        assert resume == (newest >= 0)
        self.rate = rate
        assert self.newest() >= newest
        if error is None:
            self.assert_is_finished()

    def assert_is_finished(self) -> None:
        """Everything is as in a run that was never interrupted."""
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
        last=st.none() | st.integers(0, 40),
    )
    def start(self, rate, save_every, last):
        self.attempt(rate, False, Writes(last), save_every)

    @rule(save_every=st.sampled_from(SAVE_EVERY), last=st.none() | st.integers(0, 40))
    def resume(self, save_every, last):
        self.attempt(self.rate or RATES[0], True, Writes(last), save_every)

    @rule(rate=st.sampled_from(RATES))
    def resume_with_some_options(self, rate):
        self.attempt(rate, resume=True, writes=Writes(None))

    @rule(resume=st.booleans(), last=st.integers(0, 20))
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

    @precondition(lambda self: len(checkpoint_paths(self.out)) > 2)
    @rule()
    def damage_all_but_the_oldest(self):
        for path in checkpoint_paths(self.out)[1:]:
            path.write_bytes(b"")

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


TestRunFolder = pytest.mark.slow(RunFolder.TestCase)
TestRunFolder.settings = settings(max_examples=100, stateful_step_count=15)
