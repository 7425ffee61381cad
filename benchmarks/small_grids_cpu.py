"""Which lowering is fastest on small grids: the generated CPU kernel, boxes and torch's dense attention, in turns.

The generated kernel packs keys and values before it begins and is called through ctypes; on a few hundred tokens that
could cost more than it saves. ``lowering="auto"`` follows what this table says (:mod:`fpscompile.passes.plan_sites`).
At density 1 all three compute the same; below, dense attention is there for comparison only.

    python benchmarks/small_grids_cpu.py [--quick] [--dtype float32 ...] [--json PATH]
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[1])]

from _harness import geomean, interleave, print_table, write_json
from attention_cpu import COLUMNS, DTYPES, Shape, Sparsity, ours, peer

GRIDS = ((2, 8, 8), (4, 8, 8), (4, 8, 16), (4, 16, 16), (8, 16, 16), (8, 16, 32))
"""128 to 4096 tokens."""
QUICK_GRIDS = GRIDS[2:3]
HEADS = (2, 12)
TILE = (2, 4, 4)
DENSITIES = (1.0, 0.25)
LOWERINGS = ("cpp", "boxes")


def measure(shape: Shape, density: float, rounds: int) -> dict[str, Any]:
    """One row of the table."""
    resolved = {name: Sparsity(TILE, density).resolve(shape, name) for name in LOWERINGS}
    times = interleave(
        {"peer": peer(shape, False)} | {name: ours(shape, plan, False) for name, plan in resolved.items()},
        rounds=rounds,
        budget=2.0,
    )
    return {
        "tokens": shape.tokens,
        "grid": shape.grid,
        "heads": shape.heads,
        "head_dim": shape.head_dim,
        "dtype": shape.precision,
        "density": resolved["cpp"].densities[0],
        "peer_ms": 1e3 * times["peer"],
        "cpp_ms": 1e3 * times["cpp"],
        "boxes_ms": 1e3 * times["boxes"],
        "over_dense": times["peer"] / times["cpp"],
        "over_boxes": times["boxes"] / times["cpp"],
    }


def main(argv: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--quick", action="store_true", help="one grid, for continuous integration")
    parser.add_argument("--dtype", nargs="+", choices=list(DTYPES), default=["float32"])
    parser.add_argument("--rounds", type=int, default=101, help="turns per row")
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    args = parser.parse_args(argv)
    rows = [
        measure(Shape(grid, heads, head_dim, dtype), density, 3 if args.quick else args.rounds)
        for dtype in args.dtype
        for grid in (QUICK_GRIDS if args.quick else GRIDS)
        for heads in HEADS
        for head_dim in (64, 128)
        for density in DENSITIES
    ]
    formats = {name: form for name, form in COLUMNS.items() if name in rows[0]}
    formats |= dict.fromkeys(("cpp_ms", "boxes_ms"), "{:.2f}".format)
    formats |= dict.fromkeys(("over_dense", "over_boxes"), "{:.2f}x".format)
    print_table("the generated kernel on small grids", formats, rows)
    exact, sparse = ([row for row in rows if (row["density"] == 1) is dense] for dense in (True, False))
    summary = {
        "over_dense_at_density_1": {"geomean": geomean([r["over_dense"] for r in exact]),
                                    "lowest": min(r["over_dense"] for r in exact)},
        "over_boxes_below": {"geomean": geomean([r["over_boxes"] for r in sparse]),
                             "lowest": min(r["over_boxes"] for r in sparse)},
    }  # fmt: skip
    for name, of in summary.items():
        print(f"{name}: geomean {of['geomean']:.2f}x, lowest {of['lowest']:.2f}x")
    if args.json:
        write_json(args.json, "small_grids_cpu", rows, summary)
    return summary


if __name__ == "__main__":
    main()
