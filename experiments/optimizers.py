"""AdamW or Muon, at which learning rate? Short runs on film reviews, each followed by SST-2.

python -m experiments.optimizers    # prints a table, draws optimizers.png, from the recorded lines
"""

from pathlib import Path
from typing import Any

import numpy as np

from experiments.curves import HERE, best_accuracies, mean_and_deviation, new_figure, read_lines

RUNS = ("adamw-1e-3", "muon-1e-3", "muon-2e-3")
STEPS = (250, 500, 1000, 1500, 2000, 2500)


def folders_of(run: str) -> list[Path]:
    """Returns a folder for each seed of pretraining."""
    return sorted((HERE / "optimizers").glob(f"{run}-*"))


def table() -> list[str]:
    """Returns the rows of a table: of each seed, the MLM loss by steps, and SST-2."""
    rows = [f"| optimizer, rate, seed | {' | '.join(map(str, STEPS))} | SST-2 dev accuracy, % |"]
    rows.append(f"|---|{'---|' * len(STEPS)}---|")
    for run in RUNS:
        for folder in folders_of(run):
            lines = read_lines(folder / "pretrain.jsonl", split="validation")
            losses = [f"{lines['mlm_loss'][lines['step'] == step].item():.2f}" for step in STEPS]
            accuracy = mean_and_deviation(best_accuracies(folder / "sst2.jsonl"))
            rows.append(f"| {folder.name} | {' | '.join(losses)} | {accuracy} |")
    return rows


def draw() -> Any:
    """Draws the loss of every run, and SST-2 beside the loss at its end."""
    figure = new_figure((11, 4.2))
    curves, points = figure.subplots(1, 2)
    for i, run in enumerate(RUNS):
        for j, folder in enumerate(folders_of(run)):
            lines = read_lines(folder / "pretrain.jsonl", split="validation")
            style = {"color": f"C{i}", "label": run if j == 0 else None}
            curves.plot(lines["tokens"] / 1e6, lines["mlm_loss"], **style)
            accuracies = best_accuracies(folder / "sst2.jsonl")
            points.plot(lines["mlm_loss"][-1], np.mean(accuracies), "o", **style)
    curves.set(xlabel="million tokens", ylabel="MLM loss, nats", ylim=(4, 7), title="pretraining")
    points.set(xlabel="MLM loss at the end, nats", ylabel="SST-2 dev accuracy, %")
    points.set_title("fine-tuning with all labels; a dot is a seed of pretraining")
    points.legend(fontsize=8)
    return figure


if __name__ == "__main__":
    print(*table(), sep="\n")
    draw().savefig(HERE / "optimizers.png", dpi=110)
