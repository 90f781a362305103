"""The folder of a run: what a second run, a second process or a foreign file there can do, and
which models a run exports.
"""

import io
import itertools
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import pytest
import torch
from helpers import ROOT, contents, metrics_of, run, weights_of
from strategies import LETTERS, PADDING, SMALL, TINY, publish, small_tokenizer, write_corpus

import data
import support.folder
import support.run
import train_pretrain
import train_sst2
from bert import BertPretrainModel, SST2BertModel
from support.checkpoints import checkpoint_paths, save_checkpoint
from support.folder import check_lies_outside, run_folder, write_line, write_model
from support.processes import note_signals, signals_to_handle
from train_pretrain import PretrainOptions, pretrain
from train_sst2 import SST2Options


# ---- Checkpoints and the clock ------------------------------------------------------------------


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs /proc")
def test_a_checkpoint_is_on_disk_before_it_is_renamed_and_others_deleted(tmp_path, monkeypatch):
    """A computer that loses its power keeps what was forced to disk, and perhaps nothing else."""
    happened = []

    def note(owner, name, describe):
        real = getattr(owner, name)

        def noted(*arguments, **named):
            happened.append(describe(*arguments))
            return real(*arguments, **named)

        monkeypatch.setattr(owner, name, noted)

    def opened(descriptor: int) -> str:
        return Path(os.readlink(f"/proc/self/fd/{descriptor}")).name

    def forced(descriptor: int) -> str:
        size = "empty" if os.fstat(descriptor).st_size == 0 else "whole"
        return f"force {opened(descriptor)}{' ' + size if 'step' in opened(descriptor) else ''}"

    (tmp_path / "metrics.jsonl").write_text("{}\n")
    for step in (0, 1):
        save_checkpoint(tmp_path, {"step": step}, step - 1)
    note(os, "fsync", forced)
    note(Path, "replace", lambda path, other: f"rename {path.name} {other.name}")
    note(Path, "unlink", lambda path, **_: f"delete {path.name}")
    save_checkpoint(tmp_path, {"step": 2}, 1)
    assert happened == [
        "force metrics.jsonl",
        "force step-000000002.unfinished whole",
        "rename step-000000002.unfinished step-000000002.pt",
        "force checkpoints",
        "delete step-000000000.pt",
    ]


def test_a_checkpoint_that_cannot_be_written_says_that_the_one_before_stays(tmp_path, monkeypatch):
    open_, save = Path.open, torch.save

    def full_disk(*_, **__):
        raise OSError("no space")

    def full_folder(path, *how, **more):
        return full_disk() if path.suffix == ".unfinished" else open_(path, *how, **more)

    save_checkpoint(tmp_path, {"step": 1}, 0)
    for owner, name, fails in ((torch, "save", full_disk), (Path, "open", full_folder)):
        monkeypatch.setattr(owner, name, fails)
        with pytest.raises(OSError, match=r"step-0+2\.pt not saved, the one .* stays: no space"):
            save_checkpoint(tmp_path, {"step": 2}, 1)
        monkeypatch.setattr(torch, "save", save)
        monkeypatch.setattr(Path, "open", open_)
        names = [path.name for path in (tmp_path / "checkpoints").iterdir()]
        assert names == ["step-000000001.pt"]


def test_a_run_leaves_its_options_for_people_to_read(options):
    run(options)
    text = (Path(options.out) / "config.json").read_text()
    assert text == json.dumps(asdict(options), indent=2) + "\n"


def test_a_checkpoint_has_what_every_rank_keeps_and_losses_are_summed_over_them(
    tmp_path, monkeypatch
):
    """The ranks are pretended."""
    first = support.run.Run(tmp_path, 0, 2, 4, {})
    first.started = 0.0
    assert (first.tokens, first.seconds_before) == (0, 0.0)

    def gather(gathered, own):
        assert len(gathered) == 2
        gathered[:] = [own, f"{own} of rank 1"]

    monkeypatch.setattr(support.run.dist, "all_gather_object", gather)
    first.save(2, "what is kept")
    (path,) = checkpoint_paths(tmp_path)
    assert torch.load(path)["own"] == ["what is kept", "what is kept of rank 1"]

    monkeypatch.setattr(support.run.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(support.run.dist, "all_reduce", lambda numbers: numbers.mul_(3))
    assert first.add_up(torch.tensor([1.0, 2.0])) == [3.0, 6.0]


def test_signals_are_noted_instead_of_ending_the_process():
    before = {number: signal.getsignal(number) for number in signals_to_handle()}
    try:
        noted = note_signals()
        for number in before:
            os.kill(os.getpid(), number)
        assert noted == list(before)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_a_model_is_on_the_disk_before_the_one_before_it_is_deleted(tmp_path, monkeypatch):
    """A process that is killed between the two renamings leaves both, complete."""
    model = SST2BertModel(TINY, PADDING)
    write_model(model, small_tokenizer(), tmp_path / "model")
    content = contents(tmp_path / "model")
    forced, rename = [], Path.rename
    force_to_disk = support.folder.force_to_disk

    def note(*paths):
        forced.append({path.name for path in paths})
        force_to_disk(*paths)

    def die_at_the_second(path, other):
        if path.name == "model.unfinished":
            raise KeyboardInterrupt
        return rename(path, other)

    monkeypatch.setattr(support.folder, "force_to_disk", note)
    monkeypatch.setattr(Path, "rename", die_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        write_model(model, small_tokenizer(), tmp_path / "model")
    monkeypatch.setattr(Path, "rename", rename)
    assert forced == [{*content, "model.unfinished"}]
    names = ["model.before", "model.unfinished"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    for name in names:
        assert contents(tmp_path / name) == content
    write_model(model, small_tokenizer(), tmp_path / "model")
    assert forced[1:] == [{*content, "model.unfinished"}, {tmp_path.name}]
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    shutil.copytree(tmp_path / "model", tmp_path / "model.before")  # of a process that was killed
    write_model(model, small_tokenizer(), tmp_path / "model")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


class Broken(io.StringIO):
    """A pipe whose reader has gone."""

    def write(self, text):
        raise BrokenPipeError

    def flush(self):
        raise BrokenPipeError


def test_a_run_goes_on_where_nothing_can_be_shown(options, monkeypatch):
    """Ctrl-C in `... | tee log` ends tee first. What the run then could not print ended it before
    it had saved."""
    train = train_pretrain.train

    def reader_goes(*arguments):
        monkeypatch.setattr(sys, "stdout", Broken())
        display = arguments[1].bar.fp._wrapped  # by tqdm
        assert isinstance(display, support.run.Display)
        display.stream = Broken()
        train(*arguments)

    monkeypatch.setattr(train_pretrain, "train", reader_goes)
    monkeypatch.setattr(support.run, "progress_bar", partial(support.run.progress_bar, miniters=1))
    pretrain(replace(options, eval_every=1))
    assert [line["step"] for line in metrics_of(Path(options.out))][-1] == 4
    assert (Path(options.out) / "model").exists()


def test_the_clock_and_the_count_of_tokens_of_a_resumed_run_go_on(options, monkeypatch):
    """An hour passes before the run is resumed, and does not count."""
    clock = itertools.count(1000)  # each look at it takes a second
    monkeypatch.setattr(support.run.time, "perf_counter", lambda: next(clock))
    run(options)
    whole = Path(options.out) / "metrics.jsonl"
    lines = [json.loads(line) for line in whole.read_text().splitlines()]
    checkpoint = torch.load(checkpoint_paths(Path(options.out))[0], weights_only=True)  # of step 2
    checkpoint_paths(Path(options.out))[1].unlink()

    clock = itertools.count(4600)
    run(replace(options, resume=True))
    resumed = [json.loads(line) for line in whole.read_text().splitlines()]
    assert lines[-1]["tokens"] > 2 * 16  # more than one step has: 2 pairs of at most 16 tokens
    assert [line["tokens"] for line in resumed] == [line["tokens"] for line in lines]
    seconds = [line["seconds"] for line in resumed]
    assert seconds == sorted(set(seconds))
    first = next(line for line in resumed if line["seconds"] > checkpoint["seconds"])
    assert first["tokens"] > checkpoint["tokens"] > 0
    assert first["seconds"] - checkpoint["seconds"] < 60


# ---- What --resume needs ------------------------------------------------------------------------


@pytest.mark.parametrize("has_folder", [True, False])  # a run of fine-tuning has none
def test_resuming_without_a_checkpoint_is_rejected_and_touches_nothing(has_folder, options):
    """A run that started at step 0 would overwrite the metrics and the model that are there."""
    run(options)
    out = Path(options.out)
    for path in checkpoint_paths(out):
        path.unlink()
    if not has_folder:
        (out / "checkpoints").rmdir()
    before = contents(out)
    with pytest.raises(ValueError, match=r"run holds no checkpoint of a run of pretraining"):
        run(replace(options, resume=True))
    assert contents(out) == before


def test_resuming_a_folder_that_does_not_exist_is_rejected(options):
    with pytest.raises(ValueError, match=r"--resume: --out .*run does not exist"):
        run(replace(options, resume=True))
    assert not Path(options.out).exists()


def test_a_checkpoint_of_step_0_comes_before_the_first_step(options, monkeypatch):
    """A run that dies in its first step resumes with the initial weights that it had."""

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
    """Its options, an empty metrics.jsonl and half a checkpoint are nothing to lose."""
    out = Path(options.out)
    (out / "checkpoints").mkdir(parents=True)
    (out / "config.json").write_text('{"out": "elsewhere", "steps": 9}')
    (out / "metrics.jsonl").touch()
    (out / "checkpoints/step-000000000.unfinished").write_bytes(b"half")
    run(options)
    assert json.loads((out / "config.json").read_text())["steps"] == 4


@pytest.mark.parametrize("content", ['{"hidden_size": 12}', "{}", "[1]", "no JSON"])
def test_the_config_of_a_model_or_of_something_else_is_not_overwritten(content, options):
    """--out that is the folder of --weights would destroy the model."""
    out = Path(options.out)
    out.mkdir(parents=True)
    (out / "config.json").write_text(content)
    for start in (run, lambda o: train_sst2.main(SST2Options(out=o.out))):
        with pytest.raises(
            ValueError, match=r"run has a config\.json that no run wrote; name a new"
        ):
            start(options)
    assert contents(out) == {"config.json": content.encode()}
    assert [path.name for path in out.iterdir()] == ["config.json"]  # not even a lock


@pytest.mark.parametrize("out", ["corpus", "corpus/runs/x", "corpus/../corpus/x", "link/x"])
def test_a_run_inside_its_own_corpus_is_rejected(out, options, tmp_path, monkeypatch):
    """What it writes would be read as text when it is resumed."""
    write_corpus(tmp_path / "corpus")
    (tmp_path / "link").symlink_to("corpus")
    monkeypatch.chdir(tmp_path)
    before = contents(tmp_path / "corpus")
    for dataset in ("corpus", str(tmp_path / "corpus"), "link"):
        message = f"--out {out} lies inside --dataset {dataset}, and may become a part of it"
        with pytest.raises(ValueError, match=re.escape(message)):
            run(replace(options, out=out, dataset=dataset))
        with pytest.raises(ValueError, match=re.escape(message)):
            train_sst2.main(SST2Options(out=out, dataset=dataset))
        with pytest.raises(
            ValueError, match=re.escape(message.replace("--dataset", "--test-dataset"))
        ):
            train_sst2.main(SST2Options(out=out, test_dataset=dataset))
    assert contents(tmp_path / "corpus") == before
    (tmp_path / "sample").mkdir()
    check_lies_outside("sample/run", "sample", "--dataset")  # a name, and not this folder
    run(replace(options, out="corpus-runs/x", dataset="corpus/corpus.jsonl", steps=1))
    run(replace(options, out="corpus/x", dataset="corpus/corpus.jsonl", steps=1))  # a file alone


def test_half_a_model_is_no_model(options, monkeypatch):
    """A process may be killed, or the disk be full, while it writes one."""

    def half(model, folder, tokenizer):
        Path(folder).mkdir(parents=True)
        (Path(folder) / "model.safetensors").write_bytes(b"half")
        raise OSError("no space")

    monkeypatch.setattr(train_pretrain.BertPretrainModel, "save_pretrained", half)
    out = Path(options.out)
    with pytest.raises(OSError, match="no space"):
        run(replace(options, export_steps=(1,)))
    assert not (out / "models/step-1").exists()
    (out / "models/step-1.unfinished/model.safetensors").unlink()
    (out / "models/step-1.unfinished").rmdir()
    with pytest.raises(OSError, match="no space"):
        run(replace(options, resume=True))
    assert not (out / "model").exists()


def test_a_model_that_was_moved_and_linked_is_replaced(tmp_path):
    publish(tmp_path / "elsewhere")
    (tmp_path / "model").symlink_to("elsewhere")
    write_model(BertPretrainModel(SMALL, PADDING), small_tokenizer(), tmp_path / "model")
    assert not (tmp_path / "model").is_symlink()
    assert (tmp_path / "elsewhere/config.json").exists()


def test_fine_tuning_does_not_advise_a_flag_that_it_lacks(tmp_path):
    (tmp_path / "model").mkdir()
    with pytest.raises(ValueError, match="holds another run; name a new folder$"):
        train_sst2.main(SST2Options(out=str(tmp_path)))


def test_a_half_written_checkpoint_is_removed_by_the_next_one(tmp_path):
    """A process that is killed leaves it, and with base it has more than a gigabyte."""
    save_checkpoint(tmp_path, {"step": 0}, -1)
    half = tmp_path / "checkpoints/step-000000007.unfinished"
    others = [half.with_name("best.unfinished"), half.with_name("step-7.unfinished")]
    for path in (half, *others):
        path.touch()
    save_checkpoint(tmp_path, {"step": 8}, 0)
    assert not half.exists()
    assert all(path.exists() for path in others)


def test_a_run_cannot_be_written_below_a_file(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="--out .*file/run cannot be written: "):
        pretrain(PretrainOptions(out=str(tmp_path / "file/run")))


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


def test_a_checkpoint_is_read_into_memory_of_the_cpu_and_needs_no_metrics(options, monkeypatch):
    """So a run resumes on another device than the one that wrote it."""
    run(options)
    out, how, load = Path(options.out), [], torch.load
    checkpoint_paths(out)[-1].unlink()
    (out / "metrics.jsonl").unlink()

    def noted(*arguments, **named):
        how.append(named)
        return load(*arguments, **named)

    monkeypatch.setattr(torch, "load", noted)
    run(replace(options, resume=True))
    assert how == [{"map_location": "cpu", "weights_only": True}]
    lines = (out / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [2, 3, 4]


@pytest.mark.parametrize("lost", ["run", "model", "own", "metrics_bytes"])
def test_a_torch_file_without_our_keys_is_damaged(lost, options):
    """The checkpoint before it is used."""
    run(options)
    newest = checkpoint_paths(Path(options.out))[-1]
    expected = torch.load(newest, weights_only=True)
    lost_too = {"run": "optimizer, run"}.get(lost, lost)
    kept = {name: value for name, value in expected.items() if name not in lost_too}
    torch.save(kept, newest)
    reason = rf"{newest.name} is damaged \(OSError: it lacks {lost_too}\)"
    with pytest.warns(UserWarning, match=reason):
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


def test_a_folder_is_made_with_those_above_it(options):
    with run_folder(replace(options, out=f"{options.out}/a/b")) as out:
        assert out.is_dir()


def test_a_rank_that_does_not_write_makes_no_folder_and_no_lock(options):
    with run_folder(options, rank=1) as out:
        assert not out.exists()


# ---- Several ranks, and the bar -----------------------------------------------------------------


def test_ranks_that_see_different_checkpoints_do_not_start(options, tmp_path, monkeypatch):
    """On several machines, --out may not be the same folder."""
    monkeypatch.setattr(support.run, "total", lambda *_: [3])  # the other rank is at step 0
    started = support.run.Run(tmp_path, rank=0, world_size=2, steps=9, identity={})
    started.step = 3
    with pytest.raises(ValueError, match="not all ranks see the checkpoint of step 3"):
        started.begin(options)
    assert not (tmp_path / "config.json").exists()


def test_the_group_of_ranks_ends_with_the_run(tmp_path, monkeypatch):
    """A group that is left makes the interpreter abort at its exit, in one run of a dozen."""
    ended = []
    monkeypatch.setattr(support.run.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(support.run.dist, "destroy_process_group", lambda: ended.append(True))
    started = support.run.Run(tmp_path, rank=0, world_size=2, steps=9, identity={})
    started.bar = support.run.progress_bar(9)
    started.end()
    assert ended == [True]


@pytest.mark.parametrize(("is_terminal", "seconds"), [(True, 0.5), (False, 30.0)])
def test_a_bar_is_drawn_twice_a_second_and_in_a_log_file_every_30_seconds(
    is_terminal, seconds, monkeypatch
):
    stream = io.StringIO()
    stream.isatty = lambda: is_terminal
    monkeypatch.setattr(sys, "stderr", stream)
    bar = support.run.progress_bar(10, initial=4)
    assert (bar.n, bar.total, bar.mininterval) == (4, 10, seconds)


def test_the_bar_shows_the_loss_and_the_tokens_per_second(tmp_path, monkeypatch):
    monkeypatch.setattr(support.run.time, "perf_counter", lambda: 12.0)
    started = support.run.Run(tmp_path, rank=0, world_size=1, steps=10, identity={})
    started.bar = support.run.progress_bar(10)
    started.tokens, started.started = 5000, 10.0
    started.show("loss 3.000")
    assert started.bar.postfix == "loss 3.000, 2,500 tokens/s"


@pytest.mark.parametrize(("rank", "is_hidden"), [(0, False), (1, True)])
def test_only_the_first_rank_shows_a_bar(rank, is_hidden, options, tmp_path, monkeypatch):
    bars = []
    monkeypatch.setattr(support.run, "progress_bar", lambda *a, **how: bars.append((a, how)))
    monkeypatch.setattr(support.run, "total", lambda step: [2 * step])
    monkeypatch.setattr(support.run, "note_signals", list)
    started = support.run.Run(tmp_path, rank, world_size=2, steps=10, identity={})
    started.step = 4
    started.begin(options)
    assert bars == [((10,), {"initial": 4, "disable": is_hidden})]


# ---- metrics.jsonl ------------------------------------------------------------------------------


def test_metrics_are_json_whatever_the_numbers(tmp_path):
    """JSON has neither infinity nor NaN, and other readers reject what Python writes for them."""
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


# ---- Signals before the first step --------------------------------------------------------------


def children_of(pid: int) -> set[int]:
    path = Path(f"/proc/{pid}/task/{pid}/children")
    return {int(child) for child in path.read_text().split()} if path.exists() else set()


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs /proc")
@pytest.mark.parametrize("signal_number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_while_the_corpus_is_tokenized_ends_all_processes_quietly(
    signal_number, tmp_path, small_corpus
):
    """SIGTERM reaches the main process alone, Ctrl-C its whole group. Two processes tokenize;
    without a handler they would continue, in the worst case for hours."""
    text = "\n\n".join(f"{a} {b} {c}" for a in LETTERS for b in LETTERS for c in LETTERS)
    rows = (json.dumps({"text": text + f"\n\n{a} {b}"}) for a in LETTERS for b in LETTERS)
    (tmp_path / "large.jsonl").write_text("\n".join(rows))
    line = [sys.executable, str(ROOT / "train_pretrain.py"), "--dataset", "large.jsonl"]
    line += ["--tokenizer", str(small_corpus), "--out", "run", "--workers", "2", "--device", "cpu"]
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
    kill = os.kill if signal_number == signal.SIGTERM else os.killpg
    kill(process.pid, signal_number)
    output, _ = process.communicate(timeout=30)
    assert process.returncode == 128 + signal_number, output
    assert "Traceback" not in output
    deadline = time.monotonic() + 10
    while any(Path(f"/proc/{pid}/stat").exists() for pid in tokenizing):
        assert time.monotonic() < deadline, "a process still tokenizes"
        time.sleep(0.05)


# ---- Exports ------------------------------------------------------------------------------------


def test_exports_are_the_models_of_their_steps(options):
    """They equal the checkpoints, the last one equals model/, and each has its tokenizer."""
    pretrain(replace(options, export_steps=(0, 2, 4)))
    out = Path(options.out)
    assert {path.name for path in (out / "models").iterdir()} == {"step-0", "step-2", "step-4"}
    for step, checkpoint in ((2, "step-000000002.pt"), (4, "step-000000004.pt")):
        expected = torch.load(out / "checkpoints" / checkpoint, weights_only=True)["model"]
        found = weights_of(out / f"models/step-{step}")
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    last = weights_of(out / "model")
    assert all(torch.equal(last[k], v) for k, v in weights_of(out / "models/step-4").items())
    assert not torch.equal(last["mlm_bias"], weights_of(out / "models/step-0")["mlm_bias"])
    tokenizer = data.load_tokenizer(out / "models/step-2")
    assert tokenizer.get_vocab() == small_tokenizer().get_vocab()


def test_a_run_that_is_stopped_exports_its_model_and_says_where(options, monkeypatch, capsys):
    asked = iter([False, False, False, True])
    monkeypatch.setattr(support.run.Run, "asked_to_stop", lambda run: next(asked))
    with pytest.raises(SystemExit) as stopped:
        pretrain(options)
    assert stopped.value.code == 128  # and the number of the signal, of which there was none
    assert "stopped before step 3; --resume continues from there\n" in capsys.readouterr().err
    (exported,) = Path(options.out, "models").iterdir()
    assert exported.name == "step-3"
    newest = Path(options.out, "checkpoints/step-000000003.pt")
    expected = torch.load(newest, weights_only=True)["model"]
    assert torch.equal(weights_of(exported)["nsp.weight"], expected["nsp.weight"])


def test_exports_change_nothing_of_a_run_and_may_change_when_it_is_resumed(options, tmp_path):
    pretrain(options)
    other = replace(options, out=str(tmp_path / "other"))
    pretrain(replace(other, export_steps=(1, 3)))
    for name, tensor in weights_of(Path(options.out, "model")).items():
        assert torch.equal(tensor, weights_of(Path(other.out, "model"))[name])
    pretrain(replace(other, export_steps=(4,), resume=True))
    assert Path(other.out, "models/step-4").exists()


def test_an_export_after_the_last_step_is_rejected(options):
    with pytest.raises(ValueError, match="--export-steps 5 comes after the last of --steps 4"):
        pretrain(replace(options, export_steps=(2, 5)))
    assert not Path(options.out).exists()
