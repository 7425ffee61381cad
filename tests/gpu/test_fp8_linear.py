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


def test_a_wan_block_keeps_its_results(layers: ModuleType) -> None:
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
    with torch.no_grad():
        expected = block(x, text, temb, (table.cos(), table.sin()))
        linears = sum(isinstance(module, nn.Linear) for module in block.modules())
        assert layers.replace_linears(block, smallest=32) == linears == 10
        assert isinstance(block.ffn, layers.Fp8FeedForward)
        own = {name for name, m in block.named_modules() if isinstance(m, layers.Fp8Linear) and m.own_kernel}
        assert own == {"attn1.to_out.0", "attn2.to_out.0"}
        with repaired_interpreter(), pytest.MonkeyPatch.context() as patch:
            if DEVICE == "cpu":
                patch.setattr(torch, "_scaled_mm", _scaled_mm)
            patch.setattr(layers, "ROWS", 10)  # 24 rows: two pieces
            found = block(x, text, temb, (table.cos(), table.sin()))
    error = (found - expected).norm() / (expected - x).norm()
    assert 1e-4 < error < 0.1


def _scaled_mm(a: torch.Tensor, b: torch.Tensor, *, scale_a, scale_b, out_dtype, use_fast_accum, out=None):
    """CPUs multiply E4M3 with one scale per tensor only."""
    result = ((a.float() @ b.float()) * scale_a * scale_b).to(out_dtype)
    return result if out is None else out.copy_(result)
