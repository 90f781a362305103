"""SST-2 with batches of similar lengths beside batches in plain random order: the same model, rate,
seeds. Appends a line for each run to results/bucketing.jsonl.

    python -m experiments.compare_bucketing DIR vocab.txt
"""

import json
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch


import data
from bert import BertConfig, SST2BertModel
from support.devices import keep_freed_memory
from train_sst2 import SST2Batches, encode_sentences, fine_tune, get_reviews

RESULTS = Path(__file__).parents[1] / "results"


class ShuffledBatches(SST2Batches):
    """As its parent, without regard to lengths."""

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        rng = np.random.default_rng((self.seed or 0, 2, self.epoch, 0))
        order = rng.permutation(len(self.rows))
        for numbers in np.split(order, range(self.batch_size, len(order), self.batch_size)):
            rows = [torch.tensor(self.rows[i]) for i in numbers]
            yield {
                "input_ids": torch.nn.utils.rnn.pad_sequence(rows, True, self.padding_idx),
                "labels": torch.tensor([self.labels[i] for i in numbers]),
            }


def padding(batches: SST2Batches) -> float:
    cells = sum(batch["input_ids"].numel() for batch in batches)
    return 1 - sum(map(len, batches.rows)) / cells


def main(dataset: str, vocabulary: str) -> None:
    size, rate = "tiny", 5e-4
    keep_freed_memory()
    tokenizer = data.load_tokenizer(vocabulary)

    def load(split: str, kind: type, seed: int | None) -> SST2Batches:
        texts, labels = get_reviews(dataset, split)
        return kind(encode_sentences(tokenizer, texts, 128), labels, 32, seed=seed)

    validation = load("validation", SST2Batches, None)
    for seed in range(3):
        for kind in (SST2Batches, ShuffledBatches):
            train = load("train", kind, seed)
            torch.manual_seed(seed)
            config = BertConfig.named(size, vocab_size=30522, max_seq_length=128)
            model, started = SST2BertModel(config, 0), time.perf_counter()
            with tempfile.TemporaryDirectory() as out:
                _, accuracy = fine_tune(model, train, validation, 1, rate, seed, Path(out), 1000)
            line = {
                "batches": kind.__name__, "size": size, "learning_rate": rate, "seed": seed,
                "epochs": 1, "padding": round(padding(train), 4), "accuracy": round(accuracy, 4),
                "seconds": round(time.perf_counter() - started), "threads": torch.get_num_threads(),
            }  # fmt: skip
            print(line)
            with (RESULTS / "bucketing.jsonl").open("a") as file:
                file.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:3])
