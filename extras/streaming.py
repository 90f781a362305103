"""Pretraining on a corpus that is read as it comes, for one that does not fit the disk.

Each data worker reads shards of its own, a block of documents at a time, and does with a block what
`data.py` does with a corpus: tokens, pairs, masks, in a random order. A block is what is shuffled,
so no row waits in a buffer to be lost; the place of the block, and the number of batches taken from
it, are all that has to be remembered.
"""

import copy
import warnings
import zlib
from collections.abc import Iterable, Iterator
from itertools import chain, islice
from typing import Any

import torch
from datasets import Dataset, Features, List, Value
from datasets.distributed import split_dataset_by_node
from tokenizers import Tokenizer
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

import data

BLOCK = 4_000_000  # characters, about 8,000 examples of 128 tokens: 4 MB of tokens
END = object()


def is_held_out(text: Any) -> bool:
    """One document in a hundred, whatever the order in which they come."""
    return zlib.crc32(str(text).encode()) % 100 == 0


def open_stream(
    path: str,
    name: str | None,
    column: str,
    rows_per_document: int = 1,
    train_split: str = "train",
) -> tuple:
    """Returns the documents to train on, a `datasets.IterableDataset`, and a list of 64 to evaluate
    on: of the split "validation", or held out of the split to train on, which must be a whole one.
    """
    splits = data.get_dataset(path, name, split=None, streaming=True)
    if train_split not in splits:
        raise ValueError(
            f"--streaming reads one whole split of {path}, one of {', '.join(splits)}; "
            f"--split {train_split} is none of them"
        )
    row: dict = next(iter(splits[train_split]), {})
    if column not in row:
        raise ValueError(f"no --text-column {column} in the first row of {path}: {list(row)}")
    rows = {split: documents.select_columns(column) for split, documents in splits.items()}
    if rows_per_document > 1:
        rows = {split: documents.batch(rows_per_document) for split, documents in rows.items()}
    train = rows[train_split]
    held_out = rows.get("validation")
    if held_out is None or train_split == "validation":
        held_out = train.filter(is_held_out, input_columns=column)
        train = train.filter(lambda text: not is_held_out(text), input_columns=column)
    texts = [row[column] for row in islice(held_out, 64)]
    if len(texts) < 2:
        raise ValueError(
            f"--streaming: {path} has {len(texts)} documents to evaluate on, and 2 are needed: a"
            " split named validation, or one of a hundred documents to train on; a small corpus"
            " needs no --streaming"
        )
    return train, texts


def read_texts(path: str, name: str | None, column: str, split: str = "train") -> Iterable[str]:
    """Returns all texts of a corpus on disk, checked to be texts."""
    rows = data.get_train_rows(path, split, name)
    if column not in rows.column_names:
        raise ValueError(f"no --text-column {column} in {rows.column_names}")
    kind = rows.features[column]
    if getattr(kind, "dtype", None) not in ("string", "large_string", "null"):
        raise ValueError(f"--text-column {column} is not text but {kind}")
    return rows[column]


def describe(corpora: dict) -> str:
    """Of a split that is streamed, nothing is known."""
    return "".join(
        f"{split}: {len(corpus.document_starts) - 1} documents, {len(corpus):,} tokens; "
        f"documents left out: {corpus.skipped}\n"
        for split, corpus in corpora.items()
        if isinstance(corpus, data.TokenizedCorpus)
    )


def tokenized(texts: list[str], first: int, tokenizer: Tokenizer) -> data.TokenizedCorpus:
    """A block as a corpus, in memory."""
    numbers = list(range(first, first + len(texts)))
    columns = data.tokenize_documents({"text": texts}, numbers, tokenizer, "text")
    features = Features(
        tokens=List(Value("uint32")), starts=List(Value("uint32")), sentences=Value("int64")
    )
    return data.TokenizedCorpus(Dataset.from_dict(columns, features=features))


class StreamedBatches(IterableDataset):
    """Batches without end, as `PretrainDataset` makes them, each with the `place` behind it. Every
    example of a block comes once; its last batch is filled up with some again, under other masks.
    `places`: where each worker goes on, None: at the beginning. `turn`: whose batch is the next.
    `first`, `everyone`: number of this process's first worker, and of all workers."""

    def __init__(
        self, rows: Any, column: str, places: list, turn: int, first: int, everyone: int, **how: Any
    ) -> None:
        self.rows, self.column, self.places, self.turn = rows, column, places, turn
        self.first, self.everyone, self.how = first, everyone, how

    def documents(self, place: dict) -> Iterator[tuple[dict, Any]]:
        """Each document with the place behind it, and `END` behind the last of an epoch."""
        rows, number = copy.deepcopy(self.rows), place["documents"]
        if place["rows"]:
            rows.load_state_dict(place["rows"])
        while True:
            before = number
            for row in rows:
                number += 1
                behind = {"rows": copy.deepcopy(rows.state_dict()), "documents": number}
                yield behind, row[self.column]
            if number == before and not place["rows"]:
                raise ValueError("a data worker has no document to read")
            place = {"rows": None, "documents": number}
            yield place, END
            rows = copy.deepcopy(self.rows)  # what was loaded would go on from there again

    def __iter__(self) -> Iterator[dict | None]:
        info = get_worker_info()
        worker = info.id if info else 0
        if worker < self.turn:
            yield None  # for it is another's turn
        place = self.places[worker] or {"rows": None, "documents": 0, "block": 0, "batch": 0}
        documents = self.documents(place)
        while True:
            texts, behind = read_block(documents)
            number = place["block"] * self.everyone + self.first + worker  # of all blocks
            batches = self.batches(texts, place["documents"], number)
            for done, batch in enumerate(islice(batches, place["batch"], None), place["batch"] + 1):
                yield {**batch, "place": {**place, "batch": done}}
            place = {**behind, "block": place["block"] + 1, "batch": 0}

    def batches(self, texts: list[str], first: int, number: int) -> Iterator[dict]:
        """Of a block, whose number takes the place of the epoch in every random draw."""
        tokenizer, batch_size = self.how["tokenizer"], self.how["batch_size"]
        corpus = tokenized(texts, first, tokenizer)
        dataset = data.PretrainDataset(corpus, tokenizer, *self.how["examples"])
        order = data.permutation(dataset.seed, number, len(dataset)).tolist()
        passes = chain.from_iterable(
            [(number * 2**20 + again) * len(order) + i for i in order] for again in range(2**20)
        )
        for _ in range(0, len(order), batch_size):
            yield dataset.batch(list(islice(passes, batch_size)))


def read_block(documents: Iterator[tuple[dict, Any]]) -> tuple[list, dict]:
    """Documents of `BLOCK` characters or up to the end of an epoch, at least two with a next
    sentence, and the place behind them."""
    texts: list = []
    size = pairs = epochs = 0
    while True:
        behind, text = next(documents)
        epochs += text is END
        if text is not END:
            texts.append(text)
            size += len(str(text))
            parts = text if isinstance(text, list) else [text]
            whole = "\n\n".join(str(part) for part in parts if part)
            pairs += pairs < 2 and len(data.split_sentences(whole)) > 1
        if pairs > 1 and (text is END or size >= BLOCK):
            return texts, behind
        if pairs < 2 and epochs > 2:
            raise ValueError(f"a data worker has {pairs} documents with a next sentence, not 2")


def get_stream_dataloader(
    rows: Any, column: str, state: dict, rank: int, world_size: int, **how: Any
) -> DataLoader:
    """The batches of one of `world_size` processes. `state`: see `new_state`."""
    workers = state["workers"]
    everyone = world_size * max(1, workers)
    if everyone > rows.num_shards:
        raise ValueError(
            f"--workers {workers} in {world_size} processes read {everyone} shards at a time, and "
            f"the corpus has {rows.num_shards}: use fewer workers, or split its files"
        )
    if rows.num_shards % everyone:
        warnings.warn(
            f"{rows.num_shards} shards for {everyone} workers: some have more to read, and the "
            "others read theirs more often",
            stacklevel=2,
        )
    if world_size > 1:
        rows = split_dataset_by_node(rows, rank, world_size)
    places, turn = state["places"], state["taken"] % max(1, workers)
    first = rank * max(1, workers)
    batches = StreamedBatches(rows, column, places, turn, first, everyone, **how)
    return DataLoader(
        batches,
        batch_size=None,
        num_workers=workers,
        prefetch_factor=4 if workers else None,
        pin_memory=torch.cuda.is_available(),
    )


def new_state(workers: int) -> dict:
    """How far a process has come: places of its workers, batches taken in turn from them."""
    return {"workers": workers, "places": [None] * max(1, workers), "taken": 0}


def take(loader: DataLoader, state: dict) -> Iterator[dict]:
    """The loader's batches, each noted in `state` when it is taken: those that wait are not."""
    for batch in loader:
        if batch is not None:
            state["places"][state["taken"] % len(state["places"])] = batch.pop("place")
            state["taken"] += 1
            yield batch


def same_readers(saved: list[dict], fresh: list[dict]) -> list[dict]:
    """How far a run's processes had come; `ValueError` if it was read by others than `fresh`."""
    before, now = ([state["workers"] for state in states] for states in (saved, fresh))
    if not any(state["taken"] for state in saved):
        return fresh
    if before != now:
        raise ValueError(
            f"--resume --streaming: {len(before)} processes with --workers {before[0]} have read "
            f"the corpus, and only as many can go on, not {len(now)} with --workers {now[0]}"
        )
    return saved
