"""A learning rate that is too large: one pair cannot be overfitted, and the loss stays at ln n.

python -m experiments.trap CORPUS VOCABULARY >> results/trap.jsonl
"""

import sys
from collections.abc import Iterator

import torch

import data
from bert import BertConfig, BertPretrainModel
from experiments.lines import print_lines
from train_pretrain import (
    PretrainLosses,
    add_gradients,
    evaluate,
    make_optimizer,
    to_device,
    update,
)

LENGTH = 128


def trap(corpus: str, vocabulary: str, size: str = "mini", steps: int = 300) -> Iterator[dict]:
    """One pair of segments, without dropout, at three learning rates."""
    tokenizer = data.load_tokenizer(vocabulary)
    examples = data.PretrainDataset(
        data.get_corpus(corpus, "validation", tokenizer), tokenizer, LENGTH
    )
    batch = to_device(examples.batch([0]), torch.device("cpu"))
    shares = batch["mlm_targets"].bincount() / len(batch["mlm_targets"])
    entropy = torch.special.entr(shares).sum().item()  # ln n, if the n tokens all differ
    for rate in (1e-2, 1e-3, 1e-4):
        torch.manual_seed(0)
        sizes = {"vocab_size": tokenizer.get_vocab_size(), "max_seq_length": LENGTH}
        config = BertConfig.named(size, **sizes, dropout=0.0, attention_dropout=0.0)
        model = BertPretrainModel(config, 0).train()
        optimizer = make_optimizer(model)
        for step in range(steps + 1):
            if step % 5 == 0:
                metrics = evaluate(model, [batch])
                line = {"learning_rate": rate, "step": step, "masked": len(batch["mlm_targets"])}
                line |= {name: metrics[name] for name in ("mlm_loss", "most_frequent_prediction")}
                yield {"size": size, **line, "entropy_of_targets": entropy}
            add_gradients(PretrainLosses(model), [batch])
            update(model, optimizer, rate)


if __name__ == "__main__":
    corpus, vocabulary = sys.argv[1:]
    print_lines(trap(corpus, vocabulary))
