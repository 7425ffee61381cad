"""FP8 numerics: what gets one scale, how it is computed, how values are rounded. Plain torch, any device.

The format is E4M3 without infinities (``torch.float8_e4m3fn``). A region of values ``x`` becomes::

    scale  = amax(|x|) / 448                      (1 where that is zero)
    values = e4m3(clamp(x / scale, -448, 448))    round to nearest, ties to even
    x     ~= values * scale

Arithmetic and scales are float32, or float64 for float64 inputs. (From float64, torch's cast to E4M3 rounds to
float32 on the way; only values within 2^-25 of a tie can notice.)

Regions
    Q and K     one of :data:`~fpscompile.schedule.GRANULARITIES`: "tensor" (all heads and tokens of one batch
                element, so that no result depends on what else is in the batch), "head", "tile" (a 3D tile of one
                head) or "subtile" (a run of :data:`SUBTILE` consecutive slots of a tile; its last run may be short)
    V           one (batch, head, channel)

Keys that the key mask hides (False, or a bias of -inf) are treated as if they were absent: they enter no scale and no
mean, and are stored as zeros. Padded text therefore cannot spoil the scales, whatever it holds.

Smoothing K subtracts its mean over the visible tokens first. All scores of a query then move by the same amount,
which softmax does not see; the log-sum-exp does, and gets ``scale * q . mean`` back with the exact q. So the reported
value belongs to the scores ``scale * (q8 . k8 + q . mean)``, those the output is the softmax of, and it stays
comparable between calls that see different keys and thus subtract different means.

Smoothing V subtracts its mean over the visible tokens, per channel, and adds it to the output again. Exact weights of a
query sum to one, so every output that sees a key gets the whole mean back: the sum of the rounded weights does not
enter, and their errors multiply what is left of V only.

Rotating multiplies Q and K (after smoothing, before their scales) by one orthonormal matrix, which no score sees; see
:mod:`fpscompile.hadamard`. Values and scales are then those of rotated tokens, whose features are a power of two.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch

from fpscompile.hadamard import rotate
from fpscompile.key_mask import visible_keys
from fpscompile.schedule import GRANULARITIES
from fpscompile.tiling import TileLayout

E4M3_MAX = 448.0
"""Largest finite E4M3 value."""

SUBTILE = 32
"""Slots of a tile, in tile order, that share one scale at granularity "subtile"."""


@dataclass(frozen=True, eq=False)
class QuantizedTokens:
    """Q or K in FP8, tokens in sequence order."""

    values: torch.Tensor
    """float8_e4m3fn [B, H, L, D], D that of the rotated tokens where they are rotated."""
    scales: torch.Tensor
    """float32 | float64 [B, 1 | H, 1 | n_tiles, 1 | runs]: one per region; an axis that the granularity does not
    distinguish has length 1. Runs past the end of a ragged tile hold 1."""
    layout: TileLayout

    def token_scales(self) -> torch.Tensor:
        """[B, 1 | H, 1 | L, 1]: the scale of each token."""
        return _token_scales(self.scales, self.layout)

    def dequantize(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        """[B, H, L, D] in ``dtype`` (default: that of the scales)."""
        dtype = dtype or self.scales.dtype
        return self.values.to(dtype) * self.token_scales().to(dtype)


@dataclass(frozen=True, eq=False)
class QuantizedChannels:
    """V in FP8, tokens in sequence order."""

    values: torch.Tensor
    """float8_e4m3fn [B, H, L, D]."""
    scales: torch.Tensor
    """float32 | float64 [B, H, 1, D]: one per channel."""

    def dequantize(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        """[B, H, L, D] in ``dtype`` (default: that of the scales)."""
        dtype = dtype or self.scales.dtype
        return self.values.to(dtype) * self.scales.to(dtype)


@dataclass(frozen=True, eq=False)
class QuantizedAttention:
    """The three operands of one attention call."""

    q: QuantizedTokens
    k: QuantizedTokens
    v: QuantizedChannels
    k_mean: torch.Tensor | None
    """float32 | float64 [B, Hk, 1, D]: what was subtracted from K, before any rotation; None without smoothing."""
    v_mean: torch.Tensor | None = None
    """float32 | float64 [B, Hk, 1, Dv]: what was subtracted from V, and belongs to every output that sees a key."""

    def lse_shift(self, q: torch.Tensor, scale: float) -> torch.Tensor | None:
        """[B, H, Lq]: what smoothing took from every score of a query, to be added to the log-sum-exp.

        Args:
            q: the exact queries [B, H, Lq, D], in the dtype of the answer.
            scale: factor on the scores.
        """
        if self.k_mean is None:
            return None
        mean = self.k_mean.to(q.dtype).repeat_interleave(q.shape[1] // self.k_mean.shape[1], dim=1)
        return (q @ mean.mT).squeeze(-1) * scale


def to_e4m3(x: torch.Tensor) -> torch.Tensor:
    """``x`` rounded to float8_e4m3fn, saturating at +-448. NaN stays NaN."""
    return x.clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)


def round_e4m3(x: torch.Tensor) -> torch.Tensor:
    """:func:`to_e4m3` and back to the dtype of x; float32 in arithmetic, several times faster on a CPU than casts."""
    if x.dtype != torch.float32:
        return to_e4m3(x).to(x.dtype)
    x = x.clamp(-E4M3_MAX, E4M3_MAX)
    # A float32 near 1.5 * 2^(e + 20) has steps of 2^(e - 3), E4M3's own for x in [2^e, 2^(e + 1)): adding and
    # subtracting it rounds x to them, to nearest even. Below 2^-6 the steps stay 2^-9.
    power = (x.view(torch.int32) & 0x7F800000).view(torch.float32).clamp_(min=2.0**-6)
    magic = power.mul_(1.5 * 2**20)
    return (x + magic).sub_(magic)


def rounding_base(highest: torch.Tensor) -> torch.Tensor:
    """What is taken from scores before their weights are rounded: the least ``n * log(2)``, ``n`` a whole number, that
    is not below ``highest`` (natural units). See the rounding contract of :mod:`fpscompile.kernel_spec`."""
    return (highest / math.log(2.0)).ceil() * math.log(2.0)


def work_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of scales and accumulators: float64 for float64, float32 for everything else."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def quantize_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    q_layout: TileLayout,
    k_layout: TileLayout,
    granularity: str,
    *,
    smooth_k: bool = True,
    smooth_v: bool = False,
    hadamard: bool = False,
    key_mask: torch.Tensor | None = None,
) -> QuantizedAttention:
    """Quantize all operands of one call whose batch elements share a granularity.

    Args:
        q: [B, H, Lq, D].
        k, v: [B, Hk, Lk, D] and [B, Hk, Lk, Dv].
        granularity: of Q's and K's scales.
        smooth_k: subtract K's mean over the visible tokens.
        smooth_v: subtract V's mean over the visible tokens.
        hadamard: rotate Q and K.
        key_mask: None or [B | 1, H | 1, 1, Lk], bool or additive.
    """
    valid = visible_keys(key_mask, k.shape[0], k.shape[1], q.shape[1])
    q, k, v = (x.to(work_dtype(x.dtype)) for x in (q, k, v))
    k_mean = key_mean(k, valid) if smooth_k else None
    v_mean = key_mean(v, valid) if smooth_v else None
    k = k if k_mean is None else k - k_mean
    v = v if v_mean is None else v - v_mean
    if hadamard:
        q, k = rotate(q), rotate(k)
    return QuantizedAttention(
        quantize_tokens(q, q_layout, granularity),
        quantize_tokens(k, k_layout, granularity, valid),
        quantize_channels(v, valid),
        k_mean,
        v_mean,
    )


def quantize_tokens(
    x: torch.Tensor, layout: TileLayout, granularity: str, valid: torch.Tensor | None = None
) -> QuantizedTokens:
    """Q or K [B, H, L, D] to FP8.

    Args:
        valid: None or bool [B, H, L]; tokens where it is False are absent.

    Raises:
        ValueError: an unknown granularity, or a layout of another length.
    """
    if granularity not in GRANULARITIES:
        raise ValueError(f"granularity {granularity!r} is unknown; choose one of {', '.join(GRANULARITIES)}")
    if x.shape[2] != layout.length:
        raise ValueError(f"x has {x.shape[2]} tokens and its layout {layout.length}: pass the layout of this sequence")
    x = _visible(x, valid)
    tokens = x.abs().amax(-1)  # [B, H, L]
    if granularity == "tensor":
        amax = tokens.amax((1, 2), keepdim=True)[..., None]
    elif granularity == "head":
        amax = tokens.amax(2, keepdim=True)[..., None]
    else:
        runs = -(-int(layout.sizes().max()) // SUBTILE)
        slots = layout.slots(runs * SUBTILE).to(x.device)
        amax = tokens[:, :, slots.clamp(min=0)].masked_fill(slots < 0, 0.0).unflatten(-1, (runs, SUBTILE)).amax(-1)
        if granularity == "tile":
            amax = amax.amax(-1, keepdim=True)
    scales = _scale(amax)
    return QuantizedTokens(to_e4m3(x / _token_scales(scales, layout)), scales, layout)


def quantize_channels(x: torch.Tensor, valid: torch.Tensor | None = None) -> QuantizedChannels:
    """V [B, H, L, D] to FP8; ``valid`` as in :func:`quantize_tokens`."""
    x = _visible(x, valid)
    scales = _scale(x.abs().amax(2, keepdim=True))
    return QuantizedChannels(to_e4m3(x / scales), scales)


def key_mean(k: torch.Tensor, valid: torch.Tensor | None = None) -> torch.Tensor:
    """Mean of K (or V) [B, Hk, Lk, D] over its tokens: [B, Hk, 1, D]; 0 for a head without a valid key.

    Args:
        valid: None or bool [B, Hk, Lk].
    """
    if valid is None:
        return k.to(work_dtype(k.dtype)).mean(2, keepdim=True)
    count = valid.sum(-1).clamp(min=1)[..., None, None]
    return _visible(k, valid).sum(2, keepdim=True) / count


def _visible(x: torch.Tensor, valid: torch.Tensor | None) -> torch.Tensor:
    x = x.to(work_dtype(x.dtype))
    return x if valid is None else x.masked_fill(~valid[..., None], 0.0)


def _scale(amax: torch.Tensor) -> torch.Tensor:
    # Tested after the division: a subnormal amax may have a scale of zero too. NaN must come through.
    # By a tensor: on a GPU torch multiplies by a number's inverse, which rounds some scales, and ties, another way.
    scale = amax / torch.full_like(amax, E4M3_MAX)
    return scale.masked_fill(scale == 0, 1.0)


def _token_scales(scales: torch.Tensor, layout: TileLayout) -> torch.Tensor:
    """[B, 1 | H, 1 | n_tiles, 1 | runs] -> [B, 1 | H, 1 | L, 1]."""
    _, _, n_tiles, runs = scales.shape
    if n_tiles == 1 and runs == 1:
        return scales
    tile, slot = (index.to(scales.device) for index in place_of_token(layout))
    run = slot // SUBTILE if runs > 1 else torch.zeros_like(slot)
    return scales[:, :, tile, run].unsqueeze(-1)


@functools.lru_cache(maxsize=64)
def place_of_token(layout: TileLayout) -> tuple[torch.Tensor, torch.Tensor]:
    """(tile, slot inside it) of each token in sequence order: int64 [length] each."""
    slots = layout.slots(int(layout.sizes().max()))
    tile, slot = (slots >= 0).nonzero(as_tuple=True)
    tokens = slots[tile, slot]
    place = torch.empty(2, layout.length, dtype=torch.int64)
    place[:, tokens] = torch.stack([tile, slot])
    return place[0], place[1]
