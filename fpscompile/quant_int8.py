"""8-bit integers: the CPU's form of the 8-bit contract, in plain torch. Any device.

Processors multiply bytes several times faster than floats, but not FP8. Values become integers in -127 to 127 times a
scale, rounded to nearest, ties to even::

    Q    one scale per query (finer than any granularity of a schedule, and free: a row of scores has one query)
    K    its mean over the visible tokens is subtracted, then one scale per 3D tile
    V    its mean over the visible tokens is subtracted and added to the output again, one scale per channel
    P    exp(S - maximum of the block) * 255, unsigned; a block's product is weighed when it is added to the others

The maximum of the block, not the running one: integers have no exponent, and a block of many small weights would
round to nothing next to one large weight elsewhere. Where blocks end is up to the kernel, so results agree to the
rounding of P only. The log-sum-exp is of the unrounded P.

Keys that the key mask hides from all query heads of a key head are absent, as in :mod:`fpscompile.quant`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fpscompile.key_mask import visible_keys
from fpscompile.quant import key_mean, work_dtype
from fpscompile.tiling import TileLayout

INT8_MAX = 127.0


@dataclass(frozen=True, eq=False)
class Int8Attention:
    """The operands of one call after rounding, as floats. Scores are ``scale * q @ k.mT`` and differ from the exact
    ones, beside rounding, by ``scale * q . mean`` per query."""

    q: torch.Tensor
    """[B, H, Lq, D]."""
    k: torch.Tensor
    """[B, Hk, Lk, D], without its mean."""
    v: torch.Tensor
    """[B, Hk, Lk, Dv], its mean included; a hidden key has the mean alone."""
    k_mean: torch.Tensor
    """[B, Hk, 1, D]; zeros without smoothing."""

    def lse_shift(self, q: torch.Tensor, scale: float) -> torch.Tensor:
        """[B, H, Lq]: what the subtraction of K's mean took from every score of the exact queries ``q``."""
        mean = self.k_mean.to(q.dtype).repeat_interleave(q.shape[1] // self.k_mean.shape[1], dim=1)
        return (q @ mean.mT).squeeze(-1) * scale


def quantize_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    k_layout: TileLayout,
    *,
    smooth_k: bool = True,
    key_mask: torch.Tensor | None = None,
) -> Int8Attention:
    """Round all operands of one call to 8 bits.

    Args:
        q: [B, H, Lq, D].
        k, v: [B, Hk, Lk, D] and [B, Hk, Lk, Dv].
        k_layout: tiles of the keys.
        smooth_k: subtract K's mean over the visible tokens.
        key_mask: None or [B | 1, H | 1, 1, Lk], bool or additive.
    """
    valid = visible_keys(key_mask, k.shape[0], k.shape[1], q.shape[1])
    q, k, v = (x.to(work_dtype(x.dtype)) for x in (q, k, v))
    k_mean, v_mean = key_mean(k, valid), key_mean(v, valid)
    if not smooth_k:
        k_mean = torch.zeros_like(k_mean)
    keys, values = k - k_mean, v - v_mean
    if valid is not None:
        keys, values = (x.masked_fill(~valid[..., None], 0.0) for x in (keys, values))
    order, sizes = k_layout.order().to(k.device), k_layout.sizes()
    in_tiles = keys[:, :, order].abs().amax(-1)  # [B, Hk, Lk], tile after tile
    reach = torch.empty_like(in_tiles)
    for tile in torch.arange(k_layout.length).split(sizes.tolist()):
        reach[:, :, order[tile.to(k.device)]] = in_tiles[:, :, tile].amax(-1, keepdim=True)
    return Int8Attention(
        _rounded(q, q.abs().amax(-1, keepdim=True)),
        _rounded(keys, reach[..., None]),
        _rounded(values, values.abs().amax(2, keepdim=True)) + v_mean,
        k_mean,
    )


def _rounded(x: torch.Tensor, reach: torch.Tensor) -> torch.Tensor:
    """``x`` in steps of ``reach / 127``; zeros where that is zero."""
    scale = reach / INT8_MAX
    scale = scale.masked_fill(scale == 0, 1.0)
    return (x * scale.reciprocal()).round().clamp(-INT8_MAX, INT8_MAX) * scale
