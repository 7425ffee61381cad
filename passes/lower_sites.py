"""lower_sites: put ``fps::attention`` in the place of every planned site.

The op takes q, k, v in whatever strides they have and returns [B, L, heads, features] memory seen as
[B, heads, L, features], so the transposes around the call stay views. What changes per call is an input:

- the phase, int32 on the device, from the published progress or from the timestep input of the graph;
- the layer, as an offset of the phase, where one block's code serves them all;
- the grid, as sizes read from tensors of the graph, as constants, as published by ``attach``, or as the values of a
  rotary table show it.

Legality is find_sites' business; this pass only writes. What follows in the pipeline reads its calls.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
import operator
import re
from collections.abc import Callable
from dataclasses import dataclass

import sympy
import torch
from torch import fx
from torch._dynamo.symbolic_convert import InstructionTranslator

import fpscompile.ops
import fpscompile.rotary_grid  # noqa: F401  (with ops: registers torch.ops.fps)
from fpscompile.errors import FpsError
from fpscompile.ir import AttentionSite, Reason, Rejection, Size, Span
from fpscompile.passes.axes import Axis, axis_size, describe, same
from fpscompile.passes.base import GraphState, copy_origin, emit, fake_tensor, shape_of
from fpscompile.passes.legality import key_mask
from fpscompile.passes.plan_sites import conservative_phase, resolved_plan
from fpscompile.passes.strides import laid_out_as
from fpscompile.passes.subgraphs import carry, holder, outermost_call
from fpscompile.passes.trace_axes import source_name
from fpscompile.plan import ResolvedPlan
from fpscompile.selection import tiles_per_volume

PROGRESS, GRID, LAYERS = "progress", "grid", "layers"
"""Inputs that the backend appends to the graph and fills on every call."""


@dataclass(frozen=True)
class LowerSites:
    name: str = "lower_sites"

    def run(self, state: GraphState) -> bool:
        if not state.plans:
            return False
        inputs = _Inputs(state)
        for place, site in enumerate(state.sites):
            if site.node not in state.plans:
                continue
            try:
                state.rewritten[site.node] = _rewrite(state, site, inputs)
            except _UnreadableSizeError as error:
                del state.plans[site.node]
                rejection = Rejection(Reason.NO_GRID, str(error), error.size, site.node)
                state.sites[place] = dataclasses.replace(site, rejection=rejection)
        return True


class _UnreadableSizeError(FpsError):
    """A size of the grid that the graph cannot compute."""

    def __init__(self, size: Size, axis: Axis) -> None:
        super().__init__(
            f"the graph has no tensor of the size {size.expr} of {describe(axis) or 'the grid'}: compile with "
            "dynamic=False, or give the model its sizes as constants"
        )
        self.size = size


def _rewrite(state: GraphState, site: AttentionSite, inputs: _Inputs) -> fx.Node:
    plan = state.plans[site.node]
    query, key, value = site.node.args[:3]
    resolved = resolved_plan(site, plan)
    conservative = conservative_phase(site, state, resolved)
    device = fake_tensor(query).device  # type: ignore[union-attr]
    phase = inputs.phase(conservative, device, inputs.timestep_fits(site))
    published = inputs.extra(GRID, torch.int64, (3,), torch.device("cpu")) if site.grid_source == "attach" else None
    with state.graph.inserting_before(outermost_call(state, site.node)):
        sizes = _SizeReader(state)
        if site.table is not None:
            published = inputs.of_table(site.table, sizes)
        grid = [] if published is not None else sizes.grid(site)
        assert site.query_span is not None
        assert site.key_span is not None
        spans = (sizes.span(site.query_runs, site.query_span), sizes.span(site.key_runs, site.key_span))
        phase = inputs.of_layer(phase, site)
        capacity = _capacity(state, grid, spans[0][1], resolved) if resolved.dynamic else None
    inner = holder(state, site.node)
    phase, published = carry(phase, inner), carry(published, inner)  # type: ignore[assignment]
    numbers = [[carry(size, inner) for size in listed] for listed in (grid, *spans)]
    with inner.graph.inserting_before(site.node):
        rest = (_mask(inner, site.node), phase, numbers[0], published, *numbers[1:], site.node.kwargs.get("scale"))
        rest += (plan.to_json(),)
        if capacity is not None:
            chosen = (query, key, *rest, carry(capacity, inner))
            selection = emit(inner, torch.ops.fps.select_tiles.default, chosen)
            copy_origin(selection, site.node)
            rest += (selection,)
        node = emit(inner, torch.ops.fps.attention.default, (query, key, value, *rest))
        output = laid_out_as(inner, emit(inner, operator.getitem, (node, 0)), site.node)
    for new in (node, output):
        copy_origin(new, site.node)
    site.node.replace_all_uses_with(output)
    inner.graph.erase_node(site.node)
    return node


def _capacity(
    state: GraphState, grid: list[int | fx.Node], video: int | fx.Node, resolved: ResolvedPlan
) -> int | fx.Node:
    """An upper bound on the number of video tiles: exact where the graph shows the grid."""

    def compute(function: Callable[[int, int], int], left: int | fx.Node, right: int | fx.Node) -> int | fx.Node:
        if isinstance(left, int) and isinstance(right, int):
            return function(left, right)
        return emit(state, function, (left, right))

    if not grid:
        volumes = compute(operator.add, compute(operator.floordiv, video, resolved.q_layout.volume), 1)
        return compute(operator.mul, volumes, tiles_per_volume(resolved))
    counts = [
        compute(operator.floordiv, compute(operator.add, size, step - 1), step)
        for size, step in zip(grid, resolved.plan.tile, strict=True)
    ]
    return functools.reduce(functools.partial(compute, operator.mul), counts)


def _mask(state: GraphState, node: fx.Node) -> fx.Node | None:
    """The key mask as [B | 1, H | 1, 1, Lk]."""
    mask = key_mask(node)
    if mask is None:
        return None
    rank = len(shape_of(mask))
    if rank == 1:
        mask = emit(state, "unsqueeze", (mask, 0))
        rank = 2
    while rank < 4:
        mask = emit(state, "unsqueeze", (mask, 0))
        rank += 1
    return mask


def find_timestep(state: GraphState) -> fx.Node | None:
    """The graph input that ``options["timestep"]["input"]`` names, if it is one tensor."""
    name = state.settings.timestep.input
    positions = _forward_parameters(state)
    found = []
    for node in state.graph.nodes:
        if node.op != "placeholder" or fake_tensor(node) is None:
            continue
        source = source_name(node) or f".{node.target}"
        positional = re.fullmatch(r"L\['args'\]\[(\d+)\]", source)
        if positional and int(positional[1]) < len(positions):
            source = f".{positions[int(positional[1])]}"
        if source.endswith((f"['{name}']", f".{name}")):
            found.append(node)
    return found[0] if len(found) == 1 else None


def _forward_parameters(state: GraphState) -> list[str]:
    """Names of the root module's forward arguments: a decorated forward hides them behind ``*args``."""
    cls = _root_of_frame() or _root_of_stack(state)
    forward = getattr(cls, "forward", None)
    return list(inspect.signature(forward).parameters)[1:] if forward is not None else []


def _root_of_frame() -> type | None:
    """Class of ``self`` in the frame that Dynamo is compiling; None where Dynamo does not say."""
    try:
        scope = InstructionTranslator.current_tx().output.local_scope
    except (AttributeError, AssertionError):
        return None
    return type(scope["self"]) if isinstance(scope.get("self"), torch.nn.Module) else None


def _root_of_stack(state: GraphState) -> type | None:
    """Class of the outermost module that the graph's nodes remember."""
    stacks = (node.meta.get("nn_module_stack") for node in state.graph.nodes)
    return next((next(iter(stack.values()))[1] for stack in stacks if stack), None)


class _Inputs:
    """What the op reads besides q, k, v: the phase, and inputs appended to the graph. Made once per graph."""

    def __init__(self, state: GraphState) -> None:
        self.state = state
        self.timestep = find_timestep(state)
        self.last = [node for node in state.graph.nodes if node.op == "placeholder"][-1]
        self.extras: dict[str, fx.Node] = {}
        self.phases: dict[tuple[int, torch.device, bool], fx.Node] = {}
        self.tables: dict[tuple[fx.Node, int, Size, Size], fx.Node] = {}

    def timestep_fits(self, site: AttentionSite) -> bool:
        """Whether the site's batch runs over the timestep's batch first, so that a per-sample phase fits it."""
        shape = shape_of(self.timestep) if self.timestep is not None else ()
        if not shape or shape[0].expr == 1:
            return True
        axis = self.state.labels[site.node.args[0]][0]  # type: ignore[index]
        return same(axis_size(axis), shape[0]) or (bool(axis) and same(axis[0].size, shape[0]))

    def phase(self, conservative: int, device: torch.device, per_sample: bool) -> fx.Node:
        """The node that computes the phase: from published progress first, else from the timestep."""
        key = (conservative, device, per_sample)
        if key not in self.phases:
            self.phases[key] = self._phase(*key)
        return self.phases[key]

    def _phase(self, conservative: int, device: torch.device, per_sample: bool) -> fx.Node:
        state = self.state
        schedule, options = state.settings.phases, state.settings.timestep
        if len(schedule.phases) == 1:
            state.progress_source = "constant"
            with state.graph.inserting_after(self.last):
                return emit(state, torch.zeros, ((1,),), {"dtype": torch.int32, "device": device})
        timestep = self.timestep if per_sample else None
        if timestep is not None:
            state.progress_source = f"input {options.input!r}"
        elif state.attached:
            state.progress_source = "attach"
        else:
            state.progress_source = "unknown"
            state.note(
                "warning",
                "progress-unknown",
                f"the graph has no tensor input {options.input!r} to read the denoising step from, so every step uses "
                f"phase {conservative}, the densest; call fpscompile.attach, or name the input in options['timestep']",
            )
        published = self.extra(PROGRESS, torch.float32, (1,), device)
        arguments = (timestep, published, list(schedule.boundaries), conservative)
        with state.graph.inserting_after(self.last):
            return emit(
                state,
                torch.ops.fps.phase_index.default,
                (*arguments, float(options.start), float(options.end), float(options.shift)),
            )

    def of_layer(self, phase: fx.Node, site: AttentionSite) -> fx.Node:
        """``phase`` among the phases of all variants, where the layer is known at run time only."""
        state = self.state
        placed = state.layers.get(site.node)
        if placed is None or placed.inside is None:
            return phase
        shared = [node for node, other in state.layers.items() if other.inside is not None]
        offsets = self.extra(LAYERS, torch.int32, (len(shared),), fake_tensor(phase).device)  # type: ignore[union-attr]
        place = shared.index(site.node)
        return emit(state, operator.add, (phase, emit(state, operator.getitem, (offsets, slice(place, place + 1)))))

    def of_table(self, table: tuple[fx.Node, int, Size, Size], sizes: _SizeReader) -> fx.Node:
        """The grid that a rotary table shows, read once per call of the graph, at the first site that needs it."""
        if table not in self.tables:
            node, dim, start, count = table
            rows = (sizes.read(start, ()), sizes.read(count, ()))
            self.tables[table] = emit(self.state, torch.ops.fps.rotary_grid.default, (node, dim, *rows))
        return self.tables[table]

    def extra(self, name: str, dtype: torch.dtype, shape: tuple[int, ...], device: torch.device) -> fx.Node:
        """A graph input after all others. It has no Dynamo source: nothing is guarded on it."""
        if name not in self.extras:
            state = self.state
            with state.graph.inserting_after(self.last):
                node = state.graph.placeholder(f"fps_{name}")
            with state.fake_mode or contextlib.nullcontext():
                node.meta["example_value"] = torch.zeros(shape, dtype=dtype, device=device)
            node._dynamo_source = None  # type: ignore[attr-defined]
            state.inputs.append(name)
            self.last = self.extras[name] = node
        return self.extras[name]


class _SizeReader:
    """Writes sizes as constants where they are numbers, else reads them from tensors of the graph."""

    def __init__(self, state: GraphState) -> None:
        self.state = state

    def read(self, size: Size, axis: Axis) -> int | fx.Node:
        """``size``, which is that of ``axis``: off a tensor that has it, or computed from sizes that tensors have."""
        found = self._expression(size.expr)
        if found is None and len(axis) >= 2:
            sizes = (self.read(factor.size, (factor,)) for factor in axis)
            found = functools.reduce(functools.partial(self._apply, operator.mul), sizes)
        if found is None:
            raise _UnreadableSizeError(size, axis)
        return found

    def _expression(self, expression: sympy.Expr) -> int | fx.Node | None:
        """Sums and products of sizes that tensors have; None for what is not."""
        if expression.is_number:
            return int(expression)
        if expression in self.state.homes:
            return emit(self.state, "size", self.state.homes[expression])
        operator_of = {sympy.Add: operator.add, sympy.Mul: operator.mul}.get(expression.func)
        if operator_of is None:
            return None
        terms = [self._expression(term) for term in expression.args]
        if any(term is None for term in terms):
            return None
        return functools.reduce(functools.partial(self._apply, operator_of), terms)

    def _apply(self, function: Callable[[int, int], int], left: int | fx.Node, right: int | fx.Node) -> int | fx.Node:
        if isinstance(left, int) and isinstance(right, int):
            return function(left, right)
        return emit(self.state, function, (left, right))

    def span(self, pieces: tuple[Axis, ...], span: Span) -> list[int | fx.Node]:
        """[first video token, number of video tokens] in a sequence of ``pieces``."""
        ahead, start = [], 0
        for piece in pieces:
            if start == span.start.hint and same(axis_size(piece), span.length):
                break
            ahead.append(piece)
            start += axis_size(piece).hint
        video = pieces[len(ahead)]
        first: int | fx.Node = 0
        for piece in ahead:
            length = self.read(axis_size(piece), piece)
            first = self._apply(operator.add, first, length)
        return [first, self.read(span.length, video)]

    def grid(self, site: AttentionSite) -> list[int | fx.Node]:
        return [self.read(size, ()) for size in site.grid or ()]
