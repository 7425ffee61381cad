"""Which of several functions is the fastest, on a machine that others use too.

Candidates run in turns, so whatever slows the machine slows all of them, and they are compared round by round: the
ratio of two times of one round forgets how busy the machine was. A candidate drops out as soon as the confidence
interval of the median of its ratios to the leader lies above 1, or when it lies within what counts as equal; the race
ends with one left, or with its rounds or seconds. The interval is that of order statistics (binomial, at least 95 %),
so a few disturbed rounds widen it but do not move it.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)

CONFIDENCE = 0.95

FIRST_LOOK = 2
"""Rounds after which a candidate that is far behind drops out."""

FAR_BEHIND = 1.3
"""Ratio of its best time to the leader's worst that counts as far behind."""

SAMPLES = 3
"""Times that a median is taken of, at least."""

HOPELESS = 3.0
"""Ratio to the best first time at which a candidate does not even enter the rounds."""


@dataclass(frozen=True)
class Effort:
    """How long to look."""

    name: str
    rounds: int
    """At most, for one site."""
    seconds: float
    """Budget of the rounds of one site; building kernels does not count."""
    equal: float
    """Relative difference that counts as none."""


EFFORTS = {
    effort.name: effort
    for effort in (Effort("quick", rounds=15, seconds=10.0, equal=0.02), Effort("full", 60, 120.0, 0.01))
}


@dataclass(frozen=True)
class Result(Generic[K]):
    """How a race ended."""

    order: tuple[K, ...]
    """All candidates: those left at the end first, then the others, each by their median."""
    seconds: Mapping[K, float]
    """Median time of each."""
    rounds: int
    measurements: int

    @property
    def winner(self) -> K:
        return self.order[0]


def race(
    candidates: Mapping[K, Callable[[], float]],
    effort: Effort,
    *,
    incumbent: K,
    tick: Callable[[], None] = lambda: None,
    clock: Callable[[], float] = time.perf_counter,
) -> Result[K]:
    """Race ``candidates`` until it is clear who wins.

    Args:
        candidates: name to a function that runs once and returns its seconds.
        incumbent: the one to stay with unless another is faster beyond doubt.
        tick: called after each measurement.
    """
    times: dict[K, list[float]] = {name: [] for name in candidates}

    def run(name: K) -> float:
        seconds = candidates[name]()
        tick()
        return seconds

    first = {name: run(name) for name in candidates}  # builds, warms caches; not a sample
    count = len(first)
    best = min(first.values())
    alive = [name for name in candidates if first[name] <= HOPELESS * best or name == incumbent]
    for name in candidates:
        if name not in alive:
            times[name].append(first[name])
    start = clock()
    rounds = 0
    while len(alive) > 1 and rounds < effort.rounds and (rounds < FIRST_LOOK or clock() - start < effort.seconds):
        for place in range(len(alive)):  # a new order every round: nobody always runs in another's warm cache
            name = alive[(place + rounds) % len(alive)]
            times[name].append(run(name))
            count += 1
        rounds += 1
        alive = _left(alive, times, effort.equal, incumbent)
    while len(times[alive[0]]) < SAMPLES:
        for name in alive:
            times[name].append(run(name))
            count += 1
    seconds = {name: statistics.median(values) for name, values in times.items()}
    order = sorted(candidates, key=lambda name: (name not in alive, seconds[name]))
    if incumbent in alive and order[0] != incumbent and not _beats(times[order[0]], times[incumbent]):
        order.remove(incumbent)
        order.insert(0, incumbent)
    return Result(tuple(order), seconds, rounds, count)


def _beats(winner: Sequence[float], loser: Sequence[float]) -> bool:
    interval = median_interval(_log_ratios(loser, winner))
    return interval is not None and interval[0] > 0


def _left(alive: Sequence[K], times: Mapping[K, Sequence[float]], equal: float, incumbent: K) -> list[K]:
    """Those whose fate is open: all were measured in the same rounds."""
    leader = min(alive, key=lambda name: statistics.median(times[name]))
    if len(times[leader]) < FIRST_LOOK:
        return list(alive)
    left = list(alive)
    for name in alive:
        if name == leader:
            continue
        if min(times[name]) > FAR_BEHIND * max(times[leader]):
            left.remove(name)
            continue
        interval = median_interval(_log_ratios(times[name], times[leader]))
        if interval is None:
            continue
        low, high = interval
        if low > 0 and not (name == incumbent and high < math.log1p(equal)):
            left.remove(name)
        elif high < math.log1p(equal) and low > -math.log1p(equal):
            left.remove(leader if name == incumbent else name)
            if name == incumbent:
                break
    return left


def _log_ratios(a: Sequence[float], b: Sequence[float]) -> list[float]:
    return [math.log(x / y) for x, y in zip(a, b, strict=True)]


def median_interval(values: Sequence[float], confidence: float = CONFIDENCE) -> tuple[float, float] | None:
    """Distribution-free confidence interval of the median; None when there are too few values for any.

    The k-th smallest and the k-th largest of n values enclose the median with probability
    ``1 - 2 * P(Binomial(n, 1/2) < k)``; the largest k that keeps the confidence is taken.
    """
    n = len(values)
    tail, k = 0.0, 0
    while tail + math.comb(n, k) / 2**n <= (1 - confidence) / 2:
        tail += math.comb(n, k) / 2**n
        k += 1
    if k == 0:
        return None
    ordered = sorted(values)
    return ordered[k - 1], ordered[n - k]
