"""Wan's rotary embedding as diffusers writes it, and the graphs that the backend makes of it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import fx

from fpscompile import Backend, Settings
from fpscompile.passes.base import target_name


class Graphs:
    """The fps backend, and the graphs that it hands to the inner compiler."""

    def __init__(self) -> None:
        self.seen: list[fx.GraphModule] = []
        settings = {"inner": self._inner, "density": 1.0, "tile": (2, 2, 2), "lowering": "boxes", "quant": "none"}
        self.backend = Backend(Settings.from_options(settings))

    def _inner(self, gm: fx.GraphModule, inputs: list[object]) -> Callable[..., object]:
        self.seen.append(gm)
        return gm.forward

    def count(self, name: str) -> int:
        calls = [node for gm in self.seen for node in gm.graph.nodes if node.op in ("call_function", "call_method")]
        return sum(target_name(node) == name for node in calls)


def wan(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Wan's own: the table is float32, the tensor may be less."""
    x1, x2 = x.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = cos[..., 0::2], sin[..., 1::2]
    out = torch.empty_like(x)
    out[..., 0::2] = x1 * cos - x2 * sin
    out[..., 1::2] = x1 * sin + x2 * cos
    return out.type_as(x)
