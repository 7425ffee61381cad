"""Packed tokens whose places are counted: which axis is which is proven, told, or not known; never guessed."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from models.oracle import rectangular_mask
from models.toys import HEADS, D
from torch import nn
from torch._dynamo.exc import BackendCompilerFailed
from torch.nn import functional as F

import fpscompile
from fpscompile import Backend, Settings
from fpscompile.errors import GridError

Grid = tuple[int, int, int]
WIDTH = HEADS * D
TILE, WINDOW = (2, 2, 2), (1, 1, 2)
SPARSE = {"quant": "none", "inner": "eager", "lowering": "boxes", "tile": TILE, "window": WINDOW}
THW, HWT, WHT, TWH = (0, 1, 2), (1, 2, 0), (2, 1, 0), (0, 2, 1)
"""Which of (t, h, w) the tokens run over, the slowest first."""


class Counted(nn.Module):
    """Tokens [B, L, C] in the given order of axes; ``mark`` makes of their counted places what multiplies q and k."""

    def __init__(self, order: Grid, mark: Callable[[list[torch.Tensor]], torch.Tensor]) -> None:
        super().__init__()
        self.qkv, self.order, self.mark = nn.Linear(WIDTH, 3 * WIDTH), order, mark
        self.window: torch.Tensor | None = None

    def attend(self, x: torch.Tensor, sizes: tuple[int, ...]) -> torch.Tensor:
        counters = torch.meshgrid(*(torch.arange(sizes[axis]).float() for axis in self.order), indexing="ij")
        places = [counters[self.order.index(axis)].flatten() for axis in range(3)]
        q, k, v = self.qkv(x).chunk(3, -1)
        marks = self.mark(places)
        q, k, v = (y.unflatten(-1, (HEADS, D)).transpose(1, 2) for y in (q * marks, k * marks, v))
        return F.scaled_dot_product_attention(q, k, v, self.window)

    def forward(self, x: torch.Tensor, num_frames: int, height: int, width: int) -> torch.Tensor:
        return self.attend(x, (num_frames, height, width))


class Unnamed(Counted):
    """Nothing of the call is named as a size."""

    def forward(self, x: torch.Tensor, a: int, b: int, c: int) -> torch.Tensor:
        return self.attend(x, (a, b, c))


class NamedTwice(Counted):
    """Sizes of two videos, the second turned on its side: they fit the axes in two orders."""

    def __init__(self, order: Grid, mark: Callable[[list[torch.Tensor]], torch.Tensor]) -> None:
        super().__init__(order, mark)
        self.reference_height, self.reference_width = 5, 4


def mixed(places: list[torch.Tensor]) -> torch.Tensor:
    """[L, WIDTH], every column of all three places: its values show no grid."""
    return (sum(places)[:, None] * torch.linspace(0.1, 1, WIDTH)).cos()  # type: ignore[index]


def rotary(places: list[torch.Tensor]) -> torch.Tensor:
    """[L, WIDTH]: columns of t, then of h, then of w."""
    columns = -(-WIDTH // 3)
    turned = [place[:, None] * 100 ** -(torch.arange(columns) / columns) for place in places]
    return torch.cat([angles.cos() for angles in turned], 1)[:, :WIDTH]


def run(model: Counted, sizes: Grid, attach: Grid | None = None, **options: Any) -> tuple[Any, torch.Tensor, Backend]:
    """(the only site, the output, the backend)."""
    x = torch.randn(2, math.prod(sizes), WIDTH)
    backend = Backend(Settings.from_options(SPARSE | options))
    with torch.no_grad():
        expected = model(x, *sizes)
        compiled = torch.compile(model, backend=backend)
        if attach is None:
            actual = compiled(x, *sizes)
        else:
            with fpscompile.attach(compiled, grid=attach):
                actual = compiled(x, *sizes)
        (site,) = backend.graphs[0].sites
        if site.reason is None:
            tokens = math.prod(sizes)
            model.window = rectangular_mask(sizes, TILE, WINDOW, (tokens, 0), (tokens, 0))
            assert not torch.allclose(actual, expected, atol=1e-3)
            expected = model(x, *sizes)
            model.window = None
    assert torch.allclose(actual, expected, atol=1e-5)
    return site, actual, backend


@pytest.mark.parametrize("grid", [(4, 4, 5), (3, 4, 4), (4, 5, 4), (4, 4, 4)])
@pytest.mark.parametrize("order", [THW, HWT, WHT, TWH])
def test_sizes_of_equal_axes_prove_no_order(order: Grid, grid: Grid) -> None:
    site, *_ = run(Counted(order, mixed).eval(), grid)
    counted = tuple(grid[axis] for axis in order)
    if sorted(counted) == sorted(grid) and counted != grid:
        assert site.reason_code == "token-order"
        return
    assert site.reason_code == "no-grid"
    assert f"counted as {counted}" in site.reason
    assert "two of these axes have the size 4" in site.reason
    assert "options['grid']" in site.reason
    assert "fpscompile.attach(model)" in site.reason


@pytest.mark.parametrize("told", ["attach", "options"])
def test_equal_axes_are_in_the_order_that_somebody_names(told: str) -> None:
    grid = (4, 4, 5)
    site, *_ = run(Counted(THW, mixed).eval(), grid, **{"attach" if told == "attach" else "grid": grid})
    assert (site.kind, site.grid, site.reason) == ("3d", grid, None)


@pytest.mark.parametrize("grid", [(4, 4, 5), (3, 4, 4), (4, 4, 4)])
def test_values_of_a_table_tell_equal_axes_apart(grid: Grid) -> None:
    site, *_ = run(Counted(THW, rotary).eval(), grid)
    assert (site.kind, site.grid, site.grid_source, site.reason) == ("3d", grid, "rotary", None)
    site, *_ = run(Counted(HWT, rotary).eval(), grid)
    assert site.reason_code in ("no-grid", "token-order")


def test_sizes_that_fit_two_orders_prove_none() -> None:
    site, *_ = run(NamedTwice(THW, mixed).eval(), (3, 4, 5))
    assert site.reason_code == "no-grid"
    assert "fit (t, h, w) = (3, 4, 5) and (3, 5, 4)" in site.reason


@pytest.mark.parametrize(
    ("attach", "code"),
    [((3, 4, 5), None), ((4, 5, 3), "grid-mismatch"), ((2, 5, 6), "grid-mismatch"), ((3, 8, 5), "kind")],
)
def test_a_published_grid_is_compared_with_the_counters(attach: Grid, code: str | None) -> None:
    site, *_ = run(Unnamed(THW, mixed).eval(), (3, 4, 5), attach=attach)
    assert site.reason_code == code


@pytest.mark.parametrize("wrong", [(4, 5, 3), (2, 5, 6)])
def test_an_option_that_the_counters_contradict_is_refused_with_both(wrong: Grid) -> None:
    with pytest.raises(BackendCompilerFailed) as caught:
        run(Unnamed(THW, mixed).eval(), (3, 4, 5), grid=wrong)
    assert isinstance(caught.value.inner_exception, GridError)
    message = str(caught.value.inner_exception)
    assert f"options['grid']={wrong}" in message
    assert "the tokens of scaled_dot_product_attention are counted as (3, 4, 5)" in message
    assert "give options['grid']=(3, 4, 5)" in message
    assert "drop the option, and reorder the tokens" in message


class Patches(nn.Module):
    """A 5-D latent's own tokens, in the given order of axes."""

    def __init__(self, order: Grid) -> None:
        super().__init__()
        self.embed, self.qkv, self.order = nn.Conv3d(4, WIDTH, (1, 2, 2), (1, 2, 2)), nn.Linear(WIDTH, 3 * WIDTH), order

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.embed(x).permute(0, *(axis + 2 for axis in self.order), 1).flatten(1, 3)
        q, k, v = self.qkv(x).unflatten(-1, (3, HEADS, D)).permute(2, 0, 3, 1, 4).unbind(0)
        return F.scaled_dot_product_attention(q, k, v)


@pytest.mark.parametrize("grid", [(4, 4, 5), (3, 4, 4), (4, 4, 4)])
@pytest.mark.parametrize(
    ("order", "code"), [(THW, None), (HWT, "token-order"), (WHT, "token-order"), (TWH, "token-order")]
)
@pytest.mark.parametrize("dynamic", [None, True])
def test_dimensions_of_a_latent_tell_equal_axes_apart(grid: Grid, order: Grid, code: str | None, dynamic: Any) -> None:
    model = Patches(order).eval()
    x = torch.randn(2, 4, grid[0], 2 * grid[1], 2 * grid[2])
    backend = Backend(Settings.from_options(SPARSE))
    with torch.no_grad():
        actual = torch.compile(model, backend=backend, dynamic=dynamic)(x)
        (site,) = backend.graphs[0].sites
        assert (site.kind, site.reason_code) == ("3d", code)
        assert torch.equal(actual, model(x)) == (code is not None)
    assert site.grid == (grid if code is None else None)
