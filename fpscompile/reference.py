"""The oracle: what every lowering must compute, in plain eager torch. Slow, quadratic in memory, any device.

Without quantization it is softmax attention under the expanded mask. With ``quant="fp8"`` it follows, line by line,
the rounding contract of :mod:`fpscompile.kernel_spec`. With ``quant="int8"`` the operands are those of
:mod:`fpscompile.quant_int8`, and P is exact.

Gradients come from autograd. Through FP8 they are straight-through: a rounding passes the gradient as if it were the
identity. In formulas, with ``hat`` for values after rounding and ``W`` for the rounded weights that make the output,
``out = W @ V_hat``::

    dV = W^T dO
    dP = dO V_hat^T
    dS = P * (dP - rowsum(P * dP))         P the softmax of S before its rounding
    dQ = scale * dS K_hat
    dK = scale * dS^T Q_hat

Scales are constants, and so are the means. K's: rows of dS sum to zero, so whatever is subtracted from all keys, in dQ
or in dK, drops out. V's, ``out = W @ V_hat + mean`` with ``V_hat`` for ``V - mean``: to every dP of a query it would
add the same ``dO . mean``, which dS does not see; and were the mean not a constant, dV would differ from ``W^T dO`` by
``sum_r (1 - sum(W_r)) dO_r`` over the number of keys, which is zero but for the rounding of P: straight-through leaves
it out. With ``hadamard``, Q_hat and K_hat are rotated, and dQ and dK are rotated back.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fpscompile import quant_int8
from fpscompile.hadamard import rotate
from fpscompile.kernel_spec import tile_slots
from fpscompile.masks import BlockMask, expand_mask
from fpscompile.plan import ResolvedPlan
from fpscompile.quant import quantize_attention, rounding_base, to_e4m3, work_dtype

NEG_INF = float("-inf")


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    resolved: ResolvedPlan,
    phase: torch.Tensor | Sequence[int],
    key_mask: torch.Tensor | None = None,
    scale: float | None = None,
    compute_dtype: torch.dtype | None = None,
    block_mask: BlockMask | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Block-sparse attention, as ``fps::attention`` documents it.

    Args:
        q: [B, H, Lq, D].
        k, v: [B, Hk, Lk, D] and [B, Hk, Lk, Dv]; query head h reads key head h // (H // Hk).
        resolved: the plan and its masks.
        phase: n phase indices, B a multiple of n; batch element b is in phase[b // (B // n)].
        key_mask: None or [B | 1, H | 1, 1, Lk]: bool (True keeps) or added to the scaled scores.
        scale: None means 1/sqrt(D).
        compute_dtype: of all arithmetic after quantization; default float64 for float64 inputs, else float32. FP8
            values and scales do not depend on it.
        block_mask: instead of the plan's.

    Returns:
        output [B, H, Lq, Dv] in q's dtype, and the natural log-sum-exp [B, H, Lq], float32 or float64. Rows that see
        no key give zeros and -inf.
    """
    batch, heads, _, head_dim = q.shape
    group = heads // k.shape[1]
    scale = head_dim**-0.5 if scale is None else scale
    dtype = compute_dtype or work_dtype(q.dtype)
    mask = resolved.block_mask if block_mask is None else block_mask
    phases = [int(p) for p in phase]
    phases = [phases[b // (batch // len(phases))] for b in range(batch)]

    outputs, sums = [], []
    for b, p in enumerate(phases):
        one = slice(b, b + 1)
        bias = _bias(key_mask, b, heads, dtype, q.device)
        if resolved.plan.quant == "fp8":
            output, lse, unrounded = _fp8(
                q[one], k[one], v[one], resolved, p, _of(key_mask, b), bias, scale, dtype, mask
            )
        else:
            operands = tuple(x[b].to(dtype) for x in (q, k, v))
            shift = None
            if resolved.plan.quant == "int8":
                operands, shift = _int8(q[one], k[one], v[one], resolved, _of(key_mask, b), scale, dtype)
            queries, keys, values = operands
            keys, values = (x.repeat_interleave(group, dim=0) for x in (keys, values))
            visible = expand_mask(mask, resolved.q_layout, resolved.k_layout)[p].to(q.device)
            scores = (queries @ keys.mT) * scale
            if bias is not None:
                scores = scores + bias
            weights, lse = _softmax(scores.masked_fill(~visible, NEG_INF))
            output = unrounded = weights @ values
            lse = _shifted(lse, shift)
        if resolved.plan.remainder == "means":
            seen = mask.to_dense(resolved.k_layout.n_tiles)[p].to(q.device)
            output, lse = _with_means(output, unrounded, lse, q[b], k[b], v[b], resolved, seen, bias, scale, dtype)
        outputs.append(output)
        sums.append(lse)
    lse_dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    return torch.stack(outputs).to(q.dtype), torch.stack(sums).detach().to(lse_dtype)


def _with_means(
    output: torch.Tensor,
    unrounded: torch.Tensor,
    lse: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    resolved: ResolvedPlan,
    seen: torch.Tensor,
    bias: torch.Tensor | None,
    scale: float,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(output, log-sum-exp) where every tile that a query does not see is one more key of it, the mean of its tokens;
    see :mod:`fpscompile.remainder`. ``seen`` is bool [1 | H, q_tiles, k_tiles]; ``unrounded`` is the output but for the
    rounding of P, which the share of the seen tiles takes its gradient from."""
    group = q.shape[0] // k.shape[0]
    k, v = (x.to(dtype).repeat_interleave(group, dim=0) for x in (k, v))
    keys, values, counts = [], [], []
    for tokens in resolved.k_layout.order().split(resolved.k_layout.sizes().tolist()):
        term = torch.zeros(q.shape[0], len(tokens), dtype=dtype, device=q.device)
        if bias is not None:
            term = bias[:, 0, tokens]
        weights, log_count = _softmax(term)
        hidden = (weights == 0)[..., None]
        keys.append((weights[..., None] * k[:, tokens].masked_fill(hidden, 0.0)).sum(1))
        values.append((weights[..., None] * v[:, tokens].masked_fill(hidden, 0.0)).sum(1))
        counts.append(log_count)
    scores = (q.to(dtype) @ torch.stack(keys, 1).mT) * scale + torch.stack(counts, 1)[:, None]
    tile_of_query = torch.repeat_interleave(torch.arange(resolved.q_layout.n_tiles), resolved.q_layout.sizes())
    tile_of_query = tile_of_query[torch.argsort(resolved.q_layout.order())].to(q.device)
    weights, means_lse = _softmax(scores.masked_fill(seen[:, tile_of_query], NEG_INF))
    nothing = (lse == NEG_INF) & (means_lse == NEG_INF)
    lse, means_lse = (x.masked_fill(nothing, 0.0) for x in (lse, means_lse))  # both outputs are zero there
    both = torch.logaddexp(lse, means_lse)
    kept, share = ((x - both).exp()[..., None] for x in (lse, means_lse))
    output = kept * output + (kept - kept.detach()) * (unrounded - output).detach()
    return output + share * (weights @ torch.stack(values, 1)), both.masked_fill(nothing, NEG_INF)


def _fp8(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    resolved: ResolvedPlan,
    phase: int,
    key_mask: torch.Tensor | None,
    bias: torch.Tensor | None,
    scale: float,
    dtype: torch.dtype,
    mask: BlockMask,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(output [H, Lq, Dv], log-sum-exp [H, Lq], output without the rounding of P) of a batch of one."""
    plan, q_layout, k_layout = resolved.plan, resolved.q_layout, resolved.k_layout
    group = q.shape[1] // k.shape[1]
    with torch.no_grad():
        fp8 = quantize_attention(
            q, k, v, q_layout, k_layout, plan.phases[phase].granularity,
            smooth_k=plan.smooth_k, smooth_v=plan.smooth_v, hadamard=plan.hadamard, key_mask=key_mask,
        )  # fmt: skip
        mean = torch.zeros_like(v[:, :, :1], dtype=dtype) if fp8.v_mean is None else fp8.v_mean.to(dtype)
    shift = fp8.lse_shift(q.to(dtype), scale)
    q, k = (rotate(x.to(dtype)) if plan.hadamard else x.to(dtype) for x in (q, k))
    q_hat = _straight_through(q, fp8.q.dequantize(dtype))[0]
    k_hat = _straight_through(k, fp8.k.dequantize(dtype))[0]
    v_hat = _straight_through(v.to(dtype), fp8.v.dequantize(dtype))[0]

    slots = k_layout.slots(tile_slots(plan.tile, plan.block_n))
    q_tiles = q_layout.order().split(q_layout.sizes().tolist())
    inverse = torch.argsort(q_layout.order())
    outputs, sums, unrounded = [], [], []
    for head in range(q.shape[1]):
        mask_head = head if mask.kv_num_blocks.shape[1] > 1 else 0
        tiles_out, tiles_lse, tiles_unrounded = [], [], []
        for tile, q_tokens in enumerate(q_tiles):
            count = int(mask.kv_num_blocks[phase, mask_head, tile])
            listed = slots[mask.kv_indices[phase, mask_head, tile, :count].long().cpu()].flatten()
            tokens = listed.clamp(min=0)
            scores = (q_hat[head, q_tokens] @ k_hat[head // group, tokens].mT) * scale
            if bias is not None:
                scores = scores + bias[head, :, tokens]
            scores = scores.masked_fill((listed < 0).to(q.device), NEG_INF)
            weights, lse = _softmax(scores)
            rounded = _rounded_weights(scores.detach(), plan.block_n, plan.p_scale)
            # An empty slot repeats token 0 with weight 0; the fill keeps a NaN there from leaking in.
            values = v_hat[head // group, tokens].masked_fill((listed < 0).to(q.device)[:, None], 0.0)
            added = mean[0, head // group].masked_fill(lse[:, None] == NEG_INF, 0.0)
            tiles_out.append(_straight_through(weights, rounded) @ values + added)
            tiles_unrounded.append((weights @ values + added).detach())
            tiles_lse.append(lse)
        outputs.append(torch.cat(tiles_out)[inverse])
        unrounded.append(torch.cat(tiles_unrounded)[inverse])
        sums.append(torch.cat(tiles_lse)[inverse])
    lse = torch.stack(sums)
    return torch.stack(outputs), _shifted(lse, None if shift is None else shift[0]), torch.stack(unrounded)


def _shifted(lse: torch.Tensor, shift: torch.Tensor | None) -> torch.Tensor:
    """lse + shift; a row without a key stays at -inf, whatever the mean that the shift comes from."""
    return lse if shift is None else torch.where(lse == NEG_INF, lse, lse + shift)


def _int8(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    resolved: ResolvedPlan,
    key_mask: torch.Tensor | None,
    scale: float,
    dtype: torch.dtype,
) -> tuple[tuple[torch.Tensor, ...], torch.Tensor]:
    """((q, k, v) [H | Hk, L, D] as if rounded to 8 bits, shift of the log-sum-exp [H, Lq]) of a batch of one."""
    with torch.no_grad():
        int8 = quant_int8.quantize_attention(
            q, k, v, resolved.k_layout, smooth_k=resolved.plan.smooth_k, key_mask=key_mask
        )
    shift = int8.lse_shift(q.to(dtype), scale)
    pairs = ((q, int8.q), (k, int8.k), (v, int8.v))
    return tuple(_straight_through(x.to(dtype), rounded.to(dtype))[0] for x, rounded in pairs), shift[0]


def _rounded_weights(scores: torch.Tensor, block_n: int, p_scale: float) -> torch.Tensor:
    """[rows, slots]: the weight of each slot in the output after P's rounding, block by block."""
    rows = scores.shape[0]
    if scores.shape[1] == 0:
        return scores
    running_max = scores.new_full((rows, 1), NEG_INF)
    denominator = scores.new_zeros(rows, 1)
    rounded: list[torch.Tensor] = []
    for block in scores.split(block_n, dim=1):
        new_max = torch.maximum(running_max, rounding_base(block.amax(1, keepdim=True)))
        shift = _finite(new_max)
        rescale = torch.exp(running_max - shift)
        p = torch.exp(block - shift)
        p8 = to_e4m3(p * p_scale).to(p.dtype)
        denominator = denominator * rescale + p.sum(1, keepdim=True)
        rounded = [earlier * rescale for earlier in rounded] + [p8]
        running_max = new_max
    return torch.cat(rounded, 1) / (p_scale * denominator.masked_fill(denominator == 0, 1.0))


def _softmax(scores: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(weights, log-sum-exp) over the last axis; a row of -inf, or of no scores, gives zeros and -inf."""
    if scores.shape[-1] == 0:
        return scores, scores.new_full(scores.shape[:-1], NEG_INF)
    shift = _finite(scores.detach().amax(-1, keepdim=True))
    p = torch.exp(scores - shift)
    total = p.sum(-1, keepdim=True)
    none = total == 0
    total = total.masked_fill(none, 1.0)
    return p / total, (shift + torch.log(total)).masked_fill(none, NEG_INF).squeeze(-1)


def _finite(maximum: torch.Tensor) -> torch.Tensor:
    """A row maximum that is safe to subtract: 0 where the row holds only -inf."""
    return maximum.masked_fill(maximum == NEG_INF, 0.0)


def _straight_through(exact: torch.Tensor, rounded: torch.Tensor) -> torch.Tensor:
    """``rounded`` in value, ``exact`` to autograd. ``exact - exact`` is zero to the last bit.

    But for NaN and infinities, which hidden keys may hold: ``rounded`` has zeros there.
    """
    return rounded.detach() + (exact - exact.detach()).masked_fill(~exact.isfinite(), 0.0)


def _of(key_mask: torch.Tensor | None, b: int) -> torch.Tensor | None:
    """The key mask of one batch element: [1, H | 1, 1, Lk]."""
    if key_mask is None:
        return None
    b = b if key_mask.shape[0] > 1 else 0
    return key_mask[b : b + 1]


def _bias(
    key_mask: torch.Tensor | None, b: int, heads: int, dtype: torch.dtype, device: torch.device
) -> torch.Tensor | None:
    """[H, 1, Lk]: the key mask of one batch element as a term of the scores."""
    one = _of(key_mask, b)
    if one is None:
        return None
    if one.dtype == torch.bool:
        one = torch.zeros(one.shape, dtype=dtype, device=device).masked_fill(~one, NEG_INF)
    return one[0].to(dtype).expand(heads, -1, -1)
