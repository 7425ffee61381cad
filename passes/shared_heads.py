"""Heads that ranks share out (Ulysses): which of the model's a site has here, so that windows by head go to the right
ones."""

from __future__ import annotations

from dataclasses import replace

from fpscompile.ir import AttentionSite, Reason, Rejection
from fpscompile.passes.axes import Slice, axis_size
from fpscompile.passes.base import GraphState, target_name
from fpscompile.passes.collective_rules import ALL_TO_ALL
from fpscompile.windows import per_head


def placed(state: GraphState, site: AttentionSite) -> AttentionSite:
    """``site`` with its part of the heads; declined where windows differ by head and the part is not known."""
    if not any(target_name(node) in ALL_TO_ALL for node in state.graph.nodes):
        return site
    heads = state.operands[site.node][0][1]
    if len(heads) == 1 and isinstance(heads[0], Slice):
        return replace(site, head_part=(heads[0].start.hint, axis_size(heads[0].whole).hint))
    windows = [phase.window for schedule in state.settings.variants for phase in schedule.phases]
    if site.rejection is not None or not any(window is not None and per_head(window) for window in windows):
        return site
    message = (
        f"windows differ by head, and the graph does not show which of the model's heads this rank's "
        f"{site.shape[1].hint} are: exchange tokens for heads with at least two heads to a rank, heads in order, or "
        "give all heads one window"
    )
    return replace(site, rejection=Rejection(Reason.LAYOUT, message, site.shape[1].hint, site.node))
