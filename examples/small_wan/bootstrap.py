"""Paired bootstrap over scenes, crops and seeds of training.

Values are f64[scenes, seeds, clips], one per held-out clip; all variants see the same clips, so differences are paired.
A draw takes scenes with replacement, then for each of them seeds and clips with replacement: what is shared within a
scene or a seed is drawn together. With few scenes the interval says how those differ, not how the world's scenes do.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

DRAWS = 4000


class Interval(NamedTuple):
    """An estimate and its 95 % percentile interval."""

    value: float
    low: float
    high: float


def draws(values: Tensor) -> Tensor:
    """Means of ``DRAWS`` resampled copies of f64[..., scenes, seeds, clips], paired along "...": f64[..., DRAWS]."""
    scenes, seeds, clips = values.shape[-3:]
    generator = torch.Generator().manual_seed(0)

    def pick(n: int, *shape: int) -> Tensor:
        return torch.randint(n, (DRAWS, *shape), generator=generator)

    scene, seed, clip = pick(scenes, scenes), pick(seeds, scenes, seeds), pick(clips, scenes, clips)
    return values[..., scene[:, :, None, None], seed[:, :, :, None], clip[:, :, None, :]].mean((-3, -2, -1))


def _percentiles(drawn: Tensor) -> tuple[float, float]:
    low, high = torch.quantile(drawn, torch.tensor([0.025, 0.975], dtype=drawn.dtype)).tolist()
    return low, high


def interval(values: Tensor) -> Interval:
    """Mean of f64[scenes, seeds, clips]."""
    return Interval(float(values.mean()), *_percentiles(draws(values)))


def closed(dense: Tensor, free: Tensor, tuned: Tensor) -> Interval:
    """Share of the training-free gap that training closed: ``(free - tuned) / (free - dense)``.

    All three are f64[scenes, seeds, clips].
    NaN where the gap's own interval reaches zero or lies below it: there is nothing to close.
    """
    won, gap = draws(torch.stack([free - tuned, free - dense]))
    if _percentiles(gap)[0] <= 0:
        return Interval(math.nan, math.nan, math.nan)
    return Interval(float((free - tuned).mean() / (free - dense).mean()), *_percentiles(won / gap))
