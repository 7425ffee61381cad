"""Products of two tensors as batched matrix products: matmul, bmm, baddbmm and einsum alike.

The right operand may have one head where the left has several (keys that all of them share): it is broadcast.
"""

from __future__ import annotations

import string
from dataclasses import dataclass
from typing import Any

from torch import fx

from fpscompile.passes.axes import same
from fpscompile.passes.base import fake_tensor, shape_of, target_name

PRODUCTS = frozenset(["matmul", "bmm", "baddbmm", "einsum", "__matmul__"])


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


def read_contraction(node: fx.Node) -> Contraction | None:
    """A product node as a batched matrix product, or None."""
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
    if not isinstance(equation, str) or "->" not in equation or len(operands) != 2:
        return None
    left, right = operands
    if not isinstance(left, fx.Node) or not isinstance(right, fx.Node):
        return None
    terms, out = equation.replace(" ", "").split("->")
    if terms.count(",") != 1:
        return None
    left_term, right_term = terms.split(",")
    written = _spell_out(left_term, right_term, out, len(shape_of(left)), len(shape_of(right)))
    if written is None:
        return None
    left_term, right_term, out = written
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


def _spell_out(left: str, right: str, out: str, left_rank: int, right_rank: int) -> tuple[str, str, str] | None:
    """Terms with ``...`` as letters; None unless it stands for equally many dimensions in all three."""
    if "." not in left + right + out:
        return left, right, out
    if not all("..." in term for term in (left, right, out)):
        return None
    count = left_rank - len(left) + 3
    if count < 0 or count != right_rank - len(right) + 3:
        return None
    free = [c for c in string.ascii_letters if c not in left + right + out][:count]
    return left.replace("...", "".join(free)), right.replace("...", "".join(free)), out.replace("...", "".join(free))


def _batch_agrees(left: fx.Node, right: fx.Node, left_dims: Any, right_dims: Any) -> bool:
    pairs = [(shape_of(left)[a], shape_of(right)[b]) for a, b in zip(left_dims, right_dims, strict=True)]
    return all(same(many, one) or (place > 0 and one.expr == 1) for place, (many, one) in enumerate(pairs))
