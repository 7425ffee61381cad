"""``fps::select_tiles``: the tiles that content chooses, as an op of the compiled graph.

    fps::select_tiles(Tensor query, Tensor key, Tensor? key_mask, Tensor phase, SymInt[] grid, Tensor? published_grid,
                      SymInt[] query_span, SymInt[] key_span, float? scale, str plan, SymInt capacity) -> Tensor

The arguments are those of ``fps::attention``, and ``capacity``, an upper bound on the number of video tiles ``N``.

    score[i, j] = sign(scale) * mean of the queries in tile i . mean of the keys in tile j        (float32)

Every query tile sees what its window always shows, and the ``extra`` eligible tiles of the largest scores; of equal
scores, or of scores that are not numbers, the lower index wins. Keys that the key mask hides do not count; a tile
without any other key comes last. See :class:`fpscompile.windows.base.TileSets`.

The result is uint8 [B, H, capacity * ceil(capacity / 8)]: a bit per (query tile, key tile), row by row, each row
padded to whole bytes; what ``N`` does not need is zero. ``fps::attention`` and its backward read this one tensor, so
both see the same tiles even where a compiler computes q and k anew for the backward. Nothing here waits for the
device, and no shape depends on the content.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch

from fpscompile.errors import GridError, UnsupportedError
from fpscompile.kept import kept
from fpscompile.masks import BlockMask, with_others
from fpscompile.plan import ResolvedPlan
from fpscompile.tiling import TileLayout
from fpscompile.windows.base import TileSets


def packed_bytes(capacity: Any) -> Any:
    """Bytes per head of a selection; an int, or a size that is not known yet."""
    return capacity * ((capacity + 7) // 8)


@torch.no_grad()
def select(
    q: torch.Tensor,
    k: torch.Tensor,
    *,
    phase: torch.Tensor | Sequence[int],
    resolved: ResolvedPlan,
    key_mask: torch.Tensor | None = None,
    scale: float | None = None,
) -> torch.Tensor:
    """bool [B, H, N, N]: the video key tiles (columns) that each video query tile (rows) sees.

    Args:
        q: [B, H, Lq, D], any strides.
        k: [B, Hk, Lk, D]; query head h reads key head h // (H // Hk).
        phase: n phase indices, B a multiple of n; a tensor is read on its device and clamped into range.
        resolved: the plan; static phases give their static tiles.
        key_mask: None or [B | 1, H | 1, 1, Lk]: bool (True keeps), or added to the scores, where -inf hides.
        scale: only its sign matters.
    """
    batch, heads = q.shape[:2]
    always, eligible, extra = _sets(resolved, q.device)
    phase = phase_of_each(phase, batch, len(resolved.windows), q.device)
    always, eligible, extra = always[phase], eligible[phase], extra[phase]  # [B, 1 | H, ...]
    most = _most(resolved)
    if most == 0:
        return always.expand(batch, heads, -1, -1)
    scores = tile_scores(q, k, resolved.q_layout, resolved.k_layout, key_mask, scale)
    return _chosen(scores, always, eligible, extra, most)


def phase_of_each(phase: torch.Tensor | Sequence[int], batch: int, count: int, device: torch.device) -> torch.Tensor:
    """int64 [B]: the phase of each batch element, from one for each run of equally many; clamped to the ``count`` there
    are, without waiting for the device."""
    given = torch.as_tensor(phase, device=device, dtype=torch.int64).reshape(-1).clamp(0, count - 1)
    return given.repeat_interleave(batch // given.numel())


def tile_scores(
    q: torch.Tensor,
    k: torch.Tensor,
    q_layout: TileLayout,
    k_layout: TileLayout,
    key_mask: torch.Tensor | None = None,
    scale: float | None = None,
) -> torch.Tensor:
    """[B, H, N, N], finite: how much each query tile wants each key tile, by the rule above; arguments as of
    :func:`select`."""
    queries = tile_means(q, q_layout)
    keys, empty = _key_means(k, k_layout, key_mask, q.shape[1])
    if scale is not None and scale < 0:
        queries = -queries
    scores = queries @ keys.mT
    lowest = torch.finfo(scores.dtype).min
    scores = torch.where(scores.isnan(), lowest, scores).clamp_(min=lowest)
    return scores if empty is None else scores.masked_fill_(empty[:, :, None], lowest)


def choose_tiles(scores: torch.Tensor, sets: TileSets) -> torch.Tensor:
    """bool [H, n, N]: what ``n`` query tiles see, from their scores [H, n, N] and the same rows of the sets."""
    return _chosen(scores.clone(), sets.always, sets.eligible, sets.extra, int(sets.extra.max()))


def _chosen(
    scores: torch.Tensor, always: torch.Tensor, eligible: torch.Tensor, extra: torch.Tensor, most: int
) -> torch.Tensor:
    """The tiles that are always seen, and the ``extra`` open ones of the largest scores, which are overwritten."""
    open_tiles = eligible & ~always
    scores = scores.masked_fill_(~open_tiles, float("-inf"))
    # Stable: equal scores stay in ascending order of the index.
    order = scores.sort(dim=-1, descending=True, stable=True).indices[..., :most]
    taken = torch.arange(most, device=scores.device) < extra[..., None, None]
    chosen = torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, order, taken.expand_as(order))
    return always | (chosen & open_tiles)


def tile_means(x: torch.Tensor, layout: TileLayout, weights: torch.Tensor | None = None) -> torch.Tensor:
    """[B, H, N, D] float32 (float64 for float64): the mean of the video's tokens in each tile.

    Args:
        x: [B, H, L, D].
        weights: [B | 1, H | 1, L], how much each token counts; a tile whose tokens all weigh nothing gives 0.
    """
    if weights is None:
        return _tile_sums(x, layout) / tile_sizes(layout, x.device)[:, None]
    total = _tile_sums(weights[..., None], layout)
    # What weighs nothing may be anything, NaN too.
    weighed = (x * weights[..., None].to(x.dtype)).masked_fill(weights[..., None] == 0, 0.0)
    sums = _tile_sums(weighed, layout)
    return sums / total.masked_fill(total == 0, 1.0)


def _tile_sums(x: torch.Tensor, layout: TileLayout) -> torch.Tensor:
    """[B, H, N, D]. Axis by axis: the first pass reads every token once, the others next to nothing.

    A wider dtype would copy all tokens ahead of the first pass, which is where the time goes: bfloat16 gives bfloat16
    sums along h, and everything after is float32.
    """
    if x.dtype == torch.float16:
        x = x.float()  # whose sums could overflow
    video = slice(layout.before, layout.before + layout.video)
    heads, width = x.shape[1], x.shape[3]
    if x.stride(1) == width and x.stride(3) == 1:  # memory is [B, L, H, D]: longer runs to add up
        sums = _pooled(x.transpose(1, 2).flatten(2)[:, video], layout, 1)
        return sums.unflatten(-1, (heads, width)).transpose(1, 2)
    return _pooled(x[:, :, video], layout, 2)


def _pooled(x: torch.Tensor, layout: TileLayout, dim: int) -> torch.Tensor:
    """The video's tokens along ``dim`` to sums over tiles along ``dim``."""
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    x = x.unflatten(dim, layout.grid)
    for axis in (1, 0, 2):
        at, tile, size = dim + axis, layout.tile[axis], layout.grid[axis]
        whole = size // tile * tile
        pieces = []
        if whole:
            pieces.append(x.narrow(at, 0, whole).unflatten(at, (-1, tile)).sum(at + 1).to(wide))
        if whole < size:
            pieces.append(x.narrow(at, whole, size - whole).sum(at, keepdim=True).to(wide))
        x = pieces[0] if len(pieces) == 1 else torch.cat(pieces, at)
    return x.flatten(dim, dim + 2)


@kept(maxsize=64)
def tile_sizes(layout: TileLayout, device: torch.device) -> torch.Tensor:
    """float32 [N]: tokens of each video tile."""
    sizes = layout.sizes()[layout.before_tiles : layout.before_tiles + layout.video_tiles]
    return sizes.to(device, torch.float32)


def _key_means(
    k: torch.Tensor, layout: TileLayout, key_mask: torch.Tensor | None, heads: int
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(means [B, H, N, D], tiles without a visible key, bool [B | 1, H | 1, N], or None)."""
    if key_mask is None:
        return tile_means(k, layout).repeat_interleave(heads // k.shape[1], 1), None
    if key_mask.dtype != torch.bool:
        key_mask = key_mask > torch.finfo(key_mask.dtype).min / 2  # masks use -inf or the lowest number
    weights = key_mask[:, :, 0].to(torch.float32)
    if weights.shape[1] > 1:
        k = k.repeat_interleave(heads // k.shape[1], 1)
    means = tile_means(k, layout, weights)
    empty = (_tile_sums(weights[..., None], layout) == 0).squeeze(-1)
    return means.repeat_interleave(heads // means.shape[1], 1), empty


@kept(maxsize=32)
def _sets(resolved: ResolvedPlan, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(always, eligible: bool [phases, 1 | heads, N, N]; extra: int64 [phases, 1 | heads]) on ``device``."""
    sets = [resolved.tile_sets(phase) for phase in range(len(resolved.windows))]
    heads = max(part.always.shape[0] for part in sets)
    return (
        torch.stack([part.always.expand(heads, -1, -1) for part in sets]).to(device),
        torch.stack([part.eligible.expand(heads, -1, -1) for part in sets]).to(device),
        torch.stack([part.extra.expand(heads) for part in sets]).to(device),
    )


@functools.lru_cache(maxsize=256)
def _most(resolved: ResolvedPlan) -> int:
    """Largest number of tiles that any query tile chooses."""
    return max(int(resolved.tile_sets(phase).extra.max()) for phase in range(len(resolved.windows)))


def pack(selected: torch.Tensor, capacity: int) -> torch.Tensor:
    """bool [B, H, N, N] -> uint8 [B, H, packed_bytes(capacity)].

    Raises:
        GridError: more tiles than the capacity.
    """
    batch, heads, tiles, _ = selected.shape
    if tiles > capacity:
        raise GridError(
            f"the grid of this call has {tiles} tiles, but the graph was compiled for at most {capacity}: compile anew "
            "for grids that differ so much, or let the graph show the grid"
        )
    bits = torch.nn.functional.pad(selected.to(torch.uint8), (0, -tiles % 8)).unflatten(-1, (-1, 8))
    weights = 2 ** torch.arange(8, device=selected.device, dtype=torch.uint8)
    rows = (bits * weights).sum(-1, dtype=torch.uint8).flatten(2)
    packed = rows.new_zeros(batch, heads, packed_bytes(capacity))
    packed[..., : rows.shape[-1]] = rows
    return packed


def unpack(packed: torch.Tensor, tiles: int) -> torch.Tensor:
    """The inverse of :func:`pack`: bool [B, H, N, N]."""
    row = -(-tiles // 8)
    rows = packed[..., : tiles * row].unflatten(-1, (tiles, row, 1))
    bits = (rows >> torch.arange(8, device=packed.device, dtype=torch.uint8)) & 1
    return bits.flatten(-2)[..., :tiles].bool()


def block_mask(selected: torch.Tensor, resolved: ResolvedPlan) -> BlockMask:
    """The selection as a block mask whose leading axis is the batch: for ``resolved.of_batch(phases)``."""
    return BlockMask.from_dense(with_others(resolved.q_layout, resolved.k_layout, selected))


def tiles_per_volume(now: ResolvedPlan) -> int:
    """Tiles to make room for per full tile's worth of video tokens, where the grid is told at run time only.

    Twice as many as on the grid at hand: a grid so much more ragged is refused by :func:`pack`.
    """
    layout = now.q_layout
    return -(-2 * layout.video_tiles * layout.volume // layout.video)


def masks_of_call(
    selection: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    key_mask: torch.Tensor | None,
    phases: tuple[int, ...],
    resolved: ResolvedPlan,
    scale: float,
) -> tuple[ResolvedPlan, BlockMask]:
    """What a lowering needs for one call of a dynamic plan; its phases are then the batch elements.

    Args:
        selection: what ``fps::select_tiles`` returned; None chooses anew.

    Raises:
        UnsupportedError: a selection of another batch or other heads.
    """
    if selection is None:
        selected = select(q, k, phase=phases, resolved=resolved, key_mask=key_mask, scale=scale)
    else:
        if selection.shape[:2] != q.shape[:2]:
            raise UnsupportedError(
                f"fps::attention: selection {tuple(selection.shape)} does not belong to queries {tuple(q.shape)}; it "
                "must begin with the same batch and heads"
            )
        selected = unpack(selection, resolved.q_layout.video_tiles)
    return resolved.of_batch(phases), block_mask(selected, resolved)
