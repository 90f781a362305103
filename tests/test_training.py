"""Pretraining: learning rate, optimizer, loss, evaluation, and what a model has to learn."""

import copy
import itertools
import json
import math
import sys
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest
import torch
from helpers import assert_same, checkpoint_of, model_of, read_lines
from strategies import (
    CPU,
    FIXED,
    LETTERS,
    PADDING,
    SMALL,
    TEXTS,
    VOCABULARY,
    corpus_of,
    dropouts_of,
    gradients,
    publish,
    review_batches,
    small_tokenizer,
    some_batches,
    write_texts,
)

import data
import train_pretrain
import train_sst2
from bert import BertPretrainModel, SST2BertModel, fill_masks
from train_pretrain import (
    PretrainOptions,
    count,
    evaluate,
    learning_rate,
    make_optimizer,
    orthogonalize,
    pretrain,
    probe,
    set_seed,
    update,
)

DRAW_CURVES = train_pretrain.draw_curves  # before conftest.py replaces it

# ---- Learning rate and optimizer ----------------------------------------------------------------


def test_the_learning_rate_rises_to_the_peak_and_falls_towards_zero():
    """The first step is above 0, the peak is at the end of warmup, and the last step is above 0."""
    rates = [learning_rate(step, peak=1.0, warmup=4, steps=12) for step in range(12)]
    assert rates[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert rates[4:] == [(12 - step) / 8 for step in range(4, 12)]
    assert learning_rate(0, peak=0.5, warmup=0, steps=10) == 0.5
    assert [PretrainOptions(steps=steps).warmup for steps in (70, 79)] == [7, 7]
    assert PretrainOptions(steps=70, warmup_steps=0).warmup == 0


def test_every_micro_batch_of_every_step_has_a_dropout_mask_of_its_own(options, monkeypatch):
    """Which mask it is depends on the seed of the run, on the step and on the micro-batch."""
    add_gradients = mock.Mock(wraps=train_pretrain.add_gradients)
    monkeypatch.setattr(train_pretrain, "add_gradients", add_gradients)
    for run, seed in enumerate((0, 1, 0)):
        pretrain(replace(options, out=f"{options.out}-{run}", accumulate=2, seed=seed))
    drawn = []
    for numbers in itertools.chain.from_iterable(c.args[4] for c in add_gradients.call_args_list):
        set_seed(*numbers)
        drawn.append(tuple(torch.rand(3).tolist()))
    first, other, again = drawn[:8], drawn[8:16], drawn[16:]
    assert len(set(first + other)) == 16
    assert first == again


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_step_with_gradients_of_0_shrinks_exactly_what_decays(optimizer):
    """Decay is decoupled: weights lose lr x 0.01 of themselves. A frozen one stays as it is."""
    model = BertPretrainModel(FIXED, PADDING)
    before = copy.deepcopy(model.state_dict())
    frozen = "bert.layers.0.expand.weight"
    for name, parameter in model.named_parameters():
        parameter.grad = None if name == frozen else torch.zeros_like(parameter)
    update(model, make_optimizer(model, optimizer), rate=0.5)
    for name, after in model.state_dict().items():
        decays = before[name].dim() == 2 and name != frozen
        expected = before[name] * (1 - 0.5 * 0.01) if decays else before[name]
        torch.testing.assert_close(after, expected, rtol=1e-6, atol=0)


def test_muon_takes_the_matrices_of_the_layers_and_adamw_everything_else(options):
    pretrain(replace(options, optimizer="muon"))
    optimizer = checkpoint_of(Path(options.out))["optimizer"]
    *by_adamw, hidden = optimizer["param_groups"]
    model = BertPretrainModel.from_pretrained(f"{options.out}/model")
    matrices = [p for p in model.bert.layers.parameters() if p.dim() == 2]
    states = [optimizer["state"][i] for i in hidden["params"]]
    assert [state["momentum_buffer"].shape for state in states] == [p.shape for p in matrices]
    others = [i for group in by_adamw for i in group["params"]]
    assert all("exp_avg" in optimizer["state"][i] for i in others)
    assert len(others) + len(matrices) == len(list(model.parameters()))
    of_encoder = make_optimizer(model.bert, "muon").param_groups[-1]["params"]
    assert len(of_encoder) == len(matrices)


def muon_by_hand(matrix: torch.Tensor, gradients: list[torch.Tensor], rate: float) -> torch.Tensor:
    """Returns a matrix after a step for each gradient: decay, and a step of the size of AdamW's
    along Nesterov's momentum, whose singular values are computed and brought near 1."""
    momentum = torch.zeros_like(matrix)
    for gradient in gradients:
        momentum = 0.95 * momentum + 0.05 * gradient
        u, s, v = torch.linalg.svd(0.95 * momentum + 0.05 * gradient, full_matrices=False)
        s = s / s.norm()
        for _ in range(5):
            s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
        assert ((s > 0.68) & (s < 1.21)).all()
        size = 0.2 * max(matrix.shape) ** 0.5
        matrix = (1 - 0.01 * rate) * matrix - size * rate * (u * s) @ v
    return matrix


def test_steps_of_muon_are_those_by_hand_and_nearly_those_of_torch():
    """torch's own Muon computes in bfloat16; ours is as precise as the weights are. The other
    parameters take the steps of AdamW.
    """
    model = BertPretrainModel(FIXED, PADDING).double()
    twin, start = copy.deepcopy(model), copy.deepcopy(model.state_dict())
    optimizer, groups = make_optimizer(model, "muon"), make_optimizer(twin, "muon").param_groups
    hidden = groups.pop()["params"]
    theirs = (
        torch.optim.Muon(hidden, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(groups, fused=True),
    )
    gradients: dict[str, list] = {name: [] for name in start}
    for _ in range(3):
        for (name, ours), other in zip(model.named_parameters(), twin.parameters(), strict=True):
            ours.grad = 1e-3 * torch.randn_like(ours)  # so small that none is clipped
            other.grad = ours.grad.clone()
            gradients[name].append(ours.grad.clone())
        update(model, optimizer, rate=0.1)
        for one in theirs:
            update(twin, one, rate=0.1)
    for (name, ours), other in zip(model.named_parameters(), twin.parameters(), strict=True):
        if any(other is matrix for matrix in hidden):
            by_hand = muon_by_hand(start[name], gradients[name], rate=0.1)
            torch.testing.assert_close(ours.data, by_hand, rtol=1e-9, atol=1e-12)
            in_float32, exact = orthogonalize(start[name].float()), orthogonalize(start[name])
            torch.testing.assert_close(in_float32.double(), exact, rtol=0, atol=1e-4)
            assert (ours - other).norm() < 0.02 * (ours - start[name]).norm()
        else:
            torch.testing.assert_close(ours, other, rtol=0, atol=0)


# ---- The loss -----------------------------------------------------------------------------------


def test_accumulated_gradients_are_those_of_the_whole_batch():
    """They agree to 1e-12 in float64; the mean of micro-batches' means, as a control, does not."""
    model = BertPretrainModel(SMALL, PADDING).double()
    batches, (whole,) = some_batches(3), some_batches(1, 9)  # of the same nine examples
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
    batches = [*some_batches(2), *some_batches(1, 1)]
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

    fickle = Parrot(token)  # it changes its mind after the first batch
    fickle.register_forward_hook(lambda *_: setattr(fickle, "token", token + 1))
    share = len(batches[0]["mlm_targets"]) / len(targets)
    assert evaluate(fickle, batches)["most_frequent_prediction"] == max(share, 1 - share)


@pytest.mark.parametrize("was_training", [True, False])
def test_evaluating_a_model_uses_no_dropout_and_no_gradients_and_keeps_its_mode(
    was_training,
):
    pretrained, classifier = BertPretrainModel(SMALL, PADDING), SST2BertModel(SMALL, PADDING)
    batch, tokenizer = some_batches(1)[0], small_tokenizer()
    seen = set()
    for model in (pretrained, classifier):
        model.train(was_training)
        model.register_forward_hook(
            lambda model, *_: seen.add((model.training, torch.is_grad_enabled()))
        )
    looks = [
        lambda: evaluate(pretrained, [batch]),
        lambda: probe(pretrained, batch, tokenizer),
        lambda: fill_masks(pretrained, tokenizer, "a [MASK]"),
        lambda: train_sst2.evaluate(classifier, review_batches([3], 2, None), CPU),
    ]
    for look in looks:
        seen.clear()
        look()
        assert seen == {(False, False)}
        assert pretrained.training == classifier.training == was_training


def test_the_probe_shows_input_targets_and_predictions_of_the_first_pair():
    batch = some_batches(1)[0]
    model = Parrot(5)
    model.padding_idx = PADDING
    lines = probe(model, batch, small_tokenizer()).splitlines()
    names, shown = zip(*(line.split(": ") for line in lines), strict=True)
    assert names == ("Input Tokens", "Target Tokens", "Predicted Tokens")
    shown, targets, predicted = (tokens.split("|") for tokens in shown)
    row, labels = batch["input_ids"][0], batch["mlm_labels"][0]
    assert shown == [VOCABULARY[i] for i in row[row != PADDING].tolist()]
    assert targets == [VOCABULARY[i] for i in labels[labels >= 0].tolist()]
    assert predicted == ["a"] * len(targets)


@pytest.mark.parametrize(
    ("log_every", "eval_every", "training", "validation"),
    [(1, 5, [1, 2, 3, 4, 5], [0, 5]), (3, 2, [3, 5], [0, 2, 4, 5])],
)
def test_lines_count_updates_and_come_as_often_as_asked_and_at_the_end(
    log_every, eval_every, training, validation, options
):
    told = replace(options, steps=5, log_every=log_every, eval_every=eval_every)
    pretrain(replace(told, warmup_steps=2))
    lines = {split: read_lines(Path(options.out), split) for split in ("train", "validation")}
    assert lines["train"]["step"] == training
    rates = [learning_rate(step - 1, options.learning_rate, 2, 5) for step in training]
    assert lines["train"]["learning_rate"] == pytest.approx(rates)
    assert lines["validation"]["step"] == validation
    tokens = [0, *lines["train"]["tokens"]]
    assert lines["validation"]["tokens"][0] == 0
    assert tokens == sorted(set(tokens))
    assert lines["validation"]["ln_vocab_size"][0] == math.log(len(VOCABULARY))


def test_a_line_has_the_loss_of_its_update_and_an_evaluation_the_weights_after_it(options):
    """Line 1, on the first batches, and the evaluation of step 0 use the weights before any update.
    The evaluation of the last step uses the weights in model/."""
    options = replace(options, dropout=0.0, steps=2, accumulate=2)
    pretrain(options)
    train, validation = (read_lines(Path(options.out), split) for split in ("train", "validation"))

    _, model, examples = train_pretrain.prepare(options)
    batches = train_pretrain.make_batches(options, examples["train"], 0)
    first = evaluate(model, [next(batches) for _ in range(2)])
    assert train["mlm_loss"][0] == pytest.approx(first["mlm_loss"], rel=1e-5)
    assert train["nsp_loss"][0] == pytest.approx(first["nsp_loss"], rel=1e-5)

    held_out = train_pretrain.make_validation(options, examples["validation"], CPU)
    trained = BertPretrainModel.from_pretrained(f"{options.out}/model")
    found = [evaluate(each, held_out)["mlm_loss"] for each in (model, trained)]
    assert validation["mlm_loss"] == pytest.approx(found, rel=1e-5)
    assert found[0] != found[1]


def test_weights_to_start_from_are_trained_with_dropout(options, tmp_path, monkeypatch):
    """A model that has been loaded is in evaluation mode."""
    modes = []
    monkeypatch.setattr(train_pretrain, "train", lambda _, model, *__: modes.append(model.training))
    weights = str(publish(tmp_path / "published"))
    pretrain(replace(options, tokenizer=None, weights=weights, max_seq_length=8))
    assert modes == [True]


def test_the_seed_decides_the_initial_weights(options):
    found = []
    for seed in (2**63 - 1, 2**63 - 1, 1):
        out = f"{options.out}-{len(found)}"
        pretrain(replace(options, steps=0, seed=seed, out=out))
        found.append(BertPretrainModel.from_pretrained(f"{out}/model").state_dict())
    assert_same(found[0], found[1])
    name = "bert.embeddings.token.weight"
    assert not torch.equal(found[0][name], found[2][name])


def test_examples_are_read_and_made_as_the_options_say(options, monkeypatch):
    """The baseline has the frequencies of the text that is trained on."""
    documents = {"train": LETTERS, "validation": LETTERS[::-1]}
    corpora = {
        LETTERS: corpus_of([[[7] * 9, [8]] * 40] * 2),
        LETTERS[::-1]: corpus_of([[[7] * 9] * 40] * 2),
    }
    get_documents = mock.Mock(return_value=documents)
    monkeypatch.setattr(data, "get_documents", get_documents)
    monkeypatch.setattr(data, "get_corpus", lambda texts, tokenizer: corpora[texts])
    told = replace(
        options, dataset="a", dataset_name="b", split="c+d", text_column="e", tokenizer=None,
        rows_per_document=4, seed=3, whole_word_masking=True, steps=0, positions=20,
    )  # fmt: skip
    expected = corpora[LETTERS].unigram_entropy()
    assert expected != corpora[LETTERS[::-1]].unigram_entropy()
    tokenizer, model, made = train_pretrain.prepare(told)
    assert model.config.max_seq_length == 20
    get_documents.assert_called_with("a", "b", "c+d", "e", 4, False)
    learned = data.train_tokenizer(LETTERS, told.vocab_size).get_vocab()
    assert tokenizer.get_vocab() == made["train"].tokenizer.get_vocab() == learned
    for examples in made.values():
        found = (examples.max_seq_length, examples.seed, examples.whole_word_masking)
        assert found == (16, 3, True)
    pretrain(told)
    assert read_lines(Path(told.out), "validation")["unigram_entropy"] == [expected]

    documents["validation"] = TEXTS
    found = train_pretrain.load_examples(
        replace(told, streaming=True, tokenizer="t"), small_tokenizer()
    )
    get_documents.assert_called_with("a", "b", "c+d", "e", 4, True)
    assert found["train"].documents is LETTERS
    assert found["validation"].corpus.key == data.first_documents(TEXTS, small_tokenizer()).key


def test_an_evaluation_is_the_first_batches_of_the_validation_part_and_then_of_its_later_epochs(
    options,
):
    """Each pair of an epoch comes once before any comes again: 6 pairs fill a batch of 4, then half
    of one, which the next epoch completes."""
    examples = train_pretrain.load_examples(options, small_tokenizer())["validation"]
    assert len(examples) == 6
    found = train_pretrain.make_validation(replace(options, batch_size=4), examples, CPU)
    assert [len(batch["input_ids"]) for batch in found] == [4] * 16
    loader = data.get_split_dataloader(examples, 4, workers=0)
    for batch, expected in zip(found, loader, strict=False):
        assert torch.equal(batch["input_ids"], expected["input_ids"])


def test_masked_tokens_pairs_and_tokens_without_padding_are_counted():
    batches = some_batches(2)
    assert any((batch["input_ids"] == PADDING).any() for batch in batches)
    masked = sum(int((batch["mlm_labels"] != data.IGNORED_LABEL).sum()) for batch in batches)
    tokens = sum(id != PADDING for b in batches for id in b["input_ids"].flatten().tolist())
    assert count(batches, PADDING) == (masked, 2 * 3, tokens)


# ---- Dropout and positions of a new and of a loaded model ---------------------------------------


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_dropout_and_positions_are_those_of_the_options(dropout, options):
    """Dropout also of loaded weights, whose position table stays as it is."""
    told = replace(options, dropout=dropout, positions=40)
    new = model_of(told, small_tokenizer())
    assert dropouts_of(new) == {dropout}
    assert len(new.bert.embeddings.position.weight) == 40
    new.save_pretrained(options.out, small_tokenizer())
    from_weights = replace(told, tokenizer=None, weights=options.out, dropout=0.2)
    loaded = model_of(replace(from_weights, positions=20), small_tokenizer())
    assert dropouts_of(loaded) == {0.2}
    assert loaded.config.max_seq_length == 40


# ---- Whole runs ---------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_short_pretraining_beats_the_unigram_entropy(tmp_path):
    """Words follow each other as letters do in the alphabet, so a masked one can be told from its
    neighbors. The first loss is ln V; model, tokenizer, options and metrics are written."""
    corpus, out = tmp_path / "corpus.jsonl", tmp_path / "run"
    around = " ".join(LETTERS * 2)
    texts = [". ".join(around[2 * (i + j) % 52 :][:20] for j in range(9)) for i in range(100)]
    write_texts(corpus, texts)
    options = PretrainOptions(
        out=str(out), dataset=str(corpus), vocab_size=60, steps=150, eval_every=75,
        max_seq_length=24, batch_size=16, learning_rate=3e-3, dropout=0.0, workers=0,
    )  # fmt: skip
    pretrain(options)
    validation = read_lines(out, "validation")
    assert validation["mlm_loss"][0] == pytest.approx(validation["ln_vocab_size"][0], rel=0.05)
    assert validation["mlm_loss"][-1] < validation["unigram_entropy"][0] - 0.3
    assert json.loads((out / "config.json").read_text())["learning_rate"] == 3e-3
    tokenizer = data.load_tokenizer(out / "model")
    model = BertPretrainModel.from_pretrained(out / "model")
    assert model.config.vocab_size == tokenizer.get_vocab_size() <= 60


# ---- What a person sees --------------------------------------------------------------------------


@pytest.mark.slow
def test_both_kinds_of_runs_are_drawn_from_their_metrics(tmp_path):
    pytest.importorskip("matplotlib")
    for who in ({}, {"learning_rate": 1e-3, "seed": 0}):
        train_pretrain.write_line(tmp_path, split="train", step=1, loss=1.0, **who)
        train_pretrain.write_line(tmp_path, split="validation", step=1, accuracy=0.5, **who)
    train_pretrain.write_line(tmp_path, split="test", accuracy=0.5)
    DRAW_CURVES(tmp_path)
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("error", [OSError, UnicodeError])
def test_a_terminal_that_is_closed_or_cannot_display_a_text_ends_no_run(error, monkeypatch):
    monkeypatch.setattr(train_pretrain.tqdm, "write", mock.Mock(side_effect=error))
    train_pretrain.show("text")


def test_without_matplotlib_a_run_has_no_picture(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    DRAW_CURVES(tmp_path)
    assert not (tmp_path / "curves.png").exists()
