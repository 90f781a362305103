"""Pretraining: learning rate, optimizer, loss, evaluation, and what a model has to learn."""

import copy
import functools
import itertools
import json
import math
import sys
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest
import torch
from helpers import contents, model_of, read_lines, weights_of
from strategies import (
    CPU,
    FIXED,
    LETTERS,
    PADDING,
    SMALL,
    corpus_of,
    dropouts_of,
    gradients,
    small_tokenizer,
    some_batches,
    write_texts,
)

import data
import train_pretrain
from bert import BertConfig, BertPretrainModel
from train_pretrain import (
    PretrainLosses,
    PretrainOptions,
    add_gradients,
    count,
    evaluate,
    learning_rate,
    make_optimizer,
    pretrain,
    probe,
    set_seed,
    to_device,
    update,
)

DRAW_CURVES = train_pretrain.draw_curves  # before conftest.py replaces it

# ---- Learning rate and optimizer ----------------------------------------------------------------


def test_the_learning_rate_rises_to_the_peak_and_falls_towards_zero():
    """The first step is above 0, the peak is at the end of warmup, and the last step is above 0."""
    rates = [learning_rate(step, peak=1.0, warmup=4, steps=12) for step in range(12)]
    assert rates[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert rates[4:] == [(12 - step) / 8 for step in range(4, 12)]


def test_without_warmup_the_first_step_has_the_peak():
    assert learning_rate(0, peak=0.5, warmup=0, steps=10) == 0.5


def test_by_default_the_rate_rises_for_a_tenth_of_the_steps():
    assert PretrainOptions(steps=70).warmup == 7
    assert PretrainOptions(steps=79).warmup == 7
    assert PretrainOptions(steps=70, warmup_steps=0).warmup == 0


def test_adam_has_the_numbers_of_google_code():
    for group in make_optimizer(torch.nn.Linear(2, 2)).param_groups:
        assert (group["betas"], group["eps"]) == ((0.9, 0.999), 1e-6)


def test_every_micro_batch_of_every_step_has_a_dropout_mask_of_its_own(options, monkeypatch):
    """Which mask it is depends on the seed of the run, on the step and on the micro-batch."""
    drawn, add_gradients = [], train_pretrain.add_gradients

    def noted(losses_of, batches, masked, pairs, seeds):
        assert len(seeds) == len(batches)
        for numbers in seeds:
            set_seed(*numbers)
            drawn.append(tuple(torch.rand(3).tolist()))
        return add_gradients(losses_of, batches, masked, pairs, seeds)

    monkeypatch.setattr(train_pretrain, "add_gradients", noted)
    for seed in (0, 1, 0):
        out = f"{options.out}-{len(drawn)}"
        pretrain(replace(options, out=out, accumulate=2, seed=seed))
    first, other, again = drawn[:8], drawn[8:16], drawn[16:]
    assert len(set(first + other)) == 16
    assert first == again


def test_weight_decay_spares_biases_and_norms_and_nothing_else():
    model = BertPretrainModel(FIXED, PADDING)
    decayed, spared = make_optimizer(model).param_groups
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    assert len(names) == len(decayed["params"]) + len(spared["params"])
    assert (decayed["weight_decay"], spared["weight_decay"]) == (0.01, 0.0)
    assert all(p.dim() == 2 for p in decayed["params"])
    for parameter in spared["params"]:
        assert names[id(parameter)].endswith("bias") or "norm.weight" in names[id(parameter)]


def test_a_step_without_gradient_shrinks_exactly_what_decays():
    """Decay is decoupled: weights lose lr x 0.01 of themselves, whatever Adam's state is."""
    model = BertPretrainModel(FIXED, PADDING)
    before = copy.deepcopy(model.state_dict())
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    update(model, make_optimizer(model), rate=0.5)
    for name, after in model.state_dict().items():
        decays = before[name].dim() == 2
        expected = before[name] * (1 - 0.5 * 0.01) if decays else before[name]
        torch.testing.assert_close(after, expected, rtol=1e-6, atol=0)


def test_an_update_clips_the_gradient_to_norm_one_and_clears_it():
    model = torch.nn.Linear(2, 1, bias=False)
    torch.nn.init.zeros_(model.weight)
    model.weight.grad = torch.tensor([[30.0, 40.0]])
    sgd = torch.optim.SGD(model.parameters(), lr=0.0, fused=True)
    update(model, sgd, rate=1.0)
    torch.testing.assert_close(model.weight.data, torch.tensor([[-0.6, -0.8]]))
    assert model.weight.grad is None


# ---- The loss -----------------------------------------------------------------------------------


def test_accumulated_gradients_are_those_of_the_whole_batch():
    """They agree to 1e-12 in float64; the mean of micro-batches' means, as a control, does not."""
    model = BertPretrainModel(SMALL, PADDING).double()
    batches = some_batches(3)
    width = max(batch["input_ids"].size(1) for batch in batches)
    fill = {"mlm_labels": data.IGNORED_LABEL}

    def wide(name, tensor):
        pad = (0, width - tensor.size(1)) if tensor.dim() == 2 else (0, 0)
        return torch.nn.functional.pad(tensor, pad, value=fill.get(name, 0))

    whole = {name: torch.cat([wide(name, batch[name]) for batch in batches]) for name in batches[0]}
    losses, *accumulated = gradients(model, batches)
    expected_losses, *expected = gradients(model, [whole])
    assert losses.tolist() == pytest.approx(expected_losses.tolist(), rel=1e-12)
    naive = [sum(g) / 3 for g in zip(*(gradients(model, [b])[1:] for b in batches), strict=True)]
    for one, other in zip(accumulated, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
    errors = [(a - b).abs().max() for a, b in zip(naive, expected, strict=True)]
    assert max(errors) > 1e-4


def test_an_all_isnext_batch_has_an_nsp_gradient():
    """A label of 0 is a label, not padding."""
    model = BertPretrainModel(SMALL, PADDING)
    (batch,) = some_batches(1)
    batch["nsp_labels"] = torch.zeros_like(batch["nsp_labels"])
    gradients(model, [batch])
    assert model.nsp.weight.grad.abs().max() > 0


def test_no_tensor_of_a_batch_waits_for_its_copy(monkeypatch):
    waits, to = [], torch.Tensor.to

    def noted(tensor, *where, non_blocking=False):
        waits.append(not non_blocking)
        return to(tensor, *where)

    monkeypatch.setattr(torch.Tensor, "to", noted)
    (batch,) = some_batches(1)
    waits.clear()
    train_pretrain.to_device(batch, CPU)
    assert waits == [False] * 6


def test_masked_indices_are_where_the_labels_are():
    (batch,) = some_batches(1)
    moved = to_device(batch, CPU)
    labels = batch["mlm_labels"].flatten()
    assert torch.equal(moved["mlm_targets"], labels[labels != data.IGNORED_LABEL])
    assert torch.equal(labels[moved["masked_indices"]], moved["mlm_targets"])


def test_all_tensors_of_a_batch_go_to_the_device():
    (batch,) = some_batches(1)
    moved = to_device(batch, torch.device("meta"))
    assert moved.keys() == {*batch, "masked_indices", "mlm_targets"}
    assert {tensor.device.type for tensor in moved.values()} == {"meta"}


# ---- Evaluation ---------------------------------------------------------------------------------


class Parrot(torch.nn.Module):
    """Predicts one token with certainty, and IsNext for all but the first pair of a batch."""

    def __init__(self, token: int) -> None:
        super().__init__()
        self.token = token

    def forward(self, input_ids, token_type_ids, **named):
        (masked_indices,) = named.values()
        mlm_logits = torch.zeros(len(masked_indices), SMALL.vocab_size)
        mlm_logits[:, self.token] = 5.0
        nsp_logits = torch.tensor([[0.0, 2.0]] + [[2.0, 0.0]] * (len(input_ids) - 1))
        return mlm_logits, nsp_logits


def test_metrics_are_means_over_all_masked_tokens_and_all_pairs():
    """A mean over batches would differ, since their sizes do."""
    batches = [to_device(b, CPU) for b in (*some_batches(2), *some_batches(1, 1))]
    targets = torch.cat([b["mlm_targets"] for b in batches])
    token = int(targets.mode().values)
    metrics = evaluate(Parrot(token), batches)
    right = (targets == token).double().mean().item()
    loss = math.log(math.exp(5) + SMALL.vocab_size - 1) - 5 * right
    assert 0 < right < 1
    assert metrics["mlm_accuracy"] == pytest.approx(right)
    assert metrics["mlm_loss"] == pytest.approx(loss)
    assert metrics["perplexity"] == pytest.approx(math.exp(loss))
    assert metrics["most_frequent_prediction"] == 1.0
    hits = sum(int(b["nsp_labels"][0]) + int((b["nsp_labels"][1:] == 0).sum()) for b in batches)
    assert metrics["nsp_accuracy"] == pytest.approx(hits / 7)
    wrong = math.log1p(math.exp(2))  # of the logits 0 and 2, in nats
    assert metrics["nsp_loss"] == pytest.approx(wrong - 2 * hits / 7)


def test_an_evaluation_is_the_naive_mean_over_every_masked_token_and_every_pair():
    """A loop over the tokens, with the logits of all of them, finds the same losses."""
    model = BertPretrainModel(replace(SMALL, initializer_range=0.5), PADDING).double().eval()
    batches = [*some_batches(2), *some_batches(1, 1)]
    of_tokens, of_pairs = [], []
    for batch in batches:
        with torch.no_grad():
            mlm_logits, nsp_logits = model(batch["input_ids"], batch["token_type_ids"])
        for row, labels in enumerate(batch["mlm_labels"].tolist()):
            for column, label in enumerate(labels):
                if label != data.IGNORED_LABEL:
                    of_tokens.append(-mlm_logits[row, column].log_softmax(dim=0)[label].item())
            label = batch["nsp_labels"][row]
            of_pairs.append(-nsp_logits[row].log_softmax(dim=0)[label].item())
    metrics = evaluate(model, [to_device(batch, CPU) for batch in batches])
    assert metrics["mlm_loss"] == pytest.approx(sum(of_tokens) / len(of_tokens), rel=1e-12)
    assert metrics["nsp_loss"] == pytest.approx(sum(of_pairs) / len(of_pairs), rel=1e-12)


def test_the_perplexity_of_a_huge_loss_is_infinite_and_no_error():
    """float64 ends at exp(709)."""

    class Shouting(Parrot):
        def forward(self, *inputs, **named):
            mlm_logits, nsp_logits = super().forward(*inputs, **named)
            return mlm_logits * 1e4, nsp_logits

    metrics = evaluate(Shouting(0), [to_device(b, CPU) for b in some_batches(2)])
    assert metrics["mlm_loss"] == pytest.approx(5e4)
    assert metrics["perplexity"] == math.inf


def test_a_training_step_reads_the_segments():
    """Losses change when the segments of the same tokens are exchanged."""
    model = BertPretrainModel(SMALL, PADDING).eval()
    batch = to_device(some_batches(1, 4)[0], CPU)
    exchanged = {**batch, "token_type_ids": 1 - batch["token_type_ids"]}
    losses, others = (torch.stack(PretrainLosses(model)(each)) for each in (batch, exchanged))
    assert (losses != others).all()


def test_evaluation_changes_nothing_and_repeats():
    model = BertPretrainModel(replace(SMALL, dropout=0.5), PADDING).train()
    before = copy.deepcopy(model.state_dict())
    batches = [to_device(batch, CPU) for batch in some_batches(2)]
    assert evaluate(model, batches) == evaluate(model, batches)
    assert model.training
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_the_probe_shows_input_targets_and_predictions_of_the_first_pair():
    batch = to_device(some_batches(1)[0], CPU)
    model = Parrot(5)
    model.padding_idx = PADDING
    lines = probe(model, batch, small_tokenizer()).splitlines()
    names = [line.split(": ")[0] for line in lines]
    assert names == ["Input Tokens", "Target Tokens", "Predicted Tokens"]
    shown, targets, predicted = (line.split(": ")[1].split("|") for line in lines)
    row = batch["input_ids"][0]
    tokens = [small_tokenizer().id_to_token(i) for i in row[row != PADDING].tolist()]
    assert shown == tokens
    labels = some_batches(1)[0]["mlm_labels"][0]
    expected = [small_tokenizer().id_to_token(i) for i in labels[labels >= 0].tolist()]
    assert targets == expected
    assert predicted == ["a"] * len(expected)


@pytest.mark.parametrize(
    ("log_every", "eval_every", "training", "validation"),
    [(1, 5, [1, 2, 3, 4, 5], [0, 5]), (3, 2, [3, 5], [0, 2, 4, 5]), (9, 9, [5], [0, 5])],
)
def test_lines_count_updates_and_come_as_often_as_asked_and_at_the_end(
    log_every, eval_every, training, validation, options
):
    pretrain(replace(options, steps=5, log_every=log_every, eval_every=eval_every))
    lines = {split: read_lines(Path(options.out), split) for split in ("train", "validation")}
    assert lines["train"]["step"] == training
    assert lines["validation"]["step"] == validation
    assert lines["validation"]["tokens"][0] == 0 < lines["train"]["tokens"][0]


def test_a_line_has_the_loss_of_its_update_and_an_evaluation_the_weights_after_it(options):
    """Line 1 has the loss of the first batch, before any update; so has the evaluation of step 0.
    That of the last step is of the weights in model/."""
    options = replace(options, dropout=0.0, steps=2, accumulate=2)
    pretrain(options)
    train, validation = (read_lines(Path(options.out), split) for split in ("train", "validation"))

    _, model, examples = train_pretrain.prepare(options)
    batches = train_pretrain.make_batches(options, examples["train"], 0)
    first = evaluate(model, [to_device(next(batches), CPU) for _ in range(2)])
    assert train["mlm_loss"][0] == pytest.approx(first["mlm_loss"], rel=1e-5)
    assert train["nsp_loss"][0] == pytest.approx(first["nsp_loss"], rel=1e-5)

    held_out = train_pretrain.make_validation(options, examples["validation"], CPU)
    trained = BertPretrainModel.from_pretrained(f"{options.out}/model")
    found = [evaluate(each, held_out)["mlm_loss"] for each in (model, trained)]
    assert validation["mlm_loss"] == pytest.approx(found, rel=1e-5)
    assert found[0] != found[1]


def test_with_0_steps_a_run_evaluates_once_and_writes_the_model_that_it_was_given(
    options, tmp_path
):
    pretrain(options)
    weights = f"{options.out}/model"
    told = replace(options, tokenizer=None, weights=weights, steps=0, out=str(tmp_path / "again"))
    pretrain(told)
    before, after = (read_lines(Path(o.out), "validation") for o in (options, told))
    assert after["step"] == [0]
    for name in ("mlm_loss", "nsp_loss", "mlm_accuracy", "nsp_accuracy"):
        assert after[name][0] == before[name][-1]
    assert not read_lines(Path(told.out), "train")
    assert (tmp_path / "again/checkpoint.pt").exists()
    assert contents(tmp_path / "again/model") == contents(Path(weights))


def test_an_evaluation_is_the_first_batches_of_the_validation_part_or_all_of_them(
    options, monkeypatch
):
    """Each pair of an epoch comes once before any comes again: 6 pairs fill a batch of 4, then half
    of one, which the next epoch completes."""
    examples = train_pretrain.load_examples(options, small_tokenizer())["validation"]

    def sizes(batch_size: int, most: int) -> list[int]:
        monkeypatch.setattr(train_pretrain, "EVALUATION_BATCHES", most)
        told = replace(options, batch_size=batch_size)
        found = train_pretrain.make_validation(told, examples, CPU)
        return [len(batch["input_ids"]) for batch in found]

    assert len(examples) == 6
    assert sizes(2, 1) == [2]
    assert sizes(2, 2) == [2, 2]
    assert sizes(4, 16) == [4, 4]


def test_each_corpus_is_read_as_the_options_say(options, monkeypatch):
    asked = []
    corpus = corpus_of([[[7] * 9] * 40] * 2)
    monkeypatch.setattr(
        data, "get_corpus", lambda *what, **how: asked.append((*what, how)) or corpus
    )
    told = replace(
        options, dataset="a", dataset_name="b", split="c+d", text_column="e", rows_per_document=4
    )
    tokenizer = small_tokenizer()
    found = train_pretrain.load_examples(told, tokenizer)
    assert [dataset.corpus for dataset in found.values()] == [corpus, corpus]
    how = {"name": "b", "train_split": "c+d", "text_column": "e", "rows_per_document": 4}
    assert asked == [("a", split, tokenizer, how) for split in ("train", "validation")]

    stream = mock.Mock()
    stream().validation.return_value = corpus
    monkeypatch.setattr(data, "Stream", stream)
    found = train_pretrain.load_examples(replace(told, streaming=True), tokenizer)
    stream.assert_called_with("a", tokenizer, mock.ANY, **how)
    assert found["train"] == stream()
    assert found["validation"].corpus == corpus


def test_the_loss_is_compared_with_the_frequencies_of_the_text_that_is_trained_on(options):
    pretrain(options)
    _, _, examples = train_pretrain.prepare(options)
    entropies = {split: found.corpus.unigram_entropy() for split, found in examples.items()}
    assert entropies["train"] != entropies["validation"]
    lines = read_lines(Path(options.out), "validation")
    assert set(lines["unigram_entropy"]) == {entropies["train"]}


def test_each_rank_gets_micro_batches_of_its_own(options, monkeypatch):
    """Together they are those of one rank, in turn."""
    corpus = corpus_of([[[7] * 9] * 40] * 2)
    examples = data.PretrainDataset(corpus, small_tokenizer(), 16)

    def first_batches(rank: int, ranks: int, count: int) -> list[dict]:
        monkeypatch.setattr(train_pretrain, "rank_and_ranks", lambda: (rank, ranks))
        told = replace(options, accumulate=2)
        batches = train_pretrain.make_batches(told, examples, 1)
        return list(itertools.islice(batches, count))

    alone = first_batches(0, 1, 4)
    first, second = first_batches(0, 2, 2), first_batches(1, 2, 2)
    for one, other in zip(alone, itertools.chain(*zip(first, second, strict=True)), strict=True):
        assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_run_prints_its_evaluations_and_baselines(options, capsys):
    pretrain(options)
    validation = read_lines(Path(options.out), "validation")
    printed = capsys.readouterr().out
    for name in ("mlm_loss", "nsp_accuracy", "unigram_entropy"):
        assert f"{name} {validation[name][-1]:.3f}" in printed
    assert printed.count("Predicted Tokens: ") == 2


def test_masked_tokens_pairs_and_tokens_without_padding_are_counted():
    batches = some_batches(2)
    assert any((batch["input_ids"] == PADDING).any() for batch in batches)
    expected = [0, 0, 0]
    for batch in batches:
        labels, ids = batch["mlm_labels"].flatten().tolist(), batch["input_ids"].flatten().tolist()
        expected[0] += sum(label != data.IGNORED_LABEL for label in labels)
        expected[1] += len(batch["nsp_labels"])
        expected[2] += sum(id != PADDING for id in ids)
    assert count(batches, PADDING) == tuple(expected)


def test_the_examples_of_a_run_obey_its_options(options):
    told = replace(options, seed=3, whole_word_masking=True)
    found = train_pretrain.load_examples(told, small_tokenizer())["train"]
    assert (found.max_seq_length, found.seed, found.whole_word_masking) == (16, 3, True)


def test_a_model_is_on_the_device_of_the_run(options, monkeypatch):
    def tell(model):
        raise ValueError(f"on {model.nsp.weight.device.type}")

    monkeypatch.setattr(train_pretrain, "choose_device", lambda name: torch.device("meta"))
    monkeypatch.setattr(train_pretrain, "make_optimizer", tell)
    with pytest.raises(ValueError, match="on meta"):
        pretrain(options)


# ---- Dropout and positions of a new and of a loaded model ---------------------------------------


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_dropout_is_set_for_new_and_for_loaded_models(dropout, options):
    options = replace(options, dropout=dropout)
    new = model_of(options, small_tokenizer())
    assert dropouts_of(new) == {dropout}
    new.save_pretrained(options.out, small_tokenizer())
    loaded = model_of(
        replace(options, tokenizer=None, weights=options.out, dropout=0.2), small_tokenizer()
    )
    assert dropouts_of(loaded) == {0.2}


def test_the_position_table_has_as_many_rows_as_asked_for(options):
    model = model_of(replace(options, positions=40), small_tokenizer())
    assert model.config.max_seq_length == 40
    assert model.bert.embeddings.position.weight.shape == (40, 128)
    assert model_of(options, small_tokenizer()).config.max_seq_length == 16


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"positions": 12}, "--positions .* 16, got 12"),
        ({"positions": 20, "weights": "W", "tokenizer": None}, "--positions 20.* 16"),
    ],
)
def test_positions_that_do_not_fit_are_rejected(changes, message, options):
    weights = Path(options.out).with_name("weights")
    model_of(options, small_tokenizer()).save_pretrained(weights, small_tokenizer())
    if "weights" in changes:
        changes = {**changes, "weights": str(weights)}
    with pytest.raises(ValueError, match=message):
        train_pretrain.prepare(replace(options, **changes))


def test_the_papers_two_phases_train_one_model_on_short_and_then_on_long_pairs(options, tmp_path):
    """In miniature, pairs have 16 tokens and then 40. Only the second phase changes the embeddings
    of later columns by more than weight decay, and it starts where the first one ended."""
    first = replace(options, positions=40, learning_rate=1e-2)
    pretrain(first)
    second = replace(
        options, out=str(tmp_path / "second"), weights=f"{first.out}/model", max_seq_length=40,
        tokenizer=None,
        learning_rate=1e-2,
    )  # fmt: skip
    pretrain(second)
    torch.manual_seed(options.seed)
    fresh = model_of(first, small_tokenizer())
    tables = [fresh.bert.embeddings.position.weight.detach()]
    tables += [
        weights_of(Path(out, "model"))["bert.embeddings.position.weight"]
        for out in (first.out, second.out)
    ]
    learned = [(after - before).abs().mean(dim=1) for before, after in itertools.pairwise(tables)]
    assert learned[0][:10].min() > 1e-3
    assert learned[0][16:].max() < 1e-4
    assert learned[1][:30].min() > 1e-3
    lines = read_lines(Path(second.out), "validation")
    assert all(math.isfinite(loss) for loss in lines["mlm_loss"])


# ---- What must be learnable ---------------------------------------------------------------------


def one_sample(device: torch.device) -> dict[str, torch.Tensor]:
    """Returns a pair of 64 tokens with 10 masked tokens, whose targets all differ: a model that
    is stuck has a loss of ln 10."""
    input_ids = torch.arange(100, 164)[None]
    input_ids[0, 0], input_ids[0, 30], input_ids[0, 63] = 2, 3, 3
    labels = torch.full((1, 64), data.IGNORED_LABEL)
    masked = torch.arange(3, 63, 6)
    labels[0, masked] = torch.arange(1000, 1010)
    input_ids[0, masked] = 4
    token_type_ids = (torch.arange(64) > 30).long()[None]
    batch = {"input_ids": input_ids, "token_type_ids": token_type_ids, "mlm_labels": labels}
    return to_device({**batch, "nsp_labels": torch.tensor([0])}, device)


@functools.cache  # two tests need the same
def overfit(size: str, rate: float, steps: int, device: torch.device) -> tuple[float, torch.Tensor]:
    """Returns the MLM loss in nats and the predictions after training on one sample without
    dropout."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 2000, "max_seq_length": 64}
    config = BertConfig.named(size, **sizes, dropout=0.0, attention_dropout=0.0)
    model = BertPretrainModel(config, PADDING).to(device).train()
    optimizer, batch = make_optimizer(model), one_sample(device)
    for _ in range(steps):
        add_gradients(PretrainLosses(model), [batch], masked=10, pairs=1)
        update(model, optimizer, rate)
    with torch.no_grad():
        mlm_logits, _ = train_pretrain.forward(model.eval(), batch)
    return evaluate(model, [batch])["mlm_loss"], mlm_logits.argmax(dim=-1)


SIZES = [("mini", 5e-4, "cpu"), pytest.param("base", 1e-4, "cuda", marks=pytest.mark.gpu)]


@pytest.mark.slow
@pytest.mark.parametrize(("size", "rate", "device"), SIZES, indirect=["device"])
def test_one_sample_is_overfitted(size, rate, device):
    """Every prediction is the target. A model that cannot overfit one sample has a bug."""
    loss, predicted = overfit(size, rate, 200, device)
    assert loss < 0.01
    assert torch.equal(predicted, one_sample(device)["mlm_targets"])


@pytest.mark.slow
@pytest.mark.parametrize(("size", "rate", "device"), SIZES, indirect=["device"])
def test_a_large_learning_rate_sticks_at_ln_n_with_the_same_token_everywhere(size, rate, device):
    """With 1e-2 the model learns which 10 tokens are targets, but never where: the loss stays at ln
    10. With a smaller rate it learns the same sample in as many steps."""
    loss, predicted = overfit(size, 1e-2, 200, device)
    assert loss == pytest.approx(math.log(10), abs=0.15)
    assert predicted.bincount().max() >= 9
    assert overfit(size, rate, 200, device)[0] < 0.01


def test_the_lines_of_a_run_have_the_rate_of_each_step_and_the_bar_its_steps(options, monkeypatch):
    bars = []

    def noted(*arguments, **more):
        bars.append(progress_bar(*arguments, **more))
        return bars[-1]

    progress_bar = train_pretrain.progress_bar
    monkeypatch.setattr(train_pretrain, "progress_bar", noted)
    pretrain(options)
    lines = read_lines(Path(options.out), "train")
    peak, warmup, steps = options.learning_rate, options.warmup, options.steps
    expected = [learning_rate(step, peak, warmup, steps) for step in range(steps)]
    assert lines["learning_rate"] == pytest.approx(expected)
    assert [(bar.n, bar.total) for bar in bars] == [(steps, steps)]


def test_a_new_model_has_a_row_for_every_token(options):
    tokenizer = small_tokenizer()
    model = model_of(options, tokenizer)
    assert model.config.vocab_size == tokenizer.get_vocab_size() == len(tokenizer.get_vocab())


@pytest.mark.slow
def test_a_short_pretraining_beats_the_unigram_entropy(tmp_path):
    """Words follow each other as letters do in the alphabet, so a masked one can be told from its
    neighbours. The first loss is ln V; model, tokenizer, options and metrics are written."""
    corpus, out = tmp_path / "corpus.jsonl", tmp_path / "run"
    around = " ".join(LETTERS * 2)
    texts = [". ".join(around[2 * (i + j) % 52 :][:20] for j in range(9)) for i in range(200)]
    write_texts(corpus, texts)
    pretrain(
        PretrainOptions(
            out=str(out),
            dataset=str(corpus),
            vocab_size=60,
            steps=240,
            eval_every=120,
            max_seq_length=32,
            learning_rate=3e-3,
            workers=0,
        )
    )
    validation, train = read_lines(out, "validation"), read_lines(out, "train")
    assert validation["step"] == [0, 120, 240]
    assert validation["mlm_loss"][0] == pytest.approx(validation["ln_vocab_size"][0], rel=0.05)
    assert validation["mlm_loss"][-1] < validation["unigram_entropy"][0] - 1.0
    assert validation["perplexity"][-1] == pytest.approx(math.exp(validation["mlm_loss"][-1]))
    assert train["step"] == [*range(10, 241, 10)]
    assert train["learning_rate"][0] == pytest.approx(3e-3 * 10 / 24)
    assert json.loads((out / "config.json").read_text())["learning_rate"] == 3e-3
    tokenizer = data.load_tokenizer(out / "model")
    model = BertPretrainModel.from_pretrained(out / "model")
    assert model.config.vocab_size == tokenizer.get_vocab_size() <= 60


def test_the_same_options_give_the_same_run(tmp_path):
    """The bits are the same, with another number of workers, too."""
    models = []
    for workers in (0, 2):
        out = tmp_path / str(workers)
        pretrain(
            PretrainOptions(
                out=str(out),
                steps=6,
                eval_every=3,
                max_seq_length=32,
                batch_size=4,
                workers=workers,
                accumulate=2,
            )
        )
        models.append(BertPretrainModel.from_pretrained(out / "model").state_dict())
    lines = [read_lines(tmp_path / str(w), "validation")["mlm_loss"] for w in (0, 2)]
    assert lines[0] == lines[1]
    assert all(torch.equal(models[0][name], models[1][name]) for name in models[0])


def test_a_large_seed_trains(options):
    pretrain(replace(options, seed=2**63 - 1, steps=1))
    assert Path(options.out, "model").exists()


# ---- The picture of a run -----------------------------------------------------------------------


@pytest.mark.parametrize("seeds", [(), (0, 1)], ids=["pretraining", "fine-tuning"])
def test_a_run_is_drawn_from_its_metrics(seeds, tmp_path):
    """One function draws both kinds of runs."""
    pytest.importorskip("matplotlib")
    for seed in seeds or (None,):
        who = {} if seed is None else {"learning_rate": 1e-3, "seed": seed}
        for step in (10, 20):
            train_pretrain.write_line(tmp_path, split="train", step=step, loss=1 / step, **who)
            measured = {"loss": 2 / step, "accuracy": step / 30}
            train_pretrain.write_line(tmp_path, split="validation", step=step, **measured, **who)
    train_pretrain.write_line(tmp_path, split="test", accuracy=0.5)
    DRAW_CURVES(tmp_path)
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_without_matplotlib_a_run_has_no_picture(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    DRAW_CURVES(tmp_path)
    assert not (tmp_path / "curves.png").exists()
