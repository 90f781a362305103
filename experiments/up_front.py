"""All examples made before training, or on the fly: seconds and bytes until the first batch.

python -m experiments.up_front CORPUS VOCABULARY >> results/up_front.jsonl
"""

import random
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import datasets
from tokenizers import Tokenizer

import data
from experiments.lines import print_lines

LENGTH = 128


def transform(rows: dict, tokenizer: Tokenizer) -> dict:
    """Returns masked examples of whole documents, written as one writes it first: loops over
    sentences and tokens, in lists. Each sentence is paired with the next or with a random one.
    """
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
            for column, token in enumerate(ids):
                is_masked = token not in (cls, sep) and random.random() < 0.15
                labels.append(token if is_masked else data.IGNORED_LABEL)
                if is_masked and random.random() < 0.8:
                    ids[column] = mask
                elif is_masked and random.random() < 0.5:
                    ids[column] = random.choice(vocabulary)
            padding = LENGTH - len(ids)
            out["input_ids"].append(ids + [0] * padding)
            out["token_type_ids"].append([0] * (len(a) + 2) + [1] * (len(b) + 1) + [0] * padding)
            out["mlm_labels"].append(labels + [data.IGNORED_LABEL] * padding)
    return out


def up_front(corpus: str, vocabulary: str) -> Iterator[dict]:
    """Yields, for more and more text, the seconds until the first batch and the bytes that were
    made for it: with all examples made before training, and with examples made on the fly. All in
    one process.
    """
    random.seed(0)
    tokenizer = data.load_tokenizer(vocabulary)
    rows = data.get_dataset(corpus)
    for documents in (4, 8, 16, 32):
        part = rows.shuffle(seed=0).select(range(documents)).flatten_indices()
        part = datasets.Dataset.from_dict({"text": part["text"][:]})
        characters = sum(map(len, part["text"]))
        for way in ("up front", "on the fly"):
            with tempfile.TemporaryDirectory() as folder:
                started = time.perf_counter()
                if way == "up front":
                    rows_made = part.map(
                        transform, batched=True, batch_size=4, fn_kwargs={"tokenizer": tokenizer},
                        remove_columns="text", cache_file_name=f"{folder}/rows.arrow")  # fmt: skip
                    next(iter(rows_made.with_format("torch").iter(256)))
                else:
                    tokenized = data.tokenize_corpus(part["text"], tokenizer, f"{folder}/corpus")
                    examples = data.PretrainDataset(tokenized, tokenizer, LENGTH)
                    next(iter(data.get_split_dataloader(examples, 256, workers=0)))
                seconds = time.perf_counter() - started
                size = sum(made.stat().st_size for made in Path(folder).rglob("*"))
            yield {"way": way, "documents": documents, "characters": characters,
                   "seconds": round(seconds, 2), "bytes": size}  # fmt: skip


if __name__ == "__main__":
    print_lines(up_front(*sys.argv[1:]))
