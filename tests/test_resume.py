"""A run that was killed, at any moment, resumes and ends as one that was never killed."""

import math
import multiprocessing
import os
import random
import resource
import shutil
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import support.run
from helpers import OPTIONS, assert_same, child, contents, half, in_process, run, start, state, wait
from strategies import Malicious, publish, write_many_documents

import support.checkpoints
import support.command_line
import train_pretrain
from support.command_line import run_script
from train_pretrain import PretrainOptions, pretrain


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> str:
    return write_many_documents(tmp_path_factory.mktemp("corpus") / "corpus.jsonl")


# ---- kill -9 ------------------------------------------------------------------------------------


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


@pytest.fixture(scope="module")
def uninterrupted(corpus, tmp_path_factory) -> tuple[dict, list[dict]]:
    out = tmp_path_factory.mktemp("runs") / "uninterrupted"
    assert in_process(replace(OPTIONS, dataset=corpus, out=str(out))) == 0
    return state(out)


@pytest.mark.slow
def test_a_run_killed_dozens_of_times_ends_as_one_that_was_never_killed(
    corpus, uninterrupted, tmp_path
):
    """It is killed at every point of saving and between, and at random moments, and resumes with
    another number of workers each time. At least 30 kills land; weights, optimizer and metrics are
    equal."""
    options = replace(OPTIONS, dataset=corpus)
    landed = []

    def attempt(out: str, point=None, call=1, seconds=None) -> None:
        # Without a checkpoint, it died before the first.
        resume = bool(support.checkpoints.checkpoint_paths(tmp_path / out))
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
@pytest.mark.parametrize("signal_number", [signal.SIGTERM, signal.SIGINT])
def test_a_polite_signal_saves_and_ends_and_nothing_is_done_twice(
    signal_number, corpus, uninterrupted, tmp_path
):
    """No checkpoint is due before the end, so the signal has saved the one that is found. It goes
    to the group of processes, as a terminal sends it; the data workers are in groups of their own.
    """
    options = replace(OPTIONS, dataset=corpus, out=str(tmp_path), save_every=1000, workers=2)
    process = start(in_group, options)
    metrics = tmp_path / "metrics.jsonl"
    while not metrics.exists() or metrics.read_text().count("\n") < 5:
        time.sleep(0.01)
    os.killpg(process.pid, signal_number)
    assert wait(process) == [128 + signal_number]
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
    """A run of 6 steps has left checkpoints of the steps 4 and 6; these options resume it."""
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
    reason = "OSError: .* has another checksum" if damage == "a block of zeros" else r"\w+: .+"
    with pytest.warns(UserWarning, match=rf"{newest.name} is damaged \({reason}\)"):
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


def test_damaged_checkpoints_of_later_steps_push_out_no_good_one(finished):
    """Such as a copying tool or a full disk may leave. The two newest names were kept, and so the
    checkpoint that had just been written was deleted."""
    older, newest = checkpoints(finished)
    for step in (7, 9):
        older.with_name(f"step-{step:09}.pt").write_bytes(b"")
    newest.unlink()
    with pytest.warns(UserWarning, match="step-000000009.pt is damaged"):
        run(replace(finished, save_every=1))
    names = [path.name for path in checkpoints(finished)]
    assert names == [f"step-{step:09}.pt" for step in (5, 6, 7, 9)]
    with pytest.warns(UserWarning, match="step-000000007.pt is damaged"):
        run(finished)


def test_a_damaged_checkpoint_is_not_kept_in_place_of_the_one_that_was_resumed_from(finished):
    """Of the steps 4, 5 (damaged) and 6 the two newest were kept, and only one of them was good."""
    older, newest = checkpoints(finished)
    newest.unlink()
    older.with_name("step-000000005.pt").write_bytes(b"")
    with pytest.warns(UserWarning, match="step-000000005.pt is damaged"):
        run(finished)
    assert [path.name for path in checkpoints(finished)] == [older.name, newest.name]


def test_two_checkpoints_are_kept_and_load_as_plain_tensors(finished):
    """Weights, optimizer and step are enough: nothing is pickled that could be code."""
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
    """Pretrains on a disk with room for `limit` bytes in a file; writes the error to `out`."""
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
    wait(start(with_limit, options, 200_000, tmp_path / "error"))
    message = (tmp_path / "error").read_text()
    assert "step-000000004.pt not saved, the one before it stays: " in message
    assert {path: path.read_bytes() for path in checkpoints(options)} == before
    assert in_process(options) == 0
    assert_same(state(tmp_path / "run"), uninterrupted)


def to_a_small_disk(folder: Path, limit: int) -> None:
    """Writes a model to a disk with room for `limit` bytes in a file, as a script would."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    run_script(lambda _: publish(folder), PretrainOptions, [])


@pytest.mark.slow
def test_a_full_disk_while_a_model_is_written_is_one_line(tmp_path):
    process = start(to_a_small_disk, tmp_path / "model", 5_000, output=tmp_path / "log")
    assert wait(process) == [2]
    (line,) = (tmp_path / "log").read_text().splitlines()
    assert line.startswith("error: [Errno ")


def test_an_export_that_the_run_has_passed_is_named(corpus, tmp_path, capsys):
    options = replace(OPTIONS, dataset=corpus, out=str(tmp_path), steps=4, export_steps=(1, 4))
    pretrain(options)
    assert "--export-steps" not in capsys.readouterr().out
    pretrain(replace(options, resume=True, export_steps=(1, 2, 4)))
    printed = capsys.readouterr().out
    assert "--export-steps 2: the run is past it; models/step-2 is not made" in printed
    assert printed.count("--export-steps") == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"learning_rate": 0.5}, "has learning_rate 0.001, not 0.5$"),
        ({"steps": 9, "batch_size": 3}, "has steps 6, not 9; batch_size 2, not 3$"),
        ({"size": "mini"}, "has size tiny, not mini$"),
        (
            {"vocab_size": 61},
            "vocab_size 60, not 61; tokenizer_hash [0-9a-f]{16}, not [0-9a-f]{16}",
        ),
    ],
)
def test_other_options_are_rejected_by_what_differs(changes, message, finished):
    expected = state(Path(finished.out))
    with pytest.raises(ValueError, match=message):
        run(replace(finished, **changes))
    assert_same(state(Path(finished.out)), expected)


def test_another_corpus_is_rejected(finished):
    """It has the same name, and sentences and documents of the same lengths and words: two words
    have changed places."""
    file = Path(finished.dataset)
    text = file.read_text()
    trained_on = text.replace("ab b aa", "b ab aa", 1)
    held_out = "m zm zz".join(text.rsplit("zm m zz", 1))  # near the end of the file
    try:
        for other, name in ((trained_on, "corpus"), (held_out, "validation")):
            assert other != text
            file.write_text(other)
            with pytest.raises(ValueError, match=rf"has {name}_checksum \d+, not \d+$"):
                run(finished)
    finally:
        file.write_text(text)


def test_a_resumed_run_may_have_another_folder_and_device_and_other_ways_to_compute(
    finished, tmp_path, monkeypatch
):
    """Namely --compile and --checkpoint-activations. The device is pretended."""
    monkeypatch.setattr(train_pretrain, "choose_device", lambda name: torch.device("cpu"))
    monkeypatch.setattr(torch, "compile", lambda module, **_: module)
    moved = Path(finished.out).rename(tmp_path / "moved")
    sorted((moved / "checkpoints").iterdir())[-1].unlink()
    otherwise = {"device": "cuda", "compile": True, "checkpoint_activations": True}
    run(replace(finished, out=str(moved), **otherwise))
    assert (moved / "checkpoints/step-000000006.pt").exists()


def test_a_resumed_run_may_find_corpus_and_tokenizer_under_other_paths(finished, tmp_path):
    """With a slash at the end, or moved: it is their content that counts."""
    expected = state(Path(finished.out))
    checkpoints(finished)[-1].unlink()
    corpus = shutil.copy(finished.dataset, tmp_path / "elsewhere.jsonl")
    shutil.copytree(Path(finished.out) / "model", tmp_path / "model")  # which has the tokenizer
    run(replace(finished, dataset=str(corpus), tokenizer=f"{tmp_path}/model/"))
    assert_same(state(Path(finished.out)), expected)


def test_resuming_a_finished_run_writes_no_checkpoint(finished):
    before = contents(Path(finished.out) / "checkpoints")
    run(finished)
    assert contents(Path(finished.out) / "checkpoints") == before


def test_a_loss_that_is_not_finite_stops_the_run_before_it_is_saved(corpus, tmp_path, monkeypatch):
    """The message names the step, also between two log lines, and every checkpoint that is left is
    good."""
    options = replace(OPTIONS, dataset=corpus, out=str(tmp_path), save_every=2, log_every=1000)
    update, steps = train_pretrain.update, iter(range(100))

    def poisoned(model, optimizer, rate):
        if next(steps) == 4:
            next(model.parameters()).grad.fill_(math.nan)
        return update(model, optimizer, rate)

    monkeypatch.setattr(train_pretrain, "update", poisoned)
    with pytest.raises(
        ValueError,
        match="step 4: the gradient was not finite.*start a new run with a lower --learning-rate",
    ):
        run(options)
    assert [path.name for path in checkpoints(options)] == [
        "step-000000002.pt",
        "step-000000004.pt",
    ]
    for path in checkpoints(options):
        found = torch.load(path, weights_only=True)["model"]
        assert all(tensor.isfinite().all() for tensor in found.values())


@pytest.mark.parametrize(
    "due", [{"save_every": 2}, {"save_every": 1000, "export_steps": (2,)}], ids=["save", "export"]
)
def test_a_weight_that_is_not_finite_is_neither_saved_nor_exported(
    due, corpus, tmp_path, monkeypatch
):
    options = replace(OPTIONS, dataset=corpus, out=str(tmp_path), log_every=1000, **due)
    update, steps = train_pretrain.update, iter(range(100))

    def spoiled(model, optimizer, rate):
        norm = update(model, optimizer, rate)
        if next(steps) == 1:
            model.nsp.bias.data[0] = math.inf
        return norm

    monkeypatch.setattr(train_pretrain, "update", spoiled)
    message = r"a weight in nsp\.bias is no longer finite; the last checkpoint is good"
    with pytest.raises(ValueError, match=message):
        run(options)
    assert [path.name for path in checkpoints(options)] == ["step-000000000.pt"]
    assert not (tmp_path / "models").exists()


def with_a_killed_worker(options: PretrainOptions) -> None:
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
    """The cause is one line, and the run can be resumed."""
    options = replace(OPTIONS, dataset=corpus, out=str(tmp_path), workers=1, save_every=4)
    statuses = wait(start(with_a_killed_worker, options, output=tmp_path / "errors"))
    printed = (tmp_path / "errors").read_text()
    assert statuses == [2], printed
    lines = printed.splitlines()
    (line,) = [e for e in lines if e.startswith("error: ")]
    assert "error: a DataLoader worker died (" in line
    assert "--resume" in line
    assert in_process(replace(options, resume=True)) == 0


@pytest.mark.parametrize(("signals", "status"), [([signal.SIGINT], 130), ([2, 15, 15], 143)])
def test_a_stopped_run_ends_with_the_status_of_its_signal(signals, status, tmp_path, capsys):
    stopped = support.run.Run(tmp_path, 0, 1, 9, {})
    stopped.bar, stopped.signals = support.run.progress_bar(9), signals
    with pytest.raises(SystemExit) as ended:
        stopped.stop(5)
    assert ended.value.code == status
    assert "stopped before step 5; --resume continues from there" in capsys.readouterr().err
