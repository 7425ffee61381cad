"""Interleaved writes into a new tensor become one expression: the same bits, strides and gradients, or no change."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from models.rotary import Graphs, wan
from models.toys import T, heads, latent, wide_heads
from torch._dynamo.testing import CompileCounter

from fpscompile.passes import interleaved_writes

Rotary = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


@pytest.fixture(params=["_stacked", "_chosen"])
def form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both spellings run on the CPU: the GPU's takes the place of the CPU's."""
    if request.param == "_chosen":
        monkeypatch.setattr(interleaved_writes, "_stacked", interleaved_writes._chosen)
    return "stack" if request.param == "_stacked" else "where"


def backwards(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """The odd places first, whole dims spelled out, a buffer of zeros by size."""
    out = torch.zeros(x.shape, dtype=x.dtype)
    out[:, :, :, 1::2] = x[..., 1::2] * cos[..., 1::2]
    out[:, :, :, ::2] = x[..., 0::2] * sin[..., 0::2]
    return out


def of_four(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Four pieces; one is the same for all heads, one for all of everything."""
    out = x.new_empty(x.shape)
    out[..., 0::4] = x[..., 0::4]
    out[..., 1::4] = cos[..., 1::4]
    out[..., 2::4] = sin[0, 0, 0, 2::4].double()
    out[..., 3::4] = x[..., 1::4] * 2
    return out


def wider(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    out = torch.empty_like(x, dtype=torch.float64)
    out[..., 0::2] = x[..., 0::2]
    out[..., 1::2] = x[..., 1::2]
    return out


def inputs(dtype: torch.dtype = torch.float32, length: int = 6) -> tuple[torch.Tensor, ...]:
    cos, sin = torch.randn(2, 1, length, 1, 8)
    return torch.randn(2, length, 3, 8, dtype=dtype), cos, sin


def checked(rotary: Rotary, *args: torch.Tensor, dynamic: bool | None = None) -> Graphs:
    """Compile; the result has eager's bits and strides, and the captured graph had writes."""
    torch._dynamo.reset()
    graphs = Graphs()
    actual, expected = torch.compile(rotary, backend=graphs.backend, dynamic=dynamic)(*args), rotary(*args)
    assert torch.equal(actual, expected)
    assert actual.stride() == expected.stride()
    assert actual.dtype == expected.dtype
    return graphs


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rotary", [wan, backwards, of_four, wider])
def test_one_expression_with_the_same_bits(rotary: Rotary, dtype: torch.dtype, form: str) -> None:
    graphs = checked(rotary, *inputs(dtype))
    assert graphs.count("setitem") == 0
    assert graphs.count(form) == (3 if rotary is of_four and form == "where" else 1)
    assert graphs.count("empty_like") == graphs.count("zeros") == graphs.count("new_empty") == 0


def test_a_device_other_than_the_cpu_gets_its_own_spelling() -> None:
    torch._dynamo.reset()
    graphs = Graphs()
    out = torch.compile(wan, backend=graphs.backend)(*(x.to("meta") for x in inputs(torch.bfloat16)))
    assert (out.shape, out.dtype, out.device.type) == ((2, 6, 3, 8), torch.bfloat16, "meta")
    assert graphs.count("setitem") == graphs.count("stack") == 0
    assert graphs.count("where") == 1


def normalized(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    return wan(torch.nn.functional.rms_norm(x, (8,)), cos, sin)


def by_hand(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    return wan((x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype), cos, sin)


def projected(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """The normalization is not of what the product leaves in memory."""
    return wan(torch.nn.functional.rms_norm(x, (8,)) @ x.new_ones(8, 8), cos, sin)


@pytest.mark.parametrize(("rotary", "form"), [(normalized, "stack"), (by_hand, "stack"), (projected, "where")])
def test_behind_a_normalization_a_gpu_gets_a_stack(rotary: Rotary, form: str) -> None:
    torch._dynamo.reset()
    graphs = Graphs()
    torch.compile(rotary, backend=graphs.backend)(*(x.to("meta") for x in inputs(torch.bfloat16)))
    assert graphs.count("setitem") == 0
    assert (graphs.count("stack"), graphs.count("where")) == ((1, 0) if form == "stack" else (0, 1))


def test_lengths_may_be_symbols(form: str) -> None:
    """Frames of patches of two rows, which may be none for all the sizes say; other sizes run the same graph."""

    def model(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        patches = torch.nn.functional.avg_pool2d(x, (2, 1)).flatten(2).transpose(1, 2).contiguous()
        return wan(patches.unflatten(-1, (3, 8)), cos[:, : patches.shape[1]], sin[:, : patches.shape[1]])

    def calls(backend: Any) -> None:
        torch._dynamo.reset()
        compiled = torch.compile(model, backend=backend)
        for frames, rows in ((2, 6), (3, 9)):
            args = (torch.randn(1, 24, rows, frames), *torch.randn(2, 1, frames * rows, 1, 8))
            torch._dynamo.mark_dynamic(args[0], (2, 3))
            for table in args[1:]:
                torch._dynamo.mark_dynamic(table, 1)
            assert torch.equal(compiled(*args), model(*args))

    graphs, plain = Graphs(), CompileCounter()
    calls(plain)
    calls(graphs.backend)
    assert len(graphs.seen) == plain.frame_count  # one; two with torch 2.11
    assert graphs.count("setitem") == 0


def test_gradients_are_eagers(form: str) -> None:
    x, cos, sin = inputs()
    grads = []
    graphs = Graphs()
    torch._dynamo.reset()
    weight = torch.randn(2, 6, 3, 8)
    for function in (torch.compile(wan, backend=graphs.backend), wan):
        leaves = [tensor.clone().requires_grad_() for tensor in (x, cos, sin)]
        (function(*leaves) * weight).sum().backward()
        grads.append([leaf.grad for leaf in leaves])
    assert graphs.count("setitem") == 0
    for ours, theirs in zip(*grads, strict=True):
        assert torch.equal(ours, theirs)


def one_missing(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    out = torch.zeros_like(x)
    out[..., 0::4] = x[..., 0::4]
    out[..., 1::4] = x[..., 1::4]
    out[..., 3::4] = x[..., 3::4]
    return out


def one_twice(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    out = torch.zeros_like(x)
    out[..., 0::2] = x[..., 0::2]
    out[..., 0::2] = x[..., 1::2]
    return out


def read_between(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    out = torch.zeros_like(x)
    out[..., 0::2] = x[..., 0::2]
    half = out * 2
    out[..., 1::2] = x[..., 1::2]
    return out + half


def from_itself(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    out = torch.zeros_like(x)
    out[..., 0::2] = x[..., 0::2]
    out[..., 1::2] = out[..., 0::2] + 1
    return out


def seen_through_a_view(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    out = torch.zeros_like(x)
    view = out.transpose(1, 2)
    out[..., 0::2] = x[..., 0::2]
    out[..., 1::2] = x[..., 1::2]
    return view


def source_changes(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    x = x + 1
    out = torch.zeros_like(x)
    out[..., 0::2] = x[..., 0::2]
    x.mul_(2)
    out[..., 1::2] = x[..., 1::2]
    return out


def source_changes_in_place(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    out = torch.zeros_like(x)
    half = x[..., 0::2] - 1.0
    out[..., 0::2] = half
    torch.nn.functional.elu(half, 1.0, True)
    out[..., 1::2] = x[..., 1::2]
    return out


def source_changes_through_a_view(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    out = torch.zeros_like(x)
    half = x[..., 0::2] - 1.0
    out[..., 0::2] = half
    half.sum_to_size(*half.shape).mul_(2.0)
    out[..., 1::2] = x[..., 1::2]
    return out


def written_later(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    out = torch.zeros_like(x)
    out[..., 0::2] = x[..., 0::2]
    out[..., 1::2] = x[..., 1::2]
    out[..., :1] = 5.0
    return out


def other_strides(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    x = x.transpose(1, 2)
    out = torch.empty_like(x)
    out[..., 0::2] = x[..., 0::2]
    out[..., 1::2] = x[..., 1::2]
    return out


def odd_size(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    out = x.new_zeros(2, 6, 3, 7)
    out[..., 0::2] = x[..., 0::2]
    out[..., 1::2] = x[..., 1:7:2]
    return out


def a_given_tensor(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    out = x.clone()
    out[..., 0::2] = x[..., 1::2]
    out[..., 1::2] = x[..., 0::2]
    return out


def whole_numbers(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    out = torch.zeros_like(x, dtype=torch.int64)
    out[..., 0::2] = x[..., 0::2] * 10
    out[..., 1::2] = x[..., 1::2] * 10
    return out


def gradients_off_between(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    out = torch.zeros_like(x)
    out[..., 0::2] = x[..., 0::2]
    with torch.no_grad():
        out[..., 1::2] = x[..., 1::2]
    return out


@pytest.mark.parametrize(
    "rotary",
    [
        one_missing, one_twice, read_between, from_itself, seen_through_a_view, source_changes,
        source_changes_in_place, source_changes_through_a_view, written_later, other_strides, odd_size, a_given_tensor,
        whole_numbers, gradients_off_between,
    ],
)  # fmt: skip
def test_what_is_not_provably_the_same_stays(rotary: Rotary) -> None:
    graphs = checked(rotary, *inputs())
    captured = Graphs()
    torch._dynamo.reset()
    torch.compile(rotary, backend=captured._inner)(*inputs())
    assert graphs.count("setitem") == captured.count("setitem") > 0
    assert graphs.count("stack") == 0


@pytest.mark.parametrize("dynamic", [None, pytest.param(True, marks=pytest.mark.slow)])
def test_the_grid_is_found_behind_it(dynamic: bool | None, form: str) -> None:
    """The rotated queries and keys still show what their tokens are made of."""

    def model(video: torch.Tensor) -> torch.Tensor:
        x = wide_heads(video).contiguous()
        positions = torch.arange(x.shape[1])[None, :, None, None] * torch.ones(8)
        q, k = (wan(y, positions.cos(), positions.sin()).transpose(1, 2) for y in (x, x * 2))
        return torch.nn.functional.scaled_dot_product_attention(q, k, heads(video))

    torch._dynamo.reset()
    graphs, video = Graphs(), latent()
    actual = torch.compile(model, backend=graphs.backend, dynamic=dynamic)(video)
    (site,) = graphs.backend.graphs[0].sites
    assert site.rewritten
    assert site.grid[0] == T
    assert graphs.count("setitem") == 0
    assert torch.allclose(actual, model(video), atol=1e-5)
