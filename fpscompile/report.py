"""What a compilation did, for people: tables, numbers and the HTML page, all read from :mod:`fpscompile.records`."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console, RenderableType

from fpscompile.files import write_atomically
from fpscompile.html import render
from fpscompile.ir import Reason
from fpscompile.records import GraphRecord, Note, SiteRecord, strict_failures
from fpscompile.report_text import renderable
from fpscompile.settings import Settings
from fpscompile.site_groups import SiteGroup
from fpscompile.wording import percent, plain

WIDTH = 120
"""Columns of ``str(report)``."""


class Report:
    """The record of one or more captured graphs.

    ``str(report)`` is plain text of :data:`WIDTH` columns, ``rich.print(report)`` fits the terminal, with colours.
    """

    def __init__(self, graphs: Sequence[GraphRecord], settings: Settings | None = None) -> None:
        self.graphs = list(graphs)
        self.settings = settings if settings is not None else Settings()

    def __repr__(self) -> str:
        return f"<Report: {self.rewritten} of {len(self.sites)} attention calls rewritten, {len(self.graphs)} graphs>"

    @property
    def sites(self) -> list[SiteRecord]:
        """Every attention call, in order."""
        return [site for graph in self.graphs for site in graph.sites]

    @property
    def notes(self) -> list[Note]:
        """Every note, in order; the same note of several graphs is listed once."""
        return list(dict.fromkeys(note for graph in self.graphs for note in graph.notes))

    @property
    def rewritten(self) -> int:
        """Number of attention calls that were rewritten."""
        return sum(site.rewritten for site in self.sites)

    @property
    def disabled(self) -> bool:
        """Whether FPS_DISABLE kept the passes from looking at any graph."""
        return any(note.code == Reason.DISABLED.value for note in self.notes)

    @property
    def graph_before(self) -> str:
        """Code of the graphs as captured; a header line each when there are several."""
        return self._code([graph.graph_before for graph in self.graphs])

    @property
    def graph_after(self) -> str:
        """Code of the graphs after the passes; a header line each when there are several."""
        return self._code([graph.graph_after for graph in self.graphs])

    @property
    def seconds(self) -> float:
        """Wall time of all passes over all graphs."""
        return sum(graph.seconds for graph in self.graphs)

    @property
    def groups(self) -> list[SiteGroup]:
        """Sites of the same kind, shape and outcome together, in order of first appearance."""
        members: dict[object, list[SiteRecord]] = {}
        share: dict[object, tuple[float, ...]] = {}
        for graph in self.graphs:
            for site in graph.sites:
                reason = site.reason.replace(site.node, "*") if site.reason else None
                weights = self.share(graph, site)
                key = (dataclasses.replace(site, node="", module="", reason=reason), weights)
                members.setdefault(key, []).append(site)
                share[key] = weights
        return [SiteGroup(tuple(sites), share[key]) for key, sites in members.items()]

    def share(self, graph: GraphRecord, site: SiteRecord) -> tuple[float, ...]:
        """Share of the denoising steps that runs each phase of ``site``: the lengths of the schedule's ranges.

        When the graph cannot know the progress, all steps run the conservative phase.
        """
        phases = self.settings.phases.phases
        if len(site.density) != len(phases):
            return (1.0 / len(site.density),) * len(site.density)
        if graph.progress_source == "unknown":
            return tuple(float(index == site.conservative) for index in range(len(phases)))
        return tuple(phase.end - phase.start for phase in phases)

    @property
    def flops_kept(self) -> float:
        """Kept fraction of the attention FLOPs, all sites, the mean over all steps; 1.0 without any site."""
        return _kept(self.groups)

    @property
    def flops_kept_rewritten(self) -> float:
        """The same over the rewritten sites alone: their mean density, weighted by their size."""
        return _kept([group for group in self.groups if group.first.rewritten])

    @property
    def headline(self) -> str:
        """The outcome in one sentence."""
        total, rewritten = len(self.sites), self.rewritten
        if not self.graphs:
            return "No attention call reached the backend: no graph was captured."
        if self.disabled:
            return "FPS_DISABLE is set: nothing is rewritten, the model runs as without fps."
        if not total:
            count = len(self.graphs)
            return f"No attention call reached the backend: {count} graph{_s(count)} captured, none contains attention."
        if not rewritten:
            return f"None of {total} attention call{_s(total)} was rewritten: the model runs as without fps."
        outcome = f"{rewritten} of {total} attention call{_s(total)} rewritten: "
        if any(group.at_run_time for group in self.groups):
            return outcome + "how much of the attention is kept depends on the grid, known at run time."
        return outcome + f"attention keeps {percent(self.flops_kept)} of its dense FLOPs, averaged over all steps."

    @property
    def advice(self) -> str:
        """What to look at when no attention call was seen; "" otherwise."""
        if not self.graphs:
            return (
                "The model did not run, ran under torch.compiler.disable, or broke at its first operation: "
                "TORCH_LOGS=graph_breaks shows where."
            )
        if self.disabled:
            return "Unset FPS_DISABLE, or set it to 0, to see what fps does to this model."
        if not self.sites:
            return (
                "It may have no softmax, as linear attention has none, hide in a custom op, or run outside the "
                "captured graphs: TORCH_LOGS=graph_breaks shows what was left out."
            )
        return ""

    @property
    def strict_failures(self) -> list[str]:
        """What ``strict=True`` refuses: calls of a requested kind left as they are, and every warning."""
        return strict_failures(self.sites, self.notes)

    def __rich__(self) -> RenderableType:
        return renderable(self)

    def __str__(self) -> str:
        return self.to_text()

    def to_text(self, width: int = WIDTH) -> str:
        """Plain text, at most ``width`` columns wide."""
        with open(os.devnull, "w") as nowhere:
            console = Console(width=width, record=True, file=nowhere, color_system=None, legacy_windows=False)
            console.print(self.__rich__())
            text = console.export_text(styles=False)
        return "\n".join(line.rstrip() for line in text.splitlines())

    def to_dict(self) -> dict[str, Any]:
        """Everything but the HTML, as plain data that ``json.dumps`` takes."""
        return {
            "headline": self.headline,
            "advice": self.advice,
            "rewritten": self.rewritten,
            "flops_kept": self.flops_kept,
            "settings": plain(self.settings),
            "schedule": plain(self.settings.phases),
            "sites": plain(self.sites),
            "notes": plain(self.notes),
            "graphs": plain(self.graphs),
        }

    def save_html(self, path: str | os.PathLike[str]) -> Path:
        """Write one self-contained page and return its path; folders are created, and an old page stays whole.

        Raises:
            OSError: the path cannot be written.
        """
        return write_atomically(path, render(self))

    @staticmethod
    def _code(codes: list[str]) -> str:
        if len(codes) == 1:
            return codes[0]
        return "\n\n".join(f"# graph {index} of {len(codes)}\n{code}" for index, code in enumerate(codes, 1))


def _kept(groups: Sequence[SiteGroup]) -> float:
    dense = sum(group.dense_flops for group in groups)
    return sum(group.kept_flops for group in groups) / dense if dense else 1.0


def _s(count: int) -> str:
    return "" if count == 1 else "s"
