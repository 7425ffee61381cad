"""What a calibration decided: a table for people, options for the compiler, an entry for the tuning file."""

from __future__ import annotations

import datetime
import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from fpscompile.ranges import Ranges
from fpscompile.windows import AnyWindow, Dense, Heads, pattern_of, spec_of, window_text


@dataclass
class SiteCalibration:
    """What was decided for one site."""

    name: str
    heads: int
    head_dim: int
    windows: tuple[tuple[AnyWindow, ...], ...]
    """[phase][head]."""
    granularities: tuple[str, ...]
    """One per phase."""
    densities: tuple[float, ...]
    """Mean over heads, per phase."""
    predicted: float
    """Relative L2 error of the site's output: mean over the fitting calls."""
    uniform_density: float
    """Of the sparsest single window for all heads and phases that keeps the site within the same error."""
    flops: float
    """Of one dense forward."""
    shares: tuple[float, ...]
    """Of the fitting calls, per phase."""
    measured: float | None = None
    """The same error on held-out samples, through the masks themselves; None without any."""
    held_out_calls: int = 0
    reason: str = ""
    """Why the site stays dense, a sentence; "" where it does not."""

    def groups(self, phase: int) -> dict[str, AnyWindow]:
        """Ranges of heads, "0-2,5", to their window, the most common last."""
        chosen: dict[AnyWindow, list[int]] = {}
        for head, window in enumerate(self.windows[phase]):
            chosen.setdefault(window, []).append(head)
        ordered = sorted(chosen.items(), key=lambda item: len(item[1]))
        return {Ranges.of(heads).text: window for window, heads in ordered}

    def window(self, phase: int) -> AnyWindow:
        """All heads in one phase as one window."""
        *others, (_, rest) = self.groups(phase).items()
        if not others:
            return rest
        return Heads({heads: pattern_of(window) for heads, window in others}, pattern_of(rest))  # type: ignore[arg-type]


@dataclass
class CalibrationReport:
    """What :func:`calibrate` decided. ``str(report)`` and ``rich.print(report)`` show a table."""

    model: str
    grid: tuple[int, int, int]
    tile: tuple[int, int, int]
    quant: str
    max_error: float | None
    target_density: float | None
    ranges: tuple[tuple[float, float], ...]
    """Of denoising progress, one per phase."""
    sites: list[SiteCalibration] = field(default_factory=list)
    samples: int = 0
    held_out: int = 0
    single_density: float = 1.0
    """Of the sparsest window that keeps every site within its error, the same for all heads, phases and sites."""
    remainder: str = "none"
    """As the option of this name. With "means" a density counts what they cost too."""
    notes: list[str] = field(default_factory=list)
    path: Path | None = None
    """Where it is saved."""
    denoiser: str = ""
    """Which of a pipeline's, where it has several."""
    served: frozenset[int] | None = None
    """Phases that this denoiser runs in, where a pipeline has several; None: all."""

    @property
    def weights(self) -> tuple[float, ...]:
        """Share of the denoising steps in each phase, of those that the model runs in."""
        sizes = [
            end - start if self.served is None or phase in self.served else 0.0
            for phase, (start, end) in enumerate(self.ranges)
        ]
        return tuple(size / sum(sizes) for size in sizes)

    def range_text(self, phase: int) -> str:
        """ "0.2-0.6"."""
        start, end = self.ranges[phase]
        return f"{start:g}-{end:g}"

    def _mean(self, values: Mapping[str, float]) -> float:
        total = sum(site.flops for site in self.sites)
        return sum(site.flops * values[site.name] for site in self.sites) / total

    @property
    def density(self) -> float:
        """Kept fraction of the attention FLOPs: mean over steps, all sites."""
        means = {s.name: sum(w * d for w, d in zip(self.weights, s.densities, strict=True)) for s in self.sites}
        return self._mean(means)

    @property
    def uniform_density(self) -> float:
        """The same if each site had one window for all heads and phases, at the same error."""
        return self._mean({site.name: site.uniform_density for site in self.sites})

    @property
    def predicted(self) -> float:
        """Mean over sites."""
        return sum(site.predicted for site in self.sites) / len(self.sites)

    @property
    def measured(self) -> float | None:
        """Mean over sites, on held-out samples."""
        known = [site.measured for site in self.sites if site.measured is not None]
        return sum(known) / len(known) if known else None

    @property
    def options(self) -> dict[str, Any]:
        """Options that compile the model as calibrated: plain data. What the model itself attends needs no layer."""
        layers = {site.name: {"schedule": self._schedule(site)} for site in self.sites if site.name}
        own = next((self._schedule(site) for site in self.sites if not site.name), None)
        dense = [{"start": start, "end": end, "window": spec_of(Dense())} for start, end in self.ranges]
        options: dict[str, Any] = {"tile": list(self.tile), "schedule": own or dense}
        if layers:
            options["layers"] = layers
        return options if self.remainder == "none" else {**options, "remainder": self.remainder}

    def _schedule(self, site: SiteCalibration) -> list[dict[str, Any]]:
        phases = []
        for index, (start, end) in enumerate(self.ranges):
            phase = {"start": start, "end": end, "window": spec_of(site.window(index))}
            if self.quant == "fp8":
                phase["granularity"] = site.granularities[index]
            phases.append(phase)
        return phases

    @property
    def remarks(self) -> list[str]:
        """Why sites stay dense, and the notes: a sentence each."""
        return [
            f"{site.name or self.model} stays dense: {site.reason}" for site in self.sites if site.reason
        ] + self.notes

    @property
    def key(self) -> str:
        """Of the entry in the tuning file."""
        sites = [(site.name, site.heads, site.head_dim) for site in self.sites]
        with_means = [] if self.remainder == "none" else [self.remainder]
        digest = hashlib.sha256(json.dumps([sites, self.tile, self.quant, *with_means]).encode()).hexdigest()[:8]
        denoiser = f" {self.denoiser}" if self.denoiser else ""
        return f"{self.model}{denoiser} {'x'.join(map(str, self.grid))} {digest}"

    def entry(self) -> dict[str, Any]:
        """As the tuning file holds it."""
        return {
            "model": self.model,
            **({"denoiser": self.denoiser} if self.denoiser else {}),
            "grid": list(self.grid),
            "quant": self.quant,
            "max_error": self.max_error,
            "target_density": self.target_density,
            "density": round(self.density, 6),
            "predicted": self.predicted,
            "measured_error": self.measured,
            "samples": self.samples,
            "held_out": self.held_out,
            "measured": datetime.datetime.now(datetime.UTC).isoformat(timespec="microseconds"),
            "sites": {
                site.name: {
                    "heads": site.heads,
                    "head_dim": site.head_dim,
                    "density": [round(density, 6) for density in site.densities],
                    "predicted": site.predicted,
                    "measured": site.measured,
                    "reason": site.reason,
                }
                for site in self.sites
            },
            "options": self.options,
        }

    def __rich__(self) -> Group:
        measured = f", measured {self.measured:.2%} on {self.held_out} held-out samples" if self.measured else ""
        what = f"{self.model}, {self.denoiser}," if self.denoiser else self.model
        title = (
            f"{what} on grid {'x'.join(map(str, self.grid))}: density {self.density:.3f} (with one window for "
            f"all heads of the model {self.single_density:.3f}, of each site {self.uniform_density:.3f}), error "
            f"predicted {self.predicted:.2%}{measured}"
        )
        table = Table()
        for name in ("site", "progress", "heads: window", "density", "predicted", "measured"):
            table.add_column(name)
        for site in self.sites:
            for index in range(len(self.ranges)):
                groups = "; ".join(f"{heads}: {window_text(window)}" for heads, window in site.groups(index).items())
                errors = [f"{site.predicted:.2%}", "" if site.measured is None else f"{site.measured:.2%}"]
                name = (site.name or "(model)") if index == 0 else ""
                shown = errors if index == len(self.ranges) - 1 else ["", ""]
                table.add_row(name, self.range_text(index), groups, f"{site.densities[index]:.3f}", *shown)
        return Group(Text(title), table, *(Text(line) for line in self.remarks))

    def __str__(self) -> str:
        with open(os.devnull, "w") as nowhere:
            console = Console(width=160, record=True, file=nowhere, color_system=None, legacy_windows=False)
            console.print(self.__rich__(), soft_wrap=True)
            return console.export_text(styles=False).rstrip()
