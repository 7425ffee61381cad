"""Models that no registry lists, in code that someone might write: each works, or the record says why not.

Where attention is rewritten, the sparse result is that of eager with the window as a mask: a grid that is mistaken
cannot hide.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from models.oracle import WindowedCalls, rectangular_mask
from models.toys import HEADS, D
from torch import nn
from torch.nn import functional as F

import fpscompile
from fpscompile import Backend, Settings

GRID, CHANNELS, TEXT = (3, 4, 5), 4, 3
WIDTH = HEADS * D
TILE, WINDOW = (2, 2, 2), (1, 1, 2)
OPTIONS = {"quant": "none", "inner": "eager", "lowering": "boxes", "tile": TILE, "window": WINDOW}


def video(t: int = 3, h: int = 8, w: int = 10, batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, CHANNELS, t, h, w)


class Plain(nn.Module):
    """Patches of (1, 2, 2), one attention."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv3d(CHANNELS, WIDTH, (1, 2, 2), (1, 2, 2))
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def tokens(self, x: torch.Tensor) -> torch.Tensor:
        return self.embed(x).flatten(2).transpose(1, 2)

    def heads(self, x: torch.Tensor) -> Any:
        return self.qkv(x).unflatten(-1, (3, HEADS, D)).permute(2, 0, 3, 1, 4)

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return F.scaled_dot_product_attention(q, k, v)

    def block(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.out(self.attend(*self.heads(x)).transpose(1, 2).flatten(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.block(self.tokens(x))


class FramesStacked(Plain):
    """Each frame goes through the 2-D patch embedding of an image model, in a loop."""

    def __init__(self) -> None:
        super().__init__()
        self.image = nn.Conv2d(CHANNELS, WIDTH, 2, 2)

    def tokens(self, x: torch.Tensor) -> torch.Tensor:
        frames = [self.image(x[:, :, i]).flatten(2).transpose(1, 2) for i in range(x.shape[2])]
        return torch.stack(frames, dim=1).flatten(1, 2)


class FramesJoined(FramesStacked):
    def tokens(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([self.image(frame).flatten(2).transpose(1, 2) for frame in x.unbind(2)], dim=1)


class FramesReversed(FramesStacked):
    """Frames in another order: no longer row-major."""

    def tokens(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([self.image(frame).flatten(2).transpose(1, 2) for frame in reversed(x.unbind(2))], dim=1)


class GivenFrame(Plain):
    """An image goes in front as the first frame, before or after the patch embedding."""

    def __init__(self, early: bool) -> None:
        super().__init__()
        self.early = early

    def forward(self, x: torch.Tensor, image: torch.Tensor) -> torch.Tensor:
        if self.early:
            return self.block(self.tokens(torch.cat([image, x], dim=2)))
        both = torch.cat([self.embed(image), self.embed(x)], dim=2)
        return self.block(both.permute(0, 2, 3, 4, 1).reshape(x.shape[0], -1, WIDTH))


class Padded(Plain):
    """Odd latents, padded to whole patches."""

    def tokens(self, x: torch.Tensor) -> torch.Tensor:
        return super().tokens(F.pad(x, (0, x.shape[-1] % 2, 0, x.shape[-2] % 2)))


class PaddedSequence(Plain):
    """Tokens padded to a multiple of 16; the padding is hidden."""

    def block(self, x: torch.Tensor) -> torch.Tensor:
        length = x.shape[1]
        y = F.pad(x, (0, 0, 0, -length % 16))
        seen = (torch.arange(y.shape[1]) < length)[None, None, None]
        y = F.scaled_dot_product_attention(*self.heads(y), attn_mask=seen)
        return x + self.out(y.transpose(1, 2).flatten(2))[:, :length]


class LaterFrames(Plain):
    """The first frame is dropped."""

    def tokens(self, x: torch.Tensor) -> torch.Tensor:
        return super().tokens(x[:, :, 1:])


class Unshuffled(Plain):
    def tokens(self, x: torch.Tensor) -> torch.Tensor:
        y = F.pixel_unshuffle(x.transpose(1, 2), 2)
        return y.permute(0, 1, 3, 4, 2).reshape(x.shape[0], -1, WIDTH)


class Cached(Plain):
    """An autoregressive model: keys and values of earlier frames come from caches."""

    def forward(self, x: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        q, k, v = self.heads(self.tokens(x))
        return self.attend(q, torch.cat([keys, k], 2), torch.cat([values, v], 2))


class SampleBySample(Plain):
    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return torch.cat([super(SampleBySample, self).attend(*(x[i : i + 1] for x in (q, k, v))) for i in range(2)])


class Meta(Plain):
    """Channels last throughout, learned tokens in front, a table of frame embeddings."""

    def __init__(self) -> None:
        super().__init__()
        self.meta, self.time = nn.Parameter(torch.randn(2, WIDTH)), nn.Parameter(torch.randn(1, 8, 1, 1, WIDTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.embed(x).permute(0, 2, 3, 4, 1)
        y = y + self.time[:, : y.shape[1]]
        y = self.block(torch.cat([self.meta.expand(y.shape[0], -1, -1), y.reshape(y.shape[0], -1, WIDTH)], 1))
        return y[:, 2:].unflatten(1, GRID)


def cache() -> torch.Tensor:
    return torch.randn(2, HEADS, 20, D)


WORKS: dict[str, tuple[Callable[[], nn.Module], Callable[[], tuple[Any, ...]], tuple[int, int, int], int, int]] = {
    # model, inputs, grid, tokens ahead of the video, other tokens behind it (keys, as queries unless noted)
    "frames stacked": (FramesStacked, lambda: (video(),), GRID, 0, 0),
    "frames joined": (FramesJoined, lambda: (video(),), GRID, 0, 0),
    "given frame early": (lambda: GivenFrame(True), lambda: (video(2), video(1)), GRID, 0, 0),
    "given frame late": (lambda: GivenFrame(False), lambda: (video(2), video(1)), GRID, 0, 0),
    "padded": (Padded, lambda: (video(h=7, w=9),), GRID, 0, 0),
    "padded sequence": (PaddedSequence, lambda: (video(),), GRID, 0, 4),
    "later frames": (LaterFrames, lambda: (video(4),), GRID, 0, 0),
    "unshuffled": (Unshuffled, lambda: (video(),), GRID, 0, 0),
    "sample by sample": (SampleBySample, lambda: (video(),), GRID, 0, 0),
    "meta tokens": (Meta, lambda: (video(),), GRID, 2, 0),
}


@pytest.mark.parametrize("dynamic", [None, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", WORKS)
def test_works(name: str, dynamic: bool | None) -> None:
    build, make, grid, before, after = WORKS[name]
    model, inputs, fps = build().eval(), make(), Backend(Settings.from_options(OPTIONS))
    length = before + 60 + after
    mask = rectangular_mask(grid, TILE, WINDOW, (length, before), (length, before))
    with torch.no_grad():
        actual = torch.compile(model, backend=fps, dynamic=dynamic)(*inputs)
        dense = model(*inputs)
        with WindowedCalls({(length, length): mask}) as windowed:
            expected = model(*inputs)
    sites = [site for graph in fps.graphs for site in graph.sites]
    assert [(site.kind, site.grid, site.rewritten) for site in sites] == [("3d", grid, True)] * windowed.calls
    assert float((actual - expected).norm() / expected.norm()) <= 1e-5
    assert not torch.allclose(dense, expected, rtol=1e-3, atol=1e-3)


def test_caches_of_keys_and_values() -> None:
    model, inputs, fps = Cached().eval(), (video(), cache(), cache()), Backend(Settings.from_options(OPTIONS))
    mask = rectangular_mask(GRID, TILE, WINDOW, (60, 0), (80, 20))
    with torch.no_grad():
        actual = torch.compile(model, backend=fps)(*inputs)
        with WindowedCalls({(60, 80): mask}):
            expected = model(*inputs)
    assert [site.rewritten for site in fps.graphs[0].sites] == [True]
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


class Reference(Plain):
    """Every sample looks at the other half of the batch, or at the first sample."""

    def __init__(self, first: bool, rank: int = 4) -> None:
        super().__init__()
        self.first = first

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        half = q.shape[0] // 2
        if self.first:
            return torch.stack([F.scaled_dot_product_attention(x[None], k[0][None], v[0][None])[0] for x in q[1:]])
        return F.scaled_dot_product_attention(q[:half], k[half:], v[half:])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.attend(*self.heads(self.tokens(x)))


class PerFrameTokens(Plain):
    """One action token in each frame: t * (1 + h * w) is no grid."""

    def forward(self, x: torch.Tensor, actions: torch.Tensor) -> torch.Tensor:
        y = self.embed(x).permute(0, 2, 3, 4, 1).flatten(2, 3)
        return self.block(torch.cat([actions[:, :, None], y], 2).flatten(1, 2))


class Views(Plain):
    """Several cameras in one sequence."""

    def tokens(self, x: torch.Tensor) -> torch.Tensor:
        y = self.embed(x).unflatten(0, (1, 2))
        return y.permute(0, 1, 3, 4, 5, 2).reshape(1, -1, WIDTH)


DECLINED: dict[str, tuple[Callable[[], nn.Module], Callable[[], tuple[Any, ...]], str, str]] = {
    # model, inputs, reason code, words of the reason
    "frames reversed": (FramesReversed, lambda: (video(),), "no-grid", "attach"),
    "other half": (lambda: Reference(False), lambda: (video(batch=4),), "kind", "different samples"),
    "other sample": (lambda: Reference(False), lambda: (video(),), "kind", "cross"),
    "first sample": (lambda: Reference(True), lambda: (video(),), "kind", "cross"),
    "token per frame": (PerFrameTokens, lambda: (video(), torch.randn(2, 3, WIDTH)), "no-grid", "63 tokens"),
    "views": (Views, lambda: (video(),), "token-order", "interleaving of 4 axes"),
}


@pytest.mark.parametrize("name", DECLINED)
def test_says_why_not(name: str) -> None:
    build, make, code, words = DECLINED[name]
    model, inputs, fps = build().eval(), make(), Backend(Settings.from_options(OPTIONS))
    with torch.no_grad():
        actual, expected = torch.compile(model, backend=fps)(*inputs), model(*inputs)
    sites = [site for graph in fps.graphs for site in graph.sites]
    assert [site.reason_code for site in sites] == [code]
    assert words in str(sites[0].reason)
    assert torch.equal(actual, expected)


def test_nested_tensors_break_the_graph_and_nothing_else() -> None:
    class Nested(Plain):
        def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            q, k, v = (
                torch.nested.as_nested_tensor([y.transpose(0, 1) for y in x], layout=torch.jagged).transpose(1, 2)
                for x in (q, k, v)
            )
            packed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).values()
            return packed.unflatten(0, (2, -1)).transpose(1, 2)

    model, x, fps = Nested().eval(), video(), Backend(Settings.from_options(OPTIONS))
    with torch.no_grad():
        assert torch.equal(torch.compile(model, backend=fps)(x), model(x))
    notes = [note for graph in fps.graphs for note in graph.notes]
    assert {note.code for note in notes} == {"graph-break"}
    assert "scaled_dot_product_attention(q, k, v)" in notes[0].message


class Shuffled(Plain):
    """Tokens in an order that the caller gives."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how

    def forward(self, x: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
        y = self.tokens(x)
        if self.how == "gather":
            y = torch.gather(y, 1, order[None, :, None].expand(y.shape))
        else:
            y = y.flip(1) if self.how == "flip" else y[:, order]
        return self.block(y)


@pytest.mark.parametrize("how", ["gather", "index", "flip"])
def test_a_published_grid_is_not_that_of_tokens_in_another_order(how: str) -> None:
    model, fps, inputs = Shuffled(how).eval(), Backend(Settings.from_options(OPTIONS)), (video(), torch.randperm(60))
    compiled = torch.compile(model, backend=fps)
    with torch.no_grad(), fpscompile.attach(compiled, grid=GRID):
        assert torch.equal(compiled(*inputs), model(*inputs))
    (site,) = fps.graphs[0].sites
    assert (site.kind, site.reason_code) == ("3d", "token-order")
    assert "puts the tokens in another order" in str(site.reason)


@pytest.fixture
def library() -> Iterator[Any]:
    """An attention op of a package that is not known here."""
    with torch.library._scoped_library("unlisted", "FRAGMENT") as lib:
        lib.define("attend(Tensor q, Tensor k, Tensor v) -> Tensor")
        lib.impl("attend", F.scaled_dot_product_attention, "CPU")
        lib.impl("attend", lambda q, k, v: torch.empty_like(q), "Meta")
        yield torch.ops.unlisted.attend


def test_ops_that_hide_attention_are_named(library: Any) -> None:
    model, fps = Plain().eval(), Backend(Settings.from_options(OPTIONS))
    model.attend = library  # type: ignore[method-assign]
    with torch.no_grad():
        torch.compile(model, backend=fps)(video())
    (note,) = fps.graphs[0].notes
    assert (note.level, note.code) == ("warning", "hidden-attention")
    assert "unlisted::attend" in note.message
    assert "scaled_dot_product_attention" in note.message


def test_other_fused_ops_are_not_taken_for_attention() -> None:
    """A modulation of tokens by shift and scale, and a rotation by a table."""
    with torch.library._scoped_library("unlisted", "FRAGMENT") as lib:
        lib.define("modulate(Tensor x, Tensor scale, Tensor shift) -> Tensor")
        lib.define("rotate(Tensor q, Tensor k, Tensor table) -> (Tensor, Tensor)")
        lib.impl("modulate", lambda x, scale, shift: x * scale + shift, "CompositeExplicitAutograd")
        lib.impl("rotate", lambda q, k, table: (q * table, k * table), "CompositeExplicitAutograd")
        lib.impl("modulate", lambda x, scale, shift: torch.empty_like(x), "Meta")
        lib.impl("rotate", lambda q, k, table: (torch.empty_like(q), torch.empty_like(k)), "Meta")

        class Fused(Plain):
            def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
                q, k = torch.ops.unlisted.rotate(
                    q, k, torch.linspace(0, 1, 60)[None, None, :, None].expand(1, 1, 60, D)
                )
                return super().attend(q, k, v)

            def tokens(self, x: torch.Tensor) -> torch.Tensor:
                y = super().tokens(x)
                return torch.ops.unlisted.modulate(y, y.mean(1, keepdim=True), y.amax(1, keepdim=True))

        fps = Backend(Settings.from_options(OPTIONS))
        with torch.no_grad():
            torch.compile(Fused().eval(), backend=fps)(video())
    assert not fps.graphs[0].notes
    (site,) = fps.graphs[0].sites
    assert (site.rewritten, site.reason_code) == (False, "segments")
    assert "unlisted::modulate" in str(site.reason)  # the first op at which a trail ends


def test_the_fast_path_of_an_encoder_layer_is_named_with_the_switch() -> None:
    class Encoder(Plain):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 2 * WIDTH, batch_first=True)

        def block(self, x: torch.Tensor) -> torch.Tensor:
            return self.layer(x)

    fps = Backend(Settings.from_options(OPTIONS))
    with torch.no_grad():
        torch.compile(Encoder().eval(), backend=fps)(video())
    (note,) = fps.graphs[0].notes
    assert note.code == "hidden-attention"
    assert "set_fastpath_enabled(False)" in note.message
    torch._dynamo.reset()
    torch.compile(Encoder().eval(), backend=fps)(video())  # training takes the other path
    assert [site.rewritten for site in fps.graphs[1].sites] == [True]


def test_near_misses_are_a_warning_where_nothing_else_is_found() -> None:
    class Differential(Plain):
        def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            return ((q @ k.mT).softmax(-1) - 0.3 * (q.flip(-1) @ k.mT).softmax(-1)) @ v

    fps = Backend(Settings.from_options(OPTIONS))
    with torch.no_grad():
        torch.compile(Differential().eval(), backend=fps)(video())
    (warning,) = [note for note in fps.graphs[0].notes if note.level == "warning"]
    assert warning.code == "no-attention"
    assert "sub stands between the softmax and the values" in warning.message


def test_a_function_kept_out_by_hand_is_the_remedy_itself() -> None:
    class KeptOut(Plain):
        @torch.compiler.disable
        def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            return F.scaled_dot_product_attention(q, k, v)

    fps = Backend(Settings.from_options(OPTIONS))
    with torch.no_grad():
        torch.compile(KeptOut().eval(), backend=fps)(video())
    note = fps.graphs[0].notes[0]
    assert "taking torch.compiler.disable off" in note.message


def test_a_pass_that_fails_leaves_the_graph_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    from fpscompile.passes import find_sites

    def broken(*args: Any) -> Any:
        raise ZeroDivisionError("a flaw of ours")

    monkeypatch.setattr(find_sites, "classify", broken)
    model, x = Plain().eval(), video()
    fps = Backend(Settings.from_options(OPTIONS))
    with torch.no_grad():
        assert torch.equal(torch.compile(model, backend=fps)(x), model(x))
        (note,) = fps.graphs[0].notes
        assert (note.level, note.code) == ("warning", "internal-error")
        assert "ZeroDivisionError: a flaw of ours" in note.message
        torch._dynamo.reset()
        with pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match="a flaw of ours"):
            torch.compile(model, backend=Backend(Settings.from_options(OPTIONS | {"strict": True})))(x)
