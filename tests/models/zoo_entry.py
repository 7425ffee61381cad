"""What the registry says of a model: how to build and call it, and what must become of each attention call."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

TEXT = 7
GRID = (3, 5, 7)
"""Tokens along (t, h, w): odd, not square, dividing no tile."""


@dataclass(frozen=True)
class Expect:
    """The outcome of ``count`` attention calls of one class."""

    count: int
    kind: str = "3d"
    reason: str | None = None
    """Reason code of the decline; None when rewritten."""
    source: str | None = "graph"
    """Who told the grid."""
    text: tuple[int, int] = (0, 0)
    """Tokens before and after the video in the query sequence."""
    keys: tuple[int, int] | None = None
    """The same of the key sequence; as the queries' when None."""
    repeats: int = 1
    """How often the compiled call runs: blocks that are compiled once run as often as there are blocks."""
    data_dependent: bool = False
    """Whether ``text`` is known only at run time: the record then shows a stand-in."""


def kinds(repeats: int = 1, **counts: int) -> tuple[Expect, ...]:
    """Calls declined for their kind: ``kinds(cross=2)``."""
    return tuple(Expect(count, kind, "kind", None, repeats=repeats) for kind, count in counts.items())


@dataclass(frozen=True)
class Entry:
    """One model of the registry."""

    family: str
    build: Callable[[], nn.Module]
    inputs: Callable[..., dict[str, Any]]
    """(grid, batch=, step=) -> arguments of one call."""
    expect: tuple[Expect, ...]
    grid: tuple[int, int, int] = GRID
    graphs: int = 1
    """Graphs that Dynamo makes of one call."""
    capture: Mapping[str, Any] = field(default_factory=dict)
    """Settings of ``torch._dynamo.config`` that the model needs for its attention to be captured."""
    attach: bool = False
    """Whether the grid reaches the compiled code through ``fpscompile.attach``."""
    blocks: bool = False
    """Whether the model's repeated blocks are compiled instead of the model."""
    grids: tuple[tuple[int, int, int], ...] = ()
    """Further grids in a row; empty when the model has one size only."""
    note: str = ""
    """For the table: what a user must know."""

    @property
    def rewritten(self) -> int:
        return sum(e.count for e in self.expect if e.reason is None)


def randn(*shape: int, seed: int = 1, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Normal numbers that do not depend on what was drawn before."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def tiny(cls: Callable[..., nn.Module], **config: Any) -> Callable[[], nn.Module]:
    """A builder of one random model, in which no gate is closed: weights that start at zero get numbers too."""

    def build() -> nn.Module:
        torch.manual_seed(0)
        model = cls(**config).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if not parameter.any():
                    parameter.normal_(std=0.1)
        return model

    return build


def steps(batch: int, step: float, *shape: int) -> torch.Tensor:
    """[batch, *shape] of one timestep."""
    return torch.full((batch, *shape), float(step))


def output(model: Any, **inputs: Any) -> torch.Tensor:
    """The first output of a model that may return a tuple, or a list of samples."""
    result = model(**inputs)
    while isinstance(result, (tuple, list)):
        result = result[0]
    return result if isinstance(result, torch.Tensor) else result.sample
