"""The FP8 linear layers of the end-to-end benchmark: their quantization, and what they replace in a model."""

from __future__ import annotations

import sys
import weakref
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


def test_calibration_takes_the_largest_of_all_calls(layers: ModuleType) -> None:
    """A layer that is called again, with less; two that share their input share its scale all the same."""
    model = nn.ModuleDict({name: nn.Linear(4, 4) for name in ("q", "k", "out")})

    def run() -> None:
        for size in (1.0, 8.0, 2.0):
            x = torch.full((3, 4), size)
            model["q"](x)
            model["k"](x)
            model["out"](-3.0 * x)

    scales = layers.calibrated(model, run)
    assert scales[model["q"]] is scales[model["k"]]
    for name, largest in (("q", 8.0), ("out", 24.0)):
        scale, inverse = scales[model[name]]
        torch.testing.assert_close(scale, torch.tensor(layers.HEADROOM * largest / LARGEST))
        torch.testing.assert_close(inverse, 1 / scale)


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


@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
def test_one_piece_of_a_feed_forward_exists_at_a_time(layers: ModuleType, static: bool) -> None:
    """Hidden values of one piece beside those of the last would be a step's peak."""
    hidden: list[weakref.ref[torch.Tensor]] = []

    def product(a: torch.Tensor, b: torch.Tensor, *, out: torch.Tensor | None = None, **_: object) -> torch.Tensor:
        if out is not None:
            return out
        assert not any(piece() is not None for piece in hidden)
        made = torch.zeros(a.shape[0], b.shape[1], dtype=torch.bfloat16)
        hidden.append(weakref.ref(made))
        return made

    def quantized(x: torch.Tensor) -> torch.Tensor:
        values = x.to(torch.float8_e4m3fn)
        hidden.append(weakref.ref(values))
        return values

    one = torch.ones(())
    scales = (one, one) if static else (None, None)
    x, first, second = (torch.zeros(shape).to(torch.float8_e4m3fn) for shape in ((30, 16), (32, 16), (16, 32)))
    row = one if static else torch.ones(30, 1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "_scaled_mm", product)
        patch.setattr(layers, "ROWS", 10)
        patch.setattr(layers, "gelu_to_e4m3", lambda x, bias, inverse: quantized(x))
        patch.setattr(layers, "quantize_rows", lambda x, bias, gelu: (quantized(x), torch.ones(len(x), 1)))
        out = layers.fp8_feed_forward(x, row, first, one, None, second, one, None, *scales, True)
    assert out.shape == (30, 16)
    assert len(hidden) == 6


@pytest.mark.parametrize("gate", [False, True])
@pytest.mark.parametrize("add", [False, True])
@pytest.mark.parametrize(("rows", "n"), [(5, 5120), (3, 40), (2, 64), (2, 1500)])
def test_norms_with_a_known_scale(layers: ModuleType, rows: int, n: int, add: bool, gate: bool) -> None:
    import norm_to_e4m3 as kernels

    x, added = ((torch.randn(1, rows, n, device=DEVICE) + 2.0).bfloat16() for _ in range(2))
    x[0, 0] = 0.5  # no variance
    factor, shift, gates = torch.randn(3, n, device=DEVICE).unbind()
    scale = 4.0 / LARGEST
    total = x
    with repaired_interpreter():
        if add:
            given = gates if gate else None
            total, values = kernels.add_norm_to_e4m3(x, added, given, factor / scale, shift / scale, 1e-6)
            exact_sum = x.float() + added.float() * (gates if gate else 1.0)
            torch.testing.assert_close(total, exact_sum.bfloat16(), rtol=2**-7, atol=1e-6)
        else:
            values = kernels.norm_to_e4m3(x, factor / scale, shift / scale, 1e-6)
    norm = nn.functional.layer_norm(total.double(), (n,), eps=1e-6)
    exact = (norm * factor + shift).view(rows, n).clamp(-4.0, 4.0)
    step = 2.0**-4 * exact.abs().clamp(min=2.0**-6 * scale) * 1.001 + 1e-5
    assert ((values.double() * scale - exact).abs() <= step).all()


def test_norms_of_a_wan_block_are_fused(layers: ModuleType) -> None:
    """Three norms go into quantization, two with the sum before; q, k and v share rows, so do k and v of the text."""
    pytest.importorskip("diffusers")
    from diffusers.models.transformers.transformer_wan import WanTransformerBlock
    from fuse_norms import OPS, FuseNorms

    if not hasattr(torch, "_scaled_mm"):
        pytest.skip("this torch has no _scaled_mm")
    counts = {}

    class Counting(FuseNorms):
        def __call__(self, graph: torch.fx.Graph) -> None:
            super().__call__(graph)
            for op in (OPS.to_e4m3, OPS.norm_to_e4m3, OPS.add_norm_to_e4m3):
                counts[str(op)] = len(graph.find_nodes(op="call_function", target=op.default))

    block = WanTransformerBlock(64, 128, 1, "rms_norm_across_heads", True, 1e-6, None).to(DEVICE, torch.bfloat16).eval()
    for parameter in block.norm2.parameters():
        nn.init.normal_(parameter)
    x, text = (torch.randn(1, n, 64, device=DEVICE).bfloat16() for n in (24, 7))
    temb = 0.5 * torch.randn(1, 6, 64, device=DEVICE)
    table = torch.randn(1, 24, 1, 64, device=DEVICE)
    rotary = (table.cos(), table.sin())
    with torch.no_grad(), repaired_interpreter(), pytest.MonkeyPatch.context() as patch:
        if DEVICE == "cpu":
            patch.setattr(torch, "_scaled_mm", _scaled_mm)
        exact = block(x, text, temb, rotary)
        scales = layers.calibrated(block, lambda: block(x, text, temb, rotary))
        layers.replace_linears(block, smallest=32, scales=scales)
        plain = block(x, text, temb, rotary)
        torch._dynamo.reset()
        options = {"pre_grad_custom_pass": Counting(), "fx_graph_cache": False}
        found = torch.compile(block, options=options, fullgraph=True)(x, text, temb, rotary)
    assert counts == {"fps_bench.to_e4m3": 3, "fps_bench.norm_to_e4m3": 1, "fps_bench.add_norm_to_e4m3": 2}
    # Values may be rounded to E4M3 the other way, since the fused norm does not round to bfloat16 first.
    of_plain, of_fused = ((each - exact).norm() / (exact - x).norm() for each in (plain, found))
    assert 1e-4 < of_fused < 1.3 * of_plain < 0.1


def test_what_is_written_in_place_is_not_fused(layers: ModuleType) -> None:
    """The sum, or what is quantized, changes between the operations that a kernel would do at once."""
    from fuse_norms import FuseNorms

    factor, shift = torch.randn(2, 32, device=DEVICE).unbind()

    def quantized(x: torch.Tensor) -> torch.Tensor:
        inverse = torch.tensor(100.0, device=DEVICE)
        return (x.reshape(-1, 32).float() * inverse).clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn).float()

    def sum_grows(x: torch.Tensor, added: torch.Tensor) -> torch.Tensor:
        h = x + added
        h.add_(x)
        norm = nn.functional.layer_norm(h.float(), (32,))
        return quantized((norm * factor + shift).type_as(h))

    def twice(x: torch.Tensor, added: torch.Tensor) -> torch.Tensor:
        first = quantized(x)
        x.add_(added)
        return first + quantized(x)

    for function in (sum_grows, twice):
        x, added = torch.randn(2, 2, 3, 32, device=DEVICE).bfloat16().unbind()
        torch._dynamo.reset()
        options = {"pre_grad_custom_pass": FuseNorms(), "fx_graph_cache": False}
        with repaired_interpreter():
            found = torch.compile(function, options=options)(x.clone(), added)
        expected = function(x.clone(), added)
        assert (found - expected).norm() < 0.03 * expected.norm()  # Inductor keeps float32, so a value may round over


def test_other_norms_are_left_alone(layers: ModuleType) -> None:
    """A factor for each row, and a norm that keeps float32: their rows are quantized as they are."""
    from fuse_norms import OPS, FuseNorms

    left = []

    class Counting(FuseNorms):
        def __call__(self, graph: torch.fx.Graph) -> None:
            super().__call__(graph)
            left.append(len(graph.find_nodes(op="call_function", target=OPS.to_e4m3.default)))

    def quantized(x: torch.Tensor) -> torch.Tensor:
        inverse = torch.tensor(100.0, device=DEVICE)
        return (x.reshape(-1, 32).float() * inverse).clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn).float()

    x = torch.randn(2, 3, 32, device=DEVICE).bfloat16()
    factor, shift = torch.randn(2, 2, 3, 32, device=DEVICE).unbind()

    def by_row(x: torch.Tensor) -> torch.Tensor:
        norm = nn.functional.layer_norm(x.float(), (32,))
        return quantized((norm * factor + shift).type_as(x))

    def in_float32(x: torch.Tensor) -> torch.Tensor:
        norm = nn.functional.layer_norm(x.float(), (32,))
        return quantized(norm * factor[0, 0] + shift[0, 0])

    for function in (by_row, in_float32):
        torch._dynamo.reset()
        options = {"pre_grad_custom_pass": Counting(), "fx_graph_cache": False}
        with repaired_interpreter():
            found = torch.compile(function, options=options)(x)
            torch.testing.assert_close(found, function(x), rtol=0.13, atol=0.02)
    assert left == [1, 1]


def _scaled_mm(a: torch.Tensor, b: torch.Tensor, *, scale_a, scale_b, out_dtype, use_fast_accum, out=None):
    """CPUs multiply E4M3 with one scale per tensor only."""
    result = ((a.float() @ b.float()) * scale_a * scale_b).to(out_dtype)
    return result if out is None else out.copy_(result)
