# SPDX-License-Identifier: MIT
# From "BERT in four files", copyright (c) 2026 the bert-in-four-files authors.
"""BERT's data: tokenize once, build examples on the fly, each a function of (seed, epoch, index).

    once          text -> sentences -> tokens -> three arrays on disk, memory-mapped
    in workers    two segments -> an example with masks -> a batch

    tokenizer = train_tokenizer(texts, vocab_size=2000)  # or load_tokenizer("vocab.txt")
    corpus = tokenize_corpus(texts, tokenizer, "corpus")  # next time: TokenizedCorpus("corpus")
    # or in memory: pack(list(encode_documents(texts, tokenizer, Counter())), tokenizer)
    dataset = PretrainDataset(corpus, tokenizer, max_seq_length=64)
    for batch in get_split_dataloader(dataset, batch_size=32):  # endless
        ...

At first, read up to the order of examples: below it, files, streams and tokenizers are opened.

Differs: [Code] writes ten differently masked copies of the corpus to disk before training.

Words used throughout:
    document       a text such as a book or a review
    offset         place of a token in the corpus: the number of tokens before it
    column         place of a token in an example, where column 0 is [CLS]
    start, end     of a half-open span [start, end)
    seam           start of a sentence where segment A may end and segment B may start
    example        `[CLS] segment A [SEP] segment B [SEP]` with masks and labels

[BERT] Devlin et al. 2018, arXiv 1810.04805. [Code] google-research/bert, commit eedf5716.
Dimensions in comments: batch, seq (columns), masked (of one example or, in `collate`, of a batch).
"""

import contextlib
import errno
import fcntl
import hashlib
import json
import re
import shutil
import zlib
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from itertools import chain, count, islice, pairwise
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import numpy as np
import torch
from datasets.distributed import split_dataset_by_node
from huggingface_hub import snapshot_download
from pyarrow.parquet import ParquetFile
from tokenizers import BertWordPieceTokenizer, Tokenizer, trainers
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler, get_worker_info

PAD, UNK, CLS, SEP, MASK = SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
# The label of a token that is not to be predicted. `collate` leaves it out of `mlm_targets`.
IGNORED_LABEL = -100

# ---- Text -> sentences -------------------------------------------------------

# Increase it when `split_sentences` changes: otherwise corpora that were tokenized before are found
# in the cache and used as they are.
SPLIT_VERSION = 4

# First line: one of all marks (`re` is fast if a pattern starts with one set of characters). The
# other lines look back at it.
# Second line: a sentence ends after . ! ? or an ellipsis before white space, but not after an
# initial or a title. A lookbehind, (?<!...), must have a fixed width, so "mrs" needs its own.
# Third line: it also ends after marks that need no white space (Chinese and Japanese 。！？,
# Hindi । ॥, Urdu ۔ ؟, Ethiopic ።, Khmer ។) and at a blank line. Closing quotation marks and
# brackets belong to the sentence that they close.
SENTENCE_END = re.compile(
    r"""[.!?…。！？।॥۔؟።។\n](?:"""
    r"""(?<=[.!?…])(?<!\b[A-Za-z]\.)(?<!\b(?i:mr|ms|dr|st)\.)(?<!\b(?i:mrs)\.)["'”’)\]]*(?=\s)"""
    r"""|(?<=[。！？।॥۔؟።។])[。！？।॥۔؟።។]*["'”’)\]」』）】]*|(?<=\n)\s*\n)"""
)
# Up to 400 characters before white space or the end; or exactly 400 if there is no white space.
PIECE = re.compile(r".{1,400}(?:\s|\Z)|.{400}", re.DOTALL)


def split_sentences(text: str) -> list[str]:
    """Cuts a text into sentences, at `SENTENCE_END`. White space around them is dropped.

    A rough rule is enough: a "sentence" may be any contiguous span of text ([BERT] §3). If it has
    over 400 characters, it is cut at white space, or after 400 characters if there is none: tokens
    far from both ends of a sentence would never be drawn, since segments meet at a sentence's end.

    Example: 'Dr. No sat. "Why?" she asked' -> ['Dr. No sat.', '"Why?"', 'she asked'].
    """
    ends = [match.end() for match in SENTENCE_END.finditer(text)]
    sentences: list[str] = []
    for start, end in pairwise([0, *ends, len(text)]):
        pieces = PIECE.findall(text[start:end])
        sentences.extend(piece.strip() for piece in pieces)
    return [sentence for sentence in sentences if sentence]


# ---- Sentences -> tokens -----------------------------------------------------


def wordpiece(vocabulary: dict[str, int] | None, **normalizer: bool | None) -> Tokenizer:
    """Returns a WordPiece tokenizer. [Code] tokenization.py.

    vocabulary: the id of each token, or None for a tokenizer to be trained. normalizer:
    `lowercase`, by default True; `strip_accents`, by default as `lowercase`;
    `handle_chinese_chars`, by default True.

    Differs: words of more than 100 characters are [UNK], as in transformers; [Code] allows 200.
    """
    # BertWordPieceTokenizer wraps a Tokenizer and hides most of its methods: return a plain copy.
    return Tokenizer.from_str(BertWordPieceTokenizer(vocabulary, **normalizer).to_str())


LARGEST_ALPHABET = 1000


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Returns an uncased WordPiece tokenizer learned from texts.

    The 1,000 most frequent characters are tokens; a word with any other character is [UNK]. (A
    corpus may have far more, most of them rare.) Then the trainer joins pieces until there are
    `vocab_size` tokens. `texts` is read twice, so an iterator is first turned into a list.

    The same texts, in any order, give the same ids. Left alone, the trainer would order equally
    frequent characters differently each time. So each of the 1,000 is a fixed token, as is its ##
    piece, and the trainer adds none (`limit_alphabet=0`).
    """
    if isinstance(texts, Iterator):
        texts = list(texts)
    learner = wordpiece(None)
    characters: Counter[str] = Counter()
    for text in texts:
        characters.update(learner.normalizer.normalize_str(text))
    del characters[" "]
    by_frequency = sorted(characters, key=lambda letter: (-characters[letter], letter))
    letters = sorted(by_frequency[:LARGEST_ALPHABET])
    pieces = ["##" + letter for letter in letters]
    fixed_tokens = [*SPECIAL_TOKENS, *letters, *pieces]
    if vocab_size < len(fixed_tokens):
        raise ValueError(f"vocab_size {vocab_size} is below the {len(fixed_tokens)} fixed tokens")
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocab_size, special_tokens=fixed_tokens, limit_alphabet=0, show_progress=False
    )
    learner.train_from_iterator(texts, trainer)
    # `learner` treats all fixed tokens as special. Only its vocabulary is needed.
    return wordpiece(learner.get_vocab())


def encode_plain(tokenizer: Tokenizer, texts: list[str]) -> list[list[int]]:
    """Returns the ids of each text, without [CLS] and [SEP].

    A "[MASK]" that stands in a text is read as ordinary text. At most 1,000 texts are encoded at a
    time, because the encodings of `tokenizers` take far more memory than their ids.
    """
    if tokenizer.padding or tokenizer.truncation:
        raise ValueError("the tokenizer pads or truncates: see its no_padding(), no_truncation()")
    ids: list[list[int]] = []
    tokenizer.encode_special_tokens = True  # that is, treat them as plain text
    try:
        for start in range(0, len(texts), 1000):
            part = texts[start : start + 1000]
            encodings = tokenizer.encode_batch_fast(part, add_special_tokens=False)
            ids.extend(encoding.ids for encoding in encodings)
    finally:
        tokenizer.encode_special_tokens = False
    return ids


# ---- The corpus: three arrays ------------------------------------------------


class CorpusArrays(NamedTuple):
    """See `TokenizedCorpus`."""

    tokens: np.ndarray
    sentence_starts: np.ndarray
    document_starts: np.ndarray


class TokenizedCorpus:
    """Documents of two sentences or more, as three arrays.

        tokens            6 3 7 9 1 4 4 1 8 3 5 1 2 2 1     all documents, end to end
        sentence_starts   0         5     8       12    15  offsets; the last one is the end
        document_starts   0               8             15  two documents here

    (The token 1 is the period here.)

    source: a folder written by `tokenize_corpus`, or three arrays. The arrays of a folder are
    mapped, not read: all processes share their pages.
    """

    def __init__(self, source: str | Path | CorpusArrays) -> None:
        self.source = source
        self.notes: dict[str, float] = {}  # statistics from tokenizing
        if isinstance(source, CorpusArrays):
            arrays = source
        else:
            self.notes = json.loads((Path(source) / "notes.json").read_text())
            arrays = CorpusArrays(*(map_array(Path(source), name) for name in CorpusArrays._fields))
        self.tokens, self.sentence_starts, self.document_starts = arrays

        sentences = np.diff(self.sentence_starts.searchsorted(self.document_starts))  # (documents,)
        if len(sentences) < 2 or sentences.min() < 2:
            raise ValueError("a corpus needs two documents, and each of them two sentences")

    def __reduce__(self) -> tuple:
        """Pickles the source: a worker that is not forked maps the files of a folder itself."""
        return TokenizedCorpus, (self.source,)

    def __len__(self) -> int:
        """Returns the number of tokens."""
        return len(self.tokens)

    @property
    def key(self) -> str:
        """Returns what identifies this corpus: for arrays in memory, a hash of them; otherwise the
        name of the folder, which is unique only if `get_corpus` chose it.
        """
        if isinstance(self.source, CorpusArrays):
            return make_key(*(array.tobytes() for array in self.source))
        return Path(self.source).name

    def describe(self) -> str:
        """Returns a line that says how much there is, and what was skipped."""
        documents = len(self.document_starts) - 1
        sentences = len(self.sentence_starts) - 1
        notes = "".join(f", {number:,} {name}" for name, number in self.notes.items())
        return f"{documents:,} documents, {sentences:,} sentences, {len(self):,} tokens{notes}"

    def unigram_entropy(self) -> float:
        """Returns the MLM loss, in nats, to expect of a model that knows only how often each token
        occurs (counted in the first ten million tokens).
        """
        counts = np.bincount(self.tokens[:10_000_000])
        shares = counts[counts > 0] / counts.sum()
        return float(-(shares * np.log(shares)).sum())


def map_array(folder: Path, name: str) -> np.ndarray:
    """Returns an array of a corpus on disk. Its file is named after its dtype: `tokens.uint16`."""
    (file,) = folder.glob(f"{name}.*")
    # asarray: slices of a memmap object would be ten times as slow
    return np.asarray(np.memmap(file, dtype=file.suffix[1:], mode="r"))


def make_key(*parts: Any) -> str:
    """Returns a hash of strings, bytes and numbers."""
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:20]


def span_around(starts: np.ndarray, offset: int) -> tuple[int, int]:
    """Returns the neighbors start, end in the sorted `starts` with start <= offset < end."""
    after = starts.searchsorted(offset, side="right")
    return starts.item(after - 1), starts.item(after)


# ---- Documents -> the corpus -------------------------------------------------

EncodedDocument = list[list[int]]  # the ids of each sentence


def encode_documents(
    documents: Iterable[str], tokenizer: Tokenizer, notes: Counter[str]
) -> Iterator[EncodedDocument]:
    """Yields the sentences of each document, as ids. A document of fewer than two sentences is left
    out, since no sentence follows another in it; `notes` counts these.
    """
    remaining = iter(documents)
    # Blocks of 32 give the tokenizer's threads enough to do. An empty block is the end.
    for block in iter(lambda: list(islice(remaining, 32)), []):
        split = [split_sentences(document) for document in block]
        ids = iter(encode_plain(tokenizer, list(chain.from_iterable(split))))
        for sentences in split:
            encoded = [sentence for sentence in islice(ids, len(sentences)) if sentence]
            if len(encoded) > 1:
                yield encoded
            else:
                notes["documents with fewer than two sentences skipped"] += 1


def pack(documents: list[EncodedDocument], tokenizer: Tokenizer) -> TokenizedCorpus:
    """Returns encoded documents, end to end, as a corpus in memory."""
    sentences = list(chain.from_iterable(documents))
    tokens = np.fromiter(chain.from_iterable(sentences), dtype=token_dtype(tokenizer))
    sentence_starts = np.cumsum([0, *map(len, sentences)])
    first_sentences = np.cumsum([0, *map(len, documents)])
    document_starts = sentence_starts[first_sentences]
    return TokenizedCorpus(CorpusArrays(tokens, sentence_starts, document_starts))


def token_dtype(tokenizer: Tokenizer) -> str:
    """Returns a type that holds every id. (Ids may have gaps, so the largest one decides.)"""
    return "uint16" if max(tokenizer.get_vocab().values()) < 2**16 else "uint32"


def tokenize_corpus(
    documents: Iterable[str], tokenizer: Tokenizer, folder: str | Path
) -> TokenizedCorpus:
    """Tokenizes documents into a new folder, and returns them as a corpus.

    The folder is written under another name and renamed once it is complete, so it never exists
    half-written. If it exists already, raises FileExistsError, since it may hold other documents.
    If another process is writing it, waits for that process, and returns what it has written. The
    file FOLDER.lock is left beside it.
    """
    folder = Path(folder)
    if folder.exists():
        raise FileExistsError(f"{folder} exists; TokenizedCorpus({str(folder)!r}) opens it")
    folder.parent.mkdir(parents=True, exist_ok=True)
    unfinished = folder.with_name(f"{folder.name}.unfinished")
    with folder.with_name(f"{folder.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # a killed process loses it, too
        try:
            if not folder.exists():
                shutil.rmtree(unfinished, ignore_errors=True)  # left by a killed process
                unfinished.mkdir()
                write_corpus(documents, tokenizer, unfinished)
                unfinished.rename(folder)
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            raise ValueError(f"cannot write to {folder.parent}: {error.strerror}") from error
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
    return TokenizedCorpus(folder)


def write_corpus(documents: Iterable[str], tokenizer: Tokenizer, folder: Path) -> None:
    """Writes the three arrays of `TokenizedCorpus`, and notes.json. Only the starts are held in
    memory meanwhile.
    """
    dtype = token_dtype(tokenizer)
    unknown_id = tokenizer.get_vocab()[UNK]
    unknown = 0
    notes: Counter[str] = Counter()
    sentence_starts = array("q", [0])
    document_starts = array("q", [0])
    with (folder / f"tokens.{dtype}").open("wb") as file:
        for document in encode_documents(documents, tokenizer, notes):
            tokens = np.fromiter(chain.from_iterable(document), dtype)
            file.write(tokens.tobytes())
            unknown += int((tokens == unknown_id).sum())
            for sentence in document:
                sentence_starts.append(sentence_starts[-1] + len(sentence))
            document_starts.append(sentence_starts[-1])
    usable = len(document_starts) - 1
    if usable < 2:
        raise ValueError(
            f"only {usable} documents have two sentences, but 2 are needed; {dict(notes)}"
            " (a .txt file is one; if each row is a sentence, rows_per_document joins them)"
        )
    (folder / "sentence_starts.int64").write_bytes(sentence_starts)
    (folder / "document_starts.int64").write_bytes(document_starts)
    percent = round(100 * unknown / document_starts[-1], 2)
    (folder / "notes.json").write_text(json.dumps({**notes, "% [UNK]": percent}))


# ---- A pair of segments ------------------------------------------------------

# Each example, and the order of each epoch, has a random generator of its own:
# np.random.default_rng((seed, purpose, epoch, index in the epoch)). So it does not matter which
# process draws from it, or what was drawn before. (train_sst2.py uses purpose 2.)
PURPOSE_EXAMPLE, PURPOSE_ORDER = 0, 1


class Seam(NamedTuple):
    """The start of a sentence that is not its document's first: segment A may end before it, and
    segment B may start at it.
    """

    document_start: int
    offset: int
    document_end: int


class Pair(NamedTuple):
    """Segment A and segment B as offsets in the corpus; ends are exclusive."""

    a_start: int
    a_end: int
    b_start: int
    b_end: int
    is_random: bool


def find_seam(corpus: TokenizedCorpus, offset: int) -> Seam:
    """Returns the seam at the end of the sentence around `offset` or, if that sentence is the last
    one of its document, at the start of the sentence.
    """
    document_start, document_end = span_around(corpus.document_starts, offset)
    sentence_start, sentence_end = span_around(corpus.sentence_starts, offset)
    is_last_sentence = sentence_end == document_end
    seam = sentence_start if is_last_sentence else sentence_end
    return Seam(document_start, seam, document_end)


def draw_pair(
    corpus: TokenizedCorpus, rng: np.random.Generator, start: int, end: int, room: int
) -> Pair:
    """Draws segment A and segment B of one example. [BERT] §3.1 task 2, A.2. WALKTHROUGH.md, 4,
    has a drawing.

    start, end: the slice of the corpus in which the first offset is drawn. room: how many tokens
    both segments may have together.

    1. Draw the total length: `room` tokens or, with probability 0.1, any number from 2 to `room`,
       because fine-tuning meets short texts, too.
    2. Draw an offset in the slice and one in another document; find the seam of each (`find_seam`).
    3. Split the length at random. A gets at most `longest_a` tokens, the smaller of what the two
       documents have before their seams; B at most `longest_b`, the same for what comes after.
       What one segment lacks the text for goes to the other. So each fits at either seam.
    4. Toss two coins: the first chooses the seam at which segment A ends, the second the seam at
       which segment B starts. If they choose the same seam, the pair is a true one, otherwise a
       random one. (One example in four is a true pair from the other document.)

    Seams and lengths are fixed before the coins are tossed. So neither segment alone, nor the
    lengths, reveal the label: only both segments together do.

    The length is at most longest_a + longest_b - 1, or 2 if that is less. With one more token, A
    could start a document while B ends one, and how often both happen could depend on the label.

    Differs: [Code] draws random and true segments B by different rules, so that the length or the
    style of segment B can reveal the label.
    """
    is_short = rng.random() < 0.1
    target = int(rng.integers(2, room + 1)) if is_short else room

    seam = find_seam(corpus, int(rng.integers(start, end)))
    document_length = seam.document_end - seam.document_start
    elsewhere = int(rng.integers(len(corpus) - document_length))
    if elsewhere >= seam.document_start:
        elsewhere += document_length  # steps over this document
    other = find_seam(corpus, elsewhere)

    longest_a = min(seam.offset - seam.document_start, other.offset - other.document_start)
    longest_b = min(seam.document_end - seam.offset, other.document_end - other.offset)
    length = min(target, max(2, longest_a + longest_b - 1))
    length_a_drawn = min(1 + int(rng.random() * (length - 1)), longest_a)  # of A, at first
    length_b = min(length - length_a_drawn, longest_b)
    length_a = length - length_b  # also what B lacks the text for

    coin_a = int(rng.integers(2))
    coin_b = int(rng.integers(2))
    a_end = other.offset if coin_a else seam.offset
    b_start = other.offset if coin_b else seam.offset
    return Pair(a_end - length_a, a_end, b_start, b_start + length_b, coin_a != coin_b)


# ---- Masked columns ----------------------------------------------------------


def choose_words(
    continues_word: np.ndarray, masked_count: int, rng: np.random.Generator
) -> np.ndarray:
    """Returns which tokens whole-word masking masks, bool (n,): at least `masked_count`.

    continues_word: bool (n,), True for a token of the same word as the one before it.

    Takes words in a random order until they have `masked_count` tokens; the last one may exceed it.
    Differs: [Code] skips a word that would exceed the number, and so masks long words less often.
    """
    word_of_token = np.cumsum(~continues_word) - 1  # (n,)
    lengths = np.bincount(word_of_token)  # (words,)
    order = rng.permutation(len(lengths))
    tokens_before = np.cumsum(lengths[order]) - lengths[order]
    is_taken = np.zeros(len(lengths), dtype=bool)
    is_taken[order] = tokens_before < masked_count
    return is_taken[word_of_token]


def mask_tokens(
    input_ids: np.ndarray,
    masked_columns: np.ndarray,
    rng: np.random.Generator,
    mask_id: int,
    ordinary_ids: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """Returns a row's ids, changed at the masked columns, and its labels, both int64 (seq,).

    [BERT] §3.1 task 1 and A.1. Each token at a masked column, independently of the others,
    - becomes [MASK] with probability 0.8. (Fine-tuning has no [MASK]; hence the other two.)
    - becomes one of `ordinary_ids` with probability 0.1: the model cannot trust any token it reads.
    - stays with probability 0.1. Otherwise, an ordinary token at a masked column would always be
      wrong, and the model would learn to ignore what it reads there.
    Labels are the original ids at masked columns, and -100 elsewhere.

    Differs: [Code]'s random tokens include the special ones.
    """
    original_ids = input_ids[masked_columns]
    labels = np.full(len(input_ids), IGNORED_LABEL, dtype=np.int64)
    labels[masked_columns] = original_ids

    draw = rng.random(len(masked_columns))
    random_share = rng.random(len(masked_columns))
    random_index = (random_share * len(ordinary_ids)).astype(np.int64)
    random_ids = ordinary_ids[random_index]
    random_or_kept = np.where(draw < 0.9, random_ids, original_ids)
    corrupted = input_ids.copy()
    corrupted[masked_columns] = np.where(draw < 0.8, mask_id, random_or_kept)
    return corrupted, labels


# ---- An example, a batch -----------------------------------------------------

Example = dict[str, np.ndarray]  # see `PretrainDataset.__getitem__`


@dataclass(eq=False)  # arrays have no single truth value when compared
class PretrainDataset(Dataset):
    """Examples `[CLS] A [SEP] B [SEP]` with masks. [BERT] §3.1, A.1, A.2.

    Indices continue across epochs: `dataset[index]` is example `index % len(dataset)` of epoch
    `index // len(dataset)`. An example depends only on the arguments below and on its index. So
    every epoch has new pairs and masks, and one integer is enough to resume. (A plain
    `DataLoader(dataset, shuffle=True)` never leaves epoch 0, and so repeats its masks.)

    masked_share: the share of the two segments' tokens to mask; at least one token is masked.
    Differs: [Code] also counts [CLS] and [SEP], which it never masks, and masks at most
    max_predictions_per_seq tokens.
    """

    corpus: TokenizedCorpus
    tokenizer: Tokenizer
    max_seq_length: int
    seed: int = 0
    whole_word_masking: bool = False
    masked_share: float = 0.15

    def __post_init__(self) -> None:
        if self.max_seq_length < 5:
            raise ValueError(f"max_seq_length={self.max_seq_length} is too short for five tokens")
        self.room = self.max_seq_length - 3  # without [CLS] and two [SEP]
        vocabulary = self.tokenizer.get_vocab()
        self.padding_idx = vocabulary[PAD]
        self.cls_id = vocabulary[CLS]
        self.sep_id = vocabulary[SEP]
        self.mask_id = vocabulary[MASK]
        ordinary = vocabulary.keys() - set(SPECIAL_TOKENS)
        self.ordinary_ids = np.array(sorted(vocabulary[token] for token in ordinary))
        piece_ids = [id for token, id in vocabulary.items() if token.startswith("##")]
        # (largest id + 1,), True for tokens that continue a word
        self.is_piece = np.zeros(max(vocabulary.values()) + 1, dtype=bool)
        self.is_piece[piece_ids] = True

    def __len__(self) -> int:
        """Returns the examples of an epoch: as many as would hold the corpus if all were full."""
        return max(1, len(self.corpus) // self.room)

    def __iter__(self) -> Iterator[Example]:
        """Yields the examples of the first epoch: indices have no end, but a `for` needs one."""
        return (self[index] for index in range(len(self)))

    def __getitem__(self, index: int) -> Example:
        """Returns one example, int64.

        `input_ids`, `token_type_ids` (0 = [CLS] A [SEP], 1 = B [SEP]) and `mlm_labels` (-100 where
        nothing is to be predicted) are (seq,), without padding; `nsp_labels` is one number, 0 =
        segment B is next, 1 = it is random.
        """
        size = len(self)
        epoch, index_in_epoch = divmod(index, size)
        rng = np.random.default_rng((self.seed, PURPOSE_EXAMPLE, epoch, index_in_epoch))
        # Each example of an epoch draws the offset of its first seam from its own slice of the
        # corpus, so that seams are spread evenly. (An epoch does not draw each token once.)
        part_start = index_in_epoch * len(self.corpus) // size
        part_end = (index_in_epoch + 1) * len(self.corpus) // size
        pair = draw_pair(self.corpus, rng, part_start, part_end, self.room)

        segment_a = self.corpus.tokens[pair.a_start : pair.a_end]
        segment_b = self.corpus.tokens[pair.b_start : pair.b_end]
        first_sep = 1 + len(segment_a)  # its column
        input_ids = np.concatenate(  # int64, since the lists are
            [[self.cls_id], segment_a, [self.sep_id], segment_b, [self.sep_id]]
        )
        token_type_ids = np.zeros(len(input_ids), dtype=np.int64)
        token_type_ids[first_sep + 1 :] = 1

        masked_columns = self.choose_columns(input_ids, first_sep, rng)
        corrupted, labels = mask_tokens(
            input_ids, masked_columns, rng, self.mask_id, self.ordinary_ids
        )
        return {
            "input_ids": corrupted,
            "token_type_ids": token_type_ids,
            "mlm_labels": labels,
            "nsp_labels": np.array(pair.is_random, dtype=np.int64),
        }

    def choose_columns(
        self, input_ids: np.ndarray, first_sep: int, rng: np.random.Generator
    ) -> np.ndarray:
        """Returns the masked columns, int64 (masked,): none of them is [CLS] or [SEP].

        There is always at least one. An example without any would teach the masked language model
        nothing, and a batch of such examples would have a mean loss of 0 / 0.
        """
        columns = np.arange(len(input_ids))
        candidates = np.concatenate([columns[1:first_sep], columns[first_sep + 1 : -1]])
        masked_count = max(1, round(self.masked_share * len(candidates)))
        if not self.whole_word_masking:
            return rng.permutation(candidates)[:masked_count]
        continues_word = self.is_piece[input_ids[candidates]]
        first_of_b = first_sep - 1  # its index in `candidates`: the tokens of A come before it
        # If a segment starts in the middle of a word, its first token counts as the word's first.
        continues_word[[0, first_of_b]] = False
        return candidates[choose_words(continues_word, masked_count, rng)]

    def batch(self, indices: Iterable[int]) -> dict[str, torch.Tensor]:
        """Returns the examples with these indices as one padded batch; see `collate`."""
        return collate([self[index] for index in indices], self.padding_idx)


def collate(examples: list[Example], padding_idx: int) -> dict[str, torch.Tensor]:
    """Returns a batch, int64.

    - `nsp_labels`, (batch,).
    - `input_ids`, `token_type_ids`, `mlm_labels`, (batch, seq): padded to the longest example with
      `padding_idx`, 0 and -100.
    - `masked_indices`, `mlm_targets`, (masked,), those of the whole batch: where the masked tokens
      are, and what they were. Column c of row r has the index r * seq + c.
    """
    padding = {"input_ids": padding_idx, "token_type_ids": 0, "mlm_labels": IGNORED_LABEL}
    batch = {"nsp_labels": torch.tensor([int(example["nsp_labels"]) for example in examples])}
    for name, value in padding.items():
        rows = [torch.from_numpy(example[name]) for example in examples]
        batch[name] = pad_sequence(rows, batch_first=True, padding_value=value)
    # Computed here, in a data worker: on a GPU, `nonzero()` would make the CPU wait.
    labels = batch["mlm_labels"].flatten()  # (batch * seq,)
    batch["masked_indices"] = (labels != IGNORED_LABEL).nonzero().flatten()
    batch["mlm_targets"] = labels[batch["masked_indices"]]
    return batch


# ---- The order of examples ---------------------------------------------------


@lru_cache(maxsize=2)  # a batch may lie across two epochs
def order_of_epoch(seed: int, epoch: int, size: int) -> np.ndarray:
    """Returns the order of an epoch's examples: the numbers from 0 to size - 1, shuffled."""
    return np.random.default_rng((seed, PURPOSE_ORDER, epoch, 0)).permutation(size)


@dataclass(eq=False)
class EpochSampler(Sampler):
    """Yields batches of indices without end: all examples of an epoch once, in a random order, then
    those of the next.

    There is one order of batches for all ranks: rank r of n takes batches r, r + n, r + 2n, and so
    on. start: how many of its batches a rank skips. A resumed run needs only this integer. A batch
    may contain the end of one epoch and the start of the next.

    Example: 5 examples in batches of 2. If the orders of two epochs are 3 0 4 1 2 and 1 4 0 3 2,
    the batches are [3, 0], [4, 1], [2, 6], [9, 5], [8, 7]: indices 5 to 9 are the second epoch.
    """

    size: int
    batch_size: int
    seed: int
    start: int = 0
    rank: int = 0
    world_size: int = 1

    def __iter__(self) -> Iterator[list[int]]:
        for batch in count(self.start * self.world_size + self.rank, self.world_size):
            indices = []
            # A turn is a place in the endless shuffled sequence of examples.
            first_turn = batch * self.batch_size
            for turn in range(first_turn, first_turn + self.batch_size):
                epoch, turn_in_epoch = divmod(turn, self.size)
                order = order_of_epoch(self.seed, epoch, self.size)
                indices.append(epoch * self.size + int(order[turn_in_epoch]))
            yield indices


# ---- Reading documents -------------------------------------------------------


@dataclass(eq=False)
class Documents:
    """The documents of a data set, as texts. They can be read any number of times.

    rows: a `datasets` split, stored or streamed. rows_per_document: > 1 joins that many rows, with
    a blank line between them, for corpora with one sentence per row. held_out: True yields only the
    documents that are held out (one in a hundred), False only the rest, None all documents.
    """

    path: str
    rows: Any
    column: str = "text"
    rows_per_document: int = 1
    held_out: bool | None = None

    def __iter__(self) -> Iterator[str]:
        texts = self.texts()
        for parts in iter(lambda: list(islice(texts, self.rows_per_document)), []):
            document = "\n\n".join(part for part in parts if part)
            if self.held_out is None or is_held_out(document) == self.held_out:
                yield document

    def texts(self) -> Iterator[str]:
        """Yields the text of each row, "" for None. Raises ValueError for anything else."""
        with reading(self.path):
            for index, row in enumerate(self.rows):
                text = row[self.column]
                if not isinstance(text, str | None):
                    raise ValueError(f"row {index}: {self.column} is {text!r}, not text")
                yield text or ""


def is_held_out(document: str) -> bool:
    """Returns whether a stream holds this document out: about one in a hundred."""
    return zlib.crc32(document.encode()) % 100 == 0


def get_documents(
    path: str,
    name: str | None = None,
    split: str = "train",
    column: str = "text",
    rows_per_document: int = 1,
    streaming: bool = False,
) -> dict[str, Documents]:
    """Returns the documents to train on, "train", and those to evaluate on, "validation".

    name: the configuration of a hub data set that has several.
    split: what to train on: "train", "train+unsupervised", "train[:10%]"; when streaming, it must
    be one whole split. The split "validation" is used for evaluation. If there is none, or if
    `split` names it, the last 1% of the rows, but at least two documents, are held out instead;
    when streaming, it is one document in a hundred.
    """
    splits = get_dataset(path, name, None, column, streaming)
    if streaming and split not in splits:
        raise ValueError(f"{split} is not one of the splits {', '.join(splits)}")
    rows = splits[split] if streaming else select_split(splits, split)
    train = Documents(path, rows, column, rows_per_document)
    if "validation" in splits and "validation" not in split:
        return {"train": train, "validation": replace(train, rows=splits["validation"])}
    if streaming:
        if rows_per_document > 1:  # readers would join different rows, and hold out different ones
            raise ValueError("rows_per_document: a stream then needs a held-out split validation")
        return {
            "train": replace(train, held_out=False),
            "validation": replace(train, held_out=True),
        }
    end = max(0, len(rows) - max(2 * rows_per_document, len(rows) // 100))
    held_out = rows.select(range(end, len(rows)))
    return {
        "train": replace(train, rows=rows.select(range(end))),
        "validation": replace(train, rows=held_out),
    }


def get_corpus(documents: Documents, tokenizer: Tokenizer) -> TokenizedCorpus:
    """Returns stored documents as a corpus. They are tokenized once, into a folder in the cache of
    `datasets`. Its name depends on the rows (of files: paths, sizes, times) and on `how`.
    """
    how = (tokenizer.to_str(), documents.column, documents.rows_per_document, SPLIT_VERSION)
    cache = Path(datasets.config.HF_DATASETS_CACHE) / "bert-in-four-files"
    folder = cache / make_key(documents.rows._fingerprint, *how)
    with contextlib.suppress(FileExistsError):  # an earlier run has tokenized them
        tokenize_corpus(documents, tokenizer, folder)
    return TokenizedCorpus(folder)


SAMPLE = Path(__file__).with_name("sample")  # the folder of a small invented corpus


def get_dataset(
    path: str,
    name: str | None = None,
    split: str | None = "train",
    column: str | None = None,
    streaming: bool = False,
) -> Any:
    """Returns a split of a data set or, with split=None, a dict of all. A stream needs split=None.

    path: "sample", a hub id, or a file or directory (see `list_files`). column: the only column to
    read.
    """
    where = SAMPLE / "corpus" if path == "sample" else Path(path)
    splits = {}
    with reading(path):
        if where.exists():
            kind = datasets.IterableDataset if streaming else datasets.Dataset
            for part, files in list_files(where).items():
                how = {"files": files, "column": column}
                splits[part] = kind.from_generator(read_files, gen_kwargs=how)
        else:
            for part, rows in datasets.load_dataset(path, name, streaming=streaming).items():
                splits[part] = rows.select_columns(column) if column else rows
        return splits if split is None else select_split(splits, split)


def select_split(splits: dict[str, Any], split: str) -> Any:
    """Returns what "train", "train+unsupervised" or "train[:10%]" means."""
    sizes = {part: len(rows) for part, rows in splits.items()}
    parts = datasets.ReadInstruction.from_spec(split).to_absolute(sizes)
    return datasets.concatenate_datasets(
        [splits[part.splitname].select(range(part.from_, part.to)) for part in parts]
    )


StampedFile = tuple[str, int, int]  # its path, its size, and when it was changed
IGNORED_FILES = ("README.md", "LICENSE")


def list_files(where: Path) -> dict[str, list[StampedFile]]:
    """Returns the files of each split of a local data set, with their sizes and modification times,
    because `datasets` caches what it has read under a name that depends on these.

    In a directory and its subdirectories, a file whose name starts with the word train, validation
    (also valid, val, dev) or test belongs to that split; all others belong to train. Files of other
    types are rejected, since their text would be missed, except hidden ones and `IGNORED_FILES`.
    """
    splits: dict[str, list[StampedFile]] = {}
    for file in sorted(where.rglob("*")) if where.is_dir() else [where]:
        is_hidden = any(part.startswith(".") for part in file.relative_to(where).parts)
        if is_hidden or not file.is_file() or file.name in IGNORED_FILES:
            continue
        if file.suffix.lower() not in {".txt", ".json", ".jsonl", ".parquet"}:
            raise ValueError(f"{file.name} is not a .txt, .json, .jsonl or .parquet file")
        name = re.sub(r"^(valid|val|dev)(?![a-z])", "validation", file.name)
        first_word = re.match(r"(train|validation|test)(?![a-z])", name)
        split = first_word[1] if first_word and where.is_dir() else "train"
        about = file.stat()
        stamped = (str(file.absolute()), about.st_size, about.st_mtime_ns)
        splits.setdefault(split, []).append(stamped)
    if not splits:
        raise ValueError("there is no .txt, .json, .jsonl or .parquet file")
    return splits


def read_files(files: list[StampedFile], column: str | None) -> Iterator[dict]:
    """Yields the rows of files, one after another. If a column is named, only it is kept, and the
    files may differ in all others. `datasets` caches the rows: if you change this function or
    `read_rows`, delete its cache.
    """
    for file, _, _ in files:
        with reading(file):
            for row in read_rows(Path(file)):
                if column and column not in row:
                    raise ValueError(f"no column {column} among {', '.join(row)}")
                yield {column: row[column]} if column else row


def read_rows(file: Path) -> Iterator[dict]:
    """Yields the rows of a file. A .txt file is one row."""
    if file.suffix.lower() == ".txt":
        yield {"text": file.read_text(encoding="utf-8")}
    elif file.suffix.lower() == ".parquet":
        for batch in ParquetFile(file).iter_batches(100):
            yield from batch.to_pylist()
    else:
        with file.open(encoding="utf-8") as lines:
            is_list = lines.read(1) == "["
            lines.seek(0)
            if is_list:
                yield from json.load(lines)
            else:
                yield from (json.loads(line) for line in lines if line.strip())


@contextlib.contextmanager
def reading(path: str | Path) -> Iterator[None]:
    """Turns any error in its block, mostly from a library, into a ValueError of one line."""
    try:
        yield
    except Exception as error:  # of datasets, tokenizers, pyarrow, gzip, fsspec: they share no base
        wrapped = isinstance(error, datasets.exceptions.DatasetGenerationError)
        cause = (error.__cause__ if wrapped else None) or error
        text = str(cause).removeprefix("An error occurred while generating the dataset").lstrip()
        reason = text.partition("\n")[0] or type(cause).__name__
        if getattr(cause, "errno", None) == errno.ENOSPC:
            reason = f"{reason}; the cache is {datasets.config.HF_DATASETS_CACHE}"
        raise ValueError(f"cannot read {path}: {reason}") from error


# ---- The stream --------------------------------------------------------------

STREAM_BLOCK = 1_000_000  # tokens, about 8,000 examples of 128


@dataclass(eq=False)
class Stream(IterableDataset):
    """Endless examples from a corpus that is not stored, because it does not fit on the disk.

    Each worker reads its own shards, which `datasets` assigns to it. It treats one block of
    documents at a time as a corpus, and yields each example of the block once. Examples are
    shuffled only within their block; blocks come in the order of the files.

    documents: those of a streamed split. make_dataset: makes the examples of a block.
    """

    documents: Documents
    tokenizer: Tokenizer
    make_dataset: Callable[[TokenizedCorpus], PretrainDataset]
    rank: int = 0
    world_size: int = 1

    def __iter__(self) -> Iterator[Example]:
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        # The index of a block, counted across all workers, stands in for the epoch. `__getitem__`
        # recovers it from the index of an example.
        epochs = count(self.rank * workers + worker, self.world_size * workers)
        for epoch, corpus in zip(epochs, self.blocks(), strict=False):
            dataset = self.make_dataset(corpus)
            for index in order_of_epoch(dataset.seed, epoch, len(dataset)).tolist():
                yield dataset[epoch * len(dataset) + index]

    def blocks(self) -> Iterator[TokenizedCorpus]:
        """Yields blocks, pass after pass. A block ends after `STREAM_BLOCK` tokens or with the
        pass. It has at least two documents: a single one left over starts the next pass's block.
        """
        block: list[EncodedDocument] = []
        while True:
            usable = size = 0
            for document in encode_documents(self.documents, self.tokenizer, Counter()):
                block.append(document)
                usable += 1
                size += sum(map(len, document))
                if size >= STREAM_BLOCK and len(block) > 1:
                    yield pack(block, self.tokenizer)
                    block = []
                    size = 0
            if usable < 2:
                raise ValueError("a worker has fewer than two documents: use fewer --workers")
            if len(block) > 1:
                yield pack(block, self.tokenizer)
                block = []


def first_documents(documents: Documents, tokenizer: Tokenizer) -> TokenizedCorpus:
    """Returns the first 64 documents as a corpus in memory: what a stream is evaluated on."""
    encoded = encode_documents(documents, tokenizer, Counter())
    return pack(list(islice(encoded, 64)), tokenizer)


# ---- Loaders -----------------------------------------------------------------

# Seconds to wait for a batch. A worker that cannot send its batch, because /dev/shm is full or the
# path of TMPDIR is too long, becomes an error; without a limit, the loader would wait forever.
WORKER_TIMEOUT = 120


def get_split_dataloader(
    dataset: PretrainDataset | Stream,
    batch_size: int,
    start: int = 0,
    rank: int = 0,
    world_size: int = 1,
    workers: int = 2,
) -> DataLoader:
    """Returns an endless loader of one rank's batches: one sequence of batches is dealt to the
    ranks in turn. For a stream, files are dealt instead, or rows if the files cannot be shared
    evenly.

    start: how many batches of this rank to skip; a stream always starts at its beginning.
    workers: two should feed a fast GPU. Each further worker takes memory for 4 batches and, with a
    stream, for a block. A stream starts at most one worker for each file of the rank.
    """
    how: dict[str, Any] = {
        "num_workers": workers,
        "prefetch_factor": 4 if workers else None,
        "timeout": WORKER_TIMEOUT if workers else 0,
        "pin_memory": torch.cuda.is_available(),
        "collate_fn": partial(collate, padding_idx=dataset.tokenizer.get_vocab()[PAD]),
    }
    if isinstance(dataset, PretrainDataset):
        sampler = EpochSampler(len(dataset), batch_size, dataset.seed, start, rank, world_size)
        return DataLoader(dataset, batch_sampler=sampler, **how)
    documents = dataset.documents
    shards = documents.rows.num_shards
    # If files cannot be shared evenly, each rank reads every n-th row. These are not neighbors.
    if shards % world_size and documents.rows_per_document > 1:
        raise ValueError(f"rows_per_document: {world_size} ranks cannot share {shards} files")
    own_rows = split_dataset_by_node(documents.rows, rank, world_size)
    own = replace(documents, rows=own_rows)
    stream = replace(dataset, documents=own, rank=rank, world_size=world_size)
    how["num_workers"] = min(workers, own_rows.num_shards)
    return DataLoader(stream, batch_size, **how)


# ---- Reading tokenizers ------------------------------------------------------


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Returns the tokenizer of a vocab.txt, a tokenizer.json, a directory, or a hub id.

    In a directory, tokenizer.json comes first, as in transformers. A vocab.txt is WordPiece, with
    the options of the tokenizer_config.json beside it.
    """
    file = Path(path)
    with reading(path):
        if not file.exists() and file.suffix not in {".txt", ".json"}:
            files = ["tokenizer.json", "tokenizer_config.json", "vocab.txt"]
            file = Path(snapshot_download(str(path), allow_patterns=files))
        if file.is_dir():
            names = [name for name in ("tokenizer.json", "vocab.txt") if (file / name).exists()]
            if not names:
                raise ValueError("put vocab.txt or tokenizer.json there")
            file = file / names[0]
        if file.suffix == ".txt":
            tokenizer = read_vocabulary(file)
        else:
            tokenizer = Tokenizer.from_file(str(file))
        check_tokens(tokenizer)
    # A [MASK] in a text is then one token, except in `encode_plain`.
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def read_vocabulary(file: Path) -> Tokenizer:
    """Returns the tokenizer of a vocab.txt, where an id is the number of a line, from 0."""
    tokens = file.read_text(encoding="utf-8-sig").removesuffix("\n").split("\n")
    config = file.with_name("tokenizer_config.json")
    about = json.loads(config.read_text(encoding="utf-8")) if config.exists() else {}
    return wordpiece(
        {token: i for i, token in enumerate(tokens)},
        lowercase=about.get("do_lower_case", True),
        strip_accents=about.get("strip_accents"),
        handle_chinese_chars=about.get("tokenize_chinese_chars", True),
    )


def check_tokens(tokenizer: Tokenizer) -> None:
    """Raises ValueError if a special token is missing, or if text is lowercased and a token has
    upper case, so that no text matches it. Added tokens and those that start with [ or < do not
    count. (Google's Chinese vocabulary has <S>.)
    """
    vocabulary = tokenizer.get_vocab()
    missing = set(SPECIAL_TOKENS) - set(vocabulary)
    if missing:
        raise ValueError(f"the tokenizer lacks {', '.join(sorted(missing))}")
    added = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
    ordinary = [token for token in vocabulary.keys() - added if token[:1] not in ("[", "<")]
    cased = sorted(token for token in ordinary if token != token.lower())
    lowercases = tokenizer.normalizer and tokenizer.normalizer.normalize_str("A") == "a"
    if cased and lowercases:
        raise ValueError(
            f"text is lowercased, but {cased[0]} is a token: use a folder with vocab.txt, without"
            ' tokenizer.json, whose tokenizer_config.json has {"do_lower_case": false}'
        )
