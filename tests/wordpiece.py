"""Google's tokenizer, reimplemented from its description in [Code] tokenization.py: the reference
for our token ids. It works on one character at a time and uses no tokenizer library.
"""

import unicodedata

# Where Chinese, Japanese and Korean ideographs are. Hangul and the Japanese syllables are not here:
# their words are separated by spaces, or are left to WordPiece.
IDEOGRAPHS = [
    range(0x3400, 0x4DC0), range(0x4E00, 0xA000), range(0xF900, 0xFB00), range(0x20000, 0x2A6E0),
    range(0x2A700, 0x2B740), range(0x2B740, 0x2B820), range(0x2B820, 0x2CEB0),
    range(0x2F800, 0x2FA20),
]  # fmt: skip


def is_space(c: str) -> bool:
    return c in " \t\n\r" or unicodedata.category(c) == "Zs"


def is_dropped(c: str) -> bool:
    """Control and format characters, private and unassigned ones, NUL, and U+FFFD."""
    return c == "\ufffd" or (not is_space(c) and unicodedata.category(c)[0] == "C")


def is_punctuation(c: str) -> bool:
    """All signs of ASCII count, such as $ and ^, which Unicode calls symbols."""
    is_sign = c.isascii() and c.isprintable() and not c.isalnum() and c != " "
    return is_sign or unicodedata.category(c)[0] == "P"


def clean(text: str) -> str:
    """Returns a text whose white space is spaces, with spaces around ideographs."""
    cleaned = []
    for c in text:
        if is_dropped(c):
            continue
        if any(ord(c) in ideographs for ideographs in IDEOGRAPHS):
            cleaned.append(f" {c} ")
        else:
            cleaned.append(" " if is_space(c) else c)
    return "".join(cleaned)


def words_of(text: str) -> list[str]:
    """Returns the words of a text in lower case, without accents; each sign is a word."""
    lower = "".join(c.lower() for c in clean(text))  # by character: a last sigma is like others
    words: list[str] = []
    is_inside = False
    for c in unicodedata.normalize("NFD", lower):
        if unicodedata.category(c) == "Mn":
            continue
        if is_punctuation(c):
            words.append(c)
        elif not c.isspace() and is_inside:
            words[-1] += c
        elif not c.isspace():
            words.append(c)
        is_inside = not c.isspace() and not is_punctuation(c)
    return words


def pieces_of(word: str, vocabulary: dict[str, int]) -> list[str]:
    """Returns the longest piece that a word starts with, then that of the rest, and so on; or one
    [UNK] if there is none, or if the word is too long.
    """
    pieces: list[str] = []
    start = 0
    while start < len(word) <= 100:
        ends = range(len(word), start, -1)
        found = (("##" if start else "") + word[start:end] for end in ends)
        piece = next((piece for piece in found if piece in vocabulary), None)
        if piece is None:
            break
        pieces.append(piece)
        start += len(piece.removeprefix("##") if start else piece)
    return pieces if start == len(word) else ["[UNK]"]


def encode(text: str, vocabulary: dict[str, int]) -> list[int]:
    """Returns the ids of a text, without [CLS] and [SEP]."""
    pieces = [piece for word in words_of(text) for piece in pieces_of(word, vocabulary)]
    return [vocabulary[piece] for piece in pieces]
