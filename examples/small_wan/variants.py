"""The attentions that the experiment compares, as options of the backend."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from fpscompile.backend import fps
from small_wan import flow

TILE = (2, 2, 2)
"""64 tiles on the 8 x 8 x 8 grid: small enough that a density of a tenth still means several tiles."""
REVERSED = [
    {"start": 0.0, "end": 0.2, "density": 0.45, "granularity": "subtile"},
    {"start": 0.2, "end": 0.8, "density": 0.10, "granularity": "head"},
    {"start": 0.8, "end": 1.0, "density": 0.25, "granularity": "tile"},
]
"""The paper's order turned round at its mean density: sparse and coarse in the middle, dense at the ends."""
FRAMES = [
    {"start": 0.0, "end": 0.2, "window": (6, 2, 2), "granularity": "head"},
    {"start": 0.2, "end": 0.8, "window": (8, 4, 2), "granularity": "subtile"},
    {"start": 0.8, "end": 1.0, "window": (8, 2, 2), "granularity": "tile"},
]
"""The paper's schedule in windows of 1 x 1 x 2 tokens that see (nearly) all frames: 0.19 dense on average."""
VARIANTS: dict[str, dict[str, Any]] = {
    "fp8": {"density": 1.0, "quant": "fp8"},
    "sparse": {"schedule": "paper", "quant": "none"},
    "paper": {"schedule": "paper", "quant": "fp8"},
    "reversed": {"schedule": REVERSED, "quant": "fp8"},
    "constant": {"density": 0.2, "quant": "fp8"},
    "across": {"schedule": "paper", "quant": "fp8", "tile": (2, 2, 1)},
    "frames": {"schedule": FRAMES, "quant": "fp8", "tile": (1, 1, 2)},
    "0.5": {"density": 0.5, "quant": "fp8"},
    "0.1": {"density": 0.1, "quant": "fp8"},
}
"""Name to options. Tiles of 2 x 2 x 2 have no window of a density of 0.1 that looks across all axes; those of "across"
do. Each is run on the dense control's weights (training-free) and on weights trained with it."""


@dataclass(frozen=True)
class Arithmetic:
    """How a variant is computed, which should not change what it computes."""

    device: str = "cpu"
    inner: str = "aot_eager"
    """What compiles the rest of the graph."""
    lowering: str = ""
    """Empty: Triton's kernels on a GPU; on a CPU the generic lowering, which rounds FP8 as the contract says."""


def forward(model: torch.nn.Module, variant: str, how: Arithmetic) -> Any:
    """``model`` itself for "dense", else its compilation with the variant's options."""
    if variant == "dense":
        return model
    torch._dynamo.reset()
    lowering = how.lowering or ("auto" if how.device.startswith("cuda") else "gather")
    common = {"tile": TILE, "timestep": {"shift": flow.SHIFT}, "inner": how.inner, "lowering": lowering, "strict": True}
    return torch.compile(model, backend=fps, dynamic=False, options={**common, **VARIANTS[variant]})
