"""Read the grid off the values of a rotary table, when tokens arrive packed and nothing else shows it.

Every column of a 3-D rotary table turns with one coordinate: the frame, the row or the column of its token. In
row-major order a column that turns with w repeats every W rows, one that turns with h is constant for W rows and
repeats every H*W, one that turns with t is constant for H*W. That proves the grid:

1. H > 1, W > 1, T > 1, and T*H*W is the number of rows.
2. Every column depends on exactly one of the three coordinates; columns that do not vary are ignored, since rounding
   (to bfloat16, say) makes slow frequencies constant.
3. Each coordinate has columns, and all its values are told apart by them. The first columns of t, h and w come in
   this order, as in every known model: tokens in another order than (t, h, w) give themselves away here.
4. No other (T, H, W) fits.

Tables in tile order, of several videos in a row, with text among the rows, or with columns that mix coordinates fail
one of these and give None.
"""

from __future__ import annotations

import itertools

import torch

from fpscompile.errors import GridError
from fpscompile.kept import refuse_capture

Grid = tuple[int, int, int]

COLUMNS = 96
"""Columns looked at; tables of thousands of columns are thinned evenly."""
TOLERANCE = 1e-4
"""Values of columns are in [-1, 1]; an equal angle may be rounded differently in different rows by a few ulp."""

SAMPLE = 4096


def read_grid(table: torch.Tensor) -> Grid | None:
    """(T, H, W) of a table [tokens, columns] of floats, or None when its values do not prove one."""
    rows = table.shape[0]
    if rows < 8 or table.shape[1] < 3:
        return None
    table = _varying(_thin(table))
    if table.shape[1] < 3:
        return None
    found = [grid for grid in _candidates(table) if _confirmed(table, grid, 64) and fits(table, grid)]
    return found[0] if len(found) == 1 else None


def _thin(table: torch.Tensor) -> torch.Tensor:
    """At most :data:`COLUMNS` columns: runs of twelve, evenly spread, so that interleaved axes all show in order."""
    if table.shape[1] > COLUMNS:
        starts = torch.linspace(0, table.shape[1] - 12, COLUMNS // 12).long()
        table = table[:, (starts[:, None] + torch.arange(12)).flatten().to(table.device)]
    return table.float().contiguous()


def _varying(table: torch.Tensor) -> torch.Tensor:
    return table[:, (table.amax(0) - table.amin(0)) > TOLERANCE]


def _candidates(table: torch.Tensor) -> list[Grid]:
    """Grids whose strides are rows at which some column first changes: 1 for w, W for h, H*W for t."""
    rows = table.shape[0]
    changed = (table - table[0]).abs() > TOLERANCE
    first = sorted({int(row) for row in changed.to(torch.uint8).argmax(0)})
    strides = [row for row in first if row > 1 and rows % row == 0]
    return [
        (rows // frame, frame // line, line)
        for line, frame in itertools.combinations(strides, 2)
        if frame % line == 0 and rows > frame
    ]


def fits(table: torch.Tensor, grid: Grid) -> bool:
    """Whether every column of ``table`` [T*H*W, columns] depends on one coordinate, and all coordinates show."""
    t, h, w = grid
    if min(grid) < 2 or t * h * w != table.shape[0]:
        return False
    box = table.view(t, h, w, -1)
    of_t = (box - box[:, :1, :1]).abs().amax((0, 1, 2)) <= TOLERANCE
    of_h = (box - box[:1, :, :1]).abs().amax((0, 1, 2)) <= TOLERANCE
    of_w = (box - box[:1, :1, :]).abs().amax((0, 1, 2)) <= TOLERANCE
    if not bool((of_t.int() + of_h.int() + of_w.int() == 1).all()):
        return False
    if not _first(of_t) < _first(of_h) < _first(of_w):
        return False
    lines = (box[:, 0, 0][:, of_t], box[0, :, 0][:, of_h], box[0, 0, :][:, of_w])
    return all(_distinct(line) for line in lines)


EVIDENCE = 3
"""Columns that must turn with coordinates of another order before a grid that somebody named is doubted."""


def contradicts(table: torch.Tensor, dim: int, grid: Grid) -> bool:
    """Whether a table with tokens along ``dim`` shows them in another order than the rows of ``grid``.

    A column that turns with one coordinate has as few values as that axis has places, each equally often, in
    whatever order the tokens are. Where several such columns depend on no single axis of ``grid``, the tokens lie
    otherwise. Columns that mix coordinates, and those that rounding makes uneven, say nothing.
    """
    rows = _varying(rows_of(table, dim))
    if rows.shape[0] != grid[0] * grid[1] * grid[2] or rows.shape[1] < EVIDENCE:
        return False
    box = rows.view(*grid, -1)
    alike = [(box - box.narrow(a, 0, 1).narrow(b, 0, 1)).abs().amax((0, 1, 2)) for a, b in ((0, 1), (0, 2), (1, 2))]
    doubtful = rows[:, torch.stack(alike).amin(0) > TOLERANCE]
    found = 0
    for column in doubtful.T:
        found += 1 < _even_values(column) <= len(column) // 4
        if found == EVIDENCE:
            return True
    return False


def _even_values(column: torch.Tensor) -> int:
    """How many values a column has, if each occurs equally often; else 0."""
    ordered = column.sort().values
    steps = torch.nonzero(ordered.diff() > TOLERANCE).flatten() + 1
    count = len(steps) + 1
    each, rest = divmod(len(column), count)
    return count if rest == 0 and bool((steps == each * torch.arange(1, count)).all()) else 0


def _first(columns: torch.Tensor) -> int:
    """Index of the first True of bool [columns]; their number when there is none."""
    return int(columns.int().argmax()) if bool(columns.any()) else len(columns)


def _distinct(line: torch.Tensor) -> bool:
    """Whether no two rows of [places, columns] are equal."""
    if line.shape[1] == 0:
        return False
    order = torch.cdist(line, line, p=float("inf"), compute_mode="donot_use_mm_for_euclid_dist")
    order.fill_diagonal_(float("inf"))
    return bool(order.min() > TOLERANCE)


_LAST: dict[int, Grid] = {}
"""By number of rows, the grid read last: tried first. A guess that values must confirm, never an answer."""


def rows_of(table: torch.Tensor, dim: int) -> torch.Tensor:
    """A table with tokens along ``dim`` as [tokens, columns], real, on the CPU; leading batches are columns."""
    table = table.detach()
    if table.is_complex():
        table, dim = torch.view_as_real(table), dim % table.ndim
    table = table.movedim(dim, 0)
    return _thin(table.reshape(table.shape[0], -1)).cpu()


def grid_of_table(table: torch.Tensor, dim: int, start: int, count: int) -> Grid | None:
    """The grid that rows [start, start + count) of a table show, or None.

    The search is done once per size; after that a grid is confirmed on at most :data:`SAMPLE` rows.
    """
    rows = rows_of(table, dim)[start : start + count]
    last = _LAST.get(count)
    if last is not None and rows.shape[0] == count and _confirmed(_varying(rows), last, SAMPLE):
        return last
    grid = read_grid(rows)
    if grid is not None:
        if len(_LAST) > 256:
            _LAST.clear()
        _LAST[count] = grid
    return grid


def _confirmed(rows: torch.Tensor, grid: Grid, count: int) -> bool:
    """Whether ``count`` sampled rows equal the first rows of their t, their h or their w, one of them per column; and
    columns of t come first, then those of h."""
    t, h, w = grid
    if rows.shape[1] < 3:
        return False
    places = torch.linspace(0, t * h * w - 1, min(t * h * w, count)).long()
    sample = rows[places]
    alike = [
        (sample - rows[first]).abs().amax(0) <= TOLERANCE
        for first in (places // (h * w) * (h * w), places // w % h * w, places % w)
    ]
    if not bool((torch.stack(alike).sum(0) == 1).all()) or not all(bool(columns.any()) for columns in alike):
        return False
    of_t, of_h, of_w = map(_first, alike)
    return of_t < of_h < of_w


_library = torch.library.Library("fps", "FRAGMENT")
_library.define("rotary_grid(Tensor table, SymInt dim, SymInt start, SymInt count) -> Tensor")


def _rotary_grid(table: torch.Tensor, dim: int, start: int, count: int) -> torch.Tensor:
    """int64 [3] on the CPU: (T, H, W).

    Raises:
        GridError: the values of this call prove no grid.
        UnsupportedError: a CUDA graph is being captured.
    """
    refuse_capture(table.device, "the grid that a rotary table shows")
    grid = grid_of_table(table, dim, start, count)
    if grid is None:
        raise GridError(
            f"the rotary table {tuple(table.shape)} of this call does not show the (t, h, w) of its {count} video "
            "tokens, as it did when the model was compiled: publish the grid with fpscompile.attach(model, grid=...), "
            "or run this call uncompiled"
        )
    return torch.tensor(grid, dtype=torch.int64)


torch.library.impl("fps::rotary_grid", "CompositeExplicitAutograd", lib=_library)(_rotary_grid)


@torch.library.register_fake("fps::rotary_grid", lib=_library)
def _rotary_grid_fake(table: torch.Tensor, dim: int, start: int, count: int) -> torch.Tensor:
    return torch.empty(3, dtype=torch.int64, device="cpu")
