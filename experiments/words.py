"""How far does a classifier that ignores word order get on SST-2?

    pip install scikit-learn
    python -m experiments.words stanfordnlp/sst2 > experiments/words.jsonl

It is logistic regression on the set of words in a sentence, so it needs no seed. Prints a line for
each C: the larger it is, the smaller is the penalty on the squared weights.
"""

import json
import sys

from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline

from train_sst2 import get_reviews


def main(dataset: str) -> None:
    train_texts, train_labels = get_reviews(dataset, "train")
    dev_texts, dev_labels = get_reviews(dataset, "validation")
    for c in (0.1, 0.3, 1, 3, 10):
        set_of_words = CountVectorizer(binary=True, token_pattern=r"\S+")
        classifier = make_pipeline(set_of_words, LogisticRegression(C=c, max_iter=1000))
        classifier.fit(train_texts, train_labels)
        accuracy = classifier.score(dev_texts, dev_labels)
        words = len(set_of_words.vocabulary_)
        print(json.dumps({"C": c, "words": words, "accuracy": round(accuracy, 5)}))


if __name__ == "__main__":
    main(*sys.argv[1:])
