"""Ideas that could make a training step faster, each beside the step as it is, in turns.

    python -m benchmarks.ideas              # base, 4 x 128; a line for each idea
    python -m benchmarks.ideas --profile    # where the step as it is spends its time

What was kept and what was not is in benchmarks/README.md.
"""

import json
import statistics
import sys
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


from benchmarks.bench import VOCABULARY, random_batch

from bert import BertConfig, BertPretrainModel
from support.devices import keep_freed_memory
from train_pretrain import PretrainLosses, add_gradients, make_optimizer, to_device, update

CPU = torch.device("cpu")


class FusedAttention(nn.Module):
    """One product for queries, keys and values."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.all = nn.Linear(config.d_model, 3 * config.d_model)
        self.output = nn.Linear(config.d_model, config.d_model)
        self.config = config

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        q, k, v = self.all(x).unflatten(-1, (3, self.config.head_num, -1)).permute(2, 0, 3, 1, 4)
        heads = F.scaled_dot_product_attention(q, k, v, mask, self.config.attention_dropout)
        return self.output(heads.transpose(1, 2).flatten(2))


class TransposedDecoder(BertPretrainModel):
    """E h^T instead of h E^T: then autograd adds to the gradient of E in place."""

    def forward(self, input_ids, token_type_ids=None, attention_mask=None, positions=None):
        hidden_states = self.bert(input_ids, token_type_ids, attention_mask)
        nsp_logits = self.nsp(self.bert.pool(hidden_states))
        hidden_states = hidden_states.flatten(0, 1)[positions]
        transformed = self.mlm_norm(F.gelu(self.mlm_dense(hidden_states)))
        decoder = self.bert.embeddings.token.weight
        return torch.addmm(self.mlm_bias[:, None], decoder, transformed.T).T, nsp_logits


class AllPositions(BertPretrainModel):
    """Logits of all tokens, of which the masked ones are taken."""

    def forward(self, input_ids, token_type_ids=None, attention_mask=None, positions=None):
        mlm_logits, nsp_logits = super().forward(input_ids, token_type_ids, attention_mask)
        return mlm_logits.flatten(0, 1)[positions], nsp_logits


def step_of(model: BertPretrainModel, batch: dict, **optimizer_options) -> Callable[[], None]:
    optimizer = make_optimizer(model)
    for group in optimizer.param_groups:
        group |= optimizer_options

    def step() -> None:
        add_gradients(PretrainLosses(model), [to_device(batch, CPU)])
        update(model, optimizer, 1e-4)

    return step


def profile(rows: int = 4, length: int = 128) -> None:
    """The third step, by operation."""
    keep_freed_memory()
    config = BertConfig.named("base", vocab_size=VOCABULARY, max_seq_length=length)
    step = step_of(BertPretrainModel(config, 0).train(), random_batch(rows, length))
    step()
    step()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as found:
        step()
    events = sorted(found.key_averages(), key=lambda e: -e.self_cpu_time_total)
    whole = sum(event.self_cpu_time_total for event in events)
    for event in events[:16]:
        share = event.self_cpu_time_total / whole
        line = {"operation": event.key, "calls": event.count, "share": round(share, 4)}
        print(json.dumps({**line, "ms": round(event.self_cpu_time_total / 1000, 1)}))


def main(rows: int = 4, length: int = 128, rounds: int = 11) -> None:
    keep_freed_memory()
    config = BertConfig.named("base", vocab_size=VOCABULARY, max_seq_length=length)
    batch = random_batch(rows, length)

    def changed(kind: type = BertPretrainModel, **changes) -> BertPretrainModel:
        return kind(BertConfig(**{**vars(config), **changes}), 0).train()

    fused, sparse = changed(), changed()
    for layer in fused.bert.layers:
        layer.attention = FusedAttention(config)
    sparse.bert.embeddings.token.sparse = True
    steps = {
        "as it is": step_of(changed(), batch),
        "logits of all tokens": step_of(changed(AllPositions), batch),
        "explicit attention": step_of(changed(fused_attention=False), batch),
        "fused QKV": step_of(fused, batch),
        "transposed decoder": step_of(changed(TransposedDecoder), batch),
        "sparse gradient of the embeddings": step_of(sparse, batch),
        "AdamW foreach, not fused": step_of(changed(), batch, fused=None, foreach=True),
        "no dropout (a bound for faster random numbers)": step_of(
            changed(dropout=0.0, attention_dropout=0.0), batch
        ),
    }
    times: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(2 + rounds):
        for name, step in steps.items():
            started = time.perf_counter()
            step()
            if turn >= 2:
                times[name].append(time.perf_counter() - started)
    now = times["as it is"]
    for name, values in times.items():
        ratio = statistics.median(a / b for a, b in zip(now, values, strict=True))
        line = {"idea": name, "seconds": statistics.median(values), "times_as_fast": ratio}
        print(json.dumps({k: round(v, 3) if isinstance(v, float) else v for k, v in line.items()}))


if __name__ == "__main__":
    profile() if sys.argv[1:] == ["--profile"] else main()
