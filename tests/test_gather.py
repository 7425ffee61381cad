"""The gather lowering against the oracle: forward and gradients, over everything a site can bring."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fpscompile.lowerings import gather
from fpscompile.masks import BlockMask, expand_mask
from fpscompile.plan import PhasePlan, Plan, ResolvedPlan, resolve
from fpscompile.reference import attention

# Without quantization the two differ by the order of float32 sums. bf16 and fp16 add one rounding of each result.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 8e-3, torch.float16: 1e-3}
# With it, a score that differs in its last bit may round P to the neighbouring E4M3 value.
TOLERANCE_FP8 = {torch.float64: 1e-10, torch.float32: 5e-3, torch.bfloat16: 8e-3, torch.float16: 5e-3}

PHASES = (
    PhasePlan(window=(1, 2, 2), granularity="subtile"),
    PhasePlan(window=(2, 1, 3), granularity="head"),
    PhasePlan(window=(2, 3, 1)),
    PhasePlan(density=1.0, granularity="tensor"),
)


def resolved_plan(grid=(3, 5, 4), before=0, after=0, k_before=None, k_after=None, **fields) -> ResolvedPlan:
    fields = {"tile": (2, 2, 3), "phases": PHASES, "block_n": 32, **fields}
    video = math.prod(grid)
    k_before = before if k_before is None else k_before
    k_after = after if k_after is None else k_after
    lengths = before + video + after, k_before + video + k_after
    return resolve(Plan(**fields), grid, *lengths, before, k_before)


def draw(resolved: ResolvedPlan, seed: int, dtype: torch.dtype, batch=2, heads=4, key_heads=2, dim=8, value_dim=8):
    """q, k, v and the output's gradient; k has a common part."""
    generator = torch.Generator().manual_seed(seed)
    lengths = resolved.q_layout.length, resolved.k_layout.length

    def randn(heads: int, length: int, dim: int) -> torch.Tensor:
        return torch.randn(batch, heads, length, dim, generator=generator, dtype=torch.float64).to(dtype)

    q, k = randn(heads, lengths[0], dim), randn(key_heads, lengths[1], dim) + 1.5
    return q, k, randn(key_heads, lengths[1], value_dim), randn(heads, lengths[0], value_dim)


def key_mask_of(kind: str, batch: int, heads: int, length: int, seed: int = 11) -> torch.Tensor | None:
    if kind == "none":
        return None
    generator = torch.Generator().manual_seed(seed)
    keep = torch.rand(batch, heads, 1, length, generator=generator) < 0.7
    if kind == "bool":
        return keep
    return torch.randn(keep.shape, generator=generator).masked_fill(~keep, float("-inf"))


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a.double() - b.double()).norm() / b.double().norm().clamp(min=1e-30)).item()


def check(resolved: ResolvedPlan, operands, phases, *, key_mask=None, block_mask=None, scale=0.4) -> None:
    """Output, log-sum-exp, gradients and the strides of one call against the oracle in the same dtype."""
    q, k, v, grad = operands
    tolerance = (TOLERANCE if resolved.plan.quant == "none" else TOLERANCE_FP8)[q.dtype]
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    expected, expected_lse = attention(
        *leaves, resolved=resolved, phase=phases, key_mask=key_mask, scale=scale, block_mask=block_mask
    )
    expected_grads = torch.autograd.grad(expected, leaves, grad)

    common = {"key_mask": key_mask, "phases": tuple(phases), "resolved": resolved, "scale": scale}
    out, lse = gather.forward(q, k, v, block_mask=block_mask, **common)
    assert out.dtype == q.dtype
    assert out.transpose(1, 2).is_contiguous()
    assert lse.is_contiguous()
    assert lse.dtype == expected_lse.dtype
    assert relative(out, expected) < tolerance
    empty = expected_lse == float("-inf")
    assert torch.equal(lse == float("-inf"), empty)
    assert not out[empty].any()
    torch.testing.assert_close(lse[~empty], expected_lse[~empty], rtol=1e-5, atol=2e-5)

    grads = gather.backward(grad, q, k, v, out, lse, block_mask=block_mask, **common)
    for ours, theirs, x in zip(grads, expected_grads, (q, k, v), strict=True):
        assert ours.dtype == x.dtype
        assert ours.transpose(1, 2).is_contiguous()
        assert relative(ours, theirs) < tolerance


@pytest.mark.parametrize("quant", ["none", "fp8"])
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=lambda dtype: str(dtype).removeprefix("torch."))
def test_dtypes(quant: str, dtype: torch.dtype) -> None:
    resolved = resolved_plan(after=5, quant=quant)
    check(resolved, draw(resolved, 1, dtype), [0, 2])


@pytest.mark.parametrize("quant", ["none", "fp8"])
@pytest.mark.parametrize("kind", ["bool", "float"])
@pytest.mark.parametrize(("mask_batch", "mask_heads"), [(1, 1), (2, 1), (2, 4), (1, 4)])
def test_key_masks(quant: str, kind: str, mask_batch: int, mask_heads: int) -> None:
    resolved = resolved_plan(before=7, quant=quant)
    operands = draw(resolved, 2, torch.float32)
    check(resolved, operands, [1, 0], key_mask=key_mask_of(kind, mask_batch, mask_heads, resolved.k_layout.length))


@settings(max_examples=20, deadline=None)
@given(
    st.sampled_from(["none", "fp8"]),
    st.tuples(*[st.integers(1, 5)] * 3),
    st.sampled_from([(2, 2, 2), (1, 3, 4), (4, 4, 4), (3, 1, 6)]),
    st.tuples(*[st.sampled_from([0, 0, 1, 6, 19])] * 4),
    st.sampled_from([(1, 1), (3, 1), (4, 2), (3, 3)]),
    st.sampled_from([(4, 4), (5, 3), (3, 7)]),
    st.sampled_from([(0, 0), (3, 1), (2, 0)]),
    st.sampled_from(["none", "bool", "float"]),
    st.fixed_dictionaries({name: st.booleans() for name in ("smooth_k", "smooth_v", "hadamard")}),
    st.integers(0, 999),
)
def test_shapes(quant, grid, tile, text, heads, dims, phases, kind, before_fp8, seed) -> None:
    q_before, q_after, k_before, k_after = text
    resolved = resolved_plan(
        grid, q_before, q_after, k_before, k_after, tile=tile, quant=quant, block_n=16, **before_fp8
    )
    operands = draw(resolved, seed, torch.float64, heads=heads[0], key_heads=heads[1], dim=dims[0], value_dim=dims[1])
    check(resolved, operands, phases, key_mask=key_mask_of(kind, 2, 1, resolved.k_layout.length, seed))


@pytest.mark.parametrize("quant", ["none", "fp8"])
@pytest.mark.parametrize("heads", [1, 4])
def test_any_block_mask(quant: str, heads: int) -> None:
    """Lists of all lengths, also none at all, the same for all heads or one per head."""
    resolved = resolved_plan(before=4, after=30, quant=quant)
    n = resolved.q_layout.n_tiles
    generator = torch.Generator().manual_seed(3)
    share = torch.linspace(0.0, 1.0, n)[:, None]
    mask = BlockMask.from_dense(torch.rand(2, heads, n, n, generator=generator) < share)
    assert (mask.kv_num_blocks == 0).any()
    check(resolved, draw(resolved, 4, torch.float64), [1, 0], block_mask=mask)


@pytest.mark.parametrize("quant", ["none", "fp8"])
@pytest.mark.parametrize(
    ("kind", "mask_batch", "mask_heads"), [("none", 1, 1), ("bool", 5, 1), ("float", 1, 4), ("bool", 5, 4)]
)
@pytest.mark.parametrize("own_masks", [False, True])
def test_elements_of_one_phase_go_together(quant, kind, mask_batch, mask_heads, own_masks) -> None:
    """Their scales, means, key masks and block masks stay their own; a scale of a whole element keeps it apart."""
    resolved = resolved_plan(before=4, quant=quant, smooth_v=quant == "fp8")
    phases = [3, 0, 3, 0, 0]
    operands = [x * torch.linspace(0.5, 3, 5)[:, None, None, None] for x in draw(resolved, 2, torch.float64, batch=5)]
    mask = None
    if own_masks:
        n = resolved.q_layout.n_tiles
        mask = BlockMask.from_dense(torch.rand(4, 4, n, n, generator=torch.Generator().manual_seed(3)) < 0.4)
    key_mask = key_mask_of(kind, mask_batch, mask_heads, resolved.k_layout.length)
    together = [len(several.elements) for _, several in gather._by_phase(*operands[:3], tuple(phases), resolved)]
    assert together == ([1, 1, 3] if quant == "fp8" else [2, 3])
    check(resolved, operands, phases, key_mask=key_mask, block_mask=mask)


def test_large_elements_go_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    resolved = resolved_plan()
    q, k, v, _ = draw(resolved, 2, torch.float64, batch=4)
    monkeypatch.setitem(gather.TOGETHER_BYTES, "cpu", 2 * sum(x[0].nbytes for x in (q, k, v)))
    together = [several.elements for _, several in gather._by_phase(q, k, v, (0, 0, 0, 1), resolved)]
    assert together == [(0, 1), (2,), (3,)]


@pytest.mark.parametrize("quant", ["none", "fp8"])
def test_default_tile_and_block(quant: str) -> None:
    """Tiles of two rounding blocks each, ragged on every axis."""
    resolved = resolved_plan((5, 10, 12), after=26, tile=(4, 8, 8), block_n=128, quant=quant)
    check(resolved, draw(resolved, 12, torch.float32, batch=1, heads=2, dim=32, value_dim=32), [0])


@pytest.mark.parametrize("quant", ["none", "fp8"])
def test_rows_without_keys(quant: str) -> None:
    resolved = resolved_plan(after=3, quant=quant)
    key_mask = key_mask_of("bool", 2, 4, resolved.k_layout.length)
    key_mask[0] = False
    key_mask[1, 2] = False
    check(resolved, draw(resolved, 5, torch.float32), [0, 1], key_mask=key_mask)


@pytest.mark.parametrize("quant", ["none", "fp8"])
def test_chunks_do_not_change_results(quant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One run of queries of one head at a time, long query tiles cut in runs."""
    resolved = resolved_plan((4, 6, 6), 9, 0, tile=(4, 4, 4), quant=quant)
    operands = draw(resolved, 6, torch.float64, heads=6, key_heads=3)
    key_mask = key_mask_of("float", 2, 6, resolved.k_layout.length)
    monkeypatch.setitem(gather.CHUNK_BYTES, "cpu", 1)
    monkeypatch.setattr(gather, "QUERY_RUN", 10)
    check(resolved, operands, [0, 2], key_mask=key_mask)


def test_chunks_are_bounded_and_little_padded(monkeypatch: pytest.MonkeyPatch) -> None:
    budget = 1 << 16
    monkeypatch.setitem(gather.CHUNK_BYTES, "cpu", budget)
    resolved = resolved_plan((6, 8, 8), 0, 20, tile=(2, 2, 2))
    seen: list[tuple[int, int]] = []
    scores = gather._scores

    def record(*args):
        result = scores(*args)
        seen.append((result.numel() * result.element_size(), result.numel()))
        return result

    monkeypatch.setattr(gather, "_scores", record)
    q, k, v, _ = draw(resolved, 7, torch.float32, batch=1)
    gather.forward(q, k, v, key_mask=None, phases=(0,), resolved=resolved, scale=1.0)
    assert len(seen) > 5
    assert max(size for size, _ in seen) <= budget
    kept = resolved.densities[0] * q.shape[1] * q.shape[2] * k.shape[2]
    assert sum(count for _, count in seen) < 1.1 * kept  # next to no work on padding


def test_nothing_leaks_from_tiles_that_are_not_listed() -> None:
    """NaN and infinity reach exactly the rows that see them."""
    for quant in ("none", "fp8"):
        phases = (PhasePlan(window=(1, 2, 2)),)
        resolved = resolved_plan((3, 5, 7), quant=quant, phases=phases, smooth_k=False)
        for bad in (float("nan"), float("inf")):
            q, k, v, _ = draw(resolved, 8, torch.float32)
            token = 0
            (v if quant == "none" else k)[:, :, token, 1] = bad
            out, _ = gather.forward(q, k, v, key_mask=None, phases=(0, 0), resolved=resolved, scale=0.3)
            sees = expand_mask(resolved.block_mask, resolved.q_layout, resolved.k_layout)[0, 0, :, token]
            assert 0 < int(sees.sum()) < len(sees)
            assert torch.equal(out.isfinite().all(-1), (~sees).expand(2, 4, -1))


def test_inputs_of_any_strides_and_without_autograd() -> None:
    resolved = resolved_plan(after=3)
    q, k, v, grad = draw(resolved, 9, torch.float32)
    common = {"key_mask": None, "phases": (0, 1), "resolved": resolved, "scale": 0.3}
    out, lse = gather.forward(q, k, v, **common)
    strided = [torch.stack([x, x], -1)[..., 0] for x in (q, k, v)]
    strided[0] = strided[0].expand_as(q).requires_grad_()
    again, _ = gather.forward(*strided, **common)
    assert torch.equal(out, again)
    assert not again.requires_grad
    first = gather.backward(grad, q, k, v, out, lse, **common)
    second = gather.backward(torch.stack([grad, grad], -1)[..., 0], *strided, again, lse, **common)
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)


def test_expanded_keys_get_gradients_of_their_own() -> None:
    """Keys broadcast over heads have overlapping memory; their gradient must not."""
    resolved = resolved_plan()
    q, k, v, grad = draw(resolved, 10, torch.float64)
    common = {"key_mask": None, "phases": (0, 1), "resolved": resolved, "scale": 0.3}
    shared = k[:, :1].expand(-1, 2, -1, -1)
    out, lse = gather.forward(q, shared, v, **common)
    _, dk, _ = gather.backward(grad, q, shared, v, out, lse, **common)
    _, expected, _ = gather.backward(grad, q, shared.contiguous(), v, out, lse, **common)
    assert torch.equal(dk, expected)
