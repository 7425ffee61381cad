"""Functions of a small latent that attend in one way, and what the backend says about them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fpscompile import Backend, Settings
from fpscompile.records import SiteRecord

T, H, W, HEADS, D = 3, 4, 5, 2, 8
LENGTH = T * H * W
DENSE = {"density": 1.0, "inner": "eager", "tile": (2, 2, 2), "lowering": "boxes", "quant": "none"}
SPARSE = DENSE | {"density": None, "window": (1, 1, 2)}


def latent(batch: int = 2, channels: int = HEADS * D, scale: float = 0.5) -> torch.Tensor:
    return scale * torch.randn(batch, channels, T, H, W)


def tokens_of(video: torch.Tensor) -> torch.Tensor:
    """[B, C, T, H, W] -> [B, L, C]."""
    return video.flatten(2).transpose(1, 2)


def wide_heads(video: torch.Tensor) -> torch.Tensor:
    """[B, L, heads, D], as flash-attn has it."""
    return tokens_of(video).unflatten(-1, (HEADS, D))


def heads(video: torch.Tensor) -> torch.Tensor:
    """[B, heads, L, D], as PyTorch has it."""
    return wide_heads(video).transpose(1, 2)


@dataclass(frozen=True)
class Outcome:
    """One compiled call beside the eager one."""

    actual: torch.Tensor
    expected: torch.Tensor
    sites: list[SiteRecord]
    notes: list[str]
    graphs: int

    @property
    def rewritten(self) -> int:
        return sum(site.rewritten for site in self.sites)

    @property
    def error(self) -> float:
        return float((self.actual - self.expected).norm() / self.expected.norm())

    @property
    def untouched(self) -> bool:
        """Whether nothing was rewritten and the result is eager's to the last bit."""
        return not self.rewritten and torch.equal(self.actual, self.expected)

    def says(self, words: str) -> bool:
        """Whether a record names the reason."""
        return any(words in (site.reason or "") for site in self.sites) or any(words in note for note in self.notes)


def compiled(function: Callable[..., Any], *args: Any, dynamic: bool | None = None, **options: Any) -> Outcome:
    """Compile and run a function, and run it eagerly on the same inputs."""
    torch._dynamo.reset()
    fps = Backend(Settings.from_options(DENSE | options))
    state = torch.random.get_rng_state()
    actual = torch.compile(function, backend=fps, dynamic=dynamic)(*args)
    torch.random.set_rng_state(state)
    expected = function(*args)
    return Outcome(
        actual,
        expected,
        [site for graph in fps.graphs for site in graph.sites],
        [note.message for graph in fps.graphs for note in graph.notes],
        len(fps.graphs),
    )


def gradient(result: torch.Tensor, inputs: Sequence[torch.Tensor]) -> torch.Tensor:
    """All gradients of the result's square sum, concatenated."""
    return torch.cat([grad.flatten() for grad in torch.autograd.grad(result.square().sum(), list(inputs))])


class WeighedVideo(nn.Module):
    """Patches of (1, 2, 2) and one attention, whose weights ``weigh`` makes of scores [B, heads, L, L]."""

    def __init__(self, weigh: Callable[[torch.Tensor], torch.Tensor], scale: float = D**-0.5) -> None:
        super().__init__()
        width = HEADS * D
        self.embed, self.qkv = nn.Conv3d(4, width, (1, 2, 2), (1, 2, 2)), nn.Linear(width, 3 * width)
        self.weigh, self.scale = weigh, scale
        self.window: torch.Tensor | None = None
        """bool [L, L]: what is seen; all where None."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.qkv(self.embed(x).flatten(2).transpose(1, 2))
        q, k, v = x.unflatten(-1, (3, HEADS, D)).permute(2, 0, 3, 1, 4).unbind(0)
        scores = q @ k.transpose(-2, -1) * self.scale
        if self.window is not None:
            scores = scores.masked_fill(~self.window, -math.inf)
        return (self.weigh(scores) @ v).transpose(1, 2).flatten(2)
