"""The generated Triton kernels: FP8 per 3D tile or unquantized, block-sparse, on a GPU.

``quant="fp8"``: a pre-pass smooths, rotates, quantizes and permutes q, k and v into slot order; one kernel attends over
the listed key units and scatters its rows back to the sequence. ``quant="none"``: the kernel gathers rows itself. The
phase is read on the device, so a call never waits for the GPU and a captured CUDA graph follows the denoising step.

Without a GPU the same kernels run in Triton's interpreter (``TRITON_INTERPRET=1``, set before the process starts):
slow, and meant for tests and readers.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch

from fpscompile.errors import UnsupportedError
from fpscompile.gpu import gradients, hopper, operands, render
from fpscompile.gpu.binary import refuse_damaged
from fpscompile.gpu.call import head_strides, launching, phase_tensor, spec_of, why_not
from fpscompile.gpu.config import KernelConfig, default_config, padded, rows_of, why_invalid
from fpscompile.gpu.tables import Tables, tables_of
from fpscompile.kernel_spec import KernelSpec
from fpscompile.masks import BlockMask
from fpscompile.plan import ResolvedPlan

PHASES_ON_DEVICE = True
"""``phases`` is an int32 tensor on the device; kernels clamp it into range."""


def forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    key_mask: torch.Tensor | None,
    phases: torch.Tensor | tuple[int, ...],
    resolved: ResolvedPlan,
    scale: float,
    block_mask: BlockMask | None = None,
    config: KernelConfig | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention under the plan's block mask; shapes and layouts are in :mod:`fpscompile.lowerings`.

    Args:
        phases: int32 [n] on the device, B a multiple of n; or one int per batch element.
        block_mask: instead of the plan's.
        config: instead of the plan's, or of the rule's; see :func:`fpscompile.gpu.config.default_config`.

    Raises:
        UnsupportedError: float64, a head dim above 256, FP8 on a GPU without FP8, no GPU, or a config that this call
            cannot have (:func:`fpscompile.gpu.config.why_invalid`).
    """
    reason = why_not(q.dtype, q.shape[-1], v.shape[-1], resolved.plan, q.device)
    if reason is not None:
        raise UnsupportedError(f"lowering 'triton': {reason}; choose lowering='boxes' (or 'gather' with quant='fp8')")
    q, scale = _positive(q, scale)
    spec = spec_of(q, k, v, key_mask, resolved)
    config = _valid(config or resolved.plan.config_as(KernelConfig) or config_of(spec, q.device), spec, q.device)
    batch, heads, length, _ = q.shape
    out = q.new_empty(batch, length, heads, v.shape[-1])
    lse = q.new_empty(batch, heads, length, dtype=torch.float32)
    if out.numel() == 0:
        return out.transpose(1, 2), lse
    if k.shape[2] == 0:
        return out.zero_().transpose(1, 2), lse.fill_(float("-inf"))
    phase = phase_tensor(phases, q.device)
    tables = tables_of(resolved, q.device, block_mask)
    pieces = _pieces(q, k, phase, spec, tables, resolved, config)
    statistics = None
    if len(pieces) > 1:  # the heads of a piece are too few programs for a GPU's memory to be busy with
        with launching(q.device):
            statistics = operands.statistics_of(q, k, v, key_mask, spec)
    for at in pieces:
        mask = None if key_mask is None else at.of_mask(key_mask)
        known = None if statistics is None else at.of_statistics(statistics)
        _attend(
            at.of(q), at.of_keys(k), at.of_keys(v), mask, at.of_phase(phase), resolved, tables, spec, config, scale,
            known, at.of(out.transpose(1, 2)), at.of(lse),
        )  # fmt: skip
    return out.transpose(1, 2), lse


WHOLE_BYTES = 384 << 20
"""FP8 copies up to this size are made all at once."""

PIECE_BYTES = 320 << 20
"""Larger ones are made in pieces of about this size, if they can be."""


@dataclass(frozen=True)
class _Piece:
    """Batch elements and heads of a call that are quantized and attended to by themselves."""

    batch: slice
    heads: slice
    key_heads: slice
    per_sample: int
    """Batch elements that share an entry of the phase tensor."""

    def of(self, x: torch.Tensor) -> torch.Tensor:
        return x[self.batch, self.heads]

    def of_keys(self, x: torch.Tensor) -> torch.Tensor:
        return x[self.batch, self.key_heads]

    def of_statistics(self, known: operands.Statistics) -> operands.Statistics:
        k_mean, v_mean, v_scale = (None if x is None else self.of_keys(x).contiguous() for x in known)
        assert v_scale is not None
        return k_mean, v_mean, v_scale

    def of_mask(self, x: torch.Tensor) -> torch.Tensor:
        return x[self.batch if x.shape[0] > 1 else slice(None), self.heads if x.shape[1] > 1 else slice(None)]

    def of_phase(self, phase: torch.Tensor) -> torch.Tensor:
        if self.batch == slice(None):
            return phase
        # A copy, since kernels are compiled anew for an address of another alignment.
        return phase[self.batch.start // self.per_sample :][:1].clone()


def _pieces(
    q: torch.Tensor,
    k: torch.Tensor,
    phase: torch.Tensor,
    spec: KernelSpec,
    tables: Tables,
    resolved: ResolvedPlan,
    config: KernelConfig,
) -> tuple[_Piece, ...]:
    """Some heads of a large call at a time, so that only their FP8 copies exist beside q, k, v and the output.

    With all of them, attention would need more memory than dense attention does. A piece is a batch element or, of the
    only one, as many heads as PIECE_BYTES allow; each still fills a GPU many times over. Whatever must be seen as a
    whole stays whole: a scale of all heads, and lists of units that differ by head.
    """
    batch, key_heads = k.shape[:2]
    group = q.shape[1] // key_heads
    per_sample = batch // phase.numel()
    size = q.shape[1] * tables.q_slots * padded(spec.head_dim)
    size += key_heads * tables.k_slots * (padded(spec.head_dim) + padded(spec.value_dim))
    whole = slice(None)
    all_heads = any(part.granularity == "tensor" for part in resolved.plan.phases) or tables.keys.count.shape[1] > 1
    if spec.quant == "fp8" and batch * size > WHOLE_BYTES:
        if batch > 1:
            return tuple(_Piece(slice(b, b + 1), whole, whole, per_sample) for b in range(batch))
        if not all_heads:
            programs = group * len(tables.query_blocks(rows_of(config, spec)))
            each = _heads_of_piece(
                key_heads, max(1, PIECE_BYTES * key_heads // size), programs, _at_once(config, spec, q.device)
            )
            parts = (slice(first, min(first + each, key_heads)) for first in range(0, key_heads, each))
            return tuple(_Piece(whole, slice(x.start * group, x.stop * group), x, per_sample) for x in parts)
    return (_Piece(whole, whole, whole, per_sample),)


def _heads_of_piece(heads: int, most: int, programs: int, at_once: int) -> int:
    """Heads per piece: as few pieces of at most ``most`` heads as possible, and of those divisions the one with the
    fewest rounds of ``at_once`` programs, since each piece ends with a round that is not full.

    >>> _heads_of_piece(40, 11, 600, 132), _heads_of_piece(40, 11, 600, 1)
    (11, 10)
    """
    most = min(most, heads)
    even = -(-heads // -(-heads // most))

    def rounds(each: int) -> int:
        return heads // each * -(-each * programs // at_once) + -(-(heads % each) * programs // at_once)

    return min(range(even, most + 1), key=rounds)


@functools.lru_cache(maxsize=256)
def _at_once(config: KernelConfig, spec: KernelSpec, device: torch.device) -> int:
    """Programs that a GPU runs side by side; 1 where that is not known without the binary."""
    if config.variant != "hopper" or device.type != "cuda":
        return 1
    each = hopper.default_programs(
        padded(spec.head_dim), padded(spec.value_dim), -(-config.block_m // 64), getattr(torch, spec.dtype).itemsize
    )
    return each * torch.cuda.get_device_properties(device).multi_processor_count


def _attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    key_mask: torch.Tensor | None,
    phase: torch.Tensor,
    resolved: ResolvedPlan,
    tables: Tables,
    spec: KernelSpec,
    config: KernelConfig,
    scale: float,
    statistics: operands.Statistics | None,
    out: torch.Tensor,
    lse: torch.Tensor,
) -> None:
    """Fill ``out`` [B, H, Lq, Dv] and ``lse``, parts of the call's."""
    out = out.transpose(1, 2)
    with launching(q.device):
        bias = None if key_mask is None else operands.key_bias(key_mask, tables)
        packed = None
        if spec.quant == "fp8":
            granularities = tuple(part.granularity for part in resolved.plan.phases)
            packed = operands.pack(q, k, v, key_mask, phase, spec, tables, granularities, scale, statistics=statistics)
        if config.variant == "hopper":
            kernel = render.load("attention_hopper", spec, config)
            for compiled in hopper.launch(
                kernel, packed, tables, tables.query_blocks(config.block_m), phase, out, lse,
                scale, bias=bias, block_n=spec.block_n, p_shift=math.log2(spec.p_scale), padding=tables.keys.padding,
                consumers=-(-config.block_m // 64), stages=config.num_stages or None,
            ):  # fmt: skip
                refuse_damaged(compiled)
        else:
            inputs: tuple[object, ...] = (q, k, v, out, lse, tables.k_token, *q.stride(), *k.stride(), *v.stride())
            if packed is not None:
                inputs = (packed.q, packed.k, packed.v, out, lse)
                inputs += (packed.q_scale, packed.k_scale, packed.v_scale, packed.v_mean, packed.lse_shift)
            if bias is not None:
                inputs += (bias.bias, bias.state, *head_strides(bias.bias), *head_strides(bias.state))
            _launch(spec, config, inputs, tables, phase, out, scale)


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
    delta: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of q, k and v; see :mod:`fpscompile.gpu.gradients`."""
    return gradients.backward(
        grad_out, q, k, v, out, lse,
        key_mask=key_mask, phases=phases, resolved=resolved, scale=scale, block_mask=block_mask, delta=delta,
    )  # fmt: skip


def _launch(
    spec: KernelSpec,
    config: KernelConfig,
    inputs: tuple[object, ...],
    tables: Tables,
    phase: torch.Tensor,
    out: torch.Tensor,
    scale: float,
) -> None:
    module = render.load("attention", spec, config)
    batch, length, heads, _ = out.shape
    blocks = tables.query_blocks(int(module.BLOCK_M.value))
    keys = tables.keys
    compiled = module.attention_forward[(len(blocks), heads, batch)](
        *inputs, keys.count, keys.index, keys.valid, blocks, tables.q_token, phase,
        heads, length, out.stride(1), tables.q_slots, tables.k_slots, keys.count.shape[2],
        keys.count.shape[1], keys.index.shape[-1], keys.count.shape[0], batch // phase.numel(), scale,
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    refuse_damaged(compiled)


def _valid(config: KernelConfig, spec: KernelSpec, device: torch.device) -> KernelConfig:
    """The config; a plan's may be of another call, with fewer features or without a mask."""
    unfit = why_invalid(config, spec) if device.type != "cpu" else None  # the interpreter has no limits
    if unfit is not None:
        raise UnsupportedError(
            f"lowering 'triton': {config} cannot run this call on {spec.target}: {unfit}; tune this call, or choose "
            "lowering='boxes' (or 'gather' with quant='fp8')"
        )
    return config


def config_of(spec: KernelSpec, device: torch.device) -> KernelConfig:
    """The config where nothing has been tuned: on a Hopper GPU the warp-specialized kernel, wherever it can run.

    What the cost model ranks first, or within 3 % of it (``tests/gpu/test_cost_model.py``), without its compilations.
    """
    if device.type == "cuda" and hopper.why_not(spec) is None:
        rows = min(64 * hopper.default_consumers(spec.tile_slots), spec.tile_slots)
        return KernelConfig(block_m=rows, num_warps=4, num_stages=0, variant="hopper")
    return default_config(spec)


def _positive(q: torch.Tensor, scale: float) -> tuple[torch.Tensor, float]:
    """The same scores with a positive factor: kernels take row maxima before they scale."""
    if scale > 0:
        return q, scale
    return (q * 0.0, 1.0) if scale == 0 else (-q, -scale)
