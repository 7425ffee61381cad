"""The build of the generated C++ kernels: cache, probe, threads, other compilers' flags."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from cpp_cases import TILE, WINDOW, check, make_inputs, make_mask, make_resolved, needs_kernel

from fpscompile import cpp_build, render
from fpscompile.errors import CompilerMissingError, UnsupportedError
from fpscompile.gpu import render as gpu_render
from fpscompile.kernel_spec import KernelSpec
from fpscompile.lowerings import cpp, cpp_backward
from fpscompile.tuning.store import default_path


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
@pytest.mark.parametrize("name", ["my cache", "it's", 'a "b"', "größe"])
def test_any_name_of_a_cache_folder_will_do(name, tmp_path, monkeypatch, fresh_probe):
    monkeypatch.setenv("FPS_CACHE_DIR", str(tmp_path / name))
    assert cpp_build.load(SOURCE % 43).answer() == 43
    assert {path.suffix for path in (tmp_path / name / "cpp").iterdir()} == {".so", ".cpp", ".lock"}


@needs_kernel
@pytest.mark.parametrize("where", ["write_atomically", "_file_lock"])
def test_a_full_or_locked_folder_is_named(where, cold_caches, monkeypatch, fresh_probe):
    def fails(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(cpp_build, where, fails)
    with pytest.raises(UnsupportedError, match=r"no kernel can be built in .*No space left.*set FPS_CACHE_DIR"):
        cpp_build.load(SOURCE % 44)


@needs_kernel
def test_a_temporary_folder_with_spaces_is_named(cold_caches, tmp_path, monkeypatch, fresh_probe):
    (tmp_path / "my tmp").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "my tmp"))
    with pytest.raises(UnsupportedError, match=r"my tmp.*has spaces or quotes: set TMPDIR"):
        cpp_build.load(SOURCE % 45)


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
    monkeypatch.setattr(cpp_build, "write_atomically", lambda *_: pytest.fail("a cached library was built again"))
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
def test_kernels_are_built_while_the_model_is_compiled(cold_caches, fresh_probe):
    """What the graph will call, gradients included, is there when the inner compiler has finished."""
    from models.zoo import wan, wan_inputs

    started = []

    def inner(gm, _):
        threads = [thread for thread in threading.enumerate() if thread.name.startswith("fps-build-")]
        started.extend(threads)
        for thread in threads:
            thread.join()
        return gm

    torch._dynamo.reset()
    model = torch.compile(
        wan(layers=2, attention_head_dim=32),
        backend="fps",
        options={"inner": inner, "lowering": "cpp", "tile": (2, 4, 4)},
    )
    model(**wan_inputs((3, 6, 10)))
    assert len(started) == 2  # one forward, one backward for all layers
    assert len(list((cold_caches / "fps" / "cpp").glob("*.so"))) == 2


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
@pytest.mark.parametrize(("backward", "call"), [(False, cpp._Call), (True, cpp_backward._Call)])
def test_arguments_have_the_size_that_the_kernel_expects(backward, call):
    source = render.render(KernelSpec("cpu", "float32", 64, 64, TILE, backward=backward))
    name = "fps_attention_backward" if backward else "fps_attention"
    cpp_build.entry_point(source, name, ctypes.sizeof(call))
    with pytest.raises(UnsupportedError, match=r"bytes of arguments, not 8: delete"):
        cpp_build.entry_point(source, name, 8)


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


def test_a_cache_folder_is_absolute_and_an_empty_one_is_none(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FPS_CACHE_DIR", "here")
    assert cpp_build.cache_folder() == tmp_path / "here" / "cpp"
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("FPS_CACHE_DIR", "~/there")
    folders = (cpp_build.cache_folder(), gpu_render.cache_folder(), default_path().parent)
    assert folders == (tmp_path / "there" / "cpp", tmp_path / "there" / "triton", tmp_path / "there")
    monkeypatch.setenv("FPS_CACHE_DIR", "")
    assert tmp_path not in cpp_build.cache_folder().parents


def test_a_cache_folder_that_cannot_be_made_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FPS_CACHE_DIR", str(tmp_path / "file"))
    with pytest.raises(UnsupportedError, match="FPS_CACHE_DIR"):
        cpp_build._built("key", "")
