"""The check of addresses itself."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl

from fpscompile.gpu.interpreter import interpreting, repaired_interpreter

pytestmark = pytest.mark.skipif(not interpreting(), reason="about Triton's interpreter")


@triton.jit
def copy_kernel(x, out, first, n, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    tl.store(out + at, tl.load(x + first + at, mask=at < n, other=0.0), mask=at < n)


@triton.jit
def add_kernel(x, first, SIZE: tl.constexpr):
    tl.atomic_add(x + first + tl.arange(0, SIZE), 1.0)


def copy(x: torch.Tensor, out: torch.Tensor, first: int, n: int) -> None:
    with repaired_interpreter():
        copy_kernel[(1,)](x, out, first, n, SIZE=8)


def test_inside() -> None:
    x, out = torch.arange(8.0), torch.zeros(8)
    copy(x, out, 0, 8)
    assert torch.equal(x, out)


def test_masked_accesses_do_not_count() -> None:
    out = torch.zeros(3)
    copy(torch.ones(4)[1:], out, 0, 3)
    assert torch.equal(out, torch.ones(3))


@pytest.mark.parametrize(("first", "n", "length"), [(1, 8, 8), (-1, 8, 8), (0, 8, 7)])
def test_one_too_far(first: int, n: int, length: int) -> None:
    """To either side when reading, and behind the end when writing; the memory there is a neighbour's."""
    around, into = torch.zeros(32), torch.zeros(32)
    with pytest.raises(Exception, match="1 of 8 accesses outside the launch's tensors"):
        copy(around[8:16], into[8 : 8 + length], first, n)


def test_a_view_is_no_way_to_its_whole_storage() -> None:
    whole = torch.zeros(4, 8)
    with pytest.raises(Exception, match="8 of 8 accesses outside"):
        copy(whole[1], torch.zeros(8), 8, 8)


def test_atomics() -> None:
    x = torch.zeros(16)
    with pytest.raises(Exception, match="3 of 4 accesses outside"), repaired_interpreter():
        add_kernel[(1,)](x[:8], 7, SIZE=4)
