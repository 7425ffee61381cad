"""Every window family against its definition, written again in token coordinates; densities; what is refused."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fpscompile.errors import OptionError, UnsupportedError, WindowError
from fpscompile.masks import expand_mask, mask_density
from fpscompile.plan import PhasePlan, Plan, resolve
from fpscompile.tiling import TileLayout
from fpscompile.windows import (
    FAMILIES,
    Dense,
    FirstFrame,
    Heads,
    Intersection,
    Pattern,
    Radial,
    Sliding,
    SpatialBand,
    TemporalBand,
    TextOnly,
    TopK,
    Union,
    block_mask,
    density,
    is_dynamic,
    pattern_of,
    shares,
    spec_of,
    window_of,
    window_text,
)

Point = tuple[int, int, int]
Sees = Callable[[Point, Point, Point], bool]
"""(query tile, key tile, tiles of the grid) -> seen."""


def near(a: int, b: int, width: int, count: int) -> bool:
    """The clamped window of one axis, by counting: of all runs of ``width`` tiles inside the axis, the one that puts
    ``a`` at place ``width // 2``, or as close to it as the axis allows."""
    if width >= count:
        return True
    begin = min(range(count - width + 1), key=lambda start: abs(a - width // 2 - start))
    return begin <= b < begin + width


def radial(size: tuple[int, int] | None, decay: float) -> Sees:
    def sees(q: Point, k: Point, n: Point) -> bool:
        distance, halvings = abs(q[0] - k[0]), 0
        while distance >= 2:
            distance //= 2
            halvings += 1
        for axis in (1, 2):
            full = n[axis] if size is None else min(size[axis - 1], n[axis])
            width = max(1, math.ceil(full * decay**halvings - 1e-9))
            if not near(q[axis], k[axis], width, n[axis]):
                return False
        return True

    return sees


def box(t: int | None, h: int | None, w: int | None) -> Sees:
    """None: all of the axis."""
    return lambda q, k, n: all(
        width is None or near(q[axis], k[axis], width, n[axis]) for axis, width in enumerate((t, h, w))
    )


extent = st.integers(1, 4)
sliding = st.tuples(extent, extent, extent).map(lambda s: (Sliding(s), box(*s)))
leaves = st.one_of(
    st.just((Dense(), box(None, None, None))),
    sliding,
    extent.map(lambda f: (SpatialBand(f), box(f, None, None))),
    st.tuples(extent, extent).map(lambda s: (TemporalBand(s), box(None, *s))),
    st.tuples(st.one_of(st.none(), st.tuples(extent, extent)), st.sampled_from([0.3, 0.5, 0.7071, 1.0])).map(
        lambda a: (Radial(*a), radial(*a))
    ),
    extent.map(lambda f: (FirstFrame(f), lambda q, k, n: k[0] < f)),
    st.just((TextOnly(), lambda q, k, n: False)),
)


def united(parts: list[tuple[Pattern, Sees]]) -> tuple[Pattern, Sees]:
    return Union(tuple(p for p, _ in parts)), lambda q, k, n: any(sees(q, k, n) for _, sees in parts)


def intersected(parts: list[tuple[Pattern, Sees]]) -> tuple[Pattern, Sees]:
    return Intersection(tuple(p for p, _ in parts)), lambda q, k, n: all(sees(q, k, n) for _, sees in parts)


patterns = st.recursive(
    leaves,
    lambda inner: st.one_of(
        st.lists(inner, min_size=2, max_size=3).map(united), st.lists(inner, min_size=2, max_size=2).map(intersected)
    ),
    max_leaves=4,
)


def brute(sees: Sees, layout: TileLayout, k_layout: TileLayout) -> torch.Tensor:
    """bool [Lq, Lk], token by token."""
    tiles = [-(-size // step) for size, step in zip(layout.grid, layout.tile, strict=True)]
    coords = [
        tuple(x // step for x, step in zip(token, layout.tile, strict=True))
        for token in itertools.product(*map(range, layout.grid))
    ]
    known = {pair: sees(*pair, tuple(tiles)) for pair in itertools.product(set(coords), repeat=2)}  # type: ignore[arg-type]
    mask = torch.ones(layout.length, k_layout.length, dtype=torch.bool)
    video = torch.tensor([[known[q, k] for k in coords] for q in coords])
    mask[layout.before : layout.before + len(coords), k_layout.before : k_layout.before + len(coords)] = video
    return mask


grids = st.tuples(st.integers(1, 7), st.integers(1, 4), st.integers(1, 4))
tiles = st.tuples(st.integers(1, 2), st.integers(1, 3), st.integers(1, 3))


@settings(max_examples=60, deadline=None)
@given(patterns, grids, tiles, st.integers(0, 3), st.integers(1, 3))
def test_families_match_their_definition(made, grid, tile, before, after) -> None:
    pattern, sees = made
    q_layout, k_layout = TileLayout(grid, tile, 0, after), TileLayout(grid, tile, before, after)
    expected = brute(sees, q_layout, k_layout)
    mask = block_mask([pattern, (1, 1, 1)], q_layout, k_layout)
    assert torch.equal(expand_mask(mask, q_layout, k_layout)[0, 0], expected)
    kept = expected.double().mean().item()
    assert density(pattern, q_layout, k_layout) == pytest.approx(kept, abs=1e-12)
    assert mask_density(mask, q_layout, k_layout)[0] == pytest.approx(kept, abs=1e-12)
    assert window_of(json.loads(json.dumps(spec_of(pattern)))) == window_of(pattern)
    assert pattern_of(spec_of(pattern)) == pattern
    # resolving names a product where there is one, and that is the same mask
    resolved = resolve(Plan(tile, (PhasePlan(pattern),)), grid, q_layout.length, k_layout.length, 0, before)
    assert torch.equal(expand_mask(resolved.block_mask, q_layout, k_layout)[0, 0], expected)
    assert resolved.densities[0] == pytest.approx(kept, abs=1e-12)
    products = (Dense, Sliding, SpatialBand, TemporalBand)
    assert resolved.product or not isinstance(pattern, products)


@settings(max_examples=25, deadline=None)
@given(st.lists(patterns, min_size=3, max_size=3), st.permutations(range(5)), grids, tiles)
def test_heads_mix_families(made, order, grid, tile) -> None:
    layout = TileLayout(grid, tile, 0, 2)
    first, second = sorted(order[:2]), sorted(order[2:4])
    pattern = Heads({",".join(map(str, heads)): made[i][0] for i, heads in enumerate((first, second))}, made[2][0])  # type: ignore[arg-type]
    mask = expand_mask(block_mask([pattern], layout, layout, heads=5), layout, layout)[0]
    expected = [brute(made[0 if h in first else 1 if h in second else 2][1], layout, layout) for h in range(5)]
    assert torch.equal(mask.expand(5, -1, -1), torch.stack(expected))
    kept = torch.stack(expected).double().mean().item()
    assert density(pattern, layout, layout, heads=5) == pytest.approx(kept, abs=1e-12)
    assert pattern_of(json.loads(json.dumps(spec_of(pattern)))) == pattern


def test_radial_by_hand() -> None:
    """Nine tiles along t, four along w: all at distances 0 and 1, two at 2 and 3, one from 4 on."""
    layout = TileLayout((9, 1, 4), (1, 1, 1))
    seen = block_mask([Radial()], layout, layout).to_dense(36)[0, 0].view(9, 4, 9, 4)
    assert seen[0, 0].sum(-1).tolist() == [4, 4, 2, 2, 1, 1, 1, 1, 1]
    assert seen[4, 2].sum(-1).tolist() == [1, 2, 2, 4, 4, 4, 2, 2, 1]
    assert seen[0, 3, 4].tolist() == [False, False, False, True]


def test_every_family_is_tested_and_has_words() -> None:
    made = {
        *("dense", "sliding", "spatial", "temporal", "radial", "sink", "text"),
        *("union", "intersection", "heads", "topk"),
    }
    assert set(FAMILIES) == made
    for family in FAMILIES.values():
        assert family.__doc__


@pytest.mark.parametrize(
    ("spec", "window", "text"),
    [
        ([1, 2, 3], (1, 2, 3), "1x2x3"),
        ({"family": "sliding", "size": [1, 2, 3]}, (1, 2, 3), "1x2x3"),
        ({"family": "sliding", "density": 0.5}, Sliding(density=0.5), "sliding 0.5"),
        ("dense", Dense(), "dense"),
        ("radial", Radial(), "radial"),
        ({"family": "radial", "size": [2, 4], "decay": 0.7}, Radial((2, 4), 0.7), "radial 2x4, 0.7"),
        ({"family": "spatial", "frames": 3}, SpatialBand(3), "spatial 3"),
        ({"family": "temporal", "size": [2, 1]}, TemporalBand((2, 1)), "temporal 2x1"),
        ({"family": "topk", "density": 0.1}, TopK(0.1), "topk 0.1"),
        ({"family": "topk", "tiles": 7}, TopK(tiles=7), "topk 7 tiles"),
        (
            {"family": "union", "of": [[1, 2, 3], "sink", {"family": "topk", "tiles": 2}]},
            Union((Sliding((1, 2, 3)), FirstFrame(), TopK(tiles=2))),
            "(sliding 1x2x3 | sink | topk 2 tiles)",
        ),
        (
            {"family": "heads", "of": {"0-3": "spatial", "5": [1, 1, 1]}, "rest": "text"},
            Heads({"0-3": "spatial", "5": (1, 1, 1)}, "text"),  # type: ignore[arg-type]
            "heads 0-3: spatial; heads 5: sliding 1x1x1; else text",
        ),
    ],
)
def test_spellings(spec: Any, window: Any, text: str) -> None:
    assert window_of(spec) == window
    assert window_of(spec_of(window)) == window
    assert window_text(window) == text
    assert hash(window_of(spec)) == hash(window)


def test_operators() -> None:
    a, b = SpatialBand(), TemporalBand()
    assert a | b == Union((a, b))
    assert a & b == Intersection((a, b))


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("radail", "did you mean 'radial'"),
        ({"size": [1, 1, 1]}, "names no family"),
        ({"family": "radial", "sice": [1, 1]}, "'radial' has no field 'sice'; its fields are size, decay"),
        ({"family": "dense", "size": 1}, "it has none"),
        ({"family": "radial", "size": [1, 0]}, "two integers >= 1"),
        ({"family": "radial", "decay": 0.0}, r"decay=0.0 must be a number in \(0, 1\]"),
        ({"family": "spatial", "frames": 1.5}, "frames=1.5 must be an integer >= 1"),
        ({"family": "sliding", "size": [1, 1]}, "three integers"),
        ({"family": "sliding", "size": [1, 1, 1], "density": 0.5}, "not both"),
        ({"family": "topk", "density": 0.5, "tiles": 3}, "not both"),
        ({"family": "topk", "tiles": 0}, "tiles=0"),
        ({"family": "union", "of": ["dense"]}, "two or more"),
        ({"family": "union", "of": "dense"}, "two or more"),
        ({"family": "union", "of": [{"family": "topk", "tiles": 1}] * 2}, "several top-k"),
        ({"family": "heads", "of": {}}, "needs a dict"),
        ({"family": "heads", "of": {"0-3": "dense", "3-4": "text"}}, "'0-3' and '3-4' name the same head"),
        ({"family": "heads", "of": {"3-0": "dense"}}, "backwards"),
        ({"family": "heads", "of": {"first": "dense"}}, "no list of indices"),
        ({"family": "heads", "of": {"0": {"family": "heads", "of": {"0": "dense"}}}}, "holds another"),
    ],
)
def test_bad_windows(spec: Any, words: str) -> None:
    with pytest.raises(OptionError, match=words):
        window_of(spec)


def test_numbers_of_numpy_become_plain_ones() -> None:
    for window in (
        SpatialBand(np.int64(2)),
        FirstFrame(np.int64(2)),
        TopK(tiles=np.int64(3)),
        Radial(decay=np.float32(0.5)),
    ):
        assert window_of(json.loads(json.dumps(spec_of(window)))) == window
        assert "np." not in repr(window)


def test_heads_that_do_not_exist() -> None:
    plan = Plan((1, 1, 1), (PhasePlan(Heads({"2-9": "dense"}, "spatial")),))  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="'2-9' names head 9, but the site has 4 heads, 0 to 3"):
        resolve(plan, (2, 2, 2), 8, 8, heads=4)
    assert resolve(plan, (2, 2, 2), 8, 8, heads=10).block_mask.kv_num_blocks.shape == (1, 10, 8)
    with pytest.raises(WindowError, match="number of heads is needed"):
        resolve(plan, (2, 2, 2), 8, 8)


def test_a_tile_without_any_key_is_refused() -> None:
    layout = TileLayout((2, 2, 2), (1, 1, 1))
    with pytest.raises(WindowError, match=r"'text' leaves query tile 0 of grid \(2, 2, 2\)"):
        block_mask([TextOnly()], layout, layout)
    with pytest.raises(WindowError, match=r"leaves query tile 4"):
        block_mask([SpatialBand() & FirstFrame()], layout, layout)
    with_text = TileLayout((2, 2, 2), (1, 1, 1), 0, 1)
    assert block_mask([TextOnly()], with_text, with_text).kv_num_blocks[0, 0].tolist() == [1] * 8 + [9]


@settings(max_examples=30, deadline=None)
@given(grids, tiles, st.integers(0, 9), st.floats(0.05, 1.0))
def test_topk_density_is_an_upper_bound(grid, tile, after, bound) -> None:
    layout = TileLayout(grid, tile, 0, after)
    n, pairs = layout.video_tiles, layout.length**2
    others = pairs - layout.video**2
    if bound * pairs + 1e-9 < others + layout.video**2 / n:
        with pytest.raises(WindowError, match="leaves no tile to choose"):
            density(TopK(bound), layout, layout)
        assert density(TopK(bound), layout, layout, clamp=True) == density(TopK(tiles=1), layout, layout)
        return
    kept = density(TopK(bound), layout, layout)
    assert kept <= bound + 1e-9
    one_more = kept + layout.video**2 / n / pairs
    assert one_more > bound - 1e-9 or kept == pytest.approx(1.0)


def test_static_plus_topk_counts_each_tile_once() -> None:
    layout = TileLayout((4, 4, 4), (1, 1, 1))
    assert density(Sliding((1, 3, 3)) | TopK(tiles=7), layout, layout) == pytest.approx((9 + 7) / 64)
    assert density(Sliding((1, 3, 3)) & TopK(tiles=7), layout, layout) == pytest.approx(7 / 64)
    assert density(Sliding((1, 3, 3)) & TopK(tiles=20), layout, layout) == pytest.approx(9 / 64)
    assert density(Sliding((1, 3, 3)) | TopK(tiles=64), layout, layout) == pytest.approx(1.0)
    chance = shares(Sliding((1, 3, 3)) | TopK(tiles=11), layout, layout)
    assert sorted(set(chance.flatten().tolist())) == [pytest.approx(11 / 55), 1.0]


def test_dynamic_windows_have_no_static_mask() -> None:
    layout = TileLayout((2, 2, 2), (1, 1, 1))
    window = Heads({"0": TopK(tiles=1)}, Dense())  # type: ignore[arg-type]
    assert is_dynamic(window)
    assert not is_dynamic((1, 1, 1))
    assert not is_dynamic(Dense() | FirstFrame())
    with pytest.raises(UnsupportedError, match="chosen by content"):
        block_mask([window], layout, layout, heads=2)


def test_large_grids_are_made_in_little_time_and_memory() -> None:
    """A union over 75,600 tokens in 300 tiles: arithmetic on tiles only."""
    layout = TileLayout((21, 45, 80), (4, 8, 8), 0, 226)
    assert layout.n_tiles < 400
    pattern = Radial((3, 4)) | FirstFrame() | TemporalBand()
    assert 0.05 < density(pattern, layout, layout) < 0.6
