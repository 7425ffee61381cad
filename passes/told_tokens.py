"""Whether a grid that somebody named fits the tokens of this graph: what it may be told for, and what forbids it."""

from __future__ import annotations

from torch import fx
from torch._dynamo.resume_execution import TORCH_DYNAMO_RESUME_IN_PREFIX
from torch._dynamo.symbolic_convert import InstructionTranslator

from fpscompile.passes.axes import Atom, Axis, axis_size, same
from fpscompile.passes.base import GraphState, fake_tensor, shape_of, target_name, words
from fpscompile.passes.collective_rules import ALL_TO_ALL


def resumed() -> bool:
    """Whether Dynamo is compiling what follows a graph break."""
    try:
        name = InstructionTranslator.current_tx().f_code.co_name
    except (AttributeError, AssertionError):
        return False
    return name.startswith(TORCH_DYNAMO_RESUME_IN_PREFIX)


REORDERING = words(
    "gather index_select take_along_dim take getitem flip fliplr flipud roll rot90 sort argsort topk index_copy "
    "scatter index_put setitem"
)


def reordered(state: GraphState, run: Axis) -> fx.Node | None:
    """The node of the graph that made a run by putting as many tokens in an order of its own, if one did."""
    nodes = {node.name: node for graph in state.everywhere() for node in graph.graph.nodes}
    for atom in (factor for factor in run if isinstance(factor, Atom)):
        if atom.role == "gathered":
            return reordered(state, atom.parent or ())
        if atom.role == "ranks":  # of which each has other tokens than a run of the rows
            return next((node for node in nodes.values() if target_name(node) in ALL_TO_ALL), None)
        if atom.role == "chosen":
            index = nodes.get(atom.origin)
            if atom.parent is not None and same(axis_size(atom.parent), atom.size):
                return index
            continue
        node = nodes.get(atom.origin)
        if atom.role != "root" or node is None or target_name(node).rstrip("_") not in REORDERING:
            continue
        sources = [source for source in node.all_input_nodes if fake_tensor(source) is not None]
        if any(same(size, atom.size) for source in sources[:1] for size in shape_of(source)):
            return node
    return None
