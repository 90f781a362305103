"""What the model computes, as relations between its outputs."""

import dataclasses
import json
import math
import re
import warnings

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from strategies import FIXED, PADDING, VOCABULARY, batches, configs, seeds, small_tokenizer
from tokenizers.normalizers import BertNormalizer

import data
from bert import (
    Bert,
    BertConfig,
    BertPretrainModel,
    SST2BertModel,
    attention,
    tokenizer_hash,
)

# Sums of a few dozen terms near 1 in float64, in another order.
EXACT = {"rtol": 1e-10, "atol": 1e-10}


def build(cls, config: BertConfig, seed: int = 0):
    """A model in float64 whose weights are large enough for every part to show in the output."""
    torch.manual_seed(seed)
    model = cls(dataclasses.replace(config, initializer_range=0.5), PADDING).double().eval()
    for name, parameter in model.named_parameters():  # biases and norms, too
        if parameter.dim() == 1:
            torch.nn.init.normal_(parameter, mean=float("norm.weight" in name), std=0.5)
    return model


# ---- Sizes --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("size", "count"), [("base", 109_482_240), ("large", 335_141_888)])
def test_published_sizes_have_the_published_number_of_parameters(size, count):
    """The encoder with its pooler has exactly the parameters of the released checkpoints."""
    with torch.device("meta"):
        model = Bert(BertConfig.named(size), PADDING)
    assert sum(p.numel() for p in model.parameters()) == count


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"attention_d_k": 11}, "attention_d_k=11 is not divisible by head_num=2"),
        ({"attention_d_v": 13}, "attention_d_v=13 is not divisible by head_num=2"),
        ({"head_num": 0}, "head_num must be at least 1, got 0"),
        ({"encoder_layers": 0}, "encoder_layers must be at least 1, got 0"),
        ({"vocab_size": -1}, "vocab_size must be at least 1, got -1"),
        ({"dropout": 1.0}, r"dropout must lie in \[0, 1\), got 1.0"),
        ({"attention_dropout": -0.1}, r"attention_dropout must lie in \[0, 1\), got -0.1"),
    ],
)
def test_sizes_that_do_not_fit_are_refused_with_their_values(changes, words):
    with pytest.raises(ValueError, match=words):
        dataclasses.replace(FIXED, **changes)


def test_a_dropout_of_zero_may_be_an_integer_as_json_writes_it():
    config = dataclasses.replace(FIXED, dropout=0, attention_dropout=0)
    assert Bert(config, PADDING).embeddings.dropout.p == 0


def test_an_unknown_size_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match=r"'huge' is not one of tiny, mini, .*, large"):
        BertConfig.named("huge")


def test_a_named_size_can_be_changed_field_by_field():
    config = BertConfig.named("mini", max_seq_length=9, d_feed_forward=7)
    assert (config.d_model, config.head_num, config.encoder_layers) == (256, 4, 4)
    assert (config.max_seq_length, config.d_feed_forward) == (9, 7)


def test_every_output_has_the_documented_shape(device):
    """With all sizes different, no axis can stand in for another."""
    input_ids = torch.randint(1, FIXED.vocab_size, (5, 7), device=device)
    bert = Bert(FIXED, PADDING).to(device)
    hidden_states = bert(input_ids)
    assert hidden_states.shape == (5, 7, FIXED.d_model)
    assert bert.pool(hidden_states).shape == (5, FIXED.d_model)
    pretrain = BertPretrainModel(FIXED, PADDING).to(device)
    mlm_logits, nsp_logits = pretrain(input_ids)
    assert mlm_logits.shape == (5, 7, FIXED.vocab_size)
    assert nsp_logits.shape == (5, 2)
    assert pretrain(input_ids, positions=torch.tensor([3, 34], device=device))[0].shape == (2, 31)
    assert SST2BertModel(FIXED, PADDING).to(device)(input_ids).shape == (5, 2)


def test_a_sequence_that_is_too_long_is_refused():
    with pytest.raises(ValueError, match="18 tokens exceeds max_seq_length=17"):
        Bert(FIXED, PADDING)(torch.ones(1, 18, dtype=torch.long))


# ---- Attention ----------------------------------------------------------------------------------


@given(seeds, st.integers(1, 4), st.integers(1, 5), st.integers(1, 3), st.integers(1, 3))
def test_attention_equals_a_naive_triple_loop(seed, heads, length, d_k, d_v):
    """[Transformer] equation 1, one number at a time."""
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
            for d in range(d_v):
                value = sum(p * float(v[a, j, d]) for j, p in enumerate(expected))
                assert float(output[a, i, d]) == pytest.approx(value, rel=1e-9, abs=1e-12)


@given(seeds, st.integers(1, 6))
def test_probabilities_sum_to_one_and_are_zero_on_padding(seed, real):
    torch.manual_seed(seed)
    q, k, v = torch.randn(3, 2, 4, 6, 5)
    mask = torch.arange(6) < real
    _, probs = attention(q, k, v, mask)
    torch.testing.assert_close(probs.sum(dim=-1), torch.ones(2, 4, 6))
    assert (probs[..., real:] == 0).all()
    assert (probs[..., :real] > 0).all()


def test_a_row_of_padding_alone_stays_finite():
    """A -inf in every place of a row would make it NaN, and with it the gradient of the batch."""
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
    """Neither more of it, nor what ids stand under it."""
    input_ids, token_type_ids = draw.draw(batches(config))
    real = input_ids != PADDING
    model = build(Bert, dataclasses.replace(config, max_seq_length=17), seed)
    expected = model(input_ids, token_type_ids)[real]
    longer = model(F.pad(input_ids, (0, more)), F.pad(token_type_ids, (0, more)))
    torch.testing.assert_close(longer[:, : real.size(1)][real], expected, **EXACT)
    others = torch.where(real, input_ids, torch.randint_like(input_ids, config.vocab_size))
    under = model(others, token_type_ids, attention_mask=real)
    torch.testing.assert_close(under[real], expected, **EXACT)


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


def test_positions_and_segments_change_the_output():
    model = build(Bert, FIXED)
    input_ids = torch.tensor([[3, 4, 5]])
    swapped = model(torch.tensor([[4, 3, 5]]))
    assert not torch.allclose(model(input_ids)[0, 2], swapped[0, 2])
    other = model(input_ids, torch.tensor([[0, 0, 1]]))
    assert not torch.allclose(model(input_ids)[0, 0], other[0, 0])


def test_the_default_segment_is_a_and_the_default_mask_hides_padding():
    model = build(Bert, FIXED)
    input_ids = torch.tensor([[3, 4, PADDING]])
    given_all = model(input_ids, torch.zeros_like(input_ids), input_ids != PADDING)
    assert torch.equal(model(input_ids), given_all)
    assert torch.equal(model(input_ids, attention_mask=torch.tensor([[1, 1, 0]])), given_all)


# ---- Layers, initialization, heads --------------------------------------------------------------


@given(st.data(), configs(), seeds)
def test_every_layer_hands_on_vectors_of_mean_0_and_variance_1(draw, config, seed):
    """LayerNorm comes after the residual sum, so it has the last word in every layer. Checked to
    1e-6 where the norm's eps is far below the variance that it divides by."""
    torch.manual_seed(seed)
    model = Bert(config, PADDING).double().eval()
    hidden_states = model(*draw.draw(batches(config)))
    zeros = torch.zeros(hidden_states.shape[:2], dtype=torch.float64)
    torch.testing.assert_close(hidden_states.mean(-1), zeros, rtol=0, atol=1e-6)
    torch.testing.assert_close(hidden_states.var(-1, unbiased=False), zeros + 1, rtol=0, atol=1e-3)


def test_weights_start_normal_with_deviation_002_and_biases_at_0():
    """The deviation of n normal numbers is off by more than 5 / sqrt(2n) once in two million."""
    model = BertPretrainModel(BertConfig.named("tiny"), PADDING)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            assert (parameter == float("weight" in name)).all(), name
        elif name.endswith("bias"):
            assert (parameter == 0).all(), name
        else:
            allowed = 5 / math.sqrt(2 * parameter.numel())
            assert parameter.std().item() == pytest.approx(0.02, rel=allowed), name
            assert parameter.mean().abs() < 5 * 0.02 / math.sqrt(parameter.numel()), name


@pytest.mark.parametrize("size", ["tiny", "mini"])
def test_the_first_loss_is_ln_v_plus_ln_2(size, device):
    """An untrained model knows nothing, and says so: to 5%."""
    model = BertPretrainModel(BertConfig.named(size), PADDING).to(device)
    input_ids = torch.randint(1, 30522, (4, 64), device=device)
    mlm_logits, nsp_logits = model(input_ids)
    loss = F.cross_entropy(mlm_logits.flatten(0, 1), input_ids.flatten())
    loss += F.cross_entropy(nsp_logits, torch.tensor([0, 1, 0, 1], device=device))
    assert loss.item() == pytest.approx(math.log(30522) + math.log(2), rel=0.05)


@given(st.data(), configs(), seeds)
def test_logits_at_positions_are_those_of_the_full_logits(draw, config, seed):
    input_ids, token_type_ids = draw.draw(batches(config))
    places = st.integers(0, input_ids.numel() - 1)
    positions = torch.tensor(draw.draw(st.lists(places, max_size=4)), dtype=torch.long)
    model = build(BertPretrainModel, config, seed)
    everywhere, nsp_logits = model(input_ids, token_type_ids)
    there, same_nsp_logits = model(input_ids, token_type_ids, positions=positions)
    torch.testing.assert_close(there, everywhere.flatten(0, 1)[positions], **EXACT)
    assert torch.equal(nsp_logits, same_nsp_logits)


def test_the_pooler_feeds_next_sentence_prediction_alone():
    model = build(BertPretrainModel, FIXED)
    input_ids = torch.tensor([[3, 4, 5]])
    mlm_logits, nsp_logits = model(input_ids)
    torch.nn.init.normal_(model.bert.pooler.weight)
    changed_mlm_logits, changed_nsp_logits = model(input_ids)
    assert torch.equal(mlm_logits, changed_mlm_logits)
    assert not torch.allclose(nsp_logits, changed_nsp_logits)


def test_the_decoder_is_the_token_embedding():
    """Changing a token's embedding changes its logit, and no other parameter has V x H numbers."""
    model = build(BertPretrainModel, FIXED)
    input_ids = torch.tensor([[3, 4, 5]])
    before, _ = model(input_ids)
    with torch.no_grad():
        model.bert.embeddings.token.weight[7] += 1.0
    after, _ = model(input_ids)
    changed = (before - after).abs().amax(dim=(0, 1)) > 0
    assert changed.nonzero().flatten().tolist() == [7]
    shape = (FIXED.vocab_size, FIXED.d_model)
    assert sum(p.shape == shape for p in model.parameters()) == 1


def test_the_decoder_stays_tied_through_training_saving_and_loading(tmp_path):
    """After a step that moved both uses of the matrix, and a round trip over the disk."""
    model = build(BertPretrainModel, FIXED).float()
    before = model.bert.embeddings.token.weight.detach().clone()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(torch.tensor([[3, 4, 5]]))[0].logsumexp(-1).sum().backward()
    optimizer.step()
    model.save_pretrained(tmp_path, small_tokenizer())
    for trained in (model, BertPretrainModel.from_pretrained(tmp_path)):
        embeddings = trained.bert.embeddings.token.weight
        assert not torch.equal(embeddings, before)
        found = []
        trained.mlm_norm.register_forward_hook(lambda *a, found=found: found.append(a[2]) or None)
        mlm_logits, _ = trained(torch.tensor([[3, 4, 5]]))
        torch.testing.assert_close(mlm_logits, found[0] @ embeddings.T + trained.mlm_bias)


def test_every_parameter_gets_a_gradient_from_the_pretraining_loss():
    """Except the key bias: it adds the same to all scores of a query, and softmax ignores that."""
    model = build(BertPretrainModel, dataclasses.replace(FIXED, max_seq_length=6))
    input_ids = torch.randint(1, FIXED.vocab_size, (3, 6))
    mlm_logits, nsp_logits = model(input_ids, torch.tensor([[0, 0, 0, 1, 1, 1]] * 3))
    (mlm_logits.logsumexp(-1).sum() + nsp_logits.logsumexp(-1).sum()).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        if name.endswith("key.bias"):
            assert parameter.grad.abs().max() < 1e-12, name
        else:
            assert parameter.grad.abs().max() > 1e-9, name


def test_evaluation_is_deterministic_and_training_is_not():
    config = dataclasses.replace(FIXED, dropout=0.3)
    for cls in (Bert, SST2BertModel):
        model = build(cls, config)
        input_ids = torch.tensor([[3, 4, 5]])
        assert torch.equal(model(input_ids), model(input_ids))
        model.train()
        assert not torch.equal(model(input_ids), model(input_ids))


# ---- Weights in and out -------------------------------------------------------------------------


@pytest.mark.parametrize("cls", [Bert, BertPretrainModel, SST2BertModel])
def test_what_is_saved_is_what_is_loaded(cls, tmp_path):
    """Also with d_k, d_v and d_model all different, which the format has no word for."""
    model = build(cls, FIXED).float()
    model.save_pretrained(tmp_path, small_tokenizer())
    loaded = cls.from_pretrained(tmp_path)
    assert loaded.config == model.config
    assert loaded.state_dict().keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name


def test_the_encoder_survives_from_pretraining_to_fine_tuning(tmp_path):
    """Only the classifier is new, and the warning names its tensors."""
    pretrained = build(BertPretrainModel, FIXED).float()
    pretrained.save_pretrained(tmp_path, small_tokenizer())
    with pytest.warns(UserWarning, match=r"classifier\.weight, classifier\.bias$"):
        model = SST2BertModel.from_pretrained(tmp_path)
    for name, tensor in pretrained.bert.state_dict().items():
        assert torch.equal(model.bert.state_dict()[name], tensor), name


def test_an_encoder_with_a_missing_tensor_is_refused(tmp_path):
    """All that are missing are named; the pooler, which not every checkpoint has, in a warning."""
    from safetensors.torch import load_file, save_file

    Bert(FIXED, PADDING).save_pretrained(tmp_path, small_tokenizer())
    tensors = load_file(tmp_path / "model.safetensors")
    for name in ("pooler.dense.weight", "pooler.dense.bias"):
        del tensors[name]
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.warns(UserWarning, match=r"not in .*: pooler\.weight, pooler\.bias$"):
        Bert.from_pretrained(tmp_path)
    del tensors["embeddings.LayerNorm.weight"]
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"the encoder is missing: embeddings\.norm\.weight$"):
        Bert.from_pretrained(tmp_path)
    del tensors["encoder.layer.1.output.dense.bias"]
    save_file(tensors, tmp_path / "model.safetensors")
    both = r"the encoder is missing: embeddings\.norm\.weight, layers\.1\.contract\.bias$"
    with pytest.raises(ValueError, match=both):
        Bert.from_pretrained(tmp_path)


def test_weights_of_another_shape_than_the_config_are_refused(tmp_path):
    """Each that differs is named with both shapes, on one line."""
    Bert(FIXED, PADDING).save_pretrained(tmp_path, small_tokenizer())
    with pytest.raises(ValueError, match="size mismatch for layers.0.expand.weight") as refused:
        Bert.from_pretrained(tmp_path, d_feed_forward=23)
    assert "[22, 12]" in str(refused.value)
    assert "[23, 12]" in str(refused.value)
    assert "layers.2.contract.weight" in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_directory_without_a_model_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"no BERT can be read from .*config\.json"):
        Bert.from_pretrained(tmp_path)
    Bert(FIXED, PADDING).save_pretrained(tmp_path, small_tokenizer())
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"no BERT can be read from .*model\.safetensors"):
        Bert.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("model_type", "roberta"),
        ("hidden_act", "gelu_new"),
        ("position_embedding_type", "relative_key"),
        ("is_decoder", True),
        ("add_cross_attention", True),
        ("tie_word_embeddings", False),
    ],
)
def test_a_model_that_is_not_bert_is_refused_by_what_differs(field, value, tmp_path):
    """Its weights would fit, and its outputs be wrong."""
    Bert(FIXED, PADDING).save_pretrained(tmp_path, small_tokenizer())
    published = json.loads((tmp_path / "config.json").read_text()) | {field: value}
    (tmp_path / "config.json").write_text(json.dumps(published))
    with pytest.raises(ValueError, match=f"{field} is {value!r}, not "):
        Bert.from_pretrained(tmp_path)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
@pytest.mark.parametrize("damage", ["cut", "zeros", "empty"])
def test_damaged_files_are_refused_in_one_line(name, damage, tmp_path):
    Bert(FIXED, PADDING).save_pretrained(tmp_path, small_tokenizer())
    content = (tmp_path / name).read_bytes()
    half = content[: len(content) // 2]
    damaged = {"cut": half, "zeros": bytes(len(content)), "empty": b""}[damage]
    (tmp_path / name).write_bytes(damaged)
    with pytest.raises(ValueError, match="no BERT can be read from ") as refused:
        Bert.from_pretrained(tmp_path)
    assert "\n" not in str(refused.value)


def split_into_shards(tensors: dict, folder, stem: str, save) -> list:
    """Three files and their index, as large models are published."""
    first, last = stem.split(".")
    names = [f"{first}-{i:05}-of-00003.{last}" for i in (1, 2, 3)]
    of_tensor = {tensor: names[i % 3] for i, tensor in enumerate(sorted(tensors))}
    for name in names:
        save({t: tensors[t] for t in tensors if of_tensor[t] == name}, folder / name)
    (folder / f"{stem}.index.json").write_text(json.dumps({"weight_map": of_tensor}))
    return [folder / name for name in names]


@pytest.mark.parametrize("shards", [False, True])
@pytest.mark.parametrize("stem", ["model.safetensors", "pytorch_model.bin"])
def test_every_way_to_publish_weights_loads_the_same(stem, shards, tmp_path):
    """One file or shards, safetensors or torch's own format; and no shard may be missing."""
    from safetensors.torch import load_file, save_file

    model = build(BertPretrainModel, FIXED).float()
    model.save_pretrained(tmp_path, small_tokenizer())
    tensors = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    save = save_file if stem.endswith("safetensors") else torch.save
    if shards:
        files = split_into_shards(tensors, tmp_path, stem, save)
    else:
        files = [tmp_path / stem]
        save(tensors, files[0])
    loaded = BertPretrainModel.from_pretrained(tmp_path)
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    files[-1].unlink()
    with pytest.raises(
        ValueError, match=r"it has neither model\.safetensors nor|-00003-of-00003\.\w+ is missing"
    ):
        BertPretrainModel.from_pretrained(tmp_path)


def test_safetensors_are_read_where_both_formats_are(tmp_path):
    model = build(Bert, FIXED).float()
    model.save_pretrained(tmp_path, small_tokenizer())
    torch.save({"embeddings.LayerNorm.weight": torch.zeros(12)}, tmp_path / "pytorch_model.bin")
    loaded = Bert.from_pretrained(tmp_path)
    assert torch.equal(loaded.embeddings.norm.weight, model.embeddings.norm.weight)


class Malicious:
    """What unpickling would run: here it only leaves a file."""

    def __init__(self, file: str) -> None:
        self.file = file

    def __reduce__(self):
        return open, (self.file, "w")


def test_a_malicious_pickle_is_refused_and_never_run(tmp_path):
    Bert(FIXED, PADDING).save_pretrained(tmp_path, small_tokenizer())
    (tmp_path / "model.safetensors").unlink()
    torch.save({"a": Malicious(str(tmp_path / "run"))}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="Weights only load failed") as refused:
        Bert.from_pretrained(tmp_path)
    assert "weights_only" not in str(refused.value)  # torch's advice is how to run it
    assert not (tmp_path / "run").exists()
    torch.load(tmp_path / "pytorch_model.bin", weights_only=False)  # it would have
    assert (tmp_path / "run").exists()


@pytest.mark.parametrize("changes", [{}, {"attention_d_k": 10}, {"attention_d_v": 14}])
def test_a_shape_that_the_format_has_no_word_for_is_announced(changes, tmp_path):
    config = dataclasses.replace(FIXED, **{"attention_d_k": 12, "attention_d_v": 12, **changes})
    with warnings.catch_warnings(record=True) as announced:
        warnings.simplefilter("always")
        Bert(config, PADDING).save_pretrained(tmp_path, small_tokenizer())
    assert ["only bert.py opens this" in str(w.message) for w in announced] == [True] * len(changes)
    assert Bert.from_pretrained(tmp_path).config == config


def test_the_files_of_a_model_are_the_published_ones(tmp_path):
    """Plain JSON, safetensors and a vocabulary, in a folder that is made: nothing pickled. What is
    written is all that another program needs, under the names that it looks for."""
    from safetensors import safe_open

    folder, tokenizer = tmp_path / "new" / "model", small_tokenizer()
    BertPretrainModel(FIXED, 3).save_pretrained(folder, tokenizer)
    names = [
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "vocab.txt",
    ]
    assert sorted(path.name for path in folder.iterdir()) == names
    config = {
        "max_position_embeddings": 17, "vocab_size": 31, "hidden_size": 12, "attention_d_k": 10,
        "attention_d_v": 14, "num_attention_heads": 2, "intermediate_size": 22,
        "num_hidden_layers": 3, "type_vocab_size": 2, "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0, "layer_norm_eps": 1e-12, "initializer_range": 0.02,
        "fused_attention": True, "model_type": "bert", "hidden_act": "gelu",
        "position_embedding_type": "absolute", "is_decoder": False, "add_cross_attention": False,
        "tie_word_embeddings": True, "architectures": ["BertForPreTraining"], "pad_token_id": 3,
        "tokenizer_hash": tokenizer_hash(tokenizer),
    }  # fmt: skip
    assert (folder / "config.json").read_text() == json.dumps(config, indent=2)
    about = {"tokenizer_class": "BertTokenizer", "model_max_length": 17, "do_lower_case": True}
    assert (folder / "tokenizer_config.json").read_text() == json.dumps(about, indent=2)
    assert data.load_tokenizer(folder / "tokenizer.json").get_vocab() == tokenizer.get_vocab()
    assert (folder / "vocab.txt").read_text().split() == VOCABULARY
    with safe_open(folder / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
        published = {
            "bert.embeddings.word_embeddings.weight",
            "bert.encoder.layer.2.attention.self.query.bias",
            "bert.encoder.layer.0.attention.output.LayerNorm.weight",
            "bert.encoder.layer.1.intermediate.dense.weight",
            "bert.pooler.dense.bias", "cls.predictions.bias", "cls.seq_relationship.weight",
        }  # fmt: skip
        assert published < set(file.keys())
        assert len(file.keys()) == 5 + 3 * 16 + 2 + 5 + 2


@pytest.mark.parametrize("lowercase", [True, False, None])
def test_whether_text_is_lowercased_is_written_for_others_to_read(tmp_path, lowercase):
    """None: a tokenizer that does not normalize its text at all."""
    tokenizer = small_tokenizer()
    tokenizer.normalizer = None if lowercase is None else BertNormalizer(lowercase=lowercase)
    Bert(FIXED, PADDING).save_pretrained(tmp_path, tokenizer)
    about = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert about["do_lower_case"] is bool(lowercase)


def test_the_names_that_tensorflow_gave_to_norms_are_understood(tmp_path):
    """The most used checkpoint of all has gamma and beta for weight and bias."""
    from safetensors.torch import load_file, save_file

    model = build(Bert, FIXED).float()
    model.save_pretrained(tmp_path, small_tokenizer())
    old = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
    tensors = load_file(tmp_path / "model.safetensors")
    for ours, theirs in old.items():
        tensors = {name.replace(ours, theirs): t for name, t in tensors.items()}
    assert "embeddings.LayerNorm.gamma" in tensors
    save_file(tensors, tmp_path / "model.safetensors")
    loaded = Bert.from_pretrained(tmp_path)
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name


def test_a_loaded_model_is_in_evaluation_mode(tmp_path):
    """As in transformers: the same input twice has the same output."""
    Bert(FIXED, PADDING).save_pretrained(tmp_path, small_tokenizer())
    assert not Bert.from_pretrained(tmp_path).training


def test_the_hash_of_a_tokenizer_changes_with_any_token_or_id():
    tokens = {token: i for i, token in enumerate(VOCABULARY)}
    swapped = {**tokens, "a": tokens["b"], "b": tokens["a"]}
    renamed = {("new" if token == "z" else token): i for token, i in tokens.items()}
    hashes = [tokenizer_hash(data.wordpiece(v)) for v in (tokens, swapped, renamed)]
    assert hashes[0] == tokenizer_hash(small_tokenizer())
    assert len(set(hashes)) == 3
    assert all(re.fullmatch("v2-[0-9a-f]{16}", found) for found in hashes)


@pytest.mark.parametrize(("written", "read"), [(3, 3), (None, 0), ("absent", 0)])
def test_a_published_config_needs_no_field_of_ours(tmp_path, written, read):
    """d_k and d_v are then the width, and padding is token 0 unless the file says otherwise."""
    config = dataclasses.replace(FIXED, attention_d_k=12, attention_d_v=12)
    Bert(config, PADDING).save_pretrained(tmp_path, small_tokenizer())
    published = json.loads((tmp_path / "config.json").read_text())
    for name in ("attention_d_k", "attention_d_v", "fused_attention", "tokenizer_hash"):
        del published[name]
    published["pad_token_id"] = written
    if written == "absent":
        del published["pad_token_id"]
    (tmp_path / "config.json").write_text(json.dumps(published))
    model = Bert.from_pretrained(tmp_path)
    assert model.config == config
    assert model.padding_idx == read


@pytest.mark.parametrize("cls", [Bert, BertPretrainModel, SST2BertModel])
def test_a_model_hides_the_padding_that_it_was_given(cls):
    """Also inside a model with heads; and an explicit mask reaches the encoder."""
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


def test_a_new_classifier_starts_as_the_other_matrices_do():
    """2 x 1024 numbers of N(0, 0.02), to five deviations, and no bias."""
    model = SST2BertModel(BertConfig.named("large", encoder_layers=1, vocab_size=9), PADDING)
    weight = model.classifier.weight
    assert weight.std().item() == pytest.approx(0.02, rel=5 / math.sqrt(2 * weight.numel()))
    assert (model.classifier.bias == 0).all()
