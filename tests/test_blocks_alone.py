"""Blocks that are compiled on their own and show no grid: all they know comes from ``attach``."""

from __future__ import annotations

import copy
import logging
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import fpscompile
from fpscompile import runtime
from fpscompile.errors import StrictError

WIDTH, HEADS = 32, 2
WINDOW = {"window": (1, 1, 1), "tile": (2, 4, 4), "inner": "aot_eager", "quant": "none"}
HALVES = [{"start": 0.0, "end": 0.5, "density": 1.0}, {"start": 0.5, "end": 1.0, "window": (1, 1, 1)}]
PHASES = {"schedule": HALVES, "tile": (2, 4, 4), "inner": "aot_eager", "quant": "none"}


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (part.transpose(1, 2) for part in self.qkv(x).unflatten(-1, (3, HEADS, -1)).unbind(2))
        attention = nn.functional.scaled_dot_product_attention(4 * q, k, v)
        return x + self.out(attention.transpose(1, 2).flatten(2))


class Net(nn.Module):
    """A video transformer with a patch size of 1, whose blocks see a sequence of tokens and nothing else."""

    patch_size = (1, 1, 1)
    in_channels = 4

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv3d(4, WIDTH, 1)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.head = nn.Linear(WIDTH, 4)
        self.reentrant: bool | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        embedded = self.embed(x)
        tokens = embedded.flatten(2).transpose(1, 2)
        for block in self.blocks:
            if self.reentrant is None:
                tokens = block(tokens)
            else:
                tokens = checkpoint(block, tokens, use_reentrant=self.reentrant)
        out: torch.Tensor = self.head(tokens).transpose(1, 2).unflatten(2, embedded.shape[2:])
        return out


class Named(nn.Module):
    """A block whose attention has a name inside of it."""

    def __init__(self, block: Block) -> None:
        super().__init__()
        self.attn = block

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.attn(x)
        return out


def net() -> Net:
    torch.manual_seed(0)
    return Net()


def video(frames: int, height: int = 8, width: int = 10) -> torch.Tensor:
    return torch.randn(1, 4, frames, height, width)


def off(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual - expected).norm() / expected.norm())


def blocks_compiled(options: dict[str, Any], **how: Any) -> Net:
    model = net()
    for block in model.blocks:
        block.compile(backend="fps", options=options, **how)
    return model


class Elsewhere:
    """Another thread that compiles something of its own for as long as it is told to."""

    def __init__(self) -> None:
        self.begun, self.go = threading.Event(), threading.Event()
        compiled = torch.compile(nn.Linear(4, 4), backend=self._wait)
        self.thread = threading.Thread(target=compiled, args=(torch.zeros(1, 4),))

    def _wait(self, gm: torch.fx.GraphModule, inputs: Any) -> Callable[..., Any]:
        self.begun.set()
        assert self.go.wait(60)
        return gm.forward

    def begin(self) -> None:
        self.thread.start()
        assert self.begun.wait(60)

    def end(self) -> None:
        self.go.set()
        self.thread.join()


@torch.no_grad()
def test_a_call_is_open_while_another_thread_compiles() -> None:
    model, x = blocks_compiled(PHASES), video(5)
    dense = net()(x)
    with fpscompile.attach(model) as attachment:
        attachment.step(3, 4)
        before = model(x)
        assert off(before, dense) > 1e-2
        elsewhere = Elsewhere()
        elsewhere.begin()
        try:
            during = model(x)
        finally:
            elsewhere.end()
    assert torch.equal(during, before)


@torch.no_grad()
def test_a_call_is_closed_while_another_thread_compiles() -> None:
    model, x, elsewhere = blocks_compiled(PHASES), video(5), Elsewhere()
    with fpscompile.attach(model) as attachment:
        handle = model.head.register_forward_pre_hook(lambda *_: elsewhere.begin())
        model(x)
        handle.remove()
        assert runtime.current_call() is None
        elsewhere.end()
        found: list[torch.Tensor] = []
        other = threading.Thread(target=lambda: found.append(model(x)))
        other.start()
        other.join()
        assert len(found) == 1, "the model is free for other threads"
        assert attachment.busy._depth == 0


@torch.no_grad()
def test_export_does_not_read_the_sizes_of_an_attached_model() -> None:
    model = net()
    frames = torch.export.Dim("frames", min=2, max=9)
    with fpscompile.attach(model):
        exported = torch.export.export(model, (video(5),), dynamic_shapes=({2: frames},), strict=False)
        assert runtime.current_call() is None
    assert exported.module()(video(7)).shape[2] == 7


def gradients(reentrant: bool | None, grid: tuple[int, int, int] | None = None) -> torch.Tensor:
    torch._dynamo.reset()
    model = blocks_compiled(WINDOW)
    model.reentrant = reentrant
    torch.manual_seed(1)
    with fpscompile.attach(model, grid=grid):
        model(video(5)).square().sum().backward()
    return torch.cat([weight.grad.flatten() for weight in model.parameters() if weight.grad is not None])


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_block_that_is_compiled_for_the_backward_pass_has_the_grid_of_the_forward(reentrant: bool) -> None:
    """The reentrant kind of checkpoint runs forward without gradients: the second run is another graph."""
    expected = gradients(None)
    assert off(gradients(reentrant), expected) <= 1e-6
    torch.manual_seed(1)
    dense = net()
    dense(video(5)).square().sum().backward()
    left_alone = torch.cat([weight.grad.flatten() for weight in dense.parameters() if weight.grad is not None])
    assert off(left_alone, expected) > 1e-2


@torch.no_grad()
@pytest.mark.parametrize("dynamic", [True, None])
@pytest.mark.parametrize("strict", [False, True])
def test_a_video_in_code_that_was_compiled_for_images_says_so(
    dynamic: bool | None, strict: bool, caplog: pytest.LogCaptureFixture
) -> None:
    model, dense = blocks_compiled(WINDOW | {"strict": strict}, dynamic=dynamic), net()
    with fpscompile.attach(model), caplog.at_level(logging.WARNING, "fpscompile"):
        for height in (8, 12, 14):
            image = video(1, height)
            assert off(model(image), dense(image)) <= 1e-5
        assert not caplog.records
        if strict:
            with pytest.raises(StrictError, match=r"compiled for an image.*grid \(5, 8, 10\)"):
                model(video(5))
            return
        for frames in (5, 6):
            x = video(frames)
            assert off(model(x), dense(x)) <= 1e-5
    (record,) = caplog.records
    assert "was compiled for an image and runs this video, of grid (5, 8, 10), as it is" in record.getMessage()


@torch.no_grad()
def test_an_image_in_code_that_was_compiled_for_videos_is_dense(caplog: pytest.LogCaptureFixture) -> None:
    model, dense = blocks_compiled(WINDOW, dynamic=True), net()
    with fpscompile.attach(model), caplog.at_level(logging.WARNING, "fpscompile"):
        for frames, sparse in ((5, True), (1, False), (6, True)):
            x = video(frames, 12)
            assert (off(model(x), dense(x)) > 1e-2) is sparse
    assert not caplog.records


class Reduced(Block):
    """Keys and values are every other token: no video, whatever the grid is."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (part.transpose(1, 2) for part in self.qkv(x).unflatten(-1, (3, HEADS, -1)).unbind(2))
        attention = nn.functional.scaled_dot_product_attention(q, k[:, :, ::2], v[:, :, ::2])
        return x + self.out(attention.transpose(1, 2).flatten(2))


@torch.no_grad()
def test_attention_that_no_grid_would_change_does_not_wait_for_one(caplog: pytest.LogCaptureFixture) -> None:
    model = net()
    model.blocks = nn.ModuleList([Reduced(), Reduced()])
    for block in model.blocks:
        block.compile(backend="fps", options=WINDOW, dynamic=True)
    with fpscompile.attach(model), caplog.at_level(logging.WARNING, "fpscompile"):
        for frames in (1, 5):
            model(video(frames))
    assert not caplog.records


@torch.no_grad()
def test_a_video_in_code_that_was_compiled_ahead_of_the_attachment_says_so(caplog: pytest.LogCaptureFixture) -> None:
    model = blocks_compiled(WINDOW)
    model(video(5))
    caplog.clear()
    with fpscompile.attach(model), caplog.at_level(logging.WARNING, "fpscompile"):
        model(video(5))
        model(video(5))
    (record,) = caplog.records
    assert "when no grid was published" in record.getMessage()


@torch.no_grad()
def test_a_step_that_nobody_tells_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    model, dense = blocks_compiled(PHASES), net()
    x = video(5)
    with fpscompile.attach(model) as attachment, caplog.at_level(logging.WARNING, "fpscompile"):
        for _ in range(2):
            assert off(model(x), dense(x)) <= 1e-5
        (record,) = caplog.records
        assert "runs the densest phase: pass fpscompile.attach a scheduler" in record.getMessage()
        attachment.step(3, 4)
        assert off(model(x), dense(x)) > 1e-2
    torch._dynamo.reset()
    caplog.clear()
    model = blocks_compiled(PHASES)
    with fpscompile.attach(model) as attachment:
        attachment.step(3, 4)
        model(x)
    assert not [record for record in caplog.records if record.levelname == "WARNING"]


@torch.no_grad()
@pytest.mark.parametrize("key", ["1", "blocks.1", "blocks.1.*", "blocks.*"])
def test_layers_of_blocks_that_were_replaced_by_compiled_ones(key: str) -> None:
    model, x = net(), video(5)
    plain = copy.deepcopy(model)
    for i, block in enumerate(model.blocks):
        model.blocks[i] = torch.compile(Named(block), backend="fps", options=WINDOW | {"layers": {key: "dense"}})
    with fpscompile.attach(model):
        actual = model(x)
    dense, sparse = plain(x), net()
    for block in sparse.blocks[: 0 if key == "blocks.*" else 1]:
        block.compile(backend="fps", options=WINDOW)
    with fpscompile.attach(sparse):
        expected = sparse(x)
    assert off(actual, expected) <= 1e-5
    assert (off(actual, dense) > 1e-2) is (key != "blocks.*")


@torch.no_grad()
@pytest.mark.parametrize("attached", [False, True])
def test_a_pattern_in_layers_of_a_function_around_the_model(attached: bool) -> None:
    model, x = net(), video(5)
    dense = model(x)
    run = torch.compile(lambda x: model(x), backend="fps", options=WINDOW | {"layers": {"blocks.*": "dense"}})
    if attached:
        with fpscompile.attach(model):
            assert off(run(x), dense) <= 1e-5
    else:
        assert off(run(x), dense) <= 1e-5
