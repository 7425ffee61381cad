"""Compile a kernel for a GPU that need not be present: ``triton.compile`` takes a target instead of a device.

Arguments are described as at a launch; only their types and alignments matter, so tensors may be on the meta device.
In a process that interprets kernels (``TRITON_INTERPRET=1``) Triton cannot compile; the work is then done by a second
process without the variable, which stays for further requests. AMD's architectures have a process each in any case:
Triton 3.6 chooses some of their conversions once, for the first architecture that a process compiles for.
"""

from __future__ import annotations

import importlib.util
import inspect
import os
import pickle
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fpscompile.errors import FpsError, UnsupportedError
from fpscompile.gpu.interpreter import interpreting

TARGETS = ("cuda:80", "cuda:89", "cuda:90", "cuda:100", "cuda:120", "hip:gfx942", "hip:gfx950")
"""Targets that the project compiles for in its tests."""


class BinaryError(FpsError, RuntimeError):
    """A kernel that does not compile for a target, or compiles into something that must not be shipped."""


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
    """All stages of one compilation.

    Args:
        kernel: a ``@triton.jit`` or ``@gluon.jit`` function of a module that has a file.
        args: its arguments in order, as a launch would pass them: numbers, None, tensors (of any device, meta
            included) or tensor descriptors.
        options: keyword arguments of the launch: constexpr parameters, num_warps, num_stages, maxnreg, ...
        target: see :data:`TARGETS`; other architectures that Triton knows work too.

    Raises:
        BinaryError: it does not compile.
        UnsupportedError: a target that is neither CUDA nor HIP.
    """
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
            [sys.executable, "-m", "fpscompile.gpu.compilation"],
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
    from fpscompile.gpu import compilation

    answers = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # Triton prints
    while True:
        try:
            path, name, args, options, target = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        try:
            result: Any = compilation._compile_here(getattr(_import(path), name), args, options, target)
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


if __name__ == "__main__":
    _serve()
