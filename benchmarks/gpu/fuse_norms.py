"""A pass for Inductor: the norm before FP8 linear layers, and the sum before the norm, go into their quantization.

:class:`fp8_linear.Fp8Linear` with a static scale quantizes x by plain operations, which any pass before this one can
follow. Here they become one kernel,

    to_e4m3             where x is anything
    norm_to_e4m3        where x is a LayerNorm in float32, its factor and shift those of its layer or of a modulation,
                        ``(norm(h.float()) * (1 + scale) + shift).type_as(h)``
    add_norm_to_e4m3    where h in turn is a sum that the norm alone does not use up, ``h = h0 + a`` or
                        ``h = (h0.float() + a * gate).type_as(h0)``

and layers that quantize the same x share the result. What is written in place anywhere in the graph is left alone. The
kernels have no gradients.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import norm_to_e4m3 as kernels
import torch
from quantize_rows import E4M3_MAX, MOST
from torch import fx
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files

from fpscompile.passes.aliasing import held_by, mutates

OPS = torch.ops.fps_bench
CASTS = ("to", "type_as", "float")
ADD = (operator.add, torch.add, "add")
MUL = (operator.mul, torch.mul, "mul")
Written = Callable[[fx.Node], bool]
"""Whether something in the graph writes into a node's memory."""


class FuseNorms(CustomGraphPass):
    """For ``pre_grad_custom_pass``: the graph is Dynamo's, in terms of ``torch`` functions and methods."""

    def __call__(self, graph: fx.Graph) -> None:
        known: dict[Any, fx.Node] = {}
        written = held_by(x for node in graph.nodes if mutates(node) for x in node.all_input_nodes)
        for node in list(graph.find_nodes(op="call_method", target="to")):
            quantized = _quantized(node)
            if quantized is None or written(quantized[0]):
                continue
            if quantized not in known:
                known[quantized] = _fused(graph, node, *quantized, written)
            known[quantized].meta.update(node.meta)
            node.replace_all_uses_with(known[quantized])
            graph.erase_node(node)

    def uuid(self) -> Any:
        return get_hash_for_files((__file__, kernels.__file__))


def _quantized(node: fx.Node) -> tuple[fx.Node, Any] | None:
    """(x, inverse) of a node that is x * inverse as E4M3, [rows, n], as a layer has it; None for anything else."""
    if node.args[1:] != (kernels.E4M3,) or not isinstance(node.args[0], fx.Node):
        return None
    clamp = node.args[0]
    if clamp.target != "clamp" or clamp.args[1:] != (-E4M3_MAX, E4M3_MAX) or not _calls(clamp.args[0], MUL):
        return None
    values, inverse = clamp.args[0].args
    rows = _widened(values)
    if _value(rows) is None or rows.target != "reshape" or rows.args[1:] != (-1, _value(rows).shape[-1]):
        return None
    return rows.args[0], inverse


def _fused(graph: fx.Graph, node: fx.Node, x: fx.Node, inverse: Any, written: Written) -> fx.Node:
    """What takes the place of ``node``, which quantizes x; of the sum that a norm is of too, if x is one."""
    found = _modulated_norm(x)
    if found is None or _meets(x, found[:3], written):
        with graph.inserting_before(node):
            return graph.call_function(OPS.to_e4m3.default, (x, inverse))
    h, factor, shift, eps = found
    parts = _sum(h)
    if parts is None or _meets(h, parts, written) or not all(_hoisted(each, h) for each in (factor, shift)):
        with graph.inserting_before(node):
            vectors = _scaled(graph, factor, shift, inverse)
            return graph.call_function(OPS.norm_to_e4m3.default, (h, *vectors, eps))
    with graph.inserting_before(h):
        first, added, gate = parts
        if gate is not None:
            gate = graph.call_method("reshape", (gate, (-1,)))
        vectors = _scaled(graph, factor, shift, inverse)
        both = graph.call_function(OPS.add_norm_to_e4m3.default, (first, added, gate, *vectors, eps))
        total, values = (graph.call_function(operator.getitem, (both, i)) for i in range(2))
    total.meta.update(h.meta)
    h.replace_all_uses_with(total)
    return values


def _meets(x: fx.Node, ends: tuple[Any, ...], written: Written) -> bool:
    """Whether something between ``ends`` and x, both among it, is written in place."""
    seen: set[fx.Node] = set()
    waiting = [x]
    while waiting:
        node = waiting.pop()
        if node not in seen:
            seen.add(node)
            waiting += () if node in ends else node.all_input_nodes
    return any(map(written, seen))


def _scaled(graph: fx.Graph, factor: fx.Node, shift: fx.Node, inverse: Any) -> list[fx.Node]:
    """Both over the scale of the result, as vectors."""
    vectors = (graph.call_method("reshape", (each, (-1,))) for each in (factor, shift))
    return [graph.call_function(torch.mul, (each, inverse)) for each in vectors]


def _modulated_norm(x: fx.Node) -> tuple[fx.Node, fx.Node, fx.Node, float] | None:
    """(h, factor, shift, eps) where x = (norm(h.float()) * factor + shift) in h's dtype; None for anything else."""
    if not _casts(x) or _dtype(x) == torch.float32:
        return None
    norm = _widened(x.args[0])
    factor = shift = None
    if _calls(norm, ADD):
        product, shift = norm.args
        if not _calls(product, MUL):
            return None
        norm, factor = product.args
        norm = _widened(norm)
    if not isinstance(norm, fx.Node) or norm.target is not torch.nn.functional.layer_norm:
        return None
    names = ("input", "normalized_shape", "weight", "bias", "eps")[len(norm.args) :]
    given, sizes, weight, bias, eps = (*norm.args, *(norm.kwargs.get(name) for name in names))
    h = _widened(given)
    if _value(h) is None or _dtype(h) != _dtype(x):
        return None
    n = _value(h).shape[-1]
    if factor is None:
        factor, shift, weight, bias = weight, bias, None, None
    if weight is not None or bias is not None or tuple(sizes) != (n,) or n > MOST:
        return None
    if not _vector(factor, n) or not _vector(shift, n):
        return None
    return h, factor, shift, 1e-5 if eps is None else eps


def _sum(h: fx.Node) -> tuple[fx.Node, fx.Node, fx.Node | None] | None:
    """(h0, a, gate) where h = h0 + a * gate, all but the gate of one shape and dtype; None for anything else."""
    total = h.args[0] if _casts(h) else h
    if not _calls(total, ADD):
        return None
    first, added = (_widened(each) for each in total.args)
    gate = None
    if _calls(added, MUL):
        added, gate = added.args
        added = _widened(added)
        if not _vector(gate, _value(h).shape[-1]):
            return None
    if any(_value(x) is None or _dtype(x) != _dtype(h) or _value(x).shape != _value(h).shape for x in (first, added)):
        return None
    return first, added, gate


def _hoisted(x: fx.Node, place: fx.Node) -> bool:
    """Moves x, a cast or a sum of what exists at ``place``, to before it; whether it could."""
    if x < place:
        return True
    if not (_casts(x) or _calls(x, ADD)) or not all(_hoisted(each, place) for each in x.all_input_nodes):
        return False
    place.prepend(x)
    return True


def _casts(x: Any) -> bool:
    return isinstance(x, fx.Node) and x.op == "call_method" and x.target in CASTS


def _calls(x: Any, targets: tuple[Any, ...]) -> bool:
    return isinstance(x, fx.Node) and x.target in targets and len(x.args) == 2 and not x.kwargs


def _widened(x: Any) -> Any:
    """What x was before it was cast to float32."""
    while _casts(x) and _dtype(x) == torch.float32:
        x = x.args[0]
    return x


def _value(x: Any) -> Any:
    return x.meta.get("example_value") if isinstance(x, fx.Node) else None


def _dtype(x: Any) -> torch.dtype | None:
    return getattr(_value(x), "dtype", None)


def _vector(x: Any, n: int) -> bool:
    """Whether x is n float32 values, each for a feature."""
    value = _value(x)
    return value is not None and value.dtype == torch.float32 and value.numel() == n == value.shape[-1]
