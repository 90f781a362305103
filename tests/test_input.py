"""Strange input: it is read for what it is, or one message says what is wrong with it."""

import io
import itertools
import json
import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from strategies import LETTERS, corpus_of, small_tokenizer
from test_run_folder import write_corpus

import data
import train_sst2
from bert import BertConfig, BertPretrainModel, SST2BertModel
from extras import streaming
from extras.attention import draw_text
from support.command_line import parse_options
from support.devices import choose_device
from train_pretrain import PretrainOptions, pretrain
from train_sst2 import SST2Options, predict

TEXTS = ["aa b.\n\nc d", "ee f.\n\ng h", "ii a.\n\nb c"]


def write_rows(path: Path, rows: list[dict]) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


# ---- Which files are a corpus -------------------------------------------------------------------


@pytest.mark.parametrize(
    "stray",
    [".meta.json", ".ipynb_checkpoints/x.json", "__pycache__/x.json", "notes.json", "x.csv"],
)
def test_a_folder_of_texts_is_a_document_a_file_whatever_stray_file_is_there(stray, tmp_path):
    for i, text in enumerate(TEXTS):
        (tmp_path / f"{i}.txt").write_text(text)
    (tmp_path / stray).parent.mkdir(exist_ok=True)
    (tmp_path / stray).write_text('{"text": "stray"}')
    assert list(data.get_dataset(str(tmp_path))["text"]) == TEXTS


def test_as_many_files_of_two_kinds_are_rejected(tmp_path):
    (tmp_path / "a.txt").write_text(TEXTS[0])
    write_rows(tmp_path / "b.jsonl", [{"text": "b"}])
    with pytest.raises(ValueError, match=r"has as many \.\w+ as \.\w+ files: name a file, or"):
        data.get_dataset(str(tmp_path))


@pytest.mark.parametrize("name", ["corpus[1].jsonl", "a*b.jsonl", "what?.jsonl", "[train].jsonl"])
def test_a_file_is_read_whatever_its_name(name, tmp_path):
    """Also where other files match the name as a pattern."""
    write_rows(tmp_path / "corpus1.jsonl", [{"text": "another"}])
    write_rows(tmp_path / "azb.jsonl", [{"text": "another"}])
    path = write_rows(tmp_path / name, [{"text": text} for text in TEXTS])
    assert list(data.get_dataset(path)["text"]) == TEXTS


@pytest.mark.parametrize("file", ["", "corpus.jsonl"])
def test_a_folder_whose_name_is_a_pattern_is_rejected(file, tmp_path):
    """`datasets` would look for files in a folder run1."""
    write_rows(tmp_path / "run[1]/corpus.jsonl", [{"text": text} for text in TEXTS])
    with pytest.raises(
        ValueError, match=r"run\[1\]: the library takes \[ \] \* \? in a folder's name"
    ):
        data.get_dataset(str(tmp_path / "run[1]" / file))


def test_a_file_that_was_replaced_within_its_time_is_read_anew(tmp_path):
    """`datasets` knows a file by its path and time; its size counts here, too."""
    import os

    for texts in (TEXTS, [*TEXTS, "one more"]):
        path = write_rows(tmp_path / "corpus.jsonl", [{"text": text} for text in texts])
        os.utime(path, (1e9, 1e9))
        assert list(data.get_dataset(path)["text"]) == texts
        assert list(data.get_dataset(str(tmp_path))["text"]) == texts


@pytest.mark.parametrize("read", [data.get_corpus, data.get_reviews])
def test_a_data_set_without_a_split_to_train_on_is_named_with_those_it_has(read, tmp_path):
    write_rows(tmp_path / "validation.jsonl", [{"text": "a b", "label": 1}] * 9)
    arguments = [small_tokenizer()] if read is data.get_corpus else []
    with pytest.raises(ValueError, match=r"only validation; see --split|\['validation'\]"):
        read(str(tmp_path), "train", *arguments)


# ---- What is in the rows ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "kind"),
    [([1, 2], "int"), (["a b.", 2.5], "float"), ({"a": 1}, "dict"), (True, "bool")],
)
def test_a_row_that_is_no_text_is_named(text, kind):
    rows = {"text": ["a b. c", ["a b.", None, "c"], text]}
    with pytest.raises(ValueError, match=f"row 2: text is {kind}, not text"):
        data.tokenize_documents(rows, [0, 1, 2], small_tokenizer(), "text")


def test_a_row_is_named_by_its_own_number_where_rows_are_joined():
    rows = {"text": [["a", "b"], ["c", "d"], ["e", 7]]}
    with pytest.raises(ValueError, match="row 5: text is int, not text"):
        data.tokenize_documents(rows, [0, 1, 2], small_tokenizer(), "text", rows_per_document=2)


def test_a_list_with_a_number_is_named_in_a_stream_too():
    documents = iter([({}, ["a b", 7]), ({}, streaming.END_OF_EPOCH)] * 3)
    texts, _ = streaming.read_block(documents)
    with pytest.raises(ValueError, match="row 0: text is int, not text"):
        streaming.tokenize_block(texts, 0, small_tokenizer())


def test_the_splits_are_named_before_a_tokenizer_is_learned(tmp_path):
    write_rows(tmp_path / "validation.jsonl", [{"text": text} for text in TEXTS])
    with pytest.raises(ValueError, match="has no split train, only validation; see --split"):
        data.get_texts(str(tmp_path))


def test_a_column_of_lists_of_numbers_is_named(tmp_path):
    path = write_rows(tmp_path / "corpus.jsonl", [{"text": [1, 2]}] * 9)
    with pytest.raises(ValueError, match="--text-column text is not text but List"):
        pretrain(PretrainOptions(out=str(tmp_path / "run"), dataset=path, workers=0))
    with pytest.raises(ValueError, match="row 0: text is int, not text"):
        data.get_corpus(path, "train", small_tokenizer())


@pytest.mark.parametrize("label", [-1, 2, 1.0, 0.5, True, "1", None])
def test_labels_are_the_integers_0_and_1(label, tmp_path):
    rows = [{"sentence": "a", "label": label}] * 2
    path = write_rows(tmp_path / "train.jsonl", rows)
    with pytest.raises(
        ValueError, match=r"train: row 0 has the label .*, not 0 or 1 \(SetFit/sst2"
    ):
        data.get_reviews(path, "train")


@pytest.mark.parametrize("sentence", [5, ["a", "b"], None])
def test_sentences_are_text(sentence, tmp_path):
    path = write_rows(tmp_path / "train.jsonl", [{"sentence": sentence, "label": 1}])
    with pytest.raises(ValueError, match=r"row 0 has the sentence .*, which is no text"):
        data.get_reviews(path, "train")


# ---- A table with an order of its own -----------------------------------------------------------


@pytest.mark.parametrize(
    "change",
    [
        lambda rows: rows.shuffle(seed=3),
        lambda rows: rows.filter(lambda row: row["sentences"] != 3),
        lambda rows: rows.select([3, 1, 4]),
        lambda rows: rows.select(range(1, 4)),
        lambda rows: rows.sort("sentences", reverse=True),
    ],
    ids=["shuffled", "filtered", "selected", "sliced", "sorted"],
)
def test_a_table_is_followed_in_its_own_order(change):
    """The table beneath has another one, and was read instead."""
    docs = [[[10 * d + s] * 2 for s in range(2 + d % 3)] for d in range(1, 6)]
    rows = change(corpus_of(docs).rows)
    corpus = data.TokenizedCorpus(rows)
    expected = [list(tokens) for tokens in rows["tokens"]]
    edges = itertools.pairwise(corpus.document_starts.tolist())
    assert [corpus.tokens(start, end).tolist() for start, end in edges] == expected
    sentences = itertools.pairwise(corpus.sentence_starts.tolist())
    assert all(len(set(corpus.tokens(start, end).tolist())) == 1 for start, end in sentences)
    again = pickle.loads(pickle.dumps(corpus))
    assert np.array_equal(again.tokens(0, 4), corpus.tokens(0, 4))


# ---- Streams ------------------------------------------------------------------------------------


def test_a_stream_of_few_documents_says_what_it_needs(tmp_path):
    rows = [{"text": text} for text in TEXTS]
    write_rows(tmp_path / "few/train.jsonl", rows)
    with pytest.raises(
        ValueError, match=r"--streaming: .* has 0 documents to evaluate on, and 2 are"
    ):
        streaming.open_stream(str(tmp_path / "few"), None, "text")
    write_rows(tmp_path / "both/train.jsonl", rows)
    write_rows(tmp_path / "both/validation.jsonl", rows[:2])
    train, held_out = streaming.open_stream(str(tmp_path / "both"), None, "text")
    assert [row["text"] for row in train] == TEXTS
    assert held_out == TEXTS[:2]


# ---- Options ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "line", "message"),
    [
        (PretrainOptions, "--seed -1", "--seed must be at least 0, got -1"),
        (
            PretrainOptions,
            "--seed 9223372036854775808",
            "--seed must be at most 9223372036854775807",
        ),
        (SST2Options, "--seed 9223372036854775807", "--seed must be at most 922337203685"),
        (SST2Options, "--seed -5", "--seed must be at least 0, got -5"),
        (
            PretrainOptions,
            "--max-seq-length 1000000000000",
            "--max-seq-length must be at most 1000000",
        ),
        (PretrainOptions, "--positions 1000000000000", "--positions must be at most 1000000"),
        (PretrainOptions, "--vocab-size 1000000000000", "--vocab-size must be at most 1000000"),
        (SST2Options, "--vocab-size 1000000000000", "--vocab-size must be at most 1000000"),
        (
            PretrainOptions,
            "--rows-per-document 1000000000000",
            "--rows-per-document must be at most",
        ),
        (PretrainOptions, "--batch-size 1000000000000", "--batch-size must be at most 1000000"),
        (SST2Options, "--max-seq-length 1000000000000", "--max-seq-length must be at most 1000000"),
    ],
)
def test_numbers_that_would_overflow_are_rejected(options, line, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        parse_options(options, line.split())
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_the_largest_seed_trains(tmp_path):
    corpus = write_corpus(tmp_path / "corpus")
    options = parse_options(PretrainOptions, ["--seed", "9223372036854775807"])
    pretrain(
        replace(
            options, out=str(tmp_path / "run"), dataset=f"{corpus}/corpus.jsonl", batch_size=2,
            tokenizer=str(corpus), steps=1, max_seq_length=16, workers=0, eval_batches=1,
        )
    )  # fmt: skip
    assert (tmp_path / "run/model").exists()


def test_a_warmup_longer_than_the_run_is_rejected(tmp_path):
    with pytest.raises(ValueError, match="--warmup-steps 9 is more than --steps 8"):
        pretrain(PretrainOptions(out=str(tmp_path / "run"), steps=8, warmup_steps=9))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["meta", "mps", "cuda:x", "cpu:1", "cuda:", "gpu", ""])
def test_a_device_is_cpu_or_cuda(name):
    with pytest.raises(ValueError, match=f"--device {name} is not cpu, cuda or cuda:0"):
        choose_device(name)


def test_a_gpu_that_is_not_there_is_named(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert choose_device("cuda:1") == torch.device("cuda:1")
    with pytest.raises(ValueError, match="--device cuda:2, but torch sees 2 GPUs here"):
        choose_device("cuda:2")


def test_a_run_cannot_be_written_below_a_file(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="--out .*file/run cannot be written: "):
        pretrain(PretrainOptions(out=str(tmp_path / "file/run")))


# ---- Predictions and pictures -------------------------------------------------------------------


def save(model_class: type, folder: Path) -> str:
    sizes = {"vocab_size": small_tokenizer().get_vocab_size(), "max_seq_length": 16}
    model_class(BertConfig.named("tiny", **sizes), 0).save_pretrained(folder, small_tokenizer())
    return str(folder)


@pytest.mark.filterwarnings("ignore")
def test_predictions_need_a_classifier_even_if_no_warning_is_shown(tmp_path):
    """It was told by a warning, and with python -W ignore a random classifier answered."""
    options = SST2Options(weights=save(BertPretrainModel, tmp_path), predict=("a",))
    with pytest.raises(
        ValueError, match=r"a run on SST-2; .* has no classifier\.weight, classifier"
    ):
        predict(options)


def test_predictions_obey_the_device(tmp_path, monkeypatch):
    options = SST2Options(weights=save(SST2BertModel, tmp_path), predict=("a",), device="cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="--device cuda, but torch sees no GPU here"):
        predict(options)
    monkeypatch.setattr(train_sst2, "choose_device", lambda name: torch.device("meta"))
    with pytest.raises((RuntimeError, NotImplementedError), match="meta"):  # it has gone there
        predict(options)


def test_a_line_of_standard_input_that_is_not_utf_8_is_named(tmp_path, monkeypatch, capsys):
    lines = io.TextIOWrapper(io.BytesIO("a b\nné\n".encode() + "né\n".encode("latin-1")))
    monkeypatch.setattr("sys.stdin", lines)
    options = SST2Options(weights=save(SST2BertModel, tmp_path), predict=("-",), device="cpu")
    with pytest.raises(ValueError, match="--predict -: line 3 is not UTF-8"):
        predict(options)
    shown = [line.split("  ")[-1] for line in capsys.readouterr().out.splitlines()]
    assert shown == ["a b", "né"]


def test_a_picture_into_a_folder_that_is_not_there_is_rejected_before_any_work(tmp_path, capsys):
    with pytest.raises(ValueError, match=r"--out .*a\.png: its folder does not exist"):
        draw_text(save(BertPretrainModel, tmp_path), "a b", str(tmp_path / "nowhere/a.png"))
    assert capsys.readouterr().out == ""


# ---- Workers that are not forked ----------------------------------------------------------------


@pytest.mark.slow
def test_workers_that_are_spawned_make_the_same_batches(tmp_path):
    """As on macOS: they get the names of the files, not the tokens."""
    rows = [{"text": "\n\n".join(f"{a} {b} {a}" for b in LETTERS[:9])} for a in LETTERS]
    path = write_rows(tmp_path / "corpus.jsonl", rows)
    corpus = data.get_corpus(path, "train", small_tokenizer())
    dataset = data.PretrainDataset(corpus, small_tokenizer(), 16)
    alone, spawned = (data.get_split_dataloader(dataset, 4, workers=n) for n in (0, 2))
    spawned.multiprocessing_context = "spawn"
    for one, other in itertools.islice(zip(alone, spawned, strict=True), 5):
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in one)
