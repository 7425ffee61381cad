"""Rules of ops that take places of a dimension or add some: slices, indices, splits, padding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import sympy
import torch
from torch import fx

from fpscompile.ir import Size
from fpscompile.passes.axes import (
    INPUT,
    Atom,
    Axis,
    Cat,
    Factor,
    Label,
    atom,
    concat,
    cut,
    describe,
    fresh,
    root,
    strided,
)
from fpscompile.passes.base import argument, fake_tensor, fake_value, size_of
from fpscompile.passes.rule_tools import Result, dim_of, number, size_argument, source_of

if TYPE_CHECKING:
    from fpscompile.passes.trace_axes import Tracer


def split(tracer: Tracer, node: fx.Node) -> Result:
    """split, chunk, tensor_split: consecutive slices of one dimension."""
    label, _ = source_of(tracer, node)
    dim = argument(node, 2, "dim", 0)
    outputs = fake_value(node)
    if not isinstance(dim, int) or not isinstance(outputs, (tuple, list)):
        return None
    dim %= len(label)
    start = Size(sympy.Integer(0), 0)
    result = []
    for output in outputs:
        size = size_of(output.shape[dim])
        result.append(_part(label, dim, start, size))
        start = Size(start.expr + size.expr, start.hint + size.hint)
    return result


def unbind(tracer: Tracer, node: fx.Node) -> Result:
    label, _ = source_of(tracer, node)
    dim = dim_of(argument(node, 1, "dim", 0), len(label))
    outputs = fake_value(node)
    return [at(label, dim, index) for index in range(len(outputs))]


def select(tracer: Tracer, node: fx.Node) -> Result:
    label, _ = source_of(tracer, node)
    dim = dim_of(argument(node, 1, "dim"), len(label))
    return at(label, dim, argument(node, 2, "index"))


def at(label: Label, dim: int, index: Any) -> Label:
    """The label of one place of a dimension.

    The tokens of one sample are not those of another: places of the first dimension of the call's data leave a mark.
    """
    rest = (*label[:dim], *label[dim + 1 :])
    lead = root(label[dim]) if dim == 0 else None
    if lead is None or lead.source != INPUT:
        return rest
    mark = f"@{describe(label[dim])}[{index}]"
    return tuple(tuple(_marked(factor, mark) for factor in axis) for axis in rest)


def _marked(factor: Factor, mark: str) -> Factor:
    if isinstance(factor, Atom):
        return replace(factor, name=factor.name + mark, parent=(factor,), role="strided")
    if isinstance(factor, Cat):
        return Cat(tuple(tuple(_marked(part, mark) for part in axis) for axis in factor.parts))
    return replace(factor, whole=tuple(_marked(part, mark) for part in factor.whole))


def narrow(tracer: Tracer, node: fx.Node) -> Result:
    label, sizes = source_of(tracer, node)
    dim = dim_of(argument(node, 1, "dim"), len(label))
    start = _place(tracer, argument(node, 2, "start"), sizes[dim], number(0))
    if start is None:
        return None
    return _part(label, dim, start, tracer.shape(node)[dim])


def _part(label: Label, dim: int, start: Size, size: Size) -> Label:
    """The label of ``size`` places of a dimension."""
    axis = cut(label[dim], start, size)
    if axis or not label[dim]:
        return (*label[:dim], axis, *label[dim + 1 :])
    rest = at(label, dim, start.expr)
    return (*rest[:dim], (), *rest[dim:])


def getitem(tracer: Tracer, node: fx.Node) -> Result:
    """An output of several, or basic indexing of a tensor."""
    source, index = node.args
    assert isinstance(source, fx.Node)
    if fake_tensor(source) is None:
        labels = tracer.outputs(source)
        return labels[index] if labels is not None and isinstance(index, int) else None
    return index_label(tracer, tracer.label(source), tracer.shape(source), index, tracer.shape(node), node.name)


def index_label(
    tracer: Tracer, label: Label, sizes: Sequence[Size], index: Any, out: Sequence[Size], name: str
) -> Label | None:
    """Label of ``tensor[index]`` for ints, slices, None, Ellipsis and one 1-D tensor; None for the rest."""
    items = list(index) if isinstance(index, (tuple, list)) else [index]
    used = sum(item is not None and item is not Ellipsis for item in items)
    if Ellipsis not in [item if item is Ellipsis else None for item in items]:
        items.append(Ellipsis)
    position = [item is Ellipsis for item in items].index(True)
    items[position : position + 1] = [slice(None)] * (len(label) - used)
    chosen = [item for item in items if fake_tensor(item) is not None]
    if len(chosen) > 1 or any(fake_tensor(item).ndim != 1 for item in chosen):  # type: ignore[union-attr]
        return None
    if chosen and any(isinstance(fake_value(item), (int, torch.SymInt)) for item in items):
        return None  # numbers are indices too: where the chosen dimension ends up depends on their places
    result: list[Axis] = []
    taken: list[tuple[int, Any]] = []
    dim = 0
    for item in items:
        if item is None:
            result.append(())
        elif isinstance(item, slice):
            result.append(_sliced(tracer, label[dim], sizes[dim], item, out[len(result)], f"{name}.{len(result)}"))
            dim += 1
        elif isinstance(item, fx.Node) and fake_tensor(item) is not None:
            result.append(chosen_places(label[dim], item, out[len(result)]))
            dim += 1
        elif isinstance(fake_value(item), (int, torch.SymInt)) and not isinstance(item, bool):
            taken = [*taken, (dim, item)]
            dim += 1
        else:
            return None
    if taken and taken[0][0] == 0:
        return at((label[0], *result), 0, taken[0][1])
    if isinstance(items[0], slice) and label[0] and not result[0]:
        start = _place(tracer, items[0].start, sizes[0], Size(sympy.Integer(0), 0))
        return ((), *at((label[0], *result[1:]), 0, start.expr if start is not None else name))
    return tuple(result)


def chosen_places(axis: Axis, index: fx.Node, size: Size) -> Axis:
    """The positions of ``axis`` that an index or mask tensor picks: the same ones wherever the same tensor picks."""
    return atom(f"({describe(axis)})@{index.name}", size, parent=axis, role="chosen", origin=index.name)


def _sliced(tracer: Tracer, axis: Axis, size: Size, item: slice, out: Size, name: str) -> Axis:
    if item.step not in (None, 1):
        return _every(tracer, axis, size, item, out) or fresh(name, 0, out)
    start = _place(tracer, item.start, size, Size(sympy.Integer(0), 0))
    stop = _place(tracer, item.stop, size, size)
    if start is None or stop is None:
        return fresh(name, 0, out)
    length = Size(stop.expr - start.expr, stop.hint - start.hint)
    beyond = size.expr - stop.expr
    if all(tracer.not_negative(expr) for expr in (start.expr, length.expr, beyond)):
        # Nothing is clipped: a size that depends on data is this one.
        out = tracer.learn(out, length)
    return cut(axis, start, out)


def _every(tracer: Tracer, axis: Axis, size: Size, item: slice, out: Size) -> Axis | None:
    """Every n-th place of an axis: in its order, and other places than those from another start."""
    start = _place(tracer, item.start, size, Size(sympy.Integer(0), 0))
    lead = root(axis)
    if start is None or lead is None or not isinstance(item.step, int):
        return None
    name = f"({describe(axis)})[{start.expr}::{item.step}]"
    fields = {"source": lead.source, "origin": lead.origin, "dim": lead.dim}
    return atom(name, out, parent=axis, role="strided", **fields)


def _place(tracer: Tracer, value: Any, size: Size, default: Size) -> Size | None:
    """A start or stop of a slice, counted from the front."""
    if value is None:
        return default
    place = size_argument(value)
    if place is None:
        return None
    place = tracer.resolve(place)
    if place.hint >= 0:
        return place
    place = Size(size.expr + place.expr, size.hint + place.hint)
    return place if place.hint >= 0 else number(0)


def pad(tracer: Tracer, node: fx.Node) -> Result:
    """Padding lies before and after an axis; what is cut off by negative padding is cut off."""
    label, sizes = source_of(tracer, node)
    amounts = argument(node, 1, "pad")
    if not isinstance(amounts, (tuple, list)) or argument(node, 2, "mode", "constant") == "circular":
        return None
    result = list(label)
    for back, (before, after) in enumerate(zip(amounts[::2], amounts[1::2], strict=True), start=1):
        dim = len(label) - back
        ahead, behind = size_argument(before), size_argument(after)
        if ahead is None or behind is None or any(a.hint <= 0 and not a.expr.is_number for a in (ahead, behind)):
            # A symbolic amount that is 0 or less in this call may be another kind of padding in the next.
            result[dim] = fresh(node.name, dim, tracer.shape(node)[dim])
            continue
        axis, size = label[dim], sizes[dim]
        first, last = min(ahead.hint, 0), min(behind.hint, 0)
        if first or last:
            axis = cut(axis, number(-first), Size(size.expr + first + last, size.hint + first + last))
        parts = [
            (Atom(f"{node.name}[{place}].{dim}", amount, origin=node.name, dim=dim),) if amount.hint > 0 else ()
            for place, amount in enumerate((ahead, behind))
        ]
        single = (Atom(f"{node.name}.{dim}", number(1), origin=node.name, dim=dim),)
        result[dim] = concat([part for part in (parts[0], axis or single, parts[1]) if part])
    return tuple(result)


def unfold(tracer: Tracer, node: fx.Node) -> Result:
    """``Tensor.unfold``: windows along one dimension, their places in a new one at the end."""
    label, _ = source_of(tracer, node)
    out = tracer.shape(node)
    if len(out) != len(label) + 1 or not label:
        return None
    dim = dim_of(argument(node, 1, "dimension"), len(label))
    lanes = fresh(node.name, len(label), out[-1])
    return (*label[:dim], strided(label[dim], out[dim]), *label[dim + 1 :], lanes)


def choose(tracer: Tracer, node: fx.Node) -> Result:
    """index_select: one dimension by a 1-D index."""
    label, _ = source_of(tracer, node)
    dim, index = dim_of(argument(node, 1, "dim"), len(label)), argument(node, 2, "index")
    if not isinstance(index, fx.Node):
        return None
    return (*label[:dim], chosen_places(label[dim], index, tracer.shape(node)[dim]), *label[dim + 1 :])
