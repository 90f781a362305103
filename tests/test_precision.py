"""Devices and precision: which ones are chosen. A step mixes no devices, and bfloat16 learns as
float32 does.
"""

import json
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest
import torch
from helpers import start, wait
from strategies import CPU, PADDING, STILL, some_batches, write_reviews
from torch._subclasses.fake_tensor import FakeTensorMode

import train_pretrain
import train_sst2
from bert import BertConfig, BertPretrainModel, SST2BertModel
from train_pretrain import (
    PretrainLosses,
    add_gradients,
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


@pytest.mark.parametrize("name", ["gpu", "cuda:x", "cuda:", "cuda:99", ""])
def test_a_device_that_is_not_there_is_named(name):
    with pytest.raises(ValueError, match=f"--device {name}"):
        choose_device(name)


def test_a_gpu_is_taken_where_there_is_one(monkeypatch):
    monkeypatch.setattr(torch, "empty", lambda size, device: mock.Mock(device=device))
    for is_there, expected in ((True, "cuda"), (False, "cpu")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda is_there=is_there: is_there)
        assert choose_device(None) == expected


def test_freed_memory_is_kept_by_the_two_numbers_of_mallopt(monkeypatch):
    """malloc.h: M_MMAP_MAX is -4, M_TRIM_THRESHOLD is -1, whose value -1 means never."""
    library = mock.Mock()
    monkeypatch.setattr(train_pretrain.ctypes, "CDLL", lambda name: library)
    keep_freed_memory()
    assert library.mallopt.mock_calls == [mock.call(-4, 0), mock.call(-1, -1)]


def test_without_mallopt_the_process_goes_on(monkeypatch):
    """Another C library than glibc may have none."""
    monkeypatch.setattr(train_pretrain.ctypes, "CDLL", lambda name: object())
    keep_freed_memory()


# ---- Precision ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("capabilities", "device", "expected"),
    [
        ({"amx_bf16": True, "avx512_bf16": True}, "cpu", "medium"),
        ({"amx_bf16": False, "avx512_bf16": True}, "cpu", "bfloat16"),
        ({"amx_bf16": False, "avx512_bf16": False}, "cpu", "float32"),
        ({"amx_bf16": True}, "cuda", "bfloat16"),
    ],
)
def test_auto_is_the_fastest_precision_of_the_device(capabilities, device, expected, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    assert choose_precision("auto", torch.device(device)) == expected


def test_a_torch_that_cannot_tell_its_cpu_trains_in_float32(monkeypatch):
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    assert choose_precision("auto", CPU) == "float32"


@pytest.mark.parametrize(
    ("precision", "products"),
    [("float32", "highest"), ("medium", "medium"), ("bfloat16", "highest")],
)
def test_a_precision_sets_how_torch_multiplies(precision, products):
    """It also undoes what another run in this process has set."""
    torch.set_float32_matmul_precision("high")
    assert choose_precision(precision, CPU) == precision
    assert torch.get_float32_matmul_precision() == products


def products_of(precision: str) -> set[torch.dtype]:
    """Returns the types that the linear layers return in a forward pass of pretraining."""
    config = BertConfig.named("tiny", vocab_size=60, max_seq_length=40)
    model = BertPretrainModel(config, 0)
    found: set[torch.dtype] = set()
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_hook(lambda module, inputs, output: found.add(output.dtype))
    (batch,) = some_batches(1)
    for logits in train_pretrain.forward(model, to_device(batch, CPU), precision):
        assert logits.dtype == torch.float32
    return found


@pytest.mark.parametrize(
    ("precision", "dtype"),
    [("float32", torch.float32), ("medium", torch.float32), ("bfloat16", torch.bfloat16)],
)
def test_bfloat16_is_the_type_of_all_products_and_of_no_logits(precision, dtype):
    assert products_of(precision) == {dtype}


def test_fine_tuning_obeys_the_precision():
    config = BertConfig.named("tiny", vocab_size=60, max_seq_length=16)
    model = SST2BertModel(config, 0).eval()
    input_ids = torch.arange(5, 15)[None]
    exact, rounded = (train_sst2.forward(model, input_ids, p) for p in ("float32", "bfloat16"))
    assert rounded.dtype == torch.float32
    assert torch.equal(rounded, rounded.bfloat16().float())
    assert not torch.equal(rounded, exact)
    torch.testing.assert_close(rounded, exact, atol=0.05, rtol=0.05)


def test_every_forward_pass_of_pretraining_obeys_the_precision(options, monkeypatch):
    used, forward = [], train_pretrain.forward

    def noted(model, batch, precision="float32"):
        used.append((model.training, precision))
        return forward(model, batch, precision)

    monkeypatch.setattr(train_pretrain, "forward", noted)
    told = replace(options, precision="bfloat16")
    pretrain(told)
    assert set(used) == {(True, "bfloat16"), (False, "bfloat16")}


def test_every_forward_pass_of_fine_tuning_has_the_resolved_precision(tmp_path, monkeypatch):
    capabilities = {"avx512_bf16": True}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    used, autocast = [], train_sst2.autocast

    def noted(precision, device_type):
        used.append(precision)
        return autocast(precision, device_type)

    monkeypatch.setattr(train_sst2, "autocast", noted)
    dataset = write_reviews(tmp_path / "reviews", train=9, validation=9, test=9)
    out = tmp_path / "run"
    options = train_sst2.SST2Options(
        out=str(out), dataset=dataset, test_dataset=dataset, vocab_size=60, epochs=1, device="cpu"
    )
    train_sst2.main(options)
    assert json.loads((out / "config.json").read_text())["precision"] == "bfloat16"
    train_sst2.main(replace(options, tokenizer=None, weights=f"{out}/model", predict=("a",)))
    assert used == ["bfloat16"] * 4  # training, validation, test, prediction


def test_weights_and_gradients_stay_float32(options):
    pretrain(replace(options, precision="bfloat16"))
    checkpoint = torch.load(f"{options.out}/checkpoint.pt", weights_only=True)
    moments = [state["exp_avg"] for state in checkpoint["optimizer"]["state"].values()]
    assert {tensor.dtype for tensor in [*checkpoint["model"].values(), *moments]} == {torch.float32}


@pytest.mark.parametrize("precision", ["auto", "bfloat16"])
def test_the_precision_is_resolved_and_kept(precision, options, monkeypatch):
    """config.json has the resolved precision, and a resumed run must share it: `auto` may mean
    another one elsewhere."""
    capabilities = {"avx512_bf16": True}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    pretrain(replace(options, precision=precision))
    assert json.loads(Path(options.out, "config.json").read_text())["precision"] == "bfloat16"
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict)
    with pytest.raises(ValueError, match="precision .*bfloat16.*float32"):
        pretrain(replace(options, precision="auto", resume=True))


@pytest.mark.parametrize(
    "device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)], indirect=True
)
def test_bfloat16_learns_as_float32_does(device):
    """The losses of each of 60 steps agree to 5%."""

    def losses_in(precision: str) -> torch.Tensor:
        torch.manual_seed(0)
        model = BertPretrainModel(STILL, PADDING).to(device).train()
        optimizer, batches = make_optimizer(model), some_batches(2, 8)
        found = []
        masked, pairs, _ = count(batches[:1], PADDING)
        for _ in range(60):
            ready = [to_device(batches[0], device)]
            losses = add_gradients(PretrainLosses(model, precision), ready, masked, pairs)
            found.append(losses.sum())
            update(model, optimizer, 2e-3)
        return torch.stack(found).cpu()

    rounded, exact = losses_in("bfloat16"), losses_in("float32")
    assert exact[-1] < 0.7 * exact[0]
    assert not torch.equal(rounded, exact)
    torch.testing.assert_close(rounded, exact, rtol=0.05, atol=0.0)


# ---- A step on a device that is not there -------------------------------------------------------


def move(module: torch.nn.Module, device: str) -> None:
    """`module.to(device)` cannot swap fake parameters."""
    for part in module.modules():
        for name, parameter in list(part._parameters.items()):
            if parameter is not None:
                part._parameters[name] = torch.nn.Parameter(parameter.detach().to(device))


def two_pretended_steps(left_behind: str) -> None:
    """Takes two steps of pretraining on a registered device, which stays registered."""
    from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

    _setup_privateuseone_for_python_backend("pretended")
    with FakeTensorMode():
        config = BertConfig.named("tiny", vocab_size=50, max_seq_length=16)
        model = BertPretrainModel(config, 0).train()
        move(model, "pretended:0")
        optimizer = make_optimizer(model)
        largest_norm = torch.zeros((), device="pretended:0")
        batch = {
            "input_ids": torch.ones(2, 8, dtype=torch.int64),
            "token_type_ids": torch.zeros(2, 8, dtype=torch.int64),
            "masked_indices": torch.tensor([1, 9]),
            "mlm_targets": torch.tensor([5, 6]),
            "nsp_labels": torch.tensor([0, 1]),
        }
        batch = {
            name: values if name == left_behind else values.to("pretended:0")
            for name, values in batch.items()
        }
        for _ in range(2):
            losses = add_gradients(PretrainLosses(model), [batch, batch], masked=4, pairs=4)
            norm = update(model, optimizer, 1e-3)
            largest_norm = torch.maximum(largest_norm, norm)
            if left_behind == "a value is read":
                norm.item()
        assert losses.device.type == norm.device.type == "pretended"
        assert largest_norm.device.type == "pretended"
    print("two steps")


@pytest.fixture
def steps(tmp_path):
    """Runs `two_pretended_steps` in a process of its own; returns its exit status and output."""
    if not hasattr(torch.utils.backend_registration, "_setup_privateuseone_for_python_backend"):
        pytest.skip("this torch has no device that is registered from Python")

    def run(left_behind: str) -> tuple[int, str]:
        output = tmp_path / "output"
        (status,) = wait(start(two_pretended_steps, left_behind, output=output))
        return status, output.read_text()

    return run


@pytest.mark.slow
def test_a_step_mixes_no_devices_and_reads_no_value(steps):
    """Fake tensors have shapes, types and devices, but no values. They go through forward,
    backward, clipping, the fused optimizer and the largest norm. They do not notice an index on the
    CPU into a tensor on the device (`masked_indices`), a CPU tensor without dimensions, or
    `.to("cpu")`."""
    assert steps("nothing") == (0, "two steps\n")


@pytest.mark.slow
@pytest.mark.parametrize(
    "left_behind", ["input_ids", "token_type_ids", "mlm_targets", "nsp_labels", "a value is read"]
)
def test_a_mixture_of_devices_or_a_value_that_is_read_would_be_noticed(left_behind, steps):
    status, output = steps(left_behind)
    assert status == 1
    assert "two steps" not in output
