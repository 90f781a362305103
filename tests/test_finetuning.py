"""Fine-tuning on SST-2: what is read, batches, one model, a run of several, and predictions."""

import copy
import itertools
import json
import math
from dataclasses import replace
from pathlib import Path
from unittest import mock

import datasets
import numpy as np
import pytest
import torch
from helpers import contents, make_review_options, metrics_of, read_lines
from hypothesis import given
from hypothesis import strategies as st
from strategies import (
    CLS,
    CPU,
    MASK,
    PADDING,
    SEP,
    SMALL,
    TINY,
    VOCABULARY,
    change_config,
    change_tensors,
    publish,
    review_batches,
    seeds,
    small_tokenizer,
    write_reviews,
    write_rows,
)

import data
import train_pretrain
import train_sst2
from bert import SST2BertModel
from train_sst2 import (
    SST2Batches,
    SST2Options,
    encode_sentences,
    evaluate,
    get_reviews,
    main,
    predict,
)

# ---- What is read -------------------------------------------------------------------------------


def test_sentences_are_cls_sentence_sep_cut_to_the_longest_allowed(tmp_path):
    """A [MASK] that is written in a review is text, not a special token."""
    path = tmp_path / "train.jsonl"
    rows = [("a bc.", 1), ("[MASK] " * 30, 0)]
    write_rows(path, [{"sentence": text, "label": label} for text, label in rows])
    texts, labels = get_reviews(str(path), "train")
    assert labels == [1, 0]
    short, long = encode_sentences(small_tokenizer(), texts, 9)
    encode = small_tokenizer().token_to_id
    assert short == [CLS, encode("a"), encode("b"), encode("##c"), encode("."), SEP]
    assert (len(long), long[0], long[-1]) == (9, CLS, SEP)
    assert MASK not in long


@pytest.mark.parametrize("label", [-1, 2, 1.0, True, "1", None])
def test_labels_are_the_integers_0_and_1(label, tmp_path):
    path = write_rows(tmp_path / "train.jsonl", [{"sentence": "a", "label": label}] * 2)
    with pytest.raises(ValueError, match=r"train, row 0: .* 0 or 1"):
        get_reviews(path, "train")


def test_a_data_set_of_the_hub_may_have_configurations(monkeypatch):
    rows = datasets.Dataset.from_dict({"sentence": ["a"], "label": [1]})
    asked = mock.Mock(return_value=rows)
    monkeypatch.setattr(data, "get_dataset", asked)
    assert get_reviews("glue", "validation", "sst2") == (["a"], [1])
    asked.assert_called_once_with("glue", "sst2", "validation")


def test_a_split_without_sentences_is_rejected(monkeypatch):
    empty = datasets.Dataset.from_dict({"sentence": [], "label": []})
    monkeypatch.setattr(data, "get_dataset", lambda *_: empty)
    with pytest.raises(ValueError, match="glue, validation: there are no sentences"):
        get_reviews("glue", "validation")


def test_sentences_are_text_in_a_column_sentence_or_text(tmp_path):
    path = write_rows(tmp_path / "train.jsonl", [{"text": "a b", "label": 1}])
    assert get_reviews(path, "train") == (["a b"], [1])
    write_rows(tmp_path / "train.jsonl", [{"sentence": None, "label": 1}])
    with pytest.raises(ValueError, match="train, row 0: sentence"):
        get_reviews(path, "train")
    write_rows(tmp_path / "train.jsonl", [{"review": "a", "label": 1}])
    with pytest.raises(ValueError, match="sentence .*label.*review"):
        get_reviews(path, "train")


# ---- Batches ------------------------------------------------------------------------------------


@given(st.lists(st.integers(1, 30), min_size=1, max_size=300), st.integers(1, 4), seeds | st.none())
def test_an_epoch_of_buckets_has_every_sentence_once(sizes, batch_size, seed):
    """Each sentence has its own label. All batches but one are full, and each is as wide as its
    longest sentence."""
    batches = review_batches(sizes, batch_size, seed)
    batches.padding_idx = 999  # not every vocabulary starts with [PAD]
    for batches.epoch in (0, 1):
        found = list(batches)
        assert len(found) == len(batches) == math.ceil(len(sizes) / batch_size)
        assert sorted(len(b["labels"]) for b in found)[1:] == [batch_size] * (len(found) - 1)
        indices = []
        for batch in found:
            own = (batch["input_ids"][:, 0] - 1).tolist()
            assert batch["labels"].tolist() == [i % 2 for i in own]
            assert batch["input_ids"].size(1) == max(sizes[i] for i in own)
            assert (batch["input_ids"] != 999).sum(dim=1).tolist() == [sizes[i] for i in own]
            indices += own
        assert sorted(indices) == list(range(len(sizes)))


def test_bucket_orders_differ_by_epoch_and_seed_and_batches_are_of_similar_length():
    sizes = np.random.default_rng(0).integers(1, 60, 5000)

    def order(seed, epoch=0):
        batches = review_batches(sizes, 32, seed)
        batches.epoch = epoch
        return [(batch["input_ids"][:, 0] - 1).tolist() for batch in batches]

    first = order(1)
    assert first == order(1)
    assert first != order(1, epoch=1)
    assert first != order(2)
    padded = sum(max(sizes[batch]) * len(batch) for batch in first)
    assert sizes.sum() / padded > 0.93
    in_order = list(itertools.chain.from_iterable(order(None)))
    assert (np.diff(sizes[in_order]) >= 0).all()
    assert in_order == sorted(range(5000), key=lambda i: (sizes[i], i))
    means = [np.mean(sizes[batch]) for batch in first]  # short and long batches are mixed
    assert abs(np.corrcoef(means[:-1], means[1:])[0, 1]) < 0.4


# ---- One model ----------------------------------------------------------------------------------


def tune(folder: Path, batches: SST2Batches, rate=1e-3, seed=0, dropout=0.1, **changes):
    """Returns what `fine_tune` returns, for a small model that is the same for every seed, and in
    evaluation mode, as loaded weights are."""
    torch.manual_seed(0)
    config = replace(SMALL, dropout=dropout, attention_dropout=dropout)
    model = SST2BertModel(config, PADDING).eval()
    arguments = {"validation": batches, "epochs": 5, "log_every": 1, **changes}
    folder.mkdir(parents=True, exist_ok=True)
    return train_sst2.fine_tune(model, batches, rate=rate, seed=seed, out=folder, **arguments)


@pytest.mark.parametrize(("accuracies", "best"), [((0.5, 0.9, 0.7), 1), ((0.9, 0.9, 0.1), 0)])
def test_the_model_of_the_best_epoch_is_returned(accuracies, best, tmp_path, monkeypatch):
    """Of two equal epochs, it is the first."""
    models = []
    validation = review_batches([3], 2, None)

    def scripted(model, batches, *_):
        assert batches is validation
        models.append(copy.deepcopy(model.state_dict()))
        return {"loss": 1.0, "accuracy": accuracies[len(models) - 1]}

    monkeypatch.setattr(train_sst2, "evaluate", scripted)
    batches = review_batches([3, 4, 5], 2, 0)
    model, accuracy = tune(tmp_path, batches, epochs=3, validation=validation)
    assert accuracy == 0.9
    kept = model.state_dict()["classifier.weight"]
    same = [torch.equal(kept, found["classifier.weight"]) for found in models]
    assert same == [epoch == best for epoch in range(3)]


@pytest.mark.parametrize(("sentences", "dropout"), [(6, 0.0), (1, 0.5), (1, 0.0)])
def test_every_epoch_of_every_seed_has_an_order_and_dropout_masks_of_its_own(
    sentences, dropout, tmp_path
):
    """At a learning rate of 0, losses move with these alone. The control has one sentence and no
    dropout."""
    epochs = []
    for run, seed in enumerate((0, 1, 0)):
        out = tmp_path / str(run)
        tune(out, review_batches([6] * sentences, 1, 7), rate=0.0, seed=seed, dropout=dropout)
        losses = read_lines(out, "train")["loss"]
        epochs += [tuple(losses[i * sentences :][:sentences]) for i in range(5)]
    assert epochs[:5] == epochs[10:]
    assert len(set(epochs)) == (1 if sentences == 1 and dropout == 0 else 10)


def test_the_learning_rate_rises_for_a_tenth_of_the_steps_and_falls_to_0(tmp_path, monkeypatch):
    for epochs, steps in ((4, 20), (5, 25)):
        update = mock.Mock(wraps=train_pretrain.update)
        monkeypatch.setattr(train_sst2, "update", update)
        tune(tmp_path, review_batches([3] * 10, 2, 0), rate=1e-3, epochs=epochs)
        rates = [rate for _, _, rate in (call.args for call in update.call_args_list)]
        rising = [0.5e-3, 1e-3]
        falling = [1e-3 * (steps - step) / (steps - 2) for step in range(2, steps)]
        assert rates == pytest.approx(rising + falling)


def test_a_training_line_has_the_loss_of_its_update(tmp_path):
    """Line 1 has the loss of the weights before any update."""
    batches = review_batches([3, 4, 5], 3, 0)
    torch.manual_seed(0)
    config = replace(SMALL, dropout=0.0, attention_dropout=0.0)
    before = evaluate(SST2BertModel(config, PADDING), batches, CPU)
    tune(tmp_path, batches, dropout=0.0, epochs=2)
    lines = read_lines(tmp_path, "train")
    assert lines["step"] == [1, 2]
    assert lines["loss"][0] == pytest.approx(before["loss"])
    assert lines["loss"][1] != lines["loss"][0]


def test_evaluation_is_a_mean_over_sentences_not_batches():
    """Three sentences come in batches of two and one."""

    class Model(torch.nn.Module):
        def forward(self, input_ids):
            return torch.stack([torch.zeros(len(input_ids)), input_ids[:, 0] - 1.0], dim=1)

    batches = [
        {"input_ids": torch.tensor([[3], [0]]), "labels": torch.tensor([1, 1])},
        {"input_ids": torch.tensor([[0]]), "labels": torch.tensor([0])},
    ]
    metrics = evaluate(Model(), batches, CPU)
    assert metrics["accuracy"] == pytest.approx(2 / 3)
    losses = [torch.nn.functional.softplus(torch.tensor(x)) for x in (-2.0, 1.0, -1.0)]
    assert metrics["loss"] == pytest.approx(float(sum(losses)) / 3)


@pytest.mark.parametrize("log_every", [1000, 1])
def test_fine_tuning_stops_at_a_weight_that_is_not_finite(log_every, options, monkeypatch):
    """It writes no line and no model."""
    update = train_sst2.update

    def poisoned(model, optimizer, rate):
        update(model, optimizer, rate)
        model.classifier.bias.data[0] = math.inf

    monkeypatch.setattr(train_sst2, "update", poisoned)
    with pytest.raises(ValueError, match="finite: .*--learning-rate"):
        main(replace(options, epochs=1, batch_size=500, log_every=log_every))
    assert not Path(options.out, "model").exists()
    assert not Path(options.out, "metrics.jsonl").exists()


# ---- A run --------------------------------------------------------------------------------------


@pytest.fixture
def options(tmp_path) -> SST2Options:
    """The options of a run without a test split."""
    return replace(make_review_options(tmp_path, train=120, validation=30), epochs=2)


def turn_labels(dataset: str, split: str) -> None:
    """Turns the labels of a split the other way round."""
    file = Path(dataset, f"{split}.jsonl")
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    write_rows(file, [{**row, "label": 1 - row["label"]} for row in rows])


@pytest.mark.slow
def test_a_run_learns_and_scores_the_best_model_on_the_test_split_once(options, tmp_path, capsys):
    """Two learning rates have two seeds each. The model that is left predicts as it was scored."""
    dataset = write_reviews(tmp_path / "reviews", train=120, validation=30, test=30)
    told = replace(options, test_dataset=dataset, learning_rate=(1e-3, 1e-6), seeds=2)
    main(told)
    validation, test = (read_lines(Path(told.out), split) for split in ("validation", "test"))
    identities = [validation[name] for name in ("learning_rate", "seed", "epoch")]
    assert len(set(zip(*identities, strict=True))) == len(validation["accuracy"]) == 2 * 2 * 2
    assert max(validation["accuracy"]) > 0.9
    (accuracy,) = test["accuracy"]
    assert f"test accuracy {accuracy:.4f}" in capsys.readouterr().out

    texts, labels = get_reviews(dataset, "test")
    main(SST2Options(weights=f"{told.out}/model", predict=tuple(texts), device="cpu"))
    predicted = [line.split("  ")[0] for line in capsys.readouterr().out.splitlines()]
    expected = [train_sst2.LABELS[label] for label in labels]
    assert np.mean(np.array(predicted) == np.array(expected)) == accuracy


def test_accuracy_is_that_of_the_validation_split(options, capsys):
    """There the labels are the other way round, so that what was learned is wrong. One seed has no
    deviation."""
    turn_labels(options.dataset, "validation")
    main(options)
    assert Path(options.out, "curves.png").exists()
    assert "±" not in capsys.readouterr().out
    config = json.loads(Path(options.out, "config.json").read_text())
    assert config["epochs"] == options.epochs
    lines = read_lines(Path(options.out), "validation")
    assert lines["accuracy"][-1] < 0.1
    per_epoch = math.ceil(120 / options.batch_size)
    assert (lines["epoch"], lines["step"]) == ([1, 2], [per_epoch, 2 * per_epoch])
    assert 0 < lines["seconds"][0] <= lines["seconds"][1] < 600


def test_the_labels_of_the_test_split_change_nothing_but_its_own_score(options, tmp_path):
    """Every byte of the model and every other line are the same when they are turned round."""
    write_reviews(tmp_path / "reviews", train=40, validation=30, test=30)
    left, scores = [], []
    for out in ("as it is", "turned"):
        told = replace(options, out=str(tmp_path / out), test_dataset=options.dataset, epochs=1)
        main(told)
        *others, test = metrics_of(Path(told.out))
        left.append((contents(Path(told.out) / "model"), others))
        scores.append(test["accuracy"])
        turn_labels(options.dataset, "test")
    assert left[0] == left[1]
    assert scores[0] == pytest.approx(1 - scores[1])


def test_each_split_is_read_from_its_own_data_set(options, tmp_path, monkeypatch):
    """--dataset-name belongs to --dataset. Without --test-dataset, only the sample is tested on."""
    asked = mock.Mock(return_value=(["a b"], [1]))
    monkeypatch.setattr(train_sst2, "get_reviews", asked)
    monkeypatch.setattr(train_sst2, "fine_tune", lambda model, *_: (model, 0.5))
    told = replace(options, dataset_name="sst2", tokenizer=None, vocab_size=60)
    main(replace(told, test_dataset="other"))
    main(replace(told, out=str(tmp_path / "without")))
    splits = ("train", "train", "validation")  # the first one for the vocabulary
    own = [mock.call(told.dataset, split, "sst2") for split in splits]
    assert asked.call_args_list == [*own, mock.call("other", "test", None), *own]
    asked.reset_mock()
    main(replace(options, dataset="sample", out=str(tmp_path / "sample")))
    of_sample = [mock.call("sample", split, None) for split in ("train", "validation", "test")]
    assert asked.call_args_list == of_sample


def test_every_seed_starts_from_weights_of_its_own_and_the_best_model_of_all_rates_is_kept(
    options, monkeypatch, capsys
):
    """A seed starts from the same weights at every rate; their spread is the standard deviation of
    a sample. Of two models that are equally good, the first is kept: its bias is its number."""
    started = {}
    accuracies = iter([0.5, 0.7, 0.6, 0.7])

    def fine_tune(model, training, validation, epochs, rate, seed, *_):
        started[rate, seed] = model.classifier.weight.detach().clone()
        torch.nn.init.constant_(model.classifier.bias, len(started))
        return model, next(accuracies)

    monkeypatch.setattr(train_sst2, "fine_tune", fine_tune)
    main(replace(options, seed=3, seeds=2, learning_rate=(1e-3, 1e-4)))
    assert {seed for _, seed in started} == {3, 4}
    assert not torch.equal(started[1e-3, 3], started[1e-3, 4])
    assert torch.equal(started[1e-3, 3], started[1e-4, 3])
    printed = capsys.readouterr().out
    assert "0.6000 ± 0.1414" in printed
    assert "0.6500 ± 0.0707" in printed
    left = SST2BertModel.from_pretrained(f"{options.out}/model")
    assert left.classifier.bias.tolist() == [2, 2]


# ---- From pretrained weights --------------------------------------------------------------------


def test_options_and_weights_decide_size_length_tokenizer_and_padding(tmp_path, monkeypatch):
    """In this vocabulary, [PAD] is the last token. The saved labels are SST-2's, whatever the
    weights had: class 0 of someone else's model may be the positive one."""
    ids = {token: i for i, token in enumerate(reversed(VOCABULARY))}
    data.wordpiece(ids).save(str(tmp_path / "tokenizer.json"))
    fine_tune = mock.Mock(side_effect=lambda model, *_: (model, 0.5))
    monkeypatch.setattr(train_sst2, "fine_tune", fine_tune)
    how = {"dataset": write_reviews(tmp_path / "reviews", train=9, validation=9), "device": "cpu"}
    tokenizer = str(tmp_path / "tokenizer.json")
    scratch = tmp_path / "scratch"
    main(SST2Options(out=str(scratch), tokenizer=tokenizer, size="mini", **how))
    weights = str(scratch / "model")
    change_config(scratch / "model", id2label={"0": "good", "1": "bad"})
    main(SST2Options(out=str(tmp_path / "cut"), weights=weights, max_seq_length=4, **how))
    left = SST2BertModel.from_pretrained(tmp_path / "cut/model")
    assert left.label_names == ["negative", "positive"]
    (model, whole), (loaded, cut) = (call.args[:2] for call in fine_tune.call_args_list)
    assert model.config.max_seq_length == 128  # unless --max-seq-length says otherwise
    assert model.config.d_model == loaded.config.d_model == 256
    assert model.config.vocab_size == len(ids)
    assert whole.padding_idx == cut.padding_idx == model.padding_idx == ids["[PAD]"]
    assert torch.equal(loaded.bert.embeddings.token.weight, model.bert.embeddings.token.weight)
    assert {len(row) for row in whole.rows} == {7}
    assert {len(row) for row in cut.rows} == {4}


# ---- Predictions --------------------------------------------------------------------------------


def test_a_prediction_has_the_softmax_of_the_logits_and_no_dropout(tmp_path, capsys, monkeypatch):
    """It prints a line for each text: label, probability, text. The probability is computed here by
    hand. A longer text is cut to --max-seq-length, and no gradient is computed."""
    weights = str(publish(tmp_path, replace(TINY, initializer_range=0.5), SST2BertModel))
    told = SST2Options(weights=weights, dropout=0.5, device="cpu", precision="float32")
    told = replace(told, predict=("a b c d", "w x X  "))
    seen, forward = [], train_sst2.forward

    def noted(model, input_ids, precision):
        logits = forward(model, input_ids, precision)
        seen.append((tuple(input_ids.shape), model.training, logits.requires_grad))
        return logits

    monkeypatch.setattr(train_sst2, "forward", noted)
    main(replace(told, max_seq_length=4))
    lines = capsys.readouterr().out.splitlines()
    assert seen == [((1, 4), False, False)] * 2

    model = SST2BertModel.from_pretrained(weights).eval()
    for line, text in zip(lines, told.predict, strict=True):
        ids = [CLS, *small_tokenizer().encode(text, add_special_tokens=False).ids[:2], SEP]
        negative, positive = model(torch.tensor([ids]))[0].tolist()
        label, logit = max(("negative", negative), ("positive", positive), key=lambda pair: pair[1])
        probability = math.exp(logit) / (math.exp(negative) + math.exp(positive))
        assert line == f"{label}  {probability:.3f}  {text}"


@pytest.mark.parametrize(
    ("published", "of_class_0"),
    [
        ({"0": "POSITIVE", "1": "NEGATIVE"}, "POSITIVE"),
        ({"0": "LABEL_0", "1": "LABEL_1"}, "negative"),
        (None, "negative"),
    ],
)
def test_predictions_use_the_names_of_the_classes_in_a_published_config(
    published, of_class_0, tmp_path, capsys
):
    """Class 0 of somebody else's model may be the positive one. A text that is longer than the
    position table is cut."""
    publish(tmp_path, TINY, SST2BertModel)
    change_config(tmp_path, id2label=published)
    change_tensors(tmp_path, **{"classifier.bias": torch.tensor([9.0, 0.0])})
    predict(SST2Options(weights=str(tmp_path), predict=("a " * 99,), device="cpu"))
    assert capsys.readouterr().out.startswith(f"{of_class_0}  ")


@pytest.mark.filterwarnings("ignore")
def test_predictions_need_a_classifier_even_if_no_warning_is_shown(tmp_path):
    """With `python -W ignore` a random classifier answered. The pooler is a part of it."""
    options = SST2Options(weights=str(publish(tmp_path, TINY)), predict=("a",))
    with pytest.raises(ValueError, match=r"classifier\.weight, classifier\.bias"):
        predict(options)
    change_tensors(
        publish(tmp_path, TINY, SST2BertModel), **{"bert.pooler.dense.bias": torch.ones(1)}
    )
    with pytest.raises(ValueError, match=r"pooler\.bias"):
        predict(options)
