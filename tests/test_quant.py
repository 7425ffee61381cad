"""FP8 numerics against a table of all E4M3 values and loops over regions."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fpscompile.hadamard import rotate, rotated_dim, sign_bits, unrotate
from fpscompile.key_mask import visible_keys
from fpscompile.quant import (
    E4M3_MAX,
    SUBTILE,
    key_mean,
    quantize_attention,
    quantize_channels,
    quantize_tokens,
    round_e4m3,
    to_e4m3,
)
from fpscompile.schedule import GRANULARITIES
from fpscompile.tiling import TileLayout


def e4m3_table() -> list[float]:
    """All non-negative finite values in the order of their codes: 4 exponent bits (bias 7), 3 mantissa bits."""
    values = []
    for code in range(127):
        exponent, mantissa = code >> 3, code & 7
        values.append(mantissa / 8 * 2.0**-6 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7))
    return values


TABLE = e4m3_table()


def brute_e4m3(x: float) -> float:
    """Nearest table value; ties to the even code; saturating."""
    code = min(range(127), key=lambda c: (abs(abs(x) - TABLE[c]), c % 2))
    return TABLE[code] if x >= 0 else -TABLE[code]


def test_table_is_the_format() -> None:
    assert max(TABLE) == E4M3_MAX
    codes = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn)
    assert codes.float().tolist() == TABLE


def test_rounding_is_nearest_even_and_saturates() -> None:
    ties = [(a + b) / 2 for a, b in itertools.pairwise(TABLE)]
    below, above = [t * (1 - 1e-6) for t in ties], [t * (1 + 1e-6) for t in ties]
    inputs = TABLE + ties + below + above + [449.0, 463.9, 464.0, 480.0, 1e30, float("inf")]
    inputs += [-x for x in inputs]
    expected = [brute_e4m3(min(max(x, -448.0), 448.0)) for x in inputs]
    for dtype in (torch.float32, torch.float64):
        assert to_e4m3(torch.tensor(inputs, dtype=dtype)).to(dtype).tolist() == expected
        assert round_e4m3(torch.tensor(inputs, dtype=dtype)).tolist() == expected
    nan = torch.tensor([float("nan")])
    assert to_e4m3(nan).float().isnan().all()
    assert round_e4m3(nan).isnan().all()


def test_rounding_in_arithmetic_equals_the_cast() -> None:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(1 << 16, generator=generator) * torch.randint(-14, 10, (1 << 16,), generator=generator).exp2()
    assert torch.equal(round_e4m3(x), to_e4m3(x).float())


def region_of(layout: TileLayout, granularity: str) -> list[list[int]]:
    """Tokens of each region inside one head."""
    tiles = layout.order().split(layout.sizes().tolist())
    if granularity in ("tensor", "head"):
        return [list(range(layout.length))]
    if granularity == "tile":
        return [tile.tolist() for tile in tiles]
    return [run.tolist() for tile in tiles for run in tile.split(SUBTILE)]


@settings(max_examples=24, deadline=None)
@given(
    st.sampled_from(GRANULARITIES),
    st.sampled_from([(2, 4, 5), (1, 3, 3), (4, 4, 4), (3, 5, 6)]),
    st.sampled_from([(1, 2, 2), (4, 4, 4), (3, 3, 5)]),
    st.integers(0, 7),
    st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
    st.booleans(),
    st.integers(0, 2**16),
)
def test_tokens_match_loops_over_regions(granularity, grid, tile, before, dtype, masked, seed) -> None:
    generator = torch.Generator().manual_seed(seed)
    layout = TileLayout(grid, tile, before, 3)
    x = torch.randn(2, 3, layout.length, 4, generator=generator, dtype=torch.float64).exp().to(dtype)
    valid = torch.rand(2, 3, layout.length, generator=generator) < 0.7 if masked else None
    quantized = quantize_tokens(x, layout, granularity, valid)
    work = torch.float64 if dtype == torch.float64 else torch.float32
    assert quantized.values.dtype == torch.float8_e4m3fn
    assert quantized.scales.dtype == work

    seen = x.to(work) if valid is None else x.to(work) * valid[..., None]
    expected, scales = torch.empty_like(seen), torch.empty(2, 3, layout.length, 1, dtype=work)
    for b in range(2):
        for heads in [[0, 1, 2]] if granularity == "tensor" else [[0], [1], [2]]:
            for tokens in region_of(layout, granularity):
                index = (b, torch.tensor(heads)[:, None], torch.tensor(tokens))
                amax = seen[index].abs().max()
                scale = amax / 448 if amax > 0 else torch.ones((), dtype=work)
                expected[index] = (seen[index] / scale).clamp(-448, 448).to(torch.float8_e4m3fn).to(work)
                scales[index] = scale
    assert torch.equal(quantized.values.to(work), expected)
    assert torch.equal(quantized.token_scales().expand_as(scales), scales)
    assert torch.equal(quantized.dequantize(), expected * scales)


@pytest.mark.parametrize(
    ("granularity", "shape"),
    [("tensor", (2, 1, 1, 1)), ("head", (2, 3, 1, 1)), ("tile", (2, 3, 5, 1)), ("subtile", (2, 3, 5, 2))],
)
def test_scale_shapes(granularity: str, shape: tuple[int, ...]) -> None:
    layout = TileLayout((4, 4, 9), (4, 2, 5), 7)  # one tile of 7 tokens, then 2 x 2 of 40 and 32
    quantized = quantize_tokens(torch.randn(2, 3, layout.length, 8), layout, granularity)
    assert quantized.scales.shape == shape
    if granularity == "subtile":
        assert quantized.scales[:, :, 0, 1].eq(1).all()  # no such run in the short tile


def test_finer_granularity_is_more_accurate() -> None:
    generator = torch.Generator().manual_seed(0)
    layout = TileLayout((4, 8, 8), (4, 4, 4))
    level = torch.linspace(-9, 9, layout.length).exp()[:, None]  # spans E4M3's whole range
    x = torch.randn(1, 2, layout.length, 16, generator=generator) * level
    errors = []
    for granularity in GRANULARITIES:
        hat = quantize_tokens(x, layout, granularity).dequantize()
        errors.append(((hat - x) / level).norm().item())
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.5 * errors[0]


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_results_do_not_depend_on_the_batch(granularity: str) -> None:
    layout = TileLayout((2, 4, 4), (2, 2, 2))
    x = torch.randn(2, 2, layout.length, 8) * torch.tensor([1.0, 100.0]).view(2, 1, 1, 1)
    together, alone = quantize_tokens(x, layout, granularity), quantize_tokens(x[:1], layout, granularity)
    assert torch.equal(together.values[:1].view(torch.uint8), alone.values.view(torch.uint8))
    assert torch.equal(together.scales[:1], alone.scales)


def test_zero_and_subnormal_regions_have_scale_one() -> None:
    layout = TileLayout((1, 1, 4), (1, 1, 2))
    x = torch.zeros(1, 1, 4, 2)
    x[0, 0, 2, 0] = 1e-44
    quantized = quantize_tokens(x, layout, "tile")
    assert quantized.scales.flatten().tolist() == [1.0, 1.0]
    assert not quantized.dequantize().any()


def test_nan_comes_through() -> None:
    layout = TileLayout((1, 1, 4), (1, 1, 2))
    x = torch.ones(1, 1, 4, 2)
    x[0, 0, 1, 0] = float("nan")
    hat = quantize_tokens(x, layout, "tile").dequantize()[0, 0]
    assert hat[1, 0].isnan()
    assert torch.equal(hat[2:], torch.ones(2, 2))


def test_channels() -> None:
    v = torch.randn(2, 3, 20, 5).exp()
    valid = torch.rand(2, 3, 20) < 0.6
    quantized = quantize_channels(v, valid)
    for b, h, d in itertools.product(range(2), range(3), range(5)):
        seen = v[b, h, :, d] * valid[b, h]
        scale = seen.max() / 448
        assert quantized.scales[b, h, 0, d] == scale
        expected = (seen / scale).clamp(max=448).to(torch.float8_e4m3fn).float() * scale
        assert torch.equal(quantized.dequantize()[b, h, :, d], expected)


@pytest.mark.parametrize("mask_heads", [1, 4])
def test_hidden_keys_are_absent_whatever_they_hold(mask_heads: int) -> None:
    generator = torch.Generator().manual_seed(5)
    layout = TileLayout((2, 3, 4), (2, 2, 2), 0, 6)
    q, k, v = (torch.randn(2, h, layout.length, 8, generator=generator) for h in (4, 2, 2))
    mask = torch.rand(2, mask_heads, 1, layout.length, generator=generator) < 0.6
    mask[1, :, :, -6:] = False
    shown = mask.expand(2, 4, 1, -1)[:, :, 0].unflatten(1, (2, 2)).any(2)
    assert torch.equal(visible_keys(mask, 2, 2, 4), shown)
    bias = torch.zeros(mask.shape).masked_fill(~mask, float("-inf"))
    assert torch.equal(visible_keys(bias, 2, 2, 4), shown)

    def run(k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor):
        return quantize_attention(q, k, v, layout, layout, "tensor", key_mask=mask)

    clean = run(k, v, mask)
    garbage = torch.where(shown[..., None], 0.0, float("nan"))
    for other in (run(k + garbage, v + garbage, mask), run(k + garbage, v, bias)):
        assert torch.equal(other.k.values.view(torch.uint8), clean.k.values.view(torch.uint8))
        assert torch.equal(other.k.scales, clean.k.scales)
        assert torch.equal(other.v.scales, clean.v.scales)
        assert torch.equal(other.k_mean, clean.k_mean)
    assert not clean.k.dequantize()[~shown].any()
    b, h = 1, 0
    expected = k[b, h][shown[b, h]].mean(0)
    torch.testing.assert_close(clean.k_mean[b, h, 0], expected, rtol=1e-5, atol=1e-6)


def test_mean_of_a_head_without_keys_is_zero() -> None:
    k = torch.randn(1, 2, 5, 3)
    valid = torch.tensor([[[False] * 5, [True] * 5]])
    mean = key_mean(k, valid)
    assert not mean[0, 0].any()
    torch.testing.assert_close(mean[0, 1, 0], k[0, 1].mean(0))


def test_smoothing_removes_a_common_offset_and_reports_it() -> None:
    generator = torch.Generator().manual_seed(6)
    layout = TileLayout((2, 4, 4), (2, 2, 2))
    q, k, v = (torch.randn(1, 2, layout.length, 8, generator=generator, dtype=torch.float64) for _ in range(3))
    offset = 50 * torch.randn(8, generator=generator, dtype=torch.float64)
    smooth = quantize_attention(q, k + offset, v, layout, layout, "tile")
    rough = quantize_attention(q, k + offset, v, layout, layout, "tile", smooth_k=False)
    assert rough.k_mean is None
    assert rough.lse_shift(q, 0.5) is None
    truth = q @ (k + offset).mT
    centred = smooth.q.dequantize() @ smooth.k.dequantize().mT
    restored = centred + smooth.lse_shift(q, 1.0)[..., None]
    assert (restored - truth).norm() < 0.1 * (rough.q.dequantize() @ rough.k.dequantize().mT - truth).norm()


def test_values_without_their_mean_have_smaller_steps() -> None:
    generator = torch.Generator().manual_seed(7)
    layout = TileLayout((2, 4, 4), (2, 2, 2), 0, 5)
    q, k, v = (torch.randn(2, 2, layout.length, 8, generator=generator, dtype=torch.float64) for _ in range(3))
    v = v + 60 * torch.randn(8, generator=generator, dtype=torch.float64)
    mask = torch.ones(2, 1, 1, layout.length, dtype=torch.bool)
    mask[..., -5:] = False
    mask[1] = False
    v[:, :, -5:] = float("nan")  # hidden: enters no mean
    smooth = quantize_attention(q, k, v, layout, layout, "tile", smooth_v=True, key_mask=mask)
    rough = quantize_attention(q, k, v, layout, layout, "tile", key_mask=mask)
    assert rough.v_mean is None
    torch.testing.assert_close(smooth.v_mean[0], v[0, :, :-5].mean(1, keepdim=True))
    assert not smooth.v_mean[1].any()  # no key is visible
    restored = smooth.v.dequantize() + smooth.v_mean
    seen = (slice(0, 1), slice(None), slice(0, -5))
    assert (restored - v)[seen].norm() < 0.1 * (rough.v.dequantize() - v)[seen].norm()
    assert not smooth.v.dequantize()[:, :, -5:].any()


@pytest.mark.parametrize("dim", [1, 8, 12, 72])
def test_rotation(dim: int) -> None:
    """The definition, its inverse, and what it is for: all products stay, one large feature becomes many small ones."""
    width = rotated_dim(dim)
    assert width // 2 < dim <= width
    h = torch.ones(1, 1, dtype=torch.float64)
    while len(h) < width:
        h = torch.cat([torch.cat([h, h], 1), torch.cat([h, -h], 1)])
    x, y = torch.randn(2, 3, 5, dim, dtype=torch.float64)
    index = [(i & ((1 << sign_bits(width)) - 1)) & (i >> sign_bits(width)) for i in range(width)]
    signs = torch.tensor([(-1.0) ** i.bit_count() for i in index], dtype=torch.float64)
    expected = torch.nn.functional.pad(x, (0, width - dim)) * signs @ h / width**0.5
    torch.testing.assert_close(rotate(x), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(unrotate(rotate(x), dim), x, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(rotate(x) @ rotate(y).mT, x @ y.mT, rtol=1e-12, atol=1e-12)
    one = rotate(torch.eye(dim, dtype=torch.float64)).abs()
    torch.testing.assert_close(one, torch.full_like(one, width**-0.5))
    assert rotate(torch.ones(width)).abs().max() < 1.5


def test_rotated_operands() -> None:
    """K's mean goes first, the rotation next, scales last; the log-sum-exp's shift belongs to the exact queries."""
    layout = TileLayout((2, 4, 4), (2, 2, 2))
    q, k, v = (torch.randn(1, 2, layout.length, 12) + 1 for _ in range(3))
    turned = quantize_attention(q, k, v, layout, layout, "tile", hadamard=True)
    plain = quantize_attention(q, k, v, layout, layout, "tile")
    expected = quantize_tokens(rotate(k - plain.k_mean), layout, "tile")
    assert torch.equal(turned.k.values.float(), expected.values.float())
    assert torch.equal(turned.k.scales, expected.scales)
    assert torch.equal(turned.q.values.float(), quantize_tokens(rotate(q), layout, "tile").values.float())
    assert torch.equal(turned.lse_shift(q, 0.5), plain.lse_shift(q, 0.5))
    assert torch.equal(turned.v.values.float(), plain.v.values.float())


def test_bad_arguments() -> None:
    layout = TileLayout((1, 2, 2), (1, 2, 2))
    with pytest.raises(ValueError, match="granularity 'token' is unknown"):
        quantize_tokens(torch.randn(1, 1, 4, 2), layout, "token")
    with pytest.raises(ValueError, match="x has 5 tokens and its layout 4"):
        quantize_tokens(torch.randn(1, 1, 5, 2), layout, "tile")
