"""Measures this project beside the libraries that it is built on or compared with.

    make bench
    python benchmarks/bench.py --corpus DIR --tokenizer vocab.txt     # real text

Contestants take turns in one process, on the same threads, and the ratio of their medians is what
to quote: single times drift with the machine. Prints a table, then the same as one line of JSON.
"""

import argparse
import itertools
import json
import os
import resource
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import datasets
import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
import data
from bert import BertConfig, BertPretrainModel
from train_pretrain import add_gradients, make_optimizer, to_device, update


def seconds(call: Callable[[], object]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def take_turns(contestants: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median seconds of each contestant, after one round that does not count."""
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for turn in range(rounds + 1):
        for name, call in contestants.items():
            taken = seconds(call)
            if turn:
                times[name].append(taken)
    return {name: statistics.median(values) for name, values in times.items()}


def tokenizing(corpus: datasets.Dataset, tokenizer) -> dict[str, float]:
    """Stage 1 in one process beside the tokenizer alone, on the same documents."""
    documents = list(corpus["text"][:: max(1, len(corpus) // 8)][:8])
    sentences = [s for text in documents for s in data.split_sentences(text)]
    tokens = sum(len(ids) for ids in data.encode_plain(tokenizer, sentences))
    rows = datasets.Dataset.from_dict({"text": documents})
    datasets.disable_caching()
    medians = take_turns(
        {
            "alone": lambda: [
                tokenizer.encode_batch_fast(sentences[i : i + 1000], add_special_tokens=False)
                for i in range(0, len(sentences), 1000)
            ],
            "stage 1": lambda: data.tokenize_dataset(rows, tokenizer),
        },
        rounds=5,
    )
    return {
        "tokenizer alone, tokens/s": tokens / medians["alone"],
        "stage 1, tokens/s": tokens / medians["stage 1"],
        "stage 1 / tokenizer alone": medians["alone"] / medians["stage 1"],
        "peak memory so far, MB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3,
    }


def batches(corpus: data.TokenizedCorpus, tokenizer) -> dict[str, float]:
    """Stage 2 in one thread: batches of 256 pairs of 128 tokens."""
    dataset = data.PretrainDataset(corpus, tokenizer, 128)
    numbers = itertools.islice(data.EpochSampler(len(dataset), 256, seed=0), 30)
    real, cells, times = 0, 0, []
    for batch_numbers in numbers:
        started = time.perf_counter()
        input_ids = dataset.__getitems__(batch_numbers)["input_ids"]
        times.append(time.perf_counter() - started)
        real += int((input_ids != 0).sum())
        cells += input_ids.numel()
    return {
        "batches, real tokens/s": real / len(times) / statistics.median(times),
        "padding": 1 - real / cells,
    }


def training_step(size: str, rows: int, dataset: data.PretrainDataset) -> dict[str, float]:
    """One step of AdamW beside transformers' BertForPreTraining: same weights, batch, optimizer."""
    import transformers

    vocab_size = int(dataset.replacements.max()) + 1
    ours = BertPretrainModel(BertConfig.named(size, vocab_size=vocab_size), 0).train()
    theirs = transformers.BertForPreTraining(
        transformers.BertConfig(
            vocab_size=vocab_size, hidden_size=ours.config.d_model,
            num_hidden_layers=ours.config.encoder_layers, num_attention_heads=ours.config.head_num,
            intermediate_size=ours.config.d_feed_forward, attn_implementation="sdpa",
        )
    ).train()  # fmt: skip
    batch = dataset.__getitems__(list(range(rows)))
    optimizers = [make_optimizer(model) for model in (ours, theirs)]

    def our_step() -> None:
        add_gradients(ours, [to_device(batch, torch.device("cpu"))])
        update(ours, optimizers[0], 1e-4)

    def their_step() -> None:
        theirs(
            batch["input_ids"], batch["input_ids"] != 0, batch["token_type_ids"],
            labels=batch["mlm_labels"], next_sentence_label=batch["nsp_labels"],
        ).loss.backward()  # fmt: skip
        update(theirs, optimizers[1], 1e-4)

    medians = take_turns({"ours": our_step, "theirs": their_step}, rounds=5)
    tokens = int((batch["input_ids"] != 0).sum())
    return {
        f"{size}, {rows} x 128, tokens/s": tokens / medians["ours"],
        f"{size}, {rows} x 128, times as fast as transformers": medians["theirs"] / medians["ours"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--corpus", default="sample")
    parser.add_argument("--tokenizer", help="learned from the corpus, if not given")
    options = parser.parse_args()
    rows = data.get_dataset(options.corpus)
    if options.tokenizer:
        tokenizer = data.load_tokenizer(options.tokenizer)
    else:
        tokenizer = data.train_tokenizer(rows["text"], 2000)
    corpus = data.get_corpus(options.corpus, "train", tokenizer)
    results = {"cores": os.cpu_count(), "torch": torch.__version__, **tokenizing(rows, tokenizer)}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    results |= batches(corpus, tokenizer)
    torch.set_num_threads(threads)
    vocabulary = {t: i for i, t in enumerate([*data.SPECIAL_TOKENS, *map(str, range(5, 30522))])}
    full = data.PretrainDataset(corpus, data.wordpiece(vocabulary), 128)  # V as published
    for size, number in (("mini", 16), ("base", 4)):
        results |= training_step(size, number, full)
    for name, value in results.items():
        print(f"{name:48} {value:,.3f}" if isinstance(value, float) else f"{name:48} {value}")
    print(
        json.dumps(
            {k: float(np.round(v, 4)) if isinstance(v, float) else v for k, v in results.items()}
        )
    )


if __name__ == "__main__":
    main()
