"""The memory of many data workers, over time: 16 of them, each with 10 batches waiting.

    python results/measure_memory.py CORPUS VOCABULARY SECONDS >> results/memory.jsonl

The setting in which the author of the first version ran out of memory after 16 hours. A line every
ten seconds; KiB are proportional set sizes, in which a page that n processes share counts 1/n.
"""

import gc
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import data

WORKERS, PREFETCH, BATCH, LENGTH = 16, 10, 256, 128


def kib(pid: int) -> int:
    text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    return int(text.split("\nPss:")[1].split()[0])


def main(corpus: str, vocabulary: str, seconds: str) -> None:
    tokenizer = data.load_tokenizer(vocabulary)
    dataset = data.PretrainDataset(
        data.get_corpus(corpus, "train", tokenizer, processes=2), tokenizer, LENGTH
    )
    loader = data.get_split_dataloader(dataset, BATCH, workers=WORKERS)
    loader.prefetch_factor = PREFETCH
    gc.freeze()
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
