"""Linear layers in FP8, for the end-to-end comparison: stand-ins for what torchao offers under these names.

Attention alone cannot reach the end-to-end target (the linear layers of a 14B model take a third of a dense step), so
both are shown. E4M3 weights and activations, and either

dynamic     one scale per row of each; those of activations are found as they come
static      one scale per tensor; those of activations are known from calibration (:func:`calibrated`)

With dynamic scales, and where a norm precedes a layer, Inductor fuses the quantization with it. Where nothing does that
it could fuse (the output of attention), or GELU does, one kernel reads and writes each row once (:mod:`quantize_rows`).
With static scales a kernel of our own quantizes, which may do what comes before besides: GELU, or a norm and the sum
that it is of (:mod:`norm_to_e4m3`, :mod:`fuse_norms`). E4M3 has the same relative precision over 15 powers of two, so
that one scale serves all rows whose largest values are within a few of them, and the product with one scale per tensor
is a little faster.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from norm_to_e4m3 import gelu_to_e4m3
from quantize_rows import E4M3_MAX, MOST, quantize_rows
from torch import nn

Scale = tuple[torch.Tensor, torch.Tensor]
"""The scale of a tensor and its reciprocal: f32 scalars."""


@functools.cache
def product_takes_bias(device: torch.device) -> bool:
    """Whether ``torch._scaled_mm`` adds a bias to a product with one scale per row: tried on a small one.

    Added afterwards, it is a pointwise operation between the product and what follows, of which Inductor makes float32
    intermediates: a block of Wan needs a quarter more memory with it.
    """
    if device.type != "cuda":
        return False
    a, b = (torch.randn(64, 64, device=device).to(torch.float8_e4m3fn) for _ in range(2))
    bias = 50.0 * torch.randn(64, device=device).to(torch.bfloat16)
    scales = {"scale_a": torch.rand(64, 1, device=device), "scale_b": torch.rand(1, 64, device=device)}
    common = {**scales, "out_dtype": torch.bfloat16, "use_fast_accum": True}
    try:
        found = torch._scaled_mm(a, b.t(), bias=bias, **common)
    except RuntimeError:
        return False
    return torch.allclose(found, torch._scaled_mm(a, b.t(), **common) + bias, rtol=2e-2, atol=0.5)


class Fp8Linear(nn.Module):
    """``nn.Linear`` with both operands in E4M3.

    Args:
        linear: what it takes the place of.
        scale: the scale of activations and its reciprocal, f32 scalars: static. None: each row has its own.
        own_kernel: quantize rows by one kernel of its own, not by what Inductor fuses with what comes before.
    """

    def __init__(self, linear: nn.Linear, scale: Scale | None = None, own_kernel: bool = False) -> None:
        super().__init__()
        weight = linear.weight.detach().float()
        largest = weight.abs().amax(1, keepdim=True) if scale is None else weight.abs().amax()
        found = largest.clamp(min=1e-12) / E4M3_MAX
        self.register_buffer("weight", (weight / found).to(torch.float8_e4m3fn))
        self.register_buffer("scale", found.t().contiguous() if scale is None else found)  # [1, out] or a number
        # Two buffers: Inductor's products take a scale that is an input of the graph, not a part of one.
        self.register_buffer("input_scale", scale[0] if scale else None)
        self.register_buffer("inverse", scale[1] if scale else None)
        self.bias = linear.bias
        self.own_kernel = own_kernel
        dtype, device = linear.weight.dtype, linear.weight.device
        self.bias_in_product = dtype == torch.bfloat16 and (
            (scale is not None and device.type == "cuda") or product_takes_bias(device)
        )

    def quantized(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """E4M3 [rows, n] and scales f32 [rows, 1], or one number."""
        rows = x.reshape(-1, x.shape[-1])
        if self.input_scale is not None:
            scaled = (rows.float() * self.inverse).clamp(-E4M3_MAX, E4M3_MAX)
            return scaled.to(torch.float8_e4m3fn), self.input_scale
        return quantize_rows(rows, None, False) if self.own_kernel else quantized_rows(rows)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        quantized, scale = self.quantized(x)
        inside = {"bias": self.bias} if self.bias is not None and self.bias_in_product else {}
        out = torch._scaled_mm(
            quantized, self.weight.t(), scale_a=scale, scale_b=self.scale, out_dtype=x.dtype, use_fast_accum=True,
            **inside,
        )  # fmt: skip
        if self.bias is not None and not inside:
            out = out + self.bias
        return out.view(*x.shape[:-1], -1)


def quantized_rows(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """E4M3 [rows, n] and scales f32 [rows, 1] by operations that Inductor fuses with a norm before them."""
    scale = rows.float().abs().amax(1, keepdim=True).clamp(min=1e-12) / E4M3_MAX
    return (rows.float() / scale).to(torch.float8_e4m3fn), scale


ROWS = 18432
"""About so many rows go through a feed-forward at a time, so that its hidden values need not all exist at once."""


@torch.library.custom_op("fps_bench::feed_forward", mutates_args=())
def fp8_feed_forward(
    x: torch.Tensor,
    scale: torch.Tensor,
    first: torch.Tensor,
    first_scale: torch.Tensor,
    first_bias: torch.Tensor | None,
    second: torch.Tensor,
    second_scale: torch.Tensor,
    second_bias: torch.Tensor | None,
    hidden_scale: torch.Tensor | None,
    hidden_inverse: torch.Tensor | None,
    bias_in_product: bool,
) -> torch.Tensor:
    """GELU(x first^T + bias) second^T + bias in bfloat16.

    Args:
        x: E4M3 [rows, n], with scale f32 [rows, 1].
        first: E4M3 [m, n], with first_scale f32 [1, m] and first_bias [m].
        second: E4M3 [k, m], with second_scale f32 [1, k] and second_bias [k]: None where the caller adds it.
        hidden_scale: f32 scalar, the scale of GELU's result; all scales are then one number each. None: its rows are
            looked at.
        hidden_inverse: its reciprocal.
        bias_in_product: whether a product can add its bias.
    """
    out = _feed_forward_shape(x, scale, first, first_scale, first_bias, second)
    pieces = max(1, round(x.shape[0] / ROWS))
    common = {"out_dtype": out.dtype, "use_fast_accum": True}
    last = {} if second_bias is None else {"bias": second_bias}
    inside = {"bias": first_bias} if first_bias is not None and bias_in_product else {}
    added = None if inside else first_bias
    for at in torch.arange(x.shape[0]).tensor_split(pieces):
        rows = slice(int(at[0]), int(at[-1]) + 1)
        scale_a = scale[rows] if scale.dim() else scale
        hidden = torch._scaled_mm(x[rows], first.t(), scale_a=scale_a, scale_b=first_scale, **inside, **common)
        if hidden_scale is None or hidden_inverse is None:
            values, scale_a = quantize_rows(hidden, added, True)
        else:
            values, scale_a = gelu_to_e4m3(hidden, added, hidden_inverse), hidden_scale
        del hidden
        operands = {"scale_a": scale_a, "scale_b": second_scale, **last, **common}
        torch._scaled_mm(values, second.t(), **operands, out=out[rows])
        del values, operands  # before the next piece's exist
    return out


@fp8_feed_forward.register_fake
def _feed_forward_shape(
    x: torch.Tensor,
    scale: torch.Tensor,
    first: torch.Tensor,
    first_scale: torch.Tensor,
    first_bias: torch.Tensor | None,
    second: torch.Tensor,
    *_: object,
) -> torch.Tensor:
    return x.new_empty(x.shape[0], second.shape[0], dtype=torch.bfloat16)


class Fp8FeedForward(nn.Module):
    """Linear, GELU in its tanh form, linear. Bias, GELU and quantization are one kernel between the two products."""

    def __init__(self, first: Fp8Linear, second: Fp8Linear) -> None:
        super().__init__()
        self.first = first
        self.second = second

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        quantized, scale = self.first.quantized(x)
        inside = self.second.bias if self.second.bias_in_product else None
        out = fp8_feed_forward(
            quantized, scale, self.first.weight, self.first.scale, self.first.bias, self.second.weight,
            self.second.scale, inside, self.second.input_scale, self.second.inverse, self.first.bias_in_product,
        )  # fmt: skip
        if inside is None and self.second.bias is not None:
            out = out + self.second.bias
        return out.view(*x.shape[:-1], -1)


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


HEADROOM = 2.0
"""How much larger than in calibration activations may be before they saturate; a power of two costs no precision."""


def calibrated(module: nn.Module, run: Callable[[], object]) -> dict[nn.Linear, Scale]:
    """Scales of the inputs of all linear layers in ``run()``, for :func:`replace_linears`.

    Layers that are handed the same tensor, one right after the other, share theirs: the same object.
    """
    largest: dict[nn.Linear, list[torch.Tensor]] = {}  # layers that share a scale share a list of one
    last: list[Any] = []

    def look(linear: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        assert isinstance(linear, nn.Linear)
        (x,) = inputs
        if not last or last[0] is not x:
            shared = largest.get(linear, [])
            shared[:] = [torch.stack([*shared, x.abs().amax().float()]).amax()]
            last[:] = x, shared
        largest[linear] = last[1]

    hooks = [m.register_forward_pre_hook(look) for m in module.modules() if isinstance(m, nn.Linear)]
    try:
        with torch.no_grad():
            run()
    finally:
        for hook in hooks:
            hook.remove()
    scales: dict[int, Scale] = {}
    for shared in largest.values():
        scale = HEADROOM * shared[0].clamp(min=1e-12) / E4M3_MAX
        scales.setdefault(id(shared), (scale, 1 / scale))
    return {linear: scales[id(shared)] for linear, shared in largest.items()}


def replace_linears(
    module: nn.Module, smallest: int = 1024, scales: dict[nn.Linear, Scale] | None = None, inside: str = ""
) -> int:
    """Swap every linear layer of at least ``smallest`` features on both sides, in place; returns their number.

    Args:
        scales: of :func:`calibrated`; without them scales are dynamic.
        inside: name of ``module`` in its parent: what follows attention is called ``to_out``.
    """
    count = 0
    known = scales or {}
    for name, child in list(module.named_children()):
        pair = feed_forward(child)
        if pair is not None and all(min(linear.in_features, linear.out_features) >= smallest for linear in pair):
            setattr(module, name, Fp8FeedForward(*(Fp8Linear(linear, known.get(linear)) for linear in pair)))
            count += 2
        elif isinstance(child, nn.Linear) and min(child.in_features, child.out_features) >= smallest:
            own = "to_out" in (name, inside) and child.in_features <= MOST
            setattr(module, name, Fp8Linear(child, known.get(child), own_kernel=own))
            count += 1
        else:
            count += replace_linears(child, smallest, scales, name)
    return count
