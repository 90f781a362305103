"""How well frequencies alone predict a token: the losses that a model has to beat.

python -m experiments.bigrams CORPUS VOCABULARY >> results/bigrams.jsonl
"""

import sys
from collections.abc import Iterator

import numpy as np

import data
from experiments.lines import print_lines


def bigrams(corpus: str, vocabulary: str) -> Iterator[dict]:
    """Nats for each token of the validation split, by how often tokens, and pairs of neighbours,
    occur in the training split. Pairs that are rare give way to single tokens (Witten and Bell)."""
    tokenizer = data.load_tokenizer(vocabulary)
    size = tokenizer.get_vocab_size()
    train = data.get_corpus(corpus, "train", tokenizer).tokens
    held_out = data.get_corpus(corpus, "validation", tokenizer).tokens
    counts = np.bincount(train, minlength=size)
    single = (counts + 1) / (len(train) + size)
    pairs, occur = np.unique(train[:-1].astype(np.int64) * size + train[1:], return_counts=True)
    kinds = np.bincount(pairs // size, minlength=size)  # different tokens that follow each
    first, second = held_out[:-1].astype(np.int64), held_out[1:]
    at = np.minimum(np.searchsorted(pairs, first * size + second), len(pairs) - 1)
    seen = np.where(pairs[at] == first * size + second, occur[at], 0)
    weight = kinds[first]
    double = (seen + weight * single[second]) / np.maximum(counts[first] + weight, 1)
    double = np.where(weight > 0, double, single[second])
    yield {
        "tokens": len(held_out),
        "unigram_cross_entropy": float(-np.log(single[held_out]).mean()),
        "bigram_cross_entropy": float(-np.log(double).mean()),
    }


if __name__ == "__main__":
    print_lines(bigrams(*sys.argv[1:]))
