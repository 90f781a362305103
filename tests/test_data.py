"""What the data pipeline makes, as an algebra of places in the corpus."""

import hashlib
import itertools
import json
import math
import re

import datasets
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import (
    LETTERS,
    VOCABULARY,
    corpus_of,
    documents,
    is_within,
    seeds,
    small_tokenizer,
)

import data
from data import PretrainDataset, TokenizedCorpus

PAD, UNK, CLS, SEP, MASK = range(5)
lengths = st.integers(5, 40)


def entropy(tokens: np.ndarray) -> float:
    """Nats."""
    shares = np.unique(tokens, return_counts=True)[1] / len(tokens)
    return -sum(p * math.log(p) for p in shares)


def numbers_of(dataset: PretrainDataset, epochs: int = 2) -> list[int]:
    return list(range(epochs * len(dataset)))


# ---- The corpus ---------------------------------------------------------------------------------


def test_documents_of_one_sentence_are_left_out_and_counted():
    corpus = corpus_of([[[5], [6]], [], [[7, 8, 9]], [[10], [11], [12]]])
    assert corpus.skipped == {"no sentence": 1, "one sentence": 1}
    assert len(corpus) == 5
    assert corpus.document_starts.tolist() == [0, 2, 5]
    assert corpus.sentence_starts.tolist() == [0, 1, 2, 3, 4, 5]


def test_a_corpus_of_one_document_is_refused():
    with pytest.raises(
        ValueError, match=r"1 documents have a next sentence, 2 are needed; .*'one sentence': 1"
    ):
        corpus_of([[[5], [6]], [[7]]])


def test_an_epoch_has_an_example_for_each_pair_that_fits_but_one_at_least():
    corpus = corpus_of([[[5] * 10, [6] * 11]] * 5)
    lengths = {40: 105 // 37, 55: 2, 56: 1, 200: 1}
    for length, number in lengths.items():
        assert len(PretrainDataset(corpus, small_tokenizer(), length)) == number


def test_a_pair_needs_five_tokens():
    with pytest.raises(ValueError, match="max_seq_length=4"):
        PretrainDataset(corpus_of([[[5], [6]]] * 2), small_tokenizer(), 4)


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


# ---- A pure function of (corpus, seed, number) --------------------------------------------------


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


@given(documents(), lengths, seeds, st.data())
def test_an_example_does_not_depend_on_its_batch_or_on_what_came_before(docs, length, seed, draw):
    dataset = PretrainDataset(corpus_of(docs), small_tokenizer(), length, seed)
    numbers = draw.draw(st.lists(st.sampled_from(numbers_of(dataset)), min_size=1, max_size=6))
    batch = dataset.batch(numbers)
    for row, number in enumerate(numbers):
        alone = {name: v[0] for name, v in dataset.batch([number]).items()}
        for name, values in batch.items():
            width = alone[name].numel()
            assert torch.equal(values[row].flatten()[:width], alone[name].flatten())


def test_masks_differ_between_epochs_and_seeds_and_repeat_otherwise():
    corpus = corpus_of([[[7] * 9] * 30] * 4)
    first = PretrainDataset(corpus, small_tokenizer(), 32, seed=1)
    again = PretrainDataset(corpus, small_tokenizer(), 32, seed=1)
    other = PretrainDataset(corpus, small_tokenizer(), 32, seed=2)
    epoch = list(range(len(first)))
    later = [n + len(first) for n in epoch]
    assert equal(first.batch(epoch), again.batch(epoch))
    assert not equal(first.batch(epoch), first.batch(later))
    assert not equal(first.batch(epoch), other.batch(epoch))


def digest(batches) -> str:
    arrays = [values.numpy() for batch in batches for values in batch.values()]
    return hashlib.sha256(b"".join(a.tobytes() for a in arrays)).hexdigest()[:16]


def test_what_a_seed_means_never_changes():
    """The same seed gives the same examples and orders in every version, so that results stay
    comparable. Should numpy ever change its generators, that is worth an entry in the changelog."""
    docs = [[[5 + (i * j) % 30 for i in range(3 + j)] for j in range(4 + d)] for d in range(6)]
    found = []
    for whole in (False, True):
        dataset = PretrainDataset(corpus_of(docs), small_tokenizer(), 24, 7, whole)
        found.append(digest(dataset.batch([k, k + 100]) for k in range(2000)))
    orders = itertools.islice(data.EpochSampler(9, 4, 7), 9)
    found.append(digest({"numbers": torch.tensor(numbers)} for numbers in orders))
    found.append(digest(batches_of([1 + i % 9 for i in range(400)], 3, 7)))
    assert found == ["9e95dbecac036025", "5f335817ff68d88c", "cff1525f1a196109", "a1e52559a37d0b5a"]


@given(st.integers(0, 2**63 - 1), st.integers(0, 2), st.integers(0, 2**40), st.integers(0, 2**40))
def test_a_generator_is_philox_with_the_seed_as_its_key(seed, purpose, epoch, index):
    found = data.generator(seed, purpose, epoch, index)
    philox = np.random.Philox(key=seed, counter=[0, index, epoch, purpose])
    assert np.array_equal(found.random(9), np.random.Generator(philox).random(9))


def test_random_numbers_of_neighbouring_examples_do_not_overlap():
    """A counter-based generator counts in its lowest word: an index there would make example
    i + 1 repeat what example i drew a little later."""
    for one, other in itertools.combinations([(0, 0), (0, 1), (1, 0), (1, 1)], 2):
        drawn = [set(data.generator(3, 0, *place).random(2000)) for place in (one, other)]
        assert not drawn[0] & drawn[1]
    assert not set(data.generator(3, 0, 0).random(2000)) & set(data.generator(3, 1, 0).random(2000))


@given(st.integers(1, 40), st.integers(1, 7), seeds, st.integers(1, 3), st.integers(0, 9))
def test_each_epoch_visits_every_example_once_for_any_ranks_and_start(
    size, batch, seed, world, start
):
    """The processes' batches, in turn, are the one order of a single process; and starting later
    gives the same batches as having run until then."""

    def batches(count, **options):
        sampler = data.EpochSampler(size, batch, seed, **options)
        return list(itertools.islice(sampler, count))

    steps = -(-3 * size // (batch * world)) + start
    ranks = [batches(steps, rank=rank, world_size=world) for rank in range(world)]
    in_turn = list(itertools.chain.from_iterable(zip(*ranks, strict=True)))
    assert in_turn == batches(steps * world)
    flat = list(itertools.chain.from_iterable(in_turn))
    for epoch in range(3):
        numbers = flat[epoch * size : (epoch + 1) * size]
        assert sorted(numbers) == list(range(epoch * size, (epoch + 1) * size))
    assert batches(steps - start, start=start) == batches(steps)[start:]


def test_orders_of_epochs_differ():
    flat = next(iter(data.EpochSampler(200, 400, seed=0)))
    first, second = flat[:200], [n - 200 for n in flat[200:]]
    assert first != second
    assert first != sorted(first)


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_batches_do_not_depend_on_the_number_of_workers(workers):
    dataset = PretrainDataset(corpus_of([[[7] * 9] * 30] * 4), small_tokenizer(), 32)

    def first(count, **options):
        loader = data.get_split_dataloader(dataset, 5, **options)
        return list(itertools.islice(loader, count))

    for one, other in zip(first(9, workers=0), first(9, workers=workers), strict=True):
        assert equal(one, other)
    assert equal(first(9, workers=0)[4], first(1, workers=workers, start=4)[0])


def test_the_loader_gives_the_batches_of_its_process_from_its_start_on():
    dataset = PretrainDataset(corpus_of([[[7] * 9] * 30] * 4), small_tokenizer(), 32, seed=3)
    loader = data.get_split_dataloader(dataset, 4, start=2, rank=1, world_size=3, workers=0)
    sampler = data.EpochSampler(len(dataset), 4, 3, start=2, rank=1, world_size=3)
    for batch, numbers in zip(itertools.islice(loader, 5), sampler, strict=False):
        assert equal(batch, dataset.batch(numbers))
    alone = data.get_split_dataloader(dataset, 4, workers=0)
    sampler = data.EpochSampler(len(dataset), 4, 3, start=0, rank=0, world_size=1)
    for batch, numbers in zip(itertools.islice(alone, 3), sampler, strict=False):
        assert equal(batch, dataset.batch(numbers))


def test_no_more_batches_wait_in_memory_than_documented():
    """Four for each worker; and pages are pinned only where there is a GPU to copy to."""
    dataset = PretrainDataset(corpus_of([[[7] * 9] * 30] * 4), small_tokenizer(), 32)
    loader = data.get_split_dataloader(dataset, 4)
    assert (loader.num_workers, loader.prefetch_factor) == (2, 4)
    assert loader.pin_memory == torch.cuda.is_available()
    assert data.get_split_dataloader(dataset, 4, workers=0).prefetch_factor is None


def test_a_pickled_corpus_maps_the_same_tokens(tmp_path):
    """Workers that are not forked get the files' names, not the tokens."""
    import pickle

    corpus = data.get_corpus(
        "sample", "validation", data.load_tokenizer(sample_vocabulary(tmp_path))
    )
    pickled = pickle.dumps(corpus)
    assert len(pickled) < len(corpus)
    assert np.array_equal(pickle.loads(pickled).tokens(0, 50), corpus.tokens(0, 50))


# ---- Stage 1: text -> tokens --------------------------------------------------------------------

texts = st.lists(
    st.sampled_from(
        [
            "a",
            "bc",
            "Mr.",
            "x.",
            "y!",
            '"z?"',
            "end.)",
            "。",
            " ",
            "\n",
            "\n\n",
            "\t",
            "J.",
            "K" * 1200,
            "1.5",
            "...",
            "word",
        ]
    ),
    max_size=30,
).map("".join)


@given(texts | st.text(max_size=300))
def test_splitting_loses_nothing_but_white_space(text):
    assert re.sub(r"\s", "", "".join(data.split_sentences(text))) == re.sub(r"\s", "", text)
    assert all(0 < len(s) <= 1000 and s == s.strip() for s in data.split_sentences(text))


@pytest.mark.parametrize(
    ("text", "sentences"),
    [
        ("One. Two! Three?", ["One.", "Two!", "Three?"]),
        ("A line\nthat goes on. B", ["A line\nthat goes on.", "B"]),
        ("No stop\n\nNext", ["No stop", "Next"]),
        ('"Who?" he said. (Yes.) No', ['"Who?"', "he said.", "(Yes.)", "No"]),
        ("Mr. X met J. K. Y. and mrs. Z. It", ["Mr. X met J. K. Y. and mrs. Z. It"]),
        ("It cost 1.5 dollars... Really", ["It cost 1.5 dollars...", "Really"]),
        ("你好。再见！", ["你好。", "再见！"]),
        ("  \n\n  ", []),
    ],
)
def test_sentences_end_where_a_reader_would_end_them(text, sentences):
    assert data.split_sentences(text) == sentences


def test_a_text_without_an_end_is_cut_at_white_space():
    assert data.split_sentences("K" * 1001) == ["K" * 1000, "K"]
    pieces = data.split_sentences("word " * 1000)
    assert len(pieces) > 4
    assert all(piece.split() == ["word"] * len(piece.split()) for piece in pieces)


def rows_of(texts: list) -> datasets.Dataset:
    return datasets.Dataset.from_dict({"text": texts})


@given(st.lists(st.text(alphabet=LETTERS + " .!\n中é[MASK]", max_size=60), max_size=5))
def test_stage_1_keeps_every_token_of_a_document_with_two_sentences(documents):
    numbers = list(range(len(documents)))
    out = data.tokenize_documents({"text": documents}, numbers, small_tokenizer(), "text")
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
    """Stage 1 writes 16 documents at a time; places count through all of them."""
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


def test_ids_beyond_two_bytes_are_kept():
    """A vocabulary of more than 65,536 tokens takes four bytes a token."""
    names = [*data.SPECIAL_TOKENS, *(f"x{i}" for i in range(70_000)), "."]
    tokenizer = data.wordpiece({token: i for i, token in enumerate(names)})
    rows = rows_of(["x69999 . x65600 .", "x1. x2."])
    corpus = TokenizedCorpus(data.tokenize_dataset(rows, tokenizer))
    assert corpus.tokens(0, 3).tolist() == [70_004, 70_005, 65_605]
    most = data.wordpiece({token: i for i, token in enumerate([*names[: 2**16 - 1], "."])})
    chunks = TokenizedCorpus(data.tokenize_dataset(rows, most)).chunks
    assert chunks[0].dtype == np.uint16
    assert chunks[0].max() == 2**16 - 1
    assert corpus.chunks[0].dtype == np.uint32
    assert corpus.unigram_entropy() == pytest.approx(entropy(corpus.chunks[0]))


def test_large_corpora_are_tokenized_in_larger_pieces(monkeypatch):
    """A thousandth of the documents at a time, but 16 at least, so that memory stays bounded."""
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
    path = tmp_path / "corpus.jsonl"
    rows = [json.dumps({"text": f"{c} first\n\n{c} then"}) + "\n" for c in LETTERS]
    path.write_text("".join(rows))
    alone = data.tokenize_dataset(data.get_dataset(str(path)), small_tokenizer())
    monkeypatch.setattr(data, "STAGE_1", -2)  # or the cache would answer
    two = data.tokenize_dataset(data.get_dataset(str(path)), small_tokenizer(), processes=2)
    assert (len(alone.cache_files), len(two.cache_files)) == (1, 2)
    assert two["tokens"][:] == alone["tokens"][:]


def test_thousands_of_texts_are_encoded_one_by_one():
    """In order, each once, whatever the size of the pieces that the library gets."""
    texts = [" ".join(LETTERS[: 1 + i % 7]) for i in range(2500)]
    expected = [list(range(5, 6 + i % 7)) for i in range(2500)]
    assert data.encode_plain(small_tokenizer(), texts) == expected


def test_the_tokenizer_given_to_stage_1_still_knows_its_special_tokens():
    tokenizer = small_tokenizer()
    data.encode_plain(tokenizer, ["a [MASK]"])
    assert tokenizer.encode("[MASK]").ids == [CLS, MASK, SEP]


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
    """Paragraphs of one sentence make documents of many, so half of the pairs are IsNext, not none:
    5 standard deviations of 1,000 pairs."""
    paragraphs = "\n\n".join(f"{c}{c} is one paragraph" for c in LETTERS)
    corpus = TokenizedCorpus(data.tokenize_dataset(rows_of([paragraphs] * 4), small_tokenizer()))
    assert len(corpus.document_starts) - 1 == 4
    batch = PretrainDataset(corpus, small_tokenizer(), 32).batch(list(range(1000)))
    assert is_within(batch["nsp_labels"].double().mean().item(), 0.5, 1000)


def test_a_poisoned_row_surfaces_with_its_number():
    rows = {"text": ["a. b.", None, 7]}
    with pytest.raises(ValueError, match="row 12: text is int, not text"):
        data.tokenize_documents(rows, [10, 11, 12], small_tokenizer(), "text")


def test_empty_rows_are_counted():
    corpus = TokenizedCorpus(
        data.tokenize_dataset(rows_of(["aa. b", "", None, "cc. d"]), small_tokenizer())
    )
    assert corpus.skipped == {"no sentence": 2, "one sentence": 0}


def test_a_missing_column_is_refused_with_those_that_are_there():
    with pytest.raises(ValueError, match=r"no column 'body': --text-column is of \['text'\]"):
        data.tokenize_dataset(rows_of(["a."]), small_tokenizer(), text_column="body")


def sample_vocabulary(tmp_path) -> str:
    path = tmp_path / "vocab.txt"
    words = sorted(
        set(re.findall(r"[a-z]+|\S", (data.SAMPLE / "corpus/validation.jsonl").read_text().lower()))
    )
    path.write_text("\n".join(dict.fromkeys([*data.SPECIAL_TOKENS, *words])) + "\n")
    return str(path)


def test_a_second_start_reads_the_cache_and_another_tokenizer_does_not(tmp_path, monkeypatch):
    """The key is the corpus, the tokenizer, and the version of stage 1."""
    path = tmp_path / "corpus.jsonl"
    path.write_text("".join(json.dumps({"text": f"a{i} bb. c d."}) + "\n" for i in range(20)))
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
    monkeypatch.setattr(data, "STAGE_1", -1)
    assert start(small_tokenizer())[0] > 0


# ---- Corpora and tokenizers from files ----------------------------------------------------------


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


def test_a_path_that_is_not_there_is_refused():
    with pytest.raises(ValueError, match="no/such/folder does not exist"):
        data.get_dataset("no/such/folder")


def test_a_corpus_without_validation_holds_out_its_last_documents(tmp_path):
    path = tmp_path / "corpus.jsonl"
    path.write_text("".join(json.dumps({"text": f"{c} aa. bb."}) + "\n" for c in LETTERS))
    corpora = [
        data.get_corpus(str(path), split, small_tokenizer()) for split in ("train", "validation")
    ]
    firsts = [[VOCABULARY[c.tokens(s, s + 1)[0]] for s in c.document_starts[:-1]] for c in corpora]
    assert firsts == [list(LETTERS[:24]), ["y", "z"]]


def test_the_hub_is_asked_for_what_is_not_a_path(monkeypatch):
    """With its configuration, split and streaming as given; `owner/name` and `name` are ids."""
    asked = []
    monkeypatch.setattr(
        datasets, "load_dataset", lambda *args, **named: asked.append((args, named))
    )
    data.get_dataset("owner/some-name.v2", "plain", "test", streaming=True)
    data.get_dataset("name")
    assert asked == [
        (("owner/some-name.v2", "plain"), {"split": "test", "streaming": True}),
        (("name", None), {"split": "train", "streaming": False}),
    ]
    for path in ("/name", "owner/name/more", "owner/", "some name"):
        with pytest.raises(ValueError, match="does not exist"):
            data.get_dataset(path)


def test_the_cause_of_a_file_that_cannot_be_read_is_told(tmp_path):
    path = tmp_path / "train.jsonl"
    path.write_text('{"text": "a"}\n{"text": \n')
    with pytest.raises(ValueError, match=r"cannot read .*train\.jsonl: .*JSON"):
        data.get_dataset(str(path))
    path.write_text('{"text": "a"}\n')
    with pytest.raises(ValueError, match=r"cannot read .*train\.jsonl: .*Unknown split"):
        data.get_dataset(str(path), split="validation")


def test_a_corpus_of_four_documents_is_enough_and_of_three_is_not(tmp_path):
    path = tmp_path / "corpus.jsonl"
    for number in (4, 3):
        rows = [json.dumps({"body": f"{c} is one\n\nand two"}) for c in LETTERS[:number]]
        path.write_text("\n".join(rows))
        if number == 3:
            with pytest.raises(
                ValueError, match=r"corpus\.jsonl: 3 of 4 documents needed; see --rows-per-document"
            ):
                data.get_corpus(str(path), "train", small_tokenizer(), text_column="body")
        else:
            for split in ("train", "validation"):
                corpus = data.get_corpus(str(path), split, small_tokenizer(), text_column="body")
                assert len(corpus.document_starts) - 1 == 2


def test_a_hundredth_of_the_documents_is_held_out(tmp_path):
    path = tmp_path / "corpus.jsonl"
    path.write_text("".join(json.dumps({"text": "aa\n\nbb"}) + "\n" for _ in range(500)))
    sizes = [
        len(data.get_corpus(str(path), split, small_tokenizer()).document_starts) - 1
        for split in ("train", "validation")
    ]
    assert sizes == [495, 5]


def test_documents_that_cannot_be_used_do_not_count_as_held_out(tmp_path):
    """The last two good ones are, though short ones follow."""
    path = tmp_path / "corpus.jsonl"
    texts = [*(f"{c}\n\n{c}" for c in LETTERS), "the end", ""]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    train, held_out = (
        data.get_corpus(str(path), s, small_tokenizer()) for s in ("train", "validation")
    )
    assert len(train) == 48
    assert [VOCABULARY[t] for t in held_out.tokens(0, 2)] == ["y", "y"]
    assert held_out.skipped == {"no sentence": 1, "one sentence": 1}


def test_a_folder_without_a_train_split_is_refused(tmp_path):
    """`datasets` makes splits of names, and would drop the others without a word."""
    (tmp_path / "test.jsonl").write_text(json.dumps({"text": "a"}) + "\n")
    with pytest.raises(ValueError, match="no split train, only test; see --split$"):
        data.get_corpus(str(tmp_path), "train", small_tokenizer())


def test_a_text_file_beside_a_corpus_is_no_part_of_it(tmp_path):
    (tmp_path / "corpus.jsonl").write_text(json.dumps({"text": "a"}) + "\n")
    (tmp_path / "LICENSE.txt").write_text("b")
    assert list(data.get_dataset(str(tmp_path / "corpus.jsonl"))["text"]) == ["a"]


def test_a_corpus_with_validation_is_split_as_it_is(tmp_path):
    """And its configuration and column are those that were asked for."""
    for split, texts in {"train": "abcdef", "validation": "xyz"}.items():
        rows = [json.dumps({"body": f"{c}\n\n{c}"}) + "\n" for c in texts]
        (tmp_path / f"{split}.jsonl").write_text("".join(rows))
    for split, texts in {"train": "abcdef", "validation": "xyz"}.items():
        corpus = data.get_corpus(str(tmp_path), split, small_tokenizer(), text_column="body")
        tokens = corpus.tokens(0, 1).tolist() + corpus.tokens(len(corpus) - 1, len(corpus)).tolist()
        assert [VOCABULARY[t] for t in tokens] == [texts[0], texts[-1]]
        assert len(corpus) == 2 * len(texts)


def test_the_samples_reviews_have_three_splits_and_both_labels():
    """400 to train, 300 to validate, 600 to test, as the generator says."""
    for split, number in {"train": 400, "validation": 300, "test": 600}.items():
        texts, labels = data.get_reviews("sample", split)
        assert len(texts) == len(labels) == number
        assert set(labels) == {0, 1}
    assert {len(data.get_corpus("sample", s, small_tokenizer()).document_starts) - 1
            for s in ("train", "validation")} == {1500, 150}  # fmt: skip


def test_a_corpus_is_asked_for_with_its_configuration(monkeypatch):
    names = []

    def asked(path, name=None, split="train"):
        names.append(name)
        raise ValueError("enough")

    monkeypatch.setattr(data, "get_dataset", asked)
    for call in (
        lambda: data.get_corpus("owner/name", "train", small_tokenizer(), "plain"),
        lambda: data.get_reviews("owner/name", "train", "plain"),
    ):
        with pytest.raises(ValueError, match="enough"):
            call()
    assert names == ["plain", "plain"]


def test_the_sample_has_both_splits():
    assert {"train", "validation"} <= set(data.get_dataset("sample", split=None))


def test_tokenizers_load_from_each_kind_of_place_with_the_same_ids(tmp_path):
    (tmp_path / "vocab.txt").write_text("\n".join(VOCABULARY) + "\n", encoding="utf-8")
    small_tokenizer().save(str(tmp_path / "other.json"))
    expected = small_tokenizer().encode("Abc d.").ids
    for place in (tmp_path, tmp_path / "vocab.txt", tmp_path / "other.json"):
        assert data.load_tokenizer(place).encode("Abc d.").ids == expected


def test_a_folder_with_both_files_gives_its_tokenizer_json(tmp_path):
    """It says more than vocab.txt: the casing, for one."""
    (tmp_path / "vocab.txt").write_text("\n".join([*VOCABULARY, "more"]) + "\n")
    small_tokenizer().save(str(tmp_path / "tokenizer.json"))
    assert data.load_tokenizer(tmp_path).get_vocab_size() == len(VOCABULARY)


@pytest.mark.parametrize("end", ["", "\n"])
def test_a_vocabulary_has_a_token_for_each_line(tmp_path, end):
    """Also where a token is a space that ends no line, and with or without a last newline."""
    tokens = [*VOCABULARY, "\u00a0", "é"]
    (tmp_path / "vocab.txt").write_text("\n".join(tokens) + end, encoding="utf-8")
    expected = {token: i for i, token in enumerate(tokens)}
    assert data.load_tokenizer(tmp_path / "vocab.txt").get_vocab() == expected


def test_what_a_published_tokenizer_would_pad_or_cut_is_left_whole(tmp_path):
    padded = small_tokenizer()
    padded.enable_padding(length=9)
    padded.enable_truncation(3)
    padded.save(str(tmp_path / "tokenizer.json"))
    assert len(data.load_tokenizer(tmp_path).encode("a b c d")) == 6


def test_a_vocabulary_without_a_special_token_is_refused(tmp_path):
    kept = [token for token in VOCABULARY if token not in ("[MASK]", "[PAD]")]
    (tmp_path / "vocab.txt").write_text("\n".join(kept))
    with pytest.raises(ValueError, match=r"lacks \[MASK\], \[PAD\]$"):
        data.load_tokenizer(tmp_path)
    with pytest.raises(ValueError, match="no tokenizer at .*nowhere"):
        data.load_tokenizer(tmp_path / "nowhere.txt")


@given(
    st.lists(st.text(alphabet=LETTERS[:5] + "é中. ", min_size=1), min_size=1, max_size=10), seeds
)
def test_a_trained_tokenizer_is_deterministic_and_knows_every_character(texts, seed):
    """Even in another order of the texts; and [PAD] is 0."""
    tokenizer = data.train_tokenizer(texts, 60)
    order = np.random.default_rng(seed).permutation(len(texts))
    assert data.train_tokenizer([texts[i] for i in order], 60).to_str() == tokenizer.to_str()
    assert [tokenizer.token_to_id(token) for token in data.SPECIAL_TOKENS] == [0, 1, 2, 3, 4]
    assert sorted(tokenizer.get_vocab().values()) == list(range(tokenizer.get_vocab_size()))
    assert all(UNK not in ids for ids in data.encode_plain(tokenizer, texts))
    letters = {c for text in texts for c in text.replace("é", "e")} - {" "}
    fixed = len(data.SPECIAL_TOKENS) + 2 * len(letters)
    assert {t for t in tokenizer.get_vocab() if len(t) == 1} == letters
    assert fixed <= tokenizer.get_vocab_size() <= 60
    assert data.train_tokenizer(texts, fixed).get_vocab_size() == fixed


def test_a_trained_tokenizer_has_the_size_asked_for_and_is_trained_in_silence(capfd):
    """Of 26 x 26 words, 100 tokens, and every one is of use."""
    texts = [f"{a}{b}{a} {b}{a}{a}" for a in LETTERS for b in LETTERS]
    tokenizer = data.train_tokenizer(iter(texts), 100)
    assert tokenizer.get_vocab_size() == 100
    assert capfd.readouterr() == ("", "")
    used = {i for ids in data.encode_plain(tokenizer, texts) for i in ids}
    assert len(used) > 60


def test_a_vocabulary_smaller_than_the_alphabet_is_refused():
    with pytest.raises(ValueError, match="--vocab-size 6: the text's characters alone are 11"):
        data.train_tokenizer(["abc"], 6)


# ---- SST-2 --------------------------------------------------------------------------------------


def batches_of(sizes: list[int], batch_size: int, seed: int | None) -> data.SST2Batches:
    """Sentence i is sizes[i] times the token i + 1, with label i % 2."""
    rows = [[i + 1] * size for i, size in enumerate(sizes)]
    return data.SST2Batches(rows, [i % 2 for i in range(len(sizes))], batch_size, seed=seed)


@given(st.lists(st.integers(1, 30), min_size=1, max_size=300), st.integers(1, 4), seeds | st.none())
def test_an_epoch_of_buckets_has_every_sentence_once(sizes, batch_size, seed):
    """With its own label, in full batches but one, each as wide as its longest sentence."""
    batches = batches_of(sizes, batch_size, seed)
    for batches.epoch in (0, 1):
        found = list(batches)
        assert len(found) == len(batches) == math.ceil(len(sizes) / batch_size)
        assert sorted(len(b["labels"]) for b in found)[1:] == [batch_size] * (len(found) - 1)
        numbers = []
        for batch in found:
            own = (batch["input_ids"][:, 0] - 1).tolist()
            assert batch["labels"].tolist() == [i % 2 for i in own]
            assert batch["input_ids"].size(1) == max(sizes[i] for i in own)
            assert (batch["input_ids"] != PAD).sum(dim=1).tolist() == [sizes[i] for i in own]
            numbers += own
        assert sorted(numbers) == list(range(len(sizes)))


def test_bucket_orders_differ_by_epoch_and_seed_and_batches_are_of_similar_length():
    sizes = np.random.default_rng(0).integers(1, 60, 5000)

    def order(seed, epoch=0):
        batches = batches_of(sizes, 32, seed)
        batches.epoch = epoch
        return [(batch["input_ids"][:, 0] - 1).tolist() for batch in batches]

    first = order(1)
    assert first == order(1)
    assert first != order(1, epoch=1)
    assert first != order(2)
    padded = sum(max(sizes[batch]) * len(batch) for batch in first)
    assert sizes.sum() / padded > 0.93
    in_order = list(itertools.chain.from_iterable(order(None)))
    assert (np.diff(sizes[in_order]) >= 0).all()
    assert in_order == sorted(range(5000), key=lambda i: (sizes[i], i))
    means = [np.mean(sizes[batch]) for batch in first]  # short and long batches are mixed
    assert abs(np.corrcoef(means[:-1], means[1:])[0, 1]) < 0.4


def test_sentences_meet_other_sentences_in_every_epoch():
    """Even if all lengths differ: only within a pool of 64 batches are they sorted."""
    batches = batches_of(list(range(1, 601)), 4, 1)
    together = []
    for batches.epoch in (0, 1):
        together.append({frozenset(b["input_ids"][:, 0].tolist()) for b in batches})
    assert len(together[0] & together[1]) < 15
    spread = [max(b) - min(b) for b in together[0]]
    assert 4 < np.mean(spread) < 12  # 600 / 256 x 3 = 7, were the pools even


def test_sentences_are_padded_with_the_token_that_was_given():
    (batch,) = data.SST2Batches([[5], [6, 7]], [0, 1], 2, padding_idx=9)
    assert batch["input_ids"].tolist() == [[5, 9], [6, 7]]


def test_sentences_are_cls_sentence_sep_cut_to_the_longest_allowed(tmp_path):
    """A [MASK] in a review is text."""
    path = tmp_path / "train.jsonl"
    rows = [("a bc.", 1), ("[MASK] " * 30, 0)]
    path.write_text("".join(json.dumps({"sentence": t, "label": y}) + "\n" for t, y in rows))
    texts, labels = data.get_reviews(str(path), "train")
    assert labels == [1, 0]
    short, long = data.encode_sentences(small_tokenizer(), texts, 9)
    encode = small_tokenizer().token_to_id
    assert short == [CLS, encode("a"), encode("b"), encode("##c"), encode("."), SEP]
    assert (len(long), long[0], long[-1]) == (9, CLS, SEP)
    assert MASK not in long


def test_sst2_needs_its_columns(tmp_path):
    path = tmp_path / "train.jsonl"
    path.write_text(json.dumps({"review": "a", "label": 1}) + "\n")
    with pytest.raises(
        ValueError, match=r"no columns sentence \(or text\) and label in \['review', 'label'\]"
    ):
        data.get_reviews(str(path), "train")
