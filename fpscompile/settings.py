"""What the user asked: the options of ``torch.compile(model, backend="fps", options={...})``, validated once."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from fpscompile.errors import OptionError
from fpscompile.schedule import GRANULARITIES, Phase, Schedule, check_density, check_window

KINDS = ("3d", "spatial", "temporal", "cross", "other")
"""What a site attends over. Only "3d" has a rewrite today."""

QUANT = ("auto", "fp8", "none")
LOWERINGS = ("auto", "triton", "cpp", "boxes", "gather", "reference")


@dataclass(frozen=True)
class Timestep:
    """How to read denoising progress from the model's timestep input, when no ``attach`` publishes it."""

    input: str = "timestep"
    """Name of the forward argument that carries the timestep."""
    start: float = 1000.0
    """Its value at the first step (pure noise)."""
    end: float = 0.0
    """Its value when denoising is complete."""
    shift: float = 1.0
    """The scheduler's flow shift ``s``: noise level ``sigma = s*u / (1 + (s-1)*u)`` at remaining work ``u``.
    1.0 means timesteps linear in the step index; Wan uses 3.0 (480p) or 5.0 (720p), HunyuanVideo 7.0."""

    def __post_init__(self) -> None:
        if not isinstance(self.input, str) or not self.input:
            raise OptionError(f"timestep['input']={self.input!r} must be the name of a forward argument")
        for name in ("start", "end", "shift"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise OptionError(f"timestep[{name!r}]={value!r} must be a number")
        if self.start == self.end:
            raise OptionError(f"timestep start and end are both {self.start}: progress cannot be read from them")
        if self.shift <= 0:
            raise OptionError(f"timestep['shift']={self.shift} must be positive; 1.0 means no shift")


@dataclass(frozen=True)
class Settings:
    """The options contract. Flat, frozen, hashable; every field is an option of the same name."""

    tile: tuple[int, int, int] = (4, 8, 8)
    """Tokens of the 3D tile along (t, h, w): the unit of FP8 scales and of sparsity. Clipped to the grid."""
    window: tuple[int, int, int] | None = None
    """Key tiles seen along (t, h, w), for all steps. One of ``window``, ``density``, ``schedule``."""
    density: float | None = None
    """Kept fraction of query-key pairs, for all steps: the largest feasible window not above it."""
    schedule: Schedule | None = None
    """A preset's name, a :class:`Schedule`, or a list of :class:`Phase`. Without any: "training_free"."""
    quant: str = "auto"
    """"fp8", "none", or "auto": fp8 where the device has FP8 tensor cores, none elsewhere."""
    granularity: str | None = None
    """Overrides the granularity of every phase; one of "tensor", "head", "tile", "subtile"."""
    lowering: str = "auto"
    """"cpp" (generated kernel, CPU), "boxes" (dense attention per box, any device), "gather" (any mask, and FP8),
    "reference" (slow, the oracle), or "auto": the first of the first three that can run the site here."""
    inner: str | Callable[..., Any] = "inductor"
    """Compiles everything that is not 3D attention: any registered backend name, or a callable."""
    inner_options: tuple[tuple[str, Any], ...] = ()
    """Passed to the inner compiler as its ``options`` (given as a dict)."""
    grid: tuple[int, int, int] | None = None
    """Video tokens along (t, h, w), when the graph cannot show them. Good for one resolution; else use ``attach``."""
    timestep: Timestep = field(default_factory=Timestep)
    """Where progress is read in the graph; a dict with "input", "start", "end", "shift"."""
    strict: bool = False
    """Raise when a requested site is not rewritten, instead of recording the reason."""
    attention_kinds: tuple[str, ...] = ("3d",)
    """Kinds of sites to rewrite."""

    def __post_init__(self) -> None:
        _set(self, "tile", _triple("tile", self.tile, "tokens"))
        chosen = [name for name in ("window", "density", "schedule") if getattr(self, name) is not None]
        if len(chosen) > 1:
            raise OptionError(f"give one of window, density and schedule, not {' and '.join(chosen)} together")
        if self.window is not None:
            _set(self, "window", check_window(self.window))
        if self.density is not None:
            _set(self, "density", check_density(self.density))
        if self.schedule is not None:
            _set(self, "schedule", Schedule.of(self.schedule))
        _choice("quant", self.quant, QUANT)
        _choice("lowering", self.lowering, LOWERINGS)
        if self.granularity is not None:
            _choice("granularity", self.granularity, GRANULARITIES)
        if not callable(self.inner) and not isinstance(self.inner, str):
            raise OptionError(f"inner={self.inner!r} must be a backend name or a callable(gm, inputs)")
        if self.inner == "fps":
            raise OptionError('inner="fps" would call fps from itself; name the compiler for the rest of the graph')
        if isinstance(self.inner_options, Mapping):
            _set(self, "inner_options", tuple(sorted(self.inner_options.items())))
        if not isinstance(self.inner_options, tuple):
            raise OptionError(f"inner_options={self.inner_options!r} must be a dict of the inner compiler's options")
        if self.grid is not None:
            _set(self, "grid", _triple("grid", self.grid, "video tokens"))
        if isinstance(self.timestep, Mapping):
            _reject_unknown("timestep", self.timestep, Timestep)
            _set(self, "timestep", Timestep(**self.timestep))
        if not isinstance(self.timestep, Timestep):
            raise OptionError(f"timestep={self.timestep!r} must be a dict with input, start, end, shift")
        if not isinstance(self.strict, bool):
            raise OptionError(f"strict={self.strict!r} must be True or False")
        given: Any = self.attention_kinds
        kinds = (given,) if isinstance(given, str) else tuple(given)
        for kind in kinds:
            _choice("attention_kinds", kind, KINDS)
            if kind != "3d":
                raise OptionError(
                    f"attention_kinds={kind!r}: only '3d' attention has a rewrite; other kinds are left alone"
                )
        _set(self, "attention_kinds", kinds)

    @classmethod
    def from_options(cls, options: Mapping[str, Any] | None) -> Settings:
        """Settings from the dict a user hands to ``torch.compile``.

        Raises:
            OptionError: an unknown key (with the nearest known one) or a bad value.
        """
        options = dict(options or {})
        _reject_unknown("options", options, cls)
        return cls(**options)

    @property
    def phases(self) -> Schedule:
        """The schedule in force: the given one, or one constant phase, or the default preset."""
        if self.window is not None or self.density is not None:
            schedule = Schedule.constant(window=self.window, density=self.density)
        else:
            schedule = self.schedule or Schedule.of("training_free")
        if self.granularity is None:
            return schedule
        phases = tuple(dataclasses.replace(phase, granularity=self.granularity) for phase in schedule.phases)
        return dataclasses.replace(schedule, phases=phases)


def _set(target: object, name: str, value: object) -> None:
    object.__setattr__(target, name, value)


def _triple(name: str, value: Any, unit: str) -> tuple[int, int, int]:
    if (
        not isinstance(value, (tuple, list))
        or len(value) != 3
        or not all(isinstance(v, int) and not isinstance(v, bool) and v >= 1 for v in value)
    ):
        raise OptionError(f"{name}={value!r} must be three integers >= 1: {unit} along (t, h, w)")
    return (value[0], value[1], value[2])


def _choice(name: str, value: Any, known: tuple[str, ...]) -> None:
    if value not in known:
        raise OptionError(f"{name}={value!r} is unknown; choose one of {', '.join(map(repr, known))}")


def _reject_unknown(where: str, given: Mapping[str, Any], cls: type) -> None:
    known = [f.name for f in dataclasses.fields(cls)]
    for key in given:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise OptionError(f"{where} has no key {key!r}{hint} Known keys: {', '.join(known)}")


__all__ = ["KINDS", "LOWERINGS", "QUANT", "Phase", "Settings", "Timestep"]
