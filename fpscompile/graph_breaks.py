"""Say which call broke a graph in the middle of a model, and what can be done: attention behind it may not show."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import fx

from fpscompile.passes.base import target_name
from fpscompile.records import Note, SiteRecord

DATA_DEPENDENT = ("Dynamic shape", "Data dependent", "item()", "step_unsupported")
CAPTURE = (
    "set torch._dynamo.config.capture_dynamic_output_shape_ops and capture_scalar_outputs to True before the first "
    "call, so that sizes which depend on data are captured"
)
PRODUCTS = frozenset(["linear", "matmul", "bmm", "conv2d", "conv3d", "einsum", "__matmul__"])
LARGE = 8
"""Matrix products from which on a graph is a model rather than a piece of one."""


def notes_on_breaks(gm: fx.GraphModule, sites: Sequence[SiteRecord]) -> list[Note]:
    """Notes on a graph that ends early, or that is a whole model without any attention.

    A warning where the break left this graph without a rewritten call; otherwise information.
    """
    rewritten = any(site.rewritten for site in sites)
    reason = getattr(gm, "compile_subgraph_reason", None)
    if getattr(reason, "graph_break", False):
        level = "info" if rewritten else "warning"
        return [Note(level, "graph-break", _message(reason))]
    products = sum(node.op == "call_function" and target_name(node) in PRODUCTS for node in gm.graph.nodes)
    if not sites and products >= LARGE:
        message = (
            f"a graph of {products} matrix products shows no attention call: nothing is rewritten in it. Attention in "
            "a custom op, or in functions that torch.compiler.disable keeps out, cannot be seen"
        )
        return [Note("warning", "no-attention", message)]
    return []


def _message(reason: Any) -> str:
    frames = list(getattr(reason, "user_stack", None) or ())
    place = (
        f"{Path(frames[-1].filename).name}:{frames[-1].lineno} ({frames[-1].line})" if frames else "an unknown place"
    )
    text = str(getattr(reason, "reason", "") or "")
    why = text.strip().splitlines()[0] if text.strip() else "unknown reason"
    remedy = (
        CAPTURE
        if any(word in text for word in DATA_DEPENDENT)
        else "compile the model's blocks on their own (compile_repeated_blocks) and call fpscompile.attach(model) first"
    )
    return (
        f"the graph breaks at {place}: {why}. Attention behind it is compiled apart, where grid and step may not show; "
        f"{remedy}"
    )
