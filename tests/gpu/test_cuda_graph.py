"""A captured CUDA graph follows the denoising step: the phase is read on the device at every replay."""

from __future__ import annotations

import pytest
import torch

import fpscompile.ops  # noqa: F401  (registers torch.ops.fps)
from fpscompile.plan import PhasePlan, Plan

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="captures a CUDA graph")


@pytest.mark.parametrize("quant", ["fp8", "none"])
def test_a_replay_reads_the_phase_and_the_operands(quant):
    grid, length = (4, 9, 9), 324
    phases = (PhasePlan(density=1.0), PhasePlan(window=(1, 1, 1), granularity="head"))
    plan = Plan(tile=(2, 8, 8), phases=phases, quant=quant, lowering="triton").to_json()
    q, k, v = (torch.randn(1, length, 2, 64, device="cuda", dtype=torch.bfloat16).transpose(1, 2) for _ in range(3))
    phase = torch.zeros(1, dtype=torch.int32, device="cuda")

    def call() -> tuple[torch.Tensor, torch.Tensor]:
        span = [0, length]
        return torch.ops.fps.attention(q, k, v, None, phase, list(grid), None, span, span, None, plan)

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        call()  # kernels and tables are made outside the capture, as torch's own capture does
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, lse = call()
    seen = []
    for index in (0, 1, 0):
        phase.fill_(index)
        q.normal_()
        out.fill_(float("nan"))
        graph.replay()
        torch.cuda.synchronize()
        expected, expected_lse = call()
        assert torch.equal(out, expected)
        assert torch.equal(lse, expected_lse)
        seen.append(out.clone())
    assert not torch.equal(seen[0], seen[1])
