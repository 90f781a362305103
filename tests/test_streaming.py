"""A streamed corpus: no document is lost or read twice, and a run resumes where it stopped."""

import copy
import gc
import io
import itertools
import json
import types
import warnings
from collections import Counter
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import (
    OPTIONS,
    assert_same,
    in_process,
    metrics_of,
    run,
    run_as_main,
    start_ranks,
    state,
    wait,
)
from strategies import (
    LETTERS,
    SMALL,
    TEXTS,
    publish,
    small_tokenizer,
    write_rows,
    write_texts,
)
from datasets import Dataset
from torch.utils.data import DataLoader

import data
from extras import streaming
from train_pretrain import run_script
from train_pretrain import PretrainOptions, pretrain

SHARDS = 5


def write_shards(folder: Path, documents: int = 41) -> Path:
    """Writes five files of unequal length; each document tells its index in every sentence."""
    for shard in range(SHARDS):
        indices = [i for i in range(documents) if i * i % 7 % SHARDS == shard or i == shard]
        texts = [f"{word(i)} {word(i)}. " * (3 + i % 4) for i in indices]
        write_texts(folder / f"train-{shard}.jsonl", texts)
    held_out = ["aa bb. cc dd. ee ff.", "ga ha. ia ja. ka la."]
    write_texts(folder / "validation.jsonl", held_out)
    return folder


def word(index: int) -> str:
    return LETTERS[index // 9] + LETTERS[index % 9]  # a letter and a ## piece


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write_shards(tmp_path_factory.mktemp("shards"))


def all_documents(folder: Path) -> Counter:
    files = folder.glob("train-*.jsonl")
    return Counter(json.loads(line)["text"] for f in files for line in f.read_text().splitlines())


class Reading(streaming.StreamedBatches):
    """Yields the documents of one epoch instead of batches."""

    def __iter__(self):
        info = torch.utils.data.get_worker_info()
        bookmark = self.bookmarks[info.id if info else 0] or {"rows": None, "documents": 0}
        for behind, text in self.documents(bookmark):
            if text is streaming.END_OF_EPOCH:
                return
            yield {"text": text, "bookmark": behind}


def loader(folder: Path, state: dict, rank: int = 0, world_size: int = 1, seed: int = 0):
    rows, _ = streaming.open_stream(str(folder), None, "text")
    how = {
        "tokenizer": small_tokenizer(),
        "batch_size": 4,
        "make_dataset": partial(data.PretrainDataset, max_seq_length=16, seed=seed),
    }
    return streaming.get_stream_dataloader(rows, "text", state, rank, world_size, **how)


@pytest.mark.parametrize(
    ("world_size", "workers"), [(1, 0), (1, 1), (1, 2), (1, 3), (1, 5), (2, 1), (2, 2), (5, 1)]
)
def test_every_document_is_read_once_in_an_epoch(world_size, workers, folder):
    """Any number of readers up to that of the shards may read, and every worker has some."""
    seen: Counter = Counter()
    for rank in range(world_size):
        batches = loader(folder, streaming.new_progress(workers), rank, world_size).dataset
        batches.__class__ = Reading
        found = [item["text"] for item in DataLoader(batches, batch_size=None, num_workers=workers)]
        assert found
        seen.update(found)
    assert seen == all_documents(folder)
    assert seen.total() > 41


@pytest.mark.slow
def test_a_stream_with_held_out_documents_reaches_a_spawned_worker(tmp_path):
    """On macOS, and by default from Python 3.14 on, workers are not forked."""
    texts = [f"{word(i % 81)} {word(i % 81)}. " * (3 + i // 81) for i in range(800)]
    assert sum(map(streaming.is_held_out, texts)) >= 4
    for shard in range(2):  # no split named validation: documents are held out of these
        write_texts(tmp_path / f"train-{shard}.jsonl", texts[shard::2])
    alone, spawned = (loader(tmp_path, streaming.new_progress(n)) for n in (1, 1))
    spawned.multiprocessing_context = "spawn"
    for one, other in zip(islice(alone, 2), islice(spawned, 2), strict=True):
        assert torch.equal(one["input_ids"], other["input_ids"])


def test_a_block_takes_four_bytes_a_token_and_as_few_batches_wait_as_of_a_corpus_on_disk(folder):
    block = streaming.tokenize_block(["aa bb. cc dd.", "ee ff. ga ha."], 0, small_tokenizer())
    assert {chunk.dtype for chunk in block.chunks} == {np.dtype("uint32")}
    waiting = {
        loader(folder, streaming.new_progress(1)).prefetch_factor,
        data.get_split_dataloader(
            data.PretrainDataset(block, small_tokenizer(), 16), 2, workers=1
        ).prefetch_factor,
    }
    assert waiting == {4}


def test_more_readers_than_shards_are_rejected(folder):
    for world_size, workers in ((1, 6), (2, 3), (6, 0)):
        with pytest.raises(ValueError, match=r"read 6 shards at a time, and the corpus has 5: use"):
            loader(folder, streaming.new_progress(workers), 0, world_size)


def test_a_block_continues_until_two_documents_have_a_next_sentence(folder):
    """A title alone at the end of an epoch, or a long text and a title, are no reason to stop."""
    batches = loader(folder, streaming.new_progress(0)).dataset
    long, title, pair = "aa bb. " * 999, "aa", "aa bb. cc dd."

    def documents(*texts):
        epoch = [({}, text) for text in (*texts, streaming.END_OF_EPOCH)]
        return iter(epoch * 3)

    assert streaming.read_block(documents(long, title, pair))[0] == [long, title, pair]
    assert streaming.read_block(documents(title, pair))[0] == [title, pair] * 2
    left = documents(title, pair, title)
    while next(left)[1] != pair:  # what is left of this epoch has no next sentence
        pass
    assert streaming.read_block(left)[0] == [title, title, pair, title, title, pair, title]
    with pytest.raises(ValueError, match="a data worker has 0 documents with a next sentence"):
        streaming.read_block(documents(title, title))
    assert next(batches.batches([long, title, pair], 0, 0))


def test_a_block_ends_after_so_many_characters_of_all_its_documents(monkeypatch):
    """Each of these documents has 13."""
    for block in (50, 52):
        monkeypatch.setattr(streaming, "BLOCK", block)
        documents = iter([({"documents": i}, "aa bb. cc dd.") for i in range(1, 99)])
        texts, behind = streaming.read_block(documents)
        assert (len(texts), behind) == (4, {"documents": 4})


def test_a_document_of_several_rows_has_a_next_sentence_in_the_next_row():
    document = ["aa bb", "cc dd"]
    epoch = [({}, document), ({}, document), ({}, streaming.END_OF_EPOCH)]
    assert streaming.read_block(iter(epoch))[0] == [document] * 2


def test_a_block_is_shuffled(folder):
    """In order, each batch would be of one document."""
    rows, _ = streaming.open_stream(str(folder), None, "text")
    texts = [row["text"] for row in rows]
    batches = loader(folder, streaming.new_progress(0)).dataset
    corpus = streaming.tokenize_block(texts, 0, small_tokenizer())
    dataset = batches.make_dataset(corpus, small_tokenizer())
    orders = []
    for block_index in (0, 1):
        indices = []
        dataset.batch = indices.extend
        batches.make_dataset = lambda *_: dataset
        list(batches.batches(texts, 0, block_index))
        offset = block_index * 2**20 * len(dataset)
        orders.append([index - offset for index in indices[: len(dataset)]])
        # What fills the last batch is drawn anew.
        assert len(set(indices)) == len(indices) > len(dataset)
    assert sorted(orders[0]) == sorted(orders[1]) == list(range(len(dataset)))
    assert orders[0] != orders[1]
    assert sum(a + 1 == b for a, b in itertools.pairwise(orders[0])) < len(dataset) / 4


def test_workers_that_read_equal_documents_make_other_examples_of_them(tmp_path):
    text = "\n\n".join(f"{a} {b} {a}{b}" for a in LETTERS for b in LETTERS)
    for shard in range(2):
        write_rows(tmp_path / f"train-{shard}.jsonl", [{"text": text}] * 4)
    write_rows(tmp_path / "validation.jsonl", [{"text": text}] * 2)
    batches = iter(loader(tmp_path, streaming.new_progress(2)))
    first, second = next(batches), next(batches)
    for place in ("documents", "block", "batch"):
        assert first["bookmark"][place] == second["bookmark"][place]
    of_ranks = [next(iter(loader(tmp_path, streaming.new_progress(0), r, 2))) for r in (0, 1)]
    for one, other in ((first, second), of_ranks):
        one, other = ({tuple(row) for row in b["input_ids"].tolist()} for b in (one, other))
        assert not one & other


def test_every_block_of_every_worker_of_every_rank_has_an_index_of_its_own(folder, monkeypatch):
    """The index decides what is drawn for the block. With two ranks of two workers, the third
    worker makes the blocks 2, 6 and 10."""
    made: dict[tuple[int, int], list] = {}

    def noted(batches, texts, first_index, block_index):
        made[rank, worker].append((first_index, block_index))
        yield {"documents": len(texts)}

    monkeypatch.setattr(streaming.StreamedBatches, "batches", noted)
    for rank, worker in itertools.product(range(2), range(2)):
        made[rank, worker] = []
        info = types.SimpleNamespace(id=worker)
        monkeypatch.setattr(streaming, "get_worker_info", lambda info=info: info)
        batches = loader(folder, streaming.new_progress(2), rank, world_size=2).dataset
        sizes = [batch["documents"] for batch in islice(batches, 3)]
        first_indices, block_indices = zip(*made[rank, worker], strict=True)
        assert first_indices == (0, sizes[0], sizes[0] + sizes[1])
        start = 2 * rank + worker
        assert block_indices == (start, start + 4, start + 8)


def test_readers_with_unequal_numbers_of_shards_are_warned_of(folder):
    expected = (
        "^5 shards for 2 workers: some have more to read, and the others read theirs more often$"
    )
    with pytest.warns(UserWarning, match=expected):
        loader(folder, streaming.new_progress(2))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".* shards for .* workers")
        loader(folder, streaming.new_progress(1))


def test_a_stream_that_was_not_read_yet_may_get_other_readers():
    fresh = [streaming.new_progress(1)]
    assert streaming.same_readers([streaming.new_progress(2)], fresh) is fresh


def test_a_worker_without_a_document_is_rejected(tmp_path):
    (write_shards(tmp_path) / "train-2.jsonl").write_text("")
    batches = loader(tmp_path, streaming.new_progress(5))
    with pytest.raises(ValueError, match="a data worker has no document to read"):
        list(islice(streaming.take(batches, streaming.new_progress(5)), 20))


def counts(state: dict) -> list:
    """Returns the batches that were taken, and the bookmark of each worker without the library's
    own counters."""
    return [state["taken"], *({**bookmark, "rows": None} for bookmark in state["bookmarks"])]


@pytest.mark.parametrize("workers", [0, 2, 3])
@pytest.mark.parametrize("block", [60, 10**9])
def test_a_stream_resumes_where_it_was_left(workers, block, folder, monkeypatch):
    """It resumes from any batch, over ends of blocks and epochs, after its state went through a
    file."""
    monkeypatch.setattr(streaming, "BLOCK", block)
    fresh = streaming.new_progress(workers)
    expected, states = [], []
    for batch in islice(streaming.take(loader(folder, fresh), fresh), 60):
        expected.append(batch)
        states.append(copy.deepcopy(fresh))
    epochs = {bookmark["documents"] // 9 for bookmark in states[-1]["bookmarks"]}
    assert max(epochs) >= 1
    for taken in (1, 2, 17, 40):
        torch.save(states[taken - 1], file := io.BytesIO())
        file.seek(0)
        left = torch.load(file, weights_only=True)
        batches = streaming.take(loader(folder, left), left)
        for index, batch in enumerate(islice(batches, 15), taken):
            assert_same(batch, expected[index])
        assert counts(left) == counts(states[taken + 14])


def test_every_example_of_a_block_comes_once_and_never_with_the_same_masks(folder):
    """With one worker an epoch is one block; the batch that ends it is filled up."""
    fresh = streaming.new_progress(0)
    batches = streaming.take(loader(folder, fresh), fresh)
    blocks: dict[int, list] = {}
    for batch in batches:
        block_index = fresh["bookmarks"][0]["block"]
        if block_index > 1:
            break
        blocks.setdefault(block_index, []).append(batch)
    rows = list(all_documents(folder).elements())
    examples = len(
        data.PretrainDataset(
            streaming.tokenize_block(rows, 0, small_tokenizer()), small_tokenizer(), 16
        )
    )
    for found in blocks.values():
        assert len(found) == -(-examples // 4)
        assert {len(batch["nsp_labels"]) for batch in found} == {4}
    one, other = (found[0]["input_ids"] for found in blocks.values())
    assert one.shape != other.shape or not torch.equal(one, other)


@pytest.mark.parametrize("left_over", [0, 1, 2])
def test_the_batches_of_a_block_are_full_and_take_every_example(left_over, folder):
    """Of a block smaller than a batch, the examples are repeated: here more than 40 times."""
    batches = loader(folder, streaming.new_progress(0)).dataset
    texts = [row["text"] for row in batches.rows]
    asked: list[list[int]] = []

    def make(corpus, tokenizer):
        dataset = data.PretrainDataset(corpus, tokenizer, 16)
        dataset.batch = asked.append
        return dataset

    batches.make_dataset = make
    examples = len(make(streaming.tokenize_block(texts, 0, small_tokenizer()), small_tokenizer()))
    for size, count in ((examples - left_over, 2 if left_over else 1), (50 * examples, 1)):
        batches.batch_size = size
        asked.clear()
        list(batches.batches(texts, 0, 0))
        assert [len(indices) for indices in asked] == [size] * count
        indices = list(itertools.chain(*asked))
        assert len(set(indices)) == len(indices)  # each a draw of its own
        assert {index % examples for index in indices} == set(range(examples))


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("zz.jsonl", '{"text": "né"}\n'.encode("latin-1")),
        ("zz.jsonl", b'{"text": "a", "more": 1}\n{"text"'),
        ("zz.parquet", b"PAR1 and no more"),
        ("zz.parquet", b""),
    ],
    ids=["encoding", "no JSON", "no parquet", "empty"],
)
def test_a_file_of_a_stream_that_cannot_be_read_is_one_line(
    name, content, workers, tmp_path, monkeypatch, capsys
):
    """In a data worker, most of the libraries' errors became a traceback of 80 lines."""
    monkeypatch.setattr(torch.utils.data._utils, "MP_STATUS_CHECK_INTERVAL", 0.1)  # not 5 s
    rows = Dataset.from_dict({"text": TEXTS})
    write = rows.to_json if name.endswith("jsonl") else rows.to_parquet
    for part in ("validation/a", "train/a", "train/b"):
        (tmp_path / part).parent.mkdir(exist_ok=True)
        write(str(tmp_path / f"{part}{Path(name).suffix}"))
    (tmp_path / "train" / name).write_bytes(content)
    progress = streaming.new_progress(workers)
    with pytest.raises(SystemExit):
        run_script(
            lambda _: list(islice(streaming.take(loader(tmp_path, progress), progress), 99)),
            PretrainOptions,
            [],
        )
    last_line = capsys.readouterr().err.splitlines()[-1]
    assert last_line.startswith("error: a part of the stream cannot be read: ")
    if workers:
        gc.collect()  # the worker ends here, and not in another test


@pytest.mark.parametrize(
    ("error", "reason"), [(KeyError(), "KeyError"), (OSError("first\nsecond"), "first")]
)
def test_the_reason_why_a_stream_cannot_be_read_is_one_line(error, reason):
    def rows():
        yield 1
        raise error

    found = streaming.readable(rows())
    assert next(found) == 1
    with pytest.raises(ValueError, match=f"^a part of the stream cannot be read: {reason}$"):
        next(found)


def test_a_stream_without_a_document_is_rejected(folder):
    batches = loader(folder, streaming.new_progress(0)).dataset
    batches.rows = batches.rows.filter(lambda row: False)
    with pytest.raises(ValueError, match="^a data worker has no document to read$"):
        next(iter(batches))


def test_documents_are_held_out_where_there_is_no_validation_split(tmp_path):
    """About one in a hundred is held out, and none of these is trained on."""
    texts = [f"{word(i % 200)} {i}. {i}." for i in range(2000)]
    write_texts(tmp_path / "train.jsonl", texts)
    rows, held_out = streaming.open_stream(str(tmp_path), None, "text")
    trained = [row["text"] for row in rows]
    assert sorted(trained + held_out) == sorted(texts)
    assert 5 <= len(held_out) <= 40  # 20 expected; outside is less likely than 1e-4


def test_documents_are_held_out_where_the_validation_split_is_trained_on(tmp_path, monkeypatch):
    """The configuration and the split are those that were asked for."""
    texts = [f"{word(i % 200)} {i}. {i}." for i in range(400)]
    write_texts(tmp_path / "train.jsonl", ["another one. not this."] * 2)
    write_texts(tmp_path / "validation.jsonl", texts)
    asked, get_dataset = [], data.get_dataset

    def noted(path, name, **how):
        asked.append(name)
        return get_dataset(path, None, **how)

    monkeypatch.setattr(data, "get_dataset", noted)
    rows, held_out = streaming.open_stream(str(tmp_path), "plain", "text", train_split="validation")
    assert sorted([row["text"] for row in rows] + held_out) == sorted(texts)
    assert asked == ["plain"]


def test_64_documents_are_enough_to_evaluate_on(tmp_path):
    texts = [f"{word(i)} aa. {word(i)} ba." for i in range(70)]
    for split in ("train", "validation"):
        write_texts(tmp_path / f"{split}.jsonl", texts)
    assert streaming.open_stream(str(tmp_path), None, "text")[1] == texts[:64]


def test_rows_are_joined_to_documents(tmp_path):
    texts = ["aa ba. ca da.", "ea fa. ga ha.", "ia ja."] * 200
    for split in ("train", "validation"):
        write_texts(tmp_path / f"{split}.jsonl", texts)
    rows, _ = streaming.open_stream(str(tmp_path), None, "text", rows_per_document=3)
    assert next(iter(rows))["text"] == texts[:3]
    rows, _ = streaming.open_stream(str(tmp_path), None, "text", rows_per_document=2)
    assert next(iter(rows))["text"] == texts[:2]
    corpus = streaming.tokenize_block([texts[:3]] * 2, 0, small_tokenizer())
    assert len(corpus.document_starts) == 3
    assert len(corpus) == 2 * len(data.encode_plain(small_tokenizer(), [" ".join(texts[:3])])[0])


def test_a_stream_of_another_number_of_shards_is_not_resumed(options, tmp_path):
    folder = write_shards(tmp_path / "shards")
    told = replace(options, dataset=str(folder), out=str(tmp_path / "run"), steps=2, workers=0)
    run(told)
    write_texts(folder / "train-5.jsonl", ["aa bb. cc dd."])
    with pytest.raises(ValueError, match="has shards 5, not 6$"):
        run(replace(told, resume=True))


# ---- Whole runs ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def options(folder, tmp_path_factory):
    vocabulary = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    small_tokenizer().save(str(vocabulary))
    return replace(
        OPTIONS, dataset=str(folder), tokenizer=str(vocabulary), streaming=True,
        workers=2, steps=20,
    )  # fmt: skip


@pytest.mark.slow
def test_a_killed_run_on_a_stream_ends_as_one_that_was_never_killed(options, tmp_path):
    whole, out = replace(options, out=str(tmp_path / "whole")), str(tmp_path / "killed")
    assert in_process(whole) == 0
    killed = replace(options, out=out)
    for point, call in (("renamed", 3), ("half a line written", 4), ("before an update", 2)):
        assert in_process(killed, point, call) == -9
        killed = replace(killed, resume=True)
    assert in_process(killed) == 0
    assert_same(state(Path(out)), state(Path(whole.out)))


def test_a_stream_is_not_resumed_by_another_number_of_workers(options, tmp_path):
    run(replace(options, out=str(tmp_path), steps=4))
    message = "1 ranks with --workers 2 have read the corpus.*not 1 with --workers 1"
    with pytest.raises(ValueError, match=message):
        run(replace(options, out=str(tmp_path), steps=4, workers=1, resume=True))


def test_a_saved_model_is_evaluated_on_the_documents_of_a_stream(options, tmp_path, capsys):
    """With --steps 0, it gives the same numbers as without a stream: both read the validation
    split."""
    weights = str(publish(tmp_path / "model", SMALL))
    printed = []
    for streaming_or_not in (True, False):
        pretrain(
            replace(options, weights=weights, tokenizer=None, steps=0, streaming=streaming_or_not)
        )
        printed.append(capsys.readouterr().out)
    assert printed[0] == printed[1]
    assert "mlm_loss" in printed[0]


@pytest.mark.slow
def test_two_ranks_read_a_stream_and_resume(options, tmp_path):
    """A run of 6 steps loses its last checkpoint, resumes from step 4, and repeats the steps 5 and
    6."""
    line = ["train_pretrain.py", "--streaming", "--dataset", options.dataset, "--tokenizer"]
    line += [options.tokenizer, *"--max-seq-length 16 --batch-size 2 --accumulate 2".split()]
    line += "--steps 6 --save-every 2 --log-every 1 --workers 1 --device cpu --out".split()
    line.append(str(tmp_path))
    found = []
    for more in ([], ["--resume"]):
        output = tmp_path / "output"
        ranks = start_ranks(2, run_as_main, *line, *more, output=output)
        assert wait(*ranks) == [0, 0], output.read_text()
        found.append(metrics_of(tmp_path))
        (tmp_path / "checkpoints/step-000000006.pt").unlink()
    assert found[0] == found[1]


# ---- What is rejected ---------------------------------------------------------------------------


def test_a_list_with_a_number_is_named_in_a_stream_too():
    documents = iter([({}, ["a b", 7]), ({}, streaming.END_OF_EPOCH)] * 3)
    texts, _ = streaming.read_block(documents)
    with pytest.raises(ValueError, match="row 0: text is int, not text"):
        streaming.tokenize_block(texts, 0, small_tokenizer())


def test_a_stream_of_few_documents_says_what_it_needs(tmp_path):
    rows = [{"text": text} for text in TEXTS]
    write_rows(tmp_path / "few/train.jsonl", rows)
    with pytest.raises(
        ValueError,
        match=r"^--streaming: .* has 0 documents to evaluate on, and 2 are needed: a split named"
        " validation, or one of a hundred documents to train on; a small corpus needs no"
        " --streaming$",
    ):
        streaming.open_stream(str(tmp_path / "few"), None, "text")
    for split, texts in (("train", []), ("validation", TEXTS)):
        Dataset.from_dict({"text": texts}).to_parquet(tmp_path / f"none/{split}.parquet")
    with pytest.raises(ValueError, match="none has no row to train on$"):
        streaming.open_stream(str(tmp_path / "none"), None, "text")
    write_rows(tmp_path / "both/train.jsonl", rows)
    write_rows(tmp_path / "both/validation.jsonl", rows[:2])
    train, held_out = streaming.open_stream(str(tmp_path / "both"), None, "text")
    assert [row["text"] for row in train] == TEXTS
    assert held_out == TEXTS[:2]
