"""A training step of attention on a CPU: ``backend="fps"`` against ``backend="inductor"``, measured in turns.

Both compile the same module and run it forward and backward, on 16,384 video tokens of 12 heads x 64:

* ``attention``: queries, keys and values are given, packed; what is timed is attention and the gradient of all three.
* ``module``: a self-attention module of that width, its four projections included, and the gradients of its input
  and weights. Projections cost the same on both sides.

``difference`` is that of the gradients at density 1, norm over norm, the largest of all of them: it must be rounding.

    python benchmarks/training_cpu.py [--dtype float32] [--density 0.1] [--threads N] [--quick] [--json PATH]

On a machine that others use too, keep it to some cores::

    taskset -c 0,1 python benchmarks/training_cpu.py --threads 2
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[1])]

from _harness import dims_text, interleave, print_table, replace_rows, write_json

import fpscompile
from fpscompile.backend import fps

Triple = tuple[int, int, int]
Gradients = tuple[torch.Tensor, ...]
RESULTS = Path(__file__).resolve().parent / "results"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
TARGET = 4.0


@dataclass(frozen=True)
class Case:
    grid: Triple
    """Tokens (t, h, w)."""
    tile: Triple
    heads: int
    head_dim: int = 64

    @property
    def tokens(self) -> int:
        return math.prod(self.grid)

    @property
    def width(self) -> int:
        return self.heads * self.head_dim


FULL = Case(grid=(16, 32, 32), tile=(4, 8, 8), heads=12)
QUICK = Case(grid=(4, 16, 16), tile=(2, 8, 8), heads=2)


class Attention(nn.Module):
    """Attention of given q, k and v: [B, L, 3 * H * D], as one projection would give them."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.heads = case.heads

    def forward(self, qkv: torch.Tensor) -> torch.Tensor:
        q, k, v = (x.unflatten(-1, (self.heads, -1)).transpose(1, 2) for x in qkv.chunk(3, -1))
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


class SelfAttention(nn.Module):
    """The same with projections, of x [B, L, heads * head_dim]."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.heads = case.heads
        self.q, self.k, self.v, self.out = (nn.Linear(case.width, case.width) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (project(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for project in (self.q, self.k, self.v))
        result: torch.Tensor = self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return result


def problem(case: Case, what: str, dtype: torch.dtype) -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    """The module to train, its input, and its output's gradient."""
    torch.manual_seed(0)
    alone = what == "attention"
    module = Attention(case) if alone else SelfAttention(case).to(dtype)
    x = torch.randn(1, case.tokens, case.width * (3 if alone else 1)).to(dtype).requires_grad_()
    return module, x, torch.randn(1, case.tokens, case.width).to(dtype)


def step(module: nn.Module, x: torch.Tensor, gradient: torch.Tensor, **how: Any) -> Callable[[], Gradients]:
    """Forward and backward of the compiled module, as a function of nothing; compiles at its first call."""
    forward = torch.compile(module, dynamic=False, **how)
    leaves = (x, *module.parameters())
    return lambda: torch.autograd.grad(forward(x), leaves, gradient)


def largest_difference(actual: Gradients, expected: Gradients, dtype: torch.dtype) -> float:
    """Over all gradients, norm over norm. One that is nothing but rounding does not count: a key's bias shifts all
    scores alike, so its gradient is 0."""
    norms = [float(b.double().norm()) for b in expected]
    least = torch.finfo(dtype).eps * max(norms)
    return max(
        float((a.double() - b.double()).norm()) / norm
        for a, b, norm in zip(actual, expected, norms, strict=True)
        if norm > least
    )


def measure(case: Case, what: str, name: str, *, density: float, rounds: int, budget: float) -> dict[str, Any]:
    """One row of the table."""
    torch._dynamo.reset()
    module, x, gradient = problem(case, what, DTYPES[name])
    options = {"tile": case.tile, "grid": case.grid, "strict": True}
    report = fpscompile.explain(module, x, options={**options, "density": density})
    site = next(site for site in report.sites if site.rewritten)
    torch._dynamo.reset()
    dense = step(module, x, gradient, backend="inductor")
    exact = step(module, x, gradient, backend=fps, options={**options, "density": 1.0})
    difference = largest_difference(exact(), dense(), DTYPES[name])
    sparse = step(module, x, gradient, backend=fps, options={**options, "density": density})
    times = interleave({"inductor": dense, "fps": sparse}, rounds=rounds, budget=budget)
    return {
        "what": what,
        "dtype": name,
        "tokens": case.tokens,
        "grid": case.grid,
        "tile": case.tile,
        "window": site.windows[0],
        "heads": case.heads,
        "lowering": site.lowering,
        "density": site.density[0],
        "inductor_s": times["inductor"],
        "fps_s": times["fps"],
        "ratio": times["inductor"] / times["fps"],
        "difference_at_density_1": difference,
    }


COLUMNS: dict[str, Callable[[Any], str]] = {
    "what": str,
    "dtype": str,
    "tokens": str,
    "tile": dims_text,
    "window": dims_text,
    "lowering": str,
    "density": "{:.3f}".format,
    "inductor_s": "{:.2f}".format,
    "fps_s": "{:.2f}".format,
    "ratio": "{:.2f}x".format,
    "difference_at_density_1": "{:.1e}".format,
}


def main(argv: list[str] | None = None) -> list[dict[str, Any]]:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--dtype", choices=tuple(DTYPES), help="one only; with --json, other rows of the file stay")
    parser.add_argument("--what", choices=("attention", "module"), help="one only; with --json, other rows stay")
    parser.add_argument("--density", type=float, default=0.1, help="upper bound on the kept fraction")
    parser.add_argument("--quick", action="store_true", help="a small block, for continuous integration")
    parser.add_argument("--rounds", type=int, default=5, help="turns (at least 3)")
    parser.add_argument("--budget", type=float, default=90.0, help="seconds per row, once 3 turns are done")
    parser.add_argument("--threads", type=int, help="torch threads")
    parser.add_argument("--json", type=Path, help="where the rows go (default: benchmarks/results, unless --quick)")
    args = parser.parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)

    case = QUICK if args.quick else FULL
    density = max(args.density, 0.3) if args.quick else args.density
    path = args.json or (None if args.quick else RESULTS / "training_cpu.json")
    rows = [
        measure(case, what, name, density=density, rounds=args.rounds, budget=args.budget)
        for name in ([args.dtype] if args.dtype else DTYPES)
        for what in ([args.what] if args.what else ("attention", "module"))
    ]
    if path and path.exists() and (args.dtype or args.what):
        rows = replace_rows(json.loads(path.read_text())["rows"], rows, ["what", "dtype"])
    title = f"forward + backward of attention, {case.tokens} tokens, {case.heads} heads x {case.head_dim}: seconds"
    print_table(title, COLUMNS, rows)
    if path:
        write_json(path, "training_cpu", rows, {"least_ratio": min(row["ratio"] for row in rows), "target": TARGET})
    return rows


if __name__ == "__main__":
    main()
