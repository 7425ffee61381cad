"""One block of 3D attention over tokens in layouts that models use, or might."""

from __future__ import annotations

import torch
from models.authors import DIM, FEATURES, HEADS, TEXT, Attend, Patches
from torch import nn


class Block(Patches):
    """Tokens in some order and company -> one attention -> back to a video."""

    keys = HEADS

    def __init__(self, spelling: str = "sdpa") -> None:
        super().__init__()
        self.attend = Attend(spelling)
        self.q, self.kv, self.o = nn.Linear(DIM, DIM), nn.Linear(DIM, 2 * self.keys * FEATURES), nn.Linear(DIM, DIM)

    def mix(
        self, x: torch.Tensor, context: torch.Tensor | None = None, keep: torch.Tensor | None = None
    ) -> torch.Tensor:
        q = self.q(x).unflatten(-1, (HEADS, FEATURES))
        k, v = self.kv(x if context is None else context).unflatten(-1, (2, self.keys, FEATURES)).unbind(2)
        return x + self.o(self.attend(q, k, v, keep).flatten(2))

    def forward(self, video: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        return self.leave(self.mix(self.enter(video) + self.shift(timestep)), video)


class FoldedFrames(Block):
    """``(b t) (h w) c`` throughout the network, joined for the one attention."""

    def forward(self, video: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        x = self.embed(video)
        b, _, t, h, w = x.shape
        x = x.transpose(1, 2).reshape(b * t, DIM, h * w).transpose(1, 2)
        x = x + self.shift(timestep).repeat_interleave(t, dim=0)
        x = self.mix(x.reshape(b, t * h * w, DIM)).view(b * t, h * w, DIM)
        return self.leave(x.reshape(b, t * h * w, DIM), video)


class ChannelsLast(Block):
    """[B, T, H, W, C] throughout, patches by a linear layer."""

    def forward(self, video: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        x = video.permute(0, 2, 3, 4, 1)
        b, t, h, w, c = x.shape
        x = x.reshape(b, t, h // 2, 2, w // 2, 2, c).permute(0, 1, 2, 4, 6, 3, 5).flatten(4)
        x = torch.nn.functional.linear(x, self.embed.weight.flatten(1), self.embed.bias)
        x = self.mix((x + self.shift(timestep)[:, None, None]).flatten(1, 3))
        return self.leave(x, video)


class HeightFirst(Block):
    """Tokens ordered h, w, t: not row-major in (t, h, w)."""

    def forward(self, video: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        x = self.embed(video)
        b, _, t, h, w = x.shape
        x = self.mix(x.permute(0, 3, 4, 2, 1).reshape(b, h * w * t, DIM) + self.shift(timestep))
        return self.leave(x.view(b, h, w, t, DIM).permute(0, 3, 1, 2, 4).reshape(b, -1, DIM), video)


class TilePermuted(Block):
    """Tokens already sorted into tiles of 1 x 2 x 2."""

    def forward(self, video: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        x = self.embed(video)
        b, _, t, h, w = x.shape
        tiles = x.view(b, DIM, t, h // 2, 2, w // 2, 2).permute(0, 2, 3, 5, 4, 6, 1).reshape(b, -1, DIM)
        x = self.mix(tiles + self.shift(timestep))
        x = x.view(b, t, h // 2, w // 2, 2, 2, DIM).permute(0, 1, 2, 4, 3, 5, 6)
        return self.leave(x.reshape(b, t * h * w, DIM), video)


class Registers(Block):
    """Learned tokens in front: one class token, or several registers."""

    def __init__(self, count: int, spelling: str = "sdpa") -> None:
        super().__init__(spelling)
        self.tokens = nn.Parameter(torch.randn(1, count, DIM))

    def forward(self, video: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        x = self.enter(video) + self.shift(timestep)
        count = self.tokens.shape[1]
        x = self.mix(torch.cat([self.tokens.expand(x.shape[0], -1, -1), x], dim=1))
        return self.leave(x[:, count:], video)


class History(Block):
    """Frames of an earlier clip, coarser, in front of the video."""

    def forward(self, video: torch.Tensor, timestep: torch.Tensor, past: torch.Tensor) -> torch.Tensor:
        x = self.enter(video) + self.shift(timestep)
        old = self.enter(past)
        return self.leave(self.mix(torch.cat([old, x], dim=1))[:, old.shape[1] :], video)


class PaddedText(Block):
    """Video first, then text of another length in every sample."""

    def forward(
        self, video: torch.Tensor, timestep: torch.Tensor, text: torch.Tensor, valid: torch.Tensor
    ) -> torch.Tensor:
        x = self.enter(video) + self.shift(timestep)
        length = x.shape[1]
        keep = torch.cat([valid.new_ones(x.shape[0], length, dtype=torch.bool), valid.bool()], dim=1)
        return self.leave(self.mix(torch.cat([x, text], dim=1), keep=keep)[:, :length], video)


class LongerKeys(Block):
    """Video queries over text and video, half as many key heads."""

    keys = HEADS // 2

    def forward(self, video: torch.Tensor, timestep: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        x = self.enter(video) + self.shift(timestep)
        return self.leave(self.mix(x, torch.cat([text, x], dim=1)), video)


class Multihead(Patches):
    """nn.MultiheadAttention, dropout rate set but not in use."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(DIM, HEADS, dropout=0.1, batch_first=True)

    def forward(self, video: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        x = self.enter(video) + self.shift(timestep)
        return self.leave(x + self.attention(x, x, x, need_weights=False)[0], video)


class Sliced(Block):
    """Queries in slices, to save memory."""

    def forward(self, video: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        x = self.enter(video) + self.shift(timestep)
        q = self.q(x).unflatten(-1, (HEADS, FEATURES)).transpose(1, 2).flatten(0, 1)
        k, v = self.kv(x).unflatten(-1, (2, HEADS, FEATURES)).permute(2, 0, 3, 1, 4).flatten(1, 2)
        pieces = [(torch.bmm(part, k.mT) * FEATURES**-0.5).softmax(-1) @ v for part in q.split(50, dim=1)]
        out = torch.cat(pieces, dim=1).unflatten(0, (-1, HEADS)).transpose(1, 2).flatten(2)
        return self.leave(x + self.o(out), video)


__all__ = ["TEXT", "Block", "ChannelsLast", "FoldedFrames", "HeightFirst", "History", "LongerKeys", "Multihead"]
__all__ += ["PaddedText", "Registers", "Sliced", "TilePermuted"]
