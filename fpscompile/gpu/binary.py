"""What a compiled kernel is made of, and whether ptxas damaged it.

Triton's wheel carries ptxas and cuobjdump: from there come registers, spills, warnings and the disassembly whose loops
:mod:`fpscompile.gpu.assembly` counts. No GPU is needed.
"""

from __future__ import annotations

import logging
import re
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fpscompile.gpu import assembly, descriptors
from fpscompile.gpu.compilation import Artifacts, BinaryError, compile_artifacts

log = logging.getLogger("fpscompile")

SERIALIZED = re.compile(r".*\(C75\d\d\).*")
"""ptxas's way of saying that asynchronous matrix products (wgmma) will wait for one another."""

TOOL_SECONDS = 600
"""After which a program of Triton's wheel is taken to hang."""


@dataclass(frozen=True)
class BinaryReport:
    """What one kernel became on one target."""

    kernel: str
    target: str
    """"cuda:90", "hip:gfx942"."""
    triton: str
    """Triton's version."""
    num_warps: int
    """Warps of a program, those of specialized partitions included."""
    registers: int
    """Per thread; of the kernel as a whole. Warp-specialized kernels hand registers over between warps."""
    spill_bytes: int
    """Bytes per thread spilled to local memory, stores and loads."""
    stack_bytes: int
    """Bytes of local memory per thread."""
    shared_bytes: int
    """Shared memory per program."""
    instructions: int
    """In the whole kernel."""
    opcodes: dict[str, int] = field(default_factory=dict)
    """Opcode without modifiers to its number in the whole kernel."""
    loops: tuple[assembly.Loop, ...] = ()
    """Innermost loops with matrix products, the one with the most of them first."""
    serialized: tuple[str, ...] = ()
    """ptxas's warnings that matrix products wait for one another."""
    damaged: tuple[str, ...] = ()
    """Matrix products whose operands are not where the compiler said: see :mod:`fpscompile.gpu.descriptors`."""
    unfollowed: int = 0
    """Matrix products of which that could not be told."""

    @property
    def main_loop(self) -> assembly.Loop:
        """The loop over the keys.

        Raises:
            BinaryError: no loop has matrix instructions.
        """
        if not self.loops:
            raise BinaryError(f"{self.kernel} on {self.target} has no loop with matrix instructions")
        return self.loops[0]


def compile_kernel(
    kernel: Any,
    args: Sequence[Any],
    options: Mapping[str, Any] | None = None,
    *,
    target: str,
    allow_flaws: bool = False,
) -> BinaryReport:
    """Compile one kernel and report on it.

    Args:
        kernel, args, options, target: as for :func:`fpscompile.gpu.compilation.compile_artifacts`.
        allow_flaws: report serialized or damaged matrix products instead of raising.

    Raises:
        BinaryError: it does not compile, or ptxas serialized or damaged its asynchronous matrix products.
        UnsupportedError: a target that is neither CUDA nor HIP.
    """
    return inspect_artifacts(compile_artifacts(kernel, args, options, target=target), allow_flaws=allow_flaws)


def inspect_artifacts(artifacts: Artifacts, *, allow_flaws: bool = False) -> BinaryReport:
    """Resources and loops of a compiled kernel; errors as for :func:`compile_kernel`."""
    if artifacts.target.startswith("hip:"):
        text = artifacts.texts["amdgcn"]
        instructions = assembly.parse_amd(text)
        resources = _amd_resources(text)
        serialized: tuple[str, ...] = ()
        found: tuple[descriptors.Finding, ...] = ()
    else:
        instructions = assembly.parse_sass(_disassemble(artifacts.texts["cubin"]))
        found = descriptors.findings(instructions, artifacts.texts["ptx"]) if artifacts.target == "cuda:90" else ()
        log = _ptxas_log(artifacts.texts["ptx"], artifacts.target)
        resources = _nvidia_resources(log)
        damaged = [item.text for item in found if item.certain]
        serialized = tuple(line.strip() for line in log.splitlines() if SERIALIZED.match(line))
        if serialized and not allow_flaws:
            raise BinaryError(
                f"{artifacts.kernel} on {artifacts.target}: ptxas serialized its matrix products, which costs their "
                f"overlap; change the block sizes or lift a register cap. It says: {serialized[0]}"
            )
        if damaged and not allow_flaws:
            raise BinaryError(
                f"{artifacts.kernel} on {artifacts.target}: ptxas gives matrix products operands that they were not "
                f"meant to have, so results would be wrong; change the block sizes. {damaged[0]}"
            )
    return BinaryReport(
        kernel=artifacts.kernel,
        target=artifacts.target,
        triton=artifacts.triton,
        num_warps=artifacts.num_warps,
        shared_bytes=artifacts.shared_bytes,
        instructions=len(instructions),
        opcodes=assembly.opcodes(instructions),
        loops=assembly.loops(instructions),
        serialized=serialized,
        damaged=tuple(item.text for item in found if item.certain),
        unfollowed=sum(not item.certain for item in found),
        **resources,
    )


_checked: dict[str, str | None] = {}
"""Hash of a kernel that was launched in this process to what is wrong with it; None where nothing is known to be."""


def refuse_damaged(compiled: Any) -> None:
    """Look once at a kernel that Triton has just launched on this machine.

    What ptxas damages depends on every argument's type and divisibility, so that no list of tested cases is complete.
    Only damage that was positively recognised is an error. Whatever keeps this function from looking (another Triton,
    a missing tool, machine code that it cannot read) is one warning per kernel, and the launch stands.

    Args:
        compiled: what ``kernel[grid](...)`` returned; None, from the interpreter, is fine.

    Raises:
        BinaryError: its matrix products read other memory than they were told to.
    """
    if compiled is None:
        return
    key = _attribute(compiled, "hash") or str(type(compiled))
    if key not in _checked:
        try:
            damage = _damage_of(compiled)
        except Exception as error:
            log.warning("the machine code of %s could not be checked: %r", _name_of(compiled), error)
            damage = None
        _checked[key] = damage
    if _checked[key] is not None:
        raise BinaryError(
            f"ptxas damaged the kernel {_name_of(compiled)}, whose results would be wrong; choose another tile, "
            f"lowering='boxes', or lowering='gather' with quant='fp8'. {_checked[key]}"
        )


def _damage_of(compiled: Any) -> str | None:
    """What is certainly wrong with a ``triton.compiler.CompiledKernel``; any error where it is nothing like one."""
    target = compiled.metadata.target
    if (target.backend, target.arch) != ("cuda", 90):
        return None
    instructions = assembly.parse_sass(_disassemble(compiled.asm["cubin"]))
    found = descriptors.findings(instructions, compiled.asm["ptx"])
    for item in found:
        if not item.certain:
            log.debug("%s: %s", _name_of(compiled), item.text)
    return next((item.text for item in found if item.certain), None)


def _name_of(compiled: Any) -> str:
    return _attribute(compiled, "name") or type(compiled).__name__


def _attribute(compiled: Any, name: str) -> str:
    """As text; empty where there is none."""
    try:
        return str(getattr(compiled, name, None) or "")
    except Exception:  # a property may fail in its own way
        return ""


def tool(name: str) -> str:
    """Path of the "ptxas", "ptxas-blackwell" or "cuobjdump" that Triton uses.

    That is one of its wheel, unless a variable such as ``TRITON_PTXAS_PATH`` names another, as Inductor makes it do.

    Raises:
        BinaryError: there is none.
    """
    from triton import knobs

    try:
        return str(getattr(knobs.nvidia, name.replace("-", "_")).path)
    except (AttributeError, RuntimeError) as error:
        raise BinaryError(f"this build of Triton has no {name} ({error}); install Triton's wheel for Linux") from error


def _disassemble(cubin: bytes) -> str:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        return _run([tool("cuobjdump"), "-sass", str(path)])


def _ptxas_log(ptx: str, target: str) -> str:
    """What ``ptxas -v`` says. The assembling is repeated: Triton keeps the log only while it assembles itself."""
    capability = int(target.split(":")[1])
    # As Triton does: "a" unlocks wgmma and its successors, newer architectures come with a ptxas of their own.
    import triton

    name = "ptxas-blackwell" if capability >= 100 else "ptxas"
    flags = ["-v", "-lineinfo", f"--gpu-name=sm_{capability}{'a' if capability >= 90 else ''}"]
    if tuple(int(part) for part in triton.__version__.split(".")[:2]) >= (3, 7):
        flags.append("--regAllocOptLevel=2")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.ptx"
        path.write_text(ptx)
        return _run([tool(name), *flags, str(path), "-o", str(path.with_suffix(".cubin"))])


def _run(command: list[str]) -> str:
    """Standard output and error of a command."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=TOOL_SECONDS)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BinaryError(f"{' '.join(command)} could not be run: {error}") from error
    if done.returncode:
        raise BinaryError(f"{' '.join(command)} failed with {done.returncode}:\n{done.stderr[-4000:]}")
    return done.stdout + done.stderr


def _nvidia_resources(log: str) -> dict[str, int]:
    registers = re.search(r"Used (\d+) registers", log)
    frame = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", log)
    if registers is None or frame is None:
        raise BinaryError(f"ptxas did not report registers and spills; it said:\n{log[-2000:]}")
    return {
        "registers": int(registers[1]),
        "stack_bytes": int(frame[1]),
        "spill_bytes": int(frame[2]) + int(frame[3]),
    }


def _amd_resources(text: str) -> dict[str, int]:
    values = {}
    for name in ("vgpr_count", "vgpr_spill_count", "private_segment_fixed_size"):
        found = re.search(rf"^\s+\.{name}:\s+(\d+)", text, re.MULTILINE)
        if found is None:
            raise BinaryError(f"the assembly text has no .{name}; was it made by another version of LLVM?")
        values[name] = int(found[1])
    return {
        "registers": values["vgpr_count"],
        "stack_bytes": values["private_segment_fixed_size"],
        # Scalar registers spill into lanes of vector registers, which costs no memory.
        "spill_bytes": 4 * values["vgpr_spill_count"],
    }
