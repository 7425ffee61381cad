"""The packed operands of a GPU kernel: what the pre-pass makes of q, k and v, one trip through memory each.

The means of K and V and V's maxima take a first look at K and V; everything else happens tile by tile. Regions larger
than a tile ("head", "tensor") need the maxima of all tiles before the first value can be written: one more look, taken
only where some phase of the plan asks for it.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType

import torch

from fpscompile.gpu import render
from fpscompile.gpu.config import padded
from fpscompile.gpu.tables import Tables, in_slots
from fpscompile.kept import integers
from fpscompile.kernel_spec import KernelSpec
from fpscompile.key_mask import additive, visible_keys
from fpscompile.quant import E4M3_MAX, SUBTILE

REGIONS = {"tile": 0, "head": 1, "tensor": 1, "subtile": 2}
"""Granularity to the template's code: own maximum, a maximum that is reduced beforehand, runs of a tile."""

SPLIT_TOKENS = 2048
"""Tokens that one program of the statistics pass reads."""

STATISTICS = {"N": 8, "num_warps": 4}
"""Tokens at a time and warps of the statistics pass: the fastest of 18 on an H200."""

VALUES_HELD = 64 * 128
"""Values of V that one program transposes: of a quarter to twice as many, the fastest on an H200."""

FP8_DTYPES = {"e4m3": torch.float8_e4m3fn, "e4m3fnuz": torch.float8_e4m3fnuz}


Statistics = tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor]
"""K's mean f32 [B, Hk, DP] or None, V's mean f32 [B, Hk, DVP] or None, V's scales f32 [B, Hk, DVP]."""


@dataclass(frozen=True, eq=False)
class Packed:
    """FP8 operands in slot order; shapes are in ``templates/triton/README.md``."""

    q: torch.Tensor
    """E4M3 [B, H, q_slots, DP]."""
    k: torch.Tensor
    """E4M3 [B, Hk, k_slots, DP]."""
    v: torch.Tensor
    """E4M3 [B, Hk, DVP, k_slots]."""
    q_scale: torch.Tensor
    """float32 [B, H, q_tiles, runs]."""
    k_scale: torch.Tensor
    """float32 [B, Hk, k_tiles, runs]."""
    v_scale: torch.Tensor
    """float32 [B, Hk, DVP]."""
    lse_shift: torch.Tensor | None
    """float32 [B, H, q_slots]: what smoothing K took from the scores of each query; None without smoothing."""
    k_mean: torch.Tensor | None
    """float32 [B, Hk, DP]; None without smoothing."""
    v_mean: torch.Tensor | None = None
    """float32 [B, Hk, DVP]: what was subtracted from V; None without smoothing."""


@dataclass(frozen=True, eq=False)
class KeyBias:
    """A key mask in slot order."""

    bias: torch.Tensor
    """float32 [B | 1, H | 1, k_slots]: added to the scaled scores; -inf in padding."""
    state: torch.Tensor
    """uint8 [B | 1, H | 1, units]: 0 where a unit's bias is all zeros."""


def pack(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    key_mask: torch.Tensor | None,
    phase: torch.Tensor,
    spec: KernelSpec,
    tables: Tables,
    granularities: tuple[str, ...],
    scale: float,
    *,
    statistics: Statistics | None = None,
    module: ModuleType | None = None,
) -> Packed:
    """Quantize one call's operands; shapes as in :mod:`fpscompile.lowerings`.

    Args:
        phase: int32 [n] on the device.
        granularities: one per phase.
        scale: factor on the scores, for ``lse_shift``.
        statistics: of these keys and values, where they are known; see :func:`statistics_of`.
        module: instead of the rendered kernels.
    """
    module = module or render.load("quantize", spec)
    batch, heads, _, _ = q.shape
    key_heads, k_length = k.shape[1:3]
    dp, dvp = padded(q.shape[-1]), padded(v.shape[-1])
    fp8 = FP8_DTYPES[render.fp8_format(spec.target)]
    visible = _visible(key_mask, batch, key_heads, heads)
    mean, v_mean, v_scale = statistics or _statistics(module, k, v, visible, spec, dp, dvp)
    values = (v, v_scale) if v_mean is None else (v, v_mean, v_scale)

    v8 = torch.empty(batch, key_heads, dvp, tables.k_slots, dtype=fp8, device=v.device)
    columns = min(tables.slots & -tables.slots, max(VALUES_HELD // dvp, 16))  # a power of two that divides the tile
    module.quantize_values[(tables.k_slots // columns, key_heads, batch)](
        *values, tables.k_token, visible, v8, *v.stride(), key_heads, k_length, v.shape[-1], tables.k_slots,
        HAS_VISIBLE=visible is not None, DVP=dvp, N=columns, num_warps=4,
    )  # fmt: skip

    codes = [REGIONS[name] if name != "subtile" or tables.slots >= SUBTILE else 0 for name in granularities]
    region = integers(tuple(codes), q.device)
    common = (module, phase, region, granularities, spec, fp8)
    q8, q_scale, shift = _tokens(*common, q, tables.q_token, None, mean, None, scale, dp)
    k8, k_scale, _ = _tokens(*common, k, tables.k_token, mean, None, visible, scale, dp)
    return Packed(q8, k8, v8, q_scale, k_scale, v_scale, None if mean is None else shift, mean, v_mean)


def statistics_of(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, key_mask: torch.Tensor | None, spec: KernelSpec
) -> Statistics:
    """What quantizing heads by themselves needs to know of all keys and values, in one launch for all heads."""
    visible = _visible(key_mask, q.shape[0], k.shape[1], q.shape[1])
    return _statistics(render.load("quantize", spec), k, v, visible, spec, padded(q.shape[-1]), padded(v.shape[-1]))


def _visible(key_mask: torch.Tensor | None, batch: int, key_heads: int, heads: int) -> torch.Tensor | None:
    """u8 [B, Hk, L], contiguous, 0 for keys that nobody sees; None without a mask."""
    visible = visible_keys(key_mask, batch, key_heads, heads)
    return None if visible is None else visible.to(torch.uint8).contiguous()


def _statistics(
    module: ModuleType,
    k: torch.Tensor,
    v: torch.Tensor,
    visible: torch.Tensor | None,
    spec: KernelSpec,
    dp: int,
    dvp: int,
) -> Statistics:
    batch, key_heads, length, _ = k.shape
    splits = -(-length // SPLIT_TOKENS)
    sums = torch.empty(batch, key_heads, splits, dp, device=k.device)
    found = [torch.empty(batch, key_heads, splits, dvp, device=k.device) for _ in range(3 if spec.smooth_v else 1)]
    module.key_statistics[(splits, batch * key_heads)](
        k, v, visible, sums, *found, *k.stride(), *v.stride(), key_heads, length, k.shape[-1], v.shape[-1],
        SPLIT_TOKENS, HAS_VISIBLE=visible is not None, DP=dp, DVP=dvp, **STATISTICS,
    )  # fmt: skip
    tokens = length if visible is None else visible.sum(-1, dtype=torch.float32).clamp(min=1.0).unsqueeze(-1)
    k_mean = sums.sum(2) / tokens if spec.smooth_k else None
    if not spec.smooth_v:
        return k_mean, None, _scale(found[0].amax(2), spec)
    v_sums, high, low = found
    v_mean = v_sums.sum(2) / tokens
    # Rounding is monotonic: the largest of all |v - mean|, to the bit. Below zero where no key is visible.
    reach = torch.maximum(high.amax(2) - v_mean, v_mean - low.amin(2)).clamp(min=0.0)
    return k_mean, v_mean, _scale(reach, spec)


def _scale(amax: torch.Tensor, spec: KernelSpec) -> torch.Tensor:
    largest = E4M3_MAX if render.fp8_format(spec.target) == "e4m3" else render.FP8_FORMATS["e4m3fnuz"][1]
    scale = amax / torch.full_like(amax, largest)  # dividing by a number would multiply by its inverse on a GPU
    return scale.masked_fill(scale == 0, 1.0)


def _tokens(
    module: ModuleType,
    phase: torch.Tensor,
    region: torch.Tensor,
    granularities: tuple[str, ...],
    spec: KernelSpec,
    fp8: torch.dtype,
    x: torch.Tensor,
    token: torch.Tensor,
    mean: torch.Tensor | None,
    shift_mean: torch.Tensor | None,
    visible: torch.Tensor | None,
    scale: float,
    dp: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(values, scales, shift) of Q or K."""
    batch, heads, length, dim = x.shape
    slots = int(module.S.value)
    tiles = token.numel() // slots
    # Scales per run take registers too: with half the values, four warps would spill on sm_89 and sm_90.
    held = int(module.ROWS.value) * dp * (2 if int(module.R.value) > 1 else 1)
    num_warps = 8 if held >= render.HELD else 4
    per_sample = batch // phase.numel()
    reduced = None
    if any(name in ("head", "tensor") for name in granularities):
        maxima = torch.empty(batch, heads, tiles, device=x.device)
        module.tile_maxima[(tiles, heads, batch)](
            x, mean, token, visible, maxima, *x.stride(), heads, length, dim, tiles,
            HAS_MEAN=mean is not None, HAS_VISIBLE=visible is not None, DP=dp, num_warps=num_warps,
        )  # fmt: skip
        reduced = maxima.amax(2)
        if "tensor" in granularities:
            whole = integers(tuple(int(name == "tensor") for name in granularities), x.device)
            whole = (
                whole[phase.clamp(0, len(granularities) - 1).long()].repeat_interleave(per_sample).bool().unsqueeze(1)
            )
            reduced = torch.where(whole, reduced.amax(1, keepdim=True), reduced)
        reduced = reduced.contiguous()
    x8 = torch.empty(batch, heads, token.numel(), dp, dtype=fp8, device=x.device)
    scales = torch.empty(batch, heads, tiles, int(module.R.value), device=x.device)
    shift = torch.empty(batch, heads, token.numel() if shift_mean is not None else 0, device=x.device)
    module.quantize_tiles[(tiles, heads, batch)](
        x, mean, shift_mean, token, visible, reduced, region, phase, x8, scales, shift, *x.stride(),
        heads, length, dim, tiles, len(granularities), per_sample, scale,
        HAS_MEAN=mean is not None, HAS_SHIFT=shift_mean is not None, HAS_VISIBLE=visible is not None,
        HAS_REDUCED=reduced is not None, GQA=spec.gqa_group, DP=dp,
        num_warps=num_warps,
    )  # fmt: skip
    return x8, scales, shift


def key_bias(key_mask: torch.Tensor, tables: Tables) -> KeyBias:
    """The key mask in slot order."""
    placed = in_slots(additive(key_mask)[:, :, 0], tables.k_token, float("-inf"))
    state = (placed != 0).unflatten(-1, (-1, tables.unit)).any(-1)
    return KeyBias(placed, state.to(torch.uint8).contiguous())
