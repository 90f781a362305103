"""From a document to sentences: nothing but white space is lost, and a sentence ends where a reader
would end it.
"""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

import data

PARTS = 'a bc Mr. x. y! "z?" end.) 。 J. 1.5 ... word'
parts = [*PARTS.split(), " ", "\n", "\n\n", "\t", "K" * 500]
texts = st.lists(st.sampled_from(parts), max_size=30).map("".join)


@given(texts | st.text(max_size=60))
def test_splitting_loses_nothing_but_white_space(text):
    assert re.sub(r"\s", "", "".join(data.split_sentences(text))) == re.sub(r"\s", "", text)
    assert all(0 < len(s) <= 400 and s == s.strip() for s in data.split_sentences(text))


@pytest.mark.parametrize(
    ("text", "sentences"),
    [
        ("One. Two! Three?", ["One.", "Two!", "Three?"]),
        ("A line\nthat goes on. B", ["A line\nthat goes on.", "B"]),
        ("No stop\n\nNext", ["No stop", "Next"]),
        ('"Who?" he said. (Yes.) No', ['"Who?"', "he said.", "(Yes.)", "No"]),
        ("Mr. X met J. K. Y. and mrs. Z. It", ["Mr. X met J. K. Y. and mrs. Z. It"]),
        ('Dr. No sat. "Why?" she asked', ["Dr. No sat.", '"Why?"', "she asked"]),
        ("Well… Yes", ["Well…", "Yes"]),
        ("「はい。」と言う。次", ["「はい。」", "と言う。", "次"]),
        ("It cost 1.5 dollars... Really", ["It cost 1.5 dollars...", "Really"]),
        ("你好。再见！", ["你好。", "再见！"]),
        ("他说：“好。”她走了！？是。", ["他说：“好。”", "她走了！？", "是。"]),
        ("यह एक है। वह दो है॥तीन", ["यह एक है।", "वह दो है॥", "तीन"]),
        ("یہ ایک ہے۔ کیا؟ ہاں۔", ["یہ ایک ہے۔", "کیا؟", "ہاں۔"]),
        ("አንድ። ሁለት።", ["አንድ።", "ሁለት።"]),
        ("មួយ។ ពីរ", ["មួយ។", "ពីរ"]),
        ("  \n\n  ", []),
    ],
)
def test_sentences_end_where_a_reader_would_end_them(text, sentences):
    assert data.split_sentences(text) == sentences


def test_a_text_without_an_end_is_cut_at_white_space():
    assert data.split_sentences("K" * 401) == ["K" * 400, "K"]
    pieces = data.split_sentences("word " * 1000)
    assert len(pieces) > 4
    assert all(piece.split() == ["word"] * len(piece.split()) for piece in pieces)
    assert data.split_sentences("K" * 400 + " " + "K" * 400) == ["K" * 400] * 2
