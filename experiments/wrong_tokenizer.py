"""A pretrained model with another tokenizer, for train_sst2.py: ids refer to other tokens.

python -m experiments.wrong_tokenizer SST2_DIR MODEL OUT
"""

import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import data
from experiments.lines import print_lines
from train_sst2 import get_reviews


def wrong_tokenizer(dataset: str, model: str, out: str) -> Iterator[dict]:
    """Copies a model's folder, with a vocabulary learned from SST-2 in place of its own, and
    without the hash in config.json, by which it would be noticed.
    """
    shutil.copytree(model, out)
    config = json.loads((Path(out) / "config.json").read_text())
    texts, _ = get_reviews(dataset, "train")
    tokenizer = data.train_tokenizer(texts, config["vocab_size"])
    tokenizer.save(f"{out}/tokenizer.json")
    tokenizer.model.save(out)
    config.pop("tokenizer_hash", None)
    (Path(out) / "config.json").write_text(json.dumps(config, indent=2))
    own = data.load_tokenizer(model).get_vocab()
    same = sum(own.get(token) == i for token, i in tokenizer.get_vocab().items())
    yield {"tokens": tokenizer.get_vocab_size(), "with the same id": same}


if __name__ == "__main__":
    print_lines(wrong_tokenizer(*sys.argv[1:]))
