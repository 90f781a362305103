"""Looking into a model: its parameters by part, and its guesses for masks."""

import dataclasses
import re
import sys
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file, save_file
from strategies import (
    FIXED,
    PADDING,
    PUBLISHABLE,
    VOCABULARY,
    build,
    publish,
    small_tokenizer,
)
from tokenizers import Tokenizer
from tokenizers.models import WordPiece

import bert
from bert import (
    Bert,
    BertConfig,
    BertPretrainModel,
    SST2BertModel,
    fill_masks,
    look,
    parameter_counts,
)


@pytest.mark.parametrize("cls", [Bert, BertPretrainModel, SST2BertModel])
def test_the_parts_of_a_model_add_up_to_all_its_parameters(cls):
    model = cls(FIXED, PADDING)
    counts = parameter_counts(model)
    assert counts.total() == sum(p.numel() for p in model.parameters())
    assert counts["embeddings.token"] == 31 * 12  # the decoder is not counted again
    assert counts["layers.expand"] == 3 * (12 * 22 + 22)
    assert counts["layers.attention"] == 3 * (2 * (12 * 10 + 10) + 12 * 14 + 14 + 14 * 12 + 12)


def test_base_has_the_parts_that_the_paper_says():
    """Base has 30,522 tokens, 12 layers of 768 units and 3,072 in the feed-forward. [BERT] §3"""
    with torch.device("meta"):
        counts = parameter_counts(Bert(BertConfig.named("base"), PADDING))
    assert counts["embeddings.token"] == 30522 * 768
    assert counts["layers.attention"] == 12 * 4 * (768 * 768 + 768)
    assert counts["layers.expand"] + counts["layers.contract"] == 12 * (2 * 768 * 3072 + 3840)
    assert counts.total() == 109_482_240


def test_masks_are_filled_with_the_most_likely_tokens():
    model = build(BertPretrainModel, PUBLISHABLE)
    best = fill_masks(model, small_tokenizer(), "a [MASK] c [MASK]", k=3)
    assert [len(row) for row in best] == [3, 3]
    input_ids = torch.tensor([[2, 5, 4, 7, 4, 3]])  # [CLS] a [MASK] c [MASK] [SEP]
    probs = model(input_ids)[0].softmax(dim=-1)[0]
    for row, column in zip(best, (2, 4), strict=True):
        tokens = [small_tokenizer().token_to_id(token) for token in row]
        assert tokens == probs[column].topk(3).indices.tolist()
        assert list(row.values()) == pytest.approx(probs[column].topk(3).values.tolist())


def test_guesses_are_tokens_of_the_tokenizer():
    """Weights may have more rows than there are tokens: these have no name."""
    rows = len(VOCABULARY) + 7
    model = build(BertPretrainModel, dataclasses.replace(PUBLISHABLE, vocab_size=rows))
    torch.nn.init.constant_(model.mlm_bias[len(VOCABULARY) :], 9.0)
    (best,) = fill_masks(model, small_tokenizer(), "a [MASK]", k=100)
    assert set(best) == set(VOCABULARY)
    assert list(best.values()) == sorted(best.values(), reverse=True)
    fewer = build(BertPretrainModel, dataclasses.replace(PUBLISHABLE, vocab_size=40))
    with pytest.raises(ValueError, match="tokenizer has the id 40, the weights have 40 tokens"):
        fill_masks(fewer, small_tokenizer(), "a [MASK]")


def test_masks_are_filled_on_the_device_of_the_model():
    """The device meta stands for a GPU."""
    asked = []

    class Noted(BertPretrainModel):
        def forward(self, input_ids, *_, positions):
            asked.append(input_ids.device.type)
            return torch.zeros(1, len(VOCABULARY)), None  # logits that have numbers

    model = Noted(PUBLISHABLE, PADDING).to("meta")
    where = torch.zeros(1, 1, device="meta")  # the mask is; nobody knows on this device
    with mock.patch.object(torch.Tensor, "nonzero", return_value=where):
        fill_masks(model, small_tokenizer(), "a [MASK]")
    assert asked == ["meta"]


def test_an_encoder_without_a_head_fills_no_mask(tmp_path, capsys):
    """A new, random head would guess nonsense. The parameters are counted all the same."""
    publish(tmp_path, cls=Bert)
    look(str(tmp_path), "a b")
    model = Bert(PUBLISHABLE, PADDING)
    assert f"{sum(p.numel() for p in model.parameters()):,}  in all" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"has no head to fill a \[MASK\] with$"):
        look(str(tmp_path), "a [MASK]")


def test_parameters_that_the_files_lack_are_not_counted(tmp_path, capsys):
    """As of a published BertForMaskedLM, which has neither pooler nor NSP head."""
    publish(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    kept = {n: t for n, t in tensors.items() if "pooler" not in n and "seq_relationship" not in n}
    save_file(kept, tmp_path / "model.safetensors")
    look(str(tmp_path), "")
    printed = capsys.readouterr().out
    assert "pooler" not in printed
    assert "nsp" not in printed
    assert f"{sum(tensor.numel() for tensor in kept.values()):,}  in all" in printed


@pytest.mark.parametrize("token", ["[PAD]", "[MASK]"])
def test_a_tokenizer_without_a_special_token_is_named(token):
    vocabulary = {t: i for i, t in enumerate(t for t in VOCABULARY if t != token)}
    tokenizer = Tokenizer(WordPiece(vocabulary, unk_token="[UNK]"))
    with pytest.raises(ValueError, match=re.escape(f"the tokenizer has no {token}")):
        fill_masks(build(BertPretrainModel, PUBLISHABLE), tokenizer, "a")


def in_this_process(monkeypatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["a/copy.py", *arguments])
    bert.main()


def test_the_command_prints_the_counts_of_each_part_and_a_line_of_guesses_for_each_mask(
    tmp_path, monkeypatch, capsys
):
    folder = str(publish(tmp_path))
    in_this_process(monkeypatch, folder, "a [MASK] b [MASK]")
    *parts, total, first, second = capsys.readouterr().out.splitlines()
    model = BertPretrainModel.from_pretrained(folder)
    counts = parameter_counts(model)
    assert parts == [f"{count:>13,}  {part}" for part, count in counts.items()]
    assert total == f"{counts.total():>13,}  in all"
    expected = fill_masks(model, small_tokenizer(), "a [MASK] b [MASK]")
    for line, best in zip((first, second), expected, strict=True):
        shown = [f"{token} {prob:.3f}" for token, prob in best.items()]
        assert line == "[MASK]  " + "  ".join(shown)
        assert len(shown) == 5

    in_this_process(monkeypatch, folder)
    assert capsys.readouterr().out.splitlines() == [*parts, total]  # the text may be left out


def test_the_command_explains_itself_and_ends_a_mistake_in_one_line(monkeypatch, capsys):
    with pytest.raises(SystemExit) as ended:
        in_this_process(monkeypatch, "--help")
    assert ended.value.code == 0
    words = " ".join(capsys.readouterr().out.split())
    assert words.startswith(
        "usage: bert.py [-h] source [text]"
        " Counts a model's parameters and fills the masks of a text. positional"
    )
    assert "source directory or hub id of a model" in words
    assert "text with [MASK] for tokens to be guessed" in words

    with pytest.raises(SystemExit) as ended:
        in_this_process(monkeypatch, "no/such/place", "a")
    assert ended.value.code == 2
    printed = capsys.readouterr()
    assert printed.err.startswith("error: no/such/place is no directory")
    assert (printed.err.count("\n"), printed.out) == (1, "")


def test_a_text_that_is_not_utf_8_is_rejected(tmp_path):
    with pytest.raises(ValueError, match="surrogates not allowed"):
        look(str(publish(tmp_path / "model")), "caf\udce9 [MASK]")
