"""A torch.fx graph as a networkx graph, for pictures: who feeds an attention call, and who reads it."""

from __future__ import annotations

import re
from typing import Any

import networkx as nx
import torch
from torch import fx

INPUT, PARAM, ATTENTION, OP, OUTPUT = ROLES = ("input", "param", "attention", "op", "output")

MAX_NODES = 30
"""A neighbourhood never shows more: beyond it, a picture is no longer read."""

_ATTENTION = re.compile(r"^fps::attention|(scaled_dot_product|flash|efficient|flex)\w*attention")
_STATE = re.compile(r"_(parameters|buffers)_")
_SHORT = {"scaled_dot_product_attention": "sdpa"}
_LABEL = 22


def to_networkx(graph: fx.Graph) -> nx.DiGraph:
    """The whole graph, edges from producer to consumer.

    Nodes are named as in ``graph`` and carry

    * ``label``: what is called;
    * ``shape``: text such as "[1, 12, 4680, 64]", symbolic sizes by name; "[2, 3] +1" for the first of two results;
      "" when the graph does not say;
    * ``role``: one of :data:`ROLES`;
    * ``inputs``: number of producers in ``graph``.

    Linear in nodes and edges.
    """
    picture = nx.DiGraph()
    for node in graph.nodes:
        _add(picture, node)
    for node in graph.nodes:
        picture.add_edges_from((producer.name, node.name) for producer in node.all_input_nodes)
    return picture


def neighbourhood(graph: fx.Graph, node: fx.Node, up: int = 6, down: int = 3) -> nx.DiGraph:
    """The part of ``graph`` within ``up`` producers and ``down`` consumers of ``node``, without parameters and sizes.

    Attributes are those of :func:`to_networkx`; a node that reads a parameter left out counts it in ``params``, and
    ``graph["centre"]`` names ``node``. At most :data:`MAX_NODES` nodes: the nearest, two thirds of them producers.
    The walk is breadth first from ``node``, so its cost does not grow with the graph.

    Raises:
        ValueError: ``node`` is not in ``graph``.
    """
    if node.graph is not graph:
        raise ValueError(f"node {node.name!r} is not in this graph: pass the graph it belongs to")
    room = MAX_NODES - 1
    producers = _walk(node, up, room - room // 3, lambda n: n.all_input_nodes)
    consumers = _walk(node, down, room - len(producers), lambda n: n.users)
    shown = {n.name: n for n in (*reversed(producers), node, *consumers)}
    picture = nx.DiGraph(centre=node.name)
    for member in shown.values():
        _add(picture, member)
    picture.nodes[node.name]["role"] = ATTENTION
    for member in shown.values():
        inputs = member.all_input_nodes
        picture.add_edges_from((producer.name, member.name) for producer in inputs if producer.name in shown)
        picture.nodes[member.name]["params"] = sum(_role(producer) == PARAM for producer in inputs)
    return picture


def _walk(start: fx.Node, depth: int, room: int, step: Any) -> list[fx.Node]:
    """Nodes at most ``depth`` steps from ``start``, nearest first, at most ``room`` of them, ``start`` left out."""
    found: dict[fx.Node, None] = {start: None}
    level = [start]
    for _ in range(depth):
        following: list[fx.Node] = []
        for member in level:
            for other in step(member):
                if len(found) > room:
                    return list(found)[1:]
                if other not in found and not _left_out(other):
                    found[other] = None
                    following.append(other)
        level = following
    return list(found)[1:]


def _left_out(node: fx.Node) -> bool:
    """Parameters, constants and size arithmetic: they are inputs of everything and explain nothing."""
    if _role(node) == PARAM:
        return True
    value = node.meta.get("example_value")
    return isinstance(value, (int, float, torch.SymInt, torch.SymFloat, torch.SymBool, torch.Size))


def _add(picture: nx.DiGraph, node: fx.Node) -> None:
    value = node.meta.get("example_value")
    picture.add_node(
        node.name, label=_label(node), shape=_shape(value), role=_role(node), inputs=len(node.all_input_nodes)
    )


def _role(node: fx.Node) -> str:
    if node.op == "placeholder":
        state = node.type is torch.nn.Parameter or _STATE.search(node.name) is not None
        return PARAM if state or isinstance(node.meta.get("example_value"), torch.nn.Parameter) else INPUT
    if node.op == "get_attr":
        return PARAM
    if node.op == "output":
        return OUTPUT
    return ATTENTION if node.op == "call_function" and _is_attention(node.target) else OP


def _is_attention(target: Any) -> bool:
    return _ATTENTION.search(_called(target)) is not None


def _called(target: Any) -> str:
    """Name of a called function; ops keep their namespace, except torch's own."""
    if isinstance(target, torch._ops.OpOverload):
        return target._schema.name.removeprefix("aten::")
    if isinstance(target, torch._ops.OpOverloadPacket):
        return target._qualified_op_name.removeprefix("aten::")
    return getattr(target, "__name__", str(target)).strip("_")


def _label(node: fx.Node) -> str:
    """What is called, short: the argument's name of an input, the function's of an operation."""
    if node.op == "placeholder":
        return _clip(re.sub(r"^l_(kwargs_|args_|self_)?|_+$", "", node.name, flags=re.IGNORECASE) or node.name)
    if node.op == "output":
        return "output"
    name = node.target.rsplit(".", 1)[-1] if isinstance(node.target, str) else _called(node.target)
    return _clip(_SHORT.get(name, name))


def _shape(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"[{', '.join(_clip(str(size), 16) for size in value.shape)}]"
    if isinstance(value, (tuple, list)):
        tensors = [item for item in value if isinstance(item, torch.Tensor)]
        more = f" +{len(tensors) - 1}" if len(tensors) > 1 else ""
        return _shape(tensors[0]) + more if tensors else ""
    return ""


def _clip(text: str, limit: int = _LABEL) -> str:
    return text if len(text) <= limit else text[: limit - 1] + "…"
