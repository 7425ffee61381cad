"""Pictures of a plan: the schedule over time, block masks, and the window of one query tile."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from markupsafe import Markup, escape

from fpscompile.html.png import data_uri
from fpscompile.masks import axis_window
from fpscompile.tiling import TileLayout
from fpscompile.windows import AnyWindow, Pattern, shares

COLOURS = ("#4a78d6", "#d07a2d", "#2f9a7c", "#9a67c7", "#c9566b", "#6d8296")
"""One per phase; told apart with colour-blind eyes, and readable on white and on near-black."""

MASK_PIXELS = 480
"""Largest side of a mask picture; larger masks are averaged down by a whole factor."""


def colour(phase: int) -> str:
    return COLOURS[phase % len(COLOURS)]


@dataclass(frozen=True)
class Bar:
    """One phase in the timeline."""

    start: float
    end: float
    density: float
    used: bool = True
    """Whether any step runs it."""


def timeline(bars: Sequence[Bar], mean: float) -> Markup:
    """Density over denoising progress: one bar per phase, and a line at the mean when there are several.

    Horizontal positions are percentages and the height is fixed, so text keeps its size on any screen.
    """
    top, height = 22, 130
    base = top + height
    parts = []
    for value in (0.0, 0.5, 1.0):
        y = base - height * value
        parts.append(f'<line class="rule" x1="0" x2="100%" y1="{y:g}" y2="{y:g}"/>')
        if value:
            parts.append(f'<text class="axis end" x="100%" y="{y - 5:g}">{value:.1f}</text>')
    values = []
    for index, bar in enumerate(bars):
        x, width, tall = 100 * bar.start, 100 * (bar.end - bar.start), max(height * bar.density, 2)
        middle, y = x + width / 2, base - tall
        parts.append(
            f'<rect class="bar{"" if bar.used else " unused"}" x="{x:g}%" y="{y:.1f}" width="{width:g}%" '
            f'height="{tall:.1f}" fill="{colour(index)}"/>'
        )
        values.append(f'<text class="value" x="{middle:g}%" y="{y - 6:.1f}">{bar.density:.2f}</text>')
        if width >= 6:
            name = f"phase {index}" if width >= 15 else index
            values.append(f'<text class="axis" x="{middle:g}%" y="{base + 35}">{name}</text>')
    if len(bars) > 1:
        y = base - height * mean
        parts.append(f'<line class="mean" x1="0" x2="100%" y1="{y:.1f}" y2="{y:.1f}"/>')
    parts += values  # above the line, which their halo interrupts
    last = 0.0
    for position in (0.0, *(bar.end for bar in bars)):
        if position in (0.0, 1.0) or (position - last >= 0.08 and position <= 0.92):  # labels must not touch
            place = "start" if position == 0 else "end" if position == 1 else "middle"
            parts.append(f'<text class="axis {place}" x="{100 * position:g}%" y="{base + 17}">{position:g}</text>')
            last = position
    described = "; ".join(
        f"phase {index} from {bar.start:g} to {bar.end:g}: density {bar.density:.3f}" for index, bar in enumerate(bars)
    )
    label = escape(f"Density over denoising progress. {described}.")
    return Markup(
        f'<svg class="timeline" role="img" aria-label="{label}" width="100%" height="{base + 40}">'
        f"{''.join(parts)}</svg>"
    )


def mask_levels(
    q_layout: TileLayout,
    k_layout: TileLayout,
    window: AnyWindow,
    limit: int = MASK_PIXELS,
    heads: int | None = None,
    clamp: bool = False,
) -> torch.Tensor:
    """The block mask of one phase as a picture: uint8 [rows, columns], 0 unseen, 255 seen.

    A pixel stands for a square of ``ceil(tiles / limit)`` tiles and shows how many of its pairs are kept, the mean over
    heads; tiles that content chooses from show their chance. Rows of a product of axes are made a few at a time, so
    thousands of tiles need megabytes.
    """
    if isinstance(window, Pattern):
        video = shares(window, q_layout, k_layout, heads, clamp=clamp)
        dense = torch.ones(q_layout.n_tiles, k_layout.n_tiles)
        first, k_first = q_layout.before_tiles, k_layout.before_tiles
        dense[first : first + q_layout.video_tiles, k_first : k_first + k_layout.video_tiles] = video.float()
        step = -(-max(dense.shape) // limit)
        kept = torch.nn.functional.avg_pool2d(dense[None, None], step, ceil_mode=True)[0, 0]
        return (255 * kept).round().to(torch.uint8)
    axes = [_ranges(axis_window(width, count), count) for width, count in zip(window, q_layout.counts, strict=True)]
    step = -(-max(q_layout.n_tiles, k_layout.n_tiles) // limit)
    _, n_h, n_w = q_layout.counts
    first, k_first = q_layout.before_tiles, k_layout.before_tiles
    rows = []
    for start in range(0, q_layout.n_tiles, step):
        tiles = torch.arange(start, min(start + step, q_layout.n_tiles))
        seen = torch.ones(len(tiles), k_layout.n_tiles)
        inside = (tiles >= first) & (tiles < first + q_layout.video_tiles)
        index = tiles[inside] - first
        t, h, w = axes[0][index // (n_h * n_w)], axes[1][index // n_w % n_h], axes[2][index % n_w]
        video = t[:, :, None, None] * h[:, None, :, None] * w[:, None, None, :]
        seen[inside, k_first : k_first + k_layout.video_tiles] = video.flatten(1)
        rows.append(seen.mean(0))
    stacked = torch.stack(rows)
    padding = -k_layout.n_tiles % step
    columns = torch.nn.functional.pad(stacked, (0, padding)).unflatten(1, (-1, step)).sum(-1)
    width = torch.full((columns.shape[1],), float(step))
    width[-1] = step - padding
    return (255 * columns / width).round().to(torch.uint8)


def _ranges(ranges: Sequence[tuple[int, int]], count: int) -> torch.Tensor:
    """float32 [count, count]: 1 where the second tile is seen by the first."""
    axis = torch.zeros(count, count)
    for index, (start, stop) in enumerate(ranges):
        axis[index, start:stop] = 1.0
    return axis


def block_mask(
    q_layout: TileLayout,
    k_layout: TileLayout,
    window: AnyWindow,
    phase: int,
    density: float,
    heads: int | None = None,
    clamp: bool = False,
) -> Markup:
    """Query tiles (down) against key tiles (right); lines where the video's frames of tiles and the text begin."""
    rows, columns = q_layout.n_tiles, k_layout.n_tiles
    image = data_uri(mask_levels(q_layout, k_layout, window, heads=heads, clamp=clamp), colour(phase))
    lines = "".join(
        f'<line class="{kind}" x1="{x}" x2="{x}" y1="0" y2="{rows}"/>' for x, kind in _boundaries(k_layout)
    ) + "".join(f'<line class="{kind}" x1="0" x2="{columns}" y1="{y}" y2="{y}"/>' for y, kind in _boundaries(q_layout))
    label = f"Block mask of phase {phase}: {rows} query tiles by {columns} key tiles, density {density:.3f}."
    return Markup(
        f'<svg class="mask" role="img" aria-label="{label}" viewBox="0 0 {columns} {rows}" '
        f'preserveAspectRatio="none"><image href="{image}" width="{columns}" height="{rows}" '
        f'preserveAspectRatio="none"/>{lines}</svg>'
    )


def _boundaries(layout: TileLayout) -> list[tuple[int, str]]:
    n_t, n_h, n_w = layout.counts
    video, frame = layout.before_tiles, n_h * n_w
    lines = [(video + frame * t, "frame") for t in range(1, n_t)] if n_t <= 40 else []
    lines += [(video, "segment")] if layout.before_tiles else []
    return lines + ([(video + layout.video_tiles, "segment")] if layout.after_tiles else [])


def window_slices(
    layout: TileLayout,
    window: AnyWindow,
    query: tuple[int, int, int],
    phase: int,
    heads: int | None = None,
    clamp: bool = False,
) -> Markup:
    """What one query tile sees: one small picture per slice of tiles along t, drawn to scale in tokens.

    Args:
        query: index of the query tile along (t, h, w).
        heads, clamp: for patterns; see :class:`fpscompile.windows.View`.
    """
    bounds = [_edges(layout.axis_sizes(axis)) for axis in range(3)]
    if isinstance(window, Pattern):
        row = shares(window, layout, layout, heads, clamp=clamp).view(layout.counts * 2)[query]
        return _pattern_slices(layout, bounds, row, query, phase, window.text)
    seen = [axis_window(width, count)[index] for width, count, index in zip(window, layout.counts, query, strict=True)]
    (_, t_edges), (height, h_edges), (width, w_edges) = ((edges[-1], edges) for edges in bounds)
    grid = "".join(f"M{x} 0V{height}" for x in w_edges[1:-1]) + "".join(f"M0 {y}H{width}" for y in h_edges[1:-1])
    kept = _box(w_edges, h_edges, seen[2], seen[1])
    own = _box(w_edges, h_edges, (query[2], query[2] + 1), (query[1], query[1] + 1))
    figures = []
    for t in range(layout.counts[0]):
        inside = seen[0][0] <= t < seen[0][1]
        drawn = f'<rect {kept} fill="{colour(phase)}" class="seen"/>' if inside else ""
        drawn += f'<path class="cells" d="{grid}"/>'
        drawn += f'<rect {own} class="query"/>' if t == query[0] else ""
        first, last = t_edges[t], t_edges[t + 1] - 1
        caption = f"t {first}" if first == last else f"t {first}–{last}"
        figures.append(
            f'<span class="slice{"" if inside else " unseen"}"><svg viewBox="0 0 {width} {height}" aria-hidden="true">'
            f'<rect class="ground" width="{width}" height="{height}"/>{drawn}</svg><span>{caption}</span></span>'
        )
    ranges = ", ".join(f"{axis} {a} to {b - 1}" for axis, (a, b) in zip("thw", seen, strict=True))
    label = f"Phase {phase}: query tile {query} sees key tiles {ranges}, of {layout.counts}."
    size = "slices many" if layout.counts[0] > 9 else "slices"
    return Markup(f'<div class="{size}" role="img" aria-label="{label}">{"".join(figures)}</div>')


def _pattern_slices(
    layout: TileLayout,
    bounds: list[list[int]],
    row: torch.Tensor,
    query: tuple[int, int, int],
    phase: int,
    text: str,
) -> Markup:
    """The pictures of :func:`window_slices` cell by cell.

    Args:
        row: float [tiles along t, h, w]: how much of each key tile the query tile sees.
    """
    (_, t_edges), (height, h_edges), (width, w_edges) = ((edges[-1], edges) for edges in bounds)
    grid = "".join(f"M{x} 0V{height}" for x in w_edges[1:-1]) + "".join(f"M0 {y}H{width}" for y in h_edges[1:-1])
    own = _box(w_edges, h_edges, (query[2], query[2] + 1), (query[1], query[1] + 1))
    figures = []
    for t, plane in enumerate(row.tolist()):
        cells = [
            f'<rect {_box(w_edges, h_edges, (x, x + 1), (y, y + 1))} fill="{colour(phase)}" class="seen"'
            + (f' opacity="{share:.2f}"' if share < 1 else "")
            + "/>"
            for y, line in enumerate(plane)
            for x, share in enumerate(line)
            if share > 0
        ]
        drawn = "".join(cells) + f'<path class="cells" d="{grid}"/>'
        drawn += f'<rect {own} class="query"/>' if t == query[0] else ""
        first, last = t_edges[t], t_edges[t + 1] - 1
        caption = f"t {first}" if first == last else f"t {first}–{last}"
        figures.append(
            f'<span class="slice{"" if cells else " unseen"}"><svg viewBox="0 0 {width} {height}" aria-hidden="true">'
            f'<rect class="ground" width="{width}" height="{height}"/>{drawn}</svg><span>{caption}</span></span>'
        )
    label = escape(f"Phase {phase}: what query tile {query} sees under {text}, of {layout.counts} tiles.")
    size = "slices many" if layout.counts[0] > 9 else "slices"
    return Markup(f'<div class="{size}" role="img" aria-label="{label}">{"".join(figures)}</div>')


def _edges(sizes: Sequence[int]) -> list[int]:
    edges = [0]
    for size in sizes:
        edges.append(edges[-1] + size)
    return edges


def _box(x_edges: list[int], y_edges: list[int], x: tuple[int, int], y: tuple[int, int]) -> str:
    left, top = x_edges[x[0]], y_edges[y[0]]
    return f'x="{left}" y="{top}" width="{x_edges[x[1]] - left}" height="{y_edges[y[1]] - top}"'
