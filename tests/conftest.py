"""What every test gets: few threads, a seed of its own, a clean Dynamo, and cold caches where it asks for them."""

from __future__ import annotations

import os
import random
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import numpy as np
import pytest
import torch

# One thread per xdist worker, all cores otherwise; Inductor compiles in this process instead of starting a pool.
if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")

# Triton's kernels run in its interpreter where there is no GPU. Read when triton is imported, so it is set before.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# The same examples in every run, and no wall-clock limit per example: CI machines stall.
hypothesis.settings.register_profile("fps", deadline=None, derandomize=True, database=None)
hypothesis.settings.load_profile("fps")


@pytest.fixture(autouse=True)
def _seed(request: pytest.FixtureRequest) -> None:
    """Random inputs differ from test to test and repeat from run to run, in any order and on any worker."""
    seed = zlib.crc32(request.node.nodeid.encode())
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002 - third-party code draws from the global generator
    torch.manual_seed(seed)


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> Iterator[None]:
    """No compiled code, guard or recompile count survives a test."""
    yield
    dynamo = sys.modules.get("torch._dynamo")
    if dynamo is not None:
        dynamo.reset()


@pytest.fixture
def cold_caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Empty cache folders, Inductor's and ours, for this test and for the processes that it starts."""
    monkeypatch.setenv("FPS_CACHE_DIR", str(tmp_path / "fps"))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))
    return tmp_path
