"""The op over the Triton kernels inside torch: opcheck, export, AOTAutograd, and a CUDA plan down to machine code."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from fpscompile.errors import UnsupportedError
from fpscompile.gpu import binary, offline
from fpscompile.gpu.call import launching, spec_for
from fpscompile.gpu.config import KernelConfig, candidates
from fpscompile.lowerings import triton as lowering
from fpscompile.plan import PhasePlan, Plan

pytest.importorskip("triton")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
attention = torch.ops.fps.attention
GRID, TEXT = (2, 4, 5), 3
PLAN = Plan(tile=(2, 4, 4), phases=(PhasePlan(window=(1, 1, 1)), PhasePlan(density=1.0)), lowering="triton")


def arguments(quant: str, grad: bool = True) -> list[Any]:
    length = TEXT + math.prod(GRID)
    q, k, v = (torch.randn(2, length, 1, 16, device=DEVICE).transpose(1, 2).requires_grad_(grad) for _ in range(3))
    phase = torch.tensor([1, 0], dtype=torch.int32, device=DEVICE)
    span = [TEXT, math.prod(GRID)]
    plan = Plan(PLAN.tile, PLAN.phases, lowering="triton", quant=quant, block_n=32)
    return [q, k, v, None, phase, list(GRID), None, span, span, None, plan.to_json()]


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


@pytest.mark.parametrize("quant", ["fp8", "none"])
def test_opcheck(quant: str) -> None:
    torch.library.opcheck(attention.default, tuple(arguments(quant)))


@pytest.mark.parametrize("quant", ["fp8", "none"])
def test_opcheck_backward(quant: str) -> None:
    args = arguments(quant, grad=False)
    out, lse = attention(*args)
    q, k, v, mask, phase, *rest = args
    torch.library.opcheck(
        torch.ops.fps.attention_backward.default,
        (torch.randn_like(out), q, k, v, mask, out, lse, phase, *rest),
        test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
    )


@pytest.mark.parametrize("strict", [False, True])
def test_export(strict: bool) -> None:
    args = arguments("fp8", grad=False)

    class Model(torch.nn.Module):
        def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            return attention(q, k, v, *args[3:])[0]

    program = torch.export.export(Model(), tuple(args[:3]), strict=strict)
    assert relative(program.module()(*args[:3]), attention(*args)[0]) == 0


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compile_forward_and_backward(backend: str) -> None:
    """Without a graph break, and to the same bits as the op by itself."""
    args = arguments("fp8", grad=False)

    def function(x: torch.Tensor) -> torch.Tensor:
        out, _ = attention(x, *args[1:])
        return out.sum()

    grads = []
    for run in (torch.compile(function, backend=backend, fullgraph=True), function):
        x = args[0].clone().requires_grad_()
        run(x).backward()
        grads.append(x.grad)
    assert torch.equal(*grads)


class Video(torch.nn.Module):
    """Patches of a latent video, one layer of attention over them."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Conv3d(4, 256, (1, 2, 2), (1, 2, 2))
        self.qkv = torch.nn.Linear(256, 768)
        self.out = torch.nn.Linear(256, 256)

    def forward(self, latent: torch.Tensor) -> torch.Tensor:
        x = self.qkv(self.embed(latent).flatten(2).transpose(1, 2))
        q, k, v = (y.unflatten(-1, (2, -1)).transpose(1, 2) for y in x.chunk(3, -1))
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def on_gpu(x: torch.Tensor, mode: FakeTensorMode) -> FakeTensor:
    """A tensor of the same shape on a GPU that need not be there."""
    return FakeTensor(mode, x.detach().to("meta"), torch.device("cuda", 0))


def compiled_on_a_gpu(inner: Any, **options: Any) -> torch.Tensor:
    """What ``torch.compile(model, backend="fps")`` makes of a bfloat16 model and input on a GPU; all fake tensors."""
    torch._dynamo.reset()
    mode, model = FakeTensorMode(), Video().to(torch.bfloat16)
    for module in model.modules():
        for name, parameter in list(module._parameters.items()):
            module._parameters[name] = torch.nn.Parameter(on_gpu(parameter, mode), requires_grad=False)
    latent = on_gpu(torch.empty(1, 4, 8, 32, 32, dtype=torch.bfloat16), mode)
    options = {"inner": inner, "density": 0.5, "tile": (4, 8, 8), **options}
    with mode, torch.no_grad():
        return torch.compile(model, backend="fps", options=options, fullgraph=True)(latent)


def calls(graphs: list[torch.fx.GraphModule], op: Any) -> list[torch.fx.Node]:
    return [node for gm in graphs for node in gm.graph.nodes if node.target is op.default]


@pytest.mark.skipif(DEVICE == "cuda", reason="about machines without a GPU")
def test_from_a_model_on_a_gpu_to_the_machine_code_of_its_kernels() -> None:
    """What the backend decides by itself for CUDA tensors: the plan, its kernels rendered, and their cubins."""
    graphs: list[torch.fx.GraphModule] = []

    def inner(gm: torch.fx.GraphModule, example_inputs: Any) -> Any:
        graphs.append(gm)
        return gm.forward

    out = compiled_on_a_gpu(inner)
    assert out.device.type == "cuda"
    assert out.shape == (1, 2048, 256)
    (node,) = calls(graphs, attention)
    plan = Plan.from_json(node.args[-1])
    assert (plan.lowering, plan.quant) == ("triton", "fp8")
    query, key, value = (argument.meta["example_value"] for argument in node.args[:3])
    assert query.device.type == "cuda"
    assert list(node.args[5]) == [8, 16, 16]

    group = query.shape[1] // key.shape[1]
    spec = spec_for("cuda:90", "bfloat16", query.shape[-1], value.shape[-1], plan, False, group)
    config = lowering.config_of(spec, query.device)
    assert config.variant == "hopper"
    kernels = {"attention_forward": offline.forward_artifacts(spec, config), **offline.prepass_artifacts(spec)}
    assert set(kernels) == {"attention_forward", "key_statistics", "quantize_tiles", "quantize_values"}
    for name, artifacts in kernels.items():
        assert artifacts.texts["cubin"].startswith(b"\x7fELF"), name
        report = binary.inspect_artifacts(artifacts)
        assert report.spill_bytes == 0, name
    assert any("QGMMA" in opcode for opcode in binary.inspect_artifacts(kernels["attention_forward"]).main_loop.tensor)


def test_a_launch_is_on_the_device_of_its_tensors() -> None:
    """Triton launches on the current device, whichever the tensors are on."""
    guard = launching(torch.device("cuda", 1))
    assert isinstance(guard, torch.cuda.device)
    assert guard.idx == 1


def test_a_config_of_another_call_is_an_error() -> None:
    """Search and launch share one rule of what is valid."""
    spec = spec_for("cuda:90", "bfloat16", 128, 128, Plan(PLAN.tile, PLAN.phases, quant="fp8"), False, 1)
    gpu = torch.device("cuda")
    for config in candidates(spec):
        assert lowering._valid(config, spec, gpu) is config
    with pytest.raises(UnsupportedError, match=r"num_warps=3 is not one of.*tune this call"):
        lowering._valid(KernelConfig(64, 3, 3), spec, gpu)
