"""Lowerings: interchangeable ways to compute ``fps::attention`` on a resolved plan.

A lowering is a module with two functions::

    forward(q, k, v, *, key_mask, phases, resolved, scale) -> (out, lse)
    backward(grad_out, q, k, v, out, lse, *, key_mask, phases, resolved, scale) -> (dq, dk, dv)

    q         [B, H, Lq, D], k [B, Hk, Lk, D], v [B, Hk, Lk, Dv], any strides, one dtype
    key_mask  None, or [B | 1, H | 1, 1, Lk] bool (True keeps), q's dtype or float32 (added to the scaled scores)
    phases    one int per batch element; or the op's own int32 tensor, where the module says ``PHASES_ON_DEVICE = True``
    resolved  :class:`fpscompile.plan.ResolvedPlan`
    scale     float
    out       [B, H, Lq, Dv] in q's dtype, the transpose of a contiguous [B, Lq, H, Dv]
    lse       [B, H, Lq] contiguous, float32 (float64 for float64 inputs); -inf where no key is visible
    dq, dk, dv  shaped and laid out like q, k, v seen as transposes of contiguous [B, L, H, D]

Modules are imported on first use. :func:`forward` and :func:`backward` here run one and add what the plan's
``remainder`` asks for; a module that does this itself says ``SERVES_REMAINDER = True``.
A backward that sums delta = rowsum(P * dP) over its own keys takes ``delta``, which holds what the remainder adds, and
leaves the sum there.
"""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable
from typing import Any, Protocol, cast

import torch

from fpscompile.errors import UnsupportedError
from fpscompile.plan import Plan, ResolvedPlan

REGISTRY = {
    "boxes": "fpscompile.lowerings.boxes",
    "cpp": "fpscompile.lowerings.cpp",
    "gather": "fpscompile.lowerings.gather",
    "reference": "fpscompile.lowerings.oracle",
    "triton": "fpscompile.lowerings.triton",
}
"""Name of a lowering, as ``Plan.lowering`` has it, to the module that implements it."""


class Lowering(Protocol):
    """What a lowering module offers; shapes are in the module docstring."""

    def forward(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        *,
        key_mask: torch.Tensor | None,
        phases: Any,
        resolved: ResolvedPlan,
        scale: float,
    ) -> tuple[torch.Tensor, torch.Tensor]: ...

    def backward(
        self,
        grad_out: torch.Tensor,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        out: torch.Tensor,
        lse: torch.Tensor,
        *,
        key_mask: torch.Tensor | None,
        phases: Any,
        resolved: ResolvedPlan,
        scale: float,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]: ...


def get(name: str) -> Lowering:
    """The lowering called ``name``.

    Raises:
        UnsupportedError: no such lowering.
    """
    if name not in REGISTRY:
        raise UnsupportedError(f"lowering {name!r} is unknown; choose one of {', '.join(map(repr, REGISTRY))}")
    return cast(Lowering, importlib.import_module(REGISTRY[name]))


def forward(
    lowering: Lowering, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **call: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """(out, lse) of a lowering, and of the means of dropped tiles where the plan has them."""
    out, lse = lowering.forward(q, k, v, **call)
    if _added(lowering, call["resolved"]):
        from fpscompile import remainder  # which calls the dense lowering

        out, lse = remainder.add(out, lse, q, k, v, **call)
    return out, lse


def backward(
    lowering: Lowering,
    grad_out: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    **call: Any,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(dq, dk, dv) for what :func:`forward` returned."""
    if not _added(lowering, call["resolved"]):
        return lowering.backward(grad_out, q, k, v, out, lse, **call)
    from fpscompile import remainder

    own = functools.partial(lowering.backward, grad_out, q, k, v, out, lse, **call)
    sums_delta = lowering is get("gather") or call["resolved"].plan.quant == "fp8"
    return remainder.gradients(own, grad_out, q, k, v, out, lse, sums_delta=sums_delta, **call)


def gathers_gradients(plan: Plan) -> bool:
    """Whether gradients come from ``gather`` although another lowering computes the output: an FP8 backward beside
    means has to sum delta over both."""
    if plan.remainder == "none" or plan.quant != "fp8":
        return False
    lowering = get(plan.lowering)
    served = getattr(lowering, "SERVES_REMAINDER", False)
    return not served and not takes(lowering.backward, "delta")


@functools.cache
def takes(function: Callable[..., Any], argument: str) -> bool:
    """Whether a lowering's forward or backward has an argument that not all have."""
    return argument in inspect.signature(function).parameters


def _added(lowering: Lowering, resolved: ResolvedPlan) -> bool:
    return resolved.plan.remainder != "none" and not getattr(lowering, "SERVES_REMAINDER", False)
