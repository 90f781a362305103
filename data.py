"""BERT's data: tokenize once, build on the fly, every example a function of (corpus, seed, number).

Stage 1, once: documents -> sentences -> token ids, cached on disk and memory-mapped. Stage 2, in
the DataLoader's workers: pairs are cut out of that array and masked, a batch at a time, in numpy.
So masks differ in every epoch, and neither workers nor processes nor a restart change a token.

[BERT] Devlin et al. 2018, arXiv 1810.04805. [Code] google-research/bert, commit eedf5716.
B batch, T sequence, V vocabulary. A place in the corpus is the number of tokens before it.
"""

import os
import re
from collections.abc import Iterable, Iterator
from functools import lru_cache, partial, reduce
from itertools import chain, count, pairwise
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from datasets import Features, List, Value
from huggingface_hub import snapshot_download
from tokenizers import BertWordPieceTokenizer, Tokenizer, trainers
from torch.utils.data import DataLoader, Dataset, Sampler

# Processes are the parallelism here. Threads inside them, started before a fork, can deadlock.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

PAD, UNK, CLS, SEP, MASK = SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
IGNORED_LABEL = -100  # the label of a token that was not chosen, cross_entropy's ignore_index
SAMPLE = Path(__file__).with_name("sample")
KINDS = {".txt", ".json", ".jsonl", ".parquet"}
STAGE_1 = 1  # in the cache's key: to be raised when stage 1 changes


def wordpiece(vocabulary: dict[str, int] | None) -> Tokenizer:
    """Uncased WordPiece over a vocabulary, adding [CLS] and [SEP]. [Code] tokenization.py."""
    return Tokenizer.from_str(BertWordPieceTokenizer(vocabulary, lowercase=True).to_str())


def load_tokenizer(path: str | Path) -> Tokenizer:
    """From vocab.txt (uncased), tokenizer.json, a directory with one of them, or a hub id."""
    try:
        if not (path := Path(path)).exists() and path.suffix not in {".txt", ".json"}:
            path = Path(snapshot_download(str(path), allow_patterns=["tokenizer.json", "vocab.*"]))
        if path.is_dir():
            path = path / ("tokenizer.json" if (path / "tokenizer.json").exists() else "vocab.txt")
        if path.suffix == ".txt":
            tokens = path.read_text(encoding="utf-8").removesuffix("\n").split("\n")
            tokenizer = wordpiece({token: i for i, token in enumerate(tokens)})
        else:
            tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises nothing more precise
        raise ValueError(f"no tokenizer at {path}: {error}") from error
    if missing := set(SPECIAL_TOKENS) - set(tokenizer.get_vocab()):
        raise ValueError(f"the tokenizer at {path} lacks {', '.join(sorted(missing))}")
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """WordPiece learned from texts; the same texts give the same ids. The library's ties fall in a
    hash table's order of characters: so it gets them sorted, alone and as ## pieces, fixed."""
    texts, blank = list(filter(None, texts)), wordpiece(None)
    letters = sorted({*chain.from_iterable(map(blank.normalizer.normalize_str, texts))} - {" "})
    fixed = [*SPECIAL_TOKENS, *letters, *("##" + letter for letter in letters)]
    if vocab_size < len(fixed):
        raise ValueError(f"--vocab-size {vocab_size}: the text's characters alone are {len(fixed)}")
    blank.train_from_iterator(
        texts,
        trainers.WordPieceTrainer(vocab_size=vocab_size, special_tokens=fixed, show_progress=False),
    )
    return wordpiece(blank.get_vocab())


def encode_plain(tokenizer: Tokenizer, texts: list[str]) -> list[list[int]]:
    """Ids without [CLS] and [SEP]. A "[MASK]" that stands in a text is three ordinary tokens."""
    tokenizer.encode_special_tokens = True
    parts = (texts[i : i + 1000] for i in range(0, len(texts), 1000))  # encodings are large
    encoded = (tokenizer.encode_batch_fast(part, add_special_tokens=False) for part in parts)
    ids = [encoding.ids for encoding in chain.from_iterable(encoded)]
    tokenizer.encode_special_tokens = False
    return ids


def get_dataset(
    path: str, name: str | None = None, split: str | None = "train", streaming: bool = False
) -> Any:
    """One row = one document, or a sentence of SST-2. A hub id, or a directory or file of parquet,
    jsonl or text; a .txt is one document. Names with train, validation or test make those splits,
    as `datasets` has it; without such names, all is train. With split=None, a dict of all."""
    options: dict[str, Any] = {}
    where = SAMPLE / "corpus" if path == "sample" else Path(path)
    if {file.suffix for file in (where, *where.glob("**/*.*"))} & KINDS == {".txt"}:
        options["sample_by"] = "document"
    if where.is_file():
        where, options["data_files"] = where.resolve().parent, {"train": where.name}
    elif not where.exists() and not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", path):  # not a hub id
        raise ValueError(f"{path} does not exist")
    try:
        return datasets.load_dataset(
            str(where) if where.is_dir() else path,
            name,
            split=split,
            streaming=streaming,
            **options,
        )
    except (OSError, ValueError, StopIteration, datasets.exceptions.DatasetGenerationError) as e:
        raise ValueError(f"cannot read {path}: {e.__cause__ or str(e) or 'it is empty'}") from e


SENTENCE_END = re.compile(  # not after an initial or a title; closing quotes are the sentence's
    r"""[.!?…](?<!\b[A-Za-z]\.)(?<!\b(?i:mr|ms|dr|st)\.)(?<!\b(?i:mrs)\.)["'”’)\]]*(?=\s)"""
    r"""|[。！？]|\n\s*\n"""
)
PIECE = re.compile(r".{1,999}(?:\s|\Z)|.{1000}", re.DOTALL)  # what never ends is cut at 1,000


def split_sentences(text: str) -> list[str]:
    """Spans between ends of sentences and blank lines, less white space around them. A rough rule
    will do: a "sentence" may be any contiguous span of text. [BERT] §3"""
    ends = [0, *(match.end() for match in SENTENCE_END.finditer(text)), len(text)]
    spans = (text[start:end] for start, end in pairwise(ends))
    pieces = (PIECE.findall(span) if len(span) > 1000 else [span] for span in spans)
    return [piece.strip() for piece in chain.from_iterable(pieces) if not piece.isspace() and piece]


def tokenize_documents(rows: dict, numbers: list[int], tokenizer: Tokenizer, column: str) -> dict:
    """Stage 1 for a few documents: see `tokenize_dataset`."""
    out: dict[str, list] = {"tokens": [], "starts": [], "sentences": []}
    for number, text in zip(numbers, rows[column], strict=True):
        text = "\n\n".join(filter(None, text)) if isinstance(text, list) else text or ""
        if not isinstance(text, str):
            raise ValueError(f"row {number}: {column} is {type(text).__name__}, not text")
        ids = [sentence for sentence in encode_plain(tokenizer, split_sentences(text)) if sentence]
        kept = ids if len(ids) > 1 else []
        lengths = np.fromiter(map(len, kept), np.int64)
        out["tokens"].append(np.fromiter(chain.from_iterable(kept), np.uint32, lengths.sum()))
        out["starts"].append(np.cumsum(lengths) - lengths)
        out["sentences"].append(len(ids))
    return out


def tokenize_dataset(
    dataset: datasets.Dataset,
    tokenizer: Tokenizer,
    text_column: str = "text",
    rows_per_document: int = 1,
    processes: int | None = None,
) -> datasets.Dataset:
    """Stage 1: row i has document i's `tokens`, the `starts` of its sentences among them, and its
    number of `sentences`; with fewer than two, no tokens: none is next. Cached by (corpus,
    tokenizer), 2 bytes a token, 4 where V > 65,536. `rows_per_document`: for a sentence a row."""
    if text_column not in dataset.column_names:
        raise ValueError(f"no column {text_column!r}: --text-column is of {dataset.column_names}")
    dataset = dataset.select_columns(text_column)
    if rows_per_document > 1:
        dataset = dataset.batch(rows_per_document)
    tokens = List(Value("uint16" if tokenizer.get_vocab_size() <= 2**16 else "uint32"))
    key = [dataset._fingerprint, tokenizer.to_str(), text_column, STAGE_1]
    return dataset.map(
        tokenize_documents,
        fn_kwargs={"tokenizer": tokenizer, "column": text_column},
        batched=True,
        batch_size=min(max(len(dataset) // 1000, 16), 1000),
        with_indices=True,
        features=Features(tokens=tokens, starts=List(Value("uint32")), sentences=Value("int64")),
        remove_columns=[text_column],
        num_proc=processes,
        desc="tokenizing",
        new_fingerprint=datasets.fingerprint.Hasher.hash(key),
    )


class TokenizedCorpus:
    """The documents with a next sentence as one array of `len(corpus)` tokens, mapped from disk; in
    memory, 8 bytes for each sentence and document. `skipped` counts what was left out."""

    def __init__(self, rows: datasets.Dataset) -> None:
        tokens, starts = (rows.data.column(name).chunks for name in ("tokens", "starts"))
        self.rows, found = rows, np.asarray(rows["sentences"][:], np.int64)
        none, one, more = np.bincount(np.minimum(found, 2), minlength=3).tolist()
        self.skipped = {"no sentence": none, "one sentence": one}
        if more < 2:
            raise ValueError(f"{more} documents have a next sentence, 2 are needed; {self.skipped}")
        self.chunks = [chunk.flatten().to_numpy() for chunk in tokens]  # views of the files
        self.chunk_starts = np.cumsum([0, *map(len, self.chunks)])
        lengths = np.concatenate([chunk.value_lengths() for chunk in tokens]).astype(np.int64)
        first, within = np.cumsum(lengths) - lengths, np.concatenate([c.flatten() for c in starts])
        own = np.repeat(first, np.where(lengths > 0, found, 0))  # start of the sentence's document
        # Both end with the end of the corpus, so that the end of each is the start of the next.
        self.sentence_starts = np.append(own + within, lengths.sum())
        self.document_starts = np.append(first[lengths > 0], lengths.sum())

    def __reduce__(self) -> tuple:
        return TokenizedCorpus, (self.rows,)  # a worker that was not forked maps the files itself

    def __len__(self) -> int:
        return int(self.document_starts[-1])

    def tokens(self, start: int, end: int) -> np.ndarray:
        """Tokens start to end of the corpus, both in one document."""
        chunk = np.searchsorted(self.chunk_starts, start, side="right") - 1
        return self.chunks[chunk][start - self.chunk_starts[chunk] : end - self.chunk_starts[chunk]]

    def unigram_entropy(self) -> float:
        """Nats: the MLM loss of a model that knows how often each token occurs, and no more."""
        counts = reduce(np.add, (np.bincount(chunk, minlength=2**18) for chunk in self.chunks))
        shares = counts[counts > 0] / len(self)
        return float(-(shares * np.log(shares)).sum())


def get_corpus(
    path: str, split: str, tokenizer: Tokenizer, name: str | None = None, **stage_1: Any
) -> TokenizedCorpus:
    """A split after stage 1. If none is "validation", the last 1% of "train", at least two, is."""
    splits = get_dataset(path, name, split=None)
    if "validation" in splits:
        return TokenizedCorpus(tokenize_dataset(splits[split], tokenizer, **stage_1))
    if "train" not in splits:
        raise ValueError(f"{path} has no split train, only {', '.join(splits)}")
    rows = tokenize_dataset(splits["train"], tokenizer, **stage_1)
    usable = np.flatnonzero(np.asarray(rows["sentences"][:]) > 1)
    if len(usable) < 4:
        raise ValueError(f"{path}: {len(usable)} of 4 documents needed; see --rows-per-document")
    cut = usable[-max(2, len(usable) // 100)]
    return TokenizedCorpus(rows.select(range(cut) if split == "train" else range(cut, len(rows))))


def generator(seed: int, purpose: int, epoch: int, index: int = 0) -> np.random.Generator:
    """Depends on the arguments alone. The counter's lowest word is what the generator counts by."""
    return np.random.Generator(np.random.Philox(key=seed, counter=[0, index, epoch, purpose]))


def mask_tokens(
    input_ids: np.ndarray,
    ordinary: np.ndarray,
    u: np.ndarray,
    mask_id: int,
    replacements: np.ndarray,
    continues: np.ndarray | None = None,
) -> tuple:
    """Input and labels of the masked language model, (B, T) each. [BERT] §3.1 task 1, A.1.
    Of a row's n `ordinary` tokens, bool (B, T), exactly max(1, round(0.15 n)) are chosen. 80% of
    them become [MASK]; 10% a random one of `replacements`, since fine-tuning has no [MASK] and no
    token may be above doubt; 10% stay, since what is read is evidence. u: uniform, (3, B, T).
    With `continues`, bool (V,), True for ## pieces, whole words are chosen, as many as that number
    of tokens holds, at least one. Differs: [Code]'s random tokens include the special ones."""
    columns = np.arange(input_ids.shape[1])
    wanted = np.maximum(1, np.rint(0.15 * ordinary.sum(axis=1, keepdims=True))).astype(np.int64)
    word = np.broadcast_to(columns, input_ids.shape)  # each token's word: the column it begins in
    if continues is not None:
        joined = continues[input_ids] & ordinary & np.roll(ordinary, 1, axis=1)  # not to a [SEP]
        word = np.maximum.accumulate(np.where(joined, 0, columns), axis=1)
    keys = np.take_along_axis(np.where(ordinary, u[0], 2.0), word, axis=1)
    order = np.argsort(keys, axis=1)  # words in random order, special tokens last
    chosen = np.zeros_like(ordinary)
    np.put_along_axis(chosen, order, columns < wanted, axis=1)
    if continues is not None:  # the word that the limit cuts is left out, the first one never
        words = np.take_along_axis(word, order, axis=1)
        cut = np.take_along_axis(words, wanted, axis=1)
        chosen = (chosen & (word != cut)) | (word == words[:, :1])
    action = np.where(chosen, u[1], 1.0)
    random = replacements[(u[2] * len(replacements)).astype(np.int64)]
    masked = np.where(action < 0.8, mask_id, np.where(action < 0.9, random, input_ids))
    return masked, np.where(chosen, input_ids, IGNORED_LABEL)


def around(edges: np.ndarray, place: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of sorted edges, the last one up to each place and the first one behind it."""
    return edges[(behind := np.searchsorted(edges, place, side="right")) - 1], edges[behind]


class PretrainDataset(Dataset):
    """`[CLS] A [SEP] B [SEP]` with masks. [BERT] §3.1, A.1, A.2, [Code] create_pretraining_data.
    Example k is number k % len(dataset) of epoch k // len(dataset), a pure function of (corpus,
    seed, k); an epoch has as many examples as the corpus has times T - 3 tokens."""

    def __init__(
        self,
        corpus: TokenizedCorpus,
        tokenizer: Tokenizer,
        max_seq_length: int,
        seed: int = 0,
        whole_word_masking: bool = False,
    ) -> None:
        if max_seq_length < 5:
            raise ValueError(f"max_seq_length={max_seq_length}: [CLS] a [SEP] b [SEP] are 5 tokens")
        vocabulary = tokenizer.get_vocab()
        self.corpus, self.longest, self.seed = corpus, max_seq_length, seed
        self.ids = {token: vocabulary[token] for token in SPECIAL_TOKENS}
        self.replacements = np.array(sorted(set(vocabulary.values()) - set(self.ids.values())))
        pieces = [i for token, i in vocabulary.items() if token.startswith("##")]
        is_piece = np.isin(np.arange(max(vocabulary.values()) + 1), pieces)
        self.continues = is_piece if whole_word_masking else None

    def __len__(self) -> int:
        return max(1, len(self.corpus) // (self.longest - 3))

    def __getitems__(self, numbers: list[int]) -> dict[str, torch.Tensor]:
        """int64: `input_ids`, `token_type_ids`, `mlm_labels` (-100 = not scored), (B, longest row),
        and `nsp_labels`, (B,): 0 = IsNext, 1 = random."""
        places = [divmod(number, len(self)) for number in numbers]
        u = np.stack([generator(self.seed, 0, *p).random(6 + 3 * self.longest) for p in places])
        spans, is_random = self.segments(np.array([index for _, index in places]), u[:, :6].T)
        lengths = spans[:, :, 1] - spans[:, :, 0]  # (B, 2): of A and of B
        sep_1, sep_2 = lengths[:, :1] + 1, lengths.sum(axis=1, keepdims=True) + 2  # their columns
        columns = np.arange(sep_2.max() + 1)
        input_ids = np.full((len(numbers), len(columns)), self.ids[PAD])
        cls, sep = [self.ids[CLS]], [self.ids[SEP]]
        for row, (a, b) in zip(input_ids, spans.tolist(), strict=True):
            tokens = (cls, self.corpus.tokens(*a), sep, self.corpus.tokens(*b), sep)
            row[: a[1] - a[0] + b[1] - b[0] + 3] = np.concatenate(tokens)
        ordinary = (columns > 0) & (columns < sep_2) & (columns != sep_1)
        draws = u[:, 6:].reshape(-1, 3, self.longest)[:, :, : len(columns)].swapaxes(0, 1)
        masked, labels = mask_tokens(
            input_ids, ordinary, draws, self.ids[MASK], self.replacements, self.continues
        )
        batch = {
            "input_ids": masked,
            "token_type_ids": (columns > sep_1) & (columns <= sep_2),
            "mlm_labels": labels,
            "nsp_labels": is_random,
        }
        return {name: torch.from_numpy(array.astype(np.int64)) for name, array in batch.items()}

    def cut(self, place: np.ndarray, target: np.ndarray, u: np.ndarray) -> tuple:
        """Where A starts, B starts, B ends: `target` tokens of the place's document, or all. A has
        the place's sentence first, if enough follows; B any in between or, if none is, anything."""
        starts = self.corpus.sentence_starts
        first, last = around(self.corpus.document_starts, place)
        latest = np.maximum(last - target, first)
        a = np.where(place < latest, around(starts, place)[0], latest)
        low = np.searchsorted(starts, a, side="right")
        choices = np.searchsorted(starts, np.minimum(a + target, last)) - low
        a = np.where(choices > 0, a, np.minimum(place, latest))
        end = np.minimum(a + target, last)
        anywhere = a + 1 + (u * (end - a - 1)).astype(np.int64)
        return a, np.where(choices > 0, starts[low + (u * choices).astype(np.int64)], anywhere), end

    def segments(self, index: np.ndarray, u: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Starts and ends of A and B, (B, 2, 2), and which B are random. u: uniform, (6, B).
        A and B fill T - 3 tokens, one time in ten fewer, for fine-tuning meets short texts too
        ([BERT] A.2), or are the document. A random B is the B of a place in another document. It
        ends that one if the true B ends its own, and the pair is as long, where both allow: so, in
        documents longer than T, neither B alone nor the pair's form tells the label. Differs:
        [Code]'s random B is drawn by another rule, maybe from the same document, and cut."""
        documents, size, epoch = self.corpus.document_starts, len(self.corpus), len(self)
        short, room = 2 + (u[2] * (self.longest - 4)).astype(np.int64), self.longest - 3
        target = np.where(u[1] < 0.1, short, room)
        place = index * size // epoch + (u[0] * (size // epoch)).astype(np.int64)
        a, b, end = self.cut(place, target, u[3])
        (first, last), length, is_random = around(documents, place), end - b, u[5] < 0.5
        other = (u[4] * (size - (last - first))).astype(np.int64)  # a token of another document
        low, high = around(documents, other := other + np.where(other >= first, last - first, 0))
        other = low + (other - low) * np.maximum(high - low - end + a, 1) // (high - low)
        ended = (u[4] * (len(documents) - 2)).astype(np.int64)  # or another document, at its end
        ended = documents[ended + (ended >= np.searchsorted(documents, first)) + 1] - 1
        low, high = around(documents, other := np.where(end == last, ended, other))
        _, start, stop = self.cut(other, end - a, u[3])
        fits = around(self.corpus.sentence_starts, np.maximum(high - length, low))[0]
        start = np.where(end == last, start, np.minimum(start, fits))
        stop = np.where(end == last, stop, np.minimum(start + length, high))
        a = np.where(is_random, np.maximum(a - length + (stop - start), first), a)
        of_b = np.where(is_random, (start, stop), (b, end))
        return np.stack([a, b, *of_b], axis=1).reshape(-1, 2, 2), is_random


@lru_cache(maxsize=2)
def permutation(seed: int, epoch: int, size: int) -> np.ndarray:
    return generator(seed, 1, epoch).permutation(size)


class EpochSampler(Sampler):
    """Batches of example numbers without end: each epoch all, in a random order, starting at any
    batch. A process takes every `world_size`-th batch of that one order, from its `rank` on."""

    def __init__(self, size: int, batch_size: int, seed: int, start=0, rank=0, world_size=1):
        self.size, self.batch_size, self.seed = size, batch_size, seed
        self.batches = partial(count, start * world_size + rank, world_size)

    def __iter__(self) -> Iterator[list[int]]:
        for batch in self.batches():
            first = batch * self.batch_size
            places = (divmod(place, self.size) for place in range(first, first + self.batch_size))
            yield [
                epoch * self.size + int(permutation(self.seed, epoch, self.size)[i])
                for epoch, i in places
            ]


def get_split_dataloader(
    dataset: PretrainDataset,
    batch_size: int,
    start: int = 0,
    rank: int = 0,
    world_size: int = 1,
    workers: int = 2,
) -> DataLoader:
    """Endless batches, from batch `start` on. Two workers feed a fast GPU; more only hold more
    memory: workers * 4 batches of 24 * B * T bytes wait, 6 MB for two at 256 x 128."""
    sampler = EpochSampler(len(dataset), batch_size, dataset.seed, start, rank, world_size)
    return DataLoader(  # __getitems__ makes whole batches, which `dict` leaves as they are
        dataset,
        batch_sampler=sampler,
        collate_fn=dict,
        num_workers=workers,
        prefetch_factor=4 if workers else None,
        pin_memory=torch.cuda.is_available(),
    )


def get_reviews(path: str, split: str, name: str | None = None) -> tuple[list[str], list[int]]:
    """The texts of a split of SST-2, and their labels: 0 = negative, 1 = positive."""
    rows = get_dataset(str(SAMPLE / "reviews") if path == "sample" else path, name, split)
    column = next((name for name in ("sentence", "text") if name in rows.column_names), None)
    if column is None or "label" not in rows.column_names:
        raise ValueError(f"{path}: no columns sentence (or text) and label in {rows.column_names}")
    if None in set(rows[column]):
        raise ValueError(f"{path}, {split}: row {rows[column][:].index(None)} has no {column}")
    if wrong := set(rows["label"]) - {0, 1}:
        raise ValueError(f"{path}, {split}: labels {wrong}, not 0 and 1; SetFit/sst2 has a test")
    return list(rows[column]), list(rows["label"])


def encode_sentences(tokenizer: Tokenizer, texts: list[str], longest: int) -> list[list[int]]:
    """`[CLS] sentence [SEP]` for each text, cut to the longest allowed."""
    cls, sep = (tokenizer.get_vocab()[token] for token in (CLS, SEP))
    return [[cls, *ids[: longest - 2], sep] for ids in encode_plain(tokenizer, texts)]


class SST2Batches:
    """All sentences once: int64 `input_ids` (B, longest of these) and `labels` (B,). A random order
    is cut into pools of 64 batches, each sorted by length, and the batches are shuffled, by (seed,
    `epoch`): lengths in a batch are similar. With seed None, all are sorted and stay so."""

    def __init__(
        self,
        rows: list[list[int]],
        labels: list[int],
        batch_size: int,
        padding_idx: int = 0,
        seed: int | None = None,
    ) -> None:
        self.rows, self.labels, self.batch_size = rows, labels, batch_size
        self.padding_idx, self.seed, self.epoch = padding_idx, seed, 0

    def __len__(self) -> int:
        return -(-len(self.rows) // self.batch_size)

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        size, lengths = len(self.rows), np.array([len(row) for row in self.rows])
        shuffle, random = self.seed is not None, generator(self.seed or 0, 2, self.epoch)
        order = random.permutation(size) if shuffle else np.arange(size)
        pool = 64 * self.batch_size if shuffle else size
        pools = np.split(order, range(pool, size, pool))
        order = np.concatenate([p[np.argsort(lengths[p], kind="stable")] for p in pools])
        batches = np.split(order, range(self.batch_size, size, self.batch_size))
        for i in random.permutation(len(self)) if shuffle else range(len(self)):
            rows = [torch.tensor(self.rows[number]) for number in batches[i]]
            yield {
                "input_ids": torch.nn.utils.rnn.pad_sequence(rows, True, self.padding_idx),
                "labels": torch.tensor([self.labels[number] for number in batches[i]]),
            }
