"""trace_axes: label every tensor dimension with what it is made of.

An abstract interpretation in graph order. Inputs get one atom per dimension; each op's rule (axis_rules.py) carries
labels along; an op without a rule gives its output fresh atoms named after it, so a rejection can say where the
trail was lost. Nothing is guessed: equal labels mean the same positions.

Changes nothing in the graph. Runs after normalize, whose canonical calls it labels like any other node.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import sympy
import torch
from torch import fx

from fpscompile.passes.axes import INPUT, PARAMETER, Label, axis_size, fresh, leaves, same
from fpscompile.passes.axis_rules import RULES, broadcast, index_label, keeps_positions
from fpscompile.passes.base import GraphState, fake_tensor, fake_value, shape_of, size_of, target_name


@dataclass(frozen=True)
class TraceAxes:
    name: str = "trace_axes"

    def run(self, state: GraphState) -> bool:
        tracer = Tracer()
        for node in state.graph.nodes:
            tracer.visit(node)
        state.labels = tracer.labels
        state.homes = tracer.homes
        return False


@dataclass
class Tracer:
    """Labels so far, for one graph."""

    labels: dict[fx.Node, Label] = field(default_factory=dict)
    several: dict[fx.Node, list[Label]] = field(default_factory=dict)
    homes: dict[sympy.Expr, tuple[fx.Node, int]] = field(default_factory=dict)

    def label(self, node: Any) -> Label:
        """Label of a tensor node."""
        if node not in self.labels:
            self.labels[node] = tuple(fresh(node.name, dim, size) for dim, size in enumerate(shape_of(node)))
        return self.labels[node]

    def outputs(self, node: fx.Node) -> list[Label] | None:
        """Labels of a node with several outputs, when a rule gave them."""
        return self.several.get(node)

    def visit(self, node: fx.Node) -> None:
        if node.op == "placeholder" or node.op == "get_attr":
            self._input(node)
        elif node.op in ("call_function", "call_method"):
            self._call(node)

    def _input(self, node: fx.Node) -> None:
        if fake_tensor(node) is None:
            return
        source = PARAMETER if is_parameter(node) else INPUT
        label = tuple(fresh(node.name, dim, size, source) for dim, size in enumerate(shape_of(node)))
        self._assign(node, label)

    def _call(self, node: fx.Node) -> None:
        name = target_name(node)
        if name == "setitem":
            self._setitem(node)
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

    def _assign(self, node: fx.Node, label: Label | None) -> None:
        sizes = shape_of(node)
        if label is None or len(label) != len(sizes):
            label = tuple(fresh(node.name, dim, size) for dim, size in enumerate(sizes))
        checked = []
        for dim, (axis, size) in enumerate(zip(label, sizes, strict=True)):
            # A rule that got a size wrong would mislabel everything after it.
            if not same(axis_size(axis), size):
                axis = fresh(node.name, dim, size)
            if not size.expr.is_number:
                self.homes.setdefault(size.expr, (node, dim))
            checked.append(axis)
        self.labels[node] = tuple(checked)

    def _setitem(self, node: fx.Node) -> None:
        """``x[index] = value`` keeps x's label where the value's tokens are x's own; elsewhere they are lost."""
        target, index, value = node.args
        if not isinstance(target, fx.Node) or fake_tensor(target) is None or not isinstance(value, fx.Node):
            return
        written = fake_tensor(value)
        if written is None:
            return
        label = self.label(target)
        sizes = shape_of(target)
        # The region's own shape: sizes of x[index], read off the value broadcast to it.
        try:
            region = fake_tensor(target)[_plain(index)]  # type: ignore[index]
            part = index_label(label, sizes, index, [size_of(s) for s in region.shape], f"{node.name}.region")
        except Exception:  # an index a fake tensor cannot evaluate here: treat as unknown
            part = None
        if part is None:
            self.labels[target] = tuple(fresh(node.name, dim, size) for dim, size in enumerate(sizes))
            return
        given = self.label(value)
        conflict = set()
        for back in range(1, min(len(part), len(given)) + 1):
            if part[-back] and given[-back] and part[-back] != given[-back]:
                conflict.add(part[-back])
        if conflict:
            self.labels[target] = tuple(
                fresh(node.name, dim, size) if axis in conflict or _touches(axis, conflict) else axis
                for dim, (axis, size) in enumerate(zip(label, sizes, strict=True))
            )


def _touches(axis: Any, lost: set[Any]) -> bool:
    """Whether a part of ``axis`` is among the lost ones."""
    atoms = set(leaves(axis))
    return any(atoms & set(leaves(other)) for other in lost)


def _plain(index: Any) -> Any:
    return fx.map_arg(index, fake_value)


def is_parameter(node: fx.Node) -> bool:
    """Whether an input is a weight or a buffer rather than data of the call."""
    if node.op == "get_attr" or isinstance(fake_tensor(node), torch.nn.Parameter):
        return True
    source = source_name(node)
    return "_parameters" in source or "_buffers" in source


def source_name(node: fx.Node) -> str:
    """Where Dynamo took an input from, such as ``L['hidden_states']``; "" outside Dynamo."""
    source = getattr(node, "_dynamo_source", None)
    if source is None:
        return ""
    name = source.name
    return str(name() if callable(name) else name)
