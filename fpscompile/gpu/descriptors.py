"""Do the tensor cores of sm_90 get the shared-memory descriptors that the compiler wrote? Read off the machine code.

A warpgroup product finds its operands through 64-bit descriptors in uniform registers. The upper word (swizzle mode and
strides) is fixed at compile time; the lower one holds an address. ptxas 12.8 has been seen to add an offset to a
register pair that held another product's descriptor: the kernel then reads other memory than it was told to, or memory
that does not exist. No warning says so, and it happens with some shapes only, so every binary is checked.

How: interval arithmetic on the uniform registers along the control flow of the machine code, to a fixed point; where
two ways meet, a register keeps what each of them brings. A descriptor of the PTX is an address (14 bits, in units of 16
bytes) plus a constant. At every product the constant that arrives must be one that the PTX has in a product of that
shape. Addresses as such are not compared. Where registers have run out and a descriptor comes from somewhere else, it
cannot be followed: that is a finding, too, but not a certain one. A descriptor made from a register that nothing has
written yet is certain damage.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from fpscompile.gpu import assembly
from fpscompile.gpu.assembly import Instruction

Interval = tuple[int, int]
"""Smallest and largest value of a 32-bit register, unsigned."""

Constants = tuple[int, ...]
"""What is added to the addresses in the descriptors of one product, 64 bits each: of A (unless in registers) and B."""

State = dict[str, Interval]
"""Registers ("UR4") and carries ("UP0") that are not just anything, on one way."""

States = dict[str, frozenset[Interval]]
"""The same on all ways to a place."""

WORD = 1 << 32
ANY: Interval = (0, WORD - 1)
ADDRESSES = 1 << 14
_ALTERNATIVES = 6  # that a register may have before it is taken to be anything, such as a loop's counter
_TRUE: frozenset[Interval] = frozenset([(1, 1)])
_UNWRITTEN: States = {f"?UR{i}": _TRUE for i in range(64)}
"""At a kernel's entry. "?UR4" is true while "UR4" holds nothing that an instruction has made from something known."""


@dataclass(frozen=True)
class Finding:
    """One product whose descriptors are not those of the PTX."""

    text: str
    certain: bool
    """False where its descriptors could not be followed, or those of the PTX not understood."""


def findings(instructions: Sequence[Instruction], ptx: str) -> tuple[Finding, ...]:
    """What is wrong with the descriptors of a kernel's warpgroup products; nothing where all is well.

    Args:
        instructions: of one function, from :func:`fpscompile.gpu.assembly.parse_sass`.
        ptx: what they were assembled from.
    """
    wanted = _wanted(ptx)
    found = (_finding(instruction, states, wanted) for instruction, states in _states(instructions))
    return tuple(item for item in found if item is not None)


# ------------------------------------------------------------------------------------------------ what the PTX asks for

_PRODUCT = re.compile(
    r"wgmma\.mma_async\.sync\.aligned\.m(\d+)n(\d+)k(\d+)[\w.]*\s*\{[^}]*\},\s*(\{[^}]*\}|%rd\d+),\s*(%rd\d+)"
)
_DEFINITION = re.compile(r"^\s*(or|add|mov|cvt)\.\w+(?:\.\w+)?\s+(%rd\d+), ([^;]+);", re.MULTILINE)


def _wanted(ptx: str) -> dict[tuple[str, bool], set[Constants]]:
    """Shape and "A is in registers" to the constants of such products."""
    definitions = {name: (op, operands) for op, name, operands in _DEFINITION.findall(ptx)}

    def constant(name: str) -> int:
        op, operands = definitions.get(name, ("", ""))
        if op == "mov" and operands.startswith("%rd"):
            return constant(operands)
        if op in ("or", "add"):
            base, added = (part.strip() for part in operands.split(",")[:2])
            return (constant(base) + int(added)) % 2**64 if not added.startswith("%") else 0
        return 0  # the address

    wanted: dict[tuple[str, bool], set[Constants]] = {}
    for m, n, k, first, second in _PRODUCT.findall(ptx):
        in_registers = first.startswith("{")
        constants = (constant(second),) if in_registers else (constant(first), constant(second))
        wanted.setdefault((f"{m}x{n}x{k}", in_registers), set()).add(constants)
    return wanted


# ------------------------------------------------------------------------------------- what the machine code hands over


def _finding(
    instruction: Instruction, states: States, wanted: dict[tuple[str, bool], set[Constants]]
) -> Finding | None:
    shape = re.match(r"[A-Z]GMMA\.(\d+x\d+x\d+)", instruction.opcode)
    place = re.search(r"gdesc\[UR(\d+)\]", instruction.operands)
    if not shape or not place:
        return None
    first = int(place[1])
    in_registers = bool(re.match(r"R\d+, R\d+", instruction.operands))
    known = wanted.get((shape[1], in_registers), set())
    # No descriptor has an upper word of zero: one of the PTX that seems to was computed in a way not known here.
    understood = bool(known) and all(constant // WORD for constants in known for constant in constants)
    # Four registers: the descriptor of A, then that of B. Where A is in registers, the first two mean nothing.
    pairs = [first + 2] if in_registers else [first, first + 2]
    for name in (f"UR{pair + i}" for pair in pairs for i in (0, 1)):
        if states.get(f"?{name}") == _TRUE:
            text = (
                f"{instruction.opcode} at {instruction.address:#x}: {name} comes from a register that was never written"
            )
            return Finding(text, certain=True)
    words = [states.get(f"UR{pair + i}", frozenset((ANY,))) for pair in pairs for i in (0, 1)]
    worst: Finding | None = None
    for choice in itertools.product(*words):
        found = list(zip(choice[::2], choice[1::2], strict=True))
        if any(all(map(_is, found, constants)) for constants in known):
            continue
        certain = understood and not any(all(map(_may_be, found, constants)) for constants in known)
        if worst is None or (certain and not worst.certain):
            text = "; ".join(f"{low[0]:#x} to {low[1]:#x}, {high[0]:#x} to {high[1]:#x}" for low, high in found)
            worst = Finding(
                f"{instruction.opcode} at {instruction.address:#x}: no such product of the PTX has descriptors with "
                f"these lower and upper words: {text}",
                certain,
            )
    return worst


def _is(found: tuple[Interval, Interval], constant: int) -> bool:
    """Whether the lower and the upper word are an address plus this constant."""
    low, high = found
    least = constant % WORD
    return high == (constant // WORD,) * 2 and least <= low[0] and low[1] < least + ADDRESSES


def _may_be(found: tuple[Interval, Interval], constant: int) -> bool:
    """Whether some of their values are."""
    low, high = found
    least = constant % WORD
    return high[0] <= constant // WORD <= high[1] and low[0] < least + ADDRESSES and low[1] >= least


def _states(instructions: Sequence[Instruction]) -> Iterable[tuple[Instruction, States]]:
    """Every instruction with the registers before it, in order."""
    if not instructions:
        return
    blocks, graph = assembly.flow(instructions)
    before: dict[int, States] = {0: dict(_UNWRITTEN)}
    pending = [0]
    while pending:
        block = pending.pop()
        states = dict(before[block])
        for instruction in blocks[block]:
            _step(instruction, states)
        for following in graph.successors(block):
            old = before.get(following)
            new = states if old is None else _meet(old, states)
            if new != old:
                before[following] = dict(new)
                pending.append(following)
    for block, entry in sorted(before.items()):
        states = dict(entry)
        for instruction in blocks[block]:
            yield instruction, dict(states)
            _step(instruction, states)


def _meet(old: States, new: States) -> States:
    """What holds on either way into a block."""
    met = {}
    for name in old.keys() | new.keys():
        values = old.get(name, frozenset((ANY,))) | new.get(name, frozenset((ANY,)))
        if len(values) <= _ALTERNATIVES:
            met[name] = values
    return met


def _step(instruction: Instruction, states: States) -> None:
    """Registers after an instruction."""
    operands = [part.strip().removesuffix(".reuse") for part in instruction.operands.split(",")]
    _mark(instruction, operands, states)
    places = [i for i, name in enumerate(operands[:3]) if re.fullmatch(r"U(R|P)\d+", name)]
    if not places or places[0] > 1:
        return
    base = instruction.opcode.split(".")[0]
    if not (base.startswith("U") or base in ("S2UR", "R2UR", "VOTEU", "REDUX", "LDCU")):
        return
    read = {name for part in operands for name in re.findall(r"U[RP]\d+", part)}
    read |= {_next(name) for name in read if name.startswith("UR")}
    several = [(name, states[name]) for name in sorted(read) if name in states]
    results: dict[str, set[Interval]] = {}
    for choice in itertools.product(*(values for _, values in several)):
        state = {name: value for (name, _), value in zip(several, choice, strict=True)}
        for name, value in _results(instruction.opcode, operands, state).items():
            results.setdefault(name, set()).add(value)
    for name, values in results.items():
        if instruction.guarded:
            values |= states.get(name, frozenset((ANY,)))
        if len(values) > _ALTERNATIVES or values == {ANY}:
            states.pop(name, None)
        else:
            states[name] = frozenset(values)


def _mark(instruction: Instruction, operands: list[str], states: States) -> None:
    """Follow what was never written. In doubt a register counts as written: whatever an instruction not known here
    mentions, and pairs whose second half is in doubt."""
    named = [name for part in operands for name in re.findall(r"UR\d+", part)]
    if not named or re.match(r"\[|R(\d|Z)", operands[0]):  # what writes a vector register or memory writes no other
        return
    base, _, rest = instruction.opcode.partition(".")
    known = base in ("UIADD3", "UMOV", "ULOP3", "USHF", "USGXT", "ULEA") and re.fullmatch(r"UR\d+", operands[0])
    wide = "64" in rest or "WIDE" in rest
    sources = named[1:]
    garbage = known and not instruction.guarded and any(states.get(f"?{name}") == _TRUE for name in sources)
    written = named[:1] if known else named
    for name in [*written, *(map(_next, written) if wide or not known else ())]:
        if garbage:
            states[f"?{name}"] = _TRUE
        else:
            states.pop(f"?{name}", None)


def _results(opcode: str, operands: list[str], state: State) -> dict[str, Interval]:
    """Registers and carries that an instruction writes; anything unless it is known here."""
    base, _, rest = opcode.partition(".")
    target = operands[0]
    wide = "64" in rest or "WIDE" in rest
    carries = [name for name in operands[1:3] if re.fullmatch(r"UP\d|UPT", name)] if base == "UIADD3" else []
    sources = operands[1 + len(carries) :]
    if target.startswith("UP"):
        return {name: (0, 1) for name in operands[:2] if re.fullmatch(r"UP\d", name)}
    results = {target: ANY}
    if wide:
        results[_next(target)] = ANY
    if base == "UIADD3":
        results |= {name: (0, 1) for name in carries if name != "UPT"}
        if rest == "64":
            total = [sum(ends) for ends in zip(*(_wide(name, state) for name in sources[:3]), strict=True)]
            low, high = _split(total)
            results |= {target: low, _next(target): high}
        else:
            terms = [_read(name, state) for name in sources[:3]]
            terms += [_carry(name, state) for name in sources[3:]] if rest == "X" else []
            total = [sum(ends) for ends in zip(*terms, strict=True)]
            results[target] = _reduced(total)
            if len(carries) == 1 and total[0] // WORD == total[1] // WORD:
                results[carries[0]] = (total[0] // WORD,) * 2
    elif base == "UMOV" and not rest:
        results[target] = _read(sources[0], state)
    elif base == "USEL":
        a, b = _read(sources[0], state), _read(sources[1], state)
        results[target] = (min(a[0], b[0]), max(a[1], b[1]))
    elif base == "USGXT" and rest == "U32":
        results[target] = _masked(_read(sources[0], state), (1 << int(sources[1], 0)) - 1)
    elif base == "USHF" and rest == "R.U32.HI" and sources[1].startswith("0x"):
        value, shift = _read(sources[2], state), int(sources[1], 0)
        results[target] = (value[0] >> shift, value[1] >> shift)
    elif base == "ULOP3" and sources[2:4] == ["URZ", "0xc0"] and sources[1].startswith("0x"):
        results[target] = _masked(_read(sources[0], state), int(sources[1], 0))
    elif base == "ULOP3" and sources[2:4] == ["URZ", "0xfc"] and sources[1].startswith("0x"):
        value, bits = _read(sources[0], state), int(sources[1], 0)
        if value[1] < bits & -bits:  # no bit in common: a sum
            results[target] = (value[0] + bits, value[1] + bits)
    elif base == "ULEA" and not rest and not target.startswith("UP") and len(sources) == 3:
        a, b, shift = _read(sources[0], state), _read(sources[1], state), int(sources[2], 0)
        results[target] = _reduced([(a[0] << shift) + b[0], (a[1] << shift) + b[1]])
    return results


def _next(register: str) -> str:
    return f"UR{int(register[2:]) + 1}"


def _read(name: str, state: State) -> Interval:
    """An operand; a negated one as 2^32 minus it, so that sums carry as the hardware's do."""
    if name == "URZ":
        return (0, 0)
    if name.startswith(("-", "~")):
        low, high = _read(name[1:], state)
        top = WORD if name[0] == "-" else WORD - 1
        return (top - high, top - low)
    if re.fullmatch(r"UR\d+", name):
        return state.get(name, ANY)
    return (int(name, 0),) * 2 if re.fullmatch(r"(0x)?[0-9a-f]+", name) else ANY


def _wide(name: str, state: State) -> Interval:
    """An operand of 64 bits: a pair of registers, or a number."""
    if name.startswith("-"):
        low, high = _wide(name[1:], state)
        return (2**64 - high, 2**64 - low)
    if re.fullmatch(r"UR\d+", name):
        lower, upper = state.get(name, ANY), state.get(_next(name), ANY)
        return (upper[0] * WORD + lower[0], upper[1] * WORD + lower[1])
    return _read(name, state)


def _carry(name: str, state: State) -> Interval:
    if name in ("!UPT", "UPT"):
        return (int(name == "UPT"),) * 2
    value = state.get(name.removeprefix("!"), (0, 1))
    return (1 - value[1], 1 - value[0]) if name.startswith("!") else value


def _reduced(total: list[int]) -> Interval:
    """A sum in 32 bits."""
    return (total[0] % WORD, total[1] % WORD) if total[0] // WORD == total[1] // WORD else ANY


def _split(total: list[int]) -> tuple[Interval, Interval]:
    """(lower, upper word) of a sum in 64 bits."""
    if total[0] >> 64 != total[1] >> 64:
        return ANY, ANY
    least, most = (end % 2**64 for end in total)
    upper = (least // WORD, most // WORD)
    return ((least % WORD, most % WORD) if upper[0] == upper[1] else ANY), upper


def _masked(value: Interval, mask: int) -> Interval:
    """``value & mask`` for a mask of low bits; another mask bounds it from above."""
    if value[1] <= mask and not mask & (mask + 1):
        return value
    return (value[0] & mask,) * 2 if value[0] == value[1] else (0, mask)
