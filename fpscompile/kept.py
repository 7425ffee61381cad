"""Tensors that are made once and kept on a device, safely beside CUDA graphs.

A graph replays addresses. So what it reads must stay where it is as long as the graph may run, and must not lie in the
memory of a pool of graphs, which is handed out anew: while Inductor warms up a graph, everything that the thread
allocates comes from such a pool.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

import torch

from fpscompile.errors import UnsupportedError

T = TypeVar("T")


def kept(maxsize: int) -> Callable[[Callable[..., T]], Callable[..., T]]:
    """A ``functools.lru_cache`` for a function whose last argument is the device of the tensors that it returns.

    They are made by :func:`outside_graphs`. What a capture has met is never dropped.

    Args:
        maxsize: results that are kept beside those of captures; the least recently used goes first.
    """

    def decorate(make: Callable[..., T]) -> Callable[..., T]:
        cache: OrderedDict[tuple[Any, ...], T] = OrderedDict()
        captured: dict[tuple[Any, ...], T] = {}
        lock = threading.Lock()

        @functools.wraps(make)
        def cached(*arguments: Any) -> T:
            with lock:
                found = captured.get(arguments)
                if found is None and (found := cache.get(arguments)) is not None:
                    cache.move_to_end(arguments)
                    if capturing(arguments[-1]):
                        captured[arguments] = cache.pop(arguments)
                if found is not None:
                    return found
            made = outside_graphs(arguments[-1], lambda: make(*arguments))
            with lock:
                made = cache.setdefault(arguments, made)
                while len(cache) > maxsize:
                    cache.popitem(last=False)
            return made

        return cached

    return decorate


@kept(maxsize=256)
def integers(values: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """int32 [n] on the device; not to be written to."""
    return torch.tensor(values, dtype=torch.int32).to(device)


def capturing(device: torch.device) -> bool:
    """Whether a CUDA graph is being captured on the current stream of ``device``'s kind."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def refuse_capture(device: torch.device, what: str) -> None:
    """Raises UnsupportedError while a CUDA graph is being captured: the host must read ``what`` off the device."""
    if capturing(device):
        raise UnsupportedError(
            f"{what} is read by the host at every call, which a CUDA graph that is being captured does not allow; run "
            "this model without capturing it"
        )


def outside_graphs(device: torch.device, make: Callable[[], T]) -> T:
    """``make()`` on a thread of its own, finished on return.

    What the thread allocates on a GPU is nobody's pool's. Nor does it share the caller's modes: a tensor of inference
    mode could not be saved for a backward later, and a fake one would be handed to real calls.

    Raises:
        UnsupportedError: a CUDA graph is being captured, which allows no copy from the host.
    """
    if capturing(device):
        raise UnsupportedError(
            "attention of this grid, plan and dtype runs for the first time while a CUDA graph is being captured, and "
            "its tables cannot be copied to the GPU then: run the model once ahead of the capture, with inputs of the "
            "same shapes"
        )
    stream = torch.cuda.current_stream(device) if device.type == "cuda" else None
    future: Future[T] = Future()

    def run() -> None:
        try:
            with torch.cuda.stream(stream) if stream is not None else contextlib.nullcontext():
                made = make()
                if stream is not None:
                    stream.synchronize()
            future.set_result(made)
        except BaseException as error:  # the caller's to handle
            future.set_exception(error)

    # Not a pool of threads, which takes no work once the main thread has ended.
    threading.Thread(target=run, name="fpscompile-kept").start()
    return future.result()


__all__ = ["capturing", "integers", "kept", "outside_graphs", "refuse_capture"]
