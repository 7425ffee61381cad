"""A captured CUDA graph follows the denoising step: the phase is read on the device at every replay."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from models.zoo import wan, wan_inputs
from torch._dynamo.utils import counters

import fpscompile
import fpscompile.ops  # registers torch.ops.fps
from fpscompile.errors import UnsupportedError
from fpscompile.gpu.tables import CACHED
from fpscompile.plan import PhasePlan, Plan

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="captures a CUDA graph")


@pytest.mark.parametrize("remainder", ["none", "means"])
@pytest.mark.parametrize("quant", ["fp8", "none"])
def test_a_replay_reads_the_phase_and_the_operands(quant, remainder):
    grid, length = (4, 9, 9), 324
    phases = (PhasePlan(density=1.0), PhasePlan(window=(1, 1, 1), granularity="head"))
    plan = Plan(tile=(2, 8, 8), phases=phases, quant=quant, remainder=remainder, lowering="triton").to_json()
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


GRID = (3, 6, 10)
TWO_PHASES = fpscompile.Schedule(
    (fpscompile.Phase(0.0, 0.5, density=1.0), fpscompile.Phase(0.5, 1.0, window=(1, 1, 1)))
)
OPTIONS = {"tile": (2, 4, 4), "schedule": TWO_PHASES, "quant": "fp8", "lowering": "triton"}
GRAPHS = {"inner_options": {"triton.cudagraphs": True}}
"""Inductor captures CUDA graphs, as in the mode "reduce-overhead". Tests run with it first, each on a grid of its own,
so that attention's tables are made while Inductor warms up."""


def a_model() -> torch.nn.Module:
    return wan(layers=2, attention_head_dim=32).cuda()


def inputs_of(grid: tuple[int, int, int] = GRID, **values: Any) -> dict[str, Any]:
    given = wan_inputs(grid) | values
    return {name: x.cuda() if isinstance(x, torch.Tensor) else x for name, x in given.items()}


def steps(call: Callable[..., Any], *arguments: Any) -> list[torch.Tensor]:
    """Outputs of ``call`` for each of the arguments, three times in turn: warm-up, capture and replay."""
    seen = []
    for _ in range(3):
        for argument in arguments:
            torch.compiler.cudagraph_mark_step_begin()
            with torch.no_grad():
                seen.append(call(argument).clone())
    return seen


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


def timestep(value: float) -> torch.Tensor:
    return torch.full((1,), value, device="cuda")


def recorded() -> bool:
    """Whether Inductor has recorded a graph since the last reset."""
    return counters["inductor"]["cudagraph_recorded_non_static_inputs"] > 0


def reset() -> None:
    torch._dynamo.reset()
    counters.clear()


def assert_alike(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> None:
    for a, b in zip(ours, theirs, strict=True):
        assert relative(a, b) < 1e-3
    for a, b in zip(ours[:2], ours[2:4], strict=True):  # a replay and what was launched before
        assert torch.equal(a, b)
    assert relative(ours[0], ours[1]) > 1e-2


def test_graphs_of_inductor_follow_the_timestep():
    outputs = {}
    for graphs in (GRAPHS, {}):
        reset()
        compiled = torch.compile(a_model(), backend="fps", options=OPTIONS | graphs)
        given = [inputs_of((3, 6, 12), timestep=timestep(value)) for value in (900.0, 100.0)]
        outputs[bool(graphs)] = steps(lambda inputs, m=compiled: m(**inputs)[0], *given)
        assert recorded() == bool(graphs)
        assert counters["inductor"]["cudagraph_skips"] == 0
    assert_alike(outputs[True], outputs[False])


def test_graphs_of_inductor_follow_attach_step_by_step():
    """Blocks by themselves see no timestep: the phase is published."""
    outputs = {}
    for graphs in (GRAPHS, {}):
        reset()
        model = a_model()
        model.compile_repeated_blocks(backend="fps", fullgraph=True, options=OPTIONS | {"grid": (3, 8, 10)} | graphs)
        with fpscompile.attach(model) as attached:

            def call(index: int, model=model, attached=attached) -> torch.Tensor:
                attached.step(index, 4)
                return model(**inputs_of((3, 8, 10)))[0]

            outputs[bool(graphs)] = steps(call, 0, 3)
        assert recorded() == bool(graphs)
        assert counters["inductor"]["cudagraph_skips"] == 0
    assert_alike(outputs[True], outputs[False])


def test_no_graph_of_inductor_where_grids_of_as_many_tokens_differ(caplog):
    """A graph would go on with the grid of its capture."""
    outputs = {}
    for graphs in (GRAPHS, {}):
        reset()
        model = a_model()
        options = {"tile": (2, 4, 4), "window": (1, 1, 1), "quant": "fp8", "lowering": "triton"} | graphs
        model.compile_repeated_blocks(backend="fps", fullgraph=True, options=options)
        caplog.clear()
        with fpscompile.attach(model), caplog.at_level(logging.INFO, "fpscompile"):
            grids = ((3, 6, 10), (3, 10, 6))
            outputs[bool(graphs)] = steps(lambda grid, m=model: m(**inputs_of(grid))[0].flatten(), *grids)
        assert not recorded()
        assert ("Inductor makes no CUDA graph" in caplog.text) == bool(graphs)
    assert_alike(outputs[True], outputs[False])


def test_training_in_graphs_of_inductor():
    gradients = {}
    for graphs in (GRAPHS, {}):
        reset()
        model = a_model()
        compiled = torch.compile(model, backend="fps", options=OPTIONS | graphs)
        for _ in range(3):
            torch.compiler.cudagraph_mark_step_begin()
            model.zero_grad()
            compiled(**inputs_of((3, 4, 10)))[0].square().mean().backward()
        assert recorded() == bool(graphs)
        gradients[bool(graphs)] = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    for ours, theirs in zip(gradients[True], gradients[False], strict=True):
        assert relative(ours, theirs) < 1e-3


def test_tables_of_a_capture_are_never_dropped():
    """As many other grids as are kept come by; the graph goes on reading what it was captured with."""
    plan = Plan(tile=(2, 4, 4), phases=(PhasePlan(window=(1, 1, 1)),), quant="fp8", lowering="triton").to_json()
    phase = torch.zeros(1, dtype=torch.int32, device="cuda")

    def operands(*grid: int) -> list[torch.Tensor]:
        shape = (1, math.prod(grid), 2, 32)
        return [torch.randn(shape, device="cuda", dtype=torch.bfloat16).transpose(1, 2) for _ in range(3)]

    def call(given: list[torch.Tensor], *grid: int) -> torch.Tensor:
        span = [0, given[0].shape[2]]
        return torch.ops.fps.attention(*given, None, phase, list(grid), None, span, span, None, plan)[0]

    q, k, v = operands(2, 8, 9)
    expected = call([q, k, v], 2, 8, 9)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call([q, k, v], 2, 8, 9)
    for width in range(10, 12 + CACHED):
        call(operands(2, 4, width), 2, 4, width)
    overwritten = [torch.full((1 << 10,), 3, dtype=torch.int32, device="cuda") for _ in range(1000)]
    graph.replay()
    assert torch.equal(out, expected)
    assert len(overwritten) == 1000


def test_the_first_call_cannot_be_captured():
    plan = Plan(tile=(2, 4, 4), phases=(PhasePlan(window=(1, 1, 1)),), quant="fp8", lowering="triton").to_json()
    phase = torch.zeros(1, dtype=torch.int32, device="cuda")
    q = torch.randn(1, 2, 2 * 3 * 7, 32, device="cuda", dtype=torch.bfloat16)
    span = [0, q.shape[2]]
    torch.cuda.synchronize()
    with pytest.raises(UnsupportedError, match="run the model once"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        torch.ops.fps.attention(q, q, q, None, phase, [2, 3, 7], None, span, span, None, plan)


@pytest.mark.parametrize("blocks", [False, True])
def test_a_whole_step_in_one_graph(blocks):
    """What a caller captures: the timestep is an input of the graph where the whole model is compiled."""
    reset()
    model, given = a_model(), inputs_of()
    if blocks:
        model.compile_repeated_blocks(backend="fps", fullgraph=True, options=OPTIONS)
    compiled = model if blocks else torch.compile(model, backend="fps", options=OPTIONS)
    with fpscompile.attach(model), torch.no_grad():
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            compiled(**given)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = compiled(**given)[0]
        for value in (900.0, 100.0):
            given["timestep"].fill_(value)
            out.fill_(float("nan"))
            graph.replay()
            assert torch.equal(out, compiled(**given)[0])
