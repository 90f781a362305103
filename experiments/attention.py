"""Draws where every head of a model attends: a grid of pictures, a row for each layer.

    python -m experiments.attention DIR "the cat sat on the mat" --out attention.png

Dimensions: layers, heads, seq.
"""

import argparse
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import data
from bert import Bert, MultiHeadAttention, attention, check_tokenizer, fetch
from support.curves import new_figure


@torch.no_grad()
def attention_probs(model: Bert, input_ids: Tensor) -> Tensor:
    """Returns the attention probabilities of one sequence, (layers, heads, seq, seq).

    input_ids: (1, seq). The fused attention never holds the probabilities. So a hook on each
    attention module computes them once more, from the same input and by the explicit `attention`.
    """
    seen: list[Tensor] = []

    def keep_probs(module: MultiHeadAttention, arguments: tuple[Tensor, Tensor], _: Tensor) -> None:
        x, mask = arguments
        q = module.split_heads(module.query(x))
        k = module.split_heads(module.key(x))
        v = module.split_heads(module.value(x))
        _, probs = attention(q, k, v, mask)  # (1, heads, seq, seq)
        seen.append(probs)

    modules = [module for module in model.modules() if isinstance(module, MultiHeadAttention)]
    hooks = [module.register_forward_hook(keep_probs) for module in modules]
    try:
        model.eval()(input_ids)
    finally:
        for hook in hooks:
            hook.remove()
    return torch.cat(seen)


def draw_attention(probs: Tensor, tokens: list[str]) -> Any:
    """Returns a figure of probabilities (layers, heads, seq, seq), with a panel for each head.

    A row of a panel belongs to a query, the token at its left. It shows how much this token attends
    to each of the tokens below, and adds up to 1.
    """
    layers, heads, length, _ = probs.shape
    side = max(1.2, 0.14 * length)  # inches of a panel
    size = (side * heads + 1.5, side * layers + 1.5)
    figure = new_figure(size)
    panels = figure.subplots(layers, heads, sharex=True, sharey=True, squeeze=False)
    for (layer, head), panel in np.ndenumerate(panels):
        image = panel.imshow(probs[layer, head].numpy(), vmin=0, vmax=1, cmap="viridis")
        panel.set_title(f"layer {layer + 1}, head {head + 1}", fontsize=7)
        panel.set_xticks(range(length), tokens, rotation=90, fontsize=6)
        panel.set_yticks(range(length), tokens, fontsize=6)
    figure.colorbar(image, ax=panels, label="probability", shrink=0.5)
    figure.supxlabel("key: attended to")
    figure.supylabel("query: attends")
    return figure


LARGEST_PICTURE = 12 * 12 * 100**2  # 100 tokens with base, which take 1.5 GiB


def draw_text(source: str, text: str, out: str) -> None:
    """Draws a model's attention in a text to a file. source: a directory or a hub id."""
    if not Path(out).resolve().parent.is_dir():
        raise ValueError(f"--out {out}: its folder does not exist")
    text.encode()  # raises ValueError if it is not UTF-8
    directory = fetch(source)
    tokenizer = data.load_tokenizer(directory)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # heads that are not used
        model = Bert.from_pretrained(directory)
    check_tokenizer(model, tokenizer)
    ids = tokenizer.encode(text).ids  # with [CLS] and [SEP]
    if model.config.encoder_layers * model.config.head_num * len(ids) ** 2 > LARGEST_PICTURE:
        raise ValueError(f"{len(ids)} tokens make too large a picture: take a shorter text")
    probs = attention_probs(model, torch.tensor([ids]))
    tokens = [str(tokenizer.id_to_token(id)) for id in ids]
    draw_attention(probs, tokens).savefig(out, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="experiments.attention", description=__doc__.splitlines()[0]
    )
    parser.add_argument("source", help="directory or hub id of a model")
    parser.add_argument("text", help="what the model reads")
    parser.add_argument("--out", default="attention.png", help="the picture (default: %(default)s)")
    arguments = parser.parse_args()
    try:
        draw_text(arguments.source, arguments.text, arguments.out)
    except (ValueError, OSError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
