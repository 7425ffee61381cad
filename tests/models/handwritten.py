"""A small video DiT that writes its attention out, in every spelling that the matcher promises to know."""

from __future__ import annotations

import math

import torch
from torch import nn


def einsum(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    scores = torch.einsum("b h i d, b h j d -> b h i j", q, k) / math.sqrt(q.shape[-1])
    return torch.einsum("b h i j, b h j d -> b h i d", scores.softmax(dim=-1), v)


def einsum_channels_last(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    scores = torch.einsum("bihd,bjhd->bhij", q * q.shape[-1] ** -0.5, k)
    return torch.einsum("bhij,bjhd->bihd", torch.softmax(scores, -1), v).transpose(1, 2)


def einsum_key_first(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    scores = torch.einsum("bhjd,bhid->bhij", k, q) * q.shape[-1] ** -0.5
    return torch.einsum("bhjd,bhij->bhid", v, scores.softmax(-1))


def matmul(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    scores = (q @ k.transpose(-2, -1)) * q.shape[-1] ** -0.5
    return torch.nn.functional.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype) @ v


def masked(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    hidden = torch.zeros(1, 1, 1, k.shape[2], dtype=torch.bool, device=k.device)
    hidden[..., :5] = True
    scores = (q @ k.mT) * q.shape[-1] ** -0.5
    return scores.masked_fill(hidden, float("-inf")).softmax(-1) @ v


def additive(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    bias = torch.arange(k.shape[2], device=k.device).to(q.dtype)[None, None, None] / k.shape[2]
    return torch.softmax(q @ k.mT / math.sqrt(q.shape[-1]) + bias, dim=-1) @ v


def baddbmm(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    b, h, length, d = q.shape
    q, k, v = (x.reshape(b * h, length, d) for x in (q, k, v))
    empty = torch.empty(b * h, length, length, dtype=q.dtype, device=q.device)
    scores = torch.baddbmm(empty, q, k.transpose(-1, -2), beta=0, alpha=d**-0.5)
    return torch.bmm(scores.softmax(dim=-1), v).reshape(b, h, length, d)


SPELLINGS = {f.__name__: f for f in (einsum, einsum_channels_last, einsum_key_first, matmul, masked, additive, baddbmm)}


class Block(nn.Module):
    def __init__(self, dim: int, heads: int, spelling: str) -> None:
        super().__init__()
        self.heads, self.attend = heads, SPELLINGS[spelling]
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim))

    def forward(self, x: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
        qkv = self.qkv(self.norm1(x) + shift).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        x = x + self.out(self.attend(q, k, v).transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))


class HandwrittenDiT(nn.Module):
    """[B, C, T, H, W] -> the same; patches of (1, 2, 2)."""

    def __init__(self, spelling: str, dim: int = 32, heads: int = 2, layers: int = 2, channels: int = 4) -> None:
        super().__init__()
        self.patch = nn.Conv3d(channels, dim, (1, 2, 2), (1, 2, 2))
        self.time = nn.Linear(1, dim)
        self.blocks = nn.ModuleList(Block(dim, heads, spelling) for _ in range(layers))
        self.unpatch = nn.Linear(dim, channels * 4)

    def forward(self, video: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        b, c, t, h, w = video.shape
        x = self.patch(video).flatten(2).transpose(1, 2)
        shift = self.time(timestep[:, None].to(x.dtype) / 1000)[:, None]
        for block in self.blocks:
            x = block(x, shift)
        x = self.unpatch(x).view(b, t, h // 2, w // 2, c, 2, 2)
        return x.permute(0, 4, 1, 2, 5, 3, 6).reshape(b, c, t, h, w)
