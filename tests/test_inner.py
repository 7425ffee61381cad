"""CUDA graphs of Inductor: made where attention can be in one, and a note where it cannot."""

from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from models.diffusers_zoo import DIFFUSERS_ZOO
from models.zoo import wan, wan_inputs
from torch import fx
from torch._inductor import config

import fpscompile
from fpscompile import backend as backend_module
from fpscompile import inner as inner_module
from fpscompile.backend import Backend
from fpscompile.errors import OptionError, UnsupportedError
from fpscompile.inner import ANNOTATION
from fpscompile.settings import Settings
from fpscompile.windows import TopK

GRID = (3, 6, 10)
OPTIONS: dict[str, Any] = {"tile": (2, 4, 4), "window": (1, 2, 2), "lowering": "triton"}
GRAPHS = {"triton.cudagraphs": True}
TOLD = "Inductor makes no CUDA graph of this graph: "


@pytest.fixture
def given(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Options that Inductor is given, for graphs that are on a GPU as far as :mod:`fpscompile.inner` knows."""
    seen: list[dict[str, Any]] = []

    def compile_fx(gm: fx.GraphModule, inputs: list[Any], config_patches: dict[str, Any] | None) -> fx.GraphModule:
        seen.append(config_patches or {})
        return gm

    found = inner_module.device_type
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", compile_fx)
    monkeypatch.setattr(backend_module, "check_cpp_compiler", lambda gm: None)
    monkeypatch.setattr(inner_module, "device_type", lambda node: {"cpu": "cuda"}[found(node)])
    torch._dynamo.reset()
    return seen


def whole(mode: str | None = None, **options: Any) -> Backend:
    """The backend that compiled a whole model."""
    backend = Backend(Settings.from_options(OPTIONS | options), mode)
    with torch.no_grad():
        torch.compile(wan(layers=1), backend=backend)(**wan_inputs(GRID))
    return backend


def blocks(**options: Any) -> Backend:
    """The backend that compiled a model's blocks by themselves."""
    backend, model = Backend(Settings.from_options(OPTIONS | options)), wan(layers=1)
    model.compile_repeated_blocks(backend=backend, fullgraph=True)
    with fpscompile.attach(model), torch.no_grad():
        model(**wan_inputs(GRID))
    return backend


def notes(backend: Backend) -> list[str]:
    (record,) = backend.graphs
    assert any(site.rewritten for site in record.sites)
    return [note.message.removeprefix(TOLD) for note in record.notes if note.code == "cuda-graphs"]


def test_a_graph_that_shows_its_grid_keeps_them(given: list[dict[str, Any]]) -> None:
    backend = whole(inner_options=GRAPHS)
    assert given[0]["triton.cudagraphs"] is True
    assert notes(backend) == []


def test_a_mode_asks_for_them_too(given: list[dict[str, Any]]) -> None:
    backend = whole("reduce-overhead", lowering="gather")
    assert given[0]["triton.cudagraphs"] is False
    assert len(notes(backend)) == 1


def test_a_grid_that_is_looked_up_takes_them_off(given: list[dict[str, Any]]) -> None:
    (message,) = notes(blocks(inner_options=GRAPHS))
    assert given[0]["triton.cudagraphs"] is False
    assert "looked up at every call" in message
    assert "options={'grid': (t, h, w)}" in message


def test_the_remedy_holds(given: list[dict[str, Any]]) -> None:
    assert notes(blocks(inner_options=GRAPHS, grid=GRID)) == []
    assert given[0]["triton.cudagraphs"] is True


def test_a_lowering_that_copies_from_the_host_takes_them_off(given: list[dict[str, Any]]) -> None:
    (message,) = notes(whole(inner_options=GRAPHS, lowering="gather"))
    assert given[0]["triton.cudagraphs"] is False
    assert message.startswith("lowering 'gather' copies")


def test_tiles_chosen_by_content_take_them_off(given: list[dict[str, Any]]) -> None:
    (message,) = notes(whole(inner_options=GRAPHS, lowering="gather", window=TopK(0.5)))
    assert given[0]["triton.cudagraphs"] is False
    assert "chosen by content" in message


def test_nobody_asked(given: list[dict[str, Any]]) -> None:
    assert notes(blocks(lowering="gather")) == []
    assert "triton.cudagraphs" not in given[0]


def test_inductors_own_switch_counts(given: list[dict[str, Any]]) -> None:
    with config.patch({"triton.cudagraphs": True}):
        assert len(notes(blocks())) == 1
    assert given[0]["triton.cudagraphs"] is False


def test_another_inner_compiler_makes_none(given: list[dict[str, Any]]) -> None:
    with config.patch({"triton.cudagraphs": True}):
        assert notes(blocks(inner="eager", lowering="gather")) == []
    assert not given


@pytest.mark.parametrize("wish", [True, False, None])
def test_an_annotation_counts_before_the_option(wish: bool | None, given: list[dict[str, Any]]) -> None:
    """``torch._dynamo.override_cudagraphs`` leaves it in the graph, from torch 2.13 on; Inductor puts it first."""
    backend = Backend(Settings.from_options(OPTIONS | {"lowering": "gather", "inner_options": GRAPHS}))
    left: list[Any] = []

    def annotated(gm: fx.GraphModule, inputs: list[Any]) -> Any:
        gm.meta[ANNOTATION] = SimpleNamespace(fwd=wish, bwd=None)
        compiled = backend(gm, inputs)
        left.append(gm.meta.get(ANNOTATION))
        return compiled

    with torch.no_grad():
        torch.compile(wan(layers=1), backend=annotated)(**wan_inputs(GRID))
    assert len(notes(backend)) == (wish is not False)
    assert given[0]["triton.cudagraphs"] is (wish is False)
    assert (left[0] is not None) == (wish is False)


def test_a_step_on_the_cpu_takes_them_off(given: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    """The model moves its timestep to the GPU itself; the phase is computed where the input is."""
    schedule = fpscompile.Schedule((fpscompile.Phase(0, 0.5, density=1.0), fpscompile.Phase(0.5, 1, window=(1, 2, 2))))
    options = {"inner_options": GRAPHS, "window": None, "schedule": schedule}
    assert notes(whole(**options)) == []
    torch._dynamo.reset()
    found = inner_module.device_type
    phase = torch.ops.fps.phase_index.default
    monkeypatch.setattr(inner_module, "device_type", lambda node: "cpu" if node.target is phase else found(node))
    (message,) = notes(whole(**options))
    assert "timestep input" in message
    assert [patches["triton.cudagraphs"] for patches in given] == [True, False]


def test_a_rotary_table_has_no_remedy(given: list[dict[str, Any]]) -> None:
    entry = DIFFUSERS_ZOO["minimax-h3"]
    backend = Backend(Settings.from_options(OPTIONS | {"window": None, "density": 1.0, "inner_options": GRAPHS}))
    with torch.no_grad():
        torch.compile(entry.build(), backend=backend)(**entry.inputs(entry.grid))
    assert given[0]["triton.cudagraphs"] is False
    assert notes(backend) == ["the grid of the video is read from a rotary table at every call"]


def test_who_wants_graphs_or_an_error_gets_the_error(given: list[dict[str, Any]]) -> None:
    wish = GRAPHS | {"triton.cudagraph_or_error": True}
    assert notes(whole(inner_options=wish)) == []
    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match=TOLD + "lowering 'gather'") as caught:
        whole(inner_options=wish, lowering="gather")
    assert isinstance(caught.value.inner_exception, UnsupportedError)


def test_explain_refuses_what_compiling_refuses() -> None:
    with pytest.raises(OptionError, match="inner_options has no key 'nope'"):
        fpscompile.explain(wan(layers=1), options={"inner_options": {"nope": 1}}, **wan_inputs(GRID))


def test_it_is_loud(given: list[dict[str, Any]], caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "fpscompile"):
        whole(inner_options=GRAPHS, lowering="gather")
    assert [message for message in caplog.messages if message.startswith(TOLD)]


def test_explain_says_it(given: list[dict[str, Any]]) -> None:
    report = fpscompile.explain(
        wan(layers=1), options=OPTIONS | {"lowering": "gather", "inner_options": GRAPHS}, **wan_inputs(GRID)
    )
    assert TOLD in str(report)
    assert not given  # explain compiles nothing


def test_it_is_no_failure_under_strict(given: list[dict[str, Any]]) -> None:
    assert len(notes(whole(inner_options=GRAPHS, lowering="gather", strict=True))) == 1


@pytest.mark.parametrize("known", [True, False])
def test_a_capture_around_a_step_that_attach_tells(
    known: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A replay runs no hook of ``attach``: it would go on with the phase of the capture."""
    torch._dynamo.reset()
    schedule = fpscompile.Schedule((fpscompile.Phase(0, 0.5, density=1.0), fpscompile.Phase(0.5, 1, window=(1, 2, 2))))
    options = {"tile": (2, 4, 4), "schedule": schedule, "lowering": "gather", "inner": "eager"}
    model = wan(layers=2)
    model.compile_repeated_blocks(backend="fps", fullgraph=True, options=options)
    with fpscompile.attach(model) as attached, torch.no_grad(), caplog.at_level(logging.WARNING, "fpscompile"):
        if known:
            attached.step(3, 4)
        model(**wan_inputs(GRID))
        untold = [] if known else [backend_module.UNTOLD]  # which a replay cannot make worse
        assert caplog.messages == untold
        monkeypatch.setattr(backend_module, "capturing", lambda device: True)
        for step in (3, 2, 3):  # one graph per phase, as the warning advises
            if known:
                attached.step(step, 4)
            model(**wan_inputs(GRID))
    told = [message for message in caplog.messages if "the phase of their step (here at progress 0.750)" in message]
    assert len(told) == int(known)
    assert caplog.messages == (told or untold)
