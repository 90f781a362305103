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

import numpy as np
import torch
from hypothesis import strategies as st

import data
from bert import BertConfig, BertPretrainModel, PretrainedModel
from train_pretrain import PretrainLosses, add_gradients, count, to_device
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
lengths = st.integers(5, 40)  # of an example: a pair needs five tokens


@st.composite
def configs(draw: st.DrawFn, published: bool = False) -> BertConfig:
    """Draws a configuration without dropout; if `published`, d_k = d_v = d_model, which is all that
    the published format has words for.
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
        dropout=0.0,
        attention_dropout=0.0,
    )


@st.composite
def batches(draw: st.DrawFn, config: BertConfig) -> tuple[torch.Tensor, torch.Tensor]:
    """Draws input_ids, rows of at least one token and then padding, and their token_type_ids."""
    length = draw(st.integers(1, config.max_seq_length))
    rows = draw(st.lists(st.integers(1, length), min_size=1, max_size=3))
    generator = torch.Generator().manual_seed(draw(seeds))
    shape = (len(rows), length)
    input_ids = torch.randint(1, config.vocab_size, shape, generator=generator)
    token_type_ids = torch.randint(0, config.type_vocab_size, shape, generator=generator)
    padded = torch.arange(length) >= torch.tensor(rows)[:, None]
    return input_ids.masked_fill(padded, PADDING), token_type_ids.masked_fill(padded, 0)


def build(cls: type[PretrainedModel], config: BertConfig, seed: int = 0):
    """Returns a model in float64 whose weights are so large that every part shows in the output."""
    torch.manual_seed(seed)
    model = cls(dataclasses.replace(config, initializer_range=0.5), PADDING).double().eval()
    for name, parameter in model.named_parameters():  # biases and norms, too
        if parameter.dim() == 1:
            torch.nn.init.normal_(parameter, mean=float("norm.weight" in name), std=0.5)
    return model


# ---- A small vocabulary: ordinary ids start at 5 ---------------------------------------------

PAD, UNK, CLS, SEP, MASK = range(5)
LETTERS = "abcdefghijklmnopqrstuvwxyz"
VOCABULARY = [*data.SPECIAL_TOKENS, *LETTERS, *(f"##{c}" for c in LETTERS[:9]), "."]

any_words = st.text(alphabet=st.characters(exclude_categories=("Cs",)), max_size=30)
familiar_words = st.text(alphabet=LETTERS[:12] + "ÀÉñ .,'-\u0301中文😀\t\x00\u200b", max_size=40)


def small_tokenizer():
    return data.wordpiece({token: i for i, token in enumerate(VOCABULARY)})


# ---- Small models with this vocabulary -------------------------------------------------------

SMALL = dataclasses.replace(FIXED, vocab_size=len(VOCABULARY), max_seq_length=40)
# Of a shape that the published format has words for.
PUBLISHABLE = dataclasses.replace(
    FIXED, vocab_size=len(VOCABULARY), attention_d_k=12, attention_d_v=12
)
STILL = dataclasses.replace(SMALL, dropout=0.0, attention_dropout=0.0)
TINY = BertConfig.named("tiny", vocab_size=len(VOCABULARY), max_seq_length=16)


def publish(
    folder: Path,
    config: BertConfig = PUBLISHABLE,
    cls: type[PretrainedModel] = BertPretrainModel,
) -> Path:
    """Writes a new model with its tokenizer; returns its folder."""
    cls(config, PADDING).save_pretrained(folder, small_tokenizer())
    return folder


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
    """Returns batches of a small corpus; rows differ in length, so in their masked positions."""
    docs = [
        [[5 + (i * j + i) % 26 for i in range(3 + j)] for j in range(2, 6 + d)] for d in range(5)
    ]
    dataset = data.PretrainDataset(corpus_of(docs), small_tokenizer(), 40, seed)
    return [dataset.batch(range(i * size, (i + 1) * size)) for i in range(count)]


def gradients(
    model: BertPretrainModel, micro_batches: list[dict], losses_of=None
) -> list[torch.Tensor]:
    """Returns both losses of a step, and the gradient of every parameter."""
    model.zero_grad()
    ready = [to_device(batch, CPU) for batch in micro_batches]
    masked, pairs, _ = count(micro_batches, model.padding_idx)
    losses_of = PretrainLosses(model) if losses_of is None else losses_of
    losses = add_gradients(losses_of, ready, masked, pairs)
    return [losses, *(parameter.grad.clone() for parameter in model.parameters())]


# ---- Small corpora ---------------------------------------------------------------------------


def corpus_of(documents: list[list[list[int]]]) -> data.TokenizedCorpus:
    """Returns documents of sentences of token ids as a corpus, without those that have fewer than
    two sentences.
    """
    usable = [sentences for sentences in documents if len(sentences) > 1]
    return data.pack(usable, small_tokenizer())


@st.composite
def documents(
    draw: st.DrawFn, most: int = 6, longest: int = 30, with_long: bool = True
) -> list[list[list[int]]]:
    """Draws documents of sentences of token ids, of all kinds: 2 to `most` from which pairs can be
    drawn, and up to two between them that have no sentence or one, which are left out.

    A document has 2 to 8 sentences of 1 to `longest` tokens, or dozens of one token, or also one
    of thousands of tokens. The first kind includes those that are hardly longer than an example.
    """
    usual = st.lists(st.integers(1, longest), min_size=2, max_size=8)
    one_token = st.lists(st.just(1), min_size=2, max_size=2 * longest)
    kinds = [usual, usual, one_token]
    if with_long:
        around_thousands = st.tuples(usual, st.integers(1000, 3000), usual)
        kinds.append(around_thousands.map(lambda parts: [*parts[0], parts[1], *parts[2]]))
    kept = draw(st.lists(st.one_of(kinds), min_size=2, max_size=most))
    left_out = draw(st.lists(st.lists(st.integers(1, longest), max_size=1), max_size=2))
    sizes = draw(st.permutations([*kept, *left_out])) if left_out else kept
    generator = np.random.default_rng(draw(seeds))
    return [
        [generator.integers(5, len(VOCABULARY), size).tolist() for size in sentences]
        for sentences in sizes
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
    """Returns whether a share is within five standard deviations of what is expected, which a right
    one is not once in 1.7 million times.
    """
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
        "one-token last sentences": [
            [*document(int(rng.integers(5, 3 * room)), 3, 30), 1] for _ in range(150)
        ],
        "as long as an example": [document(room + 3, 3, 30) for _ in range(200)],
    }


def numbered(documents: list[list[list[int]]]) -> list[list[list[int]]]:
    """Returns documents of the same shapes whose token at offset k of the corpus has the id
    1000 + k, so that every id tells its offset. Those that are left out have the id 999.
    """
    ids = iter(range(1000, 65000))
    return [
        [[next(ids) if len(document) > 1 else 999 for _ in sentence] for sentence in document]
        for document in documents
    ]


def offset_tokenizer(size: int = 20_000):
    """Returns a tokenizer with an id for every offset of a `numbered` corpus."""
    names = [*data.SPECIAL_TOKENS, *(f"t{i}" for i in range(5, size))]
    return data.wordpiece({token: i for i, token in enumerate(names)})


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
    """Returns batches of sentences: the i-th is sizes[i] times the token i + 1, labelled i % 2."""
    rows = [[i + 1] * size for i, size in enumerate(sizes)]
    return SST2Batches(rows, [i % 2 for i in range(len(sizes))], batch_size, seed=seed)


def write_cased_vocabulary(folder: Path, **tokenizer_config) -> Path:
    """Writes a cased vocabulary in the old form, vocab.txt alone or with a config; returns the
    folder.
    """
    folder.mkdir(exist_ok=True)
    (folder / "vocab.txt").write_text("\n".join([*VOCABULARY, "A", "é"]) + "\n", encoding="utf-8")
    if tokenizer_config:
        (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer_config))
    return folder


def write_mistakes(folder: Path) -> Path:
    """Writes a file of every kind that a script must reject, and a few that are right, such as
    corpus.jsonl, vocab.txt and model/. Returns the folder.
    """
    texts = [f"{c} aa bb. cc dd. ee ff." for c in LETTERS]
    for name, rows in {
        "corpus": [{"text": text} for text in texts],
        "body": [{"body": text} for text in texts],
        "one": [{"text": texts[0]}],
        "lines": [{"text": text.split(".")[0]} for text in texts],
        "labels": [{"sentence": "a", "label": -1}],
        "two": [{"sentence": "a", "label": 2}],
        "words": [{"sentence": "a", "label": "positive"}],
        "wordless": [{"sentence": "a", "label": 1}, {"sentence": None, "label": 1}],
        "empty": [],
        "numbers": [{"text": i} for i in range(1, 9)],
        "nulls": [{"text": None}] * 9,
    }.items():
        write_rows(folder / f"{name}.jsonl", rows)
    (folder / "broken.jsonl").write_text('{"text": "a"}\n{"text": \n')
    (folder / "latin.jsonl").write_bytes('{"text": "café"}\n'.encode("latin-1") * 9)
    latin_review = '{"sentence": "café", "label": 1}\n'.encode("latin-1")
    (folder / "latin_test").mkdir()
    (folder / "latin_test/test.jsonl").write_bytes(latin_review * 9)
    (folder / "latin.txt").write_bytes("café aa. bb.".encode("latin-1"))
    (folder / "nothing").mkdir()
    (folder / "vocab.txt").write_text("\n".join(VOCABULARY) + "\n")
    (folder / "nomask.txt").write_text("\n".join(VOCABULARY).replace("[MASK]", "mask") + "\n")
    config = BertConfig.named("tiny", vocab_size=len(VOCABULARY), max_seq_length=16)
    BertPretrainModel(config, 0).save_pretrained(folder / "model", small_tokenizer())
    few = BertConfig.named("tiny", vocab_size=20, max_seq_length=64)
    BertPretrainModel(few, 0).save_pretrained(folder / "few", small_tokenizer())
    (folder / "bare").mkdir()
    shutil.copy(folder / "model/tokenizer.json", folder / "bare")
    (folder / "taken").mkdir()
    (folder / "taken/metrics.jsonl").write_text("a run\n")
    return folder
