"""plan_sites: decide, for every legal 3D site, tile, schedule, quantization and lowering.

Runs after find_sites. Decides from Settings and from what the machine can run, so equal sites get equal plans. Errors
that the grid at hand would raise at run time (a density below its floor) are raised here, where the user sees them
with the compile.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from fpscompile.errors import OptionError, UnsupportedError
from fpscompile.ir import AttentionSite
from fpscompile.kernel_spec import tile_slots
from fpscompile.lowerings import cpp, triton
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
        quant = "fp8" if triton.has_fp8_tensor_cores(query.device) else "none"
    plan = Plan.of(settings.phases, tile=settings.tile, quant=quant, lowering=settings.lowering)
    tile_slots(plan.tile, plan.block_n)
    return dataclasses.replace(plan, lowering=_lowering(site, plan, state))


def _lowering(site: AttentionSite, plan: Plan, state: GraphState) -> str:
    """The fastest lowering that can run a site on its device; what is asked for by name and cannot run is an error.

    1. On a GPU, the generated Triton kernels, quantized or not.
    2. Elsewhere FP8 needs P rounded block by block: gather.
    3. On a CPU that can build and run it, the generated kernel: it was faster than boxes at every shape measured.
    4. Otherwise boxes, which run anywhere. Where 1 or 3 gives way, a record says why.
    """
    asked = plan.lowering
    query, _, value = (fake_tensor(tensor) for tensor in site.node.args[:3])
    assert query is not None
    assert value is not None
    if plan.quant == "fp8" and asked in ("boxes", "cpp"):
        raise OptionError(
            f"lowering={asked!r} cannot round P to FP8 as quant='fp8' asks; use 'gather', 'triton' or 'auto'"
        )
    generated = "cpp" if query.device.type == "cpu" else "triton"
    if asked not in ("auto", "cpp", "triton"):
        return asked
    if asked != "auto":
        generated = asked
    dims = site.shape[4].hint, size_of(value.shape[3]).hint
    module = triton if generated == "triton" else cpp
    reason = module.why_not(query.dtype, *dims, plan, query.device)
    if reason is None:
        return generated
    fallback = "gather" if plan.quant == "fp8" else "boxes"
    if asked != "auto":
        raise UnsupportedError(f"lowering={asked!r} cannot run {site.node}: {reason}; use {fallback!r} or 'auto'")
    if plan.quant != "fp8" or query.device.type != "cpu":
        state.note("info", "lowering", f"lowering {fallback!r} in place of the faster {generated!r}: {reason}")
    return fallback


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
