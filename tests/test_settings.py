"""Options: what is refused, with which words."""

from __future__ import annotations

import dataclasses
import inspect
import json
import sys
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch

from fpscompile.errors import FpsError, OptionError, ScheduleError
from fpscompile.schedule import Phase, Schedule
from fpscompile.settings import Settings


def test_defaults() -> None:
    settings = Settings.from_options(None)
    assert settings.phases.name == "training_free"
    assert settings.quant == settings.lowering == "auto"
    assert settings.inner == "inductor"
    assert settings.attention_kinds == ("3d",)
    assert settings.timestep.input == "timestep"


def test_every_option_is_a_documented_field() -> None:
    source = inspect.getsource(sys.modules[Settings.__module__])
    for field in dataclasses.fields(Settings):
        declaration = source.index(f"\n    {field.name}: ")
        assert '"""' in source[declaration : declaration + 400], field.name


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"tuning": "a\0b"}, "must be the path of a tuning file"),
        ({"windw": (1, 1, 1)}, "did you mean 'window'"),
        ({"tile": (0, 8, 8)}, r"tile=\(0, 8, 8\) must be three integers >= 1"),
        ({"tile": (4, 8)}, "three integers"),
        ({"tile": (4.0, 8, 8)}, "three integers"),
        ({"window": (0, 1, 1)}, "three integers >= 1"),
        ({"window": "all"}, "three integers"),
        ({"density": 0.0}, r"\(0, 1\]"),
        ({"density": 1.5}, r"\(0, 1\]"),
        ({"density": True}, r"\(0, 1\]"),
        ({"window": (1, 1, 1), "density": 0.5}, "window and density together"),
        ({"schedule": "paper", "density": 0.5}, "density and schedule together"),
        ({"schedule": "papr"}, "presets are"),
        ({"schedule": 7}, "a schedule is"),
        (
            {"schedule": [{"start": 0.0, "stop": 1.0}]},
            r"schedule\[0\]: a phase has no key 'stop'; its keys are start, end",
        ),
        ({"quant": "int4"}, "'auto', 'fp8', 'int8', 'none'"),
        ({"granularity": "pixel"}, "granularity"),
        ({"lowering": "magic"}, "'boxes'"),
        ({"inner": 3}, "backend name or a callable"),
        ({"inner": "fps"}, "from itself"),
        ({"inner_options": "fast"}, "must be a dict"),
        ({"inner_options": {1: 2}}, r"inner_options=\{1: 2\} must be a dict"),
        ({"heads": {}}, r"heads=\{\} must be a dict"),
        ({"layers": {}}, r"layers=\{\} must be a dict"),
        ({"layers": {"0": {"density": 3}}}, r"^layers\['0'\]: density=3"),
        ({"layers": {"0": {"heads": {"0-3": "foo"}}}}, r"^layers\['0'\]: heads\['0-3'\]: window 'foo'"),
        ({"heads": {"0": "foo"}}, r"^heads\['0'\]: window 'foo'"),
        (
            {"schedule": [Phase(0, 0.5, density=1.0), {"start": 0.5, "end": 1, "density": 0}]},
            r"^schedule\[1\]: density=0",
        ),
        ({"window": "topk"}, "^window 'topk' needs a density: give the option 'density'"),
        ({"layers": {"0": "topk"}}, r"^layers\['0'\]: window 'topk' needs a density: give the option 'density'"),
        ({"grid": (3, 6)}, "three integers"),
        ({"history": "hidden"}, "choose one of 'global', 'windowed'"),
        ({"timestep": {"inputs": "t"}}, "did you mean 'input'"),
        ({"timestep": {"start": 0.0, "end": 0.0}}, "both"),
        ({"timestep": {"shift": 0}}, "positive"),
        ({"timestep": {"start": "noise"}}, "must be a number"),
        ({"timestep": "t"}, "must be a dict"),
        ({"strict": "yes"}, "True or False"),
        ({"smooth_k": 1}, "smooth_k=1 must be True or False"),
        ({"smooth_v": "yes"}, "smooth_v='yes' must be True or False"),
        ({"hadamard": None}, "hadamard=None must be True or False"),
        ({"hadamard": 64}, "hadamard=64 must be True or False"),
        ({"hadamard": True, "quant": "int8"}, "exclude each other"),
        ({"hadamrd": True}, "did you mean 'hadamard'"),
        ({"attention_kinds": ("4d",)}, "'spatial'"),
        ({"attention_kinds": ("3d", "temporal")}, "only '3d'"),
    ],
)
def test_bad_options(options: dict[str, Any], words: str) -> None:
    with pytest.raises(OptionError, match=words) as caught:
        Settings.from_options(options)
    assert isinstance(caught.value, FpsError)
    assert isinstance(caught.value, ValueError)


NUMPY = {
    "tile": (np.int64(4), np.int32(8), np.uint8(8)),
    "grid": np.array([3, 6, 10]),
    "timestep": {"start": np.float32(1000), "end": np.int64(0), "shift": Fraction(3)},
}


@pytest.mark.parametrize(
    "how",
    [
        {"density": np.float32(0.25)},
        {"window": (np.int64(1), np.int64(2), 2)},
        {"schedule": [{"start": np.int64(0), "end": np.float32(0.5), "density": np.float16(0.5)},
                      {"start": np.float32(0.5), "end": np.float64(1), "window": {"family": "temporal",
                                                                                 "size": np.array([2, 2])}}]},
        {"layers": {"0": {"density": np.float32(0.5)}}, "heads": {"0": {"family": "radial", "size": np.array([2, 2])}}},
    ],
    ids=lambda how: "+".join(how),
)  # fmt: skip
def test_numbers_of_numpy_become_plain_ones(how: dict[str, Any]) -> None:
    settings = Settings.from_options(NUMPY | how)
    fields = dataclasses.asdict(settings.timestep)
    phases = [phase.to_data() for schedule in settings.variants for phase in schedule.phases]
    json.dumps([settings.tile, settings.grid, settings.density, settings.window, fields, phases])
    hash(settings)
    assert [type(size) for size in (*settings.tile, *settings.grid)] == [int] * 6  # type: ignore[misc]
    assert [type(fields[name]) for name in ("start", "end", "shift")] == [float] * 3
    assert "np." not in repr(settings)


def test_plain_numbers_and_those_of_numpy_are_the_same_settings() -> None:
    plain = {"tile": (4, 8, 8), "grid": (3, 6, 10), "timestep": {"start": 1000, "end": 0, "shift": 3}}
    ours, theirs = (Settings.from_options(options | {"density": 0.25}) for options in (NUMPY, plain))
    assert ours == theirs
    assert hash(ours) == hash(theirs)
    assert repr(ours) == repr(theirs)


ITEM = r" is a Tensor: pass a number \(\.item\(\)\)$"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"density": torch.tensor(0.2)}, r"^density=tensor\(0\.2000\)" + ITEM),
        ({"tile": (torch.tensor(4), 8, 8)}, r"^tile\[0\]=tensor\(4\)" + ITEM),
        ({"tile": torch.tensor([4, 8, 8])}, r"^tile=tensor\(\[4, 8, 8\]\) is a Tensor: pass numbers \(\.tolist\(\)\)$"),
        ({"grid": [3, 6, torch.tensor(10)]}, r"^grid\[2\]=tensor\(10\)" + ITEM),
        ({"window": (1, torch.tensor(2), 2)}, r"^window\[1\]=tensor\(2\)" + ITEM),
        ({"window": {"family": "temporal", "size": (1, torch.tensor(2))}}, r"^size\[1\]=tensor\(2\)" + ITEM),
        ({"window": {"family": "spatial", "frames": torch.tensor(2)}}, r"^frames=tensor\(2\)" + ITEM),
        ({"timestep": {"start": torch.tensor(9)}}, r"^timestep\['start'\]=tensor\(9\)" + ITEM),
        (
            {"schedule": [{"start": 0, "end": torch.tensor(1.0), "density": 0.5}]},
            r"^schedule\[0\]: end=tensor\(1\.\)" + ITEM,
        ),
        ({"density": "0.2"}, r"density='0\.2' must be a number in \(0, 1\]"),
        ({"density": np.bool_(True)}, r"must be a number in \(0, 1\]"),
        ({"density": 10**400}, r"must be a number in \(0, 1\]"),
        ({"tile": (True, 8, 8)}, "three integers"),
        ({"tile": (np.bool_(True), 8, 8)}, "three integers"),
        ({"tile": (np.float64(4), 8, 8)}, "three integers"),
        ({"tile": np.array([4.0, 8, 8])}, "three integers"),
        ({"window": b"abc"}, "three integers"),
        ({"timestep": {"start": True}}, "must be a number, and finite"),
        ({"timestep": {"start": np.float32("inf")}}, "must be a number, and finite"),
        ({"timestep": {"start": 10**400}}, "must be a number, and finite"),
        ({"schedule": [{"start": False, "end": True, "density": 0.5}]}, "need numbers 0 <= start < end <= 1"),
    ],
    ids=str,
)
def test_what_is_no_plain_number(options: dict[str, Any], words: str) -> None:
    with pytest.raises(OptionError, match=words):
        Settings.from_options(options)


@pytest.mark.parametrize("ranges", [[(0.0, 0.5), (0.4, 1.0)], [(0.0, 0.4), (0.5, 1.0)], [(0.5, 0.2)], [(0.0, 0.9)]])
def test_schedules_with_gaps_overlaps_or_reversed_ranges(ranges: list[tuple[float, float]]) -> None:
    with pytest.raises(ScheduleError):
        Settings.from_options({"schedule": [{"start": a, "end": b, "density": 0.5} for a, b in ranges]})


def test_schedules_in_every_form() -> None:
    phases = [Phase(0.0, 0.5, density=1.0), Phase(0.5, 1.0, window=(1, 2, 2))]
    from_dicts = Settings.from_options({"schedule": [dataclasses.asdict(phase) for phase in phases]})
    assert from_dicts.phases == Settings.from_options({"schedule": phases}).phases == Schedule(tuple(phases))
    assert Settings.from_options({"window": [1, 2, 2]}).phases.phases[0].window == (1, 2, 2)


def test_granularity_overrides_every_phase() -> None:
    settings = Settings.from_options({"schedule": "paper", "granularity": "head"})
    assert {phase.granularity for phase in settings.phases.phases} == {"head"}


def test_settings_are_hashable() -> None:
    options = {"inner_options": {"freezing": True}, "timestep": {"shift": 3.0}}
    assert hash(Settings.from_options(options)) == hash(Settings.from_options(options))


@pytest.mark.parametrize(
    "options",
    [
        {"attention_kinds": None}, {"attention_kinds": 3}, {"attention_kinds": ()}, {"inner_options": {1: 2, "a": 3}},
        {"inner_options": (1,)}, {"heads": (1,)}, {"heads": ((),)}, {"layers": (1,)}, {"layers": ((),)},
        {"window": {"family": "heads", "of": (1,)}}, {"timestep": {"shift": float("nan")}},
        {"timestep": {"start": float("inf")}}, [1], "x",
    ],
    ids=str,
)  # fmt: skip
def test_a_value_of_another_type_is_an_option_error(options: Any) -> None:
    with pytest.raises(OptionError):
        Settings.from_options(options)
