"""The look at a kernel after its first launch: on Triton's own ``CompiledKernel``, and on what is nothing like it."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("triton")

from fpscompile.gpu import binary, descriptors, offline
from fpscompile.gpu.compilation import Artifacts, BinaryError
from fpscompile.gpu.config import default_config
from fpscompile.kernel_spec import KernelSpec


@pytest.fixture(autouse=True)
def _nothing_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(binary, "_checked", {})


@pytest.fixture(scope="module")
def artifacts() -> Artifacts:
    spec = KernelSpec("cuda:90", "bfloat16", 64, 64, (4, 4, 4), "fp8", gqa_group=1)
    return offline.forward_artifacts(spec, default_config(spec))


def launched(folder: Path, artifacts: Artifacts, hash_: str = "0f", arch: int = 90):
    """A kernel as Triton's cache hands it to a launch: the real class, made from files."""
    from triton.compiler.compiler import CompiledKernel

    folder.mkdir(parents=True, exist_ok=True)
    files = {}
    for stage, product in artifacts.texts.items():
        path = folder / f"{artifacts.kernel}.{stage}"
        path.write_bytes(product) if isinstance(product, bytes) else path.write_text(product)
        files[path.name] = str(path)
    metadata = {
        "name": artifacts.kernel, "target": {"backend": "cuda", "arch": arch, "warp_size": 32}, "num_warps": 4,
        "num_ctas": 1, "cluster_dims": [1, 1, 1], "shared": artifacts.shared_bytes, "num_stages": 3,
    }  # fmt: skip
    path = folder / f"{artifacts.kernel}.json"
    path.write_text(json.dumps(metadata))
    return CompiledKernel(None, {**files, path.name: str(path)}, hash_)


def test_a_sound_kernel_passes_and_is_looked_at_once(tmp_path, artifacts, monkeypatch, caplog):
    kernel = launched(tmp_path, artifacts)
    looks, disassemble = [], binary._disassemble
    monkeypatch.setattr(binary, "_disassemble", lambda cubin: looks.append(1) or disassemble(cubin))
    with caplog.at_level(logging.WARNING, logger="fpscompile"):
        for _ in range(3):
            binary.refuse_damaged(kernel)
    assert len(looks) == 1
    assert not caplog.records
    binary.refuse_damaged(launched(tmp_path / "other", artifacts, "1f"))
    assert len(looks) == 2


def test_a_damaged_kernel_is_refused_at_every_launch(tmp_path, artifacts, monkeypatch):
    """The PTX asks for another descriptor than the machine code hands over, which is what damage looks like."""
    kernel = launched(tmp_path, artifacts)
    looks = []

    def findings(instructions, ptx):
        looks.append(1)
        wanted = {key: {tuple(c ^ (1 << 62) for c in cs) for cs in found} for key, found in original(ptx).items()}
        monkeypatch.setattr(descriptors, "_wanted", lambda _: wanted)
        return found_by(instructions, ptx)

    original, found_by = descriptors._wanted, descriptors.findings
    monkeypatch.setattr(descriptors, "findings", findings)
    for _ in range(2):
        with pytest.raises(BinaryError, match=f"ptxas damaged the kernel {artifacts.kernel}.*choose another tile"):
            binary.refuse_damaged(kernel)
    assert len(looks) == 1


def test_other_targets_are_not_looked_at(tmp_path, artifacts, monkeypatch):
    monkeypatch.setattr(binary, "_disassemble", lambda cubin: pytest.fail("looked"))
    binary.refuse_damaged(launched(tmp_path, artifacts, arch=89))
    binary.refuse_damaged(None)


class Raising:
    """Every attribute but those of all objects is an error of its own."""

    def __getattr__(self, name: str):
        raise RuntimeError(f"no {name} here")


def target(backend="cuda", arch=90):
    return SimpleNamespace(target=SimpleNamespace(backend=backend, arch=arch), name="f")


@pytest.mark.parametrize(
    "kernel",
    [
        object(),
        SimpleNamespace(hash="a"),
        SimpleNamespace(hash="b", metadata=SimpleNamespace()),
        SimpleNamespace(hash="c", metadata=target(), asm={}),
        SimpleNamespace(hash="d", metadata=target(), asm={"cubin": b"not an ELF file", "ptx": ""}),
        SimpleNamespace(hash="e", metadata=target(), asm={"cubin": "text", "ptx": ""}),
        SimpleNamespace(hash=["unhashable"], metadata=target(), asm=None),
        SimpleNamespace(hash="g", metadata=target(), asm={"cubin": b"", "ptx": None}),
        Raising(),
    ],
    ids=range(9),
)
def test_what_cannot_be_checked_is_a_warning(kernel, caplog):
    with caplog.at_level(logging.WARNING, logger="fpscompile"):
        binary.refuse_damaged(kernel)
        binary.refuse_damaged(kernel)
    assert len(caplog.records) == 1
    assert "could not be checked" in caplog.text


def test_missing_and_hanging_tools_are_warnings(tmp_path, artifacts, monkeypatch, caplog):
    monkeypatch.setattr(binary, "tool", lambda name: str(tmp_path / "gone"))
    with caplog.at_level(logging.WARNING, logger="fpscompile"):
        binary.refuse_damaged(launched(tmp_path, artifacts))
    assert "could not be run" in caplog.text
    sleeper = tmp_path / "sleeper"
    sleeper.write_text("#!/bin/sh\nexec sleep 30\n")
    sleeper.chmod(0o755)
    monkeypatch.setattr(binary, "tool", lambda name: str(sleeper))
    monkeypatch.setattr(binary, "TOOL_SECONDS", 0.1)
    with caplog.at_level(logging.WARNING, logger="fpscompile"):
        binary.refuse_damaged(launched(tmp_path / "second", artifacts, "2f"))
    assert "timed out" in caplog.text


def test_a_report_does_not_hide_a_failing_tool(artifacts, monkeypatch):
    """Offline, where nothing runs, an unreadable binary stays an error."""
    monkeypatch.setattr(binary, "_disassemble", lambda cubin: (_ for _ in ()).throw(BinaryError("gone")))
    with pytest.raises(BinaryError, match="gone"):
        binary.inspect_artifacts(artifacts)
