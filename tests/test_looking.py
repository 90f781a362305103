"""Looking into a model: its guesses for masks, and its attention drawn. Then a run's curves."""

import dataclasses
import itertools
import shutil
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch
from helpers import python, run_in_process
from strategies import (
    PADDING,
    PUBLISHABLE,
    VOCABULARY,
    build,
    publish,
    small_tokenizer,
)

import bert
import extras.attention
from bert import (
    Bert,
    BertPretrainModel,
    fill_masks,
)
from extras.attention import attention_probs, draw_attention, draw_text


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


def test_attention_is_shown_as_it_is_in_every_layer_and_head():
    """Rows are distributions, and they are those that make the output: a query of zeros makes them
    uniform."""
    model = build(Bert, dataclasses.replace(PUBLISHABLE, fused_attention=False))
    probs = attention_probs(model, torch.tensor([[2, 5, 4, 7, 3]]))
    assert probs.shape == (3, 2, 5, 5)
    torch.testing.assert_close(probs.sum(dim=-1), torch.ones(3, 2, 5, dtype=probs.dtype))
    assert probs.std(dim=-1).min() > 1e-6
    torch.nn.init.zeros_(model.layers[1].attention.query.weight)
    torch.nn.init.zeros_(model.layers[1].attention.query.bias)
    probs = attention_probs(model, torch.tensor([[2, 5, 4, 7, 3]]))
    torch.testing.assert_close(probs[1], torch.full_like(probs[1], 0.2))
    assert probs[0].std(dim=-1).min() > 1e-6


def test_the_attention_figure_has_a_panel_for_each_head_with_its_tokens():
    pytest.importorskip("matplotlib")
    probs = torch.rand(3, 2, 4, 4).softmax(dim=-1)
    tokens = ["[CLS]", "a", "##b", "[SEP]"]
    figure = draw_attention(probs, tokens)
    *panels, bar = figure.axes  # the last one is the colour bar
    assert len(panels) == 3 * 2
    assert bar.get_ylabel() == "probability"
    assert (figure.get_supxlabel(), figure.get_supylabel()) == (
        "key: attended to",
        "query: attends",
    )
    for i, panel in enumerate(panels):
        assert panel.get_title() == f"layer {i // 2 + 1}, head {i % 2 + 1}"
        below = [label.get_text() for label in panel.get_xticklabels()]
        left = [label.get_text() for label in panel.get_yticklabels()]
        assert below == (tokens if i >= 4 else [])  # at the edges of the grid
        assert left == (tokens if i % 2 == 0 else [])
        (image,) = panel.get_images()  # a row of it is a query
        assert torch.equal(torch.from_numpy(image.get_array().data), probs[i // 2, i % 2])
        assert image.get_clim() == (0, 1)  # one scale for all panels
    assert image.colorbar.ax is bar  # which tells what the colours of the panels mean


@pytest.mark.parametrize(
    ("layers", "heads", "length", "inches"),
    [(3, 2, 4, (2 * 1.2 + 1.5, 3 * 1.2 + 1.5)), (2, 3, 20, (3 * 2.8 + 1.5, 2 * 2.8 + 1.5))],
)
def test_the_attention_figure_grows_with_layers_heads_and_length(layers, heads, length, inches):
    """Labels of 0.14 inches each have to fit."""
    pytest.importorskip("matplotlib")
    probs = torch.rand(layers, heads, length, length)
    figure = draw_attention(probs, ["a"] * length)
    assert figure.get_size_inches().tolist() == pytest.approx(inches)


@pytest.mark.parametrize(("layers", "heads"), [(1, 1), (2, 3)])
def test_nothing_in_the_attention_figure_overlaps(layers, heads):
    pytest.importorskip("matplotlib")
    tokens = ["[CLS]", *["unbelievable"] * 18, "[SEP]"]
    figure = draw_attention(torch.rand(layers, heads, 20, 20), tokens)
    figure.draw_without_rendering()  # decides the places
    panels = figure.axes[:-1]
    assert len({round(panel.get_window_extent().width, 3) for panel in panels}) == 1
    places = [axes.get_tightbbox() for axes in figure.axes]
    labels = panels[-1].get_xticklabels()  # of the last row, so it has some
    for boxes in (places, [label.get_window_extent() for label in labels]):
        assert not any(one.overlaps(other) for one, other in itertools.combinations(boxes, 2))


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory) -> Path:
    return publish(tmp_path_factory.mktemp("pretrained"))


def test_the_command_draws_attention(pretrained, tmp_path):
    pytest.importorskip("matplotlib")
    picture = str(tmp_path / "a.png")
    line = ("extras.attention", str(pretrained), "a b c.", "--out", picture)
    assert run_in_process(tmp_path / "output", *line) == (0, "")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_a_picture_into_a_folder_that_is_not_there_is_rejected_before_any_work(tmp_path):
    with pytest.raises(ValueError, match=r"--out .*a\.png: its folder does not exist"):
        draw_text("no/such/model", "a b", str(tmp_path / "nowhere/a.png"))


def test_a_picture_is_of_the_tokens_of_the_text(tmp_path, monkeypatch):
    drawn = []

    def draw(probs, tokens):
        drawn.append((probs.shape, tokens))
        return figure

    figure = mock.Mock()
    monkeypatch.setattr(extras.attention, "draw_attention", draw)
    source, picture = str(publish(tmp_path)), str(tmp_path / "a.png")
    monkeypatch.setattr(sys, "argv", ["attention", source, "a b", "--out", picture])
    extras.attention.main()
    assert drawn == [((3, 2, 4, 4), ["[CLS]", "a", "b", "[SEP]"])]
    figure.savefig.assert_called_once_with(picture, dpi=120)


def test_a_mistyped_model_of_a_picture_is_one_line_and_status_2(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["attention", "no/such/place", "a"])
    with pytest.raises(SystemExit) as ended:
        extras.attention.main()
    assert ended.value.code == 2
    printed = capsys.readouterr().err
    assert "no/such/place" in printed
    assert printed.count("\n") == 1


def test_a_text_that_is_not_utf_8_is_rejected(tmp_path):
    with pytest.raises(ValueError, match="surrogates not allowed"):
        draw_text(str(publish(tmp_path / "model")), "caf\udce9 [MASK]", str(tmp_path / "a.png"))
