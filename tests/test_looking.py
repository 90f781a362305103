"""Looking into a model: its parameters by part, its guesses for masks, and its attention drawn.
Then the curves of a run.
"""

import dataclasses
import itertools
import os
import re
import sys
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest
import torch
from helpers import python, run, run_in_process
from safetensors.torch import load_file, save_file
from strategies import (
    FIXED,
    PADDING,
    PUBLISHABLE,
    VOCABULARY,
    build,
    publish,
    small_tokenizer,
    write_reviews,
    write_rows,
)
from tokenizers import Tokenizer
from tokenizers.models import WordPiece

import bert
import experiments.attention
import train_pretrain
import train_sst2
from bert import (
    Bert,
    BertConfig,
    BertPretrainModel,
    SST2BertModel,
    fill_masks,
    look,
    parameter_counts,
)
from experiments.attention import attention_probs, draw_attention, draw_text
from support.curves import draw_pretraining, draw_sst2, means_of_seeds, plot_pretraining
from train_sst2 import SST2Options


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


def test_the_help_of_the_picture_explains_its_words(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["attention", "--help"])
    with pytest.raises(SystemExit):
        experiments.attention.main()
    shown = " ".join(capsys.readouterr().out.split())
    assert shown.startswith("usage: experiments.attention [-h] [--out OUT] source text ")
    assert experiments.attention.__doc__.splitlines()[0] in shown
    for words in (
        "source directory or hub id of a model",
        "text what the model reads",
        "--out OUT the picture (default: attention.png)",
    ):
        assert f" {words} " in f"{shown} "


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory) -> Path:
    return publish(tmp_path_factory.mktemp("pretrained"))


def test_the_command_draws_attention(pretrained, tmp_path):
    pytest.importorskip("matplotlib")
    picture = str(tmp_path / "a.png")
    line = ("experiments.attention", str(pretrained), "a b c.", "--out", picture)
    assert run_in_process(tmp_path / "output", *line) == (0, "")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


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


def test_a_picture_into_a_folder_that_is_not_there_is_rejected_before_any_work(tmp_path):
    with pytest.raises(ValueError, match=r"--out .*a\.png: its folder does not exist"):
        draw_text("no/such/model", "a b", str(tmp_path / "nowhere/a.png"))


def test_a_picture_is_of_the_tokens_of_the_text(tmp_path, monkeypatch):
    drawn = []

    def draw(probs, tokens):
        drawn.append((probs.shape, tokens))
        return figure

    figure = mock.Mock()
    monkeypatch.setattr(experiments.attention, "draw_attention", draw)
    source, picture = str(publish(tmp_path)), str(tmp_path / "a.png")
    monkeypatch.setattr(sys, "argv", ["attention", source, "a b", "--out", picture])
    experiments.attention.main()
    assert drawn == [((3, 2, 4, 4), ["[CLS]", "a", "b", "[SEP]"])]
    figure.savefig.assert_called_once_with(picture, dpi=120)


def test_a_mistyped_model_of_a_picture_is_one_line_and_status_2(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["attention", "no/such/place", "a"])
    with pytest.raises(SystemExit) as ended:
        experiments.attention.main()
    assert ended.value.code == 2
    printed = capsys.readouterr().err
    assert printed.startswith("error: no/such/place is no directory")
    assert printed.count("\n") == 1


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


# ---- The curves of a run ------------------------------------------------------------------------


def write_validation(run: Path) -> None:
    """Writes the lines of two learning rates, one of them with two seeds."""
    values = [
        (1e-3, 0, [1.0, 2.0]),
        (1e-3, 1, [3.0, 5.0]),
        (1e-4, 0, [9.0, 9.5]),
    ]
    rows = [
        {"split": "validation", "learning_rate": rate, "seed": seed, "step": 10 * epoch,
         "epoch": epoch, "loss": loss, "accuracy": loss / 10}
        for rate, seed, losses in values
        for epoch, loss in enumerate(losses, 1)
    ]  # fmt: skip
    write_rows(run / "metrics.jsonl", rows)


def test_curves_are_means_over_the_seeds_of_a_learning_rate(tmp_path):
    write_validation(tmp_path)
    for source in (tmp_path, tmp_path / "metrics.jsonl"):
        assert means_of_seeds(source, "validation", "loss", 1e-3) == ([10, 20], [2.0, 3.5])
    assert means_of_seeds(tmp_path, "validation", "loss", 1e-4, "epoch") == ([1, 2], [9.0, 9.5])
    assert means_of_seeds(tmp_path, "validation", "loss")[1] == pytest.approx([13 / 3, 16.5 / 3])


def test_the_picture_of_a_run_has_a_curve_for_each_learning_rate(tmp_path, monkeypatch):
    figure = pytest.importorskip("matplotlib.figure")
    write_validation(tmp_path)
    drawn = []
    monkeypatch.setattr(figure.Figure, "savefig", lambda f, path, **_: drawn.append((f, path)))
    draw_sst2(tmp_path)
    ((picture, path),) = drawn
    assert path == tmp_path / "curves.png"
    loss, accuracy = picture.axes
    assert described(loss) == ("training (pale) and validation", "step", "loss, nats")
    assert described(accuracy) == ("validation", "step", "accuracy")
    assert curves_in(accuracy) == {
        "learning rate 0.0001": ([10, 20], pytest.approx([0.9, 0.95])),
        "learning rate 0.001": ([10, 20], pytest.approx([0.2, 0.35])),
    }
    shown = [text.get_text() for text in accuracy.get_legend().get_texts()]
    assert sorted(shown) == sorted(curves_in(accuracy))


def test_each_script_draws_the_curves_of_its_own_run(options, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(train_pretrain, "draw_pretraining", drawn.append)
    monkeypatch.setattr(train_sst2, "draw_sst2", drawn.append)
    run(replace(options, steps=1))
    dataset = write_reviews(tmp_path / "reviews", train=9, validation=9)
    out = str(tmp_path / "tuned")
    train_sst2.main(SST2Options(out=out, dataset=dataset, vocab_size=60, epochs=1, device="cpu"))
    assert drawn == [Path(options.out), tmp_path / "tuned"]


def described(axes) -> tuple[str, str, str]:
    return axes.get_title(), axes.get_xlabel(), axes.get_ylabel()


def curves_in(axes) -> dict[str, tuple[list, list]]:
    """Returns the x and y of each line, by its label."""
    return {
        line.get_label(): (list(line.get_xdata()), list(line.get_ydata()))
        for line in axes.get_lines()
    }


def test_the_picture_of_pretraining_shows_losses_and_shares_by_step(tmp_path):
    figure = pytest.importorskip("matplotlib.figure")
    shares = ("most_frequent_prediction", "mlm_accuracy", "nsp_accuracy")
    validation = [
        {"split": "validation", "step": 10 * i, "mlm_loss": 5.0 - i, "ln_vocab_size": 6.0}
        | {name: (i + j) / 10 for j, name in enumerate(shares)}
        for i in range(3)
    ]
    train = [{"split": "train", "step": 5 * i, "mlm_loss": 4.0 - i} for i in range(3)]
    write_rows(tmp_path / "metrics.jsonl", [*train, *validation])
    left, right = figure.Figure().subplots(1, 2)
    plot_pretraining(left, right, tmp_path, {"bigrams": 3.0, "two words before": 2.0})
    steps = [0, 10, 20]
    assert curves_in(left) == {
        "training": ([0, 5, 10], [4.0, 3.0, 2.0]),
        "validation": (steps, [5.0, 4.0, 3.0]),
        "ln V: nothing is known": ([0, 1], [6.0, 6.0]),  # across the whole picture
        "bigrams": ([0, 1], [3.0, 3.0]),
        "two words before": ([0, 1], [2.0, 2.0]),
    }
    pale, _, *known = left.get_lines()
    assert pale.get_color() == "0.85"
    styles = [(line.get_color(), line.get_linestyle()) for line in known]
    assert styles == [("black", ":"), ("black", "--"), ("black", "-.")]
    assert curves_in(right) == {
        "share of the most frequent prediction": (steps, [0.0, 0.1, 0.2]),
        "MLM accuracy": (steps, [0.1, 0.2, 0.3]),
        "NSP accuracy": (steps, [0.2, 0.3, 0.4]),
    }
    assert described(left) == ("masked language model", "step", "MLM loss, nats")
    assert described(right) == ("pretraining, validation", "step", "")
    assert right.get_ylim() == (0, 1.02)


def test_the_picture_of_pretraining_compares_with_the_frequencies_of_tokens(tmp_path, monkeypatch):
    figure = pytest.importorskip("matplotlib.figure")
    line = {"split": "validation", "step": 4, "mlm_loss": 3.5, "unigram_entropy": 3.0,
            "ln_vocab_size": 4.0, "most_frequent_prediction": 0.5, "mlm_accuracy": 0.5,
            "nsp_accuracy": 0.5}  # fmt: skip
    write_rows(tmp_path / "metrics.jsonl", [line])
    drawn = []
    monkeypatch.setattr(figure.Figure, "savefig", lambda f, path, dpi: drawn.append((f, path, dpi)))
    draw_pretraining(tmp_path)
    ((picture, path, dpi),) = drawn
    assert (path, dpi, picture.get_size_inches().tolist()) == (
        tmp_path / "curves.png",
        120,
        [11, 4],
    )
    for panel in picture.axes:
        shown = [text.get_text() for text in panel.get_legend().get_texts()]
        assert sorted(shown) == sorted(curves_in(panel))
    unigrams = curves_in(picture.axes[0])["unigram entropy: how often tokens occur"]
    assert unigrams == ([0, 1], [3.0, 3.0])
    assert picture.get_layout_engine() is not None  # so that nothing overlaps


def test_a_run_without_its_training_lines_or_with_a_loss_that_is_null_is_drawn(tmp_path):
    """metrics.jsonl may have been moved away before the last step of a resumed run."""
    pytest.importorskip("matplotlib")
    known = {"unigram_entropy": 3.0, "ln_vocab_size": 4.0, "most_frequent_prediction": 0.5,
             "mlm_accuracy": 0.5, "nsp_accuracy": 0.5}  # fmt: skip
    write_rows(
        tmp_path / "metrics.jsonl", [{"split": "validation", "step": 4, "mlm_loss": None, **known}]
    )
    draw_pretraining(tmp_path)
    assert (tmp_path / "curves.png").exists()
    tuned = [
        {"split": split, "step": 4, "learning_rate": 1e-3, "seed": 0, "loss": None, "accuracy": 0.5}
        for split in ("train", "validation")
    ]
    write_rows(tmp_path / "tuned/metrics.jsonl", tuned)
    draw_sst2(tmp_path / "tuned")
    assert (tmp_path / "tuned/curves.png").exists()


def test_a_picture_that_would_be_too_large_is_rejected_before_it_is_drawn(tmp_path, monkeypatch):
    """Its memory grows with the square of the tokens: 40 GiB for base and 512."""
    publish(tmp_path)  # 3 layers of 2 heads
    monkeypatch.setattr(experiments.attention, "LARGEST_PICTURE", 3 * 2 * 4**2)
    monkeypatch.setattr(experiments.attention, "draw_attention", mock.Mock())
    draw_text(str(tmp_path), "a b", str(tmp_path / "a.png"))
    with pytest.raises(ValueError, match="5 tokens make too large a picture"):
        draw_text(str(tmp_path), "a b c", str(tmp_path / "a.png"))


def test_a_picture_needs_a_tokenizer_that_fits(tmp_path):
    publish(tmp_path)
    tokenizer = small_tokenizer()
    tokenizer.add_tokens(["more"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ValueError, match="tokenizer has the id 41, the weights have 41 tokens"):
        draw_text(str(tmp_path), "a more", str(tmp_path / "a.png"))


def test_a_text_that_is_not_utf_8_is_rejected(tmp_path):
    for see in (look, lambda source, text: draw_text(source, text, str(tmp_path / "a.png"))):
        with pytest.raises(ValueError, match="surrogates not allowed"):
            see(str(publish(tmp_path / "model")), "caf\udce9 [MASK]")


@pytest.mark.slow
def test_the_backend_of_a_notebook_need_not_be_there(tmp_path):
    """Every process that a notebook starts has MPLBACKEND. It stays as it is."""
    pytest.importorskip("matplotlib")
    code = """
import os
from support.curves import new_figure
new_figure((1, 1)).savefig(os.environ["OUT"])
assert os.environ["MPLBACKEND"] == "nonsense"
"""
    environment = {**os.environ, "MPLBACKEND": "nonsense", "OUT": str(tmp_path / "a.png")}
    ended = python("-c", code, env=environment)
    assert ended.returncode == 0, ended.stderr
    assert (tmp_path / "a.png").exists()


def test_a_picture_that_cannot_be_drawn_is_a_warning(tmp_path, monkeypatch):
    """A full disk made a finished run fail."""
    figure = pytest.importorskip("matplotlib.figure")
    write_validation(tmp_path)

    def full_disk(*_, **__):
        raise OSError("no space left")

    monkeypatch.setattr(figure.Figure, "savefig", full_disk)
    with pytest.warns(UserWarning, match=f"{tmp_path} has no picture: no space left"):
        draw_sst2(tmp_path)


def test_without_matplotlib_a_run_ends_without_a_picture(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    for draw in (draw_sst2, draw_pretraining):
        draw(tmp_path)
    assert not list(tmp_path.iterdir())
