"""Rectified flow (Liu et al., arXiv 2209.03003): straight paths from data to noise, and their velocity.

``x_sigma = (1 - sigma) * clip + sigma * noise``; the model predicts ``noise - clip`` and is told ``1000 * sigma``.
Noise levels are shifted (Esser et al., arXiv 2403.03206): ``sigma = s*u / (1 + (s - 1)*u)`` with ``u`` uniform.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import torch
from torch import Tensor

from small_wan.model import Size, velocity

SHIFT = 2.0
"""Flow shift of training and sampling. ``options={"timestep": {"shift": SHIFT}}`` tells the backend."""


class DivergedError(RuntimeError):
    """The loss is not a finite number."""


def shifted(u: Tensor) -> Tensor:
    """Noise level at remaining work ``u``, both in [0, 1]."""
    return SHIFT * u / (1 + (SHIFT - 1) * u)


def losses(model: Any, clips: Tensor, noise: Tensor, u: Tensor, size: Size) -> Tensor:
    """Flow-matching loss of each clip: f32[B].

    Args:
        clips, noise: f32[B, 3, frames, pixels, pixels]; clips in [-1, 1].
        u: f32[B], remaining work.
    """
    sigma = shifted(u)
    at = sigma.view(-1, 1, 1, 1, 1)
    predicted = velocity(model, (1 - at) * clips + at * noise, 1000 * sigma, size)
    return (predicted.float() - (noise - clips)).square().mean(dim=(1, 2, 3, 4))


def draw_u(batch: int, generator: torch.Generator) -> Tensor:
    """Remaining work of each clip, stratified over the batch so that a small one still covers the range."""
    u = (torch.arange(batch) + torch.rand(batch, generator=generator)) / batch
    return u[torch.randperm(batch, generator=generator)]


def check_finite(loss: Tensor, step: int, kept: object) -> float:
    """The loss as a number.

    Raises:
        DivergedError: it is NaN or infinite; names the step and the checkpoint that still holds good weights.
    """
    value = float(loss)
    if not math.isfinite(value):
        raise DivergedError(
            f"loss is {value} at step {step}; no weights were written since {kept}: resume from it with a lower --lr"
        )
    return value


@torch.no_grad()
def sample(model: Any, noise: Tensor, size: Size, steps: int = 20) -> Tensor:
    """Euler steps from ``noise`` to a clip, f32[B, 3, frames, pixels, pixels]."""
    levels = shifted(torch.linspace(1, 0, steps + 1, device=noise.device))
    x = noise
    for here, there in itertools.pairwise(levels):
        x = x + (there - here) * velocity(model, x, (1000 * here).expand(x.shape[0]).contiguous(), size)
    return x
