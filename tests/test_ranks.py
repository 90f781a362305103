"""Several ranks compute what one computes, in less time: on this machine, with gloo.

Most ranks here are forked with the environment that torchrun gives to its ranks, which is quicker.
"""

import math
import multiprocessing
import os
import signal
import time
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from unittest import mock

import pytest
import torch
from helpers import (
    ROOT,
    assert_same,
    checkpoint_of,
    metrics_of,
    run,
    run_as_main,
    start,
    start_ranks,
    torchrun,
    wait,
)
from strategies import (
    PADDING,
    SMALL,
    TINY,
    gradients,
    publish,
    small_tokenizer,
    some_batches,
    write_many_documents,
)
from torch.nn.parallel import DistributedDataParallel

import data
import train_pretrain
from bert import BertPretrainModel
from train_pretrain import (
    PretrainLosses,
    PretrainOptions,
    add_gradients,
    count,
    join_ranks,
    rank_and_ranks,
    to_device,
    total,
)

# ---- The group of ranks -------------------------------------------------------------------------


def join_as(
    monkeypatch, device: str | None, gpus: int, rank: int = 0, ranks: int = 1, local_rank: int = 0
) -> tuple[str, dict, list[int]]:
    """Joins a pretended group on a machine with so many GPUs. Returns the backend, other arguments,
    and the GPUs that were taken.
    """
    for name, value in {"RANK": rank, "WORLD_SIZE": ranks, "LOCAL_RANK": local_rank}.items():
        monkeypatch.setenv(name, str(value))
    joined: list = []
    taken: list[int] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    monkeypatch.setattr(
        train_pretrain.dist, "init_process_group", lambda *how, **more: joined.append((*how, more))
    )
    join_ranks(device, accumulate=4)
    ((backend, more),) = joined
    return backend, more, taken


@pytest.mark.parametrize(
    ("device", "gpus", "backend"),
    [
        (None, 1, "cpu:gloo,cuda:nccl"),
        ("cuda", 1, "cpu:gloo,cuda:nccl"),
        ("cpu", 1, "gloo"),
        (None, 0, "gloo"),
        ("cpu", 0, "gloo"),
    ],
)
def test_cpu_tensors_have_a_backend_on_every_machine(device, gpus, backend, monkeypatch):
    """Without a named backend, a machine with a GPU has nccl alone: no sum of CPU tensors. A single
    rank forms a group, too."""
    found, more, _ = join_as(monkeypatch, device, gpus)
    assert found == backend
    assert more == {"timeout": timedelta(days=1)}  # in which rank 0 may tokenize


def test_each_rank_takes_a_gpu_of_its_machine(monkeypatch):
    """On two machines with two GPUs each, rank 3 takes the second GPU of the second machine."""
    assert join_as(monkeypatch, None, gpus=2, rank=3, ranks=4, local_rank=1)[2] == [1]
    assert join_as(monkeypatch, "cpu", gpus=2, rank=3, ranks=4, local_rank=1)[2] == []
    with pytest.raises(ValueError, match="--nproc_per_node"):
        join_as(monkeypatch, None, gpus=2, rank=2, ranks=4, local_rank=2)


def sum_over_ranks() -> None:
    init = torch.distributed.init_process_group
    train_pretrain.dist.init_process_group = lambda _, **more: init("cpu:gloo,cuda:gloo", **more)
    join_ranks("cpu", accumulate=2)
    rank, ranks = rank_and_ranks()
    assert total(rank, 10) == [sum(range(ranks)), 10 * ranks]
    ones = torch.ones(2)
    torch.distributed.all_reduce(ones)
    assert ones.tolist() == [ranks, ranks]
    torch.distributed.destroy_process_group()
    print(f"rank {rank} of {ranks} is done")


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_ranks_sum_cpu_tensors_beside_a_backend_for_the_accelerator(ranks, tmp_path):
    """The group is as on a machine with GPUs."""
    statuses = wait(*start_ranks(ranks, sum_over_ranks, output=tmp_path / "output"))
    output = (tmp_path / "output").read_text()
    assert statuses == [0] * ranks, output
    assert output.count(f"of {ranks} is done") == ranks


def test_micro_batches_that_ranks_cannot_share_are_rejected_before_they_join(monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(ValueError, match="--accumulate 4 .* 3 ranks"):
        train_pretrain.pretrain(PretrainOptions(accumulate=4))


@pytest.mark.slow
def test_fine_tuning_with_several_ranks_is_rejected(tmp_path):
    """All ranks would compute the same, and write every line twice."""
    line = ("train_sst2.py", "--out", str(tmp_path / "run"))
    assert wait(*start_ranks(2, run_as_main, *line, output=tmp_path / "output")) == [2, 2]
    output = (tmp_path / "output").read_text()
    assert output.count("error: ") == 2
    assert "Traceback" not in output
    assert not (tmp_path / "run").exists()


# ---- The same results ---------------------------------------------------------------------------


def save_gradients(file: Path) -> None:
    """Saves the losses and gradients of all ranks, which share the batches."""
    join_ranks("cpu", accumulate=4)
    rank, ranks = rank_and_ranks()
    model, batches = model_and_batches()
    masked, pairs, _ = total(*count(batches[rank::ranks], PADDING))
    mine = [to_device(batch, torch.device("cpu")) for batch in batches[rank::ranks]]
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
    """The flags of a run with dropout, which is the same for any number of ranks."""
    folder = tmp_path_factory.mktemp("distributed")
    write_many_documents(folder / "corpus.jsonl")
    publish(folder / "model", replace(TINY, max_seq_length=32))
    line = f"--dataset {folder}/corpus.jsonl --weights {folder}/model --max-seq-length 32"
    line += " --batch-size 2 --accumulate 4 --steps 12 --eval-every 6 --log-every 1 --save-every 4"
    line += " --workers 0 --device cpu --precision float32"
    return [str(ROOT / "train_pretrain.py"), *line.split()]


def assert_close(one: list[dict], other: list[dict]) -> None:
    """Fails unless steps and tokens are the same, and losses agree up to the order of summing
    float32."""
    assert len(one) == len(other)
    for left, right in zip(one, other, strict=True):
        assert left.pop("split") == right["split"]
        assert left == pytest.approx({k: right[k] for k in left}, rel=1e-4)


@pytest.fixture(scope="module")
def alone(flags, tmp_path_factory) -> list[dict]:
    out = tmp_path_factory.mktemp("alone")
    assert wait(start(run_as_main, *flags, "--out", str(out))) == [0]
    return metrics_of(out)


@pytest.mark.slow
def test_two_ranks_have_the_curve_of_one_and_only_the_first_writes(flags, alone, tmp_path):
    out, output = tmp_path / "run", tmp_path / "output"
    ranks = start_ranks(2, run_as_main, *flags, "--out", str(out), output=output)
    assert wait(*ranks) == [0, 0], output.read_text()
    assert_close(metrics_of(out), alone)
    names = {"config.json", "metrics.jsonl", "checkpoint.pt", "model", "curves.png", ".lock"}
    assert {path.name for path in out.iterdir()} <= names
    assert output.read_text().count("validation: ") == 1  # from one rank


@pytest.mark.slow
def test_a_run_resumes_with_another_number_of_ranks(flags, alone, tmp_path):
    """Two ranks are killed, four resume and are killed, and one ends the run: the global batches
    are the same."""
    metrics = tmp_path / "metrics.jsonl"
    for world_size, until in ((2, 6), (4, 10)):
        resume = ["--resume"] if metrics.exists() else []
        ranks = start_ranks(world_size, run_as_main, *flags, "--out", str(tmp_path), *resume)
        wait_for_step(metrics, until, ranks)
        for rank in ranks:
            rank.kill()
        assert wait(*ranks) == [-9] * world_size
        assert not (tmp_path / "model").exists()
    assert wait(start(run_as_main, *flags, "--out", str(tmp_path), "--resume")) == [0]
    assert_close(metrics_of(tmp_path), alone)


def wait_for_step(metrics: Path, step: int, ranks: list) -> None:
    deadline = time.monotonic() + 60
    while not metrics.exists() or f'"train", "step": {step},' not in metrics.read_text():
        time.sleep(0.005)
        assert all(rank.is_alive() for rank in ranks)
        assert time.monotonic() < deadline


LEAVES = """
import os, torch
from train_pretrain import join_ranks, make_optimizer, update
join_ranks("cpu", 2)
model = torch.nn.Linear(2, 2)
model(torch.ones(1, 2)).sum().backward()
torch.distributed.all_reduce(model.weight.grad)
update(model, make_optimizer(model), 1e-3)
torch.distributed.destroy_process_group()
threads = [open(f"/proc/self/task/{t}/comm").read() for t in os.listdir("/proc/self/task")]
assert not any("gloo" in name for name in threads), threads
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc").exists(), reason="no /proc")
def test_no_thread_of_the_group_outlives_it(tmp_path):
    """A thread that does may abort the interpreter's exit, in one run of a dozen."""
    (tmp_path / "leaves.py").write_text(LEAVES)
    process = torchrun(2, str(tmp_path / "leaves.py"))
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output


@pytest.mark.slow
def test_the_death_of_one_rank_ends_all_with_a_message(flags, tmp_path):
    """No rank waits for ever, and the run can be resumed."""
    (tmp_path / "dies.py").write_text(
        "import os, signal, sys, train_pretrain\n"
        "real, steps = train_pretrain.update, iter(range(100))\n"
        "def update(*arguments):\n"
        "    if os.environ['RANK'] == '1' and next(steps) == 6:\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return real(*arguments)\n"
        "train_pretrain.update = update\n"
        "train_pretrain.run_script(train_pretrain.pretrain, train_pretrain.PretrainOptions)\n"
    )
    process = torchrun(2, str(tmp_path / "dies.py"), *flags[1:], "--out", str(tmp_path / "run"))
    output, _ = process.communicate(timeout=120)
    assert process.returncode != 0
    assert "Signal 9 (SIGKILL) received" in output
    assert checkpoint_of(tmp_path / "run")["progress"]["step"] == 4
    assert not (tmp_path / "run/model").exists()


def errors_in(output: Path) -> list[str]:
    printed = output.read_text()
    assert "Traceback" not in printed, printed
    return [line for line in printed.splitlines() if "error: " in line]


@pytest.mark.slow
@pytest.mark.parametrize("how", [["--accumulate", "3"], ["--dataset", "no/such/place"]])
def test_a_mistake_ends_two_ranks(how, flags, tmp_path):
    """What rank 0 alone can see, such as a missing corpus, is one message."""
    line = [*flags, "--out", str(tmp_path / "run"), *how]
    assert wait(*start_ranks(2, run_as_main, *line, output=tmp_path / "output")) == [2, 2]
    errors = errors_in(tmp_path / "output")
    assert len(errors) == (2 if "--accumulate" in how else 1)
    assert all(how[1] in error for error in errors)
    assert not (tmp_path / "run").exists()


def pretrain_with_nan_on_rank_1(*line: str) -> None:
    add_gradients = train_pretrain.add_gradients
    steps = iter(range(100))

    def poisoned(losses_of, *arguments):
        if next(steps) == 6 and os.environ["RANK"] == "1":
            losses_of.module.model.nsp.bias.register_hook(lambda gradient: gradient * math.nan)
        return add_gradients(losses_of, *arguments)

    with mock.patch.object(train_pretrain, "add_gradients", poisoned):
        run_pretrain(*line)


def run_pretrain(*line: str) -> None:
    with mock.patch("sys.argv", list(line)):
        train_pretrain.run_script(train_pretrain.pretrain, PretrainOptions)


@pytest.mark.slow
def test_nan_on_one_rank_ends_both_with_one_message_and_a_good_checkpoint(flags, tmp_path):
    line = [*flags, "--out", str(tmp_path / "run")]
    ranks = start_ranks(2, pretrain_with_nan_on_rank_1, *line, output=tmp_path / "output")
    assert wait(*ranks) == [2, 2]
    (error,) = errors_in(tmp_path / "output")
    assert "--learning-rate" in error
    found = checkpoint_of(tmp_path / "run")
    assert found["progress"]["step"] == 4
    assert all(tensor.isfinite().all() for tensor in found["model"].values())


@pytest.mark.slow
@pytest.mark.parametrize("receiver", [0, 1])
def test_sigterm_to_one_of_two_ranks_saves_and_ends_both(receiver, flags, tmp_path):
    """Both resume to the bits of two ranks that were never stopped."""
    whole, out = tmp_path / "whole", tmp_path / "run"
    line = [*flags, "--save-every", "1000", "--workers", "1"]
    assert wait(*start_ranks(2, run_pretrain, *line, "--out", str(whole))) == [0, 0]
    ranks = start_ranks(2, run_pretrain, *line, "--out", str(out), output=tmp_path / "output")
    wait_for_step(out / "metrics.jsonl", 3, ranks)
    os.kill(ranks[receiver].pid, signal.SIGTERM)
    assert wait(*ranks) == [1, 1]
    printed = (tmp_path / "output").read_text()
    assert printed.count("--resume") == 1
    assert "Traceback" not in printed
    assert wait(*start_ranks(2, run_pretrain, *line, "--out", str(out), "--resume")) == [0, 0]
    assert_same(checkpoint_of(out), checkpoint_of(whole))
    assert metrics_of(out) == metrics_of(whole)


@pytest.mark.slow
def test_ctrl_c_to_torchrun_saves_and_the_run_resumes_to_the_same_bits(flags, tmp_path):
    """torchrun passes it on to the groups of its ranks."""
    whole, out = tmp_path / "whole", tmp_path / "run"
    line = [*flags, "--workers", "2", "--save-every", "1000"]
    assert wait(*start_ranks(2, run_pretrain, *line, "--out", str(whole))) == [0, 0]
    process = torchrun(2, *line, "--out", str(out), start_new_session=True)
    metrics = out / "metrics.jsonl"
    deadline = time.monotonic() + 60
    while not metrics.exists() or '"train", "step": 3,' not in metrics.read_text():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.005)
    os.killpg(process.pid, signal.SIGINT)
    process.communicate(timeout=60)
    assert 3 <= checkpoint_of(out)["progress"]["step"] < 12
    assert wait(*start_ranks(2, run_pretrain, *line, "--out", str(out), "--resume")) == [0, 0]
    assert_same(checkpoint_of(out), checkpoint_of(whole))


def test_a_step_has_one_sum_over_the_ranks(options, monkeypatch):
    """Counts and signals are summed together; losses only where a line is written."""
    sums = []

    def counted(*numbers):
        sums.append(len(numbers))
        return list(numbers)

    monkeypatch.setattr(train_pretrain, "total", counted)
    run(replace(options, log_every=100, eval_every=100, save_every=100))
    assert sums.count(4) == options.steps
    assert sums.count(2) == 1


# ---- Data workers -------------------------------------------------------------------------------


@pytest.mark.parametrize("streaming", [False, True])
def test_data_workers_are_in_groups_of_their_own(streaming, options, tmp_path, monkeypatch):
    """A terminal sends Ctrl-C to the group. A worker that died of it would end the run before it
    has saved.
    """
    corpus = write_many_documents(tmp_path / "corpus.jsonl")
    groups, others = [], set(multiprocessing.active_children())

    def note_groups(*arguments):
        workers = set(multiprocessing.active_children()) - others
        groups.extend((worker.pid, os.getpgid(worker.pid)) for worker in workers)
        return update(*arguments)

    update = train_pretrain.update
    monkeypatch.setattr(train_pretrain, "update", note_groups)
    run(replace(options, dataset=corpus, streaming=streaming, workers=1, steps=1, eval_every=1))
    ((process, group),) = groups  # as many as --workers
    assert process == group


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
        process = torchrun(gpus, *line, *more, cwd=ROOT)
        output, _ = process.communicate(timeout=300)
        assert process.returncode == 0, output
        assert checkpoint_of(tmp_path / "run")["progress"]["step"] == 4
