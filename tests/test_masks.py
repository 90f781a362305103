"""From two segments to a masked example: which columns are masked, and what becomes of their
tokens.
"""

import itertools
import math
import pickle
from collections import Counter
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import (
    MASK,
    VOCABULARY,
    candidates_of,
    corpus_of,
    documents,
    is_within,
    lengths,
    numbered,
    original,
    offset_tokenizer,
    seeds,
    small_tokenizer,
)

import data
from data import IGNORED_LABEL, PretrainDataset


def is_masked(batch: dict[str, torch.Tensor]) -> torch.Tensor:
    return batch["mlm_labels"] != IGNORED_LABEL


# ---- Single tokens ------------------------------------------------------------------------------


@given(documents(), lengths, seeds, st.booleans())
def test_labels_are_the_original_ids_at_masked_columns_and_nothing_else_changes(
    docs, length, seed, whole_words
):
    """Ids that count through the corpus follow each other within a segment, if they are read from
    the labels at masked columns and from the input elsewhere."""
    corpus = corpus_of(numbered(docs))
    dataset = PretrainDataset(corpus, offset_tokenizer(), length, seed, whole_words)
    batch = dataset.batch(range(8))
    for row, is_candidate in zip(original(batch), candidates_of(batch), strict=True):
        ids = row[is_candidate].tolist()
        breaks = [one + 1 != other for one, other in itertools.pairwise(ids)]
        assert sum(breaks) <= 1  # between segment A and segment B
        assert 1000 <= min(ids) <= max(ids) < 1000 + len(corpus)


@given(documents(), lengths, seeds)
def test_exactly_15_percent_of_the_candidates_are_masked_and_at_least_one(docs, length, seed):
    batch = PretrainDataset(corpus_of(docs), small_tokenizer(), length, seed).batch(range(16))
    masked = is_masked(batch).sum(dim=1).tolist()
    candidates = candidates_of(batch).sum(dim=1).tolist()
    assert masked == [max(1, round(0.15 * n)) for n in candidates]


@given(documents(), lengths, seeds, st.booleans())
def test_special_tokens_are_never_masked_and_never_drawn(docs, length, seed, whole_words):
    dataset = PretrainDataset(corpus_of(docs), small_tokenizer(), length, seed, whole_words)
    batch = dataset.batch(range(16))
    assert not (is_masked(batch) & ~candidates_of(batch)).any()
    inputs = batch["input_ids"][candidates_of(batch)]
    assert set(inputs.tolist()) <= {MASK, *range(5, len(VOCABULARY))}


def make_large_batch() -> dict[str, torch.Tensor]:
    """Returns 2,000 examples of 120 tokens of 6,000 different ids; 36,000 tokens are masked."""
    rng = np.random.default_rng(0)
    docs = [[rng.integers(5, 6005, 15).tolist() for _ in range(40)] for _ in range(50)]
    names = [*data.SPECIAL_TOKENS, *(f"t{i}" for i in range(5, 6005))]
    tokenizer = data.wordpiece({token: i for i, token in enumerate(names)})
    return PretrainDataset(corpus_of(docs), tokenizer, 123).batch(range(2000))


@pytest.fixture(scope="module")
def large_batch() -> dict[str, torch.Tensor]:
    return make_large_batch()


def test_of_the_masked_80_percent_become_mask_10_a_random_token_and_10_stay(large_batch):
    masked = is_masked(large_batch)
    ids, labels = large_batch["input_ids"][masked], large_batch["mlm_labels"][masked]
    count = len(ids)
    assert count > 30_000
    assert is_within((ids == MASK).double().mean().item(), 0.8, count)
    assert is_within((ids == labels).double().mean().item(), 0.1 + 0.1 / 6000, count)
    random = ids[(ids != MASK) & (ids != labels)]
    assert is_within(len(random) / count, 0.1 - 0.1 / 6000, count)
    # Uniform over the vocabulary: the mean of so many uniform ids, and the extremes are reached.
    middle, spread = (5 + 6004) / 2, 6000 / math.sqrt(12)
    assert abs(random.double().mean() - middle) < 5 * spread / math.sqrt(len(random))
    assert random.min() < 30
    assert random.max() > 5980


def test_every_column_is_equally_likely_to_be_masked(large_batch):
    """Columns 1 to 50 are candidates in nearly all examples, and masked with probability 0.15."""
    is_candidate = candidates_of(large_batch)[:, 1:51]
    masked = is_masked(large_batch)[:, 1:51]
    for column in range(50):
        draws = int(is_candidate[:, column].sum())
        assert is_within(int(masked[:, column].sum()) / draws, 0.15, draws)


class Scripted:
    """A generator whose draws are given."""

    def __init__(self, *shares: list[float]) -> None:
        self.shares = list(shares)

    def random(self, size: int) -> np.ndarray:
        return np.array(self.shares.pop(0))


def test_draws_below_0_8_put_mask_draws_below_0_9_a_random_token_and_above_the_token_stays():
    input_ids = np.array([2, 10, 11, 12, 13, 3])
    rng = Scripted([0.31, 0.85, 0.97], [0.5, 0.85, 0.2])
    corrupted, labels = data.mask_tokens(input_ids, np.array([1, 2, 4]), rng, 4, np.arange(20, 30))
    assert corrupted.tolist() == [2, 4, 28, 12, 13, 3]
    assert labels.tolist() == [-100, 10, 11, -100, 13, -100]
    assert input_ids.tolist() == [2, 10, 11, 12, 13, 3]


@pytest.mark.parametrize("share", [0.15, 0.4, 1.0])
@pytest.mark.parametrize("whole_words", [False, True])
def test_the_share_of_masked_tokens_is_an_argument(share, whole_words):
    corpus = corpus_of([[[7] * 9] * 30] * 4)
    dataset = PretrainDataset(corpus, small_tokenizer(), 43, 0, whole_words, masked_share=share)
    example = pickle.loads(pickle.dumps(dataset))[0]  # as a worker that is not forked gets it
    candidates = len(example["input_ids"]) - 3
    assert (example["mlm_labels"] != IGNORED_LABEL).sum() == round(share * candidates)


@given(st.permutations(range(5, 60)).map(lambda ids: ids[: len(VOCABULARY)]), seeds)
def test_special_tokens_may_have_any_ids_and_the_vocabulary_may_have_holes(ids, seed):
    """Each example is the same as with the usual ids, except for random tokens."""
    usual = small_tokenizer()
    moved = data.wordpiece(dict(zip(VOCABULARY, ids, strict=True)))
    texts = [f"{c} aa {c}{c} bb. c{c} dd, {c}. ee ff" for c in "abcdefgh"]
    examples = []
    for tokenizer in (usual, moved):
        documents = list(data.encode_documents(texts, tokenizer, Counter()))
        corpus = data.pack(documents, tokenizer)
        examples.append(PretrainDataset(corpus, tokenizer, 16, seed)[3])
    expected, found = (example["mlm_labels"] for example in examples)
    at_labels = expected != IGNORED_LABEL
    assert found[at_labels].tolist() == [ids[label] for label in expected[at_labels]]
    assert (found[~at_labels] == IGNORED_LABEL).all()
    inputs = examples[0]["input_ids"][~at_labels].tolist()
    assert examples[1]["input_ids"][~at_labels].tolist() == [ids[token] for token in inputs]
    special = {ids[data.SPECIAL_TOKENS.index(name)] for name in ("[PAD]", "[CLS]", "[SEP]")}
    assert not special & set(examples[1]["input_ids"][at_labels].tolist())


# ---- Whole words --------------------------------------------------------------------------------


@given(documents(), lengths, seeds)
def test_all_pieces_of_a_word_are_masked_or_none_and_at_least_one_word_is(docs, length, seed):
    """The number of masked columns is at least 15%, and only the last word exceeds it."""
    dataset = PretrainDataset(corpus_of(docs), small_tokenizer(), length, seed, True)
    batch = dataset.batch(range(16))
    for row, masked, is_candidate in zip(
        original(batch).tolist(), is_masked(batch), candidates_of(batch), strict=True
    ):
        words: list[list[bool]] = []
        for column in is_candidate.nonzero().flatten().tolist():
            if VOCABULARY[row[column]].startswith("##") and is_candidate[column - 1]:
                words[-1].append(bool(masked[column]))
            else:
                words.append([bool(masked[column])])
        assert all(len(set(word)) == 1 for word in words)
        taken = [len(word) for word in words if word[0]]
        assert taken
        count = max(1, round(0.15 * int(is_candidate.sum())))
        assert count <= sum(taken) < count + max(taken)


def test_a_word_never_reaches_across_sep():
    """Where every token is a ## piece, each segment is one word, masked without the other."""
    corpus = corpus_of([[[31] * 6] * 10] * 4)
    batch = PretrainDataset(corpus, small_tokenizer(), 23, 0, True).batch(range(20))
    segment_b = batch["token_type_ids"].bool()
    masked_a = (is_masked(batch) & ~segment_b).any(dim=1)
    masked_b = (is_masked(batch) & segment_b).any(dim=1)
    assert (masked_a & ~masked_b).any()
    assert (masked_b & ~masked_a).any()


def continues_word_of(word_lengths: list[int]) -> np.ndarray:
    return np.concatenate([np.arange(length) > 0 for length in word_lengths])


def test_words_are_taken_in_a_random_order_until_there_are_enough_tokens():
    """All orders of five words are tried."""
    word_lengths = [1, 3, 1, 2, 4]
    for order in itertools.permutations(range(5)):
        rng = mock.Mock(permutation=lambda size, order=order: np.array(order))
        taken = data.choose_words(continues_word_of(word_lengths), 4, rng)
        expected: set[int] = set()
        for word in order:
            if sum(word_lengths[i] for i in expected) < 4:
                expected.add(word)
        words = [[i] * length for i, length in enumerate(word_lengths)]
        assert taken.tolist() == [i in expected for i in itertools.chain(*words)]


def test_an_example_of_one_long_word_is_masked_whole():
    taken = data.choose_words(continues_word_of([5]), 1, np.random.default_rng(0))
    assert taken.tolist() == [True] * 5


def test_long_words_are_masked_slightly_more_often_and_short_ones_in_15_percent_of_cases():
    """Words of 1, 5 and 8 tokens in an example of 125: 15, 16 and 20 percent, within five standard
    deviations of 4,000 draws. Google's code takes words of four pieces in 11.7% of cases."""
    word_lengths = [1] * 60 + [5] * 5 + [8] * 5
    rng = np.random.default_rng(0)
    taken = np.zeros(sum(word_lengths))
    for _ in range(4000):
        taken += data.choose_words(continues_word_of(word_lengths), round(0.15 * 125), rng)
    shares = {1: taken[0] / 4000, 5: taken[60] / 4000, 8: taken[-1] / 4000}
    print(shares)
    assert is_within(taken[:60].mean() / 4000, 0.15, 60 * 4000) or taken[:60].mean() / 4000 > 0.15
    assert shares[1] < 0.18
    assert 0.13 < shares[5] < 0.22
    assert 0.15 < shares[8] < 0.27
