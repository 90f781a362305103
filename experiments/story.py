"""What `make run` has shown: a table and a figure, from the metrics.jsonl of its three runs.

python -m experiments.story                # the recorded run, in experiments/story
python -m experiments.story runs/sample    # a folder with pretrain/, pretrained/ and scratch/
"""

import sys
from pathlib import Path
from typing import Any

import numpy as np

from experiments.curves import (
    HERE,
    best_accuracies,
    mean_and_deviation,
    new_figure,
    read_lines,
)


def table(folder: Path) -> str:
    columns = read_lines(folder / "pretrain", split="validation")
    share = columns["most_frequent_prediction"]
    largest = int(np.argmax(share))
    last = {name: values[-1] for name, values in columns.items()}
    pretrained = best_accuracies(folder / "pretrained")
    scratch = best_accuracies(folder / "scratch")
    rows = {
        "largest share of masked tokens with the same prediction": (
            f"{100 * share[largest]:.0f}% at step {columns['step'][largest]}"
        ),
        "the same at the end": f"{100 * share[-1]:.0f}%",
        "MLM accuracy": f"{100 * last['mlm_accuracy']:.0f}%",
        "NSP accuracy": f"{100 * last['nsp_accuracy']:.0f}%",
        f"reviews, {len(pretrained)} seeds: validation accuracy with the pretrained weights": (
            f"{mean_and_deviation(pretrained)}%"
        ),
        "reviews: validation accuracy from scratch": f"{mean_and_deviation(scratch)}%",
        "pretraining took": f"{last['seconds']:.0f} s, {last['step']} steps",
    }
    width = max(map(len, rows))
    return "\n".join(f"{what:<{width}}  {seen}" for what, seen in rows.items())


def plot_pretraining(loss: Any, shares: Any, run: Path) -> None:
    """Draws two panels: the MLM loss beside two that are reached without reading the text, and the
    accuracies with the share of the most frequent prediction.
    """
    train = read_lines(run, split="train")
    validation = read_lines(run, split="validation")
    loss.plot(train["step"], train["mlm_loss"], color="0.85", label="training")
    loss.plot(validation["step"], validation["mlm_loss"], "o-", markersize=3, label="validation")
    for name, style, label in (
        ("ln_vocab_size", ":", "ln V: nothing is known"),
        ("unigram_entropy", "--", "unigram entropy: how often tokens occur"),
    ):
        nats = validation[name][0]
        loss.axhline(nats, color="black", linestyle=style, linewidth=1, label=label)
    for name, label in (
        ("most_frequent_prediction", "share of the most frequent prediction"),
        ("mlm_accuracy", "MLM accuracy"),
        ("nsp_accuracy", "NSP accuracy"),
    ):
        shares.plot(validation["step"], validation[name], "o-", markersize=3, label=label)
    loss.set(xlabel="step", ylabel="MLM loss, nats", title="masked language model")
    shares.set(xlabel="step", ylim=(0, 1.02), title="pretraining, validation")


def accuracy_by_epoch(run: Path) -> tuple[np.ndarray, list[float]]:
    """Returns the epochs of fine-tuning, and the mean validation accuracy of the seeds at each."""
    lines = read_lines(run, split="validation")
    epochs = np.unique(lines["epoch"])
    return epochs, [lines["accuracy"][lines["epoch"] == epoch].mean() for epoch in epochs]


def draw(folder: Path) -> Any:
    """Draws the loss, the shares and accuracies, and both classifiers."""
    figure = new_figure((14, 4.2))
    loss, shares, reviews = figure.subplots(1, 3)
    plot_pretraining(loss, shares, folder / "pretrain")
    for run, label in {"pretrained": "with pretrained weights", "scratch": "from scratch"}.items():
        reviews.plot(*accuracy_by_epoch(folder / run), "o-", label=label)
    reviews.set(xlabel="epoch", ylim=(0.45, 1.02), title="accuracy on reviews, mean of the seeds")
    loss.legend(fontsize=8, loc="upper right")
    shares.legend(fontsize=8, loc="center right")
    reviews.legend(fontsize=8, loc="center right")
    return figure


def main(folder: str | Path = HERE / "story") -> None:
    print(table(Path(folder)))
    picture = Path(folder) / "curves.png"
    draw(Path(folder)).savefig(picture, dpi=120)
    print(f"{picture} shows it")


if __name__ == "__main__":
    main(*sys.argv[1:])
