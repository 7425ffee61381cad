"""The FP8 linear layers of the end-to-end benchmark: their quantization, and what they replace in a model."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import nn

from fpscompile.gpu.interpreter import repaired_interpreter

pytest.importorskip("triton")

FOLDER = str(Path(__file__).resolve().parents[2] / "benchmarks" / "gpu")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LARGEST = 448.0


@pytest.fixture(scope="module")
def layers() -> Iterator[ModuleType]:
    sys.path.insert(0, FOLDER)
    try:
        import fp8_linear

        yield fp8_linear
    finally:
        sys.path.remove(FOLDER)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(("rows", "n"), [(5, 13824), (3, 5120), (7, 40)])
@pytest.mark.parametrize(("bias", "gelu"), [(False, False), (True, True), (False, True)])
def test_rows_are_quantized_as_torch_does(
    layers: ModuleType, rows: int, n: int, dtype: torch.dtype, bias: bool, gelu: bool
) -> None:
    x = 3.0 * torch.randn(rows, n, device=DEVICE)
    x[0] = 0.0
    x[1] *= torch.linspace(1e-6, 30, n, device=DEVICE)  # tails of GELU on both sides
    x = x.to(dtype)
    added = torch.randn(n, device=DEVICE).to(dtype) if bias else None
    with repaired_interpreter():
        values, scale = layers.quantize_rows(x, added, gelu)
    exact = (x if added is None else x + added).double()
    if gelu:
        exact = nn.functional.gelu(exact, approximate="tanh")
    wanted = exact.abs().amax(1, keepdim=True).clamp(min=1e-12) / LARGEST
    torch.testing.assert_close(scale.double(), wanted, rtol=1e-5, atol=0.0)
    assert values.dtype == torch.float8_e4m3fn
    step = 2.0**-4 * exact.abs().clamp(min=2.0**-6 * wanted) * 1.0001 + 1e-6 * wanted
    assert ((values.double() * scale - exact).abs() <= step).all()
    if bias or not gelu:
        assert not values[0].double().any() or bias


def test_long_and_strided_rows_are_refused(layers: ModuleType) -> None:
    with pytest.raises(ValueError, match="16384 at most"):
        layers.quantize_rows(torch.zeros(1, 16385, device=DEVICE), None, False)
    with pytest.raises(ValueError, match="2 elements apart"):
        layers.quantize_rows(torch.zeros(4, 64, device=DEVICE)[:, ::2], None, False)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("rows", "n"), [(5, 13824), (3, 40)])
def test_gelu_with_a_known_scale(layers: ModuleType, rows: int, n: int, bias: bool) -> None:
    x = (3.0 * torch.randn(rows, n, device=DEVICE)).bfloat16()
    x[0] = 0.0
    x[1, :2] = torch.tensor([1000.0, -1000.0])  # beyond 448 times the scale, and GELU's other tail
    added = torch.randn(n, device=DEVICE).bfloat16() if bias else None
    scale = 2.0 / LARGEST * torch.rand((), device=DEVICE) + 0.01
    with repaired_interpreter():
        values = layers.gelu_to_e4m3(x, added, 1 / scale)
    exact = nn.functional.gelu((x if added is None else x + added).double(), approximate="tanh")
    exact = exact.clamp(max=LARGEST * scale.double())
    step = 2.0**-4 * exact.abs().clamp(min=2.0**-6 * scale) * 1.0001 + 1e-6 * scale
    assert ((values.double() * scale - exact).abs() <= step).all()
    assert values[1, 0].double() == LARGEST


@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
def test_a_wan_block_keeps_its_results(layers: ModuleType, static: bool) -> None:
    """Every large layer is replaced, the feed-forward as a whole; the block's output moves by E4M3's rounding."""
    pytest.importorskip("diffusers")
    from diffusers.models.transformers.transformer_wan import WanTransformerBlock

    if not hasattr(torch, "_scaled_mm"):
        pytest.skip("this torch has no _scaled_mm")
    dtype = torch.bfloat16  # what CUDA multiplies rows of E4M3 into
    block = WanTransformerBlock(64, 128, 1, "rms_norm_across_heads", True, 1e-6, None).to(DEVICE, dtype).eval()
    x, text = (torch.randn(1, n, 64, device=DEVICE).to(dtype) for n in (24, 7))
    temb = 0.1 * torch.randn(1, 6, 64, device=DEVICE)
    table = torch.randn(1, 24, 1, 64, device=DEVICE)
    rotary = (table.cos(), table.sin())
    with torch.no_grad():
        expected = block(x, text, temb, rotary)
        linears = sum(isinstance(module, nn.Linear) for module in block.modules())
        scales = layers.calibrated(block, lambda: block(x, text, temb, rotary)) if static else None
        assert layers.replace_linears(block, smallest=32, scales=scales) == linears == 10
        assert isinstance(block.ffn, layers.Fp8FeedForward)
        if static:
            assert block.attn1.to_q.input_scale is block.attn1.to_v.input_scale
            assert len({id(scale[0]) for scale in scales.values()}) == 7  # x for q, k, v; text for k, v; and five alone
        own = {name for name, m in block.named_modules() if isinstance(m, layers.Fp8Linear) and m.own_kernel}
        assert own == {"attn1.to_out.0", "attn2.to_out.0"}
        with repaired_interpreter(), pytest.MonkeyPatch.context() as patch:
            if DEVICE == "cpu":
                patch.setattr(torch, "_scaled_mm", _scaled_mm)
            patch.setattr(layers, "ROWS", 10)  # 24 rows: two pieces
            found = block(x, text, temb, rotary)
    error = (found - expected).norm() / (expected - x).norm()
    assert 1e-4 < error < 0.1


def test_equal_rows_are_quantized_once(layers: ModuleType) -> None:
    """Three layers of the same rows get one E4M3 tensor; what the graph returns stays separate, and so does random."""
    from share_quantized import ShareQuantized

    counts = []

    class Counting(ShareQuantized):
        def __call__(self, graph: torch.fx.Graph) -> None:
            for step in (lambda graph: None, super().__call__):
                step(graph)
                values = (node.meta.get("val") for node in graph.nodes if node.op == "call_function")
                counts.append(sum(getattr(value, "dtype", None) == torch.float8_e4m3fn for value in values))

    def quantized(x: torch.Tensor, scale: float) -> torch.Tensor:
        return (x.float() * scale).clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn)

    def run(x: torch.Tensor) -> list[torch.Tensor]:
        used = [quantized(2 * x, scale).float() @ x for scale in (1.0, 1.0, 1.0, 3.0)]
        returned = [quantized(x, 1.0).view(-1) for _ in range(2)]
        return [*used, *returned, torch.rand_like(x), torch.rand_like(x)]

    x = torch.randn(8, 8, device=DEVICE)
    torch._dynamo.reset()
    options = {"post_grad_custom_pre_pass": Counting(), "force_disable_caches": True}  # a cached graph has no passes
    found = torch.compile(run, options=options)(x)
    assert counts == [4 + 4, 2 + 4]  # a view counts too
    torch.testing.assert_close(found[:4], run(x)[:4])
    assert found[4].data_ptr() != found[5].data_ptr()
    assert not torch.equal(found[6], found[7])


def _scaled_mm(a: torch.Tensor, b: torch.Tensor, *, scale_a, scale_b, out_dtype, use_fast_accum, out=None):
    """CPUs multiply E4M3 with one scale per tensor only."""
    result = ((a.float() @ b.float()) * scale_a * scale_b).to(out_dtype)
    return result if out is None else out.copy_(result)
