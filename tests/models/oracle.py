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
    return rectangular_mask(grid, tile, window, (length, start), (length, start))


def rectangular_mask(
    grid: tuple[int, int, int],
    tile: tuple[int, int, int],
    window: tuple[int, int, int],
    queries: tuple[int, int],
    keys: tuple[int, int],
) -> torch.Tensor:
    """bool [Lq, Lk] of the same where queries and keys are other sequences; each as (length, first video token)."""
    plan = Plan.of(Schedule.constant(window=window), tile=tile)
    resolved = resolve(plan, grid, queries[0], keys[0], queries[1], keys[1])
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


class WindowedCalls(TorchFunctionMode):
    """Adds to every SDPA call the mask of its (queries, keys), if there is one, and counts those calls."""

    def __init__(self, masks: dict[tuple[int, int], torch.Tensor]) -> None:
        super().__init__()
        self.masks = masks
        self.calls = 0

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func is F.scaled_dot_product_attention:
            query = kwargs.get("query", args[0] if args else None)
            key = kwargs.get("key", args[1] if len(args) > 1 else None)
            mask = self.masks.get((query.shape[-2], key.shape[-2]))
            if mask is not None:
                self.calls += 1
                given = kwargs.get("attn_mask")
                if given is None:
                    kwargs["attn_mask"] = mask
                elif given.dtype == torch.bool:
                    kwargs["attn_mask"] = given & mask
                else:
                    kwargs["attn_mask"] = given.masked_fill(~mask, float("-inf"))
        return func(*args, **kwargs)


class CountAttention(TorchFunctionMode):
    """Counts attention calls of an eager model, however they are spelled."""

    PRODUCTS = ("matmul", "bmm", "baddbmm", "einsum", "__matmul__")
    CARRIED = ("dropout", "to", "float", "type", "type_as", "half", "bfloat16")

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        name = getattr(func, "__name__", "")
        weights = any(getattr(arg, "_attention_weights", False) for arg in args)
        if func is F.scaled_dot_product_attention or name in ("flex_attention", "multi_head_attention_forward"):
            self.calls += 1
        elif name in self.PRODUCTS and weights:
            self.calls += 1  # softmax(...) @ v
        elif isinstance(result, torch.Tensor) and (name == "softmax" or (weights and name in self.CARRIED)):
            result._attention_weights = True  # type: ignore[attr-defined]
        return result
