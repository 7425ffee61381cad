"""Attention ops of other packages: their arguments by name, and what those ask for besides plain attention.

Every argument is accounted for: it is a tensor or the scale, it has its neutral value, or it has no influence on the
result. One that does none of this declines the call. An argument that a future version adds is unknown here, so it
declines too unless it is None, False or 0.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from fpscompile.ir import Reason, Rejection
from fpscompile.passes.base import fake_value, pinned, words

QUERY, KEY, VALUE = ("q", "query"), ("k", "key"), ("v", "value")
SCALES = ("softmax_scale", "scale")
LENGTHS = ("cu_seqlens_q", "cu_seqlens_k", "cu_seq_lens_q", "cu_seq_lens_k", "cum_seq_q", "cum_seq_k")

WITHOUT_INFLUENCE = words(
    "max_seqlen_q max_seqlen_k max_seq_len_q max_seq_len_k max_q max_k return_softmax return_attn_probs return_lse "
    "return_softmax_lse return_debug_mask compute_log_sumexp compute_logsumexp deterministic zero_tensors num_splits "
    "pack_gqa sm_margin scheduler_metadata output_dtype op"
)
"""Outputs that they add are looked at where they are read."""

CAUSAL = (
    "causal attention is not full 3D attention, so it stays as it is; drop the argument if the model is meant to "
    "attend to the whole video"
)


def _zero(value: Any) -> bool:
    return isinstance(value, (int, float)) and value == 0


def _false(value: Any) -> bool:
    return value is False or value is None


def _open_side(value: Any) -> bool:
    return value is None or (isinstance(value, int) and value < 0)


def _open_window(value: Any) -> bool:
    return value is None or (isinstance(value, (tuple, list)) and all(_open_side(side) for side in value))


@dataclass(frozen=True)
class _Ask:
    """What an argument asks for when it is not neutral."""

    neutral: Callable[[Any], bool]
    code: Reason
    what: str


_DROPOUT = _Ask(_zero, Reason.DROPOUT, "attention dropout has no fused form; train with dropout 0 or call model.eval()")
_CAUSAL = _Ask(_false, Reason.CAUSAL, CAUSAL)
_SIDE = _Ask(_open_side, Reason.MASK, "it is windowed along the sequence already")
_WINDOW = _Ask(_open_window, Reason.MASK, "it is windowed along the sequence already")
_CAP = _Ask(_zero, Reason.SPELLING, "soft-capped scores are not plain attention")
_BIAS = _Ask(lambda value: value is None, Reason.MASK, "a bias on the scores is not a key mask")
_SINK = _Ask(lambda value: value is None, Reason.SPELLING, "sink logits change what the weights add up to")
_CACHE = _Ask(lambda value: value is None, Reason.SPELLING, "keys come from a cache")
_USED = _Ask(lambda value: value is None, Reason.MASK, "some tokens are unused")
_FP8 = _Ask(lambda value: value is None, Reason.DTYPE, "its inputs are quantized")
_UNKNOWN = _Ask(lambda v: v is None or _false(v) or _zero(v), Reason.SPELLING, "the argument is not understood")

ASKS: dict[str, _Ask] = {
    **dict.fromkeys(("dropout_p", "dropout", "p"), _DROPOUT),
    **dict.fromkeys(("causal", "is_causal"), _CAUSAL),
    "custom_mask_type": _Ask(_zero, Reason.CAUSAL, CAUSAL),
    **dict.fromkeys(("window_size_left", "window_size_right", "window_left", "window_right"), _SIDE),
    "window_size": _WINDOW,
    **dict.fromkeys(("softcap", "logits_soft_cap"), _CAP),
    **dict.fromkeys(("alibi_slopes", "attn_bias", "bias", "attn_mask", "attention_mask"), _BIAS),
    **dict.fromkeys(("s_aux", "sinks", "sink", "learnable_sink"), _SINK),
    **dict.fromkeys(("block_table", "block_tables", "page_table", "leftpad_k", "k_new", "v_new", "qv", "q_v"), _CACHE),
    **dict.fromkeys(("seqused_q", "seqused_k", "seqlen_k"), _USED),
    **dict.fromkeys(("q_descale", "k_descale", "v_descale"), _FP8),
}


def arguments_of(node: fx.Node) -> dict[str, Any] | None:
    """All arguments of a call by name, defaults included; None when its signature cannot be read."""
    target = node.target
    if isinstance(target, torch._ops.OpOverloadPacket):
        target = getattr(target, target.overloads()[0])
    if isinstance(target, torch._ops.OpOverload):
        given = dict(zip((argument.name for argument in target._schema.arguments), node.args, strict=False))
        defaults = {argument.name: argument.default_value for argument in target._schema.arguments}
        return {**defaults, **given, **node.kwargs}
    try:
        bound = inspect.signature(target).bind(*node.args, **node.kwargs)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return None
    bound.apply_defaults()
    return dict(bound.arguments)


def first(arguments: dict[str, Any], names: tuple[str, ...]) -> Any:
    """The value of the first of several names that a call has."""
    return next((arguments[name] for name in names if name in arguments), None)


def asks_for_more(node: fx.Node, arguments: dict[str, Any]) -> Rejection | None:
    """The first argument that makes a call more than softmax(scale * Q K^T) V of its tensors."""
    for name, value in arguments.items():
        if name in (*QUERY, *KEY, *VALUE, "qkv", *SCALES, *LENGTHS) or name in WITHOUT_INFLUENCE:
            continue
        ask = ASKS.get(name, _UNKNOWN)
        value = pinned(value)
        if not ask.neutral(value):
            shown = value.name if isinstance(value, fx.Node) else value
            return Rejection(ask.code, f"{name}={shown}: {ask.what}", fake_value(value), node)
    return None
