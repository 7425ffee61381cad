"""The generated C++ kernel against the oracle in float64, and its build: cache, probe, threads."""

from __future__ import annotations

import ctypes
import math
import os
import subprocess
import sys

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fpscompile import cpp_build, reference, render
from fpscompile.errors import CompilerMissingError, UnsupportedError
from fpscompile.kernel_spec import KernelSpec
from fpscompile.lowerings import boxes, cpp
from fpscompile.masks import BlockMask
from fpscompile.plan import PhasePlan, Plan, ResolvedPlan, resolve
from fpscompile.render import COMPUTE, CppConfig

TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 6e-3}
"""Norm of the difference over norm of the expected output. bfloat16 rounds P and the output to 8 bits each."""

LSE_TOLERANCE = 1e-4
"""Largest difference: scores are accumulated in float32 for every dtype."""

DTYPES = tuple(TOLERANCE)
GRID = (5, 6, 9)
TILE = (2, 4, 4)
WINDOW = (2, 1, 2)
FULL = (99, 99, 99)

needs_kernel = pytest.mark.skipif(
    cpp_build.unavailable() is not None, reason=f"the kernel cannot run here: {cpp_build.unavailable()}"
)


def need(dtype: torch.dtype) -> None:
    reason = cpp_build.unavailable(COMPUTE[str(dtype).removeprefix("torch.")])
    if reason is not None:
        pytest.skip(reason)


def make_resolved(
    *windows: tuple[int, int, int],
    grid: tuple[int, int, int] = GRID,
    tile: tuple[int, int, int] = TILE,
    q_others: tuple[int, int] = (0, 0),
    k_others: tuple[int, int] = (0, 0),
    quant: str = "none",
) -> ResolvedPlan:
    video = math.prod(grid)
    plan = Plan(tile, tuple(PhasePlan(window=window) for window in windows), lowering="cpp", quant=quant)
    return resolve(plan, grid, video + sum(q_others), video + sum(k_others), q_others[0], k_others[0])


def make_inputs(
    resolved: ResolvedPlan,
    *,
    batch: int = 2,
    heads: int = 2,
    key_heads: int | None = None,
    d: int = 64,
    d_v: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> list[torch.Tensor]:
    """q, k, v with the strides that models give them."""
    key_heads, d_v = key_heads or heads, d_v or d
    lq, lk = resolved.q_layout.length, resolved.k_layout.length
    sizes = [(lq, heads, d), (lk, key_heads, d), (lk, key_heads, d_v)]
    return [torch.randn(batch, *size).to(dtype).transpose(1, 2) for size in sizes]


def check(
    resolved: ResolvedPlan,
    tensors: list[torch.Tensor],
    *,
    phases: tuple[int, ...] | None = None,
    key_mask: torch.Tensor | None = None,
    scale: float = 0.2,
    block_mask: BlockMask | None = None,
    config: CppConfig | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Assert that output and log-sum-exp equal the oracle's; returns them."""
    q, k, v = tensors
    need(q.dtype)
    common = {"key_mask": key_mask, "resolved": resolved, "scale": scale, "block_mask": block_mask}
    phases = phases or (0,) * q.shape[0]
    out, lse = cpp.forward(q, k, v, phases=phases, config=config, **common)
    expected, expected_lse = reference.attention(q.double(), k.double(), v.double(), phase=phases, **common)
    assert out.shape == expected.shape
    assert out.dtype == q.dtype
    assert out.transpose(1, 2).is_contiguous()
    assert lse.is_contiguous()
    assert lse.dtype == torch.float32
    difference = (out.double() - expected).norm() / expected.norm().clamp(min=1e-3)
    assert float(difference) <= TOLERANCE[q.dtype]
    assert torch.equal(lse.isinf(), expected_lse.isinf())
    finite = ~lse.isinf()
    torch.testing.assert_close(lse[finite].double(), expected_lse[finite], atol=LSE_TOLERANCE, rtol=1e-5)
    return out, lse


def make_mask(kind: str, batch: int, heads: int, keys: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    keep = torch.rand(batch, heads, 1, keys) < 0.6
    return keep if kind == "bool" else torch.randn(batch, heads, 1, keys).masked_fill(~keep, -torch.inf).to(dtype)


HEAD_DIMS = [(32, 32), (72, 88), (96, 64), (128, 128), (33, 47), (256, 256)]


@needs_kernel
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("d", "d_v"), [(64, 64), *(pytest.param(d, d_v, marks=pytest.mark.slow) for d, d_v in HEAD_DIMS)]
)
def test_dtypes_and_head_dims(dtype, d, d_v):
    resolved = make_resolved(WINDOW, FULL, q_others=(3, 5), k_others=(3, 5))
    check(resolved, make_inputs(resolved, d=d, d_v=d_v, dtype=dtype), phases=(0, 1))


@needs_kernel
@pytest.mark.parametrize(("dtype", "d", "d_v"), [(torch.bfloat16, 72, 40), (torch.float32, 33, 128)])
def test_value_dim_differs(dtype, d, d_v):
    resolved = make_resolved(WINDOW)
    check(resolved, make_inputs(resolved, d=d, d_v=d_v, dtype=dtype))


sizes = st.integers(1, 9)
others = st.tuples(st.sampled_from([0, 1, 7, 40]), st.sampled_from([0, 2, 33]))


@needs_kernel
@settings(max_examples=40)
@given(
    grid=st.tuples(sizes, sizes, sizes),
    window=st.tuples(*[st.integers(1, 3)] * 3),
    q_others=others,
    k_others=others,
    heads=st.sampled_from([(1, 1), (2, 1), (4, 2)]),
    phases=st.sampled_from([(0,), (0, 1), (1, 0, 0)]),
    mask=st.sampled_from([None, "bool", "float"]),
    mask_shape=st.tuples(st.booleans(), st.booleans()),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
@example((1, 1, 1), (1, 1, 1), (0, 0), (0, 0), (1, 1), (0,), None, (False, False), torch.float32)
@example((8, 8, 8), (2, 2, 1), (1, 2), (40, 33), (4, 2), (0, 1), "float", (True, True), torch.bfloat16)
def test_any_small_shape(grid, window, q_others, k_others, heads, phases, mask, mask_shape, dtype):
    """Ragged grids, text at either end and of different lengths, grouped queries, mixed phases, every kind of mask."""
    resolved = make_resolved(window, FULL, grid=grid, q_others=q_others, k_others=k_others)
    batch = len(phases)
    tensors = make_inputs(resolved, batch=batch, heads=heads[0], key_heads=heads[1], dtype=dtype)
    key_mask = None
    if mask is not None:
        lk = resolved.k_layout.length
        key_mask = make_mask(mask, batch if mask_shape[0] else 1, heads[0] if mask_shape[1] else 1, lk, dtype)
    check(resolved, tensors, phases=phases, key_mask=key_mask)


@needs_kernel
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("config", [(16, 64), (64, 128)])
def test_blocks_split_anywhere(dtype, config):
    """Tiles of 256 tokens and ragged ones, in blocks smaller than a tile: rows, runs and blocks all end mid-tile."""
    resolved = make_resolved((2, 2, 2), grid=(5, 13, 22), tile=(4, 8, 8), k_others=(5, 100))
    compute = COMPUTE[str(dtype).removeprefix("torch.")]
    check(resolved, make_inputs(resolved, batch=1, dtype=dtype), config=CppConfig(*config, compute))


@needs_kernel
@pytest.mark.parametrize("layout", ["contiguous", "features first", "expanded", "sliced", "misaligned"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_strides(layout, dtype):
    resolved = make_resolved(WINDOW)
    tensors = make_inputs(resolved, dtype=dtype)
    if layout == "contiguous":
        tensors = [x.contiguous() for x in tensors]
    elif layout == "features first":
        tensors = [x.mT.contiguous().mT for x in tensors]
    elif layout == "expanded":
        tensors = [x[:1, :1].expand(2, 2, -1, -1) for x in tensors]
    elif layout == "sliced":
        tensors = [torch.stack([x, x + 1], -2).flatten(3)[..., : x.shape[-1]] for x in tensors]
    else:
        tensors = [torch.cat([x.new_ones(1), x.flatten()])[1:].view(x.shape) for x in tensors]
    check(resolved, tensors)


@needs_kernel
@pytest.mark.parametrize("scale", [-0.3, 0.0, 40.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_scales(scale, dtype):
    """A negative scale turns the maximum around; a large one makes rows that grow their maximum again and again."""
    resolved = make_resolved(FULL)
    q, k, v = make_inputs(resolved, dtype=dtype)
    need(dtype)
    out, lse = cpp.forward(q, k, v, key_mask=None, phases=(0, 0), resolved=resolved, scale=scale)
    expected, expected_lse = reference.attention(
        q.double(), k.double(), v.double(), resolved=resolved, phase=(0, 0), scale=scale
    )
    # the scores' own rounding, 2^-23 of about 40 * 8 * 5, moves a peaked softmax
    tolerance = TOLERANCE[dtype] * (50 if scale == 40.0 and dtype == torch.float32 else 1)
    assert float((out - expected).norm() / expected.norm()) <= tolerance
    torch.testing.assert_close(lse.double(), expected_lse, atol=1e-3, rtol=1e-5)


@needs_kernel
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rows_without_a_visible_key(dtype):
    """Zeros and -inf: all keys of one element, the keys of one tile row, and a query tile that lists nothing."""
    resolved = make_resolved((1, 1, 1))
    keep = torch.ones(2, 1, 1, resolved.k_layout.length, dtype=torch.bool)
    keep[0] = False
    keep[1, ..., : 2 * 6 * 9] = False
    out, lse = check(resolved, make_inputs(resolved, dtype=dtype), key_mask=keep)
    assert torch.equal(out[0], torch.zeros_like(out[0]))
    assert (lse[0] == -torch.inf).all()
    assert (lse[1, :, : 2 * 6 * 9] == -torch.inf).all()
    assert lse[1, :, 2 * 6 * 9 :].isfinite().all()

    mask = resolved.block_mask
    nothing = BlockMask(torch.zeros_like(mask.kv_num_blocks), mask.kv_indices)
    out, lse = check(resolved, make_inputs(resolved, dtype=dtype), block_mask=nothing)
    assert not out.any()


@needs_kernel
def test_masks_per_head():
    """Any block mask, one per head, as data."""
    resolved = make_resolved(FULL, FULL)
    tiles = resolved.k_layout.n_tiles
    dense = torch.rand(2, 4, resolved.q_layout.n_tiles, tiles) < 0.4
    check(resolved, make_inputs(resolved, heads=4, key_heads=2), phases=(1, 0), block_mask=BlockMask.from_dense(dense))


@needs_kernel
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("where", ["q", "k", "v"])
def test_bad_values_spread_no_further_than_the_mask(dtype, value, where):
    """A NaN or Inf spoils what dense attention would spoil among the visible tokens, and nothing else."""
    need(dtype)
    resolved = make_resolved(WINDOW)
    tensors = dict(zip("qkv", make_inputs(resolved, dtype=dtype), strict=True))
    tensors[where][1, 0, 17, 3] = value
    common = {"key_mask": None, "phases": (0, 0), "resolved": resolved, "scale": 0.3}
    out, lse = cpp.forward(*tensors.values(), **common)
    wanted, wanted_lse = boxes.forward(*(x.float() for x in tensors.values()), **common)
    assert not wanted.isfinite().all()
    assert torch.equal(out.isfinite(), wanted.isfinite())
    assert torch.equal(out.isnan(), wanted.isnan())
    assert torch.equal(lse.isfinite(), wanted_lse.isfinite())
    fine = wanted.isfinite()
    torch.testing.assert_close(out[fine].float(), wanted[fine], atol=0.03 if dtype == torch.bfloat16 else 1e-5, rtol=0)


@needs_kernel
def test_hidden_keys_are_not_read():
    """Padding keys may hold anything when a whole tile of them is masked: text padding must not cost or leak."""
    resolved = make_resolved(FULL, k_others=(0, 64))
    q, k, v = make_inputs(resolved)
    keep = torch.ones(1, 1, 1, resolved.k_layout.length, dtype=torch.bool)
    keep[..., -64:] = False
    clean, _ = check(resolved, [q, k, v], key_mask=keep)
    k[:, :, -64:] = torch.nan
    v[:, :, -64:] = torch.nan
    out, _ = cpp.forward(q, k, v, key_mask=keep, phases=(0, 0), resolved=resolved, scale=0.2)
    assert torch.equal(out, clean)


@needs_kernel
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_threads_change_nothing_and_need_no_build(dtype):
    need(dtype)
    resolved = make_resolved(WINDOW, k_others=(1, 2))
    q, k, v = make_inputs(resolved, dtype=dtype)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(cpp.forward(q, k, v, key_mask=None, phases=(0, 0), resolved=resolved, scale=0.2))
    finally:
        torch.set_num_threads(threads)
    for out, lse in results[1:]:
        assert torch.equal(out, results[0][0])
        assert torch.equal(lse, results[0][1])


@needs_kernel
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_backward_from_the_kernels_output(dtype):
    need(dtype)
    resolved = make_resolved(WINDOW, k_others=(0, 3))
    q, k, v = make_inputs(resolved, heads=2, key_heads=1, dtype=dtype)
    common = {"key_mask": make_mask("bool", 2, 1, k.shape[2]), "phases": (0, 0), "resolved": resolved, "scale": 0.2}
    out, lse = cpp.forward(q, k, v, **common)
    grad = torch.randn(out.shape).to(dtype)
    grads = cpp.backward(grad, q, k, v, out, lse, **common)
    leaves = [x.double().requires_grad_() for x in (q, k, v)]
    expected, _ = reference.attention(*leaves, resolved=resolved, phase=(0, 0), key_mask=common["key_mask"], scale=0.2)
    for actual, wanted in zip(grads, torch.autograd.grad(expected, leaves, grad.double()), strict=True):
        assert actual.transpose(1, 2).is_contiguous()
        assert float((actual - wanted).norm() / wanted.norm()) <= (3e-2 if dtype == torch.bfloat16 else 1e-5)


@needs_kernel
def test_an_error_inside_the_kernel_is_an_exception_outside(monkeypatch):
    resolved = make_resolved(WINDOW)
    rows = cpp._query_table(resolved.q_layout, 1024) * torch.tensor([1, 1, 100])
    monkeypatch.setattr(cpp, "_query_table", lambda *_: rows)
    with pytest.raises(UnsupportedError, match="longer than BLOCK_M; choose lowering='boxes'"):
        cpp.forward(*make_inputs(resolved), key_mask=None, phases=(0, 0), resolved=resolved, scale=0.2)


@needs_kernel
def test_empty_tensors():
    resolved = make_resolved(WINDOW)
    q, k, v = make_inputs(resolved, batch=1)
    out, lse = cpp.forward(q[:0], k[:0], v[:0], key_mask=None, phases=(), resolved=resolved, scale=0.2)
    assert out.shape == (0, 2, resolved.q_layout.length, 64)
    assert lse.shape == (0, 2, resolved.q_layout.length)


@pytest.mark.parametrize(
    ("dtype", "d", "quant", "reason"),
    [
        (torch.float64, 64, "none", "not float64"),
        (torch.float32, 24, "none", "head_dim=24 is outside 32 to 256"),
        (torch.float32, 288, "none", "head_dim=288 is outside"),
        (torch.float32, 64, "fp8", "quant='fp8'"),
    ],
)
def test_refusals(dtype, d, quant, reason):
    resolved = make_resolved(WINDOW, quant=quant)
    q, k, v = make_inputs(resolved, d=d, dtype=dtype)
    assert reason in cpp.why_not(dtype, d, d, resolved.plan)
    with pytest.raises(UnsupportedError, match=rf"lowering 'cpp'.*{reason}.*choose lowering='boxes'"):
        cpp.forward(q, k, v, key_mask=None, phases=(0, 0), resolved=resolved, scale=1.0)


def test_other_devices_are_refused():
    assert "the site is on cuda" in cpp.why_not(torch.float32, 64, 64, make_resolved(WINDOW).plan, "cuda")


# -------------------------------------------------------------------------------------------- build, cache, probe


@pytest.fixture
def fresh_probe():
    cpp_build.forget()
    yield
    cpp_build.forget()


def test_unavailable_without_a_compiler(fresh_probe, tmp_path):
    import torch._inductor.config as inductor_config

    with inductor_config.patch({"cpp.cxx": (str(tmp_path / "no-such-compiler"),)}):
        reason = cpp_build.unavailable()
        assert reason is not None
        assert "install g++" in reason
        with pytest.raises(CompilerMissingError, match="CXX"):
            cpp_build.compiler()


def test_unavailable_without_the_instructions(monkeypatch, fresh_probe):
    with monkeypatch.context() as patch:
        patch.setattr(cpp_build, "processor_flags", lambda: frozenset({"avx2", "fma", "f16c"}))
        assert "lacks avx512f" in cpp_build.unavailable("bfloat16")
        assert "lacks" not in (cpp_build.unavailable("float32") or "")


def test_unavailable_without_the_symbol(monkeypatch, fresh_probe):
    monkeypatch.setitem(cpp_build.CPU_FLAGS, "float32", ())
    monkeypatch.setitem(cpp_build.SYMBOLS, "float32", "no_such_symbol")
    assert "does not export" in cpp_build.unavailable("float32")


@needs_kernel
def test_mkldnn_may_be_switched_off_after_the_probe(monkeypatch):
    assert cpp_build.unavailable() is None
    resolved = make_resolved(WINDOW)
    with monkeypatch.context() as patch:
        patch.setattr(torch.backends.mkldnn, "enabled", False)
        assert "oneDNN is off" in cpp_build.unavailable()
        with pytest.raises(UnsupportedError, match="oneDNN is off"):
            cpp.forward(*make_inputs(resolved), key_mask=None, phases=(0, 0), resolved=resolved, scale=1.0)
    assert cpp_build.unavailable() is None


SOURCE = 'extern "C" __attribute__((visibility("default"))) int answer() { return %d; }\n'


@needs_kernel
def test_cache(cold_caches, monkeypatch, fresh_probe):
    """Built once, found by name afterwards, in this process and in the next; other inputs give other names."""
    source = SOURCE % 42
    assert cpp_build.load(source).answer() == 42
    assert cpp_build.cache_folder() == cold_caches / "fps" / "cpp"
    library = cold_caches / "fps" / "cpp" / f"{cpp_build.library_key(source)}.so"
    built = library.stat().st_mtime_ns
    left = {path.suffix for path in library.parent.iterdir()}
    assert left == {".so", ".cpp", ".lock"}

    cpp_build.forget()
    monkeypatch.setattr(cpp_build, "_write", lambda *_: pytest.fail("a cached library was built again"))
    assert cpp_build.load(source).answer() == 42
    assert library.stat().st_mtime_ns == built

    keys = {cpp_build.library_key(source), cpp_build.library_key(SOURCE % 43)}
    with monkeypatch.context() as patch:
        patch.setattr(cpp_build, "FLAGS", (*cpp_build.FLAGS, "-O1"))
        keys.add(cpp_build.library_key(source))
        patch.setattr(cpp_build, "processor_flags", lambda: frozenset({"avx2"}))
        keys.add(cpp_build.library_key(source))
    assert len(keys) == 4


@needs_kernel
def test_a_source_that_does_not_compile(cold_caches, fresh_probe):
    with pytest.raises(UnsupportedError, match=r"rejects .*\.cpp; choose lowering='boxes'"):
        cpp_build.load("this is not C++\n")
    assert not list((cold_caches / "fps" / "cpp").glob("*.so"))


@needs_kernel
def test_a_broken_library_is_named(cold_caches, fresh_probe):
    source = SOURCE % 7
    folder = cpp_build.cache_folder()
    folder.mkdir(parents=True)
    (folder / f"{cpp_build.library_key(source)}.so").write_bytes(b"not a library")
    with pytest.raises(UnsupportedError, match=r"cannot be loaded.*delete it"):
        cpp_build.load(source)


@needs_kernel
@pytest.mark.slow
def test_many_processes_build_once(cold_caches):
    code = f"from fpscompile import cpp_build; assert cpp_build.load({SOURCE % 5!r}).answer() == 5"
    processes = [subprocess.Popen([sys.executable, "-c", code], env=dict(os.environ)) for _ in range(3)]
    assert [process.wait() for process in processes] == [0, 0, 0]
    assert len(list((cold_caches / "fps" / "cpp").glob("*.so"))) == 1


def _openmp_runtimes() -> set[str]:
    with open("/proc/self/maps") as maps:
        return {line.split()[-1] for line in maps if "libgomp" in line or "libomp" in line or "libiomp" in line}


@needs_kernel
def test_threads_are_torchs_own(cold_caches, fresh_probe):
    """A second OpenMP would bring threads of its own, spinning beside torch's."""
    before = _openmp_runtimes()
    assert before
    source = "#include <omp.h>\n" + SOURCE.replace("%d", "omp_get_max_threads()")
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert cpp_build.load(source).answer() == 3
    finally:
        torch.set_num_threads(threads)
    assert _openmp_runtimes() == before


@needs_kernel
def test_arguments_have_the_size_that_the_kernel_expects():
    library = cpp_build.load(render.render(KernelSpec("cpu", "float32", 64, 64, TILE)))
    library.fps_call_bytes.restype = ctypes.c_int64
    assert library.fps_call_bytes() == ctypes.sizeof(cpp._Call)


@needs_kernel
@pytest.mark.slow
@pytest.mark.parametrize("flags", [("-march=x86-64-v3",), ("-fsanitize=undefined", "-fno-sanitize-recover=all")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_other_builds(flags, dtype, cold_caches, monkeypatch):
    """Without AVX-512, and with undefined behaviour checked: the same results."""
    monkeypatch.setattr(cpp_build, "FLAGS", (*cpp_build.FLAGS, *flags))
    cpp._kernel.cache_clear()
    try:
        resolved = make_resolved(WINDOW, (1, 1, 1), k_others=(3, 5))
        mask = make_mask("float", 2, 2, resolved.k_layout.length)
        check(resolved, make_inputs(resolved, d=72, d_v=40, dtype=dtype), phases=(0, 1), key_mask=mask)
    finally:
        cpp._kernel.cache_clear()
