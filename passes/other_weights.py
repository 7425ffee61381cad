"""Attention whose weights no softmax made: ``sigmoid(q @ k^T) @ v``, squared ReLUs, a Gumbel softmax.

Nothing is rewritten here, since no kernel computes it; but attention is not passed over without a word. A product of
two tensors, neither of them a weight of the model, whose entries weigh the rows of a third tensor once a function of
:data:`WEIGHINGS` has gone over them is a near miss, by the name of that function.
"""

from __future__ import annotations

from torch import fx

from fpscompile.ir import Reason
from fpscompile.passes.aliasing import base_of
from fpscompile.passes.base import GraphState, fake_tensor, target_name
from fpscompile.passes.contraction import PRODUCTS, read_contraction
from fpscompile.passes.softmax_pattern import like, miss, tensor_operand, weighs
from fpscompile.passes.trace_axes import is_parameter

_PLAIN = (
    "sigmoid", "tanh", "relu", "relu6", "leaky_relu", "elu", "selu", "celu", "gelu", "silu", "mish", "softplus",
    "softsign", "hardsigmoid", "hardswish", "hardtanh", "clamp", "clamp_min", "square", "abs", "normalize",
    "gumbel_softmax", "special_expit",
)  # fmt: skip
WEIGHINGS = (*_PLAIN, *(f"{name}_" for name in _PLAIN))
"""Functions that make weights of scores, by name; powers are those of :mod:`fpscompile.passes.written_softmax`."""

STEPS = 8
"""Elementwise steps between a product and what is made of it."""


def note_other_weights(state: GraphState, node: fx.Node) -> bool:
    """A near miss where ``node`` makes the weights of something like attention. Never changes the graph."""
    if _first_after_scores(node) and weighs(node):
        name = target_name(node).strip("_")
        message = f"{name} makes its weights, and only a softmax over the keys is rewritten"
        state.near_misses.append(miss(message, node, code=Reason.KIND))
    return False


def _first_after_scores(node: fx.Node) -> bool:
    """Whether ``node`` is the first such function of a product of two tensors of data."""
    before = tensor_operand(node)
    for _ in range(STEPS):
        if before is None or before.op not in ("call_function", "call_method"):
            return False
        name = target_name(before)
        if name in PRODUCTS:
            found = read_contraction(before)
            return found is not None and not any(is_parameter(base_of(x)) for x in (found.left, found.right))
        if name in WEIGHINGS or "softmax" in name:
            return False  # which has spoken for them
        before = next((x for x in before.all_input_nodes if fake_tensor(x) is not None and like(x, node)), None)
    return False
