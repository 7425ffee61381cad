"""The tables of a plan: in which order a launch's programs take their blocks of rows."""

from __future__ import annotations

import pytest
import torch

from fpscompile.gpu import tables as module
from fpscompile.gpu.tables import Tables, tables_of
from fpscompile.plan import PhasePlan, Plan, resolve

GRID, TEXT = (4, 8, 16), 70


def tables(*windows: tuple[int, int, int], text: int = TEXT) -> Tables:
    phases = tuple(PhasePlan(window=window) for window in windows)
    plan = Plan(tile=(2, 4, 8), phases=phases, quant="fp8", lowering="triton")
    length = 4 * 8 * 16 + text
    return tables_of(resolve(plan, GRID, length, length), torch.device("cpu"))


def test_tiles_of_text_come_first_and_the_others_stay_in_order() -> None:
    """Only text meets all tiles; every tile of the video meets the same number in a grid of two by two by two."""
    made = tables((1, 1, 1))
    assert made.q_tiles.tolist() == [[8, 64], [9, 6], *([tile, 64] for tile in range(8))]
    assert torch.equal(made.k_tiles, made.q_tiles)  # every query meets the text, too
    assert tables((1, 1, 1), text=0).q_tiles[:, 0].tolist() == list(range(8))


def test_all_phases_count() -> None:
    """With several phases, the tiles that all of them meet count together."""
    made = tables((2, 2, 2), (1, 1, 1))
    met = made.keys.count.sum((0, 1))
    assert met[made.q_tiles[:, 0]].diff().le(0).all()


def test_blocks_cover_every_token_once() -> None:
    made = tables((1, 1, 1))
    for rows in (16, 64):
        blocks = made.query_blocks(rows)
        slots = torch.cat([torch.arange(first, first + tokens) for _, first, tokens in blocks.tolist()])
        assert slots.unique().numel() == slots.numel()
        assert made.q_token[slots].sort().values.tolist() == list(range(4 * 8 * 16 + TEXT))
        assert (blocks[:, 1] // made.slots == blocks[:, 0]).all()
        assert (blocks[:, 2] > 0).all()
    whole = made.query_blocks(16, whole_units=True)
    assert len(whole) == 10 * 4  # the second tile of text has 6 tokens in one block of four
    assert (whole[:, 2] == 0).sum() == 3


@pytest.mark.parametrize(
    ("tile", "text", "padding"),
    [
        ((2, 4, 8), 0, 0),
        ((2, 4, 8), 60, 4),
        ((2, 4, 8), 65, 63),
        ((4, 2, 7), 0, 48),
        ((1, 4, 7), 0, 24),
        ((4, 8, 5), 0, 96),
    ],
)
def test_the_most_padding_of_a_unit(tile: tuple[int, int, int], text: int, padding: int) -> None:
    """Units without any token are not listed and do not count."""
    length = 4 * 8 * 16 + text
    plan = Plan(tile=tile, phases=(PhasePlan(window=(1, 1, 1)),), quant="fp8", lowering="triton")
    made = tables_of(resolve(plan, GRID, length, length), torch.device("cpu"))
    assert made.keys.padding == padding
    listed = made.keys.valid[made.keys.valid > 0]
    assert made.unit - listed.min() == padding


def test_blocks_are_made_once() -> None:
    """A copy to the device would not be allowed while a CUDA graph is captured."""
    made = tables((1, 1, 1))
    assert made.query_blocks(64) is made.query_blocks(64)
    assert made.query_blocks(64) is not made.key_blocks(64)
    assert made.query_blocks(16, whole_units=True) is not made.query_blocks(16)


@pytest.mark.parametrize("lasting", [True, False])
def test_only_what_outlives_a_call_is_made_apart(lasting: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles chosen by content are another call's next time: no thread, and no wait for the GPU, is spent on them."""
    plan = Plan(tile=(2, 4, 8), phases=(PhasePlan(window=(1, 1, 1)),), quant="fp8", lowering="triton")
    resolved = resolve(plan, GRID, 512, 512)
    made = tables_of(resolved, torch.device("cpu"), None if lasting else resolved.block_mask)
    assert made.lasting == lasting
    apart = []
    monkeypatch.setattr(module, "outside_graphs", lambda device, make: apart.append(device) or make())
    assert made.query_blocks(16).shape == (32, 3)
    assert len(apart) == int(lasting)
