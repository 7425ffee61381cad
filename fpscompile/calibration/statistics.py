"""How much each candidate window would change a site's output, from one dense run, tile by tile.

For the query rows of one tile, scores against all keys are taken once, and from them, for each key tile ``j``, the mass
``m_j = sum exp(s)`` and the partial output ``o_j = sum exp(s) v``. Attention under any window is then

    out_c = sum over its tiles of o_j / sum over its tiles of m_j

so the output of every candidate costs one small product with its row of the tile mask. At no time is more held than
the scores of a few rows. With FP8, the same sums are taken from the rounded operands, once for each granularity, and
compared with the exact output.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch

from fpscompile.calibration.candidates import Candidates
from fpscompile.plan import P_SCALE
from fpscompile.quant import quantize_attention, round_e4m3
from fpscompile.tiling import TileLayout

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
    calls: list[CallStatistics] = field(default_factory=list)

    def phases(self) -> list[int]:
        """Phases that were seen."""
        return sorted({call.phase for call in self.calls})

    def mean_error(self, phase: int | None = None) -> torch.Tensor:
        """float64 [H, C, G]: mean over the calls, of one phase or of all."""
        return torch.stack([call.error for call in self.calls if phase in (None, call.phase)]).mean(0)

    def bounded_error(self, phase: int) -> torch.Tensor:
        """float64 [H, C, G]: the mean over a phase's calls plus its standard error: caution that ends as samples add
        up."""
        errors = torch.stack([call.error for call in self.calls if call.phase == phase])
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
    bias = _bias(key_mask, q)
    exact = (q.float(), k.float(), v.float())
    versions = [exact] if site.quant != "fp8" else [_rounded(q, k, v, site, name) for name in site.granularities]
    for heads, tile, rows in _pieces(site, rows_per_tile, v.shape[-1]):
        keep = site.candidates.masks[:, tile].to(q.device, torch.float32)
        reference: torch.Tensor | None = None
        if site.quant == "fp8":
            mass, partial = _sums(*exact, bias, heads, rows, group, scale, site.k_layout, False)
            reference = partial.sum(1) / _safe(mass.sum(1))[..., None]
        for index, (a, b, c) in enumerate(versions):
            mass, partial = _sums(a, b, c, bias, heads, rows, group, scale, site.k_layout, site.quant == "fp8")
            if reference is None:
                reference = partial.sum(1) / _safe(mass.sum(1))[..., None]
            kept = torch.einsum("ck,hkr->hcr", keep, mass)
            out = torch.einsum("ck,hkx->hcx", keep, partial.flatten(2)).unflatten(2, partial.shape[2:])
            out = out / _safe(kept)[..., None]
            error[heads, :, index] += (out - reference[:, None]).double().square().sum((2, 3)).cpu()
            if index == 0:
                recall[heads] += (kept / _safe(mass.sum(1))[:, None]).double().sum(2).cpu()
        norm += float(reference.double().square().sum()) if reference is not None else 0.0
        rows_seen += len(rows) if heads.start == 0 else 0
    return CallStatistics(phase, error / max(norm, 1e-300), recall / max(rows_seen, 1))


def _pieces(site: SiteStatistics, rows_per_tile: int, width: int) -> Iterator[tuple[slice, int, torch.Tensor]]:
    """(heads, query tile, its rows): the work in pieces of bounded memory."""
    order = site.q_layout.order()
    tiles = order.split(site.q_layout.sizes().tolist())
    slots = int(site.k_layout.sizes().max())
    # Scores, then partial outputs, of one row and one head.
    per_row = 4 * site.k_layout.n_tiles * max(slots, width, 1) * 2
    for index, tokens in enumerate(tiles):
        if len(tokens) > rows_per_tile:
            tokens = tokens[(torch.arange(rows_per_tile) * len(tokens)) // rows_per_tile]
        step = max(1, CHUNK_BYTES // (per_row * len(tokens)))
        for start in range(0, site.heads, step):
            yield slice(start, min(start + step, site.heads)), index, tokens


def _sums(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    bias: torch.Tensor | None,
    heads: slice,
    rows: torch.Tensor,
    group: int,
    scale: float,
    layout: TileLayout,
    round_p: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(mass [h, k_tiles, rows], partial outputs [h, k_tiles, rows, Dv]) of some heads and rows."""
    place, empty = _places(layout)
    place, empty = place.to(q.device), empty.to(q.device)
    key_heads = torch.arange(heads.start, heads.stop, device=q.device) // group
    keys, values = (x[key_heads][:, place] for x in (k, v))  # [h, k_tiles * slots, D]
    scores = q[heads][:, rows.to(q.device)] @ keys.mT * scale
    if bias is not None:
        scores = scores + bias[heads if len(bias) > 1 else slice(None)][..., place]
    scores = scores.masked_fill(empty, -torch.inf)
    p = torch.exp(scores - scores.amax(-1, keepdim=True).nan_to_num(neginf=0.0))
    tiles = p.unflatten(2, (layout.n_tiles, -1)).transpose(1, 2)  # [h, k_tiles, rows, slots]
    weights = round_e4m3(tiles * P_SCALE) / P_SCALE if round_p else tiles
    return tiles.sum(-1), weights @ values.unflatten(1, (layout.n_tiles, -1))


@functools.lru_cache(maxsize=32)
def _places(layout: TileLayout) -> tuple[torch.Tensor, torch.Tensor]:
    """(token in each slot, whether the slot is empty): int64 and bool [k_tiles * slots]."""
    slots = layout.slots(int(layout.sizes().max())).flatten()
    return slots.clamp(min=0), slots < 0


def _rounded(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, site: SiteStatistics, granularity: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Operands after FP8, at one granularity. K's mean stays subtracted: softmax does not see it."""
    fp8 = quantize_attention(q[None], k[None], v[None], site.q_layout, site.k_layout, granularity)
    return fp8.q.dequantize(torch.float32)[0], fp8.k.dequantize(torch.float32)[0], fp8.v.dequantize(torch.float32)[0]


def _bias(key_mask: torch.Tensor | None, q: torch.Tensor) -> torch.Tensor | None:
    """[1 | H, 1, Lk] to be added to the scores."""
    if key_mask is None:
        return None
    if key_mask.dtype == torch.bool:
        return torch.zeros(key_mask.shape, device=q.device).masked_fill(~key_mask, -torch.inf)
    return key_mask.float()


def _safe(total: torch.Tensor) -> torch.Tensor:
    return total.masked_fill(total == 0, 1.0)


def relative_error(calls: Sequence[torch.Tensor]) -> float:
    """The mean of the calls' relative errors, from their squares."""
    return float(torch.stack(list(calls)).sqrt().mean()) if calls else 0.0
