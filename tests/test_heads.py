"""What stands on the encoder: the masked language model, whose decoder is the token embedding, next
sentence prediction on the pooler, and the classifier.
"""

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from strategies import EXACT, FIXED, PADDING, batches, build, configs, seeds, small_tokenizer

from bert import BertConfig, BertPretrainModel, SST2BertModel

# ---- Masked language model ----------------------------------------------------------------------


@given(st.data(), configs(), seeds)
def test_logits_of_masked_tokens_are_those_of_the_full_logits(draw, config, seed):
    input_ids, token_type_ids = draw.draw(batches(config))
    drawn = draw.draw(st.lists(st.integers(0, input_ids.numel() - 1), max_size=4))
    masked_indices = torch.tensor(drawn, dtype=torch.long)
    model = build(BertPretrainModel, config, seed)
    everywhere, nsp_logits = model(input_ids, token_type_ids)
    masked_logits, same_nsp_logits = model(input_ids, token_type_ids, masked_indices=masked_indices)
    torch.testing.assert_close(masked_logits, everywhere.flatten(0, 1)[masked_indices], **EXACT)
    assert torch.equal(nsp_logits, same_nsp_logits)


def test_masked_indices_have_one_dimension_and_are_passed_by_name():
    """A mask of the batch's shape, or a fourth argument in transformers' order, would be silent."""
    model = build(BertPretrainModel, FIXED)
    input_ids = torch.tensor([[3, 4, 5]])
    for wrong in (input_ids > 3, torch.tensor([[1, 2]]), torch.tensor(1)):
        with pytest.raises(ValueError, match="masked_indices"):
            model(input_ids, masked_indices=wrong)
    with pytest.raises(TypeError):
        model(input_ids, None, None, torch.tensor([1]))


def test_the_decoder_is_the_token_embedding():
    """Changing a token's embedding changes its logit, and no other parameter has its shape."""
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
    """A step moves both uses of the matrix, and so does a model that was saved and loaded."""
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


# ---- Next sentence prediction and classifier ----------------------------------------------------


def test_the_pooler_feeds_next_sentence_prediction_alone():
    model = build(BertPretrainModel, FIXED)
    input_ids = torch.tensor([[3, 4, 5]])
    mlm_logits, nsp_logits = model(input_ids)
    torch.nn.init.normal_(model.bert.pooler.weight)
    changed_mlm_logits, changed_nsp_logits = model(input_ids)
    assert torch.equal(mlm_logits, changed_mlm_logits)
    assert not torch.allclose(nsp_logits, changed_nsp_logits)


# ---- Both losses of pretraining -----------------------------------------------------------------


@pytest.mark.parametrize("size", ["tiny", "mini"])
def test_the_first_loss_is_ln_v_plus_ln_2(size, device):
    """An untrained model predicts every token and both labels with the same probability, to 5%."""
    model = BertPretrainModel(BertConfig.named(size), PADDING).to(device)
    input_ids = torch.randint(1, 30522, (4, 64), device=device)
    mlm_logits, nsp_logits = model(input_ids)
    loss = F.cross_entropy(mlm_logits.flatten(0, 1), input_ids.flatten())
    loss += F.cross_entropy(nsp_logits, torch.tensor([0, 1, 0, 1], device=device))
    assert loss.item() == pytest.approx(math.log(30522) + math.log(2), rel=0.05)


def test_every_parameter_gets_a_gradient_from_the_pretraining_loss():
    """The key bias is the exception: it adds the same to all scores of a query, which softmax
    ignores."""
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


def test_the_classifier_hands_segments_and_mask_to_the_encoder():
    """Its logits are those of the pooled encoder, whatever the optional arguments are."""
    model = build(SST2BertModel, FIXED)
    input_ids = torch.tensor([[2, 5, 6, 3, 7, 3], [2, 8, 3, 9, 9, 3]])
    token_type_ids = torch.tensor([[0, 0, 0, 0, 1, 1], [0, 0, 0, 1, 1, 1]])
    attention_mask = torch.tensor([[1, 1, 1, 1, 1, 0], [1, 1, 1, 1, 1, 1]])
    arguments = (token_type_ids, attention_mask)
    for given_arguments in ((), arguments[:1], arguments):
        hidden_states = model.bert(input_ids, *given_arguments)
        expected = model.classifier(model.bert.pool(hidden_states))
        torch.testing.assert_close(model(input_ids, *given_arguments), expected, **EXACT)
    assert not torch.allclose(model(input_ids), model(input_ids, token_type_ids))
    assert not torch.allclose(model(input_ids, token_type_ids), model(input_ids, *arguments))
