"""One call of attention as the GPU kernels see it: its GPU and spec, whether they can take it, what a launch needs."""

from __future__ import annotations

import contextlib
import functools

import torch

from fpscompile.gpu.config import default_config, why_invalid
from fpscompile.gpu.interpreter import interpreting, repaired_interpreter
from fpscompile.kernel_spec import KernelSpec
from fpscompile.plan import Plan, ResolvedPlan

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
    spec = spec_for(target, str(dtype).removeprefix("torch."), head_dim, value_dim, plan, False, 1)
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


def spec_of(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    key_mask: torch.Tensor | None,
    resolved: ResolvedPlan,
    device: torch.device | None = None,
) -> KernelSpec:
    """The spec of one call; on ``device`` where the tensors only describe it, on the meta device."""
    return spec_for(
        target_of(device or q.device),
        str(q.dtype).removeprefix("torch."),
        q.shape[-1],
        v.shape[-1],
        resolved.plan,
        key_mask is not None,
        q.shape[1] // k.shape[1],
    )


@functools.lru_cache(maxsize=256)
def spec_for(
    target: str, dtype: str, head_dim: int, value_dim: int, plan: Plan, masked: bool, group: int
) -> KernelSpec:
    """The spec of all calls that have these in common.

    Args:
        dtype: its name, "bfloat16".
        masked: whether the call has a key mask.
        group: query heads per key head.
    """
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


def phase_tensor(phases: torch.Tensor | tuple[int, ...], device: torch.device) -> torch.Tensor:
    """int32 [n], contiguous, on the device."""
    if isinstance(phases, torch.Tensor):
        return phases.to(device, torch.int32).reshape(-1).contiguous()
    return torch.tensor(phases, dtype=torch.int32).to(device)


def launching(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """A context to launch kernels in: Triton takes the current device's stream, so that must be the tensors' device."""
    return repaired_interpreter() if device.type == "cpu" else torch.cuda.device(device)


def head_strides(x: torch.Tensor) -> tuple[int, int]:
    """Strides of a batch and a head axis that repeat where they have length 1."""
    return (x.stride(0) if x.shape[0] > 1 else 0, x.stride(1) if x.shape[1] > 1 else 0)
