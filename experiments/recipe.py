"""The recipe of an afternoon, changed in one place at a time: short runs, compared.

python -m experiments.recipe stanfordnlp/imdb stanfordnlp/sst2 bert-base-uncased runs/recipe

The third word is a tokenizer with another vocabulary, as train_pretrain.py takes it. After a break
the same line goes on, as `make afternoon` does.
"""

import sys
from pathlib import Path

from experiments.afternoon import RECIPE, Stage, ends_in_one_message, run_all
from experiments.story import best_accuracies, mean_and_deviation
from support.curves import read_lines

# 2,500 steps of 64 x 64 are 10 million tokens with padding, at whose end the learning rate is 0.
LENGTH = ["--steps", "2500"]
# Examples twice as long, half as many in a batch: as many tokens in a step.
LONGER = "--max-seq-length 128 --batch-size 32".split()
# Half as many tokens in a step, and twice as many steps.
MORE_STEPS = "--batch-size 32 --steps 5000 --warmup-steps 800 --eval-every 500".split()
# Every hundredth labelled sentence; the rate and the epochs of an afternoon.
FINE_TUNING = "--learning-rate 3e-4 --epochs 30 --seeds 5".split()


def changes(vocabulary: str) -> dict[str, tuple[str, list[str]]]:
    """Returns a folder's name, what is changed, and the options that change it."""
    return {
        "base": ("nothing", []),
        "length-128": ("32 examples of 128 tokens", LONGER),
        "batch-32": ("batches of 32, twice the steps", MORE_STEPS),
        "rate-2e-3": ("peak rate 2e-3", ["--learning-rate", "2e-3"]),
        "rate-5e-4": ("peak rate 5e-4", ["--learning-rate", "5e-4"]),
        "dropout": ("dropout 0.1", ["--dropout", "0.1"]),
        "vocabulary-30522": ("the published vocabulary", ["--tokenizer", vocabulary]),
    }


def stages(
    corpus: str, sst2: str, vocabulary: str, out: Path
) -> tuple[list[Stage], list[list[Stage]]]:
    """Returns what is run first, and a chain of two stages for each change: pretraining, and
    fine-tuning.
    """
    reviews, sentences = out / "reviews", out / "sst2-hundredth"
    first = [
        Stage(reviews, ["-m", "experiments.clean_reviews", corpus]),
        Stage(sentences, ["-m", "experiments.fewer_labels", sst2, "100"]),
    ]
    pretrain = ["train_pretrain.py", "--dataset", str(reviews), *RECIPE, *LENGTH]
    chains = []
    for name, (_, options) in changes(vocabulary).items():
        folder = out / name / "pretrain"
        weights = ["--weights", str(folder / "model")]
        finetune = ["train_sst2.py", "--dataset", str(sentences), *weights, *FINE_TUNING, "--out"]
        chains.append(
            [
                Stage(folder, [*pretrain, *options, "--out"], resumes=True),
                Stage(out / name / "hundredth", finetune),
            ]
        )
    return first, chains


def end_of(pretrain: Path) -> str:
    """Returns three cells of a table: million tokens, MLM loss, NSP accuracy, at the end."""
    last = {name: values[-1] for name, values in read_lines(pretrain, "validation").items()}
    return (
        f"{last['tokens'] / 1e6:.1f} | {last['mlm_loss']:.2f} | {100 * last['nsp_accuracy']:.0f}%"
    )


def table(out: Path) -> list[str]:
    """Returns the rows of a table: what was changed, and what came of it. The accuracy is
    that after fine-tuning with a hundredth of the labels.

    MLM losses of different vocabularies are not comparable, those of different lengths hardly.
    """
    rows = [
        "| changed | million tokens | MLM loss | NSP accuracy | SST-2 dev accuracy, % |",
        "|---|---|---|---|---|",
    ]
    for name, (what, _) in changes("").items():
        if not (out / name / "hundredth").exists():
            continue
        accuracies = best_accuracies(out / name / "hundredth")
        rows.append(
            f"| {what} | {end_of(out / name / 'pretrain')} | {mean_and_deviation(accuracies)} |"
        )
    return rows


def main(corpus: str, sst2: str, vocabulary: str, out: str) -> None:
    with ends_in_one_message():
        run_all(Path(out), *stages(corpus, sst2, vocabulary, Path(out)))
    print(*table(Path(out)), sep="\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
