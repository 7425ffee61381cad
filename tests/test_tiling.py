"""Tile layouts against a token-by-token definition."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fpscompile.errors import GridError, OptionError
from fpscompile.tiling import TileLayout

layouts = st.builds(
    TileLayout,
    grid=st.tuples(*[st.integers(1, 6)] * 3),
    tile=st.tuples(*[st.integers(1, 4)] * 3),
    before=st.integers(0, 9),
    after=st.integers(0, 9),
)


def brute_tiles(layout: TileLayout) -> list[list[int]]:
    """Tokens of every tile, by the words of the module's docstring."""
    volume = layout.tile[0] * layout.tile[1] * layout.tile[2]
    _, height, width = layout.grid

    def runs(first: int, count: int) -> list[list[int]]:
        return [list(range(first + s, first + min(s + volume, count))) for s in range(0, count, volume)]

    corners = itertools.product(*(range(0, size, step) for size, step in zip(layout.grid, layout.tile, strict=True)))
    boxes = [
        itertools.product(*(range(c, min(c + s, n)) for c, s, n in zip(corner, layout.tile, layout.grid, strict=True)))
        for corner in corners
    ]
    video = [[layout.before + (t * height + h) * width + w for t, h, w in box] for box in boxes]
    return runs(0, layout.before) + video + runs(layout.before + layout.video, layout.after)


@settings(max_examples=60, deadline=None)
@given(layouts)
def test_layout_matches_definition(layout: TileLayout) -> None:
    tiles = brute_tiles(layout)
    assert layout.n_tiles == len(tiles)
    assert layout.n_tiles == layout.before_tiles + layout.video_tiles + layout.after_tiles
    assert layout.sizes().tolist() == [len(tile) for tile in tiles]
    assert layout.order().tolist() == [token for tile in tiles for token in tile]
    assert layout.length == sum(len(tile) for tile in tiles)
    assert sorted(layout.order().tolist()) == list(range(layout.length))
    slots = layout.volume + 3
    assert layout.slots(slots).tolist() == [tile + [-1] * (slots - len(tile)) for tile in tiles]
    for axis in range(3):
        sizes = layout.axis_sizes(axis)
        assert sum(sizes) == layout.grid[axis]
        assert len(sizes) == layout.counts[axis]
        assert all(size == layout.tile[axis] for size in sizes[:-1])


def test_border_tiles_are_clipped_not_padded() -> None:
    layout = TileLayout((1, 1, 5), (4, 1, 2))
    assert layout.sizes().tolist() == [2, 2, 1]
    assert layout.slots(2).tolist() == [[0, 1], [2, 3], [4, -1]]


def test_slots_smaller_than_a_tile_are_refused() -> None:
    with pytest.raises(OptionError, match=r"tile_slots=7 .* 8 tokens"):
        TileLayout((2, 2, 2), (2, 2, 2)).slots(7)


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"grid": (0, 2, 2), "tile": (1, 1, 1)}, GridError, r"grid \(0, 2, 2\)"),
        ({"grid": (2, 2), "tile": (1, 1, 1)}, GridError, r"three sizes"),
        ({"grid": (2, 2, 2), "tile": (1, 0, 1)}, OptionError, r"tile=\(1, 0, 1\)"),
        ({"grid": (2, 2, 2), "tile": (1, 1, 1), "before": -1}, GridError, r"shorter than the grid \(2, 2, 2\)"),
        ({"grid": (2, 2, 2), "tile": (1, 1, 1), "after": -1}, GridError, r"shorter than the grid \(2, 2, 2\)"),
    ],
)
def test_bad_layouts_name_the_value(kwargs: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        TileLayout(**kwargs)


def test_tables_are_shared_between_equal_layouts() -> None:
    first, second = TileLayout((2, 3, 4), (2, 2, 2)), TileLayout((2, 3, 4), (2, 2, 2))
    assert first == second
    assert first.order() is second.order()
    assert first.order().dtype == torch.int64
