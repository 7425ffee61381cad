"""What calibration finds on a model whose heads are known, and how well its prediction holds on held-out samples.

The model's heads attend locally, within a frame, along time, and everywhere; two blocks, random latents, random steps.
For each error budget: the density with a window per head, the density with one window for all heads at the same error,
and the error predicted and measured.

    python benchmarks/calibrate_cpu.py [--samples 64] [--json PATH]
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(Path(__file__).resolve().parent), str(ROOT), str(ROOT / "tests")]

from _harness import print_table, write_json
from models.structured import Structured, samples

import fpscompile
from fpscompile.windows import window_text

GRID = (8, 16, 16)
TILE = (2, 4, 4)
ERRORS = (0.02, 0.05, 0.1, 0.2)


def row(max_error: float, count: int, folder: Path) -> dict[str, Any]:
    torch.manual_seed(0)
    model = Structured(GRID, sharpness=14.0).eval()
    began = time.perf_counter()
    report = fpscompile.calibrate(
        model, samples(count, GRID), max_error=max_error, options={"tile": TILE, "window": "dense"},
        path=folder / "tuning.json",
    )  # fmt: skip
    return {
        "max_error": max_error,
        "density": report.density,
        "one_window": report.uniform_density,
        "gain": report.uniform_density / report.density,
        "predicted": report.predicted,
        "measured": report.measured,
        "samples": report.samples,
        "held_out": report.held_out,
        "seconds": time.perf_counter() - began,
        "heads": {
            site.name: {heads: window_text(window) for heads, window in site.groups(0).items()} for site in report.sites
        },
    }


COLUMNS: dict[str, Callable[[Any], str]] = {
    "max_error": "{:.0%}".format,
    "density": "{:.3f}".format,
    "one_window": "{:.3f}".format,
    "gain": "{:.2f}x".format,
    "predicted": "{:.2%}".format,
    "measured": "{:.2%}".format,
    "held_out": str,
    "seconds": "{:.1f}".format,
}


def main(argv: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--samples", type=int, default=48, help="half of them are held out")
    parser.add_argument("--quick", action="store_true", help="one budget and few samples, for continuous integration")
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        errors, count = (ERRORS[1:2], 4) if args.quick else (ERRORS, args.samples)
        rows = [row(error, count, Path(folder)) for error in errors]
    summary = {
        "least_gain": min(row["gain"] for row in rows),
        "worst_prediction": max(abs(row["measured"] / row["predicted"] - 1) for row in rows),
    }
    print_table(f"Calibration on grid {GRID}, tile {TILE}: a window per head against one for all", COLUMNS, rows)
    print(", ".join(f"{name} {value:.3f}" for name, value in summary.items()))
    if args.json:
        write_json(args.json, "calibrate_cpu", rows, summary)
    return summary


if __name__ == "__main__":
    main()
