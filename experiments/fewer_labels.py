"""SST-2 with a tenth of its training sentences, for train_sst2.py.

python -m experiments.fewer_labels SST2_DIR OUT
"""

import sys
from collections.abc import Iterator
from pathlib import Path

import data
from experiments.lines import print_lines


def tenth(dataset: str, out: str) -> Iterator[dict]:
    """Writes every tenth sentence of the training split, and the whole validation split."""
    Path(out).mkdir()
    for split in ("train", "validation"):
        rows = data.get_dataset(dataset, split=split)
        if split == "train":
            rows = rows.select(range(0, len(rows), 10))
        rows.to_parquet(f"{out}/{split}.parquet")
        yield {"split": split, "rows": len(rows)}


if __name__ == "__main__":
    print_lines(tenth(*sys.argv[1:]))
