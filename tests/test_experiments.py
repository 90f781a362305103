"""The experiments: each figure is drawn from its recorded lines, and what measures speed runs."""

import dataclasses
import importlib
import time

import pytest
import torch
from strategies import PUBLISHABLE, build, publish, small_tokenizer, write_rows

import data
from bert import Bert
from experiments import attention, speed
from experiments.curves import HERE, best_accuracies, means_of_seeds
from train_pretrain import make_optimizer


@pytest.mark.slow
@pytest.mark.parametrize("name", ["afternoon", "mistakes", "phases", "speed", "sst2", "story"])
def test_every_figure_is_drawn_from_the_lines_beside_its_script(name, tmp_path):
    pytest.importorskip("matplotlib")
    module = importlib.import_module(f"experiments.{name}")
    folders = [HERE / name] if name in ("afternoon", "story") else []
    module.draw(*folders).savefig(tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_curves_are_means_over_the_seeds_of_a_learning_rate(tmp_path):
    values = {(1e-3, 0): [1.0, 2.0], (1e-3, 1): [3.0, 5.0], (1e-4, 0): [9.0, 9.5]}
    rows = [
        {"split": "validation", "learning_rate": rate, "seed": seed, "step": 10 * epoch}
        | {"epoch": epoch, "loss": loss, "accuracy": loss / 10}
        for (rate, seed), losses in values.items()
        for epoch, loss in enumerate(losses, 1)
    ]
    write_rows(tmp_path / "metrics.jsonl", rows)
    for run in (tmp_path, tmp_path / "metrics.jsonl"):
        steps, means = means_of_seeds(run, "loss", learning_rate=1e-3)
        assert (steps.tolist(), means) == ([10, 20], [2.0, 3.5])
    epochs, means = means_of_seeds(tmp_path, "loss", by="epoch", learning_rate=1e-4)
    assert (epochs.tolist(), means) == ([1, 2], [9.0, 9.5])
    assert best_accuracies(tmp_path, learning_rate=1e-3) == pytest.approx([20.0, 50.0])
    assert best_accuracies(tmp_path) == pytest.approx([95.0, 50.0])


# ---- Attention ----------------------------------------------------------------------------------


def test_attention_is_shown_as_it_is_in_every_layer_and_head():
    """Rows are distributions, and they are those that make the output: a query of zeros makes them
    uniform."""
    model = build(Bert, dataclasses.replace(PUBLISHABLE, fused_attention=False))
    probs = attention.attention_probs(model, torch.tensor([[2, 5, 4, 7, 3]]))
    assert probs.shape == (3, 2, 5, 5)
    torch.testing.assert_close(probs.sum(dim=-1), torch.ones(3, 2, 5, dtype=probs.dtype))
    assert probs.std(dim=-1).min() > 1e-6
    torch.nn.init.zeros_(model.layers[1].attention.query.weight)
    torch.nn.init.zeros_(model.layers[1].attention.query.bias)
    probs = attention.attention_probs(model, torch.tensor([[2, 5, 4, 7, 3]]))
    torch.testing.assert_close(probs[1], torch.full_like(probs[1], 0.2))
    assert probs[0].std(dim=-1).min() > 1e-6


@pytest.mark.filterwarnings("ignore:not used")
def test_the_attention_picture_has_a_panel_for_each_head_with_the_tokens_of_the_text(tmp_path):
    pytest.importorskip("matplotlib")
    picture = tmp_path / "a.png"
    attention.main(str(publish(tmp_path / "model")), "a b", str(picture))
    assert picture.read_bytes().startswith(b"\x89PNG")
    probs = torch.rand(3, 2, 4, 4).softmax(dim=-1)
    tokens = ["[CLS]", "a", "b", "[SEP]"]
    *panels, _ = attention.draw(probs, tokens).axes  # the last one is the colour bar
    for i, panel in enumerate(panels):
        (image,) = panel.get_images()  # a row of it is a query
        assert torch.equal(torch.from_numpy(image.get_array().data), probs[i // 2, i % 2])
    assert [label.get_text() for label in panels[-1].get_xticklabels()] == tokens
    assert [label.get_text() for label in panels[0].get_yticklabels()] == tokens


# ---- Speed --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def examples(tmp_path_factory) -> data.PretrainDataset:
    folder = tmp_path_factory.mktemp("examples") / "corpus"
    texts = ["a b c\n\nb c d a", "c c a\n\nd b a b"]
    corpus = data.tokenize_corpus(texts, small_tokenizer(), folder)
    return data.PretrainDataset(corpus, small_tokenizer(), 16)


@pytest.mark.slow
@pytest.mark.parametrize("who", ["ours", "transformers"])
def test_a_step_of_either_contestant_changes_every_parameter(who, examples, monkeypatch):
    """Otherwise it would not be the same work."""
    pytest.importorskip("transformers")
    models = []
    monkeypatch.setattr(speed, "make_optimizer", lambda m: models.append(m) or make_optimizer(m))
    batch = data.collate([examples[0], examples[1]], examples.padding_idx)
    step = speed.Training(who, "tiny", "float32", keeps_memory=False)(batch)
    before = [parameter.detach().clone() for parameter in models[0].parameters()]
    step()
    for one, other in zip(before, models[0].parameters(), strict=True):
        assert not torch.equal(one, other)


def test_either_data_worker_makes_a_batch(examples):
    pytest.importorskip("transformers")
    for worker in (
        speed.our_worker(examples, 2),
        speed.their_worker(small_tokenizer(), ["a b c d", "b a c d"]),
    ):
        assert len(worker()["input_ids"]) == 2


@pytest.mark.slow
def test_a_contest_compares_with_its_first_contestant():
    quick, slow = speed.contest([(pause, 0.001), (pause, 0.1)], rounds=3, steps=1)
    assert quick["times_as_fast"] == 1.0
    assert slow["times_as_fast"] > 2
    assert slow["seconds"] > 0.1


def pause(seconds: float):
    return lambda: time.sleep(seconds)
