"""Where the generated C++ kernels find and put tokens: tables of int64 that depend on a layout only.

A *slot* is the place of a token in a packed copy; tiles follow one another in it, each from a multiple of
:data:`~fpscompile.render.LANES`.
"""

from __future__ import annotations

import functools

import torch

from fpscompile.render import LANES
from fpscompile.tiling import TileLayout


class SlotTable:
    """Where each tile of a layout lies in a packed copy."""

    def __init__(self, layout: TileLayout, panel: int) -> None:
        sizes = layout.sizes()
        self.first = torch.cat([torch.zeros(1, dtype=torch.int64), sizes.cumsum(0)])
        """int64 [tiles + 1]: first token, in tile order."""
        starts, at = [], 0
        for size in sizes.tolist():
            slots = -(-size // LANES) * LANES
            if slots >= panel:  # whole panels: every product is as wide as it can be
                at = -(-at // panel) * panel
            starts.append(at)
            at += slots
        self.slot = torch.tensor(starts, dtype=torch.int64)
        """int64 [tiles]: first slot. Tiles shorter than a panel lie back to back, so that neighbours make one run."""
        self.slots = -(-at // panel) * panel
        """Slots in all, a multiple of the panel."""


@functools.lru_cache(maxsize=128)
def slot_table(layout: TileLayout, panel: int) -> SlotTable:
    """The slots of ``layout``, in panels of so many."""
    return SlotTable(layout, panel)


@functools.lru_cache(maxsize=128)
def row_blocks(layout: TileLayout, block_m: int) -> torch.Tensor:
    """int64 [blocks, 3]: tile, first token in tile order, rows (at most ``block_m``)."""
    blocks, first = [], 0
    for tile, size in enumerate(layout.sizes().tolist()):
        blocks += [(tile, first + start, min(block_m, size - start)) for start in range(0, size, block_m)]
        first += size
    return torch.tensor(blocks, dtype=torch.int64)
