"""The repaired interpreter against oracles written from the formats' definitions and in float64."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import torch

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402
from triton.runtime import interpreter as internals  # noqa: E402

from fpscompile.errors import UnsupportedError  # noqa: E402
from fpscompile.gpu.interpreter import interpreting, repaired_interpreter  # noqa: E402

pytestmark = pytest.mark.skipif(not interpreting(), reason="needs TRITON_INTERPRET=1 before the process starts")

FP8 = {
    "e4m3": (tl.float8e4nv, torch.float8_e4m3fn, 448.0),
    "e5m2": (tl.float8e5, torch.float8_e5m2, 57344.0),
    "e4m3fnuz": (tl.float8e4b8, torch.float8_e4m3fnuz, 240.0),
    "e5m2fnuz": (tl.float8e5b16, torch.float8_e5m2fnuz, 57344.0),
}


@triton.jit
def cast_kernel(x, out, size: tl.constexpr, dtype: tl.constexpr):
    index = tl.arange(0, size)
    tl.store(out + index, tl.load(x + index).to(dtype))


@triton.jit
def dot_kernel(a, b, out, m: tl.constexpr, n: tl.constexpr, k: tl.constexpr):
    rows, columns, depth = tl.arange(0, m), tl.arange(0, n), tl.arange(0, k)
    left = tl.load(a + rows[:, None] * k + depth[None])
    right = tl.load(b + depth[:, None] * n + columns[None])
    start = tl.load(out + rows[:, None] * n + columns[None])
    tl.store(out + rows[:, None] * n + columns[None], tl.dot(left, right, start, out_dtype=start.dtype))


@triton.jit
def arithmetic_kernel(x, y, out, size: tl.constexpr):
    index = tl.arange(0, size)
    a, b = tl.load(x + index), tl.load(y + index)
    tl.store(out + index, a + b)
    tl.store(out + size + index, a * b)
    tl.store(out + 2 * size + index, a - b)
    tl.store(out + 3 * size + index, tl.where(a < b, a, b))
    tl.store(out + 4 * size + index, tl.maximum(a, b))
    tl.store(out + 5 * size + index, -a)


@triton.jit
def math_kernel(x, y, out, size: tl.constexpr):
    index = tl.arange(0, size)
    a, b = tl.load(x + index), tl.load(y + index)
    tl.store(out + index, tl.div_rn(a, b))
    tl.store(out + size + index, tl.exp2(a))
    tl.store(out + 2 * size + index, tl.log2(b))
    tl.store(out + 3 * size + index, tl.math.rsqrt(b))
    tl.store(out + 4 * size + index, tl.sqrt_rn(b))
    tl.store(out + 5 * size + index, tl.fma(a, b, -a))
    tl.store(out + 6 * size + index, tl.clamp(a, -1.0, 0.5))
    tl.store(out + 7 * size + index, tl.abs(a))


@triton.jit
def nan_kernel(x, y, out, size: tl.constexpr):
    index = tl.arange(0, size)
    a, b = tl.load(x + index), tl.load(y + index)
    tl.store(out + index, tl.maximum(a, b))
    tl.store(out + size + index, tl.minimum(a, b))
    tl.store(out + 2 * size + index, tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL))
    tl.store(out + 3 * size + index, tl.clamp(a, -1.0, 1.0))
    tl.store(out + 4 * size + index, tl.clamp(a, -1.0, 1.0, propagate_nan=tl.PropagateNan.ALL))


@triton.jit
def doubled(x):
    return x + x


@triton.jit
def loop_kernel(x, bounds, out, given, size: tl.constexpr):
    index = tl.arange(0, size)
    total = tl.zeros([size], tl.float32)
    for i in range(tl.load(bounds), tl.load(bounds + 1)):
        total += tl.load(x + i * size + index)
    for _ in range(given):
        total = doubled(total)
    tl.store(out + index, total)


@triton.jit
def reduce_kernel(x, out, rows: tl.constexpr, columns: tl.constexpr):
    row = tl.arange(0, rows)
    a = tl.load(x + row[:, None] * columns + tl.arange(0, columns)[None])
    tl.store(out + row, tl.max(a, 1))
    tl.store(out + rows + row, tl.min(a, 1))
    tl.store(out + 2 * rows + row, tl.sum(a, 1))


def cast(x: torch.Tensor, tl_dtype: object, dtype: torch.dtype) -> torch.Tensor:
    """``x`` converted by a kernel."""
    out = torch.empty(x.shape, dtype=dtype)
    with repaired_interpreter():
        cast_kernel[(1,)](x, out, x.numel(), tl_dtype)
    return out


def nearest(values: np.ndarray, dtype: torch.dtype) -> np.ndarray:
    """float32 to an 8-bit format by its definition: the nearest of all its finite values, ties to the even code."""
    codes = np.arange(256, dtype=np.uint8)
    table = torch.from_numpy(codes).view(dtype).double().numpy()
    keep = np.isfinite(table) & ~((table == 0) & (codes != 0))
    order = np.argsort(table[keep])
    table, codes = table[keep][order], codes[keep][order]
    wide = values.astype(np.float64)
    above = np.clip(np.searchsorted(table, wide), 1, len(table) - 1)
    low, high = table[above - 1], table[above]
    tie = wide - low == high - wide
    up = np.where(tie, codes[above] % 2 == 0, high - wide < wide - low)
    return np.where(up, high, low)


def awkward(limit: float, generator: torch.Generator) -> torch.Tensor:
    """float32 [8192]: spread over every binade, ties, their neighbours, powers of two from below, zeros, inf, NaN."""
    spread = torch.randn(4096, generator=generator) * 2.0 ** torch.randint(-20, 17, (4096,), generator=generator)
    ties = torch.randint(8, 32, (1022,), generator=generator) / 16 + 1 / 32
    ties = ties * 2.0 ** torch.randint(-11, 9, (1022,), generator=generator) * torch.randn(1022).sign()
    below = torch.nextafter(2.0 ** torch.arange(-12.0, 17), torch.tensor(0.0))
    special = torch.tensor([0.0, -0.0, limit, -limit, limit * 1.03, limit * 1.07, 1e30, float("nan")])
    x = torch.cat([spread, ties, ties.nextafter(torch.tensor(1e9)), ties.nextafter(torch.tensor(-1e9)), below, special])
    return torch.cat([x, -x])[:8192].clone()


@pytest.mark.parametrize("name", FP8)
def test_cast_to_fp8_rounds_to_nearest_even(name: str) -> None:
    tl_dtype, dtype, limit = FP8[name]
    x = awkward(limit, torch.Generator().manual_seed(torch.seed() % 1000))
    got = cast(x, tl_dtype, dtype).double().numpy()
    inside = x.abs() <= limit
    np.testing.assert_array_equal(got[inside], nearest(x[inside].numpy(), dtype))
    assert np.isnan(got[x.isnan().numpy()]).all()
    outside = (x.abs() > limit * 1.1).numpy()
    if name.endswith("fnuz"):
        assert np.isnan(got[outside]).all()
    else:
        np.testing.assert_array_equal(got[outside], np.sign(x[outside].numpy()) * limit)
        clamped = x.clamp(-limit, limit).to(dtype).double().numpy()
        np.testing.assert_array_equal(got, clamped)


def test_infinities_saturate_e4m3() -> None:
    x = torch.tensor([float("inf"), -float("inf"), 465.0, -1e38])
    assert cast(x, tl.float8e4nv, torch.float8_e4m3fn).tolist() == [448.0, -448.0, 448.0, -448.0]


@pytest.mark.parametrize("source", [torch.float16, torch.bfloat16])
def test_cast_to_fp8_from_half_precision(source: torch.dtype) -> None:
    x = (torch.randn(4096) * 2.0 ** torch.randint(-12, 9, (4096,))).to(source)
    want = nearest(x.float().clamp(-448, 448).numpy(), torch.float8_e4m3fn)
    np.testing.assert_array_equal(cast(x, tl.float8e4nv, torch.float8_e4m3fn).double().numpy(), want)


@pytest.mark.parametrize("target", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", FP8)
def test_every_code_of_fp8_upcasts_exactly(name: str, target: torch.dtype) -> None:
    codes = torch.arange(256, dtype=torch.uint8).view(FP8[name][1])
    tl_target = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}[target]
    torch.testing.assert_close(cast(codes, tl_target, target), codes.to(target), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("source", [torch.float32, torch.float64, torch.int32])
def test_cast_to_bfloat16_rounds_to_nearest_even(source: torch.dtype) -> None:
    x = (torch.randn(4096) * 2.0 ** torch.randint(-30, 20, (4096,))).to(source)
    torch.testing.assert_close(cast(x, tl.bfloat16, torch.bfloat16), x.to(torch.bfloat16), rtol=0, atol=0)


def test_every_bfloat16_upcasts_exactly() -> None:
    codes = torch.arange(65536, dtype=torch.int32).to(torch.uint16).view(torch.bfloat16)
    torch.testing.assert_close(cast(codes, tl.float32, torch.float32), codes.float(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e4m3fnuz, torch.bfloat16, torch.float16])
def test_dot_against_float64(dtype: torch.dtype) -> None:
    a, b, start = torch.randn(32, 64).to(dtype), torch.randn(64, 16).to(dtype), torch.randn(32, 16)
    out = start.clone()
    with repaired_interpreter():
        dot_kernel[(1,)](a, b, out, 32, 16, 64)
    want = a.double() @ b.double() + start
    assert (out - want).abs().max() < 2e-5


def test_dot_of_integers_and_of_float32_is_the_interpreters_own() -> None:
    a, b = torch.randint(-128, 128, (2, 32, 32), dtype=torch.int8)
    out = torch.zeros(32, 32, dtype=torch.int32)
    x, y, out_float = torch.randn(32, 32), torch.randn(32, 32), torch.zeros(32, 32)
    with repaired_interpreter():
        dot_kernel[(1,)](a, b, out, 32, 32, 32)
        dot_kernel[(1,)](x, y, out_float, 32, 32, 32)
    assert torch.equal(out, a.int() @ b.int())
    torch.testing.assert_close(out_float, x @ y)


def test_bfloat16_arithmetic() -> None:
    x, y = torch.randn(2, 256).to(torch.bfloat16)
    out = torch.empty(6, 256, dtype=torch.bfloat16)
    with repaired_interpreter():
        arithmetic_kernel[(1,)](x, y, out, 256)
    want = torch.stack([x + y, x * y, x - y, torch.minimum(x, y), torch.maximum(x, y), -x])
    torch.testing.assert_close(out, want, rtol=0, atol=0)


def test_mathematical_functions() -> None:
    x, y = torch.randn(256) * 8, torch.rand(256) * 10 + 1e-3
    out = torch.empty(8, 256)
    with repaired_interpreter():
        math_kernel[(1,)](x, y, out, 256)
    a, b = x.double(), y.double()
    want = [a / b, a.exp2(), b.log2(), b.rsqrt(), b.sqrt(), a * b - a, a.clamp(-1, 0.5), a.abs()]
    for row, (got, exact) in enumerate(zip(out, want, strict=True)):
        # division, square root, fma, clamp and abs are correctly rounded; the others within 2 units of the last place
        if row in (0, 4, 5, 6, 7):
            torch.testing.assert_close(got, exact.float(), rtol=0, atol=0)
        else:
            torch.testing.assert_close(got.double(), exact, rtol=2.4e-7, atol=1e-7)


def test_maximum_minimum_and_clamp_drop_nan_unless_told() -> None:
    nan = float("nan")
    x, y = torch.tensor([nan, 2.0, nan, -3.0]), torch.tensor([1.0, nan, nan, 0.5])
    out = torch.empty(5, 4)
    with repaired_interpreter():
        nan_kernel[(1,)](x, y, out, 4)
    want = torch.stack(
        [torch.fmax(x, y), torch.fmin(x, y), torch.maximum(x, y), torch.tensor([-1.0, 1, -1, -1]), x.clamp(-1, 1)]
    )
    torch.testing.assert_close(out, want, rtol=0, atol=0, equal_nan=True)


def test_loop_bounds_that_are_loaded() -> None:
    x, out = torch.randn(7, 16), torch.empty(16)
    with repaired_interpreter():
        loop_kernel[(1,)](x, torch.tensor([2, 6], dtype=torch.int32), out, 3, 16)
    torch.testing.assert_close(out, x[2:6].sum(0) * 8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_reductions(dtype: torch.dtype, recwarn: pytest.WarningsRecorder) -> None:
    x = torch.randn(16, 64).to(dtype)
    x[3, 5], x[4] = float("nan"), float("nan")
    out = torch.empty(3, 16)
    with repaired_interpreter():
        reduce_kernel[(1,)](x, out, 16, 64)
    drop = x.float().nan_to_num(nan=-1e9).amax(1), x.float().nan_to_num(nan=1e9).amin(1)
    rows = torch.arange(16) != 4
    torch.testing.assert_close(out[:2, rows], torch.stack(drop)[:, rows])
    assert out[:, 4].isnan().all()
    tolerance = 1e-5 if dtype == torch.float32 else 2**-7
    torch.testing.assert_close(out[2], x.float().sum(1), rtol=tolerance, atol=tolerance, equal_nan=True)
    assert not [w for w in recwarn if issubclass(w.category, RuntimeWarning)]


def test_nothing_is_left_behind() -> None:
    def state() -> list[object]:
        builder = internals.InterpreterBuilder
        return [
            *(vars(internals)[name] for name in ("_patch_lang", "TensorHandle")),
            *(getattr(builder, name) for name in ("cast_impl", "create_dot", "binary_op", "create_maxnumf")),
            internals.ReduceOps.sum,
            internals.ReduceOps.min_max,
            *(getattr(module, name) for module in (tl, tl.core) for name in ("load", "reduce", "range")),
            tl.dtype.to_ir,
            getattr(tl.tensor, "__index__", None),
            np.geterr(),
        ]

    before = state()
    with repaired_interpreter():
        assert state() != before
        with repaired_interpreter():
            out = torch.empty(3, 16)
            reduce_kernel[(1,)](torch.randn(16, 16), out, 16, 16)
    assert state() == before
    with pytest.raises(ZeroDivisionError), repaired_interpreter():
        raise ZeroDivisionError
    assert state() == before


def test_threads_take_turns() -> None:
    inputs = torch.randn(4, 1024)
    outs = [torch.empty(1024, dtype=torch.float8_e4m3fn) for _ in inputs]

    def work(i: int) -> None:
        for _ in range(5):
            with repaired_interpreter():
                cast_kernel[(1,)](inputs[i], outs[i], 1024, tl.float8e4nv)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for x, out in zip(inputs, outs, strict=True):
        assert torch.equal(out.float(), x.to(torch.float8_e4m3fn).float())


def test_unknown_internals_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(internals.InterpreterBuilder, "create_dot", lambda self, a, b: None)
    wanted = r"no InterpreterBuilder.create_dot\(self, a, b, d,"
    with pytest.raises(UnsupportedError, match=wanted), repaired_interpreter():
        pass


def test_a_switch_set_too_late_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tl, "max", object())
    with pytest.raises(UnsupportedError, match="before the process starts"), repaired_interpreter():
        pass


def test_compiled_kernels_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton.knobs.runtime, "interpret", False)
    original = internals.InterpreterBuilder.create_dot
    with repaired_interpreter():
        assert not interpreting()
        assert internals.InterpreterBuilder.create_dot is original
