"""A stack of Wan blocks on a CPU: ``backend="fps"`` against ``backend="inductor"``, measured in turns in one run.

The model is diffusers' own ``WanTransformer3DModel`` (random weights) at the width of Wan 1.3B's smaller sisters: 12
heads x 64, feed-forward 3072, 2 layers, 16,384 video tokens. Inference, compile time excluded.

* ``attention share``: dense self-attention alone, timed on the same shapes, over the dense model's time.
* ``bound``: what is left if kept pairs cost what they cost the peer: 1 / (1 - share + share * density). A faster
  kernel can pass it.
* ``difference``: norm over norm of the outputs at density 1, which must be rounding.

    python benchmarks/model_cpu.py [--dtype float32] [--density 0.1] [--quick] [--json PATH]
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import WanTransformer3DModel

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[1])]

from _harness import dims_text, interleave, print_table, write_json

import fpscompile
from fpscompile.backend import fps

Triple = tuple[int, int, int]
RESULTS = Path(__file__).resolve().parent / "results"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
TARGETS = {"float32": 3.0, "bfloat16": 6.0}


@dataclass(frozen=True)
class Case:
    grid: Triple
    """Tokens (t, h, w); the latents have twice as many along h and w."""
    tile: Triple
    heads: int
    layers: int
    text: int = 128

    @property
    def tokens(self) -> int:
        return math.prod(self.grid)


FULL = Case(grid=(16, 32, 32), tile=(4, 8, 8), heads=12, layers=2)
QUICK = Case(grid=(4, 16, 16), tile=(2, 8, 8), heads=2, layers=1)


def model_and_inputs(case: Case, dtype: torch.dtype) -> tuple[torch.nn.Module, tuple[torch.Tensor, ...]]:
    """The transformer and (latents, timestep, text)."""
    torch.manual_seed(0)
    model = WanTransformer3DModel(
        num_attention_heads=case.heads,
        attention_head_dim=64,
        text_dim=256,
        ffn_dim=256 * case.heads,
        num_layers=case.layers,
    )
    for name, parameter in model.named_parameters():  # as from_pretrained(torch_dtype=...) would: norms stay float32
        if not set(name.split(".")) & set(model._keep_in_fp32_modules):
            parameter.data = parameter.data.to(dtype)
    t, h, w = case.grid
    latents, text = torch.randn(1, 16, t, 2 * h, 2 * w).to(dtype), torch.randn(1, case.text, 256).to(dtype)
    return model.eval().requires_grad_(False), (latents, torch.tensor([500.0]), text)


def compiled(model: torch.nn.Module, inputs: tuple[torch.Tensor, ...], **how: Any) -> Callable[[], torch.Tensor]:
    """One forward of the compiled model, as a function of nothing; compiles at its first call."""
    forward = torch.compile(model, **how)

    def run() -> torch.Tensor:
        with torch.no_grad():
            output: torch.Tensor = forward(*inputs, return_dict=False)[0]
        return output

    return run


def measure(case: Case, name: str, *, density: float, rounds: int, budget: float) -> dict[str, Any]:
    """One row of the table."""
    torch._dynamo.reset()
    dtype = DTYPES[name]
    model, inputs = model_and_inputs(case, dtype)
    options = {"tile": case.tile, "density": density, "strict": True}
    with torch.no_grad():
        site = next(
            s for s in fpscompile.explain(model, *inputs, options=options, return_dict=False).sites if s.rewritten
        )
    exact = compiled(model, inputs, backend=fps, options={"tile": case.tile, "density": 1.0, "strict": True})
    dense = compiled(model, inputs, backend="inductor")
    reference = dense().double()
    difference = float((exact().double() - reference).norm() / reference.norm())
    shape = (1, case.tokens, case.heads, 64)
    q, k, v = (torch.randn(shape).to(dtype).transpose(1, 2) for _ in range(3))
    times = interleave(
        {
            "inductor": dense,
            "fps": compiled(model, inputs, backend=fps, options=options),
            "attention": lambda: F.scaled_dot_product_attention(q, k, v),
        },
        rounds=rounds,
        budget=budget,
    )
    share = case.layers * times["attention"] / times["inductor"]
    kept = site.density[0]
    return {
        "dtype": name,
        "tokens": case.tokens,
        "grid": case.grid,
        "tile": case.tile,
        "window": site.windows[0],
        "layers": case.layers,
        "heads": case.heads,
        "lowering": site.lowering,
        "density": kept,
        "inductor_s": times["inductor"],
        "fps_s": times["fps"],
        "ratio": times["inductor"] / times["fps"],
        "attention_share": share,
        "bound": 1 / (1 - share + share * kept) if share < 1 else 1 / kept,
        "difference_at_density_1": difference,
    }


COLUMNS: dict[str, Callable[[Any], str]] = {
    "dtype": str,
    "tokens": str,
    "tile": dims_text,
    "window": dims_text,
    "lowering": str,
    "density": "{:.3f}".format,
    "inductor_s": "{:.2f}".format,
    "fps_s": "{:.2f}".format,
    "ratio": "{:.2f}x".format,
    "attention_share": "{:.0%}".format,
    "bound": "{:.2f}x".format,
    "difference_at_density_1": "{:.1e}".format,
}


def main(argv: list[str] | None = None) -> list[dict[str, Any]]:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--dtype", choices=tuple(DTYPES), help="one dtype only")
    parser.add_argument("--density", type=float, default=0.1, help="upper bound on the kept fraction")
    parser.add_argument("--tile", type=int, nargs=3, metavar=("T", "H", "W"))
    parser.add_argument("--quick", action="store_true", help="a small stack, for continuous integration")
    parser.add_argument("--rounds", type=int, default=5, help="turns (at least 3)")
    parser.add_argument("--budget", type=float, default=60.0, help="seconds per dtype, once 3 turns are done")
    parser.add_argument("--json", type=Path, help="where the rows go (default: benchmarks/results, unless --quick)")
    args = parser.parse_args(argv)

    case = QUICK if args.quick else FULL
    if args.tile:
        case = Case(case.grid, tuple(args.tile), case.heads, case.layers)
    density = max(args.density, 0.3) if args.quick else args.density
    names = [args.dtype] if args.dtype else list(DTYPES)
    rows = [measure(case, name, density=density, rounds=args.rounds, budget=args.budget) for name in names]
    print_table(f"Wan, {case.layers} layers, {case.heads} heads x 64: seconds per forward", COLUMNS, rows)
    summary = {row["dtype"]: {"ratio": row["ratio"], "target": TARGETS[row["dtype"]]} for row in rows}
    path = args.json or (None if args.quick else RESULTS / "model_cpu.json")
    if path:
        write_json(path, "model_cpu", rows, summary)
    return rows


if __name__ == "__main__":
    main()
