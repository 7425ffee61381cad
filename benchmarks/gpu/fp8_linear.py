"""Linear layers in FP8, for the end-to-end comparison: E4M3 weights and activations, one scale per row of each.

Attention alone cannot reach the end-to-end target (the linear layers of a 14B model take a third of a dense step), so
both are shown, with this stand-in for what torchao's row-wise dynamic quantization does.

Where a norm precedes a layer, Inductor fuses the quantization with it. Where nothing does that it could fuse (the
output of attention), or GELU does, one kernel reads and writes each row once (:mod:`quantize_rows`).
"""

from __future__ import annotations

import torch
from quantize_rows import E4M3_MAX, MOST, quantize_rows
from torch import nn


class Fp8Linear(nn.Module):
    """``nn.Linear`` with both operands in E4M3; activations are quantized row by row as they come.

    Args:
        linear: what it takes the place of.
        own_kernel: quantize by one kernel of its own, not by what Inductor fuses with what comes before.
        add_bias: False leaves the bias to whoever takes the result.
    """

    def __init__(self, linear: nn.Linear, own_kernel: bool = False, add_bias: bool = True) -> None:
        super().__init__()
        weight = linear.weight.detach()
        scale = weight.float().abs().amax(1, keepdim=True).clamp(min=1e-12) / E4M3_MAX
        self.register_buffer("weight", (weight.float() / scale).to(torch.float8_e4m3fn))
        self.register_buffer("scale", scale.t().contiguous())  # [1, out]
        self.bias = linear.bias
        self.own_kernel = own_kernel
        self.add_bias = add_bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = x.reshape(-1, x.shape[-1])
        if self.own_kernel:
            quantized, scale = quantize_rows(rows, None, False)
        else:
            scale = rows.float().abs().amax(1, keepdim=True).clamp(min=1e-12) / E4M3_MAX
            quantized = (rows.float() / scale).to(torch.float8_e4m3fn)
        return self.multiply(quantized, scale, x)

    def multiply(self, quantized: torch.Tensor, scale: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """The product of operands that are quantized already, in the dtype and the leading shape of ``x``."""
        out = torch._scaled_mm(
            quantized, self.weight.t(), scale_a=scale, scale_b=self.scale, out_dtype=x.dtype, use_fast_accum=True
        )
        if self.bias is not None and self.add_bias:
            out = out + self.bias
        return out.view(*x.shape[:-1], -1)


class Fp8FeedForward(nn.Module):
    """Linear, GELU in its tanh form, linear. Bias, GELU and quantization are one kernel between the two products."""

    def __init__(self, first: nn.Linear, second: nn.Linear) -> None:
        super().__init__()
        self.first = Fp8Linear(first, add_bias=False)
        self.second = Fp8Linear(second)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.first(x)
        quantized, scale = quantize_rows(hidden.view(-1, hidden.shape[-1]), self.first.bias, True)
        return self.second.multiply(quantized, scale, hidden)


def feed_forward(module: nn.Module) -> tuple[nn.Linear, nn.Linear] | None:
    """The two layers of a diffusers ``FeedForward`` that is linear, GELU (tanh), linear; None for anything else."""
    net = getattr(module, "net", None)
    if type(module).__name__ != "FeedForward" or net is None or len(net) != 3 or module.training:
        return None
    first, _dropout, second = net
    if type(first).__name__ != "GELU" or getattr(first, "approximate", None) != "tanh":
        return None
    fits = isinstance(first.proj, nn.Linear) and isinstance(second, nn.Linear) and second.in_features <= MOST
    return (first.proj, second) if fits else None


def replace_linears(module: nn.Module, smallest: int = 1024, inside: str = "") -> int:
    """Swap every linear layer of at least ``smallest`` features on both sides, in place; returns their number.

    Args:
        inside: name of ``module`` in its parent: what follows attention is called ``to_out``.
    """
    count = 0
    for name, child in list(module.named_children()):
        pair = feed_forward(child)
        if pair is not None and all(min(linear.in_features, linear.out_features) >= smallest for linear in pair):
            setattr(module, name, Fp8FeedForward(*pair))
            count += 2
        elif isinstance(child, nn.Linear) and min(child.in_features, child.out_features) >= smallest:
            own = "to_out" in (name, inside) and child.in_features <= MOST
            setattr(module, name, Fp8Linear(child, own_kernel=own))
            count += 1
        else:
            count += replace_linears(child, smallest, name)
    return count
