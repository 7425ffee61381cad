"""Property-based: random attention is found whatever its shape, layout and spelling; one mutation and it is not.

A wrong rewrite cannot hide: with all keys kept, a rewritten graph must still compute what eager computes, mutated or
not, and one that is not rewritten must compute it to the last bit.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from models.standin_flash import flash_attn_func
from models.toys import compiled
from torch import nn
from torch.nn import functional as F

GENERATE = (Phase.explicit, Phase.generate)
"""No shrinking: an example compiles a model, and the first failure says enough."""

Tensors = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class Case:
    batch: int
    grid: tuple[int, int, int]
    heads: int
    width: int
    layout: str
    spelling: str
    text: int

    def tokens(self, video: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        if self.layout == "channels last":
            x = video.permute(0, 2, 3, 4, 1).reshape(video.shape[0], -1, video.shape[1])
        elif self.layout == "folded frames":
            b, c, t, h, w = video.shape
            x = video.transpose(1, 2).reshape(b * t, c, h * w).transpose(1, 2).reshape(b, t * h * w, c)
        else:
            x = video.flatten(2).transpose(1, 2)
        return torch.cat([text, x], 1) if self.text else x

    def project(self, x: torch.Tensor) -> Tensors:
        return project(x, self.heads, self.width)


def project(x: torch.Tensor, heads: int, width: int) -> Tensors:
    """[B, heads, L, D] each, from different features."""
    x = x.unflatten(-1, (heads, width)).transpose(1, 2)
    return torch.sin(3 * x), torch.cos(2 * x), x + 0.1


class Model(nn.Module):
    """A case as a module: its numbers of heads and features are constants under dynamic shapes."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.case, self.heads, self.width, self.spell = case, case.heads, case.width, SPELLINGS[case.spelling]

    def forward(self, video: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        return self.spell(*project(self.case.tokens(video, text), self.heads, self.width))


def by_sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return F.scaled_dot_product_attention(q, k, v)


def by_folded_sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    folded = F.scaled_dot_product_attention(*(x.flatten(0, 1) for x in (q, k, v)))
    return folded.unflatten(0, (q.shape[0], q.shape[1]))


def by_matmul(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return (q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])).softmax(-1) @ v


def by_einsum(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    scores = torch.einsum("bhid,bhjd->bhij", q * q.shape[-1] ** -0.5, k)
    return torch.einsum("bhij,bhjd->bhid", torch.softmax(scores, dim=3), v)


def by_einsum_wide(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    scores = torch.einsum("bihd,bjhd->bhij", q, k) * q.shape[-1] ** -0.5
    return torch.einsum("bhij,bjhd->bhid", scores.softmax(-1), v)


def by_bmm(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    b, h = q.shape[:2]
    q, k, v = (x.reshape(b * h, x.shape[2], -1) for x in (q, k, v))
    return torch.bmm((torch.bmm(q, k.mT) * q.shape[-1] ** -0.5).softmax(-1), v).unflatten(0, (b, h))


def by_flash(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return flash_attn_func(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)


SPELLINGS = {f.__name__: f for f in (by_sdpa, by_folded_sdpa, by_matmul, by_einsum, by_einsum_wide, by_bmm, by_flash)}

cases = st.builds(
    Case,
    batch=st.integers(1, 3),
    grid=st.tuples(st.integers(2, 4), st.integers(2, 5), st.integers(2, 5)),
    heads=st.integers(1, 3),
    width=st.sampled_from([4, 8]),
    layout=st.sampled_from(["channels first", "channels last", "folded frames"]),
    spelling=st.sampled_from(sorted(SPELLINGS)),
    text=st.sampled_from([0, 3]),
)


def data(case: Case) -> tuple[torch.Tensor, torch.Tensor]:
    channels = case.heads * case.width
    return torch.randn(case.batch, channels, *case.grid), torch.randn(case.batch, case.text or 1, channels)


@settings(max_examples=12, phases=GENERATE)
@given(cases, st.sampled_from([None, True]))
def test_attention_is_found(case: Case, dynamic: bool | None) -> None:
    with torch.no_grad():
        outcome = compiled(Model(case), *data(case), dynamic=dynamic)
    (site,) = outcome.sites
    assert (site.kind, site.rewritten, site.grid) == ("3d", True, case.grid), site.reason
    video = ("video", math.prod(case.grid))
    assert site.segments == ((("other", case.text), video) if case.text else (video,))
    assert outcome.error <= 1e-5


def permuted_keys(case: Case, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Any:
    return q, k.flip(2), v


def keys_of_others(case: Case, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Any:
    return q, torch.arange(k.numel(), dtype=k.dtype).view(k.shape).sin(), v


def values_rolled(case: Case, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Any:
    return q, k, v.roll(1, 2)


def half_the_keys(case: Case, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Any:
    return q, k[:, :, ::2], v[:, :, ::2]


def frames_swapped(case: Case, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Any:
    """A permute swapped: tokens run over (h, t, w) after this."""
    t, h, w = case.grid

    def swap(x: torch.Tensor) -> torch.Tensor:
        video = x[:, :, x.shape[2] - t * h * w :]
        swapped = video.unflatten(2, (t, h, w)).transpose(2, 3).flatten(2, 4)
        return torch.cat([x[:, :, : x.shape[2] - t * h * w], swapped], 2)

    return swap(q), swap(k), swap(v)


def heads_as_tokens(case: Case, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Any:
    """A transpose forgotten: attention runs over the heads, one token at a time."""
    return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)


MUTATIONS: dict[str, Callable[..., Any]] = {
    f.__name__: f
    for f in (permuted_keys, keys_of_others, values_rolled, half_the_keys, frames_swapped, heads_as_tokens)
}


@settings(max_examples=18, phases=GENERATE)
@given(cases, st.sampled_from(sorted(MUTATIONS)))
def test_one_mutation_and_it_is_not(case: Case, mutation: str) -> None:
    def model(video: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        q, k, v = MUTATIONS[mutation](case, *case.project(case.tokens(video, text)))
        return SPELLINGS[case.spelling](q, k, v)

    with torch.no_grad():
        outcome = compiled(model, *data(case))
    assert outcome.untouched, (outcome.sites, outcome.notes)
    assert outcome.sites
    assert all(site.reason for site in outcome.sites)


def tampered(operation: str, scores: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Softmax attention with one step too many, or one done otherwise."""
    length = scores.shape[-1]
    if operation == "rows":
        return scores.softmax(-2) @ v
    if operation == "cap":
        return (4 * torch.tanh(scores / 4)).softmax(-1) @ v
    if operation == "sink":
        return torch.cat([scores, torch.zeros_like(scores[..., :1])], -1).softmax(-1)[..., :length] @ v
    if operation == "scaled mask":
        return ((scores + torch.linspace(0, 1, length)) * 0.5).softmax(-1) @ v
    if operation == "sharpened":
        return scores.softmax(-1).square() @ v
    if operation == "weights kept":
        weights = scores.softmax(-1)
        return weights @ v + weights.amax()
    if operation == "one-sided mask":
        return (scores.softmax(-1) * (torch.arange(length) % 2)) @ v
    if operation == "rounded":
        return scores.round().softmax(-1) @ v
    assert operation == "sigmoid"
    return scores.sigmoid() @ v


OPERATIONS = ["rows", "cap", "sink", "scaled mask", "sharpened", "weights kept", "one-sided mask", "rounded", "sigmoid"]


@settings(max_examples=18, phases=GENERATE)
@given(cases, st.sampled_from(OPERATIONS), st.booleans())
def test_one_step_too_many_and_it_is_not(case: Case, operation: str, folded: bool) -> None:
    def model(video: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        q, k, v = case.project(case.tokens(video, text))
        if folded:
            q, k, v = (x.flatten(0, 1) for x in (q, k, v))
        return tampered(operation, q @ k.mT * case.width**-0.5, v)

    outcome = compiled(model, *data(case))
    assert outcome.untouched
    assert operation == "sigmoid" or outcome.notes
