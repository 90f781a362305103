"""The mistakes that the first version's author wrote down, made again and measured.

    python -m experiments.mistakes bigrams CORPUS VOCABULARY   >> results/bigrams.jsonl
    python -m experiments.mistakes trap CORPUS VOCABULARY      >> results/trap.jsonl
    python -m experiments.mistakes up_front CORPUS VOCABULARY  >> results/up_front.jsonl
    python -m experiments.mistakes tenth SST2_DIR OUT
    python -m experiments.mistakes wrong_tokenizer SST2_DIR MODEL OUT

The first three print lines of JSON, the others write OUT for train_sst2.py: SST-2 with a tenth of
its training sentences, and MODEL with another tokenizer.
"""

import json
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path


import datasets
import numpy as np
import torch
from tokenizers import Tokenizer

import data
from bert import BertConfig, BertPretrainModel
from train_pretrain import (
    PretrainLosses,
    add_gradients,
    evaluate,
    make_optimizer,
    to_device,
    update,
)

LENGTH = 128


def bigrams(corpus: str, vocabulary: str) -> Iterator[dict]:
    """Nats for each token of the validation split, by how often tokens, and pairs of neighbours,
    occur in the training split. Pairs that are rare give way to single tokens (Witten and Bell)."""
    tokenizer = data.load_tokenizer(vocabulary)
    size = tokenizer.get_vocab_size()
    train, held_out = (
        np.concatenate(data.get_corpus(corpus, split, tokenizer, processes=2).chunks)
        for split in ("train", "validation")
    )
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


def trap(corpus: str, vocabulary: str, size: str = "mini", steps: int = 300) -> Iterator[dict]:
    """One pair of segments, without dropout, at three learning rates."""
    tokenizer = data.load_tokenizer(vocabulary)
    examples = data.PretrainDataset(
        data.get_corpus(corpus, "validation", tokenizer, processes=2), tokenizer, LENGTH
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


def transform(rows: dict, tokenizer: Tokenizer) -> dict:
    """Finished examples of whole documents, the way one writes it first: a loop over sentences and
    tokens, in lists. Sentences are paired with the next or a random one, and masked."""
    out: dict[str, list] = {"input_ids": [], "token_type_ids": [], "mlm_labels": []}
    vocabulary = list(tokenizer.get_vocab().values())
    mask, cls, sep = (tokenizer.token_to_id(token) for token in (data.MASK, data.CLS, data.SEP))
    sentences = [data.split_sentences(text) for text in rows["text"]]
    for document in sentences:
        for i in range(len(document) - 1):
            other = document[i + 1]
            if random.random() < 0.5:
                other = random.choice(random.choice(sentences) or document)
            a = tokenizer.encode(document[i], add_special_tokens=False).ids[: LENGTH // 2 - 2]
            b = tokenizer.encode(other, add_special_tokens=False).ids[: LENGTH // 2 - 2]
            ids, labels = [cls, *a, sep, *b, sep], []
            for place, token in enumerate(ids):
                chosen = token not in (cls, sep) and random.random() < 0.15
                labels.append(token if chosen else data.IGNORED_LABEL)
                if chosen and random.random() < 0.8:
                    ids[place] = mask
                elif chosen and random.random() < 0.5:
                    ids[place] = random.choice(vocabulary)
            padding = LENGTH - len(ids)
            out["input_ids"].append(ids + [0] * padding)
            out["token_type_ids"].append([0] * (len(a) + 2) + [1] * (len(b) + 1) + [0] * padding)
            out["mlm_labels"].append(labels + [data.IGNORED_LABEL] * padding)
    return out


def up_front(corpus: str, vocabulary: str) -> Iterator[dict]:
    """Seconds until the first batch, and bytes of what was made for it, for more and more text:
    with all examples made before training, once, and with examples made on the fly. One process."""
    random.seed(0)
    tokenizer = data.load_tokenizer(vocabulary)
    rows = data.get_dataset(corpus)
    for number in (4, 8, 16, 32):
        part = rows.shuffle(seed=0).select(range(number)).flatten_indices()
        part = datasets.Dataset.from_dict({"text": part["text"][:]})
        characters = sum(map(len, part["text"]))
        for way in ("up front", "on the fly"):
            with tempfile.TemporaryDirectory() as folder:
                started = time.perf_counter()
                file = f"{folder}/rows.arrow"
                if way == "up front":
                    made = part.map(
                        transform, batched=True, batch_size=4, fn_kwargs={"tokenizer": tokenizer},
                        remove_columns="text", cache_file_name=file)  # fmt: skip
                    next(iter(made.with_format("torch").iter(256)))
                else:
                    tokenized = data.tokenize_dataset(part, tokenizer)
                    examples = data.PretrainDataset(
                        data.TokenizedCorpus(tokenized), tokenizer, LENGTH
                    )
                    next(iter(data.get_split_dataloader(examples, 256, workers=0)))
                    file = tokenized.cache_files[0]["filename"] if tokenized.cache_files else ""
                seconds = time.perf_counter() - started
                size = Path(file).stat().st_size if file else tokenized.data.nbytes
            yield {"way": way, "documents": number, "characters": characters,
                   "seconds": round(seconds, 2), "bytes": size}  # fmt: skip


def tenth(dataset: str, out: str) -> Iterator[dict]:
    """SST-2 with every tenth sentence of its training split, the same for every seed."""
    Path(out).mkdir()
    for split in ("train", "validation"):
        rows = data.get_dataset(dataset, split=split)
        if split == "train":
            rows = rows.select(range(0, len(rows), 10))
        rows.to_parquet(f"{out}/{split}.parquet")
        yield {"split": split, "rows": len(rows)}


def wrong_tokenizer(dataset: str, model: str, out: str) -> Iterator[dict]:
    """A model's folder with a vocabulary learned from SST-2 in place of its own: a tokenizer of the
    same kind, whose ids mean other words. Without the hash in config.json nothing notices."""
    shutil.copytree(model, out)
    config = json.loads((Path(out) / "config.json").read_text())
    texts, _ = data.get_reviews(dataset, "train")
    tokenizer = data.train_tokenizer(texts, config["vocab_size"])
    tokenizer.save(f"{out}/tokenizer.json")
    tokenizer.model.save(out)
    config.pop("tokenizer_hash", None)
    (Path(out) / "config.json").write_text(json.dumps(config, indent=2))
    own = data.load_tokenizer(model).get_vocab()
    same = sum(own.get(token) == i for token, i in tokenizer.get_vocab().items())
    yield {"tokens": tokenizer.get_vocab_size(), "with the same id": same}


if __name__ == "__main__":
    experiments = (bigrams, trap, up_front, tenth, wrong_tokenizer)
    chosen = {experiment.__name__: experiment for experiment in experiments}[sys.argv[1]]
    for line in chosen(*sys.argv[2:]):
        rounded = {k: round(v, 5) if isinstance(v, float) else v for k, v in line.items()}
        print(json.dumps(rounded), flush=True)
