"""Compile a kernel for a GPU that need not be present, and say what the binary is made of.

``triton.compile`` takes a target instead of a device, and its wheel carries ptxas, cuobjdump and LLVM: from there come
registers, spills, shared memory, warnings and the disassembly whose loops :mod:`fpscompile.gpu.assembly` counts.
Arguments are described as at a launch; only their types and alignments matter, so tensors may be on the meta device.

In a process that interprets kernels (``TRITON_INTERPRET=1``) Triton cannot compile; the work is then done by a second
process without the variable, which stays for further requests. AMD's architectures have a process each in any case:
Triton 3.6 chooses some of their conversions once, for the first architecture that a process compiles for.
"""

from __future__ import annotations

import importlib.util
import inspect
import logging
import os
import pickle
import re
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fpscompile.errors import FpsError, UnsupportedError
from fpscompile.gpu import assembly, descriptors
from fpscompile.gpu.interpreter import interpreting

log = logging.getLogger("fpscompile")

TARGETS = ("cuda:80", "cuda:89", "cuda:90", "cuda:100", "cuda:120", "hip:gfx942", "hip:gfx950")
"""Targets that the project compiles for in its tests."""

SERIALIZED = re.compile(r".*\(C75\d\d\).*")
"""ptxas's way of saying that asynchronous matrix products (wgmma) will wait for one another."""


TOOL_SECONDS = 600
"""After which a program of Triton's wheel is taken to hang."""


class BinaryError(FpsError, RuntimeError):
    """A kernel that does not compile for a target, or compiles into something that must not be shipped."""


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
        kernel: a ``@triton.jit`` or ``@gluon.jit`` function of a module that has a file.
        args: its arguments in order, as a launch would pass them: numbers, None, tensors (of any device, meta
            included) or tensor descriptors.
        options: keyword arguments of the launch: constexpr parameters, num_warps, num_stages, maxnreg, ...
        target: see :data:`TARGETS`; other architectures that Triton knows work too.
        allow_flaws: report serialized or damaged matrix products instead of raising.

    Raises:
        BinaryError: it does not compile, or ptxas serialized or damaged its asynchronous matrix products.
        UnsupportedError: a target that is neither CUDA nor HIP.
    """
    return inspect_artifacts(compile_artifacts(kernel, args, options, target=target), allow_flaws=allow_flaws)


@dataclass(frozen=True)
class Artifacts:
    """What ``triton.compile`` produced."""

    kernel: str
    target: str
    triton: str
    num_warps: int
    shared_bytes: int
    texts: dict[str, Any] = field(repr=False, default_factory=dict)
    """Stage ("ttir", "ttgir", "llir", "ptx", "amdgcn": str; "cubin", "hsaco": bytes) to its product."""


def compile_artifacts(
    kernel: Any, args: Sequence[Any], options: Mapping[str, Any] | None = None, *, target: str
) -> Artifacts:
    """All stages of one compilation; arguments as for :func:`compile_kernel`."""
    family, _, architecture = target.partition(":")
    if family not in ("cuda", "hip") or not architecture:
        raise UnsupportedError(f"target {target!r} is not a GPU; write 'cuda:90' or 'hip:gfx942'")
    function = inspect.unwrap(getattr(kernel, "fn", kernel))
    options = dict(options or {})
    if interpreting() or family == "hip":
        return _in_another_process(function, list(args), options, target)
    return _compile_here(kernel, args, options, target)


def _compile_here(kernel: Any, args: Sequence[Any], options: dict[str, Any], target: str) -> Artifacts:
    function = inspect.unwrap(getattr(kernel, "fn", kernel))
    family, _, architecture = target.partition(":")
    try:
        return _compile(kernel, function, args, options, family, architecture)
    except Exception as error:
        raise BinaryError(f"{function.__name__} does not compile for {target}: {error}") from error


def _compile(
    kernel: Any, function: Callable[..., Any], args: Sequence[Any], options: dict[str, Any], family: str, arch: str
) -> Artifacts:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.compiler.compiler import make_backend
    from triton.runtime.jit import create_function_from_signature

    warp = 64 if family == "hip" and arch.startswith("gfx9") else 32
    gpu = GPUTarget(family, int(arch) if family == "cuda" else arch, warp)
    backend = make_backend(gpu)
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialization, _ = bind(*args, **options)
    parsed, signature, constants, attributes = kernel._pack_args(backend, options, bound, specialization, options)
    source: type[Any] = ASTSource
    if kernel.is_gluon():
        from triton.experimental.gluon._runtime import GluonASTSource

        source = GluonASTSource
    compiled = triton.compile(source(kernel, signature, constants, attributes), target=gpu, options=parsed.__dict__)
    return Artifacts(
        kernel=function.__name__,
        target=f"{family}:{arch}",
        triton=triton.__version__,
        # Warp-specialized kernels are launched with more warps than the option says.
        num_warps=int(getattr(compiled.metadata, "num_warps", parsed.num_warps)),
        shared_bytes=int(compiled.metadata.shared),
        texts={stage: compiled.asm[stage] for stage in compiled.asm if stage not in ("source", "sass")},
    )


class _OtherProcess:
    """A Python process without TRITON_INTERPRET that answers requests until its standard input closes."""

    def __init__(self) -> None:
        environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
        self.log = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the process
        self.process = subprocess.Popen(
            [sys.executable, "-m", "fpscompile.gpu.binary"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            env=environment,
        )

    def ask(self, request: Any) -> Any:
        """The answer to one request."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        try:
            pickle.dump(request, self.process.stdin)
            self.process.stdin.flush()
            return pickle.load(self.process.stdout)
        except (EOFError, OSError) as error:
            self.log.seek(0)
            raise BinaryError(f"the compiling process ended:\n{self.log.read()[-4000:].decode()}") from error


_other_processes: dict[str, _OtherProcess] = {}
"""By what they compile for: "cuda", or one of AMD's architectures."""
_asking = threading.Lock()


def _in_another_process(
    function: Callable[..., Any], args: list[Any], options: dict[str, Any], target: str
) -> Artifacts:
    key = "cuda" if target.startswith("cuda:") else target
    with _asking:
        other = _other_processes.get(key)
        if other is None or other.process.poll() is not None:
            other = _other_processes[key] = _OtherProcess()
        source = inspect.getsourcefile(function)
        answer = other.ask((source, function.__name__, args, options, target))
    if isinstance(answer, str):
        raise BinaryError(answer)
    return answer


def _serve() -> None:
    """The other process: answers with artifacts, or with the text of an error."""
    # By its module name: artifacts must unpickle over there as what they are, not as a class of __main__.
    from fpscompile.gpu import binary

    answers = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # Triton prints
    while True:
        try:
            path, name, args, options, target = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        try:
            result: Any = binary._compile_here(getattr(_import(path), name), args, options, target)
        except Exception as error:
            result = str(error) if isinstance(error, FpsError) else repr(error)
        pickle.dump(result, answers)
        answers.flush()


def _import(path: str) -> Any:
    """The module of a source file; each time anew, since the file may have changed."""
    spec = importlib.util.spec_from_file_location("fps_compiled_module", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


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
    """Path of a program that Triton's wheel carries: "ptxas", "ptxas-blackwell", "cuobjdump".

    Raises:
        BinaryError: this build of Triton has none.
    """
    import triton

    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    if not path.exists():
        raise BinaryError(f"{name} is not part of this build of Triton ({path}); install Triton's wheel for Linux")
    return str(path)


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


if __name__ == "__main__":
    _serve()
