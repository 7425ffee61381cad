"""Attention whose weights no softmax made is left as it is and named; what only resembles it is not."""

from __future__ import annotations

import logging
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from models.toys import WeighedVideo
from torch import nn

from fpscompile import Backend, Settings

Step = Callable[[torch.Tensor], torch.Tensor]


class Experts(nn.Module):
    """Two products of a batch of tokens with weights of the model, and a function between them."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = (nn.Parameter(torch.randn(3, 8, 8)) for _ in range(2))
        self.register_buffer("table", torch.randn(3, 8, 8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = F.gelu(torch.bmm(x, self.up.transpose(1, 2)))
        return torch.bmm(torch.bmm(hidden, self.down).sigmoid(), self.table)


class Linear(nn.Module):
    """Linear attention: keys weigh values before the queries are there."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k = F.relu(x), F.relu(x + 1)
        return q @ (k.transpose(-2, -1) @ x) / (q @ k.sum(-2, keepdim=True).transpose(-2, -1) + 1e-6)


WEIGHTS: dict[str, tuple[str, Step]] = {
    "sigmoid": ("sigmoid", lambda s: torch.sigmoid(s - 4.0)),
    "sigmoid in place": ("sigmoid", lambda s: s.sigmoid_()),
    "squared relu": ("relu", lambda s: F.relu(s).square() / s.shape[-1]),
    "relu to a power": ("relu", lambda s: torch.relu(s) ** 2),
    "gumbel softmax": ("gumbel_softmax", lambda s: F.gumbel_softmax(s.detach(), tau=1.0, dim=-1)),
    "masked silu": ("silu", lambda s: F.silu(s.masked_fill(s < 0, 0.0)).to(s.dtype)),
    "unit rows": ("normalize", lambda s: F.normalize(s, dim=-1)),
}


def notes_of(model: nn.Module, *inputs: torch.Tensor) -> list[str]:
    backend = Backend(Settings(inner="eager"))
    torch._dynamo.reset()
    torch.manual_seed(3)
    expected = model(*inputs)
    compiled = torch.compile(model, backend=backend)
    torch.manual_seed(3)
    with torch.no_grad():
        assert torch.equal(compiled(*inputs), expected.detach())
    (graph,) = backend.graphs
    assert not graph.sites
    return [f"{note.code}: {note.message}" for note in graph.notes]


@pytest.mark.parametrize("name", WEIGHTS)
def test_attention_without_a_softmax_is_named(name: str, caplog: pytest.LogCaptureFixture) -> None:
    function, weigh = WEIGHTS[name]
    with caplog.at_level(logging.WARNING):
        notes = notes_of(WeighedVideo(weigh).eval(), torch.randn(1, 4, 3, 8, 10))
    found = [note for note in notes if note.startswith("near-miss")]
    assert len(found) == 1, notes
    assert f"{function} makes its weights, and only a softmax over the keys is rewritten" in found[0]
    assert any("no attention is understood" in record.getMessage() for record in caplog.records)


@pytest.mark.parametrize("model", [Experts(), Linear()], ids=lambda model: type(model).__name__)
def test_products_with_weights_and_linear_attention_are_not_mistaken_for_it(model: nn.Module) -> None:
    assert not [note for note in notes_of(model, torch.randn(3, 8, 8)) if "near-miss" in note]
