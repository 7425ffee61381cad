"""What the kernel table is made of, and that a captured graph finds its operands where they were."""

from __future__ import annotations

import contextlib
import gc
import importlib.util
import sys
import weakref
from pathlib import Path
from types import ModuleType

import pytest
import torch

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks" / "gpu"


@pytest.fixture(scope="module")
def table() -> ModuleType:
    spec = importlib.util.spec_from_file_location("attention_gpu", FOLDER / "attention_gpu.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_more_is_what_the_table_leaves_out(table: ModuleType) -> None:
    for name, case in table.CASES.items():
        usual, more = (table.wanted(name, case, table.DENSITIES, which) for which in (False, True))
        pairs = [(tile, density) for tile in case.tiles for density in table.DENSITIES]
        assert sorted(usual + more) == sorted(pairs)
    detailed = table.CASES[table.DETAILED]
    assert table.wanted(table.DETAILED, detailed, table.DENSITIES, True) == []


def test_a_graph_keeps_the_operands_of_its_call(table: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """It reads addresses: memory that was handed out again would be taken for lists of keys."""

    class Graph:
        def replay(self) -> None:
            pass

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", lambda graph, pool: contextlib.nullcontext())

    def made() -> tuple[object, weakref.ref[torch.Tensor]]:
        operand = torch.zeros(3)
        return table.graphed(lambda: operand, None), weakref.ref(operand)

    replay, operand = made()
    gc.collect()
    assert operand() is not None
    del replay
    gc.collect()
    assert operand() is None
