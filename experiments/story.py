"""What `make run` has shown: one table and one figure, from the metrics.jsonl of its three runs.

python -m experiments.story runs/sample      # a folder with pretrain/, pretrained/ and scratch/
"""

import sys
from pathlib import Path
from typing import Any


import numpy as np

import data
from support.curves import (
    means_of_seeds,
    new_figure,
    optional,
    plot_pretraining,
    read_lines,
    unigrams,
)
from train_pretrain import PretrainOptions


def best_accuracies(run: Path, rate: float | None = None) -> list[float]:
    """Of each seed of a run of train_sst2.py, the best epoch's on the validation split, percent.

    rate: only the models of this learning rate; by default the best of all.
    """
    lines = read_lines(run, "validation")
    best: dict[int, float] = {}
    for seed, learning_rate, accuracy in zip(
        lines["seed"], lines["learning_rate"], lines["accuracy"], strict=True
    ):
        if rate in (None, learning_rate):
            best[seed] = max(best.get(seed, 0.0), 100 * accuracy)
    return list(best.values())


def mean_and_deviation(values: list[float]) -> str:
    deviation = f" ± {np.std(values, ddof=1):.1f}" if len(values) > 1 else ""
    return f"{np.mean(values):.1f}{deviation}"


def accuracy_of_most_frequent_token() -> float:
    """Returns the MLM accuracy, in percent, of always predicting the most frequent token."""
    vocab_size = PretrainOptions.vocab_size
    tokenizer = data.train_tokenizer(data.get_dataset("sample")["text"], vocab_size)
    corpus = data.get_corpus("sample", "validation", tokenizer)
    return 100 * np.bincount(corpus.tokens).max() / len(corpus)


def table(folder: Path) -> str:
    pretrain = {
        name: np.array(v) for name, v in read_lines(folder / "pretrain", "validation").items()
    }
    share, step = pretrain["most_frequent_prediction"], pretrain["step"]
    pretrained, scratch = (best_accuracies(folder / run) for run in ("pretrained", "scratch"))
    rows = [
        ("largest share of masked positions with the same prediction",
         f"{100 * share.max():.0f}% at step {step[share.argmax()]}"),
        ("the same at the end", f"{100 * share[-1]:.0f}%"),
        ("MLM accuracy", f"{100 * pretrain['mlm_accuracy'][-1]:.0f}%"),
        ("MLM accuracy of always predicting the most frequent token",
         f"{accuracy_of_most_frequent_token():.0f}%"),
        ("NSP accuracy", f"{100 * pretrain['nsp_accuracy'][-1]:.0f}%"),
        (f"reviews, {len(pretrained)} seeds: validation accuracy with the pretrained weights",
         f"{mean_and_deviation(pretrained)}%"),
        ("reviews: validation accuracy from scratch", f"{mean_and_deviation(scratch)}%"),
        ("pretraining took", f"{pretrain['seconds'][-1]:.0f} s, {step[-1]} steps"),
    ]  # fmt: skip
    width = max(len(what) for what, _ in rows)
    return "\n".join(f"{what:<{width}}  {seen}" for what, seen in rows)


@optional
def draw_story(folder: Path) -> None:
    """curves.png: the loss beside its baselines, shares and accuracies, both classifiers."""
    figure = new_figure((14, 4.2))
    panels: Any = figure.subplots(1, 3)
    loss, shares, reviews = panels
    plot_pretraining(loss, shares, folder / "pretrain", unigrams(folder / "pretrain"))
    for run, label in {"pretrained": "with pretrained weights", "scratch": "from scratch"}.items():
        means = means_of_seeds(folder / run, "validation", "accuracy", by="epoch")
        reviews.plot(*means, "o-", label=label)
    reviews.set(xlabel="epoch", ylim=(0.45, 1.02), title="accuracy on reviews, mean of the seeds")
    for axes, place in zip(panels, ("upper right", "center right", "center right"), strict=True):
        axes.legend(fontsize=8, loc=place)
    figure.savefig(folder / "curves.png", dpi=120)


def main(folder: str) -> None:
    print(table(Path(folder)))
    draw_story(Path(folder))
    if (Path(folder) / "curves.png").exists():
        print(f"{folder}/curves.png shows it")


if __name__ == "__main__":
    main(*sys.argv[1:])
