"""Film reviews without the line breaks of HTML, for train_pretrain.py.

python -m experiments.clean_reviews stanfordnlp/imdb OUT
"""

import sys
from collections.abc import Iterator
from pathlib import Path

import datasets

import data
from experiments.lines import print_lines
from support.folder import lock

LINE_BREAK = "<br />"


def without_breaks(row: dict) -> dict:
    return {"text": row["text"].replace(LINE_BREAK, "\n")}


def clean_reviews(corpus: str, out: str) -> Iterator[dict]:
    """Writes a parquet file for training, and one for validation if the corpus has that split.

    IMDB has the splits train, unsupervised and test. Labels do not matter for pretraining, so the
    first two are trained on. Its paragraphs end with two "<br />", which become a blank line: a
    sentence ends there.
    """
    splits = data.get_dataset(corpus, split=None)
    parts = {"train": [splits[name] for name in ("train", "unsupervised") if name in splits]}
    if "validation" in splits:
        parts["validation"] = [splits["validation"]]
    folder = Path(out)
    folder.mkdir(parents=True)
    with lock(folder):
        for name, rows in parts.items():
            texts = datasets.concatenate_datasets([part.select_columns("text") for part in rows])
            cleaned = texts.map(without_breaks)
            cleaned.to_parquet(folder / f"{name}.parquet")
            yield {"split": name, "reviews": len(cleaned)}


if __name__ == "__main__":
    print_lines(clean_reviews(*sys.argv[1:]))
