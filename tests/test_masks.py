"""From two segments to a masked example: which positions are masked, and what becomes of their
tokens.
"""

import itertools
import math

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
    position_tokenizer,
    seeds,
    small_tokenizer,
)

import data
from data import IGNORED_LABEL, PretrainDataset


def is_masked(batch: dict[str, torch.Tensor]) -> torch.Tensor:
    return batch["mlm_labels"] != IGNORED_LABEL


# ---- Single tokens ------------------------------------------------------------------------------


@given(documents(), lengths, seeds, st.booleans())
def test_labels_are_the_original_ids_at_masked_positions_and_nothing_else_changes(
    docs, length, seed, whole_words
):
    """Ids that count through the corpus follow each other within a segment, if they are read from
    the labels at masked positions and from the input elsewhere."""
    corpus = corpus_of(numbered(docs))
    dataset = PretrainDataset(corpus, position_tokenizer(), length, seed, whole_words)
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
    """Returns 2,000 examples of 120 tokens of 6,000 different ids; 36,000 positions are masked."""
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
    """A generator that returns what it was given: for `random`, the same numbers for all calls."""

    def __init__(self, numbers: list[float], integer: int = 0, order: list[int] | None = None):
        self.numbers, self.integer, self.order = numbers, integer, order

    def random(self, size: int) -> np.ndarray:
        return np.resize(self.numbers, size)

    def integers(self, high: int) -> int:
        return self.integer

    def permutation(self, size: int) -> np.ndarray:
        return np.array(self.order if self.order is not None else range(size))


def test_the_example_of_mask_tokens():
    """Draws below 0.8 put [MASK], draws below 0.9 a random token; above, the token stays."""
    input_ids = np.array([2, 10, 11, 12, 13, 3])
    rng = Scripted([0.31, 0.85, 0.97])
    corrupted, labels = data.mask_tokens(input_ids, np.array([1, 2, 4]), rng, 4, np.arange(20, 30))
    assert corrupted.tolist() == [2, 4, 28, 12, 13, 3]  # 0.85 of ten ids is the id 28
    assert labels.tolist() == [-100, 10, 11, -100, 13, -100]
    assert input_ids.tolist() == [2, 10, 11, 12, 13, 3]


# ---- Whole words --------------------------------------------------------------------------------


@given(documents(), lengths, seeds)
def test_all_pieces_of_a_word_are_masked_or_none_and_at_least_one_word_is(docs, length, seed):
    """Only the words that an end of the arc divides, two at most, can make the number of masked
    positions differ from 15%."""
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
        longest = sorted(map(len, words))[-2:]
        assert sum(taken) < count + sum(longest)
        assert sum(taken) > count - sum(longest)


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


def test_every_word_is_masked_with_the_same_probability_whatever_its_length():
    """The cases are enumerated: words of 1 to 5 tokens in a random order, all starts of the arc,
    and 60 equal steps of the draw, which all lengths divide. Each word is masked in exactly 15% of
    the cases."""
    word_lengths = [1, 2, 3, 4, 5, 1, 1, 2, 1, 5, 4, 3] * 3
    n = sum(word_lengths)
    count = round(0.15 * n)
    candidates = np.arange(n)
    order = np.random.default_rng(0).permutation(len(word_lengths)).tolist()
    taken = np.zeros(n, dtype=int)
    for arc_start in range(n):
        for step in range(60):
            rng = Scripted([(step + 0.5) / 60], arc_start, order)
            taken[data.choose_words(candidates, continues_word_of(word_lengths), rng)] += 1
    assert taken.tolist() == [60 * count] * n


@pytest.mark.parametrize(("draw", "expected"), [(0.3, [1, 2, 3, 4]), (0.4, [4])])
def test_the_example_of_choose_words(draw, expected):
    """Words of 1, 3, 1 and 2 tokens lie on a circle, and an arc of 2 tokens starts at its third
    one."""
    candidates = np.arange(14)  # masked_count is 2
    continues_word = continues_word_of([1, 3, 1, 2, 1, 1, 1, 1, 1, 1, 1])
    order = [1, 2, 3, 0, 4, 5, 6, 7, 8, 9, 10]
    rng = Scripted([draw], 2, order)
    assert data.choose_words(candidates, continues_word, rng).tolist() == expected


def test_an_example_of_one_long_word_is_masked_whole():
    """The arc has one token, and the draw would leave the word out."""
    rng = Scripted([0.99], 3, [0])
    assert data.choose_words(np.arange(5), continues_word_of([5]), rng).tolist() == [0, 1, 2, 3, 4]


def test_where_no_word_is_taken_the_one_with_most_tokens_inside_is():
    """Of two words of 5 tokens, the arc lies in the second, and the draw would leave it out."""
    rng = Scripted([0.99], 5, [0, 1])
    masked = data.choose_words(np.arange(10), continues_word_of([5, 5]), rng)
    assert masked.tolist() == [5, 6, 7, 8, 9]


def test_the_arc_continues_at_the_start_of_the_circle():
    """Of ten words of one token, an arc of 2 from the last one masks the last and the first."""
    rng = Scripted([0.5], 9)
    masked = data.choose_words(np.arange(10), continues_word_of([1] * 10), rng)
    assert masked.tolist() == [0, 9]


def test_words_of_one_piece_and_of_four_are_masked_in_15_percent_of_cases():
    """2,000 examples have 36,000 words of one piece and 6,000 of four, and both shares are within
    five standard deviations. When the word that the limit divides was left out, they were 18.9% and
    11.7%."""
    rng = np.random.default_rng(0)
    one_piece = list(range(5, 31))
    four_pieces = [5, 31, 32, 33]  # a ##a ##b ##c
    sentence = [[t] for t in one_piece[:18]] + [four_pieces] * 3
    docs = [
        [[t for i in rng.permutation(21) for t in sentence[i]] for _ in range(20)] for _ in range(8)
    ]
    dataset = PretrainDataset(corpus_of(docs), small_tokenizer(), 125, 0, True)
    batch = dataset.batch(range(2000))
    ids, masked = original(batch), is_masked(batch)
    inside = candidates_of(batch)
    is_one_piece = inside & (ids > 5) & (ids < 31)
    is_last_piece = inside & (ids == 33)
    for is_word in (is_one_piece, is_last_piece):
        words = int(is_word.sum())
        share = int((masked & is_word).sum()) / words
        assert words > 6000
        assert is_within(share, 0.15, words)
