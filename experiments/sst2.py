"""SST-2 from scratch at three learning rates.

    python train_sst2.py --dataset stanfordnlp/sst2 --tokenizer google-bert/bert-base-uncased \
        --size tiny --max-seq-length 128 --learning-rate 5e-5 1e-5 1e-6 --epochs 6 --out runs/rates
    cp runs/rates/metrics.jsonl experiments/sst2.jsonl
    python -m experiments.sst2    # draws sst2.png
"""

from typing import Any

import numpy as np

from experiments.curves import HERE, means_of_seeds, new_figure

LINES = HERE / "sst2.jsonl"


def smooth(steps: list[int], values: list[float], points: int = 60) -> tuple[list, list]:
    """Returns the means of neighbouring values, so that at most about so many are left."""
    size = max(1, len(steps) // points)
    starts = range(0, len(steps), size)
    groups = [values[start : start + size] for start in starts]
    ends = [steps[start : start + size][-1] for start in starts]
    return ends, [np.mean(group) for group in groups]


def draw() -> Any:
    figure = new_figure((11, 4.2))
    loss, accuracy = figure.subplots(1, 2)
    for i, rate in enumerate((5e-5, 1e-5, 1e-6)):
        style = {"color": f"C{i}", "label": f"learning rate {rate:g}"}
        steps, means = means_of_seeds(LINES, "train", "loss", rate)
        loss.plot(*smooth(steps, means), color=f"C{i}", alpha=0.35)
        steps, means = means_of_seeds(LINES, "validation", "loss", rate)
        loss.plot(steps, means, **style)
        steps, means = means_of_seeds(LINES, "validation", "accuracy", rate)
        accuracy.plot(steps, means, **style)
    loss.set(xlabel="step", ylabel="loss, nats", title="from scratch: training (pale) and dev")
    accuracy.set(xlabel="step", ylabel="dev accuracy", title="from scratch")
    accuracy.legend(fontsize=8)
    return figure


if __name__ == "__main__":
    draw().savefig(HERE / "sst2.png", dpi=110)
