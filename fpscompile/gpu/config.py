"""How fast a GPU kernel is: block sizes, warps and pipeline depth. Results do not depend on it beyond rounding.

:func:`why_invalid` is the one rule for what may be compiled and launched: the search, the defaults and the launch use
it. Its estimates come from compiling the templates for every target: float32 accumulators decide whether registers
spill, operand tiles and their pipeline how much shared memory a program takes.
"""

from __future__ import annotations

from dataclasses import dataclass

from fpscompile.gpu import hopper
from fpscompile.kernel_spec import KernelSpec

SHARED_BYTES = {
    # The most that one program may have (CUDA C++ Programming Guide, "Technical Specifications per Compute Capability";
    # the local data share in AMD's CDNA 3 and 4 instruction set manuals).
    "cuda:80": 163 * 1024,
    "cuda:86": 99 * 1024,
    "cuda:89": 99 * 1024,
    "cuda:90": 227 * 1024,
    "cuda:100": 227 * 1024,
    "cuda:103": 227 * 1024,
    "cuda:120": 99 * 1024,
    "hip:gfx90a": 64 * 1024,
    "hip:gfx942": 64 * 1024,
    "hip:gfx950": 160 * 1024,
}
"""Target to bytes of shared memory; other targets are taken to have the least of all."""

ACCUMULATORS = 128
"""float32 values of scores and output that a thread may accumulate; with 192 every target spills."""

_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class KernelConfig:
    """One way to launch the kernel of a spec."""

    block_m: int
    """Query rows per program; capped by the slots of a tile."""
    num_warps: int
    """Of a program; 4 for "hopper", whose further warps have roles of their own."""
    num_stages: int
    """Depth of the software pipeline over key units; 0: as deep as shared memory allows (hopper only)."""
    variant: str = "triton"
    """"triton", or "hopper": warp-specialized, sm_90a and FP8 only."""


def why_invalid(config: KernelConfig, spec: KernelSpec) -> str | None:
    """Why a config cannot be compiled for a spec or would be refused at the launch; None if it can.

    The reason names the value and its limit. Shared memory is estimated from above, registers by accumulators only.
    """
    rows = rows_of(config, spec)
    if config.variant == "hopper":
        return _why_invalid_hopper(config, spec)
    if config.variant != "triton":
        return f"variant={config.variant!r} is neither 'triton' nor 'hopper'"
    if rows < 16 or rows & (rows - 1):
        return f"block_m={rows} is not a power of two >= 16"
    if config.num_warps not in (1, 2, 4, 8, 16):
        return f"num_warps={config.num_warps} is not one of 1, 2, 4, 8, 16"
    if not 1 <= config.num_stages <= 8:
        return f"num_stages={config.num_stages} is not in 1 to 8"
    if _single(spec) and config.num_stages == 1 and spec.target.startswith("cuda:"):
        return "num_stages=1 holds whole blocks of float32 keys in registers, which would spill"
    held, per_thread = _accumulators(config, spec)
    if held > per_thread:
        return f"{held} float32 accumulators per thread are more than {per_thread}: registers would spill"
    shared, limit = shared_bytes(config, spec), shared_limit(spec.target)
    if shared > limit:
        return f"{shared} bytes of shared memory are more than the {limit} of {spec.target}"
    return None


def rows_of(config: KernelConfig, spec: KernelSpec) -> int:
    """Query rows of a program: the config's, capped by the slots of a tile or by the power of two that divides them."""
    slots = spec.tile_slots
    return min(config.block_m, slots if config.variant == "hopper" else slots & -slots)


def shared_limit(target: str) -> int:
    """Bytes of shared memory that one program may have."""
    return SHARED_BYTES.get(target, min(SHARED_BYTES.values()))


def shared_bytes(config: KernelConfig, spec: KernelSpec) -> int:
    """Bytes of shared memory of one program, estimated from above for the plain kernel's known shapes.

    Tensor cores of sm_90 and sm_100 read both operands from shared memory, where the pipeline therefore keeps two
    tiles of K and V at least; the others take operands through registers, and P makes a round trip where more than one
    warp works on the same rows.
    """
    item = 1 if spec.quant == "fp8" else _BYTES.get(spec.dtype, 8)
    dp, dvp = padded(spec.head_dim), padded(spec.value_dim)
    if config.variant == "hopper":
        stages, consumers = config.num_stages or hopper.FEWEST_STAGES, -(-config.block_m // 64)
        return hopper.shared_bytes(dp, dvp, consumers, stages, _BYTES.get(spec.dtype, 8), spec.block_n)
    rows = rows_of(config, spec)
    q, keys, p = rows * dp * item, spec.block_n * (dp + dvp) * item, rows * spec.block_n * item
    if config.num_stages == 1 and config.variant == "triton":  # nothing is in flight: K and V take turns
        one = spec.block_n * max(dp, dvp) * item
        return max(one, p) if spec.target.startswith("hip:") else q + one + p + 2048
    # A unit's index is loaded a step before its keys, whose tokens (unquantized) before their rows.
    deep = (config.num_stages - 1) // 2
    ahead = 16 if config.num_stages > 3 else 0  # indices that wait in shared memory, with Triton 3.7
    if spec.target in ("cuda:90", "cuda:100", "cuda:103") and not _single(spec):
        buffers = deep + 1 if config.num_stages > 3 else min(config.num_stages, 2)
        exchanged = p if rows < 16 * config.num_warps or spec.target != "cuda:90" else 0
        return q + buffers * keys + exchanged + 2048 + ahead
    small = rows < 128 or rows < 16 * config.num_warps
    if spec.target.startswith("hip:"):
        return (deep + 1 if config.num_stages > 3 else 1) * keys + q + p + ahead
    return q + max(1, deep) * keys + (p if small else 0) + 2048 + ahead


def _accumulators(config: KernelConfig, spec: KernelSpec) -> tuple[int, int]:
    """(float32 accumulators per thread, how many of them do not spill)."""
    lanes = 64 if spec.target.startswith("hip:gfx9") else 32
    columns = spec.block_n + padded(spec.value_dim)
    return rows_of(config, spec) * columns // (lanes * config.num_warps), ACCUMULATORS


def _why_invalid_hopper(config: KernelConfig, spec: KernelSpec) -> str | None:
    slots, consumers = spec.tile_slots, -(-config.block_m // 64)
    dims = padded(spec.head_dim), padded(spec.value_dim)
    reason = hopper.why_not(spec) or hopper.why_not_program(
        slots, max(dims), consumers, config.num_stages or hopper.FEWEST_STAGES
    )
    if reason is not None:
        return f"variant='hopper': {reason}"
    if config.block_m not in (64 * consumers, min(64, slots)):
        return f"variant='hopper' takes multiples of 64 rows or all {slots} of a tile, not block_m={config.block_m}"
    if config.num_warps != 4 or config.num_stages > 8:
        given = f"{config.num_warps} and {config.num_stages}"
        return f"variant='hopper' wants num_warps=4 and num_stages=0 or 3 to 8, not {given}"
    programs = hopper.default_programs(*dims, consumers, _BYTES.get(spec.dtype, 8))
    shared, limit = shared_bytes(config, spec), shared_limit(spec.target) // programs
    if shared > limit:
        return f"{shared} bytes of shared memory are more than {limit}"
    return None


def candidates(spec: KernelSpec) -> tuple[KernelConfig, ...]:
    """All configs worth compiling for a spec, the default first."""
    first = default_config(spec)
    found = [first]
    rows_and_warps = [(m, w) for m in (16, 32, 64, 128) for w in (4, 8) if m <= spec.tile_slots]
    largest = max(m for m, _ in rows_and_warps)
    for rows, warps in rows_and_warps:
        # Fewer rows than 64 only for smaller tiles; warps that share rows exchange P, which only some have to.
        if rows < min(64, largest) or (64 <= rows < 16 * warps and not _wide(spec) and not _crowded(spec)):
            continue
        made = [KernelConfig(rows, warps, stages) for stages in (2, 3, 5)]
        fitting = [config for config in made if why_invalid(config, spec) is None]
        found += fitting or [KernelConfig(rows, warps, 1)]  # one stage hides no load
    found += [KernelConfig(rows, 4, 0, "hopper") for rows in (64, 128, 192)]
    unique = dict.fromkeys(config for config in found if config == first or why_invalid(config, spec) is None)
    return tuple(unique)


def default_config(spec: KernelSpec) -> KernelConfig:
    """The plain kernel's config where nothing has been tuned.

    FP8 on sm_90: two programs of 64 rows share a multiprocessor, and the softmax of one runs under the products of the
    other. Where operands go through registers (sm_80, sm_89), 128 rows spare P a trip through shared memory.
    Unquantized operands fill twice the shared memory, so one program of 128 rows has it to itself. Where that would
    spill (wide heads, float32, columns that differ, Blackwell), fewer rows are shared between more warps.

    Where nothing fits (wide heads of float32), the config returned is invalid: :func:`why_invalid` says why.
    """
    slots, wide = spec.tile_slots, _wide(spec)
    if spec.target.startswith("hip:"):
        warps = 8 if wide and spec.quant == "fp8" else 4
        depths = (1,) if _columns_differ(spec) else (2, 1)  # two stages spill then, from 64 features on
        rows = (32, 16) if wide and spec.quant == "none" else (64, 32, 16)
        choices = [KernelConfig(min(m, slots), warps, stages) for m in rows for stages in depths]
    elif _single(spec):
        choices = [KernelConfig(min(m, slots), 8, stages) for m in (32, 16) for stages in (2, 1)]
    elif not wide and (biased := _biased_rows(spec)):
        # With two stages Triton 3.7 spills 44 bytes on sm_89 at 96 features.
        choices = [KernelConfig(min(biased, slots), 8, 3 if spec.target == "cuda:89" else 2)]
    elif wide or _crowded(spec) or (spec.quant == "none" and spec.target in ("cuda:100", "cuda:103", "cuda:120")):
        choices = [KernelConfig(min(m, slots), 8, stages) for m in (64, 32, 16) for stages in (2, 1)]
    elif spec.quant == "fp8" and (spec.target not in ("cuda:80", "cuda:89") or slots < 128):
        # With three stages on sm_90, a mask at 64 features gives products whose descriptors cannot be followed, and
        # Triton 3.6 spills with small tiles. Two stages have the same buffers: see shared_bytes.
        few = spec.target == "cuda:90" and _columns_differ(spec)
        choices = [KernelConfig(min(64, slots), 4, 2 if few else 3)]
    else:
        # With three stages Triton 3.6 spills 8 bytes on sm_80 at 96 features.
        narrow = spec.target == "cuda:80" and 64 < max(spec.head_dim, spec.value_dim) < 128
        choices = [KernelConfig(128, 8, 2 if narrow else 3) if slots >= 128 else KernelConfig(min(64, slots), 4, 3)]
    return next((choice for choice in choices if why_invalid(choice, spec) is None), choices[-1])


def _crowded(spec: KernelSpec) -> bool:
    """Whether columns that differ, with features padded to 128, leave no registers for 64 rows in four warps.

    Unquantized on sm_90 they leave some at 96 features, where Triton 3.6 spills with eight warps instead.
    """
    few = 96 if spec.quant == "none" and spec.target == "cuda:90" else 64
    return _columns_differ(spec) and max(spec.head_dim, spec.value_dim) > few


def _biased_rows(spec: KernelSpec) -> int | None:
    """Rows that do not spill where a mask meets unquantized operands padded to 128 features; None elsewhere."""
    if spec.quant != "none" or spec.key_mask == "none" or max(spec.head_dim, spec.value_dim) <= 64:
        return None
    return {"cuda:80": 64, "cuda:89": 32, "cuda:100": 32, "cuda:103": 32}.get(spec.target)  # with eight warps


def _columns_differ(spec: KernelSpec) -> bool:
    """Whether the columns of a block differ in scale, bias or tile, which takes registers."""
    if spec.tile_slots < spec.block_n:
        return True
    masked = spec.key_mask != "none" and spec.target not in ("cuda:80", "cuda:89")
    return spec.quant == "fp8" and ("subtile" in spec.granularities or masked)


def _single(spec: KernelSpec) -> bool:
    """Whether products are float32's, which no tensor core makes."""
    return spec.dtype == "float32" and spec.quant == "none"


def _wide(spec: KernelSpec) -> bool:
    return max(spec.head_dim, spec.value_dim) > 128


def padded(dim: int) -> int:
    """Features of a head as kernels hold them: the next power of two, at least 64.

    An FP8 product needs 32; but with rows of 32 bytes ptxas damages the kernel of dq: see
    :mod:`fpscompile.gpu.descriptors`.
    """
    return max(64, 1 << (dim - 1).bit_length())
