"""What the compiler decided for a site: a frozen :class:`Plan`, and its resolution for one concrete grid.

A Plan holds no grid: the grid is a run-time argument of the op. It travels in the graph as JSON text, so it is part
of every compile cache's key and readable in a printed graph.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from dataclasses import dataclass
from typing import TypeVar

from fpscompile import windows as families
from fpscompile.errors import GridError, UnsupportedError
from fpscompile.masks import BlockMask, Window, window_for_density
from fpscompile.schedule import Schedule
from fpscompile.tiling import Grid, TileLayout
from fpscompile.windows import AnyWindow, TileSets, View

Config = TypeVar("Config")

P_SCALE = 256.0
"""P = 2^(S - m), m a whole number near the row's maximum (:mod:`fpscompile.kernel_spec`), is multiplied by this before
its cast to E4M3. A power of two, so the scaling itself is exact; it cancels in ``acc / l``. (The paper uses 448.)"""

BLOCK_N = 128
"""Default number of key slots per rounding block of P; see :class:`~fpscompile.kernel_spec.KernelSpec`."""


@dataclass(frozen=True)
class PhasePlan:
    """What one phase of the schedule does at this site. The ranges themselves live with the phase computation."""

    window: AnyWindow | None = None
    density: float | None = None
    granularity: str = "tile"

    def to_data(self) -> dict[str, object]:
        """Plain data for JSON."""
        window = None if self.window is None else families.spec_of(self.window)
        return {"window": window, "density": self.density, "granularity": self.granularity}

    @classmethod
    def from_data(cls, data: dict[str, object]) -> PhasePlan:
        window = data["window"]
        return cls(**{**data, "window": None if window is None else families.window_of(window)})  # type: ignore[arg-type]


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
    """"none", "fp8" or "int8"."""
    compute: str = "auto"
    """Operands of the matrix products of a generated CPU kernel: "float32", "bfloat16", or "auto", which never computes
    in less than the inputs' dtype."""
    smooth_k: bool = True
    """Subtract K's mean over the valid tokens before quantization (exact: softmax does not see it)."""
    smooth_v: bool = False
    """Subtract V's mean over the valid tokens before FP8 quantization; the output gets it back (exact: weights sum to
    one)."""
    hadamard: bool = False
    """Rotate Q and K before FP8 quantization (exact: scores do not see it); see :mod:`fpscompile.hadamard`."""
    remainder: str = "none"
    """What the tiles that a mask drops are to a query: "none", or "means"; see :mod:`fpscompile.remainder`."""
    lowering: str = "boxes"
    """A key of :data:`fpscompile.lowerings.REGISTRY`."""
    block_n: int = BLOCK_N
    """Key slots per rounding block of P (only with quant="fp8")."""
    p_scale: float = P_SCALE
    config: tuple[tuple[str, int | str], ...] = ()
    """Fields of the kernel's config that was measured to be the fastest, (name, value) sorted by name; () means the
    lowering's own rule."""

    def to_json(self) -> str:
        """One line, keys sorted: equal plans give equal text."""
        data = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        data["phases"] = [phase.to_data() for phase in self.phases]
        return json.dumps(data, sort_keys=True, separators=(",", ":"))

    def config_as(self, cls: type[Config]) -> Config | None:
        """The tuned config as the lowering's own class; None where nothing was tuned."""
        return cls(**dict(self.config)) if self.config else None

    @classmethod
    def from_json(cls, text: str) -> Plan:
        return _parse(text)

    def dense(self) -> Plan:
        """The same phases with nothing left out and nothing rounded."""
        phases = (PhasePlan(density=1.0),) * len(self.phases)
        return dataclasses.replace(self, phases=phases, quant="none", remainder="none", config=())

    @classmethod
    def of(cls, schedule: Schedule, **fields: object) -> Plan:
        """A plan for all phases of ``schedule``; ``fields`` are the remaining fields."""
        phases = tuple(PhasePlan(phase.window, phase.density, phase.granularity) for phase in schedule.phases)
        return cls(phases=phases, clamp=schedule.clamp, **fields)  # type: ignore[arg-type]


@functools.lru_cache(maxsize=1024)
def _parse(text: str) -> Plan:
    data = json.loads(text)
    data["tile"] = tuple(data["tile"])
    data["phases"] = tuple(PhasePlan.from_data(phase) for phase in data["phases"])
    data["config"] = tuple((name, value) for name, value in data["config"])
    return Plan(**data)


@dataclass(frozen=True)
class ResolvedPlan:
    """A plan on a concrete grid: layouts of both sides and one window per phase."""

    plan: Plan
    q_layout: TileLayout
    k_layout: TileLayout
    windows: tuple[AnyWindow, ...]
    """Three sizes wherever a window is a product of the axes on this grid, else a pattern."""
    heads: int | None = None
    """Query heads; None where no window differs by head."""

    @property
    def view(self) -> View:
        """What windows are evaluated on."""
        return View(self.q_layout, self.k_layout, self.heads, self.plan.clamp)

    @property
    def product(self) -> bool:
        """Whether every window is a product of the three axes: what the boxes lowering needs."""
        return all(isinstance(window, tuple) for window in self.windows)

    def product_window(self, phase: int) -> Window:
        """The three sizes of one phase's window.

        Raises:
            UnsupportedError: the window is no product.
        """
        window = self.windows[phase]
        if not isinstance(window, tuple):
            raise UnsupportedError(
                f"lowering 'boxes' serves products of the axes (sliding windows, dense, spatial and temporal bands), "
                f"and window {window.text!r} is none: use lowering='gather' or 'auto'"
            )
        return window

    @property
    def dynamic(self) -> bool:
        """Whether content chooses tiles in some phase: the block mask is then made per call."""
        return any(families.is_dynamic(window) for window in self.windows)

    @property
    def densities(self) -> tuple[float, ...]:
        """Kept fraction of query-key pairs per phase; see :func:`fpscompile.windows.density`."""
        return _densities(self)

    @property
    def block_mask(self) -> BlockMask:
        """All phases, on the CPU; computed once per resolved plan.

        Raises:
            UnsupportedError: a dynamic plan; its masks come from :mod:`fpscompile.selection`.
        """
        return _block_mask(self)

    def tile_sets(self, phase: int) -> TileSets:
        """What each query tile sees in one phase, content-chosen tiles included, on video tiles."""
        return families.sets_on_grid(self.windows[phase], self.view)

    @property
    def conservative(self) -> int:
        """The phase to use when progress is unknown: the densest, the first of equals."""
        return max(range(len(self.windows)), key=lambda index: (self.densities[index], -index))

    def of_batch(self, phases: tuple[int, ...]) -> ResolvedPlan:
        """A plan whose phases are the elements of one batch: for masks that differ by element.

        Args:
            phases: the phase of each batch element.
        """
        plan = dataclasses.replace(self.plan, phases=tuple(self.plan.phases[phase] for phase in phases))
        return dataclasses.replace(self, plan=plan, windows=tuple(self.windows[phase] for phase in phases))


@functools.lru_cache(maxsize=128)
def _block_mask(resolved: ResolvedPlan) -> BlockMask:
    return families.block_mask(
        resolved.windows, resolved.q_layout, resolved.k_layout, resolved.heads, clamp=resolved.plan.clamp
    )


@functools.lru_cache(maxsize=512)
def _densities(resolved: ResolvedPlan) -> tuple[float, ...]:
    q_layout, k_layout, clamp = resolved.q_layout, resolved.k_layout, resolved.plan.clamp
    return tuple(
        families.density(window, q_layout, k_layout, resolved.heads, clamp=clamp) for window in resolved.windows
    )


def resolve(
    plan: Plan,
    grid: Grid,
    q_length: int,
    k_length: int,
    q_start: int = 0,
    k_start: int = 0,
    heads: int | None = None,
) -> ResolvedPlan:
    """``plan`` for one grid and the two sequences around it. Cached; results are immutable.

    Args:
        grid: video tokens along (t, h, w).
        q_length, k_length: tokens of the query and the key sequence.
        q_start, k_start: where the video's tokens begin in each.
        heads: query heads; needed where a window differs by head.

    Raises:
        GridError: the sequences are shorter than the grid.
        WindowError: a window or a density that the grid cannot give; a density below the floor clamps if the plan does.
        OptionError: a window for a head that does not exist.
    """
    differs = any(phase.window is not None and families.per_head(phase.window) for phase in plan.phases)
    return _resolve(plan, grid, q_length, k_length, q_start, k_start, heads if differs else None)


@functools.lru_cache(maxsize=512)
def _resolve(
    plan: Plan, grid: Grid, q_length: int, k_length: int, q_start: int, k_start: int, heads: int | None
) -> ResolvedPlan:
    video = grid[0] * grid[1] * grid[2]
    for side, length, start in (("query", q_length, q_start), ("key", k_length, k_start)):
        if start + video > length:
            raise GridError(
                f"grid {grid} has {video} tokens, but the {side} sequence has {length}, video from token {start}: "
                "the grid published by attach (or given as options['grid']) is not the one of this call"
            )
    q_layout = TileLayout(grid, plan.tile, q_start, q_length - q_start - video)
    k_layout = TileLayout(grid, plan.tile, k_start, k_length - k_start - video)
    view = View(q_layout, k_layout, heads, plan.clamp)
    windows: list[AnyWindow] = []
    for phase in plan.phases:
        if phase.window is not None:
            windows.append(families.on_grid(phase.window, view))
        else:
            assert phase.density is not None
            windows.append(window_for_density(q_layout, k_layout, phase.density, clamp=plan.clamp))
    return ResolvedPlan(plan, q_layout, k_layout, tuple(windows), heads)
