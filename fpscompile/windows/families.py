"""The families, a few lines each. Distances and sizes are counted in tiles.

Windows along an axis are clamped at its ends as those of :func:`fpscompile.masks.window_start`: border tiles see as
many tiles as inner ones, and a width beyond the axis sees all of it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch

from fpscompile.errors import WindowError
from fpscompile.masks import Window, axis_mask, product_mask, window_for_density
from fpscompile.windows.base import Pattern, TileSets, View
from fpscompile.windows.checks import check_count, check_density, check_pair, check_window, real, tensor_given


@dataclass(frozen=True)
class _Product(Pattern):
    """A family that is a sliding 3D window once the grid is known: dense attention per box can compute it."""

    def seen(self, view: View) -> torch.Tensor:
        window = self.product(view)
        assert window is not None
        return product_mask(window, view.counts)


@dataclass(frozen=True)
class Dense(_Product):
    """Everything."""

    family: ClassVar[str] = "dense"

    def product(self, view: View) -> Window:
        return view.counts


@dataclass(frozen=True)
class Sliding(_Product):
    """The sliding 3D tile window: nearest ``size`` tiles along (t, h, w), or the largest within a density."""

    family: ClassVar[str] = "sliding"
    size: Window | None = None
    """Key tiles seen along (t, h, w)."""
    density: float | None = None
    """Upper bound on the kept fraction of query-key pairs, in place of a size."""

    def __post_init__(self) -> None:
        if self.size is not None and self.density is not None:
            raise WindowError(f"a sliding window has a size or a density, not both: {self.size} and {self.density}")
        if self.size is not None:
            object.__setattr__(self, "size", check_window(self.size))
        if self.density is not None:
            object.__setattr__(self, "density", check_density(self.density))

    def product(self, view: View) -> Window:
        if self.size is None:
            assert self.density is not None
            return window_for_density(view.q_layout, view.k_layout, self.density, clamp=view.clamp)
        t, h, w = (min(size, count) for size, count in zip(self.size, view.counts, strict=True))
        return (t, h, w)

    @property
    def open(self) -> bool:
        return self.size is None and self.density is None

    def filled(self, density: float) -> Sliding:
        return Sliding(density=density)


@dataclass(frozen=True)
class SpatialBand(_Product):
    """All of space in the nearest ``frames`` tile slices along t: what heads that work within a frame need."""

    family: ClassVar[str] = "spatial"
    frames: int = 1

    def __post_init__(self) -> None:
        object.__setattr__(self, "frames", check_count("frames", self.frames))

    def product(self, view: View) -> Window:
        t, h, w = view.counts
        return (min(self.frames, t), h, w)


@dataclass(frozen=True)
class TemporalBand(_Product):
    """All times at the nearest ``size`` positions along (h, w): what heads that follow a place need."""

    family: ClassVar[str] = "temporal"
    size: tuple[int, int] = (1, 1)

    def __post_init__(self) -> None:
        object.__setattr__(self, "size", check_pair("size", self.size))

    def product(self, view: View) -> Window:
        t, h, w = view.counts
        return (t, min(self.size[0], h), min(self.size[1], w))


@dataclass(frozen=True)
class Radial(Pattern):
    """Space narrows with temporal distance, after Radial Attention (arXiv 2506.19852).

    At a distance of ``d`` tiles along t, a query tile sees the nearest ``ceil(size * decay**floor(log2(max(d, 1))))``
    tiles along h and along w: full extent at distances 0 and 1, ``decay`` times that at 2 and 3, again at 4 to 7, and
    so on; at least the tile at its own position. ``decay=0.5`` halves the extent per doubling, ``0.7071`` the area.
    """

    family: ClassVar[str] = "radial"
    size: tuple[int, int] | None = None
    """Extent along (h, w) at distances 0 and 1; None means all."""
    decay: float = 0.5
    """Factor on the extent per doubling of the distance, in (0, 1]."""

    def __post_init__(self) -> None:
        if self.size is not None:
            object.__setattr__(self, "size", check_pair("size", self.size))
        decay = real(self.decay)
        if decay is None or not 0.0 < decay <= 1.0:
            wrong = f"decay={self.decay!r} must be a number in (0, 1]: the factor per doubling of the distance"
            raise WindowError(tensor_given("decay", self.decay) or wrong)
        object.__setattr__(self, "decay", decay)

    def extent(self, distance: int, count: int, size: int | None) -> int:
        """Tiles seen along one spatial axis of ``count`` tiles at a temporal distance."""
        doublings = max(distance, 1).bit_length() - 1
        full = count if size is None else min(size, count)
        return max(1, math.ceil(full * self.decay**doublings - 1e-9))

    def seen(self, view: View) -> torch.Tensor:
        n_t, n_h, n_w = view.counts
        h, w = self.size or (None, None)
        planes = []
        for distance in range(n_t):
            rows = axis_mask(self.extent(distance, n_h, h), n_h)
            columns = axis_mask(self.extent(distance, n_w, w), n_w)
            planes.append(rows[:, None, :, None] & columns[:, None, :])
        t = torch.arange(n_t)
        # [t, t', h, w, h', w'] -> [t, h, w, t', h', w']
        by_distance = torch.stack(planes)[(t[:, None] - t).abs()]
        return by_distance.permute(0, 2, 3, 1, 4, 5).reshape(view.tiles, view.tiles)


@dataclass(frozen=True)
class FirstFrame(Pattern):
    """The sink: the first ``frames`` tile slices along t are seen from everywhere. Meant for unions."""

    family: ClassVar[str] = "sink"
    frames: int = 1

    def __post_init__(self) -> None:
        object.__setattr__(self, "frames", check_count("frames", self.frames))

    def seen(self, view: View) -> torch.Tensor:
        n_t, n_h, n_w = view.counts
        keys = torch.arange(view.tiles) < min(self.frames, n_t) * n_h * n_w
        return keys.expand(view.tiles, view.tiles).clone()


@dataclass(frozen=True)
class TextOnly(Pattern):
    """Nothing of the video: only the other tokens, which every family sees. For heads that read the text."""

    family: ClassVar[str] = "text"

    def seen(self, view: View) -> torch.Tensor:
        return torch.zeros(view.tiles, view.tiles, dtype=torch.bool)


@dataclass(frozen=True)
class TopK(Pattern):
    """Key tiles chosen by content: those whose mean key has the largest product with the tile's mean query.

    Chosen for each sample, head and query tile when the model runs (:mod:`fpscompile.selection`); of equal scores the
    lower index wins.
    """

    family: ClassVar[str] = "topk"
    density: float | None = None
    """Upper bound on the kept fraction of query-key pairs, other tokens included, if all tiles were equally large."""
    tiles: int | None = None
    """Key tiles per query tile, in place of a density."""

    def __post_init__(self) -> None:
        if self.density is not None and self.tiles is not None:
            raise WindowError(f"a top-k has a density or tiles, not both: {self.density} and {self.tiles}")
        if self.density is not None:
            object.__setattr__(self, "density", check_density(self.density))
        if self.tiles is not None:
            object.__setattr__(self, "tiles", check_count("tiles", self.tiles))

    def sets(self, view: View) -> TileSets:
        everything = torch.ones(1, view.tiles, view.tiles, dtype=torch.bool)
        return TileSets(~everything, everything, torch.tensor([self.count(view)]))

    def count(self, view: View) -> int:
        """Key tiles that each query tile chooses.

        Raises:
            WindowError: not even one tile fits the density, unless the view clamps.
        """
        if self.tiles is not None:
            return min(self.tiles, view.tiles)
        assert self.density is not None
        pairs = view.q_layout.length * view.k_layout.length
        per_tile = view.q_layout.video * view.k_layout.video / view.tiles
        count = math.floor((self.density * pairs - view.others) / per_tile + 1e-9)
        if count < 1 and not view.clamp:
            raise WindowError(
                f"density={self.density} leaves no tile to choose on grid {view.q_layout.grid} with tile "
                f"{view.q_layout.tile}: one tile alone is {(per_tile + view.others) / pairs:.4f}; ask for at least "
                "that, or choose a smaller tile"
            )
        return min(max(count, 1), view.tiles)

    @property
    def open(self) -> bool:
        return self.density is None and self.tiles is None

    def filled(self, density: float) -> TopK:
        return TopK(density=density)

    @property
    def text(self) -> str:
        size = f"{self.density:g}" if self.density is not None else f"{self.tiles} tiles" if self.tiles else ""
        return f"topk {size}".strip()
