"""Clips as the recipe reads them, and the denoising steps that it trains.

A data folder holds one ``.safetensors`` file per clip: ``latents`` f[C, T, H, W], normalized as the pipeline's
transformer takes them, and ``prompt_embeds`` f[L, D] from the pipeline's text encoder.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor


class DataError(ValueError):
    """A data folder that cannot be trained on; the message names the file."""


@dataclass(frozen=True)
class Batch:
    """What one optimiser step of one data-parallel rank sees."""

    latents: Tensor
    """f32[B, C, T, H, W]."""
    noise: Tensor
    prompt_embeds: Tensor
    """f32[B, L, D]."""
    step: int
    """Denoising step, the same for the whole batch: a block that is compiled alone is told one step per call."""


class Clips:
    """The files of a folder, drawn at random. Batch ``n`` of a rank is the same however often it is asked for."""

    def __init__(self, folder: Path, channels: int) -> None:
        self.files = sorted(folder.glob("*.safetensors"))
        self.channels = channels
        if not self.files:
            raise DataError(f"{folder} holds no .safetensors files with latents and prompt_embeds")

    def batch(self, number: int, rank: int, size: int, steps: Steps, seed: int = 0) -> Batch:
        """For data-parallel rank ``rank``; ranks that share a sequence ask for the same one."""
        generator = torch.Generator().manual_seed((seed * 65_537 + number) * 65_537 + rank)
        picked = torch.randint(len(self.files), (size,), generator=generator).tolist()
        clips = [self._read(self.files[index]) for index in picked]
        shapes = {tuple(clip["latents"].shape) for clip in clips}
        if len(shapes) > 1:
            raise DataError(
                f"clips of one batch have latents of shapes {sorted(shapes)}: use --batch 1, or equal clips"
            )
        latents = torch.stack([clip["latents"].float() for clip in clips])
        return Batch(
            latents,
            torch.randn(latents.shape, generator=generator),
            torch.stack([clip["prompt_embeds"].float() for clip in clips]),
            steps.draw(generator),
        )

    def _read(self, path: Path) -> dict[str, Tensor]:
        try:
            clip = load_file(path)
        except SafetensorError as error:
            raise DataError(f"{path} is no whole safetensors file ({error}): write it anew") from error
        for name in ("latents", "prompt_embeds"):
            if name not in clip:
                raise DataError(f"{path} holds {sorted(clip)}, not {name!r}")
        if clip["latents"].ndim != 4 or clip["latents"].shape[0] != self.channels:
            raise DataError(
                f"{path}: latents {tuple(clip['latents'].shape)} should be [{self.channels}, T, H, W] for this model"
            )
        return clip


class Steps:
    """The denoising steps of the pipeline's own scheduler: training sees the very noise levels of inference.

    Args:
        scheduler: a diffusers flow-matching scheduler.
        count: denoising steps at inference.
        low, high: the range of timesteps that this transformer serves (Wan 2.2 has two of them).
    """

    def __init__(self, scheduler: Any, count: int, low: float = 0.0, high: float = float("inf")) -> None:
        scheduler.set_timesteps(count)
        if not hasattr(scheduler, "sigmas"):
            raise DataError(f"{type(scheduler).__name__} has no sigmas: the recipe trains flow-matching models")
        self.timesteps = torch.as_tensor(scheduler.timesteps).float()
        self.sigmas = torch.as_tensor(scheduler.sigmas).float()[: len(self.timesteps)]
        self.count = len(self.timesteps)
        self.served = [i for i, t in enumerate(self.timesteps.tolist()) if low <= t < high]
        if not self.served:
            raise DataError(f"none of the {count} timesteps lies in [{low}, {high})")

    def draw(self, generator: torch.Generator) -> int:
        """A step, each as likely as it is often at inference: once per sample."""
        return self.served[int(torch.randint(len(self.served), (), generator=generator))]

    def noisy(self, batch: Batch) -> Tensor:
        """The latents as the model meets them at the batch's step."""
        sigma = float(self.sigmas[batch.step])
        return (1 - sigma) * batch.latents + sigma * batch.noise
