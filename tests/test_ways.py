"""Every way people compile and run a model: sites stay rewritten, phases right, results eager's.

What libraries do to a model besides is in test_ways_libraries.py.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterable, Iterator
from typing import Any

import diffusers
import pytest
import torch
from models.oracle import WindowedAttention, window_mask
from models.zoo import output, randn, wan, wan_inputs
from torch import nn

import fpscompile
from fpscompile import Backend, Settings
from fpscompile.lowerings import boxes

TILE = (2, 2, 4)
DENSE = {"quant": "none", "density": 1.0, "tile": TILE, "inner": "eager", "lowering": "boxes"}
SCHEDULE = [
    {"start": 0.0, "end": 0.2, "window": (2, 3, 3)},
    {"start": 0.2, "end": 0.8, "window": (1, 2, 2)},
    {"start": 0.8, "end": 1.0, "window": (1, 1, 1)},
]
STEPS = DENSE | {"density": None, "schedule": SCHEDULE}


@pytest.fixture
def phases(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[int, ...]]]:
    """Phases that reach the kernels, one entry per attention call."""
    seen: list[tuple[int, ...]] = []
    forward = boxes.forward

    def recording(*args: Any, phases: tuple[int, ...], **kwargs: Any) -> Any:
        seen.append(phases)
        return forward(*args, phases=phases, **kwargs)

    monkeypatch.setattr(boxes, "forward", recording)
    return seen


def relative(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual - expected).norm() / expected.norm())


def rewritten(fps: Backend) -> list[int]:
    """Rewritten sites of each graph that has any."""
    counts = [sum(site.rewritten for site in graph.sites) for graph in fps.graphs]
    return [count for count in counts if count]


def backend(**options: Any) -> Backend:
    return Backend(Settings.from_options(DENSE | options))


HOW = ["whole", "module.compile", "blocks"]
BOTH = [pytest.param("whole", marks=pytest.mark.slow), "blocks"]


def fast_and_slow(fast: list[Any], everything: Iterable[Any]) -> list[Any]:
    """All combinations, those not among the fast ones marked slow."""
    return [each if each in fast else pytest.param(*each, marks=pytest.mark.slow) for each in everything]


def compile_model(model: nn.Module, how: str, fps: Any, **options: Any) -> Any:
    if how == "whole":
        return torch.compile(model, backend=fps, fullgraph=True, **options)
    if how == "module.compile":
        model.compile(backend=fps, fullgraph=True, **options)
    else:
        model.compile_repeated_blocks(backend=fps, fullgraph=True, **options)
    return model


@pytest.mark.parametrize(
    ("how", "dynamic"),
    fast_and_slow([("whole", None), ("blocks", True)], itertools.product(HOW, [None, True, False])),
)
def test_whole_model_module_and_blocks(how: str, dynamic: bool | None) -> None:
    """Two resolutions of equal token count, then one of another, each as eager with the mask."""
    layers = 2 if how == "blocks" else 1
    model, eager = wan(layers=layers), wan(layers=layers)
    fps = backend(density=None, window=(1, 2, 2))
    compiled = compile_model(model, how, fps, dynamic=dynamic)
    with torch.no_grad(), fpscompile.attach(compiled):
        for grid in [(3, 6, 10), (3, 10, 6), (2, 5, 7)]:
            length = grid[0] * grid[1] * grid[2]
            with WindowedAttention(window_mask(grid, TILE, (1, 2, 2), length, 0)) as mode:
                expected = output(eager, **wan_inputs(grid))
            assert mode.calls == layers
            assert relative(output(compiled, **wan_inputs(grid)), expected) <= 1e-4
    assert set(rewritten(fps)) == {1}


@pytest.mark.parametrize(
    ("how", "context"),
    fast_and_slow(
        [("module.compile", torch.enable_grad), ("blocks", torch.inference_mode)],
        itertools.product(HOW, [torch.no_grad, torch.inference_mode, torch.enable_grad]),
    ),
)
def test_grad_modes(how: str, context: Any) -> None:
    model, fps = wan(layers=1), backend(inner="aot_eager")
    with context():
        expected = output(model, **wan_inputs())
        compiled = compile_model(model, how, fps)
        with fpscompile.attach(compiled):
            actual = output(compiled, **wan_inputs())
    assert rewritten(fps) == [1]
    assert relative(actual, expected) <= 1e-5
    assert actual.requires_grad == expected.requires_grad


@pytest.mark.parametrize("how", BOTH)
def test_autocast(how: str) -> None:
    model, fps = wan(layers=1), backend()
    compiled = compile_model(wan(layers=1), how, fps)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16), fpscompile.attach(compiled):
        assert relative(output(compiled, **wan_inputs()).float(), output(model, **wan_inputs()).float()) <= 2e-2
    assert rewritten(fps) == [1]


@pytest.mark.parametrize("how", BOTH)
def test_guidance_in_one_batch_and_in_two_calls(how: str, phases: list[tuple[int, ...]]) -> None:
    model = wan(layers=1)
    compiled = compile_model(wan(layers=1), how, "fps", options=STEPS)
    single = wan_inputs(step=500)
    double = {
        key: torch.cat([value] * 2) if isinstance(value, torch.Tensor) else value for key, value in single.items()
    }
    with torch.no_grad(), fpscompile.attach(compiled) as attachment:
        attachment.step(5, 10)
        both = output(compiled, **double)
        one, other = output(compiled, **single), output(compiled, **single)
        with WindowedAttention(window_mask((3, 6, 10), TILE, (1, 2, 2), 180, 0)):
            expected = output(model, **single)
    for actual in (both[:1], both[1:], one, other):
        assert relative(actual, expected) <= 1e-4
    assert phases[0] in [(1, 1), (1,)]
    assert phases[1:] == [(1,), (1,)]


class Pipe:
    """Wan 2.2: one transformer for the noisy steps, another for the rest."""

    def __init__(self) -> None:
        self.transformer, self.transformer_2 = wan(layers=1), wan(layers=1)
        self.scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
        self.components = dict(vars(self))

    def __call__(self, steps: int) -> torch.Tensor:
        self.scheduler.set_timesteps(steps)
        latents, text = randn(1, 4, 3, 12, 20), randn(1, 7, 16, seed=2)
        for timestep in self.scheduler.timesteps:
            model = self.transformer if timestep >= 875 else self.transformer_2
            guess = output(
                model,
                hidden_states=latents,
                timestep=timestep.expand(1),
                encoder_hidden_states=text,
                return_dict=False,
            )
            latents = self.scheduler.step(guess, timestep, latents, return_dict=False)[0]
        return latents


@pytest.mark.parametrize("how", [pytest.param("module.compile", marks=pytest.mark.slow), "blocks"])
def test_two_transformers_share_one_schedule(how: str, phases: list[tuple[int, ...]]) -> None:
    pipe = Pipe()
    for model in (pipe.transformer, pipe.transformer_2):
        compile_model(model, how, "fps", options=STEPS)
    with torch.no_grad(), fpscompile.attach(pipe):
        assert pipe(10).isfinite().all()
    assert phases == [(0,)] * 2 + [(1,)] * 6 + [(2,)] * 2


@pytest.mark.parametrize("attached", [True, False])
def test_a_timestep_per_token(attached: bool, phases: list[tuple[int, ...]]) -> None:
    """Wan 2.2's image-to-video: the given frame has timestep 0, the rest the step's; noise rules the phase."""
    model = wan(layers=1)
    inputs = wan_inputs(batch=2, step=500)
    timestep = torch.full((2, 180), 500.0)
    timestep[:, :60] = 0
    inputs["timestep"] = timestep
    compiled = torch.compile(model, backend="fps", options=STEPS)
    with torch.no_grad(), fpscompile.attach(compiled) if attached else contextlib.nullcontext() as attachment:
        if attachment is not None:
            attachment.step(5, 10)
        assert output(compiled, **inputs).isfinite().all()
    assert {phase for (*each,) in phases for phase in each} <= {0, 1}
    assert not attached or phases in ([(1,)], [(1, 1)])
