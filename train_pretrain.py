"""Pretrain BERT: masked language model + next sentence prediction.

    python train_pretrain.py                                      # the sample, on any machine
    python train_pretrain.py --dataset DIR --tokenizer vocab.txt --size base --out runs/base

Writes under --out: config.json (the options), metrics.jsonl (a line per log and evaluation; losses
in nats), model/ (weights and tokenizer in the published format), curves.png.

[BERT] Devlin et al. 2018, arXiv 1810.04805. [Code] google-research/bert, commit eedf5716.

B batch, T sequence, V vocabulary, N masked tokens of the batch.
"""

import argparse
import itertools
import json
import math
import sys
import time
import typing
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor, nn
from tqdm import tqdm

import data
from bert import SIZES, BertConfig, BertPretrainModel, tokenizer_hash

Options = TypeVar("Options")
Batch = dict[str, Tensor]

# ---- Options: one dataclass is the defaults, the command line and its help ----------------------


def option(default: Any, meaning: str, at_least: float | None = None, choices: Any = None) -> Any:
    """A field of an options class, with what its `--flag` says and accepts."""
    metadata = {"help": meaning, "at_least": at_least, "choices": choices}
    return field(default=default, metadata=metadata)


@dataclass
class PretrainOptions:
    out: str = option("runs/pretrain", "a new folder for all that the run writes")
    dataset: str = option("sample", "corpus: sample, a file, a directory or a hub id")
    dataset_name: str | None = option(None, "the corpus's configuration, where it has several")
    text_column: str = option("text", "the corpus's column of text")
    rows_per_document: int = option(1, "rows that make a document; > 1 for a sentence a row", 1)
    tokenizer: str | None = option(None, "vocab.txt, tokenizer.json, directory or hub id")
    vocab_size: int = option(2000, "of the tokenizer that is learned without --tokenizer", 1)
    weights: str | None = option(None, "directory of a model to start from")
    size: str = option("tiny", "published size, without --weights", choices=list(SIZES))
    max_seq_length: int = option(64, "tokens in a pair of segments, with [CLS] and two [SEP]", 5)
    whole_word_masking: bool = option(False, "mask all the pieces of a word or none")
    batch_size: int = option(32, "pairs in a micro-batch", 1)
    accumulate: int = option(1, "micro-batches in a step", 1)
    steps: int = option(4000, "updates of the weights", 1)
    warmup_steps: int | None = option(None, "steps of rising learning rate; a tenth of all", 0)
    learning_rate: float = option(1e-3, "peak; base and large need 1e-4", 0)
    eval_every: int = option(250, "steps between evaluations", 1)
    eval_batches: int = option(16, "batches of an evaluation, at most", 1)
    log_every: int = option(10, "steps between lines of metrics.jsonl", 1)
    workers: int = option(2, "processes that prepare data", 0)
    seed: int = option(0, "of everything random", 0)
    device: str | None = option(None, "cpu or cuda; the GPU if there is one")


def parse_options(cls: type[Options], arguments: Sequence[str] | None = None) -> Options:
    """The options of a command line; any mistake ends it with one line and exit status 2."""
    parser = argparse.ArgumentParser(allow_abbrev=False)
    kinds = typing.get_type_hints(cls)
    for f in fields(cls):  # type: ignore[arg-type]
        kind = next(iter(typing.get_args(kinds[f.name])), kinds[f.name])  # of a tuple, of X | None
        shown = f" (default: {f.default})" if f.default not in (None, False, ()) else ""
        flag: dict[str, Any] = {"help": f.metadata["help"] + shown, "default": f.default}
        if kind is bool:
            flag["action"] = "store_true"
        else:
            flag |= {"type": kind, "choices": f.metadata["choices"]}
            flag["nargs"] = "+" if isinstance(f.default, tuple) else None
        parser.add_argument("--" + f.name.replace("_", "-"), **flag)
    parser.error = fail  # type: ignore[method-assign]  # argparse's own prints the whole usage
    chosen = vars(parser.parse_args(arguments))
    for f in fields(cls):  # type: ignore[arg-type]
        value, least = chosen[f.name], f.metadata["at_least"]
        values = value if isinstance(value, list | tuple) else [value]
        if least is not None and any(v is not None and not v >= least for v in values):
            fail(f"--{f.name.replace('_', '-')} must be at least {least}, got {value}")
    return cls(**chosen)


def fail(message: str) -> typing.NoReturn:
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


def run_script(main: Callable[[Options], None], cls: type[Options]) -> None:
    """A user's mistake is a ValueError: it becomes one line. Any other exception is ours."""
    options = parse_options(cls)
    try:
        main(options)
    except ValueError as error:
        fail(str(error))


# ---- What both scripts share --------------------------------------------------------------------


def start_run(options: Any) -> tuple[Path, torch.device]:
    """The run's folder, with its config.json, and its device; seeds the initialization."""
    out = Path(options.out)
    if (out / "metrics.jsonl").exists():
        raise ValueError(f"--out {out} holds another run; name a new folder")
    name = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"--device {name}, but torch sees no GPU here")
    out.mkdir(parents=True, exist_ok=True)
    (out / "config.json").write_text(json.dumps(asdict(options), indent=2) + "\n")
    torch.manual_seed(options.seed)
    return out, torch.device(name)


def matching_tokenizer(weights: str, tokenizer: str | None) -> Tokenizer:
    """The tokenizer that `weights` were trained with; `ValueError` if another one is named.

    Under another vocabulary every id means another word, and accuracy drops by points in silence.
    """
    own = data.load_tokenizer(weights)
    if tokenizer and tokenizer_hash(data.load_tokenizer(tokenizer)) != tokenizer_hash(own):
        raise ValueError(f"--tokenizer {tokenizer} is not the one that {weights} was trained with")
    return own


def learning_rate(step: int, peak: float, warmup: int, steps: int) -> float:
    """Of step 0 .. steps - 1: linear warmup to the peak, linear decay towards 0. [BERT] A.2

    Warmup, because Adam's first estimates are poor and post-LN gradients large at the start.
    Differs: [Code]'s first step has learning rate 0, and so changes nothing.
    """
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * (steps - step) / (steps - warmup)


def make_optimizer(model: nn.Module) -> torch.optim.AdamW:
    """AdamW, weight decay 0.01. [BERT] A.2, [Code] optimization.py; its eps is 1e-6.

    Biases and LayerNorms do not decay: they shift and scale, and 0 is no better place for a shift.
    """
    named = list(model.named_parameters())
    spared = [p for name, p in named if name.endswith("bias") or "norm" in name]
    decayed = [p for name, p in named if not (name.endswith("bias") or "norm" in name)]
    groups = [{"params": decayed, "weight_decay": 0.01}, {"params": spared, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.999), eps=1e-6, fused=True)


def update(model: nn.Module, optimizer: torch.optim.Optimizer, rate: float) -> None:
    """One step with the gradients that are there, clipped to norm 1 as in [Code]; clears them."""
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def write_line(out: Path, **values: Any) -> None:
    """Adds a line to the run's metrics.jsonl."""
    with (out / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(values) + "\n")


def read_lines(out: Path, split: str) -> dict[str, list]:
    """The columns of a run's metrics.jsonl for "train" or "validation"."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    lines = [line for line in lines if line["split"] == split]
    return {name: [line[name] for line in lines] for name in lines[0]} if lines else {}


# ---- One step -----------------------------------------------------------------------------------


def to_device(batch: Batch, device: torch.device) -> Batch:
    """The batch with `positions` and `mlm_targets`, (N,), of its masked tokens.

    They are found before the copy: on the GPU, the step would have to wait for their number.
    """
    labels = batch["mlm_labels"].flatten()
    positions = (labels != data.NOT_SCORED).nonzero().flatten()
    batch = {**batch, "positions": positions, "mlm_targets": labels[positions]}
    return {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}


def forward(model: BertPretrainModel, batch: Batch) -> tuple[Tensor, Tensor]:
    """mlm_logits (N, V) and nsp_logits (B, 2), float32; in between bfloat16, if on a GPU."""
    device = batch["input_ids"].device.type
    with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
        mlm_logits, nsp_logits = model(
            batch["input_ids"], batch["token_type_ids"], positions=batch["positions"])
    return mlm_logits.float(), nsp_logits.float()


def add_gradients(model: BertPretrainModel, batches: list[Batch]) -> tuple[Tensor, Tensor]:
    """Adds the gradient of a step's loss, given in its micro-batches. Returns both means, nats.

    Loss = mean over all masked tokens of the step + mean over its pairs. [BERT] A.2. The mean of
    the micro-batches' means would be another loss, for they have unequally many masked tokens.
    """
    masked = sum(len(batch["positions"]) for batch in batches)
    pairs = sum(len(batch["nsp_labels"]) for batch in batches)
    losses = []
    for batch in batches:
        mlm_logits, nsp_logits = forward(model, batch)
        mlm_loss = F.cross_entropy(mlm_logits, batch["mlm_targets"], reduction="sum") / masked
        nsp_loss = F.cross_entropy(nsp_logits, batch["nsp_labels"], reduction="sum") / pairs
        (mlm_loss + nsp_loss).backward()
        losses.append(torch.stack([mlm_loss.detach(), nsp_loss.detach()]))
    mlm_total, nsp_total = torch.stack(losses).sum(dim=0)
    return mlm_total, nsp_total


@torch.no_grad()
def evaluate(model: BertPretrainModel, batches: Iterable[Batch]) -> dict[str, float]:
    """Means over all masked tokens and all pairs; losses in nats, perplexity of the MLM alone.

    `commonest_prediction`: the share of the masked tokens that get the most frequent prediction,
    1.0 where the model says the same token everywhere.
    """
    model.eval()
    sums, predicted = np.zeros(6), []
    for batch in batches:
        mlm_logits, nsp_logits = forward(model, batch)
        targets, labels = batch["mlm_targets"], batch["nsp_labels"]
        predicted.append(mlm_logits.argmax(dim=-1))
        sums += [
            F.cross_entropy(mlm_logits, targets, reduction="sum").item(),
            (predicted[-1] == targets).sum().item(), len(targets),
            F.cross_entropy(nsp_logits, labels, reduction="sum").item(),
            (nsp_logits.argmax(dim=-1) == labels).sum().item(), len(labels),
        ]
    model.train()
    mlm_loss, mlm_correct, masked, nsp_loss, nsp_correct, pairs = sums
    return {
        "mlm_loss": mlm_loss / masked, "perplexity": math.exp(mlm_loss / masked),
        "mlm_accuracy": mlm_correct / masked,
        "nsp_loss": nsp_loss / pairs, "nsp_accuracy": nsp_correct / pairs,
        "commonest_prediction": torch.cat(predicted).bincount().max().item() / masked,
    }


@torch.no_grad()
def probe(model: BertPretrainModel, batch: Batch, tokenizer: Tokenizer) -> str:
    """What the model makes of the batch's first pair, to read."""
    length = batch["input_ids"].size(1)
    mine = batch["positions"] < length  # positions count through the rows
    predicted = forward(model.eval(), batch)[0].argmax(dim=-1)
    model.train()
    row = batch["input_ids"][0]
    ids = {"Input": row[row != model.padding_idx], "Target": batch["mlm_targets"][mine],
           "Predicted": predicted[mine]}
    tokens = {name: [str(tokenizer.id_to_token(i)) for i in row] for name, row in ids.items()}
    return "\n".join(f"{name} Tokens: {'|'.join(row)}" for name, row in tokens.items())


# ---- The run ------------------------------------------------------------------------------------


def prepare(options: PretrainOptions) -> tuple[BertPretrainModel, Tokenizer, dict]:
    """The model, its tokenizer, and the corpora by split."""
    if options.weights:
        tokenizer = matching_tokenizer(options.weights, options.tokenizer)
    elif options.tokenizer:
        tokenizer = data.load_tokenizer(options.tokenizer)
    else:
        rows = data.get_dataset(options.dataset, options.dataset_name)
        if options.text_column not in rows.column_names:
            raise ValueError(f"no --text-column {options.text_column} in {rows.column_names}")
        tokenizer = data.train_tokenizer(rows[options.text_column], options.vocab_size)
    stage_1 = {name: getattr(options, name) for name in ("text_column", "rows_per_document")}
    processes = options.workers if options.workers > 1 else None
    corpora = {
        split: data.get_corpus(options.dataset, split, tokenizer, options.dataset_name,
                               processes=processes, **stage_1)
        for split in ("train", "validation")
    }
    padding_idx = tokenizer.get_vocab()[data.PAD]
    if options.weights:
        model = BertPretrainModel.from_pretrained(options.weights)
    else:
        sizes = {"vocab_size": tokenizer.get_vocab_size(), "max_seq_length": options.max_seq_length}
        model = BertPretrainModel(BertConfig.named(options.size, **sizes), padding_idx)
    if options.max_seq_length > model.config.max_seq_length:
        raise ValueError(f"--max-seq-length {options.max_seq_length} exceeds the weights' "
                         f"{model.config.max_seq_length}")
    return model, tokenizer, corpora


def pretrain(options: PretrainOptions) -> None:
    out, device = start_run(options)
    model, tokenizer, corpora = prepare(options)
    examples = {
        split: data.PretrainDataset(corpus, tokenizer, options.max_seq_length, options.seed,
                                    options.whole_word_masking)
        for split, corpus in corpora.items()
    }
    baselines = {"ln_vocab_size": math.log(tokenizer.get_vocab_size()),
                 "unigram_entropy": corpora["train"].unigram_entropy()}
    for split, corpus in corpora.items():
        print(f"{split}: {len(corpus.documents) - 1} documents, {len(corpus):,} tokens; "
              f"left out, documents with {corpus.skipped}")
    print(", ".join(f"{name} {value:.3f} nats" for name, value in baselines.items()))

    fixed = data.get_split_dataloader(examples["validation"], options.batch_size, workers=0)
    number = min(options.eval_batches, math.ceil(len(examples["validation"]) / options.batch_size))
    validation = [to_device(batch, device) for batch in itertools.islice(fixed, number)]
    batches = iter(
        data.get_split_dataloader(examples["train"], options.batch_size, workers=options.workers))
    model = model.to(device).train()
    optimizer = make_optimizer(model)
    warmup = options.steps // 10 if options.warmup_steps is None else options.warmup_steps
    tokens, started = 0, time.perf_counter()
    bar = tqdm(total=options.steps, unit="step", dynamic_ncols=True)
    for step in range(options.steps + 1):
        if step % options.eval_every == 0 or step == options.steps:
            metrics = evaluate(model, validation)
            seconds = round(time.perf_counter() - started, 2)
            write_line(out, split="validation", step=step, tokens=tokens, seconds=seconds,
                       **metrics, **baselines)
            shown = "  ".join(f"{name} {value:.3f}" for name, value in metrics.items())
            bar.write(f"step {step}  {shown}\n{probe(model, validation[0], tokenizer)}")
        if step == options.steps:
            break
        # Dropout depends on (seed, step) alone, not on what ran before.
        torch.manual_seed(int(np.random.SeedSequence([options.seed, step]).generate_state(1)[0]))
        rate = learning_rate(step, options.learning_rate, warmup, options.steps)
        micro_batches = [next(batches) for _ in range(options.accumulate)]
        tokens += sum(int((b["input_ids"] != model.padding_idx).sum()) for b in micro_batches)
        losses = add_gradients(model, [to_device(batch, device) for batch in micro_batches])
        update(model, optimizer, rate)
        bar.update()
        if step % options.log_every == 0 or step + 1 == options.steps:
            mlm_loss, nsp_loss = (loss.item() for loss in losses)
            if not math.isfinite(mlm_loss + nsp_loss):
                raise ValueError(f"step {step}: the loss is {mlm_loss + nsp_loss}; "
                                 "try a lower --learning-rate or more --warmup-steps")
            seconds = round(time.perf_counter() - started, 2)
            write_line(out, split="train", step=step, tokens=tokens, seconds=seconds,
                       learning_rate=rate, mlm_loss=mlm_loss, nsp_loss=nsp_loss)
            bar.set_postfix_str(f"loss {mlm_loss + nsp_loss:.3f}, {tokens / seconds:,.0f} tokens/s")
    bar.close()
    model.save_pretrained(out / "model", tokenizer)
    draw_curves(out)
    print(f"{out}/model holds the weights and their tokenizer")


def draw_curves(out: Path) -> None:
    """curves.png: losses beside ln V and the unigram entropy; shares. Needs matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return
    train, validation = read_lines(out, "train"), read_lines(out, "validation")
    figure = Figure(figsize=(11, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.plot(train["step"], train["mlm_loss"], color="0.8", label="training")
    left.plot(validation["step"], validation["mlm_loss"], label="validation")
    for name, style in {"ln_vocab_size": ":", "unigram_entropy": "--"}.items():
        left.axhline(validation[name][0], color="black", linestyle=style, label=name)
    left.set(xlabel="step", ylabel="MLM loss, nats", title="masked language model")
    for name in ("mlm_accuracy", "nsp_accuracy", "commonest_prediction"):
        right.plot(validation["step"], validation[name], label=name)
    right.set(xlabel="step", ylim=(0, 1.02), title="validation")
    for axes in (left, right):
        axes.legend()
    figure.savefig(out / "curves.png", dpi=120)


if __name__ == "__main__":
    run_script(pretrain, PretrainOptions)
