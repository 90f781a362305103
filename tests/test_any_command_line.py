"""Any command line, valid or not: a run starts, or one message says what is wrong and no file has
changed.

hypothesis draws the flags and their values. Training is left out, but in the last test.
"""

import contextlib
import io
import json
import shutil
from pathlib import Path
from unittest import mock

import pytest
from helpers import contents
from hypothesis import event, given, settings
from hypothesis import strategies as st
from strategies import write_mistakes, write_reviews

import train_pretrain
import train_sst2
from support.command_line import run_script
from train_pretrain import PretrainOptions, pretrain
from train_sst2 import SST2Options, main


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """One of everything that can be wrong, a small model, and sentences with labels."""
    folder = write_mistakes(tmp_path_factory.mktemp("lines"))
    write_reviews(folder / "reviews", train=9, validation=5, test=5)
    return folder


# ---- Lines --------------------------------------------------------------------------------------

# Of a flag: values that are right, at least with some others, and values that never are.
COUNT = (["1", "2", "3"], ["0", "-1", "x", "1.5", "", str(10**30)])
SIZE = (["1", "2", "7"], ["0", "-1", "1000001", "inf"])
STEP = (["0", "1", "2"], ["-1", "3", str(2**63), "nan"])
SEED = (["0", "1", str(2**40)], ["-1", str(2**63), "1e3"])
DROPOUT = (["0", "0.1", "0.99"], ["1", "-0.1", "nan"])
RATE = (["0", "1e-3"], ["-1", "nan", "inf", "1e400"])
MODEL = (["model"], ["few", "bare", "no/such", "vocab.txt", "", "."])
TOKENIZER = (
    ["vocab.txt", "model", "model/tokenizer.json"],
    ["nomask.txt", "none.txt", "bare/x", ""],
)
DEVICE = (["cpu"], ["foo", "cuda:99", "", "cpu:x", "meta"])
OUT = (["new", "new/below", "nothing"], ["taken", "corpus.jsonl", "taken/metrics.jsonl", ""])
PRECISION = (["auto", "float32", "bfloat16"], ["float16", ""])
NAME = (["default"], ["other", ""])

PRETRAIN = {
    "--out": OUT,
    "--steps": (["2"], ["-1", "x", str(2**63)]),
    "--seed": SEED,
    "--dataset": (
        ["corpus.jsonl", "corpus.jsonl", "sample"],
        ["body.jsonl", "one.jsonl", "lines.jsonl", "nothing", "broken.jsonl", "latin.jsonl", ".",
         "latin.txt", "no/such/file", "", "model", "vocab.txt", "numbers.jsonl", "nulls.jsonl"],
    ),
    "--dataset-name": NAME,
    "--split": (
        ["train", "train[:50%]", "train[3:]", "train+train"],
        ["train[:0]", "validation", "none", "", "train[", "train[:x]", "train+", "all"],
    ),
    "--text-column": (["text"], ["body", "", "text,text"]),
    "--rows-per-document": (["1", "2", "3"], ["0", "26", "100000", "-2", "x"]),
    "--vocab-size": (["60", "2000"], ["0", "9", "1000001", "-1"]),
    "--max-seq-length": (["5", "16"], ["4", "0", "1000001", "x"]),
    "--batch-size": SIZE,
    "--accumulate": SIZE,
    "--workers": (["0"], ["-1", "x", "1000001"]),
    "--size": (["tiny"], ["huge", "", "TINY"]),
    "--weights": MODEL,
    "--tokenizer": TOKENIZER,
    "--positions": (["16", "64"], ["0", "4", "1000001"]),
    "--dropout": DROPOUT,
    "--learning-rate": RATE,
    "--warmup-steps": STEP,
    "--log-every": COUNT,
    "--eval-every": COUNT,
    "--eval-batches": COUNT,
    "--save-every": COUNT,
    "--export-steps": STEP,
    "--device": DEVICE,
    "--precision": PRECISION,
}  # fmt: skip
SST2 = {
    "--out": OUT,
    "--predict": (["a b"], []),
    "--seeds": (["1", "2"], ["0", "-1", "1000001"]),
    "--seed": SEED,
    "--dataset": (
        ["reviews", "reviews", "sample"],
        ["labels.jsonl", "two.jsonl", "words.jsonl", "wordless.jsonl", "corpus.jsonl", "nothing",
         "broken.jsonl", "no/such", "", ".", "empty.jsonl"],
    ),
    "--dataset-name": NAME,
    "--test-dataset": (["reviews", "sample"], ["labels.jsonl", "no/such", ""]),
    "--tokenizer": TOKENIZER,
    "--vocab-size": (["60", "2000"], ["0", "9", "1000001", "-1"]),
    "--max-seq-length": (["3", "16"], ["2", "0", "1000001", "x"]),
    "--weights": MODEL,
    "--size": (["tiny"], ["huge", "", "TINY"]),
    "--dropout": DROPOUT,
    "--batch-size": SIZE,
    "--epochs": (["1", "2"], ["0", "-1", "x"]),
    "--learning-rate": RATE,
    "--log-every": COUNT,
    "--device": DEVICE,
    "--precision": PRECISION,
}  # fmt: skip
SCRIPTS = {
    "train_pretrain.py": (pretrain, PretrainOptions, PRETRAIN),
    "train_sst2.py": (main, SST2Options, SST2),
}
# What keeps a run small, where a line says nothing else.
SMALL = {
    "train_pretrain.py": {
        "--dataset": "corpus.jsonl", "--tokenizer": "vocab.txt", "--max-seq-length": "16",
        "--batch-size": "2", "--steps": "2", "--eval-batches": "1", "--workers": "0",
    },
    "train_sst2.py": {
        "--dataset": "reviews", "--tokenizer": "vocab.txt", "--max-seq-length": "16",
        "--learning-rate": "1e-3",
    },
}  # fmt: skip


def test_every_flag_is_drawn():
    """But these, which have no value or need another run, and tests of their own."""
    for _, cls, values in SCRIPTS.values():
        flags = {f"--{name.replace('_', '-')}" for name in cls.__dataclass_fields__}
        others = {"--resume", "--streaming", "--whole-word-masking", "--compile"}
        assert flags - values.keys() <= others | {"--checkpoint-activations"}
        assert values.keys() <= flags


@st.composite
def lines(draw: st.DrawFn, script: str, mistakes: bool = True) -> list[str]:
    """Draws a command line: up to eight flags, of which up to two have a wrong value."""
    values = SCRIPTS[script][2]
    chosen = draw(st.lists(st.sampled_from(sorted(values)), unique=True, max_size=8))
    wrong = draw(st.sets(st.sampled_from(chosen), max_size=2)) if chosen and mistakes else set()
    line = {**SMALL[script], "--out": "new"}
    for flag in chosen:
        right, never = values[flag]
        line[flag] = draw(st.sampled_from(never if flag in wrong and never else right))
    if not mistakes and line["--dataset"] == "sample":  # which would be trained on
        line["--dataset"] = SMALL[script]["--dataset"]
    switches = [
        flag
        for flag in ("--whole-word-masking", "--checkpoint-activations")
        if script == "train_pretrain.py" and draw(st.booleans())
    ]
    return [word for pair in line.items() for word in pair] + switches


# ---- What becomes of them -----------------------------------------------------------------------


class ReachedTraining(BaseException):
    """Raised in place of training."""


def run_line(folder: Path, script: str, line: list[str]) -> tuple[int | None, str]:
    """Runs a line in a folder. Returns its exit status, None if it got to training or to its end,
    and what it printed as errors.
    """
    function, cls, _ = SCRIPTS[script]
    errors = io.StringIO()
    with (
        contextlib.chdir(folder),
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(errors),
    ):
        try:
            run_script(function, cls, line)
        except ReachedTraining:
            return None, ""
        except SystemExit as ended:
            return ended.code, errors.getvalue()
    return None, ""


def count_messages(errors: str) -> int:
    """Counts our own, and tyro's, of wrong flags and values."""
    ours = [text for text in errors.splitlines() if text.startswith("error: ")]
    return len(ours) + errors.count("For full helptext")


def remove_what_was_made(folder: Path, before: set[Path]) -> None:
    for path in sorted(set(folder.glob("**/*")) - before):
        if path.is_dir():
            shutil.rmtree(path)
        elif path.exists():
            path.unlink()


@pytest.mark.slow
@pytest.mark.parametrize("script", list(SCRIPTS))
@given(st.data())
@settings(max_examples=60)
def test_any_line_starts_a_run_or_ends_in_one_message_and_no_changed_file(folder, script, data):
    line = data.draw(lines(script))
    files, paths = contents(folder), set(folder.glob("**/*"))
    reached = mock.Mock(side_effect=ReachedTraining)
    with (
        mock.patch.object(train_pretrain, "train", reached),
        mock.patch.object(train_sst2, "fine_tune", reached),
    ):
        status, errors = run_line(folder, script, line)
    event("rejected" if status else "accepted")
    try:
        if status is not None:
            assert status == 2
            assert "Traceback" not in errors
            assert count_messages(errors) == 1, errors
            assert contents(folder) == files  # but a new --out may be there, with its lock
    finally:
        remove_what_was_made(folder, paths)


@pytest.mark.slow
@pytest.mark.parametrize("script", list(SCRIPTS))
@given(st.data())
@settings(max_examples=12)
def test_a_line_that_is_accepted_trains_with_finite_numbers_or_says_that_it_cannot(
    folder, script, data
):
    line = data.draw(lines(script, mistakes=False))
    paths = set(folder.glob("**/*"))
    status, errors = run_line(folder, script, line)
    event("rejected" if status else "accepted")
    try:
        if status is not None:
            assert (status, count_messages(errors)) == (2, 1)
            return
        out = folder / line[line.index("--out") + 1]
        lines_of_run = (out / "metrics.jsonl").read_text().splitlines()
        assert lines_of_run
        assert not any(None in json.loads(text).values() for text in lines_of_run)  # not finite
    finally:
        remove_what_was_made(folder, paths)
