"""The cost model: its arithmetic on a made-up binary, its monotonicity, and that it ranks real ones."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from fpscompile.errors import UnsupportedError
from fpscompile.gpu import cost_model
from fpscompile.gpu.assembly import Loop
from fpscompile.gpu.binary import BinaryReport
from fpscompile.gpu.config import KernelConfig, candidates
from fpscompile.kernel_spec import KernelSpec
from fpscompile.lowerings import triton

ROOT = Path(__file__).resolve().parents[2]
SPEC = KernelSpec(target="cuda:90", dtype="bfloat16", head_dim=128, value_dim=128, tile=(4, 8, 8), quant="fp8")
EVERY = {"tensor": 8, "mufu": 66, "float": 200, "minmax": 68, "convert": 32, "integer": 100, "shared_load": 10}
LOOP = Loop(0, EVERY, {}, {"QGMMA.64x128x32.F32.E4M3.E4M3": 8}, {})
REPORT = BinaryReport("k", "cuda:90", "3.7.1", 8, 255, 0, 0, 82_000, 900, {}, (LOOP,), ())
PLAIN, HOPPER = KernelConfig(128, 8, 3), KernelConfig(128, 4, 0, "hopper")


def test_peaks_are_those_of_the_datasheet() -> None:
    for gpu in cost_model.GPUS:
        peak = gpu.multiprocessors * gpu.clock_hz / 1e12
        assert peak * gpu.fp8_flops == pytest.approx(1979, rel=1e-3)
        assert peak * gpu.bf16_flops == pytest.approx(989, rel=1e-3)


def test_cycles_of_every_unit() -> None:
    cycles = cost_model.predict(REPORT, SPEC, PLAIN).cycles
    assert cycles.tensor == 2 * 2 * 64 * 128 * 128 / 8192
    assert cycles.exp == 4 * 66 * 2
    assert cycles.issue == sum(EVERY.values())
    assert cycles.half == 4 * (68 + 32) / 2
    assert cycles.shared == (64 * 128 + 2 * 128 * 128 + 4 * 10 * 128) / 128
    assert cycles.l2 == pytest.approx(2 * 128 * 128 / 2 / (5.5e12 / (132 * 1.83e9)))
    assert cycles.softmax == cycles.exp
    assert cycles.limit == "l2"


@pytest.mark.parametrize(("registers", "shared", "warps", "programs"), [
    (255, 82_000, 8, 1), (255, 73_764, 4, 2), (128, 73_764, 8, 2), (128, 110_000, 8, 2), (128, 120_000, 8, 1),
    (32, 1_000, 16, 4), (255, 240_000, 8, 0),
])  # fmt: skip
def test_occupancy(registers: int, shared: int, warps: int, programs: int) -> None:
    report = dataclasses.replace(REPORT, registers=registers, shared_bytes=shared, num_warps=warps)
    assert cost_model.programs_per_sm(report, cost_model.H100) == programs


def test_mean_value_analysis() -> None:
    assert cost_model.mva(500, 300, 1) == 800
    assert cost_model.mva(500, 500, 3) == pytest.approx(500 * 4 / 3)  # n customers, balanced: n / (n + 1) of the rate
    many = [cost_model.mva(500, 300, n) for n in range(1, 40)]
    assert all(a > b > 500 for a, b in itertools.pairwise(many))
    assert many[-1] == pytest.approx(500, rel=1e-6)
    # By the balance equations of two exponential stations: throughput of n customers with ratio r of service times.
    r, n = 300 / 500, 4
    idle = 1 / sum(r**k for k in range(n + 1))
    assert cost_model.mva(500, 300, n) == pytest.approx(500 / (1 - r**n * idle), rel=1e-9)


def test_more_instructions_are_never_faster_and_overlap_helps() -> None:
    plain = cost_model.predict(REPORT, SPEC, PLAIN)
    hopper = cost_model.predict(dataclasses.replace(REPORT, registers=168, num_warps=12), SPEC, HOPPER)
    assert plain.tflops < hopper.tflops < hopper.bound_tflops
    assert plain.warpgroups_per_sm == hopper.warpgroups_per_sm == 2
    for kind in EVERY:
        more = Loop(0, EVERY | {kind: EVERY[kind] * 4}, {}, LOOP.tensor, {})
        assert cost_model.predict(dataclasses.replace(REPORT, loops=(more,)), SPEC, PLAIN).tflops <= plain.tflops


def test_what_the_model_does_not_know_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="not cuda:89"):
        cost_model.predict(dataclasses.replace(REPORT, target="cuda:89"), SPEC, PLAIN)
    with pytest.raises(UnsupportedError, match="no loop with matrix"):
        cost_model.predict(dataclasses.replace(REPORT, loops=()), SPEC, PLAIN)
    with pytest.raises(UnsupportedError, match="does not fit"):
        cost_model.predict(dataclasses.replace(REPORT, shared_bytes=300_000), SPEC, PLAIN)
    with pytest.raises(UnsupportedError, match="not hip:gfx942"):
        cost_model.rank(dataclasses.replace(SPEC, target="hip:gfx942"))


def test_time_of_a_problem() -> None:
    prediction = cost_model.predict(REPORT, SPEC, PLAIN)
    problem = cost_model.Problem(tokens=128 * 132, heads=10, batch=1, programs=1320, steps=1320 * 132, pairs=0)
    kernel, prepass = cost_model.seconds(prediction, SPEC, problem)
    steps_alone = 4 * (128 * 132) ** 2 * 128 * 10 / prediction.tflops / 1e12
    starts = 1320 * cost_model.START_CYCLES / prediction.programs_per_sm / cost_model.H100.clock_hz / 132
    assert starts > 0
    assert kernel == pytest.approx(steps_alone + starts, rel=1e-9)
    assert prepass == pytest.approx(128 * 132 * 10 * 128 * 13 / (0.8 * 3.35e12))
    later, _ = cost_model.seconds(prediction, SPEC, dataclasses.replace(problem, programs=1321))
    rounds = math.ceil(1321 / 132) / (1321 / 132)
    assert later == pytest.approx(rounds * (steps_alone + starts * 1321 / 1320), rel=1e-9)
    faster = cost_model.seconds(prediction, SPEC, problem, cost_model.H200)[1]
    assert faster < prepass
    assert cost_model.seconds(prediction, dataclasses.replace(SPEC, quant="none"), problem)[1] == 0


def test_ranking_of_real_binaries() -> None:
    configs = (KernelConfig(128, 4, 3), KernelConfig(128, 8, 3), HOPPER)
    ranked = cost_model.rank(SPEC, configs)
    assert [item.config for item in ranked] == [HOPPER, KernelConfig(128, 8, 3), KernelConfig(128, 4, 3)]
    assert triton.config_of(SPEC, torch.device("cuda")) == HOPPER
    assert ranked[2].prediction is None
    assert "spills" in str(ranked[2].reason)
    for item in ranked[:2]:
        assert item.prediction is not None
        assert 300 < item.prediction.tflops < item.prediction.bound_tflops < 1979


@pytest.mark.slow
@pytest.mark.parametrize("quant", ["fp8", "none"])
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("tile", [(2, 4, 4), (4, 4, 4), (4, 8, 8), (6, 8, 8)], ids=str)
def test_what_is_taken_untuned_is_what_the_model_picks(quant: str, dim: int, tile: tuple[int, int, int]) -> None:
    """To 3 % of the best candidate's predicted speed: compiling all candidates at a first call would take minutes."""
    spec = dataclasses.replace(SPEC, quant=quant, head_dim=dim, value_dim=dim, tile=tile)
    default = triton.config_of(spec, torch.device("cuda"))
    ranked = cost_model.rank(spec, dict.fromkeys((*candidates(spec), default)))
    own = next(item for item in ranked if item.config == default)
    assert own.prediction is not None, own.reason
    assert own.prediction.tflops >= 0.97 * ranked[0].prediction.tflops, ranked[0].config


def test_the_page_says_that_it_is_a_prediction_and_shows_the_stored_numbers() -> None:
    page = (ROOT / "docs/performance.md").read_text()
    stored = json.loads((ROOT / "benchmarks/results/gpu_predictions.json").read_text())
    assert page.startswith("# Performance on GPUs: a prediction")
    assert "**Nothing on this page was measured**" in page
    for row in stored["predictions"]:
        assert f"| {row['density']:.3f} |" in page
        assert f"| {row['tflops_with_prepass']} |" in page
