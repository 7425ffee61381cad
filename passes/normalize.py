"""normalize: every spelling of attention becomes one canonical call.

The canonical form is ``scaled_dot_product_attention(q, k, v, attn_mask=, dropout_p=, is_causal=, scale=,
enable_gqa=)`` with q, k, v by position and all of the rest by name. Two sources:

1. SDPA calls in any argument style: rewritten in place, arguments only.
2. ``softmax(q @ k^T * scale + mask) @ v`` written out with matmul, bmm, baddbmm or einsum: matched by
   :mod:`fpscompile.passes.softmax_pattern`, replaced as a whole or left alone as a whole.

A match that fails half way is a near miss: it is recorded with the reason and the graph stays as it was.
First in the pipeline, so that all later passes know one spelling.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import fx
from torch.nn import functional as F

from fpscompile.passes.base import GraphState, argument, target_name
from fpscompile.passes.softmax_pattern import Match, match_softmax

SDPA_ARGUMENTS: tuple[tuple[str, Any], ...] = (
    ("attn_mask", None),
    ("dropout_p", 0.0),
    ("is_causal", False),
    ("scale", None),
    ("enable_gqa", False),
)


@dataclass(frozen=True)
class Normalize:
    name: str = "normalize"

    def run(self, state: GraphState) -> bool:
        modified = False
        for node in list(state.graph.nodes):
            if node.op not in ("call_function", "call_method"):
                continue
            name = target_name(node)
            if name == "scaled_dot_product_attention":
                modified |= canonicalize(node)
            elif name in ("softmax", "_softmax"):
                found = match_softmax(node)
                if isinstance(found, Match):
                    found.replace(state)
                    modified = True
                elif found is not None:
                    state.near_misses.append(found)
        return modified


def canonicalize(node: fx.Node) -> bool:
    """Bring an SDPA call into canonical argument style, in place."""
    query, key, value = (argument(node, i, name) for i, name in enumerate(("query", "key", "value")))
    kwargs = {
        name: argument(node, 3 + i, name, default) if i < 3 else node.kwargs.get(name, default)
        for i, (name, default) in enumerate(SDPA_ARGUMENTS)
    }
    before = (node.target, node.args, node.kwargs)
    node.target = F.scaled_dot_product_attention
    node.args = (query, key, value)
    node.kwargs = kwargs
    return before != (node.target, node.args, node.kwargs)


def is_canonical(node: fx.Node) -> bool:
    return node.op == "call_function" and node.target is F.scaled_dot_product_attention
