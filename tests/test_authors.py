"""Models in their authors' spellings and layouts: every site's outcome, parity, sparsity equal to a mask, gradients."""

from __future__ import annotations

import contextlib
import math
from typing import Any

import pytest
import torch
from models.authors import Attend
from models.authors_zoo import AUTHORS, GRID, Author, build, inputs
from models.oracle import rectangular_mask
from torch import nn

import fpscompile
from fpscompile import Backend, Settings

TILE, WINDOW = (2, 2, 4), (1, 2, 2)
DENSE = {"quant": "none", "density": 1.0, "tile": TILE, "inner": "eager", "lowering": "boxes"}
REWRITTEN = [name for name, entry in AUTHORS.items() if ("3d", None) in entry.sites]
SELDOM = {"hunyuan", "mochi", "padded-text-math"}
"""Families whose gradients take long to compile."""
FAMILIES = [
    pytest.param(name, marks=[pytest.mark.slow] if name in SELDOM else [])
    for name in ("wan", "hunyuan", "mochi", "block-packed", "padded-text-math", "longer-keys", "multihead", "sliced")
]


def relative(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual - expected).norm() / expected.norm())


def compiled(
    entry: Author, model: nn.Module, arguments: dict[str, Any], **options: Any
) -> tuple[torch.Tensor, Backend]:
    fps = Backend(Settings.from_options(DENSE | options))
    call = torch.compile(model, backend=fps)
    with fpscompile.attach(call, grid=GRID) if entry.attach else contextlib.nullcontext():
        return call(**arguments), fps


def gradients(model: nn.Module, result: torch.Tensor) -> torch.Tensor:
    grads = torch.autograd.grad(result.square().sum(), list(model.parameters()), allow_unused=True)
    return torch.cat([grad.flatten() for grad in grads if grad is not None])


@pytest.mark.parametrize("name", AUTHORS)
def test_every_site_has_its_outcome_and_dense_is_eager(name: str) -> None:
    entry = AUTHORS[name]
    model, arguments = build(entry), inputs(entry)
    with torch.no_grad():
        expected = model(**arguments)
        actual, fps = compiled(entry, model, arguments)
    assert len(fps.graphs) == entry.graphs
    sites = [site for graph in fps.graphs for site in graph.sites]
    assert tuple((site.kind, site.reason_code) for site in sites) == entry.sites
    assert all(site.rewritten == (site.reason_code is None) for site in sites)
    assert all(site.grid == entry.grid for site in sites if site.rewritten)
    assert not [note for graph in fps.graphs for note in graph.notes if note.code.startswith("near-miss")]
    assert relative(actual, expected) <= 1e-5
    if not any(site.rewritten for site in sites):
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("name", [name for name in REWRITTEN if AUTHORS[name].oracle])
def test_sparse_equals_eager_with_the_expanded_mask(name: str) -> None:
    entry = AUTHORS[name]
    model, arguments = build(entry), inputs(entry)
    lead = entry.before if entry.keys is None else entry.keys
    tokens = math.prod(entry.grid)
    length = tokens + entry.before + entry.after
    keys = length if entry.keys is None else tokens + entry.keys
    mask = rectangular_mask(entry.grid, TILE, WINDOW, (length, entry.before), (keys, lead))
    assert 0.05 < float(mask.float().mean()) < 0.6
    (attend,) = {module for module in model.modules() if isinstance(module, Attend)}
    with torch.no_grad():
        dense = model(**arguments)
        actual, _ = compiled(entry, model, arguments, density=None, window=WINDOW)
        attend.window = mask
        expected = model(**arguments)
    assert relative(actual, expected) <= 1e-4
    assert relative(actual, dense) > 1e-4


@pytest.mark.parametrize("name", FAMILIES)
def test_gradients_equal_eager(name: str) -> None:
    entry = AUTHORS[name]
    model, arguments = build(entry), inputs(entry)
    expected = model(**arguments)
    actual, fps = compiled(entry, model, arguments, inner="aot_eager")
    assert any(site.rewritten for graph in fps.graphs for site in graph.sites)
    assert relative(gradients(model, actual), gradients(model, expected)) <= 1e-5
