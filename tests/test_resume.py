"""A run that was stopped, at any moment and in any way, resumes and ends with the same bits as one
that was never stopped, and nothing overwrites a run.
"""

import copy
import errno
import itertools
import json
import math
import multiprocessing
import os
import random
import resource
import signal
import sys
import time
from dataclasses import fields, replace
from pathlib import Path
from unittest import mock

import pytest
import torch
from helpers import (
    OPTIONS,
    CrashError,
    assert_same,
    before_call,
    before_update,
    checkpoint_of,
    contents,
    crash,
    die_soon,
    in_process,
    kill,
    make_review_options,
    metrics_of,
    model_of,
    run,
    run_with_event,
    start,
    state,
    wait,
    wait_until,
)
from strategies import Malicious, small_tokenizer, write_many_documents

import train_pretrain
import train_sst2
from bert import SST2BertModel
from train_pretrain import (
    PretrainOptions,
    load_checkpoint,
    lock_folder,
    note_signals,
    what_identifies,
)
from train_sst2 import SST2Options

pytestmark = pytest.mark.usefixtures("_smallest")


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


# ---- A process that dies, at every write of a run -----------------------------------------------


class Killed(BaseException):
    """Ends a simulated process: no `except` of the code handles it."""


class Writes:
    """Counts a run's operations on its folder, and ends the process at number `last` (from 0):
    before a mkdir, rename or fsync, or with half a file or half a line written.
    """

    def __init__(self, last: int | None) -> None:
        self.last, self.done = last, 0

    def ends_here(self) -> bool:
        self.done += 1
        return self.last is not None and self.done == self.last + 1

    def before(self, function):
        def write(*arguments, **named):
            if self.ends_here():
                raise Killed
            return function(*arguments, **named)

        return write

    def half_saved(self, save):
        def write(state, file):
            save(state, file)
            if self.ends_here():
                file.truncate(file.tell() // 2)
                raise Killed

        return write

    def half_a_file(self, write_file):
        def write(path, content, **named):
            ends = self.ends_here()
            write_file(path, content[: len(content) // 2] if ends else content, **named)
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

    def come_to_the_end_of(self, work) -> bool:
        """Does the work in this process. Returns whether it came to its end."""
        patches = [
            (torch, "save", self.half_saved),
            (train_pretrain, "write_line", self.half_a_line),
            (Path, "write_text", self.half_a_file),
            (Path, "write_bytes", self.half_a_file),
            (Path, "replace", self.before),
            (Path, "rename", self.before),
            (Path, "mkdir", self.before),
            # Nothing here loses its power, so the disk need not be waited for.
            (os, "fsync", lambda _: self.before(lambda descriptor: None)),
            (train_pretrain, "note_signals", lambda _: list),
        ]
        with pytest.MonkeyPatch.context() as patch:
            for owner, name, wrap in patches:
                patch.setattr(owner, name, wrap(getattr(owner, name)))
            try:
                work()
            except Killed:
                return False
        return True


@pytest.mark.slow
def test_a_run_killed_at_any_write_resumes_to_the_same_bits(options, tmp_path):
    """Every write is tried, from the first folder that is made to the last file of the model. Every
    third time, the resumed run is killed at a write, too."""
    options = replace(options, steps=2, save_every=1)
    run(replace(options, out=str(tmp_path / "whole")))  # and the corpus is in the cache
    expected = state(tmp_path / "whole")

    def goes_on(options: PretrainOptions, writes: Writes) -> bool:
        return writes.come_to_the_end_of(lambda: run(resumes(options)))

    counted = Writes(None)
    assert goes_on(replace(options, out=str(tmp_path / "counted")), counted)
    assert counted.done > 25
    for last in range(counted.done):
        here = replace(options, out=str(tmp_path / f"{last}"))
        assert not goes_on(here, Writes(last))
        if last % 3 == 0:
            goes_on(here, Writes((5 * last) % counted.done))
        assert goes_on(here, Writes(None)), last
        assert_same(state(Path(here.out)), expected)
        assert not (Path(here.out) / "checkpoint.unfinished").exists()


@pytest.mark.slow
def test_a_run_killed_at_random_moments_resumes_to_the_same_bits(corpus, uninterrupted, tmp_path):
    """kill -9, three times, within the 20 milliseconds after a randomly chosen update starts, each
    time with a different number of workers."""
    options = replace(OPTIONS, dataset=corpus, out=str(tmp_path / "run"))
    generator = random.Random(0)
    for workers in (0, 1, 2):
        now = replace(resumes(options), workers=workers)
        moment = generator.randint(1, 5), die_soon, generator.uniform(0, 0.02)
        assert in_process(now, *moment) == -signal.SIGKILL
    assert in_process(resumes(options)) == 0
    assert_same(state(tmp_path / "run"), uninterrupted)


# ---- Signals ------------------------------------------------------------------------------------


def signal_all_processes(number: int) -> None:
    for process in (*multiprocessing.active_children(), multiprocessing.current_process()):
        os.kill(process.pid, number)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_all_processes_saves_and_ends_and_the_run_resumes_to_the_same_bits(
    number, corpus, uninterrupted, tmp_path
):
    """No checkpoint is due before the end, so the signal has saved the one that is found."""
    out, output = tmp_path / "run", tmp_path / "output"
    options = replace(OPTIONS, dataset=corpus, out=str(out), save_every=1000, workers=2)
    assert in_process(options, 5, signal_all_processes, number, output=output) == 1
    assert output.read_text().splitlines()[-1] == "stopped after step 7; --resume continues"
    assert checkpoint_of(out)["progress"]["step"] == 7  # that update, and one more
    assert not (out / "model").exists()
    assert in_process(replace(options, resume=True)) == 0
    assert_same(state(out), uninterrupted)


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
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
        os.kill(os.getpid(), number)
    assert noted == [signal.SIGTERM, signal.SIGHUP, signal.SIGINT]
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.usefixtures("_handlers")
def test_a_signal_that_is_ignored_stays_ignored():
    """nohup makes a process ignore SIGHUP."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    noted = note_signals()
    os.kill(os.getpid(), signal.SIGHUP)
    assert noted == []


# ---- The checkpoint -----------------------------------------------------------------------------


@pytest.fixture
def finished(corpus, tmp_path) -> PretrainOptions:
    """A run of 2 steps has ended; these options resume it."""
    options = replace(OPTIONS, dataset=corpus, out=str(tmp_path / "run"), steps=2)
    run(options)
    return replace(options, resume=True)


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs /proc")
def test_a_checkpoint_is_on_disk_before_it_has_its_name(options, monkeypatch):
    """A computer that loses its power keeps what was forced to disk, and perhaps nothing else."""
    done, on_disk, replace_file = [], {}, Path.replace

    def noted_fsync(descriptor):
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        done.append(path.name)
        on_disk[path] = path.stat().st_size

    def noted_replace(path, other):
        done.append(f"{path.name} -> {Path(other).name}")
        assert on_disk[path] == path.stat().st_size
        return replace_file(path, other)

    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(Path, "replace", noted_replace)
    run(options)
    saved = ["metrics.jsonl", "checkpoint.unfinished", "checkpoint.unfinished -> checkpoint.pt"]
    assert done == saved * 3  # at the steps 0, 2 and 4


def test_a_malicious_checkpoint_is_never_run(tmp_path):
    torch.save({"progress": Malicious(f"{tmp_path}/was run")}, tmp_path / "checkpoint.pt")
    with pytest.raises(ValueError, match=r"checkpoint\.pt"):
        load_checkpoint(tmp_path, {})
    assert not (tmp_path / "was run").exists()


def test_a_damaged_checkpoint_is_named_and_nothing_is_touched(finished):
    path = Path(finished.out) / "checkpoint.pt"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    before = contents(Path(finished.out))
    with pytest.raises(ValueError, match=r"checkpoint\.pt"):
        run(finished)
    assert contents(Path(finished.out)) == before


def test_resuming_a_finished_run_changes_nothing_but_what_a_kill_has_left(finished):
    """This is also how a run that was killed while it wrote model/ is completed."""
    out = Path(finished.out)
    before, names = state(out), {path.name for path in out.iterdir()}
    (out / "model.before" / "old").mkdir(parents=True)
    (out / "model.unfinished" / "old").mkdir(parents=True)
    (out / "curves.png").unlink()
    run(finished)
    assert_same(state(out), before)
    assert {path.name for path in out.iterdir()} == names
    assert not (out / "model" / "old").exists()


def test_metrics_that_somebody_has_removed_are_not_filled_with_zeros(finished):
    metrics = Path(finished.out) / "metrics.jsonl"
    metrics.unlink()
    run(finished)
    assert metrics.read_bytes() == b""


def test_a_full_disk_is_reported_and_the_previous_checkpoint_is_kept(options):
    """No file can be larger than half a checkpoint, so torch fails in the middle of one."""
    with before_update(3, crash), pytest.raises(CrashError):
        run(options)
    before = contents(Path(options.out))
    sizes = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before["checkpoint.pt"]) // 2, sizes[1]))
    try:
        with pytest.raises(OSError, match=r"checkpoint\.pt"):
            run(replace(options, resume=True))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, sizes)
    after = contents(Path(options.out))
    assert after.keys() == before.keys()
    assert after["checkpoint.pt"] == before["checkpoint.pt"]


def test_the_clock_of_a_resumed_run_goes_on(options, monkeypatch):
    """An hour passes before the run is resumed, and does not count."""
    clock = itertools.count(1000)  # each look at it takes a second
    monkeypatch.setattr(train_pretrain.time, "perf_counter", lambda: next(clock))
    with before_update(3, crash), pytest.raises(CrashError):
        run(options)
    clock = itertools.count(4600)
    run(replace(options, resume=True))
    lines = (Path(options.out) / "metrics.jsonl").read_text().splitlines()
    seconds = [json.loads(line)["seconds"] for line in lines]
    assert seconds == sorted(seconds)
    assert seconds[0] == 0
    assert seconds[-1] < 60


# ---- What a resumed run may change --------------------------------------------------------------

MAY_CHANGE = {"out", "resume", "workers", "device", "compile", "save_every"}


def test_every_other_option_and_text_changed_on_resume_is_rejected_by_name(tmp_path):
    """Only what changes no result is free. Another text has another key."""
    examples = {split: mock.Mock(corpus=mock.Mock(key="k")) for split in ("train", "validation")}
    checkpoint = {"identity": what_identifies(OPTIONS, examples)}
    torch.save(checkpoint, tmp_path / "checkpoint.pt")
    for field in fields(PretrainOptions):
        told = copy.copy(OPTIONS)
        setattr(told, field.name, "another")
        identity = what_identifies(told, examples)
        if field.name in MAY_CHANGE:
            load_checkpoint(tmp_path, identity)
        else:
            with pytest.raises(ValueError, match=f"--resume: {field.name} was"):
                load_checkpoint(tmp_path, identity)
    for split, other in examples.items():
        other.corpus.key = "another"
        with pytest.raises(ValueError, match=f"--resume: {split} was"):
            load_checkpoint(tmp_path, what_identifies(OPTIONS, examples))
        other.corpus.key = "k"


# ---- Numbers that are not finite ----------------------------------------------------------------


def test_a_gradient_that_is_not_finite_ends_the_run_before_anything_is_written(corpus, tmp_path):
    """The checkpoint that is left is good, also if the bad step lies between two lines."""
    options = replace(OPTIONS, dataset=corpus, out=str(tmp_path), save_every=2, log_every=2)
    poison = before_update(4, lambda model, *_: next(model.parameters()).grad.fill_(math.inf))
    with poison, pytest.raises(ValueError, match="step 6.*--learning-rate"):
        run(options)
    found = checkpoint_of(tmp_path)
    assert found["progress"]["step"] == 4
    assert all(tensor.isfinite().all() for tensor in found["model"].values())
    assert metrics_of(tmp_path)[-1]["step"] == 4


def test_a_weight_that_is_not_finite_is_not_saved(corpus, tmp_path, monkeypatch):
    """An update may overflow though the gradient is finite."""
    options = replace(OPTIONS, dataset=corpus, out=str(tmp_path), log_every=1000, save_every=2)
    update, calls = train_pretrain.update, itertools.count()

    def spoiled(model, optimizer, rate):
        update(model, optimizer, rate)
        if next(calls) == 1:
            model.nsp.bias.data[0] = math.inf

    monkeypatch.setattr(train_pretrain, "update", spoiled)
    with pytest.raises(ValueError, match="step 2.*--learning-rate"):
        run(options)
    assert checkpoint_of(tmp_path)["progress"]["step"] == 0


def test_weights_to_start_from_that_are_not_finite_are_rejected_before_anything_is_written(
    options, tmp_path
):
    model = model_of(options, small_tokenizer())
    model.nsp.bias.data[0] = math.nan
    model.save_pretrained(tmp_path / "model", small_tokenizer())
    told = replace(options, tokenizer=None, weights=str(tmp_path / "model"))
    with pytest.raises(ValueError, match="step 0.*--weights"):
        run(told)
    assert contents(Path(options.out)) == {}


# ---- Nothing overwrites a run -------------------------------------------------------------------


@pytest.mark.parametrize("left", ["checkpoint.pt", "model", "metrics.jsonl", "config.json"])
def test_a_new_run_is_rejected_where_another_one_has_left_anything(left, options):
    out = Path(options.out)
    file = out / ("model/config.json" if left == "model" else left)
    file.parent.mkdir(parents=True)
    file.write_text("of another run")
    for command in (run, lambda o: train_sst2.main(SST2Options(out=o.out))):
        with pytest.raises(ValueError, match=f"--out .*{left}"):
            command(options)
    assert list(contents(out).values()) == [b"of another run"]


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


def hold(out: Path, resume: bool) -> None:
    """Holds a folder, with a child that outlives this process, as a data worker may."""
    os.setpgrp()
    lock = lock_folder(out, resume)
    if os.fork() > 0:
        (out.parent / f"locked {resume}").touch()
    time.sleep(1000)
    lock.close()


@pytest.mark.slow
def test_a_second_process_in_the_same_folder_is_rejected_and_changes_nothing(options, tmp_path):
    """The lock dies with its process, though a child of it lives on."""
    for resume in (False, True):
        told = replace(options, resume=resume)
        holder = start(hold, Path(options.out), resume)
        wait_until((tmp_path / f"locked {resume}").exists, holder)
        before = contents(Path(options.out))
        with pytest.raises(ValueError, match="--out .* in use"):
            run(told)
        if not resume:
            with pytest.raises(ValueError, match="--out .* in use"):
                train_sst2.main(SST2Options(out=options.out, device="cpu"))
        assert contents(Path(options.out)) == before
        kill(holder)
        run(told)
        os.killpg(holder.pid, signal.SIGKILL)  # its child


@pytest.mark.parametrize("script", [train_pretrain, train_sst2])
def test_a_run_holds_the_lock_of_its_folder(script, options, tmp_path):
    log = tmp_path / "log"
    if script is train_sst2:
        options = make_review_options(tmp_path, train=8, validation=8)

    def try_to_lock(*_):
        assert wait(start(lock_folder, Path(options.out), output=log)) == [1]

    with before_call(script, "update", 0, try_to_lock):
        run(options) if script is train_pretrain else train_sst2.main(options)
    assert "is in use" in log.read_text()


def test_a_file_system_without_locks_is_named(options, monkeypatch):
    fail = mock.Mock(side_effect=OSError(errno.ENOLCK, "No locks available"))
    monkeypatch.setattr(train_pretrain.fcntl, "lockf", fail)
    with pytest.raises(ValueError, match="--out .* cannot be locked: No locks available"):
        run(options)


def test_a_run_that_waited_for_the_lock_looks_at_the_folder_once_more(options):
    """Another run may have begun and ended there while this one tokenized."""
    meanwhile = before_call(train_pretrain, "prepare", 0, lambda *_: run(options))
    with meanwhile, pytest.raises(ValueError, match="--out"):
        run(replace(options, seed=1))
    assert json.loads(Path(options.out, "config.json").read_text())["seed"] == 0
    lock_folder(Path(options.out), resume=True).close()  # the lock ended with the run


# ---- model/ -------------------------------------------------------------------------------------


@pytest.mark.slow
def test_fine_tuning_killed_at_any_write_of_its_best_model_loses_none(tmp_path, monkeypatch):
    """At every moment there is a complete best model, under one of three names."""
    options = replace(make_review_options(tmp_path, train=9, validation=5), seeds=2)
    for last in itertools.count():
        out, accuracies = tmp_path / f"{last}", itertools.count()
        better = lambda model, *_, of=accuracies: (model, float(next(of)))  # noqa: E731
        monkeypatch.setattr(train_sst2, "fine_tune", better)
        told = replace(options, out=str(out))
        if Writes(last).come_to_the_end_of(lambda told=told: train_sst2.main(told)):
            break
        if next(accuracies) > 1:  # the first best model had been written
            names = ("model", "model.before", "model.unfinished")
            found = [out / name for name in names if (out / name / "config.json").exists()]
            assert any(is_whole(folder) for folder in found), last
    assert last > 15


def is_whole(folder: Path) -> bool:
    try:
        return bool(SST2BertModel.from_pretrained(folder))
    except (OSError, ValueError):
        return False


# ---- Data workers -------------------------------------------------------------------------------


def kill_workers(*_) -> None:
    """Kills the data workers, and waits until torch's handler of their death raises its error."""
    for worker in multiprocessing.active_children():
        os.kill(worker.pid, signal.SIGKILL)
        time.sleep(60)  # join() would take the death away from the handler


def lose_workers(module: str, name: str, options: PretrainOptions) -> None:
    with before_call(sys.modules[module], name, 3, kill_workers):
        run_with_event(options, -1, crash)


@pytest.mark.slow
@pytest.mark.parametrize(("owner", "name"), [(train_pretrain, "update"), (torch, "save")])
def test_a_killed_data_worker_ends_the_run_and_the_message_says_fewer_workers(
    owner, name, corpus, tmp_path
):
    """If it died while a checkpoint was being saved, that was once taken for a full disk."""
    options = replace(OPTIONS, dataset=corpus, out=str(tmp_path / "run"), workers=1)
    process = start(lose_workers, owner.__name__, name, options, output=tmp_path / "log")
    assert wait(process) == [2]
    lines = (tmp_path / "log").read_text().splitlines()
    (line,) = [text for text in lines if text.startswith("error: ")]
    assert "--workers" in line
    assert checkpoint_of(tmp_path / "run")["progress"]["step"] >= 2
