"""AdamW or Muon? Short runs on film reviews, each followed by SST-2.

python -m experiments.optimizers    # prints a table, draws optimizers.png, from the recorded lines
"""

from pathlib import Path
from typing import Any

import numpy as np

from experiments.curves import HERE, best_accuracies, mean_and_deviation, new_figure, read_lines

RUNS = {"adamw-1e-3": "AdamW, 1e-3", "muon-1e-3": "Muon, 1e-3", "muon-2e-3": "Muon, 2e-3"}


def seeds_of(run: str) -> list[Path]:
    """Returns a folder for each seed of pretraining."""
    return sorted((HERE / "optimizers").glob(f"{run}-*"))


def table() -> list[str]:
    """Returns the rows of a table: for each seed, the step at which the training loss passes 6.0
    (the mean over 90 steps), the final loss, and what fine-tuning reaches.
    """
    rows = ["| optimizer, rate | seed | loss 6.0 at step | final loss | SST-2: all | hundredth |"]
    rows.append("|---|---|---|---|---|---|")
    for run, label in RUNS.items():
        for folder in seeds_of(run):
            lines = read_lines(folder / "pretrain.jsonl", split="validation")
            training = read_lines(folder / "pretrain.jsonl", split="train")
            smooth = np.convolve(training["mlm_loss"], np.full(9, 1 / 9), "valid")  # of 90 steps
            end_of_plateau = training["step"][4:-4][smooth > 6.0][-1]
            fine_tunings = [folder / f"{share}.jsonl" for share in ("all", "hundredth")]
            accuracies = [mean_and_deviation(best_accuracies(file)) for file in fine_tunings]
            cells = [str(end_of_plateau), f"{lines['mlm_loss'][-1]:.2f}", *accuracies]
            rows.append(f"| {label} | {folder.name[-1]} | {' | '.join(cells)} |")
    return rows


def draw() -> Any:
    """Draws the loss of every run, and its SST-2 accuracy against its final loss."""
    figure = new_figure((11, 4.2))
    curves, points = figure.subplots(1, 2)
    for i, (run, label) in enumerate(RUNS.items()):
        for seed, folder in enumerate(seeds_of(run)):
            lines = read_lines(folder / "pretrain.jsonl", split="validation")
            style = {"color": f"C{i}", "label": None if seed else label}
            curves.plot(lines["tokens"] / 1e6, lines["mlm_loss"], "o-", markersize=3, **style)
            accuracies = best_accuracies(folder / "all.jsonl")
            points.plot(lines["mlm_loss"][-1], np.mean(accuracies), "o", **style)
    curves.set(xlabel="million tokens", ylabel="MLM loss, nats", ylim=(3.8, 7))
    curves.set_title("pretraining; a curve is a seed")
    points.set(xlabel="MLM loss at the end, nats", ylabel="SST-2 dev accuracy, %", ylim=(82, 87))
    points.set_title("fine-tuning with all labels; a dot is a seed of pretraining")
    points.legend(fontsize=8)
    return figure


if __name__ == "__main__":
    print(*table(), sep="\n")
    draw().savefig(HERE / "optimizers.png", dpi=110)
