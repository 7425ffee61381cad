"""Schedules: what covers [0, 1] is accepted, everything else is refused with its numbers."""

from __future__ import annotations

import json

import pytest

from fpscompile.errors import OptionError, ScheduleError
from fpscompile.schedule import GRANULARITIES, PRESETS, Phase, Schedule
from fpscompile.windows import FirstFrame, Radial, TopK


def ranges(*bounds: tuple[float, float]) -> tuple[Phase, ...]:
    return tuple(Phase(start, end, density=0.5) for start, end in bounds)


@pytest.mark.parametrize(
    ("bounds", "message"),
    [
        ([(0.0, 0.4), (0.5, 1.0)], r"leave a gap: \[0.5, 1.0\) should start at 0.4"),
        ([(0.0, 0.5), (0.4, 1.0)], r"overlap: \[0.4, 1.0\) should start at 0.5"),
        ([(0.5, 1.0), (0.0, 0.5)], r"leave a gap: \[0.5, 1.0\) should start at 0.0"),
        ([(0.1, 1.0)], "should start at 0.0"),
        ([(0.0, 0.9)], "end at 0.9; the last one must end at 1.0"),
        ([], "at least one phase"),
    ],
)
def test_ranges_that_do_not_cover(bounds: list[tuple[float, float]], message: str) -> None:
    with pytest.raises(ScheduleError, match=message):
        Schedule(ranges(*bounds))


@pytest.mark.parametrize(
    ("start", "end"), [(0.6, 0.4), (0.5, 0.5), (-0.1, 0.5), (0.5, 1.1), (float("nan"), 1.0), (0.0, float("nan"))]
)
def test_bad_range(start: float, end: float) -> None:
    with pytest.raises(ScheduleError, match="not a range of progress"):
        Phase(start, end, density=0.5)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({}, "exactly one of window and density"),
        ({"window": (1, 1, 1), "density": 0.5}, "exactly one of window and density"),
        ({"window": (0, 1, 1)}, r"window=\(0, 1, 1\)"),
        ({"window": (1, 1)}, "three integers"),
        ({"window": (1, 1.5, 1)}, "three integers"),
        ({"window": 3}, "three integers"),
        ({"density": 0.0}, "density=0.0"),
        ({"density": 1.01}, "density=1.01"),
        ({"density": True}, "density=True"),
        ({"density": "half"}, "density='half'"),
        ({"density": 0.5, "granularity": "token"}, "granularity 'token' is unknown"),
        ({"window": "topk"}, "window='topk' needs a density"),
        ({"window": {"family": "topk", "tiles": 3}, "density": 0.5}, "exactly one of window and density"),
        ({"window": "radial", "density": 0.5}, "exactly one of window and density"),
    ],
)
def test_bad_phase(kwargs: dict, message: str) -> None:
    with pytest.raises(ScheduleError, match=message):
        Phase(0.0, 1.0, **kwargs)


def test_schedule_errors_are_option_errors() -> None:
    assert issubclass(ScheduleError, OptionError)


def test_phase_at_is_half_open_and_the_last_includes_one() -> None:
    schedule = Schedule(ranges((0.0, 0.25), (0.25, 0.5), (0.5, 1.0)))
    assert schedule.boundaries == (0.25, 0.5)
    expected = {0.0: 0, 0.2499: 0, 0.25: 1, 0.4999: 1, 0.5: 2, 0.99: 2, 1.0: 2}
    assert {progress: schedule.phase_at(progress) for progress in expected} == expected


@pytest.mark.parametrize("progress", [-0.01, 1.01, float("nan")])
def test_phase_at_outside(progress: float) -> None:
    with pytest.raises(ScheduleError, match=r"outside \[0, 1\]"):
        Schedule(ranges((0.0, 1.0))).phase_at(progress)


def test_of_accepts_all_spellings() -> None:
    phases = ranges((0.0, 0.3), (0.3, 1.0))
    dicts = [{"start": 0.0, "end": 0.3, "density": 0.5}, {"start": 0.3, "end": 1.0, "density": 0.5}]
    assert Schedule.of(list(phases)).phases == Schedule.of(dicts).phases == phases
    schedule = Schedule(phases)
    assert Schedule.of(schedule) is schedule
    assert Schedule.of("paper") is PRESETS["paper"]
    assert Phase(0.0, 1.0, window=[1, 2, 3]).window == (1, 2, 3)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("papre", "presets are paper, training_free"),
        (3, "a preset's name"),
        ([{"begin": 0.0, "end": 1.0}], r"^schedule\[0\]: a phase has no key 'begin'; its keys are start, end, window"),
        ([{"start": 0.0, "density": 0.5}], r"^schedule\[0\]: .* end of .* is missing"),
        ([{"start": "a", "end": 1.0, "density": 0.5}], r"^schedule\[0\]: phase \['a', 1.0\) is not a range"),
        ([{"start": 0.0, "end": True, "density": 0.5}], "need numbers"),
        ([0.5], r"^schedule\[0\]: 0.5 is no phase: give a Phase, or a dict"),
    ],
)
def test_of_refuses(value: object, message: str) -> None:
    with pytest.raises(ScheduleError, match=message):
        Schedule.of(value)


@pytest.mark.parametrize("name", ["paper", "training_free"])
def test_presets(name: str) -> None:
    preset = PRESETS[name]
    assert preset.name == name
    assert preset.clamp
    assert all(phase.granularity in GRANULARITIES for phase in preset.phases)


def test_presets_keep_their_orders() -> None:
    early, middle, late = (phase.density for phase in PRESETS["paper"].phases)
    assert early < late < middle  # type: ignore[operator]
    mean = sum(phase.density * (phase.end - phase.start) for phase in PRESETS["paper"].phases)  # type: ignore[operator]
    assert mean == pytest.approx(0.2)
    assert PRESETS["training_free"].phases[0].density == 1.0


def test_windows_of_other_families() -> None:
    assert Phase(0.0, 1.0, window="radial").window == Radial()
    assert Phase(0.0, 1.0, window={"family": "sliding", "size": [1, 2, 3]}).window == (1, 2, 3)  # type: ignore[arg-type]
    both = Phase(0.0, 1.0, window={"family": "union", "of": ["sink", "topk"]}, density=0.25)  # type: ignore[arg-type]
    assert both.window == FirstFrame() | TopK(0.25)
    assert both.density is None
    for phase in (both, Phase(0.0, 1.0, window=(1, 2, 3), granularity="head"), Phase(0.0, 1.0, density=0.5)):
        assert Phase(**json.loads(json.dumps(phase.to_data()))) == phase


def test_constant() -> None:
    schedule = Schedule.constant(window=(1, 2, 3))
    assert len(schedule.phases) == 1
    assert not schedule.boundaries
    assert not schedule.clamp
