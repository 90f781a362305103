"""Looking into a model: its guesses for masks, and the command of bert.py."""

import dataclasses
import shutil
from unittest import mock

import pytest
import torch
from helpers import python
from strategies import (
    PADDING,
    PUBLISHABLE,
    VOCABULARY,
    build,
    publish,
    small_tokenizer,
)

import bert
from bert import (
    BertPretrainModel,
    fill_masks,
)


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
    with pytest.raises(ValueError, match="40"):
        fill_masks(fewer, small_tokenizer(), "a [MASK]")


@pytest.mark.slow
def test_the_command_needs_no_other_file_and_prints_a_line_for_each_mask(tmp_path):
    """A published tokenizer.json may pad and truncate: MiniLM's pads to 128 tokens."""
    folder = publish(tmp_path / "model")
    expected = fill_masks(
        BertPretrainModel.from_pretrained(folder), small_tokenizer(), "a [MASK] b [MASK]"
    )
    padded = small_tokenizer()
    padded.enable_padding(length=16)
    padded.enable_truncation(4)
    padded.save(str(folder / "tokenizer.json"))
    shutil.copy(bert.__file__, tmp_path)
    ended = python("bert.py", "model", "a [MASK] b [MASK]", cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr
    count = sum(p.numel() for p in BertPretrainModel(PUBLISHABLE).parameters())
    total, *lines = ended.stdout.splitlines()
    assert total.startswith(f"{count:,}")
    for line, guesses in zip(lines, expected, strict=True):
        assert all(f"{token} {prob:.3f}" in line for token, prob in guesses.items())

    ended = python("bert.py", "no/such/place/here", "a", cwd=tmp_path)
    assert ended.returncode != 0
    assert "Traceback" not in ended.stderr
    assert "no/such/place/here" in ended.stderr


def test_a_token_with_the_id_that_the_model_takes_for_padding_is_read():
    """config.json may name an ordinary token. No text that masks are filled in has padding."""
    model = build(BertPretrainModel, PUBLISHABLE)
    expected = fill_masks(model, small_tokenizer(), "a [MASK] c")
    model.padding_idx = model.bert.padding_idx = small_tokenizer().token_to_id("c")
    assert fill_masks(model, small_tokenizer(), "a [MASK] c") == expected


def test_masks_are_filled_on_the_device_of_the_model():
    """The device meta stands for a GPU."""
    asked = []

    class Noted(BertPretrainModel):
        def forward(self, input_ids, attention_mask, masked_indices):
            asked.append(input_ids.device.type)
            return torch.zeros(1, len(VOCABULARY)), None  # logits that have numbers

    model = Noted(PUBLISHABLE, PADDING).to("meta")
    where = torch.zeros(1, 1, device="meta")  # the mask is; nobody knows on this device
    with mock.patch.object(torch.Tensor, "nonzero", return_value=where):
        fill_masks(model, small_tokenizer(), "a [MASK]")
    assert asked == ["meta"]
