# ruff: noqa: N803 (compile-time values are capitals)
# mypy: disallow_untyped_defs=False, disallow_incomplete_defs=False, disallow_untyped_calls=False
"""Root-mean-square norm and rotary embedding of rows, as one Triton kernel that reads and writes each value once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit
def _pairs(x_ptr, row, FIRST: tl.constexpr, COUNT: tl.constexpr, N, WHOLE: tl.constexpr):
    """COUNT values of a row from FIRST on, as float32: the first ones of the pairs, and the second ones."""
    at = FIRST + tl.arange(0, COUNT)
    if WHOLE:
        x = tl.load(x_ptr + row + at)
    else:
        x = tl.load(x_ptr + row + at, mask=at < N, other=0.0)
    return tl.split(tl.reshape(x.to(tl.float32), (COUNT // 2, 2)))


@triton.jit
def _rotate_pairs(
    x1, x2, inverse, weight_ptr, cos_ptr, sin_ptr, cos_step, sin_step, out_ptr, row, N, PAIRS: tl.constexpr,
    FIRST: tl.constexpr, COUNT: tl.constexpr, WHOLE: tl.constexpr, WEIGHT: tl.constexpr,
):  # fmt: skip
    x1 *= inverse
    x2 *= inverse
    if WEIGHT:
        w1, w2 = _pairs(weight_ptr, 0, FIRST, COUNT, N, WHOLE)
        x1 *= w1
        x2 *= w2
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    x1 = x1.to(dtype).to(tl.float32)  # as the norm hands it on
    x2 = x2.to(dtype).to(tl.float32)
    pair = (FIRST // 2 + tl.arange(0, COUNT // 2)) % PAIRS
    cos = tl.load(cos_ptr + pair * cos_step)
    sin = tl.load(sin_ptr + pair * sin_step)
    out = tl.reshape(tl.join(x1 * cos - x2 * sin, x1 * sin + x2 * cos), (COUNT,)).to(dtype)
    at = FIRST + tl.arange(0, COUNT)
    if WHOLE:
        tl.store(out_ptr + row + at, out)
    else:
        tl.store(out_ptr + row + at, out, mask=at < N)


@triton.jit
def rotate_rows(
    x_ptr, weight_ptr, cos_ptr, sin_ptr, out_ptr, x_batch, x_token, cos_batch, cos_token, cos_step, sin_batch,
    sin_token, sin_step, tokens, N, eps,
    PAIRS: tl.constexpr, FIRST: tl.constexpr, REST: tl.constexpr, WHOLE: tl.constexpr, WEIGHT: tl.constexpr,
):  # fmt: skip
    """Row program_id(0) of x [B, tokens, N]; see :func:`rotate`.

    A row is FIRST values and at most REST more (WHOLE: exactly); see :func:`options`.
    """
    batch = (tl.program_id(0) // tokens).to(tl.int64)
    token = (tl.program_id(0) % tokens).to(tl.int64)
    row = batch * x_batch + token * x_token
    x1, x2 = _pairs(x_ptr, row, 0, FIRST, N, True)
    squares = tl.sum(x1 * x1 + x2 * x2, 0)
    if REST > 0:
        y1, y2 = _pairs(x_ptr, row, FIRST, REST, N, WHOLE)
        squares += tl.sum(y1 * y1 + y2 * y2, 0)
    inverse = tl.rsqrt(squares / N + eps)
    cos_ptr += batch * cos_batch + token * cos_token
    sin_ptr += batch * sin_batch + token * sin_token
    out_row = tl.program_id(0).to(tl.int64) * N
    _rotate_pairs(
        x1, x2, inverse, weight_ptr, cos_ptr, sin_ptr, cos_step, sin_step, out_ptr, out_row, N, PAIRS, 0, FIRST, True,
        WEIGHT,
    )  # fmt: skip
    if REST > 0:
        _rotate_pairs(
            y1, y2, inverse, weight_ptr, cos_ptr, sin_ptr, cos_step, sin_step, out_ptr, out_row, N, PAIRS, FIRST, REST,
            WHOLE, WEIGHT,
        )  # fmt: skip


def rotate(
    x: torch.Tensor, weight: torch.Tensor | None, eps: float, cos: torch.Tensor, sin: torch.Tensor
) -> torch.Tensor:
    """The norm and the rotary embedding of rows.

    Args:
        x: [B, tokens, N], last axis contiguous, N even and at most :data:`fpscompile.rotary_op.LONGEST`.
        weight: [N] in x's dtype, contiguous, or None.
        cos, sin: float32 [B | 1, tokens, pairs], N a multiple of 2 * pairs: head after head takes them in turn.

    Returns:
        [B, tokens, N], contiguous.
    """
    batch, tokens, n = x.shape
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    strides: list[int] = []
    for table in (cos, sin):
        strides += [0 if table.shape[0] == 1 else table.stride(0), *table.stride()[1:]]
    rotate_rows[(batch * tokens,)](
        x, weight, cos, sin, out, x.stride(0), x.stride(1), *strides, tokens, n, eps,
        **options(n), PAIRS=cos.shape[2], WEIGHT=weight is not None,
    )  # fmt: skip
    return out


def options(n: int) -> dict[str, int]:
    """Launch options for programs that hold a row of n values, some 40 of them in a thread.

    FIRST and REST are powers of two. Rows are seldom one: a program that took 5,120 values for 8,192, and not for 4,096
    and 1,024, would spend a third of its instructions on nothing.

    >>> options(5120)["num_warps"], options(3072)["num_warps"], options(96)["num_warps"]
    (4, 2, 1)
    """
    first = 1 << (n.bit_length() - 1)
    rest = triton.next_power_of_2(n - first) if n > first else 0
    warps = max(1, min(8, triton.next_power_of_2(n) // 2048))
    return {"FIRST": first, "REST": rest, "WHOLE": first + rest == n, "num_warps": warps}
