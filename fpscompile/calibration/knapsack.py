"""One choice per item, the cheapest within an error budget, or the most accurate within a cost budget.

Items are heads of sites in phases of the schedule, their options the candidate windows; costs and errors add up. From
the most accurate options, steps are taken along each item's lower convex hull in order of cost saved per error added:
for a single budget this greedy order is the optimum of the relaxed problem (Dyer 1984; Zemel 1984: the multiple-choice
knapsack), and misses the integer one by at most one item's step. What is left of a budget is then filled with whatever
still fits.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Item:
    """Something to choose for."""

    group: Hashable
    """Items of one group share an error budget."""
    costs: Sequence[float]
    errors: Sequence[float]
    """Squared; one per option, as costs."""


@dataclass(frozen=True)
class Solution:
    choices: tuple[int, ...]
    """Option of each item."""
    cost: float
    errors: Mapping[Hashable, float]
    """Sum per group."""


def solve(
    items: Sequence[Item], budgets: Mapping[Hashable, float] | None = None, target_cost: float | None = None
) -> Solution:
    """Choose an option for every item.

    Args:
        budgets: group to the largest sum of its errors; missing groups are unbounded. A group that exceeds its budget
            with its most accurate options keeps those.
        target_cost: stop lowering the cost once the sum is not above it. Without, it is lowered as far as the budgets
            allow.
    """
    limits = budgets or {}
    choices = [_most_accurate(item) for item in items]
    errors: dict[Hashable, float] = {}
    for item, choice in zip(items, choices, strict=True):
        errors[item.group] = errors.get(item.group, 0.0) + item.errors[choice]
    cost = sum(item.costs[choice] for item, choice in zip(items, choices, strict=True))

    hulls = [_hull(item, choice) for item, choice in zip(items, choices, strict=True)]
    heap: list[tuple[float, int, int]] = []

    def push(index: int, place: int) -> None:
        if place < len(hulls[index]):
            item, before, after = items[index], hulls[index][place - 1], hulls[index][place]
            saved, added = item.costs[before] - item.costs[after], item.errors[after] - item.errors[before]
            heapq.heappush(heap, (added / saved, index, place))

    for index in range(len(items)):
        push(index, 1)
    done = target_cost is not None and cost <= target_cost
    while heap and not done:
        _, index, place = heapq.heappop(heap)
        item, after = items[index], hulls[index][place]
        added = item.errors[after] - item.errors[choices[index]]
        if errors[item.group] + added <= limits.get(item.group, math.inf):
            cost += item.costs[after] - item.costs[choices[index]]
            errors[item.group] += added
            choices[index] = after
            push(index, place + 1)
        done = target_cost is not None and cost <= target_cost
    if not done:
        cost += _fill(items, choices, errors, limits)
    return Solution(tuple(choices), cost, errors)


def _most_accurate(item: Item) -> int:
    return min(range(len(item.costs)), key=lambda option: (item.errors[option], item.costs[option]))


def _hull(item: Item, start: int) -> list[int]:
    """Options from ``start`` on to ever lower cost, each step saving less per error than the one before."""
    order = sorted(
        (option for option in range(len(item.costs)) if item.costs[option] < item.costs[start]),
        key=lambda option: (item.errors[option], item.costs[option]),
    )
    hull = [start]
    for option in order:
        if item.costs[option] >= item.costs[hull[-1]]:
            continue
        while len(hull) > 1 and _slope(item, hull[-2], hull[-1]) >= _slope(item, hull[-2], option):
            hull.pop()
        hull.append(option)
    return hull


def _slope(item: Item, a: int, b: int) -> float:
    """Error added per cost saved."""
    return (item.errors[b] - item.errors[a]) / (item.costs[a] - item.costs[b])


_Move = tuple[float, int, int, int]
"""(minus what it saves, item, option after, option before)."""


def _fill(
    items: Sequence[Item], choices: list[int], errors: dict[Hashable, float], limits: Mapping[Hashable, float]
) -> float:
    """Use what is left of the budgets: the largest savings that fit, one after another. Returns the change in cost."""

    def moves(index: int) -> list[_Move]:
        costs, now = items[index].costs, choices[index]
        cheaper = [option for option, cost in enumerate(costs) if costs[now] - cost > 1e-15]
        return [(costs[option] - costs[now], index, option, now) for option in cheaper]

    heap = [move for index in range(len(items)) for move in moves(index)]
    heapq.heapify(heap)
    waiting: dict[Hashable, list[_Move]] = {}
    change = 0.0
    while heap:
        saved, index, option, before = move = heapq.heappop(heap)
        item = items[index]
        if choices[index] != before:
            continue
        added = item.errors[option] - item.errors[before]
        if added > limits.get(item.group, math.inf) - errors[item.group]:
            waiting.setdefault(item.group, []).append(move)
            continue
        errors[item.group] += added
        choices[index] = option
        change += saved
        for other in moves(index) + (waiting.pop(item.group, []) if added < 0 else []):
            heapq.heappush(heap, other)
    return change
