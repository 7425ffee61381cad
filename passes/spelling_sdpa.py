"""PyTorch's own call: brought into canonical argument style, in place; 3-D inputs get a heads dimension.

``[N, L, D]`` is attention with one head and a batch of N, whether N is the batch (one head) or batch and heads folded.
Under autocast the call casts q, k and v itself, as the dtype of its result shows; those casts are written out.
"""

from __future__ import annotations

from typing import Any

from torch import fx
from torch.nn import functional as F

from fpscompile.ir import Reason, Rejection
from fpscompile.passes.base import GraphState, argument, emit, fake_tensor, pinned, shape_of
from fpscompile.passes.canonical import attention, in_dtype, substitute
from fpscompile.passes.declared import CAUSAL

SDPA_ARGUMENTS: tuple[tuple[str, Any], ...] = (
    ("attn_mask", None),
    ("dropout_p", 0.0),
    ("is_causal", False),
    ("scale", None),
    ("enable_gqa", False),
)


def normalize_sdpa(state: GraphState, node: fx.Node) -> bool:
    """One ``scaled_dot_product_attention`` call. Returns whether the graph changed."""
    modified = canonicalize(node)
    tensors = [tensor for tensor in node.args[:3] if fake_tensor(tensor) is not None]
    if len(tensors) == 3 and all(len(shape_of(tensor)) == 3 for tensor in tensors):  # type: ignore[arg-type]
        modified |= _with_heads(state, node)
    elif len(tensors) == 3:
        modified |= _cast(state, node)
    return modified


def _cast(state: GraphState, node: fx.Node) -> bool:
    """q, k and v in the dtype of the result, where autocast makes that another than theirs."""
    result = fake_tensor(node)
    if result is None or all(fake_tensor(tensor).dtype == result.dtype for tensor in node.args[:3]):  # type: ignore[union-attr]
        return False

    def write() -> tuple[fx.Node, fx.Node]:
        call = emit(state, F.scaled_dot_product_attention, node.args, dict(node.kwargs))
        call.args = in_dtype(state, call, result.dtype)
        return call, call

    return substitute(state, node, (), write) is not None


def canonicalize(node: fx.Node) -> bool:
    """Bring an SDPA call into canonical argument style, in place."""
    query, key, value = (argument(node, i, name) for i, name in enumerate(("query", "key", "value")))
    kwargs = {
        name: argument(node, 3 + i, name, default) if i < 3 else node.kwargs.get(name, default)
        for i, (name, default) in enumerate(SDPA_ARGUMENTS)
    }
    kwargs["dropout_p"] = pinned(kwargs["dropout_p"])
    before = (node.target, node.args, node.kwargs)
    node.target = F.scaled_dot_product_attention
    node.args = (query, key, value)
    node.kwargs = kwargs
    return before != (node.target, node.args, node.kwargs)


def _with_heads(state: GraphState, node: fx.Node) -> bool:
    mask, rate, causal = (node.kwargs[name] for name in ("attn_mask", "dropout_p", "is_causal"))
    if node.kwargs["enable_gqa"] or (mask is not None and fake_tensor(mask) is None):
        return False
    declined = None
    if not isinstance(rate, (int, float)) or rate != 0:
        declined = Rejection(Reason.DROPOUT, f"dropout_p={rate}: attention dropout has no fused form", rate, node)
    elif causal is not False:
        declined = Rejection(Reason.CAUSAL, f"is_causal=True: {CAUSAL}", causal, node)

    def write() -> tuple[fx.Node, fx.Node]:
        query, key, value = (emit(state, "unsqueeze", (tensor, 1)) for tensor in node.args[:3])
        seen = mask
        if isinstance(seen, fx.Node) and len(shape_of(seen)) == 3:
            seen = emit(state, "unsqueeze", (seen, 1))
        call = attention(state, query, key, value, seen, node.kwargs["scale"])  # type: ignore[arg-type]
        return call, emit(state, "squeeze", (call, 1))

    return substitute(state, node, (), write, declined) is not None
