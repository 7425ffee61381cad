"""The canonical attention call, and how it takes the place of another spelling without losing it.

``scaled_dot_product_attention(q, k, v, attn_mask=, dropout_p=, is_causal=, scale=, enable_gqa=)``: q, k, v by position
as [B, heads, L, features], all of the rest by name. What the author wrote stays in the graph, unread, until
:mod:`fpscompile.passes.restore` knows whether the site is rewritten: a call that is not is the author's own again, to
the last bit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx
from torch.nn import functional as F

from fpscompile.ir import Reason, Rejection
from fpscompile.passes.aliasing import mutates
from fpscompile.passes.axes import same
from fpscompile.passes.base import GraphState, Replacement, copy_origin, emit, fake_tensor, shape_of
from fpscompile.passes.strides import is_written, laid_out_as

COVERED = "fps_covered"
"""Meta key of author's calls that a canonical call stands for."""

MANY = 32
"""More readers than this are not looked through."""


def is_canonical(node: fx.Node) -> bool:
    return node.op == "call_function" and node.target is F.scaled_dot_product_attention and COVERED not in node.meta


def attention(
    state: GraphState, query: fx.Node, key: fx.Node, value: fx.Node, mask: fx.Node | None = None, scale: Any = None
) -> fx.Node:
    """A canonical call on [B, heads, L, D] tensors; grouped heads and mixed floating dtypes are allowed.

    q and k that were only upcast are taken as they were; otherwise all three go to the widest dtype, as no product
    of the author's ran in less.
    """
    dtypes = {_tensor(node).dtype for node in (query, key, value)}
    if len(dtypes) > 1:
        query, key = (_before_upcast(node, _tensor(value).dtype) for node in (query, key))
        wide = _tensor(query).dtype
        for node in (key, value):
            wide = torch.promote_types(wide, _tensor(node).dtype)
        query, key, value = (
            node if _tensor(node).dtype == wide else emit(state, "to", (node, wide)) for node in (query, key, value)
        )
    if mask is not None and _tensor(mask).dtype not in (torch.bool, torch.float32, _tensor(query).dtype):
        mask = emit(state, "to", (mask, _tensor(query).dtype))
    heads = [shape_of(node)[1] for node in (query, key)]
    options = {"attn_mask": mask, "dropout_p": 0.0, "is_causal": False, "scale": scale}
    options["enable_gqa"] = not same(*heads)
    call = emit(state, F.scaled_dot_product_attention, (query, key, value), options)
    if _tensor(call).dtype != _tensor(query).dtype:  # autocast: the call casts, and what takes its place does not
        call.args = in_dtype(state, call, _tensor(call).dtype)
    return call


def in_dtype(state: GraphState, call: fx.Node, dtype: torch.dtype) -> tuple[fx.Node, ...]:
    """The call's q, k and v in a dtype, cast in front of the call where they are not."""
    tensors = [tensor for tensor in call.args[:3] if isinstance(tensor, fx.Node)]
    with state.graph.inserting_before(call):
        return tuple(node if _tensor(node).dtype == dtype else emit(state, "to", (node, dtype)) for node in tensors)


def _tensor(node: fx.Node) -> torch.Tensor:
    value = fake_tensor(node)
    assert value is not None
    return value


def _before_upcast(node: fx.Node, dtype: torch.dtype) -> fx.Node:
    """The source of a cast from ``dtype`` to a wider one, else ``node``."""
    source = node.args[0] if node.op == "call_method" and node.target in ("float", "double", "to") else None
    if not isinstance(source, fx.Node):
        return node
    before, after = fake_tensor(source), _tensor(node)
    if before is None or before.dtype != dtype or before.device != after.device:
        return node
    if is_written(source) or is_written(node):
        return node
    return source if torch.promote_types(dtype, after.dtype) == after.dtype else node


def substitute(
    state: GraphState,
    original: fx.Node,
    covered: Sequence[fx.Node],
    write: Callable[[], tuple[fx.Node, fx.Node]],
    declined: Rejection | None = None,
    anchor: fx.Node | None = None,
) -> fx.Node | None:
    """Write a canonical call and let everyone who reads ``original`` read its result instead.

    Args:
        covered: nodes that only ``original`` needs, last first, ``original`` itself not among them.
        write: adds nodes; returns the canonical call and the result, shaped as ``original`` is.
        declined: the call stands for something that attention alone is not; it will be put back in any case.
        anchor: where the new nodes go: in front of this one; by default ``original``.

    Returns:
        The canonical call; None, with a near miss on record, when the fake tensors refuse it.
    """
    place = anchor if anchor is not None else original
    ahead = place.prev
    outer = next((node for node in (original, *covered) if node.kwargs.get("out") is not None), None)
    if outer is not None:
        message = f"looks like attention, but {outer} also writes its result into a tensor that is given (out=)"
        state.near_misses.append(Rejection(Reason.SPELLING, message, None, original))
        return None
    try:
        with state.graph.inserting_before(place):
            call, result = write()
            result = _as_before(state, result, original)
    except (RuntimeError, TypeError, ValueError, AssertionError, IndexError) as error:
        _erase(_between(ahead, place))
        message = f"looks like attention, but cannot be written as one call: {error}"
        state.near_misses.append(Rejection(Reason.SPELLING, message, None, original))
        return None
    added = _between(ahead, place)
    copy_origin(call, original)
    original.replace_all_uses_with(result, delete_user_cb=lambda user: user not in covered)
    for node in (original, *covered):
        node.meta[COVERED] = True
    if declined is not None:
        state.declined[call] = declined
    state.replaced.append(Replacement(state, call, result, original, tuple(added), (original, *covered)))
    return call


def _as_before(state: GraphState, result: fx.Node, original: fx.Node) -> fx.Node:
    """The result with the dtype of the original, whose shape it must have, and its strides where they are read."""
    expected, actual = _tensor(original), _tensor(result)
    left, right = shape_of(original), shape_of(result)
    if len(left) != len(right) or not all(same(a, b) for a, b in zip(left, right, strict=True)):
        raise ValueError(f"the result is {list(actual.shape)}, not {list(expected.shape)}")
    if actual.dtype != expected.dtype:
        result = emit(state, "to", (result, expected.dtype))
    laid_out = laid_out_as(state, result, original)
    # Attention keeps its output for the backward; a product of matrices does not, and may be written into.
    kept = laid_out is result and expected.requires_grad and is_written(original)
    return emit(state, "clone", (result,)) if kept else laid_out


def idle_readers(node: fx.Node) -> tuple[fx.Node, ...] | None:
    """All that is computed from ``node``, last first, if none of it is used or written anywhere; else None."""
    found: set[fx.Node] = set()
    pending = [node]
    while pending:
        for user in pending.pop().users:
            if user.op == "output" or mutates(user) or len(found) > MANY:
                return None
            if user not in found:
                found.add(user)
                pending.append(user)
    return tuple(sorted(found, reverse=True))


def _between(first: fx.Node, last: fx.Node) -> list[fx.Node]:
    """Nodes strictly between two nodes, in order."""
    nodes = []
    node = first.next
    while node is not last:
        nodes.append(node)
        node = node.next
    return nodes


def _erase(nodes: Sequence[fx.Node]) -> None:
    for node in reversed(nodes):
        if not node.users:
            node.graph.erase_node(node)
