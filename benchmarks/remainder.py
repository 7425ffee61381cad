"""What ``remainder="means"`` gives and costs: a trained model without further training, and a kernel on this CPU.

Error: the small Wan of ``examples/small_wan``, its velocity under sparse attention against dense, relative L2, the mean
over noise levels of samples that it makes itself. Time: one attention call of 8,192 tokens, both ways in turn.

    python benchmarks/remainder.py [--samples 4] [--json PATH] [--quick]
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(Path(__file__).resolve().parent), str(ROOT), str(ROOT / "examples")]

from _harness import dims_text, interleave, print_table, write_json
from small_wan import checkpoint, flow
from small_wan.model import Size, build, velocity

from fpscompile import Backend, Settings, lowerings
from fpscompile.plan import PhasePlan, Plan, resolve
from fpscompile.remainder import extra_density

WEIGHTS = ROOT / "examples" / "small_wan" / "weights.safetensors"
STEPS = 5
TILES = ((2, 2, 2), (2, 4, 4))
DENSITIES = (0.1, 0.25, 0.5)
WAYS = ("none", "means")


def states(samples: int) -> tuple[torch.nn.Module, Size, list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]]:
    """(model, its size, [(noisy clip, timestep, dense velocity)]) along the dense model's own sampling."""
    size = Size()
    model = build(size).eval()
    checkpoint.load_weights(WEIGHTS, model, size.as_dict())
    levels = flow.shifted(torch.linspace(1, 0, STEPS + 1))
    seen = []
    for seed in range(samples):
        shape = (1, 3, size.frames, size.pixels, size.pixels)
        x = torch.randn(shape, generator=torch.Generator().manual_seed(2000 + seed))
        for index in range(STEPS):
            timestep = 1000 * levels[index : index + 1]
            v = velocity(model, x, timestep, size)
            seen.append((x, timestep, v))
            x = x + (levels[index + 1] - levels[index]) * v
    return model, size, seen


def errors(tiles: Sequence[Any], densities: Sequence[float], samples: int) -> list[dict[str, Any]]:
    model, size, seen = states(samples)
    rows = []
    for tile in tiles:
        for content in (False, True):
            for density in densities:
                row: dict[str, Any] = {"what": "error", "tile": list(tile), "asked": density}
                row["chosen by"] = "content" if content else "window"
                for way in WAYS:
                    torch._dynamo.reset()
                    options = {"tile": tile, "density": density, "inner": "eager", "remainder": way}
                    backend = Backend(Settings.from_options(options | ({"window": "topk"} if content else {})))
                    compiled = torch.compile(model, backend=backend)
                    off = [(velocity(compiled, x, t, size) - v).norm() / v.norm() for x, t, v in seen]
                    row[way] = float(torch.stack(off).mean())
                    (site, *_) = [site for graph in backend.graphs for site in graph.sites if site.rewritten]
                    row["density"] = site.density[0]
                row["ratio"] = row["none"] / row["means"]
                rows.append(row)
    return rows


def times(quick: bool) -> list[dict[str, Any]]:
    grid, tile = ((4, 16, 16), (4, 8, 8)) if quick else ((8, 32, 32), (4, 8, 8))
    length, rows = grid[0] * grid[1] * grid[2], []
    q, k, v = (torch.randn(1, length, 8, 64).transpose(1, 2) for _ in range(3))
    for density in (0.1, 0.25):
        calls: dict[str, Callable[[], Any]] = {}
        for way in WAYS:
            plan = Plan(tile, (PhasePlan(density=density),), clamp=True, lowering="boxes", remainder=way)
            resolved = resolve(plan, grid, length, length)
            lowering = lowerings.get("boxes")
            calls[way] = lambda resolved=resolved, lowering=lowering: lowerings.forward(
                lowering, q, k, v, key_mask=None, phases=(0,), resolved=resolved, scale=0.125
            )
        found = interleave(calls, rounds=3 if quick else 7)
        row = {"what": "time", "tile": list(tile), "asked": density, "density": resolved.densities[0]}
        row |= {way: 1e3 * found[way] for way in WAYS} | {"ratio": found["means"] / found["none"]}
        rows.append(row | {"chosen by": "window", "extra": extra_density(resolved)})
    return rows


def main(argv: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--samples", type=int, default=4, help="clips, of five denoising steps each")
    parser.add_argument("--quick", action="store_true", help="one tile, one density, for continuous integration")
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    args = parser.parse_args(argv)
    tiles, densities, samples = (TILES[:1], DENSITIES[1:2], 1) if args.quick else (TILES, DENSITIES, args.samples)
    with torch.no_grad():
        rows, timed = errors(tiles, densities, samples), times(args.quick)
    common: dict[str, Callable[[Any], str]] = {"tile": dims_text, "chosen by": str, "density": "{:.3f}".format}
    print_table(
        "Error of the model's output against dense attention, without and with the means of dropped tiles",
        {**common, "none": "{:.1%}".format, "means": "{:.1%}".format, "ratio": "{:.1f}x less".format}, rows,
    )  # fmt: skip
    print_table(
        "Milliseconds of one attention call, float32, lowering boxes",
        {**common, "none": "{:.0f}".format, "means": "{:.0f}".format, "ratio": "{:.2f}x".format}, timed,
    )  # fmt: skip
    summary = {"error": [min(r["ratio"] for r in rows), max(r["ratio"] for r in rows)],
               "time": [min(r["ratio"] for r in timed), max(r["ratio"] for r in timed)]}  # fmt: skip
    if args.json:
        write_json(args.json, "remainder", rows + timed, summary)
    return summary


if __name__ == "__main__":
    main()
