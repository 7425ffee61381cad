"""Attention in pieces: one call for each slice of the queries, the results concatenated.

All pieces must read the same keys, values, mask and scale, their queries must be consecutive slices that cover one
tensor, and the results must be put together along the same axis, in order, after the same steps. Then they are one
call. Pieces over slices of the batch or of the heads are whole attentions already and stay apart.
"""

from __future__ import annotations

import functools
import itertools
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import fx

from fpscompile.ir import Reason, Rejection, Size
from fpscompile.passes.aliasing import mode_changes_between, written_between
from fpscompile.passes.axes import Axis, atom
from fpscompile.passes.base import GraphState, argument, emit, fake_tensor, fake_value, shape_of, size_of, target_name
from fpscompile.passes.canonical import attention, is_canonical, substitute
from fpscompile.passes.trace_axes import Tracer

STEPS = frozenset(["transpose", "permute", "squeeze", "unsqueeze", "contiguous", "flatten", "reshape", "view", "to"])
BETWEEN = frozenset(["transpose", "permute", "unsqueeze", "contiguous", "mul", "to"])
"""Steps from a slice of the queries to a call that do not depend on the slice's length."""

PURE = BETWEEN | {"getattr", "permute", "squeeze", "float", "type_as", "logical_not"}
"""Ops without effects: equal operands, equal results."""

DEPTH = 8


@dataclass(frozen=True)
class _Slice:
    """A slice of ``whole`` along ``dim``, and the steps from it to the queries of a call."""

    whole: fx.Node
    dim: int
    start: sympy.Expr
    stop: sympy.Expr
    steps: tuple[fx.Node, ...]


def join_chunks(state: GraphState) -> bool:
    """Join the pieces of every chunked attention of a graph. Returns whether it changed."""
    changed = False
    for node in list(state.graph.nodes):
        if node.op == "call_function" and target_name(node) in ("cat", "concat") and not node._erased:
            parts = argument(node, 0, "tensors")
            if isinstance(parts, (tuple, list)) and len(parts) > 1:
                changed |= _join(state, node, list(parts))
    return changed


def _join(state: GraphState, node: fx.Node, parts: list[Any]) -> bool:
    trails = [_trail(part) for part in parts]
    if any(trail is None for trail in trails):
        return False
    calls = [trail[0] for trail in trails if trail is not None]
    if len(set(calls)) != len(calls) or not all(is_canonical(call) for call in calls):
        return False
    problem = _problem(node, trails)  # type: ignore[arg-type]
    if problem is not None:
        message = f"looks like attention in pieces, but {problem}"
        state.near_misses.append(Rejection(Reason.SPELLING, message, None, node))
        return False
    slices = [_slice_of(call.args[0]) for call in calls]
    covered = [step for trail in reversed(trails) if trail is not None for step in (*trail[1], trail[0])]
    first = calls[0]

    def write() -> tuple[fx.Node, fx.Node]:
        query = _replay(state, slices[0])  # type: ignore[arg-type]
        _, key, value = first.args[:3]
        call = attention(state, query, key, value, first.kwargs["attn_mask"], first.kwargs["scale"])  # type: ignore[arg-type]
        return call, _arranged(state, call, trails[0], node)  # type: ignore[arg-type]

    declined = next((state.declined[call] for call in calls if call in state.declined), None)
    return substitute(state, node, covered, write, declined) is not None


def _trail(part: Any) -> tuple[fx.Node, tuple[fx.Node, ...]] | None:
    """The call that ``part`` comes from and the steps in between, last first."""
    steps = []
    while isinstance(part, fx.Node) and len(part.users) == 1 and not is_canonical(part):
        if part.op not in ("call_function", "call_method") or target_name(part) not in STEPS:
            return None
        steps.append(part)
        part = part.args[0]
    return (part, tuple(steps)) if isinstance(part, fx.Node) and len(part.users) == 1 else None


def _problem(node: fx.Node, trails: Sequence[tuple[fx.Node, tuple[fx.Node, ...]]]) -> str | None:
    calls = [call for call, _ in trails]
    first = calls[0]
    for call in calls[1:]:
        if not all(_equal(a, b) for a, b in zip(first.args[1:3], call.args[1:3], strict=True)):
            return "its pieces read different keys or values"
        if not all(_equal(first.kwargs[name], call.kwargs[name]) for name in first.kwargs):
            return "its pieces have different masks or scales"
    if first.kwargs["dropout_p"] != 0 or first.kwargs["is_causal"] is not False:
        return "it asks for dropout or a causal mask"
    mask = first.kwargs["attn_mask"]
    if isinstance(mask, fx.Node) and len(shape_of(mask)) >= 2 and shape_of(mask)[-2].expr != 1:
        return "its masks differ from query to query"
    own: list[fx.Node] = []
    shared: list[fx.Node] = []
    for operands in zip(*((*call.args[:3], call.kwargs["attn_mask"]) for call in calls), strict=True):
        each, under = _apart(operands)
        own += each
        shared += under
    earliest = min(calls + own)  # what each has for itself is computed once, from what is there at the end
    if (
        written_between(earliest, node, own + shared, ()) is not None
        or mode_changes_between(earliest, node) is not None
    ):
        return "its inputs or its modes change between the pieces"
    slices = [_slice_of(call.args[0]) for call in calls]
    if any(item is None for item in slices) or not _cover(slices):  # type: ignore[arg-type]
        return "its queries are not consecutive slices of one tensor"
    labels = [_label(call, steps) for call, steps in trails]
    rank = len(shape_of(node))
    dim = argument(node, 1, "dim", node.kwargs.get("axis", 0))
    tokens = [label[dim % rank] for label in labels if len(label) == rank] if isinstance(dim, int) else []
    if len(tokens) != len(trails) or any(len(axis) != 1 or axis[0].name != "L" for axis in tokens):  # type: ignore[union-attr]
        return "its results are not put together along the queries"
    shapes = {tuple(describe_names(label)) for label in labels}
    return None if len(shapes) == 1 else "its results are arranged differently"


def describe_names(label: Sequence[Axis]) -> list[str]:
    return ["*".join(getattr(factor, "name", "?") for factor in axis) for axis in label]


def _label(call: fx.Node, steps: Sequence[fx.Node]) -> tuple[Axis, ...]:
    """What the dims of the end of a trail are made of: B, H, L, D of the call's result."""
    tracer = Tracer()
    tracer.labels[call] = tuple(atom(name, size) for name, size in zip("BHLD", shape_of(call), strict=True))
    for step in reversed(steps):
        tracer.visit(step)
    return tracer.label(steps[0] if steps else call)


def _slice_of(query: Any) -> _Slice | None:
    steps: list[fx.Node] = []
    while isinstance(query, fx.Node) and query.op in ("call_function", "call_method") and len(steps) < DEPTH:
        name = target_name(query)
        if name == "getitem" and isinstance(query.args[0], fx.Node):
            found = _indexed(query.args[0], query.args[1])
            return _Slice(*found, tuple(reversed(steps))) if found is not None else None
        if name not in BETWEEN or len(query.all_input_nodes) != 1:
            return None
        steps.append(query)
        query = query.args[0]
    return None


def _indexed(source: fx.Node, index: Any) -> tuple[fx.Node, int, sympy.Expr, sympy.Expr] | None:
    """(whole, dim, start, stop) of ``source[index]``: one slice of a tensor, or one output of a split."""
    if fake_tensor(source) is None:
        whole, dim = source.args[0], argument(source, 2, "dim", 0)
        if target_name(source) not in ("split", "chunk", "tensor_split") or not isinstance(index, int):
            return None
        if not isinstance(dim, int) or not isinstance(whole, fx.Node):
            return None
        ends = [sympy.Integer(0)]
        for part in source.meta["example_value"]:
            ends.append(ends[-1] + size_of(part.shape[dim]).expr)
        return whole, dim % len(shape_of(whole)), ends[index], ends[index + 1]
    items = index if isinstance(index, tuple) else (index,)
    rank = len(shape_of(source))
    if any(not isinstance(item, slice) and item is not Ellipsis for item in items):
        return None
    place = items.index(Ellipsis) if Ellipsis in items else len(items)
    before, after = items[:place], items[place + 1 :]
    dims = {**dict(enumerate(before)), **{rank - len(after) + i: item for i, item in enumerate(after)}}
    cut = {dim: item for dim, item in dims.items() if item != slice(None)}
    if len(cut) != 1:
        return None
    ((dim, item),) = cut.items()
    size = shape_of(source)[dim]
    start = 0 if item.start is None else fake_value(item.start)
    if item.step not in (None, 1) or not isinstance(start, (int, torch.SymInt)) or size_of(start).hint < 0:
        return None
    stop = size if item.stop is None else fake_value(item.stop)
    if isinstance(stop, (int, torch.SymInt)):
        stop = size if size_of(stop).hint >= size.hint else size_of(stop)
    return (source, dim, size_of(start).expr, stop.expr) if isinstance(stop, Size) and stop.hint >= 0 else None


def _cover(slices: Sequence[_Slice]) -> bool:
    first, last = slices[0], slices[-1]
    if first.start != 0 or last.stop != shape_of(first.whole)[first.dim].expr:
        return False
    for left, right in itertools.pairwise(slices):
        if left.stop != right.start or (left.whole, left.dim) != (right.whole, right.dim):
            return False
        if not all(_same_step(a, b) for a, b in zip(left.steps, right.steps, strict=False)):
            return False
    return len({len(item.steps) for item in slices}) == 1 and _becomes_tokens(first)


def _same_step(left: fx.Node, right: fx.Node) -> bool:
    return (left.target, left.args[1:], left.kwargs) == (right.target, right.args[1:], right.kwargs)


def _becomes_tokens(item: _Slice) -> bool:
    """Whether the sliced dim ends up as the queries' tokens."""
    tracer = Tracer()
    source = item.steps[0].args[0] if item.steps else None
    if not isinstance(source, fx.Node):
        return item.dim == 2
    tracer.labels[source] = tuple(
        atom("L" if dim == item.dim else f"x{dim}", size) for dim, size in enumerate(shape_of(source))
    )
    for step in item.steps:
        tracer.visit(step)
    axis = tracer.label(item.steps[-1])[2]
    return len(axis) == 1 and getattr(axis[0], "name", "") == "L"


def _apart(values: Sequence[Any]) -> tuple[list[fx.Node], list[fx.Node]]:
    """Nodes that pieces have each for itself, one spelled as the other, and those that they share under them."""
    nodes = [value for value in values if isinstance(value, fx.Node)]
    if len(set(nodes)) <= 1:
        return [], nodes[:1]
    own, shared = list(nodes), []
    for operands in zip(*(node.args for node in nodes), strict=False):
        more, under = _apart(operands)
        own += more
        shared += under
    return own, shared


def _equal(left: Any, right: Any, depth: int = DEPTH) -> bool:
    """Whether two values are the same, or are computed in the same way by a few ops without effects."""
    if not isinstance(left, fx.Node) or not isinstance(right, fx.Node):
        return bool(left == right)
    if left is right:
        return True
    if (
        depth == 0
        or left.op not in ("call_function", "call_method")
        or (left.op, left.target) != (right.op, right.target)
    ):
        return False
    if target_name(left) not in PURE or len(left.args) != len(right.args) or left.kwargs != right.kwargs:
        return False
    return all(_equal(a, b, depth - 1) for a, b in zip(left.args, right.args, strict=True))


def _replay(state: GraphState, item: _Slice) -> fx.Node:
    """The queries of all pieces: the steps of the first slice, on the whole."""
    node = item.whole
    for step in item.steps:
        args = (node, *step.args[1:])
        node = emit(state, step.target, args, dict(step.kwargs))  # type: ignore[arg-type]
    return node


def _arranged(state: GraphState, call: fx.Node, trail: tuple[fx.Node, tuple[fx.Node, ...]], node: fx.Node) -> fx.Node:
    """The whole result, dims as in the pieces: a permutation, then dims merged or dropped."""
    label = _label(*trail)
    names = [[getattr(factor, "name", "") for factor in axis] for axis in label]
    order = ["BHLD".index(name) for axis in names for name in axis]
    shape = [
        -1 if "L" in axis else _size(state, call, axis, size)
        for axis, size in zip(names, fake_tensor(node).shape, strict=True)  # type: ignore[union-attr]
    ]
    order += [dim for dim in range(4) if dim not in order]
    return emit(state, "reshape", (emit(state, "permute", (call, tuple(order))), tuple(shape)))


def _size(state: GraphState, call: fx.Node, names: Sequence[str], size: Any) -> Any:
    """A size of the result: a number, or the product of sizes of the call."""
    if isinstance(size, int):
        return size
    factors = [emit(state, "size", (call, "BHLD".index(name))) for name in names]
    return functools.reduce(lambda left, right: emit(state, operator.mul, (left, right)), factors)
