"""Overrides by layer and by head: ``options["layers"]`` and ``options["heads"]``.

A layer is an element of a list of blocks in the model; module paths name it: ``transformer_blocks.3.attn1`` is in
layer 3 of the list ``transformer_blocks``. Keys of ``layers`` are

- indices, "5", "0-1,7" or "30-": elements of the one list that holds 3D attention;
- a list and indices, "transformer_blocks.0-1": where there are several lists;
- a module's path, "blocks.5.attn1" or "blocks.*.attn1": one attention, or all that match.

What is overridden is the schedule of a site: every override is a *variant*, number 0 is what the options say without
it. All variants share one set of progress ranges, so one phase index serves them all.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fpscompile.errors import OptionError
from fpscompile.ranges import Ranges
from fpscompile.schedule import GRANULARITIES, Phase, Schedule
from fpscompile.windows import Dense, Heads, Pattern, Sliding, is_open, pattern_of, window_of, with_density
from fpscompile.windows.checks import located

_LISTED = re.compile(r"(.+)\.(\d[\d,\s-]*)")
_BLOCK = re.compile(r"(.+?)\.(\d+)(?:\.|$)")

HeadWindows = tuple[tuple[Ranges, Pattern], ...]


def block_of(path: str) -> tuple[str, int] | None:
    """(list, index) of the block that a module path goes through first; None when it has no number."""
    match = _BLOCK.match(path)
    return (match[1], int(match[2])) if match else None


@dataclass(frozen=True)
class LayerKey:
    """One key of ``options["layers"]``."""

    text: str
    path: str = ""
    """The list of blocks, or the module; "" for indices alone."""
    ranges: Ranges | None = None
    """Indices in the list; None for a module."""

    @classmethod
    def parse(cls, key: object) -> LayerKey:
        """Raises OptionError for what is neither indices nor a path."""
        text = str(key).strip() if isinstance(key, (str, int)) and not isinstance(key, bool) else ""
        if not text:
            raise OptionError(f'layers has the key {key!r}: write indices such as "0-1", or a module\'s path')
        if text[0].isdigit():
            return cls(text, ranges=Ranges.parse(text, "layers"))
        listed = _LISTED.fullmatch(text)
        if listed:
            return cls(text, listed[1], Ranges.parse(listed[2], f"layers: indices of {listed[1]!r}"))
        return cls(text, text)

    def matches(self, path: str) -> bool:
        """Whether it names the attention whose module has this path."""
        if self.ranges is None:
            return _inside(path, self.path)
        block = block_of(path)
        return block is not None and block[1] in self.ranges and (not self.path or _ends(block[0], self.path))


@dataclass(frozen=True)
class LayerOverride:
    """One value of ``options["layers"]``."""

    schedule: Schedule | None = None
    """Takes the place of window, density, schedule and heads; None keeps them."""
    granularity: str | None = None
    heads: HeadWindows = ()
    """Takes the place of ``options["heads"]``."""

    @classmethod
    def of(cls, value: Any, where: str) -> LayerOverride:
        """From a window, or from a dict with window, density, schedule, granularity, heads.

        Raises:
            OptionError: an unknown key, a bad value, or nothing that is overridden.
        """
        if isinstance(value, LayerOverride):
            return value
        if not isinstance(value, Mapping) or "family" in value:
            return cls(schedule=Schedule.constant(window=window_of(value)))
        known = ("window", "density", "schedule", "granularity", "heads")
        unknown = next((key for key in value if key not in known), None)
        if unknown is not None or not value:
            what = f"has no key {unknown!r}" if value else "is empty"
            raise OptionError(f"{where} {what}; its keys are {', '.join(known)}")
        granularity = value.get("granularity")
        if granularity is not None and granularity not in GRANULARITIES:
            raise OptionError(
                f"{where}: granularity={granularity!r} is unknown; choose one of {', '.join(GRANULARITIES)}"
            )
        if all(item is None for item in value.values()):
            raise OptionError(f"{where} overrides nothing: {', '.join(value)} is None; leave the layer out")
        schedule = schedule_of(value.get("window"), value.get("density"), value.get("schedule"), where)
        return cls(schedule, granularity, head_windows(value.get("heads")))


def schedule_of(window: Any, density: Any, schedule: Any, where: str = "") -> Schedule | None:
    """The schedule that a window, a density or a schedule mean; None without any.

    Raises:
        OptionError: more than one of them, except for a window that takes a density.
    """
    chosen = {"window": window, "density": density, "schedule": schedule}
    names = [name for name, value in chosen.items() if value is not None]
    if names == ["window", "density"] and is_open(window_of(window)):
        return Schedule.constant(window=window, density=density)
    if len(names) > 1:
        start = f"{where}: " if where else ""
        raise OptionError(f"{start}give one of window, density and schedule, not {' and '.join(names)} together")
    if schedule is not None:
        return Schedule.of(schedule)
    return Schedule.constant(window=window, density=density) if names else None


def head_windows(value: Any) -> HeadWindows:
    """From a dict of head ranges to windows; () for None.

    Raises:
        OptionError: anything else, or two ranges with a head in common.
    """
    if value is None or value == ():
        return ()
    if isinstance(value, tuple) and all(
        isinstance(pair, tuple) and pair and isinstance(pair[0], Ranges) for pair in value
    ):
        return value
    if not isinstance(value, Mapping) or not value:
        raise OptionError(f'heads={value!r} must be a dict of head ranges to windows, such as {{"0-3": "dense"}}')
    return Heads(value).of  # type: ignore[arg-type]


def layer_overrides(value: Any) -> tuple[tuple[LayerKey, LayerOverride], ...]:
    """From the dict a user writes. Keys that could name one site twice are left to :func:`variant_of`.

    Raises:
        OptionError: not a dict, an empty one, or a bad key or value.
    """
    if value is None or value == ():
        return ()
    if isinstance(value, tuple) and all(
        isinstance(pair, tuple) and pair and isinstance(pair[0], LayerKey) for pair in value
    ):
        return value
    if not isinstance(value, Mapping) or not value:
        raise OptionError(f'layers={value!r} must be a dict of layers to what they do, such as {{"0-1": "dense"}}')
    overrides = []
    for key, item in value.items():
        named, where = LayerKey.parse(key), f"layers[{key!r}]"
        with located(where):
            overrides.append((named, LayerOverride.of(item, where)))
    return tuple(overrides)


def variants(
    base: Schedule, granularity: str | None, heads: HeadWindows, layers: Sequence[LayerOverride]
) -> tuple[Schedule, ...]:
    """The schedule without overrides, then one per layer override, all with the same ranges of progress."""
    result = [_adorned(base, granularity, heads)]
    for layer in layers:
        own = layer.heads if layer.schedule is not None else layer.heads or heads
        result.append(_adorned(layer.schedule or base, layer.granularity or granularity, own))
    bounds = sorted({boundary for schedule in result for boundary in schedule.boundaries})
    return tuple(_refined(schedule, bounds) for schedule in result)


def stacked(schedules: Sequence[Schedule]) -> Schedule:
    """One schedule whose phases are those of all, one schedule after the other; its ranges mean nothing.

    A phase of schedule v is number ``v * len(phases) + phase``.
    """
    phases = [phase for schedule in schedules for phase in schedule.phases]
    cut = [
        dataclasses.replace(phase, start=index / len(phases), end=(index + 1) / len(phases))
        for index, phase in enumerate(phases)
    ]
    return Schedule(tuple(cut), "stacked", any(schedule.clamp for schedule in schedules))


def variant_of(path: str, keys: Sequence[LayerKey]) -> int:
    """Number of the variant that a site runs: 0 for none of the keys.

    Raises:
        OptionError: two keys name it.
    """
    found = [index for index, key in enumerate(keys) if key.matches(path)]
    if len(found) > 1:
        first, second = (keys[index].text for index in found[:2])
        raise OptionError(f"layers {first!r} and {second!r} both name {path}: write each layer once")
    return found[0] + 1 if found else 0


def check_named(keys: Sequence[LayerKey], paths: Sequence[str], others: Sequence[str] = ()) -> None:
    """Refuse keys that name nothing, in whole or in part.

    Args:
        paths: modules of the 3D attention calls that are known.
        others: paths of what else is in the model. Those in other lists of blocks may hold attention, so keys that
            have a path may name them.

    Raises:
        OptionError: a key without any attention, an index beyond the last block, or indices without a list where the
            model has several.
    """
    lists = sorted({block[0] for path in paths if (block := block_of(path)) is not None})
    elsewhere = [path for path in others if (block := block_of(path)) is not None and block[0] not in lists]
    for key in keys:
        known = [*paths, *elsewhere] if key.path else paths
        if key.ranges is not None:
            if not key.path and len(lists) > 1:
                raise OptionError(
                    f"layers {key.text!r} could be any of the model's lists of blocks, {', '.join(lists)}: write "
                    f'"{lists[0]}.{key.text}"'
                )
            blocks = [block for path in known if (block := block_of(path)) is not None]
            held = [(name, index) for name, index in blocks if not key.path or _ends(name, key.path)]
            last = max((index for _, index in held), default=None)
            beyond = None if last is None else key.ranges.beyond(last + 1)
            if beyond is not None:
                raise OptionError(
                    f"layers {key.text!r} names layer {beyond}, but {held[0][0]!r} has layers 0 to {last}"
                )
        if not any(key.matches(path) for path in known):
            named = [path or "one in the model itself, which layers cannot name" for path in paths[:3]]
            shown = ", ".join(named) + (", ..." if len(paths) > 3 else "") if paths else "none"
            raise OptionError(
                f"layers {key.text!r} names no 3D attention of the model, which has {shown}. Blocks that are compiled "
                "on their own (compile_repeated_blocks) do not know their number: call fpscompile.attach(model) first"
            )


def siblings(path: str, names: Sequence[str]) -> list[str]:
    """The modules at the same place in other blocks: "blocks.0.attn1" -> that of every block.

    Args:
        names: of all the model's weights.
    """
    block = block_of(path)
    if block is None:
        return [path]
    inside = path[len(f"{block[0]}.{block[1]}") :]
    pattern = re.compile(rf"(.+?\.\d+){re.escape(inside)}\.")
    found = {f"{match[1]}{inside}" for name in names if (match := pattern.match(name))}
    return sorted(found | {path})


def _adorned(schedule: Schedule, granularity: str | None, heads: HeadWindows) -> Schedule:
    phases = schedule.phases
    if granularity is not None:
        phases = tuple(dataclasses.replace(phase, granularity=granularity) for phase in phases)
    if heads:
        phases = tuple(_with_heads(phase, heads) for phase in phases)
    return dataclasses.replace(schedule, phases=phases)


def _with_heads(phase: Phase, heads: HeadWindows) -> Phase:
    rest = Sliding(density=phase.density) if phase.window is None else pattern_of(phase.window)
    if any(isinstance(part, Heads) for part in (rest, *rest.parts)):
        raise OptionError(f"heads is given and window {rest.text!r} differs by head as well: give one of them")
    if phase.density == 1.0:
        rest = Dense()
    pattern: Pattern = Heads(heads, rest)
    if is_open(pattern):
        if phase.density is None:
            raise OptionError(f"heads: {pattern.text!r} needs a density; write it into the window of the head")
        pattern = with_density(pattern, phase.density)
    return dataclasses.replace(phase, window=pattern, density=None)


def _refined(schedule: Schedule, bounds: Sequence[float]) -> Schedule:
    """The same schedule, its ranges cut at ``bounds`` as well."""
    edges = [0.0, *bounds, 1.0]
    phases = tuple(
        dataclasses.replace(schedule.phases[schedule.phase_at(start)], start=start, end=end)
        for start, end in itertools.pairwise(edges)
    )
    return schedule if phases == schedule.phases else dataclasses.replace(schedule, phases=phases)


def _ends(path: str, name: str) -> bool:
    """Whether ``path`` is ``name``, or ends in it at a dot; a function around a model has its own name for it."""
    return any(fnmatch.fnmatchcase(path, pattern) for pattern in (name, f"*.{name}"))


def _inside(path: str, name: str) -> bool:
    """Whether ``path`` is the module ``name``, or inside of it."""
    parts = path.split(".")
    return any(_ends(".".join(parts[:stop]), name) for stop in range(1, len(parts) + 1))
