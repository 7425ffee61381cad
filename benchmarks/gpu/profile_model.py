"""What a Wan step is made of on one GPU: the time of every kernel of two blocks, and the speed of its matrix products.

    python benchmarks/gpu/profile_model.py [--variants ...] [--density 0.2] [--json PATH]

Two blocks of the 14B model at 720p with random weights, after two warm-up calls; kernel times are the profiler's. The
products are those of one block, on random operands, each by itself.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
from pathlib import Path
from typing import Any

import torch
import triton
import triton.testing
from torch.profiler import ProfilerActivity, profile

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[2])]

from model_gpu import build, inputs, to_fp8

import fpscompile
from fpscompile.backend import fps  # by object: the package need not be installed

LAYERS = 2
TOKENS = 75_600
PRODUCTS = ((5120, 5120), (5120, 13824), (13824, 5120))
"""(features in, features out) of a block's linear layers."""


def products() -> list[dict[str, Any]]:
    """TFLOP/s of each linear layer's product in bf16, and in FP8 with one scale per row or one per tensor."""
    found = []
    one = torch.ones((), device="cuda")
    for inside, outside in PRODUCTS:
        a = torch.randn(TOKENS, inside, device="cuda", dtype=torch.bfloat16)
        b = torch.randn(outside, inside, device="cuda", dtype=torch.bfloat16)
        a8, b8 = a.to(torch.float8_e4m3fn), b.to(torch.float8_e4m3fn).t()
        row, column = torch.rand(TOKENS, 1, device="cuda"), torch.rand(1, outside, device="cuda")
        calls = {"bf16": lambda a=a, b=b: a @ b.t()}
        for name, scales, fast in (
            ("fp8, a scale per row", (row, column), True),
            ("fp8, a scale per tensor", (one, one), True),
            ("fp8, a scale per tensor, exact accumulation", (one, one), False),
        ):
            calls[name] = lambda a8=a8, b8=b8, scales=scales, fast=fast: torch._scaled_mm(
                a8, b8, *scales, out_dtype=torch.bfloat16, use_fast_accum=fast
            )
        for name, call in calls.items():
            ms = triton.testing.do_bench(call, warmup=30, rep=150, return_mode="median")
            tflops = 2 * TOKENS * inside * outside / ms / 1e9
            found.append({"in": inside, "out": outside, "product": name, "ms": ms, "tflops": tflops})
    return found


def kernels(variant: str, density: float) -> list[dict[str, Any]]:
    """Kernels of one call of a model of LAYERS blocks, the longest first: name, launches, ms in all."""
    torch._dynamo.reset()
    model = build("14B", LAYERS)
    inner = to_fp8(model, variant)
    attachment = None
    if variant.startswith("fps"):
        attachment = fpscompile.attach(model)
        options = {"tile": (7, 9, 4), "density": density, "quant": "fp8", "inner_options": inner}
        model.compile_repeated_blocks(backend=fps, fullgraph=True, options=options)
    else:
        model.compile_repeated_blocks(backend="inductor", fullgraph=True, options=inner or None)
    arguments = inputs("720p")
    with torch.no_grad():
        for _ in range(2):
            model(**arguments)
        torch.cuda.synchronize()
        with profile(activities=[ProfilerActivity.CUDA]) as profiler:
            model(**arguments)
            torch.cuda.synchronize()
    if attachment is not None:
        attachment.detach()
    del model
    gc.collect()
    torch.cuda.empty_cache()
    found = [
        {"kernel": event.key, "launches": event.count, "ms": event.self_device_time_total / 1e3}
        for event in profiler.key_averages()
        if event.self_device_time_total > 0
    ]
    return sorted(found, key=lambda row: -row["ms"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--variants", nargs="+", default=["inductor", "fps", "fps, fp8 linears", "fps, static fp8 linears"]
    )
    parser.add_argument("--density", type=float, default=0.2, help="of the rows with fps")
    parser.add_argument("--json", default=None)
    options = parser.parse_args()
    report: dict[str, Any] = {
        "benchmark": "profile_model",
        "machine": {
            "gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "triton": triton.__version__,
        },
        "layers": LAYERS,
        "density": options.density,
        "products": products(),
        "variants": {variant: kernels(variant, options.density) for variant in options.variants},
    }  # fmt: skip
    for variant, rows in report["variants"].items():
        print(f"{variant}: {sum(row['ms'] for row in rows):.1f} ms, {LAYERS} blocks")
        for row in rows[:15]:
            print(f"{row['ms']:9.3f} ms {row['launches']:3}x {row['kernel'][:120]}")
    if options.json:
        Path(options.json).write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
