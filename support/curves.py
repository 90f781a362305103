"""Figures from the metrics.jsonl of runs: nothing in them is measured twice or typed by hand."""

import contextlib
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np


def read_lines(run: Path, split: str) -> dict[str, list]:
    """The columns of a run's lines for "train", "validation" or "test". A folder, or a file."""
    file = run / "metrics.jsonl" if run.is_dir() else run
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    lines = [line for line in lines if line["split"] == split]
    return {name: [line[name] for line in lines] for name in lines[0]} if lines else {}


def optional(draw: Callable[[Path], None]) -> Callable[[Path], None]:
    """Without matplotlib, nothing is drawn."""

    @functools.wraps(draw)
    def draw_if_possible(run: Path) -> None:
        with contextlib.suppress(ImportError):
            draw(run)

    return draw_if_possible


def means_of_seeds(
    run: Path, split: str, name: str, rate: float | None = None, by: str = "step"
) -> tuple[list[int], list[float]]:
    """Steps, or epochs, of a run on SST-2, and a quantity's means there, over the seeds; of all
    learning rates or of one."""
    lines = read_lines(run, split)
    values: dict[int, list[float]] = {}
    for i, place in enumerate(lines.get(by, [])):
        if rate in (None, lines["learning_rate"][i]):
            values.setdefault(place, []).append(lines[name][i])
    return list(values), [float(np.mean(v)) for v in values.values()]


def plot_pretraining(loss: Any, shares: Any, run: Path, known: dict[str, float]) -> None:
    """Two panels: the MLM loss beside what could be `known` without reading the text, in nats; and
    accuracies and the share of the commonest prediction."""
    train, validation = read_lines(run, "train"), read_lines(run, "validation")
    loss.plot(train["step"], train["mlm_loss"], color="0.85", label="training")
    loss.plot(validation["step"], validation["mlm_loss"], label="validation")
    known = {"ln V: nothing is known": validation["ln_vocab_size"][0], **known}
    for (label, nats), style in zip(known.items(), (":", "--", "-."), strict=False):
        loss.axhline(nats, color="black", linestyle=style, linewidth=1, label=label)
    for name, label in {
        "commonest_prediction": "share of the commonest prediction",
        "mlm_accuracy": "MLM accuracy",
        "nsp_accuracy": "NSP accuracy",
    }.items():
        shares.plot(validation["step"], validation[name], label=label)
    loss.set(xlabel="step", ylabel="MLM loss, nats", title="masked language model")
    shares.set(xlabel="step", ylim=(0, 1.02), title="pretraining, validation")


def unigrams(run: Path) -> dict[str, float]:
    """What a run's corpus lets a model know without reading, as `plot_pretraining` labels it."""
    entropy = read_lines(run, "validation")["unigram_entropy"][0]
    return {"unigram entropy: how often tokens occur": entropy}


@optional
def draw_pretraining(run: Path) -> None:
    """curves.png: losses beside ln V and the unigram entropy; accuracies and shares."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    plot_pretraining(left, right, run, unigrams(run))
    left.legend()
    right.legend()
    figure.savefig(run / "curves.png", dpi=120)


@optional
def draw_sst2(run: Path) -> None:
    """curves.png: loss and accuracy by step, means over seeds, a colour for each learning rate."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    rates = sorted(set(read_lines(run, "validation")["learning_rate"]))
    for number, rate in enumerate(rates):
        for axes, split, name in (
            (left, "train", "loss"),
            (left, "validation", "loss"),
            (right, "validation", "accuracy"),
        ):
            style = {"color": f"C{number}", "alpha": 0.4 if split == "train" else 1.0}
            means = means_of_seeds(run, split, name, rate)
            axes.plot(*means, **style, label=f"learning rate {rate:g}")
    left.set(xlabel="step", ylabel="loss, nats", title="training (pale) and validation")
    right.set(xlabel="step", ylabel="accuracy", title="validation")
    right.legend()
    figure.savefig(run / "curves.png", dpi=120)
