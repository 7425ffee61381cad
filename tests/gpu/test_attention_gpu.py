"""What the kernel table is made of, and that a captured graph finds its operands where they were."""

from __future__ import annotations

import contextlib
import gc
import weakref
from types import ModuleType

import pytest
import scripts
import torch

from fpscompile.plan import PhasePlan, Plan, resolve

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = 1e-5 if DEVICE == "cpu" else 5e-3
"""A GPU multiplies float32 in TF32."""


@pytest.fixture(scope="module")
def table() -> ModuleType:
    return scripts.load("benchmarks/gpu/attention_gpu.py")


def test_more_is_what_the_table_leaves_out(table: ModuleType) -> None:
    for name, case in table.CASES.items():
        usual, more, whole = (table.wanted(name, case, table.DENSITIES, w) for w in ("usual", "more", "whole"))
        assert sorted(usual + more) == sorted(whole)
        assert whole == [(tile, density) for tile in case.tiles for density in table.DENSITIES]
    detailed = table.CASES[table.DETAILED]
    assert table.wanted(table.DETAILED, detailed, table.DENSITIES, "more") == []


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


@pytest.mark.parametrize("tile", [(4, 8, 8), (4, 4, 4), (3, 5, 16)], ids=str)
def test_flex_attention_has_the_same_mask(table: ModuleType, tile: tuple[int, int, int]) -> None:
    """A peer that attends to less, or to padding, would be no peer. Tiles of 64 tokens take blocks of 64."""
    case = table.Case((6, 10, 9), 37, 2, 64, (tile,))
    q, k, v = (torch.randn(1, case.length, case.heads, case.dim, device=DEVICE).transpose(1, 2) for _ in range(3))
    sparse, dense = (
        resolve(
            Plan(tile=tile, phases=(PhasePlan(density=density),), clamp=True, quant="fp8", lowering="triton"),
            case.grid, case.length, case.length,
        )
        for density in (0.4, 1.0)
    )  # fmt: skip
    _, found = table.flex(q, k, v, sparse)
    assert table.error_against_float32(found, q, k, v, sparse) < TOLERANCE
    assert table.error_against_float32(found, q, k, v, dense) > 0.1
