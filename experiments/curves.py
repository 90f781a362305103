"""What the experiments share: the lines of a run are read, averaged and drawn."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).parent


def read_lines(run: Path, **wanted: Any) -> dict[str, np.ndarray]:
    """Returns the lines of a run that have what is wanted, such as split="validation", as columns.

    run: the folder of a run, or a file of JSON lines. A number that is not finite, for which JSON
    has null, becomes NaN.
    """
    file = run / "metrics.jsonl" if run.is_dir() else run
    columns: dict[str, list] = {}
    for text in file.read_text().splitlines():
        line = json.loads(text)
        if wanted.items() <= line.items():
            for name, value in line.items():
                columns.setdefault(name, []).append(math.nan if value is None else value)
    return {name: np.array(values) for name, values in columns.items()}


def new_figure(inches: tuple[float, float]) -> Any:
    """Returns an empty figure, to be saved and not shown."""
    from matplotlib.figure import Figure  # of the extra [plot]: the tables do without

    return Figure(figsize=inches, layout="constrained")


def best_accuracies(run: Path, **wanted: Any) -> list[float]:
    """Returns the accuracy of each seed of a run of train_sst2.py on the validation split, in
    percent, at its best epoch. wanted: see `read_lines`.
    """
    lines = read_lines(run, split="validation", **wanted)
    seeds = lines["seed"]
    accuracies = 100 * lines["accuracy"]
    return [accuracies[seeds == seed].max() for seed in np.unique(seeds)]


def mean_and_deviation(values: list[float]) -> str:
    deviation = f" ± {np.std(values, ddof=1):.1f}" if len(values) > 1 else ""
    return f"{np.mean(values):.1f}{deviation}"
