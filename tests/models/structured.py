"""A video model whose heads attend in known ways: locally, within a frame, along time, and everywhere."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

HEADS = ("local", "spatial", "temporal", "global")
D = 32


def bumps(count: int, width: float) -> torch.Tensor:
    """[count, count], rows of norm 1 whose product falls off with the distance of their indices."""
    places = torch.arange(count, dtype=torch.float32)
    return F.normalize(torch.exp(-((places[:, None] - places) ** 2) / (2 * width**2)), dim=-1)


class Block(nn.Module):
    """Queries and keys are codes of the token's place, and a little content; values are content."""

    def __init__(self, grid: tuple[int, int, int], kinds: tuple[str, ...], sharpness: float, content: float) -> None:
        super().__init__()
        t, h, w = torch.meshgrid(*(torch.arange(size) for size in grid), indexing="ij")
        codes = [bumps(size, 0.6)[place.flatten()] for size, place in zip(grid, (t, h, w), strict=True)]
        uses = {"local": (1, 1, 1), "spatial": (1, 0, 0), "temporal": (0, 1, 1), "global": (0, 0, 0)}
        heads = [torch.cat([use * code for use, code in zip(uses[kind], codes, strict=True)], -1) for kind in kinds]
        padded = torch.stack([F.pad(head, (0, D - head.shape[1])) for head in heads])
        self.register_buffer("places", padded * (sharpness**0.5) * D**0.25)
        self.kinds, self.content = kinds, content
        self.qkv = nn.Linear(16, 3 * len(kinds) * D)
        self.out = nn.Linear(len(kinds) * D, 16)

    def forward(self, x: torch.Tensor, sharp: torch.Tensor) -> torch.Tensor:
        q, k, v = (part.unflatten(-1, (len(self.kinds), D)).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
        q = self.content * q + self.places * sharp[:, None, None, None]
        k = self.content * k + self.places
        return x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Structured(nn.Module):
    """Reads a latent [B, 4, T, H, W]; ``timestep`` [B] runs from 1000 to 0.

    Args:
        late: whether heads are sharp only in the second half of the denoising steps.
    """

    def __init__(
        self,
        grid: tuple[int, int, int] = (4, 8, 8),
        kinds: tuple[tuple[str, ...], ...] = (HEADS, HEADS[::-1]),
        sharpness: float = 14.0,
        content: float = 0.3,
        late: bool = False,
    ) -> None:
        super().__init__()
        self.embed = nn.Conv3d(4, 16, 1)
        self.blocks = nn.ModuleList(Block(grid, heads, sharpness, content) for heads in kinds)
        self.late = late

    def forward(self, latent: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        x = self.embed(latent).flatten(2).transpose(1, 2)
        sharp = (timestep < 500).to(x.dtype) if self.late else torch.ones_like(timestep, dtype=x.dtype)
        for block in self.blocks:
            x = block(x, sharp)
        return x


def samples(count: int, grid: tuple[int, int, int] = (4, 8, 8), timestep: float | None = None) -> list[dict]:
    """Calls of fresh latents, at random steps unless one is given."""
    steps = torch.rand(count) * 1000 if timestep is None else torch.full((count,), timestep)
    return [{"latent": torch.randn(1, 4, *grid), "timestep": step[None]} for step in steps]
