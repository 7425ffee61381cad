"""``explain``: run a model once through the passes and report what they would do to it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from fpscompile.backend import Backend
from fpscompile.capture import captured
from fpscompile.inner import inner_compiler
from fpscompile.report import Report
from fpscompile.settings import Settings


def explain(model: Any, *args: Any, options: Mapping[str, Any] | None = None, **kwargs: Any) -> Report:
    """What ``torch.compile(model, backend="fps", options=options)`` does for this call.

    Captures the model exactly as ``torch.compile`` would, runs it once (without the inner compiler), and leaves
    compiled code of the model alone. An attachment in force is honoured.

    Args:
        model: a module, a compiled module, or a function of tensors.
        args, kwargs: one real call; resolutions and dtypes are those to be explained.
        options: fields of :class:`~fpscompile.settings.Settings`. ``strict`` does not raise here.

    Raises:
        OptionError: bad options.
    """
    settings = Settings.from_options(options)
    inner_compiler(settings, None)  # refuses what compiling would refuse
    backend = Backend(dataclasses.replace(settings, strict=False), detail=True, inner=lambda gm, _: gm.forward)
    captured(model, backend)(*args, **kwargs)
    return Report(backend.graphs, settings)
