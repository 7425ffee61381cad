"""What every pass gets and gives, and how a pass adds nodes with right metadata."""

from __future__ import annotations

import contextlib
import functools
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

import sympy
import torch
from torch import fx
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from fpscompile.ir import AttentionSite, Rejection, Size
from fpscompile.passes.axes import Axis, Label
from fpscompile.plan import Plan
from fpscompile.records import Note
from fpscompile.settings import Settings

STAND_IN = sympy.Integer(61)
"""Hint of a size that depends on data. A prime, so that it divides nothing by chance."""

FakeValue = Any
"""What Dynamo keeps in ``node.meta["example_value"]``: a fake tensor, a SymInt, a container of them, or None."""


@dataclass
class GraphState:
    """One graph on its way through the passes: the graph itself and what the passes before have established.

    Made for one compilation and thrown away with it; passes hold no state of their own.
    """

    gm: fx.GraphModule
    settings: Settings
    published_grid: tuple[int, int, int] | None = None
    """The grid that ``attach`` publishes for the call being compiled."""
    attached: bool = False
    """Whether an attachment exists for the call being compiled."""
    untold: bool = False
    """Whether there is one, but no call of it is open: its hooks are inside of what is being compiled."""
    block: str = ""
    """Path of the block ("blocks.3") that holds all of the graph's weights, where an attachment tells."""
    weights: tuple[str, ...] = ()
    """Names of all weights of the attached model; () without an attachment."""
    notes: list[Note] = field(default_factory=list)
    near_misses: list[Rejection] = field(default_factory=list)
    """From normalize: arithmetic that resembles attention, and why it is not taken for it."""
    labels: dict[fx.Node, Label] = field(default_factory=dict)
    """From trace_axes: what every tensor dimension is made of."""
    operands: dict[fx.Node, list[Label]] = field(default_factory=dict)
    """From trace_axes: labels of q, k and v of each canonical call, when it is made."""
    homes: dict[sympy.Expr, tuple[fx.Node, int]] = field(default_factory=dict)
    """From trace_axes: the first node and dimension of each symbolic size, to read it from at run time."""
    meetings: dict[Axis, list[Any]] = field(default_factory=dict)
    """From trace_axes: the tensors that each axis met element by element under another name."""
    sites: list[AttentionSite] = field(default_factory=list)
    """From find_sites."""
    plans: dict[fx.Node, Plan] = field(default_factory=dict)
    """From plan_sites: a plan for every site that will be rewritten."""
    layers: dict[fx.Node, Placed] = field(default_factory=dict)
    """From plan_sites: where in the model the planned sites are; only with ``options["layers"]``."""
    rewritten: dict[fx.Node, fx.Node] = field(default_factory=dict)
    """From lower_sites: canonical call -> the ``fps::attention`` node in its place."""
    progress_source: str = ""
    """From lower_sites: how the denoising step reaches the graph."""
    inputs: list[str] = field(default_factory=list)
    """From lower_sites: inputs added at the end of the graph, "progress" and "grid", in order."""
    replaced: list[Replacement] = field(default_factory=list)
    """From normalize: canonical calls and what they stand for; restore settles each of them."""
    declined: dict[fx.Node, Rejection] = field(default_factory=dict)
    """From normalize: canonical calls that stand for more than attention, and what that is; never planned."""
    parent: GraphState | None = None
    """For the body of a higher-order op: the graph around it."""
    call: fx.Node | None = None
    """For a body: the node of ``parent`` that calls it."""
    prefix: str = ""
    """For a body: what the names of its nodes begin with, so that no two graphs have nodes of one name."""
    children: list[GraphState] = field(default_factory=list)
    """Bodies that the passes look into. They share labels, declined calls, near misses and notes with this graph."""

    @property
    def graph(self) -> fx.Graph:
        return self.gm.graph

    @functools.cached_property
    def fake_mode(self) -> FakeTensorMode | None:
        """The mode of the graph's inputs."""
        return fake_mode(fake_value(node) for node in self.graph.nodes if node.op == "placeholder")

    def everywhere(self) -> Iterator[GraphState]:
        """This graph, then the bodies in it, depth first."""
        yield self
        for child in self.children:
            yield from child.everywhere()

    def note(self, level: str, code: str, message: str) -> None:
        if not any(note.code == code and note.message == message for note in self.notes):
            self.notes.append(Note(level, code, message))


@dataclass(frozen=True)
class Placed:
    """Which of the settings' variants a site runs."""

    path: str
    """Of its module in the model."""
    variant: int
    """In the call that is being compiled; an index into ``Settings.variants``."""
    inside: str | None = None
    """Path inside the block, where the code may serve other blocks too: the variant is then an input, and the plan
    has the phases of all variants, one after the other."""


@dataclass(frozen=True)
class Replacement:
    """A canonical call and the author's own, both in the graph until it is settled which of them stays."""

    state: GraphState
    """The graph that they are in."""
    call: fx.Node
    """The canonical call."""
    result: fx.Node
    """Computed from ``call``: what readers of ``original`` read now."""
    original: fx.Node
    added: tuple[fx.Node, ...]
    """Nodes of the canonical spelling, in order."""
    covered: tuple[fx.Node, ...]
    """Nodes of the author's spelling that only it needs, last first."""


_WRAPPERS = re.compile(
    r"\.(function_reference|forward|__func__|__self__|__wrapped__|func(?=\.__closure__)|__closure__\.\d+\.cell_contents)"
    r"(?=\.|$)"
)


class Pass(Protocol):
    """A frozen dataclass with a name; ``run`` changes the state and says whether it changed the graph."""

    @property
    def name(self) -> str: ...

    def run(self, state: GraphState) -> bool: ...


def fake_value(node: Any) -> FakeValue:
    """The fake value of a node (None when it has none); any other object is its own value."""
    return node.meta.get("example_value") if isinstance(node, fx.Node) else node


def fake_tensor(node: Any) -> torch.Tensor | None:
    value = fake_value(node)
    return value if isinstance(value, torch.Tensor) else None


def device_type(node: Any) -> str | None:
    """The type of the device that a node's tensor is on; None when it has none."""
    value = fake_tensor(node)
    return value.device.type if value is not None else None


def size_of(value: int | torch.SymInt) -> Size:
    """A dimension as expression and hint, without installing a guard.

    An unbacked symbol (a size that depends on data) has no value yet: :data:`STAND_IN` takes its place in hints.
    """
    if isinstance(value, torch.SymInt):
        return Size(value.node.expr, _hint(value.node))
    return Size(sympy.Integer(int(value)), int(value))


def _hint(node: Any) -> int:
    if isinstance(node.hint, int):
        return node.hint
    known = node.shape_env.backed_var_to_val
    values = {symbol: known.get(symbol, STAND_IN) for symbol in node.expr.free_symbols}
    # The ragged size of a nested tensor has a symbol and no number.
    value = node.expr.xreplace({symbol: size if size.is_Integer else STAND_IN for symbol, size in values.items()})
    return int(value) if value.is_number else int(STAND_IN)


def shape_of(node: fx.Node) -> tuple[Size, ...]:
    """Sizes of a tensor node."""
    value = fake_tensor(node)
    assert value is not None, f"{node} is not a tensor"
    return tuple(size_of(size) for size in value.shape)


def emit(
    state: GraphState, target: Callable[..., Any] | str, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None
) -> fx.Node:
    """Insert a call at the graph's insertion point, with its fake value computed. A str target is a method."""
    kwargs = kwargs or {}
    node = (
        state.graph.call_method(target, args, kwargs)
        if isinstance(target, str)
        else state.graph.call_function(target, args, kwargs)
    )
    if state.prefix:
        node._rename(f"{state.prefix}_{node.name}")
    node.meta["example_value"] = evaluate(state, node)
    return node


def evaluate(state: GraphState, node: fx.Node, values_of: Callable[[fx.Node], Any] = fake_value) -> Any:
    """The fake value of a call, of what ``values_of`` gives for its operands."""
    values = fx.map_arg(node.args, values_of)
    named = fx.map_arg(node.kwargs, values_of)
    mode = fake_mode(_leaves((values, named))) or state.fake_mode
    call: Any = getattr(values[0], node.target) if isinstance(node.target, str) else node.target
    inputs = values[1:] if isinstance(node.target, str) else values
    # As Dynamo does: without the Python dispatcher, torch 2.11 reads sizes of composite ops as numbers, with guards.
    with mode or contextlib.nullcontext(), enable_python_dispatcher():
        return call(*inputs, **named)


def fake_mode(values: Iterable[Any]) -> FakeTensorMode | None:
    """The mode of the first fake tensor: the one Dynamo traced in, which is not the one the inner compiler gets."""
    return next((value.fake_mode for value in values if isinstance(value, FakeTensor)), None)


def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, (tuple, list)):
        for item in value:
            yield from _leaves(item)
    elif isinstance(value, dict):
        for item in value.values():
            yield from _leaves(item)
    else:
        yield value


def copy_origin(new: fx.Node, old: fx.Node) -> None:
    """Give a new node the module and source line of the one it stands for."""
    for key in ("stack_trace", "nn_module_stack", "source_fn_stack"):
        if key in old.meta:
            new.meta[key] = old.meta[key]


def module_path(node: fx.Node) -> str:
    """Dotted path of the module that made the call, "" when the graph does not say."""
    stack = node.meta.get("nn_module_stack") or {}
    if not stack:
        return ""
    path = str(list(stack.values())[-1][0])
    words = re.findall(r"[A-Za-z_]\w*|\d+", path)
    kept = (w for w in words if w not in ("L", "G", "self", "fn", "target", "_modules", "__dict__", "_orig_mod"))
    # A module whose ``forward`` was wrapped (hooks of diffusers and accelerate) is reached through the wrapper.
    return _WRAPPERS.sub("", f".{'.'.join(kept)}").removeprefix(".")


def target_name(node: fx.Node) -> str:
    """The bare name of what a node calls: ``transpose`` for the method, the function and the aten op alike.

    Ops of other namespaces keep theirs (``mylib::transpose``), so no rule takes them for torch's own.
    """
    target = node.target
    if node.op == "call_method":
        return str(target)
    if isinstance(target, torch._ops.OpOverloadPacket):
        namespace, _, name = target._qualified_op_name.partition("::")
        return name if namespace == "aten" else f"{namespace}::{name}"
    if isinstance(target, torch._ops.OpOverload):
        namespace, _, name = target._schema.name.partition("::")
        return name if namespace == "aten" else f"{namespace}::{name}"
    if isinstance(target, torch._ops.HigherOrderOperator):
        return f"hop::{target.name()}"
    name = getattr(target, "__name__", str(target))
    module = getattr(target, "__module__", None) or ""
    known = module.partition(".")[0] in ("torch", "_operator", "operator", "builtins", "")
    return str(name) if known else f"{module}::{name}"


def pinned(value: Any) -> Any:
    """A float of the graph as the number it is in this call, which is guarded on; anything else as it is.

    For settings such as a dropout rate, which Dynamo hands over as inputs when shapes are dynamic. Sizes are never
    pinned.
    """
    scalar = fake_value(value)
    return float(scalar) if isinstance(scalar, torch.SymFloat) and scalar.node.has_hint() else value


def words(text: str) -> frozenset[str]:
    """A set of names, written as one text."""
    return frozenset(text.split())


def argument(node: fx.Node, position: int, name: str, default: Any = None) -> Any:
    """An argument given by position or by name."""
    if len(node.args) > position:
        return node.args[position]
    return node.kwargs.get(name, default)
