"""flex_attention, nn.MultiheadAttention, 3-D inputs, einops, and attention in chunks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from models.toys import DENSE, HEADS, LENGTH, D, compiled, gradient, heads, latent, tokens_of
from torch import nn
from torch.nn import functional as F
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from fpscompile import Backend, Settings

SCALE = D**-0.5
# Dynamo takes seconds to trace with symbolic shapes.
DYNAMIC = [None, pytest.param(True, marks=pytest.mark.slow)]


def call_flex(video: torch.Tensor, **options: Any) -> Any:
    x = heads(video)
    return flex_attention(x, x * 2, x + 1, **options)


@pytest.mark.parametrize("dynamic", DYNAMIC)
def test_flex_without_functions_is_attention(dynamic: bool | None) -> None:
    with torch.no_grad():
        outcome = compiled(call_flex, latent(), dynamic=dynamic)
        scaled = compiled(lambda video: call_flex(video, scale=0.1), latent(), dynamic=dynamic)
    for each in (outcome, scaled):
        assert [site.rewritten for site in each.sites] == [True]
        assert each.error <= 1e-5


def empty_but_partial() -> BlockMask:
    """No mask function, yet blocks are missing."""
    counts = torch.ones(1, 1, 4, dtype=torch.int32)
    indices = torch.arange(4, dtype=torch.int32).view(1, 1, 1, 4).expand(1, 1, 4, 4).contiguous()
    return BlockMask.from_kv_blocks(counts, indices, BLOCK_SIZE=16, seq_lengths=(LENGTH, LENGTH))


def test_flex_with_functions_is_declined() -> None:
    causal = create_block_mask(lambda b, h, q, k: q >= k, None, None, LENGTH, LENGTH, device="cpu")
    partial = empty_but_partial()
    cases: list[tuple[Callable[[torch.Tensor], Any], str]] = [
        (lambda video: call_flex(video, block_mask=causal), "mask"),
        (lambda video: call_flex(video, block_mask=partial), "mask"),
        (lambda video: call_flex(video, score_mod=lambda s, b, h, q, k: s + (q - k)), "spelling"),
        (lambda video: call_flex(video, return_lse=True)[0], None),
        (lambda video: (lambda r: r[0] + r[1].mean())(call_flex(video, return_lse=True)), "spelling"),
    ]
    with torch.no_grad():
        for function, code in cases:
            outcome = compiled(function, latent())
            (site,) = outcome.sites
            assert (site.kind, site.reason_code) == ("3d", code)
            assert outcome.untouched == (code is not None)


class Multihead(nn.Module):
    """nn.MultiheadAttention on video tokens, with whatever arguments."""

    def __init__(self, batch_first: bool = True, **options: Any) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(HEADS * D, HEADS, batch_first=batch_first, **options)
        self.call: dict[str, Any] = {}

    def forward(self, video: torch.Tensor) -> torch.Tensor:
        x = tokens_of(video)
        x = x if self.attention.batch_first else x.transpose(0, 1)
        return self.attention(x, x, x, **self.call)[0]


@pytest.mark.parametrize("dynamic", DYNAMIC)
@pytest.mark.parametrize("options", [{}, {"batch_first": False}, {"bias": False}, {"dropout": 0.5}])
def test_multihead_attention(options: dict[str, Any], dynamic: bool | None) -> None:
    model, video = Multihead(**options).eval(), latent()
    outcome = compiled(model, video, dynamic=dynamic)
    assert [site.rewritten for site in outcome.sites] == [True]
    assert outcome.error <= 1e-5
    ours = gradient(outcome.actual, list(model.parameters()))
    assert torch.allclose(ours, gradient(outcome.expected, list(model.parameters())), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", [torch.bool, torch.float32])
def test_multihead_key_padding(kind: torch.dtype) -> None:
    model = Multihead().eval()
    hidden = torch.arange(LENGTH)[None].expand(2, -1) > torch.tensor([[40], [55]])
    model.call["key_padding_mask"] = hidden if kind == torch.bool else hidden.float() * -1e9
    outcome = compiled(model, latent())
    assert outcome.rewritten == 1
    assert outcome.error <= 1e-5


@pytest.mark.parametrize(
    ("options", "call", "code"),
    [
        ({"add_zero_attn": True}, {}, "spelling"),
        ({"add_bias_kv": True}, {}, "spelling"),
        ({}, {"attn_mask": torch.zeros(LENGTH, LENGTH), "need_weights": False}, "mask"),
        ({"dropout": 0.5}, {"need_weights": False}, "dropout"),
    ],
)
def test_multihead_attention_with_more(options: dict[str, Any], call: dict[str, Any], code: str) -> None:
    model = Multihead(**options).train("dropout" in options)
    model.call |= call
    outcome = compiled(model, latent())
    assert [(site.rewritten, site.reason_code) for site in outcome.sites] == [(False, code)]
    assert outcome.untouched


def test_multihead_weights_that_are_read() -> None:
    model = Multihead().eval()

    def function(video: torch.Tensor) -> torch.Tensor:
        x = tokens_of(video)
        result, weights = model.attention(x, x, x)
        return result + weights.mean()

    outcome = compiled(function, latent())
    assert outcome.says("need_weights=False")
    assert outcome.untouched


@pytest.mark.parametrize("dynamic", DYNAMIC)
def test_three_dimensional_inputs_with_a_key_mask(dynamic: bool | None) -> None:
    def folded(video: torch.Tensor) -> torch.Tensor:
        x = heads(video).flatten(0, 1)
        mask = (torch.arange(x.shape[1]) > 4)[None, None].expand(x.shape[0], 1, x.shape[1])
        return F.scaled_dot_product_attention(x, x * 2, x + 1, attn_mask=mask)

    outcome = compiled(folded, latent(), dynamic=dynamic)
    assert outcome.rewritten == 1
    assert outcome.error <= 1e-5


@pytest.mark.parametrize(("options", "code"), [({"is_causal": True}, "causal"), ({"dropout_p": 0.5}, "dropout")])
def test_three_dimensional_inputs_with_more(options: dict[str, Any], code: str) -> None:
    def folded(video: torch.Tensor) -> torch.Tensor:
        x = heads(video).flatten(0, 1)
        return F.scaled_dot_product_attention(x, x * 2, x + 1, **options)

    outcome = compiled(folded, latent())
    assert [site.reason_code for site in outcome.sites] == [code]
    assert code != "causal" or "drop the argument" in (outcome.sites[0].reason or "")
    assert outcome.untouched


@pytest.mark.xfail(
    torch.__version__ < "2.12", reason="einops tells Dynamo of torch 2.11 to keep its calls whole", strict=True
)
def test_einops() -> None:
    einops = pytest.importorskip("einops")

    def function(video: torch.Tensor) -> torch.Tensor:
        q = einops.rearrange(video, "b (n d) t h w -> (b n) (t h w) d", n=HEADS)
        scores = einops.einsum(q, q * 2, "b i d, b j d -> b i j") * SCALE
        out = einops.einsum(scores.softmax(-1), q + 1, "b i j, b j d -> b i d")
        return einops.rearrange(out, "(b n) l d -> b l (n d)", n=HEADS)

    outcome = compiled(function, latent())
    assert outcome.rewritten == 1
    assert outcome.error <= 1e-5


def kept_whole(function: Callable[..., Any]) -> Callable[..., Any]:
    """One more function of this name, which Dynamo does not look into."""

    def call(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    call.__name__, call.__module__ = function.__name__, function.__module__
    return torch._dynamo.allow_in_graph(call)


def test_einops_calls_that_stay_whole_are_named() -> None:
    """As torch 2.11 captures them; what is no attention is not mistaken for it."""
    einops = pytest.importorskip("einops")
    rearrange, einsum = kept_whole(einops.rearrange), kept_whole(einops.einsum)

    def function(video: torch.Tensor, attends: bool) -> torch.Tensor:
        q = rearrange(video, "b (n d) t h w -> (b n) (t h w) d", n=HEADS)
        scores = einsum(q, q * 2, "b i d, b j d -> b i j") * SCALE
        weights = scores.softmax(-1).to(q.dtype) if attends else scores.sigmoid()
        return einsum(weights, q + 1, "b i j, b j d -> b i d")

    for attends in (True, False):
        torch._dynamo.reset()
        fps = Backend(Settings.from_options({"inner": "eager", "density": 0.5}))
        torch.compile(lambda video, attends=attends: function(video, attends), backend=fps)(latent())
        messages = [note.message for note in fps.graphs[0].notes if note.code == "hidden-attention"]
        assert bool(messages) == attends
        assert all("torch.einsum" in message and "2.12" in message for message in messages)


def written(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return (q @ k.mT * SCALE).softmax(-1) @ v


def split_queries(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return torch.cat([written(part, k, v) for part in q.split(16, 2)], dim=2)


def indexed_queries(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    parts = [q[:, :, start : start + 16] for start in range(0, LENGTH, 16)]
    joined = torch.cat([F.scaled_dot_product_attention(p, k, v).transpose(1, 2).flatten(2) for p in parts], 1)
    return joined.unflatten(-1, (HEADS, D)).transpose(1, 2)


def folded_chunks(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    q, k, v = (x.flatten(0, 1) for x in (q, k, v))
    joined = torch.cat([torch.bmm(torch.bmm(p, k.mT).mul(SCALE).softmax(-1), v) for p in q.chunk(3, 1)], 1)
    return joined.unflatten(0, (-1, HEADS))


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("attention", [split_queries, indexed_queries, folded_chunks])
def test_chunks_become_one_call(attention: Any, batch: int) -> None:
    def function(video: torch.Tensor) -> torch.Tensor:
        x = heads(video)
        return attention(x, x * 2, x + 1)

    outcome = compiled(function, latent(batch))
    (site,) = outcome.sites
    assert (site.kind, site.rewritten, site.q_length) == ("3d", True, LENGTH)
    assert outcome.error <= 1e-5


def test_slices_of_the_batch_are_attention_each() -> None:
    def function(video: torch.Tensor) -> torch.Tensor:
        x = heads(video)
        return torch.cat([written(part, part * 2, part + 1) for part in x.split(1, 0)])

    outcome = compiled(function, latent())
    assert outcome.rewritten == 2
    assert outcome.error <= 1e-5


def swapped(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    first, second = q.split(30, 2)
    return torch.cat([written(second, k, v), written(first, k, v)], dim=2)


def overlapping(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return torch.cat([written(q[:, :, :40], k, v), written(q[:, :, 20:], k, v)], dim=2)


def own_keys(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    parts = zip(q.split(20, 2), k.split(20, 2), v.split(20, 2), strict=True)
    return torch.cat([written(*part) for part in parts], dim=2)


def other_scale(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    first, second = q.split(30, 2)
    return torch.cat([written(first, k, v), written(second * 1, k, v + 0)], dim=2)


def along_features(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    first, second = q.split(30, 2)
    return torch.cat([written(first, k, v), written(second, k, v)], dim=3)


def keys_changed(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    first, second = q.split(30, 2)
    k = k.clone()
    done = written(first, k, v)
    k.mul_(0.5)
    return torch.cat([done, written(second, k, v)], dim=2)


@pytest.mark.parametrize("attention", [keys_changed, swapped, overlapping, own_keys, other_scale, along_features])
def test_pieces_that_are_no_chunks(attention: Any) -> None:
    def function(video: torch.Tensor) -> torch.Tensor:
        x = heads(video)
        return attention(x, x * 2, x + 1)

    outcome = compiled(function, latent())
    assert outcome.untouched
    assert outcome.says("attention in pieces")


@pytest.mark.slow
def test_a_pinned_dropout_rate_is_guarded() -> None:
    """Dynamic shapes make the rate an input; the compiled code must not outlive its value."""
    model, video = Multihead(dropout=0.0).train(), latent()
    fps = Backend(Settings.from_options(DENSE))
    compiled_model = torch.compile(model, backend=fps, dynamic=True)
    assert torch.allclose(compiled_model(video), model(video), rtol=1e-4, atol=1e-5)
    model.attention.dropout = 0.9
    assert not torch.allclose(compiled_model(video), model.eval()(video), rtol=1e-2, atol=1e-2)
    assert [[site.reason_code for site in graph.sites] for graph in fps.graphs] == [[None], ["dropout"]]
