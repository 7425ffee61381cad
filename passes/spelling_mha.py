"""``nn.MultiheadAttention``: one call of ``multi_head_attention_forward`` on [L, B, E], projections included.

Written out as the three projections, the canonical call and the output projection. The attention weights that it
returns by default do not hinder where nobody reads them.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx
from torch.nn import functional as F

from fpscompile.ir import Reason, Rejection
from fpscompile.passes.base import GraphState, emit, fake_tensor, pinned, shape_of
from fpscompile.passes.canonical import attention, substitute
from fpscompile.passes.declared import CAUSAL, arguments_of
from fpscompile.passes.spelling_flash import covered_by, output_of, reads_more

TENSORS = ("query", "key", "value")


def normalize_mha(state: GraphState, node: fx.Node) -> bool:
    """One ``multi_head_attention_forward`` call. Returns whether the graph changed."""
    arguments, output = arguments_of(node), output_of(node)
    if arguments is None or output is None:
        return False
    tensors = [arguments[name] for name in TENSORS]
    if any(fake_tensor(tensor) is None or len(shape_of(tensor)) != 3 for tensor in tensors):
        message = "looks like attention, but its inputs are not [tokens, batch, features]"
        state.near_misses.append(Rejection(Reason.LAYOUT, message, None, node))
        return False
    covered = covered_by(node, output)
    declined = asks_for_more(node, arguments)
    return substitute(state, output, covered, lambda: _write(state, arguments), declined, anchor=node) is not None


def asks_for_more(node: fx.Node, arguments: dict[str, Any]) -> Rejection | None:
    """What keeps the module from being three projections, plain attention and one more."""
    rate = pinned(arguments["dropout_p"])
    if arguments["training"] is not False and (not isinstance(rate, (int, float)) or rate != 0):
        message = f"dropout_p={rate}: attention dropout has no fused form; train with dropout 0 or call model.eval()"
        return Rejection(Reason.DROPOUT, message, rate, node)
    if arguments.get("is_causal"):
        return Rejection(Reason.CAUSAL, f"is_causal=True: {CAUSAL}", True, node)
    if arguments.get("attn_mask") is not None:
        return Rejection(Reason.MASK, "attn_mask differs from query to query; only a key mask is supported", None, node)
    for name in ("bias_k", "bias_v", "static_k", "static_v"):
        if arguments.get(name) is not None:
            return Rejection(Reason.SPELLING, f"{name} adds or replaces keys", None, node)
    if arguments.get("add_zero_attn"):
        return Rejection(Reason.SPELLING, "add_zero_attn=True adds a key", True, node)
    if reads_more(node) is not None:
        return Rejection(Reason.SPELLING, "the attention weights are read; pass need_weights=False", None, node)
    return None


def _write(state: GraphState, arguments: dict[str, Any]) -> tuple[fx.Node, fx.Node]:
    heads = arguments["num_heads"]
    biases = _thirds(state, arguments["in_proj_bias"])
    if arguments.get("use_separate_proj_weight"):
        weights = [arguments[f"{letter}_proj_weight"] for letter in "qkv"]
    else:
        weights = _thirds(state, arguments["in_proj_weight"])
    query, key, value = (
        _heads(state, emit(state, F.linear, (arguments[name], weight, bias)), heads)
        for name, weight, bias in zip(TENSORS, weights, biases, strict=True)
    )
    call = attention(state, query, key, value, _key_mask(state, arguments.get("key_padding_mask")))
    joined = emit(state, "flatten", (emit(state, "permute", (call, 2, 0, 1, 3)), 2))
    return call, emit(state, F.linear, (joined, arguments["out_proj_weight"], arguments["out_proj_bias"]))


def _thirds(state: GraphState, packed: fx.Node | None) -> list[fx.Node | None]:
    if packed is None:
        return [None] * 3
    parts = emit(state, "chunk", (packed, 3))
    return [emit(state, operator.getitem, (parts, i)) for i in range(3)]


def _heads(state: GraphState, tokens: fx.Node, heads: int) -> fx.Node:
    """[L, B, heads * D] -> [B, heads, L, D]."""
    return emit(state, "permute", (emit(state, "unflatten", (tokens, -1, (heads, -1))), 1, 2, 0, 3))


def _key_mask(state: GraphState, mask: fx.Node | None) -> fx.Node | None:
    """[B, keys], True or -inf where a key is hidden -> [B, 1, 1, keys] for SDPA."""
    if mask is None:
        return None
    if fake_tensor(mask).dtype == torch.bool:  # type: ignore[union-attr]
        mask = emit(state, "logical_not", (mask,))
    return emit(state, operator.getitem, (mask, (slice(None), None, None)))
