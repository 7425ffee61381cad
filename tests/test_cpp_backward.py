"""The generated C++ kernel's gradients against autograd through the oracle in float64."""

from __future__ import annotations

import pytest
import torch
from cpp_cases import FULL, WINDOW, make_inputs, make_mask, make_resolved, need, needs_kernel
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fpscompile import reference
from fpscompile.lowerings import cpp
from fpscompile.masks import BlockMask
from fpscompile.plan import ResolvedPlan

TOLERANCE = {"none": 1e-5, "fp8": 5e-3, "int8": 2e-3}
"""Norm of the difference over norm of the expected gradient, float32 inputs; each of dq, dk and dv."""

BFLOAT16 = 3e-2
"""The same for bfloat16 inputs, whose output and gradients are rounded to 8 bits."""


def check_gradients(
    resolved: ResolvedPlan,
    tensors: list[torch.Tensor],
    *,
    phases: tuple[int, ...] | None = None,
    key_mask: torch.Tensor | None = None,
    scale: float = 0.2,
    block_mask: BlockMask | None = None,
) -> tuple[torch.Tensor, ...]:
    """Assert that dq, dk and dv equal autograd's through the oracle; returns them."""
    q, k, v = tensors
    plan = resolved.plan
    need(cpp.compute_of(str(q.dtype).removeprefix("torch."), plan))
    phases = phases or (0,) * q.shape[0]
    common = {"key_mask": key_mask, "resolved": resolved, "scale": scale, "block_mask": block_mask}
    out, lse = cpp.forward(q, k, v, phases=phases, **common)
    grad = torch.randn(out.shape).to(q.dtype)
    grads = cpp.backward(grad, q, k, v, out, lse, phases=phases, **common)

    leaves = [x.double() if plan.quant == "none" else x.clone() for x in (q, k, v)]
    leaves = [x.requires_grad_() for x in leaves]
    expected, _ = reference.attention(*leaves, phase=phases, compute_dtype=torch.float64, **common)
    wanted = torch.autograd.grad(expected, leaves, grad.to(expected.dtype))
    tolerance = max(TOLERANCE[plan.quant], BFLOAT16 if q.dtype == torch.bfloat16 else 0)
    for actual, want, like in zip(grads, wanted, tensors, strict=True):
        assert actual.shape == like.shape
        assert actual.dtype == like.dtype
        assert actual.transpose(1, 2).is_contiguous()
        # A query that sees one key has no gradient, and what is computed is the rounding of what cancels.
        floor = 0.1 * float(grad.double().norm())
        difference = (actual.double() - want.double()).norm() / want.double().norm().clamp(min=floor)
        assert float(difference) <= tolerance
    return grads


@needs_kernel
@pytest.mark.parametrize("quant", ["none", "int8", "fp8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradients(quant, dtype):
    resolved = make_resolved(WINDOW, FULL, q_others=(3, 5), k_others=(3, 40), quant=quant)
    tensors = make_inputs(resolved, d=72, d_v=40, key_heads=1, dtype=dtype)
    key_mask = make_mask("bool", 2, 2, resolved.k_layout.length)
    check_gradients(resolved, tensors, phases=(0, 1), key_mask=key_mask, scale=-0.2)


sizes = st.integers(1, 9)


@needs_kernel
@settings(max_examples=25)
@given(
    grid=st.tuples(sizes, sizes, sizes),
    window=st.tuples(*[st.integers(1, 3)] * 3),
    others=st.tuples(st.sampled_from([0, 1, 40]), st.sampled_from([0, 33])),
    heads=st.sampled_from([(1, 1), (2, 1), (4, 2)]),
    phases=st.sampled_from([(0,), (1, 0)]),
    mask=st.sampled_from([None, "bool", "float"]),
    mask_shape=st.tuples(st.booleans(), st.booleans()),
)
@example((8, 8, 8), (2, 2, 1), (40, 33), (4, 2), (0, 1), "float", (True, True))
def test_any_small_shape(grid, window, others, heads, phases, mask, mask_shape):
    """Ragged grids, text at either end, grouped queries, mixed phases, every kind of mask."""
    resolved = make_resolved(window, FULL, grid=grid, q_others=others, k_others=others)
    tensors = make_inputs(resolved, batch=len(phases), heads=heads[0], key_heads=heads[1], d=32)
    key_mask = None
    if mask is not None:
        batches, of_heads = len(phases) if mask_shape[0] else 1, heads[0] if mask_shape[1] else 1
        key_mask = make_mask(mask, batches, of_heads, resolved.k_layout.length)
    check_gradients(resolved, tensors, phases=phases, key_mask=key_mask)


@needs_kernel
def test_masks_per_head_and_empty_rows():
    """Any block mask, one per head; query tiles that list nothing and key tiles that nobody lists have no gradient."""
    resolved = make_resolved(FULL)
    tiles = resolved.k_layout.n_tiles
    dense = torch.rand(1, 4, resolved.q_layout.n_tiles, tiles) < 0.4
    dense[:, :, 0] = False
    dense[..., -1] = False
    mask = BlockMask.from_dense(dense)
    dq, dk, dv = check_gradients(resolved, make_inputs(resolved, heads=4, key_heads=2), block_mask=mask)
    order = resolved.q_layout.order()
    sizes = resolved.q_layout.sizes()
    assert not dq[:, :, order[: sizes[0]]].any()
    assert not dk[:, :, order[-sizes[-1] :]].any()
    assert not dv[:, :, order[-sizes[-1] :]].any()


@needs_kernel
def test_blocks_split_anywhere():
    """Tiles of 256 tokens, cut into several row blocks, and runs that are longer than a block of columns."""
    resolved = make_resolved((2, 2, 2), grid=(5, 13, 22), tile=(4, 8, 8), q_others=(5, 100), k_others=(5, 100))
    check_gradients(resolved, make_inputs(resolved, batch=1, heads=1))


@needs_kernel
def test_threads_change_nothing():
    resolved = make_resolved(WINDOW, k_others=(1, 2))
    q, k, v = make_inputs(resolved)
    common = {"key_mask": None, "phases": (0, 0), "resolved": resolved, "scale": 0.2}
    out, lse = cpp.forward(q, k, v, **common)
    grad, threads, results = torch.randn_like(out), torch.get_num_threads(), []
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            results.append(cpp.backward(grad, q, k, v, out, lse, **common))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@needs_kernel
@pytest.mark.parametrize("quant", ["none", "int8", "fp8"])
def test_what_all_keys_have_in_common(quant):
    """dS is then small beside dP and rowsum(P * dP): what either is off by would be most of dQ."""
    resolved = make_resolved(WINDOW, quant=quant, smooth_k=False)
    q, k, v = make_inputs(resolved)
    check_gradients(resolved, [q, k + 4, v], scale=0.1)


@needs_kernel
@pytest.mark.parametrize("quant", ["none", "int8"])
def test_rows_that_a_finite_mask_hides_have_bounded_gradients(quant):
    """-1e9 leaves no room for the scores in float32; the weights of such a row are then near 1, not exp(scores)."""
    resolved = make_resolved(FULL, quant=quant)
    q, k, v = make_inputs(resolved)
    q = 8 * q
    mask = torch.full((1, 1, 1, resolved.k_layout.length), -1e9)
    common = {"key_mask": mask, "phases": (0, 0), "resolved": resolved, "scale": 0.2}
    out, lse = cpp.forward(q, k, v, **common)
    grad = torch.randn_like(out)
    _, _, dv = cpp.backward(grad, q, k, v, out, lse, **common)
    # Each key then has about the whole gradient of each row, where eager gives it one of as many as there are keys.
    assert dv.norm() <= 2 * grad.sum(2, keepdim=True).expand_as(grad).norm()


@needs_kernel
def test_hidden_keys_are_not_read():
    """Text padding of whole tiles may hold NaN; its own gradient is zero."""
    resolved = make_resolved(FULL, k_others=(0, 64))
    q, k, v = make_inputs(resolved)
    keep = torch.ones(1, 1, 1, resolved.k_layout.length, dtype=torch.bool)
    keep[..., -64:] = False
    common = {"key_mask": keep, "phases": (0, 0), "resolved": resolved, "scale": 0.2}
    out, lse = cpp.forward(q, k, v, **common)
    grad = torch.randn_like(out)
    clean = cpp.backward(grad, q, k, v, out, lse, **common)
    k[:, :, -64:] = torch.nan
    v[:, :, -64:] = torch.nan
    spoiled = cpp.backward(grad, q, k, v, out, lse, **common)
    assert all(torch.equal(a, b) for a, b in zip(clean, spoiled, strict=True))
    assert not spoiled[1][:, :, -64:].any()
    assert not spoiled[2][:, :, -64:].any()


@needs_kernel
def test_empty_tensors():
    resolved = make_resolved(WINDOW)
    q, k, v = make_inputs(resolved, batch=1)
    out, lse = q[:0], q.new_empty(0, 2, resolved.q_layout.length)
    grads = cpp.backward(out, q[:0], k[:0], v[:0], out, lse, key_mask=None, phases=(), resolved=resolved, scale=0.2)
    assert [grad.shape for grad in grads] == [q[:0].shape, k[:0].shape, v[:0].shape]
