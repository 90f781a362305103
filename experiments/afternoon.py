"""An afternoon on two cores: does pretraining on film reviews raise the accuracy on SST-2?

    make afternoon                               # the runs, by the rules of afternoon.mk, then this
    python -m experiments.afternoon              # the recorded runs, in experiments/afternoon
    python -m experiments.afternoon FOLDER

Prints two tables and draws FOLDER/curves.png, from the metrics.jsonl of the runs.
"""

import sys
from pathlib import Path
from typing import Any

import numpy as np

from experiments.curves import HERE, best_accuracies, mean_and_deviation, new_figure, read_lines

SHARES = ("all", "tenth", "hundredth")  # of the labels
# "adamw" and "longer" are recorded runs, no part of `make afternoon`.
STARTS = {
    "scratch": "from scratch",
    "adamw": "pretrained with AdamW",
    "pretrained": "pretrained with Muon",
    "longer": "AdamW, 3.2 times the tokens",
}
COLORS = {"scratch": "C0", "adamw": "C1", "pretrained": "C2", "longer": "C3"}
RUNS = {"adamw": "adamw", "pretrained": "pretrain", "longer": "longer"}  # of pretraining
STEPS = (250, 500, 1000, 1500, 2000, 2500, 5000, 10000, 15000)

Accuracies = dict[tuple[str, str], list[float]]  # by start and share; of each seed, in percent


def at_best_rate(run: Path) -> list[float]:
    """Returns the accuracies of the seeds at the learning rate that has the best mean."""
    rates = np.unique(read_lines(run, split="validation")["learning_rate"])
    of_rates = [best_accuracies(run, learning_rate=rate) for rate in rates]
    return max(of_rates, key=np.mean)


def accuracies(folder: Path) -> Accuracies:
    """Returns what the runs in this folder have reached on the dev split of SST-2."""
    return {
        (start, share): at_best_rate(folder / f"{start}-{share}")
        for start in STARTS
        for share in SHARES
        if (folder / f"{start}-{share}").exists()
    }


def gain_table(found: Accuracies) -> list[str]:
    """Returns the rows of a table: a start each, with the accuracy for each share of the labels."""
    rows = [
        f"| SST-2 dev accuracy, % | {' | '.join(SHARES)} |",
        f"|---|{len(SHARES) * '---|'}",
    ]
    for start, label in STARTS.items():
        if (start, "all") in found:
            cells = [mean_and_deviation(found[start, share]) for share in SHARES]
            rows.append(f"| {label} | {' | '.join(cells)} |")
    return rows


def loss_table(pretrain: Path) -> list[str]:
    """Returns the rows of a table: what to expect in the course of pretraining."""
    rows = ["| step | million tokens | MLM loss | NSP accuracy |", "|---|---|---|---|"]
    lines = read_lines(pretrain, split="validation")
    for i, step in enumerate(lines["step"]):
        if step in STEPS:
            tokens = lines["tokens"][i] / 1e6
            nsp = 100 * lines["nsp_accuracy"][i]
            rows.append(f"| {step:,} | {tokens:.1f} | {lines['mlm_loss'][i]:.2f} | {nsp:.0f}% |")
    return rows


def plot_loss(axes: Any, folder: Path) -> None:
    """Draws the validation loss over the tokens trained on, and the unigram entropy."""
    for start, run in RUNS.items():
        if (folder / run).exists():
            lines = read_lines(folder / run, split="validation")
            millions = lines["tokens"] / 1e6
            style = {"color": COLORS[start], "label": STARTS[start]}
            axes.plot(millions, lines["mlm_loss"], "o-", markersize=3, **style)
    entropy = lines["unigram_entropy"][0]
    axes.axhline(entropy, color="black", linestyle=":", label="unigram entropy")
    axes.set(xlabel="million tokens", ylabel="MLM loss, nats", title="pretraining on film reviews")
    axes.legend(fontsize=8)


def plot_gain(axes: Any, found: Accuracies) -> None:
    """Draws a bar for each share of the labels and each start, its mean, and a dot a seed."""
    starts = [start for start in STARTS if (start, "all") in found]
    width = 0.8 / len(starts)
    for i, share in enumerate(SHARES):
        for j, start in enumerate(starts):
            values = found[start, share]
            mean = np.mean(values)
            x = i + (j - (len(starts) - 1) / 2) * width
            label = STARTS[start] if i == 0 else None
            axes.bar(x, mean, 0.9 * width, color=COLORS[start], alpha=0.8, label=label)
            axes.plot([x] * len(values), values, "k.", markersize=3)
            axes.text(x, max(values) + 0.6, f"{mean:.1f}", ha="center", fontsize=8)
    axes.set_xticks(range(len(SHARES)), SHARES)
    axes.set(xlabel="share of the labels", ylabel="SST-2 dev accuracy, %", ylim=(50, 96))
    axes.set_title("fine-tuning; a dot is a seed")
    axes.legend(fontsize=8, loc="upper right")


def draw(folder: Path) -> Any:
    """Draws the loss, and the gain at each share of the labels."""
    figure = new_figure((11, 4.2))
    loss, bars = figure.subplots(1, 2)
    plot_loss(loss, folder)
    plot_gain(bars, accuracies(folder))
    return figure


def main(folder: str | Path = HERE / "afternoon") -> None:
    print(*loss_table(Path(folder) / "pretrain"), "", sep="\n")
    print(*gain_table(accuracies(Path(folder))), sep="\n")
    picture = Path(folder) / "curves.png"
    draw(Path(folder)).savefig(picture, dpi=110)
    print(f"\n{picture} shows it")


if __name__ == "__main__":
    main(*sys.argv[1:])
