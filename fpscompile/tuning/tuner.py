"""Measure one site, check the winner, keep the result; or find it kept."""

from __future__ import annotations

import contextlib
import datetime
import logging
import os
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fpscompile.errors import FpsError, OptionError
from fpscompile.tuning import store
from fpscompile.tuning.candidates import candidates
from fpscompile.tuning.format import Contents
from fpscompile.tuning.problem import Candidate, Problem
from fpscompile.tuning.race import EFFORTS, race
from fpscompile.tuning.signature import Signature, versions
from fpscompile.windows.checks import check_window

logger = logging.getLogger("fpscompile.tuning")


GIVE_UP = 1.5
"""Ratio to the fastest candidate at which a quick search does not build further configs of a lowering: those of one
lowering differ by less."""


@dataclass(frozen=True)
class Tuned:
    """What is known of one signature."""

    signature: Signature
    candidate: Candidate
    """The winner; the untuned default where nothing beat it."""
    seconds: float
    """Median time of one forward of the site, the mean over denoising steps."""
    default: Candidate
    default_seconds: float
    error: float
    """Relative error of the winner's output under its mask, against exact arithmetic."""
    measurements: int = 0
    """How many runs this call timed; 0 when the entry was found in the file."""
    tried: tuple[tuple[str, float], ...] = ()
    """(candidate, median seconds) of everything measured in this call, the fastest first."""
    notes: tuple[str, ...] = ()
    """Candidates that could not run, or whose result was refused."""

    @property
    def cached(self) -> bool:
        return self.measurements == 0

    @property
    def speedup(self) -> float:
        """Of the winner over the default."""
        return self.default_seconds / self.seconds

    def entry(self, effort: str) -> dict[str, Any]:
        """As the tuning file holds it."""
        return {
            "signature": self.signature.to_dict(),
            "lowering": self.candidate.lowering,
            "config": dict(self.candidate.config),
            **self._tile(),
            "seconds": self.seconds,
            "default": {"lowering": self.default.lowering, "config": dict(self.default.config)},
            "default_seconds": self.default_seconds,
            "error": self.error,
            "effort": effort,
            "measured": datetime.datetime.now(datetime.UTC).isoformat(timespec="microseconds"),
            "versions": versions(self.candidate.lowering),
        }

    def _tile(self) -> dict[str, Any]:
        if self.candidate.tile is None:
            return {}
        return {"tile": list(self.candidate.tile), "windows": [list(window) for window in self.candidate.windows]}


class WrongResultError(FpsError):
    """No candidate computes what the reference computes, the default included."""


def find(contents: Contents, signature: Signature) -> tuple[Tuned | None, str]:
    """The kept entry of a signature; or None and why there is none, a clause without a subject."""
    entry = contents.sites.get(signature.key)
    if entry is None:
        return None, "holds no entry for it"
    try:
        winner, default = _candidate(entry), _candidate(entry["default"])
        known = versions(winner.lowering)
        if entry["versions"] != known:
            return None, f"has an entry for it made with {_versions(entry['versions'])}; this is {_versions(known)}"
        numbers = [float(entry[name]) for name in ("seconds", "default_seconds", "error")]
    except (KeyError, TypeError, ValueError, AttributeError, ImportError, FpsError) as error:
        return None, f"has an entry for it that is not readable ({type(error).__name__}: {error})"
    return Tuned(signature, winner, numbers[0], default, numbers[1], numbers[2]), ""


def _candidate(entry: Mapping[str, Any]) -> Candidate:
    config = tuple(sorted(entry["config"].items()))
    if "tile" not in entry:
        return Candidate(str(entry["lowering"]), config)
    windows = tuple(check_window(window) for window in entry["windows"])
    return Candidate(str(entry["lowering"]), config, check_window(entry["tile"]), windows)


def _versions(found: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {version}" for name, version in sorted(found.items()))


@dataclass
class Tuner:
    """Finds or measures sites, one after another, and saves each as soon as it is known."""

    path: Path
    effort: str = "quick"
    on_measurement: Callable[[str], None] = lambda text: None
    """Called before each timed run with what is being measured."""
    unsaved: str = ""
    """Why results are kept in memory only; "" while saving works."""
    _kept: Contents = field(default_factory=Contents)

    def __post_init__(self) -> None:
        if self.effort not in EFFORTS:
            raise OptionError(f"effort={self.effort!r} is unknown; choose one of {', '.join(map(repr, EFFORTS))}")

    def find(self, problem: Problem) -> tuple[Tuned | None, str]:
        """The kept entry, of this tuner or of its file; a quick one does not answer a full search."""
        signature = problem.signature
        contents = store.load(self.path).contents.merged(self._kept)
        found, reason = find(contents, signature)
        if found is not None and self.effort == "full" and contents.sites[signature.key].get("effort") != "full":
            return None, "holds only the result of a quick search"
        return found, reason

    def tune(self, problem: Problem, default: Candidate) -> Tuned:
        """The kept entry, or a new one, measured now and saved.

        Raises:
            WrongResultError: not even the default is right; nothing is saved.
            UnsupportedError: the plan cannot be measured.
        """
        found, reason = self.find(problem)
        if found is not None:
            return found
        logger.info("%s %s: measuring", self.path, reason)
        tuned = measure(problem, default, self.effort, self.on_measurement)
        news = Contents({tuned.signature.key: tuned.entry(self.effort)})
        self._kept = self._kept.merged(news)
        try:
            store.update(self.path, news)
        except store.TuningFileError as error:
            self.unsaved = str(error)
            logger.warning("the result is kept for this process only: %s", error)
        return tuned


def measure(
    problem: Problem, default: Candidate, effort: str, on_measurement: Callable[[str], None] = lambda text: None
) -> Tuned:
    """Race everything that can compute the site; of those whose result is right, the fastest.

    Raises:
        WrongResultError: not even the default is right.
        UnsupportedError: the default cannot run.
    """
    began = time.perf_counter()
    tensors = problem.inputs()
    notes: list[str] = []
    runners: dict[Candidate, Callable[[], float]] = {}

    def prepare(some: Sequence[Candidate]) -> None:
        build(problem, some, on_measurement)
        for candidate in some:
            on_measurement(f"preparing {candidate}")
            try:
                timed = problem.timed(candidate, tensors)
                timed()  # loads, fills caches
            except Exception as failure:
                if candidate == default:
                    raise
                text = " ".join(str(failure).split())[:200]
                notes.append(f"{candidate} cannot run: {type(failure).__name__}: {text}")
                continue
            runners[candidate] = timed

    found = candidates(problem, default, effort)
    prepare([candidate for candidate in found if not candidate.config])
    slow = _far_behind(runners) if effort == "quick" else {}
    skipped = [name for name in slow if any(item.config and item.lowering == name for item in found)]
    notes += [f"configs of {name} are not tried: {slow[name]}" for name in skipped]
    prepare([candidate for candidate in found if candidate.config and candidate.lowering not in slow])
    result = race(
        runners, EFFORTS[effort], incumbent=default, tick=lambda: on_measurement(f"racing {len(runners)} candidates")
    )
    for winner in result.order:
        error = problem.error(winner, tensors)
        if error <= problem.tolerance:
            break
        notes.append(f"{winner} is refused: relative error {error:.2e} is more than {problem.tolerance:.0e}")
        logger.warning("%s, for %s", notes[-1], problem.signature.describe())
    else:
        raise WrongResultError(f"no kernel is right for {problem.signature.describe()}: {'; '.join(notes)}")
    tuned = Tuned(
        problem.signature,
        winner,
        result.seconds[winner],
        default,
        result.seconds[default],
        error,
        result.measurements,
        tuple(sorted(((str(name), value) for name, value in result.seconds.items()), key=lambda pair: pair[1])),
        tuple(notes),
    )
    for note in notes:
        logger.info("%s", note)
    logger.info(
        "%s: %s, %.2f ms (%s: %.2f ms), %d measurements in %.1f s",
        problem.signature.describe(), winner, 1e3 * tuned.seconds, default, 1e3 * tuned.default_seconds,
        result.measurements, time.perf_counter() - began,
    )  # fmt: skip
    return tuned


def _far_behind(runners: Mapping[Candidate, Callable[[], float]]) -> dict[str, str]:
    """Lowerings that no config would save, and why: building a kernel takes seconds."""
    first = {candidate: min(timed(), timed()) for candidate, timed in runners.items()}
    best = min(first, key=lambda candidate: first[candidate])
    return {
        candidate.lowering: f"by its own rule it takes {seconds / first[best]:.1f} times as long as {best}"
        for candidate, seconds in first.items()
        if candidate.tile is None and seconds > GIVE_UP * first[best]
    }


def build(
    problem: Problem, found: Sequence[Candidate], on_measurement: Callable[[str], None] = lambda text: None
) -> None:
    """Build the CPU kernels of the candidates, one on each core, before anything is timed.

    One that cannot be built is not reported here: running it tells.
    """
    from fpscompile import cpp_build
    from fpscompile.lowerings import cpp
    from fpscompile.render import render

    q, k, v, key_mask = problem.inputs("meta")
    sources: dict[str, None] = {}
    for candidate in found:
        if candidate.lowering == "cpp":
            resolved = problem.resolved_for(candidate)
            spec = cpp.spec_of(q, k, v, key_mask, resolved)
            sources[render(spec, cpp.config_of(spec, resolved.plan))] = None

    def one(source: str) -> None:
        with contextlib.suppress(FpsError, OSError):
            cpp_build.load(source)

    pool = ThreadPoolExecutor(max_workers=os.cpu_count())
    try:
        for index, _ in enumerate(pool.map(one, sources)):
            on_measurement(f"built {index + 1} of {len(sources)} kernels")
    finally:  # of an interrupt as well: what has not begun does not begin
        pool.shutdown(wait=False, cancel_futures=True)


def tuning_path(path: str | os.PathLike[str] | None) -> Path:
    """The file that was named, or the one in the cache folder.

    Raises:
        OptionError: a path of another type.
    """
    if path is not None and not isinstance(path, (str, os.PathLike)):
        raise OptionError(f"path={path!r} must be the name of a tuning file, not of type {type(path).__name__}")
    return Path(path).expanduser() if path is not None else store.default_path()
