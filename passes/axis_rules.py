"""How each op carries axis labels from its inputs to its output.

A rule takes the tracer and the node and returns the label of a tensor, a list of labels for several outputs, or
None for "I cannot say", which gives the output fresh atoms. The rules of elementwise ops come from PyTorch's own
``pointwise`` tag; :data:`RULES` lists the rest. To support another op, add a function and its name there.
"""

from __future__ import annotations

import functools
import itertools
import operator
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import fx

from fpscompile.ir import Size
from fpscompile.passes.axes import (
    INPUT,
    Atom,
    Axis,
    atom,
    axis_size,
    concat,
    describe,
    fresh,
    merge,
    product,
    rearranged,
    reshape,
    roots,
    same,
    strided,
)
from fpscompile.passes.base import argument, fake_tensor, fake_value, target_name
from fpscompile.passes.collective_rules import ALL_TO_ALL, all_to_all
from fpscompile.passes.frames import whole_of
from fpscompile.passes.place_rules import choose, getitem, narrow, pad, select, split, unbind, unfold
from fpscompile.passes.rule_tools import Result, Rule, dim_of, source_of

if TYPE_CHECKING:
    from fpscompile.passes.trace_axes import Tracer


def names(text: str) -> list[str]:
    return text.split()


# Not tagged pointwise, but output element i still lies at position i of the input.
SAME_POSITION = frozenset(
    names(
        "dropout feature_dropout masked_fill masked_fill_ where addcmul addcdiv lerp clamp clamp_min clamp_max "
        "nan_to_num fill_ zero_ silu gelu relu mish softplus"
    )
)

OPERATOR_NAMES = {
    "truediv": "div",
    "floordiv": "div",
    "mod": "remainder",
    "and_": "bitwise_and",
    "or_": "bitwise_or",
    "xor": "bitwise_xor",
    "invert": "bitwise_not",
    "pos": "positive",
}


@functools.lru_cache(maxsize=1024)
def keeps_positions(name: str) -> bool:
    """Whether an op maps position i of its (broadcast) inputs to position i of its output."""
    if name in SAME_POSITION:
        return True
    candidates = {name, name.rstrip("_"), OPERATOR_NAMES.get(name, name)}
    if name.startswith("i") and hasattr(operator, name):
        inner = name[1:]
        candidates |= {inner, OPERATOR_NAMES.get(inner, inner)}
    for candidate in candidates:
        if not candidate.isidentifier():
            continue
        packet = getattr(torch.ops.aten, candidate, None)
        if packet is None or not hasattr(packet, "overloads"):
            continue
        if any(torch.Tag.pointwise in getattr(packet, overload).tags for overload in packet.overloads()):
            return True
    return False


def broadcast(tracer: Tracer, node: fx.Node) -> Result:
    """Align the labels of all tensor inputs from the right, as broadcasting does."""
    out = tracer.shape(node)
    operands = [
        arg for arg in node.all_input_nodes if fake_tensor(arg) is not None and arg is not node.kwargs.get("out")
    ]
    result: list[Axis] = []
    for dim, size in enumerate(out):
        here = []
        for operand in operands:
            label = tracer.label(operand)
            position = dim - len(out) + len(label)
            if position >= 0 and label[position] and same(axis_size(label[position]), size):
                here.append((label[position], operand, position))
        axis = tracer.meet(here)
        result.append(axis if axis or size.expr == 1 else fresh(node.name, dim, size))
    return tuple(result)


def copied(tracer: Tracer, node: fx.Node) -> Result:
    """``x.copy_(y)``: y's positions, spread over x."""
    source = argument(node, 1, "src", argument(node, 1, "other"))
    label, out = tracer.label(source), tracer.shape(node)
    lead = len(out) - len(label)
    return tuple(
        label[dim - lead] if dim >= lead and same(axis_size(label[dim - lead]), size) else fresh(node.name, dim, size)
        for dim, size in enumerate(out)
    )


def unary(tracer: Tracer, node: fx.Node) -> Result:
    """Ops that keep the shape of their first tensor; others (a weight, a ``type_as`` model) do not count."""
    label, sizes = source_of(tracer, node)
    out = tracer.shape(node)
    kept = len(sizes) == len(out) and all(same(a, b) for a, b in zip(sizes, out, strict=True))
    return label if kept else None


def _dims(node: fx.Node, position: int, name: str, rank: int) -> list[int] | None:
    """Dims given as one list, as separate arguments, or by name."""
    value = node.kwargs.get(name, node.args[position:])
    if isinstance(value, int):
        value = (value,)
    if isinstance(value, (tuple, list)) and len(value) == 1 and isinstance(value[0], (tuple, list)):
        value = value[0]
    if not isinstance(value, (tuple, list)) or not all(isinstance(v, int) for v in value):
        return None
    return [v % rank for v in value]  # type: ignore[operator]


def view(tracer: Tracer, node: fx.Node) -> Result:
    label, _ = source_of(tracer, node)
    return reshape(label, tracer.shape(node), node.name)


def permute(tracer: Tracer, node: fx.Node) -> Result:
    label, _ = source_of(tracer, node)
    dims = _dims(node, 1, "dims", len(label))
    return None if dims is None else tuple(label[dim] for dim in dims)


def transpose(tracer: Tracer, node: fx.Node) -> Result:
    label, _ = source_of(tracer, node)
    rank = len(label)
    first = argument(node, 1, "dim0", node.kwargs.get("axis0"))
    second = argument(node, 2, "dim1", node.kwargs.get("axis1"))
    if not isinstance(first, int) or not isinstance(second, int):
        return None
    result = list(label)
    first, second = first % rank, second % rank
    result[first], result[second] = result[second], result[first]
    return tuple(result)


def matrix_transpose(tracer: Tracer, node: fx.Node) -> Result:
    label, _ = source_of(tracer, node)
    return (*label[:-2], *reversed(label[-2:]))


def movedim(tracer: Tracer, node: fx.Node) -> Result:
    label, _ = source_of(tracer, node)
    rank = len(label)
    source, target = argument(node, 1, "source"), argument(node, 2, "destination")
    sources = [source] if isinstance(source, int) else source
    targets = [target] if isinstance(target, int) else target
    if not isinstance(sources, (tuple, list)) or not isinstance(targets, (tuple, list)):
        return None
    moved = {int(t) % rank: int(s) % rank for s, t in zip(sources, targets, strict=True)}
    rest = iter(dim for dim in range(rank) if dim not in moved.values())
    return tuple(label[moved[dim] if dim in moved else next(rest)] for dim in range(rank))


def expand(tracer: Tracer, node: fx.Node) -> Result:
    """Dimensions that grow from 1 are new axes; the others keep theirs. Also repeat, tile and broadcast_to."""
    label, sizes = source_of(tracer, node)
    out = tracer.shape(node)
    if target_name(node) == "repeat_interleave" and any(
        fake_tensor(x) is not None for x in (*node.args[1:], *node.kwargs.values())
    ):
        return None  # how often each place comes is data
    lead = len(out) - len(label)
    return tuple(
        label[dim - lead] if dim >= lead and same(sizes[dim - lead], size) else fresh(node.name, dim, size)
        for dim, size in enumerate(out)
    )


def _alike(axes: Sequence[Axis], node: fx.Node, dim: int, size: Size) -> Axis:
    """The axis of parts that lie side by side; one of its own where they have the same things in another order."""
    merged = functools.reduce(merge, axes)
    # Convolutions and resizes of an axis keep its order.
    lost = any(rearranged(merged, axis) and roots(merged) != roots(axis) for axis in axes)
    return fresh(node.name, dim, size) if lost else merged


def roll(tracer: Tracer, node: fx.Node) -> Result:
    """Rolled dimensions are in an order of their own; rolled back by as much, they are what they were."""
    label, _ = source_of(tracer, node)
    shifts, dims = argument(node, 1, "shifts"), argument(node, 2, "dims")
    shifts, dims = ([value] if isinstance(value, int) else value for value in (shifts, dims))
    if not isinstance(shifts, (tuple, list)) or not isinstance(dims, (tuple, list)) or len(shifts) != len(dims):
        return None
    if not all(isinstance(value, int) for value in (*shifts, *dims)):
        return None
    result = list(label)
    for shift, dim in zip(shifts, dims, strict=True):
        axis = result[dim]
        before = axis[0] if len(axis) == 1 and isinstance(axis[0], Atom) and axis[0].role == "rolled" else None
        if before is not None:
            shift, axis = shift + int(before.name.rpartition(" by ")[2]), before.parent or ()
        if axis and shift:
            name = f"({describe(axis)}) rolled by {shift}"
            axis = atom(name, axis_size(axis), parent=axis, role="rolled", origin=node.name, dim=dim % len(label))
        result[dim] = axis
    return tuple(result)


def cat(tracer: Tracer, node: fx.Node) -> Result:
    tensors = argument(node, 0, "tensors")
    if not isinstance(tensors, (tuple, list)):
        return None
    labels = [tracer.label(t) for t in tensors if fake_tensor(t) is not None]
    shapes = [tracer.shape(t) for t in tensors if fake_tensor(t) is not None]
    rank = len(tracer.shape(node))
    if any(len(label) != rank for label in labels):  # legacy: an empty 1-D tensor among the parts
        return None
    dim = dim_of(argument(node, 1, "dim", node.kwargs.get("axis", 0)), rank)
    # Parts of one row of features are of one token; else, what lies side by side need not be.
    aligned = dim == rank - 1
    result = [
        functools.reduce(merge, axes) if aligned else _alike(axes, node, each, tracer.shape(node)[each])
        for each, axes in enumerate(zip(*labels, strict=True))
    ]
    parts: list[Axis] = []
    for index, (label, shape) in enumerate(zip(labels, shapes, strict=True)):
        # A part of size 1 (a class token) has no atoms; here it takes a place, so it gets one.
        single = (Atom(f"{node.name}[{index}].{dim}", shape[dim], origin=node.name, dim=dim),)
        parts.append(label[dim] or single)
    frames = whole_of(tensors, tracer.label) if all(each[dim] == labels[0][dim] for each in labels) else None
    result[dim] = concat(parts) if frames is None else product((*frames, *labels[0][dim]))
    return tuple(result)


def stack(tracer: Tracer, node: fx.Node) -> Result:
    tensors = argument(node, 0, "tensors")
    if not isinstance(tensors, (tuple, list)):
        return None
    labels = [tracer.label(t) for t in tensors]
    out = tracer.shape(node)
    dim = dim_of(argument(node, 1, "dim", 0), len(out))
    sizes = (*out[:dim], *out[dim + 1 :])
    result = [
        functools.reduce(merge, axes) if dim == len(out) - 1 else _alike(axes, node, each, sizes[each])
        for each, axes in enumerate(zip(*labels, strict=True))
    ]
    frames = whole_of(tensors, tracer.label)
    result.insert(dim, fresh(node.name, dim, out[dim]) if frames is None else frames)
    return tuple(result)


def linear(tracer: Tracer, node: fx.Node) -> Result:
    label, _ = source_of(tracer, node)
    out = tracer.shape(node)
    return (*label[:-1], fresh(node.name, len(out) - 1, out[-1]))


def matmul(tracer: Tracer, node: fx.Node) -> Result:
    operands = [arg for arg in node.args if isinstance(arg, fx.Node)]
    if len(operands) < 2:
        return None
    left, right = tracer.label(operands[-2]), tracer.label(operands[-1])
    if len(left) < 2 or len(right) < 2:
        return None
    batch = [
        tracer.meet([(a, operands[-2], len(left) - 3 - back), (b, operands[-1], len(right) - 3 - back)])
        for back, (a, b) in enumerate(
            itertools.zip_longest(reversed(left[:-2]), reversed(right[:-2]), fillvalue=())  # type: ignore[arg-type]
        )
    ]
    return (*reversed(batch), left[-2], right[-1])


def einsum(tracer: Tracer, node: fx.Node) -> Result:
    equation = node.args[0]
    operands = node.args[1:]
    if len(operands) == 1 and isinstance(operands[0], (tuple, list)):
        operands = tuple(operands[0])
    if not isinstance(equation, str) or "." in equation or "->" not in equation:
        return None
    inputs, output = equation.replace(" ", "").split("->")
    letters: dict[str, list[tuple[Axis, fx.Node, int]]] = {}
    for term, operand in zip(inputs.split(","), operands, strict=True):
        for dim, (letter, axis) in enumerate(zip(term, tracer.label(operand), strict=True)):
            letters.setdefault(letter, []).append((axis, operand, dim))  # type: ignore[arg-type]
    return tuple(tracer.meet(letters[letter]) for letter in output)


def convolution(tracer: Tracer, node: fx.Node) -> Result:
    label, _ = source_of(tracer, node)
    out = tracer.shape(node)
    weight = argument(node, 1, "weight")
    spatial = len(tracer.shape(weight)) - 2
    lead = len(out) - spatial
    batch = label[: lead - 1]
    space = (strided(label[dim], out[dim]) for dim in range(lead, len(out)))
    return (*batch, fresh(node.name, lead - 1, out[lead - 1]), *space)


def resample(tracer: Tracer, node: fx.Node) -> Result:
    """interpolate and pooling: every dimension keeps its order."""
    label, _ = source_of(tracer, node)
    out = tracer.shape(node)
    return tuple(strided(axis, size) for axis, size in zip(label, out, strict=True)) if len(label) == len(out) else None


def pixel_shuffle(tracer: Tracer, node: fx.Node) -> Result:
    """[..., C, H, W] with a factor moved between the channels and the other two."""
    label, _ = source_of(tracer, node)
    out = tracer.shape(node)
    space = (strided(axis, size) for axis, size in zip(label[-2:], out[-2:], strict=True))
    return (*label[:-3], fresh(node.name, len(out) - 3, out[-3]), *space)


def embedding(tracer: Tracer, node: fx.Node) -> Result:
    label, _ = source_of(tracer, node)
    out = tracer.shape(node)
    return (*label, fresh(node.name, len(out) - 1, out[-1]))


def meshgrid(tracer: Tracer, node: fx.Node) -> Result:
    tensors = node.args[0] if node.args and isinstance(node.args[0], (tuple, list)) else node.args
    if node.kwargs.get("indexing", "ij") != "ij":
        return None
    label = tuple(tracer.label(t)[0] if tracer.label(t) else () for t in tensors)
    return [label for _ in tensors]


def counted(tracer: Tracer, node: fx.Node) -> Result:
    """arange and linspace: the axis of a coordinate."""
    (size,) = tracer.shape(node)
    return (atom(f"{node.name}.0", size, origin=node.name, role="counted"),)


def blank(tracer: Tracer, node: fx.Node) -> Result:
    """zeros and ones that only ever pad others: as padding, one is as good as another of its size."""
    if not node.users or any(target_name(user) not in ("cat", "concat", "concatenate") for user in node.users):
        return None
    return tuple(atom(f"blank.{size}", size) for size in tracer.shape(node))


def overwrite(tracer: Tracer, node: fx.Node) -> Result:
    """index_copy, scatter: along ``dim`` the call's data in an order of its own, no longer the target's."""
    label, _ = source_of(tracer, node)
    dim = dim_of(argument(node, 1, "dim"), len(label))
    return (*label[:dim], fresh(node.name, dim, tracer.shape(node)[dim], INPUT), *label[dim + 1 :])


def reduce(tracer: Tracer, node: fx.Node) -> Result:
    """sum, mean, amax ... over dims: the remaining axes keep their labels."""
    label, _ = source_of(tracer, node)
    value = fake_value(node)
    dims = node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else None)
    if dims is None:
        return () if isinstance(value, torch.Tensor) and value.ndim == 0 else None
    listed = [dims] if isinstance(dims, int) else dims
    if not isinstance(listed, (tuple, list)) or not all(isinstance(d, int) for d in listed):
        return None
    gone = {int(d) % len(label) for d in listed}  # type: ignore[call-overload]
    keep = argument(node, 2, "keepdim", False)
    result = tuple(() if dim in gone else axis for dim, axis in enumerate(label) if keep or dim not in gone)
    return [result, result] if isinstance(value, (tuple, list)) else result


def attention(tracer: Tracer, node: fx.Node) -> Result:
    """The queries' tokens with the values' features."""
    query, value = argument(node, 0, "query"), argument(node, 2, "value")
    return (*tracer.label(query)[:-1], tracer.label(value)[-1])


def complex_view(tracer: Tracer, node: fx.Node) -> Result:
    label, _ = source_of(tracer, node)
    return label[:-1]


def real_view(tracer: Tracer, node: fx.Node) -> Result:
    label, _ = source_of(tracer, node)
    out = tracer.shape(node)
    return (*label, fresh(node.name, len(out) - 1, out[-1]))


def attribute(tracer: Tracer, node: fx.Node) -> Result:
    """``getattr(x, "T")`` and kin."""
    name = node.args[1]
    label = tracer.label(node.args[0]) if fake_tensor(node.args[0]) is not None else None
    if label is None:
        return None
    if name in ("T", "mT", "H", "mH"):
        return tuple(reversed(label)) if name in ("T", "H") else (*label[:-2], *reversed(label[-2:]))
    return label if name in ("data", "grad", "real", "imag") else None


RULES: dict[str, Rule] = {
    **dict.fromkeys(
        names(
            "layer_norm rms_norm group_norm instance_norm normalize batch_norm softmax log_softmax cumsum cumprod "
            "to type type_as float double half bfloat16 int long bool cpu cuda contiguous clone detach detach_ "
            "requires_grad_ alias _to_copy lift_fresh pin_memory "
            "empty_like zeros_like ones_like full_like rand_like randn_like"
        ),
        unary,
    ),
    **dict.fromkeys(
        names(
            "view reshape flatten unflatten squeeze unsqueeze view_as reshape_as _unsafe_view ravel squeeze_ unsqueeze_"
        ),
        view,
    ),
    "permute": permute,
    **dict.fromkeys(("transpose", "swapaxes", "swapdims", "transpose_"), transpose),
    **dict.fromkeys(("t", "numpy_T", "matrix_H", "adjoint"), matrix_transpose),
    **dict.fromkeys(("movedim", "moveaxis"), movedim),
    **dict.fromkeys(names("expand expand_as broadcast_to repeat tile repeat_interleave"), expand),
    **dict.fromkeys(("cat", "concat", "concatenate"), cat),
    "copy_": copied,
    "stack": stack,
    "roll": roll,
    **dict.fromkeys(names("split chunk tensor_split split_with_sizes unsafe_chunk unsafe_split"), split),
    "unbind": unbind,
    "select": select,
    "narrow": narrow,
    "getitem": getitem,
    "getattr": attribute,
    "pad": pad,
    "unfold": unfold,
    "linear": linear,
    **dict.fromkeys(("matmul", "bmm", "mm", "baddbmm", "__matmul__", "_scaled_mm"), matmul),
    "einsum": einsum,
    **dict.fromkeys(("conv1d", "conv2d", "conv3d", "convolution"), convolution),
    **dict.fromkeys(
        names(
            "interpolate avg_pool1d avg_pool2d avg_pool3d max_pool1d max_pool2d max_pool3d "
            "adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d"
        ),
        resample,
    ),
    **dict.fromkeys(("pixel_shuffle", "pixel_unshuffle"), pixel_shuffle),
    "embedding": embedding,
    **dict.fromkeys(("arange", "linspace"), counted),
    **dict.fromkeys(names("zeros ones full new_zeros new_ones new_full"), blank),
    "index_select": choose,
    **dict.fromkeys(names("index_copy index_fill scatter"), overwrite),
    **dict.fromkeys(names("index_add scatter_add index_add_ scatter_add_ scatter_reduce_ index_fill_"), unary),
    "meshgrid": meshgrid,
    **dict.fromkeys(names("sum mean amax amin max min prod std var logsumexp norm any all argmax argmin"), reduce),
    "scaled_dot_product_attention": attention,
    "hop::flex_attention": attention,
    **dict.fromkeys(ALL_TO_ALL, all_to_all),
    **dict.fromkeys(
        names("_c10d_functional::wait_tensor _c10d_functional::all_reduce _c10d_functional::broadcast"), unary
    ),
    "view_as_complex": complex_view,
    "view_as_real": real_view,
}
