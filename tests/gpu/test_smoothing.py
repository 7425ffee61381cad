"""What is done to the operands before FP8: means taken out of K and V, Q and K rotated. Kernels against the reference.

In Triton's interpreter, or on a GPU where there is one.
"""

from __future__ import annotations

import math

import pytest
import torch

from fpscompile import reference
from fpscompile.gpu import gradients, operands
from fpscompile.gpu.call import launching, spec_of
from fpscompile.gpu.gradients import GradientConfig
from fpscompile.gpu.tables import tables_of
from fpscompile.hadamard import rotate, rotated_dim
from fpscompile.kernel_spec import tile_slots
from fpscompile.key_mask import visible_keys
from fpscompile.lowerings import gather, triton
from fpscompile.plan import PhasePlan, Plan, ResolvedPlan, resolve
from fpscompile.quant import quantize_channels, quantize_tokens

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = 5e-3
LARGE = None if DEVICE == "cuda" else GradientConfig(128, 128, 4, 1, 128, 128, 4, 1)
"""The interpreter's time follows the number of operations, not their size."""

BOTH = {"smooth_v": True, "hadamard": True}
PHASES = (
    PhasePlan(window=(1, 2, 2), granularity="subtile"),
    PhasePlan(window=(2, 1, 3), granularity="head"),
    PhasePlan(density=1.0),
)


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a.double() - b.double()).norm() / b.double().norm().clamp(min=1e-30)).item()


def resolved_plan(grid, tile, before=0, after=0, phases=PHASES, **fields) -> ResolvedPlan:
    video = math.prod(grid)
    plan = Plan(tile=tile, phases=phases, lowering="triton", quant="fp8", **fields)
    return resolve(plan, grid, before + video + after, before + video + after, before, before)


def draw(resolved: ResolvedPlan, dtype=torch.float32, batch=1, heads=1, key_heads=1, dim=64, value_dim=64):
    """q, k, v as transposes of [B, L, H, D]; k and v have a common part, and q and k a channel larger than the rest."""

    def randn(heads: int, length: int, dim: int) -> torch.Tensor:
        return torch.randn(batch, length, heads, dim).transpose(1, 2)

    q_length, k_length = resolved.q_layout.length, resolved.k_layout.length
    q, k, v = randn(heads, q_length, dim), randn(key_heads, k_length, dim), randn(key_heads, k_length, value_dim)
    k, v = k + 1.5, v + 3 * torch.randn(value_dim)
    q[..., 1] *= 10
    k[..., 2] *= 10
    return tuple(x.to(dtype).to(DEVICE) for x in (q, k, v))


def hiding(resolved: ResolvedPlan, batch: int = 2, heads: int = 1) -> torch.Tensor:
    """A key mask that hides some keys, and all of the last batch element."""
    keep = torch.rand(batch, heads, 1, resolved.k_layout.length, device=DEVICE) < 0.7
    keep[-1] = False
    return keep


@pytest.mark.parametrize(
    ("dtype", "dim", "value_dim"),
    [
        (torch.bfloat16, 128, 128), (torch.bfloat16, 96, 96), (torch.bfloat16, 160, 64),
        (torch.float32, 72, 40), (torch.float16, 72, 40), (torch.bfloat16, 72, 40),
    ],
    ids=str,
)  # fmt: skip
def test_head_dims_and_dtypes(dtype, dim, value_dim):
    resolved = resolved_plan((2, 8, 9), (2, 8, 8), 0, 9, phases=PHASES[2:], **BOTH)
    q, k, v = draw(resolved, dtype, dim=dim, value_dim=value_dim)
    common = {"key_mask": None, "phases": (0,), "resolved": resolved, "scale": 0.03}
    expected, _ = gather.forward(q.float(), k.float(), v.float(), **common)
    out, _ = triton.forward(q, k, v, **common)
    assert out.dtype == dtype
    assert relative(out, expected) < TOLERANCE


@pytest.mark.parametrize("granularity", ["tile", "subtile", "head", "tensor"])
@pytest.mark.parametrize(
    ("tile", "dim", "masked"),
    [
        ((2, 8, 8), 72, True),
        ((2, 3, 3), 40, False),
        pytest.param((2, 8, 8), 72, False, marks=pytest.mark.slow),
        pytest.param((2, 3, 3), 40, True, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_packed_operands_are_the_references_bit_for_bit(granularity, tile, dim, masked):
    """Values and scales. The means are the kernel's own, whose sums have an order of their own."""
    grid = (3, 9, 7) if tile[0] * tile[1] * tile[2] > 18 else (3, 5, 5)
    resolved = resolved_plan(grid, tile, 0, 20, phases=(PhasePlan(density=1.0, granularity=granularity),), **BOTH)
    q, k, v = draw(resolved, torch.bfloat16, batch=2, heads=2, dim=dim, value_dim=48)
    mask = hiding(resolved) if masked else None
    spec, tables = spec_of(q, k, v, mask, resolved), tables_of(resolved, q.device)
    phase = torch.zeros(1, dtype=torch.int32, device=DEVICE)
    with launching(q.device):
        packed = operands.pack(q, k, v, mask, phase, spec, tables, (granularity,), 0.3)
    packed = operands.Packed(**{field: x if x is None else x.cpu() for field, x in vars(packed).items()})
    q, k, v = (x.cpu().float() for x in (q, k, v))
    valid = visible_keys(None if mask is None else mask.cpu(), 2, 1, 2)

    seen = torch.ones(2, 1, k.shape[2], dtype=torch.bool) if valid is None else valid
    for mean, x in ((packed.k_mean, k), (packed.v_mean, v)):
        want = (x * seen[..., None]).sum(2) / seen.sum(-1).clamp(min=1)[..., None]
        torch.testing.assert_close(mean[..., : x.shape[-1]], want, rtol=1e-5, atol=1e-6)
        assert not mean[..., x.shape[-1] :].any()
    torch.testing.assert_close(
        packed.lse_shift[..., tables.q_token.cpu() >= 0],
        0.3 * (q @ packed.k_mean[..., :dim, None])[..., tables.q_token[tables.q_token >= 0].long().cpu(), 0],
        rtol=1e-4, atol=1e-4,
    )  # fmt: skip

    expected_q = quantize_tokens(rotate(q), resolved.q_layout, granularity)
    rotated = rotate(k - packed.k_mean[..., None, :dim])
    expected_k = quantize_tokens(rotated, resolved.k_layout, granularity, valid)
    expected_v = quantize_channels(v - packed.v_mean[..., None, : v.shape[-1]], valid)
    slots = resolved.q_layout.slots(tile_slots(resolved.plan.tile, resolved.plan.block_n))
    held = (slots >= 0).flatten()

    def in_slots(x: torch.Tensor) -> torch.Tensor:
        return x[:, :, slots.clamp(min=0).flatten()]

    width = rotated_dim(dim)
    for ours, theirs in ((packed.q, expected_q), (packed.k, expected_k)):
        assert torch.equal(
            ours.view(torch.uint8)[..., :width], in_slots(theirs.values.view(torch.uint8)) * held[:, None]
        )
        assert not ours.view(torch.uint8)[..., width:].any()
    unpermuted = packed.v.view(torch.uint8).unflatten(-1, (-1, 4, 2, 2)).permute(0, 1, 2, 3, 5, 4, 6).flatten(3)
    want = in_slots(expected_v.values.view(torch.uint8)) * held[:, None]
    assert torch.equal(unpermuted.mT[..., : v.shape[-1]], want)
    assert torch.equal(packed.v_scale[..., : v.shape[-1]], expected_v.scales[:, :, 0])
    for ours, theirs, heads in ((packed.q_scale, expected_q, 2), (packed.k_scale, expected_k, 1)):
        rows = ours.repeat_interleave(tables.slots // ours.shape[-1], dim=-1).flatten(2)
        want = in_slots(theirs.token_scales().expand(2, heads, theirs.layout.length, 1))[..., 0]
        assert torch.equal(rows[..., held], want[..., held])


@pytest.mark.parametrize("lowering", [triton, gather], ids=["triton", "gather"])
@pytest.mark.parametrize("option", ["smooth_k", "smooth_v", "hadamard"])
def test_each_option_lowers_the_error_it_is_for(option, lowering):
    """A large mean of K or V, or channels that are large in Q and in K: half the error at most."""
    exact = resolve(Plan((2, 8, 8), PHASES[2:]), (2, 8, 16), 256, 256)
    q, k, v = (torch.randn(1, 256, 2, 64, device=DEVICE).transpose(1, 2) for _ in range(3))
    scale = 0.125
    if option == "smooth_k":
        k = k + 20 * torch.randn(64, device=DEVICE)
    elif option == "smooth_v":
        v = v + 30
    else:  # scores are then sums of four products, as wrong as their factors; rotated, they are sums of 64
        q[..., 3:7], k[..., 3:7], scale = 30 * q[..., 3:7], 30 * k[..., 3:7], 1 / 200
    want, _ = reference.attention(*(x.double().cpu() for x in (q, k, v)), resolved=exact, phase=[0], scale=scale)
    errors = {}
    for on in (False, True):
        fields = {"smooth_k": False, option: on}
        resolved = resolved_plan((2, 8, 16), (2, 8, 8), phases=PHASES[2:], **fields)
        out, _ = lowering.forward(q, k, v, key_mask=None, phases=(0,), resolved=resolved, scale=scale)
        errors[on] = (out.double().cpu() - want).norm().item()
    assert errors[True] < 0.5 * errors[False]


@pytest.mark.parametrize("dim", [32, 40])
def test_outputs_and_gradients_of_narrow_heads(dim):
    """Rotations narrower than what kernels hold, and wider than the head; ``test_covering_array.py`` has the others."""
    resolved = resolved_plan((2, 8, 9), (2, 8, 8), 4, 0, phases=PHASES[:2], **BOTH)
    q, k, v = draw(resolved, batch=2, heads=2, dim=dim, value_dim=32)
    grad = torch.randn(2, 2, resolved.q_layout.length, 32, device=DEVICE)
    mask = torch.rand(2, 1, 1, resolved.k_layout.length, device=DEVICE) < 0.7
    leaves = [x.cpu().requires_grad_() for x in (q, k, v)]
    out, _ = reference.attention(*leaves, resolved=resolved, phase=[0, 1], key_mask=mask.cpu(), scale=0.04)
    expected = torch.autograd.grad(out, leaves, grad.cpu())
    common = {"key_mask": mask, "phases": (0, 1), "resolved": resolved, "scale": 0.04}
    want, (out, lse) = out, triton.forward(q, k, v, **common)
    assert relative(out.cpu(), want.detach()) < TOLERANCE
    for got, want, x in zip(
        gradients.backward(grad, q, k, v, out, lse, config=LARGE, **common), expected, (q, k, v), strict=True
    ):
        assert got.shape == x.shape
        assert got.transpose(1, 2).is_contiguous()
        assert relative(got.cpu(), want) < TOLERANCE


@pytest.mark.parametrize("hadamard", [False, True])
def test_an_infinite_mean_stays_out_of_tiles_without_a_visible_key(hadamard):
    """One infinite key, and a tile whose keys are all hidden: queries that list only that tile still get zeros."""
    resolved = resolved_plan((4, 4, 4), (2, 4, 4), phases=(PhasePlan(window=(1, 1, 1)),), hadamard=hadamard)
    q, k, v = draw(resolved)
    k[0, 0, -1, 0] = math.inf
    mask = torch.arange(64, device=DEVICE)[None, None, None] >= 32
    call = {"key_mask": mask, "resolved": resolved, "scale": 0.1}
    out, lse = triton.forward(q, k, v, phases=(0,), **call)
    want, want_lse = reference.attention(q, k, v, phase=(0,), **call)
    assert torch.equal(want[:, :, :32], torch.zeros_like(want[:, :, :32]))
    assert torch.equal(out[:, :, :32], want[:, :, :32])
    assert torch.equal(lse[:, :, :32], want_lse[:, :, :32])
    assert want_lse[:, :, :32].eq(-math.inf).all()
    assert out[:, :, 32:].isnan().all()
    assert want[:, :, 32:].isnan().all()


@pytest.mark.parametrize("tile", [(2, 4, 4), (2, 8, 8)], ids=str)
@pytest.mark.parametrize("granularity", ["tile", "head"])
@pytest.mark.parametrize("place", [0, -1])
def test_no_number_takes_the_numbers_of_its_region_along(tile, granularity, place):
    """One NaN in Q and K, in a tile held whole or looked at twice: its region is NaN, the rest as without it."""
    resolved = resolved_plan(
        (2, 8, 16), tile, phases=(PhasePlan(density=1.0, granularity=granularity),), smooth_k=False
    )
    q, k, v = draw(resolved)
    spec, tables = spec_of(q, k, v, None, resolved), tables_of(resolved, q.device)
    phase = torch.zeros(1, dtype=torch.int32, device=DEVICE)

    def packed(q: torch.Tensor, k: torch.Tensor) -> tuple[torch.Tensor, ...]:
        with launching(q.device):
            found = operands.pack(q, k, v, None, phase, spec, tables, (granularity,), 0.3)
        return found.q.float().cpu(), found.k.float().cpu(), found.q_scale.cpu(), found.k_scale.cpu()

    want = packed(q, k)
    q, k = q.clone(), k.clone()
    q[..., -1, place] = k[..., -1, place] = math.nan
    got = packed(q, k)
    first = 0 if granularity == "head" else want[2].shape[2] - 1  # tile of the region
    for values, scale, want_values, want_scale in zip(got[:2], got[2:], want[:2], want[2:], strict=True):
        assert torch.equal(scale[:, :, :first], want_scale[:, :, :first])
        assert scale[:, :, first:].isnan().all()
        slots = first * tables.slots
        assert torch.equal(values[:, :, :slots], want_values[:, :, :slots])
        assert values[:, :, slots:].isnan().all()
