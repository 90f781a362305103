# SPDX-License-Identifier: MIT
# From "BERT in four files", copyright (c) 2026 the bert-in-four-files authors.
"""Fine-tune BERT on SST-2, the sentiment of film reviews, with or without pretrained weights.

    python train_sst2.py --dataset DIR --weights runs/base/model --out runs/sst2
    python train_sst2.py --dataset DIR --tokenizer vocab.txt --size base --out runs/scratch
    python train_sst2.py --weights runs/sst2/model --predict "a gorgeous, witty film"

A run trains one model for each pair of learning rate and seed. Of each, the epoch with the best
validation accuracy counts, and the best model of all is written. With --test-dataset, or on the
sample, it is scored on the test split, once, at the end.

Writes into the folder --out: config.json, metrics.jsonl, model/, curves.png.

[BERT] Devlin et al. 2018, arXiv 1810.04805, §4.1 and A.3. [Code] google-research/bert, commit
eedf5716.
Dimensions: batch, seq.
"""

import copy
import json
import math
import os
import time
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor

import data
from bert import SST2BertModel
from train_pretrain import (
    Precision,
    autocast,
    check_folder,
    check_options,
    check_smallest,
    check_weights,
    choose_device,
    choose_precision,
    choose_tokenizer,
    draw_curves,
    keep_freed_memory,
    learning_rate,
    lock_folder,
    make_model,
    make_optimizer,
    progress_bar,
    run_script,
    set_seed,
    show,
    to_device,
    update,
    write_line,
    write_model,
)

LABELS = ("negative", "positive")
# Second number in the shuffles' seeds, so that they differ from data.py's (0 or 1 there).
PURPOSE_SENTENCES = 2

# ---- Options -----------------------------------------------------------------


@dataclass
class SST2Options:
    """Fine-tunes BERT on SST-2, or predicts the sentiment of texts.

    [BERT] A.3 tries batch sizes of 16 and 32, learning rates of 5e-5, 3e-5 and 2e-5, and 2 to 4
    epochs.
    """

    # The run
    out: str = "runs/sst2"
    """Folder of the run: a new one."""
    predict: tuple[str, ...] | None = None
    """Texts to classify with --weights, instead of training."""
    seeds: int = 1
    """Seeds per learning rate; validation accuracy is shown as mean ± standard deviation."""
    seed: int = 0
    """The first seed."""

    # The sentences
    dataset: str = "sample"
    """Sentences with labels: sample, or a directory or hub id with the columns of SST-2."""
    dataset_name: str | None = None
    """Configuration of the data set, if a hub id has several."""
    test_dataset: str | None = None
    """Data set whose test split has labels, such as SetFit/sst2."""
    tokenizer: str | None = None
    """vocab.txt, tokenizer.json, directory or hub id. Not allowed with --weights, whose own
    tokenizer is used. Without either, one is learned from the sentences."""
    vocab_size: int = 2000
    """Size of the vocabulary, if one is learned."""
    max_seq_length: int | None = None
    """Maximum tokens per sentence, including [CLS] and [SEP]; the rest is cut off. By default 128,
    or the number of rows in the position table of --weights, if that is smaller."""

    # The model
    weights: str | None = None
    """Directory or hub id of a pretrained model. Without it, training starts from scratch."""
    size: Literal["tiny", "mini", "small", "medium", "base", "large"] = "tiny"
    """Published size of a model without --weights."""
    dropout: float = 0.1
    """Dropout of hidden states and of attention, whatever the weights were trained with."""

    # The optimizer
    batch_size: int = 32
    """Sentences in a batch."""
    epochs: int = 3
    """Passes over the training split."""
    learning_rate: tuple[float, ...] = (5e-5,)
    """Peak learning rate. With several, each is tried."""

    # What is written, and the machine
    log_every: int = 50
    """Steps between two training lines in metrics.jsonl."""
    device: str | None = None
    """cpu, cuda or cuda:N. By default the GPU if there is one."""
    precision: Precision = "auto"
    """Precision of matrix products. auto chooses the fastest here."""

    def __post_init__(self) -> None:
        check_options(self)
        check_smallest(self, 0, "seed")
        check_smallest(self, 1, "seeds", "vocab_size", "batch_size", "epochs", "log_every")
        if not self.learning_rate:
            raise ValueError("--learning-rate needs at least one value")
        if self.max_seq_length is not None and self.max_seq_length < 3:
            raise ValueError("--max-seq-length must be at least 3: [CLS] a [SEP]")
        if self.predict is not None and self.weights is None:
            raise ValueError("--predict needs --weights: the model/ of a run on SST-2")


# ---- The sentences -----------------------------------------------------------


def get_reviews(path: str, split: str, name: str | None = None) -> tuple[list[str], list[int]]:
    """Returns the texts of a split of SST-2, and their labels: 0 = negative, 1 = positive.

    Raises ValueError, with the row, if a sentence is not text or a label is not 0 or 1.
    """
    source = str(data.SAMPLE / "reviews") if path == "sample" else path
    rows = data.get_dataset(source, name, split)
    column = "sentence" if "sentence" in rows.column_names else "text"
    if not {column, "label"} <= set(rows.column_names):
        raise ValueError(f"{path}: no columns sentence (or text) and label in {rows.column_names}")
    texts, labels = list(rows[column]), list(rows["label"])
    if not texts:
        raise ValueError(f"{path}, {split}: there are no sentences")
    for row, (text, label) in enumerate(zip(texts, labels, strict=True)):
        if not isinstance(text, str):
            raise ValueError(f"{path}, {split}, row {row}: {column} is {text!r}, not text")
        if type(label) is not int or label not in (0, 1):  # True, 1.0 and "1" are not labels
            raise ValueError(
                f"{path}, {split}, row {row}: the label is {label!r}, not 0 or 1 (SetFit/sst2 has a"
                " test split with labels)"
            )
    return texts, labels


def encode_sentences(tokenizer: Tokenizer, texts: list[str], longest: int) -> list[list[int]]:
    """Returns the ids of `[CLS] sentence [SEP]` for each text, cut to `longest` tokens."""
    vocabulary = tokenizer.get_vocab()
    cls_id, sep_id = vocabulary[data.CLS], vocabulary[data.SEP]
    sentences = data.encode_plain(tokenizer, texts)
    return [[cls_id, *ids[: longest - 2], sep_id] for ids in sentences]


class SST2Batches:
    """Batches of all sentences, each once, with sentences of similar lengths together.

    1. Shuffle the sentences, by `seed` and `epoch`, two attributes that `fine_tune` sets.
    2. Cut this order into pools of 64 batches, and sort each pool by length. Then only 4% of
       a batch is padding on SST-2 (67% in a plain random order), and batches differ in every epoch.
    3. Cut the pools into batches, and shuffle the batches.

    Without a seed, for evaluation, all sentences are one pool, and nothing is shuffled. A batch has
    `input_ids`, int64 (batch, length of its longest sentence), and `labels`, int64 (batch,).
    """

    def __init__(
        self, rows: list[list[int]], labels: list[int], batch_size: int, padding_idx: int = 0
    ) -> None:
        self.rows, self.labels, self.batch_size = rows, labels, batch_size
        self.padding_idx = padding_idx
        self.seed: int | None = None
        self.epoch = 0

    def __len__(self) -> int:
        return math.ceil(len(self.rows) / self.batch_size)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        size = len(self.rows)
        lengths = np.array([len(row) for row in self.rows])
        if self.seed is None:
            order = np.argsort(lengths, kind="stable")
            batch_order = np.arange(len(self))
        else:
            rng = np.random.default_rng((self.seed, PURPOSE_SENTENCES, self.epoch, 0))
            shuffled = rng.permutation(size)
            pool_size = 64 * self.batch_size
            pools = np.split(shuffled, range(pool_size, size, pool_size))
            sorted_pools = [pool[np.argsort(lengths[pool], kind="stable")] for pool in pools]
            order = np.concatenate(sorted_pools)
            batch_order = rng.permutation(len(self))

        for start in batch_order * self.batch_size:
            indices = order[start : start + self.batch_size]
            rows = [torch.tensor(self.rows[index]) for index in indices]
            input_ids = torch.nn.utils.rnn.pad_sequence(
                rows, batch_first=True, padding_value=self.padding_idx
            )
            labels = torch.tensor([self.labels[index] for index in indices])
            yield {"input_ids": input_ids, "labels": labels}


# ---- Forward and evaluation --------------------------------------------------


def forward(model: SST2BertModel, input_ids: Tensor, precision: str = "float32") -> Tensor:
    """Returns logits, (batch, 2), in float32. input_ids: (batch, seq); `Bert` masks padding."""
    with autocast(precision, input_ids.device.type):
        return model(input_ids).float()


@torch.no_grad()
def evaluate(
    model: SST2BertModel,
    batches: Iterable[dict[str, Tensor]],
    device: torch.device,
    precision: str = "float32",
) -> dict[str, float]:
    """Returns the loss in nats and the accuracy, both means over all sentences.

    The model keeps its mode.
    """
    was_training = model.training
    model.eval()
    loss = correct = sentences = 0.0
    for batch in batches:
        on_device = to_device(batch, device)
        labels = on_device["labels"]
        logits = forward(model, on_device["input_ids"], precision)
        loss += F.cross_entropy(logits, labels, reduction="sum").item()
        correct += (logits.argmax(dim=-1) == labels).sum().item()
        sentences += len(labels)
    model.train(was_training)
    return {"loss": loss / sentences, "accuracy": correct / sentences}


# ---- Fine-tuning of one model ------------------------------------------------


def fine_tune(
    model: SST2BertModel,
    training: SST2Batches,
    validation: SST2Batches,
    epochs: int,
    rate: float,
    seed: int,
    out: Path,
    log_every: int,
    precision: str = "float32",
) -> tuple[SST2BertModel, float]:
    """Trains one model on all sentences of `training`, `epochs` times.

    rate: the peak learning rate. out: the folder whose metrics.jsonl gets the lines.
    Returns the model as it was after its best epoch, and the validation accuracy of that epoch.
    """
    device = next(model.parameters()).device
    model.train()
    optimizer = make_optimizer(model)
    training.seed = seed  # turns shuffling on; each seed has its own order
    steps = epochs * len(training)
    warmup = steps // 10  # the paper does not say how many; [Code] has a tenth
    step = 0
    best_accuracy = -1.0
    identity = {"learning_rate": rate, "seed": seed}  # of this model, in every line
    started = time.perf_counter()
    bar = progress_bar(steps, desc=f"lr {rate:g} seed {seed}")

    for epoch in range(epochs):
        training.epoch = epoch  # another order of the sentences
        for batch in training:
            # Forward, loss, backward. Dropout depends only on the seed and the step.
            set_seed(seed, step)
            on_device = to_device(batch, device)
            logits = forward(model, on_device["input_ids"], precision)
            loss = F.cross_entropy(logits, on_device["labels"])
            loss.backward()

            # Clip, and take the step.
            update(model, optimizer, learning_rate(step, rate, warmup, steps))
            step += 1

            # Log.
            if step % log_every == 0:
                check_weights(model, step)
                write_line(out, split="train", step=step, **identity, loss=loss.item())
                bar.set_postfix_str(f"loss {loss.item():.3f}", refresh=False)
            bar.update()

        # Evaluate, and keep the model if it is the best so far.
        check_weights(model, step)
        metrics = evaluate(model, validation, device, precision)
        if metrics["accuracy"] > best_accuracy:
            best_accuracy = metrics["accuracy"]
            best_model = copy.deepcopy(model)
        seconds = round(time.perf_counter() - started, 2)
        line = {"step": step, "epoch": epoch + 1, "seconds": seconds, **identity, **metrics}
        write_line(out, split="validation", **line)
        show(
            f"epoch {epoch + 1}: validation loss {metrics['loss']:.3f}, "
            f"accuracy {metrics['accuracy']:.4f}"
        )
    bar.close()
    return best_model, best_accuracy


# ---- A run: every learning rate, every seed ----------------------------------


def prepare(options: SST2Options) -> tuple[Tokenizer, SST2BertModel, int]:
    """Returns the tokenizer, a model, and the most tokens of a sentence, with [CLS] and [SEP]."""

    def read_texts() -> list[str]:
        texts, _ = get_reviews(options.dataset, "train", options.dataset_name)
        return texts

    tokenizer = choose_tokenizer(options, read_texts)
    positions = options.max_seq_length or 128
    model = make_model(SST2BertModel, options, tokenizer, positions)
    return tokenizer, model, min(positions, model.config.max_seq_length)


def train(options: SST2Options) -> None:
    """Trains a model for each learning rate and seed, writes the best one, and tests it once."""
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise ValueError("fine-tuning runs in one process: start it with python, not torchrun")
    device = choose_device(options.device)
    options = replace(options, precision=choose_precision(options.precision, device))
    keep_freed_memory()
    out = Path(options.out)
    check_folder(out)

    tokenizer, _, longest = prepare(options)  # _ is a model, only a check: each seed makes one

    def load(path: str, split: str, name: str | None = None) -> SST2Batches:
        texts, labels = get_reviews(path, split, name)
        rows = encode_sentences(tokenizer, texts, longest)
        return SST2Batches(rows, labels, options.batch_size, tokenizer.get_vocab()[data.PAD])

    # All splits are read now: a mistake in the test split should surface now, not hours later.
    training = load(options.dataset, "train", options.dataset_name)
    validation = load(options.dataset, "validation", options.dataset_name)
    test_source = options.test_dataset or ("sample" if options.dataset == "sample" else None)
    test = load(test_source, "test") if test_source else None

    lock = lock_folder(out)  # noqa: F841, held to the end
    (out / "config.json").write_text(json.dumps(asdict(options), indent=2) + "\n")
    show(f"precision {options.precision}, dropout {options.dropout:g}")
    best_accuracy = -1.0
    for rate in options.learning_rate:
        accuracies = []
        for seed in range(options.seed, options.seed + options.seeds):
            torch.manual_seed(seed)  # decides the initial weights; with --weights, the classifier's
            new_model = make_model(SST2BertModel, options, tokenizer, longest)
            model, accuracy = fine_tune(
                new_model.to(device),
                training,
                validation,
                options.epochs,
                rate,
                seed,
                out,
                options.log_every,
                options.precision,
            )
            accuracies.append(accuracy)
            if accuracy > best_accuracy:
                best_model, best_accuracy = model, accuracy
                best_model.label_names = list(LABELS)  # whatever the weights had
                # Now, since the next one may diverge, or be killed.
                write_model(best_model, tokenizer, out / "model")
        deviation = f" ± {np.std(accuracies, ddof=1):.4f}" if options.seeds > 1 else ""
        mean = f"{np.mean(accuracies):.4f}{deviation}"
        show(f"learning rate {rate:g}: validation accuracy {mean}, seeds {options.seeds}")

    if test is not None:
        metrics = evaluate(best_model, test, device, options.precision)
        write_line(out, split="test", **metrics)
        show(f"test accuracy {metrics['accuracy']:.4f} (validation {best_accuracy:.4f})")
    draw_curves(out)
    show(f"{out}/model holds the best weights and their tokenizer")


# ---- Prediction --------------------------------------------------------------


@torch.no_grad()
def predict(options: SST2Options) -> None:
    """Prints a line for each text: its label, the probability of that label, the text."""
    device = choose_device(options.device)
    precision = choose_precision(options.precision, device)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # missing weights are an error below
        tokenizer, model, longest = prepare(options)
    if model.missing_parameters:  # an untrained classifier would guess, and print a probability
        raise ValueError(
            f"--predict needs the model/ of a run on SST-2; {options.weights} has no"
            f" fitting {', '.join(model.missing_parameters)}"
        )
    model.to(device)
    # LABEL_0 and LABEL_1 say nothing. Real names are kept: their order may differ from ours.
    labels = LABELS if model.label_names[0].startswith("LABEL_") else model.label_names
    for text in options.predict or ():
        rows = encode_sentences(tokenizer, [text], longest)
        logits = forward(model, torch.tensor(rows, device=device), precision)  # (1, 2)
        probs = logits.softmax(dim=-1)[0]
        print(f"{labels[int(probs.argmax())]}  {probs.max():.3f}  {text}")


def main(options: SST2Options) -> None:
    if options.predict is not None:
        predict(options)
    else:
        train(options)


if __name__ == "__main__":
    run_script(main, SST2Options)
