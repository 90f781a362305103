# SPDX-License-Identifier: MIT
# From "BERT in four files", copyright (c) 2026 the bert-in-four-files authors.
"""Pretrain BERT: masked language model + next sentence prediction.

    python train_pretrain.py                                      # the sample, on a laptop
    python train_pretrain.py --dataset DIR --tokenizer vocab.txt --size base \
        --learning-rate 1e-4 --accumulate 4 --out runs/base
    torchrun --nproc_per_node=4 train_pretrain.py --accumulate 4 ...    # on 4 GPUs, the same steps

Writes into the folder --out:
    config.json    the options
    metrics.jsonl  a line for every log and every evaluation; losses in nats. "step": N means after
                   N updates; a training line has the loss that update N was computed from
    checkpoint.pt  the latest checkpoint: --resume continues from there
    model/         at the end, weights and tokenizer in the published format
    curves.png     losses and accuracies over the steps, if matplotlib is there
(.lock, and what ends in .unfinished or .before, are for the run itself.)

The loop is `train`, which shows a training step in order. Above it are the parts of a step (loss,
learning rate, gradients, update). Below it are evaluation, the preparation of a run, and (to be
skipped at first) how a run is saved, resumed and stopped.

[BERT] Devlin et al. 2018, arXiv 1810.04805. [Code] google-research/bert, commit eedf5716.
Dimensions: batch, seq, vocab, and masked (all masked tokens of a batch).
"""

import contextlib
import ctypes
import fcntl
import gc
import itertools
import json
import math
import multiprocessing
import os
import re
import shutil
import signal
import sys
import time
import traceback
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import tyro
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import data
from bert import BertConfig, BertPretrainModel, check_tokenizer, fetch

Batch = dict[str, Tensor]
Precision = Literal["auto", "float32", "medium", "bfloat16"]

EVALUATION_BATCHES = 16  # of the validation part, in a fixed random order

# ---- Options -----------------------------------------------------------------


@dataclass
class PretrainOptions:
    """Pretrains BERT: masked language model + next sentence prediction."""

    # The run
    out: str = "runs/pretrain"
    """Folder of the run: a new one, or with --resume that of the stopped run."""
    resume: bool = False
    """Resume from the last checkpoint in --out. Give the other options again: most of them must be
    the same, including --steps."""
    steps: int = 4000
    """Updates of the weights. With 0, the model is evaluated and written, but not trained."""
    seed: int = 0
    """Seed for everything random."""

    # The corpus
    dataset: str = "sample"
    """Corpus: sample, a file, a directory, or a hub id."""
    dataset_name: str | None = None
    """Configuration of the corpus, if a hub id has several."""
    split: str = "train"
    """Split to train on, or several: train+unsupervised."""
    text_column: str = "text"
    """Column of the corpus that holds its text."""
    rows_per_document: int = 1
    """Rows to join into one document: > 1 for a corpus with a sentence per row."""
    streaming: bool = False
    """Read the corpus without storing it, instead of tokenizing it once to disk."""
    tokenizer: str | None = None
    """vocab.txt, tokenizer.json, directory or hub id. Not allowed with --weights, which bring
    their own. Without either, one is learned, for lowercased text without accents."""
    vocab_size: int = 2000
    """Size of the vocabulary that is learned without --tokenizer or --weights."""

    # The examples
    max_seq_length: int = 64
    """Tokens in an example: two segments, [CLS] and two [SEP]."""
    whole_word_masking: bool = False
    """Mask all pieces of a word or none."""
    batch_size: int = 32
    """Examples in a micro-batch."""
    accumulate: int = 1
    """Micro-batches in a step, of all ranks together."""
    workers: int = 2
    """Processes per rank that prepare batches."""

    # The model
    weights: str | None = None
    """Directory or hub id of a model to start from. Without it, a new model of --size."""
    size: Literal["tiny", "mini", "small", "medium", "base", "large"] = "tiny"
    """Published size of a new model."""
    positions: int | None = None
    """Rows of the position table of a new model, for longer examples in a later run. By default
    --max-seq-length."""
    dropout: float = 0.1
    """Dropout of hidden states and of attention. 0 suits a corpus that is seen once or twice."""

    # The optimizer
    optimizer: Literal["adamw", "muon"] = "adamw"
    """muon: Muon for the matrices of the encoder layers, AdamW for the rest."""
    learning_rate: float = 1e-3
    """Peak learning rate. base and large need 1e-4."""
    warmup_steps: int | None = None
    """Steps in which the learning rate rises. By default a tenth of --steps; [BERT] has a
    hundredth."""

    # What is written, and when
    log_every: int = 10
    """Steps between two training lines in metrics.jsonl."""
    eval_every: int = 250
    """Steps between two evaluations."""
    save_every: int = 500
    """Steps between two checkpoints."""

    # The machine
    device: str | None = None
    """cpu, cuda or cuda:N. By default the GPU if there is one."""
    precision: Precision = "auto"
    """Precision of matrix products. auto chooses the fastest here."""
    compile: bool = False
    """Use torch.compile: minutes at the start, then faster on a GPU."""

    def __post_init__(self) -> None:
        check_options(self)
        check_smallest(self, 0, "steps", "workers", "seed")
        check_smallest(self, 1, "rows_per_document", "vocab_size", "batch_size", "accumulate")
        check_smallest(self, 1, "log_every", "eval_every", "save_every")
        check_smallest(self, 5, "max_seq_length")  # [CLS] a [SEP] b [SEP]
        if self.positions is not None:
            check_smallest(self, self.max_seq_length, "positions")
        if self.streaming and self.tokenizer is None and self.weights is None:
            raise ValueError("--streaming needs a --tokenizer: none can be learned from a stream")
        if not 0 <= self.warmup <= self.steps:
            raise ValueError(f"--warmup-steps {self.warmup} is not in 0 .. --steps {self.steps}")

    @property
    def warmup(self) -> int:
        """Steps in which the learning rate rises."""
        return self.steps // 10 if self.warmup_steps is None else self.warmup_steps


def check_smallest(options: Any, smallest: int, *names: str) -> None:
    """Raises ValueError if one of these numbers is smaller."""
    for name in names:
        number = getattr(options, name)
        if number < smallest:
            flag = "--" + name.replace("_", "-")
            raise ValueError(f"{flag} must be at least {smallest}, got {number}")


def check_options(options: Any) -> None:
    """Raises ValueError for a mistake in what both scripts have."""
    if not 0 <= options.dropout < 1:
        raise ValueError(f"--dropout must lie in [0, 1), got {options.dropout}")
    if None not in (options.weights, options.tokenizer):
        raise ValueError("--tokenizer is not allowed with --weights, whose own tokenizer is used")
    for rate in np.atleast_1d(options.learning_rate):  # fine-tuning may have several
        if not 0 < rate < math.inf:
            raise ValueError(f"--learning-rate must be positive and finite, got {rate}")


# ---- The loss ----------------------------------------------------------------


def to_device(batch: Batch, device: torch.device) -> Batch:
    """Returns the batch on a device. The CPU does not wait for a copy from pinned memory."""
    return {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}


def forward(
    model: BertPretrainModel, batch: Batch, precision: str = "float32"
) -> tuple[Tensor, Tensor]:
    """Returns mlm_logits (masked, vocab) and nsp_logits (batch, 2).

    With bfloat16, the logits become float32, so that the loss does not lose more digits.
    """
    with autocast(precision, batch["input_ids"].device.type):
        mlm_logits, nsp_logits = model(
            batch["input_ids"], batch["token_type_ids"], masked_indices=batch["masked_indices"]
        )
    if precision == "bfloat16":  # otherwise they have the dtype of the weights, such as float64
        mlm_logits, nsp_logits = mlm_logits.float(), nsp_logits.float()
    return mlm_logits, nsp_logits


class PretrainLosses(nn.Module):
    """Computes the MLM loss, summed over masked tokens, and the NSP loss, summed over pairs.

    Both are in nats. They are sums, not means: `add_gradients` takes the mean over a whole step.
    This is a module because DistributedDataParallel needs one, and so that torch.compile sees the
    whole forward pass.
    """

    def __init__(self, model: BertPretrainModel, precision: str = "float32") -> None:
        super().__init__()
        self.model = model
        self.precision = precision

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        mlm_logits, nsp_logits = forward(self.model, batch, self.precision)
        mlm_sum = F.cross_entropy(mlm_logits, batch["mlm_targets"], reduction="sum")
        nsp_sum = F.cross_entropy(nsp_logits, batch["nsp_labels"], reduction="sum")
        return mlm_sum, nsp_sum


# ---- One training step -------------------------------------------------------


def learning_rate(step: int, peak: float, warmup: int, steps: int) -> float:
    """Returns the learning rate of a step, in both scripts; steps count from 0. [BERT] A.2.

    It rises linearly to `peak` in `warmup` steps, then falls linearly towards 0. Warmup is needed
    because Adam's first estimates of the moments are poor, and because the gradients of a post-LN
    model are large at the start.

    A rate that is too large is a trap. At 1e-2, the first steps make all hidden states equal, so
    the model predicts the same token everywhere, and it does not recover. Even if it is trained on
    a single pair, with n different masked tokens, the loss stays at ln n, and
    `most_frequent_prediction` at 1.

    Example: peak 1e-3, warmup 2, steps 6: 0.5e-3, 1e-3, 1e-3, 0.75e-3, 0.5e-3, 0.25e-3.

    Differs: in [Code], the first step has the learning rate 0 and so changes nothing, and decay is
    counted from step 0: after a warmup of a tenth of the steps, the rate jumps to 0.9 of its peak.
    """
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * (steps - step) / (steps - warmup)


def make_optimizer(model: nn.Module, name: Literal["adamw", "muon"] = "adamw") -> torch.optim.AdamW:
    """Returns AdamW with weight decay 0.01 ([BERT] A.2), except for biases and LayerNorm ([Code]):
    matrices decay, vectors do not.

    Decay pulls a parameter towards 0. LayerNorm's weights start at 1 and should not be pulled away
    from it, and decaying biases has little effect. eps is that of [Code], too.

    name: with muon, the matrices of the encoder layers get Muon instead of AdamW.

    Differs: [Code] lacks Adam's bias correction of the moments, which start at 0.
    """
    hidden, matrices, vectors = [], [], []
    for path, parameter in model.named_parameters():
        if parameter.dim() == 1:
            vectors.append(parameter)
        elif name == "muon" and "layers." in path:
            hidden.append(parameter)
        else:
            matrices.append(parameter)
    groups = [
        {"params": matrices, "weight_decay": 0.01},
        {"params": vectors, "weight_decay": 0.0},
    ]
    # `update` sets the learning rate before each step.
    settings: dict[str, Any] = {"lr": 0.0, "betas": (0.9, 0.999), "eps": 1e-6, "fused": True}
    if name == "muon":
        groups.append({"params": hidden, "weight_decay": 0.01, "use_muon": True})
        return MuonWithAuxAdam(groups, **settings)
    return torch.optim.AdamW(groups, **settings)


class MuonWithAuxAdam(torch.optim.AdamW):
    """Muon for the groups with `use_muon`, AdamW for the others.

    The gradient of a matrix has a few large singular values. Muon steps along the averaged gradient
    with its singular values brought near 1, so that directions in which they are small count, too
    (K. Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/). The step is scaled to the
    usual size of AdamW's, so AdamW's learning rate is a good first choice (J. Liu et al. 2025,
    arXiv 2502.16982).
    """

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        """Moves Muon's matrices and drops their gradients; then AdamW moves only the others."""
        for group in self.param_groups:
            if not group.get("use_muon"):
                continue
            # A GPU multiplies a stack of matrices faster than one after the other.
            by_shape: defaultdict[torch.Size, list[Tensor]] = defaultdict(list)
            for matrix in group["params"]:
                if matrix.grad is not None:
                    by_shape[matrix.shape].append(matrix)
            for shape, matrices in by_shape.items():
                momenta = torch.stack([self.update_momentum(matrix) for matrix in matrices])
                scale = 0.2 * math.sqrt(max(shape))
                for matrix, direction in zip(matrices, orthogonalize(momenta), strict=True):
                    matrix.mul_(1 - group["lr"] * group["weight_decay"])
                    matrix.sub_(direction, alpha=group["lr"] * scale)
                    matrix.grad = None
        super().step()

    def update_momentum(self, matrix: Tensor) -> Tensor:
        """Updates a matrix's momentum, the moving average of its gradients. Returns it mixed once
        more with the newest gradient, which then counts about twice (Nesterov).
        """
        gradient: Any = matrix.grad
        state = self.state[matrix]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(matrix)
            state["step"] = torch.tensor(0.0)  # unused, but AdamW's load_state_dict asks for it
        momentum = state["momentum_buffer"].lerp_(gradient, 0.05)
        return gradient.lerp(momentum, 0.95)


def orthogonalize(matrices: Tensor) -> Tensor:
    """Brings the singular values of each matrix, (..., rows, columns), near 1.

    If x = U S V^T, then x x^T x = U S^3 V^T. So each of five Newton-Schulz iterations applies
    a s + b s^3 + c s^5 to every singular value s. With Jordan's coefficients, every s of at least
    0.002 of the Frobenius norm ends in 0.68 .. 1.21; a much smaller s stays small.

    On a GPU, it computes in bfloat16, as torch.optim.Muon does. Many CPUs only emulate bfloat16.
    """
    if matrices.shape[-2] > matrices.shape[-1]:
        return orthogonalize(matrices.mT).mT  # the smaller of x x^T and x^T x is cheaper
    a, b, c = 3.4445, -4.7750, 2.0315
    x = matrices.bfloat16() if matrices.is_cuda else matrices
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)  # then all s <= 1
    for _ in range(5):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x


def count(batches: list[Batch], padding_idx: int) -> tuple[int, int, int]:
    """Returns how many masked tokens, pairs, and tokens (without padding) these batches have."""
    masked = pairs = tokens = 0
    for batch in batches:
        masked += len(batch["mlm_targets"])
        pairs += len(batch["nsp_labels"])
        tokens += int((batch["input_ids"] != padding_idx).sum())
    return masked, pairs, tokens


def set_seed(*numbers: int) -> None:
    """Seeds torch with a hash of these numbers, so that what is drawn next (dropout, for example)
    does not depend on what was drawn before.
    """
    torch.manual_seed(int(np.random.SeedSequence(numbers).generate_state(1)[0]))


def add_gradients(
    losses_of: Callable[[Batch], tuple[Tensor, Tensor]],
    micro_batches: list[Batch],
    masked: float,
    pairs: float,
    seeds: Sequence[Sequence[int]] = (),
) -> Tensor:
    """Runs forward and backward on this rank's micro-batches and accumulates their gradients.

    The loss of a step is the mean over all its masked tokens, plus the mean over all its pairs.
    The mean of the micro-batches' means would be a different loss, because micro-batches differ in
    their number of masked tokens. So each sum is divided by the count for the whole step.

    losses_of: `PretrainLosses`, possibly compiled, possibly in DistributedDataParallel.
    masked, pairs: how many the step has, in all micro-batches of all ranks.
    seeds: for each micro-batch, the numbers that seed its dropout. Without them, nothing is seeded.
    Returns what these micro-batches contribute to the MLM and to the NSP loss of the step, (2,).

    Example: two micro-batches with MLM sums of 12 nats over 3 masked tokens and 20 over 5. They
    contribute 12 / 8 and 20 / 8, and the MLM loss of the step is 32 / 8 = 4 nats.
    """
    ddp = losses_of if isinstance(losses_of, DistributedDataParallel) else None
    _, ranks = rank_and_ranks()

    contributions = []
    for i, batch in enumerate(micro_batches):
        if seeds:
            set_seed(*seeds[i])

        # DistributedDataParallel averages gradients over the ranks during backward. That is needed
        # once a step, with the last micro-batch; no_sync() turns it off for the others.
        is_last = i + 1 == len(micro_batches)
        without_averaging = ddp.no_sync() if ddp and not is_last else contextlib.nullcontext()
        with without_averaging:
            mlm_sum, nsp_sum = losses_of(batch)
            contribution = torch.stack([mlm_sum / masked, nsp_sum / pairs])
            loss = contribution.sum()
            # `masked` and `pairs` count all ranks, so the gradients of the ranks must be summed.
            # DDP averages them instead, dividing by the number of ranks; this factor undoes that.
            (loss * ranks).backward()
        contributions.append(contribution.detach())
    return torch.stack(contributions).sum(dim=0)


def update(model: nn.Module, optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Clips the accumulated gradients to norm 1 ([Code]), takes one step, zeroes the gradients."""
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.step()
    optimizer.zero_grad()


# ---- The loop ----------------------------------------------------------------


@dataclass
class Progress:
    """How far a run has come. Every checkpoint contains it, and a resumed run continues from it."""

    step: int = 0  # updates made so far
    tokens: int = 0  # tokens that all ranks have trained on, without padding
    seconds: float = 0.0


def train(
    options: PretrainOptions,
    model: BertPretrainModel,
    optimizer: torch.optim.Optimizer,
    batches: Iterator[Batch],
    progress: Progress,
    signals: list[int],
    log: Callable[..., None],
    report: Callable[[], None],
    save: Callable[[], None],
) -> None:
    """Trains from `progress.step` on. Ends the process if a signal has asked for that.

    batches: this rank's micro-batches. signals: those received so far; see `note_signals`.
    log, report (evaluates), save: called on rank 0; each also writes `progress`, updated here.
    """
    rank, ranks = rank_and_ranks()
    per_rank = options.accumulate // ranks  # micro-batches
    device = model.nsp.weight.device
    losses_of: Any = PretrainLosses(model, options.precision)
    if options.compile:
        losses_of = torch.compile(losses_of, fullgraph=True)
    if dist.is_initialized():
        losses_of = DistributedDataParallel(losses_of)
    started = time.perf_counter() - progress.seconds
    bar = progress_bar(options.steps, initial=progress.step, disable=rank > 0)

    if progress.step == 0:
        on_rank_0(report)
    for step in range(progress.step, options.steps):
        # Learning rate.
        rate = learning_rate(step, options.learning_rate, options.warmup, options.steps)

        # This rank's micro-batches; counts and signals of all ranks together.
        micro_batches = [next(batches) for _ in range(per_rank)]
        counts = count(micro_batches, model.padding_idx)
        masked, pairs, tokens, signals_received = total(*counts, len(signals))

        # Forward, loss, backward. The ranks get a step's micro-batches in turn, so this rank's i-th
        # is number rank + i * ranks of the step. That number, and not the rank, decides the seed of
        # its dropout.
        on_device = [to_device(batch, device) for batch in micro_batches]
        seeds = [(options.seed, step, rank + i * ranks) for i in range(per_rank)]
        losses = add_gradients(losses_of, on_device, masked, pairs, seeds)

        # Clip, and take the step. Neither this nor anything above waits for a GPU.
        update(model, optimizer, rate)

        # What is due after this step? Before anything is written, the weights are checked.
        done = step + 1
        progress.step = done
        progress.tokens += int(tokens)
        is_last = done == options.steps
        must_stop = signals_received > 0
        log_is_due = is_last or done % options.log_every == 0
        report_is_due = is_last or done % options.eval_every == 0
        save_is_due = is_last or done % options.save_every == 0 or must_stop
        if log_is_due or report_is_due or save_is_due:
            on_rank_0(check_weights, model, done)
        progress.seconds = round(time.perf_counter() - started, 2)  # the check waits for the GPU

        # Log. To read a loss, the CPU waits for the GPU.
        if log_is_due:
            mlm_loss, nsp_loss = total(*losses.tolist())
            on_rank_0(log, learning_rate=rate, mlm_loss=mlm_loss, nsp_loss=nsp_loss)
            speed = progress.tokens / max(progress.seconds, 0.01)
            shown = f"loss {mlm_loss + nsp_loss:.3f}, {speed:,.0f} tokens/s"
            bar.set_postfix_str(shown, refresh=False)

        # Evaluate.
        if report_is_due:
            on_rank_0(report)

        # Save, and stop if a signal asks for it.
        if save_is_due:
            on_rank_0(save)
        bar.update()
        if must_stop and not is_last:
            bar.close()
            if dist.is_initialized():
                dist.destroy_process_group()
            sys.exit(f"stopped after step {done}; --resume continues" if rank == 0 else 1)
    bar.close()


def check_weights(model: nn.Module, step: int) -> None:
    """Raises ValueError if a weight is not finite. A gradient that is not finite makes weights NaN,
    and they stay NaN: it is enough to look now and then.
    """
    are_finite = [parameter.isfinite().all() for parameter in model.parameters()]
    if not torch.stack(are_finite).all():
        raise ValueError(
            f"step {step}: a weight is not finite: start again with a lower --learning-rate, or"
            " other --weights"
        )


# ---- Evaluation --------------------------------------------------------------


@torch.no_grad()
def evaluate(
    model: BertPretrainModel, batches: Iterable[Batch], precision: str = "float32"
) -> dict[str, float]:
    """Returns metrics: means over all masked tokens, and over all pairs, of the batches.

    Losses are in nats. Perplexity is exp(MLM loss), without the NSP loss.
    `most_frequent_prediction` is the share of masked tokens that get the most frequent prediction.
    It is 1.0 when the model predicts the same token everywhere. That is normal early in training;
    later, it means that the rate is too large (see `learning_rate`). Train or eval mode is kept.
    """
    was_training = model.training
    model.eval()
    found: defaultdict[str, list[Tensor]] = defaultdict(list)
    for batch in batches:
        mlm_logits, nsp_logits = forward(model, batch, precision)
        targets = batch["mlm_targets"]
        nsp_labels = batch["nsp_labels"]
        predicted = mlm_logits.argmax(dim=-1)  # (masked,)
        nsp_predicted = nsp_logits.argmax(dim=-1)  # (batch,)
        found["prediction"].append(predicted)
        found["mlm_loss"].append(F.cross_entropy(mlm_logits, targets, reduction="none"))
        found["mlm_accuracy"].append((predicted == targets).float())
        found["nsp_loss"].append(F.cross_entropy(nsp_logits, nsp_labels, reduction="none"))
        found["nsp_accuracy"].append((nsp_predicted == nsp_labels).float())
    model.train(was_training)

    predictions = torch.cat(found.pop("prediction"))
    metrics = {name: torch.cat(parts).mean().item() for name, parts in found.items()}
    # torch's exp: math.exp raises an error above 709.
    metrics["perplexity"] = torch.tensor(metrics["mlm_loss"]).double().exp().item()
    largest_count = predictions.bincount().max().item()
    metrics["most_frequent_prediction"] = largest_count / len(predictions)
    return metrics


@torch.no_grad()
def probe(
    model: BertPretrainModel, batch: Batch, tokenizer: Tokenizer, precision: str = "float32"
) -> str:
    """Returns three lines on the batch's first pair: input, target and predicted tokens."""
    was_training = model.training
    model.eval()
    predicted = forward(model, batch, precision)[0].argmax(dim=-1)  # (masked,)
    model.train(was_training)

    first_row = batch["input_ids"][0]
    is_in_first_row = batch["masked_indices"] < len(first_row)  # row 0 has 0 .. seq - 1
    shown = {
        "Input": first_row[first_row != model.padding_idx],
        "Target": batch["mlm_targets"][is_in_first_row],
        "Predicted": predicted[is_in_first_row],
    }
    lines = []
    for name, ids in shown.items():
        tokens = [str(tokenizer.id_to_token(id)) for id in ids.tolist()]
        lines.append(f"{name} Tokens: {'|'.join(tokens)}")
    return "\n".join(lines)


# ---- What a run needs --------------------------------------------------------


def choose_tokenizer(options: Any, read_texts: Callable[[], Iterable[str]]) -> Tokenizer:
    """Returns the tokenizer beside --weights, the one of --tokenizer, or one learned from texts.

    With a tokenizer other than that of its weights, a model would silently look up the wrong
    embeddings.
    """
    if options.weights is not None:
        return data.load_tokenizer(fetch(options.weights))
    if options.tokenizer is not None:
        return data.load_tokenizer(options.tokenizer)
    return data.train_tokenizer(read_texts(), options.vocab_size)


def make_model(cls: Any, options: Any, tokenizer: Tokenizer, positions: int) -> Any:
    """Returns the model of --weights, or a new one with initial weights from torch's seed.

    --dropout replaces the dropout in the config of the weights: a model that was pretrained without
    dropout would otherwise be fine-tuned without, and nobody would notice.
    positions: rows of the position table of a new model. Position embeddings are learned, so no
    sequence can have more tokens than the table has rows.
    """
    dropout = options.dropout
    changes = {"dropout": dropout, "attention_dropout": dropout, "num_labels": 2}
    vocabulary = tokenizer.get_vocab()
    padding_idx = vocabulary[data.PAD]
    if options.weights is not None:
        model = cls.from_pretrained(options.weights, padding_idx, **changes)
    else:
        sizes = {"vocab_size": max(vocabulary.values()) + 1, "max_seq_length": positions}
        config = BertConfig.named(options.size, **sizes, **changes)
        model = cls(config, padding_idx)
    check_tokenizer(model, tokenizer)
    rows = model.config.max_seq_length
    if (options.max_seq_length or 0) > rows:
        raise ValueError(f"--max-seq-length {options.max_seq_length} exceeds the {rows} positions")
    return model


def open_documents(options: PretrainOptions) -> dict[str, data.Documents]:
    """Returns the documents to train on, and those to evaluate on."""
    where = (options.dataset, options.dataset_name, options.split, options.text_column)
    return data.get_documents(*where, options.rows_per_document, options.streaming)


def load_examples(options: PretrainOptions, tokenizer: Tokenizer) -> dict[str, Any]:
    """Returns the examples to train on, which may be a stream, and those to evaluate on."""
    documents = open_documents(options)
    examples_of = partial(
        data.PretrainDataset,
        tokenizer=tokenizer,
        max_seq_length=options.max_seq_length,
        seed=options.seed,
        whole_word_masking=options.whole_word_masking,
    )
    if options.streaming:
        validation = data.first_documents(documents["validation"], tokenizer)
        stream = data.Stream(documents["train"], tokenizer, examples_of)
        return {"train": stream, "validation": examples_of(validation)}
    return {
        split: examples_of(data.get_corpus(part, tokenizer)) for split, part in documents.items()
    }


def make_validation(
    options: PretrainOptions, examples: data.PretrainDataset, device: torch.device
) -> list[Batch]:
    """Returns the batches to evaluate on, the same in all evaluations of a run. If an epoch of the
    validation part has too few, later epochs follow, with other pairs and masks of the same text.
    """
    loader = data.get_split_dataloader(examples, options.batch_size, workers=0)  # endless
    batches = itertools.islice(loader, EVALUATION_BATCHES)
    return [to_device(batch, device) for batch in batches]


def make_batches(options: PretrainOptions, examples: Any, start: int) -> Iterator[Batch]:
    """Returns this rank's micro-batches from step `start` on.

    A stream cannot start in the middle: it is read again from its beginning, and the batches that
    the run was trained on are dropped. That is exact, but slow.
    """
    # Forked workers share the memory of this process until it is written to. The garbage collector
    # writes into all objects that it visits, and it does not visit frozen ones.
    gc.freeze()
    rank, ranks = rank_and_ranks()
    trained_on = start * options.accumulate // ranks
    loader = data.get_split_dataloader(
        examples, options.batch_size, trained_on, rank, ranks, options.workers
    )
    loader.worker_init_fn = outlive_signals
    return itertools.islice(loader, trained_on if options.streaming else 0, None)


def prepare(options: PretrainOptions) -> tuple[Tokenizer, BertPretrainModel, dict[str, Any]]:
    """Returns tokenizer, model, and the examples of each split. Reads all of the user's files (of a
    streamed corpus, only what is evaluated on), so that mistakes in them show before anything is
    written to --out. The model is made before the corpus is tokenized, which may take hours.
    """
    torch.manual_seed(options.seed)  # decides the initial weights
    tokenizer = choose_tokenizer(options, lambda: open_documents(options)["train"])
    positions = options.positions or options.max_seq_length
    model = make_model(BertPretrainModel, options, tokenizer, positions)
    return tokenizer, model, load_examples(options, tokenizer)


def pretrain(options: PretrainOptions) -> None:
    """Pretrains a model: the whole of this script. Every rank runs it.

    1. Look at the folder --out, and change nothing there.
    2. Make tokenizer, model and corpus, rank 0 first: it tokenizes, and the others find the result.
    3. Lock the folder, and begin or resume the run.
    4. Train, and write the model.
    """
    join_ranks(options.device, options.accumulate)
    device = choose_device(options.device)
    options = replace(options, precision=choose_precision(options.precision, device))
    keep_freed_memory()
    out = Path(options.out)
    on_rank_0(check_folder, out, options.resume)

    prepared = on_rank_0(prepare, options)
    tokenizer, model, examples = prepared or prepare(options)  # other ranks have None so far
    model.to(device).train()
    optimizer = make_optimizer(model, options.optimizer)
    validation = make_validation(options, examples["validation"], device)
    # Losses to compare with: of a model that knows nothing, and of one that knows how often each
    # token occurs. (A stream has not been read yet: its validation documents stand in.)
    counted = examples["validation" if options.streaming else "train"].corpus
    baselines = {
        "ln_vocab_size": math.log(model.config.vocab_size),
        "unigram_entropy": counted.unigram_entropy(),
    }

    lock = on_rank_0(lock_folder, out, options.resume)  # noqa: F841, held to the end
    identity = what_identifies(options, examples)
    state: dict[str, Any] = {"progress": {}, "metrics_bytes": 0}
    if options.resume:
        state = on_rank_0(load_checkpoint, out, identity)
        state = state or load_checkpoint(out, identity)
        model.load_state_dict(state.pop("model"))  # frees it
        optimizer.load_state_dict(state.pop("optimizer"))
    progress = Progress(**state["progress"])

    def log(split: str = "train", **values: float) -> None:
        write_line(out, split=split, **asdict(progress), **values)

    def report() -> None:
        metrics = evaluate(model, validation, options.precision)
        log("validation", **metrics, **baselines)
        numbers = "  ".join(f"{name} {value:.3f}" for name, value in metrics.items())
        example = probe(model, validation[0], tokenizer, options.precision)
        show(f"step {progress.step}  {numbers}\n{example}")

    def save() -> None:
        save_checkpoint(out, model, optimizer, progress=asdict(progress), identity=identity)

    def begin() -> None:
        """Writes what a new or resumed run starts with. A kill in between loses nothing."""
        check_weights(model, progress.step)  # those of --weights may not be finite
        with (out / "metrics.jsonl").open("a") as file:
            file.truncate(min(state["metrics_bytes"], file.tell()))  # truncate pads with zeros
        if not options.resume:
            save()
        (out / "config.json").write_text(json.dumps(asdict(options), indent=2) + "\n")
        for split, dataset in examples.items():
            if isinstance(dataset, data.PretrainDataset):  # a stream has not been read yet
                show(f"{split}: {dataset.corpus.describe()}")
        show("  ".join(f"{name} {value:.3f} nats" for name, value in baselines.items()))
        show(f"precision {options.precision}, dropout {options.dropout:g}")

    signals = note_signals()
    on_rank_0(begin)
    batches = make_batches(options, examples["train"], progress.step)
    train(options, model, optimizer, batches, progress, signals, log, report, save)

    on_rank_0(write_model, model, tokenizer, out / "model")
    on_rank_0(draw_curves, out)
    if dist.is_initialized():
        dist.destroy_process_group()


# ---- Device and precision ----------------------------------------------------


def choose_device(name: str | None) -> torch.device:
    """Returns the device of --device; without a name, the GPU if there is one."""
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {name}: {str(error).splitlines()[0]}") from error


def choose_precision(name: Precision, device: torch.device) -> Precision:
    """Chooses the precision if it is "auto", sets torch up for it, and returns it.

    - float32: the model's matrix products in float32.
    - medium: float32 in memory, but these products may round their factors, to bfloat16 on a CPU
      and to TF32 on a GPU.
    - bfloat16: autocast, see `autocast`.
    - auto: bfloat16 on a GPU; on a CPU, medium with AMX, bfloat16 with AVX512-BF16. Where bfloat16
      is emulated (GPUs before Ampere; other CPUs, 40 times as slow), float32. Before torch 2.11, a
      CPU cannot be asked, and gets float32.
    """
    if name == "auto":
        get_capabilities = getattr(torch.cpu, "get_capabilities", dict)  # new in torch 2.11
        capabilities: dict[str, bool] = get_capabilities()
        if device.type == "cuda":
            is_native = torch.cuda.is_bf16_supported(including_emulation=False)
            name = "bfloat16" if is_native else "float32"
        elif capabilities.get("amx_bf16"):
            name = "medium"
        elif capabilities.get("avx512_bf16"):
            name = "bfloat16"
        else:
            name = "float32"
    torch.set_float32_matmul_precision("medium" if name == "medium" else "highest")
    return name


def autocast(precision: str, device_type: str) -> contextlib.AbstractContextManager:
    """Returns the context of a forward pass. With bfloat16, it computes matrix products in
    bfloat16; weights, gradients and the optimizer's state stay float32.
    """
    return torch.autocast(device_type, torch.bfloat16, enabled=precision == "bfloat16")


def keep_freed_memory() -> None:
    """Makes the process keep the memory that it frees, on Linux with glibc.

    Otherwise, the memory of large tensors is returned to the system and allocated anew in every
    step. The page faults, one per 4 KiB, then take a tenth to a quarter of a step's time.
    """
    with contextlib.suppress(AttributeError, OSError):  # another C library
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-4, 0)  # M_MMAP_MAX: no block has a mapping of its own
        mallopt(-1, -1)  # M_TRIM_THRESHOLD: the heap never shrinks


# ---- Ranks -------------------------------------------------------------------


def rank_and_ranks() -> tuple[int, int]:
    """Returns the rank of this process, from 0, and the number of ranks."""
    if dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def join_ranks(device: str | None, accumulate: int) -> None:
    """Joins the process group, if torchrun has started this process.

    Raises ValueError if the ranks cannot share the micro-batches of a step, or the GPUs.
    """
    if "RANK" not in os.environ:
        return
    ranks = int(os.environ["WORLD_SIZE"])
    if accumulate % ranks:
        raise ValueError(f"--accumulate {accumulate} is not a multiple of {ranks} ranks")

    # Imported before the process group is made. Otherwise DistributedDataParallel would import this
    # module later, and it would hold a reference to the group: a process can crash at its end.
    import torch.distributed.nn

    # gloo sums tensors on the CPU, nccl those on a GPU. If no backend is named and there is a GPU,
    # torch sets up nccl only.
    backend = "gloo"
    if torch.cuda.is_available() and device != "cpu":
        backend = "cpu:gloo,cuda:nccl"
        local_rank = int(os.environ["LOCAL_RANK"])
        gpus = torch.cuda.device_count()
        if local_rank >= gpus or device not in (None, "cuda"):
            raise ValueError(
                f"--nproc_per_node: each rank needs a GPU, and there are {gpus}; --device can be"
                " cpu or cuda, but not a single GPU"
            )
        torch.cuda.set_device(local_rank)
    dist.init_process_group(backend, timeout=timedelta(days=1))  # rank 0 may tokenize for hours


def total(*numbers: float) -> list[float]:
    """Returns each number's sum over all ranks. The sums are on the CPU and wait for no GPU.

    If another rank has ended, this one also ends, silently: the other one or torchrun says why.
    """
    if not dist.is_initialized():
        return list(numbers)
    sums = torch.tensor(numbers, dtype=torch.float64)
    try:
        dist.all_reduce(sums)
    except RuntimeError as error:
        if is_death_of_worker(error):
            raise
        raise SystemExit(2) from None
    return sums.tolist()


def on_rank_0(work: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
    """Calls `work` on rank 0 alone, while the others wait. Returns its result on rank 0, and None
    on the others. If `work` fails, all ranks end: rank 0 with its error, others as `total` says.
    """
    rank, _ = rank_and_ranks()
    result = work(*arguments, **named) if rank == 0 else None
    total(0)  # waits for all ranks
    return result


# ---- The folder of a run -----------------------------------------------------


def check_folder(out: Path, resume: bool = False) -> None:
    """Raises ValueError if a new run would overwrite another one, or if there is none to resume.
    Changes nothing.
    """
    if resume and not (out / "checkpoint.pt").exists():
        raise ValueError(f"--resume: there is no {out}/checkpoint.pt")
    if resume:
        return
    for name in ("config.json", "metrics.jsonl", "checkpoint.pt", "model"):
        path = out / name
        if path.exists() and path.stat().st_size > 0:  # a run killed early leaves empty metrics
            raise ValueError(f"--out {out} holds the {name} of another run: choose a new folder")


def lock_folder(out: Path, resume: bool = False) -> IO:
    """Makes the folder of a run, and locks it until the returned file is closed or the process
    ends, however it ends. Raises ValueError as `check_folder` does.
    """
    out.mkdir(parents=True, exist_ok=True)
    lock = (out / ".lock").open("w")
    try:
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # data workers do not inherit this kind
    except (BlockingIOError, PermissionError) as error:  # which of them depends on the system
        raise ValueError(f"--out {out} is in use by another process") from error
    except OSError as error:  # a file system without locks
        raise ValueError(f"--out {out} cannot be locked: {error.strerror}") from error
    check_folder(out, resume)  # again: another process may just have released it
    return lock


def write_line(out: Path, **values: Any) -> None:
    """Adds a line to the run's metrics.jsonl."""
    with (out / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(values) + "\n")


def what_identifies(options: PretrainOptions, examples: dict[str, Any]) -> dict[str, Any]:
    """Returns what a resumed run must share with the run before it: the text, and all options
    except those in `may_change`, which change at most rounding and dropout masks. --precision is
    never auto here. The batches of a stream also depend on the numbers of workers and ranks.
    """
    may_change = {"out", "resume", "workers", "device", "compile", "save_every"}
    identity = {name: v for name, v in asdict(options).items() if name not in may_change}
    identity["validation"] = examples["validation"].corpus.key
    if options.streaming:
        _, ranks = rank_and_ranks()
        identity["readers"] = f"{options.workers} workers of {ranks} ranks"
    else:
        identity["train"] = examples["train"].corpus.key
    return identity


def save_checkpoint(
    out: Path, model: nn.Module, optimizer: torch.optim.Optimizer, **state: Any
) -> None:
    """Writes checkpoint.pt. After a kill or a power cut, the old one or the new one is intact.

    It also holds the length of metrics.jsonl: a resumed run cuts off what was written later.
    """
    state |= {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    with (out / "metrics.jsonl").open("a") as file:
        os.fsync(file.fileno())
        state["metrics_bytes"] = file.tell()

    unfinished = out / "checkpoint.unfinished"
    try:
        with unfinished.open("wb") as file:
            torch.save(state, file)
            os.fsync(file.fileno())
    except (OSError, RuntimeError) as error:  # for a full disk, torch has an error of its own
        unfinished.unlink(missing_ok=True)
        if is_death_of_worker(error):
            raise
        message = f"{out}/checkpoint.pt not written (is the disk full?), the old one is kept"
        raise OSError(f"{message}: {error}") from error
    unfinished.replace(out / "checkpoint.pt")


def load_checkpoint(out: Path, identity: dict[str, Any]) -> dict[str, Any]:
    """Returns a run's checkpoint. Raises ValueError, with what differs, if it is another run's."""
    path = out / "checkpoint.pt"
    with data.reading(path):
        state = torch.load(path, map_location="cpu", weights_only=True)
    for name, value in identity.items():
        before = state["identity"].get(name)
        if before != value:
            raise ValueError(f"--resume: {name} was {before}, and is {value}")
    return state


def write_model(model: Any, tokenizer: Tokenizer, folder: Path) -> None:
    """Writes a model with its tokenizer. The previous model stays until the new one is complete. (A
    folder cannot be replaced atomically: after a kill between the two renames, both models are
    there, as .before and .unfinished.)
    """
    unfinished = folder.with_name(folder.name + ".unfinished")
    before = folder.with_name(folder.name + ".before")
    shutil.rmtree(unfinished, ignore_errors=True)
    model.save_pretrained(unfinished, tokenizer)
    if folder.exists():
        shutil.rmtree(before, ignore_errors=True)
        folder.rename(before)
    unfinished.rename(folder)
    shutil.rmtree(before, ignore_errors=True)


# ---- What a person sees ------------------------------------------------------


def progress_bar(steps: int, **more: Any) -> tqdm:
    """Returns a bar of the steps done, steps per second and time left. In a log file, or wherever
    there is no terminal, it is drawn at most every 30 seconds.
    """
    interval = 0.5 if sys.stderr.isatty() else 30.0
    return tqdm(total=steps, unit="step", dynamic_ncols=True, mininterval=interval, **more)


def show(text: str) -> None:
    """Prints above the progress bar. If the output is closed, or cannot show the text, the run goes
    on without it.
    """
    with contextlib.suppress(OSError, UnicodeError):
        tqdm.write(text)


def draw_curves(out: Path) -> None:
    """Draws curves.png from the metrics.jsonl of a run: losses and accuracies over the steps, with
    curves for each model of fine-tuning. Needs matplotlib, and does nothing without it.
    """
    try:
        from matplotlib.figure import Figure
    except (ImportError, ValueError):  # ValueError: a notebook's MPLBACKEND is unknown here
        return
    curves: defaultdict[tuple, list] = defaultdict(list)
    for text in (out / "metrics.jsonl").read_text().splitlines():
        line = json.loads(text)
        model = (line["learning_rate"], line["seed"]) if "seed" in line else None
        for name, value in line.items():
            if "step" in line and ("loss" in name or "accuracy" in name or "prediction" in name):
                curves[name, line["split"], model].append((line["step"], value))

    figure = Figure(figsize=(11, 4), layout="constrained")
    losses, accuracies = figure.subplots(1, 2)
    colors: dict[Any, str] = {}
    for (name, split, model), points in curves.items():
        axes = losses if "loss" in name else accuracies
        style: dict[str, Any] = {"color": colors.setdefault(model or name, f"C{len(colors)}")}
        if split == "train":
            style["alpha"] = 0.4
        else:
            style["label"] = "learning rate {:g}, seed {}".format(*model) if model else name
        axes.plot(*zip(*points, strict=True), **style)
    losses.set(xlabel="step", ylabel="loss, nats", title="pale: training, else validation")
    accuracies.set(xlabel="step", ylabel="share")
    losses.legend(fontsize=7)
    accuracies.legend(fontsize=7)
    figure.savefig(out / "curves.png", dpi=120)


# ---- Signals, and how a script ends ------------------------------------------


def note_signals() -> list[int]:
    """Returns a list to which Ctrl-C, SIGTERM and SIGHUP are added instead of ending the process:
    the loop then stops at the end of a step. A second Ctrl-C ends the process at once.
    """
    noted: list[int] = []

    def note(number: int, frame: Any) -> None:
        noted.append(number)
        if number == signal.SIGINT:
            signal.signal(number, signal.default_int_handler)

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:  # nohup ignores SIGHUP
            signal.signal(number, note)
    return noted


def outlive_signals(worker: int) -> None:
    """Prepares a data worker for signals that go to all processes of a run: it has to make batches
    until the loop has ended. worker: its index, from DataLoader.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    # SIGTERM ends the worker, but half a minute later, by SIGALRM. If it were ignored, a main
    # process without `run_script` would never end: at exit, it sends SIGTERM and waits.
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(30))


def is_death_of_worker(error: Exception) -> bool:
    """Returns whether a data worker has died, or sends nothing. torch may raise this anywhere."""
    return str(error).startswith("DataLoader")


def run_script(main: Callable, cls: type) -> None:
    """Runs a script's main function with the options of its command line; each field of `cls` is
    a flag. A mistake (a ValueError from our own files), an operating-system error (OSError) or a
    dead data worker ends the script with one message. Anything else, such as a ValueError from
    torch, is a bug and keeps its traceback. Data workers that are left at the end are killed.
    """
    try:
        main(tyro.cli(cls, config=(tyro.conf.FlagCreatePairsOff,)))
        return
    except KeyboardInterrupt:
        sys.exit(130)
    # A worker has died, perhaps while it sent a batch.
    except (RuntimeError, ConnectionResetError, EOFError) as error:
        if isinstance(error, RuntimeError) and not is_death_of_worker(error):
            raise
        reason = str(error).rstrip(". ") or "a data worker has ended"
        message = f"{reason}: it died or cannot send its batch; try fewer --workers, and --resume"
    except (ValueError, OSError) as error:
        # Who raised it? The last file in the traceback. It is searched for in the text, because
        # an error from a data worker carries the worker's traceback as text.
        raised_in = re.findall(r'File "(.+)", line', traceback.format_exc())[-1]
        is_ours = Path(raised_in).resolve().parent == Path(__file__).resolve().parent
        if isinstance(error, ValueError) and not is_ours:
            raise
        lines = str(error).strip().splitlines() or [type(error).__name__]
        is_from_worker = "DataLoader worker" in lines[0]  # "Caught ... in DataLoader worker ..."
        message = lines[-1] if is_from_worker else " ".join(lines)
    finally:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler would raise an error
        for worker in multiprocessing.active_children():
            worker.kill()
    print(f"\nerror: {message}", file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
    run_script(pretrain, PretrainOptions)
