"""The denoising step of each call of an attached model, read off the scheduler that drives it."""

from __future__ import annotations

import inspect
import logging
import math
from typing import Any

import torch

logger = logging.getLogger(__name__)

IDLE_CALLS = 16
"""Calls of a model after which its scheduler should have been stepped: a step of guidance makes two to four."""


class StepReader:
    """Reads how far a scheduler is, whenever it is asked.

    Args:
        scheduler: any with ``timesteps``; None where nothing tells the step.
        pipe: the pipeline whose scheduler it is. It may be given another one at any time, which then tells the step.
    """

    def __init__(self, scheduler: Any, pipe: Any = None) -> None:
        self._given, self._pipe = scheduler, pipe
        self._scheduler: Any = None
        self._counter: _StepCounter | None = None
        self._closed = False
        self._idle = 0
        self._due: int | None = None
        self._read()

    def close(self) -> None:
        """Leave the scheduler as it was found."""
        self._closed = True
        self._let_go()

    def progress(self) -> float:
        """Step index / number of steps, in [0, 1]; NaN without a scheduler, or before it has timesteps."""
        scheduler = self._read()
        timesteps = getattr(scheduler, "timesteps", None)
        total = len(timesteps) if timesteps is not None else 0
        index = self._stepped_to()
        if index is None:
            index = self._due
        if index is None:
            index = getattr(scheduler, "begin_index", None) or 0
        return min(int(index), total) / total if total else math.nan

    def called(self, name: str, timestep: Any) -> None:
        """A model is called, and given ``timestep``, None where it is not known.

        Until the scheduler has been stepped, which copies of it may be in its place, only that tells where the loop
        is: one that begins midway (video to video) does not say so. A scheduler that is never stepped, and whose
        timesteps the model is not given, would leave every call at step 0, unnoticed.
        """
        self._due = None
        if math.isnan(self.progress()) or self._stepped_to() is not None:
            self._idle = 0
            return
        self._due = _place_of(timestep, self._scheduler.timesteps)
        if self._due is not None:
            self._idle = 0
            return
        self._idle += 1
        if self._idle == IDLE_CALLS:
            logger.warning(
                "%s was called %d times and the attached scheduler, a %s, was not stepped: every call counts as its "
                "first step. Where a copy of it is stepped, or none, give the step with Attachment.step(index, total); "
                "or compile the whole model and attach it without a scheduler, so that its graph reads the timestep",
                *(name, IDLE_CALLS, type(self._scheduler).__name__),
            )

    def _read(self) -> Any:
        scheduler = self._given if self._pipe is None else getattr(self._pipe, "scheduler", None)
        if scheduler is not self._scheduler and not self._closed:
            self._let_go()
            self._scheduler, self._counter = scheduler, _StepCounter.of(scheduler)
        return scheduler

    def _let_go(self) -> None:
        if self._counter is not None:
            self._counter.restore()
        self._scheduler = self._counter = None

    def _stepped_to(self) -> int | None:
        """The place that the scheduler's steps have led to; None before the first one."""
        if self._counter is not None:
            return self._counter.index
        index: int | None = getattr(self._scheduler, "step_index", None)
        return index


def timestep_of(parameters: list[str], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The timestep that a model is called with; None where none of its parameters is called that."""
    given = dict(zip(parameters, args, strict=False)) | kwargs
    return next((given[name] for name in ("timestep", "t") if name in given), None)


def _place_of(timestep: Any, timesteps: Any) -> int | None:
    """The first place of ``timestep``, of several the noisiest, in ``timesteps``; None where it is not there.

    It waits for the device, so it must not be asked while a CUDA graph is captured, and does not answer then.
    """
    if not isinstance(timestep, (torch.Tensor, int, float)):
        return None
    value = torch.as_tensor(timestep)
    if not value.numel() or (value.is_cuda and torch.cuda.is_current_stream_capturing()):
        return None
    places = _places(value.max(), timesteps)
    return places[0] if places else None


def _places(timestep: torch.Tensor, timesteps: Any) -> list[int]:
    """Where ``timesteps`` are ``timestep``, compared in its dtype: a model may be given it in bfloat16."""
    known = torch.as_tensor(timesteps).to(timestep.device, timestep.dtype)
    return (known == timestep).nonzero().flatten().tolist()


class _StepCounter:
    """Step index for schedulers that keep none (DDIM and kin): the place in ``timesteps`` after the last step.

    It takes the place of the scheduler's ``step``, with its signature, by which pipelines decide what to pass. It is
    an object and not a function so that a deep copy of the scheduler has a counter, and a ``step``, of its own.
    """

    def __init__(self, scheduler: Any) -> None:
        self.scheduler = scheduler
        self._index: int | None = None
        self._timesteps: Any = vars(scheduler).get("timesteps")
        self._before = vars(scheduler).get("step")
        self._step = scheduler.step
        self.__signature__ = inspect.signature(scheduler.step)
        names = list(self.__signature__.parameters)
        self._name = "timestep" if "timestep" in names else names[1] if len(names) > 1 else ""
        scheduler.step = self

    @classmethod
    def of(cls, scheduler: Any) -> _StepCounter | None:
        if scheduler is None or hasattr(scheduler, "step_index") or not hasattr(scheduler, "step"):
            return None
        return cls(scheduler)

    @property
    def index(self) -> int | None:
        """None before the first step of a video: timesteps that were set anew begin one, also when the last was given
        up midway."""
        timesteps = vars(self.scheduler).get("timesteps")  # not what a property makes for every reader
        if timesteps is not self._timesteps:
            self._timesteps, self._index = timesteps, None
        return self._index

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        index = self.index or 0
        result = self._step(*args, **kwargs)
        timestep = self.__signature__.bind(*args, **kwargs).arguments.get(self._name)
        timesteps = self.scheduler.timesteps
        places = [] if timestep is None else _places(torch.as_tensor(timestep), timesteps)
        # Schedulers of higher order list a timestep twice: the one that is due is the first that was not reached yet.
        place = next((place for place in places if place >= index), places[0] if places else index)
        self._timesteps = vars(self.scheduler).get("timesteps")
        self._index = (place + 1) % max(len(timesteps), 1)
        return result

    def restore(self) -> None:
        if vars(self.scheduler).get("step") is not self:
            return
        del self.scheduler.step
        if self._before is not None:
            self.scheduler.step = self._before
