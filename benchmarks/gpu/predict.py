"""Predicted speed of the attention kernels on H100 and H200 for Wan 14B at 720p: tile and density varied.

    python benchmarks/gpu/predict.py

Compiles the kernels for sm_90 (no GPU needed), ranks their configs with fpscompile.gpu.cost_model, and writes
benchmarks/results/gpu_predictions.json and docs/performance.md.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import textwrap
from pathlib import Path
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)  # kernels are compiled here

import torch
import triton
from rich.console import Console
from rich.table import Table

from fpscompile.gpu import cost_model
from fpscompile.gpu.config import candidates, rows_of
from fpscompile.gpu.tables import tables_of
from fpscompile.kernel_spec import KernelSpec
from fpscompile.plan import PhasePlan, Plan, resolve

ROOT = Path(__file__).resolve().parents[2]
RESULT = ROOT / "benchmarks/results/gpu_predictions.json"
PAGE = ROOT / "docs/performance.md"

GRID, HEADS, DIM = (21, 45, 80), 40, 128  # Wan 14B at 720p, 81 frames
TILES = ((4, 4, 4), (2, 8, 8), (4, 8, 8), (6, 8, 8), (7, 9, 4))
DENSITIES = (1.0, 0.5, 0.2, 0.1, 0.09, 0.05)
SDPA_TFLOPS = 648.0
"""Assumed for dense bf16 SDPA on either GPU: FlashAttention-3's published 16-bit forward on an H100 (d = 128, 16k)."""


def spec_of(tile: tuple[int, int, int], quant: str) -> KernelSpec:
    """Both kernels see bfloat16 inputs."""
    return KernelSpec(target="cuda:90", dtype="bfloat16", head_dim=DIM, value_dim=DIM, tile=tile, quant=quant)


def problem_of(spec: KernelSpec, density: float, rows: int) -> tuple[cost_model.Problem, float]:
    """The launch for one density, and the share of the query-key pairs that it keeps."""
    plan = Plan(tile=spec.tile, phases=(PhasePlan(density=density),), quant=spec.quant)
    tokens = GRID[0] * GRID[1] * GRID[2]
    resolved = resolve(plan, GRID, tokens, tokens)
    tables = tables_of(resolved, torch.device("cpu"))
    blocks = tables.query_blocks(rows)
    units = tables.keys.count[0, 0, blocks[:, 0].long()]
    per_step = max(1, spec.block_n // tables.unit)
    steps = int((-(-units // per_step)).sum())
    index, count = tables.keys.index[0, 0], tables.keys.count[0, 0]
    listed = torch.arange(index.shape[1])[None] < count[:, None]
    keys = (tables.keys.valid[index.long()] * listed).sum(1)
    pairs = int((keys * resolved.q_layout.sizes()).sum())
    return cost_model.Problem(tokens, HEADS, 1, HEADS * len(blocks), HEADS * steps, pairs), pairs / tokens**2


def main() -> None:
    """Predict, print, write."""
    rankings = {}
    for tile in TILES:
        for quant in ("fp8", "none"):
            spec = spec_of(tile, quant)
            rankings[tile, quant] = spec, cost_model.rank(spec, candidates(spec))
    rows = [row(*rankings[tile, quant], density, gpu) for tile in TILES for quant in ("fp8", "none")
            for density in DENSITIES for gpu in cost_model.GPUS]  # fmt: skip
    spec, ranking = rankings[(4, 8, 8), "fp8"]
    ranked = [ranked_row(item) for item in ranking]
    RESULT.write_text(
        json.dumps(
            {
                "what": "predictions of a static cost model",
                "problem": {"grid": GRID, "heads": HEADS, "head_dim": DIM, "sdpa_bf16_tflops_assumed": SDPA_TFLOPS},
                "versions": {"triton": triton.__version__, "torch": torch.__version__},
                "gpus": [dataclasses.asdict(gpu) for gpu in cost_model.GPUS],
                "efficiency": cost_model.EFFICIENCY,
                "predictions": rows,
                "configs": {"tile": spec.tile, "quant": "fp8", "gpu": cost_model.H100.name, "ranked": ranked},
            },
            indent=1,
        )
        + "\n"
    )
    PAGE.write_text(page(rows, ranked))
    console = Console()
    console.print(table(rows))
    console.print(f"wrote {RESULT.relative_to(ROOT)} and {PAGE.relative_to(ROOT)}")


def row(
    spec: KernelSpec, ranking: tuple[cost_model.Ranked, ...], density: float, gpu: cost_model.Gpu
) -> dict[str, Any]:
    """One line of the table: the config that is fastest by prediction."""
    first = ranking[0]
    assert first.prediction is not None, first.reason
    prediction = cost_model.predict(first.report, spec, first.config, gpu)
    problem, kept = problem_of(spec, density, rows_of(first.config, spec))
    kernel, prepass = cost_model.seconds(prediction, spec, problem, gpu)
    steps_alone, _ = cost_model.seconds(prediction, spec, problem, gpu, start_cycles=0)
    dense = 4 * problem.tokens**2 * DIM * HEADS
    sdpa = dense / (SDPA_TFLOPS * 1e12)
    return {
        "gpu": gpu.name,
        "tile": list(spec.tile),
        "quant": spec.quant,
        "density_asked": density,
        "density": round(kept, 4),
        "config": dataclasses.asdict(first.config),
        "kernel_ms": round(kernel * 1e3, 2),
        "prepass_ms": round(prepass * 1e3, 2),
        "tflops_on_kept_pairs": round(dense * kept / kernel / 1e12),
        "programs": problem.programs,
        "steps": problem.steps,
        "programs_per_sm": prediction.programs_per_sm,
        "tflops_of_steps_alone": round(dense * kept / steps_alone / 1e12),
        "tflops_with_prepass": round(dense * kept / (kernel + prepass) / 1e12),
        "limit": prediction.cycles.limit,
        "sdpa_bf16_ms_assumed": round(sdpa * 1e3, 1),
        "speedup": round(sdpa / (kernel + prepass), 2),
    }


def ranked_row(item: cost_model.Ranked) -> dict[str, Any]:
    """One config of the search."""
    prediction, loop = item.prediction, item.report.main_loop
    return {
        "config": dataclasses.asdict(item.config),
        "registers": item.report.registers,
        "shared_bytes": item.report.shared_bytes,
        "instructions_per_step": loop.total,
        "reason": item.reason,
        "programs_per_sm": prediction and prediction.programs_per_sm,
        "cycles": prediction and {k: round(v) for k, v in dataclasses.asdict(prediction.cycles).items()},
        "tflops": prediction and round(prediction.tflops),
        "bound_tflops": prediction and round(prediction.bound_tflops),
    }


HEADINGS = (
    "tile", "operands", "density", "config", "kernel ms", "pre-pass ms", "TFLOP/s", "vs SDPA bf16",
    "H200: pre-pass ms", "TFLOP/s", "vs SDPA bf16",
)  # fmt: skip


def cells(h100: dict[str, Any], h200: dict[str, Any]) -> list[str]:
    """One row as text; the two GPUs differ in memory only."""
    left = [
        "x".join(map(str, h100["tile"])),
        {"fp8": "FP8", "none": "bf16"}[h100["quant"]],
        f"{h100['density']:.3f}",
        name(h100["config"]),
        f"{h100['kernel_ms']:.1f}",
    ]
    for item in (h100, h200):
        left += [f"{item['prepass_ms']:.1f}", f"{item['tflops_with_prepass']}", f"{item['speedup']:.1f}x"]
    return left


def lines(rows: list[dict[str, Any]]) -> list[list[str]]:
    """All rows as text."""
    return [cells(h100, h200) for h100, h200 in zip(rows[::2], rows[1::2], strict=True)]


def name(config: dict[str, Any]) -> str:
    """A config in short: kernel and rows, and of the plain one warps and stages."""
    if config["variant"] == "hopper":
        return f"hopper {config['block_m']}"
    return f"plain {config['block_m']}, w{config['num_warps']} s{config['num_stages']}"


def table(rows: list[dict[str, Any]]) -> Table:
    """For a terminal."""
    result = Table(*HEADINGS, title="Predicted, not measured: Wan 14B 720p, 75,600 tokens, 40 heads x 128")
    for line in lines(rows):
        result.add_row(*line)
    return result


def markdown(headings: tuple[str, ...], body: list[list[str]]) -> str:
    """A table for the page."""
    rule = "|".join("---" for _ in headings)
    return "\n".join([f"| {' | '.join(headings)} |", f"|{rule}|", *(f"| {' | '.join(line)} |" for line in body)])


fill = functools.partial(textwrap.fill, width=120, break_long_words=False, break_on_hyphens=False)


def paddings() -> str:
    """Slots that the kernel visits per token, tile by tile."""
    parts = []
    for tile in TILES:
        spec = spec_of(tile, "fp8")
        problem, _ = problem_of(spec, 1.0, 128)
        rows = min(128, spec.tile_slots)
        ratio = problem.steps * rows * spec.block_n / (HEADS * problem.tokens**2)
        parts.append(f"{'x'.join(map(str, tile))} {ratio:.2f} times the work")
    return ", ".join(parts)


def page(rows: list[dict[str, Any]], ranked: list[dict[str, Any]]) -> str:
    """The text of docs/performance.md."""
    usable = [item for item in ranked if item["cycles"]]
    units = ("tensor", "exp", "issue", "half", "shared", "l2")
    configs = [
        [name(i["config"]), str(i["registers"]), str(i["programs_per_sm"]), str(i["instructions_per_step"])]
        + [str(i["cycles"][unit]) for unit in units]
        + [str(i["tflops"]), str(i["bound_tflops"])]
        for i in usable
    ]
    refused = [f"- {name(i['config'])}: {i['reason']}" for i in ranked if not i["cycles"]]
    best, plain = usable[0], next(i for i in usable if i["config"]["variant"] == "triton")
    cycles = best["cycles"]
    slowest = max(units, key=lambda unit: cycles[unit])
    padding = (
        f"Density is what whole tiles give for the asked {', '.join(f'{d:g}' for d in DENSITIES)}. Only 7x9x4 "
        f"divides this grid; slots that hold no token are computed all the same, in queries and in keys: {paddings()}."
    )
    verdict = (
        f"Tensor cores ({cycles['tensor']} cycles), exponentials ({cycles['exp']}) and issue slots ({cycles['issue']}) "
        "need about as long as one another, so what counts is that they work at the same time. The plain kernel waits "
        f"for each product before it goes on and relies on other warpgroups: {plain['tflops']} TFLOP/s predicted for "
        f"its best config ({name(plain['config'])}). The warp-specialized kernel keeps a product under way during the "
        f"softmax: {best['tflops']} TFLOP/s ({name(best['config'])}). With 5.5 TB/s assumed for the level-2 cache, its "
        f"busiest unit is `{slowest}`; 64 rows per program load twice the bytes per product and reach that limit first."
    )
    return f"""# Performance on GPUs: a prediction

**Nothing on this page was measured**, but for the {cost_model.START_CYCLES:,} cycles that a program takes beside its
steps, which are from [measured](performance_measured.md) times of one tile. The kernels are compiled for Hopper (sm_90)
without a GPU, the instructions of their main loop are counted in the binary, and a static model
(`fpscompile/gpu/cost_model.py`) turns counts, registers, shared memory and bytes into time.
`python benchmarks/gpu/predict.py` makes this page and `benchmarks/results/gpu_predictions.json`.

The case is Wan 14B at 720p: a grid of 21x45x80 = 75,600 tokens, 40 heads of 128 features, one batch element, forward.
"vs SDPA bf16" compares kernel plus pre-pass with dense attention at an **assumed** {SDPA_TFLOPS:.0f} TFLOP/s, the
16-bit forward that FlashAttention-3 publishes for an H100; TFLOP/s count kept query-key pairs only, pre-pass included
in the time. Each row uses the config with the highest predicted speed: "hopper" is the warp-specialized kernel, "plain"
the one for every target, followed by query rows per program, warps and pipeline stages. The two GPUs differ in memory
only, which the pre-pass feels.

{fill(padding)}

{markdown(HEADINGS, lines(rows))}

## What limits it

Cycles of a multiprocessor per step (one block of 128 keys by one warpgroup of 64 rows), FP8, tile 4x8x8, H100. "exp" is
the special-function unit, "issue" all instructions, "half" conversions, minima and maxima; "l2" the keys and values
that a program loads, which more rows per program share. "bound" is the speed if the busiest unit never waited,
"predicted" what remains of the model's overlap at an efficiency of {cost_model.EFFICIENCY}, which lies between two
published kernels.

{markdown(("config", "registers", "programs per SM", "instructions", *units, "predicted TFLOP/s", "bound"), configs)}

{fill(verdict)}
{chr(10).join(["", "Configs that were compiled and refused:", "", *refused]) if refused else ""}
"""


if __name__ == "__main__":
    main()
