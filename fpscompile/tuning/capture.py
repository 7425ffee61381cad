"""See the sites of a model, and each as the tuner runs it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from fpscompile.errors import OptionError
from fpscompile.ir import AttentionSite
from fpscompile.passes.base import GraphState, fake_tensor, module_path, size_of
from fpscompile.passes.legality import key_mask
from fpscompile.passes.plan_sites import resolved_plan
from fpscompile.plan import Plan
from fpscompile.settings import Settings
from fpscompile.tuning.problem import Problem
from fpscompile.tuning.signature import phase_weights


class Collector:
    """A backend that shows every rewritten graph to ``look`` and runs the graph as it was captured."""

    def __init__(self, settings: Settings, look: Callable[[GraphState], None]) -> None:
        self.settings = settings
        self.look = look

    def __call__(self, gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        from fpscompile.backend import rewrite

        graph = gm.graph
        _, state = rewrite(gm, self.settings)
        self.look(state)
        return fx.GraphModule(gm, graph)


def problem_of(site: AttentionSite, plan: Plan, state: GraphState) -> Problem:
    """A planned site as the tuner runs it, at the sizes of the call that is being compiled."""
    node = state.rewritten.get(site.node)
    query, key, value = (fake_tensor(tensor) for tensor in (node or site.node).args[:3])
    assert query is not None
    assert key is not None
    assert value is not None
    mask = key_mask(site.node) if node is None else node.args[3]
    kind = "none"
    if mask is not None:
        found = fake_tensor(mask)
        kind = "bool" if found is not None and found.dtype == torch.bool else "float"
    resolved = resolved_plan(site, plan)
    schedule = state.settings.phases
    weights: tuple[float, ...] = ()
    if len(schedule.phases) == len(resolved.windows):
        weights = phase_weights([(phase.start, phase.end) for phase in schedule.phases])
    return Problem(
        resolved=resolved,
        heads=site.shape[1].hint,
        key_heads=size_of(key.shape[1]).hint,
        head_dim=site.shape[4].hint,
        value_dim=size_of(value.shape[3]).hint,
        dtype=query.dtype,
        device=query.device,
        key_mask=kind,
        weights=weights,
        asked=state.settings.lowering,
        free_tile=state.settings.free_tile and resolved.product and not state.settings.layers,
    )


def site_name(site: AttentionSite) -> str:
    """The module that makes the call; the node where the graph does not say."""
    return module_path(site.node) or site.node.name


def named_arguments(call: Mapping[str, Any] | tuple[Any, ...] | list[Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """(args, kwargs) of a call given as a dict, as (args, kwargs), or as a tuple of positional arguments.

    Raises:
        OptionError: none of them.
    """
    if isinstance(call, Mapping):
        return (), dict(call)
    if not isinstance(call, (tuple, list)):
        raise OptionError(
            f"a sample is a call of the module: a dict of keyword arguments, (args, kwargs) or a tuple of positional "
            f"arguments, not {type(call).__name__}"
        )
    if len(call) == 2 and isinstance(call[0], (tuple, list)) and isinstance(call[1], Mapping):
        return tuple(call[0]), dict(call[1])
    return tuple(call), {}
