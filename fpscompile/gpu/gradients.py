"""Gradients on a GPU: runs the kernels of ``templates/triton/attention_backward.py.jinja``.

One kernel walks the key units of each block of queries and makes dq; another walks the query units of each block of
keys and makes dk and dv. Nothing is added atomically, so equal inputs give equal bits. Gradients are those that
:mod:`fpscompile.reference` states.

``quant="fp8"``: scores come from the forward's own FP8 operands, which the pre-pass makes again. All other products
take bfloat16: FP8 values are exact in it, their scales go into float32 factors, but V's into dO, which is rounded
once for both kernels. dq's kernel sweeps the keys twice, first for ``delta = rowsum(P * dP)`` and for the running
maximum of each row after each rounding block; with the latter the second kernel repeats the rounding of P that dv
asks for. ``out`` is not read, since it does not come from the softmax that delta belongs to. Against the gather
lowering, which does all this in float32, gradients differ by 3e-3 (relative, in norm). What the kernels hand over is
held for some heads at a time: :data:`WORKSPACE_BYTES`.

``quant="none"``: products take the inputs' dtype, and ``delta = rowsum(dO * out)``, which saves a sweep. Where all keys
have a large part in common, the rounding of a bfloat16 ``out`` enters dq times that part, as that of dS does anyway:
its error is then up to 1.9 times that with an exact delta (4e-3 to 5e-3 instead of 3e-3 with a common part of 1.5
standard deviations, 1.4e-2 to 1.9e-2 instead of 1e-2 with one of 6). A float32 ``out`` is as good as exact.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from fpscompile.errors import UnsupportedError
from fpscompile.gpu import operands, render
from fpscompile.gpu.binary import refuse_damaged
from fpscompile.gpu.call import head_strides, launching, phase_tensor, spec_of, why_not
from fpscompile.gpu.config import padded
from fpscompile.gpu.operands import KeyBias, Packed
from fpscompile.gpu.tables import Tables, in_slots, of_tokens, tables_of
from fpscompile.hadamard import unrotate
from fpscompile.kernel_spec import KernelSpec
from fpscompile.masks import BlockMask
from fpscompile.plan import ResolvedPlan

PACKED_ROWS = 32
"""Rows of dO that one program packs; with 64 rows of 96 features, Triton 3.6 spills on sm_100."""

WORKSPACE_BYTES = 256 << 20
"""Memory aimed at for what the two FP8 kernels hand over; a single key head and batch element may exceed it."""


@dataclass(frozen=True)
class GradientConfig:
    """One way to launch the two kernels. Results do not depend on it beyond rounding."""

    dq_rows: int
    """Query slots per program of dq; capped by the slots of a tile."""
    dq_keys: int
    """Key slots per step of dq; capped by the plan's rounding block."""
    dq_warps: int
    dq_stages: int
    dk_keys: int
    """Key slots per program of dk, dv; capped by the slots of a unit."""
    dk_rows: int
    """Query slots per step of dk, dv."""
    dk_warps: int
    dk_stages: int


_FITTING = {
    # Up to 64, 128 and 256 features: blocks that neither spill registers nor exceed shared memory.
    ("wgmma", "none"): ((128, 64, 8, 2, 128, 64, 8, 2), (128, 64, 8, 2, 128, 64, 8, 2), (128, 32, 8, 2, 64, 32, 8, 2)),
    ("wgmma", "fp8"): ((128, 64, 8, 2, 128, 64, 8, 2), (128, 64, 8, 2, 128, 64, 8, 2), (32, 32, 8, 2, 64, 16, 8, 1)),
    ("tcgen05", "none"): ((64, 64, 8, 2, 128, 64, 8, 2), (64, 64, 8, 2, 128, 64, 8, 2), (64, 32, 8, 2, 64, 32, 8, 2)),
    ("tcgen05", "fp8"): ((128, 64, 8, 2, 128, 64, 8, 2), (128, 64, 8, 2, 128, 64, 8, 2), (64, 32, 8, 2, 64, 16, 8, 2)),
    ("mma", "none"): ((128, 64, 8, 2, 128, 64, 8, 2), (128, 32, 8, 2, 64, 64, 8, 2), (64, 16, 8, 2, 32, 32, 8, 1)),
    ("mma", "fp8"): ((128, 32, 8, 2, 128, 32, 8, 2), (64, 32, 8, 2, 64, 64, 8, 2), (64, 32, 8, 2, 32, 32, 8, 2)),
    ("mfma", "none"): ((128, 64, 8, 2, 64, 32, 4, 2), (64, 32, 4, 2, 32, 32, 4, 2), (32, 16, 4, 2, 32, 16, 4, 2)),
    ("mfma", "fp8"): ((128, 32, 8, 2, 128, 32, 8, 2), (64, 32, 4, 2, 32, 32, 4, 2), (32, 16, 4, 2, 32, 16, 4, 2)),
    ("fma", "none"): ((64, 32, 8, 2, 64, 32, 8, 2), (32, 16, 4, 2, 16, 32, 4, 2), (16, 16, 4, 2, 16, 16, 8, 2)),
    ("hip fma", "none"): ((64, 32, 8, 2, 32, 32, 4, 2), (32, 32, 4, 2, 16, 16, 4, 2), (16, 16, 4, 2, 16, 16, 4, 2)),
}

_CROWDED = {
    # The same, where a mask, a scale per run of slots, grouped queries or small tiles take registers too.
    ("wgmma", "fp8", 1): (128, 32, 8, 2, 128, 32, 8, 2),
    ("tcgen05", "fp8", 1): (128, 32, 8, 2, 64, 32, 8, 2),
    ("mma", "none", 0): (128, 64, 8, 2, 128, 32, 8, 2),
    ("mma", "fp8", 0): (128, 32, 8, 2, 64, 32, 8, 2),
}


def default_config(spec: KernelSpec) -> GradientConfig:
    """The config where nothing has been tuned."""
    if spec.quant == "none" and spec.dtype == "float32":
        unit = "hip fma" if spec.target.startswith("hip:") else "fma"  # tensor cores would drop digits
    elif spec.target == "cuda:90":
        unit = "wgmma"  # multiplies straight from shared memory, and accumulates in registers
    elif spec.target in ("cuda:100", "cuda:103"):
        unit = "tcgen05"  # accumulates in a memory of its own
    elif spec.target.startswith("hip:"):
        unit = "mfma"  # four warps may have twice the registers per lane that eight have
    else:
        unit = "mma"
    dim = max(padded(spec.head_dim), padded(spec.value_dim))
    size = 0 if dim <= 64 else 1 if dim <= 128 else 2
    crowded = spec.key_mask != "none" or (spec.quant == "fp8" and "subtile" in spec.granularities)
    crowded = crowded or spec.tile_slots < spec.block_n or spec.gqa_group > 1
    chosen = _CROWDED.get((unit, spec.quant, size)) if crowded else None
    if crowded and spec.target == "cuda:120" and (spec.quant, size) == ("fp8", 0):
        chosen = (128, 32, 8, 2, 64, 16, 8, 2)  # with steps of 32 queries, sm_120 spills 12 to 24 bytes; sm_89 does not
    grouped, small = spec.gqa_group > 1, spec.tile_slots < spec.block_n
    if (unit, spec.quant, size) == ("wgmma", "none", 1) and (grouped or small):
        # Four warps work on the 64 keys of a small tile; with grouped queries they would spill.
        chosen = (128, 64, 8, 2, 64 if grouped and small else 128, 32, 8, 2)
    if (unit, spec.quant, size) == ("tcgen05", "none", 1) and grouped:
        chosen = (64, 64, 8, 2, 64, 64, 8, 2)
    if unit == "fma" and size == 0 and spec.target not in ("cuda:80", "cuda:89", "cuda:90"):
        chosen = (64, 16, 8, 2, 64, 32, 8, 2)  # with steps of 32 keys, Blackwell's ptxas spills in registers to spare
    return GradientConfig(*(chosen or _FITTING[unit, spec.quant][size]))


def backward(
    grad_out: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    *,
    key_mask: torch.Tensor | None,
    phases: torch.Tensor | tuple[int, ...],
    resolved: ResolvedPlan,
    scale: float,
    block_mask: BlockMask | None = None,
    config: GradientConfig | None = None,
    delta: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of q, k and v in their shapes and dtypes, each the transpose of a contiguous [B, L, H, D].

    Args:
        grad_out: [B, H, Lq, Dv], any strides.
        out, lse: what :func:`fpscompile.lowerings.triton.forward` returned. ``out`` is not read with ``quant="fp8"``.
        config: instead of the rule's; see :func:`default_config`.
        delta: float32 [B, H, Lq], with ``quant="fp8"``: what keys that the block mask does not list, and ``lse`` does
            cover, add to rowsum(P * dP), which is there afterwards.
        The rest as in the forward.

    Raises:
        UnsupportedError: as the forward.
    """
    reason = why_not(q.dtype, q.shape[-1], v.shape[-1], resolved.plan, q.device)
    if reason is not None:
        raise UnsupportedError(f"lowering 'triton': {reason}; choose lowering='boxes' (or 'gather' with quant='fp8')")
    spec = spec_of(q, k, v, key_mask, resolved)
    config = config or default_config(spec)
    dq, dk, dv = (x.new_empty(x.shape[0], x.shape[2], x.shape[1], x.shape[3]) for x in (q, k, v))
    if lse.numel() == 0 or k.shape[2] == 0:
        return dq.zero_().transpose(1, 2), dk.zero_().transpose(1, 2), dv.zero_().transpose(1, 2)
    if spec.hadamard:  # the kernels' products are those of rotated tokens
        dq, dk = (x.new_empty(*x.shape[:3], spec.product_dim, dtype=torch.float32) for x in (dq, dk))
    phase = phase_tensor(phases, q.device)
    tables = tables_of(resolved, q.device, block_mask)
    grad_out, lse = grad_out.to(q.dtype), lse.contiguous()
    with launching(q.device):
        packed = None
        if spec.quant == "fp8":
            granularities = tuple(phase.granularity for phase in resolved.plan.phases)
            packed = operands.pack(q, k, v, key_mask, phase, spec, tables, granularities, scale)
        bias = None if key_mask is None else operands.key_bias(key_mask, tables)
        slot_delta = None if delta is None else in_slots(delta, tables.q_token, 0.0)
        for launch in launches(
            grad_out, q, k, v, out, lse, dq, dk, dv, packed, bias, phase, tables, spec, config, scale, slot_delta
        ):
            refuse_damaged(launch.kernel[launch.grid](*launch.args, **launch.options))
        if delta is not None and slot_delta is not None:
            delta.copy_(of_tokens(slot_delta, tables.q_token, q.shape[2]))
    if spec.hadamard:
        dq, dk = (unrotate(x, q.shape[-1]).to(q.dtype).contiguous() for x in (dq, dk))
    return dq.transpose(1, 2), dk.transpose(1, 2), dv.transpose(1, 2)


class Launch(NamedTuple):
    """One launch of a kernel."""

    kernel: Any
    grid: tuple[int, int]
    args: tuple[Any, ...]
    options: dict[str, int]


def launches(
    grad_out: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    dq: torch.Tensor,
    dk: torch.Tensor,
    dv: torch.Tensor,
    packed: Packed | None,
    bias: KeyBias | None,
    phase: torch.Tensor,
    tables: Tables,
    spec: KernelSpec,
    config: GradientConfig,
    scale: float,
    shared_delta: torch.Tensor | None = None,
) -> Iterator[Launch]:
    """What :func:`backward` runs, in order; dq, dk and dv are contiguous [B, L, H, D], rotated (and float32)
    where the spec rotates Q and K.

    ``shared_delta``, [B, H, query slots]: what other keys add to delta; the sum is there afterwards.

    Tensors may be on the meta device, for a compiler that looks at launches without a GPU.
    """
    module = render.load("attention_backward", dataclasses.replace(spec, backward=True))
    batch, heads, length, _ = q.shape
    key_heads, k_length = k.shape[1:3]
    group = heads // key_heads
    keys, queries = tables.keys, tables.queries
    lse2 = lse.new_empty(batch, heads, tables.q_slots)
    delta = torch.empty_like(lse2) if shared_delta is None else shared_delta

    # A block never leaves its tile, a block of keys not even its unit. With FP8, dk and dv read what dq leaves behind
    # for every slot of a listed unit.
    dq_rows = min(config.dq_rows, tables.slots & -tables.slots)
    dk_keys = min(config.dk_keys, tables.unit)
    q_blocks, k_blocks = tables.query_blocks(dq_rows, whole_units=True), tables.key_blocks(dk_keys)
    dq_options = {"BLOCK_M": dq_rows, "BLOCK_N": min(config.dq_keys, spec.block_n), "num_stages": config.dq_stages}
    dk_options = {"BLOCK_M": config.dk_rows, "BLOCK_N": dk_keys, "num_stages": config.dk_stages}
    dq_options["num_warps"] = _warps(config.dq_warps, config.dq_rows, dq_rows)
    dk_options["num_warps"] = _warps(config.dk_warps, config.dk_keys, dk_keys)

    pairs = at_once = batch * key_heads
    dq_inputs: tuple[Any, ...]
    dk_inputs: tuple[Any, ...]
    if packed is None:
        strides = (*q.stride(), *k.stride(), *v.stride())
        dq_inputs = (q, k, v, grad_out, lse, dq, lse2, delta, *grad_out.stride())
        dq_inputs += (out, *out.stride(), tables.k_token, *strides)
        dk_inputs = (q, k, v, grad_out, lse2, delta, dk, dv, *grad_out.stride(), tables.q_token, *strides)
    else:
        blocks = -(-keys.index.shape[-1] * tables.unit // spec.block_n)
        dvp = packed.v.shape[2]
        size = group * tables.q_slots * (4 * blocks + 2 * dvp) + 2 * dvp * tables.k_slots
        at_once = max(1, min(pairs, WORKSPACE_BYTES // size))
        at_once = -(-pairs // -(-pairs // at_once))  # as even as possible
        grad8 = torch.empty(at_once * group, tables.q_slots, dvp, dtype=torch.bfloat16, device=q.device)
        running = lse.new_empty(at_once * group, blocks, tables.q_slots)
        scales = (packed.q_scale, packed.k_scale, packed.v_scale)
        dq_inputs = (packed.q, packed.k, packed.v, grad8, lse, dq, lse2, delta)
        dq_inputs += (*scales[:2], packed.lse_shift, running, blocks)
        v16 = torch.empty(at_once, dvp, tables.k_slots, dtype=torch.bfloat16, device=q.device)
        dq_options["SHARED"] = shared_delta is not None
        dk_inputs = (packed.q, packed.k, v16, grad8, lse2, delta, dk, dv, *scales, running, blocks, _ranks(tables))
    if bias is not None:
        dq_inputs += (bias.bias, bias.state, *head_strides(bias.bias), *head_strides(bias.state))
        dk_inputs += (bias.bias, *head_strides(bias.bias))
    dq_inputs += (keys.count, keys.index, keys.valid, q_blocks, tables.q_token, phase)
    dk_inputs += (queries.count, queries.index, queries.valid, k_blocks, tables.k_token, phase)
    slots = (tables.q_slots, tables.k_slots)
    ends = (keys.count.shape[0], batch // phase.numel(), scale)
    for first in range(0, pairs, at_once):
        some = min(at_once, pairs - first)
        if packed is not None:
            v16[:some].copy_(packed.v.flatten(0, 1)[first : first + some])
            args = (grad_out, packed.v_scale, grad8, q_blocks, tables.q_token, *grad_out.stride())
            args += (first, heads, tables.q_slots)
            rows = min(dq_rows, PACKED_ROWS)
            pack_options = {"BLOCK_M": dq_rows, "ROWS": rows}
            yield Launch(module.pack_gradients, (len(q_blocks) * (dq_rows // rows), some * group), args, pack_options)
        sizes = (first, heads, length, *slots, keys.count.shape[2], keys.count.shape[1], keys.index.shape[-1])
        yield Launch(module.query_gradients, (len(q_blocks), some * group), (*dq_inputs, *sizes, *ends), dq_options)
        sizes = (first, key_heads, k_length, *slots, queries.count.shape[2], queries.count.shape[1],
                 queries.index.shape[-1])  # fmt: skip
        yield Launch(module.key_gradients, (len(k_blocks), some), (*dk_inputs, *sizes, *ends), dk_options)


def _warps(warps: int, planned: int, rows: int) -> int:
    """A block capped to 64 rows is one warpgroup's; two of them would split its columns and serialize on Hopper."""
    return min(warps, 4) if rows == 64 < planned else warps


def _ranks(tables: Tables) -> torch.Tensor:
    """int32, shaped like ``tables.queries.index``: where, in the list of the entry's query tile, the units of this
    key tile begin. Past the count: anything in range."""
    return tables.keep("ranks", lambda: _make_ranks(tables))


def _make_ranks(tables: Tables) -> torch.Tensor:
    keys, queries, per_tile = tables.keys, tables.queries, tables.slots // tables.unit
    k_tiles = queries.count.shape[2]
    index = keys.index.long()
    place = torch.arange(index.shape[-1], device=index.device).expand_as(index)
    begins = (index % per_tile == 0) & (place < keys.count[..., None])
    rank = index.new_zeros(*index.shape[:3], k_tiles + 1)  # the last one: entries that begin no tile
    rank.scatter_(-1, torch.where(begins, index // per_tile, k_tiles), place)
    rank = rank[..., :k_tiles].mT.gather(-1, queries.index.long() // per_tile)
    return rank.to(torch.int32).contiguous()
