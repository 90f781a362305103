"""Mistakes that users make in options and data: each gives one message and exit status 2, and no
file changes. Errors that are not the user's keep their traceback.
"""

import multiprocessing
import runpy
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from helpers import ROOT, contents, wait_until
from strategies import write_mistakes
from torch.utils.data import DataLoader

import data
from train_pretrain import PretrainOptions, check_smallest, run_script
from train_sst2 import SST2Options

PRETRAIN, SST2 = "train_pretrain.py", "train_sst2.py"
SCRIPTS = (PRETRAIN, SST2)

pytestmark = pytest.mark.usefixtures("_smallest")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """One of everything that can be wrong, and a small model."""
    return write_mistakes(tmp_path_factory.mktemp("mistakes"))


@pytest.fixture
def run_line(folder, monkeypatch) -> Callable[[str, str], None]:
    """Runs a script as a program in the folder, in this process."""

    def run_line(script: str, line: str) -> None:
        monkeypatch.chdir(folder)
        monkeypatch.setattr(sys, "argv", [script, *line.split()])
        runpy.run_path(str(ROOT / script), run_name="__main__")

    return run_line


# Mistakes that would otherwise be silent, surface late, or end in a traceback. The message contains
# the third field or, where that is empty, the last word of the line.
WRONG = [
    (PRETRAIN, "--device gpu", ""),
    (PRETRAIN, "--bathc-size 8", "bathc"),
    (PRETRAIN, "--dropout nan", ""),
    (PRETRAIN, "--dropout 1", "[0, 1)"),
    (PRETRAIN, "--steps 8 --warmup-steps 9", ""),
    (PRETRAIN, "--positions 9 --max-seq-length 16", "--positions"),
    (PRETRAIN, "--weights model --max-seq-length 17", ""),
    (PRETRAIN, "--dataset corpus.jsonl --weights few", "20"),
    (PRETRAIN, "--dataset corpus.jsonl --weights bare", ""),
    (PRETRAIN, "--dataset corpus.jsonl --streaming", "--tokenizer"),
    (PRETRAIN, "--dataset lines.jsonl --vocab-size 60", "rows_per_document"),
    (PRETRAIN, "--dataset no/such/file", ""),
    (PRETRAIN, "--dataset broken.jsonl", ""),
    (SST2, "--device gpu", ""),
    (SST2, "--learning-rate 1e-3 inf", ""),
    (SST2, "--learning-rate --seed 1", "--learning-rate"),
    (SST2, "--weights model --max-seq-length 17", ""),
    (SST2, "--test-dataset no/such/file", ""),
    (SST2, "--predict hello", "--weights"),
]


@pytest.mark.parametrize(("script", "line", "named"), WRONG)
def test_a_mistake_gives_one_message_that_names_it_and_status_2_and_changes_no_file(
    script, line, named, folder, run_line, capfd
):
    paths, files = set(folder.glob("**/*")), contents(folder)
    with pytest.raises(SystemExit) as ended:
        run_line(script, line)
    assert ended.value.code == 2
    printed = capfd.readouterr().err
    ours = [text for text in printed.splitlines() if text.startswith("error: ")]
    tyros = printed.count("For full helptext")
    assert len(ours) + tyros == 1, printed
    assert (named or line.split()[-1]) in (ours[0] if ours else printed)
    assert "Traceback" not in printed
    assert (set(folder.glob("**/*")), contents(folder)) == (paths, files)


def test_the_smallest_values_are_no_mistakes_and_smaller_ones_are():
    none = {"steps": 0, "workers": 0, "seed": 0, "dropout": 0.0, "warmup_steps": 0}
    one = dict.fromkeys(("batch_size", "accumulate", "log_every", "eval_every", "save_every"), 1)
    of_pretraining = {**none, **one, "rows_per_document": 1, "max_seq_length": 5}
    of_tuning = dict.fromkeys(("seeds", "batch_size", "epochs", "log_every"), 1)
    of_tuning |= {"seed": 0, "max_seq_length": 3}
    for cls, smallest in ((PretrainOptions, of_pretraining), (SST2Options, of_tuning)):
        cls(**smallest)
        for name, value in smallest.items():
            with pytest.raises(ValueError, match="--" + name.replace("_", "-")):
                cls(**{name: value - 1})


# ---- How a script ends --------------------------------------------------------------------------


@pytest.mark.parametrize("script", SCRIPTS)
def test_ctrl_c_while_a_run_is_prepared_ends_it_with_130_and_no_traceback(
    script, run_line, monkeypatch, tmp_path, capfd
):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(data, "load_tokenizer", interrupted)
    with pytest.raises(SystemExit) as ended:
        run_line(script, f"--tokenizer vocab.txt --out {tmp_path}/run")
    assert ended.value.code == 130
    assert "Traceback" not in capfd.readouterr().err
    assert not (tmp_path / "run").exists()


def make_mistake() -> None:
    check_smallest(PretrainOptions(), 7, "workers")


def have_bug() -> None:
    F.cross_entropy(torch.ones(2, 3), torch.ones(3))  # a ValueError, too


@pytest.fixture
def in_worker(monkeypatch):
    """Returns a function that calls another one in a data worker."""
    monkeypatch.setattr(sys, "argv", ["script"])
    return lambda fail: list(DataLoader([0], num_workers=1, collate_fn=lambda _: fail()))


def test_a_mistake_that_a_data_worker_finds_is_shown_without_its_traceback(in_worker, capsys):
    with pytest.raises(SystemExit) as ended:
        run_script(lambda _: in_worker(make_mistake), PretrainOptions)
    assert ended.value.code == 2
    assert capsys.readouterr().err == "\nerror: ValueError: --workers must be at least 7, got 2\n"


def test_a_bug_keeps_its_traceback_in_a_data_worker_too(in_worker):
    """Whoever changes a loss or a batch needs to see where it failed."""
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        run_script(lambda _: torch.ones(2, 3) @ torch.ones(2, 3), PretrainOptions)
    with pytest.raises(ValueError, match="Expected input batch_size"):
        run_script(lambda _: have_bug(), PretrainOptions)
    with pytest.raises(ValueError, match="in have_bug") as _holds_the_loader:
        run_script(lambda _: in_worker(have_bug), PretrainOptions)
    wait_until(lambda: not multiprocessing.active_children(), seconds=4)
