"""What the compiler decided for a site: a frozen :class:`Plan`, and its resolution for one concrete grid.

A Plan holds no grid: the grid is a run-time argument of the op. It travels in the graph as JSON text, so it is part
of every compile cache's key and readable in a printed graph.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from dataclasses import dataclass

from fpscompile.errors import GridError
from fpscompile.masks import BlockMask, Window, window_density, window_for_density, window_mask
from fpscompile.schedule import Schedule
from fpscompile.tiling import Grid, TileLayout

P_SCALE = 256.0
"""P = exp(S - running max) lies in [0, 1] and is multiplied by this before its cast to E4M3. A power of two, so
the scaling itself is exact; it cancels in ``acc / l``. (The paper uses 448.)"""

BLOCK_N = 128
"""Default number of key slots per rounding block of P; see :class:`~fpscompile.kernel_spec.KernelSpec`."""


@dataclass(frozen=True)
class PhasePlan:
    """What one phase of the schedule does at this site. The ranges themselves live with the phase computation."""

    window: Window | None = None
    density: float | None = None
    granularity: str = "tile"


@dataclass(frozen=True)
class Plan:
    """Decision for one site. Equal plans on equal grids share masks and kernels."""

    tile: Grid
    """Tokens of the 3D tile along (t, h, w)."""
    phases: tuple[PhasePlan, ...]
    """Indexed by the op's ``phase`` tensor."""
    clamp: bool = False
    """Whether a density below the floor becomes the floor."""
    quant: str = "none"
    """"none" or "fp8"."""
    smooth_k: bool = True
    """Subtract K's mean over the valid tokens before quantization (exact: softmax does not see it)."""
    lowering: str = "boxes"
    """A key of :data:`fpscompile.lowerings.REGISTRY`."""
    block_n: int = BLOCK_N
    """Key slots per rounding block of P (only with quant="fp8")."""
    p_scale: float = P_SCALE

    def to_json(self) -> str:
        """One line, keys sorted: equal plans give equal text."""
        return json.dumps(dataclasses.asdict(self), sort_keys=True, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> Plan:
        return _parse(text)

    @classmethod
    def of(cls, schedule: Schedule, **fields: object) -> Plan:
        """A plan for all phases of ``schedule``; ``fields`` are the remaining fields."""
        phases = tuple(PhasePlan(phase.window, phase.density, phase.granularity) for phase in schedule.phases)
        return cls(phases=phases, clamp=schedule.clamp, **fields)  # type: ignore[arg-type]


@functools.lru_cache(maxsize=1024)
def _parse(text: str) -> Plan:
    data = json.loads(text)
    data["tile"] = tuple(data["tile"])
    data["phases"] = tuple(
        PhasePlan(tuple(p["window"]) if p["window"] else None, p["density"], p["granularity"]) for p in data["phases"]
    )
    return Plan(**data)


@dataclass(frozen=True)
class ResolvedPlan:
    """A plan on a concrete grid: layouts of both sides and one window per phase."""

    plan: Plan
    q_layout: TileLayout
    k_layout: TileLayout
    windows: tuple[Window, ...]

    @property
    def densities(self) -> tuple[float, ...]:
        """Kept fraction of query-key pairs per phase."""
        return tuple(window_density(self.q_layout, self.k_layout, window) for window in self.windows)

    @property
    def block_mask(self) -> BlockMask:
        """All phases, on the CPU; computed once per resolved plan."""
        return _block_mask(self)

    @property
    def conservative(self) -> int:
        """The phase to use when progress is unknown: the densest, the first of equals."""
        return max(range(len(self.windows)), key=lambda index: (self.densities[index], -index))


@functools.lru_cache(maxsize=128)
def _block_mask(resolved: ResolvedPlan) -> BlockMask:
    return window_mask(resolved.q_layout, resolved.k_layout, resolved.windows)


@functools.lru_cache(maxsize=512)
def resolve(plan: Plan, grid: Grid, q_length: int, k_length: int, q_start: int = 0, k_start: int = 0) -> ResolvedPlan:
    """``plan`` for one grid and the two sequences around it. Cached; results are immutable.

    Args:
        grid: video tokens along (t, h, w).
        q_length, k_length: tokens of the query and the key sequence.
        q_start, k_start: where the video's tokens begin in each.

    Raises:
        GridError: the sequences are shorter than the grid.
        WindowError: a density below the floor, unless the plan clamps.
    """
    video = grid[0] * grid[1] * grid[2]
    for side, length, start in (("query", q_length, q_start), ("key", k_length, k_start)):
        if start + video > length:
            raise GridError(
                f"grid {grid} has {video} tokens, but the {side} sequence has {length}, video from token {start}: "
                "the grid published by attach (or given as options['grid']) is not the one of this call"
            )
    q_layout = TileLayout(grid, plan.tile, q_start, q_length - q_start - video)
    k_layout = TileLayout(grid, plan.tile, k_start, k_length - k_start - video)
    windows = []
    for phase in plan.phases:
        if phase.window is not None:
            t, h, w = (min(w, n) for w, n in zip(phase.window, q_layout.counts, strict=True))
            windows.append((t, h, w))
        else:
            assert phase.density is not None
            windows.append(window_for_density(q_layout, k_layout, phase.density, clamp=plan.clamp))
    return ResolvedPlan(plan, q_layout, k_layout, tuple(windows))
