"""``attach``: tell compiled models where in the denoising loop they are, and which grid they are given.

The hooks run outside compiled code. An attachment reads the step index off the scheduler each time a model is
called, so nothing needs to be counted and both halves of a two-call classifier-free guidance see the same step.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import logging
import reprlib
import sys
import threading
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Any, SupportsIndex

import torch
from torch import nn
from torch._dynamo.eval_frame import OptimizedModule
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._pytree import tree_leaves

from fpscompile import runtime
from fpscompile.errors import GridError, OptionError
from fpscompile.grid_of_call import GridReader
from fpscompile.settings import three_sizes
from fpscompile.step_of_call import StepReader, timestep_of
from fpscompile.windows.checks import integer, tensor_given

logger = logging.getLogger(__name__)

GridFunction = Callable[[tuple[Any, ...], dict[str, Any]], "tuple[int, int, int] | None"]


def attach(
    pipe_or_model: Any, *, scheduler: Any = None, grid: tuple[int, int, int] | GridFunction | None = None
) -> Attachment:
    """Publish the denoising step and the grid of every call of a model, for as long as it stays attached.

    Of several attachments of one model the last tells the step; when it is detached, the one before it does again.

    Args:
        pipe_or_model: a diffusers pipeline (its denoisers and its scheduler are found), or one module, compiled or
            not. Compile a whole model before or after (before, if its graph shows no grid and ``grid`` is not given as
            three sizes: the hooks of an attachment that is older than ``torch.compile`` are traced, and tell nothing);
            blocks compiled on their own need the attachment first, so that their first call finds a grid.
        scheduler: for a bare module, the scheduler that drives it; progress = step index / number of steps.
            Without one, give the step with :meth:`Attachment.step`, or let the graph read its timestep input.
        grid: video tokens (t, h, w), or a function of the call's (args, kwargs) that returns them; by default they
            are read off the 5-D latent input and the model's patch size, or off num_frames, height and width.

    Returns:
        The attachment: a context manager, or call ``detach()``.

    Raises:
        OptionError: nothing in ``pipe_or_model`` can be attached to, or ``scheduler`` is none.
        GridError: a grid that is not three sizes.
    """
    if grid is not None and not callable(grid):
        grid = _sizes(grid)
    if scheduler is not None and not _is_scheduler(scheduler):
        raise OptionError(f"scheduler={reprlib.repr(scheduler)} is a {type(scheduler).__name__}; {_NEEDED}")
    if isinstance(pipe_or_model, nn.Module):
        models = {type(_original(pipe_or_model)).__name__: pipe_or_model}
        pipe = None
    else:
        models = _denoisers(pipe_or_model)
        pipe = pipe_or_model if scheduler is None and _scheduler_of(pipe_or_model) is not None else None
    if not models:
        raise OptionError(
            f"attach found no denoiser in {type(pipe_or_model).__name__}: pass a diffusers pipeline with a transformer "
            "or unet, or the module itself"
        )
    return Attachment(models, scheduler, grid, pipe)


def _sizes(grid: Any) -> tuple[int, int, int]:
    sizes = three_sizes(grid)
    if sizes is None:
        wrong = f"grid={grid!r}; three integers >= 1 are needed: video tokens along (t, h, w)"
        raise GridError(tensor_given("grid", grid) or wrong)
    return sizes


_NEEDED = (
    "what tells the step is a diffusers scheduler, or an object with timesteps and with step_index or step(): pass "
    "one, or none and give the step with Attachment.step"
)


def _is_scheduler(value: Any) -> bool:
    """Whether it has, or will have, timesteps and a place in them. What sets timesteps may do without ``step``."""
    if isinstance(value, type):
        return False
    placed = callable(getattr(value, "step", None)) or hasattr(value, "step_index") or hasattr(value, "begin_index")
    return callable(getattr(value, "set_timesteps", None)) or (placed and hasattr(value, "timesteps"))


def _scheduler_of(pipe: Any) -> Any:
    """A pipeline may have a scheduler of another kind and still be attached to, for its grids."""
    scheduler = getattr(pipe, "scheduler", None)
    if scheduler is None or _is_scheduler(scheduler):
        return scheduler
    logger.warning(
        "the scheduler of %s, a %s, does not tell the denoising step; %s",
        *(type(pipe).__name__, type(scheduler).__name__, _NEEDED),
    )
    return None


def _denoisers(pipe: Any) -> dict[str, nn.Module]:
    components = getattr(pipe, "components", None) or getattr(pipe, "__dict__", {})
    return {
        name: module
        for name, module in components.items()
        if isinstance(module, nn.Module) and name.startswith(("transformer", "unet", "denoiser", "dit"))
    }


def _original(module: nn.Module) -> nn.Module:
    return module._orig_mod if isinstance(module, OptimizedModule) else module


class Attachment:
    """A live link between a denoising loop and the compiled models it calls. Made by :func:`attach`."""

    def __init__(
        self,
        models: dict[str, nn.Module],
        scheduler: Any,
        grid: tuple[int, int, int] | GridFunction | None,
        pipe: Any = None,
    ) -> None:
        self.models = models
        self.busy = runtime.Busy(" and ".join(models))
        self.met: bool | None = None
        self.told_grid = None if callable(grid) else grid
        self.told_in_vain = False
        self.captured = False
        self._manual: float | None = None
        self._detached = False
        self._undo: list[Callable[[], None]] = []
        self._steps = StepReader(scheduler, pipe)
        self._undo.append(self._steps.close)
        for model in models.values():
            reader = grid if callable(grid) else GridReader(_original(model), grid)
            parameters = list(inspect.signature(_original(model).forward).parameters)
            open_call = functools.partial(self._open, reader, parameters)
            self._undo += _hook(model, open_call, functools.partial(self._close, model))
        runtime.own(self)

    def _check_attached(self, what: str) -> None:
        if self._detached:
            raise OptionError(f"{what} of an attachment that was detached: call fpscompile.attach again")

    def __enter__(self) -> Attachment:
        self._check_attached("with")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.detach()

    def detach(self) -> None:
        """Remove every hook. Compiled models go on with the timestep input, or with the densest phase."""
        while self._undo:
            self._undo.pop()()
        self._detached = True
        if self.met is False:
            self._warn(" and ".join(self.models))
        runtime.disown(self)

    def weights(self) -> Iterator[tuple[str, nn.Parameter]]:
        """(name in its model, weight) of all that is attached, as it is now."""
        for model in self.models.values():
            for name, weight in _original(model).named_parameters():
                yield name.replace("_orig_mod.", ""), weight  # a block may be a compiled one

    def step(self, index: SupportsIndex, total: SupportsIndex) -> None:
        """Say by hand that step ``index`` of ``total`` is next; it holds until said anew, whatever the scheduler says.

        Args:
            index, total: ints, or what is one: integers of numpy, tensors of one integer.

        Raises:
            OptionError: no integers, not ``0 <= index < total``, or nothing is attached any more.
        """
        step, steps = integer(index), integer(total)
        if step is None or steps is None:
            wrong = index if step is None else total
            raise OptionError(
                f"step({index!r}, {total!r}): {wrong!r} must be an integer; give the index of the step, from 0 on, "
                "and the number of steps"
            )
        if steps < 1:
            raise OptionError(f"step({step}, {steps}): total, the number of steps, must be >= 1")
        if not 0 <= step < steps:
            raise OptionError(f"step({step}, {steps}): the index must be in [0, {steps})")
        self._check_attached("step")
        self._manual = step / steps

    def progress(self) -> float:
        """Denoising progress in [0, 1]; NaN when nothing tells it."""
        if self._manual is not None:
            return self._manual
        return self._steps.progress()

    def _open(self, reader: GridFunction, parameters: list[str], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        grid = reader(args, kwargs)
        if grid is not None:
            grid = _sizes(grid)
        if self._manual is None:
            self._steps.called(" and ".join(self.models), timestep_of(parameters, args, kwargs))
        return runtime.open_call(self, grid)

    def _close(self, model: nn.Module, token: Any) -> None:
        runtime.close_call(token)
        # A call that fails says so itself.
        if not self.met and sys.exc_info()[0] is None and _is_compiled(model):
            self._warn(type(_original(model)).__name__)

    def _warn(self, name: str) -> None:
        """Say once that compiled code came by without attention."""
        self.met = True
        logger.warning(
            "%s is compiled, or parts of it are, but no graph that holds attention ran: nothing is rewritten. "
            "Something keeps torch.compile out, such as torch.compiler.disable on the hooks of a cache of steps "
            "(MagCache). Compile what the hooks call: block.forward = torch.compile(block.forward, backend='fps') for "
            "every block, ahead of enable_cache",
            name,
        )


def _is_compiled(model: nn.Module) -> bool:
    """Whether the model or a part of it went through ``torch.compile`` or ``module.compile``."""
    return isinstance(model, OptimizedModule) or any(part._compiled_call_impl is not None for part in model.modules())


def _hook(
    model: nn.Module, open_call: Callable[..., Any], close_call: Callable[[Any], None]
) -> list[Callable[[], None]]:
    """Open a call before ``model`` runs and close it after, whatever form of compilation it went through.

    Where several attachments hook one model, the last one to open is the first to close.
    """
    if model._compiled_call_impl is not None:
        return [_wrap_compiled_call(model, open_call, close_call)]
    # One stack per thread: a call that is refused must not close the call that is running.
    local = threading.local()

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        # Traced by Dynamo when the model itself is compiled: then the graph shows the grid, and progress is found
        # through the owner of the weights. ``is_compiling`` is no test of that: it holds in every thread while one
        # compiles.
        # A deep copy of the model has its hooks, and is not attached.
        if torch.compiler.is_dynamo_compiling() or module is not model:
            return
        if not hasattr(local, "tokens"):
            local.tokens = []
        local.tokens.append(None)
        if not _exported(args, kwargs):
            local.tokens[-1] = open_call(args, kwargs)

    def after(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if torch.compiler.is_dynamo_compiling() or module is not model:
            return
        token = local.tokens.pop() if getattr(local, "tokens", None) else None
        if token is not None:
            close_call(token)

    handles = [
        model.register_forward_pre_hook(before, with_kwargs=True),
        model.register_forward_hook(after, prepend=True, with_kwargs=True, always_call=True),
    ]
    return [handle.remove for handle in handles]


def _exported(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether ``torch.export`` traces the call: it runs on tensors without data, and their sizes must not be read."""
    return any(isinstance(leaf, FakeTensor) for leaf in tree_leaves((args, kwargs)))


class _CompiledCall:
    """For ``model.compile()``: its hooks are traced, so the call itself is wrapped, once for all attachments."""

    def __init__(self, compiled: Callable[..., Any]) -> None:
        self.compiled = compiled
        self.hooks: list[tuple[Callable[..., Any], Callable[[Any], None]]] = []

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with contextlib.ExitStack() as stack:
            for open_call, close_call in tuple(self.hooks):
                stack.callback(close_call, open_call(args, kwargs))
            return self.compiled(*args, **kwargs)


def _wrap_compiled_call(
    model: nn.Module, open_call: Callable[..., Any], close_call: Callable[[Any], None]
) -> Callable[[], None]:
    compiled = model._compiled_call_impl
    assert compiled is not None
    call = compiled if isinstance(compiled, _CompiledCall) else _CompiledCall(compiled)
    model._compiled_call_impl = call
    hook = (open_call, close_call)
    call.hooks.append(hook)

    def undo() -> None:
        call.hooks.remove(hook)
        if not call.hooks and model._compiled_call_impl is call:
            model._compiled_call_impl = call.compiled

    return undo
