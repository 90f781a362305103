"""A training step, and a data worker, beside those of transformers.

    make bench                                # a quarter of an hour on two cores, or on a GPU
    python -m experiments.speed >> experiments/speed.jsonl
    python -m experiments.speed draw                     # draws speed.png from these lines

Each contestant has a process of its own, so that no cache and no setting of the allocator helps
another. They take turns, and a ratio is the median over the rounds: single times drift with the
machine. All have the same batches, of the sample.
"""

import contextlib
import json
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import torch
from tokenizers import Tokenizer

import data
from bert import BertConfig, BertPretrainModel
from experiments.curves import HERE, new_figure, read_lines
from train_pretrain import (
    PretrainLosses,
    add_gradients,
    choose_device,
    choose_precision,
    count,
    keep_freed_memory,
    make_optimizer,
    to_device,
    update,
)

VOCAB_SIZE = 30522  # of the models, as the published ones have it; the sample's ids are smaller
LENGTH = 128
WORKER_ROWS = 256
ROUNDS = 7
SAMPLE = HERE.parent / "sample/corpus/train.jsonl"

Batch = dict[str, torch.Tensor]
Step = Callable[[], Any]

# ---- The contestants ---------------------------------------------------------


@dataclass
class Training:
    """A training step of a model of this size, and how it is run."""

    who: str
    size: str
    precision: Any = "auto"
    keeps_memory: bool = True  # instead of returning it to the system
    compiled: bool = False
    optimizer: Literal["adamw", "muon"] = "adamw"

    def __call__(self, batch: Batch) -> Step:
        """Returns the step, in the process that will run it."""
        if self.keeps_memory:
            keep_freed_memory()
        device = choose_device(None)
        if device.type == "cuda":
            batch = {name: tensor.pin_memory() for name, tensor in batch.items()}
        precision = choose_precision(self.precision, device)
        length = batch["input_ids"].shape[1]
        config = BertConfig.named(self.size, vocab_size=VOCAB_SIZE, max_seq_length=length)
        is_ours = self.who.startswith("ours")
        model = BertPretrainModel(config, 0) if is_ours else their_model(config)
        model.to(device).train()
        optimizer = make_optimizer(model, self.optimizer)
        run: Any = PretrainLosses(model, precision) if is_ours else model
        if self.compiled:
            run = torch.compile(run)

        def step() -> None:
            if is_ours:
                masked, pairs, _ = count([batch], model.padding_idx)
                add_gradients(run, [to_device(batch, device)], masked, pairs)
            else:
                add_their_gradients(run, batch, device, precision)
            update(model, optimizer, 1e-4)

        return step


def their_model(config: BertConfig) -> Any:
    import transformers

    sizes: dict[str, Any] = {
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_model,
        "num_hidden_layers": config.encoder_layers,
        "num_attention_heads": config.head_num,
        "intermediate_size": config.d_feed_forward,
        "max_position_embeddings": config.max_seq_length,
    }
    return transformers.BertForPreTraining(transformers.BertConfig(**sizes))


def add_their_gradients(model: Any, batch: Batch, device: torch.device, precision: str) -> None:
    here = {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}
    with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16"):
        output = model(
            here["input_ids"],
            here["input_ids"] != 0,
            here["token_type_ids"],
            labels=here["mlm_labels"],
            next_sentence_label=here["nsp_labels"],
        )
    output.loss.backward()


def our_worker(examples: data.PretrainDataset) -> Step:
    """Returns a step that makes a batch, in one thread, from a corpus that has been tokenized."""
    torch.set_num_threads(1)
    numbers = np.random.default_rng(0)
    return lambda: examples.batch(numbers.integers(len(examples), size=WORKER_ROWS).tolist())


def their_worker(tokenizer: Tokenizer, texts: list[str]) -> Step:
    """Returns a step that tokenizes and masks these texts in one thread."""
    import transformers

    torch.set_num_threads(1)
    special = {"pad_token": data.PAD, "mask_token": data.MASK}
    encode: Any = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)
    collate = transformers.DataCollatorForLanguageModeling(encode, mlm_probability=0.15)
    return lambda: collate([encode(text) for text in texts])


# ---- The contest -------------------------------------------------------------

STEP: list[Step] = []  # what this process runs


def prepare(make: Callable[..., Step], *arguments: Any) -> None:
    STEP.append(make(*arguments))


def seconds_of(steps: int) -> float:
    """Returns the seconds of a step. A GPU is waited for before the first and after the last."""
    wait = torch.cuda.synchronize if torch.cuda.is_initialized() else int
    wait()
    started = time.perf_counter()
    for _ in range(steps):
        STEP[0]()
    wait()
    return (time.perf_counter() - started) / steps


def contest(contestants: list[tuple], steps: int) -> Iterator[tuple[float, float]]:
    """Yields, for each contestant, the median seconds per step and how many times as fast the first
    contestant is. A contestant is a function that returns a step, followed by its arguments.
    """
    spawn = multiprocessing.get_context("spawn")
    with contextlib.ExitStack() as stack:
        processes = [
            stack.enter_context(ProcessPoolExecutor(1, spawn, prepare, contestant))
            for contestant in contestants
        ]
        for warm_up in [process.submit(seconds_of, 3) for process in processes]:
            warm_up.result()
        times: list[list[float]] = [[] for _ in contestants]
        for _ in range(ROUNDS):
            for process, seconds in zip(processes, times, strict=True):
                time.sleep(0.05)  # for threads that still spin
                seconds.append(process.submit(seconds_of, steps).result())
    for seconds in times:
        ratios = np.array(seconds) / np.array(times[0])
        yield float(np.median(seconds)), float(np.median(ratios))


def peers(size: str, compiled: bool) -> list[Training]:
    """Returns ours; transformers as it comes, and with our precision and memory; ours with Muon.
    Compiled, only ours and transformers with the same precision.
    """
    ours = Training("ours", size, compiled=compiled)
    as_it_comes = Training("transformers, as it comes", size, "float32", keeps_memory=False)
    same = Training("transformers, same precision", size, compiled=compiled)
    with_muon = Training("ours, with Muon", size, optimizer="muon")
    return [ours, same] if compiled else [ours, as_it_comes, same, with_muon]


def measure() -> Iterator[dict[str, Any]]:
    """Yields a line for each contestant."""
    trainings = [("mini", 16, False), ("base", 4, False)]  # size, rows, compiled
    steps = 1
    if torch.cuda.is_available():
        trainings = [("mini", 256, False), ("base", 64, False), ("base", 64, True)]
        steps = 20
    texts = list(read_lines(SAMPLE)["text"])
    tokenizer = data.train_tokenizer(texts, 2000)
    with tempfile.TemporaryDirectory() as folder:
        corpus = data.tokenize_corpus(texts, tokenizer, f"{folder}/corpus")
        examples = data.PretrainDataset(corpus, tokenizer, LENGTH)
        for size, rows, compiled in trainings:
            batch = examples.batch(range(rows))
            rivals = peers(size, compiled)
            found = contest([(rival, batch) for rival in rivals], steps)
            for rival, result in zip(rivals, found, strict=True):
                yield {**asdict(rival), **describe(batch, *result)}

        batch = examples.batch(range(WORKER_ROWS))
        labels = batch["mlm_labels"]
        ids = torch.where(labels == data.IGNORED_LABEL, batch["input_ids"], labels)
        theirs = (their_worker, tokenizer, tokenizer.decode_batch(ids.tolist()))
        found = contest([(our_worker, examples), theirs], steps)
        for who, result in zip(("ours", "transformers"), found, strict=True):
            yield {"who": who, "size": "data worker", **describe(batch, *result)}


def describe(batch: Batch, seconds: float, times_as_fast: float) -> dict[str, Any]:
    """Returns what a line says besides: the batch, the speed, and the machine."""
    rows, length = batch["input_ids"].shape
    real_tokens = (batch["input_ids"] != 0).sum().item()
    machine = f"{os.cpu_count()} cores, {torch.backends.cpu.get_cpu_capability()}"
    if torch.cuda.is_available():
        machine = torch.cuda.get_device_name()
    return {
        "batch": f"{rows} x {length}",
        "tokens_per_second": round(real_tokens / seconds),
        "times_as_fast": round(times_as_fast, 3),
        "auto": choose_precision("auto", choose_device(None)),
        "machine": machine,
        "torch": torch.__version__,
    }


# ---- The figure --------------------------------------------------------------


def draw() -> Any:
    """Draws how many times as fast as transformers each line says that ours is."""
    figure = new_figure((9, 5))
    axes = figure.subplots()
    recorded = (HERE / "speed.jsonl").read_text().splitlines()
    lines = [json.loads(line) for line in recorded]
    lines = [line for line in lines if "ours" not in line["who"]]
    names = []
    for i, line in enumerate(lines):
        ratio = line["times_as_fast"]
        axes.barh(i, ratio, color="C0" if line["auto"] == "float32" else "C2")
        axes.text(ratio + 0.05, i, f"{ratio:.2f}", va="center", fontsize=8)
        how = ", compiled" if line.get("compiled") else ""
        names.append(f"{line['size']}, {line['batch']}{how}: {line['who']}\n{line['machine']}")
    axes.set_yticks(range(len(names)), names, fontsize=7)
    axes.set_xlim(right=1.1 * max(line["times_as_fast"] for line in lines))
    axes.invert_yaxis()
    axes.axvline(1, color="black", linestyle=":")
    axes.set(xlabel="times as fast as transformers", title="blue: float32, green: bfloat16")
    return figure


if __name__ == "__main__":
    if sys.argv[1:] == ["draw"]:
        draw().savefig(HERE / "speed.png", dpi=110)
    else:
        for line in measure():
            print(json.dumps(line), flush=True)
