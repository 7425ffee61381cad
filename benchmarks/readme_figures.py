"""Figures from the JSON files in ``benchmarks/results``: all of them in docs/figures.md, a few in README.md.

python benchmarks/readme_figures.py [--check]
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import geometric_mean as geomean
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
README, PAGE = ROOT / "README.md", ROOT / "docs" / "figures.md"
START, END = "<!-- figures:start -->", "<!-- figures:end -->"

Row = tuple[str, str, str]
Reports = dict[str, dict[str, Any]]
"""What JSON files of one machine hold, by name."""


def attention(report: dict[str, Any]) -> list[Row]:
    """Block-sparse attention alone: how close to 1/density."""
    summary, rows = report["summary"]["all"], report["rows"]
    lengths = sorted({row["tokens"] for row in rows})
    densities = [row["density"] for row in rows]
    what = (
        f"attention alone, `boxes` against dense SDPA: {lengths[0]:,} to {lengths[-1]:,} tokens, head dim 64 and 128, "
        f"float32 and bfloat16, density {min(densities):.2f} to {max(densities):.2f}"
    )
    figure = f"{summary['geomean_efficiency']:.2f} of the ideal 1/density (lowest {summary['min_efficiency']:.2f})"
    return [(what, figure, ">= 0.85, lowest >= 0.75")]


AIMS = {
    # of the generated CPU kernel over dense attention: speed-up at density 1, at a quarter, at about a tenth
    "float32": (1.6, 8, 18),
    "bfloat16": (3.5, 14, 32),
    "int8": (4, 20, 45),
}


def generated(report: dict[str, Any]) -> list[Row]:
    """The generated kernel alone, by precision: speed-up over dense attention and share of the machine's peak."""
    out = []
    for precision, aims in AIMS.items():
        for (low, high), aim in zip(((0.9, 1.1), (0.15, 0.3), (0.0, 0.15)), aims, strict=True):
            some = [row for row in report["rows"] if row["dtype"] == precision and low <= row["density"] < high]
            if not some:
                continue
            ratios, peaks = [row["ratio"] for row in some], [row["matmul_peak"] for row in some]
            peer = "bfloat16" if precision == "int8" else precision
            what = f"{_direction(some[0])}, `cpp` in {precision} against dense {peer} SDPA, "
            what += f"density {some[0]['density']:.2f}"
            share = f"{min(peaks):.0%} to {max(peaks):.0%} of torch's matmul rate on kept blocks"
            figure = f"{geomean(ratios):.1f}x ({min(ratios):.1f}x to {max(ratios):.1f}x); {share}"
            out.append((what, figure, f">= {aim:g}x" if some[0]["direction"] == "forward" else ""))
    return [*out, *beside(report)]


def beside(report: dict[str, Any]) -> list[Row]:
    """The generated kernel over what else was timed under the same mask."""
    out = []
    for name, peer, aim in (("flex", "compiled FlexAttention", ">= 3x"), ("boxes", "`boxes`", ">= 1x")):
        some = [row for row in report["rows"] if row.get(f"{name}_ms")]
        if some:
            ratios = [row[f"{name}_ms"] / row["ours_ms"] for row in some]
            densities = [row["density"] for row in some]
            kinds = " and ".join(dict.fromkeys(row["dtype"] for row in some))
            what = (
                f"{_direction(some[0])}, `cpp` in {kinds} against {peer} with the same mask, "
                f"density {min(densities):.2f} to {max(densities):.2f}"
            )
            out.append((what, f"{geomean(ratios):.1f}x ({min(ratios):.1f}x to {max(ratios):.1f}x)", aim))
    return out


def _direction(row: dict[str, Any]) -> str:
    return "attention alone" if row["direction"] == "forward" else "attention alone, forward and backward"


def scaling(report: dict[str, Any]) -> list[Row]:
    """The generated kernel from 4k to 64k tokens, and on grids that no tile divides."""
    summary = report["summary"]
    lengths = [row["tokens"] for row in report["rows"] if row["table"] == "length"]
    return [
        (
            f"`cpp`: time of a kept pair at {max(lengths):,} tokens over that at {min(lengths):,}",
            f"{summary['cost_of_a_pair_longest_over_shortest']:.2f}",
            "1: linear",
        ),
        (
            "`cpp`: time of a kept pair on Wan's and CogVideoX's own grids over that on grids that tiles divide",
            ", ".join(f"{x:.2f}" for x in summary["ragged_over_dividing"]),
            "<= 1.10",
        ),
        (
            "`cpp`: memory beyond inputs, output and one packed copy of K and V",
            f"at most {summary['largest_rest_mib']:.1f} MiB",
            "log-sum-exp, scratch",
        ),
    ]


def topk(report: dict[str, Any]) -> list[Row]:
    """Choosing tiles by content."""
    costs = [row["cost"] for row in report["rows"]]
    what = f"choosing tiles by content, share of the attention it serves ({len(costs)} cases of 16k to 32k tokens)"
    return [(what, f"{min(costs):.1%} to {max(costs):.1%}", "<= 5 %")]


def tuning(report: dict[str, Any]) -> list[Row]:
    """The tuner beside exhaustive search."""
    tuned = [row["tuned_over_best"] for row in report["rows"]]
    default = [row["default_over_best"] for row in report["rows"]]
    return [
        (
            f"`fpscompile.autotune`, time over that of an exhaustive search's choice, {len(tuned)} model grids",
            f"{min(tuned):.2f} to {max(tuned):.2f}",
            "<= 1.05",
        ),
        ("the same of the untuned default", f"{min(default):.2f} to {max(default):.2f}", "reported"),
    ]


def calibration(report: dict[str, Any]) -> list[Row]:
    """A window per head beside one window for all."""
    gains = [row["gain"] for row in report["rows"]]
    off = max(abs(row["measured"] / row["predicted"] - 1) for row in report["rows"])
    budgets = ", ".join(f"{row['max_error']:.0%}" for row in report["rows"])
    held_out = min(row["held_out"] for row in report["rows"])
    return [
        (
            (
                f"`fpscompile.calibrate`, heads of known kinds, error budgets {budgets}: density of one window for all "
                "heads over that of a window per head, at equal error"
            ),
            f"{min(gains):.1f} to {max(gains):.1f}",
            ">= 1.5",
        ),
        (f"the same: error on {held_out} held-out samples, off the prediction by at most", f"{off:.1%}", "<= 20 %"),
    ]


def calibration_trained(report: dict[str, Any]) -> list[Row]:
    """The same on a trained model, with and without tiles chosen by content."""
    rows, summary = report["rows"], report["summary"]
    budgets = ", ".join(f"{error:.0%}" for error in dict.fromkeys(row["max_error"] for row in rows))
    out = []
    kinds = {
        ("windows", "none"): "windows",
        ("windows, top-k", "none"): "windows and tiles chosen by content",
        ("windows", "means"): 'windows, `remainder="means"`',
        ("windows, top-k", "means"): 'windows and tiles chosen by content, `remainder="means"`',
    }
    for (kind, remainder), names in kinds.items():
        some = [row for row in rows if (row["candidates"], row["remainder"]) == (kind, remainder)]
        model, site, alike = (
            ", ".join(f"{row[key]:.2f}" for row in some) for key in ("gain_model", "gain_static", "gain")
        )
        figure = f"{model} (of each site: {site}"
        figure += f"; over one top-k or window of each: {alike})" if kind != "windows" else ")"
        what = (
            f"`fpscompile.calibrate`, the trained small Wan sampling, error budgets {budgets}, {names}: density of one "
            "fixed window for all heads of the model over that of a choice per head and phase, at equal error"
        )
        out.append((what, figure, ">= 1.5"))
    held_out = min(row["held_out"] for row in rows)
    what = f"the same: error on {held_out} held-out clips, off the prediction by at most, any site"
    return [*out, (what, f"{summary['worst_prediction']:.1%}", "<= 20 %")]


def remainder(report: dict[str, Any]) -> list[Row]:
    """Dropped tiles as their means."""
    (less, most), (fast, slow) = report["summary"]["error"], report["summary"]["time"]
    return [
        (
            (
                '`remainder="means"`, the trained small Wan, densities 0.06 to 0.5: error of its output against dense '
                "attention, without the means over with them"
            ),
            f"{less:.1f} to {most:.1f}",
            "",
        ),
        ("the same: time of an attention call with the means over without", f"{fast:.2f} to {slow:.2f}", ""),
    ]


def model(report: dict[str, Any]) -> list[Row]:
    """The whole transformer against Inductor."""
    out = []
    for row in report["rows"]:
        what = (
            f"Wan transformer, {row['layers']} layers, {row['heads']} heads x 64, {row['tokens']:,} tokens, "
            f'{row["dtype"]}, density {row["density"]:.3f}, against `backend="inductor"`'
        )
        figure = (
            f"{row['ratio']:.1f}x ({row['inductor_s']:.1f} s to {row['fps_s']:.1f} s); attention is "
            f"{row['attention_share']:.0%} of the dense time, so {row['bound']:.1f}x if a kept pair costs the same"
        )
        out.append((what, figure, f">= {report['summary'][row['dtype']]['target']:g}x"))
    exact = max(row["difference_at_density_1"] for row in report["rows"] if row["dtype"] == "float32")
    out.append(("the same at density 1, float32: relative difference", f"{exact:.0e}" if exact else "0", "<= 1e-5"))
    return out


def training(report: dict[str, Any]) -> list[Row]:
    """A training step of one block's attention against Inductor."""
    names = {"attention": "attention", "module": "an attention module with its projections"}
    out = []
    for row in report["rows"]:
        what = (
            f"forward + backward of {names[row['what']]}, {row['heads']} heads x 64, {row['tokens']:,} tokens, "
            f'{row["dtype"]}, density {row["density"]:.3f}, `{row["lowering"]}`, against `backend="inductor"`'
        )
        figure = f"{row['ratio']:.1f}x ({row['inductor_s']:.1f} s to {row['fps_s']:.1f} s)"
        out.append((what, figure, f">= {report['summary']['target']:g}x"))
    return out


def compile_time(report: dict[str, Any]) -> list[Row]:
    """What the passes cost."""
    summary = report["summary"]
    what = f"our passes on a {summary['blocks']}-block Wan graph, share of Inductor's cold compile time"
    warm = f"{summary['fps_cold_s']:.0f} s to {summary['fps_warm_s']:.0f} s"
    return [
        (what, f"{summary['share']:.1%} ({summary['passes_s']:.1f} s)", "< 10 %"),
        ('compile time with `backend="fps"`, first process to second', warm, "warm caches"),
    ]


def attention_gpu(report: dict[str, Any]) -> list[Row]:
    """The FP8 kernels on a GPU: the best tile of each case and density."""
    aims = {0.2: ">= 7.09x, >= 900 TFLOP/s", 0.1: "", 0.09: ">= 14x"}
    peak = report["ceilings"]["fp8_tflops"]
    out = []
    for case in dict.fromkeys(row["case"] for row in report["rows"]):
        targets = (0.2, 0.1, 0.09) if case == "Wan 14B 720p" else (0.2, 0.1)
        for target, lower in zip(targets, (*targets[1:], 0.0), strict=True):
            lowest = max(0.85 * target, lower)
            rows = [
                row
                for row in report["rows"]
                if row["case"] == case and "fp8" in row["kernel"] and lowest < round(row["density"], 3) <= target
            ]
            best = max(rows, key=lambda row: row["speedup"] * row["density"])  # windows hit a density only nearly
            tile = "x".join(map(str, best["tile"]))
            figure = (
                f"{best['speedup']:.2f}x ({best['ms']:.1f} ms, {best['pre_share']:.0%} of it the pre-pass); "
                f"{best['kept_tflops'] * best['block_factor']:.0f} TFLOP/s on kept blocks, {best['kept_tflops']:.0f} "
                f"on pairs of tokens, {best['kept_tflops'] / peak:.0%} of FP8 matmul"
            )
            what = f"{case}, density {best['density']:.2f}, tile {tile}: FP8 attention against the fastest bf16 SDPA"
            out.append((what, figure, aims[target] if case == "Wan 14B 720p" else ""))
    return out


def flex_gpu(report: dict[str, Any]) -> list[Row]:
    """Beside FlexAttention, autotuned, at density 0.2 or what the tiles round it to: each case's last tile, which fits
    its grid, and the range over all of them."""
    pairs: dict[str, list[tuple[dict[str, Any], dict[str, Any]]]] = {}
    for peer in report["rows"]:
        if peer["kernel"] == "FlexAttention bf16, autotuned" and 0.15 < peer["density"] < 0.25:
            ours = next(
                row
                for row in report["rows"]
                if all(row.get(key) == peer[key] for key in ("case", "tile", "density")) and "fp8" in row["kernel"]
            )
            pairs.setdefault(peer["case"], []).append((peer, ours))
    out = []
    for case, found in pairs.items():
        gains = [peer["ms"] / ours["ms"] for peer, ours in found]
        peer, ours = found[-1]
        what = (
            f"{case}, density {peer['density']:.2f}, tile {'x'.join(map(str, peer['tile']))}: FP8 attention against "
            "autotuned FlexAttention in bf16 with the same mask, its tokens in tile order beforehand"
        )
        figure = f"{gains[-1]:.2f}x ({peer['ms']:.1f} ms to {ours['ms']:.1f} ms)"
        if len(found) > 1:
            figure += f", {min(gains):.2f}x to {max(gains):.2f}x over {len(found)} tiles"
        out.append((what, figure, ""))
    return out


def model_sizes(report: dict[str, Any]) -> list[Row]:
    """Whole steps of the other models and sizes, at density 0.2."""
    out = []
    for case in dict.fromkeys((row["model"], row["size"]) for row in report["rows"]):
        rows = [row for row in report["rows"] if (row["model"], row["size"]) == case]
        chosen = ("inductor", "fps", "fps, static fp8 linears")
        shown = [row for row in rows if row["variant"] in chosen and row["density"] in (1.0, 0.2)]
        if case != ("14B", "720p"):  # which model_gpu has
            out += [(what, figure, "") for what, figure, _ in model_gpu({"rows": shown})]
    return out


def model_gpu(report: dict[str, Any]) -> list[Row]:
    """A whole transformer step on a GPU."""
    aims = {"fps": ">= 2.6x", "fps, fp8 linears": ">= 4.96x", "fps, static fp8 linears": ">= 4.96x"}
    base = next(row for row in report["rows"] if row["variant"] == "inductor")
    out = []
    for row in report["rows"]:
        if row is not base:
            density = f"density {row['density']:g}, " if "fps" in row["variant"] else ""
            gpus = f" on {row['gpus']} GPUs (Ulysses)" if row.get("gpus", 1) > 1 else ""
            what = (
                f"Wan {row['model']} {row['size']}{gpus}, one step, {density}{row['variant']}, against Inductor in bf16"
            )
            peak = (
                f"; peak memory above the weights {base['peak_mib'] / 1024:.2f} GiB to {row['peak_mib'] / 1024:.2f} GiB"
            )
            figure = f"{row['speedup']:.2f}x ({base['ms'] / 1e3:.2f} s to {row['ms'] / 1e3:.2f} s){peak}"
            out.append((what, figure, "" if gpus else aims.get(row["variant"], "")))
    return out


def remainder_gpu(report: dict[str, Any]) -> list[Row]:
    """What the means cost there."""
    row = report["rows"][0]
    what = (
        f"{row['case']}, density {row['density']:.2f}, tile {'x'.join(map(str, row['tile']))}: time of FP8 attention "
        'with `remainder="means"` over that without'
    )
    return [(what, f"{row['ratio']:.2f} ({row['none']:.1f} ms to {row['means']:.1f} ms)", "")]


GPU_SECTIONS = {
    "attention_gpu": attention_gpu,
    "attention_gpu_flex": flex_gpu,
    "remainder_gpu": remainder_gpu,
    "model_gpu": model_gpu,
    "model_two_gpus": model_gpu,
    "model_gpu_sizes": model_sizes,
}

SECTIONS = {
    "attention_cpu": attention,
    "attention_cpu_cpp": generated,
    "attention_cpu_flex": beside,
    "attention_cpu_backward": generated,
    "attention_cpu_vnni": generated,
    "attention_cpu_no_amx": generated,
    "scaling_cpu": scaling,
    "topk_cost": topk,
    "autotune_cpu": tuning,
    "calibrate_cpu": calibration,
    "calibrate_trained": calibration_trained,
    "remainder": remainder,
    "model_cpu": model,
    "training_cpu": training,
    "compile_time": compile_time,
}

BY_HAND = {
    "attention_cpu_vnni": "float32 int8",
    "attention_cpu_no_amx": "float32 bfloat16 int8 --flex",
}
"""Files of ``attention_cpu.py`` that no line of ``make bench`` writes: their precisions and further options."""


HEADLINES = {
    "attention_gpu": (
        "Wan 14B 720p, density 0.20", "Wan 14B 720p, density 0.09", "HunyuanVideo 720p, density 0.20",
        "CogVideoX, density 0.18",
    ),
    "attention_gpu_flex": ("Wan 14B 720p",),
    "model_gpu": ("density 0.2, fps, against", "density 0.2, fps, static", "density 0.09, fps, static"),
    "model_two_gpus": ("density 0.2, fps, static",),
    "attention_cpu_cpp": ("float32 against dense float32 SDPA, density 0.25", "bfloat16 SDPA, density 0.25"),
    "attention_cpu_flex": ("FlexAttention",),
    "model_cpu": ("Wan transformer", "the same at density 1"),
    "compile_time": ("share of Inductor",),
}  # fmt: skip
"""By file, a part of what the rows that README.md shows say."""


def block(results: Path, headlines: bool = False) -> str:
    """The generated Markdown, without its markers: a table for each machine; with ``headlines`` only those rows."""
    gpu = "on a GPU", GPU_SECTIONS, ("gpu", "torch", "triton"), _on_gpu
    cpu = "on a CPU", SECTIONS, ("threads", "processor", "cpu_capability"), _on_cpu
    tables = [table for place in (gpu, cpu) for table in _tables(results, *place, headlines)]
    return "\n\n".join(tables) or "No benchmark has been run yet: `make bench`."


def _tables(
    results: Path, where: str, sections: dict[str, Any], machine: tuple[str, ...], origin: Callable[[Reports], str],
    headlines: bool,
) -> list[str]:  # fmt: skip
    machines: dict[tuple[Any, ...], tuple[Reports, list[Row]]] = {}
    for name, section in sections.items():
        path = results / f"{name}.json"
        report = json.loads(path.read_text()) if path.exists() else None
        rows = section(report) if report is not None else []
        if headlines:
            rows = [row for row in rows if any(part in row[0] for part in HEADLINES.get(name, ()))]
        if rows:
            reports, all_rows = machines.setdefault(tuple(report["machine"][key] for key in machine), ({}, []))
            reports[name] = report
            all_rows += rows
    return [
        "\n".join(
            [
                f"| {where} | measured | aim |",
                "|---|---|---|",
                *(f"| {' | '.join(row)} |" for row in rows),
                "",
                origin(reports),
            ]
        )
        for reports, rows in machines.values()
    ]


def _on_cpu(reports: Reports) -> str:
    """The machine of a table, and how to make it again."""
    machine = next(iter(reports.values()))["machine"]
    plural = "" if machine["threads"] == 1 else "s"
    isa = f", under `ONEDNN_MAX_CPU_ISA={machine['onednn_max_cpu_isa']}`" if "onednn_max_cpu_isa" in machine else ""
    alone = "".join(
        f" (attention alone: `python benchmarks/attention_cpu.py --lowering cpp --density 1.0 0.25 0.1 "
        f"--precision {BY_HAND[name]} --json benchmarks/results/{name}.json`)"
        for name in reports
        if name in BY_HAND
    )
    return (
        f"Measured on {machine['threads']} thread{plural} of {machine['processor']}, {machine['cpu_capability']}. "
        f"Regenerate on such a machine with these rows' lines of `make bench`{alone}{isa}."
    )


def _on_gpu(reports: Reports) -> str:
    machine = next(iter(reports.values()))["machine"]
    counts = sorted({row.get("gpus", 1) for report in reports.values() for row in report["rows"]} - {1})
    several = "".join(f", the rows that name {count} GPUs on {count} of one host" for count in counts)
    return (
        f"Measured on one {machine['gpu']}{several}; torch {machine['torch']}, Triton {machine['triton']}. Regenerate "
        "with the scripts in `benchmarks/gpu`."
    )


def fill(text: str, content: str) -> str:
    """``text`` with what lies between the markers replaced."""
    if text.count(START) != 1 or text.count(END) != 1:
        raise SystemExit(f"README.md needs the markers {START} and {END} exactly once")
    head, rest = text.split(START)
    return f"{head}{START}\n{content}\n{END}{rest.split(END)[1]}"


def page(results: Path) -> str:
    """docs/figures.md."""
    return (
        "# Figures\n\nEvery figure that the scripts of `benchmarks` left in `benchmarks/results`, a table for each "
        "machine;\n`benchmarks/readme_figures.py` makes this page. What GPUs were measured in further detail is in\n"
        f"[performance_measured.md](performance_measured.md).\n\n{block(results)}\n"
    )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--check", action="store_true", help="change nothing; fail when a page is out of date")
    args = parser.parse_args(argv)
    pages = {README: fill(README.read_text(), block(RESULTS, headlines=True)), PAGE: page(RESULTS)}
    if args.check:
        return int(any(not path.exists() or path.read_text() != text for path, text in pages.items()))
    for path, text in pages.items():
        path.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
