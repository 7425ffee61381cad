# ruff: noqa: N803 (names of sizes are capitals, as in the other kernels)
"""One kernel for :mod:`fpscompile.remainder` on a GPU: attention to the means of dropped tiles, merged into ``out`` and
``lse`` where they lie.

A program owns some queries of one tile, for which one row of the table tells all the means to leave out. Nothing is
allocated, and the phase is read on the device.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fpscompile.gpu.call import head_strides, launching, phase_tensor
from fpscompile.gpu.config import padded
from fpscompile.gpu.tables import tables_of
from fpscompile.plan import ResolvedPlan

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit(do_not_specialize=["H", "N", "q_tiles", "phases", "phase_group", "mask_heads"])
def _add_means(  # type: ignore[no-untyped-def]
    q_ptr, k_ptr, v_ptr, count_ptr, dropped_ptr, out_ptr, lse_ptr, q_blocks_ptr, q_token_ptr, phase_ptr,
    q_sb, q_sh, q_sl, q_sd, out_sb, out_sh, out_sl, count_sb, count_sh,
    H, Lq, N, q_tiles, mask_heads, phases, phase_group, softmax_scale,
    GROUP: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, DP: tl.constexpr, DVP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Grid: (query blocks, H, B). k [B, H / GROUP, N, D], v and lse [B, H, Lq] contiguous, count float32 [.., .., N],
    dropped uint8 [phases, mask_heads, q_tiles, N]."""
    block, h, b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    tile = tl.load(q_blocks_ptr + block * 3)
    first = tl.load(q_blocks_ptr + block * 3 + 1)
    rows = tl.load(q_blocks_ptr + block * 3 + 2)
    phase = tl.load(phase_ptr + b // phase_group)
    phase = tl.minimum(tl.maximum(phase, 0), phases - 1)
    line = (phase * mask_heads + tl.where(mask_heads > 1, h, 0)) * q_tiles + tile
    dropped_ptr += line.to(tl.int64) * N
    count_ptr += b * count_sb + h * count_sh
    key_head = b * (H // GROUP) + h // GROUP
    offs_m, offs_n = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    offs_d, offs_dv = tl.arange(0, DP), tl.arange(0, DVP)
    held = offs_m < rows
    token = tl.load(q_token_ptr + first + offs_m, mask=held, other=0).to(tl.int64)
    q_at = q_ptr + b * q_sb + h.to(tl.int64) * q_sh + token[:, None] * q_sl + offs_d[None, :].to(tl.int64) * q_sd
    q = tl.load(q_at, mask=held[:, None] & (offs_d < D)[None, :], other=0.0)
    m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    l = tl.zeros([BLOCK_M], tl.float32)  # noqa: E741
    acc = tl.zeros([BLOCK_M, DVP], tl.float32)
    for start in range(0, N, BLOCK_N):
        at = start + offs_n
        inside = at < N
        dropped = tl.load(dropped_ptr + at, mask=inside, other=0)
        count = tl.load(count_ptr + at, mask=inside, other=float("-inf"))
        bias = tl.where(dropped != 0, count * LOG2E, float("-inf"))
        if tl.max(bias, 0) > float("-inf"):
            row = (key_head * N + at)[:, None]
            k = tl.load(k_ptr + row * D + offs_d[None, :], mask=inside[:, None] & (offs_d < D)[None, :], other=0.0)
            v = tl.load(v_ptr + row * DV + offs_dv[None, :], mask=inside[:, None] & (offs_dv < DV)[None, :], other=0.0)
            s = tl.dot(q, tl.trans(k)) * (softmax_scale * LOG2E) + bias[None, :]
            m_new = tl.maximum(m, tl.max(s, 1))
            p = tl.exp2(s - m_new[:, None])
            alpha = tl.exp2(m - m_new)
            l = l * alpha + tl.sum(p, 1)  # noqa: E741
            acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None])
            m = m_new
    if tl.max(l, 0) > 0.0:  # a tile that drops nothing leaves its rows alone
        lse_at = lse_ptr + (b * H + h) * Lq + token
        lse = tl.load(lse_at, mask=held, other=0.0)
        mine = (m + tl.log2(l)) * LN2
        top = tl.maximum(lse, mine)
        whole = top + tl.log(tl.exp(lse - top) + tl.exp(mine - top))
        share = tl.exp(mine - whole)
        tl.store(lse_at, whole, mask=held)
        out_at = out_ptr + b * out_sb + h.to(tl.int64) * out_sh + token[:, None] * out_sl + offs_dv[None, :]
        out_held = held[:, None] & (offs_dv < DV)[None, :]
        out = tl.load(out_at, mask=out_held, other=0.0).to(tl.float32)
        out += share[:, None] * (acc / l[:, None] - out)
        tl.store(out_at, out.to(out_ptr.dtype.element_ty), mask=out_held)


def add(
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    log_count: torch.Tensor,
    dropped: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    phases: torch.Tensor | tuple[int, ...],
    resolved: ResolvedPlan,
    scale: float,
) -> None:
    """Into ``out`` and ``lse``, what :func:`fpscompile.remainder.add` adds.

    Args:
        q: [B, H, Lq, D] in half precision, any strides.
        keys, values: means [B, Hk | H, N, D | Dv].
        log_count: float32 [B | 1, H | 1, N], log of the tokens of each tile.
        dropped: bool [phases, 1 | H, q_tiles, N], other tokens' tiles among the rows.
        out: [B, H, Lq, Dv], the transpose of a contiguous tensor.
        lse: float32 [B, H, Lq].
    """
    batch, heads, length, dim = q.shape
    value_dim = values.shape[-1]
    tables, phase = tables_of(resolved, q.device), phase_tensor(phases, q.device)
    width = max(padded(dim), padded(value_dim))
    rows = min(128 if width <= 128 else 64, tables.slots & -tables.slots)
    blocks = tables.query_blocks(rows)
    with launching(q.device):
        _add_means[(len(blocks), heads, batch)](
            q, keys.contiguous(), values.contiguous(), log_count, dropped.view(torch.uint8), out, lse, blocks,
            tables.q_token, phase, *q.stride(), *out.stride()[:3], *head_strides(log_count),
            heads, length, keys.shape[2], dropped.shape[2], dropped.shape[1], len(dropped), batch // phase.numel(),
            scale,
            GROUP=heads // keys.shape[1], D=dim, DV=value_dim, DP=padded(dim), DVP=padded(value_dim),
            BLOCK_M=rows, BLOCK_N=64 if width <= 128 else 32, num_warps=8 if rows == 128 else 4, num_stages=2,
        )  # fmt: skip
