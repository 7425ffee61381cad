"""How much each candidate window would change a site's output, from one dense run, tile by tile.

For the query rows of one tile, scores against all keys are taken once, and from them, for each key tile ``j``, the mass
``m_j = sum exp(s)`` and the partial output ``o_j = sum exp(s) v``. Attention under any window is then

    out_c = sum over its tiles of o_j / sum over its tiles of m_j

so the output of every candidate costs one small product with its row of the tile mask; where content chooses tiles,
that row is what :mod:`fpscompile.selection` would choose for this call. At no time is more held than the scores of a
few rows. With ``remainder="means"`` the tiles outside a window add the mass and output of their means. With FP8, the
same sums are taken from the rounded operands, once for each granularity, and compared with the exact output.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch.nn.functional import pad

from fpscompile.calibration.candidates import Candidates
from fpscompile.plan import P_SCALE
from fpscompile.quant import quantize_attention, round_e4m3, rounding_base
from fpscompile.remainder import TileKeys
from fpscompile.selection import choose_tiles, tile_scores
from fpscompile.tiling import TileLayout
from fpscompile.windows import TileSets

Sums = tuple[torch.Tensor, torch.Tensor]

CHUNK_BYTES = 64 << 20
"""Size aimed at for the scores, or the partial outputs, of one piece of work."""


@dataclass(frozen=True, eq=False)
class CallStatistics:
    """One call of one site, one batch element."""

    phase: int
    error: torch.Tensor
    """float64 [H, C, G]: squared norm of the output's change under each candidate and granularity, over the squared
    norm of the site's whole output. Sums over heads, one choice each, are the squared relative error of the site."""
    recall: torch.Tensor
    """float64 [H, C]: mean share of the softmax mass that the candidate keeps."""


@dataclass
class SiteStatistics:
    """What was seen of one site."""

    name: str
    heads: int
    head_dim: int
    q_layout: TileLayout
    k_layout: TileLayout
    candidates: Candidates
    granularities: tuple[str, ...]
    """("tile",) without quantization."""
    quant: str
    remainder: str = "none"
    calls: list[CallStatistics] = field(default_factory=list)

    def phases(self) -> list[int]:
        """Phases that were seen."""
        return sorted({call.phase for call in self.calls})

    def mean_error(self, phase: int | None = None) -> torch.Tensor:
        """float64 [H, C, G]: mean over the calls, of one phase or of all."""
        return torch.stack([call.error for call in self.calls if phase in (None, call.phase)]).mean(0)

    def bounded_error(self, phase: int, weights: torch.Tensor | None = None) -> torch.Tensor:
        """float64 [H, C, G]: the mean over a phase's calls plus its standard error: caution that ends as samples add
        up.

        Args:
            weights: one for each of :attr:`calls`, which multiplies its errors.
        """
        chosen = [index for index, call in enumerate(self.calls) if call.phase == phase]
        errors = torch.stack([self.calls[index].error for index in chosen])
        if weights is not None:
            errors = errors * weights[chosen, None, None, None]
        if len(errors) == 1:
            return errors[0]
        return errors.mean(0) + errors.std(0) / len(errors) ** 0.5

    def mean_recall(self) -> torch.Tensor:
        """float64 [H, C]."""
        return torch.stack([call.recall for call in self.calls]).mean(0)

    def share(self, phase: int) -> float:
        """Of the calls."""
        return sum(call.phase == phase for call in self.calls) / len(self.calls)


def observe(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    key_mask: torch.Tensor | None,
    phase: int,
    scale: float,
    site: SiteStatistics,
    rows_per_tile: int,
) -> CallStatistics:
    """Statistics of one batch element.

    Args:
        q: [H, Lq, D].
        k, v: [Hk, Lk, D] and [Hk, Lk, Dv].
        key_mask: None or [1 | H, 1, Lk]: bool, or added to the scaled scores.
        rows_per_tile: query rows taken of each tile, spread evenly; all where a tile has no more.
    """
    group = q.shape[0] // k.shape[0]
    count = len(site.candidates.windows)
    error = torch.zeros(site.heads, count, len(site.granularities), dtype=torch.float64)
    recall = torch.zeros(site.heads, count, dtype=torch.float64)
    norm, rows_seen = 0.0, 0
    bias = _slot_bias(key_mask, q, site.k_layout)
    chosen = list(site.candidates.chosen)
    scores = None
    hidden = None if key_mask is None else key_mask[None]
    if chosen:
        scores = tile_scores(q[None], k[None], site.q_layout, site.k_layout, hidden, scale)[0]
    means = None if site.remainder == "none" else TileKeys.of(k[None], v[None], hidden, site.k_layout, q.shape[0])
    exact = _Operands.of(q, k, v, site.k_layout, means)
    versions = [exact]
    if site.quant == "fp8":
        versions = [_rounded(q, k, v, site, name, means) for name in site.granularities]
    for heads, tiles, rows in _pieces(site, rows_per_tile, v.shape[-1]):
        shape = rows.shape  # query tiles, rows of each
        keep = site.candidates.masks[:, tiles].transpose(0, 1).to(q.device, torch.float32)  # [tiles, C, k_tiles]
        by_content = None if scores is None else _chosen_tiles(site, scores[heads], tiles)
        sums, of_means = exact.sums(bias, heads, rows.flatten(), group, scale, False)
        total = sums[0].sum(1)  # [h, tiles * rows]
        reference = (sums[1].sum(1) / _safe(total)[..., None]).unflatten(1, shape).transpose(0, 1)
        norm += float(reference.double().square().sum())
        for level, operands in enumerate(versions):
            if operands is not exact:
                sums, of_means = operands.sums(bias, heads, rows.flatten(), group, scale, True)
            kept, out = (keep @ _by_tile(x, shape) for x in sums)
            if by_content is not None:
                kept[:, chosen], out[:, chosen] = (_by_head(by_content, x, shape) for x in sums)
            kept = kept.view(shape[0], count, -1, shape[1])  # [tiles, C, h, rows]
            out = out.view(*kept.shape, -1)
            if level == 0:
                share = kept / _safe(sums[0].sum(1)).unflatten(1, shape).transpose(0, 1)[:, None]
                recall[heads] += share.double().sum((0, 3)).T.cpu()
            if of_means is not None:
                dropped, theirs = ((1 - keep) @ _by_tile(x, shape) for x in of_means)
                if by_content is not None:
                    dropped[:, chosen], theirs[:, chosen] = (_by_head(1 - by_content, x, shape) for x in of_means)
                kept, out = kept + dropped.view_as(kept), out + theirs.view_as(out)
            out = out / _safe(kept)[..., None]
            error[heads, :, level] += (out - reference[:, None]).square().sum((3, 4)).double().sum(0).T.cpu()
        rows_seen += rows.numel() if heads.start == 0 else 0
    return CallStatistics(phase, error / max(norm, 1e-300), recall / max(rows_seen, 1))


def _by_tile(x: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """[h, k_tiles, tiles * rows, ...] -> [tiles, k_tiles, h * rows * ...]."""
    split = x.unflatten(2, shape)
    return split.permute(2, 1, 0, *range(3, split.dim())).flatten(2)


def _by_head(keep: torch.Tensor, x: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """``keep`` [tiles, h, n, k_tiles] times x [h, k_tiles, tiles * rows, ...] -> [tiles, n, h * rows * ...]."""
    split = x.unflatten(2, shape)
    return (keep @ split.permute(2, 0, 1, *range(3, split.dim())).flatten(3)).transpose(1, 2).flatten(2)


def _chosen_tiles(site: SiteStatistics, scores: torch.Tensor, tiles: list[int]) -> torch.Tensor:
    """float32 [tiles, h, n, k_tiles]: 1 where a query tile sees a key tile, for candidates that content has a say in.

    Args:
        scores: [h, N, N], on video tiles.
        tiles: query tiles.
    """
    q_first, k_first, count = site.q_layout.before_tiles, site.k_layout.before_tiles, site.q_layout.video_tiles
    keep = scores.new_ones(len(tiles), len(scores), len(site.candidates.chosen), site.k_layout.n_tiles)
    places = [place for place, tile in enumerate(tiles) if q_first <= tile < q_first + count]
    video = [tiles[place] - q_first for place in places]
    if video:
        for index, sets in enumerate(site.candidates.chosen.values()):
            always, eligible = (x[:, video].to(scores.device) for x in (sets.always, sets.eligible))
            seen = choose_tiles(scores[:, video], TileSets(always, eligible, sets.extra.to(scores.device)))
            keep[places, :, index, k_first : k_first + count] = seen.transpose(0, 1).to(keep.dtype)
    return keep.float()


def _pieces(site: SiteStatistics, rows_per_tile: int, width: int) -> Iterator[tuple[slice, list[int], torch.Tensor]]:
    """(heads, query tiles, int64 [tiles, rows] their tokens): the work in pieces of bounded memory."""
    tiles = site.q_layout.order().split(site.q_layout.sizes().tolist())
    slots = int(site.k_layout.sizes().max())
    per_row = 8 * max(site.k_layout.n_tiles * max(slots, width), len(site.candidates.windows) * width)
    by_length: dict[int, list[int]] = {}
    for index, tokens in enumerate(tiles):
        by_length.setdefault(min(len(tokens), rows_per_tile), []).append(index)
    for length, members in by_length.items():
        step = max(1, CHUNK_BYTES // (per_row * length))  # heads times tiles
        at_once = max(1, step // site.heads)
        for first in range(0, len(members), at_once):
            part = members[first : first + at_once]
            rows = torch.stack([tiles[i][(torch.arange(length) * len(tiles[i])) // length] for i in part])
            for start in range(0, site.heads, step):
                yield slice(start, min(start + step, site.heads)), part, rows


@dataclass(frozen=True, eq=False)
class _Operands:
    """Q, and K and V laid out in tile slots."""

    q: torch.Tensor
    """float32 [H, Lq, D]."""
    keys: torch.Tensor
    """float32 [Hk, k_tiles * slots, D]."""
    values: torch.Tensor
    layout: TileLayout
    means: TileKeys | None = None
    """Of the video's key tiles, never rounded; their keys without what was subtracted from ``keys``."""
    exact_q: torch.Tensor | None = None
    """What means are multiplied with; None: ``q``."""

    @classmethod
    def of(
        cls, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layout: TileLayout, means: TileKeys | None = None
    ) -> _Operands:
        place = _places(layout)[0].to(q.device)
        return cls(q.float(), k.float()[:, place], v.float()[:, place], layout, means)

    def sums(
        self, bias: torch.Tensor, heads: slice, rows: torch.Tensor, group: int, scale: float, round_p: bool
    ) -> tuple[Sums, Sums | None]:
        """(mass [h, k_tiles, rows], partial outputs [h, k_tiles, rows, Dv]) of some heads and rows: of tiles, and of
        means in their place."""
        keys, values = (_of_heads(x, heads, group) for x in (self.keys, self.values))
        at = rows.to(self.q.device)
        scores = self.q[heads][:, at] @ keys.mT * scale
        scores += bias[heads] if len(bias) > 1 else bias
        tiles = scores.unflatten(2, (self.layout.n_tiles, -1)).transpose(1, 2)  # [h, k_tiles, rows, slots]
        # Whatever whole number is taken from a tile's scores, its weights are rounded the same, and its own largest
        # keeps those of tiles that are far below others.
        own = rounding_base(tiles.amax(-1, keepdim=True))  # -inf where a tile is hidden, whose share is 0
        top = scores.amax(-1, keepdim=True).nan_to_num(neginf=0.0)  # [h, rows, 1]
        p = torch.exp(tiles - own.nan_to_num(neginf=0.0))
        weights = round_e4m3(p * P_SCALE) / P_SCALE if round_p else p
        share = torch.exp(own - top[:, None])
        sums = p.sum(-1) * share[..., 0], weights @ values.unflatten(1, (self.layout.n_tiles, -1)) * share
        if self.means is None:
            return sums, None
        by_head = self.means.keys.shape[1] > len(self.keys)  # the key mask differs by head
        keys, values = (
            _of_heads(x[0].float(), heads, 1 if by_head else group) for x in (self.means.keys, self.means.values)
        )
        count = self.means.log_count[0]
        q = self.q if self.exact_q is None else self.exact_q
        scores = q[heads][:, at] @ keys.mT * scale + (count[heads] if len(count) > 1 else count)[:, None]
        p = torch.exp(scores - top).mT  # [h, N, rows]
        around = (self.layout.before_tiles, self.layout.after_tiles)  # never dropped
        return sums, (pad(p, (0, 0, *around)), pad(p[..., None] * values[:, :, None], (0, 0, 0, 0, *around)))


def _of_heads(x: torch.Tensor, heads: slice, group: int) -> torch.Tensor:
    """Rows of ``x`` [Hk, ...] that some query heads read."""
    if group == 1:
        return x[heads]
    return x[torch.arange(heads.start, heads.stop, device=x.device) // group]


@functools.lru_cache(maxsize=32)
def _places(layout: TileLayout) -> tuple[torch.Tensor, torch.Tensor]:
    """(token in each slot, whether the slot is empty): int64 and bool [k_tiles * slots]."""
    slots = layout.slots(int(layout.sizes().max())).flatten()
    return slots.clamp(min=0), slots < 0


def _rounded(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, site: SiteStatistics, granularity: str, means: TileKeys | None
) -> _Operands:
    """Operands after FP8, at one granularity. K's mean stays subtracted: softmax does not see it."""
    fp8 = quantize_attention(q[None], k[None], v[None], site.q_layout, site.k_layout, granularity)
    q_hat, k_hat, v_hat = (x.dequantize(torch.float32)[0] for x in (fp8.q, fp8.k, fp8.v))
    operands = _Operands.of(q_hat, k_hat, v_hat, site.k_layout)
    if means is None or fp8.k_mean is None:
        return operands
    group = means.keys.shape[1] // k.shape[0]
    centred = means.keys - fp8.k_mean.to(means.keys.dtype).repeat_interleave(group, 1)
    return dataclasses.replace(operands, means=dataclasses.replace(means, keys=centred), exact_q=q.float())


def _slot_bias(key_mask: torch.Tensor | None, q: torch.Tensor, layout: TileLayout) -> torch.Tensor:
    """[1 | H, 1, k_tiles * slots] to be added to the scores: the key mask, and -inf in empty slots."""
    place, empty = (x.to(q.device) for x in _places(layout))
    hidden = torch.zeros(1, 1, len(place), device=q.device).masked_fill(empty, -torch.inf)
    if key_mask is None:
        return hidden
    if key_mask.dtype == torch.bool:
        return hidden.masked_fill(~key_mask[..., place], -torch.inf)
    return hidden + key_mask.float()[..., place]


def _safe(total: torch.Tensor) -> torch.Tensor:
    return total.masked_fill(total == 0, 1.0)


def relative_error(calls: Sequence[torch.Tensor]) -> float:
    """The mean of the calls' relative errors, from their squares."""
    return float(torch.stack(list(calls)).sqrt().mean()) if calls else 0.0
