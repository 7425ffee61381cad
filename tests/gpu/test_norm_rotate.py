"""``fps::norm_rotate`` against plain operations in float64: the GPU's kernel, or the same in the interpreter."""

from __future__ import annotations

import pytest
import torch

from fpscompile import rotary_op
from fpscompile.gpu import binary
from fpscompile.gpu.compilation import TARGETS

pytest.importorskip("triton")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EPS = 1e-6


def tables(batch: int, tokens: int, dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    """As models slice them: every second column of a table that repeats its values."""
    angles = 10.0 * torch.randn(batch, tokens, dim, device=DEVICE)
    return angles.cos()[..., 0::2], angles.sin()[..., 1::2]


def checked(x: torch.Tensor, weight: torch.Tensor | None, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    found = torch.ops.fps.norm_rotate(x, weight, EPS, cos, sin)
    wide = (x.double(), None if weight is None else weight.double(), EPS, cos.double(), sin.double())
    exact = rotary_op.reference(*wide)
    step = torch.finfo(x.dtype).eps
    # The norm is rounded, then what is rotated: of two values that may cancel.
    size = exact.unflatten(-1, (-1, 2)).norm(dim=-1, keepdim=True).expand(*exact.shape[:-1], -1, 2).flatten(-2)
    assert ((found.double() - exact).abs() <= 1.5 * step * size + 1e-7).all()
    assert (found.dtype, found.shape) == (x.dtype, x.shape)
    assert found.is_contiguous()
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(("heads", "dim"), [(40, 128), (12, 128), (3, 8), (1, 64), (5, 48), (1, 2)])
def test_shapes(heads: int, dim: int, weighted: bool, dtype: torch.dtype) -> None:
    x = (3.0 * torch.randn(2, 5, heads * dim, device=DEVICE)).to(dtype)
    x[0, 1] = 0.0
    weight = torch.randn(heads * dim, device=DEVICE).to(dtype) if weighted else None
    found = checked(x, weight, *tables(1, 5, dim))
    assert not found[0, 1].any()


def test_strides_and_a_table_per_sample() -> None:
    wide = torch.randn(3, 2, 7, 96, device=DEVICE).bfloat16()
    x = wide[1].transpose(0, 1)[:, :, 16:80].transpose(0, 1)  # [2, 7, 64], rows 96 apart
    weight = torch.randn(64, device=DEVICE).bfloat16()
    checked(x, weight, *tables(2, 7, 16))
    checked(wide[0, ..., ::3], weight[:32], *tables(2, 7, 16))  # [2, 7, 32], its values three apart
    checked(x, weight, tables(1, 7, 16)[0], tables(2, 7, 16)[1])  # one for all samples, and one for each
    checked(x, weight.repeat_interleave(2)[::2], *tables(1, 7, 16))
    checked(x, weight[:1].expand(64), *tables(1, 7, 16))


def test_no_tokens() -> None:
    x = torch.empty(2, 0, 64, device=DEVICE)
    assert torch.ops.fps.norm_rotate(x, None, EPS, *tables(1, 0, 16)).shape == x.shape


def test_what_is_no_number_stays_in_its_row() -> None:
    x = torch.randn(1, 4, 64, device=DEVICE)
    x[0, 1, 3] = torch.nan
    found = torch.ops.fps.norm_rotate(x, None, EPS, *tables(1, 4, 16))
    assert found[0, 1].isnan().all()
    assert found[0, [0, 2, 3]].isfinite().all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": (2, 4, 16386)}, r"x is torch\.float32"),
        ({"x": (4, 64)}, "x is"),
        ({"weight": (32,)}, r"weight is torch\.float32 \[32\]"),
        ({"cos": (3, 4, 16)}, "cos is"),
        ({"sin": (1, 5, 16)}, "sin is"),
        ({"sin": (1, 4, 8)}, "sin is"),
        ({"cos": (1, 4, 24), "sin": (1, 4, 24)}, "a divisor of 32"),
    ],
)
def test_other_operands_are_refused(change: dict[str, tuple[int, ...]], message: str) -> None:
    shapes = {"x": (2, 4, 64), "weight": (64,), "cos": (1, 4, 16), "sin": (1, 4, 16)} | change
    x, weight, cos, sin = (torch.zeros(shape, device=DEVICE) for shape in shapes.values())
    with pytest.raises(ValueError, match=message):
        torch.ops.fps.norm_rotate(x, weight, EPS, cos, sin)
    with pytest.raises(ValueError, match=r"cos is torch\.float64"):
        torch.ops.fps.norm_rotate(torch.zeros(2, 4, 64), None, EPS, *torch.zeros(2, 1, 4, 16).double())


@pytest.mark.parametrize(
    ("target", "n"), [*((target, 5120) for target in TARGETS), *(("cuda:90", n) for n in (96, 1536, 3072, 16384))]
)
def test_it_compiles_without_spills(target: str, n: int) -> None:
    """Wan 14B's rows on every target, other lengths on one, as Inductor hands them over."""
    from fpscompile.gpu import rotary_kernel

    pairs, tokens = 16, 75_600
    x, out = (torch.empty(1, tokens, n, dtype=torch.bfloat16, device="meta") for _ in range(2))
    weight = torch.empty(n, dtype=torch.bfloat16, device="meta")
    cos, sin = (torch.empty(tokens, 2 * pairs, device="meta")[:, ::2] for _ in range(2))
    strides = (x.stride(0), x.stride(1), 0, *cos.stride(), 0, *sin.stride())
    report = binary.compile_kernel(
        rotary_kernel.rotate_rows, (x, weight, cos, sin, out, *strides, tokens, n, EPS),
        {**rotary_kernel.options(n), "PAIRS": pairs, "WEIGHT": True}, target=target,
    )  # fmt: skip
    assert report.spill_bytes == report.stack_bytes == 0
    assert report.registers <= 128  # a multiprocessor has room for 16 warps at least
