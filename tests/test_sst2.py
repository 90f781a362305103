"""Fine-tuning: the choice of the epoch, what the pretrained weights bring, predictions."""

import io
import json

import numpy as np
import pytest
import torch
from strategies import LETTERS

import data
import train_sst2
from bert import BertConfig, BertPretrainModel, SST2BertModel
from support.curves import read_lines
from train_sst2 import SST2Options, best_epoch, evaluate, main


def reviews(folder, **splits: int) -> str:
    """Sentences of letters; label 1 if any of them is in the first half of the alphabet."""
    generator = np.random.default_rng(0)
    for split, number in splits.items():
        labels = generator.integers(0, 2, number)
        words = [generator.choice(list(LETTERS[:13] if y else LETTERS[13:]), 5) for y in labels]
        lines = [
            {"sentence": " ".join(w), "label": int(y)} for w, y in zip(words, labels, strict=True)
        ]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(folder)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A small run: two learning rates, two seeds, a test split."""
    folder = tmp_path_factory.mktemp("sst2")
    (folder / "reviews").mkdir()
    dataset = reviews(folder / "reviews", train=300, validation=60, test=60)
    options = SST2Options(
        out=str(folder / "run"),
        dataset=dataset,
        test_dataset=dataset,
        epochs=2,
        vocab_size=60,
        max_seq_length=16,
        learning_rate=(1e-3, 1e-5),
        seeds=2,
    )
    main(options)
    return folder / "run"


def test_the_epoch_with_the_highest_accuracy_is_kept():
    """Not the last, and not the lowest."""
    assert best_epoch([0.5, 0.9, 0.7]) == 1
    assert best_epoch([0.9, 0.9, 0.1]) == 0


def test_a_run_learns_and_scores_the_test_split_once(run):
    """The test split is scored by the best weights only, however many runs there were."""
    validation, test = read_lines(run, "validation"), read_lines(run, "test")
    assert len(validation["accuracy"]) == 2 * 2 * 2
    assert max(validation["accuracy"]) == 1.0
    assert test["accuracy"] == [1.0]


def test_epochs_have_different_orders_and_seeds_different_weights(run):
    lines = read_lines(run, "validation")
    runs = list(zip(lines["learning_rate"], lines["seed"], lines["epoch"], strict=True))
    assert len(set(runs)) == 8
    assert len(set(lines["loss"])) == 8


def test_the_saved_model_predicts_with_its_own_tokenizer(run, capsys, monkeypatch):
    """One line for each text: label, probability, text; `-` reads lines from standard input."""
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"w x y z\n")))
    main(SST2Options(weights=str(run / "model"), predict=("a b c d", "-")))
    lines = [line.split(maxsplit=2) for line in capsys.readouterr().out.splitlines()]
    assert [(label, text) for label, _, text in lines] == [
        ("positive", "a b c d"),
        ("negative", "w x y z"),
    ]
    assert all(0.5 <= float(probability) <= 1 for _, probability, _ in lines)


def test_predictions_need_a_classifier(tmp_path):
    """A pretrained model would guess, and say so with a probability."""
    tokenizer = data.train_tokenizer(["abc"], 40)
    sizes = {"vocab_size": tokenizer.get_vocab_size(), "max_seq_length": 16}
    BertPretrainModel(BertConfig.named("tiny", **sizes), 0).save_pretrained(tmp_path, tokenizer)
    with pytest.raises(
        ValueError, match=r"a run on SST-2; .* has no classifier\.weight, classifier\.bias"
    ):
        main(SST2Options(weights=str(tmp_path), predict=("a",)))


def test_a_wrong_test_split_is_noticed_before_the_training(tmp_path):
    """Not after it, with the weights unsaved."""
    dataset = reviews(tmp_path, train=3, validation=3)
    options = SST2Options(out=str(tmp_path / "run"), dataset=dataset, test_dataset="no/such/place")
    with pytest.raises(ValueError, match="no/such/place does not exist"):
        main(options)
    assert not (tmp_path / "run/metrics.jsonl").exists()


def test_predictions_need_weights():
    with pytest.raises(ValueError, match="--predict needs --weights"):
        main(SST2Options(predict=("a",)))


def test_evaluation_is_a_mean_over_sentences_not_batches():
    """Three sentences in batches of two and one."""

    class Model(torch.nn.Module):
        def forward(self, input_ids):
            return torch.stack([torch.zeros(len(input_ids)), input_ids[:, 0] - 1.0], dim=1)

    batches = [
        {"input_ids": torch.tensor([[3], [0]]), "labels": torch.tensor([1, 1])},
        {"input_ids": torch.tensor([[0]]), "labels": torch.tensor([0])},
    ]
    metrics = evaluate(Model(), batches, torch.device("cpu"))
    assert metrics["accuracy"] == pytest.approx(2 / 3)
    losses = [torch.nn.functional.softplus(torch.tensor(x)) for x in (-2.0, 1.0, -1.0)]
    assert metrics["loss"] == pytest.approx(float(sum(losses)) / 3)


def test_another_tokenizer_than_that_of_the_weights_is_refused(tmp_path):
    """It would run, and be wrong by points: every id would mean another word."""
    tokenizers = [data.train_tokenizer([text], 40) for text in ("abc abc", "abd abd")]
    sizes = {"vocab_size": tokenizers[0].get_vocab_size(), "max_seq_length": 16}
    BertPretrainModel(BertConfig.named("tiny", **sizes), 0).save_pretrained(tmp_path, tokenizers[0])
    tokenizers[1].save(str(tmp_path / "other.json"))
    tokenizers[0].save(str(tmp_path / "same.json"))
    options = {"weights": str(tmp_path), "tokenizer": str(tmp_path / "other.json")}
    with pytest.raises(ValueError, match="is not the one .* was trained with"):
        train_sst2.make_tokenizer(SST2Options(**options))
    options["tokenizer"] = str(tmp_path / "same.json")
    assert (
        train_sst2.make_tokenizer(SST2Options(**options)).get_vocab() == tokenizers[0].get_vocab()
    )
    tokenizers[1].save(str(tmp_path / "tokenizer.json"))  # exchanged in the folder itself
    for named in (None, str(tmp_path / "other.json"), str(tmp_path / "same.json")):
        with pytest.raises(ValueError, match="is not the one .* was trained with"):
            train_sst2.make_tokenizer(SST2Options(weights=str(tmp_path), tokenizer=named))


def test_sentences_longer_than_the_weights_allow_are_refused(tmp_path):
    tokenizer = data.train_tokenizer(["abc"], 40)
    sizes = {"vocab_size": tokenizer.get_vocab_size(), "max_seq_length": 16}
    SST2BertModel(BertConfig.named("tiny", **sizes), 0).save_pretrained(tmp_path, tokenizer)
    options = SST2Options(weights=str(tmp_path), max_seq_length=17)
    with pytest.raises(ValueError, match="--max-seq-length 17: the weights have 16 positions"):
        train_sst2.make_model(options, tokenizer)
