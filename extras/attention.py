"""Look into a model: its size by part, what it puts in place of masks, where its heads attend.

    python bert.py DIR "the [MASK] sat on the [MASK]"
    python bert.py DIR "the cat sat on the mat" --attention attention.png

A heads, T sequence, N masks.
"""

import argparse
import re
import sys
import warnings
from collections import Counter
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor

import bert
from bert import Bert, BertPretrainModel


def parameter_counts(model: torch.nn.Module) -> Counter[str]:
    """Of each part, all layers together. They add up to all: the tied matrix is there once."""
    counts: Counter[str] = Counter()
    for name, parameter in model.named_parameters():
        part = re.sub(r"^bert\.|(?<=layers\.)\d+\.|\.(weight|bias)$", "", name)
        counts[".".join(part.split(".")[:2])] += parameter.numel()
    return counts


def encode(tokenizer: Any, text: str) -> Tensor:
    """(1, T), with [CLS], [SEP] and such [MASK]s as the text has."""
    return torch.tensor([tokenizer.encode(text).ids])


@torch.no_grad()
def fill_masks(model: BertPretrainModel, tokenizer: Any, text: str, k: int = 5) -> list[dict]:
    """The k likeliest tokens, with probabilities, for each `[MASK]` of the text."""
    input_ids = encode(tokenizer, text)
    positions = (input_ids[0] == tokenizer.token_to_id("[MASK]")).nonzero().flatten()
    mlm_logits, _ = model.eval()(input_ids, positions=positions)
    top = mlm_logits.softmax(dim=-1).topk(k)  # (N, k)
    rows = zip(top.indices.tolist(), top.values.tolist(), strict=True)
    return [dict(zip(map(tokenizer.id_to_token, ids), probs, strict=True)) for ids, probs in rows]


@torch.no_grad()
def attention_probs(model: Bert, input_ids: Tensor) -> Tensor:
    """(layers, A, T, T) for one sequence (1, T), by a model with `fused_attention=False`: the other
    path never holds the probabilities."""
    seen, attention = [], bert.attention

    def attention_that_keeps(*arguments: Any) -> tuple[Tensor, Tensor]:
        heads, probs = attention(*arguments)
        seen.append(probs)
        return heads, probs

    with mock.patch("bert.attention", attention_that_keeps):
        model.eval()(input_ids)
    return torch.cat(seen)


def draw_attention(probs: Tensor, tokens: list[str]) -> Any:
    """A figure of probabilities (layers, A, T, T): a row for each layer, a column for each head. In
    a panel, the token at the left looks at the tokens below; its row adds up to 1."""
    from matplotlib.figure import Figure

    layers, heads, length, _ = probs.shape
    side = max(1.2, 0.14 * length)  # inches of a panel
    figure = Figure(figsize=(side * heads + 1.5, side * layers + 1.5), layout="constrained")
    panels = figure.subplots(layers, heads, sharex=True, sharey=True, squeeze=False)
    for (layer, head), panel in np.ndenumerate(panels):
        image = panel.imshow(probs[layer, head].numpy(), vmin=0, vmax=1, cmap="viridis")
        panel.set_title(f"layer {layer + 1}, head {head + 1}", fontsize=7)
        panel.set_xticks(range(length), tokens, rotation=90, fontsize=6)
        panel.set_yticks(range(length), tokens, fontsize=6)
    figure.colorbar(image, ax=panels, label="probability", shrink=0.5)
    figure.supxlabel("key: looked at")
    figure.supylabel("query: looks")
    return figure


def look(source: str, text: str, attention: str | None) -> None:
    from data import load_tokenizer  # here, since --help need not wait for it

    if attention and not Path(attention).resolve().parent.is_dir():
        raise ValueError(f"--attention {attention}: its folder does not exist")
    directory = bert.fetch(source)
    tokenizer = load_tokenizer(directory)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what is missing is looked at below
        model = BertPretrainModel.from_pretrained(directory, fused_attention=False)
    bert.check_padding(model, tokenizer)
    has_head = not any(name.startswith("mlm_") for name in model.initialized)
    counts = parameter_counts(model if has_head else model.bert)
    for part, count in (*counts.items(), ("in all", counts.total())):
        print(f"{count:>13,}  {part}")
    if "[MASK]" in text and not has_head:
        raise ValueError(f"{directory} has no head to fill a [MASK] with, the encoder alone")
    for best in fill_masks(model, tokenizer, text):
        print("[MASK]  " + "  ".join(f"{token} {prob:.3f}" for token, prob in best.items()))
    if attention:
        input_ids = encode(tokenizer, text)
        tokens = [str(tokenizer.id_to_token(i)) for i in input_ids[0]]
        draw_attention(attention_probs(model.bert, input_ids), tokens).savefig(attention, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(prog="bert.py", description=__doc__.splitlines()[0])
    parser.add_argument("source", help="directory or hub id of a model")
    parser.add_argument("text", nargs="?", default="", help="with [MASK] for tokens to be guessed")
    parser.add_argument("--attention", metavar="PNG", help="draw every head's attention to a file")
    try:
        look(**vars(parser.parse_args()))
    except (ValueError, OSError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
