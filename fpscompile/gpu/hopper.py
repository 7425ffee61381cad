"""The host's side of the Hopper kernel, ``templates/triton/attention_hopper.py``: what it can run, and its launch."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch

from fpscompile.kernel_spec import KernelSpec

if TYPE_CHECKING:
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

AGAIN_BLOCKS = 32
"""Blocks of queries that one program of the second launch looks at."""

DIMS = (32, 64, 128)
"""Padded head dims that run: a key's row must fit the 128 bytes of a swizzle, an accumulator the registers."""

SHARED_BYTES = 228 * 1024
"""Shared memory of a multiprocessor."""

DRIVER_BYTES = 1024
"""Of it, what the driver takes for each program."""

BARRIER_BYTES = 1024

REGISTERS = 65536

FEWEST_STAGES = 3
"""A consumer waits for the keys of the next block before it frees those of the last."""


def why_not(spec: KernelSpec) -> str | None:
    """Why the kernel cannot run a spec, or None."""
    if spec.target != "cuda:90":
        return f"it is for cuda:90 (Hopper), not {spec.target}"
    if spec.quant != "fp8":
        return f"it multiplies FP8 operands, and the spec has quant={spec.quant!r}"
    if spec.backward:
        return "it computes the forward pass only"
    for name in ("head_dim", "value_dim"):
        if getattr(spec, name) > max(DIMS):
            return f"{name}={getattr(spec, name)} is above {max(DIMS)}"
    return _why_not_slots(spec.tile_slots, spec.block_n)


def _why_not_slots(slots: int, block_n: int) -> str | None:
    """Why tiles of ``slots`` slots cannot run in blocks of ``block_n`` keys, or None."""
    if block_n != 128:
        return f"it takes keys in blocks of 128, not {block_n}"
    if slots < 32:
        return f"tiles of {slots} slots are below 32, the depth of an FP8 product"
    if slots % 128 and slots not in (32, 64):
        return f"tiles of {slots} slots are neither 32, 64 nor a multiple of 128"
    return None


def default_consumers(slots: int) -> int:
    """Consumers of a program where nothing has been tuned: a program's ``64 * consumers`` rows are of one tile.

    Tiles of 128 slots and more: two, which share every K and V tile. Smaller ones: one, and two programs on a
    multiprocessor, since no two tiles see the same keys.
    """
    return 2 if slots >= 128 else 1


def shared_bytes(dp: int, dvp: int, consumers: int, stages: int, item: int = 2, block_n: int = 128) -> int:
    """Shared memory of a program: its queries, rows of the output, both rings and the barriers.

    Args:
        item: bytes of an element of the output, whose rows change threads through shared memory.
    """
    rows = 64 * consumers * (dp + (128 if item <= 2 else dvp * item))
    return rows + stages * block_n * (dp + dvp) + BARRIER_BYTES


def default_stages(dp: int, dvp: int, consumers: int, programs: int, item: int = 2, block_n: int = 128) -> int:
    """The deepest rings, up to 4, with which ``programs`` programs fit a multiprocessor.

    >>> default_stages(128, 128, consumers=2, programs=1), default_stages(128, 128, consumers=1, programs=2)
    (4, 3)
    """
    room = SHARED_BYTES // programs - DRIVER_BYTES - shared_bytes(dp, dvp, consumers, 0, item, block_n)
    return min(4, room // (block_n * (dp + dvp)))


def default_programs(dp: int, dvp: int, consumers: int, item: int = 2, block_n: int = 128) -> int:
    """Programs that share a multiprocessor where nothing has been tuned; arguments as of :func:`default_stages`."""
    if consumers > 1 or default_stages(dp, dvp, consumers, 2, item, block_n) < FEWEST_STAGES:
        return 1
    return 2


def alignment(out: torch.Tensor) -> int:
    """Elements, a power of two of at most 16 bytes, that divide all that a row of ``out`` may start or end at."""
    size = out.element_size()
    found = math.gcd(16 // size, out.shape[-1], *out.stride()[:-1])
    while out.data_ptr() % (found * size):
        found //= 2
    return found


def descriptor(x: torch.Tensor, rows: int, columns: int) -> TensorDescriptor:
    """TMA descriptor of the 2-D tensor ``x`` for boxes of [rows, columns], one row of which fills the swizzle."""
    width = columns * x.element_size()
    if width not in (32, 64, 128):
        raise ValueError(f"a box's rows must have 32, 64 or 128 bytes, not {width}")
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    layout = gl.NVMMASharedLayout(swizzle_byte_width=width, element_bitwidth=8 * x.element_size(), rank=2)
    return TensorDescriptor.from_tensor(x, [rows, columns], layout)


def launch(
    kernel: Any,
    packed: Any,
    tables: Any,
    q_blocks: torch.Tensor,
    phase: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    scale: float,
    *,
    bias: Any = None,
    block_n: int = 128,
    p_shift: float = 8,
    padding: int | None = None,
    consumers: int | None = None,
    programs: int | None = None,
    stages: int | None = None,
    overlap: bool | None = None,
    consumer_regs: int | None = None,
    producer_regs: int = 24,
) -> list[Any]:
    """Fill ``out`` and ``lse`` on the current stream; no host sync.

    Without a bias, two launches: the second repeats, block by block and with every row's maximum, what the first could
    not hold in float32, and returns at once where there is nothing to repeat.

    Args:
        kernel: the template's module.
        packed: FP8 operands, an object with (all contiguous, on one device)
            q e4m3 [B, H, q_slots, DP], k e4m3 [B, Hk, k_slots, DP], v e4m3 [B, Hk, DVP, k_slots] (permuted in groups
            of 16 slots), q_scale f32 [B, H, q_tiles, runs], k_scale f32 [B, Hk, k_tiles, runs] (runs: 1, or one for
            each 32 slots), v_scale f32 [B, Hk, DVP], v_mean f32 [B, Hk, DVP] or None, lse_shift f32 [B, H, q_slots]
            or None.
        tables: an object with slots (of a tile), unit, q_token int32 [q_slots], and keys, an object with
            count int32 [phases, 1 | H, q_tiles], index int32 [phases, 1 | H, q_tiles, capacity], valid int32 [units].
        q_blocks: int32 [n, 3]: (query tile, first slot, tokens) of every block of min(64 * consumers, slots) slots that
            has a token. Its tokens are its first slots.
        phase: int32 [n]; batch element b is in phase[b // (B // n)].
        out: [B, Lq, H, DV], last axis contiguous; fastest where DV and the other strides are multiples of 16 bytes.
            Rows of tokens that no block names are left alone.
        lse: f32 [B, H, Lq], contiguous.
        scale: positive factor on the scores.
        bias: a key bias, an object with bias f32 [B | 1, H | 1, k_slots], added to the scaled scores and -inf in
            padding, and state u8 [B | 1, H | 1, units], 0 where a unit's bias is all zeros and 1 elsewhere; both
            contiguous. Or None.
        block_n: key slots per rounding block of P: 128.
        p_shift: log2 of the factor on P.
        padding: no listed unit has more slots without a token than this; by default any number. 0 leaves the mask out,
            and up to 16 it is cheap.
        consumers: 64 rows each; 3 need up to 64 features, and tiles whose slots divide by 192.
        programs: that share a multiprocessor; by default as many as have FEWEST_STAGES each.
        stages: slots in each of the rings of K and V, at least FEWEST_STAGES.
        overlap: see the template's text. By default products overlap the softmax wherever registers suffice. No
            argument from ``consumers`` on changes a result.
        consumer_regs, producer_regs: registers per thread. The first consumer gets what the others leave.

    Returns:
        The compiled kernels.

    Raises:
        ValueError: operands that this kernel cannot run.
    """
    batch, heads, q_slots, dp = packed.q.shape
    key_heads, dvp, k_slots = packed.v.shape[1:]
    slots, unit, runs = tables.slots, tables.unit, packed.q_scale.shape[-1]
    consumers = consumers or default_consumers(slots)
    item = out.element_size()
    programs = programs or default_programs(dp, dvp, consumers, item, block_n)
    stages = stages or default_stages(dp, dvp, consumers, programs, item, block_n)
    reason = (
        _why_not_slots(slots, block_n)
        or _why_not_operands(packed, tables, out, block_n)
        or _misfit(packed, tables, q_blocks, out, lse, bias)
        or why_not_program(slots, max(dp, dvp), consumers, stages)
    )
    if reason is not None:
        raise ValueError(f"the Hopper kernel cannot run this: {reason}")
    if overlap is None:
        overlap = bias is None or runs == 1 or unit == block_n
    padded = block_n if padding is None or padding > 16 else 16 if padding else 0
    if consumer_regs is None:
        consumer_regs = {1: 232, 2: 240, 3: 160}[consumers]
    # Registers at the start, before the roles trade them; one program takes all there are by itself.
    limits = {} if programs == 1 else {"maxnreg": REGISTERS // (programs * 128 * (consumers + 1)) // 8 * 8}
    q_desc = descriptor(packed.q.view(-1, dp), 64, dp)
    k_desc = descriptor(packed.k.view(-1, dp), unit, dp)
    v_desc = descriptor(packed.v.view(-1, k_slots), dvp, unit)
    align = alignment(out)
    biases: tuple[Any, ...] = (None, None, 0, 0, 0, 0)
    if bias is not None:
        biases = (bias.bias, bias.state, *(n // 32 for n in _strides(bias.bias)), *_strides(bias.state))
    keys = tables.keys
    blocks = q_blocks.shape[0]
    lazy = bias is None
    arguments = (
        q_desc, k_desc, v_desc, out, lse, packed.q_scale, packed.k_scale, packed.v_scale, packed.v_mean,
        packed.lse_shift,
        *biases, keys.count, keys.index, keys.valid, q_blocks, tables.q_token, phase,
        heads, out.shape[1], q_slots, k_slots, packed.q_scale.shape[2], packed.k_scale.shape[2], keys.count.shape[1],
        keys.index.shape[-1], keys.count.shape[0], batch // phase.numel(), scale,
        out.stride(0) // align, out.stride(2) // align, out.stride(1) // align, blocks,
    )  # fmt: skip
    options = dict(
        GROUP=heads // key_heads, BLOCK_N=block_n, UNIT=unit, TILE=slots, RUNS=runs, DP=dp, DVP=dvp,
        DV=out.shape[-1], ALIGN=align, P_SHIFT=p_shift, PADDED=padded, CONSUMERS=consumers, STAGES=stages,
        CONSUMER_REGS=consumer_regs, PRODUCER_REGS=producer_regs, num_warps=4, **limits,
    )  # fmt: skip
    forward = kernel.attention_forward
    compiled = [forward[blocks, heads, batch](*arguments, **options, OVERLAP=overlap, LAZY=lazy, AGAIN=0)]
    if lazy:
        grid = (-(-blocks // AGAIN_BLOCKS), heads, batch)
        compiled.append(forward[grid](*arguments, **options, OVERLAP=False, LAZY=False, AGAIN=AGAIN_BLOCKS))
    return compiled


def _why_not_operands(packed: Any, tables: Any, out: torch.Tensor, block_n: int) -> str | None:
    """Why operands of these shapes cannot run, or None."""
    unit, runs = min(tables.slots, block_n), (1, tables.slots // 32)
    given = (packed.q_scale.shape[-1], packed.k_scale.shape[-1])
    if packed.q.shape[-1] not in DIMS or packed.v.shape[2] not in DIMS:
        return f"padded head dims {packed.q.shape[-1]} and {packed.v.shape[2]} must be in {DIMS}"
    if tables.unit != unit:
        return f"units of {tables.unit} slots, not {unit}"
    if given[0] not in runs or given[0] != given[1]:
        return f"{given[0]} and {given[1]} scales per tile of queries and of keys, not {runs[0]} or {runs[1]} of both"
    if max(packed.q.shape[:3].numel(), packed.k.shape[:3].numel()) >= 2**31:
        return "more than 2^31 rows: beyond a TMA coordinate"
    if out.stride(-1) != 1:
        return "the output's last axis is not contiguous"
    return None


def _misfit(
    packed: Any, tables: Any, q_blocks: torch.Tensor, out: torch.Tensor, lse: torch.Tensor, bias: Any
) -> str | None:
    """A tensor that the kernel would read or write beyond its end, or None."""
    batch, heads, q_slots, dp = packed.q.shape
    key_heads, dvp, k_slots = packed.v.shape[1:]
    keys, length = tables.keys, out.shape[1]
    q_tiles, k_tiles, runs = q_slots // tables.slots, k_slots // tables.slots, packed.q_scale.shape[-1]
    units = k_slots // tables.unit
    wanted = {
        "packed.k": (packed.k, (batch, key_heads, k_slots, dp)),
        "packed.q_scale": (packed.q_scale, (batch, heads, q_tiles, runs)),
        "packed.k_scale": (packed.k_scale, (batch, key_heads, k_tiles, runs)),
        "packed.v_scale": (packed.v_scale, (batch, key_heads, dvp)),
        "packed.v_mean": (packed.v_mean, (batch, key_heads, dvp)),
        "packed.lse_shift": (packed.lse_shift, (batch, heads, q_slots)),
        "tables.q_token": (tables.q_token, (q_slots,)),
        "tables.keys.count": (keys.count, (*keys.count.shape[:2], q_tiles)),
        "tables.keys.index": (keys.index, (*keys.count.shape, keys.index.shape[-1])),
        "tables.keys.valid": (keys.valid, (units,)),
        "q_blocks": (q_blocks, (q_blocks.shape[0], 3)),
        "out": (out, (batch, length, heads, out.shape[-1])),
        "lse": (lse, (batch, heads, length)),
    }
    if bias is not None:
        wanted["bias.bias"] = (bias.bias, (*bias.bias.shape[:2], k_slots))
        wanted["bias.state"] = (bias.state, (*bias.state.shape[:2], units))
    for name, (x, shape) in wanted.items():
        if x is not None and (tuple(x.shape) != shape or (x is not out and not x.is_contiguous())):
            return f"{name} has shape {list(x.shape)} and strides {list(x.stride())}, not {list(shape)}, contiguous"
    if q_slots % tables.slots or k_slots % tables.slots:
        return f"{q_slots} and {k_slots} slots are not whole tiles of {tables.slots}"
    if out.shape[-1] > dvp:
        return f"{out.shape[-1]} features of the output, and V has {dvp}"
    if keys.count.shape[1] not in (1, heads):
        return f"lists of units for {keys.count.shape[1]} heads, not 1 or {heads}"
    return None


def why_not_program(slots: int, dim: int, consumers: int, stages: int) -> str | None:
    """Why programs of this make cannot run, or None."""
    if not 1 <= consumers <= 3:
        return f"{consumers} consumers, not 1 to 3"
    if slots % (64 * consumers) and (slots > 64 or consumers > 1):
        return f"{consumers} consumers of 64 rows do not divide a tile of {slots} slots"
    if consumers == 3 and dim > 64:
        return "three consumers have no registers for more than 64 features"
    if stages < FEWEST_STAGES:
        return f"it needs {FEWEST_STAGES} stages, and {stages} were asked for or fit the shared memory"
    return None


def _strides(x: torch.Tensor) -> tuple[int, int]:
    """Strides of a batch and a head axis that repeat where they have length 1."""
    return (x.stride(0) if x.shape[0] > 1 else 0, x.stride(1) if x.shape[1] > 1 else 0)
