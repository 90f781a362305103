"""The ranks of a distributed run, its data workers, and the signals that stop it."""

import contextlib
import os
import signal
from collections.abc import Iterator
from datetime import timedelta

import torch
import torch.distributed as dist


def process_group_backend(device: str | None, has_cuda: bool) -> str:
    """Returns the backends of the group of ranks: gloo for tensors on the CPU, nccl for GPUs.

    Both are named. Without a name, torch would register the accelerator's alone, and every sum of
    numbers on the CPU would fail.
    """
    if has_cuda and device != "cpu":
        return "cpu:gloo,cuda:nccl"
    return "gloo"


def join_processes(device: str | None = None) -> tuple[int, int]:
    """Returns this process's rank and the number of ranks, as torchrun set them, and forms their
    group; without torchrun, 0 and 1. A single rank forms a group, too, so that one GPU tests nccl.
    """
    variables = [name for name in ("RANK", "WORLD_SIZE") if name in os.environ]
    if not variables:
        return 0, 1
    if len(variables) == 1:
        raise ValueError(
            f"{variables[0]} is set in the environment, but RANK and WORLD_SIZE belong together:"
            " use torchrun, or unset it"
        )
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if world_size > 1 and device not in (None, "cpu", "cuda"):
        raise ValueError(
            f"--device {device} would put all {world_size} ranks on one GPU; with --device cuda"
            " each takes its own"
        )

    import torch.distributed.nn  # later, its default arguments would keep the group for ever

    if torch.cuda.is_available() and device != "cpu":
        local_rank, gpus = int(os.environ.get("LOCAL_RANK", rank)), torch.cuda.device_count()
        if local_rank >= gpus:
            raise ValueError(f"--nproc_per_node: {gpus} GPUs for {local_rank + 1} ranks or more")
        torch.cuda.set_device(local_rank)
    backend = process_group_backend(device, torch.cuda.is_available())
    dist.init_process_group(backend, timeout=timedelta(days=1))  # the others wait for a tokenizer
    return rank, world_size


def need_one_process() -> None:
    """Raises ValueError under torchrun with several ranks: all would do and write the same."""
    world_size = os.environ.get("WORLD_SIZE", "1")
    if world_size != "1":
        raise ValueError(
            f"fine-tuning runs in one process, not in {world_size}: start it with python"
        )


@contextlib.contextmanager
def first_process_first(rank: int) -> Iterator[None]:
    """The others wait until the first one is done with the same."""
    if dist.is_initialized() and rank > 0:
        dist.barrier()
    yield
    if dist.is_initialized() and rank == 0:
        dist.barrier()


def total(*numbers: int) -> list[int]:
    """Returns each number's sum over all ranks; on the CPU, so that no GPU is waited for."""
    if not dist.is_initialized():
        return list(numbers)
    sums = torch.tensor(numbers)
    dist.all_reduce(sums)
    return sums.tolist()


def note_signals() -> list[int]:
    """Where Ctrl-C and SIGTERM are noted, for the loop to end between two steps. Of each several
    may come: torchrun passes on what its processes have got themselves."""
    noted: list[int] = []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, frame: noted.append(number))
    return noted


def leave_group(worker: int) -> None:
    """For a data worker: Ctrl-C goes to a whole group of processes, and the worker has to go on
    until the loop ends."""
    os.setpgrp()
