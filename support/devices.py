"""Where and how precisely a run computes: device, precision, memory that is used again."""

import contextlib
import ctypes
import re
from collections.abc import Mapping
from typing import Any

import torch

PRECISIONS = ["auto", "float32", "medium", "bfloat16"]


def choose_device(name: str | None) -> torch.device:
    """Returns the device of --device; without a name, the GPU if there is one."""
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if not re.fullmatch(r"cpu|cuda(:\d+)?", name):
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


def choose_precision(name: str, device: torch.device) -> str:
    """Returns a run's precision, "float32", "medium" or "bfloat16", and sets torch up for it.

    - float32: all products of matrices in float32.
    - medium: float32 in memory, but products of matrices may round their factors to bfloat16.
    - bfloat16: autocast, see `autocast`.
    - auto: what is fastest. A training step of mini and of base is so many times as fast as in
      float32: on a CPU with AMX 1.64 and 1.72 with medium, 1.28 and 1.45 with bfloat16; on one with
      AVX512-BF16 alone 1.0 and 1.0, 1.34 and 1.43. Other CPUs emulate bfloat16, forty times slower.
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
    """Returns the context of a forward pass. With bfloat16, products of matrices are computed in
    it; weights, gradients and the optimizer's state stay float32."""
    if precision == "bfloat16":
        return torch.autocast(device_type, torch.bfloat16)
    return contextlib.nullcontext()


def keep_freed_memory() -> None:
    """Linux with glibc: freed memory stays with the process. Else large tensors are given back and
    taken anew in every step, a page fault for each 4 KiB: a tenth to a quarter of a step's time."""
    with contextlib.suppress(AttributeError, OSError, TypeError):  # another C library
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-4, 0)  # M_MMAP_MAX: no block has a mapping of its own
        mallopt(-1, -1)  # M_TRIM_THRESHOLD: the heap never shrinks
