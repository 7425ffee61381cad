"""What this machine will use, in plain words, and what is missing: checks that only look, and one that builds."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from fpscompile import cpp_build
from fpscompile.errors import CompilerMissingError, FpsError
from fpscompile.files import cache_root
from fpscompile.gpu.call import target_of, why_not
from fpscompile.lowerings import cpp
from fpscompile.plan import PhasePlan, Plan
from fpscompile.settings import QUANT
from fpscompile.tuning import store
from fpscompile.tuning.signature import device_name

LEAST_FREE_BYTES = 200 << 20


@dataclass(frozen=True)
class Finding:
    """One line of the report."""

    level: str
    """"ok", "info" (a choice that could be better), "warning" (something is off) or "error" (something will fail)."""
    subject: str
    text: str
    remedy: str = ""
    """What to do about it; "" where there is nothing to do."""


def examine(*, build: bool = False) -> list[Finding]:
    """All findings, in reading order.

    Args:
        build: also build a small kernel, run it and compare it with the reference (some seconds, once).
    """
    found = [*_versions(), *_processor(), *_compiler(), *_cpu_kernels(), *_gpus(), *_folders(), *_environment()]
    if build:
        found += _trial()
    return found


def _versions() -> Iterator[Finding]:
    names = {}
    for package in ("fpscompile", "triton", "diffusers"):
        try:
            names[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            names[package] = "not installed"
    yield Finding(
        "ok",
        "versions",
        f"Python {platform.python_version()}, torch {torch.__version__}, "
        + ", ".join(f"{name} {version}" for name, version in names.items()),
    )
    if sys.platform != "linux":
        yield Finding("warning", "system", f"{sys.platform} is not tested", "use Linux")


def _processor() -> Iterator[Finding]:
    yield Finding("ok", "processor", f"{device_name('cpu')}, {platform.machine()}")
    if not torch.backends.mkldnn.is_available():
        yield Finding(
            "warning", "oneDNN", "this build of torch has none: the generated CPU kernels cannot run",
            "install torch from pytorch.org or PyPI",
        )  # fmt: skip


def _compiler() -> Iterator[Finding]:
    try:
        command, version = cpp_build.compiler()
        yield Finding("ok", "C++ compiler", f"{command}: {version}")
    except CompilerMissingError:
        yield Finding(
            "warning", "C++ compiler",
            "none works: no generated CPU kernels, and inner='inductor' fails for models on a CPU",
            "install g++ >= 11 or clang++ >= 14, or set CXX; until then pass options={'inner': 'aot_eager'}",
        )  # fmt: skip


def _cpu_kernels() -> Iterator[Finding]:
    """Which lowering each kind of model on a CPU gets."""
    cases = [("float32", "none"), ("bfloat16", "none"), ("float16", "none")]
    cases += [("float32", quant) for quant in ("fp8", "int8") if quant in QUANT]
    for dtype, quant in cases:
        plan = Plan((4, 8, 8), (PhasePlan(density=1.0),), quant=quant)
        reason = cpp.why_not(getattr(torch, dtype), 64, 64, plan)
        subject = f"{dtype} on CPU" if quant == "none" else f"{quant} on CPU"
        slower = cpp_build.slower_than_boxes() if quant == "none" and reason is None else None
        if slower is not None:
            yield Finding("info", subject, f"lowering boxes: {slower}")
        elif reason is None:
            narrow = cpp.widened(dtype, plan)
            wide = f"; it multiplies in float32, since {narrow}" if narrow else ""
            yield Finding("ok", subject, f"the generated C++ kernel (lowering 'cpp'){wide}")
        else:
            fallback = {"fp8": "gather, slow: for studies of accuracy", "int8": "boxes, without quantization"}
            yield Finding("info", subject, f"lowering {fallback.get(quant, 'boxes')}: {reason}")


def _gpus() -> Iterator[Finding]:
    if not torch.cuda.is_available():
        built = torch.version.cuda or torch.version.hip
        what = f"none is visible, though torch is built for {built}" if built else "none; this torch is built without"
        yield Finding("info", "GPU", what)
        return
    try:
        importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        yield Finding(
            "warning", "GPU", "Triton is missing: attention falls back to boxes, without FP8",
            'pip install "fpscompile[gpu]"',
        )  # fmt: skip
    for index in range(torch.cuda.device_count()):
        device = torch.device("cuda", index)
        target = target_of(device)
        name = f"{torch.cuda.get_device_name(device)} ({target})"
        for dtype, quant in (("bfloat16", "fp8"), ("bfloat16", "none")):
            plan = Plan((4, 8, 8), (PhasePlan(density=1.0),), quant=quant)
            reason = why_not(getattr(torch, dtype), 128, 128, plan, device)
            words = "the generated Triton kernels (lowering 'triton')" if reason is None else f"not available: {reason}"
            yield Finding("ok" if reason is None else "info", f"{quant if quant != 'none' else dtype} on {name}", words)


def _folders() -> Iterator[Finding]:
    folder = cache_root()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder):
            pass
        free = shutil.disk_usage(folder).free
        if free < LEAST_FREE_BYTES:
            yield Finding(
                "warning", "cache folder", f"{folder} has {free >> 20} MiB left", "free some, or set FPS_CACHE_DIR"
            )
        else:
            yield Finding("ok", "cache folder", f"{folder}, writable")
    except OSError as error:
        yield Finding(
            "error", "cache folder", f"{folder} cannot be written: {error.strerror or error}",
            "set FPS_CACHE_DIR to a folder that can",
        )  # fmt: skip
    loaded = store.read(store.default_path())
    if loaded.message:
        yield Finding("warning", "tuning file", loaded.message, "delete it, or move it away")
        return
    entries = loaded.contents.sites.values()
    here = sum(entry.get("signature", {}).get("device") in _devices() for entry in entries)
    others = f", {len(entries) - here} on others" if entries else ""
    yield Finding(
        "ok" if here else "info",
        "tuning file",
        f"{store.default_path()}: {here} kernels tuned on this machine{others}",
        "" if here else "fpscompile tune measures which kernels are the fastest here",
    )  # fmt: skip


def _devices() -> set[str]:
    found = {device_name("cpu")}
    if torch.cuda.is_available():
        found |= {device_name(f"cuda:{index}") for index in range(torch.cuda.device_count())}
    return found


def _environment() -> Iterator[Finding]:
    if os.environ.get("FPS_DISABLE", "0") not in ("", "0"):
        yield Finding("warning", "FPS_DISABLE", "is set: nothing will be rewritten", "unset it")
    if not torch.backends.mkldnn.enabled:
        yield Finding("warning", "oneDNN", "is switched off", "set torch.backends.mkldnn.enabled = True")
    if os.environ.get("TRITON_INTERPRET", "0") == "1":
        yield Finding(
            "warning", "TRITON_INTERPRET", "is set: Triton kernels run in an interpreter, for tests only", "unset it"
        )


def _trial() -> Iterator[Finding]:
    from fpscompile.plan import resolve
    from fpscompile.tuning.problem import Candidate, Problem

    for dtype in (torch.float32, torch.bfloat16):
        name = str(dtype).removeprefix("torch.")
        plan = Plan((2, 4, 4), (PhasePlan(window=(1, 1, 2)),), lowering="cpp")
        if cpp.why_not(dtype, 64, 64, plan) is not None:
            continue
        problem = Problem(resolve(plan, (4, 8, 8), 256, 256), 2, 2, 64, 64, dtype, torch.device("cpu"))
        began = time.perf_counter()
        try:
            error = problem.error(Candidate("cpp"), problem.inputs())
        except (FpsError, OSError, RuntimeError) as failure:
            text = " ".join(str(failure).split())[:300]
            yield Finding("error", f"trial, {name}", f"the generated kernel does not build or run: {text}",
                          "choose lowering='boxes'")  # fmt: skip
            continue
        seconds = time.perf_counter() - began
        right = error <= problem.tolerance
        yield Finding(
            "ok" if right else "error",
            f"trial, {name}",
            f"the generated kernel was built and run in {seconds:.1f} s, relative error {error:.1e}",
            "" if right else "choose lowering='boxes', and report this",
        )
