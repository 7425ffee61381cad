"""Every model of the registry: each attention call recorded, the right ones rewritten, only the window changed."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from models.diffusers_zoo import DIFFUSERS_ZOO
from models.oracle import CountAttention, WindowedCalls, rectangular_mask
from models.zoo_entry import Entry, Expect, output
from torch import nn

import fpscompile
from fpscompile import Backend, Settings
from fpscompile.records import SiteRecord

TILE, WINDOW = (2, 2, 4), (1, 2, 1)
HALVES = [{"start": 0.0, "end": 0.5, "density": 1.0}, {"start": 0.5, "end": 1.0, "window": WINDOW}]
OPTIONS = {"quant": "none", "schedule": HALVES, "tile": TILE, "inner": "eager", "lowering": "boxes"}

FAMILIES = {entry.family: name for name, entry in reversed(DIFFUSERS_ZOO.items()) if entry.rewritten}

QUICK = {"wan", "hunyuan", "ltx", "helios", "cosmos", "ltx-coords", "cogvideox-5b", "wan-ti2v"}
"""Families and entries whose further tests run every time."""


def relative(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual - expected).norm() / expected.norm())


@contextlib.contextmanager
def compiled(entry: Entry, model: nn.Module, fps: Any, **options: Any) -> Iterator[tuple[Any, fpscompile.Attachment]]:
    """The model compiled as its entry asks, and an attachment through which the test names the step."""
    with torch._dynamo.config.patch(**entry.capture):
        if entry.blocks:
            model.compile_repeated_blocks(backend=fps, fullgraph=True, **options)  # type: ignore[operator]
            result: Any = model
        else:
            result = torch.compile(model, backend=fps, **options)
        # Attached to the model itself, only the step reaches a graph of the whole model; the grid must come from it.
        target = result if entry.attach else model
        with fpscompile.attach(target, grid=entry.grid if entry.attach else lambda args, kwargs: None) as attachment:
            yield result, attachment


def outcome(site: SiteRecord, expects: tuple[Expect, ...]) -> tuple[Any, ...]:
    """What the registry pins down of a site."""
    segments = site.segments
    if any(expect.data_dependent for expect in expects) and site.kind == "3d":
        segments = tuple((kind, length) for kind, length in segments if kind == "video")
    elif segments:
        place = [kind for kind, _ in segments].index("video")
        before, after = (sum(length for _, length in part) for part in (segments[:place], segments[place + 1 :]))
        segments = (("other", before), segments[place], ("other", after))
    return (site.kind, site.reason_code, site.grid, site.grid_source, segments)


def expected_outcome(expect: Expect, entry: Entry) -> tuple[Any, ...]:
    grid = entry.grid if expect.source is not None and expect.reason != "token-order" else None
    segments: tuple[tuple[str, int], ...] = ()
    if grid is not None:
        before, after = expect.text
        video = grid[0] * grid[1] * grid[2]
        segments = (("other", before), ("video", video), ("other", after))
        if expect.data_dependent:
            segments = (("video", video),)
    return (expect.kind, expect.reason, grid, expect.source if grid is not None else None, segments)


def masks(entry: Entry) -> dict[tuple[int, int], torch.Tensor]:
    """The window of every class of rewritten calls, by their numbers of queries and keys."""
    result = {}
    video = entry.grid[0] * entry.grid[1] * entry.grid[2]
    for expect in entry.expect:
        if expect.reason is None:
            keys = expect.keys or expect.text
            q_length, k_length = video + sum(expect.text), video + sum(keys)
            mask = rectangular_mask(entry.grid, TILE, WINDOW, (q_length, expect.text[0]), (k_length, keys[0]))
            result[q_length, k_length] = mask
    return result


@pytest.mark.parametrize("name", DIFFUSERS_ZOO)
def test_every_call_is_recorded_and_right(name: str) -> None:
    entry = DIFFUSERS_ZOO[name]
    model, inputs = entry.build(), entry.inputs(entry.grid)
    fps = Backend(Settings.from_options(OPTIONS))
    with torch.no_grad():
        with CountAttention() as eager:
            expected = output(model, **inputs)
        with WindowedCalls(masks(entry)) as windowed:
            sparse = output(model, **entry.inputs(entry.grid))
        with compiled(entry, model, fps) as (run, attachment):
            attachment.step(0, 2)
            dense = output(run, **entry.inputs(entry.grid))
            attachment.step(1, 2)
            actual = output(run, **entry.inputs(entry.grid))
    sites = [site for graph in fps.graphs for site in graph.sites]
    assert eager.calls == sum(expect.count * expect.repeats for expect in entry.expect)
    found = Counter(outcome(site, entry.expect) for site in sites)
    wanted: Counter[Any] = Counter()
    for expect in entry.expect:
        wanted[expected_outcome(expect, entry)] += expect.count
    assert found == wanted
    assert all((site.reason is None) == site.rewritten for site in sites)
    assert len(fps.graphs) == entry.graphs
    assert relative(dense, expected) <= 1e-5
    assert relative(actual, sparse) <= 1e-4
    assert windowed.calls == sum(expect.count * expect.repeats for expect in entry.expect if expect.reason is None)
    if entry.rewritten:
        assert relative(actual, expected) > 1e-4


def gradients(model: nn.Module, result: torch.Tensor) -> torch.Tensor:
    grads = torch.autograd.grad(result.square().sum(), list(model.parameters()), allow_unused=True)
    return torch.cat([grad.flatten() for grad in grads if grad is not None])


@pytest.mark.parametrize("family", [pytest.param(f, marks=[] if f in QUICK else pytest.mark.slow) for f in FAMILIES])
def test_gradients(family: str) -> None:
    """Of all weights, at once: in the dense half of the schedule they are those of eager."""
    entry = DIFFUSERS_ZOO[FAMILIES[family]]
    model, fps = entry.build(), Backend(Settings.from_options(OPTIONS))
    expected = gradients(model, output(model, **entry.inputs(entry.grid)))
    with compiled(entry, model, fps) as (run, attachment):
        attachment.step(0, 2)
        actual = gradients(model, output(run, **entry.inputs(entry.grid)))
    assert any(site.rewritten for graph in fps.graphs for site in graph.sites)
    assert relative(actual, expected) <= 1e-5


SEVERAL = [name for name, entry in DIFFUSERS_ZOO.items() if entry.grids]


@pytest.mark.parametrize("name", [pytest.param(n, marks=[] if n in QUICK else pytest.mark.slow) for n in SEVERAL])
def test_grids_in_a_row_make_no_more_graphs_than_another_backend(name: str) -> None:
    entry, captured = DIFFUSERS_ZOO[name], []
    model, fps = entry.build(), Backend(Settings.from_options(OPTIONS))
    with torch.no_grad():
        with compiled(entry, model, fps) as (run, attachment):
            attachment.step(0, 2)
            for grid in entry.grids:
                assert relative(output(run, **entry.inputs(grid)), output(model, **entry.inputs(grid))) <= 1e-5
        torch._dynamo.reset()
        with compiled(entry, model, lambda gm, _: captured.append(gm) or gm) as (run, _):
            for grid in entry.grids:
                output(run, **entry.inputs(grid))
    sites = [site for graph in fps.graphs for site in graph.sites if site.kind == "3d"]
    assert sites
    assert all(site.rewritten for site in sites)
    assert len(fps.graphs) <= len(captured)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name, entry in DIFFUSERS_ZOO.items() if entry.rewritten])
def test_inductor(name: str) -> None:
    entry = DIFFUSERS_ZOO[name]
    model, fps = entry.build(), Backend(Settings.from_options(OPTIONS | {"inner": "inductor"}))
    with torch.no_grad():
        expected = output(model, **entry.inputs(entry.grid))
        with compiled(entry, model, fps) as (run, attachment):
            attachment.step(0, 2)
            assert relative(output(run, **entry.inputs(entry.grid)), expected) <= 1e-5
    assert sum(site.rewritten for graph in fps.graphs for site in graph.sites) == sum(
        expect.count for expect in entry.expect if expect.reason is None
    )
