"""What a graph says about the boundaries of packed sequences: ``cu_seqlens`` read element by element.

A boundary is a sum of sizes, known as an expression, and of counts that only run time knows (text tokens that a mask
keeps). The reader follows constants, ``arange``, ``zeros`` filled by index, ``cumsum``, ``cat``, ``pad`` and casts.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import fx

from fpscompile.passes.aliasing import MAY_ALIAS, mutates
from fpscompile.passes.base import argument, fake_tensor, fake_value, shape_of, size_of, target_name

CASTS = frozenset(["to", "int", "long", "contiguous", "clone", "cuda", "cpu", "type"])
MAKERS = frozenset(["zeros", "new_zeros"])
COUNTS = frozenset(["sum", "count_nonzero"])


@dataclass(frozen=True)
class Boundary:
    """``known`` plus the run-time values of ``counted``, 0-d nodes."""

    known: sympy.Expr
    counted: tuple[fx.Node, ...] = ()

    def __add__(self, other: Boundary) -> Boundary:
        return Boundary(self.known + other.known, (*self.counted, *other.counted))


ZERO = Boundary(sympy.Integer(0))


def elements(vector: Any, before: fx.Node) -> list[Boundary] | None:
    """The elements of a 1-D integer tensor as ``before`` reads them; None where the graph does not say."""
    if isinstance(vector, (tuple, list)):
        return _all(scalar(item, before) for item in vector)
    value = fake_tensor(vector)
    if value is None or value.dim() != 1 or not isinstance(vector, fx.Node):
        return None
    name = target_name(vector)
    if vector.op not in ("call_function", "call_method") or name in MAKERS:
        count = _count(value)
        start = [ZERO] * count if name in MAKERS and count is not None else None
        return _written(vector, start, before)
    found = _elements_of_call(vector, name, before)
    return _written(vector, found, before)


def _elements_of_call(vector: fx.Node, name: str, before: fx.Node) -> list[Boundary] | None:
    first = argument(vector, 0, "input")
    if name in CASTS:
        return elements(first, before)
    if name in ("tensor", "as_tensor"):
        return elements(argument(vector, 0, "data"), before) if isinstance(first, (tuple, list)) else None
    if name == "arange":
        return _arange(vector)
    if name == "cumsum":
        parts = elements(first, before)
        return list(itertools.accumulate(parts)) if parts is not None else None
    if name in ("cat", "concat"):
        lists = [elements(part, before) for part in argument(vector, 0, "tensors")]
        return None if any(part is None for part in lists) else [item for part in lists for item in part or ()]
    if name == "pad":
        parts, width = elements(first, before), argument(vector, 1, "pad")
        plain = argument(vector, 2, "mode", "constant") == "constant" and not argument(vector, 3, "value")
        if parts is None or not plain or list(width) != [1, 0]:
            return None
        return [ZERO, *parts]
    return None


def _arange(node: fx.Node) -> list[Boundary] | None:
    numbers = [number for value in node.args if (number := _expression(value)) is not None]
    if not 1 <= len(numbers) == len(node.args) <= 3:
        return None
    start = numbers[0] if len(numbers) > 1 else sympy.Integer(0)
    step = numbers[2] if len(numbers) > 2 else sympy.Integer(1)
    count = _count(fake_tensor(node))  # type: ignore[arg-type]
    return [Boundary(start + i * step) for i in range(count)] if count is not None else None


def _count(vector: torch.Tensor) -> int | None:
    """Length of a vector, if it is a constant."""
    size = size_of(vector.shape[0])
    return int(size.expr) if size.expr.is_number else None


def _written(vector: fx.Node, found: list[Boundary] | None, before: fx.Node) -> list[Boundary] | None:
    """``found`` after the writes by constant index that lie ahead of ``before``; None if something else may write."""
    for user in sorted(vector.users):
        if user >= before:
            continue
        if user.op == "call_function" and target_name(user) == "setitem" and user.args[0] is vector:
            index, value = user.args[1], scalar(user.args[2], before)
            if found is None or value is None or not isinstance(index, int) or not -len(found) <= index < len(found):
                return None
            found[index] = value
        elif mutates(user) or (target_name(user) in MAY_ALIAS and _is_written(user)):
            return None
    return found


def _is_written(view: fx.Node) -> bool:
    """Whether someone writes through a view, or a view of it."""
    return any(mutates(user) or (target_name(user) in MAY_ALIAS and _is_written(user)) for user in view.users)


def scalar(value: Any, before: fx.Node) -> Boundary | None:
    """A 0-d integer: a number, a size, or a sum of those and of counts."""
    known = _expression(value)
    if known is not None:
        return Boundary(known)
    tensor = fake_tensor(value)
    if tensor is None or tensor.dim() != 0 or not isinstance(value, fx.Node):
        return None
    name = target_name(value)
    if name in ("add", "iadd"):
        parts = _all(scalar(item, before) for item in value.args[:2])
        return parts[0] + parts[1] if parts is not None and not value.kwargs else None
    if name in ("sub", "isub") and not value.kwargs:
        left, right = scalar(value.args[0], before), scalar(value.args[1], before)
        return Boundary(left.known - right.known, left.counted) if left and right and not right.counted else None
    if name in CASTS:
        return scalar(value.args[0], before)
    if name == "getitem" and isinstance(value.args[1], int):
        known_list = elements(value.args[0], before)
        if known_list is not None:
            return known_list[value.args[1]]
    return Boundary(sympy.Integer(0), (value,))


def _expression(value: Any) -> sympy.Expr | None:
    value = fake_value(value)
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        return None
    return size_of(value).expr


def _all(items: Any) -> list[Boundary] | None:
    listed = list(items)
    return None if any(item is None for item in listed) else listed


def counted_mask(node: fx.Node) -> fx.Node | None:
    """The [B, text] mask whose kept tokens ``node`` counts for one sample; None when it is no such count."""
    while target_name(node) in CASTS and isinstance(node.args[0], fx.Node):
        node = node.args[0]
    if target_name(node) == "getitem" and isinstance(node.args[0], fx.Node):
        node = node.args[0]
    while target_name(node) in CASTS and isinstance(node.args[0], fx.Node):
        node = node.args[0]
    if target_name(node) not in COUNTS:
        return None
    mask, dim = argument(node, 0, "input"), argument(node, 1, "dim", node.kwargs.get("axis"))
    dims = [dim] if isinstance(dim, int) else dim
    if not isinstance(mask, fx.Node) or fake_tensor(mask) is None or not isinstance(dims, (tuple, list)):
        return None
    rank = len(shape_of(mask))
    return mask if rank >= 1 and [d % rank for d in dims] == [rank - 1] else None
