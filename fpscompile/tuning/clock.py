"""How long a call takes: on a CPU by the clock on the wall, on a GPU by the GPU's own."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

HEAD_START = 8_000_000
"""Clock cycles (4 ms at 2 GHz) that a GPU waits before a timed call, so that Python has launched all of it by then.

In a model the GPU is busy while Python launches attention; timed from an idle one, a call of 2 ms took 3, most of the
third waiting for Python, and configs could not be told apart.
"""


def seconds(call: Callable[[], object], device: torch.device) -> float:
    """Seconds that ``call`` takes on ``device``; on a GPU, without the launches."""
    return _on_gpu(call, device) if device.type == "cuda" else _on_cpu(call)


def _on_cpu(call: Callable[[], object]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def _on_gpu(call: Callable[[], object], device: torch.device) -> float:
    with torch.cuda.device(device):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        torch.cuda._sleep(HEAD_START)
        begin.record()
        call()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3
