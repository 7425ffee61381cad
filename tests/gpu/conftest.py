"""Every launch in Triton's interpreter stays within its tensors: an access next to one is an error here.

On a GPU it would read what lies there, or stop the process; a checker of memory sees it only where a tensor has an
allocation of its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from fpscompile.gpu.interpreter import interpreting


def extent(x: torch.Tensor) -> tuple[int, int]:
    """First address of a tensor, and the one past its last element."""
    last = sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
    return x.data_ptr(), x.data_ptr() + (last + 1) * x.element_size() if x.numel() else x.data_ptr()


class CheckedMemory:
    """Triton's access to memory, for the tensors of the launch that runs."""

    def __init__(self, memory: Any) -> None:
        self.memory = memory
        self.starts = self.ends = np.empty(0, np.uint64)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.memory, name)

    def allow(self, tensors: list[torch.Tensor]) -> None:
        merged: list[list[int]] = []
        for start, end in sorted(map(extent, tensors)):
            if merged and start <= merged[-1][1]:
                merged[-1][1] = max(merged[-1][1], end)
            else:
                merged.append([start, end])
        self.starts, self.ends = (np.array([pair[i] for pair in merged], np.uint64) for i in range(2))

    def check(self, pointers: np.ndarray, mask: np.ndarray, itemsize: int) -> None:
        addresses = pointers[np.broadcast_to(mask, pointers.shape).astype(bool)].astype(np.uint64)
        place = np.searchsorted(self.starts, addresses, side="right").astype(np.int64) - 1
        inside = place >= 0
        inside[inside] = addresses[inside] + np.uint64(itemsize) <= self.ends[place[inside]]
        if not inside.all():
            wrong = int(addresses[~inside][0])
            near = min((int(start) for start in self.starts), key=lambda start: abs(start - wrong), default=0)
            raise AssertionError(
                f"{(~inside).sum()} of {len(addresses)} accesses outside the launch's tensors, the first "
                f"{wrong - near} bytes from the start of one"
            )

    def load(self, pointers: np.ndarray, mask: np.ndarray, other: np.ndarray, dtype: Any) -> Any:
        self.check(pointers, mask, np.dtype(dtype).itemsize)
        return self.memory.load(pointers, mask, other, dtype)

    def store(self, pointers: np.ndarray, value: np.ndarray, mask: np.ndarray) -> Any:
        self.check(pointers, mask, value.dtype.itemsize)
        return self.memory.store(pointers, value, mask)

    def atomic_rmw(self, operation: Any, pointers: np.ndarray, value: np.ndarray, mask: np.ndarray, order: Any) -> Any:
        self.check(pointers, mask, value.dtype.itemsize)
        return self.memory.atomic_rmw(operation, pointers, value, mask, order)

    def atomic_cas(self, pointers: np.ndarray, expected: np.ndarray, value: np.ndarray, order: Any) -> Any:
        self.check(pointers, np.ones(pointers.shape, bool), value.dtype.itemsize)
        return self.memory.atomic_cas(pointers, expected, value, order)


def tensors_of(arguments: Any) -> Iterator[torch.Tensor]:
    for argument in arguments:
        if isinstance(argument, torch.Tensor):
            yield argument
        elif isinstance(argument, (tuple, list)):
            yield from tensors_of(argument)
        elif hasattr(argument, "base"):
            yield from tensors_of([argument.base])


@pytest.fixture(autouse=True)
def checked_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    if not interpreting():
        return
    from triton.runtime import interpreter

    checked, prepare = CheckedMemory(interpreter._interpreter), interpreter.GridExecutor._init_args_hst

    def init_args(self: Any, arguments: Any, keywords: dict[str, Any]) -> Any:
        host, named = prepare(self, arguments, keywords)
        checked.allow(list(tensors_of([*host, *named.values()])))
        return host, named

    monkeypatch.setattr(interpreter, "_interpreter", checked)
    monkeypatch.setattr(interpreter.GridExecutor, "_init_args_hst", init_args)
