"""What configs are valid, and that the estimates behind the rule bound what compilation gives."""

from __future__ import annotations

import dataclasses

import pytest

pytest.importorskip("triton")

from fpscompile.gpu import offline
from fpscompile.gpu.compilation import TARGETS
from fpscompile.gpu.config import (
    KernelConfig,
    candidates,
    default_config,
    rows_of,
    shared_bytes,
    shared_limit,
    why_invalid,
)
from fpscompile.kernel_spec import KernelSpec


def spec_of(target="cuda:90", quant="fp8", dim=128, tile=(4, 8, 8), **fields) -> KernelSpec:
    return KernelSpec(
        target=target, dtype="bfloat16", head_dim=dim, value_dim=dim, tile=tile, quant=quant, **fields
    )  # fmt: skip


@pytest.mark.parametrize(
    ("config", "fields", "reason"),
    [
        (KernelConfig(48, 4, 3), {}, "block_m=48 is not a power of two"),
        (KernelConfig(8, 4, 3), {}, "block_m=8 is not a power of two"),
        (KernelConfig(64, 3, 3), {}, "num_warps=3"),
        (KernelConfig(64, 4, 0), {}, "num_stages=0"),
        (KernelConfig(128, 4, 3), {}, "256 float32 accumulators per thread are more than 128"),
        (KernelConfig(64, 4, 3), {"dim": 256}, "192 float32 accumulators"),
        (KernelConfig(64, 8, 3), {"dim": 256, "quant": "none"}, "bytes of shared memory are more than the 232448"),
        (KernelConfig(128, 8, 5), {"target": "cuda:89", "quant": "none"}, "more than the 101376 of cuda:89"),
        (KernelConfig(64, 4, 3, "other"), {}, "variant='other'"),
        (KernelConfig(128, 4, 0, "hopper"), {"quant": "none"}, "FP8 operands, and the spec has quant='none'"),
        (KernelConfig(128, 4, 0, "hopper"), {"target": "cuda:100"}, "for cuda:90 (Hopper), not cuda:100"),
        (KernelConfig(128, 4, 0, "hopper"), {"dim": 256}, "head_dim=256 is above 128"),
        (KernelConfig(128, 4, 0, "hopper"), {"tile": (4, 4, 4)}, "do not divide a tile of 64 slots"),
        (KernelConfig(192, 4, 0, "hopper"), {"tile": (6, 8, 8)}, "no registers for more than 64 features"),
        (KernelConfig(128, 8, 0, "hopper"), {}, "wants num_warps=4"),
        (KernelConfig(128, 4, 2, "hopper"), {}, "needs 3 stages, and 2 were asked for"),
        (KernelConfig(128, 4, 9, "hopper"), {}, "num_stages=0 or 3 to 8, not 4 and 9"),
        (KernelConfig(96, 4, 0, "hopper"), {}, "multiples of 64 rows or all 256 of a tile, not block_m=96"),
        (KernelConfig(128, 4, 7, "hopper"), {}, "bytes of shared memory"),
        (KernelConfig(64, 4, 0, "hopper"), {"tile": (2, 2, 4)}, "tiles of 16 slots are below 32"),
    ],
)
def test_reasons(config: KernelConfig, fields: dict, reason: str) -> None:
    assert reason in str(why_invalid(config, spec_of(**fields)))


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("dim", [32, 64, 96, 128, 256])
@pytest.mark.parametrize("tile", [(2, 4, 4), (4, 4, 4), (4, 8, 8), (6, 8, 8)])
@pytest.mark.parametrize("quant", ["fp8", "none"])
def test_defaults_and_candidates_are_valid(target: str, dim: int, tile: tuple, quant: str) -> None:
    spec = spec_of(target, quant, dim, tile)
    assert why_invalid(default_config(spec), spec) is None
    found = candidates(spec)
    assert found[0] == default_config(spec)
    assert len(set(found)) == len(found)
    assert [config for config in found if why_invalid(config, spec)] == []
    assert any(config.variant == "hopper" for config in found) == (
        target == "cuda:90" and quant == "fp8" and dim <= 128
    )


def test_rows_are_capped_by_the_tile() -> None:
    spec = spec_of(tile=(2, 4, 4))
    assert rows_of(KernelConfig(128, 4, 3), spec) == 32
    assert why_invalid(KernelConfig(128, 4, 3), spec) is None
    assert rows_of(KernelConfig(256, 8, 3), spec_of(tile=(6, 8, 8))) == 128
    assert rows_of(KernelConfig(192, 4, 0, "hopper"), spec_of(tile=(6, 8, 8))) == 192


def test_an_unknown_target_gets_the_least_shared_memory() -> None:
    assert shared_limit("hip:gfx1200") == 64 * 1024
    assert shared_limit("cuda:90") == 227 * 1024


def test_float32_defaults_are_valid_or_say_why_not() -> None:
    """Wide heads of float32 would spill; where they do not fit shared memory either, the lowering declines the site."""
    fits = {(target, 64): True for target in TARGETS}
    fits |= {(target, 256): False for target in TARGETS if target != "hip:gfx950"}
    fits |= {("cuda:80", 128): True, ("cuda:90", 128): True, ("cuda:120", 128): False}
    for (target, dim), expected in fits.items():
        spec = dataclasses.replace(spec_of(target, "none", dim), dtype="float32")
        assert (why_invalid(default_config(spec), spec) is None) == expected, (target, dim)


@pytest.mark.slow
@pytest.mark.parametrize("target", ["cuda:80", "cuda:89", "cuda:90", "cuda:120", "hip:gfx942"])
@pytest.mark.parametrize("dim", [64, 128, 256])
@pytest.mark.parametrize("quant", ["fp8", "none"])
def test_shared_memory_is_not_underestimated(target: str, dim: int, quant: str) -> None:
    if (target, quant) == ("cuda:80", "fp8"):
        pytest.skip("no FP8 tensor cores")
    spec = spec_of(target, quant, dim)
    for config in candidates(spec):
        report = offline.compile_forward(spec, config, allow_flaws=True)
        assert report.shared_bytes <= shared_limit(target), config
        if config.variant == "triton":
            assert report.shared_bytes <= shared_bytes(config, spec) <= 2.5 * report.shared_bytes, config
