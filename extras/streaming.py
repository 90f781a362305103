"""Pretraining on a stream: a corpus that is read without storing it, because it exceeds the disk.

Each data worker reads shards of its own, one block of documents at a time. It treats a block as
data.py treats a whole corpus: tokens, pairs, masks, in a random order. So only the documents of one
block are shuffled among each other, and no shuffle buffer holds rows that a kill would lose.

How far a worker is, is its bookmark: {"rows": the state of the library's reader, "documents": how
many it has read, "block": the index of its block, "batch": how many batches of the block it made}.
A checkpoint holds the bookmarks of all workers, and a resumed run reads on from them.
"""

import copy
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator
from itertools import chain, islice
from typing import Any

import torch
from datasets import Dataset
from datasets.distributed import split_dataset_by_node
from tokenizers import Tokenizer
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

import data

BLOCK = 4_000_000  # characters, about 8,000 examples of 128 tokens: 4 MB of tokens
HELD_OUT_DOCUMENTS = 64
END_OF_EPOCH = object()


def is_held_out(text: Any) -> bool:
    """Returns True for one document in a hundred, in whatever order they come."""
    return zlib.crc32(str(text).encode()) % 100 == 0


def is_trained_on(text: Any) -> bool:
    """Not a lambda: workers that are not forked are sent it by its name."""
    return not is_held_out(text)


def open_stream(
    path: str,
    name: str | None,
    column: str,
    rows_per_document: int = 1,
    train_split: str = "train",
) -> tuple[Any, list]:
    """Returns the documents to train on, a `datasets.IterableDataset`, and 64 to evaluate on.

    The latter are of the split "validation". Without such a split, or if it is trained on, they are
    held out of `train_split`, which must be one whole split.
    """
    splits = data.get_dataset(path, name, split=None, streaming=True)
    if train_split not in splits:
        raise ValueError(
            f"--streaming reads one whole split of {path}, one of {', '.join(splits)}; "
            f"--split {train_split} is none of them"
        )
    first_row = next(iter(splits[train_split]), None)
    if first_row is None:
        raise ValueError(f"{path} has no row to train on")
    if column not in first_row:
        raise ValueError(f"no --text-column {column} in the first row of {path}: {list(first_row)}")
    rows = {split: documents.select_columns(column) for split, documents in splits.items()}
    if rows_per_document > 1:
        rows = {split: documents.batch(rows_per_document) for split, documents in rows.items()}

    train = rows[train_split]
    held_out = rows.get("validation")
    if held_out is None or train_split == "validation":
        held_out = train.filter(is_held_out, input_columns=column)
        train = train.filter(is_trained_on, input_columns=column)
    texts = [row[column] for row in islice(held_out, HELD_OUT_DOCUMENTS)]
    if len(texts) < 2:
        raise ValueError(
            f"--streaming: {path} has {len(texts)} documents to evaluate on, and 2 are needed: a"
            " split named validation, or one of a hundred documents to train on; a small corpus"
            " needs no --streaming"
        )
    return train, texts


def tokenize_block(
    texts: list[str], first_index: int, tokenizer: Tokenizer
) -> data.TokenizedCorpus:
    """Returns a block as a corpus in memory. first_index: of its first document, for errors."""
    indices = list(range(first_index, first_index + len(texts)))
    columns = data.tokenize_documents({"text": texts}, indices, tokenizer, "text")
    return data.TokenizedCorpus(Dataset.from_dict(columns))


def readable(rows: Any) -> Iterator[dict]:
    """Yields the rows. What the libraries raise for a file that they cannot read becomes a
    ValueError of one line, since not all of their errors can be passed on by a data worker.
    """
    iterator = iter(rows)
    while True:
        try:
            row = next(iterator)
        except StopIteration:
            return
        except Exception as error:  # of pyarrow, datasets, codecs, fsspec
            reason = (str(error) or type(error).__name__).splitlines()[0]
            raise ValueError(f"a part of the stream cannot be read: {reason}") from error
        yield row


class StreamedBatches(IterableDataset):
    """Yields batches without end, each with the bookmark behind it under the key "bookmark".

    Every example of a block comes once. The last batch of a block is filled up with examples of the
    same block, under other masks.
    """

    def __init__(
        self,
        rows: Any,
        column: str,
        bookmarks: list,
        next_worker: int,
        first_worker: int,
        worker_count: int,
        tokenizer: Tokenizer,
        batch_size: int,
        make_dataset: Callable[[data.TokenizedCorpus, Tokenizer], data.PretrainDataset],
    ) -> None:
        """rows, column: the documents of this rank, and where their text is.
        bookmarks: of each worker of this rank; None starts at the beginning.
        next_worker: the worker of this rank that makes the next batch.
        first_worker, worker_count: the index of this rank's first worker among the workers of all
        ranks, and how many these are.
        """
        self.rows, self.column = rows, column
        self.bookmarks, self.next_worker = bookmarks, next_worker
        self.first_worker, self.worker_count = first_worker, worker_count
        self.tokenizer, self.batch_size = tokenizer, batch_size
        self.make_dataset = make_dataset

    def documents(self, bookmark: dict) -> Iterator[tuple[dict, Any]]:
        """Yields each document, then END_OF_EPOCH, and so on; each with the bookmark behind it."""
        rows, index = copy.deepcopy(self.rows), bookmark["documents"]
        if bookmark["rows"]:
            rows.load_state_dict(bookmark["rows"])
        while True:
            index_before = index
            for row in readable(rows):
                index += 1
                behind = {"rows": copy.deepcopy(rows.state_dict()), "documents": index}
                yield behind, row[self.column]
            if index == index_before and not bookmark["rows"]:
                raise ValueError("a data worker has no document to read")
            bookmark = {"rows": None, "documents": index}
            yield bookmark, END_OF_EPOCH
            rows = copy.deepcopy(self.rows)  # the other would start at its loaded state again

    def __iter__(self) -> Iterator[dict | None]:
        info = get_worker_info()
        worker = info.id if info else 0
        if worker < self.next_worker:
            yield None  # the loader asks worker 0 first, but it is another one's turn
        start: dict[str, Any] = {"rows": None, "documents": 0, "block": 0, "batch": 0}
        bookmark = self.bookmarks[worker] or start
        documents = self.documents(bookmark)
        while True:
            texts, behind = read_block(documents)
            block_index = bookmark["block"] * self.worker_count + self.first_worker + worker
            batches = self.batches(texts, bookmark["documents"], block_index)
            remaining = islice(batches, bookmark["batch"], None)
            for batches_made, batch in enumerate(remaining, bookmark["batch"] + 1):
                yield {**batch, "bookmark": {**bookmark, "batch": batches_made}}
            bookmark = {**behind, "block": bookmark["block"] + 1, "batch": 0}

    def batches(self, texts: list[str], first_index: int, block_index: int) -> Iterator[dict]:
        """Yields the batches of a block. Its index, among the blocks of all workers, is the epoch
        of every random draw, so no two blocks draw the same numbers.
        """
        corpus = tokenize_block(texts, first_index, self.tokenizer)
        dataset = self.make_dataset(corpus, self.tokenizer)
        order = data.permutation(dataset.seed, block_index, len(dataset)).tolist()
        passes = chain.from_iterable(
            [(block_index * 2**20 + again) * len(order) + i for i in order]
            for again in range(2**20)
        )
        for _ in range(0, len(order), self.batch_size):
            yield dataset.batch(list(islice(passes, self.batch_size)))


def read_block(documents: Iterator[tuple[dict, Any]]) -> tuple[list, dict]:
    """Returns the documents of a block, and the bookmark behind them.

    A block ends after `BLOCK` characters, or at the end of an epoch. In either case it has at least
    two documents with a next sentence, or no pair could be made of it.
    """
    texts: list = []
    size = usable = epochs = 0
    while True:
        behind, text = next(documents)
        if text is END_OF_EPOCH:
            epochs += 1
        else:
            texts.append(text)
            size += len(str(text))
            parts = text if isinstance(text, list) else [text]
            whole = "\n\n".join(str(part) for part in parts if part)
            if usable < 2 and len(data.split_sentences(whole)) > 1:
                usable += 1
        if usable > 1 and (text is END_OF_EPOCH or size >= BLOCK):
            return texts, behind
        if usable < 2 and epochs > 2:
            raise ValueError(f"a data worker has {usable} documents with a next sentence, not 2")


def get_stream_dataloader(
    rows: Any, column: str, progress: dict, rank: int, world_size: int, **batches: Any
) -> DataLoader:
    """Returns the loader of one rank, from its progress on. batches: as in `StreamedBatches`."""
    workers = progress["workers"]
    per_rank = max(1, workers)  # without workers, the rank itself reads
    worker_count = world_size * per_rank
    if worker_count > rows.num_shards:
        raise ValueError(
            f"--workers {workers} in {world_size} ranks read {worker_count} shards at a time, and "
            f"the corpus has {rows.num_shards}: use fewer workers, or split its files"
        )
    if rows.num_shards % worker_count:
        warnings.warn(
            f"{rows.num_shards} shards for {worker_count} workers: some have more to read, and the "
            "others read theirs more often",
            stacklevel=2,
        )
    if world_size > 1:
        rows = split_dataset_by_node(rows, rank, world_size)
    dataset = StreamedBatches(
        rows,
        column,
        progress["bookmarks"],
        next_worker=progress["taken"] % per_rank,
        first_worker=rank * per_rank,
        worker_count=worker_count,
        **batches,
    )
    return DataLoader(
        dataset,
        batch_size=None,
        num_workers=workers,
        prefetch_factor=4 if workers else None,
        pin_memory=torch.cuda.is_available(),
    )


def new_progress(workers: int) -> dict:
    """Returns the progress of a rank that has read nothing: the bookmarks of its workers, and how
    many batches were taken from them, in turn.
    """
    return {"workers": workers, "bookmarks": [None] * max(1, workers), "taken": 0}


def take(loader: Iterable[dict | None], progress: dict) -> Iterator[dict]:
    """Yields the loader's batches. `progress` counts a batch when it is taken, so that batches
    which wait in the loader are read again by a resumed run.
    """
    for batch in loader:
        if batch is not None:
            worker = progress["taken"] % len(progress["bookmarks"])
            progress["bookmarks"][worker] = batch.pop("bookmark")
            progress["taken"] += 1
            yield batch


def same_readers(saved: list[dict], fresh: list[dict]) -> list[dict]:
    """Returns the saved progress of all ranks. Raises ValueError if this run, whose progress would
    start as `fresh`, has other numbers of ranks or workers: the bookmarks would not fit.
    """
    if not any(progress["taken"] for progress in saved):
        return fresh
    before = [progress["workers"] for progress in saved]
    now = [progress["workers"] for progress in fresh]
    if before != now:
        raise ValueError(
            f"--resume --streaming: {len(before)} ranks with --workers {before[0]} have read the"
            f" corpus, and only as many can resume, not {len(now)} with --workers {now[0]}"
        )
    return saved
