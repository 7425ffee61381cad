"""A broken graph says where and what to do; a model without attention says so."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from models.diffusers_zoo import DIFFUSERS_ZOO
from models.zoo_entry import output
from torch import nn

from fpscompile import Backend, Settings

OPTIONS = {"quant": "none", "density": 1.0, "inner": "eager", "lowering": "boxes"}


def run(name: str, **flags: bool) -> Backend:
    entry, fps = DIFFUSERS_ZOO[name], Backend(Settings.from_options(OPTIONS))
    with torch.no_grad(), torch._dynamo.config.patch(**flags):
        output(torch.compile(entry.build(), backend=fps), **entry.inputs())
    return fps


def notes(fps: Backend, code: str) -> list[Any]:
    return [note for graph in fps.graphs for note in graph.notes if note.code == code]


def test_the_call_that_broke_the_graph_is_named_with_the_flag_that_heals_it() -> None:
    fps = run("mochi")
    assert not any(site.kind == "3d" for graph in fps.graphs for site in graph.sites)
    breaks = notes(fps, "graph-break")
    assert breaks
    assert all(note.level == "warning" for note in breaks)
    assert "torch.nonzero" in breaks[0].message
    assert "capture_dynamic_output_shape_ops" in breaks[0].message
    torch._dynamo.reset()
    healed = run("mochi", capture_dynamic_output_shape_ops=True)
    assert sum(site.rewritten for graph in healed.graphs for site in graph.sites) == 2
    assert not notes(healed, "graph-break")


def test_a_branch_on_data_is_named() -> None:
    (note,) = notes(run("hunyuanvideo-1.5"), "graph-break")
    assert "if is_t2v:" in note.message
    assert "attach" in note.message


def test_a_model_without_attention_warns(caplog: pytest.LogCaptureFixture) -> None:
    fps = Backend(Settings.from_options(OPTIONS))
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(8)))
    with caplog.at_level(logging.WARNING, "fpscompile"):
        torch.compile(model, backend=fps)(torch.randn(2, 4))
    assert [note.code for note in fps.graphs[0].notes] == ["no-attention"]
    assert "no attention call" in caplog.text
