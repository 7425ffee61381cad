"""Calls of the generated C++ kernels: plans, inputs as models lay them out, and the comparison with the oracle."""

from __future__ import annotations

import math

import pytest
import torch

from fpscompile import cpp_build, reference
from fpscompile.lowerings import cpp
from fpscompile.masks import BlockMask
from fpscompile.plan import PhasePlan, Plan, ResolvedPlan, resolve
from fpscompile.render import CppConfig

TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 6e-3}
"""Norm of the difference over norm of the expected output. bfloat16 rounds P and the output to 8 bits each."""

QUANTIZED = {"fp8": 5e-3, "int8": 2e-2}
"""The same by quantization, when larger. fp8: P may round the other way at ties. int8: the oracle's P is exact."""

LSE_TOLERANCE = {"none": 1e-4, "fp8": 1e-4, "int8": 5e-3}
"""Largest difference: scores are accumulated in float32 for every dtype. int8: a value near a tie may round the other
way, which moves every score of its key."""

DTYPES = tuple(TOLERANCE)
GRID = (5, 6, 9)
TILE = (2, 4, 4)
WINDOW = (2, 1, 2)
FULL = (99, 99, 99)

needs_kernel = pytest.mark.skipif(
    cpp_build.unavailable() is not None, reason=f"the kernel cannot run here: {cpp_build.unavailable()}"
)


def need(compute: str) -> None:
    """Skip where the processor has no fast products of such operands."""
    reason = cpp_build.unavailable(compute)
    if reason is not None:
        pytest.skip(reason)


def make_resolved(
    *windows: tuple[int, int, int],
    grid: tuple[int, int, int] = GRID,
    tile: tuple[int, int, int] = TILE,
    q_others: tuple[int, int] = (0, 0),
    k_others: tuple[int, int] = (0, 0),
    **fields: object,
) -> ResolvedPlan:
    video = math.prod(grid)
    plan = Plan(tile, tuple(PhasePlan(window=window) for window in windows), lowering="cpp", **fields)
    return resolve(plan, grid, video + sum(q_others), video + sum(k_others), q_others[0], k_others[0])


def make_inputs(
    resolved: ResolvedPlan,
    *,
    batch: int = 2,
    heads: int = 2,
    key_heads: int | None = None,
    d: int = 64,
    d_v: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> list[torch.Tensor]:
    """q, k, v with the strides that models give them."""
    key_heads, d_v = key_heads or heads, d_v or d
    lq, lk = resolved.q_layout.length, resolved.k_layout.length
    sizes = [(lq, heads, d), (lk, key_heads, d), (lk, key_heads, d_v)]
    return [torch.randn(batch, *size).to(dtype).transpose(1, 2) for size in sizes]


def check(
    resolved: ResolvedPlan,
    tensors: list[torch.Tensor],
    *,
    phases: tuple[int, ...] | None = None,
    key_mask: torch.Tensor | None = None,
    scale: float = 0.2,
    block_mask: BlockMask | None = None,
    config: CppConfig | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Assert that output and log-sum-exp equal the oracle's; returns them."""
    q, k, v = tensors
    plan = resolved.plan
    compute = cpp.compute_of(str(q.dtype).removeprefix("torch."), plan) if config is None else config.compute
    need(compute)
    common = {"key_mask": key_mask, "resolved": resolved, "scale": scale, "block_mask": block_mask}
    phases = phases or (0,) * q.shape[0]
    out, lse = cpp.forward(q, k, v, phases=phases, config=config, **common)
    # 8-bit values follow from the inputs' own dtype; the arithmetic on them is float64's all the same.
    wide = tensors
    if plan.quant == "none":
        # Operands that are narrower than the inputs are rounded once, when they are packed: of float32 tokens, bfloat16
        # moves a score by up to 1e-2. From there on, scores are as exact as any.
        wide = [(x.bfloat16() if compute == "bfloat16" else x).double() for x in tensors]
    expected, expected_lse = reference.attention(*wide, phase=phases, compute_dtype=torch.float64, **common)
    expected = expected.double()
    assert out.shape == expected.shape
    assert out.dtype == q.dtype
    assert out.transpose(1, 2).is_contiguous()
    assert lse.is_contiguous()
    assert lse.dtype == torch.float32
    difference = (out.double() - expected).norm() / expected.norm().clamp(min=1e-3)
    tolerance = max(
        TOLERANCE[q.dtype], QUANTIZED.get(plan.quant, 0), TOLERANCE.get(getattr(torch, plan.compute, None), 0)
    )
    assert float(difference) <= tolerance
    assert torch.equal(lse.isinf(), expected_lse.isinf())
    finite = ~lse.isinf()
    torch.testing.assert_close(
        lse[finite].double(), expected_lse[finite].double(), atol=LSE_TOLERANCE[plan.quant], rtol=1e-5
    )
    return out, lse


def make_mask(kind: str, batch: int, heads: int, keys: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    keep = torch.rand(batch, heads, 1, keys) < 0.6
    return keep if kind == "bool" else torch.randn(batch, heads, 1, keys).masked_fill(~keep, -torch.inf).to(dtype)
