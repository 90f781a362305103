"""Pretrain BERT: masked language model + next sentence prediction.

    python train_pretrain.py                                      # the sample, on any machine
    python train_pretrain.py --dataset DIR --tokenizer vocab.txt --size base --out runs/base

Writes under --out: config.json (the options), metrics.jsonl (a line per log and evaluation; losses
in nats), model/ (weights and tokenizer in the published format), curves.png.

[BERT] Devlin et al. 2018, arXiv 1810.04805. [Code] google-research/bert, commit eedf5716.
B batch, V vocabulary, N masked tokens.
"""

import argparse
import itertools
import json
import math
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, NoReturn, get_args, get_type_hints

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor, nn
from tqdm import tqdm

import data
from bert import SIZES, BertConfig, BertPretrainModel, tokenizer_hash

Batch = dict[str, Tensor]

def option(default: Any, help: str, at_least: float | None = None, choices: Any = None) -> Any:
    """A field of an options class, with what its `--flag` says and accepts."""
    return field(default=default, metadata={"help": help, "least": at_least, "choices": choices})


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


def parse_options(cls: type, arguments: Sequence[str] | None = None) -> Any:
    """The options of a command line; any mistake ends it with one line and exit status 2."""
    parser = argparse.ArgumentParser(allow_abbrev=False)
    kinds = get_type_hints(cls)
    for f in fields(cls):
        kind = next(iter(get_args(kinds[f.name])), kinds[f.name])  # of a tuple, of X | None
        shown = f" (default: {f.default})" if f.default not in (None, False, ()) else ""
        name, text = "--" + f.name.replace("_", "-"), f.metadata["help"] + shown
        if kind is bool:
            parser.add_argument(name, help=text, action="store_true")
        else:
            nargs = "+" if isinstance(f.default, tuple) else None
            parser.add_argument(name, help=text, type=kind, default=f.default, nargs=nargs,
                                choices=f.metadata["choices"])
    parser.error = fail  # type: ignore[method-assign]  # argparse's own prints the whole usage
    chosen = vars(parser.parse_args(arguments))
    for f in fields(cls):
        value, least = chosen[f.name], f.metadata["least"]
        values = value if isinstance(value, list | tuple) else [value]
        if least is not None and any(v is not None and not v >= least for v in values):
            fail(f"--{f.name.replace('_', '-')} must be at least {least}, got {value}")
    return cls(**chosen)


def fail(message: str) -> NoReturn:
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


def run_script(main: Callable, cls: type, arguments: Sequence[str] | None = None) -> None:
    """A user's mistake is a ValueError: it becomes one line. Any other exception is ours."""
    try:
        main(parse_options(cls, arguments))
    except ValueError as error:
        fail(str(error))


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
    """The tokenizer of the `weights`; `ValueError` if another one is named. Under another
    vocabulary every id means another word, and accuracy drops by points in silence."""
    own = data.load_tokenizer(weights)
    if tokenizer and tokenizer_hash(data.load_tokenizer(tokenizer)) != tokenizer_hash(own):
        raise ValueError(f"--tokenizer {tokenizer} is not the one that {weights} was trained with")
    return own


def learning_rate(step: int, peak: float, warmup: int, steps: int) -> float:
    """Of step 0 .. steps - 1: linear warmup to the peak, linear decay towards 0. [BERT] A.2. Warmup
    since Adam's first estimates are poor and post-LN gradients large at the start. Differs:
    [Code]'s first step has learning rate 0, and so changes nothing."""
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * (steps - step) / (steps - warmup)


def make_optimizer(model: nn.Module) -> torch.optim.AdamW:
    """AdamW with decay 0.01. [BERT] A.2, [Code] optimization.py, also for eps. Biases and norms do
    not decay: 0 is no better place for them. Differs: [Code] has no bias correction of moments."""
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


def progress_bar(steps: int, name: str | None = None) -> tqdm:
    """Steps done, steps a second and the time that is left; in a log file, a line now and then."""
    interval = 0.5 if sys.stderr.isatty() else 30.0
    return tqdm(total=steps, unit="step", desc=name, dynamic_ncols=True, mininterval=interval)


def write_line(out: Path, **values: Any) -> None:
    """Adds a line to the run's metrics.jsonl."""
    with (out / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(values) + "\n")


def read_lines(out: Path, split: str) -> dict[str, list]:
    """The columns of a run's metrics.jsonl for "train" or "validation"."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    lines = [line for line in lines if line["split"] == split]
    return {name: [line[name] for line in lines] for name in lines[0]} if lines else {}


def to_device(batch: Batch, device: torch.device) -> Batch:
    """The batch with `positions` and `mlm_targets`, (N,), of its masked tokens. They are found
    before the copy: on a GPU, the step would have to wait for their number."""
    labels = batch["mlm_labels"].flatten()
    positions = (labels != data.NOT_SCORED).nonzero().flatten()
    batch = {**batch, "positions": positions, "mlm_targets": labels[positions]}
    return {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}


def forward(model: BertPretrainModel, batch: Batch) -> tuple[Tensor, Tensor]:
    """mlm_logits (N, V) and nsp_logits (B, 2); on a GPU, from bfloat16 to float32."""
    device = batch["input_ids"].device.type
    with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
        mlm_logits, nsp_logits = model(
            batch["input_ids"], batch["token_type_ids"], positions=batch["positions"])
    if device == "cuda":
        mlm_logits, nsp_logits = mlm_logits.float(), nsp_logits.float()
    return mlm_logits, nsp_logits


def add_gradients(model: BertPretrainModel, batches: list[Batch]) -> tuple[Tensor, Tensor]:
    """Adds the gradient of a step, given in micro-batches. Returns its two losses in nats.
    Loss = mean over all masked tokens of the step + mean over its pairs. [BERT] A.2. A mean of the
    micro-batches' means would be another loss: their numbers of masked tokens differ."""
    masked = sum(len(batch["positions"]) for batch in batches)
    pairs = sum(len(batch["nsp_labels"]) for batch in batches)
    losses = []
    for batch in batches:
        mlm_logits, nsp_logits = forward(model, batch)
        mlm_loss = F.cross_entropy(mlm_logits, batch["mlm_targets"], reduction="sum") / masked
        nsp_loss = F.cross_entropy(nsp_logits, batch["nsp_labels"], reduction="sum") / pairs
        (mlm_loss + nsp_loss).backward()
        losses.append(torch.stack([mlm_loss.detach(), nsp_loss.detach()]))
    return tuple(torch.stack(losses).sum(dim=0))


@torch.no_grad()
def evaluate(model: BertPretrainModel, batches: Iterable[Batch]) -> dict[str, float]:
    """Means over all masked tokens and all pairs; losses in nats, perplexity of the MLM alone.
    `commonest_prediction`: the share of masked tokens that get the most frequent prediction, 1.0
    where the model says the same token everywhere."""
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
        "mlm_loss": mlm_loss / masked, "perplexity": float(np.exp(mlm_loss / masked)),
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


def prepare(options: PretrainOptions) -> tuple[BertPretrainModel, Tokenizer, dict]:
    """The model, its tokenizer, and the corpus of each split."""
    if options.weights:
        tokenizer = matching_tokenizer(options.weights, options.tokenizer)
    elif options.tokenizer:
        tokenizer = data.load_tokenizer(options.tokenizer)
    else:
        rows = data.get_dataset(options.dataset, options.dataset_name)
        if options.text_column not in rows.column_names:
            raise ValueError(f"no --text-column {options.text_column} in {rows.column_names}")
        tokenizer = data.train_tokenizer(rows[options.text_column], options.vocab_size)
    corpora = {
        split: data.get_corpus(options.dataset, split, tokenizer, options.dataset_name,
                               text_column=options.text_column, processes=options.workers or None,
                               rows_per_document=options.rows_per_document)
        for split in ("train", "validation")
    }
    if options.weights:
        model = BertPretrainModel.from_pretrained(options.weights)
    else:
        config = BertConfig.named(options.size, vocab_size=max(tokenizer.get_vocab().values()) + 1,
                                  max_seq_length=options.max_seq_length)
        model = BertPretrainModel(config, tokenizer.get_vocab()[data.PAD])
    if options.max_seq_length > model.config.max_seq_length:
        raise ValueError(f"--max-seq-length exceeds the weights' {model.config.max_seq_length}")
    return model, tokenizer, corpora


def pretrain(options: PretrainOptions) -> None:
    out, device = start_run(options)
    model, tokenizer, corpora = prepare(options)
    examples = {
        split: data.PretrainDataset(corpus, tokenizer, options.max_seq_length, options.seed,
                                    options.whole_word_masking)
        for split, corpus in corpora.items()
    }
    entropy = corpora["train"].unigram_entropy()
    baselines = {"ln_vocab_size": math.log(model.config.vocab_size), "unigram_entropy": entropy}
    for split, corpus in corpora.items():
        print(f"{split}: {len(corpus.documents) - 1} documents, {len(corpus):,} tokens; "
              f"documents left out: {corpus.skipped}")
    print(", ".join(f"{name} {value:.3f} nats" for name, value in baselines.items()))

    fixed = data.get_split_dataloader(examples["validation"], options.batch_size, workers=0)
    number = min(options.eval_batches, math.ceil(len(examples["validation"]) / options.batch_size))
    validation = [to_device(batch, device) for batch in itertools.islice(fixed, number)]
    training = data.get_split_dataloader(examples["train"], options.batch_size,
                                         workers=options.workers)
    batches, model = iter(training), model.to(device).train()
    optimizer = make_optimizer(model)
    warmup = options.steps // 10 if options.warmup_steps is None else options.warmup_steps
    tokens, started = 0, time.perf_counter()
    bar = progress_bar(options.steps)
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
            shown = f"loss {mlm_loss + nsp_loss:.3f}, {tokens / seconds:,.0f} tokens/s"
            bar.set_postfix_str(shown, refresh=False)
    bar.close()
    model.save_pretrained(out / "model", tokenizer)
    draw_curves(out)


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
    for name in ("mlm_accuracy", "nsp_accuracy", "commonest_prediction"):
        right.plot(validation["step"], validation[name], label=name)
    left.set(xlabel="step", ylabel="MLM loss, nats", title="masked language model")
    right.set(xlabel="step", ylim=(0, 1.02), title="validation")
    left.legend()
    right.legend()
    figure.savefig(out / "curves.png", dpi=120)


if __name__ == "__main__":
    run_script(pretrain, PretrainOptions)
