"""Written-out attention: near misses are declined with a reason and left numerically unchanged."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from models.handwritten import SPELLINGS
from torch.nn import functional as F

from fpscompile import Backend, Settings

Attention = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
SCALE = 1 / math.sqrt(8)


def run(attention: Attention) -> tuple[Backend, torch.Tensor, torch.Tensor]:
    def model(video: torch.Tensor) -> torch.Tensor:
        x = video.flatten(2).transpose(1, 2).unflatten(-1, (2, 8)).transpose(1, 2)
        return attention(x, x * 2, x + 1)

    video = torch.randn(2, 16, 3, 4, 5)
    fps = Backend(Settings.from_options({"density": 1.0, "inner": "eager", "tile": (2, 2, 2)}))
    return fps, torch.compile(model, backend=fps, fullgraph=True)(video), model(video)


@pytest.mark.parametrize("name", SPELLINGS)
def test_every_spelling_is_found(name: str) -> None:
    fps, actual, expected = run(SPELLINGS[name])
    assert [site.rewritten for site in fps.graphs[0].sites] == [True]
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


def wrong_axis(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return (q @ k.mT * SCALE).softmax(-2) @ v


def scale_after_mask(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    bias = torch.linspace(0, 1, 60)[None, None, None]
    return ((q @ k.mT + bias) * SCALE).softmax(-1) @ v


def soft_cap(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return (5 * torch.tanh(q @ k.mT * SCALE / 5)).softmax(-1) @ v


def returned_weights(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    weights = (q @ k.mT * SCALE).softmax(-1)
    return weights @ v + weights.sum()


def scores_used_elsewhere(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    scores = q @ k.mT * SCALE
    return scores.softmax(-1) @ v + scores.mean()


def two_masks(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    bias = torch.linspace(0, 1, 60)[None, None, None]
    return (q @ k.mT * SCALE + bias + bias).softmax(-1) @ v


def weak_fill(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    hidden = torch.zeros(60, dtype=torch.bool)
    hidden[:5] = True
    return (q @ k.mT * SCALE).masked_fill(hidden, -1.0).softmax(-1) @ v


def dropped_weights(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    weights = F.dropout((q @ k.mT * SCALE).softmax(-1), 0.0, training=True)
    return F.dropout(weights, 0.5, training=True) @ v


def contracted_tokens(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return torch.einsum("bhid,bhie->bhde", (q.mT @ k * SCALE).softmax(-1).mT, v.mT @ v)


def other_batch(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return (q @ k[:, :1].mT * SCALE).softmax(-1) @ v


def sink_logit(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    scores = torch.cat([q @ k.mT * SCALE, torch.zeros(2, 2, 60, 1)], -1)
    return scores.softmax(-1)[..., :-1] @ v


NEAR_MISSES: dict[str, tuple[Attention, str]] = {
    "wrong axis": (wrong_axis, "softmax runs over dim -2"),
    "scale after mask": (scale_after_mask, "scales it too"),
    "soft cap": (soft_cap, "tanh stands between"),
    "returned weights": (returned_weights, "weights are read elsewhere"),
    "scores used": (scores_used_elsewhere, "scores are read elsewhere"),
    "two masks": (two_masks, "two masks"),
    "weak fill": (weak_fill, "does not drown"),
    "dropout": (dropped_weights, "dropout p=0.5"),
    "other batch": (other_batch, "not a batched matrix product"),
}


@pytest.mark.parametrize("name", NEAR_MISSES)
def test_near_misses_say_why(name: str) -> None:
    attention, words = NEAR_MISSES[name]
    fps, actual, expected = run(attention)
    assert not fps.graphs[0].sites
    assert any(words in note.message for note in fps.graphs[0].notes), fps.graphs[0].notes
    if name != "dropout":
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("attention", [contracted_tokens, sink_logit])
def test_other_arithmetic_is_not_touched(attention: Attention) -> None:
    fps, actual, expected = run(attention)
    assert not any(site.rewritten for site in fps.graphs[0].sites)
    torch.testing.assert_close(actual, expected)


def test_finite_fill_keeps_fully_masked_rows_uniform() -> None:
    def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return (q @ k.mT * SCALE).masked_fill(torch.ones(60, dtype=torch.bool), -1e9).softmax(-1) @ v

    fps, actual, expected = run(attention)
    assert [site.rewritten for site in fps.graphs[0].sites] == [True]
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
