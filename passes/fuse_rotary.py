"""fuse_rotary: the norm and the rotary embedding of queries and keys become one kernel each, on a GPU.

Wan normalizes over all heads and rotates pairs. As Inductor has it, the values of both go through memory once more, and
all of raw and rotated queries and keys are in memory at once: that is where the peak of a Wan step is. After
``interleaved_writes`` it is spelled ::

    y1, y2 = rms_norm(x, (n,), weight, eps), viewed as [B, tokens, heads, pairs, 2], unbound
    out = stack((y1 cos - y2 sin, y1 sin + y2 cos), -1).flatten(-2), both sides cast to x's dtype

and becomes ``fps::norm_rotate`` (:mod:`fpscompile.rotary_op`).

Legality, all of it; otherwise nothing changes:

1. A site of the graph is rewritten; all is on a GPU, and nothing asks for gradients.
2. The norm is ``rms_norm`` of the last axis, with an eps, of [B, tokens, n] in half or single precision, its weight of
   the same dtype. Views lead from it to ``unbind`` of pairs; what is rotated has the same leading axes.
3. cos and sin are float32 of one value per pair, [1 or B, tokens, 1, pairs]. All are plain tensors.
4. Between the norm and the result nothing is written into what either reads, and gradients and autocast are neither
   turned on nor off.

It runs behind ``lower_sites``, so that everything before sees operations whose axes it can follow.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from fpscompile.passes.aliasing import mode_changes_between, written_between
from fpscompile.passes.axes import same
from fpscompile.passes.base import GraphState, argument, copy_origin, emit, fake_tensor, shape_of, target_name, words
from fpscompile.rotary_op import LONGEST

VIEWS = words("unflatten view reshape flatten")
COVERED = VIEWS | words("stack to sub add mul getitem unbind rms_norm")


@dataclass(frozen=True)
class FuseRotary:
    name: str = "fuse_rotary"

    def run(self, state: GraphState) -> bool:
        found = 0
        if state.rewritten:
            for graph in state.everywhere():
                for node in list(graph.graph.nodes):
                    if _calls(node, "flatten") and _on_gpu(node):
                        found += _fuse(graph, node)
        if found:
            state.note("info", "rotary", f"{found} norms and the rotary embeddings behind them run as one kernel each")
        return found > 0


@dataclass(frozen=True)
class _Norm:
    node: fx.Node
    x: fx.Node
    weight: fx.Node | None
    eps: float


def _fuse(state: GraphState, out: fx.Node) -> bool:
    """Rewrite one ``stack((a, b), -1).flatten(-2)``."""
    stack = out.args[0]
    if out.args[1:] != (-2,) or not _calls(stack, "stack") or stack.args[1:] != (-1,):  # type: ignore[union-attr]
        return False
    sides = stack.args[0]  # type: ignore[union-attr]
    if not isinstance(sides, (tuple, list)) or len(sides) != 2:
        return False
    turned = _turned(*(_uncast(side) for side in sides))
    norm = None if turned is None else _norm_of(turned[0])
    if turned is None or norm is None or not _fits(out, norm, turned):
        return False
    read = (norm.node, norm.x, norm.weight, *turned[1:])
    if written_between(norm.node, out, read, ()) is not None or mode_changes_between(norm.node, out) is not None:
        return False
    with state.graph.inserting_before(out):
        tables = [emit(state, "squeeze", (table, -2)) for table in turned[1:]]
        rotated = emit(state, torch.ops.fps.norm_rotate.default, (norm.x, norm.weight, norm.eps, *tables))
        heads = [size.hint for size in shape_of(out)[2:]]
        result = emit(state, "unflatten", (rotated, -1, heads))
    for node in (rotated, result):
        copy_origin(node, out)
    out.replace_all_uses_with(result)
    _erase_unread(state.graph, out)
    return True


def _erase_unread(graph: fx.Graph, node: fx.Node) -> None:
    """Erase what only the old expression read, or what was asked for its dtype alone, which is the result's."""
    for user in list(node.users):
        if _asks_dtype(user, node) and _same_dtype(user.args[0], node):
            user.replace_all_uses_with(user.args[0])  # type: ignore[arg-type]
            graph.erase_node(user)
    if node.users or node.op not in ("call_function", "call_method") or target_name(node) not in COVERED:
        return
    inputs = node.all_input_nodes
    graph.erase_node(node)
    for each in inputs:
        _erase_unread(graph, each)


def _turned(a: Any, b: Any) -> tuple[fx.Node, fx.Node, fx.Node] | None:
    """(unbind, cos, sin) where a = y1 cos - y2 sin, b = y1 sin + y2 cos, and ``unbind`` gives y1 and y2."""
    if not _calls(a, "sub") or not _calls(b, "add") or a.kwargs or b.kwargs:
        return None
    products = [_product(side) for node in (a, b) for side in node.args]
    if len(products) != 4 or None in products:
        return None
    (pairs, *_), *_ = products  # type: ignore[misc]
    if any(product[0] is not pairs for product in products):  # type: ignore[index]
        return None
    first, second, *both = [product[1:] for product in products]  # type: ignore[index]
    (one, cos), (two, sin) = first, second
    if (one, two) != (0, 1) or sorted(both, key=lambda item: item[0]) != [(0, sin), (1, cos)]:
        return None
    return pairs, cos, sin


def _product(node: Any) -> tuple[fx.Node, int, fx.Node] | None:
    """(unbind, i, table) of the product of its i-th piece and a table."""
    if not _calls(node, "mul") or len(node.args) != 2 or node.kwargs:
        return None
    for piece, table in (node.args, node.args[::-1]):
        if not _calls(piece, "getitem") or not _calls(piece.args[0], "unbind") or type(piece.args[1]) is not int:
            continue
        if isinstance(table, fx.Node):
            return piece.args[0], piece.args[1], table
    return None


def _norm_of(unbind: fx.Node) -> _Norm | None:
    """The norm that ``unbind`` takes apart along its last axis, if nothing else reads it."""
    node, axis = unbind.args[0], argument(unbind, 1, "dim", 0)
    value = fake_tensor(node)
    if value is None or axis not in (-1, value.dim() - 1) or shape_of(node)[-1].expr != 2:  # type: ignore[arg-type]
        return None
    reader = unbind
    while True:
        assert isinstance(node, fx.Node)
        if any(user is not reader and not _asks_dtype(user, node) for user in node.users):
            return None
        if _calls(node, "rms_norm"):
            break
        if not any(_calls(node, name) for name in VIEWS) or not isinstance(node.args[0], fx.Node):
            return None
        node, reader = node.args[0], node
    x, sizes, weight, eps = (
        argument(node, i, name) for i, name in enumerate(("input", "normalized_shape", "weight", "eps"))
    )
    value = fake_tensor(x)
    if not isinstance(eps, float) or value is None or value.dim() != 3:
        return None
    last = shape_of(x)[-1]
    return _Norm(node, x, weight, eps) if last.expr.is_Integer and tuple(sizes) == (last.hint,) else None


def _fits(out: fx.Node, norm: _Norm, turned: tuple[fx.Node, fx.Node, fx.Node]) -> bool:
    """Whether shapes and dtypes are the op's."""
    given, value = fake_tensor(norm.x), fake_tensor(out)
    tables = [fake_tensor(table) for table in turned[1:]]
    normed = fake_tensor(norm.node)
    if given is None or value is None or value.dim() != 4 or any(x is None or x.dim() != 4 for x in tables):
        return False
    if given.dtype not in (torch.float16, torch.bfloat16, torch.float32) or normed is None:
        return False
    if not value.dtype == normed.dtype == given.dtype or value.requires_grad or given.requires_grad:
        return False
    if any((x.dtype, x.device) != (torch.float32, given.device) for x in tables):  # type: ignore[union-attr]
        return False
    factor = None if norm.weight is None else fake_tensor(norm.weight)
    if norm.weight is not None and (factor is None or factor.dtype != given.dtype):
        return False
    if any(is_traceable_wrapper_subclass(x) for x in (given, factor, *tables)):  # a DTensor has no rule for the op
        return False
    batch, tokens, heads, dim = shape_of(out)
    n = shape_of(norm.x)[2]
    if not all(size.expr.is_Integer for size in (heads, dim, n)) or n.hint != heads.hint * dim.hint or n.hint > LONGEST:
        return False
    if not same(batch, shape_of(norm.x)[0]) or not same(tokens, shape_of(norm.x)[1]):
        return False
    for table in turned[1:]:
        of_batch, of_tokens, one, pairs = shape_of(table)
        if one.expr != 1 or pairs.expr != dim.hint // 2 or not same(of_tokens, tokens):
            return False
        if of_batch.expr != 1 and not same(of_batch, batch):
            return False
    return True


def _asks_dtype(user: fx.Node, node: fx.Node) -> bool:
    """Whether it is ``x.type_as(node)``: Wan's last word on what it has rotated. No value of ``node`` is read."""
    return _calls(user, "type_as") and user.args[1:] == (node,) and user.args[0] is not node


def _same_dtype(a: Any, b: fx.Node) -> bool:
    ours, theirs = fake_tensor(a), fake_tensor(b)
    return ours is not None and theirs is not None and (ours.dtype, ours.device) == (theirs.dtype, theirs.device)


def _uncast(side: Any) -> Any:
    """What a side of the stack was before it was cast to the result's dtype."""
    before = side.args[0] if isinstance(side, fx.Node) and side.args else None
    casts = _calls(side, "to") or _calls(side, "type_as")
    value = fake_tensor(before) if casts and isinstance(before, fx.Node) else None
    return before if value is not None and value.dtype == torch.float32 else side


def _calls(node: Any, name: str) -> bool:
    return isinstance(node, fx.Node) and node.op in ("call_function", "call_method") and target_name(node) == name


def _on_gpu(node: fx.Node) -> bool:
    value = fake_tensor(node)
    return value is not None and value.device.type == "cuda"
