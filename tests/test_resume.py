"""A run that was stopped, at any moment and in any way, resumes and ends with the same bits as one
that was never stopped, and nothing overwrites a run.
"""

import itertools
import json
import math
import multiprocessing
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest
import torch
from helpers import (
    OPTIONS,
    ROOT,
    assert_same,
    checkpoint_of,
    child,
    contents,
    in_process,
    metrics_of,
    python,
    run,
    run_as_main,
    start,
    state,
    wait,
)
from strategies import (
    PADDING,
    TINY,
    Malicious,
    publish,
    small_tokenizer,
    write_many_documents,
    write_reviews,
    write_texts,
)

import train_pretrain
import train_sst2
from bert import SST2BertModel
from train_pretrain import PretrainOptions, lock_folder, note_signals, pretrain, write_model
from train_sst2 import SST2Options


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> str:
    return write_many_documents(tmp_path_factory.mktemp("corpus") / "corpus.jsonl")


@pytest.fixture(scope="module")
def uninterrupted(corpus, tmp_path_factory) -> tuple:
    out = tmp_path_factory.mktemp("runs") / "uninterrupted"
    assert in_process(replace(OPTIONS, dataset=corpus, out=str(out))) == 0
    return state(out)


def resumes(options: PretrainOptions) -> PretrainOptions:
    """Returns the options with which a person goes on: --resume once there is a checkpoint."""
    return replace(options, resume=(Path(options.out) / "checkpoint.pt").exists())


# ---- A process that dies, at every write of a run -------------------------------


class Killed(BaseException):
    """Ends a simulated process: no `except` of the code handles it."""


class Writes:
    """Counts what a run does to its folder, and ends the process at number `last`, from 0: before
    or after a renaming, a deletion or a write to disk, or with half a file or half a line written.
    """

    def __init__(self, last: int | None) -> None:
        self.last, self.done = last, 0

    def ends_here(self) -> bool:
        self.done += 1
        return self.last is not None and self.done == self.last + 1

    def before_and_after(self, function):
        def write(*arguments, **named):
            if self.ends_here():
                raise Killed
            result = function(*arguments, **named)
            if self.ends_here():
                raise Killed
            return result

        return write

    def half_saved(self, save):
        def write(state, file):
            save(state, file)
            if self.ends_here():
                file.truncate(file.tell() // 2)
                raise Killed

        return write

    def half_a_text(self, write_text):
        def write(path, text, **named):
            ends = self.ends_here()
            write_text(path, text[: len(text) // 2] if ends else text, **named)
            if ends:
                raise Killed

        return write

    def half_a_line(self, write_line):
        def write(out, **values):
            if self.ends_here():
                with (out / "metrics.jsonl").open("a") as file:
                    file.write('{"split": "tra')
                raise Killed
            write_line(out, **values)

        return write

    def run(self, options: PretrainOptions) -> bool:
        """Pretrains in this process. Returns whether the run came to its end."""
        patches = [
            (torch, "save", self.half_saved),
            (train_pretrain, "write_line", self.half_a_line),
            (Path, "write_text", self.half_a_text),
            (Path, "replace", self.before_and_after),
            (Path, "rename", self.before_and_after),
            (Path, "mkdir", self.before_and_after),
            (os, "fsync", self.before_and_after),
        ]
        with mock.patch.multiple(train_pretrain, note_signals=list):
            started = [
                mock.patch.object(owner, name, wrap(getattr(owner, name)))
                for owner, name, wrap in patches
            ]
            for patch in started:
                patch.start()
            try:
                run(options)
            except Killed:
                return False
            finally:
                for patch in started:
                    patch.stop()
        return True


@pytest.mark.slow
def test_a_run_killed_at_any_write_resumes_to_the_same_bits(options, tmp_path):
    """Every write is tried, from the first folder that is made to the last file of the model. Every
    third time, the resumed run is killed at a write, too."""
    options = replace(options, steps=2, save_every=1)
    run(replace(options, out=str(tmp_path / "whole")))  # and the corpus is in the cache
    expected = state(tmp_path / "whole")
    counted = Writes(None)
    assert counted.run(replace(options, out=str(tmp_path / "counted")))
    assert counted.done > 40
    for last in range(counted.done):
        here = replace(options, out=str(tmp_path / f"{last}"))
        assert not Writes(last).run(here)
        if last % 3 == 0:
            Writes((5 * last) % counted.done).run(resumes(here))
        assert Writes(None).run(resumes(here)), last
        assert_same(state(Path(here.out)), expected)
        assert not (Path(here.out) / "checkpoint.unfinished").exists()


@pytest.mark.slow
def test_a_run_killed_at_random_moments_resumes_to_the_same_bits(corpus, uninterrupted, tmp_path):
    """kill -9 at twelve moments between the first second and the last, with another number of
    workers each time."""
    options = replace(OPTIONS, dataset=corpus, out=str(tmp_path / "run"))
    started = time.perf_counter()
    assert in_process(replace(options, out=str(tmp_path / "timed"))) == 0
    whole = time.perf_counter() - started
    generator = random.Random(0)
    landed = 0
    for attempt in range(12):
        now = replace(resumes(options), workers=attempt % 3)
        landed += in_process(now, generator.uniform(0.1, 0.7) * whole) == -signal.SIGKILL
    assert landed >= 3
    assert in_process(resumes(options)) == 0
    assert_same(state(tmp_path / "run"), uninterrupted)


# ---- Signals ----------------------------------------------------------------------


def in_group(options: PretrainOptions) -> None:
    os.setpgrp()  # so that a signal goes to this process and its workers, not to the tests
    child(options)


def wait_for_lines(out: Path, lines: int, process) -> None:
    deadline = time.monotonic() + 60
    metrics = out / "metrics.jsonl"
    while not metrics.exists() or metrics.read_text().count("\n") < lines:
        assert process.is_alive()
        assert time.monotonic() < deadline
        time.sleep(0.005)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("signal_number", "workers"),
    [(signal.SIGTERM, 0), (signal.SIGTERM, 2), (signal.SIGINT, 2), (signal.SIGHUP, 0)],
)
def test_a_signal_to_the_whole_group_saves_and_ends_and_the_run_resumes_to_the_same_bits(
    signal_number, workers, corpus, uninterrupted, tmp_path
):
    """No checkpoint is due before the end, so the signal has saved the one that is found."""
    options = replace(OPTIONS, dataset=corpus, out=str(tmp_path), save_every=1000, workers=workers)
    process = start(in_group, options)
    wait_for_lines(tmp_path, 3, process)
    os.killpg(process.pid, signal_number)
    assert wait(process) == [1]
    assert 0 < checkpoint_of(tmp_path)["progress"]["step"] < 30
    assert not (tmp_path / "model").exists()
    assert in_process(replace(options, resume=True)) == 0
    assert_same(state(tmp_path), uninterrupted)


@pytest.fixture
def _handlers():
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.getsignal(number) for number in numbers}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("_handlers")
def test_a_second_ctrl_c_ends_a_run_at_once():
    noted = note_signals()
    os.kill(os.getpid(), signal.SIGTERM)
    os.kill(os.getpid(), signal.SIGINT)
    assert noted == [signal.SIGTERM, signal.SIGINT]
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.usefixtures("_handlers")
def test_a_signal_that_is_ignored_stays_ignored():
    """nohup makes a process ignore SIGHUP."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    noted = note_signals()
    os.kill(os.getpid(), signal.SIGHUP)
    assert noted == []


@pytest.mark.slow
@pytest.mark.parametrize("signal_number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_while_a_run_prepares_ends_it_and_the_same_command_starts_again(
    signal_number, small_corpus, tmp_path
):
    """Nothing is left that would stop the next run."""
    rows = ["\n\n".join(f"{a} {b} {c}" for b in "abcdefgh" for c in "abcdefgh") for a in "abcdefgh"]
    write_texts(tmp_path / "large.jsonl", rows * 400)
    line = ["train_pretrain.py", "--dataset", f"{tmp_path}/large.jsonl", "--steps", "1"]
    line += ["--tokenizer", str(small_corpus), "--out", f"{tmp_path}/run", "--device", "cpu"]
    line += ["--workers", "0", "--max-seq-length", "16"]
    process = start(run_as_main, *line, output=tmp_path / "log")
    time.sleep(0.8)
    os.kill(process.pid, signal_number)
    assert wait(process) in ([-signal.SIGTERM], [130])
    assert "Traceback" not in (tmp_path / "log").read_text()
    assert not contents(tmp_path / "run")
    assert wait(start(run_as_main, *line, output=tmp_path / "log")) == [0]


# ---- The checkpoint -----------------------------------------------------------------


@pytest.fixture
def finished(corpus, tmp_path) -> PretrainOptions:
    """A run of 6 steps has ended; these options resume it."""
    options = replace(OPTIONS, dataset=corpus, out=str(tmp_path / "run"), steps=6, save_every=2)
    run(options)
    return replace(options, resume=True)


def test_a_checkpoint_loads_as_plain_tensors_and_numbers(finished):
    """Weights, optimizer and step are enough: nothing is pickled that could be code."""
    found = torch.load(Path(finished.out) / "checkpoint.pt", weights_only=True)
    assert set(found) == {"progress", "identity", "metrics_bytes", "model", "optimizer"}
    assert found["progress"]["step"] == 6


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs /proc")
def test_a_checkpoint_is_on_disk_before_it_has_its_name_and_then_so_is_the_name(
    options, monkeypatch
):
    """A computer that loses its power keeps what was forced to disk, and perhaps nothing else."""
    done, fsync, replace_file = [], os.fsync, Path.replace

    def noted_fsync(descriptor):
        done.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
        fsync(descriptor)

    def noted_replace(path, other):
        done.append(f"{path.name} -> {Path(other).name}")
        return replace_file(path, other)

    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(Path, "replace", noted_replace)
    run(options)
    saved = ["metrics.jsonl", "checkpoint.unfinished", "checkpoint.unfinished -> checkpoint.pt"]
    assert done[:12] == [*saved, Path(options.out).name] * 3  # at the steps 0, 2 and 4


def test_a_malicious_checkpoint_is_never_run(finished, tmp_path):
    torch.save({"progress": Malicious(f"{tmp_path}/was run")}, Path(finished.out) / "checkpoint.pt")
    with pytest.raises(ValueError, match=r"checkpoint\.pt"):
        run(finished)
    assert not (tmp_path / "was run").exists()


def test_a_damaged_checkpoint_is_named_and_nothing_is_touched(finished):
    path = Path(finished.out) / "checkpoint.pt"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    before = contents(Path(finished.out))
    with pytest.raises(ValueError, match=r"checkpoint\.pt"):
        run(finished)
    assert contents(Path(finished.out)) == before


def test_a_foreign_file_in_the_folder_is_left_alone(finished):
    """Copies of a checkpoint once counted as the newest, and pushed out good ones."""
    names = ("step-9.pt", "checkpoint.pt.bak", "notes.txt")
    for name in names:
        (Path(finished.out) / name).write_text("foreign")
    run(finished)
    assert all((Path(finished.out) / name).read_text() == "foreign" for name in names)


def test_resuming_a_finished_run_changes_nothing(finished):
    """A run that was killed while it wrote model/ is completed so."""
    before = state(Path(finished.out))
    run(finished)
    assert_same(state(Path(finished.out)), before)


def test_a_checkpoint_of_step_0_comes_before_the_first_step(options):
    """A run that dies in its first step resumes with the initial weights that it had."""
    whole = replace(options, out=f"{options.out}-whole")
    run(whole)
    in_the_first = mock.patch.object(train_pretrain, "add_gradients", side_effect=ZeroDivisionError)
    with in_the_first, pytest.raises(ZeroDivisionError):
        run(options)
    assert checkpoint_of(Path(options.out))["progress"]["step"] == 0
    run(replace(options, resume=True))
    assert_same(state(Path(options.out)), state(Path(whole.out)))


def test_the_clock_and_the_count_of_tokens_of_a_resumed_run_go_on(options, monkeypatch):
    """An hour passes before the run is resumed, and does not count."""
    update, steps = train_pretrain.update, iter(range(100))

    def dies_in_step_3(*arguments):
        if next(steps) == 3:
            raise ZeroDivisionError
        return update(*arguments)

    clock = itertools.count(1000)  # each look at it takes a second
    monkeypatch.setattr(train_pretrain.time, "perf_counter", lambda: next(clock))
    whole = replace(options, out=f"{options.out}-whole")
    run(whole)
    monkeypatch.setattr(train_pretrain, "update", dies_in_step_3)
    with pytest.raises(ZeroDivisionError):
        run(options)
    clock = itertools.count(4600)
    run(replace(options, resume=True))
    lines = (Path(options.out) / "metrics.jsonl").read_text().splitlines()
    seconds = [json.loads(line)["seconds"] for line in lines]
    assert seconds == sorted(seconds)
    assert seconds[-1] < 60
    tokens = [line["tokens"] for line in metrics_of(Path(options.out))]
    assert tokens == [line["tokens"] for line in metrics_of(Path(whole.out))]
    assert tokens[-1] > tokens[1] > 0


def with_limit(options: PretrainOptions, limit: int) -> None:
    """Pretrains on a disk with room for `limit` bytes in a file."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # an error of the write instead
    with mock.patch("tyro.cli", return_value=options):
        train_pretrain.run_script(pretrain, PretrainOptions)


@pytest.mark.slow
def test_a_full_disk_is_one_message_and_leaves_the_checkpoint_before(
    corpus, uninterrupted, tmp_path
):
    options = replace(OPTIONS, dataset=corpus, out=str(tmp_path / "run"))
    update, steps = train_pretrain.update, iter(range(100))

    def dies_in_step_5(*arguments):
        if next(steps) == 5:
            raise ZeroDivisionError
        return update(*arguments)

    in_step_5 = mock.patch.object(train_pretrain, "update", dies_in_step_5)
    with in_step_5, pytest.raises(ZeroDivisionError):
        run(options)
    options = replace(options, resume=True)
    before = (tmp_path / "run/checkpoint.pt").read_bytes()
    assert wait(start(with_limit, options, 200_000, output=tmp_path / "log")) == [2]
    errors = [line for line in (tmp_path / "log").read_text().splitlines() if "error: " in line]
    assert len(errors) == 1
    assert "checkpoint.pt" in errors[0]
    assert "Traceback" not in (tmp_path / "log").read_text()
    assert (tmp_path / "run/checkpoint.pt").read_bytes() == before
    assert in_process(options) == 0
    assert_same(state(tmp_path / "run"), uninterrupted)


def write_with_limit(folder: Path, limit: int) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    with mock.patch("tyro.cli"):
        train_pretrain.run_script(lambda _: publish(folder), PretrainOptions)


@pytest.mark.slow
def test_a_full_disk_while_a_model_is_written_is_one_message(tmp_path):
    process = start(write_with_limit, tmp_path / "model", 5_000, output=tmp_path / "log")
    assert wait(process) == [2]
    assert "Traceback" not in (tmp_path / "log").read_text()


# ---- What a resumed run may change ----------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"learning_rate": 0.5}, ["learning_rate was 0.001, and is 0.5"]),
        ({"steps": 9, "batch_size": 3}, ["steps was 6, and is 9", "batch_size was 2, and is 3"]),
        ({"size": "mini"}, ["size was tiny, and is mini"]),
        ({"dropout": 0.2}, ["dropout was 0.1, and is 0.2"]),
        ({"seed": 1}, ["seed was 0, and is 1"]),
        ({"accumulate": 1}, ["accumulate was 2, and is 1"]),
        ({"precision": "medium"}, ["precision was float32, and is medium"]),
    ],
)
def test_other_options_are_rejected_and_named(changes, expected, finished):
    before = contents(Path(finished.out))
    with pytest.raises(ValueError, match="--resume") as rejected:
        run(replace(finished, **changes))
    assert all(text in str(rejected.value) for text in expected)
    assert contents(Path(finished.out)) == before


def test_another_text_is_rejected(corpus, tmp_path):
    """It has the same name, and sentences and documents of the same lengths and words: two words
    have changed places."""
    file = Path(shutil.copy(corpus, tmp_path / "corpus.jsonl"))
    options = replace(OPTIONS, dataset=str(file), out=str(tmp_path / "run"), steps=2)
    run(options)
    text = file.read_text()
    trained_on = text.replace("ab b aa", "b ab aa", 1)
    held_out = "m zm zz".join(text.rsplit("zm m zz", 1))  # near the end of the file
    for other in (trained_on, held_out):
        assert other != text
        file.write_text(other)
        with pytest.raises(ValueError, match="--resume"):
            run(replace(options, resume=True))


def test_a_resumed_run_may_change_what_changes_no_result(corpus, uninterrupted, tmp_path):
    """Its folder, how many workers there are, and how often it is saved."""
    options = replace(OPTIONS, dataset=corpus, out=str(tmp_path / "run"), save_every=1000)
    with (
        mock.patch.object(train_pretrain, "note_signals", return_value=[signal.SIGTERM]),
        pytest.raises(SystemExit),
    ):
        run(options)
    assert checkpoint_of(tmp_path / "run")["progress"]["step"] == 1
    moved = (tmp_path / "run").rename(tmp_path / "moved")
    run(replace(options, out=str(moved), resume=True, workers=1, save_every=7))
    assert_same(state(moved), uninterrupted)


# ---- Numbers that are not finite --------------------------------------------------------


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_ends_the_run_before_anything_is_written(
    bad, corpus, tmp_path, monkeypatch
):
    """The checkpoint that is left is good, also if the bad step lies between two lines."""
    options = replace(OPTIONS, dataset=corpus, out=str(tmp_path), save_every=2, log_every=2)
    update, steps = train_pretrain.update, iter(range(100))

    def poisoned(model, optimizer, rate):
        if next(steps) == 4:
            next(model.parameters()).grad.fill_(bad)
        return update(model, optimizer, rate)

    monkeypatch.setattr(train_pretrain, "update", poisoned)
    with pytest.raises(ValueError, match="step 6.*--learning-rate"):
        run(options)
    found = checkpoint_of(tmp_path)
    assert found["progress"]["step"] == 4
    assert all(tensor.isfinite().all() for tensor in found["model"].values())
    assert metrics_of(tmp_path)[-1]["step"] == 4


def test_a_weight_that_is_not_finite_is_not_saved(corpus, tmp_path, monkeypatch):
    """An update may overflow though the gradient is finite."""
    options = replace(OPTIONS, dataset=corpus, out=str(tmp_path), log_every=1000, save_every=2)
    update, steps = train_pretrain.update, iter(range(100))

    def spoiled(model, optimizer, rate):
        norm = update(model, optimizer, rate)
        if next(steps) == 1:
            model.nsp.bias.data[0] = math.inf
        return norm

    monkeypatch.setattr(train_pretrain, "update", spoiled)
    with pytest.raises(ValueError, match=r"nsp\.bias"):
        run(options)
    assert checkpoint_of(tmp_path)["progress"]["step"] == 0


# ---- Nothing overwrites a run -------------------------------------------------------------


@pytest.mark.parametrize("left", ["checkpoint.pt", "model", "metrics.jsonl", "config.json"])
def test_a_new_run_is_rejected_where_another_one_has_left_anything(left, options):
    run(options)
    out = Path(options.out)
    for name in {"checkpoint.pt", "model", "metrics.jsonl", "config.json"} - {left}:
        (out / name).rename(out.parent / name)
    before = contents(out)
    for command in (run, lambda o: train_sst2.main(SST2Options(out=o.out))):
        with pytest.raises(ValueError, match=f"--out .*{left}"):
            command(options)
    assert contents(out) == before


@pytest.mark.parametrize("has_folder", [True, False])
def test_resuming_without_a_checkpoint_is_rejected_and_touches_nothing(has_folder, options):
    """A run that started anew would overwrite the metrics and the model that are there."""
    out = Path(options.out)
    if has_folder:
        run(options)
        (out / "checkpoint.pt").unlink()
    before = contents(out)
    with pytest.raises(ValueError, match=r"--resume: .*checkpoint\.pt"):
        run(replace(options, resume=True))
    assert contents(out) == before
    assert out.exists() == has_folder


def test_a_run_that_was_killed_before_its_first_checkpoint_can_be_started_again(options):
    out = Path(options.out)
    out.mkdir(parents=True)
    (out / "metrics.jsonl").touch()
    (out / "checkpoint.unfinished").write_bytes(b"half")
    run(options)
    assert checkpoint_of(out)["progress"]["step"] == 4


HOLDER = """
import os, sys, time
from pathlib import Path
from train_pretrain import lock_folder
lock = lock_folder(Path(sys.argv[1]), resume=Path(sys.argv[1], "checkpoint.pt").exists())
if os.fork() == 0:  # a data worker, which outlives the process for a while
    time.sleep(60)
    os._exit(0)
print("locked", flush=True)
time.sleep(60)
"""


@pytest.fixture
def hold():
    """Starts a process that holds a folder, with a child that outlives it."""
    started: list[subprocess.Popen] = []

    def start_holder(out: str) -> subprocess.Popen:
        line = [sys.executable, "-c", HOLDER, out]
        process = subprocess.Popen(
            line, cwd=ROOT, stdout=subprocess.PIPE, text=True, start_new_session=True
        )
        started.append(process)
        assert process.stdout is not None
        assert process.stdout.readline() == "locked\n"
        return process

    yield start_holder
    for process in started:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@pytest.mark.slow
@pytest.mark.parametrize("resume", [False, True])
def test_a_second_process_in_the_same_folder_is_rejected_and_changes_nothing(resume, options, hold):
    """The lock dies with its process, though a child of it lives on."""
    if resume:
        run(options)
    process = hold(options.out)
    before = contents(Path(options.out))
    with pytest.raises(ValueError, match="--out .* in use"):
        run(replace(options, resume=resume))
    if not resume:
        with pytest.raises(ValueError, match="--out .* in use"):
            train_sst2.main(SST2Options(out=options.out, device="cpu"))
    assert contents(Path(options.out)) == before
    process.kill()
    process.wait()
    run(replace(options, resume=resume))


def test_a_run_that_waited_for_the_lock_looks_at_the_folder_once_more(options):
    """Another run may have begun and ended there while this one tokenized."""
    out = Path(options.out)
    prepare = train_pretrain.prepare

    def meanwhile(own):
        if own.seed == 1:
            run(options)
        return prepare(own)

    with (
        mock.patch.object(train_pretrain, "prepare", meanwhile),
        pytest.raises(ValueError, match="--out"),
    ):
        run(replace(options, seed=1))
    assert json.loads((out / "config.json").read_text())["seed"] == 0


def test_the_lock_ends_with_the_run(options):
    run(options)
    lock_folder(Path(options.out), resume=True).close()


# ---- model/ ---------------------------------------------------------------------------------


def test_a_model_is_replaced_by_a_whole_one_or_not_at_all(tmp_path):
    """A full disk leaves the one before. A kill between the two renamings leaves both."""
    first, second = (SST2BertModel(TINY, PADDING) for _ in range(2))
    folder = tmp_path / "model"
    write_model(first, small_tokenizer(), folder)
    before = contents(folder)

    def full_disk(*_):
        raise OSError("no space")

    on_a_full_disk = mock.patch.object(SST2BertModel, "save_pretrained", full_disk)
    with on_a_full_disk, pytest.raises(OSError, match="no space"):
        write_model(second, small_tokenizer(), folder)
    assert contents(folder) == before

    rename = Path.rename

    def killed_at_the_second(path, other):
        if path.name == "model.unfinished":
            raise Killed
        return rename(path, other)

    with mock.patch.object(Path, "rename", killed_at_the_second), pytest.raises(Killed):
        write_model(second, small_tokenizer(), folder)
    assert contents(tmp_path / "model.before") == before
    found = SST2BertModel.from_pretrained(tmp_path / "model.unfinished")
    assert torch.equal(found.classifier.weight, second.classifier.weight)

    write_model(second, small_tokenizer(), folder)
    found = SST2BertModel.from_pretrained(folder)
    assert torch.equal(found.classifier.weight, second.classifier.weight)
    assert not (tmp_path / "model.unfinished").exists()


@pytest.mark.slow
def test_fine_tuning_killed_at_any_write_of_its_best_model_loses_none(tmp_path):
    """At every moment there is a complete best model, under one of three names."""
    dataset = write_reviews(tmp_path / "reviews", train=40, validation=20)
    options = SST2Options(
        dataset=dataset, vocab_size=60, epochs=1, seeds=2, learning_rate=(1e-3,), device="cpu"
    )

    def better_each_time(model, *_):
        return model, float(next(accuracies))

    for last in itertools.count():
        out = tmp_path / f"{last}"
        accuracies = itertools.count()
        writes = Writes(last)
        kills = [
            mock.patch.object(Path, "rename", writes.before_and_after(Path.rename)),
            mock.patch.object(os, "fsync", writes.before_and_after(os.fsync)),
            mock.patch.object(train_sst2, "fine_tune", better_each_time),
        ]
        for patch in kills:
            patch.start()
        try:
            train_sst2.main(replace(options, out=str(out)))
            break
        except Killed:
            pass
        finally:
            for patch in kills:
                patch.stop()
        if next(accuracies) > 1:  # the first best model had been written
            names = ("model", "model.before", "model.unfinished")
            found = [out / name for name in names if (out / name / "config.json").exists()]
            assert any(SST2BertModel.from_pretrained(folder) for folder in found), last
    assert last > 20


# ---- Data workers ---------------------------------------------------------------------------


def with_a_killed_worker(options: PretrainOptions) -> None:
    update, steps = train_pretrain.update, iter(range(100))

    def one_dies(*arguments):
        if next(steps) == 5:
            for worker in multiprocessing.active_children():
                os.kill(worker.pid, signal.SIGKILL)
        return update(*arguments)

    train_pretrain.update = one_dies
    with mock.patch("tyro.cli", return_value=options):
        train_pretrain.run_script(pretrain, PretrainOptions)


@pytest.mark.slow
def test_a_killed_data_worker_ends_the_run_and_the_message_says_fewer_workers(corpus, tmp_path):
    options = replace(OPTIONS, dataset=corpus, out=str(tmp_path / "run"), workers=1, save_every=4)
    assert wait(start(with_a_killed_worker, options, output=tmp_path / "log")) == [2]
    printed = (tmp_path / "log").read_text()
    (line,) = [text for text in printed.splitlines() if "error: " in text]
    assert "--workers" in line
    assert "Traceback" not in printed
    assert in_process(replace(options, resume=True)) == 0


@pytest.mark.slow
def test_a_worker_that_cannot_send_its_batch_ends_the_run_with_one_message(corpus, tmp_path):
    """Below a long TMPDIR, torch's worker prints an error and drops the batch; without a timeout
    the run would wait for ever."""
    folder = tmp_path / ("x" * 110)
    folder.mkdir()
    code = """
import data, train_pretrain
data.WORKER_TIMEOUT = 2
train_pretrain.run_script(train_pretrain.pretrain, train_pretrain.PretrainOptions)
"""
    line = f"--dataset {corpus} --vocab-size 60 --max-seq-length 32 --workers 1 --steps 2"
    line += f" --device cpu --out {tmp_path}/run"
    ended = python("-c", code, *line.split(), env={**os.environ, "TMPDIR": str(folder)})
    assert ended.returncode == 2, ended.stderr
    assert "--workers" in ended.stderr.splitlines()[-1]
