"""Geometry of the boxes lowering: runs, boxes, columns, and a column's keys in one buffer.

Along each axis of the grid, neighbouring query tiles whose clamped windows coincide form a :class:`Run`. A product of
three runs is a *box* of queries that all see one box of keys. A :class:`Column` is all boxes along one axis with the
runs of the other two held fixed; a :class:`Batch` is those of its boxes that go into one call.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from fpscompile.masks import axis_window
from fpscompile.plan import ResolvedPlan
from fpscompile.tiling import TileLayout

Span = tuple[int, int]

BATCH_TOKENS = 4096
"""Queries per call up to which boxes are batched: beyond it, threads have enough to do."""


@dataclass(frozen=True)
class Run:
    """Neighbouring query tiles of one axis that see the same keys: half-open ranges of token coordinates."""

    queries: Span
    keys: Span


@dataclass(frozen=True)
class Column:
    """All boxes along ``axis`` for one pair of runs on the other two axes."""

    axis: int
    sides: tuple[Run, Run]
    """On the other two axes, in ascending order."""
    runs: tuple[Run, ...]
    """Along ``axis``; the key ranges start at 0, end at the axis's end, and move forward only."""

    @property
    def order(self) -> tuple[int, int, int]:
        """Axes of the grid, the column's first."""
        a, b = (axis for axis in range(3) if axis != self.axis)
        return (self.axis, a, b)

    @property
    def keys(self) -> tuple[Span, Span, Span]:
        """Key range along each axis of :attr:`order`."""
        return ((self.runs[0].keys[0], self.runs[-1].keys[1]), self.sides[0].keys, self.sides[1].keys)

    @property
    def slab(self) -> int:
        """Keys per step along ``axis``."""
        (a, b), (c, d) = self.sides[0].keys, self.sides[1].keys
        return (b - a) * (d - c)

    @property
    def face(self) -> int:
        """Queries per step along ``axis``."""
        (a, b), (c, d) = self.sides[0].queries, self.sides[1].queries
        return (b - a) * (d - c)

    def batches(self, single: bool) -> Iterator[Batch]:
        """The column's boxes in order, neighbours of one size and step together unless ``single``."""
        runs: list[Run] = []
        for run in self.runs:
            if runs and not self._extends(runs, run, single):
                yield Batch(self, tuple(runs))
                runs = []
            runs.append(run)
        yield Batch(self, tuple(runs))

    def _extends(self, runs: list[Run], run: Run, single: bool) -> bool:
        first, last = runs[0], runs[-1]
        size = run.queries[1] - run.queries[0]
        return (
            not single
            and (len(runs) + 1) * size * self.face <= BATCH_TOKENS
            and size == first.queries[1] - first.queries[0]
            and run.keys[1] - run.keys[0] == first.keys[1] - first.keys[0]
            and (len(runs) == 1 or run.keys[0] - last.keys[0] == runs[1].keys[0] - first.keys[0])
        )


@dataclass(frozen=True)
class Batch:
    """Boxes of one size, a constant step apart along their column: one call."""

    column: Column
    runs: tuple[Run, ...]

    @property
    def queries(self) -> tuple[Span, Span, Span]:
        """Query range of all the boxes along each axis of the column's order."""
        a, b = self.column.sides
        return ((self.runs[0].queries[0], self.runs[-1].queries[1]), a.queries, b.queries)

    @property
    def step(self) -> int:
        """Key coordinates from one box to the next."""
        return self.runs[1].keys[0] - self.runs[0].keys[0] if len(self.runs) > 1 else 0

    def take(self, video: torch.Tensor) -> torch.Tensor:
        """Copy [boxes, B * H, n, D] of the boxes' queries from ``video`` [B, H, T, H, W, D]."""
        tokens = _box(video, self.column, self.queries).flatten(2, 4).flatten(0, 1).contiguous()
        return tokens.unflatten(1, (len(self.runs), -1)).transpose(0, 1)

    def put(self, video: torch.Tensor, x: torch.Tensor) -> None:
        """The inverse of :meth:`take`, into ``video``."""
        target = _box(video, self.column, self.queries)
        target.copy_(x.transpose(0, 1).flatten(1, 2).unflatten(0, video.shape[:2]).unflatten(2, target.shape[2:5]))


def axis_runs(layout: TileLayout, axis: int, width: int) -> tuple[Run, ...]:
    """Runs of one axis of ``layout`` for a window of ``width`` tiles."""
    tile, size = layout.tile[axis], layout.grid[axis]
    runs = []
    for (start, stop), group in itertools.groupby(
        enumerate(axis_window(width, layout.counts[axis])), key=lambda item: item[1]
    ):
        tiles = [index for index, _ in group]
        runs.append(Run((tiles[0] * tile, min((tiles[-1] + 1) * tile, size)), (start * tile, min(stop * tile, size))))
    return tuple(runs)


@functools.lru_cache(maxsize=512)
def columns(resolved: ResolvedPlan, phase: int) -> tuple[Column, ...]:
    """The columns of one phase, along the axis that makes them copy the fewest keys."""
    layout = resolved.q_layout
    runs = [axis_runs(layout, axis, width) for axis, width in enumerate(resolved.product_window(phase))]
    copied = [sum(run.keys[1] - run.keys[0] for run in of_axis) for of_axis in runs]
    axis = min(range(3), key=lambda axis: layout.grid[axis] * copied[axis - 2] * copied[axis - 1])
    a, b = (other for other in range(3) if other != axis)
    return tuple(Column(axis, sides, runs[axis]) for sides in itertools.product(runs[a], runs[b]))


class KeyColumn:
    """One column's slice of a tensor [B, H, Lk, D] in a buffer that is reused for the next column.

    The buffer is [B, H, others + column keys, D]: a box's keys, the tokens outside the video first, are one slice.
    """

    def __init__(self, source: torch.Tensor, layout: TileLayout) -> None:
        self.source, self.video = source, video_view(source, layout)
        self.others = layout.before + layout.after
        self.other_rows = other_rows(layout)
        self.buffer = source.new_empty(0)

    def load(self, column: Column) -> None:
        """Copy the column's keys."""
        self._reserve(column)
        self.region.copy_(_box(self.video, column, column.keys))

    def boxes(self, batch: Batch) -> torch.Tensor:
        """View [boxes, B * H, n, D]: the keys of each box; boxes overlap. Call in order: it overwrites keys behind."""
        start, stop = (self.column.slab * coordinate for coordinate in batch.runs[0].keys)
        filled = start
        for rows in self.other_rows:
            others = self.source[:, :, rows]
            self.buffer[:, :, filled : filled + others.shape[2]].copy_(others)
            filled += others.shape[2]
        batch_size, heads, rows_held, width = self.buffer.shape
        return self.buffer.as_strided(
            (len(batch.runs), batch_size * heads, stop - start + self.others, width),
            (batch.step * self.column.slab * width, rows_held * width, width, 1),
            start * width,
        )

    def clear(self, column: Column) -> None:
        """Begin to add gradients up for a column."""
        self._reserve(column)
        self.region.zero_()

    def add(self, batch: Batch, grads: torch.Tensor) -> None:
        """Add the boxes' gradients [boxes, B * H, n, D], the tokens outside the video first."""
        for run, grad in zip(batch.runs, grads.unflatten(1, self.source.shape[:2]), strict=True):
            start, stop = (self.column.slab * coordinate + self.others for coordinate in run.keys)
            self.buffer[:, :, start:stop].add_(grad[:, :, self.others :])
            filled = 0
            for rows in self.other_rows:
                others = self.source[:, :, rows]
                others.add_(grad[:, :, filled : filled + others.shape[2]])
                filled += others.shape[2]

    def store(self) -> None:
        """Add the column's sum to the tensor."""
        _box(self.video, self.column, self.column.keys).add_(self.region)

    def _reserve(self, column: Column) -> None:
        batch, heads, _, width = self.source.shape
        sizes = [stop - start for start, stop in column.keys]
        rows = self.others + sizes[0] * sizes[1] * sizes[2]
        if self.buffer.dim() == 1 or self.buffer.shape[2] < rows:
            self.buffer = self.source.new_empty(batch, heads, rows, width)
        self.column = column
        self.region = self.buffer[:, :, self.others : rows].unflatten(2, sizes)


def other_rows(layout: TileLayout) -> list[slice]:
    """The tokens outside the video: none, one or two slices of the sequence."""
    ends = (slice(0, layout.before), slice(layout.before + layout.video, layout.length))
    return [rows for rows in ends if rows.stop > rows.start]


def video_view(x: torch.Tensor, layout: TileLayout) -> torch.Tensor:
    """View [B, H, T, H, W, D] of the video's tokens in [B, H, L, D]."""
    return x[:, :, layout.before : layout.before + layout.video].unflatten(2, layout.grid)


def _box(video: torch.Tensor, column: Column, box: tuple[Span, Span, Span]) -> torch.Tensor:
    """View [B, H, n, n, n, D] of one box, axes in the column's order."""
    for axis, (start, stop) in zip(column.order, box, strict=True):
        video = video.narrow(2 + axis, start, stop - start)
    return video.permute(0, 1, *(2 + axis for axis in column.order), 5)


__all__ = ["BATCH_TOKENS", "Batch", "Column", "KeyColumn", "Run", "axis_runs", "columns", "other_rows", "video_view"]
