"""The encoder: configuration, embeddings, attention and layers, as relations between outputs."""

import dataclasses
import math
import sys
import types
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from strategies import EXACT, FIXED, PADDING, batches, build, configs, seeds

import bert
from bert import Bert, BertConfig, BertPretrainModel, SST2BertModel, attention

# ---- Configuration ------------------------------------------------------------------------------


@pytest.mark.parametrize(("size", "count"), [("base", 109_482_240), ("large", 335_141_888)])
def test_published_sizes_have_the_published_number_of_parameters(size, count):
    """The encoder with its pooler has exactly the parameters of the released checkpoints."""
    with torch.device("meta"):
        model = Bert(BertConfig.named(size), PADDING)
    assert sum(p.numel() for p in model.parameters()) == count


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, (768, 768, 768, 12, 3072)),
        ({"d_model": 512}, (512, 512, 512, 8, 2048)),
        ({"d_model": 512, "d_feed_forward": 7}, (512, 512, 512, 8, 7)),
        ({"d_model": 512, "attention_d_k": 80, "head_num": 4}, (512, 80, 512, 4, 2048)),
        ({"d_model": 30}, (30, 30, 30, 1, 120)),
    ],
)
def test_the_widths_of_a_named_size_follow_d_model_unless_they_are_given(changes, expected):
    config = BertConfig.named("base", **changes)
    widths = (config.d_model, config.attention_d_k, config.attention_d_v)
    assert (*widths, config.head_num, config.d_feed_forward) == expected
    assert config.encoder_layers == 12


def test_an_unknown_size_is_rejected_with_the_known_ones():
    with pytest.raises(ValueError, match="tiny, mini, .*, large"):
        BertConfig.named("huge")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("attention_d_k", 11),  # of two heads
        ("attention_d_v", 13),
        ("head_num", 0),
        ("encoder_layers", 0),
        ("vocab_size", -1),
        ("encoder_layers", 2.5),
        ("d_model", "12"),
        ("d_model", True),
        ("max_seq_length", None),
    ],
)
def test_sizes_are_positive_integers_that_heads_divide(name, value):
    with pytest.raises(ValueError, match=f"{name} must be|not divisible by head_num=2"):
        dataclasses.replace(FIXED, **{name: value})


def test_a_config_with_further_fields_checks_all_of_them():
    """Someone who copies bert.py may add a field."""

    @dataclasses.dataclass(frozen=True)
    class Wider(BertConfig):
        experts: int = 2

    assert Wider(experts=3).d_model == 768
    with pytest.raises(ValueError, match="experts must be"):
        Wider(experts=0)
    with pytest.raises(ValueError, match="d_model must be"):
        Wider(d_model=2.5)


def test_the_checks_of_a_config_survive_postponed_annotations():
    """With this import, which many projects have, the type of a field is a string."""
    source = Path(bert.__file__).read_text()
    postponed = source.replace("import json\n", "from __future__ import annotations\nimport json\n")
    copied = types.ModuleType("copied")
    sys.modules["copied"] = copied  # where dataclasses looks
    exec(postponed, vars(copied))
    assert isinstance(vars(copied.BertConfig)["__annotations__"]["d_model"], str)
    with pytest.raises(ValueError, match="d_model must be"):
        copied.BertConfig(d_model=2.5)


def test_every_output_has_the_documented_shape(device):
    """All sizes differ, so no axis can stand in for another."""
    input_ids = torch.randint(1, FIXED.vocab_size, (5, 7), device=device)
    encoder = Bert(FIXED, PADDING).to(device)
    hidden_states = encoder(input_ids)
    assert hidden_states.shape == (5, 7, FIXED.d_model)
    assert encoder.pool(hidden_states).shape == (5, FIXED.d_model)
    pretrain = BertPretrainModel(FIXED, PADDING).to(device)
    mlm_logits, nsp_logits = pretrain(input_ids)
    assert mlm_logits.shape == (5, 7, FIXED.vocab_size)
    assert nsp_logits.shape == (5, 2)
    masked_indices = torch.tensor([3, 34], device=device)
    assert pretrain(input_ids, masked_indices=masked_indices)[0].shape == (2, 31)
    assert SST2BertModel(FIXED, PADDING).to(device)(input_ids).shape == (5, 2)


def test_a_sequence_that_is_too_long_is_rejected():
    with pytest.raises(ValueError, match="18 tokens exceeds max_seq_length=17"):
        Bert(FIXED, PADDING)(torch.ones(1, 18, dtype=torch.long))


# ---- Attention ----------------------------------------------------------------------------------


@given(seeds, st.integers(1, 4), st.integers(1, 5), st.integers(1, 3), st.integers(1, 3))
def test_attention_equals_a_naive_triple_loop(seed, heads, length, d_k, d_v):
    """[Transformer] equation 1 is computed one number at a time."""
    torch.manual_seed(seed)
    q, k = torch.randn(2, heads, length, d_k, dtype=torch.float64)
    v = torch.randn(heads, length, d_v, dtype=torch.float64)
    mask = torch.rand(length) < 0.7
    mask[0] = True
    output, probs = attention(q, k, v, mask)
    for a in range(heads):
        for i in range(length):
            weights = [
                math.exp(sum(float(q[a, i, d] * k[a, j, d]) for d in range(d_k)) / math.sqrt(d_k))
                if mask[j]
                else 0.0
                for j in range(length)
            ]
            expected = [w / sum(weights) for w in weights]
            assert probs[a, i].tolist() == pytest.approx(expected, rel=1e-9)
            assert (probs[a, i, ~mask] == 0).all()
            for d in range(d_v):
                value = sum(p * float(v[a, j, d]) for j, p in enumerate(expected))
                assert float(output[a, i, d]) == pytest.approx(value, rel=1e-9, abs=1e-12)


def test_a_row_of_padding_alone_stays_finite():
    """A mask of -inf would turn such a row, and with it every gradient of the batch, into NaN."""
    for fused in (True, False):
        model = Bert(dataclasses.replace(FIXED, fused_attention=fused), PADDING)
        assert model(torch.tensor([[PADDING, PADDING], [3, 4]])).isfinite().all()


@given(st.data(), configs(), seeds)
def test_fused_and_explicit_attention_are_the_same_function(draw, config, seed):
    """Outputs and gradients agree."""
    input_ids, token_type_ids = draw.draw(batches(config))
    results = []
    for fused in (True, False):
        model = build(Bert, dataclasses.replace(config, fused_attention=fused), seed)
        hidden_states = model(input_ids, token_type_ids)
        real = hidden_states[input_ids != PADDING]
        real.square().sum().backward()
        results.append([real, *(p.grad for p in model.parameters() if p.grad is not None)])
    for fused, explicit in zip(*results, strict=True):
        torch.testing.assert_close(fused, explicit, rtol=1e-7, atol=1e-7)  # eps=1e-12 amplifies


@pytest.mark.gpu
@pytest.mark.parametrize("device", ["cuda"], indirect=True)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("length", [64, 128, 192])
def test_the_fused_attention_has_the_gradients_of_the_explicit_one(length, dtype, device):
    """Some rows are padded: cuDNN's backward has given NaN with a mask, at lengths of 64 modulo
    128."""
    torch.manual_seed(0)
    config = BertConfig.named("base")
    shape = (4, config.head_num, length, 64)
    inputs = [torch.randn(shape, device=device, dtype=dtype, requires_grad=True) for _ in range(3)]
    lengths = torch.tensor([length, length - 1, length // 2, 1], device=device)
    mask = (torch.arange(length, device=device) < lengths[:, None])[:, None, None, :]
    grad = torch.randn(shape, device=device, dtype=dtype) * mask.transpose(-1, -2)
    fused = torch.nn.functional.scaled_dot_product_attention(*inputs, mask)
    explicit, _ = attention(*inputs, mask)
    found = torch.autograd.grad(fused, inputs, grad)
    expected = torch.autograd.grad(explicit, inputs, grad)
    tolerance = 2e-2 if dtype == torch.bfloat16 else 1e-3
    for one, other in zip(found, expected, strict=True):
        assert one.isfinite().all()
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


def test_attention_dropout_acts_on_both_paths_and_only_in_training():
    input_ids = torch.randint(1, FIXED.vocab_size, (2, 9))
    for fused in (True, False):
        config = dataclasses.replace(FIXED, attention_dropout=0.5, fused_attention=fused)
        model = build(Bert, config)
        assert torch.equal(model(input_ids), model(input_ids))
        model.train()
        assert not torch.equal(model(input_ids), model(input_ids))


# ---- Padding, order, segments -------------------------------------------------------------------


@given(st.data(), configs(), seeds, st.integers(1, 5))
def test_padding_never_changes_the_outputs_of_real_tokens(draw, config, seed, more):
    """Neither its amount nor the ids under it change any other column's output."""
    input_ids, token_type_ids = draw.draw(batches(config))
    real = input_ids != PADDING
    model = build(Bert, dataclasses.replace(config, max_seq_length=17), seed)
    expected = model(input_ids, token_type_ids)[real]
    longer = model(F.pad(input_ids, (0, more)), F.pad(token_type_ids, (0, more)))
    torch.testing.assert_close(longer[:, : real.size(1)][real], expected, **EXACT)
    others = torch.where(real, input_ids, torch.randint_like(input_ids, config.vocab_size))
    under = model(others, token_type_ids, attention_mask=real)
    torch.testing.assert_close(under[real], expected, **EXACT)


@pytest.mark.parametrize("cls", [Bert, BertPretrainModel, SST2BertModel])
def test_a_model_hides_the_padding_id_that_it_was_given(cls):
    """A model with heads does so, too; and an explicit mask reaches the encoder."""
    torch.manual_seed(0)
    model = cls(FIXED, 5).eval()
    assert model.padding_idx == 5
    input_ids = torch.tensor([[3, 4, 5]])

    def first(**inputs):
        outputs = model(input_ids, **inputs)
        return outputs if isinstance(outputs, tuple) else (outputs,)

    every = torch.ones(1, 3, dtype=torch.bool)
    hidden = torch.tensor([[True, True, False]])
    for default, shown, masked in zip(
        first(), first(attention_mask=every), first(attention_mask=hidden), strict=True
    ):
        assert not torch.allclose(default, shown)
        assert torch.equal(default, masked)


def test_the_default_is_segment_a_and_a_mask_that_hides_padding():
    model = build(Bert, FIXED)
    input_ids = torch.tensor([[3, 4, PADDING]])
    given_all = model(input_ids, torch.zeros_like(input_ids), input_ids != PADDING)
    assert torch.equal(model(input_ids), given_all)
    assert torch.equal(model(input_ids, attention_mask=torch.tensor([[1, 1, 0]])), given_all)


@given(st.data(), configs(), seeds)
def test_permuting_the_batch_permutes_the_output(draw, config, seed):
    input_ids, token_type_ids = draw.draw(batches(config))
    order = torch.tensor(draw.draw(st.permutations(range(len(input_ids)))))
    model = build(BertPretrainModel, config, seed)
    outputs = model(input_ids, token_type_ids)
    of_permuted = model(input_ids[order], token_type_ids[order])
    for output, permuted in zip(outputs, of_permuted, strict=True):
        torch.testing.assert_close(output[order], permuted, **EXACT)


def test_every_token_reaches_every_output():
    """Attention looks both ways: the gradient of each output reaches each input embedding."""
    model = build(Bert, FIXED)
    found = []
    model.embeddings.register_forward_hook(lambda *a: found.append(a[2].requires_grad_()) or None)
    hidden_states = model(torch.randint(1, FIXED.vocab_size, (1, 6)))
    for i in range(6):
        (gradient,) = torch.autograd.grad(hidden_states[0, i].sum(), found[0], retain_graph=True)
        assert (gradient[0].abs().sum(dim=-1) > 0).all()


def test_order_and_segments_change_the_output():
    model = build(Bert, FIXED)
    input_ids = torch.tensor([[3, 4, 5]])
    swapped = model(torch.tensor([[4, 3, 5]]))
    assert not torch.allclose(model(input_ids)[0, 2], swapped[0, 2])
    other = model(input_ids, torch.tensor([[0, 0, 1]]))
    assert not torch.allclose(model(input_ids)[0, 0], other[0, 0])


# ---- Layers and initial weights -----------------------------------------------------------------


@given(st.data(), configs(), seeds)
def test_every_layer_hands_on_vectors_of_mean_0_and_variance_1(draw, config, seed):
    """LayerNorm comes after the residual sum, so it decides what every layer returns. The bound is
    1e-6 for the mean and 1e-3 for the variance."""
    torch.manual_seed(seed)
    model = Bert(config, PADDING).double().eval()
    hidden_states = model(*draw.draw(batches(config)))
    zeros = torch.zeros(hidden_states.shape[:2], dtype=torch.float64)
    torch.testing.assert_close(hidden_states.mean(-1), zeros, rtol=0, atol=1e-6)
    torch.testing.assert_close(hidden_states.var(-1, unbiased=False), zeros + 1, rtol=0, atol=1e-3)


@pytest.mark.parametrize("model_class", [BertPretrainModel, SST2BertModel])
def test_weights_start_normal_with_deviation_002_and_biases_at_0(model_class):
    """The deviation of n normal numbers is off by more than 5 / sqrt(2n) once in two million."""
    model = model_class(BertConfig.named("tiny"), PADDING)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            assert (parameter == float("weight" in name)).all(), name
        elif name.endswith("bias"):
            assert (parameter == 0).all(), name
        else:
            allowed = 5 / math.sqrt(2 * parameter.numel())
            assert parameter.std().item() == pytest.approx(0.02, rel=allowed), name
            assert parameter.mean().abs() < 5 * 0.02 / math.sqrt(parameter.numel()), name


def test_evaluation_is_deterministic_and_training_is_not():
    config = dataclasses.replace(FIXED, dropout=0.3)
    for cls in (Bert, SST2BertModel):
        model = build(cls, config)
        input_ids = torch.tensor([[3, 4, 5]])
        assert torch.equal(model(input_ids), model(input_ids))
        model.train()
        assert not torch.equal(model(input_ids), model(input_ids))
