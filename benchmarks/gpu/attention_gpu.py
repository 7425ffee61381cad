"""The attention kernels on one GPU against every dense bf16 SDPA backend, FlexAttention and our own bf16 form.

    python benchmarks/gpu/attention_gpu.py [--cases NAME ...] [--fitting | --tile T H W] [--more | --whole]
        [--flex [default autotuned given]] [--quants fp8 none] [--rounds N] [--json PATH [--add]]

Every kernel is timed as a CUDA graph, on random data, by CUDA events: small cases would else measure how fast Python
launches. Interleaved: every round times every kernel of a case for about as long, so that all meet the card equally
warm, since one at its power limit is 4 % slower than a cool one. Milliseconds are medians of the rounds' medians,
speedups medians of the rounds' ratios. Quantization, smoothing, permutes and scatter are inside every figure of ours;
"pre" is their share. Kept TFLOP/s count the query-key pairs of tokens that the mask keeps, nothing that padding adds;
"block_factor" is what the products of the kept blocks, padding inside, are over that.
The ceilings (bf16 and FP8 matrix products, copy) are measured first, in the same run.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import math
import statistics
import sys
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import triton
import triton.testing
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from fpscompile.gpu import operands
from fpscompile.gpu.call import spec_of
from fpscompile.gpu.tables import tables_of
from fpscompile.lowerings import triton as lowering
from fpscompile.plan import PhasePlan, Plan, ResolvedPlan, resolve

Grid = tuple[int, int, int]


@dataclass(frozen=True)
class Case:
    """One model's attention."""

    grid: Grid
    text: int
    heads: int
    dim: int
    tiles: tuple[Grid, ...]
    """The usual ones, and last those that fit the grid."""

    @property
    def length(self) -> int:
        return math.prod(self.grid) + self.text


USUAL = ((4, 4, 4), (2, 8, 8), (4, 8, 8), (6, 8, 8))
CASES = {
    "Wan 14B 720p": Case((21, 45, 80), 0, 40, 128, (*USUAL, (7, 9, 4))),
    "Wan 14B 480p": Case((21, 30, 52), 0, 40, 128, (*USUAL, (7, 6, 6))),
    "Wan 1.3B 480p": Case((21, 30, 52), 0, 12, 128, (*USUAL, (7, 6, 6))),
    "HunyuanVideo 720p": Case((33, 45, 80), 256, 24, 128, (*USUAL, (11, 9, 5), (3, 5, 16))),
    "CogVideoX": Case((13, 30, 45), 226, 48, 64, (*USUAL, (13, 2, 9))),
}
DETAILED = "Wan 14B 720p"
"""The case that is always measured with every tile and density."""
DENSITIES = (1.0, 0.5, 0.2, 0.1, 0.09, 0.05)
LEFT_OUT = (4, 4, 4), (2, 8, 8), (6, 8, 8)
"""Tiles, and densities, that other cases have with ``--more`` only."""
SELDOM = 0.5, 0.09, 0.05
FLEX: dict[str, dict[str, Any]] = {
    "default": {},
    "autotuned": {"mode": "max-autotune-no-cudagraphs"},
    "given": {"kernel_options": {"BLOCK_M": 64, "BLOCK_N": 64, "num_warps": 4, "num_stages": 3}},
}
"""How FlexAttention is compiled: as it is; autotuned; with the config that autotuning found for every case here on an
H200, to spare the minute that it takes. Once per case and number of blocks: masks are operands."""


def wanted(
    name: str, case: Case, densities: Collection[float], which: Literal["usual", "more", "whole"]
) -> list[tuple[Grid, float]]:
    """(tile, density) of a case's rows: the usual ones, those that these leave out, or all."""
    whole = list(itertools.product(case.tiles, densities))
    seldom = [pair for pair in whole if name != DETAILED and (pair[0] in LEFT_OUT or pair[1] in SELDOM)]
    return {"usual": [pair for pair in whole if pair not in seldom], "more": seldom, "whole": whole}[which]


def time_ms(call: Callable[[], object], budget_ms: int = 400) -> float:
    return triton.testing.do_bench(call, warmup=50, rep=budget_ms, return_mode="median")


def graphed(call: Callable[[], object], pool: Any) -> Callable[[], object]:
    """``call``, which has run before, as a CUDA graph. The graphs of a case share a pool: one runs at a time, and what
    it returns is not read. What ``call`` holds stays alive: the graph reads its operands where they are."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        call()

    def replay() -> object:
        graph.replay()
        return call

    return replay


def ceilings() -> dict[str, float]:
    """Measured peaks: TFLOP/s of 8192^3 products, TB/s of a copy (read and written)."""
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    a8, b8 = a.to(torch.float8_e4m3fn), b.to(torch.float8_e4m3fn).t().contiguous().t()
    one = torch.ones((), device="cuda")
    flop = 2 * 8192**3 / 1e9
    buffer = torch.empty(1 << 32, dtype=torch.uint8, device="cuda")
    return {
        "bf16_tflops": flop / time_ms(lambda: a @ b),
        "fp8_tflops": flop
        / time_ms(lambda: torch._scaled_mm(a8, b8, one, one, out_dtype=torch.bfloat16, use_fast_accum=True)),
        "copy_tbs": 2 * buffer.numel() / time_ms(buffer.clone) / 1e9,
    }


def draw(case: Case) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q, k, v as a model leaves them: transposes of [B, L, H, D], bf16."""
    shape = (1, case.length, case.heads, case.dim)
    q, k, v = (torch.randn(shape, device="cuda", dtype=torch.bfloat16).transpose(1, 2) for _ in range(3))
    return q, k, v


def peers(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, pool: Any) -> dict[str, Callable[[], object]]:
    """Dense SDPA by backend; one that refuses is left out."""
    found: dict[str, Callable[[], object]] = {}
    for backend in (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION):

        def call(backend: SDPBackend = backend) -> object:
            with sdpa_kernel(backend):
                return scaled_dot_product_attention(q, k, v)

        try:
            call()
        except RuntimeError as error:
            print(f"  {backend.name}: {str(error)[:100]}")
            continue
        found[backend.name] = graphed(call, pool)
    return found


def in_tile_order(resolved: ResolvedPlan, *parts: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Tensors [B, H, L, D] with their tokens in tile order, padded to whole blocks by copies of the first token."""
    token = tables_of(resolved, parts[0].device).q_token.long().clamp(min=0)
    return tuple(x[:, :, token].contiguous() for x in parts)


def flex(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    resolved: ResolvedPlan,
    mode: str | None = None,
    kernel_options: dict[str, Any] | None = None,
) -> tuple[Callable[[], object], torch.Tensor]:
    """FlexAttention of :func:`in_tile_order` tokens with the same mask, compiled for just these shapes as an entry of
    :data:`FLEX` tells; with it, what it gave, in the sequence's order.

    Raises what compiling it raises: its default config refuses blocks of 64.
    """
    from torch.nn.attention.flex_attention import BlockMask, flex_attention

    tables = tables_of(resolved, q.device)
    valid = tables.q_token >= 0
    keys, block = tables.keys, tables.unit
    per_tile = tables.slots // block
    count = keys.count[0, 0].repeat_interleave(per_tile)[None, None]
    index = keys.index[0, 0].repeat_interleave(per_tile, dim=0)[None, None].contiguous()
    columns = index.new_zeros(*index.shape[:3], valid.numel() // block)
    columns[..., : index.shape[-1]] = index

    def held(b: Any, h: Any, i: Any, j: Any) -> Any:
        return valid[j]

    compiled = torch.compile(flex_attention, dynamic=False, mode=mode)
    mask = BlockMask.from_kv_blocks(count, columns, BLOCK_SIZE=block, mask_mod=held)
    with torch._dynamo.config.patch(recompile_limit=64):  # one per tile and mode is more than the default's 8
        out = compiled(q, k, v, block_mask=mask, kernel_options=kernel_options)
    in_order = out.new_empty((*q.shape[:2], resolved.q_layout.length, v.shape[-1]))
    in_order[:, :, tables.q_token[valid].long()] = out[:, :, valid]
    return lambda: compiled(q, k, v, block_mask=mask, kernel_options=kernel_options), in_order


def error_against_float32(out: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor,
                          resolved: ResolvedPlan) -> float:  # fmt: skip
    """Relative L2 error of 512 rows of one head against float32 attention under the same mask."""
    rows = torch.randperm(q.shape[2], device=q.device)[:512].sort().values
    q_tile, k_tile = (_tile_of_token(layout, q.device) for layout in (resolved.q_layout, resolved.k_layout))
    dense = resolved.block_mask.to_dense(resolved.k_layout.n_tiles)[0, 0].to(q.device)
    scores = (q[0, 0, rows].float() @ k[0, 0].float().T) * q.shape[-1] ** -0.5
    scores = scores.masked_fill(~dense[q_tile[rows]][:, k_tile], float("-inf"))
    expected = scores.softmax(-1) @ v[0, 0].float()
    return ((out[0, 0, rows].float() - expected).norm() / expected.norm()).item()


def failure(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"[:300]


def block_factor(resolved: ResolvedPlan, block_m: int) -> float:
    """Pairs of slots in the blocks that the kernel multiplies, over the pairs of tokens that the mask keeps.

    A tile of 7x9x4 is 252 tokens in blocks of 128 rows and 128 keys: (256 / 252)^2.
    """
    tables = tables_of(resolved, torch.device("cpu"))
    tile = tables.query_blocks(block_m)[:, 0].long()
    slots = tables.keys.count[0, 0][tile].double().sum().item() * tables.unit * block_m
    return slots / (resolved.densities[0] * resolved.q_layout.length * resolved.k_layout.length)


def _tile_of_token(layout: Any, device: torch.device) -> torch.Tensor:
    tiles = torch.repeat_interleave(torch.arange(layout.n_tiles), layout.sizes())
    return torch.empty_like(tiles).scatter_(0, layout.order(), tiles).to(device)


Timed = tuple[dict[str, Any], Callable[[], object]]
"""A row of the table, without its times, and what is timed for it."""


def ours(
    name: str, case: Case, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, pool: Any, *, flexes: Collection[str],
    pairs: list[tuple[Grid, float]], quants: tuple[str, ...],
) -> Iterator[Timed]:  # fmt: skip
    """Our kernels on one case, and beside those in FP8 ``flexes``, of :data:`FLEX`; a row that failed has the reason
    under "failed"."""
    phase = torch.zeros(1, dtype=torch.int32, device="cuda")
    scale = case.dim**-0.5
    ordered: dict[Grid, tuple[torch.Tensor, ...]] = {}  # by tile: a copy for every mask would not fit the card
    for (tile, density), quant in itertools.product(pairs, quants):
        plan = Plan(tile=tile, phases=(PhasePlan(density=density),), clamp=True, quant=quant, lowering="triton")
        resolved = resolve(plan, case.grid, case.length, case.length)
        spec = spec_of(q, k, v, None, resolved)
        config = lowering.config_of(spec, q.device)

        def call(resolved: ResolvedPlan = resolved) -> torch.Tensor:
            return lowering.forward(q, k, v, key_mask=None, phases=phase, resolved=resolved, scale=scale)[0]

        row: dict[str, Any] = {
            "case": name, "kernel": f"fps {quant} ({config.variant})", "tile": tile,
            "window": resolved.windows[0], "density": resolved.densities[0], "pre_ms": 0.0,
            "block_factor": block_factor(resolved, config.block_m),
        }  # fmt: skip
        try:
            row["error"] = error_against_float32(call(), q, k, v, resolved)
            timed = graphed(call, pool)
            if quant == "fp8":
                tables = tables_of(resolved, q.device)

                def pack(spec: Any = spec, tables: Any = tables) -> object:
                    return operands.pack(q, k, v, None, phase, spec, tables, ("tile",), scale)

                pack()
                row["pre_ms"] = time_ms(graphed(pack, pool))
        except Exception as error:
            row["failed"] = failure(error)
            timed = call
        yield row, timed
        if flexes and quant == "fp8":
            if tile not in ordered:
                ordered[tile] = in_tile_order(resolved, q, k, v)
            for how in flexes:
                kernel = "FlexAttention bf16" if how == "default" else f"FlexAttention bf16, {how}"
                row = {key: row[key] for key in ("case", "tile", "density")} | {"kernel": kernel}
                try:
                    run, out = flex(*ordered[tile], resolved, **FLEX[how])
                    row["error"] = error_against_float32(out, q, k, v, resolved)
                    timed = graphed(run, pool)
                except Exception as error:
                    row["failed"] = failure(error)
                yield row, timed


def rows_of(
    name: str,
    case: Case,
    *,
    flexes: Collection[str],
    pairs: list[tuple[Grid, float]],
    quants: tuple[str, ...],
    rounds: int,
) -> list[dict[str, Any]]:
    """All rows of a case, timed in turn."""
    torch.compiler.reset()  # else FlexAttention's masks of several cases would be more than one function may have
    q, k, v = draw(case)
    pool = torch.cuda.graph_pool_handle()
    timed: list[Timed] = [
        ({"case": name, "kernel": backend, "density": 1.0}, call) for backend, call in peers(q, k, v, pool).items()
    ]
    dense = range(len(timed))
    timed += ours(name, case, q, k, v, pool, flexes=flexes, pairs=pairs, quants=quants)
    running = [index for index, (row, _) in enumerate(timed) if "failed" not in row]
    times = [{index: time_ms(timed[index][1]) for index in running} for _ in range(rounds)]
    flop = 4 * case.length**2 * case.dim * case.heads
    for index in running:
        row = timed[index][0]
        row["ms"] = statistics.median(one[index] for one in times)
        row["speedup"] = statistics.median(min(one[peer] for peer in dense) / one[index] for one in times)
        row["pre_share"] = row.get("pre_ms", 0.0) / row["ms"]
        row["kept_tflops"] = flop * row["density"] / (row["ms"] - row.get("pre_ms", 0.0)) / 1e9
    return [row for row, _ in timed]


def show(row: dict[str, Any], peak: float) -> None:
    if "failed" in row:
        print(f"{row['case']:18} {row['kernel']:20} {row['tile']!s:10} FAILED {row['failed']}", flush=True)
        return
    print(
        f"{row['case']:18} {row['kernel']:20} {row.get('tile', '')!s:10} {row['density']:6.3f} {row['ms']:8.2f} ms "
        f"{row['speedup']:6.2f}x {row['kept_tflops']:6.0f} TFLOP/s {row['kept_tflops'] / peak:5.0%} "
        f"pre {row.get('pre_share', 0):4.0%} err {row.get('error', 0):.4f}",
        flush=True,
    )


def earlier(path: Path, machine: dict[str, str]) -> dict[str, Any]:
    """The report at ``path``, which new rows are added to.

    Raises:
        ValueError: it is of another GPU, torch or Triton.
    """
    report: dict[str, Any] = json.loads(path.read_text())
    if report["machine"] != machine:
        raise ValueError(f"{path} is of {report['machine']}, this run of {machine}: give --json another file")
    only = {"cases": sorted({row["case"] for row in report["rows"]})}
    report.setdefault("runs", [only | {key: report[key] for key in ("ceilings", "rounds")}])
    return report


def added(there: dict[str, Any], report: dict[str, Any]) -> dict[str, Any]:
    """``report`` with the rows that ``there`` has of other cases. Each of its "runs" has ceilings and rounds of its
    own; those at the top are the last one's."""
    cases = {row["case"] for row in report["rows"]}
    rows = [row for row in there["rows"] if row["case"] not in cases] + report["rows"]
    rows.sort(key=lambda row: list(CASES).index(row["case"]))
    runs = [run | {"cases": [case for case in run["cases"] if case not in cases]} for run in there["runs"]]
    return report | {"rows": rows, "runs": [run for run in runs if run["cases"]] + report["runs"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", default=list(CASES))
    parser.add_argument("--densities", nargs="+", type=float, default=list(DENSITIES))
    tiles, rows_made = parser.add_mutually_exclusive_group(), parser.add_mutually_exclusive_group()
    tiles.add_argument("--fitting", action="store_true", help="only the tile that fits the grid")
    tiles.add_argument("--tile", nargs=3, type=int, help="only this one, at every density")
    rows_made.add_argument("--more", action="store_const", dest="which", const="more", default="usual",
                           help="only what is left out without: see LEFT_OUT, SELDOM")  # fmt: skip
    rows_made.add_argument("--whole", action="store_const", dest="which", const="whole",
                           help="every tile at every density")  # fmt: skip
    parser.add_argument("--flex", nargs="*", choices=FLEX, default=(),
                        help="also FlexAttention under each of the masks, beside FP8, compiled as named; with no name,"
                             " by default and autotuned")  # fmt: skip
    parser.add_argument("--rounds", type=int, default=3, help="times that each kernel of a case gets its turn")
    parser.add_argument("--quants", nargs="+", choices=("fp8", "none"), default=("fp8", "none"))
    parser.add_argument("--json", type=Path, default=None)
    parser.add_argument("--add", action="store_true", help="keep the file's rows of other cases")
    options = parser.parse_args()
    flexes = list(FLEX)[:2] if options.flex == [] else options.flex
    torch.manual_seed(0)
    machine = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "triton": triton.__version__}
    there = earlier(options.json, machine) if options.add and options.json and options.json.exists() else None
    peaks = ceilings()
    print("ceilings:", {name: round(value, 2) for name, value in peaks.items()}, flush=True)
    report = {"benchmark": "attention_gpu", "machine": machine, "ceilings": peaks, "rounds": options.rounds}
    rows: list[dict[str, Any]] = []
    for name in options.cases:
        try:
            case = CASES[name]
            if options.fitting:
                case = dataclasses.replace(case, tiles=case.tiles[-1:])
            if options.tile:
                pairs = [(tuple(options.tile), density) for density in options.densities]
            else:
                pairs = wanted(name, case, options.densities, options.which)
            if not pairs:
                continue
            found = rows_of(name, case, flexes=flexes, pairs=pairs, quants=tuple(options.quants), rounds=options.rounds)
            rows += found
            for row in found:
                show(row, peaks["fp8_tflops"])
        except Exception as error:  # the other cases are worth having
            print(f"{name}: {type(error).__name__}: {error}"[:400], flush=True)
        torch.cuda.empty_cache()
        if options.json and rows:
            run = {
                "cases": list(dict.fromkeys(row["case"] for row in rows)),
                "ceilings": peaks,
                "rounds": options.rounds,
            }
            whole = report | {"rows": rows, "runs": [run]}
            options.json.write_text(json.dumps(added(there, whole) if there else whole, indent=1))


if __name__ == "__main__":
    main()
