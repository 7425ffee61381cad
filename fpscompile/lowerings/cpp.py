"""The generated C++ kernel: near the machine's peak on a CPU, rows gathered while packing and scattered on the way out.

Keys and values are packed once per call into the form that torch's micro-kernels read; then threads take blocks of
query rows. Beyond inputs and outputs a call holds that one packed copy and a few hundred kilobytes per thread. Float32
inputs are computed in float32, bfloat16 in bfloat16 products with float32 sums, float16 in float32.

Gradients come from the boxes lowering, from this kernel's output and log-sum-exp.
"""

from __future__ import annotations

import ctypes
import functools

import torch

from fpscompile import cpp_build
from fpscompile.errors import UnsupportedError
from fpscompile.kernel_spec import KernelSpec
from fpscompile.lowerings import boxes
from fpscompile.lowerings.dense import Triple
from fpscompile.masks import BlockMask
from fpscompile.plan import Plan, ResolvedPlan
from fpscompile.render import COMPUTE, LANES, PANEL, CppConfig, default_config, render, unsupported
from fpscompile.tiling import TileLayout

_POINTERS = (
    *("q", "k", "v", "key_bias", "out", "lse", "k_packed", "v_packed", "slot_bias", "tile_state"),
    *("q_order", "k_order", "k_first", "k_slot", "row_blocks", "kv_num_blocks", "kv_indices", "phases"),
)
_STRIDES = ("q_stride", "k_stride", "v_stride")
_SIZES = (
    *("B", "H", "Hk", "Lq", "Lk"),
    *("bias_batch", "bias_heads", "slots", "k_tiles", "q_tiles", "n_row_blocks", "mask_heads", "capacity", "threads"),
)
MESSAGE_BYTES = 1024


class _Call(ctypes.Structure):
    """The template's ``struct Call``, field by field."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in _POINTERS),
        *((name, ctypes.c_int64 * 4) for name in _STRIDES),
        *((name, ctypes.c_int64) for name in _SIZES),
        ("scale", ctypes.c_double),
    )


def why_not(
    dtype: torch.dtype, head_dim: int, value_dim: int, plan: Plan, device: torch.device | str = "cpu"
) -> str | None:
    """Why this lowering cannot run such a site on this machine, or None: what ``lowering="auto"`` asks."""
    if torch.device(device).type != "cpu":
        return f"it runs on a CPU, and the site is on {torch.device(device).type}"
    spec = KernelSpec(
        "cpu", str(dtype).removeprefix("torch."), head_dim, value_dim, plan.tile, plan.quant, block_n=plan.block_n
    )
    return unsupported(spec) or cpp_build.unavailable(COMPUTE[spec.dtype])


def forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    key_mask: torch.Tensor | None,
    phases: tuple[int, ...],
    resolved: ResolvedPlan,
    scale: float,
    block_mask: BlockMask | None = None,
    config: CppConfig | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention under the plan's block mask; shapes and layouts are in :mod:`fpscompile.lowerings`.

    Args:
        block_mask: instead of the plan's.
        config: instead of the rule's; see :func:`fpscompile.render.default_config`.

    Raises:
        UnsupportedError: a quantized plan, float64, a head dim outside 32 to 256, another device, or a machine that
            cannot build or run the kernel.
    """
    reason = why_not(q.dtype, q.shape[-1], v.shape[-1], resolved.plan, q.device)
    if reason is not None:
        raise UnsupportedError(f"lowering 'cpp': {reason}; choose lowering='boxes' (or 'gather' with quant='fp8')")
    spec = spec_of(q, k, v, key_mask, resolved)
    config = config or default_config(spec)
    kernel = _kernel(spec, config)

    batch, heads, q_length, _ = q.shape
    key_heads, k_length = k.shape[1:3]
    out = q.new_empty(batch, q_length, heads, v.shape[-1])
    lse = q.new_empty(batch, heads, q_length, dtype=torch.float32)
    if out.numel() == 0:
        return out.transpose(1, 2), lse

    mask = (resolved.block_mask if block_mask is None else block_mask).to("cpu")
    queries, keys = _query_table(resolved.q_layout, config.block_m), _key_table(resolved.k_layout)
    bias = _bias(key_mask)
    bias_batch, bias_heads = (1, 1) if bias is None else bias.shape[:2]
    compute = torch.bfloat16 if config.compute == "bfloat16" else torch.float32
    d, d_v = q.shape[-1] + (q.shape[-1] % 2 if compute == torch.bfloat16 else 0), -(-v.shape[-1] // LANES) * LANES
    tensors = {
        "q": q,
        "k": k,
        "v": v,
        "key_bias": bias,
        "out": out,
        "lse": lse,
        "k_packed": q.new_empty(batch, key_heads, keys.slots, d, dtype=compute),
        "v_packed": q.new_empty(batch, key_heads, keys.slots, d_v, dtype=compute),
        "slot_bias": q.new_empty(bias_batch, bias_heads, keys.slots, dtype=torch.float32),
        "tile_state": q.new_empty(bias_batch, bias_heads, resolved.k_layout.n_tiles, dtype=torch.uint8),
        "q_order": resolved.q_layout.order(),
        "k_order": resolved.k_layout.order(),
        "k_first": keys.first,
        "k_slot": keys.slot,
        "row_blocks": queries,
        "kv_num_blocks": mask.kv_num_blocks.contiguous(),
        "kv_indices": mask.kv_indices.contiguous(),
        "phases": torch.tensor(phases, dtype=torch.int64),
    }
    strides = {name: (ctypes.c_int64 * 4)(*x.stride()) for name, x in zip(_STRIDES, (q, k, v), strict=True)}
    sizes = {
        "B": batch,
        "H": heads,
        "Hk": key_heads,
        "Lq": q_length,
        "Lk": k_length,
        "bias_batch": bias_batch,
        "bias_heads": bias_heads,
        "slots": keys.slots,
        "k_tiles": resolved.k_layout.n_tiles,
        "q_tiles": resolved.q_layout.n_tiles,
        "n_row_blocks": len(queries),
        "mask_heads": mask.kv_num_blocks.shape[1],
        "capacity": mask.kv_indices.shape[-1],
        "threads": torch.get_num_threads(),
    }
    pointers = {name: None if x is None else x.data_ptr() for name, x in tensors.items()}
    call = _Call(**pointers, **strides, **sizes, scale=scale)
    message = ctypes.create_string_buffer(MESSAGE_BYTES)
    if kernel(ctypes.byref(call), message, MESSAGE_BYTES):
        raise UnsupportedError(
            f"lowering 'cpp' failed: {message.value.decode(errors='replace')}; choose lowering='boxes'"
        )
    return out.transpose(1, 2), lse


def backward(
    grad_out: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    *,
    key_mask: torch.Tensor | None,
    phases: tuple[int, ...],
    resolved: ResolvedPlan,
    scale: float,
) -> Triple:
    """Gradients by :mod:`fpscompile.lowerings.boxes`."""
    return boxes.backward(grad_out, q, k, v, out, lse, key_mask=key_mask, phases=phases, resolved=resolved, scale=scale)


def spec_of(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, key_mask: torch.Tensor | None, resolved: ResolvedPlan
) -> KernelSpec:
    """The spec of one call."""
    return _spec(
        q.dtype,
        q.shape[-1],
        v.shape[-1],
        resolved.plan,
        "none" if key_mask is None else "bool" if key_mask.dtype == torch.bool else "float",
        q.shape[1] // k.shape[1],
        resolved.q_layout.length > resolved.q_layout.video or resolved.k_layout.length > resolved.k_layout.video,
    )


@functools.lru_cache(maxsize=256)
def _spec(
    dtype: torch.dtype, head_dim: int, value_dim: int, plan: Plan, key_mask: str, group: int, other_tokens: bool
) -> KernelSpec:
    return KernelSpec(
        target="cpu",
        dtype=str(dtype).removeprefix("torch."),
        head_dim=head_dim,
        value_dim=value_dim,
        tile=plan.tile,
        quant=plan.quant,
        granularities=tuple(phase.granularity for phase in plan.phases),
        smooth_k=plan.smooth_k,
        block_n=plan.block_n,
        p_scale=plan.p_scale,
        key_mask=key_mask,
        gqa_group=group,
        other_tokens=other_tokens,
    )


@functools.lru_cache(maxsize=256)
def _kernel(spec: KernelSpec, config: CppConfig):  # type: ignore[no-untyped-def]  # a ctypes function pointer
    library = cpp_build.load(render(spec, config))
    library.fps_call_bytes.restype = ctypes.c_int64
    if library.fps_call_bytes() != ctypes.sizeof(_Call):
        raise UnsupportedError(
            f"the kernel of {spec} expects {library.fps_call_bytes()} bytes of arguments, not {ctypes.sizeof(_Call)}: "
            f"delete {cpp_build.cache_folder()}"
        )
    function = library.fps_attention
    function.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_int64]
    function.restype = ctypes.c_int
    return function


class _KeyTable:
    """Where each key tile lies in the packed copy."""

    def __init__(self, layout: TileLayout) -> None:
        sizes = layout.sizes()
        self.first = torch.cat([torch.zeros(1, dtype=torch.int64), sizes.cumsum(0)])
        """int64 [tiles + 1]: first token, in tile order."""
        starts, at = [], 0
        for size in sizes.tolist():
            slots = -(-size // LANES) * LANES
            if slots >= PANEL:  # whole panels: every product is as wide as it can be
                at = -(-at // PANEL) * PANEL
            starts.append(at)
            at += slots
        self.slot = torch.tensor(starts, dtype=torch.int64)
        """int64 [tiles]: first slot. Tiles shorter than a panel lie back to back, so that neighbours make one run."""
        self.slots = -(-at // PANEL) * PANEL
        """Slots in all, a multiple of PANEL."""


@functools.lru_cache(maxsize=128)
def _key_table(layout: TileLayout) -> _KeyTable:
    return _KeyTable(layout)


@functools.lru_cache(maxsize=128)
def _query_table(layout: TileLayout, block_m: int) -> torch.Tensor:
    """int64 [blocks, 3]: query tile, first token in tile order, rows."""
    blocks, first = [], 0
    for tile, size in enumerate(layout.sizes().tolist()):
        blocks += [(tile, first + start, min(block_m, size - start)) for start in range(0, size, block_m)]
        first += size
    return torch.tensor(blocks, dtype=torch.int64)


def _bias(key_mask: torch.Tensor | None) -> torch.Tensor | None:
    """The key mask as float32 [B | 1, H | 1, 1, Lk], contiguous."""
    if key_mask is None:
        return None
    if key_mask.dtype == torch.bool:
        return torch.zeros(key_mask.shape, dtype=torch.float32).masked_fill_(~key_mask, -torch.inf)
    return key_mask.to(torch.float32).contiguous()
