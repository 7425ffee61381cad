"""What GPU kernels read besides the operands: token tables and lists of key units, as int32 tensors on the device.

A *unit* is the run of slots that one list entry names: a whole tile where tiles are no longer than a block of keys,
otherwise one block of a tile. Units that hold no token are never listed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field

import torch

from fpscompile.kept import kept, outside_graphs
from fpscompile.kernel_spec import tile_slots
from fpscompile.masks import BlockMask
from fpscompile.plan import ResolvedPlan
from fpscompile.tiling import TileLayout

CACHED = 256
"""Resolved plans whose tables stay on their device; the least recently used goes first."""


@dataclass(frozen=True, eq=False)
class Units:
    """For each tile of one side, the units of the other side that it meets."""

    count: torch.Tensor
    """int32 [phases, 1 | heads, tiles]."""
    index: torch.Tensor
    """int32 [phases, 1 | heads, tiles, capacity]: ascending; entries past the count are 0."""
    valid: torch.Tensor
    """int32 [units]: tokens in each unit; they are its first slots."""
    padding: int
    """Most slots without a token that a unit with tokens has."""


@dataclass(frozen=True, eq=False)
class Tables:
    """The tables of one resolved plan on one device."""

    slots: int
    """Slots of a tile, on both sides."""
    unit: int
    """Slots of a unit, on both sides."""
    q_token: torch.Tensor
    """int32 [q_tiles * slots]: sequence index of the query in each slot, -1 for padding."""
    k_token: torch.Tensor
    """int32 [k_tiles * slots]: the same for keys."""
    keys: Units
    """The key units of each query tile: what the forward and dq walk."""
    queries: Units
    """The query units of each key tile: what dk and dv walk."""
    q_tiles: torch.Tensor
    """int64 [q_tiles, 2] on the CPU: (tile, tokens), in the order in which programs take them, the busiest first."""
    k_tiles: torch.Tensor
    """The same for keys."""
    lasting: bool = True
    """Whether they outlive the call that they were made for."""
    _kept: dict[Hashable, torch.Tensor] = field(default_factory=dict, repr=False)

    def keep(self, key: Hashable, make: Callable[[], torch.Tensor]) -> torch.Tensor:
        """What ``make`` returned for ``key`` the first time, on the tables' device; kept as long as they are."""
        if key not in self._kept:
            self._kept[key] = outside_graphs(self.q_token.device, make) if self.lasting else make()
        return self._kept[key]

    @property
    def q_slots(self) -> int:
        return self.q_token.numel()

    @property
    def k_slots(self) -> int:
        return self.k_token.numel()

    def query_blocks(self, rows: int, *, whole_units: bool = False) -> torch.Tensor:
        """int32 [n, 3]: (tile, first slot of the sequence, tokens) of every block of ``rows`` rows with a token.

        Args:
            whole_units: all blocks of a unit if one of them has a token.
        """
        return self._row_blocks("q", self.q_tiles, rows, max(self.unit, rows) if whole_units else rows)

    def key_blocks(self, rows: int) -> torch.Tensor:
        """The same for keys."""
        return self._row_blocks("k", self.k_tiles, rows, rows)

    def _row_blocks(self, side: str, tiles: torch.Tensor, rows: int, unit: int) -> torch.Tensor:
        def make() -> torch.Tensor:
            tile, size = tiles.unbind(1)
            slots = -(-size // unit) * unit
            each = -(-slots // rows)
            start = (torch.arange(int(each.sum())) - (each.cumsum(0) - each).repeat_interleave(each)) * rows
            tile, size = tile.repeat_interleave(each), size.repeat_interleave(each)
            blocks = torch.stack((tile, tile * self.slots + start, (size - start).clamp(0, rows)), 1)
            return blocks.to(torch.int32).to(self.q_token.device)

        return self.keep((side, rows, unit), make)


def in_slots(x: torch.Tensor, token: torch.Tensor, fill: float) -> torch.Tensor:
    """[..., L] in slot order, contiguous; ``fill`` where ``token``, a table of :class:`Tables`, has padding."""
    return x.index_select(-1, token.clamp(min=0)).masked_fill_(token < 0, fill)


def of_tokens(x: torch.Tensor, token: torch.Tensor, length: int) -> torch.Tensor:
    """[..., slots] in the order of the sequence: the inverse of :func:`in_slots`, [..., length]."""
    place = torch.where(token < 0, length, token).long()  # padding goes behind the last
    return x.new_empty(*x.shape[:-1], length + 1).index_copy_(-1, place, x)[..., :length]


def tables_of(resolved: ResolvedPlan, device: torch.device, block_mask: BlockMask | None = None) -> Tables:
    """The tables of ``resolved`` on ``device``; cached unless ``block_mask`` takes the place of the plan's."""
    if block_mask is not None:
        return dataclasses.replace(_tables(resolved, block_mask, device), lasting=False)
    return _tables_of_plan(resolved, device)


@kept(CACHED)
def _tables_of_plan(resolved: ResolvedPlan, device: torch.device) -> Tables:
    return _tables(resolved, resolved.block_mask, device)


def _tables(resolved: ResolvedPlan, mask: BlockMask, device: torch.device) -> Tables:
    q_layout, k_layout, block = resolved.q_layout, resolved.k_layout, resolved.plan.block_n
    slots = tile_slots(resolved.plan.tile, block)
    unit = min(slots, block)
    visible = mask.to("cpu").to_dense(k_layout.n_tiles)
    return Tables(
        slots=slots,
        unit=unit,
        q_token=q_layout.slots(slots).flatten().to(device, torch.int32),
        k_token=k_layout.slots(slots).flatten().to(device, torch.int32),
        keys=_units(visible, k_layout, slots, unit, device),
        queries=_units(visible.mT, q_layout, slots, unit, device),
        q_tiles=_busiest_first(visible, q_layout),
        k_tiles=_busiest_first(visible.mT, k_layout),
    )


def _busiest_first(visible: torch.Tensor, layout: TileLayout) -> torch.Tensor:
    """int64 [tiles, 2]: (tile, tokens); equally busy tiles stay in order, neighbours beside each other.

    A tile of text meets every other tile. Were it a launch's last, one multiprocessor would work on it alone.
    """
    order = visible.sum(-1).sum((0, 1)).argsort(descending=True, stable=True)
    return torch.stack((order, layout.sizes()[order]), 1)


def _units(visible: torch.Tensor, layout: TileLayout, slots: int, unit: int, device: torch.device) -> Units:
    """From bool [phases, 1 | heads, tiles, tiles of ``layout``]."""
    per_tile = slots // unit
    start = torch.arange(per_tile) * unit
    valid = (layout.sizes()[:, None] - start).clamp(0, unit).flatten()
    listed = visible.repeat_interleave(per_tile, dim=-1) & (valid > 0)
    lists = BlockMask.from_dense(listed)
    return Units(
        count=lists.kv_num_blocks.to(device),
        index=lists.kv_indices.to(device),
        valid=valid.to(device, torch.int32),
        padding=int((unit - valid[valid > 0]).max()) if bool((valid > 0).any()) else 0,
    )
