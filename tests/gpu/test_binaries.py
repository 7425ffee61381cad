"""What the templates become on every target: no spills, the right tensor cores, no detours, counts that stay put.

The counts of the main loops are stored in ``goldens/binaries_<triton version>.json``. After a change that is meant to
move them::

    FPS_REFRESH_GOLDENS=1 pytest tests/gpu/test_binaries.py tests/gpu/test_training_binaries.py -m "slow or not slow"

rewrites the file (without -n: workers would overwrite one another); the difference belongs to the change's review.
"""

from __future__ import annotations

import functools
import math

import pytest
import torch

pytest.importorskip("triton")

from binary_facts import COUNTS, check_golden, check_products, narrow_products, summary

from fpscompile.gpu import binary, offline
from fpscompile.gpu.compilation import Artifacts
from fpscompile.gpu.config import KernelConfig, default_config, shared_limit
from fpscompile.kernel_spec import KernelSpec
from fpscompile.lowerings.triton import config_of

FP8_TARGETS = ("cuda:89", "cuda:90", "cuda:100", "cuda:120", "hip:gfx942", "hip:gfx950")
HOPPER = KernelConfig(128, 4, 0, "hopper")


def spec_of(target: str, quant: str = "fp8", dim: int = 128, tile=(4, 8, 8), **fields) -> KernelSpec:
    return KernelSpec(target=target, dtype="bfloat16", head_dim=dim, value_dim=dim, tile=tile, quant=quant, **fields)


@functools.lru_cache(maxsize=64)
def artifacts_of(spec: KernelSpec, config: KernelConfig, launch: int = 0) -> Artifacts:
    return offline.forward_artifacts(spec, config, launch)


@functools.lru_cache(maxsize=64)
def report_of(spec: KernelSpec, config: KernelConfig, launch: int = 0) -> binary.BinaryReport:
    """Raises where ptxas serialized matrix products."""
    return binary.inspect_artifacts(artifacts_of(spec, config, launch))


def check_resources(spec: KernelSpec, config: KernelConfig, launch: int = 0) -> binary.BinaryReport:
    report = report_of(spec, config, launch)
    assert report.unfollowed == 0
    assert report.spill_bytes == 0
    assert report.stack_bytes == 0
    assert report.shared_bytes <= shared_limit(spec.target)
    return report


@pytest.mark.parametrize("target", FP8_TARGETS)
def test_fp8_defaults_do_not_spill_and_use_fp8_tensor_cores(target: str) -> None:
    spec = spec_of(target)
    report = check_resources(spec, default_config(spec))
    wanted = {"cuda:90": "QGMMA", "cuda:100": "UTCQMMA"}.get(target, "QMMA" if "cuda" in target else "v_mfma")
    assert report.main_loop.tensor
    for name in report.main_loop.tensor:
        assert name.startswith(wanted)
        if target != "cuda:100":
            assert any(word in name for word in ("E4M3.E4M3", "fp8_fp8", "f8f6f4"))
    assert not {"HMMA", "HGMMA", "UTCHMMA"} & set(report.opcodes)


@pytest.mark.parametrize("target", ["cuda:80", "cuda:90"])
def test_unquantized_defaults_do_not_spill(target: str) -> None:
    spec = spec_of(target, "none")
    report = check_resources(spec, default_config(spec))
    assert all("BF16" in name for name in report.main_loop.tensor)


KINDS = {
    "tile": {},
    "subtile": {"granularities": ("subtile", "tile")},
    "masked": {"key_mask": "float"},
    "subtile masked": {"granularities": ("subtile", "tile"), "key_mask": "float"},
    "subtile smooth_v": {"granularities": ("subtile", "tile"), "smooth_v": True},
    "none": {"quant": "none"},
    "none masked": {"quant": "none", "key_mask": "float"},
}


@pytest.mark.parametrize(
    ("target", "dim", "tile", "kind"),
    [
        ("hip:gfx942", 96, (4, 4, 4), "subtile masked"),
        ("hip:gfx942", 96, (4, 8, 8), "subtile masked"),
        ("hip:gfx950", 64, (4, 4, 4), "subtile"),
        ("hip:gfx950", 64, (4, 4, 4), "none masked"),
        ("cuda:90", 64, (2, 4, 4), "subtile smooth_v"),
        ("cuda:90", 64, (4, 8, 8), "masked"),
        ("cuda:89", 96, (4, 8, 8), "subtile"),
        ("cuda:100", 96, (4, 8, 8), "subtile"),
    ],
    ids=str,
)
def test_defaults_that_need_fewer_stages_or_more_warps_do_not_spill(
    target: str, dim: int, tile: tuple[int, int, int], kind: str
) -> None:
    """Each spilled, or had products that could not be followed, with one stage more or four warps, on Triton 3.6 or
    3.7.1."""
    spec = spec_of(target, dim=dim, tile=tile, **KINDS[kind])
    check_resources(spec, default_config(spec))


@pytest.mark.slow
@pytest.mark.parametrize("target", ["cuda:80", *FP8_TARGETS])
@pytest.mark.parametrize("dim", [64, 96, 128])
@pytest.mark.parametrize("tile", [(4, 4, 4), (4, 8, 8)], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_no_default_spills(target: str, dim: int, tile: tuple[int, int, int], kind: str) -> None:
    if target == "cuda:80" and KINDS[kind].get("quant") != "none":
        pytest.skip("no FP8 tensor cores")
    spec = spec_of(target, dim=dim, tile=tile, **KINDS[kind])
    check_resources(spec, default_config(spec))


@pytest.mark.slow
@pytest.mark.parametrize("dim", [64, 96, 128])
@pytest.mark.parametrize("tile", [(2, 4, 4), (4, 4, 4), (4, 8, 8), (6, 8, 8)], ids=str)
@pytest.mark.parametrize("kind", [kind for kind in KINDS if KINDS[kind].get("quant") != "none"])
def test_no_default_of_the_hopper_kernel_spills(dim: int, tile: tuple[int, int, int], kind: str) -> None:
    """What is taken on an H100 where nothing has been tuned."""
    spec = spec_of("cuda:90", dim=dim, tile=tile, **KINDS[kind])
    config = config_of(spec, torch.device("cuda"))
    assert config.variant == "hopper"
    check_resources(spec, config)
    if spec.key_mask == "none":
        report_of(spec, config, launch=1)  # seldom does anything: it may spill


def test_hopper_main_loop() -> None:
    """Per block of keys and warpgroup: two FP8 products, P straight from registers to tensor cores."""
    spec = spec_of("cuda:90")
    report = check_resources(spec, HOPPER)
    loop = report.main_loop
    assert loop.tensor == {"QGMMA.64x128x32.F32.E4M3.E4M3": 8}
    assert loop.flops == 2 * 2 * 64 * 128 * 128 // 4
    assert "HGMMA" not in report.opcodes
    for detour in ("shared_load", "shared_store", "local"):
        assert loop.every.get(detour, 0) == 0, detour
    assert loop.every["permute"] == 16  # two pairs of weights into a register
    # No row's maximum is looked for; four lanes confer, and weights are multiplied, where some leave E4M3.
    for rare in ("shuffle", "minmax"):
        assert loop.every.get(rare, 0) == 0, rare
        assert loop.some[rare] == 4, rare
    assert loop.some["float"] == 64
    assert loop.some["select"] > 64  # most blocks have no padding to be masked


def test_hopper_main_loop_where_tiles_divide_the_grid() -> None:
    """Four slots of 128 are empty: few scores are masked in every block, and no other work is conditional."""
    loop = check_resources(spec_of("cuda:90", tile=(7, 9, 4)), HOPPER).main_loop
    assert loop.every["select"] == 8 + 2
    assert loop.some["select"] == 4
    assert loop.every["mufu"] == 64


@pytest.mark.parametrize(
    ("tile", "dim", "granularities"), [((4, 4, 4), 128, ("tile",)), ((2, 4, 4), 64, ("tile", "subtile"))], ids=str
)
def test_hopper_main_loop_of_small_tiles(tile: tuple[int, int, int], dim: int, granularities) -> None:
    """Several tiles of keys to a block, each with a scale of its own, or several."""
    spec = spec_of("cuda:90", dim=dim, tile=tile, granularities=granularities)
    loop = check_resources(spec, KernelConfig(math.prod(tile), 4, 0, "hopper")).main_loop
    assert loop.every["mufu"] == 64
    assert "minmax" not in loop.every
    assert report_of(spec, KernelConfig(math.prod(tile), 4, 0, "hopper"), launch=1).main_loop.every["mufu"] == 64 + 2


def test_hopper_main_loop_with_every_maximum() -> None:
    """What does again a block of queries whose scores outgrew float32, and what a mask takes."""
    loop = check_resources(spec_of("cuda:90", tile=(7, 9, 4)), HOPPER, launch=1).main_loop
    assert loop.every["shuffle"] == 4  # the rows' maxima, across the four lanes that hold a row
    assert loop.every["minmax"] == 68
    assert loop.every["mufu"] == 64 + 2
    masked = check_resources(spec_of("cuda:90", tile=(7, 9, 4), key_mask="bool"), HOPPER).main_loop
    assert masked.every["shuffle"] == 4


@pytest.mark.parametrize("config", [default_config(spec_of("cuda:90")), KernelConfig(128, 8, 3)], ids=str)
def test_plain_main_loop_on_sm90(config: KernelConfig) -> None:
    loop = report_of(spec_of("cuda:90"), config).main_loop
    assert loop.tensor == {"QGMMA.64x128x32.F32.E4M3.E4M3": 8}
    # P stays in registers: nothing is stored to shared memory, no lane gives a weight to another, no byte moves.
    for detour in ("shared_store", "local", "permute"):
        assert loop.every.get(detour, 0) == 0, detour
    assert loop.every["shuffle"] <= 8
    # one exponential per weight and one per row, two conversions per instruction, and maxima are rounded up
    assert loop.every["mufu"] == 64 + 2
    assert loop.every["convert"] == 64 // 2 + 2


GOLDEN_CASES = {
    "cuda:80 bf16": (spec_of("cuda:80", "none"), None),
    "cuda:89 fp8": (spec_of("cuda:89"), None),
    "cuda:90 fp8": (spec_of("cuda:90"), None),
    "cuda:90 fp8 hopper": (spec_of("cuda:90"), HOPPER),
    "cuda:90 bf16": (spec_of("cuda:90", "none"), None),
    "cuda:100 fp8": (spec_of("cuda:100"), None),
    "cuda:120 fp8": (spec_of("cuda:120"), None),
    "hip:gfx942 fp8": (spec_of("hip:gfx942"), None),
}


@pytest.mark.parametrize("case", GOLDEN_CASES)
def test_counts_are_those_of_the_golden_table(case: str) -> None:
    spec, config = GOLDEN_CASES[case]
    config = config or default_config(spec)
    rows = min(config.block_m, spec.tile_slots) / (config.num_warps if config.variant == "triton" else 8)
    check_golden(case, {"config": str(config)} | summary(report_of(spec, config), rows, spec.block_n))


@pytest.mark.parametrize("quant", ["fp8", "none"])
@pytest.mark.parametrize("mask", ["none", "float"])
@pytest.mark.parametrize(("tile", "slots", "dim"), [((4, 8, 8), 256, 64), ((4, 4, 4), 64, 128)], ids=str)
def test_products_that_may_pass_two_to_the_31_are_64_bits_wide(quant: str, mask: str, tile, slots, dim) -> None:
    """Tensors may have more than 2^31 elements."""
    spec = spec_of("cuda:90", quant, dim=dim, tile=tile, key_mask=mask)
    text = artifacts_of(spec, default_config(spec)).texts["ttir"]
    check_products(text, slots, min(slots, 128))


def test_products_of_the_hopper_kernel() -> None:
    """A row of K is a TMA coordinate, 32 bits wide; its launch refuses operands of 2^31 rows."""
    text = artifacts_of(spec_of("cuda:90", dim=64), HOPPER).texts["ttgir"]
    found = [factors for factors in narrow_products(text) if not {"q_slots", "k_slots"} & set(factors)]
    assert found
    for factors in found:
        assert all(factor in COUNTS or factor in ("", "1", "3", "64", "128") for factor in factors), factors


def test_a_narrow_product_is_found() -> None:
    text = """
    tt.func public @f(%q_ptr: !tt.ptr<bf16> loc(#a), %q_sl: i32 loc(#b)) {
    %c64_i32 = arith.constant 64 : i32 loc(#c)
    %0 = tt.get_program_id x : i32 loc(#d)
    %1 = arith.muli %0, %q_sl : i32 loc(#e)
    %2 = arith.muli %0, %c64_i32 : i32 loc(#f)
    %3 = arith.extsi %0 : i32 to i64 loc(#g)
    %4 = arith.extsi %q_sl : i32 to i64 loc(#g)
    %5 = arith.muli %3, %4 : i64 loc(#h)
    %6 = tt.splat %q_sl : i32 -> tensor<8xi32> loc(#i)
    %7 = arith.muli %7, %6 : tensor<8xi32> loc(#j)
    """
    assert narrow_products(text) == [("", "q_sl"), ("", "64"), ("", "q_sl")]
