"""Several processes do what one does, in less time: torchrun on this machine, with gloo."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from strategies import LETTERS, PADDING, small_tokenizer
from test_training import SMALL, gradients, some_batches

import data
from bert import BertConfig, BertPretrainModel

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.slow


def torchrun(number: int, *arguments: str, **options) -> subprocess.Popen:
    line = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    line += [f"--nproc_per_node={number}", *arguments]
    path = os.pathsep.join(map(str, (ROOT, ROOT / "tests")))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(line, env=environment, **pipes, **options)


GRADIENTS = """
import sys, torch
from test_distributed import model_and_batches
from support.processes import join_processes
from torch.nn.parallel import DistributedDataParallel
from train_pretrain import PretrainLosses, add_gradients, to_device
rank, world_size = join_processes("cpu")
model, batches = model_and_batches()
mine = [to_device(batch, torch.device("cpu")) for batch in batches[rank::world_size]]
losses = add_gradients(DistributedDataParallel(PretrainLosses(model)), mine)
torch.distributed.all_reduce(losses)
if rank == 0:
    torch.save([losses] + [p.grad for p in model.parameters()], sys.argv[1])
torch.distributed.destroy_process_group()
"""


def model_and_batches() -> tuple[BertPretrainModel, list[dict]]:
    """In float64, with 4 micro-batches of unequal numbers of masked tokens."""
    torch.manual_seed(0)
    model = BertPretrainModel(SMALL, PADDING).double()
    sizes = (1, 5, 2, 3)
    return model, [some_batches(1, size, seed)[0] for seed, size in enumerate(sizes)]


def test_the_gradient_of_two_processes_is_that_of_one(tmp_path):
    """To 1e-12 in float64. A mean of the two processes' own gradients, as a control, is off."""
    (tmp_path / "gradients.py").write_text(GRADIENTS)
    process = torchrun(2, str(tmp_path / "gradients.py"), str(tmp_path / "gradients.pt"))
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    losses, *found = torch.load(tmp_path / "gradients.pt", weights_only=True)
    model, batches = model_and_batches()
    masked = [int((b["mlm_labels"] != data.IGNORED_LABEL).sum()) for b in batches]
    assert sum(masked[0::2]) != sum(masked[1::2])
    expected, expected_losses = gradients(model, batches)
    assert losses.tolist() == pytest.approx(list(map(float, expected_losses)), rel=1e-12)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
    halves = [gradients(model, batches[rank::2])[0] for rank in (0, 1)]
    naive = [(a + b) / 2 for a, b in zip(*halves, strict=True)]
    assert max((a - b).abs().max() for a, b in zip(naive, expected, strict=True)) > 1e-6


@pytest.fixture(scope="module")
def flags(tmp_path_factory) -> list[str]:
    """A corpus and a model; with dropout, which is the same for any number of processes."""
    folder = tmp_path_factory.mktemp("distributed")
    texts = [". ".join(f"{a}{b} {b} {a}{a}" for b in LETTERS[i % 13 :][:9])
             for i, a in enumerate(LETTERS * 4)]  # fmt: skip
    rows = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    (folder / "corpus.jsonl").write_text(rows)
    size = small_tokenizer().get_vocab_size()
    config = BertConfig.named("tiny", vocab_size=size, max_seq_length=32)
    BertPretrainModel(config, PADDING).save_pretrained(folder / "model", small_tokenizer())
    line = f"--dataset {folder}/corpus.jsonl --weights {folder}/model --max-seq-length 32"
    line += " --batch-size 2 --accumulate 4 --steps 12 --eval-every 6 --log-every 1 --save-every 4"
    return [str(ROOT / "train_pretrain.py"), *line.split(), "--workers", "0", "--device", "cpu"]


def lines(out: Path) -> list[dict]:
    """Without what a clock said."""
    found = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "seconds"} for line in found]


def assert_close(one: list[dict], other: list[dict]) -> None:
    """The same steps and tokens; losses up to the order in which float32 was summed."""
    assert len(one) == len(other)
    for left, right in zip(one, other, strict=True):
        assert left.pop("split") == right["split"]
        assert left == pytest.approx({k: right[k] for k in left}, rel=1e-4)


@pytest.fixture(scope="module")
def alone(flags, tmp_path_factory) -> list[dict]:
    out = tmp_path_factory.mktemp("alone")
    subprocess.run([sys.executable, *flags, "--out", str(out)], check=True, capture_output=True)
    return lines(out)


def test_two_processes_have_the_curve_of_one_and_only_the_first_writes(flags, alone, tmp_path):
    process = torchrun(2, *flags, "--out", str(tmp_path))
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    assert_close(lines(tmp_path), alone)
    names = {"config.json", "metrics.jsonl", "checkpoints", "model", "curves.png", ".lock"}
    assert {path.name for path in tmp_path.iterdir()} <= names
    assert output.count("documents left out") == 2  # one line for each split, from one process


def children(process: subprocess.Popen) -> list[int]:
    path = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    return [int(pid) for pid in path.read_text().split()]


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="no /proc")
def test_a_run_goes_on_with_another_number_of_processes(flags, alone, tmp_path):
    """Two are killed, four go on and are killed, one ends it: the same global batches."""
    metrics = tmp_path / "metrics.jsonl"
    for number, until in ((2, 6), (4, 10)):
        resume = ["--resume"] if metrics.exists() else []
        process = torchrun(number, *flags, "--out", str(tmp_path), *resume)
        while not metrics.exists() or f'"train", "step": {until - 1}' not in metrics.read_text():
            time.sleep(0.01)
            assert process.poll() is None
        ranks = children(process)
        assert len(ranks) == number
        for pid in (process.pid, *ranks):  # torchrun first, or it would report the others' deaths
            os.kill(pid, 9)
        process.wait()
        while any(Path(f"/proc/{pid}/cmdline").exists() and Path(f"/proc/{pid}/cmdline").read_text()
                  for pid in ranks):  # fmt: skip
            time.sleep(0.01)
        assert not (tmp_path / "model").exists()
    line = [sys.executable, *flags, "--out", str(tmp_path), "--resume"]
    subprocess.run(line, check=True, capture_output=True)
    assert_close(lines(tmp_path), alone)


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


@pytest.mark.skipif(not Path("/proc").exists(), reason="no /proc")
def test_no_thread_of_the_group_outlives_it(tmp_path):
    """One that does may abort the interpreter's exit, in one run of a dozen."""
    (tmp_path / "leaves.py").write_text(LEAVES)
    process = torchrun(2, str(tmp_path / "leaves.py"))
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output


def test_the_death_of_one_process_ends_all_with_a_message(flags, tmp_path):
    """Nobody waits for ever, and the run can be resumed."""
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


def test_micro_batches_that_cannot_be_dealt_are_refused(flags, tmp_path):
    process = torchrun(3, *flags, "--out", str(tmp_path))
    output, _ = process.communicate(timeout=120)
    assert process.returncode != 0
    assert "error: --accumulate 4 is no multiple of 3 ranks" in output
    assert list(tmp_path.iterdir()) == []
