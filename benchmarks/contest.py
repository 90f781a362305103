"""Contestants that take turns, each in a process of its own, so that no cache and no setting of an
allocator helps another; only one of them computes at a time."""

import multiprocessing
import resource
import statistics
import time
from collections.abc import Callable
from typing import Any

spawn = multiprocessing.get_context("spawn")


def serve(pipe: Any, prepare: Callable[..., Callable[[], None]], arguments: tuple) -> None:
    """What a contestant's process does: it prepares, then runs once for each message."""
    call = prepare(*arguments)
    pipe.send("ready")
    while pipe.recv() != "end":
        started = time.perf_counter()
        call()
        pipe.send(time.perf_counter() - started)
    pipe.send(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)


def contest(
    contestants: dict[str, tuple], rounds: int, warm_up: int = 2
) -> dict[str, dict[str, float]]:
    """`{name: (prepare, *arguments)}`, where `prepare(*arguments)` returns what is to be timed.

    For each: the median `seconds`; `faster`, the median over all rounds of the first contestant's
    advantage, which is its own seconds divided into theirs; `MiB`, the process's peak."""
    pipes, processes = {}, []
    for name, (prepare, *arguments) in contestants.items():
        pipes[name], end = spawn.Pipe()
        processes.append(spawn.Process(target=serve, args=(end, prepare, tuple(arguments))))
        processes[-1].start()
        if pipes[name].recv() != "ready":  # before the next begins, or they would share the cores
            raise RuntimeError(f"{name} did not start")
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for turn in range(warm_up + rounds):
        for name, pipe in pipes.items():
            time.sleep(0.05)  # for threads that still spin
            pipe.send("go")
            taken = pipe.recv()
            if turn >= warm_up:
                times[name].append(taken)
    peaks = {}
    for name, pipe in pipes.items():
        pipe.send("end")
        peaks[name] = pipe.recv()
    for process in processes:
        process.join()
    first = times[next(iter(contestants))]
    return {
        name: {
            "seconds": statistics.median(values),
            "faster": statistics.median(b / a for a, b in zip(first, values, strict=True)),
            "MiB": peaks[name],
        }
        for name, values in times.items()
    }
