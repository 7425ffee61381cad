"""Read the grid off a root module's arguments: what ``attach`` publishes when no graph can show it."""

from __future__ import annotations

import inspect
import logging
from typing import Any

import torch
from torch import nn

logger = logging.getLogger(__name__)

Grid = tuple[int, int, int]


class GridReader:
    """The token grid of a call of ``model``, or None when it cannot be told for certain.

    1. ``num_frames``, ``height`` and ``width`` given as ints (packed latents, as LTX takes them): those.
    2. A 5-D latent and the patch size of ``model.config`` (``patch_size``, ``patch_size_t``): sizes over patch.
       Whether the latent is [B, C, T, H, W] or [B, T, C, H, W] is told by ``config.in_channels``; when both fit,
       the layout of an earlier call; else the grid stays unknown.
    3. A list of latents [C, T, H, W] of one shape, as the original Wan takes it, in the same way.

    What the config does not have may be an attribute of the model.

    A grid that is wrong for a site cannot pass unnoticed: the op compares its product with the token count.
    """

    def __init__(self, model: nn.Module, grid: Grid | None = None) -> None:
        self.given = grid
        config = getattr(model, "config", None)
        names = ("patch_size", "patch_size_t", "in_channels", "in_dim")
        # A diffusers model warns where it is asked for what its config has.
        self.known = {
            name: getattr(config, name) if hasattr(config, name) else getattr(model, name, None) for name in names
        }
        self.parameters = list(inspect.signature(model.forward).parameters)
        self.name = type(model).__name__
        self.channels_dim: int | None = None

    def __call__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Grid | None:
        if self.given is not None:
            return self.given
        named = dict(zip(self.parameters, args, strict=False)) | kwargs
        sizes = [named.get(name) for name in ("num_frames", "height", "width")]
        if all(isinstance(size, int) for size in sizes):
            return (sizes[0], sizes[1], sizes[2])  # type: ignore[return-value]
        latent = next((v for v in named.values() if isinstance(v, torch.Tensor) and v.ndim == 5), None)
        listed = next((v for v in named.values() if _latents(v)), None) if latent is None else None
        if listed is not None:
            latent = listed[0][None]
        patch = self._patch()
        if latent is None or patch is None:
            return None
        dim = self._channels(latent) or (1 if listed is not None else None)
        if dim is None:
            logger.warning(
                "%s: the layout of the latent %s is ambiguous; pass attach(model, grid=...)",
                self.name,
                tuple(latent.shape),
            )
            return None
        video = [size for index, size in enumerate(latent.shape) if index not in (0, dim)]
        t, h, w = (size // p for size, p in zip(video, patch, strict=True))
        return (t, h, w)

    def _patch(self) -> Grid | None:
        patch = self.known["patch_size"]
        if isinstance(patch, int):
            return (self.known["patch_size_t"] or 1, patch, patch)
        if isinstance(patch, (tuple, list)) and len(patch) == 3:
            return (patch[0], patch[1], patch[2])
        if isinstance(patch, (tuple, list)) and len(patch) == 2:
            return (self.known["patch_size_t"] or 1, patch[0], patch[1])
        return None

    def _channels(self, latent: torch.Tensor) -> int | None:
        channels = self.known["in_channels"] or self.known["in_dim"]
        fits = [dim for dim in (1, 2) if latent.shape[dim] == channels]
        if len(fits) == 1:
            self.channels_dim = fits[0]
        return self.channels_dim


def _latents(value: Any) -> bool:
    """Whether an argument is a list of latents [C, T, H, W], all of one shape."""
    if not isinstance(value, (tuple, list)) or not value:
        return False
    return all(isinstance(v, torch.Tensor) and v.ndim == 4 and v.shape == value[0].shape for v in value)
