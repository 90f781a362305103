"""The folder of a run: what a second run, a second process or a strange file there can do."""

import io
import json
import math
import os
import signal
import subprocess
import sys
import time
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from strategies import LETTERS, small_tokenizer
from test_sst2 import reviews

import train_pretrain
import train_sst2
from support.checkpoints import checkpoint_paths
from support.folder import run_folder, write_line
from train_pretrain import PretrainOptions, pretrain
from train_sst2 import SST2Options

ROOT = Path(__file__).parents[1]


def write_corpus(folder: Path) -> Path:
    """Writes a small corpus and its tokenizer; returns the folder."""
    folder.mkdir(exist_ok=True)
    texts = ["\n\n".join(f"{a} {b} {a} {a} {b}" for b in LETTERS[:9]) for a in LETTERS]
    rows = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    (folder / "corpus.jsonl").write_text(rows)
    small_tokenizer().save(str(folder / "tokenizer.json"))
    return folder


def make_options(corpus: Path, out: Path) -> PretrainOptions:
    return PretrainOptions(
        out=str(out), dataset=f"{corpus}/corpus.jsonl", tokenizer=str(corpus),
        max_seq_length=16, batch_size=2, steps=4, eval_every=4, eval_batches=1, log_every=1,
        save_every=2, workers=0, device="cpu",
    )  # fmt: skip


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture
def options(corpus, tmp_path) -> PretrainOptions:
    return make_options(corpus, tmp_path / "run")


def run(options: PretrainOptions) -> None:
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        pretrain(options)


def contents(folder: Path) -> dict[str, bytes]:
    """Returns every file in a folder but its lock, which is empty."""
    files = (path for path in folder.glob("**/*") if path.is_file() and path.name != ".lock")
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


# ---- What --resume needs ------------------------------------------------------------------------


def test_resuming_without_a_checkpoint_is_rejected_and_touches_nothing(options):
    """It would start at step 0, and overwrite the metrics and the model that are there."""
    run(options)
    out = Path(options.out)
    for path in checkpoint_paths(out):
        path.rename(out.parent / path.name)
    before = contents(out)
    with pytest.raises(ValueError, match=r"run holds no checkpoint of a run of pretraining"):
        run(replace(options, resume=True))
    assert contents(out) == before


def test_resuming_in_the_folder_of_a_run_of_fine_tuning_is_rejected(options, tmp_path):
    folder = tmp_path / "reviews"
    folder.mkdir()
    dataset = reviews(folder, train=40, validation=10)
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        train_sst2.main(
            SST2Options(out=options.out, dataset=dataset, vocab_size=60, epochs=1, device="cpu")
        )
    before = contents(Path(options.out))
    with pytest.raises(ValueError, match="holds no checkpoint"):
        run(replace(options, resume=True))
    assert contents(Path(options.out)) == before


def test_resuming_a_folder_that_does_not_exist_is_rejected(options):
    with pytest.raises(ValueError, match=r"--resume: --out .*run does not exist"):
        run(replace(options, resume=True))
    assert not Path(options.out).exists()


def test_a_checkpoint_of_step_0_comes_before_the_first_step(options, monkeypatch):
    """A run that dies in its first step is resumed, with the initial weights it had."""

    def dies(*arguments):
        raise RuntimeError("in the first step")

    expected = replace(options, out=f"{options.out}-whole")
    run(expected)
    monkeypatch.setattr(train_pretrain, "add_gradients", dies)
    with pytest.raises(RuntimeError, match="in the first step"):
        run(options)
    monkeypatch.undo()
    assert [path.name for path in checkpoint_paths(Path(options.out))] == ["step-000000000.pt"]
    run(replace(options, resume=True))
    states = [
        torch.load(checkpoint_paths(Path(o.out))[-1], weights_only=True)["model"]
        for o in (options, expected)
    ]
    assert all(torch.equal(tensor, states[1][name]) for name, tensor in states[0].items())


# ---- What a new run needs -----------------------------------------------------------------------


@pytest.mark.parametrize("left", ["checkpoints", "model", "metrics.jsonl"])
def test_a_new_run_is_rejected_where_another_one_has_left_anything(left, options):
    run(options)
    out = Path(options.out)
    for name in {"checkpoints", "model", "metrics.jsonl"} - {left}:
        (out / name).rename(out.parent / name)
    before = contents(out)
    with pytest.raises(ValueError, match="run holds another run; name a new folder, or --resume"):
        run(options)
    assert contents(out) == before


def test_a_run_that_died_before_its_first_checkpoint_can_be_started_again(options):
    """It has left its options, an empty metrics.jsonl and half a checkpoint: nothing to lose."""
    out = Path(options.out)
    (out / "checkpoints").mkdir(parents=True)
    (out / "config.json").write_text("{}")
    (out / "metrics.jsonl").touch()
    (out / "checkpoints/step-000000000.unfinished").write_bytes(b"half")
    run(options)
    assert json.loads((out / "config.json").read_text())["steps"] == 4


# ---- Strange files among the checkpoints --------------------------------------------------------

FOREIGN = ["step-best.pt", "step-5.pt", "step-0000000099.pt", "step-000000099.pt.bak", "notes.txt"]


def test_only_exact_names_are_checkpoints_and_foreign_files_are_left_alone(options):
    """A copy named step-best.pt counted as the newest, and two of them pushed out every new one."""
    run(replace(options, steps=4, save_every=1))
    folder = Path(options.out) / "checkpoints"
    for name in FOREIGN:
        (folder / name).write_bytes(b"a foreign file")
    assert [path.name[-4:] for path in checkpoint_paths(Path(options.out))] == ["3.pt", "4.pt"]
    checkpoint_paths(Path(options.out))[-1].unlink()
    run(replace(options, steps=4, save_every=1, resume=True))
    assert [path.name[-4:] for path in checkpoint_paths(Path(options.out))] == ["3.pt", "4.pt"]
    assert all((folder / name).read_bytes() == b"a foreign file" for name in FOREIGN)


@pytest.mark.parametrize("lost", ["run", "model", "own", "metrics_bytes"])
def test_a_torch_file_without_our_keys_is_damaged(lost, options):
    """The checkpoint before it is used."""
    run(options)
    newest = checkpoint_paths(Path(options.out))[-1]
    expected = torch.load(newest, weights_only=True)
    torch.save({name: value for name, value in expected.items() if name != lost}, newest)
    with pytest.warns(UserWarning, match=f"{newest.name} is damaged"):
        run(replace(options, resume=True))
    found = torch.load(newest, weights_only=True)["model"]
    assert all(torch.equal(tensor, expected["model"][name]) for name, tensor in found.items())


# ---- Two processes in one folder ----------------------------------------------------------------

HOLDER = """
import os, sys, time
from types import SimpleNamespace
from support.folder import run_folder
with run_folder(SimpleNamespace(out=sys.argv[1], resume=sys.argv[2] == "resume")):
    if os.fork() == 0:  # a data worker, which outlives the process for a while
        time.sleep(60)
        os._exit(0)
    print("locked", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def hold():
    """Starts a process that holds a folder."""
    started: list[subprocess.Popen] = []

    def start(out: str, how: str) -> subprocess.Popen:
        line = [sys.executable, "-c", HOLDER, out, how]
        process = subprocess.Popen(
            line, cwd=ROOT, stdout=subprocess.PIPE, text=True, start_new_session=True
        )
        started.append(process)
        assert process.stdout.readline() == "locked\n"
        return process

    yield start
    for process in started:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@pytest.mark.slow
@pytest.mark.parametrize("resume", [False, True])
def test_a_second_process_with_the_same_folder_is_rejected_and_changes_nothing(
    resume, options, hold
):
    if resume:
        run(options)
    process = hold(options.out, "resume" if resume else "new")
    before = contents(Path(options.out))
    with pytest.raises(ValueError, match=r"--out .*run is in use by another process"):
        run(replace(options, resume=resume))
    assert contents(Path(options.out)) == before
    # The lock dies with its process, though a child of it lives on.
    process.kill()
    process.wait()
    run(replace(options, resume=resume))


def test_the_lock_ends_with_the_run(options, hold):
    run(options)
    hold(options.out, "resume")


def test_fine_tuning_holds_its_folder_too(options, hold):
    hold(options.out, "new")
    with pytest.raises(ValueError, match="is in use by another process"):
        train_sst2.main(SST2Options(out=options.out, device="cpu"))


def test_only_the_first_rank_locks(options):
    with run_folder(options, rank=0), run_folder(options, rank=1) as out:
        assert out == Path(options.out)


# ---- metrics.jsonl ------------------------------------------------------------------------------


def test_metrics_are_json_whatever_the_numbers(tmp_path):
    """JSON has neither infinity nor NaN; other readers reject what Python writes for them."""
    write_line(tmp_path, split="validation", perplexity=math.inf, loss=math.nan, step=3, mean=0.5)
    (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()

    def fails(constant: str) -> None:
        raise AssertionError(constant)

    found = json.loads(line, parse_constant=fails)
    assert found == {
        "split": "validation",
        "perplexity": None,
        "loss": None,
        "step": 3,
        "mean": 0.5,
    }


def test_fine_tuning_stops_at_a_gradient_that_is_not_finite(options, tmp_path, monkeypatch):
    """At the end of the epoch at the latest, and no model is written."""
    folder = tmp_path / "reviews"
    folder.mkdir()
    dataset = reviews(folder, train=40, validation=10)
    update = train_sst2.update

    def poisoned(model, optimizer, rate):
        next(model.parameters()).grad.fill_(math.nan)
        return update(model, optimizer, rate)

    monkeypatch.setattr(train_sst2, "update", poisoned)
    with pytest.raises(ValueError, match="step 0: the gradient was not finite"):
        train_sst2.main(
            SST2Options(out=options.out, dataset=dataset, vocab_size=60, epochs=1, device="cpu")
        )
    assert not (Path(options.out) / "model").exists()


# ---- Signals before the first step --------------------------------------------------------------


def children_of(pid: int) -> set[int]:
    path = Path(f"/proc/{pid}/task/{pid}/children")
    return {int(child) for child in path.read_text().split()} if path.exists() else set()


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs /proc")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_while_the_corpus_is_tokenized_ends_all_processes_quietly(
    number, tmp_path, corpus
):
    """SIGTERM comes to the main process alone, Ctrl-C to its whole group; two processes tokenize,
    and without a handler they would go on, in the worst case for hours."""
    text = "\n\n".join(f"{a} {b} {c}" for a in LETTERS for b in LETTERS for c in LETTERS)
    rows = (json.dumps({"text": text + f"\n\n{a} {b}"}) for a in LETTERS for b in LETTERS)
    (tmp_path / "large.jsonl").write_text("\n".join(rows))
    line = [sys.executable, str(ROOT / "train_pretrain.py"), "--dataset", "large.jsonl"]
    line += ["--tokenizer", str(corpus), "--out", "run", "--workers", "2", "--device", "cpu"]
    process = subprocess.Popen(
        line, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        start_new_session=True,
    )  # fmt: skip
    deadline = time.monotonic() + 60
    while len(children_of(process.pid)) < 2:
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.02)
    time.sleep(0.5)
    tokenizing = children_of(process.pid)
    os.kill(process.pid, number) if number == signal.SIGTERM else os.killpg(process.pid, number)
    output, _ = process.communicate(timeout=30)
    assert process.returncode == 128 + number, output
    assert "Traceback" not in output
    deadline = time.monotonic() + 10
    while any(Path(f"/proc/{pid}/stat").exists() for pid in tokenizing):
        assert time.monotonic() < deadline, "a process that tokenizes goes on"
        time.sleep(0.05)
