"""A written-out attention that was matched, and how it is spelled as one call."""

from __future__ import annotations

import functools
import math
import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from fpscompile.ir import Rejection
from fpscompile.passes.base import GraphState, emit, fake_tensor, shape_of
from fpscompile.passes.canonical import attention, substitute
from fpscompile.passes.contraction import Contraction

LOWEST = -1e38
"""The least bias that a masked score gets: times the softmax's log2(e), float32 still has it."""


@dataclass(frozen=True)
class Written:
    """A softmax written out: powers of one base over their sum."""

    exponent: fx.Node
    """What the powers have as exponents: the scores."""
    scale: float
    """Logarithm of the base."""
    dim: Any
    """The dimension of the sum."""
    inner: tuple[fx.Node, ...]
    """Powers and sum, which nothing else reads, last first."""


@dataclass(frozen=True)
class Match:
    """One written-out attention, ready to be replaced."""

    query: fx.Node
    key: fx.Node
    value: fx.Node
    scores: Contraction
    output: Contraction
    output_node: fx.Node
    scale: float = 1.0
    factors: tuple[tuple[fx.Node, bool], ...] = ()
    """Scalars of the graph that scale the scores too: (node, whether it divides)."""
    row_factors: tuple[tuple[fx.Node, bool], ...] = ()
    """Tensors that broadcast against the scores along the keys and scale them: (node, whether it divides)."""
    mask: fx.Node | None = None
    fill: float | None = None
    """With a filled mask: the value that hidden keys get."""
    shown: bool = False
    """With a filled mask: whether it is True where a key is seen, not where it is hidden."""
    covered: tuple[fx.Node, ...] = ()
    """Nodes that the replacement makes dead, last first."""
    declined: Rejection | None = None

    def replace(self, state: GraphState) -> bool:
        """Put the canonical call where the second product is. Returns whether it could be written."""
        batch = len(self.scores.left_dims) - 2

        def write() -> tuple[fx.Node, fx.Node]:
            query = _arrange(state, self.query, self.scores.left_dims, batch)
            for factor, divides in self.row_factors:
                if batch == 1 and len(shape_of(factor)) == 3:
                    factor = emit(state, "unsqueeze", (factor, 1))
                query = emit(state, operator.truediv if divides else operator.mul, (query, factor))
            key = _arrange(state, self.key, (*self.scores.right_dims[:-2], *self.scores.right_dims[:-3:-1]), batch)
            value = _arrange(state, self.value, self.output.right_dims, batch)
            call = attention(state, query, key, value, self._mask(state, batch), self._scale(state))
            result = call
            if batch == 1:
                result = emit(state, "squeeze", (result, 1))
            if self.output.out_dims != tuple(range(batch + 2)):
                result = emit(state, "permute", (result, self.output.out_dims))
            return call, result

        return substitute(state, self.output_node, self.covered, write, self.declined) is not None

    def _scale(self, state: GraphState) -> Any:
        def apply(scale: Any, factor: tuple[fx.Node, bool]) -> Any:
            node, divides = factor
            return emit(state, operator.truediv if divides else operator.mul, (scale, node))

        return functools.reduce(apply, self.factors, self.scale)

    def _mask(self, state: GraphState, batch: int) -> fx.Node | None:
        if self.mask is None:
            return None
        mask = self.mask
        if batch == 1 and len(shape_of(mask)) == 3:
            mask = emit(state, "unsqueeze", (mask, 1))
        elif len(shape_of(mask)) == 1:
            mask = emit(state, "unsqueeze", (mask, 0))
        dtype = fake_tensor(self.value).dtype  # type: ignore[union-attr]
        if self.fill == -math.inf:
            return mask if self.shown else emit(state, "logical_not", (mask,))
        if self.fill is not None:  # as a bias: a row that is masked in full stays uniform, as it was
            hidden = emit(state, "logical_not", (mask,)) if self.shown else mask
            wide = torch.promote_types(dtype, torch.float32)  # as scores are: half precision would make it infinite
            return emit(state, "mul", (emit(state, "to", (hidden, wide)), max(self.fill, LOWEST)))
        # A bool tensor that is added means 0 or 1; as SDPA's mask it would mean something else.
        return emit(state, "to", (mask, dtype)) if fake_tensor(mask).dtype == torch.bool else mask  # type: ignore[union-attr]


def _arrange(state: GraphState, node: fx.Node, dims: tuple[int, ...], batch: int) -> fx.Node:
    """``node`` as [B, heads, tokens, features]."""
    if dims != tuple(range(len(dims))):
        node = emit(state, "permute", (node, dims))
    return emit(state, "unsqueeze", (node, 1)) if batch == 1 else node
