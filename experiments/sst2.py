"""SST-2 from scratch at three learning rates.

    python train_sst2.py --dataset stanfordnlp/sst2 --tokenizer google-bert/bert-base-uncased \
        --size tiny --max-seq-length 128 --learning-rate 5e-5 1e-5 1e-6 --epochs 6 --out runs/rates
    cp runs/rates/metrics.jsonl experiments/sst2.jsonl
    python -m experiments.sst2    # draws sst2.png
"""

from typing import Any

import numpy as np

from experiments.curves import HERE, new_figure, read_lines

LINES = HERE / "sst2.jsonl"
POINTS = 60  # of a training curve, each the mean of its neighbors


def draw() -> Any:
    figure = new_figure((11, 4.2))
    loss, accuracy = figure.subplots(1, 2)
    for i, rate in enumerate((5e-5, 1e-5, 1e-6)):
        training = read_lines(LINES, split="train", learning_rate=rate)
        dev = read_lines(LINES, split="validation", learning_rate=rate)
        color = f"C{i}"
        steps = [part[-1] for part in np.array_split(training["step"], POINTS)]
        means = [part.mean() for part in np.array_split(training["loss"], POINTS)]
        loss.plot(steps, means, color, alpha=0.35)
        loss.plot(dev["step"], dev["loss"], color)
        accuracy.plot(dev["step"], dev["accuracy"], color, label=f"learning rate {rate:g}")
    loss.set(xlabel="step", ylabel="loss, nats", title="from scratch; pale: training, else dev")
    accuracy.set(xlabel="step", ylabel="dev accuracy", title="accuracy on dev")
    accuracy.legend(fontsize=8)
    return figure


if __name__ == "__main__":
    draw().savefig(HERE / "sst2.png", dpi=110)
