"""``smooth_k``, ``smooth_v`` and ``hadamard``: from options of ``torch.compile`` to plan, kernel, numbers, report."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from models.zoo import ZOO, output, wan

import fpscompile
from fpscompile import Backend, Settings
from fpscompile.gpu.call import spec_for
from fpscompile.kernel_spec import KernelSpec
from fpscompile.lowerings import cpp
from fpscompile.plan import PhasePlan, Plan
from fpscompile.render import canonical
from fpscompile.report_text import quant_text

BASE = {"window": (1, 2, 2), "tile": (2, 2, 4), "inner": "eager", "quant": "fp8"}


def compiled(model: torch.nn.Module, inputs: dict[str, Any], **options: Any) -> tuple[torch.Tensor, set[Plan]]:
    torch._dynamo.reset()
    fps = Backend(Settings.from_options(BASE | options))
    with torch.no_grad():
        out = output(torch.compile(model, backend=fps), **inputs)
    (graph,) = fps.graphs
    return out, {site.plan for site in graph.sites if site.rewritten}


@pytest.mark.parametrize("option", ["smooth_k", "smooth_v", "hadamard"])
def test_an_option_reaches_the_plan_and_every_lowering_alike(option: str) -> None:
    value = option != "smooth_k"
    model, inputs = wan(attention_head_dim=32).eval(), ZOO["wan"].inputs(dtype=torch.float32)
    plain, (plan,) = compiled(model, inputs, lowering="gather")
    assert (plan.smooth_k, plan.smooth_v, plan.hadamard) == (True, False, False)
    outs = {}
    for lowering in ("gather", "reference", "auto"):
        outs[lowering], (plan,) = compiled(model, inputs, lowering=lowering, **{option: value})
        assert getattr(plan, option) is value
        assert Plan.from_json(plan.to_json()) == plan
    assert not torch.equal(outs["gather"], plain)
    for other in ("reference", "auto"):
        assert (outs[other] - outs["gather"]).norm() < 2e-3 * outs["gather"].norm()


def test_the_report_says_what_is_on() -> None:
    model, inputs = wan(attention_head_dim=32), ZOO["wan"].inputs(dtype=torch.float32)
    options = BASE | {"smooth_v": True, "hadamard": True, "lowering": "gather"}
    text = str(fpscompile.explain(model, options=options, **inputs))
    assert "fp8, K and V without their means, Q and K rotated" in " ".join(text.split())


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"quant": "none", "hadamard": True}, "none"),
        ({"quant": "fp8"}, "fp8, K without its mean"),
        ({"quant": "fp8", "smooth_k": False}, "fp8"),
        ({"quant": "fp8", "smooth_k": False, "smooth_v": True}, "fp8, V without its mean"),
        ({"quant": "int8"}, "int8, K and V without their means"),
    ],
)
def test_words(fields: dict[str, Any], words: str) -> None:
    assert quant_text(Plan((2, 2, 4), (PhasePlan(density=1.0),), **fields)) == words


@pytest.mark.parametrize("option", ["smooth_v", "hadamard"])
def test_kernels_are_keyed_by_the_options_only_where_they_matter(option: str) -> None:
    q = torch.empty(1, 2, 8, 72)
    for quant, differ in (("fp8", True), ("none", False)):
        plans = [Plan((2, 2, 4), (PhasePlan(density=1.0),), quant=quant, **{option: on}) for on in (False, True)]
        off, on = (spec_for("cuda:90", "bfloat16", 72, 72, plan, False, 1) for plan in plans)
        assert (off != on) == differ
        off, on = (canonical(cpp._spec(q.dtype, 72, 72, plan, "none", 1, False)) for plan in plans)
        assert (off != on) == differ


def test_features_of_a_product() -> None:
    spec = KernelSpec("cpu", "float32", 72, 72, (2, 2, 4), "fp8")
    assert spec.product_dim == 72
    assert dataclasses.replace(spec, hadamard=True).product_dim == 128


@pytest.mark.parametrize("option", ["smooth_v", "hadamard"])
def test_boxes_refuse_fp8_with_or_without_them(option: str) -> None:
    model, inputs = wan(attention_head_dim=32), ZOO["wan"].inputs(dtype=torch.float32)
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match="'boxes' cannot round P to FP8"):
        compiled(model, inputs, lowering="boxes", **{option: True})
