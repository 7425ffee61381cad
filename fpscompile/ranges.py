"""Lists of indices as people write them: "5", "0-1", "0-3,8,30-" (to the end)."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from fpscompile.errors import OptionError

_PART = re.compile(r"(\d+)(?:(-)(\d*))?")


@dataclass(frozen=True)
class Ranges:
    """Inclusive ranges of indices, in the order written; the last may be open."""

    text: str
    """Canonical spelling, without spaces."""
    parts: tuple[tuple[int, int | None], ...]
    """(first, last); None means to the end."""

    @classmethod
    def parse(cls, value: object, where: str) -> Ranges:
        """From "0-3,8", or from one int.

        Raises:
            OptionError: anything else, a range that runs backwards, or an index written twice. ``where`` opens the
                message.
        """
        text = str(value).replace(" ", "") if isinstance(value, (str, int)) and not isinstance(value, bool) else ""
        parts: list[tuple[int, int | None]] = []
        for piece in text.split(","):
            match = _PART.fullmatch(piece)
            if match is None:
                raise OptionError(f'{where} {value!r} is no list of indices: write "5", "0-3", "0-3,8" or "30-"')
            first = int(match[1])
            last = first if match[2] is None else int(match[3]) if match[3] else None
            if last is not None and last < first:
                raise OptionError(f"{where} {value!r} runs backwards: write the smaller index first")
            if any(_meet((first, last), other) for other in parts):
                raise OptionError(f"{where} {value!r} names an index twice")
            parts.append((first, last))
        return cls(text, tuple(parts))

    @classmethod
    def of(cls, indices: Iterable[int]) -> Ranges:
        """The shortest spelling of indices, ascending: "0-2,5"."""
        parts: list[tuple[int, int | None]] = []
        for index in sorted(set(indices)):
            if parts and parts[-1][1] == index - 1:
                parts[-1] = (parts[-1][0], index)
            else:
                parts.append((index, index))
        return cls(",".join(str(a) if a == b else f"{a}-{b}" for a, b in parts), tuple(parts))

    def __contains__(self, index: int) -> bool:
        return any(first <= index and (last is None or index <= last) for first, last in self.parts)

    def meets(self, other: Ranges) -> bool:
        """Whether some index is in both."""
        return any(_meet(a, b) for a in self.parts for b in other.parts)

    def beyond(self, count: int) -> int | None:
        """The first index written that is not below ``count``; None when all exist."""
        written = [index for part in self.parts for index in part if index is not None]
        return next((index for index in written if index >= count), None)

    def members(self, count: int) -> list[int]:
        """Indices below ``count``, ascending."""
        return [index for index in range(count) if index in self]


def _meet(a: tuple[int, int | None], b: tuple[int, int | None]) -> bool:
    return (b[1] is None or a[0] <= b[1]) and (a[1] is None or b[0] <= a[1])
