"""A published model here and in transformers: the same tokens, the same hidden states.

    python -m experiments.compare_published MODEL_DIR CORPUS \
        >> results/published_weights/compare.jsonl

500 sentences of the corpus, of mixed lengths, in padded batches of 32, in float32; 20,000 of its
lines for the tokens. One JSON line each.
"""

import itertools
import json
import sys
from pathlib import Path

import torch
import transformers


from bert import Bert
from data import get_dataset, load_tokenizer, split_sentences


def compare_tokens(directory: str, lines: list[str]) -> dict:
    """Ids of each line by transformers, by its tokenizer.json here, and by its vocab.txt here."""
    theirs = transformers.AutoTokenizer.from_pretrained(directory)
    expected = theirs(lines)["input_ids"]
    differ = {}
    for name in ("tokenizer.json", "vocab.txt"):
        tokenizer = load_tokenizer(Path(directory) / name)
        ids = [encoding.ids for encoding in tokenizer.encode_batch(lines)]
        differ[name] = sum(a != b for a, b in zip(ids, expected, strict=True))
    tokens = sum(map(len, expected))
    unknown = sum(ids.count(theirs.unk_token_id) for ids in expected)
    return {"lines": len(lines), "tokens": tokens, "unknown": unknown, "lines_that_differ": differ}


@torch.no_grad()
def compare_outputs(directory: str, sentences: list[str]) -> dict:
    """The largest absolute difference on real tokens, for both paths of attention."""
    theirs = transformers.AutoModel.from_pretrained(directory, dtype=torch.float32).eval()
    tokenizer = load_tokenizer(directory)
    tokenizer.enable_padding()
    batches = [
        torch.tensor([encoding.ids for encoding in tokenizer.encode_batch(sentences[i : i + 32])])
        for i in range(0, len(sentences), 32)
    ]
    lengths = [int(n) for batch in batches for n in (batch != 0).sum(dim=1)]
    about: dict = {"sentences": len(sentences), "shortest": min(lengths), "longest": max(lengths)}
    for fused in (True, False):
        ours = Bert.from_pretrained(directory, fused_attention=fused)
        largest = {"hidden_states": 0.0, "pooled": 0.0}
        for input_ids in batches:
            mask = input_ids != ours.padding_idx
            expected, states = theirs(input_ids, mask), ours(input_ids)
            for name, difference in {
                "hidden_states": (states - expected.last_hidden_state)[mask],
                "pooled": ours.pool(states) - expected.pooler_output,
            }.items():
                largest[name] = max(largest[name], float(difference.abs().max()))
        about["fused attention" if fused else "explicit attention"] = largest
    return about


def main(directory: str, corpus: str) -> None:
    texts = get_dataset(corpus)["text"]
    lines = (line for text in texts for line in text.splitlines() if line.strip())
    tokens = compare_tokens(directory, list(itertools.islice(lines, 20000)))
    sentences = [s for text in texts[:50] for s in split_sentences(text)[100:110]]
    outputs = compare_outputs(directory, sentences)
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    for compared, found in {"tokens": tokens, "outputs": outputs}.items():
        print(json.dumps({"compared": compared, **found, **versions}))


if __name__ == "__main__":
    main(*sys.argv[1:])
