"""What attention hands on has the strides of the author's own, where they are read."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import fx, nn
from torch.nn.functional import scaled_dot_product_attention

from fpscompile import Backend, Settings
from fpscompile.passes.base import target_name

HEADS, DIM, GRID, TOKENS = 2, 8, (2, 4, 4), 32

Tensor = torch.Tensor


class Attention(nn.Module):
    """Heads of a video's tokens through ``attend``, and what ``then`` makes of [B, heads, tokens, dim]."""

    def __init__(self, attend: Callable[..., Tensor], then: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.attend, self.then = attend, then
        self.embed = nn.Conv3d(4, HEADS * DIM, 1)
        self.project = nn.Linear(HEADS * DIM, HEADS * DIM)

    def forward(self, video: Tensor) -> Tensor:
        x = self.project(self.embed(video).flatten(2).transpose(1, 2)).unflatten(2, (HEADS, DIM)).transpose(1, 2)
        return self.then(self.attend(x, 0.5 * x, x))


def by_hand(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Contiguous, where a kernel gives the tokens of all heads side by side."""
    return torch.softmax(q @ k.transpose(-1, -2), -1) @ v


def as_einsum(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.einsum("bhqk,bhkd->bhqd", torch.einsum("bhqd,bhkd->bhqk", q, k).softmax(-1), v)


def copied_and_written(out: Tensor) -> Tensor:
    """A copy for the author; what takes its place may lie so that it is a view."""
    flat = out.transpose(1, 2).flatten(2)
    flat.mul_(3.0)
    return flat.sum() + out.sum((0, 1))


def viewed_and_written(out: Tensor) -> Tensor:
    """The other way round."""
    out.flatten(0, 1).mul_(3.0)
    return out.transpose(1, 2).flatten(2)


THEN = {
    "handed out": lambda out: out,
    "handed out transposed": lambda out: out.transpose(1, 2),
    "handed out scaled": lambda out: out * 2.0,
    "viewed": lambda out: out.view(-1, TOKENS, DIM),
    "viewed when scaled": lambda out: (out * 2.0).view(-1, TOKENS, DIM),
    "viewed when cast": lambda out: out.double().float().view(-1, TOKENS, DIM),
    "viewed when moved": lambda out: (
        out.swapdims(1, 2).clone().transpose(1, 2).reshape(out.shape).view(-1, TOKENS, DIM)
    ),
    "flattened": lambda out: out.transpose(1, 2).flatten(2),
    "a copy is written": copied_and_written,
    "a view is written": viewed_and_written,
    "made contiguous and written": lambda out: out.contiguous().mul_(3.0).sum() + out.sum((0, 1)),
}


@pytest.mark.parametrize("then", THEN)
@pytest.mark.parametrize("attend", [by_hand, as_einsum, scaled_dot_product_attention])
@torch.no_grad()
def test_strides_are_the_author_s(attend: Callable[..., Tensor], then: str) -> None:
    model, video = Attention(attend, THEN[then]), torch.randn(2, 4, *GRID)
    try:
        expected = model(video)
    except RuntimeError:
        pytest.skip("eager cannot view its own result")
    found, _ = compiled(model, video)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert found.stride() == expected.stride()


def compiled(model: nn.Module, video: Tensor) -> tuple[Tensor, fx.GraphModule]:
    graphs: list[fx.GraphModule] = []

    def inner(gm: fx.GraphModule, inputs: list[Tensor]) -> Callable[..., object]:
        graphs.append(gm)
        return gm.forward

    options = {"quant": "none", "inner": inner, "density": 1.0, "tile": (2, 2, 2), "lowering": "boxes"}
    fps = Backend(Settings.from_options(options))
    torch._dynamo.reset()
    found = torch.compile(model, backend=fps, fullgraph=True)(video)
    (site,) = fps.graphs[0].sites
    assert site.rewritten
    return found, graphs[0]


@pytest.mark.parametrize("attend", [by_hand, as_einsum, scaled_dot_product_attention])
@torch.no_grad()
def test_nothing_is_copied_where_strides_do_not_show(attend: Callable[..., Tensor]) -> None:
    model = Attention(attend, lambda out: out.transpose(1, 2).flatten(2) @ torch.eye(HEADS * DIM))
    _, graph = compiled(model, torch.randn(2, 4, *GRID))
    assert not [node for node in graph.graph.nodes if target_name(node) in ("contiguous", "clone")]


WRITTEN = {
    "a product": lambda out: out.mul_(2.0).sum((0, 1)),
    "a residual": lambda out: out.transpose(1, 2).reshape(2, TOKENS, -1).add_(1.0),
    "an activation": lambda out: torch.nn.functional.relu(out, inplace=True).transpose(1, 2).flatten(2),
}


@pytest.mark.parametrize("then", WRITTEN)
@pytest.mark.parametrize("attend", [by_hand, as_einsum])
def test_what_is_trained_may_be_written(attend: Callable[..., Tensor], then: str) -> None:
    """Products of matrices do not keep their result for the backward; attention does."""
    model, video = Attention(attend, WRITTEN[then]), torch.randn(2, 4, *GRID)
    expected = torch.autograd.grad(model(video).square().sum(), list(model.parameters()))
    found = torch.autograd.grad(compiled(model, video)[0].square().sum(), list(model.parameters()))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
