"""What the user asked: the options of ``torch.compile(model, backend="fps", options={...})``, validated once."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from fpscompile.errors import OptionError
from fpscompile.overrides import (
    HeadWindows,
    LayerKey,
    LayerOverride,
    head_windows,
    layer_overrides,
    schedule_of,
    variants,
)
from fpscompile.schedule import GRANULARITIES, Phase, Schedule
from fpscompile.windows import AnyWindow, window_of
from fpscompile.windows.checks import check_density, real, sizes, tensor_given

KINDS = ("3d", "spatial", "temporal", "cross", "other")
"""What a site attends over. Only "3d" has a rewrite today."""

QUANT = ("auto", "fp8", "int8", "none")
COMPUTE = ("auto", "float32", "bfloat16")
REMAINDER = ("none", "means")
AUTOTUNE = ("quick", "full", "off")
HISTORY = ("global", "windowed")
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
            given = getattr(self, name)
            value = real(given)
            if value is None or not math.isfinite(value):
                where = f"timestep[{name!r}]"
                raise OptionError(tensor_given(where, given) or f"{where}={given!r} must be a number, and finite")
            _set(self, name, value)
        if self.start == self.end:
            raise OptionError(f"timestep start and end are both {self.start}: progress cannot be read from them")
        if self.shift <= 0:
            raise OptionError(f"timestep['shift']={self.shift} must be positive; 1.0 means no shift")


@dataclass(frozen=True)
class Settings:
    """The options contract. Flat and frozen; every field is an option of the same name. Hashable where the values of
    ``inner_options`` are."""

    tile: tuple[int, int, int] = (4, 8, 8)
    """Tokens of the 3D tile along (t, h, w): the unit of FP8 scales and of sparsity. Clipped to the grid."""
    window: AnyWindow | None = None
    """Key tiles seen along (t, h, w), or a window of :mod:`fpscompile.windows`, for all steps. One of ``window``,
    ``density``, ``schedule``; windows such as "topk" take a density beside them."""
    density: float | None = None
    """Kept fraction of query-key pairs, for all steps: the largest feasible window not above it."""
    schedule: Schedule | None = None
    """A preset's name, a :class:`Schedule`, or a list of :class:`Phase`. Without any: "training_free"."""
    heads: HeadWindows = ()
    """Windows of some heads, in every layer: a dict such as {"0-3": "dense"}. Other heads do what the rest says."""
    layers: tuple[tuple[LayerKey, LayerOverride], ...] = ()
    """What some layers do instead: a dict such as {"0-1": "dense"}; see :mod:`fpscompile.overrides`."""
    quant: str = "auto"
    """"fp8", "int8" (CPUs only), "none", or "auto": fp8 where the device has FP8 tensor cores, none elsewhere."""
    compute: str = "auto"
    """Operands of the matrix products of the generated CPU kernel: "float32", "bfloat16", or "auto", which never
    computes in less than the inputs' dtype."""
    granularity: str | None = None
    """Overrides the granularity of every phase; one of "tensor", "head", "tile", "subtile"."""
    smooth_k: bool = True
    """Whether K's mean over the tokens is subtracted before quantization, which the softmax does not see."""
    smooth_v: bool = False
    """Whether V's mean is subtracted before FP8 quantization and added to the output; int8 always does so."""
    hadamard: bool = False
    """Whether Q and K are rotated before FP8 quantization, which their products do not see: spreads large channels."""
    remainder: str = "none"
    """What a query has of the tiles that its window drops: "none", or "means", one key for each, the mean of its keys
    with the mean of its values; see :mod:`fpscompile.remainder`."""
    lowering: str = "auto"
    """"triton" (generated kernels, GPUs), "cpp" (generated kernel, CPU), "boxes" (dense attention per box, any device),
    "gather" (any mask, and FP8), "reference" (slow, the oracle), or "auto": the generated kernel of the device where it
    can run the site, on a CPU without AVX-512 boxes from about 1,024 tokens on; where it cannot, boxes, or gather for
    FP8 and for windows that are no product of the axes."""
    inner: str | Callable[..., Any] = "inductor"
    """Compiles everything that is not 3D attention: any registered backend name, or a callable."""
    inner_options: tuple[tuple[str, Any], ...] = ()
    """Passed to the inner compiler as its ``options`` (given as a dict)."""
    grid: tuple[int, int, int] | None = None
    """Video tokens along (t, h, w), when the graph cannot show them. Good for one resolution; else use ``attach``."""
    history: str = "global"
    """Earlier videos in front of the current one in its sequence: "global" (seen by all, as text is), or "windowed":
    those of the same (h, w) that adjoin it are windowed with it, as earlier frames."""
    timestep: Timestep = field(default_factory=Timestep)
    """Where progress is read in the graph; a dict with "input", "start", "end", "shift"."""
    strict: bool = False
    """Raise when a requested site is not rewritten, instead of recording the reason."""
    attention_kinds: tuple[str, ...] = ("3d",)
    """Kinds of sites to rewrite."""
    autotune: str | None = None
    """"quick" or "full": measure, while compiling, what the tuning file does not hold; "off": take no kernel from it.
    None: use what it holds."""
    tuning: str | None = None
    """Path of the tuning file; None: the one in the cache folder."""
    free_tile: bool = False
    """Whether ``autotune`` may choose another tile that keeps at least as much and errs no more; ``tile="auto"`` is the
    default tile with this."""

    def __post_init__(self) -> None:
        tile: Any = self.tile
        if isinstance(tile, str) and tile == "auto":
            _set(self, "tile", type(self).tile)
            _set(self, "free_tile", True)
        _set(self, "tile", _triple("tile", self.tile, "tokens"))
        if self.window is not None:
            _set(self, "window", window_of(self.window))
        if self.density is not None:
            _set(self, "density", check_density(self.density))
        if self.schedule is not None:
            _set(self, "schedule", Schedule.of(self.schedule))
        schedule_of(self.window, self.density, self.schedule)
        _set(self, "heads", head_windows(self.heads))
        _set(self, "layers", layer_overrides(self.layers))
        _choice("quant", self.quant, QUANT)
        _choice("compute", self.compute, COMPUTE)
        if self.compute != "auto" and self.quant == "int8":
            raise OptionError(f"compute={self.compute!r} and quant='int8' exclude each other: int8 multiplies bytes")
        _choice("remainder", self.remainder, REMAINDER)
        _choice("lowering", self.lowering, LOWERINGS)
        if self.granularity is not None:
            _choice("granularity", self.granularity, GRANULARITIES)
        for name in ("smooth_k", "smooth_v", "hadamard"):
            if not isinstance(getattr(self, name), bool):
                raise OptionError(f"{name}={getattr(self, name)!r} must be True or False")
        if self.hadamard and self.quant == "int8":
            raise OptionError("hadamard=True and quant='int8' exclude each other: int8 has a scale per token instead")
        _ = self.variants  # what contradicts itself is an error now
        if not callable(self.inner) and not isinstance(self.inner, str):
            raise OptionError(f"inner={self.inner!r} must be a backend name or a callable(gm, inputs)")
        if self.inner == "fps":
            raise OptionError('inner="fps" would call fps from itself; name the compiler for the rest of the graph')
        if isinstance(self.inner_options, Mapping) and all(isinstance(key, str) for key in self.inner_options):
            _set(self, "inner_options", tuple(sorted(self.inner_options.items())))
        if not isinstance(self.inner_options, tuple) or not all(_is_pair(item, str) for item in self.inner_options):
            raise OptionError(
                f"inner_options={self.inner_options!r} must be a dict of the inner compiler's options by name"
            )
        if self.grid is not None:
            _set(self, "grid", _triple("grid", self.grid, "video tokens"))
        _choice("history", self.history, HISTORY)
        if isinstance(self.timestep, Mapping):
            _reject_unknown("timestep", self.timestep, Timestep)
            _set(self, "timestep", Timestep(**self.timestep))
        if not isinstance(self.timestep, Timestep):
            raise OptionError(f"timestep={self.timestep!r} must be a dict with input, start, end, shift")
        if not isinstance(self.strict, bool):
            raise OptionError(f"strict={self.strict!r} must be True or False")
        given: Any = self.attention_kinds
        if not given or not isinstance(given, (str, tuple, list, set, frozenset)):
            raise OptionError(f"attention_kinds={given!r} must name kinds of attention, such as ('3d',)")
        kinds = (given,) if isinstance(given, str) else tuple(given)
        for kind in kinds:
            _choice("attention_kinds", kind, KINDS)
            if kind != "3d":
                raise OptionError(
                    f"attention_kinds={kind!r}: only '3d' attention has a rewrite; other kinds are left alone"
                )
        _set(self, "attention_kinds", kinds)
        if self.autotune is not None:
            _choice("autotune", self.autotune, AUTOTUNE)
        if self.tuning is not None:
            path = os.fspath(self.tuning) if isinstance(self.tuning, (str, os.PathLike)) else ""
            if not path or "\0" in path:
                raise OptionError(f"tuning={self.tuning!r} must be the path of a tuning file")
            _set(self, "tuning", path)
        if not isinstance(self.free_tile, bool):
            raise OptionError(f"free_tile={self.free_tile!r} must be True or False")

    @classmethod
    def from_options(cls, options: Mapping[str, Any] | None) -> Settings:
        """Settings from the dict a user hands to ``torch.compile``.

        Raises:
            OptionError: an unknown key (with the nearest known one) or a bad value.
        """
        if options is not None and not isinstance(options, Mapping):
            raise OptionError(f"options={options!r} must be a dict of option names to values")
        options = dict(options or {})
        _reject_unknown("options", options, cls)
        return cls(**options)

    @property
    def phases(self) -> Schedule:
        """The schedule in force, layers that are overridden apart; its ranges are those of all layers."""
        return self.variants[0]

    @functools.cached_property
    def variants(self) -> tuple[Schedule, ...]:
        """The schedule in force, then that of each of ``layers``; all have the same ranges of progress."""
        base = schedule_of(self.window, self.density, self.schedule) or Schedule.of("training_free")
        return variants(base, self.granularity, self.heads, [override for _, override in self.layers])

    @property
    def layer_keys(self) -> tuple[LayerKey, ...]:
        """Keys of ``layers``: the first belongs to variant 1."""
        return tuple(key for key, _ in self.layers)


def _set(target: object, name: str, value: object) -> None:
    object.__setattr__(target, name, value)


def _is_pair(item: Any, kind: type) -> bool:
    return isinstance(item, tuple) and len(item) == 2 and isinstance(item[0], kind)


def three_sizes(value: Any) -> tuple[int, int, int] | None:
    """Three integers >= 1 as a tuple of plain ints; None for anything else."""
    found = sizes(value, 3)
    return None if found is None else (found[0], found[1], found[2])


def _triple(name: str, value: Any, unit: str) -> tuple[int, int, int]:
    found = three_sizes(value)
    if found is None:
        wrong = f"{name}={value!r} must be three integers >= 1: {unit} along (t, h, w)"
        raise OptionError(tensor_given(name, value) or wrong)
    return found


def _choice(name: str, value: Any, known: tuple[str, ...]) -> None:
    if value not in known:
        raise OptionError(f"{name}={value!r} is unknown; choose one of {', '.join(map(repr, known))}")


def _reject_unknown(where: str, given: Mapping[str, Any], cls: type) -> None:
    known = [f.name for f in dataclasses.fields(cls)]
    for key in given:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else "."
            raise OptionError(f"{where} has no key {key!r}{hint} Known keys: {', '.join(known)}")


__all__ = ["KINDS", "LOWERINGS", "QUANT", "Phase", "Settings", "Timestep"]
