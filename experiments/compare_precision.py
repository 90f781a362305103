"""Trains with each precision, and with three seeds in float32, to compare the curves of the loss.

    python -m experiments.compare_precision      # adds lines to results/precision.jsonl

Tiny on the sample, 300 steps. With one seed, all precisions see the same batches and dropout.
"""

import contextlib
import io
import json
import tempfile
from pathlib import Path


import torch

from support.curves import read_lines
from support.devices import Precision
from train_pretrain import PretrainOptions, pretrain

LINES = Path(__file__).parents[1] / "results/precision.jsonl"
RUNS: list[tuple[Precision, int]] = [
    ("float32", 0),
    ("float32", 1),
    ("float32", 2),
    ("medium", 0),
    ("bfloat16", 0),
]


def main() -> None:
    for precision, seed in RUNS:
        with tempfile.TemporaryDirectory() as out, contextlib.redirect_stdout(io.StringIO()):
            options = PretrainOptions(
                out=out, steps=300, batch_size=16, max_seq_length=32, learning_rate=2e-3,
                log_every=1, eval_every=300, save_every=300, workers=0, precision=precision,
                seed=seed, device="cpu",
            )  # fmt: skip
            pretrain(options)
            train = read_lines(Path(out), "train")
        line = {
            "precision": precision, "seed": seed, "threads": torch.get_num_threads(),
            "seconds": round(train["seconds"][-1]),
            "mlm_loss": [round(loss, 4) for loss in train["mlm_loss"]],
        }  # fmt: skip
        with LINES.open("a") as file:
            file.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main()
