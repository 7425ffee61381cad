"""The windows that a calibration chooses from, on one grid: few enough to measure all, different enough to matter."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

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
    View,
    density,
    sets_on_grid,
)


@dataclass(frozen=True, eq=False)
class Candidates:
    """Windows that differ on a grid, the sparsest first; the last is dense."""

    windows: tuple[AnyWindow, ...]
    densities: tuple[float, ...]
    masks: torch.Tensor
    """bool [C, q_tiles, k_tiles], other tokens included."""

    @property
    def dense(self) -> int:
        return len(self.windows) - 1


def candidates(q_layout: TileLayout, k_layout: TileLayout, extra: tuple[AnyWindow, ...] = ()) -> Candidates:
    """Products of short, middling and full axes; radial decay; and short ones united with a first-frame sink, or with
    one another. Of windows that keep the same tiles, the simplest stays.

    Args:
        extra: further windows; a plain family is found before them.
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
    found: dict[bytes, tuple[float, AnyWindow, torch.Tensor]] = {}
    for window in (*made, *extra):
        try:
            mask = with_others(q_layout, k_layout, sets_on_grid(window, view).always)[0]
        except WindowError:
            continue
        key = mask.numpy().tobytes()
        if key not in found and mask.any(-1).all():
            found[key] = (density(window, q_layout, k_layout), window, mask)
    ordered = sorted(found.values(), key=lambda item: item[0])
    return Candidates(
        tuple(window for _, window, _ in ordered),
        tuple(value for value, _, _ in ordered),
        torch.stack([mask for _, _, mask in ordered]),
    )


def _widths(count: int) -> list[int]:
    """1, 3, and the whole axis; on a long axis also about half of it."""
    widths = {1, min(3, count), count}
    if count >= 8:
        widths.add(count // 2 | 1)
    return sorted(widths)
