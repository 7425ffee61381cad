"""Values that windows are made of, checked where they are written."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

from fpscompile.errors import OptionError, ScheduleError, WindowError


@contextlib.contextmanager
def located(place: str) -> Iterator[None]:
    """Errors of what is written inside another option begin with its place, unless they do already."""
    try:
        yield
    except OptionError as error:
        if str(error).startswith(place):
            raise
        raise type(error)(f"{place}: {error}") from None


def check_window(window: Any) -> tuple[int, int, int]:
    """``window`` as three ints >= 1, or ScheduleError."""
    if not _integers(window, 3):
        raise ScheduleError(f"window={window!r} must be three integers >= 1: key tiles along (t, h, w)")
    return (window[0], window[1], window[2])


def check_density(density: Any) -> float:
    """``density`` as a float in (0, 1], or ScheduleError."""
    if isinstance(density, bool) or not isinstance(density, (int, float)) or not 0.0 < density <= 1.0:
        raise ScheduleError(f"density={density!r} must be in (0, 1]: the kept fraction of query-key pairs")
    return float(density)


def check_pair(name: str, value: Any) -> tuple[int, int]:
    """``value`` as two ints >= 1, or WindowError."""
    if not _integers(value, 2):
        raise WindowError(f"{name}={value!r} must be two integers >= 1: tiles along (h, w)")
    return (value[0], value[1])


def check_count(name: str, value: Any) -> None:
    """WindowError unless ``value`` is an int >= 1."""
    if not _integers((value,), 1):
        raise WindowError(f"{name}={value!r} must be an integer >= 1")


def _integers(value: Any, count: int) -> bool:
    return (
        isinstance(value, Sequence)
        and not isinstance(value, str)
        and len(value) == count
        and all(isinstance(v, int) and not isinstance(v, bool) and v >= 1 for v in value)
    )
