"""What the experiments share: the lines of a run are read, averaged and drawn."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).parent


def read_lines(run: Path, split: str) -> dict[str, list]:
    """Returns the lines of a run that have this split (train, validation or test), as columns.

    run: the folder of a run, or the file itself. JSON has null for a number that is not finite; it
    becomes NaN.
    """
    file = run / "metrics.jsonl" if run.is_dir() else run
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    lines = [line for line in lines if line["split"] == split]
    names = lines[0] if lines else {}
    columns = {name: [line[name] for line in lines] for name in names}
    return {
        name: [math.nan if value is None else value for value in values]
        for name, values in columns.items()
    }


def read_columns(file: Path, **wanted: Any) -> dict[str, np.ndarray]:
    """Returns the columns of a file of JSON lines, of the lines that have what is wanted."""
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    lines = [line for line in lines if all(line[name] == wanted[name] for name in wanted)]
    return {name: np.array([line[name] for line in lines]) for name in lines[0]}


def new_figure(inches: tuple[float, float]) -> Any:
    """Returns an empty figure, to be saved and not shown."""
    from matplotlib.figure import Figure  # of the extra [plot]: the tables do without

    return Figure(figsize=inches, layout="constrained")


def means_of_seeds(
    run: Path, split: str, name: str, rate: float | None = None, by: str = "step"
) -> tuple[list[int], list[float]]:
    """Returns the steps (or epochs) of a run of train_sst2.py, and the mean of a quantity over the
    seeds at each. rate: one learning rate; by default all of them.
    """
    lines = read_lines(run, split)
    values: dict[int, list[float]] = {}
    for i, step in enumerate(lines[by]):
        if rate in (None, lines["learning_rate"][i]):
            values.setdefault(step, []).append(lines[name][i])
    return list(values), [float(np.mean(v)) for v in values.values()]


def best_accuracies(run: Path, rate: float | None = None) -> list[float]:
    """Returns the accuracy of each seed of a run of train_sst2.py on the validation split, in
    percent, at its best epoch. rate: one learning rate; by default the best of all.
    """
    lines = read_lines(run, "validation")
    best: dict[int, float] = {}
    for i, seed in enumerate(lines["seed"]):
        if rate in (None, lines["learning_rate"][i]):
            best[seed] = max(best.get(seed, 0.0), 100 * lines["accuracy"][i])
    return list(best.values())


def mean_and_deviation(values: list[float]) -> str:
    deviation = f" ± {np.std(values, ddof=1):.1f}" if len(values) > 1 else ""
    return f"{np.mean(values):.1f}{deviation}"


def plot_pretraining(loss: Any, shares: Any, run: Path) -> None:
    """Draws two panels: the MLM loss beside two that are reached without reading the text, and the
    accuracies with the share of the most frequent prediction.
    """
    train = read_lines(run, "train")
    validation = read_lines(run, "validation")
    loss.plot(train["step"], train["mlm_loss"], color="0.85", label="training")
    loss.plot(validation["step"], validation["mlm_loss"], label="validation")
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
        shares.plot(validation["step"], validation[name], label=label)
    loss.set(xlabel="step", ylabel="MLM loss, nats", title="masked language model")
    shares.set(xlabel="step", ylim=(0, 1.02), title="pretraining, validation")
