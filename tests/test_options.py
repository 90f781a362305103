"""Options and data as a person gets them wrong: one message, exit status 2, and no changed file.
Lines that are right train. What is no mistake of a person keeps its traceback.
"""

import gc
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import get_args, get_type_hints

import pytest
import torch
from helpers import ROOT, contents, read_lines, run_in_process
from strategies import write_mistakes, write_reviews

import train_pretrain
import train_sst2
from bert import SIZES
from train_pretrain import PretrainOptions, pretrain, run_script
from train_sst2 import SST2Options, main

SCRIPTS = {"train_pretrain.py": (pretrain, PretrainOptions), "train_sst2.py": (main, SST2Options)}


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


# ---- Lines that are wrong -----------------------------------------------------------------------

# A flag and a value that it never has: the message names both.
WRONG_VALUES = {
    "train_pretrain.py": """
        --steps -1, --steps x, --seed -1, --rows-per-document 0, --vocab-size 0, --batch-size 0,
        --batch-size 1.5, --accumulate 0, --workers -1, --size huge, --dropout 1, --dropout -0.1,
        --dropout nan, --learning-rate 0, --learning-rate nan, --learning-rate inf,
        --warmup-steps -1, --warmup-steps 4001, --log-every 0, --eval-every 0, --save-every 0,
        --device foo, --precision float16, --bathc-size 8, --out taken
    """,
    "train_sst2.py": """
        --seeds 0, --seed -5, --vocab-size 0, --size huge, --dropout 1, --dropout nan,
        --batch-size 0, --epochs 0, --learning-rate 0, --learning-rate 1e-3 inf, --log-every 0,
        --device foo, --precision float16, --no-such-flag 1, --out taken
    """,
}
# Files that are wrong, or are not there: the message names the file.
WRONG_FILES = {
    "train_pretrain.py": """
        --tokenizer none.txt, --tokenizer nomask.txt, --weights corpus.jsonl,
        --dataset no/such/file, --dataset nothing, --dataset empty.jsonl,
        --dataset broken.jsonl, --dataset latin.txt,
        --dataset corpus.jsonl --weights bare
    """,
    "train_sst2.py": """
        --tokenizer none.txt, --weights no/such, --dataset no/such/file, --dataset corpus.jsonl,
        --dataset labels.jsonl, --dataset two.jsonl, --dataset words.jsonl,
        --dataset wordless.jsonl, --test-dataset no/such/file, --test-dataset labels.jsonl
    """,
}
# Whatever else does not go together, and what the message names.
WRONG_TOGETHER = [
    ("train_pretrain.py", "--resume", "--resume"),
    ("train_pretrain.py", "--steps 8 --warmup-steps 9", "--warmup-steps 9"),
    ("train_pretrain.py", "--max-seq-length 4", "4"),
    ("train_pretrain.py", "--positions -3", "-3"),
    ("train_pretrain.py", "--dataset body.jsonl", "body.jsonl"),
    ("train_pretrain.py", "--dataset numbers.jsonl", "int"),
    ("train_pretrain.py", "--dataset latin.jsonl", "latin.jsonl"),
    ("train_pretrain.py", "--dataset nulls.jsonl", "0 documents"),
    ("train_pretrain.py", "--dataset one.jsonl", "1 documents"),
    ("train_pretrain.py", "--dataset lines.jsonl --vocab-size 60", "rows_per_document"),
    ("train_pretrain.py", "--dataset corpus.jsonl --vocab-size 9", "vocab_size 9"),
    ("train_pretrain.py", "--dataset corpus.jsonl --weights few", "20"),
    ("train_pretrain.py", "--weights model --max-seq-length 17", "--max-seq-length 17"),
    ("train_pretrain.py", "--positions 9 --max-seq-length 16", "--positions"),
    ("train_pretrain.py", "--dataset corpus.jsonl --streaming", "--tokenizer"),
    ("train_sst2.py", "--max-seq-length 2", "--max-seq-length"),
    ("train_sst2.py", "--weights model --max-seq-length 17", "--max-seq-length 17"),
    ("train_sst2.py", "--weights few --dataset reviews", "20"),
    ("train_sst2.py", "--test-dataset latin_test", "latin_test"),
    ("train_sst2.py", "--predict hello", "--weights"),
    ("train_sst2.py", "--learning-rate --seed 1", "--learning-rate"),
]


def mistakes() -> list[tuple[str, str, list[str]]]:
    """Returns all of them: script, command line, words of the message."""
    found = [(script, line, [named]) for script, line, named in WRONG_TOGETHER]
    for table, names_flag in ((WRONG_VALUES, True), (WRONG_FILES, False)):
        for script, lines in table.items():
            for line in lines.split(","):
                flag, *_, value = line.split()
                found.append((script, line.strip(), [flag, value] if names_flag else [value]))
    return found


@pytest.mark.parametrize(("script", "line", "named"), mistakes())
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
    message = ours[0] if ours else printed
    assert all(word in message for word in named), message
    assert "Traceback" not in printed
    assert (set(folder.glob("**/*")), contents(folder)) == (paths, files)


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS)
def test_a_person_sees_one_line_and_no_traceback(script, folder, tmp_path):
    line = (str(ROOT / script), "--dataset", "no/such/file")
    status, printed = run_in_process(tmp_path / "output", *line, cwd=folder)
    assert status == 2
    (line,) = printed.strip().splitlines()
    assert line.startswith("error: ")
    assert "no/such/file" in line


# ---- Lines that are right -----------------------------------------------------------------------

RIGHT = [
    (
        "train_pretrain.py",
        "--steps 2 --seed 3 --dataset corpus.jsonl --split train --text-column text"
        " --rows-per-document 2 --tokenizer vocab.txt --max-seq-length 16 --whole-word-masking"
        " --batch-size 2 --accumulate 2 --workers 0 --size tiny --positions 20 --dropout 0.2"
        " --learning-rate 0.002 --warmup-steps 2 --log-every 1 --eval-every 2 --save-every 1"
        " --device cpu --precision float32",
    ),
    ("train_pretrain.py", "--steps 1 --dataset corpus.jsonl --weights model --max-seq-length 5"),
    ("train_pretrain.py", "--steps 1 --dataset corpus.jsonl --vocab-size 60 --warmup-steps 0"),
    (
        "train_sst2.py",
        "--seeds 2 --seed 3 --dataset reviews --test-dataset reviews --tokenizer vocab.txt"
        " --max-seq-length 3 --size tiny --dropout 0.0 --batch-size 4 --epochs 1"
        " --learning-rate 0.001 0.002 --log-every 1 --device cpu --precision float32",
    ),
    ("train_sst2.py", "--dataset reviews --weights model --epochs 1 --log-every 1"),
]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("script", "line"), RIGHT)
def test_a_line_that_is_right_trains_with_what_it_says(script, line, run_line, tmp_path):
    out = tmp_path / "run"
    run_line(script, f"{line} --out {out}")
    losses = read_lines(out, "train")
    found = losses["mlm_loss" if script == "train_pretrain.py" else "loss"]
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


def end_of(work: Callable, monkeypatch) -> int:
    """Returns the exit status of a script that does this."""
    monkeypatch.setattr(sys, "argv", ["script"])
    with pytest.raises(SystemExit) as ended:
        run_script(work, PretrainOptions)
    return ended.value.code


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


@pytest.mark.slow
def test_a_mistake_that_a_data_worker_finds_is_shown_without_its_traceback(monkeypatch, capsys):
    monkeypatch.setattr(torch.utils.data._utils, "MP_STATUS_CHECK_INTERVAL", 0.1)  # not 5 s
    loader = torch.utils.data.DataLoader(Broken(), num_workers=1)
    assert end_of(lambda _: list(loader), monkeypatch) == 2
    gc.collect()  # its worker ends here, not in another test
    assert capsys.readouterr().err.strip() == "error: ValueError: row 7 is wrong"


def test_the_death_of_a_data_worker_is_a_message_that_names_workers(monkeypatch, capsys):
    def told_by_torch(_):
        raise RuntimeError("DataLoader worker (pid 1) is killed by signal: Killed. ")

    assert end_of(told_by_torch, monkeypatch) == 2
    assert "fewer --workers" in capsys.readouterr().err


def test_our_own_error_keeps_its_traceback(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["script"])
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        run_script(lambda _: torch.ones(2, 3) @ torch.ones(2, 3), PretrainOptions)
