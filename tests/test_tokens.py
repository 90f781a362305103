"""From a sentence to token ids: those of Google's rules, whatever the text; where a tokenizer comes
from, how one is trained, and that no text can forge a special token.
"""

import functools
import itertools
import json
import os
import unicodedata
from unittest import mock

import numpy as np
import pytest
import wordpiece
from helpers import python
from hypothesis import given
from hypothesis import strategies as st
from strategies import (
    LETTERS,
    MASK,
    UNK,
    VOCABULARY,
    ids_of,
    seeds,
    small_tokenizer,
    tokenizers,
)
from tokenizers import Tokenizer, normalizers
from tokenizers.models import WordPiece
from tokenizers.normalizers import NFD, Lowercase, StripAccents
from tokenizers.pre_tokenizers import BertPreTokenizer

import data

# ---- The rules of Google ------------------------------------------------------------------------

MORE = "😀👩🏽🇩🇪中文々カ한국"


@functools.cache
def characters() -> list[str]:
    """Returns characters of Unicode 3.2 that no later version has changed: for these, the tables of
    Python and of the library agree."""
    old = unicodedata.ucd_3_2_0.category
    ends = [i for part in wordpiece.IDEOGRAPHS for i in (part[0] - 1, part[0], part[-1])]
    some = range(0x3400, 0x30000, 41)  # of those that are treated alike
    every = map(chr, [*range(0x3400), *some, *range(0xFB00, 0x10000), *ends])
    return [c for c in every if old(c) == unicodedata.category(c) and old(c) not in ("Cn", "Cs")]


@functools.cache
def vocabulary_of_characters() -> dict[str, int]:
    """Returns a vocabulary with every character that a word may have, and a few longer pieces."""
    words = wordpiece.words_of(" ".join([*characters(), *MORE]))
    letters = sorted({c for word in words for c in word} - {"a"})
    longer = ["ab", "##bc", "abc", "##ab", "中文", "##\u1161\u11ab", "[MASK]", "[UNK]", "[CLS]"]
    tokens = [*longer, "[SEP]", "[PAD]", "a", *letters, *(f"##{c}" for c in letters)]
    return {token: i for i, token in enumerate(tokens)}


@functools.cache
def tokenizer_of_characters() -> Tokenizer:
    return data.wordpiece(vocabulary_of_characters())


HARD_WORDS = "a abcab É e\u0301 İ ß ΑΣ 한국 \u1112\u1161 中文 々カ 😀 👩🏽 $^ « ’ [MASK] [UNK] ##b"
HARD_CHARACTERS = "\u00ad\u3000\u00a0\ufffd\u200b\x00\x1f\t\n"
hard_words = st.sampled_from([*HARD_WORDS.split(), *HARD_CHARACTERS, "b" * 100, "b" * 101])


@given(st.lists(hard_words | st.text(max_size=3), max_size=12), st.sampled_from(["", " "]))
def test_ids_are_those_of_googles_rules_on_any_text(words, between):
    """Accents in both forms, soft hyphens, wide spaces, U+FFFD, Hangul, emoji, controls, CJK."""
    known = {*characters(), *MORE}
    text = "".join(c for c in between.join(words) if c in known)
    expected = wordpiece.encode(text, vocabulary_of_characters())
    assert data.encode_plain(tokenizer_of_characters(), [text]) == [expected]


def test_each_character_of_unicode_is_treated_by_googles_rules():
    """Within a word, where it may be kept, changed, dropped, or be a word or a space."""
    texts = [f"b{c}B" for c in (*characters(), *MORE)]
    found = data.encode_plain(tokenizer_of_characters(), texts)
    expected = [wordpiece.encode(text, vocabulary_of_characters()) for text in texts]
    assert [t for t, one, other in zip(texts, found, expected, strict=True) if one != other] == []


# ---- Tokenizers from files ----------------------------------------------------------------------


def test_tokenizers_load_from_each_kind_of_source_with_the_same_ids(tmp_path):
    (tmp_path / "vocab.txt").write_text("\n".join(VOCABULARY) + "\n", encoding="utf-8")
    small_tokenizer().save(str(tmp_path / "other.json"))
    expected = small_tokenizer().encode("Abc d.").ids
    for source in (tmp_path, tmp_path / "vocab.txt", tmp_path / "other.json"):
        assert data.load_tokenizer(source).encode("Abc d.").ids == expected
    (tmp_path / "vocab.txt").write_text("no business of other.json")
    assert data.load_tokenizer(tmp_path / "other.json").encode("Abc d.").ids == expected


def test_tokenizer_json_comes_before_vocab_txt_as_in_transformers(tmp_path):
    small_tokenizer().save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "vocab.txt").write_text("\n".join(reversed(VOCABULARY)))
    (tmp_path / "tokenizer_config.json").write_text('{"do_lower_case": false}')
    assert data.load_tokenizer(tmp_path).to_str() == small_tokenizer().to_str()


@pytest.mark.parametrize("end", ["", "\n"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_a_vocabulary_has_a_token_for_each_line(end, encoding, tmp_path):
    """A token may be a space that ends no line, the last line may end without a newline, and a byte
    order mark is no part of the first token."""
    tokens = [*VOCABULARY, "\u00a0", "é"]
    (tmp_path / "vocab.txt").write_text("\n".join(tokens) + end, encoding=encoding)
    expected = {token: i for i, token in enumerate(tokens)}
    assert data.load_tokenizer(tmp_path / "vocab.txt").get_vocab() == expected


@pytest.mark.parametrize("file", ["vocab.txt", "tokenizer.json", "Sequence in tokenizer.json"])
def test_a_lowercasing_tokenizer_with_cased_tokens_is_rejected_whatever_file_it_is_from(
    file, tmp_path
):
    """No text would ever match them: `The` becomes `t ##h ##e`, without an error."""
    cased = {token: i for i, token in enumerate([*VOCABULARY, "<S>", "Hund"])}
    tokenizer = data.wordpiece(cased)
    if file == "vocab.txt":
        (tmp_path / file).write_text("\n".join(cased))
        (tmp_path / "tokenizer_config.json").write_text('{"do_lower_case": true}')
    else:
        if file.startswith("Sequence"):
            tokenizer.normalizer = normalizers.Sequence([NFD(), Lowercase(), StripAccents()])
        tokenizer.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ValueError, match="Hund"):
        data.load_tokenizer(tmp_path)


def test_cased_tokens_in_brackets_are_no_words(tmp_path):
    """Google's Chinese vocabulary has <S>, and others have places for tokens to come."""
    (tmp_path / "vocab.txt").write_text("\n".join([*VOCABULARY, "<S>", "[E1]"]))
    assert data.load_tokenizer(tmp_path).token_to_id("[E1]") == len(VOCABULARY) + 1


def test_what_is_no_path_is_asked_for_on_the_hub(tmp_path, monkeypatch):
    """For a model on the hub, only the three tokenizer files are downloaded, not the weights."""
    (tmp_path / "vocab.txt").write_text("\n".join(VOCABULARY))
    asked = mock.Mock(return_value=str(tmp_path))
    monkeypatch.setattr(data, "snapshot_download", asked)
    assert data.load_tokenizer("owner/name").get_vocab() == small_tokenizer().get_vocab()
    files = ["tokenizer.json", "tokenizer_config.json", "vocab.txt"]
    asked.assert_called_once_with("owner/name", allow_patterns=files)
    for missing in ("vocab.txt", "tokenizer.json"):
        with pytest.raises(ValueError, match=f"cannot read nowhere/{missing}"):
            data.load_tokenizer(f"nowhere/{missing}")
    assert asked.call_count == 1


def test_special_tokens_are_special_even_if_the_file_does_not_say_so(tmp_path):
    """transformers makes them so, and a [MASK] in a text is to be filled."""
    plain = Tokenizer(WordPiece({t: i for i, t in enumerate(VOCABULARY)}, unk_token="[UNK]"))
    plain.pre_tokenizer = BertPreTokenizer()
    plain.save(str(tmp_path / "tokenizer.json"))
    assert data.load_tokenizer(tmp_path).encode("a [MASK]").ids[-1] == MASK


def test_a_vocabulary_without_a_special_token_is_rejected(tmp_path):
    kept = [token for token in VOCABULARY if token not in ("[MASK]", "[PAD]")]
    (tmp_path / "vocab.txt").write_text("\n".join(kept))
    with pytest.raises(ValueError, match=r"lacks \[MASK\], \[PAD\]$"):
        data.load_tokenizer(tmp_path)


def test_padding_and_truncation_of_a_published_tokenizer_are_switched_off(tmp_path):
    padded = small_tokenizer()
    padded.enable_padding(length=9)
    padded.enable_truncation(3)
    padded.save(str(tmp_path / "tokenizer.json"))
    assert len(data.load_tokenizer(tmp_path).encode("a b c d")) == 6


@pytest.mark.parametrize(
    ("about", "tokens"),
    [
        (None, "a e 中 文"),
        ({}, "a e 中 文"),
        ({"do_lower_case": False}, "A é 中 文"),
        ({"do_lower_case": False, "strip_accents": True}, "A e 中 文"),
        ({"do_lower_case": False, "tokenize_chinese_chars": False}, "A é 中文"),
    ],
)
def test_a_vocabulary_is_cased_or_chinese_if_its_config_says_so(about, tokens, tmp_path):
    """A cased checkpoint without tokenizer.json was lowercased without a warning."""
    vocabulary = [*VOCABULARY, "é", "中", "文", "中文"] + ["A"] * ("A" in tokens)
    (tmp_path / "vocab.txt").write_text("\n".join(vocabulary), encoding="utf-8")
    if about is not None:
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(about))
    for source in (tmp_path, tmp_path / "vocab.txt"):
        assert data.load_tokenizer(source).encode("A é 中文").tokens[1:-1] == tokens.split()


# ---- Training a tokenizer -----------------------------------------------------------------------


@given(
    st.lists(st.text(alphabet=LETTERS[:5] + "é中. ", min_size=1), min_size=1, max_size=10), seeds
)
def test_a_trained_tokenizer_is_deterministic_and_knows_every_character(texts, seed):
    """Another order of the texts trains the same tokenizer; [PAD] is always 0."""
    tokenizer = data.train_tokenizer(texts, 60)
    order = np.random.default_rng(seed).permutation(len(texts))
    assert data.train_tokenizer([texts[i] for i in order], 60).to_str() == tokenizer.to_str()
    assert data.train_tokenizer(iter(texts), 60).to_str() == tokenizer.to_str()
    assert [tokenizer.token_to_id(token) for token in data.SPECIAL_TOKENS] == [0, 1, 2, 3, 4]
    assert sorted(tokenizer.get_vocab().values()) == list(range(tokenizer.get_vocab_size()))
    assert all(UNK not in ids for ids in data.encode_plain(tokenizer, texts))
    letters = {c for text in texts for c in text.replace("é", "e")} - {" "}
    fixed = len(data.SPECIAL_TOKENS) + 2 * len(letters)
    assert {t for t in tokenizer.get_vocab() if len(t) == 1} == letters
    assert fixed <= tokenizer.get_vocab_size() <= 60
    assert data.train_tokenizer(texts, fixed).get_vocab_size() == fixed


def test_a_trained_tokenizer_has_the_size_asked_for():
    texts = [f"{a}{b}{a} {b}{a}{a}" for a in LETTERS for b in LETTERS]
    assert data.train_tokenizer(texts, 100).get_vocab_size() == 100


def test_texts_to_learn_a_vocabulary_from_are_not_held_in_memory():
    """They are read one by one, twice."""

    class Texts:
        passes = 0

        def __iter__(self):
            self.passes += 1
            yield from ("ab ab", "", "ac")

    texts = Texts()
    tokenizer = data.train_tokenizer(texts, 14)
    assert texts.passes == 2
    assert tokenizer.to_str() == data.train_tokenizer(["ab ab", "ac"], 14).to_str()


def test_a_vocabulary_smaller_than_the_alphabet_is_rejected():
    with pytest.raises(ValueError, match=r"vocab_size 6.* 11"):
        data.train_tokenizer(["abc"], 6)


def test_only_the_thousand_most_frequent_characters_are_tokens():
    """English with 9,000 Chinese characters in names needed a vocabulary of 18,049 tokens. Ties are
    broken in sorted order, so that the ids are the same each time."""
    stray = [chr(0x4E00 + i) for i in range(9000)]
    texts = ["the cat sat on the mat 龍"] * 3 + [f"a name {character}" for character in stray]
    tokenizer = data.train_tokenizer(texts, 3000)
    letters = {token for token in tokenizer.get_vocab() if len(token) == 1}
    frequent = set("thecatsonmat") | set("name") | {"龍"}
    assert letters == frequent | set(stray[: 1000 - len(frequent)])
    rare = data.encode_plain(tokenizer, [stray[-1]])
    assert rare == [[UNK]]


@pytest.mark.slow
def test_processes_with_other_hash_seeds_train_the_same_tokenizer(tmp_path):
    """The order of a set of strings differs between them, and with it that of equal counts."""
    texts = [f"{a}{b} {b}{a}{a}" for a, b in itertools.pairwise(LETTERS + "éß中文")]
    code = f"import sys, data; data.train_tokenizer({texts}, 90).save(sys.argv[1])"
    for seed in "12":
        environment = {**os.environ, "PYTHONHASHSEED": seed}
        ended = python("-c", code, f"{tmp_path}/{seed}.json", env=environment)
        assert ended.returncode == 0, ended.stderr
    data.train_tokenizer(texts, 90).save(str(tmp_path / "here.json"))
    assert len({file.read_bytes() for file in tmp_path.iterdir()}) == 1


# ---- Encoding -----------------------------------------------------------------------------------


forged = st.sampled_from(["[MASK]", "[PAD]", "[SEP]"])


@given(tokenizers(), st.lists(forged | hard_words | st.text(max_size=30), max_size=6))
def test_a_corpus_never_yields_a_special_token_but_unk(tokenizer, pieces):
    """Whatever is written in a text, it cannot forge a [MASK]; outside of a corpus it can."""
    (ids,) = data.encode_plain(tokenizer, [" ".join(pieces)])
    assert not {*ids} & {*ids_of(tokenizer, "[PAD]", "[CLS]", "[SEP]", "[MASK]")}
    assert tokenizer.encode("[MASK]").ids == ids_of(tokenizer, "[CLS]", "[MASK]", "[SEP]")


@pytest.mark.parametrize("change", ["enable_padding", "enable_truncation"])
def test_a_tokenizer_that_pads_or_truncates_is_rejected(change):
    """A published one often does. Its [PAD] went into the corpus, and labels were [PAD], too."""
    tokenizer = small_tokenizer()
    getattr(tokenizer, change)(**({} if change == "enable_padding" else {"max_length": 4}))
    with pytest.raises(ValueError, match="pads or truncates"):
        data.encode_plain(tokenizer, ["a b c d e f", "a"])
