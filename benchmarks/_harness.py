"""Shared by the benchmarks: interleaved timing, the table on the terminal, the JSON file."""

from __future__ import annotations

import json
import math
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from rich.console import Console
from rich.table import Table

from fpscompile.tuning.signature import processor_name

K = TypeVar("K")


def interleave(functions: Mapping[K, Callable[[], Any]], *, rounds: int, budget: float = math.inf) -> dict[K, float]:
    """Median seconds of each function, measured in turns, so that a busy machine slows all of them alike.

    Args:
        functions: name to a callable; each runs once before the clock starts.
        rounds: turns, at least 3.
        budget: seconds after which no further turn begins, once 3 are done.
    """
    for function in functions.values():
        function()
    samples: dict[K, list[float]] = {name: [] for name in functions}
    begin = time.perf_counter()
    for turn in range(max(rounds, 3)):
        if turn >= 3 and time.perf_counter() - begin > budget:
            break
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            samples[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in samples.items()}


def matmul_peak(dtype: torch.dtype, *, size: int = 2048, rounds: int = 7) -> float:
    """FLOP/s of ``torch.mm`` on square matrices: the best of several, since a peak is a maximum."""
    a, b = (torch.randn(size, size).to(dtype) for _ in range(2))
    torch.mm(a, b)
    best = math.inf
    for _ in range(rounds):
        start = time.perf_counter()
        torch.mm(a, b)
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def int8_peak(*, size: int = 2048, rounds: int = 7) -> float:
    """Operations per second of ``torch._int_mm`` on square matrices of bytes."""
    a, b = (torch.randint(-127, 128, (size, size), dtype=torch.int8) for _ in range(2))
    torch._int_mm(a, b)
    best = math.inf
    for _ in range(rounds):
        start = time.perf_counter()
        torch._int_mm(a, b)
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def geomean(values: Sequence[float]) -> float:
    return statistics.geometric_mean(values)


def machine() -> dict[str, Any]:
    """What a reader needs to judge the figures."""
    return {
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "processor": processor_name(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "load_average": os.getloadavg()[0],
    }


def dims_text(value: Sequence[int]) -> str:
    """How tables print a grid, a tile or a window.

    >>> dims_text((4, 8, 8))
    '4x8x8'
    """
    return "x".join(map(str, value))


def replace_rows(
    earlier: Sequence[dict[str, Any]], again: Sequence[dict[str, Any]], keys: Sequence[str]
) -> list[dict[str, Any]]:
    """``earlier`` with the rows that were measured again replaced; ``keys`` are the fields that tell rows apart."""

    def key(row: dict[str, Any]) -> str:
        return json.dumps([row[name] for name in keys])

    news = {key(row): row for row in again}
    return [news.pop(key(row), row) for row in earlier] + list(news.values())


def print_table(title: str, columns: Mapping[str, Callable[[Any], str]], rows: Sequence[Mapping[str, Any]]) -> None:
    """``rows`` on the terminal.

    Args:
        columns: key of a row to the function that formats its value; also the order.
    """
    table = Table(title=title, title_justify="left")
    for name in columns:
        table.add_column(name.replace("_", " "), justify="right")
    for row in rows:
        table.add_row(*(form(row[name]) for name, form in columns.items()))
    Console(width=max(140, Console().width)).print(table)


def write_json(path: Path, name: str, rows: Sequence[Mapping[str, Any]], summary: Mapping[str, Any]) -> None:
    """One file per run: ``{"benchmark", "machine", "summary", "rows"}``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    report = {"benchmark": name, "machine": machine(), "summary": dict(summary), "rows": [dict(row) for row in rows]}
    path.write_text(json.dumps(report, indent=2) + "\n")
