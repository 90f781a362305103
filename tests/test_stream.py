"""A streamed corpus: no document is lost or read twice, and a run resumes where it stopped, by
reading again what it has trained on.
"""

import json
import pickle
import signal
from collections import Counter
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from unittest import mock

import pytest
from helpers import (
    OPTIONS,
    CrashError,
    assert_same,
    before_update,
    checkpoint_of,
    crash,
    die,
    run,
    run_with_event,
    start_ranks,
    state,
    wait,
)
from strategies import LETTERS, TEXTS, small_tokenizer, write_rows, write_texts
from torch.utils.data import DataLoader

import data
import train_pretrain

SHARDS = 5
pytestmark = pytest.mark.usefixtures("_smallest")


def word(index: int) -> str:
    return LETTERS[index // 9] + LETTERS[index % 9]  # a letter and a ## piece


def write_shards(folder: Path, documents: int = 41) -> Path:
    """Writes five files of unequal length; each document tells its index in every sentence."""
    for shard in range(SHARDS):
        indices = [i for i in range(documents) if i * i % 7 % SHARDS == shard or i == shard]
        texts = [f"{word(i)} {word(i)}. " * (3 + i % 4) for i in indices]
        write_texts(folder / f"train-{shard}.jsonl", texts * 2)
    held_out = ["aa bb. cc dd. ee ff.", "ga ha. ia ja. ka la."]
    write_texts(folder / "validation.jsonl", held_out)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write_shards(tmp_path_factory.mktemp("shards"))


def texts_in(folder: Path) -> Counter:
    files = folder.glob("train*.jsonl")
    return Counter(json.loads(line)["text"] for f in files for line in f.read_text().splitlines())


def open_stream(folder: Path, **how) -> data.Stream:
    make_dataset = partial(
        data.PretrainDataset, tokenizer=small_tokenizer(), max_seq_length=16, seed=3
    )
    documents = data.get_documents(str(folder), streaming=True, **how)["train"]
    return data.Stream(documents, small_tokenizer(), make_dataset)


def loader(folder: Path, batch_size: int = 4, **how) -> DataLoader:
    return data.get_split_dataloader(open_stream(folder), batch_size, **how)


class OneEpoch(data.Stream):
    """Yields the documents of one epoch instead of examples."""

    def __iter__(self):
        return iter(self.documents)


# ---- What is read -------------------------------------------------------------------------------


@pytest.mark.parametrize(("world_size", "workers"), [(1, 0), (1, 3), (2, 3), (5, 1)])
def test_every_document_is_read_once_in_an_epoch(world_size, workers, folder):
    """Two ranks share five files row by row."""
    seen: Counter = Counter()
    for rank in range(world_size):
        stream = loader(folder, rank=rank, world_size=world_size, workers=workers).dataset
        stream.__class__ = OneEpoch
        found = list(DataLoader(stream, batch_size=None, num_workers=workers))
        assert found
        seen.update(found)
    assert seen == texts_in(folder)


def test_no_worker_is_started_that_would_have_no_file(folder):
    batches = loader(folder, workers=SHARDS + 1)
    assert batches.num_workers == SHARDS
    assert len(list(islice(batches, 2 * SHARDS))) == 2 * SHARDS


def test_one_document_in_a_hundred_is_held_out_where_there_is_no_validation_split(tmp_path):
    """None of these is trained on."""
    texts = [f"{word(i % 200)} {i} aa. {i} bb." for i in range(4000)]
    path = write_texts(tmp_path / "train.jsonl", texts)
    documents = data.get_documents(path, streaming=True)
    trained, held_out = list(documents["train"]), list(documents["validation"])
    assert sorted(trained + held_out) == sorted(texts)
    assert 15 <= len(held_out) <= 70  # 40 expected; outside is less likely than 1e-4


def test_a_stream_is_evaluated_on_its_first_64_documents():
    texts = ["one", *(f"{word(i)} aa. bb." for i in range(70))]
    found = data.first_documents(texts, small_tokenizer())
    encoded = list(data.encode_documents(texts, small_tokenizer(), Counter()))
    assert found.key == data.pack(encoded[:64], small_tokenizer()).key


def test_the_validation_split_is_held_out_unless_it_is_trained_on(tmp_path):
    texts = [f"{word(i % 200)} {i} aa. {i} bb." for i in range(400)]
    write_texts(tmp_path / "train.jsonl", texts)
    write_texts(tmp_path / "validation.jsonl", texts[::-1])
    documents = data.get_documents(str(tmp_path), streaming=True)
    assert list(documents["train"]) == texts
    assert list(documents["validation"]) == texts[::-1]
    documents = data.get_documents(str(tmp_path), split="validation", streaming=True)
    assert 380 < len(list(documents["train"])) < 400
    assert not set(documents["train"]) & set(documents["validation"])


def test_joined_rows_are_not_held_out_of_a_stream(tmp_path):
    """Workers would join other rows than the process that evaluates, and train on what is held
    out."""
    path = write_texts(tmp_path / "train.jsonl", TEXTS)
    with pytest.raises(ValueError, match="rows_per_document.*validation"):
        data.get_documents(path, rows_per_document=2, streaming=True)
    write_texts(tmp_path / "validation.jsonl", TEXTS)
    documents = data.get_documents(str(tmp_path), rows_per_document=2, streaming=True)
    assert next(iter(documents["train"])) == "\n\n".join(TEXTS[:2])


def test_ranks_that_share_a_file_do_not_join_its_rows(folder):
    documents = data.get_documents(str(folder), rows_per_document=2, streaming=True)["train"]
    stream = replace(open_stream(folder), documents=documents)
    data.get_split_dataloader(stream, 4, world_size=SHARDS)
    with pytest.raises(ValueError, match=f"rows_per_document.*2 ranks.*{SHARDS} files"):
        data.get_split_dataloader(stream, 4, world_size=2)


# ---- Blocks -------------------------------------------------------------------------------------


def sizes_of_blocks(texts: list[str], tmp_path: Path, count: int) -> list[int]:
    write_texts(tmp_path / "train.jsonl", texts)
    write_texts(tmp_path / "validation.jsonl", TEXTS)
    blocks = islice(open_stream(tmp_path).blocks(), count)
    return [len(block.document_starts) - 1 for block in blocks]


@pytest.mark.parametrize("tokens", [17, 24])
def test_a_block_ends_after_so_many_tokens_or_with_its_epoch(tokens, tmp_path, monkeypatch):
    """Each of these documents has eight tokens, periods included; an epoch has eight documents."""
    monkeypatch.setattr(data, "STREAM_BLOCK", tokens)
    assert sizes_of_blocks(["a aa. b bb."] * 8, tmp_path, 6) == [3, 3, 2] * 2


def test_a_block_has_two_documents(tmp_path, monkeypatch):
    """One alone is left for the next epoch."""
    monkeypatch.setattr(data, "STREAM_BLOCK", 1)
    for documents in (2, 3):
        assert sizes_of_blocks(["a aa. b bb."] * documents, tmp_path, 4) == [2, 2, 2, 2]
    write_texts(tmp_path / "train.jsonl", [f"{c} aa. b bb." for c in "abc"])
    assert len({block.key for block in islice(open_stream(tmp_path).blocks(), 3)}) == 3
    for texts in (["a aa. b bb.", "a title"], ["a title"] * 3):
        with pytest.raises(ValueError, match=r"fewer than two documents.*fewer --workers"):
            sizes_of_blocks(texts, tmp_path, 1)


def test_every_example_of_a_block_comes_once_in_a_random_order(folder):
    """Each block draws its order and its examples as an epoch of its own."""
    stream = open_stream(folder)
    for block, corpus in enumerate(islice(stream.blocks(), 2)):
        dataset = stream.make_dataset(corpus)
        order = data.order_of_epoch(3, block, len(dataset)).tolist()
        assert order != sorted(order)
        expected = [dataset[block * len(dataset) + index] for index in order]
        found = list(islice(stream, block * len(dataset), (block + 1) * len(dataset)))
        for one, other in zip(found, expected, strict=True):
            assert all((one[name] == other[name]).all() for name in other)


def test_workers_that_read_equal_documents_make_other_examples_of_them(tmp_path):
    text = "\n\n".join(f"{a} {b} {a}{b}" for a in LETTERS for b in LETTERS)
    for shard in range(4):
        write_rows(tmp_path / f"equal/train-{shard}.jsonl", [{"text": text}] * 4)
    write_rows(tmp_path / "equal/validation.jsonl", [{"text": text}] * 2)
    ranks = [loader(tmp_path / "equal", rank=r, world_size=2, workers=2) for r in (0, 1)]
    batches = [batch for rank in ranks for batch in islice(rank, 2)]
    found = [tuple(row) for batch in batches for row in batch["input_ids"].tolist()]
    assert len(set(found)) == len(found) == 4 * 4


# ---- Loaders ------------------------------------------------------------------------------------


def test_a_stream_reaches_a_spawned_worker(folder):
    """It is pickled there: on macOS, and by default from Python 3.14 on, workers are not forked."""
    alone, sent = (loader(folder, workers=0) for _ in range(2))
    received = DataLoader(
        pickle.loads(pickle.dumps(sent.dataset)), sent.batch_size, collate_fn=sent.collate_fn
    )
    for one, other in zip(islice(alone, 2), islice(received, 2), strict=True):
        assert_same(one, other)
        assert len(one["input_ids"]) == 4


# ---- Whole runs ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def options(folder, tmp_path_factory):
    vocabulary = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    small_tokenizer().save(str(vocabulary))
    return replace(
        OPTIONS, dataset=str(folder), tokenizer=str(vocabulary), streaming=True,
        workers=2, steps=12, eval_every=6,
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_a_resumed_run_reads_a_stream_again_and_skips_what_it_has_trained_on(
    workers, options, folder, tmp_path, monkeypatch
):
    """It goes through many blocks."""
    monkeypatch.setattr(data, "STREAM_BLOCK", 60)
    told = replace(options, out=str(tmp_path / "run"), steps=6, workers=workers)
    whole = replace(told, out=str(tmp_path / "whole"))
    run(whole)
    with before_update(4, crash), pytest.raises(CrashError):
        run(told)
    assert checkpoint_of(tmp_path / "run")["progress"]["step"] == 4
    run(replace(told, resume=True))
    assert_same(state(tmp_path / "run"), state(tmp_path / "whole"))


def test_a_stream_is_resumed_only_by_as_many_readers_and_with_the_same_validation_part(
    options, tmp_path
):
    shards = write_shards(tmp_path / "shards")
    told = replace(options, dataset=str(shards), out=str(tmp_path / "run"), steps=1)
    run(told)
    with pytest.raises(ValueError, match="2 workers .* 1 workers"):
        run(replace(told, workers=1, resume=True))
    two_ranks = mock.patch.object(train_pretrain, "rank_and_ranks", return_value=(0, 2))
    with two_ranks, pytest.raises(ValueError, match="1 ranks.* 2 ranks"):
        run(replace(told, resume=True))
    write_texts(shards / "validation.jsonl", TEXTS)
    with pytest.raises(ValueError, match="validation"):
        run(replace(told, resume=True))


@pytest.mark.slow
def test_two_killed_ranks_on_a_stream_end_as_two_that_were_never_killed(options, tmp_path):
    """They read a stream with a worker each."""
    whole, killed = (
        replace(options, out=str(tmp_path / name), workers=1) for name in ("whole", "killed")
    )

    def two_ranks(told, number: int = -1) -> list[int]:
        return wait(*start_ranks(2, run_with_event, told, number, die, output=tmp_path / "log"))

    assert two_ranks(whole) == [0, 0], (tmp_path / "log").read_text()
    assert -signal.SIGKILL in two_ranks(killed, 7)
    assert two_ranks(replace(killed, resume=True)) == [0, 0]
    assert_same(state(tmp_path / "killed"), state(tmp_path / "whole"))
