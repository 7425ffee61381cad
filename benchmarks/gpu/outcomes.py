"""Predictions beside outcomes: ``docs/performance_measured.md`` from the JSON files that a GPU and the cost model left.

python benchmarks/gpu/outcomes.py
"""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "performance_measured.md"
CASE = "Wan 14B 720p"
BLOCKS = 40
TOKENS = 75_600
PAPER_KERNEL = 7.09

PROFILE = """## What a profile says

Nsight Compute on the warp-specialized kernel (two heads of the same case, density 0.2), per block of 128 keys and
warp: the tensor cores are busy 40 % of the time, issue slots 45 %, L2 27 %, memory 1 %. So no unit is full; a warp's
own chain is: waiting for Q K^T and starting the next product 25 %, row maxima 16 %, exponentials and sums 48 %, the
float32 accumulation and the cast of P 12 %. Two warps per scheduler are all that the registers allow, and they do not
fill each other's gaps. What was tried on it, each against the version before:

| change | TFLOP/s on kept blocks |
|---|---|
| P V runs under the softmax (against waiting for it) | 700 to 808 |
| consumers take turns at the products (ping-pong) | 808 to 790 |
| consumers take turns at the exponentials | 817 to 801 |
| a quarter of the exponentials as polynomials on the FMA units | 817 to 764 |
| one barrier that frees K and V together; maxima in pairs first | 798 to 807 |
| masking only the last 16 columns of a block that is nearly full | 807 to 846 |
| four stages instead of three | 846 to 853 |

Then the card draws its 700 W and lowers its clock from 1980 to about 1850 MHz; with zeros for operands it does not.
"Where the cycles go" and "Without the running maximum" below are of what came after.

Later attempts that are not in the kernel. **Persistent programs**: 132 of them take blocks of queries in turn from a
counter; the producer loads the next block's keys during the last one's epilogue. Outputs are the same to the bit. On
the operands of `benchmarks/gpu/hopper_probe.py`, in turn with the kernel as it is, which has no running maximum,
milliseconds, medians of four rounds:

| case | persistent | the kernel |
|---|---|---|
| Wan 14B 720p, tile 7x9x4, density 0.21 | 26.9 | 26.1 |
| density 0.09 | 12.1 | 12.0 |
| density 0.05 | 6.99 | 6.91 |
| 13x30x45, 48 heads of 64 features, tile 13x2x9 | 1.72 | 1.72 |

What it saves at the start and the end of a block of queries it loses in the loop: same instructions, but the assembler
no longer puts exponentials of the lower rows where the check of the upper rows is waited for. (With running maxima it
was even at density 0.2 and 7 % faster at 0.05.)

**Other schedules of the same products**, milliseconds of the whole call at density 0.2 (tile 7x9x4) in two rounds, each
beside the kernel as it is in the same run; the card draws 690 W in all of them, and every output was within 2e-3 of
the kernel's:

| change | with it | the kernel |
|---|---|---|
| P V added in place | 30.4, 31.3 | 29.0, 29.0 |
| that, and the next block's scores during this block's softmax | 29.9, 30.5 | 28.7, 29.0 |
| the first, and Q from registers | 31.6, 32.4 | 29.0, 29.0 |
| row maxima in four chains instead of one per row | 29.4, 30.1 | 29.0, 29.1 |
| row maxima in two chains per row | 29.2, 30.0 | 29.0, 29.1 |

The next block's scores were thought to be out of reach (ptxas serialized the products); with the accumulator in place
and two blocks per turn of the loop it does not. In place means that the accumulator is rescaled only where a row's
maximum moved, and put by in float32 every 16 blocks: 397 instead of 453 instructions per block. None of the changes
pays at the power limit. Below it two chains per row do: CogVideoX (64 features, 1980 MHz) 2.24 against 2.34 ms, so they
are what 64 features take.

**The pre-pass beside attention**: with the next piece's pre-pass on a stream of its own, with and without priority, and
with pieces on two streams in turn, so that one's start would fill the other's end, pieces of 90 to 320 MiB: 29.4 to
30.7 ms at density 0.2 and 14.5 to 15.2 at 0.09, against 29.3 to 30.1 and 14.6 on one stream. A program of attention
takes all registers of a multiprocessor, and what the pre-pass takes of the power attention lacks.

**The pre-pass itself**, milliseconds for all heads of Q or of K of the same case, each value the least of three; a copy
of as many bytes takes 0.276. What counts is how many bytes are under way, not how many instructions there are:

| change | Q | K |
|---|---|---|
| 128 slots at a time, maxima by rows, every value checked for NaN by itself | 0.348 | 0.347 |
| half as many instructions (maxima elementwise that NaN passes through, a product less per quotient) | 0.376 | 0.362 |
| that, with maxima of eight neighbours: 74 registers for 127, three programs at a time for two | 0.312 | 0.329 |
| that, both looks for the maximum in one block of code: the pre-pass as it is | 0.312 | 0.310 |
| that, all of the tile held in half precision | 0.301 | 0.314 |
| 64 slots at a time | 0.377 | 0.384 |
| loads by cp.async, two to four stages | 0.390 to 0.478 | 0.377 to 0.448 |

V, transposed, took 0.326 for 32 slots at a time, and takes 0.292 for 64.

**The busiest tiles first.** A tile of text meets every key. It used to be the last of a head, so that each piece ended
with a few multiprocessors at work on text alone. Now programs take the tiles that meet most others first, milliseconds
before and after, medians of three rounds: HunyuanVideo, tile 11x9x5, density 0.19: 45.4 and 42.7; tile 3x5x16, density
0.1: 26.2 and 23.6; CogVideoX, density 0.18: 2.24 and 2.19. Outputs are the same to the bit.

**An illegal access, found and mended.** The kernel used to set up its two ping-pong barriers whether it used them or
not; Triton puts what is handed to the roles at the same place in shared memory. Now and then, mostly beside other
processes, a role took a barrier's bits for the address of its list of keys. compute-sanitizer shows that very value
as the address (162 errors of the old source on two heads of the case above); barriers that nobody uses are no longer
set up, and it finds no error in five runs: two heads of the case, the probe's small cases with masks and scales per
32 slots, and a call of the package. 60 launches beside four other processes: the old source failed, the new one did
not. Its race detector reports four places, all where Triton hands values to the roles; whether it knows those
barriers is not known.
"""

MAXIMA = """## Without the running maximum

That the kernel takes 26.7 ms without maxima (above) asked whether it needs them. It takes from a row's scores what the
first block asked for, and more only where the weights of a lane, 32 of a row and a block, sum up to more than 448, the
largest number of E4M3: the four lanes of the row then agree on a power of two. Where scores grow by 2^120 within a
block, float32 overflows, and a second launch does that block of queries again with every maximum. Since what is taken
is a whole number (of powers of two), weights are rounded alike whatever it is. The attention kernel alone, operands of
`benchmarks/gpu/hopper_probe.py`, milliseconds, medians of four to six rounds in turn; ranges are of several runs:

| case | every maximum | as it is | no maxima, no checks (results wrong) |
|---|---|---|---|
| Wan 14B 720p, tile 7x9x4, density 0.21 | 28.4 to 28.9 | 26.1 to 26.9 | 25.8 to 26.4 |
| the same, density 0.05 | 7.3 to 7.5 | 7.0 to 7.1 | 6.7 to 6.8 |
| the same, tile 4x8x8 | 21.0 | 20.1 | |
| the same, tile 4x4x4 | 19.9 | 19.4 | |
| 13x30x45, 48 heads of 64 features, tile 13x2x9 | 1.87 | 1.71 | |

The second launch takes 15 us of the last row. Errors against float32 are those of before (0.0543 and 0.0541 in the
first table's case): what whole numbers cost is that a row's largest weight, which used to be exact, is rounded as the
others are (`tests/test_reference.py` has it in figures). What did not pay, each beside the kernel with a check per half
(26.1 to 26.6) in its own run:

| change | ms |
|---|---|
| one check of both rows, after all exponentials | 29.9 |
| one check of both rows, after P V is added | 28.2 |
| one check at the end, weights cast before it, and again where they did not fit | 27.0 to 28.1 |
| the check of the upper rows behind the wait for P V, all else between the lower rows' exponentials | 27.0 |
| sums of 8 weights held against 448, not of 32 | 27.7 |
| every maximum by a branch in the loop, for rows that overflow, and the roles started again | 27.3 to 28.4 |
| one consumer half a block behind the other | 26.5 to 26.7 |

A check waits for the last exponential, then for its sum, its vote and its branch; the assembler hides that if it finds
exponentials of the other rows to put there. The sources of all rows of the second table differ in little else than
where those end up.
"""

CYCLES = """## Where the cycles go

Of the kernel as it was with running maxima. The power limit is not all of it. Without its softmax (results wrong,
time right) the kernel's loads and products take 17 ms, 1400 TFLOP/s, at the same 690 W and 1545 MHz: what takes fewer
cycles gets a lower clock, and at a lower clock's voltage a product takes less energy. Clocks read inside the kernel,
by one program amid the others, tile 7x9x4, density 0.2, cycles per block of 128 keys and consumer, before the changes
below: maxima, exponentials and sums 1220, waiting for P V and adding it 180, the cast of P 150, waiting for the keys
260, starting the products 160, waiting for Q K^T 195; in all 2160. The exponentials of the two warps of a scheduler
need 1056 of its cycles, the tensor cores 1024.

The exponentials come one every 8 cycles and leave 7 slots free, which the addition of P V and the cast of P can have if
the code is cut between the exponentials of a thread's two rows: the wait for V, a branch, is there now, and what
follows it runs between the exponentials of the second row. The wait for the next keys moved to where Q K^T is waited
for anyway. Milliseconds of the whole call, each row a run of its own with the kernel before in turn (all values of a
run: cards differ by more than the changes):

| change | with it | the kernel before |
|---|---|---|
| cut between the rows | 28.3, 30.2, 28.5 | 28.7, 28.7, 29.0 |
| that, and the mask of the last 16 columns without a branch | 28.3, 28.3, 28.3 | 28.7, 28.7, 29.0 |
| that, and the next keys waited for early: the kernel as it is | 28.4, 28.8, 28.7, 28.8 | 28.9, 28.9, 29.3, 29.8 |
| eleven heads at a time, not ten: 182 rounds of programs, not 184 | 28.3, 28.6, 28.8, 28.5 | 28.6, 28.5, 28.8, 29.0 |

Outputs are the same to the bit. Eleven heads' FP8 copies take 28 MiB more than ten's. What did not pay, against the
kernel before:

| change | with it | the kernel before |
|---|---|---|
| maxima of three at a time, as integers (VIMNMX3) | 28.8, 28.9, 28.8, 29.2 | 28.7, 28.6, 29.1, 28.6 |
| P V added when the next Q K^T has started | 29.5, 29.9, 30.7, 30.2 | 28.6, 28.8, 29.8, 29.2 |
| consumers take turns at the exponentials, by named barriers | 29.2, 32.2, 30.4, 29.8 | 28.6, 28.8, 29.8, 29.2 |
| both | 28.5, 28.8, 29.1, 29.1 | 28.6, 28.8, 29.8, 29.2 |
| the mask without a branch alone | 29.3, 33.2, 30.0, 29.8 | 28.5, 28.4, 30.0, 30.2 |
| one barrier for the keys of a block and the values of the last | 28.3, 28.0, 28.5, 28.4 | 28.3, 28.6, 28.8, 28.5 |

Slots freed by named barriers instead of an mbarrier, on top of the kernel as it is: 28.5, 28.5, 28.6, 29.0, against
28.4, 28.8, 28.7, 28.8. The compiler puts a barrier of the warpgroup around each arrival at an mbarrier. Without
exponentials at all: 24.9; without maxima: 26.7; without sums: 28.3. (The larger of two floats is the larger of the same
bits as integers unless both are negative; a branch mended the rows whose scores all are.)
"""

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


def measured_table(report: dict[str, Any]) -> str:
    peak = report["ceilings"]["fp8_tflops"]
    headings = ("case", "kernel", "tile", "density", "ms", "of it pre-pass", "vs fastest SDPA",
                "TFLOP/s on kept pairs", "of FP8 matmul", "on kept blocks", "error vs float32")  # fmt: skip
    lines = [f"| {' | '.join(headings)} |", "|" + "---|" * len(headings)]
    for row in report["rows"]:
        if "failed" in row:
            continue
        share = f"{row['pre_share']:.0%}" if row.get("pre_ms") else ""
        error = f"{row['error']:.4f}" if "error" in row else ""
        blocks = f"{row['kept_tflops'] * row['block_factor']:.0f}" if "block_factor" in row else ""
        speed = f"{row['kept_tflops']:.0f}", f"{row['kept_tflops'] / peak:.0%}", blocks
        cells = (row["case"], row["kernel"], text_of(row.get("tile")), f"{row['density']:.3f}", f"{row['ms']:.2f}")
        cells += (share, f"{row['speedup']:.2f}x", *speed, error)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def beside(rows: list[dict[str, Any]], predicted: list[dict[str, Any]]) -> tuple[str, float]:
    """(table, rank correlation) of the rows that were both predicted and measured."""
    lines = ["| tile | operands | density | predicted TFLOP/s | measured | ratio |", "|---|---|---|---|---|---|"]
    pairs = []
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
        pairs.append((item["tflops_on_kept_pairs"], row["kept_tflops"]))
        lines.append(
            f"| {text_of(row['tile'])} | {'FP8' if quant == 'fp8' else 'bf16'} | {row['density']:.3f} | "
            f"{pairs[-1][0]:.0f} | {pairs[-1][1]:.0f} | {pairs[-1][1] / pairs[-1][0]:.2f} |"
        )
    return "\n".join(lines), spearman([a for a, _ in pairs], [b for _, b in pairs])


def step_table(profile: dict[str, Any]) -> str:
    """ms of a step of few blocks by what its kernels do, one column per variant."""
    variants = profile["variants"]
    sums: dict[str, dict[str, float]] = {what: dict.fromkeys(variants, 0.0) for what in NAMED}
    for variant, kernels in variants.items():
        for kernel in kernels:
            sums[next(what for what, holds in NAMED.items() if holds(kernel["kernel"]))][variant] += kernel["ms"]
    lines = [f"| ms | {' | '.join(variants)} |", "|---|" + "---|" * len(variants)]
    lines += [f"| {what} | {' | '.join(f'{ms:.1f}' for ms in row.values())} |"
              for what, row in sums.items() if any(row.values())]  # fmt: skip
    totals = (sum(kernel["ms"] for kernel in kernels) for kernels in variants.values())
    return "\n".join([*lines, f"| all | {' | '.join(f'{total:.1f}' for total in totals)} |"])


def product_table(profile: dict[str, Any]) -> str:
    """TFLOP/s of the linear layers' products by shape."""
    names = list(dict.fromkeys(row["product"] for row in profile["products"]))
    lines = [f"| features | {' | '.join(names)} |", "|---|" + "---|" * len(names)]
    for shape in dict.fromkeys((row["in"], row["out"]) for row in profile["products"]):
        speeds = {row["product"]: row["tflops"] for row in profile["products"] if (row["in"], row["out"]) == shape}
        lines.append(f"| {shape[0]} to {shape[1]} | {' | '.join(f'{speeds[name]:.0f}' for name in names)} |")
    return "\n".join(lines)


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
    headings = ("variant", "density", "s", "against Inductor", "peak memory, MiB", "output's distance")
    lines = [f"| {' | '.join(headings)} |", "|" + "---|" * len(headings)]
    for row in model["rows"]:
        cells = (row["variant"], f"{row['density']:g}", f"{row['ms'] / 1e3:.2f}", f"{row['speedup']:.2f}x")
        lines.append(f"| {' | '.join(cells)} | {row['peak_mib']:.1f} | {row['difference']:.3f} |")
    return "\n".join(lines)


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
    lines = [f"| {' | '.join(headings)} |", "|" + "---|" * len(headings)]
    for row in report["rows"]:
        base = next(other for other in report["rows"] if _same_case(row, other) and other["variant"] == "inductor")
        distance = f"{row['difference']:.3f}" if "difference" in row else ""
        cells = (f"{row['model']} {row['size']}", row["variant"], f"{row['density']:g}", f"{row['ms'] / 1e3:.3f}")
        graph = f"{row['graph_ms'] / 1e3:.3f}" if "graph_ms" in row else f"failed: {row['graph_failed']}"
        cells += (graph, f"{base['ms'] / row['ms']:.2f}x", f"{row['peak_mib']:,.0f}")
        own = f"{row['graph_mib']:,.0f}" if "graph_mib" in row else ""
        lines.append(f"| {' | '.join(cells)} | {own} | {distance} |")
    return "\n".join(lines)


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
        f"step ran one graph of a block, compiled once. Peaks above Inductor's: {', '.join(above)}."
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


def main() -> None:
    report, earlier, predictions = load("attention_gpu"), load("attention_gpu_earlier"), load("gpu_predictions")
    profile, model = load("profile_model"), load("model_gpu")
    others = [row for row in earlier["rows"] if row["kernel"].startswith("fps none")]
    table, rank = beside(report["rows"] + others, predictions["predictions"])
    machine, peaks, before = report["machine"], report["ceilings"], earlier["ceilings"]
    again = [row for row in earlier["rows"] if row["case"] == CASE and row.get("tile") == [7, 9, 4]]
    PAGE.write_text(
        f"""# Performance on GPUs: measured

One {machine["gpu"]}, torch {machine["torch"]}, Triton {machine["triton"]}. Ceilings measured in the same run: bf16
matmul {peaks["bf16_tflops"]:.0f} TFLOP/s, FP8 matmul {peaks["fp8_tflops"]:.0f} TFLOP/s (8192^3, random data), copy
{peaks["copy_tbs"]:.2f} TB/s. `benchmarks/gpu/attention_gpu.py` makes the figures, `benchmarks/gpu/outcomes.py` this
page. Medians; quantization, permutes and scatter are inside. Kept pairs are pairs of tokens; kept blocks are what the
kernel multiplies, 64 or 128 rows by 128 keys each, padding inside.

{measured_table(report)}

All rows are of one run, each timed as a CUDA graph, in {report["rounds"]} rounds that time every kernel of a case in
turn: all meet a card at its power limit. Cards differ, and so do moments: tile 7x9x4 at density 0.2 gave 7.49x (880 and
883 TFLOP/s) in two runs; on a third card calls of it took 25.7, 28.3 and 27.1 ms in three rounds, and the attention
kernels of a call in the profiler 24.3 ms, which is 964 TFLOP/s on kept pairs, before the card had lowered its clock.
Errors are relative L2, 512 rows of one head,
random normal inputs, same mask: for FP8 they are E4M3's. The speed on kept pairs is over the total less the pre-pass,
timed by itself.

## An earlier run

On one {earlier["machine"]["gpu"]} too: bf16 matmul {before["bf16_tflops"]:.0f}, FP8 matmul
{before["fp8_tflops"]:.0f} TFLOP/s. It alone has our kernels without quantization; the FP8 rows of one tile
are repeated to show how far two runs differ.

{measured_table({"ceilings": before, "rows": again + [row for row in others if row not in again]})}

## Predictions beside outcomes

The cost model of [performance.md](performance.md) knew none of these runs. Rank correlation (Spearman) of
predicted and measured speed over the rows below (bf16: of the earlier run): {rank:.2f}. Among configs of the plain
kernel it misjudges one pair: it puts 128 rows and 8 warps (740 TFLOP/s) above 64 rows and 4 warps (704); measured on
tile 7x9x4, density 0.2: 576 and 682.

{table}

{PROFILE}
{CYCLES}
{MAXIMA}
## What a step is made of

Kernels of one step of Wan 14B at 720p, cut to {profile["layers"]} blocks, tile 7x9x4, density 0.2, all columns of one
run, on a {profile["machine"]["gpu"]} (`benchmarks/gpu/profile_model.py`):

{step_table(profile)}

Linear layers with static scales are those of `benchmarks/gpu/fp8_linear.py`. Their norms, with the sum before, go into
the quantization (`fuse_norms.py`), as one kernel: 0.50 ms without a sum and 0.82 with a gated one, for 75,600 rows of
5,120 features, where Inductor's three loops took 1.03, 1.13 and 1.28 in the three places, and stored what queries, keys
and values share three times.

The linear layers' products by themselves, TFLOP/s, {TOKENS:,} rows:

{product_table(profile)}

{bound(report, profile, model)}

Whole steps, all 40 blocks (`benchmarks/gpu/model_gpu.py`); memory is the peak above the weights, of what tensors ask
for:

{model_table(model)}

{memory(model, profile)}

{two_gpus(load("model_two_gpus"), model)}

## Both models at both sizes, eager too, with and without CUDA graphs

`benchmarks/gpu/model_gpu.py --cuda-graphs`, a run per model and size on one card each, tiles 7x6x6 at 480p and 7x9x4 at
720p. As a CUDA graph, the whole step is captured once and replayed:

{sizes_table(load("model_gpu_sizes"))}

{sizes(load("model_gpu_sizes"))}

{means(load("remainder_gpu"))}
"""
    )


if __name__ == "__main__":
    main()
