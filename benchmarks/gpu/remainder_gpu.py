"""What ``remainder="means"`` costs on a GPU: FP8 attention of Wan 14B at 720p with the means of dropped tiles.

Both ways in turn; medians of rounds. Memory is what a call needs beyond q, k, v and what was allocated before it.

    python benchmarks/gpu/remainder_gpu.py [--rounds 5] [--json PATH]
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import torch
import triton
from attention_gpu import CASES, draw, time_ms

from fpscompile import lowerings
from fpscompile.plan import PhasePlan, Plan, resolve
from fpscompile.remainder import extra_density

CASE = "Wan 14B 720p"
CHOICES = (((7, 9, 4), 0.2), ((7, 9, 4), 0.09), ((4, 8, 8), 0.2), ((4, 4, 4), 0.2))
WAYS = ("none", "means")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.manual_seed(0)
    case = CASES[CASE]
    q, k, v = draw(case)
    phase = torch.zeros(1, dtype=torch.int32, device="cuda")
    rows = []
    for tile, density in CHOICES:
        row: dict[str, Any] = {"case": CASE, "tile": tile}
        calls = {}
        for way in WAYS:
            plan = Plan(tile, (PhasePlan(density=density),), clamp=True, quant="fp8", lowering="triton", remainder=way)
            resolved = resolve(plan, case.grid, case.length, case.length)
            call = {"key_mask": None, "phases": phase, "resolved": resolved, "scale": case.dim**-0.5}
            calls[way] = lambda call=call: lowerings.forward(lowerings.get("triton"), q, k, v, **call)
            row |= {"density": resolved.densities[0], "extra": extra_density(resolved)}
            calls[way]()
            torch.cuda.synchronize()
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            calls[way]()
            torch.cuda.synchronize()
            row[f"{way}_mib"] = (torch.cuda.max_memory_allocated() - before) / 2**20
        times = [{way: time_ms(calls[way]) for way in WAYS} for _ in range(options.rounds)]
        row |= {way: statistics.median(one[way] for one in times) for way in WAYS}
        ratios = [one["means"] / one["none"] for one in times]
        row |= {"ratio": statistics.median(ratios), "range": [min(ratios), max(ratios)]}
        rows.append(row)
        print({key: round(value, 3) if isinstance(value, float) else value for key, value in row.items()}, flush=True)
    machine = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "triton": triton.__version__}
    if options.json:
        report = {"benchmark": "remainder_gpu", "machine": machine, "rounds": options.rounds, "rows": rows}
        options.json.write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
