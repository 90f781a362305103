"""Mistakes, made again on purpose, to show what one sees.

    python -m experiments.mistakes rate CORPUS VOCABULARY > experiments/mistakes/rate.jsonl
    python -m experiments.mistakes up_front CORPUS VOCABULARY > experiments/mistakes/up_front.jsonl
    python -m experiments.mistakes mapped CORPUS VOCABULARY > experiments/mistakes/mapped.jsonl
    python -m experiments.mistakes lists CORPUS VOCABULARY > experiments/mistakes/lists.jsonl
    python -m experiments.mistakes    # draws mistakes.png

CORPUS is what train_pretrain.py takes as --dataset, with a document per row. The lines of
tokenizer.jsonl are of train_sst2.py, with another tokenizer in the folder of the weights.
"""

import gc
import itertools
import json
import multiprocessing
import os
import random
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import torch
from tokenizers import Tokenizer
from torch.utils.data import DataLoader, RandomSampler

import data
from bert import BertConfig, BertPretrainModel
from experiments.curves import HERE, new_figure, read_lines
from train_pretrain import PretrainLosses, add_gradients, make_optimizer, update

LENGTH = 128
BATCH = 256
FOLDER = HERE / "mistakes"


# ---- A learning rate that is too large ---------------------------------------


def rate(documents: list[str], tokenizer: Tokenizer, folder: str) -> Iterator[dict]:
    """Yields the loss while one pair is overfitted, without dropout, at three learning rates."""
    corpus = data.tokenize_corpus(documents[:16], tokenizer, f"{folder}/corpus")
    examples = data.PretrainDataset(corpus, tokenizer, LENGTH)
    batch = data.collate([examples[0]], examples.padding_idx)
    shares = batch["mlm_targets"].bincount() / len(batch["mlm_targets"])
    entropy = torch.special.entr(shares).sum().item()  # ln n, if the n tokens all differ
    config = BertConfig.named(
        "mini",
        vocab_size=tokenizer.get_vocab_size(),
        max_seq_length=LENGTH,
        dropout=0.0,
        attention_dropout=0.0,
    )
    for learning_rate in (1e-2, 1e-3, 1e-4):
        torch.manual_seed(0)
        model = BertPretrainModel(config, examples.padding_idx).train()
        losses_of = PretrainLosses(model, "float32")
        optimizer = make_optimizer(model)
        for step in range(301):
            mlm_loss, _ = add_gradients(losses_of, [batch], len(batch["mlm_targets"]), 1).tolist()
            update(model, optimizer, learning_rate)
            if step % 5 == 0:
                yield {
                    "learning_rate": learning_rate,
                    "step": step,
                    "mlm_loss": mlm_loss,
                    "entropy_of_targets": entropy,
                }


# ---- All examples made before training ---------------------------------------


def make_examples(rows: dict[str, list], tokenizer: Tokenizer) -> dict[str, list]:
    """Returns masked examples from whole documents, coded the way one would at first: in loops over
    sentences and tokens. Each sentence is paired with the next or a random one of its document.
    """
    examples: dict[str, list] = {"input_ids": [], "mlm_labels": []}
    vocabulary = tokenizer.get_vocab()
    cls = vocabulary[data.CLS]
    sep = vocabulary[data.SEP]
    mask = vocabulary[data.MASK]
    for text in rows["text"]:
        sentences = data.split_sentences(text)
        for first, following in itertools.pairwise(sentences):
            second = following if random.random() < 0.5 else random.choice(sentences)
            a = tokenizer.encode(first, add_special_tokens=False).ids
            b = tokenizer.encode(second, add_special_tokens=False).ids
            half = LENGTH // 2 - 2
            ids = [cls, *a[:half], sep, *b[:half], sep]
            ids += [0] * (LENGTH - len(ids))
            labels = [data.IGNORED_LABEL] * LENGTH
            for column, token in enumerate(ids):
                if token not in (0, cls, sep) and random.random() < 0.15:
                    labels[column] = token
                    ids[column] = mask
            examples["input_ids"].append(ids)
            examples["mlm_labels"].append(labels)
    return examples


def up_front(documents: list[str], tokenizer: Tokenizer, folder: str) -> Iterator[dict]:
    """Yields, for more and more text, the seconds until the first batch and the bytes written for
    it: with all examples made before training, and with examples made on the fly.
    """
    for count, way in itertools.product((4, 8, 16, 32), ("up front", "on the fly")):
        part = documents[:count]
        place = f"{folder}/{count} {way}"
        started = time.perf_counter()
        if way == "up front":
            rows = datasets.Dataset.from_dict({"text": part})
            make = partial(make_examples, tokenizer=tokenizer)
            made = rows.map(make, batched=True, batch_size=4, remove_columns="text")
            made.save_to_disk(place)
            next(made.with_format("torch").iter(BATCH))
        else:
            corpus = data.tokenize_corpus(part, tokenizer, f"{place}/corpus")
            examples = data.PretrainDataset(corpus, tokenizer, LENGTH)
            data.collate([examples[i] for i in range(BATCH)], examples.padding_idx)
        seconds = round(time.perf_counter() - started, 2)
        files = [file for file in Path(place).rglob("*") if file.is_file()]
        yield {
            "way": way,
            "documents": count,
            "characters": sum(map(len, part)),
            "seconds": seconds,
            "bytes": sum(file.stat().st_size for file in files),
        }


# ---- A corpus in lists, and many workers -------------------------------------


def memory(
    documents: list[str], tokenizer: Tokenizer, folder: str, in_lists: bool = False
) -> Iterator[dict]:
    """Yields, every ten seconds, the memory of 16 workers that each prefetch 10 batches: the
    setting in which the author of the first version ran out of memory.

    KiB are proportional set sizes: a page shared by n processes counts 1/n in each. Even reading a
    Python object writes to it, because its reference count changes. So with a tenth of the examples
    in lists, each worker ends up with its own copy of every page.
    """
    corpus = data.tokenize_corpus(documents, tokenizer, f"{folder}/corpus")
    examples: Any = data.PretrainDataset(corpus, tokenizer, LENGTH)
    if in_lists:  # 8 bytes for each token, and 28 for the integer itself
        tenth = [examples[i] for i in range(len(examples) // 10)]
        examples = [{name: array.tolist() for name, array in row.items()} for row in tenth]
    else:
        gc.freeze()  # as train_pretrain.py does: the collector would copy pages into each worker
    loader = DataLoader(
        examples,
        BATCH,
        sampler=RandomSampler(examples, replacement=True, num_samples=10**9),
        collate_fn=partial(data.collate, padding_idx=0),
        num_workers=16,
        prefetch_factor=10,
    )
    started = time.perf_counter()
    shown = 0
    for batches, _ in enumerate(loader, 1):
        seconds = time.perf_counter() - started
        if seconds > shown + 10:
            shown += 10
            workers = [kib(worker.pid) for worker in multiprocessing.active_children()]
            yield {
                "seconds": shown,
                "batches": batches,
                "main_kib": kib(os.getpid()),
                "workers_kib": sum(workers),
            }


def kib(process: int | None) -> int:
    text = Path(f"/proc/{process}/smaps_rollup").read_text()
    return int(text.split("\nPss:")[1].split()[0])


MISTAKES: dict[str, Callable[..., Iterator[dict]]] = {
    "rate": rate,
    "up_front": up_front,
    "mapped": memory,
    "lists": partial(memory, in_lists=True),
}

# ---- The figure --------------------------------------------------------------


def draw() -> Any:
    figure = new_figure((11, 8))
    (rates, times), (sizes, tokenizers) = figure.subplots(2, 2)
    for learning_rate in (1e-2, 1e-3, 1e-4):
        lines = read_lines(FOLDER / "rate.jsonl", learning_rate=learning_rate)
        rates.plot(lines["step"], lines["mlm_loss"], label=f"learning rate {learning_rate:g}")
    entropy = lines["entropy_of_targets"][0]
    rates.axhline(entropy, color="black", linestyle=":", label="entropy of the targets")
    rates.set(xlabel="step", ylabel="MLM loss, nats", ylim=(0, 11), title="overfitting one sample")

    for way in ("up front", "on the fly"):
        lines = read_lines(FOLDER / "up_front.jsonl", way=way)
        times.plot(lines["characters"] / 1e6, lines["seconds"], "o-", label=way)
    times.set(xlabel="million characters", ylabel="seconds to the first batch")
    times.set_title("all examples first, or on the fly")

    for way, label in (("lists", "a tenth of the corpus in lists"), ("mapped", "all, mapped")):
        lines = read_lines(FOLDER / f"{way}.jsonl")
        total = (lines["main_kib"] + lines["workers_kib"]) / 1024
        sizes.plot(lines["seconds"], total, label=label)
    sizes.set(xlabel="seconds", ylabel="MiB, all processes", title="16 workers, prefetch 10")
    sizes.set_ylim(bottom=0)

    starts = ("its own tokenizer", "another tokenizer", "from scratch")
    colors = ("C2", "C1", "C0")
    for i, start in enumerate(starts):
        for j, model in enumerate(("6 layers", "mini")):
            lines = read_lines(FOLDER / "tokenizer.jsonl", model=model, start=start)
            mean = 100 * lines["accuracy"].mean()
            x = j + 0.3 * (i - 1)
            legend = None if j else start
            tokenizers.bar(x, mean, 0.27, color=colors[i], label=legend)
            tokenizers.text(x, mean + 0.3, f"{mean:.1f}", ha="center", fontsize=8)
    tokenizers.set_xticks((0, 1), ("6 layers, published", "mini, an afternoon"))
    tokenizers.set(
        ylim=(70, 95), ylabel="SST-2 dev accuracy, %", title="weights and their tokenizer"
    )
    for panel in (rates, times, sizes, tokenizers):
        panel.legend(fontsize=8)
    return figure


def main(mistake: str, corpus: str, vocabulary: str) -> None:
    documents = list(data.get_dataset(corpus)["text"])
    with tempfile.TemporaryDirectory() as folder:
        for line in MISTAKES[mistake](documents, data.load_tokenizer(vocabulary), folder):
            print(json.dumps(line), flush=True)


if __name__ == "__main__":
    if sys.argv[1:]:
        main(*sys.argv[1:])
    else:
        draw().savefig(HERE / "mistakes.png", dpi=110)
