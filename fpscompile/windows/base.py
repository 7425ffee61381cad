"""What every window family is: a frozen dataclass that says, on tiles, which key tiles each query tile sees.

A family works on the *video tiles* of a :class:`View`, ``N`` of them on both sides, in row-major (t, h, w) order.
Tokens outside the video see everything and are seen by everything, whatever the family.

Static families give a bool [N, N]. To let content choose, :class:`TileSets` says more: which tiles are seen in any
case, and how many more are taken, at run time, from which others.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from fpscompile.errors import WindowError
from fpscompile.masks import Window
from fpscompile.tiling import TileLayout


@dataclass(frozen=True)
class View:
    """What a family is evaluated on."""

    q_layout: TileLayout
    k_layout: TileLayout
    """Of the same video grid and tile as the query's; the tokens around the video may differ."""
    heads: int | None = None
    """Query heads; needed by per-head families only."""
    clamp: bool = False
    """Whether a density below the floor becomes the floor, or an error."""

    @property
    def counts(self) -> Window:
        """Video tiles along (t, h, w)."""
        return self.q_layout.counts

    @property
    def tiles(self) -> int:
        """N, the number of video tiles."""
        return self.q_layout.video_tiles

    @property
    def others(self) -> int:
        """Query-key pairs with a token outside the video: always kept."""
        return self.q_layout.length * self.k_layout.length - self.q_layout.video * self.k_layout.video


@dataclass(frozen=True, eq=False)
class TileSets:
    """What each query tile sees. The leading axis has length 1 where all heads agree."""

    always: torch.Tensor
    """bool [1 | heads, N, N]: seen in any case."""
    eligible: torch.Tensor
    """bool [1 | heads, N, N]: what content may choose from; tiles seen in any case do not count twice."""
    extra: torch.Tensor
    """int64 [1 | heads]: how many eligible tiles are added to each query tile's own; 0 for static families."""

    @classmethod
    def static(cls, seen: torch.Tensor) -> TileSets:
        """From bool [N, N]."""
        return cls(seen[None], seen[None], torch.zeros(1, dtype=torch.int64))


@dataclass(frozen=True)
class Pattern:
    """Base of all families. A subclass sets ``family`` and implements :meth:`seen`, or :meth:`sets` itself."""

    family: ClassVar[str] = ""
    """Its name in options and in JSON."""

    def seen(self, view: View) -> torch.Tensor:
        """bool [N, N]: the key tiles (columns) that each query tile (rows) sees.

        Raises:
            WindowError: the family cannot be had on this grid.
        """
        raise NotImplementedError(type(self).__name__)

    def sets(self, view: View) -> TileSets:
        """The same for any family, those with a content-chosen part included."""
        return TileSets.static(self.seen(view))

    def product(self, view: View) -> Window | None:
        """The sliding 3D window that is the same on this grid; None when the family is no product of three axes."""
        return None

    @property
    def parts(self) -> tuple[Pattern, ...]:
        """Patterns that this one is made of."""
        return ()

    def rebuilt(self, parts: tuple[Pattern, ...]) -> Pattern:
        """The same with other :attr:`parts`."""
        return self

    @property
    def open(self) -> bool:
        """Whether it still needs a density from the phase."""
        return False

    def filled(self, density: float) -> Pattern:
        """An open pattern with its density."""
        return self

    def spec(self) -> dict[str, Any]:
        """Plain data for JSON: the family's name and the fields that are not their defaults."""
        fields = {
            field.name: list(value) if isinstance(value := getattr(self, field.name), tuple) else value
            for field in dataclasses.fields(self)
            if getattr(self, field.name) != field.default
        }
        return {"family": self.family, **fields}

    @property
    def text(self) -> str:
        """Short words for tables."""
        values = [value for key, value in self.spec().items() if key != "family"]
        words = ["x".join(map(str, value)) if isinstance(value, list) else f"{value:g}" for value in values]
        return " ".join([self.family, ", ".join(words)]).strip()

    def __or__(self, other: Pattern) -> Pattern:
        from fpscompile.windows.combine import Union

        return Union((self, other))

    def __and__(self, other: Pattern) -> Pattern:
        from fpscompile.windows.combine import Intersection

        return Intersection((self, other))


def walk(pattern: Pattern) -> Iterator[Pattern]:
    """``pattern`` and everything in it."""
    yield pattern
    for part in pattern.parts:
        yield from walk(part)


def with_density(pattern: Pattern, density: float) -> Pattern:
    """``pattern`` with every open part filled in."""
    if pattern.open:
        return pattern.filled(density)
    return pattern.rebuilt(tuple(with_density(part, density) for part in pattern.parts))


@functools.lru_cache(maxsize=16)  # a mask per head of a long video takes tens of megabytes
def tile_sets(pattern: Pattern, view: View) -> TileSets:
    """``pattern.sets(view)``, kept for the next reader; never written to.

    Raises:
        WindowError: the grid cannot give the pattern, or some query tile would see nothing at all.
    """
    sets = pattern.sets(view)
    reached = (sets.always | (sets.eligible & (sets.extra > 0)[:, None, None])).any(-1)
    if view.k_layout.length == view.k_layout.video and not reached.all():
        blind = int((~reached).nonzero()[0, 1])
        raise WindowError(
            f"window {pattern.text!r} leaves query tile {blind} of grid {view.q_layout.grid} with tile "
            f"{view.q_layout.tile} without any key: unite it with one that sees something"
        )
    return sets
