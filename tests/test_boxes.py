"""The boxes lowering against the oracle (float64, expanded mask), forward and backward."""

from __future__ import annotations

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fpscompile import reference
from fpscompile.errors import UnsupportedError
from fpscompile.lowerings import boxes, columns, dense
from fpscompile.plan import PhasePlan, Plan, ResolvedPlan, resolve

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
"""Norm of the difference over norm of the expected value, forward and backward."""

GRID = (5, 6, 7)
TILE = (2, 2, 3)
WINDOW = (2, 2, 1)


def make_plan(*windows: tuple[int, int, int], tile: tuple[int, int, int] = TILE, quant: str = "none") -> Plan:
    return Plan(tile, tuple(PhasePlan(window=window) for window in windows), lowering="boxes", quant=quant)


def make_resolved(
    plan: Plan,
    grid: tuple[int, int, int] = GRID,
    q_others: tuple[int, int] = (0, 0),
    k_others: tuple[int, int] = (0, 0),
) -> ResolvedPlan:
    video = math.prod(grid)
    return resolve(plan, grid, video + sum(q_others), video + sum(k_others), q_others[0], k_others[0])


def make_inputs(
    resolved: ResolvedPlan,
    *,
    batch: int = 2,
    heads: int = 2,
    key_heads: int | None = None,
    d: int = 16,
    d_v: int | None = None,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
) -> list[torch.Tensor]:
    """q, k, v and the output's gradient, with the strides that models give them."""
    generator = torch.Generator().manual_seed(seed)
    key_heads, d_v = key_heads or heads, d_v or d
    lq, lk = resolved.q_layout.length, resolved.k_layout.length
    sizes = [(lq, heads, d), (lk, key_heads, d), (lk, key_heads, d_v), (lq, heads, d_v)]
    return [torch.randn(batch, *size, generator=generator).to(dtype).transpose(1, 2) for size in sizes]


def relative(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Norm over norm; an expected value of zero is met to 1e-3 of the tolerance."""
    actual, expected = actual.detach().double(), expected.detach().double()
    return float((actual - expected).norm() / expected.norm().clamp(min=1e-3))


def check(
    resolved: ResolvedPlan,
    tensors: list[torch.Tensor],
    *,
    phases: tuple[int, ...] | None = None,
    key_mask: torch.Tensor | None = None,
    scale: float = 0.3,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Assert that output, log-sum-exp and gradients equal the oracle's; returns the first two."""
    q, k, v, grad = tensors
    tolerance = TOLERANCE[q.dtype]
    phases = phases or (0,) * q.shape[0]
    common = {"key_mask": key_mask, "phases": phases, "resolved": resolved, "scale": scale}
    out, lse = boxes.forward(q, k, v, **common)
    leaves = [x.detach().clone().double().requires_grad_() for x in (q, k, v)]
    expected, expected_lse = reference.attention(
        *leaves, resolved=resolved, phase=phases, key_mask=key_mask, scale=scale
    )
    assert out.shape == expected.shape
    assert out.dtype == q.dtype
    assert out.transpose(1, 2).is_contiguous()
    assert lse.is_contiguous()
    assert lse.dtype == (torch.float64 if q.dtype == torch.float64 else torch.float32)
    assert relative(out, expected) <= tolerance
    assert torch.equal(lse.isinf(), expected_lse.isinf())
    finite = ~lse.isinf()
    assert relative(lse[finite], expected_lse[finite]) <= min(tolerance, 1e-3)

    grads = boxes.backward(grad, q, k, v, out, lse, **common)
    for actual, leaf, wanted in zip(
        grads, (q, k, v), torch.autograd.grad(expected, leaves, grad.double()), strict=True
    ):
        assert actual.shape == leaf.shape
        assert actual.dtype == leaf.dtype
        assert actual.transpose(1, 2).is_contiguous()
        assert relative(actual, wanted) <= tolerance
    return out, lse


@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_matches_oracle(dtype):
    resolved = make_resolved(make_plan(WINDOW))
    check(resolved, make_inputs(resolved, dtype=dtype))


@pytest.mark.parametrize("d", [16, 64, 72, 88, 96, 128])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_head_dims(d, dtype):
    resolved = make_resolved(make_plan(WINDOW))
    check(resolved, make_inputs(resolved, batch=1, d=d, dtype=dtype, seed=d), scale=d**-0.5)


@pytest.mark.parametrize("window", [(1, 1, 1), (1, 3, 2), (3, 1, 3), (2, 3, 3), (3, 3, 1), (2, 2, 2)])
@pytest.mark.parametrize("others", [(0, 0), (3, 5)])
def test_windows_and_ragged_grids(window, others):
    resolved = make_resolved(make_plan(window), q_others=others, k_others=others)
    check(resolved, make_inputs(resolved))


@pytest.mark.parametrize("grid", [(1, 1, 1), (2, 2, 3), (9, 1, 4), (1, 8, 11), (13, 3, 2)])
def test_grids(grid):
    """One tile, tiles larger than an axis, long axes: runs of many shapes, batched and not."""
    resolved = make_resolved(make_plan((1, 2, 2), tile=(2, 2, 2)), grid=grid, k_others=(0, 2))
    check(resolved, make_inputs(resolved, batch=1))
    resolved = make_resolved(make_plan((1, 2, 2), tile=(2, 2, 2)), grid=grid)
    check(resolved, make_inputs(resolved, batch=1))


@pytest.mark.parametrize("q_others", [(0, 0), (4, 0), (0, 4), (2, 3)])
@pytest.mark.parametrize("k_others", [(0, 0), (6, 0), (0, 6), (1, 40)])
def test_other_tokens_before_and_after(q_others, k_others):
    """Query and key sequences need not be the same: video queries may read longer keys."""
    resolved = make_resolved(make_plan(WINDOW), q_others=q_others, k_others=k_others)
    check(resolved, make_inputs(resolved))


@pytest.mark.parametrize(("heads", "key_heads"), [(4, 2), (4, 1), (3, 3)])
@pytest.mark.parametrize("others", [(0, 0), (2, 3)])
def test_grouped_queries(heads, key_heads, others):
    resolved = make_resolved(make_plan(WINDOW), k_others=others)
    check(resolved, make_inputs(resolved, heads=heads, key_heads=key_heads))


@pytest.mark.parametrize(("d", "d_v"), [(16, 24), (24, 16)])
def test_value_dim_differs(d, d_v):
    resolved = make_resolved(make_plan(WINDOW, (9, 9, 9)), k_others=(1, 2))
    check(resolved, make_inputs(resolved, d=d, d_v=d_v), phases=(0, 1))
    check(resolved, make_inputs(resolved, d=d, d_v=d_v), phases=(1, 1))


def make_mask(kind: str, batch: int, heads: int, keys: int, dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(7)
    keep = torch.rand(batch, heads, 1, keys, generator=generator) < 0.6
    if kind == "bool":
        return keep
    bias = torch.randn(batch, heads, 1, keys, generator=generator)
    return bias.masked_fill(~keep, -torch.inf).to(dtype)


@pytest.mark.parametrize("kind", ["bool", "float"])
@pytest.mark.parametrize(("mask_batch", "mask_heads"), [(1, 1), (2, 1), (1, 4), (2, 4)])
@pytest.mark.parametrize("others", [(0, 0), (2, 3)])
def test_key_masks(kind, mask_batch, mask_heads, others):
    resolved = make_resolved(make_plan(WINDOW, (1, 2, 3)), q_others=others, k_others=others)
    tensors = make_inputs(resolved, heads=4, key_heads=2)
    mask = make_mask(kind, mask_batch, mask_heads, resolved.k_layout.length, torch.float64)
    check(resolved, tensors, key_mask=mask, phases=(0, 1))


@pytest.mark.parametrize("mask_dtype", [torch.float32, torch.bfloat16])
def test_bfloat16_with_either_mask_dtype(mask_dtype):
    resolved = make_resolved(make_plan(WINDOW))
    mask = make_mask("float", 2, 1, resolved.k_layout.length, mask_dtype)
    check(resolved, make_inputs(resolved, dtype=torch.bfloat16), key_mask=mask)


@pytest.mark.parametrize("windows", [WINDOW, (9, 9, 9)])
def test_float64_with_a_float32_mask(windows):
    resolved = make_resolved(make_plan(windows))
    mask = make_mask("float", 2, 1, resolved.k_layout.length, torch.float32)
    check(resolved, make_inputs(resolved), key_mask=mask)


@pytest.mark.parametrize("windows", [(WINDOW,), ((9, 9, 9),)])
def test_rows_without_a_visible_key(windows):
    """Zeros and -inf, and gradients that are zero there, not NaN: all keys of one element, and all of one window."""
    resolved = make_resolved(make_plan(*windows))
    keep = torch.ones(2, 1, 1, resolved.k_layout.length, dtype=torch.bool)
    keep[0] = False
    keep[1, ..., : 4 * 6 * 7] = False
    out, lse = check(resolved, make_inputs(resolved, dtype=torch.float32), key_mask=keep)
    assert torch.equal(out[0], torch.zeros_like(out[0]))
    assert (lse[0] == -torch.inf).all()
    if windows == (WINDOW,):
        assert (lse[1] == -torch.inf).any()
    assert not (lse[1] == -torch.inf).all()


@pytest.mark.parametrize("phases", [(0, 0, 0, 0), (0, 1, 1, 2), (2, 0, 2, 0), (2, 2, 2, 2)])
def test_mixed_phases(phases):
    resolved = make_resolved(make_plan(WINDOW, (1, 1, 2), (9, 9, 9)), k_others=(0, 3))
    check(resolved, make_inputs(resolved, batch=4), phases=phases)


@pytest.mark.parametrize("window", [WINDOW, (9, 9, 9)])
@pytest.mark.parametrize("layout", ["contiguous", "features first", "expanded", "sliced"])
def test_strides(window, layout):
    """The flash kernel assumes features next to one another and would return garbage without a word."""
    resolved = make_resolved(make_plan(window))
    tensors = make_inputs(resolved)
    if layout == "contiguous":
        tensors = [x.contiguous() for x in tensors]
    elif layout == "features first":
        tensors = [x.mT.contiguous().mT for x in tensors]
    elif layout == "expanded":
        tensors = [x[:1, :1].expand(2, 2, -1, -1) for x in tensors]
    else:
        tensors = [torch.stack([x, x + 1], -2).flatten(3)[..., : x.shape[-1]] for x in tensors]
    check(resolved, tensors)


def test_full_window_is_one_call_without_copies(monkeypatch):
    resolved = make_resolved(make_plan((9, 9, 9)), k_others=(2, 0))
    q, k, v, _ = make_inputs(resolved)
    calls = []
    kernel = dense.forward
    monkeypatch.setattr(dense, "forward", lambda *args: calls.append(args) or kernel(*args))
    boxes.forward(q, k, v, key_mask=None, phases=(0, 0), resolved=resolved, scale=1.0)
    assert len(calls) == 1
    assert calls[0][0] is q
    assert calls[0][1] is k
    assert calls[0][2] is v


def test_boxes_cost_what_their_density_says(monkeypatch):
    """Pairs computed are pairs kept: nothing is computed and then masked away."""
    others = (2, 3)
    resolved = make_resolved(make_plan(WINDOW), q_others=others, k_others=others)
    q, k, v, _ = make_inputs(resolved, batch=1, heads=1)
    pairs = []
    kernel = dense.forward

    def count(q, k, v, bias, scale):
        pairs.append(q.shape[0] * q.shape[2] * k.shape[2])
        return kernel(q, k, v, bias, scale)

    monkeypatch.setattr(dense, "forward", count)
    boxes.forward(q, k, v, key_mask=None, phases=(0,), resolved=resolved, scale=1.0)
    total = resolved.q_layout.length * resolved.k_layout.length
    assert sum(pairs) == round(resolved.densities[0] * total)


def test_equal_boxes_go_into_one_call(monkeypatch):
    """Sixteen tiles in a row, window 2: the first two share keys, the other fourteen are one batch."""
    resolved = make_resolved(make_plan((2, 1, 1), tile=(1, 2, 2)), grid=(16, 2, 2))
    tensors = make_inputs(resolved)
    sizes = []
    kernel = dense.forward
    monkeypatch.setattr(dense, "forward", lambda q, *rest: sizes.append(q.shape[0]) or kernel(q, *rest))
    check(resolved, tensors)
    assert sizes == [1, 14]


def test_batches_are_bounded(monkeypatch):
    monkeypatch.setattr(columns, "BATCH_TOKENS", 4 * 4)
    resolved = make_resolved(make_plan((2, 1, 1), tile=(1, 2, 2)), grid=(16, 2, 2))
    sizes = [len(batch.runs) for batch in columns.columns(resolved, 0)[0].batches(single=False)]
    assert sizes == [1, 4, 4, 4, 2]
    check(resolved, make_inputs(resolved))


def test_runs_share_clamped_windows():
    resolved = make_resolved(make_plan((3, 1, 1), tile=(2, 6, 7)), grid=(11, 6, 7))
    runs = columns.axis_runs(resolved.q_layout, 0, 3)
    assert [(run.queries, run.keys) for run in runs] == [
        ((0, 4), (0, 6)),
        ((4, 6), (2, 8)),
        ((6, 8), (4, 10)),
        ((8, 11), (6, 11)),
    ]


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_bad_values_spread_no_further_than_the_mask(value):
    """A NaN or Inf key spoils the queries that see it, as in dense attention, and no other."""
    resolved = make_resolved(make_plan(WINDOW))
    q, k, v, _ = make_inputs(resolved, dtype=torch.float32)
    v[1, 0, 17, 3] = value
    out, _ = boxes.forward(q, k, v, key_mask=None, phases=(0, 0), resolved=resolved, scale=0.3)
    expected, _ = reference.attention(q, k, v, resolved=resolved, phase=(0, 0), scale=0.3)
    assert not out.isfinite().all()
    # the oracle multiplies hidden values by zero, which spreads NaN: ask the mask instead
    visible = reference.expand_mask(resolved.block_mask, resolved.q_layout, resolved.k_layout)[0, 0][:, 17]
    assert torch.equal(~out[1, 0, :, 3].isfinite(), visible)
    assert out[0].isfinite().all()
    assert torch.allclose(out[0], expected[0], atol=1e-5)


def test_quantized_plan_is_refused():
    resolved = make_resolved(make_plan(WINDOW, quant="fp8"))
    q, k, v, _ = make_inputs(resolved)
    with pytest.raises(UnsupportedError, match=r"quant='fp8'.*lowering='gather'"):
        boxes.forward(q, k, v, key_mask=None, phases=(0, 0), resolved=resolved, scale=1.0)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_matrix_products_equal_the_flash_kernel(monkeypatch, dtype, masked):
    """The path for devices without a kernel, on the CPU, in several row chunks."""
    monkeypatch.setattr(dense, "_kernel", lambda *_: "math")
    monkeypatch.setattr(dense, "CHUNK_ELEMENTS", 4 * 100 * 7)
    resolved = make_resolved(make_plan(WINDOW), q_others=(1, 2), k_others=(3, 0))
    tensors = make_inputs(resolved, heads=4, key_heads=2, d=16, d_v=24, dtype=dtype)
    mask = make_mask("bool", 2, 1, resolved.k_layout.length, dtype) if masked else None
    if mask is not None:
        mask[0] = False
    check(resolved, tensors, key_mask=mask)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("masked", [False, True])
def test_cuda(dtype, masked):
    resolved = make_resolved(make_plan(WINDOW), k_others=(3, 0))
    tensors = [x.cuda() for x in make_inputs(resolved, d=64, dtype=dtype)]
    mask = make_mask("bool", 2, 1, resolved.k_layout.length, dtype).cuda() if masked else None
    check(resolved, tensors, key_mask=mask)


def test_memory_stays_far_below_the_score_matrix():
    """A column of keys and one box: nothing quadratic, and no copy per box of all keys."""
    resolved = make_resolved(make_plan((2, 2, 2), tile=(2, 4, 4)), grid=(8, 16, 16))
    q, k, v, _ = make_inputs(resolved, batch=1, dtype=torch.float32)
    largest = []
    with _Allocations(largest):
        boxes.forward(q, k, v, key_mask=None, phases=(0,), resolved=resolved, scale=1.0)
    assert max(largest) <= q.numel() * q.element_size()


class _Allocations(TorchDispatchMode):
    """Bytes of every tensor that an op returns."""

    def __init__(self, sizes: list[int]) -> None:
        super().__init__()
        self.sizes = sizes

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for x in result if isinstance(result, tuple) else (result,):
            if isinstance(x, torch.Tensor) and not x._is_view():
                self.sizes.append(x.untyped_storage().nbytes())
        return result
