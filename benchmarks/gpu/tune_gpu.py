"""What ``fpscompile.autotune`` finds on this machine for the attention of real models: the winner beside the default.

    python benchmarks/gpu/tune_gpu.py [--cases NAME ...] [--density 0.2] [--effort quick] [--device cuda] [--json PATH]

One Wan block with a model's heads and head dim, random weights, at the model's resolution; attention of the other
blocks is the same. ``speedup`` is the winner's over the untuned default, timed in turns; 1 where nothing beat it.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import diffusers
import torch
import triton

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import fpscompile

CASES: dict[str, tuple[int, tuple[int, int, int], tuple[int, int, int]]] = {
    "Wan 14B 720p": (40, (21, 90, 160), (7, 9, 4)),
    "Wan 1.3B 480p": (12, (21, 60, 104), (7, 6, 6)),
    "small": (1, (4, 16, 16), (2, 4, 4)),
}
"""Heads of 128 features, latents (t, h, w), tile. The last is for trying this script out."""


def tuned(name: str, options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """What tuning one case gives."""
    heads, latents, tile = CASES[name]
    model = diffusers.WanTransformer3DModel(
        num_attention_heads=heads, attention_head_dim=128, in_channels=16, out_channels=16, text_dim=64, freq_dim=64,
        ffn_dim=256, num_layers=1, cross_attn_norm=True, qk_norm="rms_norm_across_heads", rope_max_seq_len=1024,
    )  # fmt: skip
    model = model.eval().requires_grad_(False).to(options.device, torch.bfloat16)
    made = {"device": options.device, "dtype": torch.bfloat16}
    call = {
        "hidden_states": torch.randn(1, 16, *latents, **made),
        "timestep": torch.full((1,), 500.0, device=options.device),
        "encoder_hidden_states": torch.randn(1, 512, 64, **made),
        "return_dict": False,
    }
    how = {"tile": tile, "density": options.density}
    began = time.perf_counter()
    report = fpscompile.autotune(model, effort=options.effort, options=how, path=folder / "tuning.json", **call)
    (group,) = report.groups
    row: dict[str, Any] = {"case": name, "tile": tile, "density": options.density}
    row["took_s"] = time.perf_counter() - began
    found = group.tuned
    if found is None:
        return row | {"failed": group.problem}
    row |= {"default": str(found.default), "default_ms": found.default_seconds * 1e3}
    row |= {"winner": str(found.candidate), "winner_ms": found.seconds * 1e3, "speedup": found.speedup}
    return row | {"error": found.error, "measurements": found.measurements, "tried": found.tried, "notes": found.notes}


def show(row: dict[str, Any]) -> None:
    if "failed" in row:
        print(f"{row['case']}: failed: {row['failed']}", flush=True)
        return
    print(
        f"{row['case']}: {row['default']} {row['default_ms']:.3f} ms; of {len(row['tried'])} tried {row['winner']} "
        f"{row['winner_ms']:.3f} ms, {row['speedup']:.2f}x, error {row['error']:.4f}; took {row['took_s']:.0f} s",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=["Wan 14B 720p", "Wan 1.3B 480p"])
    parser.add_argument("--density", type=float, default=0.2)
    parser.add_argument("--effort", choices=("quick", "full"), default="quick")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.manual_seed(0)
    gpu = torch.cuda.get_device_name() if options.device == "cuda" else "none"
    machine = {"gpu": gpu, "torch": torch.__version__, "triton": triton.__version__}
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for name in options.cases:
            row = tuned(name, options, Path(folder))
            rows.append(row)
            show(row)
            if options.json:
                report = {"benchmark": "tune_gpu", "machine": machine, "effort": options.effort, "rows": rows}
                options.json.write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
