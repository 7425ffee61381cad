"""The windows that a calibration chooses from, on one grid: few enough to measure all, different enough to matter."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch

from fpscompile.errors import WindowError
from fpscompile.masks import with_others
from fpscompile.tiling import TileLayout
from fpscompile.windows import (
    AnyWindow,
    Dense,
    FirstFrame,
    Pattern,
    Radial,
    Sliding,
    SpatialBand,
    TemporalBand,
    TextOnly,
    TileSets,
    View,
    density,
    is_dynamic,
    is_open,
    pattern_of,
    sets_on_grid,
    with_density,
)

LADDER = (1 / 16, 1 / 8, 3 / 16, 1 / 4, 3 / 8, 1 / 2, 5 / 8, 3 / 4, 7 / 8)
"""Densities at which a window that needs one is tried."""


@dataclass(frozen=True, eq=False)
class Candidates:
    """Windows that differ on a grid, the sparsest first; the last is dense."""

    windows: tuple[AnyWindow, ...]
    densities: tuple[float, ...]
    masks: torch.Tensor
    """bool [C, q_tiles, k_tiles], other tokens included: what is seen whatever the content."""
    chosen: dict[int, TileSets] = field(default_factory=dict)
    """By index, those whose tiles content chooses, on video tiles."""

    @property
    def dense(self) -> int:
        return len(self.windows) - 1


def candidates(
    q_layout: TileLayout, k_layout: TileLayout, extra: tuple[AnyWindow, ...] = (), beside: float = 0.0
) -> Candidates:
    """Products of short, middling and full axes; radial decay; and short ones united with a first-frame sink, or with
    one another. Of windows that keep the same tiles, the simplest stays.

    Args:
        extra: further windows; a plain family is found before them. One that needs a density, such as a top-k, stands
            for as many as :data:`LADDER` has densities that the grid can give.
        beside: what a window costs beside its own tiles, a density; one that then costs as much as dense is none.

    Raises:
        WindowError: an extra window that the grid cannot give.
    """
    view = View(q_layout, k_layout)
    n_t, n_h, n_w = view.counts
    made: list[AnyWindow] = [Dense()]
    made += [SpatialBand(frames) for frames in _widths(n_t)]
    made += [TemporalBand((h, w)) for h, w in zip(_widths(n_h), _widths(n_w), strict=False)]
    made += list(itertools.product(_widths(n_t), _widths(n_h), _widths(n_w)))
    made += [Radial(), Radial((max(1, n_h // 2), max(1, n_w // 2)))]
    short: list[Pattern] = [Sliding((1, 1, 1)), Sliding((3, 3, 3)), TemporalBand((1, 1)), SpatialBand(1)]
    made += [window | FirstFrame() for window in short]
    made += [SpatialBand(1) | TemporalBand((1, 1)), SpatialBand(1) | TemporalBand((3, 3))]
    if q_layout.length > q_layout.video:
        made.append(TextOnly())
    found: dict[tuple[bytes, ...], tuple[float, AnyWindow, torch.Tensor, TileSets]] = {}
    for window in (*made, *_with_densities(extra, view)):
        sets = sets_on_grid(window, view)
        mask = with_others(q_layout, k_layout, sets.always)[0]
        key: tuple[bytes, ...] = (mask.numpy().tobytes(),)
        if is_dynamic(window):
            key = (*key, sets.eligible.numpy().tobytes(), sets.extra.numpy().tobytes())
        elif not mask.any(-1).all():
            continue
        if key not in found:
            cost = density(window, q_layout, k_layout)
            if cost < 1.0:
                cost += beside
            if cost < 1.0 or isinstance(window, Dense):
                found[key] = (cost, window, mask, sets)
    ordered = sorted(found.values(), key=lambda item: (item[0], isinstance(item[1], Dense)))
    return Candidates(
        tuple(window for _, window, _, _ in ordered),
        tuple(value for value, _, _, _ in ordered),
        torch.stack([mask for _, _, mask, _ in ordered]),
        {index: sets for index, (_, window, _, sets) in enumerate(ordered) if is_dynamic(window)},
    )


def _with_densities(windows: tuple[AnyWindow, ...], view: View) -> Iterator[AnyWindow]:
    """``windows``, each open one replaced by itself at the densities that the grid can give."""
    for window in windows:
        if not is_open(window):
            yield window
            continue
        for value in LADDER:
            filled = with_density(pattern_of(window), value)
            with contextlib.suppress(WindowError):
                sets_on_grid(filled, view)
                yield filled


def _widths(count: int) -> list[int]:
    """At most four: all of a short axis; of a longer one 1, 3, the whole of it and, where that is long, about half."""
    if count <= 4:
        return list(range(1, count + 1))
    widths = {1, 3, count}
    if count >= 8:
        widths.add(count // 2 | 1)
    return sorted(widths)
