"""What attention keeps on a device between calls."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import threading
import weakref

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import fpscompile.ops
import fpscompile.rotary_grid  # noqa: F401  (with ops: registers torch.ops.fps)
from fpscompile import kept as module
from fpscompile.errors import UnsupportedError
from fpscompile.kept import integers, kept, outside_graphs
from fpscompile.plan import PhasePlan, Plan

CPU, GPU = torch.device("cpu"), torch.device("cuda")


def counting(maxsize: int):
    made: list[int] = []

    @kept(maxsize)
    def make(value: int, device: torch.device) -> torch.Tensor:
        made.append(value)
        return torch.tensor(value, device=device)

    return make, made


def test_made_once() -> None:
    make, made = counting(2)
    assert make(3, CPU) is make(3, CPU)
    assert made == [3]


def test_the_least_recently_used_goes_first() -> None:
    make, made = counting(2)
    for value in (1, 2, 1, 3, 1, 2):
        make(value, CPU)
    assert made == [1, 2, 3, 2]


@pytest.mark.parametrize("captured", [True, False])
def test_what_a_capture_has_met_stays(captured: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A graph reads that very tensor's memory: another one with the same values would not do."""
    make, _ = counting(1)
    met = weakref.ref(make(1, CPU))
    monkeypatch.setattr(module, "capturing", lambda device: captured)
    make(1, CPU)
    monkeypatch.undo()
    make(2, CPU)
    assert (met() is not None) == captured


def test_a_later_capture_finds_it_still(monkeypatch: pytest.MonkeyPatch) -> None:
    """Inductor records a graph again without another warm-up; the step may have met more than is kept since."""
    make, made = counting(1)
    make(1, CPU)
    monkeypatch.setattr(module, "capturing", lambda device: True)
    first = make(1, CPU)
    monkeypatch.undo()
    for value in (2, 3):
        make(value, CPU)
    monkeypatch.setattr(module, "capturing", lambda device: True)
    assert make(1, CPU) is first
    assert made == [1, 2, 3]


def test_what_captures_hold_takes_no_place(monkeypatch: pytest.MonkeyPatch) -> None:
    make, made = counting(1)
    make(1, CPU)
    monkeypatch.setattr(module, "capturing", lambda device: True)
    make(1, CPU)
    monkeypatch.undo()
    for value in (2, 1, 2):
        make(value, CPU)
    assert made == [1, 2]


def test_inference_mode_does_not_stick() -> None:
    make, _ = counting(1)
    with torch.inference_mode():
        assert not make(1, CPU).is_inference()
    weight = torch.ones((), requires_grad=True)
    (weight * make(1, CPU)).backward()
    assert weight.grad == 1


def test_no_fake_tensor_is_kept() -> None:
    make, _ = counting(1)
    with FakeTensorMode():
        make(1, CPU)
    assert type(make(1, CPU)) is torch.Tensor


def test_a_thread_that_outlives_the_main_one() -> None:
    """A pool of threads takes no work once the main thread has ended."""
    code = """
import threading, time, torch
from fpscompile.kept import outside_graphs
def work():
    while threading.main_thread().is_alive():
        time.sleep(0.01)
    print(outside_graphs(torch.device("cpu"), lambda: 7), flush=True)
threading.Thread(target=work).start()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout == "7\n", done.stderr


def test_the_first_call_under_a_capture_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    make, made = counting(1)
    with pytest.raises(UnsupportedError, match="run the model once ahead of the capture"):
        make(1, GPU)
    assert not made


def test_a_gpu_is_allocated_on_from_another_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Inductor sends what this thread allocates to the pool of its graphs."""
    events: list[object] = []

    class Stream:
        def synchronize(self) -> None:
            events.append("synchronized")

    @contextlib.contextmanager
    def on(stream: Stream):
        events.append(stream)
        yield

    stream = Stream()
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    monkeypatch.setattr(torch.cuda, "stream", on)

    def make() -> int:
        events.append("made")
        return threading.get_ident()

    assert outside_graphs(GPU, make) != threading.get_ident()
    assert events == [stream, "made", "synchronized"]
    assert outside_graphs(CPU, threading.get_ident) != threading.get_ident()


def test_an_error_on_the_way_is_the_callers() -> None:
    make, made = counting(1)

    @kept(1)
    def fails(device: torch.device) -> torch.Tensor:
        make(0, device)
        raise ValueError("no")

    for _ in range(2):
        with pytest.raises(ValueError, match="no"):
            fails(CPU)
    assert made == [0]


@pytest.mark.parametrize("call", ["phase", "table"])
def test_what_the_host_reads_is_refused_under_a_capture(call: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = Plan(tile=(2, 4, 4), phases=(PhasePlan(density=1.0),), lowering="gather").to_json()
    q, span = torch.randn(1, 1, 96, 32), [0, 96]
    phase, rows = torch.zeros(1, dtype=torch.int32), torch.arange(96)
    table = torch.stack((rows // 24, rows // 6 % 4, rows % 6), 1).float().div(10).sin()

    def run() -> object:
        if call == "table":
            return torch.ops.fps.rotary_grid(table, 0, 0, 96)
        return torch.ops.fps.attention(q, q, q, None, phase, [4, 4, 6], None, span, span, None, plan)

    run()
    monkeypatch.setattr(module, "capturing", lambda device: True)
    with pytest.raises(UnsupportedError, match=r"read by the host at every call.*run this model without capturing"):
        run()


def test_integers() -> None:
    found = integers((3, 0, -1), CPU)
    assert found.dtype == torch.int32
    assert found.tolist() == [3, 0, -1]
    assert integers((3, 0, -1), CPU) is found
