"""Where norm and rotary embedding must not become one op: something on the way is written, shared or cast."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from models.rotary import Graphs
from torch import nn
from torch.nn.functional import leaky_relu, rms_norm, scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint

from fpscompile.passes import fuse_rotary

HEADS, DIM, GRID = 2, 24, (2, 4, 4)
N, TOKENS, EPS = HEADS * DIM, 32, 1e-6
HALF = DIM // 2

Tensor = torch.Tensor


class Rotation(nn.Module):
    """Attention of Wan's make whose queries ``rotate`` makes of the projected ones, a weight, cos and sin."""

    def __init__(self, rotate: Callable[..., Tensor], dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.rotate = rotate
        self.embed = nn.Conv3d(4, N, 1, dtype=dtype)
        self.to_q, self.to_k, self.to_v = (nn.Linear(N, N, dtype=dtype) for _ in range(3))
        self.weight = nn.Parameter(torch.randn(N, dtype=dtype))

    def forward(self, video: Tensor, cos: Tensor, sin: Tensor, *more: Tensor) -> tuple[Tensor, Tensor]:
        x = self.embed(video).flatten(2).transpose(1, 2)
        q = self.rotate(self.to_q(x), self.weight, cos[..., 0::2], sin[..., 1::2], *more)
        k, v = (layer(x).unflatten(2, (HEADS, -1)).transpose(1, 2) for layer in (self.to_k, self.to_v))
        return q, scaled_dot_product_attention(q.transpose(1, 2), k, v).transpose(1, 2).flatten(2)


def inputs(dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    cos, sin = torch.randn(2, 1, TOKENS, 1, DIM)
    return torch.randn(2, 4, *GRID, dtype=dtype), cos, sin


def checked(monkeypatch: pytest.MonkeyPatch, model: nn.Module, make: Callable[[], tuple[Tensor, ...]]) -> Graphs:
    """Compiled as on a GPU, on fresh copies of the same inputs: what eager gives, and the attention rewritten."""
    monkeypatch.setattr(fuse_rotary, "_on_gpu", lambda node: True)
    torch._dynamo.reset()
    graphs = Graphs()
    torch.manual_seed(0)
    expected = model(*make())
    torch.manual_seed(0)
    found = torch.compile(model, backend=graphs.backend)(*make())
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    (site,) = [site for record in graphs.backend.graphs for site in record.sites]
    assert site.rewritten
    return graphs


def normed(y: Tensor, weight: Tensor) -> Tensor:
    return rms_norm(y, (N,), weight, EPS)


def pairs(x: Tensor) -> tuple[Tensor, ...]:
    return x.unflatten(2, (HEADS, -1)).unflatten(-1, (-1, 2)).unbind(-1)


def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    y1, y2 = pairs(x)
    return torch.stack((y1 * cos - y2 * sin, y1 * sin + y2 * cos), -1).flatten(-2)


def plain(y: Tensor, weight: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return turned(normed(y, weight), cos, sin)


def strided_weight(y: Tensor, weight: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return turned(normed(y, weight.repeat_interleave(2)[::2]), cos, sin)


def expanded_weight(y: Tensor, weight: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return turned(normed(y, weight[:1].expand(N)), cos, sin)


def by_name(y: Tensor, weight: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    x = torch.reshape(input=normed(y, weight), shape=(2, TOKENS, HEADS, HALF, 2))
    y1, y2 = torch.unbind(input=x, dim=-1)
    out = torch.stack((y1 * cos - y2 * sin, y1 * sin + y2 * cos), -1).flatten(-2)
    return out + 0.0 * torch.flatten(input=x, start_dim=-2)


@pytest.mark.parametrize("rotate", [plain, strided_weight, expanded_weight])
@torch.no_grad()
def test_what_becomes_the_op(monkeypatch: pytest.MonkeyPatch, rotate: Callable[..., Tensor]) -> None:
    assert checked(monkeypatch, Rotation(rotate), inputs).count("fps::norm_rotate") == 1


def side_written(y: Tensor, weight: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    y1, y2 = pairs(normed(y, weight))
    a = y1 * cos - y2 * sin
    a.mul_(2.0)
    return torch.stack((a, y1 * sin + y2 * cos), -1).flatten(-2)


def product_written(y: Tensor, weight: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    y1, y2 = pairs(normed(y, weight))
    product = y1 * cos
    product.clamp_(min=0.0)
    return torch.stack((product - y2 * sin, y1 * sin + y2 * cos), -1).flatten(-2)


def stack_written(y: Tensor, weight: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    y1, y2 = pairs(normed(y, weight))
    both = torch.stack((y1 * cos - y2 * sin, y1 * sin + y2 * cos), -1)
    both[:, :1].zero_()
    return both.flatten(-2)


def stack_written_later(y: Tensor, weight: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    y1, y2 = pairs(normed(y, weight))
    both = torch.stack((y1 * cos - y2 * sin, y1 * sin + y2 * cos), -1)
    out = both.flatten(-2)
    both[:, :1].zero_()
    return out


def written_as_wan_does(y: Tensor, weight: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    x = normed(y, weight).unflatten(2, (HEADS, -1))
    y1, y2 = x.unflatten(-1, (-1, 2)).unbind(-1)
    out = torch.empty_like(x)
    a = y1 * cos - y2 * sin
    a.mul_(2.0)
    out[..., 0::2] = a
    out[..., 1::2] = y1 * sin + y2 * cos
    return out


def bits_of_another_dtype(y: Tensor, weight: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return turned(normed(y, weight).view(torch.int32), cos, sin)


def one_side_cast(y: Tensor, weight: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    y1, y2 = pairs(normed(y, weight))
    return torch.stack(((y1 * cos - y2 * sin).to(torch.bfloat16), y1 * sin + y2 * cos), -1).flatten(-2)


def before(write: Callable[[Tensor], object]) -> Callable[..., Tensor]:
    """The projected queries are written when they are normalized and not yet rotated."""

    def rotate(y: Tensor, weight: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = normed(y, weight)
        write(y)
        return turned(x, cos, sin)

    return rotate


WRITES: dict[str, Callable[[Tensor], object]] = {
    "inplace by position": lambda y: leaky_relu(y, 0.1, True),
    "a module's inplace": lambda y: nn.ELU(inplace=True)(y),
    "through einsum": lambda y: torch.einsum("btn->bnt", y).add_(3.0),
    "through as_tensor": lambda y: torch.as_tensor(y).add_(3.0),
    "through an aten view": lambda y: torch.ops.aten.slice.Tensor(y, 1, 0, 4).add_(3.0),
    "through sum_to_size": lambda y: y.sum_to_size(*y.shape).add_(3.0),
    "through a later result": lambda y: torch.broadcast_tensors(torch.zeros(2, TOKENS, N), y)[1].add_(3.0),
    "in a checkpoint": lambda y: checkpoint(lambda z: z.add_(3.0).sum(), y, use_reentrant=False),
}


@pytest.mark.parametrize(
    "rotate",
    [
        side_written, product_written, stack_written, stack_written_later, written_as_wan_does, bits_of_another_dtype,
        one_side_cast, *(pytest.param(before(write), id=name) for name, write in WRITES.items()),
    ],
)  # fmt: skip
@torch.no_grad()
def test_what_stays(monkeypatch: pytest.MonkeyPatch, rotate: Callable[..., Tensor]) -> None:
    assert checked(monkeypatch, Rotation(rotate), inputs).count("fps::norm_rotate") == 0


@torch.no_grad()
def test_operands_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """The norm has a second reader there; what matters is that neither is an error."""
    checked(monkeypatch, Rotation(by_name), inputs)


def of_a_given_one(y: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, given: Tensor, alias: Tensor) -> Tensor:
    x = normed(given, weight)
    alias.add_(3.0)
    return turned(x, cos, sin) + 0.0 * plain(y, weight, cos, sin)


@torch.no_grad()
def test_inputs_that_share_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    def make() -> tuple[Tensor, ...]:
        given = torch.randn(2, TOKENS, N)
        return *inputs(), given, given.view(-1)

    graphs = checked(monkeypatch, Rotation(of_a_given_one), make)
    assert graphs.count("fps::norm_rotate") == 1  # the other one


def added_into(y: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, buffer: Tensor) -> Tensor:
    y1, y2 = pairs(normed(y, weight))
    a, b = y1 * cos - y2 * sin, y1 * sin + y2 * cos
    out = torch.stack((a.to(torch.add(a, 1.0, out=buffer)), b), -1).flatten(-2)
    return out + buffer.sum()


@torch.no_grad()
def test_what_else_an_operand_writes_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    checked(monkeypatch, Rotation(added_into), lambda: (*inputs(), torch.zeros(2, TOKENS, HEADS, HALF)))


def batched(y: Tensor, weight: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return plain(y, weight, cos, sin) + 0.0 * torch.vmap(lambda each: plain(each[None], weight, cos, sin)[0])(y)


@torch.no_grad()
def test_under_vmap_it_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    assert checked(monkeypatch, Rotation(batched), inputs).count("fps::norm_rotate") == 1  # the other one


def transposed_after(y: Tensor, weight: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Tables of one value per head, which look like one per token from then on: there are as many heads as tokens."""
    c, s = (table[:, :, 0, :1].reshape(1, 1, TOKENS, 1).clone() for table in (cos, sin))
    wide = torch.cat((y, y[..., : 2 * TOKENS - N]), -1)
    y1, y2 = rms_norm(wide, (2 * TOKENS,), None, EPS).unflatten(2, (TOKENS, -1)).unflatten(-1, (-1, 2)).unbind(-1)
    out = torch.stack((y1 * c - y2 * s, y1 * s + y2 * c), -1).flatten(-2)
    c.transpose_(1, 2)
    s.transpose_(1, 2)
    return plain(y, weight, cos, sin) + out.mean()


@torch.no_grad()
def test_tables_that_change_their_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    assert checked(monkeypatch, Rotation(transposed_after), inputs).count("fps::norm_rotate") == 1  # the other one
