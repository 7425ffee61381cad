"""Boxes: block-sparse attention with product windows as a few dense attentions, in pure torch on any device.

Windows are clamped at the borders of the grid, so along each axis consecutive query tiles often share one range of
keys: a run. A product of three runs is a *box*: a 3D box of queries that all see the same 3D box of keys. One dense
attention per box computes it exactly. Tokens outside the video see everything (one more dense attention for each end
of the sequence) and are seen by every box.

Boxes are walked in *columns* (:mod:`fpscompile.lowerings.columns`): along one axis, with the runs of the other two
held fixed. A column's keys and values are copied once, with its axis outermost, so every box in it finds its keys as
one contiguous slice; the order of the keys does not matter to attention. Boxes of one size a constant step apart are
overlapping views of the buffer, and go into one call as its batch: few long calls lose less to waiting threads than
many short ones. With tokens outside the video, boxes go one by one: those tokens are written just ahead of the box's
slice, over keys which no later box of the column needs. At most one column of keys and values and the queries of one
call (a box, or ``BATCH_TOKENS`` of several) are copied at a time.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch

from fpscompile.errors import UnsupportedError
from fpscompile.lowerings import dense
from fpscompile.lowerings.columns import KeyColumn, columns, other_rows, video_view
from fpscompile.plan import ResolvedPlan
from fpscompile.tiling import TileLayout


def forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    key_mask: torch.Tensor | None,
    phases: tuple[int, ...],
    resolved: ResolvedPlan,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention under the plan's windows; shapes and layouts are in :mod:`fpscompile.lowerings`.

    Raises:
        UnsupportedError: a quantized plan.
    """
    _check(resolved)
    bias = _as_bias(key_mask, q.dtype)
    groups = _groups(phases)
    if len(groups) == 1 and _is_dense(resolved, phases[0]):
        out, lse = dense.forward(q, k, v, bias, scale)
        return out.transpose(1, 2).contiguous().transpose(1, 2), lse.contiguous()

    batch, heads, length, _ = q.shape
    out = q.new_empty(batch, length, heads, v.shape[-1]).transpose(1, 2)
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    lse = q.new_empty(batch, heads, length, dtype=wide)
    for part, phase in groups:
        one = (q[part], k[part], v[part], out[part], lse[part], _batch_of(bias, part))
        if _is_dense(resolved, phase):
            _forward_rows(*one, slice(None), scale)
        else:
            _forward_boxes(*one, resolved, phase, scale)
    return out, lse


def _forward_rows(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    bias: torch.Tensor | None,
    rows: slice,
    scale: float,
) -> None:
    """Queries that see every key."""
    out[:, :, rows], lse[:, :, rows] = dense.forward(q[:, :, rows], k, v, bias, scale)


def _forward_boxes(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    bias: torch.Tensor | None,
    resolved: ResolvedPlan,
    phase: int,
    scale: float,
) -> None:
    for rows in other_rows(resolved.q_layout):
        _forward_rows(q, k, v, out, lse, bias, rows, scale)
    q_video, out_video, lse_video = (video_view(x, resolved.q_layout) for x in (q, out, lse[..., None]))
    keys, values = KeyColumn(k, resolved.k_layout), KeyColumn(v, resolved.k_layout)
    biases = _bias_column(bias, q, resolved.k_layout)
    for column in columns(resolved, phase):
        for holder in (keys, values, biases):
            if holder is not None:
                holder.load(column)
        for batch in column.batches(single=keys.others > 0):
            part_out, part_lse = dense.forward(
                batch.take(q_video),
                keys.boxes(batch),
                values.boxes(batch),
                None if biases is None else biases.boxes(batch).mT,
                scale,
            )
            batch.put(out_video, part_out)
            batch.put(lse_video, part_lse[..., None])


def backward(
    grad_out: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    *,
    key_mask: torch.Tensor | None,
    phases: tuple[int, ...],
    resolved: ResolvedPlan,
    scale: float,
) -> dense.Triple:
    """Exact gradients of :func:`forward`. dk and dv add up over boxes in float32 (float64 for float64)."""
    _check(resolved)
    bias = _as_bias(key_mask, q.dtype)
    groups = _groups(phases)
    if len(groups) == 1 and _is_dense(resolved, phases[0]):
        grads = dense.backward(grad_out, q, k, v, out, lse, bias, scale)
        dq, dk, dv = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in grads)
        return dq, dk, dv

    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    dq = _raster_empty(q, q.dtype)
    dk, dv = (_raster_empty(x, wide).zero_() for x in (k, v))
    for part, phase in groups:
        grad = _Gradient(
            grad_out[part],
            q[part],
            k[part],
            v[part],
            out[part],
            lse[part],
            dq[part],
            dk[part],
            dv[part],
            _batch_of(bias, part),
            scale,
        )
        if _is_dense(resolved, phase):
            grad.rows(slice(None))
        else:
            grad.boxes(resolved, phase)
    return dq, dk.to(k.dtype), dv.to(v.dtype)


@dataclass(frozen=True, eq=False)
class _Gradient:
    """Tensors of one batch part; ``dq`` is written, ``dk`` and ``dv`` are added to."""

    grad_out: torch.Tensor
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    out: torch.Tensor
    lse: torch.Tensor
    dq: torch.Tensor
    dk: torch.Tensor
    dv: torch.Tensor
    bias: torch.Tensor | None
    scale: float

    def rows(self, rows: slice) -> None:
        """Queries that see every key."""
        grad_out, q, out, lse = (x[:, :, rows] for x in (self.grad_out, self.q, self.out, self.lse))
        self.dq[:, :, rows], dk, dv = dense.backward(grad_out, q, self.k, self.v, out, lse, self.bias, self.scale)
        self.dk.add_(dk)
        self.dv.add_(dv)

    def boxes(self, resolved: ResolvedPlan, phase: int) -> None:
        q_layout, k_layout = resolved.q_layout, resolved.k_layout
        for rows in other_rows(q_layout):
            self.rows(rows)
        queries = [video_view(x, q_layout) for x in (self.grad_out, self.q, self.out, self.lse[..., None])]
        dq_video = video_view(self.dq, q_layout)
        keys, values = KeyColumn(self.k, k_layout), KeyColumn(self.v, k_layout)
        biases = _bias_column(self.bias, self.q, k_layout)
        d_keys, d_values = (KeyColumn(x, k_layout) for x in (self.dk, self.dv))
        for column in columns(resolved, phase):
            for holder in (keys, values, biases):
                if holder is not None:
                    holder.load(column)
            d_keys.clear(column)
            d_values.clear(column)
            for batch in column.batches(single=keys.others > 0):
                grad_out, q, out, lse = (batch.take(x) for x in queries)
                dq, dk, dv = dense.backward(
                    grad_out,
                    q,
                    keys.boxes(batch),
                    values.boxes(batch),
                    out,
                    lse[..., 0],
                    None if biases is None else biases.boxes(batch).mT,
                    self.scale,
                )
                batch.put(dq_video, dq)
                d_keys.add(batch, dk)
                d_values.add(batch, dv)
            d_keys.store()
            d_values.store()


def _check(resolved: ResolvedPlan) -> None:
    if resolved.plan.quant != "none":
        raise UnsupportedError(
            f"lowering 'boxes' computes in the input dtype, but the plan has quant={resolved.plan.quant!r}: "
            "choose lowering='gather' or quant='none'"
        )


def _is_dense(resolved: ResolvedPlan, phase: int) -> bool:
    """Whether every query sees every key."""
    counts = resolved.q_layout.counts
    return all(width >= count for width, count in zip(resolved.product_window(phase), counts, strict=True))


def _groups(phases: tuple[int, ...]) -> list[tuple[slice, int]]:
    """Neighbouring batch elements of one phase: slices, so nothing is copied."""
    groups = []
    start = 0
    for phase, members in itertools.groupby(phases):
        stop = start + len(list(members))
        groups.append((slice(start, stop), phase))
        start = stop
    return groups


def _as_bias(key_mask: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor | None:
    """The key mask as a term of the scores."""
    if key_mask is None or key_mask.dtype != torch.bool:
        # torch's CPU kernel reads a float32 mask beside float64 queries as if it were float64
        return key_mask.to(dtype) if key_mask is not None and dtype == torch.float64 else key_mask
    return torch.zeros(key_mask.shape, dtype=dtype, device=key_mask.device).masked_fill_(~key_mask, -torch.inf)


def _bias_column(bias: torch.Tensor | None, q: torch.Tensor, layout: TileLayout) -> KeyColumn | None:
    """Holder of [B, H | 1, Lk, 1]; batch and heads are spelled out where their product has to be one dimension."""
    if bias is None:
        return None
    if bias.shape[0] > 1 or bias.shape[1] > 1:
        bias = bias.expand(q.shape[0], q.shape[1], -1, -1)
    return KeyColumn(bias.mT, layout)


def _batch_of(bias: torch.Tensor | None, part: slice) -> torch.Tensor | None:
    return bias if bias is None or bias.shape[0] == 1 else bias[part]


def _raster_empty(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Like ``x`` [B, H, L, D], laid out as the transpose of a contiguous [B, L, H, D]."""
    batch, heads, length, width = x.shape
    return x.new_empty(batch, length, heads, width, dtype=dtype).transpose(1, 2)


__all__ = ["backward", "forward"]
