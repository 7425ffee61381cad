"""Rules of functional collectives: what a rank's tensors are made of once tensors were exchanged between ranks.

All ranks of a group run one graph, up to their number in it. So where a rank holds the r-th of N equal parts of one of
the call's axes, r being its number among N (``x.chunk(N)[r]``), the N ranks hold all of the axis, in order.

An all-to-all in equal parts (Ulysses: tokens for heads, then heads for tokens) does two things to a label. Dimension 0
counted the parts that go out, of which each rank gets its own: what they are parts of is cut down to this rank's. And
it counts the ranks that parts come from: the axis that ranks share becomes whole. Where the graph does not show which
axis that is (its tensors come from behind a graph break), the ranks' tokens lie in the order of the ranks.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import sympy
import torch.distributed as dist
from torch import fx

from fpscompile.ir import Size
from fpscompile.passes.axes import (
    INPUT,
    Atom,
    Axis,
    Cat,
    Factor,
    Label,
    Slice,
    axis_size,
    cut,
    information,
    product,
    reshape,
    same,
    split,
)
from fpscompile.passes.base import argument, fake_value, size_of
from fpscompile.passes.rule_tools import Result, number, source_of

if TYPE_CHECKING:
    from fpscompile.passes.trace_axes import Tracer


ALL_TO_ALL = ("_c10d_functional::all_to_all_single", "_c10d_functional_autograd::all_to_all_single")


def all_to_all(tracer: Tracer, node: fx.Node) -> Result:
    """``all_to_all_single`` of functional collectives, in equal parts along dimension 0."""
    label, sizes = source_of(tracer, node)
    group = _group(argument(node, 3, "group_name"))
    splits = (argument(node, 1, "output_split_sizes"), argument(node, 2, "input_split_sizes"))
    if group is None or not label or not all(_equal(each, group.size()) for each in splits):
        return None
    rank, ranks = group.rank(), group.size()
    if sizes[0].hint % ranks:
        return None
    piece = Size(sympy.cancel(sizes[0].expr / ranks), sizes[0].hint // ranks)
    outgoing, first = reshape((label[0],), [number(ranks), piece], node.name)
    rest: Label = (first, *label[1:])
    shared = {f.whole for axis in rest for f in axis if isinstance(f, Slice) and _own(f, rank, ranks)}
    if len(shared) > 1 or any(_hidden(f, rank, ranks) for axis in rest for f in axis):
        return None  # several axes are shared out: the ranks' parts of them alternate
    incoming: Axis = (Atom(f"ranks of {group.group_name}", number(ranks), role="ranks"),)
    for whole in shared:
        halves = split(whole, number(ranks))
        assert halves is not None
        incoming, low = halves
        rest = _replaced(rest, {f: low for axis in rest for f in axis if isinstance(f, Slice) and f.whole == whole})
    if len(outgoing) == 1 and isinstance(outgoing[0], Atom) and outgoing[0].role == "high":
        rest = _cut_down(rest, outgoing[0], rank)
    lead = (*incoming, *rest[0])
    # Ranks of which no more is known join the tokens only where a view makes the two one dimension.
    return (product(lead) if shared else lead, *rest[1:])


def _group(value: Any) -> dist.ProcessGroup | None:
    """The group that a collective names; None if there is none in this process (a graph traced elsewhere)."""
    if isinstance(value, dist.ProcessGroup):
        return value
    if not isinstance(value, str):
        return None
    try:
        return dist.distributed_c10d._resolve_process_group(value)  # type: ignore[arg-type]
    except (RuntimeError, ValueError):
        return None


def _equal(splits: Any, ranks: int) -> bool:
    """Whether split sizes share a dimension out evenly; none at all mean so."""
    if splits is None or splits == []:
        return True
    if not isinstance(splits, (list, tuple)) or len(splits) != ranks:
        return False
    first, *others = (size_of(fake_value(each)) for each in splits)
    return all(same(first, other) for other in others)


def _own(factor: Slice, rank: int, ranks: int) -> bool:
    """Whether a slice is this rank's of equal parts of an axis of the call."""
    place = Size(factor.size.expr * rank, factor.size.hint * rank)
    total = Size(factor.size.expr * ranks, factor.size.hint * ranks)
    return information(factor.whole)[0] == INPUT and same(factor.start, place) and same(axis_size(factor.whole), total)


def _hidden(factor: Factor, rank: int, ranks: int) -> bool:
    """Whether such a slice is a part of what lies end to end with others."""
    return isinstance(factor, Cat) and any(
        _hidden(f, rank, ranks) or (isinstance(f, Slice) and _own(f, rank, ranks))
        for part in factor.parts
        for f in part
    )


def _cut_down(label: Label, parts: Atom, rank: int) -> Label:
    """The label of this rank's part of the axis that ``parts`` counts the parts of."""
    assert parts.parent is not None
    own: dict[Factor, Axis] = {}
    for factor in (factor for axis in label for factor in axis):
        if isinstance(factor, Atom) and factor.role == "low" and factor.parent == parts.parent:
            own[factor] = cut(parts.parent, Size(factor.size.expr * rank, factor.size.hint * rank), factor.size)
    return _replaced(label, own)


def _replaced(label: Label, changes: Mapping[Factor, Axis]) -> Label:
    return tuple(tuple(new for factor in axis for new in changes.get(factor, (factor,))) for axis in label)
