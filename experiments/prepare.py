"""The data of an afternoon, as folders for train_pretrain.py and train_sst2.py.

python -m experiments.prepare reviews stanfordnlp/imdb OUT
python -m experiments.prepare fewer stanfordnlp/sst2 10 OUT    # every tenth labeled sentence
"""

import sys

import datasets

import data

LINE_BREAK = "<br />"


def without_breaks(row: dict[str, str]) -> dict[str, str]:
    return {"text": row["text"].replace(LINE_BREAK, "\n")}


def reviews(corpus: str, out: str) -> None:
    """Writes the reviews of IMDB without the line breaks of HTML.

    Labels do not matter for pretraining, so the splits train and unsupervised are trained on. A
    paragraph ends with two "<br />", which become a blank line: a sentence ends there.
    """
    splits = data.get_dataset(corpus, split=None)
    names = [name for name in ("train", "unsupervised") if name in splits]
    parts = {"train": datasets.concatenate_datasets([splits[name] for name in names])}
    if "validation" in splits:
        parts["validation"] = splits["validation"]
    for name, rows in parts.items():
        texts = rows.select_columns("text").map(without_breaks)
        texts.to_parquet(f"{out}/{name}.parquet")


def fewer(dataset: str, every: str, out: str) -> None:
    """Writes training sentences 0, n, 2n, ... (n = `every`), and the whole validation split."""
    splits = data.get_dataset(dataset, split=None)
    kept = range(0, len(splits["train"]), int(every))
    splits["train"].select(kept).to_parquet(f"{out}/train.parquet")
    splits["validation"].to_parquet(f"{out}/validation.parquet")


if __name__ == "__main__":
    if sys.argv[1] == "reviews":
        reviews(*sys.argv[2:])
    else:
        fewer(*sys.argv[2:])
