"""Draws the curves of a run from its metrics.jsonl."""

import functools
import json
import math
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np


def read_lines(run: Path, split: str) -> dict[str, list]:
    """Returns the lines of a run that have this split (train, validation or test), as columns.

    run: the folder of a run, or the file itself. A number that is not finite, for which JSON has
    null, is NaN.
    """
    file = run / "metrics.jsonl" if run.is_dir() else run
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    lines = [line for line in lines if line["split"] == split]
    columns = {name: [line[name] for line in lines] for name in lines[0]} if lines else {}
    return {
        name: [math.nan if value is None else value for value in values]
        for name, values in columns.items()
    }


def optional(draw: Callable[[Path], None]) -> Callable[[Path], None]:
    """Makes a drawing function do nothing where matplotlib is not installed, and warn where it
    fails: a run that took days must not fail at its picture.
    """

    @functools.wraps(draw)
    def draw_if_possible(run: Path) -> None:
        try:
            draw(run)
        except ImportError:
            return
        except Exception as error:
            warnings.warn(f"{run} has no picture: {error}", stacklevel=2)

    return draw_if_possible


def new_figure(inches: tuple[float, float]) -> Any:
    """Returns an empty figure, to be saved and not shown. A notebook sets MPLBACKEND to its own
    backend, which may not be installed here. So it is hidden while matplotlib is imported.
    """
    backend = os.environ.pop("MPLBACKEND", None)
    try:
        from matplotlib.figure import Figure
    finally:
        if backend is not None:
            os.environ["MPLBACKEND"] = backend
    return Figure(figsize=inches, layout="constrained")


def means_of_seeds(
    run: Path, split: str, name: str, rate: float | None = None, by: str = "step"
) -> tuple[list[int], list[float]]:
    """Returns the steps (or epochs) of a run of train_sst2.py, and the mean of a quantity over the
    seeds at each. rate: one learning rate; by default all of them.
    """
    lines = read_lines(run, split)
    values: dict[int, list[float]] = {}
    for i, step in enumerate(lines.get(by, [])):
        if rate in (None, lines["learning_rate"][i]):
            values.setdefault(step, []).append(lines[name][i])
    return list(values), [float(np.mean(v)) for v in values.values()]


def plot_pretraining(loss: Any, shares: Any, run: Path, known: dict[str, float]) -> None:
    """Draws two panels: the MLM loss, and the accuracies with the share of the most frequent
    prediction. known: losses, in nats, of models that do not read the text, as horizontal lines.
    """
    train, validation = read_lines(run, "train"), read_lines(run, "validation")
    if train:
        loss.plot(train["step"], train["mlm_loss"], color="0.85", label="training")
    loss.plot(validation["step"], validation["mlm_loss"], label="validation")
    known = {"ln V: nothing is known": validation["ln_vocab_size"][0], **known}
    for (label, nats), style in zip(known.items(), (":", "--", "-."), strict=False):
        loss.axhline(nats, color="black", linestyle=style, linewidth=1, label=label)
    for name, label in {
        "most_frequent_prediction": "share of the most frequent prediction",
        "mlm_accuracy": "MLM accuracy",
        "nsp_accuracy": "NSP accuracy",
    }.items():
        shares.plot(validation["step"], validation[name], label=label)
    loss.set(xlabel="step", ylabel="MLM loss, nats", title="masked language model")
    shares.set(xlabel="step", ylim=(0, 1.02), title="pretraining, validation")


def unigrams(run: Path) -> dict[str, float]:
    """Returns the loss of a model that knows how often each token occurs, with its label."""
    entropy = read_lines(run, "validation")["unigram_entropy"][0]
    return {"unigram entropy: how often tokens occur": entropy}


@optional
def draw_pretraining(run: Path) -> None:
    """Draws curves.png into the folder of a run of train_pretrain.py."""
    figure = new_figure((11, 4))
    left, right = figure.subplots(1, 2)
    plot_pretraining(left, right, run, unigrams(run))
    left.legend()
    right.legend()
    figure.savefig(run / "curves.png", dpi=120)


@optional
def draw_sst2(run: Path) -> None:
    """Draws curves.png into the folder of a run of train_sst2.py: means over the seeds, in a colour
    for each learning rate.
    """
    figure = new_figure((11, 4))
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
