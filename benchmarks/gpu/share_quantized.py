"""A pass for Inductor: rows that several layers quantize alike are stored once.

Outside training nothing in ``torch.compile`` looks for equal operations. Where the layers of queries, keys and values
quantize the same rows with the same scale, the kernel that does it computes them once and stores them three times.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files


class ShareQuantized(CustomGraphPass):
    """For ``post_grad_custom_pre_pass``, where the graph is functional, but for copies into its inputs at its end.

    E4M3 tensors alone are shared. Of other values that two kernels need, Inductor computes a cheap one twice, and would
    store it in float32 if it were one.
    """

    def __call__(self, graph: fx.Graph) -> None:
        (output,) = graph.find_nodes(op="output")
        returned = {_storage(node) for node in output.all_input_nodes}
        known: dict[Any, fx.Node] = {}
        same: dict[fx.Node, fx.Node] = {}  # the first node with the same value
        for node in list(graph.nodes):
            if not _pure(node):
                continue
            key = (node.target, _frozen(node.args, same), _frozen(node.kwargs, same))
            first = same[node] = known.setdefault(key, node)
            value = node.meta.get("val")
            if first is node or not isinstance(value, torch.Tensor) or value.dtype != torch.float8_e4m3fn:
                continue
            if not returned & {_storage(node), _storage(first)}:  # results of a graph stay separate tensors
                node.replace_all_uses_with(first)
        graph.eliminate_dead_code()

    def uuid(self) -> Any:
        return get_hash_for_files((__file__,))


def _pure(node: fx.Node) -> bool:
    """Whether two calls with the same operands have the same result."""
    target = node.target
    if node.op != "call_function" or not isinstance(target, torch._ops.OpOverload):
        return False
    return not target._schema.is_mutable and torch.Tag.nondeterministic_seeded not in target.tags


def _frozen(value: Any, same: dict[fx.Node, fx.Node]) -> Any:
    """Arguments as something to look up; 1, 1.0 and True differ."""
    if isinstance(value, fx.Node):
        return same.get(value, value)
    if isinstance(value, (list, tuple)):
        return (type(value), *(_frozen(each, same) for each in value))
    if isinstance(value, dict):
        return tuple((name, _frozen(each, same)) for name, each in sorted(value.items()))
    return (type(value), value)


def _storage(node: fx.Node) -> int | None:
    value = node.meta.get("val")
    return value.untyped_storage()._cdata if isinstance(value, torch.Tensor) else None
