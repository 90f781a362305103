"""Options and data as a person gets them wrong: one message, exit status 2, and no changed file.
Lines that are right train with what they say. What is no mistake of a person keeps its traceback.
"""

import gc
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import get_args, get_type_hints

import pytest
import torch
from helpers import contents, read_lines
from strategies import write_mistakes, write_reviews

import train_pretrain
import train_sst2
from bert import SIZES
from train_pretrain import PretrainOptions, pretrain, run_script
from train_sst2 import SST2Options, main

PRETRAIN, SST2 = "train_pretrain.py", "train_sst2.py"
SCRIPTS = {PRETRAIN: (pretrain, PretrainOptions), SST2: (main, SST2Options)}

pytestmark = pytest.mark.usefixtures("_smallest")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """One of everything that can be wrong, a small model, and sentences with labels."""
    folder = write_mistakes(tmp_path_factory.mktemp("mistakes"))
    write_reviews(folder / "reviews", train=9, validation=5, test=5)
    return folder


@pytest.fixture
def run_line(folder, monkeypatch) -> Callable[[str, str], None]:
    """Runs a script's command line in the folder, in this process."""

    def run_line(script: str, line: str) -> None:
        monkeypatch.chdir(folder)
        monkeypatch.setattr(sys, "argv", [script, *line.split()])
        run_script(*SCRIPTS[script])

    return run_line


# What would otherwise be silent, or late, or a traceback. The message has the last word of the
# line, or what stands here in its place.
WRONG = [
    (PRETRAIN, "--steps -1", ""),
    (PRETRAIN, "--batch-size 0", ""),
    (PRETRAIN, "--bathc-size 8", "bathc"),
    (PRETRAIN, "--dropout nan", ""),
    (PRETRAIN, "--learning-rate nan", ""),
    (PRETRAIN, "--steps 8 --warmup-steps 9", ""),
    (PRETRAIN, "--max-seq-length 4", ""),
    (PRETRAIN, "--positions 9 --max-seq-length 16", "--positions"),
    (PRETRAIN, "--weights model --max-seq-length 17", ""),
    (PRETRAIN, "--weights model --positions 20 --max-seq-length 16", "--positions 20"),
    (PRETRAIN, "--weights model --tokenizer vocab.txt", "--tokenizer"),
    (PRETRAIN, "--dataset corpus.jsonl --weights few", "20"),
    (PRETRAIN, "--dataset corpus.jsonl --weights bare", ""),
    (PRETRAIN, "--dataset corpus.jsonl --streaming", "--tokenizer"),
    (PRETRAIN, "--dataset lines.jsonl --vocab-size 60", "rows_per_document"),
    (PRETRAIN, "--dataset no/such/file", ""),
    (PRETRAIN, "--dataset broken.jsonl", ""),
    (PRETRAIN, "--dataset latin.txt", ""),
    (PRETRAIN, "--dataset nulls.jsonl", "0 documents"),
    (PRETRAIN, "--tokenizer nomask.txt", ""),
    (PRETRAIN, "--device foo", ""),
    (PRETRAIN, "--out taken", ""),
    (PRETRAIN, "--resume", ""),
    (SST2, "--epochs 0", ""),
    (SST2, "--learning-rate 1e-3 inf", ""),
    (SST2, "--learning-rate --seed 1", "--learning-rate"),
    (SST2, "--max-seq-length 2", "--max-seq-length"),
    (SST2, "--weights model --max-seq-length 17", ""),
    (SST2, "--dataset labels.jsonl", ""),
    (SST2, "--test-dataset no/such/file", ""),
    (SST2, "--predict hello", "--weights"),
    (SST2, "--out taken", ""),
]


@pytest.mark.parametrize(("script", "line", "named"), WRONG)
def test_a_mistake_is_one_message_that_names_it_with_status_2_and_no_changed_file(
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


RIGHT = [
    (
        PRETRAIN,
        "--steps 2 --seed 3 --dataset corpus.jsonl --split train --text-column text"
        " --rows-per-document 2 --tokenizer vocab.txt --max-seq-length 16 --whole-word-masking"
        " --batch-size 2 --accumulate 2 --workers 0 --size tiny --positions 20 --dropout 0.2"
        " --learning-rate 0.002 --warmup-steps 2 --log-every 1 --eval-every 2 --save-every 1"
        " --device cpu --precision float32",
    ),
    (
        SST2,
        "--seeds 2 --seed 3 --dataset reviews --test-dataset reviews --tokenizer vocab.txt"
        " --max-seq-length 3 --size tiny --dropout 0.0 --batch-size 4 --epochs 1"
        " --learning-rate 0.001 0.002 --log-every 1 --device cpu --precision float32",
    ),
]


@pytest.mark.parametrize(("script", "line"), RIGHT)
def test_a_line_that_is_right_trains_with_what_it_says(script, line, run_line, tmp_path):
    out = tmp_path / "run"
    run_line(script, f"{line} --out {out}")
    losses = read_lines(out, "train")
    found = losses["mlm_loss" if script == PRETRAIN else "loss"]
    assert all(0 < loss < 10 for loss in found)
    assert (out / "model/config.json").exists()
    config = json.loads((out / "config.json").read_text())
    for flag, *values in (words.split() for words in line.split("--")[1:]):
        told = config[flag.replace("-", "_")]
        told = told if isinstance(told, list) else [told]
        assert [str(value) for value in told] == (values or ["True"])


@pytest.mark.parametrize("cls", [PretrainOptions, SST2Options])
def test_the_sizes_to_choose_from_are_the_published_ones(cls):
    assert set(get_args(get_type_hints(cls)["size"])) == SIZES.keys()


# ---- How a script ends --------------------------------------------------------------------------


@pytest.mark.parametrize("script", SCRIPTS)
def test_ctrl_c_while_a_run_is_prepared_ends_it_with_130_and_no_traceback(
    script, run_line, monkeypatch, tmp_path, capfd
):
    def interrupted(*_):
        raise KeyboardInterrupt

    for module in (train_pretrain, train_sst2):
        monkeypatch.setattr(module, "make_model", interrupted)
    with pytest.raises(SystemExit) as ended:
        run_line(script, f"--tokenizer vocab.txt --out {tmp_path}/run")
    assert ended.value.code == 130
    assert "Traceback" not in capfd.readouterr().err
    assert not (tmp_path / "run").exists()


class Broken(torch.utils.data.Dataset):
    def __getitem__(self, index):
        raise ValueError("row 7 is wrong")

    def __len__(self):
        return 1


def test_a_mistake_that_a_data_worker_finds_is_shown_without_its_traceback(monkeypatch, capsys):
    monkeypatch.setattr(torch.utils.data._utils, "MP_STATUS_CHECK_INTERVAL", 0.1)  # not 5 s
    monkeypatch.setattr(sys, "argv", ["script"])
    loader = torch.utils.data.DataLoader(Broken(), num_workers=1)
    with pytest.raises(SystemExit) as ended:
        run_script(lambda _: list(loader), PretrainOptions)
    assert ended.value.code == 2
    gc.collect()  # its worker ends here, not in another test
    assert capsys.readouterr().err.strip() == "error: ValueError: row 7 is wrong"


def test_our_own_error_keeps_its_traceback(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["script"])
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        run_script(lambda _: torch.ones(2, 3) @ torch.ones(2, 3), PretrainOptions)
