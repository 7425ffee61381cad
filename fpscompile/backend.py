"""``torch.compile(model, backend="fps")``: what Dynamo calls with each captured graph."""

from __future__ import annotations

import contextlib
import copy
import logging
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import networkx as nx
import torch
from torch import fx

from fpscompile import runtime
from fpscompile.errors import FpsError, StrictError
from fpscompile.graph_breaks import notes_on_breaks
from fpscompile.graph_view import neighbourhood
from fpscompile.inner import Compiled, check_cpp_compiler, inner_compiler, note_on_graphs
from fpscompile.ir import AttentionSite, Reason
from fpscompile.kept import capturing, integers
from fpscompile.late_grid import watch
from fpscompile.lowerings import cpp
from fpscompile.passes.base import GraphState, fake_tensor, module_path
from fpscompile.passes.layers import VariantsOfCall, shared_block
from fpscompile.passes.lower_sites import GRID, LAYERS, PROGRESS
from fpscompile.passes.pipeline import run_pipeline
from fpscompile.passes.plan_sites import conservative_phase, phases_of_call, resolved_plan
from fpscompile.records import GraphRecord, SiteRecord, strict_failures
from fpscompile.settings import Settings

logger = logging.getLogger(__name__)

LOUD = ("tuning-ignored", "calibration-ignored", "cuda-graphs")
"""Notes that are logged as warnings though strict accepts them: the model is right, only not as it was asked for."""

CAPTURED = (
    "a CUDA graph is being captured around compiled code that fpscompile.attach tells the denoising step: replays keep "
    "the phase of their step (here at progress %.3f). Capture one graph per phase; or compile the whole model and "
    "attach it without a scheduler, then its timestep input tells the phase at every replay"
)

UNTOLD = (
    "compiled code that holds no timestep is not told the denoising step either, and runs the densest phase: pass "
    "fpscompile.attach a scheduler, call Attachment.step(index, total) ahead of each call, or compile the whole model, "
    "whose graph can read the timestep"
)


def fps(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    options: Mapping[str, Any] | None = None,
    mode: str | None = None,
) -> Compiled:
    """The registered backend: rewrite the graph's 3D attention, hand the rest to the inner compiler.

    Args:
        options: fields of :class:`~fpscompile.settings.Settings`.
        mode: one of Inductor's modes, passed on; refused for other inner compilers.

    Raises:
        FpsError: bad options, no C++ compiler, or ``strict=True`` and a site not rewritten. Dynamo wraps it in
            ``BackendCompilerFailed``.
    """
    return Backend(Settings.from_options(options), mode)(gm, example_inputs)


class Backend:
    """The backend as an object that keeps its records: ``torch.compile(model, backend=Backend(settings))``."""

    def __init__(
        self,
        settings: Settings | None = None,
        mode: str | None = None,
        *,
        detail: bool = False,
        inner: Callable[[fx.GraphModule, list[Any]], Compiled] | None = None,
    ) -> None:
        self.settings = settings or Settings()
        self.mode = mode
        self.detail = detail
        """Whether records keep the graphs' code and pictures; costs time and memory on large graphs."""
        self.inner = inner
        """Compiles rewritten graphs instead of the settings' inner compiler."""
        self.graphs: list[GraphRecord] = []

    def __call__(self, gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Compiled:
        inner = self.inner or inner_compiler(self.settings, self.mode)
        record, state = rewrite(gm, self.settings, detail=self.detail)
        note_on_graphs(state, self.mode)
        _log(record)
        if self.settings.strict:
            _check_strict(record)
        if self.inner is None and self.settings.inner == "inductor":
            check_cpp_compiler(gm)
        extra = [node for node in gm.graph.nodes if node.op == "placeholder"][len(example_inputs) :]
        _build_ahead(state)
        compiled = inner(gm, [*example_inputs, *_examples_of(extra)])
        # Only now: Dynamo may restart its analysis from inside the inner compiler and hand over the graph again.
        self.graphs.append(record)
        if extra:
            devices = [fake_tensor(node).device for node in extra]  # type: ignore[union-attr]
            compiled = _with_inputs(compiled, state, devices)
        attention = bool(record.sites) or any(note.level == "warning" for note in record.notes)
        return _met(compiled, attention, watch(state))


def rewrite(gm: fx.GraphModule, settings: Settings, *, detail: bool = False) -> tuple[GraphRecord, GraphState]:
    """Run the passes on ``gm`` and record what they decided. ``gm`` gets a new graph; the captured one stays whole."""
    began = time.perf_counter()
    captured = gm.graph
    gm.graph = _copy_graph(captured)
    call = runtime.current_call()
    arguments = [_example(node) for node in gm.graph.nodes if node.op == "placeholder"]
    owner = runtime.owner_of(arguments)
    attached = call is not None or owner is not None
    grid = runtime.grid_of(arguments)
    untold = call is None and owner is not None and grid is None
    state = GraphState(gm, settings, grid, attached, untold)
    if owner is not None and settings.layers:
        state.block = shared_block(list(runtime.weight_names(arguments)))
        state.weights = tuple(runtime.all_weight_names(owner))
    record = GraphRecord(settings=settings)
    pictures = _Pictures(state) if detail else None
    looked = False
    if os.environ.get("FPS_DISABLE", "0") not in ("", "0"):
        state.note("warning", Reason.DISABLED.value, "FPS_DISABLE is set: nothing is rewritten")
    else:
        try:
            with _own_saved_tensors():
                record.passes = run_pipeline(state, observe=pictures.observe if pictures else None)
            looked = True
        except FpsError:
            raise
        except Exception as error:
            if settings.strict:
                raise
            # A graph that the passes cannot handle is the user's no less: it runs as it was captured.
            logger.debug("the passes failed", exc_info=True)
            gm.graph = _copy_graph(captured)
            state = GraphState(gm, settings, state.published_grid, attached, untold)
            message = f"the passes failed on this graph, nothing is rewritten in it ({type(error).__name__}: {error})"
            state.note("warning", "internal-error", f"{message}; options={{'strict': True}} shows where")
            pictures = None
    if pictures is not None:
        pictures.finish(record)
    record.sites = [_site_record(state, site) for site in state.sites]
    for miss in state.near_misses:
        state.note("info", f"near-miss-{miss.code.value}", f"{miss.node}: {miss.message}")
    if looked:
        state.notes += notes_on_breaks(gm, record.sites, [str(miss.message) for miss in state.near_misses])
    record.notes = state.notes
    record.settings = state.settings  # with a calibration, where the tuning file holds one
    record.progress_source = state.progress_source
    _check_told_grid(record, call.publisher if call is not None else owner)
    record.seconds = sum(step.seconds for step in record.passes)
    logger.debug("passes took %.3f s, all of the rewrite %.3f s", record.seconds, time.perf_counter() - began)
    return record, state


def _check_told_grid(record: GraphRecord, publisher: runtime.Publisher | None) -> None:
    """Say once that a graph which proves its grid, for this size of video, does not read that of the attachment."""
    told = publisher.told_grid if publisher is not None else None
    if publisher is None or publisher.told_in_vain or told is None:
        return
    rewritten = [site for site in record.sites if site.rewritten]
    other = next((s for s in rewritten if s.grid_source in ("graph", "rotary") and s.grid != told), None)
    if other is None or any(s.grid_source == "attach" for s in rewritten):  # of several resolutions it is one
        return
    publisher.told_in_vain = True
    logger.warning(
        "attach was given grid=%s, which is not used: the graph itself shows %s at %s. Leave the grid out",
        *(told, other.grid, other.module or other.node),
    )


@contextlib.contextmanager
def _own_saved_tensors() -> Iterator[None]:
    """Keep the fake tensors that the passes compute from hooks of the caller, such as a checkpoint's, which counts."""
    if not torch._C._autograd._saved_tensors_hooks_is_enabled():  # type: ignore[attr-defined]
        yield
        return
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor):
        yield


def _copy_graph(graph: fx.Graph) -> fx.Graph:
    """Dynamo still reads the graph it captured, to call what we return; inputs that we append must not show there."""
    result = copy.deepcopy(graph)
    for old, new in zip(graph.nodes, result.nodes, strict=True):
        if hasattr(old, "_dynamo_source"):
            new._dynamo_source = old._dynamo_source
    return result


class _Pictures:
    """The graph's code and the surroundings of its sites, before and after."""

    def __init__(self, state: GraphState) -> None:
        self.state = state
        self.code = state.gm.print_readable(print_output=False)
        self.before: dict[fx.Node, tuple[str, nx.DiGraph]] = {}

    def observe(self, name: str) -> None:
        """Called ahead of each pass; the last look at the old calls is ahead of lower_sites."""
        if name != "lower_sites":
            return
        seen = set()
        for site in self.state.sites:
            outcome = (site.kind, site.shape, site.node in self.state.plans)
            if site.node in self.state.plans and outcome not in seen:
                seen.add(outcome)
                self.before[site.node] = (site.node.name, neighbourhood(site.node.graph, site.node))

    def finish(self, record: GraphRecord) -> None:
        record.graph_before = self.code
        record.graph_after = self.state.gm.print_readable(print_output=False)
        for old, (name, picture) in self.before.items():
            new = self.state.rewritten[old]
            record.neighbourhoods.append((name, picture, neighbourhood(new.graph, new)))


def _example(node: fx.Node) -> Any:
    """The tensor that Dynamo captured a placeholder from, if it still has it."""
    argument = node.meta.get("grapharg")
    try:
        return argument.example if argument is not None else None
    except (AttributeError, TypeError):
        return None


def _site_record(state: GraphState, site: AttentionSite) -> SiteRecord:
    batch, heads, q_length, k_length, head_dim = (size.hint for size in site.shape)
    plan = state.plans.get(site.node)
    resolved = resolved_plan(site, plan) if plan is not None else None
    own = phases_of_call(site, state)
    grid = tuple(size.hint for size in site.grid) if site.grid is not None else None
    return SiteRecord(
        node=site.node.name,
        module=state.layers[site.node].path if site.node in state.layers else module_path(site.node),
        kind=site.kind,
        batch=batch,
        heads=heads,
        head_dim=head_dim,
        q_length=q_length,
        k_length=k_length,
        dtype=site.dtype,
        grid=grid,  # type: ignore[arg-type]
        grid_source=site.grid_source,
        segments=tuple((segment.kind, segment.length.hint) for segment in site.segments),
        rewritten=site.node in state.rewritten,
        reason=site.rejection.message if site.rejection is not None else None,
        reason_code=site.rejection.code.value if site.rejection is not None else None,
        plan=plan,
        lowering=plan.lowering if plan is not None else None,
        windows=resolved.windows[own] if resolved is not None else (),
        density=resolved.densities[own] if resolved is not None else (1.0,),
        conservative=conservative_phase(site, state, resolved) if resolved is not None else 0,
    )


def _log(record: GraphRecord) -> None:
    """What was rewritten at INFO; every call that was left as it is, and every note, at its level."""
    rewritten = [site for site in record.sites if site.rewritten]
    if rewritten:
        densities = sorted({tuple(round(d, 4) for d in site.density) for site in rewritten})
        logger.info(
            "rewrote %d of %d attention calls; density per phase: %s",
            len(rewritten),
            len(record.sites),
            "; ".join(" / ".join(f"{d:.3f}" for d in phases) for phases in densities),
        )
    elif record.sites:
        logger.info("rewrote none of %d attention calls", len(record.sites))
    for site in record.sites:
        if not site.rewritten:
            level = logging.DEBUG if site.reason_code == Reason.KIND.value else logging.WARNING
            logger.log(level, "%s (%s) is left as it is: %s", site.node, site.module, site.reason)
    for note in record.notes:
        loud = note.level == "warning" or note.code in LOUD
        logger.log(logging.WARNING if loud else logging.INFO, "%s", note.message)


def _check_strict(record: GraphRecord) -> None:
    """Under strict, every site of a requested kind is rewritten and every assumption is certain."""
    failures = strict_failures(record.sites, record.notes)
    if failures:
        raise StrictError("strict=True and not everything was rewritten:\n  " + "\n  ".join(failures))


def _with_inputs(compiled: Compiled, state: GraphState, devices: Sequence[torch.device]) -> Compiled:
    """``compiled`` with the appended inputs filled on every call, from whoever publishes them."""
    names = tuple(state.inputs)
    variants = VariantsOfCall(state) if LAYERS in names else None
    silent = PROGRESS in names and state.progress_source == "attach"

    def call(*args: Any) -> Any:
        with runtime.running(args) as (progress, grid):
            values = {
                PROGRESS: lambda device: torch.full((1,), progress, device=device),
                GRID: lambda device: torch.tensor(grid or (0, 0, 0), dtype=torch.int64),
                LAYERS: lambda device: integers(variants(args), device),  # type: ignore[misc]
            }
            nonlocal silent
            if silent and math.isnan(progress):  # a graph without a timestep, and an attachment that cannot tell
                silent = False
                logger.warning(UNTOLD)
            told = PROGRESS in names and not math.isnan(progress)
            if told and any(map(capturing, devices)) and runtime.first_capture(args):
                logger.warning(CAPTURED, progress)
            return compiled(*args, *(values[name](device) for name, device in zip(names, devices, strict=True)))

    return call


def _met(compiled: Compiled, attention: bool, check: Callable[[Sequence[Any]], None] | None) -> Compiled:
    """``compiled``, telling attachments whether attention was found: one that hears of none warns."""

    def call(*args: Any) -> Any:
        runtime.meet(args, attention)
        if check is not None:
            check(args)
        return compiled(*args)

    return call


def _build_ahead(state: GraphState) -> None:
    """Generated C++ kernels are built while the inner compiler works."""
    for site, call in state.rewritten.items():
        plan = state.plans[site]
        if plan.lowering == "cpp":
            query, _, value, key_mask = (
                fake_tensor(node) if isinstance(node, fx.Node) else None for node in call.args[:4]
            )
            assert query is not None
            assert value is not None
            cpp.build_ahead(query, value, key_mask, plan)


def _examples_of(nodes: Sequence[fx.Node]) -> list[torch.Tensor]:
    """Example inputs for placeholders that Dynamo does not know, fake in the mode the inner compiler traces in."""
    context = torch._guards.TracingContext.try_get()
    with (context and context.fake_mode) or contextlib.nullcontext():
        return [
            torch.zeros(value.shape, dtype=value.dtype, device=value.device)
            for value in map(fake_tensor, nodes)
            if value is not None
        ]
