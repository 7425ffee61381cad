"""Attention whose weights no softmax made: ``sigmoid(q @ k^T) @ v``, squared ReLUs, a Gumbel softmax.

Nothing is rewritten here, since no kernel computes it; but attention is not passed over without a word. A product of
two tensors, neither of them a weight of the model, whose entries weigh the rows of a third tensor once a function of
:data:`WEIGHINGS` has gone over them is a near miss, by the name of that function.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from fpscompile.ir import Reason
from fpscompile.passes.base import GraphState, fake_tensor, target_name
from fpscompile.passes.contraction import PRODUCTS, read_contraction
from fpscompile.passes.softmax_pattern import like, miss, tensor_operand, weighs

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
    scores = _scores(node)
    if scores is not None and weighs(node):
        name = target_name(node).strip("_")
        message = f"{name} makes its weights, and only a softmax over the keys is rewritten"
        state.near_misses.append(miss(message, node, code=Reason.KIND))
    return False


def _scores(node: fx.Node) -> fx.Node | None:
    """The product of two tensors of data that ``node`` is the first function of; None if there is none."""
    before = tensor_operand(node)
    for _ in range(STEPS):
        if before is None or before.op not in ("call_function", "call_method"):
            return None
        name = target_name(before)
        if name in PRODUCTS:
            found = read_contraction(before)
            data = found is not None and not _is_weight(found.left) and not _is_weight(found.right)
            return before if data else None
        if name in WEIGHINGS or "softmax" in name:
            return None  # which has spoken for them
        before = next((x for x in before.all_input_nodes if fake_tensor(x) is not None and like(x, node)), None)
    return None


def _is_weight(node: Any) -> bool:
    """Whether a tensor is a parameter or a constant of the model, or a view of one."""
    for _ in range(STEPS):
        if node.op == "get_attr" or isinstance(fake_tensor(node), torch.nn.Parameter):
            return True
        if len(node.all_input_nodes) != 1:
            return False
        node = node.all_input_nodes[0]
    return False
