"""``fps::phase_index``: denoising progress -> phase of the schedule, inside the graph and without a host sync.

    fps::phase_index(Tensor? timestep, Tensor? published, float[] boundaries, int conservative, float start,
                     float end, float shift) -> Tensor

It is made of plain tensor arithmetic on one device, so it may run in a CUDA graph (``published`` then has to live on
the timestep's device).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from fpscompile.errors import OptionError

_library = torch.library.Library("fps", "FRAGMENT")
_library.define(
    "phase_index(Tensor? timestep, Tensor? published, float[] boundaries, int conservative, float start, float end, "
    "float shift) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)

TOLERANCE = 1e-6
"""Progress this much below a boundary counts as on it: float32 rounding of ``i / N``."""

OUTSIDE = 1e-3
"""Progress this far outside [0, 1] is still rounding; farther is not progress at all."""


def phase_index(
    timestep: torch.Tensor | None,
    published: torch.Tensor | None,
    boundaries: Sequence[float],
    conservative: int,
    start: float = 1000.0,
    end: float = 0.0,
    shift: float = 1.0,
) -> torch.Tensor:
    """Phase of the current denoising step, on the timestep's device; no host sync, safe in a CUDA graph.

    ``published`` wins where it is known. Else progress is read from the timestep: ``sigma = (t - end) / (start -
    end)``, the shift undone, ``u = sigma / (shift - (shift - 1) * sigma)``, ``progress = 1 - u``. An integer timestep
    may be off by half a unit, a bfloat16 or float16 one by half its spacing: progress that may lie on a boundary
    counts as there. Unknown (NaN), or further than 1e-3 outside [0, 1], gives ``conservative``.

    Args:
        timestep: [], [B] or [B, ...], any real dtype. Trailing dims (frames, tokens) reduce to the noisiest; clean
            conditioning tokens have progress 1 and so never count, unless there are no others.
        published: float32 [1] or [n], progress; NaN means not published.
        boundaries: :attr:`fpscompile.schedule.Schedule.boundaries`.
        conservative: phase of unknown progress.
        start, end, shift: see :class:`fpscompile.settings.Timestep`.

    Returns:
        int32 [n], n the number of timesteps or of published values, whichever is larger.

    Raises:
        OptionError: both numbers are above 1 and differ.
    """
    return torch.ops.fps.phase_index(timestep, published, list(boundaries), conservative, start, end, shift)


def _phase_index(
    timestep: torch.Tensor | None,
    published: torch.Tensor | None,
    boundaries: Sequence[float],
    conservative: int,
    start: float,
    end: float,
    shift: float,
) -> torch.Tensor:
    progress = slack = None
    if timestep is not None:
        progress, slack = _read_timestep(timestep, start, end, shift)
    if published is not None:
        known = published.reshape(-1).to(torch.float64)
        if progress is None or slack is None:
            progress, slack = known, torch.zeros_like(known)
        else:
            known = known.to(progress.device, non_blocking=True)
            if known.shape[0] > 1 and 1 < progress.shape[0] != known.shape[0]:
                raise OptionError(
                    f"{known.shape[0]} published values of progress for {progress.shape[0]} timesteps: "
                    "publish one, or one per timestep"
                )
            use = ~known.isnan()
            progress, slack = torch.where(use, known, progress), torch.where(use, 0.0, slack)
    if progress is None or slack is None:
        return torch.full((1,), conservative, dtype=torch.int32)
    inside = (progress >= -OUTSIDE) & (progress <= 1 + OUTSIDE)  # False for NaN
    index = torch.zeros_like(progress, dtype=torch.int32)
    for boundary in boundaries:
        index += progress + slack + TOLERANCE >= boundary
    return torch.where(inside, index, conservative).to(torch.int32)


def _read_timestep(timestep: torch.Tensor, start: float, end: float, shift: float) -> tuple[torch.Tensor, torch.Tensor]:
    """(progress, rounding slack in progress), float64 [B]."""
    exact = timestep.reshape(1) if timestep.dim() == 0 else timestep.flatten(1) if timestep.dim() > 1 else timestep
    sigma = (exact.to(torch.float64) - end) / (start - end)
    if timestep.dtype in (torch.bfloat16, torch.float16):
        half_unit = exact.to(torch.float64).abs() * (torch.finfo(timestep.dtype).eps / 2 / abs(start - end))
    else:
        half_unit = torch.full_like(sigma, 0.0 if timestep.is_floating_point() else 0.5 / abs(start - end))
    rest = shift - (shift - 1) * sigma
    progress = 1 - sigma / rest
    slack = half_unit * shift / rest.square()
    if timestep.dim() > 1:
        # one element out of range or NaN makes the whole row unknown: min and max show it
        low, where = progress.min(1)
        progress = torch.where(progress.amax(1) <= 1 + OUTSIDE, low, torch.nan)
        slack = slack.gather(1, where[:, None]).squeeze(1)
    return progress, slack


torch.library.impl("fps::phase_index", "default", lib=_library)(_phase_index)


@torch.library.register_fake("fps::phase_index", lib=_library)
def _phase_index_fake(timestep: torch.Tensor | None, published: torch.Tensor | None, *_: Any) -> torch.Tensor:
    if timestep is None:
        if published is None:
            return torch.empty(1, dtype=torch.int32, device="cpu")
        return published.new_empty(published.numel(), dtype=torch.int32)
    number = timestep.shape[0] if timestep.dim() > 0 else 1
    # a published [1] adds nothing; asking a symbolic size whether it is 1 would add a guard
    if published is not None and not (isinstance(published.numel(), int) and published.numel() == 1):
        number = torch.sym_max(number, published.numel())
    return timestep.new_empty(number, dtype=torch.int32)


__all__ = ["phase_index"]
