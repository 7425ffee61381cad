# ruff: noqa: N803 (compile-time values are capitals)
"""Row-wise E4M3 of a matrix, and of its GELU: one Triton kernel that reads a row once and writes it once.

Inductor makes two loops of it, the row's maximum and the quotients: it reads a row of 13,824 values twice and evaluates
GELU twice. Here a program holds its row in registers. With scales that are known: :mod:`norm_to_e4m3`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

E4M3_MAX = 448.0
MOST = 16384
"""Longest row that a program holds: 32 values per thread of 16 warps."""


@triton.jit
def gelu_tanh(x):
    """GELU in its tanh form."""
    # x (1 + tanh u) / 2 = x / (1 + exp(-2u)) with u = sqrt(2/pi) (x + 0.044715 x^3); in powers of two.
    return x / (1.0 + tl.exp2(x * (-2.302208198 - 0.1029432396 * x * x)))


@triton.jit
def quantize_rows_in_registers(
    x_ptr, bias_ptr, values_ptr, scale_ptr, stride, N, HAS_BIAS: tl.constexpr, GELU: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """x [rows, N] (+ bias [N], then GELU in its tanh form) to E4M3 values [rows, N] and scales f32 [rows].

    Grid: (rows,).
    """
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < N
    x = tl.load(x_ptr + row * stride + at, mask=inside, other=0.0)
    if HAS_BIAS:
        x = (x.to(tl.float32) + tl.load(bias_ptr + at, mask=inside, other=0.0).to(tl.float32)).to(x.dtype)
    x = x.to(tl.float32)
    if GELU:
        x = gelu_tanh(x)
    scale = tl.maximum(tl.max(tl.abs(x), 0), 1e-12) * (1.0 / 448.0)
    tl.store(scale_ptr + row, scale)
    # A quotient may exceed 448 by a rounding; without a clamp the cast saturates on NVIDIA's GPUs.
    values = x * (1.0 / scale)
    tl.store(values_ptr + row * N + at, values.to(values_ptr.dtype.element_ty), mask=inside)


@torch.library.custom_op("fps_bench::quantize_rows", mutates_args=())
def quantize_rows(x: torch.Tensor, bias: torch.Tensor | None, gelu: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """(values, scale): ``values * scale`` is about x, x + bias, or its GELU.

    Args:
        x: [rows, n], last axis contiguous; n at most 16,384.
        bias: [n], added first and rounded to x's dtype, as a linear layer does.
        gelu: whether GELU in its tanh form comes between.

    Returns:
        E4M3 [rows, n] and float32 [rows, 1].

    Raises:
        ValueError: rows that are too long, or not contiguous.
    """
    rows, n = x.shape
    if n > MOST or x.stride(1) != 1:
        raise ValueError(f"rows of {n} values {x.stride(1)} elements apart; they must be contiguous, {MOST} at most")
    values, scale = _outputs(x)
    block = triton.next_power_of_2(n)
    quantize_rows_in_registers[(rows,)](
        x, bias, values, scale, x.stride(0), n,
        HAS_BIAS=bias is not None, GELU=gelu, BLOCK=block, num_warps=max(1, min(16, block // 1024)),
    )  # fmt: skip
    return values, scale


@quantize_rows.register_fake
def _outputs(x: torch.Tensor, *_: object) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.empty(x.shape, dtype=torch.float8_e4m3fn, device=x.device), x.new_empty(
        x.shape[0], 1, dtype=torch.float32
    )
