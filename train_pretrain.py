"""Pretrain BERT: masked language model + next sentence prediction.

    python train_pretrain.py                                      # the sample, on any machine
    python train_pretrain.py --dataset DIR --tokenizer vocab.txt --size base --out runs/base
    torchrun --nproc_per_node=4 train_pretrain.py --accumulate 4 ...   # as one process, but faster

Writes under --out: config.json (the options), metrics.jsonl (a line per log and evaluation; losses
in nats), checkpoints/, model/ (weights and tokenizer in the published format), curves.png. Killed
at any moment, a run resumes exactly with --resume.

[BERT] Devlin et al. 2018, arXiv 1810.04805. [Code] google-research/bert, commit eedf5716.
Dimensions: batch, seq, vocab, masked (all masked positions of a batch).
"""

import contextlib
import gc
import itertools
import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import data
from bert import (
    SIZES,
    BertConfig,
    BertPretrainModel,
    check_padding,
    fetch,
    is_tokenizer_of,
    tokenizer_hash,
)
from support.curves import draw_pretraining
from extras import streaming as stream
from support.command_line import LARGEST_SEED, LARGEST_SIZE, option, run_script
from support.devices import PRECISIONS, autocast, choose_device, choose_precision, keep_freed_memory
from support.folder import run_folder
from support.processes import first_process_first, join_processes, leave_group, total
from support.run import FiniteGuard, Run, set_seed

Batch = dict[str, Tensor]
MAY_CHANGE = {  # in a run that is resumed
    "out",
    "resume",
    "save_every",
    "export_steps",
    "workers",
    "device",
    "compile",
    "checkpoint_activations",
}


@dataclass
class PretrainOptions:
    out: str = option("runs/pretrain", "a new folder for all that the run writes")
    dataset: str = option("sample", "corpus: sample, a file, a directory or a hub id")
    dataset_name: str | None = option(None, "the corpus's configuration, where it has several")
    split: str = option("train", "the split to train on, or several: train+unsupervised")
    streaming: bool = option(False, "read the corpus as it comes, not tokenized once to disk")
    text_column: str = option("text", "the corpus's column of text")
    rows_per_document: int = option(
        1, "rows that make a document; > 1 for a sentence a row", 1, at_most=LARGEST_SIZE
    )
    tokenizer: str | None = option(None, "vocab.txt, tokenizer.json, directory or hub id")
    vocab_size: int = option(
        2000, "of the tokenizer that is learned without --tokenizer", 1, at_most=LARGEST_SIZE
    )
    weights: str | None = option(None, "directory of a model to start from")
    size: str = option("tiny", "published size, without --weights", choices=list(SIZES))
    max_seq_length: int = option(
        64, "tokens in a pair of segments, with [CLS] and two [SEP]", 5, at_most=LARGEST_SIZE
    )
    positions: int | None = option(
        None,
        "rows of the position table, for longer pairs later; as many as --max-seq-length",
        1,
        at_most=LARGEST_SIZE,
    )
    whole_word_masking: bool = option(False, "mask all the pieces of a word or none")
    batch_size: int = option(32, "pairs in a micro-batch", 1, at_most=LARGEST_SIZE)
    accumulate: int = option(1, "micro-batches in a step, dealt to the processes", 1)
    steps: int = option(4000, "updates of the weights; 0 only evaluates --weights", 0)
    warmup_steps: int | None = option(None, "steps of rising learning rate; a tenth of all", 0)
    learning_rate: float = option(1e-3, "peak; base and large need 1e-4", 0)
    dropout: float = option(
        0.1, "hidden and attention dropout; 0 suits less than an epoch or two", 0
    )
    precision: str = option(
        "auto", "of products of matrices; auto is the fastest here", choices=PRECISIONS
    )
    save_every: int = option(500, "steps between checkpoints", 1)
    export_steps: tuple[int, ...] = option((), "steps after which models/step-N is written", 0)
    resume: bool = option(False, "go on from the last checkpoint in --out")
    eval_every: int = option(250, "steps between evaluations", 1)
    eval_batches: int = option(16, "batches of an evaluation, at most", 1)
    log_every: int = option(10, "steps between lines of metrics.jsonl", 1)
    workers: int = option(2, "processes that prepare data", 0)
    seed: int = option(0, "of everything random", 0, at_most=LARGEST_SEED)
    compile: bool = option(False, "torch.compile: minutes at the start, then faster on a GPU")
    checkpoint_activations: bool = option(False, "compute layers twice instead of keeping them")
    device: str | None = option(None, "cpu or cuda; the GPU if there is one")


def matching_tokenizer(weights: str, tokenizer: str | None) -> Tokenizer:
    """Returns the tokenizer of the weights.

    Raises ValueError if it, or the one that is named, is not what they were trained with: ids would
    silently refer to different tokens, and accuracy would drop without an error.
    """
    directory = fetch(weights)
    own = data.load_tokenizer(directory)
    path = directory / "config.json"
    config = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    if own.get_vocab_size() > config.get("vocab_size", math.inf):
        raise ValueError(f"{weights}: more tokens than the {config['vocab_size']} of the weights")
    expected = config.get("tokenizer_hash", tokenizer_hash(own))  # only our own files have it
    for source in (tokenizer or directory, directory):
        if not is_tokenizer_of(data.load_tokenizer(source), expected):
            raise ValueError(f"the tokenizer {source} is not the one {weights} was trained with")
    return own


def learning_rate(step: int, peak: float, warmup: int, steps: int) -> float:
    """Returns the learning rate of a step in 0 .. steps - 1: linear warmup to the peak, then linear
    decay towards 0. [BERT] A.2.

    Warmup, because Adam's first estimates of the moments are poor, and because the gradients of a
    post-LN model are large at the start. A rate that is too large is a trap: at 1e-2 even a single
    sample is not learned. The loss stays at ln n for n masked tokens, with the same token predicted
    everywhere, because the first huge steps leave every position with the same hidden state.

    Differs: [Code]'s first step has learning rate 0, and so changes nothing.
    """
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * (steps - step) / (steps - warmup)


def make_optimizer(model: nn.Module) -> torch.optim.AdamW:
    """Returns AdamW with weight decay 0.01. [BERT] A.2; eps is that of [Code] optimization.py.

    Biases and the weights of norms do not decay: nothing is gained if they are near 0.
    Differs: [Code] has no bias correction of the moments.
    """
    named = list(model.named_parameters())
    spared = [p for name, p in named if name.endswith("bias") or "norm" in name]
    decayed = [p for name, p in named if not (name.endswith("bias") or "norm" in name)]
    groups = [{"params": decayed, "weight_decay": 0.01}, {"params": spared, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.999), eps=1e-6, fused=True)


def update(model: nn.Module, optimizer: torch.optim.Optimizer, rate: float) -> Tensor:
    """Clips the accumulated gradients to norm 1 ([Code]), takes one step and zeroes them.

    Returns the norm before clipping, (). If it is not finite, the step is skipped: fused AdamW
    reads `found_inf` on the device, so the CPU need not wait for the norm.
    """
    norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.found_inf = (~norm.isfinite()).float()  # type: ignore[attr-defined]
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm


def to_device(batch: Batch, device: torch.device) -> Batch:
    """Returns the batch on a device, with `positions` and `mlm_targets` of its masked tokens, both
    int64 (masked,); positions count through all rows.

    They are found on the CPU: on a GPU, `nonzero()` would force a synchronisation. Pinned memory is
    copied while the GPU computes.
    """
    labels = batch["mlm_labels"].flatten()
    positions = (labels != data.IGNORED_LABEL).nonzero().flatten()
    batch = {**batch, "positions": positions, "mlm_targets": labels[positions]}
    pin = Tensor.pin_memory if device.type == "cuda" else Tensor.contiguous
    return {name: pin(tensor).to(device, non_blocking=True) for name, tensor in batch.items()}


def forward(
    model: BertPretrainModel, batch: Batch, precision: str = "float32"
) -> tuple[Tensor, Tensor]:
    """Returns mlm_logits (masked, vocab) and nsp_logits (batch, 2), computed in this precision.

    Losses need more digits than bfloat16 has, so its logits become float32.
    """
    with autocast(precision, batch["input_ids"].device.type):
        mlm_logits, nsp_logits = model(
            batch["input_ids"], batch["token_type_ids"], positions=batch["positions"]
        )
    if precision == "bfloat16":
        mlm_logits, nsp_logits = mlm_logits.float(), nsp_logits.float()
    return mlm_logits, nsp_logits


def sum_losses(
    model: BertPretrainModel, batch: Batch, precision: str = "float32"
) -> tuple[Tensor, Tensor]:
    """Returns two losses in nats: summed over the batch's masked positions, and over its pairs."""
    mlm_logits, nsp_logits = forward(model, batch, precision)
    return (
        F.cross_entropy(mlm_logits, batch["mlm_targets"], reduction="sum"),
        F.cross_entropy(nsp_logits, batch["nsp_labels"], reduction="sum"),
    )


class PretrainLosses(nn.Module):
    """Computes both losses of a batch, as a module: it can be compiled, and then be wrapped in
    DistributedDataParallel, which averages the gradients of all ranks during `backward`.
    """

    def __init__(self, model: BertPretrainModel, precision: str = "float32") -> None:
        super().__init__()
        self.model, self.precision = model, precision

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        return sum_losses(self.model, batch, self.precision)


def add_gradients(
    losses_of: Callable, batches: list[Batch], seeds: Sequence[Sequence[int]] = ()
) -> Tensor:
    """Accumulates the gradient of a step over this rank's micro-batches. [BERT] A.2.

    losses_of: `PretrainLosses`, maybe compiled, maybe in DistributedDataParallel; seeds: of each
    micro-batch's dropout. Returns what these micro-batches add to the step's losses, (2,), in nats.

    The loss of a step is the mean over all its masked tokens plus the mean over all its pairs. A
    mean of the micro-batches' means would be another loss: their numbers of masked tokens differ.
    So each sum is divided by the count of the whole step, over all micro-batches of all ranks.
    """
    wrapped = losses_of if isinstance(losses_of, DistributedDataParallel) else None
    ranks = dist.get_world_size() if wrapped else 1
    masked, pairs = total(
        sum(len(batch["positions"]) for batch in batches),
        sum(len(batch["nsp_labels"]) for batch in batches),
    )
    losses = []
    for i, batch in enumerate(batches):
        if seeds:
            set_seed(*seeds[i])
        is_last = i + 1 == len(batches)
        # Gradients travel between the ranks once a step, with the last micro-batch.
        with contextlib.nullcontext() if wrapped is None or is_last else wrapped.no_sync():
            mlm_sum, nsp_sum = losses_of(batch)
            loss = torch.stack([mlm_sum / masked, nsp_sum / pairs])
            # DistributedDataParallel divides by the number of ranks; the step's loss is a sum.
            (loss.sum() * ranks).backward()
        losses.append(loss.detach())
    return torch.stack(losses).sum(dim=0)


@torch.no_grad()
def evaluate(
    model: BertPretrainModel, batches: Iterable[Batch], precision: str = "float32"
) -> dict[str, float]:
    """Returns metrics, means over all masked tokens and all pairs of the batches.

    Losses are in nats; perplexity is exp(MLM loss) alone. `commonest_prediction` is the share of
    masked positions that get the most frequent prediction: 1.0 where the model predicts the same
    token everywhere.
    """
    model.eval()
    sums, predicted = np.zeros(6), []
    for batch in batches:
        mlm_logits, nsp_logits = forward(model, batch, precision)
        targets, labels = batch["mlm_targets"], batch["nsp_labels"]
        predicted.append(mlm_logits.argmax(dim=-1))
        sums += [
            F.cross_entropy(mlm_logits, targets, reduction="sum").item(),
            (predicted[-1] == targets).sum().item(),
            len(targets),
            F.cross_entropy(nsp_logits, labels, reduction="sum").item(),
            (nsp_logits.argmax(dim=-1) == labels).sum().item(),
            len(labels),
        ]
    model.train()
    mlm_loss, mlm_correct, masked, nsp_loss, nsp_correct, pairs = sums
    return {
        "mlm_loss": mlm_loss / masked,
        "perplexity": float(np.exp(mlm_loss / masked)),
        "mlm_accuracy": mlm_correct / masked,
        "nsp_loss": nsp_loss / pairs,
        "nsp_accuracy": nsp_correct / pairs,
        "commonest_prediction": torch.cat(predicted).bincount().max().item() / masked,
    }


@torch.no_grad()
def probe(
    model: BertPretrainModel, batch: Batch, tokenizer: Tokenizer, precision: str = "float32"
) -> str:
    """Returns what the model makes of the batch's first pair, to read."""
    length = batch["input_ids"].size(1)
    mine = batch["positions"] < length  # positions count through the rows
    predicted = forward(model.eval(), batch, precision)[0].argmax(dim=-1)
    model.train()
    row = batch["input_ids"][0]
    ids = {
        "Input": row[row != model.padding_idx],
        "Target": batch["mlm_targets"][mine],
        "Predicted": predicted[mine],
    }
    tokens = {name: [str(tokenizer.id_to_token(i)) for i in row] for name, row in ids.items()}
    return "\n".join(f"{name} Tokens: {'|'.join(row)}" for name, row in tokens.items())


def load_tokenizer(options: PretrainOptions) -> Tokenizer:
    """Returns the tokenizer of --weights, of --tokenizer, or one learned from the corpus."""
    if options.weights:
        return matching_tokenizer(options.weights, options.tokenizer)
    if options.tokenizer:
        return data.load_tokenizer(options.tokenizer)
    if options.streaming:
        raise ValueError("--streaming needs a --tokenizer: none can be learned from a stream")
    texts = stream.read_texts(
        options.dataset, options.dataset_name, options.text_column, options.split
    )
    return data.train_tokenizer(texts, options.vocab_size)


def load_corpora(
    options: PretrainOptions,
    tokenizer: Tokenizer,
    splits: Sequence[str] = ("train", "validation"),
) -> dict:
    """Returns the corpus of each split; with --streaming, the rows to read for "train"."""
    if options.streaming:
        rows, texts = stream.open_stream(
            options.dataset,
            options.dataset_name,
            options.text_column,
            options.rows_per_document,
            options.split,
        )
        return {"train": rows, "validation": stream.tokenized(texts, 0, tokenizer)}
    return {
        split: data.get_corpus(
            options.dataset,
            split,
            tokenizer,
            options.dataset_name,
            options.split,
            text_column=options.text_column,
            processes=options.workers or None,
            rows_per_document=options.rows_per_document,
        )
        for split in splits
    }


def make_model(options: PretrainOptions, tokenizer: Tokenizer) -> BertPretrainModel:
    """Returns the model of --weights, or a new one with the initial weights of torch's seed.

    Position embeddings are learned, so a pair cannot be longer than the position table, and rows
    beyond --max-seq-length learn nothing until a later run with longer pairs. [BERT] A.2 trains so:
    900,000 steps of 128 tokens, then 100,000 of 512.
    """
    dropouts = {"dropout": options.dropout, "attention_dropout": options.dropout}
    if options.weights:
        model = BertPretrainModel.from_pretrained(options.weights, **dropouts)
        positions = model.config.max_seq_length
        if options.positions not in (None, positions):
            raise ValueError(f"--positions {options.positions}, but the weights have {positions}")
        if options.max_seq_length > positions:
            raise ValueError(
                f"--max-seq-length {options.max_seq_length} exceeds the weights' {positions}"
                " positions"
            )
    else:
        positions = options.positions or options.max_seq_length
        if options.max_seq_length > positions:
            raise ValueError(
                f"--max-seq-length {options.max_seq_length} exceeds --positions {positions}"
            )
        config = BertConfig.named(
            options.size,
            vocab_size=max(tokenizer.get_vocab().values()) + 1,
            max_seq_length=positions,
            **dropouts,
        )
        model = BertPretrainModel(config, tokenizer.get_vocab()[data.PAD])
    check_padding(model, tokenizer)
    if options.checkpoint_activations:  # of a layer, only what goes in is kept for the backward
        for layer in model.bert.layers:
            layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
    return model


def example_options(options: PretrainOptions) -> tuple[int, int, bool]:
    return options.max_seq_length, options.seed, options.whole_word_masking


def make_validation(
    options: PretrainOptions,
    corpus: data.TokenizedCorpus,
    tokenizer: Tokenizer,
    device: torch.device,
) -> list[Batch]:
    """Returns the batches of every evaluation, always the same ones."""
    dataset = data.PretrainDataset(corpus, tokenizer, *example_options(options))
    number = min(options.eval_batches, math.ceil(len(dataset) / options.batch_size))
    loader = data.get_split_dataloader(dataset, options.batch_size, workers=0)
    return [to_device(batch, device) for batch in itertools.islice(loader, number)]


def make_batches(
    options: PretrainOptions, corpus: Any, tokenizer: Tokenizer, run: Run, progress: dict
) -> Iterator[Batch]:
    """Yields this rank's batches, from the run's step on; of a stream, from its `progress` on."""
    gc.freeze()  # or workers' garbage collection would touch, and so copy, all pages they share
    if options.streaming:
        loader = stream.get_stream_dataloader(
            corpus,
            options.text_column,
            progress,
            run.rank,
            run.world_size,
            tokenizer=tokenizer,
            batch_size=options.batch_size,
            examples=example_options(options),
        )
    else:
        dataset = data.PretrainDataset(corpus, tokenizer, *example_options(options))
        start = run.step * options.accumulate // run.world_size
        loader = data.get_split_dataloader(
            dataset, options.batch_size, start, run.rank, run.world_size, options.workers
        )
    loader.worker_init_fn = leave_group
    return stream.take(loader, progress) if options.streaming else iter(loader)


def train(
    options: PretrainOptions,
    run: Run,
    model: BertPretrainModel,
    optimizer: torch.optim.Optimizer,
    batches: Iterator[Batch],
    progress: dict,
    report: Callable[[int], None],
    export: Callable[[int], None],
) -> None:
    """Takes all steps from the run's on. `progress`: of a stream, kept with each checkpoint.

    `report` evaluates and `export` writes the model as of a step; the first rank calls them.
    """
    device, share = model.nsp.weight.device, options.accumulate // run.world_size
    losses_of: Any = PretrainLosses(model, options.precision)
    if options.compile:
        losses_of = torch.compile(losses_of, fullgraph=True)
    if dist.is_initialized():
        losses_of = DistributedDataParallel(losses_of)
    guard = FiniteGuard(device)
    warmup = options.steps // 10 if options.warmup_steps is None else options.warmup_steps

    for step in range(run.step, options.steps + 1):
        # Save, export, evaluate: the model after `step` updates. A checkpoint of step 0 comes
        # first, so that a run can be resumed from its beginning on.
        is_last, stop = step == options.steps, run.asked_to_stop()
        is_due = step == 0 or step % options.save_every == 0
        if step > run.saved_step and (is_due or is_last or stop):
            guard.check(model)
            run.save(step, progress, model=model, optimizer=optimizer)
        if run.rank == 0 and (stop or step in options.export_steps):
            guard.check(model)
            export(step)
        if stop:
            run.stop(step)
        if is_last or step % options.eval_every == 0:
            guard.check()
            if run.rank == 0:
                report(step)
        if is_last:
            break

        # This rank's micro-batches of the step.
        micro_batches = [next(batches) for _ in range(share)]
        real = (int((b["input_ids"] != model.padding_idx).sum()) for b in micro_batches)
        run.tokens += sum(total(*real))
        seeds = [(options.seed, step, run.rank + i * run.world_size) for i in range(share)]
        ready = [to_device(batch, device) for batch in micro_batches]

        losses = add_gradients(losses_of, ready, seeds)
        rate = learning_rate(step, options.learning_rate, warmup, options.steps)
        norm = update(model, optimizer, rate)
        guard.note(step, norm)

        run.bar.update()
        if step % options.log_every == 0 or step + 1 == options.steps:  # else no wait for a GPU
            guard.check()
            mlm_loss, nsp_loss = run.add_up(losses)
            run.write("train", step, learning_rate=rate, mlm_loss=mlm_loss, nsp_loss=nsp_loss)
            run.show(f"loss {mlm_loss + nsp_loss:.3f}")


def evaluate_weights(options: PretrainOptions, device: torch.device) -> None:
    """Prints the metrics of --weights on the validation split, and writes nothing."""
    if not options.weights:
        raise ValueError("--steps 0 evaluates a saved model: name it with --weights")
    tokenizer = load_tokenizer(options)
    (corpus,) = load_corpora(options, tokenizer, ["validation"]).values()
    model = make_model(options, tokenizer).to(device)
    validation = make_validation(options, corpus, tokenizer, device)
    metrics = evaluate(model, validation, options.precision)
    pairs = sum(len(batch["nsp_labels"]) for batch in validation)
    print(f"{options.weights}, {pairs} pairs of the validation split, {options.precision}")
    for name, value in metrics.items():
        print(f"{name:<21}{value:.4f}")


def check_steps(options: PretrainOptions) -> None:
    """Raises ValueError if a step that is named comes after the last one."""
    late = [step for step in options.export_steps if step > options.steps]
    if late:
        raise ValueError(
            f"--export-steps {late[0]} comes after the last of --steps {options.steps}"
        )
    warmup = options.warmup_steps or 0
    if warmup > options.steps > 0:
        raise ValueError(f"--warmup-steps {warmup} is more than --steps {options.steps}")


def pretrain(options: PretrainOptions) -> None:
    """Pretrains a model, or evaluates one with --steps 0; the whole of this script."""
    rank, world_size = join_processes(options.device)
    if options.accumulate % world_size:
        raise ValueError(f"--accumulate {options.accumulate} is no multiple of {world_size} ranks")
    check_steps(options)
    device = choose_device(options.device)
    options = replace(options, precision=choose_precision(options.precision, device))
    if options.steps == 0:
        evaluate_weights(options, device)
        return
    keep_freed_memory()
    with run_folder(options, rank) as out:
        run_pretraining(options, out, device, rank, world_size)


def run_pretraining(
    options: PretrainOptions, out: Path, device: torch.device, rank: int, world_size: int
) -> None:
    """Prepares corpus, model and run, trains, and writes the model. Every rank does so."""
    torch.manual_seed(options.seed)
    with first_process_first(rank):  # it tokenizes, the others find that done
        tokenizer = load_tokenizer(options)
        corpora = load_corpora(options, tokenizer)
    model = make_model(options, tokenizer).to(device).train()
    optimizer = make_optimizer(model)
    validation = make_validation(options, corpora["validation"], tokenizer, device)
    known = corpora["validation" if options.streaming else "train"]
    baselines = {
        "ln_vocab_size": math.log(model.config.vocab_size),
        "unigram_entropy": known.unigram_entropy(),
    }
    identity = {name: v for name, v in asdict(options).items() if name not in MAY_CHANGE}
    identity |= {
        "tokenizer_hash": tokenizer_hash(tokenizer),
        "corpus_checksum": known.checksum(),
        **baselines,
    }
    if options.streaming:  # of the rest of a stream nothing is known before it has been read
        identity["shards"] = corpora["train"].num_shards
    run = Run(out, rank, world_size, options.steps, identity)
    readers = options.workers if options.streaming else 0  # map-style batches need no memory
    streams = [stream.new_state(readers) for _ in range(world_size)]
    if options.resume:
        streams = stream.same_readers(run.resume(model=model, optimizer=optimizer), streams)
    run.begin(options)
    if rank == 0:
        print(stream.describe(corpora), *(f"{k} {v:.3f} nats" for k, v in baselines.items()))
        print(f"precision {options.precision}, dropout {options.dropout:g}")

    def report(step: int) -> None:
        metrics = evaluate(model, validation, options.precision)
        run.write("validation", step, **metrics, **baselines)
        shown = "  ".join(f"{name} {value:.3f}" for name, value in metrics.items())
        example = probe(model, validation[0], tokenizer, options.precision)
        run.bar.write(f"step {step}  {shown}\n{example}")

    def export(step: int) -> None:
        model.save_pretrained(out / "models" / f"step-{step}", tokenizer)

    batches = make_batches(options, corpora["train"], tokenizer, run, streams[rank])
    train(options, run, model, optimizer, batches, streams[rank], report, export)
    if rank == 0:
        model.save_pretrained(out / "model", tokenizer)
        draw_pretraining(out)
    run.end()


if __name__ == "__main__":
    run_script(pretrain, PretrainOptions)
