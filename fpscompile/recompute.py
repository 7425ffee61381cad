"""Blocks that activation checkpointing runs again: in which call of the model they ran first.

A block that was compiled alone asks for the step and the grid whenever it runs. When ``torch.utils.checkpoint`` runs it
again in the backward pass, the model's call is over. The checkpoint gives the block the very tensors that it was given
at first, so their memory tells the call. In inference nothing is remembered.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef

State = tuple[float, "tuple[int, int, int] | None"]
"""Progress and grid of a call."""


@dataclass
class _Seen:
    """Whose input a piece of memory was."""

    storage: StorageWeakRef
    publisher: weakref.ref[Any]
    state: State | None
    """None when it was an input of several calls that differ: it says nothing then."""


class _Memory:
    """By address of the storage, which is not used anew as long as a weak reference to it lives."""

    def __init__(self) -> None:
        self.seen: dict[int, _Seen] = {}
        self.lock = threading.Lock()
        self.many = 256

    def sweep(self) -> None:
        """Forget memory that is gone. The bound follows what is alive, so the cost per call is constant."""
        if len(self.seen) > self.many:
            self.seen = {key: seen for key, seen in self.seen.items() if not seen.storage.expired()}
            self.many = 2 * len(self.seen) + 256


_MEMORY = _Memory()


def _activations(arguments: Sequence[Any]) -> Iterator[torch.Tensor]:
    """Tensors among a compiled graph's arguments that are no weights and own plain memory."""
    for argument in arguments:
        if type(argument) is torch.Tensor and argument.layout is torch.strided and argument.numel():
            yield argument


def remember(arguments: Sequence[Any], publisher: Any, state: State) -> None:
    """Note that a block runs on ``arguments`` in a call of ``state``, if a backward pass may follow."""
    tensors = list(_activations(arguments))
    # The reentrant kind of checkpoint runs forward without gradients, on tensors that need one.
    if not (torch.is_grad_enabled() or any(tensor.requires_grad for tensor in tensors)):
        return
    with _MEMORY.lock:
        for tensor in tensors:
            storage = StorageWeakRef(tensor.untyped_storage())
            before = _MEMORY.seen.get(storage.cdata)
            if before is None or before.storage.expired() or before.publisher() is not publisher:
                _MEMORY.seen[storage.cdata] = _Seen(storage, weakref.ref(publisher), state)
            elif before.state != state:
                before.state = None
        _MEMORY.sweep()


def recall(arguments: Sequence[Any]) -> State | None:
    """In a backward pass: the state of the call in which these tensors were arguments; None when no one call is."""
    if torch._C._current_graph_task_id() == -1:
        return None
    with _MEMORY.lock:
        for tensor in _activations(arguments):
            seen = _MEMORY.seen.get(tensor.untyped_storage()._cdata)
            if seen is not None and seen.state is not None and not seen.storage.expired():
                return seen.state
    return None


def forget(publisher: Any) -> None:
    """Nothing is known of the calls of ``publisher`` any more."""
    with _MEMORY.lock:
        _MEMORY.seen = {k: seen for k, seen in _MEMORY.seen.items() if seen.publisher() not in (publisher, None)}
