"""``KernelSpec`` -> source text: one standalone C++ file per spec, with a header that says what it is.

Values of a template are ``constexpr``, structure is Jinja, undefined names are errors. The header names everything that
the text depends on, so equal texts are equal kernels and a cache may be keyed by the text.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import importlib.resources
import json
import math
from dataclasses import dataclass
from typing import Any

import jinja2
import torch

from fpscompile.errors import UnsupportedError
from fpscompile.kernel_spec import KernelSpec

FOLDER = "cpp"
TEMPLATES = {False: "attention.cpp.jinja", True: "backward.cpp.jinja"}
"""``KernelSpec.backward`` to a file in the folder of the CPU templates."""

HEAD_DIMS = (32, 256)
"""Smallest and largest head dim, of Q and K as well as of V, that the CPU kernel takes."""

COMPUTE = {"float32": "float32", "bfloat16": "bfloat16", "float16": "float32"}
"""Input dtype to the dtype of the operands of the matrix products where nobody chose one; they accumulate in float32.
float16 goes to float32, since bfloat16 would lose three bits of it."""

OPERANDS = {
    # compute: C++ types of the left and the right operand
    "float32": ("float", "float"),
    "bfloat16": ("c10::BFloat16", "c10::BFloat16"),
    "int8": ("unsigned char", "signed char"),
}

LANES = 16
"""float32 values per vector; rows and key slots come in this granule."""

PANEL = {"float32": 64, "bfloat16": 64, "int8": 256}
"""Compute to the number of keys that lie side by side in the packed K. Products of bytes are so short that the call
costs as much as the product of 64 keys."""

_EXP2 = {
    # coefficients of 2^f on [0, 1], constant term first, and the largest relative error in float32
    "int8": (("1.00172476e+00f", "6.5763628e-01f", "3.3718943e-01f"), "1.7e-3"),
    "bfloat16": (
        ("1.0000025934e+00f", "6.9300383447e-01f", "2.4144275689e-01f", "5.2011460616e-02f", "1.3534167913e-02f"),
        "2.7e-6",
    ),
    "float32": (
        (
            "9.9999992506e-01f",
            "6.9315307320e-01f",
            "2.4015361704e-01f",
            "5.5826318053e-02f",
            "8.9893400911e-03f",
            "1.8775766749e-03f",
        ),
        "1.5e-7",
    ),
}


@dataclass(frozen=True)
class CppConfig:
    """How fast the kernel is; it changes results by rounding only."""

    block_m: int
    """Query rows handled together."""
    block_n: int
    """Key slots per step of the online softmax."""
    compute: str
    """Operands of the matrix products: "float32", "bfloat16", or "int8" (bytes, with ``quant="int8"``)."""
    threads: int = 0
    """Of a call, at most as many as torch uses; 0: as many. The source does not depend on it."""

    def is_valid(self, spec: KernelSpec) -> bool:
        """Whether the template can be rendered with this config."""
        return (
            self.block_m >= LANES
            and self.block_m % LANES == 0
            and self.threads >= 0
            and self.compute in OPERANDS
            and (self.compute == "int8") == (spec.quant == "int8")
            # FP8 fixes where P is rounded; elsewhere blocks are whole panels.
            and (self.block_n == spec.block_n if spec.quant == "fp8" else self.block_n >= PANEL[self.compute])
            and self.block_n % (LANES if spec.quant == "fp8" else PANEL[self.compute]) == 0
        )


def unsupported(spec: KernelSpec) -> str | None:
    """Why the CPU kernel does not implement ``spec``; None if it does."""
    low, high = HEAD_DIMS
    if spec.target != "cpu":
        return f"target={spec.target!r} is not 'cpu'"
    if spec.dtype not in COMPUTE:
        return f"it takes {', '.join(COMPUTE)}, not {spec.dtype}"
    if spec.backward and spec.quant != "none":
        return f"gradients are those of dequantized operands, and the spec has quant={spec.quant!r}"
    for name, dim in (("head_dim", spec.head_dim), ("value_dim", spec.value_dim)):
        if not low <= dim <= high:
            return f"{name}={dim} is outside {low} to {high}"
    return None


def default_config(spec: KernelSpec, compute: str | None = None) -> CppConfig:
    """The config for a spec: blocks of one tile or a few, and a working set that fits 1 MiB of second-level cache.

    Args:
        compute: operands of the products, "float32" or "bfloat16"; None means :data:`COMPUTE`'s, and float32 where
            the spec quantizes to FP8. Not read with ``quant="int8"``.

    Raises:
        UnsupportedError: see :func:`unsupported`.
    """
    _check(spec)
    rows = min(-(-math.prod(spec.tile) // LANES) * LANES, 128)
    if spec.quant == "int8":
        return CppConfig(block_m=rows, block_n=512, compute="int8")
    if spec.quant == "fp8":
        return CppConfig(block_m=rows, block_n=spec.block_n, compute=compute or "float32")
    compute = compute or COMPUTE[spec.dtype]
    if spec.backward:
        return CppConfig(block_m=rows, block_n=256, compute=compute)
    wide = compute == "float32" and max(spec.head_dim, spec.value_dim) > 128
    return CppConfig(block_m=rows, block_n=256 if wide else 512, compute=compute)


def canonical(spec: KernelSpec) -> KernelSpec:
    """``spec`` with every field that the template does not read at its default: equal ones share a build."""
    names = ["target", "dtype", "head_dim", "value_dim", "tile", "key_mask", "quant", "backward"]
    names += {"none": [], "fp8": ["block_n", "p_scale", "smooth_v", "hadamard"], "int8": ["smooth_k"]}[spec.quant]
    read = {name: getattr(spec, name) for name in names}
    if read["key_mask"] != "none":
        read["key_mask"] = "float"  # a bool mask arrives as a term of the scores
    return KernelSpec(**read)


def render(spec: KernelSpec, config: CppConfig | None = None) -> str:
    """The source of the kernel that computes ``spec``.

    Raises:
        UnsupportedError: a spec that no template implements; the message names the field.
    """
    _check(spec)
    config = config or default_config(spec)
    if not config.is_valid(spec):
        raise UnsupportedError(f"{config} does not fit {spec}: see CppConfig.is_valid")
    return _render(canonical(spec), dataclasses.replace(config, threads=0))


@functools.lru_cache(maxsize=256)
def _render(spec: KernelSpec, config: CppConfig) -> str:
    coefficients, error = _EXP2[config.compute]
    left, right = OPERANDS[config.compute]
    return (
        _environment()
        .get_template(TEMPLATES[spec.backward])
        .render(
            header=header(spec, config),
            spec=spec,
            config=config,
            input="e4m3" if spec.quant == "fp8" else spec.dtype,
            left=left,
            right=right,
            panel=PANEL[config.compute],
            exp2_coefficients=coefficients,
            exp2_error=error,
            exact_coefficients=_EXP2["float32"][0],
        )
    )


def header(spec: KernelSpec, config: CppConfig) -> str:
    """Comment lines that name the spec, the config, the template's hash and the versions."""
    fields: list[tuple[str, Any]] = [
        ("spec", _line(dataclasses.asdict(spec))),
        ("config", _line({name: value for name, value in vars(config).items() if name != "threads"})),
        ("template", f"{FOLDER}/{TEMPLATES[spec.backward]} sha256:{template_hash()}"),
        ("torch", torch.__version__),
    ]
    direction = "backward" if spec.backward else "forward"
    lines = [f"// Rendered by fpscompile: block-sparse attention, {direction}, on a CPU."]
    lines += [f"// {name}: {value}" for name, value in fields]
    return "\n".join(lines)


def template_sources() -> dict[str, str]:
    """File name -> text of the templates of the CPU kernels; those that begin with "_" are parts of the others."""
    folder = importlib.resources.files("fpscompile") / "templates" / FOLDER
    return {
        file.name: file.read_text(encoding="utf-8")
        for file in sorted(folder.iterdir(), key=lambda file: file.name)
        if file.name.endswith(".jinja")
    }


def template_hash() -> str:
    """First 16 hex digits of the SHA-256 of all templates, since any may be part of a kernel."""
    return hashlib.sha256(json.dumps(template_sources(), sort_keys=True).encode()).hexdigest()[:16]


def _environment() -> jinja2.Environment:
    return jinja2.Environment(
        loader=jinja2.DictLoader(template_sources()),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )


def _check(spec: KernelSpec) -> None:
    reason = unsupported(spec)
    if reason is not None:
        raise UnsupportedError(f"lowering 'cpp': {reason}; choose lowering='boxes' (or 'gather' with quant='fp8')")


def _line(value: dict[str, Any]) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"))
