"""What choosing tiles by content costs, next to the attention that it serves.

    python benchmarks/topk_cost.py [--quick] [--device cuda] [--rounds N] [--json FILE]

``choose`` is ``fps::select_tiles`` (tile means, scores, the choice, packed), ``lists`` turns it into the lists that a
kernel reads. ``cost`` is both over ``attend``, the attention over those lists: it is to stay at or below 5 %. Measured
in turns; run it on a quiet machine.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))

from _harness import dims_text, interleave, print_table, write_json

import fpscompile.ops  # noqa: F401  (registers torch.ops.fps)
from fpscompile import lowerings, selection
from fpscompile.lowerings import cpp
from fpscompile.plan import PhasePlan, Plan, ResolvedPlan, resolve
from fpscompile.windows import FirstFrame, Sliding, TopK

BOUND = 0.05
TILE = (4, 8, 8)
SHAPES = (((21, 30, 52), 4, 128), ((32, 32, 32), 4, 64), ((16, 32, 32), 6, 128))
"""(grid, heads, head dim): Wan at 480p, a round 32k, and half of it."""
QUICK = (((8, 24, 24), 2, 64),)
WINDOWS = (TopK(0.1), TopK(0.25), Sliding((1, 2, 2)) | FirstFrame() | TopK(0.1))
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def synchronized(function: Any, device: torch.device) -> Any:
    """``function``, waiting for the device."""
    if device.type != "cuda":
        return function

    def run() -> None:
        function()
        torch.cuda.synchronize(device)

    return run


def lowering_for(dtype: torch.dtype, head_dim: int, plan: Plan, device: torch.device) -> str:
    """The fastest that takes a mask made per call."""
    return "cpp" if cpp.why_not(dtype, head_dim, head_dim, plan, device) is None else "gather"


def measure(shape: Any, dtype: str, window: Any, device: torch.device, rounds: int, budget: float) -> dict[str, Any]:
    """One row of the table."""
    grid, heads, head_dim = shape
    length = grid[0] * grid[1] * grid[2]
    sizes = (1, length, heads, head_dim)
    q, k, v = (torch.randn(sizes, device=device).to(DTYPES[dtype]).transpose(1, 2) for _ in range(3))
    plan = Plan(TILE, (PhasePlan(window),))
    plan = dataclasses.replace(plan, lowering=lowering_for(q.dtype, head_dim, plan, device))
    resolved = resolve(plan, grid, length, length)
    phase, text = torch.zeros(1, dtype=torch.int32, device=device), plan.to_json()
    span, scale = [0, length], head_dim**-0.5
    capacity = resolved.q_layout.video_tiles
    module = lowerings.get(plan.lowering)

    def choose() -> torch.Tensor:
        return torch.ops.fps.select_tiles(q, k, None, phase, list(grid), None, span, span, None, text, capacity)

    packed = choose()

    def lists() -> tuple[ResolvedPlan, Any]:
        return selection.masks_of_call(packed, q, k, None, (0,), resolved, scale)

    of_call, mask = lists()

    def attend() -> Any:
        return module.forward(q, k, v, key_mask=None, phases=(0,), resolved=of_call, scale=scale, block_mask=mask)

    functions = {"choose": choose, "lists": lists, "attend": attend}
    times = interleave({n: synchronized(f, device) for n, f in functions.items()}, rounds=rounds, budget=budget)
    return {
        "tokens": length,
        "grid": grid,
        "heads": heads,
        "head_dim": head_dim,
        "dtype": dtype,
        "window": window.text,
        "lowering": plan.lowering,
        "density": resolved.densities[0],
        **times,
        "cost": (times["choose"] + times["lists"]) / times["attend"],
    }


def _ms(seconds: float) -> str:
    return f"{1000 * seconds:.2f} ms"


COLUMNS = {
    "tokens": str,
    "grid": dims_text,
    "heads": str,
    "head_dim": str,
    "dtype": str,
    "window": str,
    "lowering": str,
    "density": lambda x: f"{x:.3f}",
    "choose": _ms,
    "lists": _ms,
    "attend": _ms,
    "cost": lambda x: f"{100 * x:.1f} %",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one small shape")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--budget", type=float, default=30.0, help="seconds per row")
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    args = parser.parse_args()
    torch.manual_seed(0)
    rows = [
        measure(shape, dtype, window, torch.device(args.device), args.rounds, args.budget)
        for shape in (QUICK if args.quick else SHAPES)
        for dtype in DTYPES
        for window in WINDOWS
    ]
    print_table("choosing tiles by content", COLUMNS, rows)
    long = [row["cost"] for row in rows if row["tokens"] >= 32_000]
    summary = {"bound": BOUND, "worst_cost": max(row["cost"] for row in rows)}
    if long:
        summary["worst_cost_at_32k"] = max(long)
        print(f"worst cost at 32k tokens: {100 * max(long):.1f} % of the attention (to be at most {100 * BOUND:.0f} %)")
    if args.json:
        write_json(args.json, "topk_cost", rows, summary)


if __name__ == "__main__":
    main()
