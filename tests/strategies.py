"""What the tests draw: configurations, batches, tokenizers and corpora, all valid by construction.

Every strategy shrinks to the simplest case: one head, one layer, two tokens.
"""

import math

import datasets
import numpy as np
import torch
from hypothesis import strategies as st

import data
from bert import BertConfig

# All sizes differ, so that a transposed axis cannot hide.
FIXED = BertConfig(
    max_seq_length=17,
    vocab_size=31,
    d_model=12,
    attention_d_k=10,
    attention_d_v=14,
    head_num=2,
    d_feed_forward=22,
    encoder_layers=3,
    dropout=0.0,
    attention_dropout=0.0,
)
PADDING = 0
seeds = st.integers(0, 2**31)


@st.composite
def configs(draw: st.DrawFn, published: bool = False) -> BertConfig:
    """Without dropout. `published`: d_k = d_v = d_model, which is all that other code can hold."""
    heads = draw(st.integers(1, 3))
    d_k, d_v = (heads * draw(st.integers(1, 4)) for _ in "kv")
    width = heads * draw(st.integers(2, 4)) if published else draw(st.integers(2, 9))
    return BertConfig(
        max_seq_length=draw(st.integers(2, 12)),
        vocab_size=draw(st.integers(3, 40)),
        d_model=width,
        attention_d_k=width if published else d_k,
        attention_d_v=width if published else d_v,
        head_num=heads,
        d_feed_forward=draw(st.integers(1, 20)),
        encoder_layers=draw(st.integers(1, 3)),
        dropout=0.0,
        attention_dropout=0.0,
    )


@st.composite
def batches(draw: st.DrawFn, config: BertConfig) -> tuple[torch.Tensor, torch.Tensor]:
    """input_ids, each row of at least one real token and then padding, and token_type_ids."""
    length = draw(st.integers(1, config.max_seq_length))
    rows = draw(st.lists(st.integers(1, length), min_size=1, max_size=3))
    generator = torch.Generator().manual_seed(draw(seeds))
    shape = (len(rows), length)
    input_ids = torch.randint(1, config.vocab_size, shape, generator=generator)
    token_type_ids = torch.randint(0, config.type_vocab_size, shape, generator=generator)
    padded = torch.arange(length) >= torch.tensor(rows)[:, None]
    return input_ids.masked_fill(padded, PADDING), token_type_ids.masked_fill(padded, 0)


# ---- A small vocabulary: ordinary ids start at 5 ---------------------------------------------

LETTERS = "abcdefghijklmnopqrstuvwxyz"
VOCABULARY = [*data.SPECIAL_TOKENS, *LETTERS, *(f"##{c}" for c in LETTERS[:9]), "."]


def small_tokenizer():
    return data.wordpiece({token: i for i, token in enumerate(VOCABULARY)})


def corpus_of(documents: list[list[list[int]]]) -> data.TokenizedCorpus:
    """Documents of sentences of token ids, as stage 1 would have left them."""
    columns: dict[str, list] = {"tokens": [], "starts": [], "sentences": []}
    for sentences in documents:
        kept = sentences if len(sentences) > 1 else []
        columns["tokens"].append([token for sentence in kept for token in sentence])
        columns["starts"].append(
            [int(n) for n in np.cumsum([0, *map(len, kept)])[:-1]][: len(kept)]
        )
        columns["sentences"].append(len(sentences))
    features = datasets.Features(
        {
            "tokens": datasets.List(datasets.Value("uint16")),
            "starts": datasets.List(datasets.Value("uint32")),
            "sentences": datasets.Value("int64"),
        }
    )
    return data.TokenizedCorpus(datasets.Dataset.from_dict(columns, features=features))


@st.composite
def documents(draw: st.DrawFn, most: int = 6, longest: int = 30) -> list[list[list[int]]]:
    """2 to `most` documents of 2 to 8 sentences of 1 to `longest` tokens."""
    generator = np.random.default_rng(draw(seeds))
    sizes = st.lists(st.integers(1, longest), min_size=2, max_size=8)
    return [
        [generator.integers(5, len(VOCABULARY), size).tolist() for size in sentences]
        for sentences in draw(st.lists(sizes, min_size=2, max_size=most))
    ]


def original(batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Returns the ids before masking: the label where there is one."""
    labels = batch["mlm_labels"]
    return torch.where(labels == data.IGNORED_LABEL, batch["input_ids"], labels)


def candidates_of(batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Returns True where a token may be masked, bool (batch, seq): not at [CLS], [SEP], [PAD]."""
    ids = original(batch)
    special = [data.SPECIAL_TOKENS.index(name) for name in ("[PAD]", "[CLS]", "[SEP]")]
    return ~torch.isin(ids, torch.tensor(special))


def is_within(share: float, expected: float, draws: int) -> bool:
    """Five standard deviations: a right share is outside once in 1.7 million times."""
    return abs(share - expected) < 5 * math.sqrt(expected * (1 - expected) / draws)


def sentences_of_lengths(documents: list[list[int]]) -> list[list[list[int]]]:
    """Returns documents whose sentences have these lengths, and one token, again and again."""
    return [[[7] * length for length in lengths] for lengths in documents]


def corpora_of_all_kinds(room: int) -> dict[str, list[list[int]]]:
    """Returns the sentence lengths of the documents of corpora that differ in every respect which
    the drawing of pairs of `room` tokens depends on, by the name of their kind.
    """
    rng = np.random.default_rng(0)

    def document(tokens: int, shortest: int, longest: int) -> list[int]:
        lengths = [min(shortest, tokens - 1)]
        while sum(lengths) < tokens:
            length = int(rng.integers(shortest, longest + 1))
            lengths.append(min(length, tokens - sum(lengths)))
        return lengths

    def novel() -> list[int]:
        """Stretches of dialogue and stretches of narration."""
        stretches = [
            document(int(rng.integers(60, 600)), *rng.choice([(2, 9), (15, 60)])) for _ in range(12)
        ]
        return [length for stretch in stretches for length in stretch]

    return {
        "novels": [novel() for _ in range(9)],
        "mixed lengths": [
            *(document(int(rng.integers(room, 2 * room)), 3, 30) for _ in range(200)),
            *(document(16 * room, 3, 30) for _ in range(30)),
        ],
        "hardly longer than a pair": [document(room + 5, 3, 30) for _ in range(200)],
        "shorter than a pair": [document(int(rng.integers(2, room)), 1, 12) for _ in range(500)],
        "one-token sentences": [[1] * int(rng.integers(2, 3 * room)) for _ in range(150)],
        "sentences longer than a pair": [
            document(int(rng.integers(4 * room, 9 * room)), 2 * room, 4 * room) for _ in range(40)
        ],
        "two documents": [document(20 * room, 3, 30), document(3 * room, 2, 90)],
    }


def numbered(documents: list[list[list[int]]]) -> list[list[list[int]]]:
    """The same shapes, but token k of the corpus has id 1000 + k: every id names its place."""
    place = iter(range(1000, 65000))
    return [[[next(place) for _ in sentence] for sentence in document] for document in documents]


def place_tokenizer(size: int = 20_000):
    """A tokenizer with an id for every place of a `numbered` corpus."""
    names = [*data.SPECIAL_TOKENS, *(f"t{i}" for i in range(5, size))]
    return data.wordpiece({token: i for i, token in enumerate(names)})
