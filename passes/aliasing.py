"""Which nodes write in place, and which tensors may share memory: what may not be moved past what."""

from __future__ import annotations

import functools
import inspect
import operator
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import fx

from fpscompile.passes.base import argument, fake_tensor, target_name, words

IN_PLACE = words("add sub mul truediv floordiv pow mod matmul and or xor lshift rshift")

MAY_ALIAS = words(
    "view reshape flatten unflatten squeeze unsqueeze view_as reshape_as ravel permute transpose swapaxes swapdims t "
    "movedim moveaxis expand expand_as broadcast_to split chunk tensor_split unbind select narrow getitem getattr "
    "to type type_as float double half bfloat16 contiguous detach alias view_as_real view_as_complex diagonal "
    "requires_grad_ as_strided unfold numpy_T cuda cpu real imag dropout feature_dropout alpha_dropout pos positive "
    "split_with_sizes unsafe_split unsafe_chunk hsplit vsplit dsplit atleast_1d atleast_2d atleast_3d resolve_conj "
    "resolve_neg conj adjoint matrix_H mT mH _unsafe_view broadcast_tensors meshgrid"
)
"""Ops whose output may be a view of their first operand."""


MODES = words("_enter_autocast _exit_autocast _set_grad_enabled _enter_inference_mode _exit_inference_mode")


def mutates(node: fx.Node) -> bool:
    """Whether a node may write into one of its operands: in-place methods and operators, ``out=``, mutating ops."""
    if node.op not in ("call_function", "call_method"):
        return False
    name = target_name(node).rpartition("::")[2]
    if isinstance(node.target, (torch._ops.OpOverload, torch._ops.OpOverloadPacket)):
        return any(schema.is_mutable for schema in schemas(node.target))
    if name == "triton_kernel_wrapper_mutation":
        return True
    if isinstance(node.target, torch._ops.HigherOrderOperator):
        return any(_writes_operand(body) for body in _bodies(node))
    if name == "setitem" or (name.endswith("_") and not name.endswith("__")) or node.kwargs.get("out") is not None:
        return True
    in_place = node.op == "call_function" and getattr(node.target, "__module__", "") == "_operator"
    return (in_place and name.startswith("i") and name[1:] in IN_PLACE) or _asked_in_place(node)


def _asked_in_place(node: fx.Node) -> bool:
    """Whether ``inplace`` is set, by name or, as the modules of ``torch.nn`` do, by position."""
    position = _position_of_inplace(node.target) if node.op == "call_function" else None
    given = node.args[position] if position is not None and len(node.args) > position else False
    return node.kwargs.get("inplace", given) is not False


@functools.lru_cache(maxsize=1024)
def _position_of_inplace(target: Any) -> int | None:
    try:
        return list(inspect.signature(target).parameters).index("inplace")
    except (TypeError, ValueError):
        return None


def _bodies(node: fx.Node) -> Iterator[fx.Graph]:
    """The graphs that a higher-order op runs."""
    for operand in node.all_input_nodes:
        if operand.op == "get_attr" and node.graph.owning_module is not None:
            body = operator.attrgetter(str(operand.target))(node.graph.owning_module)
            if isinstance(body, fx.GraphModule):
                yield body.graph


def _writes_operand(body: fx.Graph) -> bool:
    """Whether a body writes into what it is given, and not only into tensors of its own."""
    given = held_by(node for node in body.nodes if node.op in ("placeholder", "get_attr"))
    return any(given(target) for node in body.nodes if mutates(node) for target in targets_of(node))


def targets_of(node: fx.Node) -> Iterator[fx.Node]:
    """The tensors that a node for which :func:`mutates` holds writes."""
    given: list[Any]
    if node.kwargs.get("out") is not None:
        given = [node.kwargs["out"]]
    elif isinstance(node.target, (torch._ops.OpOverload, torch._ops.OpOverloadPacket)):
        given = []
        for schema in schemas(node.target):
            for position, each in enumerate(schema.arguments):
                if each.alias_info is not None and each.alias_info.is_write:
                    given.append(argument(node, position, each.name))
    elif isinstance(node.target, torch._ops.HigherOrderOperator):
        given = list(node.all_input_nodes)
    else:
        given = [node.args[0] if node.args else node.kwargs.get("input")]
    seen = set()
    for item in given:
        for target in item if isinstance(item, (tuple, list)) else (item,):
            if isinstance(target, fx.Node) and fake_tensor(target) is not None and target not in seen:
                seen.add(target)
                yield target


def schemas(target: torch._ops.OpOverload | torch._ops.OpOverloadPacket) -> list[Any]:
    """What an op declares, for all of its overloads where none is chosen."""
    if isinstance(target, torch._ops.OpOverload):
        return [target._schema]
    return [getattr(target, overload)._schema for overload in target.overloads()]


def base_of(node: Any) -> Any:
    """The node whose memory ``node`` may be a view of."""
    while isinstance(node, fx.Node) and node.op in ("call_function", "call_method"):
        name = target_name(node)
        if name not in MAY_ALIAS and not mutates(node):
            return node
        source = node.args[0] if node.args else node.kwargs.get("input")
        if not isinstance(source, fx.Node):
            return node
        node = source
    return node


def memory_of(node: Any) -> int | None:
    """What stands for the memory that a node's fake value shares with its views, whatever op made them."""
    value = fake_tensor(node)
    try:
        return None if value is None else int(value.untyped_storage()._cdata)
    except (NotImplementedError, RuntimeError):  # a sparse tensor, or one of a functorch transform
        return None


def held_by(tensors: Iterable[Any]) -> Callable[[fx.Node], bool]:
    """Tells of a node whether it may be of the memory of one of ``tensors``."""
    nodes = [tensor for tensor in tensors if isinstance(tensor, fx.Node)]
    bases, memory = {base_of(node) for node in nodes}, {memory_of(node) for node in nodes} - {None}
    return lambda node: base_of(node) in bases or memory_of(node) in memory


def written_between(first: fx.Node, last: fx.Node, tensors: Iterable[Any], own: Iterable[fx.Node]) -> fx.Node | None:
    """A node strictly between two nodes, not one of ``own``, that may write into one of ``tensors``."""
    held, owned = held_by(tensors), set(own)
    node = first.next
    while node is not last and node.op != "root":
        if node not in owned and mutates(node):
            targets = [arg for arg in node.all_input_nodes if fake_tensor(arg) is not None]
            if any(map(held, targets)):
                return node
        node = node.next
    return None


def mode_changes_between(first: fx.Node, last: fx.Node) -> fx.Node | None:
    """A node between two nodes that turns autocast or gradients on or off."""
    node = first.next
    while node is not last and node.op != "root":
        if node.op == "call_function" and target_name(node).rpartition("::")[2] in MODES:
            return node
        node = node.next
    return None
