"""Bodies of higher-order ops: activation checkpoints are opened, and what their sites need is passed in.

A body is looked into when its op runs it once with the operands as they are and returns what it returns:
``tag_activation_checkpoint``. Each gets a graph state of its own that shares labels, plans and reasons with the root.
A value of the outer graph that a rewritten site needs (phase, grid, sizes) becomes one more operand of the op and one
more input of the body, through every level between. Bodies that several calls share, and other higher-order ops, stay
closed; find_sites declines what is inside.
"""

from __future__ import annotations

import copy

from torch import fx
from torch._ops import HigherOrderOperator

from fpscompile.passes.base import GraphState

OPENED = frozenset(["tag_activation_checkpoint"])


def open_bodies(state: GraphState) -> bool:
    """Give every body that can be looked into a state of its own, in a copy that the captured graph does not see."""
    users: dict[str, int] = {}
    for node in state.graph.nodes:
        if node.op == "get_attr":
            users[str(node.target)] = users.get(str(node.target), 0) + len(node.users)
    opened = False
    for node in list(state.graph.nodes):
        body = body_of(state.gm, node)
        if body is None or users[str(node.args[0].target)] != 1:
            continue
        child = _open(state, node, body)
        state.children.append(child)
        open_bodies(child)
        opened = True
    return opened


def body_of(gm: fx.GraphModule, node: fx.Node) -> fx.GraphModule | None:
    """The body that a node runs, if it is of a kind that can be opened and takes one input per operand."""
    if node.op != "call_function" or not isinstance(node.target, HigherOrderOperator):
        return None
    if node.target.name() not in OPENED or not node.args:
        return None
    reference = node.args[0]
    if not isinstance(reference, fx.Node) or reference.op != "get_attr":
        return None
    body = getattr(gm, str(reference.target), None)
    if not isinstance(body, fx.GraphModule):
        return None
    return body if len(_inputs(body.graph)) == len(node.args) - 1 else None


def _open(state: GraphState, node: fx.Node, body: fx.GraphModule) -> GraphState:
    reference = node.args[0]
    assert isinstance(reference, fx.Node)
    # Not deepcopy: parameters and nested bodies stay the very same objects.
    inner = copy.copy(body)
    inner.graph = copy.deepcopy(body.graph)
    inner.meta = dict(body.meta)
    name = f"fps_{reference.target}"
    setattr(state.gm, name, inner)
    reference.target = name
    for inside in inner.graph.nodes:
        # Labels are named after nodes: names must be unique across bodies.
        if inside.op != "output":
            inside._rename(f"{reference.name}_{inside.name}")
    child = GraphState(inner, state.settings, state.published_grid, state.attached, state.untold)
    child.parent, child.call, child.prefix = state, node, reference.name
    for shared in ("notes", "near_misses", "labels", "plans", "layers", "rewritten", "declined"):
        setattr(child, shared, getattr(state, shared))
    return child


def _inputs(graph: fx.Graph) -> list[fx.Node]:
    return [node for node in graph.nodes if node.op == "placeholder"]


def operands(child: GraphState) -> list[tuple[fx.Node, object]]:
    """(input of the body, operand of the call) pairs."""
    assert child.call is not None
    return list(zip(_inputs(child.graph), child.call.args[1:], strict=True))


def results(child: GraphState) -> tuple[object, ...]:
    """What the body returns, in order."""
    output = next(node for node in reversed(child.graph.nodes) if node.op == "output")
    returned = output.args[0]
    return tuple(returned) if isinstance(returned, (tuple, list)) else (returned,)


def holder(state: GraphState, node: fx.Node) -> GraphState:
    """The state of the graph that ``node`` is in."""
    return next(graph for graph in state.everywhere() if graph.graph is node.graph)


def outermost_call(state: GraphState, node: fx.Node) -> fx.Node:
    """The node of the root graph ahead of which everything must lie that ``node`` is to use: itself, or the op around
    it."""
    graph = holder(state, node)
    while graph.call is not None:
        assert graph.parent is not None
        node, graph = graph.call, graph.parent
    return node


def carry(value: object, into: GraphState) -> object:
    """A value of the root graph as seen in ``into``: an input of every body on the way. Constants are themselves."""
    if not isinstance(value, fx.Node) or into.parent is None:
        return value
    outer = carry(value, into.parent)
    assert into.call is not None
    for inner, operand in operands(into):
        if operand is outer:
            return inner
    last = _inputs(into.graph)[-1:]
    place = last[0].next if last else next(iter(into.graph.nodes))
    with into.graph.inserting_before(place):
        added = into.graph.placeholder(f"fps_{value.name}")
    added.meta["example_value"] = value.meta["example_value"]
    into.call.args = (*into.call.args, outer)  # type: ignore[assignment, arg-type]
    return added
