"""Steps and grids that change between calls: read by the scheduler, published by an attachment, never recompiled."""

from __future__ import annotations

import functools
import threading
from collections.abc import Iterator
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from models.oracle import WindowedAttention, window_mask
from models.zoo import ZOO, output, randn, wan, wan_inputs
from torch import nn
from torch.utils.checkpoint import checkpoint

import fpscompile
from fpscompile import Backend, Settings
from fpscompile.errors import ConcurrentCallError, GridError, OptionError
from fpscompile.lowerings import boxes

SCHEDULE = [
    {"start": 0.0, "end": 0.2, "density": 1.0},
    {"start": 0.2, "end": 0.8, "window": (1, 2, 2)},
    {"start": 0.8, "end": 1.0, "window": (1, 1, 1)},
]
OPTIONS = {"schedule": SCHEDULE, "tile": (2, 2, 4), "inner": "eager", "lowering": "boxes"}


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


def expected_phases(steps: int) -> list[int]:
    return [0 if 5 * i < steps else 1 if 5 * i < 4 * steps else 2 for i in range(steps)]


def schedulers() -> dict[str, tuple[Any, dict[str, float]]]:
    """Real schedulers, each with the timestep options that describe it."""
    return {
        "flow-euler": (diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0), {"shift": 3.0}),
        "unipc": (
            diffusers.UniPCMultistepScheduler(
                prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0, num_train_timesteps=1000
            ),
            {"shift": 3.0},
        ),
        "ddim": (diffusers.DDIMScheduler(timestep_spacing="trailing"), {}),
    }


def denoise(model: Any, scheduler: Any, latents: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
    """A pipeline's loop, with classifier-free guidance as two calls."""
    for timestep in scheduler.timesteps:
        inputs = {"hidden_states": latents, "timestep": timestep.expand(1), "return_dict": False}
        guided = output(model, encoder_hidden_states=text, **inputs)
        plain = output(model, encoder_hidden_states=torch.zeros_like(text), **inputs)
        latents = scheduler.step(plain + 2 * (guided - plain), timestep, latents, return_dict=False)[0]
    return latents


@pytest.mark.parametrize("attached", [True, False])
@pytest.mark.parametrize("name", ["flow-euler", "unipc", "ddim"])
def test_fifty_steps_cross_all_phases_without_recompiling(
    name: str, attached: bool, phases: list[tuple[int, ...]]
) -> None:
    scheduler, timestep = schedulers()[name]
    scheduler.set_timesteps(50)
    model = torch.compile(wan(layers=1), backend="fps", options=OPTIONS | {"timestep": timestep}, fullgraph=True)
    latents, text = randn(1, 4, 3, 12, 20), randn(1, 7, 16, seed=2)
    attachment = fpscompile.attach(model, scheduler=scheduler) if attached else None
    with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=True):
        result = denoise(model, scheduler, latents, text)
    if attachment is not None:
        attachment.detach()
    assert result.isfinite().all()
    seen = [phase for (phase,) in phases[::2]]
    assert phases[::2] == phases[1::2]
    if attached or name != "unipc":
        assert seen == expected_phases(50)
    else:  # UniPC rounds its timesteps to integers: a step may fall on the other side of a boundary
        assert sum(a != b for a, b in zip(seen, expected_phases(50), strict=True)) <= 1
    assert set(seen) == {0, 1, 2}


def test_no_host_sync_in_the_graph() -> None:
    graphs: list[torch.fx.GraphModule] = []

    def inner(gm: torch.fx.GraphModule, inputs: Any) -> Any:
        from functorch.compile import make_boxed_func
        from torch._dynamo.backends.common import aot_autograd

        def keep(graph: torch.fx.GraphModule, _: Any) -> Any:
            graphs.append(graph)
            return make_boxed_func(graph.forward)

        return aot_autograd(fw_compiler=keep)(gm, inputs)

    with torch.no_grad():
        output(torch.compile(wan(layers=1), backend="fps", options=OPTIONS | {"inner": inner}), **wan_inputs())
    targets = [str(node.target) for graph in graphs for node in graph.graph.nodes]
    assert any("fps.attention" in target for target in targets)
    assert not any("item" in target.split(".")[-2:] or "_local_scalar_dense" in target for target in targets)


def test_phase_changes_the_result_and_the_right_mask_is_used() -> None:
    model = wan()
    compiled = torch.compile(model, backend="fps", options=OPTIONS, fullgraph=True)
    with torch.no_grad(), fpscompile.attach(compiled) as attachment:
        for step, window in ((0, (2, 3, 3)), (5, (1, 2, 2)), (9, (1, 1, 1))):
            attachment.step(step, 10)
            mask = window_mask((3, 6, 10), (2, 2, 4), window, 180, 0)
            with WindowedAttention(mask):
                expected = output(model, **wan_inputs())
            torch.testing.assert_close(output(compiled, **wan_inputs()), expected, rtol=1e-4, atol=1e-4)


def test_manual_step_beats_the_timestep_input(phases: list[tuple[int, ...]]) -> None:
    compiled = torch.compile(wan(layers=1), backend="fps", options=OPTIONS)
    attachment = fpscompile.attach(compiled)
    with torch.no_grad():
        attachment.step(9, 10)
        output(compiled, **wan_inputs(step=1000))
        attachment.detach()
        output(compiled, **wan_inputs(step=1000))
    assert phases == [(2,), (0,)]
    with pytest.raises(OptionError, match=r"step\(10, 10\)"):
        attachment.step(10, 10)


@pytest.mark.parametrize("index", [3, np.int64(3), np.array(3), torch.tensor(3), torch.tensor([3])])
def test_a_step_may_be_any_integer(index: Any) -> None:
    with fpscompile.attach(torch.nn.Identity()) as attachment:
        attachment.step(index, 10)
        assert attachment.progress() == 0.3


@pytest.mark.parametrize("index", [0.5, True, np.bool_(True), torch.tensor(True), torch.tensor(0.5), "3", None])
def test_a_step_that_is_no_integer_is_refused(index: Any) -> None:
    with fpscompile.attach(torch.nn.Identity()) as attachment, pytest.raises(OptionError, match="must be an integer"):
        attachment.step(index, 10)


def test_timesteps_per_sample(phases: list[tuple[int, ...]]) -> None:
    compiled = torch.compile(wan(layers=1), backend="fps", options=OPTIONS)
    inputs = wan_inputs(batch=3)
    inputs["timestep"] = torch.tensor([1000, 500, 10])
    with torch.no_grad():
        output(compiled, **inputs)
    assert phases == [(0, 1, 2)]


def test_unknown_progress_is_the_densest_phase_and_a_record(phases: list[tuple[int, ...]]) -> None:
    fps = Backend(Settings.from_options(OPTIONS | {"timestep": {"input": "sigma"}}))
    with torch.no_grad():
        output(torch.compile(wan(layers=1), backend=fps), **wan_inputs(step=10))
    assert phases == [(0,)]
    assert [note.code for note in fps.graphs[0].notes] == ["progress-unknown"]


@pytest.mark.parametrize("order", ["attach first", "compile first"])
@pytest.mark.parametrize("how", ["torch.compile", "module.compile"])
def test_attach_before_or_after_compiling(how: str, order: str, phases: list[tuple[int, ...]]) -> None:
    model: Any = wan(layers=1)
    attachment = fpscompile.attach(model) if order == "attach first" else None
    if how == "torch.compile":
        compiled = torch.compile(model, backend="fps", options=OPTIONS, fullgraph=True)
    else:
        model.compile(backend="fps", options=OPTIONS, fullgraph=True)
        compiled = model
    attachment = attachment or fpscompile.attach(compiled)
    with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=True):
        for step in (0, 5, 9):
            attachment.step(step, 10)
            output(compiled, **wan_inputs(step=1000))
    attachment.detach()
    with torch.no_grad():
        output(compiled, **wan_inputs(step=1000))
    assert phases == [(0,), (1,), (2,), (0,)]


def test_blocks_compiled_alone_landscape_then_portrait() -> None:
    """Equal token counts, one compiled block: the grid must be read at run time."""
    entry = ZOO["wan"]
    model, eager = entry.build(), entry.build()
    grids = [(3, 6, 10), (3, 10, 6), (5, 6, 6)]
    with torch.no_grad(), fpscompile.attach(model):
        model.compile_repeated_blocks(
            backend="fps", fullgraph=True, options={"window": (1, 2, 2), "tile": (2, 2, 4), "inner": "eager"}
        )
        for grid in grids:
            with WindowedAttention(window_mask(grid, (2, 2, 4), (1, 2, 2), 180, 0)) as mode:
                expected = output(eager, **entry.inputs(grid))
            assert mode.calls == 2
            actual = output(model, **entry.inputs(grid))
            assert float((actual - expected).norm() / expected.norm()) <= 1e-4


def test_whole_model_landscape_then_portrait() -> None:
    entry = ZOO["cogvideox-2b"]
    model = entry.build()
    options = {"window": (1, 2, 2), "tile": (2, 2, 4), "inner": "eager"}
    compiled = torch.compile(model, backend="fps", dynamic=True, options=options)
    with torch.no_grad(), fpscompile.attach(compiled):
        for grid in [(3, 6, 10), (3, 10, 6)]:
            with WindowedAttention(window_mask(grid, (2, 2, 4), (1, 2, 2), 187, 7)):
                expected = output(model, **entry.inputs(grid))
            actual = output(compiled, **entry.inputs(grid))
            assert float((actual - expected).norm() / expected.norm()) <= 1e-4


def test_two_attached_models_of_one_class_do_not_mix(phases: list[tuple[int, ...]]) -> None:
    """Dynamo shares compiled blocks between models of a class; steps and grids must not be shared."""
    first, second = wan(layers=1), wan(layers=1)
    for model in (first, second):
        model.compile_repeated_blocks(backend="fps", options=OPTIONS)
    with torch.no_grad(), fpscompile.attach(first) as one, fpscompile.attach(second) as two:
        one.step(0, 10)
        two.step(9, 10)
        for model in (first, second, first):
            output(model, **wan_inputs())
    assert phases == [(0,), (2,), (0,)]


def test_detached_blocks_say_what_is_missing() -> None:
    model = wan(layers=1)
    model.compile_repeated_blocks(backend="fps", options=OPTIONS)
    with torch.no_grad():
        with fpscompile.attach(model):
            output(model, **wan_inputs())
        with pytest.raises(GridError, match="attach"):
            output(model, **wan_inputs())


def test_concurrent_calls_of_one_model_are_refused() -> None:
    inside, leave = threading.Event(), threading.Event()

    class Slow(nn.Module):
        def forward(self, wait: bool) -> int:
            if wait:
                inside.set()
                leave.wait(10)
            return 1

    model = Slow()
    errors: list[Exception] = []
    with fpscompile.attach(model):
        thread = threading.Thread(target=model, args=(True,))
        thread.start()
        assert inside.wait(10)
        try:
            model(False)
        except ConcurrentCallError as error:
            errors.append(error)
        leave.set()
        thread.join()
        assert model(False) == 1  # the refused call left nothing behind
    assert len(errors) == 1
    assert "two threads" in str(errors[0])


def test_an_error_in_the_model_closes_the_call() -> None:
    class Failing(nn.Module):
        def forward(self, x: int) -> int:
            if x == 0:
                raise ValueError("boom")
            return x

    model = Failing()
    with fpscompile.attach(model):
        with pytest.raises(ValueError, match="boom"):
            model(0)
        worker = threading.Thread(target=lambda: results.append(model(2)))
        results: list[int] = []
        worker.start()
        worker.join()
    assert results == [2]


class Pipe:
    """Shaped like a diffusers pipeline with two denoisers, as Wan 2.2 is."""

    def __init__(self) -> None:
        self.transformer, self.transformer_2 = wan(layers=1), wan(layers=1)
        self.vae = nn.Linear(1, 1)
        self.scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
        self.components = dict(vars(self))


def test_attach_finds_the_denoisers_of_a_pipeline() -> None:
    pipe = Pipe()
    attachment = fpscompile.attach(pipe)
    assert sorted(attachment.models) == ["transformer", "transformer_2"]
    pipe.scheduler.set_timesteps(10)
    assert attachment.progress() == 0.0
    with pytest.raises(OptionError, match="no denoiser"):
        fpscompile.attach(object())


def test_grid_reader_layouts() -> None:
    from fpscompile.grid_of_call import GridReader

    assert GridReader(wan())((), wan_inputs((3, 6, 10))) == (3, 6, 10)
    cog = ZOO["cogvideox-2b"]
    reader = GridReader(cog.build())
    assert reader((), cog.inputs((3, 6, 10))) == (3, 6, 10)
    assert reader((), cog.inputs((4, 6, 10))) == (4, 6, 10)  # frames equal channels: the layout seen before
    assert GridReader(cog.build())((), cog.inputs((4, 6, 10))) is None
    hunyuan = ZOO["hunyuan"]
    assert GridReader(hunyuan.build())((), hunyuan.inputs((3, 6, 10))) == (3, 6, 10)
    assert GridReader(nn.Identity())((), {"num_frames": 3, "height": 4, "width": 5}) == (3, 4, 5)
    assert GridReader(nn.Identity())((torch.zeros(1, 2),), {}) is None
    original = nn.Identity()
    original.patch_size, original.in_dim = (1, 2, 2), 16
    latents = [torch.zeros(16, 3, 8, 10) for _ in range(2)]
    assert GridReader(original)((latents,), {}) == (3, 4, 5)
    assert GridReader(original)(([latents[0], latents[1][:, 1:]],), {}) is None


def test_timestep_given_by_position(phases: list[tuple[int, ...]]) -> None:
    """diffusers wraps forward in a decorator that takes ``*args``: the name is gone, the position is not."""
    inputs = wan_inputs(step=10)
    positional = (inputs["hidden_states"], inputs["timestep"], inputs["encoder_hidden_states"])
    model = wan(layers=1)
    with torch.no_grad():
        torch.compile(model, backend="fps", options=OPTIONS)(*positional)
        report = fpscompile.explain(model, *positional, options=OPTIONS)
    assert phases == [(2,), (2,)]
    assert report.graphs[0].progress_source == "input 'timestep'"


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_block_that_runs_again_in_the_backward_pass_sees_its_own_call(reentrant: bool) -> None:
    """Checkpointing outside of the compiled blocks: by the time of the backward pass step and grid are others."""
    model, eager = wan(layers=1).train(), wan(layers=1).train()
    model.enable_gradient_checkpointing(functools.partial(checkpoint, use_reentrant=reentrant))
    windows = [(2, 3, 3), (1, 1, 1)]
    halves = [{"start": i / 2, "end": (i + 1) / 2, "window": window} for i, window in enumerate(windows)]
    model.compile_repeated_blocks(
        backend="fps", fullgraph=True, options=OPTIONS | {"schedule": halves, "quant": "none", "inner": "aot_eager"}
    )
    # The other kind of checkpoint demands the very graph of the forward pass, which another grid need not get.
    grids = [(3, 6, 10), (3, 10, 6) if reentrant else (3, 6, 10)]
    losses = []
    with fpscompile.attach(model) as attachment:
        for step, (grid, window) in enumerate(zip(grids, windows, strict=True)):
            attachment.step(step, 2)
            inputs = wan_inputs(grid)
            inputs["hidden_states"] = inputs["hidden_states"] * (1 + step)
            actual = output(model, **inputs)
            with WindowedAttention(window_mask(grid, (2, 2, 4), window, 180, 0)):
                expected = output(eager, **inputs)
            losses.append((actual.square().sum(), expected.square().sum()))
        for loss in zip(*losses, strict=True):
            sum(loss).backward()
    ours, eagers = (
        torch.cat([p.grad.flatten() for p in each.parameters() if p.grad is not None]) for each in (model, eager)
    )
    assert float((ours - eagers).norm() / eagers.norm()) <= 1e-5


@pytest.mark.parametrize("grid", [3, "abc", (3.0, 4, 5), (3, 4), (0, 4, 5)], ids=str)
def test_a_grid_that_is_not_three_sizes_is_refused(grid: Any) -> None:
    with pytest.raises(GridError, match="three integers"):
        fpscompile.attach(torch.nn.Linear(2, 2), grid=grid)
    attachment = fpscompile.attach(torch.nn.Linear(2, 2), grid=lambda args, kwargs: grid)
    with pytest.raises(GridError, match="three integers"):
        attachment.models["Linear"](torch.zeros(1, 2))
    attachment.detach()
