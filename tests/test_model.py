"""The encoder: configuration, embeddings, attention and layers, as relations between outputs."""

import dataclasses
import math
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from strategies import EXACT, FIXED, PADDING, build, cases, seeds, with_config

from bert import Bert, BertConfig, BertPretrainModel, SST2BertModel, attention

# ---- Configuration ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "count"),
    [
        ("tiny", 4_385_920),
        ("mini", 11_170_560),
        ("small", 28_763_648),
        ("medium", 41_373_184),
        ("base", 109_482_240),
        ("large", 335_141_888),
    ],
)
def test_published_sizes_have_the_published_number_of_parameters(size, count):
    """The encoder with its pooler has exactly the parameters of the released checkpoints."""
    with torch.device("meta"):
        model = Bert(BertConfig.named(size), PADDING)
    assert sum(p.numel() for p in model.parameters()) == count


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, (768, 768, 768, 12, 3072)),
        ({"d_model": 512, "attention_d_k": 80, "head_num": 4}, (512, 80, 512, 4, 2048)),
        ({"d_model": 30}, (30, 30, 30, 1, 120)),
    ],
)
def test_the_widths_of_a_named_size_follow_d_model_unless_they_are_given(changes, expected):
    config = BertConfig.named("base", **changes)
    widths = (config.d_model, config.attention_d_k, config.attention_d_v)
    assert (*widths, config.head_num, config.d_feed_forward) == expected
    assert config.encoder_layers == 12


def test_a_config_is_that_of_base_unless_something_is_given():
    config = BertConfig()
    assert config == BertConfig.named("base")
    assert (config.dropout, config.attention_dropout) == (0.1, 0.1)
    assert (config.layer_norm_eps, config.initializer_range) == (1e-12, 0.02)
    assert (config.type_vocab_size, config.num_labels) == (2, 2)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.head_num = 3


@pytest.mark.parametrize("name", ["attention_d_k", "attention_d_v"])
def test_widths_that_the_heads_do_not_divide_are_rejected(name):
    with pytest.raises(ValueError, match=f"{name}=11 is not divisible by head_num=2"):
        dataclasses.replace(FIXED, **{name: 11})


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
    assert torch.equal(attention(q, k, v, mask, dropout=0.5)[1], probs)  # those before dropout
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


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("is_bfloat16", [True, False])
def test_rows_with_padding_have_finite_outputs_and_gradients(fused, is_bfloat16, device):
    """A mask of -inf would turn a row of padding alone, and with it every gradient of the batch,
    into NaN. So did cuDNN's backward with any mask, at lengths of 64 modulo 128."""
    config = BertConfig.named("tiny", vocab_size=31, fused_attention=fused)
    model = Bert(config, PADDING).to(device)
    lengths = torch.tensor([64, 63, 32, 1, 0], device=device)
    is_token = torch.arange(64, device=device) < lengths[:, None]
    with torch.autocast(device.type, torch.bfloat16, enabled=is_bfloat16):
        hidden_states = model(torch.where(is_token, 7, PADDING))
        loss = hidden_states.square().sum() + model.pool(hidden_states).sum()
    loss.backward()
    assert hidden_states.isfinite().all()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


def test_making_a_model_switches_the_attention_of_cudnn_off():
    """Its backward gives NaN (see the test above)."""
    torch.backends.cuda.enable_cudnn_sdp(True)
    Bert(FIXED, PADDING)
    assert not torch.backends.cuda.cudnn_sdp_enabled()


@given(cases(Bert))
def test_fused_and_explicit_attention_are_the_same_function(case):
    """Outputs and gradients agree, and the config decides which one it is."""
    results = []
    for fused in (True, False):
        model = with_config(case.model, fused_attention=fused)
        with mock.patch("bert.attention", wraps=attention) as explicit:
            real = model(case.input_ids, case.token_type_ids)[case.is_token]
        assert explicit.called is not fused
        real.square().sum().backward()
        results.append([real, *(p.grad for p in model.parameters() if p.grad is not None)])
    for fused, explicit in zip(*results, strict=True):
        torch.testing.assert_close(fused, explicit, rtol=1e-7, atol=1e-7)  # eps=1e-12 amplifies


# ---- Padding, order, segments -------------------------------------------------------------------


@given(cases(Bert, room=5), st.integers(1, 5))
def test_padding_never_changes_the_outputs_of_real_tokens(case, more):
    """Neither the amount of padding nor the ids in its columns change any other column's output."""
    model, input_ids, token_type_ids, real = case
    expected = model(input_ids, token_type_ids)[real]
    padded = F.pad(input_ids, (0, more), value=model.padding_idx)
    longer = model(padded, F.pad(token_type_ids, (0, more)))
    torch.testing.assert_close(longer[:, : real.size(1)][real], expected, **EXACT)
    others = torch.where(real, input_ids, torch.randint_like(input_ids, model.config.vocab_size))
    under = model(others, token_type_ids, attention_mask=real)
    torch.testing.assert_close(under[real], expected, **EXACT)


@pytest.mark.parametrize("fused", [True, False])
def test_padding_is_hidden_under_bfloat16_autocast(fused, device):
    """Other ids in padded columns change no bit. The amount of padding changes no more than
    rounding does: less than a tenth of what it would change if it were attended to."""
    model = build(Bert, dataclasses.replace(FIXED, fused_attention=fused)).float().to(device)
    input_ids = torch.randint(1, FIXED.vocab_size, (4, 9), device=device)
    longer = F.pad(input_ids, (0, 8), value=PADDING)
    mask = longer != PADDING
    others = torch.where(mask, longer, torch.randint_like(longer, FIXED.vocab_size))
    with torch.autocast(device.type, torch.bfloat16):
        expected, found = model(input_ids), model(longer)[:, :9]
        under = model(others, attention_mask=mask)[:, :9]
        attended = model(longer, attention_mask=torch.ones_like(mask))[:, :9]
    assert torch.equal(found, under)
    assert (found - expected).norm() < 0.1 * (attended - expected).norm()


# ---- Layers and initial weights -----------------------------------------------------------------


@given(cases(Bert))
def test_the_encoder_returns_vectors_of_mean_0_and_variance_1(case):
    """LayerNorm comes after the residual sum, so it decides what every layer returns. The bound is
    1e-6 for the mean and 1e-3 for the variance."""
    config = dataclasses.replace(case.model.config, layer_norm_eps=1e-12)
    model = Bert(config, case.model.padding_idx).double().eval()
    hidden_states = model(case.input_ids, case.token_type_ids)
    zeros = torch.zeros(hidden_states.shape[:2], dtype=torch.float64)
    torch.testing.assert_close(hidden_states.mean(-1), zeros, rtol=0, atol=1e-6)
    torch.testing.assert_close(hidden_states.var(-1, unbiased=False), zeros + 1, rtol=0, atol=1e-3)


@pytest.mark.parametrize("deviation", [0.02, 0.3])
@pytest.mark.parametrize("cls", [BertPretrainModel, SST2BertModel])
def test_weights_start_normal_with_the_deviation_of_the_config_and_biases_at_0(cls, deviation):
    """The deviation of n normal numbers is off by more than 5 / sqrt(2n) once in two million."""
    model = cls(BertConfig.named("tiny", initializer_range=deviation), PADDING)
    model.added = torch.nn.Linear(128, 64, bias=False)  # a head of one's own
    model.init_weights(model.added)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            assert (parameter == float("weight" in name)).all(), name
        elif name.endswith("bias"):
            assert (parameter == 0).all(), name
        else:
            allowed = 5 / math.sqrt(2 * parameter.numel())
            assert parameter.std().item() == pytest.approx(deviation, rel=allowed), name
            assert parameter.mean().abs() < 5 * deviation / math.sqrt(parameter.numel()), name


# ---- Dropout ------------------------------------------------------------------------------------

SITES = {
    "embeddings": "dropout",
    "attention probabilities": "attention_dropout",
    "after attention": "dropout",
    "after feed-forward": "dropout",
    "classifier": "dropout",
}


def outputs_of_site(site: str, model: SST2BertModel, copies: int) -> torch.Tensor:
    """Returns what the part of a model around one dropout site computes from copies of an input. No
    norm follows the site, and the layer's other sublayer outputs 0, so that the mean can be seen.
    """
    x = torch.linspace(-1, 1, 5 * FIXED.d_model, dtype=torch.float64).cos().view(1, 5, -1)
    x = x.expand(copies, -1, -1)
    input_ids = torch.tensor([[3, 4, 5, 6, 7]]).expand(copies, -1)
    mask = torch.ones(1, 1, 1, 5, dtype=torch.bool)
    layer = model.bert.layers[0]
    layer.attention_norm = layer.feed_forward_norm = torch.nn.Identity()
    if site == "embeddings":
        return model.bert.embeddings(input_ids, torch.zeros_like(input_ids))
    if site == "attention probabilities":
        return layer.attention(x, mask)
    if site == "classifier":
        model.bert.eval()
        return model(input_ids)
    layer.attention.eval()
    zero = layer.contract if site == "after attention" else layer.attention.output
    torch.nn.init.zeros_(zero.weight)
    torch.nn.init.zeros_(zero.bias)
    return layer(x, mask)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize(("site", "field"), SITES.items())
def test_dropout_acts_at_each_site_in_training_alone_and_keeps_the_mean(site, field, fused):
    """The mean of 3,000 masks is within five standard errors of the output without dropout. A site
    has the probability of its own field of the config."""
    config = dataclasses.replace(FIXED, fused_attention=fused)
    model = build(SST2BertModel, dataclasses.replace(config, **{field: 0.4}))
    expected = outputs_of_site(site, model, 2)
    torch.testing.assert_close(expected[0], expected[1], **EXACT)
    found = outputs_of_site(site, model.train(), 3000)
    error = found.std(dim=0) / math.sqrt(3000)
    assert error.max() > 1e-3
    assert ((found.mean(dim=0) - expected[0]).abs() <= 5 * error + 1e-9).all()
    (other,) = {*SITES.values()} - {field}
    model = build(SST2BertModel, dataclasses.replace(config, **{other: 0.4}))
    torch.testing.assert_close(outputs_of_site(site, model.train(), 2), expected, **EXACT)
