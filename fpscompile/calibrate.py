"""``calibrate``: the sparsest windows that keep a model's attention within an error, head by head.

    report = fpscompile.calibrate(pipe, [{"prompt": p} for p in prompts], max_error=0.05, path="wan.json")
    pipe.transformer.compile(backend="fps", options={"tuning": "wan.json"})

The samples run densely once. Of every 3D attention call, statistics on tiles tell how much each candidate window would
change its output (:mod:`fpscompile.calibration.statistics`); one choice over all heads and phases keeps every site
within its error, or the whole model at its density (:mod:`fpscompile.calibration.knapsack`). Samples that were held out
then run through the chosen masks, and the report sets the predicted error beside the measured one.
"""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from fpscompile.calibration.candidates import Candidates, candidates
from fpscompile.calibration.choose import choose
from fpscompile.calibration.held_out import HeldOut
from fpscompile.calibration.observe import Call, Runner, observed
from fpscompile.calibration.report import CalibrationReport, SiteCalibration
from fpscompile.calibration.statistics import SiteStatistics, observe
from fpscompile.errors import FpsError, OptionError
from fpscompile.remainder import extra_density
from fpscompile.schedule import GRANULARITIES
from fpscompile.settings import Settings
from fpscompile.tuning import store
from fpscompile.tuning.format import Contents
from fpscompile.tuning.tuner import tuning_path
from fpscompile.windows import AnyWindow, window_of
from fpscompile.windows.checks import integer, located, real

logger = logging.getLogger("fpscompile.calibration")

ROWS_PER_TILE = 16
"""Query rows of each tile that statistics are taken from, unless the caller says otherwise."""


class CalibrationError(FpsError):
    """The samples showed nothing that could be calibrated."""


def calibrate(
    pipe_or_model: Any,
    samples: Sequence[Any],
    *,
    max_error: float | None = None,
    target_density: float | None = None,
    held_out: float = 0.5,
    options: Mapping[str, Any] | None = None,
    path: str | os.PathLike[str] | None = None,
    windows: Sequence[Any] = (),
    rows_per_tile: int = ROWS_PER_TILE,
    denoiser: str | None = None,
) -> CalibrationReport:
    """Choose windows for each site, group of heads and phase.

    Args:
        pipe_or_model: a diffusers pipeline, or one module.
        samples: for a module its calls, each a dict of keyword arguments, ``(args, kwargs)`` or a tuple of positional
            arguments; for a pipeline what it is called with, a dict or a prompt.
        max_error: largest relative L2 error of any site's output, averaged over samples and steps.
        target_density: kept fraction of the attention FLOPs of the whole model; what keeps the most accuracy is chosen.
            With ``max_error`` as well, no site exceeds that, even if the density is then missed.
        held_out: share of the samples, drawn at random, that are not looked at before the choice is made and then tell
            its error. The draw is always the same.
        options: tile, quant, schedule (of which the ranges of progress count) and the rest, as for compiling.
        path: the tuning file to save in; default ``options["tuning"]``, or the one in the cache folder.
        windows: further candidates, as options spell them. One that needs a density is tried at several: ``["topk"]``
            lets content choose tiles for the heads that no fixed window serves.
        rows_per_tile: query rows of each tile that statistics are taken from.
        denoiser: which of a pipeline's, by its name there ("transformer_2"), where it has several. Each wants a file of
            its own: heads differ, and nothing else tells apart two models of one class. Progress is that of the whole
            pipeline; phases that the denoiser never runs in do not count.

    Raises:
        OptionError: neither or bad targets, no samples, a pipeline with several denoisers and none named, or a file
            that holds the calibration of another one.
        CalibrationError: no 3D attention was seen, or calls of one site differ in grid.
        WindowError: one of ``windows`` that the grid cannot give.
        TuningFileError: the file cannot be written; nothing was run.
    """
    _check(samples, max_error, target_density, held_out, rows_per_tile)
    settings = Settings.from_options(options)
    file = tuning_path(path if path is not None else settings.tuning)
    store.check_writable(file)
    extra = _extra(windows)
    fitting, checking = split(samples, held_out)

    collected = _Statistics(settings, extra, rows_per_tile)
    with torch.no_grad(), observed(pipe_or_model, settings, collected, denoiser) as runner:
        _check_file(file, runner)
        for sample in fitting:
            runner.run(sample)
        ranges = tuple((phase.start, phase.end) for phase in settings.phases.phases)
        if any(graph.progress_source == "unknown" for graph in runner.backend.graphs):
            collected.forget_phases()
            ranges = ((0.0, 1.0),)
        sites = collected.complete()
        grid = next(iter(sites.values())).q_layout.grid
        report = CalibrationReport(runner.name, grid, settings.tile, collected.quant, max_error, target_density, ranges)
        report.remainder, report.denoiser = settings.remainder, runner.denoiser
        if runner.denoiser:
            report.served = frozenset(phase for site in sites.values() for phase in site.phases())
            served = ", ".join(map(report.range_text, sorted(report.served)))
            report.notes.append(f"{runner.denoiser} runs at progress {served}: densities are of these steps")
        report.samples, report.held_out = len(fitting), len(checking)
        report.notes += collected.notes
        if len(ranges) < len(settings.phases.phases):
            report.notes.append("the denoising step is unknown: all steps share one choice; attach tells the step")
        choose(report, sites)
        if checking:
            check = HeldOut(report, one_phase=len(ranges) == 1)
            collected.redirect = check
            for sample in checking:
                runner.run(sample)
            check.finish()
    report.path = file
    Settings.from_options({"quant": report.quant, **report.options})  # what is saved must be what can be used
    store.update(file, Contents(calibrations={report.key: report.entry()}))
    logger.info("%s: density %.3f, predicted %.4f, measured %s", report.key, report.density, report.predicted,
                report.measured)  # fmt: skip
    return report


def split(samples: Sequence[Any], held_out: float) -> tuple[list[Any], list[Any]]:
    """(to fit, to hold out). At random, since samples may come in any order of steps; at least one is fitted."""
    aside = min(len(samples) - 1, round(held_out * len(samples)))
    order = torch.randperm(len(samples), generator=torch.Generator().manual_seed(0)).tolist()
    held = set(order[:aside])
    return [x for i, x in enumerate(samples) if i not in held], [x for i, x in enumerate(samples) if i in held]


def _check(
    samples: Sequence[Any], max_error: float | None, target_density: float | None, held_out: float, rows_per_tile: int
) -> None:
    if max_error is None and target_density is None:
        raise OptionError("calibrate needs max_error=, target_density= or both")
    for name, value in (("max_error", max_error), ("target_density", target_density)):
        number = real(value)
        if value is not None and (number is None or not 0.0 < number <= 1.0):
            raise OptionError(f"{name}={value!r} must be in (0, 1]")
    share = real(held_out)
    if share is None or not 0.0 <= share < 1.0:
        raise OptionError(f"held_out={held_out!r} must be in [0, 1): the share of samples that tell the error")
    if (integer(rows_per_tile) or 0) < 1:
        raise OptionError(f"rows_per_tile={rows_per_tile!r} must be an integer >= 1")
    if not isinstance(samples, Sequence) or isinstance(samples, (str, bytes)) or not samples:
        given = "an empty one" if isinstance(samples, Sequence) and not samples else f"a {type(samples).__name__}"
        raise OptionError(f"samples must be a non-empty list of calls, not {given}")


def _extra(windows: Sequence[Any]) -> tuple[AnyWindow, ...]:
    """Further candidates as options spell them."""
    if isinstance(windows, (str, Mapping)) or not isinstance(windows, Sequence):
        raise OptionError(f'windows={windows!r} must be a list of windows, such as ["topk"]')
    found = []
    for index, window in enumerate(windows):
        with located(f"windows[{index}] of calibrate"):
            found.append(window_of(window))
    return tuple(found)


def _check_file(file: Path, runner: Runner) -> None:
    """A file that holds two calibrations of one class and grid could not tell which model is which."""
    for key, entry in store.load(file).contents.calibrations.items():
        other = entry.get("denoiser", "")
        if entry.get("model") == runner.name and other != runner.denoiser:
            raise OptionError(
                f"{file} holds {key!r}, a calibration of {other or 'a model by itself'}, not of "
                f"{runner.denoiser or 'a model by itself'}: nothing would tell which of them a {runner.name} wants; "
                "name another file (path=)"
            )


class _Statistics:
    """Gathers what the fitting samples show, site by site; then passes calls on to ``redirect``."""

    def __init__(self, settings: Settings, extra: tuple[AnyWindow, ...], rows_per_tile: int) -> None:
        self.quant = "none" if settings.quant == "auto" else settings.quant
        self.remainder = settings.remainder
        self.granularities = GRANULARITIES if self.quant == "fp8" else ("tile",)
        self.extra = extra
        self.rows_per_tile = rows_per_tile
        self.sites: dict[str, SiteStatistics] = {}
        self.known: dict[Any, Candidates] = {}
        self.redirect: HeldOut | None = None
        self.notes: list[str] = []

    def __call__(self, call: Call) -> None:
        if self.redirect is not None:
            self.redirect(call)
            return
        q_layout, k_layout = call.resolved.q_layout, call.resolved.k_layout
        site = self.sites.get(call.site)
        if site is None:
            key = (q_layout, k_layout)
            if key not in self.known:
                beside = extra_density(call.resolved) if self.remainder == "means" else 0.0
                self.known[key] = candidates(q_layout, k_layout, self.extra, beside)
            site = SiteStatistics(
                call.site, call.q.shape[1], call.q.shape[3], q_layout, k_layout, self.known[key],
                tuple(self.granularities), self.quant, self.remainder,
            )  # fmt: skip
            self.sites[call.site] = site
        if (site.q_layout, site.k_layout, site.heads) != (q_layout, k_layout, call.q.shape[1]):
            raise CalibrationError(
                f"{call.site} is called on grid {site.q_layout.grid} and {q_layout.grid}, or with other text lengths; "
                "calibrate one resolution at a time"
            )
        for b, phase in enumerate(call.phases):
            mask = call.key_mask
            if mask is not None:
                mask = mask[b if mask.shape[0] > 1 else 0]
            site.calls.append(
                observe(call.q[b], call.k[b], call.v[b], mask, phase, call.scale, site, self.rows_per_tile)
            )

    def forget_phases(self) -> None:
        """All calls are of one phase: nothing told them apart."""
        for site in self.sites.values():
            site.calls = [dataclasses.replace(call, phase=0) for call in site.calls]

    def complete(self) -> dict[str, SiteStatistics]:
        """All sites.

        Raises:
            CalibrationError: there are none.
        """
        if not self.sites:
            raise CalibrationError(
                "no 3D attention was seen in the samples: fpscompile.explain says what became of each attention call"
            )
        grids = {site.q_layout.grid for site in self.sites.values()}
        if len(grids) > 1:
            raise CalibrationError(f"the model attends on several grids, {sorted(grids)}: calibrate one at a time")
        return self.sites


__all__ = ["CalibrationError", "CalibrationReport", "SiteCalibration", "calibrate"]
