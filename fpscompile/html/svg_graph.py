"""A small graph drawn in layers: producers above, the attention call in the middle, consumers below."""

from __future__ import annotations

import itertools
from collections import defaultdict
from dataclasses import dataclass

import networkx as nx
from markupsafe import Markup, escape

ROW, NODE_HEIGHT, GAP = 66, 38, 18
SWEEPS = 8


@dataclass
class _Box:
    """A node of the picture, or a bend of an edge that passes a layer (``width`` 0)."""

    key: object
    layer: int
    width: float
    x: float = 0.0


def layers(graph: nx.DiGraph) -> dict[str, int]:
    """Layer of each node: edges point to larger numbers; ``graph["centre"]`` is 0 when there is one.

    Producers sit as low as they can, consumers as high, so edges stay short.
    """
    order = list(nx.topological_sort(graph))
    centre = graph.graph.get("centre")
    if centre not in graph:
        centre = next((name for name in order if graph.nodes[name].get("role") == "attention"), None)
    above: dict[str, int] = {} if centre is None else {centre: 0}
    for name in reversed(order):
        below = [above[follower] - 1 for follower in graph.successors(name) if follower in above]
        if below and name not in above:
            above[name] = min(below)
    placed = dict(above)
    for name in order:
        if name not in placed:
            placed[name] = max((placed[producer] + 1 for producer in graph.predecessors(name)), default=0)
    # Nodes that are neither producers nor consumers of the centre may feed a layer above their own.
    for name in reversed(order):
        placed[name] = min([placed[name], *(placed[follower] - 1 for follower in graph.successors(name))])
    return placed


def draw(graph: nx.DiGraph, description: str) -> Markup:
    """The graph as inline SVG; nodes need ``label``, ``shape`` and ``role`` (see :mod:`fpscompile.graph_view`)."""
    if not graph:
        return Markup('<p class="empty">No picture of this graph was recorded.</p>')
    level = layers(graph)
    rows, chains = _rows(graph, level)
    _order(rows, chains)
    _place(rows, chains)
    boxes = {box.key: box for row in rows for box in row}
    left = min(box.x - box.width / 2 for box in boxes.values()) - 6
    right = max(box.x + box.width / 2 for box in boxes.values()) + 6
    width, height = right - left, ROW * (len(rows) - 1) + NODE_HEIGHT + 28
    top: dict[object, float] = {box.key: ROW * index + 16 for index, row in enumerate(rows) for box in row}
    parts = [_edge([boxes[key] for key in chain], top, left) for chain in chains]
    parts += [
        _node(graph.nodes[name], name, boxes[name].x - left, top[name], boxes[name].width, graph) for name in graph
    ]
    return Markup(
        f'<svg class="graph" role="img" aria-label="{escape(description)}" viewBox="0 0 {width:.0f} {height}" '
        f'width="{width:.0f}" height="{height}">{"".join(parts)}</svg>'
    )


def _rows(graph: nx.DiGraph, level: dict[str, int]) -> tuple[list[list[_Box]], list[list[object]]]:
    """Boxes of each layer, and for each edge the boxes it passes."""
    first = min(level.values())
    rows: list[list[_Box]] = [[] for _ in range(max(level.values()) - first + 1)]
    for name, index in level.items():
        rows[index - first].append(_Box(name, index - first, _width(graph.nodes[name])))
    chains = []
    for producer, consumer in graph.edges:
        bends: list[object] = []
        for index in range(level[producer] + 1, level[consumer]):
            bend = (producer, consumer, index)
            rows[index - first].append(_Box(bend, index - first, 0.0))
            bends.append(bend)
        chains.append([producer, *bends, consumer])
    return rows, chains


def _width(data: dict[str, str]) -> float:
    return max(7.3 * len(data["label"]), 6.1 * len(_clipped(data["shape"])), 34) + 18


def _clipped(shape: str) -> str:
    return shape if len(shape) <= 26 else shape[:25] + "…"


def _neighbours(chains: list[list[object]]) -> tuple[dict[object, list[object]], dict[object, list[object]]]:
    up, down = defaultdict(list), defaultdict(list)
    for a, b in itertools.chain.from_iterable(itertools.pairwise(chain) for chain in chains):
        down[a].append(b)
        up[b].append(a)
    return up, down


def _order(rows: list[list[_Box]], chains: list[list[object]]) -> None:
    """Sort each layer by the mean position of the neighbours: few crossings after a few sweeps down and up."""
    up, down = _neighbours(chains)
    for sweep in range(SWEEPS):
        side, walk = (up, rows) if sweep % 2 == 0 else (down, rows[::-1])
        for row in walk:
            rank = {box.key: index / max(len(other), 1) for other in rows for index, box in enumerate(other)}
            old = {box.key: rank[box.key] for box in row}
            row.sort(key=lambda box: _mean([rank[key] for key in side[box.key]], old[box.key]))


def _place(rows: list[list[_Box]], chains: list[list[object]]) -> None:
    """Positions along x: as near as may be to the neighbours' mean, in the given order, without overlap."""
    up, down = _neighbours(chains)
    x: dict[object, float] = {}
    for row in rows:
        _spread(row, {box.key: 0.0 for box in row}, x)
    for sweep in range(2 * SWEEPS):
        side, walk = (up, rows) if sweep % 2 == 0 else (down, rows[::-1])
        for row in walk:
            _spread(row, {box.key: _mean([x[key] for key in side[box.key]], x[box.key]) for box in row}, x)


def _spread(row: list[_Box], wanted: dict[object, float], x: dict[object, float]) -> None:
    """Merge overlapping neighbours into blocks that sit at the mean of their wishes."""
    blocks: list[tuple[float, list[tuple[_Box, float]]]] = []  # (centre of the first box, boxes with their offsets)
    for box in row:
        start, members = wanted[box.key], [(box, 0.0)]
        while blocks:
            last_start, last = blocks[-1]
            tail, offset = last[-1]
            shift = offset + (tail.width + members[0][0].width) / 2 + GAP
            if last_start + shift <= start:
                break
            blocks.pop()
            members = last + [(member, shift + extra) for member, extra in members]
            start = sum(wanted[member.key] - extra for member, extra in members) / len(members)
        blocks.append((start, members))
    for start, members in blocks:
        for member, offset in members:
            member.x = x[member.key] = start + offset


def _mean(values: list[float], default: float) -> float:
    return sum(values) / len(values) if values else default


def _edge(chain: list[_Box], top: dict[object, float], left: float) -> str:
    points = [(box.x - left, top[box.key] + (NODE_HEIGHT / 2 if box.width == 0 else 0)) for box in chain]
    points[0] = (points[0][0], top[chain[0].key] + NODE_HEIGHT)
    points[-1] = (points[-1][0], top[chain[-1].key] - 5)
    path = f"M{points[0][0]:.1f} {points[0][1]:.1f}"
    for (x0, y0), (x1, y1) in itertools.pairwise(points):
        bend = (y1 - y0) / 2
        path += f"C{x0:.1f} {y0 + bend:.1f} {x1:.1f} {y1 - bend:.1f} {x1:.1f} {y1:.1f}"
    x, y = points[-1]
    return f'<path class="edge" d="{path}"/><path class="tip" d="M{x - 4:.1f} {y - 2:.1f}h8l-4 7z"/>'


def _node(data: dict[str, str], name: str, x: float, y: float, width: float, graph: nx.DiGraph) -> str:
    hidden = int(data.get("inputs", 0)) - int(data.get("params", 0)) - graph.in_degree(name)
    title = f"{name}: {data['label']} {data['shape']}"
    if data.get("params"):
        title += f", with {data['params']} parameters"
    stub = f'<path class="stub" d="M{x:.1f} {y:.1f}v-11"/>' if hidden > 0 else ""
    radius = NODE_HEIGHT / 2 if data["role"] in ("input", "output") else 6
    label_y = y + (16 if data["shape"] else 24)
    shape = f'<text class="shape" x="{x:.1f}" y="{y + 30:.1f}">{escape(_clipped(data["shape"]))}</text>'
    return (
        f'<g class="node {escape(data["role"])}"><title>{escape(title)}</title>{stub}'
        f'<rect x="{x - width / 2:.1f}" y="{y:.1f}" width="{width:.1f}" height="{NODE_HEIGHT}" rx="{radius:g}"/>'
        f'<text x="{x:.1f}" y="{label_y:.1f}">{escape(data["label"])}</text>{shape if data["shape"] else ""}</g>'
    )
