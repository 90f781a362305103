"""An afternoon on two cores: does pretraining on film reviews raise the accuracy on SST-2?

python -m experiments.afternoon stanfordnlp/imdb stanfordnlp/sst2 runs/afternoon

This is `make afternoon`. It runs the commands of `stages`, prints a table and draws a figure. After
a break the same line goes on: what is finished is not run again, and pretraining resumes.
"""

import contextlib
import itertools
import os
import shlex
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from experiments.story import best_accuracies, mean_and_deviation
from support.checkpoints import checkpoint_paths
from experiments.curves import new_figure, optional, read_lines, unigrams
from support.folder import lock, write_whole

RECIPE = """
    --vocab-size 8192 --size mini --max-seq-length 64 --batch-size 64 --dropout 0
    --learning-rate 1e-3 --warmup-steps 400
""".split()
# Exported on the way: the models after 1, 3, 10 and 30 million tokens with padding.
PRETRAINING = [*RECIPE, *"--steps 15000 --export-steps 244 732 2441 7324".split()]
FINE_TUNING = "--learning-rate 1e-4 3e-4 --seeds 3".split()
SHARES = {  # of the labelled sentences: one in how many is trained on, and for how many epochs
    "all": (1, 2),
    "tenth": (10, 6),  # every tenth
    "hundredth": (100, 30),
}
STARTS = ("pretrained", "scratch")

# ---- The commands ------------------------------------------------------------


@dataclass
class Stage:
    """A command that makes a folder."""

    folder: Path
    command: list[str]  # the arguments of python, but for the last one, which is the folder
    resumes: bool = False

    def is_finished(self) -> bool:
        return (self.folder / "model").exists() if self.resumes else self.folder.exists()


def stages(corpus: str, sst2: str, out: Path) -> tuple[list[Stage], list[Stage]]:
    """Returns what is run one after the other, and what may run at the same time afterwards."""
    reviews, weights = str(out / "reviews"), str(out / "pretrain/model")
    one_by_one = [
        Stage(out / "reviews", ["-m", "experiments.clean_reviews", corpus]),
        Stage(
            out / "pretrain",
            ["train_pretrain.py", "--dataset", reviews, *PRETRAINING, "--out"],
            resumes=True,
        ),
    ]
    together = []
    models = {
        "pretrained": ["--weights", weights],
        "scratch": ["--size", "mini", "--tokenizer", weights, "--max-seq-length", "64"],
    }
    for share, (every, epochs) in SHARES.items():
        sentences = out / f"sst2-{share}"
        select = ["-m", "experiments.fewer_labels", sst2, str(every)]
        one_by_one.append(Stage(sentences, select))
        for start in STARTS:
            settings = [*models[start], *FINE_TUNING, "--epochs", str(epochs)]
            command = ["train_sst2.py", "--dataset", str(sentences), *settings, "--out"]
            together.append(Stage(out / f"{start}-{share}", command))
    return one_by_one, together


def check_commands(out: Path, every_stage: list[Stage]) -> None:
    """Notes the commands of an afternoon in its folder, for the next time. Raises RuntimeError if
    other commands have made what is there: with another corpus, or in an older version.

    Paths are noted relative to the folder, so that it can be moved.
    """
    lines = []
    for stage in every_stage:
        words = [*stage.command, str(stage.folder)]
        lines.append(shlex.join([word.removeprefix(f"{out}/") for word in words]) + "\n")
    commands = "".join(lines)
    noted = out / "commands.txt"
    before = noted.read_text(encoding="utf-8") if noted.exists() else "it does not say which\n"
    if before != commands and any(stage.folder.exists() for stage in every_stage):
        raise RuntimeError(
            f"{out} was made by other commands than these: name another folder, or delete it"
            f"\nthen:\n{before}now:\n{commands}"
        )
    write_whole(noted, commands)


running: set[subprocess.Popen] = set()  # the commands, also those of other threads


class Terminated(KeyboardInterrupt):
    """SIGTERM, which ends an afternoon as Ctrl-C does."""


def terminate(number: int, frame: Any) -> NoReturn:
    raise Terminated


def stop_commands(stopped: BaseException) -> None:
    """Passes SIGTERM on to the running commands. Ctrl-C has reached them, too."""
    if isinstance(stopped, Terminated):
        for process in list(running):
            process.terminate()


def run_stage(stage: Stage, log: Path | None = None) -> None:
    """Runs the command of a stage, unless it is finished.

    A command writes into FOLDER.unfinished, which is renamed at its end; what an interrupted one
    left there is deleted first. A stage that resumes writes into FOLDER itself.
    log: for a command that runs beside others: it has one thread, and prints into this file. By
    default it has all cores, and the terminal.
    Raises RuntimeError if the command fails.
    """
    if stage.is_finished():
        return
    folder = stage.folder if stage.resumes else Path(f"{stage.folder}.unfinished")
    words = [*stage.command, str(folder)]
    if stage.resumes:
        if checkpoint_paths(folder):
            words.append("--resume")
    elif folder.exists():
        with lock(folder):  # fails if a command that outlived its afternoon still writes there
            shutil.rmtree(folder)
    print("python", *words, flush=True)

    stage.folder.parent.mkdir(parents=True, exist_ok=True)
    environment = dict(os.environ)
    if log:
        environment["OMP_NUM_THREADS"] = "1"
    with log.open("w") if log else contextlib.nullcontext() as output:
        process = subprocess.Popen(
            [sys.executable, *words], env=environment, stdout=output, stderr=output
        )
        running.add(process)
        try:
            status = process.wait()
        except KeyboardInterrupt as stopped:
            stop_commands(stopped)
            process.wait()  # it saves, and ends
            raise
        finally:
            running.discard(process)
    if status:
        raise RuntimeError(f"this command failed{f', see {log}' if log else ''}: {' '.join(words)}")
    if not stage.resumes:
        folder.rename(stage.folder)
    print(f"{stage.folder} is finished", flush=True)


def run(corpus: str, sst2: str, out: Path) -> None:
    """Runs all stages. Those at the end run at the same time: their batches are too small for
    several cores.
    """
    one_by_one, together = stages(corpus, sst2, out)
    run_all(out, one_by_one, [[stage] for stage in together])


def run_all(out: Path, one_by_one: list[Stage], chains: list[list[Stage]]) -> None:
    """Runs stages one by one, then chains of stages at the same time, all in one folder."""
    out.mkdir(parents=True, exist_ok=True)
    with lock(out):
        check_commands(out, [*one_by_one, *itertools.chain(*chains)])
        for stage in one_by_one:
            run_stage(stage)
        run_at_the_same_time(chains)


def run_at_the_same_time(chains: list[list[Stage]]) -> None:
    """Runs as many chains as there are cores at the same time, each on a core of its own. The
    stages of a chain run one after the other. Once one fails, no other stage starts.
    """
    must_stop = threading.Event()

    def run_chain(chain: list[Stage]) -> None:
        for stage in chain:
            if must_stop.is_set():
                return
            try:
                run_stage(stage, Path(f"{stage.folder}.log"))
            except BaseException:
                must_stop.set()
                raise

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        runs = [pool.submit(run_chain, chain) for chain in chains]
        try:
            for ended in runs:
                ended.result()
        except BaseException as stopped:  # Ctrl-C, too
            must_stop.set()
            stop_commands(stopped)
            raise


# ---- What they have shown ----------------------------------------------------


def at_best_rate(run: Path) -> list[float]:
    """Returns the accuracy of each seed, in percent, at the learning rate with the best mean."""
    rates = set(read_lines(run, "validation")["learning_rate"])
    return max((best_accuracies(run, rate) for rate in sorted(rates)), key=np.mean)


def accuracies(out: Path) -> dict[tuple[str, str], list[float]]:
    """Returns the accuracy of each seed, in percent, by start and share of the labels."""
    return {
        (start, share): at_best_rate(out / f"{start}-{share}")
        for start, share in itertools.product(STARTS, SHARES)
    }


def gain_table(out: Path) -> list[str]:
    """Returns the rows of a table: SST-2 dev accuracy by share of the labels."""
    rows = [
        "| labelled sentences | pretrained | from scratch | gain, points |",
        "|---|---|---|---|",
    ]
    found = accuracies(out)
    for share in SHARES:
        pretrained, scratch = (found[start, share] for start in STARTS)
        gain = np.mean(pretrained) - np.mean(scratch)
        means = " | ".join(f"{mean_and_deviation(values)}%" for values in (pretrained, scratch))
        rows.append(f"| {share} | {means} | {gain:+.1f} |")
    return rows


def loss_table(pretrain: Path, steps: tuple[int, ...]) -> list[str]:
    """Returns the rows of a table: what to expect after these steps of pretraining."""
    rows = ["| step | million tokens | MLM loss | NSP accuracy |", "|---|---|---|---|"]
    lines = read_lines(pretrain, "validation")
    for step in steps:
        i = lines["step"].index(step)
        tokens, loss, nsp = (lines[name][i] for name in ("tokens", "mlm_loss", "nsp_accuracy"))
        rows.append(f"| {step:,} | {tokens / 1e6:.1f} | {loss:.2f} | {100 * nsp:.0f}% |")
    return rows


@optional
def draw_afternoon(out: Path) -> None:
    """curves.png: the loss, and the gain at each share of the labels."""
    figure = new_figure((11, 4.2))
    loss, bars = figure.subplots(1, 2)
    plot_loss(loss, out / "pretrain")
    plot_gain(bars, accuracies(out))
    figure.savefig(out / "curves.png", dpi=120)


def plot_loss(axes: Any, pretrain: Path) -> None:
    """Draws the validation loss by tokens, and what is known from the tokens' frequencies."""
    lines = read_lines(pretrain, "validation")
    axes.plot(np.array(lines["tokens"]) / 1e6, lines["mlm_loss"], label="validation")
    for label, nats in unigrams(pretrain).items():
        axes.axhline(nats, color="black", linestyle=":", label=label)
    axes.set(xlabel="million tokens", ylabel="MLM loss, nats", title="pretraining on film reviews")
    axes.legend(fontsize=8)


def plot_gain(axes: Any, found: dict[tuple[str, str], list[float]]) -> None:
    """Draws a bar for each share of the labels and each start, its mean, and a dot for each seed.

    found: what `accuracies` returns.
    """
    for i, share in enumerate(SHARES):
        for j, (start, color) in enumerate(zip(STARTS, ("C2", "C0"), strict=True)):
            values = found[start, share]
            label = start if i == 0 else None
            x = i + (j - 0.5) * 0.36
            axes.bar(x, np.mean(values), 0.34, color=color, alpha=0.8, label=label)
            axes.plot([x] * len(values), values, "k.", markersize=3)
            axes.text(x, max(values) + 0.6, f"{np.mean(values):.1f}", ha="center", fontsize=8)
    axes.set_xticks(range(len(SHARES)), SHARES)
    axes.set(ylim=(50, 92), xlabel="labelled sentences", ylabel="SST-2 dev accuracy, %",
             title="fine-tuning; a dot is a seed")  # fmt: skip
    axes.legend(fontsize=8, loc="upper right")


@contextlib.contextmanager
def ends_in_one_message() -> Iterator[None]:
    """Ends the process without a traceback at Ctrl-C and when a command has failed."""
    try:
        yield
    except KeyboardInterrupt:
        sys.exit("stopped; the same command goes on from here")
    except (RuntimeError, ValueError, OSError) as error:
        sys.exit(str(error))


def main(corpus: str, sst2: str, out: str) -> None:
    signal.signal(signal.SIGTERM, terminate)
    with ends_in_one_message():
        run(corpus, sst2, Path(out))
        print(*gain_table(Path(out)), sep="\n")
        draw_afternoon(Path(out))
        if (Path(out) / "curves.png").exists():
            print(f"{out}/curves.png shows it")


if __name__ == "__main__":
    main(*sys.argv[1:])
