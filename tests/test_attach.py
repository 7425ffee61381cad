"""Steps and grids that change between calls: read by the scheduler, published by an attachment, never recompiled."""

from __future__ import annotations

import copy
import functools
import inspect
import threading
from collections.abc import Iterator
from types import SimpleNamespace
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
from fpscompile import Backend, Settings, runtime
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
    with pytest.raises(OptionError, match=r"step\(10, 10\): the index must be in \[0, 10\)"):
        attachment.step(10, 10)


def test_the_scheduler_that_a_pipeline_has_now_tells_the_step() -> None:
    pipe = Pipe()
    x = torch.zeros(1)
    with fpscompile.attach(pipe) as attachment:
        first = pipe.scheduler
        pipe.scheduler = diffusers.DDIMScheduler()
        pipe.scheduler.set_timesteps(4)
        assert attachment.progress() == 0  # as a call of the model asks, ahead of the first step
        pipe.scheduler.step(x, pipe.scheduler.timesteps[0], x)
        assert attachment.progress() == 0.25
        pipe.scheduler = first
        first.set_timesteps(10)
        first.step(x, first.timesteps[0], x)
        assert attachment.progress() == 0.1
    assert "step" not in vars(pipe.scheduler)


@pytest.mark.parametrize("kind", [diffusers.FlowMatchEulerDiscreteScheduler, diffusers.DDIMScheduler])
def test_a_scheduler_that_is_never_stepped_is_pointed_out_once(kind: Any, caplog: pytest.LogCaptureFixture) -> None:
    """Pipelines that step copies of their scheduler would stay at the first step for ever."""
    model, scheduler, x = nn.Linear(2, 2), kind(), torch.zeros(1, 2)
    with fpscompile.attach(model, scheduler=scheduler):
        scheduler.set_timesteps(30)
        for timestep in scheduler.timesteps[:20]:  # guidance calls the model twice per step
            model(x), model(x)
            scheduler.step(x, timestep, x)
        assert not caplog.records
        scheduler.set_timesteps(30)
        stepped = copy.deepcopy(scheduler)
        for timestep in stepped.timesteps[:20]:
            model(x), model(x)
            stepped.step(x, timestep, x)
    (record,) = caplog.records
    assert f"a {kind.__name__}, was not stepped" in record.getMessage()
    assert "Attachment.step" in record.getMessage()


class Timed(nn.Module):
    def forward(self, x: torch.Tensor, timestep: Any) -> torch.Tensor:
        return x


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("copied", [False, True])
@pytest.mark.parametrize("kind", [diffusers.FlowMatchEulerDiscreteScheduler, diffusers.DDIMScheduler])
def test_the_timestep_that_a_model_is_given_tells_what_its_scheduler_does_not(
    kind: Any, copied: bool, dtype: torch.dtype | None, caplog: pytest.LogCaptureFixture
) -> None:
    """Video to video begins midway; some pipelines step copies of their scheduler."""
    model, scheduler, x = Timed(), kind(), torch.zeros(1)
    with fpscompile.attach(model, scheduler=scheduler) as attachment:
        scheduler.set_timesteps(40)
        stepped = copy.deepcopy(scheduler) if copied else scheduler
        assert attachment.progress() == 0
        for i in range(20, 40):
            timestep = stepped.timesteps[i]
            model(x, timestep=torch.stack([timestep, 0 * timestep]).to(dtype or timestep.dtype))
            assert attachment.progress() == i / 40
            stepped.step(x, timestep, x)
        model(x, 0.123)
        assert attachment.progress() in (0, 1)
    assert not caplog.records


def test_a_video_that_was_given_up_does_not_tell_the_step_of_the_next() -> None:
    scheduler, x = diffusers.DDIMScheduler(), torch.zeros(1)
    with fpscompile.attach(nn.Identity(), scheduler=scheduler) as attachment:
        scheduler.set_timesteps(10)
        for i, timestep in enumerate(scheduler.timesteps[:6]):
            assert attachment.progress() == i / 10
            scheduler.step(x, timestep, x)
        scheduler.set_timesteps(10)
        assert attachment.progress() == 0


def test_a_timestep_that_is_listed_twice_counts_twice() -> None:
    scheduler, x = diffusers.PNDMScheduler(), torch.zeros(1)
    with fpscompile.attach(nn.Identity(), scheduler=scheduler) as attachment:
        scheduler.set_timesteps(10)
        total = len(scheduler.timesteps)
        assert len(set(scheduler.timesteps.tolist())) < total
        for i, timestep in enumerate(scheduler.timesteps):
            assert attachment.progress() == i / total
            scheduler.step(x, timestep, x)


def test_a_layout_that_nobody_needs_to_know_is_no_warning(caplog: pytest.LogCaptureFixture) -> None:
    """Frames equal channels, and the graph shows the grid."""
    model = torch.compile(wan(layers=1), backend="fps", options=OPTIONS)
    with torch.no_grad(), fpscompile.attach(model, scheduler=SimpleNamespace(timesteps=[1, 0], step_index=0)):
        output(model, **wan_inputs((4, 6, 10)))
    assert not [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]


COUNTED = (
    diffusers.CogVideoXDDIMScheduler, diffusers.CogVideoXDPMScheduler, diffusers.DDIMScheduler, diffusers.DDPMScheduler,
    diffusers.PNDMScheduler,
)  # fmt: skip
"""Schedulers that keep no index of their step."""


@pytest.mark.parametrize("kind", COUNTED)
def test_a_counted_step_is_called_as_before(kind: Any) -> None:
    """Pipelines look at the signature to decide whether a generator or eta is passed."""
    scheduler = kind()
    signature = inspect.signature(scheduler.step)
    with fpscompile.attach(nn.Identity(), scheduler=scheduler):
        assert inspect.signature(scheduler.step) == signature
        with fpscompile.attach(nn.Identity(), scheduler=scheduler) as inner:
            scheduler.set_timesteps(10)
            assert inner.progress() == 0
        assert inspect.signature(scheduler.step) == signature
    assert "step" not in vars(scheduler)


def test_counting_does_not_depend_on_the_order_of_arguments() -> None:
    scheduler, x, old = diffusers.CogVideoXDPMScheduler(), torch.zeros(1, 2), None
    with fpscompile.attach(nn.Identity(), scheduler=scheduler) as outer:
        with fpscompile.attach(nn.Identity(), scheduler=scheduler) as inner:
            scheduler.set_timesteps(4)
            times = scheduler.timesteps
            for i in range(2):
                back = times[i - 1] if i else None
                x, old = scheduler.step(x, old, times[i], back, x, return_dict=False)
                assert inner.progress() == outer.progress() == (i + 1) / 4
        scheduler.step(x, old, times[2], times[1], x, return_dict=False)
        assert outer.progress() == 0.75, "an attachment inside of it is gone"


def test_a_copy_of_an_attached_scheduler_steps_itself() -> None:
    scheduler, x = diffusers.DDIMScheduler(), torch.zeros(1)
    with fpscompile.attach(nn.Identity(), scheduler=scheduler) as attachment:
        scheduler.set_timesteps(4)
        stepped = copy.deepcopy(scheduler)
        stepped.step(x, stepped.timesteps[0], x)
        assert stepped.step.scheduler is stepped
        assert attachment.progress() == 0


def test_an_attachment_that_was_detached_is_refused() -> None:
    attachment = fpscompile.attach(nn.Identity())
    attachment.detach()
    attachment.detach()
    for use in (lambda: attachment.step(0, 4), attachment.__enter__):
        with pytest.raises(OptionError, match=r"was detached: call fpscompile\.attach again"):
            use()


@pytest.mark.parametrize("total", [0, -3])
def test_a_number_of_steps_below_one_is_refused(total: int) -> None:
    with fpscompile.attach(torch.nn.Identity()) as attachment, pytest.raises(OptionError) as caught:
        attachment.step(0, total)
    assert str(caught.value) == f"step(0, {total}): total, the number of steps, must be >= 1"


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


@pytest.mark.parametrize(
    "scheduler",
    [
        *("x", 5, nn.Identity(), {"timesteps": [1]}, SimpleNamespace(timesteps=[1]), SimpleNamespace(step_index=0)),
        diffusers.FlowMatchEulerDiscreteScheduler,
        torch.optim.lr_scheduler.ConstantLR(torch.optim.SGD(nn.Linear(1, 1).parameters(), 0.1)),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_scheduler_that_tells_no_step_is_refused(scheduler: Any, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(OptionError, match=rf"is a {type(scheduler).__name__}; .*a diffusers scheduler"):
        fpscompile.attach(nn.Identity(), scheduler=scheduler)
    # That of a pipeline is not the user's word: the grids are published all the same.
    pipe = SimpleNamespace(transformer=nn.Identity(), scheduler=scheduler)
    with fpscompile.attach(pipe) as attachment:
        assert np.isnan(attachment.progress())
    assert f"the scheduler of SimpleNamespace, a {type(scheduler).__name__}, does not tell" in caplog.text


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_every_scheduler_of_diffusers_is_taken() -> None:
    taken = 0
    for kind in (getattr(diffusers.schedulers, name) for name in dir(diffusers.schedulers)):
        if not inspect.isclass(kind) or not issubclass(kind, diffusers.ConfigMixin):
            continue
        try:
            scheduler = kind()
        except (ImportError, TypeError):  # another package, or arguments, are needed
            continue
        fpscompile.attach(nn.Identity(), scheduler=scheduler).detach()
        taken += 1
    assert taken > 30
    fpscompile.attach(nn.Identity(), scheduler=SimpleNamespace(timesteps=[1, 0], step_index=0)).detach()


def compile_in(how: str, model: Any) -> Any:
    if how == "torch.compile":
        return torch.compile(model, backend="fps", options=OPTIONS)
    if how == "module.compile":
        model.compile(backend="fps", options=OPTIONS)
    else:
        model.compile_repeated_blocks(backend="fps", options=OPTIONS)
    return model


@pytest.mark.parametrize("first_off", ["earlier", "later"])
@pytest.mark.parametrize("how", ["torch.compile", "module.compile", "blocks", "attach first"])
def test_a_second_attachment_of_one_model(
    how: str, first_off: str, phases: list[tuple[int, ...]], caplog: pytest.LogCaptureFixture
) -> None:
    """As in a notebook's cell that runs again: the later one tells the step, and hands back when it is detached."""
    model = wan(layers=1)
    compiled = model if how == "attach first" else compile_in(how, model)
    earlier, later = (fpscompile.attach(compiled) for _ in range(2))
    compiled = compile_in("torch.compile", model) if how == "attach first" else compiled
    earlier.step(5, 10)
    later.step(9, 10)
    off, rest = (earlier, later) if first_off == "earlier" else (later, earlier)
    with torch.no_grad():
        for attachment in (off, rest):
            output(compiled, **wan_inputs(step=1000))
            assert runtime.current_call() is None
            attachment.detach()
    assert phases == [(2,), (2,) if first_off == "earlier" else (1,)]
    assert not [record for record in caplog.records if "no graph that holds attention" in record.getMessage()]


def test_a_second_attachment_leaves_the_model_to_other_threads() -> None:
    compiled = compile_in("blocks", wan(layers=1))
    results: list[torch.Tensor] = []

    def call() -> None:
        with torch.no_grad():
            results.append(output(compiled, **wan_inputs()))

    with fpscompile.attach(compiled), fpscompile.attach(compiled):
        call()
        thread = threading.Thread(target=call)
        thread.start()
        thread.join()
    assert torch.equal(*results)


def test_an_error_in_a_model_with_two_attachments_closes_both_calls() -> None:
    def backend(gm: torch.fx.GraphModule, inputs: Any) -> Any:
        raise ValueError("boom")

    model: Any = nn.Linear(2, 2)
    model.compile(backend=backend)
    before = model._compiled_call_impl
    with fpscompile.attach(model), fpscompile.attach(model, grid=lambda args, kwargs: (0, 0, 0)):
        with pytest.raises(GridError):
            model(torch.zeros(1, 2))
        assert runtime.current_call() is None
    assert model._compiled_call_impl is before


@pytest.mark.parametrize("how", ["module.compile", "blocks"])
def test_a_model_and_a_part_of_it_are_both_attached(
    how: str, phases: list[tuple[int, ...]], caplog: pytest.LogCaptureFixture
) -> None:
    class Whole(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.transformer = compile_in(how, wan(layers=1))

        def forward(self, **inputs: Any) -> torch.Tensor:
            return output(self.transformer, **inputs)

    model = Whole()
    with torch.no_grad(), fpscompile.attach(model) as outer, fpscompile.attach(model.transformer) as inner:
        outer.step(5, 10)
        inner.step(9, 10)
        model(**wan_inputs())
    assert phases == [(2,)]
    assert not [record for record in caplog.records if "no graph that holds attention" in record.getMessage()]


def test_grid_reader_layouts() -> None:
    from fpscompile.grid_of_call import GridReader

    assert GridReader(wan())((), wan_inputs((3, 6, 10))) == (3, 6, 10)
    cog = ZOO["cogvideox-2b"]
    reader = GridReader(cog.build())
    assert reader((), cog.inputs((3, 6, 10))) == (3, 6, 10)
    # Frames equal channels: the layout seen before, by whichever model of the class.
    assert reader((), cog.inputs((4, 6, 10))) == (4, 6, 10)
    assert GridReader(cog.build())((), cog.inputs((4, 6, 10))) == (4, 6, 10)
    unseen = nn.Identity()
    unseen.__class__ = type("Unseen", (nn.Identity,), {})
    unseen.patch_size, unseen.in_channels = (1, 2, 2), 4
    assert GridReader(unseen)((torch.zeros(1, 4, 4, 8, 10),), {}) is None
    assert GridReader(unseen)((torch.zeros(1, 4, 5, 8, 10),), {}) == (5, 4, 5)
    assert GridReader(unseen)((torch.zeros(1, 4, 4, 8, 10),), {}) == (4, 4, 5)
    packed = {"num_frames": 3, "height": 4, "width": 5, "hidden_states": torch.zeros(1, 60, 8)}
    assert GridReader(nn.Identity())((), packed) == (3, 4, 5)
    placeholders = packed | {"num_frames": 1, "height": 1, "width": 1}
    assert GridReader(nn.Identity())((), placeholders) is None
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


def test_a_grid_of_numpy_is_one_and_a_tensor_is_not() -> None:
    model = torch.nn.Linear(2, 2)
    for grid in ((np.int64(3), np.int32(4), 5), np.array([3, 4, 5])):
        with fpscompile.attach(model, grid=grid) as attachment:
            seen = attachment._open(lambda args, kwargs, grid=grid: grid, [], (), {})
            call = runtime.current_call()
            assert call is not None
            assert call.grid == (3, 4, 5)
            assert {type(size) for size in call.grid} == {int}
            runtime.close_call(seen)
    with pytest.raises(GridError, match=r"^grid\[0\]=tensor\(3\) is a Tensor: pass a number \(.item\(\)\)"):
        fpscompile.attach(model, grid=(torch.tensor(3), 4, 5))  # type: ignore[arg-type]


@pytest.mark.parametrize("order", ["attach first", "compile first"])
@pytest.mark.parametrize(("grid", "expected"), [((5, 5, 5), 1), ((3, 6, 10), 0)])
def test_a_grid_that_the_graph_contradicts_is_named(
    grid: tuple[int, int, int], expected: int, order: str, caplog: pytest.LogCaptureFixture
) -> None:
    model = wan(layers=2)
    attachment = fpscompile.attach(model, grid=grid) if order == "attach first" else None
    compiled = torch.compile(model, backend="fps", options=OPTIONS, dynamic=False)
    attachment = attachment or fpscompile.attach(compiled, grid=grid)
    with torch.no_grad(), attachment:
        for own in [(3, 6, 10), (3, 6, 10), (3, 10, 6)][: 3 if expected else 2]:
            output(compiled, **wan_inputs(own))
    messages = [record.getMessage() for record in caplog.records if "not used" in record.getMessage()]
    assert len(messages) == expected
    assert all("grid=(5, 5, 5), which is not used: the graph itself shows (3, 6, 10)" in text for text in messages)


UNTOLD = {"inner": "eager", "quant": "none", "tile": (2, 2, 2), "density": 0.4}


class Tokens(nn.Module):
    """Attention over tokens whose grid nothing shows."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(32, 96)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 16)).permute(2, 0, 3, 1, 4)
        return x + nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


@pytest.mark.parametrize("order", ["attach first", "compile first"])
def test_a_grid_for_all_calls_is_told_however_the_model_is_compiled(order: str) -> None:
    """Hooks that are traced tell nothing; three sizes need no hooks. explain, which captures anew, sees them too."""
    torch.manual_seed(0)
    model, x, options = Tokens(), torch.randn(1, 192, 32), UNTOLD | {"strict": True}
    expected = torch.compile(model, backend="fps", options=options | {"grid": (4, 6, 8)})(x)
    torch._dynamo.reset()
    attachment = fpscompile.attach(model, grid=(4, 6, 8)) if order == "attach first" else None
    compiled = torch.compile(model, backend="fps", options=options)
    with attachment or fpscompile.attach(compiled, grid=(4, 6, 8)):
        torch.testing.assert_close(compiled(x), expected)
        for shown in (model, compiled):
            (site,) = fpscompile.explain(shown, x, options=options).sites
            assert (site.rewritten, site.grid, site.grid_source) == (True, (4, 6, 8), "attach")
    assert not torch.allclose(model.forward(x), expected)


class TwoResolutions(nn.Module):
    """The graph shows the grid of the coarse attention, and not that of the fine one."""

    def __init__(self) -> None:
        super().__init__()
        self.coarse, self.fine = Tokens(), Tokens()

    def forward(self, video: torch.Tensor, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.coarse(video.flatten(2).mT), self.fine(tokens)


def test_of_two_resolutions_one_may_be_told(caplog: pytest.LogCaptureFixture) -> None:
    model, options = TwoResolutions(), UNTOLD | {"strict": True}
    call = torch.randn(1, 32, 4, 3, 4), torch.randn(1, 192, 32)
    with fpscompile.attach(model, grid=(4, 6, 8)):
        compiled = torch.compile(model, backend="fps", options=options)
        compiled(*call)
    assert not [record for record in caplog.records if "not used" in record.getMessage()]
    sites = fpscompile.explain(model, *call, options=options | {"grid": (4, 6, 8)}).sites
    assert [(site.grid, site.grid_source) for site in sites] == [((4, 3, 4), "graph"), ((4, 6, 8), "options")]
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match=r"the graph proves \(4, 3, 4\)"):
        fpscompile.explain(model, *call, options=options | {"grid": (3, 4, 4), "strict": False})


def test_tokens_that_are_more_than_the_grid_are_no_silence(caplog: pytest.LogCaptureFixture) -> None:
    """A block that is compiled by itself cannot know which of its tokens are text."""
    block = Tokens()
    with fpscompile.attach(block, grid=(4, 6, 8)):
        torch.compile(block, backend="fps", options=UNTOLD)(torch.randn(1, 197, 32))
    (message,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert "of its 197 tokens 192 may be the grid (4, 6, 8) from attach" in message
    assert "where the rest is text or the like, compile the whole model" in message


def test_weights_that_are_replaced_stay_attached(phases: list[tuple[int, ...]]) -> None:
    """``load_state_dict(assign=True)`` puts other parameters in; a compiled model has only them to be known by."""
    model = wan(layers=2)
    with fpscompile.attach(model) as attachment, torch.no_grad():
        attachment.step(9, 10)
        compiled = torch.compile(model, backend="fps", options=OPTIONS | {"timestep": {"input": "none"}})
        before = output(compiled, **wan_inputs())
        model.load_state_dict({name: x.clone() for name, x in model.state_dict().items()}, assign=True)
        torch.testing.assert_close(output(compiled, **wan_inputs()), before)
        assert set(phases) == {(2,)}
        other = fpscompile.attach(model)  # the last to attach still tells the step, whatever was replaced since
        other.step(0, 10)
        model.load_state_dict({name: x.clone() for name, x in model.state_dict().items()}, assign=True)
        phases.clear()
        output(compiled, **wan_inputs())
        assert set(phases) == {(0,)}
        other.detach()
        phases.clear()
        output(compiled, **wan_inputs())
        assert set(phases) == {(2,)}


def test_models_that_nobody_attached_are_looked_for_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model, stranger = wan(layers=1), [nn.Parameter(torch.ones(2))]
    with fpscompile.attach(model) as attachment:
        looks: list[None] = []
        weights = attachment.weights
        monkeypatch.setattr(attachment, "weights", lambda: looks.append(None) or weights())
        assert runtime.owner_of(stranger) is runtime.owner_of(stranger) is None
        assert len(looks) == 1
        assert runtime.owner_of(list(model.parameters())) is attachment


def test_a_deep_copy_is_not_attached(phases: list[tuple[int, ...]]) -> None:
    """An EMA copy has the hooks of the model."""
    model = wan(layers=2)
    attachment = fpscompile.attach(model)
    attachment.step(9, 10)
    ema = copy.deepcopy(model)
    for part in (model, ema):
        for block in part.blocks:
            block.compile(backend="fps", options=OPTIONS | {"grid": (3, 6, 10)})
    with torch.no_grad():
        output(model, **wan_inputs())
        assert set(phases) == {(2,)}
        phases.clear()
        output(ema, **wan_inputs())
        assert set(phases) == {(0,)}, "nothing tells its step: the densest"
        with fpscompile.attach(ema) as own:
            own.step(5, 10)
            phases.clear()
            output(ema, **wan_inputs())
            assert set(phases) == {(1,)}
    assert runtime.current_call() is None
    attachment.detach()
