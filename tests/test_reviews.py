"""From the sentences and labels of SST-2 to batches: what is read, and what is rejected. An epoch
has every sentence once, among sentences of similar lengths.
"""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import (
    CLS,
    MASK,
    PAD,
    SEP,
    review_batches,
    seeds,
    small_tokenizer,
    write_rows,
)

from train_sst2 import SST2Batches, encode_sentences, get_reviews

# ---- What is read -------------------------------------------------------------------------------


def test_the_samples_reviews_have_three_splits_and_both_labels():
    """The generator writes 400 sentences to train on, 300 to validate and 600 to test."""
    for split, size in {"train": 400, "validation": 300, "test": 600}.items():
        texts, labels = get_reviews("sample", split)
        assert len(texts) == len(labels) == size
        assert set(labels) == {0, 1}


def test_sentences_are_cls_sentence_sep_cut_to_the_longest_allowed(tmp_path):
    """A [MASK] that is written in a review is text, not a special token."""
    path = tmp_path / "train.jsonl"
    rows = [("a bc.", 1), ("[MASK] " * 30, 0)]
    write_rows(path, [{"sentence": text, "label": label} for text, label in rows])
    texts, labels = get_reviews(str(path), "train")
    assert labels == [1, 0]
    short, long = encode_sentences(small_tokenizer(), texts, 9)
    encode = small_tokenizer().token_to_id
    assert short == [CLS, encode("a"), encode("b"), encode("##c"), encode("."), SEP]
    assert (len(long), long[0], long[-1]) == (9, CLS, SEP)
    assert MASK not in long


def test_the_column_of_sentences_may_be_named_text(tmp_path):
    path = tmp_path / "train.jsonl"
    write_rows(path, [{"text": "a b", "label": 1}])
    assert get_reviews(str(path), "train") == (["a b"], [1])


def test_sst2_needs_its_columns(tmp_path):
    path = tmp_path / "train.jsonl"
    write_rows(path, [{"review": "a", "label": 1}])
    with pytest.raises(ValueError, match="sentence .*label.*review"):
        get_reviews(str(path), "train")


@pytest.mark.parametrize("label", [-1, 2, 1.0, 0.5, True, "1", None])
def test_labels_are_the_integers_0_and_1(label, tmp_path):
    rows = [{"sentence": "a", "label": label}] * 2
    path = write_rows(tmp_path / "train.jsonl", rows)
    with pytest.raises(ValueError, match=r"train, row 0: .* 0 or 1"):
        get_reviews(path, "train")


def test_a_table_of_another_kind_is_rejected_by_name(tmp_path):
    """In GLUE's own .tsv files, a quotation mark opened a field that swallowed whole rows."""
    path = tmp_path / "train.tsv"
    path.write_text('sentence\tlabel\n" a\t1\nb\t0\n" c\t1\n')
    for where in (path, tmp_path):
        with pytest.raises(ValueError, match=r"train\.tsv"):
            get_reviews(str(where), "train")


@pytest.mark.parametrize("sentence", [5, ["a", "b"], None])
def test_sentences_are_text(sentence, tmp_path):
    path = write_rows(tmp_path / "train.jsonl", [{"sentence": sentence, "label": 1}])
    with pytest.raises(ValueError, match="train, row 0: sentence"):
        get_reviews(path, "train")


# ---- Batches ------------------------------------------------------------------------------------


@given(st.lists(st.integers(1, 30), min_size=1, max_size=300), st.integers(1, 4), seeds | st.none())
def test_an_epoch_of_buckets_has_every_sentence_once(sizes, batch_size, seed):
    """Each sentence has its own label. All batches but one are full, and each is as wide as its
    longest sentence."""
    batches = review_batches(sizes, batch_size, seed)
    for batches.epoch in (0, 1):
        found = list(batches)
        assert len(found) == len(batches) == math.ceil(len(sizes) / batch_size)
        assert sorted(len(b["labels"]) for b in found)[1:] == [batch_size] * (len(found) - 1)
        indices = []
        for batch in found:
            own = (batch["input_ids"][:, 0] - 1).tolist()
            assert batch["labels"].tolist() == [i % 2 for i in own]
            assert batch["input_ids"].size(1) == max(sizes[i] for i in own)
            assert (batch["input_ids"] != PAD).sum(dim=1).tolist() == [sizes[i] for i in own]
            indices += own
        assert sorted(indices) == list(range(len(sizes)))


def test_bucket_orders_differ_by_epoch_and_seed_and_batches_are_of_similar_length():
    sizes = np.random.default_rng(0).integers(1, 60, 5000)

    def order(seed, epoch=0):
        batches = review_batches(sizes, 32, seed)
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
    """Sentences are sorted only within a pool of 64 batches, so batches differ even if all lengths
    do."""
    batches = review_batches(list(range(1, 601)), 4, 1)
    together = []
    for batches.epoch in (0, 1):
        together.append({frozenset(b["input_ids"][:, 0].tolist()) for b in batches})
    assert len(together[0] & together[1]) < 15
    spread = [max(b) - min(b) for b in together[0]]
    assert 4 < np.mean(spread) < 12  # 600 / 256 x 3 = 7, were the pools even


def test_sentences_are_padded_with_the_token_that_was_given():
    (batch,) = SST2Batches([[5], [6, 7]], [0, 1], 2, padding_idx=9)
    assert batch["input_ids"].tolist() == [[5, 9], [6, 7]]
