"""Where the grid of a run of tokens is learned: its label, what it met in the graph, or the values of a rotary table.

1. The run is the product of three axes of one input, such as a 5-D latent: those, in row-major order.
2. The run is opaque (tokens arrive packed), but a tensor that it met element by element is a product of three: axes
   of one input, or three counted ones (``meshgrid`` of ``arange``) that the call's sizes prove to be t, h and w in this
   order (:mod:`fpscompile.passes.counted_axes`).
3. A table that it met has values that prove a grid (:mod:`fpscompile.rotary_grid`). The part of the graph that makes
   the table is evaluated once on the call's own inputs; at run time the compiled graph reads its table anew.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import fx
from torch.utils._python_dispatch import _disable_current_modes

from fpscompile.ir import Reason, Rejection, Size
from fpscompile.passes import counted_axes
from fpscompile.passes.axes import INPUT, Atom, Axis, Slice, axis_size, describe, joined, root
from fpscompile.passes.base import GraphState, fake_tensor, fake_value, shape_of, target_name
from fpscompile.passes.trace_axes import Meeting, is_parameter
from fpscompile.rotary_grid import contradicts, grid_of_table

logger = logging.getLogger(__name__)

Grid = tuple[Size, Size, Size]
MOST_NODES = 400
"""A rotary table takes some dozens of nodes; what takes more is no table."""
FLATTEN = (
    "flatten t, h and w in this order ahead of the blocks, such as x.permute(0, 2, 3, 4, 1).flatten(1, 3) where x is "
    "[B, C, T, H, W]"
)


def grid_of(axis: Axis) -> Grid | Rejection | None:
    """(t, h, w) of a run of tokens; a Rejection when it is a video in another order; None when it is no video."""
    if len(axis) < 3:
        return None
    roots = [lead for factor in axis if (lead := root((factor,))) is not None]
    if len(roots) != len(axis):
        return None
    if all(lead.role == "counted" for lead in roots):
        if len({lead.name for lead in roots}) != 3 or len(axis) != 3:
            return None
    else:
        # An axis that several tensors share end to end may be rooted in another of them than the rest.
        shared = [joined((factor,)) for factor in axis]
        origins = {lead.origin for lead, several in zip(roots, shared, strict=True) if not several}
        if len(origins) > 1 or any(lead.source != INPUT for lead in roots):
            return None
        origins |= {lead.origin for lead in roots}
        if len(axis) > 3:
            return Rejection(
                Reason.TOKEN_ORDER,
                f"the tokens are an interleaving of {len(axis)} axes ({describe(axis)}), not row-major (t, h, w); "
                f"{FLATTEN}",
                describe(axis),
            )
        dims = [lead.dim for lead in roots]
        if len(set(dims)) == 1:
            return None  # one axis taken apart: nothing says that its parts are (t, h, w)
        if dims != sorted(set(dims)):
            tensors = " and ".join(sorted(origins))
            return Rejection(
                Reason.TOKEN_ORDER,
                f"the tokens run over dimensions {dims} of {tensors}, not in row-major (t, h, w) order; {FLATTEN}",
                dims,
            )
    t, h, w = (factor.size for factor in axis)
    return (t, h, w) if t.hint > 1 else None


def proven(state: GraphState, run: Axis) -> Grid | Rejection | None:
    """The grid that the graph shows for a run: its own, or that of what an opaque run met. Disagreement is none.

    A Rejection with the code "no-grid" says why what the run met does not prove one; other sources still may.
    """
    own = _ordered(state, run)
    if own is not None or not opaque(run):
        return own
    found: list[Grid] = []
    unclear: Rejection | None = None
    for meeting in state.meetings.get(run, ()):
        other = _ordered(state, meeting.axis)
        if isinstance(other, Rejection):
            if other.code is not Reason.NO_GRID:
                return other
            unclear = other
        elif other is not None and not any(_alike(other, grid) for grid in found):
            found.append(other)
    return found[0] if len(found) == 1 else None if found else unclear


def _ordered(state: GraphState, axis: Axis) -> Grid | Rejection | None:
    """:func:`grid_of`, where counted axes are known to be in order."""
    grid = grid_of(axis)
    if not isinstance(grid, tuple):
        return grid
    lead = root(axis[:1])
    return counted_axes.in_order(state, grid) if lead is not None and lead.role == "counted" else grid


def counted(state: GraphState, run: Axis) -> bool:
    """Whether the grid that the graph shows for a run is that of three counted axes."""
    axes = [run, *(meeting.axis for meeting in state.meetings.get(run, ()))] if opaque(run) else [run]
    shown = [root(axis[:1]) for axis in axes if isinstance(grid_of(axis), tuple)]
    return bool(shown) and all(lead is not None and lead.role == "counted" for lead in shown)


def _alike(left: Grid, right: Grid) -> bool:
    return all(a.hint == b.hint for a, b in zip(left, right, strict=True))


def opaque(run: Axis) -> bool:
    """Whether a run's label says nothing of what it is made of."""
    return len(run) == 1 and (
        (isinstance(run[0], Atom) and run[0].role in ("root", "chosen", "gathered")) or isinstance(run[0], Slice)
    )


@dataclass(frozen=True)
class RotaryTable:
    """A tensor of the graph whose rows [start, start + count) along ``dim`` show the grid."""

    node: fx.Node
    dim: int
    start: Size
    count: Size
    grid: Grid


def rotary_table(state: GraphState, run: Axis) -> RotaryTable | None:
    """A table that an opaque run met and whose values prove a grid for the run, or for its head or tail."""
    if not opaque(run):
        return None
    found: dict[tuple[int, int, int, int], RotaryTable] = {}
    for meeting in _tables(state, run):
        table = _values(state, meeting.node)
        if table is None:
            continue
        for start, count in _parts(state, axis_size(run)):
            grid = grid_of_table(table, meeting.dim, start.hint, count.hint)
            if grid is not None:
                t, h, w = (Size(sympy.Integer(n), n) for n in grid)
                key = (start.hint, *grid)
                found.setdefault(key, RotaryTable(meeting.node, meeting.dim, start, count, (t, h, w)))
                break
    return next(iter(found.values())) if len(found) == 1 else None


def disputed(state: GraphState, run: Axis, told: tuple[int, int, int]) -> fx.Node | None:
    """A table that a run met and whose values show its tokens in another order than the rows of a told grid."""
    if opaque(run):
        for meeting in _tables(state, run):
            table = _values(state, meeting.node)
            if table is not None and contradicts(table, meeting.dim, told):
                return meeting.node
    return None


def _tables(state: GraphState, run: Axis) -> Iterator[Meeting]:
    """Tensors that the run met and that could be tables: real or complex numbers, many columns per token."""
    seen = set()
    for meeting in state.meetings.get(run, ()):
        value = fake_tensor(meeting.node)
        if meeting.node in seen or value is None or not (value.is_floating_point() or value.is_complex()):
            continue
        columns = [size.hint for dim, size in enumerate(shape_of(meeting.node)) if dim != meeting.dim]
        if max(columns, default=1) >= 3:
            seen.add(meeting.node)
            yield meeting


def _parts(state: GraphState, length: Size) -> Iterator[tuple[Size, Size]]:
    """The whole run, then its tails and heads as long as some input of the call is."""
    zero = Size(sympy.Integer(0), 0)
    yield zero, length
    lengths: dict[sympy.Expr, Size] = {}
    for node in state.graph.nodes:
        if node.op == "placeholder" and fake_tensor(node) is not None and not is_parameter(node):
            for size in shape_of(node):
                if 8 <= size.hint < length.hint and 2 * size.hint > length.hint:
                    lengths[size.expr] = size
    for size in lengths.values():
        yield Size(length.expr - size.expr, length.hint - size.hint), size
        yield zero, size


def _values(state: GraphState, node: fx.Node) -> torch.Tensor | None:
    """The tensor that a node computes in the call being compiled, or None when that is unknown or no small matter."""
    needed: dict[fx.Node, None] = {}
    stack = [node]
    while stack:
        current = stack.pop()
        if current in needed:
            continue
        needed[current] = None
        stack.extend(current.all_input_nodes)
        # What is written in place reads like its source; the writes belong to it.
        stack.extend(user for user in current.users if target_name(user) == "setitem" and user.args[0] is current)
        if len(needed) > MOST_NODES:
            return None
    environment: dict[fx.Node, Any] = {}
    try:
        with _disable_current_modes(), torch.no_grad():
            for current in state.graph.nodes:
                if current in needed:
                    environment[current] = _run(state, current, environment)
    except Exception:  # whatever stands in the way, the table is unknown then
        logger.debug("the values of %s are unknown", node, exc_info=True)
        return None
    value = environment.get(node)
    return value if isinstance(value, torch.Tensor) else None


def _run(state: GraphState, node: fx.Node, environment: dict[fx.Node, Any]) -> Any:
    if node.op == "placeholder":
        return _example(node)
    if node.op == "get_attr":
        value: Any = state.gm
        for name in str(node.target).split("."):
            value = getattr(value, name)
        return value
    args = fx.map_arg(node.args, environment.__getitem__)
    kwargs = fx.map_arg(node.kwargs, environment.__getitem__)
    if node.op == "call_method":
        return getattr(args[0], str(node.target))(*args[1:], **kwargs)
    if node.op != "call_function":
        raise LookupError(node)
    return node.target(*args, **kwargs)  # type: ignore[operator]


def _example(node: fx.Node) -> Any:
    """The value of an input in this call: a copy, for what is evaluated may write into it."""
    value = fake_value(node)
    if isinstance(value, (torch.SymInt, int)):
        return int(value.node.hint) if isinstance(value, torch.SymInt) else value
    argument = node.meta.get("grapharg")
    example = argument.example if argument is not None else None
    if not isinstance(example, torch.Tensor) or isinstance(example, torch._subclasses.FakeTensor):
        raise LookupError(node)
    return example.detach().clone()
