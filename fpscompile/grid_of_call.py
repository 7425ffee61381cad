"""Read the grid off a root module's arguments: what ``attach`` publishes when no graph can show it."""

from __future__ import annotations

import inspect
import logging
import math
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

logger = logging.getLogger(__name__)

Grid = tuple[int, int, int]

_CHANNELS_DIM: WeakKeyDictionary[type[nn.Module], int] = WeakKeyDictionary()
"""Which dimension of the latent are the channels, 1 or 2, for classes of models that were called with a video that told
it: their ``forward`` has one layout."""


class GridReader:
    """The token grid of a call of ``model``, or None when it cannot be told for certain.

    1. ``num_frames``, ``height`` and ``width`` given as ints (packed latents, as LTX takes them): those, unless
       ``hidden_states`` has another number of tokens (they are placeholders where coordinates are given).
    2. A 5-D latent and the patch size of ``model.config`` (``patch_size``, ``patch_size_t``): sizes over patch.
       Whether the latent is [B, C, T, H, W] or [B, T, C, H, W] is told by ``config.in_channels``; when both fit,
       the layout of an earlier call of a model of this class; else the grid stays unknown.
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
        self.kind = type(model)

    def __call__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Grid | None:
        if self.given is not None:
            return self.given
        named = dict(zip(self.parameters, args, strict=False)) | kwargs
        sizes = [named.get(name) for name in ("num_frames", "height", "width")]
        if all(isinstance(size, int) for size in sizes) and _counts(named.get("hidden_states"), sizes):
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
            # Not a warning: most graphs show the grid themselves, and those that do not say what they need.
            logger.debug("%s: the layout of the latent %s is not known", self.kind.__name__, tuple(latent.shape))
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
            _CHANNELS_DIM[self.kind] = fits[0]
        return _CHANNELS_DIM.get(self.kind)


def _counts(tokens: Any, sizes: list[Any]) -> bool:
    """Whether the product of ``sizes`` is the number of tokens, where these are packed."""
    return not isinstance(tokens, torch.Tensor) or tokens.ndim != 3 or tokens.shape[1] == math.prod(sizes)


def _latents(value: Any) -> bool:
    """Whether an argument is a list of latents [C, T, H, W], all of one shape."""
    if not isinstance(value, (tuple, list)) or not value:
        return False
    return all(isinstance(v, torch.Tensor) and v.ndim == 4 and v.shape == value[0].shape for v in value)
