"""What a compilation takes from the tuning file: the kernel of each site, and a calibration of the whole model.

The file is ``options["tuning"]``, or the one in the cache folder, which ``autotune`` fills. What it does not hold is
measured now if ``options["autotune"]`` says so. What is taken, missing or ignored is a note of the compilation.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import _disable_current_modes

from fpscompile.errors import FpsError
from fpscompile.ir import AttentionSite
from fpscompile.passes.base import GraphState, module_path
from fpscompile.passes.lower_sites import _root_of_frame
from fpscompile.plan import Plan
from fpscompile.settings import Settings
from fpscompile.tuning import store
from fpscompile.tuning.candidates import why_not
from fpscompile.tuning.capture import problem_of
from fpscompile.tuning.problem import Candidate
from fpscompile.tuning.tuner import Tuner, find, tuning_path

OVERRIDING = ("window", "density", "schedule", "heads", "layers")
"""Options that say themselves what is kept, and so outrank a calibration."""


def tuned_plan(site: AttentionSite, plan: Plan, state: GraphState) -> Plan:
    """``plan`` with the lowering and config that were measured to be the fastest for such a site, if any were."""
    settings = state.settings
    if settings.autotune == "off":
        return plan
    path = tuning_path(settings.tuning)
    if settings.autotune is None and settings.tuning is None and not settings.free_tile and not path.exists():
        return plan
    problem = problem_of(site, plan, state)
    default = Candidate(plan.lowering)
    try:
        if settings.autotune is not None and not problem.free_tile:
            with _disable_current_modes(), torch.no_grad():
                tuned = Tuner(path, settings.autotune).tune(problem, default)
        else:
            loaded = store.load(path)
            found, reason = find(loaded.contents, problem.signature)
            if found is None and problem.free_tile:
                tile = "x".join(map(str, plan.tile))
                state.note(
                    "info",
                    "tile-auto",
                    f"tile='auto' is {tile}: {path} {reason}; fpscompile.autotune chooses one by a real call",
                )
            if found is None:
                calibration_only = loaded.contents.calibrations and not loaded.contents.sites
                if loaded.message or (settings.tuning is not None and not calibration_only):
                    _missing(state, loaded, problem.signature.describe(), reason)
                return plan
            tuned = found
    except FpsError as error:
        state.note("info", "tuning", f"not tuned, {problem.signature.describe()}: {error}")
        return plan
    unfit = why_not(tuned.candidate, problem)
    if unfit is not None:
        state.note("info", "tuning", f"{path} offers {tuned.candidate}, which cannot run here and is ignored: {unfit}")
        return plan
    state.note(
        "info",
        "tuned",
        f"{tuned.candidate} for {problem.signature.describe()}: {tuned.speedup:.2f}x the speed of {tuned.default}, "
        + (f"as {path} says" if tuned.cached else f"by {tuned.measurements} measurements, saved in {path}"),
    )
    return tuned.candidate.plan(plan)


def _missing(state: GraphState, loaded: store.Loaded, described: str, reason: str) -> None:
    path = tuning_path(state.settings.tuning)
    if loaded.outcome == "missing":
        message = f"tuning file {path} does not exist: nothing is tuned"
    elif loaded.message:
        message = loaded.message
    else:
        grids = sorted({_grid_of(entry) for entry in loaded.contents.sites.values()})
        held = f"its entries are for grids {', '.join(grids)}" if grids else "it has no kernel entries"
        message = f"tuning file {path} {reason}: ignored for {described}; {held}"
    state.note("info", "tuning-ignored", message)


def _grid_of(entry: Mapping[str, Any]) -> str:
    """The grid that a kernel entry is for, as text; "?" where it does not say."""
    signature = entry.get("signature")
    grid = signature.get("grid") if isinstance(signature, Mapping) else None
    return "x".join(map(str, grid)) if isinstance(grid, Sequence) and not isinstance(grid, str) else "?"


def calibrated(state: GraphState) -> Settings:
    """The settings in force: with the calibration of ``options["tuning"]`` that is for this model and grid, if any."""
    settings = state.settings
    if settings.tuning is None:
        return settings
    loaded = store.load(tuning_path(settings.tuning))
    if loaded.message:
        state.note("info", "tuning-ignored", loaded.message)
    elif loaded.outcome == "missing" and settings.autotune == "off":
        state.note("info", "tuning-ignored", f"tuning file {tuning_path(settings.tuning)} does not exist")
    if not loaded.contents.calibrations:
        return settings
    sites = {module_path(site.node): site for site in state.sites if site.kind == "3d" and site.rejection is None}
    if not sites:
        return settings
    given = [name for name in OVERRIDING if getattr(settings, name, None)]
    reasons = []
    for key, entry in loaded.contents.calibrations.items():
        reason = f"options give {' and '.join(given)}, which outrank it" if given else _why_other(entry, sites)
        if reason is None:
            try:
                return _with_options(state, settings, key, entry, sites)
            except (FpsError, TypeError, ValueError) as error:
                reason = f"its options are refused: {error}"
        reasons.append(f"{key!r}: {reason}")
    message = f"calibration of {tuning_path(settings.tuning)} ignored: {'; '.join(reasons)}"
    state.note("info", "calibration-ignored", message)
    return settings


def _with_options(
    state: GraphState,
    settings: Settings,
    key: str,
    entry: Mapping[str, Any],
    sites: Mapping[str, AttentionSite],
) -> Settings:
    options = dict(entry["options"])
    # A graph may hold a part of the model: keys of the other sites would name nothing.
    given = options.pop("layers", {})
    if not isinstance(given, Mapping):
        raise TypeError(f"layers={given!r} is no object of sites")
    layers = {name: value for name, value in given.items() if name in sites}
    changes: dict[str, Any] = {"layers": layers or (), **options}
    if "tile" in changes:
        changes["tile"] = tuple(changes["tile"])
    made = dataclasses.replace(settings, **changes)
    state.note(
        "info",
        "calibrated",
        f"calibration {key!r} of {tuning_path(settings.tuning)}: {len(layers)} of {len(sites)} sites, "
        f"tile {'x'.join(map(str, made.tile))}, error {_short(entry.get('predicted'))}, "
        f"mean density {_short(entry.get('density'))}",
    )
    return made


def _why_other(entry: Mapping[str, Any], sites: Mapping[str, AttentionSite]) -> str | None:
    """Why a calibration is not for the sites at hand; None if it is."""
    held = entry.get("sites")
    if not isinstance(held, Mapping) or not isinstance(entry.get("options"), Mapping):
        return "it has no sites or no options"
    classes = _classes(sites.values())
    if classes and entry.get("model") not in classes:
        return f"it is for the model {entry.get('model')}, and this is {classes[0]}"
    for name, site in sites.items():
        if name not in held:
            continue
        if not isinstance(held[name], Mapping):
            return f"its site {name} is {held[name]!r}, and no object"
        grid = [size.hint for size in site.grid or ()]
        shape = {"grid": grid, "heads": site.all_heads, "head_dim": site.shape[4].hint}
        for what, value in shape.items():
            known = entry.get("grid") if what == "grid" else held[name].get(what)
            if known != value:
                return f"it is for {what} {known}, and {name} has {value}"
    if not any(name in held for name in sites):
        return f"it names {_names(held)}, and this model has {_names(sites)}"
    return None


def _short(value: Any) -> str:
    """Four digits of a number; anything else, in a file that was written by hand, as it is."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _names(sites: Iterable[str]) -> str:
    names = [name or "the model itself" for name in sites]
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def _classes(sites: Iterable[AttentionSite]) -> list[str]:
    """Names of the classes of the modules that the sites are in, the model's own first."""
    root = _root_of_frame()
    found = [root.__name__] if root is not None else []
    for site in sites:
        stack = site.node.meta.get("nn_module_stack") or {}
        found += [getattr(cls, "__name__", str(cls).rsplit(".", 1)[-1]) for _, cls in stack.values()]
    return list(dict.fromkeys(found))
