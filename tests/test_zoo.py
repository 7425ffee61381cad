"""Every model of the registry: each attention call recorded, the right ones rewritten, only the window changed."""

from __future__ import annotations

import importlib.util
import json
import pkgutil
import re
from collections import Counter
from pathlib import Path
from typing import Any

import diffusers
import pytest
import scripts
import torch
from models.authors_zoo import AUTHORS
from models.diffusers_zoo import DIFFUSERS_ZOO
from models.oracle import CountAttention, WindowedCalls
from models.run_zoo import OPTIONS, compiled, first_blocks, masks, relative
from models.zoo_entry import Entry, Expect, output
from torch import nn
from torch._inductor.exc import InductorError

from fpscompile import Backend, Settings
from fpscompile.records import SiteRecord

FAMILIES = {entry.family: name for name, entry in reversed(DIFFUSERS_ZOO.items()) if entry.rewritten}

QUICK = {"wan", "ltx", "helios"}
"""Families whose gradients are compared every time."""


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


SELDOM = {"modelscope", "stable-video-diffusion", "i2vgen-xl"}
"""U-Nets that take long to capture and hold what animatediff holds: spatial, temporal and cross attention."""


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * (n in SELDOM)) for n in DIFFUSERS_ZOO])
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


SEVERAL = [(name, dynamic) for name, entry in DIFFUSERS_ZOO.items() if entry.grids for dynamic in (None, True)]
OFTEN = {("wan-blocks", True), ("hunyuanvideo", None), ("cogvideox-5b", None), ("ltx-coords", None)}


@pytest.mark.parametrize(
    ("name", "dynamic"),
    [case if case in OFTEN else pytest.param(*case, marks=pytest.mark.slow) for case in SEVERAL],
)
def test_grids_in_a_row_make_no_more_graphs_than_another_backend(name: str, dynamic: bool | None) -> None:
    """Inductor's graphs are Dynamo's: it captures them before any backend sees one."""
    entry, captured = DIFFUSERS_ZOO[name], []
    build = (lambda: first_blocks(entry.build())) if (name, dynamic) in OFTEN else entry.build
    model, fps = build(), Backend(Settings.from_options(OPTIONS))
    with torch.no_grad():
        expected = [output(model, **entry.inputs(grid)) for grid in entry.grids]
        with compiled(entry, model, fps, dynamic=dynamic) as (run, attachment):
            attachment.step(0, 2)
            for grid, eager in zip(entry.grids, expected, strict=True):
                assert relative(output(run, **entry.inputs(grid)), eager) <= 1e-5
        torch._dynamo.reset()
        model = build()
        with compiled(entry, model, lambda gm, _: captured.append(gm) or gm, dynamic=dynamic) as (run, _):
            for grid in entry.grids:
                output(run, **entry.inputs(grid))
    sites = [site for graph in fps.graphs for site in graph.sites if site.kind == "3d"]
    assert sites
    assert all(site.rewritten for site in sites)
    assert len(fps.graphs) <= len(captured)


FLEX_FAILS = pytest.mark.xfail(
    strict=True, raises=InductorError, reason="Inductor's flex_attention for CPUs fails on a view of this model's q"
)
"""Plain ``backend="inductor"`` fails alike on the attention that is declined."""


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=FLEX_FAILS if name in ("ltx-2.5-decoder", "kandinsky-6-sr") else ())
        for name in DIFFUSERS_ZOO
    ],
)
def test_inductor(name: str) -> None:
    """As near to eager as 1e-5, or, where Inductor itself is not (Kandinsky 5: 8e-5), as near to plain Inductor."""
    entry = DIFFUSERS_ZOO[name]
    model, fps = entry.build(), Backend(Settings.from_options(OPTIONS | {"inner": "inductor"}))
    with torch.no_grad():
        expected = output(model, **entry.inputs(entry.grid))
        with compiled(entry, model, fps) as (run, attachment):
            attachment.step(0, 2)
            found = output(run, **entry.inputs(entry.grid))
        if relative(found, expected) > 1e-5:
            torch._dynamo.reset()
            plain = output(torch.compile(model, backend="inductor"), **entry.inputs(entry.grid))
            assert relative(found, plain) <= 1e-5
    assert sum(site.rewritten for graph in fps.graphs for site in graph.sites) == sum(
        expect.count for expect in entry.expect if expect.reason is None
    )


ELSEWHERE = {"MotionAdapter", "TransformerTemporalModel", "StableAudio3DiTModel"}
"""Layers of the UNets here, and a model of sound."""


def test_no_video_denoiser_of_diffusers_is_missing() -> None:
    """By their names: what is neither an image model's nor an autoencoder's is built in this registry."""
    parts = ("transformers", "unets", "controlnets", "autoencoders")
    folders = [importlib.import_module(f"diffusers.models.{part}") for part in parts]
    words = re.compile("3D|Video|Motion|Temporal|I2V|Cosmos|Wan|LTX|Animat|Sparse|Helios|Kandinsky[56]|SanaWM|MiniMaxH")
    names = set()
    for folder in folders:
        for info in pkgutil.iter_modules(folder.__path__):
            module = importlib.import_module(f"{folder.__name__}.{info.name}")
            names |= {
                name
                for name, value in vars(module).items()
                if isinstance(value, type) and issubclass(value, diffusers.ModelMixin) and words.search(name)
            }
    names = {name for name in names if not re.match("Autoencoder|.*VAE", name)}
    code = "".join(path.read_text() for path in (Path(__file__).parent / "models").glob("zoo_*.py"))
    assert len(names) >= 38
    assert {name for name in names if not re.search(rf"\b{name}\b", code)} == ELSEWHERE


def test_the_page_of_models_is_up_to_date() -> None:
    """docs/models.md shows what benchmarks/results holds, and that has a row for every model of the registries."""
    table = scripts.load("benchmarks/models_table.py")
    report = json.loads(table.RESULTS.read_text())
    assert [(row["group"], row["model"]) for row in report["rows"]] == [
        *(("diffusers", name) for name in DIFFUSERS_ZOO),
        *(("authors", name) for name in AUTHORS),
    ]
    assert table.PAGE.read_text() == table.page(report)
