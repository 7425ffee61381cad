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
   the same dtype. Views of that dtype lead from it to ``unbind`` of pairs; what is rotated has the same leading axes.
3. cos and sin are float32 of one value per pair, [1 or B, tokens, 1, pairs]. All are plain tensors, and no tensor
   changes its shape in place.
4. Between the norm and the result nothing is written into what either reads or into anything on the way, and gradients
   and autocast are neither turned on nor off. The result is the only view of what was stacked.

It runs behind ``lower_sites``, so that everything before sees operations whose axes it can follow.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch._C._functorch import is_functorch_wrapped_tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from fpscompile.passes.aliasing import mode_changes_between, mutates, written_between
from fpscompile.passes.axes import same
from fpscompile.passes.base import (
    GraphState,
    argument,
    copy_origin,
    device_type,
    emit,
    fake_tensor,
    shape_of,
    target_name,
    words,
)
from fpscompile.rotary_op import LONGEST

VIEWS = words("unflatten view reshape flatten")
COVERED = VIEWS | words("stack to sub add mul getitem unbind rms_norm")
SHAPES = words("transpose_ swapaxes_ swapdims_ t_ squeeze_ unsqueeze_ as_strided_ resize_ resize_as_ set_")
"""Ops that change what shape a tensor has from then on; its fake value has the last one throughout."""


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
    views: tuple[fx.Node, ...]
    """From the norm to what is taken apart."""


@dataclass(frozen=True)
class _Rotation:
    pairs: fx.Node
    """The ``unbind``."""
    cos: fx.Node
    sin: fx.Node
    path: tuple[fx.Node, ...]
    """What is computed between the pairs and the stack."""


def _fuse(state: GraphState, out: fx.Node) -> bool:
    """Rewrite one ``stack((a, b), -1).flatten(-2)``."""
    stack = _first(out)
    if stack is None or not _calls(stack, "stack") or set(stack.users) != {out}:
        return False
    if out.args[1:] != (-2,) or out.kwargs:
        return False
    sides = stack.args[0] if len(stack.args) == 2 and stack.args[1] == -1 and not stack.kwargs else None
    if not isinstance(sides, (tuple, list)) or len(sides) != 2:
        return False
    turned = _turned(*(_uncast(side) for side in sides))
    norm = None if turned is None else _norm_of(turned.pairs)
    if turned is None or norm is None or not _fits(out, norm, turned, sides):
        return False
    read = (norm.node, norm.x, norm.weight, turned.cos, turned.sin, *norm.views, *turned.path, *sides, stack)
    if written_between(norm.node, out, read, ()) is not None or mode_changes_between(norm.node, out) is not None:
        return False
    with state.graph.inserting_before(out):
        tables = [emit(state, "squeeze", (table, -2)) for table in (turned.cos, turned.sin)]
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
    if mutates(node):
        return
    inputs = node.all_input_nodes
    graph.erase_node(node)
    for each in inputs:
        _erase_unread(graph, each)


def _turned(a: Any, b: Any) -> _Rotation | None:
    """The rotation where a = y1 cos - y2 sin and b = y1 sin + y2 cos."""
    if not _calls(a, "sub") or not _calls(b, "add") or a.kwargs or b.kwargs or len(a.args) != 2 or len(b.args) != 2:
        return None
    factors = [*a.args, *b.args]
    products = [_product(side) for side in factors]
    if None in products:
        return None
    (pairs, *_), *_ = products  # type: ignore[misc]
    if any(product[0] is not pairs for product in products):  # type: ignore[index]
        return None
    first, second, *both = [product[1:] for product in products]  # type: ignore[index]
    (one, cos), (two, sin) = first, second
    if (one, two) != (0, 1) or sorted(both, key=lambda item: item[0]) != [(0, sin), (1, cos)]:
        return None
    return _Rotation(pairs, cos, sin, (a, b, *factors))


def _product(node: Any) -> tuple[fx.Node, int, fx.Node] | None:
    """(unbind, i, table) of the product of its i-th piece and a table."""
    if not _calls(node, "mul") or len(node.args) != 2 or node.kwargs:
        return None
    for piece, table in (node.args, node.args[::-1]):
        if not _calls(piece, "getitem") or not _calls(_first(piece), "unbind") or type(piece.args[1]) is not int:
            continue
        if isinstance(table, fx.Node):
            return piece.args[0], piece.args[1], table
    return None


def _norm_of(unbind: fx.Node) -> _Norm | None:
    """The norm that ``unbind`` takes apart along its last axis, if nothing else reads it."""
    node, axis = _first(unbind), argument(unbind, 1, "dim", 0)
    value = fake_tensor(node)
    if node is None or value is None or axis not in (-1, value.dim() - 1) or shape_of(node)[-1].expr != 2:
        return None
    reader, views = unbind, []
    while True:
        given = fake_tensor(node)
        if given is None or given.dtype != value.dtype:
            return None
        if any(user is not reader and not _asks_dtype(user, node) for user in node.users):
            return None
        if _calls(node, "rms_norm"):
            break
        if not any(_calls(node, name) for name in VIEWS):
            return None
        views.append(node)
        before = _first(node)
        if before is None:
            return None
        node, reader = before, node
    x, sizes, weight, eps = (
        argument(node, i, name) for i, name in enumerate(("input", "normalized_shape", "weight", "eps"))
    )
    value = fake_tensor(x)
    if not isinstance(eps, float) or value is None or value.dim() != 3:
        return None
    last = shape_of(x)[-1]
    fits = last.expr.is_Integer and tuple(sizes) == (last.hint,)
    return _Norm(node, x, weight, eps, tuple(views)) if fits else None


def _fits(out: fx.Node, norm: _Norm, turned: _Rotation, sides: Sequence[Any]) -> bool:
    """Whether shapes, dtypes and devices are the op's."""
    tables = (turned.cos, turned.sin)
    rows = [node for node in (norm.x, norm.weight, norm.node, *sides, out) if node is not None]
    of_rows, of_tables = ([x for node in nodes if (x := fake_tensor(node)) is not None] for nodes in (rows, tables))
    if len(of_rows) < len(rows) or len(of_tables) < 2 or any(x.dim() != 4 for x in (of_rows[-1], *of_tables)):
        return False
    dtypes = {x.dtype for x in of_rows}
    if len(dtypes) > 1 or not dtypes <= {torch.float16, torch.bfloat16, torch.float32}:
        return False
    if any(x.dtype != torch.float32 for x in of_tables) or len({x.device for x in (*of_rows, *of_tables)}) > 1:
        return False
    if of_rows[0].requires_grad or of_rows[-1].requires_grad:
        return False
    # A DTensor has no rule for the op, and the fake value of one that vmap sees is not what the op gets.
    if any(is_functorch_wrapped_tensor(x) or is_traceable_wrapper_subclass(x) for x in (*of_rows, *of_tables)):
        return False
    if any(target_name(user) in SHAPES for node in (norm.x, norm.weight, *tables) if node for user in node.users):
        return False
    batch, tokens, heads, dim = shape_of(out)
    n = shape_of(norm.x)[2]
    if not all(size.expr.is_Integer for size in (heads, dim, n)) or n.hint != heads.hint * dim.hint or n.hint > LONGEST:
        return False
    if not same(batch, shape_of(norm.x)[0]) or not same(tokens, shape_of(norm.x)[1]):
        return False
    for table in tables:
        of_batch, of_tokens, one, pairs = shape_of(table)
        if one.expr != 1 or pairs.expr != dim.hint // 2 or not same(of_tokens, tokens):
            return False
        if of_batch.expr != 1 and not same(of_batch, batch):
            return False
    return True


def _first(node: fx.Node) -> fx.Node | None:
    """The tensor that a node takes first, by position or by name."""
    first = argument(node, 0, "input")
    return first if isinstance(first, fx.Node) else None


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
    return device_type(node) == "cuda"
