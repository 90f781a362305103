"""How many sentences of SST-2 share words with the reviews of the pretraining corpus.

python -m experiments.overlap REVIEWS_DIR SST2_DIR
"""

import re
import sys
from collections.abc import Iterator

import data
from experiments.lines import print_lines
from train_sst2 import get_reviews

WORDS_IN_A_ROW = 8


def runs_of_words(text: str) -> Iterator[str]:
    """Yields every eight words in a row, without case and punctuation."""
    words = re.findall(r"\w+", text.lower())
    for i in range(len(words) - WORDS_IN_A_ROW + 1):
        yield " ".join(words[i : i + WORDS_IN_A_ROW])


def overlap(reviews: str, sst2: str) -> Iterator[dict]:
    """Counts the sentences of the validation split that share eight words in a row with a review,
    and shows them.
    """
    sentences, _ = get_reviews(sst2, "validation")
    wanted = {run for sentence in sentences for run in runs_of_words(sentence)}
    found: set[str] = set()
    for text in data.get_texts(reviews):
        found.update(wanted.intersection(runs_of_words(text or "")))
    sharing = [s for s in sentences if not found.isdisjoint(runs_of_words(s))]
    yield {"sentences": len(sentences), "that share eight words": len(sharing)}
    for sentence in sharing:
        yield {"sentence": sentence, "shared": sorted(found.intersection(runs_of_words(sentence)))}


if __name__ == "__main__":
    print_lines(overlap(*sys.argv[1:]))
