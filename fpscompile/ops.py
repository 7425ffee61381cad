"""``fps::attention``: the op that a rewritten site calls. Schema, fake, autograd; picks the lowering by its plan.

The schema is a frozen contract::

    fps::attention(Tensor query, Tensor key, Tensor value, Tensor? key_mask, Tensor phase,
                   SymInt[] grid, Tensor? published_grid, SymInt[] query_span, SymInt[] key_span,
                   float? scale, str plan, Tensor? selection=None) -> (Tensor output, Tensor lse)

Shapes and meaning
    query           [B, H, Lq, D], any strides; float32, float64, bfloat16, float16
    key             [B, Hk, Lk, D], H a multiple of Hk (query head h reads key head h // (H // Hk))
    value           [B, Hk, Lk, Dv]
    key_mask        None; or [B | 1, H | 1, 1, Lk]: bool (True keeps), or the query's dtype or float32 (added to the
                    scaled scores). It receives no gradient.
    phase           int32 [n], B a multiple of n: batch element b is in phase[b // (B // n)]
    grid            video tokens (t, h, w); empty when ``published_grid`` gives them
    published_grid  int64 [3] on the CPU, read at run time; None when ``grid`` gives them. With one frame, an image, the
                    call is dense and nothing is rounded
    query_span      (first video token, number of video tokens) in the query sequence
    key_span        the same for the key sequence
    scale           None means 1/sqrt(D)
    plan            :meth:`fpscompile.plan.Plan.to_json`
    selection       uint8 [B, H, n], what ``fps::select_tiles`` returned for this call: the tiles that content chose.
                    None where the plan has no such window; with one, tiles are then chosen here, and again in the
                    backward. It receives no gradient
    output          [B, H, Lq, Dv] in the query's dtype, strided as the transpose of a contiguous [B, Lq, H, Dv]
    lse             [B, H, Lq] contiguous, float32 (float64 for float64 inputs): natural log of the sum of exp of
                    the scaled, masked scores over the visible keys, means of dropped tiles among them where the plan
                    has those (:mod:`fpscompile.remainder`); -inf where no key is visible. Not differentiable.

Layouts of the gradients: dq, dk and dv, like the output, are transposes of contiguous [B, L, H, D].

Other ops here
    fps::attention_backward  the gradient of the above, an op of its own so that compilers see no data-dependent step
    fps::select_tiles        tiles chosen by content; see :mod:`fpscompile.selection`
    fps::phase_index         denoising progress -> phase; see :mod:`fpscompile.phase_index`

Why ops of a library, and not ``torch.library.triton_op``, which would show the kernels to compilers: one op serves all
lowerings, chosen by the plan where it runs; its tables come from a grid that may be known only then; and under
``TRITON_INTERPRET=1`` a ``triton_op`` runs its kernels on the fake tensors of a trace. The graph is the same on every
device, and Inductor has nothing to fuse into kernels that gather and scatter by tables.

Under autocast, query, key and value are cast as ``F.scaled_dot_product_attention``'s are: to the autocast dtype,
unless they are float64. A float ``key_mask`` stays as it is.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from typing import Any

import torch

from fpscompile import lowerings
from fpscompile import selection as selection_of
from fpscompile.errors import GridError, OptionError, UnsupportedError
from fpscompile.kept import refuse_capture
from fpscompile.phase_index import phase_index
from fpscompile.plan import Plan, ResolvedPlan, resolve
from fpscompile.tiling import Grid

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

Ints = Sequence[int]

_library = torch.library.Library("fps", "DEF")
_library.define(
    "attention(Tensor query, Tensor key, Tensor value, Tensor? key_mask, Tensor phase, SymInt[] grid, "
    "Tensor? published_grid, SymInt[] query_span, SymInt[] key_span, float? scale, str plan, Tensor? selection=None) "
    "-> (Tensor output, Tensor lse)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_library.define(
    "attention_backward(Tensor grad_output, Tensor query, Tensor key, Tensor value, Tensor? key_mask, Tensor output, "
    "Tensor lse, Tensor phase, SymInt[] grid, Tensor? published_grid, SymInt[] query_span, SymInt[] key_span, "
    "float? scale, str plan, Tensor? selection=None) -> (Tensor dq, Tensor dk, Tensor dv)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_library.define(
    "select_tiles(Tensor query, Tensor key, Tensor? key_mask, Tensor phase, SymInt[] grid, Tensor? published_grid, "
    "SymInt[] query_span, SymInt[] key_span, float? scale, str plan, SymInt capacity) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def _attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    key_mask: torch.Tensor | None,
    phase: torch.Tensor,
    grid: Ints,
    published_grid: torch.Tensor | None,
    query_span: Ints,
    key_span: Ints,
    scale: float | None,
    plan: str,
    selection: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    _check_tensors(query, key, value, key_mask)
    resolved = _resolve(query, key, grid, published_grid, query_span, key_span, plan)
    lowering = lowerings.get(resolved.plan.lowering)
    if query.shape[0] == 0:
        _check_phases(phase, 0)
        return _attention_fake(query, key, value)  # which has no element to be wrong
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    call = _arguments(query, key, key_mask, phase, resolved, scale, selection, lowering)
    return lowerings.forward(lowering, query, key, value, **call)


torch.library.impl("fps::attention", "default", lib=_library)(_attention)


@torch.library.register_fake("fps::attention", lib=_library)
def _attention_fake(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    batch, heads, length, _d = query.shape
    wide = torch.float64 if query.dtype == torch.float64 else torch.float32
    output = query.new_empty(batch, length, heads, value.shape[-1]).transpose(1, 2)
    return output, query.new_empty(batch, heads, length, dtype=wide)


def _as_given(device_type: str) -> contextlib.AbstractContextManager[Any]:
    """In the dtypes of the tensors at hand: a caller's autocast is for the model's operations, not for those inside."""
    inside = torch.is_autocast_enabled(device_type)
    return torch.autocast(device_type, enabled=False) if inside else contextlib.nullcontext()


def _attention_backward(
    grad_output: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    key_mask: torch.Tensor | None,
    output: torch.Tensor,
    lse: torch.Tensor,
    phase: torch.Tensor,
    grid: Ints,
    published_grid: torch.Tensor | None,
    query_span: Ints,
    key_span: Ints,
    scale: float | None,
    plan: str,
    selection: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    if query.shape[0] == 0:
        return _attention_backward_fake(grad_output, query, key, value)
    resolved = _resolve(query, key, grid, published_grid, query_span, key_span, plan)
    lowering = _of_gradients(resolved)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    call = _arguments(query, key, key_mask, phase, resolved, scale, selection, lowering)
    with _as_given(query.device.type):
        return lowerings.backward(lowering, grad_output, query, key, value, output, lse, **call)


torch.library.impl("fps::attention_backward", "default", lib=_library)(_attention_backward)


@torch.library.register_fake("fps::attention_backward", lib=_library)
def _attention_backward_fake(
    grad_output: torch.Tensor, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    def transposed(x: torch.Tensor) -> torch.Tensor:
        batch, heads, length, width = x.shape
        return x.new_empty(batch, length, heads, width).transpose(1, 2)

    return transposed(query), transposed(key), transposed(value)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    query, key, value, key_mask, phase, grid, published_grid, query_span, key_span, scale, plan, selection = inputs
    out, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(query, key, value, key_mask, out, lse, phase, published_grid, selection)
    ctx.grid, ctx.query_span, ctx.key_span = grid, query_span, key_span
    ctx.scale, ctx.plan = scale, plan


def _autograd(ctx: Any, grad_output: torch.Tensor | None, grad_lse: torch.Tensor | None) -> tuple[Any, ...]:
    nothing = (None,) * 9
    if grad_output is None:
        return (None, None, None, *nothing)
    query, key, value, key_mask, out, lse, phase, published_grid, selection = ctx.saved_tensors
    grads = torch.ops.fps.attention_backward(
        grad_output,
        query,
        key,
        value,
        key_mask,
        out,
        lse,
        phase,
        ctx.grid,
        published_grid,
        ctx.query_span,
        ctx.key_span,
        ctx.scale,
        ctx.plan,
        selection,
    )
    return (*grads, *nothing)


torch.library.register_autograd("fps::attention", _autograd, setup_context=_setup_context, lib=_library)


def _select_tiles(
    query: torch.Tensor,
    key: torch.Tensor,
    key_mask: torch.Tensor | None,
    phase: torch.Tensor,
    grid: Ints,
    published_grid: torch.Tensor | None,
    query_span: Ints,
    key_span: Ints,
    scale: float | None,
    plan: str,
    capacity: int,
) -> torch.Tensor:
    resolved = _resolve(query, key, grid, published_grid, query_span, key_span, plan)
    _check_phases(phase, query.shape[0])
    if query.shape[0] == 0:
        return _select_tiles_fake(query, capacity)
    with _as_given(query.device.type):
        selected = selection_of.select(query, key, phase=phase, resolved=resolved, key_mask=key_mask, scale=scale)
    return selection_of.pack(selected, capacity)


torch.library.impl("fps::select_tiles", "default", lib=_library)(_select_tiles)


@torch.library.register_fake("fps::select_tiles", lib=_library)
def _select_tiles_fake(query: torch.Tensor, *arguments: Any) -> torch.Tensor:
    return query.new_empty(*query.shape[:2], selection_of.packed_bytes(arguments[-1]), dtype=torch.uint8)


def _not_differentiable(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    ctx.mark_non_differentiable(output)


torch.library.register_autograd(
    "fps::select_tiles", lambda ctx, grad: (None,) * 11, setup_context=_not_differentiable, lib=_library
)


def _no_second_order(ctx: Any, *grads: torch.Tensor | None) -> tuple[Any, ...]:
    raise UnsupportedError(
        "fps::attention has no second derivative: differentiate it once, or set FPS_DISABLE=1 for this model"
    )


torch.library.register_autograd("fps::attention_backward", _no_second_order, lib=_library)


def _register_autocast(device_type: str, dispatch_key: str) -> None:
    """``torch.library.register_autocast`` fixes one dtype; SDPA follows the context's."""
    keyset = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, dispatch_key))

    def attention(
        query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *rest: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        dtype = torch.get_autocast_dtype(device_type)
        cast = [x if x.dtype == torch.float64 else x.to(dtype) for x in (query, key, value)]
        with torch._C._ExcludeDispatchKeyGuard(keyset):
            return torch.ops.fps.attention(*cast, *rest)

    _library.impl("attention", attention, dispatch_key)


_register_autocast("cpu", "AutocastCPU")
_register_autocast("cuda", "AutocastCUDA")


def _check_tensors(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, key_mask: torch.Tensor | None) -> None:
    for name, x in (("query", query), ("key", key), ("value", value)):
        if x.dim() != 4:
            raise UnsupportedError(
                f"fps::attention: {name} has shape {tuple(x.shape)}; it must have four dimensions [B, H, L, D]"
            )
        if x.dtype not in DTYPES:
            raise UnsupportedError(
                f"fps::attention: {name} is {x.dtype}; cast it to float32, float64, bfloat16 or float16"
            )
        if x.dtype != query.dtype:
            raise UnsupportedError(
                f"fps::attention: {name} is {x.dtype}, but query is {query.dtype}; cast them to one dtype"
            )
    b, h, _, d = query.shape
    hk, lk = key.shape[1:3]
    if key.shape[0] != b or key.shape[3] != d or value.shape[:3] != key.shape[:3]:
        raise UnsupportedError(
            f"fps::attention: query {tuple(query.shape)}, key {tuple(key.shape)} and value {tuple(value.shape)} do not "
            "fit together; they must be [B, H, Lq, D], [B, Hk, Lk, D] and [B, Hk, Lk, Dv]"
        )
    if hk == 0 or h % hk:
        raise UnsupportedError(
            f"fps::attention: {h} query heads are no multiple of {hk} key heads; "
            "query head h reads key head h // (H // Hk)"
        )
    if key_mask is None:
        return
    shape = tuple(key_mask.shape)
    if len(shape) != 4 or shape[0] not in (1, b) or shape[1] not in (1, h) or shape[2:] != (1, lk):
        raise UnsupportedError(
            f"fps::attention: key_mask has shape {shape}; it must be [{b} or 1, {h} or 1, 1, {lk}]: one value per key, "
            "the same for all queries"
        )
    if key_mask.dtype not in (torch.bool, torch.float32, query.dtype):
        raise UnsupportedError(
            f"fps::attention: key_mask is {key_mask.dtype}; it must be bool, {query.dtype} or torch.float32"
        )


def _resolve(
    query: torch.Tensor,
    key: torch.Tensor,
    grid: Ints,
    published_grid: torch.Tensor | None,
    query_span: Ints,
    key_span: Ints,
    plan: str,
) -> ResolvedPlan:
    """The plan on the grid of this call. An image, one frame, is left dense, as in graphs that show it to be one.

    Raises:
        GridError: no grid, or one that does not fit the spans.
    """
    sizes = _grid(grid, published_grid)
    video = math.prod(sizes)
    for side, x, span in (("query", query, query_span), ("key", key, key_span)):
        start, count = span
        if video != count:
            raise GridError(
                f"grid {sizes} has {video} tokens, but the site's video has {count} in the {side} sequence "
                f"({side}_span ({start}, {count})): publish this call's grid with fpscompile.attach, "
                "or correct options['grid']"
            )
        if start < 0 or start + count > x.shape[2]:
            raise GridError(f"{side}_span ({start}, {count}) is not inside a sequence of {x.shape[2]} tokens")
    where = (query.shape[2], key.shape[2], query_span[0], key_span[0])
    whole = Plan.from_json(plan)
    if published_grid is not None and sizes[0] == 1:
        whole = whole.dense()
    return resolve(whole, sizes, *where, heads=query.shape[1])


def _grid(grid: Ints, published_grid: torch.Tensor | None) -> Grid:
    if published_grid is None:
        if len(grid) != 3 or min(grid) < 1:
            raise GridError(f"grid {tuple(grid)} must be three sizes >= 1: video tokens along (t, h, w)")
        return (grid[0], grid[1], grid[2])
    if tuple(published_grid.shape) != (3,):
        raise GridError(f"published_grid has shape {tuple(published_grid.shape)}; it must be [3]: (t, h, w)")
    t, h, w = published_grid.tolist()
    if min(t, h, w) < 1:
        raise GridError(
            f"no grid is published (published_grid is {(t, h, w)}): run the model inside fpscompile.attach(model), "
            "with grid=(t, h, w) where its inputs do not tell one, or give options['grid']"
        )
    return (t, h, w)


def _arguments(
    query: torch.Tensor,
    key: torch.Tensor,
    key_mask: torch.Tensor | None,
    phase: torch.Tensor,
    resolved: ResolvedPlan,
    scale: float,
    selection: torch.Tensor | None,
    lowering: lowerings.Lowering,
) -> dict[str, Any]:
    """Keyword arguments of a lowering. With tiles chosen by content, each batch element is a phase of its own."""
    if not resolved.dynamic:
        phases = _phases(phase, query.shape[0], len(resolved.windows), lowering)
        return {"key_mask": key_mask, "phases": phases, "resolved": resolved, "scale": scale}
    if not lowerings.takes(lowering.forward, "block_mask"):
        for index in range(len(resolved.windows)):
            resolved.product_window(index)  # raises: this lowering serves no other
    each = _phase_numbers(phase, query.shape[0], len(resolved.windows))
    resolved, mask = selection_of.masks_of_call(selection, query, key, key_mask, each, resolved, scale)
    phases = tuple(range(len(each)))
    return {"key_mask": key_mask, "phases": phases, "resolved": resolved, "scale": scale, "block_mask": mask}


def _of_gradients(resolved: ResolvedPlan) -> lowerings.Lowering:
    """The lowering that computes the gradients of a plan: its own, or gather where that serves no such mask, or does
    not take an output that covers more than its own tiles."""
    lowering = lowerings.get(resolved.plan.lowering)
    if lowerings.gathers_gradients(resolved.plan):
        return lowerings.get("gather")
    if resolved.product or lowerings.takes(lowering.backward, "block_mask"):
        return lowering
    return lowerings.get("gather")


def _phases(
    phase: torch.Tensor, batch: int, count: int, lowering: lowerings.Lowering
) -> tuple[int, ...] | torch.Tensor:
    """One phase per batch element, or the tensor as it is where the lowering reads it on the device."""
    if getattr(lowering, "PHASES_ON_DEVICE", False):
        _check_phases(phase, batch)
        return phase
    return _phase_numbers(phase, batch, count)


def _check_phases(phase: torch.Tensor, batch: int) -> None:
    if phase.numel() == 0 or batch % phase.numel():
        raise UnsupportedError(
            f"fps::attention: {phase.numel()} phases for a batch of {batch}; the batch must be a multiple of their "
            "number"
        )


def _phase_numbers(phase: torch.Tensor, batch: int, count: int) -> tuple[int, ...]:
    """One phase per batch element, read off the device."""
    _check_phases(phase, batch)
    refuse_capture(phase.device, "the denoising phase of this lowering, or of tiles chosen by content,")
    given = phase.reshape(-1).tolist()
    for index in given:
        if not 0 <= index < count:
            raise OptionError(f"phase {index} is out of range: the plan has {count} phases, 0 to {count - 1}")
    return tuple(given[b // (batch // len(given))] for b in range(batch))


__all__ = ["DTYPES", "phase_index"]
