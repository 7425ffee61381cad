"""Which of three counted axes (``meshgrid`` of ``arange``) are t, h and w: their own names do not say.

Packed tokens get their places from counters, and an author may count in any order (h, w, t). What tells is

1. a grid that ``attach`` or ``options["grid"]`` names, if it has as many tokens; whoever reads the axes compares;
2. integers of the call, such as ``num_frames``, ``height`` and ``width``: arguments of the frame that Dynamo compiles,
   or attributes of its module. The axes have these sizes, or an integer fraction of them (patches), in one order only.

Two axes of one size (but 1) look alike to the second: it proves nothing then. Without either the order is unknown.
"""

from __future__ import annotations

import inspect
import itertools
import math
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import torch
from torch._dynamo.symbolic_convert import InstructionTranslator

from fpscompile.ir import Reason, Rejection, Size
from fpscompile.passes.base import GraphState, words
from fpscompile.passes.not_video import REMEDY

Grid = tuple[Size, Size, Size]
Values = tuple[frozenset[int], frozenset[int], frozenset[int]]
NAMES = (words("t f time temporal frame frames nt nf"), words("h height rows nh"), words("w width columns cols nw"))
"""Words in names of sizes along t, h and w."""


def in_order(state: GraphState, grid: Grid) -> Grid | Rejection | None:
    """``grid`` where the axes are known to be (t, h, w); None where nothing tells.

    A Rejection with the code "token-order" where they are not (t, h, w), and with "no-grid" where the call has these
    sizes and they do not tell the axes apart.
    """
    sizes = tuple(size.hint for size in grid)
    told = state.settings.grid or state.published_grid
    if told is not None and math.prod(told) == math.prod(sizes):
        return grid
    values = named_sizes()
    for fits in (_equal, _multiple):
        orders = {order for order in itertools.permutations(sizes) if all(map(fits, order, values))}
        if sizes in orders:
            unclear = _alike(sizes, orders)
            return grid if unclear is None else Rejection(Reason.NO_GRID, f"{unclear}; {REMEDY}", sizes)
        if orders:
            t, h, w = orders.pop()
            message = (
                f"the tokens are counted as {sizes}, and the call has {t} frames, {h} rows and {w} columns: they are "
                "not in row-major (t, h, w) order; count and flatten t, h and w in this order ahead of the blocks"
            )
            return Rejection(Reason.TOKEN_ORDER, message, sizes)
    return None


def _alike(sizes: tuple[int, ...], orders: Collection[tuple[int, ...]]) -> str | None:
    """Why sizes of the call do not tell the axes apart; None if they do."""
    twice = next((size for size in sizes if size > 1 and sizes.count(size) > 1), None)
    if twice is not None:
        return (
            f"the tokens are counted as {sizes}, and since two of these axes have the size {twice}, the sizes of the "
            "call do not tell whether they are counted in the order (t, h, w)"
        )
    if len(orders) > 1:
        others = " and ".join(map(str, sorted(orders)))
        return f"the tokens are counted as {sizes}, and the sizes that the call names fit (t, h, w) = {others}"
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
