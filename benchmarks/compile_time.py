"""What our passes cost: their share of a cold compile, how they grow with depth, and what a second process reuses.

Every figure comes from a process of its own with a cache folder of its own, on a Wan transformer that is narrow (so
that running it costs nothing) and deep (so that compiling it costs what it costs in earnest).

* ``passes``: wall time of all our passes over the captured graph, in a fresh process.
* ``inductor``: first call minus second call under ``backend="inductor"``, imports excluded.
* ``fps``: the same under ``backend="fps"``; then again in a second process on the first one's caches.

    python benchmarks/compile_time.py [--blocks 10 20 40] [--quick] [--json PATH]
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[1])]

RESULTS = Path(__file__).resolve().parent / "results"
OPTIONS: dict[str, Any] = {"tile": (2, 4, 4), "schedule": "training_free", "strict": True}


def worker(job: str, blocks: int) -> dict[str, Any]:
    """Runs in a process of its own: one measurement as a dict."""
    import torch
    from diffusers import WanTransformer3DModel
    from torch._dynamo.utils import counters

    import fpscompile
    from fpscompile.backend import fps

    torch.compile(lambda x: x + 1)(torch.ones(8))  # imports and the compiler's self-test are nobody's cost
    counters.clear()
    torch.manual_seed(0)
    model = WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=32, text_dim=32, ffn_dim=128, num_layers=blocks
    ).eval()
    call = {  # by name, as pipelines call: that is how the timestep is known
        "hidden_states": torch.randn(1, 16, 4, 16, 16),
        "timestep": torch.tensor([500.0]),
        "encoder_hidden_states": torch.randn(1, 16, 32),
        "return_dict": False,
    }
    with torch.no_grad():
        if job == "passes":
            report = fpscompile.explain(model, options=OPTIONS, **call)
            each: dict[str, float] = {}
            for graph in report.graphs:
                for record in graph.passes:
                    each[record.name] = each.get(record.name, 0.0) + record.seconds
            return {"seconds": report.seconds, "rewritten": report.rewritten, "passes": each}
        how = {"backend": fps, "options": OPTIONS} if job == "fps" else {"backend": "inductor"}
        compiled = torch.compile(model, **how)
        seconds = []
        for _ in range(2):
            started = time.perf_counter()
            compiled(**call)
            seconds.append(time.perf_counter() - started)
    return {
        "seconds": seconds[0] - seconds[1],
        "fxgraph_cache_hit": counters["inductor"]["fxgraph_cache_hit"],
        "fxgraph_cache_miss": counters["inductor"]["fxgraph_cache_miss"],
        "autograd_cache_hit": counters["aot_autograd"]["autograd_cache_hit"],
        "autograd_cache_miss": counters["aot_autograd"]["autograd_cache_miss"],
    }


def measure(job: str, blocks: int, cache: Path) -> dict[str, Any]:
    """:func:`worker` in a new process whose Inductor and fps caches live in ``cache``."""
    env = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(cache / "inductor"), "FPS_CACHE_DIR": str(cache / "fps")}
    command = [sys.executable, __file__, "--worker", job, str(blocks)]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stdout}\n{done.stderr}")
    result: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return {"job": job, "blocks": blocks, **result}


def linearity(rows: list[dict[str, Any]]) -> float:
    """Seconds per block of the deepest model over those of the shallowest: 1 is linear, more is worse."""
    first, last = rows[0], rows[-1]
    return float((last["seconds"] / last["blocks"]) / (first["seconds"] / first["blocks"]))


COLUMNS: dict[str, Callable[[Any], str]] = {
    "job": str,
    "blocks": str,
    "seconds": "{:.2f}".format,
    "fxgraph_cache_hit": str,
    "fxgraph_cache_miss": str,
    "autograd_cache_hit": str,
}


def main(argv: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--blocks", type=int, nargs="+", default=[10, 20, 40], help="depths, the last compiled in full")
    parser.add_argument("--quick", action="store_true", help="1 and 2 blocks, for continuous integration")
    parser.add_argument("--json", type=Path, help="where the rows go (default: benchmarks/results, unless --quick)")
    parser.add_argument("--worker", nargs=2, metavar=("JOB", "BLOCKS"), help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.worker:
        result = worker(args.worker[0], int(args.worker[1]))
        print(json.dumps(result))
        return result

    from _harness import print_table, write_json

    depths = [1, 2] if args.quick else args.blocks
    with tempfile.TemporaryDirectory() as folder:
        caches = Path(folder)
        passes = [measure("passes", blocks, caches / f"passes{blocks}") for blocks in depths]
        inductor = measure("inductor", depths[-1], caches / "inductor")
        cold = measure("fps", depths[-1], caches / "shared")
        warm = measure("fps", depths[-1], caches / "shared")
    summary = {
        "blocks": depths[-1],
        "passes_s": passes[-1]["seconds"],
        "inductor_s": inductor["seconds"],
        "share": passes[-1]["seconds"] / inductor["seconds"],
        "linearity": linearity(passes),
        "fps_cold_s": cold["seconds"],
        "fps_warm_s": warm["seconds"],
        "warm_fxgraph_cache_hits": warm["fxgraph_cache_hit"],
        "warm_fxgraph_cache_misses": warm["fxgraph_cache_miss"],
    }
    rows = [*passes, inductor, {**cold, "job": "fps, cold"}, {**warm, "job": "fps, second process"}]
    print_table("compile time, seconds", COLUMNS, [{**dict.fromkeys(COLUMNS, "-"), **row} for row in rows])
    print(
        f"passes are {summary['share']:.1%} of Inductor's compile time at {depths[-1]} blocks; "
        f"cost per block grows {summary['linearity']:.2f}x from {depths[0]} to {depths[-1]} blocks"
    )
    path = args.json or (None if args.quick else RESULTS / "compile_time.json")
    if path:
        write_json(path, "compile_time", rows, summary)
    return summary


if __name__ == "__main__":
    main()
