"""Models without 3D attention: spatial and temporal layers apart, and image models."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
from models.zoo_entry import Entry, Expect, kinds, randn, steps, tiny

Inputs = dict[str, Any]
SMALL = (3, 8, 12)
"""The UNets halve the size, so it divides."""


def latte_inputs(grid: tuple[int, int, int] = (3, 5, 7), batch: int = 1, step: float = 500) -> Inputs:
    t, h, w = grid
    return {
        "hidden_states": randn(batch, 4, t, 2 * h, 2 * w),
        "timestep": steps(batch, step),
        "encoder_hidden_states": randn(batch, 5, 16, seed=2),
        "return_dict": False,
    }


def unet_inputs(grid: tuple[int, int, int] = SMALL, batch: int = 1, step: float = 500) -> Inputs:
    return {
        "sample": randn(batch, 4, *grid),
        "timestep": torch.tensor(step),
        "encoder_hidden_states": randn(batch, 5, 16, seed=2),
        "return_dict": False,
    }


def motion_inputs(grid: tuple[int, int, int] = SMALL, batch: int = 1, step: float = 500) -> Inputs:
    return unet_inputs(grid, batch, step) | {"encoder_hidden_states": randn(batch * grid[0], 5, 16, seed=2)}


def sparse_control_inputs(grid: tuple[int, int, int] = SMALL, batch: int = 1, step: float = 500) -> Inputs:
    """A control image per frame, and which of them are given."""
    condition = randn(batch, 4, *grid, seed=3)
    return motion_inputs(grid, batch, step) | {
        "controlnet_cond": condition,
        "conditioning_mask": torch.ones(batch, 1, *grid),
    }


def svd_inputs(grid: tuple[int, int, int] = SMALL, batch: int = 1, step: float = 500) -> Inputs:
    t, h, w = grid
    return unet_inputs(grid, batch, step) | {
        "sample": randn(batch, t, 8, h, w),
        "encoder_hidden_states": randn(batch, 1, 16, seed=2),
        "added_time_ids": torch.tensor([[6.0, 127.0, 0.02]]).expand(batch, -1),
    }


def i2vgen_inputs(grid: tuple[int, int, int] = SMALL, batch: int = 1, step: float = 500) -> Inputs:
    return unet_inputs(grid, batch, step) | {
        "fps": torch.full((batch,), 16),
        "image_latents": randn(batch, 4, *grid, seed=3),
        "image_embeddings": randn(batch, 16, seed=4),
    }


def flux_inputs(grid: tuple[int, int, int] = (1, 5, 7), batch: int = 1, step: float = 0.5) -> Inputs:
    _, h, w = grid
    ids = torch.zeros(h, w, 3)
    ids[..., 1] += torch.arange(h)[:, None]
    ids[..., 2] += torch.arange(w)
    return {
        "hidden_states": randn(batch, h * w, 4),
        "encoder_hidden_states": randn(batch, 5, 16, seed=2),
        "pooled_projections": randn(batch, 8, seed=3),
        "timestep": torch.full((batch,), 0.5),
        "img_ids": ids.reshape(h * w, 3),
        "txt_ids": torch.zeros(5, 3),
        "return_dict": False,
    }


def sd3_inputs(grid: tuple[int, int, int] = (1, 5, 7), batch: int = 1, step: float = 500) -> Inputs:
    _, h, w = grid
    return {
        "hidden_states": randn(batch, 4, 2 * h, 2 * w),
        "encoder_hidden_states": randn(batch, 5, 16, seed=2),
        "pooled_projections": randn(batch, 8, seed=3),
        "timestep": steps(batch, step),
        "return_dict": False,
    }


def pixart_inputs(grid: tuple[int, int, int] = (1, 5, 7), batch: int = 1, step: float = 500) -> Inputs:
    _, h, w = grid
    return {
        "hidden_states": randn(batch, 4, 2 * h, 2 * w),
        "encoder_hidden_states": randn(batch, 5, 16, seed=2),
        "timestep": steps(batch, step),
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
        "return_dict": False,
    }


def qwen_inputs(grid: tuple[int, int, int] = (1, 5, 7), batch: int = 1, step: float = 0.5) -> Inputs:
    _, h, w = grid
    mask = torch.ones(batch, 5, dtype=torch.bool)
    return {
        "hidden_states": randn(batch, h * w, 16),
        "encoder_hidden_states": randn(batch, 5, 16, seed=2),
        "encoder_hidden_states_mask": mask,
        "timestep": torch.full((batch,), 0.5),
        "img_shapes": [[(1, h, w)]] * batch,
        "return_dict": False,
    }


UNET = {
    "block_out_channels": (8, 16),
    "layers_per_block": 1,
    "cross_attention_dim": 16,
    "sample_size": 8,
}
UNET3D = UNET | {
    "down_block_types": ("CrossAttnDownBlock3D", "DownBlock3D"),
    "up_block_types": ("UpBlock3D", "CrossAttnUpBlock3D"),
    "norm_num_groups": 4,
}

ENTRIES: dict[str, Entry] = {
    "latte": Entry(
        "latte",
        tiny(
            diffusers.LatteTransformer3DModel,
            num_attention_heads=2,
            attention_head_dim=8,
            in_channels=4,
            out_channels=8,
            num_layers=1,
            cross_attention_dim=16,
            attention_bias=True,
            sample_size=8,
            patch_size=2,
            activation_fn="gelu-approximate",
            num_embeds_ada_norm=1000,
            norm_type="ada_norm_single",
            norm_elementwise_affine=False,
            caption_channels=16,
            video_length=3,
        ),
        latte_inputs,
        kinds(spatial=1, temporal=1, cross=1),
    ),
    "animatediff": Entry(
        "unet",
        tiny(
            diffusers.UNetMotionModel,
            **UNET,
            down_block_types=("CrossAttnDownBlockMotion", "DownBlockMotion"),
            up_block_types=("UpBlockMotion", "CrossAttnUpBlockMotion"),
            norm_num_groups=4,
            num_attention_heads=2,
            motion_num_attention_heads=2,
            motion_max_seq_length=8,
        ),
        motion_inputs,
        kinds(spatial=4, temporal=14, cross=4),
        grid=SMALL,
    ),
    "animatediff-sparsectrl": Entry(
        "unet",
        tiny(
            diffusers.SparseControlNetModel,
            **{key: value for key, value in UNET.items() if key != "sample_size"},
            down_block_types=("CrossAttnDownBlockMotion", "DownBlockMotion"),
            norm_num_groups=4,
            num_attention_heads=2,
            motion_num_attention_heads=2,
            motion_max_seq_length=8,
            conditioning_embedding_out_channels=(8,),
        ),
        sparse_control_inputs,
        kinds(spatial=2, temporal=2, cross=2),
        grid=SMALL,
    ),
    "stable-video-diffusion": Entry(
        "unet",
        tiny(
            diffusers.UNetSpatioTemporalConditionModel,
            **(UNET | {"block_out_channels": (32, 64)}),
            down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
            up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
            addition_time_embed_dim=4,
            projection_class_embeddings_input_dim=12,
            num_attention_heads=2,
            num_frames=3,
        ),
        svd_inputs,
        kinds(spatial=4, temporal=4, cross=8),
        grid=SMALL,
    ),
    "modelscope": Entry(
        "unet",
        tiny(diffusers.UNet3DConditionModel, **UNET3D, attention_head_dim=4),
        unet_inputs,
        kinds(spatial=4, temporal=10, cross=4),
        grid=SMALL,
    ),
    "i2vgen-xl": Entry(
        "unet",
        tiny(diffusers.I2VGenXLUNet, **UNET3D, attention_head_dim=4),
        i2vgen_inputs,
        kinds(spatial=4, temporal=11, cross=4),
        grid=SMALL,
    ),
    "flux": Entry(
        "image",
        tiny(
            diffusers.FluxTransformer2DModel,
            in_channels=4,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=12,
            num_attention_heads=2,
            joint_attention_dim=16,
            pooled_projection_dim=8,
            axes_dims_rope=(4, 4, 4),
        ),
        flux_inputs,
        (Expect(2, "other", "no-grid", None),),
        grid=(1, 5, 7),
    ),
    "sd3": Entry(
        "image",
        tiny(
            diffusers.SD3Transformer2DModel,
            sample_size=16,
            in_channels=4,
            num_layers=2,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=16,
            caption_projection_dim=16,
            pooled_projection_dim=8,
            out_channels=4,
            pos_embed_max_size=16,
        ),
        sd3_inputs,
        kinds(spatial=2),
        grid=(1, 5, 7),
    ),
    "pixart": Entry(
        "image",
        tiny(
            diffusers.PixArtTransformer2DModel,
            num_attention_heads=2,
            attention_head_dim=8,
            num_layers=2,
            cross_attention_dim=16,
            sample_size=16,
            caption_channels=16,
        ),
        pixart_inputs,
        kinds(spatial=2, cross=2),
        grid=(1, 5, 7),
    ),
    "qwen-image": Entry(
        "image",
        tiny(
            diffusers.QwenImageTransformer2DModel,
            in_channels=16,
            out_channels=4,
            num_layers=2,
            attention_head_dim=12,
            num_attention_heads=2,
            joint_attention_dim=16,
            axes_dims_rope=(4, 4, 4),
        ),
        qwen_inputs,
        (Expect(2, "other", "no-grid", None),),
        grid=(1, 5, 7),
    ),
}
