"""From files to a corpus: which files and splits are read, and how stage 1 turns their documents
into three arrays that are cached. What is skipped is counted, and what cannot be read is rejected.
"""

import itertools
import json
import math
import pickle
import re
import shutil
import zipfile
from dataclasses import replace
from pathlib import Path
from unittest import mock

import datasets
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import (
    LETTERS,
    TEXTS,
    VOCABULARY,
    corpus_of,
    documents,
    is_within,
    small_tokenizer,
    write_rows,
    write_texts,
)

import data
import train_pretrain
from data import PretrainDataset, TokenizedCorpus
from train_pretrain import PretrainOptions, pretrain


def write_whole(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def entropy(tokens: np.ndarray) -> float:
    """Returns the entropy of the tokens in nats."""
    shares = np.unique(tokens, return_counts=True)[1] / len(tokens)
    return -sum(p * math.log(p) for p in shares)


def rows_of(texts: list) -> datasets.Dataset:
    return datasets.Dataset.from_dict({"text": texts})


def sample_vocabulary(tmp_path) -> str:
    path = tmp_path / "vocab.txt"
    words = sorted(
        set(re.findall(r"[a-z]+|\S", (data.SAMPLE / "corpus/validation.jsonl").read_text().lower()))
    )
    path.write_text("\n".join(dict.fromkeys([*data.SPECIAL_TOKENS, *words])) + "\n")
    return str(path)


# ---- Three arrays -------------------------------------------------------------------------------


def test_a_corpus_describes_itself_in_a_line():
    corpus = corpus_of([[[5], [6]], [[7, 8, 9]], [[10], [11], [12]]])
    assert corpus.describe() == (
        "2 documents, 5 tokens; documents left out: {'no sentence': 0, 'one sentence': 1}"
    )


def test_documents_of_one_sentence_are_left_out_and_counted():
    corpus = corpus_of([[[5], [6]], [], [[7, 8, 9]], [[10], [11], [12]]])
    assert corpus.skipped == {"no sentence": 1, "one sentence": 1}
    assert len(corpus) == 5
    assert corpus.document_starts.tolist() == [0, 2, 5]
    assert corpus.sentence_starts.tolist() == [0, 1, 2, 3, 4, 5]


def test_a_corpus_of_one_document_is_rejected():
    with pytest.raises(
        ValueError, match=r"1 documents have a next sentence, 2 are needed; .*'one sentence': 1"
    ):
        corpus_of([[[5], [6]], [[7]]])


def test_the_checksum_of_a_corpus_changes_with_every_token_and_start():
    docs = [[[5, 6], [7]], [[8], [9, 10]]]
    same = corpus_of(docs).checksum()
    assert corpus_of(docs).checksum() == same
    others = [
        [[[5, 6], [7]], [[8], [9, 11]]],  # another token
        [[[6, 5], [7]], [[8], [9, 10]]],  # another order
        [[[5], [6, 7]], [[8], [9, 10]]],  # a sentence that starts elsewhere
        [[[5, 6], [7], [8]], [[9], [10]]],  # a document that starts elsewhere
    ]
    assert len({corpus_of(other).checksum() for other in others} | {same}) == 5


@given(documents())
def test_unigram_entropy_is_that_of_the_tokens(docs):
    corpus = corpus_of(docs)
    assert corpus.unigram_entropy() == pytest.approx(entropy(np.concatenate(corpus.chunks)))


def test_a_pickled_corpus_maps_the_same_tokens(tmp_path):
    """Workers that are not forked receive the names of the files, not the tokens."""
    import pickle

    corpus = data.get_corpus(
        "sample", "validation", data.load_tokenizer(sample_vocabulary(tmp_path))
    )
    pickled = pickle.dumps(corpus)
    assert len(pickled) < len(corpus)
    assert np.array_equal(pickle.loads(pickled).tokens(0, 50), corpus.tokens(0, 50))


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
def test_rows_are_read_in_the_order_of_their_table(change):
    """A shuffled or filtered table has another order than the table beneath, which was read
    instead."""
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


# ---- Stage 1: from text to tokens ---------------------------------------------------------------


@given(st.lists(st.text(alphabet=LETTERS + " .!\n中é[MASK]", max_size=60), max_size=5))
def test_stage_1_keeps_every_token_of_a_document_with_two_sentences(documents):
    indices = list(range(len(documents)))
    out = data.tokenize_documents({"text": documents}, indices, small_tokenizer(), "text")
    for text, tokens, starts, count in zip(
        documents, out["tokens"], out["starts"], out["sentences"], strict=True
    ):
        parts = [
            s for s in data.split_sentences(text) if data.encode_plain(small_tokenizer(), [s])[0]
        ]
        assert count == len(parts)
        whole = data.encode_plain(small_tokenizer(), [text])[0] if count > 1 else []
        assert tokens.tolist() == whole
        assert len(starts) == (count if count > 1 else 0)
        assert sorted({*starts.tolist()}) == starts.tolist()


def test_a_corpus_in_many_pieces_is_one_array_of_tokens():
    """Stage 1 writes 16 documents at a time; positions count through all of them."""
    letters = sorted(LETTERS * 2)[:50]  # the highest id differs from piece to piece
    ends = ["" if i < 40 else " ." for i in range(50)]
    texts = [f"{'a ' * (i % 5 + 1)} {c}\n\n{c} a\n\na{ends[i]}" for i, c in enumerate(letters)]
    corpus = TokenizedCorpus(data.tokenize_dataset(rows_of(texts), small_tokenizer()))
    assert len(corpus.chunks) == 4
    ids = [data.encode_plain(small_tokenizer(), [text])[0] for text in texts]
    assert len(corpus) == sum(map(len, ids))
    assert corpus.document_starts.tolist() == [0, *np.cumsum([len(i) for i in ids])]
    starts = []
    for start, end, expected, text in zip(
        corpus.document_starts, corpus.document_starts[1:], ids, texts, strict=False
    ):
        assert corpus.tokens(start, end).tolist() == expected
        assert corpus.tokens(start + 1, end - 1).tolist() == expected[1:-1]
        parts = data.encode_plain(small_tokenizer(), data.split_sentences(text))
        starts += [start + sum(map(len, parts[:i])) for i in range(len(parts))]
    assert corpus.sentence_starts.tolist() == [*starts, len(corpus)]
    assert {chunk.dtype for chunk in corpus.chunks} == {np.dtype("uint16")}
    assert corpus.unigram_entropy() == pytest.approx(entropy(np.concatenate(corpus.chunks)))


def test_the_largest_id_decides_how_wide_a_token_is_stored():
    """A vocabulary with holes has few tokens, but ids above 65,535; these overflowed."""
    names = {token: i for i, token in enumerate(VOCABULARY)}
    for largest, dtype in ((2**16 - 1, "uint16"), (2**16, "uint32"), (300_000, "uint32")):
        tokenizer = data.wordpiece({**names, "xx": largest})
        rows = data.datasets.Dataset.from_dict({"text": ["xx a\n\nb", "c\n\nxx d"]})
        corpus = data.TokenizedCorpus(data.tokenize_dataset(rows, tokenizer))
        assert {str(chunk.dtype) for chunk in corpus.chunks} == {dtype}
        assert largest in corpus.tokens(0, 3)
        # Of six tokens, one is there twice.
        shares = [2 / 6, 1 / 6, 1 / 6, 1 / 6, 1 / 6]
        assert corpus.unigram_entropy() == pytest.approx(-sum(p * math.log(p) for p in shares))


def test_large_corpora_are_tokenized_in_larger_pieces(monkeypatch):
    """A piece has a thousandth of the documents, but 16 at least, so that memory stays bounded."""
    sizes = []
    real = data.tokenize_documents

    def counted(rows, *args, **kwargs):
        sizes.append(len(rows["text"]))
        return real(rows, *args, **kwargs)

    monkeypatch.setattr(data, "tokenize_documents", counted)
    corpus = TokenizedCorpus(
        data.tokenize_dataset(rows_of(["a b\n\nc", "c\n\nd e"] * 10_000), small_tokenizer())
    )
    assert sizes == [20] * 1000
    assert len(corpus) == 60_000
    sizes.clear()
    data.tokenize_dataset(rows_of(["new\n\none"] * 40), small_tokenizer())
    assert sizes == [16, 16, 8]


def test_stage_1_in_two_processes_gives_the_same_tokens(tmp_path, monkeypatch):
    path = write_texts(tmp_path / "corpus.jsonl", [f"{c} first\n\n{c} then" for c in LETTERS])
    alone = data.tokenize_dataset(data.get_dataset(str(path)), small_tokenizer())
    monkeypatch.setattr(data, "STAGE_1_VERSION", -2)  # or the cache would answer
    two = data.tokenize_dataset(data.get_dataset(str(path)), small_tokenizer(), processes=2)
    assert (len(alone.cache_files), len(two.cache_files)) == (1, 2)
    assert two["tokens"][:] == alone["tokens"][:]


def test_rows_are_regrouped_into_documents():
    """A corpus of a sentence per row has no pairs until rows are joined."""
    rows = rows_of(["a b.", "c d.", "e f.", "g.", "a.", "b.", "c."])
    with pytest.raises(ValueError, match="0 documents have a next sentence.*'one sentence': 7"):
        TokenizedCorpus(data.tokenize_dataset(rows, small_tokenizer()))
    grouped = data.tokenize_dataset(rows, small_tokenizer(), rows_per_document=3)
    assert grouped["sentences"] == [3, 3, 1]
    corpus = TokenizedCorpus(grouped)
    assert [VOCABULARY[t] for t in corpus.tokens(0, 4)] == ["a", "b", ".", "c"]
    pairs = data.tokenize_dataset(rows, small_tokenizer(), rows_per_document=2)
    assert pairs["sentences"] == [2, 2, 2, 1]


def test_blank_lines_do_not_end_a_document():
    """Paragraphs of one sentence make one document, so half of its pairs are true ones: within five
    standard deviations of 1,000 pairs. If each paragraph were a document, no sentence would follow
    another."""
    paragraphs = "\n\n".join(f"{c}{c} is one paragraph" for c in LETTERS)
    corpus = TokenizedCorpus(data.tokenize_dataset(rows_of([paragraphs] * 4), small_tokenizer()))
    assert len(corpus.document_starts) - 1 == 4
    batch = PretrainDataset(corpus, small_tokenizer(), 32).batch(list(range(1000)))
    assert is_within(batch["nsp_labels"].double().mean().item(), 0.5, 1000)


# ---- What is skipped, and what is rejected ------------------------------------------------------


def test_empty_rows_are_counted():
    corpus = TokenizedCorpus(
        data.tokenize_dataset(rows_of(["aa. b", "", None, "cc. d"]), small_tokenizer())
    )
    assert corpus.skipped == {"no sentence": 2, "one sentence": 0}


def test_a_poisoned_row_surfaces_with_its_index():
    rows = {"text": ["a. b.", None, 7]}
    with pytest.raises(ValueError, match="row 12: text is int, not text"):
        data.tokenize_documents(rows, [10, 11, 12], small_tokenizer(), "text")


@pytest.mark.parametrize(
    ("text", "kind"),
    [([1, 2], "int"), (["a b.", 2.5], "float"), ({"a": 1}, "dict"), (True, "bool")],
)
def test_a_row_that_is_no_text_is_named(text, kind):
    rows = {"text": ["a b. c", ["a b.", None, "c"], text]}
    with pytest.raises(ValueError, match=f"row 2: text is {kind}, not text"):
        data.tokenize_documents(rows, [0, 1, 2], small_tokenizer(), "text")


def test_a_row_is_named_by_its_own_index_where_rows_are_joined():
    rows = {"text": [["a", "b"], ["c", "d"], ["e", 7]]}
    with pytest.raises(ValueError, match="row 5: text is int, not text"):
        data.tokenize_documents(rows, [0, 1, 2], small_tokenizer(), "text", rows_per_document=2)


def test_a_column_of_lists_of_numbers_is_named(tmp_path):
    path = write_rows(tmp_path / "corpus.jsonl", [{"text": [1, 2]}] * 9)
    with pytest.raises(ValueError, match="--text-column text is not text but List"):
        pretrain(PretrainOptions(out=str(tmp_path / "run"), dataset=path, workers=0))
    with pytest.raises(ValueError, match="row 0: text is int, not text"):
        data.get_corpus(path, "train", small_tokenizer())


def test_a_missing_column_is_rejected_with_the_columns_that_exist():
    with pytest.raises(ValueError, match=r"no column 'body': --text-column is of \['text'\]"):
        data.tokenize_dataset(rows_of(["a."]), small_tokenizer(), text_column="body")


# ---- The cache ----------------------------------------------------------------------------------


def test_a_second_start_reads_the_cache_and_another_tokenizer_does_not(tmp_path, monkeypatch):
    """The cache's key is the corpus, the tokenizer and the version of stage 1."""
    path = write_texts(tmp_path / "corpus.jsonl", [f"a{i} bb. c d." for i in range(20)])
    calls = []
    real = data.tokenize_documents

    def counted(*args, **kwargs):
        calls.append(1)
        return real(*args, **kwargs)

    monkeypatch.setattr(data, "tokenize_documents", counted)

    def start(tokenizer):
        rows = data.tokenize_dataset(data.get_dataset(str(path)), tokenizer)
        calls_made, calls[:] = len(calls), []
        return calls_made, np.concatenate(rows["tokens"])

    made, tokens = start(small_tokenizer())
    assert made > 0
    again, same = start(small_tokenizer())
    assert again == 0
    assert np.array_equal(tokens, same)
    other = data.wordpiece({token: i for i, token in enumerate([*VOCABULARY, "new"])})
    assert start(other)[0] > 0
    monkeypatch.setattr(data, "STAGE_1_VERSION", -1)
    assert start(small_tokenizer())[0] > 0


def test_a_file_that_was_replaced_without_a_new_time_is_read_anew(tmp_path):
    """`datasets` identifies a file by its path and time; here its size counts, too."""
    import os

    for texts in (TEXTS, [*TEXTS, "one more"]):
        path = write_rows(tmp_path / "corpus.jsonl", [{"text": text} for text in texts])
        os.utime(path, (1e9, 1e9))
        assert list(data.get_dataset(path)["text"]) == texts
        assert list(data.get_dataset(str(tmp_path))["text"]) == texts


# ---- Which files are a corpus -------------------------------------------------------------------


def test_every_kind_of_file_gives_one_document_per_row(tmp_path):
    texts = ["First. One.\n\nTwo.", "Second."]
    (tmp_path / "jsonl").mkdir()
    (tmp_path / "jsonl/train.jsonl").write_text(
        "".join(json.dumps({"text": t}) + "\n" for t in texts)
    )
    (tmp_path / "parquet").mkdir()
    rows_of(texts).to_parquet(tmp_path / "parquet/train.parquet")
    (tmp_path / "text").mkdir()
    for i, text in enumerate(texts):
        (tmp_path / f"text/{i}.txt").write_text(text)
    for kind in ("jsonl", "parquet", "text"):
        assert list(data.get_dataset(str(tmp_path / kind))["text"]) == texts, kind
    for file in ("jsonl/train.jsonl", "parquet/train.parquet"):
        assert list(data.get_dataset(str(tmp_path / file))["text"]) == texts, file
    assert list(data.get_dataset(str(tmp_path / "text/1.txt"))["text"]) == ["Second."]
    assert [
        row["text"] for row in data.get_dataset(str(tmp_path / "jsonl"), streaming=True)
    ] == texts


@pytest.mark.parametrize(
    "stray",
    [".meta.json", ".ipynb_checkpoints/x.json", "__pycache__/x.json", "notes.json", "x.csv"],
)
def test_a_folder_of_texts_is_a_document_a_file_whatever_stray_file_is_there(stray, tmp_path):
    """It may be as many files of one kind as there are texts, if `datasets` does not read these."""
    for i, text in enumerate(TEXTS):
        (tmp_path / f"{i}.txt").write_text(text)
    (tmp_path / stray).parent.mkdir(exist_ok=True)
    (tmp_path / stray).write_text('{"text": "stray"}')
    assert list(data.get_dataset(str(tmp_path))["text"]) == TEXTS


@pytest.mark.parametrize("name", [".{}.json", "__pycache__/{}.json", "{}.csv"])
def test_files_that_are_not_read_do_not_decide_the_kind_of_a_folder(name, tmp_path):
    (tmp_path / "a.txt").write_text("First line.\nSecond line.")
    for i in range(3):
        stray = tmp_path / name.format(i)
        stray.parent.mkdir(exist_ok=True)
        stray.write_text('{"text": "stray"}')
    where, options = data.describe_files(tmp_path)
    assert (where, options["sample_by"]) == (str(tmp_path), "document")


def test_as_many_files_of_two_kinds_are_rejected(tmp_path):
    (tmp_path / "a.txt").write_text(TEXTS[0])
    write_rows(tmp_path / "b.jsonl", [{"text": "b"}])
    with pytest.raises(
        ValueError,
        match=r"has as many \.txt as \.json files: name a file, or a folder of files of one kind$",
    ):
        data.get_dataset(str(tmp_path))


@pytest.mark.parametrize("name", ["corpus[1].jsonl", "a*b.jsonl", "what?.jsonl", "[train].jsonl"])
def test_a_file_is_read_whatever_its_name(name, tmp_path):
    """The name is no pattern, even where other files would match it."""
    folder = tmp_path / "AZaz09 -_.X"
    write_rows(folder / "corpus1.jsonl", [{"text": "another"}])
    write_rows(folder / "azb.jsonl", [{"text": "another"}])
    path = write_rows(folder / name, [{"text": text} for text in TEXTS])
    assert list(data.get_dataset(path)["text"]) == TEXTS


@pytest.mark.parametrize("name", ["text", "json", "parquet", "./csv", ".", "a/../json"])
def test_a_folder_is_read_whatever_its_name(name, tmp_path, monkeypatch):
    """The library takes some names for a kind of files, and read all of the current directory."""
    write_texts(tmp_path / "elsewhere.jsonl", ["another"])
    (tmp_path / "here/a").mkdir(parents=True)
    write_texts(tmp_path / "here" / name / "corpus.jsonl", TEXTS)
    monkeypatch.chdir(tmp_path / "here")
    if name != ".":
        write_texts(tmp_path / "here/beside.jsonl", ["another"])
    assert list(data.get_dataset(name)["text"]) == TEXTS


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("strays", ["info/{}.json", "{}.txt.gz"])
def test_texts_that_would_be_read_by_the_line_are_rejected(strays, streaming, tmp_path):
    """The library chooses the kind by other rules, and takes a line for a document of that kind."""
    for i in range(2):
        write_whole(tmp_path / f"train/{i}.txt", "One.\nTwo.")
    for i in range(3):
        write_whole(tmp_path / strays.format(i), '{"text": "stray"}')
    if strays.endswith(".gz"):
        shutil.rmtree(tmp_path / "train")
    with pytest.raises(ValueError, match=r"read by the line: name a folder of \.txt files alone"):
        data.get_dataset(str(tmp_path), streaming=streaming)


@pytest.mark.parametrize("streaming", [False, True])
def test_a_title_that_contains_train_does_not_hide_the_other_texts(streaming, tmp_path):
    """The library makes it the only text of the split."""
    for name in ("emma", "night-train", "persuasion"):
        write_whole(tmp_path / f"{name}.txt", name)
    (tmp_path / "README.md").write_text("# My books")
    message = (
        "2 of 3 texts, such as emma.txt, are not read, because a name like night-train.txt makes"
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        data.get_dataset(str(tmp_path), streaming=streaming)


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_tables_beside_one_that_makes_a_split_are_announced(kind, tmp_path, capsys):
    """They were left out without a word. (Some may be no tables but descriptions of these.)"""
    for name in ("part-1", "part-2", "night-train"):
        rows = rows_of([name])
        write = rows.to_json if kind == "jsonl" else rows.to_parquet
        write(str(tmp_path / f"{name}.{kind}"))
    assert data.get_dataset(str(tmp_path))["text"][:] == ["night-train"]
    assert (
        f"2 of 3 files, such as part-1.{kind}, are not read, because a name like night-train.{kind}"
        " makes a split, or because"
    ) in capsys.readouterr().err
    (tmp_path / f"night-train.{kind}").rename(tmp_path / f"part-3.{kind}")
    assert len(data.get_dataset(str(tmp_path))) == 3
    assert "not read" not in capsys.readouterr().err


def test_files_that_the_library_never_reads_are_not_announced(tmp_path, capsys):
    for name in ("a", "b"):
        rows_of([name]).to_json(str(tmp_path / f"{name}.json"))
    for name in ("config.json", "dataset_infos.json"):
        write_whole(tmp_path / name, "{}")
    assert data.get_dataset(str(tmp_path))["text"][:] == ["a", "b"]
    assert "not read" not in capsys.readouterr().err


def test_texts_that_are_links_or_end_in_upper_case_are_announced_by_their_names(tmp_path, capsys):
    write_whole(tmp_path / "real/1.txt", "one")
    (tmp_path / "here/train").mkdir(parents=True)
    for name in ("a", "b"):
        (tmp_path / f"here/train/{name}.txt").symlink_to(tmp_path / "real/1.txt")
    write_whole(tmp_path / "here/LICENSE.TXT", "three")
    assert list(data.get_dataset(str(tmp_path / "here"))["text"]) == ["one", "one"]
    assert "1 of 3 texts, such as LICENSE.TXT, are not read" in capsys.readouterr().err
    for name in ("1", "2", "3"):
        write_whole(tmp_path / f"here/{name}.TXT", "more")
    with pytest.raises(ValueError, match="4 of 6 texts, such as 1.TXT, are not read.*train/a.txt"):
        data.get_dataset(str(tmp_path / "here"))


def test_texts_beside_an_archive_that_makes_a_split_are_named(tmp_path):
    for name in ("a", "b"):
        write_whole(tmp_path / f"{name}.txt", name)
    with zipfile.ZipFile(tmp_path / "train.zip", "w") as archive:
        archive.writestr("c.txt", "c")
    with pytest.raises(ValueError, match="2 of 2 texts, such as a.txt, are not read"):
        data.get_dataset(str(tmp_path))


def test_texts_in_folders_of_splits_are_read_and_others_announced(tmp_path, monkeypatch, capsys):
    """By a path with links and dots, too. A dataset card may leave a text out."""
    for name in ("train/a", "train/b", "validation/c", "LICENSE"):
        write_whole(tmp_path / f"here/{name}.txt", name)
    (tmp_path / "link").symlink_to("here")
    monkeypatch.chdir(tmp_path / "here")
    for path in (".", "../link", "../here/../link", str(tmp_path / "link")):
        splits = data.get_dataset(path, split=None)
        assert {name: list(rows["text"]) for name, rows in splits.items()} == {
            "train": ["train/a", "train/b"],
            "validation": ["validation/c"],
        }
        announced = (
            f"{path}: 1 of 4 texts, such as LICENSE.txt, are not read, because a name like"
            " train/a.txt makes a split, or because"
        )
        assert announced in capsys.readouterr().err
    card = "---\nconfigs:\n- config_name: default\n  data_files: train/a.txt\n---\n"
    (tmp_path / "here/README.md").write_text(card)
    assert list(data.get_dataset(".")["text"]) == ["train/a"]
    assert "not read" not in capsys.readouterr().err


def test_a_folder_with_a_script_of_its_own_name_is_rejected_in_one_line(tmp_path):
    """The library took such scripts once, and says that it does not any more."""
    write_texts(tmp_path / "books/corpus.jsonl", TEXTS)
    (tmp_path / "books/books.py").write_text("")
    with pytest.raises(ValueError, match=r"cannot read .*books: Dataset scripts are no longer"):
        data.get_dataset(str(tmp_path / "books"))


@pytest.mark.parametrize("file", ["", "corpus.jsonl"])
def test_a_folder_whose_name_is_a_pattern_is_rejected(file, tmp_path):
    """`datasets` would look for files in a folder run1."""
    write_rows(tmp_path / "run[1]/corpus.jsonl", [{"text": text} for text in TEXTS])
    with pytest.raises(
        ValueError, match=r"run\[1\]: the library takes \[ \] \* \? in a folder's name"
    ):
        data.get_dataset(str(tmp_path / "run[1]" / file))


def test_a_text_file_beside_a_corpus_is_no_part_of_it(tmp_path):
    path = write_texts(tmp_path / "corpus.jsonl", ["a"])
    (tmp_path / "LICENSE.txt").write_text("b")
    assert list(data.get_dataset(path)["text"]) == ["a"]


def test_the_cause_of_a_file_that_cannot_be_read_is_reported(tmp_path):
    path = tmp_path / "train.jsonl"
    path.write_text('{"text": "a"}\n{"text": \n')
    with pytest.raises(ValueError, match=r"cannot read .*train\.jsonl: .*JSON"):
        data.get_dataset(str(path))
    path.write_text('{"text": "a"}\n')
    with pytest.raises(ValueError, match=r"cannot read .*train\.jsonl: .*Unknown split"):
        data.get_dataset(str(path), split="validation")
    path.write_text("")
    with pytest.raises(ValueError, match=r"cannot read .*train\.jsonl: it is empty$"):
        data.get_dataset(str(path))


def test_the_hub_is_asked_for_what_is_not_a_path(monkeypatch, capsys):
    """With its configuration, split and streaming as given; `owner/name` and `name` are ids."""
    asked = mock.Mock()
    monkeypatch.setattr(datasets, "load_dataset_builder", asked)
    data.get_dataset("owner/some-name.v2", "plain", "test", streaming=True)
    data.get_dataset("name")
    call = mock.call
    assert asked.mock_calls == [
        call("owner/some-name.v2", "plain"),
        call().as_streaming_dataset("test"),
        call("name", None),
        call().download_and_prepare(),
        call().as_dataset("train"),
    ]
    said = capsys.readouterr()
    assert said.err == "fetching owner/some-name.v2 from the hub\nfetching name from the hub\n"
    assert said.out == ""
    for path in ("/name", "owner/name/more", "owner/", "some name"):
        with pytest.raises(ValueError, match=f"^{path} does not exist"):
            data.get_dataset(path)


def test_a_corpus_is_asked_for_with_its_configuration(monkeypatch):
    asked = []

    def get_dataset(path, name=None, split="train"):
        asked.append((path, name, split))
        if split is None:
            return dict.fromkeys(("train", "validation", "more"), rows_of(["a. b."]))
        raise ValueError("enough")

    monkeypatch.setattr(data, "get_dataset", get_dataset)
    for call in (
        lambda: data.get_corpus("owner/name", "train", small_tokenizer(), "plain", "train+more"),
        lambda: data.get_texts("owner/name", "train+more", "plain"),
        lambda: data.get_reviews("owner/name", "train", "plain"),
    ):
        with pytest.raises(ValueError, match="enough"):
            call()
    several = [("owner/name", "plain", None), ("owner/name", "plain", "train+more")]
    assert asked == [*several, *several, ("owner/name", "plain", "train")]


# ---- Splits -------------------------------------------------------------------------------------


def test_a_corpus_with_validation_is_split_as_it_is(tmp_path):
    """The text column is the one that was asked for."""
    for split, texts in {"train": "abcdef", "validation": "xyz"}.items():
        write_rows(tmp_path / f"{split}.jsonl", [{"body": f"{c}\n\n{c}"} for c in texts])
    for split, texts in {"train": "abcdef", "validation": "xyz"}.items():
        corpus = data.get_corpus(str(tmp_path), split, small_tokenizer(), text_column="body")
        tokens = corpus.tokens(0, 1).tolist() + corpus.tokens(len(corpus) - 1, len(corpus)).tolist()
        assert [VOCABULARY[t] for t in tokens] == [texts[0], texts[-1]]
        assert len(corpus) == 2 * len(texts)


def test_a_corpus_without_validation_holds_out_its_last_documents(tmp_path):
    path = write_texts(tmp_path / "corpus.jsonl", [f"{c} aa. bb." for c in LETTERS])
    corpora = [
        data.get_corpus(str(path), split, small_tokenizer()) for split in ("train", "validation")
    ]
    firsts = [[VOCABULARY[c.tokens(s, s + 1)[0]] for s in c.document_starts[:-1]] for c in corpora]
    assert firsts == [list(LETTERS[:24]), ["y", "z"]]


def test_a_hundredth_of_the_documents_is_held_out(tmp_path):
    path = write_texts(tmp_path / "corpus.jsonl", ["aa\n\nbb"] * 500)
    sizes = [
        len(data.get_corpus(str(path), split, small_tokenizer()).document_starts) - 1
        for split in ("train", "validation")
    ]
    assert sizes == [495, 5]


def test_documents_that_cannot_be_used_do_not_count_as_held_out(tmp_path):
    """The last two usable documents are held out, although unusable ones follow."""
    texts = [*(f"{c}\n\n{c}" for c in LETTERS), "the end", ""]
    path = write_texts(tmp_path / "corpus.jsonl", texts)
    train, held_out = (
        data.get_corpus(str(path), s, small_tokenizer()) for s in ("train", "validation")
    )
    assert len(train) == 48
    assert [VOCABULARY[t] for t in held_out.tokens(0, 2)] == ["y", "y"]
    assert held_out.skipped == {"no sentence": 1, "one sentence": 1}


def test_a_corpus_of_four_documents_is_enough_and_of_three_is_not(tmp_path):
    path = tmp_path / "corpus.jsonl"
    for count in (4, 3):
        write_rows(path, [{"body": f"{c} is one\n\nand two"} for c in LETTERS[:count]])
        if count == 3:
            with pytest.raises(
                ValueError, match=r"corpus\.jsonl has 3 documents of .*, 4 are needed \(a corpus"
            ):
                data.get_corpus(str(path), "train", small_tokenizer(), text_column="body")
        else:
            for split in ("train", "validation"):
                corpus = data.get_corpus(str(path), split, small_tokenizer(), text_column="body")
                assert len(corpus.document_starts) - 1 == 2


def test_a_link_to_a_file_of_another_name_is_read(tmp_path):
    (tmp_path / "stored").mkdir()
    path = write_rows(tmp_path / "stored/3f2a.jsonl", [{"text": "a"}, {"text": "b"}])
    link = tmp_path / "corpus.jsonl"
    link.symlink_to(path)
    assert list(data.get_dataset(str(link))["text"]) == ["a", "b"]


@pytest.mark.parametrize(
    ("read", "message"),
    [
        (data.get_corpus, "no split train, only validation; see --split$"),
        (data.get_reviews, r"\['validation'\]"),
    ],
)
def test_a_data_set_without_a_split_to_train_on_is_named_with_those_it_has(read, message, tmp_path):
    write_rows(tmp_path / "validation.jsonl", [{"text": "a b", "label": 1}] * 9)
    arguments = [small_tokenizer()] if read is data.get_corpus else []
    with pytest.raises(ValueError, match=message):
        read(str(tmp_path), "train", *arguments)


def test_the_splits_are_named_before_a_tokenizer_is_trained(tmp_path):
    write_rows(tmp_path / "validation.jsonl", [{"text": text} for text in TEXTS])
    message = f"^{re.escape(str(tmp_path))} has no split train, only validation; see --split"
    with pytest.raises(ValueError, match=message):
        data.get_texts(str(tmp_path))


# ---- Several splits -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def two_splits(tmp_path_factory) -> str:
    """Two splits, whose documents tell where they are from: one has the letters a to m."""
    folder = tmp_path_factory.mktemp("corpus")
    (folder / "data").mkdir()  # where `datasets` takes any name before the hyphen for a split
    splits = {"train": LETTERS[:13], "unsupervised": LETTERS[13:]}
    for split, letters in splits.items():
        texts = ["\n\n".join(f"{a} {b} {a} {a} {b}" for b in letters) for a in letters]
        write_texts(folder / f"data/{split}-00000-of-00001.jsonl", texts)
    small_tokenizer().save(str(folder / "tokenizer.json"))
    return str(folder)


def letters_of(corpus: data.TokenizedCorpus) -> set[str]:
    tokens = {int(token) for chunk in corpus.chunks for token in chunk}
    return {small_tokenizer().id_to_token(token) for token in tokens}


@pytest.mark.parametrize(
    ("train_split", "letters"),
    [
        ("train", LETTERS[:13]),
        ("unsupervised", LETTERS[13:]),
        ("train+unsupervised", LETTERS),
        ("train[:50%]+unsupervised", LETTERS),
    ],
)
def test_several_splits_make_one_corpus(train_split, letters, two_splits):
    """Without a validation split, the last documents of the corpus are held out."""
    train, validation = (
        data.get_corpus(two_splits, split, small_tokenizer(), train_split=train_split)
        for split in ("train", "validation")
    )
    assert letters_of(train) == set(letters)
    assert letters_of(validation) <= set(letters)
    documents = len(letters) if "%" not in train_split else 6 + 13
    assert len(train.document_starts) + len(validation.document_starts) - 2 == documents


def test_a_validation_split_stays_out_of_the_corpus_unless_it_is_named(tmp_path):
    for split, letters in (("train", "abcd"), ("validation", "wxyz")):
        write_texts(tmp_path / f"{split}.jsonl", [f"{a} a\n\n{a} b\n\n{a} c" for a in letters])

    def documents(split: str, train_split: str) -> int:
        corpus = data.get_corpus(str(tmp_path), split, small_tokenizer(), train_split=train_split)
        return len(corpus.document_starts) - 1

    assert documents("train", "train") == documents("validation", "train") == 4
    assert documents("train", "train+validation") == 6
    assert documents("validation", "train+validation") == 2


def test_a_split_that_is_not_there_is_named_with_those_that_are(two_splits, options):
    with pytest.raises(ValueError, match="no split test, only train, unsupervised; see --split"):
        data.get_corpus(two_splits, "train", small_tokenizer(), train_split="test")
    for split in ("test", "train+unsupervised"):
        with pytest.raises(
            ValueError, match=r"reads one whole split .*train, unsupervised; --split"
        ):
            pretrain(replace(options, dataset=two_splits, streaming=True, split=split))


def test_a_run_trains_its_model_and_its_tokenizer_on_its_split(two_splits, options):
    """Of a split with the letters n to z, no other letter becomes a token."""
    told = replace(options, dataset=two_splits, split="unsupervised", tokenizer=None, vocab_size=60)
    pretrain(told)
    vocabulary = data.load_tokenizer(Path(options.out) / "model").get_vocab()
    assert {token for token in vocabulary if token.isalpha() and len(token) == 1} == set(
        LETTERS[13:]
    )
    with pytest.raises(ValueError, match=r"has split unsupervised, not train"):
        pretrain(replace(told, split="train", resume=True))


def test_a_run_reads_the_named_column_and_joins_its_rows(options, tmp_path, capsys):
    """The numbers in the column "text" cannot be read."""
    rows = [{"text": 7, "body": f"{a} {b}."} for a in LETTERS for b in "abc"]
    corpus = write_rows(tmp_path / "rows.jsonl", rows)
    told = replace(
        options, dataset=corpus, text_column="body", rows_per_document=3, tokenizer=None,
        vocab_size=60,
    )  # fmt: skip
    pretrain(told)
    # Of 26 documents, two are held out.
    assert "train: 24 documents" in capsys.readouterr().out


@pytest.mark.parametrize("is_streamed", [False, True])
def test_the_configuration_of_a_corpus_reaches_every_reader(is_streamed, options):
    """Files have no configurations, and the library names the one that it does not find."""
    told = replace(options, dataset_name="other", tokenizer=None)
    with pytest.raises(ValueError, match="'other' not found"):
        train_pretrain.choose_tokenizer(told)
    with pytest.raises(ValueError, match="'other' not found"):
        train_pretrain.load_corpora(replace(told, streaming=is_streamed), small_tokenizer())


def test_texts_are_those_of_the_named_column_and_split(tmp_path):
    write_rows(tmp_path / "train.jsonl", [{"text": "a", "body": "b", "nothing": None}])
    write_rows(tmp_path / "test.jsonl", [{"text": "c", "body": "d", "nothing": None}])
    assert list(data.get_texts(str(tmp_path))) == ["a"]
    assert list(data.get_texts(str(tmp_path), "test", column="body")) == ["d"]
    assert list(data.get_texts(str(tmp_path), column="nothing")) == [None]
    large = datasets.Features(text=datasets.Value("large_string"))
    datasets.Dataset.from_dict({"text": ["e"]}, large).to_parquet(tmp_path / "large.parquet")
    assert list(data.get_texts(str(tmp_path / "large.parquet"))) == ["e"]
    with pytest.raises(
        ValueError, match=r"no --text-column other in \['text', 'body', 'nothing'\]"
    ):
        data.get_texts(str(tmp_path), column="other")
