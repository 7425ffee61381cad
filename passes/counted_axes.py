"""Which of three counted axes (``meshgrid`` of ``arange``) are t, h and w: their own names do not say.

Packed tokens get their places from counters, and an author may count in any order (h, w, t). What tells is

1. a grid that ``attach`` or ``options["grid"]`` names; whoever reads the axes compares them with it;
2. integers of the call, such as ``num_frames``, ``height`` and ``width``: arguments of the frame that Dynamo compiles,
   or attributes of its module. The axes have these sizes, or an integer fraction of them (patches).

Without either the order is unknown, and the axes prove nothing.
"""

from __future__ import annotations

import inspect
import itertools
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch._dynamo.symbolic_convert import InstructionTranslator

from fpscompile.ir import Reason, Rejection, Size
from fpscompile.passes.base import GraphState, words

Grid = tuple[Size, Size, Size]
Values = tuple[frozenset[int], frozenset[int], frozenset[int]]
NAMES = (words("t f time temporal frame frames nt nf"), words("h height rows nh"), words("w width columns cols nw"))
"""Words in names of sizes along t, h and w."""


def in_order(state: GraphState, grid: Grid) -> Grid | Rejection | None:
    """``grid`` where the axes are known to be (t, h, w), a Rejection where they are not, None where nothing tells."""
    if state.published_grid is not None or state.settings.grid is not None:
        return grid
    sizes = tuple(size.hint for size in grid)
    values = named_sizes()
    for fits in (_equal, _multiple):
        orders = {order for order in itertools.permutations(sizes) if all(map(fits, order, values))}
        if sizes in orders and (fits is _equal or len(orders) == 1):
            return grid
        if sizes not in orders and orders:
            t, h, w = orders.pop()
            message = (
                f"the tokens are counted as {sizes}, and the call has {t} frames, {h} rows and {w} columns: they are "
                "not in row-major (t, h, w) order"
            )
            return Rejection(Reason.TOKEN_ORDER, message, sizes)
    return None


def _equal(size: int, values: frozenset[int]) -> bool:
    return size in values


def _multiple(size: int, values: frozenset[int]) -> bool:
    return any(value % size == 0 for value in values)


def named_sizes() -> Values:
    """Integers of the frame being compiled whose names say that they are sizes along t, h or w."""
    try:
        scope = InstructionTranslator.current_tx().output.local_scope
    except (AttributeError, AssertionError):
        scope = {}
    found: tuple[set[int], ...] = (set(), set(), set())
    for name, value in _named(scope):
        kinds = [index for index, known in enumerate(NAMES) if known & set(re.split(r"[^a-z]+", name.lower()))]
        if len(kinds) == 1 and isinstance(value, int) and not isinstance(value, bool) and value > 0:
            found[kinds[0]].add(value)
    t, h, w = map(frozenset, found)
    return (t, h, w)


def _named(scope: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Locals, what a decorated forward hides in ``args`` and ``kwargs``, and attributes of the module."""
    module = scope.get("self")
    yield from scope.items()
    for value in scope.values():
        if isinstance(value, dict):
            yield from ((name, item) for name, item in value.items() if isinstance(name, str))
    if not isinstance(module, torch.nn.Module):
        return
    if isinstance(scope.get("args"), tuple):
        yield from zip(_parameters(module.forward), scope["args"], strict=False)
    yield from vars(module).items()


def _parameters(forward: Callable[..., Any]) -> list[str]:
    try:
        return list(inspect.signature(forward).parameters)
    except (TypeError, ValueError):
        return []
