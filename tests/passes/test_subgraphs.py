"""Sites inside higher-order ops: activation checkpoints are looked into; what cannot be is declined with a reason."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from models.oracle import window_mask
from models.toys import DENSE, HEADS, LENGTH, SPARSE, D, compiled, gradient, latent, tokens_of
from models.zoo import ZOO, output, wan
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from fpscompile import Backend, Settings

# Dynamo takes seconds to trace with symbolic shapes.
DYNAMIC = [None, pytest.param(True, marks=pytest.mark.slow)]


class Checkpointed(nn.Module):
    """Blocks under activation checkpointing, with the timestep inside, and nested once."""

    def __init__(self, nested: bool = False, use_reentrant: bool = False) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(HEADS * D, HEADS * D) for _ in range(2))
        self.nested, self.use_reentrant = nested, use_reentrant
        self.window: torch.Tensor | None = None

    def attend(self, x: torch.Tensor) -> torch.Tensor:
        q = x.unflatten(-1, (HEADS, D)).transpose(1, 2)
        return F.scaled_dot_product_attention(q, q * 2, q + 1, self.window).transpose(1, 2).flatten(2)

    def block(self, layer: nn.Module, x: torch.Tensor, shift: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = torch.tanh(layer(x) + shift)
        attended = checkpoint(self.attend, x, use_reentrant=False) if self.nested else self.attend(x)
        return x + attended, shift * 0.5

    def forward(self, video: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        x, shift = tokens_of(video), timestep[:, None, None] / 1000
        for layer in self.layers:
            x, shift = checkpoint(self.block, layer, x, shift, use_reentrant=self.use_reentrant)
        return x


@pytest.mark.parametrize("dynamic", DYNAMIC)
@pytest.mark.parametrize("nested", [False, True])
def test_checkpoints_are_looked_into(nested: bool, dynamic: bool | None) -> None:
    model, video = Checkpointed(nested), latent().requires_grad_()
    outcome = compiled(model, video, torch.tensor([900.0, 100.0]), dynamic=dynamic, inner="aot_eager")
    assert [(site.kind, site.grid, site.rewritten) for site in outcome.sites] == [("3d", (3, 4, 5), True)] * 2
    assert outcome.graphs == 1
    assert outcome.error <= 1e-5
    inputs = [video, *model.parameters()]
    actual, expected = gradient(outcome.actual, inputs), gradient(outcome.expected, inputs)
    assert float((actual - expected).norm() / expected.norm()) <= 1e-5


@pytest.mark.parametrize("dynamic", [None, True])
def test_phase_and_grid_reach_the_body(dynamic: bool | None) -> None:
    """Two samples in two phases: each gets its own window, in the first forward and in the recomputed one."""
    windows = [(2, 2, 2), (1, 1, 1)]
    schedule = [{"start": 0.0, "end": 0.5, "window": windows[0]}, {"start": 0.5, "end": 1.0, "window": windows[1]}]
    model, video = Checkpointed(nested=True), latent().requires_grad_()
    fps = Backend(Settings.from_options(DENSE | {"density": None, "schedule": schedule, "inner": "aot_eager"}))
    timestep = torch.tensor([900.0, 100.0])
    actual = torch.compile(model, backend=fps, dynamic=dynamic, fullgraph=True)(video, timestep)
    assert fps.graphs[0].progress_source == "input 'timestep'"
    ours = gradient(actual, [video])
    masks = [window_mask((3, 4, 5), (2, 2, 2), window, LENGTH, 0) for window in windows]
    model.window = torch.stack(masks)[:, None]
    expected = model(video, timestep)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ours, gradient(expected, [video]), rtol=1e-3, atol=1e-4)


def test_captured_bodies_stay_as_they_were() -> None:
    """Dynamo keeps the graphs that it captured; only copies are changed."""
    bodies: list[list[str]] = []
    kept: list[torch.fx.GraphModule] = []

    def inner(gm: torch.fx.GraphModule, inputs: Any) -> Any:
        kept.append(gm)
        return gm

    def names(module: nn.Module) -> list[str]:
        return [node.name for node in module.graph.nodes]  # type: ignore[union-attr]

    def spy(gm: torch.fx.GraphModule, inputs: Any) -> Any:
        captured = dict(gm.named_children())
        before = {name: names(body) for name, body in captured.items()}
        result = Backend(Settings.from_options(SPARSE | {"inner": inner}))(gm, inputs)
        assert {name: names(body) for name, body in captured.items()} == before
        bodies.append(list(before))
        return result

    torch.compile(Checkpointed(), backend=spy)(latent(), torch.ones(2))
    assert bodies == [["wrap_body_0", "wrap_body_1"]]
    assert any("fps_wrap_body_0" in name for name, _ in kept[0].named_children())


def test_names_in_two_bodies_do_not_meet() -> None:
    """Tokens shuffled alike in two bodies look alike by name; they are not the same tokens."""

    def model(video: torch.Tensor) -> torch.Tensor:
        x = tokens_of(video)
        first = checkpoint(lambda y: y.roll(3, 1), x, use_reentrant=False)
        second = checkpoint(lambda y: y.roll(5, 1), x, use_reentrant=False)
        q, k = (y.unflatten(-1, (HEADS, D)).transpose(1, 2) for y in (first, second))
        return F.scaled_dot_product_attention(q, k, k)

    outcome = compiled(model, latent())
    assert [(site.kind, site.reason_code) for site in outcome.sites] == [("cross", "kind")]
    assert outcome.untouched


class Straight(torch.autograd.Function):
    """Attention inside a function with a gradient of its own."""

    @staticmethod
    def forward(ctx: Any, q: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return F.scaled_dot_product_attention(q, q, q)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return grad


def test_other_higher_order_ops_are_declined() -> None:
    def model(video: torch.Tensor) -> torch.Tensor:
        return Straight.apply(tokens_of(video).unflatten(-1, (HEADS, D)).transpose(1, 2))

    video = latent().requires_grad_()
    outcome = compiled(model, video)
    assert [site.reason_code for site in outcome.sites] == ["subgraph"]
    assert outcome.untouched
    assert torch.equal(gradient(outcome.actual, [video]), gradient(outcome.expected, [video]))


@pytest.mark.parametrize("name", ["wan", pytest.param("hunyuan", marks=pytest.mark.slow)])
def test_diffusers_gradient_checkpointing(name: str) -> None:
    entry = ZOO[name]
    layers, model = (1, wan(layers=1)) if name == "wan" else (entry.video_sites, entry.build())
    inputs = entry.inputs()
    model.train()
    model.enable_gradient_checkpointing()
    expected = output(model, **inputs)
    fps = Backend(Settings.from_options(DENSE | {"inner": "aot_eager", "tile": (2, 2, 4)}))
    actual = output(torch.compile(model, backend=fps), **inputs)
    sites = [site for graph in fps.graphs for site in graph.sites]
    assert sum(site.rewritten for site in sites) == layers
    ours, eagers = (
        gradient(result, [p for p in model.parameters() if p.numel() > 0][:4]) for result in (actual, expected)
    )
    assert float((ours - eagers).norm() / eagers.norm()) <= 1e-4
