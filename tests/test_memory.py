"""A run of days must not grow: what the data pipeline holds in memory is bounded."""

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
from strategies import LETTERS, corpus_of, small_tokenizer, write_texts
from torch.utils.data import DataLoader

import data
from extras import streaming

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="needs Linux"),
]
# Pages that forked workers share are copied when first written to, if only a reference is counted:
# that ends, and the warm-up is for it.
BATCHES, WARM_UP, EVERY = 5000, 3000, 100
LIMIT = 16  # KiB in a hundred batches


def proportional_set_size(loader: DataLoader, iterator) -> float:
    """KiB of this process and the loader's workers; a page that n share counts 1/n in each.

    Of anonymous and shared memory: pages of files, as of libraries, are shared with whatever else
    the machine runs, so that their part changes when another process ends.
    """
    workers = [worker.pid for worker in getattr(iterator, "_workers", [])]
    texts = (Path(f"/proc/{pid}/smaps_rollup").read_text() for pid in (os.getpid(), *workers))
    parts = (re.findall(r"^Pss_(?:Anon|Shmem):\s+(\d+) kB$", text, re.M) for text in texts)
    return sum(int(kib) for found in parts for kib in found)


def slope(loader: DataLoader) -> float:
    """Returns the KiB by which a hundred batches make all processes grow: the median over pairs of
    measurements (Theil-Sen), which a single jump does not move."""
    gc.freeze()  # as the training script does, before the workers are forked
    iterator, sizes = iter(loader), []
    for index in range(BATCHES + 1):
        next(iterator)
        if index >= WARM_UP and index % EVERY == 0:
            sizes.append(proportional_set_size(loader, iterator))
    gc.unfreeze()
    pairs = [(sizes[j] - sizes[i]) / (j - i) for j in range(len(sizes)) for i in range(j)]
    return float(np.median(pairs))


def in_a_new_process(function: Callable[..., float], *arguments) -> float:
    """Returns what a function of this file returns in a fresh process. This one has run other
    tests, and its memory moves with what they have left behind.
    """
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as executor:
        return executor.submit(with_forked_workers, function, *arguments).result()


def with_forked_workers(function: Callable[..., float], *arguments) -> float:
    multiprocessing.set_start_method("fork", force=True)  # a spawned process would spawn, too
    return function(*arguments)


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
    rows, _ = streaming.open_stream(str(folder), None, "text")
    how = {"tokenizer": small_tokenizer(), "batch_size": 8,
           "make_dataset": partial(data.PretrainDataset, max_seq_length=64)}  # fmt: skip
    return streaming.get_stream_dataloader(rows, "text", streaming.new_progress(2), 0, 1, **how)


def slope_of_map_style(leak: int) -> float:
    return slope(map_style(leak))


def slope_of_stream(folder: Path) -> float:
    streaming.BLOCK = 100_000  # characters, so that many blocks are read
    return slope(streamed(folder))


def test_the_loader_does_not_grow():
    """A leak of 2,000 bytes in each batch of 8, as a control, is noticed."""
    clean = in_a_new_process(slope_of_map_style, 0)
    leaks = in_a_new_process(slope_of_map_style, 250)
    print(f"KiB in 100 batches: {clean:.1f}, with a leak {leaks:.1f}")
    assert clean < LIMIT
    assert leaks > 100  # of 195


def test_the_streaming_loader_does_not_grow(shards):
    """It reads many blocks and epochs."""
    grown = in_a_new_process(slope_of_stream, shards)
    print(f"KiB in 100 batches: streaming {grown:.1f}")
    assert grown < LIMIT
