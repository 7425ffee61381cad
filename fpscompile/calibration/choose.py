"""From statistics to windows: one choice over all heads, phases and sites, under the report's budgets."""

from __future__ import annotations

import logging
from collections.abc import Hashable, Mapping, Sequence

import torch

from fpscompile.calibration.knapsack import Item, solve
from fpscompile.calibration.report import CalibrationReport, SiteCalibration
from fpscompile.calibration.statistics import SiteStatistics, relative_error
from fpscompile.windows import window_text

logger = logging.getLogger("fpscompile.calibration")

GRANULARITY_SHARE = 0.25
"""Share of a squared error budget that FP8's own error may take: the coarsest granularity within it is used."""


ROUNDS = 12
"""The choice under ``max_error`` is refined so often at most."""

SMALLEST_TANGENT = 0.25
"""Calls that err less than this share of ``max_error`` count as if they erred so much: no step could begin from exact
ones."""

Place = tuple[str, int, int]
"""(site, phase, head)."""


def choose(report: CalibrationReport, sites: Mapping[str, SiteStatistics]) -> None:
    """Solve for all sites and write the choices into the report."""
    weights = report.weights
    finest = {
        (name, phase): _granularity(site, site.bounded_error(phase), report.max_error)
        for name, site in sites.items()
        for phase in site.phases()
    }
    dense_cost = sum(_flops(site) for site in sites.values())
    target, unseen = None, 0.0
    if report.target_density is not None:
        unseen = sum(
            weights[phase] * _flops(site)
            for site in sites.values()
            for phase in range(len(weights))
            if phase not in site.phases()
        )
        target = report.target_density * dense_cost - unseen
    chosen, cost = _solved(report, sites, finest, target)
    for name, site in sites.items():
        dense = site.candidates.dense
        own = sum(
            site.share(phase) * float(site.bounded_error(phase)[:, dense, finest[name, phase]].sum())
            for phase in site.phases()
        )
        if report.max_error is not None and own > report.max_error**2:
            # quantization alone is too much: no window could make it right
            chosen |= {place: dense for place in chosen if place[0] == name}
    for site in sites.values():
        report.sites.append(_site(report, site, chosen, finest))
    report.single_density = _single(report, sites, finest)
    if target is not None and cost > target + 1e-9 * dense_cost:
        cause = "max_error allows no less" if report.max_error is not None else "no candidate is sparser"
        if unseen > 0:
            cause = f"{unseen / dense_cost:.0%} of the steps are dense, since no sample reached them; elsewhere {cause}"
        report.notes.append(
            f"target_density={report.target_density} is missed, the density is {report.density:.4f}: {cause}"
        )
    for note in report.notes:
        logger.warning("%s", note)


def _solved(
    report: CalibrationReport,
    sites: Mapping[str, SiteStatistics],
    levels: Mapping[tuple[str, int], int],
    target: float | None,
) -> tuple[dict[Place, int], float]:
    """(candidate of each place, FLOPs).

    A budget is of the mean over calls of the error ``e``, and what adds up over heads is its square. By the tangent at
    any ``r``, ``e <= (r + e**2 / r) / 2``: with an ``r`` for each call, a budget on ``mean(e**2 / r)`` keeps the mean
    within its own. The first round has ``r = max_error``, which bounds the mean of squares; each further one has the
    errors of the choice before, where the bound is exact, so that steps which err little make room for others.
    """
    limit = report.max_error
    tangents = {name: torch.full((len(site.calls),), limit or 1.0).double() for name, site in sites.items()}
    best: tuple[dict[Place, int], float] | None = None
    for _ in range(ROUNDS):
        items: list[Item] = []
        places: list[Place] = []
        for name, site in sites.items():
            flops = _flops(site) / site.heads
            for phase in site.phases():
                bounded = site.bounded_error(phase, 1 / tangents[name])[..., levels[name, phase]]
                costs = [report.weights[phase] * flops * density for density in site.candidates.densities]
                for head, errors in enumerate(site.share(phase) * bounded):
                    items.append(Item(name, costs, errors.tolist()))
                    places.append((name, phase, head))
        budgets: dict[Hashable, float] = {}
        if limit is not None:
            budgets = {name: 2 * limit - float(r.mean()) for name, r in tangents.items()}
        solution = solve(items, budgets, target)
        chosen = dict(zip(places, solution.choices, strict=True))
        if best is not None and solution.cost >= best[1] * (1 - 1e-9):
            break
        best = chosen, solution.cost
        if limit is None or (target is not None and solution.cost <= target):
            break
        for name, site in sites.items():
            tangents[name] = _errors(site, chosen, levels).clamp(min=SMALLEST_TANGENT * limit)
    assert best is not None
    return best


def _errors(site: SiteStatistics, chosen: Mapping[Place, int], levels: Mapping[tuple[str, int], int]) -> torch.Tensor:
    """float64 [calls]: the site's relative error in each call."""
    heads = torch.arange(site.heads)
    picks = {
        phase: torch.tensor([chosen[site.name, phase, head] for head in range(site.heads)]) for phase in site.phases()
    }
    squares = [call.error[heads, picks[call.phase], levels[site.name, call.phase]].sum() for call in site.calls]
    return torch.stack(squares).clamp(min=0).sqrt()


def _flops(site: SiteStatistics) -> float:
    return 4.0 * site.heads * site.head_dim * site.q_layout.length * site.k_layout.length


def _granularity(site: SiteStatistics, errors: torch.Tensor, max_error: float | None) -> int:
    """Index of the coarsest granularity whose own error is small beside the budget; else of the most accurate."""
    own = errors[:, site.candidates.dense].sum(0)
    if max_error is not None:
        for index, value in enumerate(own.tolist()):
            if value <= GRANULARITY_SHARE * max_error**2:
                return index
    return int(own.argmin())


def _site(
    report: CalibrationReport,
    site: SiteStatistics,
    chosen: Mapping[tuple[str, int, int], int],
    levels: Mapping[tuple[str, int], int],
) -> SiteCalibration:
    options = site.candidates
    windows, densities, granularities, unseen = [], [], [], []
    picks: dict[int, torch.Tensor] = {}
    for phase in range(len(report.ranges)):
        if phase not in site.phases():
            unseen += [phase] if report.weights[phase] else []
            picks[phase] = torch.full((site.heads,), options.dense)
        else:
            picks[phase] = torch.tensor([chosen[site.name, phase, head] for head in range(site.heads)])
        windows.append(tuple(options.windows[index] for index in picks[phase].tolist()))
        densities.append(sum(options.densities[index] for index in picks[phase].tolist()) / site.heads)
        granularities.append(site.granularities[levels.get((site.name, phase), len(site.granularities) - 1)])
    predicted = float(_errors(site, chosen, levels).mean())
    made = SiteCalibration(
        site.name, site.heads, site.head_dim, tuple(windows), tuple(granularities), tuple(densities), predicted,
        _uniform(site, levels, max(predicted, report.max_error or 0.0), report.weights), _flops(site),
        tuple(site.share(phase) for phase in range(len(report.ranges))),
    )  # fmt: skip
    if unseen:
        ranges = ", ".join(map(report.range_text, unseen))
        report.notes.append(f"{site.name}: no sample reached progress {ranges}: dense there")
    if all(density >= options.densities[-1] - 1e-12 for density in densities):
        made.reason = _why_dense(site, levels, report.max_error)
    return made


def _single(
    report: CalibrationReport, sites: Mapping[str, SiteStatistics], levels: Mapping[tuple[str, int], int]
) -> float:
    """Density of the sparsest candidate that keeps every site within its error, for the whole model."""
    errors = {site.name: max(site.predicted, report.max_error or 0.0) for site in report.sites}
    total = sum(_flops(site) for site in sites.values())
    best = 1.0
    for window in dict.fromkeys(window for site in sites.values() for window in site.candidates.windows):
        densities = {
            name: _within(site, site.candidates.windows.index(window), levels, errors[name], report.weights)
            for name, site in sites.items()
            if window in site.candidates.windows
        }
        if len(densities) == len(sites) and None not in densities.values():
            mean = sum(_flops(sites[name]) * float(density or 0.0) for name, density in densities.items()) / total
            best = min(best, mean)
    return best


def _uniform(
    site: SiteStatistics, levels: Mapping[tuple[str, int], int], budget: float, weights: Sequence[float]
) -> float:
    """Mean density of the sparsest candidate that keeps the site within an error, for all heads and phases alike; where
    no sample came, it is dense as well."""
    found = (_within(site, index, levels, budget, weights) for index in range(len(site.candidates.densities)))
    return next((density for density in found if density is not None), site.candidates.densities[-1])


def _within(
    site: SiteStatistics, index: int, levels: Mapping[tuple[str, int], int], budget: float, weights: Sequence[float]
) -> float | None:
    """Mean density of a site that has one candidate throughout; None if it errs more than ``budget``."""
    errors = [call.error[:, index, levels[site.name, call.phase]].sum() for call in site.calls]
    if relative_error(errors) > budget * (1 + 1e-9):
        return None
    seen = sum(weights[phase] for phase in site.phases())
    return seen * site.candidates.densities[index] + (1 - seen) * site.candidates.densities[-1]


def _why_dense(site: SiteStatistics, levels: Mapping[tuple[str, int], int], max_error: float | None) -> str:
    options = site.candidates
    dense = float(torch.stack([c.error[:, -1, levels[site.name, c.phase]].sum() for c in site.calls]).sqrt().mean())
    if max_error is not None and dense > max_error:
        return f"quantization alone errs by {dense:.3f}, more than max_error={max_error:g}"
    if max_error is None:
        return "other sites save more for the error they add"
    if options.dense == 0:
        return "one tile holds the whole grid: choose a smaller tile"
    steps = []
    for phase in site.phases():
        errors = site.share(phase) * site.mean_error(phase)[..., levels[site.name, phase]]
        steps += [(float(errors[head, index]) ** 0.5, head, index) for head in range(site.heads)
                  for index in range(options.dense)]  # fmt: skip
    least, head, index = min(steps)
    return (
        f"max_error={max_error:g} allows no other window: the least harmful, {window_text(options.windows[index])} for "
        f"head {head} alone, errs by {least:.3f}"
    )
