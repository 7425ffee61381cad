"""Real video transformers from small random configurations: odd, non-square grids, more than one block."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import diffusers
import torch
from models.handwritten import SPELLINGS, HandwrittenDiT
from torch import nn

TEXT = 7


@dataclass(frozen=True)
class Entry:
    """A model, its inputs for a token grid, and how many of its attention calls are 3D."""

    build: Callable[[], nn.Module]
    inputs: Callable[..., dict[str, Any]]
    video_sites: int


def randn(*shape: int, seed: int = 1, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def wan(layers: int = 2, **config: Any) -> nn.Module:
    torch.manual_seed(0)
    defaults = {
        "patch_size": (1, 2, 2),
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "in_channels": 4,
        "out_channels": 4,
        "text_dim": 16,
        "freq_dim": 16,
        "ffn_dim": 32,
        "num_layers": layers,
        "cross_attn_norm": True,
        "qk_norm": "rms_norm_across_heads",
        "rope_max_seq_len": 64,
    }
    return diffusers.WanTransformer3DModel(**(defaults | config)).eval()


def wan_inputs(
    grid: tuple[int, int, int] = (3, 6, 10), batch: int = 1, step: float = 500, dtype: torch.dtype = torch.float32
) -> dict[str, Any]:
    t, h, w = grid
    return {
        "hidden_states": randn(batch, 4, t, 2 * h, 2 * w, dtype=dtype),
        "timestep": torch.full((batch,), step),
        "encoder_hidden_states": randn(batch, TEXT, 16, seed=2, dtype=dtype),
        "return_dict": False,
    }


def cogvideox(**config: Any) -> nn.Module:
    torch.manual_seed(0)
    defaults = {
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "in_channels": 4,
        "out_channels": 4,
        "time_embed_dim": 8,
        "text_embed_dim": 16,
        "num_layers": 2,
        "sample_width": 20,
        "sample_height": 12,
        "sample_frames": 9,
        "patch_size": 2,
        "max_text_seq_length": TEXT,
        "use_rotary_positional_embeddings": False,
    }
    return diffusers.CogVideoXTransformer3DModel(**(defaults | config)).eval()


def cogvideox_inputs(
    grid: tuple[int, int, int] = (3, 6, 10), batch: int = 1, step: float = 500, dtype: torch.dtype = torch.float32
) -> dict[str, Any]:
    t, h, w = grid
    return {
        "hidden_states": randn(batch, t, 4, 2 * h, 2 * w, dtype=dtype),
        "timestep": torch.full((batch,), step),
        "encoder_hidden_states": randn(batch, TEXT, 16, seed=2, dtype=dtype),
        "return_dict": False,
    }


def hunyuan(**config: Any) -> nn.Module:
    torch.manual_seed(0)
    defaults = {
        "in_channels": 4,
        "out_channels": 4,
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "num_layers": 1,
        "num_single_layers": 1,
        "num_refiner_layers": 1,
        "mlp_ratio": 2.0,
        "patch_size": 2,
        "patch_size_t": 1,
        "qk_norm": "rms_norm",
        "guidance_embeds": True,
        "text_embed_dim": 16,
        "pooled_projection_dim": 8,
        "rope_axes_dim": (8, 4, 4),
    }
    return diffusers.HunyuanVideoTransformer3DModel(**(defaults | config)).eval()


def hunyuan_inputs(
    grid: tuple[int, int, int] = (3, 6, 10), batch: int = 1, step: float = 500, dtype: torch.dtype = torch.float32
) -> dict[str, Any]:
    t, h, w = grid
    valid = torch.ones(batch, TEXT, dtype=torch.long)
    valid[:, 5:] = 0
    return {
        "hidden_states": randn(batch, 4, t, 2 * h, 2 * w, dtype=dtype),
        "timestep": torch.full((batch,), step),
        "encoder_hidden_states": randn(batch, TEXT, 16, seed=2, dtype=dtype),
        "encoder_attention_mask": valid,
        "pooled_projections": randn(batch, 8, seed=3, dtype=dtype),
        "guidance": torch.full((batch,), 6000.0, dtype=dtype),
        "return_dict": False,
    }


def handwritten_inputs(
    grid: tuple[int, int, int] = (3, 6, 10), batch: int = 1, step: float = 500, dtype: torch.dtype = torch.float32
) -> dict[str, Any]:
    t, h, w = grid
    return {"video": randn(batch, 4, t, 2 * h, 2 * w, dtype=dtype), "timestep": torch.full((batch,), step)}


def _handwritten(spelling: str) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        torch.manual_seed(0)
        return HandwrittenDiT(spelling).eval()

    return build


ZOO: dict[str, Entry] = {
    "wan": Entry(wan, wan_inputs, 2),
    "cogvideox-2b": Entry(cogvideox, cogvideox_inputs, 2),
    "hunyuan": Entry(hunyuan, hunyuan_inputs, 2),
    **{f"handwritten-{s}": Entry(_handwritten(s), handwritten_inputs, 2) for s in SPELLINGS},
}


def output(model: Any, **inputs: Any) -> torch.Tensor:
    """The first output of a model that may return a tuple."""
    result = model(**inputs)
    return result[0] if isinstance(result, tuple) else result
