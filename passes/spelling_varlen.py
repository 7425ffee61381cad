"""Packed sequences: flash-attn with ``cu_seqlens``, on [tokens of all samples, heads, D].

Accepted when the boundaries, read off the graph, split the packed tokens

1. into equal samples: plain attention on [B, N]; or
2. each equal sample once more, after all of its video and as many text tokens as a mask counts: the kept tokens
   attend among themselves, the padding at the end among itself.

In case 2 the call becomes attention with a key mask, for all queries; the few queries in the padding, whose keys are
the padding, are computed apart and put back, so every token's result is what it was.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import fx

from fpscompile.ir import Reason, Rejection, Size
from fpscompile.passes.axes import same
from fpscompile.passes.base import GraphState, emit, fake_tensor, shape_of
from fpscompile.passes.canonical import attention, substitute
from fpscompile.passes.declared import KEY, QUERY, SCALES, VALUE, first
from fpscompile.passes.packed_lengths import Boundary, counted_mask, elements

LENGTHS_Q = ("cu_seqlens_q", "cu_seq_lens_q", "cum_seq_q")
LENGTHS_K = ("cu_seqlens_k", "cu_seq_lens_k", "cum_seq_k")


@dataclass(frozen=True)
class Packing:
    """Equal samples; with ``tail``, each has an own boundary somewhere in its last ``tail`` tokens."""

    samples: int
    tail: fx.Node | None = None
    """A [B, text] mask: its last dimension is the length of the tail."""


def unpack(
    state: GraphState,
    node: fx.Node,
    arguments: dict[str, Any],
    output: fx.Node,
    covered: tuple[fx.Node, ...],
    declined: Rejection | None,
) -> bool:
    """Replace a packed call, or record why its boundaries do not allow it."""
    tensors = [first(arguments, names) for names in (QUERY, KEY, VALUE)]
    if any(fake_tensor(tensor) is None or len(shape_of(tensor)) != 3 for tensor in tensors):
        return _miss(state, node, "its packed inputs are not [tokens, heads, features]")
    lengths, keys = first(arguments, LENGTHS_Q), first(arguments, LENGTHS_K)
    total = shape_of(tensors[0])[0]
    packing = read_packing(lengths, total, node)
    if keys is not lengths or not same(shape_of(tensors[1])[0], total):
        packing = None if read_packing(keys, shape_of(tensors[1])[0], node) != packing else packing
    if packing is None:
        return _miss(state, node, "the graph does not show that its cu_seqlens split equal samples of video and text")
    packed = packing

    def write() -> tuple[fx.Node, fx.Node]:
        return _write(state, packed, lengths, tensors, first(arguments, SCALES))

    return substitute(state, output, covered, write, declined, anchor=node) is not None


def read_packing(lengths: Any, total: Size, before: fx.Node) -> Packing | None:
    """How ``cu_seqlens`` splits ``total`` tokens; None when it is not one of the two accepted ways."""
    found = elements(lengths, before)
    if not found or len(found) < 2 or found[0] != Boundary(sympy.Integer(0)) or found[-1].counted:
        return None
    whole = [place for place, boundary in enumerate(found) if not boundary.counted]
    samples = len(whole) - 1
    if samples < 1 or not _equal(found[-1].known, total.expr):
        return None
    if any(not _equal(found[place].known * samples, total.expr * i) for i, place in enumerate(whole)):
        return None
    if len(found) == samples + 1:
        return Packing(samples)
    if whole != list(range(0, 2 * samples + 1, 2)):
        return None
    tails = {_tail(found[2 * i], found[2 * i + 1], total.expr / samples) for i in range(samples)}
    tail = tails.pop()
    return Packing(samples, tail) if tail is not None and not tails else None


def _tail(start: Boundary, middle: Boundary, length: sympy.Expr) -> fx.Node | None:
    """The mask that a sample's own boundary counts, if the rest of the sample is as long as the mask."""
    if len(middle.counted) != 1:
        return None
    mask = counted_mask(middle.counted[0])
    if mask is None:
        return None
    return mask if _equal(middle.known - start.known + shape_of(mask)[-1].expr, length) else None


def _equal(left: sympy.Expr, right: sympy.Expr) -> bool:
    return bool(sympy.expand(left - right) == 0)


def _write(
    state: GraphState, packing: Packing, lengths: fx.Node, tensors: list[Any], scale: Any
) -> tuple[fx.Node, fx.Node]:
    query, key, value = (
        emit(state, "transpose", (emit(state, "unflatten", (tensor, 0, (packing.samples, -1))), 1, 2))
        for tensor in tensors
    )
    if packing.tail is None:
        call = attention(state, query, key, value, None, scale)
        return call, emit(state, "flatten", (emit(state, "transpose", (call, 1, 2)), 0, 1))
    device = fake_tensor(query).device  # type: ignore[union-attr]
    ends = emit(state, operator.getitem, (lengths, slice(1, None, 2)))
    kept = emit(state, operator.sub, (ends, emit(state, operator.getitem, (lengths, slice(0, -1, 2)))))
    count = emit(state, "size", (query, 2))
    positions = emit(state, torch.arange, (count,), {"device": device})
    keep = emit(state, operator.lt, (positions, emit(state, "unsqueeze", (kept, 1))))
    mask = emit(state, operator.getitem, (keep, (slice(None), None, None)))
    call = attention(state, query, key, value, mask, scale)
    text = emit(state, "size", (packing.tail, -1))
    start = emit(state, operator.sub, (count, text))
    padding = emit(state, "logical_not", (emit(state, operator.getitem, (keep, (slice(None), slice(start, None)))),))
    apart = _padding_attention(state, [query, key, value], padding, start, scale)
    result = emit(state, "transpose", (call, 1, 2))
    head = emit(state, operator.getitem, (result, (slice(None), slice(None, start))))
    tail = emit(state, operator.getitem, (result, (slice(None), slice(start, None))))
    chosen = emit(state, operator.getitem, (padding, (slice(None), slice(None), None, None)))
    tail = emit(state, torch.where, (chosen, emit(state, "transpose", (apart, 1, 2)), tail))
    whole = emit(state, torch.cat, ([head, tail], 1))
    return call, emit(state, "flatten", (whole, 0, 1))


def _padding_attention(
    state: GraphState, tensors: list[fx.Node], padding: fx.Node, start: fx.Node, scale: Any
) -> fx.Node:
    """The tail's queries over the padding's keys; over the whole tail in a sample without padding, to stay finite."""
    cuts = [emit(state, operator.getitem, (x, (slice(None), slice(None), slice(start, None)))) for x in tensors]
    none = emit(state, "logical_not", (emit(state, "any", (padding,), {"dim": 1, "keepdim": True}),))
    seen = emit(state, operator.or_, (padding, none))
    mask = emit(state, operator.getitem, (seen, (slice(None), None, None)))
    heads = [shape_of(cut)[1] for cut in cuts[:2]]
    options = {"attn_mask": mask, "scale": scale, "enable_gqa": not same(*heads)}
    # The overload, not F's function: this one is no site.
    return emit(state, torch.ops.aten.scaled_dot_product_attention.default, tuple(cuts), options)


def _miss(state: GraphState, node: fx.Node, message: str) -> bool:
    state.near_misses.append(Rejection(Reason.MASK, f"looks like attention, but {message}", None, node))
    return False
