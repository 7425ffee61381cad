"""The 3D tile: how a sequence of tokens is cut into the unit of quantization and of sparsity.

A sequence is ``before`` other tokens (text, say), then the video's ``T*H*W`` tokens in row-major (t, h, w)
order, then ``after`` other tokens. Its *tiles*, in order, are

1. the ``before`` tokens, cut into runs of one tile volume (the last run may be short),
2. the video's 3D tiles in row-major order of the tile grid; border tiles are clipped, not padded,
3. the ``after`` tokens, cut like the first.

*Tile order* lists the tokens tile after tile, row-major inside each tile. Kernels give every tile the same number
of *slots*; the tokens come first and the padding sits at the tile's tail, so validity is ``slot < size``.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch

from fpscompile.errors import GridError, OptionError

Grid = tuple[int, int, int]


@dataclass(frozen=True)
class TileLayout:
    """Tiles of one token sequence. Hashable; tables are computed on first use and shared, never written to."""

    grid: Grid
    """Video tokens along (t, h, w)."""
    tile: Grid
    """Tokens of a full tile along (t, h, w)."""
    before: int = 0
    """Other tokens ahead of the video."""
    after: int = 0
    """Other tokens behind it."""

    def __post_init__(self) -> None:
        if len(self.grid) != 3 or min(self.grid) < 1:
            raise GridError(f"grid {self.grid} must be three sizes >= 1: video tokens along (t, h, w)")
        if len(self.tile) != 3 or min(self.tile) < 1:
            raise OptionError(f"tile={self.tile} must be three sizes >= 1: tokens along (t, h, w)")
        if self.before < 0 or self.after < 0:
            raise GridError(f"the sequence is shorter than the grid {self.grid} needs")

    @property
    def video(self) -> int:
        """Number of video tokens."""
        return math.prod(self.grid)

    @property
    def length(self) -> int:
        """Number of tokens."""
        return self.before + self.video + self.after

    @property
    def volume(self) -> int:
        """Tokens of a full tile."""
        return math.prod(self.tile)

    @property
    def counts(self) -> Grid:
        """Video tiles along (t, h, w)."""
        t, h, w = (-(-size // tile) for size, tile in zip(self.grid, self.tile, strict=True))
        return (t, h, w)

    @property
    def before_tiles(self) -> int:
        return -(-self.before // self.volume)

    @property
    def video_tiles(self) -> int:
        return math.prod(self.counts)

    @property
    def after_tiles(self) -> int:
        return -(-self.after // self.volume)

    @property
    def n_tiles(self) -> int:
        return self.before_tiles + self.video_tiles + self.after_tiles

    def axis_sizes(self, axis: int) -> tuple[int, ...]:
        """Tokens of each tile along one axis; only the last may be short."""
        size, tile = self.grid[axis], self.tile[axis]
        return tuple(min(tile, size - start) for start in range(0, size, tile))

    def sizes(self) -> torch.Tensor:
        """int64 [n_tiles]: tokens in each tile."""
        return _tables(self)[1]

    def order(self) -> torch.Tensor:
        """int64 [length]: sequence index of each token, in tile order."""
        return _tables(self)[0]

    def slots(self, tile_slots: int) -> torch.Tensor:
        """int64 [n_tiles, tile_slots]: sequence index of the token in each slot, -1 for padding."""
        return _slots(self, tile_slots)


@functools.lru_cache(maxsize=256)
def _tables(layout: TileLayout) -> tuple[torch.Tensor, torch.Tensor]:
    """(order, sizes) of a layout: a stable sort of the tokens by the tile that holds them."""
    volume = layout.volume
    axes = [torch.arange(size) // tile for size, tile in zip(layout.grid, layout.tile, strict=True)]
    _, n_h, n_w = layout.counts
    video = (axes[0][:, None, None] * n_h + axes[1][:, None]) * n_w + axes[2]
    tile_of = torch.cat(
        [
            torch.arange(layout.before) // volume,
            video.flatten() + layout.before_tiles,
            torch.arange(layout.after) // volume + layout.before_tiles + layout.video_tiles,
        ]
    )
    return torch.argsort(tile_of, stable=True), torch.bincount(tile_of, minlength=layout.n_tiles)


@functools.lru_cache(maxsize=256)
def _slots(layout: TileLayout, tile_slots: int) -> torch.Tensor:
    order, sizes = _tables(layout)
    if tile_slots < int(sizes.max()):
        raise OptionError(f"tile_slots={tile_slots} is smaller than the largest tile, {int(sizes.max())} tokens")
    slot = torch.arange(tile_slots)
    index = (sizes.cumsum(0) - sizes)[:, None] + slot
    return torch.where(slot < sizes[:, None], order[index.clamp(max=layout.length - 1)], -1)
