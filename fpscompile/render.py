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

TEMPLATE = "cpp/attention.cpp.jinja"

HEAD_DIMS = (32, 256)
"""Smallest and largest head dim, of Q and K as well as of V, that the CPU kernel takes."""

COMPUTE = {"float32": "float32", "bfloat16": "bfloat16", "float16": "float32"}
"""Input dtype to the dtype of the operands of the matrix products; they accumulate in float32. float16 goes to
float32, since bfloat16 would lose three bits of it."""

LANES = 16
"""float32 values per vector; rows and key slots come in this granule."""

PANEL = 64
"""Keys that lie side by side in the packed K."""

_EXP2 = {
    # coefficients of 2^f on [0, 1], constant term first, and the largest relative error in float32
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
    """Dtype of the operands of the matrix products: "float32" or "bfloat16"."""

    def is_valid(self, spec: KernelSpec) -> bool:
        """Whether the template can be rendered with this config."""
        return (
            self.block_m >= LANES
            and self.block_m % LANES == 0
            and self.block_n >= PANEL
            and self.block_n % PANEL == 0
            and self.compute in _EXP2
            and (self.compute == "float32" or spec.dtype == self.compute)
        )


def unsupported(spec: KernelSpec) -> str | None:
    """Why the CPU kernel does not implement ``spec``; None if it does."""
    low, high = HEAD_DIMS
    if spec.target != "cpu":
        return f"target={spec.target!r} is not 'cpu'"
    if spec.backward:
        return "it has no backward template"
    if spec.quant != "none":
        return f"it computes without quantization, and the spec has quant={spec.quant!r}"
    if spec.dtype not in COMPUTE:
        return f"it takes {', '.join(COMPUTE)}, not {spec.dtype}"
    for name, dim in (("head_dim", spec.head_dim), ("value_dim", spec.value_dim)):
        if not low <= dim <= high:
            return f"{name}={dim} is outside {low} to {high}"
    return None


def default_config(spec: KernelSpec) -> CppConfig:
    """The config for a spec: blocks of one tile or a few, and a working set that fits 1 MiB of second-level cache.

    Raises:
        UnsupportedError: see :func:`unsupported`.
    """
    _check(spec)
    compute = COMPUTE[spec.dtype]
    rows = -(-math.prod(spec.tile) // LANES) * LANES
    return CppConfig(block_m=min(rows, 128), block_n=512 if compute == "bfloat16" else 256, compute=compute)


def canonical(spec: KernelSpec) -> KernelSpec:
    """``spec`` with every field that the template does not read at its default: equal ones share a build."""
    read = {name: getattr(spec, name) for name in ("target", "dtype", "head_dim", "value_dim", "tile", "key_mask")}
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
    return _render(canonical(spec), config)


@functools.lru_cache(maxsize=256)
def _render(spec: KernelSpec, config: CppConfig) -> str:
    coefficients, error = _EXP2[config.compute]
    return (
        _environment()
        .from_string(template_source())
        .render(
            header=header(spec, config),
            spec=spec,
            config=config,
            brgemm_type="c10::BFloat16" if config.compute == "bfloat16" else "float",
            exp2_coefficients=coefficients,
            exp2_error=error,
        )
    )


def header(spec: KernelSpec, config: CppConfig) -> str:
    """Comment lines that name the spec, the config, the template's hash and the versions."""
    fields: list[tuple[str, Any]] = [
        ("spec", _line(dataclasses.asdict(spec))),
        ("config", _line(dataclasses.asdict(config))),
        ("template", f"{TEMPLATE} sha256:{template_hash()}"),
        ("torch", torch.__version__),
    ]
    lines = ["// Rendered by fpscompile: block-sparse attention, forward, on a CPU."]
    lines += [f"// {name}: {value}" for name, value in fields]
    return "\n".join(lines)


def template_source() -> str:
    """Text of the template."""
    return (importlib.resources.files("fpscompile") / "templates" / TEMPLATE).read_text(encoding="utf-8")


def template_hash() -> str:
    """First 16 hex digits of the SHA-256 of the template's text."""
    return hashlib.sha256(template_source().encode()).hexdigest()[:16]


def _environment() -> jinja2.Environment:
    return jinja2.Environment(
        undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    )


def _check(spec: KernelSpec) -> None:
    reason = unsupported(spec)
    if reason is not None:
        raise UnsupportedError(f"lowering 'cpp': {reason}; choose lowering='boxes' (or 'gather' with quant='fp8')")


def _line(value: dict[str, Any]) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"))
