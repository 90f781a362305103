"""Four short runs whose losses are recorded: what is computed does not change unnoticed.

    PYTHONPATH=. python tests/test_golden.py      # records golden.json anew

Two take ten steps on batches that are written down below: weights are filled by NumPy, from the
name of each parameter, and nothing is dropped. Nothing is drawn, so these two hold the computation
alone: model, loss, gradients, clipping, schedule, optimizer.

Two are runs of the scripts on the sample: tiny, 30 steps. They cover everything between the text
and the loss: tokenizer, pairs, masks, order, initial weights and dropout, too.

All are in float32, with one thread. Rewriting code must not move these numbers. They may be renewed
only where a result is meant to change; then the commit and CHANGELOG.md say why.

Tolerance: another CPU sums in another order. On one CPU, with torch's kernels for SSE and for AVX2
and with one thread and two, these losses differ by 5e-6 of themselves at most; four times that is
allowed. What a change of the computation does, in the larger of the two runs: Adam's eps 1e-8 for
1e-6 0.3; LayerNorm's eps 1e-5 for 1e-12 7e-3; no weight decay 7e-4; GELU by a tanh 5e-5.
"""

import contextlib
import importlib.metadata
import io
import json
import re
import zlib
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import read_lines

import train_pretrain
from bert import BertConfig, BertPretrainModel, SST2BertModel
from train_pretrain import (
    PretrainLosses,
    PretrainOptions,
    add_gradients,
    count,
    learning_rate,
    make_optimizer,
    pretrain,
    to_device,
    update,
)
from train_sst2 import SST2Options, forward, main

GOLDEN = Path(__file__).with_name("golden.json")
TOLERANCE = 2e-5

# ---- Ten steps on written batches ------------------------------------------------

CONFIG = BertConfig(
    max_seq_length=12, vocab_size=40, d_model=16, attention_d_k=12, attention_d_v=8, head_num=2,
    d_feed_forward=24, encoder_layers=2, dropout=0.0, attention_dropout=0.0,
)  # fmt: skip
# [PAD] is 0, [CLS] 2, [SEP] 3, [MASK] 4. Two micro-batches of pairs, with 3 and 2 masked tokens.
PAIRS = [
    {
        "input_ids": [[2, 11, 4, 30, 3, 17, 8, 4, 3], [2, 39, 3, 4, 12, 3, 0, 0, 0]],
        "token_type_ids": [[0, 0, 0, 0, 0, 1, 1, 1, 1], [0, 0, 0, 1, 1, 1, 0, 0, 0]],
        "mlm_labels": [
            [-100, -100, 25, -100, -100, -100, -100, 9, -100],
            [-100, -100, -100, 31, -100, -100, -100, -100, -100],
        ],
        "nsp_labels": [0, 1],
    },
    {
        "input_ids": [[2, 7, 22, 4, 3, 5, 3], [2, 14, 14, 3, 28, 33, 3]],
        "token_type_ids": [[0, 0, 0, 0, 0, 1, 1], [0, 0, 0, 0, 1, 1, 1]],
        "mlm_labels": [
            [-100, -100, -100, 6, -100, -100, -100],
            [-100, 14, -100, -100, -100, -100, -100],
        ],
        "nsp_labels": [1, 0],
    },
]
REVIEWS = {
    "input_ids": [[2, 20, 21, 22, 23, 3], [2, 9, 35, 3, 0, 0], [2, 16, 5, 27, 3, 0]],
    "labels": [1, 0, 1],
}
STEPS, WARMUP, PEAK = 10, 2, 1e-2


def fill(model: torch.nn.Module) -> None:
    """Gives each parameter numbers that depend on its name and shape alone."""
    for name, parameter in model.named_parameters():
        rng = np.random.default_rng(zlib.crc32(name.encode()))
        numbers = rng.normal(scale=0.1, size=parameter.shape)
        if "norm.weight" in name:
            numbers += 1
        parameter.data = torch.tensor(numbers, dtype=torch.float32)


def fingerprints(tensors: dict[str, torch.Tensor]) -> list[float]:
    """Returns a number for each tensor that depends on each of its elements and their order.

    The bias of the keys is left out. It adds the same number to all scores of a query, so its
    gradient is zero, and what Adam makes of its rounding errors differs between CPUs.
    """
    found = []
    for name in sorted(name for name in tensors if not name.endswith("key.bias")):
        weights = np.random.default_rng(zlib.crc32(name.encode())).normal(size=tensors[name].shape)
        found.append(float((tensors[name].double().numpy() * weights).sum()))
    return found


def ten_steps(model: torch.nn.Module, add_gradients_of_a_step) -> dict[str, list[float]]:
    """Returns the losses and gradient norms of ten steps, and fingerprints of the first gradients
    and of the last weights.
    """
    fill(model)
    optimizer = make_optimizer(model)
    losses: list[float] = []
    norms: list[float] = []
    gradients: list[float] = []
    for step in range(STEPS):
        losses.append(sum(add_gradients_of_a_step()))
        if step == 0:
            gradients = fingerprints({n: p.grad for n, p in model.named_parameters()})
        rate = learning_rate(step, PEAK, WARMUP, STEPS)
        norms.append(update(model, optimizer, rate).item())
    weights = fingerprints({n: p.detach() for n, p in model.named_parameters()})
    return {"losses": losses, "norms": norms, "first gradients": gradients, "weights": weights}


def golden_pretraining_steps(out: Path) -> dict[str, list[float]]:
    model = BertPretrainModel(CONFIG, 0)
    batches = [{n: torch.tensor(v) for n, v in batch.items()} for batch in PAIRS]
    masked, pairs, _ = count(batches, model.padding_idx)
    ready = [to_device(batch, torch.device("cpu")) for batch in batches]

    def add_gradients_of_a_step() -> list[float]:
        return add_gradients(PretrainLosses(model), ready, masked, pairs).tolist()

    return ten_steps(model, add_gradients_of_a_step)


def golden_fine_tuning_steps(out: Path) -> dict[str, list[float]]:
    model = SST2BertModel(CONFIG, 0)
    batch = {n: torch.tensor(v) for n, v in REVIEWS.items()}

    def add_gradients_of_a_step() -> list[float]:
        loss = F.cross_entropy(forward(model, batch["input_ids"]), batch["labels"])
        loss.backward()
        return [loss.item()]

    return ten_steps(model, add_gradients_of_a_step)


# ---- Runs of the scripts -----------------------------------------------------


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


RUNS = {
    "pretraining steps": golden_pretraining_steps,
    "fine-tuning steps": golden_fine_tuning_steps,
    "pretraining": golden_pretraining,
    "fine-tuning": golden_fine_tuning,
}
LOSSES = {
    "pretraining": "training mlm_loss",
    "fine-tuning": "training loss",
}


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


def has_constrained_versions() -> bool:
    """Returns whether every library that takes part is of the version in constraints.txt."""
    text = GOLDEN.parents[1].joinpath("constraints.txt").read_text()
    versions = dict(re.findall(r"^([\w-]+)==([\w.]+)$", text, re.M))
    names = ("torch", "numpy", "tokenizers", "datasets")
    return all(importlib.metadata.version(name).split("+")[0] == versions[name] for name in names)


@pytest.mark.slow
@pytest.mark.parametrize("run", RUNS)
def test_a_golden_run_has_its_recorded_losses(run, tmp_path):
    """With other versions of the libraries it runs, and learns, without the numbers."""
    found = losses_of(run, tmp_path / "run")
    expected = json.loads(GOLDEN.read_text())[run]
    assert {name: len(losses) for name, losses in found.items()} == {
        name: len(losses) for name, losses in expected.items()
    }
    of_training = found[LOSSES.get(run, "losses")]
    assert of_training[-1] < of_training[0]
    if has_constrained_versions():
        for name, losses in found.items():
            assert losses == pytest.approx(expected[name], rel=TOLERANCE, abs=1e-6), name


if __name__ == "__main__":
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        golden = {run: losses_of(run, Path(folder) / run) for run in RUNS}
    GOLDEN.write_text(json.dumps(golden, indent=1) + "\n")
