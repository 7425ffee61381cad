"""``remainder="means"``: the tiles that a mask drops stay in the softmax, each as a single key.

A query that does not see key tile ``t`` sees, in its place, one key that stands for its ``n_t`` visible tokens::

    score = scale * q . mean(k) + log(n_t)            value = mean(v)

in one softmax with the tokens that it does see. To first order that is what the tile would have added: it is exact
where the keys of a tile are alike, whatever their values. Attention that is spread over the whole video, which no
window can serve, loses most of its error; a video of ``N`` tiles costs ``N`` more keys. Means of keys as a coarse
branch of sparse attention are known from NSA (arXiv 2502.11089), which gates its branches; here nothing is learned, so
weights of dense attention fit.

A key mask's additive term ``b`` counts as in the softmax that it is part of: ``n_t = sum(exp(b))``, and means are
weighted by ``exp(b)``. Tokens that are not of the video see all and are seen by all: nothing of theirs is dropped.

What a lowering computed over its own tiles is merged by log-sum-exps with attention to the means::

    lse = logaddexp(lse_tiles, lse_means)      out = out_tiles + exp(lse_means - lse) * (out_means - out_tiles)

Gradients need no merging: with ``lse`` and ``delta`` of the whole, each side gives its own share. ``delta`` is
``rowsum(dO * out)`` for a lowering that takes that; others sum ``P * dP`` over their own keys and these.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from fpscompile.kept import kept
from fpscompile.key_mask import additive, visible_keys
from fpscompile.lowerings import dense
from fpscompile.masks import BlockMask
from fpscompile.plan import ResolvedPlan
from fpscompile.quant import key_mean, place_of_token, work_dtype
from fpscompile.selection import phase_of_each, tile_means, tile_sizes
from fpscompile.tiling import TileLayout

BIAS_BYTES = {"cpu": 4 << 20, "cuda": 128 << 20}
"""Size aimed at for the bias of some rows of queries, a number for each row and mean, by device, where torch's own
operations attend to the means: everywhere but beside the Triton kernels in half precision."""

Triple = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
Piece = tuple[slice, slice, torch.Tensor]


@torch.no_grad()
def add(
    out: torch.Tensor,
    lse: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    key_mask: torch.Tensor | None,
    phases: torch.Tensor | tuple[int, ...],
    resolved: ResolvedPlan,
    scale: float,
    block_mask: BlockMask | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(out, lse) with the dropped tiles added, in place; arguments as of a lowering, which has filled the first two."""
    if out.numel() == 0 or not _drops(resolved, block_mask):
        return out, lse
    means = TileKeys.of(k, v, key_mask, resolved.k_layout, q.shape[1])
    half = q.dtype in (torch.bfloat16, torch.float16)
    if resolved.plan.lowering == "triton" and half and block_mask is None:
        from fpscompile.gpu import means as kernel  # which needs Triton, as the lowering does

        count = means.log_count.to(torch.float32).contiguous()
        dropped = _dropped(resolved, q.device)
        kernel.add(q, means.keys, means.values, count, dropped, out, lse, phases, resolved, scale)
        return out, lse
    for at, rows, bias in _pieces(q, means, phases, resolved, block_mask):
        part, part_lse = dense.forward(q[at, :, rows], means.keys[at], means.values[at], bias, scale)
        nothing = part_lse == -math.inf
        whole = torch.logaddexp(lse[at, :, rows], part_lse)
        share = (part_lse - whole).exp().masked_fill(nothing, 0.0)[..., None].to(out.dtype)
        out[at, :, rows] = torch.lerp(out[at, :, rows], part, share)
        lse[at, :, rows] = torch.where(nothing, lse[at, :, rows], whole)
    return out, lse


@torch.no_grad()
def gradients(
    own: Callable[..., Triple],
    grad_out: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    *,
    sums_delta: bool,
    key_mask: torch.Tensor | None,
    phases: torch.Tensor | tuple[int, ...],
    resolved: ResolvedPlan,
    scale: float,
    block_mask: BlockMask | None = None,
) -> Triple:
    """(dq, dk, dv) of the lowering's own keys and of the means.

    Args:
        own: the lowering's backward of this call.
        sums_delta: whether it sums delta = rowsum(P * dP) over its own keys, adds them to what the means have put into
            its argument ``delta``, and leaves the sum there; others take rowsum(dO * out), which is of all keys.
        out, lse: what :func:`add` returned.
    """
    if out.numel() == 0 or not _drops(resolved, block_mask):
        return own()
    layout, plan = resolved.k_layout, resolved.plan
    means = TileKeys.of(k, v, key_mask, layout, q.shape[1])
    visible = visible_keys(key_mask, k.shape[0], k.shape[1], q.shape[1])
    pieces = functools.partial(_pieces, q, means, phases, resolved, block_mask)
    keys, values, delta = means.keys, means.values, None
    if sums_delta:
        # Without V's mean, here too: half of a half-precision number's digits may be spent on it. It adds dO . mean to
        # all of dP, and to delta.
        centre = key_mean(v, visible)
        values = (values - _of_heads(centre, values.shape[1])).to(values.dtype)
        common = (grad_out.to(centre.dtype) * _of_heads(centre, q.shape[1])).sum(-1)
        if plan.quant != "none" and plan.smooth_v:
            common.zero_()  # the lowering's values are without it too
        delta = _delta_of_means(grad_out, q, lse, means, values, common, pieces(), scale)
        dq, dk, dv = own(delta=delta)
        delta -= common
    else:
        dq, dk, dv = own()
    if plan.quant != "none" and plan.smooth_k:
        # The lowering's keys are without their mean. Rows of dS sum to zero over tiles and means together, so the mean
        # drops out of dq if both leave it out.
        centre = key_mean(k, visible)
        lse = lse - (q.to(centre.dtype) * _of_heads(centre, q.shape[1])).sum(-1) * scale
        keys = keys - _of_heads(centre, keys.shape[1]).to(keys.dtype)
    wide = work_dtype(q.dtype)
    d_keys, d_values = (torch.zeros(x.shape, dtype=wide, device=x.device) for x in (keys, means.values))
    for at, rows, bias in pieces():
        part_dq, part_dk, part_dv = dense.backward(
            grad_out[at, :, rows].to(q.dtype), q[at, :, rows], keys[at], values[at],
            out[at, :, rows] if delta is None else _with_product(grad_out[at, :, rows], delta[at, :, rows], q.dtype),
            lse[at, :, rows].contiguous(), bias, scale,
        )  # fmt: skip
        dq[at, :, rows] += part_dq
        d_keys[at] += part_dk
        d_values[at] += part_dv
    tile_of = _tile_of(layout, q.device)
    video = slice(layout.before, layout.before + layout.video)
    for grad, part in ((dk, d_keys), (dv, d_values)):
        spread = part[:, :, tile_of] * means.weights.to(wide)
        if spread.shape[1] > grad.shape[1]:
            spread = spread.unflatten(1, (grad.shape[1], -1)).sum(2)
        grad[:, :, video] += spread.to(grad.dtype)
    return dq, dk, dv


def _delta_of_means(
    grad_out: torch.Tensor,
    q: torch.Tensor,
    lse: torch.Tensor,
    means: TileKeys,
    values: torch.Tensor,
    common: torch.Tensor,
    pieces: Iterator[Piece],
    scale: float,
) -> torch.Tensor:
    """[B, H, Lq]: what the means add to rowsum(P * dP).

    Args:
        values: of the means, in place of their own.
        common: [B, H, Lq], to be added to dP.
    """
    wide = work_dtype(q.dtype)
    delta = torch.zeros(lse.shape, dtype=wide, device=lse.device)
    for at, rows, bias in pieces:
        part, part_lse = dense.forward(q[at, :, rows], means.keys[at], values[at], bias, scale)
        weight = (part_lse - lse[at, :, rows]).exp().masked_fill(part_lse == -math.inf, 0.0)
        product = (grad_out[at, :, rows].to(wide) * part.to(wide)).sum(-1) + common[at, :, rows]
        delta[at, :, rows] = product * weight
    return delta


def _with_product(grad: torch.Tensor, delta: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A stand-in for ``out``: rows along those of ``grad`` [..., D] whose product with them is ``delta`` [...].

    A dense backward asks for ``out`` only to compute that. Along ``grad`` all terms have one sign: in half precision
    their sum is off by no more than one rounding.
    """
    grad = grad.to(delta.dtype)
    top = grad.abs().amax(-1, keepdim=True)
    unit = grad / top.masked_fill(top == 0, 1.0)
    squares = unit.square().sum(-1, keepdim=True)
    return (unit * (delta[..., None] / (top * squares).masked_fill(top == 0, 1.0))).to(dtype)


def _of_heads(x: torch.Tensor, heads: int) -> torch.Tensor:
    """One of [B, Hk, ...] for each of more heads."""
    return x.repeat_interleave(heads // x.shape[1], 1)


@dataclass(frozen=True, eq=False)
class TileKeys:
    """The video's key tiles, a key each. Heads are K's, or the queries' where the key mask differs by head."""

    keys: torch.Tensor
    """[B, Hk | H, N, D] in the inputs' dtype."""
    values: torch.Tensor
    """[B, Hk | H, N, Dv]."""
    log_count: torch.Tensor
    """[B | 1, H | 1, N]: log of the visible tokens of each tile; -inf where there are none."""
    weights: torch.Tensor
    """[B | 1, H | 1, video tokens, 1]: share of each token in the means of its tile."""

    @classmethod
    def of(
        cls, k: torch.Tensor, v: torch.Tensor, key_mask: torch.Tensor | None, layout: TileLayout, heads: int
    ) -> TileKeys:
        """From K [B, Hk, Lk, D], V and the key mask of a call."""
        wide = work_dtype(k.dtype)
        tile_of, sizes = _tile_of(layout, k.device), tile_sizes(layout, k.device).to(wide)
        if key_mask is None:
            keys, values = (tile_means(x, layout).to(x.dtype) for x in (k, v))
            return cls(keys, values, sizes.log()[None, None], (1 / sizes)[tile_of][None, None, :, None])
        bias = additive(key_mask, wide)[:, :, 0]
        top = bias.amax(-1, keepdim=True).nan_to_num(neginf=0.0)
        count = (bias - top).exp()
        if count.shape[1] > 1:
            k, v = (_of_heads(x, heads) for x in (k, v))
        hidden = (count == 0)[..., None]  # what they hold may be no number
        keys, values = (tile_means(x.masked_fill(hidden, 0.0), layout, count).to(x.dtype) for x in (k, v))
        video = count[..., layout.before : layout.before + layout.video]
        total = torch.zeros(*video.shape[:2], len(sizes), dtype=wide, device=k.device).index_add_(2, tile_of, video)
        weights = video / total.masked_fill(total == 0, 1.0)[..., tile_of]
        return cls(keys, values, total.log() + top, weights[..., None])


def _pieces(
    q: torch.Tensor,
    means: TileKeys,
    phases: torch.Tensor | tuple[int, ...],
    resolved: ResolvedPlan,
    block_mask: BlockMask | None,
) -> Iterator[Piece]:
    """(a batch element, rows of the video, bias [1, 1 | H, rows, N], float32 or float64): the log of its tokens for the
    mean of a dropped tile, -inf for that of one that is seen."""
    layout = resolved.q_layout
    video = slice(layout.before_tiles, layout.before_tiles + layout.video_tiles)
    dropped = _dropped(resolved, q.device) if block_mask is None else _without(block_mask.to(q.device), resolved)
    tile_of = _tile_of(layout, q.device)
    dropped = dropped[phase_of_each(phases, q.shape[0], len(dropped), q.device)][:, :, video]
    log_count = means.log_count.expand(q.shape[0], -1, -1)
    heads, tiles = max(dropped.shape[1], log_count.shape[1]), dropped.shape[-1]
    step = max(1, BIAS_BYTES.get(q.device.type, 4 << 20) // (4 * heads * tiles))
    step = min(step, max(1, dense.CHUNK_ELEMENTS // (q.shape[1] * tiles)))
    for b in range(q.shape[0]):
        table = torch.where(dropped[b], log_count[b][:, None], -math.inf)
        table = table.to(torch.float64 if q.dtype == torch.float64 else torch.float32)
        for start in range(0, layout.video, step):
            stop = min(start + step, layout.video)
            rows = slice(layout.before + start, layout.before + stop)
            yield slice(b, b + 1), rows, table[None, :, tile_of[start:stop]]


def extra_density(resolved: ResolvedPlan) -> float:
    """What the means cost: their pairs with queries over all query-key pairs."""
    queries, keys = resolved.q_layout, resolved.k_layout
    return keys.video_tiles * queries.video / (queries.length * keys.length)


def _drops(resolved: ResolvedPlan, block_mask: BlockMask | None) -> bool:
    """Whether any query misses a tile."""
    return block_mask is not None or min(resolved.densities) < 1.0


@kept(maxsize=64)
def _dropped(resolved: ResolvedPlan, device: torch.device) -> torch.Tensor:
    """bool [phases, 1 | H, query tiles, N]: the video's key tiles that each query tile does not see; others see all."""
    return _without(resolved.block_mask, resolved).to(device)


def _without(mask: BlockMask, resolved: ResolvedPlan) -> torch.Tensor:
    first = resolved.k_layout.before_tiles
    return ~mask.to_dense(resolved.k_layout.n_tiles)[..., first : first + resolved.k_layout.video_tiles]


@kept(maxsize=64)
def _tile_of(layout: TileLayout, device: torch.device) -> torch.Tensor:
    """int64 [video tokens]: the video tile of each."""
    tiles = place_of_token(layout)[0][layout.before : layout.before + layout.video]
    return (tiles - layout.before_tiles).to(device)
