"""Small video transformers in the style of the original repositories, and in layouts of our own.

Each takes keyword tensors and returns a tensor. The 3D attention of a model goes through one :class:`Attend`, whose
``window`` mask, when set, is what a sparse rewrite must equal.
"""

from __future__ import annotations

from typing import Any

import torch
from models.standin_flash import (
    flash_attn_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_func,
    memory_efficient_attention,
)
from torch import nn
from torch.nn import functional as F
from torch.nn.attention.flex_attention import flex_attention

DIM, HEADS, TEXT, CHANNELS = 32, 2, 7, 4
FEATURES = DIM // HEADS


class Attend(nn.Module):
    """q, k, v [B, L, heads, D] -> the same, spelled in one of several ways; ``keep``: bool [B, keys]."""

    def __init__(self, spelling: str) -> None:
        super().__init__()
        self.spelling = spelling
        self.window: torch.Tensor | None = None

    def forward(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, keep: torch.Tensor | None = None
    ) -> torch.Tensor:
        if self.window is not None:
            return self.windowed(q, k, v, keep, self.window)
        if self.spelling == "flash":
            return flash_attn_func(q, k, v)
        if self.spelling == "packed":
            return flash_attn_qkvpacked_func(torch.stack([q, k, v], 2))
        if self.spelling == "xformers":
            return memory_efficient_attention(q, k, v)
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return self.heads_first(q, k, v, keep).transpose(1, 2)

    def heads_first(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, keep: torch.Tensor | None) -> torch.Tensor:
        mask = keep[:, None, None] if keep is not None else None
        if self.spelling == "sdpa":
            return F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=q.shape[1] != k.shape[1])
        if self.spelling == "flex":
            return flex_attention(q, k, v)
        if self.spelling == "math":
            scores = (q * FEATURES**-0.5) @ k.transpose(-2, -1)
            if mask is not None:
                scores = scores.masked_fill(~mask, float("-inf"))
            return scores.softmax(dim=-1) @ v
        assert self.spelling == "folded"
        b, h, length, d = q.shape
        q, k, v = (x.reshape(b * h, -1, d) for x in (q, k, v))
        scores = torch.baddbmm(q.new_empty(b * h, length, length), q, k.mT, beta=0, alpha=d**-0.5)
        return torch.bmm(scores.softmax(-1), v).view(b, h, length, d)

    @staticmethod
    def windowed(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, keep: torch.Tensor | None, window: torch.Tensor
    ) -> torch.Tensor:
        mask = window if keep is None else window & keep[:, None, None]
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=q.shape[1] != k.shape[1]).transpose(1, 2)


class RMSNorm(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * self.weight


def tables(t: int, h: int, w: int, width: int = FEATURES) -> torch.Tensor:
    """Angles [T * H * W, width / 2]: half of the features turn with time, a quarter with each of h and w."""
    parts = []
    for length, share, shape in ((t, width // 4, (t, 1, 1)), (h, width // 8, (1, h, 1)), (w, width // 8, (1, 1, w))):
        rates = 1.0 / 100 ** (torch.arange(share) / share)
        parts.append((torch.arange(length)[:, None] * rates).view(*shape, share).expand(t, h, w, share))
    return torch.cat(parts, -1).reshape(t * h * w, width // 2)


def turn_complex(x: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
    """[B, L, heads, D], pairs as complex numbers."""
    turned = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
    turned = turned * torch.polar(torch.ones_like(angles), angles)[:, None]
    return torch.view_as_real(turned).flatten(3).type_as(x)


def turn_halves(x: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
    """The same by pairs of neighbours, in real arithmetic."""
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = angles.cos()[:, None], angles.sin()[:, None]
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(3)


class Patches(nn.Module):
    """[B, C, T, H, W] <-> tokens, patches of (1, 2, 2); shift from the timestep."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv3d(CHANNELS, DIM, (1, 2, 2), (1, 2, 2))
        self.time, self.head = nn.Linear(1, DIM), nn.Linear(DIM, CHANNELS * 4)

    def enter(self, video: torch.Tensor) -> torch.Tensor:
        return self.embed(video).flatten(2).transpose(1, 2)

    def shift(self, timestep: torch.Tensor) -> torch.Tensor:
        return self.time(timestep[:, None].float() / 1000)[:, None]

    def leave(self, x: torch.Tensor, video: torch.Tensor) -> torch.Tensor:
        b, c, t, h, w = video.shape
        x = self.head(x).view(b, t, h // 2, w // 2, 1, 2, 2, c)
        return x.permute(0, 7, 1, 4, 2, 5, 3, 6).reshape(b, c, t, h, w)


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(DIM, 2 * DIM), nn.GELU(approximate="tanh"), nn.Linear(2 * DIM, DIM))


def turn_listed(x: torch.Tensor, sizes: torch.Tensor) -> torch.Tensor:
    """Sample by sample, on sizes that are read back as numbers: a graph break in every call."""
    turned = [turn_complex(sample[None], tables(*size)) for sample, size in zip(x, sizes.tolist(), strict=True)]
    return torch.cat(turned)


class WanBlock(nn.Module):
    def __init__(self, attend: Attend) -> None:
        super().__init__()
        self.attend = attend
        self.q, self.k, self.v, self.o = (nn.Linear(DIM, DIM) for _ in range(4))
        self.norm_q, self.norm_k = RMSNorm(DIM), RMSNorm(DIM)
        self.cross_q, self.cross_kv, self.cross_o = nn.Linear(DIM, DIM), nn.Linear(DIM, 2 * DIM), nn.Linear(DIM, DIM)
        self.ffn = mlp()

    def forward(self, x: torch.Tensor, shift: torch.Tensor, sizes: Any, text: torch.Tensor) -> torch.Tensor:
        b, length, _ = x.shape
        angles = None
        if not isinstance(sizes, torch.Tensor) or sizes.ndim == 1:
            # Grid sizes that are a tensor are read back as numbers here, which breaks the graph.
            angles = tables(*(sizes.tolist() if isinstance(sizes, torch.Tensor) else sizes))
        y = F.layer_norm(x, (DIM,)) + shift
        q = self.norm_q(self.q(y)).view(b, length, HEADS, FEATURES)
        k = self.norm_k(self.k(y)).view(b, length, HEADS, FEATURES)
        v = self.v(y).view(b, length, HEADS, FEATURES)
        if angles is None:
            x = x + self.o(self.attend(turn_listed(q, sizes), turn_listed(k, sizes), v).flatten(2))
        else:
            x = x + self.o(self.attend(turn_complex(q, angles), turn_complex(k, angles), v).flatten(2))
        q = self.cross_q(x).view(b, length, HEADS, FEATURES)
        k, v = self.cross_kv(text).view(b, -1, 2, HEADS, FEATURES).unbind(2)
        x = x + self.cross_o(flash_attn_func(q, k, v).flatten(2))
        return x + self.ffn(F.layer_norm(x, (DIM,)))


class Wan(Patches):
    """Self-attention over the video, cross-attention to the text, complex rotations."""

    def __init__(self, spelling: str = "flash", layers: int = 2, listed: bool = False, each: bool = False) -> None:
        super().__init__()
        self.attend, self.listed, self.each = Attend(spelling), listed, each
        self.blocks = nn.ModuleList(WanBlock(self.attend) for _ in range(layers))

    def forward(self, video: torch.Tensor, timestep: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        x = self.embed(video)
        sizes: Any = torch.tensor(x.shape[2:]) if self.listed else x.shape[2:]
        if self.each:  # one row of sizes for each sample
            sizes = torch.tensor([list(x.shape[2:])] * x.shape[0])
        x = x.flatten(2).transpose(1, 2)
        shift = self.shift(timestep)
        for block in self.blocks:
            x = block(x, shift, sizes, text)
        return self.leave(x, video)


class Hunyuan(Patches):
    """One double-stream and one single-stream block; video first, then padded text, packed for flash-attn."""

    def __init__(self, spelling: str = "varlen") -> None:
        super().__init__()
        self.spelling, self.attend = spelling, Attend("sdpa")
        self.video_qkv, self.text_qkv, self.joint_qkv = (nn.Linear(DIM, 3 * DIM) for _ in range(3))
        self.video_out, self.text_out, self.joint_out = (nn.Linear(DIM, DIM) for _ in range(3))
        self.norm = RMSNorm(FEATURES)

    def qkv(self, layer: nn.Module, x: torch.Tensor, angles: torch.Tensor | None) -> list[torch.Tensor]:
        q, k, v = layer(F.layer_norm(x, (DIM,))).unflatten(-1, (3, HEADS, FEATURES)).permute(2, 0, 1, 3, 4)
        q, k = self.norm(q), self.norm(k)
        return [q, k, v] if angles is None else [turn_halves(q, angles), turn_halves(k, angles), v]

    def attention(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
        b, length = q.shape[:2]
        if self.attend.window is not None or self.spelling != "varlen":
            keep = torch.cat([valid.new_ones(b, length - TEXT, dtype=torch.bool), valid.bool()], 1)
            return self.attend(q, k, v, keep)
        ends = torch.zeros([2 * b + 1], dtype=torch.int32, device=q.device)
        counts = valid.sum(dim=1)
        for i in range(b):
            ends[2 * i + 1] = i * length + (counts[i] + (length - TEXT))
            ends[2 * i + 2] = (i + 1) * length
        flat = (x.reshape(b * length, HEADS, FEATURES) for x in (q, k, v))
        keys = ends.clone() if torch.is_grad_enabled() else ends
        return flash_attn_varlen_func(*flat, ends, keys, length, length).view(b, length, HEADS, FEATURES)

    def forward(
        self, video: torch.Tensor, timestep: torch.Tensor, text: torch.Tensor, valid: torch.Tensor
    ) -> torch.Tensor:
        x = self.embed(video)
        angles = tables(*x.shape[2:])
        x = x.flatten(2).transpose(1, 2) + self.shift(timestep)
        length = x.shape[1]
        pairs = zip(self.qkv(self.video_qkv, x, angles), self.qkv(self.text_qkv, text, None), strict=True)
        out = self.attention(*(torch.cat(pair, dim=1) for pair in pairs), valid).flatten(2)
        x, text = x + self.video_out(out[:, :length]), text + self.text_out(out[:, length:])
        joint = torch.cat([x, text], dim=1)
        q, k, v = self.qkv(self.joint_qkv, joint, None)
        q, k = (torch.cat([turn_halves(y[:, :length], angles), y[:, length:]], dim=1) for y in (q, k))
        joint = joint + self.joint_out(self.attention(q, k, v, valid).flatten(2))
        return self.leave(joint[:, :length], video)


class OpenSora2(nn.Module):
    """Text first; the video arrives packed as [B, L, C], its positions as values: no grid in the graph."""

    def __init__(self) -> None:
        super().__init__()
        self.attend = Attend("flash")
        self.enter, self.time, self.leave = nn.Linear(CHANNELS * 4, DIM), nn.Linear(1, DIM), nn.Linear(DIM, CHANNELS)
        self.qkv, self.out, self.norm = nn.Linear(DIM, 3 * DIM), nn.Linear(DIM, DIM), RMSNorm(FEATURES)

    def rotation(self, places: torch.Tensor) -> torch.Tensor:
        """[B, L, 3] -> [B, L, 1, D / 2, 2, 2]."""
        rates = 1.0 / 100 ** (torch.arange(0, FEATURES // 2, 1) / FEATURES)
        angles = (places.sum(-1, keepdim=True) * rates)[:, :, None]
        return torch.stack([angles.cos(), -angles.sin(), angles.sin(), angles.cos()], -1).unflatten(-1, (2, 2))

    @staticmethod
    def turned(x: torch.Tensor, turn: torch.Tensor) -> torch.Tensor:
        pairs = x.unflatten(-1, (-1, 1, 2))
        return (turn[..., 0] * pairs[..., 0] + turn[..., 1] * pairs[..., 1]).flatten(3)

    def forward(
        self, tokens: torch.Tensor, places: torch.Tensor, timestep: torch.Tensor, text: torch.Tensor
    ) -> torch.Tensor:
        x = self.enter(tokens) + self.time(timestep[:, None].float() / 1000)[:, None]
        x = torch.cat([text, x], dim=1)
        turn = self.rotation(torch.cat([torch.zeros_like(places[:, :TEXT]), places], dim=1))
        q, k, v = self.qkv(F.layer_norm(x, (DIM,))).unflatten(-1, (3, HEADS, FEATURES)).unbind(2)
        q, k = (self.turned(self.norm(y), turn) for y in (q, k))
        return self.leave((x + self.out(self.attend(q, k, v).flatten(2)))[:, TEXT:])


class Mochi(Patches):
    """Asymmetric streams: text of another width, unpadded by a number; the joint sequence through SDPA."""

    def __init__(self) -> None:
        super().__init__()
        self.attend = Attend("sdpa")
        self.video_qkv, self.text_qkv = nn.Linear(DIM, 3 * DIM, bias=False), nn.Linear(DIM, 3 * DIM, bias=False)
        self.video_out, self.norm = nn.Linear(DIM, DIM), RMSNorm(FEATURES)

    def forward(self, video: torch.Tensor, timestep: torch.Tensor, text: torch.Tensor, kept: int = 5) -> torch.Tensor:
        b, _, t, h, w = video.shape
        x = video.permute(0, 2, 1, 3, 4).flatten(0, 1)  # (b t) c h w
        x = F.conv2d(x, self.embed.weight[:, :, 0], self.embed.bias, stride=2)
        x = x.flatten(2).transpose(1, 2).reshape(b, t * (h // 2) * (w // 2), DIM) + self.shift(timestep)
        q, k, v = self.video_qkv(x).view(b, -1, 3, HEADS, FEATURES).unbind(2)
        angles = tables(t, h // 2, w // 2)
        q, k = turn_halves(self.norm(q), angles), turn_halves(self.norm(k), angles)
        tq, tk, tv = self.text_qkv(text)[:, :kept].view(b, -1, 3, HEADS, FEATURES).unbind(2)
        q, k, v = (torch.cat(pair, dim=1) for pair in ((q, self.norm(tq)), (k, self.norm(tk)), (v, tv)))
        out = self.attend(q, k, v)[:, : x.shape[1]]
        return self.leave(x + self.video_out(out.flatten(2)), video)


class Latte(Patches):
    """Spatial, then temporal attention: ``(b t) n d`` and ``(b n) t d``. Nothing is 3D."""

    def __init__(self) -> None:
        super().__init__()
        self.attend = Attend("math")
        self.qkv, self.out = nn.Linear(DIM, 3 * DIM), nn.Linear(DIM, DIM)

    def mix(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, HEADS, FEATURES)).unbind(2)
        return x + self.out(self.attend(q, k, v).flatten(2))

    def forward(self, video: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        x = self.embed(video)
        b, _, t, h, w = x.shape
        x = x.permute(0, 2, 3, 4, 1).reshape(b * t, h * w, DIM)
        x = self.mix(x).view(b, t, h * w, DIM).transpose(1, 2).reshape(b * h * w, t, DIM)
        x = self.mix(x).view(b, h * w, t, DIM).transpose(1, 2).reshape(b, t * h * w, DIM)
        return self.leave(x + self.shift(timestep), video)


class OpenSoraPlan(Patches):
    """Every g-th token in a group of its own: ``b (n g) c -> (b g) n c``, a sparse attention already.

    Where g divides the width, a group is a coarser video; elsewhere its tokens are in no grid.
    """

    def __init__(self, groups: int) -> None:
        super().__init__()
        self.groups = groups
        self.attend = Attend("sdpa")
        self.qkv, self.out = nn.Linear(DIM, 3 * DIM), nn.Linear(DIM, DIM)

    def forward(self, video: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        x = self.enter(video) + self.shift(timestep)
        b, length, _ = x.shape
        g = self.groups
        groups = x.view(b, length // g, g, DIM).transpose(1, 2).reshape(b * g, length // g, DIM)
        q, k, v = self.qkv(groups).unflatten(-1, (3, HEADS, FEATURES)).unbind(2)
        out = self.attend(q, k, v).flatten(2).view(b, g, length // g, DIM).transpose(1, 2).reshape(b, length, DIM)
        return self.leave(x + self.out(out), video)
