"""The ranks of a distributed run, its data workers, and the signals that stop it."""

import contextlib
import os
import signal
from collections.abc import Iterator
from datetime import timedelta

import torch
import torch.distributed as dist


def process_group_backend(device: str | None, has_cuda: bool) -> str:
    """Returns the backends of the process group: gloo for tensors on the CPU, nccl for GPUs.

    Both have to be named. Otherwise torch registers only the accelerator's backend, and every sum
    of numbers on the CPU fails.
    """
    if has_cuda and device != "cpu":
        return "cpu:gloo,cuda:nccl"
    return "gloo"


def join_processes(device: str | None = None, micro_batches: int = 0) -> tuple[int, int]:
    """Joins the process group of torchrun. Returns this process's rank and the number of ranks.

    Raises ValueError if the environment or --device does not fit, and if the ranks cannot share the
    micro-batches of a step: before any has joined, because one that joins while the others leave
    would fail with another error.

    Without torchrun, returns 0 and 1. A single rank under torchrun forms a group, too, so that nccl
    can be tested with one GPU.
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
    if not 0 <= rank < world_size:
        raise ValueError(f"RANK {rank} of WORLD_SIZE {world_size} in the environment: unset both")
    if world_size > 1 and device not in (None, "cpu", "cuda"):
        raise ValueError(
            f"--device {device} would put all {world_size} ranks on one GPU; with --device cuda"
            " each takes its own"
        )

    if micro_batches % world_size:
        raise ValueError(f"--accumulate {micro_batches} is no multiple of {world_size} ranks")

    # It takes the group of the moment as a default argument. Imported after the group has been
    # made, it would keep that group alive.
    import torch.distributed.nn

    if torch.cuda.is_available() and device != "cpu":
        local_rank, gpus = int(os.environ.get("LOCAL_RANK", rank)), torch.cuda.device_count()
        if local_rank >= gpus:
            raise ValueError(f"--nproc_per_node: {gpus} GPUs for {local_rank + 1} ranks or more")
        torch.cuda.set_device(local_rank)
    backend = process_group_backend(device, torch.cuda.is_available())
    dist.init_process_group(backend, timeout=timedelta(days=1))  # rank 0 may tokenize for hours
    return rank, world_size


def need_one_process() -> None:
    """Raises ValueError under torchrun with several ranks: all would compute and write the same."""
    world_size = os.environ.get("WORLD_SIZE", "1")
    if world_size != "1":
        raise ValueError(
            f"fine-tuning runs in one process, not in {world_size}: start it with python"
        )


@contextlib.contextmanager
def first_process_first(rank: int) -> Iterator[None]:
    """Lets rank 0 run the body of a `with` statement before the other ranks run it."""
    if dist.is_initialized() and rank > 0:
        dist.barrier()
    yield
    if dist.is_initialized() and rank == 0:
        dist.barrier()


def total(*numbers: int) -> list[int]:
    """Returns each number's sum over all ranks. Sums on the CPU wait for no GPU."""
    if not dist.is_initialized():
        return list(numbers)
    sums = torch.tensor(numbers)
    dist.all_reduce(sums)
    return sums.tolist()


def signals_to_handle() -> list[int]:
    """Returns the signals that ask a run to stop: Ctrl-C, SIGTERM, and SIGHUP from a terminal that
    is closed; without those that the caller has made the process ignore, as nohup does.
    """
    asking = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    return [number for number in asking if signal.getsignal(number) != signal.SIG_IGN]


def note_signals() -> list[int]:
    """Returns a list to which `signals_to_handle` are appended from now on, instead of ending the
    process: the loop can stop between two steps. A signal may arrive several times, because
    torchrun forwards what its ranks have received themselves.
    """
    noted: list[int] = []
    for number in signals_to_handle():
        signal.signal(number, lambda number, frame: noted.append(number))
    return noted


def leave_group(worker: int) -> None:
    """Moves a data worker to a process group (of the system) of its own. Ctrl-C reaches a whole
    group, and workers have to make batches until the loop ends. worker: its index, from DataLoader.

    (A SIGTERM that is sent to every process, not to the main one alone, still ends the workers, and
    so the run. They cannot ignore it, because Python ends them by the same signal when it exits.)
    """
    os.setpgrp()
