"""Predictions beside outcomes: ``docs/performance_measured.md`` from the JSON files that a GPU and the cost model left.

python benchmarks/gpu/outcomes.py
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import jinja2

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"
TEXT = Path(__file__).with_suffix(".md.jinja")
PAGE = ROOT / "docs" / "performance_measured.md"
CASE = "Wan 14B 720p"
BLOCKS = 40
TOKENS = 75_600
PAPER_KERNEL = 7.09

NAMED = {
    "attention": lambda name: name == "attention_forward",
    "FP8 pre-pass": lambda name: name in ("quantize_tiles", "quantize_values", "key_statistics", "tile_maxima"),
    "attention to the text and, without fps, to the video (SDPA)": lambda name: "sdpa" in name and "triton" not in name,
    "products of linear layers": lambda name: name.startswith("nvjet"),
    "GELU (with FP8 in the next row)": lambda name: "triton" in name and "gelu" in name,
    "quantization, that of GELU's result among it": lambda name: (
        name in ("quantize_rows_in_registers", "values_of_rows")
    ),
    "norms, gated sums before them inside, into E4M3": lambda name: name == "norm_of_rows",
    "norm and rotary embedding of queries and keys, with fps": lambda name: name == "rotate_rows",
    "the blocks' other Inductor kernels: norms, residuals, quantization, without fps rotary embedding": lambda name: (
        name.startswith("triton")
    ),
    "outside the blocks: patches, time and text embedding, last norm; copies": lambda name: True,
}
"""What a profile's kernels are, by name; the first that holds."""

REUSED = {"fps": 4832.8, "fps, fp8 linears": 4463.9}
"""MiB of the peak with Inductor's ``allow_buffer_reuse``, in a run of its own."""


def load(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text())
    return found


def spearman(a: list[float], b: list[float]) -> float:
    """Rank correlation; equal values share the mean of their ranks."""

    def ranks(values: list[float]) -> list[float]:
        order = sorted(values)
        return [statistics.mean(i for i, other in enumerate(order) if other == value) for value in values]

    return statistics.correlation(ranks(a), ranks(b))


def text_of(tile: Any) -> str:
    return "x".join(map(str, tile)) if tile else ""


def markdown(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table."""
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (headings, ["---"] * len(headings), *rows))


def measured_table(report: dict[str, Any]) -> str:
    peak = report["ceilings"]["fp8_tflops"]
    headings = ("case", "kernel", "tile", "density", "ms", "of it pre-pass", "vs fastest SDPA",
                "TFLOP/s on kept pairs", "of FP8 matmul", "on kept blocks", "error vs float32")  # fmt: skip
    lines = []
    for row in report["rows"]:
        if "failed" in row:
            continue
        share = f"{row['pre_share']:.0%}" if row.get("pre_ms") else ""
        error = f"{row['error']:.4f}" if "error" in row else ""
        blocks = f"{row['kept_tflops'] * row['block_factor']:.0f}" if "block_factor" in row else ""
        speed = f"{row['kept_tflops']:.0f}", f"{row['kept_tflops'] / peak:.0%}", blocks
        cells = (row["case"], row["kernel"], text_of(row.get("tile")), f"{row['density']:.3f}", f"{row['ms']:.2f}")
        lines.append((*cells, share, f"{row['speedup']:.2f}x", *speed, error))
    return markdown(headings, lines)


def usual_tile(report: dict[str, Any]) -> str:
    """How much faster that was at density 0.2 in another run."""
    row = next(row for row in report["rows"] if row["case"] == CASE and row["density"] == 0.2)
    return f"{row['speedup']:.2f}x ({row['kept_tflops']:.0f})"


def sparse_efficiency(report: dict[str, Any], tile: list[int]) -> str:
    """Time at density 1 times the density, over the time, of :data:`CASE` in FP8, by density."""
    rows = [row for row in report["rows"] if row["case"] == CASE and "fp8" in row["kernel"] and row["tile"] == tile]
    dense = next(row["ms"] for row in rows if row["density"] == 1)
    return ", ".join(
        f"{dense * row['density'] / row['ms']:.0%} at {row['density']:.2g}" for row in rows if row["density"] < 1
    )


FLEX = "FlexAttention bf16"
TUNED = f"{FLEX}, autotuned", f"{FLEX}, given"
"""With a config of its own tuning, or, at density 1, with the one that tuning found at the others."""
Mask = tuple[str, str, float]


def by_mask(report: dict[str, Any]) -> dict[Mask, dict[str, dict[str, Any]]]:
    """Rows of tiles by (case, tile, density), then by kernel: "fps", :data:`FLEX` or "tuned"."""
    found: dict[Mask, dict[str, dict[str, Any]]] = {}
    for row in report["rows"]:
        if row.get("tile"):
            kernel = "fps" if row["kernel"].startswith("fps") else "tuned" if row["kernel"] in TUNED else row["kernel"]
            found.setdefault((row["case"], text_of(row["tile"]), row["density"]), {})[kernel] = row
    tiles = list(dict.fromkeys(mask[:2] for mask in found))
    return {mask: found[mask] for mask in sorted(found, key=lambda mask: (tiles.index(mask[:2]), -mask[2]))}


def gain(kernels: dict[str, dict[str, Any]]) -> float:
    """How much faster ours is than the faster FlexAttention under a mask."""
    times = [kernels[peer]["ms"] for peer in (FLEX, "tuned") if "ms" in kernels.get(peer, {})]
    return float(min(times) / kernels["fps"]["ms"])


def flex_table(report: dict[str, Any]) -> str:
    """Milliseconds of ours and of FlexAttention under the same masks."""
    headings = ("case", "tile", "density", "fps, FP8", "FlexAttention, bf16", "autotuned", "fps against the faster",
                "error of fps", "error of FlexAttention")  # fmt: skip

    def time(row: dict[str, Any] | None) -> str:
        return "" if row is None else f"{row['ms']:.2f}" if "ms" in row else "refused"

    return markdown(headings, [
        (case, tile, f"{density:.3f}", *(time(kernels.get(kernel)) for kernel in ("fps", FLEX, "tuned")),
         f"{gain(kernels):.2f}x", f"{kernels['fps']['error']:.4f}", f"{kernels['tuned']['error']:.4f}")
        for (case, tile, density), kernels in by_mask(report).items()
    ])  # fmt: skip


ASKED = {1.0: (0.99, 1.01), 0.5: (0.4, 0.6), 0.2: (0.15, 0.25), 0.1: (0.07, 0.11), 0.05: (0.0, 0.06)}
"""Densities that the runs beside FlexAttention asked for, and between what tiles rounded them to."""


def flex_gains(report: dict[str, Any]) -> str:
    """The range of :func:`gain` over all cases and tiles, by the density asked for."""
    parts, masks = [], by_mask(report)
    for asked, (low, high) in ASKED.items():
        gains = [gain(kernels) for mask, kernels in masks.items() if low < mask[2] < high]
        parts.append(f"{min(gains):.2f}x to {max(gains):.2f}x at density {asked:g}")
    return f"{', '.join(parts[:-1])} and {parts[-1]}"


def flex_pre(report: dict[str, Any]) -> str:
    """The range of the pre-pass's share at the last of :data:`ASKED`."""
    low, high = ASKED[0.05]
    shares = [kernels["fps"]["pre_share"] for mask, kernels in by_mask(report).items() if low < mask[2] < high]
    return f"{min(shares):.0%} to {max(shares):.0%}"


def untuned(report: dict[str, Any], case: str) -> str:
    """How many times slower FlexAttention is in a case before it is tuned."""
    masks = (kernels for mask, kernels in by_mask(report).items() if mask[0] == case and "ms" in kernels.get(FLEX, {}))
    ratios = [kernels[FLEX]["ms"] / kernels["tuned"]["ms"] for kernels in masks]
    return f"{min(ratios):.0f} to {max(ratios):.0f}"


def tuned_table(report: dict[str, Any]) -> str:
    """What tuning found, and how long it took."""
    return markdown(
        ("Wan", "tile", "untuned, ms", "winner", "ms", "speedup", "tried", "s"),
        [
            (
                f"{row['model']} {row['size']}", text_of(row["tile"]), f"{row['default_ms']:.2f}",
                f"`{row['winner']}`", f"{row['winner_ms']:.2f}", f"{row['speedup']:.2f}x", str(len(row["tried"])),
                f"{row['took_s']:.0f}",
            )
            for row in report["rows"]
        ],
    )  # fmt: skip


def starts(report: dict[str, Any]) -> str:
    """Cycles of a program beside its steps, from the times of each tile at its highest and lowest density."""
    predictions = load("gpu_predictions")
    gpu = next(gpu for gpu in predictions["gpus"] if gpu["name"].startswith("H200"))
    found = {}
    for tile in dict.fromkeys(tuple(row["tile"]) for row in report["rows"] if row["case"] == CASE and row.get("tile")):
        launches = [row for row in predictions["predictions"] if row["gpu"] == gpu["name"] and row["quant"] == "fp8"
                    and tuple(row["tile"]) == tile]  # fmt: skip
        if not launches:
            continue
        ends = []
        for launch in (launches[0], launches[-1]):
            row = next(row for row in report["rows"] if row["case"] == CASE and row.get("tile") == list(tile)
                       and "fp8" in row["kernel"] and abs(row["density"] - launch["density"]) < 1e-3)  # fmt: skip
            cycles = (row["ms"] - row["pre_ms"]) / 1e3 * gpu["clock_hz"] * gpu["multiprocessors"] / launch["programs"]
            ends.append((launch["steps"] / launch["programs"], cycles))
        (many, most), (few, least) = ends
        found[tile] = launches[0]["programs_per_sm"] * (least * many - most * few) / (many - few)
    return ", ".join(f"{text_of(tile)} {cycles:,.0f}" for tile, cycles in found.items())


def beside(rows: list[dict[str, Any]], predicted: list[dict[str, Any]]) -> tuple[str, str, str]:
    """(table, rank correlation, that of a model without what programs take beside their steps) of the rows that were
    both predicted and measured."""
    lines, found = [], []
    for row in rows:
        if row["case"] != CASE or not row.get("tile") or "failed" in row:
            continue
        quant = "fp8" if "fp8" in row["kernel"] else "none" if row["kernel"].startswith("fps none") else None
        same = [
            item
            for item in predicted
            if item["gpu"].startswith("H200") and item["tile"] == row["tile"] and item["quant"] == quant
        ]
        if not same:
            continue
        item = min(same, key=lambda item: abs(item["density"] - row["density"]))
        if abs(item["density"] - row["density"]) > 0.06:
            continue
        found.append((item, row["kept_tflops"]))
        speed = item["tflops_on_kept_pairs"]
        speeds = f"{speed:.0f}", f"{row['kept_tflops']:.0f}", f"{row['kept_tflops'] / speed:.2f}"
        lines.append((text_of(row["tile"]), "FP8" if quant == "fp8" else "bf16", f"{row['density']:.3f}", *speeds))
    table = markdown(("tile", "operands", "density", "predicted TFLOP/s", "measured", "ratio"), lines)
    return table, _ranks(found, "tflops_on_kept_pairs"), _ranks(found, "tflops_of_steps_alone")


def _ranks(found: list[tuple[dict[str, Any], float]], key: str) -> str:
    """Rank correlation of (prediction, measured speed), and of those with FP8 and bf16 operands by themselves."""
    of = {}
    for quants in (("fp8", "none"), ("fp8",), ("none",)):
        pairs = [(item[key], speed) for item, speed in found if item["quant"] in quants]
        of[quants] = f"{spearman([a for a, _ in pairs], [b for _, b in pairs]):.2f}"
    return "{} (FP8 alone {}, bf16 alone {})".format(*of.values())


def step_table(profile: dict[str, Any]) -> str:
    """ms of a step of few blocks by what its kernels do, one column per variant."""
    variants = profile["variants"]
    sums: dict[str, dict[str, float]] = {what: dict.fromkeys(variants, 0.0) for what in NAMED}
    for variant, kernels in variants.items():
        for kernel in kernels:
            sums[next(what for what, holds in NAMED.items() if holds(kernel["kernel"]))][variant] += kernel["ms"]
    sums = {what: row for what, row in sums.items() if any(row.values())}
    sums["all"] = {variant: sum(kernel["ms"] for kernel in kernels) for variant, kernels in variants.items()}
    return markdown(("ms", *variants), [(what, *(f"{ms:.1f}" for ms in row.values())) for what, row in sums.items()])


def product_table(profile: dict[str, Any]) -> str:
    """TFLOP/s of the linear layers' products by shape."""
    names = list(dict.fromkeys(row["product"] for row in profile["products"]))
    lines = []
    for shape in dict.fromkeys((row["in"], row["out"]) for row in profile["products"]):
        speeds = {row["product"]: row["tflops"] for row in profile["products"] if (row["in"], row["out"]) == shape}
        lines.append((f"{shape[0]} to {shape[1]}", *(f"{speeds[name]:.0f}" for name in names)))
    return markdown(("features", *names), lines)


def bound(report: dict[str, Any], profile: dict[str, Any], model: dict[str, Any]) -> str:
    """What the step could gain at most if attention reached the paper's figure and the rest cost nothing."""
    base = next(row["ms"] for row in model["rows"] if row["variant"] == "inductor")
    dense = min(row["ms"] for row in report["rows"] if row["case"] == CASE and "tile" not in row)
    kernels = profile["variants"]["fps, static fp8 linears"]
    linear = sum(row["ms"] for row in kernels if NAMED["products of linear layers"](row["kernel"]))
    linear *= BLOCKS / profile["layers"]
    attention = BLOCKS * dense / PAPER_KERNEL
    return (
        f"A step of {BLOCKS} blocks took {base / 1e3:.2f} s with Inductor in bf16. The FP8 products of its linear "
        f"layers take {linear / 1e3:.2f} s, at the speed of FP8 matmul; attention at {PAPER_KERNEL}x (the paper's "
        f"kernel figure, at its mean density of about 0.2) would take {attention / 1e3:.2f} s. So even if norms, "
        f"rotary embedding, GELU, attention to the text and quantization cost nothing at all, the step would be "
        f"{base / (linear + attention):.2f}x as fast: 4.96x, which the paper reports for an H20, is out of reach on "
        f"this card at density 0.2."
    )


def model_table(model: dict[str, Any]) -> str:
    """Whole steps by variant and density."""
    return markdown(
        ("variant", "density", "s", "against Inductor", "peak memory, MiB", "output's distance"),
        [
            (
                row["variant"], f"{row['density']:g}", f"{row['ms'] / 1e3:.2f}", f"{row['speedup']:.2f}x",
                f"{row['peak_mib']:.1f}", f"{row['difference']:.3f}",
            )
            for row in model["rows"]
        ],
    )  # fmt: skip


def two_gpus(two: dict[str, Any], one: dict[str, Any]) -> str:
    """The same steps on two GPUs, and how much faster than on one."""
    seconds = {(row["variant"], row["density"]): row["ms"] for row in one["rows"]}
    gains = {row["variant"]: seconds[row["variant"], row["density"]] / row["ms"] for row in reversed(two["rows"])}
    least, most = (f"{of(gains[name] for name in gains if name != 'inductor'):.2f}" for of in (min, max))
    return (
        f"The same on {two['rows'][0]['gpus']} GPUs of one host, which share the tokens of a step (Ulysses). At "
        f"density 0.2 fps is {least} to {most} times as fast as on one, Inductor {gains['inductor']:.2f} times:\n\n"
        f"{model_table(two)}"
    )


def sizes_table(report: dict[str, Any]) -> str:
    """Whole steps of every model and size, launched from Python and as one CUDA graph."""
    headings = ("Wan", "variant", "density", "s", "as one CUDA graph, s", "against Inductor", "peak memory, MiB",
                "the graph's own memory, MiB", "output's distance")  # fmt: skip
    lines = []
    for row in report["rows"]:
        base = next(other for other in report["rows"] if _same_case(row, other) and other["variant"] == "inductor")
        distance = f"{row['difference']:.3f}" if "difference" in row else ""
        cells = (f"{row['model']} {row['size']}", row["variant"], f"{row['density']:g}", f"{row['ms'] / 1e3:.3f}")
        graph = f"{row['graph_ms'] / 1e3:.3f}" if "graph_ms" in row else f"failed: {row['graph_failed']}"
        cells += (graph, f"{base['ms'] / row['ms']:.2f}x", f"{row['peak_mib']:,.0f}")
        own = f"{row['graph_mib']:,.0f}" if "graph_mib" in row else ""
        lines.append((*cells, own, distance))
    return markdown(headings, lines)


def _same_case(row: dict[str, Any], other: dict[str, Any]) -> bool:
    return (row["model"], row["size"]) == (other["model"], other["size"])


def sizes(report: dict[str, Any]) -> str:
    """What the table of all sizes shows."""
    rows = [row for row in report["rows"] if "graph_ms" in row]
    assert all(row["graph_difference"] == 0.0 for row in rows)
    assert {row["graphs"] for row in rows if row["variant"] != "eager"} == {1}
    gains = {(row["model"], row["size"]): [] for row in rows}
    for row in rows:
        gains[row["model"], row["size"]].append(1 - row["graph_ms"] / row["ms"])
    saved = "; ".join(f"{' '.join(case)} {min(some):.1%} to {max(some):.1%}" for case, some in gains.items())
    above = [
        f"{row['model']} {row['size']} {row['variant']} by {row['peak_mib'] / base['peak_mib'] - 1:.0%}"
        for row in rows
        for base in rows
        if _same_case(row, base) and base["variant"] == "inductor" and row["density"] == 0.2
        if row["peak_mib"] > 1.001 * base["peak_mib"]
    ]
    return (
        f"A step as one CUDA graph gives the same values to the bit, and takes less time by: {saved}. Every compiled "
        f"step ran one graph of a block, compiled once. Peaks above Inductor's: {', '.join(above) or 'none'}."
    )


def means(report: dict[str, Any]) -> str:
    """What ``remainder="means"`` costs, in one sentence."""
    ratios = (f"{row['ratio']:.2f} (tile {text_of(row['tile'])}, density {row['density']:g})" for row in report["rows"])
    return (
        f'`remainder="means"` (`benchmarks/gpu/remainder_gpu.py`): time of FP8 attention of {report["rows"][0]["case"]}'
        f" with it over that without: {', '.join(ratios)}."
    )


def memory(model: dict[str, Any], profile: dict[str, Any]) -> str:
    """Where Inductor, attention alone and FP8 linear layers peak, and why."""
    peaks = {row["variant"]: row["peak_mib"] for row in model["rows"]}
    below = {variant: f"{1 - peak / peaks['inductor']:.1%}" for variant, peak in peaks.items()}
    rows = {kernel["kernel"]: kernel["ms"] / profile["layers"] for kernel in profile["variants"]["fps"]}
    dense = {kernel["kernel"]: kernel["ms"] / profile["layers"] for kernel in profile["variants"]["inductor"]}
    own = next(ms for kernel, ms in dense.items() if "rms_norm_add_copy" in kernel)
    return (
        f"Inductor peaks where it rotates queries and keys: six tensors of all tokens are alive, the block's input, "
        f"the normalized one, and queries and keys before and after. Attention alone peaks {below['fps']} below that, "
        f"in the feed-forward layers; with FP8 linear layers the peak is {below['fps, static fp8 linears']} below, "
        f"within attention. Two things make it so. `fps::norm_rotate` is norm and rotary embedding as one kernel; "
        f"queries are then rotated before keys are projected, and a block takes {rows['rotate_rows']:.2f} ms for it, "
        f"Inductor's own kernel {own:.2f}. And Inductor is told to free buffers as soon as they are read: otherwise it "
        f"kept the normalized input through attention, for the next buffer of its size, and peaks were "
        f"{REUSED['fps']:,.1f} MiB with attention alone and {REUSED['fps, fp8 linears']:,.1f} with dynamic scales, at "
        f"the same speed."
    )


def page() -> str:
    """The page: the text of ``outcomes.md.jinja`` around the tables."""
    report, more, plain = load("attention_gpu"), load("attention_gpu_more"), load("attention_gpu_bf16")
    flex = {"rows": load("attention_gpu_flex")["rows"] + load("attention_gpu_flex_dense")["rows"]}
    # The rest have tables of their own; FlexAttention was compiled for any shape there, from the second case on.
    more["rows"] = [row for row in more["rows"] if "fps fp8" in row["kernel"] or "tile" not in row]
    predictions = load("gpu_predictions")["predictions"]
    predicted, rank, rank_of_steps = beside(report["rows"] + plain["rows"], predictions)
    functions = (measured_table, step_table, product_table, bound, model_table, memory, two_gpus, sizes_table, sizes,
                 means, load, usual_tile, sparse_efficiency, flex_table, flex_gains, flex_pre,
                 untuned, tuned_table, starts)  # fmt: skip
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, keep_trailing_newline=True)
    environment.globals.update({function.__name__: function for function in functions})
    return environment.from_string(TEXT.read_text()).render(
        report=report, machine=report["machine"], peaks=report["ceilings"], predicted=predicted, rank=rank,
        rank_of_steps=rank_of_steps,
        more=more, plain=plain, flex=flex,
        profile=load("profile_model"), model=load("model_gpu"), tokens=f"{TOKENS:,}",
    )  # fmt: skip


def main() -> None:
    PAGE.write_text(page())


if __name__ == "__main__":
    main()
