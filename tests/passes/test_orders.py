"""Tokens in another order than the grid's, samples that are not each other's, and settings that must not get lost."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from fpscompile import Backend, Settings
from fpscompile.records import SiteRecord

B, C, T, H, W, HEADS, D = 2, 16, 4, 4, 4, 2, 8
PERM = torch.randperm(T * H * W, generator=torch.Generator().manual_seed(1))
Model = Callable[[torch.Tensor], torch.Tensor]


def heads(x: torch.Tensor) -> torch.Tensor:
    return x.unflatten(-1, (HEADS, D)).transpose(1, 2)


def tokens(v: torch.Tensor) -> torch.Tensor:
    return v.flatten(2).transpose(1, 2)


def attend(q: torch.Tensor, k: torch.Tensor | None = None, v: torch.Tensor | None = None, **how: Any) -> torch.Tensor:
    k = q if k is None else k
    return F.scaled_dot_product_attention(heads(q), heads(k) * 2, heads(k if v is None else v) + 1, **how)


def sites(model: Model, **options: Any) -> list[SiteRecord]:
    """The output must be eager's: nothing is windowed."""
    torch.manual_seed(0)
    video = torch.randn(B, C, T, H, W)
    how = {"tile": (2, 2, 2), "density": 1.0, "inner": "eager", "quant": "none"}
    fps = Backend(Settings.from_options(how | {name: value for name, value in options.items() if value is not None}))
    torch._dynamo.reset()
    wanted = model(video.clone())
    got = torch.compile(model, backend=fps, fullgraph=True)(video.clone())
    torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-4)
    return [site for graph in fps.graphs for site in graph.sites]


def stacked(v: torch.Tensor) -> torch.Tensor:
    q, k, z = torch.stack([tokens(v), tokens(v)[:, PERM], tokens(v)[:, PERM]]).unbind(0)
    return attend(q, k, z)


def even_frames_first(v: torch.Tensor) -> torch.Tensor:
    return attend(tokens(torch.cat([v[:, :, ::2], v[:, :, 1::2]], 2)))


def halves_swapped(v: torch.Tensor) -> torch.Tensor:
    return attend(tokens(torch.cat(v.chunk(2, 4)[::-1], 4)))


def frames_backwards(v: torch.Tensor) -> torch.Tensor:
    return attend(tokens(torch.stack([v[:, :, t] * 2 for t in reversed(range(T))], 2)))


def unbound_backwards(v: torch.Tensor) -> torch.Tensor:
    return attend(tokens(torch.stack(v.unbind(2)[::-1], 2)))


def shifted(v: torch.Tensor) -> torch.Tensor:
    return attend(tokens(v.roll((1, -1), (3, 4))))


@pytest.mark.parametrize("grid", [None, (T, H, W)])
@pytest.mark.parametrize(
    "model", [even_frames_first, halves_swapped, frames_backwards, unbound_backwards, shifted], ids=lambda m: m.__name__
)
def test_another_order_is_no_grid_whoever_names_it(model: Model, grid: tuple[int, int, int] | None) -> None:
    (site,) = sites(model, grid=grid)
    assert (site.rewritten, site.reason_code) == (False, "token-order")
    assert "puts the tokens in another order" in (site.reason or "")


def test_shifted_windows_and_back() -> None:
    """What was rolled and is rolled back is in its own order again, whatever was done between."""

    def swin(v: torch.Tensor) -> torch.Tensor:
        x = v.roll((-1, -2), (3, 4))
        x = x.unflatten(4, (2, W // 2)).relu().flatten(4, 5)
        return attend(tokens(x.roll((1, 2), (3, 4))))

    def not_quite(v: torch.Tensor) -> torch.Tensor:
        return attend(tokens(v.roll((-1, -2), (3, 4)).relu().roll((1, 1), (3, 4))))

    assert [(site.rewritten, site.grid) for site in sites(swin)] == [(True, (T, H, W))]
    assert [site.reason_code for site in sites(not_quite)] == ["token-order"]


@pytest.mark.parametrize(
    "mix",
    [
        lambda v: v[:, :1, :, :1, :1] * v,
        lambda v: torch.where(v[:, :1, :, :1, :1] > 0, 0.0, v),
        lambda v: v.new_ones(1, 1, T, 1, 1) * v,
    ],
    ids=["first", "where", "made"],
)
def test_a_mask_of_frames_ahead_of_the_video(mix: Model) -> None:
    """Of two operands that show the frames, the one that shows rows and columns too names them."""
    (site,) = sites(lambda v: attend(tokens(mix(v))))
    assert (site.rewritten, site.grid) == (True, (T, H, W))


def test_frames_blended_by_a_mask() -> None:
    def blend(v: torch.Tensor, mask: torch.Tensor, first: torch.Tensor) -> torch.Tensor:
        return attend(tokens(mask * first + (1 - mask) * v))

    fps = Backend(Settings.from_options({"tile": (2, 2, 2), "density": 1.0, "inner": "eager", "quant": "none"}))
    torch.compile(blend, backend=fps)(torch.randn(B, C, T, H, W), torch.rand(1, 1, T, 1, 1), torch.randn(B, C, 1, H, W))
    assert [(site.rewritten, site.grid) for site in fps.graphs[0].sites] == [(True, (T, H, W))]


def second_scan(v: torch.Tensor) -> torch.Tensor:
    return attend(torch.cat([tokens(v), tokens(v.transpose(3, 4))], 0))


def every_other_frame_first(v: torch.Tensor) -> torch.Tensor:
    return attend(tokens(torch.cat([v[:, :, 0::2], v[:, :, 1::2]], 2)))


def pooled_halves_swapped(v: torch.Tensor) -> torch.Tensor:
    halves = v[:, :, 2:], v[:, :, :2]
    return attend(tokens(torch.cat([F.avg_pool3d(x, (1, 2, 2)) for x in halves], 2)))


def narrowed_from_the_end(v: torch.Tensor) -> torch.Tensor:
    return attend(tokens(torch.cat([v.narrow(2, -2, 2), v.narrow(2, 0, 2)], 2)))


def rolled_by_padding(v: torch.Tensor) -> torch.Tensor:
    return attend(tokens(F.pad(v, (0, 0, 0, 0, 2, 0), mode="circular")[:, :, :T]))


def repeated_as_data_says(v: torch.Tensor) -> torch.Tensor:
    often = torch.tensor([2, 0] * (T * H * W // 2))
    x = tokens(v)
    return attend(x, torch.repeat_interleave(x, often, dim=1, output_size=T * H * W))


def noise_and_others(v: torch.Tensor) -> torch.Tensor:
    return attend(tokens(v)[:, PERM] + torch.zeros_like(tokens(v)))


def other_samples(v: torch.Tensor) -> torch.Tensor:
    x = tokens(v)
    return attend(x, x[torch.tensor([1, 0])])


def halves_of_the_batch(v: torch.Tensor) -> torch.Tensor:
    x = tokens(v)
    return attend(x[::2], x[1::2])


def overwritten_later(v: torch.Tensor) -> torch.Tensor:
    x = heads(tokens(v))
    q = x[:, :, PERM]
    out = F.scaled_dot_product_attention(q, q, q)
    q.copy_(x)
    return out


def written_through_dropout(v: torch.Tensor) -> torch.Tensor:
    y = torch.empty_like(tokens(v))
    F.dropout(y, 0.0, False).copy_(tokens(v)[:, PERM])
    return attend(y)


ORDERS = (
    stacked, second_scan, every_other_frame_first, pooled_halves_swapped, narrowed_from_the_end, rolled_by_padding,
    repeated_as_data_says, noise_and_others, other_samples, halves_of_the_batch, overwritten_later,
    written_through_dropout,
)  # fmt: skip


@pytest.mark.parametrize("model", ORDERS, ids=lambda f: f.__name__)
def test_what_is_in_another_order_is_declined(model: Model) -> None:
    (site,) = sites(model)
    assert not site.rewritten
    assert site.reason


def causal_pieces(v: torch.Tensor) -> torch.Tensor:
    x = heads(tokens(v))
    return torch.cat([F.scaled_dot_product_attention(q, x, x, is_causal=True) for q in x.chunk(2, 2)], 2)


def scores_before_a_write(v: torch.Tensor) -> torch.Tensor:
    x, k = heads(tokens(v)).clone(), heads(tokens(v))
    scores = F.dropout(x, 0.0, False) @ k.mT
    x.mul_(3)
    return scores.softmax(-1) @ k


def gradient(v: torch.Tensor) -> torch.Tensor:
    return torch.func.grad(lambda s: attend(tokens(v) * s).square().sum())(torch.ones(()))


@pytest.mark.parametrize("model", [causal_pieces, scores_before_a_write, gradient], ids=lambda f: f.__name__)
def test_what_asks_for_more_is_declined(model: Model) -> None:
    assert not any(site.rewritten for site in sites(model))
