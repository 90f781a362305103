"""The first thing to try with any BERT: it must be able to overfit one example. With too large a
learning rate, it never does, and the loss shows why: it gets stuck at ln n.

    python -m pytest tests/test_overfit.py            # tiny, on the CPU
    python -m pytest tests/test_overfit.py -m gpu     # base, on a GPU
"""

import math

import pytest
import torch
from strategies import PADDING

from bert import BertConfig, BertPretrainModel
from train_pretrain import (
    PretrainLosses,
    add_gradients,
    evaluate,
    make_optimizer,
    to_device,
    update,
)

MASKED = 10  # tokens, with as many different targets
STEPS = 100

pytestmark = pytest.mark.slow
# A size, a learning rate that suits it, and one that is too large.
SIZES = [
    ("tiny", 1e-3, 2e-2, "cpu"),
    pytest.param("base", 1e-4, 1e-2, "cuda", marks=pytest.mark.gpu),
]
on_each_device = pytest.mark.parametrize(
    ("size", "rate", "too_large", "device"), SIZES, indirect=["device"]
)


def one_sample(device: torch.device, nsp_label: int) -> dict[str, torch.Tensor]:
    """Returns a pair of 64 tokens, of which 10 are masked; their targets all differ."""
    input_ids = torch.arange(100, 164)[None]
    input_ids[0, 0], input_ids[0, 30], input_ids[0, 63] = 2, 3, 3
    masked_indices = torch.arange(3, 63, 6)
    input_ids[0, masked_indices] = 4
    batch = {
        "input_ids": input_ids,
        "token_type_ids": (torch.arange(64) > 30).long()[None],
        "masked_indices": masked_indices,
        "mlm_targets": torch.arange(1000, 1000 + MASKED),
        "nsp_labels": torch.tensor([nsp_label]),
    }
    return to_device(batch, device)


def learn(size: str, rate: float, nsp_label: int, device: torch.device) -> dict[str, float]:
    """Trains on one sample without dropout, and returns the metrics of `evaluate`."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 2000, "max_seq_length": 64}
    config = BertConfig.named(size, **sizes, dropout=0.0, attention_dropout=0.0)
    model = BertPretrainModel(config, PADDING).to(device).train()
    optimizer, batch = make_optimizer(model), one_sample(device, nsp_label)
    for _ in range(STEPS):
        add_gradients(PretrainLosses(model), [batch], masked=MASKED, pairs=1)
        update(model, optimizer, rate)
    return evaluate(model, [batch])


@on_each_device
@pytest.mark.parametrize("nsp_label", [0, 1])
def test_one_sample_is_overfitted(size, rate, too_large, device, nsp_label):
    """Both losses are near 0, which takes that every prediction is right. A model that cannot
    overfit one sample has a bug."""
    learned = learn(size, rate, nsp_label, device)
    assert learned["mlm_loss"] < 0.05
    assert learned["nsp_loss"] < 0.05
    assert learned["mlm_accuracy"] == learned["nsp_accuracy"] == 1


@on_each_device
def test_too_large_a_learning_rate_gets_stuck_at_ln_n_with_the_same_token_everywhere(
    size, rate, too_large, device
):
    """The model learns which 10 tokens are targets, but never where: the loss stays at ln 10. With
    a smaller rate it learns the same sample in as many steps (the test above)."""
    stuck = learn(size, too_large, 0, device)
    assert stuck["mlm_loss"] == pytest.approx(math.log(MASKED), abs=0.15)
    assert stuck["most_frequent_prediction"] >= 0.9
