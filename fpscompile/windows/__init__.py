"""Which key tiles a query tile sees: window families behind one interface.

    window_of(spec)                                 what people and files write -> a window
    block_mask(windows, q_layout, k_layout, heads)  one static window per phase -> BlockMask
    density(window, q_layout, k_layout, heads)      kept fraction of the query-key pairs

A window is a :class:`~fpscompile.windows.base.Pattern`, or three ints for the sliding 3D tile window.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fpscompile.errors import UnsupportedError
from fpscompile.masks import BlockMask, product_mask, window_density, with_others
from fpscompile.tiling import TileLayout
from fpscompile.windows.base import Pattern, TileSets, View, tile_sets, walk, with_density
from fpscompile.windows.combine import Heads, Intersection, Union
from fpscompile.windows.families import (
    Dense,
    FirstFrame,
    Radial,
    Sliding,
    SpatialBand,
    TemporalBand,
    TextOnly,
    TopK,
)
from fpscompile.windows.spec import FAMILIES, AnyWindow, pattern_of, spec_of, window_of, window_text


def is_dynamic(window: AnyWindow) -> bool:
    """Whether content has a say: some part is a top-k."""
    return isinstance(window, Pattern) and any(isinstance(part, TopK) for part in walk(window))


def is_open(window: AnyWindow) -> bool:
    """Whether some part still needs a density."""
    return isinstance(window, Pattern) and any(part.open for part in walk(window))


def per_head(window: AnyWindow) -> bool:
    """Whether heads may differ."""
    return isinstance(window, Pattern) and any(isinstance(part, Heads) for part in walk(window))


def of_heads(window: AnyWindow, first: int, count: int, total: int) -> AnyWindow:
    """A window of ``total`` heads for ``count`` of them, from ``first`` on.

    Raises:
        OptionError: it names a head beyond ``total``.
    """
    if not isinstance(window, Pattern):
        return window
    if isinstance(window, Heads):
        window.check(total)
        return window.part(first, count)
    parts = (of_heads(part, first, count, total) for part in window.parts)
    return window.rebuilt(tuple(pattern_of(part) for part in parts))


def on_grid(window: AnyWindow, view: View) -> AnyWindow:
    """The window on one grid: three sizes, none beyond the grid, wherever it is a product of three axes.

    Raises:
        WindowError: the grid cannot give it.
        OptionError: it names heads that do not exist.
    """
    pattern = pattern_of(window)
    product = pattern.product(view)
    if product is not None:
        return product
    tile_sets(pattern, view)  # raises what is wrong with it where the user sees it
    return pattern


def sets_on_grid(window: AnyWindow, view: View) -> TileSets:
    """What each query tile sees, on video tiles."""
    if isinstance(window, Pattern):
        return tile_sets(window, view)
    return TileSets.static(product_mask(window, view.counts))


def block_mask(
    windows: Sequence[AnyWindow],
    q_layout: TileLayout,
    k_layout: TileLayout,
    heads: int | None = None,
    *,
    clamp: bool = False,
) -> BlockMask:
    """One static window per phase as a block mask [phases, 1 | heads, q_tiles, ...].

    Args:
        heads: query heads; needed where a window differs by head.
        clamp: as in :class:`~fpscompile.windows.base.View`.

    Raises:
        UnsupportedError: a window with a content-chosen part; those are made per call, by ``fpscompile.selection``.
    """
    view = View(q_layout, k_layout, heads, clamp)
    for window in windows:
        if is_dynamic(window):
            raise UnsupportedError(
                f"window {window_text(window)!r} is chosen by content when the model runs: it has no static block mask"
            )
    masks = [sets_on_grid(window, view).always for window in windows]
    most = max(mask.shape[0] for mask in masks)
    stacked = torch.stack([mask.expand(most, -1, -1) for mask in masks])
    return BlockMask.from_dense(with_others(q_layout, k_layout, stacked))


def density(
    window: AnyWindow, q_layout: TileLayout, k_layout: TileLayout, heads: int | None = None, *, clamp: bool = False
) -> float:
    """Kept fraction of all query-key pairs, other tokens included, the mean over heads.

    Exact for static windows. A content-chosen tile counts as the mean of those it is chosen from, which is exact where
    the grid divides into tiles.
    """
    if not isinstance(window, Pattern):
        return window_density(q_layout, k_layout, window)
    q_sizes, k_sizes = (
        layout.sizes()[layout.before_tiles : layout.before_tiles + layout.video_tiles].double()
        for layout in (q_layout, k_layout)
    )
    kept = q_sizes @ shares(window, q_layout, k_layout, heads, clamp=clamp) @ k_sizes
    pairs = q_layout.length * k_layout.length
    return float((kept + pairs - q_layout.video * k_layout.video) / pairs)


def shares(
    window: AnyWindow, q_layout: TileLayout, k_layout: TileLayout, heads: int | None = None, *, clamp: bool = False
) -> torch.Tensor:
    """float64 [N, N] over video tiles: how much of each pair is seen, the mean over heads.

    1 and 0 for static windows that all heads share; a tile that content may choose has its chance to be chosen.
    """
    sets = sets_on_grid(window, View(q_layout, k_layout, heads, clamp))
    rest = sets.eligible & ~sets.always
    number = rest.sum(-1, keepdim=True)
    chance = torch.minimum(number, sets.extra[:, None, None]).double() / number.clamp(min=1)
    return torch.where(rest, chance, sets.always.double()).mean(0)


__all__ = [
    "FAMILIES",
    "AnyWindow",
    "Dense",
    "FirstFrame",
    "Heads",
    "Intersection",
    "Pattern",
    "Radial",
    "Sliding",
    "SpatialBand",
    "TemporalBand",
    "TextOnly",
    "TileSets",
    "TopK",
    "Union",
    "View",
    "block_mask",
    "density",
    "is_dynamic",
    "is_open",
    "of_heads",
    "on_grid",
    "pattern_of",
    "per_head",
    "shares",
    "sets_on_grid",
    "spec_of",
    "with_density",
    "window_of",
    "window_text",
]
