"""Gradients of the Triton kernels against the gather lowering, in Triton's interpreter or on a GPU where there is one.

With FP8 both differentiate the same rounded operands and weights; the kernels' products then take bfloat16, which is
what the tolerance is for.
"""

from __future__ import annotations

import math

import pytest
import torch

from fpscompile.gpu import gradients
from fpscompile.gpu.binary import compile_kernel
from fpscompile.gpu.call import spec_for
from fpscompile.gpu.gradients import GradientConfig
from fpscompile.gpu.operands import Packed
from fpscompile.gpu.tables import tables_of
from fpscompile.lowerings import gather, triton
from fpscompile.masks import BlockMask
from fpscompile.plan import PhasePlan, Plan, ResolvedPlan, resolve

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 8e-3, torch.float16: 1e-3}
TOLERANCE_FP8 = 5e-3 if DEVICE == "cpu" else 1.5e-2
"""Products of bfloat16, 2.6e-3, and the rounding of bfloat16 gradients: seen 3.0e-3."""

LARGE = None if DEVICE == "cuda" else GradientConfig(128, 128, 4, 1, 128, 128, 4, 1)
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


def draw(resolved: ResolvedPlan, dtype=torch.float32, batch=1, heads=1, key_heads=1, dim=32, value_dim=32):
    """dO, q, k, v as transposes of [B, L, H, D]; k has a common part."""
    q_length, k_length = resolved.q_layout.length, resolved.k_layout.length

    def randn(heads: int, length: int, dim: int) -> torch.Tensor:
        return torch.randn(batch, length, heads, dim).to(dtype).transpose(1, 2).to(DEVICE)

    q, k = randn(heads, q_length, dim), randn(key_heads, k_length, dim)
    return randn(heads, q_length, value_dim), q, k + 1.5, randn(key_heads, k_length, value_dim)


def check(resolved, inputs, phases, *, key_mask=None, block_mask=None, scale=0.2, config=LARGE):
    """Returns what was checked: dq, dk, dv."""
    common = {"key_mask": key_mask, "resolved": resolved, "scale": scale, "block_mask": block_mask}
    fp8 = resolved.plan.quant == "fp8"
    grad_out, *wide = (x.float() if fp8 else x.double() for x in inputs)
    out, lse = gather.forward(*wide, phases=phases, **common)
    expected = gather.backward(grad_out, *wide, out, lse, phases=phases, **common)

    phase = torch.tensor(phases, dtype=torch.int32, device=DEVICE)
    out, lse = triton.forward(*inputs[1:], phases=phase, **common)
    if fp8:
        out = torch.full_like(out, torch.nan)  # is not read
    grads = gradients.backward(*inputs, out, lse, phases=phase, config=config, **common)
    for got, want, x in zip(grads, expected, inputs[1:], strict=True):
        assert got.dtype == x.dtype
        assert got.shape == x.shape
        assert got.transpose(1, 2).is_contiguous()
        assert got.isfinite().all()
        assert relative(got, want) < (TOLERANCE_FP8 if fp8 else TOLERANCE[x.dtype])
        assert not got[(want == 0).all(-1)].any()  # queries that see nothing, keys that nobody sees
    return grads


@pytest.mark.parametrize(
    ("quant", "grid", "tile", "dim", "before", "after", "heads"),
    [
        ("none", (5, 5, 6), (4, 4, 4), 64, 3, 5, 1), ("none", (3, 8, 9), (2, 8, 8), 96, 7, 0, 1),
        ("none", (3, 8, 9), (4, 8, 8), 128, 0, 130, 1), ("none", (7, 9, 5), (6, 8, 8), 64, 0, 0, 1),
        ("none", (3, 6, 3), (2, 3, 3), 32, 5, 0, 2), ("fp8", (3, 6, 3), (2, 3, 3), 32, 5, 0, 2),
    ],
    ids=lambda value: "x".join(map(str, value)) if isinstance(value, tuple) else str(value),
)  # fmt: skip
def test_every_phase_on_ragged_grids_with_text(quant, grid, tile, dim, before, after, heads):
    """With FP8 the covering array of ``test_covering_array.py`` does most of this."""
    resolved = resolved_plan(grid, tile, before, after, quant=quant)
    check(resolved, draw(resolved, batch=4, heads=heads, dim=dim, value_dim=dim), (0, 1, 2, 3), scale=dim**-0.5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("quant", ["fp8", "none"])
def test_head_dims_and_dtypes(dtype, quant):
    resolved = resolved_plan((2, 9, 8), (2, 8, 8), 0, 9, phases=PHASES[2:3], quant=quant)
    dim, value_dim = {torch.float32: (72, 40), torch.bfloat16: (128, 128), torch.float16: (40, 96)}[dtype]
    check(resolved, draw(resolved, dtype, dim=dim, value_dim=value_dim), (0,))


@pytest.mark.parametrize(
    ("quant", "tile", "kind"),
    [
        ("none", (2, 8, 8), "bool"), ("none", (2, 4, 4), "float"), ("none", (2, 8, 8), "hidden"),
        ("fp8", (2, 4, 4), "float"),
    ],
)  # fmt: skip
def test_key_masks(quant, tile, kind):
    """Padded text, additive masks, heads of their own, and a batch element that sees no key at all."""
    resolved = resolved_plan((2, 8, 9), tile, 0, 40, quant=quant)
    inputs = draw(resolved, batch=2, heads=2)
    keep = torch.rand(2, 1 if kind == "bool" else 2, 1, resolved.k_layout.length, device=DEVICE) < 0.7
    keep[..., -30:] = False
    if kind == "hidden":
        keep[1] = False
    mask = keep
    if kind == "float":
        mask = torch.randn(keep.shape, device=DEVICE).masked_fill(~keep, float("-inf"))
    grads = check(resolved, inputs, (0, 2), key_mask=mask)
    if kind == "hidden":
        assert not any(x[1].any() for x in grads)


@pytest.mark.parametrize("quant", ["fp8", "none"])
def test_masks_per_head_and_empty_lists(quant):
    resolved = resolved_plan((2, 8, 12), (2, 4, 4), 3, 0, quant=quant)
    tiles = resolved.q_layout.n_tiles
    visible = torch.rand(4, 4, tiles, tiles) < 0.4
    visible[:, 1] = False
    visible[:, :, 0] = False
    visible[:, :, :, 2] = False
    inputs = draw(resolved, batch=2, heads=4, key_heads=2)
    dq, dk, _ = check(resolved, inputs, (1, 3), block_mask=BlockMask.from_dense(visible))
    assert not dq[:, 1].any()
    assert not dq[:, :, resolved.q_layout.slots(32)[0, :3]].any()
    assert not dk[:, :, resolved.k_layout.slots(32)[2]].any()


@pytest.mark.parametrize("quant", ["fp8", "none"])
@pytest.mark.parametrize("scale", [-0.3, 0.0])
def test_a_scale_that_is_not_positive(scale, quant):
    resolved = resolved_plan((2, 8, 8), (2, 8, 8), phases=PHASES[3:], quant=quant)
    dq, dk, _ = check(resolved, draw(resolved), (0,), scale=scale)
    assert bool(dq.any()) == bool(dk.any()) == (scale != 0)


@pytest.mark.parametrize(
    "config",
    [
        GradientConfig(32, 32, 4, 1, 16, 64, 4, 1),
        GradientConfig(64, 32, 4, 1, 64, 16, 4, 1),
    ],
    ids=["many-queries", "few-queries"],
)
@pytest.mark.parametrize(("tile", "block_n"), [((2, 4, 8), 32), ((2, 2, 4), 64)], ids=["large-tiles", "small-tiles"])
@pytest.mark.parametrize("quant", ["fp8", "none"])
def test_blocks_of_every_size(quant, tile, block_n, config):
    """Steps and programs that are parts of a unit, whole units and several; P is rounded where the plan says."""
    resolved = resolved_plan((2, 5, 9), tile, 3, 0, phases=PHASES[:1], quant=quant, block_n=block_n)
    check(resolved, draw(resolved), (0,), config=config)


def test_heads_some_at_a_time_give_the_same_bits(monkeypatch):
    """Also: equal inputs give equal gradients, to the bit, and strides do not matter."""
    resolved = resolved_plan((2, 8, 9), (2, 8, 8), quant="fp8", phases=PHASES[1:3])
    grad_out, q, k, v = draw(resolved, torch.bfloat16, batch=2, heads=4, key_heads=2)
    whole = check(resolved, (grad_out, q, k, v), (0, 1))
    monkeypatch.setattr(gradients, "WORKSPACE_BYTES", 1)
    parts = check(resolved, [x.contiguous() for x in (grad_out, q, k, v)], (0, 1))
    assert all(map(torch.equal, whole, parts))


@pytest.mark.parametrize("quant", ["fp8", "none"])
def test_operands_in_place(quant):
    """Slices of one tensor, features that are not adjacent, and the gradient of a sum: all strides 0."""
    resolved = resolved_plan((2, 8, 9), (2, 8, 8), 0, 5, quant=quant, phases=PHASES[2:3])
    length = resolved.q_layout.length
    qkv = torch.randn(1, length, 3, 1, 32, device=DEVICE)
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    v = torch.randn(1, 1, 32, length, device=DEVICE).mT
    ones = torch.ones((), device=DEVICE).expand(1, 1, length, 32)
    check(resolved, (torch.randn(length, 32, 1, 1, device=DEVICE).permute(2, 3, 0, 1), q, k, v), (0,))
    # dO V^T is then the same for all queries, and what is left of dS is small against it.
    grads = check(resolved, (ones * torch.rand((), device=DEVICE), q, k, v), (0,))
    assert grads[0].any()


def test_no_keys_and_no_queries():
    resolved = resolved_plan((1, 1, 4), (1, 1, 4), phases=PHASES[3:])
    grad_out, q, k, v = draw(resolved)
    for queries, keys in ((4, 0), (0, 4)):
        out, lse = torch.zeros(1, 2, queries, 64), torch.zeros(1, 2, queries)
        inputs = (grad_out[:, :, :queries], q[:, :, :queries], k[:, :, :keys], v[:, :, :keys], out, lse)
        grads = gradients.backward(*inputs, key_mask=None, phases=(0,), resolved=resolved, scale=0.1)
        assert [x.shape[2] for x in grads] == [queries, keys, keys]
        assert not any(x.any() for x in grads)


@pytest.mark.parametrize("quant", ["fp8", "none"])
def test_autograd_through_the_op(quant):
    """``torch.ops.fps.attention`` with lowering "triton" against the same op with lowering "gather"."""
    resolved = resolved_plan((2, 8, 9), (2, 8, 8), 0, 6, quant=quant, phases=PHASES[:3])
    grad_out, *inputs = draw(resolved, batch=2, heads=2)
    mask = torch.rand(2, 1, 1, resolved.k_layout.length, device=DEVICE) < 0.8
    phase = torch.tensor([2, 0], dtype=torch.int32, device=DEVICE)
    grads = {}
    for lowering in ("triton", "gather"):
        plan = Plan(tile=(2, 8, 8), phases=PHASES[:3], lowering=lowering, quant=quant)
        leaves = [x.detach().requires_grad_() for x in inputs]
        out, _ = torch.ops.fps.attention(
            *leaves, mask, phase, [2, 8, 9], None, [0, 144], [0, 144], None, plan.to_json()
        )
        grads[lowering] = torch.autograd.grad(out, leaves, grad_out)
    for got, want in zip(grads["triton"], grads["gather"], strict=True):
        assert relative(got, want) < (TOLERANCE_FP8 if quant == "fp8" else 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize(("target", "quant", "share"), [
    ("cuda:90", "fp8", False), ("cuda:90", "fp8", True), ("cuda:90", "none", False), ("cuda:80", "none", False),
])  # fmt: skip
def test_default_configs_compile_without_spills(target, quant, share, dim):
    """For GPUs that need not be here: registers suffice, and no matrix product waits for another."""
    plan = Plan(tile=(4, 8, 8), phases=PHASES[2:3], lowering="triton", quant=quant)
    resolved = resolve(plan, (8, 16, 16), 2048, 2048)
    spec = spec_for(target, "bfloat16", dim, dim, plan, False, 1)
    tables = tables_of(resolved, torch.device("cpu"))

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    x = empty(1, 2048, 2, dim, dtype=torch.bfloat16)
    packed = None
    if quant == "fp8":
        q8, v8 = (empty(1, 2, *shape, dtype=torch.float8_e4m3fn) for shape in ((2048, dim), (dim, 2048)))
        scales = empty(1, 2, 8, 1)
        packed = Packed(q8, q8, v8, scales, scales, empty(1, 2, dim), empty(1, 2, 2048), None)
    heads_first = x.transpose(1, 2)
    launches = gradients.launches(
        *(heads_first,) * 5, empty(1, 2, 2048), x, x, x, packed, None, torch.zeros(1, dtype=torch.int32),
        tables, spec, gradients.default_config(spec), 0.1, torch.zeros(1, 2, 2048) if share else None,
    )  # fmt: skip
    for launch in launches:
        report = compile_kernel(launch.kernel, launch.args, launch.options, target=target)
        assert report.spill_bytes == 0, report.kernel
