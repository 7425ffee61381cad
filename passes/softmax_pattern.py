"""Attention written out: ``softmax(q @ k^T * scale + mask) @ v``, matched whole or not at all.

Read backwards from the softmax to a product of two tensors, and forwards to a second product. Legality:

1. The softmax runs over the last dimension, the keys.
2. Between the first product and the softmax lie only casts between floating dtypes, scaling by numbers or by tensors
   that are one number per row or wider, subtraction of such numbers (a row's largest score, which softmax does not
   see), and at most one mask; none changes the shape. A scaling after the mask would scale the mask too: no match,
   unless the mask fills with -inf and the scale is a positive number.
3. Between the softmax and the second product lie only such casts and a dropout that does nothing.
4. Scores and weights have no other reader.
5. Both products contract exactly what attention contracts: features, then keys; batch dimensions agree.
6. Nothing writes into q, k or the mask between the two products, and neither autocast nor the grad mode changes: the
   one call reads and computes at the second.

Every violation is a :class:`~fpscompile.ir.Rejection` that names the node. Dropout alone is a site, declined.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from fpscompile.ir import Reason, Rejection
from fpscompile.passes.aliasing import mode_changes_between, mutates, written_between
from fpscompile.passes.axes import same
from fpscompile.passes.base import GraphState, argument, fake_tensor, fake_value, pinned, shape_of, target_name
from fpscompile.passes.contraction import PRODUCTS, Contraction, read_contraction
from fpscompile.passes.softmax_match import Match, Written

CASTS = frozenset(["to", "float", "double", "half", "bfloat16", "type", "type_as", "contiguous", "_to_copy", "clone"])

SHIFTS = frozenset(["sub", "isub", "sub_", "subtract"])

# A finite fill value drowns any score only if it swallows them when added: below this, float32 spacing exceeds 64.
DROWNING = -1e9


def normalize_softmax(state: GraphState, softmax: fx.Node) -> bool:
    """The attention around one softmax, if there is one. Returns whether the graph changed."""
    found = match_softmax(softmax)
    if isinstance(found, Match):
        return found.replace(state)
    if found is not None:
        state.near_misses.append(found)
    else:
        _note_unread(state, softmax)
    return False


def _note_unread(state: GraphState, softmax: fx.Node) -> None:
    """A softmax with several values on each of several rows, around which no product is known: nothing stays unsaid."""
    shape = shape_of(softmax)
    if len(shape) >= 2 and all(not isinstance(n, int) or n > 1 for n in shape[-2:]):
        sizes = ", ".join(map(str, shape))
        state.note(
            "info",
            "softmax",
            f"{softmax}: a softmax over [{sizes}] is not read as attention, since no two products that belong to "
            "it were found; if it is, write them with matmul, bmm, baddbmm or einsum, or call "
            "scaled_dot_product_attention",
        )


def match_softmax(softmax: fx.Node, written: Written | None = None) -> Match | Rejection | None:
    """The attention around a softmax; a Rejection for a near miss; None when nothing resembles attention.

    With ``written``, ``softmax`` is the last node of one that is written out.
    """
    backward = _read_back(softmax, written)
    if backward is None:
        return None
    forward = _read_forward(softmax)
    if forward is None:
        return None
    for found in (backward, forward):
        if isinstance(found, Rejection):
            return found
    assert isinstance(backward, _Scores)
    assert isinstance(forward, _Output)
    rank = len(shape_of(softmax))
    dim = argument(softmax, 1, "dim") if written is None else written.dim
    if dim not in (-1, rank - 1):
        return miss(f"softmax runs over dim {dim}, not over the keys (the last)", softmax, dim)
    scores, output = backward.contraction, forward.contraction
    if scores.out_dims[-1] == rank - 2:
        scores = scores.swap()
    if output.left is not forward.weights:
        output = output.swap()
    if output.left is not forward.weights or output.right is forward.weights:
        return miss("the softmax does not weigh a tensor of values", forward.node)
    if scores.out_dims != tuple(range(rank)) or len(scores.left_dims) not in (3, 4):
        return miss("the scores are not [batch, (heads,) queries, keys]", backward.node, scores.out_dims)
    if output.left_dims != tuple(range(rank)):
        return miss("the second product does not contract the keys", forward.node, output.left_dims)
    chain = (*forward.chain, *backward.chain)
    covered = tuple(sorted({*chain, *backward.aside}, reverse=True))
    reshaped = next((node for node in chain if not like(node, backward.node)), None)
    if reshaped is not None:
        return miss(f"{target_name(reshaped)} broadcasts or casts the scores to something else", reshaped)
    factors = [factor for factor, _ in backward.row_factors]
    tensors = (scores.left, scores.right, backward.mask, *factors)
    writer = written_between(backward.node, forward.node, tensors, covered)
    if writer is not None:
        return miss(f"{writer} may write into q, k or the mask before the values are weighed", writer)
    change = mode_changes_between(backward.node, forward.node)
    if change is not None:
        return miss(f"{change} lies between its two products: they run under different autocast or grad modes", change)
    return Match(
        query=scores.left,
        key=scores.right,
        value=output.right,
        scores=scores,
        output=output,
        output_node=forward.node,
        scale=backward.scale,
        factors=tuple(backward.factors),
        row_factors=tuple(backward.row_factors),
        mask=backward.mask,
        fill=backward.fill,
        shown=backward.shown,
        covered=covered,
        declined=forward.declined,
    )


def like(node: fx.Node, scores: fx.Node) -> bool:
    """Whether a node has the scores' shape, and a floating dtype."""
    left, right = shape_of(node), shape_of(scores)
    fits = len(left) == len(right) and all(same(a, b) for a, b in zip(left, right, strict=True))
    return fits and fake_tensor(node).dtype.is_floating_point  # type: ignore[union-attr]


@dataclass
class _Scores:
    """What leads to the softmax, collected from the softmax backwards."""

    node: fx.Node
    contraction: Contraction = field(init=False)
    scale: float = 1.0
    factors: list[tuple[fx.Node, bool]] = field(default_factory=list)
    """Scalars of the graph that scale the scores: (node, whether it divides)."""
    row_factors: list[tuple[fx.Node, bool]] = field(default_factory=list)
    """Tensors of one number per row, or wider, that scale the scores: (node, whether it divides)."""
    mask: fx.Node | None = None
    fill: float | None = None
    shown: bool = False
    chain: list[fx.Node] = field(default_factory=list)
    aside: list[fx.Node] = field(default_factory=list)
    """What computes, of the scores alone, a shift of their rows."""
    trouble: Rejection | None = None

    @property
    def scaled(self) -> bool:
        return self.scale != 1.0 or bool(self.factors) or bool(self.row_factors)


@dataclass
class _Output:
    node: fx.Node
    contraction: Contraction
    weights: fx.Node
    chain: list[fx.Node]
    declined: Rejection | None


def miss(message: str, node: fx.Node | None, value: Any = None, code: Reason = Reason.SPELLING) -> Rejection:
    return Rejection(code, f"looks like attention, but {message}", value, node)


def tensor_operand(node: fx.Node) -> fx.Node | None:
    first = argument(node, 0, "input")
    return first if isinstance(first, fx.Node) else None


def _read_back(softmax: fx.Node, written: Written | None) -> _Scores | Rejection | None:
    """From the softmax to the product of queries and keys."""
    found = _Scores(softmax)
    node = tensor_operand(softmax)
    if written is not None:
        node, found.scale, found.aside = written.exponent, written.scale, list(written.inner)
    while isinstance(node, fx.Node) and node.op in ("call_function", "call_method"):
        name = target_name(node)
        found.node = node
        if len(set(node.users) - {*found.aside}) > 1:
            found.trouble = found.trouble or miss("the scores are read elsewhere too", node)
        if name in PRODUCTS:
            return _finish_scores(found)
        found.chain.append(node)
        factor = _scaling(node, name)
        if factor is not None:
            node = _apply(found, *factor)
        elif name in SHIFTS and _per_row(argument(node, 1, "other"), node) and not node.kwargs:
            node, shift = node.args[:2]  # type: ignore[assignment]
            found.aside += _made_of(shift, node)
        elif name in CASTS:
            node = tensor_operand(node)
        elif name in ("add", "iadd", "add_", "masked_fill", "masked_fill_", "where"):
            if found.mask is not None:
                found.trouble = found.trouble or miss("it has two masks", node, code=Reason.MASK)
            scaled, unknown = node, bool(found.factors or found.row_factors)
            node = _masking(found, node, name)
            # A positive number leaves -inf what it is.
            if found.scaled and (unknown or found.scale <= 0 or found.fill != -math.inf):
                found.trouble = found.trouble or miss("the scale comes after the mask and scales it too", scaled)
        else:
            # Only arithmetic that ends in a product resembles attention; say so when it does.
            return miss(f"{name} stands between the scores and the softmax", node) if leads_to_product(node) else None
    return None


def _finish_scores(found: _Scores) -> _Scores | Rejection | None:
    node = found.node
    if found.trouble is not None:
        return found.trouble
    if target_name(node) == "baddbmm":
        beta, alpha = node.kwargs.get("beta", 1), node.kwargs.get("alpha", 1)
        if not isinstance(alpha, (int, float)) or not isinstance(beta, (int, float)):
            return miss("baddbmm's alpha or beta is not a number", node)
        if beta == 1 and found.mask is None and not found.scaled:
            found.mask = argument(node, 0, "input")
        elif beta != 0:
            return miss(f"baddbmm adds a tensor with beta={beta} besides the mask or under a scale", node, beta)
        found.scale *= float(alpha)
    contraction = read_contraction(node)
    if contraction is None or node.kwargs.get("out") is not None:
        return miss("the product of queries and keys is not a batched matrix product", node)
    found.contraction = contraction
    found.chain.append(node)
    return found


def _per_row(value: Any, scores: fx.Node) -> bool:
    """Whether a tensor has one number for a row of the scores, or for more than a row."""
    tensor = fake_tensor(value) if isinstance(value, fx.Node) else None
    if tensor is None or not tensor.dtype.is_floating_point or tensor.ndim > len(shape_of(scores)):
        return False
    return tensor.ndim == 0 or shape_of(value)[-1].expr == 1


def _made_of(shift: Any, scores: Any) -> list[fx.Node]:
    """The nodes that make a shift of nothing but the scores, each for the next one only; none if it is no such."""
    found: list[fx.Node] = []
    node = shift
    while isinstance(node, fx.Node) and node is not scores:
        if len(node.users) != 1 or len(found) > 4 or not node.all_input_nodes or mutates(node):
            return []
        found.append(node)
        node = node.all_input_nodes[0]
    return found


def _number(value: Any) -> bool:
    """A number, or a scalar of the graph that is one at run time."""
    return isinstance(fake_value(value), (int, float, torch.SymInt, torch.SymFloat)) and not isinstance(value, bool)


def _scaling(node: fx.Node, name: str) -> tuple[Any, Any, bool] | None:
    """(operand, factor, whether it divides) when a node scales a tensor by a number, or by one for a row or more."""
    left, right = node.args[:2] if len(node.args) >= 2 else (None, None)
    if node.kwargs:
        return None
    if name in ("mul", "imul", "mul_", "multiply"):
        if _number(right) or _per_row(right, node):
            return left, right, False
        if _number(left) or _per_row(left, node):
            return right, left, False
    divides = name in ("truediv", "div", "div_", "itruediv", "true_divide")
    if divides and (_per_row(right, node) or (_number(right) and (isinstance(right, fx.Node) or right != 0))):
        return left, right, True
    return None


def _apply(found: _Scores, operand: Any, factor: Any, divides: bool) -> fx.Node | None:
    if isinstance(factor, fx.Node) and fake_tensor(factor) is not None:
        found.row_factors.append((factor, divides))
    elif isinstance(factor, fx.Node):
        found.factors.append((factor, divides))
    else:
        found.scale *= 1.0 / float(factor) if divides else float(factor)
    return operand if isinstance(operand, fx.Node) else None


def _masking(found: _Scores, node: fx.Node, name: str) -> fx.Node | None:
    """The scores under a node that masks them. The mask, its fill value and what is wrong with them go to ``found``."""
    trouble = None
    if name == "where":
        scores, trouble = _where(found, node)
    elif "masked_fill" in name:
        scores, found.mask = argument(node, 0, "input"), argument(node, 1, "mask")
        trouble = _fill(found, node, argument(node, 2, "value"))
    else:
        scores, other = argument(node, 0, "input"), argument(node, 1, "other")
        if isinstance(other, fx.Node) and not leads_to_product(scores) and leads_to_product(other):
            scores, other = other, scores
        found.mask = other if fake_tensor(other) is not None else None
        if node.kwargs.get("alpha", 1) != 1:
            trouble = miss("the mask is added with a factor", node, code=Reason.MASK)
        elif found.mask is None:
            trouble = miss("a number is added to the scores", node)
    found.trouble = found.trouble or trouble
    return scores if isinstance(scores, fx.Node) else None


def _where(found: _Scores, node: fx.Node) -> tuple[Any, Rejection | None]:
    condition, chosen, other = (argument(node, i, name) for i, name in enumerate(("condition", "input", "other")))
    found.mask = condition
    found.shown = isinstance(chosen, fx.Node) and leads_to_product(chosen)
    scores, value = (chosen, other) if found.shown else (other, chosen)
    return scores, _fill(found, node, value)


def _fill(found: _Scores, node: fx.Node, value: Any) -> Rejection | None:
    if not isinstance(value, (int, float)) or value > DROWNING:
        message = f"{target_name(node)} writes {value}, which does not drown every score; fill with -inf"
        return miss(message, node, value, Reason.MASK)
    mask = fake_tensor(found.mask)
    if mask is None or mask.dtype != torch.bool:
        return miss("its mask is not a tensor of bools", node, code=Reason.MASK)
    found.fill = float(value)
    return None


def leads_to_product(node: Any, depth: int = 12) -> bool:
    """Whether the main operand of a few elementwise steps is a matrix product."""
    while isinstance(node, fx.Node) and depth and node.op in ("call_function", "call_method"):
        name = target_name(node)
        if name in PRODUCTS:
            return True
        if name in ("linear", "getitem"):
            return False
        operands = [arg for arg in node.all_input_nodes if fake_tensor(arg) is not None]
        if name in ("cat", "concat", "where", "add", "sub", "mul"):
            return any(leads_to_product(operand, depth - 1) for operand in operands)
        node = tensor_operand(node)
        depth -= 1
    return False


def _meets_product(node: fx.Node, depth: int = 4) -> bool:
    """Whether a product reads a node after a few steps with one reader each."""
    while depth and len(node.users) == 1:
        node = next(iter(node.users))
        if target_name(node) in PRODUCTS:
            return True
        depth -= 1
    return False


def weighs(node: fx.Node, depth: int = 4) -> bool:
    """Whether a product reads a node, or what a few elementwise steps make of it."""
    if depth == 0:
        return False
    if any(target_name(user) in PRODUCTS for user in node.users):
        return True
    return any(fake_tensor(user) is not None and like(user, node) and weighs(user, depth - 1) for user in node.users)


def _read_forward(softmax: fx.Node) -> _Output | Rejection | None:
    """From the softmax to the product with the values."""
    chain = [softmax]
    node = softmax
    declined: Rejection | None = None
    while True:
        readers = list(node.users)
        products = [user for user in readers if target_name(user) in PRODUCTS or _meets_product(user)]
        if len(readers) > 1 and products:
            return miss("the attention weights are read elsewhere too", node)
        if len(readers) != 1:
            return None
        user = readers[0]
        name = target_name(user)
        if name in PRODUCTS:
            contraction = read_contraction(user)
            if contraction is None or target_name(user) == "baddbmm" or user.kwargs.get("out") is not None:
                return miss("the product with the values is not a batched matrix product", user)
            return _Output(user, contraction, node, chain, declined)
        if name in ("dropout", "dropout_"):
            rate, training = pinned(argument(user, 1, "p", 0.5)), argument(user, 2, "training", True)
            if not (training is False or (isinstance(rate, (int, float)) and rate == 0)):
                message = f"dropout p={rate} acts on the weights; train with dropout 0 or call model.eval()"
                declined = Rejection(Reason.DROPOUT, message, rate, user)
        elif name not in CASTS or user.args[:1] != (node,):
            return miss(f"{name} stands between the softmax and the values", user) if _meets_product(user) else None
        chain.insert(0, user)
        node = user
