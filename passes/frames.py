"""Frames that a loop takes apart and puts together again: ``stack([embed(x[:, :, i]) for i in range(T)])``.

The parts are read backwards in step. They are the frames of one axis, in order, when every step is the same op with
the same other arguments, down to the places 0, 1, ..., n - 1 of one dimension of one tensor, all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import fx

from fpscompile.passes.axes import Axis, axis_size
from fpscompile.passes.base import argument, fake_tensor, target_name

MOST_STEPS = 32
Labels = Callable[[Any], tuple[Axis, ...]]


def whole_of(parts: Sequence[Any], label: Labels) -> Axis | None:
    """The axis whose places the parts are, one each and in order; None when they are no such thing.

    Args:
        label: gives the label of a tensor node.
    """
    found = _taken_apart(parts)
    if found is None:
        return None
    source, dim, indices = found
    axis = label(source)[dim]
    return axis if indices == list(range(len(parts))) and axis_size(axis).expr == len(parts) else None


def permuted(parts: Sequence[Any]) -> bool:
    """Whether the parts are the places of one dimension, one each, in an order that is not its own."""
    found = _taken_apart(parts)
    if found is None:
        return False
    source, dim, indices = found
    size = fake_tensor(source).shape[dim]  # type: ignore[union-attr]
    return size == len(indices) and sorted(indices) == list(range(len(indices))) != indices


def _taken_apart(parts: Sequence[Any]) -> tuple[fx.Node, int, list[int]] | None:
    """(tensor, dimension, index of each part) of parts that are places of one dimension, or made of such in step."""
    current: list[Any] = list(parts)
    for _ in range(MOST_STEPS):
        if len(current) < 2 or not all(isinstance(node, fx.Node) for node in current):
            return None
        places = [place for node in current if (place := _place(node)) is not None]
        if len(places) == len(current):
            source, dim, _ = places[0]
            alike = all(place[:2] == (source, dim) for place in places) and fake_tensor(source) is not None
            return (source, dim, [index for _, _, index in places]) if alike else None
        above = _one_step(current)
        if above is None:
            return None
        current = above
    return None


def _place(node: fx.Node) -> tuple[fx.Node, int, int] | None:
    """(tensor, dimension, index) of a node that takes one place of one dimension, and all of the others."""
    name = target_name(node)
    source = node.args[0] if node.args else None
    if not isinstance(source, fx.Node):
        return None
    if name == "select":
        dim, index = argument(node, 1, "dim"), argument(node, 2, "index")
        return _counted(source, dim, index)
    if name != "getitem":
        return None
    index = node.args[1]
    if fake_tensor(source) is None:
        if target_name(source) != "unbind" or not isinstance(source.args[0], fx.Node):
            return None
        return _counted(source.args[0], argument(source, 1, "dim", 0), index)
    items = list(index) if isinstance(index, (tuple, list)) else [index]
    if any(not isinstance(item, int) and item != slice(None) and item is not Ellipsis for item in items):
        return None
    numbers = [place for place, item in enumerate(items) if isinstance(item, int) and not isinstance(item, bool)]
    if len(numbers) != 1:
        return None
    dim = numbers[0]
    if Ellipsis in items[:dim]:
        dim -= len(items)
    return _counted(source, dim, items[numbers[0]])


def _counted(source: fx.Node, dim: Any, index: Any) -> tuple[fx.Node, int, int] | None:
    tensor = fake_tensor(source)
    if tensor is None or not isinstance(dim, int) or not isinstance(index, int) or index < 0:
        return None
    return source, dim % tensor.ndim, index


def _one_step(nodes: list[fx.Node]) -> list[Any] | None:
    """The one operand in which nodes of one op differ; None when they are not alike but for it."""
    first = nodes[0]
    if first.op not in ("call_function", "call_method"):
        return None
    if any((node.op, node.target, len(node.args)) != (first.op, first.target, len(first.args)) for node in nodes):
        return None
    if any(node.kwargs != first.kwargs for node in nodes):
        return None
    differing = [place for place, arg in enumerate(first.args) if any(node.args[place] != arg for node in nodes)]
    return [node.args[differing[0]] for node in nodes] if len(differing) == 1 else None
