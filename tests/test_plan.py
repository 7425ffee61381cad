"""Plans travel as text and resolve on a grid."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from fpscompile.errors import GridError, OptionError, UnsupportedError, WindowError
from fpscompile.kernel_spec import KernelSpec, tile_slots
from fpscompile.masks import window_mask
from fpscompile.plan import PhasePlan, Plan, resolve
from fpscompile.schedule import Phase, Schedule
from fpscompile.windows import FirstFrame, Heads, Pattern, Radial, Sliding, SpatialBand, TopK, is_dynamic

PLAN = Plan(
    tile=(2, 3, 4),
    phases=(PhasePlan(window=(1, 2, 3), granularity="head"), PhasePlan(density=0.5)),
    clamp=True,
    quant="fp8",
    smooth_k=False,
    lowering="gather",
    block_n=64,
    p_scale=448.0,
)


def test_json_round_trip() -> None:
    text = PLAN.to_json()
    assert "\n" not in text
    assert Plan.from_json(text) == PLAN
    assert hash(Plan.from_json(text)) == hash(PLAN)
    assert Plan.from_json(text).to_json() == text


@pytest.mark.parametrize(
    "change",
    [
        {"tile": (2, 3, 5)},
        {"phases": PLAN.phases[:1]},
        {"clamp": False},
        {"quant": "none"},
        {"smooth_k": True},
        {"smooth_v": True},
        {"hadamard": True},
        {"lowering": "boxes"},
        {"block_n": 128},
        {"p_scale": 256.0},
        {"config": (("block_m", 64), ("compute", "float32"))},
    ],
)
def test_every_field_changes_the_text(change: dict) -> None:
    other = dataclasses.replace(PLAN, **change)
    assert other.to_json() != PLAN.to_json()
    assert Plan.from_json(other.to_json()) == other


@pytest.mark.parametrize(
    "window",
    [
        Radial((2, 3), 0.7),
        FirstFrame() | TopK(0.1),
        Heads({"0": "dense", "1-3": SpatialBand(2)}, TopK(tiles=3)),  # type: ignore[arg-type]
        Sliding(density=0.3),
    ],
)
def test_plans_carry_every_window(window: Pattern) -> None:
    plan = dataclasses.replace(PLAN, phases=(PhasePlan(window), PhasePlan(window=(1, 1, 1))))
    assert Plan.from_json(plan.to_json()) == plan
    assert plan.to_json() != PLAN.to_json()
    resolved = resolve(plan, (6, 6, 8), 288, 288, heads=4)
    assert resolved.dynamic == is_dynamic(window)
    assert resolved.product == isinstance(window, Sliding)
    assert resolve(plan, (6, 6, 8), 288, 288, heads=4) is resolved
    if not resolved.product:
        with pytest.raises(UnsupportedError, match="use lowering='gather'"):
            resolved.product_window(0)
    assert resolved.product_window(1) == (1, 1, 1)
    if resolved.dynamic:
        with pytest.raises(UnsupportedError, match="chosen by content"):
            _ = resolved.block_mask
    swapped = resolved.of_batch((1, 0, 1))
    assert swapped.windows == ((1, 1, 1), resolved.windows[0], (1, 1, 1))
    assert len(swapped.plan.phases) == 3


def test_heads_matter_only_to_windows_that_differ_by_head() -> None:
    plan = Plan((2, 2, 2), (PhasePlan(Radial()),))
    assert resolve(plan, (4, 4, 4), 64, 64, heads=3) is resolve(plan, (4, 4, 4), 64, 64, heads=5)
    alike = Plan((2, 2, 2), (PhasePlan(Heads({"0": "spatial"}, SpatialBand())),))  # type: ignore[arg-type]
    assert resolve(alike, (4, 4, 4), 64, 64, heads=3).windows == ((1, 2, 2),)


def test_plan_of_schedule() -> None:
    schedule = Schedule(
        (Phase(0.0, 0.5, window=(1, 1, 2), granularity="subtile"), Phase(0.5, 1.0, density=0.3)), clamp=True
    )
    plan = Plan.of(schedule, tile=(1, 2, 2), quant="fp8")
    assert plan.phases == (PhasePlan((1, 1, 2), None, "subtile"), PhasePlan(None, 0.3, "tile"))
    assert plan.clamp
    assert plan.quant == "fp8"


def test_resolve_places_the_video() -> None:
    plan = Plan(tile=(2, 2, 2), phases=(PhasePlan(window=(9, 1, 2)), PhasePlan(density=1.0)))
    resolved = resolve(plan, (3, 4, 5), 60 + 7, 60 + 9, 7, 2)
    assert (resolved.q_layout.before, resolved.q_layout.after) == (7, 0)
    assert (resolved.k_layout.before, resolved.k_layout.after) == (2, 7)
    assert resolved.windows == ((2, 1, 2), (2, 2, 3))  # clipped to the tile grid
    assert resolved.densities[1] == 1.0
    assert resolved.densities[0] < 1.0
    assert resolved.conservative == 1
    expected = window_mask(resolved.q_layout, resolved.k_layout, resolved.windows)
    assert torch.equal(resolved.block_mask.kv_indices, expected.kv_indices)
    assert resolved.block_mask is resolved.block_mask
    assert resolve(plan, (3, 4, 5), 67, 69, 7, 2) is resolved


def test_conservative_takes_the_first_of_equals() -> None:
    plan = Plan(tile=(1, 1, 1), phases=(PhasePlan(window=(1, 1, 1)), PhasePlan(density=1.0), PhasePlan(density=1.0)))
    assert resolve(plan, (2, 2, 2), 8, 8).conservative == 1


@pytest.mark.parametrize(
    ("lengths", "message"),
    [((59, 60, 0, 0), "60 tokens, but the query sequence has 59"), ((60, 62, 0, 3), "key sequence has 62, video from")],
)
def test_sequence_shorter_than_the_grid(lengths: tuple[int, int, int, int], message: str) -> None:
    plan = Plan(tile=(2, 2, 2), phases=(PhasePlan(window=(1, 1, 1)),))
    with pytest.raises(GridError, match=message):
        resolve(plan, (3, 4, 5), *lengths)


def test_density_below_the_floor() -> None:
    plan = Plan(tile=(2, 2, 2), phases=(PhasePlan(density=0.01),))
    with pytest.raises(WindowError, match="floor"):
        resolve(plan, (4, 4, 4), 64, 64)
    clamped = resolve(dataclasses.replace(plan, clamp=True), (4, 4, 4), 64, 64)
    assert clamped.windows == ((1, 1, 1),)


@pytest.mark.parametrize(
    ("tile", "block_n", "slots"),
    [
        ((4, 8, 8), 128, 256),
        ((6, 8, 8), 128, 384),
        ((5, 6, 7), 128, 256),
        ((3, 3, 3), 128, 32),
        ((1, 1, 1), 128, 16),
        ((4, 4, 4), 128, 64),
        ((4, 4, 8), 128, 128),
        ((4, 4, 5), 64, 128),
    ],
)
def test_tile_slots(tile: tuple[int, int, int], block_n: int, slots: int) -> None:
    assert tile_slots(tile, block_n) == slots
    spec = KernelSpec("cpu", "float32", 64, 64, tile, block_n=block_n)
    assert spec.tile_slots == slots


@pytest.mark.parametrize("block_n", [0, 8, 48, 100])
def test_block_n_must_be_a_power_of_two(block_n: int) -> None:
    with pytest.raises(OptionError, match=f"block_n={block_n}"):
        tile_slots((4, 4, 4), block_n)
