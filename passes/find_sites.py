"""find_sites: decide what every attention call attends over, and whether its 3D grid is proven.

A canonical call is a "3d" site when all of these hold:

1. The keys and the values index the same tokens, and those contain all of the queries' video tokens.
2. One run of the token axis is the row-major product of exactly three axes that go back to three increasing
   dimensions of one input (a 5-D latent, say), the first longer than 1; every other run is text or the like.
3. Or no graph can show it, but ``options["grid"]`` or ``attach`` names a grid whose product is a run's length.

Then legality: no dropout, not causal, no mask but a key mask, a supported dtype, [B, heads, tokens, features].
Anything else carries a Rejection. Changes nothing in the graph. Runs after trace_axes, whose labels it reads.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import sympy
import torch
from torch import fx

from fpscompile.errors import GridError
from fpscompile.ir import AttentionSite, Reason, Rejection, Segment, Size, Span
from fpscompile.passes.axes import INPUT, Atom, Axis, Cat, axis_size, describe, leaves, root, same
from fpscompile.passes.base import GraphState, fake_tensor, shape_of, target_name
from fpscompile.passes.normalize import is_canonical

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
ZERO = Size(sympy.Integer(0), 0)
REMEDY = "name it with options['grid'], or let fpscompile.attach(model) publish it for every call"


@dataclass(frozen=True)
class FindSites:
    name: str = "find_sites"

    def run(self, state: GraphState) -> bool:
        calls = [node for node in state.graph.nodes if is_canonical(node)]
        state.sites = [_place(state, node) for node in calls]
        state.sites = _settle_others(state.sites)
        state.sites += _subgraph_sites(state)
        _check_option_grid(state)
        return False


def _place(state: GraphState, node: fx.Node) -> AttentionSite:
    query, key, value = node.args[:3]
    shapes = [shape_of(tensor) for tensor in (query, key, value)]  # type: ignore[arg-type]
    if any(len(shape) != 4 for shape in shapes):
        rank = len(shapes[0])
        shape = _site_shape(shapes)
        return AttentionSite(
            node,
            "other",
            shape,
            dtype_of(query),
            rejection=Rejection(
                Reason.LAYOUT, f"q has {rank} dimensions; [batch, heads, tokens, features] is required", rank, node
            ),
        )
    site = classify(state, node, _site_shape(shapes))
    if site.kind == "3d" and site.rejection is None:
        site = replace(site, rejection=illegal(node))
    if site.kind != "3d" and site.rejection is None:
        site = replace(
            site, rejection=Rejection(Reason.KIND, f"{site.kind} attention: only 3D attention is rewritten", None, node)
        )
    return site


def _settle_others(sites: list[AttentionSite]) -> list[AttentionSite]:
    """Where the graph proves a video, self-attention over other tokens (a text refiner's) is no riddle."""
    if not any(site.grid_source == "graph" for site in sites):
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
        if site.rejection is not None and site.rejection.code is Reason.NO_GRID
        else site
        for site in sites
    ]


def _site_shape(shapes: list[tuple[Size, ...]]) -> tuple[Size, Size, Size, Size, Size]:
    one = Size(sympy.Integer(1), 1)
    q, k = ((one,) * (4 - len(shape)) + shape[-4:] for shape in shapes[:2])
    return (q[0], q[1], q[2], k[2], q[3])


def dtype_of(node: Any) -> str:
    value = fake_tensor(node)
    return str(value.dtype).removeprefix("torch.") if value is not None else ""


def runs(axis: Axis) -> tuple[Axis, ...]:
    """The pieces that lie end to end on a token axis."""
    return axis[0].parts if len(axis) == 1 and isinstance(axis[0], Cat) else (axis,)


def classify(state: GraphState, node: fx.Node, shape: tuple[Size, Size, Size, Size, Size]) -> AttentionSite:
    """The site's kind, and its grid and spans when it is 3D."""
    labels = [state.labels[tensor] for tensor in node.args[:3]]  # type: ignore[index]
    q_axis, k_axis, v_axis = (label[2] for label in labels)
    site = AttentionSite(node, "other", shape, dtype_of(node.args[0]))
    if k_axis != v_axis:
        return replace(
            site,
            rejection=Rejection(
                Reason.SEGMENTS,
                f"keys and values index different tokens ({describe(k_axis)} and {describe(v_axis)})",
                None,
                node,
            ),
        )
    q_runs, k_runs = runs(q_axis), runs(k_axis)
    shared = [run for run in q_runs if run in k_runs]
    grids = [(run, grid_of(run)) for run in shared]
    videos = [(run, grid) for run, grid in grids if isinstance(grid, tuple)]
    if len(videos) == 1:
        return _video_site(state, site, *videos[0], "graph", q_runs, k_runs)
    if len(videos) > 1:
        return replace(
            site,
            kind="3d",
            rejection=Rejection(
                Reason.SEGMENTS, f"{len(videos)} videos share the sequence; one is supported", len(videos), node
            ),
        )
    disorder = next((grid for _, grid in grids if isinstance(grid, Rejection)), None)
    if disorder is not None:
        return replace(site, kind="3d", rejection=replace(disorder, node=node))
    if not shared:
        return replace(site, kind="cross")
    return _told(state, site, q_runs, k_runs, labels[0][0])


def _told(
    state: GraphState, site: AttentionSite, q_runs: tuple[Axis, ...], k_runs: tuple[Axis, ...], batch: Axis
) -> AttentionSite:
    """A self-attention whose grid the graph does not show: ask the options, then the attachment."""
    shared = [run for run in q_runs if run in k_runs]
    told = state.settings.grid or state.published_grid
    source = "options" if state.settings.grid else "attach"
    if told is not None:
        tokens = told[0] * told[1] * told[2]
        matching = [run for run in shared if axis_size(run).hint == tokens]
        if len(matching) == 1 and told[0] > 1:
            sizes = tuple(Size(sympy.Integer(n), n) for n in told)
            grid = (sizes[0], sizes[1], sizes[2])
            return _video_site(state, site, matching[0], grid, source, q_runs, k_runs)
    kind = factor_kind(shared[0], batch)
    if kind != "other":
        return replace(site, kind=kind)
    length = axis_size(shared[0])
    if told is not None:
        message = f"its {length} tokens are not the {told[0]}*{told[1]}*{told[2]} of the grid from {source}"
        return replace(site, rejection=Rejection(Reason.KIND, message, length.hint, site.node))
    if not _is_data(shared[0]):
        message = (
            f"the graph does not show a grid: the trail of its tokens ends at {_trail(state, shared[0])}; {REMEDY}"
        )
        return replace(site, rejection=Rejection(Reason.NO_GRID, message, length.hint, site.node))
    message = f"self-attention over {length} tokens whose (t, h, w) the graph does not show; {REMEDY}"
    return replace(site, rejection=Rejection(Reason.NO_GRID, message, length.hint, site.node))


def _video_site(
    state: GraphState,
    site: AttentionSite,
    video: Axis,
    grid: tuple[Size, Size, Size],
    source: str,
    q_runs: tuple[Axis, ...],
    k_runs: tuple[Axis, ...],
) -> AttentionSite:
    length = axis_size(video)
    segments = tuple(Segment("video" if run == video else "other", axis_size(run)) for run in q_runs)
    return replace(
        site,
        kind="3d",
        grid=grid,
        grid_source=source,
        segments=segments,
        query_span=Span(_offset(q_runs, video), length),
        key_span=Span(_offset(k_runs, video), length),
    )


def _offset(parts: tuple[Axis, ...], video: Axis) -> Size:
    total = ZERO
    for run in parts[: parts.index(video)]:
        size = axis_size(run)
        total = Size(total.expr + size.expr, total.hint + size.hint)
    return total


def grid_of(axis: Axis) -> tuple[Size, Size, Size] | Rejection | None:
    """(t, h, w) of a run of tokens; a Rejection when it is a video in another order; None when it is no video."""
    atoms = [factor for factor in axis if isinstance(factor, Atom)]
    if len(atoms) != len(axis) or len(axis) < 3:
        return None
    roots = [root((factor,)) for factor in atoms]
    origins = {lead.origin for lead in roots if lead is not None and lead.source == INPUT}
    if len(origins) != 1 or any(lead is None or lead.source != INPUT for lead in roots):
        return None
    if len(axis) > 3:
        return Rejection(
            Reason.TOKEN_ORDER,
            f"the tokens are an interleaving of {len(axis)} axes ({describe(axis)}), not row-major (t, h, w)",
            describe(axis),
        )
    dims = [lead.dim for lead in roots if lead is not None]
    if dims != sorted(set(dims)):
        return Rejection(
            Reason.TOKEN_ORDER,
            f"the tokens run over dimensions {dims} of {next(iter(origins))}, not in row-major (t, h, w) order",
            dims,
        )
    t, h, w = (factor.size for factor in atoms)
    return (t, h, w) if t.hint > 1 else None


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


def _is_data(axis: Axis) -> bool:
    return any(leaf.source == INPUT for leaf in leaves(axis))


def _trail(state: GraphState, axis: Axis) -> str:
    origin = next((leaf.origin for leaf in leaves(axis)), "")
    node = next((n for n in state.graph.nodes if n.name == origin), None)
    return f"{origin} ({target_name(node)})" if node is not None else origin or "an input"


def illegal(node: fx.Node) -> Rejection | None:
    """Why a 3D site may not be rewritten, whatever its grid."""
    query = fake_tensor(node.args[0])
    assert query is not None
    rate = node.kwargs.get("dropout_p")
    if not isinstance(rate, (int, float)) or rate != 0:
        message = f"dropout_p={rate}: attention dropout has no fused form; train with dropout 0 or call model.eval()"
        return Rejection(Reason.DROPOUT, message, rate, node)
    if node.kwargs.get("is_causal") is not False:
        return Rejection(Reason.CAUSAL, "is_causal=True: causal attention is not full 3D attention", True, node)
    if query.dtype not in DTYPES:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
        return Rejection(Reason.DTYPE, f"dtype {query.dtype} is not supported; use one of {names}", query.dtype, node)
    dtypes = {fake_tensor(tensor).dtype for tensor in node.args[:3]}  # type: ignore[union-attr]
    if len(dtypes) > 1:
        return Rejection(Reason.DTYPE, f"q, k and v differ in dtype: {dtypes}", dtypes, node)
    return _illegal_heads(node) or _illegal_mask(node)


def _illegal_heads(node: fx.Node) -> Rejection | None:
    query, key, value = (shape_of(tensor) for tensor in node.args[:3])  # type: ignore[arg-type]
    grouped = node.kwargs.get("enable_gqa")
    heads = [shape[1].hint for shape in (query, key, value)]
    if heads[1] != heads[2] or (heads[0] != heads[1] and not grouped) or heads[0] % max(heads[1], 1):
        return Rejection(Reason.LAYOUT, f"q, k, v have {heads} heads, which attention would broadcast", heads, node)
    batches = [shape[0] for shape in (query, key, value)]
    if not (same(batches[0], batches[1]) and same(batches[0], batches[2])):
        return Rejection(Reason.LAYOUT, "q, k, v differ in batch size, which attention would broadcast", None, node)
    return None


def _illegal_mask(node: fx.Node) -> Rejection | None:
    mask = key_mask(node)
    if mask is None:
        return None
    value = fake_tensor(mask)
    if value is None:
        return Rejection(Reason.MASK, "the mask is not a tensor", mask, node)
    shape = shape_of(mask)
    if len(shape) >= 2 and shape[-2].expr != 1:
        sizes = [str(size.expr) for size in shape]
        message = (
            f"the mask [{', '.join(sizes)}] differs from query to query (or may); only a key mask "
            "[batch, heads, 1, keys] can be combined with a tile window"
        )
        return Rejection(Reason.MASK, message, sizes, node)
    keys = shape_of(node.args[1])[2]  # type: ignore[arg-type]
    if not shape or not same(shape[-1], keys):
        return Rejection(Reason.MASK, "the mask's last dimension is not the keys", None, node)
    if value.requires_grad:
        return Rejection(
            Reason.MASK, "the mask needs a gradient, which the rewritten attention does not give", None, node
        )
    if value.dtype not in (torch.bool, torch.float32, fake_tensor(node.args[0]).dtype):  # type: ignore[union-attr]
        return Rejection(Reason.MASK, f"a mask of dtype {value.dtype} is not supported", value.dtype, node)
    return None


def key_mask(node: fx.Node) -> fx.Node | None:
    """The mask of a site, seen through an ``expand`` that only repeats it for every query."""
    mask = node.kwargs.get("attn_mask")
    while isinstance(mask, fx.Node) and target_name(mask) in ("expand", "expand_as", "broadcast_to"):
        source = mask.args[0]
        if not isinstance(source, fx.Node) or fake_tensor(source) is None:
            break
        shape = shape_of(source)
        if not shape or not same(shape[-1], shape_of(mask)[-1]) or (len(shape) >= 2 and shape[-2].expr != 1):
            break
        mask = source
    return mask  # type: ignore[return-value]


def _subgraph_sites(state: GraphState) -> list[AttentionSite]:
    """Attention inside higher-order ops (activation checkpoints): seen, not rewritten."""
    one = Size(sympy.Integer(1), 1)
    sites = []
    for node in state.graph.nodes:
        if node.op != "call_function" or not isinstance(node.target, torch._ops.HigherOrderOperator):
            continue
        for argument in node.all_input_nodes:
            module = getattr(state.gm, str(argument.target), None) if argument.op == "get_attr" else None
            if not isinstance(module, fx.GraphModule):
                continue
            for inner in module.graph.nodes:
                if target_name(inner) != "scaled_dot_product_attention":
                    continue
                reason = f"inside {node.target.name()}, which is not looked into; attach and compile the blocks instead"
                sites.append(
                    AttentionSite(inner, "other", (one,) * 5, rejection=Rejection(Reason.SUBGRAPH, reason, None, node))
                )
    return sites


def _check_option_grid(state: GraphState) -> None:
    """``options["grid"]`` must be some site's, and must not contradict what the graph proves."""
    grid = state.settings.grid
    if grid is None or not state.sites:
        return
    for site in state.sites:
        if site.grid_source == "graph" and site.grid is not None:
            proven = tuple(size.hint for size in site.grid)
            if proven != grid:
                raise GridError(
                    f"options['grid']={grid} but the graph proves {proven} at {site.node}: drop the option, "
                    "the grid needs no telling here"
                )
    if not any(site.kind == "3d" for site in state.sites):
        lengths = sorted({site.shape[2].hint for site in state.sites if site.kind != "cross"}, reverse=True)
        raise GridError(
            f"options['grid']={grid} has {grid[0] * grid[1] * grid[2]} tokens, but the self-attention calls have "
            f"{', '.join(map(str, lengths)) or 'none'}: give the grid after patchify, along (t, h, w)"
        )
