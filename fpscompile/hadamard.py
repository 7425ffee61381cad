"""A fixed rotation of feature vectors: signs, then a Hadamard transform, scaled to be orthonormal. Plain torch.

Rotating every query and every key leaves all their products as they are, and spreads each feature over all the others:
a channel much larger than the rest no longer decides the scale of its region alone. QuaRot (arXiv 2404.00456) and
FlashAttention-3 (arXiv 2407.08608) quantize attention behind such rotations.

A vector of ``D`` features is filled up with zeros to the next power of two, ``W``, and becomes::

    y = (signs * x) @ H_W / sqrt(W)          H_1 = [1],  H_2n = [[H_n, H_n], [H_n, -H_n]]

``H`` is symmetric and ``H H = W``, so ``signs * (y @ H_W) / sqrt(W)`` is the inverse. The signs are those of the inner
product of an index's lower and upper bits: of all choices they make the transform of a constant vector flattest (a bent
function: Rothaus, "On 'bent' functions", 1976), as that of a single large feature always is.

The order of the sums is part of the contract, so that kernels get the same bits: neighbours first, then features 2
apart, 4, 8, ... up to W / 2; the factor last.
"""

from __future__ import annotations

import torch

from fpscompile.kept import kept


def rotated_dim(dim: int) -> int:
    """Features of a rotated vector: ``dim`` or the next power of two."""
    return 1 << (dim - 1).bit_length()


def sign_bits(width: int) -> int:
    """Bits of the lower and of the upper half of an index whose inner product gives its sign."""
    return (width.bit_length() - 1) // 2


def rotate(x: torch.Tensor) -> torch.Tensor:
    """[..., D] to [..., rotated_dim(D)], in the dtype of ``x``. Differentiable."""
    width = rotated_dim(x.shape[-1])
    x = torch.nn.functional.pad(x, (0, width - x.shape[-1]))
    return _transform(x * _signs(width, x.dtype, x.device))


def unrotate(y: torch.Tensor, dim: int) -> torch.Tensor:
    """The inverse of :func:`rotate`: [..., rotated_dim(dim)] to [..., dim]."""
    return (_transform(y) * _signs(y.shape[-1], y.dtype, y.device))[..., :dim]


def _transform(x: torch.Tensor) -> torch.Tensor:
    width, apart = x.shape[-1], 1
    while apart < width:
        first, second = x.unflatten(-1, (-1, 2, apart)).unbind(-2)
        x = torch.stack((first + second, first - second), -2).flatten(-3)
        apart *= 2
    return x * width**-0.5


@kept(maxsize=32)
def _signs(width: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """[width] of 1 and -1."""
    bits = sign_bits(width)
    index = torch.arange(width)
    both = (index >> bits) & index & ((1 << bits) - 1)
    odd = torch.zeros_like(index)
    for bit in range(bits):
        odd ^= (both >> bit) & 1
    return (1 - 2 * odd).to(device, dtype)
