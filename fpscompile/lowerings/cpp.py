"""The generated C++ kernels: near the machine's peak on a CPU, rows gathered while packing, scattered on the way out.

Keys and values are packed once per call into the form that torch's micro-kernels read; then threads take blocks of
query rows. Beyond inputs and outputs a call holds that one packed copy and a few hundred kilobytes per thread.

The operands of the matrix products, ``Plan.compute``, are float32 or bfloat16; sums are float32. By default float32
and float16 inputs are computed in float32, and bfloat16 in bfloat16 where the processor multiplies it, else in
float32. ``quant="int8"`` is the 8-bit contract of :mod:`fpscompile.quant_int8` on byte products. ``quant="fp8"``
computes what a GPU would: the bytes and scales are those of :mod:`fpscompile.quant`, P is rounded where
:mod:`fpscompile.kernel_spec` says.
"""

from __future__ import annotations

import ctypes
import dataclasses
import functools
from typing import Any

import torch

from fpscompile import cpp_build, quant_int8
from fpscompile.errors import UnsupportedError
from fpscompile.kernel_spec import KernelSpec
from fpscompile.key_mask import additive
from fpscompile.lowerings import cpp_backward, gather
from fpscompile.lowerings.cpp_tables import row_blocks, slot_table
from fpscompile.lowerings.dense import Triple
from fpscompile.masks import BlockMask
from fpscompile.plan import Plan, ResolvedPlan
from fpscompile.quant import quantize_attention
from fpscompile.render import COMPUTE, LANES, PANEL, CppConfig, default_config, render, unsupported

_POINTERS = (
    *("q", "k", "v", "key_bias", "out", "lse", "k_packed", "v_packed", "slot_bias", "tile_state"),
    *("q_order", "k_order", "k_first", "k_slot", "row_blocks", "kv_num_blocks", "kv_indices", "phases"),
    *("q_scale", "k_scale", "v_scale", "v_mean", "slot_scale", "tile_scale", "correction", "statistics", "centres"),
)
_STRIDES = ("q_stride", "k_stride", "v_stride")
_SIZES = (
    *("B", "H", "Hk", "Lq", "Lk"),
    *("bias_batch", "bias_heads", "slots", "k_tiles", "q_tiles", "n_row_blocks", "mask_heads", "capacity", "threads"),
)

_PACKED = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int8": torch.uint8}
"""How a packed copy is stored, by compute."""


class _Call(ctypes.Structure):
    """The template's ``struct Call``, field by field."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in _POINTERS),
        *((name, ctypes.c_int64 * 4) for name in _STRIDES),
        *((name, ctypes.c_int64) for name in _SIZES),
        ("scale", ctypes.c_double),
    )


def why_not(
    dtype: torch.dtype, head_dim: int, value_dim: int, plan: Plan, device: torch.device | str = "cpu"
) -> str | None:
    """Why this lowering cannot run such a site on this machine, or None: what ``lowering="auto"`` asks."""
    if torch.device(device).type != "cpu":
        return f"it runs on a CPU, and the site is on {torch.device(device).type}"
    spec = KernelSpec(
        "cpu", str(dtype).removeprefix("torch."), head_dim, value_dim, plan.tile, plan.quant, block_n=plan.block_n
    )
    return unsupported(spec) or cpp_build.unavailable(compute_of(spec.dtype, plan))


def compute_of(dtype: str, plan: Plan) -> str:
    """Operands of the products on this machine: "float32", "bfloat16" or "int8"."""
    if plan.quant == "int8":
        return "int8"
    if plan.compute != "auto":
        return plan.compute
    if plan.quant == "fp8":
        return "float32"
    return COMPUTE[dtype] if widened(dtype, plan) is None else "float32"


def widened(dtype: str, plan: Plan) -> str | None:
    """Why bfloat16 operands are multiplied in float32 on this machine; None where they are not, or were asked to be.

    Without the instruction, bfloat16 products are slower than float32 ones, and lose more.
    """
    if plan.compute != "auto" or plan.quant != "none" or COMPUTE.get(dtype) != "bfloat16":
        return None
    return cpp_build.unavailable("bfloat16")


def forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    key_mask: torch.Tensor | None,
    phases: tuple[int, ...],
    resolved: ResolvedPlan,
    scale: float,
    block_mask: BlockMask | None = None,
    config: CppConfig | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention under the plan's block mask; shapes and layouts are in :mod:`fpscompile.lowerings`.

    Args:
        block_mask: instead of the plan's.
        config: instead of the plan's, or of the rule's; see :func:`fpscompile.render.default_config`.

    Raises:
        UnsupportedError: float64, a head dim outside 32 to 256, another device, or a machine that cannot build or run
            the kernel.
    """
    reason = why_not(q.dtype, q.shape[-1], v.shape[-1], resolved.plan, q.device)
    if reason is not None:
        raise UnsupportedError(f"lowering 'cpp': {reason}; choose lowering='boxes' (or 'gather' with quant='fp8')")
    spec = spec_of(q, k, v, key_mask, resolved)
    config = config or config_of(spec, resolved.plan)
    unavailable = cpp_build.unavailable(config.compute)
    if unavailable is not None:
        raise UnsupportedError(f"lowering 'cpp' with {config}: {unavailable}; give another config, or none")
    kernel = _kernel(spec, config)

    batch, heads, q_length, head_dim = q.shape
    key_heads, k_length, value_dim = *k.shape[1:3], v.shape[-1]
    out = q.new_empty(batch, q_length, heads, value_dim)
    lse = q.new_empty(batch, heads, q_length, dtype=torch.float32)
    if out.numel() == 0:
        return out.transpose(1, 2), lse

    mask = (resolved.block_mask if block_mask is None else block_mask).to("cpu")
    queries, keys = row_blocks(resolved.q_layout, config.block_m), slot_table(resolved.k_layout, PANEL[config.compute])
    bias = None if key_mask is None else additive(key_mask)
    bias_batch, bias_heads = (1, 1) if bias is None else bias.shape[:2]
    operands: dict[str, torch.Tensor | None] = {"q": q, "k": k, "v": v}
    shift = None
    if spec.quant == "fp8":
        operands, shift = _quantized(q, k, v, key_mask, phases, resolved, scale)
    k_tiles, packed = resolved.k_layout.n_tiles, _PACKED[config.compute]
    d, d_v = -(-spec.product_dim // (4 // packed.itemsize)) * (4 // packed.itemsize), -(-value_dim // LANES) * LANES
    tensors = {
        **operands,
        "key_bias": bias,
        "out": out,
        "lse": lse,
        "k_packed": q.new_empty(batch, key_heads, keys.slots, d, dtype=packed),
        "v_packed": q.new_empty(batch, key_heads, keys.slots, d_v, dtype=packed),
        "slot_bias": q.new_empty(bias_batch, bias_heads, keys.slots, dtype=torch.float32),
        "tile_state": q.new_empty(bias_batch, bias_heads, k_tiles, dtype=torch.uint8),
        "q_order": resolved.q_layout.order(),
        "k_order": resolved.k_layout.order(),
        "k_first": keys.first,
        "k_slot": keys.slot,
        "row_blocks": queries,
        "kv_num_blocks": mask.kv_num_blocks.contiguous(),
        "kv_indices": mask.kv_indices.contiguous(),
        "phases": torch.tensor(phases, dtype=torch.int64),
    }
    if spec.quant == "fp8":
        tensors["slot_scale"] = torch.empty(batch, key_heads, keys.slots, dtype=torch.float32)
    elif spec.quant == "int8":
        d_vectors = -(-head_dim // LANES) * LANES
        tensors |= {
            "tile_scale": torch.empty(batch, key_heads, k_tiles, dtype=torch.float32),
            "correction": torch.empty(batch, key_heads, keys.slots, dtype=torch.int32),
            # the template's struct Statistics and struct Centre
            "statistics": torch.empty(batch, key_heads, k_tiles, d_vectors + 3 * d_v + 1, dtype=torch.float32),
            "centres": torch.empty(batch, key_heads, d_vectors + 3 * d_v, dtype=torch.float32),
        }
    strides = {
        name: (ctypes.c_int64 * 4)(*tensors[operand].stride())  # type: ignore[union-attr]
        for name, operand in zip(_STRIDES, "qkv", strict=True)
    }
    sizes = {
        "B": batch,
        "H": heads,
        "Hk": key_heads,
        "Lq": q_length,
        "Lk": k_length,
        "bias_batch": bias_batch,
        "bias_heads": bias_heads,
        "slots": keys.slots,
        "k_tiles": k_tiles,
        "q_tiles": resolved.q_layout.n_tiles,
        "n_row_blocks": len(queries),
        "mask_heads": mask.kv_num_blocks.shape[1],
        "capacity": mask.kv_indices.shape[-1],
        "threads": min(config.threads or torch.get_num_threads(), torch.get_num_threads()),
    }
    pointers = {name: None if x is None else x.data_ptr() for name, x in tensors.items()}
    call = _Call(**pointers, **strides, **sizes, scale=scale)
    cpp_build.run(kernel, call)
    return out.transpose(1, 2), lse if shift is None else lse.add_(shift)


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
    block_mask: BlockMask | None = None,
) -> Triple:
    """Gradients of q, k and v; shapes and layouts are in :mod:`fpscompile.lowerings`.

    Through 8 bits they are straight-through, as :mod:`fpscompile.reference` states: those of the rounded operands.
    With ``quant="fp8"`` P's rounding is replayed, which the gather lowering does.

    Args:
        out, lse: what :func:`forward` returned.
        block_mask: instead of the plan's.
    """
    plan = resolved.plan
    common: dict[str, Any] = {
        "key_mask": key_mask,
        "phases": phases,
        "resolved": resolved,
        "scale": scale,
        "block_mask": block_mask,
    }
    if plan.quant == "fp8":
        return gather.backward(grad_out, q, k, v, out, lse, **common)
    spec = dataclasses.replace(spec_of(q, k, v, key_mask, resolved), quant="none")
    dtypes = q.dtype, k.dtype, v.dtype
    if plan.quant == "int8":
        int8 = quant_int8.quantize_attention(q, k, v, resolved.k_layout, smooth_k=plan.smooth_k, key_mask=key_mask)
        rounded = None
        if plan.remainder == "means":  # out and lse are of all keys, this lowering's and the means
            rounded = forward(q, k, v, **common)[0]
        lse = lse - int8.lse_shift(q.float(), scale)
        q, k, v, grad_out = int8.q, int8.k, int8.v, grad_out.float()
        spec = dataclasses.replace(spec, dtype="float32")
        out = _without_rounding(out, lse, rounded, int8, common)
    config = _backward_config(spec, plan)
    grads = cpp_backward.backward(grad_out, q, k, v, out, lse, spec=spec, config=config, **common)
    dq, dk, dv = (grad.to(dtype) for grad, dtype in zip(grads, dtypes, strict=True))
    return dq, dk, dv


def _without_rounding(
    out: torch.Tensor, lse: torch.Tensor, rounded: torch.Tensor | None, int8: Any, common: dict[str, Any]
) -> torch.Tensor:
    """``out`` as it would be if P and the sums over blocks were not rounded: float32.

    The softmax's gradient subtracts rowsum(P * dP) = rowsum(dO * O) from dP. It is what remains of large numbers where
    keys have much in common, so that O's roundings would be most of it.

    Args:
        lse: without what smoothing took.
        rounded: this lowering's own share of ``out``; None if that is all of it.
    """
    resolved: ResolvedPlan = common["resolved"]
    mask = resolved.block_mask if common["block_mask"] is None else common["block_mask"]
    plan = dataclasses.replace(resolved.plan, quant="none", compute="float32", remainder="none", config=())
    call = common | {"resolved": dataclasses.replace(resolved, plan=plan), "block_mask": mask}
    exact, own = forward(int8.q, int8.k, int8.v, **call)
    if rounded is None:
        return exact
    share = torch.exp(own - lse).masked_fill(own == float("-inf"), 0.0)
    return out.float() + share[..., None] * (exact - rounded.float())


def _quantized(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    key_mask: torch.Tensor | None,
    phases: tuple[int, ...],
    resolved: ResolvedPlan,
    scale: float,
) -> tuple[dict[str, torch.Tensor | None], torch.Tensor | None]:
    """E4M3 operands with a scale per token or channel, and what smoothing took from the log-sum-exp [B, H, Lq]."""
    plan, parts, shifts = resolved.plan, [], []
    for b, phase in enumerate(phases):
        one = slice(b, b + 1)
        mask = None if key_mask is None else key_mask[one] if key_mask.shape[0] > 1 else key_mask
        fp8 = quantize_attention(
            q[one], k[one], v[one], resolved.q_layout, resolved.k_layout, plan.phases[phase].granularity,
            smooth_k=plan.smooth_k, smooth_v=plan.smooth_v, hadamard=plan.hadamard, key_mask=mask,
        )  # fmt: skip
        shifts.append(fp8.lse_shift(q[one].float(), scale))
        parts.append(
            (
                *(x.values.view(torch.uint8) for x in (fp8.q, fp8.k, fp8.v)),
                fp8.q.token_scales().expand(1, q.shape[1], q.shape[2], 1),
                fp8.k.token_scales().expand(1, *k.shape[1:3], 1),
                fp8.v.scales,
                *([] if fp8.v_mean is None else [fp8.v_mean]),
            )
        )
    names = ("q", "k", "v", "q_scale", "k_scale", "v_scale", "v_mean")[: len(parts[0])]
    tensors = {name: torch.cat(x).contiguous() for name, x in zip(names, zip(*parts, strict=True), strict=True)}
    present = [shift for shift in shifts if shift is not None]
    return {**tensors}, torch.cat(present) if present else None


def build_ahead(query: torch.Tensor, value: torch.Tensor, key_mask: torch.Tensor | None, plan: Plan) -> None:
    """Start to build what a site will call, while the rest of its model is compiled.

    Args:
        query, value, key_mask: of the call, as fake tensors.
    """
    dims = query.shape[-1], value.shape[-1]
    if not all(isinstance(dim, int) for dim in dims):
        return  # head dims that may change are known at the call
    kind = "none" if key_mask is None else "bool" if key_mask.dtype == torch.bool else "float"
    spec = _spec(query.dtype, *dims, plan, kind, 1, False)  # the text does not depend on the last two
    cpp_build.build_ahead(render(spec, config_of(spec, plan)))
    if plan.quant != "fp8" and torch.is_grad_enabled() and (query.requires_grad or value.requires_grad):
        dtype = "float32" if plan.quant == "int8" else spec.dtype
        spec = dataclasses.replace(spec, quant="none", dtype=dtype)
        cpp_build.build_ahead(render(dataclasses.replace(spec, backward=True), _backward_config(spec, plan)))


def config_of(spec: KernelSpec, plan: Plan) -> CppConfig:
    """The config of a forward on this machine: what was tuned, unless its products are not this machine's, else the
    rule's."""
    compute = compute_of(spec.dtype, plan)
    tuned = plan.config_as(CppConfig)
    if tuned is not None and tuned.compute == compute and tuned.is_valid(spec):
        return tuned
    return default_config(spec, compute if spec.quant != "int8" else None)


def _backward_config(spec: KernelSpec, plan: Plan) -> CppConfig:
    compute = compute_of(spec.dtype, dataclasses.replace(plan, quant="none"))
    return default_config(dataclasses.replace(spec, backward=True), compute)


def spec_of(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, key_mask: torch.Tensor | None, resolved: ResolvedPlan
) -> KernelSpec:
    """The spec of one call's forward."""
    return _spec(
        q.dtype,
        q.shape[-1],
        v.shape[-1],
        resolved.plan,
        "none" if key_mask is None else "bool" if key_mask.dtype == torch.bool else "float",
        q.shape[1] // k.shape[1],
        resolved.q_layout.length > resolved.q_layout.video or resolved.k_layout.length > resolved.k_layout.video,
    )


@functools.lru_cache(maxsize=256)
def _spec(
    dtype: torch.dtype, head_dim: int, value_dim: int, plan: Plan, key_mask: str, group: int, other_tokens: bool
) -> KernelSpec:
    return KernelSpec(
        target="cpu",
        dtype=str(dtype).removeprefix("torch."),
        head_dim=head_dim,
        value_dim=value_dim,
        tile=plan.tile,
        quant=plan.quant,
        granularities=tuple(phase.granularity for phase in plan.phases),
        smooth_k=plan.smooth_k,
        smooth_v=plan.smooth_v and plan.quant == "fp8",
        hadamard=plan.hadamard and plan.quant == "fp8",
        block_n=plan.block_n,
        p_scale=plan.p_scale,
        key_mask=key_mask,
        gqa_group=group,
        other_tokens=other_tokens,
    )


@functools.lru_cache(maxsize=256)
def _kernel(spec: KernelSpec, config: CppConfig):  # type: ignore[no-untyped-def]  # a ctypes function pointer
    return cpp_build.entry_point(render(spec, config), "fps_attention", ctypes.sizeof(_Call))
