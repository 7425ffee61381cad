"""The tuning file as text: one JSON object, readable, with a schema version.

::

    {
      "format": "fpscompile-tuning",
      "version": 1,
      "sites": {"<key of a signature>": {"signature": {...}, "lowering": ..., "config": {...}, ...}},
      "calibrations": {"<key of a model and grid>": {"model": ..., "grid": ..., "sites": {...}, ...}}
    }

Entries stay plain dicts here: one that this version cannot use is passed over where it is looked up, and is still
there after the file was merged and written again. So are keys that this version does not know.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from fpscompile.errors import FpsError

FORMAT = "fpscompile-tuning"
VERSION = 1
"""Raised when a reader of the version before would misunderstand a file."""

WIDTH = 118

EFFORTS = ("quick", "full")


class CorruptError(FpsError):
    """The text is not a tuning file."""


class ForeignVersionError(FpsError):
    """A tuning file of a version that this release does not read."""


@dataclass(frozen=True)
class Contents:
    """Everything that a file holds."""

    sites: Mapping[str, dict[str, Any]] = field(default_factory=dict)
    """Key of a signature to its tuned entry."""
    calibrations: Mapping[str, dict[str, Any]] = field(default_factory=dict)
    """Key of a model and grid to its calibration."""
    other: Mapping[str, Any] = field(default_factory=dict)
    """Top-level keys that this version does not know."""

    def merged(self, news: Contents) -> Contents:
        """Both, entry by entry; of two under one key the better measured, then the later one (see :func:`better`)."""
        sites = dict(self.sites)
        for key, entry in news.sites.items():
            if key not in sites or better(entry, sites[key]):
                sites[key] = entry
        calibrations = dict(self.calibrations)
        for key, entry in news.calibrations.items():
            if key not in calibrations or _date(entry) >= _date(calibrations[key]):
                calibrations[key] = entry
        return Contents(sites, calibrations, {**self.other, **news.other})


def better(new: Mapping[str, Any], old: Mapping[str, Any]) -> bool:
    """Whether ``new`` replaces ``old`` under the same key.

    Under the same versions a quick search never replaces a full one; otherwise the later one counts.
    """
    if new.get("versions") == old.get("versions") and _effort(new) != _effort(old):
        return _effort(new) > _effort(old)
    return _date(new) >= _date(old)


def _effort(entry: Mapping[str, Any]) -> int:
    effort = entry.get("effort")
    return EFFORTS.index(effort) if effort in EFFORTS else -1


def _date(entry: Mapping[str, Any]) -> str:
    return str(entry.get("measured", ""))


def parse(text: str) -> Contents:
    """The contents of a file.

    Raises:
        CorruptError: no JSON, cut off, or JSON of something else; the message says what and where.
        ForeignVersionError: another version of the format.
    """
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CorruptError(f"it is not whole JSON ({error})") from error
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise CorruptError(f'it has no "format": "{FORMAT}"')
    version = data.get("version")
    if isinstance(version, bool) or not isinstance(version, int):
        raise CorruptError(f"its version {version!r} is no integer")
    if version != VERSION:
        raise ForeignVersionError(f"it has version {version} of the format, and this release reads version {VERSION}")
    parts = {}
    for name in ("sites", "calibrations"):
        part = data.get(name, {})
        if not isinstance(part, dict) or not all(isinstance(entry, dict) for entry in part.values()):
            raise CorruptError(f"{name!r} is not an object of objects")
        parts[name] = part
    other = {key: value for key, value in data.items() if key not in ("format", "version", *parts)}
    return Contents(parts["sites"], parts["calibrations"], other)


def dumps(contents: Contents) -> str:
    """The text of a file: sorted keys, whatever fits on a line on one line; no character that UTF-8 has not."""
    data = {
        "format": FORMAT,
        "version": VERSION,
        "sites": dict(sorted(contents.sites.items())),
        "calibrations": dict(sorted(contents.calibrations.items())),
        **contents.other,
    }
    return re.sub("[\ud800-\udfff]", lambda half: f"\\u{ord(half[0]):04x}", _pretty(data, 0, top=True)) + "\n"


def _pretty(value: Any, depth: int, top: bool = False) -> str:
    line = json.dumps(value, ensure_ascii=False)
    if not isinstance(value, (dict, list)) or not value or (not top and len(line) + 2 * depth <= WIDTH):
        return line
    inner, outer = "  " * (depth + 1), "  " * depth
    if isinstance(value, dict):
        rows = [
            f"{json.dumps(str(key), ensure_ascii=False)}: {_pretty(item, depth + 1)}" for key, item in value.items()
        ]
        return "{\n" + ",\n".join(inner + row for row in rows) + f"\n{outer}}}"
    return "[\n" + ",\n".join(inner + _pretty(item, depth + 1) for item in value) + f"\n{outer}]"
