"""trace_axes: label every tensor dimension with what it is made of.

An abstract interpretation in graph order. Inputs get one atom per dimension; each op's rule (axis_rules.py) carries
labels along; an op without a rule gives its output fresh atoms named after it, so a rejection can say where the
trail was lost. Nothing is guessed: equal labels mean the same positions.

Changes nothing in the graph. Runs after normalize, whose canonical calls it labels like any other node.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import sympy
import torch
from torch import fx
from torch.utils._sympy.symbol import SymT, symbol_is_type

from fpscompile.ir import Size
from fpscompile.passes import writes
from fpscompile.passes.aliasing import mutates
from fpscompile.passes.axes import INPUT, PARAMETER, Axis, Label, axis_size, fresh, information, leaves, same
from fpscompile.passes.axis_rules import RULES, broadcast, keeps_positions
from fpscompile.passes.base import STAND_IN, GraphState, fake_tensor, fake_value, shape_of, target_name
from fpscompile.passes.canonical import is_canonical
from fpscompile.passes.subgraphs import operands, results


@dataclass(frozen=True)
class TraceAxes:
    name: str = "trace_axes"

    def run(self, state: GraphState) -> bool:
        tracer = Tracer(bodies={child.call: child for graph in state.everywhere() for child in graph.children})
        for node in state.graph.nodes:
            tracer.visit(node)
        for graph in state.everywhere():
            graph.labels = tracer.labels
            graph.meetings = tracer.meetings
            graph.operands = tracer.operands
        state.homes = tracer.homes
        return False


@dataclass(frozen=True)
class Meeting:
    """A tensor that met others element by element: position i of its ``dim`` is position i of theirs."""

    axis: Axis
    node: fx.Node
    dim: int


@dataclass
class Tracer:
    """Labels so far, for one graph."""

    labels: dict[fx.Node, Label] = field(default_factory=dict)
    operands: dict[fx.Node, list[Label]] = field(default_factory=dict)
    several: dict[fx.Node, list[Label]] = field(default_factory=dict)
    homes: dict[sympy.Expr, tuple[fx.Node, int]] = field(default_factory=dict)
    bodies: dict[fx.Node | None, GraphState] = field(default_factory=dict)
    """Higher-order ops that are looked into."""
    reads: dict[fx.Node, int] = field(default_factory=dict)
    """Which inputs of the call (not weights) each tensor depends on, one bit each."""
    inputs: int = 0
    learned: dict[sympy.Symbol, Size] = field(default_factory=dict)
    """Sizes that depend on data, as far as others determine them."""
    hints: dict[sympy.Symbol, sympy.Integer] = field(default_factory=dict)
    """Values of the symbols that some size consists of."""
    meetings: dict[Axis, list[Meeting]] = field(default_factory=dict)
    """By the axis that was kept: what it met under another name, such as a table of positions."""

    def label(self, node: Any) -> Label:
        """Label of a tensor node."""
        if node not in self.labels:
            self.labels[node] = tuple(fresh(node.name, dim, size) for dim, size in enumerate(self.shape(node)))
        return self.labels[node]

    def outputs(self, node: fx.Node) -> list[Label] | None:
        """Labels of a node with several outputs, when a rule gave them."""
        return self.several.get(node)

    def shape(self, node: Any) -> tuple[Size, ...]:
        """Sizes of a tensor node, with what was learned of sizes that depend on data."""
        return tuple(self.resolve(size) for size in shape_of(node))

    def resolve(self, size: Size) -> Size:
        """``size`` with what was learned of sizes that depend on data."""
        if not size.expr.free_symbols & self.learned.keys():
            return size
        hints = {symbol: self.hints.get(symbol, STAND_IN) for symbol in size.expr.free_symbols}
        hints |= {symbol: sympy.Integer(known.hint) for symbol, known in self.learned.items()}
        known = {symbol: known.expr for symbol, known in self.learned.items()}
        return Size(size.expr.xreplace(known), int(size.expr.xreplace(hints)))

    def learn(self, size: Size, known: Size) -> Size:
        """``known``, which a size is equal to. Where the size is a symbol of its own, it is known from now on."""
        if size.expr == known.expr or not size.expr.is_symbol or not symbol_is_type(size.expr, SymT.UNBACKED_INT):
            return size
        self.learned[size.expr] = known
        return known

    def not_negative(self, expr: sympy.Expr) -> bool:
        """Whether an expression is a sum or product of numbers and tensor sizes, none of them negative."""
        if expr.is_number:
            return bool(expr >= 0)
        if expr in self.homes:
            return True
        return isinstance(expr, (sympy.Add, sympy.Mul)) and all(self.not_negative(term) for term in expr.args)

    def meet(self, operands: Sequence[tuple[Axis, fx.Node, int]]) -> Axis:
        """The label of a dimension where operands (label, tensor, dimension) meet element by element.

        All index the same positions. Kept is the name that says most; among equals the one that the tokens carry
        through the model: that of the operand which depends on most of the call's inputs (a table of positions or a
        modulation depends on few), has most dimensions (a mask of frames has few) and is made of fewest tensors; then
        the first. The others are remembered.
        """
        known = [operand for operand in operands if operand[0]]
        if not known:
            return ()
        # A constant or noise made in another tensor's shape has none of its tokens.
        known = [operand for operand in known if not target_name(operand[1]).endswith("_like")] or known
        says = [(information(axis), self.reads.get(node, 0).bit_count()) for axis, node, _ in known]
        most = [operand for operand, how_much in zip(known, says, strict=True) if how_much == max(says)]
        kept = most[0][0]
        if any(axis != kept for axis, _, _ in most):
            kept = max(most, key=lambda operand: self._extent(operand[1]))[0]
        for axis, node, dim in known:
            if axis != kept:
                self.meetings.setdefault(kept, []).append(Meeting(axis, node, dim))
        return kept

    def _extent(self, node: fx.Node) -> tuple[int, int]:
        """How many dimensions a tensor has, not those of size 1, and less how many tensors they go back to."""
        label = [axis for axis in self.label(node) if axis]
        return len(label), -len({leaf.origin for axis in label for leaf in leaves(axis)})

    def visit(self, node: fx.Node) -> None:
        for source in self._read(node):
            self.reads[node] = self.reads.get(node, 0) | self.reads.get(source, 0)
        if node.op == "placeholder" or node.op == "get_attr":
            self._input(node)
        elif node.op in ("call_function", "call_method"):
            if is_canonical(node):
                self.operands[node] = [self.label(tensor) for tensor in node.args[:3]]
            self._call(node)
            if mutates(node) and target_name(node) != "setitem":
                writes.written(self, node)

    def _read(self, node: fx.Node) -> list[fx.Node]:
        """The operands whose values a node reads: of ``type_as`` and kin the first only."""
        if node.op in ("call_function", "call_method") and target_name(node).endswith(("_as", "_like")):
            return node.all_input_nodes[:1]
        return node.all_input_nodes

    def _input(self, node: fx.Node) -> None:
        if fake_tensor(node) is None:
            return
        source = PARAMETER if is_parameter(node) else INPUT
        if source == INPUT:
            self.reads[node] = 1 << self.inputs
            self.inputs += 1
        label = tuple(fresh(node.name, dim, size, source) for dim, size in enumerate(self.shape(node)))
        self._assign(node, label)

    def _call(self, node: fx.Node) -> None:
        if node in self.bodies:
            self._body(node, self.bodies[node])
            return
        name = target_name(node)
        if name == "setitem":
            writes.setitem(self, node)
            return
        value = fake_value(node)
        if not isinstance(value, torch.Tensor) and not (isinstance(value, (tuple, list)) and value):
            return
        result: Any = None
        try:
            if name in RULES:
                result = RULES[name](self, node)
            elif isinstance(value, torch.Tensor) and keeps_positions(name) and node.all_input_nodes:
                result = broadcast(self, node)
        except (AssertionError, IndexError, KeyError, TypeError, ValueError):
            # An argument form the rule does not know: the label is unknown, never wrong.
            result = None
        if isinstance(value, torch.Tensor):
            self._assign(node, result if isinstance(result, tuple) else None)
        elif isinstance(result, list):
            self.several[node] = result

    def _body(self, node: fx.Node, body: GraphState) -> None:
        """A body runs on the operands' labels; its sizes are no homes for the graph around it."""
        outside, self.homes = self.homes, {}
        for inner, operand in operands(body):
            if fake_tensor(inner) is not None and fake_tensor(operand) is not None:
                self._assign(inner, self.label(operand))
                self.reads[inner] = self.reads.get(operand, 0)  # type: ignore[call-overload]  # a fake tensor's node
        for inner in body.graph.nodes:
            if inner.op != "placeholder":
                self.visit(inner)
        self.several[node] = [self.label(r) if fake_tensor(r) is not None else () for r in results(body)]
        self.homes = outside

    def _assign(self, node: fx.Node, label: Label | None) -> None:
        sizes = self.shape(node)
        if label is None or len(label) != len(sizes):
            label = tuple(fresh(node.name, dim, size) for dim, size in enumerate(sizes))
        checked = []
        for dim, (axis, size) in enumerate(zip(label, sizes, strict=True)):
            # A rule that got a size wrong would mislabel everything after it.
            if not same(axis_size(axis), size):
                axis = fresh(node.name, dim, size)
            if not size.expr.is_number:
                self.homes.setdefault(size.expr, (node, dim))
                if size.expr.is_symbol:
                    self.hints[size.expr] = sympy.Integer(size.hint)
            checked.append(axis)
        self.labels[node] = tuple(checked)


def is_parameter(node: fx.Node) -> bool:
    """Whether an input is a weight or a buffer rather than data of the call."""
    if node.op == "get_attr" or isinstance(fake_tensor(node), torch.nn.Parameter):
        return True
    source = source_name(node)
    # A tensor that a submodule keeps as a plain attribute is the model's too (a precomputed rotary table).
    return any(name in source for name in ("_parameters", "_buffers", "_modules"))


def source_name(node: fx.Node) -> str:
    """Where Dynamo took an input from, such as ``L['hidden_states']``; "" outside Dynamo."""
    source = getattr(node, "_dynamo_source", None)
    if source is None:
        return ""
    name = source.name
    return str(name() if callable(name) else name)
