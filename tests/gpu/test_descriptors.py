"""Descriptors of warpgroup products: what is computed from machine code, on listings whose values are known."""

from __future__ import annotations

import random

import pytest

from fpscompile.gpu import assembly, descriptors
from fpscompile.gpu.descriptors import ANY, WORD

PTX = """
    bfe.u32 %r1, %r0, 4, 14;
    cvt.u64.u32 %rd1, %r1;
    or.b64 %rd2, %rd1, -9223371899415822336;
    add.s64 %rd3, %rd1, -9223371899415822272;
    mov.b64 %rd4, %rd3;
    or.b64 %rd5, %rd1, 4611686293305294848;
    wgmma.mma_async.sync.aligned.m64n32k16.f32.bf16.bf16 {%r2,%r3}, {%r4,%r5}, %rd2, %p1, 1, 1, 1;
    wgmma.mma_async.sync.aligned.m64n32k16.f32.bf16.bf16 {%r2,%r3}, {%r4,%r5}, %rd4, %p1, 1, 1, 1;
    wgmma.mma_async.sync.aligned.m64n64k32.f32.e4m3.e4m3 {%r2,%r3}, %rd5, %rd2, 0, 1, 1;
"""
"""Upper words 0x80000020 (64-byte rows) and 0x40000040 (128-byte rows); the second product is 0x40 further on."""

GOOD = """
    UIADD3 UR4, UR12, 0x3000, URZ
    USHF.R.U32.HI UR4, URZ, 0x4, UR4
    USGXT.U32 UR4, UR4, 0xe
    UMOV UR5, URZ
    UIADD3 UR26, UP0, UR4, 0x40, URZ
    UIADD3.X UR27, UR5, -0x7fffffe0, URZ, UP0, !UPT
    UMOV UR18, UR4
    UMOV UR19, 0x80000020
    HGMMA.64x32x16.F32.BF16 R88, R24, gdesc[UR16].tnspB, R88
    HGMMA.64x32x16.F32.BF16 R88, R28, gdesc[UR24].tnspB, R88
    ULOP3.LUT UR16, UR7, 0x3fff, URZ, 0xc0, !UPT
    UMOV UR17, 0x40000040
    QGMMA.64x64x32.F32.E4M3.E4M3 R24, gdesc[UR16], RZ, !UPT, gsb0
    EXIT
"""


@pytest.fixture(autouse=True)
def _begun(monkeypatch: pytest.MonkeyPatch) -> None:
    """Listings here are parts of kernels: what came before has written all registers but UR18."""
    monkeypatch.setattr(descriptors, "_UNWRITTEN", {"?UR18": descriptors._TRUE})


def listing(text: str) -> list[assembly.Instruction]:
    lines = [line.strip() for line in text.strip().splitlines()]
    return assembly.parse_sass("\n".join(f"/*{16 * i:04x}*/ {line} ;" for i, line in enumerate(lines)))


def test_descriptors_of_the_ptx_are_recognised() -> None:
    assert descriptors.findings(listing(GOOD), PTX) == ()


@pytest.mark.parametrize(
    ("old", "new", "place"),
    [
        ("UMOV UR5, URZ", "UMOV UR5, 0x80000020", 0x90),  # an offset added to a descriptor, not to an address
        ("UIADD3 UR26, UP0, UR4, 0x40, URZ", "UIADD3 UR26, UP0, UR6, 0x40, URZ", 0x90),  # of another register
        ("UIADD3 UR26, UP0, UR4, 0x40, URZ", "UIADD3 UR26, UP0, UR4, 0x80, URZ", 0x90),  # of another product
        ("UMOV UR19, 0x80000020", "UMOV UR18, 0x80000020", 0x80),
        ("UMOV UR17, 0x40000040", "UMOV UR17, 0x80000020", 0xC0),
    ],
)
def test_each_damage_is_found(old: str, new: str, place: int) -> None:
    assert old in GOOD
    found = descriptors.findings(listing(GOOD.replace(old, new)), PTX)
    assert found
    assert f"at {place:#x}:" in found[0].text


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("add.s64 %rd3, %rd1, -9223371899415822272", "mad.wide.u32 %rd3, %r1, %r7, %rd6"),  # an unknown operation
        ("m64n64k32.f32.e4m3.e4m3 {%r2,%r3}", "m64n64k32.f32.e4m3.e4m3.new [%r2]"),  # a spelling that is not known
    ],
)
def test_what_is_not_understood_is_no_certain_damage(old: str, new: str) -> None:
    """A later Triton may write its PTX in other ways; that must not refuse a good kernel."""
    assert old in PTX
    found = descriptors.findings(listing(GOOD), PTX.replace(old, new))
    assert found
    assert not any(item.certain for item in found)


def test_a_register_that_only_one_way_sets_is_damage() -> None:
    """What ptxas 12.8 made of a second loop: the pair still holds what the first loop left there, if that ran."""
    text = """
        USGXT.U32 UR4, UR4, 0xe
        UMOV UR5, URZ
        @P0 BRA 0x50
        USGXT.U32 UR6, UR7, 0xe
        UMOV UR9, 0x80000020
        UIADD3 UR26, UP0, UR6, 0x40, URZ
        UIADD3.X UR27, UR9, -0x7fffffe0, URZ, UP0, !UPT
        HGMMA.64x32x16.F32.BF16 R88, R28, gdesc[UR24].tnspB, R88
        EXIT
    """
    (found,) = descriptors.findings(listing(text), PTX)
    assert found.certain
    mended = text.replace("UR6, 0x40", "UR4, 0x40").replace("UR9, -0x7", "UR5, -0x7")
    assert descriptors.findings(listing(mended), PTX) == ()


def test_loops_reach_a_fixed_point() -> None:
    """A ring of buffers: the address changes with every iteration, the constant does not."""
    text = """
        UMOV UR20, 0xffffffff
        UIADD3 UR20, UR20, 0x1, URZ
        UISETP.GT.AND UP0, UPT, UR20, 0x1, UPT
        USEL UR20, UR20, URZ, !UP0
        ULEA UR6, UR20, UR12, 0xb
        USHF.R.U32.HI UR6, URZ, 0x4, UR6
        USGXT.U32 UR18, UR6, 0xe
        UMOV UR19, 0x80000020
        HGMMA.64x32x16.F32.BF16 R88, R24, gdesc[UR16].tnspB, R88
        @P0 BRA 0x10
        EXIT
    """
    assert descriptors.findings(listing(text), PTX) == ()


SIGNED = {
    "UIADD3 UR9, {a}, {b}, {c}": lambda a, b, c: a + b + c,
    "UIADD3 UR9, {a}, -{b}, {c}": lambda a, b, c: a - b + c,
    "ULEA UR9, {a}, {b}, 0x5": lambda a, b, c: (a << 5) + b,
    "USHF.R.U32.HI UR9, URZ, 0x4, {a}": lambda a, b, c: a >> 4,
    "USGXT.U32 UR9, {a}, 0xe": lambda a, b, c: a & 0x3FFF,
    "ULOP3.LUT UR9, {a}, 0x3ff0, URZ, 0xc0, !UPT": lambda a, b, c: a & 0x3FF0,
    "ULOP3.LUT UR9, {a}, 0x80000000, URZ, 0xfc, !UPT": lambda a, b, c: a | 0x80000000,
    "UMOV UR9, {a}": lambda a, b, c: a,
}


@pytest.mark.parametrize("form", SIGNED)
def test_every_value_of_an_instruction_lies_in_its_interval(form: str) -> None:
    """Random operands inside random intervals."""
    for _ in range(300):
        ends = [sorted(random.randrange(2 ** random.randint(1, 32)) for _ in range(2)) for _ in range(3)]
        state = {f"UR{i}": frozenset([tuple(pair)]) for i, pair in enumerate(ends)}
        (instruction,) = listing(form.format(a="UR0", b="UR1", c="UR2"))
        descriptors._step(instruction, state)
        ((low, high),) = state.get("UR9", {ANY})
        for _ in range(5):
            a, b, c = (random.randint(*pair) for pair in ends)
            assert low <= SIGNED[form](a, b, c) % WORD <= high


def test_sums_of_64_bits_and_their_carry() -> None:
    for _ in range(300):
        a, b = random.randrange(2**64), random.randrange(2**64)
        expected = (a + b) % 2**64
        words = (a % WORD, a // WORD, b % WORD, b // WORD)
        state = {f"UR{i}": frozenset([(word, word)]) for i, word in enumerate(words)}
        pair = listing("UIADD3.64 UR8, UR0, UR2, URZ")
        halves = listing("UIADD3 UR8, UP0, UR0, UR2, URZ\nUIADD3.X UR9, UR1, UR3, URZ, UP0, !UPT")
        for instructions in (pair, halves):
            after = dict(state)
            for instruction in instructions:
                descriptors._step(instruction, after)
            assert after["UR8"] == {(expected % WORD,) * 2}
            assert after["UR9"] == {(expected // WORD,) * 2}


def test_what_is_not_known_is_anything() -> None:
    state = {"UR4": frozenset([(1, 2)]), "UR5": frozenset([(3, 3)]), "UP1": frozenset([(0, 0)])}
    for line in ("R2UR UR4, R3", "ULDC.64 UR4, c[0x0][0x210]", "UISETP.GT.AND UP1, UPT, UR20, 0x1, UPT"):
        (instruction,) = listing(line)
        after = dict(state)
        descriptors._step(instruction, after)
        assert after.get("UR4", {ANY}) == ({ANY} if "UR4" in line else {(1, 2)})
        assert after["UP1"] == ({(0, 1)} if "UP1" in line else {(0, 0)})
    guarded = dict(state)
    descriptors._step(listing("@!UP0 UMOV UR4, 0x7")[0], guarded)
    assert guarded["UR4"] == {(1, 2), (7, 7)}


def test_a_descriptor_from_elsewhere_is_an_uncertain_finding() -> None:
    found = descriptors.findings(listing(GOOD.replace("UMOV UR19, 0x80000020", "R2UR UR19, R3")), PTX)
    assert found
    assert not any(item.certain for item in found)


NEVER_WRITTEN = """
    USGXT.U32 UR4, UR4, 0xe
    UMOV UR5, URZ
    UIADD3 UR26, UP0, UR18, 0x40, URZ
    UIADD3.X UR27, UR18, -0x7fffffe0, URZ, UP0, !UPT
    UMOV UR18, UR4
    UMOV UR19, 0x80000020
    HGMMA.64x32x16.F32.BF16 R88, R24, gdesc[UR16].tnspB, R88
    HGMMA.64x32x16.F32.BF16 R88, R28, gdesc[UR24].tnspB, R88
    EXIT
"""
"""What ptxas 12.8 made of a product with blocks of 16 keys: an address taken from a register before it gets there."""


def test_a_register_that_was_never_written_is_damage() -> None:
    """It gave gradients that were wrong by half; what it held by chance might have been an address."""
    (found,) = descriptors.findings(listing(NEVER_WRITTEN), PTX)
    assert found.certain
    assert "at 0x70: UR26 comes from a register that was never written" in found.text


@pytest.mark.parametrize("line", ["R2UR UR18, R3", "ULDC.64 UR18, c[0x0][0x210]", "ULDC.64 UR17, c[0x0][0x210]",
                                  "ELECT P0, UR18, PT", "NEWOP UP0, UR18, R4"])  # fmt: skip
def test_whatever_may_have_written_a_register_has(line: str) -> None:
    found = descriptors.findings(listing(f"{line}\n{NEVER_WRITTEN}"), PTX)
    assert not any(item.certain for item in found)
    assert found
