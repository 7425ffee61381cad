"""The generated C++ kernel in 8 bits: integers within their tolerance, FP8 byte for byte."""

from __future__ import annotations

import pytest
import torch
from cpp_cases import FULL, WINDOW, check, make_inputs, make_mask, make_resolved, need, needs_kernel
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fpscompile import quant_int8, reference
from fpscompile.errors import OptionError
from fpscompile.lowerings import cpp, gather
from fpscompile.plan import PhasePlan, Plan, resolve
from fpscompile.settings import Settings

sizes = st.integers(1, 9)
others = st.tuples(st.sampled_from([0, 1, 40]), st.sampled_from([0, 33]))


@needs_kernel
@pytest.mark.parametrize("quant", ["fp8", "int8"])
@settings(max_examples=25)
@given(
    grid=st.tuples(sizes, sizes, sizes),
    window=st.tuples(*[st.integers(1, 3)] * 3),
    q_others=others,
    k_others=others,
    heads=st.sampled_from([(1, 1), (2, 1), (4, 2)]),
    phases=st.sampled_from([(0,), (1, 0)]),
    mask=st.sampled_from([None, "bool", "float"]),
    mask_shape=st.tuples(st.booleans(), st.booleans()),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
@example((8, 8, 8), (2, 2, 1), (1, 0), (40, 33), (4, 2), (0, 1), "float", (True, True), torch.float32)
def test_any_small_shape(quant, grid, window, q_others, k_others, heads, phases, mask, mask_shape, dtype):
    """Ragged grids, text at either end, grouped queries, mixed phases, every kind of mask, every dtype."""
    resolved = make_resolved(window, FULL, grid=grid, q_others=q_others, k_others=k_others, quant=quant)
    batch = len(phases)
    tensors = make_inputs(resolved, batch=batch, heads=heads[0], key_heads=heads[1], dtype=dtype)
    key_mask = None
    if mask is not None:
        lk = resolved.k_layout.length
        key_mask = make_mask(mask, batch if mask_shape[0] else 1, heads[0] if mask_shape[1] else 1, lk, dtype)
    check(resolved, tensors, phases=phases, key_mask=key_mask)


@needs_kernel
@pytest.mark.parametrize("quant", ["fp8", "int8"])
@pytest.mark.parametrize(("d", "d_v"), [(72, 88), (128, 128), (33, 47)])
def test_head_dims(quant, d, d_v):
    resolved = make_resolved(WINDOW, FULL, q_others=(3, 5), k_others=(3, 5), quant=quant)
    check(resolved, make_inputs(resolved, d=d, d_v=d_v), phases=(0, 1), scale=-0.2)


@needs_kernel
@pytest.mark.parametrize("granularity", ["tensor", "head", "tile", "subtile"])
@pytest.mark.parametrize(("tile", "block_n"), [((2, 4, 4), 128), ((4, 8, 8), 128), ((2, 4, 4), 32), ((3, 5, 7), 64)])
def test_fp8_rounds_p_where_the_contract_says(granularity, tile, block_n):
    """Tiles smaller and larger than a block of P, ragged ones too: a block that ends elsewhere rounds differently."""
    plan = Plan(
        tile, (PhasePlan(window=(2, 2, 2), granularity=granularity),), quant="fp8", lowering="cpp", block_n=block_n
    )
    resolved = resolve(plan, (5, 13, 18), 5 * 13 * 18 + 37, 5 * 13 * 18 + 37, 0, 0)
    q, k, v = make_inputs(resolved, batch=1)
    q, k = q * 3, k * 3  # scores far apart: the running maximum moves from block to block
    out, lse = check(resolved, [q, k, v])
    other, other_lse = gather.forward(q, k, v, key_mask=None, phases=(0,), resolved=resolved, scale=0.2)
    assert float((out - other).norm() / other.norm()) <= 5e-3
    torch.testing.assert_close(lse, other_lse, atol=1e-4, rtol=1e-5)


@needs_kernel
@pytest.mark.parametrize("p_scale", [256.0, 448.0])
def test_fp8_scales_p(p_scale):
    resolved = make_resolved(WINDOW, quant="fp8", p_scale=p_scale, smooth_k=False)
    check(resolved, make_inputs(resolved))


@needs_kernel
@pytest.mark.parametrize(
    "fields", [{"smooth_v": True}, {"hadamard": True}, {"smooth_k": False, "smooth_v": True, "hadamard": True}], ids=str
)
@pytest.mark.parametrize(("d", "d_v"), [(72, 88), (64, 64)])
def test_fp8_of_smoothed_values_and_rotated_keys(fields, d, d_v):
    """A rotated head of 72 features has 128; rows that see no key get no mean."""
    resolved = make_resolved(WINDOW, FULL, q_others=(3, 5), k_others=(3, 5), quant="fp8", **fields)
    q, k, v = make_inputs(resolved, batch=3, heads=2, key_heads=1, d=d, d_v=d_v, dtype=torch.bfloat16)
    keep = make_mask("bool", 3, 1, resolved.k_layout.length)
    keep[2] = False
    out, _ = check(resolved, [q, k + 2, v + 5], phases=(0, 1, 0), key_mask=keep)
    assert not out[2].any()


@needs_kernel
def test_int8_keeps_the_weight_of_far_blocks():
    """One key with a very large score must not round all others of its row to nothing."""
    resolved = make_resolved(FULL, grid=(8, 16, 16), tile=(4, 8, 8), quant="int8")
    q, k, v = make_inputs(resolved, batch=1, heads=1)
    q = q.abs()
    k[:, :, 0] = 4.0  # aligned with every query: exp of about 6 more than the rest
    check(resolved, [q, k, v + 1.0], scale=0.05)


@needs_kernel
@pytest.mark.parametrize(("quant", "compute"), [("none", "bfloat16"), ("int8", "int8")])
def test_rounding_weights_adds_no_gain(quant, compute):
    """Where no weight is near zero, rounding errors of P are as often up as down and cancel over many outputs. What
    remains would be a wrong factor, which a tolerance on single outputs hides."""
    need(compute)
    resolved = make_resolved(FULL, grid=(8, 16, 16), tile=(4, 8, 8), quant=quant)
    q, k, v = (x.bfloat16() for x in make_inputs(resolved, batch=1, heads=4, key_heads=4))
    out, _ = cpp.forward(q, k, v, key_mask=None, phases=(0,), resolved=resolved, scale=0.05)
    wide = (x.double() for x in (q, k, v))
    exact, _ = reference.attention(*wide, resolved=resolved, phase=(0,), scale=0.05)
    mean = v.double().mean(2, keepdim=True)  # added to the output of int8, and so without a gain
    gain = ((out - mean) * (exact - mean)).sum() / (exact - mean).square().sum()
    assert abs(float(gain) - 1) <= 5e-4


@needs_kernel
def test_int8_takes_the_means_out():
    """Means far larger than the spread of K and V cost no accuracy."""
    resolved = make_resolved(WINDOW, quant="int8")
    q, k, v = make_inputs(resolved)
    out, _ = check(resolved, [q, k + 20.0, v + 20.0])
    plain = make_resolved(WINDOW)
    expected, _ = reference.attention(*(x.double() for x in (q, k + 20.0, v)), resolved=plain, phase=(0, 0), scale=0.2)
    assert float((out - 20.0 - expected).norm() / expected.norm()) <= 5e-2


def test_int8_operands_are_steps_of_their_scales():
    resolved = make_resolved(WINDOW, k_others=(0, 9), quant="int8")
    q, k, v = make_inputs(resolved, batch=1, heads=1)
    hidden = torch.zeros(1, 1, 1, resolved.k_layout.length, dtype=torch.bool)
    hidden[..., -4:] = True
    k[:, :, -4:] = 1e4  # enters no scale and no mean
    rounded = quant_int8.quantize_attention(q, k, v, resolved.k_layout, key_mask=~hidden)
    steps = rounded.q / (q.abs().amax(-1, keepdim=True) / 127)
    torch.testing.assert_close(steps, steps.round(), atol=1e-3, rtol=0)
    assert int(steps.abs().max().round()) == 127
    first = resolved.k_layout.order()[: int(resolved.k_layout.sizes()[0])]
    mean = k[:, :, :-4].mean(2, keepdim=True)
    torch.testing.assert_close(rounded.k_mean, mean)
    tile = (k - mean)[:, :, first]
    steps = rounded.k[:, :, first] / (tile.abs().max() / 127)
    torch.testing.assert_close(steps, steps.round(), atol=1e-3, rtol=0)
    assert float((rounded.k[:, :, first] - tile).abs().max()) <= float(tile.abs().max()) / 127 * 0.51
    assert not rounded.k[:, :, -4:].any()


@needs_kernel
@pytest.mark.parametrize("quant", ["fp8", "int8"])
def test_rows_without_a_visible_key(quant):
    resolved = make_resolved((1, 1, 1), quant=quant)
    keep = torch.ones(2, 1, 1, resolved.k_layout.length, dtype=torch.bool)
    keep[0] = False
    out, lse = check(resolved, make_inputs(resolved), key_mask=keep)
    assert not out[0].any()
    assert (lse[0] == -torch.inf).all()


@needs_kernel
@pytest.mark.parametrize("quant", ["fp8", "int8"])
@pytest.mark.parametrize("where", ["q", "k", "v"])
def test_nan_is_not_lost(quant, where):
    """Scales and means are shared, so a NaN spreads over their region; it must come out wherever it counts."""
    if quant == "int8":
        need("int8")
    resolved = make_resolved(WINDOW, quant=quant)
    tensors = dict(zip("qkv", make_inputs(resolved), strict=True))
    tensors[where][1, 0, 17, 3] = torch.nan
    out, _ = cpp.forward(*tensors.values(), key_mask=None, phases=(0, 0), resolved=resolved, scale=0.3)
    exact, _ = reference.attention(*tensors.values(), resolved=make_resolved(WINDOW), phase=(0, 0), scale=0.3)
    assert exact.isnan().any()
    assert out.isnan()[exact.isnan()].all()
    assert out[0].isfinite().all()


@needs_kernel
def test_int8_threads_change_nothing():
    need("int8")
    resolved = make_resolved(WINDOW, k_others=(1, 2), quant="int8")
    q, k, v = make_inputs(resolved)
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            results.append(cpp.forward(q, k, v, key_mask=None, phases=(0, 0), resolved=resolved, scale=0.2))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])


def test_int8_and_a_compute_dtype_exclude_each_other():
    with pytest.raises(OptionError, match="exclude each other"):
        Settings.from_options({"quant": "int8", "compute": "bfloat16"})
