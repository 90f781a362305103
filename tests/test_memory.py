"""A run of days must not grow: what the data pipeline holds in memory is bounded.

Measured is what malloc has given away and not got back, in this process and in each data worker.
The pages that a process holds would say less: they also move with the gaps between allocations,
with copies of shared pages, and with what the kernel does.
"""

import ctypes
import gc
import multiprocessing
import os
import re
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from strategies import LETTERS, corpus_of, small_tokenizer, write_texts
from torch.utils.data import DataLoader

import data

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="needs glibc 2.33"),
]
EVERY = 100  # batches from one measurement to the next
WARM_UP, BATCHES = 1000, 2500  # caches are filled during the warm-up
LIMIT = 16  # KiB in a hundred batches
SHARED_LIMIT = 4  # MiB: through it the workers hand over the batches, 12 KiB each


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
    return {**batch, "memory": torch.tensor([os.getpid(), bytes_in_use()])}


def shared_memory() -> float:
    """Returns the MiB of shared memory that this process has mapped."""
    (kib,) = re.findall(
        r"^Pss_Shmem:\s+(\d+) kB$", Path("/proc/self/smaps_rollup").read_text(), re.M
    )
    return int(kib) / 1024


def slope(make_loader: Callable[..., DataLoader], *arguments, warm_up=WARM_UP, batches=BATCHES):
    """Returns the KiB by which a hundred batches make all processes grow: the median over pairs of
    measurements (Theil-Sen), which a single jump does not move."""
    multiprocessing.set_start_method("fork", force=True)  # for the workers; this one is spawned
    torch.cuda.is_available = lambda: False  # pinned memory would be counted as shared
    data.collate = collate_and_measure
    loader = make_loader(*arguments)
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


@pytest.fixture
def slope_in_a_new_process(monkeypatch) -> Callable[..., float]:
    """Returns `slope`, run in a fresh process: what other tests leave behind is not in it.

    Its environment lets Python and Arrow take all memory from malloc, and lets malloc itself keep
    no freed pieces, which it counts as given away.
    """
    monkeypatch.setenv("PYTHONMALLOC", "malloc")
    monkeypatch.setenv("ARROW_DEFAULT_MEMORY_POOL", "system")
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.tcache_count=0:glibc.malloc.mxfast=0")

    def run(*arguments, **keywords) -> float:
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(1, mp_context=context) as executor:
            return executor.submit(slope, *arguments, **keywords).result()

    return run


def map_style(leak: int = 0) -> DataLoader:
    documents = [[[5 + (i * j + k) % 26 for k in range(12)] for j in range(20)] for i in range(200)]
    dataset = data.PretrainDataset(corpus_of(documents), small_tokenizer(), 64)
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


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("shards")
    for shard in range(2):
        texts = [" ".join(LETTERS[i % 20 :][:5]) + "ab. " for i in range(400)]
        write_texts(folder / f"train-{shard}.jsonl", [text * 40 for text in texts])
    write_texts(folder / "validation.jsonl", [text * 40 for text in texts[:2]])
    return folder


def streamed(folder: Path) -> DataLoader:
    data.STREAM_BLOCK = 25_000  # tokens, so that many blocks are read
    make = partial(data.PretrainDataset, tokenizer=small_tokenizer(), max_seq_length=64)
    stream = data.Stream(str(folder), small_tokenizer(), make)
    return data.get_split_dataloader(stream, 8, workers=2)


@pytest.mark.slow
def test_the_loader_does_not_grow(slope_in_a_new_process):
    """A leak of 2,000 bytes in each batch of 8, as a control, is noticed."""
    clean = slope_in_a_new_process(map_style)
    leaks = slope_in_a_new_process(map_style, 250, warm_up=500, batches=1000)
    print(f"KiB in 100 batches: {clean:.1f}, with a leak {leaks:.1f}")
    assert clean < LIMIT
    assert leaks > 200  # of about 270, with what malloc adds to each piece


@pytest.mark.slow
def test_the_streaming_loader_does_not_grow(slope_in_a_new_process, shards):
    """It reads many blocks and epochs."""
    grown = slope_in_a_new_process(streamed, shards)
    print(f"KiB in 100 batches: streaming {grown:.1f}")
    assert grown < LIMIT
