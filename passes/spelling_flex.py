"""``flex_attention``: attention when its score function is the identity and its block mask the empty one.

A score function or a block mask makes it something else: the site is shown to find_sites and declined. A block mask
whose mask function is constant may still skip blocks, so only the one that PyTorch makes when none is given counts as
empty: one block larger than any sequence.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from fpscompile.ir import Reason, Rejection
from fpscompile.passes.base import GraphState, argument, target_name
from fpscompile.passes.canonical import attention, substitute
from fpscompile.passes.spelling_flash import covered_by, output_of, reads_more

WHOLE = 1 << 30
"""Block size of PyTorch's empty block mask."""


def normalize_flex(state: GraphState, node: fx.Node) -> bool:
    """One ``flex_attention`` call. Returns whether the graph changed."""
    output = output_of(node)
    if output is None or len(node.args) < 6:
        return False
    query, key, value = node.args[:3]
    declined = _score_function(state, node) or _block_mask(state, node) or reads_more(node)

    def write() -> tuple[fx.Node, fx.Node]:
        call = attention(state, query, key, value, None, node.args[5])  # type: ignore[arg-type]
        return call, call

    return substitute(state, output, covered_by(node, output), write, declined, anchor=node) is not None


def _body(state: GraphState, node: Any) -> fx.Graph | None:
    module = getattr(state.gm, str(node.target), None) if isinstance(node, fx.Node) and node.op == "get_attr" else None
    return module.graph if isinstance(module, fx.GraphModule) else None


def _score_function(state: GraphState, node: fx.Node) -> Rejection | None:
    graph = _body(state, argument(node, 3, "score_mod"))
    if graph is not None:
        score = next(n for n in graph.nodes if n.op == "placeholder")
        (result,) = (n.args[0] for n in graph.nodes if n.op == "output")
        if result is score or result == (score,):
            return None
    return Rejection(Reason.SPELLING, "flex_attention changes its scores by a score function", None, node)


def _block_mask(state: GraphState, node: fx.Node) -> Rejection | None:
    fields = argument(node, 4, "block_mask")
    if isinstance(fields, (tuple, list)) and len(fields) >= 8:
        q_length, k_length, counts, *_rest, q_block, k_block, mask_function = fields
        blocks = [size for size in (q_block, k_block) if isinstance(size, int) and size >= WHOLE]
        made_here = isinstance(counts, fx.Node) and target_name(counts) == "ones"
        if (q_length, k_length) == (1, 1) and len(blocks) == 2 and made_here and _always_true(state, mask_function):
            return None
    message = "a block mask selects pairs of tokens; only a key mask can be combined with a tile window"
    return Rejection(Reason.MASK, message, None, node)


def _always_true(state: GraphState, function: Any) -> bool:
    graph = _body(state, function)
    if graph is None:
        return False
    (result,) = (n.args[0] for n in graph.nodes if n.op == "output")
    result = result[0] if isinstance(result, tuple) else result
    if not isinstance(result, fx.Node) or target_name(result) not in ("new_ones", "ones"):
        return False
    return result.kwargs.get("dtype") is torch.bool
