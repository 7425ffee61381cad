"""Scores that grow, or fall, from one tile of keys to the next, in a few steps or beyond what float32 can hold.

Kernels may subtract less than the running maximum (see :mod:`fpscompile.kernel_spec`): these rows say whether they
notice when it no longer serves.
"""

from __future__ import annotations

import math

import pytest
import torch

from fpscompile.gpu.config import KernelConfig
from fpscompile.lowerings import gather, triton
from fpscompile.plan import PhasePlan, Plan, ResolvedPlan, resolve

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CONFIG = None if DEVICE == "cuda" else KernelConfig(256, 8, 3)
TOLERANCE = 2e-2
"""FP8 products of a GPU are summed in some 14 bits: of a score of 120, that leaves 1e-2."""


def resolved_plan(tile: tuple[int, int, int], tiles: int, block: str) -> ResolvedPlan:
    grid = (tile[0], tile[1], tiles * tile[2] - (2 if block == "ragged" else 0))
    plan = Plan(tile=tile, phases=(PhasePlan(density=1.0),), lowering="triton", quant="fp8", smooth_k=False)
    length = math.prod(grid)
    return resolve(plan, grid, length, length, 0, 0)


def inputs(resolved: ResolvedPlan, growth: float, dim: int, order: list[int]) -> tuple[torch.Tensor, ...]:
    """q, k, v whose scores go up by ``growth`` (natural units) per tile of keys, in that order, for one half of the
    queries, and down for the other; other features add a little."""
    length = resolved.k_layout.length
    q, k = 0.3 * torch.randn(2, 2, 1, length, dim).to(DEVICE)
    q[..., 4:] = 0.0
    sign = 1.0 - 2.0 * torch.randint(0, 2, (length,), device=DEVICE)
    q[..., 0] = sign
    tiles = resolved.k_layout.order().split(resolved.k_layout.sizes().tolist())
    middle = (len(tiles) - 1) / 2
    for tokens, place in zip(tiles, order, strict=True):
        k[..., tokens.to(DEVICE), 0] = growth * (place - middle)
    v = torch.randn(2, 1, length, dim, device=DEVICE) + 0.5
    return q.bfloat16(), k.bfloat16(), v.bfloat16()


@pytest.mark.parametrize("growth", [0.7, 2.0, 5.0, 40.0, 80.0, 120.0])
@pytest.mark.parametrize(
    ("tile", "dim", "block", "order"),
    [
        ((4, 8, 8), 64, "whole", [0, 1, 2]),
        ((4, 8, 8), 128, "ragged", [2, 0, 1]),
        ((4, 4, 4), 64, "ragged", [0, 1, 2]),
        ((4, 8, 4), 128, "whole", [1, 0, 2]),
    ],
    ids=str,
)
def test_scores_that_grow(growth: float, tile, dim: int, block: str, order: list[int]) -> None:
    resolved = resolved_plan(tile, len(order), block)
    q, k, v = inputs(resolved, growth, dim, order)
    common = {"resolved": resolved, "scale": 1.0, "key_mask": None}
    expected, expected_lse = gather.forward(q.float(), k.float(), v.float(), phases=(0, 0), **common)
    phase = torch.zeros(2, dtype=torch.int32, device=DEVICE)
    out, lse = triton.forward(q, k, v, phases=phase, config=CONFIG, **common)
    assert out.isfinite().all()
    worst = ((out.float() - expected).norm(dim=-1) / expected.norm(dim=-1)).max()
    assert worst < 5 * TOLERANCE, worst
    assert (out.float() - expected).norm() / expected.norm() < TOLERANCE
    torch.testing.assert_close(lse, expected_lse, rtol=1e-3, atol=5e-2)


@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_what_is_not_a_number_stays_in_its_rows(value: float) -> None:
    """A row whose scores are not finite is done again in vain, and its neighbours are not hurt."""
    resolved = resolved_plan((4, 8, 8), 2, "whole")
    q, k, v = inputs(resolved, 3.0, 64, [0, 1])
    phase = torch.zeros(2, dtype=torch.int32, device=DEVICE)
    tokens = resolved.q_layout.order().split(resolved.q_layout.sizes().tolist())
    q[0, 0, tokens[0][3], 1] = value
    out, lse = triton.forward(q, k, v, resolved=resolved, scale=1.0, key_mask=None, phases=phase, config=CONFIG)
    others = tokens[1].to(DEVICE)  # a scale serves one tile
    assert out[0, 0, others].isfinite().all()
    assert lse[0, 0, others].isfinite().all()
    assert out[1].isfinite().all()
