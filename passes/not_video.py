"""What a call is for which no grid is proven: cross, spatial, temporal, a refiner of text, or a video not shown."""

from __future__ import annotations

import math
from dataclasses import replace

from fpscompile.ir import AttentionSite, Reason, Rejection
from fpscompile.passes.axes import INPUT, Axis, axis_size, describe, leaves, root
from fpscompile.passes.base import GraphState, target_name
from fpscompile.passes.told_tokens import reordered, resumed

REMEDY = "name it with options['grid'], or let fpscompile.attach(model) publish it for every call"


def remedy(state: GraphState) -> str:
    """What would tell the grid."""
    if state.untold:
        return (
            "the attachment is older than torch.compile, so its hooks were traced and tell nothing: compile first, "
            "then call fpscompile.attach on the compiled model, or give it the grid: attach(model, grid=(t, h, w))"
        )
    if state.attached and state.published_grid is None:
        return (
            "fpscompile.attach cannot tell it from the inputs of this call either: give it as attach(model, grid=...) "
            "or options['grid']"
        )
    return REMEDY


def settle_others(sites: list[AttentionSite]) -> list[AttentionSite]:
    """Where a video is proven, self-attention over fewer tokens (a text refiner's) is no riddle."""
    proven = [site for site in sites if site.grid_source in ("graph", "rotary")]
    videos = [site.query_span.length.hint for site in proven if site.query_span]
    if not videos:
        return sites
    return [
        replace(
            site,
            rejection=replace(
                site.rejection,
                code=Reason.KIND,
                message=f"self-attention over {site.shape[2]} tokens that are not the video's",
            ),
        )
        if site.rejection is not None and site.rejection.code is Reason.NO_GRID and site.shape[2].hint < min(videos)
        else site
        for site in sites
    ]


def unknown(state: GraphState, site: AttentionSite, shared: list[Axis], batch: Axis) -> AttentionSite:
    """A self-attention without a grid: spatial, temporal, something else, or a video that nothing shows."""
    longest = max(shared, key=lambda run: axis_size(run).hint)
    kind = factor_kind(longest, batch)
    # The same axes twice in one sequence: frames that were taken apart and laid end to end.
    if kind != "other" and shared.count(longest) == 1:
        return replace(site, kind=kind)
    length = axis_size(longest)
    told = state.settings.grid or state.published_grid
    if told is not None:
        source = "options" if state.settings.grid else "attach"
        tokens = math.prod(told)
        if kind == "other" and length.hint > tokens:
            message = (
                f"of its {length} tokens {tokens} may be the grid {told} from {source}, and nothing "
                "in this graph shows which: where the rest is text or the like, compile the whole model"
            )
            return replace(site, rejection=Rejection(Reason.SEGMENTS, message, length.hint, site.node))
        message = f"its {length} tokens are not the {told[0]}*{told[1]}*{told[2]} of the grid from {source}"
        if told[0] == 1 and length.hint == tokens:
            message = f"the grid {told} from {source} has one frame: its {length} tokens are an image's, no video's"
        return replace(site, rejection=Rejection(Reason.KIND, message, length.hint, site.node))
    mover = reordered(state, longest)
    if mover is not None:
        message = (
            f"{mover.name} ({target_name(mover)}) puts the tokens in another order, in which they are not the rows of "
            "a grid: attend to them in row-major (t, h, w) order"
        )
        return replace(site, rejection=Rejection(Reason.TOKEN_ORDER, message, length.hint, site.node))
    if not is_data(longest):
        message = (
            f"the graph does not show a grid: the trail of its tokens ends at {trail(state, longest)}; {remedy(state)}"
        )
        return replace(site, rejection=Rejection(Reason.NO_GRID, message, length.hint, site.node))
    message = f"self-attention over {length} tokens whose (t, h, w) the graph does not show; {remedy(state)}"
    return replace(site, rejection=Rejection(Reason.NO_GRID, message, length.hint, site.node))


def cross(state: GraphState, site: AttentionSite, q_axis: Axis, k_axis: Axis) -> AttentionSite:
    """Queries and keys of different tokens; it says so where both are made of one tensor, as a video's own may be."""
    site = replace(site, kind="cross")
    ours, theirs = (
        {lead.origin for leaf in leaves(axis) if (lead := root((leaf,))) is not None and lead.source == INPUT}
        for axis in (q_axis, k_axis)
    )
    why = why_apart(state, (q_axis, k_axis)) if reordered(state, q_axis) or reordered(state, k_axis) else ""
    if not ours & theirs and not why:
        return site
    message = (
        f"cross attention: its {axis_size(k_axis)} keys ({describe(k_axis)}) are not the tokens of its "
        f"{axis_size(q_axis)} queries ({describe(q_axis)}){why}; only 3D attention over the same tokens is rewritten"
    )
    return replace(site, rejection=Rejection(Reason.KIND, message, None, site.node))


def why_apart(state: GraphState, axes: tuple[Axis, ...]) -> str:
    """What may have kept q, k and v from being known as the same tokens."""
    if resumed():
        return f"; they come from behind a graph break: {remedy(state)}"
    for axis in axes:
        end, mover = trail(state, axis), reordered(state, axis)
        if mover is not None:
            return (
                f"; {mover.name} ({target_name(mover)}) moves tokens of one of q, k and v: where the same is done to "
                "all three, do it once, before they are projected"
            )
        if not is_data(axis) and "::" in end:
            return f"; the trail of the tokens ends at {end}, an op that is not known here"
    return ""


def factor_kind(axis: Axis, batch: Axis) -> str:
    """ "spatial" or "temporal" for tokens that are two or one of a video's axes; else "other"."""
    leads = [root((factor,)) for factor in axis]
    if any(lead is None or lead.source != INPUT for lead in leads):
        return "other"
    origins = {(lead.origin) for lead in leads if lead is not None}
    if len(origins) != 1:
        return "other"
    if len(leads) == 2:
        return "spatial"
    outer = [root((factor,)) for factor in batch]
    folded = {lead.dim for lead in outer if lead is not None and lead.origin in origins}
    return "temporal" if len(leads) == 1 and len(folded) >= 2 else "other"


def is_data(axis: Axis) -> bool:
    return any(leaf.source == INPUT for leaf in leaves(axis))


def trail(state: GraphState, axis: Axis) -> str:
    origin = next((leaf.origin for leaf in leaves(axis)), "")
    node = next((n for n in state.graph.nodes if n.name == origin), None)
    return f"{origin} ({target_name(node)})" if node is not None else origin or "an input"
