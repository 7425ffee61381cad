"""FP8 kernels against the oracle itself, forward and backward, in a covering array of all that a call may have.

Tile, head dim, text, key mask and operand options have four values each. The sixteen cases are an orthogonal array of
strength two: every pair of values of any two factors occurs in exactly one of them. Every case has a batch element in
each phase, so all granularities and four windows, on a grid that no tile divides. In Triton's interpreter, or on a GPU.
"""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from fpscompile import reference
from fpscompile.gpu import gradients
from fpscompile.gpu.config import KernelConfig
from fpscompile.gpu.gradients import GradientConfig
from fpscompile.lowerings import triton
from fpscompile.plan import PhasePlan, Plan, resolve

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = 5e-3
"""Relative, in norm. The backward's products take bfloat16: 2.6e-3 of it."""

PHASES = (
    PhasePlan(window=(1, 2, 2), granularity="subtile"),
    PhasePlan(window=(2, 1, 2), granularity="head"),
    PhasePlan(window=(2, 2, 1)),
    PhasePlan(density=1.0, granularity="tensor"),
)
GRIDS = {(4, 4, 4): (5, 5, 6), (2, 8, 8): (3, 9, 7), (4, 8, 8): (5, 9, 7), (6, 8, 8): (7, 9, 5)}
DIMS = (64, 96, 128, 72)
TEXT = ((0, 0), (7, 0), (0, 70), (3, 130))
"""Tokens before and after the video."""
MASKS = ("none", "bool", "float", "hidden")
OPTIONS = (
    {},
    {"smooth_v": True},
    {"hadamard": True},
    {"smooth_k": False, "smooth_v": True, "hadamard": True},
)

_TIMES = ((0, 0, 0, 0), (0, 1, 2, 3), (0, 2, 3, 1), (0, 3, 1, 2))
"""Products in the field of four elements, whose sums are those of bits: what makes the array orthogonal."""


def cases() -> list[tuple[int, ...]]:
    """One index into each of the five factors."""
    return [(a, b, a ^ b, a ^ _TIMES[2][b], a ^ _TIMES[3][b]) for a, b in itertools.product(range(4), repeat=2)]


def test_the_cases_cover_all_pairs() -> None:
    for one, other in itertools.combinations(range(5), 2):
        assert {(case[one], case[other]) for case in cases()} == set(itertools.product(range(4), repeat=2))


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a.double() - b.double()).norm() / b.double().norm().clamp(min=1e-30)).item()


def key_mask(kind: str, length: int) -> torch.Tensor | None:
    """Of a batch of four with one query head, or two where heads differ."""
    if kind == "none":
        return None
    keep = torch.rand(4, 2 if kind == "float" else 1, 1, length) < 0.7
    if kind == "hidden":
        keep[2] = False
    return keep if kind != "float" else torch.randn(keep.shape).masked_fill(~keep, -math.inf)


def name(case: tuple[int, ...]) -> str:
    tile, dim, text, mask, option = case
    on = "+".join(key if value else f"no_{key}" for key, value in OPTIONS[option].items())
    return f"{'x'.join(map(str, list(GRIDS)[tile]))}-{DIMS[dim]}-text{TEXT[text]}-{MASKS[mask]}-{on or 'plain'}"


FAST = ((0, 0), (1, 0), (2, 2), (3, 1))
"""Tile and head dim of the cases that every run takes: 7 to 17 seconds each in the interpreter."""


@pytest.mark.parametrize(
    "case",
    [pytest.param(case, marks=[] if case[:2] in FAST else pytest.mark.slow) for case in cases()],
    ids=name,
)
def test_outputs_and_gradients_are_the_references(case: tuple[int, ...]) -> None:
    tile, dim, (before, after) = list(GRIDS)[case[0]], DIMS[case[1]], TEXT[case[2]]
    grid, heads = GRIDS[tile], 2 if MASKS[case[3]] == "float" else 1
    plan = Plan(tile=tile, phases=PHASES, lowering="triton", quant="fp8", **OPTIONS[case[4]])
    length = before + math.prod(grid) + after
    resolved = resolve(plan, grid, length, length, before, before)
    q, grad = (torch.randn(4, length, heads, dim).transpose(1, 2) for _ in range(2))
    k, v = (torch.randn(4, length, 1, dim).transpose(1, 2) for _ in range(2))
    k, v = k + 1.5, v + 3 * torch.randn(dim)
    mask, phase, scale = key_mask(MASKS[case[3]], length), list(range(4)), 0.7 * dim**-0.5
    leaves = [x.requires_grad_() for x in (q, k, v)]
    want, want_lse = reference.attention(*leaves, resolved=resolved, phase=phase, key_mask=mask, scale=scale)
    wants = torch.autograd.grad(want, leaves, grad)

    if mask is not None:  # what no query sees may hold anything
        seen = (mask if mask.dtype == torch.bool else mask != -math.inf).any(1).transpose(-1, -2)[:, None]
        k, v = (x.detach().masked_fill(~seen, math.nan) for x in (k, v))
    q, k, v, grad = (x.detach().to(DEVICE) for x in (q, k, v, grad))
    common = {"key_mask": None if mask is None else mask.to(DEVICE), "resolved": resolved, "scale": scale}
    common["phases"] = torch.tensor(phase, dtype=torch.int32, device=DEVICE)
    # The interpreter's time follows the number of operations, not their size.
    large, wide = (None, None) if DEVICE == "cuda" else (KernelConfig(256, 8, 3), GradientConfig(*(128, 128, 4, 1) * 2))
    out, lse = triton.forward(q, k, v, config=large, **common)
    assert relative(out.cpu(), want) < TOLERANCE
    empty = want_lse == -math.inf
    assert empty.any() == (MASKS[case[3]] == "hidden")
    assert torch.equal(lse.cpu() == -math.inf, empty)
    assert not out.cpu()[empty].any()
    torch.testing.assert_close(lse.cpu()[~empty], want_lse[~empty], rtol=1e-5, atol=5e-2)
    for got, expected in zip(gradients.backward(grad, q, k, v, out, lse, config=wide, **common), wants, strict=True):
        assert got.shape == expected.shape
        assert relative(got.cpu(), expected) < TOLERANCE
