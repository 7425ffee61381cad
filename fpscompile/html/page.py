"""From a :class:`~fpscompile.report.Report` to the text of one HTML page."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import jinja2
from markupsafe import Markup

from fpscompile import report_text as words
from fpscompile.html import svg_graph, svg_masks
from fpscompile.records import SiteRecord
from fpscompile.site_groups import SiteGroup
from fpscompile.tiling import TileLayout
from fpscompile.windows import window_text
from fpscompile.wording import flops_text, grid_text, percent, plain

if TYPE_CHECKING:
    from fpscompile.report import Report

CODE_LIMIT = 200_000
"""Characters of one graph's code on the page; the rest is in ``report.graph_before`` and ``graph_after``."""

GRAPHS_LIMIT = 6
"""Pictures of neighbourhoods on the page: one for each kind of site, rewritten ones first."""


@dataclass(frozen=True)
class PhaseView:
    """One phase of one plan, as the page shows it."""

    index: int
    colour: str
    range: str
    window: str
    counts: str
    density: float
    granularity: str
    middle: Markup
    corner: Markup
    mask: Markup


@dataclass(frozen=True)
class PlanView:
    """One distinct plan on one distinct grid."""

    title: str
    facts: tuple[tuple[str, str], ...]
    timeline: Markup
    only_phase: int | None
    """The phase that all steps run when progress is unknown."""
    phases: tuple[PhaseView, ...]
    tiles: str
    others: str
    """What the runs of tiles outside the video are, "" without any."""


@dataclass(frozen=True)
class GraphView:
    """The neighbourhood of one site, before and after."""

    title: str
    outcome: str
    before: Markup
    after: Markup


def render(report: Report) -> str:
    """The page: everything it shows is inside it."""
    groups = report.groups
    planned = words.planned(groups)
    return _template().render(
        report=report,
        groups=groups,
        css=Markup((Path(__file__).parent / "page.css").read_text(encoding="utf-8")),
        cards=_cards(report, groups),
        warnings=[
            (sum(len(group.sites) for group in left), [group.name for group in left], reason)
            for (kind, reason), left in words.reasons(groups).items()
            if kind in report.settings.attention_kinds
        ],
        notes=sorted(report.notes, key=lambda note: note.level != "warning"),
        plans=[_plan(report, group, groups) for group in planned],
        graphs=list(_graphs(report, groups)),
        facts=words.facts(report, groups),
        passes=list(words.pass_seconds(report).items()),
        codes=[
            ("Before: the graph as captured", *_clip(report.graph_before)),
            ("After: the graph handed to the inner compiler", *_clip(report.graph_after)),
        ],
        settings=_settings(report),
        words=words,
        percent=percent,
        grid_text=functools.partial(grid_text, times="×"),
        flops_text=flops_text,
    )


@functools.cache
def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("page.html.jinja")


def _cards(report: Report, groups: list[SiteGroup]) -> list[tuple[str, str, str]]:
    """(number, what it is, in detail)."""
    total = len(report.sites)
    if not total:
        return []
    left = total - report.rewritten
    cards = [
        (str(report.rewritten), "rewritten", f"of {total} attention call{'' if total == 1 else 's'}"),
        (str(left), "left as they are", "reasons below" if left else "none declined"),
    ]
    if any(group.at_run_time for group in groups):
        return cards
    dense = sum(group.dense_flops for group in groups)
    kept = sum(group.kept_flops for group in groups)
    flops = f"{flops_text(kept)} of {flops_text(dense)} per forward"
    cards.append((percent(report.flops_kept), "attention FLOPs kept", flops))
    if report.rewritten:
        cards.append((f"{report.flops_kept_rewritten:.2f}", "mean density", "over all steps, rewritten calls"))
    return cards


def layouts(site: SiteRecord) -> tuple[TileLayout, TileLayout]:
    """Tiles of the query and the key sequence of a rewritten site.

    Records keep the segments of the queries. Keys of the same number have the same segments; surplus keys of another
    number are drawn behind the video.
    """
    assert site.grid is not None
    assert site.plan is not None
    before = 0
    for kind, length in site.segments:
        if kind == "video":
            break
        before += length
    video = site.grid[0] * site.grid[1] * site.grid[2]
    if not any(kind == "video" for kind, _ in site.segments):
        before = 0
    q_layout = TileLayout(site.grid, site.plan.tile, before, site.q_length - before - video)
    if site.k_length == site.q_length:
        return q_layout, q_layout
    return q_layout, TileLayout(site.grid, site.plan.tile, 0, site.k_length - video)


def _plan(report: Report, group: SiteGroup, groups: list[SiteGroup]) -> PlanView:
    site, plan = group.first, group.first.plan
    assert site.grid is not None
    assert plan is not None
    alike = [g for g in groups if words.planned([group, g]) == [group] and g.first.rewritten]
    calls = sum(len(g.sites) for g in alike)
    schedule = report.settings.phases.phases
    q_layout, k_layout = layouts(site)
    counts = q_layout.counts
    middle = (counts[0] // 2, counts[1] // 2, counts[2] // 2)
    phases, bars = [], []
    for index, (window, density) in enumerate(zip(site.windows, site.density, strict=False)):
        known = index < len(schedule) and len(site.density) == len(schedule)
        start, end = (schedule[index].start, schedule[index].end) if known else (0.0, 1.0)
        bars.append(svg_masks.Bar(start, end, density, used=group.share[index] > 0))
        phases.append(
            PhaseView(
                index=index,
                colour=svg_masks.colour(index),
                range=words.range_text(start, end),
                window=window_text(window, "×"),
                counts=grid_text(counts, "×"),
                density=density,
                granularity=words.granularity_text(site, index),
                middle=svg_masks.window_slices(q_layout, window, middle, index, site.heads, plan.clamp),
                corner=svg_masks.window_slices(q_layout, window, (0, 0, 0), index, site.heads, plan.clamp),
                mask=svg_masks.block_mask(q_layout, k_layout, window, index, density, site.heads, plan.clamp),
            )
        )
    unknown = len(phases) > 1 and max(group.share) == 1.0
    return PlanView(
        title=f"Grid {grid_text(site.grid, '×')}",
        facts=(
            ("calls", f"{calls} ({', '.join(g.name for g in alike)})"),
            ("tile", f"{grid_text(plan.tile, '×')} tokens"),
            ("lowering", site.lowering or "-"),
            ("quantization", words.quant_text(plan)),
            *([("dropped tiles", "take part as their means")] if plan.remainder == "means" else []),
        ),
        timeline=svg_masks.timeline(bars, group.mean_density),
        only_phase=group.share.index(1.0) if unknown else None,
        phases=tuple(phases),
        tiles=f"{q_layout.n_tiles:,} × {k_layout.n_tiles:,} tiles",
        others=_others(q_layout),
    )


def _others(layout: TileLayout) -> str:
    runs = [
        f"the {place} {tiles} tile{'' if tiles == 1 else 's'} ({tokens} other tokens)"
        for place, tiles, tokens in (
            ("first", layout.before_tiles, layout.before),
            ("last", layout.after_tiles, layout.after),
        )
        if tiles
    ]
    return f"Set apart by a line: {' and '.join(runs)}, which see all and are seen by all." if runs else ""


def _graphs(report: Report, groups: list[SiteGroup]) -> Iterator[GraphView]:
    pictures = {
        id(site): (before, after)
        for graph in report.graphs
        for node, before, after in graph.neighbourhoods
        for site in graph.sites
        if site.node == node
    }
    shown = 0
    for group in sorted(groups, key=lambda group: not group.first.rewritten):
        pair = next((pictures[id(site)] for site in group.sites if id(site) in pictures), None)
        if pair is None or shown == GRAPHS_LIMIT:
            continue
        shown += 1
        yield GraphView(
            title=group.name,
            outcome=words.outcome(group.first),
            before=svg_graph.draw(pair[0], f"Graph around {group.name} before the passes"),
            after=svg_graph.draw(pair[1], f"Graph around {group.name} after the passes"),
        )


def _clip(code: str) -> tuple[str, int]:
    """The first lines of ``code``, and how many are left out."""
    if len(code) <= CODE_LIMIT:
        return code, 0
    head = code[: code.rfind("\n", 0, CODE_LIMIT) + 1] or code[:CODE_LIMIT]
    return head, code.count("\n", len(head)) + 1


def _settings(report: Report) -> list[tuple[str, str]]:
    values = plain(report.settings)
    values["schedule"] = report.settings.phases.name
    return [(name, str(value)) for name, value in values.items() if value is not None]
