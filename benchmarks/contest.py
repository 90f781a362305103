"""Contestants that take turns, each in a process of its own, so that no cache and no setting of an
allocator helps another; only one of them computes at a time."""

import multiprocessing
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

spawn = multiprocessing.get_context("spawn")


def peak_memory() -> float:
    """Of this process, MiB. (getrusage's begins with that of the process that started it.)"""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


def serve(pipe: Any, prepare: Callable[..., Callable[[], None]], arguments: tuple) -> None:
    """What a contestant's process does: it prepares, then runs once for each message."""
    call = prepare(*arguments)
    pipe.send("ready")
    while pipe.recv() != "end":
        started = time.perf_counter()
        call()
        pipe.send(time.perf_counter() - started)
    pipe.send(peak_memory())


def contest(
    contestants: dict[str, tuple], rounds: int, warm_up: int = 2
) -> dict[str, dict[str, float]]:
    """`{name: (prepare, *arguments)}`, where `prepare(*arguments)` returns what is to be timed.

    For each: the median `seconds`; `faster`, the median over all rounds of the first contestant's
    advantage, which is its own seconds divided into theirs; `MiB`, the process's peak, its
    libraries included."""
    pipes, processes = {}, []
    for name, (prepare, *arguments) in contestants.items():
        pipes[name], end = spawn.Pipe()
        about = (end, prepare, tuple(arguments))
        processes.append(spawn.Process(target=serve, args=about, daemon=True))
        processes[-1].start()
        end.close()  # so that its death is the end of the pipe, an EOFError here
        pipes[name].recv()  # "ready", before the next begins: they would share the cores
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
