"""A :class:`~fpscompile.report.Report` as rich renderables: the table of sites, the schedule, notes and timing."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from fpscompile.records import SiteRecord
from fpscompile.site_groups import SiteGroup
from fpscompile.windows import window_text
from fpscompile.wording import grid_text, percent

if TYPE_CHECKING:
    from fpscompile.plan import Plan
    from fpscompile.report import Report

GRID_SOURCES = {
    "graph": "read from the graph",
    "options": 'given as options["grid"]',
    "attach": "published by fpscompile.attach",
    "rotary": "read off the values of a rotary table, at each call",
}


_BOX = box.Box("    \n    \n -- \n" + "    \n" * 5, ascii=True)
"""A rule under the header and nothing else; plain ASCII, so that reports survive any log."""


def renderable(report: Report) -> RenderableType:
    """The whole report, top to bottom: what happened, then why, then what it cost."""
    parts: list[RenderableType] = [Text(report.headline, style="bold" if report.sites else "bold yellow")]
    if report.advice:
        parts.append(Text(report.advice))
    groups = report.groups
    if groups:
        parts += ["", _sites(groups)]
    if reasons(groups):
        parts += ["", Text("left as they are", style="bold"), _reasons(groups)]
    if planned(groups):
        parts += ["", _schedule(report, groups)]
    facts = _facts(report, groups)
    if facts.row_count:
        parts += ["", facts]
    if report.notes:
        parts += ["", Text("notes", style="bold"), _notes(report)]
    return Group(*parts)


def _table(**options: Any) -> Table:
    return Table(box=_BOX, pad_edge=False, show_edge=False, collapse_padding=True, header_style="bold", **options)


def _sites(groups: list[SiteGroup]) -> Table:
    table = _table()
    table.add_column("n", justify="right", no_wrap=True)
    table.add_column("sites", overflow="fold")
    table.add_column("kind", no_wrap=True)
    table.add_column("grid", no_wrap=True)
    table.add_column("segments", overflow="fold")
    table.add_column("heads\nx dim", no_wrap=True)
    table.add_column("tokens", justify="right")
    table.add_column("outcome", overflow="fold")
    table.add_column("density\nper phase")
    table.add_column("FLOPs\nkept", justify="right", no_wrap=True)
    for group in groups:
        site = group.first
        table.add_row(
            str(len(group.sites)),
            Text(group.name),
            site.kind,
            grid_text(site.grid),
            segments_text(site),
            f"{site.heads}x{site.head_dim}",
            tokens_text(site),
            Text(outcome(site), style="green" if site.rewritten else "yellow" if site.kind == "3d" else "dim"),
            densities_text(group),
            "-" if group.at_run_time else percent(group.mean_density),
        )
    return table


def segments_text(site: SiteRecord) -> str:
    """ ""other 226 + video 17550"; "video" when that is all; "-" when unknown."""
    if len(site.segments) == 1:
        return site.segments[0][0]
    return " + ".join(f"{kind} {length}" for kind, length in site.segments) or "-"


def tokens_text(site: SiteRecord) -> str:
    """Query tokens, and key tokens where they differ."""
    return str(site.q_length) if site.q_length == site.k_length else f"{site.q_length} to {site.k_length}"


def densities_text(group: SiteGroup) -> str:
    """ "1.00 0.34 0.25", or that only a call will tell."""
    return "at run time" if group.at_run_time else " ".join(f"{density:.2f}" for density in group.first.density)


def outcome(site: SiteRecord) -> str:
    """What became of it, short: the lowering, or the code of the reason against."""
    return f"rewritten via {site.lowering}" if site.rewritten else f"left: {site.reason_code or 'no reason recorded'}"


def reasons(groups: list[SiteGroup]) -> dict[tuple[str, str], list[SiteGroup]]:
    """Groups left as they are, by (kind, reason); the kind that was asked for comes first."""
    found: dict[tuple[str, str], list[SiteGroup]] = {}
    for group in sorted(groups, key=lambda group: group.first.kind != "3d"):
        site = group.first
        if not site.rewritten:
            found.setdefault((site.kind, site.reason or "no reason recorded"), []).append(group)
    return found


def _reasons(groups: list[SiteGroup]) -> RenderableType:
    table = Table.grid(padding=(0, 2))
    table.add_column(overflow="fold", max_width=30)
    table.add_column()
    for (kind, reason), left in reasons(groups).items():
        style = "yellow" if kind == "3d" else "dim"
        table.add_row(Text("\n".join(group.name for group in left), style=style), Text(reason))
    return Padding(table, (0, 0, 0, 2))


def planned(groups: list[SiteGroup]) -> list[SiteGroup]:
    """One rewritten group for each distinct grid, plan and set of windows that is known."""
    found: dict[object, SiteGroup] = {}
    for group in groups:
        site = group.first
        if site.rewritten and site.windows and site.grid is not None and site.plan is not None:
            found.setdefault((site.grid, site.segments, site.plan, site.windows), group)
    return list(found.values())


def _schedule(report: Report, groups: list[SiteGroup]) -> Table:
    schedule = report.settings.phases
    several = len(planned(groups)) > 1
    table = _table(title=f"schedule: {schedule.name}", title_justify="left", title_style="bold")
    columns = ["phase", "progress", "window (tiles)", "of", "density", "granularity", "tile"]
    for name in ["grid", *columns] if several else columns:
        table.add_column(name, no_wrap=name != "window (tiles)", overflow="fold")
    for group in planned(groups):
        site, plan = group.first, group.first.plan
        assert plan is not None
        for index, (window, density) in enumerate(zip(site.windows, site.density, strict=False)):
            phase = schedule.phases[index] if index < len(schedule.phases) else None
            row = [
                str(index),
                range_text(phase.start, phase.end) if phase else "all",
                window_text(window),
                grid_text(tile_counts(site)),
                f"{density:.3f}",
                granularity_text(site, index),
                grid_text(plan.tile),
            ]
            table.add_row(*([grid_text(site.grid), *row] if several else row))
    return table


def range_text(start: float, end: float) -> str:
    """ "[0.2, 0.6)"; the last range includes its end."""
    return f"[{start:g}, {end:g}{']' if end == 1.0 else ')'}"


def granularity_text(site: SiteRecord, phase: int) -> str:
    """Region that shares one FP8 scale in ``phase``, "-" without quantization."""
    assert site.plan is not None
    return "-" if site.plan.quant == "none" else f"{site.plan.quant} per {site.plan.phases[phase].granularity}"


def quant_text(plan: Plan) -> str:
    """The number format and what is done to the operands before, such as "fp8, K without its mean"."""
    if plan.quant == "none":
        return "none"
    words = {"K": plan.smooth_k, "V": plan.smooth_v or plan.quant == "int8"}
    centred = " and ".join(name for name, smooth in words.items() if smooth)
    parts = [f"{centred} without {'its mean' if len(centred) == 1 else 'their means'}"] if centred else []
    if plan.quant == "fp8" and plan.hadamard:
        parts.append("Q and K rotated")
    return ", ".join([plan.quant, *parts])


def tile_counts(site: SiteRecord) -> tuple[int, ...]:
    """Video tiles along (t, h, w); empty without a grid."""
    if site.grid is None or site.plan is None:
        return ()
    return tuple(-(-size // tile) for size, tile in zip(site.grid, site.plan.tile, strict=True))


def progress_text(report: Report, source: str, conservative: int) -> str:
    """How a graph knows the denoising step, in words."""
    if source == "unknown":
        return (
            f"unknown: every step runs phase {conservative}, the densest. Wrap the loop in fpscompile.attach(model), "
            'or name the timestep input in options["timestep"]'
        )
    if source == "attach":
        return "published by fpscompile.attach at each step"
    if source.startswith("input"):
        timestep = report.settings.timestep
        scale = f"{timestep.start:g} to {timestep.end:g}, shift {timestep.shift:g}"
        return f"read in the graph from {source} ({scale}), unless fpscompile.attach publishes it"
    return "not needed: every step runs the same phase" if source in ("constant", "") else source


def facts(report: Report, groups: list[SiteGroup]) -> list[tuple[str, str]]:
    """How grid and progress are known: (word, text) pairs."""
    rows = []
    rewritten = [group for group in groups if group.first.rewritten]
    sources = dict.fromkeys(group.first.grid_source for group in rewritten if group.first.grid_source)
    if sources:
        rows.append(("grid", "; ".join(GRID_SOURCES.get(source, source) for source in sources)))
    if rewritten:
        phase = rewritten[0].first.conservative
        progress = [graph.progress_source for graph in report.graphs if any(site.rewritten for site in graph.sites)]
        rows.append(("progress", "; ".join(progress_text(report, source, phase) for source in dict.fromkeys(progress))))
    plans = [group.first.plan for group in rewritten if group.first.plan is not None]
    formats = dict.fromkeys(quant_text(plan) for plan in plans if plan.quant != "none")
    if formats:
        rows.append(("quantization", "; ".join(formats)))
    if any(plan.remainder == "means" for plan in plans):
        rows.append(("dropped tiles", "take part as one key each, their means"))
    return rows


def _facts(report: Report, groups: list[SiteGroup]) -> Table:
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold", no_wrap=True)
    table.add_column()
    passes = [("passes", passes_text(report))] if pass_seconds(report) else []
    for word, text in facts(report, groups) + passes:
        table.add_row(word, Text(text))
    return table


def pass_seconds(report: Report) -> dict[str, float]:
    """Wall time of each pass, summed over graphs, in order of first run."""
    total: dict[str, float] = {}
    for graph in report.graphs:
        for record in graph.passes:
            total[record.name] = total.get(record.name, 0.0) + record.seconds
    return total


def passes_text(report: Report) -> str:
    """ "0.120 s: normalize 0.010, ..."."""
    seconds = pass_seconds(report)
    detail = ", ".join(f"{name} {value:.3f}" for name, value in seconds.items())
    count = len(report.graphs)
    return f"{report.seconds:.3f} s over {count} graph{'' if count == 1 else 's'}" + (f": {detail}" if detail else "")


def _notes(report: Report) -> RenderableType:
    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True)
    table.add_column()
    for note in sorted(report.notes, key=lambda note: note.level != "warning"):
        style = "yellow" if note.level == "warning" else "cyan"
        table.add_row(Text(note.level, style=style), Text(f"{note.message} [{note.code}]"))
    return Padding(table, (0, 0, 0, 2))
