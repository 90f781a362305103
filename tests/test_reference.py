"""The oracle: transformers' BERT with the same weights, copied over the published names.

float64 is compared to 1e-9. In float32, 2e-5 is a hundred rounding errors of numbers near 1, which
is what a different order of summation makes of three layers.
"""

import dataclasses
import itertools
import warnings

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from strategies import (
    CPU,
    FIXED,
    PADDING,
    SMALL,
    VOCABULARY,
    any_words,
    batches,
    build,
    configs,
    familiar_words,
    seeds,
    small_tokenizer,
    some_batches,
)

import data
from bert import SIZES, Bert, BertConfig, BertPretrainModel, SST2BertModel, published_name
from experiments.attention import attention_probs
from train_pretrain import PretrainLosses, add_gradients, learning_rate, make_optimizer, to_device
from train_pretrain import update

transformers = pytest.importorskip("transformers")


KINDS = ("weight", "bias")


def oracle(model, cls):
    """Returns transformers' model with the weights of ours; no name may be missing or left over."""
    ours = model.config
    config = transformers.BertConfig(
        vocab_size=ours.vocab_size,
        hidden_size=ours.d_model,
        num_hidden_layers=ours.encoder_layers,
        num_attention_heads=ours.head_num,
        intermediate_size=ours.d_feed_forward,
        hidden_act="gelu",
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        max_position_embeddings=ours.max_seq_length,
        type_vocab_size=ours.type_vocab_size,
        pad_token_id=model.padding_idx,
    )
    theirs = cls(config).to(next(model.parameters()).dtype).eval()
    state = {published_name(name): tensor.clone() for name, tensor in model.state_dict().items()}
    missing, left_over = theirs.load_state_dict(state, strict=False)
    assert left_over == []
    assert all(name.startswith("cls.predictions.decoder") for name in missing)  # tied there, too
    theirs.tie_weights()
    return theirs


def compare(ours, theirs, tolerance):
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


@given(st.data(), configs(published=True), seeds, st.sampled_from([True, False]))
def test_hidden_states_and_pooled_output_equal_those_of_transformers(data, config, seed, fused):
    input_ids, token_type_ids = data.draw(batches(config))
    model = build(Bert, dataclasses.replace(config, fused_attention=fused), seed)
    mask = input_ids != PADDING
    theirs = oracle(model, transformers.BertModel)(input_ids, mask, token_type_ids)
    hidden_states = model(input_ids, token_type_ids)
    compare(hidden_states[mask], theirs.last_hidden_state[mask], 1e-9)
    compare(model.pool(hidden_states), theirs.pooler_output, 1e-9)


@given(st.data(), configs(published=True), seeds)
def test_logits_loss_and_every_gradient_equal_those_of_transformers(data, config, seed):
    """The tied matrix gets the sum of its two gradients in both."""
    input_ids, token_type_ids = data.draw(batches(config))
    model = build(BertPretrainModel, config, seed)
    theirs = oracle(model, transformers.BertForPreTraining)
    mask = input_ids != PADDING
    labels = torch.where(mask & (torch.rand(mask.shape) < 0.5), input_ids, -100)
    labels[0, 0] = 1  # a label in every batch
    nsp_labels = torch.randint(0, 2, (len(input_ids),))
    expected = theirs(
        input_ids, mask, token_type_ids, labels=labels, next_sentence_label=nsp_labels
    )
    positions = (labels != -100).flatten().nonzero().flatten()
    mlm_logits, nsp_logits = model(input_ids, token_type_ids, positions=positions)
    compare(mlm_logits, expected.prediction_logits.flatten(0, 1)[positions], 1e-9)
    compare(nsp_logits, expected.seq_relationship_logits, 1e-9)
    cross_entropy = torch.nn.functional.cross_entropy
    loss = cross_entropy(mlm_logits, labels.flatten()[positions])
    loss = loss + cross_entropy(nsp_logits, nsp_labels)
    compare(loss, expected.loss, 1e-9)
    loss.backward()
    expected.loss.backward()
    gradients = {name: p.grad for name, p in theirs.named_parameters()}
    scale = max(float(g.abs().max()) for g in gradients.values())
    for name, parameter in model.named_parameters():
        compare(parameter.grad / scale, gradients[published_name(name)] / scale, 1e-9)


def their_loss(theirs, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Returns transformers' loss of a batch: MLM plus NSP."""
    mask = (batch["input_ids"] != PADDING).long()
    targets = {"labels": batch["mlm_labels"], "next_sentence_label": batch["nsp_labels"]}
    return theirs(batch["input_ids"], mask, batch["token_type_ids"], **targets).loss


def test_fifty_steps_of_training_have_the_losses_of_transformers():
    """Both start from the same weights and take the same batches and learning rates, in float64.
    Their optimizer is written out here, from the paper: which weights decay, and the clipping.
    """
    config = dataclasses.replace(SMALL, attention_d_k=12, attention_d_v=12)
    torch.manual_seed(0)
    model = BertPretrainModel(config, PADDING).double()
    theirs = oracle(model, transformers.BertForPreTraining).train()
    decayed, others = [], []
    for name, parameter in theirs.named_parameters():
        (others if "LayerNorm" in name or name.endswith(".bias") else decayed).append(parameter)
    groups = [{"params": decayed, "weight_decay": 0.01}, {"params": others, "weight_decay": 0}]
    their_optimizer = torch.optim.AdamW(groups, eps=1e-6, fused=False)
    optimizer = make_optimizer(model)

    losses = []
    for step, batch in enumerate(some_batches(5) * 10):
        rate = learning_rate(step, 1e-2, 5, 50)
        loss = their_loss(theirs, batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(theirs.parameters(), 1.0)
        for group in their_optimizer.param_groups:
            group["lr"] = rate
        their_optimizer.step()
        their_optimizer.zero_grad()
        ours = add_gradients(PretrainLosses(model), [to_device(batch, CPU)]).sum()
        update(model, optimizer, rate)
        losses.append(loss.item())
        assert abs(ours.item() - loss.item()) < 1e-8, step
    assert losses[-1] < losses[0] - 0.5  # they did learn


# The 24 small models of [Code]: layers and width.
MINIATURES = list(itertools.product((2, 4, 6, 8, 10, 12), (128, 256, 512, 768)))


@pytest.mark.parametrize(("layers", "width"), MINIATURES)
def test_each_miniature_of_google_has_as_many_parameters_as_in_transformers(layers, width):
    config = BertConfig(
        d_model=width,
        attention_d_k=width,
        attention_d_v=width,
        head_num=width // 64,
        d_feed_forward=4 * width,
        encoder_layers=layers,
    )
    sizes = {
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": width // 64,
        "intermediate_size": 4 * width,
    }
    with torch.device("meta"):
        ours = BertPretrainModel(config, PADDING)
        theirs = transformers.BertForPreTraining(transformers.BertConfig(**sizes))
    counts = [sum(p.numel() for p in model.parameters()) for model in (ours, theirs)]
    assert counts[0] == counts[1]
    if (layers, width) in SIZES.values():
        (name,) = (name for name, size in SIZES.items() if size == (layers, width))
        assert config == BertConfig.named(name)


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (Bert, "AutoModel"),
        (BertPretrainModel, "AutoModelForPreTraining"),
        (SST2BertModel, "AutoModelForSequenceClassification"),
    ],
)
def test_what_we_save_opens_in_transformers_with_the_same_result(ours, theirs, tmp_path):
    """No key is missing, none is unexpected, and the tokenizer gives the same ids."""
    config = dataclasses.replace(FIXED, attention_d_k=12, attention_d_v=12, vocab_size=45)
    model = build(ours, config).float()
    model.save_pretrained(tmp_path, small_tokenizer())
    loaded, report = getattr(transformers, theirs).from_pretrained(
        tmp_path, output_loading_info=True
    )
    assert not any(report.values()), report
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    texts = ["abc d.", "a [MASK] é"]
    assert tokenizer(texts)["input_ids"] == [small_tokenizer().encode(t).ids for t in texts]
    input_ids = torch.randint(5, 45, (3, 9))
    outputs, expected = model(input_ids), loaded(input_ids)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    for output, name in zip(outputs, list(expected), strict=False):
        compare(output, expected[name], 2e-5)


@pytest.mark.parametrize("shards", [False, True])
@pytest.mark.parametrize(
    ("theirs", "ours", "new"),
    [
        ("BertModel", Bert, []),
        ("BertModel", SST2BertModel, ["classifier"]),
        ("BertForPreTraining", BertPretrainModel, []),
        ("BertForPreTraining", Bert, []),
        ("BertForMaskedLM", BertPretrainModel, ["pooler", "nsp"]),
        ("BertForSequenceClassification", SST2BertModel, []),
    ],
)
def test_what_transformers_saves_opens_here_with_the_same_result(
    theirs, ours, new, shards, tmp_path
):
    """Any of its classes opens; a warning names exactly the heads that the file does not have."""
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=31, hidden_size=12, num_hidden_layers=3, num_attention_heads=2,
        intermediate_size=22, max_position_embeddings=17, initializer_range=0.5,
    )  # fmt: skip
    saved = getattr(transformers, theirs)(config).eval()
    saved.save_pretrained(tmp_path, max_shard_size="4KB" if shards else "1GB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1 or not shards
    with warnings.catch_warnings(record=True) as missing:
        warnings.simplefilter("always")
        model = ours.from_pretrained(tmp_path)
    names = ", ".join(
        f"{'bert.' * (head == 'pooler')}{head}.{kind}" for head in new for kind in KINDS
    )
    expected = [f"initialized, not in {tmp_path}: {names}"] if new else []
    if ours is Bert and "PreTraining" in theirs:
        expected.append(f"not used, of {tmp_path}: cls.predictions, cls.seq_relationship")
    assert [str(warning.message) for warning in missing] == expected
    input_ids = torch.randint(1, 31, (3, 9))
    if "Masked" in theirs:
        compare(model(input_ids)[0], saved(input_ids).logits, 2e-5)
    elif "PreTraining" in theirs and ours is BertPretrainModel:
        for output, name in zip(model(input_ids), list(saved(input_ids)), strict=False):
            compare(output, saved(input_ids)[name], 2e-5)
    elif "Sequence" in theirs:
        compare(model(input_ids), saved(input_ids).logits, 2e-5)
    else:
        encoder = model if ours is Bert else model.bert
        expected = getattr(saved, "bert", saved)(input_ids)
        compare(encoder(input_ids), expected.last_hidden_state, 2e-5)
        compare(encoder.pool(encoder(input_ids)), expected.pooler_output, 2e-5)


@given(configs(published=True), seeds)
def test_attention_probabilities_equal_those_of_transformers(config, seed):
    """The figure shows these probabilities, of every layer and head."""
    model = build(Bert, dataclasses.replace(config, fused_attention=False), seed)
    input_ids = torch.randint(1, config.vocab_size, (1, config.max_seq_length))
    theirs = oracle(model, transformers.BertModel)
    theirs.set_attn_implementation("eager")
    expected = theirs(input_ids, output_attentions=True).attentions
    compare(attention_probs(model, input_ids), torch.cat(expected), 1e-9)


@pytest.mark.parametrize("lowercase", [True, False])
@pytest.mark.parametrize("strip_accents", [True, False, None])
@pytest.mark.parametrize("chinese", [True, False])
def test_what_a_normalizer_does_is_done_in_transformers_too(
    lowercase, strip_accents, chinese, tmp_path
):
    """transformers does not look for it in tokenizer.json."""
    names = [*VOCABULARY, "A", "É", "E", "é", "e", "a", "中", "##文", "文"]
    vocabulary = {token: i for i, token in enumerate(dict.fromkeys(names))}
    tokenizer = data.wordpiece(
        vocabulary,
        lowercase=lowercase,
        strip_accents=strip_accents,
        handle_chinese_chars=chinese,
    )
    size = len(vocabulary)
    config = dataclasses.replace(FIXED, attention_d_k=12, attention_d_v=12, vocab_size=size)
    Bert(config, PADDING).save_pretrained(tmp_path, tokenizer)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    ids = tokenizer.encode("A é É 中文").ids
    assert theirs("A é É 中文")["input_ids"] == ids
    assert (vocabulary["A"] in ids) == (not lowercase)
    assert (vocabulary["##文"] in ids) == (not chinese)
    assert data.load_tokenizer(tmp_path / "vocab.txt").encode("A é É 中文").ids == ids


# ---- The tokenizer ------------------------------------------------------------------------------


@given(
    st.lists(
        any_words | familiar_words | st.sampled_from(["[MASK]", "[SEP]", "a" * 200]), max_size=6
    )
)
@example(["a" * 100, "a" * 101, "É", "e\u0301", "中a文", "[MASK]", "\u00ad", "a\u0000b", "ﬁ"])
def test_ids_equal_those_of_transformers_on_any_text(pieces):
    """Texts have accents, CJK, emoji, control characters, overlong words and literal special
    tokens."""
    reference = transformers.BertTokenizerFast(vocab={t: i for i, t in enumerate(VOCABULARY)})
    assert reference.convert_tokens_to_ids("[CLS]") == 2
    text = " ".join(pieces)
    assert small_tokenizer().encode(text).ids == reference(text)["input_ids"]
