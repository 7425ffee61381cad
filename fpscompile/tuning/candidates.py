"""What may compute a site without changing its tile or its mask: lowerings, and configs of the generated kernels.

Validity is the lowerings' own business: ``CppConfig.is_valid`` and :func:`fpscompile.gpu.config.why_invalid` are the
rules that the launch uses too. Fields of a config that are not listed here stay as its rule sets them, so that a tuned
kernel computes in the same precision as the untuned one.
"""

from __future__ import annotations

import dataclasses
import importlib
import itertools
import logging
from typing import Any

import torch

from fpscompile.errors import FpsError
from fpscompile.masks import Window, window_density
from fpscompile.tiling import TileLayout
from fpscompile.tuning.problem import Candidate, Problem

logger = logging.getLogger("fpscompile.tuning")

CPP_CHOICES: dict[str, tuple[int, ...]] = {"block_m": (16, 32, 64, 128, 256), "block_n": (64, 128, 256, 512, 1024)}
"""Field of the CPU kernel's config to the values worth trying; the default's own value is always among them."""

_QUICK_TILES = ((2, 8, 8), (4, 4, 8), (2, 4, 8), (4, 8, 16), (8, 8, 8))
TILES = {"quick": _QUICK_TILES, "full": (*_QUICK_TILES, (1, 8, 8), (2, 4, 4), (4, 4, 4), (6, 8, 8), (1, 8, 16))}
"""Tiles worth trying where the tile is free."""

PRUNED = {"quick": 4, "full": 12}
"""GPU configs left after the cost model has ranked them."""


def pairs(config: Any) -> tuple[tuple[str, Any], ...]:
    """A config's fields, sorted by name: how a plan and a tuning file hold it."""
    return tuple(sorted(dataclasses.asdict(config).items()))


def candidates(problem: Problem, default: Candidate, effort: str) -> tuple[Candidate, ...]:
    """Everything worth measuring for a site, ``default`` first.

    1. A lowering asked for by name stays; only its configs are tried.
    2. Otherwise the generated kernel's configs, and the lowerings in plain torch that can run the plan: boxes where
       every window is a product of ranges (a dense phase is then torch's own dense attention), gather on a CPU where
       the mask keeps at most half of the pairs (it never was faster with more).
    """
    plan, found = problem.resolved.plan, [default]
    lowering = default.lowering if problem.asked != "auto" else None
    if lowering in (None, "cpp") and problem.device.type == "cpu":
        found += cpp_configs(problem, effort)
    if lowering in (None, "triton") and problem.device.type == "cuda":
        found += triton_configs(problem, effort)
    if lowering is None and plan.quant == "none" and getattr(problem.resolved, "product", True):
        found.append(Candidate("boxes"))
    some = plan.quant in ("none", "fp8") and max(problem.resolved.densities) <= 0.5
    if lowering is None and problem.device.type == "cpu" and some:
        found.append(Candidate("gather"))
    if problem.free_tile and problem.references:
        found += other_tiles(problem, default, effort)
    return tuple(dict.fromkeys(found))


def other_tiles(problem: Problem, default: Candidate, effort: str) -> list[Candidate]:
    """Other tiles with the default's kernel, each with the smallest windows that keep at least as many pairs in every
    phase; only those whose mask errs no more on any of the real calls."""
    resolved = problem.resolved
    if not resolved.product:
        return []
    limits = problem.mask_errors(default)
    found = []
    for tile in TILES[effort]:
        q_layout, k_layout = (dataclasses.replace(x, tile=tile) for x in (resolved.q_layout, resolved.k_layout))
        if q_layout.counts == resolved.q_layout.counts or tile == resolved.plan.tile:
            continue
        windows = [smallest_window(q_layout, k_layout, density) for density in resolved.densities]
        candidate = Candidate(default.lowering, (), tile, tuple(windows))
        errors = problem.mask_errors(candidate)
        if all(error <= limit * (1 + 1e-6) for error, limit in zip(errors, limits, strict=True)):
            found.append(candidate)
        else:
            logger.info("%s is not tried: its error is larger", candidate)
    return found


def smallest_window(q_layout: TileLayout, k_layout: TileLayout, density: float) -> Window:
    """The product window of least density not below ``density``; of equals, the one most alike in all axes."""
    counts = q_layout.counts
    sizes = itertools.product(*(range(1, count + 1) for count in counts))
    made = [
        (window_density(q_layout, k_layout, (t, h, w)), -min(t / counts[0], h / counts[1], w / counts[2]), (t, h, w))
        for t, h, w in sizes
    ]
    return min(item for item in made if item[0] >= density - 1e-12)[2]


def cpp_configs(problem: Problem, effort: str) -> list[Candidate]:
    """Configs of the CPU kernel around its default: neighbours for a quick search, all for a full one."""
    from fpscompile.lowerings import cpp

    q, k, v, key_mask = problem.inputs("meta")
    resolved = problem.resolved_for(Candidate("cpp"))
    if cpp.why_not(problem.dtype, problem.head_dim, problem.value_dim, resolved.plan, problem.device) is not None:
        return []
    spec = cpp.spec_of(q, k, v, key_mask, resolved)
    default = cpp.config_of(spec, resolved.plan)
    rows = int(resolved.q_layout.sizes().max())
    names = {field.name for field in dataclasses.fields(default)}
    choices: dict[str, list[Any]] = {}
    for name, values in CPP_CHOICES.items():
        if name not in names:
            continue
        own = getattr(default, name)
        # A block longer than the tile is the tile: the first that holds it stands for all longer ones.
        known = [value for value in values if name != "block_m" or value < 2 * rows]
        if effort == "quick":
            known = [value for value in known if value in (own // 2, own * 2)]
        choices[name] = [own, *(value for value in known if value != own)]
    made = [
        dataclasses.replace(default, **dict(zip(choices, values, strict=True)))
        for values in itertools.product(*choices.values())
    ]
    # Threads matter to small sites and to cores that share their units, not to the best blocks: no product of the two.
    threads = torch.get_num_threads()
    fewer = {"quick": [threads // 2], "full": [threads // 2, threads // 4, 1]}[effort]
    made += [dataclasses.replace(default, threads=count) for count in fewer if 0 < count < threads]
    others = [Candidate("cpp", pairs(config)) for config in made if config != default and config.is_valid(spec)]
    return [Candidate("cpp"), *others]


def triton_configs(problem: Problem, effort: str) -> list[Candidate]:
    """Configs of the GPU kernel; where the cost model knows the GPU, the best by its prediction."""
    from fpscompile.gpu import config as gpu_config
    from fpscompile.gpu import cost_model
    from fpscompile.gpu.call import spec_of

    q, k, v, key_mask = problem.inputs("meta")
    resolved = problem.resolved_for(Candidate("triton"))
    spec = spec_of(q, k, v, key_mask, resolved, problem.device)
    configs = gpu_config.candidates(spec)
    try:
        ranked = cost_model.rank(spec, configs)
        configs = tuple(item.config for item in ranked if item.prediction is not None)
    except (FpsError, ImportError) as error:
        logger.info("the cost model does not rank the configs of %s: %s", spec.target, error)
    return [Candidate("triton"), *(Candidate("triton", pairs(config)) for config in configs[: PRUNED[effort]])]


def why_not(candidate: Candidate, problem: Problem) -> str | None:
    """Why an entry of a file, from elsewhere or edited by hand, cannot be launched for a site; None if it can."""
    plan, lowering = problem.resolved.plan, candidate.lowering
    if problem.asked != "auto" and lowering != plan.lowering:
        return f"lowering={problem.asked!r} is asked for"
    if candidate.tile is not None and len(candidate.windows) != len(plan.phases):
        return f"it has windows for {len(candidate.windows)} phases, and the schedule has {len(plan.phases)}"
    if lowering in ("boxes", "gather"):
        if candidate.config:
            return f"{lowering} takes no config"
        if lowering == "boxes" and plan.quant != "none":
            return f"boxes do not compute with quant={plan.quant!r}"
        if lowering == "boxes" and not problem.resolved.product:
            return "boxes take windows that are products of the axes"
        return f"gather does not compute with quant={plan.quant!r}" if plan.quant not in ("none", "fp8") else None
    if lowering not in ("cpp", "triton"):
        return "there is no such lowering"
    if lowering == "triton" and problem.device.type == "cpu" and plan.lowering != "triton":
        return "it runs on a GPU"  # the interpreter, which tests use, would take it
    module = importlib.import_module(f"fpscompile.lowerings.{lowering}")
    reason: str | None = module.why_not(problem.dtype, problem.head_dim, problem.value_dim, plan, problem.device)
    return reason or (_why_no_config(candidate, problem) if candidate.config else None)


def _why_no_config(candidate: Candidate, problem: Problem) -> str | None:
    """Why the generated kernel cannot be rendered with a config; what is wrong with it is the lowering's to say."""
    from fpscompile.gpu import config as gpu_config
    from fpscompile.gpu.call import spec_of
    from fpscompile.lowerings import cpp
    from fpscompile.render import CppConfig

    cls = CppConfig if candidate.lowering == "cpp" else gpu_config.KernelConfig
    known = {field.name: field.type for field in dataclasses.fields(cls)}
    for name, value in candidate.config:
        if name not in known:
            return f"its config has no {name!r}"
        if type(value).__name__ != known[name]:
            return f"{name}={value!r} is no {known[name]}"
    try:
        config = cls(**dict(candidate.config))
    except TypeError as error:
        return str(error)
    q, k, v, key_mask = problem.inputs("meta")
    resolved = problem.resolved_for(candidate)
    if isinstance(config, CppConfig):
        spec = cpp.spec_of(q, k, v, key_mask, resolved)
        compute = cpp.config_of(spec, problem.resolved.plan).compute
        if config.compute != compute:
            return f"it multiplies in {config.compute}, and this machine in {compute}"
        return None if config.is_valid(spec) else "the template cannot be rendered with it"
    spec = spec_of(q, k, v, key_mask, resolved, problem.device)
    return gpu_config.why_invalid(config, spec)
