"""``options["history"]``: earlier frames in front of the video, seen by all or windowed with it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from models.diffusers_zoo import DIFFUSERS_ZOO
from models.oracle import WindowedCalls, rectangular_mask
from models.run_zoo import TILE, WINDOW, relative
from models.zoo_entry import output
from torch import nn
from torch.nn import functional as F

from fpscompile import Backend, Settings
from fpscompile.errors import OptionError

FRAMES = 2
"""Of history at full size, in the registry's inputs of both models."""
OPTIONS = {"quant": "none", "window": WINDOW, "tile": TILE, "inner": "eager"}


@pytest.mark.parametrize(("name", "lowering"), [("helios", "boxes"), ("helios", "gather"), ("framepack", "boxes")])
def test_windowed_history_is_eager_with_the_mask_of_the_longer_grid(name: str, lowering: str) -> None:
    entry = DIFFUSERS_ZOO[name]
    (t, h, w), (before, after) = entry.grid, entry.expect[0].text
    grid, compressed = (t + FRAMES, h, w), before - FRAMES * h * w
    if entry.capture:  # which pads the text to a length that depends on data
        after = 8
    length = compressed + grid[0] * h * w + after
    mask = rectangular_mask(grid, TILE, WINDOW, (length, compressed), (length, compressed))
    model, inputs = entry.build(), entry.inputs(entry.grid)
    fps = Backend(Settings.from_options(OPTIONS | {"history": "windowed", "lowering": lowering}))
    with torch.no_grad(), torch._dynamo.config.patch(**entry.capture):
        with WindowedCalls({(length, length): mask}) as windowed:
            expected = output(model, **inputs)
        actual = output(torch.compile(model, backend=fps), **inputs)
        torch._dynamo.reset()
        seen_by_all = output(torch.compile(model, backend=Backend(Settings.from_options(OPTIONS))), **inputs)
    assert windowed.calls == 2
    assert relative(actual, expected) <= 1e-4
    assert relative(seen_by_all, expected) > 1e-3
    sites = [site for graph in fps.graphs for site in graph.sites if site.kind == "3d"]
    assert [site.grid for site in sites] == [grid, grid]
    (note,) = {note.message for graph in fps.graphs for note in graph.notes if note.code == "history"}
    assert note.startswith("the window runs over 5x5x7 tokens, 1 earlier video(s)")


class Joint(nn.Module):
    """An earlier video and the current one in one sequence."""

    def forward(self, earlier: torch.Tensor, video: torch.Tensor) -> torch.Tensor:
        x = torch.cat([each.flatten(2).transpose(1, 2) for each in (earlier, video)], dim=1)[:, None]
        return F.scaled_dot_product_attention(x, x * 2, x + 1)


@pytest.mark.parametrize(
    ("lowering", "dynamic"), [("boxes", None), ("boxes", True), ("cpp", None), ("gather", None), ("reference", None)]
)
def test_grids_in_a_row(lowering: str, dynamic: bool | None) -> None:
    """History and video change their lengths, one code serves them."""
    fps = Backend(Settings.from_options(OPTIONS | {"history": "windowed", "lowering": lowering}))
    model = torch.compile(Joint(), backend=fps, dynamic=dynamic)
    for earlier, video, h, w in ((2, 3, 4, 5), (3, 5, 6, 7), (2, 4, 5, 8)):
        inputs = [torch.randn(1, 32, frames, h, w) for frames in (earlier, video)]
        length = (earlier + video) * h * w
        mask = rectangular_mask((earlier + video, h, w), TILE, WINDOW, (length, 0), (length, 0))
        with WindowedCalls({(length, length): mask}):
            expected = Joint()(*inputs)
        assert relative(model(*inputs), expected) <= 1e-5
    assert len(fps.graphs) <= 2


@pytest.mark.parametrize("earlier", [1, 2])
def test_one_frame_of_history(earlier: int) -> None:
    """A frame alone is no video, but it is the history of one."""
    fps = Backend(Settings.from_options(OPTIONS | {"history": "windowed"}))
    inputs = [torch.randn(1, 8, frames, 4, 5) for frames in (earlier, 4)]
    torch.compile(Joint(), backend=fps)(*inputs)
    (site,) = fps.graphs[0].sites
    assert (site.rewritten, site.grid) == (True, (earlier + 4, 4, 5))


def compile_joint(*shapes: tuple[int, ...], **options: Any) -> Backend:
    fps = Backend(Settings.from_options(OPTIONS | options))
    torch.compile(Joint(), backend=fps)(*(torch.randn(1, 8, *shape) for shape in shapes))
    return fps


@pytest.mark.parametrize(
    "shapes",
    [((2, 4, 5), (3, 4, 6)), ((2, 5, 4), (3, 4, 5)), ((3, 4, 5), (2, 4, 5))],
    ids=["other width", "rows and columns swapped", "behind the largest"],
)
def test_refused_where_it_does_not_apply(shapes: tuple[tuple[int, ...], ...]) -> None:
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed) as caught:
        compile_joint(*shapes, history="windowed")
    assert isinstance(caught.value.inner_exception, OptionError)
    assert "nothing can be windowed with it; drop the option" in str(caught.value)
    torch._dynamo.reset()
    (site,) = compile_joint(*shapes).graphs[0].sites
    assert site.rewritten
