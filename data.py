"""BERT's data: tokenize once, build examples on the fly, each a function of (corpus, seed, index).

Transforming a whole corpus into masked examples before training gives every epoch the same masks,
and to do it anew for every epoch would take days. So the work is divided:

    stage 1, once        text -> sentences -> tokens -> one array on disk, memory-mapped
    stage 2, in workers  a pair of segments -> an example, with masks -> a batch

The sections below are in this order. After them come SST-2, and at the end the reading of files.
Stage 2 makes one example at a time. Its random numbers depend only on the seed, the epoch and the
index of the example within the epoch. So the masks differ in every epoch, and neither workers nor
ranks nor a resume change a token.

Differs: [Code] writes ten differently masked copies of the corpus to disk before training.

Words used throughout:
    document   a text such as a book or a review: one row of a data set, or several joined
    position   offset of a token in the whole corpus: the number of tokens before it
    column     offset of a token in an example, where column 0 is [CLS] (in stage 1, and where files
               are read, it is a named column of a table)
    candidates the columns that may be masked: those of both segments, without [CLS] and [SEP]
    masked columns: those whose tokens are to be predicted
    start, end of a span: its first token, and the token after its last one. A span is written
               start .. end, without its end; "from 2 to 5" includes both
    example    `[CLS] segment A [SEP] segment B [SEP]` with masks and labels
    seam       a position where segment A may end and segment B may start

[BERT] Devlin et al. 2018, arXiv 1810.04805. [Code] google-research/bert, commit eedf5716.
Dimensions in comments: batch, seq (columns of an example), masked (masked columns of one example).
"""

import glob
import json
import math
import os
import re
import sys
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from functools import lru_cache, partial
from itertools import count, pairwise
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import numpy as np
import torch
from datasets import Features, List, Value
from datasets.data_files import FILES_TO_IGNORE
from datasets.exceptions import DatasetGenerationError
from huggingface_hub import snapshot_download
from numpy.random.bit_generator import ISeedSequence
from tokenizers import BertWordPieceTokenizer, Tokenizer, trainers
from torch.utils.data import DataLoader, Dataset, Sampler

# Tokenizing runs in several processes. If `tokenizers` also started threads, a process
# that is forked afterwards could deadlock.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

PAD, UNK, CLS, SEP, MASK = SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
# The label of a token that is not to be predicted. cross_entropy skips it.
IGNORED_LABEL = -100
# A small invented corpus that comes with the code.
SAMPLE = Path(__file__).with_name("sample")

# ---- Text -> sentences -------------------------------------------------------

# A sentence ends after . ! ? or an ellipsis before white space, but not after an initial
# or a title. (?<!...) looks back, only over strings of one length, so "mrs" stands apart.
# A sentence also ends after 。！？ and at a blank line. Closing quotation marks and brackets
# belong to the sentence that they close.
SENTENCE_END = re.compile(
    r"""[.!?…](?<!\b[A-Za-z]\.)(?<!\b(?i:mr|ms|dr|st)\.)(?<!\b(?i:mrs)\.)["'”’)\]]*(?=\s)"""
    r"""|[。！？]+["'”’)\]」』）】]*|\n\s*\n"""
)
# Up to 999 characters and the white space, or the end of the text, after them; or exactly 1,000.
PIECE = re.compile(r".{1,999}(?:\s|\Z)|.{1000}", re.DOTALL)


def split_sentences(text: str) -> list[str]:
    """Cuts a text into sentences, at `SENTENCE_END`. White space around them is dropped.

    A rough rule is enough: a "sentence" may be any contiguous span of text ([BERT] §3). A span of
    more than 1,000 characters is cut at white space, or after 1,000 characters if none is within.

    Example: 'Dr. No sat. "Why?" she asked' -> ['Dr. No sat.', '"Why?"', 'she asked'].
    """
    ends = [match.end() for match in SENTENCE_END.finditer(text)]
    sentences: list[str] = []
    for start, end in pairwise([0, *ends, len(text)]):
        span = text[start:end]
        pieces = PIECE.findall(span) if len(span) > 1000 else [span]
        sentences.extend(piece.strip() for piece in pieces)
    return [sentence for sentence in sentences if sentence]


# ---- Sentences -> tokens -----------------------------------------------------


def wordpiece(vocabulary: dict[str, int] | None, **normalizer: bool | None) -> Tokenizer:
    """Returns a WordPiece tokenizer. [Code] tokenization.py.

    vocabulary: the id of each token, or None for a tokenizer that is to be trained. `encode` adds
    [CLS] and [SEP] only with a vocabulary.

    normalizer: options, with their defaults: `lowercase` (True), `strip_accents` (the same as
    lowercase), `handle_chinese_chars` (True).

    Differs: a word of more than 100 characters is [UNK], as in transformers; in [Code] one of more
    than 200.
    """
    # BertWordPieceTokenizer wraps a Tokenizer and hides most of its methods: return a plain copy.
    return Tokenizer.from_str(BertWordPieceTokenizer(vocabulary, **normalizer).to_str())


def train_tokenizer(texts: Iterable[str | None], vocab_size: int) -> Tokenizer:
    """Returns uncased WordPiece learned from texts; the same texts give the same ids, in any order.

    texts: are read twice, so that they need not fit into memory; None is an empty text.
    The trainer breaks ties between characters in hash order, which differs between runs. So every
    character, alone and as a ## piece, is handed to it as a fixed token, in sorted order.
    """
    if isinstance(texts, Iterator):  # which can be read only once
        texts = list(texts)
    learner = wordpiece(None)
    characters: set[str] = set()
    for text in texts:
        characters.update(learner.normalizer.normalize_str(text or ""))
    letters = sorted(characters - {" "})
    pieces = ["##" + letter for letter in letters]
    fixed_tokens = [*SPECIAL_TOKENS, *letters, *pieces]
    if vocab_size < len(fixed_tokens):
        raise ValueError(
            f"--vocab-size {vocab_size}: the special tokens and the characters of the text, each"
            f" alone and as a ## piece, are {len(fixed_tokens)} tokens"
        )
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocab_size, special_tokens=fixed_tokens, show_progress=False
    )
    learner.train_from_iterator((text for text in texts if text), trainer)
    # To `learner` the fixed tokens, and so all characters, are special: keep its vocabulary alone.
    return wordpiece(learner.get_vocab())


def encode_plain(tokenizer: Tokenizer, texts: list[str]) -> list[list[int]]:
    """Returns the ids of each text, without [CLS] and [SEP].

    A "[MASK]" that stands in a text is read as ordinary text. At most 1,000 texts are encoded at a
    time, because the encodings of `tokenizers` take far more memory than their ids.
    """
    ids: list[list[int]] = []
    tokenizer.encode_special_tokens = True  # means: they are treated as other text is
    try:
        for start in range(0, len(texts), 1000):
            part = texts[start : start + 1000]
            encodings = tokenizer.encode_batch_fast(part, add_special_tokens=False)
            ids.extend(encoding.ids for encoding in encodings)
    finally:
        tokenizer.encode_special_tokens = False
    return ids


# ---- Stage 1: documents -> a table of tokens ---------------------------------


STAGE_1_VERSION = 2  # part of the cache's key: to be raised when the result of stage 1 changes


def tokenize_documents(
    rows: dict, indices: list[int], tokenizer: Tokenizer, column: str, rows_per_document: int = 1
) -> dict:
    """Tokenizes a few documents: the function that `tokenize_dataset` maps over all of them.

    rows: texts, or lists of texts that are joined, under the key `column`.
    indices: the index of each document in the corpus, for error messages.
    Raises ValueError, naming the row, if a text (or an item of a list) is none. None is an empty
    text.

    Example: a document whose two sentences have the ids [7, 8, 9] and [4, 5] gives the tokens
    [7, 8, 9, 4, 5], the starts [0, 3], and 2 sentences.
    """
    columns: dict[str, list] = {"tokens": [], "starts": [], "sentences": []}
    for index, cell in zip(indices, rows[column], strict=True):
        parts = cell if isinstance(cell, list) else [cell]
        for i, part in enumerate(parts):
            if not isinstance(part, str | None):
                # If rows are joined, item i is a row. Otherwise all items are those of one row.
                row = index * rows_per_document + (i if rows_per_document > 1 else 0)
                raise ValueError(f"row {row}: {column} is {type(part).__name__}, not text")
        text = "\n\n".join(part for part in parts if part)  # a blank line ends a sentence

        ids = encode_plain(tokenizer, split_sentences(text))
        sentences = [sentence for sentence in ids if sentence]
        # With one sentence, no sentence follows another.
        kept = sentences if len(sentences) > 1 else []
        lengths = np.array([len(sentence) for sentence in kept], dtype=np.int64)
        tokens = [token for sentence in kept for token in sentence]
        columns["tokens"].append(np.array(tokens, dtype=np.uint32))
        columns["starts"].append(np.cumsum(lengths) - lengths)
        columns["sentences"].append(len(sentences))
    return columns


def tokenize_dataset(
    dataset: datasets.Dataset,
    tokenizer: Tokenizer,
    text_column: str = "text",
    rows_per_document: int = 1,
    processes: int | None = None,
) -> datasets.Dataset:
    """Returns stage 1: a table with a row for each document.

    - `tokens`: all its tokens, 2 bytes each, or 4 if the vocabulary has an id above 65,535;
    - `starts`: where its sentences start among them;
    - `sentences`: how many it has. Documents with fewer than two get no tokens, because no sentence
      follows another.

    The table is a file in the cache of `datasets`, under a key made of the data set, the tokenizer
    and the column: the second start of a script finds it there.
    rows_per_document: > 1 joins so many rows into a document, for corpora with a sentence per row.
    processes: how many tokenize at a time.
    """
    if text_column not in dataset.column_names:
        raise ValueError(f"no column {text_column!r}: --text-column is of {dataset.column_names}")
    dataset = dataset.select_columns(text_column)
    if rows_per_document > 1:
        dataset = dataset.batch(rows_per_document)
    largest_id = max(tokenizer.get_vocab().values())  # a vocabulary may have holes
    tokens = List(Value("uint16" if largest_id < 2**16 else "uint32"))
    key = [dataset._fingerprint, tokenizer.to_str(), text_column, STAGE_1_VERSION]
    # The documents of a call become one chunk of the stored table: a thousandth of all documents,
    # but at least 16 and at most 1,000.
    documents_per_call = min(max(len(dataset) // 1000, 16), 1000)
    return dataset.map(
        tokenize_documents,
        fn_kwargs={
            "tokenizer": tokenizer,
            "column": text_column,
            "rows_per_document": rows_per_document,
        },
        batched=True,
        batch_size=documents_per_call,
        with_indices=True,
        features=Features(tokens=tokens, starts=List(Value("uint32")), sentences=Value("int64")),
        remove_columns=[text_column],
        num_proc=processes,
        desc="tokenizing",
        new_fingerprint=datasets.fingerprint.Hasher.hash(key),
    )


# ---- The corpus as three arrays ----------------------------------------------


class TokenizedCorpus:
    """All documents with two sentences or more: their tokens, mapped from disk, and two arrays of
    starts.

        tokens            6 3 7 9 1 4 4 1 8 3 5 1 2 2 1     all documents, end to end: `tokens()`
        sentence_starts   0         5     8       12    15  the last entry is the end of the corpus
        document_starts   0               8             15  two documents here

    (The token 1 is the full stop here.)

    sentence_starts, document_starts: int64, positions, in memory, 8 bytes an entry.
    skipped: how many documents were left out, and why.
    rows: the table of `tokenize_dataset`. Raises ValueError if fewer than two of its documents can
    be used, because a random segment B is from another document.
    """

    def __init__(self, rows: datasets.Dataset) -> None:
        # A table that was shuffled or filtered has another order in its file.
        if rows._indices is not None:
            rows = rows.flatten_indices()
        self.rows = rows

        # How many sentences each document has: none, one, or more.
        sentence_counts = np.asarray(rows["sentences"][:], dtype=np.int64)  # (rows,)
        none_one_or_more = np.minimum(sentence_counts, 2)
        with_none, with_one, with_more = np.bincount(none_one_or_more, minlength=3).tolist()
        self.skipped = {"no sentence": with_none, "one sentence": with_one}
        if with_more < 2:
            raise ValueError(
                f"{with_more} documents have a next sentence, 2 are needed; {self.skipped}"
            )

        # `datasets` stores a column in chunks. The tokens of a chunk are one array, a view
        # of the file, and a document never lies across two chunks.
        token_chunks = rows.data.column("tokens").chunks
        start_chunks = rows.data.column("starts").chunks
        self.chunks = [chunk.flatten().to_numpy() for chunk in token_chunks]
        self.chunk_starts = np.cumsum([0, *map(len, self.chunks)])

        lengths_by_chunk = [chunk.value_lengths() for chunk in token_chunks]
        lengths = np.concatenate(lengths_by_chunk).astype(np.int64)  # (rows,)
        self.size = int(lengths.sum())
        positions = np.cumsum(lengths) - lengths  # (rows,), where each document starts
        is_kept = lengths > 0  # documents that were left out have no tokens
        self.document_starts = np.append(positions[is_kept], self.size)

        # The table's column "starts" counts from the start of the document, and has no entries for
        # documents that were left out. Add to each entry the position of its document.
        within_document = np.concatenate([chunk.flatten() for chunk in start_chunks])
        of_its_document = np.repeat(positions[is_kept], sentence_counts[is_kept])
        self.sentence_starts = np.append(of_its_document + within_document, self.size)

    def __reduce__(self) -> tuple:
        """Pickles the table, not the arrays: a worker that is not forked maps the files itself."""
        return TokenizedCorpus, (self.rows,)

    def __len__(self) -> int:
        """Returns the number of tokens."""
        return self.size

    def describe(self) -> str:
        """Returns a line for people: how much there is, and what was left out."""
        documents = len(self.document_starts) - 1
        there = f"{documents} documents, {len(self):,} tokens"
        return f"{there}; documents left out: {self.skipped}"

    def document_around(self, position: int) -> tuple[int, int]:
        """Returns start and end of the document that holds `position`."""
        return span_around(self.document_starts, position)

    def sentence_around(self, position: int) -> tuple[int, int]:
        """Returns start and end of the sentence that holds `position`."""
        return span_around(self.sentence_starts, position)

    def tokens(self, start: int, end: int) -> np.ndarray:
        """Returns the tokens at positions start .. end, a span that must lie in one document."""
        chunk = self.chunk_starts.searchsorted(start, side="right") - 1
        chunk_start = self.chunk_starts[chunk]
        return self.chunks[chunk][start - chunk_start : end - chunk_start]

    def checksum(self) -> int:
        """Returns a number that depends on every token, and on every start in both other arrays."""
        value = zlib.crc32(self.sentence_starts.data)
        value = zlib.crc32(self.document_starts.data, value)
        for chunk in self.chunks:
            value = zlib.crc32(np.ascontiguousarray(chunk).data, value)
        return value

    def unigram_entropy(self) -> float:
        """Returns the MLM loss, in nats, of a model that knows only how often each token occurs."""
        size = 1 + max(int(chunk.max(initial=0)) for chunk in self.chunks)
        counts = np.zeros(size, dtype=np.int64)
        for chunk in self.chunks:
            counts += np.bincount(chunk, minlength=size)
        shares = counts[counts > 0] / len(self)
        return float(-(shares * np.log(shares)).sum())


def span_around(starts: np.ndarray, position: int) -> tuple[int, int]:
    """Returns the last of the sorted `starts` up to `position`, and the one after it."""
    after = starts.searchsorted(position, side="right")
    return starts.item(after - 1), starts.item(after)


# ---- Random numbers ----------------------------------------------------------

PURPOSE_EXAMPLE, PURPOSE_ORDER, PURPOSE_SST2 = 0, 1, 2


class PhiloxKey(ISeedSequence):
    """Stands for `Philox(key=seed)`, and is four times as fast. That also asks the operating system
    for entropy, and does not use it. `Philox(seed=...)` asks its argument for the key, by
    `generate_state`.
    """

    def __init__(self, seed: int) -> None:
        self.words = np.array([seed, 0], dtype=np.uint64)

    def generate_state(self, n_words: int, dtype: Any = np.uint64) -> np.ndarray:
        return self.words


def generator(seed: int, purpose: int, epoch: int, index: int = 0) -> np.random.Generator:
    """Returns a random generator whose numbers depend on these four arguments alone.

    So every example has its own random numbers, whoever draws them and whatever was drawn before.
    Philox makes this cheap: it computes numbers directly from (seed, counter). The counter has four
    words, here [block, index, epoch, purpose]. Drawing more numbers advances only the block, so two
    generators of one seed never share a block.
    """
    key: Any = PhiloxKey(seed)
    philox = np.random.Philox(seed=key, counter=[0, index, epoch, purpose])
    return np.random.Generator(philox)


# ---- A pair of segments ------------------------------------------------------

MAX_DRAWS = 20  # of a seam of the kind that is wanted


class Seam(NamedTuple):
    """A position where a document may be cut: segment A ends before it, segment B starts at it."""

    document_start: int
    position: int  # at least one token of the document lies on each side
    document_end: int
    starts_sentence: bool


class Pair(NamedTuple):
    """Segment A and segment B as positions in the corpus; ends are exclusive."""

    a_start: int
    a_end: int
    b_start: int
    b_end: int
    is_random: bool


def draw_pair(
    corpus: TokenizedCorpus,
    rng: np.random.Generator,
    index: int,
    examples_per_epoch: int,
    room: int,
) -> Pair:
    """Draws segment A and segment B of one example. [BERT] §3.1 task 2 and A.2.

    index: of the example in its epoch. room: how many tokens both segments may have together.

    1. Draw the target length of the pair. With probability 0.9 it is `room` tokens; otherwise it is
       drawn from 2 to `room`, because fine-tuning meets short texts too. (`place_pair` makes the
       pair shorter where documents have no room for it.)
    2. Draw a position in the index-th of `examples_per_epoch` equal parts of the corpus, and find a
       seam less than target / 2 tokens from it. So a true pair at this seam usually contains the
       position.
    3. Find a seam of the same kind (it starts a sentence or does not) in another document.
    4. Draw segment A's share of the pair, and toss two coins. Coin A chooses the seam at which
       segment A ends, coin B the one at which segment B starts: 0 is the seam of step 2, 1 that of
       step 3. Two equal coins make a true pair. `place_pair` carries this out.

    Properties:
    - The label is independent of segment A alone, of segment B alone, and of both lengths, in any
      corpus. Seams and lengths are fixed before the coins are tossed. So segment A can show at most
      coin A, and coin B is fair all the same; and the other way round. Only both segments together
      tell the label.
    - The label is independent of whether segment A ends a sentence and segment B starts one,
      because both seams are of one kind (see `find_other_seam` for the exception).
    - The parts of step 2 leave no token out, and every token can get into an example. (Not every
      example has a token of its own part: with coin 1 a segment is from the other document.)
    - A random segment B is from another document.

    One leak remains, where documents are hardly longer than a pair: if segment A starts a document
    and segment B ends a document, the pair is more often a random one (see `place_pair`). Guessing
    the label from this alone is right in 54% of pairs of 128 tokens from film reviews of 250
    tokens, in 51% of pairs of 64 tokens, and in 50% of pairs from novels.

    Differs: [Code] draws a random segment B by another rule than a true one, and after ten attempts
    to find another document it keeps the same one.
    """
    is_short = rng.random() < 0.1
    target = int(rng.integers(2, room + 1)) if is_short else room
    reach = target / 2

    part_start = index * len(corpus) // examples_per_epoch
    part_end = (index + 1) * len(corpus) // examples_per_epoch
    position = int(rng.integers(part_start, part_end))
    seam = find_seam(corpus, position, reach)
    other = find_other_seam(corpus, rng, seam, reach)

    share_of_a = rng.random()
    coin_a = int(rng.integers(2))
    coin_b = int(rng.integers(2))
    return place_pair(seam, other, target, share_of_a, coin_a, coin_b)


def find_seam(corpus: TokenizedCorpus, position: int, reach: float) -> Seam:
    """Returns a seam near `position`, in the same document.

    1. The start of the next sentence. The last sentence of a document has no next one: there it is
       the start of the sentence itself.
    2. `position` itself if that start is `reach` tokens away, or farther. So every token can be
       reached, however long its sentence is. (If it starts the document, the token after it.)

    Example: a document at 20 .. 35 whose sentences start at 20, 25, 28 and 32; `reach` is 3.
    Position 26 gives the seam 28. Position 33, in the last sentence, gives the seam 32. Position 21
    gives itself, because the next sentence starts 4 tokens later.
    """
    document_start, document_end = corpus.document_around(position)
    sentence_start, sentence_end = corpus.sentence_around(position)
    is_last_sentence = sentence_end == document_end
    candidate = sentence_start if is_last_sentence else sentence_end
    if abs(candidate - position) < reach:
        return Seam(document_start, candidate, document_end, starts_sentence=True)

    position = max(position, document_start + 1)  # segment A needs a token
    # It starts a sentence by chance, or because the line above has moved it to the second sentence,
    # where the first one has one token.
    starts_sentence = position in (sentence_start, sentence_end)
    return Seam(document_start, position, document_end, starts_sentence)


def find_other_seam(
    corpus: TokenizedCorpus, rng: np.random.Generator, seam: Seam, reach: float
) -> Seam:
    """Returns a seam of the same kind as `seam`, in another document, drawn at random.

    Both start a sentence, or neither does: otherwise a segment A that breaks off within a sentence
    beside a segment B that starts one would show that the pair is random.

    1. Draw positions in other documents until the seam near one is of the same kind, at most
       MAX_DRAWS times.
    2. Where seams of that kind are rare, leave the reach aside. If `seam` starts a sentence, take
       the start of the next sentence, however far it is. If not, take the drawn position itself,
       and draw again, at most MAX_DRAWS times, if it happens to start a sentence.

    The kinds can differ only if step 2 fails, too, as it may if nearly every token of all other
    documents is a sentence of its own.
    """
    # With an infinite reach, `find_seam` gives a sentence start; with 0, the position itself.
    forcing_reach = math.inf if seam.starts_sentence else 0
    for current_reach in [reach] * MAX_DRAWS + [forcing_reach] * MAX_DRAWS:
        position = draw_outside(rng, seam.document_start, seam.document_end, len(corpus))
        other = find_seam(corpus, position, current_reach)
        if other.starts_sentence == seam.starts_sentence:
            break
    return other


def draw_outside(rng: np.random.Generator, start: int, end: int, size: int) -> int:
    """Returns a random position in 0 .. size that is not in start .. end."""
    position = int(rng.integers(size - (end - start)))
    if position < start:
        return position
    return position + (end - start)


def place_pair(
    seam: Seam, other: Seam, target: int, share_of_a: float, coin_a: int, coin_b: int
) -> Pair:
    """Returns the pair, of at most `target` tokens, that two seams and two coins make.

    1. The room before: how many tokens both seams have before them in their documents, so the
       smaller one of the two numbers. The room after: likewise.
    2. The lengths. The pair has `target` tokens, or fewer if both rooms together have less. Segment
       A gets one token plus the fraction `share_of_a` of the remaining ones, but at most the room
       before. Segment B gets the rest, at most the room after. What B has no room for goes back to
       A, which has room for it, because the length is at most both rooms together.
    3. Segment A ends at the seam that `coin_a` says, segment B starts at the seam that `coin_b`
       says: 0 is `seam`, 1 is `other`. The pair is a true one if both coins say the same.

    share_of_a: at least 0 and below 1.

    Example: seams at 28 and 97, each far from both ends of its document; target 12, share_of_a 0.4,
    coins 0 and 1. The lengths are 5 and 7: segment A is 23 .. 28, segment B is 97 .. 104, and the
    pair is random. With coins 0 and 0, segment B is 28 .. 35.

    Measured: the first and last tokens of a document get into half as many examples as those in its
    middle.

    Why a leak remains: let `seam` have 10 tokens before it and 40 after it, `other` 30 and 20, and
    let the target be 60. Segment A gets 10 tokens: where it ends at `seam`, it starts the document.
    Segment B gets 20: where it starts at `other`, it ends the document. Only the coins 0 and 1, a
    random pair, do both. A true pair could only if one seam had the fewer tokens on both sides,
    which is rare among documents of similar length.
    """
    room_before = min(seam.position - seam.document_start, other.position - other.document_start)
    room_after = min(seam.document_end - seam.position, other.document_end - other.position)
    length = min(target, room_before + room_after)
    length_a = min(1 + int(share_of_a * (length - 1)), room_before)
    length_b = min(length - length_a, room_after)
    length_a = length - length_b

    positions = (seam.position, other.position)
    a_end = positions[coin_a]
    b_start = positions[coin_b]
    return Pair(a_end - length_a, a_end, b_start, b_start + length_b, coin_a != coin_b)


# ---- Masked columns ----------------------------------------------------------

MASKED_SHARE = 0.15


def masked_count(candidates: np.ndarray) -> int:
    """Returns how many of the candidates are masked: 15%, and at least one. [BERT] §3.1 task 1.

    An example without a masked position would teach the masked language model nothing, and a batch
    of such examples would have a mean loss of 0 / 0.

    Differs: [Code] takes 15% of all tokens, [CLS] and [SEP] included, though it masks none of
    these: one position more in an example of 64 tokens. It masks max_predictions_per_seq at most.
    """
    return max(1, round(MASKED_SHARE * len(candidates)))


def choose_tokens(candidates: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Returns the masked columns: exactly `masked_count` of the candidates, int64 (masked,)."""
    return rng.permutation(candidates)[: masked_count(candidates)]


def choose_words(
    candidates: np.ndarray, continues_word: np.ndarray, rng: np.random.Generator
) -> np.ndarray:
    """Returns the masked columns of whole words: all pieces of a word or none, int64 (masked,).

    candidates: int64 (n,), columns; continues_word: bool (n,), True where a candidate belongs to
    the word of the candidate before it, so the first one is False.

    The number of masked columns should be `masked_count`, but whole words rarely add up to it.
    Differs: [Code] takes words in a random order and skips a word that would exceed the number.
    Then long words are skipped more often: it masks 18.9% of one-token words and 11.7% of words of
    four pieces or more. Here every word has the same chance:

    1. Lay the words in a random order around a circle of n tokens.
    2. Cut out an arc of `masked_count` tokens that starts at a random token.
    3. Take the words inside the arc. A word that lies only partly inside is taken with a
       probability equal to the share of its tokens inside.
    4. If no word was taken, take the one that has most tokens inside.

    Properties: apart from step 4, every word is taken with probability masked_count / n, whatever
    its length, so the expected number of masked columns is masked_count.

    Example: 14 candidates, so the arc has 2 tokens. The words have 3, 1, 4, 2 and 4 tokens in the
    order on the circle, and the arc starts at the third token. It holds the last token of the first
    word, which is taken with probability 1/3, and the second word, which is taken.
    """
    n = len(candidates)
    word_starts = np.flatnonzero(~continues_word)  # (words,)
    lengths = np.diff(word_starts, append=n)

    order = rng.permutation(len(lengths))
    lengths_on_circle = lengths[order]
    starts_on_circle = np.cumsum(lengths_on_circle) - lengths_on_circle
    arc_start = int(rng.integers(n))
    distance_from_arc_start = (np.arange(n) - arc_start) % n  # (n,), of each token of the circle
    is_inside = distance_from_arc_start < masked_count(candidates)
    tokens_inside = np.add.reduceat(is_inside.astype(np.int64), starts_on_circle)  # (words,)

    # True with probability tokens_inside / length
    is_taken = rng.random(len(lengths)) * lengths_on_circle < tokens_inside
    if not is_taken.any():
        is_taken[np.argmax(tokens_inside)] = True
    word_is_taken = np.empty_like(is_taken)
    word_is_taken[order] = is_taken  # from the order on the circle to that of the candidates
    return candidates[np.repeat(word_is_taken, lengths)]


def mask_tokens(
    input_ids: np.ndarray,
    masked_columns: np.ndarray,
    rng: np.random.Generator,
    mask_id: int,
    ordinary_ids: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the input and the labels of the masked language model for one row, int64 (seq,).

    [BERT] §3.1 task 1 and A.1. Each token at the masked columns, by a draw of its own,
    - becomes [MASK] with probability 0.8. (Fine-tuning has no [MASK]; hence the other two.)
    - becomes one of `ordinary_ids` with probability 0.1: the model cannot trust any token it reads.
    - stays with probability 0.1, which biases the representation towards the actual token.
    Labels are the original ids at masked columns, and -100 elsewhere.

    Example: three masked columns. Draws of 0.31, 0.85 and 0.97 put [MASK], a random token and
    the original one there.

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


class PretrainDataset(Dataset):
    """Examples `[CLS] A [SEP] B [SEP]` with masks. [BERT] §3.1, A.1, A.2.

    An epoch has len(corpus) // (max_seq_length - 3) examples, at least one. Indices continue over
    epochs: `dataset[index]` is example index % len(dataset) of epoch index // len(dataset). It
    depends on the arguments below and on its index alone: not on the batch, the worker, or what was
    drawn before. So every epoch has other pairs and masks, and one integer is enough to resume.
    """

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
        self.corpus = corpus
        self.max_seq_length = max_seq_length
        self.seed = seed
        self.whole_word_masking = whole_word_masking
        self.padding_idx = vocabulary[PAD]
        self.cls_id = vocabulary[CLS]
        self.sep_id = vocabulary[SEP]
        self.mask_id = vocabulary[MASK]
        special_ids = {vocabulary[name] for name in SPECIAL_TOKENS}
        self.ordinary_ids = np.array(sorted(set(vocabulary.values()) - special_ids))
        piece_ids = [id for token, id in vocabulary.items() if token.startswith("##")]
        # (vocab,), True for tokens that continue a word
        self.is_piece = np.zeros(max(vocabulary.values()) + 1, dtype=bool)
        self.is_piece[piece_ids] = True

    def __len__(self) -> int:
        return max(1, len(self.corpus) // (self.max_seq_length - 3))

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        """Returns one example, int64.

        `input_ids`, `token_type_ids` (0 = [CLS] A [SEP], 1 = B [SEP]) and `mlm_labels` (-100 where
        nothing is to be predicted) are (seq,), without padding; `nsp_labels` is (), 0 = segment B
        is next, 1 = it is random.
        """
        epoch, index_in_epoch = divmod(index, len(self))
        rng = generator(self.seed, PURPOSE_EXAMPLE, epoch, index_in_epoch)
        room = self.max_seq_length - 3  # without [CLS] and two [SEP]
        pair = draw_pair(self.corpus, rng, index_in_epoch, len(self), room)

        segment_a = self.corpus.tokens(pair.a_start, pair.a_end)
        segment_b = self.corpus.tokens(pair.b_start, pair.b_end)
        first_sep = 1 + len(segment_a)  # columns of the two [SEP]
        last_sep = first_sep + 1 + len(segment_b)
        input_ids = np.empty(last_sep + 1, dtype=np.int64)
        input_ids[0] = self.cls_id
        input_ids[1:first_sep] = segment_a
        input_ids[first_sep] = self.sep_id
        input_ids[first_sep + 1 : last_sep] = segment_b
        input_ids[last_sep] = self.sep_id
        token_type_ids = np.zeros(len(input_ids), dtype=np.int64)
        token_type_ids[first_sep + 1 :] = 1

        columns = np.arange(last_sep)  # without the last [SEP]
        candidates = np.concatenate([columns[1:first_sep], columns[first_sep + 1 :]])
        if self.whole_word_masking:
            continues_word = self.is_piece[input_ids[candidates]]
            # Indices into the candidates, which have no [CLS] and no [SEP]
            first_of_segments = [0, len(segment_a)]
            continues_word[first_of_segments] = False  # even if it is a ## piece
            masked_columns = choose_words(candidates, continues_word, rng)
        else:
            masked_columns = choose_tokens(candidates, rng)
        corrupted, labels = mask_tokens(
            input_ids, masked_columns, rng, self.mask_id, self.ordinary_ids
        )
        return {
            "input_ids": corrupted,
            "token_type_ids": token_type_ids,
            "mlm_labels": labels,
            "nsp_labels": np.array(pair.is_random, dtype=np.int64),
        }

    def batch(self, indices: Iterable[int]) -> dict[str, torch.Tensor]:
        """Returns the examples with these indices as one padded batch; see `collate`."""
        return collate([self[index] for index in indices], self.padding_idx)


def collate(examples: list[dict[str, np.ndarray]], padding_idx: int) -> dict[str, torch.Tensor]:
    """Returns a batch: each array padded to the longest example, int64 (batch, seq).

    `input_ids` are padded with `padding_idx`, `token_type_ids` with 0, `mlm_labels` with -100;
    `nsp_labels` are (batch,).
    """
    padding = {"input_ids": padding_idx, "token_type_ids": 0, "mlm_labels": IGNORED_LABEL}
    longest = max(len(example["input_ids"]) for example in examples)
    batch = {"nsp_labels": np.array([example["nsp_labels"] for example in examples])}
    for name, value in padding.items():
        batch[name] = np.full((len(examples), longest), value)
        for row, example in zip(batch[name], examples, strict=True):
            row[: len(example[name])] = example[name]
    return {name: torch.from_numpy(array) for name, array in batch.items()}


# ---- The order of examples ---------------------------------------------------


@lru_cache(maxsize=2)  # a batch may lie across two epochs
def permutation(seed: int, epoch: int, size: int) -> np.ndarray:
    """Returns the order of an epoch's examples: the numbers from 0 to size - 1, shuffled."""
    return generator(seed, PURPOSE_ORDER, epoch).permutation(size)


class EpochSampler(Sampler):
    """Yields batches of indices without end: all examples of an epoch once, in a random order, then
    those of the next.

    There is one order of batches for all ranks: rank r of n takes batches r, r + n, r + 2n, and so
    on. start: how many of its batches a rank skips. A resumed run needs only this integer. A batch
    may contain the end of one epoch and the start of the next.

    Example: 5 examples in batches of 2. If the orders of two epochs are 3 0 4 1 2 and 1 4 0 3 2,
    the batches are [3, 0], [4, 1], [2, 6], [9, 5], [8, 7]: indices 5 to 9 are the second epoch.
    """

    def __init__(
        self,
        size: int,
        batch_size: int,
        seed: int,
        start: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.size, self.batch_size, self.seed = size, batch_size, seed
        self.first_batch = start * world_size + rank
        self.stride = world_size

    def __iter__(self) -> Iterator[list[int]]:
        for batch in count(self.first_batch, self.stride):
            indices = []
            # A turn is the number of an example in the endless sequence of all epochs.
            first_turn = batch * self.batch_size
            for turn in range(first_turn, first_turn + self.batch_size):
                epoch, turn_in_epoch = divmod(turn, self.size)
                order = permutation(self.seed, epoch, self.size)
                indices.append(epoch * self.size + int(order[turn_in_epoch]))
            yield indices


def get_split_dataloader(
    dataset: PretrainDataset,
    batch_size: int,
    start: int = 0,
    rank: int = 0,
    world_size: int = 1,
    workers: int = 2,
) -> DataLoader:
    """Returns an endless loader of one rank's batches. The batches are split among the ranks: they
    are dealt to them in turn.

    start: how many batches of this rank to skip.

    Two workers should feed a fast GPU, and more only hold more memory. Each has 4 batches ready,
    and a token takes 24 bytes (three int64 arrays): 6 MB for two workers and batches of 256 x 128.
    """
    sampler = EpochSampler(len(dataset), batch_size, dataset.seed, start, rank, world_size)
    return DataLoader(
        dataset,
        batch_sampler=sampler,
        collate_fn=partial(collate, padding_idx=dataset.padding_idx),
        num_workers=workers,
        prefetch_factor=4 if workers else None,
        pin_memory=torch.cuda.is_available(),
    )


# ---- SST-2 -------------------------------------------------------------------


def get_reviews(path: str, split: str, name: str | None = None) -> tuple[list[str], list[int]]:
    """Returns the texts of a split of SST-2, and their labels: 0 = negative, 1 = positive.

    Raises ValueError, with the row, if a sentence is no text or a label is not 0 or 1.
    """
    source = str(SAMPLE / "reviews") if path == "sample" else path
    rows = get_dataset(source, name, split)
    column = "sentence" if "sentence" in rows.column_names else "text"
    if not {column, "label"} <= set(rows.column_names):
        raise ValueError(f"{path}: no columns sentence (or text) and label in {rows.column_names}")
    texts, labels = list(rows[column]), list(rows["label"])
    for row, (text, label) in enumerate(zip(texts, labels, strict=True)):
        if not isinstance(text, str):
            raise ValueError(
                f"{path}, {split}: row {row} has the {column} {text!r}, which is no text"
            )
        # True, 1.0 and "1" are no labels.
        if type(label) is not int or label not in (0, 1):
            raise ValueError(
                f"{path}, {split}: row {row} has the label {label!r}, not 0 or 1 (SetFit/sst2 has a"
                " test split with labels)"
            )
    return texts, labels


def encode_sentences(tokenizer: Tokenizer, texts: list[str], longest: int) -> list[list[int]]:
    """Returns the ids of `[CLS] sentence [SEP]` for each text, cut to `longest` tokens."""
    vocabulary = tokenizer.get_vocab()
    cls_id, sep_id = vocabulary[CLS], vocabulary[SEP]
    sentences = encode_plain(tokenizer, texts)
    return [[cls_id, *ids[: longest - 2], sep_id] for ids in sentences]


class SST2Batches:
    """Batches of all sentences, each once, with sentences of similar lengths together.

    1. Shuffle the sentences, by (`seed`, `epoch`). The training loop sets both attributes.
    2. Cut the order into pools of 64 batches, and sort each pool by length. Then only 4% of a batch
       is padding (67% in a plain random order, each batch padded to its longest), and every epoch
       still groups other sentences.
    3. Cut the pools into batches, and shuffle the batches.

    Without a seed, for evaluation, all sentences are one pool, and nothing is shuffled. A batch is
    `input_ids`, int64 (batch, longest of these), and `labels`, int64 (batch,).
    """

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
        return math.ceil(len(self.rows) / self.batch_size)

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        size = len(self.rows)
        lengths = np.array([len(row) for row in self.rows])
        if self.seed is None:
            order = np.argsort(lengths, kind="stable")
            batch_order = np.arange(len(self))
        else:
            rng = generator(self.seed, PURPOSE_SST2, self.epoch)
            shuffled = rng.permutation(size)
            pool_size = 64 * self.batch_size
            pools = np.split(shuffled, range(pool_size, size, pool_size))
            sorted_pools = [pool[np.argsort(lengths[pool], kind="stable")] for pool in pools]
            order = np.concatenate(sorted_pools)
            batch_order = rng.permutation(len(self))

        for start in batch_order * self.batch_size:
            indices = order[start : start + self.batch_size]
            rows = [torch.tensor(self.rows[index]) for index in indices]
            input_ids = torch.nn.utils.rnn.pad_sequence(
                rows, batch_first=True, padding_value=self.padding_idx
            )
            labels = torch.tensor([self.labels[index] for index in indices])
            yield {"input_ids": input_ids, "labels": labels}


# ---- Reading corpora ---------------------------------------------------------


def get_corpus(
    path: str,
    split: str,
    tokenizer: Tokenizer,
    name: str | None = None,
    train_split: str = "train",
    **stage_1: Any,
) -> TokenizedCorpus:
    """Returns the "train" or the "validation" part of a data set, tokenized.

    The part to train on is `train_split`, as `datasets` spells it: "train", "train+unsupervised",
    "train[:10%]". The validation part is the split of that name; where there is none, or where it
    is trained on, it is the last 1% of the documents of `train_split` that have two sentences or
    more, and at least two of them. name: the configuration of a hub data set that has several.
    stage_1: further arguments of `tokenize_dataset`.
    """
    splits = get_dataset(path, name, split=None)
    # It is trained on if `train_split` names it: train+validation.
    has_validation = "validation" in splits and "validation" not in train_split
    if split == "validation" and has_validation:
        return TokenizedCorpus(tokenize_dataset(splits["validation"], tokenizer, **stage_1))
    train_rows = get_train_rows(splits, path, train_split, name)
    rows = tokenize_dataset(train_rows, tokenizer, **stage_1)
    if has_validation:
        return TokenizedCorpus(rows)
    usable = np.flatnonzero(np.asarray(rows["sentences"][:]) > 1)
    if len(usable) < 4:
        raise ValueError(
            f"{path} has {len(usable)} documents of two sentences or more, 4 are needed (a corpus"
            " with a sentence per row needs --rows-per-document)"
        )
    held_out = max(2, len(usable) // 100)
    cut = usable[-held_out]  # the row at which the validation part starts
    part = range(cut) if split == "train" else range(cut, len(rows))
    return TokenizedCorpus(rows.select(part))


def get_train_rows(
    splits: dict[str, datasets.Dataset], path: str, train_split: str, name: str | None = None
) -> datasets.Dataset:
    """Returns the rows to train on. splits: all of `path`. train_split: see `get_corpus`."""
    if train_split in splits:
        return splits[train_split]
    if train_split.isidentifier():  # one name, not train+unsupervised or train[:10%]
        raise ValueError(
            f"{path} has no split {train_split}, only {', '.join(splits)}; see --split"
        )
    return get_dataset(path, name, train_split)


def get_texts(
    path: str, train_split: str = "train", name: str | None = None, column: str = "text"
) -> Iterable[str]:
    """Returns the texts to learn a vocabulary from: all of the split to train on, including those
    that `get_corpus` may hold out. Raises ValueError if the column is missing or not text.
    """
    splits = get_dataset(path, name, split=None)
    rows = get_train_rows(splits, path, train_split, name)
    if column not in rows.column_names:
        raise ValueError(f"no --text-column {column} in {rows.column_names}")
    kind = rows.features[column]
    if getattr(kind, "dtype", None) not in ("string", "large_string", "null"):
        raise ValueError(f"--text-column {column} is not text but {kind}")
    return rows[column]


def get_dataset(
    path: str, name: str | None = None, split: str | None = "train", streaming: bool = False
) -> Any:
    """Returns a split of a data set, or with split=None a dict of all. One row is one document, or
    a sentence of SST-2.

    path: "sample", a hub id, or a directory or file of parquet, json(l) or text; a .txt is one
    document. In a directory, file names that contain train, validation or test make those splits,
    as `datasets` has it; without such names, all is train. A file is train. Raises ValueError if
    there is nothing to read, or if the files are not those that a user expects to be read (see
    `check_files_are_read`).
    """
    where = SAMPLE / "corpus" if path == "sample" else Path(path)
    if where.exists():
        source, options = describe_files(where)
    elif is_hub_id(path):
        print(f"fetching {path} from the hub", file=sys.stderr)
        source, options = path, {}
    else:
        raise ValueError(f"{path} does not exist")
    try:
        builder = datasets.load_dataset_builder(source, name, **options)
        if where.exists():
            check_files_are_read(where, builder)
        if streaming:
            return builder.as_streaming_dataset(split)
        builder.download_and_prepare()
        return builder.as_dataset(split)
    except (OSError, ValueError, RuntimeError, StopIteration, DatasetGenerationError) as error:
        cause = error.__cause__ or str(error) or "it is empty"
        raise ValueError(f"cannot read {path}: {cause}") from error


KINDS = {".txt", ".json", ".jsonl", ".parquet"}


def describe_files(where: Path) -> tuple[str, dict[str, Any]]:
    """Returns the arguments of `datasets.load_dataset_builder` for a file or a directory: the path
    to load, and options.

    `datasets` takes the kind of most files for the kind of a directory; a tie is rejected here.

    `datasets` recognizes a changed file by path and time alone. The cache directory that is named
    here depends on the sizes, too, and so catches a file that was overwritten within a second.
    """
    # An absolute path, since `datasets` takes a folder's name, such as text or json, for one of its
    # own kinds.
    folder = where.parent.resolve() if where.is_file() else where.absolute()
    if set("[]*?") & set(str(folder)):
        raise ValueError(f"{folder}: the library takes [ ] * ? in a folder's name for a pattern")
    # The library reads no .TXT: `check_files_are_read` names those.
    visible = [file for file in visible_files(where) if file.suffix in KINDS]
    kinds = Counter(".json" if file.suffix == ".jsonl" else file.suffix for file in visible)
    ranked = kinds.most_common()
    if len(ranked) > 1 and ranked[0][1] == ranked[1][1]:
        raise ValueError(
            f"{where} has as many {ranked[0][0]} as {ranked[1][0]} files: name a file, or a folder"
            " of files of one kind"
        )

    options: dict[str, Any] = {}
    if ranked and ranked[0][0] == ".txt":
        options["sample_by"] = "document"
    sizes = [(str(file.resolve()), file.stat().st_size) for file in visible]
    cache = f"files-{datasets.fingerprint.Hasher.hash(sizes)}"
    options["cache_dir"] = str(Path(datasets.config.HF_DATASETS_CACHE) / cache)
    if where.is_file():
        options["data_files"] = {"train": glob.escape(where.name)}
    return str(folder), options


def visible_files(where: Path) -> list[Path]:
    """Returns the files of a directory, or the file itself, that are of a kind in `KINDS`; without
    those whose name, or whose folder's name, starts with a dot or two underscores.
    """
    files = [where] if where.is_file() else sorted(where.glob("**/*"))
    return [
        file
        for file in files
        if file.suffix.lower() in KINDS
        and file.is_file()
        and not any(part.startswith((".", "__")) for part in file.relative_to(where).parts)
    ]


def check_files_are_read(where: Path, builder: datasets.DatasetBuilder) -> None:
    """Checks that `datasets` reads the files that a user expects. It chooses them by its own rules.

    - It may take a directory for one of texts where `describe_files` has not. Then every line would
      be a document: raises ValueError.
    - Once the path of one file names a split, it leaves out all whose paths do not: a single
      night-train.txt hides a folder of books. Prints how many files of the kind that it reads are
      left out. Raises ValueError if they are half of the texts or more; tables that are left out
      may be descriptions of others.

    Nothing is checked for a single file, nor where a dataset card (README.md) names the files.
    """
    is_text = builder.name == "text"
    if is_text and getattr(builder.config, "sample_by", None) != "document":
        raise ValueError("its texts would be read by the line: name a folder of .txt files alone")
    card = where / "README.md"
    if where.is_file() or (card.exists() and re.search(rb"data_(files|dir)", card.read_bytes())):
        return
    used = {Path(file).resolve() for files in builder.config.data_files.values() for file in files}
    kinds = {".txt"} if is_text else {file.suffix for file in used}
    files = [
        file
        for file in visible_files(where)
        if file.suffix.lower() in kinds and file.name not in FILES_TO_IGNORE
    ]
    read = [file for file in files if file.resolve() in used]
    left_out = [file for file in files if file.resolve() not in used]
    if not left_out:
        return
    name_that_is_read = read[0].relative_to(where) if read else min(used).name
    reason = (
        f"{len(left_out)} of {len(files)} {'texts' if is_text else 'files'}, such as"
        f" {left_out[0].name}, are not read, because a name like {name_that_is_read} makes a split,"
        " or because their names end in upper case"
    )
    if is_text and len(left_out) >= len(files) / 2:
        raise ValueError(f"{reason}: rename {name_that_is_read}, or move the others away")
    announce(f"{where}: {reason}")


@lru_cache
def announce(message: str) -> None:
    """Prints a message, once in a process."""
    print(message, file=sys.stderr)


def is_hub_id(source: str) -> bool:
    """Returns whether a name can be a hub id, `name` or `owner/name`, and is not a local path.

    The same function as in bert.py, so that either file can be copied alone.
    """
    if Path(source).exists() or not re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", source):
        return False
    return "/" not in source or not Path(Path(source).parts[0]).exists()


# ---- Reading tokenizers ------------------------------------------------------


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Returns the tokenizer of a vocab.txt, a tokenizer.json, a directory, or a hub id. In a
    directory, tokenizer.json counts, and the other files must not contradict it.
    """
    path = Path(path)
    try:
        if not path.exists() and path.suffix not in {".txt", ".json"}:
            files = ["tokenizer.json", "tokenizer_config.json", "vocab.txt"]
            path = Path(snapshot_download(str(path), allow_patterns=files))
        if path.is_dir():
            names = [name for name in ("tokenizer.json", "vocab.txt") if (path / name).exists()]
            if not names:
                raise ValueError("put vocab.txt or tokenizer.json there")
            path = path / names[0]
        about_path = path.with_name("tokenizer_config.json")
        about = json.loads(about_path.read_text(encoding="utf-8")) if about_path.exists() else {}
        if path.suffix == ".txt":
            tokenizer = wordpiece(read_vocabulary(path), **read_normalizer(about))
        else:
            tokenizer = Tokenizer.from_file(str(path))
        if path.name == "tokenizer.json":
            check_files_agree(tokenizer, path, about)
        check_casing(tokenizer)
    except Exception as error:  # the library raises nothing more precise
        reason = str(error).partition("\n")[0]
        raise ValueError(f"no tokenizer at {path}: {reason}") from error
    missing = set(SPECIAL_TOKENS) - set(tokenizer.get_vocab())
    if missing:
        raise ValueError(f"the tokenizer at {path} lacks {', '.join(sorted(missing))}")
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))  # "[MASK]" in a text is that token
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def read_vocabulary(path: Path) -> dict[str, int]:
    """Returns the tokens of a vocab.txt: the id of a token is the number of its line, from 0."""
    tokens = path.read_text(encoding="utf-8-sig").removesuffix("\n").split("\n")
    return {token: i for i, token in enumerate(tokens)}


NORMALIZER_OPTIONS = {  # ours: the name in a published tokenizer_config.json
    "lowercase": "do_lower_case",
    "strip_accents": "strip_accents",
    "handle_chinese_chars": "tokenize_chinese_chars",
}


def read_normalizer(about: dict[str, Any]) -> dict[str, bool | None]:
    """Returns how a tokenizer_config.json says that text is normalized; a vocab.txt alone does not
    tell. Raises ValueError if the tokenizer is not BERT's.
    """
    kind = about.get("tokenizer_class") or "BertTokenizer"
    if kind not in ("BertTokenizer", "BertTokenizerFast"):
        raise ValueError(f"its tokenizer_class is {kind}, which needs a tokenizer.json")
    return {ours: about[name] for ours, name in NORMALIZER_OPTIONS.items() if name in about}


def check_files_agree(tokenizer: Tokenizer, path: Path, about: dict[str, Any]) -> None:
    """Raises ValueError if the vocab.txt or the tokenizer_config.json beside a tokenizer.json says
    something else. The model was trained with one of them, and nobody knows with which.
    """
    for ours, name in NORMALIZER_OPTIONS.items():
        said = about.get(name)
        if said is None or not hasattr(tokenizer.normalizer, ours):
            continue
        found = getattr(tokenizer.normalizer, ours)
        if found is None:  # strip_accents that is left open is the same as lowercase
            found = tokenizer.normalizer.lowercase
        if found != said:
            raise ValueError(f"{name} is {said} in tokenizer_config.json, not in {path.name}")
    beside = path.with_name("vocab.txt")
    if beside.exists():
        vocabulary = tokenizer.get_vocab()
        for token, token_id in read_vocabulary(beside).items():
            if vocabulary.get(token) != token_id:
                raise ValueError(f"{token} is id {token_id} in vocab.txt, not in {path.name}")


def check_casing(tokenizer: Tokenizer) -> None:
    """Raises ValueError if text is lowercased and a token has upper case, which no text can match.

    Tokens like [MASK] may have upper case, and <S> in Google's Chinese vocabulary.
    """
    if tokenizer.normalizer is None or tokenizer.normalizer.normalize_str("A") == "A":
        return
    added = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
    for token in tokenizer.get_vocab().keys() - added:
        if token != token.lower() and not token.startswith(("[", "<")):
            raise ValueError(
                f"text is lowercased, but {token} is a token: keep vocab.txt alone, beside a"
                ' tokenizer_config.json with {"do_lower_case": false}'
            )
