"""From a corpus to two segments: how segment A and segment B of an example are drawn. Neither
segment, nor any length, tells whether segment B follows segment A.
"""

import itertools
import math
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import (
    corpora_of_all_kinds,
    corpus_of,
    documents,
    examples,
    ids_of,
    is_within,
    original,
    seeds,
    sentences_of_lengths,
    small_tokenizer,
)

import data
from data import Pair, PretrainDataset, Seam, TokenizedCorpus, find_seam, span_around

ROOM = 61  # tokens of both segments
KINDS = corpora_of_all_kinds(ROOM)
rooms = st.integers(2, 37)


def segments(dataset: PretrainDataset, row: list[int]) -> tuple[list[int], list[int]]:
    """Returns segment A and segment B of a row before masking."""
    (sep,) = ids_of(dataset.tokenizer, "[SEP]")
    first_sep = row.index(sep)
    last_sep = len(row) - 1 - row[::-1].index(sep)
    return row[1:first_sep], row[first_sep + 1 : last_sep]


def draw_pairs(corpus: TokenizedCorpus, count: int, room: int = ROOM, seed: int = 0) -> list[Pair]:
    """Returns `count` pairs, each for a random part of the corpus."""
    rng = np.random.default_rng(seed)
    parts = max(1, len(corpus) // room)
    pairs = []
    for part in rng.integers(parts, size=count).tolist():
        start, end = part * len(corpus) // parts, (part + 1) * len(corpus) // parts
        pairs.append(data.draw_pair(corpus, rng, start, end, room))
    return pairs


# ---- What a pair is -----------------------------------------------------------------------------


@given(documents(), rooms, seeds)
def test_a_true_segment_b_follows_and_a_random_one_is_from_another_document(docs, room, seed):
    """Segment A ends a sentence, and segment B starts one."""
    corpus = corpus_of(docs)
    starts = set(corpus.sentence_starts.tolist())
    for pair in draw_pairs(corpus, 16, room, seed):
        document_a = span_around(corpus.document_starts, pair.a_start)
        document_b = span_around(corpus.document_starts, pair.b_start)
        assert pair.a_start < pair.a_end <= document_a[1]
        assert pair.b_start < pair.b_end <= document_b[1]
        assert {pair.a_end, pair.b_start} <= starts
        if pair.is_random:
            assert document_a != document_b
        else:
            assert pair.b_start == pair.a_end


@given(examples())
def test_an_example_is_cls_segment_a_sep_segment_b_sep_and_padding(dataset):
    """Segment ids are 0 up to the first [SEP], 1 up to the second, and 0 on padding. The batch is
    as wide as its longest example, and no example exceeds the limit."""
    batch = dataset.batch(range(16))
    pad, cls, sep = ids_of(dataset.tokenizer, "[PAD]", "[CLS]", "[SEP]")
    widths = []
    for ids, types in zip(original(batch).tolist(), batch["token_type_ids"].tolist(), strict=True):
        a, b = segments(dataset, ids)
        assert a
        assert b
        assert not {pad, cls, sep} & {*a, *b}
        width = len(a) + len(b) + 3
        padding = len(ids) - width
        assert ids == [cls, *a, sep, *b, sep] + [pad] * padding
        assert types == [0] * (len(a) + 2) + [1] * (len(b) + 1) + [0] * padding
        widths.append(width)
    assert max(widths) == batch["input_ids"].size(1) <= dataset.max_seq_length
    assert {str(values.dtype) for values in batch.values()} == {"torch.int64"}
    assert {np.asarray(values).dtype for values in dataset[0].values()} == {np.dtype("int64")}


@given(examples())
def test_an_example_holds_the_tokens_and_the_label_of_its_pair(dataset):
    """They are read from the MLM labels at masked columns, and from the input elsewhere."""
    pairs, draw_pair, tokens = [], data.draw_pair, dataset.corpus.tokens

    def noted(*arguments):
        pairs.append(draw_pair(*arguments))
        return pairs[-1]

    with mock.patch.object(data, "draw_pair", noted):
        batch = dataset.batch(range(8))
    assert [int(pair.is_random) for pair in pairs] == batch["nsp_labels"].tolist()
    for pair, ids in zip(pairs, original(batch).tolist(), strict=True):
        segment_a, segment_b = segments(dataset, ids)
        assert segment_a == tokens[pair.a_start : pair.a_end].tolist()
        assert segment_b == tokens[pair.b_start : pair.b_end].tolist()


def test_one_pair_in_ten_is_shorter_where_documents_have_room():
    """Its length is uniform from 2 to ROOM: within five standard deviations, for 6,000 pairs."""
    corpus = corpus_of(sentences_of_lengths(KINDS["novels"]))
    found = [
        pair.a_end - pair.a_start + pair.b_end - pair.b_start for pair in draw_pairs(corpus, 6000)
    ]
    # A novel has room for every pair, except near its ends: that makes 1% more of them short.
    short = np.mean([length < ROOM for length in found])
    assert is_within(short, 0.1 * (ROOM - 2) / (ROOM - 1) + 0.01, 6000)
    of_the_short = [length for length in found if length < ROOM]
    assert min(of_the_short) < 6
    assert abs(np.mean(of_the_short) - ROOM / 2) < 5 * ROOM / math.sqrt(12 * len(of_the_short))


# ---- By construction: the label is the xor of two coins -----------------------------------------


class Coins:
    """A generator that draws what another one does, except that the two coins are given."""

    def __init__(self, seed: int, coins: tuple[int, int]) -> None:
        self.rng = np.random.default_rng(seed)
        self.given = [None, *coins]  # the place in another document is drawn before the coins

    def random(self) -> float:
        return self.rng.random()

    def integers(self, low: int, high: int | None = None):
        given = self.given.pop(0) if high is None else None
        return self.rng.integers(low, high) if given is None else given


@given(documents(), rooms, seeds)
def test_each_coin_says_where_one_segment_is_and_their_xor_is_the_label(docs, room, seed):
    """Segment A depends on the first coin alone, segment B on the second, the lengths on neither.
    So nothing about one segment, or about the lengths, tells the label if the coins are fair."""
    corpus = corpus_of(docs)
    pairs = {
        coins: data.draw_pair(corpus, Coins(seed, coins), 0, len(corpus), room)
        for coins in itertools.product((0, 1), repeat=2)
    }
    for (coin_a, coin_b), pair in pairs.items():
        assert pair.is_random == (coin_a != coin_b)
        assert pair[:2] == pairs[coin_a, 0][:2] == pairs[coin_a, 1][:2]  # segment A
        assert pair[2:4] == pairs[0, coin_b][2:4] == pairs[1, coin_b][2:4]  # segment B
    assert len({pair.a_end - pair.a_start for pair in pairs.values()}) == 1
    assert len({pair.b_end - pair.b_start for pair in pairs.values()}) == 1


@pytest.mark.parametrize("length", [2, ROOM])
@pytest.mark.parametrize("share", [0.0, 1 - 1e-9])
def test_a_short_pair_has_two_tokens_or_more_and_segment_a_any_number_of_them(length, share):
    """The extremes of what may be drawn."""
    corpus = corpus_of([[[7]] * 300, [[8]] * 300])
    draws = iter([0.0, share])  # short; how much of it is segment A

    def integers(low: int, high: int = 0) -> int:
        is_length = (low, high) == (2, ROOM + 1)
        return length if is_length else (low + high) // 2

    rng = SimpleNamespace(random=draws.__next__, integers=integers)
    pair = data.draw_pair(corpus, rng, 100, 200, ROOM)
    lengths = (pair.a_end - pair.a_start, pair.b_end - pair.b_start)
    assert lengths == ((length - 1, 1) if share else (1, length - 1))


@given(documents(), rooms, seeds)
def test_a_pair_is_as_long_as_both_documents_have_room_for(docs, room, seed):
    """At both seams, enough tokens come before for segment A, and enough after for segment B."""
    corpus = corpus_of(docs)
    pairs = [
        data.draw_pair(corpus, Coins(seed, coins), 0, len(corpus), room)
        for coins in ((0, 1), (1, 0))
    ]
    room_before, room_after = [], []
    for pair in pairs:
        room_before.append(pair.a_end - span_around(corpus.document_starts, pair.a_start)[0])
        room_after.append(span_around(corpus.document_starts, pair.b_start)[1] - pair.b_start)
    length_a, length_b = pair.a_end - pair.a_start, pair.b_end - pair.b_start
    assert 1 <= length_a <= min(room_before)
    assert 1 <= length_b <= min(room_after)
    is_short = np.random.default_rng(seed).random() < 0.1
    if not is_short:
        there_is = min(room_before) + min(room_after)
        assert length_a + length_b == min(room, max(2, there_is - 1))


@given(documents(with_long=False), st.integers(50, 300), seeds)
def test_a_pair_never_starts_one_document_and_ends_another(docs, room, seed):
    """Only a random pair can, so a guess from this alone would be right for 54% of 128-token pairs
    of film reviews. Exception: one has one token before its seam, the other one after it."""
    corpus = corpus_of(docs)
    starts = set(corpus.document_starts.tolist())
    for pair in draw_pairs(corpus, 16, room, seed):
        if pair.is_random and pair.a_start in starts and pair.b_end in starts:
            assert pair.a_end - pair.a_start == pair.b_end - pair.b_start == 1


def test_the_coins_are_fair_and_independent():
    """Each of the four outcomes has probability 1/4: five standard deviations of 8,000 draws."""
    corpus = corpus_of(sentences_of_lengths(KINDS["two documents"]))
    edge = corpus.document_starts[1]
    rng = np.random.default_rng(0)
    pairs = [data.draw_pair(corpus, rng, 0, int(edge), ROOM) for _ in range(8000)]
    # The first seam is in the first document, so the other one is in the second.
    outcomes = [(bool(pair.a_start >= edge), bool(pair.b_start >= edge)) for pair in pairs]
    for outcome in itertools.product((False, True), repeat=2):
        assert is_within(outcomes.count(outcome) / 8000, 0.25, 8000)


# ---- Seams --------------------------------------------------------------------------------------


def test_a_seam_is_the_next_start_of_a_sentence_and_in_the_last_sentence_its_own():
    corpus = corpus_of(sentences_of_lengths([[5, 3, 4, 3], [2, 2]]))
    assert find_seam(corpus, 0) == find_seam(corpus, 4) == Seam(0, 5, 15)
    assert find_seam(corpus, 6) == Seam(0, 8, 15)
    assert find_seam(corpus, 12) == find_seam(corpus, 14) == Seam(0, 12, 15)
    assert find_seam(corpus, 15) == find_seam(corpus, 18) == Seam(15, 17, 19)


# ---- By statistics: nothing about one segment, or about the form, tells the label ----------------
#
# 12,000 pairs from each kind of corpus, always the same ones. Means must agree within five standard
# errors (by chance, they fail to once in 1.7 million times). A fact that predicts the label of
# 52.3% of the pairs would be noticed. (Those found here in earlier versions predicted 57 to 64%.)

DRAWS = 12_000


def draw_kind(kind: str) -> tuple[TokenizedCorpus, list[Pair], np.ndarray]:
    """Returns a corpus of this kind, pairs of it, and whether each is random, bool (pairs,)."""
    corpus = corpus_of(sentences_of_lengths(KINDS[kind]))
    pairs = draw_pairs(corpus, DRAWS)
    return corpus, pairs, np.array([pair.is_random for pair in pairs])


@pytest.fixture(scope="module", params=KINDS)
def drawn(request) -> tuple[TokenizedCorpus, list[Pair], np.ndarray]:
    return draw_kind(request.param)


def assert_tells_nothing(facts: dict[str, np.ndarray], is_random: np.ndarray) -> None:
    """Fails unless each fact has the same mean for true and for random pairs."""
    for name, values in facts.items():
        true, random = values[~is_random].astype(float), values[is_random].astype(float)
        error = math.sqrt(true.var() / len(true) + random.var() / len(random))
        assert abs(true.mean() - random.mean()) <= 5 * error + 1e-9, name


def spans_around(starts: np.ndarray, offsets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """`span_around` for many offsets."""
    after = starts.searchsorted(offsets, side="right")
    return starts[after - 1], starts[after]


def facts_of_segments(
    corpus: TokenizedCorpus, starts: np.ndarray, ends: np.ndarray
) -> dict[str, np.ndarray]:
    """Returns what can be known of segments from their own tokens: form and origin."""
    document_starts, document_ends = spans_around(corpus.document_starts, starts)
    first_sentence_starts, first_sentence_ends = spans_around(corpus.sentence_starts, starts)
    last_sentence_starts, last_sentence_ends = spans_around(corpus.sentence_starts, ends - 1)
    document_lengths = document_ends - document_starts
    return {
        "length": ends - starts,
        "log of the document's length": np.log(document_lengths),
        "where in its document": (starts - document_starts) / document_lengths,
        "starts its document": starts == document_starts,
        "ends its document": ends == document_ends,
        "starts a sentence": starts == first_sentence_starts,
        "ends a sentence": ends == last_sentence_ends,
        "log of its first sentence's length": np.log(first_sentence_ends - first_sentence_starts),
        "log of its last sentence's length": np.log(last_sentence_ends - last_sentence_starts),
    }


@pytest.mark.parametrize("first", [0, 2], ids=["segment A", "segment B"])
def test_one_segment_tells_nothing_about_the_label(first, drawn):
    corpus, pairs, is_random = drawn
    starts, ends = np.array(pairs)[:, first : first + 2].T
    assert_tells_nothing(facts_of_segments(corpus, starts, ends), is_random)


# ---- Which tokens are drawn ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "lengths",
    [[[6, 3, 5], [4, 3]], [[1, 1], [1, 1]], [[9, 1], [1, 9]], [[1, 12], [2, 2]], [[3, 1], [9, 4]]],
)
def test_every_token_within_reach_of_a_seam_is_drawn_and_no_other(lengths):
    """All draws are enumerated, not sampled. Within reach are the tokens that both documents have
    room for, and that leave a token for the other segment: not the middle of a long sentence."""
    room = 6
    corpus = corpus_of(sentences_of_lengths(lengths))
    found: set[int] = set()
    for offset in range(len(corpus)):
        size = np.diff(span_around(corpus.document_starts, offset)).item()
        for elsewhere, share, coins in itertools.product(
            range(len(corpus) - size), range(room), ((0, 0), (1, 1))
        ):
            shares = iter([0.0, share / room])  # a short pair, and segment A's share
            numbers = iter([room, offset, elsewhere, *coins])
            rng = SimpleNamespace(
                random=shares.__next__, integers=lambda *_, numbers=numbers: next(numbers)
            )
            pair = data.draw_pair(corpus, rng, 0, len(corpus), room)
            found.update(range(pair.a_start, pair.b_end))
    within_reach: set[int] = set()
    seams = {find_seam(corpus, offset) for offset in range(len(corpus))}
    for seam, other in itertools.permutations(seams, 2):
        if seam.document_start != other.document_start:
            before = min(s.offset - s.document_start for s in (seam, other))
            after = min(s.document_end - s.offset for s in (seam, other))
            length = min(room, max(2, before + after - 1))
            first = seam.offset - min(before, length - 1)
            last = seam.offset + min(after, length - 1)
            within_reach.update(range(first, last))
    assert found == within_reach


@given(documents(with_long=False), rooms)
def test_the_examples_of_an_epoch_share_the_corpus_and_leave_nothing_out(docs, room):
    """Each example's part of the corpus starts where that of the one before ends."""
    corpus = corpus_of(docs)
    parts = []

    def noted(corpus, rng, start, end, room):
        parts.append((start, end))
        return draw_pair(corpus, rng, start, end, room)

    draw_pair = data.draw_pair
    with mock.patch.object(data, "draw_pair", noted):
        examples = list(PretrainDataset(corpus, small_tokenizer(), room + 3))
    assert len(examples) == len(parts) == max(1, len(corpus) // room)
    assert parts[0][0] == 0
    assert parts[-1][1] == len(corpus)
    assert all(one[1] == other[0] for one, other in itertools.pairwise(parts))
    assert all(room <= end - start <= 2 * room for start, end in parts) or len(parts) == 1


@pytest.mark.slow
def test_the_first_and_last_twenty_tokens_are_drawn_at_least_0_35_times_the_mean():
    """40 documents have 300 to 650 tokens, 30,000 pairs at most 128. The tokens at one distance
    from an end are then drawn some 3,000 times or more: to 5%, at three standard deviations."""
    rng = np.random.default_rng(0)
    lengths = [[int(n) for n in rng.integers(5, 31, rng.integers(18, 34))] for _ in range(50)]
    lengths = [document for document in lengths if sum(document) >= 300][:40]
    corpus = corpus_of(sentences_of_lengths(lengths))
    edges = np.zeros(len(corpus) + 1)
    for pair in draw_pairs(corpus, 30_000, room=125):
        for start, end in ((pair.a_start, pair.a_end), (pair.b_start, pair.b_end)):
            edges[start] += 1
            edges[end] -= 1
    drawn = np.cumsum(edges)[:-1]
    firsts = corpus.document_starts[:-1, None] + np.arange(20)
    lasts = corpus.document_starts[1:, None] - 1 - np.arange(20)
    for offsets in (firsts, lasts):
        by_distance = drawn[offsets].mean(axis=0) / drawn.mean()
        assert by_distance.min() >= 0.35
