"""What stands on the encoder: the masked language model, whose decoder is the token embedding, next
sentence prediction on the pooler, and the classifier.
"""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from strategies import EXACT, FIXED, PADDING, build, cases, small_tokenizer

from bert import BertConfig, BertPretrainModel, SST2BertModel
from train_pretrain import make_optimizer

# ---- Masked language model ----------------------------------------------------------------------


@given(cases(BertPretrainModel), st.data())
def test_logits_of_masked_tokens_are_those_of_the_full_logits(case, draw):
    model, *inputs, _ = case
    drawn = draw.draw(st.lists(st.integers(0, case.input_ids.numel() - 1), max_size=4))
    masked_indices = torch.tensor(drawn, dtype=torch.long)
    everywhere, nsp_logits = model(*inputs)
    masked_logits, same_nsp_logits = model(*inputs, masked_indices=masked_indices)
    torch.testing.assert_close(masked_logits, everywhere.flatten(0, 1)[masked_indices], **EXACT)
    assert torch.equal(nsp_logits, same_nsp_logits)


def test_masked_indices_have_one_dimension_and_are_passed_by_name():
    """A mask shaped like the batch, or transformers' fourth argument, would be a silent mistake."""
    model = build(BertPretrainModel, FIXED)
    input_ids = torch.tensor([[3, 4, 5]])
    for wrong in (input_ids > 3, torch.tensor([[1, 2]]), torch.tensor(1)):
        with pytest.raises(ValueError, match="masked_indices"):
            model(input_ids, masked_indices=wrong)
    with pytest.raises(TypeError):
        model(input_ids, None, None, torch.tensor([1]))


@pytest.mark.parametrize("is_loaded", [False, True])
def test_the_decoder_is_the_token_embedding_and_stays_tied(is_loaded, tmp_path):
    """It is one parameter in one storage, with one entry in the optimizer. After a step, too,
    changing the embedding of a token changes its logit, and no other."""
    model = build(BertPretrainModel, FIXED).float()
    if is_loaded:
        model.save_pretrained(tmp_path, small_tokenizer())
        model = BertPretrainModel.from_pretrained(tmp_path)
    shape = (FIXED.vocab_size, FIXED.d_model)
    (matrix,) = (p for p in model.parameters() if p.shape == shape)
    assert len({t.data_ptr() for t in model.state_dict().values() if t.shape == shape}) == 1
    optimizer = make_optimizer(model)
    entries = [p for group in optimizer.param_groups for p in group["params"]]
    assert sum(parameter is matrix for parameter in entries) == 1

    input_ids = torch.tensor([[3, 4, 5]])
    mlm_logits, nsp_logits = model(input_ids)
    (mlm_logits.logsumexp(-1).sum() + nsp_logits.sum()).backward()
    assert (matrix.grad.abs().sum(dim=1) > 0).all()  # the decoder reaches every row
    for group in optimizer.param_groups:
        group["lr"] = 0.1
    optimizer.step()
    mlm_logits, _ = model(input_ids)
    with torch.no_grad():
        matrix[7] += 1.0
    changed = (mlm_logits - model(input_ids)[0]).abs().amax(dim=(0, 1)) > 0
    assert changed.nonzero().flatten().tolist() == [7]


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


def test_the_classifier_hands_its_arguments_to_the_encoder():
    """Its logits are those of the pooled encoder."""
    model = build(SST2BertModel, FIXED)
    input_ids = torch.tensor([[2, 5, 6, 3]])
    token_type_ids = torch.tensor([[0, 0, 1, 1]])
    mask = torch.tensor([[1, 1, 0, 1]])
    hidden_states = model.bert(input_ids, token_type_ids, mask)
    expected = model.classifier(model.bert.pool(hidden_states))
    torch.testing.assert_close(model(input_ids, token_type_ids, mask), expected, **EXACT)
    assert not torch.allclose(model(input_ids), expected)
