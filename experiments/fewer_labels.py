"""SST-2 with fewer training sentences, for train_sst2.py.

python -m experiments.fewer_labels SST2_DIR 10 OUT     # every tenth sentence
"""

import sys
from collections.abc import Iterator
from pathlib import Path

import data
from experiments.lines import print_lines
from support.folder import lock


def fewer_labels(dataset: str, every: str, out: str) -> Iterator[dict]:
    """Writes the first of every so many sentences of the training split, and the whole validation
    split.
    """
    Path(out).mkdir(parents=True)
    with lock(Path(out)):
        for split in ("train", "validation"):
            rows = data.get_dataset(dataset, split=split)
            if split == "train":
                rows = rows.select(range(0, len(rows), int(every)))
            rows.to_parquet(f"{out}/{split}.parquet")
            yield {"split": split, "rows": len(rows)}


if __name__ == "__main__":
    print_lines(fewer_labels(*sys.argv[1:]))
