"""Pictures for pages and papers, drawn with matplotlib: the schedule, block masks, the window of one query tile.

Every function returns a new :class:`matplotlib.figure.Figure`; nothing global is touched. Needs matplotlib (the extra
``examples``), imported on first use.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from fpscompile.errors import FpsError
from fpscompile.html.svg_masks import COLOURS, mask_levels
from fpscompile.plan import ResolvedPlan
from fpscompile.schedule import Schedule
from fpscompile.windows import AnyWindow, shares

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_SEEN, _UNSEEN, _QUERY = 0.55, 0.0, 1.0
_INK, _GROUND = "#1b2027", "#eef0f4"


class MatplotlibMissingError(FpsError, ImportError):
    """A picture was asked for and matplotlib is not installed."""


def schedule_figure(schedule: Schedule, densities: Sequence[float]) -> Figure:
    """Density over denoising progress, one bar per phase, and the mean over all steps.

    Args:
        densities: kept fraction of query-key pairs, one per phase (``ResolvedPlan.densities``).

    Raises:
        ValueError: not one density per phase.
        MatplotlibMissingError: matplotlib is not installed.
    """
    phases = schedule.phases
    if len(densities) != len(phases):
        raise ValueError(f"{len(densities)} densities for the {len(phases)} phases of {schedule.name!r}: need one each")
    figure = _figure((7.0, 2.6))
    axes = figure.add_subplot()
    for index, (phase, density) in enumerate(zip(phases, densities, strict=True)):
        axes.bar(phase.start, density, phase.end - phase.start, align="edge", color=_colour(index), edgecolor="white")
        axes.annotate(
            f"{density:.2f}",
            ((phase.start + phase.end) / 2, density),
            xytext=(0, 3),
            textcoords="offset points",
            ha="center",
            fontweight="bold",
        )
    mean = sum(density * (phase.end - phase.start) for phase, density in zip(phases, densities, strict=True))
    axes.axhline(mean, color=_INK, linestyle="--", linewidth=1, label=f"mean {mean:.2f}")
    axes.set(xlim=(0, 1), ylim=(0, 1.15), xlabel="denoising progress", ylabel="density", yticks=(0, 0.5, 1))
    axes.set_xticks([0.0, *(phase.end for phase in phases)])
    axes.set_title(f"Schedule {schedule.name}", loc="left")
    axes.legend(loc="upper right", frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def mask_figure(resolved: ResolvedPlan) -> Figure:
    """The block mask of each phase side by side: query tiles down, key tiles across.

    Raises:
        MatplotlibMissingError: matplotlib is not installed.
    """
    count = len(resolved.windows)
    figure = _figure((3.2 * count, 3.6))
    rows, columns = resolved.q_layout.n_tiles, resolved.k_layout.n_tiles
    for index, (window, density) in enumerate(zip(resolved.windows, resolved.densities, strict=True)):
        axes = figure.add_subplot(1, count, index + 1)
        heads, clamp = resolved.heads, resolved.plan.clamp
        levels = mask_levels(resolved.q_layout, resolved.k_layout, window, heads=heads, clamp=clamp).numpy()
        axes.imshow(levels, cmap=_ramp(index), vmin=0, vmax=255, extent=(0, columns, rows, 0), interpolation="nearest")
        axes.set_title(f"phase {index}: density {density:.2f}\n{_title(window)}", fontsize=10, loc="left")
        axes.set_xlabel("key tile")
        if index == 0:
            axes.set_ylabel("query tile")
    return figure


def window_figure(resolved: ResolvedPlan, query: tuple[int, int, int] | None = None) -> Figure:
    """What one query tile sees: a row per phase, a panel per slice of tiles along t, cells are tiles in (h, w).

    Cells are paler where only some heads see a tile, or where content may choose it.

    Args:
        query: index of the query tile along (t, h, w); the middle one by default.

    Raises:
        ValueError: ``query`` is not a tile of the grid.
        MatplotlibMissingError: matplotlib is not installed.
    """
    n_t, n_h, n_w = counts = resolved.q_layout.counts
    query = query if query is not None else (n_t // 2, n_h // 2, n_w // 2)
    if not all(0 <= index < count for index, count in zip(query, counts, strict=True)):
        raise ValueError(f"query tile {query} is outside the {_times(counts)} tiles of grid {resolved.q_layout.grid}")
    from_phases = len(resolved.windows)
    size = 1.1
    figure = _figure((size * n_t + 0.8, (size * n_h / n_w + 0.55) * from_phases + 0.3))
    axes_grid = figure.subplots(from_phases, n_t, squeeze=False)
    for phase, window in enumerate(resolved.windows):
        seen = shares(window, resolved.q_layout, resolved.k_layout, resolved.heads, clamp=resolved.plan.clamp)
        row = (_UNSEEN + (_SEEN - _UNSEEN) * seen.view(counts * 2)[query]).tolist()
        for index in range(n_t):
            axes = axes_grid[phase][index]
            cells = row[index]
            if index == query[0]:
                cells[query[1]][query[2]] = _QUERY
            axes.pcolormesh(cells, cmap=_ramp(phase, dark=True), vmin=0, vmax=1, edgecolors="white", linewidth=0.6)
            axes.invert_yaxis()
            axes.set(aspect="equal", xticks=(), yticks=())
            axes.spines[:].set_visible(False)
            if phase == from_phases - 1:
                axes.set_xlabel(f"t = {index}", fontsize=9)
        axes_grid[phase][0].set_title(f"phase {phase}: {_title(window)}", fontsize=9, loc="left")
    return figure


def _title(window: AnyWindow) -> str:
    return f"window {_times(window)} tiles" if isinstance(window, tuple) else window.text


def _figure(size: tuple[float, float]) -> Figure:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MatplotlibMissingError(
            'pictures need matplotlib, which is not installed: pip install "fpscompile[examples]"'
        ) from error
    return Figure(figsize=size, layout="constrained")


def _ramp(phase: int, dark: bool = False) -> Any:
    """From the page's grey to the phase's colour; ``dark`` goes on to ink, the mark of the query tile."""
    from matplotlib.colors import LinearSegmentedColormap

    stops = [(_UNSEEN, _GROUND), (_SEEN, _colour(phase)), (_QUERY, _INK)] if dark else [_GROUND, _colour(phase)]
    return LinearSegmentedColormap.from_list(f"phase-{phase}", stops)


def _colour(phase: int) -> str:
    return COLOURS[phase % len(COLOURS)]


def _times(sizes: Sequence[int]) -> str:
    return "×".join(map(str, sizes))
