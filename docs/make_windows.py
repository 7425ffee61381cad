"""Makes docs/windows.md and the pictures in docs/windows/ from the families themselves: python docs/make_windows.py"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fpscompile.html.png import data_uri
from fpscompile.masks import with_others
from fpscompile.tiling import TileLayout
from fpscompile.windows import View, density, is_dynamic, on_grid, pattern_of, shares

FOLDER = Path(__file__).resolve().parent
LAYOUT = TileLayout((9, 5, 7), (1, 1, 1), 0, 2)
"""Nine slices of 5 x 7 tiles, and two tiles of text behind them."""
HEADS = 4
QUERY = (4, 1, 4)
COLOUR, INK, GROUND = "#4a78d6", "#1b2027", "#eef0f4"


@dataclass(frozen=True)
class Example:
    """One family on the page."""

    name: str
    spec: Any
    text: str


EXAMPLES = (
    Example(
        "sliding",
        [3, 3, 3],
        "The sliding 3D tile window: the nearest tiles along (t, h, w), as many at the border as inside. Three "
        'integers, or `{"family": "sliding", "density": 0.2}` for the largest one within a density.',
    ),
    Example("dense", "dense", "Everything. For layers, heads and phases that cannot spare anything."),
    Example(
        "spatial",
        {"family": "spatial", "frames": 3},
        "A spatial band: all of space in the nearest `frames` slices along t. For heads that work within a frame.",
    ),
    Example(
        "temporal",
        {"family": "temporal", "size": [3, 1]},
        "A temporal band: all times at the nearest `size` positions along (h, w). For heads that follow a place.",
    ),
    Example(
        "radial",
        {"family": "radial", "size": [5, 7], "decay": 0.5},
        "Space narrows with temporal distance, after Radial Attention (arXiv 2506.19852): `size` tiles along (h, w) "
        "at distances 0 and 1 (all without it), `decay` times that at 2 and 3, again at 4 to 7, and so on, rounded "
        "up, never less than the tile at its own position. 0.5 halves the extent per doubling, 0.7071 the area.",
    ),
    Example(
        "sink",
        {"family": "sink", "frames": 1},
        "The first `frames` slices, seen from everywhere. Meant for unions: many models lean on the first frame.",
    ),
    Example(
        "text",
        "text",
        "Nothing of the video. The other tokens (text), which every family keeps, are all that is left: for heads "
        "that read the text, and as the neutral part of a union.",
    ),
    Example(
        "union",
        {"family": "union", "of": [[3, 3, 3], "sink", {"family": "temporal", "size": [1, 1]}]},
        "What any part sees. In Python `a | b`.",
    ),
    Example(
        "intersection",
        {"family": "intersection", "of": [{"family": "radial", "size": [5, 7]}, {"family": "spatial", "frames": 5}]},
        "What all parts see. In Python `a & b`.",
    ),
    Example(
        "topk",
        {"family": "topk", "density": 0.2},
        "Key tiles chosen by content, for each sample, head and query tile: those whose mean key has the largest "
        "product with the tile's mean query. Give a `density`, or a number of `tiles`; of equal scores the lower "
        "index wins. The picture shows every tile's chance, not a choice.",
    ),
    Example(
        "static-plus-topk",
        {"family": "union", "of": [[1, 3, 3], {"family": "topk", "tiles": 30}]},
        "A top-k in a union chooses among the tiles that the other parts do not see; in an intersection, among those "
        "that they see. The number of tiles is therefore known beforehand, and so is the density.",
    ),
    Example(
        "heads",
        {
            "family": "heads",
            "of": {"0": {"family": "spatial", "frames": 3}, "1-2": {"family": "temporal", "size": [1, 1]}},
            "rest": [3, 3, 3],
        },
        'A window per head: ranges of heads, and `rest` for the others (dense without it). `options["heads"]` writes '
        "the same for every layer. The picture is the mean over four heads.",
    ),
)

INTRO = """\
# Windows

<!-- made by docs/make_windows.py -->

A *window* says which key tiles each query tile sees. It is what `options["window"]`, `Phase(window=...)`,
`options["heads"]` and `options["layers"]` take, and what JSON files hold: three integers, a family's name, or a dict
with `"family"` and its fields. `fpscompile.windows` has a class of the same fields for each.

All sizes are tiles, not tokens. Windows along an axis are clamped at its ends. Tokens outside the video see
everything and are seen by everything, whatever the family. A window that leaves some query tile without any key is
refused.

The pictures show a video of 9 x 5 x 7 tiles and two tiles of text. Left: what the query tile (4, 1, 4), in black,
sees in each slice along t. Right: the block mask, query tiles down, key tiles across. Paler cells are seen by some
heads, or with some chance.
"""

OUTRO = """\
## What runs them

Windows that are products of the three axes on the grid at hand (sliding, dense, spatial and temporal bands) run on
every lowering. The others need lists of tiles, which `cpp`, `triton`, `gather` and `reference` read; `boxes` refuses
them by name. Top-k runs on `cpp`, `gather` and `reference`: `lowering="auto"` on a GPU takes `gather` for it, with a
note in the report.

A top-k window puts one more op, `fps::select_tiles`, ahead of the attention in the compiled graph. Its result has a
fixed size, so it breaks no graph and no step recompiles; the backward reads the very choice that the forward used. A
key mask counts: hidden keys have no part in the means. `benchmarks/topk_cost.py` measures what it costs.
"""


def pages() -> dict[str, str]:
    """Path below docs/ -> content."""
    files, parts = {}, [INTRO]
    for example in EXAMPLES:
        pattern = pattern_of(example.spec)
        kept = density(pattern, LAYOUT, LAYOUT, HEADS)
        window = on_grid(example.spec, View(LAYOUT, LAYOUT, HEADS))
        product = f", the product window {window}" if isinstance(window, tuple) else ""
        title = f"{example.name}: density {kept:.3f}"
        path = f"windows/{example.name}.svg"
        files[path] = picture(pattern, title)
        parts.append(
            f"## {example.name}\n\n"
            f"    {json.dumps(example.spec)}\n\n"
            f"{wrapped(example.text)}\n\n"
            f"Density here: {'about ' if is_dynamic(pattern) else ''}{kept:.3f}{product}.\n\n"
            f"![{title}]({path})\n"
        )
    files["windows.md"] = "\n".join([*parts, OUTRO])
    return files


def wrapped(text: str, width: int = 118) -> str:
    """``text`` in lines of at most ``width``; unlike textwrap, never breaks at a hyphen."""
    lines = [""]
    for word in text.split():
        if lines[-1] and len(lines[-1]) + len(word) + 1 > width:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
    return "\n".join(lines)


def picture(pattern: Any, title: str) -> str:
    """One SVG: the slices of one query tile, then the block mask."""
    seen = shares(pattern, LAYOUT, LAYOUT, HEADS)
    n_t, n_h, n_w = LAYOUT.counts
    row = seen.view(LAYOUT.counts * 2)[QUERY]
    cell, gap, top = 9, 10, 16
    side = 150
    left = n_t * (n_w * cell + gap) + 10
    parts = []
    for t in range(n_t):
        x, y = t * (n_w * cell + gap), top
        parts.append(f'<g transform="translate({x} {y}) scale({cell})">{cells(row[t])}')
        if t == QUERY[0]:
            parts.append(f'<rect x="{QUERY[2]}" y="{QUERY[1]}" width="1" height="1" fill="{INK}"/>')
        parts.append(f'</g><text x="{x}" y="{top + n_h * cell + 14}">t = {t}</text>')
    dense = with_others(LAYOUT, LAYOUT, torch.ones_like(seen, dtype=torch.bool)).double()
    dense[: LAYOUT.video_tiles, : LAYOUT.video_tiles] = seen
    image = data_uri((255 * dense).round().to(torch.uint8), COLOUR)
    frame = f'x="{left}" y="{top}" width="{side}" height="{side}"'
    parts.append(f'<rect {frame} fill="{GROUND}"/><image href="{image}" {frame} preserveAspectRatio="none"/>')
    width, height = left + side, top + side + 4
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        f'role="img" font-family="sans-serif" font-size="10"><title>{title}</title>'
        f'<rect width="{width}" height="{height}" fill="white"/>{"".join(parts)}</svg>\n'
    )


def cells(levels: torch.Tensor, inset: float = 0.08) -> str:
    """Unit squares for a matrix of levels in [0, 1], a path per level: each square is a short stroke."""
    paths: dict[float, list[str]] = {}
    for y, line in enumerate(levels.tolist()):
        for x, level in enumerate(line):
            paths.setdefault(round(level, 3), []).append(f"M{x} {y}h{1 - inset:g}")
    drawn = ""
    for level, squares in sorted(paths.items()):
        colour = f'"{COLOUR}" opacity="{level:g}"' if level else f'"{GROUND}"'
        moved = f'stroke-width="{1 - inset:g}" transform="translate(0 0.5)"'
        drawn += f'<path d="{"".join(squares)}" stroke={colour} {moved}/>'
    return drawn


def main() -> None:
    for path, text in pages().items():
        (FOLDER / path).parent.mkdir(exist_ok=True)
        (FOLDER / path).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
