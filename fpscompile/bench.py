"""``bench``: a model compiled with fps beside the same model compiled without, measured in turns in this process."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from fpscompile.backend import Backend
from fpscompile.capture import captured
from fpscompile.errors import OptionError
from fpscompile.inner import inner_compiler
from fpscompile.report import Report
from fpscompile.settings import Settings


@dataclass(frozen=True)
class BenchResult:
    """Seconds of one forward, and how far apart the outputs are."""

    seconds: float
    """Median, compiled with fps."""
    peer_seconds: float
    """Median, compiled with the inner compiler alone."""
    peer: str
    compile_seconds: float
    """First call with fps: capture, passes, inner compiler, kernels."""
    difference: float
    """Relative difference (norm over norm) of the outputs; sparsity is meant to make one."""
    rounds: int
    report: Report

    @property
    def speedup(self) -> float:
        return self.peer_seconds / self.seconds

    def to_dict(self) -> dict[str, Any]:
        names = ("seconds", "peer_seconds", "peer", "compile_seconds", "difference", "rounds", "speedup")
        found = {name: getattr(self, name) for name in names}
        return found | {"rewritten": self.report.rewritten, "sites": len(self.report.sites),
                        "flops_kept": self.report.flops_kept}  # fmt: skip

    def __str__(self) -> str:
        return (
            f"{self.report.headline}\n"
            f"fps {1e3 * self.seconds:.1f} ms, {self.peer} {1e3 * self.peer_seconds:.1f} ms: {self.speedup:.2f}x "
            f"(medians of {self.rounds} turns); compiled in {self.compile_seconds:.1f} s; outputs differ by "
            f"{self.difference:.1e}"
        )


def bench(
    model: Any, *args: Any, options: Mapping[str, Any] | None = None, rounds: int = 7, **kwargs: Any
) -> BenchResult:
    """Time one call of a model with fps and without.

    Args:
        model: a module, or a function of tensors.
        args, kwargs: the call.
        options: the options of the backend; ``inner`` compiles the peer as well.
        rounds: turns, at least 3.

    Raises:
        OptionError: bad options, or fewer than 3 rounds.
    """
    if rounds < 3:
        raise OptionError(f"rounds={rounds} must be at least 3: a median needs a few")
    settings = Settings.from_options(options)
    backend, alone = Backend(settings), inner_compiler(settings, None)
    torch._dynamo.reset()
    fast = captured(model, backend)
    slow = captured(model, alone)

    with torch.no_grad():
        compiling, output = _timed(lambda: fast(*args, **kwargs))
        _, expected = _timed(lambda: slow(*args, **kwargs))
        times: dict[str, list[float]] = {"fps": [], "peer": []}
        for _ in range(rounds):
            times["fps"].append(_timed(lambda: fast(*args, **kwargs))[0])
            times["peer"].append(_timed(lambda: slow(*args, **kwargs))[0])
    peer = settings.inner if isinstance(settings.inner, str) else getattr(settings.inner, "__name__", "inner")
    return BenchResult(
        statistics.median(times["fps"]), statistics.median(times["peer"]), peer, compiling,
        _difference(output, expected), rounds, Report(backend.graphs, settings),
    )  # fmt: skip


def _timed(function: Callable[[], Any]) -> tuple[float, Any]:
    _wait()
    began = time.perf_counter()
    result = function()
    _wait()
    return time.perf_counter() - began, result


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _difference(a: Any, b: Any) -> float:
    """Over all floating-point tensors of two outputs."""
    pairs = zip(torch.utils._pytree.tree_leaves(a), torch.utils._pytree.tree_leaves(b), strict=True)
    tensors = [(x.double(), y.double()) for x, y in pairs if isinstance(x, torch.Tensor) and x.is_floating_point()]
    total = sum(float(y.norm()) ** 2 for _, y in tensors)
    return (sum(float((x - y).norm()) ** 2 for x, y in tensors) / total) ** 0.5 if total else 0.0
