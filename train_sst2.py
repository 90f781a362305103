"""Fine-tune BERT on SST-2, the sentiment of film reviews, with or without pretrained weights.

    python train_sst2.py --dataset DIR --weights runs/base/model --out runs/sst2
    python train_sst2.py --dataset DIR --tokenizer vocab.txt --size base --out runs/scratch
    python train_sst2.py --weights runs/sst2/model --predict "a gorgeous, witty film"

A run trains one model for every learning rate and every seed. Of each model the epoch with the best
accuracy on the validation split is kept, and the best of these models is written. With
--test-dataset, or on the sample, that model is scored on the test split, once, at the end.

Writes into the folder --out: config.json, metrics.jsonl, model/, curves.png.

[BERT] Devlin et al. 2018, arXiv 1810.04805, §4.1 and A.3. [Code] google-research/bert.
Dimensions: batch, seq.
"""

import copy
import json
import math
import sys
import time
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor

import data
from bert import BertConfig, SST2BertModel, check_tokenizer, fetch, read_json
from support.command_line import LARGEST_INTEGER, LARGEST_SIZE, check_limits, run_script
from support.curves import draw_sst2
from support.devices import (
    Precision,
    autocast,
    choose_device,
    choose_precision,
    keep_freed_memory,
)
from support.folder import (
    check_lies_outside,
    run_folder,
    write_line,
    write_model,
    write_whole,
)
from support.processes import need_one_process
from support.run import Display, FiniteGuard, progress_bar, set_seed, show
from train_pretrain import learning_rate, make_optimizer, matching_tokenizer, update

LABELS = ("negative", "positive")

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
    """Texts to classify with --weights, instead of training. The text "-" stands for the lines of
    standard input."""
    seeds: int = 1
    """Models to train for each learning rate, for a mean and a deviation."""
    seed: int = 0
    """Seed of the first of them."""

    # The sentences
    dataset: str = "sample"
    """Sentences with labels: sample, or a directory or hub id with the columns of SST-2."""
    dataset_name: str | None = None
    """Configuration of the data set, where a hub id has several."""
    test_dataset: str | None = None
    """Data set whose test split has labels: SetFit/sst2."""
    tokenizer: str | None = None
    """vocab.txt, tokenizer.json, directory or hub id. By default that of --weights, or one that is
    learned from the sentences."""
    vocab_size: int = 2000
    """Size of a vocabulary that is learned."""
    max_seq_length: int | None = None
    """Tokens of a sentence with [CLS] and [SEP]; the rest is cut off. By default as many as
    --weights have positions, or 128."""

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
        check_limits(self, LIMITS)
        if not self.learning_rate:
            raise ValueError("--learning-rate needs a value, or several")
        if self.predict == ():
            raise ValueError("--predict needs a text, or - for the lines of standard input")
        if self.predict and not self.weights:
            raise ValueError("--predict needs --weights: the model/ of a run on SST-2")


LIMITS = {  # the smallest and the largest value
    "seeds": (1, LARGEST_SIZE),
    "seed": (0, LARGEST_INTEGER - LARGEST_SIZE),  # so that all seeds of the run are valid
    "vocab_size": (1, LARGEST_SIZE),
    "max_seq_length": (3, LARGEST_SIZE),  # [CLS] a [SEP]
    "dropout": (0, 0.99),
    "batch_size": (1, LARGEST_SIZE),
    "epochs": (1, LARGEST_SIZE),
    "learning_rate": (0, math.inf),
    "log_every": (1, LARGEST_INTEGER),
}


# ---- SST-2 -------------------------------------------------------------------


def get_reviews(path: str, split: str, name: str | None = None) -> tuple[list[str], list[int]]:
    """Returns the texts of a split of SST-2, and their labels: 0 = negative, 1 = positive.

    Raises ValueError, with the row, if a sentence is no text or a label is not 0 or 1.
    """
    source = str(data.sample_folder() / "reviews") if path == "sample" else path
    rows = data.get_dataset(source, name, split)
    column = "sentence" if "sentence" in rows.column_names else "text"
    if not {column, "label"} <= set(rows.column_names):
        raise ValueError(f"{path}: no columns sentence (or text) and label in {rows.column_names}")
    texts, labels = list(rows[column]), list(rows["label"])
    for row, (text, label) in enumerate(zip(texts, labels, strict=True)):
        if not isinstance(text, str):
            raise ValueError(
                f"{path}, {split}: row {row} has the {column} {text!r}, which is no text"
            )
        # True, 1.0 and "1" are no labels.
        if type(label) is not int or label not in (0, 1):
            raise ValueError(
                f"{path}, {split}: row {row} has the label {label!r}, not 0 or 1 (SetFit/sst2 has a"
                " test split with labels)"
            )
    return texts, labels


def encode_sentences(tokenizer: Tokenizer, texts: list[str], longest: int) -> list[list[int]]:
    """Returns the ids of `[CLS] sentence [SEP]` for each text, cut to `longest` tokens."""
    vocabulary = tokenizer.get_vocab()
    cls_id, sep_id = vocabulary[data.CLS], vocabulary[data.SEP]
    sentences = data.encode_plain(tokenizer, texts)
    return [[cls_id, *ids[: longest - 2], sep_id] for ids in sentences]


PURPOSE_SST2 = 2  # of random numbers; see data.py


class SST2Batches:
    """Batches of all sentences, each once, with sentences of similar lengths together.

    1. Shuffle the sentences, by (`seed`, `epoch`). The training loop sets both attributes.
    2. Cut the order into pools of 64 batches, and sort each pool by length. Then only 4% of a batch
       is padding (67% in a plain random order, each batch padded to its longest), and every epoch
       still groups other sentences.
    3. Cut the pools into batches, and shuffle the batches.

    Without a seed, for evaluation, all sentences are one pool, and nothing is shuffled. A batch is
    `input_ids`, int64 (batch, longest of these), and `labels`, int64 (batch,).
    """

    def __init__(
        self,
        rows: list[list[int]],
        labels: list[int],
        batch_size: int,
        padding_idx: int = 0,
        seed: int | None = None,
    ) -> None:
        self.rows, self.labels, self.batch_size = rows, labels, batch_size
        self.padding_idx, self.seed, self.epoch = padding_idx, seed, 0

    def __len__(self) -> int:
        return math.ceil(len(self.rows) / self.batch_size)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        size = len(self.rows)
        lengths = np.array([len(row) for row in self.rows])
        if self.seed is None:
            order = np.argsort(lengths, kind="stable")
            batch_order = np.arange(len(self))
        else:
            rng = np.random.default_rng((self.seed, PURPOSE_SST2, self.epoch, 0))
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
    """Returns logits, (batch, 2), in float32. input_ids: (batch, seq)."""
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

    The model is in training mode afterwards.
    """
    model.eval()
    loss = correct = sentences = 0.0
    for batch in batches:
        labels = batch["labels"].to(device)
        logits = forward(model, batch["input_ids"].to(device), precision)
        loss += F.cross_entropy(logits, labels, reduction="sum").item()
        correct += (logits.argmax(dim=-1) == labels).sum().item()
        sentences += len(labels)
    model.train()
    return {"loss": loss / sentences, "accuracy": correct / sentences}


def best_epoch(accuracies: list[float]) -> int:
    """Returns the index of the highest accuracy, and of several the first."""
    return int(np.argmax(accuracies))


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

    rate: the peak learning rate. out: the folder whose metrics.jsonl gets the lines. A training
    line with "step": N has the loss of update N, counted from 1. (train_pretrain.py and the
    messages of `FiniteGuard` count from 0.)
    Returns the model as it was after its best epoch, and the validation accuracy of that epoch.
    """
    device = next(model.parameters()).device
    model.train()
    optimizer = make_optimizer(model)
    guard = FiniteGuard(device)
    training.seed = seed  # with a seed SST2Batches shuffles, for each seed in another order
    steps = epochs * len(training)
    warmup = steps // 10  # the paper does not say how many; [Code] has a tenth
    step = 0
    best_model = model
    accuracies: list[float] = []
    identity = {"learning_rate": rate, "seed": seed}  # of this model, in every line
    started = time.perf_counter()
    bar = progress_bar(steps, f"lr {rate:g} seed {seed}")

    for epoch in range(epochs):
        training.epoch = epoch  # another order of the sentences
        for batch in training:
            # Forward, loss, backward. Dropout depends only on the seed of the model and on
            # the step.
            set_seed(seed, step)
            input_ids = batch["input_ids"].to(device, non_blocking=True)
            labels = batch["labels"].to(device, non_blocking=True)
            logits = forward(model, input_ids, precision)
            loss = F.cross_entropy(logits, labels)
            loss.backward()

            # Clip, and take the step.
            norm = update(model, optimizer, learning_rate(step, rate, warmup, steps))
            guard.note(step, norm)
            step += 1
            bar.update()

            # Log.
            if step % log_every == 0:
                guard.check()
                write_line(out, split="train", step=step, **identity, loss=loss.item())
                bar.set_postfix_str(f"loss {loss.item():.3f}", refresh=False)

        # Evaluate, and keep the model if it is the best so far.
        guard.check(model)
        metrics = evaluate(model, validation, device, precision)
        accuracies.append(metrics["accuracy"])
        if best_epoch(accuracies) == epoch:
            best_model = copy.deepcopy(model)
        measured = {"seconds": round(time.perf_counter() - started, 2), **identity, **metrics}
        write_line(out, split="validation", step=step, epoch=epoch + 1, **measured)
        bar.write(
            f"epoch {epoch + 1}: validation loss {metrics['loss']:.3f}, "
            f"accuracy {metrics['accuracy']:.4f}",
            file=Display(sys.stdout),
        )
    bar.close()
    return best_model, max(accuracies)


# ---- A run: every learning rate, every seed ----------------------------------


def choose_tokenizer(options: SST2Options) -> Tokenizer:
    """Returns the tokenizer of --weights or --tokenizer, or one learned from the sentences."""
    if options.weights:
        return matching_tokenizer(options.weights, options.tokenizer)
    if options.tokenizer:
        return data.load_tokenizer(options.tokenizer)
    texts, _ = get_reviews(options.dataset, "train", options.dataset_name)
    return data.train_tokenizer(texts, options.vocab_size)


def make_model(options: SST2Options, tokenizer: Tokenizer) -> SST2BertModel:
    """Returns a pretrained model, or a new one with initial weights from torch's seed.

    The dropout in the config of the weights does not count. A model that was pretrained without
    dropout would otherwise be fine-tuned without, and nobody would notice.
    """
    dropouts = {"dropout": options.dropout, "attention_dropout": options.dropout}
    if options.weights:
        model = SST2BertModel.from_pretrained(options.weights, **dropouts)
    else:
        vocabulary = tokenizer.get_vocab()
        config = BertConfig.named(
            options.size,
            vocab_size=max(vocabulary.values()) + 1,
            max_seq_length=options.max_seq_length or 128,
            **dropouts,
        )
        model = SST2BertModel(config, vocabulary[data.PAD])
    check_tokenizer(model, tokenizer)
    if (options.max_seq_length or 0) > model.config.max_seq_length:
        raise ValueError(
            f"--max-seq-length {options.max_seq_length}: the weights have "
            f"{model.config.max_seq_length} positions"
        )
    return model


def train(options: SST2Options) -> None:
    """Chooses device and precision, opens the run's folder, and fine-tunes there."""
    need_one_process()
    device = choose_device(options.device)
    options = replace(options, precision=choose_precision(options.precision, device))
    keep_freed_memory()
    check_lies_outside(options.out, options.dataset, "--dataset")
    check_lies_outside(options.out, options.test_dataset, "--test-dataset")
    with run_folder(options) as out:
        run_fine_tuning(options, out, device)


def run_fine_tuning(options: SST2Options, out: Path, device: torch.device) -> None:
    """Trains a model for each learning rate and seed, writes the best one, and tests it once."""
    print(f"precision {options.precision}, dropout {options.dropout:g}")
    tokenizer = choose_tokenizer(options)
    padding_idx = tokenizer.get_vocab()[data.PAD]
    # This model is not trained. It is made so that wrong options fail early, and for its length.
    untrained = make_model(options, tokenizer)
    longest = options.max_seq_length or untrained.config.max_seq_length

    def load(path: str, split: str, name: str | None = None) -> SST2Batches:
        texts, labels = get_reviews(path, split, name)
        rows = encode_sentences(tokenizer, texts, longest)
        return SST2Batches(rows, labels, options.batch_size, padding_idx)

    # All splits are read now: a mistake in the test split must not show up after hours.
    training = load(options.dataset, "train", options.dataset_name)
    validation = load(options.dataset, "validation", options.dataset_name)
    test_source = options.test_dataset or ("sample" if options.dataset == "sample" else None)
    test = load(test_source, "test") if test_source else None
    # A rejected command leaves no config.json, so this comes after all that may be rejected.
    write_whole(out / "config.json", json.dumps(asdict(options), indent=2) + "\n")

    best_model: Any = None
    best_accuracy = -1.0
    for rate in options.learning_rate:
        accuracies = []
        for seed in range(options.seed, options.seed + options.seeds):
            torch.manual_seed(seed)  # decides the initial weights, at least of the classifier
            model = make_model(options, tokenizer).to(device)
            model, accuracy = fine_tune(
                model,
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
                # Now, since the next one may diverge, or be killed.
                write_model(best_model, tokenizer, out / "model")
        accuracy_of_seeds = f"{np.mean(accuracies):.4f}"
        if options.seeds > 1:
            accuracy_of_seeds += f" ± {np.std(accuracies, ddof=1):.4f}"
        show(
            f"learning rate {rate:g}: validation accuracy {accuracy_of_seeds},"
            f" seeds {options.seeds}"
        )

    if test is not None:
        metrics = evaluate(best_model, test, device, options.precision)
        write_line(out, split="test", **metrics)
        show(f"test accuracy {metrics['accuracy']:.4f} (validation {best_accuracy:.4f})")
    draw_sst2(out)
    show(f"{out}/model holds the best weights and their tokenizer")


# ---- Prediction --------------------------------------------------------------


def texts_to_predict(texts: Sequence[str]) -> Iterator[str]:
    """Yields the texts; in place of "-", the lines of standard input."""
    for text in texts:
        if text != "-":
            try:
                text.encode()  # other bytes of a command line arrive as surrogates
            except UnicodeEncodeError as error:
                raise ValueError(f"--predict: the text {text!r} is not UTF-8") from error
            yield text
            continue
        if sys.stdin is None:
            raise ValueError("--predict -: there is no standard input")
        for line_number, line in enumerate(sys.stdin.buffer, start=1):
            try:
                yield line.decode().rstrip("\n")
            except UnicodeDecodeError as error:
                raise ValueError(
                    f"--predict -: line {line_number} is not UTF-8: {error}"
                ) from error


def label_names(weights: str) -> Sequence[str]:
    """Returns the names of classes 0 and 1: those in config.json, since in a model of somebody else
    class 0 may be the positive one. If it has none, or LABEL_0 and LABEL_1, which transformers
    writes without names, they are those of SST-2.
    """
    published = read_json(fetch(weights) / "config.json").get("id2label")
    if not isinstance(published, dict):
        return LABELS
    names: list[Any] = [published.get("0"), published.get("1")]
    are_names = all(isinstance(name, str) and name for name in names)
    return names if are_names and names != ["LABEL_0", "LABEL_1"] else LABELS


@torch.no_grad()
def predict(options: SST2Options) -> None:
    """Prints a line for each text: its label, the probability of that label, the text."""
    device = choose_device(options.device)
    precision = choose_precision(options.precision, device)
    tokenizer = choose_tokenizer(options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # missing heads are handled below
        model = make_model(options, tokenizer).eval().to(device)
    if model.missing_parameters:  # an untrained classifier would guess, and print a probability
        raise ValueError(
            f"--predict needs the model/ of a run on SST-2; {options.weights} has no"
            f" {', '.join(model.missing_parameters)}"
        )
    longest = options.max_seq_length or model.config.max_seq_length
    labels = label_names(str(options.weights))
    for text in texts_to_predict(options.predict or ()):
        rows = encode_sentences(tokenizer, [text], longest)
        logits = forward(model, torch.tensor(rows, device=device), precision)  # (1, 2)
        probs = logits.softmax(dim=-1)[0]
        print(f"{labels[int(probs.argmax())]}  {probs.max():.3f}  {text}")


def main(options: SST2Options) -> None:
    if options.predict:
        predict(options)
    else:
        train(options)


if __name__ == "__main__":
    run_script(main, SST2Options)
