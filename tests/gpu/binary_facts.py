"""What tests ask of a binary: the entry of a golden table, and the products that are only 32 bits wide."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest
import triton

from fpscompile.gpu import binary

GOLDENS = Path(__file__).parent / "goldens" / f"binaries_{triton.__version__}.json"
REFRESH = os.environ.get("FPS_REFRESH_GOLDENS") == "1"


def summary(report: binary.BinaryReport, rows: float, columns: int) -> dict[str, object]:
    """What a golden table keeps of one binary.

    Args:
        rows: of the step's scores, per warp.
        columns: of the step's scores.
    """
    loop = report.main_loop
    return {
        "registers": report.registers,
        "spill_bytes": report.spill_bytes,
        "shared_bytes": report.shared_bytes,
        "instructions_per_step": loop.every,
        "tensor": loop.tensor,
        "instructions_per_kept_key_and_row": round(loop.total / rows / columns, 4),
    }


def check_golden(case: str, found: dict[str, object]) -> None:
    """Compare with the table of this version of Triton, or write it where FPS_REFRESH_GOLDENS=1."""
    stored = json.loads(GOLDENS.read_text()) if GOLDENS.exists() else {}
    if REFRESH:
        GOLDENS.parent.mkdir(exist_ok=True)
        GOLDENS.write_text(json.dumps(dict(sorted((stored | {case: found}).items())), indent=1) + "\n")
        return
    if not stored:
        pytest.skip(f"no golden table for Triton {triton.__version__}; make one with FPS_REFRESH_GOLDENS=1")
    assert found == stored[case]


COUNTS = {"H", "Hk", "heads", "mask_heads", "q_tiles", "k_tiles", "tiles", "phases", "phase_group", "first_pair"}
"""Parameters whose products with one another, with indices of them and with the slots of a tile stay below 2^31."""

BOUNDED = {("", "tokens_per_split")}
"""A split times its length: a token of the sequence."""


def check_products(text: str, slots: int, unit: int, gqa: int = 1) -> None:
    """No 32-bit product of a kernel's TTIR has a length, a stride or a head dim as a factor.

    Slots are numbered in 32 bits, so a tile may be multiplied by its slots. The head dim must be another number.
    """
    products = narrow_products(text)
    assert products, "no 32-bit product found: has the text of arith.muli changed?"
    constants = {"1", "2", "3", "32", "128", "", str(slots), str(unit), str(gqa)}
    for factors in products:
        assert factors in BOUNDED or all(factor in COUNTS | constants for factor in factors), factors


def narrow_products(ttir: str) -> list[tuple[str, ...]]:
    """Factors of all 32-bit products: a parameter's name, a constant's value, or "" for a value computed or loaded.

    Left out: products of compile-time values alone, such as positions within a block.
    """
    parameters = set(re.findall(r"%(\w+): (?:i32|i64)", ttir))
    lines = re.findall(r"%(\w+)(?::\d+)? = ([\w.]+) ([^\n]*)", ttir)
    constants, made = {}, {}
    fixed = set()
    """Names whose values are known at compile time, lane by lane."""
    for name, op, rest in lines:
        inputs = re.findall(r"%(\w+)", rest.split(" : ")[0])
        computed = bool(inputs) and op.startswith(("arith.", "tt.")) and set(inputs) <= fixed
        if computed or op in ("arith.constant", "tt.make_range"):
            fixed.add(name)
        if op == "arith.constant":
            value = re.match(r"(?:dense<)?(-?\d+)>? : (?:tensor<[\dx]+x)?i32", rest)
            if value:
                constants[name] = value[1]
        elif op in ("tt.splat", "tt.broadcast", "tt.expand_dims"):
            made[name] = re.match(r"%(\w+)", rest)[1]

    def origin(name: str) -> str:
        while name in made:
            name = made[name]
        return name if name in parameters else constants.get(name, "")

    found = []
    for name, op, rest in lines:
        if op == "arith.muli" and name not in fixed and re.search(r" : (?:tensor<[\dx]+x)?i32\b", rest):
            found.append(tuple(origin(factor) for factor in re.findall(r"%(\w+)", rest.split(" : ")[0])))
    return found
