"""Norm and rotary embedding of queries and keys become ``fps::norm_rotate``, or stay as they are."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from models.rotary import Graphs, wan
from torch import nn
from torch.nn.functional import rms_norm

import fpscompile
from fpscompile.passes import fuse_rotary, interleaved_writes

HEADS, DIM, GRID = 2, 24, (2, 4, 4)
N, TOKENS = HEADS * DIM, 32
EPS = 1e-6

Norm = Callable[[torch.Tensor, nn.Parameter], torch.Tensor]


@pytest.fixture
def on_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a GPU gets, on the CPU."""
    monkeypatch.setattr(fuse_rotary, "_on_gpu", lambda node: True)


class Block(nn.Module):
    """Attention of Wan's make over a latent video."""

    def __init__(self, norm: Norm, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.norm = norm
        self.embed = nn.Conv3d(4, N, 1, dtype=dtype)
        self.to_q, self.to_k, self.to_v = (nn.Linear(N, N, dtype=dtype) for _ in range(3))
        self.weights = nn.ParameterList(nn.Parameter(torch.randn(N, dtype=dtype)) for _ in range(2))

    def forward(self, video: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        x = self.embed(video).flatten(2).transpose(1, 2)
        q, k = (self.norm(layer(x), weight) for layer, weight in zip((self.to_q, self.to_k), self.weights, strict=True))
        q, k = (wan(y.unflatten(2, (HEADS, -1)), cos, sin).transpose(1, 2) for y in (q, k))
        v = self.to_v(x).unflatten(2, (HEADS, -1)).transpose(1, 2)
        return torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def whole(y: torch.Tensor, weight: nn.Parameter) -> torch.Tensor:
    return rms_norm(y, (N,), weight, EPS)


def inputs(batch: int = 2, dtype: torch.dtype = torch.float32, tables: int = 1) -> tuple[torch.Tensor, ...]:
    cos, sin = torch.randn(2, tables, TOKENS, 1, DIM)
    return torch.randn(batch, 4, *GRID, dtype=dtype), cos, sin


def compiled(model: nn.Module, *args: torch.Tensor) -> tuple[torch.Tensor, Graphs]:
    torch._dynamo.reset()
    graphs = Graphs()
    return torch.compile(model, backend=graphs.backend)(*args), graphs


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tables", [1, 2])
@torch.no_grad()
def test_queries_and_keys(tables: int, dtype: torch.dtype, on_gpu: None) -> None:
    model, args = Block(whole, dtype), inputs(dtype=dtype, tables=tables)
    found, graphs = compiled(model, *args)
    (site,) = graphs.backend.graphs[0].sites
    assert site.rewritten
    assert graphs.count("fps::norm_rotate") == 2
    assert [note.message[:7] for note in graphs.backend.graphs[0].notes if note.code == "rotary"] == ["2 norms"]
    assert graphs.count("stack") == graphs.count("rms_norm") == graphs.count("type_as") == 0
    expected = model(*args)
    step = torch.finfo(dtype).eps
    torch.testing.assert_close(found, expected, rtol=8 * step, atol=8 * step)
    assert found.stride() == expected.stride()


@torch.no_grad()
def test_batches_may_be_symbols(on_gpu: None) -> None:
    model = Block(whole)
    torch._dynamo.reset()
    graphs = Graphs()
    call = torch.compile(model, backend=graphs.backend)
    for batch in (2, 3, 5):
        args = inputs(batch)
        torch.testing.assert_close(call(*args), model(*args), rtol=1e-5, atol=1e-5)
    assert len(graphs.seen) == 2
    assert graphs.count("fps::norm_rotate") == 4


@torch.no_grad()
def test_a_cpu_keeps_its_own() -> None:
    _, graphs = compiled(Block(whole), *inputs())
    assert graphs.count("fps::norm_rotate") == 0
    assert graphs.count("stack") == 2


def by_head(y: torch.Tensor, weight: nn.Parameter) -> torch.Tensor:
    """Of each head by itself."""
    return rms_norm(y.unflatten(2, (HEADS, -1)), (DIM,), weight[:DIM], EPS).flatten(2)


def default_eps(y: torch.Tensor, weight: nn.Parameter) -> torch.Tensor:
    return rms_norm(y, (N,), weight)


def read_twice(y: torch.Tensor, weight: nn.Parameter) -> torch.Tensor:
    normed = rms_norm(y, (N,), weight, EPS)
    return normed + 0.0 * normed.mean()


def by_hand(y: torch.Tensor, weight: nn.Parameter) -> torch.Tensor:
    return y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + EPS) * weight


def in_float32(y: torch.Tensor, weight: nn.Parameter) -> torch.Tensor:
    """Handed on wider than it came."""
    return rms_norm(y.double(), (N,), weight.double(), EPS).to(y.dtype)


def written_after(y: torch.Tensor, weight: nn.Parameter) -> torch.Tensor:
    """What was normalized is overwritten before the rotation."""
    normed = rms_norm(y, (N,), weight, EPS)
    y.add_(1.0)
    return normed


@pytest.mark.parametrize("norm", [by_head, default_eps, read_twice, by_hand, in_float32, written_after])
@torch.no_grad()
def test_other_norms_stay(norm: Norm, on_gpu: None) -> None:
    model, args = Block(norm), inputs()
    found, graphs = compiled(model, *args)
    assert graphs.count("fps::norm_rotate") == 0
    torch.testing.assert_close(found, model(*args), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_tables_may_differ_in_batch(on_gpu: None) -> None:
    model, (video, cos, sin) = Block(whole), inputs(tables=2)
    found, graphs = compiled(model, video, cos[:1], sin)
    assert graphs.count("fps::norm_rotate") == 2
    torch.testing.assert_close(found, model(video, cos[:1], sin), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_wrapped_tensors_stay(on_gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """A DTensor, for one: it would not know how to shard the op."""
    monkeypatch.setattr(fuse_rotary, "is_traceable_wrapper_subclass", lambda x: isinstance(x, torch.Tensor))
    _, graphs = compiled(Block(whole), *inputs())
    assert graphs.count("fps::norm_rotate") == 0


class Squared(Block):
    """Pairs that are multiplied by themselves, as complex numbers: tables that come out of the norm."""

    def forward(self, video: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        x = self.embed(video).flatten(2).transpose(1, 2)
        y = rms_norm(self.to_q(x), (N,), self.weights[0], EPS).unflatten(2, (1, -1))
        y1, y2 = y.unflatten(-1, (-1, 2)).unbind(-1)
        q = torch.empty_like(y)
        q[..., 0::2] = y1 * y1 - y2 * y2
        q[..., 1::2] = y1 * y2 + y2 * y1
        q, k, v = (
            z.transpose(1, 2) for z in (q, *(layer(x).unflatten(2, (1, -1)) for layer in (self.to_k, self.to_v)))
        )
        return torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


@torch.no_grad()
def test_what_only_looks_like_tables(on_gpu: None) -> None:
    model, args = Squared(whole), inputs()
    found, _ = compiled(model, *args)
    torch.testing.assert_close(found, model(*args), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_tables_of_another_precision_stay(on_gpu: None) -> None:
    model, (video, cos, sin) = Block(whole), inputs()
    _, graphs = compiled(model, video, cos.double(), sin.double())
    assert graphs.count("fps::norm_rotate") == 0


def test_with_gradients_it_stays(on_gpu: None) -> None:
    model = Block(whole)
    found, graphs = compiled(model, *inputs())
    found.sum().backward()
    assert graphs.count("fps::norm_rotate") == 0
    assert model.to_q.weight.grad is not None


@torch.no_grad()
def test_without_a_rewritten_site_it_stays(on_gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor without the pass ahead of it that joins the writes."""
    model, args = Block(whole), inputs()
    monkeypatch.setenv("FPS_DISABLE", "1")
    assert compiled(model, *args)[1].count("fps::norm_rotate") == 0
    monkeypatch.delenv("FPS_DISABLE")
    monkeypatch.setattr(interleaved_writes, "_join", lambda *_: False)
    assert compiled(model, *args)[1].count("fps::norm_rotate") == 0


def test_a_whole_wan(on_gpu: None) -> None:
    pytest.importorskip("diffusers")
    from diffusers import WanTransformer3DModel

    model = WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=24, in_channels=4, out_channels=4, text_dim=16, freq_dim=16,
        ffn_dim=32, num_layers=2, qk_norm="rms_norm_across_heads", rope_max_seq_len=32,
    ).eval()  # fmt: skip
    args = (torch.randn(1, 4, 4, 8, 8), torch.tensor([500.0]), torch.randn(1, 5, 16))
    graphs = Graphs()
    with torch.no_grad():
        expected = model(*args, return_dict=False)[0]
        torch._dynamo.reset()
        with fpscompile.attach(model):
            found = torch.compile(model, backend=graphs.backend)(*args, return_dict=False)[0]
    assert sum(site.rewritten for record in graphs.backend.graphs for site in record.sites) == 2
    assert graphs.count("fps::norm_rotate") == 4
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
