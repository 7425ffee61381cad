"""Tokens that arrive packed (LTX, LTX-2, MiniMax-H3), Kandinsky, and the linear attention of SANA."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
from models.zoo_entry import GRID, TEXT, Entry, Expect, kinds, randn, steps, tiny
from torch import nn

Inputs = dict[str, Any]
GRIDS = ((3, 6, 10), (5, 8, 9), (4, 7, 11), (2, 9, 5))


def places(grid: tuple[int, int, int]) -> torch.Tensor:
    """(t, h, w) of every token, [3, T*H*W]."""
    return torch.cartesian_prod(*(torch.arange(n) for n in grid)).T


def ltx_inputs(grid: tuple[int, int, int] = GRID, batch: int = 1, step: float = 500) -> Inputs:
    t, h, w = grid
    return {
        "hidden_states": randn(batch, t * h * w, 4),
        "encoder_hidden_states": randn(batch, TEXT, 16, seed=2),
        "timestep": steps(batch, step),
        "encoder_attention_mask": torch.ones(batch, TEXT, dtype=torch.long),
        "num_frames": t,
        "height": h,
        "width": w,
        "rope_interpolation_scale": (0.25, 32.0, 32.0),
        "return_dict": False,
    }


def ltx_coords_inputs(grid: tuple[int, int, int] = GRID, batch: int = 1, step: float = 500) -> Inputs:
    """As the conditioned pipeline calls it: places of the tokens, no sizes."""
    inputs = ltx_inputs(grid, batch, step)
    del inputs["num_frames"], inputs["height"], inputs["width"], inputs["rope_interpolation_scale"]
    coordinates = places(grid).float() * torch.tensor([8 / 24, 32, 32])[:, None]
    timestep = steps(batch, step, coordinates.shape[1])
    return inputs | {"video_coords": coordinates[None].expand(batch, -1, -1), "timestep": timestep}


def ltx2_inputs(grid: tuple[int, int, int] = GRID, batch: int = 1, step: float = 500) -> Inputs:
    t, h, w = grid
    return {
        "hidden_states": randn(batch, t * h * w, 4),
        "audio_hidden_states": randn(batch, 9, 6, seed=2),
        "encoder_hidden_states": randn(batch, TEXT, 16, seed=3),
        "audio_encoder_hidden_states": randn(batch, TEXT, 16, seed=4),
        "timestep": steps(batch, step),
        "num_frames": t,
        "height": h,
        "width": w,
        "fps": 24.0,
        "audio_num_frames": 9,
        "return_dict": False,
    }


def minimax_inputs(grid: tuple[int, int, int] = GRID, batch: int = 1, step: float = 0.5) -> Inputs:
    t, h, w = grid
    video, audio = t * h * w, 4
    total = TEXT + audio + video
    tags = torch.tensor([1] * TEXT + [2] * audio + [0] * video)
    line = torch.arange(TEXT + audio).expand(3, -1)
    return {
        "hidden_states": randn(batch, video, 16),
        "audio_hidden_states": randn(batch, audio, 6, seed=2),
        "encoder_hidden_states": randn(batch, TEXT, 16, seed=3),
        "timestep": torch.tensor([step / 1000 if step > 1 else step]),
        "timestep_indices": torch.zeros(total, dtype=torch.long),
        "token_tags": tags,
        "position_ids": torch.cat([line, places(grid) + TEXT + audio], dim=1).T.contiguous(),
        "video_indices": torch.arange(TEXT + audio, total),
        "audio_indices": torch.arange(TEXT, TEXT + audio),
        "text_indices": torch.arange(TEXT),
        "return_dict": False,
    }


def kandinsky5_inputs(grid: tuple[int, int, int] = GRID, batch: int = 1, step: float = 500) -> Inputs:
    t, h, w = grid
    return {
        "hidden_states": randn(batch, t, 2 * h, 2 * w, 4),
        "encoder_hidden_states": randn(batch, TEXT, 16, seed=2),
        "timestep": steps(batch, step),
        "pooled_projections": randn(batch, 8, seed=3),
        "visual_rope_pos": [torch.arange(n) for n in grid],
        "text_rope_pos": torch.arange(TEXT),
        "return_dict": False,
    }


def kandinsky6_inputs(grid: tuple[int, int, int] = GRID, batch: int = 1, step: float = 500) -> Inputs:
    t, h, w = grid
    return {
        "hidden_states": randn(batch, t, 2 * h, 2 * w, 9),
        "encoder_hidden_states": randn(batch, TEXT, 16, seed=2),
        "timestep": steps(batch, step),
        "pooled_projections": randn(batch, 8, seed=3),
        "return_dict": False,
    }


def kandinsky6_audio_inputs(grid: tuple[int, int, int] = GRID, batch: int = 1, step: float = 500) -> Inputs:
    return kandinsky6_inputs(grid, batch, step) | {"audio_hidden_states": randn(batch, 9, 6, seed=4)}


def kandinsky6_sr_inputs(grid: tuple[int, int, int] = (3, 8, 16), batch: int = 1, step: float = 500) -> Inputs:
    t, h, w = grid
    return {"hidden_states": randn(batch, t, h, w, 9), "timestep": steps(batch, step), "return_dict": False}


def sana_inputs(grid: tuple[int, int, int] = GRID, batch: int = 1, step: float = 500) -> Inputs:
    t, h, w = grid
    return {
        "hidden_states": randn(batch, 4, t, 2 * h, 2 * w),
        "encoder_hidden_states": randn(batch, TEXT, 16, seed=2),
        "timestep": steps(batch, step),
        "return_dict": False,
    }


def sana_wm_inputs(grid: tuple[int, int, int] = GRID, batch: int = 1, step: float = 500) -> Inputs:
    t, h, w = grid
    return {
        "hidden_states": randn(batch, 4, t, h, w),
        "encoder_hidden_states": randn(batch, 1, TEXT, 16, seed=2),
        "timestep": steps(batch, step, 1, t),
        "mask": torch.ones(batch, TEXT, dtype=torch.long),
        "return_dict": False,
    }


def refiner_inputs(grid: tuple[int, int, int] = GRID, batch: int = 1, step: float = 500) -> Inputs:
    """The caller computes the rotary table."""
    t, h, w = grid
    angles = places(grid).T.float()[:, :, None] * torch.tensor([1.0, 0.1])  # [L, 3, 2]
    angles = torch.cat([torch.zeros(t * h * w, 2), angles.flatten(1)], dim=-1)  # [L, 8], two channels unturned
    table = tuple(
        turn(angles).repeat_interleave(2, -1).repeat(1, 2)[None].expand(batch, -1, -1)
        for turn in (torch.cos, torch.sin)
    )
    return {
        "hidden_states": randn(batch, t * h * w, 4),
        "encoder_hidden_states": randn(batch, TEXT, 16, seed=2),
        "timestep": steps(batch, step),
        "video_rotary_emb": table,
        "return_dict": False,
    }


class Denoiser(nn.Module):
    """The stage of the LTX-2.5 decoder that denoises pixels: what the loop of ``decode`` calls in each step."""

    def __init__(self, **config: Any) -> None:
        super().__init__()
        self.decoder = diffusers.LTX2VideoDiffusionDecoderModel(**config).decoder

    def forward(self, latent_context: torch.Tensor, hidden_states: torch.Tensor, timestep: torch.Tensor) -> Any:
        return self.decoder.forward_diffusion_step(latent_context, hidden_states, timestep)


def decoder_inputs(grid: tuple[int, int, int] = GRID, batch: int = 1, step: float = 500) -> Inputs:
    t, h, w = grid
    return {
        "latent_context": randn(batch, t, h, w, 16),
        "hidden_states": randn(batch, 3, t, 2 * h, 2 * w, seed=2),
        "timestep": steps(batch, step / 1000),
    }


LTX = {
    "in_channels": 4,
    "out_channels": 4,
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "cross_attention_dim": 32,
    "num_layers": 2,
    "caption_channels": 16,
}
LTX2 = LTX | {
    "audio_in_channels": 6,
    "audio_out_channels": 6,
    "audio_num_attention_heads": 2,
    "audio_attention_head_dim": 8,
    "audio_cross_attention_dim": 16,
}
KANDINSKY = {
    "in_text_dim": 16,
    "in_text_dim2": 8,
    "time_dim": 16,
    "out_visual_dim": 4,
    "in_visual_dim": 4,
    "model_dim": 24,
    "ff_dim": 32,
    "num_text_blocks": 1,
    "num_visual_blocks": 2,
    "axes_dims": (4, 4, 4),
}

ENTRIES: dict[str, Entry] = {
    "ltx": Entry(
        "ltx", tiny(diffusers.LTXVideoTransformer3DModel, **LTX), ltx_inputs, (Expect(2), *kinds(cross=2)), grids=GRIDS
    ),
    "ltx-coords": Entry(
        "ltx",
        tiny(diffusers.LTXVideoTransformer3DModel, **LTX),
        ltx_coords_inputs,
        (Expect(2, source="rotary"), *kinds(cross=2)),
        grids=GRIDS,
    ),
    "ltx-2": Entry(
        "ltx",
        tiny(diffusers.LTX2VideoTransformer3DModel, **LTX2),
        ltx2_inputs,
        (Expect(2), *kinds(cross=8, other=2)),
        grids=GRIDS,
    ),
    "ltx-2-split": Entry(
        "ltx",
        tiny(diffusers.LTX2VideoTransformer3DModel, **LTX2, rope_type="split"),
        ltx2_inputs,
        (Expect(2), *kinds(cross=8, other=2)),
    ),
    "ltx-2.5-decoder": Entry(
        "ltx",
        tiny(
            Denoiser,
            latent_channels=8,
            patch_size=2,
            decoder_head_dim=16,
            decoder_stage_channels=(64, 32, 16, 16, 16),
            decoder_stage_depths=(1, 1, 1, 1, 2),
            decoder_upsample_channel_reductions=(2, 2, 1, 1),
            decoder_stage5_kernel=(3, 3, 5),
            decoder_t_emb_dim=16,
        ),
        decoder_inputs,
        (Expect(2, reason="mask"),),
        note="a window of neighbours in every layer, as a block mask of flex attention",
    ),
    "minimax-h3": Entry(
        "minimax",
        tiny(
            diffusers.MiniMaxH3Transformer3DModel,
            num_attention_heads=2,
            attention_head_dim=16,
            hidden_size=24,
            num_layers=2,
            num_refiner_layers=1,
            ffn_dim=32,
            in_channels=4,
            audio_in_channels=6,
            text_dim=16,
            freq_dim=16,
            time_embed_hidden_dim=16,
            time_embed_dim=8,
            rope_freq_dim=2,
        ),
        minimax_inputs,
        (Expect(2, source="rotary", text=(TEXT + 4, 0)), *kinds(other=1)),
    ),
    "kandinsky-5": Entry(
        "kandinsky",
        tiny(diffusers.Kandinsky5Transformer3DModel, **KANDINSKY),
        kandinsky5_inputs,
        (Expect(2), *kinds(other=1, cross=2)),
        grids=GRIDS,
    ),
    "kandinsky-6": Entry(
        "kandinsky",
        tiny(diffusers.Kandinsky6Transformer3DModel, **KANDINSKY, in_audio_dim=6, out_audio_dim=6),
        kandinsky6_inputs,
        (Expect(2), *kinds(other=2, cross=2)),
    ),
    "kandinsky-6-audio": Entry(
        "kandinsky",
        tiny(diffusers.Kandinsky6Transformer3DModel, **KANDINSKY, in_audio_dim=6, out_audio_dim=6),
        kandinsky6_audio_inputs,
        (Expect(2), *kinds(other=4, cross=8)),
    ),
    "kandinsky-6-sr": Entry(
        "kandinsky",
        tiny(
            diffusers.Kandinsky6SRTransformer3DModel,
            in_visual_dim=4,
            out_visual_dim=4,
            time_dim=16,
            model_dim=32,
            ff_dim=32,
            num_visual_blocks=2,
            axes_dims=(4, 4, 8),
        ),
        kandinsky6_sr_inputs,
        (Expect(2, reason="token-order"),),
        grid=(3, 8, 16),
    ),
    "sana-video": Entry(
        "sana",
        tiny(
            diffusers.SanaVideoTransformer3DModel,
            in_channels=4,
            out_channels=4,
            num_attention_heads=2,
            attention_head_dim=12,
            num_layers=2,
            num_cross_attention_heads=2,
            cross_attention_head_dim=12,
            cross_attention_dim=24,
            caption_channels=16,
        ),
        sana_inputs,
        kinds(cross=2),
    ),
    "sana-wm": Entry(
        "sana",
        tiny(
            diffusers.SanaWMTransformer3DModel,
            in_channels=4,
            num_layers=2,
            hidden_size=24,
            num_attention_heads=2,
            softmax_every_n=2,
            linear_head_dim=12,
            caption_channels=16,
            mlp_ratio=2.0,
        ),
        sana_wm_inputs,
        (Expect(1), *kinds(cross=2)),
    ),
    "sana-wm-refiner": Entry(
        "sana",
        tiny(diffusers.models.transformers.SanaWMLTX2RefinerTransformer3DModel, **LTX),
        refiner_inputs,
        (Expect(2, source="rotary"), *kinds(cross=2)),
    ),
}
