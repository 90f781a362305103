"""Draws the figures of results/, but for sample/curves.png, and prints the README's
table, from the raw lines beside them.

python -m experiments.figures
"""

import itertools
import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from experiments.curves import means_of_seeds, new_figure, plot_pretraining, read_lines, unigrams
from experiments import afternoon
from experiments.story import best_accuracies, mean_and_deviation

RESULTS = Path(__file__).parents[1] / "results"
AFTERNOON = RESULTS / "afternoon"
GPU = RESULTS / "gpu"
GPU_RUNS = {  # by folder
    "once": "mini, the reviews once",
    "tenth": "mini, a tenth of the reviews ten times",
    "books": "mini, 197 books once",
    "long": "mini, the reviews eight times, batches of 256",
    "long-small": "small, the reviews almost six times, batches of 256",
}
SIX_LAYERS = {  # what was trained, and where its lines are
    "6 layers from scratch": [
        f"published_weights/scratch-1epoch-{seed}.jsonl" for seed in range(3)
    ],
    "6 layers, published weights": [
        "published_weights/minilm-1epoch.jsonl",
        "published_weights/minilm-1epoch-1.jsonl",
    ],
    "6 layers, published weights, another tokenizer": [
        "published_weights/wrong-tokenizer-1epoch.jsonl"
    ],
}
MINI = {"scratch": "mini from scratch", "pretrained": "mini, pretrained on film reviews"}
PUBLISHED = {  # %
    "Google's tiny (test split)": 83.2,
    "Google's mini (test split)": 85.9,
    "BERT-base": 92.7,
}
BAG_OF_WORDS = {"bag of words": 80.4}  # %


def read(name: str, **wanted: Any) -> dict[str, np.ndarray]:
    """The columns of a file of JSON lines, of the lines that have what is wanted."""
    lines = [json.loads(line) for line in (RESULTS / name).read_text().splitlines()]
    lines = [line for line in lines if all(line.get(k) == v for k, v in wanted.items())]
    return {key: np.array([line[key] for line in lines]) for key in lines[0]}


def summary() -> list[str]:
    """Returns the rows of the README's table: what was measured, here, published."""
    run = read_lines(AFTERNOON / "pretrain", "validation")
    minutes = run["seconds"][-1] / 60
    loss, tokens = run["mlm_loss"][-1], run["tokens"][-1] / 1e6
    rows = [
        (f"perplexity of masked tokens of film reviews: mini, {tokens:.0f} million tokens, "
         f"{minutes:.0f} minutes on two cores", f"{np.exp(loss):.0f}",
         "BERT-base 3.99, toynlp 5.90 (other corpora)"),
    ]  # fmt: skip
    published = {
        MINI["scratch"]: "toynlp's base: about 80",
        MINI["pretrained"]: "Google's tiny 83.2, mini 85.9 (test)",
        "6 layers, published weights":
            "Google's small 89.7 (test), BERT-base 92.7 to 92.9, toynlp 91.93",
    }  # fmt: skip
    for name, accuracies in {**sst2_accuracies(), **accuracies_of_longer_run()}.items():
        rows.append((f"SST-2 dev accuracy, %: {name}", mean_and_deviation(accuracies),
                     published.get(name, "")))  # fmt: skip
    bench = json.loads((RESULTS / "bench_avx2.json").read_text())
    for settings, with_what in {
        "": " with its default settings",
        ", both float32 with our allocator": ", both in float32 and with freed memory kept",
    }.items():
        times = [
            bench[f"{step}: times as fast as transformers{settings}"]
            for step in ("mini, 16 x 128", "base, 4 x 128")
        ]
        rows.append((f"a training step, times as fast as transformers{with_what}: mini; base",
                     "; ".join(f"{ratio:.2f}" for ratio in times), ""))  # fmt: skip
    return [f"| {' | '.join(row)} |" for row in rows]


def sst2_accuracies() -> dict[str, list[float]]:
    """Returns what was trained, and the accuracy of each seed in percent."""
    found = {}
    for share in afternoon.SHARES:
        for start, name in MINI.items():
            found[name + of_sentences(share)] = best_setting(start, share).accuracies
    wrong_tokenizer = best_accuracies(AFTERNOON / "wrong-tokenizer.jsonl")
    found[f"{MINI['pretrained']}, another tokenizer"] = wrong_tokenizer
    for name, files in SIX_LAYERS.items():
        found[name] = [a for file in files for a in best_accuracies(RESULTS / file)]
    return found


def accuracies_of_longer_run() -> dict[str, list[float]]:
    """Returns the same of the long run on a GPU, for each share of the labels."""
    tokens = read_lines(GPU / "long/pretrain", "validation")["tokens"][-1] / 1e6
    name = f"{MINI['pretrained']}, {tokens:.0f} million tokens on an H100"
    return {
        name + of_sentences(share): best_accuracies(GPU / f"long/{share}.jsonl")
        for share in afternoon.SHARES
    }


def of_sentences(share: str) -> str:
    """Returns how a name ends that has a share of the labels."""
    return "" if share == "all" else f", a {share} of the sentences"


class FineTuned(NamedTuple):
    """The models of one setting of an afternoon's fine-tuning."""

    share: str  # of the labels
    start: str
    rate: float
    epochs: int
    accuracies: list[float]  # of each seed, in percent


def fine_tuned() -> list[FineTuned]:
    """Returns all settings of an afternoon's fine-tuning that were tried."""
    found = []
    for share, start in itertools.product(afternoon.SHARES, afternoon.STARTS):
        for file in sorted(AFTERNOON.glob(f"{start}-{share}*.jsonl")):
            lines = read_lines(file, "validation")
            for rate in sorted(set(lines["learning_rate"])):
                of_rate = np.array(lines["learning_rate"]) == rate
                epochs = int(np.array(lines["epoch"])[of_rate].max())
                found.append(FineTuned(share, start, rate, epochs, best_accuracies(file, rate)))
    return found


def best_setting(start: str, share: str) -> FineTuned:
    """Returns the setting with the highest mean, of those with three seeds or more."""
    settings = [
        s for s in fine_tuned() if (s.start, s.share) == (start, share) and len(s.accuracies) >= 3
    ]
    if not settings:
        raise ValueError(f"{AFTERNOON} has no {start}-{share} with three seeds")
    return max(settings, key=lambda setting: np.mean(setting.accuracies))


def afternoon_rows() -> list[str]:
    """Returns the rows of the table of an afternoon's fine-tuning."""
    return [
        f"| {s.share} | {s.start} | {s.rate:g} | {s.epochs} | {mean_and_deviation(s.accuracies)}"
        f" | {len(s.accuracies)} |"
        for s in fine_tuned()
    ]


def exports() -> tuple[list[float], list[float]]:
    """Returns the million tokens of each model that was exported on the way and fine-tuned, and its
    SST-2 dev accuracy in percent.
    """
    pretraining = read_lines(AFTERNOON / "pretrain", "train")
    tokens, accuracies = [], []
    for file in AFTERNOON.glob("pretrained-step-*.jsonl"):
        step = int(file.stem.split("-")[-1])
        at_step = np.interp(step, pretraining["step"], pretraining["tokens"])
        tokens.append(float(at_step) / 1e6)
        accuracies.extend(best_accuracies(file))
    order = np.argsort(tokens)
    return [tokens[i] for i in order], [accuracies[i] for i in order]


def end_of(pretrain: Path) -> str:
    """Returns three cells of a table: million tokens, MLM loss, NSP accuracy, at the end."""
    last = {name: values[-1] for name, values in read_lines(pretrain, "validation").items()}
    return (
        f"{last['tokens'] / 1e6:.1f} | {last['mlm_loss']:.2f} | {100 * last['nsp_accuracy']:.0f}%"
    )


def gpu_rows() -> list[str]:
    """Returns the rows of the table of the runs on a GPU: the end of pretraining, and the SST-2 dev
    accuracy with each share of the labels.
    """
    rows = []
    for name, what in GPU_RUNS.items():
        files = [GPU / name / f"{share}.jsonl" for share in afternoon.SHARES]
        accuracies = " | ".join(
            mean_and_deviation(best_accuracies(file)) if file.exists() else "" for file in files
        )
        rows.append(f"| {what} | {end_of(GPU / name / 'pretrain')} | {accuracies} |")
    return rows


def draw_afternoon() -> Any:
    """Draws an afternoon's pretraining: the loss, the accuracy of SST-2 by tokens (with the longer
    run on a GPU), and the accuracy by labels.
    """
    figure = new_figure((15, 4.2))
    loss, accuracy, bars = figure.subplots(1, 3)
    afternoon.plot_loss(loss, AFTERNOON / "pretrain")
    accuracies = {
        (start, share): best_setting(start, share).accuracies
        for start, share in itertools.product(afternoon.STARTS, afternoon.SHARES)
    }
    afternoon.plot_gain(bars, accuracies)
    tokens, of_exports = exports()
    accuracy.plot(tokens, of_exports, "C2o--", label="exported on the way, one seed each")
    for pretraining, fine_tuning, star, label in (
        (AFTERNOON / "pretrain", AFTERNOON / "pretrained-all-1e-4.jsonl", "C2*",
         "at the end, same settings, three seeds"),
        (GPU / "long/pretrain", GPU / "long/all.jsonl", "C3*",
         "a longer run on a GPU, three seeds"),
    ):  # fmt: skip
        seeds = best_accuracies(fine_tuning)
        end = read_lines(pretraining, "validation")["tokens"][-1] / 1e6
        accuracy.plot([end] * len(seeds), seeds, star, markersize=9, label=label)
    scratch = np.mean(accuracies["scratch", "all"])
    accuracy.axhline(scratch, color="C0", label=f"from scratch: {scratch:.1f}")
    for name, value in {**BAG_OF_WORDS, **PUBLISHED}.items():
        if name == "BERT-base":  # above the figure
            continue
        accuracy.axhline(value, color="black", linestyle=":", linewidth=1)
        accuracy.text(0.75, value + 0.08, name, fontsize=7)
    accuracy.set(xlim=(0.7, 250), xscale="log", ylim=(78, 89),
                 xlabel="million tokens of pretraining", ylabel="SST-2 dev accuracy, %",
                 title="fine-tuned on all labels")  # fmt: skip
    accuracy.set_xticks([1, 10, 100], ["1", "10", "100"])
    accuracy.legend(fontsize=8, loc="upper left")
    return figure


def curves(axes: Any, run: str, split: str, name: str, rate: float, **style: Any) -> None:
    """A quantity by step, its mean over the seeds; more than about a hundred lines are joined in
    groups."""
    steps, means = means_of_seeds(RESULTS / run, split, name, rate)
    part = max(1, len(steps) // 60)
    groups = [slice(i, i + part) for i in range(0, len(steps), part)]
    axes.plot([steps[g][-1] for g in groups], [np.mean(means[g]) for g in groups], **style)


def draw_phases() -> Any:
    """Draws the phases of pretraining on film reviews: first single tokens, then context."""
    figure = new_figure((11, 4.2))
    left, right = figure.subplots(1, 2)
    run = AFTERNOON / "pretrain"
    plot_pretraining(left, right, run, unigrams(run))
    for axes in (left, right):
        axes.set_xscale("symlog", linthresh=100)
        axes.set_xlim(left=0)
        ticks = (0, 50, 100, 300, 1000, 3000, 10000)
        axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
    left.legend(fontsize=8)
    right.legend(fontsize=8, loc="upper left")  # where no curve runs
    return figure


def draw_sst2() -> Any:
    """Draws SST-2 from scratch at three learning rates, and with pretrained weights."""
    figure = new_figure((14, 4.2))
    loss, accuracy, bars = figure.subplots(1, 3, width_ratios=[1, 1, 1.2])
    for i, rate in enumerate((5e-5, 1e-5, 1e-6)):
        color = f"C{i}"
        curves(loss, "sst2/rates", "train", "loss", rate, color=color, alpha=0.35)
        for axes, name in ((loss, "loss"), (accuracy, "accuracy")):
            label = f"learning rate {rate:g}"
            curves(axes, "sst2/rates", "validation", name, rate, color=color, label=label)
    loss.set(xlabel="step", ylabel="loss, nats", title="from scratch: training (pale) and dev")
    accuracy.set(xlabel="step", ylabel="dev accuracy", title="from scratch")
    accuracy.legend(fontsize=8)
    accuracies = sst2_accuracies()
    for i, (name, values) in enumerate(accuracies.items()):
        deviation = np.std(values, ddof=1) if len(values) > 1 else 0
        color = "C1" if "another" in name else "C0" if "scratch" in name else "C2"
        bars.barh(i, np.mean(values), xerr=deviation, color=color, alpha=0.8, capsize=3)
        bars.text(96, i, mean_and_deviation(values), va="center", fontsize=8)
    names = [name.replace(", ", ",\n", 1) for name in accuracies]
    bars.set_yticks(range(len(names)), names, fontsize=7)
    bars.invert_yaxis()
    for name, value in PUBLISHED.items():
        bars.axvline(value, color="black", linestyle=":", linewidth=1)
        bars.text(value, len(names) - 0.4, name, rotation=90, ha="right", va="bottom", fontsize=6)
    bars.set(xlim=(50, 106), xlabel="dev accuracy, %", title="mean ± sd over the seeds")
    return figure


def draw_mistakes() -> Any:
    """Draws a rate too large, examples made up front, a corpus in lists under sixteen workers."""
    figure = new_figure((14, 4.2))
    trap, up_front, memory = figure.subplots(1, 3)
    for i, rate in enumerate((1e-2, 1e-3, 1e-4)):
        lines = read("trap.jsonl", learning_rate=rate)
        trap.plot(lines["step"], lines["mlm_loss"], color=f"C{i}", label=f"learning rate {rate:g}")
    trap.axhline(lines["entropy_of_targets"][0], color="black", linestyle=":", linewidth=1,
                 label="entropy of the targets")  # fmt: skip
    trap.set(xlabel="step", ylabel="MLM loss, nats", ylim=(0, 11), title="overfitting one sample")
    for way in ("up front", "on the fly"):
        lines = read("up_front.jsonl", way=way)
        up_front.plot(lines["characters"] / 1e6, lines["seconds"], "o-", label=way)
    up_front.set(xlabel="million characters", ylabel="seconds to the first batch",
                 title="all examples first, or on the fly")  # fmt: skip
    for file, label in {
        "memory_lists": "a tenth of the books in lists",
        "memory": "all books mapped",
    }.items():
        lines = read(f"{file}.jsonl")
        total = (lines["main_kib"] + lines["workers_kib"]) / 1024
        memory.plot(lines["seconds"], total, label=label)
    memory.set(xlabel="seconds", ylabel="MiB, all processes", title="16 workers, prefetch 10")
    memory.set_ylim(bottom=0)
    for axes in (trap, up_front, memory):
        axes.legend(fontsize=8)
    return figure


def main() -> None:
    for draw in (draw_phases, draw_sst2, draw_mistakes, draw_afternoon):
        file = RESULTS / f"{draw.__name__.removeprefix('draw_')}.png"
        draw().savefig(file, dpi=110)
        print(file)
    print(*summary(), sep="\n")


if __name__ == "__main__":
    main()
