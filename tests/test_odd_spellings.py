"""Attention spelled as nobody listed it, in a video transformer: rewritten rightly, or left with a reason.

What is rewritten equals eager with the window as a mask; what is not equals eager to the last bit.
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from models.oracle import rectangular_mask
from models.toys import HEADS, D
from torch import nn
from torch.nn import functional as F

import fpscompile
from fpscompile import Backend, Settings

GRID, LENGTH, WIDTH, TEXT = (3, 4, 5), 60, HEADS * D, 6
TILE, WINDOW = (2, 2, 2), (1, 1, 2)
OPTIONS = {"quant": "none", "inner": "eager", "lowering": "boxes", "tile": TILE, "window": WINDOW}
SCALE = D**-0.5


class Video(nn.Module):
    """Patches of (1, 2, 2), one attention; ``window`` hides pairs of tokens from the eager model."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.qkv = nn.Conv3d(4, WIDTH, (1, 2, 2), (1, 2, 2)), nn.Linear(WIDTH, 3 * WIDTH)
        self.heads_scale = nn.Parameter(torch.rand(HEADS, 1, 1) + 0.5)
        self.bias, self.sink = nn.Parameter(torch.randn(HEADS, 1, LENGTH)), nn.Parameter(torch.randn(2, HEADS, 1, D))
        self.window: torch.Tensor | None = None

    def seen(self, scores: torch.Tensor) -> torch.Tensor:
        return scores if self.window is None else scores.masked_fill(~self.window, -math.inf)

    def sdpa(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        if self.window is not None and mask is not None:
            mask = mask & self.window if mask.dtype == torch.bool else mask.masked_fill(~self.window, -math.inf)
        return F.scaled_dot_product_attention(q, k, v, self.window if mask is None else mask)

    def tokens(self, x: torch.Tensor) -> torch.Tensor:
        return self.embed(x).flatten(2).transpose(1, 2)

    def heads(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return self.qkv(x).unflatten(-1, (3, HEADS, D)).permute(2, 0, 3, 1, 4).unbind(0)

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return self.sdpa(q, k, v)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.attend(*self.heads(self.tokens(x)))


def spelled(attend: Callable[..., torch.Tensor]) -> type[Video]:
    return type(attend.__name__, (Video,), {"attend": attend})


def shared_keys(self: Video, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """All heads share one of keys and values, broadcast in both products."""
    return self.seen(q @ k[:, :1].mT * SCALE).softmax(-1) @ v[:, :1]


def repeated_keys(self: Video, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    k, v = (x[:, :1, None].expand(-1, -1, HEADS, -1, -1).reshape(q.shape) for x in (k, v))
    return self.sdpa(q, k, v)


def temperature_of_heads(self: Video, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return self.seen(q @ k.mT * self.heads_scale).softmax(-1) @ v


def temperature_of_queries(self: Video, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return self.seen(q @ k.mT / (1 + q.mean(-1, keepdim=True).exp())).softmax(-1) @ v


def cosines(self: Video, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    scores = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1)
    return self.seen(scores * torch.clamp(self.heads_scale, max=math.log(100)).exp()).softmax(-1) @ v


def bias_of_keys(self: Video, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """A learned bias on keys: a key mask, where nobody asks for its gradient."""
    return self.sdpa(q, k, v, self.bias)


def slopes(self: Video, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Each head forgets later keys at its own rate."""
    return self.sdpa(q, k, v, (-torch.arange(LENGTH) * torch.tensor([[0.5], [0.1]]))[None, :, None])


def mask_without_batch(self: Video, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return self.sdpa(q, k, v, (torch.arange(LENGTH) % 7 != 3)[None])


def stable(self: Video, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    scores = self.seen(q @ k.mT * SCALE)
    return (scores - scores.amax(-1, keepdim=True)).softmax(-1) @ v


def wide_softmax(self: Video, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return F.softmax(self.seen(q @ k.mT * SCALE), dim=-1, dtype=torch.float32).type_as(v) @ v


def centred(self: Video, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return self.sdpa(q, k - k.mean(2, keepdim=True), v)


def heads_written_apart(self: Video, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    each = zip(q.unbind(1), k.unbind(1), v.unbind(1), strict=True)
    outputs = [F.softmax(self.seen(a @ b.transpose(-1, -2) / math.sqrt(D)), -1) @ c for a, b, c in each]
    return torch.stack(outputs, 1)


def heads_apart(self: Video, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return torch.cat([self.sdpa(*each) for each in zip(q.chunk(2, 1), k.chunk(2, 1), v.chunk(2, 1), strict=True)], 1)


class PatchesMerged(Video):
    """Four neighbours become one token by slices with steps."""

    def tokens(self, x: torch.Tensor) -> torch.Tensor:
        x = x.permute(0, 2, 3, 4, 1)
        x = torch.cat([x[:, :, a::2, b::2] for a in (0, 1) for b in (0, 1)], -1)
        return F.linear(x, self.embed.weight.flatten(1)).flatten(1, 3)


class Unfolded(Video):
    def tokens(self, x: torch.Tensor) -> torch.Tensor:
        x = x.unfold(3, 2, 2).unfold(4, 2, 2).permute(0, 2, 3, 4, 1, 5, 6)
        return F.linear(x.flatten(4), self.embed.weight.flatten(1)).flatten(1, 3)


SPELLED = (
    shared_keys, repeated_keys, temperature_of_heads, temperature_of_queries, cosines, bias_of_keys, slopes,
    mask_without_batch, stable, wide_softmax, centred, heads_written_apart, heads_apart,
)  # fmt: skip
WORKS: dict[str, type[Video]] = {each.__name__: spelled(each) for each in SPELLED}
WORKS |= {each.__name__: each for each in (PatchesMerged, Unfolded)}


def video(batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, 4, 3, 8, 10)


def compiled(model: nn.Module, *inputs: torch.Tensor, grid: Any = None, **options: Any) -> tuple[torch.Tensor, Backend]:
    fps = Backend(Settings.from_options(OPTIONS | options))
    call = torch.compile(copy.deepcopy(model), backend=fps)
    if grid is None:
        return call(*inputs), fps
    with fpscompile.attach(call, grid=grid):
        return call(*inputs), fps


def expect_sparse(model: Video, *inputs: torch.Tensor, tolerance: float = 1e-5) -> torch.Tensor:
    """One site is rewritten, and the result is eager's under the window."""
    actual, fps = compiled(model, *inputs)
    dense = model(*inputs)
    model.window = rectangular_mask(GRID, TILE, WINDOW, (LENGTH, 0), (LENGTH, 0))
    expected = model(*inputs)
    sites = [site for graph in fps.graphs for site in graph.sites]
    assert {(site.kind, site.grid, site.reason) for site in sites} == {("3d", GRID, None)}
    assert actual.dtype == expected.dtype
    assert float((actual - expected).float().norm() / expected.float().norm()) <= tolerance
    assert float((dense - expected).float().norm() / expected.float().norm()) > 1e-2
    return actual


@pytest.mark.parametrize("name", WORKS)
def test_works(name: str) -> None:
    with torch.no_grad():
        expect_sparse(WORKS[name]().eval(), video())


def wide_queries(self: Video, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Normalized in float32, as rotations and norms leave q and k under autocast; v is not."""
    return self.sdpa(q.float() * 2, k.float() * 3, v)


def all_wide(self: Video, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return self.sdpa(q.float(), k.float(), v.float())


def wide_products(self: Video, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return self.seen(q.float() @ k.float().mT * SCALE).softmax(-1) @ v.float()


def wide_and_folded(self: Video, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return self.sdpa(*(x.float().flatten(0, 1) for x in (q, k, v)))


@pytest.mark.parametrize("attend", [wide_queries, all_wide, wide_products, wide_and_folded])
def test_casts_of_autocast_are_kept(attend: Callable[..., torch.Tensor]) -> None:
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        actual = expect_sparse(spelled(attend)().eval(), video(), tolerance=2e-2)
    assert actual.dtype == torch.bfloat16


def test_a_learned_bias_gets_its_gradient() -> None:
    model = spelled(bias_of_keys)()
    actual, fps = compiled(model, video())
    (site,) = fps.graphs[0].sites
    assert (site.reason_code, actual.requires_grad) == ("mask", True)
    assert "gradient" in str(site.reason)


def online(self: Video, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Keys in chunks, with running sums."""
    most, total, out = torch.full_like(q[..., :1], -1e30), torch.zeros_like(q[..., :1]), torch.zeros_like(q)
    for keys, values in zip(k.chunk(3, 2), v.chunk(3, 2), strict=True):
        scores = q @ keys.mT * SCALE
        now = torch.maximum(most, scores.amax(-1, keepdim=True))
        weights, shrink = (scores - now).exp(), (most - now).exp()
        total, out, most = total * shrink + weights.sum(-1, keepdim=True), out * shrink + weights @ values, now
    return out / total


def divided_late(self: Video, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    weights = (q @ k.mT * SCALE).exp()
    return (weights @ v) / weights.sum(-1, keepdim=True)


def by_logarithms(self: Video, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return (q @ k.mT * SCALE).log_softmax(-1).exp() @ v


def talking_heads(self: Video, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return torch.einsum("bhij,hg->bgij", q @ k.mT * SCALE, self.sink[0, :, 0, :HEADS]).softmax(-1) @ v


def shared_queries(self: Video, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return (q[:, :1] @ k.mT * SCALE).softmax(-1) @ v


MISSED: list[tuple[Callable[..., torch.Tensor], str]] = [
    (online, "written out with exp"),
    (divided_late, "written out with exp"),
    (by_logarithms, "written out with log_softmax"),
    (talking_heads, "not a batched matrix product"),
    (shared_queries, "not a batched matrix product"),
]


@pytest.mark.parametrize(("attend", "words"), MISSED)
def test_says_what_it_does_not_read(attend: Callable[..., torch.Tensor], words: str) -> None:
    model, x = spelled(attend)().eval(), video()
    with torch.no_grad():
        actual, fps = compiled(model, x)
        assert torch.equal(actual, model(x))
    assert not fps.graphs[0].sites
    notes = [note for note in fps.graphs[0].notes if words in note.message]
    assert "warning" in {note.level for note in notes}


def values_apart(self: Video, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Keys that all heads share, values that they do not."""
    return (q @ k[:, :1].mT * SCALE).softmax(-1) @ v


def test_shared_keys_and_values_apart() -> None:
    model, x = spelled(values_apart)().eval(), video()
    with torch.no_grad():
        actual, fps = compiled(model, x)
        assert torch.equal(actual, model(x))
    assert [(site.kind, site.reason_code) for site in fps.graphs[0].sites] == [("3d", "layout")]


class OddRows(Video):
    """Queries from even rows, keys from odd ones: not the same tokens."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.linear(x.permute(0, 2, 3, 4, 1), self.embed.weight[:, :, 0, 0, 0])
        even, odd = (x[:, :, start::2].flatten(1, 3) for start in (0, 1))
        return F.scaled_dot_product_attention(self.heads(even)[0], *self.heads(odd)[1:])


class Compressed(Video):
    """Keys and values from every other row and column, by a convolution with a stride."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Conv3d(WIDTH, WIDTH, (1, 2, 2), (1, 2, 2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.embed(x)
        queries, (_, k, v) = self.heads(x.flatten(2).mT)[0], self.heads(self.down(x).flatten(2).mT)
        return F.scaled_dot_product_attention(queries, k, v)


def keys_in_another_order(self: Video, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    order = torch.arange(LENGTH).flip(0)
    return F.scaled_dot_product_attention(q, k[:, :, order], v[:, :, order])


def rolled_one_by_one(self: Video, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return F.scaled_dot_product_attention(*(x.roll(7, 2) for x in (q, k, v)))


OTHER_TOKENS = [
    (Compressed, "kind", "its 12 keys", "are not the tokens of its 60 queries"),
    (spelled(keys_in_another_order), "kind", "its 60 keys", "are not the tokens of its 60 queries"),
    (
        spelled(rolled_one_by_one),
        "segments",
        "roll (roll) moves tokens of one of q, k and v",
        "before they are projected",
    ),
]


@pytest.mark.parametrize(("build", "code", "what", "remedy"), OTHER_TOKENS)
def test_says_which_tokens_are_others(build: type[Video], code: str, what: str, remedy: str) -> None:
    model, x = build().eval(), video()
    with torch.no_grad():
        actual, fps = compiled(model, x)
        assert torch.equal(actual, model(x))
    (site,) = fps.graphs[0].sites
    assert site.reason_code == code
    assert what in str(site.reason)
    assert remedy in str(site.reason)


def test_every_other_row_is_not_the_rows_between() -> None:
    model, x = OddRows().eval(), video()
    with torch.no_grad():
        actual, fps = compiled(model, x)
        assert torch.equal(actual, model(x))
    assert [(site.kind, site.reason_code) for site in fps.graphs[0].sites] == [("cross", "kind")]


def positions(order: torch.Tensor | None = None) -> torch.Tensor:
    """A rotary table [L, columns] of the grid's tokens, or of those in another order."""
    places = torch.cartesian_prod(*(torch.arange(float(size)) for size in GRID))
    angles = torch.cat([places[:, axis : axis + 1] * 100 ** -(torch.arange(4) / 4) for axis in range(3)], 1)
    table = torch.cat([angles.cos(), angles.sin()], 1)[:, :WIDTH]
    return table if order is None else table[order]


class Packed(Video):
    """Tokens and their table arrive as they are."""

    def forward(self, x: torch.Tensor, table: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        q, k, v = self.qkv(x).chunk(3, -1)
        turned = (q * table, k * table, v)
        return self.attend(*(y.unflatten(-1, (HEADS, D)).transpose(1, 2) for y in turned))


TILED = torch.arange(LENGTH).view(3, 2, 2, 5).permute(1, 0, 2, 3).flatten()
TALL = torch.arange(LENGTH).view(GRID).permute(1, 2, 0).flatten()


@pytest.mark.parametrize(
    ("order", "grid", "code"),
    [
        (None, GRID, None),
        (None, (3, 5, 4), "grid-mismatch"),
        (None, (2, 6, 5), "grid-mismatch"),
        (TALL, GRID, "grid-mismatch"),
        (TILED, GRID, "grid-mismatch"),
    ],
)
def test_a_table_of_positions_refutes_a_grid(order: torch.Tensor | None, grid: Any, code: str | None) -> None:
    model, inputs = Packed().eval(), (torch.randn(2, LENGTH, WIDTH), positions(order))
    with torch.no_grad():
        actual, fps = compiled(model, *inputs, grid=grid)
        expected = model(*inputs)
    (site,) = fps.graphs[0].sites
    assert site.reason_code == code
    if code is not None:
        assert torch.equal(actual, expected)
        assert "row-major" in str(site.reason)


class Counted(Video):
    """Packed tokens, with a table of coordinates that is made of three counted axes: height first."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        axes = torch.meshgrid(torch.arange(4.0), torch.arange(5.0), torch.arange(3.0), indexing="ij")
        places = torch.stack([axis.flatten() for axis in axes], -1).sum(-1, keepdim=True)
        return self.attend(*self.heads(x + (places * torch.linspace(0.1, 1, WIDTH)).cos()))


class CountedSizes(Video):
    """The same for any size, with sizes in the call that say which axis is which."""

    def forward(self, x: torch.Tensor, sizes: tuple[int, int, int], frames: int, rows: int, columns: int) -> Any:  # type: ignore[override]
        axes = torch.meshgrid(*(torch.arange(size).float() for size in sizes), indexing="ij")
        places = torch.stack([axis.flatten() for axis in axes], -1).sum(-1, keepdim=True)
        return self.attend(*self.heads(x + (places * torch.linspace(0.1, 1, WIDTH)).cos()))


@pytest.mark.parametrize(
    ("order", "patch", "code"),
    [((0, 1, 2), 1, None), ((0, 1, 2), 2, None), ((1, 2, 0), 1, "token-order"), ((0, 2, 1), 2, "token-order")],
)
@pytest.mark.parametrize("dynamic", [None, True])
def test_sizes_of_the_call_say_which_counted_axis_is_which(
    order: tuple[int, ...], patch: int, code: str | None, dynamic: bool | None
) -> None:
    """``patch``: rows and columns of the call are those ahead of the patches."""
    model, x, (t, h, w) = CountedSizes().eval(), torch.randn(2, LENGTH, WIDTH), GRID
    inputs = (x, tuple(GRID[axis] for axis in order), t, h * patch, w * patch)
    fps = Backend(Settings.from_options(OPTIONS))
    with torch.no_grad():
        expected = model(*inputs)
        actual = torch.compile(model, backend=fps, dynamic=dynamic)(*inputs)
    (site,) = fps.graphs[0].sites
    assert (site.kind, site.reason_code) == ("3d", code)
    assert (site.grid == GRID) == (code is None)
    assert torch.equal(actual, expected) == (code is not None)


def test_counted_axes_that_nothing_names_prove_no_grid() -> None:
    with torch.no_grad():
        model, x = Counted().eval(), torch.randn(2, LENGTH, WIDTH)
        actual, fps = compiled(model, x)
        assert torch.equal(actual, model(x))
    (site,) = fps.graphs[0].sites
    assert site.reason_code == "no-grid"
    assert "fpscompile.attach(model)" in str(site.reason)


@pytest.mark.parametrize(("grid", "code"), [((4, 5, 3), None), (GRID, "grid-mismatch")])
def test_counted_axes_must_agree_with_a_published_grid(grid: Any, code: str | None) -> None:
    with torch.no_grad():
        _, fps = compiled(Counted().eval(), torch.randn(2, LENGTH, WIDTH), grid=grid)
    (site,) = fps.graphs[0].sites
    assert (site.kind, site.reason_code) == ("3d", code)


def scores_by_tensordot(self: Video, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    scores = torch.tensordot(q[0, 0], k[0, 0], ([1], [1])) * SCALE
    return scores.softmax(-1) @ v[0, 0]


def scores_by_sums(self: Video, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return ((q[:, :, :, None] * k[:, :, None]).sum(-1) * SCALE).softmax(-1) @ v


@pytest.mark.parametrize("attend", [scores_by_tensordot, scores_by_sums], ids=lambda attend: attend.__name__)
def test_a_softmax_that_is_not_read_is_named(attend: Callable[..., torch.Tensor]) -> None:
    model, x = spelled(attend)(), torch.randn(1, 4, 3, 8, 10)
    backend = Backend(Settings.from_options(OPTIONS))
    with torch.no_grad():
        assert torch.equal(torch.compile(model, backend=backend)(x), model(x))
    (graph,) = backend.graphs
    assert not graph.sites
    (note,) = [note for note in graph.notes if note.code == "softmax"]
    assert re.search(r"a softmax over \[[\d, ]+\] is", note.message)
    assert "scaled_dot_product_attention" in note.message
