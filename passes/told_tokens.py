"""Whether a grid that somebody named fits the tokens of this graph: what it may be told for, and what forbids it."""

from __future__ import annotations

from torch import fx
from torch._dynamo.resume_execution import TORCH_DYNAMO_RESUME_IN_PREFIX
from torch._dynamo.symbolic_convert import InstructionTranslator

from fpscompile.passes.axes import Atom, Axis, Cat, Slice, axis_size, same
from fpscompile.passes.base import GraphState, argument, fake_tensor, shape_of, target_name, words
from fpscompile.passes.collective_rules import ALL_TO_ALL
from fpscompile.passes.frames import permuted


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


def _shuffled(cat: Cat) -> bool:
    """Whether it is all pieces of one axis: laid end to end in the axis's own order they would be that axis again."""
    wholes = [_whole(part) for part in cat.parts]
    first = wholes[0]
    return first is not None and all(whole == first for whole in wholes) and same(axis_size((cat,)), axis_size(first))


def _whole(part: Axis) -> Axis | None:
    """The axis of which this is a run of places, or every n-th one; None if it is no such piece."""
    piece = part[0] if len(part) == 1 else None
    if isinstance(piece, Slice):
        return piece.whole
    return piece.parent if isinstance(piece, Atom) and piece.role == "strided" else None


def reordered(state: GraphState, run: Axis) -> fx.Node | None:
    """The node of the graph that made a run by putting as many tokens in an order of its own, if one did."""
    nodes = {node.name: node for graph in state.everywhere() for node in graph.graph.nodes}
    for cat in (factor for factor in run if isinstance(factor, Cat)):
        if _shuffled(cat):
            return next((node for node, label in state.labels.items() if any(cat in axis for axis in label)), None)
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
        if atom.role == "rolled":
            return node
        if node is not None and target_name(node) == "stack" and permuted(argument(node, 0, "tensors", ())):
            return node
        if atom.role != "root" or node is None or target_name(node).rstrip("_") not in REORDERING:
            continue
        sources = [source for source in node.all_input_nodes if fake_tensor(source) is not None]
        if any(same(size, atom.size) for source in sources[:1] for size in shape_of(source)):
            return node
    return None
