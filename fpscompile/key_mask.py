"""Key masks [B | 1, H | 1, 1, Lk]: bool, where False hides a key, or additive, where -inf hides one."""

from __future__ import annotations

import torch

LOWEST = -1e30
"""What finite additive masks are cut off at: kernels multiply by log2(e) and by the inverse of scales, and the lowest
float32 times those is -inf, which hides a key. Beside it every score is rounded away just as well."""


def visible_keys(key_mask: torch.Tensor | None, batch: int, key_heads: int, heads: int) -> torch.Tensor | None:
    """Keys that the key mask shows to some query head of each key head: bool [B, Hk, Lk], or None for all.

    Args:
        key_mask: None or [B | 1, H | 1, 1, Lk]; bool (False hides) or additive (-inf hides).
    """
    if key_mask is None:
        return None
    visible = key_mask if key_mask.dtype == torch.bool else key_mask != float("-inf")
    visible = visible[:, :, 0].expand(batch, heads, -1)
    return visible.unflatten(1, (key_heads, heads // key_heads)).any(2)


def additive(key_mask: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """The mask as contiguous ``dtype`` of its shape: -inf for hidden keys, :data:`LOWEST` or more for others."""
    if key_mask.dtype == torch.bool:
        hidden = float("-inf")
        return torch.zeros(key_mask.shape, dtype=dtype, device=key_mask.device).masked_fill_(~key_mask, hidden)
    bias = key_mask.to(dtype)
    return torch.where(bias == float("-inf"), bias, bias.clamp(min=LOWEST)).contiguous()
