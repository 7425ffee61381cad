"""What calibration finds on a model that was trained: the small Wan of ``examples/small_wan``, sampling.

Each sample is a clip made from its own noise, all of its denoising steps; half of the samples are held out. For each
error budget and set of candidates: the density with a window per head and phase; at the same error, that of one window
for all heads and phases of each site, of any family or of the static ones, and of one static window for the model; the
error predicted and measured. And how much of each head's attention its best tiles hold, whatever window might find
them: where a tenth of the tiles holds little, no window can.

    python benchmarks/calibrate_trained.py [--samples 32] [--steps 5] [--weights PATH] [--json PATH]
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(Path(__file__).resolve().parent), str(ROOT), str(ROOT / "examples")]

from _harness import dims_text, print_table, write_json
from small_wan import checkpoint, flow
from small_wan.model import Size, build, velocity

import fpscompile
from fpscompile.calibration.observe import Call, observed
from fpscompile.settings import Settings

WEIGHTS = ROOT / "examples" / "small_wan" / "weights.safetensors"
ERRORS = (0.05, 0.1, 0.2)
SHARES = (0.1, 0.25, 0.5)
"""Of the tiles."""
RANGES = ((0.0, 0.2), (0.2, 0.6), (0.6, 1.0))
"""Of denoising progress: the phases of the paper's schedule."""
SCHEDULE = [{"start": start, "end": end, "window": "dense"} for start, end in RANGES]


class Pipeline:
    """What calibration needs of a pipeline: its components, a scheduler, a loop over steps."""

    def __init__(self, weights: Path, steps: int) -> None:
        self.size = Size()
        self.transformer = build(self.size).eval()
        checkpoint.load_weights(weights, self.transformer, self.size.as_dict())
        self.levels = flow.shifted(torch.linspace(1, 0, steps + 1))
        self.scheduler = SimpleNamespace(timesteps=1000 * self.levels[:-1], step_index=0)
        self.components = {"transformer": self.transformer, "scheduler": self.scheduler}

    def __call__(self, seed: int) -> None:
        size = self.size
        shape = (1, 3, size.frames, size.pixels, size.pixels)
        x = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
        for index in range(len(self.levels) - 1):
            self.scheduler.step_index = index
            timestep = 1000 * self.levels[index : index + 1]
            x = x + (self.levels[index + 1] - self.levels[index]) * velocity(self.transformer, x, timestep, size)


def row(
    pipe: Pipeline, tile: Sequence[int], content: bool, means: bool, max_error: float, count: int, path: Path
) -> dict[str, Any]:
    began = time.perf_counter()
    report = fpscompile.calibrate(
        pipe, [{"seed": 1000 + seed} for seed in range(count)], max_error=max_error, path=path,
        options={"tile": tuple(tile), "schedule": SCHEDULE, "remainder": "means" if means else "none"},
        windows=["topk"] if content else [],
    )  # fmt: skip
    return {
        "tile": list(tile),
        "candidates": "windows, top-k" if content else "windows",
        "remainder": "means" if means else "none",
        "max_error": max_error,
        "density": report.density,
        "one_window": report.uniform_density,
        "gain": report.uniform_density / report.density,
        "one_for_model": report.single_density,
        "predicted": report.predicted,
        "measured": report.measured,
        "off": max(
            abs((site.measured or 0.0) / site.predicted - 1) if site.predicted else 0.0 for site in report.sites
        ),
        "held_out": report.held_out,
        "calls": min(site.held_out_calls for site in report.sites),
        "seconds": time.perf_counter() - began,
    }


def concentration(pipe: Pipeline, tile: Sequence[int], count: int) -> list[dict[str, Any]]:
    """For each head: the share of its attention in the heaviest tiles of each query tile, the mean over calls."""
    seen: dict[str, list[torch.Tensor]] = {}

    def look(call: Call) -> None:
        layout = call.resolved.q_layout
        order, tiles = layout.order(), layout.n_tiles
        q, k = call.q[0][:, order], call.k[0][:, order]
        p = torch.softmax(q @ k.mT * call.scale, -1)  # 512 tokens, which all tiles divide
        mass = p.unflatten(2, (tiles, -1)).sum(-1).unflatten(1, (tiles, -1)).mean(2)
        held = mass.sort(-1, descending=True).values.cumsum(-1).mean(1)
        seen.setdefault(call.site, []).append(held[:, [round(share * tiles) - 1 for share in SHARES]])

    settings = Settings.from_options({"tile": tuple(tile), "schedule": SCHEDULE})
    with torch.no_grad(), observed(pipe, settings, look) as runner:
        for seed in range(count):
            runner.run({"seed": 1000 + seed})
    return [
        {
            "tile": list(tile),
            "site": site,
            "head": head,
            **{f"in {share:.0%}": float(x) for share, x in zip(SHARES, held, strict=True)},
        }
        for site, calls in seen.items()
        for head, held in enumerate(torch.stack(calls).mean(0).tolist())
    ]


def beside_static(rows: list[dict[str, Any]]) -> None:
    """Writes into each row what one static window, with nothing of what it drops, needs at its error."""
    static = {r["max_error"]: r for r in rows if r["candidates"] == "windows" and r["remainder"] == "none"}
    for one in rows:
        one["one_static"] = static[one["max_error"]]["one_window"]
        one["gain_static"] = one["one_static"] / one["density"]
        one["gain_model"] = static[one["max_error"]]["one_for_model"] / one["density"]


COLUMNS: dict[str, Callable[[Any], str]] = {
    "tile": dims_text,
    "candidates": str,
    "remainder": str,
    "max_error": "{:.0%}".format,
    "density": "{:.3f}".format,
    "one_window": "{:.3f}".format,
    "gain": "{:.2f}x".format,
    "one_static": "{:.3f}".format,
    "gain_static": "{:.2f}x".format,
    "gain_model": "{:.2f}x".format,
    "predicted": "{:.2%}".format,
    "measured": "{:.2%}".format,
    "off": "{:.1%}".format,
    "held_out": str,
    "seconds": "{:.0f}".format,
}
HEADS: dict[str, Callable[[Any], str]] = {
    "site": str, "head": str, **{f"in {share:.0%}": "{:.0%}".format for share in SHARES}
}  # fmt: skip


def main(argv: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--samples", type=int, default=32, help="clips; half of them are held out")
    parser.add_argument("--steps", type=int, default=5, help="denoising steps of each")
    parser.add_argument("--tile", type=int, nargs=3, default=(2, 2, 2), metavar=("T", "H", "W"))
    parser.add_argument("--errors", type=float, nargs="+", default=ERRORS)
    parser.add_argument("--weights", type=Path, default=WEIGHTS)
    parser.add_argument("--quick", action="store_true", help="few samples, one budget, for continuous integration")
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    args = parser.parse_args(argv)
    errors, count = ([0.1], 4) if args.quick else (args.errors, args.samples)
    pipe = Pipeline(args.weights, args.steps)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for content, means in ((False, False), (True, False), (False, True), (True, True)):
            rows += [row(pipe, args.tile, content, means, error, count, Path(folder) / "t.json") for error in errors]
    beside_static(rows)
    heads = concentration(pipe, args.tile, 2 if args.quick else 8)
    summary = {
        "gain": [min(r["gain"] for r in rows), max(r["gain"] for r in rows)],
        "gain_static": [min(r["gain_static"] for r in rows), max(r["gain_static"] for r in rows)],
        "gain_model": [min(r["gain_model"] for r in rows), max(r["gain_model"] for r in rows)],
        "worst_prediction": max(r["off"] for r in rows),
        "heads": heads,
    }
    print_table(f"Calibration of {args.weights.name}: a window per head and phase against one for all", COLUMNS, rows)
    print_table(f"Attention in the heaviest tiles of each query tile, tile {dims_text(args.tile)}", HEADS, heads)
    if args.json:
        write_json(args.json, "calibrate_trained", rows, summary)
    return summary


if __name__ == "__main__":
    main()
