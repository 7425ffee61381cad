"""The grid is read off rotary tables that prove it, at any precision; off all others it is not."""

from __future__ import annotations

import pytest
import torch

import fpscompile.ops  # noqa: F401
from fpscompile.errors import GridError
from fpscompile.rotary_grid import grid_of_table, read_grid

Grid = tuple[int, int, int]
WAN = ((44, 42, 42), 1e4)
HUNYUAN = ((16, 56, 56), 256.0)
COGVIDEOX = ((16, 24, 24), 1e4)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def angles(grid: Grid, dims: tuple[int, int, int], theta: float) -> torch.Tensor:
    places = torch.cartesian_prod(*(torch.arange(size) for size in grid)).double()
    return torch.cat(
        [
            places[:, axis : axis + 1] * theta ** -(torch.arange(0, dim, 2).double() / dim)
            for axis, dim in enumerate(dims)
        ],
        dim=1,
    )


def table(grid: Grid, dims: tuple[int, int, int] = (8, 8, 8), theta: float = 1e4) -> torch.Tensor:
    turned = angles(grid, dims, theta)
    return torch.cat([turned.cos(), turned.sin()], dim=1).float()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("grid", "model"),
    [((21, 30, 52), WAN), ((13, 30, 45), COGVIDEOX), ((9, 33, 60), HUNYUAN), ((5, 9, 9), WAN), ((2, 3, 4), COGVIDEOX)],
)
def test_released_sizes(grid: Grid, model: tuple[tuple[int, int, int], float], dtype: torch.dtype) -> None:
    assert read_grid(table(grid, *model).to(dtype).float()) == grid


def test_wide_interleaved_columns_in_order() -> None:
    """Thousands of columns, axes in turn, some that never vary in front."""
    places = torch.cartesian_prod(*(torch.arange(size) for size in (5, 6, 7))).float()
    turned = (places[:, None, :] * 1e4 ** -(torch.arange(340) / 340)[:, None]).flatten(1)
    padded = torch.cat([torch.ones(210, 4), turned.cos().repeat_interleave(2, dim=1)], dim=1)
    assert read_grid(padded) == (5, 6, 7)


@pytest.mark.parametrize("layout", ["batch", "heads", "complex", "matrices"])
def test_layouts(layout: str) -> None:
    turned = angles((3, 4, 5), (8, 8, 8), 1e4).float()
    if layout == "batch":
        assert grid_of_table(turned.cos()[None].expand(2, -1, -1), 1, 0, 60) == (3, 4, 5)
    elif layout == "heads":
        assert grid_of_table(turned.cos().view(60, 2, 6).transpose(0, 1)[None], 2, 0, 60) == (3, 4, 5)
    elif layout == "complex":
        assert grid_of_table(torch.polar(torch.ones_like(turned), turned)[:, None], 0, 0, 60) == (3, 4, 5)
    else:
        pair = torch.stack([turned.cos(), -turned.sin(), turned.sin(), turned.cos()], dim=-1)
        assert grid_of_table(pair.view(60, 1, 12, 2, 2), 0, 0, 60) == (3, 4, 5)


def refused(kind: str, grid: Grid = (4, 6, 8)) -> torch.Tensor:
    t, h, w = grid
    good = table(grid)
    line = torch.arange(t * h * w)
    if kind == "tiles":
        return good[line.view(t, h // 2, 2, w // 2, 2).permute(0, 1, 3, 2, 4).flatten()]
    if kind == "tiles in time":
        return good[line.view(t // 2, 2, h // 2, 2, w // 4, 4).permute(0, 2, 4, 1, 3, 5).flatten()]
    if kind == "h-w-t":
        return good[line.view(grid).permute(1, 2, 0).flatten()]
    if kind == "t-w-h":
        return good[line.view(grid).permute(0, 2, 1).flatten()]
    if kind == "history in front":
        return torch.cat([good[: 2 * h * w], good])
    if kind == "coarse history in front":
        return torch.cat([table((1, h // 2, w // 2)), good])
    if kind == "text in front":
        return torch.cat([good[:1].expand(w, -1), good])
    if kind == "mixed columns":
        return good + good.roll(5, 1)
    if kind == "one frame":
        return table((1, h, w))
    if kind == "a line":
        turned = torch.arange(t * h * w)[:, None] * 1e4 ** -(torch.arange(12) / 12)
        return turned.cos()
    if kind == "no rotation in time":
        return torch.cat([good[:, 4:12], good[:, 16:]], dim=1)
    if kind == "shuffled":
        return good[torch.randperm(len(good))]
    return torch.randn(t * h * w, 24)


KINDS = [
    "tiles",
    "tiles in time",
    "h-w-t",
    "t-w-h",
    "history in front",
    "coarse history in front",
    "text in front",
    "mixed columns",
    "one frame",
    "a line",
    "no rotation in time",
    "shuffled",
    "random",
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_other_tables_are_refused(kind: str, dtype: torch.dtype) -> None:
    assert read_grid(refused(kind).to(dtype).float()) is None


def test_a_part_of_the_rows() -> None:
    joint = torch.cat([torch.arange(11.0)[:, None].expand(-1, 24).cos(), table((3, 4, 5))])
    assert grid_of_table(joint, 0, 11, 60) == (3, 4, 5)
    assert grid_of_table(joint, 0, 0, 71) is None


def test_the_last_grid_of_a_size_is_a_guess_that_values_must_confirm() -> None:
    for grid in ((3, 4, 5), (3, 5, 4), (3, 4, 5), (5, 4, 3)):
        assert grid_of_table(table(grid), 0, 0, 60) == grid
    assert grid_of_table(torch.randn(60, 24), 0, 0, 60) is None


def test_the_op_reads_at_run_time_and_refuses_with_a_remedy() -> None:
    assert torch.ops.fps.rotary_grid(table((3, 4, 5)), 0, 0, 60).tolist() == [3, 4, 5]
    with pytest.raises(GridError, match="attach"):
        torch.ops.fps.rotary_grid(torch.randn(60, 24), 0, 0, 60)
    torch.library.opcheck(torch.ops.fps.rotary_grid.default, (table((3, 4, 5)), 0, 0, 60))


@pytest.mark.parametrize("grid", [(4, 4, 4), (3, 4, 5)])
def test_the_grid_read_last_does_not_vouch_for_another_order(grid: Grid) -> None:
    """Tokens ordered h-w-t whose sizes are those of a table in order: the columns of t come first all the same."""
    assert grid_of_table(table(grid), 0, 0, grid[0] * grid[1] * grid[2]) == grid
    rows, columns = table(grid).shape
    half = columns // 2
    t, h, w = (slice(axis * half // 3, (axis + 1) * half // 3) for axis in range(3))
    turned = table(grid)[:, :half]
    shuffled = torch.cat([turned[:, w], turned[:, t], turned[:, h]], 1)
    assert grid_of_table(shuffled, 0, 0, rows) is None
