"""The probe of the Hopper kernel, which runs on a GPU alone, still gives the kernel what its launch asks for."""

from __future__ import annotations

from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import scripts
import torch

pytest.importorskip("triton")


@pytest.fixture(scope="module")
def probe() -> ModuleType:
    """The script as a module, with its tensors on the CPU."""
    module = scripts.load("benchmarks/gpu/hopper_probe.py")
    module.DEVICE = "cpu"
    return module


def launches(probe: ModuleType, case: Any) -> list[tuple[Any, ...]]:
    """(grid, arguments, options) of every launch."""
    launched = []

    class Recorder:
        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            return lambda *args, **options: launched.append((grid, args, options))

    out, lse = case.outputs()
    assert torch.isnan(out).all()  # poisoned: what no program writes is seen
    case.launch(SimpleNamespace(attention_forward=Recorder()), out, lse, {})
    return launched


@pytest.mark.parametrize("name", ["base", "bias of heads", "D=80, DV=36", "tiles of 64, subtile"])
def test_small_cases_can_be_launched(probe: ModuleType, name: str) -> None:
    case = probe.small_case(**probe.SMALL[name])
    found = launches(probe, case)
    names = probe.load_kernel().attention_forward.arg_names
    for _grid, args, options in found:
        assert len(args) == len([p for p in names if p not in options])
    assert [options["LAZY"] for *_, options in found] == ([True, False] if case.bias is None else [False])
    assert found[0][0][0] >= len(case.q_blocks)
    for grid, _args, options in found[1:]:
        assert grid[0] * options["AGAIN"] >= len(case.q_blocks)


def test_scores_are_small_enough_for_fp8_products(probe: ModuleType) -> None:
    """Their sums have 13 or 14 bits: an error of 2^-12 of the largest score must stay within the checks' 1e-2."""
    case = probe.small_case(slots=64)
    q, k = (x[0, 0].float() * s[0, 0].repeat_interleave(64, 0) for x, s in (
        (case.packed.q, case.packed.q_scale), (case.packed.k, case.packed.k_scale),
    ))  # fmt: skip
    assert 1.0 < (q @ k.T * case.scale).abs().max() < 1e-2 * 2**12


@pytest.mark.parametrize("tile", [(7, 9, 4), (4, 8, 8), (4, 4, 4)])
def test_what_the_lists_name_exists(probe: ModuleType, tile: tuple[int, int, int]) -> None:
    """No entry that the kernel may follow leads out of a tensor: a list reaches `count` entries, a block its rows."""
    case = probe.video_case((7, 18, 16), (1, 2, 3), heads=1, tile=tile)
    keys, tables, slots = case.tables.keys, case.tables, case.packed.q.shape[2]
    assert int(keys.count.max()) <= keys.index.shape[-1]
    assert 0 <= int(keys.index.min()) <= int(keys.index.max()) < keys.valid.numel()
    q_tile, first, rows = case.q_blocks.unbind(1)
    assert (q_tile == first // tables.slots).all()
    assert ((first + rows) <= (q_tile + 1) * tables.slots).all()
    assert int((first + rows).max()) <= slots
    held = torch.cat([tables.q_token[f : f + r] for f, r in zip(first.tolist(), rows.tolist(), strict=True)])
    assert held.sort().values.tolist() == list(range(case.length))  # every token once


@pytest.mark.parametrize(
    ("where", "wrong"),
    [
        ("packed.lse_shift", lambda x: x[..., :-1].contiguous()),
        ("packed.k_scale", lambda x: x[:, :, :-1].contiguous()),
        ("packed.v_scale", lambda x: x[..., :-1].contiguous()),
        ("tables.keys.valid", lambda x: x[:-1]),
        ("tables.keys.index", lambda x: x.mT.contiguous().mT),
        ("tables.q_token", lambda x: x[:-1]),
        ("q_blocks", lambda x: x[:, :2].contiguous()),
        ("bias.state", lambda x: x[..., :-1].contiguous()),
    ],
)
def test_what_would_be_read_beyond_its_end_is_refused(probe: ModuleType, where: str, wrong: Any) -> None:
    case = probe.small_case(**probe.SMALL["bias"])
    *path, name = where.split(".")
    owner = case
    for part in path:
        owner = getattr(owner, part)
    setattr(owner, name, wrong(getattr(owner, name)))
    with pytest.raises(ValueError, match=f"{where} has shape"):
        launches(probe, case)


def test_tiles_that_are_no_multiple_of_a_block_are_padded(probe: ModuleType) -> None:
    case = probe.video_case((7, 9, 8), (1, 1, 2), heads=1, tile=(7, 9, 4))
    assert case.tables.slots == 256
    assert case.sizes.tolist() == [252, 252]
    assert sorted(case.tables.keys.valid.tolist()) == [124, 124, 128, 128]
