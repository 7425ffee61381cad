"""Disassembled kernels: instructions, loops, and how many instructions of each class one iteration executes.

Reads the output of ``cuobjdump -sass`` (NVIDIA) and LLVM's assembly text (AMD). The main loop is the innermost loop
with the most matrix instructions. Of its instructions, those in blocks that every iteration passes (they dominate the
branch back to the loop's head) are counted apart from those in blocks that some iterations skip, such as the mask of
partly filled blocks or the retries of a barrier.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import networkx as nx

CLASSES = (
    "tensor",  # matrix products
    "mufu",  # exp2, log2, reciprocal, square root: 16 lanes per clock and SM on NVIDIA
    "convert",  # between number formats
    "float",  # FMA, multiply, add
    "minmax",
    "select",  # comparisons and choices of floats, and of predicates
    "shuffle",  # between the lanes of a warp
    "permute",  # bytes inside a register
    "shared_load",
    "shared_store",
    "global_load",
    "async_copy",  # global to shared memory: LDGSTS and TMA
    "global_store",
    "tensor_memory",
    "local",  # spilled registers
    "sync",
    "uniform",  # one instruction per warp on the scalar side
    "control",
    "integer",
    "other",
)
"""What instructions are counted as."""

_NVIDIA = {
    "tensor": "HMMA IMMA QMMA OMMA HGMMA IGMMA QGMMA BGMMA UTCHMMA UTCIMMA UTCQMMA UTCOMMA DMMA",
    "mufu": "MUFU",
    "convert": "F2F F2FP F2I I2F I2FP F2IP FRND F2FP4 I2IP",
    "float": "FFMA FMUL FADD FFMA2 FMUL2 FADD2 HFMA2 HADD2 HMUL2 DFMA DMUL DADD FSWZADD FFMA32I FMUL32I FADD32I",
    "minmax": "FMNMX FMNMX3 HMNMX2",
    "select": "FSEL FSETP FSET SEL HSETP2 FCHK",
    "shuffle": "SHFL REDUX MOVM",
    "permute": "PRMT",
    "shared_load": "LDS LDSM",
    "shared_store": "STS STSM ATOMS",
    "global_load": "LDG LD UTMAPF CCTL",
    "async_copy": "LDGSTS UTMALDG UBLKCP UTMACCTL",
    "global_store": "STG ST RED ATOMG ATOM UTMASTG UTMAREDG",
    "tensor_memory": "LDTM STTM UTCCP UTCSHIFT UTCATOMSWS",
    "local": "LDL STL",
    "sync": "BAR SYNCS WARPSYNC DEPBAR LDGDEPBAR WARPGROUP WARPGROUPSET MEMBAR FENCE ERRBAR UTCBAR NANOSLEEP "
    "UTMACMDFLUSH ARRIVES CGAERRBAR UCGABAR_ARV UCGABAR_WAIT WARPARRIVE ACQBULK",
    "control": "BRA EXIT BRX JMP CALL RET BSSY BSYNC BREAK NOP YIELD BPT ELECT USETMAXREG PREEXIT",
    "integer": "IADD3 IMAD LOP3 LOP SHF SHL SHR LEA ISETP MOV IMNMX VIADD VIMNMX VIADDMNMX IABS IADD POPC FLO BREV "
    "SGXT BMSK PLOP3 P2R R2P S2R CS2R LDC ICMP IDP VABSDIFF LEPC MATCH VOTE NOPR IMUL MOV32I VIMNMX3 S2UR R2UR",
}
_AMD = {
    "tensor": r"v_s?mfmac?_|v_wmma",
    "mufu": r"v_(exp|log|rcp|rsq|sqrt|sin|cos)_",
    "convert": r"v_cvt_",
    "shuffle": r".*_dpp$|.*_sdwa$|ds_bpermute|ds_permute|ds_swizzle|v_permlane|v_readlane|v_writelane",
    "permute": r"v_perm_b32|v_alignb|v_bfe|v_pack_",
    "minmax": r"v_(pk_)?(max|min|med)3?_.*f(16|32|64)",
    "select": r"v_cndmask|v_cmp|v_cmpx",
    "float": r"v_(pk_)?(fma|fmac|mul|add|sub|subrev|mad|mac|fmaak|fmamk|ldexp|div_\w+|frexp\w*)_.*f(16|32|64)",
    "shared_load": r"ds_(read|load)",
    "shared_store": r"ds_(write|store)",
    "local": r"scratch_",
    "global_store": r"(buffer|global|flat)_(store|atomic)",
    "async_copy": r"(buffer|global)_load_.*lds",
    "global_load": r"(buffer|global|flat)_load",
    "sync": r"s_(barrier|waitcnt|wait_|sleep)",
    "control": r"s_(c?branch|endpgm|nop|setprio|sethalt|trap|code_end)",
    "uniform": r"s_|v_readfirstlane",
    "integer": r"v_",
}
_NVIDIA_CLASS = {name: kind for kind, names in _NVIDIA.items() for name in names.split()}


@dataclass(frozen=True)
class Instruction:
    """One line of a listing."""

    address: int
    opcode: str
    """With its modifiers: "QGMMA.64x128x32.F32.E4M3.E4M3"."""
    operands: str = ""
    guarded: bool = False
    """Whether it may not happen: predicated, or a branch on a condition."""
    target: int | None = None
    """Address that it may jump to."""
    ends: bool = False
    """Whether control never simply goes on to the next instruction."""

    @property
    def kind(self) -> str:
        """One of :data:`CLASSES`."""
        return classify(self.opcode)


@dataclass(frozen=True)
class Loop:
    """One loop of a kernel, counted per iteration and warp."""

    start: int
    """Address of its head."""
    every: dict[str, int] = field(default_factory=dict)
    """Class to number of instructions that every iteration executes."""
    some: dict[str, int] = field(default_factory=dict)
    """Class to number of instructions in blocks that an iteration may skip."""
    tensor: dict[str, int] = field(default_factory=dict)
    """Matrix instruction, with modifiers, to its number; of both sorts of block."""
    opcodes: dict[str, int] = field(default_factory=dict)
    """Opcode without modifiers to its number in blocks that every iteration executes."""

    @property
    def total(self) -> int:
        """Instructions that every iteration executes."""
        return sum(self.every.values())

    @property
    def flops(self) -> int | None:
        """Multiplications and additions of the matrix instructions, per iteration and warp.

        None where the shape is not part of the opcode (the fifth generation of tensor cores keeps it in a descriptor).
        A warpgroup instruction counts a quarter for each of its four warps.
        """
        total = 0
        for opcode, number in self.tensor.items():
            flops = mma_flops(opcode)
            if flops is None:
                return None
            total += number * flops
        return total


def classify(opcode: str) -> str:
    """The class of an opcode, NVIDIA's in capitals or AMD's in small letters."""
    if opcode[:1].islower():
        return next((kind for kind, pattern in _AMD.items() if re.match(pattern, opcode)), "other")
    base = opcode.split(".", 1)[0]
    if base == "LDGSTS":
        return "async_copy"
    kind = _NVIDIA_CLASS.get(base)
    if kind is not None:
        return kind
    return "uniform" if base.startswith(("U", "VOTEU", "LDCU")) else "other"


def mma_flops(opcode: str) -> int | None:
    """Multiplications and additions that one warp contributes to one matrix instruction; None if not in its name."""
    wide = re.match(r"[A-Z]GMMA\.(\d+)x(\d+)x(\d+)", opcode)
    if wide:
        m, n, k = (int(part) for part in wide.groups())
        return 2 * m * n * k // 4
    warp = re.match(r"[A-Z]+MMA\.(?:SP\.)?(16)(8)(4|8|16|32|64)\b", opcode)
    if warp:
        m, n, k = (int(part) for part in warp.groups())
        return 2 * m * n * k
    amd = re.match(r"v_\w*?mfma_\w+?_(\d+)x(\d+)x(\d+)", opcode)
    if amd:
        m, n, k = (int(part) for part in amd.groups())
        return 2 * m * n * k
    return None


_SASS = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(?:(@!?U?P\w+)\s+)?([A-Z][A-Z0-9_]*(?:\.[\w.]+)?)\s*([^;]*);")


def parse_sass(text: str) -> list[Instruction]:
    """Instructions of a ``cuobjdump -sass`` listing with one function."""
    instructions = []
    scopes: dict[str, int] = {}
    for line in text.splitlines():
        match = _SASS.match(line)
        if not match:
            continue
        address, guard, opcode, operands = int(match[1], 16), match[2], match[3], match[4].strip()
        base = opcode.split(".")[0]
        target, ends, guarded = None, False, guard is not None
        place = re.search(r"\b0x([0-9a-f]+)\b", operands.rsplit(",", 1)[-1])
        address_in_code = int(place[1], 16) if place else None
        if base == "BSSY" and address_in_code is not None:
            scopes[operands.split(",")[0].strip()] = address_in_code
        elif base == "BSYNC":
            target = scopes.get(operands.split(",")[0].strip())
        elif base in ("BRA", "JMP", "CALL") and address_in_code is not None:
            target = address_in_code
            # "BRA.U UP0, 0x40" and "BRA P0, 0x40" branch on their first operand. A call comes back.
            guarded = guarded or "," in operands or base == "CALL"
            ends = not guarded
        elif base in ("EXIT", "RET", "BRX", "JMX", "BRXU"):
            ends = not guarded
        instructions.append(Instruction(address, opcode, operands, guarded, target, ends))
    return instructions


def parse_amd(text: str) -> list[Instruction]:
    """Instructions of the first function in LLVM's assembly text for AMD; addresses are line numbers."""
    labels: dict[str, int] = {}
    rows: list[tuple[int, str, str]] = []
    for number, raw in enumerate(text.splitlines()):
        line = raw.split(";", 1)[0].rstrip()
        label = re.match(r"^([.\w$]+):", line)
        if label:
            labels[label[1]] = len(rows)
        elif re.match(r"^\s+[a-z]\w*_\w+(\s|$)", line):
            opcode, _, operands = line.strip().partition(" ")
            rows.append((number, opcode, operands.strip()))
        elif line.lstrip().startswith(".end_amdhsa_kernel") and rows:
            break
    instructions = []
    for number, opcode, operands in rows:
        place = labels.get(operands) if opcode.startswith(("s_branch", "s_cbranch")) else None
        target = rows[place][0] if place is not None and place < len(rows) else None
        ends = opcode in ("s_branch", "s_endpgm")
        instructions.append(Instruction(number, opcode, operands, opcode.startswith("s_cbranch"), target, ends))
    return instructions


def loops(instructions: Sequence[Instruction]) -> tuple[Loop, ...]:
    """All innermost loops with matrix instructions, the one with the most of them first.

    A loop is innermost if no loop inside it has matrix instructions.
    """
    if not instructions:
        return ()
    blocks, graph = flow(instructions)
    found = []
    dominator = nx.immediate_dominators(graph, 0)
    bodies: dict[int, set[int]] = {}
    latches: dict[int, list[int]] = {}
    for source, target in graph.edges:
        if source in dominator and target in _dominators(dominator, source):
            bodies.setdefault(target, set()).update(_body(graph, source, target))
            latches.setdefault(target, []).append(source)
    heavy = {
        head: body for head, body in bodies.items() if any(i.kind == "tensor" for block in body for i in blocks[block])
    }
    for head, body in heavy.items():
        if any(other != head and inner < body for other, inner in heavy.items()):
            continue
        always = set.intersection(*(_dominators(dominator, latch) for latch in latches[head])) & body
        found.append(_count(head, body, always, blocks))
    return tuple(sorted(found, key=lambda loop: (-sum(loop.tensor.values()), loop.start)))


def flow(instructions: Sequence[Instruction]) -> tuple[list[list[Instruction]], nx.DiGraph]:
    """Basic blocks and the graph of their indices, entry 0."""
    place = {instruction.address: i for i, instruction in enumerate(instructions)}
    heads = {0}
    for i, instruction in enumerate(instructions):
        if instruction.target in place:
            heads.add(place[instruction.target])
        if instruction.target is not None or instruction.ends or (instruction.guarded and _leaves(instruction)):
            heads.add(i + 1)
    starts = sorted(head for head in heads if head < len(instructions))
    block_of = {start: index for index, start in enumerate(starts)}
    graph = nx.DiGraph()
    graph.add_nodes_from(range(len(starts)))
    blocks = []
    for index, start in enumerate(starts):
        stop = starts[index + 1] if index + 1 < len(starts) else len(instructions)
        blocks.append(list(instructions[start:stop]))
        last = instructions[stop - 1]
        if last.target in place:
            graph.add_edge(index, block_of[place[last.target]])
        if not last.ends and index + 1 < len(starts):
            graph.add_edge(index, index + 1)
    return blocks, graph


def _leaves(instruction: Instruction) -> bool:
    return instruction.opcode.split(".")[0] in ("EXIT", "RET")


def _dominators(immediate: dict[int, int | None], node: int) -> set[int]:
    """All blocks on every path from the entry to ``node``, itself included."""
    found = {node}
    parent = immediate.get(node)
    while parent is not None and parent not in found:
        found.add(parent)
        parent = immediate.get(parent)
    return found


def _body(graph: nx.DiGraph, latch: int, head: int) -> set[int]:
    """Blocks of the natural loop of one back edge."""
    body, pending = {head}, [latch]
    while pending:
        block = pending.pop()
        if block not in body:
            body.add(block)
            pending += graph.predecessors(block)
    return body


def _count(head: int, body: set[int], always: set[int], blocks: list[list[Instruction]]) -> Loop:
    every, some, tensor, opcodes = Counter[str](), Counter[str](), Counter[str](), Counter[str]()
    for block in sorted(body):
        for instruction in blocks[block]:
            (every if block in always else some)[instruction.kind] += 1
            if block in always:
                opcodes[instruction.opcode.split(".")[0]] += 1
            if instruction.kind == "tensor":
                tensor[instruction.opcode] += 1
    return Loop(blocks[head][0].address, _sorted(every), _sorted(some), _sorted(tensor), _sorted(opcodes))


def _sorted(counter: Counter[str]) -> dict[str, int]:
    return dict(sorted(counter.items()))


def opcodes(instructions: Iterable[Instruction]) -> dict[str, int]:
    """Opcode without modifiers to its number in a whole kernel."""
    return _sorted(Counter(instruction.opcode.split(".")[0] for instruction in instructions))
