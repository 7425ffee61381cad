"""Wan and what grew from it: VACE, Animate, SkyReels, ChronoEdit, AnyFlow, Helios."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
from models.zoo_entry import GRID, TEXT, Entry, Expect, kinds, randn, steps, tiny

Inputs = dict[str, Any]
GRIDS = ((3, 6, 10), (5, 8, 9), (4, 7, 11), (2, 9, 5))

WAN = {
    "patch_size": (1, 2, 2),
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "in_channels": 4,
    "out_channels": 4,
    "text_dim": 16,
    "freq_dim": 16,
    "ffn_dim": 32,
    "num_layers": 2,
    "cross_attn_norm": True,
    "rope_max_seq_len": 64,
}


def wan_inputs(grid: tuple[int, int, int] = GRID, batch: int = 1, step: float = 500, channels: int = 4) -> Inputs:
    t, h, w = grid
    return {
        "hidden_states": randn(batch, channels, t, 2 * h, 2 * w),
        "timestep": steps(batch, step),
        "encoder_hidden_states": randn(batch, TEXT, 16, seed=2),
        "return_dict": False,
    }


def i2v_inputs(grid: tuple[int, int, int] = GRID, batch: int = 1, step: float = 500) -> Inputs:
    """The text is 512 tokens long, a number that the model knows by heart."""
    return wan_inputs(grid, batch, step) | {
        "encoder_hidden_states": randn(batch, 512, 16, seed=2),
        "encoder_hidden_states_image": randn(batch, 5, 8, seed=3),
    }


def per_token_inputs(grid: tuple[int, int, int] = GRID, batch: int = 1, step: float = 500) -> Inputs:
    t, h, w = grid
    timestep = steps(batch, step, t * h * w)
    timestep[:, : h * w] = 0  # the first frame is given, not denoised
    return wan_inputs(grid, batch, step) | {"timestep": timestep}


def vace_inputs(grid: tuple[int, int, int] = GRID, batch: int = 1, step: float = 500) -> Inputs:
    t, h, w = grid
    return wan_inputs(grid, batch, step) | {
        "control_hidden_states": randn(batch, 6, t, 2 * h, 2 * w, seed=4),
        "control_hidden_states_scale": torch.tensor([1.0, 0.5]),
    }


def animate_inputs(grid: tuple[int, int, int] = GRID, batch: int = 1, step: float = 500) -> Inputs:
    t, h, w = grid
    return i2v_inputs(grid, batch, step) | {
        "hidden_states": randn(batch, 12, t, 2 * h, 2 * w),
        "pose_hidden_states": randn(batch, 4, t - 1, 2 * h, 2 * w, seed=4),
        "face_pixel_values": randn(batch, 3, 4 * (t - 1) - 3, 16, 16, seed=5),
    }


def animate2() -> torch.nn.Module:
    """The pass over the reference video; it fills the cache that the generating pass attends to."""
    return tiny(
        diffusers.models.transformers.transformer_wan_animate_2.WanAnimate2Transformer3DModel,
        text_len=TEXT,
        in_dim=12,
        dim=24,
        ffn_dim=32,
        freq_dim=16,
        text_dim=16,
        out_dim=4,
        num_heads=2,
        num_layers=2,
        use_img_emb=False,
    )()


def animate2_inputs(grid: tuple[int, int, int] = GRID, batch: int = 1, step: float = 500) -> Inputs:
    from diffusers.models.transformers.transformer_wan_animate_2 import WanAnimate2KVCache

    t, h, w = grid
    return {
        "hidden_states": [randn(4, t, 2 * h, 2 * w)],
        "condition_latents": [randn(8, t, 2 * h, 2 * w, seed=2)],
        "timestep": steps(1, step),
        "encoder_hidden_states": [randn(TEXT, 16, seed=3)],
        "kv_cache": WanAnimate2KVCache(2),
        "kv_cache_mode": "extract",
        "seq_len": t * h * w,
        "offset_grid_sizes": torch.tensor([grid]),
        "return_dict": False,
    }


def forcing_inputs(grid: tuple[int, int, int] = GRID, batch: int = 1, step: float = 500) -> Inputs:
    """Diffusion forcing: a timestep per frame."""
    return wan_inputs(grid, batch, step) | {"timestep": steps(batch, step, grid[0]), "enable_diffusion_forcing": True}


def anyflow_inputs(grid: tuple[int, int, int] = GRID, batch: int = 1, step: float = 500) -> Inputs:
    t, h, w = grid
    return wan_inputs(grid, batch, step) | {
        "hidden_states": randn(batch, t, 4, 2 * h, 2 * w),
        "timestep": steps(batch, step, t),
        "r_timestep": steps(batch, step / 2, t),
    }


def far_inputs(grid: tuple[int, int, int] = GRID, batch: int = 1, step: float = 500) -> Inputs:
    """Blocks of frames attend to blocks before them, through a block mask of flex attention."""
    t, h, w = grid
    model = anyflow_far()
    mask = model.build_attention_mask(chunk_partition=[1] * t, height=2 * h, width=2 * w, device=torch.device("cpu"))
    return anyflow_inputs(grid, batch, step) | {"chunk_partition": [1] * t, "attention_mask": mask}


def anyflow_far() -> Any:
    config = WAN | {"attention_head_dim": 16, "chunk_partition": (1, 1, 1), "full_chunk_limit": 8}
    return tiny(diffusers.AnyFlowFARTransformer3DModel, **config)()


def helios_inputs(grid: tuple[int, int, int] = GRID, batch: int = 1, step: float = 500) -> Inputs:
    t, h, w = grid
    return wan_inputs(grid, batch, step) | {
        "indices_hidden_states": torch.arange(23, 23 + t)[None].expand(batch, -1),
        "indices_latents_history_short": torch.arange(21, 23)[None].expand(batch, -1),
        "indices_latents_history_mid": torch.arange(17, 19)[None].expand(batch, -1),
        "indices_latents_history_long": torch.arange(1, 5)[None].expand(batch, -1),
        "latents_history_short": randn(batch, 4, 2, 2 * h, 2 * w, seed=4),
        "latents_history_mid": randn(batch, 4, 2, 2 * h, 2 * w, seed=5),
        "latents_history_long": randn(batch, 4, 4, 2 * h, 2 * w, seed=6),
    }


def helios_history(grid: tuple[int, int, int] = GRID) -> int:
    """History tokens: two frames at full size, then patches twice and four times as large, rounded up."""
    _, h, w = grid
    return 2 * h * w + -(-h // 2) * -(-w // 2) + -(-h // 4) * -(-w // 4)


HELIOS = {key: value for key, value in WAN.items() if key != "rope_max_seq_len"}

ENTRIES: dict[str, Entry] = {
    "wan-t2v": Entry(
        "wan", tiny(diffusers.WanTransformer3DModel, **WAN), wan_inputs, (Expect(2), *kinds(cross=2)), grids=GRIDS
    ),
    "wan-i2v": Entry(
        "wan",
        tiny(diffusers.WanTransformer3DModel, **WAN, image_dim=8, added_kv_proj_dim=24),
        i2v_inputs,
        (Expect(2), *kinds(cross=4)),
    ),
    "wan-ti2v": Entry(
        "wan", tiny(diffusers.WanTransformer3DModel, **WAN), per_token_inputs, (Expect(2), *kinds(cross=2)), grids=GRIDS
    ),
    "wan-blocks": Entry(
        "wan",
        tiny(diffusers.WanTransformer3DModel, **WAN),
        wan_inputs,
        (Expect(1, source="attach", repeats=2), *kinds(cross=1, repeats=2)),
        attach=True,
        blocks=True,
        grids=GRIDS,
    ),
    "wan-vace": Entry(
        "wan",
        tiny(diffusers.WanVACETransformer3DModel, **WAN, vace_layers=[0, 1], vace_in_channels=6),
        vace_inputs,
        (Expect(4), *kinds(cross=4)),
        grids=GRIDS,
    ),
    "wan-animate": Entry(
        "wan",
        tiny(
            diffusers.WanAnimateTransformer3DModel,
            **(WAN | {"in_channels": 12}),
            latent_channels=4,
            image_dim=8,
            added_kv_proj_dim=24,
            motion_encoder_channel_sizes={"4": 8, "8": 8, "16": 8},
            motion_encoder_size=16,
            motion_style_dim=8,
            motion_dim=4,
            motion_encoder_dim=8,
            face_encoder_hidden_dim=8,
            face_encoder_num_heads=2,
            inject_face_latents_blocks=2,
        ),
        animate_inputs,
        (Expect(2), *kinds(cross=5)),
    ),
    "wan-animate-2": Entry(
        "wan",
        animate2,
        animate2_inputs,
        (Expect(1, source="attach", repeats=2), *kinds(cross=1, repeats=2)),
        graphs=10,
        attach=True,
        note="rotary tables are built from `.tolist()`: every attention call is a graph of its own",
    ),
    "skyreels-v2": Entry(
        "skyreels", tiny(diffusers.SkyReelsV2Transformer3DModel, **WAN), wan_inputs, (Expect(2), *kinds(cross=2))
    ),
    "skyreels-v2-df": Entry(
        "skyreels", tiny(diffusers.SkyReelsV2Transformer3DModel, **WAN), forcing_inputs, (Expect(2), *kinds(cross=2))
    ),
    "skyreels-v2-causal": Entry(
        "skyreels",
        tiny(diffusers.SkyReelsV2Transformer3DModel, **WAN, num_frame_per_block=2),
        forcing_inputs,
        (Expect(2, reason="mask"), *kinds(cross=2)),
        grid=(4, 5, 7),
        note="blocks of frames see the blocks before them only: a full mask",
    ),
    "chronoedit": Entry(
        "chronoedit", tiny(diffusers.ChronoEditTransformer3DModel, **WAN), wan_inputs, (Expect(2), *kinds(cross=2))
    ),
    "anyflow": Entry(
        "anyflow", tiny(diffusers.AnyFlowTransformer3DModel, **WAN), anyflow_inputs, (Expect(2), *kinds(cross=2))
    ),
    "anyflow-far": Entry("anyflow", anyflow_far, far_inputs, (Expect(2, reason="mask", text=(0, 23)), *kinds(cross=2))),
    "helios": Entry(
        "helios",
        tiny(diffusers.HeliosTransformer3DModel, **HELIOS, rope_dim=(4, 4, 4)),
        helios_inputs,
        (Expect(2, text=(helios_history(), 0)), *kinds(cross=2)),
    ),
}
