"""``fps::phase_index``: progress from the timestep, or published, to the phase of the schedule."""

from __future__ import annotations

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fpscompile.errors import OptionError
from fpscompile.phase_index import _phase_index, phase_index
from fpscompile.schedule import PRESETS, Schedule

BOUNDARIES = (0.2, 0.8)
UNKNOWN = 7
"""Stands for the conservative phase: no boundary count gives it."""


def phase(timestep=None, published=None, **fields) -> list[int]:
    result = phase_index(
        None if timestep is None else torch.as_tensor(timestep),
        None if published is None else torch.as_tensor(published, dtype=torch.float32),
        BOUNDARIES,
        UNKNOWN,
        **fields,
    )
    assert result.dtype == torch.int32
    assert result.dim() == 1
    return result.tolist()


@pytest.mark.parametrize("shift", [1.0, 3.0, 5.0, 7.0])
@pytest.mark.parametrize("steps", [5, 10, 20, 30, 50, 100])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("start", "end"), [(1000.0, 0.0), (1.0, 0.0), (0.0, 1.0)])
def test_every_step_of_a_flow_schedule(shift, steps, dtype, start, end):
    """Boundary steps ``i / N`` belong to the phase they begin, in spite of rounding."""
    schedule = Schedule.of("paper")
    progress = torch.arange(steps, dtype=torch.float64) / steps
    u = 1 - progress
    sigma = shift * u / (1 + (shift - 1) * u)
    timestep = (end + sigma * (start - end)).to(dtype)
    result = phase_index(timestep, None, schedule.boundaries, UNKNOWN, start, end, shift)
    # the nearest fraction, not its float neighbour, decides
    wanted = [sum(round(b * steps, 9) <= i for b in schedule.boundaries) for i in range(steps)]
    assert result.tolist() == wanted


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.int64, torch.int32])
@pytest.mark.parametrize("shift", [1.0, 5.0])
def test_coarse_timesteps_stay_on_the_right_side(dtype, shift):
    steps = 20
    u = 1 - torch.arange(steps, dtype=torch.float64) / steps
    exact = 1000 * shift * u / (1 + (shift - 1) * u)
    timestep = exact.to(dtype) if dtype.is_floating_point else exact.round().to(dtype)
    wanted = [sum(round(b * steps, 9) <= i for b in BOUNDARIES) for i in range(steps)]
    assert phase(timestep, shift=shift) == wanted


def test_truncated_integers_as_schedulers_give_them():
    steps, shift = 50, 3.0
    u = 1 - torch.arange(steps, dtype=torch.float64) / steps
    timestep = (1000 * shift * u / (1 + (shift - 1) * u)).to(torch.int64)
    assert phase(timestep, shift=shift) == [0] * 10 + [1] * 30 + [2] * 10


@pytest.mark.parametrize("shape", [(), (1,), (3,), (3, 4), (3, 2, 5)])
def test_shapes(shape):
    assert phase(torch.full(shape, 500.0)) == [1] * (shape[0] if shape else 1)


def test_tokens_reduce_to_the_noisiest_that_is_not_clean():
    clean = 0.0
    timestep = torch.tensor([[clean, 900.0, 900.0], [clean, 100.0, 500.0], [clean, clean, clean], [150.0, clean, 50.0]])
    assert phase(timestep) == [0, 1, 2, 2]
    assert phase(timestep[..., None].expand(-1, -1, 2)) == [0, 1, 2, 2]


def test_published_wins_where_it_is_known():
    assert phase(900.0, [0.5]) == [1]
    assert phase(900.0, [math.nan]) == [0]
    assert phase([900.0, 100.0], [0.5]) == [1, 1]
    assert phase([900.0, 100.0], [math.nan]) == [0, 2]
    assert phase([900.0, 100.0], [0.5, math.nan]) == [1, 2]
    assert phase(900.0, [0.5, math.nan, 0.9]) == [1, 0, 2]
    assert phase(None, [0.5, math.nan, 0.9]) == [1, UNKNOWN, 2]


@pytest.mark.parametrize("steps", [5, 10, 50, 1000])
def test_published_step_over_steps_is_exact(steps):
    published = torch.arange(steps) / steps
    wanted = [sum(round(b * steps, 9) <= i for b in BOUNDARIES) for i in range(steps)]
    assert phase(None, published) == wanted


def test_unknown_is_conservative():
    assert phase() == [UNKNOWN]
    assert phase(None, [math.nan]) == [UNKNOWN]
    assert phase([math.nan, 500.0]) == [UNKNOWN, 1]
    assert phase([[math.nan, 500.0], [500.0, 500.0]]) == [UNKNOWN, 1]


def test_outside_is_conservative_and_rounding_is_not():
    assert phase([1000.5, -0.5]) == [0, 2]
    assert phase([1002.0, -2.0, math.inf]) == [UNKNOWN] * 3
    assert phase([[500.0, -2.0]]) == [UNKNOWN]
    assert phase(None, [1.0005, -0.0005, 1.1, -0.1]) == [2, 0, UNKNOWN, UNKNOWN]


@pytest.mark.parametrize("name", list(PRESETS))
def test_agrees_with_the_schedule(name):
    schedule = Schedule.of(name)
    progress = torch.rand(200)
    result = phase_index(None, progress, schedule.boundaries, 0)
    assert result.tolist() == [schedule.phase_at(float(p)) for p in progress]
    assert phase_index(None, torch.tensor([1.0]), schedule.boundaries, 0).item() == len(schedule.phases) - 1


def test_numbers_that_do_not_fit():
    with pytest.raises(OptionError, match="2 published values of progress for 3 timesteps"):
        phase([1.0, 2.0, 3.0], [0.1, 0.2])


@pytest.mark.parametrize(
    ("timestep", "published"),
    [
        (torch.tensor(500), None),
        (torch.rand(3) * 1000, torch.tensor([math.nan])),
        (torch.rand(3, 4), torch.rand(3)),
        (None, torch.rand(1)),
        (torch.rand(1), torch.rand(3)),
    ],
)
def test_opcheck(timestep, published):
    args = (timestep, published, list(BOUNDARIES), 1, 1000.0, 0.0, 3.0)
    torch.library.opcheck(torch.ops.fps.phase_index.default, args)


@torch._dynamo.config.patch(error_on_recompile=True)
def test_compiles_once_for_all_steps_and_reads_a_buffer_filled_in_place():
    published = torch.tensor([math.nan])

    @torch.compile(backend="aot_eager", fullgraph=True, dynamic=True)
    def function(timestep: torch.Tensor) -> torch.Tensor:
        return phase_index(timestep * 1, published, BOUNDARIES, UNKNOWN)

    assert [function(torch.tensor([t, t])).tolist() for t in (950.0, 500.0, 30.0)] == [[0, 0], [1, 1], [2, 2]]
    published.fill_(0.5)
    assert function(torch.tensor([950.0, 950.0, 1.0])).tolist() == [1, 1, 1]


def test_is_plain_tensor_arithmetic():
    """No read-back of a value to the host: CUDA graphs forbid it."""
    seen = []

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    with Record():
        _phase_index(torch.rand(2, 3), torch.rand(1), BOUNDARIES, 0, 1.0, 0.0, 3.0)
    assert seen
    assert not [name for name in seen if "_local_scalar_dense" in name or "nonzero" in name or "item" in name]
