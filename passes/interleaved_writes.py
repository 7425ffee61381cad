"""Writes to every n-th place of a new tensor, all n of them, become one expression.

Rotary embeddings of the Wan family fill an empty tensor in two steps::

    out = torch.empty_like(x)
    out[..., 0::2] = a
    out[..., 1::2] = b

Inductor makes a chain of scatters of it: each element of ``out`` evaluates both sides under masks, or both go through
memory in float32 first. ``out`` becomes, with ``a`` and ``b`` cast and broadcast as the writes would,

- on a CPU ``stack((a, b), -1).flatten(-2)``, of which the generated C++ computes each side once;
- on a GPU the same where ``a`` or ``b`` comes out of a normalization: that is more than Inductor evaluates in place, so
  that it puts both sides into memory, and into that of a ``stack`` as they are to lie there (Wan 14B at 720p on an
  H200, normalization and embedding: 2.4 ms for 3.1 with a ``where``);
- else ``where(arange(2) == 0, a[..., None], b[..., None]).flatten(-2)``: without masks the loads of both sides are the
  same, so the generated kernel has half of them (same sizes, the embedding alone: 1.1 ms for 1.4 with a ``stack``).

Legality, all of it; otherwise the writes stay as they are:

1. ``out`` is new (empty, zeros or alike), strided as a contiguous tensor, floating.
2. The first n readers of ``out`` are writes to ``[..., i::n]``, each i from 0 to n - 1 once, and n divides the last
   size: every element is written once. Nothing else reads ``out`` before the last of them, nor writes to it after.
3. What is written are floating tensors on ``out``'s device, at least one of them of the places' own shape.
4. Between the writes nothing is written into what they read, and gradients and autocast are neither turned on nor off.

The result has the same bits, strides and gradients.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Sequence

import sympy
import torch
from torch import fx
from torch.utils._sympy.functions import Max

from fpscompile.ir import Size
from fpscompile.passes.aliasing import mode_changes_between, mutates, written_between
from fpscompile.passes.axes import same
from fpscompile.passes.base import GraphState, copy_origin, emit, fake_tensor, shape_of, size_of, target_name, words

logger = logging.getLogger(__name__)

NEW = words("empty empty_like zeros zeros_like new_empty new_zeros")
"""Ops that make a tensor which nobody else has."""

NORMS = words(
    "rms_norm layer_norm group_norm instance_norm batch_norm normalize mean var var_mean std norm vector_norm"
)
"""Reductions whose results are put to use elementwise."""

STORED = words("linear matmul bmm mm addmm einsum conv1d conv2d conv3d scaled_dot_product_attention embedding")
"""Ops whose results are in memory, whatever reads them."""


def join_writes(state: GraphState) -> bool:
    """Rewrite the interleaved writes of a graph. Returns whether it changed."""
    found = 0
    for node in list(state.graph.nodes):
        if node.op in ("call_function", "call_method") and target_name(node) in NEW:
            writes = _writes(node)
            found += bool(writes) and _join(state, node, writes)
    if found:
        logger.debug("interleaved writes into %d tensors became expressions", found)
    return found > 0


def _writes(buffer: fx.Node) -> list[fx.Node]:
    """The writes that fill ``buffer``, by place; none where they cannot be joined."""
    if not _is_plain(buffer):
        return []
    users = sorted(buffer.users)
    step = _place(buffer, users[0])[1] if users else 0
    writes = users[:step]
    places = [_place(buffer, user) for user in writes]
    last_size = shape_of(buffer)[-1].expr
    if step < 2 or sorted(places) != [(i, step) for i in range(step)] or sympy.Mod(last_size, step) != 0:
        return []
    if any(mutates(user) for user in users[step:]) or mode_changes_between(buffer, writes[-1]) is not None:
        return []
    values = [write.args[2] for write in writes]
    if written_between(writes[0], writes[-1], values, writes) is not None:
        return []
    return [write for _, write in sorted(zip(places, writes, strict=True))]


def _is_plain(buffer: fx.Node) -> bool:
    """Whether a new tensor is floating, strided as a contiguous one, and nothing special otherwise."""
    value = fake_tensor(buffer)
    if value is None or value.layout != torch.strided or not value.is_floating_point() or value.dim() == 0:
        return False
    if buffer.kwargs.get("out") is not None or any(buffer.kwargs.get(key) for key in ("requires_grad", "pin_memory")):
        return False
    return _strides(value) == _contiguous(value)


def _strides(value: torch.Tensor) -> list[sympy.Expr]:
    return [sympy.expand(size_of(stride).expr.replace(Max, _without_one)) for stride in value.stride()]


def _without_one(*terms: sympy.Expr) -> sympy.Expr:
    """``Max(1, size)``, which PyTorch writes into strides for the sake of empty tensors, as the size."""
    return Max(*[term for term in terms if term != 1])


def _contiguous(value: torch.Tensor) -> list[sympy.Expr]:
    """Strides of a contiguous tensor of this shape, as expressions: no guard is installed."""
    sizes = [size_of(size).expr for size in value.shape]
    products = itertools.accumulate(reversed(sizes[1:]), lambda left, right: left * right, initial=sympy.Integer(1))
    return [sympy.expand(product) for product in products][::-1]


def _place(buffer: fx.Node, user: fx.Node) -> tuple[int, int]:
    """(i, n) of ``buffer[..., i::n] = value``; (0, 0) for another use."""
    nothing = (0, 0)
    if user.op != "call_function" or target_name(user) != "setitem" or user.users or user.args[0] is not buffer:
        return nothing
    _, index, value = user.args
    written, target = fake_tensor(value), fake_tensor(buffer)
    if not isinstance(value, fx.Node) or value is buffer or written is None or target is None:
        return nothing
    if not written.is_floating_point() or written.device != target.device:
        return nothing
    if not isinstance(index, tuple) or not index or not isinstance(index[-1], slice):
        return nothing
    ahead, last = index[:-1], index[-1]
    whole = ahead == (Ellipsis,) or (len(ahead) == target.dim() - 1 and all(item == slice(None) for item in ahead))
    start, step = 0 if last.start is None else last.start, last.step
    if not whole or type(start) is not int or type(step) is not int or last.stop is not None:
        return nothing
    return (start, step) if 0 <= start < step else nothing


def _join(state: GraphState, buffer: fx.Node, writes: Sequence[fx.Node]) -> bool:
    last = max(writes)
    ahead = last.prev
    with state.graph.inserting_before(last):
        result = _expression(state, buffer, writes)
    if result is None or not _alike(result, buffer):
        while last.prev is not ahead:
            state.graph.erase_node(last.prev)
        return False
    copy_origin(result, last)
    buffer.replace_all_uses_with(result, delete_user_cb=lambda user: user not in writes)
    for write in sorted(writes, reverse=True):
        state.graph.erase_node(write)
    state.graph.erase_node(buffer)
    return True


def _expression(state: GraphState, buffer: fx.Node, writes: Sequence[fx.Node]) -> fx.Node | None:
    """The tensor that the writes leave, or None where none of their values has the shape of its places."""
    target = fake_tensor(buffer)
    assert target is not None
    *ahead, size = shape_of(buffer)
    count = len(writes)
    region = [*ahead, Size(size.expr / count, size.hint // count)]
    values: list[fx.Node] = [write.args[2] for write in writes]  # type: ignore[misc]
    values = [x if fake_tensor(x).dtype == target.dtype else emit(state, "to", (x, target.dtype)) for x in values]  # type: ignore[union-attr]
    full = next((value for value in values if _has_shape(value, region)), None)
    if full is None or not all(_fits(value, region) for value in values):
        return None
    values = [x if _has_shape(x, region) else emit(state, "expand_as", (x, full)) for x in values]
    write = _stacked if target.device.type == "cpu" or _normalized(values) else _chosen
    return emit(state, "flatten", (write(state, values), -2))


def _normalized(values: Sequence[fx.Node]) -> bool:
    """Whether a normalization is among what is evaluated for these values."""
    seen, waiting = set(values), list(values)
    while waiting:
        node = waiting.pop()
        name = target_name(node) if node.op in ("call_function", "call_method") else ""
        if name in NORMS:
            return True
        if name and name not in STORED:
            fresh = [x for x in node.all_input_nodes if x not in seen]
            seen.update(fresh)
            waiting += fresh
    return False


def _stacked(state: GraphState, values: Sequence[fx.Node]) -> fx.Node:
    return emit(state, torch.stack, (tuple(values), -1))


def _chosen(state: GraphState, values: Sequence[fx.Node]) -> fx.Node:
    device = fake_tensor(values[0]).device  # type: ignore[union-attr]
    places = emit(state, torch.arange, (len(values),), {"device": device})
    *rest, result = [emit(state, "unsqueeze", (value, -1)) for value in values]
    for place, value in reversed(list(enumerate(rest))):
        result = emit(state, torch.where, (emit(state, "eq", (places, place)), value, result))
    return result


def _has_shape(node: fx.Node, region: Sequence[Size]) -> bool:
    sizes = shape_of(node)
    return len(sizes) == len(region) and all(same(a, b) for a, b in zip(sizes, region, strict=True))


def _fits(node: fx.Node, region: Sequence[Size]) -> bool:
    """Whether a tensor broadcasts to a shape, for every value of the symbols."""
    sizes = shape_of(node)
    pairs = zip(reversed(sizes), reversed(region), strict=False)
    return len(sizes) <= len(region) and all(a.expr == 1 or same(a, b) for a, b in pairs)


def _alike(result: fx.Node, buffer: fx.Node) -> bool:
    """Whether two tensors have one shape, dtype and strides."""
    ours, theirs = fake_tensor(result), fake_tensor(buffer)
    assert ours is not None
    assert theirs is not None
    return ours.dtype == theirs.dtype and _has_shape(result, shape_of(buffer)) and _strides(ours) == _strides(theirs)
