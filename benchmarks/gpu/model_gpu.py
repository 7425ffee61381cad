"""A whole Wan transformer step at true size on one GPU: eager, Inductor, fps, and fps with FP8 linear layers.

FP8 linear layers come with dynamic and with static scales (:mod:`fp8_linear`).

    python benchmarks/gpu/model_gpu.py [--models 1.3B 14B] [--sizes 480p 720p] [--density 0.2 0.09 0.05]
        [--variants inductor "fps, fp8 linears" "fps, static fp8 linears"] [--cuda-graphs] [--json PATH [--add]]

    torchrun --nproc-per-node 2 benchmarks/gpu/model_gpu.py ...      # Ulysses: N GPUs share the tokens of one step

Random weights, random latents, batch 1. Every variant compiles the repeated blocks (``compile_repeated_blocks``), so
that all pay the same compile. What has sparse attention gets a row for each density. Times are medians of CUDA-event
timings; memory is the peak above the weights: of what tensors ask for, and of what the allocator hands out, whose
blocks may be a mebibyte larger. With ``--cuda-graphs`` the step is also captured as one CUDA graph and replayed.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import torch
import torch.distributed as dist
import triton
from torch._dynamo.utils import counters

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[2])]

from fp8_linear import calibrated, replace_linears
from fuse_norms import FuseNorms

import fpscompile
from fpscompile.backend import fps  # by object: the package need not be installed

MODELS = {
    "1.3B": {"num_attention_heads": 12, "ffn_dim": 8960, "num_layers": 30},
    "14B": {"num_attention_heads": 40, "ffn_dim": 13824, "num_layers": 40},
}
GPUS, RANK = (int(os.environ.get(name, default)) for name, default in (("WORLD_SIZE", 1), ("RANK", 0)))
SIZES = {"480p": (21, 60, 104), "720p": (21, 90, 160)}
TILES = {"480p": (7, 6, 6), "720p": (7, 9, 4)}
"""Tiles that divide the grids, as :mod:`attention_gpu` has them."""
CALIBRATION = (5, 30, 52)
"""Frames, height and width of the latents that static scales are calibrated with."""


def build(name: str, layers: int | None, device: str = "cuda") -> torch.nn.Module:
    config = dict(MODELS[name])
    if layers:
        config["num_layers"] = layers
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            model = diffusers.WanTransformer3DModel(
                attention_head_dim=128, in_channels=16, out_channels=16, text_dim=4096, freq_dim=256,
                cross_attn_norm=True, qk_norm="rms_norm_across_heads", rope_max_seq_len=1024, **config,
            )  # fmt: skip
    finally:
        torch.set_default_dtype(torch.float32)
    return model.eval().requires_grad_(False)


def inputs(size: str) -> dict[str, Any]:
    return random_inputs(SIZES[size], 1)


def random_inputs(latents: tuple[int, int, int], seed: int, device: str = "cuda") -> dict[str, Any]:
    how: dict[str, Any] = {"generator": torch.Generator(device).manual_seed(seed), "device": device}
    how["dtype"] = torch.bfloat16
    return {
        "hidden_states": torch.randn(1, 16, *latents, **how),
        "timestep": torch.full((1,), 500.0, device=device),
        "encoder_hidden_states": torch.randn(1, 512, 4096, **how),
        "return_dict": False,
    }


def to_fp8(model: torch.nn.Module, which: str) -> dict[str, Any]:
    """Replaces the linear layers of the blocks as the variant's name has it; returns options for Inductor."""
    if not which.endswith("fp8 linears"):
        return {}
    scales = None
    if "static" in which:
        scales = calibrated(model.blocks, lambda: model(**random_inputs(CALIBRATION, 2)))
    replace_linears(model.blocks, scales=scales)
    return {"pre_grad_custom_pass": FuseNorms()} if scales else {}


@torch.no_grad()
def measure(model: torch.nn.Module, arguments: dict[str, Any], rounds: int) -> tuple[torch.Tensor, dict[str, float]]:
    """(output, figures) of steps launched from Python."""
    start = time.perf_counter()
    out = model(**arguments)[0]
    torch.cuda.synchronize()
    first = time.perf_counter() - start
    torch.cuda.reset_peak_memory_stats()
    weights = torch.cuda.memory_stats()
    times = []
    for _ in range(rounds):
        if GPUS > 1:
            dist.barrier()
        out, ms = timed(lambda: model(**arguments)[0])
        times.append(ms)
    stats = torch.cuda.memory_stats()
    peaks = {
        name: (stats[f"{kind}.all.peak"] - weights[f"{kind}.all.current"]) / 2**20
        for name, kind in (("peak_mib", "requested_bytes"), ("peak_allocated_mib", "allocated_bytes"))
    }
    return out, {"ms": statistics.median(times), "first_s": first, **peaks}


def timed(call: Callable[[], Any]) -> tuple[Any, float]:
    """(what ``call`` returns, milliseconds)."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    out = call()
    end.record()
    torch.cuda.synchronize()
    return out, begin.elapsed_time(end)


@torch.no_grad()
def replayed(
    model: torch.nn.Module, arguments: dict[str, Any], rounds: int, expected: torch.Tensor
) -> dict[str, float | str]:
    """Figures of the step as one CUDA graph; its output's distance is from the step launched from Python."""
    try:
        torch.cuda.empty_cache()
        before = torch.cuda.memory_reserved()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = model(**arguments)[0]
        kept = torch.cuda.memory_reserved() - before
        out.fill_(float("nan"))
        times = [timed(graph.replay)[1] for _ in range(rounds)]
        distance = ((out.float() - expected.float()).norm() / expected.float().norm()).item()
    except Exception as error:
        return {"graph_failed": f"{type(error).__name__}: {error}"[:300]}
    return {"graph_ms": statistics.median(times), "graph_mib": kept / 2**20, "graph_difference": distance}


def variant(
    name: str, size: str, which: str, density: float, options: argparse.Namespace
) -> tuple[torch.Tensor, dict[str, Any]]:
    torch._dynamo.reset()
    counters.clear()
    model, given = build(name, options.layers), inputs(size)
    whole = GPUS == 1  # diffusers' hook that shares out the tokens breaks the graph of the first block
    inner = to_fp8(model, which)
    if GPUS > 1:
        model.enable_parallelism(config=diffusers.ContextParallelConfig(ulysses_degree=GPUS))
    attachment = None
    if which.startswith("fps"):
        attachment = fpscompile.attach(model)
        tile = tuple(options.tile or TILES[size])
        how = {"tile": tile, "density": density, "quant": "none" if "bf16" in which else "fp8", "inner_options": inner}
        model.compile_repeated_blocks(backend=fps, fullgraph=whole, options=how)
    elif which != "eager":
        model.compile_repeated_blocks(backend="inductor", fullgraph=whole, options=inner or None)
    out, row = measure(model, given, options.rounds)
    if options.cuda_graphs:
        row |= replayed(model, given, options.rounds, out)
    row |= {"graphs": counters["stats"]["unique_graphs"], "model": name, "size": size}
    row |= {"variant": which, "density": density, "gpus": GPUS}
    if attachment is not None:
        attachment.detach()
    del model
    gc.collect()
    torch.cuda.empty_cache()
    return out, row


def rows_of(variants: list[str], densities: list[float]) -> list[tuple[str, float]]:
    """(variant, density) of every row: what has no sparse attention runs once."""
    return [(which, d) for which in variants for d in (densities if which.startswith("fps") else [1.0])]


def rows_there(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows of the file that new ones are added to."""
    if not options.add or not options.json or not Path(options.json).exists():
        return []
    found: list[dict[str, Any]] = json.loads(Path(options.json).read_text())["rows"]
    return found


def write(options: argparse.Namespace, rows: list[dict[str, Any]], there: list[dict[str, Any]]) -> None:
    """``rows``, and those of ``there`` that are of other models and sizes; by model and size."""
    if options.json:
        cases = {(row["model"], row["size"]) for row in rows}
        rows = [row for row in there if (row["model"], row["size"]) not in cases] + rows
        rows.sort(key=lambda row: (list(MODELS).index(row["model"]), list(SIZES).index(row["size"])))
        machine = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "triton": triton.__version__}
        report = {"benchmark": "model_gpu", "machine": machine, "options": vars(options), "rows": rows}
        Path(options.json).write_text(json.dumps(report, indent=1))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--models", nargs="+", default=list(MODELS))
    parser.add_argument("--sizes", nargs="+", default=list(SIZES))
    parser.add_argument(
        "--variants", nargs="+", default=["inductor", "inductor, fp8 linears", "fps", "fps, fp8 linears"]
    )
    parser.add_argument("--density", nargs="+", type=float, default=[0.2], help="of the rows with fps")
    parser.add_argument("--tile", type=int, nargs=3, default=None, help="default: one that fits the size")
    parser.add_argument("--cuda-graphs", action="store_true", help="also the whole step as one CUDA graph")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--layers", type=int, default=None)
    parser.add_argument("--json", default=None)
    parser.add_argument("--add", action="store_true", help="keep the file's rows of other models and sizes")
    options = parser.parse_args()
    if GPUS > 1:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("nccl")
    rows: list[dict[str, Any]] = []
    there = rows_there(options)
    for name in options.models:
        for size in options.sizes:
            base = None
            for which, density in rows_of(options.variants, options.density):
                try:
                    out, row = variant(name, size, which, density, options)
                except Exception as error:
                    print(name, size, which, density, "failed:", type(error).__name__, str(error)[:600], flush=True)
                    torch.cuda.empty_cache()
                    continue
                if which == "inductor":
                    base = (row["ms"], out)
                if base is not None:
                    row["speedup"] = base[0] / row["ms"]
                    row["difference"] = ((out.float() - base[1].float()).norm() / base[1].float().norm()).item()
                rows.append(row)
                if RANK == 0:
                    write(options, rows, there)
                    print({key: round(x, 3) if isinstance(x, float) else x for key, x in row.items()}, flush=True)
    if GPUS > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
