"""How numbers and settings are written, on a terminal, on the page and as JSON alike."""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Mapping, Sequence
from typing import Any

import networkx as nx

from fpscompile.windows import Pattern


def plain(value: Any) -> Any:
    """``value`` as dicts, lists, numbers and text; callables by name, graphs as nodes and edges."""
    if isinstance(value, enum.Enum):
        return plain(value.value)
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Pattern):
        return value.spec()
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, nx.DiGraph):
        nodes = [{"name": str(name), **plain(data)} for name, data in value.nodes(data=True)]
        return {"nodes": nodes, "edges": [[str(a), str(b)] for a, b in value.edges]}
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [plain(item) for item in value]
    return getattr(value, "__qualname__", None) or str(value)


def percent(fraction: float) -> str:
    """ "43%", with a digit more below ten percent."""
    value = 100.0 * fraction
    return f"{value:.1f}%" if 0 < value < 9.95 else f"{value:.0f}%"


def flops_text(flops: float) -> str:
    """ "8.44 TFLOP"."""
    for unit in ("", "K", "M", "G", "T", "P"):
        if flops < 999.5 or unit == "P":
            return f"{flops:.3g} {unit}FLOP"
        flops /= 1000.0
    raise AssertionError("unreachable")


def grid_text(sizes: Sequence[int] | None, times: str = "x") -> str:
    """ "21x30x52", "-" when unknown."""
    return times.join(map(str, sizes)) if sizes else "-"
