"""Starts the runs that several test files need: in this process, in another, in several ranks."""

import contextlib
import io
import itertools
import json
import multiprocessing
import os
import runpy
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from multiprocessing import forkserver
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from strategies import small_tokenizer, write_reviews
from tokenizers import Tokenizer

import train_pretrain
from bert import SIZES, BertPretrainModel
from train_pretrain import PretrainOptions, make_model, pretrain
from train_sst2 import SST2Options

ROOT = Path(__file__).parents[1]
SMALLEST = (1, 16)  # layers and width of the size "tiny" in the processes that are started here


def python(
    *arguments: str, cwd: Path = ROOT, env: dict[str, str] | None = None
) -> subprocess.CompletedProcess:
    """Runs Python with these arguments, and keeps what it prints."""
    line = [sys.executable, *arguments]
    return subprocess.run(line, cwd=cwd, env=env, capture_output=True, text=True, timeout=300)


# ---- Processes that need not import -------------------------------------------------------------

# A new Python process takes several seconds to import the libraries. So these processes are forked
# from one that has imported everything but computed nothing. A fork of this process would inherit
# the locks of its threads.
processes = multiprocessing.get_context("forkserver")
processes.set_forkserver_preload(["helpers", "strategies", "torch._dynamo", "matplotlib.figure"])


def start(
    function: Callable,
    *arguments,
    output: Path | str = os.devnull,
    **environment: str,
) -> multiprocessing.Process:
    """Starts a process that runs a function of a test file; its output is appended to a file.

    The function may start processes, such as data workers. The exit status is that of a script.
    """
    if "MUTANT_UNDER_TEST" in os.environ:
        pytest.skip("the process to fork from has no mutant")
    process = processes.Process(
        target=redirected, args=(function, arguments, os.path.abspath(output), environment)
    )
    with mock.patch.dict(os.environ, PYTHONPATH=os.pathsep.join(sys.path)):  # for the preloading
        forkserver.ensure_running()
    process.start()
    return process


def redirected(function: Callable, arguments: tuple, output: str, environment: dict) -> None:
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(file, stream)
    os.environ.update(environment)
    os.chdir(ROOT)
    torch.set_num_threads(1)
    multiprocessing.set_start_method("fork", force=True)  # of its data workers
    SIZES["tiny"] = SMALLEST
    function(*arguments)


def run_as_main(name: str, *arguments: str) -> None:
    """Runs a file as `python name` does, or a module as `python -m name`, in this process."""
    sys.argv = [name, *arguments]
    run = runpy.run_path if name.endswith(".py") else runpy.run_module
    run(name, run_name="__main__")


def start_ranks(count: int, function: Callable, *arguments, **how) -> list:
    """Starts so many ranks of a function, with the environment that torchrun gives to them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return [
        start(function, *arguments, **how, **shared, RANK=str(rank), LOCAL_RANK=str(rank))
        for rank in range(count)
    ]


def torchrun(ranks: int, *line: str) -> None:
    """Does as the command torchrun does, in a process that leads its group."""
    os.setpgrp()
    os.environ |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    run_as_main("torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}", *line)


def kill(*started: multiprocessing.Process) -> None:
    """Ends these processes at once, unless they have ended."""
    for process in started:
        process.kill()
    for process in started:
        process.join()


def wait(*started: multiprocessing.Process, seconds: float = 300) -> list[int]:
    """Waits until these processes have ended, and returns their exit statuses."""
    deadline = time.monotonic() + seconds
    for process in started:
        process.join(max(0.0, deadline - time.monotonic()))
    late = [process for process in started if process.exitcode is None]
    kill(*late)
    assert not late, f"{len(late)} processes have not ended within {seconds} s"
    return [process.exitcode for process in started]


def wait_until(
    happened: Callable[[], bool], *started: multiprocessing.Process, seconds: float = 300
) -> None:
    """Waits for something that these processes do. They are killed if it does not happen."""
    deadline = time.monotonic() + seconds
    while not happened():
        if time.monotonic() > deadline or not all(process.is_alive() for process in started):
            kill(*started)
            raise AssertionError("a process has ended too early, or takes too long")
        time.sleep(0.005)


def before_call(owner: object, name: str, number: int, event: Callable) -> Any:
    """Returns a patch: `event` runs just before call `number` (from 0) of a function, and gets the
    positional arguments of that call.
    """
    real, calls = getattr(owner, name), itertools.count()

    def noted(*arguments, **named):
        if next(calls) == number:
            event(*arguments)
        return real(*arguments, **named)

    return mock.patch.object(owner, name, noted)


def before_update(number: int, event: Callable) -> Any:
    return before_call(train_pretrain, "update", number, event)


class CrashError(Exception):
    """Ends a run as a bug would."""


def crash(*_) -> None:
    raise CrashError


def die(*_) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def die_soon(seconds: float) -> None:
    """Kills this process after so many seconds."""
    threading.Timer(seconds, die).start()


# ---- A small run, and what it leaves -----------------------------------------------------------


def make_options(corpus: Path, out: Path) -> PretrainOptions:
    """Returns the options of a run of 4 steps on what `write_corpus` has written."""
    return PretrainOptions(
        out=str(out), dataset=f"{corpus}/corpus.jsonl", tokenizer=str(corpus),
        max_seq_length=16, batch_size=2, steps=4, eval_every=4, log_every=1,
        save_every=2, workers=0, device="cpu", precision="float32",
    )  # fmt: skip


def model_of(options: PretrainOptions, tokenizer: Tokenizer) -> BertPretrainModel:
    """Returns the model that a run with these options starts from."""
    positions = options.positions or options.max_seq_length
    return make_model(BertPretrainModel, options, tokenizer, positions)


def run(options: PretrainOptions) -> None:
    """Pretrains in this process and prints nothing."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        pretrain(options)


def metrics_of(out: Path) -> list[dict]:
    """Returns the lines of metrics.jsonl without what a clock said."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "seconds"} for line in lines]


def read_lines(out: Path, split: str) -> dict[str, list]:
    """Returns the lines of a run that have this split, as columns."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    lines = [line for line in lines if line["split"] == split]
    return {name: [line[name] for line in lines] for name in lines[0]} if lines else {}


def contents(folder: Path) -> dict[str, bytes]:
    """Returns every file in a folder but its lock, which is empty."""
    files = (path for path in folder.glob("**/*") if path.is_file() and path.name != ".lock")
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def checkpoint_of(out: Path) -> dict:
    """Returns what checkpoint.pt holds, without what a clock said."""
    checkpoint = torch.load(out / "checkpoint.pt", weights_only=True)
    del checkpoint["progress"]["seconds"]
    del checkpoint["metrics_bytes"]  # how long the clock's digits are
    return checkpoint


def state(out: Path) -> tuple[dict, list[dict], dict[str, bytes]]:
    """Returns all that a finished run leaves, without what a clock said."""
    return checkpoint_of(out), metrics_of(out), contents(out / "model")


def assert_same(one, other, path: str = "") -> None:
    """Fails unless both are equal bit for bit, whatever is nested in what."""
    assert type(one) is type(other), path
    if isinstance(one, dict):
        assert one.keys() == other.keys(), path
        for key in one:
            assert_same(one[key], other[key], f"{path}.{key}")
    elif isinstance(one, list | tuple):
        for index, pair in enumerate(zip(one, other, strict=True)):
            assert_same(*pair, f"{path}.{index}")
    elif isinstance(one, torch.Tensor):
        assert torch.equal(one, other), path
    else:
        assert one == other, path


def make_review_options(folder: Path, **splits: int) -> SST2Options:
    """Returns the options of a fine-tuning run on splits of so many sentences."""
    small_tokenizer().save(str(folder / "tokenizer.json"))
    return SST2Options(
        out=str(folder / "run"), dataset=write_reviews(folder / "reviews", **splits),
        tokenizer=str(folder / "tokenizer.json"), max_seq_length=16, epochs=1, batch_size=8,
        learning_rate=(1e-3,), device="cpu",
    )  # fmt: skip


# ---- A run in a process of its own -------------------------------------------------------------

OPTIONS = PretrainOptions(
    vocab_size=60, max_seq_length=32, batch_size=2, accumulate=2, steps=30, save_every=1,
    eval_every=10, log_every=1, workers=0, device="cpu", precision="float32",
    optimizer="muon",  # it has AdamW for the other parameters
)  # fmt: skip


def run_with_event(options: PretrainOptions, number: int, event: Callable, *arguments) -> None:
    """Pretrains as the script does; before this update, counted from 0, something happens."""
    with (
        before_update(number, lambda *_: event(*arguments)),
        mock.patch("tyro.cli", return_value=options),
    ):
        train_pretrain.run_script(pretrain, PretrainOptions)


def in_process(options, number=-1, event=die, *arguments, output=os.devnull) -> int:
    """Pretrains in a process of its own; returns its exit status, which is -9 if it was killed."""
    (status,) = wait(start(run_with_event, options, number, event, *arguments, output=output))
    return status
