"""Compile a template for a spec without tensors: the arguments of a representative launch, by parameter name.

A binary depends on its arguments' types, on which integers are multiples of 16 and on which are 1. The launch described
here is the usual one: q, k and v are views of contiguous [B, L, H, D] tensors, more than one phase, one mask for all
heads.
"""

from __future__ import annotations

import math
from types import FunctionType, ModuleType, SimpleNamespace
from typing import Any

import torch

from fpscompile.errors import UnsupportedError
from fpscompile.gpu import binary, render
from fpscompile.gpu.config import KernelConfig, padded
from fpscompile.kernel_spec import KernelSpec
from fpscompile.quant import SUBTILE

HEADS = 40
LENGTH = 75_600
PHASES = 3

_FP8 = {"e4m3": torch.float8_e4m3fn, "e4m3fnuz": torch.float8_e4m3fnuz}


def compile_forward(spec: KernelSpec, config: KernelConfig, *, allow_serialized: bool = False) -> binary.BinaryReport:
    """The attention kernel of a spec on the spec's own target; errors as for :func:`binary.compile_kernel`."""
    return binary.inspect_artifacts(forward_artifacts(spec, config), allow_serialized=allow_serialized)


def forward_artifacts(spec: KernelSpec, config: KernelConfig) -> binary.Artifacts:
    """All stages of the attention kernel's compilation."""
    if config.variant == "hopper":
        return _hopper_artifacts(spec, config)
    module = render.load("attention", spec, config)
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    kernel = module.attention_forward
    return binary.compile_artifacts(kernel, arguments(kernel, spec, module), options, target=spec.target)


class _Recorder:
    """Stands in for a kernel and keeps what it would have been launched with."""

    args: tuple[Any, ...] = ()
    options: dict[str, Any]

    def __getitem__(self, grid: Any) -> _Recorder:
        return self

    def __call__(self, *args: Any, **options: Any) -> None:
        self.args, self.options = args, options


def _hopper_artifacts(spec: KernelSpec, config: KernelConfig) -> binary.Artifacts:
    """Compile what the template's own ``launch`` would, on tensors without storage."""
    module = render.load("attention_hopper", spec, config)
    heads, key_heads, slots = HEADS, HEADS // spec.gqa_group, spec.tile_slots
    tiles = -(-LENGTH // slots)
    unit, runs = (
        min(slots, spec.block_n),
        slots // SUBTILE if "subtile" in spec.granularities and slots >= SUBTILE else 1,
    )
    dp, dvp = padded(spec.head_dim), padded(spec.value_dim)

    def empty(dtype: torch.dtype, *shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    packed = SimpleNamespace(
        q=empty(torch.float8_e4m3fn, 1, heads, tiles * slots, dp),
        k=empty(torch.float8_e4m3fn, 1, key_heads, tiles * slots, dp),
        v=empty(torch.float8_e4m3fn, 1, key_heads, dvp, tiles * slots),
        q_scale=empty(torch.float32, 1, heads, tiles, runs),
        k_scale=empty(torch.float32, 1, key_heads, tiles, runs),
        v_scale=empty(torch.float32, 1, key_heads, dvp),
        lse_shift=empty(torch.float32, 1, heads, tiles * slots) if spec.smooth_k else None,
    )
    keys = SimpleNamespace(
        count=empty(torch.int32, PHASES, 1, tiles),
        index=empty(torch.int32, PHASES, 1, tiles, tiles),
        valid=empty(torch.int32, tiles * slots // unit),
    )
    bias = SimpleNamespace(
        bias=empty(torch.float32, 1, 1, tiles * slots), state=empty(torch.uint8, 1, 1, tiles * slots // unit)
    )
    recorder = _Recorder()
    launch = FunctionType(module.launch.__code__, {**vars(module), "attention_forward": recorder})
    launch.__kwdefaults__ = module.launch.__kwdefaults__
    launch(
        packed,
        SimpleNamespace(slots=slots, unit=unit, q_token=empty(torch.int32, tiles * slots), keys=keys),
        empty(torch.int32, tiles, 3),
        empty(torch.int32, 1),
        empty(getattr(torch, spec.dtype), 1, LENGTH, heads, spec.value_dim),
        empty(torch.float32, 1, heads, LENGTH),
        spec.head_dim**-0.5,
        bias=bias if spec.key_mask != "none" else None,
        p_shift=math.log2(spec.p_scale),
        consumers=-(-config.block_m // 64),
        stages=config.num_stages or None,
    )
    return binary.compile_artifacts(module.attention_forward, recorder.args, recorder.options, target=spec.target)


def arguments(kernel: Any, spec: KernelSpec, module: ModuleType) -> list[Any]:
    """One value per parameter of a kernel of ``module``: numbers and tensors without storage.

    Raises:
        UnsupportedError: a parameter that is not known here; the message names it.
    """
    slots = int(module.S.value)
    tiles = -(-LENGTH // slots)
    operand = _FP8[render.fp8_format(spec.target)] if spec.quant == "fp8" else getattr(torch, spec.dtype)
    out = getattr(torch, spec.dtype)
    pointers = (
        (operand, "q k v"),
        (out, "out"),
        (torch.float32, "lse q_scale k_scale v_scale lse_shift bias"),
        (torch.int32, "unit_count unit_index unit_valid q_blocks q_token k_token phase"),
        (torch.uint8, "bias_state"),
    )
    values: dict[str, Any] = {
        f"{name}_ptr": torch.empty(0, dtype=dtype, device="meta") for dtype, names in pointers for name in names.split()
    }
    for name, dim in (("q", spec.head_dim), ("k", spec.head_dim), ("v", spec.value_dim), ("out", spec.value_dim)):
        heads = HEADS if name in ("q", "out") else HEADS // spec.gqa_group
        values |= {
            f"{name}_sb": LENGTH * heads * dim,
            f"{name}_sh": dim,
            f"{name}_sl": heads * dim,
            f"{name}_sd": 1,
        }
    values |= {
        "bias_sb": tiles * slots,
        "bias_sh": 0,
        "state_sb": tiles * slots // int(module.UNIT.value),
        "state_sh": 0,
    }
    values |= {"H": HEADS, "Hk": HEADS // spec.gqa_group, "Lq": LENGTH, "Lk": LENGTH, "Qs": tiles * slots}
    values |= {"Ks": tiles * slots, "q_tiles": tiles, "k_tiles": tiles, "mask_heads": 1, "capacity": tiles}
    values |= {"phases": PHASES, "phase_group": 1, "softmax_scale": spec.head_dim**-0.5}
    unknown = [name for name in kernel.arg_names if name not in values]
    if unknown:
        raise UnsupportedError(f"no example value for parameter(s) {', '.join(unknown)} of {kernel.__name__}; add them")
    return [values[name] for name in kernel.arg_names]
