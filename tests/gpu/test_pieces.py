"""A large call is quantized and attended to in pieces: the same numbers, in less memory."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fpscompile.gpu import operands, render
from fpscompile.gpu.config import KernelConfig, default_config
from fpscompile.lowerings import triton
from fpscompile.plan import PhasePlan, Plan, ResolvedPlan, resolve

pytest.importorskip("triton")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
GRID, TILE = (2, 9, 9), (2, 8, 8)
LENGTH, TILES = 2 * 9 * 9, 4
LARGE = None if DEVICE == "cuda" else KernelConfig(256, 8, 3)
"""The interpreter's time follows the number of operations, not their size."""


class Silent:
    """A kernel that does nothing: the interpreter's launches copy their tensors."""

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        return lambda *args, **options: None


class Peak(TorchDispatchMode):
    """The most bytes that tensors made under it held at one time."""

    def __init__(self) -> None:
        super().__init__()
        self.live: dict[int, tuple[StorageWeakRef, int]] = {}
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        result = func(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            if isinstance(x, torch.Tensor) and x.untyped_storage()._cdata not in given:
                storage = x.untyped_storage()
                self.live[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self.live = {key: (ref, size) for key, (ref, size) in self.live.items() if not ref.expired()}
        self.bytes = max(self.bytes, sum(size for _, size in self.live.values()))
        return result


def plan(*granularities: str, **fields: Any) -> ResolvedPlan:
    phases = tuple(PhasePlan(window=(1, 2, 2), granularity=name) for name in granularities)
    made = Plan(tile=TILE, phases=phases, lowering="triton", **{"quant": "fp8", **fields})
    return resolve(made, GRID, LENGTH, LENGTH)


def draw(batch: int, heads: int, key_heads: int, dim: int = 64) -> list[torch.Tensor]:
    shapes = ((heads, dim), (key_heads, dim), (key_heads, dim))
    return [torch.randn(batch, LENGTH, h, d, device=DEVICE).transpose(1, 2) for h, d in shapes]


def both_ways(
    monkeypatch: pytest.MonkeyPatch, run: Callable[[], tuple[torch.Tensor, torch.Tensor]]
) -> tuple[int, list[tuple[torch.Tensor, torch.Tensor]]]:
    """(launches of pieces, [whole, in pieces of one key head])."""
    found = [run()]
    pieces = []
    monkeypatch.setattr(triton, "WHOLE_BYTES", 0)
    monkeypatch.setattr(triton, "PIECE_BYTES", 1)
    original = triton._attend
    monkeypatch.setattr(triton, "_attend", lambda *args: (pieces.append(args[0].shape), original(*args))[1])
    found.append(run())
    return len(pieces), found


@pytest.mark.parametrize(
    ("batch", "heads", "key_heads", "phases", "mask", "pieces"),
    [
        (1, 3, 3, (0,), None, 3),
        (1, 6, 3, (0,), "heads", 3),
        (2, 2, 1, (1, 0), "batch", 2),
        (2, 1, 1, (1,), None, 2),
        (1, 2, 1, (0,), None, 1),
    ],
)
def test_pieces_are_the_whole_to_the_bit(
    monkeypatch: pytest.MonkeyPatch,
    batch: int,
    heads: int,
    key_heads: int,
    phases: tuple[int, ...],
    mask: str | None,
    pieces: int,
) -> None:
    resolved, (q, k, v) = plan("tile", "head"), draw(batch, heads, key_heads)
    key_mask = None
    if mask is not None:
        shape = (batch, 1) if mask == "batch" else (1, heads)
        key_mask = torch.rand(*shape, 1, k.shape[2], device=DEVICE) > 0.2

    def run() -> tuple[torch.Tensor, torch.Tensor]:
        phase = torch.tensor(phases, dtype=torch.int32, device=DEVICE)
        call = {"key_mask": key_mask, "phases": phase, "resolved": resolved, "scale": 0.125, "config": LARGE}
        return triton.forward(q, k, v, **call)

    count, (whole, parts) = both_ways(monkeypatch, run)
    assert count == pieces
    assert torch.equal(whole[0], parts[0])
    assert torch.equal(whole[1], parts[1])


@pytest.mark.parametrize(("granularity", "quant"), [("tensor", "fp8"), ("tile", "none")])
def test_what_must_be_seen_as_a_whole_stays_whole(
    monkeypatch: pytest.MonkeyPatch, granularity: str, quant: str
) -> None:
    resolved, (q, k, v) = plan(granularity, quant=quant), draw(1, 2, 2)

    def run() -> tuple[torch.Tensor, torch.Tensor]:
        call = {"key_mask": None, "phases": (0,), "resolved": resolved, "scale": 0.125, "config": LARGE}
        return triton.forward(q, k, v, **call)

    assert both_ways(monkeypatch, run)[0] == 1


def test_keys_and_values_are_looked_at_once_for_all_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    resolved, (q, k, v) = plan("tile"), draw(1, 3, 3)
    looks, original = [], operands._statistics
    monkeypatch.setattr(operands, "_statistics", lambda *args: (looks.append(args[1].shape), original(*args))[1])
    call = {"key_mask": None, "phases": (0,), "resolved": resolved, "scale": 0.125, "config": LARGE}
    assert both_ways(monkeypatch, lambda: triton.forward(q, k, v, **call))[0] == 3
    assert looks == [k.shape, k.shape]  # the whole call's, and that of its pieces


@pytest.mark.parametrize(
    ("heads", "most", "programs", "at_once", "each"),
    [
        (40, 11, 600, 132, 11),  # 3 x 50 + 32 rounds, where ten heads at a time take 4 x 46
        (40, 11, 600, 1, 10),
        (40, 9, 600, 132, 9),  # 4 x 41 + 19, where eight take 5 x 37
        (5, 40, 10, 132, 5),
        (3, 1, 10, 132, 1),
    ],
)
def test_heads_of_a_piece(heads: int, most: int, programs: int, at_once: int, each: int) -> None:
    """As few pieces as possible, and of those the fewest rounds of programs."""
    assert triton._heads_of_piece(heads, most, programs, at_once) == each
    rounds = {
        n: sum(-(-min(n, heads - first) * programs // at_once) for first in range(0, heads, n))
        for n in range(1, most + 1)
        if -(-heads // n) == -(-heads // min(most, heads))
    }
    assert rounds[each] == min(rounds.values())


def test_only_half_of_the_copies_exist_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside the output: bytes of the FP8 copies, all of them and half of them, and little else."""
    resolved, (q, k, v) = plan("tile"), draw(1, 4, 4)

    def run() -> int:
        with Peak() as peak:
            triton.forward(q, k, v, key_mask=None, phases=(0,), resolved=resolved, scale=0.125)
        return peak.bytes

    load = render.load

    def silent(*spec: Any) -> SimpleNamespace:
        kernels = vars(load(*spec))
        return SimpleNamespace(**{name: Silent() if hasattr(x, "arg_names") else x for name, x in kernels.items()})

    monkeypatch.setattr(render, "load", silent)
    monkeypatch.setattr(triton, "config_of", lambda spec, device: default_config(spec))  # whose launch can be silenced
    run()  # tables and constants stay
    whole = run()
    copies = 3 * 4 * TILES * 128 * 64
    monkeypatch.setattr(triton, "WHOLE_BYTES", copies - 1)
    monkeypatch.setattr(triton, "PIECE_BYTES", copies // 2)
    halves = run()
    rest = q.numel() * q.element_size()  # the output
    assert rest + copies < whole < rest + 1.2 * copies
    assert rest + copies / 2 < halves < rest + 0.6 * copies
