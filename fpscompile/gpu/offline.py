"""Compile a template for a spec without tensors: the arguments of a representative launch, by parameter name.

A binary depends on its arguments' types, on which integers are multiples of 16 and on which are 1. The launch described
here is the usual one: q, k and v are views of contiguous [B, L, H, D] tensors, more than one phase, one mask for all
heads.
"""

from __future__ import annotations

import functools
import math
from types import ModuleType, SimpleNamespace
from typing import Any

import torch

from fpscompile.errors import UnsupportedError
from fpscompile.gpu import binary, gradients, hopper, operands, render
from fpscompile.gpu.compilation import Artifacts, compile_artifacts
from fpscompile.gpu.config import KernelConfig, padded
from fpscompile.gpu.tables import Tables, tables_of
from fpscompile.kernel_spec import KernelSpec
from fpscompile.plan import PhasePlan, Plan, resolve
from fpscompile.quant import SUBTILE

HEADS = 40
GRID = (21, 45, 80)
LENGTH = 75_600
PHASES = 3

_FP8 = {"e4m3": torch.float8_e4m3fn, "e4m3fnuz": torch.float8_e4m3fnuz}


def compile_forward(spec: KernelSpec, config: KernelConfig, *, allow_flaws: bool = False) -> binary.BinaryReport:
    """The attention kernel of a spec on the spec's own target; errors as for :func:`binary.compile_kernel`."""
    return binary.inspect_artifacts(forward_artifacts(spec, config), allow_flaws=allow_flaws)


def forward_artifacts(spec: KernelSpec, config: KernelConfig, launch: int = 0) -> Artifacts:
    """All stages of the attention kernel's compilation; of a call with several launches, those of one."""
    if config.variant == "hopper":
        return _hopper_artifacts(spec, config, launch)
    module = render.load("attention", spec, config)
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    kernel = module.attention_forward
    return compile_artifacts(kernel, arguments(kernel, spec, module), options, target=spec.target)


class _Recorder:
    """Stands in for a kernel and keeps what it was launched with."""

    def __init__(self) -> None:
        self.launches: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def __getitem__(self, grid: Any) -> _Recorder:
        return self

    def __call__(self, *args: Any, **options: Any) -> None:
        self.launches.append((args, options))


def gradient_artifacts(spec: KernelSpec, config: gradients.GradientConfig | None = None) -> dict[str, Artifacts]:
    """The kernels of the backward by name: "query_gradients", "key_gradients" and, with FP8, "pack_gradients"."""
    tables = _tables(spec)
    batch, heads, key_heads = 1, HEADS, HEADS // spec.gqa_group
    dtype = getattr(torch, spec.dtype)

    def sequence(heads: int, dim: int) -> torch.Tensor:
        return torch.empty(batch, LENGTH, heads, dim, dtype=dtype, device="meta")

    q, k, v, out = (
        sequence(n, dim).transpose(1, 2)
        for n, dim in (
            (heads, spec.head_dim), (key_heads, spec.head_dim), (key_heads, spec.value_dim), (heads, spec.value_dim),
        )
    )  # fmt: skip
    dq, dk = (sequence(n, spec.product_dim) for n in (heads, key_heads))
    dq, dk = (x.float() if spec.hadamard else x for x in (dq, dk))
    dv = sequence(key_heads, spec.value_dim)
    lse = torch.empty(batch, heads, LENGTH, device="meta")
    mask = _mask(spec)
    bias = None if mask is None else _bias(tables)
    packed = _pack(spec, q, k, v, mask, tables, render.load("quantize", spec)) if spec.quant == "fp8" else None
    launches = gradients.launches(
        out, q, k, v, out, lse, dq, dk, dv, packed, bias, torch.zeros(1, dtype=torch.int32), tables, spec,
        config or gradients.default_config(spec), spec.head_dim**-0.5,
    )  # fmt: skip
    found: dict[str, Artifacts] = {}
    for launch in launches:
        name = launch.kernel.__name__
        if name not in found:  # the pairs come some at a time, and all times are alike
            found[name] = compile_artifacts(launch.kernel, launch.args, launch.options, target=spec.target)
    return found


def prepass_artifacts(spec: KernelSpec) -> dict[str, Artifacts]:
    """The kernels of the FP8 pre-pass by name; ``quantize_tiles`` as it is launched for K."""
    tables = _tables(spec)
    module = render.load("quantize", spec)
    kernels = ("key_statistics", "tile_maxima", "quantize_tiles", "quantize_values")
    recorders = {name: _Recorder() for name in kernels}
    stand_in: Any = SimpleNamespace(**{**vars(module), **recorders})
    shapes = (
        (HEADS, spec.head_dim), (HEADS // spec.gqa_group, spec.head_dim), (HEADS // spec.gqa_group, spec.value_dim),
    )  # fmt: skip
    q, k, v = (
        torch.empty(1, LENGTH, heads, dim, dtype=getattr(torch, spec.dtype), device="meta").transpose(1, 2)
        for heads, dim in shapes
    )
    _pack(spec, q, k, v, _mask(spec), tables, stand_in)
    return {
        name: compile_artifacts(getattr(module, name), *recorder.launches[-1], target=spec.target)
        for name, recorder in recorders.items()
        if recorder.launches
    }


@functools.lru_cache(maxsize=16)
def _tables(spec: KernelSpec) -> Tables:
    """The tables of the representative grid under a spec's tiles, on the CPU."""
    names = spec.granularities
    phases = tuple(PhasePlan(density=0.25, granularity=names[i % len(names)]) for i in range(PHASES))
    smoothing = {name: getattr(spec, name) for name in ("smooth_k", "smooth_v", "hadamard")}
    plan = Plan(tile=spec.tile, phases=phases, quant=spec.quant, block_n=spec.block_n, **smoothing)
    resolved = resolve(plan, GRID, LENGTH, LENGTH)
    return tables_of(resolved, torch.device("cpu"))


def _mask(spec: KernelSpec) -> torch.Tensor | None:
    dtypes = {"none": None, "bool": torch.bool, "float": torch.float32}
    dtype = dtypes[spec.key_mask]
    return None if dtype is None else torch.empty(1, 1, 1, LENGTH, dtype=dtype, device="meta")


def _bias(tables: Tables) -> operands.KeyBias:
    return operands.KeyBias(
        bias=torch.empty(1, 1, tables.k_slots, device="meta"),
        state=torch.empty(1, 1, tables.k_slots // tables.unit, dtype=torch.uint8, device="meta"),
    )


def _pack(
    spec: KernelSpec, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, tables: Tables,
    module: Any,
) -> operands.Packed:  # fmt: skip
    """Packed operands without storage; the kernels of ``module`` are called."""
    if not isinstance(module, SimpleNamespace):
        module = SimpleNamespace(**{name: _silent(value) for name, value in vars(module).items()})
    names = tuple(spec.granularities[i % len(spec.granularities)] for i in range(PHASES))
    phase = torch.empty(1, dtype=torch.int32, device="meta")
    return operands.pack(q, k, v, mask, phase, spec, tables, names, spec.head_dim**-0.5, module=module)


def _silent(value: Any) -> Any:
    """A kernel that does nothing, in the place of one that works; other values as they are."""
    return _Recorder() if hasattr(value, "arg_names") else value


def _hopper_artifacts(spec: KernelSpec, config: KernelConfig, which: int) -> Artifacts:
    """Compile what :func:`fpscompile.gpu.hopper.launch` would, on tensors without storage."""
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
        v_mean=empty(torch.float32, 1, key_heads, dvp) if spec.smooth_v else None,
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
    hopper.launch(
        SimpleNamespace(attention_forward=recorder),
        packed,
        SimpleNamespace(slots=slots, unit=unit, q_token=empty(torch.int32, tiles * slots), keys=keys),
        empty(torch.int32, tiles, 3),
        empty(torch.int32, 1),
        empty(getattr(torch, spec.dtype), 1, LENGTH, heads, spec.value_dim),
        empty(torch.float32, 1, heads, LENGTH),
        spec.head_dim**-0.5,
        bias=bias if spec.key_mask != "none" else None,
        padding=_tables(spec).keys.padding,
        p_shift=math.log2(spec.p_scale),
        consumers=-(-config.block_m // 64),
        stages=config.num_stages or None,
    )
    return compile_artifacts(module.attention_forward, *recorder.launches[which], target=spec.target)


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
    values["v_mean_ptr"] = torch.empty(0, dtype=torch.float32, device="meta") if spec.smooth_v else None
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
