"""A softmax written out as powers over their sum: ``exp(x) / exp(x).sum(-1, keepdim=True)``, ``exp2(x)``, ``2.0 ** x``.

Powers of a base b are ``exp(x ln b)``, so ``ln b`` is one more scale of the scores. Legality, besides that of
:mod:`fpscompile.passes.softmax_pattern`:

1. The base is e, or a number above 1.
2. The powers are read by their sum and by the quotient, and by nothing else; the sum only by the quotient.
3. The sum runs over one dimension, the last, which it keeps or which is put back; the quotient is powers by sum, and
   nothing is added to either. Either may be written in place: no one else reads what is overwritten.

What weighs something and is none of this (sums divided by late, running sums, ``log_softmax``) is a near miss, by name.
"""

from __future__ import annotations

import math
from typing import Any

from torch import fx

from fpscompile.passes.base import GraphState, argument, pinned, shape_of, target_name
from fpscompile.passes.softmax_match import Match, Written
from fpscompile.passes.softmax_pattern import leads_to_product, match_softmax, miss, tensor_operand, weighs

POWERS = (
    "exp", "exp_", "exp2", "exp2_", "special_exp2", "pow", "__rpow__", "rpow", "float_power", "softmin", "log_softmax",
)  # fmt: skip
"""Names of what a softmax may be written out with."""

BASES = {"exp": math.e, "exp_": math.e, "exp2": 2.0, "exp2_": 2.0, "special_exp2": 2.0}

QUOTIENTS = ("truediv", "div", "true_divide", "divide", "itruediv", "div_")


def normalize_written(state: GraphState, node: fx.Node) -> bool:
    """Powers of scores whose quotient by their sum weighs something. Returns whether the graph changed."""
    base, exponent = _power(node)
    if not isinstance(exponent, fx.Node) or not leads_to_product(exponent) or not weighs(node):
        return False
    quotient, written = _written(node, base, exponent)
    found = match_softmax(quotient, written) if quotient is not None else None
    if isinstance(found, Match):
        return found.replace(state)
    if found is None:
        name = target_name(node).strip("_")
        found = miss(f"its softmax is written out with {name}; call torch.softmax in its place", node)
    state.near_misses.append(found)
    return False


def _power(node: fx.Node) -> tuple[Any, Any]:
    """(base, exponent); the base is None where it is unknown, the exponent where a power of scores it is not."""
    name = target_name(node)
    if name == "pow":
        return pinned(argument(node, 0, "self", node.kwargs.get("input"))), argument(node, 1, "exponent")
    if name == "float_power":
        return None, argument(node, 1, "exponent")
    if name in ("rpow", "__rpow__"):
        return pinned(argument(node, 1, "other")), argument(node, 0, "input")
    return BASES.get(name), tensor_operand(node)


def _written(node: fx.Node, base: Any, exponent: fx.Node) -> tuple[fx.Node | None, Written | None]:
    """The quotient of powers and their sum, and what it is made of."""
    users = list(node.users)
    sums = [user for user in users if target_name(user) == "sum"]
    quotients = [user for user in users if target_name(user) in QUOTIENTS]
    known = isinstance(base, (int, float)) and base > 1 and "out" not in node.kwargs
    if not known or len(users) != 2 or len(sums) != 1 or len(quotients) != 1:
        return None, None
    total, quotient = sums[0], quotients[0]
    dim = argument(total, 1, "dim")
    dim = dim[0] if isinstance(dim, (list, tuple)) and len(dim) == 1 else dim
    if not isinstance(dim, int) or set(total.kwargs) - {"dim", "keepdim", "input"}:
        return None, None
    column = total if argument(total, 2, "keepdim", False) is True else _unsqueezed(total)
    if column is None or list(column.users) != [quotient] or quotient.args != (node, column) or quotient.kwargs:
        return None, None
    inner = (column, total, node) if column is not total else (total, node)
    return quotient, Written(exponent, math.log(base), dim, inner)


def _unsqueezed(total: fx.Node) -> fx.Node | None:
    """The only reader of a sum, if it puts the last dimension back."""
    reader = next(iter(total.users)) if len(total.users) == 1 else None
    if reader is None or reader.args[:1] != (total,):
        return None
    name, rank = target_name(reader), len(shape_of(total))
    behind = name == "unsqueeze" and argument(reader, 1, "dim") in (-1, rank)
    return reader if behind or (name == "getitem" and reader.args[1] == (Ellipsis, None)) else None
