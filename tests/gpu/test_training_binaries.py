"""What the backward and the pre-pass become on every target: no spills, FP8 scores, 64-bit offsets, steady counts.

The golden table is that of ``test_binaries.py``, which says how to refresh it.
"""

from __future__ import annotations

import functools

import pytest

pytest.importorskip("triton")

from binary_facts import check_golden, check_products, summary

from fpscompile.gpu import binary, gradients, offline
from fpscompile.gpu.compilation import TARGETS, Artifacts
from fpscompile.gpu.config import KernelConfig, default_config, shared_limit, why_invalid
from fpscompile.kernel_spec import KernelSpec

KINDS = {
    "tile": {},
    "subtile": {"granularities": ("subtile", "tile")},
    "masked": {"key_mask": "float"},
    "gqa": {"gqa_group": 2},
}


def spec_of(target: str, quant: str, dim: int = 128, tile=(4, 8, 8), **fields) -> KernelSpec:
    dtype = fields.pop("dtype", "bfloat16")
    return KernelSpec(target=target, dtype=dtype, head_dim=dim, value_dim=dim, tile=tile, quant=quant, **fields)


@functools.lru_cache(maxsize=64)
def gradients_of(spec: KernelSpec) -> dict[str, Artifacts]:
    return offline.gradient_artifacts(spec)


@functools.lru_cache(maxsize=64)
def reports_of(spec: KernelSpec) -> dict[str, binary.BinaryReport]:
    """Raises where ptxas serialized or damaged matrix products."""
    return {name: binary.inspect_artifacts(artifacts) for name, artifacts in gradients_of(spec).items()}


def check_resources(spec: KernelSpec) -> dict[str, binary.BinaryReport]:
    reports = reports_of(spec)
    for name, report in reports.items():
        assert report.spill_bytes == 0, name
        assert report.stack_bytes == 0, name
        assert report.shared_bytes <= shared_limit(spec.target), name
    return reports


GOLDEN_CASES = {
    "cuda:80 bf16": spec_of("cuda:80", "none"),
    "cuda:89 fp8": spec_of("cuda:89", "fp8"),
    "cuda:90 fp8": spec_of("cuda:90", "fp8"),
    "cuda:90 bf16": spec_of("cuda:90", "none"),
    "cuda:100 fp8": spec_of("cuda:100", "fp8"),
    "cuda:120 fp8": spec_of("cuda:120", "fp8"),
    "hip:gfx942 fp8": spec_of("hip:gfx942", "fp8"),
}


@pytest.mark.parametrize("case", GOLDEN_CASES)
def test_counts_are_those_of_the_golden_table(case: str) -> None:
    spec = GOLDEN_CASES[case]
    config = gradients.default_config(spec)
    reports = check_resources(spec)
    assert set(reports) == {"query_gradients", "key_gradients"} | ({"pack_gradients"} if spec.quant == "fp8" else set())
    for name, rows, columns, warps in (
        ("query_gradients", config.dq_rows, config.dq_keys, config.dq_warps),
        ("key_gradients", config.dk_keys, config.dk_rows, config.dk_warps),
    ):
        check_golden(f"{case} {name}", {"config": str(config)} | summary(reports[name], rows / warps, columns))


@pytest.mark.parametrize("target", ["cuda:89", "cuda:90", "cuda:100", "cuda:120", "hip:gfx942"])
def test_scores_are_fp8_products(target: str) -> None:
    """Those of the forward, exactly: only they are; all other products take bfloat16."""
    words = {"cuda:89": "QMMA", "cuda:90": "QGMMA", "cuda:100": "UTCQMMA", "cuda:120": "QMMA", "hip:gfx942": "fp8_fp8"}
    reports = reports_of(spec_of(target, "fp8"))
    for name in ("query_gradients", "key_gradients"):
        assert any(words[target] in opcode for opcode in reports[name].main_loop.tensor), name


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("dim", [64, 96, 128])
@pytest.mark.parametrize("tile", [(4, 4, 4), (4, 8, 8)], ids=str)
@pytest.mark.parametrize("quant", ["fp8", "none"])
@pytest.mark.parametrize("kind", KINDS)
def test_no_default_spills(target: str, dim: int, tile: tuple[int, int, int], quant: str, kind: str) -> None:
    if quant == "fp8" and target == "cuda:80":
        pytest.skip("no FP8 tensor cores")
    if quant == "none" and kind == "subtile":
        pytest.skip("without FP8 there are no scales")
    check_resources(spec_of(target, quant, dim, tile, **KINDS[kind]))


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("quant", ["fp8", "none"])
def test_no_default_spills_with_256_features(target: str, quant: str) -> None:
    if quant == "fp8" and target == "cuda:80":
        pytest.skip("no FP8 tensor cores")
    check_resources(spec_of(target, quant, 256))


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("dim", [64, 128, 256])
def test_no_default_spills_in_float32(target: str, dim: int) -> None:
    spec = spec_of(target, "none", dim, dtype="float32")
    if why_invalid(default_config(spec), spec) is not None:
        pytest.skip("the lowering declines such a site: its forward has no config")
    check_resources(spec)


@pytest.mark.parametrize(("tile", "slots", "dim"), [((4, 8, 8), 256, 64), ((4, 4, 4), 64, 128)], ids=str)
@pytest.mark.parametrize("quant", ["fp8", "none"])
def test_products_that_may_pass_two_to_the_31_are_64_bits_wide(quant: str, tile, slots: int, dim: int) -> None:
    """Of the backward and, with FP8, of the pre-pass."""
    fields = {"granularities": ("subtile", "head"), "gqa_group": 2, "key_mask": "float"}
    spec = spec_of("cuda:90", quant, dim, tile, **(fields if slots == 256 else {}))
    artifacts = dict(gradients_of(spec))
    if quant == "fp8":
        artifacts |= offline.prepass_artifacts(spec)
        assert ("tile_maxima" in artifacts) == (slots == 256)
    for found in artifacts.values():
        check_products(found.texts["ttir"], slots, min(slots, 128), spec.gqa_group)


@pytest.mark.slow
@pytest.mark.parametrize("target", [target for target in TARGETS if target != "cuda:80"])
@pytest.mark.parametrize("dim", [64, 128])
def test_the_prepass_does_not_spill(target: str, dim: int) -> None:
    spec = spec_of(target, "fp8", dim, granularities=("subtile", "head"), key_mask="float")
    for name, artifacts in offline.prepass_artifacts(spec).items():
        report = binary.inspect_artifacts(artifacts)
        assert report.spill_bytes == report.stack_bytes == 0, name


@pytest.mark.parametrize("kind", ["tile", pytest.param("subtile", marks=pytest.mark.slow)])
def test_a_prepass_that_rotates_does_not_spill(kind: str) -> None:
    """On sm_90: also with V's mean; the rotation's steps pass values between threads."""
    spec = spec_of("cuda:90", "fp8", 128, smooth_v=True, hadamard=True, **KINDS[kind])
    for name, artifacts in offline.prepass_artifacts(spec).items():
        report = binary.inspect_artifacts(artifacts)
        assert report.spill_bytes == report.stack_bytes == 0, name


def test_a_mean_of_v_and_a_rotation_leave_the_main_loops_alone() -> None:
    plain = spec_of("cuda:90", "fp8", 64)
    other = spec_of("cuda:90", "fp8", 64, smooth_v=True, hadamard=True)
    for config in (default_config(plain), KernelConfig(128, 4, 0, "hopper")):
        one, two = (offline.compile_forward(spec, config) for spec in (plain, other))
        assert two.spill_bytes == two.stack_bytes == 0
        assert two.main_loop.tensor == one.main_loop.tensor
        assert abs(two.main_loop.total - one.main_loop.total) <= 8
    check_resources(other)
