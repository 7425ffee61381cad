"""Source text -> loaded library: build, cache, and the probe that says whether this machine can run it.

The compile command is torch's own (``torch._inductor.cpp_builder``), so ``CXX`` and Inductor's settings count. A
library lies in the cache folder under the hash of its source, the command, the compiler and the processor. It is built
under a file lock, next to its final name, and moved there in one step: processes that start together build it once,
and one that is killed leaves no half a library.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from fpscompile.errors import CompilerMissingError, UnsupportedError
from fpscompile.files import cache_root, write_atomically

logger = logging.getLogger("fpscompile.cpp_build")

FLAGS = ("-ffp-contract=fast", "-ftree-loop-vectorize", "-fvisibility=hidden", "-w")
"""On top of torch's. The last silences remarks on vector types that never leave the file, and on GCC's own headers."""

LOCK_SECONDS = 600
MESSAGE_BYTES = 1024

SYMBOLS = {
    "float32": "_ZN2at6native7cpublas6brgemmEllllllbPKfS3_Pfb",
    "bfloat16": "_ZN2at6native7cpublas6brgemmEllllllbPKN3c108BFloat16ES5_Pfb",
    "int8": "_ZN2at6native7cpublas6brgemmEllllllbPKhPKaPib",
}
"""torch's micro-kernel for each compute dtype, as the linker knows it."""

CPU_FLAGS = {
    "float32": ("avx2", "fma", "f16c"),
    "bfloat16": ("avx512f", "avx512bw", "avx512dq", "avx512_bf16"),
    "int8": ("avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_vnni"),
}
"""What the processor must offer for a compute dtype to be fast."""

WIDE_FLAG = "avx512f"
"""Without it torch's micro-kernel for float32 is an ordinary small matrix product, and boxes are about twice as fast as
the generated kernel (0.4 to 0.75 of its time from 2k to 8k tokens, head dims 64 and 128, on a Zen 3 processor)."""

BOXES_FROM = 1024
"""Query tokens from which that holds: at 500 the two were about equal, at 256 boxes took 2.6 times as long."""

_loaded: dict[str, ctypes.CDLL] = {}
_building: dict[str, threading.Lock] = {}
_lock = threading.Lock()


def unavailable(compute: str = "float32") -> str | None:
    """Why the generated kernel cannot run here, or None.

    Answers are kept for the life of the process, except for ``torch.backends.mkldnn.enabled``, which may change.

    Args:
        compute: "float32", "bfloat16" or "int8", the dtype of the operands of the matrix products.
    """
    if not torch.backends.mkldnn.enabled:
        return "oneDNN is off: set torch.backends.mkldnn.enabled = True"
    return _unavailable(compute)


def slower_than_boxes(tokens: int = BOXES_FROM) -> str | None:
    """Why ``lowering="auto"`` takes boxes on this processor for so many query tokens where it can choose, or None."""
    if WIDE_FLAG in processor_flags() or tokens < BOXES_FROM:
        return None
    return f"the processor lacks {WIDE_FLAG}, without which dense attention of boxes is faster"


@functools.lru_cache(maxsize=8)
def _unavailable(compute: str) -> str | None:
    if not torch.backends.mkldnn.is_available():
        return "this build of torch has no oneDNN: install one that has"
    missing = [flag for flag in CPU_FLAGS[compute] if flag not in processor_flags()]
    if missing:
        return f"the processor lacks {', '.join(missing)}, needed for {compute} products"
    if not _has_symbol(SYMBOLS[compute]):
        return f"torch {torch.__version__} does not export the {compute} micro-kernel (at::native::cpublas::brgemm)"
    try:
        compiler()
    except CompilerMissingError as error:
        return str(error)
    return None


@functools.lru_cache(maxsize=1)
def compiler() -> tuple[str, str]:
    """(command, first line of its version) of the C++ compiler that torch would use.

    Raises:
        CompilerMissingError: none is found, or it does not run.
    """
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        command = get_cpp_compiler()
        text = subprocess.run([command, "--version"], capture_output=True, text=True, check=True, timeout=60).stdout
    except (InvalidCxxCompiler, OSError, subprocess.SubprocessError) as error:
        raise CompilerMissingError(
            f"no working C++ compiler ({type(error).__name__}): install g++ or clang++, or set CXX to one"
        ) from error
    return command, text.split("\n", 1)[0]


@functools.lru_cache(maxsize=1)
def processor_flags() -> frozenset[str]:
    """Instruction sets of the first processor, as /proc/cpuinfo names them; empty where there is no such file."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return frozenset()
    return frozenset(next((line.split(":", 1)[1] for line in lines if line.startswith("flags")), "").split())


def cache_folder() -> Path:
    """``FPS_CACHE_DIR/cpp``; without the variable, a folder inside Inductor's cache."""
    return cache_root() / "cpp"


def load(source: str) -> ctypes.CDLL:
    """The library of ``source``, built unless the cache has it. Safe for many threads and processes.

    Raises:
        CompilerMissingError: no C++ compiler.
        UnsupportedError: the compiler rejects the source, or the library cannot be loaded.
    """
    key = library_key(source)
    with _lock:
        building = _building.setdefault(key, threading.Lock())
    with building:  # of this library only: others build beside it
        if key not in _loaded:
            path = _built(key, source)
            try:
                _loaded[key] = ctypes.CDLL(str(path))
            except OSError as error:
                raise UnsupportedError(
                    f"{path} cannot be loaded ({error}): delete it, set FPS_CACHE_DIR to a folder whose files may be "
                    "executed, or choose lowering='boxes'"
                ) from error
        return _loaded[key]


def build_ahead(source: str) -> threading.Thread | None:
    """Start to :func:`load` the library of ``source`` on a thread of its own; None where that is done already.

    What goes wrong there is logged, and raised by whoever loads the library for use.
    """
    key = library_key(source)
    with _lock:
        if key in _loaded or key in _building:
            return None
        _building[key] = threading.Lock()  # claimed here: the thread may start late, and the next layer asks at once

    def work() -> None:
        try:
            load(source)
        except (CompilerMissingError, UnsupportedError) as error:
            logger.info("a kernel could not be built ahead of its use: %s", error)

    thread = threading.Thread(target=work, name=f"fps-build-{key[:8]}", daemon=True)
    thread.start()
    return thread


def entry_point(source: str, name: str, call_bytes: int):  # type: ignore[no-untyped-def]  # a ctypes function pointer
    """The function ``name`` of the library of ``source``, for :func:`run`.

    Args:
        call_bytes: size of the structure of arguments that Python will pass.

    Raises:
        UnsupportedError: the library expects another structure, and as :func:`load`.
    """
    library = load(source)
    library.fps_call_bytes.restype = ctypes.c_int64
    if library.fps_call_bytes() != call_bytes:
        raise UnsupportedError(
            f"{name} expects {library.fps_call_bytes()} bytes of arguments, not {call_bytes}: delete {cache_folder()}"
        )
    function = getattr(library, name)
    function.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_int64]
    function.restype = ctypes.c_int
    return function


def run(function, call: ctypes.Structure) -> None:  # type: ignore[no-untyped-def]  # a ctypes function pointer
    """Call a kernel.

    Raises:
        UnsupportedError: an exception inside the kernel, with its text.
    """
    message = ctypes.create_string_buffer(MESSAGE_BYTES)
    if function(ctypes.byref(call), message, MESSAGE_BYTES):
        raise UnsupportedError(
            f"lowering 'cpp' failed: {message.value.decode(errors='replace')}; choose lowering='boxes'"
        )


def library_key(source: str) -> str:
    """Hash of all that the machine code depends on."""
    parts = [
        source,
        _builder("key", "key.cpp", "").get_command_line(),
        *compiler(),
        torch.__version__,
        platform.machine(),
        *sorted(processor_flags()),
    ]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32]


def _built(key: str, source: str) -> Path:
    folder = cache_folder()
    library = folder / f"{key}.so"
    if library.exists():
        return library
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _file_lock(folder / f"{key}.lock"):
            if not library.exists():
                _build(source, library)
    except OSError as error:
        raise UnsupportedError(_unusable(folder, error)) from error
    return library


def _build(source: str, library: Path) -> None:
    """Compile in a folder whose name has no spaces or quotes: torch's command lines do not escape them."""
    from torch._inductor.exc import CppCompileError

    text = library.with_suffix(".cpp")
    write_atomically(text, source)
    start = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="fps_build_") as folder:
        if any(char.isspace() or char in "'\"\\" for char in folder):
            raise UnsupportedError(
                f"no kernel can be built in {folder}, whose name has spaces or quotes: set TMPDIR to another folder"
            )
        copy = Path(folder) / text.name
        copy.write_text(source)
        builder = _builder(library.stem, str(copy), folder)
        try:
            builder.build()
        except CppCompileError as error:
            raise UnsupportedError(
                f"{compiler()[0]} rejects {text}; choose lowering='boxes', or set CXX to g++ >= 11 or clang++ >= 14\n"
                f"{error}"
            ) from error
        beside = library.with_suffix(f".{os.getpid()}.{threading.get_ident()}")
        try:
            shutil.copy(builder.get_target_file_path(), beside)
            os.replace(beside, library)
        finally:
            beside.unlink(missing_ok=True)
    logger.info("built %s in %.1f s", library, time.perf_counter() - start)


def _unusable(folder: Path, error: OSError) -> str:
    return f"no kernel can be built in {folder} ({error}): set FPS_CACHE_DIR to a folder that can be written"


def _builder(name: str, source: str, folder: str):  # type: ignore[no-untyped-def]  # torch's class is not typed
    """torch's ``CppBuilder`` for one library that links torch's kernels and its OpenMP."""
    from torch._inductor.cpp_builder import CppBuilder, CppTorchOptions
    from torch._inductor.cpu_vec_isa import invalid_vec_isa

    options = CppTorchOptions(vec_isa=invalid_vec_isa, extra_flags=FLAGS)
    return CppBuilder(name=name, sources=source, BuildOption=options, output_dir=folder)


@contextlib.contextmanager
def _file_lock(path: Path) -> Iterator[None]:
    from torch.utils._filelock import FileLock

    with FileLock(str(path), timeout=LOCK_SECONDS):
        yield


@functools.lru_cache(maxsize=8)
def _has_symbol(name: str) -> bool:
    folder = Path(torch.__file__).parent / "lib"
    try:
        library = ctypes.CDLL(str(folder / "libtorch_cpu.so"))
    except OSError:
        return False
    return hasattr(library, name)


def forget() -> None:
    """Drop what this process knows: probes and loaded libraries. For tests and for a changed environment."""
    _unavailable.cache_clear()
    compiler.cache_clear()
    processor_flags.cache_clear()
    with _lock:
        _loaded.clear()
        _building.clear()
