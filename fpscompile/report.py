"""What a compilation did, for people: tables, numbers and the HTML page, all read from :mod:`fpscompile.records`."""

from __future__ import annotations

import dataclasses
import enum
import os
import re
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import networkx as nx
from rich.console import Console, RenderableType

from fpscompile.records import GraphRecord, Note, SiteRecord, strict_failures
from fpscompile.settings import Settings
from fpscompile.windows import Pattern

WIDTH = 120
"""Columns of ``str(report)``."""


@dataclass(frozen=True)
class SiteGroup:
    """Sites that are alike in all but their name: one row of a table."""

    sites: tuple[SiteRecord, ...]
    share: tuple[float, ...]
    """Share of the denoising steps that runs each of ``density``; sums to 1."""

    @property
    def first(self) -> SiteRecord:
        return self.sites[0]

    @property
    def name(self) -> str:
        """Where the sites are: their modules, or their nodes when the graph names no module."""
        return name_pattern([site.module or site.node for site in self.sites])

    @property
    def at_run_time(self) -> bool:
        """Whether windows and densities depend on a grid that only a call will tell; densities then read 1."""
        return self.first.rewritten and not self.first.windows

    @property
    def mean_density(self) -> float:
        """Mean over all steps of the kept fraction of query-key pairs; equals the kept fraction of the FLOPs."""
        return sum(share * density for share, density in zip(self.share, self.first.density, strict=True))

    @property
    def dense_flops(self) -> float:
        """FLOPs of one dense forward, all sites of the group."""
        return sum(site.dense_flops for site in self.sites)

    @property
    def kept_flops(self) -> float:
        """FLOPs of one forward, the mean over all steps."""
        return self.dense_flops * self.mean_density


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
        if not self.sites:
            return (
                "It may hide in a custom op, or run outside the captured graphs: TORCH_LOGS=graph_breaks shows what "
                "was left out."
            )
        return ""

    @property
    def strict_failures(self) -> list[str]:
        """What ``strict=True`` refuses: calls of a requested kind left as they are, and every warning."""
        return strict_failures(self.sites, self.notes)

    def __rich__(self) -> RenderableType:
        from fpscompile.report_text import renderable

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
        from fpscompile.html import render

        return write_atomically(path, render(self))

    @staticmethod
    def _code(codes: list[str]) -> str:
        if len(codes) == 1:
            return codes[0]
        return "\n\n".join(f"# graph {index} of {len(codes)}\n{code}" for index, code in enumerate(codes, 1))


def write_atomically(path: str | os.PathLike[str], text: str) -> Path:
    """Write ``text`` as UTF-8 beside ``path``, then move it there: readers see the old file or the new one."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)  # mkstemp makes files that others cannot read
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    return path


def name_pattern(names: Sequence[str]) -> str:
    """One text for many names: "blocks.{0..39}.attn1" when a single number varies, else the first and the last."""
    names = list(dict.fromkeys(names))
    if len(names) == 1:
        return names[0]
    split = [re.split(r"(\d+)", name) for name in names]
    if len({len(pieces) for pieces in split}) == 1:
        varying = [index for index, column in enumerate(zip(*split, strict=True)) if len(set(column)) > 1]
        if all(index % 2 for index in varying):
            pieces = list(split[0])
            for index in varying:
                pieces[index] = "*"
            if len(varying) == 1:
                pieces[varying[0]] = _numbers(sorted(int(row[varying[0]]) for row in split))
            return "".join(pieces)
    return f"{names[0]} ... {names[-1]}"


def _numbers(numbers: list[int]) -> str:
    if numbers == list(range(numbers[0], numbers[-1] + 1)):
        return f"{{{numbers[0]}..{numbers[-1]}}}"
    return "{" + ",".join(map(str, numbers)) + "}" if len(numbers) <= 4 else "*"


def plain(value: Any) -> Any:
    """``value`` as dicts, lists, numbers and text; callables by name, graphs as nodes and edges."""
    if isinstance(value, enum.Enum):
        return plain(value.value)
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Pattern):
        return value.spec()
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, nx.DiGraph):
        nodes = [{"name": str(name), **plain(data)} for name, data in value.nodes(data=True)]
        return {"nodes": nodes, "edges": [[str(a), str(b)] for a, b in value.edges]}
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [plain(item) for item in value]
    return getattr(value, "__qualname__", None) or str(value)


def percent(fraction: float) -> str:
    """ "43%", with a digit more below ten percent."""
    value = 100.0 * fraction
    return f"{value:.1f}%" if 0 < value < 9.95 else f"{value:.0f}%"


def flops_text(flops: float) -> str:
    """ "8.44 TFLOP"."""
    for unit in ("", "K", "M", "G", "T", "P"):
        if flops < 999.5 or unit == "P":
            return f"{flops:.3g} {unit}FLOP"
        flops /= 1000.0
    raise AssertionError("unreachable")


def grid_text(sizes: Sequence[int] | None, times: str = "x") -> str:
    """ "21x30x52", "-" when unknown."""
    return times.join(map(str, sizes)) if sizes else "-"


def _kept(groups: Sequence[SiteGroup]) -> float:
    dense = sum(group.dense_flops for group in groups)
    return sum(group.kept_flops for group in groups) / dense if dense else 1.0


def _s(count: int) -> str:
    return "" if count == 1 else "s"
