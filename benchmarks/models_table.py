"""The table of docs/models.md: every model of the registry, what is found in it and what becomes of it.

Each model is a small random one of the registry under tests/models, run once eagerly and once compiled with
``quant="none"`` and ``density=1.0``: the parity column is the relative error between the two, so it shows the rewrite
alone. With ``--compile-time`` the last column holds seconds of a cold compile, ours against Inductor's, both with
Inductor underneath.

    python benchmarks/models_table.py [--only NAME ...] [--compile-time] [--output docs/models.md]
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import sys
import time
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

HEADER = """# Models

Every video denoiser of diffusers {version}, as a small random model with an odd, non-square grid, and image models
for comparison. Made by `python benchmarks/models_table.py`; the registry is `tests/models/diffusers_zoo.py`, and
`tests/test_zoo.py` holds every row to it.

* **found**: attention calls that reach the backend, by kind. Blocks that are compiled once are listed once.
* **3D calls**: how many are rewritten, or why they are left as they are.
* **grid**: who shows (t, h, w): the graph, the values of a rotary table, or `fpscompile.attach`.
* **parity**: relative error to eager with a dense mask and no quantization, float32.
* **graphs**: that Dynamo makes of one call.{compile_column}

| model | found | 3D calls | grid | parity | graphs |{title} notes |
|---|---|---|---|---|---|{rule}---|
"""
FOOTER = """
`rotary` grids are read anew at each call, from at most 4096 sampled rows once the grid is known. Capture flags are
attributes of `torch._dynamo.config`, to be set before the first call.
"""


def seconds(entry: Any, backend: Any) -> float:
    """A cold first call, less the second."""
    import torch
    from models.zoo_entry import output

    model = entry.build()
    torch._dynamo.reset()
    times = []
    with torch.no_grad(), torch._dynamo.config.patch(**entry.capture), torch._inductor.utils.fresh_cache():
        run = torch.compile(model, backend=backend)
        for _ in range(2):
            inputs, began = entry.inputs(entry.grid), time.perf_counter()
            output(run, **inputs)
            times.append(time.perf_counter() - began)
    return times[0] - times[1]


def row(name: str, entry: Any, compile_time: bool) -> str:
    """One line of the table."""
    import torch
    from models.zoo_entry import output

    import fpscompile
    from fpscompile import Backend, Settings

    options = {"quant": "none", "density": 1.0, "tile": (2, 2, 4)}
    fps = Backend(Settings.from_options(options | {"inner": "eager"}))
    model = entry.build()
    torch._dynamo.reset()
    with torch.no_grad(), torch._dynamo.config.patch(**entry.capture), contextlib.ExitStack() as stack:
        expected = output(model, **entry.inputs(entry.grid))
        if entry.attach:
            stack.enter_context(fpscompile.attach(model))
        if entry.blocks:
            model.compile_repeated_blocks(backend=fps, fullgraph=True)
        run = model if entry.blocks else torch.compile(model, backend=fps)
        actual = output(run, **entry.inputs(entry.grid))
    error = float((actual - expected).norm() / expected.norm())
    sites = [site for graph in fps.graphs for site in graph.sites]
    found = ", ".join(f"{count} {kind}" for kind, count in sorted(Counter(site.kind for site in sites).items()))
    video = [site for site in sites if site.kind == "3d" or (site.reason_code not in (None, "kind"))]
    outcome = Counter("rewritten" if site.rewritten else f"left: {site.reason_code}" for site in video)
    calls = ", ".join(f"{count} {what}" for what, count in outcome.items()) or "none"
    sources = ", ".join(dict.fromkeys(site.grid_source for site in video if site.grid_source)) or "-"
    notes = [entry.note] if entry.note else []
    if entry.capture:
        notes.append("needs " + ", ".join(f"`{flag}`" for flag in entry.capture))
    if entry.blocks:
        notes.append("blocks compiled on their own")
    timing = ""
    if compile_time:
        ours = seconds(entry, Backend(Settings.from_options(options)))
        timing = f" {ours:.1f} s / {seconds(entry, 'inductor'):.1f} s |" if not entry.blocks else " - |"
    parity = "0" if error == 0 else f"{error:.0e}"
    return f"| {name} | {found} | {calls} | {sources} | {parity} | {len(fps.graphs)} |{timing} {'; '.join(notes)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=[], help="parts of names")
    parser.add_argument("--compile-time", action="store_true", help="add a column; takes about a minute a model")
    parser.add_argument("--output", type=Path, help="write the page here instead of printing it")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    import diffusers
    from models.diffusers_zoo import DIFFUSERS_ZOO

    extra = arguments.compile_time
    lines = [
        row(name, entry, extra)
        for name, entry in DIFFUSERS_ZOO.items()
        if not arguments.only or any(part in name for part in arguments.only)
    ]
    head = HEADER.format(
        version=diffusers.__version__,
        compile_column="\n* **compile**: seconds of a cold compile with Inductor underneath, fps / Inductor alone."
        if extra
        else "",
        title=" compile |" if extra else "",
        rule="---|" if extra else "",
    )
    page = head + "\n".join(lines) + "\n" + FOOTER
    if arguments.output is None:
        print(page)
    else:
        arguments.output.write_text(page)


if __name__ == "__main__":
    main()
