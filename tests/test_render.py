"""Rendering: the header, what shares a source, what is refused, and that a source stands alone."""

from __future__ import annotations

import dataclasses
import re
import subprocess

import jinja2
import pytest
import torch

from fpscompile import cpp_build, render
from fpscompile.errors import UnsupportedError
from fpscompile.kernel_spec import KernelSpec
from fpscompile.render import CppConfig

SPEC = KernelSpec("cpu", "bfloat16", 64, 72, (2, 4, 4))


def test_header():
    text = render.render(SPEC)
    assert text.split("\n\n", 1)[0] == (
        "// Rendered by fpscompile: block-sparse attention, forward, on a CPU.\n"
        '// spec: {"backward":false,"block_n":128,"dtype":"bfloat16","gqa_group":1,"granularities":["tile"],'
        '"hadamard":false,"head_dim":64,"key_mask":"none","other_tokens":false,"p_scale":256.0,"quant":"none",'
        '"smooth_k":true,"smooth_v":false,'
        '"target":"cpu","tile":[2,4,4],"value_dim":72}\n'
        '// config: {"block_m":32,"block_n":512,"compute":"bfloat16"}\n'
        f"// template: cpp/attention.cpp.jinja sha256:{render.template_hash()}\n"
        f"// torch: {torch.__version__}"
    )


def test_values_are_constants():
    text = render.render(dataclasses.replace(SPEC, key_mask="bool"), CppConfig(48, 192, "float32"))
    for line in (
        "constexpr int64_t D = 64;",
        "constexpr int64_t DV = 72;",
        "constexpr int64_t BLOCK_M = 48;",
        "constexpr int64_t BLOCK_N = 192;",
        "constexpr bool KEY_MASK = true;",
        "using Operand = float;",
    ):
        assert line in text
    assert "{{" not in text
    assert "{%" not in text


@pytest.mark.parametrize(
    "change",
    [{"dtype": "float32"}, {"head_dim": 96}, {"value_dim": 96}, {"tile": (4, 8, 8)}, {"key_mask": "float"}],
)
def test_what_the_kernel_depends_on_changes_the_text(change):
    assert render.render(dataclasses.replace(SPEC, **change)) != render.render(SPEC)


@pytest.mark.parametrize(
    "change", [{"gqa_group": 3}, {"other_tokens": True}, {"granularities": ("head", "tile")}, {"p_scale": 448.0}]
)
def test_what_is_not_read_shares_the_text(change):
    assert render.render(dataclasses.replace(SPEC, **change)) == render.render(SPEC)


def test_float16_is_computed_in_float32():
    """bfloat16 products would drop three bits of a float16 without a word."""
    assert render.default_config(dataclasses.replace(SPEC, dtype="float16")).compute == "float32"


@pytest.mark.parametrize(
    ("quant", "config"),
    [
        ("none", CppConfig(32, 512, "int8")),
        ("int8", CppConfig(32, 512, "float32")),
        ("fp8", CppConfig(32, 256, "float32")),
        ("none", CppConfig(32, 256, "float16")),
    ],
)
def test_configs_that_do_not_fit_are_refused(quant, config):
    """Bytes are int8's, and the blocks of FP8 are the spec's."""
    with pytest.raises(UnsupportedError, match="is_valid"):
        render.render(dataclasses.replace(SPEC, quant=quant), config)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"target": "cuda:90"}, r"target='cuda:90' is not 'cpu'"),
        ({"backward": True, "quant": "fp8"}, r"gradients are those of dequantized operands"),
        ({"dtype": "float64"}, r"not float64"),
        ({"head_dim": 31}, r"head_dim=31 is outside 32 to 256"),
        ({"value_dim": 257}, r"value_dim=257 is outside 32 to 256"),
    ],
)
def test_refusals(change, reason):
    with pytest.raises(UnsupportedError, match=rf"{reason}.*lowering='boxes'"):
        render.render(dataclasses.replace(SPEC, **change))


@pytest.mark.parametrize("config", [CppConfig(40, 512, "bfloat16"), CppConfig(32, 100, "bfloat16")])
def test_blocks_that_are_no_whole_vectors_or_panels_are_refused(config):
    with pytest.raises(UnsupportedError, match="is_valid"):
        render.render(SPEC, config)


def test_undefined_names_are_errors(monkeypatch):
    broken = {"attention.cpp.jinja": "{{ spec.head_dim }} {{ no_such_name }}"}
    monkeypatch.setattr(render, "template_sources", lambda: broken)
    render._render.cache_clear()
    with pytest.raises(jinja2.UndefinedError, match="no_such_name"):
        render.render(SPEC)


def test_template_hash_follows_the_template(monkeypatch):
    before = render.template_hash()
    sources = render.template_sources()
    monkeypatch.setattr(render, "template_sources", lambda: {**sources, "_pack.jinja": sources["_pack.jinja"] + "\n"})
    assert re.fullmatch("[0-9a-f]{16}", before)
    assert render.template_hash() != before


@pytest.mark.parametrize("variant", [{}, {"quant": "int8"}, {"quant": "fp8"}, {"backward": True}], ids=str)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("march", ["x86-64-v3", "x86-64-v4"])
def test_source_compiles_alone(tmp_path, dtype, march, variant):
    """No header of torch's, on processors with and without AVX-512: checked by the compiler, without warnings."""
    if not {"avx2", "fma"} <= cpp_build.processor_flags():
        pytest.skip("not an x86-64 processor")
    path = tmp_path / "kernel.cpp"
    path.write_text(render.render(dataclasses.replace(SPEC, dtype=dtype, key_mask="bool", **variant)))
    command = [cpp_build.compiler()[0], "-std=c++17", "-fsyntax-only", "-fopenmp", f"-march={march}", "-Wall"]
    done = subprocess.run([*command, "-Wextra", "-Werror", "-Wno-psabi", str(path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
