"""Several ranks compute what one computes, in less time: on this machine, with gloo.

Most ranks here are forked with the environment that torchrun gives to its ranks, which is quicker.
"""

import math
import os
import signal
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from unittest import mock

import pytest
import torch
from helpers import (
    ROOT,
    assert_same,
    before_call,
    before_update,
    checkpoint_of,
    die,
    metrics_of,
    run,
    run_as_main,
    start,
    start_ranks,
    state,
    torchrun,
    wait,
    wait_until,
)
from strategies import (
    PADDING,
    PUBLISHABLE,
    SMALL,
    gradients,
    publish,
    small_tokenizer,
    some_batches,
    write_many_documents,
)
from torch.nn.parallel import DistributedDataParallel

import data
import train_pretrain
import train_sst2
from bert import BertPretrainModel
from train_pretrain import (
    PretrainLosses,
    PretrainOptions,
    add_gradients,
    count,
    join_ranks,
    on_rank_0,
    rank_and_ranks,
    total,
)

# ---- The group of ranks -------------------------------------------------------------------------


def join_as(
    monkeypatch, device: str | None, gpus: int, rank: int = 0, ranks: int = 1, local_rank: int = 0
) -> tuple[mock.Mock, mock.Mock]:
    """Joins a fake process group on a machine with `gpus` GPUs. Returns the mocks that are called
    to form the group and to take a GPU.
    """
    for name, value in {"RANK": rank, "WORLD_SIZE": ranks, "LOCAL_RANK": local_rank}.items():
        monkeypatch.setenv(name, str(value))
    form, take = mock.Mock(), mock.Mock()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.cuda, "set_device", take)
    monkeypatch.setattr(train_pretrain.dist, "init_process_group", form)
    join_ranks(device, accumulate=4)
    return form, take


@pytest.mark.parametrize(
    ("device", "gpus", "backend"),
    [
        (None, 1, "cpu:gloo,cuda:nccl"),
        ("cuda", 1, "cpu:gloo,cuda:nccl"),
        ("cpu", 1, "gloo"),
        (None, 0, "gloo"),
    ],
)
def test_cpu_tensors_have_a_backend_on_every_machine(device, gpus, backend, monkeypatch):
    """If no backend is named, a machine with a GPU gets only nccl, which cannot sum CPU tensors. A
    single rank forms a group, too."""
    form, _ = join_as(monkeypatch, device, gpus)
    a_day = timedelta(days=1)  # in which rank 0 may tokenize
    form.assert_called_once_with(backend, timeout=a_day)


def test_each_rank_takes_a_gpu_of_its_machine(monkeypatch):
    """On two machines with two GPUs each, rank 3 takes the second GPU of the second machine."""
    second = {"gpus": 2, "rank": 3, "ranks": 4, "local_rank": 1}
    join_as(monkeypatch, None, **second)[1].assert_called_once_with(1)
    join_as(monkeypatch, "cpu", **second)[1].assert_not_called()
    with pytest.raises(ValueError, match="--nproc_per_node"):
        join_as(monkeypatch, None, gpus=2, rank=2, ranks=4, local_rank=2)
    with pytest.raises(ValueError, match="--device"):
        join_as(monkeypatch, "cuda:1", **second)


def test_micro_batches_that_ranks_cannot_share_are_rejected_before_they_join(monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(ValueError, match="--accumulate 4 .* 3 ranks"):
        train_pretrain.pretrain(PretrainOptions(accumulate=4))


def test_fine_tuning_with_several_ranks_is_rejected(tmp_path, monkeypatch):
    """All ranks would compute the same, and write every line twice."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="torchrun"):
        train_sst2.main(train_sst2.SST2Options(out=str(tmp_path / "run")))
    assert not (tmp_path / "run").exists()


def test_the_death_of_a_data_worker_is_reported_and_that_of_another_rank_is_not(monkeypatch):
    """torch may report a worker's death anywhere, even while ranks sum. The end of another rank is
    reported by it or by torchrun."""
    monkeypatch.setattr(train_pretrain.dist, "is_initialized", lambda: True)
    for reason, expected in (("DataLoader worker is killed", RuntimeError), ("EOF", SystemExit)):
        fail = mock.Mock(side_effect=RuntimeError(reason))
        monkeypatch.setattr(train_pretrain.dist, "all_reduce", fail)
        with pytest.raises(expected):
            total(1)


# ---- The same results ---------------------------------------------------------------------------


def test_a_step_has_one_sum_over_the_ranks(options, monkeypatch):
    """Counts and signals, four numbers, are summed together; the two losses only for a line."""
    sums = []
    monkeypatch.setattr(train_pretrain, "total", lambda *of: sums.append(len(of)) or list(of))
    run(replace(options, log_every=100, eval_every=100, save_every=100))
    first = sums.index(4)
    assert sums[first : first + options.steps] == [4] * options.steps
    assert sums.count(2) == 1


def save_gradients(file: Path) -> None:
    """Saves the losses and gradients of all ranks, which share the batches. Their group is as on a
    machine with GPUs."""
    init = torch.distributed.init_process_group
    train_pretrain.dist.init_process_group = lambda _, **more: init("cpu:gloo,cuda:gloo", **more)
    join_ranks("cpu", accumulate=4)
    rank, ranks = rank_and_ranks()
    assert total(rank, 2.0**24 + 1) == [1, 2**25 + 2]  # float32 has no such number
    assert on_rank_0(int, "5") == (5 if rank == 0 else None)
    model, batches = model_and_batches()
    mine = batches[rank::ranks]
    masked, pairs, _ = total(*count(mine, PADDING))
    losses = add_gradients(DistributedDataParallel(PretrainLosses(model)), mine, masked, pairs)
    torch.distributed.all_reduce(losses)
    if rank == 0:
        torch.save([losses] + [p.grad for p in model.parameters()], file)
    torch.distributed.destroy_process_group()


def model_and_batches() -> tuple[BertPretrainModel, list[dict]]:
    """Returns a model in float64, and 4 micro-batches with unequal numbers of masked tokens."""
    torch.manual_seed(0)
    model = BertPretrainModel(SMALL, PADDING).double()
    sizes = (1, 5, 2, 3)
    return model, [some_batches(1, size, seed)[0] for seed, size in enumerate(sizes)]


@pytest.mark.slow
def test_the_gradient_of_two_ranks_is_that_of_one(tmp_path):
    """They agree to 1e-12 in float64. The mean of the two ranks' own gradients, as a control, does
    not."""
    ranks = start_ranks(2, save_gradients, tmp_path / "gradients.pt", output=tmp_path / "output")
    assert wait(*ranks) == [0, 0], (tmp_path / "output").read_text()
    losses, *found = torch.load(tmp_path / "gradients.pt", weights_only=True)
    model, batches = model_and_batches()
    masked = [int((b["mlm_labels"] != data.IGNORED_LABEL).sum()) for b in batches]
    assert sum(masked[0::2]) != sum(masked[1::2])
    expected_losses, *expected = gradients(model, batches)
    assert losses.tolist() == pytest.approx(expected_losses.tolist(), rel=1e-12)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
    halves = [gradients(model, batches[rank::2])[1:] for rank in (0, 1)]
    naive = [(a + b) / 2 for a, b in zip(*halves, strict=True)]
    assert max((a - b).abs().max() for a, b in zip(naive, expected, strict=True)) > 1e-6


@pytest.fixture(scope="module")
def flags(tmp_path_factory) -> list[str]:
    """The flags of a run with dropout, and with Muon beside AdamW. It is the same for any number of
    ranks."""
    folder = tmp_path_factory.mktemp("distributed")
    write_many_documents(folder / "corpus.jsonl")
    publish(folder / "model", replace(PUBLISHABLE, max_seq_length=32, dropout=0.1))
    line = f"--dataset {folder}/corpus.jsonl --weights {folder}/model --max-seq-length 32"
    line += " --batch-size 2 --accumulate 2 --steps 12 --eval-every 6 --log-every 1"
    line += " --save-every 4 --workers 1 --device cpu --precision float32 --optimizer muon"
    return [str(ROOT / "train_pretrain.py"), *line.split()]


def pretrain_with_event(number: int, rank: int, event, *line: str) -> None:
    """Runs the script; before this update, counted from 0, something happens on one rank."""
    if os.environ["RANK"] != str(rank):
        number = -1
    with before_update(number, event), mock.patch("sys.argv", list(line)):
        train_pretrain.run_script(train_pretrain.pretrain, PretrainOptions)


def two_ranks(flags: list[str], out: Path, *more: str, number=-1, rank=0, event=die) -> list[int]:
    """Returns the exit statuses of two ranks, whose output is beside `out`."""
    line = (*flags, "--out", str(out), *more)
    output = out.with_name("output")
    return wait(*start_ranks(2, pretrain_with_event, number, rank, event, *line, output=output))


@pytest.fixture(scope="module")
def alone(flags, tmp_path_factory) -> list[dict]:
    """The lines of a run with one rank, in a group of one, as torchrun would form it."""
    out = tmp_path_factory.mktemp("alone") / "run"
    assert wait(*start_ranks(1, run_as_main, *flags, "--out", str(out))) == [0]
    return metrics_of(out)


@pytest.fixture(scope="module")
def together(flags, tmp_path_factory) -> Path:
    """The folder of a run with two ranks."""
    out = tmp_path_factory.mktemp("together") / "run"
    assert two_ranks(flags, out) == [0, 0], out.with_name("output").read_text()
    return out


def assert_close(one: list[dict], other: list[dict]) -> None:
    """Fails unless steps and tokens are the same, and losses agree up to the order of summing
    float32."""
    assert len(one) == len(other)
    for left, right in zip(one, other, strict=True):
        assert left.pop("split") == right["split"]
        assert left == pytest.approx({k: right[k] for k in left}, rel=1e-4)


@pytest.mark.slow
def test_two_ranks_have_the_curve_of_one_and_only_the_first_writes(alone, together):
    assert_close(metrics_of(together), alone)
    names = {"config.json", "metrics.jsonl", "checkpoint.pt", "model", ".lock"}
    assert names <= {path.name for path in together.iterdir()} <= names | {"curves.png"}
    assert together.with_name("output").read_text().count("validation: ") == 1  # from one rank


# ---- The end of a run ---------------------------------------------------------------------------


@pytest.mark.slow
def test_ctrl_c_to_torchrun_saves_and_ends_all_ranks(flags, tmp_path):
    """torchrun passes it on to the groups of its ranks."""
    out = tmp_path / "run"
    long = ("--steps", "100000", "--save-every", "100000")  # so that only the signal saves
    process = start(torchrun, 2, *flags, "--out", str(out), *long)
    metrics = out / "metrics.jsonl"
    wait_until(lambda: metrics.exists() and '"train", "step": 3,' in metrics.read_text(), process)
    os.killpg(process.pid, signal.SIGINT)
    wait(process)
    assert checkpoint_of(out)["progress"]["step"] == metrics_of(out)[-1]["step"] >= 3
    assert not (out / "model").exists()


@pytest.mark.slow
def test_sigterm_to_one_of_two_ranks_saves_and_ends_both(flags, together, tmp_path):
    """Both resume to the bits of two ranks that were never stopped."""
    out = tmp_path / "run"
    sigterm = {"number": 5, "rank": 1, "event": send_sigterm}
    assert two_ranks(flags, out, "--save-every", "1000", **sigterm) == [1, 1]
    printed = (tmp_path / "output").read_text()
    assert printed.count("--resume") == 1
    assert "Traceback" not in printed
    assert checkpoint_of(out)["progress"]["step"] == 7  # that update, and one more
    assert two_ranks(flags, out, "--resume") == [0, 0]
    assert_same(state(out), state(together))


def send_sigterm(*_) -> None:
    os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.slow
def test_the_death_of_one_rank_ends_both_and_one_rank_resumes_the_run(flags, alone, tmp_path):
    """No rank waits forever, and the global batches are those of any number of ranks."""
    out = tmp_path / "run"
    first, second = two_ranks(flags, out, number=6, rank=1, event=die)
    assert first != 0
    assert second == -signal.SIGKILL
    assert checkpoint_of(out)["progress"]["step"] == 4
    assert not (out / "model").exists()
    assert wait(start(run_as_main, *flags, "--out", str(out), "--resume")) == [0]
    assert_close(metrics_of(out), alone)


def the_error_in(output: Path) -> str:
    printed = output.read_text()
    assert "Traceback" not in printed, printed
    (error,) = [line for line in printed.splitlines() if "error: " in line]
    return error


@pytest.mark.slow
def test_a_mistake_that_rank_0_alone_can_see_ends_both_with_one_message(flags, tmp_path):
    mistake = ("--dataset", "no/such/place")
    assert two_ranks(flags, tmp_path / "run", *mistake) == [2, 2]
    assert "no/such/place" in the_error_in(tmp_path / "output")
    assert not (tmp_path / "run").exists()


def poison(losses_of, *_) -> None:
    losses_of.module.model.nsp.bias.register_hook(lambda gradient: gradient * math.nan)


def pretrain_with_nan_on_rank_1(*line: str) -> None:
    number = 6 if os.environ["RANK"] == "1" else -1
    with before_call(train_pretrain, "add_gradients", number, poison):
        pretrain_with_event(-1, 0, die, *line)


@pytest.mark.slow
def test_nan_on_one_rank_ends_both_with_one_message_and_a_good_checkpoint(flags, tmp_path):
    line = [*flags, "--out", str(tmp_path / "run")]
    ranks = start_ranks(2, pretrain_with_nan_on_rank_1, *line, output=tmp_path / "output")
    assert wait(*ranks) == [2, 2]
    assert "--learning-rate" in the_error_in(tmp_path / "output")
    found = checkpoint_of(tmp_path / "run")
    assert found["progress"]["step"] == 4
    assert all(tensor.isfinite().all() for tensor in found["model"].values())


# ---- With GPUs ----------------------------------------------------------------------------------


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
        process = start(torchrun, gpus, *line, *more, output=tmp_path / "output")
        assert wait(process) == [0], (tmp_path / "output").read_text()
        assert checkpoint_of(tmp_path / "run")["progress"]["step"] == 4
