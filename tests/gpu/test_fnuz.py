"""The variant for AMD's gfx942, whose E4M3 has a largest value of 240 and no negative zero: in Triton's interpreter.

The oracle is written out here: :mod:`fpscompile.reference` knows the other E4M3.
"""

from __future__ import annotations

import math

import pytest
import torch

from fpscompile.gpu import call, gradients, operands
from fpscompile.gpu.call import launching, spec_of
from fpscompile.gpu.tables import tables_of
from fpscompile.lowerings import triton
from fpscompile.plan import PhasePlan, Plan, resolve

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="about a GPU that is not here: it is interpreted")

FNUZ, LARGEST = torch.float8_e4m3fnuz, 240.0
P_SCALE = 128.0
"""The largest power of two below the type's largest value."""

TILE, GRID, SCALE = (2, 8, 8), (3, 8, 7), 0.2
PLAN = Plan(tile=TILE, phases=(PhasePlan(density=1.0),), lowering="triton", quant="fp8", smooth_k=False)


@pytest.fixture(autouse=True)
def _gfx942(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(call, "target_of", lambda device: "hip:gfx942")


def rounded(x: torch.Tensor, dims: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    """(FNUZ values, scales) with one scale over ``dims``."""
    scale = x.abs().amax(dims, keepdim=True) / LARGEST
    return (x / scale).to(FNUZ), scale


def drawn():
    """The resolved plan, dO, q, k, v [1, 1, L, D], and the tokens of both tiles."""
    resolved = resolve(PLAN, GRID, 168, 168)
    tensors = [torch.randn(1, 168, 1, 64).transpose(1, 2) for _ in range(4)]
    return resolved, *tensors, resolved.q_layout.order().split(resolved.q_layout.sizes().tolist())


def test_operands_are_rounded_to_its_type_bit_for_bit():
    resolved, _, q, k, v, tiles = drawn()
    spec, tables = spec_of(q, k, v, None, resolved), tables_of(resolved, q.device)
    with launching(q.device):
        packed = operands.pack(q, k, v, None, torch.zeros(1, dtype=torch.int32), spec, tables, ("tile",), SCALE)
    assert {x.dtype for x in (packed.q, packed.k, packed.v)} == {FNUZ}
    for x, values, scales in ((q, packed.q, packed.q_scale), (k, packed.k, packed.k_scale)):
        for number, tokens in enumerate(tiles):
            want, scale = rounded(x[0, 0, tokens], (0, 1))
            first = number * tables.slots
            assert torch.equal(values[0, 0, first : first + len(tokens)].view(torch.uint8), want.view(torch.uint8))
            assert scales[0, 0, number] == scale
    want, scale = rounded(v, (2,))
    assert torch.equal(packed.v_scale[0, 0], scale[0, 0, 0])
    unpermuted = packed.v.view(torch.uint8).unflatten(-1, (-1, 4, 2, 2)).permute(0, 1, 2, 3, 5, 4, 6).flatten(3)
    held = tables.k_token >= 0
    assert torch.equal(unpermuted.mT[0, 0, held], want.view(torch.uint8)[0, 0, tables.k_token[held].long()])


def test_output_and_gradients():
    """To 5e-3: P may round the other way at ties, and products of the backward take bfloat16."""
    resolved, grad, q, k, v, tiles = drawn()
    exact = {}
    for name, x in (("q", q), ("k", k)):
        exact[name] = torch.empty(168, 64, dtype=torch.float64)
        for tokens in tiles:
            values, scale = rounded(x[0, 0, tokens], (0, 1))
            exact[name][tokens] = values.double() * scale.double()
    values, scale = rounded(v[0, 0], (0,))
    exact["v"] = values.double() * scale.double()
    scores = SCALE * exact["q"] @ exact["k"].T
    weights = torch.zeros(168, 168, dtype=torch.float64)
    running, total = torch.full((168, 1), -torch.inf, dtype=torch.float64), 0.0
    for tokens in tiles:  # a tile is a rounding block here
        largest = scores[:, tokens].amax(1, keepdim=True) / math.log(2.0)
        largest = torch.maximum(running, largest.ceil() * math.log(2.0))
        p = torch.exp(scores[:, tokens] - largest)
        weights *= torch.exp(running - largest)
        weights[:, tokens] = (p * P_SCALE).float().to(FNUZ).double() / P_SCALE
        total = total * torch.exp(running - largest) + p.sum(1, keepdim=True)
        running = largest
    weights /= total

    common = {"key_mask": None, "phases": (0,), "resolved": resolved, "scale": SCALE}
    out, lse = triton.forward(q, k, v, **common)
    grads = gradients.backward(grad, q, k, v, out, lse, **common)
    p, d_out = torch.softmax(scores, 1), grad[0, 0].double()
    d_p = d_out @ exact["v"].T
    d_s = p * (d_p - (p * d_p).sum(1, keepdim=True))
    wants = (weights @ exact["v"], SCALE * d_s @ exact["k"], SCALE * d_s.T @ exact["q"], weights.T @ d_out)
    for got, want in zip((out, *grads), wants, strict=True):
        assert (got[0, 0].double() - want).norm() < 5e-3 * want.norm()
    torch.testing.assert_close(lse[0, 0].double(), torch.logsumexp(scores, 1), rtol=1e-5, atol=1e-5)
