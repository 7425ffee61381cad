"""Denoising progress -> (window, granularity): the step-conditioned part of the method.

Progress is ``step index / number of steps``, in ``[0, 1]``. A :class:`Schedule` cuts it into
:class:`Phase` ranges. The phase of a step is an int32 index that lives on the device, so no step recompiles.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fpscompile.errors import ScheduleError
from fpscompile.windows import AnyWindow, is_open, pattern_of, spec_of, window_of, with_density
from fpscompile.windows.checks import check_density, located, real, tensor_given

GRANULARITIES = ("tensor", "head", "tile", "subtile")
"""Regions of Q and K that share one FP8 scale, from coarse to fine (see :mod:`fpscompile.quant`)."""


@dataclass(frozen=True)
class Phase:
    """One range of denoising progress and what attention does inside it."""

    start: float
    """Progress at which the phase begins, inclusive."""
    end: float
    """Progress at which it ends, exclusive; the last phase ends at 1.0, inclusive."""
    window: AnyWindow | None = None
    """Key tiles seen along (t, h, w), or any window of :mod:`fpscompile.windows`. Exactly one of ``window`` and
    ``density`` is given, except for windows such as "topk" that take a density: it becomes theirs."""
    density: float | None = None
    """Upper bound on the kept fraction of query-key pairs; the largest sliding window below it is taken."""
    granularity: str = "tile"
    """Region of Q and K that shares one FP8 scale; one of :data:`GRANULARITIES`. Unused when ``quant="none"``."""

    def __post_init__(self) -> None:
        start, end = real(self.start), real(self.end)
        if start is None or end is None or not 0.0 <= start < end <= 1.0:
            where = f"phase [{self.start!r}, {self.end!r})"
            wrong = f"{where} is not a range of progress: need numbers 0 <= start < end <= 1"
            raise ScheduleError(tensor_given("start", self.start) or tensor_given("end", self.end) or wrong)
        object.__setattr__(self, "start", start)
        object.__setattr__(self, "end", end)
        where = f"phase [{self.start}, {self.end})"
        object.__setattr__(self, "density", None if self.density is None else check_density(self.density))
        if self.window is not None:
            window = window_of(self.window)
            if is_open(window):
                if self.density is None:
                    raise ScheduleError(f"{where}: window={self.window!r} needs a density")
                window = with_density(pattern_of(window), self.density)
                object.__setattr__(self, "density", None)
            object.__setattr__(self, "window", window)
        if (self.window is None) == (self.density is None):
            raise ScheduleError(
                f"{where} needs exactly one of window and density, got window={self.window}, density={self.density}"
            )
        if self.granularity not in GRANULARITIES:
            raise ScheduleError(
                f"granularity {self.granularity!r} is unknown; choose one of {', '.join(GRANULARITIES)}"
            )

    def to_data(self) -> dict[str, Any]:
        """Plain data for JSON; ``Phase(**data)`` is the same phase."""
        window = None if self.window is None else spec_of(self.window)
        data = {"start": self.start, "end": self.end, "window": window, "density": self.density}
        return {key: value for key, value in data.items() if value is not None} | {"granularity": self.granularity}


@dataclass(frozen=True)
class Schedule:
    """Phases that cover progress ``[0, 1]`` without gap or overlap.

    Raises:
        ScheduleError: no phases, a gap, an overlap, or phases out of order.
    """

    phases: tuple[Phase, ...]
    name: str = "custom"
    """Shown in reports. A preset's name is the word that selects it in ``options["schedule"]``."""
    clamp: bool = False
    """Whether a density below the grid's floor becomes the floor (presets, with a record) or an error (yours)."""

    def __post_init__(self) -> None:
        if not self.phases:
            raise ScheduleError("a schedule needs at least one phase")
        expected = 0.0
        for phase in self.phases:
            if phase.start != expected:
                kind = "overlap" if phase.start < expected else "leave a gap"
                raise ScheduleError(
                    f"phases {kind}: [{phase.start}, {phase.end}) should start at {expected}; "
                    "list the phases in order, each starting where the one before ends"
                )
            expected = phase.end
        if expected != 1.0:
            raise ScheduleError(f"the phases end at {expected}; the last one must end at 1.0")

    @property
    def boundaries(self) -> tuple[float, ...]:
        """Starts of all phases but the first: phase = number of boundaries <= progress."""
        return tuple(phase.start for phase in self.phases[1:])

    def phase_at(self, progress: float) -> int:
        """Index of the phase that holds ``progress``; 1.0 belongs to the last.

        Raises:
            ScheduleError: progress outside [0, 1].
        """
        if not 0.0 <= progress <= 1.0:
            raise ScheduleError(f"progress {progress} is outside [0, 1]")
        return sum(boundary <= progress for boundary in self.boundaries)

    @classmethod
    def constant(cls, *, window: Any = None, density: float | None = None) -> Schedule:
        """One phase for all steps.

        Raises:
            ScheduleError: a bad value, or a window that takes a density and has none.
        """
        if window is not None and density is None and is_open(window_of(window)):
            raise ScheduleError(
                f"window {pattern_of(window).text!r} needs a density: give the option 'density' beside it, as in "
                "{'window': 'topk', 'density': 0.2}, or 'density' inside of it"
            )
        return cls((Phase(0.0, 1.0, window=window, density=density),), name="constant")

    @classmethod
    def of(cls, value: Any) -> Schedule:
        """A schedule from what a user writes: a preset's name, a Schedule, or a list of Phases or their dicts.

        Raises:
            ScheduleError: anything else, or ranges that do not cover [0, 1].
        """
        if isinstance(value, Schedule):
            return value
        if isinstance(value, str):
            if value not in PRESETS:
                raise ScheduleError(f"schedule {value!r} is unknown; presets are {', '.join(PRESETS)}")
            return PRESETS[value]
        if not isinstance(value, Sequence):
            raise ScheduleError(f"a schedule is a preset's name, a Schedule or a list of Phase, got {value!r}")
        phases = []
        for index, item in enumerate(value):
            with located(f"schedule[{index}]"):
                phases.append(item if isinstance(item, Phase) else _phase(item))
        return cls(tuple(phases))


def _phase(value: Any) -> Phase:
    """From a dict with a phase's fields."""
    known = [field.name for field in dataclasses.fields(Phase)]
    if not isinstance(value, Mapping):
        raise ScheduleError(f"{value!r} is no phase: give a Phase, or a dict with the keys {', '.join(known)}")
    unknown = next((key for key in value if key not in known), None)
    if unknown is not None:
        raise ScheduleError(f"a phase has no key {unknown!r}; its keys are {', '.join(known)}")
    missing = [name for name in ("start", "end") if name not in value]
    if missing:
        raise ScheduleError(f"a phase needs start and end, and {' and '.join(missing)} of {dict(value)!r} is missing")
    return Phase(**value)


PAPER = Schedule(
    (
        Phase(0.0, 0.2, density=0.10, granularity="head"),
        Phase(0.2, 0.8, density=0.25, granularity="subtile"),
        Phase(0.8, 1.0, density=0.15, granularity="tile"),
    ),
    name="paper",
    clamp=True,
)
"""FPSAttention's order (arXiv 2506.04648): coarse and sparse early, fine and denser in the error-sensitive middle,
between the two late. The thresholds and windows are not published; these give the mean density 0.20 that the
paper's FLOP counts imply. Meant for models fine-tuned with it."""

TRAINING_FREE = Schedule(
    (
        Phase(0.0, 0.2, density=1.0, granularity="subtile"),
        Phase(0.2, 0.6, density=0.35, granularity="tile"),
        Phase(0.6, 1.0, density=0.25, granularity="tile"),
    ),
    name="training_free",
    clamp=True,
)
"""For models that never saw sparsity: the first steps, which fix the layout of the video, stay dense."""

PRESETS = {schedule.name: schedule for schedule in (PAPER, TRAINING_FREE)}
