"""Figures from the metrics.jsonl of runs: nothing in them is measured twice or typed by hand."""

import contextlib
import functools
import json
from collections.abc import Callable
from pathlib import Path

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


@optional
def draw_pretraining(run: Path) -> None:
    """curves.png: losses beside ln V and the unigram entropy; accuracies and shares."""
    from matplotlib.figure import Figure

    train, validation = read_lines(run, "train"), read_lines(run, "validation")
    figure = Figure(figsize=(11, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.plot(train["step"], train["mlm_loss"], color="0.8", label="training")
    left.plot(validation["step"], validation["mlm_loss"], label="validation")
    for name, style in {"ln_vocab_size": ":", "unigram_entropy": "--"}.items():
        left.axhline(validation[name][0], color="black", linestyle=style, label=name)
    for name in ("mlm_accuracy", "nsp_accuracy", "commonest_prediction"):
        right.plot(validation["step"], validation[name], label=name)
    left.set(xlabel="step", ylabel="MLM loss, nats", title="masked language model")
    right.set(xlabel="step", ylim=(0, 1.02), title="validation")
    left.legend()
    right.legend()
    figure.savefig(run / "curves.png", dpi=120)


@optional
def draw_sst2(run: Path) -> None:
    """curves.png: loss and accuracy by step, means over seeds, a colour for each learning rate."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    train, validation = read_lines(run, "train"), read_lines(run, "validation")
    for number, rate in enumerate(sorted(set(validation["learning_rate"]))):
        for axes, lines, name in (
            (left, train, "loss"),
            (left, validation, "loss"),
            (right, validation, "accuracy"),
        ):
            of_step: dict[int, list[float]] = {}  # the values of all seeds
            for i, step in enumerate(lines.get("step", [])):
                if lines["learning_rate"][i] == rate:
                    of_step.setdefault(step, []).append(lines[name][i])
            means = [np.mean(values) for values in of_step.values()]
            label, alpha = f"learning rate {rate:g}", 0.4 if lines is train else 1.0
            axes.plot(list(of_step), means, color=f"C{number}", label=label, alpha=alpha)
    left.set(xlabel="step", ylabel="loss, nats", title="training (pale) and validation")
    right.set(xlabel="step", ylabel="accuracy", title="validation")
    right.legend()
    figure.savefig(run / "curves.png", dpi=120)
