"""From files to a corpus: which files and splits are read, and how documents become three arrays on
disk. What is left out is counted, and what cannot be read is rejected in one line.
"""

import errno
import itertools
import json
import math
import pickle
import re
import tempfile
import time
from collections import Counter
from pathlib import Path

import datasets
import numpy as np
import pytest
from datasets.exceptions import DatasetGenerationCastError
from datasets.table import CastError
from helpers import ROOT, kill, start, wait, wait_until
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
    tokenizers,
    write_rows,
    write_texts,
)

import data
from data import CorpusArrays, PretrainDataset, TokenizedCorpus


def documents_of(corpus: TokenizedCorpus) -> list[list[list[int]]]:
    """Returns the documents as sentences of ids, as `data.pack` takes them."""
    found = []
    for first, end in itertools.pairwise(corpus.document_starts):
        inside = (corpus.sentence_starts > first) & (corpus.sentence_starts < end)
        edges = [first, *corpus.sentence_starts[inside], end]
        found.append([corpus.tokens[a:b].tolist() for a, b in itertools.pairwise(edges)])
    return found


def entropy(tokens: np.ndarray) -> float:
    """Returns the entropy of the tokens in nats."""
    shares = np.unique(tokens, return_counts=True)[1] / len(tokens)
    return -sum(p * math.log(p) for p in shares)


# ---- Three arrays -------------------------------------------------------------------------------


@given(documents())
def test_three_arrays_hold_every_document_sentence_and_token(docs):
    usable = [sentences for sentences in docs if len(sentences) > 1]
    corpus = corpus_of(docs)
    assert documents_of(corpus) == usable
    assert len(corpus) == corpus.sentence_starts[-1] == corpus.document_starts[-1]
    assert corpus.unigram_entropy() == pytest.approx(entropy(corpus.tokens))


@pytest.mark.parametrize("docs", [[], [[[5], [6]]], [[[5], [6]], [[7]]]])
def test_a_corpus_needs_two_documents_of_two_sentences(docs):
    with pytest.raises(ValueError, match="two documents"):
        data.pack(docs, small_tokenizer())


def test_the_key_of_a_corpus_in_memory_changes_with_every_token_and_start():
    docs = [[[5, 6], [7]], [[8], [9, 10]]]
    others = [
        [[[5, 6], [7]], [[8], [9, 11]]],  # another token
        [[[6, 5], [7]], [[8], [9, 10]]],  # another order
        [[[5], [6, 7]], [[8], [9, 10]]],  # a sentence that starts elsewhere
        [[[5, 6], [7], [8]], [[9], [10]]],  # a document that starts elsewhere
    ]
    assert corpus_of(docs).key == corpus_of(docs).key
    assert len({corpus_of(other).key for other in [docs, *others]}) == 5


def test_a_pickled_corpus_is_its_folder_and_maps_the_same_tokens(tmp_path):
    """Workers that are not forked receive the name of the folder, not the tokens."""
    data.tokenize_corpus(TEXTS * 500, small_tokenizer(), tmp_path / "corpus")
    corpus = TokenizedCorpus(tmp_path / "corpus")
    pickled = pickle.dumps(corpus)
    assert len(pickled) < 500
    assert documents_of(pickle.loads(pickled)) == documents_of(corpus)


# ---- From text to tokens ------------------------------------------------------------------------


texts = st.text(alphabet=LETTERS + " .!\n中é[MASK]", max_size=60)


@given(st.lists(texts, max_size=70))
def test_every_token_of_a_document_with_two_sentences_is_kept(texts):
    """What is skipped is counted."""
    notes: Counter = Counter()
    found = list(data.encode_documents(texts, small_tokenizer(), notes))
    expected, skipped = [], 0
    for text in texts:
        sentences = data.encode_plain(small_tokenizer(), data.split_sentences(text))
        sentences = [sentence for sentence in sentences if sentence]
        if len(sentences) > 1:
            expected.append(sentences)
            whole = data.encode_plain(small_tokenizer(), [text])[0]
            assert [token for sentence in sentences for token in sentence] == whole
        else:
            skipped += 1
    assert found == expected
    assert notes.total() == skipped


@given(st.lists(texts, min_size=2, max_size=40), tokenizers())
def test_a_corpus_on_disk_is_what_its_documents_are_in_memory(texts, tokenizer):
    texts += TEXTS
    encoded = list(data.encode_documents(texts, tokenizer, Counter()))
    in_memory = data.pack(encoded, tokenizer)
    with tempfile.TemporaryDirectory() as folder:
        on_disk = data.tokenize_corpus(iter(texts), tokenizer, f"{folder}/corpus")
    unknown = 100 * np.mean(in_memory.tokens == tokenizer.token_to_id("[UNK]"))
    assert on_disk.notes["% [UNK]"] == round(unknown, 2)
    for name in CorpusArrays._fields:
        one, other = getattr(in_memory, name), getattr(on_disk, name)
        assert one.dtype == other.dtype
        assert np.array_equal(one, other)


@pytest.mark.parametrize(("largest", "dtype"), [(2**16 - 1, "uint16"), (2**16, "uint32")])
def test_the_largest_id_decides_how_wide_a_token_is_stored(largest, dtype, tmp_path):
    """A vocabulary with holes has few tokens, but ids above 65,535; these overflowed."""
    names = {token: i for i, token in enumerate(VOCABULARY)}
    tokenizer = data.wordpiece({**names, "xx": largest})
    corpus = data.tokenize_corpus(["xx a\n\nb", "c\n\nxx d"], tokenizer, tmp_path / "corpus")
    assert corpus.tokens.dtype == dtype
    assert corpus.tokens.tolist().count(largest) == 2


def test_blank_lines_do_not_end_a_document(tmp_path):
    """One-sentence paragraphs make up one document, so half of the 1,000 pairs drawn are true ones,
    to within five standard deviations. If each paragraph were a document, no sentence would follow
    another."""
    paragraphs = "\n\n".join(f"{c}{c} is one paragraph" for c in LETTERS)
    corpus = data.tokenize_corpus([paragraphs] * 4, small_tokenizer(), tmp_path / "arrays")
    assert len(corpus.document_starts) - 1 == 4
    batch = PretrainDataset(corpus, small_tokenizer(), 32).batch(range(1000))
    assert is_within(batch["nsp_labels"].double().mean().item(), 0.5, 1000)


# ---- What is left out, and what is rejected -----------------------------------------------------


def test_a_run_says_what_was_read_and_left_out(tmp_path):
    texts = ["aa. b", "", "", "cc. d", "one", "a. " + "b " * 1000, "a. é中 ? d. e"]
    corpus = data.tokenize_corpus(texts, small_tokenizer(), tmp_path / "corpus")
    said = TokenizedCorpus(tmp_path / "corpus").describe()
    assert said == corpus.describe()
    sentences = len(corpus.sentence_starts) - 1
    counted = f"4 documents, {sentences} sentences, {len(corpus):,} tokens"
    assert said.startswith(f"{counted}, 3 documents with fewer than two sentences skipped")


def test_a_poisoned_row_surfaces_with_its_index():
    """Nothing is skipped, and nothing is turned into text, except that None is no text."""
    rows = [{"body": text} for text in ("a. b.", None, "c. d.") * 20]
    for poison in (7, ["a b."], {"a": 1}, True):
        documents = data.Documents("corpus", [*rows, {"body": poison}], "body")
        with pytest.raises(ValueError, match=f"corpus: row 60: body is {re.escape(repr(poison))}"):
            list(documents)


def test_an_error_while_documents_are_read_leaves_no_corpus(tmp_path):
    rows = [*({"text": text} for text in TEXTS), {"text": 7}]
    with pytest.raises(ValueError, match="row 3"):
        data.tokenize_corpus(data.Documents("a", rows), small_tokenizer(), tmp_path / "arrays")
    assert [path.name for path in tmp_path.iterdir()] == ["arrays.lock"]


def test_columns_that_differ_in_a_data_set_of_the_hub_are_the_reason_given():
    """This error of `datasets` has no cause, and its first line says nothing."""
    cast = CastError("", table_column_names=["text", "url"], requested_column_names=["text"])
    error = DatasetGenerationCastError.from_cast_error(cast, "json", {}, None)
    expected = r"^cannot read a: All the data files must have the same columns.*url"
    with pytest.raises(ValueError, match=expected), data.reading("a"):
        raise error


def test_a_row_that_is_not_text_is_reported_with_the_path_of_its_data_set(tmp_path):
    path = write_rows(tmp_path / "corpus.jsonl", [{"text": 7}] * 5)
    with pytest.raises(ValueError, match=f"^cannot read {re.escape(path)}: row 0: text is 7"):
        list(data.get_documents(path)["train"])


def test_the_sample_comes_with_the_code():
    documents = data.get_documents("sample")
    for part in ("train", "validation"):
        lines = (ROOT / f"sample/corpus/{part}.jsonl").read_text().splitlines()
        assert list(documents[part]) == [json.loads(line)["text"] for line in lines]


def test_rows_are_joined_to_documents_with_a_blank_line_between_them():
    rows = [{"body": text} for text in ("a b.", None, "c", "", "d")]
    assert list(data.Documents("", rows, "body")) == ["a b.", "", "c", "", "d"]
    assert list(data.Documents("", rows, "body", 3)) == ["a b.\n\nc", "d"]


@pytest.mark.parametrize("streaming", [False, True])
def test_a_missing_column_is_rejected_with_the_file_and_the_columns_that_exist(streaming, tmp_path):
    path = write_texts(tmp_path / "corpus.jsonl", TEXTS)
    with pytest.raises(ValueError, match=r"corpus\.jsonl: no column body among text$"):
        list(data.get_dataset(path, None, None, "body", streaming)["train"])


# ---- Written once, whole ------------------------------------------------------------------------


def slowly(folder: Path, documents: int, seconds: float) -> None:
    """Tokenizes documents that come one after another, and so take a while."""

    def texts():
        for index in range(documents):
            time.sleep(seconds / documents)
            yield f"{LETTERS[index % 26]} aa. bb cc. dd"

    data.tokenize_corpus(texts(), small_tokenizer(), folder)


def test_a_folder_that_is_there_is_neither_used_nor_changed(tmp_path):
    tmp_path = tmp_path / "new" / "below"
    data.tokenize_corpus(TEXTS, small_tokenizer(), tmp_path / "corpus")
    before = {file.name: file.read_bytes() for file in (tmp_path / "corpus").iterdir()}
    with pytest.raises(FileExistsError, match="opens it"):
        data.tokenize_corpus(["x y. z"] * 9, small_tokenizer(), tmp_path / "corpus")
    assert {file.name: file.read_bytes() for file in (tmp_path / "corpus").iterdir()} == before


@pytest.mark.slow
def test_a_killed_process_leaves_no_corpus_and_the_next_one_removes_what_it_has_left(tmp_path):
    folder = tmp_path / "corpus"
    process = start(slowly, folder, 2000, 20.0)
    wait_until(lambda: list(tmp_path.glob("corpus.unfinished/tokens.*")), process)
    kill(process)
    assert not folder.exists()
    assert (tmp_path / "corpus.unfinished").exists()
    corpus = data.tokenize_corpus(TEXTS, small_tokenizer(), folder)
    assert not (tmp_path / "corpus.unfinished").exists()
    assert len(corpus.document_starts) - 1 == 3


@pytest.mark.slow
def test_two_processes_make_the_same_new_corpus_at_once(tmp_path):
    """One waits for the other, and both end well with one folder."""
    folder = tmp_path / "corpus"
    both = [start(slowly, folder, 300, 2.0) for _ in range(2)]
    assert wait(*both) == [0, 0]
    assert len(TokenizedCorpus(folder).document_starts) - 1 == 300
    assert sorted(path.name for path in tmp_path.iterdir()) == ["corpus", "corpus.lock"]


def test_a_full_disk_is_one_message_that_names_the_place_and_leaves_nothing(tmp_path):
    """The error comes while documents are written, from where they are read."""

    def texts():
        yield from TEXTS * 30
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(ValueError, match=f"cannot write to {tmp_path}: No space"):
        data.tokenize_corpus(texts(), small_tokenizer(), tmp_path / "corpus")
    assert [path.name for path in tmp_path.iterdir()] == ["corpus.lock"]


def test_a_full_disk_while_a_data_set_is_read_is_one_message_that_names_the_cache():
    cache = re.escape(str(datasets.config.HF_DATASETS_CACHE))
    with pytest.raises(ValueError, match=f"cannot read a: .*No space.*{cache}"), data.reading("a"):
        raise OSError(errno.ENOSPC, "No space left on device")


# ---- The cache ----------------------------------------------------------------------------------


def test_a_second_run_reuses_the_corpus_and_changing_anything_it_depends_on_makes_another(
    tmp_path, monkeypatch
):
    """The corpus depends on the files, the tokenizer, the column, the rows per document, and
    `SPLIT_VERSION`, which has to be increased when `split_sentences` changes."""
    rows = [{"text": f"a{i} bb. c d.", "body": f"{c} ee. f"} for i, c in enumerate(LETTERS)]
    path = write_rows(tmp_path / "corpus.jsonl", rows)
    made = []
    write = data.write_corpus
    monkeypatch.setattr(data, "write_corpus", lambda *a: made.append(1) or write(*a))

    def key(tokenizer=None, part="train", **how) -> str:
        documents = data.get_documents(path, **how)[part]
        return data.get_corpus(documents, tokenizer or small_tokenizer()).key

    first = key()
    assert key() == first
    assert len(made) == 1
    keys = {first, key(data.wordpiece({**small_tokenizer().get_vocab(), "new": 99}))}
    keys |= {key(column="body"), key(rows_per_document=2), key(split="train[:50%]")}
    keys.add(key(part="validation"))
    monkeypatch.setattr(data, "SPLIT_VERSION", -1)
    keys.add(key())
    write_rows(tmp_path / "corpus.jsonl", rows[:-1])
    keys.add(key())
    assert len(keys) == len(made) == 8


# ---- Which files are a corpus -------------------------------------------------------------------


def write_all(folder: Path, contents: dict[str, str]) -> str:
    for name, content in contents.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content)
    return str(folder)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("kind", ["txt", "jsonl", "json", "parquet"])
def test_every_kind_of_file_gives_one_document_per_row_and_a_text_is_one(kind, streaming, tmp_path):
    texts = ["First. One.\n\nTwo.", "Second."] * 60
    rows = [{"text": text} for text in texts]
    if kind == "txt":
        write_all(tmp_path, {f"{i:03}.txt": text for i, text in enumerate(texts)})
    elif kind == "parquet":
        datasets.Dataset.from_list(rows).to_parquet(tmp_path / "a.parquet", batch_size=110)
    elif kind == "json":
        (tmp_path / "a.json").write_text(json.dumps(rows))
    else:
        write_rows(tmp_path / "a.jsonl", rows)

    def read(path: Path) -> list[str]:
        rows = data.get_dataset(str(path), split=None, streaming=streaming)["train"]
        return [row["text"] for row in rows]

    assert read(tmp_path) == texts
    in_file = read(sorted(tmp_path.iterdir())[-1])
    assert in_file == (texts[-1:] if kind == "txt" else texts)


@pytest.mark.parametrize("streaming", [False, True])
def test_files_may_differ_in_columns_that_nobody_needs(streaming, tmp_path):
    for name, other in (("a", {"meta": {"n": 1}}), ("b", {"url": "x"}), ("c", {"meta": "y"})):
        write_rows(tmp_path / f"{name}.jsonl", [{"text": name, **other}] * 2)
    found = data.get_dataset(str(tmp_path), None, None, "text", streaming)
    assert list(found["train"]) == [{"text": name} for name in "aabbcc"]


def test_the_first_word_of_a_file_names_its_split_and_all_others_are_train(tmp_path):
    names = [
        "train.txt", "train-1.txt", "trains.txt", "night-train.txt", "emma.txt", "testament.txt",
        "below/validation_2.txt", "below/more.txt", "test-0-of-1.txt", ".hidden/a.txt",
        "dev.txt", "val.txt", "valid-1.txt", "valley.txt", "Test.txt",
    ]  # fmt: skip
    path = write_all(
        tmp_path / ".cache", {**{name: name for name in names}, "README.md": "#", "LICENSE": ""}
    )
    splits = {
        name: sorted(rows["text"]) for name, rows in data.get_dataset(path, None, None).items()
    }
    assert splits == {
        "train": sorted([*names[:6], "below/more.txt", "valley.txt", "Test.txt"]),
        "validation": ["below/validation_2.txt", "dev.txt", "val.txt", "valid-1.txt"],
        "test": ["test-0-of-1.txt"],
    }
    assert list(data.get_dataset(f"{path}/test-0-of-1.txt")["text"]) == ["test-0-of-1.txt"]


@pytest.mark.parametrize("name", ["b.csv", "b.txt.gz"])
def test_files_of_other_kinds_are_rejected_by_name(name, tmp_path):
    """In a folder that also has valid files, nobody would notice that their text is missing."""
    path = write_all(tmp_path, {"a.txt": "a", name: "b"})
    for where in (path, f"{path}/{name}"):
        with pytest.raises(ValueError, match=re.escape(name)):
            data.get_dataset(where)


# ---- What cannot be read gives a one-line error with its path -----------------------------------


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("kind", ["jsonl", "parquet", "txt", "empty.parquet"])
def test_a_file_that_cannot_be_read_gives_a_one_line_error_with_its_path(kind, streaming, tmp_path):
    """Truncated or wrongly encoded files gave errors of up to 44 lines, without the file's name."""
    whole = tmp_path / f"a.{kind}"
    rows = datasets.Dataset.from_dict({"text": [text * 30 for text in TEXTS]})
    if kind == "txt":
        content = "café".encode("latin-1")
    else:
        rows.to_json(whole) if kind == "jsonl" else rows.to_parquet(whole)
        content = whole.read_bytes()
        content = b"" if "empty" in kind else content[: len(content) // 2]
    bad = tmp_path / f"bad.{kind}"
    bad.write_bytes(content)
    with pytest.raises(ValueError, match=f"^cannot read .*{re.escape(bad.name)}: ") as caught:
        list(data.get_dataset(str(tmp_path), split=None, streaming=streaming)["train"])
    assert len(str(caught.value).splitlines()) == 1


def test_an_empty_folder_and_a_missing_path_are_named(tmp_path):
    for path in (tmp_path, tmp_path / "missing"):
        with pytest.raises(ValueError, match=f"^cannot read {re.escape(str(path))}: "):
            data.get_dataset(str(path))


def test_the_hub_is_asked_for_what_is_not_a_path(monkeypatch):
    """With its configuration and streaming as given; only the named columns are kept."""
    asked = []

    def load_dataset(*what, **how):
        asked.append((what, how))
        rows = datasets.Dataset.from_dict({"body": TEXTS, "url": TEXTS})
        return datasets.DatasetDict(train=rows, more=rows)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    rows = data.get_dataset("owner/name", "plain", "train+more", column="body")
    assert asked == [(("owner/name", "plain"), {"streaming": False})]
    assert rows.column_names == ["body"]
    assert list(rows["body"]) == TEXTS * 2
    data.get_documents("owner/name", "plain", column="body", streaming=True)
    assert asked[1] == (("owner/name", "plain"), {"streaming": True})


# ---- Splits -------------------------------------------------------------------------------------


def write_letters(folder: Path, **splits: str) -> str:
    """Writes splits in which every document is a letter."""
    for split, letters in splits.items():
        write_texts(folder / f"{split}.jsonl", letters)
    return str(folder)


@pytest.mark.parametrize(
    ("split", "train", "validation"),
    [
        ("train", "abcdef", "xyz"),
        ("test", "klmn", "xyz"),
        ("train+test", "abcdefklmn", "xyz"),
        ("train[:50%]+test", "abcklmn", "xyz"),
        ("train+validation", "abcdefx", "yz"),
    ],
)
def test_the_parts_to_train_and_to_evaluate_on(split, train, validation, tmp_path):
    """The validation split is evaluated on, unless it is trained on: then the last documents are
    held out."""
    path = write_letters(tmp_path, train="abcdef", validation="xyz", test="klmn")
    documents = data.get_documents(path, split=split)
    found = {part: "".join(documents[part]) for part in documents}
    assert found == {"train": train, "validation": validation}


@pytest.mark.parametrize(
    ("rows", "rows_per_document", "held_out"), [(1, 1, 1), (150, 1, 2), (1000, 1, 10), (90, 3, 6)]
)
def test_the_last_rows_are_held_out(rows, rows_per_document, held_out, tmp_path):
    """One in a hundred, and at least those of two documents."""
    texts = [str(i) for i in range(rows)]
    path = write_texts(tmp_path / "corpus.jsonl", texts)
    documents = data.get_documents(path, rows_per_document=rows_per_document)
    found = {part: "\n\n".join(documents[part]).split() for part in documents}
    assert found == {"train": texts[:-held_out], "validation": texts[-held_out:]}


@pytest.mark.parametrize("streaming", [False, True])
def test_a_split_that_is_not_there_is_named_with_those_that_are(streaming, tmp_path):
    path = write_letters(tmp_path, train="abcd", validation="wxyz")
    with pytest.raises(ValueError, match="train.*validation"):
        data.get_documents(path, split="test", streaming=streaming)
