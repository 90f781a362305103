"""Devices, precision and speed: a step waits for no device, every forward pass has the precision of
the run, and forward, losses and backward are one graph. No clock is needed here:
experiments/speed.py takes the times.
"""

import json
import platform
import resource
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch._dynamo
from helpers import CrashError, checkpoint_of, crash, make_review_options, read_lines, run
from helpers import start, wait
from strategies import CPU, PADDING, SMALL, TINY, some_batches
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode

import train_pretrain
import train_sst2
from bert import BertPretrainModel
from train_pretrain import (
    PretrainLosses,
    add_gradients,
    check_weights,
    choose_device,
    choose_precision,
    count,
    keep_freed_memory,
    make_optimizer,
    pretrain,
    to_device,
    update,
)

# ---- Devices ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gpu", "cuda:99", ""])
def test_a_device_that_is_not_there_is_named(name):
    with pytest.raises(ValueError, match=f"--device {name}"):
        choose_device(name)


def test_a_gpu_is_taken_where_there_is_one(monkeypatch):
    monkeypatch.setattr(torch, "empty", lambda size, device: mock.Mock(device=device))
    for is_there, expected in ((True, "cuda"), (False, "cpu")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda is_there=is_there: is_there)
        assert choose_device(None) == expected


# ---- Precision ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("capabilities", "device", "expected"),
    [
        ({"amx_bf16": True, "avx512_bf16": True}, "cpu", "medium"),
        ({"amx_bf16": False, "avx512_bf16": True}, "cpu", "bfloat16"),
        ({}, "cpu", "float32"),
        ({"amx_bf16": True}, "cuda", "bfloat16"),
        ({"amx_bf16": True}, "old cuda", "float32"),
    ],
)
def test_auto_is_the_fastest_precision_of_the_device(capabilities, device, expected, monkeypatch):
    """Where bfloat16 is emulated, it is slow."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    is_supported = mock.Mock(side_effect=lambda including_emulation: device == "cuda")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", is_supported)
    assert choose_precision("auto", torch.device(device.split()[-1])) == expected
    assert all(call == mock.call(including_emulation=False) for call in is_supported.mock_calls)


def test_a_torch_that_cannot_tell_its_cpu_trains_in_float32(monkeypatch):
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    assert choose_precision("auto", CPU) == "float32"


def test_a_precision_sets_how_torch_multiplies():
    """It also undoes what another run in this process has set."""
    for precision in ("medium", "float32", "medium", "bfloat16"):
        assert choose_precision(precision, CPU) == precision
        expected = "medium" if precision == "medium" else "highest"
        assert torch.get_float32_matmul_precision() == expected


def test_bfloat16_is_the_type_of_all_products_and_of_no_logits_weights_or_moments(
    options, monkeypatch
):
    """Every forward pass of pretraining obeys the precision, in evaluations, too."""
    products, logits, forward = set(), set(), train_pretrain.forward

    def noted(model, batch, precision="float32"):
        for module in model.modules():
            if isinstance(module, torch.nn.Linear):
                module.register_forward_hook(lambda *call: products.add(call[-1].dtype))
        found = forward(model, batch, precision)
        logits.update((model.training, tensor.dtype) for tensor in found)
        return found

    monkeypatch.setattr(train_pretrain, "forward", noted)
    for precision, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        products.clear()
        told = replace(options, precision=precision, out=f"{options.out}-{precision}")
        pretrain(told)
        assert products == {dtype}
        assert logits == {(True, torch.float32), (False, torch.float32)}
        found = checkpoint_of(Path(told.out))
        moments = [state["exp_avg"] for state in found["optimizer"]["state"].values()]
        assert {tensor.dtype for tensor in [*found["model"].values(), *moments]} == {torch.float32}


def test_the_precision_is_resolved_and_kept(options, monkeypatch):
    """config.json has the resolved precision, and a resumed run must share it: `auto` may mean
    another one elsewhere."""
    capabilities = {"avx512_bf16": True}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    pretrain(replace(options, precision="auto"))
    assert json.loads(Path(options.out, "config.json").read_text())["precision"] == "bfloat16"
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict)
    with pytest.raises(ValueError, match="precision .*bfloat16.*float32"):
        pretrain(replace(options, precision="auto", resume=True))


def test_every_forward_pass_of_fine_tuning_has_the_resolved_precision(tmp_path, monkeypatch):
    capabilities = {"avx512_bf16": True}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    autocast = mock.Mock(wraps=train_pretrain.autocast)
    monkeypatch.setattr(train_sst2, "autocast", autocast)
    logits, forward = [], train_sst2.forward
    monkeypatch.setattr(train_sst2, "forward", lambda *x: logits.append(forward(*x)) or logits[-1])
    options = make_review_options(tmp_path, train=8, validation=9, test=9)
    train_sst2.main(replace(options, test_dataset=options.dataset))
    weights = f"{options.out}/model"
    train_sst2.main(replace(options, tokenizer=None, weights=weights, predict=("a",)))
    # Training, 2 x validation, 2 x test, prediction.
    assert autocast.call_args_list == [mock.call("bfloat16", "cpu")] * 6
    assert [found.dtype for found in logits] == [torch.float32] * 6


# ---- To the device ------------------------------------------------------------------------------


def test_a_batch_for_a_gpu_is_copied_without_waiting(monkeypatch):
    (batch,), calls = some_batches(1), []

    def to(tensor, device, non_blocking=False):
        calls.append((device.type, non_blocking))
        return tensor

    monkeypatch.setattr(torch.Tensor, "to", to)
    to_device(batch, torch.device("cuda"))
    assert calls == [("cuda", True)] * 6


# ---- One graph ----------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_compiled_run_is_one_graph_with_the_losses_and_weights_of_an_eager_run(
    options, monkeypatch
):
    """There are no graph breaks (fullgraph). After compiling for two numbers of masked tokens,
    other numbers need no new graph. Without --compile, nothing is compiled."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compile_real = torch.compile

    def noted(losses_of, **how):
        assert isinstance(losses_of, PretrainLosses)
        assert how == {"fullgraph": True}
        return compile_real(losses_of, **how, backend=counter)

    monkeypatch.setattr(torch, "compile", noted)
    eager = replace(options, steps=6, dropout=0.0)
    run(eager)
    assert counter.frame_count == 0
    compiled = replace(eager, out=f"{options.out}-compiled", compile=True)
    run(compiled)
    assert 1 <= counter.frame_count <= 3
    ours, theirs = (read_lines(Path(o.out), "train") for o in (compiled, eager))
    assert ours["mlm_loss"] == pytest.approx(theirs["mlm_loss"], rel=1e-5)
    ours, theirs = (checkpoint_of(Path(o.out))["model"] for o in (compiled, eager))
    for name, tensor in theirs.items():
        if "key.bias" not in name:  # its gradient is rounding alone
            torch.testing.assert_close(ours[name], tensor, rtol=1e-3, atol=1e-4)


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
    """No value is read from the device, and no shape depends on values: either would make the CPU
    wait for the GPU to catch up. `collate` computes whatever depends on values beforehand."""
    model = BertPretrainModel(SMALL, PADDING).train()
    optimizer, (batch, *_) = make_optimizer(model), some_batches(1)
    masked, pairs, _ = count([batch], PADDING)
    with Recorder() as step:
        ready = [to_device(batch, CPU)]
        losses = add_gradients(PretrainLosses(model), ready, masked, pairs, [(0, 0)])
        update(model, optimizer, 1e-3)
    assert "addmm" in step.names
    assert not step.names & WAITING
    with Recorder() as log:
        check_weights(model, 1)
        losses.tolist()
    assert log.names & WAITING


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["adamw", "muon"])
@pytest.mark.parametrize("device", ["cuda"], indirect=True)
def test_a_step_on_a_gpu_makes_no_synchronizing_call(device, name):
    """The batches are large enough for the kernels of real ones."""
    model = BertPretrainModel(replace(TINY, max_seq_length=128), PADDING).to(device).train()
    optimizer, batches = make_optimizer(model, name), some_batches(3, 64)
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


def print_page_faults(keep: bool) -> None:
    """Prints the page faults of five large tensors, after thirty that were freed."""
    if keep:
        keep_freed_memory()
    before = 0
    for i in range(35):
        torch.zeros(16_000_000)
        if i == 29:
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)


@pytest.mark.slow
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_freed_memory_is_used_again_without_page_faults(tmp_path):
    found = []
    for keep in (True, False):
        output = tmp_path / str(keep)
        assert wait(start(print_page_faults, keep, output=output)) == [0]
        found.append(int(output.read_text()))
    kept, given_back = found
    assert given_back > 5 * 15_000  # 64 MB are 15,625 pages of 4 KiB
    assert kept < given_back / 2  # a block may wander in the heap once or twice more


@pytest.mark.parametrize("script", [train_pretrain, train_sst2])
def test_both_scripts_keep_freed_memory_before_they_write_anything(script, options, monkeypatch):
    monkeypatch.setattr(script, "keep_freed_memory", crash)
    begin = {train_pretrain: pretrain, train_sst2: train_sst2.train}[script]
    with pytest.raises(CrashError):
        begin(options)
    assert not Path(options.out).exists()
