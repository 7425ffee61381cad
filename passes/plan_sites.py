"""plan_sites: decide, for every legal 3D site, tile, schedule, quantization and lowering.

Runs after find_sites. Decides from Settings and from what the machine can run, so equal sites get equal plans. Errors
that the grid at hand would raise at run time (a density below its floor) are raised here, where the user sees them
with the compile.
"""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass

import torch

from fpscompile import cpp_build
from fpscompile.errors import OptionError, UnsupportedError
from fpscompile.gpu.call import has_fp8_tensor_cores
from fpscompile.ir import AttentionSite
from fpscompile.kernel_spec import tile_slots
from fpscompile.lowerings import cpp, gathers_gradients, triton
from fpscompile.masks import apart
from fpscompile.overrides import stacked
from fpscompile.passes.base import GraphState, fake_tensor, size_of
from fpscompile.passes.layers import place
from fpscompile.plan import Plan, ResolvedPlan, resolve
from fpscompile.ranges import Ranges
from fpscompile.schedule import Schedule
from fpscompile.settings import Timestep
from fpscompile.windows import (
    AnyWindow,
    Heads,
    Pattern,
    Sliding,
    TopK,
    density,
    of_heads,
    on_grid,
    pattern_of,
    per_head,
)
from fpscompile.windows.base import walk

INT8_LOWERINGS = ("cpp", "reference")


@dataclass(frozen=True)
class PlanSites:
    name: str = "plan_sites"

    def run(self, state: GraphState) -> bool:
        from fpscompile.tuning.at_compile import calibrated, tuned_plan  # it builds on this module

        state.settings = calibrated(state)
        place(state, [site for site in state.sites if site.kind in state.settings.attention_kinds])
        for site in state.sites:
            if site.kind not in state.settings.attention_kinds or site.rejection is not None:
                continue
            plan = tuned_plan(site, plan_for(site, state), state)
            resolved = resolved_plan(site, plan)
            _note_clamps(state, resolved)
            _note_apart(state, resolved)
            _note_gradients(state, site, plan)
            _note_unused(state, plan)
            state.plans[site.node] = plan
        return False


def plan_for(site: AttentionSite, state: GraphState) -> Plan:
    """The plan of one site."""
    settings = state.settings
    query = fake_tensor(site.node.args[0])
    assert query is not None
    quant = settings.quant
    if quant == "auto":
        quant = "fp8" if has_fp8_tensor_cores(query.device) else "none"
    plan = Plan.of(
        _schedule(site, state), tile=settings.tile, quant=quant, lowering=settings.lowering, compute=settings.compute,
        smooth_k=settings.smooth_k, smooth_v=settings.smooth_v, hadamard=settings.hadamard,
        remainder=settings.remainder,
    )  # fmt: skip
    tile_slots(plan.tile, plan.block_n)
    plan = dataclasses.replace(plan, lowering=_lowering(site, plan, state))
    if plan.quant == "int8" and plan.lowering not in INT8_LOWERINGS:
        return dataclasses.replace(plan, quant="none")  # more exact, and the record of the lowering says so
    return plan


def _schedule(site: AttentionSite, state: GraphState) -> Schedule:
    """What the site's layer does; all variants in a row where the layer is known at run time only."""
    variants = state.settings.variants
    placed = state.layers.get(site.node)
    if placed is None or placed.inside is None:
        schedule = variants[placed.variant if placed is not None else 0]
    else:
        schedule = stacked(variants)
    if site.head_part is None:
        return schedule
    first, total = site.head_part
    count = site.shape[1].hint
    phases = (
        dataclasses.replace(phase, window=of_heads(phase.window, first, count, total))
        if phase.window is not None
        else phase
        for phase in schedule.phases
    )
    return dataclasses.replace(schedule, phases=tuple(phases))


def _lowering(site: AttentionSite, plan: Plan, state: GraphState) -> str:
    """The fastest lowering that can run a site on its device; what is asked for by name and cannot run is an error.

    1. On a GPU, the generated Triton kernels, quantized or not.
    2. On a CPU that can build and run it, the generated kernel: with AVX-512 it was faster than boxes at every shape
       measured. Without, boxes were from a thousand tokens on, and the kernel serves the rest.
    3. Otherwise boxes, which run anywhere; or gather, where P is rounded to FP8 block by block, or where a window is no
       product of the three axes. Where 1 or 2 gives way, a record says why.
    """
    asked = plan.lowering
    query, _, value = (fake_tensor(tensor) for tensor in site.node.args[:3])
    assert query is not None
    assert value is not None
    if plan.quant == "int8":
        if asked not in ("auto", *INT8_LOWERINGS):
            raise OptionError(f"lowering={asked!r} does not compute in 8-bit integers; use 'cpp' or 'auto'")
        if query.device.type != "cpu":
            raise OptionError(f"quant='int8' is for CPUs, and {site.node} is on {query.device}; use quant='fp8'")
    if plan.quant == "fp8" and asked == "boxes":
        raise OptionError(
            f"lowering={asked!r} cannot round P to FP8 as quant='fp8' asks; use 'cpp', 'gather', 'triton' or 'auto'"
        )
    resolved = resolved_plan(site, plan)
    # Heads may have one window on this grid and several on the next.
    product = resolved.product and not any(phase.window is not None and per_head(phase.window) for phase in plan.phases)
    if asked == "boxes":
        try:
            for phase in range(len(resolved.windows)):
                resolved.product_window(phase)
        except UnsupportedError as error:
            raise UnsupportedError(f"{site.node}: {error}") from None
    generated = "cpp" if query.device.type == "cpu" else "triton"
    if asked not in ("auto", "cpp", "triton"):
        return asked
    if asked != "auto":
        generated = asked
    dims = site.shape[4].hint, size_of(value.shape[3]).hint
    module = triton if generated == "triton" else cpp
    reason = module.why_not(query.dtype, *dims, plan, query.device)
    if reason is None and generated == "triton" and resolved.dynamic:
        reason = "its lists of tiles are made before the call, and a top-k window chooses tiles within it"
    if reason is None:
        slower = cpp_build.slower_than_boxes(site.shape[2].hint) if generated == "cpp" and asked == "auto" else None
        if slower is not None and plan.quant == "none" and product:
            state.note("info", "lowering", f"lowering 'boxes' in place of 'cpp': {slower}")
            return "boxes"
        narrow = cpp.widened(str(query.dtype).removeprefix("torch."), plan) if generated == "cpp" else None
        if narrow is not None:
            state.note("info", "compute", f"bfloat16 operands are multiplied in float32: {narrow}")
        return generated
    fallback = "gather" if plan.quant == "fp8" or not product else "boxes"
    if asked != "auto":
        remedy = "use 'auto', or quant='none'" if plan.quant == "int8" else f"use {fallback!r} or 'auto'"
        raise UnsupportedError(f"lowering={asked!r} cannot run {site.node}: {reason}; {remedy}")
    exact = ", without quantization," if plan.quant == "int8" else ""
    state.note("info", "lowering", f"lowering {fallback!r}{exact} in place of the faster {generated!r}: {reason}")
    return fallback


def resolved_plan(site: AttentionSite, plan: Plan) -> ResolvedPlan:
    """The plan on the grid of the call that is being compiled."""
    assert site.grid is not None
    assert site.query_span is not None
    assert site.key_span is not None
    t, h, w = (size.hint for size in site.grid)
    _, _, q_length, k_length, _ = (size.hint for size in site.shape)
    starts = site.query_span.start.hint, site.key_span.start.hint
    return resolve(plan, (t, h, w), q_length, k_length, *starts, heads=site.shape[1].hint)


def phases_of_call(site: AttentionSite, state: GraphState) -> slice:
    """The phases of a site's plan that its own layer runs in the call that is being compiled."""
    placed = state.layers.get(site.node)
    if placed is None or placed.inside is None:
        return slice(None)
    count = len(state.settings.phases.phases)
    return slice(count * placed.variant, count * (placed.variant + 1))


def conservative_phase(site: AttentionSite, state: GraphState, resolved: ResolvedPlan) -> int:
    """The phase to use when progress is unknown: the densest, in the mean over variants where code serves several."""
    placed = state.layers.get(site.node)
    if placed is None or placed.inside is None:
        return resolved.conservative
    count = len(state.settings.phases.phases)
    return max(range(count), key=lambda phase: (sum(resolved.densities[phase::count]), -phase))


@dataclass(frozen=True)
class _Picked:
    """A window that was chosen for a density, or the whole of one that a phase or some heads have."""

    density: float
    """What was asked for."""
    kept: float
    """What the window keeps by itself."""
    window: AnyWindow
    heads: str = ""
    """Those that have it, where not all do."""
    alone: bool = True
    """Whether nothing else is seen beside it, as in a union."""


@functools.lru_cache(maxsize=512)
def _picked(resolved: ResolvedPlan) -> tuple[_Picked, ...]:
    """The windows of all phases that were chosen for a density, those of single heads and in unions too."""
    view = resolved.view
    found: list[_Picked] = []
    for phase in resolved.plan.phases:
        pattern = Sliding(density=phase.density) if phase.window is None else pattern_of(phase.window)
        for whole, heads in _by_head(pattern, resolved.heads):
            for part in walk(whole):
                asked = part.density if isinstance(part, (Sliding, TopK)) else None
                if asked is not None:
                    window = on_grid(part, view)
                    kept = density(window, view.q_layout, view.k_layout, view.heads, clamp=view.clamp)
                    found.append(_Picked(asked, kept, window, heads, part is whole))
    return tuple(dict.fromkeys(found))


def _by_head(pattern: Pattern, heads: int | None) -> list[tuple[Pattern, str]]:
    """The windows that heads have, each with the heads that have it; "" where all share one."""
    if not isinstance(pattern, Heads) or heads is None:
        return [(pattern, "")]
    members: dict[Pattern, list[int]] = {}
    for head in range(heads):
        members.setdefault(pattern.of_head(head), []).append(head)
    return [(own, Ranges.of(held).text if len(members) > 1 else "") for own, held in members.items()]


def _note_clamps(state: GraphState, resolved: ResolvedPlan) -> None:
    for picked in _picked(resolved):
        if picked.kept > picked.density + 1e-9:
            state.note(
                "info",
                "density-floor",
                f"grid {resolved.q_layout.grid} with tile {resolved.plan.tile} has no window of density "
                f"{picked.density:.2f}{_of_heads(picked)}; its sparsest, {picked.kept:.3f}, is used",
            )


def _note_apart(state: GraphState, resolved: ResolvedPlan) -> None:
    """For windows that were picked for a density: whoever gives a window may want this."""
    for picked in _picked(resolved):
        window = picked.window
        if picked.alone and isinstance(window, tuple) and (axes := apart(window, resolved.q_layout.counts)):
            names = " and ".join("thw"[axis] for axis in axes)
            lonely = (
                "what lies side by side there meets in other heads at most"
                if picked.heads
                else "parts of the video that lie side by side there can come out unlike one another"
            )
            state.note(
                "info",
                "window-apart",
                f"the window of density {picked.density:.2f}{_of_heads(picked)} on grid {resolved.q_layout.grid} with "
                f"tile {resolved.plan.tile}, {window} tiles, never looks across {names}, so {lonely}: take a smaller "
                "tile or a higher density",
            )


def _of_heads(picked: _Picked) -> str:
    return f" for heads {picked.heads}" if picked.heads else ""


def _note_gradients(state: GraphState, site: AttentionSite, plan: Plan) -> None:
    operands = [fake_tensor(tensor) for tensor in site.node.args[:3]]
    trained = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in operands)
    if trained and gathers_gradients(plan):
        state.note(
            "info",
            "gradients",
            f"gradients of FP8 attention with remainder={plan.remainder!r} come from lowering 'gather', which is "
            f"slower than {plan.lowering!r}: train with quant='none' or remainder='none', or accept it",
        )


def _note_unused(state: GraphState, plan: Plan) -> None:
    """Options that were given and decide nothing here."""
    settings = state.settings
    if plan.compute != "auto" and plan.lowering != "cpp":
        state.note(
            "info",
            "compute",
            f"compute={plan.compute!r} has no effect: it is for the generated CPU kernel, lowering 'cpp', and "
            f"lowering {plan.lowering!r} computes here",
        )
    if settings.timestep != Timestep() and len(settings.phases.phases) == 1:
        state.note(
            "info", "timestep", "options['timestep'] has no effect: all steps do the same, so none reads the progress"
        )
