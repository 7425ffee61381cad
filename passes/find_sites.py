"""find_sites: decide what every attention call attends over, and whether its 3D grid is proven.

A canonical call is a "3d" site when all of these hold:

1. The keys and the values index the same tokens, and those contain all of the queries' video tokens.
2. One run of the token axis is the row-major product of exactly three axes that go back to three increasing
   dimensions of one input (a 5-D latent, say), the first longer than 1; every other run is text or another video.
3. Or a run that the graph does not take apart met a table of positions that is such a product; or ``options["grid"]``
   or ``attach`` names a grid whose product is its length; or the values of a rotary table prove one.

Of several videos in one sequence (history frames in front of the current ones) the largest is windowed; the others
are seen by all tokens and see all, as text is, unless options say more (:mod:`fpscompile.passes.history`).

Then legality (:mod:`fpscompile.passes.legality`). Anything else carries a Rejection. Changes nothing in the graph.
Runs after trace_axes, whose labels it reads.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import sympy
import torch
from torch import fx

from fpscompile.errors import GridError
from fpscompile.ir import AttentionSite, Reason, Rejection, Segment, Size, Span
from fpscompile.passes import history, shared_heads
from fpscompile.passes.axes import INPUT, Atom, Axis, Cat, Slice, axis_size, cut, describe, rearranged, same, sources
from fpscompile.passes.base import GraphState, fake_tensor, shape_of, target_name
from fpscompile.passes.canonical import COVERED, is_canonical
from fpscompile.passes.grid_sources import counted, disputed, grid_of, opaque, proven, rotary_table
from fpscompile.passes.legality import illegal
from fpscompile.passes.not_video import REMEDY, cross, settle_others, unknown, why_apart
from fpscompile.passes.told_tokens import reordered, resumed

ZERO = Size(sympy.Integer(0), 0)


@dataclass(frozen=True)
class FindSites:
    name: str = "find_sites"

    def run(self, state: GraphState) -> bool:
        calls = [node for graph in state.everywhere() for node in graph.graph.nodes if is_canonical(node)]
        state.sites = [_place(state, node) for node in calls]
        state.sites = settle_others(state.sites)
        state.sites += _subgraph_sites(state)
        _check_option_grid(state)
        history.check(state)
        return False


def _place(state: GraphState, node: fx.Node) -> AttentionSite:
    query, key, value = node.args[:3]
    shapes = [shape_of(tensor) for tensor in (query, key, value)]  # type: ignore[arg-type]
    if any(len(shape) != 4 for shape in shapes):
        rank = len(shapes[0])
        message = f"q has {rank} dimensions; [batch, heads, tokens, features] is required"
        rejection = Rejection(Reason.LAYOUT, message, rank, node)
        return AttentionSite(node, "other", _site_shape(shapes), dtype_of(query), rejection=rejection)
    site = classify(state, node, _site_shape(shapes))
    if site.kind == "3d" and site.rejection is None:
        refused = state.declined.get(node) or illegal(node) or _transformed(state, node)
        site = shared_heads.placed(state, replace(site, rejection=refused))
    if site.kind != "3d" and site.rejection is None:
        site = replace(
            site, rejection=Rejection(Reason.KIND, f"{site.kind} attention: only 3D attention is rewritten", None, node)
        )
    return site


TRANSFORMS = frozenset(("_grad_increment_nesting", "_jvp_increment_nesting", "_make_dual", "_wrap_for_grad"))


def _transformed(state: GraphState, node: fx.Node) -> Rejection | None:
    """Attention that torch.func transforms: the op has no derivative that they could compose."""
    transform = next((n for n in state.graph.nodes if target_name(n) in TRANSFORMS), None)
    if transform is None:
        return None
    message = (
        "a torch.func transform (grad, vjp, jvp, vmap) is compiled together with the attention it goes through, and "
        "the op has no derivative that one could compose: compile the model alone, and take its gradients by "
        "backward() or torch.autograd.grad (around a compiled model, torch.func runs it uncompiled, dense)"
    )
    return Rejection(Reason.SUBGRAPH, message, target_name(transform), node)


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
    labels = state.operands[node]
    q_axis, k_axis, v_axis = (label[2] for label in labels)
    shape = (*shape[:2], axis_size(q_axis), axis_size(k_axis), shape[4])
    site = AttentionSite(node, "other", shape, dtype_of(node.args[0]))
    if k_axis != v_axis and not _cached(q_axis, k_axis, v_axis):
        apart = _apart(state, site, q_axis, k_axis, v_axis)
        if apart is not None:
            return apart
        return replace(
            site,
            rejection=Rejection(
                Reason.SEGMENTS,
                f"keys and values index different tokens ({describe(k_axis)} and {describe(v_axis)})"
                + why_apart(state, (q_axis, k_axis, v_axis)),
                None,
                node,
            ),
        )
    if _of_other_samples(labels[0][0], labels[1][0]):
        message = "queries and keys are of different samples of a batch"
        return replace(site, kind="cross", rejection=Rejection(Reason.KIND, message, None, node))
    q_runs = runs(q_axis)
    k_runs = refine(runs(k_axis), q_runs)
    shared = [run for run in q_runs if run in k_runs]
    grids = [(run, proven(state, run)) for run in shared]
    videos = [(run, grid) for run, grid in grids if isinstance(grid, tuple)]
    if videos:
        chosen = history.choose(state, videos, q_runs, k_runs)
        site = _video_site(state, site, chosen.run, chosen.grid, "graph", chosen.q_runs, chosen.k_runs)
        return replace(site, history=chosen.history, rejection=_published_otherwise(state, site))
    refused = [grid for _, grid in grids if isinstance(grid, Rejection)]
    disorder = next((grid for grid in refused if grid.code is not Reason.NO_GRID), None)
    if disorder is not None:
        return replace(site, kind="3d", rejection=replace(disorder, node=node))
    told = _told(state, site, q_runs, k_runs) or _rotary(state, site, q_runs, k_runs)
    if told is not None:
        return told
    if refused:
        return replace(site, rejection=replace(refused[0], node=node))
    if not [run for run in q_runs if run in runs(k_axis)]:
        return _in_pieces(site, q_runs, runs(k_axis)) or cross(state, site, q_axis, k_axis)
    return unknown(state, site, shared, labels[0][0])


def _published_otherwise(state: GraphState, site: AttentionSite) -> Rejection | None:
    """Tokens that arrive packed have the order of a table's axes, taken for (t, h, w): not if attach has another."""
    told = state.published_grid
    found = tuple(size.hint for size in site.grid or ())
    packed = [run for run in site.query_runs if opaque(run) and same(axis_size(run), site.query_span.length)]  # type: ignore[union-attr]
    if told is None or not packed or told == found or math.prod(told) != math.prod(found):
        return None
    message = (
        f"a table of positions counts the tokens as {found}, and attach publishes {told}: the tokens are in another "
        f"order than (t, h, w), or the published grid is; {REMEDY}, in the order of the tokens"
    )
    return Rejection(Reason.GRID_MISMATCH, message, told, site.node)


def _of_other_samples(q_batch: Axis, k_batch: Axis) -> bool:
    """Whether both are samples of one batch, and not the same ones in the same order."""
    # Heads that are folded into the batch have names of their own in each projection.
    q, k = (tuple(factor for factor in batch if sources((factor,))) for batch in (q_batch, k_batch))
    return rearranged(q, k)


def _cached(q_axis: Axis, k_axis: Axis, v_axis: Axis) -> bool:
    """Whether keys and values differ only in runs that are none of the queries': caches of either, equally long."""
    k_runs, v_runs = runs(k_axis), runs(v_axis)
    if len(k_runs) != len(v_runs) or len(k_runs) < 2:
        return False
    pairs = list(zip(k_runs, v_runs, strict=True))
    own = [k == v for k, v in pairs]
    apart = all(opaque(k) and opaque(v) and same(axis_size(k), axis_size(v)) for k, v in pairs if k != v)
    return apart and any(own) and not any(run in runs(q_axis) for k, v in pairs if k != v for run in (k, v))


def refine(k_runs: tuple[Axis, ...], q_runs: tuple[Axis, ...]) -> tuple[Axis, ...]:
    """``k_runs`` cut where a run of the queries is a slice of one of them: queries that are a part of the keys."""
    result: list[Axis] = []
    for run in k_runs:
        part = next((q[0] for q in q_runs if len(q) == 1 and isinstance(q[0], Slice) and q[0].whole == run), None)
        if part is None:
            result.append(run)
            continue
        result.extend(_three(run, part.start, part.size))
    return tuple(result)


def _three(run: Axis, start: Size, size: Size) -> tuple[Axis, ...]:
    """What lies before ``run[start : start + size]``, that part, and what lies after it; without empty pieces."""
    end = Size(start.expr + size.expr, start.hint + size.hint)
    total = axis_size(run)
    rest = Size(total.expr - end.expr, total.hint - end.hint)
    pieces = ((ZERO, start), (start, size), (end, rest))
    return tuple(cut(run, first, length) for first, length in pieces if length.hint > 0)


def _in_pieces(site: AttentionSite, q_runs: tuple[Axis, ...], k_runs: tuple[Axis, ...]) -> AttentionSite | None:
    """A call on a slice of a video's queries, whose keys are all of the video."""
    wholes = [run[0].whole for run in q_runs if len(run) == 1 and isinstance(run[0], Slice)]
    if not any(whole in k_runs and isinstance(grid_of(whole), tuple) for whole in wholes):
        return None
    message = (
        "the queries are a slice of the video: attention in pieces that are not put together by one concatenation; "
        "call it on all of the queries at once"
    )
    return replace(site, kind="3d", rejection=Rejection(Reason.SEGMENTS, message, None, site.node))


def _told(
    state: GraphState, site: AttentionSite, q_runs: tuple[Axis, ...], k_runs: tuple[Axis, ...]
) -> AttentionSite | None:
    """A self-attention whose grid the graph does not show: the options or the attachment may name it."""
    told = state.settings.grid or state.published_grid
    if told is None or told[0] < 2:
        return None
    tokens = told[0] * told[1] * told[2]
    matching = [run for run in q_runs if run in k_runs and axis_size(run).hint == tokens]
    if len(matching) != 1:
        return None
    t, h, w = (Size(sympy.Integer(n), n) for n in told)
    source = "options" if state.settings.grid else "attach"
    culprit = reordered(state, matching[0])
    if culprit is not None:
        message = (
            f"{culprit.name} ({target_name(culprit)}) puts the tokens in another order, so they are not the rows of "
            f"the grid from {source}"
        )
        rejection = Rejection(Reason.TOKEN_ORDER, message, None, culprit)
        return replace(site, kind="3d", rejection=rejection)
    table = disputed(state, matching[0], told)
    if table is not None:
        message = (
            f"the values of {table.name}, a table of the tokens' positions, are not those of the rows of the grid "
            f"{told} from {source}: the grid or the order of the tokens is another; {REMEDY}, in row-major order"
        )
        return replace(site, kind="3d", rejection=Rejection(Reason.GRID_MISMATCH, message, told, table))
    return _video_site(state, site, matching[0], (t, h, w), source, q_runs, k_runs)


def _apart(state: GraphState, site: AttentionSite, q_axis: Axis, k_axis: Axis, v_axis: Axis) -> AttentionSite | None:
    """Behind a graph break, q, k and v may arrive as inputs of their own: only their length shows what they are.

    They are taken for the video's tokens where somebody named a grid of that length; strict refuses the assumption.
    """
    told = state.settings.grid or state.published_grid
    axes = (q_axis, k_axis, v_axis)
    if told is None or told[0] < 2 or not resumed():
        return None
    lone = [axis[0] for axis in axes if len(axis) == 1 and isinstance(axis[0], Atom) and axis[0].role == "root"]
    if len(lone) < 3 or any(atom.source != INPUT for atom in lone):
        return None
    lengths = [atom.size.hint for atom in lone]
    if lengths[0] == told[0] * told[1] * told[2] > lengths[1] == lengths[2]:
        return replace(site, kind="cross")  # too few keys to be the video's
    if len(set(lengths)) > 1:
        return None
    site = _told(state, site, (q_axis,), (q_axis,)) or site
    if site.grid is not None:
        site = replace(site, key_span=Span(ZERO, axis_size(k_axis)), key_runs=(k_axis,))
        state.note(
            "warning",
            "assumed-tokens",
            f"q, k and v of {site.node} arrive from behind a graph break; they are taken for the tokens of one video "
            f"since all have the {lone[0].size.hint} tokens of the grid from {site.grid_source}",
        )
    return site if site.kind == "3d" else None


def _rotary(
    state: GraphState, site: AttentionSite, q_runs: tuple[Axis, ...], k_runs: tuple[Axis, ...]
) -> AttentionSite | None:
    """The same where a rotary table's values prove the grid."""
    for run in sorted((run for run in q_runs if run in k_runs), key=lambda run: -axis_size(run).hint):
        table = rotary_table(state, run)
        if table is None:
            continue
        video = cut(run, table.start, table.count)
        if video != run:
            pieces = _three(run, table.start, table.count)
            q_runs = tuple(piece for each in q_runs for piece in (pieces if each == run else (each,)))
            k_runs = tuple(piece for each in k_runs for piece in (pieces if each == run else (each,)))
        site = _video_site(state, site, video, table.grid, "rotary", q_runs, k_runs)
        return replace(site, table=(table.node, table.dim, table.start, table.count))
    return None


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
    place = q_runs.index(video)
    segments = tuple(Segment("video" if i == place else "other", axis_size(run)) for i, run in enumerate(q_runs))
    return replace(
        site,
        kind="3d",
        grid=grid,
        grid_source=source,
        segments=segments,
        query_span=Span(_offset(q_runs, video), length),
        key_span=Span(_offset(k_runs, video), length),
        query_runs=q_runs,
        key_runs=k_runs,
    )


def _offset(parts: tuple[Axis, ...], video: Axis) -> Size:
    total = ZERO
    for run in parts[: parts.index(video)]:
        size = axis_size(run)
        total = Size(total.expr + size.expr, total.hint + size.hint)
    return total


def _subgraph_sites(state: GraphState) -> list[AttentionSite]:
    """Attention inside higher-order ops (activation checkpoints): seen, not rewritten."""
    one = Size(sympy.Integer(1), 1)
    sites = []
    opened = {body.call for body in state.everywhere()}
    for graph, node in [(inner, node) for inner in state.everywhere() for node in inner.graph.nodes]:
        if node.op != "call_function" or not isinstance(node.target, torch._ops.HigherOrderOperator):
            continue
        if node in opened or COVERED in node.meta:
            continue
        for argument in node.all_input_nodes:
            module = getattr(graph.gm, str(argument.target), None) if argument.op == "get_attr" else None
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
    """``options["grid"]`` must be some site's, and must not contradict what the graph proves.

    A model of several resolutions may need it at one and prove another.
    """
    grid = state.settings.grid
    if grid is None or not state.sites:
        return
    needed = any(site.grid_source == "options" for site in state.sites)
    for site in state.sites:
        if needed and site.query_span is not None and site.query_span.length.hint != math.prod(grid):
            continue
        if site.grid_source == "graph" and site.grid is not None:
            proven = tuple(size.hint for size in site.grid)
            if proven != grid and any(counted(state, run) for run in site.query_runs):
                raise GridError(
                    f"options['grid']={grid}, but the tokens of {site.node} are counted as {proven}: where frames come "
                    f"first, then rows, then columns, give options['grid']={proven}; where they do not, no grid fits, "
                    "since windows need the tokens in row-major (t, h, w) order: drop the option, and reorder the "
                    "tokens to have this attention rewritten"
                )
            if proven != grid:
                raise GridError(
                    f"options['grid']={grid} but the graph proves {proven} at {site.node}: drop the option, "
                    "the grid needs no telling here"
                )
        if site.table is not None:
            table, shown = site.table[0], tuple(size.hint for size in site.grid or ())
            if shown != grid:
                raise GridError(
                    f"options['grid']={grid}, but the values of {table.name}, a table of the tokens' positions, prove "
                    f"{shown} at {site.node}: drop the option, the grid of every call is read from its table"
                )
            state.note(
                "info",
                "grid-from-table",
                f"options['grid'] is not needed at {site.node}: the values of {table.name}, a table of the tokens' "
                "positions, prove the same, and at run time the grid of every call is read from its table",
            )
    if not any(site.kind == "3d" for site in state.sites):
        tokens = grid[0] * grid[1] * grid[2]
        for site in state.sites:
            if site.rejection is not None and site.shape[2].hint == tokens:
                raise GridError(
                    f"options['grid']={grid} is of as many tokens as {site.node} has, which is declined all the same: "
                    f"{site.rejection.message}"
                )
        joint = any(site.rejection is not None and site.rejection.code is Reason.SEGMENTS for site in state.sites)
        lengths = sorted({site.shape[2].hint for site in state.sites if site.kind != "cross"}, reverse=True)
        raise GridError(
            f"options['grid']={grid} has {tokens} tokens, but the self-attention calls have "
            f"{', '.join(map(str, lengths)) or 'none'}: give the grid after patchify, along (t, h, w)"
            + ("; where some of those are text, compile the whole model, whose graph shows which" if joint else "")
        )
