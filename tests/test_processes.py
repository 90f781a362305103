"""Several ranks compute what one computes, in less time: on this machine, with gloo.

Most ranks here are forked with the environment that torchrun gives to its ranks, which is quicker.
"""

import multiprocessing
import os
import time
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from helpers import ROOT, metrics_of, run, run_as_main, start, start_ranks, torchrun, wait
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
import support.checkpoints
import support.processes
import train_pretrain
from bert import BertPretrainModel
from support.processes import join_processes, need_one_process, process_group_backend
from train_pretrain import PretrainLosses, add_gradients, to_device

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
def test_cpu_tensors_have_a_backend_on_every_machine(device, has_cuda, backend):
    """Without a named backend, a machine with a GPU has nccl alone: no sum of CPU tensors."""
    assert process_group_backend(device, has_cuda) == backend


def sum_over_ranks() -> None:
    support.processes.process_group_backend = lambda device, has_cuda: "cpu:gloo,cuda:gloo"
    rank, world_size = join_processes("cpu")  # a GPU is not needed
    assert support.processes.total(rank, 10) == [sum(range(world_size)), 10 * world_size]
    ones = torch.ones(2)
    torch.distributed.all_reduce(ones)
    assert ones.tolist() == [world_size, world_size]
    torch.distributed.destroy_process_group()
    print(f"rank {rank} of {world_size} is done")


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_ranks_sum_cpu_tensors_beside_a_backend_for_the_accelerator(ranks, tmp_path):
    """The group is as on a machine with GPUs; a single rank forms a group, too."""
    statuses = wait(*start_ranks(ranks, sum_over_ranks, output=tmp_path / "output"))
    output = (tmp_path / "output").read_text()
    assert statuses == [0] * ranks, output
    assert output.count(f"of {ranks} is done") == ranks


@pytest.mark.parametrize(("variable", "other"), [("RANK", "WORLD_SIZE"), ("WORLD_SIZE", "RANK")])
def test_half_of_what_torchrun_sets_is_rejected(variable, other, monkeypatch):
    monkeypatch.setenv(variable, "0")
    monkeypatch.delenv(other, raising=False)
    message = (
        f"^{variable} is set in the environment, but RANK and WORLD_SIZE belong together:"
        " use torchrun, or unset it$"
    )
    with pytest.raises(ValueError, match=message):
        join_processes()


@pytest.mark.parametrize(("rank", "world_size"), [("0", "0"), ("2", "2"), ("-1", "2")])
def test_a_rank_that_cannot_be_is_rejected(rank, world_size, monkeypatch):
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("WORLD_SIZE", world_size)
    with pytest.raises(ValueError, match=f"RANK {rank} of WORLD_SIZE {world_size} in the env"):
        join_processes()


def test_ranks_never_share_one_gpu(monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    message = "^--device cuda:0 would put all 2 ranks on one GPU; .* each takes its own$"
    with pytest.raises(ValueError, match=message):
        join_processes("cuda:0")
    with pytest.raises(ValueError, match="--device cuda:0 would put all 2 ranks on one GPU"):
        train_pretrain.pretrain(train_pretrain.PretrainOptions(device="cuda:0"))


def test_each_rank_takes_a_gpu_of_its_machine_and_waits_for_the_others_for_a_day(monkeypatch):
    """On two machines with two GPUs each, rank 3 takes the second GPU of the second machine."""
    for name, value in {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    taken, groups = [], []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    monkeypatch.setattr(
        support.processes.dist, "init_process_group", lambda *a, **k: groups.append((*a, k))
    )
    assert join_processes("cuda", micro_batches=4) == (3, 4)
    assert taken == [1]
    assert groups == [("cpu:gloo,cuda:nccl", {"timeout": timedelta(days=1)})]
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(ValueError, match="--nproc_per_node: 2 GPUs for 3 ranks or more"):
        join_processes()

    # Without LOCAL_RANK there is one machine. On the CPU no GPU is taken. One rank may name a GPU.
    monkeypatch.delenv("LOCAL_RANK")
    monkeypatch.setenv("RANK", "1")
    join_processes("cuda")
    join_processes("cpu")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    join_processes("cuda:0")
    assert taken == [1, 1, 0]
    backends = [backend for backend, _ in groups[1:]]
    assert backends == ["cpu:gloo,cuda:nccl", "gloo", "cpu:gloo,cuda:nccl"]


def test_micro_batches_that_ranks_cannot_share_are_rejected_before_they_join(monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "3")
    options = train_pretrain.PretrainOptions(accumulate=4)
    with pytest.raises(ValueError, match="^--accumulate 4 is no multiple of 3 ranks$"):
        train_pretrain.pretrain(options)


def test_only_the_first_rank_locks_the_folder(options, monkeypatch):
    def stop(*arguments):
        raise InterruptedError(arguments)

    monkeypatch.setattr(train_pretrain, "join_processes", lambda *_: (1, 2))
    monkeypatch.setattr(train_pretrain, "run_folder", stop)
    with pytest.raises(InterruptedError) as stopped:
        train_pretrain.pretrain(options)
    assert stopped.value.args == ((replace(options, precision="float32"), 1),)


def test_fine_tuning_accepts_one_rank_and_rejects_two(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    need_one_process()
    monkeypatch.setenv("WORLD_SIZE", "1")
    need_one_process()
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="fine-tuning runs in one process, not in 2"):
        need_one_process()


@pytest.mark.slow
def test_fine_tuning_with_several_ranks_is_rejected(tmp_path):
    """All ranks would compute the same, and write every line twice."""
    line = ("train_sst2.py", "--out", str(tmp_path / "run"))
    assert wait(*start_ranks(2, run_as_main, *line, output=tmp_path / "output")) == [2, 2]
    output = (tmp_path / "output").read_text()
    message = "error: fine-tuning runs in one process, not in 2: start it with python"
    assert output.count(message) == 2
    assert not (tmp_path / "run").exists()


# ---- The same results ---------------------------------------------------------------------------


def save_gradients(file: Path) -> None:
    """Saves the losses and gradients of all ranks, which share the batches."""
    rank, world_size = join_processes("cpu")
    model, batches = model_and_batches()
    mine = [to_device(batch, torch.device("cpu")) for batch in batches[rank::world_size]]
    losses = add_gradients(DistributedDataParallel(PretrainLosses(model)), mine)
    torch.distributed.all_reduce(losses)
    if rank == 0:
        torch.save([losses] + [p.grad for p in model.parameters()], file)
    torch.distributed.destroy_process_group()


def model_and_batches() -> tuple[BertPretrainModel, list[dict]]:
    """Returns a model in float64, and 4 micro-batches with unequal numbers of masked positions."""
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
    names = {"config.json", "metrics.jsonl", "checkpoints", "model", "curves.png", ".lock"}
    assert {path.name for path in out.iterdir()} <= names
    # One line for each split, from one rank.
    assert output.read_text().count("documents left out") == 2


@pytest.mark.slow
def test_a_run_resumes_with_another_number_of_ranks(flags, alone, tmp_path):
    """Two ranks are killed, four resume and are killed, and one ends the run: the global batches
    are the same."""
    metrics = tmp_path / "metrics.jsonl"
    for world_size, until in ((2, 6), (4, 10)):
        resume = ["--resume"] if metrics.exists() else []
        ranks = start_ranks(world_size, run_as_main, *flags, "--out", str(tmp_path), *resume)
        while not metrics.exists() or f'"train", "step": {until - 1}' not in metrics.read_text():
            time.sleep(0.01)
            assert all(rank.is_alive() for rank in ranks)
        for rank in ranks:
            rank.kill()
        assert wait(*ranks) == [-9] * world_size
        assert not (tmp_path / "model").exists()
    assert wait(start(run_as_main, *flags, "--out", str(tmp_path), "--resume")) == [0]
    assert_close(metrics_of(tmp_path), alone)


LEAVES = """
import os, torch
from support.processes import join_processes
from train_pretrain import make_optimizer, update
join_processes("cpu")
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
    assert (tmp_path / "run/checkpoints/step-000000004.pt").exists()
    assert not (tmp_path / "run/model").exists()


@pytest.mark.slow
def test_micro_batches_that_the_ranks_cannot_share_are_rejected(flags, tmp_path):
    line, output = [*flags, "--out", str(tmp_path / "run")], tmp_path / "output"
    assert wait(*start_ranks(3, run_as_main, *line, output=output)) == [2, 2, 2]
    assert "error: --accumulate 4 is no multiple of 3 ranks" in output.read_text()
    assert not (tmp_path / "run").exists()


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
        newest = support.checkpoints.checkpoint_paths(tmp_path / "run")[-1]
        assert newest.name == "step-000000004.pt"
        newest.unlink()
