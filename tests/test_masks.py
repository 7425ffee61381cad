"""Block masks against the window's formula, token by token, and the density's closed form."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fpscompile.errors import WindowError
from fpscompile.masks import (
    BlockMask,
    apart,
    axis_window,
    expand_mask,
    mask_density,
    window_density,
    window_for_density,
    window_mask,
    window_start,
)
from fpscompile.tiling import TileLayout

small = st.tuples(*[st.integers(1, 5)] * 3)
tiles = st.tuples(*[st.integers(1, 3)] * 3)
text = st.integers(0, 5)


def sees(q: tuple[int, ...], k: tuple[int, ...], grid: tuple, tile: tuple, window: tuple) -> bool:
    """Does video token ``q`` see video token ``k``? start = clip(i - w // 2, 0, max(n - w, 0)) on each axis."""
    for a, b, size, step, width in zip(q, k, grid, tile, window, strict=True):
        count = (size + step - 1) // step
        i, j = a // step, b // step
        start = i - width // 2
        start = max(start, 0)
        start = min(start, max(count - width, 0))
        if not start <= j <= start + width - 1:
            return False
    return True


def brute_mask(q_layout: TileLayout, k_layout: TileLayout, window: tuple[int, int, int]) -> torch.Tensor:
    """bool [Lq, Lk]: everything outside the video sees and is seen."""
    grid, tile = q_layout.grid, q_layout.tile
    coords = list(itertools.product(*(range(size) for size in grid)))
    mask = torch.ones(q_layout.length, k_layout.length, dtype=torch.bool)
    for i, q in enumerate(coords):
        for j, k in enumerate(coords):
            mask[q_layout.before + i, k_layout.before + j] = sees(q, k, grid, tile, window)
    return mask


@settings(max_examples=25, deadline=None)
@given(small, tiles, st.tuples(*[st.integers(1, 6)] * 3), text, text, text, text)
def test_window_mask_matches_formula(grid, tile, window, q_before, q_after, k_before, k_after) -> None:
    q_layout = TileLayout(grid, tile, q_before, q_after)
    k_layout = TileLayout(grid, tile, k_before, k_after)
    mask = window_mask(q_layout, k_layout, [window, (1, 1, 1)])
    expanded = expand_mask(mask, q_layout, k_layout)
    assert expanded.shape == (2, 1, q_layout.length, k_layout.length)
    for phase, w in enumerate((window, (1, 1, 1))):
        brute = brute_mask(q_layout, k_layout, w)
        assert torch.equal(expanded[phase, 0], brute)
        kept = brute.double().mean().item()
        assert window_density(q_layout, k_layout, w) == pytest.approx(kept, abs=1e-12)
        assert mask_density(mask, q_layout, k_layout)[phase] == pytest.approx(kept, abs=1e-12)


@pytest.mark.parametrize(("count", "width"), [(7, 1), (7, 2), (7, 3), (7, 4), (7, 7), (7, 9), (1, 1), (2, 3)])
def test_border_tiles_see_as_many_as_inner_ones(count: int, width: int) -> None:
    ranges = axis_window(width, count)
    assert {stop - start for start, stop in ranges} == {min(width, count)}
    assert all(start >= 0 and stop <= count for start, stop in ranges)
    assert all(start <= index < stop for index, (start, stop) in enumerate(ranges))
    assert [start for start, _ in ranges] == [window_start(index, width, count) for index in range(count)]


def test_even_window_reaches_further_back() -> None:
    assert axis_window(2, 4) == [(0, 2), (0, 2), (1, 3), (2, 4)]
    assert axis_window(4, 6) == [(0, 4), (0, 4), (0, 4), (1, 5), (2, 6), (2, 6)]


def test_dense_round_trip_and_format() -> None:
    generator = torch.Generator().manual_seed(3)
    dense = torch.rand(2, 3, 5, 7, generator=generator) < 0.4
    dense[0, 1, 2] = False
    mask = BlockMask.from_dense(dense)
    assert mask.kv_num_blocks.dtype == mask.kv_indices.dtype == torch.int32
    assert torch.equal(mask.to_dense(7), dense)
    for p, h, q in itertools.product(range(2), range(3), range(5)):
        count = int(mask.kv_num_blocks[p, h, q])
        listed = mask.kv_indices[p, h, q].tolist()
        assert listed[:count] == dense[p, h, q].nonzero().flatten().tolist()
        assert not any(listed[count:])
    assert torch.equal(mask.transpose(7).to_dense(5), dense.mT)


def test_mask_without_any_tile_keeps_a_capacity_of_one() -> None:
    mask = BlockMask.from_dense(torch.zeros(1, 1, 2, 3, dtype=torch.bool))
    assert mask.kv_indices.shape == (1, 1, 2, 1)
    assert not mask.to_dense(3).any()


@settings(max_examples=25, deadline=None)
@given(small, tiles, text, st.floats(0.02, 1.0))
def test_window_for_density_is_the_largest_feasible(grid, tile, after, density) -> None:
    layout = TileLayout(grid, tile, 0, after)
    every = {w: window_density(layout, layout, w) for w in itertools.product(*(range(1, n + 1) for n in layout.counts))}
    floor = min(every.values())
    if floor > density:
        with pytest.raises(WindowError, match=f"below the floor {floor:.4f}"):
            window_for_density(layout, layout, density)
        assert every[window_for_density(layout, layout, density, clamp=True)] == floor
        return
    chosen = window_for_density(layout, layout, density)
    fits = {w: d for w, d in every.items() if d <= density + 1e-12}
    across = {
        w: d for w, d in fits.items() if all(size > 1 or n == 1 for size, n in zip(w, layout.counts, strict=True))
    }
    assert chosen in (across or fits)
    assert every[chosen] == max((across or fits).values())


def test_window_for_density_prefers_alike_axes() -> None:
    layout = TileLayout((4, 4, 4), (1, 1, 1))
    assert window_for_density(layout, layout, 0.125) == (2, 2, 2)


def test_window_for_density_looks_across_every_axis_where_one_fits() -> None:
    layout = TileLayout((21, 45, 80), (4, 8, 8))
    assert window_density(layout, layout, (6, 6, 1)) == pytest.approx(0.1)
    chosen = window_for_density(layout, layout, 0.1)
    assert not apart(chosen, layout.counts)
    assert 0.09 < window_density(layout, layout, chosen) < 0.1  # so it is not the largest
    assert apart(window_for_density(layout, layout, 0.01), layout.counts)  # nothing that looks across fits


def test_full_density_gives_the_full_window() -> None:
    layout = TileLayout((3, 5, 7), (2, 2, 2), 4, 3)
    assert window_for_density(layout, layout, 1.0) == layout.counts


def test_floor_error_names_grid_tile_and_other_tokens() -> None:
    layout = TileLayout((4, 4, 4), (2, 2, 2), 0, 8)
    with pytest.raises(WindowError, match=r"density=0.01 .*grid \(4, 4, 4\) with tile \(2, 2, 2\) and 8 other tokens"):
        window_for_density(layout, layout, 0.01)
