"""How good the tuner's choice is on this CPU: tuned beside the untuned default and beside an exhaustive search.

For grids of real models, one after another: a quick tuning run picks a kernel, as ``fpscompile.autotune`` does;
an exhaustive search times every valid config of the generated kernel and every other lowering, those near the best in
turns; then the tuned kernel, the default and the best of the exhaustive search are measured against each other.

    python benchmarks/autotune_cpu.py --build        builds all kernels, which any machine load may slow, and ends
    python benchmarks/autotune_cpu.py [--heads N] [--dtype float32] [--threads N] [--only NAME ...] [--quick]
        [--json PATH]

``tuned_over_best`` is a ratio of interleaved times: 1.05 means that exhaustive search would save 5 %.
``default_over_best`` is what not tuning costs.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[1])]

from _harness import geomean, print_table, replace_rows, write_json

from fpscompile import cpp_build
from fpscompile.errors import FpsError
from fpscompile.lowerings import cpp
from fpscompile.plan import PhasePlan, Plan, resolve
from fpscompile.tuning.candidates import candidates
from fpscompile.tuning.problem import Candidate, Problem
from fpscompile.tuning.tuner import build, measure

Triple = tuple[int, int, int]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
K = TypeVar("K")

FINAL_ROUNDS = 11
"""Turns of the tuned kernel, the default and the best."""

NEAR = 1.5
"""Ratio to the best beyond which the exhaustive search looks no further."""


@dataclass(frozen=True)
class Shape:
    name: str
    grid: Triple
    head_dim: int
    text: int
    tile: Triple
    density: float


SHAPES = (
    # Token grids of the models at their usual resolutions; fewer heads, which multiply all candidates alike.
    Shape("Wan 480p", (21, 30, 52), 128, 0, (4, 8, 8), 0.2),
    Shape("Wan 480p, small tiles", (21, 30, 52), 128, 0, (2, 4, 8), 0.1),
    Shape("CogVideoX", (13, 30, 45), 64, 226, (4, 8, 8), 0.25),
    Shape("LTX", (21, 16, 22), 64, 0, (4, 8, 8), 0.25),
    Shape("Mochi, a quarter", (28, 15, 27), 128, 0, (6, 8, 8), 0.2),
    Shape("Allegro, a quarter", (22, 23, 40), 96, 0, (4, 4, 8), 0.15),
)
QUICK = (Shape("small", (4, 16, 16), 64, 10, (2, 8, 8), 0.3),)


def problem(shape: Shape, heads: int, dtype: torch.dtype) -> Problem:
    """The site, with the lowering that ``"auto"`` gives it without tuning."""
    length = math.prod(shape.grid) + shape.text
    device = torch.device("cpu")
    plan = Plan(shape.tile, (PhasePlan(density=shape.density),))
    reason = cpp.why_not(dtype, shape.head_dim, shape.head_dim, plan, device) or cpp_build.slower_than_boxes()
    plan = Candidate("cpp" if reason is None else "boxes").plan(plan)
    resolved = resolve(plan, shape.grid, length, length)
    return Problem(resolved, heads, heads, shape.head_dim, shape.head_dim, dtype, device)


def in_turns(functions: Mapping[K, Callable[[], float]], rounds: int) -> dict[K, list[float]]:
    """Seconds of each function in each round; the order turns from round to round."""
    names = list(functions)
    samples: dict[K, list[float]] = {name: [] for name in names}
    for turn in range(rounds):
        for place in range(len(names)):
            name = names[(place + turn) % len(names)]
            samples[name].append(functions[name]())
    return samples


def exhaustive(given: Problem, default: Candidate, rounds: int) -> tuple[Candidate, int]:
    """(the candidate with the smallest median, how many there were). Every one is timed once when it is warm; those
    within :data:`NEAR` of the best then take turns."""
    tensors = given.inputs()
    once: dict[Candidate, float] = {}
    runners = {candidate: given.timed(candidate, tensors) for candidate in candidates(given, default, "full")}
    for candidate, timed in runners.items():
        with contextlib.suppress(FpsError):
            timed()
            once[candidate] = timed()
    near = {candidate: runners[candidate] for candidate in once if once[candidate] <= NEAR * min(once.values())}
    samples = in_turns(near, rounds)
    return min(samples, key=lambda candidate: statistics.median(samples[candidate])), len(once)


def row(shape: Shape, given: Problem, rounds: int) -> dict[str, Any]:
    """One row of the table; all kernels are built."""
    default = Candidate(given.resolved.plan.lowering)
    began = time.perf_counter()
    tuned = measure(given, default, "quick")
    tuning = time.perf_counter() - began
    began = time.perf_counter()
    best, count = exhaustive(given, default, rounds)
    searching = time.perf_counter() - began
    tensors = given.inputs()
    finalists = {candidate: given.timed(candidate, tensors) for candidate in {tuned.candidate, default, best}}
    for timed in finalists.values():
        timed()
    samples = in_turns(finalists, FINAL_ROUNDS)

    def ratio(a: Candidate, b: Candidate) -> float:
        """Median over rounds of the ratio within a round."""
        return statistics.median(x / y for x, y in zip(samples[a], samples[b], strict=True))

    return {
        "shape": shape.name,
        "grid": shape.grid,
        "tile": shape.tile,
        "heads": given.heads,
        "head_dim": shape.head_dim,
        "dtype": str(given.dtype).removeprefix("torch."),
        "density": given.resolved.densities[0],
        "default_ms": 1e3 * statistics.median(samples[default]),
        "tuned_ms": 1e3 * statistics.median(samples[tuned.candidate]),
        "best_ms": 1e3 * statistics.median(samples[best]),
        "tuned_over_best": ratio(tuned.candidate, best),
        "default_over_best": ratio(default, best),
        "tuned": str(tuned.candidate),
        "best": str(best),
        "measurements": tuned.measurements,
        "tuning_s": tuning,
        "candidates": count,
        "exhaustive_s": searching,
        "error": tuned.error,
    }


COLUMNS: dict[str, Callable[[Any], str]] = {
    "shape": str,
    "head_dim": str,
    "density": "{:.3f}".format,
    "default_ms": "{:.1f}".format,
    "tuned_ms": "{:.1f}".format,
    "best_ms": "{:.1f}".format,
    "tuned_over_best": "{:.3f}".format,
    "default_over_best": "{:.3f}".format,
    "tuned": str,
    "best": str,
    "tuning_s": "{:.0f}".format,
}


def summarize(rows: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "shapes": len(rows),
        "worst_tuned_over_best": max(row["tuned_over_best"] for row in rows),
        "geomean_tuned_over_best": geomean([row["tuned_over_best"] for row in rows]),
        "worst_default_over_best": max(row["default_over_best"] for row in rows),
        "geomean_default_over_best": geomean([row["default_over_best"] for row in rows]),
        "geomean_speedup": geomean([row["default_ms"] / row["tuned_ms"] for row in rows]),
    }


def main(argv: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--heads", type=int, default=1, help="of each shape; more multiply all candidates alike")
    parser.add_argument("--dtype", default="float32", choices=sorted(DTYPES))
    parser.add_argument("--rounds", type=int, default=5, help="turns of the exhaustive search")
    parser.add_argument("--threads", type=int, help="torch threads")
    parser.add_argument("--quick", action="store_true", help="one small shape, for continuous integration")
    parser.add_argument("--build", action="store_true", help="only build the kernels")
    parser.add_argument(
        "--only", nargs="+", choices=[s.name for s in SHAPES], help="these shapes; other rows of the JSON file stay"
    )
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    args = parser.parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    rows, began = [], time.perf_counter()
    for shape in QUICK if args.quick else [s for s in SHAPES if args.only is None or s.name in args.only]:
        given = problem(shape, args.heads, DTYPES[args.dtype])
        build(given, candidates(given, Candidate(given.resolved.plan.lowering), "full"))
        if args.build:
            print(f"{shape.name}: built after {time.perf_counter() - began:.0f} s", flush=True)
            continue
        made = row(shape, given, args.rounds)
        print(
            f"{shape.name}: tuned {made['tuned_over_best']:.3f}, default {made['default_over_best']:.3f} of the best "
            f"({time.perf_counter() - began:.0f} s so far)",
            flush=True,
        )
        rows.append(made)
    if args.build:
        return {}
    if args.only and args.json and args.json.exists():
        rows = replace_rows(json.loads(args.json.read_text())["rows"], rows, ["shape"])
    summary = summarize(rows)
    print_table("Tuned kernel against exhaustive search (interleaved medians)", COLUMNS, rows)
    print(", ".join(f"{name} {value:.3f}" for name, value in summary.items()))
    if args.json:
        write_json(args.json, "autotune_cpu", rows, summary)
    return summary


if __name__ == "__main__":
    main()
