"""The registry: each model of :mod:`models.authors`, its inputs, and what must become of every attention call."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from models import authors, authors_layouts
from models.authors import CHANNELS, DIM, TEXT
from torch import nn

GRID = (3, 6, 10)
LENGTH = GRID[0] * GRID[1] * GRID[2]
Site = tuple[str, str | None]
"""(kind, reason code; None when rewritten)."""
THREE: Site = ("3d", None)
CROSS: Site = ("cross", "kind")


@dataclass(frozen=True)
class Author:
    """A model, its inputs, its sites in order, and where the video lies in the sequence."""

    build: Callable[[], nn.Module]
    inputs: tuple[str, ...]
    sites: tuple[Site, ...]
    before: int = 0
    after: int = 0
    keys: int | None = None
    """Tokens ahead of the video among the keys, where those differ from the queries'."""
    attach: bool = False
    """Whether the grid is published: the graph cannot show it."""
    grid: tuple[int, int, int] = GRID
    """Of the sites that are rewritten."""
    graphs: int = 1
    oracle: bool = True
    """Whether the model's attention can be windowed for comparison."""


def inputs(entry: Author, batch: int = 2, step: float = 500.0) -> dict[str, Any]:
    t, h, w = GRID
    valid = (torch.arange(TEXT)[None] < torch.tensor([TEXT, 4, 1])[:batch, None]).long()
    made: dict[str, Callable[[], torch.Tensor]] = {
        "video": lambda: torch.randn(batch, CHANNELS, t, 2 * h, 2 * w),
        "past": lambda: torch.randn(batch, CHANNELS, 2, h, w // 2 * 2),
        "text": lambda: torch.randn(batch, TEXT, DIM),
        "valid": lambda: valid,
        "tokens": lambda: torch.randn(batch, LENGTH, CHANNELS * 4),
        "places": lambda: torch.cartesian_prod(*(torch.arange(float(n)) for n in GRID))[None].expand(batch, -1, -1),
        "timestep": lambda: torch.full((batch,), step),
    }
    return {name: made[name]() for name in (*entry.inputs, "timestep")}


def build(entry: Author) -> nn.Module:
    torch.manual_seed(0)
    return entry.build().eval()


VIDEO, WITH_TEXT, PADDED = ("video",), ("video", "text"), ("video", "text", "valid")
P = functools.partial

AUTHORS: dict[str, Author] = {
    "wan": Author(authors.Wan, WITH_TEXT, (THREE, CROSS) * 2),
    "wan-sdpa": Author(P(authors.Wan, "sdpa"), WITH_TEXT, (THREE, CROSS) * 2),
    "hunyuan": Author(authors.Hunyuan, PADDED, (THREE,) * 2, after=TEXT),
    "hunyuan-torch": Author(P(authors.Hunyuan, "torch"), PADDED, (THREE,) * 2, after=TEXT),
    "open-sora-2": Author(authors.OpenSora2, ("tokens", "places", "text"), (("other", "no-grid"),), before=TEXT),
    "open-sora-2-attached": Author(authors.OpenSora2, ("tokens", "places", "text"), (THREE,), before=TEXT, attach=True),
    "mochi": Author(authors.Mochi, WITH_TEXT, (THREE,), after=5),
    "latte": Author(authors.Latte, VIDEO, (("spatial", "kind"), ("temporal", "kind"))),
    "open-sora-plan": Author(P(authors.OpenSoraPlan, 2), VIDEO, (THREE,), grid=(3, 6, 5)),
    "open-sora-plan-4": Author(P(authors.OpenSoraPlan, 4), VIDEO, (("other", "no-grid"),)),
    "wan-listed": Author(P(authors.Wan, "sdpa", listed=True), WITH_TEXT, (THREE, CROSS), graphs=3),
    "wan-listed-attached": Author(
        P(authors.Wan, "sdpa", listed=True), WITH_TEXT, (THREE, CROSS), attach=True, graphs=3
    ),
    "wan-each": Author(P(authors.Wan, "sdpa", each=True), WITH_TEXT, (("other", "segments"), CROSS), graphs=5),
    "wan-each-attached": Author(P(authors.Wan, "sdpa", each=True), WITH_TEXT, (THREE, CROSS), attach=True, graphs=5),
    **{
        f"block-{spelling}": Author(P(authors_layouts.Block, spelling), VIDEO, (THREE,))
        for spelling in ("flash", "packed", "xformers", "flex", "math", "folded")
    },
    "folded-frames": Author(authors_layouts.FoldedFrames, VIDEO, (THREE,)),
    "channels-last": Author(authors_layouts.ChannelsLast, VIDEO, (THREE,)),
    "h-w-t": Author(authors_layouts.HeightFirst, VIDEO, (("3d", "token-order"),)),
    "tiles": Author(authors_layouts.TilePermuted, VIDEO, (("3d", "token-order"),)),
    "class-token": Author(P(authors_layouts.Registers, 1), VIDEO, (THREE,), before=1),
    "registers": Author(P(authors_layouts.Registers, 4, "flash"), VIDEO, (THREE,), before=4),
    "history": Author(authors_layouts.History, ("video", "past"), (THREE,), before=30),
    "padded-text": Author(authors_layouts.PaddedText, PADDED, (THREE,), after=TEXT),
    "padded-text-math": Author(P(authors_layouts.PaddedText, "math"), PADDED, (THREE,), after=TEXT),
    "longer-keys": Author(authors_layouts.LongerKeys, WITH_TEXT, (THREE,), keys=TEXT),
    "longer-keys-flash": Author(P(authors_layouts.LongerKeys, "flash"), WITH_TEXT, (THREE,), keys=TEXT),
    "multihead": Author(authors_layouts.Multihead, VIDEO, (THREE,), oracle=False),
    "sliced": Author(authors_layouts.Sliced, VIDEO, (THREE,), oracle=False),
}
