"""A broken graph says where and what to do; a model without attention says so."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from models.diffusers_zoo import DIFFUSERS_ZOO
from models.zoo_entry import output
from torch import nn
from torch.nn import functional as F

import fpscompile
from fpscompile import Backend, Settings

OPTIONS = {"quant": "none", "density": 1.0, "inner": "eager", "lowering": "boxes"}


def run(name: str, **flags: bool) -> Backend:
    entry, fps = DIFFUSERS_ZOO[name], Backend(Settings.from_options(OPTIONS))
    with torch.no_grad(), torch._dynamo.config.patch(**flags):
        output(torch.compile(entry.build(), backend=fps), **entry.inputs())
    return fps


def notes(fps: Backend, code: str) -> list[Any]:
    return [note for graph in fps.graphs for note in graph.notes if note.code == code]


class Broken(nn.Module):
    """Attention over a video and text, behind a call whose result depends on data."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.embed = nn.Conv3d(4, 16, (1, 2, 2), (1, 2, 2))

    def forward(self, video: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        x = self.embed(video).flatten(2).transpose(1, 2)
        if self.how == "nonzero":
            text = text[:, torch.nonzero(text[0, :, 0] > 0).flatten()]
        elif torch.all(text == 0):
            text = text + 1
        q = torch.cat([x, text], dim=1).unflatten(-1, (2, 8)).transpose(1, 2)
        return F.scaled_dot_product_attention(q, q * 2, q + 1)[:, :, : x.shape[1]]


def broken(how: str, **flags: bool) -> Backend:
    fps, inputs = Backend(Settings.from_options(OPTIONS)), (torch.randn(1, 4, 3, 8, 10), torch.randn(1, 7, 16))
    model = Broken(how)
    with torch.no_grad(), torch._dynamo.config.patch(**flags):
        torch.testing.assert_close(torch.compile(model, backend=fps)(*inputs), model(*inputs))
    return fps


def test_the_call_that_broke_the_graph_is_named_with_the_flag_that_heals_it() -> None:
    fps = broken("nonzero")
    assert not any(site.rewritten for graph in fps.graphs for site in graph.sites)
    (note,) = notes(fps, "graph-break")
    assert note.level == "warning"
    assert "torch.nonzero(text[0, :, 0] > 0)" in note.message
    assert "capture_dynamic_output_shape_ops" in note.message
    torch._dynamo.reset()
    healed = broken("nonzero", capture_dynamic_output_shape_ops=True)
    assert [site.rewritten for graph in healed.graphs for site in graph.sites] == [True]
    assert not notes(healed, "graph-break")


def test_a_branch_on_data_is_named() -> None:
    (note,) = notes(broken("branch"), "graph-break")
    assert "elif torch.all(text == 0):" in note.message
    assert "attach" in note.message


@pytest.mark.slow
@pytest.mark.parametrize(("name", "words"), [("mochi", "torch.nonzero"), ("hunyuanvideo-1.5", "if is_t2v:")])
def test_models_of_diffusers_that_break(name: str, words: str) -> None:
    assert any(words in note.message for note in notes(run(name), "graph-break"))


def test_a_model_without_attention_warns(caplog: pytest.LogCaptureFixture) -> None:
    fps = Backend(Settings.from_options(OPTIONS))
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(8)))
    with caplog.at_level(logging.WARNING, "fpscompile"):
        torch.compile(model, backend=fps)(torch.randn(2, 4))
    assert [note.code for note in fps.graphs[0].notes] == ["no-attention"]
    assert "no attention call" in caplog.text


class Cut(nn.Module):
    """Tokens reach attention from behind a graph break."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv3d(4, 16, (1, 2, 2), (1, 2, 2))
        self.to_q = nn.Linear(16, 16)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        x = self.embed(hidden_states).flatten(2).transpose(1, 2)
        torch._dynamo.graph_break()
        q = self.to_q(x).unflatten(-1, (2, 8)).transpose(1, 2)
        return F.scaled_dot_product_attention(q, q * 2, q + 1)


@pytest.mark.parametrize("grid", [(3, 4, 5), lambda args, kwargs: (3, 4, 5)], ids=["told", "read"])
@pytest.mark.parametrize("first", ["attach", "compile"])
def test_an_attachment_older_than_the_compile_says_what_to_do_behind_a_break(first: str, grid: Any) -> None:
    """Its hooks are traced, so what they would read per call is not told; a grid for all calls is."""
    fps, model = Backend(Settings.from_options(OPTIONS)), Cut()
    with torch.no_grad():
        if first == "attach":
            attachment = fpscompile.attach(model, grid=grid)
            torch.compile(model, backend=fps)(torch.randn(1, 4, 3, 8, 10))
        else:
            compiled = torch.compile(model, backend=fps)
            attachment = fpscompile.attach(compiled, grid=grid)
            compiled(torch.randn(1, 4, 3, 8, 10))
    attachment.detach()
    (site,) = (site for graph in fps.graphs for site in graph.sites)
    assert site.rewritten == (first == "compile" or not callable(grid))
    assert site.rewritten or "compile first, then call fpscompile.attach on the compiled model" in (site.reason or "")
