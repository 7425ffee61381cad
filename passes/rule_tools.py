"""What the rules of :mod:`axis_rules` and :mod:`place_rules` share."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import sympy
import torch
from torch import fx

from fpscompile.ir import Size
from fpscompile.passes.axes import Label
from fpscompile.passes.base import fake_value, size_of

if TYPE_CHECKING:
    from fpscompile.passes.trace_axes import Tracer

Result = Label | list[Label] | None
Rule = Callable[["Tracer", fx.Node], Result]


def source_of(tracer: Tracer, node: fx.Node) -> tuple[Label, tuple[Size, ...]]:
    """Label and sizes of the first tensor argument, whether given by position or by name."""
    source = node.all_input_nodes[0]
    if node.args and isinstance(node.args[0], fx.Node):
        source = node.args[0]
    elif isinstance(node.kwargs.get("input"), fx.Node):
        source = node.kwargs["input"]  # type: ignore[assignment]
    return tracer.label(source), tracer.shape(source)


def dim_of(value: Any, rank: int) -> int:
    dim = fake_value(value)
    return int(dim) % rank if rank else 0


def size_argument(value: Any) -> Size | None:
    value = fake_value(value)
    return size_of(value) if isinstance(value, (int, torch.SymInt)) else None


def number(value: int) -> Size:
    return Size(sympy.Integer(value), value)
