"""What keeps a step fast, tested without a clock: experiments/speed.py takes the times."""

import functools
import platform
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
import torch._dynamo
from helpers import ROOT, read_lines
from strategies import (
    CPU,
    PADDING,
    SMALL,
    STILL,
    gradients,
    small_tokenizer,
    some_batches,
    write_reviews,
)
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode

import train_pretrain
import train_sst2
from bert import Bert, BertConfig, BertPretrainModel
from train_pretrain import (
    PretrainLosses,
    PretrainOptions,
    add_gradients,
    count,
    make_optimizer,
    to_device,
    update,
)

# ---- To the device ------------------------------------------------------------------------------


def test_a_batch_for_a_gpu_is_pinned_and_copied_without_waiting(monkeypatch):
    (batch,), calls = some_batches(1), []

    def pin_memory(tensor):
        calls.append("pinned")
        return tensor

    def to(tensor, device, non_blocking=False):
        calls.append((device.type, non_blocking))
        return tensor

    monkeypatch.setattr(torch.Tensor, "pin_memory", pin_memory)
    monkeypatch.setattr(torch.Tensor, "to", to)
    to_device(batch, torch.device("cuda"))
    assert calls == ["pinned", ("cuda", True)] * 6


# ---- One graph ----------------------------------------------------------------------------------


@pytest.mark.slow
def test_forward_and_losses_compile_as_one_graph():
    """It has no break (fullgraph), and the same losses and gradients. After the second number of
    masked tokens no number needs another graph."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    model = BertPretrainModel(STILL, PADDING).train()
    compiled = torch.compile(PretrainLosses(model), fullgraph=True, backend=counter)
    for batch in some_batches(5):
        for one, other in zip(
            gradients(model, [batch], compiled), gradients(model, [batch]), strict=True
        ):
            torch.testing.assert_close(one, other)
    assert counter.frame_count <= 3


@pytest.mark.slow
def test_compile_is_a_flag_of_the_training_script(tmp_path, monkeypatch):
    graphs, compile_real = [], torch.compile

    def compile_noted(function, **how):
        graphs.append((function, how))
        return compile_real(function, **how, backend="aot_eager")

    monkeypatch.setattr(torch, "compile", compile_noted)
    options = PretrainOptions(
        str(tmp_path / "eager"), vocab_size=150, steps=3, eval_every=3, batch_size=2,
        log_every=1, workers=0, max_seq_length=16, device="cpu", precision="float32",
    )  # fmt: skip
    train_pretrain.pretrain(options)
    assert not graphs
    train_pretrain.pretrain(replace(options, out=str(tmp_path / "compiled"), compile=True))
    ((losses_of, how),) = graphs
    assert isinstance(losses_of, PretrainLosses)
    assert how == {"fullgraph": True}
    eager, compiled = (read_lines(tmp_path / name, "train") for name in ("eager", "compiled"))
    assert compiled["mlm_loss"] == pytest.approx(eager["mlm_loss"], rel=1e-4)


@pytest.mark.parametrize("fused", [True, False])
def test_the_encoder_can_be_exported(fused):
    """torch.export exports it for batches of any size and length."""
    model = Bert(replace(STILL, fused_attention=fused), PADDING).eval()
    free = {0: torch.export.Dim("batch"), 1: torch.export.Dim("length", max=SMALL.max_seq_length)}
    exported = torch.export.export(
        model, (torch.randint(1, 26, (3, 7)),), dynamic_shapes={"input_ids": free}
    )
    input_ids = torch.randint(1, 26, (5, 11))
    input_ids[2, 6:] = PADDING
    torch.testing.assert_close(exported.module()(input_ids), model(input_ids))


# ---- A GPU never waits for the CPU, nor the reverse ---------------------------------------------


class Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, function, types, arguments=(), named=None):
        self.names.add(function._overloadpacket.__name__)
        return function(*arguments, **(named or {}))


WAITING = {"_local_scalar_dense", "nonzero", "masked_select", "_unique2", "is_nonzero", "equal"}


def test_nothing_in_a_step_waits_for_a_gpu():
    """No value is read from the device, and no shape depends on values: both would stop the CPU
    until the GPU has caught up. What does depend on them, `to_device` finds out before."""
    model = BertPretrainModel(SMALL, PADDING).train()
    optimizer, (batch, *_) = make_optimizer(model), some_batches(1)
    with Recorder() as before:
        ready = [to_device(batch, CPU)]
    assert "nonzero" in before.names
    masked, pairs, _ = count([batch], PADDING)
    with Recorder() as step:
        losses = add_gradients(PretrainLosses(model), ready, masked, pairs, [(0, 0)])
        norm = update(model, optimizer, 1e-3)
    assert "addmm" in step.names
    assert not step.names & WAITING
    with Recorder() as log:
        assert norm.isfinite()
        losses.tolist()
    assert log.names & WAITING


@pytest.mark.gpu
@pytest.mark.parametrize("device", ["cuda"], indirect=True)
def test_a_step_on_a_gpu_makes_no_synchronizing_call(device):
    """The batches are large enough for the kernels of real ones."""
    sizes = {"vocab_size": small_tokenizer().get_vocab_size(), "max_seq_length": 128}
    model = BertPretrainModel(BertConfig.named("tiny", **sizes), PADDING).to(device).train()
    optimizer, batches = make_optimizer(model), some_batches(3, 64)
    for batch in batches:
        batch = {k: v.repeat(1, 3) if v.dim() == 2 else v for k, v in batch.items()}
        ready = [to_device(batch, device)]
        masked, pairs, _ = count([batch], PADDING)
        torch.cuda.set_sync_debug_mode("error")
        try:
            add_gradients(PretrainLosses(model), ready, masked, pairs, [(0, 0)])
            update(model, optimizer, 1e-3)
        finally:
            torch.cuda.set_sync_debug_mode("default")


# ---- Memory -------------------------------------------------------------------------------------


FAULTS = """
import resource, sys, torch
from train_pretrain import keep_freed_memory
if sys.argv[1] == "kept":
    keep_freed_memory()
for _ in range(30):
    torch.zeros(16_000_000)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    torch.zeros(16_000_000)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_freed_memory_is_used_again_without_page_faults():
    run = functools.partial(subprocess.run, capture_output=True, text=True, check=True, cwd=ROOT)
    kept, given_back = (
        int(run([sys.executable, "-c", FAULTS, how]).stdout) for how in ("kept", "given back")
    )
    assert given_back > 5 * 15_000  # 64 MB are 15,625 pages of 4 KiB
    assert kept < given_back / 2  # a block may wander in the heap once or twice more


def test_both_scripts_keep_freed_memory_before_they_train(options, tmp_path, monkeypatch):
    happened = []
    for script, reached in ((train_pretrain, "train"), (train_sst2, "fine_tune")):
        train = getattr(script, reached)

        def noted(*arguments, train=train):
            happened.append("train")
            return train(*arguments)

        monkeypatch.setattr(script, "keep_freed_memory", lambda: happened.append("keep"))
        monkeypatch.setattr(script, reached, noted)
    train_pretrain.pretrain(replace(options, steps=1))
    dataset = write_reviews(tmp_path / "reviews", train=9, validation=9)
    train_sst2.train(
        train_sst2.SST2Options(
            out=str(tmp_path / "sst2"), dataset=dataset, vocab_size=60, epochs=1, device="cpu"
        )
    )
    assert happened == ["keep", "train"] * 2
