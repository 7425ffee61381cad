"""What a 3D site must be besides 3D: no dropout, not causal, no mask but a key mask, one supported dtype, whole heads.

Each condition that fails is a :class:`~fpscompile.ir.Rejection` that names the value and the remedy.
"""

from __future__ import annotations

import torch
from torch import fx

from fpscompile.ir import Reason, Rejection
from fpscompile.passes.axes import same
from fpscompile.passes.base import fake_tensor, shape_of, target_name
from fpscompile.passes.declared import CAUSAL

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def illegal(node: fx.Node) -> Rejection | None:
    """Why a 3D site may not be rewritten, whatever its grid."""
    query = fake_tensor(node.args[0])
    assert query is not None
    rate = node.kwargs.get("dropout_p")
    if not isinstance(rate, (int, float)) or rate != 0:
        message = f"dropout_p={rate}: attention dropout has no fused form; train with dropout 0 or call model.eval()"
        return Rejection(Reason.DROPOUT, message, rate, node)
    if node.kwargs.get("is_causal") is not False:
        return Rejection(Reason.CAUSAL, f"is_causal=True: {CAUSAL}", True, node)
    if query.dtype not in DTYPES:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
        return Rejection(Reason.DTYPE, f"dtype {query.dtype} is not supported; use one of {names}", query.dtype, node)
    dtypes = {fake_tensor(tensor).dtype for tensor in node.args[:3]}  # type: ignore[union-attr]
    if len(dtypes) > 1:
        return Rejection(Reason.DTYPE, f"q, k and v differ in dtype: {dtypes}", dtypes, node)
    return _illegal_heads(node) or _illegal_mask(node)


def _illegal_heads(node: fx.Node) -> Rejection | None:
    query, key, value = (shape_of(tensor) for tensor in node.args[:3])  # type: ignore[arg-type]
    grouped = node.kwargs.get("enable_gqa")
    heads = [shape[1].hint for shape in (query, key, value)]
    if heads[1] != heads[2] or (heads[0] != heads[1] and not grouped) or heads[0] % max(heads[1], 1):
        return Rejection(Reason.LAYOUT, f"q, k, v have {heads} heads, which attention would broadcast", heads, node)
    batches = [shape[0] for shape in (query, key, value)]
    if not (same(batches[0], batches[1]) and same(batches[0], batches[2])):
        return Rejection(Reason.LAYOUT, "q, k, v differ in batch size, which attention would broadcast", None, node)
    return None


def _illegal_mask(node: fx.Node) -> Rejection | None:
    mask = key_mask(node)
    if mask is None:
        return None
    value = fake_tensor(mask)
    if value is None:
        return Rejection(Reason.MASK, "the mask is not a tensor", mask, node)
    shape = shape_of(mask)
    if len(shape) >= 2 and shape[-2].expr != 1:
        sizes = [str(size.expr) for size in shape]
        message = (
            f"the mask [{', '.join(sizes)}] differs from query to query (or may); only a key mask "
            "[batch, heads, 1, keys] can be combined with a tile window"
        )
        return Rejection(Reason.MASK, message, sizes, node)
    keys = shape_of(node.args[1])[2]  # type: ignore[arg-type]
    if not shape or not same(shape[-1], keys):
        return Rejection(Reason.MASK, "the mask's last dimension is not the keys", None, node)
    if value.requires_grad and torch.is_grad_enabled():
        return Rejection(
            Reason.MASK, "the mask needs a gradient, which the rewritten attention does not give", None, node
        )
    if value.dtype not in (torch.bool, torch.float32, fake_tensor(node.args[0]).dtype):  # type: ignore[union-attr]
        return Rejection(Reason.MASK, f"a mask of dtype {value.dtype} is not supported", value.dtype, node)
    return None


def key_mask(node: fx.Node) -> fx.Node | None:
    """The mask of a site, seen through an ``expand`` that only repeats it for every query."""
    mask = node.kwargs.get("attn_mask")
    while isinstance(mask, fx.Node) and target_name(mask) in ("expand", "expand_as", "broadcast_to"):
        source = mask.args[0]
        if not isinstance(source, fx.Node) or fake_tensor(source) is None:
            break
        shape = shape_of(source)
        if not shape or not same(shape[-1], shape_of(mask)[-1]) or (len(shape) >= 2 and shape[-2].expr != 1):
            break
        mask = source
    return mask  # type: ignore[return-value]
