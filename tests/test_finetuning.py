"""Fine-tuning on SST-2: a run and its evaluation, what it takes from pretrained weights, and
predictions with its model.
"""

import contextlib
import copy
import io
import json
import math
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import read_lines
from safetensors.torch import load_file, save_file
from strategies import (
    CPU,
    PADDING,
    SMALL,
    TINY,
    VOCABULARY,
    dropouts_of,
    publish,
    review_batches,
    small_tokenizer,
    write_reviews,
    write_rows,
)

import data
import train_sst2
from bert import BertConfig, BertPretrainModel, SST2BertModel
from train_sst2 import SST2Batches, SST2Options, best_epoch, evaluate, main, predict


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A small run has two learning rates, two seeds and a test split."""
    folder = tmp_path_factory.mktemp("sst2")
    dataset = write_reviews(folder / "reviews", train=300, validation=60, test=60)
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


# ---- A run --------------------------------------------------------------------------------------


def test_a_run_learns_and_evaluates_the_test_split_once(run):
    """Only the best weights are evaluated on the test split, however many runs there were."""
    validation, test = read_lines(run, "validation"), read_lines(run, "test")
    identities = [validation[name] for name in ("learning_rate", "seed", "epoch")]
    assert len(set(zip(*identities, strict=True))) == len(validation["accuracy"]) == 2 * 2 * 2
    assert max(validation["accuracy"]) == 1.0
    assert test["accuracy"] == [1.0]


def test_a_run_leaves_its_options(run):
    config = json.loads((run / "config.json").read_text())
    assert (config["learning_rate"], config["seeds"], config["epochs"]) == ([1e-3, 1e-5], 2, 2)


def test_each_split_is_read_from_its_own_data_set_and_its_accuracy_is_printed(
    tmp_path, monkeypatch, capsys
):
    """--dataset-name belongs to --dataset. Without --test-dataset, only the sample has a test
    split."""
    asked, get_reviews = [], train_sst2.get_reviews

    def noted(path, split, name=None):
        asked.append((Path(path).name, split, name))
        return get_reviews(path, split)

    monkeypatch.setattr(train_sst2, "get_reviews", noted)
    monkeypatch.setattr(train_sst2, "fine_tune", lambda model, *_: (model, 0.5))
    dataset = write_reviews(tmp_path / "reviews", train=9, validation=9)
    other = write_reviews(tmp_path / "other", test=9)
    how = {"dataset": dataset, "dataset_name": "sst2", "vocab_size": 60, "device": "cpu"}

    main(SST2Options(out=str(tmp_path / "with"), test_dataset=other, **how))
    # The training split is read twice: for the vocabulary, and to be trained on.
    own = [("reviews", split, "sst2") for split in ("train", "train", "validation")]
    assert asked == [*own, ("other", "test", None)]
    printed = capsys.readouterr().out
    assert "validation accuracy 0.5000" in printed
    (accuracy,) = read_lines(tmp_path / "with", "test")["accuracy"]
    assert f"test accuracy {accuracy:.4f}" in printed

    main(SST2Options(out=str(tmp_path / "without"), **how))
    assert asked[4:] == own
    main(SST2Options(out=str(tmp_path / "sample"), device="cpu"))
    assert asked[-1] == ("sample", "test", None)


def test_accuracy_is_that_of_the_validation_split(tmp_path):
    """There the labels are the other way round, so that what was learned is wrong."""
    dataset = write_reviews(tmp_path / "reviews", train=300, validation=60)
    lines = Path(dataset, "validation.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    turned = [{**row, "label": 1 - row["label"]} for row in rows]
    write_rows(Path(dataset, "validation.jsonl"), turned)
    options = SST2Options(
        out=str(tmp_path / "run"), dataset=dataset, epochs=2, vocab_size=60, max_seq_length=16,
        learning_rate=(1e-3,), device="cpu",
    )  # fmt: skip
    main(options)
    assert read_lines(tmp_path / "run", "validation")["accuracy"][-1] < 0.1


def test_every_seed_starts_from_weights_of_its_own_and_the_same_at_every_rate(
    tmp_path, monkeypatch
):
    """The spread is the standard deviation of a sample of seeds."""
    started = {}
    accuracies = iter([0.5, 0.7, 0.5, 0.5])

    def fine_tune(model, training, validation, epochs, rate, seed, *_):
        started[rate, seed] = model.classifier.weight.detach().clone()
        return model, next(accuracies)

    monkeypatch.setattr(train_sst2, "fine_tune", fine_tune)
    dataset = write_reviews(tmp_path / "reviews", train=9, validation=9)
    options = SST2Options(
        out=str(tmp_path / "run"), dataset=dataset, vocab_size=60, seed=3, seeds=2,
        learning_rate=(1e-3, 1e-4), device="cpu",
    )  # fmt: skip
    with contextlib.redirect_stdout(io.StringIO()) as output:
        main(options)
    assert {seed for _, seed in started} == {3, 4}
    assert not torch.equal(started[1e-3, 3], started[1e-3, 4])
    assert torch.equal(started[1e-3, 3], started[1e-4, 3])
    printed = output.getvalue()
    assert "0.6000 ± 0.1414" in printed
    assert "0.5000 ± 0.0000" in printed


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


def test_the_model_of_the_best_epoch_is_returned(tmp_path, monkeypatch):
    accuracies, models = iter([0.5, 0.9, 0.7]), []
    validation = review_batches([3], 2, None)

    def scripted(model, batches, *_):
        assert batches is validation
        models.append(copy.deepcopy(model.state_dict()))
        return {"loss": 1.0, "accuracy": next(accuracies)}

    monkeypatch.setattr(train_sst2, "evaluate", scripted)
    batches = review_batches([3, 4, 5], 2, 0)
    model, accuracy = tune(tmp_path, batches, epochs=3, validation=validation)
    assert accuracy == 0.9
    kept = model.state_dict()["classifier.weight"]
    same = [torch.equal(kept, found["classifier.weight"]) for found in models]
    assert same == [False, True, False]


def test_every_epoch_and_every_seed_have_an_order_of_their_own(tmp_path, monkeypatch):
    seen = []
    forward = train_sst2.forward

    def noted(model, input_ids, precision):
        if model.training:
            seen[-1].append(tuple(input_ids[:, 0].tolist()))
        return forward(model, input_ids, precision)

    monkeypatch.setattr(train_sst2, "forward", noted)
    for seed in (0, 1, 0):
        seen.append([])
        tune(tmp_path / str(len(seen)), review_batches([3] * 12, 4, 7), seed=seed, epochs=2)
    first, other, again = seen
    assert len(first) == 6
    assert first[:3] != first[3:]
    assert first != other
    assert first == again


def test_every_step_and_every_seed_have_a_dropout_mask_of_their_own(tmp_path):
    """At a learning rate of 0 the loss of one sentence moves with the mask alone."""
    losses = []
    for seed, dropout in ((0, 0.5), (1, 0.5), (0, 0.5), (0, 0.0)):
        out = tmp_path / str(len(losses))
        tune(out, review_batches([6], 1, 0), rate=0.0, seed=seed, dropout=dropout)
        losses.append(read_lines(out, "train")["loss"])
    first, other, again, without = losses
    assert len(set(first)) == 5
    assert not set(first) & set(other)
    assert first == again
    assert len(set(without)) == 1


def test_the_learning_rate_rises_for_a_tenth_of_the_steps_and_falls_to_0(tmp_path, monkeypatch):
    rates, update = [], train_sst2.update

    def noted(model, optimizer, rate):
        rates.append(rate)
        return update(model, optimizer, rate)

    monkeypatch.setattr(train_sst2, "update", noted)
    for epochs, steps in ((4, 20), (5, 25)):
        rates.clear()
        tune(tmp_path, review_batches([3] * 10, 2, 0), rate=1e-3, epochs=epochs)
        rising = [0.5e-3, 1e-3]
        falling = [1e-3 * (steps - step) / (steps - 2) for step in range(2, steps)]
        assert rates == pytest.approx(rising + falling)


def test_lines_count_updates_and_the_bar_reaches_its_end(tmp_path, monkeypatch):
    """A model of 10 steps has a training line after every second, and an evaluation per epoch."""
    bars, progress_bar = [], train_sst2.progress_bar

    def noted(*arguments, **more):
        bars.append(progress_bar(*arguments, **more))
        return bars[-1]

    monkeypatch.setattr(train_sst2, "progress_bar", noted)
    tune(tmp_path, review_batches([3] * 10, 2, 0), epochs=2, log_every=2)
    train, validation = (read_lines(tmp_path, split) for split in ("train", "validation"))
    assert train["step"] == [2, 4, 6, 8, 10]
    assert (train["learning_rate"], train["seed"]) == ([1e-3] * 5, [0] * 5)
    assert (validation["step"], validation["epoch"]) == ([5, 10], [1, 2])
    assert 0 <= validation["seconds"][0] <= validation["seconds"][1] < 60
    assert (bars[0].n, bars[0].total) == (10, 10)


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


def test_fine_tuning_goes_on_where_nothing_can_be_shown(tmp_path, monkeypatch):
    """The reader of a pipe may have ended."""

    class Broken(io.StringIO):
        def write(self, text):
            raise BrokenPipeError

    dataset = write_reviews(tmp_path / "reviews", train=9, validation=9, test=9)
    options = SST2Options(
        out=str(tmp_path / "run"), dataset=dataset, test_dataset=dataset, vocab_size=60, epochs=1,
        device="cpu",
    )  # fmt: skip
    fine_tune = train_sst2.fine_tune

    def reader_ends(*arguments):
        monkeypatch.setattr(sys, "stdout", Broken())
        return fine_tune(*arguments)

    monkeypatch.setattr(train_sst2, "fine_tune", reader_ends)
    main(options)
    assert len(read_lines(tmp_path / "run", "test")["accuracy"]) == 1


def test_an_evaluation_has_no_dropout_and_training_continues_with_it():
    model = SST2BertModel(replace(SMALL, dropout=0.5, attention_dropout=0.5), PADDING).train()
    batches = review_batches([3, 4, 5], 2, None)
    found = [evaluate(model, batches, CPU) for _ in range(2)]
    assert found[0] == found[1]
    assert model.training


def test_the_epoch_with_the_highest_accuracy_is_kept():
    """It is neither the last epoch nor the lowest one."""
    assert best_epoch([0.5, 0.9, 0.7]) == 1
    assert best_epoch([0.9, 0.9, 0.1]) == 0


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


def test_a_wrong_test_split_is_noticed_before_the_training(tmp_path):
    """After it, the weights would be lost."""
    dataset = write_reviews(tmp_path / "reviews", train=3, validation=3)
    options = SST2Options(out=str(tmp_path / "run"), dataset=dataset, test_dataset="no/such/place")
    with pytest.raises(ValueError, match="no/such/place"):
        main(options)
    assert not (tmp_path / "run/metrics.jsonl").exists()


@pytest.mark.parametrize("log_every", [1, 1000])
def test_fine_tuning_stops_at_a_gradient_that_is_not_finite(log_every, tmp_path, monkeypatch):
    """It stops at the next log line or at the end of the epoch, and writes no line and no model."""
    dataset = write_reviews(tmp_path / "reviews", train=40, validation=10)
    update = train_sst2.update

    def poisoned(model, optimizer, rate):
        next(model.parameters()).grad.fill_(math.nan)
        return update(model, optimizer, rate)

    monkeypatch.setattr(train_sst2, "update", poisoned)
    out = tmp_path / "run"
    options = SST2Options(
        out=str(out), dataset=dataset, vocab_size=60, epochs=1, device="cpu", log_every=log_every
    )
    with pytest.raises(ValueError, match="--learning-rate"):
        main(options)
    assert not (out / "model").exists()
    assert not (out / "metrics.jsonl").exists()


def test_a_learning_rate_that_diverges_leaves_the_best_model_before_it(tmp_path):
    """It was kept in memory until the last one had ended."""
    dataset = write_reviews(tmp_path / "reviews", train=40, validation=10)
    told = SST2Options(
        out=str(tmp_path / "run"), dataset=dataset, vocab_size=60, epochs=2,
        learning_rate=(1e-3, 1e30),
        seeds=2, device="cpu",
    )  # fmt: skip
    with pytest.raises(ValueError, match="not finite"):
        main(told)
    good = replace(told, out=str(tmp_path / "good"), learning_rate=(1e-3,))
    main(good)
    found, expected = (load_file(Path(o.out) / "model/model.safetensors") for o in (told, good))
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert not (tmp_path / "run/model.unfinished").exists()


def test_of_equally_good_models_the_first_is_kept_and_tested(tmp_path, monkeypatch):
    models, tested, evaluate_ = [], [], train_sst2.evaluate

    def fine_tune(model, *_):
        models.append(model)
        return model, 0.5

    def noted(model, batches, device, precision):
        tested.append((model, device, precision))
        return evaluate_(model, batches, device, precision)

    monkeypatch.setattr(train_sst2, "fine_tune", fine_tune)
    monkeypatch.setattr(train_sst2, "evaluate", noted)
    dataset = write_reviews(tmp_path / "reviews", train=9, validation=9, test=9)
    options = SST2Options(
        out=str(tmp_path / "run"), dataset=dataset, test_dataset=dataset, vocab_size=60, seeds=2,
        device="cpu", precision="bfloat16",
    )  # fmt: skip
    main(options)
    assert tested == [(models[0], CPU, "bfloat16")]
    saved = SST2BertModel.from_pretrained(tmp_path / "run/model")
    assert torch.equal(saved.classifier.weight, models[0].classifier.weight)


def test_the_test_split_is_scored_before_anything_is_drawn(tmp_path, monkeypatch):
    dataset = write_reviews(tmp_path / "reviews", train=9, validation=9, test=9)

    def fails(_):
        raise RuntimeError("no picture")

    monkeypatch.setattr(train_sst2, "draw_curves", fails)
    out = tmp_path / "run"
    told = SST2Options(out=str(out), dataset=dataset, test_dataset=dataset, vocab_size=60)
    with pytest.raises(RuntimeError, match="no picture"):
        main(replace(told, epochs=1, device="cpu"))
    assert len(read_lines(out, "test")["accuracy"]) == 1


def test_fine_tuning_never_keeps_a_weight_that_is_not_finite(tmp_path, monkeypatch):
    """The last step of a run may spoil a weight, and its gradient was finite."""
    update = train_sst2.update

    def spoiled(model, optimizer, rate):
        norm = update(model, optimizer, rate)
        model.classifier.bias.data[0] = math.inf
        return norm

    monkeypatch.setattr(train_sst2, "update", spoiled)
    dataset = write_reviews(tmp_path / "reviews", train=9, validation=9)
    out = tmp_path / "run"
    with pytest.raises(ValueError, match="finite"):
        main(SST2Options(out=str(out), dataset=dataset, vocab_size=60, epochs=1, device="cpu"))
    assert not (out / "model").exists()


def test_training_obeys_the_device(tmp_path, monkeypatch):
    dataset = write_reviews(tmp_path / "reviews", train=9, validation=9)
    options = SST2Options(out=str(tmp_path / "run"), dataset=dataset, vocab_size=60, device="cuda")
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="--device cuda"):
            main(options)

    def tell(model, *_):
        raise ValueError(f"on {model.classifier.weight.device.type}")

    monkeypatch.setattr(train_sst2, "choose_device", lambda name: torch.device("meta"))
    monkeypatch.setattr(train_sst2, "fine_tune", tell)
    with pytest.raises(ValueError, match="on meta"):
        main(options)


def test_ids_and_labels_of_every_batch_are_moved(tmp_path, monkeypatch):
    """In training without waiting for the GPU. Two batches are trained on, and then evaluated."""
    moved, waits, to = [], [], torch.Tensor.to

    def noted(tensor, *where, non_blocking=False):
        if tensor.dtype == torch.int64:  # ids and labels
            moved.append(where)
            waits.append(not non_blocking)
        return to(tensor, *where, non_blocking=non_blocking)

    monkeypatch.setattr(torch.Tensor, "to", noted)
    tune(tmp_path, review_batches([3] * 4, 2, 0), epochs=1)
    assert moved == [(CPU,)] * 8
    assert waits == [False] * 4 + [True] * 4


def test_an_evaluation_moves_ids_and_labels_to_its_device(monkeypatch):
    moved = []

    def noted(tensor, *where, **how):
        if tensor.dtype == torch.int64:
            moved.append(where)
        return tensor

    monkeypatch.setattr(torch.Tensor, "to", noted)
    model = SST2BertModel(SMALL, PADDING)
    evaluate(model, review_batches([3] * 4, 2, None), torch.device("meta"))
    assert moved == [(torch.device("meta"),)] * 4


# ---- From pretrained weights --------------------------------------------------------------------


def test_a_fine_tuned_model_has_the_labels_of_sst_2_whatever_the_weights_had(tmp_path, monkeypatch):
    """Class 0 of somebody's model may be the positive one; after fine-tuning it is the negative."""
    other = SST2BertModel(TINY)
    other.label_names = ["good", "bad"]
    other.save_pretrained(tmp_path / "other", small_tokenizer())
    monkeypatch.setattr(train_sst2, "fine_tune", lambda model, *_: (model, 0.5))
    dataset = write_reviews(tmp_path / "reviews", train=9, validation=9)
    out = tmp_path / "run"
    weights = str(tmp_path / "other")
    main(SST2Options(out=str(out), dataset=dataset, weights=weights, device="cpu"))
    assert SST2BertModel.from_pretrained(out / "model").label_names == ["negative", "positive"]


def test_fine_tuning_has_dropout_whatever_the_weights_had(tmp_path):
    """A model that was pretrained without dropout would silently be fine-tuned without it."""
    config = BertConfig.named(
        "tiny", vocab_size=small_tokenizer().get_vocab_size(), dropout=0.0, attention_dropout=0.0
    )
    BertPretrainModel(config, 0).save_pretrained(tmp_path, small_tokenizer())

    def model_of(options: SST2Options) -> SST2BertModel:
        return train_sst2.make_model(SST2BertModel, options, small_tokenizer(), 16)

    fine_tuned = SST2Options(weights=str(tmp_path))
    assert dropouts_of(model_of(fine_tuned)) == {0.1}
    told = replace(fine_tuned, dropout=0.0)
    assert dropouts_of(model_of(told)) == {0.0}
    scratch = SST2Options(dropout=0.2)
    assert dropouts_of(model_of(scratch)) == {0.2}


def test_options_and_weights_decide_size_length_tokenizer_and_padding(tmp_path, monkeypatch):
    """In this vocabulary [PAD] is the last token."""
    ids = {token: i for i, token in enumerate(reversed(VOCABULARY))}
    data.wordpiece(ids).save(str(tmp_path / "tokenizer.json"))
    seen = []

    def noted(model, training, *_):
        seen.append((model, training))
        return model, 0.5

    monkeypatch.setattr(train_sst2, "fine_tune", noted)
    how = {"dataset": write_reviews(tmp_path / "reviews", train=9, validation=9), "device": "cpu"}
    tokenizer = str(tmp_path / "tokenizer.json")
    scratch = tmp_path / "scratch"
    main(SST2Options(out=str(scratch), tokenizer=tokenizer, size="mini", **how))
    weights = str(scratch / "model")
    main(SST2Options(out=str(tmp_path / "cut"), weights=weights, max_seq_length=4, **how))
    (model, whole), (loaded, cut) = seen
    assert model.config.max_seq_length == 128  # unless --max-seq-length says otherwise
    assert model.config.d_model == loaded.config.d_model == 256
    assert model.config.vocab_size == len(ids)
    assert whole.padding_idx == cut.padding_idx == model.padding_idx == ids["[PAD]"]
    assert torch.equal(loaded.bert.embeddings.token.weight, model.bert.embeddings.token.weight)
    assert {len(row) for row in whole.rows} == {7}
    assert {len(row) for row in cut.rows} == {4}


# ---- Predictions --------------------------------------------------------------------------------


def test_the_saved_model_predicts_with_its_own_tokenizer(run, capsys):
    """It prints a line for each text: label, probability, text."""
    main(SST2Options(weights=str(run / "model"), predict=("a b c d", "w x y X  ")))
    lines = [line.split("  ", maxsplit=2) for line in capsys.readouterr().out.splitlines()]
    assert [(label, text) for label, _, text in lines] == [
        ("positive", "a b c d"),
        ("negative", "w x y X  "),
    ]
    assert all(0.5 <= float(probability) <= 1 for _, probability, _ in lines)


@pytest.mark.parametrize(
    ("published", "shown"),
    [
        ({"0": "POSITIVE", "1": "NEGATIVE"}, ["POSITIVE", "NEGATIVE"]),
        ({"0": "LABEL_0", "1": "LABEL_1"}, ["negative", "positive"]),
        ({}, ["negative", "positive"]),
        (None, ["negative", "positive"]),
    ],
)
def test_predictions_use_the_names_of_the_classes_in_a_published_config(
    published, shown, tmp_path, capsys
):
    """Class 0 of somebody else's model may be the positive one."""
    publish(tmp_path, TINY, SST2BertModel)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "id2label": published}))
    tensors = load_file(tmp_path / "model.safetensors")
    for i, name in enumerate(shown):
        tensors["classifier.bias"] = 9.0 * torch.nn.functional.one_hot(torch.tensor(i), 2)
        save_file(tensors, tmp_path / "model.safetensors")
        predict(SST2Options(weights=str(tmp_path), predict=("a b",), device="cpu"))
        assert capsys.readouterr().out.startswith(f"{name}  ")


@pytest.mark.filterwarnings("ignore")
def test_predictions_need_a_classifier_even_if_no_warning_is_shown(tmp_path):
    """With `python -W ignore` a random classifier answered."""
    options = SST2Options(weights=str(publish(tmp_path, TINY)), predict=("a",))
    with pytest.raises(ValueError, match=r"classifier\.weight, classifier\.bias"):
        predict(options)


def test_a_text_is_cut_to_the_length_that_is_asked_for(tmp_path, monkeypatch, capsys):
    """--max-seq-length was checked, and then not obeyed."""
    lengths, forward = [], train_sst2.forward

    def noted(model, input_ids, precision):
        lengths.append(input_ids.shape[1])
        return forward(model, input_ids, precision)

    monkeypatch.setattr(train_sst2, "forward", noted)
    weights = str(publish(tmp_path, TINY, SST2BertModel))
    for longest in (4, None):
        predict(
            SST2Options(weights=weights, predict=("a b c d",), max_seq_length=longest, device="cpu")
        )
    assert lengths == [4, 6]
    assert capsys.readouterr().out.count("a b c d") == 2


def test_predictions_obey_the_device(tmp_path, monkeypatch):
    weights = str(publish(tmp_path, TINY, SST2BertModel))
    options = SST2Options(weights=weights, predict=("a",), device="cuda")
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="--device cuda"):
            predict(options)
    monkeypatch.setattr(train_sst2, "choose_device", lambda name: torch.device("meta"))
    with pytest.raises((RuntimeError, NotImplementedError), match="meta"):  # it has gone there
        predict(options)
