"""The Triton kernels against the gather lowering and the oracle, on a GPU or in Triton's interpreter.

The two compute the same sums in another order: without quantization float32 rounding is all that may differ. With it
a score that differs in its last bit may round P to the neighbouring E4M3 value.
"""

from __future__ import annotations

import math

import pytest
import torch

from fpscompile.gpu import operands
from fpscompile.gpu.call import launching, spec_of
from fpscompile.gpu.config import KernelConfig
from fpscompile.gpu.tables import tables_of
from fpscompile.kernel_spec import tile_slots
from fpscompile.lowerings import gather, triton
from fpscompile.masks import BlockMask
from fpscompile.plan import PhasePlan, Plan, ResolvedPlan, resolve
from fpscompile.quant import quantize_attention

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ON_GPU = pytest.mark.skipif(DEVICE != "cuda", reason="Gluon kernels have no interpreter")
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 8e-3, torch.float16: 1e-3}
TOLERANCE_FP8 = 5e-3 if DEVICE == "cpu" else 1.5e-2
"""Of every dtype. A bfloat16 output is itself rounded by 1.7e-3, and P may round the other way at ties: seen 1.7e-3 in
the interpreter. A GPU sums FP8 products in some 14 bits, so that more weights do: seen 9.6e-3."""

LARGE = None if DEVICE == "cuda" else KernelConfig(256, 8, 3)
"""The interpreter's time follows the number of operations, not their size."""

PHASES = (
    PhasePlan(window=(1, 2, 2), granularity="subtile"),
    PhasePlan(window=(2, 1, 3), granularity="head"),
    PhasePlan(window=(2, 3, 1)),
    PhasePlan(density=1.0, granularity="tensor"),
)


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a.double() - b.double()).norm() / b.double().norm().clamp(min=1e-30)).item()


def resolved_plan(grid, tile, before=0, after=0, phases=PHASES, **fields) -> ResolvedPlan:
    video = math.prod(grid)
    plan = Plan(tile=tile, phases=phases, lowering="triton", **fields)
    return resolve(plan, grid, before + video + after, before + video + after, before, before)


def draw(resolved: ResolvedPlan, dtype=torch.float32, batch=1, heads=2, key_heads=2, dim=64, value_dim=64):
    """q, k, v as transposes of [B, L, H, D]; k has a common part."""
    lengths = resolved.q_layout.length, resolved.k_layout.length

    def randn(heads: int, length: int, dim: int) -> torch.Tensor:
        return torch.randn(batch, length, heads, dim).to(dtype).transpose(1, 2)

    q, k, v = randn(heads, lengths[0], dim), randn(key_heads, lengths[1], dim), randn(key_heads, lengths[1], value_dim)
    return tuple(x.to(DEVICE) for x in (q, k + 1.5, v))


def check(resolved: ResolvedPlan, inputs, phases, *, key_mask=None, block_mask=None, scale=0.2, config=LARGE) -> None:
    q, k, v = inputs
    common = {"resolved": resolved, "scale": scale, "block_mask": block_mask}
    wide = [x.double() if resolved.plan.quant == "none" else x.float() for x in inputs]
    expected, expected_lse = gather.forward(*wide, key_mask=key_mask, phases=phases, **common)
    phase = torch.tensor(phases, dtype=torch.int32, device=q.device)
    out, lse = triton.forward(q, k, v, key_mask=key_mask, phases=phase, config=config, **common)
    assert out.dtype == q.dtype
    assert out.transpose(1, 2).is_contiguous()
    assert out.isfinite().all()
    tolerance = TOLERANCE[q.dtype] if resolved.plan.quant == "none" else TOLERANCE_FP8
    assert relative(out, expected) < tolerance
    empty = expected_lse == float("-inf")
    assert torch.equal(lse == float("-inf"), empty)
    assert not out[empty].any()
    # A mean of K that differs in its last bit may round a value of K8 to its neighbour.
    loose = 5e-2 if resolved.plan.quant == "fp8" else 2e-5 if q.dtype == torch.float32 else 2e-2
    torch.testing.assert_close(lse[~empty].double(), expected_lse[~empty].double(), rtol=1e-5, atol=loose)


@pytest.mark.parametrize(
    ("quant", "grid", "tile", "dim", "before", "after"),
    [
        ("none", (5, 9, 9), (4, 4, 4), 64, 0, 0),
        ("none", (3, 9, 17), (2, 8, 8), 96, 7, 0),
        ("none", (5, 12, 9), (4, 8, 8), 128, 0, 130),
        ("none", (7, 10, 9), (6, 8, 8), 64, 3, 5),
        ("none", (4, 6, 6), (2, 3, 3), 40, 5, 0),
        ("fp8", (4, 6, 6), (2, 3, 3), 40, 5, 0),
        *(
            pytest.param("fp8", *case, marks=ON_GPU)
            for case in (
                (
                    (7, 9, 12),
                    (7, 3, 6),
                    128,
                    0,
                    0,
                ),  # two slots of a unit are empty at most, and there is a mask for that
                ((7, 9, 12), (7, 9, 4), 64, 0, 252),
                ((6, 9, 9), (4, 4, 4), 128, 0, 9),  # float32 rows leave room for three stages of one program alone
            )
        ),
    ],
    ids=lambda value: "x".join(map(str, value)) if isinstance(value, tuple) else str(value),
)
def test_every_phase_on_ragged_grids_with_text(quant, grid, tile, dim, before, after):
    """With FP8 the covering array of ``test_covering_array.py`` does most of this."""
    resolved = resolved_plan(grid, tile, before, after, quant=quant)
    inputs = draw(resolved, batch=4, heads=1, key_heads=1, dim=dim, value_dim=dim)
    check(resolved, inputs, (0, 1, 2, 3), scale=dim**-0.5)


@pytest.mark.parametrize("quant", ["fp8", "none"])
def test_the_default_config(quant):
    """All other tests of the interpreter take the largest blocks there are."""
    resolved = resolved_plan((3, 9, 9), (2, 8, 8), 0, 9, phases=PHASES[1:2], quant=quant)
    check(resolved, draw(resolved, heads=1, key_heads=1), (0,), config=None)


@pytest.mark.parametrize("quant", ["fp8", "none"])
def test_keys_that_are_not_the_queries_tokens(quant):
    """Text among the keys only, before and after the video, and a text of another length among the queries."""
    plan = Plan(tile=(2, 8, 8), phases=PHASES[:2], lowering="triton", quant=quant)
    resolved = resolve(plan, (2, 9, 7), 126 + 4, 30 + 126 + 5, 4, 30)
    check(resolved, draw(resolved, batch=2, heads=2, key_heads=1), (0, 1))


def test_a_phase_out_of_range_is_the_nearest():
    """The device never reports an error to a kernel's caller; whoever computes phases clamps them too."""
    resolved = resolved_plan((2, 9, 7), (2, 8, 8), quant="fp8")
    q, k, v = draw(resolved, batch=2, heads=1, key_heads=1)
    outs = []
    for phases in ([-3, 9], [0, 3]):
        phase = torch.tensor(phases, dtype=torch.int32, device=DEVICE)
        common = {"key_mask": None, "phases": phase, "resolved": resolved, "scale": 0.1, "config": LARGE}
        outs.append(triton.forward(q, k, v, **common)[0])
    assert torch.equal(*outs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("quant", ["fp8", "none"])
@pytest.mark.parametrize(("dim", "value_dim"), [(32, 32), (96, 96), (128, 128), (72, 40)])
def test_head_dims_and_dtypes(dtype, quant, dim, value_dim):
    resolved = resolved_plan((3, 9, 9), (2, 8, 8), 0, 9, phases=PHASES[2:3], quant=quant)
    check(resolved, draw(resolved, dtype, heads=1, key_heads=1, dim=dim, value_dim=value_dim), (0,))


@pytest.mark.parametrize(
    ("quant", "tile", "kind"),
    [
        ("fp8", (2, 4, 4), "bool"), ("fp8", (2, 4, 4), "float"),
        ("none", (2, 8, 8), "bool"), ("none", (2, 4, 4), "float"), ("none", (2, 8, 8), "hidden"),
        *(pytest.param(quant, tile, kind, marks=pytest.mark.slow) for quant, tile, kind in (
            ("fp8", (2, 8, 8), "bool"), ("fp8", (2, 8, 8), "float"), ("fp8", (2, 8, 8), "hidden"),
            ("fp8", (2, 4, 4), "hidden"), ("none", (2, 4, 4), "bool"), ("none", (2, 8, 8), "float"),
            ("none", (2, 4, 4), "hidden"),
        )),
    ],
    ids=str,
)  # fmt: skip
def test_key_masks(quant, tile, kind):
    """Padded text, additive masks, heads of their own, and a batch element that sees no key at all."""
    resolved = resolved_plan((3, 9, 9), tile, 0, 40, quant=quant)
    inputs = draw(resolved, batch=2, heads=4, key_heads=2)
    length = resolved.k_layout.length
    keep = torch.rand(2, 1 if kind == "bool" else 4, 1, length, device=DEVICE) < 0.7
    keep[..., -30:] = False
    if kind == "hidden":
        keep[1] = False
    mask = keep
    if kind == "float":
        mask = torch.randn(keep.shape, device=DEVICE).masked_fill(~keep, float("-inf"))
    check(resolved, inputs, (0, 2), key_mask=mask)


def test_the_lowest_finite_mask_hides_no_key_that_stands_alone():
    """As in eager, a row whose keys are all at the lowest number of the dtype averages them."""
    resolved = resolved_plan((2, 8, 8), (2, 4, 4), quant="none")
    q, k, v = draw(resolved)
    mask = torch.full((1, 1, 1, k.shape[2]), torch.finfo(torch.float32).min, device=DEVICE)
    common = {"key_mask": mask, "resolved": resolved, "scale": 0.2, "block_mask": None}
    expected, _ = gather.forward(q.double(), k.double(), v.double(), phases=(0,), **common)
    phases = torch.zeros(1, dtype=torch.int32, device=DEVICE)
    out, _ = triton.forward(q, k, v, phases=phases, config=LARGE, **common)
    assert expected.norm() > 0
    assert relative(out, expected) < TOLERANCE[q.dtype]


@pytest.mark.parametrize("quant", ["fp8", "none"])
def test_masks_per_head_and_empty_lists(quant):
    resolved = resolved_plan((4, 8, 8), (2, 4, 4), 3, 0, quant=quant)
    tiles = resolved.q_layout.n_tiles
    visible = torch.rand(4, 4, tiles, tiles) < 0.4
    visible[:, 1] = False
    visible[:, :, 0] = False
    check(resolved, draw(resolved, batch=2, heads=4, key_heads=1), (1, 3), block_mask=BlockMask.from_dense(visible))


def test_tiles_whose_slots_are_no_power_of_two():
    """Three rounding blocks of 32 slots to a tile of 72 tokens, and 3 tiles of 96 slots in all."""
    resolved = resolved_plan((2, 6, 18), (2, 6, 6), phases=PHASES[2:3], quant="fp8", block_n=32)
    check(resolved, draw(resolved, dim=32, value_dim=32), (0,))


@pytest.mark.parametrize("scale", [-0.3, 0.0])
def test_a_scale_that_is_not_positive(scale):
    resolved = resolved_plan((2, 8, 8), (2, 8, 8), phases=PHASES[3:], quant="none")
    check(resolved, draw(resolved), (0,), scale=scale)


@pytest.mark.parametrize("granularity", ["tile", "subtile", "head", "tensor"])
@pytest.mark.parametrize("masked", [False, True])
def test_packed_operands_are_the_references_bit_for_bit(granularity, masked):
    """Values and scales; the mean of K is the kernel's own sum, whose order differs, so the reference is told it."""
    resolved = resolved_plan((3, 9, 7), (2, 8, 8), 0, 20, phases=(PhasePlan(density=1.0, granularity=granularity),),
                             quant="fp8", smooth_k=False)  # fmt: skip
    q, k, v = draw(resolved, torch.bfloat16, batch=2, key_heads=1, dim=72, value_dim=64)
    mask = torch.rand(2, 1, 1, k.shape[2], device=DEVICE) < 0.8 if masked else None
    expected = quantize_attention(
        *(x.cpu() for x in (q, k, v)), resolved.q_layout, resolved.k_layout, granularity, smooth_k=False,
        key_mask=None if mask is None else mask.cpu(),
    )  # fmt: skip
    spec = spec_of(q, k, v, mask, resolved)
    tables = tables_of(resolved, q.device)
    phase = torch.zeros(1, dtype=torch.int32, device=DEVICE)
    with launching(q.device):
        packed = operands.pack(q, k, v, mask, phase, spec, tables, (granularity,), 0.3)
    packed = operands.Packed(**{name: x if x is None else x.cpu() for name, x in vars(packed).items()})

    slots = resolved.q_layout.slots(tile_slots(resolved.plan.tile, resolved.plan.block_n))
    held = (slots >= 0).flatten()

    def in_slots(x: torch.Tensor) -> torch.Tensor:
        return x[:, :, slots.clamp(min=0).flatten()]

    for ours, theirs, dim in ((packed.q, expected.q, 72), (packed.k, expected.k, 72)):
        want = in_slots(theirs.values.view(torch.uint8)) * held[:, None]
        assert torch.equal(ours.view(torch.uint8)[..., :dim], want)
        assert not ours.view(torch.uint8)[..., dim:].any()
    unpermuted = packed.v.view(torch.uint8).unflatten(-1, (-1, 4, 2, 2)).permute(0, 1, 2, 3, 5, 4, 6).flatten(3)
    assert torch.equal(unpermuted.mT, in_slots(expected.v.values.view(torch.uint8)) * held[:, None])
    assert torch.equal(packed.v_scale, expected.v.scales[:, :, 0])
    for ours, theirs in ((packed.q_scale, expected.q), (packed.k_scale, expected.k)):
        rows = ours.repeat_interleave(tables.slots // ours.shape[-1], dim=-1).flatten(2)
        want = in_slots(theirs.token_scales().expand(2, ours.shape[1], theirs.layout.length, 1))[..., 0]
        assert torch.equal(rows[..., held], want[..., held])


def test_the_mean_of_the_keys():
    resolved = resolved_plan((3, 9, 9), (2, 8, 8), phases=PHASES[2:3], quant="fp8")
    q, k, v = draw(resolved)
    spec, tables = spec_of(q, k, v, None, resolved), tables_of(resolved, q.device)
    with launching(q.device):
        packed = operands.pack(
            q, k, v, None, torch.zeros(1, dtype=torch.int32, device=DEVICE), spec, tables, ("tile",), 0.3
        )
    torch.testing.assert_close(packed.k_mean, k.mean(2), rtol=1e-6, atol=1e-6)
    want = 0.3 * (q @ k.mean(2)[..., None])[..., 0]
    token = tables.q_token.long()
    torch.testing.assert_close(packed.lse_shift[..., token >= 0], want[..., token[token >= 0]], rtol=1e-5, atol=1e-5)
