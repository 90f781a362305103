"""What several test files share: strategies, small models and small corpora.

The strategies draw configurations, batches and corpora that are valid by construction, and shrink
to the simplest case: one head, one layer, two tokens.
"""

import dataclasses
import json
import math
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

import data
from bert import BertConfig, BertPretrainModel, PretrainedModel
from train_pretrain import PretrainLosses, add_gradients, count
from train_sst2 import SST2Batches

CPU = torch.device("cpu")

# ---- Small models ----------------------------------------------------------------------------

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

# Sums of a few dozen terms near 1 in float64, in another order.
EXACT = {"rtol": 1e-10, "atol": 1e-10}

seeds = st.integers(0, 2**31)
either = st.booleans()
lengths = st.integers(5, 40)  # of an example: a pair needs five tokens


@st.composite
def configs(draw: st.DrawFn, published: bool = False) -> BertConfig:
    """Draws every field of a configuration. If `published`, d_k = d_v = d_model: the published
    format cannot express anything else. Models are built in evaluation mode, so dropout is off.
    """
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
        type_vocab_size=draw(st.integers(1, 4)),
        dropout=draw(st.sampled_from([0.0, 0.3])),
        attention_dropout=draw(st.sampled_from([0.0, 0.6])),
        layer_norm_eps=draw(st.sampled_from([1e-12, 1e-3, 0.5])),
        initializer_range=draw(st.sampled_from([0.02, 0.5])),
        num_labels=draw(st.integers(1, 4)),
        fused_attention=draw(st.booleans()),
    )


class Case(NamedTuple):
    """A model, and a batch of rows of at least one token and then padding."""

    model: PretrainedModel
    input_ids: torch.Tensor
    token_type_ids: torch.Tensor
    is_token: torch.Tensor


@st.composite
def cases(draw: st.DrawFn, cls: type[PretrainedModel], published: bool = False, room: int = 0):
    """Draws a model, whose padding may be any id, and a batch for it. room: the model accepts
    sequences at least this many tokens longer than those of the batch.
    """
    config = draw(configs(published))
    padding = draw(st.integers(0, config.vocab_size - 1))
    length = draw(st.integers(1, config.max_seq_length))
    rows = draw(st.lists(st.integers(1, length), min_size=1, max_size=3))
    seed = draw(seeds)
    longer = dataclasses.replace(config, max_seq_length=config.max_seq_length + room)
    model = build(cls, longer, seed, padding)
    shape = (len(rows), length)
    input_ids = torch.randint(0, config.vocab_size - 1, shape)
    input_ids += input_ids >= padding  # any id but that of padding
    token_type_ids = torch.randint(0, config.type_vocab_size, shape)
    is_token = torch.arange(length) < torch.tensor(rows)[:, None]
    return Case(
        model, input_ids.where(is_token, padding), token_type_ids.where(is_token, 0), is_token
    )


def build(
    cls: type[PretrainedModel], config: BertConfig, seed: int = 0, padding_idx: int = PADDING
):
    """Returns a model in float64 whose weights are so large that every part shows in the output."""
    torch.manual_seed(seed)
    model = cls(config, padding_idx).double().eval()
    for name, parameter in model.named_parameters():
        is_norm = parameter.dim() == 1 and "norm.weight" in name
        torch.nn.init.normal_(parameter, mean=float(is_norm), std=0.5)  # biases and norms, too
    return model


def with_config(model: PretrainedModel, **changes) -> PretrainedModel:
    """Returns a model of the same weights, with some fields of its config changed."""
    config = dataclasses.replace(model.config, **changes)
    other = type(model)(config, model.padding_idx).double().eval()
    other.load_state_dict(model.state_dict())
    return other


# ---- A small vocabulary: ordinary ids start at 5 ---------------------------------------------

PAD, UNK, CLS, SEP, MASK = range(5)
LETTERS = "abcdefghijklmnopqrstuvwxyz"
VOCABULARY = [*data.SPECIAL_TOKENS, *LETTERS, *(f"##{c}" for c in LETTERS[:9]), "."]


def small_tokenizer() -> Tokenizer:
    return data.wordpiece({token: i for i, token in enumerate(VOCABULARY)})


@st.composite
def tokenizers(draw: st.DrawFn) -> Tokenizer:
    """Draws the small tokenizer with other ids: all tokens, special ones included, get random ids
    from a range twice as large as needed. Shrinks to the usual ids.
    """
    seed = draw(st.none() | seeds)
    if seed is None:
        return small_tokenizer()
    ids = np.random.default_rng(seed).permutation(2 * len(VOCABULARY)).tolist()
    return data.wordpiece(dict(zip(VOCABULARY, ids, strict=False)))


def ids_of(tokenizer: Tokenizer, *tokens: str) -> list[int]:
    return [tokenizer.token_to_id(token) for token in tokens]


# ---- Small models with this vocabulary -------------------------------------------------------

SMALL = dataclasses.replace(FIXED, vocab_size=len(VOCABULARY), max_seq_length=40)
# Of a shape that the published format has words for.
PUBLISHABLE = dataclasses.replace(
    FIXED, vocab_size=len(VOCABULARY), attention_d_k=12, attention_d_v=12
)
TINY = BertConfig.named("tiny", vocab_size=len(VOCABULARY), max_seq_length=16)


def publish(
    folder: Path,
    config: BertConfig = PUBLISHABLE,
    cls: type[PretrainedModel] = BertPretrainModel,
) -> Path:
    """Writes a new model with its tokenizer; returns its folder."""
    cls(config, PADDING).save_pretrained(folder, small_tokenizer())
    return folder


def change_config(published: Path, **changes) -> None:
    path = published / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def change_tensors(published: Path, **changes) -> None:
    path = published / "model.safetensors"
    save_file({**load_file(path), **changes}, path, metadata={"format": "pt"})


def dropouts_of(model: PretrainedModel) -> set[float]:
    """Returns all probabilities of dropout that a model has."""
    hidden = {module.p for module in model.modules() if isinstance(module, torch.nn.Dropout)}
    return hidden | {model.config.dropout, model.config.attention_dropout}


class Malicious:
    """An object whose unpickling runs code, which here only leaves a file."""

    def __init__(self, file: str) -> None:
        self.file = file

    def __reduce__(self):
        return open, (self.file, "w")


def some_batches(count: int, size: int = 3, seed: int = 0) -> list[dict[str, torch.Tensor]]:
    """Returns batches of a small corpus; rows differ in length, and so in their masked columns."""
    docs = [
        [[5 + (i * j + i) % 26 for i in range(3 + j)] for j in range(2, 6 + d)] for d in range(5)
    ]
    dataset = data.PretrainDataset(corpus_of(docs), small_tokenizer(), 40, seed)
    return [dataset.batch(range(i * size, (i + 1) * size)) for i in range(count)]


def gradients(model: BertPretrainModel, micro_batches: list[dict]) -> list[torch.Tensor]:
    """Returns both losses of a step, and the gradient of every parameter."""
    model.zero_grad()
    masked, pairs, _ = count(micro_batches, model.padding_idx)
    losses = add_gradients(PretrainLosses(model), micro_batches, masked, pairs)
    return [losses, *(parameter.grad.clone() for parameter in model.parameters())]


# ---- Small corpora ---------------------------------------------------------------------------


def corpus_of(documents: list[list[list[int]]], tokenizer=None) -> data.TokenizedCorpus:
    """Returns documents of sentences of token ids as a corpus, without those that have fewer than
    two sentences.
    """
    usable = [sentences for sentences in documents if len(sentences) > 1]
    return data.pack(usable, tokenizer or small_tokenizer())


@st.composite
def documents(draw: st.DrawFn, with_long: bool = True) -> list[list[list[int]]]:
    """Draws documents of all kinds, as sentences of token ids: 2 to 6 that pairs can be drawn from
    and, in between, up to two that a corpus leaves out because they have fewer than two sentences.

    A document has 2 to 8 sentences of 1 to 30 tokens, or up to 60 of one token, or, among shorter
    sentences, one of thousands of tokens. Some of the first kind are hardly longer than an example.
    """
    usual = st.lists(st.integers(1, 30), min_size=2, max_size=8)
    one_token = st.lists(st.just(1), min_size=2, max_size=60)
    kinds = [usual, usual, one_token]
    if with_long:
        around_thousands = st.tuples(usual, st.integers(1000, 3000), usual)
        kinds.append(around_thousands.map(lambda parts: [*parts[0], parts[1], *parts[2]]))
    kept = draw(st.lists(st.one_of(kinds), min_size=2, max_size=6))
    left_out = draw(st.lists(st.lists(st.integers(1, 30), max_size=1), max_size=2))
    sizes = draw(st.permutations([*kept, *left_out])) if left_out else kept
    generator = np.random.default_rng(draw(seeds))
    return [
        [generator.integers(5, len(VOCABULARY), size).tolist() for size in sentences]
        for sentences in sizes
    ]


@st.composite
def examples(
    draw: st.DrawFn, whole_words: st.SearchStrategy[bool] = either
) -> data.PretrainDataset:
    """Draws a corpus of all kinds, a tokenizer with any ids, and the arguments of a dataset."""
    tokenizer = draw(tokenizers())
    ids = ids_of(tokenizer, *VOCABULARY)
    docs = [[[ids[i] for i in sentence] for sentence in doc] for doc in draw(documents())]
    corpus = corpus_of(docs, tokenizer)
    return data.PretrainDataset(corpus, tokenizer, draw(lengths), draw(seeds), draw(whole_words))


def original(batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Returns the ids before masking: the label where there is one."""
    labels = batch["mlm_labels"]
    return torch.where(labels == data.IGNORED_LABEL, batch["input_ids"], labels)


def candidates_of(batch: dict[str, torch.Tensor], tokenizer: Tokenizer) -> torch.Tensor:
    """Returns True where a token may be masked, bool (batch, seq): not at [CLS], [SEP], [PAD]."""
    special = torch.tensor(ids_of(tokenizer, "[PAD]", "[CLS]", "[SEP]"))
    return ~torch.isin(original(batch), special)


def is_within(share: float, expected: float, draws: int) -> bool:
    """Returns whether a share is within five standard deviations of its expected value. If the code
    is right, it is outside once in 1.7 million times.
    """
    return abs(share - expected) < 5 * math.sqrt(expected * (1 - expected) / draws)


def sentences_of_lengths(documents: list[list[int]]) -> list[list[list[int]]]:
    """Returns documents whose sentences have these lengths and repeat the same token throughout."""
    return [[[7] * length for length in lengths] for lengths in documents]


def corpora_of_all_kinds(room: int) -> dict[str, list[list[int]]]:
    """Returns corpora, by the name of their kind, as the sentence lengths of each document. They
    differ in every respect that matters for drawing pairs of `room` tokens.
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
        "one-token last sentences": [
            [*document(int(rng.integers(5, 3 * room)), 3, 30), 1] for _ in range(150)
        ],
        "as long as an example": [document(room + 3, 3, 30) for _ in range(200)],
    }


# ---- Small corpora in files ------------------------------------------------------------------


TEXTS = ["aa b.\n\nc d", "ee f.\n\ng h", "ii a.\n\nb c"]


def write_rows(path: Path, rows: list[dict]) -> str:
    """Writes a jsonl file, and the folder that it is in; returns its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def write_texts(path: Path, texts: Iterable[str]) -> str:
    """Writes a jsonl file of documents; returns its path."""
    return write_rows(path, [{"text": text} for text in texts])


def write_corpus(folder: Path) -> Path:
    """Writes corpus.jsonl, a document for each letter, and tokenizer.json; returns the folder."""
    texts = ["\n\n".join(f"{a} {b} {a} {a} {b}" for b in LETTERS[:9]) for a in LETTERS]
    write_texts(folder / "corpus.jsonl", texts)
    small_tokenizer().save(str(folder / "tokenizer.json"))
    return folder


def write_many_documents(path: Path) -> str:
    """Writes 104 documents of nine sentences of three words each; returns the path."""
    texts = [
        ". ".join(f"{a}{b} {b} {a}{a}" for b in LETTERS[i % 13 :][:9])
        for i, a in enumerate(LETTERS * 4)
    ]
    return write_texts(path, texts)


def write_reviews(folder: Path, **splits: int) -> str:
    """Writes splits of so many sentences of five letters, with label 1 if they are of the first
    half of the alphabet; returns the folder.
    """
    generator = np.random.default_rng(0)
    for split, size in splits.items():
        labels = generator.integers(0, 2, size)
        words = [generator.choice(list(LETTERS[:13] if y else LETTERS[13:]), 5) for y in labels]
        rows = [
            {"sentence": " ".join(w), "label": int(y)} for w, y in zip(words, labels, strict=True)
        ]
        write_rows(folder / f"{split}.jsonl", rows)
    return str(folder)


def review_batches(sizes: list[int], batch_size: int, seed: int | None) -> SST2Batches:
    """Returns batches of sentences: the i-th is sizes[i] times the token i + 1, labeled i % 2."""
    rows = [[i + 1] * size for i, size in enumerate(sizes)]
    batches = SST2Batches(rows, [i % 2 for i in range(len(sizes))], batch_size)
    batches.seed = seed
    return batches


def write_mistakes(folder: Path) -> Path:
    """Writes a file of every kind that a script must reject, and a few that are right, such as
    corpus.jsonl, vocab.txt and model/. Returns the folder.
    """
    texts = [f"{c} aa bb. cc dd. ee ff." for c in LETTERS]
    for name, rows in {
        "corpus": [{"text": text} for text in texts],
        "lines": [{"text": text.split(".")[0]} for text in texts],
    }.items():
        write_rows(folder / f"{name}.jsonl", rows)
    (folder / "broken.jsonl").write_text('{"text": "a"}\n{"text": \n')
    (folder / "vocab.txt").write_text("\n".join(VOCABULARY) + "\n")
    publish(folder / "model", TINY)
    publish(folder / "few", dataclasses.replace(TINY, vocab_size=20))
    (folder / "bare").mkdir()
    shutil.copy(folder / "model/tokenizer.json", folder / "bare")
    return folder
