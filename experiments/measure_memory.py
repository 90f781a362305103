"""The memory of many data workers, over time: 16 of them, each with 10 batches waiting.

    python -m experiments.measure_memory CORPUS VOCABULARY SECONDS >> results/memory.jsonl
    python -m experiments.measure_memory CORPUS VOCABULARY SECONDS lists \
        >> results/memory_lists.jsonl

The setting in which the author of the first version ran out of memory after 16 hours. A line every
ten seconds; KiB are proportional set sizes, in which a page that n processes share counts 1/n. With
"lists", the workers read a tenth of the corpus from lists of Python's integers, as one writes it
first: to read an object is to count a reference to it, and so each worker comes to own every page.
"""

import gc
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch


import data

WORKERS, PREFETCH, BATCH, LENGTH = 16, 10, 256, 128


class Lists(torch.utils.data.Dataset):
    """Lines of tokens in a list: 8 bytes for each, and 28 for the integer itself."""

    seed, padding_idx = 0, 0

    def __init__(self, corpus: data.TokenizedCorpus) -> None:
        tokens = corpus.tokens[: len(corpus) // 10]
        starts = range(0, len(tokens) - LENGTH, LENGTH)
        self.lines = [tokens[start : start + LENGTH].tolist() for start in starts]

    def __len__(self) -> int:
        return len(self.lines)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        input_ids = np.array(self.lines[index % len(self)])
        label = np.array(0)
        names = ("input_ids", "token_type_ids", "mlm_labels")
        return {**dict.fromkeys(names, input_ids), "nsp_labels": label}


def kib(pid: int) -> int:
    text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    return int(text.split("\nPss:")[1].split()[0])


def main(corpus: str, vocabulary: str, seconds: str, way: str = "mapped") -> None:
    tokenizer = data.load_tokenizer(vocabulary)
    tokenized = data.get_corpus(corpus, "train", tokenizer)
    dataset: Any = (
        Lists(tokenized) if way == "lists" else data.PretrainDataset(tokenized, tokenizer, LENGTH)
    )
    if way == "mapped":
        gc.freeze()
    loader = data.get_split_dataloader(dataset, BATCH, workers=WORKERS)
    loader.prefetch_factor = PREFETCH
    iterator: Any = iter(loader)
    started, batches, shown = time.perf_counter(), 0, 0.0
    while (now := time.perf_counter() - started) < float(seconds):
        next(iterator)
        batches += 1
        if now - shown >= 10:
            shown = now
            workers = [kib(worker.pid) for worker in iterator._workers]
            line = {"seconds": round(now, 1), "batches": batches, "main_kib": kib(os.getpid())}
            line |= {"workers_kib": sum(workers), "largest_worker_kib": max(workers)}
            about = {"workers": WORKERS, "prefetch": PREFETCH, "batch": BATCH, "length": LENGTH}
            print(json.dumps({**line, **about}), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
