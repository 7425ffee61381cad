"""Mistakes that a user can make, one class each; those of a single feature stand beside it, such as
:class:`fpscompile.calibrate.CalibrationError`. A message names the value, the place and the remedy."""

from __future__ import annotations


class FpsError(Exception):
    """Base of all errors that fpscompile raises on purpose."""


class OptionError(FpsError, ValueError):
    """An option is unknown, has a bad value, or contradicts another option."""


class ScheduleError(OptionError):
    """The ranges of a schedule overlap, leave a gap, or run backwards."""


class WindowError(OptionError):
    """A window or a density that the tile grid at hand cannot give."""


class GridError(FpsError, ValueError):
    """A grid that does not fit the tokens of a site, or no grid where one is needed."""


class StrictError(FpsError):
    """``strict=True`` and at least one requested site was not rewritten."""


class CompilerMissingError(FpsError):
    """The inner compiler needs a C++ compiler and the machine has none."""


class ConcurrentCallError(FpsError, RuntimeError):
    """Two calls of one attached model overlap: its step and grid would be mixed up."""


class UnsupportedError(FpsError, NotImplementedError):
    """A combination that the op or a lowering does not implement, refused by name."""
