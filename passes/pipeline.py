"""The order of the passes, and the loop that runs, times and checks them."""

from __future__ import annotations

import time
from collections.abc import Callable

from fpscompile.passes.base import GraphState, Pass
from fpscompile.passes.find_sites import FindSites
from fpscompile.passes.fuse_rotary import FuseRotary
from fpscompile.passes.lower_sites import LowerSites
from fpscompile.passes.normalize import Normalize
from fpscompile.passes.plan_sites import PlanSites
from fpscompile.passes.restore import Restore
from fpscompile.passes.trace_axes import TraceAxes
from fpscompile.records import PassRecord

PIPELINE: tuple[Pass, ...] = (
    Normalize(),
    TraceAxes(),
    FindSites(),
    PlanSites(),
    LowerSites(),
    FuseRotary(),
    Restore(),
)


def run_pipeline(
    state: GraphState, pipeline: tuple[Pass, ...] = PIPELINE, observe: Callable[[str], None] | None = None
) -> list[PassRecord]:
    """Run every pass once, in order. The graph is linted after each pass that changed it.

    Args:
        observe: called with each pass's name just before it runs: for pictures, dumps and checks.
    """
    records = []
    for step in pipeline:
        if observe is not None:
            observe(step.name)
        began = time.perf_counter()
        modified = step.run(state)
        if modified:
            for graph in state.everywhere():
                graph.graph.lint()
        records.append(PassRecord(step.name, time.perf_counter() - began, modified))
    if any(record.modified for record in records):
        for graph in state.everywhere():
            graph.gm.recompile()
    return records
