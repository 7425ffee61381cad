"""How fast a GPU kernel is: block sizes, warps and pipeline depth. Results do not depend on it beyond rounding."""

from __future__ import annotations

from dataclasses import dataclass

from fpscompile.kernel_spec import KernelSpec


@dataclass(frozen=True)
class KernelConfig:
    """One way to launch the kernel of a spec."""

    block_m: int
    """Query rows per program; capped by the slots of a tile."""
    num_warps: int
    num_stages: int
    """Depth of the software pipeline over key units."""
    variant: str = "triton"
    """"triton", or "hopper": warp-specialized, sm_90a and FP8 only."""


def default_config(spec: KernelSpec) -> KernelConfig:
    """The config where nothing has been tuned."""
    block_m = min(128, spec.tile_slots)
    wide = max(spec.head_dim, spec.value_dim) > 128 or spec.dtype == "float32"
    if wide:
        block_m = min(block_m, 64)
    return KernelConfig(block_m=block_m, num_warps=8 if block_m == 128 else 4, num_stages=2 if wide else 3)
