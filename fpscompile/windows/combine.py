"""Families made of families: unions, intersections, and one window per head."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch

from fpscompile.errors import OptionError, WindowError
from fpscompile.masks import Window
from fpscompile.ranges import Ranges
from fpscompile.windows.base import Pattern, TileSets, View, walk
from fpscompile.windows.checks import located
from fpscompile.windows.families import Dense, TopK


@dataclass(frozen=True)
class _Several(Pattern):
    """Two or more patterns of one query tile; at most one of them chooses by content."""

    sign: ClassVar[str] = ""
    of: tuple[Pattern, ...] = ()

    def __post_init__(self) -> None:
        given: Any = self.of
        if not isinstance(given, Sequence) or isinstance(given, str) or len(given) < 2:
            raise WindowError(
                f"a window of family {self.family!r} needs a list 'of' two or more windows, got {given!r}"
            )
        parts = tuple(_pattern(part) for part in given)
        if sum(any(isinstance(inner, TopK) for inner in walk(part)) for part in parts) > 1:
            raise WindowError(
                f"a window of family {self.family!r} holds several top-k: one choice by content per head is possible; "
                "give it the sum of the densities"
            )
        object.__setattr__(self, "of", parts)

    @property
    def parts(self) -> tuple[Pattern, ...]:
        return self.of

    def rebuilt(self, parts: tuple[Pattern, ...]) -> Pattern:
        return type(self)(parts)

    def spec(self) -> dict[str, Any]:
        return {"family": self.family, "of": [part.spec() for part in self.of]}

    @property
    def text(self) -> str:
        return f"({f' {self.sign} '.join(part.text for part in self.of)})"


@dataclass(frozen=True)
class Union(_Several):
    """What any part sees. A top-k in it chooses among the tiles that the other parts do not see: static plus top-k."""

    family: ClassVar[str] = "union"
    sign: ClassVar[str] = "|"

    def sets(self, view: View) -> TileSets:
        return functools.reduce(
            lambda a, b: TileSets(a.always | b.always, a.eligible | b.eligible, a.extra + b.extra),
            (part.sets(view) for part in self.of),
        )


@dataclass(frozen=True)
class Intersection(_Several):
    """What all parts see. A top-k in it chooses among the tiles that the other parts see."""

    family: ClassVar[str] = "intersection"
    sign: ClassVar[str] = "&"

    def sets(self, view: View) -> TileSets:
        return functools.reduce(
            lambda a, b: TileSets(a.always & b.always, a.eligible & b.eligible, a.extra + b.extra),
            (part.sets(view) for part in self.of),
        )


@dataclass(frozen=True)
class Heads(Pattern):
    """A window per head: a mapping of head ranges such as "0-3" or "4,6-" to windows, and ``rest`` for the others.

    Query heads are meant where keys have fewer.
    """

    family: ClassVar[str] = "heads"
    of: tuple[tuple[Ranges, Pattern], ...] = ()
    rest: Pattern = field(default_factory=Dense)

    def __post_init__(self) -> None:
        given: Any = self.of
        pairs = given.items() if isinstance(given, Mapping) else given
        if not isinstance(given, (Mapping, tuple)) or not pairs:
            raise WindowError(f'a window of family "heads" needs a dict of head ranges to windows, got {given!r}')
        if not all(isinstance(pair, tuple) and len(pair) == 2 for pair in pairs):
            raise WindowError(f'a window of family "heads" needs a dict of head ranges to windows, got {given!r}')
        named: list[tuple[Ranges, Pattern]] = []
        for key, value in pairs:
            ranges = key if isinstance(key, Ranges) else Ranges.parse(key, "heads")
            twice = next((other.text for other, _ in named if other.meets(ranges)), None)
            if twice is not None:
                raise OptionError(f"heads {twice!r} and {ranges.text!r} name the same head")
            with located(f"heads[{ranges.text!r}]"):
                named.append((ranges, _pattern(value)))
        object.__setattr__(self, "of", tuple(named))
        object.__setattr__(self, "rest", _pattern(self.rest))
        if any(isinstance(inner, Heads) for part in self.parts for inner in walk(part)):
            raise WindowError('a window of family "heads" holds another one')

    @property
    def parts(self) -> tuple[Pattern, ...]:
        return (*(pattern for _, pattern in self.of), self.rest)

    def rebuilt(self, parts: tuple[Pattern, ...]) -> Pattern:
        return Heads(tuple((ranges, part) for (ranges, _), part in zip(self.of, parts, strict=False)), parts[-1])

    def of_head(self, head: int) -> Pattern:
        """The window of one head."""
        return next((pattern for ranges, pattern in self.of if head in ranges), self.rest)

    def part(self, first: int, count: int) -> Pattern:
        """The same for ``count`` heads from ``first`` on, as heads 0 to ``count - 1``: those that one rank has."""
        heads: dict[Pattern, list[int]] = {}
        for head in range(count):
            heads.setdefault(self.of_head(first + head), []).append(head)
        *others, (rest, _) = sorted(heads.items(), key=lambda item: len(item[1]))
        return Heads(tuple((Ranges.of(own), pattern) for pattern, own in others), rest) if others else rest

    def check(self, heads: int) -> None:
        """Raises OptionError when a range names a head that does not exist."""
        for ranges, _ in self.of:
            beyond = ranges.beyond(heads)
            if beyond is not None:
                raise OptionError(
                    f"heads {ranges.text!r} names head {beyond}, but the site has {heads} heads, 0 to {heads - 1}"
                )

    def sets(self, view: View) -> TileSets:
        if view.heads is None:
            raise WindowError(f"window {self.text!r} differs by head: the number of heads is needed")
        self.check(view.heads)
        each = {pattern: pattern.sets(view) for pattern in {self.of_head(head) for head in range(view.heads)}}
        all_heads = [each[self.of_head(head)] for head in range(view.heads)]
        return TileSets(*(torch.cat([getattr(s, name) for s in all_heads]) for name in ("always", "eligible", "extra")))

    def product(self, view: View) -> Window | None:
        """Where every head has the same product window."""
        if view.heads is None:
            return None
        self.check(view.heads)
        windows = {self.of_head(head).product(view) for head in range(view.heads)}
        return windows.pop() if len(windows) == 1 else None

    def spec(self) -> dict[str, Any]:
        named = {ranges.text: pattern.spec() for ranges, pattern in self.of}
        return {"family": self.family, "of": named, "rest": self.rest.spec()}

    @property
    def text(self) -> str:
        named = [f"heads {ranges.text}: {pattern.text}" for ranges, pattern in self.of]
        return "; ".join([*named, f"else {self.rest.text}"])


def _pattern(value: Any) -> Pattern:
    from fpscompile.windows.spec import pattern_of

    return pattern_of(value)
