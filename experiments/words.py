"""How far does a classifier get on SST-2 that does not know the order of the words?

    python -m experiments.words stanfordnlp/sst2 > experiments/words.jsonl

It is logistic regression on the set of words in a sentence, so it needs no seed. Prints a line for
each penalty on the squared weights.
"""

import json
import sys

import torch
import torch.nn.functional as F
from torch import Tensor

from train_sst2 import get_reviews

PENALTIES = (1e-6, 3e-6, 1e-5, 3e-5, 1e-4)


class BagOfWords(torch.nn.Module):
    """Adds up a weight for each word that a sentence has, once, and a bias."""

    def __init__(self, words: list[str]) -> None:
        super().__init__()
        self.index_of = {word: index for index, word in enumerate(words)}
        self.weights = torch.nn.Parameter(torch.zeros(len(words), 1))
        self.bias = torch.nn.Parameter(torch.zeros(1))

    def encode(self, texts: list[str]) -> tuple[Tensor, Tensor]:
        """Returns the words of all texts, end to end, and where each text starts."""
        known = [sorted(set(text.split()) & self.index_of.keys()) for text in texts]
        indices = [self.index_of[word] for words in known for word in words]
        lengths = torch.tensor([len(words) for words in known])
        return torch.tensor(indices), lengths.cumsum(0) - lengths

    def forward(self, indices: Tensor, starts: Tensor) -> Tensor:
        """Returns logits, (texts,): above 0 means positive."""
        return F.embedding_bag(indices, self.weights, starts, mode="sum")[:, 0] + self.bias

    def fit(self, texts: list[str], labels: list[int], penalty: float) -> None:
        optimizer = torch.optim.LBFGS(
            self.parameters(), max_iter=100, line_search_fn="strong_wolfe"
        )
        bags, targets = self.encode(texts), torch.tensor(labels).float()

        def loss_and_gradients() -> Tensor:
            optimizer.zero_grad()
            loss = F.binary_cross_entropy_with_logits(self(*bags), targets)
            loss = loss + penalty * self.weights.square().sum()
            loss.backward()
            return loss

        optimizer.step(loss_and_gradients)


def main(dataset: str) -> None:
    texts, labels = get_reviews(dataset, "train")
    dev_texts, dev_labels = get_reviews(dataset, "validation")
    words = sorted({word for text in texts for word in text.split()})
    for penalty in PENALTIES:
        model = BagOfWords(words)
        model.fit(texts, labels, penalty)
        predicted = model(*model.encode(dev_texts)) > 0
        accuracy = (predicted == torch.tensor(dev_labels)).float().mean().item()
        print(json.dumps({"penalty": penalty, "words": len(words), "accuracy": round(accuracy, 5)}))


if __name__ == "__main__":
    main(*sys.argv[1:])
