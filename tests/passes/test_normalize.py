"""Written-out attention: every spelling is found; near misses are declined with a reason, unchanged to the last bit."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from models.handwritten import SPELLINGS
from models.toys import LENGTH, Outcome, compiled, heads, latent
from torch.nn import functional as F

Attention = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
SCALE = 1 / math.sqrt(8)
# Dynamo takes seconds to trace with symbolic shapes.
DYNAMIC = [None, pytest.param(True, marks=pytest.mark.slow)]


def run(attention: Attention) -> Outcome:
    def model(video: torch.Tensor) -> torch.Tensor:
        x = heads(video)
        return attention(x, x * 2, x + 1)

    return compiled(model, latent())


@pytest.mark.parametrize("name", SPELLINGS)
def test_every_spelling_is_found(name: str) -> None:
    outcome = run(SPELLINGS[name])
    assert [site.rewritten for site in outcome.sites] == [True]
    assert outcome.error <= 1e-5


def wrong_axis(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return (q @ k.mT * SCALE).softmax(-2) @ v


def scale_after_mask(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    bias = torch.linspace(0, 1, LENGTH)[None, None, None]
    return ((q @ k.mT + bias) * SCALE).softmax(-1) @ v


def scale_after_mask_by_tensor(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """The tensor may be negative, and then -inf becomes inf."""
    masked = (q @ k.mT).masked_fill(torch.arange(LENGTH) < 5, -torch.inf)
    return (masked * (q.mean(-1, keepdim=True) + 3)).softmax(-1) @ v


def finite_fill_under_scale(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return ((q @ k.mT).masked_fill(torch.arange(LENGTH) < 5, -1e10) * 1e-10).softmax(-1) @ v


def soft_cap(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return (5 * torch.tanh(q @ k.mT * SCALE / 5)).softmax(-1) @ v


def returned_weights(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    weights = (q @ k.mT * SCALE).softmax(-1)
    return weights @ v + weights.sum()


def scores_used_elsewhere(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    scores = q @ k.mT * SCALE
    return scores.softmax(-1) @ v + scores.mean()


def two_masks(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    bias = torch.linspace(0, 1, LENGTH)[None, None, None]
    return (q @ k.mT * SCALE + bias + bias).softmax(-1) @ v


def weak_fill(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    hidden = torch.arange(LENGTH) < 5
    return (q @ k.mT * SCALE).masked_fill(hidden, -1.0).softmax(-1) @ v


def weak_where(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return torch.where(torch.arange(LENGTH) > 5, q @ k.mT * SCALE, 0.0).softmax(-1) @ v


def masked_weights(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """The mask on one side: after the softmax, so the weights no longer add up to one."""
    return ((q @ k.mT * SCALE).softmax(-1) * (torch.arange(LENGTH) > 5)) @ v


def sink_logit(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    scores = torch.cat([q @ k.mT * SCALE, torch.zeros(2, 2, LENGTH, 1)], -1)
    return scores.softmax(-1)[..., :-1] @ v


def other_batch(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return (q @ k[:1].mT * SCALE).softmax(-1) @ v


def tensor_temperature(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return (q @ k.mT * torch.linspace(0.1, 1, LENGTH)).softmax(-1) @ v


def whole_numbers(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return (q @ k.mT * 10).to(torch.int32).float().softmax(-1) @ v


def broadcast_up(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    bias = torch.linspace(0, 1, 2 * LENGTH).view(2, 1, 1, LENGTH)
    return (q[:1] @ k[:1].mT * SCALE + bias).softmax(-1) @ v


def keys_written_between(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    weights = (q @ k.mT * SCALE).softmax(-1)
    k.mul_(0.5)
    return weights @ v + k.mean()


def autocast_changed(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Scores in full precision, weighing in half."""
    weights = (q @ k.mT * SCALE).softmax(-1)
    with torch.autocast("cpu", torch.bfloat16):
        return weights @ v


def relative_bias(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return (q @ k.mT * SCALE + q @ v.mT).softmax(-1) @ v


def doubled_mask(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    bias = torch.linspace(0, 1, LENGTH)[None, None, None]
    return torch.add(q @ k.mT * SCALE, bias, alpha=2).softmax(-1) @ v


def shifted_unevenly(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    scores = q @ k.mT * SCALE
    return (scores - scores.amax(-2, keepdim=True)).softmax(-1) @ v


def scaled_by_key(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return (q @ k.mT * torch.linspace(0, 1, LENGTH)).softmax(-1) @ v


def exponentials(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    weights = (q @ k.mT * SCALE).exp()
    return (weights / (1 + weights.sum(-1, keepdim=True))) @ v


def powered_weights(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return (q @ k.mT * SCALE).softmax(-1).pow(2) @ v


def transposed_weights(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return torch.einsum("bhij,bhid->bhjd", (q @ k.mT * SCALE).softmax(-1), v)


def no_values(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    weights = (q @ k.mT * SCALE).softmax(-1)
    return weights @ weights


NEAR_MISSES: dict[str, tuple[Attention, str]] = {
    "wrong axis": (wrong_axis, "softmax runs over dim -2"),
    "scale after mask": (scale_after_mask, "scales it too"),
    "scale after mask, a tensor": (scale_after_mask_by_tensor, "scales it too"),
    "scale after a finite fill": (finite_fill_under_scale, "scales it too"),
    "soft cap": (soft_cap, "tanh stands between"),
    "returned weights": (returned_weights, "weights are read elsewhere"),
    "scores used": (scores_used_elsewhere, "scores are read elsewhere"),
    "two masks": (two_masks, "two masks"),
    "weak fill": (weak_fill, "does not drown"),
    "weak where": (weak_where, "does not drown"),
    "masked weights": (masked_weights, "mul stands between the softmax and the values"),
    "sink logit": (sink_logit, "cat stands between"),
    "other batch": (other_batch, "not a batched matrix product"),
    "temperature": (tensor_temperature, "mul stands between"),
    "whole numbers": (whole_numbers, "casts the scores to something else"),
    "broadcast": (broadcast_up, "broadcasts"),
    "keys written": (keys_written_between, "may write into q, k or the mask"),
    "autocast": (autocast_changed, "different autocast"),
    "doubled mask": (doubled_mask, "added with a factor"),
    "shifted unevenly": (shifted_unevenly, "sub stands between"),
    "scaled by key": (scaled_by_key, "mul stands between"),
    "exponentials": (exponentials, "written out with exp;"),
    "powered weights": (powered_weights, "pow stands between the softmax and the values"),
    "transposed weights": (transposed_weights, "does not contract the keys"),
    "no values": (no_values, "does not weigh a tensor of values"),
}


def test_a_negative_scale_turns_a_mask_around() -> None:
    """-inf becomes inf, and the result is not a number: as the author's is, so it is not compared."""

    def negated(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return ((q @ k.mT).masked_fill(torch.arange(LENGTH) < 5, -torch.inf) * -SCALE).softmax(-1) @ v

    outcome = run(negated)
    assert not outcome.sites
    assert outcome.says("scales it too")


@pytest.mark.parametrize("name", NEAR_MISSES)
def test_near_misses_say_why(name: str) -> None:
    attention, words = NEAR_MISSES[name]
    outcome = run(attention)
    assert outcome.untouched
    assert outcome.says(words), outcome.notes


def dropped_weights(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    weights = F.dropout((q @ k.mT * SCALE).softmax(-1), 0.0, training=True)
    return F.dropout(weights, 0.5, training=True) @ v


def full_mask(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    hidden = torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1)
    return (q @ k.mT * SCALE).masked_fill(hidden, -math.inf).softmax(-1) @ v


@pytest.mark.parametrize(
    ("attention", "code"), [(dropped_weights, "dropout"), (full_mask, "mask"), (relative_bias, "mask")]
)
def test_more_than_attention_is_a_site_that_stays_the_authors(attention: Attention, code: str) -> None:
    outcome = run(attention)
    (site,) = outcome.sites
    assert (site.kind, site.reason_code) == ("3d", code)
    assert outcome.untouched


def test_other_arithmetic_is_not_touched() -> None:
    def contracted_tokens(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return torch.einsum("bhid,bhie->bhde", (q.mT @ k * SCALE).softmax(-1).mT, v.mT @ v)

    assert run(contracted_tokens).untouched


def test_finite_fill_keeps_fully_masked_rows_uniform() -> None:
    def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return (q @ k.mT * SCALE).masked_fill(torch.ones(LENGTH, dtype=torch.bool), -1e9).softmax(-1) @ v

    outcome = run(attention)
    assert outcome.rewritten == 1
    assert outcome.error <= 1e-5


def shown_keys(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return torch.where(torch.arange(k.shape[2]) > 5, q @ k.mT * SCALE, -math.inf).softmax(-1) @ v


def hidden_keys(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return torch.where(torch.arange(k.shape[2]) < 5, -1e9, q @ k.mT * SCALE).softmax(-1) @ v


def upcast_scores(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    q, k, v = q.bfloat16(), k.bfloat16(), v.bfloat16()
    return ((q.float() @ k.float().mT * SCALE).softmax(-1).to(v.dtype) @ v).float()


def precise_queries(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    v = v.bfloat16()
    return ((q @ k.mT * SCALE).softmax(-1).to(v.dtype) @ v).float()


def ellipsis(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    scores = torch.einsum("... i d, ... j d -> ... i j", q, k) * SCALE
    return torch.einsum("...ij,...jd->...id", scores.softmax(-1), v)


def scaled_twice(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """On the queries and on the scores: unusual, and accounted for exactly."""
    return ((q * SCALE) @ k.mT * SCALE).softmax(-1) @ v


def folded_view(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """The author knows the product's layout and views it; the op's own is another."""
    return ((q @ k.mT * SCALE).softmax(-1) @ v).view(4, LENGTH, 8)


def shifted(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Softmax is blind to what is subtracted from a whole row."""
    scores = q @ k.mT * SCALE
    return (scores - scores.amax(-1, keepdim=True).detach()).softmax(-1) @ v


def shifted_by_max(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    q, k, v = (x.flatten(0, 1) for x in (q, k, v))
    scores = torch.bmm(q, k.mT) * SCALE
    scores = scores - torch.max(scores, dim=-1, keepdim=True)[0]
    return torch.bmm(F.softmax(scores, -1), v).unflatten(0, (2, 2))


def tempered(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Cosine attention with a temperature per head."""
    temperature = torch.tensor([4.0, 7.0])[:, None, None]
    scores = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-1, -2)
    return (scores * temperature).softmax(-1) @ v


def tempered_rows(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Folded heads, a number per query."""
    q, k, v = (x.flatten(0, 1) for x in (q, k, v))
    weights = (torch.bmm(q, k.mT) / torch.linspace(1, 3, LENGTH)[None, :, None]).softmax(-1)
    return torch.bmm(weights, v).unflatten(0, (2, 2))


def kernel_by_name(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    q, k, v = (x.contiguous() for x in (q, k, v))
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, scale=SCALE)[0]


@pytest.mark.parametrize("dynamic", DYNAMIC)
@pytest.mark.parametrize(
    ("attention", "tolerance"),
    [
        (shown_keys, 1e-5),
        (hidden_keys, 1e-5),
        (upcast_scores, 1e-2),
        (precise_queries, 1e-2),
        (ellipsis, 1e-5),
        (scaled_twice, 1e-5),
        (folded_view, 1e-5),
        (shifted, 1e-5),
        (shifted_by_max, 1e-5),
        (tempered, 1e-5),
        (tempered_rows, 1e-5),
        (kernel_by_name, 1e-5),
    ],
)
def test_less_common_spellings(attention: Attention, tolerance: float, dynamic: bool | None) -> None:
    def model(video: torch.Tensor) -> torch.Tensor:
        x = heads(video)
        return attention(x, x * 2, x + 1)

    outcome = compiled(model, latent(), dynamic=dynamic)
    assert [site.kind for site in outcome.sites if site.rewritten] == ["3d"]
    assert outcome.error <= tolerance


def test_scale_that_is_an_input() -> None:
    """Under dynamic shapes, a float attribute reaches the graph as a scalar input."""

    class Model(torch.nn.Module):
        scale = 0.25

        def forward(self, video: torch.Tensor) -> torch.Tensor:
            x = heads(video)
            return (x @ x.mT * self.scale).softmax(-1) @ x

    outcome = compiled(Model(), latent(), dynamic=True)
    assert outcome.rewritten == 1
    assert outcome.error <= 1e-5
