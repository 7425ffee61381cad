"""Tokens exchanged for heads between ranks (Ulysses): what one rank's graph shows of them.

The group is a fake one: its collectives move nothing, and any rank of it can be played in one process.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as collectives
from torch._dynamo.exc import BackendCompilerFailed
from torch.nn import functional as F
from torch.testing._internal.distributed.fake_pg import FakeStore

from fpscompile import Backend, Settings
from fpscompile.records import SiteRecord
from fpscompile.windows import Dense, Heads, Sliding

T, H, W, HEADS, D = 4, 4, 6, 4, 8
L = T * H * W
Exchange = Callable[[torch.Tensor], torch.Tensor]


@pytest.fixture(params=[(0, 2), (1, 2), (3, 4)], ids=lambda p: f"rank{p[0]}of{p[1]}")
def place(request: pytest.FixtureRequest) -> Iterator[tuple[int, int]]:
    rank, ranks = request.param
    dist.init_process_group("fake", rank=rank, world_size=ranks, store=FakeStore())
    yield rank, ranks
    dist.destroy_process_group()


def exchange(x: torch.Tensor) -> torch.Tensor:
    """As diffusers does it: [B, own tokens, heads, D] -> [B, tokens, own heads, D]."""
    ranks = dist.get_world_size()
    b, length, heads, d = x.shape
    x = x.reshape(b, length, ranks, heads // ranks, d).permute(2, 1, 0, 3, 4).contiguous()
    y = collectives.all_to_all_single(x.flatten(), None, None, dist.group.WORLD)
    y = collectives.wait_tensor(y).reshape(x.shape)
    return y.flatten(0, 1).permute(1, 0, 2, 3).contiguous()


def exchange_in_place(x: torch.Tensor) -> torch.Tensor:
    """The same through ``torch.distributed``."""
    ranks = dist.get_world_size()
    b, length, heads, d = x.shape
    x = x.reshape(b, length, ranks, heads // ranks, d).permute(2, 1, 0, 3, 4).contiguous()
    y = torch.empty_like(x)
    dist.all_to_all_single(y, x)
    return y.flatten(0, 1).permute(1, 0, 2, 3).contiguous()


def exchange_batch_first(x: torch.Tensor) -> torch.Tensor:
    ranks = dist.get_world_size()
    y = collectives.all_to_all_single(
        x.unflatten(2, (ranks, -1)).movedim(2, 0).contiguous(), None, None, dist.group.WORLD
    )
    return y.movedim(0, 1).flatten(1, 2)


def back(x: torch.Tensor) -> torch.Tensor:
    """[B, tokens, own heads, D] -> [B, own tokens, heads, D]."""
    ranks = dist.get_world_size()
    b, length, heads, d = x.shape
    x = x.reshape(b, ranks, length // ranks, heads, d).permute(1, 3, 0, 2, 4).contiguous()
    y = collectives.all_to_all_single(x, None, None, dist.group.WORLD)
    return y.flatten(0, 1).permute(1, 2, 0, 3)


def layer(x: torch.Tensor, swap: Exchange = exchange) -> torch.Tensor:
    """Attention over this rank's tokens [B, own, heads * D], with a residual."""
    q, k, v = (swap((x * scale).unflatten(2, (HEADS, D))).transpose(1, 2) for scale in (1, 2, 3))
    out = F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
    return x + back(out).flatten(2)


def own(x: torch.Tensor) -> torch.Tensor:
    return x.chunk(dist.get_world_size(), 1)[dist.get_rank()]


def sites(model: Any, *args: torch.Tensor, **options: Any) -> list[SiteRecord]:
    fps = Backend(
        Settings.from_options({"tile": (2, 2, 2), "density": 0.3, "inner": "eager", "quant": "none", **options})
    )
    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(model, backend=fps, fullgraph=True)(*args)
    return [site for graph in fps.graphs for site in graph.sites]


def video(b: int = 2) -> torch.Tensor:
    return torch.randn(b, HEADS * D, T, H, W)


def tokens(latent: torch.Tensor) -> torch.Tensor:
    return latent.flatten(2).transpose(1, 2)


@pytest.mark.parametrize("swap", [exchange, exchange_in_place, exchange_batch_first], ids=lambda f: f.__name__)
@pytest.mark.parametrize("batch", [1, 2])
def test_two_layers_of_ulysses_show_the_grid(place: tuple[int, int], swap: Exchange, batch: int) -> None:
    def model(latent: torch.Tensor) -> torch.Tensor:
        return layer(layer(own(tokens(latent)), swap), swap)

    found = sites(model, video(batch))
    assert len(found) == 2
    for site in found:
        assert site.rewritten, site.reason
        assert site.grid == (T, H, W)
        assert site.grid_source == "graph"
        assert site.heads == HEADS // place[1]


def test_tokens_from_elsewhere_take_a_named_grid(place: tuple[int, int]) -> None:
    """A block on its own: its input is this rank's tokens, and says nothing of them."""
    (site,) = sites(layer, torch.randn(1, L // place[1], HEADS * D), grid=(T, H, W))
    assert site.rewritten, site.reason
    (site,) = sites(layer, torch.randn(1, L // place[1], HEADS * D))
    assert not site.rewritten
    assert "does not show" in (site.reason or "")


def striped(x: torch.Tensor) -> torch.Tensor:
    return x[:, dist.get_rank() :: dist.get_world_size()]


def another_ranks(x: torch.Tensor) -> torch.Tensor:
    return x.chunk(dist.get_world_size(), 1)[dist.get_rank() - 1]


def shuffled(x: torch.Tensor) -> torch.Tensor:
    return x[:, torch.arange(L - 1, -1, -1)].chunk(dist.get_world_size(), 1)[dist.get_rank()]


@pytest.mark.parametrize("share", [striped, another_ranks, shuffled], ids=lambda f: f.__name__)
@pytest.mark.parametrize("options", [{}, {"grid": (T, H, W)}], ids=["", "grid"])
def test_tokens_shared_out_in_another_order(place: tuple[int, int], share: Exchange, options: dict[str, Any]) -> None:
    def model(latent: torch.Tensor) -> torch.Tensor:
        return layer(share(tokens(latent)))

    (site,) = sites(model, video(), **options)
    assert not site.rewritten
    assert not options or "puts the tokens in another order" in (site.reason or "")


def test_text_and_video_each_shared_out_alternate(place: tuple[int, int]) -> None:
    def model(latent: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        return layer(torch.cat([own(text), own(tokens(latent))], 1))

    (site,) = sites(model, video(), torch.randn(2, 8, HEADS * D))
    assert not site.rewritten


def test_text_and_video_shared_out_together(place: tuple[int, int]) -> None:
    def model(latent: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        return layer(own(torch.cat([text, tokens(latent)], 1)))

    (site,) = sites(model, video(), torch.randn(2, 8, HEADS * D))
    assert site.rewritten, site.reason
    assert site.grid == (T, H, W)


def test_uneven_parts_are_left_alone(place: tuple[int, int]) -> None:
    ranks = place[1]

    def model(latent: torch.Tensor) -> torch.Tensor:
        x = own(tokens(latent)).unflatten(2, (HEADS, D)).movedim(2, 0).contiguous()
        sizes = [HEADS // ranks] * ranks
        if ranks == 2:
            sizes = [1, 3]
        y = collectives.all_to_all_single(x, sizes, sizes, dist.group.WORLD)
        q = y.unflatten(0, (ranks, -1)).movedim(0, 1).movedim(2, 1).flatten(2, 3).transpose(0, 1)
        return F.scaled_dot_product_attention(q, q, q)

    if ranks == 2:
        (site,) = sites(model, video())
        assert not site.rewritten


@pytest.mark.parametrize("place", [(1, 2)], indirect=True)
def test_windows_by_head_go_to_the_heads_of_the_rank(place: tuple[int, int]) -> None:
    """Rank 1 of 2 has heads 2 and 3 of 4: as its heads 0 and 1."""

    def model(latent: torch.Tensor) -> torch.Tensor:
        return layer(own(tokens(latent)))

    heads = {"0-2": "dense", "3": {"family": "sliding", "density": 0.2}}
    (site,) = sites(model, video(), heads=heads)
    assert site.rewritten, site.reason
    (window,) = site.windows
    assert isinstance(window, Heads)
    assert window.of_head(0) == Dense()
    assert isinstance(window.of_head(1), Sliding)
    (first,) = sites(model, video(), heads={"0-1": "dense"})
    assert first.density[0] < 0.5, "both dense heads are the other rank's"
    (last,) = sites(model, video(), heads={"2-3": "dense"})
    assert last.density[0] == 1.0
    with pytest.raises(BackendCompilerFailed, match="OptionError: heads '4' names head 4, but the site has 4 heads"):
        sites(model, video(), heads={"4": "dense"})


@pytest.mark.parametrize("place", [(3, 4)], indirect=True)
def test_one_head_to_a_rank_cannot_be_told(place: tuple[int, int]) -> None:
    def model(latent: torch.Tensor) -> torch.Tensor:
        return layer(own(tokens(latent)))

    (site,) = sites(model, video(), heads={"0": "dense"})
    assert not site.rewritten
    assert "differ by head" in (site.reason or "")


def test_sums_over_ranks_keep_the_tokens(place: tuple[int, int]) -> None:
    """Tensor parallelism: each rank has a part of the features."""

    def model(latent: torch.Tensor) -> torch.Tensor:
        x = collectives.all_reduce(tokens(latent), "sum", dist.group.WORLD)
        q = x.unflatten(2, (HEADS, D)).transpose(1, 2)
        return F.scaled_dot_product_attention(q, q, q)

    (site,) = sites(model, video())
    assert site.rewritten, site.reason
