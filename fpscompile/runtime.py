"""What changes from call to call: the denoising progress and the grid, looked up when a compiled graph runs.

Nothing here is baked into compiled code. Dynamo may reuse one block's code for every block of a class, and for the
blocks of a second model of the same class (Wan 2.2 has two transformers), so the question "whose call is this?" is
asked on every call: first of the context that the attached root module opened, then of the owner of the weights
among the arguments. In a backward pass, a block that runs again belongs to the call in which it ran first
(:mod:`fpscompile.recompute`).
"""

from __future__ import annotations

import contextvars
import math
import threading
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch.utils.weak import WeakIdKeyDictionary

from fpscompile import recompute
from fpscompile.errors import ConcurrentCallError

Grid = tuple[int, int, int]


class Publisher(Protocol):
    """What the runtime needs of an attachment."""

    busy: Busy
    met: bool | None
    """Whether a graph that holds attention has run for it; None where no graph has."""
    told_grid: Grid | None
    """The grid that it was told for all calls; None where none was, or a function."""
    told_in_vain: bool
    """Whether it was said that graphs do not read that grid."""
    captured: bool
    """Whether a CUDA graph was captured around code that it tells the step."""

    def progress(self) -> float:
        """Denoising progress of the running call in [0, 1], NaN when unknown."""

    def weights(self) -> Iterator[tuple[str, torch.nn.Parameter]]:
        """(name in its model, weight) of all that is attached, as it is now."""


@dataclass
class Busy:
    """Refuses a second call of one model while a first is running in another thread."""

    name: str
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _thread: int | None = None
    _depth: int = 0

    def enter(self) -> None:
        me = threading.get_ident()
        with self._lock:
            if self._depth and self._thread != me:
                raise ConcurrentCallError(
                    f"{self.name} is called from two threads at once: its denoising step and grid are state of the "
                    "model. Give each thread a model of its own, or take turns"
                )
            self._thread = me
            self._depth += 1

    def leave(self) -> None:
        with self._lock:
            self._depth -= 1


@dataclass(frozen=True)
class Call:
    """One running call of an attached root module."""

    publisher: Publisher
    grid: Grid | None
    outer: Call | None
    """The call that it runs inside of: of the same model, attached twice, or of a model around it."""


_CALL: contextvars.ContextVar[Call | None] = contextvars.ContextVar("fpscompile_call", default=None)

_PUBLISHERS: list[weakref.ref[Publisher]] = []
"""Those that own weights, in the order in which they were attached."""
_PUBLISHERS_LOCK = threading.Lock()
_OWNERS: WeakIdKeyDictionary = WeakIdKeyDictionary()
"""Parameter -> its (publisher, name in its model) pairs, the last to be attached at the end. Both sides weak: neither a
model nor an attachment is kept alive by the other. Made anew, never changed: readers take no lock."""
_STRANGERS: WeakIdKeyDictionary = WeakIdKeyDictionary()
"""Parameters that nobody owned when all weights were last looked through."""


def open_call(publisher: Publisher, grid: Grid | None) -> contextvars.Token[Call | None]:
    """Calls are closed in the reverse order."""
    publisher.busy.enter()
    return _CALL.set(Call(publisher, grid, _CALL.get()))


def close_call(token: contextvars.Token[Call | None]) -> None:
    call = _CALL.get()
    _CALL.reset(token)
    if call is not None:
        call.publisher.busy.leave()


def current_call() -> Call | None:
    """The running call of an attached root module in this thread."""
    return _CALL.get()


def own(publisher: Publisher) -> None:
    """Make ``publisher`` answer for calls that read its weights, until it disowns them."""
    with _PUBLISHERS_LOCK:
        _PUBLISHERS.append(weakref.ref(publisher))
        _look_through()


def disown(publisher: Publisher) -> None:
    with _PUBLISHERS_LOCK:
        _PUBLISHERS[:] = [ref for ref in _PUBLISHERS if ref() not in (publisher, None)]
        _look_through()
    recompute.forget(publisher)


def _look_through() -> None:
    """Find out anew who owns which weights."""
    global _OWNERS
    owners: WeakIdKeyDictionary = WeakIdKeyDictionary()
    for ref in _PUBLISHERS:
        publisher = ref()
        for name, parameter in publisher.weights() if publisher is not None else ():
            owners[parameter] = (*owners.get(parameter, ()), (ref, name))
    _OWNERS = owners


def owner_of(arguments: Sequence[Any]) -> Publisher | None:
    """The publisher that owns the first owned weight among a compiled graph's arguments.

    Weights may have been replaced since they were attached (``load_state_dict(assign=True)``): where none is known, all
    are looked through once more.
    """
    if not _PUBLISHERS:
        return None
    found = _owner_among(arguments)
    first = next((x for x in arguments if isinstance(x, torch.nn.Parameter)), None) if found is None else None
    if first is not None and first not in _STRANGERS:
        with _PUBLISHERS_LOCK:
            _look_through()
        found = _owner_among(arguments)
        if found is None:
            _STRANGERS[first] = True
    return found


def _owner_among(arguments: Sequence[Any]) -> Publisher | None:
    for argument in arguments:
        owned = _OWNERS.get(argument) if isinstance(argument, torch.nn.Parameter) else None
        if owned is not None:
            return owned[-1][0]()  # type: ignore[no-any-return]
    return None


def _publisher_of(arguments: Sequence[Any]) -> Publisher | None:
    """Of the running call, else of the weights."""
    call = _CALL.get()
    return call.publisher if call is not None else owner_of(arguments)


def weight_names(arguments: Sequence[Any]) -> Iterator[str]:
    """Names of the owned weights among a compiled graph's arguments, in order."""
    if owner_of(arguments) is None:
        return
    for argument in arguments:
        owned = _OWNERS.get(argument) if isinstance(argument, torch.nn.Parameter) else None
        if owned is not None:
            yield owned[-1][1]


def all_weight_names(publisher: Publisher) -> list[str]:
    """Names of all weights that a publisher owns."""
    return [name for owners in _OWNERS.values() for ref, name in owners if ref() is publisher]


def meet(arguments: Sequence[Any], attention: bool) -> None:
    """A graph runs: whoever is attached to its model learns whether it holds attention, or said why it shows none.

    The innermost call tells the step, but the graph is part of every open one.
    """
    call = _CALL.get()
    owner = owner_of(arguments) if call is None else None
    if owner is not None:
        owner.met = owner.met or attention
    while call is not None:
        call.publisher.met = call.publisher.met or attention
        call = call.outer


def first_capture(arguments: Sequence[Any]) -> bool:
    """Whether no CUDA graph was captured before around code that is told its step by this call's publisher."""
    publisher = _publisher_of(arguments)
    if publisher is None or publisher.captured:
        return False
    publisher.captured = True
    return True


def grid_of(arguments: Sequence[Any]) -> Grid | None:
    """The grid that :func:`running` has for a graph on ``arguments``, asked while it is compiled."""
    call = _CALL.get()
    if call is not None:
        return call.grid
    again = recompute.recall(arguments)
    if again is not None:
        return again[1]
    publisher = owner_of(arguments)
    return publisher.told_grid if publisher is not None else None


@contextmanager
def running(arguments: Sequence[Any]) -> Iterator[tuple[float, Grid | None]]:
    """Progress (NaN when unknown) and grid (None when unknown) for one run of a compiled graph.

    Raises:
        ConcurrentCallError: another thread runs the same attached model.
    """
    call = _CALL.get()
    if call is not None:
        progress = call.publisher.progress()
        recompute.remember(arguments, call.publisher, (progress, call.grid))
        yield progress, call.grid
        return
    again = recompute.recall(arguments)
    if again is not None:
        yield again
        return
    publisher = owner_of(arguments)
    if publisher is None:
        yield math.nan, None
        return
    publisher.busy.enter()
    try:
        yield publisher.progress(), publisher.told_grid
    finally:
        publisher.busy.leave()
