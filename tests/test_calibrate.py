"""Calibration: its statistics are exact, its choice is the best, and it finds what the heads of a known model do."""

from __future__ import annotations

import itertools
import json
import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from models.structured import HEADS, Structured, samples
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import fpscompile
from fpscompile import Backend, Settings, autotune
from fpscompile.calibrate import CalibrationError, CalibrationReport, SiteCalibration, calibrate, split
from fpscompile.calibration import statistics
from fpscompile.calibration.candidates import Candidates, candidates
from fpscompile.calibration.choose import choose
from fpscompile.calibration.held_out import HeldOut
from fpscompile.calibration.knapsack import Item, solve
from fpscompile.calibration.statistics import CallStatistics, SiteStatistics, observe
from fpscompile.errors import OptionError, WindowError
from fpscompile.lowerings import gather
from fpscompile.plan import PhasePlan, Plan, ResolvedPlan, resolve
from fpscompile.schedule import GRANULARITIES
from fpscompile.selection import masks_of_call
from fpscompile.tiling import TileLayout
from fpscompile.tuning import Contents, read
from fpscompile.tuning import candidates as space
from fpscompile.tuning.format import dumps
from fpscompile.tuning.problem import tile_of_token
from fpscompile.tuning.store import TuningFileError
from fpscompile.windows import Dense, Pattern, TopK, View, density, sets_on_grid, spec_of, window_of

TILE = (1, 2, 2)
OPTIONS = {"tile": TILE, "window": "dense"}


# Candidates


@pytest.mark.parametrize("grid", [(4, 8, 8), (1, 9, 7), (9, 20, 20)])
@pytest.mark.parametrize("text", [0, 5])
def test_candidates_differ_and_end_in_dense(grid: tuple[int, int, int], text: int) -> None:
    layout = TileLayout(grid, (2, 4, 4), 0, text)
    found = candidates(layout, layout)
    assert found.densities == tuple(sorted(found.densities))
    assert found.densities[found.dense] == pytest.approx(1.0)
    assert found.masks[found.dense].all()
    assert len({mask.numpy().tobytes() for mask in found.masks}) == len(found.windows) <= 90
    for window, value, mask in zip(found.windows, found.densities, found.masks, strict=True):
        assert density(window, layout, layout) == pytest.approx(value)
        assert mask.any(-1).all()
        assert window_of(spec_of(window)) == window, "it can be written into a file"


def test_extra_candidates_are_taken() -> None:
    layout = TileLayout((4, 16, 16), (1, 2, 2))
    extra = window_of([2, 6, 1])
    assert extra not in candidates(layout, layout).windows
    assert extra in candidates(layout, layout, (extra,)).windows
    with pytest.raises(WindowError, match="density"):
        candidates(layout, layout, (window_of({"family": "sliding", "density": 1e-6}),))


def test_a_window_that_needs_a_density_is_tried_at_several() -> None:
    layout = TileLayout((4, 8, 8), (1, 4, 4), 0, 9)
    plain, found = candidates(layout, layout), candidates(layout, layout, (window_of("topk"),))
    assert not plain.chosen
    windows = [found.windows[index] for index in found.chosen]
    assert windows == [TopK(density=value) for value in (3 / 16, 1 / 4, 3 / 8, 1 / 2, 5 / 8, 3 / 4, 7 / 8)], (
        "text and one tile take more than an eighth"
    )
    assert len(found.windows) == len(plain.windows) + len(windows)
    assert found.windows[found.dense] == Dense()
    for index in found.chosen:
        assert density(found.windows[index], layout, layout) == pytest.approx(found.densities[index])
        assert found.densities[index] <= found.windows[index].density  # type: ignore[union-attr]


# Statistics


def site(
    grid: tuple[int, int, int] = (2, 5, 7), before: int = 3, after: int = 6, heads: int = 4, quant: str = "none"
) -> SiteStatistics:
    layout = TileLayout(grid, (2, 4, 4), before, after)
    granularities = GRANULARITIES if quant == "fp8" else ("tile",)
    return SiteStatistics("x", heads, 16, layout, layout, candidates(layout, layout), granularities, quant)


def tensors(made: SiteStatistics, key_heads: int = 2) -> tuple[torch.Tensor, ...]:
    length = made.q_layout.length
    return tuple(torch.randn(heads, length, 16) for heads in (made.heads, key_heads, key_heads))


@pytest.mark.parametrize("mask", ["none", "bool", "float"])
def test_statistics_are_those_of_masked_attention(mask: str) -> None:
    made = site()
    q, k, v = tensors(made)
    key_mask = {
        "none": None,
        "bool": torch.rand(1, 1, q.shape[1]) > 0.3,
        "float": torch.randn(made.heads, 1, q.shape[1]),
    }[mask]
    found = observe(q, k, v, key_mask, 2, 0.4, made, rows_per_tile=1000)
    assert found.phase == 2

    keys, values = (x.double().repeat_interleave(2, 0) for x in (k, v))
    scores = q.double() @ keys.mT * 0.4
    if key_mask is not None:
        scores = scores.masked_fill(~key_mask, -torch.inf) if key_mask.dtype == torch.bool else scores + key_mask
    dense = torch.softmax(scores, -1)
    tile = tile_of_token(made.q_layout)
    for index in range(len(made.candidates.windows)):
        visible = made.candidates.masks[index][tile][:, tile]
        sparse = torch.softmax(scores.masked_fill(~visible, -torch.inf), -1).nan_to_num(0.0) @ values
        squares = (sparse - dense @ values).square().sum((1, 2)) / (dense @ values).square().sum()
        torch.testing.assert_close(found.error[:, index, 0], squares, rtol=1e-4, atol=1e-9)
        torch.testing.assert_close(found.recall[:, index], (dense * visible).sum(-1).mean(-1), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("mask", ["none", "bool", "float"])
def test_statistics_of_tiles_that_content_chooses(mask: str) -> None:
    """Of the very tiles that a call of the compiled model would choose, other tokens, key masks and few key heads
    included."""
    made = site()
    extra = (window_of("topk"), window_of({"family": "union", "of": ["spatial", {"family": "topk", "tiles": 1}]}))
    made.candidates = candidates(made.q_layout, made.k_layout, extra)
    assert len(made.candidates.chosen) >= 3
    q, k, v = tensors(made)
    key_mask = {
        "none": None,
        "bool": torch.rand(1, 1, q.shape[1]) > 0.3,
        "float": torch.randn(made.heads, 1, q.shape[1]),
    }[mask]
    found = observe(q, k, v, key_mask, 2, -0.4, made, rows_per_tile=1000)
    hidden = None if key_mask is None else key_mask[None]
    common = {"key_mask": hidden, "scale": -0.4}
    exact, _ = gather.forward(q[None], k[None], v[None], phases=(0,), resolved=planned(made, Dense()), **common)
    for index in made.candidates.chosen:
        resolved, chosen = masks_of_call(
            None, q[None], k[None], hidden, (0,), planned(made, made.candidates.windows[index]), -0.4
        )
        out, _ = gather.forward(
            q[None], k[None], v[None], phases=(0,), resolved=resolved, block_mask=chosen, **common
        )  # fmt: skip
        squares = (out - exact)[0].square().sum((1, 2)) / exact.square().sum()
        torch.testing.assert_close(found.error[:, index, 0], squares.double(), rtol=1e-3, atol=1e-9)


def planned(made: SiteStatistics, window: Any) -> ResolvedPlan:
    layout = made.q_layout
    plan = Plan(layout.tile, (PhasePlan(window),), lowering="gather")
    return resolve(plan, layout.grid, layout.length, layout.length, layout.before, layout.before, made.heads)


def test_statistics_of_some_rows_are_close_to_those_of_all() -> None:
    made = site((4, 16, 16), 0, 0)
    q, k, v = tensors(made)
    some, every = (observe(q, k, v, None, 0, 0.3, made, rows) for rows in (8, 1000))
    keep = every.error.sum(0) > 1e-3
    assert ((some.error.sum(0) / every.error.sum(0))[keep] - 1).abs().max() < 0.2


class _Largest(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.numel = max(self.numel, result.numel())
        return result


def test_no_score_matrix_is_ever_held(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(statistics, "CHUNK_BYTES", 1 << 19)
    made = site((4, 16, 16), 0, 0, heads=2)
    q, k, v = tensors(made)
    with _Largest() as largest:
        observe(q, k, v, None, 0, 0.3, made, rows_per_tile=8)
    assert largest.numel < made.q_layout.length**2 / 4


def test_fp8_statistics_are_the_kernels_errors() -> None:
    """Of every granularity, dense and sparse, the rounding of P included."""
    made = site((2, 8, 8), 0, 0, quant="fp8")
    q, k, v = tensors(made)
    q[0] *= 30  # makes one scale for all heads a bad one
    found = observe(q, k, v, None, 0, 0.25, made, rows_per_tile=1000)
    exact = F.scaled_dot_product_attention(q[None], k[None], v[None], scale=0.25, enable_gqa=True)
    for level, index in itertools.product(range(len(GRANULARITIES)), (0, made.candidates.dense)):
        phase = PhasePlan(made.candidates.windows[index], None, GRANULARITIES[level])
        resolved = resolve(Plan((2, 4, 4), (phase,), quant="fp8", lowering="gather"), (2, 8, 8), 128, 128)
        out, _ = gather.forward(q[None], k[None], v[None], key_mask=None, phases=(0,), resolved=resolved, scale=0.25)
        actual = float((out - exact).norm() / exact.norm())
        assert float(found.error[:, index, level].sum().sqrt()) == pytest.approx(actual, rel=1e-3)


@pytest.mark.parametrize("quant", ["none", "fp8"])
def test_a_hidden_tile_beside_scores_far_below_zero(quant: str) -> None:
    """What every key's score has in common makes no difference, however low: whole powers of two, for P's rounding."""
    made = site((2, 8, 8), 0, 0, quant=quant)
    q, k, v = tensors(made)
    mask = torch.zeros(1, 1, k.shape[1])
    mask[..., made.k_layout.order()[:32]] = float("-inf")
    found, low = (observe(q, k, v, mask + low, 0, 0.25, made, rows_per_tile=1000) for low in (0.0, -288 * math.log(2)))
    torch.testing.assert_close(low.error, found.error, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(low.recall, found.recall, rtol=1e-3, atol=1e-5)


# The choice


def brute_force(items: list[Item], budget: float) -> float:
    return min(
        sum(item.costs[option] for item, option in zip(items, options, strict=True))
        for options in itertools.product(*(range(len(item.costs)) for item in items))
        if sum(item.errors[option] for item, option in zip(items, options, strict=True)) <= budget
    )


def an_item(group: str = "a") -> Item:
    costs = sorted((random.random() for _ in range(4)), reverse=True)
    errors = [0.0, *(random.random() for _ in range(3))]
    return Item(group, costs, errors)


def test_choice_is_within_one_step_of_the_optimum_and_within_the_budget() -> None:
    for _ in range(60):
        items = [an_item() for _ in range(5)]
        budget = random.random()
        solution = solve(items, {"a": budget})
        assert solution.errors["a"] <= budget + 1e-12
        assert solution.cost == pytest.approx(sum(i.costs[c] for i, c in zip(items, solution.choices, strict=True)))
        best = brute_force(items, budget)
        assert best <= solution.cost + 1e-12
        assert solution.cost - best <= max(max(item.costs) - min(item.costs) for item in items) + 1e-12


def test_groups_have_budgets_of_their_own() -> None:
    items = [an_item(group) for group in "aabb"]
    together = solve(items, {"a": 0.3, "b": 0.1})
    apart = solve(items[:2], {"a": 0.3}).cost + solve(items[2:], {"b": 0.1}).cost
    assert together.cost == pytest.approx(apart)
    assert solve(items, {"a": 0.0}).errors["a"] == 0.0


def test_a_target_cost_is_met_with_little_error() -> None:
    for _ in range(30):
        items = [an_item() for _ in range(5)]
        most, least = sum(max(i.costs) for i in items), sum(min(i.costs) for i in items)
        target = random.uniform(least, most)
        solution = solve(items, None, target)
        assert solution.cost <= target + 1e-12
        options = itertools.product(*(range(4) for _ in items))
        best = min(
            sum(i.errors[o] for i, o in zip(items, chosen, strict=True))
            for chosen in options
            if sum(i.costs[o] for i, o in zip(items, chosen, strict=True)) <= target
        )
        assert solution.errors["a"] - best <= max(max(item.errors) for item in items)
    assert solve(items, None, most + 1).cost == pytest.approx(sum(i.costs[0] for i in items)), "nothing to save"


def test_what_cannot_be_had_is_left_at_its_most_accurate() -> None:
    item = Item("a", [1.0, 0.5], [0.2, 0.4])
    assert solve([item], {"a": 0.1}).choices == (0,)


def test_a_budget_is_of_the_mean_of_the_errors() -> None:
    """Not of the mean of their squares, which allows less: beside every choice there is, where all can be tried."""
    layout = TileLayout((1, 2, 2), (1, 1, 1))
    costs, limit, gains = (0.25, 0.5, 0.75, 1.0), 0.3, []
    options = Candidates(((1, 1, 1), (1, 1, 2), (1, 2, 1), Dense()), costs, torch.ones(4, 4, 4, dtype=torch.bool))
    for _ in range(20):
        made = SiteStatistics("x", 2, 8, layout, layout, options, ("tile",), "none")
        for phase, size in enumerate((1.0, 0.2)):  # steps that err much, and steps that err little
            errors = (torch.rand(2, 4).sort(1, descending=True).values * torch.tensor([1, 1, 1, 0]) * size).double()
            made.calls += [CallStatistics(phase, errors[..., None], errors)] * 2  # alike: nothing to be cautious about
        report = CalibrationReport("M", layout.grid, layout.tile, "none", limit, None, ((0.0, 0.5), (0.5, 1.0)))
        choose(report, {"x": made})
        (chosen,) = report.sites
        assert chosen.predicted <= limit + 1e-9
        best, squares = 1.0, 1.0
        for picks in itertools.product(range(4), repeat=4):
            cost = sum(costs[pick] for pick in picks) / 4
            square = torch.stack([call.error[(0, 1), picks[2 * i : 2 * i + 2], 0].sum() for i, call in
                                  enumerate(made.calls[::2])])  # fmt: skip
            if square.sqrt().mean() <= limit:
                best = min(best, cost)
            if square.mean() <= limit**2:
                squares = min(squares, cost)
        assert best <= sum(chosen.densities) / 2 + 1e-9 <= best + 0.25 + 1e-9, "one step of one head at most"
        gains.append(squares - sum(chosen.densities) / 2)
    assert sum(gains) / len(gains) > 0.05, "less is kept than under a budget on squares"


# A model of known heads


def seen(window: Any, grid: tuple[int, int, int] = (4, 8, 8)) -> torch.Tensor:
    layout = TileLayout(grid, TILE)
    return sets_on_grid(window, View(layout, layout)).always[0]


def test_calibration_recovers_the_structure(tmp_path: Path) -> None:
    model = Structured().eval()
    report = calibrate(model, samples(32), max_error=0.05, options=OPTIONS, path=tmp_path / "t.json", held_out=0.5)
    assert (report.samples, report.held_out) == (16, 16)
    assert [made.name for made in report.sites] == ["blocks.0", "blocks.1"]
    for made, kinds in zip(report.sites, (HEADS, HEADS[::-1]), strict=True):
        windows = dict(zip(kinds, made.windows[0], strict=True))
        assert torch.equal(seen(windows["spatial"]), seen(window_of("spatial")))
        assert torch.equal(seen(windows["temporal"]), seen(window_of("temporal")))
        local = seen(windows["local"])
        assert local.float().mean() <= 27 / 64
        assert local.diagonal().all()
        assert made.predicted <= 0.05
        assert made.measured == pytest.approx(made.predicted, rel=0.2)
        assert made.held_out_calls == 16
        assert made.uniform_density >= 1.5 * made.densities[0], "than one window for all heads, at equal error"
    assert report.uniform_density >= 1.5 * report.density
    assert report.single_density >= report.uniform_density
    assert "heads: window" in str(report)
    assert "spatial" in str(report)


def test_prediction_is_exact_on_the_samples_it_was_made_from(tmp_path: Path) -> None:
    """Statistics on tiles and the masks themselves, through the kernel, tell the same error."""
    report = calibrate(Structured().eval(), samples(1) * 4, max_error=0.05, options=OPTIONS, path=tmp_path / "t.json")
    assert (report.samples, report.held_out) == (2, 2)
    for made in report.sites:
        assert made.measured == pytest.approx(made.predicted, rel=1e-4)


def test_heads_that_follow_content_get_tiles_chosen_by_content(tmp_path: Path) -> None:
    """They keep less than under fixed windows; the prediction is what the masks do, and the file compiles to it."""
    path, model = tmp_path / "t.json", Structured(kinds=(("global", "spatial"),), content=3.0).eval()
    latent = F.interpolate(torch.randn(1, 4, 4, 4, 4), (4, 8, 8))  # tokens of a tile are alike
    given = [{"latent": latent, "timestep": torch.tensor([500.0])}] * 2
    without = calibrate(model, given, max_error=0.1, options=OPTIONS, path=tmp_path / "other.json")
    report = calibrate(model, given, max_error=0.1, options=OPTIONS, path=path, windows=["topk"])
    assert report.density < 0.9 * without.density
    kinds = {window.family for made in report.sites for window in made.windows[0] if isinstance(window, Pattern)}
    assert "topk" in kinds
    for made in report.sites:
        assert made.measured == pytest.approx(made.predicted, rel=1e-4)
        assert made.predicted <= 0.1
    backend, _ = compiled(model, given[0], tuning=str(path))
    for record, made in zip(backend.graphs[0].sites, report.sites, strict=True):
        assert record.rewritten
        assert record.density == pytest.approx(made.densities)


def test_phases_are_told_apart(tmp_path: Path) -> None:
    """Heads that are sharp only in the second half of the steps are sparse only there."""
    schedule = [{"start": 0.0, "end": 0.5, "window": "dense"}, {"start": 0.5, "end": 1.0, "window": "dense"}]
    given = [call for step in (100.0, 900.0) for call in samples(4, timestep=step)]
    report = calibrate(
        Structured(late=True).eval(), given, max_error=0.05, path=tmp_path / "t.json",
        options={"tile": TILE, "schedule": schedule},
    )  # fmt: skip
    told = "both halves have samples of both phases, though they come in order"
    assert not any("reached progress" in note for note in report.notes), told
    for made in report.sites:
        early, late = made.densities
        assert late < 0.3
        assert early > 2 * late
        assert made.measured == pytest.approx(made.predicted, rel=0.2)
    assert report.ranges == ((0.0, 0.5), (0.5, 1.0))


def test_held_out_phases_count_as_in_the_prediction() -> None:
    """Whatever the mixture of the held-out steps; phases that the choice never saw do not count."""
    ranges = ((0.0, 0.25), (0.25, 0.5), (0.5, 0.75), (0.75, 1.0))
    report = CalibrationReport("Model", (1, 1, 1), TILE, "none", 0.1, None, ranges)
    dense = ((Dense(),),) * 4
    made = SiteCalibration("x", 1, 16, dense, ("tile",) * 4, (1.0,) * 4, 0.05, 1.0, 1.0, (0.6, 0.2, 0.2, 0.0))
    report.sites.append(made)
    held_out = HeldOut(report, one_phase=False)
    held_out.errors["x"] = [[0.01], [0.1, 0.2, 0.3], [], [0.9]]
    held_out.finish()
    assert made.measured == pytest.approx((0.6 * 0.01 + 0.2 * 0.2) / 0.8)
    assert made.held_out_calls == 4
    assert report.notes == ["x: no held-out sample reached progress 0.5-0.75: the measured error is of other steps"]


@pytest.mark.parametrize(
    ("count", "share", "aside"), [(1, 0.5, 0), (2, 0.5, 1), (8, 0.25, 2), (3, 0.9, 2), (4, 0.0, 0)]
)
def test_split(count: int, share: float, aside: int) -> None:
    fitting, held = split(range(count), share)
    assert len(held) == aside
    assert sorted(fitting + held) == list(range(count))
    assert split(range(count), share) == (fitting, held), "always the same"


def test_target_density_is_met_and_shared_wisely(tmp_path: Path) -> None:
    model = Structured(kinds=(("spatial",) * 4, ("global",) * 4), content=0.0).eval()
    report = calibrate(model, samples(4), target_density=0.6, held_out=0.0, options=OPTIONS, path=tmp_path / "t.json")
    assert report.measured is None
    sharp, flat = report.sites
    assert report.density <= 0.6 + 1e-9
    assert sharp.densities[0] < flat.densities[0]
    assert sharp.predicted < 0.05


def test_a_target_that_the_error_forbids_is_reported(tmp_path: Path) -> None:
    model = Structured(kinds=(("global",) * 4,), content=1.0).eval()
    report = calibrate(model, samples(4), max_error=1e-4, target_density=0.1, options=OPTIONS, path=tmp_path / "t.json")
    (made,) = report.sites
    assert made.densities == (1.0,)
    assert made.windows[0] == (Dense(),) * 4
    assert "max_error=0.0001 allows no other window: the least harmful" in made.reason
    assert any("target_density=0.1 is missed" in note for note in report.notes)
    assert made.reason in str(report)
    assert read(tmp_path / "t.json").contents.calibrations[report.key]["sites"]["blocks.0"]["reason"] == made.reason


def test_fp8_takes_the_coarsest_granularity_that_is_good_enough(tmp_path: Path) -> None:
    options = OPTIONS | {"quant": "fp8"}
    coarse, fine = (
        calibrate(Structured().eval(), samples(2), max_error=limit, options=options, path=tmp_path / "t.json")
        for limit in (0.6, 1e-3)
    )
    assert {made.granularities for made in coarse.sites} == {("tensor",)}
    assert all("quantization alone errs" in made.reason for made in fine.sites)
    assert coarse.measured == pytest.approx(coarse.predicted, rel=0.3)


# What becomes of it


def compiled(model: nn.Module, call: dict, **options: Any) -> tuple[Backend, torch.Tensor]:
    torch._dynamo.reset()
    backend = Backend(Settings.from_options({"inner": "eager", "quant": "none", **options}))
    with torch.no_grad():
        return backend, torch.compile(model, backend=backend)(**call)


def notes_of(backend: Backend) -> dict[str, str]:
    return {note.code: note.message for note in backend.graphs[0].notes}


def test_the_file_compiles_the_model_as_calibrated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(space, "CPP_CHOICES", {})
    path, model, (call,) = tmp_path / "t.json", Structured().eval(), samples(1)
    report = calibrate(model, samples(8), max_error=0.05, options=OPTIONS, path=path)
    backend, actual = compiled(model, call, tuning=str(path))
    sites = {record.module: record for record in backend.graphs[0].sites}
    for made in report.sites:
        assert sites[made.name].rewritten
        assert sites[made.name].density == pytest.approx(made.densities * len(sites[made.name].density))
    assert f"calibration {report.key!r}" in notes_of(backend)["calibrated"]
    expected = model(**call).detach()
    error = float((actual - expected).norm() / expected.norm())
    assert 0 < error < 0.05
    again = json.loads(path.read_text())["calibrations"][report.key]["options"]
    tuned = autotune(model, **call, options={"tuning": str(path), "quant": "none"}, path=tmp_path / "kernels.json")
    densities = {group.signature.density for group in tuned.groups}
    assert densities == {tuple(round(d, 4) for d in sites[made.name].density) for made in report.sites}
    other, same = compiled(model, call, **{name: value for name, value in again.items() if name != "schedule"})
    assert torch.allclose(same, actual, atol=1e-6), "its options alone do the same"
    assert "calibrated" not in notes_of(other)
    beside = autotune(model, **call, options={"quant": "none"}, path=path)
    assert {group.signature.density for group in beside.groups} == densities, "the file that is tuned says the masks"
    assert f"calibration {report.key!r}" in str(beside)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        ({"sites": {"blocks.0": None}}, "its site blocks.0 is None, and no object"),
        ({"options": {"layers": None}}, "layers=None is no object of sites"),
        ({"options": {"layers": {"blocks.0": 5}}}, "window=5 must be"),
        ({"options": {"tile": None}}, "its options are refused"),
        ({"options": {"nonsense": 1}}, "its options are refused"),
        ({"sites": None}, "it has no sites or no options"),
    ],
    ids=str,
)
def test_a_calibration_that_makes_no_sense_is_named_and_ignored(
    damage: dict[str, Any], words: str, tmp_path: Path
) -> None:
    """Whatever stands in a file that is edited by hand, the model is rewritten as the other options say."""
    path, (call,) = tmp_path / "t.json", samples(1)
    calibrate(Structured().eval(), samples(2), max_error=0.05, options=OPTIONS, path=path)
    data = json.loads(path.read_text())
    (entry,) = data["calibrations"].values()
    entry.update(damage)
    path.write_text(json.dumps(data))
    backend, _ = compiled(Structured().eval(), call, tuning=str(path), tile=TILE)
    assert words in notes_of(backend)["calibration-ignored"]
    assert all(site.rewritten for site in backend.graphs[0].sites)


@pytest.mark.parametrize("signature", [None, 5, {"grid": 5}, {"grid": None}, {"grid": "4x8x8"}], ids=str)
def test_an_entry_of_other_kernels_that_makes_no_sense_is_passed_over(signature: Any, tmp_path: Path) -> None:
    path, (call,) = tmp_path / "t.json", samples(1)
    path.write_text(dumps(Contents({"key": {"signature": signature}})))
    backend, _ = compiled(Structured().eval(), call, tuning=str(path), strict=True, density=0.5, tile=TILE)
    assert "its entries are for grids ?" in notes_of(backend)["tuning-ignored"]
    assert all(site.rewritten for site in backend.graphs[0].sites)


def test_another_model_grid_or_wish_is_named_and_ignored(tmp_path: Path) -> None:
    path, (call,) = tmp_path / "t.json", samples(1)
    calibrate(Structured().eval(), samples(2), max_error=0.05, options=OPTIONS, path=path)

    class Renamed(Structured):
        pass

    grid = (4, 8, 6)
    cases = [
        (Renamed().eval(), call, {}, "for the model Structured, and this is Renamed"),
        (Structured(grid).eval(), samples(1, grid)[0], {}, "for grid [4, 8, 8], and blocks.0 has [4, 8, 6]"),
        (Structured(kinds=(HEADS[:3],)).eval(), call, {}, "for heads 4, and blocks.0 has 3"),
        (Structured().eval(), call, {"density": 0.5, "tile": TILE}, "options give density, which outrank it"),
    ]
    for model, given, options, words in cases:
        backend, _ = compiled(model, given, tuning=str(path), **options)
        assert "calibrated" not in notes_of(backend)
        assert words in notes_of(backend)["calibration-ignored"]
        assert str(path) in notes_of(backend)["calibration-ignored"]
    backend, _ = compiled(Structured().eval(), call)
    assert not {"calibrated", "calibration-ignored"} & set(notes_of(backend)), "only where the file is named"


class Alone(nn.Module):
    """Attention of the model itself, of a latent [B, 64, T, H, W]: its site has no name."""

    def forward(self, latent: torch.Tensor) -> torch.Tensor:
        x = latent.flatten(2).transpose(1, 2).unflatten(-1, (2, 32)).transpose(1, 2)
        return nn.functional.scaled_dot_product_attention(x, x, x)


def test_what_the_model_itself_attends_needs_no_layer(tmp_path: Path) -> None:
    path, given = tmp_path / "t.json", [{"latent": torch.randn(1, 64, 4, 8, 8)} for _ in range(2)]
    report = calibrate(Alone(), given, target_density=0.5, options=OPTIONS, path=path)
    assert "layers" not in report.options
    for options in ({"tuning": str(path)}, report.options):
        backend, _ = compiled(Alone(), given[0], **options)
        assert backend.graphs[0].sites[0].density == pytest.approx(report.sites[0].densities)


class Scheduler:
    def __init__(self) -> None:
        self.timesteps, self.step_index = torch.linspace(1000, 100, 4), 0


class Pipeline:
    """What attach and calibrate need of a pipeline: components, a scheduler, a loop."""

    def __init__(self, late: bool) -> None:
        self.transformer, self.scheduler = Structured(late=late).eval(), Scheduler()
        self.components = {"transformer": self.transformer, "scheduler": self.scheduler}

    def __call__(self, seed: int) -> None:
        latent = torch.randn(1, 4, 4, 8, 8, generator=torch.Generator().manual_seed(seed))
        for index, step in enumerate(self.scheduler.timesteps):
            self.scheduler.step_index = index
            latent = latent + 0.1 * self.transformer(latent, timestep=step[None])[:, :, :4].mT.unflatten(2, (4, 8, 8))


def test_pipelines_are_run_and_left_as_they_were(tmp_path: Path) -> None:
    pipe = Pipeline(late=True)
    schedule = [{"start": 0.0, "end": 0.5, "window": "dense"}, {"start": 0.5, "end": 1.0, "window": "dense"}]
    report = calibrate(
        pipe, [{"seed": 1}, {"seed": 2}], max_error=0.05, path=tmp_path / "t.json",
        options={"tile": TILE, "schedule": schedule},
    )  # fmt: skip
    assert report.model == "Structured"
    assert all(made.densities[1] < 0.3 < made.densities[0] for made in report.sites)
    assert [made.held_out_calls for made in report.sites] == [4, 4]
    assert pipe.transformer._compiled_call_impl is None
    assert not pipe.transformer._forward_pre_hooks


def test_pipelines_can_be_calibrated_any_number_of_times(tmp_path: Path) -> None:
    pipe = Pipeline(late=False)
    with torch._dynamo.config.patch(recompile_limit=2):
        for _ in range(4):
            report = calibrate(
                pipe, [{"seed": 1}], max_error=0.05, path=tmp_path / "t.json", options={"tile": TILE}, held_out=0.0
            )
            assert report.density < 1.0


class Experts:
    """Two denoisers of one class, as in Wan 2.2: the first runs while there is much noise, the second afterwards."""

    def __init__(self) -> None:
        self.transformer, self.transformer_2 = Structured().eval(), Structured(late=True).eval()
        self.scheduler = Scheduler()
        self.components = {name: getattr(self, name) for name in ("transformer", "transformer_2", "scheduler")}

    def __call__(self, seed: int) -> None:
        latent = torch.randn(1, 4, 4, 8, 8, generator=torch.Generator().manual_seed(seed))
        for index, step in enumerate(self.scheduler.timesteps):
            self.scheduler.step_index = index
            model = self.transformer if step > 500 else self.transformer_2
            latent = latent + 0.1 * model(latent, timestep=step[None])[:, :, :4].mT.unflatten(2, (4, 8, 8))


def test_each_denoiser_of_a_pipeline_has_a_calibration_of_its_own(tmp_path: Path) -> None:
    pipe, given = Experts(), [{"seed": 1}, {"seed": 2}]
    schedule = [{"start": 0.0, "end": 0.5, "window": "dense"}, {"start": 0.5, "end": 1.0, "window": "dense"}]
    how: dict[str, Any] = {"max_error": 0.05, "options": {"tile": TILE, "schedule": schedule}}
    with pytest.raises(OptionError, match=r"Experts has the denoisers transformer and transformer_2.*denoiser='transf"):
        calibrate(pipe, given, path=tmp_path / "t.json", **how)
    with pytest.raises(OptionError, match="denoiser='dit' is not in Experts, which has transformer and transformer_2"):
        calibrate(pipe, given, path=tmp_path / "t.json", denoiser="dit", **how)
    with pytest.raises(OptionError, match="denoiser='transformer' names a part of a pipeline, and this is a module"):
        calibrate(pipe.transformer, samples(2), path=tmp_path / "t.json", denoiser="transformer", **how)
    names = ("transformer", "transformer_2")
    reports = {name: calibrate(pipe, given, path=tmp_path / f"{name}.json", denoiser=name, **how) for name in names}
    for phase, (name, report) in enumerate(reports.items()):
        assert report.weights == tuple(float(phase == index) for index in (0, 1))
        assert not any("no sample reached" in note for note in report.notes)
        for made in report.sites:
            assert made.densities[phase] < made.densities[1 - phase] == 1.0, "there it never runs"
        mean = sum(made.densities[phase] for made in report.sites) / len(report.sites)
        assert report.density == pytest.approx(mean)
        assert f"Structured, {name}, on grid" in str(report)
        assert f"Structured {name} 4x8x8" in report.key
        assert pipe.components[name]._compiled_call_impl is None
        backend, _ = compiled(pipe.components[name], samples(1)[0], tuning=str(tmp_path / f"{name}.json"))
        assert f"calibration {report.key!r}" in (note := notes_of(backend)["calibrated"])
        assert f"error {report.predicted:.4g}, mean density {report.density:.4g}" in note
    assert reports["transformer"].options != reports["transformer_2"].options
    runs: list[object] = []
    pipe.transformer.register_forward_pre_hook(lambda *_: runs.append(None))
    with pytest.raises(
        OptionError, match=r"transformer\.json holds .*a calibration of transformer, not of transformer_2"
    ):
        calibrate(pipe, given, path=tmp_path / "transformer.json", denoiser="transformer_2", **how)
    assert not runs


def test_means_of_dropped_tiles_are_predicted_saved_and_used(tmp_path: Path) -> None:
    model, given = Structured().eval(), samples(8)
    reports = {
        way: calibrate(model, given, max_error=0.2, path=tmp_path / f"{way}.json", options=OPTIONS | {"remainder": way})
        for way in ("none", "means")
    }
    assert "remainder" not in reports["none"].options
    means = reports["means"]
    assert means.options["remainder"] == "means"
    assert means.key != reports["none"].key
    assert means.measured == pytest.approx(means.predicted, rel=0.3)
    backend, out = compiled(model, given[0], tuning=str(tmp_path / "means.json"))
    plans = [site.plan for graph in backend.graphs for site in graph.sites if site.rewritten]
    assert {plan.remainder for plan in plans if plan is not None} == {"means"}
    exact = model(**given[0])
    assert (out - exact).norm() < 0.3 * exact.norm()


def test_without_a_step_all_steps_share_one_choice(tmp_path: Path) -> None:
    class NoStep(Structured):
        def forward(self, latent: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
            return super().forward(latent, latent.new_ones(1))

    given = [(call["latent"],) for call in samples(4)]
    report = calibrate(NoStep().eval(), given, max_error=0.05, options={"tile": TILE}, path=tmp_path / "t.json")
    assert report.ranges == ((0.0, 1.0),)
    assert any("the denoising step is unknown" in note for note in report.notes)
    assert report.density < 0.3


def test_phases_that_no_sample_reaches_stay_dense(tmp_path: Path) -> None:
    report = calibrate(
        Structured().eval(),
        samples(2, timestep=100.0),
        max_error=0.05,
        options={"tile": TILE},
        path=tmp_path / "t.json",
    )
    assert all(made.densities[:2] == (1.0, 1.0) and made.densities[2] < 0.5 for made in report.sites)
    assert any("no sample reached progress 0-0.2, 0.2-0.6: dense there" in note for note in report.notes)
    report = calibrate(
        Structured().eval(), samples(2, timestep=100.0), target_density=0.5, options={"tile": TILE},
        path=tmp_path / "t.json",
    )  # fmt: skip
    assert any("missed" in note and "60% of the steps are dense, since no sample" in note for note in report.notes)


def test_mistakes_are_named(tmp_path: Path) -> None:
    model, path = Structured().eval(), tmp_path / "t.json"
    for arguments, words in [
        ({}, "max_error=, target_density= or both"),
        ({"max_error": 0.0}, r"max_error=0\.0 must be in \(0, 1\]"),
        ({"target_density": 2}, "target_density=2 must be in"),
        ({"max_error": 0.1, "held_out": 1.0}, r"held_out=1\.0 must be in"),
        ({"max_error": "a"}, "max_error='a' must be in"),
        ({"max_error": 0.1, "held_out": "x"}, "held_out='x' must be in"),
        ({"max_error": 0.1, "rows_per_tile": 0}, "rows_per_tile=0 must be an integer >= 1"),
        ({"max_error": 0.1, "rows_per_tile": 1.5}, r"rows_per_tile=1\.5 must be"),
        ({"max_error": 0.1, "windows": "topk"}, r"windows='topk' must be a list of windows, such as \[\"topk\"\]"),
        ({"max_error": 0.1, "windows": ["topk", "foo"]}, r"windows\[1\] of calibrate: window 'foo'"),
    ]:
        with pytest.raises(OptionError, match=words):
            calibrate(model, samples(1), path=path, **arguments)
    with pytest.raises(OptionError, match="samples must be a non-empty list of calls, not an empty one"):
        calibrate(model, [], max_error=0.1, path=path)
    with pytest.raises(OptionError, match="samples must be a non-empty list of calls, not a dict"):
        calibrate(model, samples(1)[0], max_error=0.1, path=path)
    with pytest.raises(OptionError, match="path=3 must be the name of a tuning file, not of type int"):
        calibrate(model, samples(1), max_error=0.1, path=3)
    for call in (fpscompile.explain, autotune):
        with pytest.raises(OptionError, match="a module or a function of tensors is needed, not 3"):
            call(3, torch.ones(1))
    with pytest.raises(OptionError, match=r"a sample is a call of the module: .* not int"):
        calibrate(model, [3], max_error=0.1, path=path)
    with pytest.raises(OptionError, match="found no denoiser in int"):
        calibrate(3, [{}], max_error=0.1, path=path)
    with pytest.raises(CalibrationError, match="no 3D attention was seen"):
        calibrate(nn.Linear(2, 2), [(torch.ones(1, 2),)], max_error=0.1, path=path)
    with pytest.raises(CalibrationError, match="one resolution at a time"):
        calibrate(Growing().eval(), samples(1) + samples(1, (4, 8, 6)), max_error=0.1, held_out=0.0, path=path)
    (tmp_path / "file").write_text("")
    with pytest.raises(TuningFileError, match="cannot be written"):
        calibrate(model, samples(1), max_error=0.1, path=tmp_path / "file" / "t.json")


class Growing(nn.Module):
    """Takes any grid."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv3d(4, 32, 1)

    def forward(self, latent: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        x = self.embed(latent).flatten(2).transpose(1, 2).unflatten(2, (2, 16)).transpose(1, 2)
        return F.scaled_dot_product_attention(x, x, x)
