"""``KernelSpec`` and ``KernelConfig`` -> a standalone Triton source file in the cache folder -> its module.

Values of a template are ``tl.constexpr``, structure is Jinja, undefined names are errors. The header names everything
that the text depends on; files are named by their text, so equal kernels share one file, and a file whose text is not
what its name says is discarded with a warning.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import importlib.util
import json
import logging
import math
import threading
from pathlib import Path
from types import ModuleType
from typing import Any

import jinja2
import torch

from fpscompile.files import cache_root, write_atomically
from fpscompile.gpu.config import KernelConfig, padded, rows_of
from fpscompile.gpu.interpreter import interpreting
from fpscompile.hadamard import sign_bits
from fpscompile.kernel_spec import KernelSpec
from fpscompile.quant import SUBTILE

TEMPLATES = {
    "quantize": "quantize.py.jinja",
    "attention": "attention.py.jinja",
    "attention_backward": "attention_backward.py.jinja",
    "attention_hopper": "attention_hopper.py",  # Gluon: all of its structure is chosen by constexpr arguments
}
"""Name of a template to its file."""

FP8_FORMATS = {
    # what Triton calls it, the largest finite value, and the largest power of two that P may be scaled by
    "e4m3": ("float8e4nv", 448.0, 8.0),
    "e4m3fnuz": ("float8e4b8", 240.0, 7.0),
}

HELD = 128 * 128
"""Most values that one program of the pre-pass holds: 64 registers in each of 256 threads."""

log = logging.getLogger("fpscompile")
_lock = threading.Lock()


def fp8_format(target: str) -> str:
    """The E4M3 flavour of a target: gfx942 has its own, without negative zero and with a largest value of 240."""
    return "e4m3fnuz" if target == "hip:gfx942" else "e4m3"


def held_rows(slots: int, dim: int) -> int:
    """Slots of a tile that the pre-pass holds in registers at a time: a power of two that divides the tile.

    A tile is looked at twice, for its maximum and for its values, and the second look is served by the caches: programs
    that hold half a tile, two or three to a multiprocessor, were faster on an H200 than programs that hold it all.
    """
    rows = min(slots & -slots, HELD // dim)
    return rows // 2 if rows == slots and rows * dim > HELD // 2 else rows


def render(template: str, spec: KernelSpec, config: KernelConfig | None = None) -> str:
    """Text of one template.

    Args:
        template: one of :data:`TEMPLATES`.
        config: needed by the attention templates.
    """
    return _render(template, spec, config)


@functools.lru_cache(maxsize=512)
def _render(template: str, spec: KernelSpec, config: KernelConfig | None) -> str:
    if TEMPLATES[template].endswith(".py"):
        return f"{header(template, spec, config)}\n{template_source(template)}"
    name, largest, shift = FP8_FORMATS[fp8_format(spec.target)]
    slots = spec.tile_slots
    subtile = spec.quant == "fp8" and "subtile" in spec.granularities and slots >= SUBTILE
    unit = min(slots, spec.block_n)
    block_m = 0 if config is None else rows_of(config, spec)
    rows = held_rows(slots, padded(spec.head_dim))
    rotation = spec.product_dim if spec.quant == "fp8" and spec.hadamard else 0
    # Two looks for the maximum in one basic block: the second's loads are under way during the first. With a rotation,
    # a full program would spill for it.
    unrolled = slots <= 2 * rows and (not rotation or rows * padded(spec.head_dim) < HELD)
    values: dict[str, Any] = {
        "header": header(template, spec, config),
        "slots": slots,
        "rows": rows,
        "steps": "tl.static_range" if unrolled else "range",
        "run": SUBTILE,
        "runs": slots // SUBTILE if subtile else 1,
        "fp8": name,
        "fp8_max": largest,
        "p_shift": math.log2(spec.p_scale)
        if fp8_format(spec.target) == "e4m3"
        else min(math.log2(spec.p_scale), shift),
        "quant": spec.quant == "fp8",
        "shifted": spec.quant == "fp8" and spec.smooth_k,
        "smooth_v": spec.quant == "fp8" and spec.smooth_v,
        "rotation": rotation,
        "apart": [2**stage for stage in range(max(rotation.bit_length() - 1, 0))],
        "sign_bits": sign_bits(rotation) if rotation else 0,
        "rotation_factor": rotation**-0.5 if rotation else 1.0,
        "turned": "turned" if rotation else "x",
        "bias": spec.key_mask != "none",
        "block_m": block_m,
        "block_n": spec.block_n,
        "unit": unit,
        "scalar_factor": unit == spec.block_n and not subtile,
        "head_dim": spec.product_dim,
        "value_dim": spec.value_dim,
        "dp": padded(spec.head_dim),
        "dvp": padded(spec.value_dim),
        "gqa": spec.gqa_group,
        # The tensor cores' TF32 would drop half of float32's digits; nobody asked for that.
        "precision": ', input_precision="ieee"' if spec.dtype == "float32" else "",
    }
    return _environment().from_string(template_source(template)).render(values)


def header(template: str, spec: KernelSpec, config: KernelConfig | None) -> str:
    """Comment lines that name the spec, the config, the template's hash and the versions."""
    import triton

    source = template_source(template)
    fields = [
        ("spec", _line(dataclasses.asdict(spec))),
        ("config", "" if config is None else _line(dataclasses.asdict(config))),
        ("template", f"triton/{TEMPLATES[template]} sha256:{hashlib.sha256(source.encode()).hexdigest()[:16]}"),
        ("versions", f"torch {torch.__version__}, triton {triton.__version__}"),
    ]
    lines = ["# Rendered by fpscompile."] + [f"# {name}: {value}" for name, value in fields if value]
    return "\n".join(lines)


@functools.lru_cache(maxsize=8)
def template_source(template: str) -> str:
    """Text of a template file."""
    folder = importlib.resources.files("fpscompile") / "templates" / "triton"
    return (folder / TEMPLATES[template]).read_text(encoding="utf-8")


def load(template: str, spec: KernelSpec, config: KernelConfig | None = None) -> ModuleType:
    """The module of a rendered template: written to the cache folder, then imported. One object per text."""
    text = render(template, spec, config)
    return _module(text, template, interpreting(), cache_folder())


_modules: dict[tuple[str, bool], ModuleType] = {}


def _module(text: str, template: str, interpreted: bool, folder: Path) -> ModuleType:
    with _lock:
        key = (text, interpreted)
        if key not in _modules:
            name = f"fps_{template}_{hashlib.sha256(text.encode()).hexdigest()[:16]}"
            spec = importlib.util.spec_from_file_location(name, _file(folder / f"{name}.py", text))
            assert spec is not None
            assert spec.loader is not None
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
            _modules[key] = module
        return _modules[key]


def cache_folder() -> Path:
    """``FPS_CACHE_DIR/triton``; without the variable, a folder inside Inductor's cache."""
    return cache_root() / "triton"


def _file(path: Path, text: str) -> Path:
    """``path`` holding ``text``, written only where it does not hold it yet."""
    try:
        if path.read_text(encoding="utf-8") == text:
            return path
        log.warning("%s is not what its name says: it is written anew", path)
    except FileNotFoundError:
        pass
    return write_atomically(path, text)


def _environment() -> jinja2.Environment:
    return jinja2.Environment(
        undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    )


def _line(value: dict[str, Any]) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"))
