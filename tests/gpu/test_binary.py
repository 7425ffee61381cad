"""Offline compilation and the counting of instructions, on kernels small enough to know their numbers."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402

from fpscompile.errors import UnsupportedError  # noqa: E402
from fpscompile.gpu import assembly, binary, compilation  # noqa: E402


@triton.jit
def product_kernel(a, b, out, steps, n: tl.constexpr, k: tl.constexpr, exponentials: tl.constexpr):
    """Per step: one [128, k] x [k, n] product, and exp2 of the result ``exponentials`` times."""
    rows, columns, depth = tl.arange(0, 128), tl.arange(0, n), tl.arange(0, k)
    left = tl.load(a + rows[:, None] * k + depth[None])
    total = tl.zeros([128, n], tl.float32)
    for step in range(steps):
        right = tl.load(b + step * n * k + columns[None] * k + depth[:, None])
        part = tl.dot(left, right)
        for _ in tl.static_range(exponentials):
            part = tl.exp2(part)
        total += part
    tl.store(out + rows[:, None] * n + columns[None], total)


@triton.jit
def two_loops_kernel(a, b, out, steps):
    """A loop of two products, then a loop of one, both inside a loop without any of its own."""
    at = tl.arange(0, 128)[:, None] * 128 + tl.arange(0, 128)[None]
    left = tl.load(a + at)
    for outer in range(steps):
        total = tl.zeros([128, 128], tl.float32)
        for step in range(steps):
            right = tl.load(b + step * 16384 + at)
            total = tl.dot(left, right, total)
            total = tl.dot(right, left, total)
        for step in range(steps):
            total = tl.dot(left, tl.load(b + step * 16384 + at), total)
        tl.store(out + outer * 16384 + at, total)


@triton.jit
def broken_kernel(a):
    tl.store(a, tl.load(a) + tl.zeros([3], tl.float32))


def meta(dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(0, dtype=dtype, device="meta")


def product(target: str, dtype: torch.dtype, n: int = 64, k: int = 128, exponentials: int = 1, **options: object):
    operand = meta(dtype)
    arguments = (operand, operand, meta(torch.float32), 77, n, k, exponentials)
    return binary.compile_kernel(product_kernel, arguments, {"num_warps": 4, **options}, target=target)


FP8 = {
    # target: the matrix instruction, and its number per step and warp for 4 warps of 32 rows each, n = 64, k = 128
    "cuda:89": ("QMMA.16832.F32.E4M3.E4M3", 2 * 8 * 4),
    "cuda:90": ("QGMMA.64x64x32.F32.E4M3.E4M3", 2 * 4),
    "cuda:120": ("QMMA.16832.F32.E4M3.E4M3", 2 * 8 * 4),
}


@pytest.mark.parametrize("target", FP8)
def test_fp8_loop_counts(target: str) -> None:
    report = product(target, torch.float8_e4m3fn)
    loop = report.main_loop
    name, number = FP8[target]
    assert loop.tensor == {name: number}
    assert loop.flops == 2 * 128 * 64 * 128 // 4
    assert loop.every["mufu"] == 128 * 64 // (4 * 32)
    assert report.spill_bytes == 0
    assert report.num_warps == 4
    assert report.target == target
    assert 0 < report.registers <= 255
    assert report.shared_bytes > 128 * 128


def test_bf16_targets() -> None:
    assert product("cuda:80", torch.bfloat16).main_loop.tensor == {"HMMA.16816.F32.BF16": 2 * 8 * 8}
    assert product("cuda:90", torch.bfloat16).main_loop.tensor == {"HGMMA.64x64x16.F32.BF16": 2 * 8}


def test_blackwell_and_amd() -> None:
    loop = product("cuda:100", torch.float8_e4m3fn).main_loop
    assert set(loop.tensor) == {"UTCQMMA"}
    assert loop.flops is None
    report = product("hip:gfx942", torch.float8_e4m3fnuz)
    assert report.main_loop.flops == 2 * 128 * 64 * 128 // 4
    assert all("mfma" in name and "fp8" in name for name in report.main_loop.tensor)
    assert report.main_loop.every["mufu"] == 128 * 64 // (4 * 64)


def test_counts_follow_the_work() -> None:
    once, twice = (product("cuda:90", torch.float8_e4m3fn, exponentials=e).main_loop for e in (1, 2))
    assert twice.every["mufu"] == 2 * once.every["mufu"]
    half = product("cuda:90", torch.float8_e4m3fn, n=32).main_loop
    assert half.tensor == {"QGMMA.64x32x32.F32.E4M3.E4M3": 8}
    assert half.every["mufu"] * 2 == once.every["mufu"]
    eight = product("cuda:90", torch.float8_e4m3fn, num_warps=8).main_loop
    assert eight.flops * 2 == once.flops


def test_registers_are_those_of_tritons_own_binary(tmp_path: Path) -> None:
    artifacts = compilation.compile_artifacts(
        product_kernel,
        (*[meta(torch.float8_e4m3fn)] * 2, meta(torch.float32), 77, 64, 128, 1),
        {"num_warps": 4},
        target="cuda:90",
    )
    (tmp_path / "kernel.cubin").write_bytes(artifacts.texts["cubin"])
    command = [binary.tool("cuobjdump"), "-res-usage", str(tmp_path / "kernel.cubin")]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert f"REG:{binary.inspect_artifacts(artifacts).registers} " in text


def test_spills_are_reported() -> None:
    report = product("cuda:90", torch.float8_e4m3fn, n=128)
    assert report.spill_bytes > 0
    assert report.opcodes["STL"] > 0
    assert report.registers == 255


def test_innermost_loops_with_products() -> None:
    arguments = (meta(torch.bfloat16), meta(torch.bfloat16), meta(torch.float32), 77)
    report = binary.compile_kernel(two_loops_kernel, arguments, {"num_warps": 8, "num_stages": 2}, target="cuda:90")
    assert [sum(loop.tensor.values()) for loop in report.loops] == [16, 8]
    assert report.main_loop is report.loops[0]


def test_errors_name_the_kernel() -> None:
    with pytest.raises(compilation.BinaryError, match="broken_kernel does not compile for cuda:90"):
        binary.compile_kernel(broken_kernel, (meta(torch.float32),), target="cuda:90")
    with pytest.raises(UnsupportedError, match="target 'cpu' is not a GPU"):
        binary.compile_kernel(broken_kernel, (meta(torch.float32),), target="cpu")


def test_serialized_products_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    line = "ptxas info    : (C7510) Potential Performance Loss: wgmma.mma_async instructions are serialized"
    original = binary._ptxas_log
    monkeypatch.setattr(binary, "_ptxas_log", lambda ptx, target: f"{line} in 'f'\n{original(ptx, target)}")
    with pytest.raises(compilation.BinaryError, match="C7510"):
        product("cuda:90", torch.float8_e4m3fn)


def test_a_kernel_without_products_has_no_main_loop() -> None:
    report = dataclasses.replace(product("cuda:90", torch.float8_e4m3fn), loops=())
    with pytest.raises(compilation.BinaryError, match="no loop with matrix instructions"):
        _ = report.main_loop


def test_it_asks_the_assembler_that_triton_is_told_to_use(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Inductor names torch's own, which may be newer than that of Triton's wheel and so read newer PTX."""
    called, other = tmp_path / "called", tmp_path / "ptxas"
    other.write_text(f'#!/bin/sh\necho "$@" >> {called}\nexec {binary.tool("ptxas")} "$@"\n')
    other.chmod(0o755)
    monkeypatch.setenv("TRITON_PTXAS_PATH", str(other))
    assert binary.tool("ptxas") == str(other)
    assert product("cuda:90", torch.float8_e4m3fn).registers > 0
    assert "-v" in called.read_text()


def test_no_such_tool() -> None:
    with pytest.raises(compilation.BinaryError, match="no nvlink"):
        binary.tool("nvlink")


@pytest.mark.slow
@pytest.mark.parametrize("interpret", ["0", "1"])
def test_interpreting_or_not_the_report_is_the_same(interpret: str) -> None:
    code = "import test_binary, torch; print(test_binary.product('cuda:90', torch.float8_e4m3fn).main_loop)"
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parent,
        env={**os.environ, "TRITON_INTERPRET": interpret},
        check=False,
    )
    assert done.stdout.strip() == str(product("cuda:90", torch.float8_e4m3fn).main_loop), done.stderr


SASS = """
        /*0000*/                   MOV R1, R2 ;
        /*0010*/                   ISETP.GE.AND P0, PT, R1, R2, PT ;
        /*0020*/               @P0 BRA 0xd0 ;
        /*0030*/                   LDGSTS.E.BYPASS.128 [R1], desc[UR4][R2.64] ;
        /*0040*/                   HGMMA.64x64x16.F32.BF16 R24, gdesc[UR4], !UPT ;
        /*0050*/                   BRA.U !UP0, 0x80 ;
        /*0060*/                   FSEL R3, R3, -INF , P1 ;
        /*0070*/                   FSEL R4, R4, -INF , P1 ;
        /*0080*/                   MUFU.EX2 R3, R3 ;
        /*0090*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P2, [UR4], R3 ;
        /*00a0*/              @!P2 BRA 0x100 ;
        /*00b0*/                   F2FP.SATFINITE.E4M3.F32.PACK_AB_MERGE_C R4, R5, R4, RZ ;
        /*00c0*/              @!P1 BRA 0x30 ;
        /*00d0*/                   STG.E desc[UR4][R2.64], R3 ;
        /*00e0*/                   EXIT ;
        /*00f0*/                   BRA 0xf0 ;
        /*0100*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P2, [UR4], R3 ;
        /*0110*/              @!P2 BRA 0x100 ;
        /*0120*/                   BRA 0xb0 ;
        /*0130*/                   BRA 0x130 ;
"""


def test_blocks_that_may_be_skipped_are_counted_apart() -> None:
    (loop,) = assembly.loops(assembly.parse_sass(SASS))
    assert loop.start == 0x30
    assert loop.every == {"async_copy": 1, "control": 3, "convert": 1, "mufu": 1, "sync": 1, "tensor": 1}
    assert loop.some == {"control": 2, "select": 2, "sync": 1}
    assert loop.tensor == {"HGMMA.64x64x16.F32.BF16": 1}
    assert loop.total == 8
    assert loop.flops == 2 * 64 * 64 * 16 // 4
    assert loop.opcodes["MUFU"] == 1


def test_branches_with_condition_and_calls_that_return() -> None:
    text = """
        /*0000*/                   HMMA.16816.F32 R4, R8, R12, R4 ;
        /*0010*/                   CALL.REL.NOINC 0x50 ;
        /*0020*/              @!P5 CALL.REL.NOINC 0x40 ;
        /*0030*/                   BRA 0x0 ;
        /*0040*/                   EXIT ;
        /*0050*/                   RET.REL.NODEC R2 0x0 ;
    """
    (loop,) = assembly.loops(assembly.parse_sass(text))
    assert loop.every == {"control": 3, "tensor": 1}
    assert assembly.loops([]) == ()


@pytest.mark.parametrize(
    ("opcode", "kind"),
    [
        ("QGMMA.64x128x32.F32.E4M3.E4M3", "tensor"),
        ("UTCQMMA", "tensor"),
        ("MUFU.EX2", "mufu"),
        ("F2FP.BF16.F32.PACK_AB", "convert"),
        ("FFMA2", "float"),
        ("FMNMX3", "minmax"),
        ("SHFL.BFLY", "shuffle"),
        ("PRMT", "permute"),
        ("LDSM.16.M88.4", "shared_load"),
        ("STSM.16.M88.4", "shared_store"),
        ("LDG.E.128", "global_load"),
        ("LDGSTS.E.BYPASS.128", "async_copy"),
        ("UTMALDG.4D", "async_copy"),
        ("SYNCS.ARRIVE.TRANS64", "sync"),
        ("BAR.SYNC.DEFER_BLOCKING", "sync"),
        ("STL.64", "local"),
        ("ULEA.HI", "uniform"),
        ("IMAD.WIDE", "integer"),
        ("SOMETHINGNEW", "other"),
        ("v_mfma_f32_32x32x16_fp8_fp8", "tensor"),
        ("v_exp_f32_e32", "mufu"),
        ("v_cvt_pk_fp8_f32", "convert"),
        ("v_fma_f32", "float"),
        ("v_pk_mul_f32", "float"),
        ("v_max3_f32", "minmax"),
        ("v_cndmask_b32_e64", "select"),
        ("v_mov_b32_dpp", "shuffle"),
        ("ds_read_b64", "shared_load"),
        ("ds_write_b128", "shared_store"),
        ("buffer_load_dwordx4", "global_load"),
        ("s_waitcnt", "sync"),
        ("s_add_u32", "uniform"),
        ("v_add_u32_e32", "integer"),
    ],
)
def test_classes(opcode: str, kind: str) -> None:
    assert assembly.classify(opcode) == kind
    assert kind in assembly.CLASSES


@pytest.mark.parametrize(
    ("opcode", "flops"),
    [
        ("QGMMA.64x128x32.F32.E4M3.E4M3", 2 * 64 * 128 * 32 // 4),
        ("HMMA.16816.F32.BF16", 2 * 16 * 8 * 16),
        ("QMMA.16832.F32.E4M3.E4M3", 2 * 16 * 8 * 32),
        ("HMMA.1688.F32.TF32", 2 * 16 * 8 * 8),
        ("v_mfma_f32_16x16x32_fp8_fp8", 2 * 16 * 16 * 32),
        ("UTCQMMA", None),
    ],
)
def test_flops_of_an_instruction(opcode: str, flops: int | None) -> None:
    assert assembly.mma_flops(opcode) == flops
