"""Profiles of hypothesis, the devices that tests run on, and a small run that several files use."""

import os
import signal
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

# No test needs the hub. Libraries read this variable on import, so they are imported only later.
# (So is torch: with -n 2, the process that distributes tests to the others does not need it.)
os.environ.setdefault("HF_HUB_OFFLINE", "1")

# Handle signals as if started from a terminal: nohup and `&` make child processes ignore some.
signal.signal(signal.SIGINT, signal.default_int_handler)
for number in (signal.SIGTERM, signal.SIGHUP):
    signal.signal(number, signal.SIG_DFL)

shared = {"deadline": None, "print_blob": True, "suppress_health_check": [HealthCheck.too_slow]}
settings.register_profile("random", max_examples=30, derandomize=False, **shared)
settings.register_profile("same", max_examples=30, derandomize=True, **shared)
settings.register_profile("thorough", max_examples=200, derandomize=False, **shared)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "random"))


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    import torch

    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no GPU")
    return torch.device(request.param)


@pytest.fixture(autouse=True)
def _same_start() -> None:
    """Every test starts with the same seed and matmul precision, whatever earlier runs have set."""
    import torch

    torch.manual_seed(0)
    torch.set_float32_matmul_precision("highest")


@pytest.fixture(autouse=True)
def _no_pictures(monkeypatch) -> None:
    """The scripts draw no curves here, which took half the time of a short run."""
    for script in ("train_pretrain", "train_sst2"):
        if script in sys.modules:
            monkeypatch.setattr(
                sys.modules[script], "draw_curves", lambda out: (out / "curves.png").touch()
            )


@pytest.fixture
def _smallest(monkeypatch) -> None:
    """The size "tiny" is as small here as in the processes that helpers.py starts."""
    from helpers import SIZES, SMALLEST

    monkeypatch.setitem(SIZES, "tiny", SMALLEST)


@pytest.fixture(scope="session")
def small_corpus(tmp_path_factory) -> Path:
    from strategies import write_corpus

    return write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture
def options(small_corpus, tmp_path, _smallest):
    """The PretrainOptions of a run that takes a fraction of a second."""
    from helpers import make_options

    return make_options(small_corpus, tmp_path / "run")
