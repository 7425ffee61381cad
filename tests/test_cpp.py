"""The generated C++ kernel's forward against the oracle in float64."""

from __future__ import annotations

import pytest
import torch
from cpp_cases import (
    DTYPES,
    FULL,
    TOLERANCE,
    WINDOW,
    check,
    make_inputs,
    make_mask,
    make_resolved,
    needs_kernel,
)
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fpscompile import cpp_build, reference
from fpscompile.errors import UnsupportedError
from fpscompile.lowerings import boxes, cpp
from fpscompile.masks import BlockMask
from fpscompile.render import CppConfig

HEAD_DIMS = [(32, 32), (72, 88), (96, 64), (128, 128), (33, 47), (256, 256)]


@needs_kernel
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("d", "d_v"), [(64, 64), *(pytest.param(d, d_v, marks=pytest.mark.slow) for d, d_v in HEAD_DIMS)]
)
def test_dtypes_and_head_dims(dtype, d, d_v):
    resolved = make_resolved(WINDOW, FULL, q_others=(3, 5), k_others=(3, 5))
    check(resolved, make_inputs(resolved, d=d, d_v=d_v, dtype=dtype), phases=(0, 1))


@needs_kernel
@pytest.mark.parametrize(("dtype", "d", "d_v"), [(torch.bfloat16, 72, 40), (torch.float32, 33, 128)])
def test_value_dim_differs(dtype, d, d_v):
    resolved = make_resolved(WINDOW)
    check(resolved, make_inputs(resolved, d=d, d_v=d_v, dtype=dtype))


sizes = st.integers(1, 9)
others = st.tuples(st.sampled_from([0, 1, 7, 40]), st.sampled_from([0, 2, 33]))


@needs_kernel
@settings(max_examples=40)
@given(
    grid=st.tuples(sizes, sizes, sizes),
    window=st.tuples(*[st.integers(1, 3)] * 3),
    q_others=others,
    k_others=others,
    heads=st.sampled_from([(1, 1), (2, 1), (4, 2)]),
    phases=st.sampled_from([(0,), (0, 1), (1, 0, 0)]),
    mask=st.sampled_from([None, "bool", "float"]),
    mask_shape=st.tuples(st.booleans(), st.booleans()),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
@example((1, 1, 1), (1, 1, 1), (0, 0), (0, 0), (1, 1), (0,), None, (False, False), torch.float32)
@example((8, 8, 8), (2, 2, 1), (1, 2), (40, 33), (4, 2), (0, 1), "float", (True, True), torch.bfloat16)
def test_any_small_shape(grid, window, q_others, k_others, heads, phases, mask, mask_shape, dtype):
    """Ragged grids, text at either end and of different lengths, grouped queries, mixed phases, every kind of mask."""
    resolved = make_resolved(window, FULL, grid=grid, q_others=q_others, k_others=k_others)
    batch = len(phases)
    tensors = make_inputs(resolved, batch=batch, heads=heads[0], key_heads=heads[1], dtype=dtype)
    key_mask = None
    if mask is not None:
        lk = resolved.k_layout.length
        key_mask = make_mask(mask, batch if mask_shape[0] else 1, heads[0] if mask_shape[1] else 1, lk, dtype)
    check(resolved, tensors, phases=phases, key_mask=key_mask)


@needs_kernel
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("config", [(16, 64), (64, 128)])
def test_blocks_split_anywhere(dtype, config):
    """Tiles of 256 tokens and ragged ones, in blocks smaller than a tile: rows, runs and blocks all end mid-tile."""
    resolved = make_resolved((2, 2, 2), grid=(5, 13, 22), tile=(4, 8, 8), k_others=(5, 100))
    compute = cpp.compute_of(str(dtype).removeprefix("torch."), resolved.plan)
    check(resolved, make_inputs(resolved, batch=1, dtype=dtype), config=CppConfig(*config, compute))


@needs_kernel
@pytest.mark.parametrize("layout", ["contiguous", "features first", "expanded", "sliced", "misaligned"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_strides(layout, dtype):
    resolved = make_resolved(WINDOW)
    tensors = make_inputs(resolved, dtype=dtype)
    if layout == "contiguous":
        tensors = [x.contiguous() for x in tensors]
    elif layout == "features first":
        tensors = [x.mT.contiguous().mT for x in tensors]
    elif layout == "expanded":
        tensors = [x[:1, :1].expand(2, 2, -1, -1) for x in tensors]
    elif layout == "sliced":
        tensors = [torch.stack([x, x + 1], -2).flatten(3)[..., : x.shape[-1]] for x in tensors]
    else:
        tensors = [torch.cat([x.new_ones(1), x.flatten()])[1:].view(x.shape) for x in tensors]
    check(resolved, tensors)


@needs_kernel
@pytest.mark.parametrize("scale", [-0.3, 0.0, 40.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_scales(scale, dtype):
    """A negative scale turns the maximum around; a large one makes rows that grow their maximum again and again."""
    resolved = make_resolved(FULL)
    q, k, v = make_inputs(resolved, dtype=dtype)
    out, lse = cpp.forward(q, k, v, key_mask=None, phases=(0, 0), resolved=resolved, scale=scale)
    expected, expected_lse = reference.attention(
        q.double(), k.double(), v.double(), resolved=resolved, phase=(0, 0), scale=scale
    )
    # the scores' own rounding, 2^-23 of about 40 * 8 * 5, moves a peaked softmax
    tolerance = TOLERANCE[dtype] * (50 if scale == 40.0 and dtype == torch.float32 else 1)
    assert float((out - expected).norm() / expected.norm()) <= tolerance
    torch.testing.assert_close(lse.double(), expected_lse, atol=1e-3, rtol=1e-5)


@needs_kernel
def test_the_lowest_finite_mask_hides_no_key_that_stands_alone():
    """As in eager, a row whose keys are all at the lowest number of the dtype averages them."""
    resolved = make_resolved((1, 1, 1))
    q, k, v = make_inputs(resolved)
    mask = torch.zeros(2, 1, 1, resolved.k_layout.length)
    mask[0] = torch.finfo(torch.float32).min
    common = {"key_mask": mask, "resolved": resolved, "scale": 0.2}
    out, _ = cpp.forward(q, k, v, phases=(0, 0), **common)
    expected, _ = reference.attention(q.double(), k.double(), v.double(), phase=(0, 0), **common)
    assert expected[0].norm() > 0
    torch.testing.assert_close(out, expected.float(), atol=1e-5, rtol=1e-4)


@needs_kernel
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rows_without_a_visible_key(dtype):
    """Zeros and -inf: all keys of one element, the keys of one tile row, and a query tile that lists nothing."""
    resolved = make_resolved((1, 1, 1))
    keep = torch.ones(2, 1, 1, resolved.k_layout.length, dtype=torch.bool)
    keep[0] = False
    keep[1, ..., : 2 * 6 * 9] = False
    out, lse = check(resolved, make_inputs(resolved, dtype=dtype), key_mask=keep)
    assert torch.equal(out[0], torch.zeros_like(out[0]))
    assert (lse[0] == -torch.inf).all()
    assert (lse[1, :, : 2 * 6 * 9] == -torch.inf).all()
    assert lse[1, :, 2 * 6 * 9 :].isfinite().all()

    mask = resolved.block_mask
    nothing = BlockMask(torch.zeros_like(mask.kv_num_blocks), mask.kv_indices)
    out, lse = check(resolved, make_inputs(resolved, dtype=dtype), block_mask=nothing)
    assert not out.any()


@needs_kernel
def test_masks_per_head():
    """Any block mask, one per head, as data."""
    resolved = make_resolved(FULL, FULL)
    tiles = resolved.k_layout.n_tiles
    dense = torch.rand(2, 4, resolved.q_layout.n_tiles, tiles) < 0.4
    check(resolved, make_inputs(resolved, heads=4, key_heads=2), phases=(1, 0), block_mask=BlockMask.from_dense(dense))


@needs_kernel
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("where", ["q", "k", "v"])
def test_bad_values_spread_no_further_than_the_mask(dtype, value, where):
    """A NaN or Inf spoils what dense attention would spoil among the visible tokens, and nothing else."""
    resolved = make_resolved(WINDOW)
    tensors = dict(zip("qkv", make_inputs(resolved, dtype=dtype), strict=True))
    tensors[where][1, 0, 17, 3] = value
    common = {"key_mask": None, "phases": (0, 0), "resolved": resolved, "scale": 0.3}
    out, lse = cpp.forward(*tensors.values(), **common)
    wanted, wanted_lse = boxes.forward(*(x.float() for x in tensors.values()), **common)
    assert not wanted.isfinite().all()
    assert torch.equal(out.isfinite(), wanted.isfinite())
    assert torch.equal(out.isnan(), wanted.isnan())
    assert torch.equal(lse.isfinite(), wanted_lse.isfinite())
    fine = wanted.isfinite()
    torch.testing.assert_close(out[fine].float(), wanted[fine], atol=0.03 if dtype == torch.bfloat16 else 1e-5, rtol=0)


@needs_kernel
def test_hidden_keys_are_not_read():
    """Padding keys may hold anything when a whole tile of them is masked: text padding must not cost or leak."""
    resolved = make_resolved(FULL, k_others=(0, 64))
    q, k, v = make_inputs(resolved)
    keep = torch.ones(1, 1, 1, resolved.k_layout.length, dtype=torch.bool)
    keep[..., -64:] = False
    clean, _ = check(resolved, [q, k, v], key_mask=keep)
    k[:, :, -64:] = torch.nan
    v[:, :, -64:] = torch.nan
    out, _ = cpp.forward(q, k, v, key_mask=keep, phases=(0, 0), resolved=resolved, scale=0.2)
    assert torch.equal(out, clean)


@needs_kernel
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_threads_change_nothing_and_need_no_build(dtype):
    resolved = make_resolved(WINDOW, k_others=(1, 2))
    q, k, v = make_inputs(resolved, dtype=dtype)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(cpp.forward(q, k, v, key_mask=None, phases=(0, 0), resolved=resolved, scale=0.2))
    finally:
        torch.set_num_threads(threads)
    for out, lse in results[1:]:
        assert torch.equal(out, results[0][0])
        assert torch.equal(lse, results[0][1])


@needs_kernel
def test_an_error_inside_the_kernel_is_an_exception_outside(monkeypatch):
    resolved = make_resolved(WINDOW)
    rows = cpp.row_blocks(resolved.q_layout, 1024) * torch.tensor([1, 1, 100])
    monkeypatch.setattr(cpp, "row_blocks", lambda *_: rows)
    with pytest.raises(UnsupportedError, match="longer than BLOCK_M; choose lowering='boxes'"):
        cpp.forward(*make_inputs(resolved), key_mask=None, phases=(0, 0), resolved=resolved, scale=0.2)


@needs_kernel
def test_empty_tensors():
    resolved = make_resolved(WINDOW)
    q, k, v = make_inputs(resolved, batch=1)
    out, lse = cpp.forward(q[:0], k[:0], v[:0], key_mask=None, phases=(), resolved=resolved, scale=0.2)
    assert out.shape == (0, 2, resolved.q_layout.length, 64)
    assert lse.shape == (0, 2, resolved.q_layout.length)


@pytest.mark.parametrize(
    ("dtype", "d", "reason"),
    [
        (torch.float64, 64, "not float64"),
        (torch.float32, 24, "head_dim=24 is outside 32 to 256"),
        (torch.float32, 288, "head_dim=288 is outside"),
    ],
)
def test_refusals(dtype, d, reason):
    resolved = make_resolved(WINDOW)
    q, k, v = make_inputs(resolved, d=d, dtype=dtype)
    assert reason in cpp.why_not(dtype, d, d, resolved.plan)
    with pytest.raises(UnsupportedError, match=rf"lowering 'cpp'.*{reason}.*choose lowering='boxes'"):
        cpp.forward(q, k, v, key_mask=None, phases=(0, 0), resolved=resolved, scale=1.0)


def test_compute_never_falls_below_the_inputs(monkeypatch):
    """float32 and float16 in float32; bfloat16 in bfloat16 only where the processor multiplies it."""
    plan = make_resolved(WINDOW).plan
    monkeypatch.setattr(cpp_build, "unavailable", lambda compute="float32": None)
    assert [cpp.compute_of(dtype, plan) for dtype in ("float32", "float16", "bfloat16")] == [
        "float32",
        "float32",
        "bfloat16",
    ]
    monkeypatch.setattr(cpp_build, "unavailable", lambda compute="float32": None if compute == "float32" else "no")
    assert cpp.compute_of("bfloat16", plan) == "float32"
    assert cpp.why_not(torch.bfloat16, 64, 64, plan) is None
    assert cpp.compute_of("bfloat16", make_resolved(WINDOW, compute="bfloat16").plan) == "bfloat16"


@needs_kernel
def test_bfloat16_products_of_a_float32_model_are_a_choice():
    resolved = make_resolved(WINDOW, compute="bfloat16")
    check(resolved, make_inputs(resolved))


def test_other_devices_are_refused():
    assert "the site is on cuda" in cpp.why_not(torch.float32, 64, 64, make_resolved(WINDOW).plan, "cuda")
