"""What a compilation decided, as plain data: the single source of ``explain``, the HTML page, the CLI and the tests."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import networkx as nx

from fpscompile.ir import Reason
from fpscompile.plan import Plan
from fpscompile.settings import Settings
from fpscompile.tiling import TileLayout
from fpscompile.windows import AnyWindow


@dataclass(frozen=True)
class SiteRecord:
    """One attention call: what it is, and what became of it. Sizes are those of the call that was compiled."""

    node: str
    """Name of the call in ``graph_before``."""
    module: str
    """Dotted path of the module that makes the call, "" when the graph does not say."""
    kind: str
    """"3d", "spatial", "temporal", "cross" or "other"."""
    batch: int
    heads: int
    head_dim: int
    q_length: int
    k_length: int
    dtype: str
    """"float32", "bfloat16", ..."""
    grid: tuple[int, int, int] | None
    """Video tokens along (t, h, w)."""
    grid_source: str | None
    """"graph", "options", "attach" or "rotary": who told the grid."""
    segments: tuple[tuple[str, int], ...]
    """Runs of the query sequence, in order: ("video" | "other", tokens)."""
    rewritten: bool
    reason: str | None
    """Why it was not rewritten, a sentence; None when it was."""
    reason_code: str | None
    """Its stable code (:class:`fpscompile.ir.Reason`)."""
    plan: Plan | None
    lowering: str | None
    windows: tuple[AnyWindow, ...]
    """Key tiles seen along (t, h, w), or a pattern where that is no product of the axes; per phase."""
    density: tuple[float, ...]
    """Kept fraction of query-key pairs, per phase; (1.0,) when not rewritten."""
    conservative: int
    """Phase used when progress is unknown."""

    @property
    def dense_flops(self) -> float:
        """Multiply-adds of Q K^T and P V counted as two: 4 B H Lq Lk D."""
        return 4.0 * self.batch * self.heads * self.q_length * self.k_length * self.head_dim

    def kept_flops(self, phase: int) -> float:
        """``dense_flops`` times the density of one phase, and what the means of dropped tiles cost."""
        density = self.density[min(phase, len(self.density) - 1)]
        return self.dense_flops * (density + (self._means if density < 1.0 else 0.0))

    @property
    def _means(self) -> float:
        """Pairs of a query and a mean, over all query-key pairs."""
        if self.plan is None or self.grid is None or self.plan.remainder == "none":
            return 0.0
        video = TileLayout(self.grid, self.plan.tile)
        return video.video_tiles * video.video / (self.q_length * self.k_length)


@dataclass(frozen=True)
class Note:
    """Something the user should know about a compilation: an assumption, a fallback, a clamp."""

    level: str
    """"info" or "warning"."""
    code: str
    message: str


@dataclass(frozen=True)
class PassRecord:
    """One run of one pass."""

    name: str
    seconds: float
    modified: bool


@dataclass
class GraphRecord:
    """One captured graph."""

    sites: list[SiteRecord] = field(default_factory=list)
    notes: list[Note] = field(default_factory=list)
    passes: list[PassRecord] = field(default_factory=list)
    graph_before: str = ""
    """Python code of the graph as captured."""
    graph_after: str = ""
    """Python code after the passes."""
    neighbourhoods: list[tuple[str, nx.DiGraph, nx.DiGraph]] = field(default_factory=list)
    """(site, picture of the graph around it before, after); node attributes: label, shape, role."""
    progress_source: str = ""
    """How the denoising step reaches this graph: "attach", "input 'timestep'", "unknown" or ""."""
    settings: Settings = field(default_factory=Settings)
    seconds: float = 0.0
    """Wall time of all passes."""


def strict_failures(sites: Sequence[SiteRecord], notes: Sequence[Note]) -> list[str]:
    """What ``strict=True`` refuses: calls of a requested kind left as they are, and every warning."""
    failures = [
        f"{site.module or site.node} ({site.kind}, {site.q_length} tokens): {site.reason}"
        for site in sites
        if not site.rewritten and site.reason_code != Reason.KIND.value
    ]
    return failures + [note.message for note in notes if note.level == "warning"]
