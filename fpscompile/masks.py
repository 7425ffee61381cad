"""Block masks: which key tiles each query tile attends to, per phase and head.

Every sparsity pattern becomes the same :class:`BlockMask`, so kernels know one interface. Masks are computed on
tiles, never on tokens: kilobytes, and milliseconds to build.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from fpscompile.errors import WindowError
from fpscompile.tiling import TileLayout

Window = tuple[int, int, int]


@dataclass(frozen=True, eq=False)
class BlockMask:
    """Key tiles listed for each query tile. A frozen contract: kernels, the reference and the tuner all read this.

    The unit on both sides is the tile of a :class:`~fpscompile.tiling.TileLayout`, other tokens included. A listed
    pair of tiles is visible in full: what is left to a kernel is only the ragged tail of a tile (slots past its
    size) and the key mask. The leading axis is the phase; the head axis has length 1 when all heads share a mask.
    """

    kv_num_blocks: torch.Tensor
    """int32 [phases, 1 | heads, q_tiles]: number of key tiles listed for each query tile."""
    kv_indices: torch.Tensor
    """int32 [phases, 1 | heads, q_tiles, capacity]: their indices in ascending order; entries past the count are 0."""

    @classmethod
    def from_dense(cls, visible: torch.Tensor) -> BlockMask:
        """From bool [phases, 1 | heads, q_tiles, k_tiles]: True where the key tile is seen."""
        counts = visible.sum(-1, dtype=torch.int32)
        capacity = max(int(counts.max()), 1)
        listed = torch.arange(capacity, device=visible.device) < counts[..., None]
        indices = torch.zeros(listed.shape, dtype=torch.int32, device=visible.device)
        # nonzero walks rows in order and each row upwards, as a boolean store does: no sort of the whole mask
        indices[listed] = visible.nonzero()[:, -1].to(torch.int32)
        return cls(counts, indices)

    def to_dense(self, k_tiles: int) -> torch.Tensor:
        """bool [phases, 1 | heads, q_tiles, k_tiles]: the inverse of :meth:`from_dense`."""
        capacity = self.kv_indices.shape[-1]
        listed = torch.arange(capacity, device=self.kv_indices.device) < self.kv_num_blocks[..., None]
        dense = torch.zeros(*self.kv_num_blocks.shape, k_tiles, dtype=torch.int32, device=listed.device)
        return dense.scatter_add_(-1, self.kv_indices.long(), listed.int()) > 0

    def transpose(self, k_tiles: int) -> BlockMask:
        """The query tiles that see each key tile: what a dk, dv kernel walks."""
        return BlockMask.from_dense(self.to_dense(k_tiles).mT.contiguous())

    def to(self, device: torch.device | str) -> BlockMask:
        return BlockMask(self.kv_num_blocks.to(device), self.kv_indices.to(device))


def window_start(index: int, width: int, count: int) -> int:
    """First key tile that query tile ``index`` sees on an axis of ``count`` tiles.

    Clamped at the borders: border tiles see as many key tiles as inner ones.
    """
    return min(max(index - width // 2, 0), max(count - width, 0))


def axis_window(width: int, count: int) -> list[tuple[int, int]]:
    """Half-open range of key tiles for each query tile of one axis."""
    return [(start := window_start(index, width, count), min(start + width, count)) for index in range(count)]


def window_mask(q_layout: TileLayout, k_layout: TileLayout, windows: Sequence[Window]) -> BlockMask:
    """Sliding 3D tile windows, one per phase: the product of three clamped 1-D windows.

    Tokens outside the video see everything and are seen by everything. Both layouts have the same video grid.
    """
    video = torch.stack([product_mask(window, q_layout.counts) for window in windows])[:, None]
    return BlockMask.from_dense(with_others(q_layout, k_layout, video))


def axis_mask(width: int, count: int) -> torch.Tensor:
    """bool [count, count]: the key tiles of one axis that each query tile sees."""
    mask = torch.zeros(count, count, dtype=torch.bool)
    for index, (start, stop) in enumerate(axis_window(width, count)):
        mask[index, start:stop] = True
    return mask


def product_mask(window: Window, counts: tuple[int, int, int]) -> torch.Tensor:
    """bool [video tiles, video tiles] of a sliding 3D window."""
    t, h, w = (axis_mask(width, count) for width, count in zip(window, counts, strict=True))
    seen = t[:, None, None, :, None, None] & h[:, None, None, :, None] & w[:, None, None, :]
    return seen.reshape(math.prod(counts), math.prod(counts))


def with_others(q_layout: TileLayout, k_layout: TileLayout, video: torch.Tensor) -> torch.Tensor:
    """bool [..., q_tiles, k_tiles] from [..., video tiles, video tiles]: other tokens see all, all see them."""
    dense = torch.ones(*video.shape[:-2], q_layout.n_tiles, k_layout.n_tiles, dtype=torch.bool, device=video.device)
    n, q0, k0 = q_layout.video_tiles, q_layout.before_tiles, k_layout.before_tiles
    dense[..., q0 : q0 + n, k0 : k0 + n] = video
    return dense


def expand_mask(mask: BlockMask, q_layout: TileLayout, k_layout: TileLayout) -> torch.Tensor:
    """bool [phases, 1 | heads, Lq, Lk] in sequence order: for tests and pictures; never used by a kernel."""
    dense = mask.to_dense(k_layout.n_tiles)
    q_tile, k_tile = _tile_of_token(q_layout), _tile_of_token(k_layout)
    return dense[..., q_tile, :][..., k_tile]


def _tile_of_token(layout: TileLayout) -> torch.Tensor:
    tiles = torch.repeat_interleave(torch.arange(layout.n_tiles), layout.sizes())
    return torch.empty_like(tiles).scatter_(0, layout.order(), tiles)


def mask_density(mask: BlockMask, q_layout: TileLayout, k_layout: TileLayout) -> list[float]:
    """Kept fraction of all query-key pairs, other tokens included, for each phase (mean over heads)."""
    dense = mask.to_dense(k_layout.n_tiles).double()
    kept = torch.einsum("phqk,q,k->ph", dense, q_layout.sizes().double(), k_layout.sizes().double())
    return [float(value) for value in kept.mean(1) / (q_layout.length * k_layout.length)]


def window_density(q_layout: TileLayout, k_layout: TileLayout, window: Window) -> float:
    """:func:`mask_density` of one window in closed form: a product over the axes."""
    video = math.prod(_axis_pairs(q_layout.axis_sizes(axis), width) for axis, width in enumerate(window))
    others = q_layout.length * k_layout.length - q_layout.video * k_layout.video
    return (video + others) / (q_layout.length * k_layout.length)


@functools.lru_cache(maxsize=4096)
def _axis_pairs(sizes: tuple[int, ...], width: int) -> int:
    """Kept pairs of coordinates along one axis."""
    return sum(
        sizes[index] * sum(sizes[start:stop]) for index, (start, stop) in enumerate(axis_window(width, len(sizes)))
    )


def apart(window: Window, counts: Window) -> list[int]:
    """The axes along which no query tile sees another tile, though there are several: attention never crosses them.

    >>> apart((6, 6, 1), (6, 6, 10))
    [2]
    """
    return [axis for axis, (width, count) in enumerate(zip(window, counts, strict=True)) if width == 1 < count]


def window_for_density(q_layout: TileLayout, k_layout: TileLayout, density: float, *, clamp: bool = False) -> Window:
    """The window of largest density not above ``density``; of equals, the one most alike in all axes.

    A window of one tile along an axis that has several lets no layer attend across that axis: strips of the video would
    never learn of one another. Such windows are taken only where no other fits.

    Args:
        clamp: take the smallest window when even that is above ``density``, instead of raising.

    Raises:
        WindowError: the density is below the floor, which the message names.
    """
    counts = q_layout.counts
    windows: Iterator[Window] = itertools.product(*(range(1, count + 1) for count in counts))  # type: ignore[assignment]
    candidates = [
        (window_density(q_layout, k_layout, window), min(w / n for w, n in zip(window, counts, strict=True)), window)
        for window in windows
    ]
    feasible = [candidate for candidate in candidates if candidate[0] <= density + 1e-12]
    if feasible:
        return max([c for c in feasible if not apart(c[2], counts)] or feasible)[2]
    floor, _, smallest = min(candidates)
    if clamp:
        return smallest
    raise WindowError(
        f"density={density} is below the floor {floor:.4f} of grid {q_layout.grid} with tile {q_layout.tile}"
        f"{f' and {k_layout.length - k_layout.video} other tokens' if k_layout.length > k_layout.video else ''}: "
        "ask for at least the floor, or choose a smaller tile"
    )
