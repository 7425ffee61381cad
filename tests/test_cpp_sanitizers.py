"""The rendered kernels under AddressSanitizer and UndefinedBehaviorSanitizer.

Each runs in a process of its own, since the sanitizer must be there before torch is: its allocator then puts guard
zones around every tensor, so that a read or write past the end of one is an error.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from cpp_cases import needs_kernel

from fpscompile import cpp_build

FLAGS = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer")

CALL = """
import sys
import torch
from cpp_cases import FULL, WINDOW, make_inputs, make_mask, make_resolved
from fpscompile import cpp_build
from fpscompile.lowerings import cpp

cpp_build.FLAGS = (*cpp_build.FLAGS, *sys.argv[2].split())
resolved = make_resolved(WINDOW, FULL, q_others=(3, 5), k_others=(3, 40), quant=sys.argv[1])
q, k, v = make_inputs(resolved, d=72, d_v=40, key_heads=1)
key_mask = make_mask("float", 2, 2, resolved.k_layout.length)
common = {"key_mask": key_mask, "phases": (0, 1), "resolved": resolved, "scale": 0.2}
out, lse = cpp.forward(q, k, v, **common)
cpp.backward(torch.randn_like(out), q, k, v, out, lse, **common)
if len(sys.argv) > 3:
    tables = cpp.slot_table
    short = lambda *x: type("Short", (), {**vars(tables(*x)), "slots": tables(*x).slots - 64})
    cpp.slot_table = short
    cpp.forward(q, k, v, **common)
print("clean")
"""


def run(quant: str, folder: Path, *more: str) -> subprocess.CompletedProcess[str]:
    command = cpp_build.compiler()[0]
    names = ("libasan.so", "libstdc++.so.6")
    paths = [
        subprocess.run([command, f"-print-file-name={name}"], capture_output=True, text=True, check=True).stdout.strip()
        for name in names
    ]
    if not all(os.path.isabs(path) for path in paths):
        pytest.skip(f"{command} has no AddressSanitizer runtime")
    environment = {
        **os.environ,
        "LD_PRELOAD": " ".join(paths),
        "ASAN_OPTIONS": "detect_leaks=0",  # Python and torch keep what they like
        "FPS_CACHE_DIR": str(folder),
        "OMP_NUM_THREADS": "2",
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]),
    }
    arguments = [sys.executable, "-c", CALL, quant, " ".join(FLAGS), *more]
    return subprocess.run(arguments, env=environment, capture_output=True, text=True, timeout=600)


@needs_kernel
@pytest.mark.slow
@pytest.mark.parametrize("quant", ["none", "int8", "fp8"])
def test_clean(quant, tmp_path):
    if quant == "int8" and cpp_build.unavailable("int8") is not None:
        pytest.skip(cpp_build.unavailable("int8"))
    done = run(quant, tmp_path)
    assert done.returncode == 0, done.stderr
    assert "clean" in done.stdout


@needs_kernel
@pytest.mark.slow
def test_a_buffer_that_is_too_short_is_noticed(tmp_path):
    """The check itself: packed copies shorter than what the kernel writes."""
    done = run("none", tmp_path, "short")
    assert done.returncode != 0
    assert "AddressSanitizer" in done.stderr
