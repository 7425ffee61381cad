"""How the generated CPU kernel scales: time per kept pair, memory beyond inputs and outputs, ragged grids.

Three tables. *length*: from 4k to 64k tokens at a fixed number of key tiles per query, time per kept query-key pair.
*memory*: the peak that a call adds to the process, against what the kernel says it needs: one packed copy of K and
V, the log-sum-exp and one scratch area per thread. *grids*: models' own grids, which no tile divides, against
neighbours that it does divide, measured in turns: time per kept pair again.

    python benchmarks/scaling_cpu.py [--dtype float32] [--heads 4] [--head-dim 64] [--quick] [--json PATH]
"""

from __future__ import annotations

import argparse
import gc
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[1])]

from _harness import dims_text, interleave, print_table, write_json

from fpscompile.lowerings import cpp
from fpscompile.plan import PhasePlan, Plan, ResolvedPlan, resolve

Triple = tuple[int, int, int]

TILE, WINDOW = (4, 8, 8), (2, 2, 2)
LENGTHS: dict[int, Triple] = {4096: (8, 16, 32), 16384: (16, 32, 32), 32768: (32, 32, 32), 65536: (64, 32, 32)}
GRIDS: list[tuple[str, Triple, int]] = [
    ("dividing", (20, 32, 48), 0),
    ("Wan 480p", (21, 30, 52), 0),
    ("dividing, text", (12, 32, 48), 256),
    ("CogVideoX", (13, 30, 45), 226),
]
QUICK_LENGTHS: dict[int, Triple] = {1024: (4, 16, 16), 2048: (8, 16, 16)}
QUICK_GRIDS: list[tuple[str, Triple, int]] = [("dividing", (4, 16, 16), 0), ("ragged", (5, 13, 18), 7)]


def plan_on(grid: Triple, text: int = 0) -> ResolvedPlan:
    video = math.prod(grid)
    plan = Plan(TILE, (PhasePlan(window=WINDOW),), lowering="cpp")
    return resolve(plan, grid, video + text, video + text)


def kept_pairs(resolved: ResolvedPlan) -> float:
    return resolved.densities[0] * resolved.q_layout.length**2


def call_on(resolved: ResolvedPlan, heads: int, head_dim: int, dtype: torch.dtype) -> Callable[[], Any]:
    tokens = resolved.q_layout.length
    q, k, v = (torch.randn(1, tokens, heads, head_dim).to(dtype).transpose(1, 2) for _ in range(3))
    return lambda: cpp.forward(q, k, v, key_mask=None, phases=(0,), resolved=resolved, scale=head_dim**-0.5)


def row_of(name: str, resolved: ResolvedPlan, heads: int, seconds: float) -> dict[str, Any]:
    pairs = kept_pairs(resolved) * heads
    return {
        "case": name,
        "grid": resolved.q_layout.grid,
        "tokens": resolved.q_layout.length,
        "density": resolved.densities[0],
        "ms": 1e3 * seconds,
        "ps_per_pair": 1e12 * seconds / pairs,
    }


def lengths(args: argparse.Namespace) -> list[dict[str, Any]]:
    cases = {str(n): plan_on(grid) for n, grid in (QUICK_LENGTHS if args.quick else LENGTHS).items()}
    calls = {name: call_on(resolved, args.heads, args.head_dim, args.dtype) for name, resolved in cases.items()}
    times = interleave(calls, rounds=args.rounds, budget=args.budget)
    return [row_of(name, resolved, args.heads, times[name]) for name, resolved in cases.items()]


def grids(args: argparse.Namespace) -> list[dict[str, Any]]:
    cases = {name: plan_on(grid, text) for name, grid, text in (QUICK_GRIDS if args.quick else GRIDS)}
    calls = {name: call_on(resolved, args.heads, args.head_dim, args.dtype) for name, resolved in cases.items()}
    times = interleave(calls, rounds=args.rounds, budget=args.budget)
    return [row_of(name, resolved, args.heads, times[name]) for name, resolved in cases.items()]


def peak_bytes() -> int:
    """High-water mark of this process's memory."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM")))


def memory(args: argparse.Namespace) -> list[dict[str, Any]]:
    """What a call adds to the process's peak; the same call on a small grid comes first, for what is paid once."""
    rows = []
    for grid in (QUICK_LENGTHS if args.quick else LENGTHS).values():
        resolved = plan_on(grid)
        call_on(plan_on((4, 8, 8)), args.heads, args.head_dim, args.dtype)()
        call = call_on(resolved, args.heads, args.head_dim, args.dtype)
        _ = resolved.block_mask
        gc.collect()
        Path("/proc/self/clear_refs").write_text("5")  # sets the mark back to what is held now
        before = peak_bytes()
        out = call()
        added = peak_bytes() - before
        tokens, item = resolved.q_layout.length, torch.empty(0, dtype=args.dtype).element_size()
        size = args.heads * args.head_dim * tokens
        compute = 4 if args.dtype != torch.bfloat16 or cpp.compute_of("bfloat16", resolved.plan) == "float32" else 2
        rows.append(
            {
                "case": str(tokens),
                "output_mib": (size * item + 4 * args.heads * tokens) / 2**20,
                "packed_kv_mib": 2 * size * compute / 2**20,
                "added_mib": added / 2**20,
                "rest_mib": (added - size * item - 4 * args.heads * tokens - 2 * size * compute) / 2**20,
            }
        )
        del out, call
    return rows


def main(argv: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--dtype", type=lambda name: getattr(torch, name), default=torch.float32)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--budget", type=float, default=60.0, help="seconds per table, once 3 turns are done")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(argv)
    tables = {"memory": memory(args), "length": lengths(args), "grids": grids(args)}
    forms: dict[str, Callable[[Any], str]] = {
        "case": str, "grid": dims_text, "tokens": str, "density": "{:.3f}".format,
        "ms": "{:.1f}".format, "ps_per_pair": "{:.1f}".format, "output_mib": "{:.1f}".format,
        "packed_kv_mib": "{:.1f}".format, "added_mib": "{:.1f}".format, "rest_mib": "{:.1f}".format,
    }  # fmt: skip
    for name, rows in tables.items():
        print_table(name, {key: forms[key] for key in rows[0]}, rows)
    costs = [row["ps_per_pair"] for row in tables["length"]]
    pairs = tables["grids"]
    summary = {
        "cost_of_a_pair_longest_over_shortest": costs[-1] / costs[0],
        "ragged_over_dividing": [
            ragged["ps_per_pair"] / even["ps_per_pair"] for even, ragged in zip(pairs[::2], pairs[1::2], strict=True)
        ],
        "largest_rest_mib": max(row["rest_mib"] for row in tables["memory"]),
    }
    print(summary)
    if args.json:
        rows = [{"table": name, **row} for name, rows in tables.items() for row in rows]
        write_json(args.json, "scaling_cpu", rows, summary)
    return summary


if __name__ == "__main__":
    main()
