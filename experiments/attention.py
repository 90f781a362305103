"""Draws where every head of a model attends: a grid of pictures, a row for each layer.

    python -m experiments.attention DIR "the cat sat on the mat" attention.png

DIR is a directory or a hub id. Dimensions: layers, heads, seq.
"""

import sys
from typing import Any

import numpy as np
import torch
from torch import Tensor

import data
from bert import Bert, MultiHeadAttention, attention
from experiments.curves import new_figure


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


def draw(probs: Tensor, tokens: list[str]) -> Any:
    """Returns a figure of probabilities (layers, heads, seq, seq), with a panel for each head.

    A row of a panel belongs to a query, the token at its left. It shows how much this token attends
    to each of the tokens below, and adds up to 1.
    """
    layers, heads, length, _ = probs.shape
    side = max(1.2, 0.14 * length)  # inches of a panel
    figure = new_figure((side * heads + 1.5, side * layers + 1.5))
    panels = figure.subplots(layers, heads, sharex=True, sharey=True, squeeze=False)
    for (layer, head), panel in np.ndenumerate(panels):
        image = panel.imshow(probs[layer, head].numpy(), vmin=0, vmax=1)
        panel.set_title(f"layer {layer + 1}, head {head + 1}", fontsize=7)
        panel.set_xticks(range(length), tokens, rotation=90, fontsize=6)
        panel.set_yticks(range(length), tokens, fontsize=6)
    figure.colorbar(image, ax=panels, label="probability", shrink=0.5)
    figure.supxlabel("key: attended to")
    figure.supylabel("query: attends")
    return figure


def main(source: str, text: str, picture: str = "attention.png") -> None:
    """Draws a model's attention in a text to a file."""
    encoded = data.load_tokenizer(source).encode(text)  # with [CLS] and [SEP]
    model = Bert.from_pretrained(source)
    probs = attention_probs(model, torch.tensor([encoded.ids]))
    draw(probs, encoded.tokens).savefig(picture, dpi=120)


if __name__ == "__main__":
    main(*sys.argv[1:])
