"""``remainder="means"`` beside the generated Triton kernels: its own kernel in half precision, torch's else."""

from __future__ import annotations

import math

import pytest
import torch

from fpscompile import lowerings
from fpscompile.plan import PhasePlan, Plan, resolve
from fpscompile.reference import attention
from fpscompile.windows import Heads, pattern_of

pytest.importorskip("triton")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
GRID = (5, 9, 10) if DEVICE == "cuda" else (2, 5, 6)
TILE = (2, 4, 8)
NEEDS_GPU = pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
NEEDS_FP8 = pytest.mark.skipif(
    DEVICE == "cuda" and torch.cuda.get_device_capability() < (8, 9), reason="needs FP8 tensor cores"
)


def call_of(quant, dtype, text=3, heads=(4, 2), dim=64, phases=((1, 1, 1), (9, 9, 9)), **fields):
    torch.manual_seed(0)
    length = math.prod(GRID) + text
    parts = tuple(PhasePlan(window=w) for w in phases)
    plan = Plan(TILE, parts, quant=quant, lowering="triton", remainder="means", **fields)
    resolved = resolve(plan, GRID, length, length, 0, 0, heads=heads[0])
    q, k, v = (torch.randn(len(phases), length, h, dim, device=DEVICE).to(dtype) for h in (heads[0], *heads[1:] * 2))
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    phase = torch.arange(len(phases), dtype=torch.int32, device=DEVICE)
    return q, k + 1, v, {"phases": phase, "resolved": resolved, "scale": dim**-0.5}


def off(x, y):
    return float((x.double() - y.double()).norm() / y.double().norm())


MASKS = {"none": None, "keys": (2, 1), "keys of a head": (1, 4)}


@pytest.mark.parametrize("masked", MASKS)
@pytest.mark.parametrize(("quant", "dtype"), [
    ("none", torch.bfloat16), ("none", torch.float32), pytest.param("fp8", torch.bfloat16, marks=NEEDS_FP8),
])  # fmt: skip
def test_forward_and_gradients(quant, dtype, masked):
    q, k, v, call = call_of(quant, dtype)
    mask = None
    if MASKS[masked] is not None:
        mask = torch.rand(*MASKS[masked], 1, k.shape[2], device=DEVICE) > 0.3
        layout = call["resolved"].k_layout
        mask[..., layout.order()[: layout.sizes()[0]].to(DEVICE)] = False  # a whole tile
    lowering = lowerings.get("triton")
    out, lse = lowerings.forward(lowering, q, k, v, key_mask=mask, **call)
    assert out.transpose(1, 2).is_contiguous()
    common = {"resolved": call["resolved"], "phase": (0, 1), "key_mask": mask, "scale": call["scale"]}
    leaves = [x.detach().float().requires_grad_() for x in (q, k, v)]
    want, want_lse = attention(*leaves, **common)
    assert off(out, want) < 1.5e-2
    torch.testing.assert_close(lse, want_lse, rtol=1e-2, atol=1e-2)
    grad = torch.randn_like(out)
    grads = lowerings.backward(lowering, grad, q, k, v, out, lse, key_mask=mask, **call)
    for got, one in zip(grads, torch.autograd.grad(want, leaves, grad.float()), strict=True):
        assert off(got, one) < 4e-2


@NEEDS_FP8
@pytest.mark.parametrize("smooth", [{"smooth_k": False}, {"smooth_v": True}, {"smooth_v": True, "hadamard": True}])
def test_fp8_gradients_under_smoothing(smooth):
    """The kernel's keys and values are without their means, those of the tiles are not."""
    q, k, v, call = call_of("fp8", torch.bfloat16, heads=(2, 1), phases=((1, 1, 1),), **smooth)
    v = v + 2
    out, lse = lowerings.forward(lowerings.get("triton"), q, k, v, key_mask=None, **call)
    leaves = [x.detach().float().requires_grad_() for x in (q, k, v)]
    want, _ = attention(*leaves, resolved=call["resolved"], phase=(0,), key_mask=None, scale=call["scale"])
    grad = torch.randn_like(out)
    grads = lowerings.backward(lowerings.get("triton"), grad, q, k, v, out, lse, key_mask=None, **call)
    for got, one in zip(grads, torch.autograd.grad(want, leaves, grad.float()), strict=True):
        assert off(got, one) < 1.5e-2


@pytest.mark.parametrize("dim", [40, 128])
@pytest.mark.parametrize("window", ["heads", (1, 2, 2)])
def test_head_dims_and_windows_by_head(dim, window):
    window = Heads({"1": pattern_of((9, 9, 9))}, pattern_of((1, 1, 1))) if window == "heads" else window
    q, k, v, call = call_of("none", torch.float16, text=0, dim=dim, phases=(window,))
    out, lse = lowerings.forward(lowerings.get("triton"), q, k, v, key_mask=None, **call)
    common = {"resolved": call["resolved"], "phase": (0,), "scale": call["scale"]}
    want, want_lse = attention(q.float(), k.float(), v.float(), **common)
    assert off(out, want) < 5e-3
    torch.testing.assert_close(lse, want_lse, rtol=5e-3, atol=5e-3)


@NEEDS_GPU
def test_in_a_cuda_graph():
    q, k, v, call = call_of("none", torch.bfloat16)
    lowering = lowerings.get("triton")
    expected = lowerings.forward(lowering, q, k, v, key_mask=None, **call)[0]
    flipped = lowerings.forward(lowering, q, k, v, key_mask=None, **call | {"phases": 1 - call["phases"]})[0].clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = lowerings.forward(lowering, q, k, v, key_mask=None, **call)[0]
    graph.replay()
    torch.testing.assert_close(out, expected)
    call["phases"].copy_(1 - call["phases"])
    graph.replay()
    torch.testing.assert_close(out, flipped)
