"""The generated Triton kernels: FP8 per 3D tile or unquantized, block-sparse, on a GPU.

``quant="fp8"``: a pre-pass smooths, rotates, quantizes and permutes q, k and v into slot order; one kernel attends over
the listed key units and scatters its rows back to the sequence. ``quant="none"``: the kernel gathers rows itself. The
phase is read on the device, so a call never waits for the GPU and a captured CUDA graph follows the denoising step.

Without a GPU the same kernels run in Triton's interpreter (``TRITON_INTERPRET=1``, set before the process starts):
slow, and meant for tests and readers.
"""

from __future__ import annotations

import contextlib
import functools
import math

import torch

from fpscompile.errors import UnsupportedError
from fpscompile.gpu import operands, render
from fpscompile.gpu.binary import refuse_damaged
from fpscompile.gpu.config import KernelConfig, default_config, why_invalid
from fpscompile.gpu.interpreter import interpreting, repaired_interpreter
from fpscompile.gpu.tables import Tables, row_blocks, tables_of
from fpscompile.kernel_spec import KernelSpec
from fpscompile.masks import BlockMask
from fpscompile.plan import Plan, ResolvedPlan

PHASES_ON_DEVICE = True
"""``phases`` is an int32 tensor on the device; kernels clamp it into range."""

HEAD_DIMS = (1, 256)
"""Smallest and largest head dim, of Q and K as well as of V."""

FP8_ARCHITECTURES = ("cuda:89", "cuda:90", "cuda:100", "cuda:103", "cuda:120", "hip:gfx942", "hip:gfx950")
"""Targets with E4M3 tensor cores."""


def why_not(dtype: torch.dtype, head_dim: int, value_dim: int, plan: Plan, device: torch.device | str) -> str | None:
    """Why this lowering cannot run such a site on this machine, or None."""
    device = torch.device(device)
    if device.type == "cpu" and not interpreting():
        return "it runs on a GPU, and the site is on a CPU (TRITON_INTERPRET=1 runs it slowly, for tests)"
    if device.type not in ("cpu", "cuda"):
        return f"it runs on CUDA and ROCm, and the site is on {device.type}"
    if dtype == torch.float64:
        return "it computes in float32 at most, and the site is float64"
    low, high = HEAD_DIMS
    for name, dim in (("head_dim", head_dim), ("value_dim", value_dim)):
        if not low <= dim <= high:
            return f"{name}={dim} is outside {low} to {high}"
    if plan.quant == "int8":
        return "quant='int8' is for CPUs; on a GPU use quant='fp8'"
    target = target_of(device)
    if plan.quant == "fp8" and target not in FP8_ARCHITECTURES:
        return f"quant='fp8' needs E4M3 tensor cores, and {target} has none"
    if device.type == "cpu":
        return None
    spec = _spec(target, str(dtype).removeprefix("torch."), head_dim, value_dim, plan, False, 1)
    unfit = why_invalid(default_config(spec), spec)
    return None if unfit is None else f"no config of its kernel fits {target}: {unfit}"


def has_fp8_tensor_cores(device: torch.device) -> bool:
    """Whether ``quant="auto"`` means FP8 on this device."""
    return device.type == "cuda" and target_of(device) in FP8_ARCHITECTURES


@functools.lru_cache(maxsize=64)
def target_of(device: torch.device) -> str:
    """``KernelSpec.target`` of a device. The interpreter, and fake tensors where no GPU is, stand for a Hopper GPU."""
    if device.type == "cpu" or not torch.cuda.is_available():
        return "cuda:90"
    if torch.version.hip:
        return f"hip:{torch.cuda.get_device_properties(device).gcnArchName.split(':')[0]}"
    major, minor = torch.cuda.get_device_capability(device)
    return f"cuda:{major}{minor}"


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
    phase = _phase(phases, q.device)
    tables = tables_of(resolved, q.device, block_mask)
    with _launching(q.device):
        bias = None if key_mask is None else operands.key_bias(key_mask, tables)
        packed = None
        if spec.quant == "fp8":
            granularities = tuple(phase.granularity for phase in resolved.plan.phases)
            packed = operands.pack(q, k, v, key_mask, phase, spec, tables, granularities, scale)
        if config.variant == "hopper":
            module = render.load("attention_hopper", spec, config)
            compiled = module.launch(
                packed, tables, row_blocks(resolved.q_layout, tables.slots, config.block_m, q.device), phase, out, lse,
                scale, bias=bias, block_n=spec.block_n, p_shift=math.log2(spec.p_scale), ragged=tables.keys.ragged,
                consumers=-(-config.block_m // 64), stages=config.num_stages or None,
            )  # fmt: skip
            refuse_damaged(compiled)
        else:
            inputs: tuple[object, ...] = (q, k, v, out, lse, tables.k_token, *q.stride(), *k.stride(), *v.stride())
            if packed is not None:
                inputs = (packed.q, packed.k, packed.v, out, lse)
                inputs += (packed.q_scale, packed.k_scale, packed.v_scale, packed.v_mean, packed.lse_shift)
            if bias is not None:
                inputs += (bias.bias, bias.state, *_strides(bias.bias), *_strides(bias.state))
            _launch(spec, config, inputs, resolved, tables, phase, batch, heads, length, scale)
    return out.transpose(1, 2), lse


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
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of q, k and v; see :mod:`fpscompile.gpu.gradients`."""
    from fpscompile.gpu import gradients

    return gradients.backward(
        grad_out, q, k, v, out, lse,
        key_mask=key_mask, phases=phases, resolved=resolved, scale=scale, block_mask=block_mask,
    )  # fmt: skip


def _launch(
    spec: KernelSpec,
    config: KernelConfig,
    inputs: tuple[object, ...],
    resolved: ResolvedPlan,
    tables: Tables,
    phase: torch.Tensor,
    batch: int,
    heads: int,
    length: int,
    scale: float,
) -> None:
    module = render.load("attention", spec, config)
    blocks = row_blocks(resolved.q_layout, tables.slots, int(module.BLOCK_M.value), phase.device)
    keys = tables.keys
    compiled = module.attention_forward[(len(blocks), heads, batch)](
        *inputs, keys.count, keys.index, keys.valid, blocks, tables.q_token, phase,
        heads, length, tables.q_slots, tables.k_slots, resolved.q_layout.n_tiles,
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
    if device.type == "cuda" and spec.target == "cuda:90":
        hopper = render.load("attention_hopper", spec)
        if hopper.why_not(spec) is None:
            rows = min(64 * hopper.default_consumers(spec.tile_slots), spec.tile_slots)
            return KernelConfig(block_m=rows, num_warps=4, num_stages=0, variant="hopper")
    return default_config(spec)


def _strides(x: torch.Tensor) -> tuple[int, int]:
    """Strides of a batch and a head axis that repeat where they have length 1."""
    return (x.stride(0) if x.shape[0] > 1 else 0, x.stride(1) if x.shape[1] > 1 else 0)


def _positive(q: torch.Tensor, scale: float) -> tuple[torch.Tensor, float]:
    """The same scores with a positive factor: kernels take row maxima before they scale."""
    if scale > 0:
        return q, scale
    return (q * 0.0, 1.0) if scale == 0 else (-q, -scale)


def _phase(phases: torch.Tensor | tuple[int, ...], device: torch.device) -> torch.Tensor:
    if isinstance(phases, torch.Tensor):
        return phases.to(device, torch.int32).reshape(-1).contiguous()
    return torch.tensor(phases, dtype=torch.int32).to(device)


def _launching(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Triton launches on the current device's current stream: make it the tensors' device."""
    return repaired_interpreter() if device.type == "cpu" else torch.cuda.device(device)


def spec_of(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, key_mask: torch.Tensor | None, resolved: ResolvedPlan
) -> KernelSpec:
    """The spec of one call."""
    return _spec(
        target_of(q.device),
        str(q.dtype).removeprefix("torch."),
        q.shape[-1],
        v.shape[-1],
        resolved.plan,
        key_mask is not None,
        q.shape[1] // k.shape[1],
    )


@functools.lru_cache(maxsize=256)
def _spec(target: str, dtype: str, head_dim: int, value_dim: int, plan: Plan, masked: bool, group: int) -> KernelSpec:
    return KernelSpec(
        target=target,
        dtype=dtype,
        head_dim=head_dim,
        value_dim=value_dim,
        tile=plan.tile,
        quant=plan.quant,
        granularities=tuple(sorted({phase.granularity for phase in plan.phases})) if plan.quant == "fp8" else ("tile",),
        smooth_k=plan.smooth_k,
        smooth_v=plan.smooth_v and plan.quant == "fp8",
        hadamard=plan.hadamard and plan.quant == "fp8",
        block_n=plan.block_n,
        p_scale=plan.p_scale,
        key_mask="float" if masked else "none",  # a bool mask arrives as a term of the scores
        gqa_group=group,
    )
