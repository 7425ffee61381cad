"""Windows as people and files write them, and back."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping, Sequence
from typing import Any

from fpscompile.errors import WindowError
from fpscompile.masks import Window
from fpscompile.windows.base import Pattern
from fpscompile.windows.checks import check_window
from fpscompile.windows.combine import Heads, Intersection, Union
from fpscompile.windows.families import (
    Dense,
    FirstFrame,
    Radial,
    Sliding,
    SpatialBand,
    TemporalBand,
    TextOnly,
    TopK,
)

AnyWindow = Window | Pattern
"""A sliding window of a given size is its three sizes; every other window is a pattern."""

FAMILIES: dict[str, type[Pattern]] = {
    family.family: family
    for family in (
        *(Dense, Sliding, SpatialBand, TemporalBand, Radial, FirstFrame, TextOnly, TopK),
        *(Union, Intersection, Heads),
    )
}
"""Name in options and in JSON -> class."""


def pattern_of(value: Any) -> Pattern:
    """A pattern from three sizes, a family's name, a dict with "family" and its fields, or a pattern.

    Raises:
        WindowError, ScheduleError: anything else; the message names the nearest known word.
    """
    if isinstance(value, Pattern):
        return value
    if isinstance(value, str):
        return _family(value, {})
    if isinstance(value, Mapping):
        fields = dict(value)
        name = fields.pop("family", None)
        if not isinstance(name, str):
            raise WindowError(f"window={value!r} names no family; choose one of {', '.join(FAMILIES)}")
        return _family(name, fields)
    return Sliding(check_window(value))


def window_of(value: Any) -> AnyWindow:
    """As :func:`pattern_of`, but a sliding window of a given size stays its three sizes."""
    if isinstance(value, Sequence) and not isinstance(value, str):
        return check_window(value)
    pattern = pattern_of(value)
    return pattern.size if isinstance(pattern, Sliding) and pattern.size is not None else pattern


def spec_of(window: AnyWindow) -> Any:
    """Plain data that :func:`window_of` reads back: a list of three ints, or a dict."""
    return window.spec() if isinstance(window, Pattern) else list(window)


def window_text(window: AnyWindow, times: str = "x") -> str:
    """Short words for tables: "2x3x3", "radial 4x6"."""
    return window.text if isinstance(window, Pattern) else times.join(map(str, window))


def _family(name: str, fields: dict[str, Any]) -> Pattern:
    if name not in FAMILIES:
        near = difflib.get_close_matches(name, FAMILIES, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else "."
        raise WindowError(
            f"window {name!r} is no family{hint} Give three integers (key tiles along t, h, w) or one of "
            f"{', '.join(FAMILIES)}"
        )
    family = FAMILIES[name]
    known = [field.name for field in dataclasses.fields(family)]
    for key in fields:
        if key not in known:
            words = f"its fields are {', '.join(known)}" if known else "it has none"
            raise WindowError(f"window family {name!r} has no field {key!r}; {words}")
    return family(**fields)
