"""What the kernel table is made of, and that a captured graph finds its operands where they were."""

from __future__ import annotations

import contextlib
import gc
import weakref
from types import ModuleType

import pytest
import scripts
import torch


@pytest.fixture(scope="module")
def table() -> ModuleType:
    return scripts.load("benchmarks/gpu/attention_gpu.py")


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
