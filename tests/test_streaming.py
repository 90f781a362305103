"""A corpus that is read as it comes: nothing is lost, nothing is seen twice, and it can go on."""

import copy
import io
import json
from collections import Counter
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path

import pytest
import torch
from strategies import LETTERS, small_tokenizer
from test_distributed import lines, torchrun
from test_resume import OPTIONS, assert_same, in_process, run, state
from torch.utils.data import DataLoader

import data
from extras import streaming

SHARDS = 5


def write_shards(folder: Path, documents: int = 41) -> Path:
    """Five files of unequal length. Each document tells its number in every sentence."""
    folder.mkdir(parents=True, exist_ok=True)
    for shard in range(SHARDS):
        rows = [{"text": f"{word(i)} {word(i)}. " * (3 + i % 4)} for i in range(documents)
                if i * i % 7 % SHARDS == shard or i == shard]  # fmt: skip
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"train-{shard}.jsonl").write_text(text)
    (folder / "validation.jsonl").write_text(
        json.dumps({"text": "aa bb. cc dd. ee ff."}) + "\n" * 1
    )
    with (folder / "validation.jsonl").open("a") as file:
        file.write(json.dumps({"text": "ga ha. ia ja. ka la."}) + "\n")
    return folder


def word(number: int) -> str:
    return LETTERS[number // 9] + LETTERS[number % 9]  # a letter and a ## piece


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write_shards(tmp_path_factory.mktemp("shards"))


def all_documents(folder: Path) -> Counter:
    files = folder.glob("train-*.jsonl")
    return Counter(json.loads(line)["text"] for f in files for line in f.read_text().splitlines())


class Reading(streaming.StreamedBatches):
    """The documents of one epoch instead of batches."""

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
    """By any number of workers and processes up to that of the shards; every worker has some."""
    seen: Counter = Counter()
    for rank in range(world_size):
        batches = loader(folder, streaming.new_progress(workers), rank, world_size).dataset
        batches.__class__ = Reading
        found = [item["text"] for item in DataLoader(batches, batch_size=None, num_workers=workers)]
        assert found
        seen.update(found)
    assert seen == all_documents(folder)
    assert seen.total() > 41


def test_more_readers_than_shards_are_refused(folder):
    for world_size, workers in ((1, 6), (2, 3), (6, 0)):
        with pytest.raises(ValueError, match=r"read 6 shards at a time, and the corpus has 5: use"):
            loader(folder, streaming.new_progress(workers), 0, world_size)


def test_a_block_goes_on_until_two_documents_have_a_next_sentence(folder):
    """A title alone at the end of an epoch, or a long text and a title, are no reason to stop."""
    batches = loader(folder, streaming.new_progress(0)).dataset
    long, title, pair = "aa bb. " * 999, "aa", "aa bb. cc dd."

    def documents(*texts):
        ends = (
            (({}, text))
            for text in (
                *texts,
                streaming.END_OF_EPOCH,
                *texts,
                streaming.END_OF_EPOCH,
                *texts,
                streaming.END_OF_EPOCH,
            )
        )
        return iter(list(ends))

    assert streaming.read_block(documents(long, title, pair))[0] == [long, title, pair]
    assert streaming.read_block(documents(title, pair))[0] == [title, pair] * 2
    with pytest.raises(ValueError, match="a data worker has 0 documents with a next sentence"):
        streaming.read_block(documents(title, title))
    assert next(batches.batches([long, title, pair], 0, 0))


def test_a_worker_without_a_document_is_an_error_not_silence(tmp_path):
    (write_shards(tmp_path) / "train-2.jsonl").write_text("")
    batches = loader(tmp_path, streaming.new_progress(5))
    with pytest.raises(ValueError, match="a data worker has no document to read"):
        list(islice(streaming.take(batches, streaming.new_progress(5)), 20))


def counts(state: dict) -> list:
    """By worker, of documents, blocks and batches; the library's own counters may differ."""
    return [state["taken"], *({**bookmark, "rows": None} for bookmark in state["bookmarks"])]


@pytest.mark.parametrize("workers", [0, 2, 3])
@pytest.mark.parametrize("block", [60, 10**9])
def test_a_stream_goes_on_where_it_was_left(workers, block, folder, monkeypatch):
    """From any batch, over ends of blocks and epochs, after a state went through a file."""
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
        for number, batch in enumerate(islice(batches, 15), taken):
            assert_same(batch, expected[number])
        assert counts(left) == counts(states[taken + 14])


def test_every_example_of_a_block_comes_once_and_never_with_the_same_masks(folder):
    """One worker, so that an epoch is one block; the batch that ends it is filled up."""
    fresh = streaming.new_progress(0)
    batches = streaming.take(loader(folder, fresh), fresh)
    blocks: dict[int, list] = {}
    for batch in batches:
        number = fresh["bookmarks"][0]["block"]
        if number > 1:
            break
        blocks.setdefault(number, []).append(batch)
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


def test_documents_are_held_out_where_there_is_no_validation_split(tmp_path):
    """The same ones every time, about one in a hundred, and none of them is trained on."""
    texts = [f"{word(i % 200)} {i}. {i}." for i in range(2000)]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    rows, held_out = streaming.open_stream(str(tmp_path), None, "text")
    trained = [row["text"] for row in rows]
    assert sorted(trained + held_out) == sorted(texts)
    assert 5 <= len(held_out) <= 40  # 20 expected; outside is less likely than 1e-4


def test_rows_are_joined_to_documents(tmp_path):
    texts = ["aa ba. ca da.", "ea fa. ga ha.", "ia ja."] * 200
    for split in ("train", "validation"):
        rows = "".join(json.dumps({"text": text}) + "\n" for text in texts)
        (tmp_path / f"{split}.jsonl").write_text(rows)
    rows, _ = streaming.open_stream(str(tmp_path), None, "text", rows_per_document=3)
    assert next(iter(rows))["text"] == texts[:3]
    corpus = streaming.tokenize_block([texts[:3]] * 2, 0, small_tokenizer())
    assert len(corpus.document_starts) == 3
    assert len(corpus) == 2 * len(data.encode_plain(small_tokenizer(), [" ".join(texts[:3])])[0])


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
def test_a_killed_run_on_a_stream_ends_as_if_it_never_was(options, tmp_path):
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


def test_a_stream_needs_a_tokenizer(options, tmp_path):
    with pytest.raises(ValueError, match="--streaming needs a --tokenizer"):
        run(replace(options, out=str(tmp_path), tokenizer=None))


@pytest.mark.slow
def test_two_processes_read_a_stream_and_go_on(options, tmp_path):
    """Killed by its own last step: a run of 6 steps, resumed from step 4, repeats 5 and 6."""
    line = ["train_pretrain.py", "--streaming", "--dataset", options.dataset, "--tokenizer"]
    line += [options.tokenizer, *"--max-seq-length 16 --batch-size 2 --accumulate 2".split()]
    line += [*"--steps 6 --save-every 2 --log-every 1 --workers 1 --out".split(), str(tmp_path)]
    found = []
    for more in ([], ["--resume"]):
        process = torchrun(2, *line, *more, cwd=Path(__file__).parents[1])
        output, _ = process.communicate(timeout=120)
        assert process.returncode == 0, output
        found.append(lines(tmp_path))
        (tmp_path / "checkpoints/step-000000006.pt").unlink()
    assert found[0] == found[1]
