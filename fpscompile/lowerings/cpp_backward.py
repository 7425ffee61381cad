"""Gradients of the generated C++ kernel, from its output and log-sum-exp, on the same block masks.

Two passes over each head, both on packed copies of one key head and of the query heads that read it: blocks of queries
sum dQ over the keys they list, blocks of keys sum dK and dV over the queries of the transposed mask. No block is
written by two threads, so results do not depend on the number of threads; the price is that S and dP are computed
twice, seven matrix products instead of five.
"""

from __future__ import annotations

import ctypes
import dataclasses
import functools

import torch

from fpscompile import cpp_build
from fpscompile.kernel_spec import KernelSpec
from fpscompile.key_mask import additive
from fpscompile.lowerings.cpp_tables import row_blocks, slot_table
from fpscompile.lowerings.dense import Triple
from fpscompile.masks import BlockMask
from fpscompile.plan import ResolvedPlan
from fpscompile.render import LANES, PANEL, CppConfig, render
from fpscompile.tiling import TileLayout

_SIDE_POINTERS = (
    *("order", "first", "slot", "row_blocks", "counts", "indices"),
    *("features", "values", "feature_rows", "value_rows"),
)
_SIDE_SIZES = ("L", "tiles", "slots", "n_row_blocks", "capacity")
_POINTERS = (
    *("q", "k", "v", "out", "grad_out", "lse", "key_bias", "dq", "dk", "dv"),
    *("slot_bias", "tile_state", "slot_minus_lse", "slot_delta", "phases"),
)
_STRIDES = {"q_stride": "q", "k_stride": "k", "v_stride": "v", "out_stride": "out", "grad_stride": "grad_out"}
_SIZES = ("B", "H", "Hk", "bias_batch", "bias_heads", "mask_heads", "threads")


class _Side(ctypes.Structure):
    """The template's ``struct Side``, field by field."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in _SIDE_POINTERS),
        *((name, ctypes.c_int64) for name in _SIDE_SIZES),
    )


class _Call(ctypes.Structure):
    """The template's ``struct Call``, field by field."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in _POINTERS),
        ("queries", _Side),
        ("keys", _Side),
        *((name, ctypes.c_int64 * 4) for name in _STRIDES),
        *((name, ctypes.c_int64) for name in _SIZES),
        ("scale", ctypes.c_double),
    )


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
    spec: KernelSpec,
    config: CppConfig,
    block_mask: BlockMask | None = None,
) -> Triple:
    """(dq, dk, dv) of unquantized attention; shapes and layouts are in :mod:`fpscompile.lowerings`.

    Args:
        out, lse: of the forward.
        spec: of the forward, with ``quant="none"``.
        config: of this kernel: rows of a block, columns of a block, operands.
        block_mask: instead of the plan's.
    """
    batch, heads, _, head_dim = q.shape
    key_heads, value_dim = k.shape[1], v.shape[-1]
    grads = [x.new_empty(x.shape[0], x.shape[2], x.shape[1], x.shape[3]) for x in (q, k, v)]
    dq, dk, dv = (x.transpose(1, 2) for x in grads)
    if q.numel() == 0 or k.numel() == 0:
        return dq.zero_(), dk.zero_(), dv.zero_()

    mask = (resolved.block_mask if block_mask is None else block_mask).to("cpu")
    transposed = mask.transpose(resolved.k_layout.n_tiles)
    kernel = _kernel(dataclasses.replace(spec, backward=True), config)
    group, packed = heads // key_heads, torch.bfloat16 if config.compute == "bfloat16" else torch.float32
    dims = tuple(-(-dim // LANES) * LANES for dim in (head_dim, value_dim))
    held: list[torch.Tensor] = []  # what the structures point to

    def side(layout: TileLayout, lists: BlockMask, copies: int, value_rows: bool) -> _Side:
        slots, blocks = slot_table(layout, PANEL[config.compute]), row_blocks(layout, config.block_m)
        sizes = [(dims[0], True), (dims[1], True), (dims[0], True), (dims[1], value_rows)]
        buffers = [torch.empty(copies, slots.slots, dim if used else 0, dtype=packed) for dim, used in sizes]
        tables = [layout.order(), slots.first, slots.slot, blocks]
        tables += [lists.kv_num_blocks.contiguous(), lists.kv_indices.contiguous()]
        held.extend(tables + buffers)
        pointers = {name: x.data_ptr() for name, x in zip(_SIDE_POINTERS, tables + buffers, strict=True)}
        counts = (layout.length, layout.n_tiles, slots.slots, len(blocks), lists.kv_indices.shape[-1])
        return _Side(**pointers, **dict(zip(_SIDE_SIZES, counts, strict=True)))

    queries, keys = side(resolved.q_layout, mask, group, True), side(resolved.k_layout, transposed, 1, False)
    bias = None if key_mask is None else additive(key_mask)
    bias_batch, bias_heads = (1, 1) if bias is None else bias.shape[:2]
    tensors = {
        "q": q,
        "k": k,
        "v": v,
        "out": out,
        "grad_out": grad_out,
        "lse": lse.contiguous(),
        "key_bias": bias,
        "dq": grads[0],
        "dk": grads[1],
        "dv": grads[2],
        "slot_bias": torch.empty(bias_batch, bias_heads, keys.slots, dtype=torch.float32),
        "tile_state": torch.empty(bias_batch, bias_heads, keys.tiles, dtype=torch.uint8),
        "slot_minus_lse": torch.empty(group, queries.slots, dtype=torch.float32),
        "slot_delta": torch.empty(group, queries.slots, dtype=torch.float32),
        "phases": torch.tensor(phases, dtype=torch.int64),
    }
    call = _Call(
        **{name: None if x is None else x.data_ptr() for name, x in tensors.items()},
        queries=queries,
        keys=keys,
        **{name: (ctypes.c_int64 * 4)(*tensors[of].stride()) for name, of in _STRIDES.items()},  # type: ignore[union-attr]
        B=batch,
        H=heads,
        Hk=key_heads,
        bias_batch=bias_batch,
        bias_heads=bias_heads,
        mask_heads=mask.kv_num_blocks.shape[1],
        threads=torch.get_num_threads(),
        scale=scale,
    )
    cpp_build.run(kernel, call)
    return dq, dk, dv


@functools.lru_cache(maxsize=256)
def _kernel(spec: KernelSpec, config: CppConfig):  # type: ignore[no-untyped-def]  # a ctypes function pointer
    return cpp_build.entry_point(render(spec, config), "fps_attention_backward", ctypes.sizeof(_Call))
