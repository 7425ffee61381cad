"""plan_sites: decide, for every legal 3D site, tile, schedule, quantization and lowering.

Runs after find_sites. Decides from Settings and from what the machine can run, so equal sites get equal plans. Errors
that the grid at hand would raise at run time (a density below its floor) are raised here, where the user sees them
with the compile.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch

from fpscompile.errors import OptionError, UnsupportedError
from fpscompile.ir import AttentionSite
from fpscompile.kernel_spec import tile_slots
from fpscompile.lowerings import cpp
from fpscompile.passes.base import GraphState, fake_tensor, size_of
from fpscompile.plan import Plan, ResolvedPlan, resolve


@dataclass(frozen=True)
class PlanSites:
    name: str = "plan_sites"

    def run(self, state: GraphState) -> bool:
        for site in state.sites:
            if site.kind not in state.settings.attention_kinds or site.rejection is not None:
                continue
            plan = plan_for(site, state)
            _note_clamps(state, plan, resolved_plan(site, plan))
            state.plans[site.node] = plan
        return False


def plan_for(site: AttentionSite, state: GraphState) -> Plan:
    """The plan of one site."""
    settings = state.settings
    query = fake_tensor(site.node.args[0])
    assert query is not None
    quant = settings.quant
    if quant == "auto":
        quant = "fp8" if _has_fp8_tensor_cores(query.device) else "none"
    plan = Plan.of(settings.phases, tile=settings.tile, quant=quant, lowering=settings.lowering)
    tile_slots(plan.tile, plan.block_n)
    return dataclasses.replace(plan, lowering=_lowering(site, plan, state))


def _lowering(site: AttentionSite, plan: Plan, state: GraphState) -> str:
    """The fastest lowering that can run a site on its device; what is asked for by name and cannot run is an error.

    1. FP8 needs P rounded block by block: gather.
    2. On a CPU that can build and run it, the generated kernel: it was faster than boxes at every shape measured.
    3. Otherwise boxes, which run anywhere; on a CPU with a record of why.
    """
    asked = plan.lowering
    if plan.quant == "fp8":
        if asked in ("boxes", "cpp"):
            raise OptionError(f"lowering={asked!r} cannot round P to FP8 as quant='fp8' asks; use 'gather' or 'auto'")
        return "gather" if asked == "auto" else asked
    if asked not in ("auto", "cpp"):
        return asked
    query, _, value = (fake_tensor(tensor) for tensor in site.node.args[:3])
    assert query is not None
    assert value is not None
    reason = cpp.why_not(query.dtype, site.shape[4].hint, size_of(value.shape[3]).hint, plan, query.device)
    if reason is None:
        return "cpp"
    if asked == "cpp":
        raise UnsupportedError(f"lowering='cpp' cannot run {site.node}: {reason}; use 'boxes' or 'auto'")
    if query.device.type == "cpu":
        state.note("info", "lowering", f"lowering 'boxes' in place of the faster 'cpp': {reason}")
    return "boxes"


def resolved_plan(site: AttentionSite, plan: Plan) -> ResolvedPlan:
    """The plan on the grid of the call that is being compiled."""
    assert site.grid is not None
    assert site.query_span is not None
    assert site.key_span is not None
    t, h, w = (size.hint for size in site.grid)
    _, _, q_length, k_length, _ = (size.hint for size in site.shape)
    return resolve(plan, (t, h, w), q_length, k_length, site.query_span.start.hint, site.key_span.start.hint)


def _note_clamps(state: GraphState, plan: Plan, resolved: ResolvedPlan) -> None:
    for phase, density in zip(plan.phases, resolved.densities, strict=True):
        if phase.density is not None and density > phase.density + 1e-9:
            state.note(
                "info",
                "density-floor",
                f"grid {resolved.q_layout.grid} with tile {plan.tile} has no window of density "
                f"{phase.density:.2f}; its sparsest, {density:.3f}, is used",
            )


def _has_fp8_tensor_cores(device: torch.device) -> bool:
    # FP8 kernels for GPUs are not part of this version; until a lowering can run them, "auto" never picks FP8.
    return False
