"""diffusers' ``WanTransformer3DModel``, small, on pixels: 8 frames of 32 x 32 become 8 x 8 x 8 tokens."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from diffusers import WanTransformer3DModel
from torch import Tensor


@dataclass(frozen=True)
class Size:
    """What a checkpoint must agree on with the model that loads it."""

    frames: int = 8
    """Frames of a clip; each is one step of the grid along t."""
    pixels: int = 32
    """Height and width of a clip."""
    patch: int = 4
    """Pixels along h and w of one token."""
    heads: int = 4
    head_dim: int = 32
    layers: int = 4
    ffn: int = 512
    text_tokens: int = 4
    text_dim: int = 32

    def __post_init__(self) -> None:
        if self.pixels % self.patch:
            raise ValueError(f"pixels={self.pixels} is no multiple of patch={self.patch}")

    @property
    def grid(self) -> tuple[int, int, int]:
        """Video tokens along (t, h, w)."""
        return (self.frames, self.pixels // self.patch, self.pixels // self.patch)

    def as_dict(self) -> dict[str, int]:
        return asdict(self)


def build(size: Size, seed: int = 0) -> WanTransformer3DModel:
    """The model with fresh weights; the same ``seed`` gives the same weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return WanTransformer3DModel(
            patch_size=(1, size.patch, size.patch),
            num_attention_heads=size.heads,
            attention_head_dim=size.head_dim,
            in_channels=3,
            out_channels=3,
            text_dim=size.text_dim,
            freq_dim=64,
            ffn_dim=size.ffn,
            num_layers=size.layers,
            rope_max_seq_len=64,
        )


def velocity(model: Any, noisy: Tensor, timestep: Tensor, size: Size) -> Tensor:
    """One call of ``model`` without a text: its embedding is zero, so the text projection's biases are what it learns.

    Args:
        noisy: f32[B, 3, frames, pixels, pixels].
        timestep: f32[B], 1000 at pure noise.
    """
    text = noisy.new_zeros(noisy.shape[0], size.text_tokens, size.text_dim)
    out: Tensor = model(hidden_states=noisy, timestep=timestep, encoder_hidden_states=text, return_dict=False)[0]
    return out
