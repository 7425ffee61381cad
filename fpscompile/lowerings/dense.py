"""Dense attention with its log-sum-exp, on any device: the one kernel that the boxes lowering calls per box.

Picks torch's fastest kernel that returns the log-sum-exp and has a backward that takes it. Where none takes the
inputs, chunked matrix products in float32 (float64 for float64) do.

    q     [B, H, n, D], k [B, Hk, m, D], v [B, Hk, m, Dv]; H a multiple of Hk, n and m >= 1, any strides
    bias  None, or [B | 1, H | 1, 1, m] added to the scaled scores, in q's dtype or float32; or [.., .., n, m] for at
          most CHUNK_ELEMENTS scores
    out   [B, H, n, Dv] in q's dtype, any strides
    lse   [B, H, n] float32 (float64), natural; -inf where the bias of every key is -inf, and out is 0 there
"""

from __future__ import annotations

import torch
from torch.nn.functional import pad

Triple = tuple[torch.Tensor, torch.Tensor, torch.Tensor]

CHUNK_ELEMENTS = 1 << 24
"""Scores held at a time by the matrix-product path."""

_aten = torch.ops.aten


def forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor | None, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """(out, lse) of dense attention; shapes are in the module docstring."""
    kernel = _kernel(q, k, v, bias)
    if kernel == "math":
        return _math_forward(q, k, v, bias, scale)
    d_v = v.shape[-1]
    q, k, v = _same_width(q, k, v)
    if kernel == "cuda":
        out, lse = _aten._scaled_dot_product_flash_attention(q, k, v, scale=scale)[:2]
    else:
        out, lse = _aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, attn_mask=bias, scale=scale)
        if bias is not None:  # the kernel reports 0 for a row without a visible key
            lse = lse.masked_fill((bias == -torch.inf).all(-1), -torch.inf)
    return out[..., :d_v], lse


def backward(
    grad_out: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    bias: torch.Tensor | None,
    scale: float,
) -> Triple:
    """(dq, dk, dv) for these queries and keys.

    ``out`` and ``lse`` may cover more keys than ``k`` and ``v`` hold: the gradients are then those keys' share.
    """
    kernel = _kernel(q, k, v, bias)
    if bias is not None:  # a row without a visible key: exp(-inf - 0) = 0 gives it zero gradients, not NaN
        lse = lse.masked_fill(lse == -torch.inf, 0.0)
    if kernel == "math":
        return _math_backward(grad_out, q, k, v, out, lse, bias, scale)
    d, d_v = q.shape[-1], v.shape[-1]
    q, k, v = _same_width(q, k, v)
    grad_out, out = (_unit_stride(pad(x, (0, v.shape[-1] - d_v)) if v.shape[-1] > d_v else x) for x in (grad_out, out))
    if kernel == "cuda":
        none = torch.empty(0, dtype=torch.int32)
        seed = torch.empty(0, dtype=torch.int64)
        dq, dk, dv = _aten._scaled_dot_product_flash_attention_backward(
            grad_out, q, k, v, out, lse.contiguous(), none, none, q.shape[2], k.shape[2], 0.0, False, seed, seed,
            scale=scale,
        )  # fmt: skip
    else:
        dq, dk, dv = _aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad_out, q, k, v, out, lse, 0.0, False, attn_mask=bias, scale=scale
        )
    return dq[..., :d], dk[..., :d], dv[..., :d_v]


def _kernel(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor | None) -> str:
    """ "cpu" or "cuda": torch's flash kernel of that device; "math": matrix products."""
    if q.device.type == "cpu":
        return "cpu"
    if q.device.type == "cuda" and bias is None and q.dtype in (torch.float16, torch.bfloat16):
        narrow = max(q.shape[-1], v.shape[-1]) <= 256 and q.shape[-1] % 8 == 0 and v.shape[-1] % 8 == 0
        if narrow and q.shape[1] == k.shape[1] and torch.backends.cuda.is_flash_attention_available():
            return "cuda"
    return "math"


def _same_width(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Triple:
    """The three with equal head dims, as the flash kernels ask: zero columns change neither scores nor the output."""
    d, d_v = q.shape[-1], v.shape[-1]
    if d < d_v:
        q, k = pad(q, (0, d_v - d)), pad(k, (0, d_v - d))
    elif d_v < d:
        v = pad(v, (0, d - d_v))
    return _unit_stride(q), _unit_stride(k), _unit_stride(v)


def _unit_stride(x: torch.Tensor) -> torch.Tensor:
    """``x`` with its features next to one another: the flash kernels assume it without checking."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _math_forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor | None, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    b, h, n, _ = q.shape
    out = torch.empty(b, h, n, v.shape[-1], dtype=q.dtype, device=q.device)
    lse = torch.empty(b, h, n, dtype=wide, device=q.device)
    keys, values = k.to(wide).unsqueeze(2), v.to(wide).unsqueeze(2)
    for rows in _row_chunks(q, k):
        scores = _scores(q[:, :, rows], keys, bias, scale)
        part = torch.logsumexp(scores, -1)
        # a row of -inf scores has lse -inf: subtracting 0 instead gives exp(-inf) = 0
        probs = (scores - part.masked_fill(part == -torch.inf, 0.0)[..., None]).exp_()
        out[:, :, rows] = (probs @ values).flatten(1, 2).to(q.dtype)
        lse[:, :, rows] = part.flatten(1, 2)
    return out, lse


def _math_backward(
    grad_out: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    bias: torch.Tensor | None,
    scale: float,
) -> Triple:
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    group = q.shape[1] // k.shape[1]
    keys, values = k.to(wide).unsqueeze(2), v.to(wide).unsqueeze(2)
    dq = torch.empty_like(q, memory_format=torch.contiguous_format)
    dk, dv = (torch.zeros(x.shape, dtype=wide, device=x.device) for x in (k, v))
    for rows in _row_chunks(q, k):
        queries, grad, result = (x[:, :, rows].to(wide).unflatten(1, (-1, group)) for x in (q, grad_out, out))
        probs = (
            _scores(q[:, :, rows], keys, bias, scale) - lse[:, :, rows].unflatten(1, (-1, group))[..., None]
        ).exp_()
        dv += (probs.mT @ grad).sum(2)
        d_scores = probs.mul_(grad @ values.mT - (grad * result).sum(-1, keepdim=True)).mul_(scale)
        dq[:, :, rows] = (d_scores @ keys).flatten(1, 2).to(q.dtype)
        dk += (d_scores.mT @ queries).sum(2)
    return dq, dk.to(k.dtype), dv.to(v.dtype)


def _scores(q: torch.Tensor, keys: torch.Tensor, bias: torch.Tensor | None, scale: float) -> torch.Tensor:
    """Scaled, biased scores [B, Hk, H / Hk, rows, m] in the keys' dtype; ``keys`` [B, Hk, 1, m, D] broadcast."""
    group = q.shape[1] // keys.shape[1]
    scores = (q.to(keys.dtype) * scale).unflatten(1, (-1, group)) @ keys.mT
    if bias is not None:
        bias = bias.unflatten(1, (-1, group)) if bias.shape[1] > 1 else bias.unsqueeze(2)
        scores += bias.to(scores.dtype)
    return scores


def _row_chunks(q: torch.Tensor, k: torch.Tensor) -> list[slice]:
    step = max(1, CHUNK_ELEMENTS // (q.shape[0] * q.shape[1] * k.shape[2]))
    return [slice(start, start + step) for start in range(0, q.shape[2], step)]
