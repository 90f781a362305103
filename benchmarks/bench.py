"""Measures this project beside the libraries that it is built on or compared with.

    make bench
    python -m benchmarks.bench --corpus DIR --reviews DIR --tokenizer vocab.txt     # real text
    python -m benchmarks.bench --only mini epoch

Contestants take turns, and a ratio is the median over all rounds: single times drift with the
machine. Prints a table, then the same as one line of JSON. With a GPU, its part is added.
"""

import argparse
import itertools
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch.utils.checkpoint import checkpoint


import data
from bert import BertConfig, BertPretrainModel, SST2BertModel
from benchmarks.contest import contest
from support.devices import autocast, choose_precision, keep_freed_memory
from train_pretrain import (
    PretrainLosses,
    add_gradients,
    make_optimizer,
    to_device,
    update,
)
from train_sst2 import SST2Batches, encode_sentences, get_reviews

ROOT = Path(__file__).parents[1]
VOCABULARY = 30522
HOPPER = 989e12  # bfloat16 operations a second without sparsity, by the data sheet of H100 and H200


# ---- What a step is worth -----------------------------------------------------------------------


def useful_flops(config: BertConfig, lengths: list[int], masked: int) -> float:
    """Floating point operations that a training step cannot do without, for rows with so many real
    tokens: 2 for each weight and token in a matrix product, the scores of attention, the vocabulary
    at the masked positions only. The backward pass takes twice the forward one. [BERT] §3, Kaplan
    et al. 2020 (arXiv 2001.08361) §2.1
    """
    width, inner, heads = config.d_model, config.d_feed_forward, config.attention_d_k
    matrices = 4 * width * heads + 2 * width * inner
    layers = config.encoder_layers * sum(2 * n * (matrices + 2 * n * heads) for n in lengths)
    heads_of_pretraining = 2 * len(lengths) * (width**2 + 2 * width)
    vocabulary = 2 * masked * (width**2 + width * config.vocab_size)
    return 3.0 * (layers + heads_of_pretraining + vocabulary)


def row_lengths(rows: int, length: int) -> list[int]:
    """One row in four lacks its last fifth: 5% padding, as in batches of the books."""
    return [length - length // 5 * (i % 4 == 3) for i in range(rows)]


def masked_tokens(rows: int, length: int) -> int:
    return sum(round(0.15 * n) for n in row_lengths(rows, length))


def random_batch(rows: int, length: int, vocab_size: int = VOCABULARY) -> dict[str, torch.Tensor]:
    """As a PretrainDataset's; 15% of each row masked."""
    random = np.random.default_rng(0)
    input_ids = torch.zeros(rows, length, dtype=torch.int64)
    labels = torch.full((rows, length), data.IGNORED_LABEL)
    for i, n in enumerate(row_lengths(rows, length)):
        input_ids[i, :n] = torch.from_numpy(random.integers(5, vocab_size, n))
        places = random.choice(n, round(0.15 * n), replace=False)
        labels[i, places] = input_ids[i, places]
        input_ids[i, places] = 4
    return {
        "input_ids": input_ids,
        "token_type_ids": (torch.arange(length) >= length // 2).long().repeat(rows, 1),
        "mlm_labels": labels,
        "nsp_labels": torch.from_numpy(random.integers(0, 2, rows)),
    }


def their_model(config: BertConfig, kind: str = "BertForPreTraining") -> torch.nn.Module:
    """transformers', of the same size, with its faster attention."""
    import transformers

    sizes = {
        "vocab_size": config.vocab_size, "hidden_size": config.d_model,
        "num_hidden_layers": config.encoder_layers, "num_attention_heads": config.head_num,
        "intermediate_size": config.d_feed_forward,
        "max_position_embeddings": config.max_seq_length, "attn_implementation": "sdpa",
    }  # fmt: skip
    return getattr(transformers, kind)(transformers.BertConfig(**sizes))


def our_step(
    changes: dict, rows: int, length: int, device: str = "cpu", checkpointed: bool = False,
    compiled: bool = False, precision: str = "auto",
) -> Callable[[], None]:  # fmt: skip
    """As train_pretrain.py runs it, allocator and precision included."""
    keep_freed_memory()
    precision = choose_precision(precision, torch.device(device))
    torch.manual_seed(0)
    model = BertPretrainModel(BertConfig.named(**changes), 0).to(device).train()
    if checkpointed:
        for layer in model.bert.layers:  # as --checkpoint-activations does
            layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
    optimizer, batch = make_optimizer(model), random_batch(rows, length, model.config.vocab_size)
    if device == "cuda":  # as the DataLoader does
        batch = {name: tensor.pin_memory() for name, tensor in batch.items()}
    losses_of = PretrainLosses(model, precision)
    if compiled:
        losses_of = torch.compile(losses_of, fullgraph=True)

    def step() -> None:
        ready = [to_device(batch, torch.device(device))]
        add_gradients(losses_of, ready)
        update(model, optimizer, 1e-4)

    step.model = model  # type: ignore[attr-defined]  # for tests
    return step


def their_step(
    changes: dict, rows: int, length: int, device: str = "cpu", same_allocator: bool = False,
    compiled: bool = False, precision: str = "float32",
) -> Callable[[], None]:  # fmt: skip
    """transformers' BertForPreTraining, with our optimizer and batch; float32, default settings."""
    if same_allocator:
        keep_freed_memory()
    precision = choose_precision(precision, torch.device(device))
    torch.manual_seed(0)
    config = BertConfig.named(**changes)
    model = their_model(config).to(device).train()
    optimizer = make_optimizer(model)
    batch = random_batch(rows, length, config.vocab_size)
    if device == "cuda":
        batch = {name: tensor.pin_memory() for name, tensor in batch.items()}
    run = torch.compile(model) if compiled else model

    def step() -> None:
        here = {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}
        with autocast(precision, device):
            loss = run(
                here["input_ids"], here["input_ids"] != 0, here["token_type_ids"],
                labels=here["mlm_labels"], next_sentence_label=here["nsp_labels"],
            ).loss  # fmt: skip
        loss.backward()
        update(model, optimizer, 1e-4)

    step.model = model  # type: ignore[attr-defined]
    return step


PRODUCT = 2048  # the side of the matrices whose product is the machine's peak


def matrix_products() -> Callable[[], None]:
    """Ten, into memory that is there."""
    a, b, out = (torch.randn(PRODUCT, PRODUCT) for _ in range(3))

    def products() -> None:
        for _ in range(10):
            torch.mm(a, b, out=out)

    return products


def training_steps(size: str, rows: int, length: int, rounds: int) -> dict[str, float]:
    """A step beside transformers', and the float32 peak of the machine in the same rounds.

    Both with their default settings; both in float32 with the same allocator; and,
    where --precision auto is another one, both in that.
    """
    sizes = {"size": size, "vocab_size": VOCABULARY}
    auto = choose_precision("auto", torch.device("cpu"))
    found = contest(
        {
            "ours": (our_step, sizes, rows, length),
            "transformers": (their_step, sizes, rows, length),
            "peak": (matrix_products,),
        },
        rounds,
    )
    for precision in dict.fromkeys(["float32", auto]):
        same = ("cpu", True, False, precision)
        theirs = f"transformers, both {precision} with our allocator"
        pair = contest(
            {
                "ours": (our_step, sizes, rows, length, "cpu", False, False, precision),
                theirs: (their_step, sizes, rows, length, *same),
            },
            rounds,
        )
        found[theirs] = pair[theirs]
    peak = 10 * 2 * PRODUCT**3 / found.pop("peak")["seconds"]
    config = BertConfig.named(**sizes)
    flops = useful_flops(config, row_lengths(rows, length), masked_tokens(rows, length))
    what, tokens = f"{size}, {rows} x {length}", sum(row_lengths(rows, length))
    print(f"{what}: --precision auto is {auto}")
    results = {f"{what}: matrix product peak, GFLOP/s": peak / 1e9}
    for name, of in found.items():
        results[f"{what}: {name}, tokens/s"] = tokens / of["seconds"]
        results[f"{what}: {name}, share of the peak"] = flops / of["seconds"] / peak
        results[f"{what}: {name}, peak memory, MiB"] = of["MiB"]
        if name != "ours":
            results[f"{what}: times as fast as {name}"] = of["faster"]
    return results


def checkpointing(size: str, rows: int, length: int, rounds: int) -> dict[str, float]:
    """What --checkpoint-activations saves and costs."""
    sizes = {"size": size, "vocab_size": VOCABULARY}
    found = contest(
        {
            "kept": (our_step, sizes, rows, length),
            "checkpointed": (our_step, sizes, rows, length, "cpu", True),
        },
        rounds,
    )
    what = f"{size}, {rows} x {length}"
    return {
        f"{what}: activations kept, peak memory, MiB": found["kept"]["MiB"],
        f"{what}: activations checkpointed, peak memory, MiB": found["checkpointed"]["MiB"],
        f"{what}: activations checkpointed, times the seconds": found["checkpointed"]["faster"],
    }


# ---- SST-2 --------------------------------------------------------------------------------------

SENTENCES = 64 * 32  # one pool of lengths


def our_epoch(size: str, rows: list[list[int]], labels: list[int]) -> Callable[[], None]:
    """As train_sst2.py: batches of similar lengths."""
    keep_freed_memory()
    config = BertConfig.named(size, vocab_size=VOCABULARY, max_seq_length=128)
    model = SST2BertModel(config, 0).train()
    optimizer, batches = make_optimizer(model), SST2Batches(rows, labels, 32, seed=0)

    def epoch() -> None:
        for batch in batches:
            loss = torch.nn.functional.cross_entropy(model(batch["input_ids"]), batch["labels"])
            loss.backward()
            update(model, optimizer, 5e-5)

    return epoch


def their_epoch(
    size: str,
    rows: list[list[int]],
    labels: list[int],
    length: int | None,
    same_allocator: bool = False,
) -> Callable[[], None]:
    """Shuffled, each batch padded to its longest sentence or to `length`."""
    if same_allocator:
        keep_freed_memory()
    config = BertConfig.named(size, vocab_size=VOCABULARY, max_seq_length=128)
    model = their_model(config, "BertForSequenceClassification").train()
    optimizer, random = make_optimizer(model), np.random.default_rng(0)

    def epoch() -> None:
        for numbers in np.split(random.permutation(len(rows)), range(32, len(rows), 32)):
            longest = length or max(len(rows[i]) for i in numbers)
            input_ids = torch.zeros(len(numbers), longest, dtype=torch.int64)
            for place, i in enumerate(numbers):
                input_ids[place, : len(rows[i])] = torch.tensor(rows[i])
            label = torch.tensor([labels[i] for i in numbers])
            model(input_ids, (input_ids != 0).long(), labels=label).loss.backward()
            update(model, optimizer, 5e-5)

    return epoch


def sst2_epoch(reviews: str, tokenizer, size: str, rounds: int) -> dict[str, float]:
    """2,048 sentences, drawn from the training split."""
    texts, labels = get_reviews(reviews, "train")
    all_rows = encode_sentences(tokenizer, texts, 128)
    chosen = np.random.default_rng(0).choice(len(texts), SENTENCES, replace=len(texts) < SENTENCES)
    rows, labels = [all_rows[i] for i in chosen], [labels[i] for i in chosen]
    found = contest(
        {
            "ours": (our_epoch, size, rows, labels),
            "dynamic": (their_epoch, size, rows, labels, None),
            "same": (their_epoch, size, rows, labels, None, True),
            "to 128": (their_epoch, size, rows[: SENTENCES // 4], labels, 128),  # all cost the same
        },
        rounds,
        warm_up=1,
    )
    cells = sum(batch["input_ids"].numel() for batch in SST2Batches(rows, labels, 32, seed=0))
    what = f"SST-2, {size}"
    return {
        f"{what}: sentences/s": len(rows) / found["ours"]["seconds"],
        f"{what}: padding": 1 - sum(map(len, rows)) / cells,
        f"{what}: times as fast as transformers, dynamic padding": found["dynamic"]["faster"],
        f"{what}: times as fast as that with our allocator": found["same"]["faster"],
        f"{what}: times as fast as transformers, padded to 128": 4 * found["to 128"]["faster"],
    }


# ---- Data ---------------------------------------------------------------------------------------


def take_turns(contestants: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median seconds of each, in this process, after one round that does not count."""
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(rounds + 1):
        for name, call in contestants.items():
            started = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - started)
    return {name: statistics.median(values[1:]) for name, values in times.items()}


def tokenizing(documents: list[str], tokenizer) -> dict[str, float]:
    """Stage 1 in one process beside the tokenizer alone, on the same documents."""
    sentences = [s for text in documents for s in data.split_sentences(text)]
    tokens = sum(len(ids) for ids in data.encode_plain(tokenizer, sentences))

    def tokenize() -> None:
        with tempfile.TemporaryDirectory() as folder:
            data.tokenize_corpus(documents, tokenizer, f"{folder}/corpus")

    medians = take_turns(
        {
            "alone": lambda: [
                tokenizer.encode_batch_fast(sentences[i : i + 1000], add_special_tokens=False)
                for i in range(0, len(sentences), 1000)
            ],
            "stage 1": tokenize,
        },
        rounds=5,
    )
    return {
        "stage 1, tokens/s": tokens / medians["stage 1"],
        "stage 1 / tokenizer alone": medians["alone"] / medians["stage 1"],
    }


def batches(corpus: data.TokenizedCorpus, documents: list[str], tokenizer) -> dict[str, float]:
    """256 pairs of 128 tokens in one thread, collation included, beside a loop that tokenizes and
    masks on the fly."""
    import transformers

    dataset = data.PretrainDataset(corpus, tokenizer, 128)
    numbers = iter(data.EpochSampler(len(dataset), 256, seed=0))
    theirs = transformers.BertTokenizerFast(vocab=tokenizer.get_vocab())
    collate = transformers.DataCollatorForLanguageModeling(theirs, mlm_probability=0.15)
    words = " ".join(documents).split()
    texts = [" ".join(words[i : i + 120]) for i in range(0, min(len(words), 256 * 120), 120)]
    real = {"ours": [], "theirs": []}  # type: dict[str, list[int]]

    def ours() -> None:
        batch = dataset.batch(next(numbers))
        real["ours"].append(int((batch["input_ids"] != 0).sum()))

    def collated() -> None:
        rows = theirs(texts, truncation=True, max_length=128, return_special_tokens_mask=True)
        batch = collate([{k: v[i] for k, v in rows.items()} for i in range(len(texts))])
        real["theirs"].append(int((batch["input_ids"] != 0).sum()))

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    medians = take_turns({"ours": ours, "theirs": collated}, rounds=15)
    torch.set_num_threads(threads)
    rates = {name: statistics.mean(real[name]) / medians[name] for name in medians}
    cells = [dataset.batch(next(numbers))["input_ids"] for _ in range(20)]
    padding = sum(int((b == 0).sum()) for b in cells) / sum(b.numel() for b in cells)
    return {
        "batches, real tokens/s": rates["ours"],
        "batches, padding": padding,
        "batches, times as fast as tokenizer + DataCollator": rates["ours"] / rates["theirs"],
    }


def waiting(
    corpus: data.TokenizedCorpus, tokenizer, changes: dict, rows: int, length: int, device: str,
    steps: int = 60,
) -> dict[str, float]:  # fmt: skip
    """The share of a step in which it has no batch, with 2 workers; after as many steps as empty
    what they prepared before the first."""
    keep_freed_memory()
    dataset = data.PretrainDataset(corpus, tokenizer, length)
    loader = iter(data.get_split_dataloader(dataset, rows, workers=2))
    changes = {"vocab_size": max(tokenizer.get_vocab().values()) + 1, **changes}
    model = BertPretrainModel(BertConfig.named(**changes), 0).to(device).train()
    optimizer, here = make_optimizer(model), torch.device(device)
    losses_of = PretrainLosses(model, choose_precision("auto", here))
    waited, started = 0.0, time.perf_counter()
    for step in range(15 + steps):
        if step == 15:
            if device == "cuda":
                torch.cuda.synchronize()
            waited, started = 0.0, time.perf_counter()
        before = time.perf_counter()
        batch = next(loader)
        waited += time.perf_counter() - before
        add_gradients(losses_of, [to_device(batch, here)])
        update(model, optimizer, 1e-4)
    if device == "cuda":
        torch.cuda.synchronize()
    share = waited / (time.perf_counter() - started)
    return {f"{changes['size']}, {rows} x {length}: waiting for data, share of a step": share}


# ---- Whole commands -----------------------------------------------------------------------------


def to_first_step(arguments: list[str]) -> float:
    """Seconds from the command to the line of its first step."""
    with tempfile.TemporaryDirectory() as out:
        line = [sys.executable, str(ROOT / "train_pretrain.py"), *arguments, "--out", f"{out}/run"]
        started, metrics = time.perf_counter(), Path(out, "run", "metrics.jsonl")
        process = subprocess.Popen(line, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        while not (metrics.exists() and '"train"' in metrics.read_text()):
            if process.poll() is not None:
                raise RuntimeError(process.communicate()[1].decode())
            time.sleep(0.01)
        seconds = time.perf_counter() - started
        process.kill()
        process.wait()
    return seconds


def start_up(corpus: str, tokenizer: str | None) -> dict[str, float]:
    """Medians of three; the corpus has been tokenized before."""
    arguments = ["--dataset", corpus, "--batch-size", "16", "--steps", "1000"]
    if tokenizer:
        arguments += ["--tokenizer", tokenizer]
    to_first_step(arguments)
    commands = {
        "torch": [sys.executable, "-c", "import torch"],
        "help": [sys.executable, str(ROOT / "bert.py"), "--help"],
    }
    quiet = {"check": True, "stdout": subprocess.DEVNULL}
    medians = take_turns(
        {name: lambda line=line: subprocess.run(line, **quiet) for name, line in commands.items()},
        rounds=3,
    )
    return {
        "start to the first step, cached corpus, s": statistics.median(
            to_first_step(arguments) for _ in range(3)
        ),
        "import torch, s": medians["torch"],
        "bert.py --help beyond that, s": medians["help"] - medians["torch"],
    }


def two_processes(rounds: int = 2) -> dict[str, float]:
    """torchrun with two gloo processes beside one process, on the same cores: mini, 2 x 8 x 128 a
    step. Steps 5 to 20, by the run's own clock."""
    seconds: dict[int, list[float]] = {1: [], 2: []}
    threads = torch.get_num_threads()
    for _, number in itertools.product(range(rounds), seconds):
        with tempfile.TemporaryDirectory() as out:
            line = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
            line += [f"--nproc_per_node={number}", str(ROOT / "train_pretrain.py")]
            line += "--size mini --batch-size 8 --accumulate 2 --max-seq-length 128".split()
            line += "--steps 25 --log-every 5 --eval-batches 1 --workers 0 --device cpu".split()
            environment = {**os.environ, "OMP_NUM_THREADS": str(max(1, threads // number))}
            subprocess.run([*line, "--out", out], check=True, env=environment, capture_output=True)
            text = Path(out, "metrics.jsonl").read_text()
        at = {e["step"]: e["seconds"] for e in map(json.loads, text.splitlines()) if "nsp_loss" in e
              and e["split"] == "train"}  # fmt: skip
        seconds[number].append(at[20] - at[5])
    one, two = (statistics.median(values) for values in seconds.values())
    return {"one process / two gloo processes, seconds": one / two}


# ---- With a GPU ---------------------------------------------------------------------------------


def timed(step: Callable[[], None], steps: int, device: str) -> float:
    """Seconds a step; the GPU is waited for only before and after all of them."""
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    for _ in range(5):
        step()
    wait()
    started = time.perf_counter()
    for _ in range(steps):
        step()
    wait()
    return (time.perf_counter() - started) / steps


def gpu_steps(
    size: str, rows: int, length: int, device: str = "cuda", steps: int = 20, rounds: int = 3,
    compiled: tuple[bool, ...] = (False, True),
) -> dict[str, float]:  # fmt: skip
    """Eager and compiled, in bfloat16, beside transformers; on an H100 or H200 with MFU."""
    sizes = {"size": size, "vocab_size": VOCABULARY, "max_seq_length": max(length, 128)}
    makers = {"ours": our_step, "transformers": their_step}
    lengths = row_lengths(rows, length)
    flops = useful_flops(BertConfig.named(**sizes), lengths, masked_tokens(rows, length))
    contestants = {
        f"{name}{', compiled' * with_compiler}": make(
            sizes, rows, length, device, compiled=with_compiler, precision="auto"
        )
        for with_compiler in compiled
        for name, make in makers.items()
    }
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for _, (name, step) in itertools.product(range(rounds), contestants.items()):
        seconds[name].append(timed(step, steps, device))
    results = {}
    for name, values in seconds.items():
        median = statistics.median(values)
        what = f"{device}, {size}, {rows} x {length}: {name}"
        results[f"{what}, tokens/s"] = sum(lengths) / median
        if device == "cuda" and re.search("H[12]00", torch.cuda.get_device_name()):
            results[f"{what}, MFU"] = flops / median / HOPPER
    return results


# ---- All of it ----------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--corpus", default="sample")
    parser.add_argument("--reviews", default="sample")
    parser.add_argument("--tokenizer", help="learned from the corpus, if not given")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--only", nargs="+", help="names of parts")
    options = parser.parse_args()
    rows = data.get_dataset(options.corpus)
    if options.tokenizer:
        tokenizer = data.load_tokenizer(options.tokenizer)
    else:
        tokenizer = data.train_tokenizer(rows["text"], 2000)
    corpus = data.get_corpus(options.corpus, "train", tokenizer)
    documents = list(rows["text"][:: max(1, len(rows) // 8)][:8])
    rounds = options.rounds
    parts: dict[str, Callable[[], dict[str, float]]] = {
        "tokenizing": lambda: tokenizing(documents, tokenizer),
        "batches": lambda: batches(corpus, documents, tokenizer),
        "waiting": lambda: waiting(corpus, tokenizer, {"size": "mini"}, 16, 128, "cpu"),
        "start": lambda: start_up(options.corpus, options.tokenizer),
        "mini": lambda: training_steps("mini", 16, 128, rounds),
        "base": lambda: training_steps("base", 4, 128, rounds),
        "checkpointing": lambda: checkpointing("mini", 64, 128, max(1, rounds // 2)),
        "epoch": lambda: sst2_epoch(options.reviews, tokenizer, "mini", max(1, rounds // 2)),
        "processes": two_processes,
    }
    if torch.cuda.is_available():
        parts |= {
            "gpu-128": lambda: gpu_steps("base", 256, 128),
            "gpu-512": lambda: gpu_steps("base", 64, 512),
            "gpu-waiting": lambda: waiting(corpus, tokenizer, {"size": "base"}, 256, 128, "cuda"),
        }
    for name in options.only or ():
        if name not in parts:
            parser.error(f"--only {name}: the parts are {' '.join(parts)}")
    results: dict = {"cores": os.cpu_count(), "torch": torch.__version__}
    warnings.filterwarnings("ignore", "This DataLoader will create")
    for name, part in parts.items():
        if not options.only or name in options.only:
            found = part()
            results |= found
            for what, value in found.items():
                print(f"{what:68} {value:>12,.3f}", flush=True)
    print(json.dumps({k: round(v, 4) if isinstance(v, float) else v for k, v in results.items()}))


if __name__ == "__main__":
    main()
