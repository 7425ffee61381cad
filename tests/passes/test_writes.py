"""Writes into tensors: tokens that were put in another order are never taken for the video's rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from fpscompile import Backend, Settings
from fpscompile.records import SiteRecord

T, H, W, HEADS, D = 3, 4, 5, 2, 8
Write = Callable[[torch.Tensor], torch.Tensor]
ORDER = torch.randperm(T * H * W, generator=torch.Generator().manual_seed(3))


def attend(x: torch.Tensor) -> torch.Tensor:
    q = x.unflatten(-1, (HEADS, D)).transpose(1, 2)
    return F.scaled_dot_product_attention(q, q * 2, q + 1)


def sites(write: Write, **options: Any) -> list[SiteRecord]:
    """Of attention over what ``write`` makes of a video's tokens; without a window the result must be eager's."""
    video = torch.randn(2, HEADS * D, T, H, W)

    def model(latent: torch.Tensor) -> torch.Tensor:
        return attend(write(latent.flatten(2).transpose(1, 2).contiguous()))

    fps = Backend(
        Settings.from_options({"tile": (2, 2, 2), "density": 0.3, "inner": "eager", "quant": "none", **options})
    )
    torch._dynamo.reset()
    actual = torch.compile(model, backend=fps, fullgraph=True)(video)
    found = [site for graph in fps.graphs for site in graph.sites]
    if not any(site.rewritten for site in found):
        torch.testing.assert_close(actual, model(video))
    return found


def copied(x: torch.Tensor) -> torch.Tensor:
    out = torch.empty_like(x)
    out.copy_(x.flip(1))
    return out


def copied_over(x: torch.Tensor) -> torch.Tensor:
    out = x.clone()
    out.copy_(x[:, ORDER])
    return out


def through_out(x: torch.Tensor) -> torch.Tensor:
    out = torch.empty_like(x)
    torch.index_select(x, 1, ORDER, out=out)
    return out


def into_a_view(x: torch.Tensor) -> torch.Tensor:
    out = torch.empty_like(x)
    out.view(x.shape).copy_(x.flip(1))
    return out


def under_a_view(x: torch.Tensor) -> torch.Tensor:
    out = torch.empty_like(x)
    view = out.view(x.shape)
    out.copy_(x.flip(1))
    return view


def set_under_a_view(x: torch.Tensor) -> torch.Tensor:
    out = torch.empty_like(x)
    view = out.view(x.shape)
    out[:] = x.flip(1)
    return view


def by_index(x: torch.Tensor) -> torch.Tensor:
    out = torch.empty_like(x)
    out.index_copy_(1, ORDER, x)
    return out


def scattered(x: torch.Tensor) -> torch.Tensor:
    out = torch.empty_like(x)
    out.scatter_(1, ORDER[None, :, None].expand(x.shape), x)
    return out


@torch.library.custom_op("fpscompile_test::reversed_into", mutates_args=("out",))
def reversed_into(x: torch.Tensor, out: torch.Tensor) -> None:
    out.copy_(x.flip(1))


def by_custom_op(x: torch.Tensor) -> torch.Tensor:
    out = torch.empty_like(x)
    reversed_into(x, out)
    return out


def frame_by_frame(x: torch.Tensor) -> torch.Tensor:
    v = x.unflatten(1, (T, H, W))
    out = torch.empty_like(v)
    for to, of in enumerate((0, 2, 1)):
        out[:, to] = v[:, of]
    return out.flatten(1, 3)


def frame_views(x: torch.Tensor) -> torch.Tensor:
    v = x.unflatten(1, (T, H, W))
    out = torch.empty_like(v)
    for to, of in enumerate((0, 2, 1)):
        out[:, to].copy_(v[:, of])
    return out.flatten(1, 3)


def every_other_column(x: torch.Tensor) -> torch.Tensor:
    v = x.unflatten(1, (T, H, W))
    out = v.clone()
    out[:, :, 0::2] = v[:, :, 1::2]
    out[:, :, 1::2] = v[:, :, 0::2]
    return out.flatten(1, 3)


def one_token(x: torch.Tensor) -> torch.Tensor:
    out = x.clone()
    out[:, 0] = x[:, 59]
    return out


REORDERED = (
    copied, copied_over, through_out, into_a_view, under_a_view, set_under_a_view, by_index, scattered, by_custom_op,
    frame_by_frame, frame_views, every_other_column, one_token,
)  # fmt: skip


@pytest.mark.parametrize("write", REORDERED, ids=lambda f: f.__name__)
def test_reordered_tokens_are_declined(write: Write) -> None:
    (site,) = sites(write)
    assert not site.rewritten
    assert site.reason


@pytest.mark.parametrize("write", [copied_over, by_index, scattered, through_out], ids=lambda f: f.__name__)
def test_nor_does_a_named_grid_make_them_rows(write: Write) -> None:
    """The graph shows that an index chose the places; the grid of the options counts other rows."""
    (site,) = sites(write, grid=(T, H, W))
    assert not site.rewritten
    assert "puts the tokens in another order" in (site.reason or "")


def same_rows(x: torch.Tensor) -> torch.Tensor:
    out = torch.empty_like(x)
    out.copy_(x * 2)
    return out


def added(x: torch.Tensor) -> torch.Tensor:
    x = x.clone()
    x.add_(1).mul_(torch.ones(HEADS * D))
    return x


def summed(x: torch.Tensor) -> torch.Tensor:
    out = torch.empty_like(x)
    torch.add(x, x, out=out)
    return out


def accumulated(x: torch.Tensor) -> torch.Tensor:
    x = x.clone()
    return x.index_add_(1, ORDER[:2], torch.ones(2, 2, HEADS * D))


def features(x: torch.Tensor) -> torch.Tensor:
    out = torch.empty_like(x)
    out[..., ::2] = x[..., 1::2]
    out[..., 1::2] = x[..., ::2]
    return out


@pytest.mark.parametrize("write", [same_rows, added, summed, accumulated, features], ids=lambda f: f.__name__)
def test_writes_that_leave_tokens_in_place(write: Write) -> None:
    (site,) = sites(write)
    assert site.rewritten, site.reason
    assert site.grid == (T, H, W)
