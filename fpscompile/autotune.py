"""``autotune``: measure, once, the fastest way to compute a model's attention on this machine, and keep it.

    report = fpscompile.autotune(model, latent, timestep=t, options={"density": 0.2})
    compiled = torch.compile(model, backend="fps", options={"density": 0.2})     # uses what was found

The model is captured as ``torch.compile`` captures it, without being compiled. Its sites are grouped by signature
(shape, mask, device), and each signature is measured with random tensors of its shape under the plan's own mask. Tile
and mask stay as the options have them: only who computes them, and how, is chosen. Where content chooses tiles, the
random tensors choose as many. With ``tile="auto"`` the tile may change as well, to one that keeps at least as many
pairs in every phase and errs no more on the call's own tensors.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from fpscompile.capture import captured, original
from fpscompile.errors import FpsError
from fpscompile.passes.base import GraphState
from fpscompile.settings import Settings
from fpscompile.site_groups import name_pattern
from fpscompile.tuning import store
from fpscompile.tuning.capture import Collector, problem_of, site_name
from fpscompile.tuning.problem import Candidate, Problem
from fpscompile.tuning.signature import Signature
from fpscompile.tuning.tuner import Tuned, Tuner, tuning_path

REAL_CALLS = 3
"""Sites of each signature, spread over the model, by whose call another tile is judged, with ``tile="auto"``."""


@dataclass
class TunedGroup:
    """Sites of one signature."""

    names: list[str]
    signature: Signature
    tuned: Tuned | None = None
    problem: str = ""
    """Why it was not tuned, a sentence; "" when it was."""


@dataclass
class TuningReport:
    """What :func:`autotune` found. ``str(report)`` and ``rich.print(report)`` show a table."""

    path: Path
    effort: str
    groups: list[TunedGroup] = field(default_factory=list)
    declined: list[tuple[str, str]] = field(default_factory=list)
    """(site, reason) of 3D attention that is not rewritten, and so not tuned."""
    notes: list[str] = field(default_factory=list)
    """What became of a calibration that the file holds."""
    unsaved: str = ""
    """Why nothing was saved; "" when it was."""
    seconds: float = 0.0
    """Wall time spent on looking up and measuring, the capture aside."""

    @property
    def measurements(self) -> int:
        """Timed runs of this call; 0 when the file held everything."""
        return sum(group.tuned.measurements for group in self.groups if group.tuned is not None)

    def to_dict(self) -> dict[str, Any]:
        """Plain data that ``json.dumps`` takes."""
        return {
            "path": str(self.path),
            "effort": self.effort,
            "measurements": self.measurements,
            "seconds": self.seconds,
            "unsaved": self.unsaved,
            "notes": list(self.notes),
            "groups": [
                {
                    "sites": group.names,
                    "signature": group.signature.to_dict(),
                    "result": group.tuned.entry(self.effort) if group.tuned is not None else None,
                    "tried": [list(pair) for pair in group.tuned.tried] if group.tuned is not None else [],
                    "notes": list(group.tuned.notes) if group.tuned is not None else [],
                    "problem": group.problem,
                }
                for group in self.groups
            ],
            "declined": [{"site": name, "reason": reason} for name, reason in self.declined],
        }

    def __rich__(self) -> Group:
        kept = f"kept in {self.path}" if not self.unsaved else f"not saved: {self.unsaved}"
        title = f"{self.measurements} measurements in {self.seconds:.1f} s, {kept}"
        if not self.groups and not self.declined:
            return Group(Text("no 3D attention call was seen: fpscompile.explain says what became of each call"))
        table = Table()
        for name in ("sites", "shape", "density", "kernel", "ms", "untuned ms", "speed-up", "error"):
            table.add_column(name, justify="right" if name not in ("sites", "shape", "kernel") else "left")
        for group in self.groups:
            shape, density = group.signature, " / ".join(f"{d:.2f}" for d in group.signature.density)
            grid = "x".join(map(str, shape.grid))
            row = [name_pattern(group.names), f"{grid}, {shape.heads} x {shape.head_dim}, {shape.dtype}", density]
            if group.tuned is None:
                table.add_row(*row, group.problem)
                continue
            tuned = group.tuned
            numbers = (1e3 * tuned.seconds, 1e3 * tuned.default_seconds)
            row += [f"{tuned.candidate}{' (kept)' if tuned.cached else ''}", *(f"{number:.2f}" for number in numbers)]
            table.add_row(*row, f"{tuned.speedup:.2f}x", f"{tuned.error:.1e}")
        for name, reason in self.declined:
            table.add_row(name, "", "", f"left as it is: {reason}")
        return Group(Text(title), *map(Text, self.notes), table)

    def __str__(self) -> str:
        with open(os.devnull, "w") as nowhere:
            console = Console(width=160, record=True, file=nowhere, color_system=None, legacy_windows=False)
            console.print(self.__rich__())
            return console.export_text(styles=False).rstrip()


def autotune(
    model: Any,
    *args: Any,
    effort: str = "quick",
    options: Mapping[str, Any] | None = None,
    path: str | os.PathLike[str] | None = None,
    progress: bool | None = None,
    **kwargs: Any,
) -> TuningReport:
    """Find the fastest kernel for each of the model's attention calls, or find it kept from before.

    Args:
        model: a module, compiled or not, or a function of tensors.
        args, kwargs: one real call; its resolution, dtype and device are those to be tuned.
        effort: "quick" (about ten seconds for each signature, and what building kernels takes) or "full" (all configs,
            up to two minutes each). A full search is not satisfied with what a quick one kept.
        options: the options that the model will be compiled with; the plan's density is measured.
        path: the tuning file; default ``options["tuning"]``, or the one in the cache folder, which compilations read.
            Where it holds a calibration of the model, kernels are measured under that, as for ``options["tuning"]``.
        progress: whether to show a progress bar; default where stderr is a terminal.

    Interrupting (Ctrl-C) keeps every signature that is done.

    Raises:
        OptionError: a bad option or effort.
        TuningFileError: the file cannot be written; nothing was measured.
    """
    settings = Settings.from_options(options)
    file = tuning_path(path if path is not None else settings.tuning)
    if path is not None and settings.tuning is None:
        settings = dataclasses.replace(settings, tuning=os.fspath(path))  # for its calibration
    report = TuningReport(file, effort)
    tuner = Tuner(file, effort)
    store.check_writable(file)
    problems = _problems(model, args, kwargs, settings, report)
    began = time.perf_counter()
    with _bar(progress, len(problems)) as (say, advance):
        tuner.on_measurement = say
        for group, problem, default in problems:
            try:
                with torch.no_grad():
                    group.tuned = tuner.tune(problem, default)
            except FpsError as error:
                group.problem = str(error)
            advance()
    report.unsaved = tuner.unsaved
    report.seconds = time.perf_counter() - began
    return report


def _problems(
    model: Any, args: tuple[Any, ...], kwargs: dict[str, Any], settings: Settings, report: TuningReport
) -> list[tuple[TunedGroup, Problem, Candidate]]:
    """One problem for each signature of the model, listed in the report as well."""
    found: dict[str, tuple[TunedGroup, Problem, Candidate]] = {}

    def look(state: GraphState) -> None:
        notes = (note.message for note in state.notes if note.code in ("calibrated", "calibration-ignored"))
        report.notes += [message for message in notes if message not in report.notes]
        for site in state.sites:
            if site.kind != "3d":
                continue
            name = site_name(site)
            if site.node not in state.plans:
                reason = site.rejection.message if site.rejection is not None else "it has no plan"
                report.declined.append((name, reason))
                continue
            plan = state.plans[site.node]
            problem = problem_of(site, plan, state)
            key = problem.signature.key
            if key not in found:
                group = TunedGroup([], problem.signature)
                report.groups.append(group)
                found[key] = (group, problem, Candidate(plan.lowering))
            found[key][0].names.append(name)

    # Plans then name the default lowering, whatever the tuning file holds.
    plain = dataclasses.replace(settings, autotune="off", strict=False, inner="eager", inner_options=())
    captured(model, Collector(plain, look))(*args, **kwargs)
    if settings.free_tile:
        calls = _real_calls(model, args, kwargs, settings, [item[:2] for item in found.values()])
        for key, (group, problem, default) in found.items():
            found[key] = (group, dataclasses.replace(problem, references=tuple(calls.get(key, ()))), default)
    return list(found.values())


def _real_calls(
    model: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    settings: Settings,
    groups: Sequence[tuple[TunedGroup, Problem]],
) -> dict[str, list[tuple[torch.Tensor | None, ...]]]:
    """Key of a signature -> q, k, v and key mask of a call of some of its sites, from a dense run."""
    from fpscompile.calibration.observe import Call, observed

    wanted = {name: group.signature.key for group, _ in groups for name in spread(group.names, REAL_CALLS)}
    # Calls of a function, or of the model's own forward, have no module to be named by.
    shapes = {
        (problem.heads, problem.resolved.q_layout.length, problem.resolved.k_layout.length): group.signature.key
        for group, problem in groups
    }
    found: dict[str, list[tuple[torch.Tensor | None, ...]]] = {}

    def look(call: Call) -> None:
        shape = (call.q.shape[1], call.q.shape[2], call.k.shape[2])
        key = wanted.pop(call.site, None) if call.site else shapes.get(shape)
        if key is None or len(found.setdefault(key, [])) >= REAL_CALLS:
            return
        mask = None if call.key_mask is None else call.key_mask[:1].clone()
        found[key].append((call.q[:1].clone(), call.k[:1].clone(), call.v[:1].clone(), mask))

    with torch.no_grad(), observed(original(model), settings, look) as runner:
        runner.run((args, kwargs))
    return found


def spread(names: Sequence[str], count: int) -> list[str]:
    """``count`` of the names, the first and the last among them; all where there are no more."""
    if len(names) <= count:
        return list(names)
    return [names[round(index * (len(names) - 1) / (count - 1))] for index in range(count)]


@contextlib.contextmanager
def _bar(asked: bool | None, total: int) -> Iterator[tuple[Callable[[str], None], Callable[[], None]]]:
    """(say what is going on, advance by one): a bar on stderr where that is a terminal, else nothing."""
    if not (sys.stderr.isatty() if asked is None else asked) or not total:
        yield (lambda text: None), (lambda: None)
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (
        TextColumn("tuning"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[now]}"),
    )
    with Progress(*columns, console=Console(stderr=True, force_terminal=True), transient=True) as progress:
        task = progress.add_task("tuning", total=total, now="")
        yield (lambda text: progress.update(task, now=text)), (lambda: progress.advance(task))
