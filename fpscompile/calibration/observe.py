"""Run a model densely and look at the tensors of every attention call that would be rewritten."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import fx, nn

from fpscompile.attach import _denoisers, attach
from fpscompile.backend import Backend
from fpscompile.capture import captured, original
from fpscompile.errors import OptionError
from fpscompile.passes.base import module_path
from fpscompile.plan import Plan, ResolvedPlan, resolve
from fpscompile.schedule import Phase, Schedule
from fpscompile.settings import Settings
from fpscompile.tuning.capture import named_arguments

logger = logging.getLogger("fpscompile.calibration")


@dataclass(frozen=True, eq=False)
class Call:
    """One attention call of a dense run."""

    site: str
    """Path of the module that makes it, "" for the model itself: what ``options["layers"]`` can name. Calls of one
    module are one site."""
    q: torch.Tensor
    """[B, H, Lq, D]."""
    k: torch.Tensor
    v: torch.Tensor
    key_mask: torch.Tensor | None
    phases: tuple[int, ...]
    """One per batch element."""
    resolved: ResolvedPlan
    """Of a dense plan: the two layouts."""
    scale: float
    out: torch.Tensor
    """[B, H, Lq, Dv]: dense."""


class Look(Protocol):
    def __call__(self, call: Call) -> None: ...


@dataclass
class Runner:
    """A model, or a pipeline with its denoisers, as something that runs one sample."""

    name: str
    """Class of the model."""
    denoiser: str
    """Which of a pipeline's, where it has several; else ""."""
    run: Callable[[Any], None]
    backend: Backend


@contextlib.contextmanager
def observed(pipe_or_model: Any, settings: Settings, look: Look, denoiser: str | None = None) -> Iterator[Runner]:
    """The model, or pipeline, with every 3D attention computed densely and shown to ``look``.

    Args:
        settings: the options in force; their windows are replaced by dense ones, their ranges of progress stay.
        denoiser: which of a pipeline's is looked at, where it has several; the others run as they are.

    Raises:
        OptionError: neither a module nor a pipeline with denoisers, or one with several and none or another named.
    """
    phases = tuple(Phase(p.start, p.end, density=1.0, granularity=p.granularity) for p in settings.phases.phases)
    lowering = "gather" if settings.quant == "fp8" else "boxes"
    plain = dataclasses.replace(
        settings,
        **_only_schedule(Schedule(phases)),
        lowering=lowering,
        inner=_Inner(look),
        inner_options=(),
        strict=False,
        autotune="off",
        tuning=None,
        quant="none" if settings.quant == "auto" else settings.quant,
    )
    backend = Backend(plain)
    if isinstance(pipe_or_model, nn.Module):
        if denoiser is not None:
            raise OptionError(f"denoiser={denoiser!r} names a part of a pipeline, and this is a module: leave it out")
        forward = captured(pipe_or_model, backend)

        def run(sample: Any) -> None:
            args, kwargs = named_arguments(sample)
            forward(*args, **kwargs)

        yield Runner(type(original(pipe_or_model)).__name__, "", run, backend)
        return
    name, module = _denoiser(pipe_or_model, denoiser)
    with _compiled(module, backend), attach(pipe_or_model):

        def call(sample: Any) -> None:
            pipe_or_model(**sample) if isinstance(sample, Mapping) else pipe_or_model(sample)

        yield Runner(type(module).__name__, name, call, backend)


def _only_schedule(schedule: Schedule) -> dict[str, Any]:
    """Changes to Settings that leave a schedule as the only word on what is kept."""
    return {"window": None, "density": None, "schedule": schedule, "heads": (), "layers": (), "granularity": None}


def _denoiser(pipe: Any, wanted: str | None) -> tuple[str, nn.Module]:
    """(name, module) of a pipeline's denoiser; "" where it has no other."""
    found = _denoisers(pipe)
    if not found:
        raise OptionError(
            f"calibrate found no denoiser in {type(pipe).__name__}: pass a diffusers pipeline with a transformer or "
            "unet, or the module itself"
        )
    names = " and ".join(found)
    if wanted is None and len(found) > 1:
        raise OptionError(
            f"{type(pipe).__name__} has the denoisers {names}, whose heads differ: calibrate one at a time, "
            f"denoiser={next(iter(found))!r}, each into a file of its own (path=)"
        )
    if wanted is not None and wanted not in found:
        raise OptionError(f"denoiser={wanted!r} is not in {type(pipe).__name__}, which has {names}")
    name = next(iter(found)) if wanted is None else wanted
    return name if len(found) > 1 else "", original(found[name])


@contextlib.contextmanager
def _compiled(module: nn.Module, backend: Backend) -> Iterator[None]:
    """The module compiled in place, and afterwards as it was."""
    before = module._compiled_call_impl
    # Not module.compile: Dynamo would count each calibration as a recompilation of the same code.
    module._compiled_call_impl = captured(module._call_impl, backend)
    try:
        yield
    finally:
        module._compiled_call_impl = before


class _Inner:
    """An inner compiler that interprets the graph and computes ``fps::attention`` itself, densely."""

    def __init__(self, look: Look) -> None:
        self.look = look

    def __call__(self, gm: fx.GraphModule, example_inputs: Any) -> Callable[..., Any]:
        return _Interpreter(gm, self.look).run


class _Interpreter(fx.Interpreter):
    def __init__(self, gm: fx.GraphModule, look: Look) -> None:
        super().__init__(gm)
        self.look = look

    def run_node(self, n: fx.Node) -> Any:
        if n.target is not torch.ops.fps.attention.default:
            return super().run_node(n)
        args, _ = self.fetch_args_kwargs_from_env(n)
        return self._attention(module_path(n), *args)

    def _attention(
        self,
        site: str,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        key_mask: torch.Tensor | None,
        phase: torch.Tensor,
        grid: Any,
        published_grid: torch.Tensor | None,
        q_span: Any,
        k_span: Any,
        scale: float | None,
        plan: str,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        sizes = [int(size) for size in grid] if published_grid is None else published_grid.tolist()
        resolved = resolve(
            Plan.from_json(plan), (sizes[0], sizes[1], sizes[2]), q.shape[2], k.shape[2], int(q_span[0]), int(k_span[0])
        )
        given = phase.reshape(-1).tolist()
        bias = key_mask
        if key_mask is not None and key_mask.dtype != torch.bool:
            bias = key_mask.to(q.dtype)
        out = F.scaled_dot_product_attention(q, k, v, bias, scale=scale, enable_gqa=q.shape[1] != k.shape[1])
        self.look(
            Call(
                site,
                q.detach(),
                k.detach(),
                v.detach(),
                key_mask,
                tuple(given[b // (q.shape[0] // len(given))] for b in range(q.shape[0])),
                resolved,
                q.shape[-1] ** -0.5 if scale is None else scale,
                out.detach(),
            )
        )
        lse = q.new_zeros(q.shape[:3], dtype=torch.float32)  # nobody reads it without gradients
        return out.transpose(1, 2).contiguous().transpose(1, 2), lse
