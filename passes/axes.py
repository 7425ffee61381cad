"""The algebra of axes: what a tensor dimension is made of.

A dimension is an ordered, row-major product of *factors*. A factor is an :class:`Atom` (an axis that some tensor
had on its own: T, H, W, the text tokens, a head), a :class:`Cat` of axes (text then video), or a :class:`Slice` of
an axis. Dimensions of size 1 are the empty product. Two axes that compare equal index the same things in the same
order; the converse need not hold, so comparison is safe for matching queries with keys.

Views split atoms and merge them back: splitting an axis in the same way twice gives equal parts, and parts that
meet again in order become the whole.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

import sympy

from fpscompile.ir import Size

INPUT, MADE, PARAMETER = 2, 1, 0
"""Where an atom comes from, by how much it says: the call's data, an op we do not trace, a weight."""


@dataclass(frozen=True)
class Atom:
    """An indivisible axis. ``name`` is unique in a graph: the node and dimension where the axis first appeared."""

    name: str
    size: Size
    source: int = MADE
    origin: str = ""
    """Name of the node that made it."""
    dim: int = 0
    """Dimension of that node."""
    parent: Axis | None = None
    """The axis it was derived from: the whole of a split, or what a convolution strided over."""
    role: str = "root"
    """"root"; "high" or "low" part of a split; "strided" by a convolution or a resize; "counted" by an arange; "ranks"
    that something was received from, and what they hold under one name "gathered"; "chosen" by an index; "rolled"."""

    def __hash__(self) -> int:
        # The name tells atoms apart; hashing the parents too would walk the whole history on every look-up.
        return hash(self.name)


@dataclass(frozen=True)
class Cat:
    """Axes laid end to end."""

    parts: tuple[Axis, ...]

    @property
    def size(self) -> Size:
        return functools.reduce(_add, (axis_size(part) for part in self.parts))


@dataclass(frozen=True)
class Slice:
    """A contiguous part of an axis."""

    whole: Axis
    start: Size
    size: Size


Factor = Atom | Cat | Slice
Axis = tuple[Factor, ...]
Label = tuple[Axis, ...]
"""One axis per dimension of a tensor."""

ONE = Size(sympy.Integer(1), 1)


def same(left: Size, right: Size) -> bool:
    """Whether two sizes are equal for every value of their symbols.

    Canonical equality first; where floor divisions keep equal expressions apart, agreement on random values. No
    guard is installed: only expressions are compared.
    """
    if left.expr == right.expr:
        return True
    if left.hint != right.hint:
        return False
    return _agree(left.expr, right.expr)


@functools.lru_cache(maxsize=4096)
def _agree(left: sympy.Expr, right: sympy.Expr) -> bool:
    symbols = sorted(left.free_symbols | right.free_symbols, key=str)
    if not symbols:
        return bool(left == right)
    rng = random.Random(0)
    agreed = 0
    for _ in range(50):
        # Multiples of 16 are divisible by every patch size in the field, so divisibility side conditions hold.
        values = {symbol: sympy.Integer(16 * rng.randrange(2, 97)) for symbol in symbols}
        try:
            if left.subs(values) != right.subs(values):
                return False
        except ZeroDivisionError:  # s / (s // t) where t is larger: no sizes that the model has
            continue
        agreed += 1
        if agreed == 5:
            return True
    return False


def _add(left: Size, right: Size) -> Size:
    return Size(left.expr + right.expr, left.hint + right.hint)


def _times(left: Size, right: Size) -> Size:
    return Size(left.expr * right.expr, left.hint * right.hint)


def _over(left: Size, right: Size) -> Size:
    return Size(sympy.cancel(left.expr / right.expr), left.hint // right.hint)


def axis_size(axis: Axis) -> Size:
    return functools.reduce(_times, (factor.size for factor in axis), ONE)


def atom(name: str, size: Size, **fields: object) -> Axis:
    """A one-atom axis, or the empty product for size 1."""
    if size.expr == 1:
        return ()
    return (Atom(name, size, **fields),)  # type: ignore[arg-type]


def split(axis: Axis, high: Size) -> tuple[Axis, Axis] | None:
    """``axis`` as (high, low) with ``high`` blocks, or None when the size does not divide."""
    total = axis_size(axis)
    if high.hint <= 0 or total.hint % high.hint:
        return None
    low = _over(total, high)
    only = axis[0] if len(axis) == 1 else None
    lead = only if isinstance(only, Atom) else root(axis)
    key = only.name if isinstance(only, Atom) else f"({describe(axis)})"
    fields: dict[str, object] = {"parent": axis, "source": information(axis)[0]}
    if lead is not None:
        fields |= {"source": lead.source, "origin": lead.origin, "dim": lead.dim}
    return (
        atom(f"{key}/{low}", high, role="high", **fields),
        atom(f"{key}%{low}", low, role="low", **fields),
    )


def product(factors: Sequence[Factor]) -> Axis:
    """Factors in row-major order, with split parts that meet again made whole."""
    result: list[Factor] = []
    for factor in factors:
        result.append(factor)
        while len(result) >= 2 and (whole := _rejoin(result[-2], result[-1])) is not None:
            result[-2:] = whole
    return tuple(result)


def _rejoin(high: Factor, low: Factor) -> Axis | None:
    if not isinstance(high, Atom) or not isinstance(low, Atom):
        return None
    if high.role == "ranks" and low.role == "root" and low.source == INPUT:
        size = _times(high.size, low.size)
        return (replace(low, name=f"{low.name} of {high.name}", size=size, parent=(low,), role="gathered"),)
    if (
        high.role == "high"
        and low.role == "low"
        and high.parent == low.parent
        and high.parent is not None
        and same(_times(high.size, low.size), axis_size(high.parent))
    ):
        return high.parent
    return None


def reshape(label: Label, sizes: Sequence[Size], name: str) -> Label:
    """Labels after a row-major view to ``sizes``. What cannot be followed becomes atoms of the node ``name``."""
    factors = [factor for axis in label for factor in axis]
    result: list[Axis] = []
    whole = 0  # sizes so far that are made of whole factors
    for position, size in enumerate(sizes):
        before = len(factors)
        taken = _take(factors, size)
        if taken is None:
            rest = sizes[position:]
            return (*result, *(fresh(name, position + i, s) for i, s in enumerate(rest)))
        result.append(product(_as_written(taken, size)))
        if whole == position and len(taken) == before - len(factors):
            whole += 1
    if factors:
        # A split whose size is only equal in fact (a floor division) leaves a rest; what is before it stands.
        return (*result[:whole], *(fresh(name, whole + i, s) for i, s in enumerate(sizes[whole:])))
    return tuple(result)


def _take(factors: list[Factor], size: Size) -> list[Factor] | None:
    """Remove from the front of ``factors`` a run whose product is ``size``; None when there is none."""
    taken: list[Factor] = []
    have = ONE
    while not same(have, size):
        if not factors or size.hint <= 0:
            return None
        factor = factors[0]
        total = _times(have, factor.size)
        if total.hint <= size.hint and (total.hint < size.hint or same(total, size)):
            taken.append(factors.pop(0))
            have = total
            continue
        if size.hint % have.hint:
            return None
        parts = split((factor,), _over(size, have))
        if parts is None or not parts[0]:
            return None
        high, low = parts
        taken.extend(high)
        factors[:1] = low
        have = _times(have, axis_size(high))
    return taken


def _as_written(taken: list[Factor], size: Size) -> list[Factor]:
    """What is left of a split has the size that the view gives it: 4, where the quotient is s / (s // 4)."""
    if len(taken) == 1 and isinstance(taken[0], Atom) and taken[0].role == "low" and taken[0].size.expr != size.expr:
        return [replace(taken[0], size=size)]
    return taken


def fresh(name: str, dim: int, size: Size, source: int = MADE) -> Axis:
    """An axis of which nothing is known but where it came from."""
    return atom(f"{name}.{dim}", size, source=source, origin=name, dim=dim)


def strided(axis: Axis, size: Size) -> Axis:
    """The output axis of a convolution, pooling or resize over ``axis``: same order, other step."""
    if same(axis_size(axis), size):
        return axis
    lead = root(axis)
    fields = {"source": lead.source, "origin": lead.origin, "dim": lead.dim} if lead is not None else {}
    return atom(f"strided({describe(axis)}->{size})", size, parent=axis, role="strided", **fields)


def root(axis: Axis) -> Atom | None:
    """The atom that an axis was derived from by striding, splitting off patches and padding, if it is a single one.

    A slice has the root of its whole. Of axes of data laid end to end (a given frame in front of the others), all the
    same dimension of their tensors, it is the longest one's.
    """
    if len(axis) != 1:
        return None
    factor = axis[0]
    if isinstance(factor, Cat):
        return _common_root(factor)
    if isinstance(factor, Slice):
        return root(factor.whole)
    if factor.role in ("strided", "high") and factor.parent is not None:
        return root(factor.parent) or factor
    return factor


def roots(axis: Axis) -> list[Atom | None]:
    """The root of each of its factors."""
    return [root((factor,)) for factor in axis]


def _common_root(factor: Cat) -> Atom | None:
    """Of a Cat of single axes: padding and single steps have no root of their own and do not count.

    Slices may be pieces of one axis in another order, so they have none in common.
    """
    if any(len(part) != 1 or isinstance(part[0], Slice) for part in factor.parts):
        return None
    leads = [lead for part in factor.parts if (lead := root(part)) is not None and lead.source == INPUT]
    if len({lead.name for lead in leads}) != len(leads):
        return None  # several pieces of one axis: nothing says that they are in its order
    if not leads or len({lead.dim for lead in leads}) != 1:
        return None
    return max(leads, key=lambda lead: lead.size.hint)


def joined(axis: Axis) -> bool:
    """Whether several axes were laid end to end somewhere on the way to this one."""
    while len(axis) == 1:
        factor = axis[0]
        above = factor.whole if isinstance(factor, Slice) else factor.parent if isinstance(factor, Atom) else None
        if above is None:
            return isinstance(factor, Cat)
        axis = above
    return False


def cut(axis: Axis, start: Size, size: Size) -> Axis:
    """``axis[start : start + size]``."""
    total = axis_size(axis)
    if same(size, total):
        return axis
    if size.expr == 1:
        return ()
    if len(axis) == 1 and isinstance(axis[0], Cat):
        found = _cut_parts(axis[0].parts, start, size)
        if found is not None:
            return found
    if len(axis) == 1 and isinstance(axis[0], Slice):
        inner = axis[0]
        return cut(inner.whole, _add(inner.start, start), size)
    return (Slice(axis, start, size),)


def _cut_parts(parts: tuple[Axis, ...], start: Size, size: Size) -> Axis | None:
    """The run of whole parts that begins at ``start`` and has ``size``, if the cut falls on their borders."""
    offset = Size(sympy.Integer(0), 0)
    for first in range(len(parts)):
        if same(offset, start):
            length = Size(sympy.Integer(0), 0)
            for last in range(first, len(parts)):
                length = _add(length, axis_size(parts[last]))
                if same(length, size):
                    return concat(parts[first : last + 1])
        offset = _add(offset, axis_size(parts[first]))
    return None


def concat(parts: Sequence[Axis]) -> Axis:
    """Axes end to end: nested ones are flattened, empty ones dropped, adjacent slices of one axis joined."""
    flat: list[Axis] = []
    for part in parts:
        if axis_size(part).hint == 0:
            continue
        flat.extend(part[0].parts if len(part) == 1 and isinstance(part[0], Cat) else (part,))
        while len(flat) >= 2 and (joined := _join_slices(flat[-2], flat[-1])) is not None:
            flat[-2:] = [joined]
    if len(flat) == 1:
        return flat[0]
    return (Cat(tuple(flat)),) if flat else ()


def _join_slices(left: Axis, right: Axis) -> Axis | None:
    if len(left) == 1 and len(right) == 1:
        a, b = left[0], right[0]
        if not isinstance(a, Slice) or not isinstance(b, Slice) or a.whole != b.whole:
            return None
        if same(_add(a.start, a.size), b.start):
            return cut(a.whole, a.start, _add(a.size, b.size))
    return None


def merge(left: Axis, right: Axis) -> Axis:
    """The label of a dimension where two operands meet element by element.

    Both index the same positions, so either would do; the one that says more is kept: the call's data before what
    an unknown op made, that before a weight; then the finer one; then the first.
    """
    if not right or left == right:
        return left
    if not left:
        return right
    return right if information(right) > information(left) else left


def information(axis: Axis) -> tuple[int, int, int]:
    """How much a label says: its best source, how many of its parts are the call's data, how many parts it has."""
    atoms = list(leaves(axis))
    data = sum(leaf.source == INPUT for leaf in atoms)
    return (max((leaf.source for leaf in atoms), default=MADE), data, len(atoms))


def leaves(axis: Axis) -> list[Atom]:
    """All atoms under an axis."""
    result: list[Atom] = []
    for factor in axis:
        if isinstance(factor, Atom):
            result.append(factor)
        elif isinstance(factor, Cat):
            for part in factor.parts:
                result.extend(leaves(part))
        else:
            result.extend(leaves(factor.whole))
    return result


def rearranged(left: Axis, right: Axis) -> bool:
    """Whether two different axes are made of the same axes of the call's data: in another order, or other parts."""
    if not left or not right or left == right:
        return False
    return bool(sources(left) & sources(right))


def sources(axis: Axis) -> set[str]:
    """Names of the data's own axes that an axis goes back to."""
    found: set[str] = set()
    for leaf in leaves(axis):
        if leaf.role == "rolled":  # next to what was not rolled: it is mixed in, as by a convolution
            continue
        if leaf.parent is not None:
            found |= sources(leaf.parent)
        elif leaf.source == INPUT:
            found.add(leaf.name)
    return found


def describe(axis: Axis) -> str:
    """For messages and atom names."""
    words = []
    for factor in axis:
        if isinstance(factor, Atom):
            words.append(factor.name)
        elif isinstance(factor, Cat):
            words.append("[" + " + ".join(describe(part) for part in factor.parts) + "]")
        else:
            words.append(f"({describe(factor.whole)})[{factor.start.expr}:+{factor.size.expr}]")
    return "*".join(words) or "1"
