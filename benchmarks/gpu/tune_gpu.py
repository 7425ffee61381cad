"""What ``fpscompile.autotune`` finds on this machine for the attention of Wan: the winner beside the default.

    python benchmarks/gpu/tune_gpu.py [--models 14B 1.3B] [--sizes 720p 480p] [--latents T H W] [--tile T H W]
        [--density 0.2] [--effort quick] [--device cuda] [--json PATH]

One block of the model with random weights; attention of the other blocks is the same. ``speedup`` is the winner's over
the untuned default, timed in turns; 1 where nothing beat it.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import triton

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[2])]

from model_gpu import MODELS, SIZES, TILES, build, random_inputs

import fpscompile


def tuned(name: str, size: str, options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """What tuning one case gives."""
    model = build(name, 1, options.device)
    call = random_inputs(options.latents or SIZES[size], 1, options.device)
    how = {"tile": tuple(options.tile or TILES[size]), "density": options.density}
    began = time.perf_counter()
    report = fpscompile.autotune(model, effort=options.effort, options=how, path=folder / "tuning.json", **call)
    (group,) = report.groups
    row: dict[str, Any] = {"model": name, "size": size, **how, "took_s": time.perf_counter() - began}
    found = group.tuned
    if found is None:
        return row | {"failed": group.problem}
    row |= {"default": str(found.default), "default_ms": found.default_seconds * 1e3}
    row |= {"winner": str(found.candidate), "winner_ms": found.seconds * 1e3, "speedup": found.speedup}
    return row | {"error": found.error, "measurements": found.measurements, "tried": found.tried, "notes": found.notes}


def show(row: dict[str, Any]) -> None:
    name = f"Wan {row['model']} {row['size']}"
    if "failed" in row:
        print(f"{name}: failed: {row['failed']}", flush=True)
        return
    print(
        f"{name}: {row['default']} {row['default_ms']:.3f} ms; of {len(row['tried'])} tried {row['winner']} "
        f"{row['winner_ms']:.3f} ms, {row['speedup']:.2f}x, error {row['error']:.4f}; took {row['took_s']:.0f} s",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=["14B", "1.3B"])
    parser.add_argument("--sizes", nargs="+", choices=list(SIZES), default=["720p", "480p"], help="one for each model")
    parser.add_argument("--latents", nargs=3, type=int, help="instead of the size's")
    parser.add_argument("--tile", nargs=3, type=int, help="default: one that fits the size")
    parser.add_argument("--density", type=float, default=0.2)
    parser.add_argument("--effort", choices=("quick", "full"), default="quick")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if len(options.models) != len(options.sizes):
        parser.error(
            f"--models names {len(options.models)} and --sizes {len(options.sizes)}: give one size for each model"
        )
    torch.manual_seed(0)
    gpu = torch.cuda.get_device_name() if options.device == "cuda" else "none"
    machine = {"gpu": gpu, "torch": torch.__version__, "triton": triton.__version__}
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for name, size in zip(options.models, options.sizes, strict=True):
            row = tuned(name, size, options, Path(folder))
            rows.append(row)
            show(row)
            if options.json:
                report = {"benchmark": "tune_gpu", "machine": machine, "effort": options.effort, "rows": rows}
                options.json.write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
