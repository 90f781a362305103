"""Devices and ranks: what can be known of a GPU without one, and what needs one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from strategies import small_tokenizer
from test_distributed import torchrun

import support.checkpoints
from bert import BertConfig, attention
from support.processes import join_processes, process_group_backend

ROOT = Path(__file__).parents[1]


# ---- The group of ranks -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("device", "has_cuda", "backend"),
    [
        (None, True, "cpu:gloo,cuda:nccl"),
        ("cuda", True, "cpu:gloo,cuda:nccl"),
        ("cpu", True, "gloo"),
        (None, False, "gloo"),
        ("cpu", False, "gloo"),
    ],
)
def test_numbers_on_the_cpu_have_a_backend_on_every_machine(device, has_cuda, backend):
    """Without a named backend, a machine with a GPU has nccl alone, and no sum of CPU tensors."""
    assert process_group_backend(device, has_cuda) == backend


SUMS = """
import os, torch
import support.checkpoints
import support.processes
support.processes.process_group_backend = lambda device, has_cuda: "cpu:gloo,cuda:gloo"
rank, world_size = support.processes.join_processes()
assert support.processes.total(rank, 10) == [sum(range(world_size)), 10 * world_size]
numbers = torch.ones(2)
torch.distributed.all_reduce(numbers)
assert numbers.tolist() == [world_size, world_size]
torch.distributed.destroy_process_group()
print(f"rank {rank} of {world_size} is done")
"""


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_ranks_sum_cpu_numbers_beside_a_backend_for_the_accelerator(ranks, tmp_path):
    """In the form that a machine with GPUs has; with one rank, a group is formed all the same."""
    (tmp_path / "sums.py").write_text(SUMS)
    process = torchrun(ranks, str(tmp_path / "sums.py"))
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    assert output.count(f"of {ranks} is done") == ranks


@pytest.mark.parametrize(("variable", "other"), [("RANK", "WORLD_SIZE"), ("WORLD_SIZE", "RANK")])
def test_half_of_what_torchrun_sets_is_rejected(variable, other, monkeypatch):
    monkeypatch.setenv(variable, "0")
    monkeypatch.delenv(other, raising=False)
    with pytest.raises(
        ValueError, match=f"{variable} is set in the environment, but RANK and WORLD"
    ):
        join_processes()


def test_ranks_never_share_one_gpu(monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="--device cuda:0 would put all 2 ranks on one GPU"):
        join_processes("cuda:0")


@pytest.mark.slow
def test_fine_tuning_with_several_ranks_is_rejected(tmp_path):
    """All would do the same, and write every line twice."""
    process = torchrun(2, "train_sst2.py", "--out", str(tmp_path / "run"), cwd=ROOT)
    output, _ = process.communicate(timeout=120)
    assert process.returncode != 0
    assert "error: fine-tuning runs in one process, not in 2: start it with python" in output
    assert not (tmp_path / "run").exists()


# ---- A step on a device that is not there -------------------------------------------------------

PRETENDED_STEP = """
import sys
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

from bert import BertConfig, BertPretrainModel
from support.run import FiniteGuard
from train_pretrain import PretrainLosses, add_gradients, make_optimizer, update

def move(module, device):
    # `module.to(device)` cannot swap fake parameters.
    for part in module.modules():
        for name, parameter in list(part._parameters.items()):
            if parameter is not None:
                part._parameters[name] = torch.nn.Parameter(parameter.detach().to(device))

_setup_privateuseone_for_python_backend("pretended")
left_behind = sys.argv[1]
with FakeTensorMode():
    config = BertConfig.named("tiny", vocab_size=50, max_seq_length=16)
    model = BertPretrainModel(config, 0).train()
    move(model, "pretended:0")
    optimizer = make_optimizer(model)
    guard = FiniteGuard(torch.device("pretended:0"))
    batch = {
        "input_ids": torch.ones(2, 8, dtype=torch.int64),
        "token_type_ids": torch.zeros(2, 8, dtype=torch.int64),
        "positions": torch.tensor([1, 9]),
        "mlm_targets": torch.tensor([5, 6]),
        "nsp_labels": torch.tensor([0, 1]),
    }
    batch = {
        name: values if name == left_behind else values.to("pretended:0")
        for name, values in batch.items()
    }
    for step in range(2):
        losses = add_gradients(PretrainLosses(model), [batch, batch])
        norm = update(model, optimizer, 1e-3)
        guard.note(step, norm)
        if left_behind == "a number is read":
            norm.item()
    assert losses.device.type == norm.device.type == "pretended"
    assert guard.first_bad_step.device.type == "pretended"
print("two steps")
"""


def pretended_step(left_behind: str) -> subprocess.CompletedProcess:
    """Two steps of pretraining in a process of its own, since the registered device stays."""
    try:
        from torch.utils.backend_registration import (  # noqa: F401
            _setup_privateuseone_for_python_backend,
        )
    except ImportError:
        pytest.skip("this torch has no device that is registered from Python")
    line = [sys.executable, "-c", PRETENDED_STEP, left_behind]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(line, env=environment, capture_output=True, text=True)


@pytest.mark.slow
def test_a_step_mixes_no_devices_and_reads_no_number():
    """On fake tensors, which have shapes, types and devices, but no values: forward, backward,
    clipping, the fused optimizer, and the guard. Fake tensors do not notice an index on the CPU
    into a tensor on the device (`positions`), a CPU tensor without dimensions, or `.to("cpu")`.
    """
    ended = pretended_step("nothing")
    assert (ended.returncode, ended.stdout) == (0, "two steps\n"), ended.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    "left_behind", ["input_ids", "token_type_ids", "mlm_targets", "nsp_labels", "a number is read"]
)
def test_a_mixture_of_devices_or_a_number_that_is_read_would_be_noticed(left_behind):
    ended = pretended_step(left_behind)
    assert ended.returncode == 1
    assert "two steps" not in ended.stdout


# ---- With a GPU ---------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("device", ["cuda"], indirect=True)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("length", [64, 128, 192])
def test_the_fused_attention_has_the_gradients_of_the_explicit_one(length, dtype, device):
    """With padding. cuDNN's backward has given NaN at lengths of 64 modulo 128 with a mask."""
    torch.manual_seed(0)
    config = BertConfig.named("base")
    shape = (4, config.head_num, length, 64)
    inputs = [torch.randn(shape, device=device, dtype=dtype, requires_grad=True) for _ in range(3)]
    lengths = torch.tensor([length, length - 1, length // 2, 1], device=device)
    mask = (torch.arange(length, device=device) < lengths[:, None])[:, None, None, :]
    grad = torch.randn(shape, device=device, dtype=dtype) * mask.transpose(-1, -2)
    fused = torch.nn.functional.scaled_dot_product_attention(*inputs, mask)
    explicit, _ = attention(*inputs, mask)
    found = torch.autograd.grad(fused, inputs, grad)
    expected = torch.autograd.grad(explicit, inputs, grad)
    tolerance = 2e-2 if dtype == torch.bfloat16 else 1e-3
    for one, other in zip(found, expected, strict=True):
        assert one.isfinite().all()
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.parametrize("gpus", [1, 2])
def test_a_run_on_gpus_with_nccl_ends_and_is_resumed(gpus, tmp_path):
    if torch.cuda.device_count() < gpus:
        pytest.skip(f"fewer than {gpus} GPUs")
    small_tokenizer().save(str(tmp_path / "tokenizer.json"))
    line = ["train_pretrain.py", "--tokenizer", str(tmp_path / "tokenizer.json"), "--steps", "4"]
    line += ["--accumulate", "2", "--save-every", "2", "--eval-every", "2", "--log-every", "1"]
    line += ["--max-seq-length", "32", "--batch-size", "4", "--out", str(tmp_path / "run")]
    for more in ([], ["--resume"]):
        process = torchrun(gpus, *line, *more, cwd=ROOT)
        output, _ = process.communicate(timeout=300)
        assert process.returncode == 0, output
        newest = support.checkpoints.checkpoint_paths(tmp_path / "run")[-1]
        assert newest.name == "step-000000004.pt"
        newest.unlink()
