"""Attention spelt out by hand, in a model that no library knows: found by what its dimensions are made of.

python examples/hand_written.py
"""

from __future__ import annotations

import torch
from rich import print  # noqa: A004 - examples print tables
from torch import nn

import fpscompile


class Block(nn.Module):
    """Text and video tokens in one sequence, attention as two einsums and a softmax."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, self.heads, -1)).unbind(2)
        scores = torch.einsum("bihd,bjhd->bhij", q, k) * q.shape[-1] ** -0.5
        mixed = torch.einsum("bhij,bjhd->bihd", scores.softmax(-1), v)
        return x + self.out(mixed.flatten(2))


class Transformer(nn.Module):
    """Latents [B, 8, t, h, w] and text [B, n, 32] to latents."""

    def __init__(self, width: int = 64, heads: int = 2, layers: int = 2) -> None:
        super().__init__()
        self.patch = nn.Conv3d(8, width, kernel_size=(1, 2, 2), stride=(1, 2, 2))
        self.text = nn.Linear(32, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.head = nn.Linear(width, 8 * 4)

    def forward(self, latents: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        grid = self.patch(latents)
        t, h, w = grid.shape[2:]
        words = self.text(text)
        x = torch.cat([words, grid.flatten(2).transpose(1, 2)], dim=1)
        for block in self.blocks:
            x = block(x)
        patches = self.head(x[:, words.shape[1] :]).unflatten(1, (t, h, w)).unflatten(-1, (8, 2, 2))
        return patches.permute(0, 4, 1, 2, 5, 3, 6).reshape_as(latents)


def main(inner: str = "inductor") -> int:
    """Returns the number of attention calls that were rewritten."""
    torch.manual_seed(0)
    model = Transformer().eval()
    latents, text = torch.randn(1, 8, 4, 32, 32), torch.randn(1, 20, 32)
    options = {"tile": (2, 8, 8), "density": 0.5, "inner": inner}
    with torch.no_grad():
        report = fpscompile.explain(model, latents, text, options=options)
        print(report)
        torch.compile(model, backend="fps", options=options)(latents, text)
    return report.rewritten


if __name__ == "__main__":
    main()
