"""flash-attn and xformers: ops and functions on [batch, L, heads, D], and packed [batch, L, 3, heads, D].

PyTorch's own kernels, called by name, have [batch, heads, L, D].

Matched by registered name, so neither package is needed here. Arguments are accounted for one by one
(:mod:`fpscompile.passes.declared`); with cumulative lengths the call is packed: :mod:`spelling_varlen`.
"""

from __future__ import annotations

import operator
from typing import Any

from torch import fx

from fpscompile.ir import Reason, Rejection
from fpscompile.passes.base import GraphState, emit, fake_tensor, shape_of, target_name
from fpscompile.passes.canonical import attention, idle_readers, substitute
from fpscompile.passes.declared import KEY, LENGTHS, QUERY, SCALES, VALUE, arguments_of, asks_for_more, first
from fpscompile.passes.spelling_varlen import unpack

OPS = frozenset(
    [
        "flash_attn::_flash_attn_forward",
        "flash_attn::_flash_attn_varlen_forward",
        "flash_attn_3::fwd",
        "flash_attn_3::_flash_attn_forward",
        "_diffusers_flash_attn_3::_flash_attn_forward",
        "xformers_flash::flash_fwd",
        "xformers_flash3::flash_fwd",
        "xformers::efficient_attention_forward_cutlass",
        "_flash_attention_forward",  # aten's
        "_efficient_attention_forward",
    ]
)
HEADS_FIRST = frozenset(
    f"_scaled_dot_product_{kernel}"
    for kernel in (
        "flash_attention",
        "flash_attention_for_cpu",
        "efficient_attention",
        "cudnn_attention",
        "fused_attention_overrideable",
    )
)
FUNCTIONS = frozenset(
    ["flash_attn_func", "flash_attn_qkvpacked_func", "flash_attn_varlen_func", "memory_efficient_attention"]
)
PACKAGES = frozenset(["flash_attn", "flash_attn_interface", "flash_attn_3", "xformers"])
"""Packages whose functions count, where they reach the graph as calls of their own."""


def is_declared(name: str) -> bool:
    """Whether a target's name is one of the attention ops known here."""
    if name in OPS or name in HEADS_FIRST:
        return True
    module, _, function = name.partition("::")
    return function in FUNCTIONS and module.split(".")[0] in PACKAGES


def normalize_flash(state: GraphState, node: fx.Node) -> bool:
    """One call of a declared op. Returns whether the graph changed."""
    arguments = arguments_of(node)
    if arguments is None:
        return _miss(state, node, "its signature cannot be read")
    output = output_of(node)
    if output is None:
        return False
    declined = asks_for_more(node, arguments) or reads_more(node)
    return spell(state, node, arguments, output, covered_by(node, output), declined)


def spell(
    state: GraphState,
    node: fx.Node,
    arguments: dict[str, Any],
    output: fx.Node,
    covered: tuple[fx.Node, ...],
    declined: Rejection | None,
) -> bool:
    """Put the canonical call in the place of ``output``, the attention that ``arguments`` describe."""
    if any(first(arguments, (name,)) is not None for name in LENGTHS):
        return unpack(state, node, arguments, output, covered, declined)
    packed = arguments.get("qkv")
    tensors = [packed] if packed is not None else [first(arguments, names) for names in (QUERY, KEY, VALUE)]
    rank = 5 if packed is not None else 4
    if any(fake_tensor(tensor) is None or len(shape_of(tensor)) != rank for tensor in tensors):
        return _miss(state, node, f"its inputs are not [batch, tokens, {'3, ' if packed else ''}heads, features]")

    if target_name(node) in HEADS_FIRST:

        def write_plain() -> tuple[fx.Node, fx.Node]:
            query, key, value = tensors
            call = attention(state, query, key, value, None, first(arguments, SCALES))
            return call, call

        return substitute(state, output, covered, write_plain, declined, anchor=node) is not None

    def write() -> tuple[fx.Node, fx.Node]:
        query, key, value = (emit(state, "select", (packed, 2, i)) for i in range(3)) if packed is not None else tensors
        query, key, value = (emit(state, "transpose", (tensor, 1, 2)) for tensor in (query, key, value))
        call = attention(state, query, key, value, None, first(arguments, SCALES))
        return call, emit(state, "transpose", (call, 1, 2))

    return substitute(state, output, covered, write, declined, anchor=node) is not None


def output_of(node: fx.Node) -> fx.Node | None:
    """The attention's result: the call itself, or its first output; None when nobody reads it."""
    if fake_tensor(node) is not None:
        return node
    results = [user for user in node.users if user.target is operator.getitem and user.args[1] == 0]
    return results[0] if len(results) == 1 else None


def reads_more(node: fx.Node) -> Rejection | None:
    """Why a call with several outputs cannot be replaced: someone reads the weights or the log-sum-exp."""
    if fake_tensor(node) is not None:
        return None
    for user in node.users:
        if user.target is operator.getitem and (user.args[1] == 0 or idle_readers(user) is not None):
            continue
        message = f"{user.name} reads more of {node.name} than the attention's output"
        return Rejection(Reason.SPELLING, message, None, node)
    return None


def covered_by(node: fx.Node, output: fx.Node) -> tuple[fx.Node, ...]:
    """A call and its outputs besides ``output`` that nobody uses, last first."""
    if output is node:
        return ()
    idle: set[fx.Node] = set()
    for user in node.users:
        readers = idle_readers(user) if user is not output else None
        idle |= {user, *readers} if readers is not None else set()
    return (*sorted(idle, reverse=True), node)


def _miss(state: GraphState, node: fx.Node, message: str) -> bool:
    state.near_misses.append(Rejection(Reason.SPELLING, f"looks like attention, but {message}", None, node))
    return False
