"""HunyuanVideo and kin: joint video and text sequences with padding masks, and JoyImage."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
from models.zoo_entry import GRID, TEXT, Entry, Expect, kinds, randn, steps, tiny

Inputs = dict[str, Any]
GRIDS = ((3, 6, 10), (5, 8, 9), (4, 7, 11), (2, 9, 5))

HUNYUAN = {
    "in_channels": 4,
    "out_channels": 4,
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "num_layers": 1,
    "num_refiner_layers": 1,
    "mlp_ratio": 2.0,
    "qk_norm": "rms_norm",
    "text_embed_dim": 16,
    "rope_axes_dim": (4, 4, 4),
}
ONE = HUNYUAN | {"num_single_layers": 1, "patch_size": 2, "patch_size_t": 1, "pooled_projection_dim": 8}
MOTIF = {key: value for key, value in ONE.items() if key not in ("num_refiner_layers", "pooled_projection_dim")}


def padding(batch: int, length: int = TEXT, valid: int = 5) -> torch.Tensor:
    mask = torch.zeros(batch, length, dtype=torch.long)
    mask[:, :valid] = 1
    if batch > 1:
        mask[1, : valid - 2] = 1
    return mask


def hunyuan_inputs(grid: tuple[int, int, int] = GRID, batch: int = 1, step: float = 500, channels: int = 4) -> Inputs:
    t, h, w = grid
    return {
        "hidden_states": randn(batch, channels, t, 2 * h, 2 * w),
        "timestep": steps(batch, step),
        "encoder_hidden_states": randn(batch, TEXT, 16, seed=2),
        "encoder_attention_mask": padding(batch),
        "pooled_projections": randn(batch, 8, seed=3),
        "guidance": steps(batch, 6000),
        "return_dict": False,
    }


def hunyuan15_inputs(grid: tuple[int, int, int] = GRID, batch: int = 1, step: float = 500) -> Inputs:
    t, h, w = grid
    return {
        "hidden_states": randn(batch, 9, t, h, w),
        "timestep": steps(batch, step),
        "encoder_hidden_states": randn(batch, TEXT, 16, seed=2),
        "encoder_attention_mask": padding(batch),
        "encoder_hidden_states_2": randn(batch, 4, 8, seed=3),
        "encoder_attention_mask_2": padding(batch, 4, 3),
        "image_embeds": torch.zeros(batch, 3, 8),
        "return_dict": False,
    }


def hunyuan15_image_inputs(grid: tuple[int, int, int] = GRID, batch: int = 1, step: float = 500) -> Inputs:
    return hunyuan15_inputs(grid, batch, step) | {"image_embeds": randn(batch, 3, 8, seed=4)}


def framepack_inputs(grid: tuple[int, int, int] = GRID, batch: int = 1, step: float = 500) -> Inputs:
    _, h, w = grid
    return hunyuan_inputs(grid, batch, step) | {
        "image_embeds": randn(batch, 3, 8, seed=4),
        "indices_latents": torch.arange(10, 10 + grid[0]),
        "latents_clean": randn(batch, 4, 2, 2 * h, 2 * w, seed=5),
        "indices_latents_clean": torch.tensor([0, 9]),
        "latents_history_2x": randn(batch, 4, 2, 2 * h, 2 * w, seed=6),
        "indices_latents_history_2x": torch.tensor([7, 8]),
        "latents_history_4x": randn(batch, 4, 4, 2 * h, 2 * w, seed=7),
        "indices_latents_history_4x": torch.tensor([3, 4, 5, 6]),
    }


def framepack_history(grid: tuple[int, int, int] = GRID) -> int:
    _, h, w = grid
    return 2 * h * w + -(-h // 2) * -(-w // 2) + -(-h // 4) * -(-w // 4)


def motif_inputs(grid: tuple[int, int, int] = GRID, batch: int = 1, step: float = 500) -> Inputs:
    inputs = hunyuan_inputs(grid, batch, step)
    del inputs["pooled_projections"], inputs["guidance"]
    return inputs


def joyimage_inputs(grid: tuple[int, int, int] = GRID, batch: int = 1, step: float = 500) -> Inputs:
    t, h, w = grid
    return {
        "hidden_states": randn(batch, 4, t, 2 * h, 2 * w),
        "timestep": steps(batch, step),
        "encoder_hidden_states": randn(batch, TEXT, 16, seed=2),
        "return_dict": False,
    }


def joyimage_items_inputs(grid: tuple[int, int, int] = GRID, batch: int = 1, step: float = 500) -> Inputs:
    """Several images in a row, each one frame."""
    t, h, w = grid
    return joyimage_inputs(grid, batch, step) | {"hidden_states": randn(batch, t, 4, 1, 2 * h, 2 * w)}


def joyimage_plus_inputs(grid: tuple[int, int, int] = GRID, batch: int = 1, step: float = 500) -> Inputs:
    """Patches of several images, each with a grid of its own, given as a list."""
    t, h, w = grid
    return {
        "hidden_states": randn(batch, t * h * w, 4, 1, 2, 2),
        "timestep": steps(batch, step),
        "encoder_hidden_states": randn(batch, TEXT, 16, seed=2),
        "encoder_hidden_states_mask": padding(batch),
        "shape_list": [[(1, h, w)] * t] * batch,
        "return_dict": False,
    }


JOYIMAGE = {
    "patch_size": [1, 2, 2],
    "in_channels": 4,
    "hidden_size": 24,
    "num_attention_heads": 2,
    "text_dim": 16,
    "mlp_width_ratio": 2.0,
    "num_layers": 2,
    "rope_dim_list": [4, 4, 4],
}
DYNAMIC_OUTPUTS = {"capture_dynamic_output_shape_ops": True, "capture_scalar_outputs": True}

ENTRIES: dict[str, Entry] = {
    "hunyuanvideo": Entry(
        "hunyuan",
        tiny(diffusers.HunyuanVideoTransformer3DModel, **ONE),
        hunyuan_inputs,
        (Expect(2, text=(0, TEXT)), *kinds(other=1)),
        grids=GRIDS,
    ),
    "hunyuanvideo-i2v": Entry(
        "hunyuan",
        tiny(diffusers.HunyuanVideoTransformer3DModel, **ONE, image_condition_type="token_replace"),
        hunyuan_inputs,
        (Expect(2, text=(0, TEXT)), *kinds(other=1)),
    ),
    "hunyuanvideo-i2v-concat": Entry(
        "hunyuan",
        tiny(diffusers.HunyuanVideoTransformer3DModel, **ONE, image_condition_type="latent_concat"),
        hunyuan_inputs,
        (Expect(2, text=(0, TEXT)), *kinds(other=1)),
    ),
    "hunyuanvideo-1.5": Entry(
        "hunyuan",
        tiny(
            diffusers.HunyuanVideo15Transformer3DModel,
            **(HUNYUAN | {"in_channels": 9, "num_layers": 2}),
            patch_size=1,
            text_embed_2_dim=8,
            image_embed_dim=8,
        ),
        hunyuan15_inputs,
        (Expect(1, "3d", "mask", "rotary", text=(0, 14), repeats=2), Expect(1, "other", "no-grid", None)),
        graphs=3,
        note="a branch on data breaks the graph: blocks are compiled apart and read the grid off the rotary table",
    ),
    "hunyuanvideo-1.5-i2v": Entry(
        "hunyuan",
        tiny(
            diffusers.HunyuanVideo15Transformer3DModel,
            **(HUNYUAN | {"in_channels": 9, "num_layers": 2}),
            patch_size=1,
            text_embed_2_dim=8,
            image_embed_dim=8,
        ),
        hunyuan15_image_inputs,
        (Expect(1, "3d", "mask", "rotary", text=(0, 14), repeats=2), Expect(1, "other", "no-grid", None)),
        graphs=3,
        note="a branch on data breaks the graph: blocks are compiled apart and read the grid off the rotary table",
    ),
    "framepack": Entry(
        "framepack",
        tiny(
            diffusers.HunyuanVideoFramepackTransformer3DModel,
            **ONE,
            has_image_proj=True,
            image_proj_dim=8,
            has_clean_x_embedder=True,
        ),
        framepack_inputs,
        (Expect(2, text=(framepack_history(), 8), data_dependent=True), *kinds(other=1)),
        capture=DYNAMIC_OUTPUTS,
    ),
    "motif-video": Entry(
        "motif",
        tiny(
            diffusers.MotifVideoTransformer3DModel,
            **MOTIF,
            num_decoder_layers=0,
        ),
        motif_inputs,
        (Expect(2, text=(0, TEXT)),),
    ),
    "motif-video-decoder": Entry(
        "motif",
        tiny(
            diffusers.MotifVideoTransformer3DModel,
            **(MOTIF | {"num_single_layers": 2}),
            num_decoder_layers=1,
        ),
        motif_inputs,
        (Expect(2, text=(0, TEXT)), Expect(1, text=(0, 105))),
    ),
    "joyimage-edit": Entry(
        "joyimage",
        tiny(diffusers.JoyImageEditTransformer3DModel, **JOYIMAGE),
        joyimage_inputs,
        (Expect(2, text=(0, TEXT)),),
    ),
    "joyimage-edit-items": Entry(
        "joyimage",
        tiny(diffusers.JoyImageEditTransformer3DModel, **JOYIMAGE),
        joyimage_items_inputs,
        (Expect(2, "other", "no-grid", None),),
        note="images, put in another order before attention: no video",
    ),
    "joyimage-edit-plus": Entry(
        "joyimage",
        tiny(diffusers.JoyImageEditPlusTransformer3DModel, **JOYIMAGE),
        joyimage_plus_inputs,
        (Expect(2, source="rotary", text=(0, TEXT)),),
    ),
}
