"""Eager models with a tile window forced on their 3D attention: what a rewritten model must equal."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from fpscompile.masks import expand_mask
from fpscompile.plan import Plan, resolve
from fpscompile.schedule import Schedule


def window_mask(
    grid: tuple[int, int, int],
    tile: tuple[int, int, int],
    window: tuple[int, int, int],
    length: int,
    start: int,
) -> torch.Tensor:
    """bool [L, L] of a sliding tile window, text included."""
    plan = Plan.of(Schedule.constant(window=window), tile=tile)
    resolved = resolve(plan, grid, length, length, start, start)
    return expand_mask(resolved.block_mask, resolved.q_layout, resolved.k_layout)[0, 0]


class WindowedAttention(TorchFunctionMode):
    """Adds the mask to every SDPA call of ``length`` queries and keys, and counts them."""

    def __init__(self, mask: torch.Tensor) -> None:
        super().__init__()
        self.mask = mask
        self.calls = 0

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func is F.scaled_dot_product_attention:
            query = kwargs.get("query", args[0] if args else None)
            key = kwargs.get("key", args[1] if len(args) > 1 else None)
            if query.shape[-2] == key.shape[-2] == self.mask.shape[0]:
                self.calls += 1
                given = kwargs.get("attn_mask")
                assert given is None or given.dtype == torch.bool
                kwargs["attn_mask"] = self.mask if given is None else self.mask & given
        return func(*args, **kwargs)
