"""What the kernel table is made of, and that a captured graph finds its operands where they were."""

from __future__ import annotations

import contextlib
import gc
import json
import weakref
from pathlib import Path
from types import ModuleType
from typing import Any

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


def test_rows_of_other_cases_are_kept(table: ModuleType, tmp_path: Path) -> None:
    def report(rounds: int, *cases: str) -> dict[str, Any]:
        rows = [{"case": case, "rounds": rounds} for case in cases]
        run = {"cases": list(cases), "ceilings": {"bf16_tflops": rounds}, "rounds": rounds}
        return {"machine": {"gpu": "one"}, "ceilings": run["ceilings"], "rounds": rounds, "rows": rows, "runs": [run]}

    path = tmp_path / "report.json"
    before = report(1, "Wan 14B 480p", "CogVideoX")
    del before["runs"]  # as files were before they were added to
    path.write_text(json.dumps(before))
    there = table.earlier(path, {"gpu": "one"})
    found = table.added(there, report(2, "CogVideoX", "Wan 14B 720p"))
    assert [(row["case"], row["rounds"]) for row in found["rows"]] == [
        ("Wan 14B 720p", 2), ("Wan 14B 480p", 1), ("CogVideoX", 2)
    ]  # fmt: skip
    assert [(run["cases"], run["rounds"]) for run in found["runs"]] == [
        (["Wan 14B 480p"], 1), (["CogVideoX", "Wan 14B 720p"], 2)
    ]  # fmt: skip
    with pytest.raises(ValueError, match=r"report\.json is of .*one.*this run of .*other.*--json"):
        table.earlier(path, {"gpu": "other"})


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
    """A peer that attends to less, or to padding, would be no peer. Tiles of 64 tokens take blocks of 64, which
    FlexAttention's default config on a GPU refuses."""
    case = table.Case((6, 10, 9), 37, 2, 64, (tile,))
    q, k, v = (torch.randn(1, case.length, case.heads, case.dim, device=DEVICE).transpose(1, 2) for _ in range(3))
    sparse, dense = (
        resolve(
            Plan(tile=tile, phases=(PhasePlan(density=density),), clamp=True, quant="fp8", lowering="triton"),
            case.grid, case.length, case.length,
        )
        for density in (0.4, 1.0)
    )  # fmt: skip
    how = "given" if DEVICE == "cuda" and tile == (4, 4, 4) else "default"
    _, found = table.flex(*table.in_tile_order(sparse, q, k, v), sparse, **table.FLEX[how])
    assert table.error_against_float32(found, q, k, v, sparse) < TOLERANCE
    assert table.error_against_float32(found, q, k, v, dense) > 0.1
