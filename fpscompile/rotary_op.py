"""``fps::norm_rotate``: a root-mean-square norm and the rotary embedding of what it leaves, in one pass over memory.

    fps::norm_rotate(Tensor x, Tensor? weight, float eps, Tensor cos, Tensor sin) -> Tensor

    x        [B, tokens, N] in half or single precision
    weight   [N] in x's dtype, or None
    cos, sin float32 [B | 1, tokens, pairs], N a multiple of 2 * pairs
    result   [B, tokens, N], contiguous, in x's dtype: with y = rms_norm(x, (N,), weight, eps), of each pair of a head
             y1 cos - y2 sin and y1 sin + y2 cos

Where it takes the place of both is said in :mod:`fpscompile.passes.fuse_rotary`. On a GPU it is a Triton kernel, on a
CPU plain operations. It has no gradient.
"""

from __future__ import annotations

import torch

from fpscompile.gpu.call import launching
from fpscompile.gpu.interpreter import interpreting

_library = torch.library.Library("fps", "FRAGMENT")
_library.define("norm_rotate(Tensor x, Tensor? weight, float eps, Tensor cos, Tensor sin) -> Tensor")

LONGEST = 16384
"""Most values of a row: a program of the kernel holds it in registers."""


def reference(
    x: torch.Tensor, weight: torch.Tensor | None, eps: float, cos: torch.Tensor, sin: torch.Tensor
) -> torch.Tensor:
    """The op in plain operations; float64 for float64."""
    y = torch.nn.functional.rms_norm(x, (x.shape[-1],), weight, eps)
    y1, y2 = y.unflatten(-1, (-1, cos.shape[-1], 2)).unbind(-1)
    cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)
    return torch.stack((y1 * cos - y2 * sin, y1 * sin + y2 * cos), -1).flatten(2).to(x.dtype)


def _norm_rotate(
    x: torch.Tensor, weight: torch.Tensor | None, eps: float, cos: torch.Tensor, sin: torch.Tensor
) -> torch.Tensor:
    _check(x, weight, cos, sin)
    if x.numel() == 0 or (x.device.type == "cpu" and not interpreting()):
        return reference(x, weight, eps, cos, sin)
    from fpscompile.gpu import rotary_kernel

    x = x if x.stride(-1) == 1 else x.contiguous()
    with launching(x.device):
        return rotary_kernel.rotate(x, None if weight is None else weight.contiguous(), eps, cos, sin)


def _check(x: torch.Tensor, weight: torch.Tensor | None, cos: torch.Tensor, sin: torch.Tensor) -> None:
    """Raises ValueError for operands that the op's text does not allow."""
    if x.dim() != 3 or x.shape[2] > LONGEST or x.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        raise ValueError(
            f"norm_rotate: x is {x.dtype} {list(x.shape)}; it must be [B, tokens, N] in half or single precision, N at "
            f"most {LONGEST}"
        )
    batch, tokens, n = x.shape
    if weight is not None and (weight.shape != (n,) or weight.dtype != x.dtype):
        raise ValueError(f"norm_rotate: weight is {weight.dtype} {list(weight.shape)}; it must be {x.dtype} [{n}]")
    for name, table in (("cos", cos), ("sin", sin)):
        fits = table.dim() == 3 and table.shape[0] in (1, batch) and table.shape[1] == tokens
        if not fits or table.dtype != torch.float32 or table.shape[2] != cos.shape[2] or n % (2 * table.shape[2]):
            raise ValueError(
                f"norm_rotate: {name} is {table.dtype} {list(table.shape)}; it must be float32 [{batch} or 1, "
                f"{tokens}, pairs], pairs a divisor of {n // 2} and the same for both"
            )


torch.library.impl("fps::norm_rotate", "CompositeExplicitAutograd", lib=_library)(_norm_rotate)


@torch.library.register_fake("fps::norm_rotate", lib=_library)
def _norm_rotate_fake(
    x: torch.Tensor, weight: torch.Tensor | None, eps: float, cos: torch.Tensor, sin: torch.Tensor
) -> torch.Tensor:
    return x.new_empty(x.shape)
