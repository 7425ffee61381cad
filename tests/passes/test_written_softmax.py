"""A softmax written out as powers over their sum: rewritten where it is one, named where it only looks like one."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from models.oracle import rectangular_mask
from models.toys import WeighedVideo

from fpscompile import Backend, Settings

GRID, LENGTH = (3, 4, 5), 60
TILE, WINDOW = (2, 2, 2), (1, 1, 2)
SPARSE = {"quant": "none", "inner": "eager", "lowering": "boxes", "tile": TILE, "window": WINDOW}
DENSE = {"quant": "none", "inner": "eager", "density": 1.0}
LOG2E = 1 / math.log(2)
HIDDEN = torch.arange(LENGTH) % 7 == 3

Scores = Callable[[torch.Tensor], torch.Tensor]


def over_sum(powers: torch.Tensor) -> torch.Tensor:
    return powers / powers.sum(-1, keepdim=True)


def shifted(scores: torch.Tensor) -> torch.Tensor:
    return scores - scores.amax(-1, keepdim=True)


def shifted_by_max(scores: torch.Tensor) -> torch.Tensor:
    return scores - scores.max(dim=-1, keepdim=True).values.detach()


def divided(powers: torch.Tensor) -> torch.Tensor:
    powers /= powers.sum(-1, keepdim=True)
    return powers


SOFTMAX: dict[str, Scores] = {
    "exp": lambda s: over_sum(torch.exp(s)),
    "exp of shifted": lambda s: over_sum(shifted(s).exp()),
    "exp2": lambda s: over_sum(torch.exp2(s * LOG2E)),
    "exp2 of shifted": lambda s: over_sum(torch.exp2(shifted_by_max(s) * LOG2E)),
    "torch.pow": lambda s: over_sum(torch.pow(2.0, s * LOG2E)),
    "torch.pow of shifted": lambda s: over_sum(torch.pow(2.0, shifted(s * LOG2E))),
    "2 **": lambda s: over_sum(2.0 ** (s * LOG2E)),
    "exp2 of masked": lambda s: over_sum(torch.exp2(shifted(s.masked_fill(HIDDEN, -math.inf) * LOG2E))),
    "pow of chosen": lambda s: over_sum(torch.pow(2.0, torch.where(HIDDEN, -math.inf, s) * LOG2E)),
    "another base": lambda s: over_sum(10 ** shifted(s)),
    "div": lambda s: torch.div(w := s.exp(), torch.sum(w, dim=-1, keepdim=True)),
    "unsqueezed": lambda s: (w := s.exp()) / w.sum(-1).unsqueeze(-1),
    "indexed": lambda s: (w := torch.pow(2.0, s * LOG2E)) / w.sum(dim=-1)[..., None],
    "in place": lambda s: (w := (s * 1.0).exp_()).div_(w.sum(-1, keepdim=True)),
    "divided in place": lambda s: divided(s.exp()),
    "div of a list": lambda s: (w := s.exp()).div(w.sum([3], True)),
}


@pytest.mark.parametrize("name", SOFTMAX)
def test_powers_over_their_sum_are_a_softmax(name: str) -> None:
    model, x = WeighedVideo(SOFTMAX[name]).eval(), torch.randn(2, 4, 3, 8, 10)
    backend = Backend(Settings.from_options(SPARSE))
    with torch.no_grad():
        dense = model(x)
        actual = torch.compile(model, backend=backend)(x)
        model.window = rectangular_mask(GRID, TILE, WINDOW, (LENGTH, 0), (LENGTH, 0))
        expected = model(x)
    (site,) = backend.graphs[0].sites
    assert (site.kind, site.grid, site.reason) == ("3d", GRID, None)
    assert torch.allclose(actual, expected, atol=1e-5)
    assert not torch.allclose(dense, expected, atol=1e-3)


@pytest.mark.parametrize("name", ["torch.pow", "exp2 of shifted"])
def test_its_gradients_are_eager_s(name: str) -> None:
    model = WeighedVideo(SOFTMAX[name])
    x = torch.randn(2, 4, 3, 8, 10, requires_grad=True)
    backend = Backend(Settings.from_options(DENSE))
    actual = torch.compile(model, backend=backend)(x)
    gradients = torch.autograd.grad(actual.square().sum(), [x, *model.parameters()])
    expected = torch.autograd.grad(model(x).square().sum(), [x, *model.parameters()])
    assert [site.reason for site in backend.graphs[0].sites] == [None]
    for left, right in zip(gradients, expected, strict=True):
        assert torch.allclose(left, right, rtol=1e-4, atol=1e-4)


def read_twice(scores: torch.Tensor) -> torch.Tensor:
    powers = torch.pow(2.0, scores)
    return powers / powers.sum(-1, keepdim=True) + 0 * powers.mean()


NO_SOFTMAX: dict[str, tuple[Scores, str]] = {
    "one is added to the sum": (lambda s: (w := s.exp()) / (1 + w.sum(-1, keepdim=True)), "written out with exp;"),
    "the sum is of other powers": (lambda s: s.exp() / s.exp2().sum(-1, keepdim=True), "written out with exp;"),
    "the sum is over the queries": (lambda s: (w := torch.pow(2.0, s)) / w.sum(-2, keepdim=True), "runs over dim -2"),
    "the sum is over the heads too": (
        lambda s: (w := 2.0**s) / w.sum((1, 3), keepdim=True),
        "written out with pow; call torch.softmax",
    ),
    "a sum over the rows": (lambda s: (w := s.exp()) / w.sum(-1)[:, :, None], "written out with exp;"),
    "a sum of a transpose": (lambda s: (w := s.exp()) / w.sum(-1).unsqueeze(2), "written out with exp;"),
    "a sum over the queries, put back": (lambda s: (w := s.exp()) / w.sum(-2)[..., None], "runs over dim -2"),
    "float_power": (lambda s: over_sum(torch.float_power(2.0, s)).float(), "written out with float_power;"),
    "softmin": (lambda s: torch.nn.functional.softmin(-s, dim=-1), "written out with softmin;"),
    "a tensor as base": (lambda s: over_sum(torch.pow(torch.tensor(2.0), s)), "written out with pow;"),
    "another dtype": (lambda s: over_sum(s.exp().double()).float(), "written out with exp;"),
    "a mean": (lambda s: torch.div(w := s.exp(), w.mean(-1, keepdim=True)), "written out with exp;"),
    "a root of the sum": (lambda s: (w := torch.exp2(s)) / w.sum(-1, keepdim=True).sqrt(), "written out with exp2;"),
    "a base below one": (lambda s: over_sum(torch.pow(0.5, s)), "written out with pow; call torch.softmax"),
    "powers that something else reads": (read_twice, "written out with pow;"),
    "no sum": (lambda s: torch.pow(2.0, s), "written out with pow;"),
    "sum by powers": (lambda s: (w := s.exp()).sum(-1, keepdim=True) / w, "written out with exp;"),
    "a mask under a scale": (
        lambda s: over_sum(torch.exp2(s + torch.arange(LENGTH) % 3)),
        "the scale comes after the mask",
    ),
}


@pytest.mark.parametrize("name", NO_SOFTMAX)
def test_what_only_looks_like_one_is_named(name: str) -> None:
    weigh, words = NO_SOFTMAX[name]
    model, x = WeighedVideo(weigh).eval(), torch.randn(2, 4, 3, 8, 10)
    backend = Backend(Settings.from_options(DENSE))
    with torch.no_grad():
        assert torch.equal(torch.compile(model, backend=backend)(x), model(x))
    (graph,) = backend.graphs
    assert not graph.sites
    assert [note.level for note in graph.notes if words in note.message] == ["info", "warning"]


def test_what_is_declined_is_the_author_s_own_again() -> None:
    """In place as well: a mask of every query's own is not rewritten."""
    hidden = torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1)
    model = WeighedVideo(lambda s: divided(s.masked_fill(hidden, -math.inf).exp_())).eval()
    x, backend = torch.randn(2, 4, 3, 8, 10), Backend(Settings.from_options(DENSE))
    with torch.no_grad():
        assert torch.equal(torch.compile(model, backend=backend)(x), model(x))
    assert [site.reason_code for site in backend.graphs[0].sites] == ["mask"]


def test_a_square_is_no_power_of_the_scores() -> None:
    model, x = WeighedVideo(lambda s: s.pow(2)).eval(), torch.randn(2, 4, 3, 8, 10)
    backend = Backend(Settings.from_options(DENSE))
    with torch.no_grad():
        assert torch.equal(torch.compile(model, backend=backend)(x), model(x))
    assert not [note for note in backend.graphs[0].notes if "written out" in note.message]
