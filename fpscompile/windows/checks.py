"""Values that windows are made of, checked where they are written."""

from __future__ import annotations

import contextlib
import numbers
import operator
from collections.abc import Iterator, Sequence
from typing import Any

import torch

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


def integer(value: Any) -> int | None:
    """The plain int that a value is, such as an integer of numpy; None for floats, truth values and all else."""
    if isinstance(value, bool) or "bool" in str(getattr(value, "dtype", "")):
        return None
    try:
        return operator.index(value)
    except TypeError:
        return None


def real(value: Any) -> float | None:
    """The plain float that a number is, such as one of numpy; None for truth values and all else."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        return None
    try:
        return float(value)
    except OverflowError:
        return None


def sizes(value: Any, count: int) -> tuple[int, ...] | None:
    """``count`` integers >= 1 as plain ints; None for anything else. Tensors are none: reading one may wait for its
    device."""
    if hasattr(value, "tolist") and not isinstance(value, torch.Tensor):  # an array of numpy
        value = value.tolist()
    if not isinstance(value, Sequence) or isinstance(value, (str, bytes)) or len(value) != count:
        return None
    found = [integer(v) for v in value if not isinstance(v, torch.Tensor)]
    plain = tuple(v for v in found if v is not None and v >= 1)
    return plain if len(plain) == count else None


def tensor_given(name: str, value: Any) -> str | None:
    """What is wrong with a tensor in the place of a number, or of some of several; None for anything else."""
    if isinstance(value, torch.Tensor):
        remedy = "numbers (.tolist())" if value.dim() else "a number (.item())"
        return f"{name}={value!r} is a Tensor: pass {remedy}"
    if not isinstance(value, (tuple, list)):
        return None
    found = (tensor_given(f"{name}[{index}]", v) for index, v in enumerate(value))
    return next((message for message in found if message is not None), None)


def check_window(window: Any) -> tuple[int, int, int]:
    """``window`` as three ints >= 1, or ScheduleError."""
    found = sizes(window, 3)
    if found is None:
        wrong = f"window={window!r} must be three integers >= 1: key tiles along (t, h, w)"
        raise ScheduleError(tensor_given("window", window) or wrong)
    return (found[0], found[1], found[2])


def check_density(density: Any) -> float:
    """``density`` as a float in (0, 1], or ScheduleError."""
    value = real(density)
    if value is None or not 0.0 < value <= 1.0:
        wrong = f"density={density!r} must be a number in (0, 1]: the kept fraction of query-key pairs"
        raise ScheduleError(tensor_given("density", density) or wrong)
    return value


def check_pair(name: str, value: Any) -> tuple[int, int]:
    """``value`` as two ints >= 1, or WindowError."""
    found = sizes(value, 2)
    if found is None:
        wrong = f"{name}={value!r} must be two integers >= 1: tiles along (h, w)"
        raise WindowError(tensor_given(name, value) or wrong)
    return (found[0], found[1])


def check_count(name: str, value: Any) -> int:
    """``value`` as an int >= 1, or WindowError."""
    found = sizes((value,), 1)
    if found is None:
        raise WindowError(tensor_given(name, value) or f"{name}={value!r} must be an integer >= 1")
    return found[0]
