"""From two segments to a masked example: which columns are masked, and what becomes of their
tokens. The ids of the drawn vocabularies are in any order, with holes, the special ones included.
"""

import itertools
import math
import pickle
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
    examples,
    ids_of,
    is_within,
    original,
    small_tokenizer,
)

import data
from data import IGNORED_LABEL, PretrainDataset


def is_masked(batch: dict[str, torch.Tensor]) -> torch.Tensor:
    return batch["mlm_labels"] != IGNORED_LABEL


# ---- Single tokens ------------------------------------------------------------------------------


@given(examples(whole_words=st.just(False)))
def test_exactly_15_percent_of_the_candidates_are_masked_and_at_least_one(dataset):
    batch = dataset.batch(range(16))
    masked = is_masked(batch).sum(dim=1).tolist()
    candidates = candidates_of(batch, dataset.tokenizer).sum(dim=1).tolist()
    assert masked == [max(1, round(0.15 * n)) for n in candidates]


@given(examples())
def test_special_tokens_are_never_masked_and_never_drawn(dataset):
    batch = dataset.batch(range(16))
    candidates = candidates_of(batch, dataset.tokenizer)
    assert not (is_masked(batch) & ~candidates).any()
    inputs = batch["input_ids"][candidates]
    assert set(inputs.tolist()) <= {*ids_of(dataset.tokenizer, "[MASK]", *VOCABULARY[5:])}


@pytest.fixture(scope="module")
def large_batch() -> dict[str, torch.Tensor]:
    """2,000 examples of 120 tokens of 6,000 different ids; 36,000 tokens are masked."""
    rng = np.random.default_rng(0)
    docs = [[rng.integers(5, 6005, 15).tolist() for _ in range(40)] for _ in range(50)]
    names = [*data.SPECIAL_TOKENS, *(f"t{i}" for i in range(5, 6005))]
    tokenizer = data.wordpiece({token: i for i, token in enumerate(names)})
    return PretrainDataset(corpus_of(docs), tokenizer, 123).batch(range(2000))


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
    is_candidate = candidates_of(large_batch, small_tokenizer())[:, 1:51]
    masked = is_masked(large_batch)[:, 1:51]
    for column in range(50):
        draws = int(is_candidate[:, column].sum())
        assert is_within(int(masked[:, column].sum()) / draws, 0.15, draws)


def test_draws_below_0_8_put_mask_draws_below_0_9_a_random_token_and_above_the_token_stays():
    input_ids = np.array([2, 10, 11, 12, 13, 3])
    draws = iter([np.array([0.31, 0.85, 0.97]), np.array([0.5, 0.45, 0.2])])
    rng = mock.Mock(random=lambda size: next(draws))
    corrupted, labels = data.mask_tokens(input_ids, np.array([1, 2, 4]), rng, 4, np.arange(20, 30))
    assert corrupted.tolist() == [2, 4, 24, 12, 13, 3]
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


# ---- Whole words --------------------------------------------------------------------------------


def masked_words(dataset: PretrainDataset, batch: dict[str, torch.Tensor]) -> list[list[list]]:
    """Returns whether each token of each word of each example is masked."""
    rows = []
    for row, masked, is_candidate in zip(
        original(batch).tolist(),
        is_masked(batch).tolist(),
        candidates_of(batch, dataset.tokenizer).tolist(),
        strict=True,
    ):
        words: list[list[bool]] = []
        for column in itertools.compress(range(len(row)), is_candidate):
            is_piece = dataset.tokenizer.id_to_token(row[column]).startswith("##")
            if is_piece and is_candidate[column - 1]:
                words[-1].append(masked[column])
            else:
                words.append([masked[column]])
        rows.append(words)
    return rows


@given(examples(whole_words=st.just(True)))
def test_all_pieces_of_a_word_are_masked_or_none_and_at_least_one_word_is(dataset):
    """The number of masked columns is at least 15%, and only the last word exceeds it."""
    for words in masked_words(dataset, dataset.batch(range(16))):
        assert all(len(set(word)) == 1 for word in words)
        taken = [len(word) for word in words if word[0]]
        assert taken
        count = max(1, round(0.15 * sum(map(len, words))))
        assert count <= sum(taken) < count + max(taken)


@pytest.mark.parametrize("pieces", [["##1"], ["##'"], ["##文"], ["##1", "##'", "##文"], []])
def test_pieces_may_be_digits_signs_or_chinese_and_a_vocabulary_may_have_none(pieces):
    """Words have one token and then each of the pieces; some vocabularies have no piece at all."""
    words = ["x", "1", "'", "文"]
    vocabulary = {token: i for i, token in enumerate([*pieces, *words, *data.SPECIAL_TOKENS])}
    tokenizer = data.wordpiece(vocabulary)
    sentence = [vocabulary[token] for word in words for token in (word, *pieces)]
    corpus = corpus_of([[sentence] * 9] * 4, tokenizer)
    dataset = PretrainDataset(corpus, tokenizer, 60, 0, True)
    found = [word for row in masked_words(dataset, dataset.batch(range(40))) for word in row]
    assert all(len(set(word)) == 1 for word in found)
    assert max(map(len, found)) == 1 + len(pieces)


def test_a_word_never_reaches_across_sep():
    """Where every token is a ## piece, each segment is one word, masked without the other."""
    corpus = corpus_of([[[31] * 6] * 10] * 4)
    batch = PretrainDataset(corpus, small_tokenizer(), 23, 0, True).batch(range(20))
    segment_b = batch["token_type_ids"].bool()
    masked_a = (is_masked(batch) & ~segment_b).any(dim=1)
    masked_b = (is_masked(batch) & segment_b).any(dim=1)
    assert (masked_a & ~masked_b).any()
    assert (masked_b & ~masked_a).any()


def test_words_are_taken_in_a_random_order_until_there_are_enough_tokens():
    """All orders of five words are tried."""
    lengths = [1, 3, 1, 2, 4]
    continues_word = np.concatenate([np.arange(length) > 0 for length in lengths])
    for order in itertools.permutations(range(5)):
        rng = mock.Mock(permutation=lambda size, order=order: np.array(order))
        taken = data.choose_words(continues_word, 4, rng)
        expected: set[int] = set()
        for word in order:
            if sum(lengths[i] for i in expected) < 4:
                expected.add(word)
        words = [[i] * length for i, length in enumerate(lengths)]
        assert taken.tolist() == [i in expected for i in itertools.chain(*words)]
