"""README's picture, docs/speed.svg: whole steps on a GPU, from what ``benchmarks/gpu/model_gpu.py`` measured.

python benchmarks/speed_picture.py
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PICTURE = ROOT / "docs" / "speed.svg"

CASES = (("14B", "720p"), ("1.3B", "720p"), ("14B", "480p"), ("1.3B", "480p"))
BARS = (
    ("fps", 0.2, "#a9c1ee"),
    ("fps, static fp8 linears", 0.2, "#4a78d6"),
    ("fps, static fp8 linears", 0.09, "#1f3f80"),
)
"""Variant, density and colour."""


def speedups() -> dict[tuple[Any, ...], float]:
    """By model, size, variant and density; of 14B at 720p those that the tables of README.md have too."""
    found: dict[tuple[Any, ...], float] = {}
    for name in ("model_gpu", "model_gpu_sizes"):
        for row in json.loads((RESULTS / f"{name}.json").read_text())["rows"]:
            if "speedup" in row:
                found.setdefault((row["model"], row["size"], row["variant"], row["density"]), row["speedup"])
    return found


def draw(path: Path) -> None:
    """Write the picture; the same results give the same bytes."""
    speed = speedups()
    with matplotlib.rc_context({"svg.hashsalt": "speed", "svg.fonttype": "none", "font.size": 9}):
        figure, axes = pyplot.subplots(figsize=(8, 4), layout="constrained")
        for offset, (variant, density, colour) in enumerate(BARS):
            places = [index + (offset - 1) * 0.27 for index in range(len(CASES))]
            values = [speed[*case, variant, density] for case in CASES]
            label = f"{'and linear layers' if 'fp8' in variant else 'FP8 attention'}, density {density:g}"
            axes.bar_label(axes.barh(places, values, 0.25, color=colour, label=label), fmt="%.2fx", padding=3)
        axes.axvline(1, color="#1b2027", linewidth=1)
        axes.set_yticks(range(len(CASES)), [f"Wan {' '.join(case)}" for case in CASES])
        axes.invert_yaxis()
        axes.margins(x=0.08)
        axes.set_xlabel("one step on one H200: times as fast as torch.compile with Inductor in bf16")
        figure.legend(frameon=False, loc="outside upper center", ncols=len(BARS))
        axes.spines[["top", "right"]].set_visible(False)
        figure.savefig(path, metadata={"Date": None})
        pyplot.close(figure)


if __name__ == "__main__":
    draw(PICTURE)
