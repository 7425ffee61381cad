"""plan_sites: decide, for every legal 3D site, tile, schedule, quantization and lowering.

Runs after find_sites. Decides from Settings alone, so equal sites get equal plans; errors that the grid at hand
would raise at run time (a density below its floor) are raised here, where the user sees them with the compile.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fpscompile.ir import AttentionSite
from fpscompile.kernel_spec import tile_slots
from fpscompile.passes.base import GraphState, fake_tensor
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
    lowering = settings.lowering
    if lowering == "auto":
        # A product window splits into boxes of dense attention; FP8 needs P rounded block by block, as gather does.
        lowering = "gather" if quant == "fp8" else "boxes"
    elif lowering == "boxes" and quant == "fp8":
        state.note(
            "warning",
            "lowering",
            'lowering="boxes" computes through dense attention, which cannot round P to FP8; using "gather"',
        )
        lowering = "gather"
    plan = Plan.of(settings.phases, tile=settings.tile, quant=quant, lowering=lowering)
    tile_slots(plan.tile, plan.block_n)
    return plan


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
