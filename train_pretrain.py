"""Pretrain BERT: masked language model + next sentence prediction.

    python train_pretrain.py                                      # the sample, on any machine
    python train_pretrain.py --dataset DIR --tokenizer vocab.txt --size base \
        --learning-rate 1e-4 --accumulate 4 --out runs/base
    torchrun --nproc_per_node=4 train_pretrain.py ...    # the same line on 4 GPUs: the same steps

Writes into the folder --out:
    config.json    the options
    metrics.jsonl  a line for every log and every evaluation; losses in nats. "step": N means that
                   N updates have been made. An evaluation line describes the model after them; a
                   training line has the loss of the update that comes next, number N + 1
    checkpoints/   the last two; a run that was killed after its start resumes exactly with --resume
    model/         weights and tokenizer in the published format
    models/step-N  the same after N updates: for --export-steps, and when the run is stopped
    curves.png     loss and accuracies over the steps

Read `train` first: the loop, with the training step in order. Above it stand the parts of a step
(loss, learning rate, gradients, update), below it what prepares a run.

[BERT] Devlin et al. 2018, arXiv 1810.04805. [Code] google-research/bert, commit eedf5716.
Dimensions: batch, seq, vocab, and masked (all masked positions of a batch).
"""

import contextlib
import gc
import itertools
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import data
from bert import (
    BertConfig,
    BertPretrainModel,
    check_tokenizer,
    fetch,
    is_tokenizer_of,
    read_json,
    tokenizer_hash,
)
from support.command_line import LARGEST_INTEGER, LARGEST_SIZE, check_limits, run_script
from support.curves import draw_pretraining
from support.devices import (
    Precision,
    autocast,
    choose_device,
    choose_precision,
    keep_freed_memory,
)
from support.folder import check_lies_outside, run_folder, write_model
from support.processes import first_process_first, join_processes, leave_group, total
from support.run import FiniteGuard, Run, set_seed

Batch = dict[str, Tensor]

# ---- Options -----------------------------------------------------------------


@dataclass
class PretrainOptions:
    """Pretrains BERT: masked language model + next sentence prediction."""

    # The run
    out: str = "runs/pretrain"
    """Folder of the run: a new one, or with --resume the one of the run to resume."""
    resume: bool = False
    """Resume from the last checkpoint in --out."""
    steps: int = 4000
    """Updates of the weights. With 0, --weights are evaluated and nothing is written."""
    seed: int = 0
    """Seed of everything that is random."""

    # The corpus
    dataset: str = "sample"
    """Corpus: sample, a file, a directory, or a hub id."""
    dataset_name: str | None = None
    """Configuration of the corpus, where a hub id has several."""
    split: str = "train"
    """Split to train on, or several: train+unsupervised."""
    text_column: str = "text"
    """Column of the corpus that holds its text."""
    rows_per_document: int = 1
    """Rows that are joined into one document: > 1 for a corpus with a sentence per row."""
    streaming: bool = False
    """Read the corpus without storing it, instead of tokenizing it once to disk."""
    tokenizer: str | None = None
    """vocab.txt, tokenizer.json, directory or hub id. With --weights it must be the same as theirs,
    and need not be named. Without both, a vocabulary is learned, for lowercased text without
    accents."""
    vocab_size: int = 2000
    """Size of the vocabulary that is learned without --tokenizer and --weights."""

    # The examples
    max_seq_length: int = 64
    """Tokens in an example: two segments, [CLS] and two [SEP]."""
    whole_word_masking: bool = False
    """Mask all pieces of a word or none."""
    batch_size: int = 32
    """Examples in a micro-batch."""
    accumulate: int = 1
    """Micro-batches in a step, divided among the ranks."""
    workers: int = 2
    """Processes of each rank that prepare batches. As many tokenize."""

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
    learning_rate: float = 1e-3
    """Peak learning rate. base and large need 1e-4."""
    warmup_steps: int | None = None
    """Steps in which the learning rate rises. By default a tenth of --steps."""

    # What is written, and when
    log_every: int = 10
    """Steps between two training lines in metrics.jsonl."""
    eval_every: int = 250
    """Steps between two evaluations."""
    eval_batches: int = 16
    """Batches of an evaluation, at most."""
    save_every: int = 500
    """Steps between two checkpoints."""
    export_steps: tuple[int, ...] | None = None
    """Steps after which the model is also written to models/step-N."""

    # The machine
    device: str | None = None
    """cpu, cuda or cuda:N. By default the GPU if there is one."""
    precision: Precision = "auto"
    """Precision of matrix products. auto chooses the fastest here."""
    compile: bool = False
    """Use torch.compile: minutes at the start, then faster on a GPU."""
    checkpoint_activations: bool = False
    """Compute every layer twice instead of keeping its activations: less memory."""

    def __post_init__(self) -> None:
        check_limits(self, LIMITS)
        if self.export_steps == ():
            raise ValueError("--export-steps needs a step, or several")
        late_exports = [step for step in self.export_steps or () if step > self.steps]
        if late_exports:
            raise ValueError(
                f"--export-steps {late_exports[0]} comes after the last of --steps {self.steps}"
            )
        if self.steps > 0 and self.warmup > self.steps:
            raise ValueError(
                f"--warmup-steps {self.warmup_steps} is more than --steps {self.steps}"
            )
        if self.steps == 0 and not self.weights:
            raise ValueError("--steps 0 evaluates a saved model: name it with --weights")

    def exports_at(self, step: int) -> bool:
        return step in (self.export_steps or ())

    @property
    def warmup(self) -> int:
        """Steps of rising learning rate."""
        return self.steps // 10 if self.warmup_steps is None else self.warmup_steps


LIMITS = {  # the smallest and the largest value
    "steps": (0, 10**9 - 1),  # the nine digits in the name of a checkpoint
    "seed": (0, LARGEST_INTEGER),
    "rows_per_document": (1, LARGEST_SIZE),
    "vocab_size": (1, LARGEST_SIZE),
    "max_seq_length": (5, LARGEST_SIZE),  # [CLS] a [SEP] b [SEP]
    "batch_size": (1, LARGEST_SIZE),
    "accumulate": (1, LARGEST_SIZE),
    "workers": (0, LARGEST_SIZE),
    "positions": (1, LARGEST_SIZE),
    "dropout": (0, 0.99),
    "learning_rate": (0, math.inf),
    "warmup_steps": (0, LARGEST_INTEGER),
    "log_every": (1, LARGEST_INTEGER),
    "eval_every": (1, LARGEST_INTEGER),
    "eval_batches": (1, LARGEST_SIZE),
    "save_every": (1, LARGEST_INTEGER),
    "export_steps": (0, LARGEST_INTEGER),
}
# Options that may differ when a run is resumed. The result stays the same up to rounding, except
# that --device and --compile change the random numbers of dropout. Corpus and tokenizer may have
# another path (of a stream only the tokenizer), since `what_identifies` compares their content.
# The precision may not differ: if --precision auto would choose another one on the new device, name
# the old one. A stream must keep --workers and the number of ranks.
MAY_CHANGE = {
    "out",
    "resume",
    "save_every",
    "export_steps",
    "workers",
    "device",
    "compile",
    "checkpoint_activations",
    "tokenizer",  # its hash is compared
}


# ---- The loss ----------------------------------------------------------------


def to_device(batch: Batch, device: torch.device) -> Batch:
    """Returns the batch on a device, with two more tensors, both int64 (masked,):

    - `positions`: the masked positions, counted through all rows;
    - `mlm_targets`: the tokens to predict there.

    They are computed on the CPU: on a GPU, `nonzero()` would force a synchronisation. Pinned memory
    is copied while the GPU computes.
    """
    labels = batch["mlm_labels"].flatten()  # (batch * seq,)
    positions = (labels != data.IGNORED_LABEL).nonzero().flatten()
    batch = {**batch, "positions": positions, "mlm_targets": labels[positions]}
    moved = {}
    for name, tensor in batch.items():
        if device.type == "cuda":
            tensor = tensor.pin_memory()  # itself, if the loader has pinned it
        moved[name] = tensor.to(device, non_blocking=True)
    return moved


def forward(
    model: BertPretrainModel, batch: Batch, precision: str = "float32"
) -> tuple[Tensor, Tensor]:
    """Returns mlm_logits (masked, vocab) and nsp_logits (batch, 2).

    With bfloat16, the logits become float32: a loss needs more digits than bfloat16 has.
    """
    with autocast(precision, batch["input_ids"].device.type):
        mlm_logits, nsp_logits = model(
            batch["input_ids"], batch["token_type_ids"], positions=batch["positions"]
        )
    if precision == "bfloat16":  # a model in float64 keeps its digits
        mlm_logits, nsp_logits = mlm_logits.float(), nsp_logits.float()
    return mlm_logits, nsp_logits


def sum_losses(
    model: BertPretrainModel, batch: Batch, precision: str = "float32"
) -> tuple[Tensor, Tensor]:
    """Returns the MLM loss, summed over masked positions, and the NSP loss, summed over pairs.

    Both are in nats. Sums, not means: the mean is taken over a whole step, in `add_gradients`.
    """
    mlm_logits, nsp_logits = forward(model, batch, precision)
    mlm_sum = F.cross_entropy(mlm_logits, batch["mlm_targets"], reduction="sum")
    nsp_sum = F.cross_entropy(nsp_logits, batch["nsp_labels"], reduction="sum")
    return mlm_sum, nsp_sum


class PretrainLosses(nn.Module):
    """`sum_losses` as a module, which DistributedDataParallel needs. With the loss inside, it and
    torch.compile see the whole forward pass.
    """

    def __init__(self, model: BertPretrainModel, precision: str = "float32") -> None:
        super().__init__()
        self.model = model
        self.precision = precision

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        return sum_losses(self.model, batch, self.precision)


# ---- One training step -------------------------------------------------------


def learning_rate(step: int, peak: float, warmup: int, steps: int) -> float:
    """Returns the learning rate of a step; steps count from 0 to steps - 1. [BERT] A.2.

    It rises linearly to `peak` in `warmup` steps, then falls linearly towards 0. Warmup is needed
    because Adam's first estimates of the moments are poor, and because the gradients of a post-LN
    model are large at the start.

    A rate that is too large is a trap. At 1e-2 a model of the size mini cannot overfit even one
    pair: after the first huge steps every position has the same hidden state, the model predicts
    the same token everywhere, and the loss stays at ln n for n masked tokens that all differ
    (WALKTHROUGH.md, section 12).

    Example: peak 1e-3, warmup 2, steps 6: 0.5e-3, 1e-3, 1e-3, 0.75e-3, 0.5e-3, 0.25e-3.

    Differs: the first step of [Code] has the learning rate 0, and so changes nothing. Its decay
    counts from step 0, so its rate drops by a tenth at the end of a warmup of a tenth.
    """
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * (steps - step) / (steps - warmup)


def make_optimizer(model: nn.Module) -> torch.optim.AdamW:
    """Returns AdamW with weight decay 0.01 ([BERT] A.2), except for biases and LayerNorm ([Code]).

    Decay pulls a parameter towards 0. LayerNorm's weights start at 1 and should not be pulled away
    from it, and decaying biases regularizes little. eps is that of [Code], too.

    Differs: [Code] lacks Adam's correction of the moments, which start at 0.
    """
    decayed: list[Tensor] = []
    not_decayed: list[Tensor] = []
    for name, parameter in model.named_parameters():
        is_exempt = name.endswith("bias") or "norm" in name
        (not_decayed if is_exempt else decayed).append(parameter)
    groups = [
        {"params": decayed, "weight_decay": 0.01},
        {"params": not_decayed, "weight_decay": 0.0},
    ]
    # `update` sets the learning rate before each step, and needs found_inf, which `fused` obeys.
    return torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.999), eps=1e-6, fused=True)


def add_gradients(
    losses_of: Callable[[Batch], tuple[Tensor, Tensor]],
    micro_batches: list[Batch],
    seeds: Sequence[Sequence[int]] = (),
) -> Tensor:
    """Runs forward and backward on this rank's micro-batches; gradients add up in the parameters.

    The loss of a step is the mean over all its masked positions, plus the mean over all its pairs.
    A mean of the micro-batches' means would be another loss, because they differ in their numbers
    of masked positions. So each sum is divided by the count of the whole step: of all micro-batches
    of all ranks.

    losses_of: `PretrainLosses`, possibly compiled, possibly in DistributedDataParallel.
    seeds: for each micro-batch, the numbers that seed its dropout; by default none is seeded.
    Returns what these micro-batches contribute to the MLM and to the NSP loss of the step, (2,).

    Example: two micro-batches with MLM sums of 12 nats at 3 masked positions and 20 nats at 5. They
    contribute 12 / 8 and 20 / 8, and the MLM loss of the step is 32 / 8 = 4 nats.
    """
    ddp = losses_of if isinstance(losses_of, DistributedDataParallel) else None
    ranks = dist.get_world_size() if ddp else 1
    masked_here = sum(len(batch["positions"]) for batch in micro_batches)
    pairs_here = sum(len(batch["nsp_labels"]) for batch in micro_batches)
    masked, pairs = total(masked_here, pairs_here)  # summed over the ranks

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
            # `masked` and `pairs` count all ranks, so the gradients of the ranks have to be added.
            # They are averaged, which divides by the number of ranks; this factor undoes it.
            (loss * ranks).backward()
        contributions.append(contribution.detach())
    return torch.stack(contributions).sum(dim=0)


def update(model: nn.Module, optimizer: torch.optim.Optimizer, rate: float) -> Tensor:
    """Clips the accumulated gradients to norm 1 ([Code]), takes one optimizer step, drops them.

    Returns the norm before clipping, (). If it is not finite, no weight changes: fused AdamW skips
    a step in which `found_inf` is 1. It reads `found_inf` on the device, so the CPU need not wait
    for the norm. `FiniteGuard` ends the run later.
    """
    norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.found_inf = (~norm.isfinite()).float()  # type: ignore[attr-defined]
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.step()
    optimizer.zero_grad()
    return norm


# ---- The loop ----------------------------------------------------------------


ADVICE = (
    "the last checkpoint is good, but --resume would fail at the same step: start a new run with a"
    " lower --learning-rate or more --warmup-steps"
)


def train(
    options: PretrainOptions,
    run: Run,
    model: BertPretrainModel,
    optimizer: torch.optim.Optimizer,
    batches: Iterator[Batch],
    report: Callable[[int], None],
    export: Callable[[int], None],
) -> None:
    """Trains from the run's step to the last one.

    run: its `step` is the first to take, its `saved_step` that of the newest checkpoint, or -1.
    batches: this rank's micro-batches. report(step): evaluates. export(step): writes the model.
    """
    device = model.nsp.weight.device
    losses_of: Any = PretrainLosses(model, options.precision)
    if options.compile:
        losses_of = torch.compile(losses_of, fullgraph=True)
    if dist.is_initialized():
        losses_of = DistributedDataParallel(losses_of)
    # check() stops the run if a gradient was not finite; check(model) also if a weight is not.
    guard = FiniteGuard(device, ADVICE)
    per_rank = options.accumulate // run.world_size  # micro-batches

    for step in range(run.step, options.steps + 1):  # the last pass takes no step
        # Save, export, evaluate: the model as it is after `step` updates.
        is_last = step == options.steps
        must_stop = run.asked_to_stop()
        save_is_due = step % options.save_every == 0 or is_last or must_stop
        if save_is_due and step > run.saved_step:
            guard.check(model)
            run.save(step, None, model=model, optimizer=optimizer)
        # A stopped run leaves its model, too.
        if run.rank == 0 and (must_stop or options.exports_at(step)):
            guard.check(model)
            export(step)
        if must_stop:
            run.stop(step)  # ends the process
        if is_last or step % options.eval_every == 0:
            guard.check()
            if run.rank == 0:
                report(step)
        if is_last:
            break

        # Learning rate.
        rate = learning_rate(step, options.learning_rate, options.warmup, options.steps)

        # The micro-batches of the step. The seed of a micro-batch's dropout depends on the step and
        # on which of the step's micro-batches it is, not on the rank that computes it.
        micro_batches = [next(batches) for _ in range(per_rank)]
        run.tokens += count_tokens(micro_batches, model.padding_idx)
        seeds = [(options.seed, step, run.rank + i * run.world_size) for i in range(per_rank)]

        # Forward, loss, backward.
        on_device = [to_device(batch, device) for batch in micro_batches]
        losses = add_gradients(losses_of, on_device, seeds)

        # Clip, and take the step.
        norm = update(model, optimizer, rate)
        guard.note(step, norm)
        run.bar.update()

        # Log. To read a loss, the CPU waits for the GPU, as it does to evaluate, save or export.
        if step % options.log_every == 0 or step + 1 == options.steps:
            guard.check()
            mlm_loss, nsp_loss = run.add_up(losses)  # over the ranks
            run.write("train", step, learning_rate=rate, mlm_loss=mlm_loss, nsp_loss=nsp_loss)
            run.show(f"loss {mlm_loss + nsp_loss:.3f}")


def count_tokens(micro_batches: list[Batch], padding_idx: int) -> int:
    """Returns how many tokens the micro-batches of all ranks have, without padding."""
    here = sum(int((batch["input_ids"] != padding_idx).sum()) for batch in micro_batches)
    (everywhere,) = total(here)  # summed over the ranks
    return everywhere


# ---- Evaluation --------------------------------------------------------------


@torch.no_grad()
def evaluate(
    model: BertPretrainModel, batches: Iterable[Batch], precision: str = "float32"
) -> dict[str, float]:
    """Returns metrics: means over all masked positions, and over all pairs, of the batches.

    Losses are in nats. Perplexity is exp(MLM loss), without the NSP loss.
    `most_frequent_prediction` is the share of masked positions that get the most frequent
    prediction. It is 1.0 when the model predicts the same token everywhere, as it does early in
    training. The model is in training mode afterwards.
    """
    model.eval()
    sums: defaultdict[str, float] = defaultdict(float)
    predictions = []
    for batch in batches:
        mlm_logits, nsp_logits = forward(model, batch, precision)
        targets, nsp_labels = batch["mlm_targets"], batch["nsp_labels"]
        predicted = mlm_logits.argmax(dim=-1)  # (masked,)
        predictions.append(predicted)
        sums["masked"] += len(targets)
        sums["mlm_loss"] += F.cross_entropy(mlm_logits, targets, reduction="sum").item()
        sums["mlm_correct"] += (predicted == targets).sum().item()
        sums["pairs"] += len(nsp_labels)
        sums["nsp_loss"] += F.cross_entropy(nsp_logits, nsp_labels, reduction="sum").item()
        sums["nsp_correct"] += (nsp_logits.argmax(dim=-1) == nsp_labels).sum().item()
    model.train()

    mlm_loss = sums["mlm_loss"] / sums["masked"]
    # torch's exp gives inf where math.exp raises OverflowError: above 709.
    perplexity = torch.tensor(mlm_loss, dtype=torch.float64).exp().item()
    occurrences = torch.cat(predictions).bincount()  # of each token among the predictions
    return {
        "mlm_loss": mlm_loss,
        "perplexity": perplexity,
        "mlm_accuracy": sums["mlm_correct"] / sums["masked"],
        "nsp_loss": sums["nsp_loss"] / sums["pairs"],
        "nsp_accuracy": sums["nsp_correct"] / sums["pairs"],
        "most_frequent_prediction": occurrences.max().item() / sums["masked"],
    }


@torch.no_grad()
def probe(
    model: BertPretrainModel, batch: Batch, tokenizer: Tokenizer, precision: str = "float32"
) -> str:
    """Returns three lines on the batch's first pair: input, target and predicted tokens."""
    model.eval()
    predicted = forward(model, batch, precision)[0].argmax(dim=-1)  # (masked,)
    model.train()

    first_row = batch["input_ids"][0]
    is_in_first_row = batch["positions"] < len(first_row)  # positions count through all rows
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


def evaluate_weights(options: PretrainOptions, device: torch.device) -> None:
    """Prints the metrics of --weights on the first batches of the validation split, as many as
    --eval-batches, and writes nothing.
    """
    tokenizer = choose_tokenizer(options)
    model = make_model(options, tokenizer).to(device)
    # A head that the weights lack is new and random.
    missing = model.missing_parameters
    if any(name.startswith("mlm_") for name in missing):
        raise ValueError(
            f"--steps 0: {options.weights} has no head to evaluate: {', '.join(missing)}"
        )
    corpus = load_corpora(options, tokenizer, ["validation"])["validation"]
    validation = make_validation(options, corpus, tokenizer, device)
    metrics = evaluate(model, validation, options.precision)
    if any(name.startswith(("nsp.", "bert.pooler.")) for name in missing):
        metrics = {name: v for name, v in metrics.items() if not name.startswith("nsp_")}
        print("NSP is not evaluated: the weights have no head for it")
    pairs = sum(len(batch["nsp_labels"]) for batch in validation)
    print(f"{options.weights}, {pairs} pairs of the validation split, {options.precision}")
    for name, value in metrics.items():
        print(f"{name:<26}{value:.4f}")


# ---- What a run needs --------------------------------------------------------


def matching_tokenizer(weights: str, tokenizer: str | None) -> Tokenizer:
    """Returns the tokenizer that lies beside the weights.

    tokenizer: what --tokenizer names, or None.
    Raises ValueError if either has another hash than the one in the config.json of the weights.
    With another tokenizer, every id would mean another token, and nothing but a low accuracy would
    show it. (Models from elsewhere have no hash there. Then the tokenizer beside the weights counts
    as the right one.)
    """
    directory = fetch(weights)
    saved = data.load_tokenizer(directory)
    path = directory / "config.json"
    config = read_json(path) if path.exists() else {}
    right_hash = config.get("tokenizer_hash", tokenizer_hash(saved))
    candidates = [(str(directory), saved)]
    if tokenizer:
        candidates.append((tokenizer, data.load_tokenizer(tokenizer)))
    for source, candidate in candidates:
        if not is_tokenizer_of(candidate, right_hash):
            raise ValueError(f"the tokenizer {source} is not the one {weights} was trained with")
    return saved


def choose_tokenizer(options: PretrainOptions) -> Tokenizer:
    """Returns the tokenizer of --weights, that of --tokenizer, or one learned from the corpus."""
    if options.weights:
        return matching_tokenizer(options.weights, options.tokenizer)
    if options.tokenizer:
        return data.load_tokenizer(options.tokenizer)
    if options.streaming:
        raise ValueError("--streaming needs a --tokenizer: none can be learned from a stream")
    texts = data.get_texts(
        options.dataset, options.split, options.dataset_name, options.text_column
    )
    return data.train_tokenizer(texts, options.vocab_size)


def load_corpora(
    options: PretrainOptions,
    tokenizer: Tokenizer,
    splits: Sequence[str] = ("train", "validation"),
) -> dict[str, Any]:
    """Returns the corpus of each split. With --streaming, `splits` is ignored: both are returned,
    and "train" is a stream.
    """
    how: dict[str, Any] = {
        "name": options.dataset_name,
        "train_split": options.split,
        "text_column": options.text_column,
        "rows_per_document": options.rows_per_document,
    }
    if options.streaming:
        stream, validation = data.open_stream(options.dataset, tokenizer, **how)
        return {"train": stream, "validation": validation}
    return {split: data.get_corpus(options.dataset, split, tokenizer, **how) for split in splits}


def make_model(options: PretrainOptions, tokenizer: Tokenizer) -> BertPretrainModel:
    """Returns the model of --weights, or a new one with initial weights from torch's seed.

    Position embeddings are learned, so an example cannot have more tokens than the position table
    has rows. A table may have more rows than --max-seq-length: the rows beyond are not trained in
    this run, but a later one can use longer examples. [BERT] A.2 trains 900,000 steps with 128
    tokens, then 100,000 with 512.
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
        vocabulary = tokenizer.get_vocab()
        config = BertConfig.named(
            options.size,
            vocab_size=max(vocabulary.values()) + 1,
            max_seq_length=positions,
            **dropouts,
        )
        model = BertPretrainModel(config, vocabulary[data.PAD])
    check_tokenizer(model, tokenizer)

    if options.checkpoint_activations:  # only the input of each layer is kept for the backward pass
        for layer in model.bert.layers:
            layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
    return model


def make_dataset(
    options: PretrainOptions, corpus: data.TokenizedCorpus, tokenizer: Tokenizer
) -> data.PretrainDataset:
    """Returns the examples of a corpus."""
    return data.PretrainDataset(
        corpus, tokenizer, options.max_seq_length, options.seed, options.whole_word_masking
    )


def make_validation(
    options: PretrainOptions,
    corpus: data.TokenizedCorpus,
    tokenizer: Tokenizer,
    device: torch.device,
) -> list[Batch]:
    """Returns the batches of an evaluation: the same ones in all evaluations of a run."""
    dataset = make_dataset(options, corpus, tokenizer)
    # The loader is endless: stop after one epoch, or earlier after --eval-batches.
    batches_per_epoch = math.ceil(len(dataset) / options.batch_size)
    count = min(options.eval_batches, batches_per_epoch)
    loader = data.get_split_dataloader(dataset, options.batch_size, workers=0)
    return [to_device(batch, device) for batch in itertools.islice(loader, count)]


def make_batches(
    options: PretrainOptions, corpus: Any, tokenizer: Tokenizer, run: Run
) -> Iterator[Batch]:
    """Returns this rank's micro-batches, from the run's step on.

    A stream has no bookmarks: a resumed run reads again what it has trained on, and skips it.
    """
    # Forked workers share memory until it is written to. The garbage collector writes into every
    # object that it visits, so each worker would get a copy of it; frozen objects are not visited.
    gc.freeze()
    start = run.step * options.accumulate // run.world_size
    ranks = {"rank": run.rank, "world_size": run.world_size, "workers": options.workers}
    if options.streaming:
        make = partial(make_dataset, options, tokenizer=tokenizer)
        loader = data.get_stream_dataloader(corpus, make, options.batch_size, **ranks)
    else:
        dataset = make_dataset(options, corpus, tokenizer)
        loader = data.get_split_dataloader(dataset, options.batch_size, start, **ranks)
    loader.worker_init_fn = leave_group  # Ctrl-C must not end the workers
    return iter_later(loader, skip=start if options.streaming else 0)


def iter_later(loader: Iterable[Batch], skip: int) -> Iterator[Batch]:
    """Yields the loader's batches, without the first `skip`. Its workers start only when the first
    batch is asked for.

    By then `Run.begin` has installed the handler that only notes Ctrl-C, and the workers inherit
    it. With the handler before, a Ctrl-C would end a worker that has not called `leave_group` yet.
    """
    yield from itertools.islice(loader, skip, None)


def what_identifies(
    options: PretrainOptions, tokenizer: Tokenizer, corpora: dict[str, Any], world_size: int
) -> dict[str, Any]:
    """Returns everything that must be the same when the run is resumed."""
    identity = {name: v for name, v in asdict(options).items() if name not in MAY_CHANGE}
    identity["tokenizer_hash"] = tokenizer_hash(tokenizer)
    identity["validation_key"] = corpora["validation"].key
    if options.streaming:
        # A worker's batches depend on which shards it reads. No more is known of a stream before it
        # has been read, so the key of its validation part stands for the corpus.
        identity["workers"] = options.workers
        identity["ranks"] = world_size
    else:
        identity["corpus_key"] = corpora["train"].key
    return identity


def pretrain(options: PretrainOptions) -> None:
    """Pretrains a model, or evaluates one with --steps 0: the whole of this script."""
    rank, world_size = join_processes(options.device, options.accumulate)
    device = choose_device(options.device)
    options = replace(options, precision=choose_precision(options.precision, device))
    if options.steps == 0:
        if rank == 0:
            evaluate_weights(options, device)
        return
    keep_freed_memory()
    check_lies_outside(options.out, options.dataset, "--dataset")
    with run_folder(options, rank) as out:
        run_pretraining(options, out, device, rank, world_size)


def run_pretraining(
    options: PretrainOptions, out: Path, device: torch.device, rank: int, world_size: int
) -> None:
    """Prepares tokenizer, corpus, model and run, and trains. Every rank runs this; only rank 0
    evaluates, and writes the model at the end.
    """
    torch.manual_seed(options.seed)  # decides the initial weights
    with first_process_first(rank):  # rank 0 tokenizes, the others find the result in the cache
        tokenizer = choose_tokenizer(options)
        # Before the corpus: wrong options should not fail after hours of tokenizing.
        model = make_model(options, tokenizer)
        corpora = load_corpora(options, tokenizer)
    model.to(device).train()
    optimizer = make_optimizer(model)
    validation = make_validation(options, corpora["validation"], tokenizer, device)

    # Two losses to compare with: of a model that knows nothing, and of one that knows how often
    # each token occurs. (A stream has not been read yet: its validation documents stand in.)
    counted = corpora["validation" if options.streaming else "train"]
    baselines = {
        "ln_vocab_size": math.log(model.config.vocab_size),
        "unigram_entropy": counted.unigram_entropy(),
    }

    def export_folder(step: int) -> Path:
        return out / "models" / f"step-{step}"

    identity = what_identifies(options, tokenizer, corpora, world_size)
    run = Run(out, rank, world_size, options.steps, identity)
    if options.resume:
        run.resume(model=model, optimizer=optimizer)  # loads weights, moments and step
    batches = make_batches(options, corpora["train"], tokenizer, run)
    run.begin(options)
    if rank == 0:
        for split, corpus in corpora.items():
            if isinstance(corpus, data.TokenizedCorpus):
                print(f"{split}: {corpus.describe()}")
        print(*(f"{name} {value:.3f} nats" for name, value in baselines.items()))
        print(f"precision {options.precision}, dropout {options.dropout:g}")
        for step in options.export_steps or ():
            if step < run.step and not export_folder(step).exists():
                print(f"--export-steps {step}: the run is past it; models/step-{step} is not made")

    def report(step: int) -> None:
        metrics = evaluate(model, validation, options.precision)
        run.write("validation", step, **metrics, **baselines)
        numbers = "  ".join(f"{name} {value:.3f}" for name, value in metrics.items())
        example = probe(model, validation[0], tokenizer, options.precision)
        run.show_above_bar(f"step {step}  {numbers}\n{example}")

    def export(step: int) -> None:
        write_model(model, tokenizer, export_folder(step))

    train(options, run, model, optimizer, batches, report, export)
    if rank == 0:
        write_model(model, tokenizer, out / "model")
        draw_pretraining(out)
    run.end()


if __name__ == "__main__":
    run_script(pretrain, PretrainOptions)
