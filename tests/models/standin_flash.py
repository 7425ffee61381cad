"""Stand-ins for flash-attn and xformers: ops of the same names, signatures and layouts, computed in plain PyTorch.

The packages need a GPU to build; graphs that call their ops do not. The reference is :func:`attend`.
"""

from __future__ import annotations

import math
from typing import Any

import torch


def attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, keep: torch.Tensor | None = None
) -> torch.Tensor:
    """Attention over [..., L, H, D] with an optional bool mask [..., H or 1, Lq, Lk]; grouped heads allowed."""
    q, k, v = (x.movedim(-2, -3) for x in (q, k, v))
    groups = q.shape[-3] // k.shape[-3]
    k, v = (x.repeat_interleave(groups, -3) for x in (k, v))
    scores = q @ k.mT * scale
    if keep is not None:
        scores = scores.masked_fill(~keep, -math.inf)
    return torch.nan_to_num(scores.softmax(-1)).to(v.dtype).matmul(v).movedim(-3, -2)


def attend_backward(
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float,
    keep: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of :func:`attend` with as many key heads as query heads: dS = P * (dP - rowsum(dP * P))."""
    dout, q, k, v = (x.movedim(-2, -3) for x in (dout, q, k, v))
    scores = q @ k.mT * scale
    if keep is not None:
        scores = scores.masked_fill(~keep, -math.inf)
    p = torch.nan_to_num(scores.softmax(-1))
    dp = dout @ v.mT
    ds = p * (dp - (dp * p).sum(-1, keepdim=True)) * scale
    return (ds @ k).movedim(-3, -2), (ds.mT @ q).movedim(-3, -2), (p.mT @ dout).movedim(-3, -2)


def local_mask(q_length: int, k_length: int, causal: bool, left: int, right: int) -> torch.Tensor | None:
    """flash-attn's causal and window masks, aligned to the bottom right corner."""
    right = 0 if causal else right
    if left < 0 and right < 0:
        return None
    offset = torch.arange(k_length)[None] - torch.arange(q_length)[:, None] - (k_length - q_length)
    keep = torch.ones(q_length, k_length, dtype=torch.bool)
    if left >= 0:
        keep &= offset >= -left
    if right >= 0:
        keep &= offset <= right
    return keep


def _dense(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, causal: bool, left: int, right: int, cap: float
) -> torch.Tensor:
    if cap:
        raise NotImplementedError("the stand-in has no soft cap")
    return attend(q, k, v, scale, local_mask(q.shape[1], k.shape[1], causal, left, right)).contiguous()


@torch.library.custom_op("flash_attn::_flash_attn_forward", mutates_args=())
def flash_forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    dropout_p: float,
    softmax_scale: float,
    causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
    alibi_slopes: torch.Tensor | None,
    return_softmax: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    out = _dense(q, k, v, softmax_scale, causal, window_size_left, window_size_right, softcap)
    lse = torch.zeros(q.shape[0], q.shape[2], q.shape[1])
    return out, lse, q.new_empty(0), torch.zeros(2, dtype=torch.int64)


@flash_forward.register_fake
def _(q: Any, k: Any, v: Any, *_: Any) -> Any:
    lse = torch.empty(q.shape[0], q.shape[2], q.shape[1])
    return torch.empty_like(q), lse, q.new_empty(0), torch.empty(2, dtype=torch.int64)


@torch.library.custom_op("flash_attn::_flash_attn_backward", mutates_args=("dq", "dk", "dv"))
def flash_backward(
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    softmax_lse: torch.Tensor,
    dq: torch.Tensor,
    dk: torch.Tensor,
    dv: torch.Tensor,
    dropout_p: float,
    softmax_scale: float,
    causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
    alibi_slopes: torch.Tensor | None,
    deterministic: bool,
    rng_state: torch.Tensor | None = None,
) -> torch.Tensor:
    keep = local_mask(q.shape[1], k.shape[1], causal, window_size_left, window_size_right)
    grads = attend_backward(dout, q, k, v, softmax_scale, keep)
    for buffer, grad in zip((dq, dk, dv), grads, strict=True):
        buffer.copy_(grad)
    return torch.zeros_like(softmax_lse)


@flash_backward.register_fake
def _(dout: Any, q: Any, k: Any, v: Any, out: Any, softmax_lse: Any, *_: Any) -> Any:
    return torch.empty_like(softmax_lse)


@torch.library.custom_op("flash_attn::_flash_attn_varlen_forward", mutates_args=())
def varlen_forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float,
    softmax_scale: float,
    causal: bool,
    window_size_left: int = -1,
    window_size_right: int = -1,
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    return_softmax: bool = False,
    block_table: torch.Tensor | None = None,
    leftpad_k: torch.Tensor | None = None,
    seqused_k: torch.Tensor | None = None,
    zero_tensors: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    out = attend(q, k, v, softmax_scale, packed_mask(q.shape[0], k.shape[0], cu_seqlens_q, cu_seqlens_k)).contiguous()
    return out, torch.zeros(q.shape[1], q.shape[0]), q.new_empty(0), torch.zeros(2, dtype=torch.int64)


def packed_mask(q_total: int, k_total: int, cu_q: torch.Tensor, cu_k: torch.Tensor) -> torch.Tensor:
    """bool [q_total, k_total]: both tokens in the same packed sequence; tokens past the last see nothing."""
    q_of = torch.searchsorted(cu_q.long(), torch.arange(q_total), right=True)
    k_of = torch.searchsorted(cu_k.long(), torch.arange(k_total), right=True)
    return (q_of[:, None] == k_of[None]) & (q_of < len(cu_q))[:, None]


@varlen_forward.register_fake
def _(q: Any, k: Any, v: Any, *_: Any, **__: Any) -> Any:
    lse = torch.empty(q.shape[1], q.shape[0])
    return torch.empty_like(q), lse, q.new_empty(0), torch.empty(2, dtype=torch.int64)


@torch.library.custom_op("flash_attn::_flash_attn_varlen_backward", mutates_args=("dq", "dk", "dv"))
def varlen_backward(
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    softmax_lse: torch.Tensor,
    dq: torch.Tensor,
    dk: torch.Tensor,
    dv: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float,
    softmax_scale: float,
    causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
    alibi_slopes: torch.Tensor | None,
    deterministic: bool,
    rng_state: torch.Tensor | None = None,
    zero_tensors: bool = False,
) -> torch.Tensor:
    keep = packed_mask(q.shape[0], k.shape[0], cu_seqlens_q, cu_seqlens_k)
    grads = attend_backward(dout, q, k, v, softmax_scale, keep)
    for buffer, grad in zip((dq, dk, dv), grads, strict=True):
        buffer.copy_(grad)
    return torch.zeros_like(softmax_lse)


@varlen_backward.register_fake
def _(dout: Any, q: Any, k: Any, v: Any, out: Any, softmax_lse: Any, *_: Any) -> Any:
    return torch.empty_like(softmax_lse)


class FlashFunction(torch.autograd.Function):
    """The differentiable dense call, [B, L, H, D]."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, q: Any, k: Any, v: Any, dropout_p: float, scale: float | None, causal: bool, window: Any, softcap: Any
    ) -> torch.Tensor:
        scale = q.shape[-1] ** -0.5 if scale is None else scale
        q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
        out, lse, _, rng = torch.ops.flash_attn._flash_attn_forward(
            q,
            k,
            v,
            dropout_p,
            scale,
            causal=causal,
            window_size_left=window[0],
            window_size_right=window[1],
            softcap=softcap,
            alibi_slopes=None,
            return_softmax=False,
        )
        ctx.save_for_backward(q, k, v, out, lse, rng)
        ctx.rest = (dropout_p, scale, causal, window[0], window[1], softcap, None, False)
        return out

    @staticmethod
    def backward(ctx: Any, dout: Any) -> Any:  # type: ignore[override]
        q, k, v, out, lse, rng = ctx.saved_tensors
        dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        torch.ops.flash_attn._flash_attn_backward(dout, q, k, v, out, lse, dq, dk, dv, *ctx.rest, rng_state=rng)
        return dq[..., : dout.shape[-1]], dk[..., : dout.shape[-1]], dv[..., : dout.shape[-1]], *[None] * 5


def flash_attn_func(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
) -> torch.Tensor:
    return FlashFunction.apply(q, k, v, dropout_p, softmax_scale, causal, window_size, softcap)


class PackedFlashFunction(torch.autograd.Function):
    """The differentiable call on packed [B, L, 3, H, D]."""

    @staticmethod
    def forward(ctx: Any, qkv: Any, dropout_p: float, scale: float | None, causal: bool, window: Any) -> Any:  # type: ignore[override]
        scale = qkv.shape[-1] ** -0.5 if scale is None else scale
        q, k, v = qkv[:, :, 0].detach(), qkv[:, :, 1].detach(), qkv[:, :, 2].detach()
        out, lse, _, rng = torch.ops.flash_attn._flash_attn_forward(
            q, k, v, dropout_p, scale, causal, window[0], window[1], 0.0, None, False
        )
        ctx.save_for_backward(q, k, v, out, lse, rng)
        ctx.rest = (dropout_p, scale, causal, window[0], window[1], 0.0, None, False)
        return out

    @staticmethod
    def backward(ctx: Any, dout: Any) -> Any:  # type: ignore[override]
        q, k, v, out, lse, rng = ctx.saved_tensors
        dqkv = torch.empty(*q.shape[:-2], 3, *q.shape[-2:], dtype=q.dtype, device=q.device)
        torch.ops.flash_attn._flash_attn_backward(
            dout, q, k, v, out, lse, dqkv[:, :, 0], dqkv[:, :, 1], dqkv[:, :, 2], *ctx.rest, rng_state=rng
        )
        return dqkv[..., : dout.shape[-1]], None, None, None, None


def flash_attn_qkvpacked_func(
    qkv: torch.Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
) -> torch.Tensor:
    return PackedFlashFunction.apply(qkv, dropout_p, softmax_scale, causal, window_size)


class VarlenFlashFunction(torch.autograd.Function):
    """The differentiable call on packed sequences, [tokens, H, D]."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        q: Any,
        k: Any,
        v: Any,
        cu_q: Any,
        cu_k: Any,
        max_q: int,
        max_k: int,
        p: float,
        scale: Any,
        causal: Any,
    ) -> torch.Tensor:
        scale = q.shape[-1] ** -0.5 if scale is None else scale
        out, lse, _, rng = torch.ops.flash_attn._flash_attn_varlen_forward(
            q, k, v, cu_q, cu_k, max_q, max_k, p, scale, causal=causal, window_size_left=-1, window_size_right=-1
        )
        ctx.save_for_backward(q, k, v, out, lse, cu_q, cu_k, rng)
        ctx.rest = (max_q, max_k, p, scale, causal, -1, -1, 0.0, None, False)
        return out

    @staticmethod
    def backward(ctx: Any, dout: Any) -> Any:  # type: ignore[override]
        q, k, v, out, lse, cu_q, cu_k, rng = ctx.saved_tensors
        dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        torch.ops.flash_attn._flash_attn_varlen_backward(
            dout, q, k, v, out, lse, dq, dk, dv, cu_q, cu_k, *ctx.rest, rng_state=rng
        )
        return dq, dk, dv, *[None] * 7


def flash_attn_varlen_func(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
) -> torch.Tensor:
    return VarlenFlashFunction.apply(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale, causal
    )


@torch.library.custom_op("xformers_flash::flash_fwd", mutates_args=())
def xformers_forward(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seqlens_q: torch.Tensor | None,
    cu_seqlens_k: torch.Tensor | None,
    seqused_k: torch.Tensor | None,
    max_seqlen_q: int,
    max_seqlen_k: int,
    p: float,
    softmax_scale: float,
    is_causal: bool,
    window_left: int,
    window_right: int,
    return_softmax: bool,
    block_tables: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    out = _dense(query, key, value, softmax_scale, is_causal, window_left, window_right, 0.0)
    return out, torch.zeros(query.shape[0], query.shape[2], query.shape[1]), torch.zeros(2, dtype=torch.int64)


@xformers_forward.register_fake
def _(query: Any, *_: Any) -> Any:
    lse = torch.empty(query.shape[0], query.shape[2], query.shape[1])
    return torch.empty_like(query), lse, torch.empty(2, dtype=torch.int64)


def memory_efficient_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float | None = None, causal: bool = False
) -> torch.Tensor:
    """[B, L, H, D], as xformers' function of this name dispatches it to its flash op."""
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    length = query.shape[1]
    return torch.ops.xformers_flash.flash_fwd(
        query, key, value, None, None, None, length, key.shape[1], 0.0, scale, causal, -1, -1, False, None
    )[0]
