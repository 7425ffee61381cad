"""From ``torch.compile(model, backend="fps")`` to the Triton kernels, run by Triton's interpreter where no GPU is."""

from __future__ import annotations

import logging

import pytest
import torch
from models.zoo import wan, wan_inputs

import fpscompile
from fpscompile.errors import UnsupportedError
from fpscompile.gpu import offline
from fpscompile.gpu.call import spec_for
from fpscompile.gpu.config import default_config
from fpscompile.lowerings import triton as lowering
from fpscompile.plan import PhasePlan, Plan

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
GRID = (3, 6, 10)


def model_and_inputs(**config):
    model = wan(layers=1, **config).to(DEVICE)
    return model, {k: v.to(DEVICE) if isinstance(v, torch.Tensor) else v for k, v in wan_inputs(GRID).items()}


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


def compiled_output(model, inputs, **options) -> torch.Tensor:
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="fps", options={"inner": "eager", "tile": (2, 4, 4), **options})
    with torch.no_grad():
        return compiled(**inputs)[0]


@pytest.mark.parametrize("quant", ["fp8", "none"])
def test_a_compiled_model_equals_the_gather_lowering(quant):
    model, inputs = model_and_inputs()
    options = {"window": (1, 2, 2), "quant": quant}
    ours = compiled_output(model, inputs, lowering="triton", **options)
    theirs = compiled_output(model, inputs, lowering="gather", **options)
    assert relative(ours, theirs) < (2e-3 if quant == "fp8" else 1e-5)


def test_exact_at_density_one_without_quantization():
    model, inputs = model_and_inputs()
    with torch.no_grad():
        eager = model(**inputs)[0]
    ours = compiled_output(model, inputs, lowering="triton", density=1.0, quant="none")
    assert relative(ours, eager) < 1e-5


def test_the_phase_follows_the_timestep_without_a_recompile():
    """Timestep 900 is in the dense phase of the schedule, 100 in the sparse one."""
    model, inputs = model_and_inputs()
    schedule = fpscompile.Schedule(
        (fpscompile.Phase(0.0, 0.5, density=1.0), fpscompile.Phase(0.5, 1.0, window=(1, 1, 1)))
    )
    options = {"schedule": schedule, "quant": "fp8", "inner": "eager", "tile": (2, 4, 4)}
    outputs = {}
    for name in ("triton", "gather"):
        torch._dynamo.reset()
        compiled = torch.compile(model, backend="fps", options={**options, "lowering": name})
        with torch.no_grad():
            early = compiled(**inputs | {"timestep": torch.full((1,), 900.0, device=DEVICE)})[0]
            with torch._dynamo.config.patch(error_on_recompile=True):
                late = compiled(**inputs | {"timestep": torch.full((1,), 100.0, device=DEVICE)})[0]
        outputs[name] = (early, late)
    for ours, theirs in zip(outputs["triton"], outputs["gather"], strict=True):
        assert relative(ours, theirs) < 2e-3


@pytest.mark.parametrize(
    ("dtype", "dim", "plan", "device", "says"),
    [
        (torch.float64, 64, "none", DEVICE, "float64"),
        (torch.bfloat16, 512, "none", DEVICE, "head_dim=512"),
        (torch.bfloat16, 64, "none", "meta", "meta"),
    ],
)
def test_what_it_cannot_run_it_says(dtype, dim, plan, device, says):
    plan = Plan(tile=(2, 4, 4), phases=(PhasePlan(density=1.0),), quant=plan)
    assert says in lowering.why_not(dtype, dim, 64, plan, device)


@pytest.mark.skipif(DEVICE == "cuda", reason="about machines without a GPU")
def test_a_cpu_without_the_interpreter_is_an_error(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    model, inputs = model_and_inputs()
    with pytest.raises(Exception, match="TRITON_INTERPRET=1") as caught:
        compiled_output(model, inputs, lowering="triton", density=1.0)
    assert isinstance(caught.value.__cause__ or caught.value, UnsupportedError) or "UnsupportedError" in str(
        caught.value
    )


@pytest.mark.skipif(DEVICE == "cuda", reason="about machines without a GPU")
def test_auto_never_interprets(caplog):
    model, inputs = model_and_inputs()
    with caplog.at_level(logging.INFO, logger="fpscompile"):
        compiled_output(model, inputs, density=1.0)
    report = fpscompile.explain(model, options={"inner": "eager", "tile": (2, 4, 4), "density": 1.0}, **inputs)
    assert {site.plan.lowering for site in report.sites if site.rewritten} <= {"cpp", "boxes"}


@pytest.mark.slow
@pytest.mark.skipif(DEVICE == "cuda", reason="about machines without a GPU")
def test_from_a_compiled_model_to_the_binary_of_its_kernel():
    """What ``torch.compile`` decides for a GPU, rendered and compiled through to machine code.

    The graph is captured on a CPU; its plan, and the shapes and dtype of its attention call, name the kernels.
    """
    model, inputs = model_and_inputs(attention_head_dim=64)
    model, graphs = model.to(torch.bfloat16), []

    def inner(gm, example_inputs):
        graphs.append(gm)
        return gm.forward

    inputs = {k: v.bfloat16() if isinstance(v, torch.Tensor) and k != "timestep" else v for k, v in inputs.items()}
    compiled_output(model, inputs, lowering="triton", quant="fp8", tile=(4, 8, 8), density=1.0, inner=inner)
    nodes = [node for gm in graphs for node in gm.graph.nodes if node.target is torch.ops.fps.attention.default]
    assert len(nodes) == 1
    query, _, value = (argument.meta["example_value"] for argument in nodes[0].args[:3])
    plan = Plan.from_json(nodes[0].args[-1])
    dtype = str(query.dtype).removeprefix("torch.")
    spec = spec_for("cuda:90", dtype, query.shape[-1], value.shape[-1], plan, False, 1)
    config = lowering.config_of(spec, torch.device("cuda"))
    assert config.variant == "hopper"
    for chosen in (config, default_config(spec)):
        report = offline.compile_forward(spec, chosen)
        assert report.spill_bytes == 0
        assert any("QGMMA" in opcode for opcode in report.main_loop.tensor)
