"""`make afternoon`: make runs what is not there yet, and the tables are computed from the lines."""

import subprocess
from pathlib import Path

import datasets
import pytest
from helpers import ROOT
from strategies import write_rows

from experiments import afternoon, prepare


def commands_of(folder: Path) -> str:
    """Returns what make would run for an afternoon in this folder."""
    line = ["make", "-n", "-o", ".venv/ready", "afternoon", f"AFTERNOON={folder}"]
    return subprocess.run(line, cwd=ROOT, capture_output=True, text=True, check=True).stdout


def test_make_runs_what_is_not_finished_and_nothing_else(tmp_path):
    assert commands_of(tmp_path).count("train_sst2.py") == 6
    for finished in (
        "reviews/train.parquet",
        "pretrain/model/config.json",
        "scratch-all/metrics.jsonl",
    ):
        (tmp_path / finished).parent.mkdir(parents=True)
        (tmp_path / finished).touch()
    (tmp_path / "scratch-tenth.part").mkdir()  # one that was interrupted
    left = commands_of(tmp_path)
    assert "train_pretrain.py" not in left
    assert left.count("train_sst2.py") == 5
    assert f"rm -rf {tmp_path}/scratch-tenth.part" in left


def test_a_fresh_folder_is_prepared_before_it_is_read(tmp_path):
    commands = commands_of(tmp_path)
    steps = ("prepare reviews", "train_pretrain.py", "train_sst2.py", "experiments.afternoon")
    places = [commands.index(step) for step in steps]
    assert places == sorted(places)
    for share in ("all", "tenth", "hundredth"):
        prepared = commands.index(f"{tmp_path}/sst2-{share}.part {tmp_path}/sst2-{share}")
        assert prepared < commands.index(f"--dataset {tmp_path}/sst2-{share}")


# ---- Data ---------------------------------------------------------------------------------------


def test_line_breaks_of_html_become_line_breaks_and_nothing_else_changes(tmp_path):
    texts = {
        "train": "One.<br /><br />Two <b>is</b> here.",
        "validation": "Three.",
        "test": "Four.",
    }
    for split, text in texts.items():
        write_rows(tmp_path / "raw" / f"{split}.jsonl", [{"text": text, "label": 0}])
    prepare.reviews(str(tmp_path / "raw"), str(tmp_path / "clean"))
    cleaned = datasets.load_dataset(str(tmp_path / "clean"))
    assert {name: list(split) for name, split in cleaned.items()} == {
        "train": [{"text": "One.\n\nTwo <b>is</b> here."}],
        "validation": [{"text": "Three."}],
    }


def test_every_tenth_sentence_keeps_its_label_and_validation_stays_whole(tmp_path):
    sentences = [{"sentence": f"s {i}", "label": i % 2} for i in range(25)]
    for split in ("train", "validation"):
        write_rows(tmp_path / "sst2" / f"{split}.jsonl", sentences)
    prepare.fewer(str(tmp_path / "sst2"), "10", str(tmp_path / "tenth"))
    tenth = datasets.load_dataset(str(tmp_path / "tenth"))
    assert list(tenth["train"]) == [sentences[0], sentences[10], sentences[20]]
    assert list(tenth["validation"]) == sentences


# ---- What it has shown --------------------------------------------------------------------------


def test_the_learning_rate_is_chosen_by_the_mean_of_the_seeds_and_not_by_the_best_one(tmp_path):
    accuracies = {
        (1e-4, 0): [0.5, 0.96],  # a lucky seed
        (1e-4, 1): [0.5, 0.5],
        (3e-4, 0): [0.8, 0.5],
        (3e-4, 1): [0.7, 0.78],
    }
    rows = [
        {"split": "validation", "learning_rate": rate, "seed": seed, "accuracy": accuracy}
        for (rate, seed), of_epochs in accuracies.items()
        for accuracy in of_epochs
    ]
    write_rows(tmp_path / "metrics.jsonl", rows)
    assert afternoon.at_best_rate(tmp_path) == pytest.approx([80, 78])
