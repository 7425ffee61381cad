"""Training: flash-attn's ops inside an ``autograd.Function``, which Dynamo shows as ``autograd_function_apply``.

The whole function is attention when its forward does nothing but lay out tensors around one known op, and its backward
is that op's own: called with the saved tensors and the forward's settings, each gradient handed back for the operand
that its tensor was taken from. Then the forward's call is spelled out in the outer graph, where autograd
differentiates it. Anything else between (another backward, say) declines.
"""

from __future__ import annotations

import dataclasses
import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from fpscompile.ir import Reason, Rejection
from fpscompile.passes.base import GraphState, emit, fake_tensor, fake_value, target_name
from fpscompile.passes.declared import KEY, QUERY, VALUE, arguments_of, asks_for_more, first
from fpscompile.passes.spelling_flash import covered_by, is_declared, output_of, spell

BACKWARD = {
    "flash_attn::_flash_attn_forward": "flash_attn::_flash_attn_backward",
    "flash_attn::_flash_attn_varlen_forward": "flash_attn::_flash_attn_varlen_backward",
}
LAYOUT = frozenset(["contiguous", "detach", "getitem", "select", "pad"])
BUFFERS = frozenset(["empty", "empty_like", "new_empty", "zeros", "zeros_like"])
GRADIENTS = (("dq",), ("dk",), ("dv",))
Path = tuple[Any, tuple[Any, ...]]
"""Where a tensor comes from: a node, and the indices taken on the way."""


@dataclass(frozen=True)
class _Function:
    """An ``autograd_function_apply`` node, taken apart."""

    operands: tuple[Any, ...]
    forward: fx.Graph
    backward: fx.Graph
    op: fx.Node
    name: str

    def inputs(self, graph: fx.Graph) -> list[fx.Node]:
        return [node for node in graph.nodes if node.op == "placeholder"]

    @property
    def results(self) -> tuple[Any, ...]:
        """What the forward hands to the outer graph."""
        results = self.returned(self.forward)[0]
        return tuple(results) if isinstance(results, (tuple, list)) else (results,)

    def returned(self, graph: fx.Graph) -> Any:
        return next(node for node in reversed(graph.nodes) if node.op == "output").args[0]


def normalize_autograd(state: GraphState, node: fx.Node) -> bool:
    """One ``autograd_function_apply`` node. Returns whether the graph changed."""
    function = _take_apart(state, node)
    if function is None:
        return False
    output = output_of(node)
    problem = "nobody reads its result" if output is None else _forward_problem(function)
    problem = problem or _backward_problem(function)
    if problem is not None or output is None:
        message = f"looks like attention, but {problem}"
        state.near_misses.append(Rejection(Reason.SPELLING, message, None, node))
        return False
    arguments = arguments_of(function.op)
    assert arguments is not None
    declined = asks_for_more(function.op, arguments)
    with state.graph.inserting_before(node):
        written = _inline(state, function)
    mapped = {name: written.get(value, value) for name, value in arguments.items() if _hashable(value)}
    laid_out = tuple(new for new in written.values() if isinstance(new, fx.Node) and new not in function.operands)
    done = spell(state, node, {**arguments, **mapped}, output, covered_by(node, output), declined)
    if done:
        last = state.replaced[-1]
        state.replaced[-1] = dataclasses.replace(last, added=(*laid_out, *last.added))
    else:
        for new in reversed(laid_out):
            if not new._erased and not new.users:
                state.graph.erase_node(new)
    return done


def _hashable(value: Any) -> bool:
    return not isinstance(value, (list, dict, tuple))


def _take_apart(state: GraphState, node: fx.Node) -> _Function | None:
    bodies = []
    for reference in node.args[:2]:
        module = getattr(state.gm, str(reference.target), None) if isinstance(reference, fx.Node) else None
        if not isinstance(module, fx.GraphModule):
            return None
        bodies.append(module.graph)
    forward, backward = bodies
    ops = [inner for inner in forward.nodes if inner.op == "call_function" and is_declared(target_name(inner))]
    return _Function(node.args[2:], forward, backward, ops[0], target_name(ops[0])) if len(ops) == 1 else None


def _forward_problem(function: _Function) -> str | None:
    for node in function.forward.nodes:
        if node.op not in ("call_function", "call_method") or node is function.op or not node.users:
            continue
        if target_name(node) not in LAYOUT and not _is_scalar(node):
            return f"its forward calls {target_name(node)} besides the attention op"
    if len(function.inputs(function.forward)) != len(function.operands):
        return "its forward takes other inputs than it is given"
    # Torch 2.11 hands the tensors between out as well, behind the result; that nobody reads them is the caller's check.
    if _path(function.results[0]) != (function.op, (0,)):
        return "its forward returns something else than the attention's output"
    return None if _widths_kept(function) else "its forward trims or pads features in a way that is not undone"


def _is_scalar(node: fx.Node) -> bool:
    """Whether a node computes sizes, not tensors."""
    return isinstance(fake_value(node), (int, float, torch.SymInt, torch.SymFloat, torch.SymBool, torch.Size))


def _widths_kept(function: _Function) -> bool:
    """Whether the result is as wide as the values were, whatever padding lies between."""
    arguments = arguments_of(function.op) or {}
    value = first(arguments, VALUE)
    result = function.results[0]
    source, _ = _path(value)
    before, after = fake_tensor(source), fake_tensor(result)
    return before is not None and after is not None and before.shape[-1] == after.shape[-1]


def _backward_problem(function: _Function) -> str | None:
    graph = function.backward
    expected = BACKWARD.get(function.name)
    calls = [node for node in graph.nodes if target_name(node) == expected]
    if expected is None or len(calls) != 1:
        return "its backward is not the one of the attention op"
    for node in graph.nodes:
        if node.op in ("call_function", "call_method") and node is not calls[0] and node.users:
            name = target_name(node)
            if name not in LAYOUT and name not in BUFFERS and not _is_scalar(node):
                return f"its backward calls {name} besides the attention op's"
    forward, backward = arguments_of(function.op), arguments_of(calls[0])
    if forward is None or backward is None:
        return "its backward's signature cannot be read"
    saved = function.returned(function.forward)[1]
    inputs, results = function.inputs(graph), len(function.results)
    read = any(node.users for node in inputs[1:results])  # gradients of what lies behind the result
    if len(inputs) != results + len(saved) or read or _path(backward["dout"])[0] is not inputs[0]:
        return "its backward takes other gradients than the result's"
    stands_for = dict(zip(inputs[results:], saved, strict=True))
    for name in sorted(forward.keys() & backward.keys() - {"dropout_p"} | {"dropout_p", "softmax_scale", "causal"}):
        given = backward.get(name)
        source = stands_for.get(given, given) if isinstance(given, fx.Node) else given
        if source is not forward.get(name) and source != forward.get(name):
            return f"its backward is called with another {name} than its forward"
    return _gradients_problem(function, forward, backward)


def _gradients_problem(function: _Function, forward: dict[str, Any], backward: dict[str, Any]) -> str | None:
    returned = function.returned(function.backward)
    inputs = function.inputs(function.forward)
    if not isinstance(returned, (tuple, list)) or len(returned) != len(inputs):
        return "its backward does not return one gradient per operand"
    expected = []
    for names, gradient in zip((QUERY, KEY, VALUE), GRADIENTS, strict=True):
        source, index = _path(first(forward, names))
        buffer, place = _path(first(backward, gradient))
        if source not in inputs or index != place or returned[inputs.index(source)] is None:
            return f"its backward lays {gradient[0]} out differently from its forward's {names[0]}"
        if _path(returned[inputs.index(source)]) != (buffer, ()) or target_name(buffer) not in BUFFERS:
            return f"its backward returns something else than {gradient[0]}"
        expected.append(inputs.index(source))
    extra = [i for i, gradient in enumerate(returned) if gradient is not None and i not in expected]
    return "its backward returns gradients for other operands" if extra else None


def _path(node: Any) -> Path:
    """The node that ``node`` is a part of and the indices taken, layout and trimmed features aside."""
    taken: list[Any] = []
    while isinstance(node, fx.Node) and node.op in ("call_function", "call_method"):
        name = target_name(node)
        if name not in LAYOUT:
            break
        if name == "select":
            taken.insert(0, tuple(node.args[1:]))
        elif name == "getitem" and not _trims(node.args[1]):
            taken.insert(0, _plain(node.args[1]))
        node = node.args[0]
    return node, tuple(taken)


def _trims(index: Any) -> bool:
    """``[..., :n]``: features that padding had added."""
    if not isinstance(index, tuple) or len(index) != 2 or index[0] is not Ellipsis or not isinstance(index[1], slice):
        return False
    return index[1].start in (None, 0) and index[1].step in (None, 1)


def _plain(index: Any) -> Any:
    """An index that compares by value: slices do not hash."""
    if isinstance(index, (tuple, list)):
        return tuple(_plain(item) for item in index)
    return ("slice", index.start, index.stop, index.step) if isinstance(index, slice) else index


def _inline(state: GraphState, function: _Function) -> dict[Any, Any]:
    """The layout steps ahead of the op, in the outer graph: node of the forward -> node out here."""
    env: dict[Any, Any] = dict(zip(function.inputs(function.forward), function.operands, strict=True))
    for node in function.forward.nodes:
        if node is function.op:
            break
        if node.op not in ("call_function", "call_method") or not node.users:
            continue
        if target_name(node) not in LAYOUT and not _is_scalar(node):
            continue
        args = fx.map_arg(node.args, lambda inner: env[inner])
        if target_name(node) == "detach":  # hides the operand from autograd, which here sees through it
            env[node] = args[0]
        elif target_name(node) == "getitem":
            env[node] = emit(state, operator.getitem, args)
        else:
            env[node] = emit(state, node.target, args, dict(node.kwargs))  # type: ignore[arg-type]
    return env
