"""The probe of the Hopper kernel, which runs on a GPU alone, still gives the kernel what its launch asks for."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

PROBE = Path(__file__).resolve().parents[2] / "benchmarks" / "gpu" / "hopper_probe.py"


@pytest.fixture(scope="module")
def probe() -> ModuleType:
    """The script as a module, with its tensors on the CPU."""
    spec = importlib.util.spec_from_file_location("hopper_probe", PROBE)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    module.DEVICE = "cpu"
    return module


@pytest.mark.parametrize("name", ["base", "bias of heads", "D=80, DV=36", "tiles of 64, subtile"])
def test_small_cases_can_be_launched(probe: ModuleType, name: str) -> None:
    kernel, launched = probe.load_kernel(), []

    class Recorder:
        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            return lambda *args, **options: launched.append((grid, args, options))

    launch = FunctionType(kernel.launch.__code__, {**vars(kernel), "attention_forward": Recorder()})
    launch.__kwdefaults__ = kernel.launch.__kwdefaults__
    case = probe.small_case(**probe.SMALL[name])
    out, lse = case.outputs()
    case.launch(type("Kernel", (), {"launch": staticmethod(launch)}), out, lse, {})
    [(grid, args, options)] = launched
    positional = [p for p in kernel.attention_forward.arg_names if p not in options]
    assert len(args) == len(positional)
    assert grid[0] >= len(case.q_blocks)
    assert torch.isnan(out).all()  # poisoned: what no program writes is seen


def test_tiles_that_are_no_multiple_of_a_block_are_padded(probe: ModuleType) -> None:
    case = probe.video_case((7, 9, 8), (1, 1, 2), heads=1, tile=(7, 9, 4))
    assert case.tables.slots == 256
    assert case.sizes.tolist() == [252, 252]
    assert sorted(case.tables.keys.valid.tolist()) == [124, 124, 128, 128]
