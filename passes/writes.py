"""Writes into tensors: what a tensor is made of once something was put into it.

``x[index] = value`` keeps the label of ``x`` where the value's tokens are x's own; elsewhere they are lost. So does a
write into a view, for the tensor under it. What overwrites all of a tensor (``copy_``, ``out=``) gives it the label of
what is written; what computes element by element (``add_``) keeps the positions. Any other write makes the tensor one
of which nothing is known. Views that were taken before are of the tensor as it is now, so they lose their labels too.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from torch import fx

from fpscompile.passes.aliasing import base_of, held_by, targets_of
from fpscompile.passes.axes import Axis, Label, fresh, leaves, sources
from fpscompile.passes.axis_rules import RULES, keeps_positions
from fpscompile.passes.base import fake_tensor, fake_value, size_of, target_name, words
from fpscompile.passes.place_rules import index_label

if TYPE_CHECKING:
    from fpscompile.passes.trace_axes import Tracer

IN_ORDER = words(
    "index_add_ scatter_add_ scatter_reduce_ index_fill_ index_reduce_ requires_grad_ detach_ masked_fill_"
)
"""Writes that leave what is at a position there, besides those that compute element by element."""


def setitem(tracer: Tracer, node: fx.Node) -> None:
    """``x[index] = value``."""
    target, index, value = node.args
    if not isinstance(target, fx.Node) or fake_tensor(target) is None or not isinstance(value, fx.Node):
        return
    tracer.reads[target] = tracer.reads.get(target, 0) | tracer.reads.get(value, 0)
    written = fake_tensor(value)
    if written is None:
        return
    label = tracer.label(target)
    sizes = tracer.shape(target)
    # The region's own shape: sizes of x[index], read off the value broadcast to it.
    try:
        if any(fake_tensor(item) is not None for item in (index if isinstance(index, tuple) else (index,))):
            raise LookupError  # data chooses the places
        region = fake_tensor(target)[_plain(index)]  # type: ignore[index]
        part = index_label(tracer, label, sizes, index, [size_of(s) for s in region.shape], f"{node.name}.region")
    except Exception:  # an index a fake tensor cannot evaluate here: treat as unknown
        part = None
    if part is None:
        # Tokens put in places that data chooses have an order of their own.
        _settle(tracer, target, _unknown(tracer, target, node.name))
        return
    given = tracer.label(value)
    conflict = set()
    for back in range(1, min(len(part), len(given)) + 1):
        if part[-back] and given[-back] and part[-back] != given[-back]:
            conflict.add(part[-back])
    # Of which single place a value is does not show in its label; of the same tensor, it may be another one.
    elsewhere = {dim for dim in _single_places(tracer, target, index) if _origins([label[dim]]) & _origins(given)}
    if conflict or elsewhere:
        lost = _unknown(tracer, target, node.name)
        kept = (
            axis if dim not in elsewhere and axis not in conflict and not _touches(axis, conflict) else ()
            for dim, axis in enumerate(label)
        )
        _settle(tracer, target, tuple(axis or other for axis, other in zip(kept, lost, strict=True)))


def written(tracer: Tracer, node: fx.Node) -> None:
    """An op that writes in place, other than ``x[index] = value``."""
    name = target_name(node)
    if name in IN_ORDER or (name != "copy_" and keeps_positions(name) and node.kwargs.get("out") is None):
        return
    for target in targets_of(node):
        tracer.reads[target] = tracer.reads.get(target, 0) | tracer.reads.get(node, 0)
        result = fake_tensor(node)
        base = base_of(target)
        if isinstance(base, fx.Node) and fake_tensor(base) is not None and _is_part(target, base):
            # Frames that are written one by one, say: in which order, the labels of the views do not show.
            if _origins(tracer.label(base)) & _origins(tracer.label(node) if result is not None else ()):
                _settle(tracer, base, _unknown(tracer, base, node.name))
            continue
        if (
            (name in RULES or keeps_positions(name))
            and result is not None
            and len(result.shape) == len(tracer.label(target))
        ):
            _settle(tracer, target, tracer.label(node))
        else:
            _settle(tracer, target, _unknown(tracer, target, node.name))


def _settle(tracer: Tracer, target: fx.Node, label: Label) -> None:
    """``target`` is made of ``label`` from now on; what shares its memory, of nothing known, if that is news."""
    if label == tracer.label(target):
        return
    held = held_by([target])
    for node in [node for node in tracer.labels if node is not target and held(node)]:
        tracer.labels[node] = _unknown(tracer, node, f"{node.name} written")
    tracer.labels[target] = label


def _single_places(tracer: Tracer, target: fx.Node, index: Any) -> list[int]:
    """Dimensions of which an index takes one place."""
    items = list(index) if isinstance(index, tuple) else [index]
    rank = len(tracer.label(target))
    used = sum(item is not None and item is not Ellipsis for item in items)
    places = [i for i, item in enumerate(items) if item is Ellipsis] or [len(items)]
    items[places[0] : places[0] + 1] = [slice(None)] * (rank - used)
    taken = [item for item in items if item is not None]
    return [
        dim
        for dim, item in enumerate(taken)
        if not isinstance(item, slice) or (_count(item) == 1 and tracer.shape(target)[dim].expr != 1)
    ]


def _count(item: slice) -> int | None:
    """Places of a slice between numbers of one sign."""
    start, stop = item.start or 0, item.stop
    whole = isinstance(start, int) and isinstance(stop, int) and (start < 0) == (stop < 0)
    return stop - start if whole else None


def _is_part(view: fx.Node, base: fx.Node) -> bool:
    seen, whole = fake_tensor(view), fake_tensor(base)
    return seen is not None and (whole is None or seen.numel() != whole.numel())


def _origins(label: Iterable[Axis]) -> set[str]:
    """The inputs of the call that axes go back to."""
    return {name.rpartition(".")[0] for axis in label for name in sources(axis)}


def _unknown(tracer: Tracer, node: fx.Node, name: str) -> Label:
    """Of no input: three axes of one input would be a grid."""
    return tuple(fresh(name, dim, size) for dim, size in enumerate(tracer.shape(node)))


def _touches(axis: Axis, lost: set[Axis]) -> bool:
    """Whether a part of ``axis`` is among the lost ones, or what they are steps of."""
    atoms, names = set(leaves(axis)), sources(axis)
    return any(atoms & set(leaves(other)) or names & sources(other) for other in lost)


def _plain(index: Any) -> Any:
    return fx.map_arg(index, fake_value)
