"""Nothing is lost: a run that was killed, at any moment, ends as one that never was."""

import contextlib
import io
import json
import math
import multiprocessing
import os
import pickle
import random
import resource
import signal
import sys
import threading
import time
from dataclasses import replace
from multiprocessing import forkserver
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch._dynamo  # noqa: F401
from strategies import LETTERS
from test_bert import Malicious

import support.checkpoints
import support.command_line
import support.run
import train_pretrain
from bert import PretrainedModel
from train_pretrain import PretrainOptions, pretrain

with contextlib.suppress(ImportError):  # with torch._dynamo, seconds less in every process
    import matplotlib.figure  # noqa: F401
# Runs begin in processes of their own, forked from one that has imported everything and computed
# nothing: a fork of this one would inherit the locks of its threads.
processes = multiprocessing.get_context("forkserver")
processes.set_forkserver_preload(["test_resume"])

OPTIONS = PretrainOptions(
    vocab_size=60, max_seq_length=32, batch_size=2, accumulate=2, steps=30, save_every=1,
    eval_every=10, eval_batches=2, log_every=1, workers=0, device="cpu",
)  # fmt: skip


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> str:
    file = tmp_path_factory.mktemp("corpus") / "corpus.jsonl"
    texts = [
        ". ".join(f"{a}{b} {b} {a}{a}" for b in LETTERS[i % 13 :][:9])
        for i, a in enumerate(LETTERS * 4)
    ]
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(file)


def state(out: Path) -> tuple[dict, list[dict]]:
    """The last checkpoint and all metrics, without what a clock said."""
    newest = sorted((out / "checkpoints").glob("step-*.pt"))[-1]
    checkpoint = torch.load(newest, weights_only=True)
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    for dated in (checkpoint, *lines):
        del dated["seconds"]
    del checkpoint["metrics_bytes"]  # how long the clock's digits are
    for place in (place for own in checkpoint["own"] for place in own.get("bookmarks", [])):
        (place or {}).pop("rows", None)  # the library's own counters
    return checkpoint, lines


def assert_same(one, other, place: str = "") -> None:
    """Bit for bit, whatever is nested in what."""
    assert type(one) is type(other), place
    if isinstance(one, dict):
        assert one.keys() == other.keys(), place
        for key in one:
            assert_same(one[key], other[key], f"{place}.{key}")
    elif isinstance(one, list | tuple):
        for number, pair in enumerate(zip(one, other, strict=True)):
            assert_same(*pair, f"{place}.{number}")
    elif isinstance(one, torch.Tensor):
        assert torch.equal(one, other), place
    else:
        assert one == other, place


def run(options: PretrainOptions) -> None:
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        pretrain(options)


# ---- kill -9 ------------------------------------------------------------------------------------


def die(*_) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def half(text: bytes) -> bytes:
    return text[: len(text) // 2]


def killed_at(point: str, call: int) -> None:
    """From now on, the process dies at the `call`-th time that it comes to this point."""
    calls = iter(range(1, 1000))

    def before(function):
        return lambda *a, **k: die() if next(calls) == call else function(*a, **k)

    def after(function):
        return lambda *a, **k: (function(*a, **k), die() if next(calls) == call else None)[0]

    def half_saved(state, file):
        content = io.BytesIO()
        torch_save(state, content)
        dies = next(calls) == call
        file.write(half(content.getvalue()) if dies else content.getvalue())
        if dies:
            file.flush()
            die()

    def half_a_line(out, **values):
        if next(calls) == call:
            with (out / "metrics.jsonl").open("a") as file:
                file.write('{"split": "tra')
            die()
        write_line(out, **values)

    torch_save, write_line = torch.save, support.run.write_line
    {
        "before a checkpoint": lambda: setattr(
            support.run, "save_checkpoint", before(support.checkpoints.save_checkpoint)
        ),
        "half a checkpoint written": lambda: setattr(torch, "save", half_saved),
        "written": lambda: setattr(torch, "save", after(torch.save)),
        "synced": lambda: setattr(Path, "replace", before(Path.replace)),
        "renamed": lambda: setattr(Path, "replace", after(Path.replace)),
        "pruned": lambda: setattr(Path, "unlink", after(Path.unlink)),
        "after a checkpoint": lambda: setattr(
            support.run, "save_checkpoint", after(support.checkpoints.save_checkpoint)
        ),
        "before an update": lambda: setattr(
            train_pretrain, "update", before(train_pretrain.update)
        ),
        "half a line written": lambda: setattr(support.run, "write_line", half_a_line),
        "before the model is exported": lambda: setattr(
            PretrainedModel, "save_pretrained", before(PretrainedModel.save_pretrained)
        ),
    }[point]()


POINTS = {
    "before a checkpoint": (1, 2),
    "half a checkpoint written": (1, 2),
    "written": (1, 2),
    "synced": (1, 2),
    "renamed": (1, 2),
    "pruned": (1,),
    "after a checkpoint": (1,),
    "before an update": (1, 3),
    "half a line written": (1, 4),
    "before the model is exported": (1,),
}


def child(options: PretrainOptions, point: str | None, call: int, seconds: float | None) -> None:
    """What a process does: a run that dies at a point, or after some seconds, or not."""
    torch.set_num_threads(1)
    multiprocessing.set_start_method("fork", force=True)  # of its data workers
    if point:
        killed_at(point, call)
    if seconds:
        threading.Timer(seconds, die).start()
    run(options)


def in_process(options: PretrainOptions, point=None, call=1, seconds=None) -> int:
    """The exit code: -9 if it was killed."""
    process = processes.Process(target=child, args=(options, point, call, seconds))
    with mock.patch.dict(os.environ, PYTHONPATH=os.pathsep.join(sys.path)):  # for the preloading
        forkserver.ensure_running()
    process.start()
    process.join()
    return process.exitcode


@pytest.fixture(scope="module")
def uninterrupted(corpus, tmp_path_factory) -> tuple[dict, list[dict]]:
    out = tmp_path_factory.mktemp("runs") / "uninterrupted"
    assert in_process(replace(OPTIONS, dataset=corpus, out=str(out))) == 0
    return state(out)


@pytest.mark.slow
def test_a_run_killed_dozens_of_times_ends_as_if_it_never_was(corpus, uninterrupted, tmp_path):
    """At every point of saving and between, and at random moments; each time another number of
    workers goes on. At least 30 kills land, and weights, optimizer and metrics are equal."""
    options = replace(OPTIONS, dataset=corpus)
    landed = []

    def attempt(out: str, point=None, call=1, seconds=None) -> None:
        resume = bool(
            support.checkpoints.checkpoint_paths(tmp_path / out)
        )  # or it died before the first
        now = replace(options, out=str(tmp_path / out), resume=resume, workers=len(landed) % 3)
        landed.append(in_process(now, point, call, seconds) == -signal.SIGKILL)

    for out, points in {"there": list(POINTS), "and back": list(POINTS)[-2::-1]}.items():
        for point in points:
            for call in POINTS[point]:
                attempt(out, point, call)
    started = time.perf_counter()
    assert in_process(replace(options, out=str(tmp_path / "timed"))) == 0
    whole = time.perf_counter() - started
    random.seed(0)
    for _ in range(8):
        attempt("at random", seconds=random.uniform(0, 0.8) * whole)
    print(f"{sum(landed)} kills landed")
    assert sum(landed) >= 30
    for out in ("there", "and back", "at random"):
        assert in_process(replace(options, out=str(tmp_path / out), resume=True)) == 0
        assert_same(state(tmp_path / out), uninterrupted)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_polite_signal_saves_and_ends_and_nothing_is_done_twice(
    number, corpus, uninterrupted, tmp_path
):
    """With no checkpoint due before the end: what is found there, the signal has saved. It goes to
    the group of processes, as a terminal sends it; the data workers are in groups of their own."""
    options = replace(OPTIONS, dataset=corpus, out=str(tmp_path), save_every=1000, workers=2)
    process = processes.Process(target=in_group, args=(options,))
    process.start()
    metrics = tmp_path / "metrics.jsonl"
    while not metrics.exists() or metrics.read_text().count("\n") < 5:
        time.sleep(0.01)
    os.killpg(process.pid, number)
    process.join()
    assert process.exitcode == 128 + number
    _, checkpoint = support.checkpoints.checkpoint_paths(tmp_path)  # the other is of step 0
    assert 0 < torch.load(checkpoint, weights_only=True)["step"] < 30
    assert in_process(replace(options, resume=True)) == 0
    assert_same(state(tmp_path), uninterrupted)


def in_group(options: PretrainOptions) -> None:
    os.setpgrp()  # so that the signal goes to this process and its workers, not to the tests
    child(options, None, 1, None)


# ---- Damage, a full disk, mistakes --------------------------------------------------------------


@pytest.fixture
def finished(corpus, tmp_path) -> PretrainOptions:
    """A run of 6 steps with checkpoints of the steps 4 and 6; and the options to resume it."""
    options = replace(OPTIONS, dataset=corpus, out=str(tmp_path / "run"), steps=6, save_every=2)
    run(options)
    return replace(options, resume=True)


def checkpoints(options: PretrainOptions) -> list[Path]:
    return sorted((Path(options.out) / "checkpoints").iterdir())


DAMAGES = {
    "cut": half,
    "empty": lambda content: b"",
    "zeros": lambda content: bytes(len(content)),
    "a block of zeros": lambda c: c[: len(c) // 2] + bytes(4096) + c[len(c) // 2 + 4096 :],
}


@pytest.mark.parametrize("damage", list(DAMAGES))
def test_a_damaged_checkpoint_is_announced_and_the_one_before_it_used(damage, finished):
    expected = state(Path(finished.out))
    older, newest = checkpoints(finished)
    newest.write_bytes(DAMAGES[damage](newest.read_bytes()))
    with pytest.warns(UserWarning, match=f"{newest.name} is damaged"):
        run(finished)
    assert_same(state(Path(finished.out)), expected)
    older, newest = checkpoints(finished)
    for path in (older, newest):
        path.write_bytes(b"")
    with (
        pytest.warns(UserWarning, match="is damaged"),
        pytest.raises(ValueError, match="all check"),
    ):
        run(finished)
    assert newest.read_bytes() == b""


def test_two_checkpoints_are_kept_and_load_as_plain_tensors(finished):
    """Weights, optimizer and step are enough: nothing pickled that could be code."""
    assert [path.name for path in checkpoints(finished)] == [
        "step-000000004.pt",
        "step-000000006.pt",
    ]
    found = torch.load(checkpoints(finished)[-1], weights_only=True)
    assert set(found) == {
        "step",
        "tokens",
        "seconds",
        "metrics_bytes",
        "run",
        "model",
        "optimizer",
        "own",
    }


def test_a_malicious_checkpoint_is_never_run(finished, tmp_path):
    expected = state(Path(finished.out))
    torch.save({"step": Malicious(str(tmp_path / "was run"))}, checkpoints(finished)[-1])
    with pytest.warns(UserWarning, match="is damaged"):
        run(finished)
    assert not (tmp_path / "was run").exists()
    assert_same(state(Path(finished.out)), expected)


def with_limit(options: PretrainOptions, limit: int, out: Path) -> None:
    """A disk with room for `limit` bytes in a file."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # an error of the write instead
    try:
        child(options, None, 1, None)
    except OSError as error:
        os.write(os.open(out, os.O_WRONLY | os.O_CREAT), str(error).encode())


@pytest.mark.slow
def test_a_full_disk_leaves_the_previous_checkpoint(corpus, uninterrupted, tmp_path):
    options = replace(OPTIONS, dataset=corpus, out=str(tmp_path / "run"))
    assert in_process(options, "before a checkpoint", 5) == -signal.SIGKILL
    options = replace(options, resume=True)
    before = {path: path.read_bytes() for path in checkpoints(options)}
    process = processes.Process(target=with_limit, args=(options, 200_000, tmp_path / "error"))
    process.start()
    process.join()
    message = (tmp_path / "error").read_text()
    assert "step-000000004.pt not saved, the one before it stays: " in message
    assert {path: path.read_bytes() for path in checkpoints(options)} == before
    assert in_process(options) == 0
    assert_same(state(tmp_path / "run"), uninterrupted)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"learning_rate": 0.5}, "has learning_rate 0.001, not 0.5$"),
        ({"steps": 9, "batch_size": 3}, "has steps 6, not 9; batch_size 2, not 3$"),
        ({"size": "mini"}, "has size tiny, not mini$"),
        (
            {"vocab_size": 61},
            "vocab_size 60, not 61; tokenizer_hash v2-[0-9a-f]{16}, not v2-[0-9a-f]{16}",
        ),
    ],
)
def test_another_config_is_refused_by_what_differs(changes, message, finished):
    expected = state(Path(finished.out))
    with pytest.raises(ValueError, match=message):
        run(replace(finished, **changes))
    assert_same(state(Path(finished.out)), expected)


def test_another_corpus_is_refused(finished):
    """Under the same name, with sentences and documents of the same lengths and words: two words
    have changed places."""
    file = Path(finished.dataset)
    text = file.read_text()
    assert "ab b aa" in text
    file.write_text(text.replace("ab b aa", "b ab aa", 1))
    try:
        with pytest.raises(ValueError, match=r"has corpus_checksum \d+, not \d+$"):
            run(finished)
    finally:
        file.write_text(text)


def test_a_run_is_not_overwritten_by_another(finished):
    with pytest.raises(ValueError, match="holds another run; name a new folder, or --resume"):
        run(replace(finished, resume=False))


def test_a_loss_that_is_not_finite_stops_the_run_before_it_is_saved(corpus, tmp_path, monkeypatch):
    """It names the step; every checkpoint that is there is good. Between two log lines, too."""
    options = replace(OPTIONS, dataset=corpus, out=str(tmp_path), save_every=2, log_every=1000)
    update, steps = train_pretrain.update, iter(range(100))

    def poisoned(model, optimizer, rate):
        if next(steps) == 4:
            next(model.parameters()).grad.fill_(math.nan)
        return update(model, optimizer, rate)

    monkeypatch.setattr(train_pretrain, "update", poisoned)
    with pytest.raises(
        ValueError,
        match="step 4: the gradient was not finite.*try a lower --learning-rate",
    ):
        run(options)
    assert [path.name for path in checkpoints(options)] == [
        "step-000000002.pt",
        "step-000000004.pt",
    ]
    for path in checkpoints(options):
        found = torch.load(path, weights_only=True)["model"]
        assert all(tensor.isfinite().all() for tensor in found.values())


class Broken(torch.utils.data.Dataset):
    def __getitem__(self, index):
        raise (IndexError if index else ValueError)("a mistake\nof two lines")

    def __len__(self):
        return 2


@pytest.mark.slow
def test_an_error_in_a_data_worker_is_not_its_death(capsys):
    """A user's mistake is a line, ours a traceback, as in the main process."""
    loader = torch.utils.data.DataLoader(Broken(), sampler=[1], num_workers=1)
    with pytest.raises(IndexError, match="a mistake"):
        support.command_line.run_script(lambda _: list(loader), PretrainOptions, [])
    loader = torch.utils.data.DataLoader(Broken(), sampler=[0], num_workers=1)
    with pytest.raises(SystemExit):
        support.command_line.run_script(lambda _: list(loader), PretrainOptions, [])
    assert capsys.readouterr().err == "error: a mistake\nof two lines\n"


def read_from_worker(error: Exception) -> None:
    def _try_get_data():
        raise error

    _try_get_data()


@pytest.mark.parametrize(
    "error",
    [
        EOFError(),
        ConnectionResetError("reset"),
        pickle.UnpicklingError("pickle data was truncated"),
        RuntimeError("received 0 items of ancdata"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_whatever_a_dead_worker_breaks_is_reported_as_its_death(error, monkeypatch, capsys):
    """Also when torch's signal handler, which raises, comes while that is being reported."""

    def signalled(number, frame):
        raise RuntimeError("DataLoader worker (pid 1) is killed by signal: Killed.")

    before = signal.signal(signal.SIGCHLD, signalled)
    fail = support.command_line.fail
    monkeypatch.setattr(
        support.command_line,
        "fail",
        lambda text: (os.kill(os.getpid(), signal.SIGCHLD), fail(text)),
    )
    with pytest.raises(SystemExit) as ended:
        support.command_line.run_script(lambda _: read_from_worker(error), PretrainOptions, [])
    signal.signal(signal.SIGCHLD, before)
    assert ended.value.code == 2
    assert "error: a DataLoader worker died (" in capsys.readouterr().err


def test_an_error_that_is_ours_is_not_hidden():
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        support.command_line.run_script(
            lambda _: torch.ones(2, 3) @ torch.ones(2, 3), PretrainOptions, []
        )


def with_a_killed_worker(options: PretrainOptions, errors: Path) -> None:
    multiprocessing.set_start_method("fork", force=True)
    sys.stderr = errors.open("w", buffering=1)
    update, steps = train_pretrain.update, iter(range(100))

    def one_dies(model, optimizer, rate):
        if next(steps) == 5:
            for worker in multiprocessing.active_children():
                os.kill(worker.pid, signal.SIGKILL)
        return update(model, optimizer, rate)

    train_pretrain.update = one_dies
    support.command_line.run_script(lambda _: pretrain(options), PretrainOptions, [])


@pytest.mark.slow
def test_a_killed_data_worker_ends_the_run_with_its_cause(corpus, tmp_path):
    """In one line, and the run can be resumed."""
    options = replace(OPTIONS, dataset=corpus, out=str(tmp_path), workers=1, save_every=4)
    process = processes.Process(target=with_a_killed_worker, args=(options, tmp_path / "errors"))
    process.start()
    process.join()
    printed = (tmp_path / "errors").read_text()
    assert process.exitcode == 2, printed
    lines = printed.splitlines()
    (line,) = [e for e in lines if e.startswith("error: ")]
    assert "error: a DataLoader worker died (" in line
    assert "--resume" in line
    assert in_process(replace(options, resume=True)) == 0
