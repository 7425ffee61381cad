"""CogVideoX and ConsisID, EasyAnimate, Mochi, Allegro, Cosmos: patches frame by frame, text in front or behind."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import diffusers
import torch
from diffusers.models.embeddings import get_3d_rotary_pos_embed
from models.zoo_entry import GRID, TEXT, Entry, Expect, kinds, randn, steps, tiny
from torch import nn
from torch.nn import functional

Inputs = dict[str, Any]
GRIDS = ((3, 6, 10), (5, 8, 9), (4, 7, 11), (2, 9, 5))

COGVIDEOX = {
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "in_channels": 4,
    "out_channels": 4,
    "time_embed_dim": 8,
    "text_embed_dim": 16,
    "num_layers": 2,
    "sample_width": 14,
    "sample_height": 10,
    "sample_frames": 9,
    "patch_size": 2,
    "max_text_seq_length": TEXT,
}


def cogvideox_inputs(grid: tuple[int, int, int] = GRID, batch: int = 1, step: float = 500) -> Inputs:
    t, h, w = grid
    return {
        "hidden_states": randn(batch, t, 4, 2 * h, 2 * w),
        "timestep": steps(batch, step),
        "encoder_hidden_states": randn(batch, TEXT, 16, seed=2),
        "return_dict": False,
    }


def rotary(grid: tuple[int, int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    t, h, w = grid
    return get_3d_rotary_pos_embed(16, ((0, 0), (h, w)), (h, w), t)


def cogvideox_rotary_inputs(grid: tuple[int, int, int] = GRID, batch: int = 1, step: float = 500) -> Inputs:
    return cogvideox_inputs(grid, batch, step) | {"image_rotary_emb": rotary(grid)}


def cogvideox15_inputs(grid: tuple[int, int, int] = GRID, batch: int = 1, step: float = 500) -> Inputs:
    t, h, w = grid
    return cogvideox_rotary_inputs(grid, batch, step) | {"hidden_states": randn(batch, 2 * t, 4, 2 * h, 2 * w)}


def consisid_inputs(grid: tuple[int, int, int] = GRID, batch: int = 1, step: float = 500) -> Inputs:
    return cogvideox_rotary_inputs(grid, batch, step) | {
        "id_cond": randn(batch, 8, seed=3),
        "id_vit_hidden": [randn(batch, 3, 8, seed=4 + i) for i in range(2)],
    }


def easyanimate_inputs(grid: tuple[int, int, int] = GRID, batch: int = 1, step: float = 500) -> Inputs:
    t, h, w = grid
    return {
        "hidden_states": randn(batch, 4, t, 2 * h, 2 * w),
        "timestep": steps(batch, step),
        "encoder_hidden_states": randn(batch, TEXT, 16, seed=2),
        "return_dict": False,
    }


def mochi_inputs(grid: tuple[int, int, int] = GRID, batch: int = 1, step: float = 500) -> Inputs:
    mask = torch.ones(batch, TEXT, dtype=torch.bool)
    mask[:, 5:] = False
    return easyanimate_inputs(grid, batch, step) | {"encoder_attention_mask": mask}


def allegro_inputs(grid: tuple[int, int, int] = GRID, batch: int = 1, step: float = 500) -> Inputs:
    from diffusers.models.embeddings import get_3d_rotary_pos_embed_allegro

    t, h, w = grid
    freqs_t, freqs_h, freqs_w, *_ = get_3d_rotary_pos_embed_allegro(
        embed_dim=24,
        crops_coords=((0, 0), (h, w)),
        grid_size=(h, w),
        temporal_size=t,
        interpolation_scale=(1.0, 1.0, 1.0),
    )
    places = torch.cartesian_prod(*(torch.arange(n) for n in grid))
    return easyanimate_inputs(grid, batch, step) | {
        "attention_mask": torch.ones(batch, t, 2 * h, 2 * w, dtype=torch.bool),
        "encoder_attention_mask": torch.ones(batch, TEXT, dtype=torch.long),
        "image_rotary_emb": ((freqs_t, freqs_h, freqs_w), tuple(places.T[:, None].contiguous())),
    }


def cosmos_inputs(grid: tuple[int, int, int] = GRID, batch: int = 1, step: float = 500) -> Inputs:
    return easyanimate_inputs(grid, batch, step) | {"fps": 16}


def cosmos_frames_inputs(grid: tuple[int, int, int] = GRID, batch: int = 1, step: float = 500) -> Inputs:
    t, h, w = grid
    return cosmos_inputs(grid, batch, step) | {
        "hidden_states": randn(batch, 3, t, 2 * h, 2 * w),
        "condition_mask": torch.zeros(batch, 1, t, 2 * h, 2 * w),
        "timestep": steps(batch, step, 1, t, 1, 1),
    }


def cosmos_control_inputs(grid: tuple[int, int, int] = GRID, batch: int = 1, step: float = 500) -> Inputs:
    """The control video and the latents, each with a mask of given frames and one of padding."""
    t, h, w = grid
    return {
        "controls_latents": randn(batch, 4, t, 2 * h, 2 * w),
        "latents": randn(batch, 4, t, 2 * h, 2 * w, seed=3),
        "timestep": steps(batch, step),
        "encoder_hidden_states": randn(batch, TEXT, 16, seed=2),
        "condition_mask": torch.zeros(batch, 1, t, 2 * h, 2 * w),
        "padding_mask": torch.zeros(1, 1, 2 * h, 2 * w),
        "fps": 16,
        "return_dict": False,
    }


def cosmos3_inputs(grid: tuple[int, int, int] = GRID, batch: int = 1, step: float = 500) -> Inputs:
    t, h, w = grid
    video = t * h * w
    places = torch.cartesian_prod(*(torch.arange(n) for n in grid)).T
    positions = torch.cat([torch.arange(TEXT).expand(3, -1), places + TEXT], dim=1)
    return {
        "input_ids": torch.arange(TEXT) % 11,
        "text_indexes": torch.arange(TEXT),
        "position_ids": positions,
        "und_len": TEXT,
        "sequence_length": TEXT + video,
        "vision_tokens": [randn(1, 4, t, 2 * h, 2 * w)],
        "vision_token_shapes": [grid],
        "vision_sequence_indexes": torch.arange(TEXT, TEXT + video),
        "vision_mse_loss_indexes": torch.arange(TEXT, TEXT + video),
        "vision_timesteps": steps(video, step),
        "vision_noisy_frame_indexes": [torch.arange(t)],
        "return_dict": False,
    }


def resize(image: torch.Tensor, size: list[int], interpolation: str) -> torch.Tensor:
    return functional.interpolate(image, size=size, mode=interpolation)


def cosmos_controlnet(**config: Any) -> nn.Module:
    """It resizes its masks with torchvision, in whose place PyTorch's own resizing does."""
    from diffusers.models.controlnets import controlnet_cosmos

    if not hasattr(controlnet_cosmos, "transforms"):
        nearest = SimpleNamespace(NEAREST="nearest")
        controlnet_cosmos.transforms = SimpleNamespace(
            functional=SimpleNamespace(resize=resize), InterpolationMode=nearest
        )
    return diffusers.CosmosControlNetModel(**config)


COSMOS = {
    "in_channels": 4,
    "out_channels": 4,
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "num_layers": 2,
    "mlp_ratio": 2.0,
    "text_embed_dim": 16,
    "adaln_lora_dim": 4,
    "max_size": (8, 32, 32),
    "patch_size": (1, 2, 2),
    "concat_padding_mask": False,
}
EASYANIMATE = {
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "in_channels": 4,
    "out_channels": 4,
    "time_embed_dim": 8,
    "text_embed_dim": 16,
    "num_layers": 2,
    "patch_size": 2,
    "sample_width": 14,
    "sample_height": 10,
}
MOCHI = {
    "patch_size": 2,
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "num_layers": 2,
    "pooled_projection_dim": 8,
    "in_channels": 4,
    "text_embed_dim": 16,
    "time_embed_dim": 4,
    "max_sequence_length": 16,
}

ENTRIES: dict[str, Entry] = {
    "cogvideox-2b": Entry(
        "cogvideox",
        tiny(diffusers.CogVideoXTransformer3DModel, **COGVIDEOX),
        cogvideox_inputs,
        (Expect(2, text=(TEXT, 0)),),
        grids=GRIDS,
    ),
    "cogvideox-5b": Entry(
        "cogvideox",
        tiny(diffusers.CogVideoXTransformer3DModel, **COGVIDEOX, use_rotary_positional_embeddings=True),
        cogvideox_rotary_inputs,
        (Expect(2, text=(TEXT, 0)),),
        grids=GRIDS,
    ),
    "cogvideox-1.5": Entry(
        "cogvideox",
        tiny(
            diffusers.CogVideoXTransformer3DModel,
            **COGVIDEOX,
            use_rotary_positional_embeddings=True,
            patch_size_t=2,
            patch_bias=False,
        ),
        cogvideox15_inputs,
        (Expect(2, text=(TEXT, 0)),),
        grids=GRIDS,
    ),
    "consisid": Entry(
        "consisid",
        tiny(diffusers.ConsisIDTransformer3DModel, **COGVIDEOX, use_rotary_positional_embeddings=True),
        cogvideox_rotary_inputs,
        (Expect(2, text=(TEXT, 0)),),
    ),
    "consisid-face": Entry(
        "consisid",
        tiny(
            diffusers.ConsisIDTransformer3DModel,
            **(COGVIDEOX | {"num_attention_heads": 3}),
            use_rotary_positional_embeddings=True,
            is_train_face=True,
            cross_attn_interval=2,
            cross_attn_dim_head=8,
            cross_attn_num_heads=2,
            LFE_id_dim=8,
            LFE_vit_dim=8,
            LFE_depth=2,
            LFE_dim_head=8,
            LFE_num_heads=2,
            LFE_num_id_token=2,
            LFE_num_querie=3,
            LFE_output_dim=32,
            LFE_ff_mult=2,
            LFE_num_scale=2,
        ),
        consisid_inputs,
        (Expect(2, text=(TEXT, 0)), *kinds(other=2, cross=1)),
    ),
    "easyanimate": Entry(
        "easyanimate",
        tiny(diffusers.EasyAnimateTransformer3DModel, **EASYANIMATE, mmdit_layers=2),
        easyanimate_inputs,
        (Expect(2, text=(TEXT, 0)),),
        grids=GRIDS,
    ),
    "mochi": Entry(
        "mochi",
        tiny(diffusers.MochiTransformer3DModel, **MOCHI),
        mochi_inputs,
        (Expect(2, text=(0, 5), data_dependent=True), *kinds(cross=1)),
        capture={"capture_dynamic_output_shape_ops": True},
    ),
    "allegro": Entry(
        "allegro",
        tiny(
            diffusers.AllegroTransformer3DModel,
            num_attention_heads=2,
            attention_head_dim=24,
            num_layers=2,
            cross_attention_dim=48,
            sample_height=10,
            sample_width=14,
            sample_frames=3,
            caption_channels=16,
        ),
        allegro_inputs,
        (Expect(2), *kinds(cross=2)),
    ),
    "cosmos": Entry(
        "cosmos", tiny(diffusers.CosmosTransformer3DModel, **COSMOS), cosmos_inputs, (Expect(2), *kinds(cross=2))
    ),
    "cosmos-2.5": Entry(
        "cosmos",
        tiny(diffusers.CosmosTransformer3DModel, **COSMOS, extra_pos_embed_type=None),
        cosmos_frames_inputs,
        (Expect(2), *kinds(cross=2)),
    ),
    "cosmos-controlnet": Entry(
        "cosmos",
        tiny(
            cosmos_controlnet,
            n_controlnet_blocks=2,
            in_channels=6,
            latent_channels=6,
            model_channels=24,
            num_attention_heads=2,
            attention_head_dim=12,
            mlp_ratio=2.0,
            text_embed_dim=16,
            adaln_lora_dim=4,
            max_size=(8, 32, 32),
        ),
        cosmos_control_inputs,
        (Expect(2), *kinds(cross=2)),
    ),
    "cosmos-3": Entry(
        "cosmos",
        tiny(
            diffusers.Cosmos3OmniTransformer,
            head_dim=12,
            hidden_size=24,
            intermediate_size=32,
            latent_channel=4,
            patch_latent_dim=16,
            num_attention_heads=4,
            num_key_value_heads=2,
            num_hidden_layers=2,
            vocab_size=11,
            rope_axes_dim=[2, 2, 2],
        ),
        cosmos3_inputs,
        (Expect(2, source="rotary", keys=(TEXT, 0)), *kinds(other=2)),
    ),
}
