"""normalize: every spelling of attention becomes one canonical call.

The canonical form and how it takes another's place are in :mod:`fpscompile.passes.canonical`. Each family of
spellings has a file of its own:

- ``spelling_sdpa``: PyTorch's call in any argument style, 3-D or 4-D;
- ``softmax_pattern``: ``softmax(q @ k^T * scale + mask) @ v`` written out with matmul, bmm, baddbmm or einsum;
- ``written_softmax``: the same where the softmax itself is written out, as powers over their sum;
- ``other_weights``: weights that no softmax made, which are not rewritten but named;
- ``spelling_flash``, ``spelling_varlen``: flash-attn's and xformers' ops, dense and packed;
- ``spelling_autograd``: those ops inside an ``autograd.Function``, as training captures them;
- ``spelling_flex``: ``flex_attention``;
- ``spelling_mha``: ``nn.MultiheadAttention``;
- ``spelling_chunks``: calls on consecutive slices of the queries, put together again.

In front of them, writes in place that fill a new tensor become one expression (``interleaved_writes``): what follows is
then a graph of values, and Inductor's kernels for it are fewer.

A match that fails half way is a near miss: it is recorded with the reason and the graph stays as it was. A match that
asks for more than attention (dropout, a causal mask) is spelled canonically for find_sites to see, declined with its
reason, and the author's own again in the end. First in the pipeline, so that all later passes know one spelling.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from fpscompile.passes.base import GraphState, target_name
from fpscompile.passes.canonical import is_canonical
from fpscompile.passes.interleaved_writes import join_writes
from fpscompile.passes.other_weights import WEIGHINGS, note_other_weights
from fpscompile.passes.softmax_pattern import normalize_softmax
from fpscompile.passes.spelling_autograd import normalize_autograd
from fpscompile.passes.spelling_chunks import join_chunks
from fpscompile.passes.spelling_flash import is_declared, normalize_flash
from fpscompile.passes.spelling_flex import normalize_flex
from fpscompile.passes.spelling_mha import normalize_mha
from fpscompile.passes.spelling_sdpa import normalize_sdpa
from fpscompile.passes.subgraphs import open_bodies
from fpscompile.passes.written_softmax import POWERS, normalize_written

__all__ = ["Normalize", "is_canonical"]

SPELLINGS = {
    "scaled_dot_product_attention": normalize_sdpa,
    "softmax": normalize_softmax,
    "_softmax": normalize_softmax,
    **dict.fromkeys(POWERS, normalize_written),
    **dict.fromkeys(WEIGHINGS, note_other_weights),
    "hop::flex_attention": normalize_flex,
    "hop::autograd_function_apply": normalize_autograd,
    "multi_head_attention_forward": normalize_mha,
}


@dataclass(frozen=True)
class Normalize:
    name: str = "normalize"

    def run(self, state: GraphState) -> bool:
        modified = open_bodies(state)
        for graph in state.everywhere():
            modified |= join_writes(graph)
            for node in list(graph.graph.nodes):
                if node.op in ("call_function", "call_method") and not node._erased:
                    modified |= _spell(graph, node)
            modified |= join_chunks(graph)
        return modified


def _spell(state: GraphState, node: fx.Node) -> bool:
    name = target_name(node)
    rule = SPELLINGS.get(name) or (normalize_flash if is_declared(name) else None)
    return rule(state, node) if rule is not None else False
