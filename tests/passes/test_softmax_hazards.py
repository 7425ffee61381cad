"""Attention written by hand among writes: what is rewritten gives what the author's own gives, whatever is declined."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

from fpscompile import Backend, Settings

HEADS, DIM, GRID, TOKENS = 2, 8, (2, 4, 4), 32
SCALE = DIM**-0.5

Tensor = torch.Tensor


class Attention(nn.Module):
    """Heads of a video's tokens through ``attend``."""

    def __init__(self, attend: Callable[..., object], dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.attend = attend
        self.embed = nn.Conv3d(4, HEADS * DIM, 1, dtype=dtype)
        self.to_q, self.to_k, self.to_v = (nn.Linear(HEADS * DIM, HEADS * DIM, dtype=dtype) for _ in range(3))

    def forward(self, video: Tensor, *more: Tensor) -> object:
        x = self.embed(video).flatten(2).transpose(1, 2)
        heads = (layer(x).unflatten(2, (HEADS, DIM)).transpose(1, 2) for layer in (self.to_q, self.to_k, self.to_v))
        return self.attend(*heads, *more)


def compared(attend: Callable[..., object], *more: Tensor, dtype: torch.dtype = torch.float32) -> bool:
    """Whether the call is rewritten; its results, and what it writes into ``more``, are eager's."""
    model, video = Attention(attend, dtype), torch.randn(2, 4, *GRID, dtype=dtype)
    fps = Backend(
        Settings.from_options(
            {"quant": "none", "inner": "eager", "density": 1.0, "tile": (2, 2, 2), "lowering": "boxes"}
        )
    )
    torch._dynamo.reset()
    theirs, ours = ([x.clone() for x in more] for _ in range(2))
    expected = model(video, *theirs)
    found = torch.compile(model, backend=fps, fullgraph=True)(video, *ours)
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close((found, ours), (expected, theirs), rtol=tolerance, atol=tolerance)
    return any(site.rewritten for site in fps.graphs[0].sites)


def scores_of(q: Tensor, k: Tensor) -> Tensor:
    return q @ k.transpose(-1, -2) * SCALE


def upcast(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return scores_of(q.float(), k.float()).softmax(-1).to(v.dtype) @ v


def upcast_and_written(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    wide = q.float()
    wide.mul_(3.0)
    return scores_of(wide, k.float()).softmax(-1).to(v.dtype) @ v


def source_written(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    wide = q.float()
    q.zero_()
    return scores_of(wide, k.float()).softmax(-1).to(v.dtype) @ v


@pytest.mark.parametrize("attend", [upcast, upcast_and_written, source_written])
@torch.no_grad()
def test_casts(attend: Callable[..., Tensor]) -> None:
    assert compared(attend, dtype=torch.bfloat16)


def shift_that_writes(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = scores_of(q, k)
    return (scores - scores.clamp_(max=0.1).amax(-1, True)).softmax(-1) @ v


def chunks_of_what_changes(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    first = q[:, :, :16] * 2
    q.mul_(0.1)
    second = q[:, :, 16:] * 2
    return torch.cat([scaled_dot_product_attention(part, k, v) for part in (first, second)], 2)


def keys_that_change(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    k = k.half()
    first = k.float()
    k.mul_(2.0)
    second = k.float()
    parts = zip(q.chunk(2, 2), (first, second), strict=True)
    return torch.cat([scaled_dot_product_attention(part, keys, v) for part, keys in parts], 2)


@pytest.mark.parametrize("attend", [shift_that_writes, chunks_of_what_changes, keys_that_change])
@torch.no_grad()
def test_writes_on_the_way(attend: Callable[..., Tensor]) -> None:
    compared(attend)


def into_a_given_softmax(q: Tensor, k: Tensor, v: Tensor, given: Tensor) -> Tensor:
    return torch.softmax(scores_of(q, k), -1, out=given) @ v


def into_given_scores(q: Tensor, k: Tensor, v: Tensor, given: Tensor) -> Tensor:
    return torch.add(scores_of(q, k), torch.ones(TOKENS), out=given).softmax(-1) @ v


@pytest.mark.parametrize("attend", [into_a_given_softmax, into_given_scores])
@torch.no_grad()
def test_results_that_are_given_are_written(attend: Callable[..., Tensor]) -> None:
    assert not compared(attend, torch.zeros(2, HEADS, TOKENS, TOKENS))


@torch.no_grad()
def test_chunks_put_into_a_given_tensor() -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor, given: Tensor) -> Tensor:
        return torch.cat([scaled_dot_product_attention(part, k, v) for part in q.chunk(2, 2)], 2, out=given) * 2.0

    compared(attend, torch.zeros(2, HEADS, TOKENS, DIM))


def hidden(scores: Tensor) -> Tensor:
    mask = (torch.arange(TOKENS) % 5 == 2).view(1, 1, 1, TOKENS)
    return scores.masked_fill(mask, torch.finfo(scores.dtype).min)


def masked_in_double(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return hidden(scores_of(q, k).double()).softmax(-1).to(v.dtype) @ v


def masked_in_float(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return hidden(scores_of(q.float(), k.float())).softmax(-1).to(v.dtype) @ v


def all_masked(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    mask = torch.ones(2, 1, 1, TOKENS, dtype=torch.bool)
    return scores_of(q.float(), k.float()).masked_fill(mask, -1e9).softmax(-1).to(v.dtype) @ v


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("attend", [masked_in_double, masked_in_float, all_masked])
@torch.no_grad()
def test_finite_masks_lower_than_a_value_can_be(attend: Callable[..., Tensor], dtype: torch.dtype) -> None:
    assert compared(attend, dtype=dtype)
