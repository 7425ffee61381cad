# ruff: noqa: N803 (compile-time values are capitals)
"""E4M3 with a scale that is known, of what a linear layer is handed: a norm, GELU, or the output of attention.

One Triton kernel each, which reads and writes a value once. Inductor makes three loops of a norm and the quantization
of its result, and stores that once for each layer that reads it. The cast to E4M3 saturates.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from quantize_rows import gelu_tanh

from fpscompile.gpu.rotary_kernel import options

E4M3 = torch.float8_e4m3fn


# ---------------------------------------------------------------------------------------------------------- norms


@triton.jit
def _part(
    x_ptr, added_ptr, gate_ptr, sum_ptr, row, at, N,
    ADD: tl.constexpr, GATE: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """Columns ``at`` of a row of x (+ added * gate), as float32; the sum is rounded, and stored."""
    if WHOLE:
        inside = None
    else:
        inside = at < N
    x = tl.load(x_ptr + row + at, mask=inside, other=None if WHOLE else 0.0).to(tl.float32)
    if ADD:
        added = tl.load(added_ptr + row + at, mask=inside, other=None if WHOLE else 0.0).to(tl.float32)
        if GATE:
            added *= tl.load(gate_ptr + at, mask=inside, other=None if WHOLE else 0.0, eviction_policy="evict_last")
        rounded = (x + added).to(sum_ptr.dtype.element_ty)
        tl.store(sum_ptr + row + at, rounded, mask=inside)
        x = rounded.to(tl.float32)
    return x


@triton.jit
def _centred(x, mean, at, N, WHOLE: tl.constexpr):
    if WHOLE:
        return x - mean
    return tl.where(at < N, x - mean, 0.0)


@triton.jit
def _store_part(centred, inverse_deviation, factor_ptr, shift_ptr, values_ptr, row, at, N, WHOLE: tl.constexpr):
    if WHOLE:
        inside = None
    else:
        inside = at < N
    factor = tl.load(factor_ptr + at, mask=inside, other=None if WHOLE else 0.0, eviction_policy="evict_last")
    shift = tl.load(shift_ptr + at, mask=inside, other=None if WHOLE else 0.0, eviction_policy="evict_last")
    values = centred * inverse_deviation * factor + shift
    tl.store(values_ptr + row + at, values.to(values_ptr.dtype.element_ty), mask=inside)


@triton.jit
def norm_of_rows(
    x_ptr, added_ptr, gate_ptr, factor_ptr, shift_ptr, sum_ptr, values_ptr, N, eps,
    ADD: tl.constexpr, GATE: tl.constexpr, FIRST: tl.constexpr, REST: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """What :func:`norm_to_e4m3` and :func:`add_norm_to_e4m3` say, of row program_id(0).

    A row is FIRST columns and at most REST more (WHOLE: exactly), see :func:`fpscompile.gpu.rotary_kernel.options`.
    """
    row = tl.program_id(0).to(tl.int64) * N
    at = tl.arange(0, FIRST)
    x = _part(x_ptr, added_ptr, gate_ptr, sum_ptr, row, at, N, ADD, GATE, True)
    total = tl.sum(x, 0)
    if REST > 0:
        rest_at = FIRST + tl.arange(0, REST)
        rest = _part(x_ptr, added_ptr, gate_ptr, sum_ptr, row, rest_at, N, ADD, GATE, WHOLE)
        total += tl.sum(rest, 0)
    mean = total / N
    x -= mean
    squares = tl.sum(x * x, 0)
    if REST > 0:
        rest = _centred(rest, mean, rest_at, N, WHOLE)
        squares += tl.sum(rest * rest, 0)
    inverse_deviation = tl.rsqrt(squares / N + eps)
    _store_part(x, inverse_deviation, factor_ptr, shift_ptr, values_ptr, row, at, N, True)
    if REST > 0:
        _store_part(rest, inverse_deviation, factor_ptr, shift_ptr, values_ptr, row, rest_at, N, WHOLE)


def _launch_norm(
    x: torch.Tensor, added: torch.Tensor | None, gate: torch.Tensor | None, factor: torch.Tensor, shift: torch.Tensor,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    n = x.shape[-1]
    x, added = x.contiguous(), None if added is None else added.contiguous()
    values = torch.empty(x.numel() // n, n, dtype=E4M3, device=x.device)
    total = x if added is None else torch.empty_like(x)
    norm_of_rows[(values.shape[0],)](
        x, added, gate, factor, shift, total, values, n, eps,
        ADD=added is not None, GATE=gate is not None, **options(n),
    )  # fmt: skip
    return total, values


@torch.library.custom_op("fps_bench::norm_to_e4m3", mutates_args=())
def norm_to_e4m3(x: torch.Tensor, factor: torch.Tensor, shift: torch.Tensor, eps: float) -> torch.Tensor:
    """LayerNorm(x) * factor + shift as E4M3 [rows, n]; what is beyond 448 saturates.

    Args:
        x: [..., n], n at most :data:`quantize_rows.MOST`.
        factor, shift: f32, n values each, contiguous; both divided by the scale of the result.
    """
    return _launch_norm(x, None, None, factor, shift, eps)[1]


@norm_to_e4m3.register_fake
def _rows_in_e4m3(x: torch.Tensor, *_: object) -> torch.Tensor:
    return x.new_empty(x.numel() // x.shape[-1], x.shape[-1], dtype=E4M3)


@torch.library.custom_op("fps_bench::add_norm_to_e4m3", mutates_args=())
def add_norm_to_e4m3(
    x: torch.Tensor,
    added: torch.Tensor,
    gate: torch.Tensor | None,
    factor: torch.Tensor,
    shift: torch.Tensor,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(total, values): x + added * gate in x's dtype, and :func:`norm_to_e4m3` of that.

    Args:
        added: of x's shape.
        gate: f32, n values, contiguous; None: 1.
    """
    return _launch_norm(x, added, gate, factor, shift, eps)


@add_norm_to_e4m3.register_fake
def _sum_and_rows(x: torch.Tensor, *_: object) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.empty_like(x, memory_format=torch.contiguous_format), _rows_in_e4m3(x)


# ---------------------------------------------------------------------------------------------------- elementwise


@triton.jit
def values_of_rows(
    x_ptr, bias_ptr, inverse_ptr, values_ptr, N, HAS_BIAS: tl.constexpr, GELU: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """x [rows, N] (+ bias [N]) (then GELU in its tanh form) times ``inverse``, as E4M3.

    Grid: (rows, blocks of a row).
    """
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < N
    row = tl.program_id(0).to(tl.int64) * N
    x = tl.load(x_ptr + row + at, mask=inside, other=0.0)
    if HAS_BIAS:
        x = (x.to(tl.float32) + tl.load(bias_ptr + at, mask=inside, other=0.0).to(tl.float32)).to(x.dtype)
    x = x.to(tl.float32)
    if GELU:
        x = gelu_tanh(x)
    values = x * tl.load(inverse_ptr)
    tl.store(values_ptr + row + at, values.to(values_ptr.dtype.element_ty), mask=inside)


def _launch_values(x: torch.Tensor, bias: torch.Tensor | None, inverse: torch.Tensor, gelu: bool) -> torch.Tensor:
    n = x.shape[-1]
    x = x.contiguous()
    values = torch.empty(x.numel() // n, n, dtype=E4M3, device=x.device)
    values_of_rows[(values.shape[0], triton.cdiv(n, 2048))](
        x, bias, inverse, values, n, HAS_BIAS=bias is not None, GELU=gelu, BLOCK=2048, num_warps=4
    )
    return values


def gelu_to_e4m3(x: torch.Tensor, bias: torch.Tensor | None, inverse: torch.Tensor) -> torch.Tensor:
    """GELU in its tanh form of x (+ bias), times ``inverse``, as E4M3 [rows, n].

    Args:
        x: [..., n].
        bias: [n], added first and rounded to x's dtype, or None.
    """
    return _launch_values(x, bias, inverse, True)


@torch.library.custom_op("fps_bench::to_e4m3", mutates_args=())
def to_e4m3(x: torch.Tensor, inverse: torch.Tensor) -> torch.Tensor:
    """x [..., n] times ``inverse``, as E4M3 [rows, n]."""
    return _launch_values(x, None, inverse, False)


to_e4m3.register_fake(_rows_in_e4m3)
