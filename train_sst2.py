"""Fine-tune BERT on SST-2, the sentiment of film reviews, with or without pretrained weights.

    python train_sst2.py --dataset DIR --weights runs/base/model --out runs/sst2
    python train_sst2.py --dataset DIR --tokenizer vocab.txt --size base --out runs/scratch
    python train_sst2.py --weights runs/sst2/model --predict "a gorgeous, witty film"

The epoch with the best accuracy on the validation split is kept; the test split is scored once, by
that epoch's weights. Writes under --out: config.json, metrics.jsonl, model/, curves.png.

[BERT] Devlin et al. 2018, arXiv 1810.04805, §4.1 and A.3.
"""

import copy
import json
import sys
import time
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer

import data
from bert import SIZES, BertConfig, SST2BertModel, check_padding
from support.curves import draw_sst2
from support.command_line import LARGEST_SEED, LARGEST_SIZE, option, run_script
from support.devices import PRECISIONS, autocast, choose_device, choose_precision, keep_freed_memory
from support.folder import run_folder, write_line, write_whole
from support.processes import need_one_process
from support.run import FiniteGuard, progress_bar, set_seed
from train_pretrain import learning_rate, make_optimizer, matching_tokenizer, update

LABELS = ("negative", "positive")


@dataclass
class SST2Options:
    """[BERT] A.3 tries batches of 16 and 32, rates of 5e-5, 3e-5 and 2e-5, 2 to 4 epochs."""

    out: str = option("runs/sst2", "a new folder for all that the run writes")
    dataset: str = option("sample", "sample, or a directory or hub id with SST-2's columns")
    dataset_name: str | None = option(None, "the dataset's configuration, where it has several")
    test_dataset: str | None = option(None, "where the labelled test split is: SetFit/sst2")
    tokenizer: str | None = option(None, "needed without --weights; else learned from the dataset")
    vocab_size: int = option(
        2000, "of a tokenizer learned from the dataset", 1, at_most=LARGEST_SIZE
    )
    weights: str | None = option(None, "directory of a pretrained model; none: from scratch")
    size: str = option("tiny", "published size, without --weights", choices=list(SIZES))
    max_seq_length: int | None = option(
        None, "of a sentence; all that --weights has, or 128", 3, at_most=LARGEST_SIZE
    )
    batch_size: int = option(32, "sentences in a batch", 1, at_most=LARGEST_SIZE)
    epochs: int = option(3, "passes over the training split", 1)
    learning_rate: tuple[float, ...] = option((5e-5,), "peak; with several, a run for each", 0)
    dropout: float = option(0.1, "hidden and attention dropout, whatever the weights had", 0)
    precision: str = option(
        "auto", "of products of matrices; auto is the fastest here", choices=PRECISIONS
    )
    seeds: int = option(
        1, "runs of each learning rate, to have a mean and a deviation", 1, at_most=LARGEST_SIZE
    )
    seed: int = option(0, "the first of them", 0, at_most=LARGEST_SEED - LARGEST_SIZE)
    log_every: int = option(50, "steps between lines of metrics.jsonl", 1)
    device: str | None = option(None, "cpu or cuda; the GPU if there is one")
    predict: tuple[str, ...] = option((), "texts to classify with --weights; - reads lines")


def make_tokenizer(options: SST2Options) -> Tokenizer:
    """Returns the tokenizer of --weights, or the one that is named, or one learned from the
    sentences.
    """
    if options.weights:
        return matching_tokenizer(options.weights, options.tokenizer)
    if options.tokenizer:
        return data.load_tokenizer(options.tokenizer)
    texts, _ = data.get_reviews(options.dataset, "train", options.dataset_name)
    return data.train_tokenizer(texts, options.vocab_size)


def make_model(options: SST2Options, tokenizer: Tokenizer) -> SST2BertModel:
    """Returns a pretrained model, or one with the initial weights of torch's seed.

    --dropout counts, not the dropout in the weights' config: else a model that was pretrained
    without would be fine-tuned without, and nobody would notice.
    """
    dropouts = {"dropout": options.dropout, "attention_dropout": options.dropout}
    if options.weights:
        model = SST2BertModel.from_pretrained(options.weights, **dropouts)
    else:
        sizes = {"vocab_size": max(tokenizer.get_vocab().values()) + 1}
        sizes["max_seq_length"] = options.max_seq_length or 128
        config = BertConfig.named(options.size, **sizes, **dropouts)
        model = SST2BertModel(config, tokenizer.get_vocab()[data.PAD])
    check_padding(model, tokenizer)
    if (options.max_seq_length or 0) > model.config.max_seq_length:
        raise ValueError(
            f"--max-seq-length {options.max_seq_length}: the weights have "
            f"{model.config.max_seq_length} positions"
        )
    return model


def forward(
    model: SST2BertModel, input_ids: torch.Tensor, precision: str = "float32"
) -> torch.Tensor:
    """Returns logits (batch, 2) in float32, computed in this precision."""
    with autocast(precision, input_ids.device.type):
        return model(input_ids).float()


@torch.no_grad()
def evaluate(
    model: SST2BertModel,
    batches: Iterable[dict[str, torch.Tensor]],
    device: torch.device,
    precision: str = "float32",
) -> dict[str, float]:
    """Returns the loss in nats and the accuracy, means over all sentences."""
    model.eval()
    loss = correct = count = 0.0
    for batch in batches:
        labels = batch["labels"].to(device)
        logits = forward(model, batch["input_ids"].to(device), precision)
        loss += F.cross_entropy(logits, labels, reduction="sum").item()
        correct += (logits.argmax(dim=-1) == labels).sum().item()
        count += len(labels)
    model.train()
    return {"loss": loss / count, "accuracy": correct / count}


def best_epoch(accuracies: list[float]) -> int:
    """Returns the first epoch with the highest accuracy."""
    return int(np.argmax(accuracies))


def fine_tune(
    model: SST2BertModel,
    train: data.SST2Batches,
    validation: data.SST2Batches,
    epochs: int,
    rate: float,
    seed: int,
    out: Path,
    log_every: int,
    precision: str = "float32",
) -> tuple[SST2BertModel, float]:
    """Trains one model. Returns it as of its best epoch, and that epoch's validation accuracy."""
    device = next(model.parameters()).device
    optimizer = make_optimizer(model.train())
    train.seed = seed
    steps, step, started = epochs * len(train), 0, time.perf_counter()
    accuracies, best = [], model
    about = {"learning_rate": rate, "seed": seed}
    guard = FiniteGuard(device)
    bar = progress_bar(steps, f"lr {rate:g} seed {seed}")
    for epoch in range(epochs):
        train.epoch = epoch
        for batch in train:
            set_seed(seed, step)
            logits = forward(model, batch["input_ids"].to(device, non_blocking=True), precision)
            loss = F.cross_entropy(logits, batch["labels"].to(device, non_blocking=True))
            loss.backward()
            norm = update(model, optimizer, learning_rate(step, rate, steps // 10, steps))
            guard.note(step, norm)
            step += 1
            bar.update()
            if step % log_every == 0:
                guard.check()
                write_line(out, split="train", step=step, **about, loss=loss.item())
                bar.set_postfix_str(f"loss {loss.item():.3f}", refresh=False)
        guard.check(model)
        metrics = evaluate(model, validation, device, precision)
        accuracies.append(metrics["accuracy"])
        if best_epoch(accuracies) == epoch:
            best = copy.deepcopy(model)
        seconds = round(time.perf_counter() - started, 2)
        write_line(
            out, split="validation", step=step, epoch=epoch + 1, seconds=seconds, **about, **metrics
        )
        bar.write(
            f"epoch {epoch + 1}: validation loss {metrics['loss']:.3f}, "
            f"accuracy {metrics['accuracy']:.4f}"
        )
    bar.close()
    return best, max(accuracies)


def train(options: SST2Options) -> None:
    need_one_process()
    device = choose_device(options.device)
    options = replace(options, precision=choose_precision(options.precision, device))
    if not options.learning_rate:
        raise ValueError("--learning-rate needs a value, or several")
    keep_freed_memory()
    with run_folder(options) as out:
        run_fine_tuning(options, out, device)


def run_fine_tuning(options: SST2Options, out: Path, device: torch.device) -> None:
    """Trains a model for each learning rate and seed, writes the best one, and scores it once."""
    torch.manual_seed(options.seed)
    print(f"precision {options.precision}, dropout {options.dropout:g}")
    write_whole(out / "config.json", json.dumps(asdict(options), indent=2) + "\n")
    tokenizer = make_tokenizer(options)
    padding_idx = tokenizer.get_vocab()[data.PAD]
    model = make_model(options, tokenizer)
    longest = options.max_seq_length or model.config.max_seq_length

    def load(
        path: str, split: str, name: str | None = None, seed: int | None = None
    ) -> data.SST2Batches:
        texts, labels = data.get_reviews(path, split, name)
        rows = data.encode_sentences(tokenizer, texts, longest)
        return data.SST2Batches(rows, labels, options.batch_size, padding_idx, seed)

    training = load(options.dataset, "train", options.dataset_name, options.seed)
    validation = load(options.dataset, "validation", options.dataset_name)
    where = options.test_dataset or ("sample" if options.dataset == "sample" else None)
    test = load(where, "test") if where else None  # now, not when all is done
    kept: list[Any] = [None, -1.0]
    for rate in options.learning_rate:
        accuracies = []
        for seed in range(options.seed, options.seed + options.seeds):
            torch.manual_seed(seed)  # of the classifier's initial weights, or of all
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
            kept = max(kept, [model, accuracy], key=lambda pair: pair[1])
        deviation = np.std(accuracies, ddof=1) if options.seeds > 1 else 0.0
        print(
            f"learning rate {rate:g}: validation accuracy {np.mean(accuracies):.4f} "
            f"± {deviation:.4f}, seeds {options.seeds}"
        )
    model, accuracy = kept
    model.save_pretrained(out / "model", tokenizer)
    draw_sst2(out)
    if test:
        metrics = evaluate(model, test, device, options.precision)
        write_line(out, split="test", **metrics)
        print(f"test accuracy {metrics['accuracy']:.4f}, of the run with {accuracy:.4f}")
    print(f"{out}/model holds the best weights and their tokenizer")


def texts_to_predict(texts: Sequence[str]) -> Iterator[str]:
    """Yields the texts; for "-", the lines of standard input."""
    for text in texts:
        if text != "-":
            yield text
            continue
        for number, line in enumerate(sys.stdin.buffer, start=1):
            try:
                yield line.decode().rstrip("\n")
            except UnicodeDecodeError as error:
                raise ValueError(f"--predict -: line {number} is not UTF-8: {error}") from error


@torch.no_grad()
def predict(options: SST2Options) -> None:
    """Prints a line for each text: its label, the probability of that, the text."""
    if not options.weights:
        raise ValueError("--predict needs --weights: the model/ of a run on SST-2")
    device = choose_device(options.device)
    precision = choose_precision(options.precision, device)
    tokenizer = make_tokenizer(options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what is missing is looked at below
        model = make_model(options, tokenizer).eval().to(device)
    if model.initialized:  # a head that nobody has trained would guess, with a probability
        raise ValueError(
            f"--predict needs the model/ of a run on SST-2; {options.weights} has no"
            f" {', '.join(model.initialized)}"
        )
    for text in texts_to_predict(options.predict):
        rows = data.encode_sentences(tokenizer, [text], model.config.max_seq_length)
        probs = forward(model, torch.tensor(rows, device=device), precision).softmax(dim=-1)[0]
        print(f"{LABELS[probs.argmax()]}  {probs.max():.3f}  {text}")


def main(options: SST2Options) -> None:
    (predict if options.predict else train)(options)


if __name__ == "__main__":
    run_script(main, SST2Options)
