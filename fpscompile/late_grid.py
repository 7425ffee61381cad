"""Graphs that were compiled before anybody could tell them a video's grid.

A block that was compiled alone asks the attachment for a grid while it is compiled. Dynamo then runs the same code for
other sizes, without asking again: what was compiled for an image, or ahead of the attachment, is dense for all videos
that follow. Nothing that Dynamo could guard on tells the two apart, so the first such video says it.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import sympy
import torch

from fpscompile import runtime
from fpscompile.errors import StrictError
from fpscompile.ir import Reason
from fpscompile.passes.base import GraphState, fake_value, module_path

logger = logging.getLogger(__name__)

FOR_AN_IMAGE = (
    "for an image",
    "let a video be what the attached model is called with first (images that come later run dense all the same)",
)
WITHOUT_A_GRID = (
    "when no grid was published",
    "attach the model ahead of its first call, with a grid where its inputs do not tell one",
)


def watch(state: GraphState) -> Callable[[Sequence[Any]], None] | None:
    """What to call ahead of every run of the graph with its arguments; None where no call in it waits for a grid.

    It logs one warning, or with ``strict`` raises StrictError, when the running call publishes the grid of a video and
    attention was left alone over exactly that many tokens.
    """
    published = state.published_grid
    if state.settings.grid is not None or (published is not None and published[0] > 1):
        return None
    left = [
        site
        for site in state.sites
        if site.kind == "other" and site.rejection is not None and site.rejection.code in (Reason.KIND, Reason.NO_GRID)
    ]
    if not left:
        return None
    lengths = [site.shape[2].expr for site in left]
    names = [module_path(site.node) or site.node.name for site in left]
    why, remedy = FOR_AN_IMAGE if published is not None else WITHOUT_A_GRID
    homes, strict = dict(_homes(state)), state.settings.strict  # the graph itself need not live on
    said = False

    def check(arguments: Sequence[Any]) -> None:
        nonlocal said
        call = runtime.current_call()
        if said or call is None or call.grid is None or call.grid[0] < 2:
            return
        sizes = {symbol: _read(arguments[place], dim) for symbol, (place, dim) in homes.items()}
        tokens = math.prod(call.grid)
        found = next((name for n, name in zip(lengths, names, strict=True) if n.xreplace(sizes) == tokens), None)
        if found is None:
            return
        message = (
            f"{found} was compiled {why} and runs this video, of grid {call.grid}, as it is: its attention is dense. "
            f"To have it rewritten, call torch._dynamo.reset() and {remedy}, or compile the whole model"
        )
        if strict:
            raise StrictError(message)
        said = True
        logger.warning("%s", message)

    return check


def _homes(state: GraphState) -> Iterator[tuple[sympy.Symbol, tuple[int, int | None]]]:
    """Each symbol of the inputs' sizes, with the number of the input and the dimension that it is; None for an int."""
    inputs = [node for node in state.graph.nodes if node.op == "placeholder"]
    for place, node in enumerate(inputs):
        value = fake_value(node)
        sizes = list(enumerate(value.shape)) if isinstance(value, torch.Tensor) else [(None, value)]
        for dim, size in sizes:
            if isinstance(size, torch.SymInt) and isinstance(size.node.expr, sympy.Symbol):
                yield size.node.expr, (place, dim)


def _read(argument: Any, dim: int | None) -> sympy.Integer:
    return sympy.Integer(int(argument if dim is None else argument.shape[dim]))
