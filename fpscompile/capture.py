"""Capture a model anew, beside whatever compiled code it already has: for explain, tuning and calibration."""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import torch
from torch._dynamo.eval_frame import OptimizedModule

from fpscompile.errors import OptionError


def original(model: Any) -> Any:
    """The module behind ``torch.compile(module)``; anything else as it is."""
    return model._orig_mod if isinstance(model, OptimizedModule) else model


def captured(model: Any, backend: Callable[..., Any]) -> Callable[..., Any]:
    """``model`` as a function that Dynamo captures anew with ``backend``; other compiled code is left alone.

    Raises:
        OptionError: it cannot be called.
    """
    if not callable(model):
        raise OptionError(f"a module or a function of tensors is needed, not {model!r}")
    target = original(model)

    def call(*args: Any, **kwargs: Any) -> Any:
        return target(*args, **kwargs)

    # A code object of its own: Dynamo counts recompiles per code object, and this may be called many times.
    own = types.FunctionType(call.__code__.replace(), call.__globals__, "fps_capture", None, call.__closure__)
    compiled = torch.compile(own, backend=backend)

    def run(*args: Any, **kwargs: Any) -> Any:
        training = isinstance(target, torch.nn.Module) and target.training
        with torch.set_grad_enabled(torch.is_grad_enabled() and training):
            return compiled(*args, **kwargs)

    return run
