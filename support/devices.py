"""The device of a run, its numerical precision, and how its memory is allocated."""

import contextlib
import ctypes
import re
from collections.abc import Mapping
from typing import Any, Literal

import torch

Precision = Literal["auto", "float32", "medium", "bfloat16"]


def choose_device(name: str | None) -> torch.device:
    """Returns the device of --device; without a name, the GPU if there is one."""
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if not re.fullmatch(r"cpu|cuda(:(0|[1-9]\d?))?", name):  # torch takes cuda:256 for cuda:0
        raise ValueError(f"--device {name} is not cpu, cuda or cuda:0")
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"--device {name}, but torch sees no GPU here")
    device = torch.device(name)
    if device.index is not None and device.index >= torch.cuda.device_count():
        raise ValueError(f"--device {name}, but torch sees {torch.cuda.device_count()} GPUs here")
    return device


def cpu_capabilities() -> Mapping[str, Any]:
    """Returns which instruction sets this CPU has, by name; nothing where torch cannot tell."""
    get_capabilities = getattr(torch.cpu, "get_capabilities", dict)
    return get_capabilities()


def choose_precision(name: Precision, device: torch.device) -> Precision:
    """Returns a run's precision, which is not "auto", and sets torch up for it.

    - float32: all matrix products in float32.
    - medium: float32 in memory, but matrix products may round their factors to bfloat16.
    - bfloat16: autocast, see `autocast`.
    - auto: the fastest of them. Other CPUs than the two here emulate bfloat16: a step of mini
      is forty times slower.

    How many times as fast as in float32 a training step is:

        CPU with            medium: mini, base    bfloat16: mini, base
        AMX                         1.64, 1.72              1.28, 1.45
        AVX512-BF16 alone           1.0,  1.0               1.34, 1.43
    """
    if name == "auto":
        capabilities = cpu_capabilities() if device.type == "cpu" else {}
        if device.type == "cuda":
            name = "bfloat16"
        elif capabilities.get("amx_bf16"):
            name = "medium"
        elif capabilities.get("avx512_bf16"):
            name = "bfloat16"
        else:
            name = "float32"
    torch.set_float32_matmul_precision("medium" if name == "medium" else "highest")
    return name


def autocast(precision: str, device_type: str) -> contextlib.AbstractContextManager:
    """Returns the context of a forward pass. With bfloat16, it computes matrix products in
    bfloat16; weights, gradients and the optimizer's state stay float32.
    """
    if precision == "bfloat16":
        return torch.autocast(device_type, torch.bfloat16)
    return contextlib.nullcontext()


def keep_freed_memory() -> None:
    """Makes the process keep the memory that it frees, on Linux with glibc.

    Large tensors are otherwise returned to the system and allocated anew in every step. Each 4 KiB
    then costs a page fault, which takes a tenth to a quarter of a step's time.
    """
    with contextlib.suppress(AttributeError, OSError, TypeError):  # another C library
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-4, 0)  # M_MMAP_MAX: no block has a mapping of its own
        mallopt(-1, -1)  # M_TRIM_THRESHOLD: the heap never shrinks
