"""The pictures against what they picture: mask pixels, window cells, layers of a graph."""

from __future__ import annotations

import itertools
import re
import zlib
from base64 import b64decode

import networkx as nx
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fpscompile.html.png import data_uri
from fpscompile.html.svg_graph import draw, layers
from fpscompile.html.svg_masks import Bar, mask_levels, timeline, window_slices
from fpscompile.masks import window_mask
from fpscompile.tiling import TileLayout

sizes = st.tuples(st.integers(1, 9), st.integers(1, 9), st.integers(1, 9))
small = st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(1, 4))


@given(grid=sizes, tile=small, window=small, before=st.integers(0, 30), after=st.integers(0, 30))
def test_mask_picture_is_the_mask(
    grid: tuple[int, int, int], tile: tuple[int, int, int], window: tuple[int, int, int], before: int, after: int
) -> None:
    q_layout, k_layout = TileLayout(grid, tile, before, after), TileLayout(grid, tile, after, before)
    expected = window_mask(q_layout, k_layout, [window]).to_dense(k_layout.n_tiles)[0, 0]
    levels = mask_levels(q_layout, k_layout, window, limit=10_000)
    assert torch.equal(levels, 255 * expected.to(torch.uint8))


@given(grid=sizes, tile=small, window=small, before=st.integers(0, 30), limit=st.integers(3, 40))
def test_smaller_mask_picture_is_the_mean(
    grid: tuple[int, int, int], tile: tuple[int, int, int], window: tuple[int, int, int], before: int, limit: int
) -> None:
    layout = TileLayout(grid, tile, before)
    dense = window_mask(layout, layout, [window]).to_dense(layout.n_tiles)[0, 0].double()
    levels = mask_levels(layout, layout, window, limit)
    step = -(-layout.n_tiles // limit)
    assert max(levels.shape) <= limit
    for i, j in itertools.product(range(levels.shape[0]), range(levels.shape[1])):
        part = dense[i * step : (i + 1) * step, j * step : (j + 1) * step]
        assert abs(float(levels[i, j]) - 255 * float(part.mean())) <= 0.51


def test_png_holds_the_levels() -> None:
    levels = torch.randint(0, 256, (7, 11), dtype=torch.uint8)
    png = b64decode(data_uri(levels, "#102030").split(",")[1])
    chunks, at = {}, 8
    while at < len(png):
        length = int.from_bytes(png[at : at + 4])
        kind, data = png[at + 4 : at + 8], png[at + 8 : at + 8 + length]
        assert int.from_bytes(png[at + 8 + length : at + 12 + length]) == zlib.crc32(kind + data)
        chunks[kind] = data
        at += 12 + length
    rows = torch.tensor(list(zlib.decompress(chunks[b"IDAT"]))).view(7, 12)
    opacity = torch.tensor(list(chunks[b"tRNS"]))[rows[:, 1:]]
    assert torch.equal(opacity, levels.long())
    assert chunks[b"PLTE"] == bytes((0x10, 0x20, 0x30)) * len(chunks[b"tRNS"])


def _boxes(svg: str, kind: str) -> list[tuple[int, ...]]:
    found = re.findall(rf'<rect x="(\d+)" y="(\d+)" width="(\d+)" height="(\d+)"[^>]*class="{kind}"', svg)
    return [tuple(map(int, box)) for box in found]


def test_window_slices_are_drawn_to_scale() -> None:
    # Tiles along h start at 0, 4, 8 (the last is short), along w at 0, 5, 10, 15.
    layout = TileLayout((5, 10, 17), (2, 4, 5))
    svg = str(window_slices(layout, (2, 2, 3), (1, 2, 1), 0))
    assert svg.count("<svg") == 3
    assert svg.count("unseen") == 1
    assert _boxes(svg, "seen") == [(0, 4, 15, 6)] * 2, "tiles h 1..2, w 0..2"
    assert _boxes(svg, "query") == [(5, 8, 5, 2)]
    for caption in ("t 0–1", "t 2–3", "t 4<"):
        assert caption in svg


def test_timeline_positions_are_progress() -> None:
    svg = str(timeline([Bar(0.0, 0.25, 1.0), Bar(0.25, 1.0, 0.5, used=False)], 0.625))
    bars = re.findall(r'class="bar( unused)?" x="([\d.]+)%" y="[\d.]+" width="([\d.]+)%" height="([\d.]+)"', svg)
    assert [(float(x), float(width), bool(unused)) for unused, x, width, _ in bars] == [(0, 25, False), (25, 75, True)]
    assert float(bars[0][3]) == pytest.approx(2 * float(bars[1][3]))
    assert 'class="mean"' in svg
    assert 'class="mean"' not in str(timeline([Bar(0.0, 1.0, 0.5)], 0.5))


def test_timeline_labels_do_not_touch() -> None:
    bars = [Bar(i / 50, (i + 1) / 50, 0.5) for i in range(50)]
    places = sorted(
        float(x)
        for x in re.findall(r'class="axis (?:start|middle|end)" x="([\d.]+)%" y="169"', str(timeline(bars, 0.5)))
    )
    assert places[0] == 0
    assert places[-1] == 100
    assert min(b - a for a, b in itertools.pairwise(places)) >= 7.9


@given(st.integers(0, 10**6), st.integers(1, 25))
def test_edges_point_down(seed: int, count: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    graph = nx.DiGraph()
    graph.add_nodes_from(range(count))
    chosen = torch.rand(count, count, generator=generator) < 0.15
    graph.add_edges_from((i, j) for i in range(count) for j in range(i + 1, count) if chosen[i, j])
    centre = int(torch.randint(count, (), generator=generator))
    graph.graph["centre"] = centre
    level = layers(graph)
    assert set(level) == set(graph)
    assert all(level[a] < level[b] for a, b in graph.edges)


@given(st.integers(0, 10**6), st.integers(1, 25))
def test_nodes_do_not_overlap(seed: int, count: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    graph = nx.DiGraph()
    for i in range(count):
        graph.add_node(str(i), label="op" * int(torch.randint(1, 8, (), generator=generator)), shape="[1]", role="op")
    chosen = torch.rand(count, count, generator=generator) < 0.15
    graph.add_edges_from((str(i), str(j)) for i in range(count) for j in range(i + 1, count) if chosen[i, j])
    svg = str(draw(graph, "random"))
    boxes = [tuple(map(float, box)) for box in re.findall(r'<rect x="([-\d.]+)" y="([-\d.]+)" width="([\d.]+)"', svg)]
    view = [float(value) for value in re.search(r'viewBox="([^"]+)"', svg)[1].split()]  # type: ignore[index]
    assert len(boxes) == count
    for x, y, width in boxes:
        assert x >= 0
        assert x + width <= view[2] + 1
        assert 0 <= y <= view[3]
    for (x0, y0, w0), (x1, y1, _) in itertools.combinations(sorted(boxes, key=lambda box: (box[1], box[0])), 2):
        assert y0 != y1 or x0 + w0 <= x1 + 0.2
