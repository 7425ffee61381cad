"""The table of docs/models.md: every model of the registries, what is found in it and what becomes of it.

Each model is a small random one of the registries under tests/models. It is run eagerly and compiled with
``inner="eager"``, once with a dense mask and once with a tile window, against eager with that window expanded to a
mask: the two error columns show the rewrite alone. With ``--compile-time``, seconds of a cold compile are measured
too, ours against Inductor's, both with Inductor underneath; families first, until the budget is spent. Run it again
to measure those that are left: what is in the JSON file already is kept.

    python benchmarks/models_table.py [--only NAME ...] [--compile-time [--budget SECONDS]] [--again] [--render]
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import time
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT), str(ROOT / "tests")]

RESULTS = ROOT / "benchmarks" / "results" / "models.json"
PAGE = ROOT / "docs" / "models.md"

HEADER = """# Models

What `backend="fps"` finds in each model and what becomes of it. All are small random models with an odd, non-square
grid; a row holds for the real weights as well, since only shapes and code are read. Made by
`python benchmarks/models_table.py` with torch {torch} and diffusers {diffusers}; `tests/test_zoo.py` and
`tests/test_authors.py` hold every row to its registry under `tests/models`.

* **found**: attention calls that reach the backend, by kind. Blocks that are compiled once are listed once.
* **video calls**: how many are rewritten, or why they are left as they are (see below).
* **grid**: who shows (t, h, w): the graph, the values of a rotary table, or `fpscompile.attach`.
* **dense**: relative error to eager, float32, with a dense mask and no quantization.
* **window**: the same with a tile window, against eager with the window as a mask.
* **graphs**: that Dynamo makes of one call.
* **compile**: seconds of a cold compile, `fps` / Inductor alone. {timing}

## diffusers

"""
AUTHORS_TITLE = """
## As their authors write them

Re-creations of original code and of ways to write attention: flash-attn and xformers ops, `flex_attention`, einsum,
batched products, `nn.MultiheadAttention`, slices, other token orders. `listed` and `each` stand for rotary code that
calls `.tolist()` on a tensor of sizes, once for a block or for q and for k, which breaks the graph.

"""
REASONS = """
## Reasons

The report has the sentence and the value for each.

| code | meaning, and what helps |
|---|---|
| `kind` | spatial, temporal or cross attention, or a text encoder's: no 3D attention, nothing to do |
| `no-grid` | nothing shows (t, h, w): give `options["grid"]` or use `fpscompile.attach` |
| `grid-mismatch` | a table of positions shows another order or grid than the one that was told: tell the tokens' own |
| `token-order` | tokens are not in row-major (t, h, w) order: flatten the video so |
| `segments` | keys and values, or queries, are not all of the video's tokens: call attention on all of them at once |
| `dropout` | attention dropout: train with dropout 0, or call `model.eval()` |
| `causal` | causal attention is not full 3D attention: pass `is_causal=False` if the model does not mean it |
| `mask` | a full mask [queries, keys], such as causal blocks of frames: only key masks combine with a window |
| `dtype` | q, k and v differ in dtype, or it is not supported: cast to float32, bfloat16, float16 or float64 |
| `layout` | q, k, v are not [batch, heads, tokens, features] of matching batch and heads: reshape or expand them |
| `spelling` | not quite attention (soft cap, sinks, weights that are read): use `scaled_dot_product_attention` |
| `subgraph` | inside an op that is not looked into: compile the blocks; or a `torch.func` transform: put it outside |
| `disabled` | `FPS_DISABLE` is set: unset it |

A grid from a rotary table is read anew at each call. Capture flags are attributes of `torch._dynamo.config`, to be
set before the first call.
"""
COMPILATION = ("fps_s", "inductor_s", "inductor_fails")
"""Of a row: what ``--compile-time`` measures."""
COLUMNS = ["model", "found", "video calls", "grid", "dense", "window", "graphs"]


def seconds(entry: Any, backend: Any) -> float:
    """A cold first call, less the second."""
    import torch
    from models.run_zoo import compiled
    from models.zoo_entry import output

    model = entry.build()
    torch._dynamo.reset()
    times = []
    with torch.no_grad(), compiled(entry, model, backend) as (run, _), torch._inductor.utils.fresh_cache():
        for _ in range(2):
            inputs, began = entry.inputs(entry.grid), time.perf_counter()
            output(run, **inputs)
            times.append(time.perf_counter() - began)
    return times[0] - times[1]


def described(name: str, group: str, sites: list[Any], graphs: int, notes: list[str]) -> dict[str, Any]:
    """What the records of a compiled model say, as one row."""
    video = [site for site in sites if site.kind == "3d" or site.reason_code not in (None, "kind")]
    outcomes = Counter("rewritten" if site.rewritten else str(site.reason_code) for site in video)
    return {
        "model": name,
        "group": group,
        "found": dict(sorted(Counter(site.kind for site in sites).items())),
        "video_calls": dict(outcomes),
        "grid": list(dict.fromkeys(site.grid_source for site in video if site.grid_source)),
        "graphs": graphs,
        "notes": notes,
    }


def diffusers_row(name: str, entry: Any) -> dict[str, Any]:
    """One model of diffusers."""
    import torch
    from models.oracle import WindowedCalls
    from models.run_zoo import OPTIONS, compiled, masks, relative
    from models.zoo_entry import output

    from fpscompile import Backend, Settings

    fps, model = Backend(Settings.from_options(OPTIONS)), entry.build()
    torch._dynamo.reset()
    with torch.no_grad():
        expected = output(model, **entry.inputs(entry.grid))
        with WindowedCalls(masks(entry)):
            windowed = output(model, **entry.inputs(entry.grid))
        with compiled(entry, model, fps) as (run, attachment):
            attachment.step(0, 2)
            dense = relative(output(run, **entry.inputs(entry.grid)), expected)
            attachment.step(1, 2)
            window = relative(output(run, **entry.inputs(entry.grid)), windowed)
    notes = [entry.note] if entry.note else []
    if entry.capture:
        notes.append("needs " + ", ".join(f"`{flag}`" for flag in entry.capture))
    if entry.blocks:
        notes.append("blocks compiled on their own")
    sites = [site for graph in fps.graphs for site in graph.sites]
    result = described(name, "diffusers", sites, len(fps.graphs), notes)
    return result | {"family": entry.family, "dense": dense, "window": window if entry.rewritten else None}


def author_row(name: str, entry: Any) -> dict[str, Any]:
    """One model in its author's own spelling."""
    import contextlib

    import torch
    from models.authors_zoo import GRID, build, inputs
    from models.run_zoo import OPTIONS, relative

    import fpscompile
    from fpscompile import Backend, Settings

    dense = {key: value for key, value in OPTIONS.items() if key != "schedule"} | {"density": 1.0}
    fps = Backend(Settings.from_options(dense))
    torch.manual_seed(1)
    model, arguments = build(entry), inputs(entry)
    torch._dynamo.reset()
    run = torch.compile(model, backend=fps)
    with torch.no_grad(), fpscompile.attach(run, grid=GRID) if entry.attach else contextlib.nullcontext():
        error = relative(run(**arguments), model(**arguments))
    sites = [site for graph in fps.graphs for site in graph.sites]
    return described(name, "authors", sites, len(fps.graphs), []) | {"family": name, "dense": error, "window": None}


def measure(entry: Any) -> dict[str, float | str]:
    """Compile times of one model, or why Inductor alone cannot compile it."""
    from models.run_zoo import OPTIONS
    from torch._inductor.exc import InductorError

    from fpscompile import Backend, Settings

    try:
        alone = seconds(entry, "inductor")
    except InductorError as error:
        return {"inductor_fails": str(error).strip().splitlines()[0]}
    fps = Backend(Settings.from_options(OPTIONS | {"inner": "inductor"}))
    return {"fps_s": seconds(entry, fps), "inductor_s": alone}


def error_text(value: float | None) -> str:
    return "-" if value is None else "0" if value == 0 else f"{value:.0e}"


def line(row: dict[str, Any]) -> str:
    """One row in Markdown."""
    found = ", ".join(f"{count} {kind}" for kind, count in row["found"].items()) or "none"
    calls = [
        f"{count} rewritten" if what == "rewritten" else f"{count} left: `{what}`"
        for what, count in row["video_calls"].items()
    ]
    cells = [row["model"], found, ", ".join(calls) or "none", ", ".join(row["grid"]) or "-"]
    cells.append(error_text(row["dense"]))
    if row["group"] == "diffusers":
        timing, notes = "-", list(row["notes"])
        if "fps_s" in row:
            timing = f"{row['fps_s']:.1f} / {row['inductor_s']:.1f}"
        elif "inductor_fails" in row:
            notes.append(f"Inductor alone cannot compile it on a CPU (`{row['inductor_fails']}`)")
        cells += [error_text(row["window"]), str(row["graphs"]), timing, "; ".join(notes)]
    else:
        cells.append(str(row["graphs"]))
    return "| " + " | ".join(cells) + " |"


def page(report: dict[str, Any]) -> str:
    """docs/models.md."""
    rows = report["rows"]
    timed = [row for row in rows if "fps_s" in row]
    timing = (
        f"Measured on {report['machine']['threads']} threads of {report['machine']['processor']}; each once."
        if timed
        else "Not measured yet: `--compile-time`."
    )
    text = HEADER.format(timing=timing, **report["summary"])
    for group, title, columns in (
        ("diffusers", "", [*COLUMNS, "compile", "notes"]),
        ("authors", AUTHORS_TITLE, [column for column in COLUMNS if column != "window"]),
    ):
        body = [line(row) for row in rows if row["group"] == group]
        text += title + f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}\n" + "\n".join(body) + "\n"
    return text + REASONS


def save(rows: dict[tuple[str, str], dict[str, Any]], order: list[tuple[str, str]]) -> None:
    import diffusers
    import torch
    from _harness import write_json

    summary = {"torch": torch.__version__.split("+")[0], "diffusers": diffusers.__version__}
    write_json(RESULTS, "models_table", [rows[key] for key in order if key in rows], summary)
    PAGE.write_text(page(json.loads(RESULTS.read_text())))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=[], help="parts of names")
    parser.add_argument("--compile-time", action="store_true", help="measure compile times that are not known yet")
    parser.add_argument("--budget", type=float, default=600, help="seconds after which no further model is timed")
    parser.add_argument("--again", action="store_true", help="measure compile times anew")
    parser.add_argument("--render", action="store_true", help="only write the page from the JSON file")
    arguments = parser.parse_args()
    if arguments.render:
        PAGE.write_text(page(json.loads(RESULTS.read_text())))
        return
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    import torch
    from models.authors_zoo import AUTHORS
    from models.diffusers_zoo import DIFFUSERS_ZOO

    entries = {("diffusers", name): entry for name, entry in DIFFUSERS_ZOO.items()}
    entries |= {("authors", name): entry for name, entry in AUTHORS.items()}  # type: ignore[dict-item, misc]
    order = list(entries)
    known = json.loads(RESULTS.read_text())["rows"] if RESULTS.exists() else []
    rows = {(row["group"], row["model"]): row for row in known}
    chosen = [key for key in order if not arguments.only or any(part in key[1] for part in arguments.only)]
    if not arguments.compile_time:
        for group, name in chosen:
            make = diffusers_row if group == "diffusers" else author_row
            times = {key: value for key, value in rows.get((group, name), {}).items() if key in COMPILATION}
            rows[group, name] = make(name, entries[group, name]) | times
            print(line(rows[group, name]), flush=True)
        save(rows, order)
        return
    timed = [key for key in chosen if key[0] == "diffusers" and key in rows]
    if not arguments.again:
        timed = [key for key in timed if not rows[key].keys() & set(COMPILATION)]
    firsts = {entries[key].family: key for key in reversed(timed)}
    timed = [*firsts.values(), *(key for key in timed if key not in firsts.values())]
    torch.compile(lambda x: x + 1)(torch.ones(8))  # imports and the compiler's self-test are nobody's cost
    began = time.perf_counter()
    for key in timed:
        if time.perf_counter() - began > arguments.budget:
            print("the budget is spent; run it again to go on")
            break
        known_before = {name: value for name, value in rows[key].items() if name not in COMPILATION}
        rows[key] = known_before | measure(entries[key])
        print(line(rows[key]), flush=True)
        save(rows, order)


if __name__ == "__main__":
    main()
