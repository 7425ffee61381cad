"""What the tuner's clock counts: on a GPU not the time that Python takes to launch a call."""

from __future__ import annotations

import time
from types import SimpleNamespace

import pytest
import torch

from fpscompile import lowerings
from fpscompile.plan import PhasePlan, Plan, resolve
from fpscompile.tuning import clock
from fpscompile.tuning.problem import Candidate, Problem

GPU = torch.device("cuda", 0)


def test_on_a_cpu_a_call_takes_what_passes_until_it_returns() -> None:
    assert 0.02 <= clock.seconds(lambda: time.sleep(0.02), torch.device("cpu")) < 2


def test_a_gpu_waits_before_the_first_event(monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the events it is never idle because Python is late."""
    queued: list[str] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            queued.append("event")

        def synchronize(self) -> None:
            queued.append("wait")

        def elapsed_time(self, end: Event) -> float:
            assert end is not self
            return 1.5

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "device", lambda device: pytest.MonkeyPatch.context())
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: queued.append("idle"))
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: queued.append("head start"))
    assert clock.seconds(lambda: queued.append("call"), GPU) == pytest.approx(0.0015)
    assert queued == ["idle", "head start", "event", "call", "event", "wait"]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_launches_are_not_counted() -> None:
    x = torch.zeros(1, device=GPU)
    clock.seconds(lambda: x.add_(1), GPU)

    def late() -> None:
        x.add_(1)
        time.sleep(0.002)
        x.add_(1)

    assert clock.seconds(late, GPU) < 0.001


def test_the_step_is_told_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where kernels read it on the device, a copy per call would make Python wait for the GPU."""
    plan = Plan(tile=(2, 2, 2), phases=(PhasePlan(density=1.0), PhasePlan(density=0.5)), clamp=True)
    resolved = resolve(plan, (4, 4, 4), 64, 64)
    seen = []

    def forward(q: torch.Tensor, *_: object, phases: torch.Tensor, **__: object) -> tuple[torch.Tensor, None]:
        seen.append(phases)
        return q, None

    monkeypatch.setattr(lowerings, "get", lambda name: SimpleNamespace(forward=forward, PHASES_ON_DEVICE=True))
    problem = Problem(resolved, 1, 1, 8, 8, torch.float32, torch.device("cpu"))
    once = problem.timed(Candidate("triton"), problem.inputs())
    once()
    once()
    assert [int(phase) for phase in seen] == [0, 1, 0, 1]
    assert seen[0] is seen[2]
    assert seen[1] is seen[3]
