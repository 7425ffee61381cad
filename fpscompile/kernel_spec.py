"""What a kernel must compute, bit for bit: the frozen input of every template.

A :class:`KernelSpec` fixes results; how fast they come is a ``KernelConfig``'s business (warps, stages, threads,
packing), and no config may change a result beyond the documented tolerance.

Rounding contract of P (``quant="fp8"``)
    For one query tile, take its listed key tiles in the order of the block mask (ascending) and give each
    ``tile_slots`` slots, tokens first, padding last. Cut the concatenation into blocks of ``block_n`` slots. With
    ``S = log2(e) * (scale * (q_scale * k_scale) * (Q8 @ K8^T) + key bias)`` and ``m`` the running row maximum *after*
    the block, rounded up to a whole number, block ``j`` contributes::

        P8_j = e4m3(2^(S_j - m_j) * p_scale)           # round to nearest even, saturating
        acc  = acc * 2^(m_{j-1} - m_j) + P8_j @ V8     # float32
        l    = l   * 2^(m_{j-1} - m_j) + rowsum(2^(S_j - m_j))     # from the unrounded P, float32

    and the output is ``v_scale * acc / (p_scale * l)``, plus V's mean where that was subtracted (all of it: the weights
    that it belongs to are the unrounded ones, whose sum is ``l``), the log-sum-exp ``(m + log2(l)) / log2(e)``, plus
    the shift that K-mean smoothing took from the scores (see :meth:`fpscompile.quant.QuantizedAttention.lse_shift`).
    Invalid slots have ``S = -inf``. A row with no valid key gives zeros and ``-inf``. Query blocking does not enter.

    Since ``m`` is a whole number, the rounding of a weight depends on neither blocks nor order as long as the weight is
    a normal number of E4M3 (2^-6 and above). So a kernel may use another whole number than ``m_j``, from 1 below to 6
    above, provided that no weight saturates: weights of at least 2^-8 of the largest so far are rounded the same.
"""

from __future__ import annotations

from dataclasses import dataclass

from fpscompile.errors import OptionError
from fpscompile.hadamard import rotated_dim
from fpscompile.plan import P_SCALE
from fpscompile.tiling import Grid


@dataclass(frozen=True)
class KernelSpec:
    """Everything that a kernel's results depend on, except the tensors. Validated at construction.

    Raises:
        OptionError: an inconsistent spec; the message names the field.
    """

    target: str
    """"cpu", or "cuda:90", "hip:gfx942": device family and architecture."""
    dtype: str
    """Dtype of q, k, v and of the output: "float32", "bfloat16", "float16", "float64"."""
    head_dim: int
    """Features per head of Q and K."""
    value_dim: int
    """Features per head of V and of the output."""
    tile: Grid
    """Tokens of a full tile along (t, h, w)."""
    quant: str = "none"
    """"none", "fp8" or "int8"."""
    granularities: tuple[str, ...] = ("tile",)
    """Granularity of Q's and K's scales in each phase."""
    smooth_k: bool = True
    """Whether K's mean over tokens is removed before quantization."""
    smooth_v: bool = False
    """Whether V's mean over tokens is removed before quantization, and added to the output (FP8 only)."""
    hadamard: bool = False
    """Whether Q and K are rotated before quantization (FP8 only): see :mod:`fpscompile.hadamard`."""
    block_n: int = 128
    """Key slots per rounding block of P."""
    p_scale: float = P_SCALE
    """Factor on P before its cast to FP8."""
    key_mask: str = "none"
    """"none", "bool" (True keeps) or "float" (added to the scores)."""
    gqa_group: int = 1
    """Query heads per key head."""
    other_tokens: bool = False
    """Whether either sequence holds tokens outside the video."""
    backward: bool = False
    """Forward, or the gradients."""

    def __post_init__(self) -> None:
        if self.block_n % self.tile_slots and self.tile_slots % self.block_n:
            raise OptionError(f"block_n={self.block_n} and tile_slots={self.tile_slots} must divide one another")

    @property
    def tile_slots(self) -> int:
        """Slots per tile: see :func:`tile_slots`."""
        return tile_slots(self.tile, self.block_n)

    @property
    def product_dim(self) -> int:
        """Features that the products of Q and K sum over: the rotated ones where they are rotated."""
        return rotated_dim(self.head_dim) if self.hadamard else self.head_dim


def tile_slots(tile: Grid, block_n: int) -> int:
    """Slots that every tile occupies in a kernel's listing, so that tiles and blocks divide one another.

    A tile smaller than a block takes the next power of two that divides ``block_n`` (at least 16, the granule of a
    tensor core's K dimension); a larger one takes the next multiple of ``block_n``.

    Raises:
        OptionError: block_n is not a power of two >= 16.
    """
    if block_n < 16 or block_n & (block_n - 1):
        raise OptionError(f"block_n={block_n} must be a power of two >= 16")
    volume = tile[0] * tile[1] * tile[2]
    if volume >= block_n:
        return -(-volume // block_n) * block_n
    return max(16, 1 << (volume - 1).bit_length())
