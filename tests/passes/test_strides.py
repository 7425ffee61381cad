"""What attention hands on has the strides of the author's own, where they are read."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

from fpscompile import Backend, Settings

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


THEN = {
    "handed out": lambda out: out,
    "handed out transposed": lambda out: out.transpose(1, 2),
    "viewed": lambda out: out.view(-1, TOKENS, DIM),
    "flattened": lambda out: out.transpose(1, 2).flatten(2),
}


@pytest.mark.parametrize("then", THEN)
@pytest.mark.parametrize("attend", [by_hand, as_einsum, scaled_dot_product_attention])
@torch.no_grad()
def test_strides_are_the_author_s(attend: Callable[..., Tensor], then: str) -> None:
    model, video = Attention(attend, THEN[then]), torch.randn(2, 4, *GRID)
    options = {"quant": "none", "inner": "eager", "density": 1.0, "tile": (2, 2, 2), "lowering": "boxes"}
    fps = Backend(Settings.from_options(options))
    torch._dynamo.reset()
    try:
        expected = model(video)
    except RuntimeError:
        pytest.skip("eager cannot view its own result")
    found = torch.compile(model, backend=fps, fullgraph=True)(video)
    (site,) = fps.graphs[0].sites
    assert site.rewritten
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert found.stride() == expected.stride()
