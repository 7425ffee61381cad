"""Attention written out: ``softmax(q @ k^T * scale + mask) @ v``, matched whole or not at all.

Read backwards from the softmax to a product of two tensors, and forwards to a second product. Legality:

1. The softmax runs over the last dimension, the keys.
2. Between the first product and the softmax lie only dtype casts, scaling by numbers, and at most one mask. A
   scaling after the mask would scale the mask too: no match.
3. Between the softmax and the second product lie only casts and a dropout that does nothing.
4. Scores and weights have no other reader.
5. Both products contract exactly what attention contracts: features, then keys; batch dimensions agree.

Every violation is a :class:`~fpscompile.ir.Rejection` that names the node.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from torch import fx
from torch.nn import functional as F

from fpscompile.ir import Reason, Rejection
from fpscompile.passes.axes import same
from fpscompile.passes.base import GraphState, argument, copy_origin, emit, fake_tensor, shape_of, target_name

CASTS = frozenset(["to", "float", "double", "half", "bfloat16", "type", "type_as", "contiguous", "_to_copy", "clone"])
PRODUCTS = frozenset(["matmul", "bmm", "baddbmm", "einsum", "__matmul__"])

# A finite fill value drowns any score only if it swallows them when added: below this, float32 spacing exceeds 64.
DROWNING = -1e9


@dataclass(frozen=True)
class Contraction:
    """A product of two tensors as batched matrices: dims of each operand in (batch..., row, column) order."""

    left: fx.Node
    right: fx.Node
    left_dims: tuple[int, ...]
    """Dims of ``left`` as (batch..., free, contracted)."""
    right_dims: tuple[int, ...]
    """Dims of ``right`` as (batch..., contracted, free)."""
    out_dims: tuple[int, ...]
    """For each dim of the output, its place in (batch..., left free, right free)."""

    def swap(self) -> Contraction:
        """The same product with its operands exchanged."""
        rows, columns = len(self.out_dims) - 2, len(self.out_dims) - 1
        exchanged = {rows: columns, columns: rows}
        return Contraction(
            left=self.right,
            right=self.left,
            left_dims=(*self.right_dims[:-2], *self.right_dims[:-3:-1]),
            right_dims=(*self.left_dims[:-2], *self.left_dims[:-3:-1]),
            out_dims=tuple(exchanged.get(place, place) for place in self.out_dims),
        )


@dataclass
class Match:
    """One written-out attention, ready to be replaced."""

    query: fx.Node
    key: fx.Node
    value: fx.Node
    scores: Contraction
    output: Contraction
    output_node: fx.Node
    scale: float = 1.0
    mask: fx.Node | None = None
    fill: float | None = None
    """With masked_fill: the value; ``mask`` is then True where a key is hidden."""
    inner: list[fx.Node] = field(default_factory=list)
    """Nodes that the replacement makes dead, last first."""

    def replace(self, state: GraphState) -> fx.Node:
        """Put the canonical call where the second product is, and erase what it covers."""
        batch = len(self.scores.left_dims) - 2
        with state.graph.inserting_before(self.output_node):
            query = _arrange(state, self.query, self.scores.left_dims, batch)
            key = _arrange(state, self.key, (*self.scores.right_dims[:-2], *self.scores.right_dims[:-3:-1]), batch)
            value = _arrange(state, self.value, self.output.right_dims, batch)
            mask = self._mask(state, batch)
            node = emit(
                state,
                F.scaled_dot_product_attention,
                (query, key, value),
                {"attn_mask": mask, "dropout_p": 0.0, "is_causal": False, "scale": self.scale, "enable_gqa": False},
            )
            copy_origin(node, self.output_node)
            result = node
            if batch == 1:
                result = emit(state, "squeeze", (result, 1))
            if self.output.out_dims != tuple(range(batch + 2)):
                result = emit(state, "permute", (result, self.output.out_dims))
            dtype = fake_tensor(self.output_node).dtype  # type: ignore[union-attr]
            if fake_tensor(result).dtype != dtype:  # type: ignore[union-attr]
                result = emit(state, "to", (result, dtype))
        self.output_node.replace_all_uses_with(result)
        for dead in (self.output_node, *self.inner):
            if not dead.users:
                state.graph.erase_node(dead)
        return node

    def _mask(self, state: GraphState, batch: int) -> fx.Node | None:
        if self.mask is None:
            return None
        mask = self.mask
        if batch == 1 and len(shape_of(mask)) == 3:
            mask = emit(state, "unsqueeze", (mask, 1))
        elif len(shape_of(mask)) == 1:
            mask = emit(state, "unsqueeze", (mask, 0))
        dtype = fake_tensor(self.query).dtype  # type: ignore[union-attr]
        if self.fill == -math.inf:
            return emit(state, "logical_not", (mask,))
        if self.fill is not None:  # as a bias: a row that is masked in full stays uniform, as it was
            return emit(state, "mul", (emit(state, "to", (mask, dtype)), self.fill))
        return mask if fake_tensor(mask).dtype == dtype else emit(state, "to", (mask, dtype))  # type: ignore[union-attr]


def _arrange(state: GraphState, node: fx.Node, dims: tuple[int, ...], batch: int) -> fx.Node:
    """``node`` as [B, heads, tokens, features]."""
    if dims != tuple(range(len(dims))):
        node = emit(state, "permute", (node, dims))
    return emit(state, "unsqueeze", (node, 1)) if batch == 1 else node


def match_softmax(softmax: fx.Node) -> Match | Rejection | None:
    """The attention around a softmax; a Rejection for a near miss; None when nothing resembles attention."""
    backward = _read_back(softmax)
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
    dim = argument(softmax, 1, "dim")
    if dim not in (-1, rank - 1):
        return _miss(f"softmax runs over dim {dim}, not over the keys (the last)", softmax, dim)
    scores, output = backward.contraction, forward.contraction
    if scores.out_dims[-1] == rank - 2:
        scores = scores.swap()
    if output.left is not forward.weights:
        output = output.swap()
    if output.left is not forward.weights or output.right is forward.weights:
        return _miss("the softmax does not weigh a tensor of values", forward.node)
    if scores.out_dims != tuple(range(rank)) or len(scores.left_dims) not in (3, 4):
        return _miss("the scores are not [batch, (heads,) queries, keys]", backward.node, scores.out_dims)
    if output.left_dims != tuple(range(rank)):
        return _miss("the second product does not contract the keys", forward.node, output.left_dims)
    return Match(
        query=scores.left,
        key=scores.right,
        value=output.right,
        scores=scores,
        output=output,
        output_node=forward.node,
        scale=backward.scale,
        mask=backward.mask,
        fill=backward.fill,
        inner=[*forward.chain, *backward.chain],
    )


@dataclass
class _Scores:
    node: fx.Node
    contraction: Contraction
    scale: float
    mask: fx.Node | None
    fill: float | None
    chain: list[fx.Node]


@dataclass
class _Output:
    node: fx.Node
    contraction: Contraction
    weights: fx.Node
    chain: list[fx.Node]


def _miss(message: str, node: fx.Node | None, value: Any = None, code: Reason = Reason.SPELLING) -> Rejection:
    return Rejection(code, f"looks like attention, but {message}", value, node)


def _tensor_operand(node: fx.Node) -> fx.Node | None:
    first = argument(node, 0, "input")
    return first if isinstance(first, fx.Node) else None


def _read_back(softmax: fx.Node) -> _Scores | Rejection | None:
    """From the softmax to the product of queries and keys."""
    scale, mask, fill = 1.0, None, None
    chain: list[fx.Node] = []
    trouble: Rejection | None = None
    node = _tensor_operand(softmax)
    while isinstance(node, fx.Node) and node.op in ("call_function", "call_method"):
        name = target_name(node)
        if len(node.users) > 1:
            trouble = trouble or _miss("the scores are read elsewhere too", node)
        if name in PRODUCTS:
            return _finish_scores(node, scale, mask, fill, chain, trouble)
        step = _scaling(node, name)
        if step is not None:
            node_next, factor = step
            scale *= factor
        elif name in CASTS:
            node_next = _tensor_operand(node)
        elif name in ("add", "iadd", "add_", "masked_fill", "masked_fill_"):
            if mask is not None:
                trouble = trouble or _miss("it has two masks", node, code=Reason.MASK)
            if scale != 1.0:
                trouble = trouble or _miss("the scale comes after the mask and scales it too", node, scale)
            node_next, mask, fill, problem = _masking(node, name)
            trouble = trouble or problem
        else:
            # Only arithmetic that ends in a product resembles attention; say so when it does.
            return _miss(f"{name} stands between the scores and the softmax", node) if _leads_to_product(node) else None
        chain.append(node)
        node = node_next
    return None


def _finish_scores(
    node: fx.Node,
    scale: float,
    mask: fx.Node | None,
    fill: float | None,
    chain: list[fx.Node],
    trouble: Rejection | None,
) -> _Scores | Rejection | None:
    if trouble is not None:
        return trouble
    if target_name(node) == "baddbmm":
        beta, alpha = node.kwargs.get("beta", 1), node.kwargs.get("alpha", 1)
        if not isinstance(alpha, (int, float)) or not isinstance(beta, (int, float)):
            return _miss("baddbmm's alpha or beta is not a number", node)
        if beta == 1 and mask is None and scale == 1.0:
            mask = argument(node, 0, "input")
        elif beta != 0:
            return _miss(f"baddbmm adds a tensor with beta={beta} besides the mask or under a scale", node, beta)
        scale *= float(alpha)
    contraction = read_contraction(node)
    if contraction is None:
        return _miss("the product of queries and keys is not a batched matrix product", node)
    return _Scores(node, contraction, scale, mask, fill, [*chain, node])


def _scaling(node: fx.Node, name: str) -> tuple[Any, float] | None:
    """(operand, factor) when a node multiplies or divides a tensor by a number."""
    if name in ("mul", "imul", "mul_", "multiply"):
        left, right = node.args[:2] if len(node.args) >= 2 else (None, None)
        if isinstance(right, (int, float)):
            return left, float(right)
        if isinstance(left, (int, float)):
            return right, float(left)
    if name in ("truediv", "div", "div_", "itruediv", "true_divide") and len(node.args) >= 2:
        left, right = node.args[:2]
        if isinstance(right, (int, float)) and right != 0 and not node.kwargs.get("rounding_mode"):
            return left, 1.0 / float(right)
    return None


def _masking(node: fx.Node, name: str) -> tuple[Any, fx.Node | None, float | None, Rejection | None]:
    """(scores, mask, fill, problem) of a node that masks scores."""
    left, right = argument(node, 0, "input"), argument(node, 1, "other" if "add" in name else "mask")
    if "masked_fill" in name:
        value = argument(node, 2, "value")
        if not isinstance(value, (int, float)) or value > DROWNING:
            problem = _miss(
                f"masked_fill writes {value}, which does not drown every score; fill with -inf",
                node,
                value,
                Reason.MASK,
            )
            return left, right, None, problem
        return left, right, float(value), None
    if node.kwargs.get("alpha", 1) != 1:
        return left, right, None, _miss("the mask is added with a factor", node, code=Reason.MASK)
    if not isinstance(left, fx.Node) or not isinstance(right, fx.Node):
        return left, None, None, _miss("a number is added to the scores", node)
    if not _leads_to_product(left) and _leads_to_product(right):
        left, right = right, left
    if fake_tensor(right) is None:
        return left, None, None, _miss("a number is added to the scores", node)
    return left, right, None, None


def _leads_to_product(node: Any, depth: int = 12) -> bool:
    """Whether the main operand of a few elementwise steps is a matrix product."""
    while isinstance(node, fx.Node) and depth and node.op in ("call_function", "call_method"):
        name = target_name(node)
        if name in PRODUCTS:
            return True
        if name in ("linear", "getitem"):
            return False
        node = _tensor_operand(node)
        depth -= 1
    return False


def _read_forward(softmax: fx.Node) -> _Output | Rejection | None:
    """From the softmax to the product with the values."""
    chain = [softmax]
    node = softmax
    trouble: Rejection | None = None
    while True:
        readers = list(node.users)
        products = [user for user in readers if target_name(user) in PRODUCTS]
        if len(readers) > 1 and products:
            return _miss("the attention weights are read elsewhere too", node)
        if len(readers) != 1:
            return None
        user = readers[0]
        name = target_name(user)
        if name in PRODUCTS:
            if trouble is not None:
                return trouble
            contraction = read_contraction(user)
            if contraction is None or target_name(user) == "baddbmm":
                return _miss("the product with the values is not a batched matrix product", user)
            return _Output(user, contraction, node, chain)
        if name in ("dropout", "dropout_", "feature_dropout"):
            rate, training = argument(user, 1, "p", 0.5), argument(user, 2, "training", True)
            if rate and training:
                trouble = _miss(f"dropout p={rate} acts on the weights", user, rate, Reason.DROPOUT)
        elif name not in CASTS or user.args[:1] != (node,):
            return None
        chain.insert(0, user)
        node = user


def read_contraction(node: fx.Node) -> Contraction | None:
    """A product node as a batched matrix product with equal batch sizes, or None."""
    name = target_name(node)
    if name == "einsum":
        return _read_einsum(node)
    left, right = node.args[-2:] if len(node.args) >= 2 else (None, None)
    if not isinstance(left, fx.Node) or not isinstance(right, fx.Node):
        return None
    if fake_tensor(left) is None or fake_tensor(right) is None:
        return None
    rank = len(shape_of(left))
    if rank < 3 or rank != len(shape_of(right)) or not _batch_agrees(left, right, range(rank - 2), range(rank - 2)):
        return None
    dims = tuple(range(rank))
    return Contraction(left, right, dims, dims, dims)


def _read_einsum(node: fx.Node) -> Contraction | None:
    equation, *operands = node.args
    if len(operands) == 1 and isinstance(operands[0], (tuple, list)):
        operands = list(operands[0])
    if not isinstance(equation, str) or "." in equation or "->" not in equation or len(operands) != 2:
        return None
    terms, out = equation.replace(" ", "").split("->")
    left_term, right_term = terms.split(",")
    left, right = operands
    if not isinstance(left, fx.Node) or not isinstance(right, fx.Node):
        return None
    if any(len(set(term)) != len(term) for term in (left_term, right_term, out)):
        return None
    batch = [c for c in out if c in left_term and c in right_term]
    contracted = [c for c in left_term if c in right_term and c not in out]
    free_left = [c for c in left_term if c not in right_term]
    free_right = [c for c in right_term if c not in left_term]
    if not (len(contracted) == len(free_left) == len(free_right) == 1) or set(out) != {*batch, *free_left, *free_right}:
        return None
    left_dims = tuple(left_term.index(c) for c in (*batch, *free_left, *contracted))
    right_dims = tuple(right_term.index(c) for c in (*batch, *contracted, *free_right))
    if not _batch_agrees(left, right, left_dims[:-2], right_dims[:-2]):
        return None
    order = [*batch, *free_left, *free_right]
    return Contraction(left, right, left_dims, right_dims, tuple(order.index(c) for c in out))


def _batch_agrees(left: fx.Node, right: fx.Node, left_dims: Any, right_dims: Any) -> bool:
    left_shape, right_shape = shape_of(left), shape_of(right)
    return all(same(left_shape[a], right_shape[b]) for a, b in zip(left_dims, right_dims, strict=True))
