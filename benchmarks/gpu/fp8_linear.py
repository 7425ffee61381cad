"""Linear layers in FP8, for the end-to-end comparison: E4M3 weights and activations, one scale per row of each.

Attention alone cannot reach the end-to-end target (the linear layers of a 14B model take a third of a dense step), so
both are shown, with this stand-in for what torchao's row-wise dynamic quantization does.
"""

from __future__ import annotations

import torch
from torch import nn

E4M3_MAX = 448.0


class Fp8Linear(nn.Module):
    """``nn.Linear`` with both operands in E4M3; activations are quantized row by row as they come."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        weight = linear.weight.detach()
        scale = weight.float().abs().amax(1, keepdim=True).clamp(min=1e-12) / E4M3_MAX
        self.register_buffer("weight", (weight.float() / scale).to(torch.float8_e4m3fn))
        self.register_buffer("scale", scale.t().contiguous())  # [1, out]
        self.bias = linear.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = x.reshape(-1, x.shape[-1])
        scale = rows.float().abs().amax(1, keepdim=True).clamp(min=1e-12) / E4M3_MAX
        quantized = (rows.float() / scale).to(torch.float8_e4m3fn)
        out = torch._scaled_mm(
            quantized, self.weight.t(), scale_a=scale, scale_b=self.scale, out_dtype=x.dtype, use_fast_accum=True
        )
        if self.bias is not None:
            out = out + self.bias
        return out.view(*x.shape[:-1], -1)


def replace_linears(module: nn.Module, smallest: int = 1024) -> int:
    """Swap every linear layer of at least ``smallest`` features on both sides, in place; returns their number."""
    count = 0
    for name, child in list(module.named_children()):
        if isinstance(child, nn.Linear) and min(child.in_features, child.out_features) >= smallest:
            setattr(module, name, Fp8Linear(child))
            count += 1
        else:
            count += replace_linears(child, smallest)
    return count
