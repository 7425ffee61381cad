"""Block-sparse attention on a CPU against torch's dense attention, measured in turns in one run.

For each shape the peer is ``F.scaled_dot_product_attention`` on all tokens and ours is a lowering under a window.
Inputs come as models give them, ``[B, L, H, D].transpose(1, 2)``, so every copy that a lowering makes is inside its
figure. ``efficiency`` is ratio * density: 1 means that a kept query-key pair costs what it costs the peer.
``matmul_peak`` is the rate on kept pairs over that of torch's own matrix product of such operands, in the same run.
A precision is a dtype of the inputs, or "int8": bfloat16 inputs, quantized inside, against bfloat16 attention.

    python benchmarks/attention_cpu.py [--lowering boxes | cpp] [--precision float32 ...] [--density 0.25 ...]
        [--backward] [--flex] [--boxes] [--threads N] [--quick] [--json PATH]
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[1])]

from _harness import dims_text, geomean, int8_peak, interleave, matmul_peak, print_table, replace_rows, write_json

from fpscompile import lowerings
from fpscompile.plan import PhasePlan, Plan, ResolvedPlan, resolve

Triple = tuple[int, int, int]


@dataclass(frozen=True)
class Shape:
    """What the peer sees; all windows on it are measured in turns with one peer."""

    grid: Triple
    heads: int
    head_dim: int
    precision: str

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES.get(self.precision, torch.bfloat16)

    @property
    def quant(self) -> str:
        return self.precision if self.precision == "int8" else "none"

    @property
    def tokens(self) -> int:
        return math.prod(self.grid)


@dataclass(frozen=True)
class Sparsity:
    """What ours does on a shape: the largest window whose density is not above the bound, as ``options`` take it."""

    tile: Triple
    density: float

    def resolve(self, shape: Shape, lowering: str) -> ResolvedPlan:
        plan = Plan(self.tile, (PhasePlan(density=self.density),), lowering=lowering, quant=shape.quant)
        return resolve(plan, shape.grid, shape.tokens, shape.tokens)


GRIDS = {
    # tokens: (grid at head dim 64, grid at head dim 128, heads)
    8192: ((8, 32, 32), (8, 32, 32), 12),
    16384: ((16, 32, 32), (16, 32, 32), 6),
    32760: ((32, 32, 32), (21, 30, 52), 4),
}
"""Two at 32k: a round one, and Wan's at 480p, where tiles are ragged. Fewer heads there keep the run short."""

SPARSITIES = (Sparsity((4, 8, 8), 0.25), Sparsity((4, 8, 8), 0.1), Sparsity((2, 8, 8), 0.25))
"""Tiles of 256 and 128 tokens, unless densities are given."""

QUICK_GRIDS = {4608: ((8, 24, 24), (8, 24, 24), 2)}

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


PRECISIONS = (*DTYPES, "int8")


def shapes(quick: bool, precisions: Sequence[str] = tuple(DTYPES)) -> list[Shape]:
    return [
        Shape(grids[axis], grids[2], head_dim, precision)
        for grids in (QUICK_GRIDS if quick else GRIDS).values()
        for axis, head_dim in enumerate((64, 128))
        for precision in precisions
    ]


def peak_of(precision: str, size: int) -> float:
    """Operations per second of torch's own matrix product of such operands."""
    return int8_peak(size=size) if precision == "int8" else matmul_peak(DTYPES[precision], size=size)


def inputs(shape: Shape, seed: int = 0) -> list[torch.Tensor]:
    """q, k, v and the output's gradient, [1, H, L, D] with the strides of [1, L, H, D]."""
    generator = torch.Generator().manual_seed(seed)
    sizes = (1, shape.tokens, shape.heads, shape.head_dim)
    return [torch.randn(sizes, generator=generator).to(shape.dtype).transpose(1, 2) for _ in range(4)]


def peer(shape: Shape, backward: bool) -> Callable[[], Any]:
    """Dense attention, and its gradients if asked."""
    q, k, v, grad = inputs(shape)
    if not backward:
        return lambda: F.scaled_dot_product_attention(q, k, v)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    return lambda: torch.autograd.grad(F.scaled_dot_product_attention(*leaves), leaves, grad)


def ours(shape: Shape, resolved: ResolvedPlan, backward: bool) -> Callable[[], Any]:
    """The lowering, and its gradients if asked."""
    module = lowerings.get(resolved.plan.lowering)
    q, k, v, grad = inputs(shape)
    common: dict[str, Any] = {
        "key_mask": None, "phases": (0,), "resolved": resolved, "scale": shape.head_dim**-0.5
    }  # fmt: skip

    def forward() -> Any:
        return module.forward(q, k, v, **common)

    def both() -> Any:
        out, lse = module.forward(q, k, v, **common)
        return module.backward(grad, q, k, v, out, lse, **common)

    return both if backward else forward


def flex(shape: Shape, resolved: ResolvedPlan) -> Callable[[], Any]:
    """Compiled FlexAttention under the same mask, on tokens that lie in tile order already: its best case."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    order, sizes = resolved.q_layout.order(), resolved.q_layout.sizes()
    tile_of = torch.repeat_interleave(torch.arange(resolved.q_layout.n_tiles), sizes)
    visible = resolved.block_mask.to_dense(resolved.q_layout.n_tiles)[0, 0]
    q, k, v = (x[:, :, order] for x in inputs(shape)[:3])
    mask = create_block_mask(
        lambda b, h, i, j: visible[tile_of[i], tile_of[j]], None, None, shape.tokens, shape.tokens, device="cpu",
        BLOCK_SIZE=128,
    )  # fmt: skip
    compiled = torch.compile(flex_attention)

    def call() -> Any:
        with torch.no_grad():
            return compiled(q, k, v, block_mask=mask)

    return call


def error(shape: Shape, resolved: ResolvedPlan, samples: int = 64) -> float:
    """Relative error (norm over norm) of the output at some random queries, against float64."""
    q, k, v, _ = inputs(shape)
    scale = shape.head_dim**-0.5
    out, _ = lowerings.get(resolved.plan.lowering).forward(
        q, k, v, key_mask=None, phases=(0,), resolved=resolved, scale=scale
    )
    rows = torch.randperm(q.shape[2], generator=torch.Generator().manual_seed(1))[:samples]
    # the same tokens as queries of their own: their rows of the tile mask, expanded over the keys
    visible = _visible_rows(resolved, rows)
    scores = (q[0, :, rows].double() @ k[0].double().mT * scale).masked_fill(~visible, -torch.inf)
    expected = torch.softmax(scores, -1) @ v[0].double()
    return float((out[0, :, rows].double() - expected).norm() / expected.norm())


def _visible_rows(resolved: ResolvedPlan, rows: torch.Tensor) -> torch.Tensor:
    """bool [rows, L], from the tile mask that every lowering must obey."""
    layout = resolved.q_layout
    tile_of = torch.empty(layout.length, dtype=torch.int64)
    tile_of[layout.order()] = torch.repeat_interleave(torch.arange(layout.n_tiles), layout.sizes())
    return resolved.block_mask.to_dense(layout.n_tiles)[0, 0][tile_of[rows]][:, tile_of]


def measure(
    shape: Shape,
    sparsities: Sequence[Sparsity],
    *,
    lowering: str,
    backward: bool,
    beside: Sequence[str],
    rounds: int,
    budget: float,
    peak: float,
) -> Iterator[dict[str, Any]]:
    """Rows of the table for one shape: its windows, timed in turns with the peer and those of ``beside``: "flex", which
    is timed forward only, and "boxes"."""
    plans = {sparsity: sparsity.resolve(shape, lowering) for sparsity in sparsities}
    functions: dict[Any, Callable[[], Any]] = {"peer": peer(shape, backward)}
    functions |= {sparsity: ours(shape, resolved, backward) for sparsity, resolved in plans.items()}
    if "flex" in beside and not backward:
        functions |= {("flex", sparsity): flex(shape, resolved) for sparsity, resolved in plans.items()}
    if "boxes" in beside and shape.quant == "none":
        functions |= {
            ("boxes", sparsity): ours(shape, sparsity.resolve(shape, "boxes"), backward) for sparsity in plans
        }
    times = interleave(functions, rounds=rounds, budget=budget)
    # two matrix products forward; five more backward, one of which recomputes the scores
    products = 7 if backward else 2
    for sparsity, resolved in plans.items():
        density = resolved.densities[0]
        ratio = times["peer"] / times[sparsity]
        flops = 2 * products * shape.heads * shape.head_dim * density * shape.tokens**2
        yield {
            "tokens": shape.tokens,
            "grid": shape.grid,
            "tile": sparsity.tile,
            "window": resolved.windows[0],
            "heads": shape.heads,
            "head_dim": shape.head_dim,
            "dtype": shape.precision,
            "direction": "forward+backward" if backward else "forward",
            "lowering": lowering,
            "asked": sparsity.density,
            "density": density,
            "peer_ms": 1e3 * times["peer"],
            "ours_ms": 1e3 * times[sparsity],
            "ratio": ratio,
            "efficiency": ratio * density,
            "matmul_peak": flops / times[sparsity] / peak,
            "flex_ms": 1e3 * times[("flex", sparsity)] if ("flex", sparsity) in times else None,
            "boxes_ms": 1e3 * times[("boxes", sparsity)] if ("boxes", sparsity) in times else None,
            "error": error(shape, resolved),
        }


def summarize(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Over all rows, and for each precision; ratios by the density that was asked for."""
    summary: dict[str, Any] = {}
    for name in ("all", *PRECISIONS):
        some = [row for row in rows if name in ("all", row["dtype"])]
        if not some:
            continue
        values = [row["efficiency"] for row in some]
        summary[name] = {"geomean_efficiency": geomean(values), "min_efficiency": min(values), "rows": len(values)}
        if name != "all":
            groups = {density: [r for r in some if r["asked"] == density] for density in {r["asked"] for r in some}}
            summary[name]["ratio"] = {
                f"{density:g}": {"geomean": geomean([row["ratio"] for row in group]), "rows": len(group),
                                 "lowest_matmul_peak": min(row["matmul_peak"] for row in group)}
                for density, group in sorted(groups.items(), reverse=True)
            }  # fmt: skip
    return summary


KEYS = ("tokens", "grid", "tile", "window", "heads", "head_dim", "dtype", "direction", "lowering")


def _if_timed(ms: float | None) -> str:
    return "" if ms is None else f"{ms:.1f}"


COLUMNS: dict[str, Callable[[Any], str]] = {
    "tokens": str,
    "grid": dims_text,
    "tile": dims_text,
    "window": dims_text,
    "heads": str,
    "head_dim": str,
    "dtype": str,
    "peer_ms": "{:.1f}".format,
    "ours_ms": "{:.1f}".format,
    "density": "{:.3f}".format,
    "ratio": "{:.2f}x".format,
    "efficiency": "{:.2f}".format,
    "matmul_peak": "{:.0%}".format,
    "error": "{:.1e}".format,
    "flex_ms": _if_timed,
    "boxes_ms": _if_timed,
}


def main(argv: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--lowering", default="boxes", choices=sorted(lowerings.REGISTRY))
    parser.add_argument("--precision", nargs="+", choices=PRECISIONS, default=list(DTYPES))
    parser.add_argument("--density", nargs="+", type=float, help="with tiles of 256 tokens, instead of the usual three")
    parser.add_argument("--flex", action="store_true", help="time compiled FlexAttention under the same mask as well")
    parser.add_argument("--boxes", action="store_true", help="time the boxes lowering under the same mask as well")
    parser.add_argument("--backward", action="store_true", help="time forward and backward together")
    parser.add_argument("--quick", action="store_true", help="one small grid, for continuous integration")
    parser.add_argument("--rounds", type=int, default=7, help="turns per shape (at least 3)")
    parser.add_argument("--budget", type=float, default=10.0, help="seconds per shape, once 3 turns are done")
    parser.add_argument("--threads", type=int, help="torch threads; 1 is steadiest on a machine that others use too")
    parser.add_argument(
        "--filter",
        default="",
        help="only rows whose 'tokens dtype head_dim' contains this text; with --json they replace those of the file",
    )
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    args = parser.parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)

    peaks = {precision: peak_of(precision, 512 if args.quick else 2048) for precision in args.precision}
    sparsities = [Sparsity((4, 8, 8), density) for density in args.density] if args.density else SPARSITIES
    rows = []
    for shape in shapes(args.quick, args.precision):
        if args.filter not in f"{shape.tokens} {shape.precision} {shape.head_dim}":
            continue
        rows += measure(
            shape,
            sparsities,
            lowering=args.lowering,
            backward=args.backward,
            beside=[name for name in ("flex", "boxes") if getattr(args, name)],
            rounds=args.rounds,
            budget=args.budget,
            peak=peaks[shape.precision],
        )
    if args.filter and args.json and args.json.exists():
        rows = replace_rows(json.loads(args.json.read_text())["rows"], rows, KEYS)
    summary = summarize(rows)
    direction = "forward + backward" if args.backward else "forward"
    print_table(f"{args.lowering} against dense attention, {direction}", COLUMNS, rows)
    for name, values in summary.items():
        print(f"{name}: efficiency geomean {values['geomean_efficiency']:.3f}, minimum {values['min_efficiency']:.3f}")
        for density, of in values.get("ratio", {}).items():
            print(
                f"  density {density}: {of['geomean']:.2f}x, at least {of['lowest_matmul_peak']:.0%} of the matmul rate"
            )
    print("matmul rate: " + ", ".join(f"{name} {peak / 1e9:.0f} G/s" for name, peak in peaks.items()))
    if args.json:
        write_json(args.json, "attention_cpu", rows, {**summary, "matmul_rate": peaks})
    return summary


if __name__ == "__main__":
    main()
