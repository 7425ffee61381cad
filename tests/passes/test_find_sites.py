"""Toy attention in every arrangement: what is found, and what is declined with which reason."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import einops
import pytest
import torch
from torch.nn import functional as F

from fpscompile import Backend, Settings
from fpscompile.errors import StrictError
from fpscompile.passes import lower_sites
from fpscompile.records import SiteRecord

T, H, W, HEADS, D = 3, 4, 5, 2, 8
WINDOW = {"window": (1, 1, 2), "tile": (2, 2, 2), "inner": "eager", "quant": "none"}
Attention = Callable[..., torch.Tensor]


def explain(attention: Attention, *args: torch.Tensor, dynamic: bool = False, **options: Any) -> list[SiteRecord]:
    """Sites of a function; a function with nothing rewritten must compute what it did."""
    fps = Backend(Settings.from_options(WINDOW | options))
    torch._dynamo.reset()
    actual = torch.compile(attention, backend=fps, dynamic=dynamic, fullgraph=True)(*args)
    sites = [site for graph in fps.graphs for site in graph.sites]
    assert all((site.reason is None) == site.rewritten for site in sites)
    if not any(site.rewritten for site in sites):
        torch.testing.assert_close(actual, attention(*args))
    return sites


def latent(c: int = HEADS * D, t: int = T, b: int = 2) -> torch.Tensor:
    return torch.randn(b, c, t, H, W)


def heads(tokens: torch.Tensor) -> torch.Tensor:
    """[B, L, C] -> [B, heads, L, D]."""
    return tokens.unflatten(-1, (HEADS, D)).transpose(1, 2)


def tokens_of(video: torch.Tensor) -> torch.Tensor:
    return video.flatten(2).transpose(1, 2)


def self_attention(tokens: torch.Tensor, **kwargs: Any) -> torch.Tensor:
    q = heads(tokens)
    return F.scaled_dot_product_attention(q, q * 2, q + 1, **kwargs)


def plain(video: torch.Tensor) -> torch.Tensor:
    return self_attention(tokens_of(video))


def frames_first(video: torch.Tensor) -> torch.Tensor:
    """[B, T, C, H, W], as CogVideoX has it."""
    x = video.permute(0, 1, 3, 4, 2).flatten(1, 3)
    return self_attention(x)


def in_two_merges(video: torch.Tensor) -> torch.Tensor:
    """Space first, as per-frame patch embeddings do."""
    b, c, t, h, w = video.shape
    x = video.permute(0, 2, 1, 3, 4).reshape(b * t, c, h * w).transpose(1, 2)
    return self_attention(x.reshape(b, t * h * w, c))


def text_first(video: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
    return self_attention(torch.cat([text, tokens_of(video)], dim=1))


def text_last_after_heads(video: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
    q = torch.cat([heads(tokens_of(video)), heads(text)], dim=2)
    return F.scaled_dot_product_attention(q, q, q)


def class_token(video: torch.Tensor) -> torch.Tensor:
    x = tokens_of(video)
    return self_attention(torch.cat([x.mean(1, keepdim=True), x], dim=1))


def longer_keys(video: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
    x = tokens_of(video)
    kv = heads(torch.cat([text, x], dim=1))
    return F.scaled_dot_product_attention(heads(x), kv, kv)


def fused_qkv(video: torch.Tensor) -> torch.Tensor:
    x = tokens_of(video)
    q, k, v = F.linear(x, torch.eye(HEADS * D).repeat(3, 1)).chunk(3, dim=-1)
    return F.scaled_dot_product_attention(heads(q), heads(k), heads(v))


def key_mask(video: torch.Tensor) -> torch.Tensor:
    x = tokens_of(video)
    mask = torch.arange(x.shape[1])[None, None, None] < x.shape[1] - 3
    return self_attention(x, attn_mask=mask)


def repeated_key_mask(video: torch.Tensor) -> torch.Tensor:
    x = tokens_of(video)
    mask = (torch.arange(x.shape[1]) > 2)[None, None, None].expand(x.shape[0], 1, x.shape[1], x.shape[1])
    return self_attention(x, attn_mask=mask)


def grouped(video: torch.Tensor) -> torch.Tensor:
    q = heads(tokens_of(video))
    return F.scaled_dot_product_attention(q, q[:, :1], q[:, :1], enable_gqa=True)


def three_dimensional_q(video: torch.Tensor) -> torch.Tensor:
    x = tokens_of(video)
    return F.scaled_dot_product_attention(x, x, x)


TEXT = torch.randn(2, 7, HEADS * D)


def two_videos(video: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    return self_attention(torch.cat([tokens_of(video), tokens_of(other)], dim=1))


REWRITTEN: dict[str, tuple[Attention, tuple[torch.Tensor, ...], tuple[tuple[str, int], ...]]] = {
    "plain": (plain, (latent(),), (("video", 60),)),
    "frames_first": (frames_first, (torch.randn(2, T, HEADS * D, H, W),), (("video", 60),)),
    "in_two_merges": (in_two_merges, (latent(),), (("video", 60),)),
    "text_first": (text_first, (latent(), TEXT), (("other", 7), ("video", 60))),
    "text_last": (text_last_after_heads, (latent(), TEXT), (("video", 60), ("other", 7))),
    "class_token": (class_token, (latent(),), (("other", 1), ("video", 60))),
    "longer_keys": (longer_keys, (latent(), TEXT), (("video", 60),)),
    "fused_qkv": (fused_qkv, (latent(),), (("video", 60),)),
    "key_mask": (key_mask, (latent(),), (("video", 60),)),
    "repeated_key_mask": (repeated_key_mask, (latent(),), (("video", 60),)),
    "grouped": (grouped, (latent(),), (("video", 60),)),
    "two_videos": (two_videos, (latent(), latent()), (("other", 60), ("video", 60))),
    "history": (two_videos, (latent(t=2), latent()), (("other", 40), ("video", 60))),
    "history_behind": (two_videos, (latent(), latent(t=2)), (("video", 60), ("other", 40))),
    "no heads": (three_dimensional_q, (latent(),), (("video", 60),)),
}


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("name", REWRITTEN)
def test_rewritten(name: str, dynamic: bool) -> None:
    attention, args, segments = REWRITTEN[name]
    (site,) = explain(attention, *args, dynamic=dynamic)
    assert (site.kind, site.grid, site.segments, site.rewritten) == ("3d", (T, H, W), segments, True)
    torch._dynamo.reset()
    dense = Backend(Settings.from_options({"density": 1.0, "inner": "eager"}))
    actual = torch.compile(attention, backend=dense, dynamic=dynamic)(*args)
    torch.testing.assert_close(actual, attention(*args), rtol=1e-4, atol=1e-5)


def causal(video: torch.Tensor) -> torch.Tensor:
    return self_attention(tokens_of(video), is_causal=True)


def dropout_free_but_masked(video: torch.Tensor) -> torch.Tensor:
    x = tokens_of(video)
    return self_attention(x, attn_mask=torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril())


def height_width_time(video: torch.Tensor) -> torch.Tensor:
    return self_attention(video.permute(0, 3, 4, 2, 1).flatten(1, 3))


def tile_permuted(video: torch.Tensor) -> torch.Tensor:
    b, c, t, h, w = video.shape
    x = video.reshape(b, c, t, h // 2, 2, w).permute(0, 3, 2, 4, 5, 1)
    return self_attention(x.reshape(b, t * h * w, c))


def spatial(video: torch.Tensor) -> torch.Tensor:
    return self_attention(video.permute(0, 2, 3, 4, 1).flatten(2, 3).flatten(0, 1))


def temporal(video: torch.Tensor) -> torch.Tensor:
    b, c, t, h, w = video.shape
    return self_attention(video.permute(0, 3, 4, 2, 1).reshape(b * h * w, t, c))


def cross(video: torch.Tensor) -> torch.Tensor:
    kv = heads(TEXT)
    return F.scaled_dot_product_attention(heads(tokens_of(video)), kv, kv)


def single_frame(video: torch.Tensor) -> torch.Tensor:
    return self_attention(tokens_of(video[:, :, :1]))


def shuffled_keys(video: torch.Tensor) -> torch.Tensor:
    """Keys in another order than queries: equal lengths prove nothing."""
    x = tokens_of(video)
    k = heads(x[:, torch.arange(x.shape[1] - 1, -1, -1)])
    return F.scaled_dot_product_attention(heads(x), k, k)


def flipped_values(video: torch.Tensor) -> torch.Tensor:
    x = tokens_of(video)
    return F.scaled_dot_product_attention(heads(x), heads(x), heads(x.flip(1)))


def keys_of_another_video(video: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    k = heads(tokens_of(other))
    return F.scaled_dot_product_attention(heads(tokens_of(video)), k, k)


def rolled(video: torch.Tensor) -> torch.Tensor:
    return self_attention(tokens_of(video).roll(3, 1))


def five_dimensional_q(video: torch.Tensor) -> torch.Tensor:
    x = heads(tokens_of(video))[None]
    return F.scaled_dot_product_attention(x, x, x)


DECLINED: dict[str, tuple[Attention, tuple[torch.Tensor, ...], str, str]] = {
    "causal": (causal, (latent(),), "3d", "causal"),
    "full mask": (dropout_free_but_masked, (latent(),), "3d", "mask"),
    "h-w-t order": (height_width_time, (latent(),), "3d", "token-order"),
    "tile order": (tile_permuted, (latent(),), "3d", "token-order"),
    "spatial": (spatial, (latent(),), "spatial", "kind"),
    "temporal": (temporal, (latent(),), "temporal", "kind"),
    "cross": (cross, (latent(),), "cross", "kind"),
    "single frame": (single_frame, (latent(),), "spatial", "kind"),
    "shuffled keys": (shuffled_keys, (latent(),), "cross", "kind"),
    "flipped values": (flipped_values, (latent(),), "other", "segments"),
    "another video": (keys_of_another_video, (latent(), latent()), "cross", "kind"),
    "rolled": (rolled, (latent(),), "other", "token-order"),
    "five dimensions": (five_dimensional_q, (latent(),), "other", "layout"),
}


def counted_by_einops(x: torch.Tensor) -> torch.Tensor:
    return einops.rearrange(x, "(b t) c h w -> b (t h w) c", t=4)


def counted_by_unflatten(x: torch.Tensor) -> torch.Tensor:
    return x.unflatten(0, (-1, 4)).permute(0, 1, 3, 4, 2).flatten(1, 3)


def counted_by_division(x: torch.Tensor) -> torch.Tensor:
    c, h, w = x.shape[1:]
    b = x.shape[0] // 4
    return x.view(b, 4, c, h, w).permute(0, 1, 3, 4, 2).reshape(b, -1, c)


KEPT_WHOLE = pytest.mark.xfail(
    torch.__version__ < "2.12", reason="einops tells Dynamo of torch 2.11 to keep its calls whole", strict=True
)


@pytest.mark.parametrize(
    "tokens", [pytest.param(counted_by_einops, marks=KEPT_WHOLE), counted_by_unflatten, counted_by_division]
)
def test_frames_folded_into_a_batch_of_any_size(tokens: Attention) -> None:
    """Divided by the samples, which are a quotient of its own, a batch is as many frames as the view says."""
    fps = Backend(Settings.from_options(WINDOW))
    compiled = torch.compile(lambda x: self_attention(tokens(x)), backend=fps)
    for size in (2, 3, 1):
        compiled(torch.randn(4 * size, HEADS * D, H, W))
    assert [site.grid for graph in fps.graphs for site in graph.sites] == [(4, H, W)] * len(fps.graphs)
    assert all(site.rewritten for graph in fps.graphs for site in graph.sites)


def test_a_count_of_frames_that_divides_the_batch_has_a_reason() -> None:
    def of_frames(x: torch.Tensor, frames: int) -> torch.Tensor:
        x = x.view(x.shape[0] // frames, frames, *x.shape[1:])
        return self_attention(x.permute(0, 1, 3, 4, 2).flatten(1, 3))

    fps = Backend(Settings.from_options(WINDOW))
    compiled = torch.compile(of_frames, backend=fps, dynamic=True)
    x = torch.randn(8, HEADS * D, H, W)
    torch.testing.assert_close(compiled(x, 4), of_frames(x, 4))
    (graph,) = fps.graphs
    assert [site.reason_code for site in graph.sites] == ["no-grid"]
    assert not [note for note in graph.notes if note.code == "internal-error"]


def test_a_size_that_the_graph_cannot_compute_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lower_sites._SizeReader, "_expression", lambda self, expression: None)
    (site,) = explain(plain, latent(), dynamic=True)
    assert (site.rewritten, site.reason_code) == (False, "no-grid")
    assert "compile with dynamic=False" in (site.reason or "")


@pytest.mark.parametrize("dynamic", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", DECLINED)
def test_declined(name: str, dynamic: bool) -> None:
    attention, args, kind, code = DECLINED[name]
    (site,) = explain(attention, *args, dynamic=dynamic)
    assert (site.kind, site.rewritten, site.reason_code) == (kind, False, code)


@pytest.mark.parametrize(
    ("name", "remedy"),
    [
        ("causal", "drop the argument if the model is meant to attend to the whole video"),
        ("h-w-t order", "flatten t, h and w in this order ahead of the blocks, such as x.permute(0, 2, 3, 4, 1)"),
        ("tile order", "flatten t, h and w in this order ahead of the blocks, such as x.permute(0, 2, 3, 4, 1)"),
    ],
)
def test_reasons_say_what_would_change_them(name: str, remedy: str) -> None:
    attention, args, *_ = DECLINED[name]
    (site,) = explain(attention, *args)
    assert remedy in (site.reason or "")


def test_two_sites_of_one_graph_are_judged_apart() -> None:
    def both(video: torch.Tensor) -> torch.Tensor:
        return plain(video).sum() + spatial(video).sum()

    assert [site.rewritten for site in explain(both, latent())] == [True, False]


def test_unsupported_dtype() -> None:
    """Eager attention cannot compute it either, so the graph is only looked at."""
    fps = Backend(Settings.from_options(WINDOW | {"inner": lambda gm, inputs: lambda *args: (args[0],)}))
    torch.compile(plain, backend=fps)(latent().to(torch.complex64))
    (site,) = fps.graphs[0].sites
    assert (site.kind, site.rewritten, site.reason_code) == ("3d", False, "dtype")


@pytest.mark.parametrize("code", ["dropout", "causal", "mask", "dtype"])
def test_reasons_are_errors_under_strict(code: str) -> None:
    def attention(video: torch.Tensor) -> torch.Tensor:
        x = tokens_of(video)
        full = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril()
        arguments: dict[str, dict[str, Any]] = {
            "dropout": {"dropout_p": 0.5},
            "causal": {"is_causal": True},
            "mask": {"attn_mask": full},
        }
        return self_attention(x, **arguments.get(code, {}))

    video = latent().to(torch.complex64 if code == "dtype" else torch.float32)
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match="strict=True") as caught:
        torch.compile(attention, backend=Backend(Settings.from_options(WINDOW | {"strict": True})))(video)
    assert isinstance(caught.value.inner_exception, StrictError)


def test_masks_with_gradients() -> None:
    def biased(video: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return self_attention(tokens_of(video), attn_mask=bias)

    (site,) = explain(biased, latent(), torch.zeros(1, 1, 1, 60, requires_grad=True))
    assert site.reason_code == "mask"
    (site,) = explain(biased, latent(), torch.zeros(1, 1, 1, 60))
    assert site.rewritten


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize(("size", "batch", "channels"), [(4, 1, 64), (4, 64, 16), (2, 2, 8), (3, 3, 27)])
def test_sizes_that_meet_by_chance(size: int, batch: int, channels: int, dynamic: bool) -> None:
    """t = h = w, as many tokens as features, as samples: equal numbers prove nothing, and disturb nothing."""

    def attention(video: torch.Tensor) -> torch.Tensor:
        x = tokens_of(video)[:, :, None].transpose(1, 2)
        return F.scaled_dot_product_attention(x, x * 2, x + 1)

    def transposed(video: torch.Tensor) -> torch.Tensor:
        x = tokens_of(video)[:, :, None].transpose(1, 2).transpose(2, 3)
        return F.scaled_dot_product_attention(x, x * 2, x + 1)

    video = torch.randn(batch, channels, size, size, size)
    (site,) = explain(attention, video, dynamic=dynamic)
    assert (site.grid, site.rewritten) == ((size,) * 3, True)
    (site,) = explain(transposed, video, dynamic=dynamic)
    assert not site.rewritten
