"""Strides and memory that readers rely on: ``view`` fails on some layouts, ``reshape`` copies some and not others."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import fx

from fpscompile.passes.aliasing import held_by, memory_of, mutates, targets_of
from fpscompile.passes.base import GraphState, emit, evaluate, fake_tensor, fake_value, target_name, words

READ = words("stride is_contiguous data_ptr as_strided storage_offset untyped_storage storage")
"""Ops that tell strides, or where memory is."""

MANY = 64
"""With more readers of other strides than this, all are taken to rely on them."""


def laid_out_as(state: GraphState, result: fx.Node, original: fx.Node) -> fx.Node:
    """``result`` with the strides that ``original`` has, where something relies on them; else ``result``."""
    before, after = fake_tensor(original), fake_tensor(result)
    assert before is not None
    assert after is not None
    wanted, given = _order(before), _order(after)
    if wanted == given or not _shows(state, result, original):
        return result
    copied = emit(state, "contiguous", (emit(state, "permute", (result, tuple(wanted))),))
    back = tuple(wanted.index(dim) for dim in range(len(wanted)))
    return copied if back == tuple(range(len(back))) else emit(state, "permute", (copied, back))


def is_written(original: fx.Node) -> bool:
    """Whether something writes into what a node gives, or into a view of it."""
    return any(map(held_by([original]), _written_behind(original)))


def _shows(state: GraphState, result: fx.Node, original: fx.Node) -> bool:
    """Whether it shows, in values or in the graph's results, that ``result`` lies in memory as ``original`` does not.

    What reads it is computed anew, on fake tensors, until the strides are those of before.
    """
    other: dict[fx.Node, Any] = {original: fake_value(result)}
    parted: list[fx.Node] = []
    """What is a view in one layout and a copy in the other, and what it is of."""
    for node in _behind(original):
        sources = [source for source in node.all_input_nodes if source in other]
        if not sources:
            continue
        higher = isinstance(node.target, torch._ops.HigherOrderOperator)
        if node.op == "output" or higher or target_name(node) in READ or len(other) > MANY:
            return True
        if mutates(node):
            if any(target in other for target in targets_of(node)):
                return True
            continue
        try:
            with _without_guards(state):
                value = evaluate(state, node, lambda operand: other.get(operand, fake_value(operand)))
        except Exception:  # a view that this layout does not allow, say
            return True
        if any(_is_view(fake_value(node), fake_value(source)) != _is_view(value, other[source]) for source in sources):
            parted += [node, *sources]
        if not _same_strides(fake_value(node), value):
            other[node] = value
    return bool(parted) and any(map(held_by(parted), _written_behind(original)))


def _is_view(value: Any, source: Any) -> bool:
    memory = memory_of(value[0] if isinstance(value, (tuple, list)) and value else value)
    return memory is not None and memory == memory_of(source)


def _behind(node: fx.Node) -> list[fx.Node]:
    nodes = list(node.graph.nodes)
    return nodes[nodes.index(node) + 1 :]


def _written_behind(node: fx.Node) -> list[fx.Node]:
    return [target for writer in _behind(node) if mutates(writer) for target in targets_of(writer)]


@contextlib.contextmanager
def _without_guards(state: GraphState) -> Any:
    """A look at what might be, which must not narrow what the graph is compiled for."""
    shapes = state.fake_mode.shape_env if state.fake_mode is not None else None
    with torch.no_grad(), shapes.suppress_guards() if shapes is not None else contextlib.nullcontext():
        yield


def _same_strides(left: Any, right: Any) -> bool:
    if isinstance(left, (tuple, list)):
        return isinstance(right, (tuple, list)) and all(map(_same_strides, left, right))
    return not isinstance(left, torch.Tensor) or _order(left) == _order(right)


def _order(x: torch.Tensor) -> list[int]:
    """Dims from the outermost in memory to the innermost. Dims of size 1 lie anywhere; they keep their place."""
    hints = [_hint(stride) for stride in x.stride()]
    return sorted(range(len(hints)), key=lambda dim: (-hints[dim], dim))


def _hint(stride: object) -> int:
    node = getattr(stride, "node", None)
    hint = node.hint if node is not None else stride
    return hint if isinstance(hint, int) else 0
