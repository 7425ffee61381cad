"""flash-attn and xformers by name: dense, packed, of several lengths; in inference and in training."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from models.standin_flash import (
    flash_attn_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_func,
    memory_efficient_attention,
)
from models.toys import HEADS, D, compiled, gradient, latent, tokens_of, wide_heads

TEXT = 7
# Dynamo takes seconds to trace with symbolic shapes.
DYNAMIC = [None, pytest.param(True, marks=pytest.mark.slow)]


def dense(video: torch.Tensor) -> torch.Tensor:
    x = wide_heads(video)
    return flash_attn_func(x, x * 2, x + 1)


def packed(video: torch.Tensor) -> torch.Tensor:
    x = wide_heads(video)
    return flash_attn_qkvpacked_func(torch.stack([x, x * 2, x + 1], 2))


def xformers(video: torch.Tensor) -> torch.Tensor:
    x = wide_heads(video)
    return memory_efficient_attention(x, x * 2, x + 1, scale=0.2)


def grouped(video: torch.Tensor) -> torch.Tensor:
    x = wide_heads(video)
    return flash_attn_func(x, x[:, :, :1] * 2, x[:, :, :1])


@pytest.mark.parametrize("dynamic", [None, True])
@pytest.mark.parametrize("function", [dense, packed, xformers, grouped])
def test_dense_ops(function: Any, dynamic: bool | None) -> None:
    with torch.no_grad():
        outcome = compiled(function, latent(), dynamic=dynamic)
    (site,) = outcome.sites
    assert (site.kind, site.rewritten, site.grid) == ("3d", True, (3, 4, 5))
    assert outcome.error <= 1e-5


@pytest.mark.parametrize("dynamic", DYNAMIC)
@pytest.mark.parametrize("function", [dense, packed])
def test_training_sees_through_the_autograd_function(function: Any, dynamic: bool | None) -> None:
    video = latent().requires_grad_()
    outcome = compiled(function, video, dynamic=dynamic, inner="aot_eager")
    assert (outcome.rewritten, outcome.graphs) == (1, 1)
    actual, expected = gradient(outcome.actual, [video]), gradient(outcome.expected, [video])
    assert float((actual - expected).norm() / expected.norm()) <= 1e-5


def lse_too(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    out, lse, *_ = torch.ops.flash_attn._flash_attn_forward(q, k, v, 0.0, 0.3, False, -1, -1, 0.0, None, False)
    return out + lse.mean()


def alibi(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    slopes = torch.zeros(HEADS)
    return torch.ops.flash_attn._flash_attn_forward(q, k, v, 0.0, 0.3, False, -1, -1, 0.0, slopes, False)[0]


@pytest.mark.parametrize(
    ("attention", "code", "words"),
    [
        (
            lambda q, k, v: flash_attn_func(q, k, v, causal=True),
            "causal",
            "causal=True: causal attention is not full 3D attention, so it stays as it is; drop",
        ),
        (lambda q, k, v: flash_attn_func(q, k, v, dropout_p=0.25), "dropout", "dropout_p=0.25"),
        (lambda q, k, v: flash_attn_func(q, k, v, window_size=(8, 8)), "mask", "window_size_left=8"),
        (lambda q, k, v: memory_efficient_attention(q, k, v, causal=True), "causal", "is_causal=True"),
        (lse_too, "spelling", "reads more of"),
        (alibi, "mask", "alibi_slopes"),
    ],
)
def test_what_is_more_than_attention_is_declined(attention: Any, code: str, words: str) -> None:
    def function(video: torch.Tensor) -> torch.Tensor:
        x = wide_heads(video)
        return attention(x, x * 2, x + 1)

    with torch.no_grad():
        outcome = compiled(function, latent())
    (site,) = outcome.sites
    assert (site.kind, site.reason_code) == ("3d", code)
    assert words in (site.reason or "")
    assert outcome.untouched


def test_soft_cap_is_declined() -> None:
    """The stand-in cannot compute it, so the graph is only looked at."""

    def function(video: torch.Tensor) -> torch.Tensor:
        x = wide_heads(video)
        return torch.ops.flash_attn._flash_attn_forward(x, x, x, 0.0, 0.3, False, -1, -1, 30.0, None, False)[0]

    from fpscompile import Backend, Settings

    fps = Backend(Settings(inner=lambda gm, inputs: lambda *args: (args[0],)))
    torch.compile(function, backend=fps)(latent())
    assert [site.reason_code for site in fps.graphs[0].sites] == ["spelling"]
    assert "softcap=30.0" in (fps.graphs[0].sites[0].reason or "")


class OtherBackward(torch.autograd.Function):
    """flash-attn's forward with a backward of its own: a straight-through estimator, say."""

    @staticmethod
    def forward(ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return torch.ops.flash_attn._flash_attn_forward(q, k, v, 0.0, 0.3, False, -1, -1, 0.0, None, False)[0]

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:  # type: ignore[override]
        return grad, grad * 0.5, grad


def test_another_backward_is_declined() -> None:
    def function(video: torch.Tensor) -> torch.Tensor:
        x = wide_heads(video)
        return OtherBackward.apply(x, x * 2, x + 1)

    video = latent().requires_grad_()
    outcome = compiled(function, video)
    assert outcome.untouched
    assert outcome.says("its backward is not the one of the attention op")
    assert torch.equal(gradient(outcome.actual, [video]), gradient(outcome.expected, [video]))


def boundaries(valid: torch.Tensor, length: int) -> torch.Tensor:
    """Of each sample the video and its valid text, then its padding."""
    batch, text = valid.shape
    result = torch.zeros([2 * batch + 1], dtype=torch.int32, device=valid.device)
    counts = valid.sum(dim=1)
    for i in range(batch):
        result[2 * i + 1] = i * length + (counts[i] + length - text)
        result[2 * i + 2] = (i + 1) * length
    return result


def joint(video: torch.Tensor, text: torch.Tensor, valid: torch.Tensor, split: Any = boundaries) -> torch.Tensor:
    """Video and padded text in one packed sequence."""
    x = torch.cat([tokens_of(video), text], 1)
    batch, length, _ = x.shape
    x = x.unflatten(-1, (HEADS, D)).flatten(0, 1)
    ends = split(valid, length)
    # One tensor cannot be given twice to an autograd.Function under Dynamo.
    keys = ends.clone() if torch.is_grad_enabled() else ends
    return flash_attn_varlen_func(x, x * 2, x + 1, ends, keys, length, length).unflatten(0, (batch, length))


def padded(batch: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    valid = torch.arange(TEXT)[None] < torch.tensor([TEXT, 4, 1])[:batch, None]
    return 0.5 * torch.randn(batch, TEXT, HEADS * D), valid.long()


@pytest.mark.parametrize("dynamic", DYNAMIC)
@pytest.mark.parametrize("batch", [1, 3])
def test_packed_lengths_of_video_and_text(batch: int, dynamic: bool | None) -> None:
    """Every token's result is eager's, padding included, in a sample with no padding too."""
    with torch.no_grad():
        outcome = compiled(joint, latent(batch), *padded(batch), dynamic=dynamic)
    (site,) = outcome.sites
    assert (site.rewritten, site.segments) == (True, (("video", 60), ("other", TEXT)))
    torch.testing.assert_close(outcome.actual, outcome.expected, rtol=1e-5, atol=1e-5)


def test_packed_lengths_in_training() -> None:
    video, (text, valid) = latent(3).requires_grad_(), padded(3)
    outcome = compiled(joint, video, text.requires_grad_(), valid, inner="aot_eager")
    assert outcome.rewritten == 1
    actual, expected = gradient(outcome.actual, [video, text]), gradient(outcome.expected, [video, text])
    assert float((actual - expected).norm() / expected.norm()) <= 1e-5


def equal_samples(valid: torch.Tensor, length: int) -> torch.Tensor:
    return torch.arange(0, (valid.shape[0] + 1) * length, length, dtype=torch.int32)


def test_equal_samples_need_no_mask() -> None:
    with torch.no_grad():
        outcome = compiled(lambda *args: joint(*args, split=equal_samples), latent(), *padded())
    assert outcome.rewritten == 1
    assert outcome.error <= 1e-5


def apart(valid: torch.Tensor, length: int) -> torch.Tensor:
    """Video and text attend each among themselves."""
    ends = [0]
    for i in range(valid.shape[0]):
        ends += [(i + 1) * length - TEXT, (i + 1) * length]
    return torch.tensor(ends, dtype=torch.int32)


def one_sequence(valid: torch.Tensor, length: int) -> torch.Tensor:
    return torch.tensor([0, valid.shape[0] * length], dtype=torch.int32)


def within_the_video(valid: torch.Tensor, length: int) -> torch.Tensor:
    """Off by one: a sample's end may fall on a video token."""
    ends = boundaries(valid, length)
    ends[1] = valid.sum(1)[0] + length - TEXT - 1
    return ends


def doubled_count(valid: torch.Tensor, length: int) -> torch.Tensor:
    ends = boundaries(valid, length)
    ends[1] = valid.sum(1)[0] + valid.sum(1)[0] + length - 2 * TEXT
    return ends


def from_values(valid: torch.Tensor, length: int) -> torch.Tensor:
    counts = valid.sum(1) + length - TEXT
    return torch.nn.functional.pad(counts.cumsum(0), (1, 0)).to(torch.int32)


def rewritten_in_place(valid: torch.Tensor, length: int) -> torch.Tensor:
    ends = boundaries(valid, length)
    ends[1:2].sub_(1)
    return ends


def written_through_views(valid: torch.Tensor, length: int) -> torch.Tensor:
    ends = boundaries(valid, length)
    ends[1:][:1].sub_(1)
    return ends


def another_sum(valid: torch.Tensor, length: int) -> torch.Tensor:
    """Counted over the batch, not over the text."""
    ends = boundaries(valid, length)
    ends[1] = valid.sum(0)[0] + length - TEXT
    return ends


@pytest.mark.parametrize(
    "split",
    [apart, within_the_video, doubled_count, from_values, rewritten_in_place, written_through_views, another_sum],
)
def test_other_packings_are_declined(split: Any) -> None:
    with torch.no_grad():
        outcome = compiled(lambda *args: joint(*args, split=split), latent(), *padded())
    assert outcome.untouched
    assert outcome.says("cu_seqlens")


def test_a_batch_packed_as_one_sequence_attends_across_samples() -> None:
    """Equal "samples" of twice the length: the batch is part of the tokens, so nothing proves a grid."""
    with torch.no_grad():
        outcome = compiled(lambda *args: joint(*args, split=one_sequence), latent(), *padded())
    assert outcome.untouched
    assert [site.reason_code for site in outcome.sites] != [None]
