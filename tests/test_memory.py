"""A run that takes days must not use ever more memory: what the data pipeline holds is bounded.

The test measures what malloc has allocated and not freed, in this process and in each data worker.
The number of resident pages would say less: it also varies with fragmentation, with copies of
shared pages, and with what the kernel does.
"""

import ctypes
import gc
import json
import multiprocessing
import os
import re
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import python
from strategies import corpus_of, small_tokenizer, write_many_documents
from torch.utils.data import DataLoader

import data

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="needs glibc 2.33"),
]
EVERY = 50  # batches from one measurement to the next
WARM_UP, BATCHES = 500, 1500  # caches are filled during the warm-up
LIMIT = 12  # KiB in fifty batches
SHARED_LIMIT = 4  # MiB: through it the workers hand over the batches, 5 KiB each
LEAK = 200  # bytes of each example


class MallocInfo(ctypes.Structure):
    """struct mallinfo2 of malloc.h."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in (
            "arena", "ordblks", "smblks", "hblks", "hblkhd",
            "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost",
        )
    ]  # fmt: skip


def bytes_in_use() -> int:
    """Returns the bytes that this process has allocated and not freed."""
    mallinfo2 = ctypes.CDLL(None).mallinfo2
    mallinfo2.restype = MallocInfo
    info = mallinfo2()
    return info.uordblks + info.hblkhd


def collate_and_measure(*arguments, collate=data.collate, **keywords) -> dict:
    """Returns the batch of `data.collate`, and the memory of the worker that makes it."""
    batch = collate(*arguments, **keywords)
    gc.collect()
    return {**batch, "memory": torch.tensor([os.getpid(), bytes_in_use()])}


def shared_memory() -> float:
    """Returns the MiB of shared memory that this process has mapped."""
    (kib,) = re.findall(
        r"^Pss_Shmem:\s+(\d+) kB$", Path("/proc/self/smaps_rollup").read_text(), re.M
    )
    return int(kib) / 1024


def slope(loader: DataLoader, warm_up: int = WARM_UP, batches: int = BATCHES) -> float:
    """Returns the KiB by which fifty batches make all processes grow: the median over pairs of
    measurements (Theil-Sen), which a single jump does not move."""
    gc.freeze()  # as the training script does, before the workers are forked
    iterator, of_worker, sizes = iter(loader), {}, []
    for index in range(batches + 1):
        worker, size = next(iterator)["memory"].tolist()
        of_worker[worker] = size
        if index >= warm_up and index % EVERY == 0:
            gc.collect()
            assert worker != os.getpid()
            sizes.append((bytes_in_use() + sum(of_worker.values())) / 1024)
    assert len(of_worker) == 2
    assert shared_memory() < SHARED_LIMIT
    pairs = [(sizes[j] - sizes[i]) / (j - i) for j in range(len(sizes)) for i in range(j)]
    return float(np.median(pairs))


def map_style(leak: int = 0) -> DataLoader:
    documents = [[[5 + (i * j + k) % 26 for k in range(12)] for j in range(20)] for i in range(20)]
    dataset = data.PretrainDataset(corpus_of(documents), small_tokenizer(), 24)
    return data.get_split_dataloader(leaking(dataset, leak), 8, workers=2)


def leaking(dataset, size: int):
    """Returns a dataset that keeps `size` bytes of each example, which the test must notice."""
    kept = []

    class Leaking(type(dataset)):
        def __getitem__(self, index):
            kept.append(bytearray(os.urandom(size)))
            return super().__getitem__(index)

    if size:
        dataset.__class__ = Leaking
    return dataset


def streamed(folder: Path) -> DataLoader:
    data.STREAM_BLOCK = 500  # tokens, so that many blocks are read
    make = partial(data.PretrainDataset, tokenizer=small_tokenizer(), max_seq_length=24)
    documents = data.get_documents(str(folder), streaming=True)["train"]
    stream = data.Stream(documents, small_tokenizer(), make)
    return data.get_split_dataloader(stream, 8, workers=2)


def main(folder: str) -> None:
    """Prints the slopes of a loader, of one with a leak, and of one of a stream."""
    multiprocessing.set_start_method("fork")
    torch.cuda.is_available = lambda: False  # pinned memory would be counted as shared
    data.collate = collate_and_measure
    found = {
        "clean": slope(map_style()),
        "leaking": slope(map_style(LEAK), warm_up=100, batches=400),
        "stream": slope(streamed(Path(folder))),
    }
    print(json.dumps(found))


def test_the_loader_does_not_grow(tmp_path):
    """It grows neither with a corpus in memory nor with a stream read in many blocks and epochs. As
    a control, a leak of 200 bytes per example is detected.

    All are measured in a separate process, in which Python and Arrow get all memory from malloc,
    and malloc caches no freed chunks, which it would count as allocated.
    """
    for shard in (0, 1):
        write_many_documents(tmp_path / f"train-{shard}.jsonl")
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(sys.path),
        "PYTHONMALLOC": "malloc",
        "ARROW_DEFAULT_MEMORY_POOL": "system",
        "GLIBC_TUNABLES": "glibc.malloc.tcache_count=0:glibc.malloc.mxfast=0",
    }
    ended = python(__file__, str(tmp_path), env=environment)
    assert ended.returncode == 0, ended.stderr
    grown = json.loads(ended.stdout)
    print("KiB in 50 batches:", grown)
    assert grown["clean"] < LIMIT
    assert grown["stream"] < LIMIT
    assert grown["leaking"] > 0.7 * EVERY * 8 * LEAK / 1024  # and what malloc adds to each piece


if __name__ == "__main__":
    main(sys.argv[1])
