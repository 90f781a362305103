"""Pretraining: learning rate, optimizer, loss, evaluation, and what a model has to learn."""

import copy
import dataclasses
import functools
import itertools
import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import weights_of
from safetensors.torch import load_file, save_file
from strategies import (
    corpus_of,
    FIXED,
    LETTERS,
    PADDING,
    SMALL,
    TINY,
    dropouts_of,
    gradients,
    publish,
    small_tokenizer,
    some_batches,
    write_texts,
)

import data
import support.run
import train_pretrain
from bert import Bert, BertConfig, BertPretrainModel, SST2BertModel
from support.command_line import parse_options
from support.curves import read_lines
from support.folder import write_line
from support.run import FiniteGuard, set_seed
from train_pretrain import (
    PretrainLosses,
    PretrainOptions,
    add_gradients,
    evaluate,
    learning_rate,
    make_optimizer,
    pretrain,
    probe,
    to_device,
    update,
)

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

    def noted(losses_of, batches, seeds):
        assert len(seeds) == len(batches)
        for numbers in seeds:
            set_seed(*numbers)
            drawn.append(tuple(torch.rand(3).tolist()))
        return add_gradients(losses_of, batches, seeds)

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


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_a_step_whose_gradient_is_not_finite_is_skipped(bad):
    """No weight, moment or count of steps changes: the next step is as if there had been none."""
    models = [BertPretrainModel(FIXED, PADDING) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    for model, is_hit in zip(models, (False, True), strict=True):
        optimizer = make_optimizer(model)
        for step in range(3):
            if step == 1 and not is_hit:
                continue
            for parameter in model.parameters():
                parameter.grad = torch.full_like(parameter, 0.01)
            if step == 1:
                next(model.parameters()).grad[0] = bad
            norm = update(model, optimizer, rate=0.1)
            assert norm.isfinite() == (step != 1)
    for one, other in zip(*(model.state_dict().values() for model in models), strict=True):
        assert torch.equal(one, other)
    steps = [float(state["step"]) for state in optimizer.state.values()]
    assert set(steps) == {2.0}


def test_the_guard_remembers_the_first_bad_step():
    guard = FiniteGuard(torch.device("cpu"))
    for step, norm in enumerate((1.0, 2.0, math.nan, 1.0, math.inf)):
        if step == 2:
            guard.check(BertPretrainModel(FIXED, PADDING))
        guard.note(step, torch.tensor(norm))
    with pytest.raises(ValueError, match="step 2: the gradient was not finite, so it was skipped"):
        guard.check()


def test_the_guard_finds_a_weight_that_is_not_finite():
    """A finite gradient with a huge learning rate can make one."""
    model = BertPretrainModel(FIXED, PADDING)
    with torch.no_grad():
        model.nsp.bias[1] = math.inf
    with pytest.raises(ValueError, match=r"a weight in nsp\.bias is no longer finite"):
        FiniteGuard(torch.device("cpu")).check(model)


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
    train_pretrain.to_device(batch, torch.device("cpu"))
    assert waits == [False] * 6


def test_masked_positions_are_where_the_labels_are():
    (batch,) = some_batches(1)
    moved = to_device(batch, torch.device("cpu"))
    labels = batch["mlm_labels"].flatten()
    assert torch.equal(moved["mlm_targets"], labels[labels != data.IGNORED_LABEL])
    assert torch.equal(labels[moved["positions"]], moved["mlm_targets"])


def test_all_tensors_of_a_batch_go_to_the_device():
    (batch,) = some_batches(1)
    moved = to_device(batch, torch.device("meta"))
    assert moved.keys() == {*batch, "positions", "mlm_targets"}
    assert {tensor.device.type for tensor in moved.values()} == {"meta"}


# ---- Evaluation ---------------------------------------------------------------------------------


class Parrot(torch.nn.Module):
    """Predicts one token with certainty, and IsNext for all but the first pair of a batch."""

    def __init__(self, token: int) -> None:
        super().__init__()
        self.token = token

    def forward(self, input_ids, token_type_ids, positions):
        mlm_logits = torch.zeros(len(positions), SMALL.vocab_size)
        mlm_logits[:, self.token] = 5.0
        nsp_logits = torch.tensor([[0.0, 2.0]] + [[2.0, 0.0]] * (len(input_ids) - 1))
        return mlm_logits, nsp_logits


def test_metrics_are_means_over_all_masked_tokens_and_all_pairs():
    """A mean over batches would differ, since their sizes do."""
    batches = [to_device(b, torch.device("cpu")) for b in (*some_batches(2), *some_batches(1, 1))]
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
    assert metrics["nsp_accuracy"] == hits / 7
    wrong = math.log1p(math.exp(2))  # of the logits 0 and 2, in nats
    assert metrics["nsp_loss"] == pytest.approx(wrong - 2 * hits / 7)


def test_the_perplexity_of_a_huge_loss_is_infinite_and_no_error(tmp_path):
    """float64 ends at exp(709). In metrics.jsonl it is null."""

    class Shouting(Parrot):
        def __init__(self, token, volume=1e4):
            super().__init__(token)
            self.volume = volume

        def forward(self, *inputs, **named):
            mlm_logits, nsp_logits = super().forward(*inputs, **named)
            return mlm_logits * self.volume, nsp_logits

    batches = [to_device(b, torch.device("cpu")) for b in some_batches(2)]
    metrics = evaluate(Shouting(0), batches)
    assert metrics["mlm_loss"] == pytest.approx(5e4)
    assert metrics["perplexity"] == math.inf
    write_line(tmp_path, split="validation", **metrics)
    assert math.isnan(evaluate(Shouting(0, math.nan), batches)["perplexity"])
    assert math.isnan(read_lines(tmp_path, "validation")["perplexity"][0])


def test_a_training_step_reads_the_segments():
    """Losses change when the segments of the same tokens are exchanged."""
    model = BertPretrainModel(SMALL, PADDING).eval()
    batch = to_device(some_batches(1, 4)[0], torch.device("cpu"))
    exchanged = {**batch, "token_type_ids": 1 - batch["token_type_ids"]}
    losses, others = (
        torch.stack(train_pretrain.sum_losses(model, each)) for each in (batch, exchanged)
    )
    assert (losses != others).all()


def test_evaluation_changes_nothing_and_repeats():
    model = BertPretrainModel(dataclasses.replace(SMALL, dropout=0.5), PADDING).train()
    before = copy.deepcopy(model.state_dict())
    batches = [to_device(batch, torch.device("cpu")) for batch in some_batches(2)]
    assert evaluate(model, batches) == evaluate(model, batches)
    assert model.training
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_the_probe_shows_input_targets_and_predictions_of_the_first_pair():
    batch = to_device(some_batches(1)[0], torch.device("cpu"))
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


def test_steps_0_evaluates_the_weights_and_writes_nothing(options, tmp_path, capsys):
    """It prints the same numbers as the last evaluation of the run that made the weights."""
    pretrain(options)
    lines = read_lines(Path(options.out), "validation")
    capsys.readouterr()
    out = tmp_path / "nothing"
    pretrain(replace(options, weights=f"{options.out}/model", steps=0, out=str(out)))
    assert not out.exists()
    first, *rows = capsys.readouterr().out.splitlines()
    assert first == f"{options.out}/model, 2 pairs of the validation split, float32"
    shown = {name: float(value) for name, value in map(str.split, rows)}
    names = {"mlm_loss", "perplexity", "mlm_accuracy", "nsp_loss", "nsp_accuracy"}
    assert names <= set(shown)
    for name, value in shown.items():
        assert value == pytest.approx(lines[name][-1], abs=5e-5)

    # However many batches are asked for, there are those of one epoch: 6 examples make two batches
    # of 4, and the last one is filled up.
    weights = f"{options.out}/model"
    pretrain(replace(options, weights=weights, steps=0, batch_size=4, eval_batches=100))
    assert ", 8 pairs of the validation split" in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore")
def test_steps_0_evaluates_no_head_that_the_weights_lack(options, tmp_path, capsys):
    """A new, random head was evaluated."""
    for cls in (Bert, SST2BertModel):
        weights = str(publish(tmp_path / cls.__name__, TINY, cls))
        with pytest.raises(
            ValueError, match=r"has no head to evaluate: mlm_bias, mlm_dense\.weight,"
        ):
            pretrain(replace(options, weights=weights, steps=0))
    for of_the_other in ("seq_relationship", "pooler"):
        weights = publish(tmp_path / of_the_other, TINY)
        tensors = load_file(weights / "model.safetensors")
        kept = {name: t for name, t in tensors.items() if of_the_other not in name}
        save_file(kept, weights / "model.safetensors")
        capsys.readouterr()
        pretrain(replace(options, weights=str(weights), steps=0))
        announced, _, *rows = capsys.readouterr().out.splitlines()
        assert announced == "NSP is not evaluated: the weights have no head for it"
        shown = [row.split()[0] for row in rows]
        assert shown == ["mlm_loss", "perplexity", "mlm_accuracy", "most_frequent_prediction"]


def test_steps_0_reads_no_training_text(options, tmp_path):
    """A training split of one document would be rejected."""
    write_texts(tmp_path / "corpus/train.jsonl", ["aa bb. cc dd."])
    write_texts(tmp_path / "corpus/validation.jsonl", ["aa bb. cc dd.", "ee ff. gg hh."])
    weights = str(publish(tmp_path / "model", TINY))
    pretrain(replace(options, dataset=str(tmp_path / "corpus"), weights=weights, steps=0))


def test_lines_and_evaluations_come_as_often_as_asked_and_at_the_end(options):
    pretrain(replace(options, steps=5, log_every=3, eval_every=2))
    lines = {split: read_lines(Path(options.out), split) for split in ("train", "validation")}
    assert lines["train"]["step"] == [0, 3, 4]
    assert lines["validation"]["step"] == [0, 2, 4, 5]
    assert lines["validation"]["tokens"][0] == 0 < lines["train"]["tokens"][0]


def test_each_corpus_is_read_as_the_options_say(options, monkeypatch):
    asked = []
    monkeypatch.setattr(data, "get_corpus", lambda *what, **how: asked.append((*what, how)))
    told = replace(
        options, dataset="a", dataset_name="b", split="c+d", text_column="e", rows_per_document=4
    )
    tokenizer = small_tokenizer()
    assert train_pretrain.load_corpora(told, tokenizer).keys() == {"train", "validation"}
    train_pretrain.load_corpora(told, tokenizer, ["validation"])
    how = {"name": "b", "train_split": "c+d", "text_column": "e", "rows_per_document": 4}
    expected = [("a", split, tokenizer, how) for split in ("train", "validation")]
    assert asked == [*expected, ("a", "validation", tokenizer, how)]

    monkeypatch.setattr(data, "open_stream", lambda *what, **how: ((*what, how), "texts"))
    found = train_pretrain.load_corpora(replace(told, streaming=True), tokenizer)
    assert found == {"train": ("a", tokenizer, how), "validation": "texts"}


def test_the_loss_is_compared_with_the_frequencies_of_the_text_that_is_trained_on(options):
    pretrain(options)
    tokenizer = train_pretrain.choose_tokenizer(options)
    corpora = train_pretrain.load_corpora(options, tokenizer)
    entropies = {split: corpus.unigram_entropy() for split, corpus in corpora.items()}
    assert entropies["train"] != entropies["validation"]
    lines = read_lines(Path(options.out), "validation")
    assert set(lines["unigram_entropy"]) == {entropies["train"]}


def test_each_rank_gets_micro_batches_of_its_own(options):
    """Together they are those of one rank, in turn."""
    corpus = corpus_of([[[7] * 9] * 40] * 2)

    def first_batches(rank: int, world_size: int, count: int) -> list[dict]:
        of_rank = support.run.Run(Path(options.out), rank, world_size, 4, {})
        of_rank.step = 1
        batches = train_pretrain.make_batches(
            replace(options, accumulate=2), corpus, small_tokenizer(), of_rank
        )
        return list(itertools.islice(batches, count))

    alone = first_batches(0, 1, 4)
    first, second = first_batches(0, 2, 2), first_batches(1, 2, 2)
    for one, other in zip(alone, itertools.chain(*zip(first, second, strict=True)), strict=True):
        assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_run_shows_its_losses_and_its_evaluations(options, monkeypatch, capsys):
    shown = []
    monkeypatch.setattr(support.run.Run, "show", lambda run, loss: shown.append(loss))
    pretrain(options)
    train, validation = (read_lines(Path(options.out), split) for split in ("train", "validation"))
    sums = [m + n for m, n in zip(train["mlm_loss"], train["nsp_loss"], strict=True)]
    assert shown == [f"loss {loss:.3f}" for loss in sums]
    printed = capsys.readouterr().out
    assert f"step 4  mlm_loss {validation['mlm_loss'][-1]:.3f}  perplexity " in printed
    assert printed.count("Predicted Tokens: ") == 2
    assert f"unigram_entropy {validation['unigram_entropy'][0]:.3f} nats" in printed


def test_tokens_are_counted_without_padding():
    batches = some_batches(2)
    expected = sum(int((batch["input_ids"] != PADDING).sum()) for batch in batches)
    assert expected < sum(batch["input_ids"].numel() for batch in batches)
    assert train_pretrain.count_tokens(batches, PADDING) == expected


def test_the_examples_of_a_run_obey_its_options(options):
    told = replace(options, seed=3, whole_word_masking=True)
    corpus = train_pretrain.load_corpora(told, small_tokenizer())["train"]
    found = train_pretrain.make_dataset(told, corpus, small_tokenizer())
    assert (found.max_seq_length, found.seed, found.whole_word_masking) == (16, 3, True)


def test_a_model_is_on_the_device_of_the_run(options, tmp_path, monkeypatch):
    def tell(model, *_):
        raise ValueError(f"on {model.nsp.weight.device.type}")

    monkeypatch.setattr(train_pretrain, "choose_device", lambda name: torch.device("meta"))
    for name in ("make_optimizer", "evaluate"):
        monkeypatch.setattr(train_pretrain, name, tell)
    weights = str(publish(tmp_path / "model", TINY))
    for how in ({}, {"weights": weights, "steps": 0}):
        with pytest.raises(ValueError, match="on meta"):
            pretrain(replace(options, **how))


def test_steps_0_needs_weights(options):
    with pytest.raises(
        ValueError, match="--steps 0 evaluates a saved model: name it with --weights"
    ):
        pretrain(replace(options, steps=0))


# ---- Dropout and positions of a new and of a loaded model ---------------------------------------


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_dropout_is_set_for_new_and_for_loaded_models(dropout, options):
    options = replace(options, dropout=dropout)
    new = train_pretrain.make_model(options, small_tokenizer())
    assert dropouts_of(new) == {dropout}
    new.save_pretrained(options.out, small_tokenizer())
    loaded = train_pretrain.make_model(
        replace(options, weights=options.out, dropout=0.2), small_tokenizer()
    )
    assert dropouts_of(loaded) == {0.2}


def test_the_position_table_has_as_many_rows_as_asked_for(options):
    model = train_pretrain.make_model(replace(options, positions=40), small_tokenizer())
    assert model.config.max_seq_length == 40
    assert model.bert.embeddings.position.weight.shape == (40, 128)
    assert train_pretrain.make_model(options, small_tokenizer()).config.max_seq_length == 16


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"positions": 12}, "--max-seq-length 16 exceeds --positions 12"),
        ({"positions": 20, "weights": "W"}, "--positions 20, but the weights have 16"),
    ],
)
def test_positions_that_do_not_fit_are_rejected(changes, message, options):
    weights = Path(options.out).with_name("weights")
    train_pretrain.make_model(options, small_tokenizer()).save_pretrained(
        weights, small_tokenizer()
    )
    if "weights" in changes:
        changes = {**changes, "weights": str(weights)}
    with pytest.raises(ValueError, match=message):
        train_pretrain.make_model(replace(options, **changes), small_tokenizer())


def test_the_papers_two_phases_train_one_model_on_short_and_then_on_long_pairs(options, tmp_path):
    """In miniature, pairs have 16 tokens and then 40. Only the second phase changes the embeddings
    of later columns by more than weight decay, and it starts where the first one ended."""
    first = replace(options, positions=40, learning_rate=1e-2)
    pretrain(first)
    second = replace(
        options, out=str(tmp_path / "second"), weights=f"{first.out}/model", max_seq_length=40,
        learning_rate=1e-2,
    )  # fmt: skip
    pretrain(second)
    torch.manual_seed(options.seed)
    fresh = train_pretrain.make_model(first, small_tokenizer())
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
    """Returns a pair of 64 tokens with 10 masked positions, whose targets all differ: a model that
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
        add_gradients(PretrainLosses(model), [batch])
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

    progress_bar = support.run.progress_bar
    monkeypatch.setattr(support.run, "progress_bar", noted)
    pretrain(options)
    lines = read_lines(Path(options.out), "train")
    peak, warmup, steps = options.learning_rate, options.warmup, options.steps
    expected = [learning_rate(step, peak, warmup, steps) for step in range(steps)]
    assert lines["learning_rate"] == pytest.approx(expected)
    assert [(bar.n, bar.total) for bar in bars] == [(steps, steps)]


def test_a_new_model_has_a_row_for_every_token(options):
    tokenizer = small_tokenizer()
    model = train_pretrain.make_model(options, tokenizer)
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
    assert train["step"] == [*range(0, 240, 10), 239]
    assert train["learning_rate"][0] == pytest.approx(3e-3 / 24)
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


def test_the_largest_seed_trains(options):
    seed = parse_options(PretrainOptions, ["--seed", "9223372036854775807"]).seed
    pretrain(replace(options, seed=seed, steps=1))
    assert Path(options.out, "model").exists()
