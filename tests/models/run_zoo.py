"""Compile a model of the registry as its entry asks, and the window that its attention must then have."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from models.oracle import rectangular_mask
from models.zoo_entry import Entry
from torch import nn

import fpscompile

TILE, WINDOW = (2, 2, 4), (1, 2, 1)
HALVES = [{"start": 0.0, "end": 0.5, "density": 1.0}, {"start": 0.5, "end": 1.0, "window": WINDOW}]
OPTIONS = {"quant": "none", "schedule": HALVES, "tile": TILE, "inner": "eager", "lowering": "boxes"}


def relative(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Norm of the difference over the norm of what is expected."""
    return float((actual - expected).norm() / expected.norm())


def first_blocks(model: nn.Module) -> nn.Module:
    """The model with one block of each kind: as many kinds of graphs, in less time."""
    for name, blocks in list(model.named_children()):
        if isinstance(blocks, nn.ModuleList) and name.endswith("blocks"):
            setattr(model, name, blocks[:1])
    return model


@contextlib.contextmanager
def compiled(
    entry: Entry, model: nn.Module, backend: Any, **options: Any
) -> Iterator[tuple[Any, fpscompile.Attachment]]:
    """The model compiled as its entry asks, and an attachment through which the caller names the step."""
    with torch._dynamo.config.patch(**entry.capture):
        if entry.blocks:
            model.compile_repeated_blocks(backend=backend, fullgraph=True, **options)  # type: ignore[operator]
            result: Any = model
        else:
            result = torch.compile(model, backend=backend, **options)
        # Attached to the model itself, only the step reaches a graph of the whole model; the grid must come from it.
        target, grid = (result, None) if entry.attach else (model, lambda args, kwargs: None)
        with fpscompile.attach(target, grid=grid) as attachment:
            yield result, attachment


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
