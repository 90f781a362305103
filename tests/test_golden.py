"""Two short runs with recorded losses, so that the computation does not change unnoticed.

    PYTHONPATH=. python tests/test_golden.py      # records golden.json anew

They run the two scripts on the sample, with size tiny, in float32 and with one thread. They cover
everything between the text and the loss: tokenizer, pairs, masks, order, initial weights, dropout,
model, gradients, clipping, schedule, optimizer. Refactoring must not change these numbers. Record
them anew only where a result is meant to change; the commit and CHANGELOG.md then say why.

Tolerance: another CPU sums in another order. On one CPU, with torch's kernels for SSE and for AVX2
and with one thread and two, these losses differ by at most 5e-6 of their value; four times that is
allowed. By comparison, relative changes in a run of this size: 0.3 from Adam's eps 1e-8 instead of
1e-6; 7e-3 from LayerNorm's eps 1e-5 instead of 1e-12; 7e-4 from no weight decay; 5e-5 from GELU
with tanh.
"""

import contextlib
import importlib.metadata
import io
import json
import re
from pathlib import Path
from unittest import mock

import pytest
import torch
from helpers import read_lines

import train_pretrain
from train_pretrain import PretrainOptions, pretrain
from train_sst2 import SST2Options, main

GOLDEN = Path(__file__).with_name("golden.json")
TOLERANCE = 2e-5


def golden_pretraining(out: Path) -> dict[str, list[float]]:
    options = PretrainOptions(
        out=str(out), steps=30, batch_size=8, max_seq_length=32, eval_every=15, log_every=1,
        workers=0, precision="float32", device="cpu",
    )  # fmt: skip
    with mock.patch.object(train_pretrain, "EVALUATION_BATCHES", 4):
        pretrain(options)
    train, validation = read_lines(out, "train"), read_lines(out, "validation")
    return {
        "training mlm_loss": train["mlm_loss"],
        "training nsp_loss": train["nsp_loss"],
        "validation mlm_loss": validation["mlm_loss"],
        "validation nsp_loss": validation["nsp_loss"],
        "unigram_entropy": validation["unigram_entropy"][:1],
    }


def golden_fine_tuning(out: Path) -> dict[str, list[float]]:
    options = SST2Options(
        out=str(out), batch_size=40, epochs=3, learning_rate=(2e-3,), log_every=1,
        precision="float32", device="cpu",
    )  # fmt: skip
    main(options)
    train, validation = read_lines(out, "train"), read_lines(out, "validation")
    return {"training loss": train["loss"], "validation loss": validation["loss"]}


RUNS = {"pretraining": golden_pretraining, "fine-tuning": golden_fine_tuning}


def losses_of(run: str, out: Path) -> dict[str, list[float]]:
    """Returns a golden run's losses, computed by one thread, to six digits."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            found = RUNS[run](out)
    finally:
        torch.set_num_threads(threads)
    return {name: [float(f"{loss:.6g}") for loss in losses] for name, losses in found.items()}


def other_versions() -> list[str]:
    """Returns the libraries that take part and have another version than in constraints.txt."""
    text = GOLDEN.parents[1].joinpath("constraints.txt").read_text()
    recorded = dict(re.findall(r"^([\w-]+)==([\w.]+)$", text, re.M))
    names = ("torch", "numpy", "tokenizers", "datasets")
    here = {name: importlib.metadata.version(name).split("+")[0] for name in names}
    return [f"{name} {here[name]}" for name in names if here[name] != recorded[name]]


@pytest.mark.slow
@pytest.mark.parametrize("run", RUNS)
def test_a_golden_run_has_its_recorded_losses(run, tmp_path):
    """With other library versions, pretraining only has to learn; losses are not compared."""
    found = losses_of(run, tmp_path / "run")
    expected = json.loads(GOLDEN.read_text())[run]
    if run == "pretraining":
        assert found["training mlm_loss"][-1] < found["training mlm_loss"][0]
    if other_versions():
        pytest.skip(f"not recorded with {', '.join(other_versions())}")
    for name, losses in found.items():
        assert losses == pytest.approx(expected[name], rel=TOLERANCE, abs=1e-6), name


if __name__ == "__main__":
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        golden = {run: losses_of(run, Path(folder) / run) for run in RUNS}
    GOLDEN.write_text(json.dumps(golden, indent=1) + "\n")
