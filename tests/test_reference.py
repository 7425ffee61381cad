"""The oracle against torch's dense attention, and against the rounding contract written as scalar loops."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from fpscompile.hadamard import unrotate
from fpscompile.kernel_spec import tile_slots
from fpscompile.masks import BlockMask, expand_mask
from fpscompile.plan import PhasePlan, Plan, ResolvedPlan, resolve
from fpscompile.quant import quantize_attention, to_e4m3
from fpscompile.reference import attention
from fpscompile.schedule import GRANULARITIES

GRID = (3, 5, 4)
PHASES = (PhasePlan(window=(1, 2, 2)), PhasePlan(window=(2, 3, 1)), PhasePlan(density=1.0))


def resolved_plan(before: int = 0, after: int = 0, k_after: int | None = None, **fields) -> ResolvedPlan:
    fields = {"tile": (2, 2, 3), "phases": PHASES, "block_n": 32, **fields}
    video = math.prod(GRID)
    k_after = after if k_after is None else k_after
    return resolve(Plan(**fields), GRID, before + video + after, before + video + k_after, before, before)


def inputs(
    resolved: ResolvedPlan, *, seed: int, batch=2, heads=4, key_heads=2, dim=8, value_dim=6, dtype=torch.float64
):
    generator = torch.Generator().manual_seed(seed)

    def draw(heads: int, length: int, dim: int) -> torch.Tensor:
        x = torch.randn(batch, heads, length, dim, generator=generator, dtype=torch.float64)
        return x.to(dtype).requires_grad_()

    k_length = resolved.k_layout.length
    return (
        draw(heads, resolved.q_layout.length, dim),
        draw(key_heads, k_length, dim),
        draw(key_heads, k_length, value_dim),
    )


def key_mask_of(kind: str, batch: int, heads: int, length: int) -> torch.Tensor | None:
    if kind == "none":
        return None
    generator = torch.Generator().manual_seed(11)
    keep = torch.rand(batch, heads, 1, length, generator=generator) < 0.7
    if kind == "bool":
        return keep
    bias = torch.randn(batch, heads, 1, length, generator=generator, dtype=torch.float64)
    return bias.masked_fill(~keep, float("-inf"))


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


def dense_lse(q, k, visible, bias, scale) -> torch.Tensor:
    scores = q @ k.repeat_interleave(q.shape[1] // k.shape[1], 1).mT * scale
    scores = scores if bias is None else scores + bias
    return scores.masked_fill(~visible, float("-inf")).logsumexp(-1)


@pytest.mark.parametrize("mask", ["none", "bool", "float"])
@pytest.mark.parametrize(("before", "after", "k_after"), [(0, 0, 0), (5, 0, 0), (0, 7, 7), (14, 3, 9)])
def test_unquantized_equals_dense_attention_under_the_expanded_mask(mask, before, after, k_after) -> None:
    resolved = resolved_plan(before, after, k_after)
    q, k, v = inputs(resolved, seed=before + 31 * after)
    key_mask = key_mask_of(mask, 2, 1, k.shape[2])
    scale = 0.3
    out, lse = attention(q, k, v, resolved=resolved, phase=[1, 0], key_mask=key_mask, scale=scale)

    visible = expand_mask(resolved.block_mask, resolved.q_layout, resolved.k_layout)[[1, 0]]
    if mask == "bool":
        visible = visible & key_mask
    bias = key_mask if mask == "float" else None
    attn_mask = visible if bias is None else torch.where(visible, bias, float("-inf"))
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask, scale=scale, enable_gqa=True)
    assert relative(out, expected) < 1e-12
    assert (lse - dense_lse(q, k, visible, bias, scale)).abs().max() < 1e-12
    assert lse.dtype == torch.float64
    assert not lse.requires_grad

    grad = torch.randn(out.shape, dtype=out.dtype)
    for ours, theirs in zip(
        torch.autograd.grad(out, (q, k, v), grad), torch.autograd.grad(expected, (q, k, v), grad), strict=True
    ):
        assert relative(ours, theirs) < 1e-12


def test_full_density_is_plain_attention() -> None:
    resolved = resolved_plan()
    q, k, v = inputs(resolved, seed=1)
    out, _ = attention(q, k, v, resolved=resolved, phase=torch.tensor([2], dtype=torch.int32))
    assert relative(out, F.scaled_dot_product_attention(q, k, v, enable_gqa=True)) < 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes(dtype: torch.dtype) -> None:
    resolved = resolved_plan()
    q, k, v = inputs(resolved, seed=2, dtype=dtype)
    out, lse = attention(q, k, v, resolved=resolved, phase=[0, 1])
    exact, _ = attention(q.double(), k.double(), v.double(), resolved=resolved, phase=[0, 1])
    assert out.dtype == dtype
    assert lse.dtype == torch.float32
    # One rounding of the output; float32 arithmetic inside.
    assert relative(out.double(), exact) < max(torch.finfo(dtype).eps, 1e-6)
    wide, _ = attention(q, k, v, resolved=resolved, phase=[0, 1], compute_dtype=torch.float64)
    assert wide.dtype == dtype


def test_phase_is_spread_over_the_batch() -> None:
    resolved = resolved_plan()
    q, k, v = inputs(resolved, seed=3, batch=4)
    short, _ = attention(q, k, v, resolved=resolved, phase=torch.tensor([1, 0]))
    full, _ = attention(q, k, v, resolved=resolved, phase=[1, 1, 0, 0])
    assert torch.equal(short, full)
    assert not torch.equal(short[:2], attention(q[:2], k[:2], v[:2], resolved=resolved, phase=[0])[0])


@pytest.mark.parametrize("quant", ["none", "fp8"])
@pytest.mark.parametrize("kind", ["bool", "float"])
def test_rows_without_keys(quant: str, kind: str) -> None:
    resolved = resolved_plan(quant=quant)
    q, k, v = inputs(resolved, seed=4)
    key_mask = torch.ones(2, 4, 1, k.shape[2], dtype=torch.bool)
    key_mask[1, 2] = False
    if kind == "float":
        key_mask = torch.zeros(key_mask.shape).masked_fill(~key_mask, float("-inf"))
    out, lse = attention(q, k, v, resolved=resolved, phase=[0], key_mask=key_mask)
    assert not out[1, 2].any()
    assert lse[1, 2].eq(float("-inf")).all()
    assert lse[0].isfinite().all()
    grads = torch.autograd.grad(out.sum(), (q, k, v))
    assert all(grad.isfinite().all() for grad in grads)
    assert not grads[0][1, 2].any()


# --- FP8 ---------------------------------------------------------------------------------------------------------


def e4m3(x: float) -> float:
    return torch.tensor(max(-448.0, min(448.0, x)), dtype=torch.float32).to(torch.float8_e4m3fn).item()


def contract_row(q_row, k_hat, v_hat, slots: list[int], bias, scale: float, block_n: int, p_scale: float):
    """The rounding contract for one query, in Python floats."""
    m, total, acc = float("-inf"), 0.0, [0.0] * v_hat.shape[1]
    for start in range(0, len(slots), block_n):
        block = slots[start : start + block_n]
        scores = [
            float("-inf") if token < 0 else scale * float(q_row @ k_hat[token]) + float(bias[token]) for token in block
        ]
        top = max(scores)
        new = m if top == float("-inf") else max(m, math.ceil(top / math.log(2)) * math.log(2))
        if new == float("-inf"):
            continue
        alpha = math.exp(m - new)
        p = [math.exp(s - new) for s in scores]
        p8 = [e4m3(x * p_scale) for x in p]
        acc = [
            a * alpha + sum(w * float(v_hat[t, d]) for w, t in zip(p8, block, strict=True)) for d, a in enumerate(acc)
        ]
        total = total * alpha + sum(p)
        m = new
    if total == 0.0:
        return acc, float("-inf")
    return [a / (p_scale * total) for a in acc], m + math.log(total)


@pytest.mark.parametrize(
    ("block_n", "tile", "p_scale"), [(16, (2, 2, 3), 256.0), (32, (1, 2, 3), 448.0), (16, (3, 3, 3), 256.0)]
)
@pytest.mark.parametrize("mask", ["none", "float"])
@pytest.mark.parametrize("before", [{}, {"smooth_v": True, "hadamard": True}], ids=["plain", "smooth_v hadamard"])
def test_fp8_follows_the_contract(block_n: int, tile, p_scale: float, mask: str, before: dict[str, bool]) -> None:
    resolved = resolved_plan(3, 2, tile=tile, quant="fp8", block_n=block_n, p_scale=p_scale, **before)
    q, k, v = (
        x.detach() * 3 for x in inputs(resolved, seed=block_n, batch=1, heads=2, key_heads=1, dim=4, value_dim=2)
    )
    key_mask = key_mask_of(mask, 1, 2, k.shape[2])
    scale = 0.5
    out, lse = attention(q, k, v, resolved=resolved, phase=[0], key_mask=key_mask, scale=scale)

    fp8 = quantize_attention(q, k, v, resolved.q_layout, resolved.k_layout, "tile", key_mask=key_mask, **before)
    v_mean = torch.zeros(2) if fp8.v_mean is None else fp8.v_mean[0, 0, 0]
    assert fp8.v_mean is None or v_mean.abs().min() > 1e-3
    q_hat, k_hat, v_hat = fp8.q.dequantize()[0], fp8.k.dequantize()[0, 0], fp8.v.dequantize()[0, 0]
    bias = torch.zeros(1, 2, 1, k.shape[2]) if key_mask is None else key_mask
    slots = resolved.k_layout.slots(tile_slots(tile, block_n))
    dense = resolved.block_mask.to_dense(resolved.k_layout.n_tiles)[0, 0]
    tiles = resolved.q_layout.order().split(resolved.q_layout.sizes().tolist())
    for head in range(2):
        for tile_index in range(0, len(tiles), 3):
            listed = [slot for j in dense[tile_index].nonzero().flatten().tolist() for slot in slots[j].tolist()]
            token = int(tiles[tile_index][-1])
            expected, expected_lse = contract_row(
                q_hat[head, token], k_hat, v_hat, listed, bias[0, head, 0], scale, block_n, p_scale
            )
            expected = torch.tensor(expected, dtype=torch.float64) + v_mean
            torch.testing.assert_close(out[0, head, token], expected, rtol=1e-10, atol=1e-12)
            shift = scale * float(q[0, head, token] @ fp8.k_mean[0, 0, 0])
            assert float(lse[0, head, token]) == pytest.approx(expected_lse + shift, abs=1e-10)


@pytest.mark.parametrize("spread", [0.5, 1.0, 2.0, 4.0], ids=str)
def test_whole_numbers_cost_little_accuracy(spread: float) -> None:
    """Against the running maximum itself, which would keep each row's largest weight exact: less than 8 % more error,
    with scores of that standard deviation, since rounding Q, K and V outweighs it: 1.01, 1.03, 1.05 and 1.03 seen.
    """
    plan = Plan(tile=(2, 4, 4), phases=(PhasePlan(density=1.0),), quant="fp8", smooth_k=False)
    resolved = resolve(plan, (8, 8, 16), 1024, 1024)
    q, k, v = (x.detach() for x in inputs(resolved, seed=3, batch=1, heads=2, key_heads=2, dim=64, value_dim=64))
    scale = spread / 8
    exact = torch.softmax(scale * q @ k.mT, -1) @ v
    out, _ = attention(q, k, v, resolved=resolved, phase=[0], scale=scale)
    fp8 = quantize_attention(q, k, v, resolved.q_layout, resolved.k_layout, "tile", smooth_k=False)
    q_hat, k_hat, v_hat = (x.dequantize() for x in (fp8.q, fp8.k, fp8.v))
    order = resolved.k_layout.order()
    scores = scale * q_hat @ k_hat[:, :, order].mT
    m, total, acc = torch.full_like(scores[..., :1], -math.inf), 0.0, 0.0
    for block, values in zip(scores.split(128, -1), v_hat[:, :, order].split(128, -2), strict=True):
        new = torch.maximum(m, block.amax(-1, keepdim=True))
        p, alpha = torch.exp(block - new), torch.exp(m - new)
        acc = acc * alpha + to_e4m3(256 * p).double() @ values
        total, m = total * alpha + p.sum(-1, keepdim=True), new
    running = acc / (256 * total)
    assert (out - exact).norm() < 1.08 * (running - exact).norm()


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_fp8_is_close_to_exact(granularity: str) -> None:
    phases = (PhasePlan(window=(1, 2, 2), granularity=granularity),)
    q, k, v = inputs(resolved_plan(4, 3), seed=5, dim=32, value_dim=32)
    k = (k + 4.0).detach()  # a common part, as real keys have
    exact, exact_lse = attention(q, k, v, resolved=resolved_plan(4, 3, phases=phases), phase=[0])
    out, lse = attention(q, k, v, resolved=resolved_plan(4, 3, phases=phases, quant="fp8"), phase=[0])
    assert 1e-4 < relative(out, exact) < 0.06  # E4M3: 3 mantissa bits, errors of a few per cent
    assert (lse - exact_lse).abs().max() < 0.15


def test_fp8_is_exact_where_nothing_rounds() -> None:
    # Scores are all zero, so P is 1 everywhere, and V's channels hold 448 and halves of it.
    resolved = resolved_plan(0, 5, quant="fp8")
    q, k, v = inputs(resolved, seed=6)
    v = 448.0 * 0.5 ** torch.randint(0, 4, v.shape).double()
    v[:, :, 0] = 448.0
    out, lse = attention(torch.zeros_like(q), k, v, resolved=resolved, phase=[0])
    visible = expand_mask(resolved.block_mask, resolved.q_layout, resolved.k_layout)[0, 0].double()
    mean = (visible @ v.repeat_interleave(2, 1)) / visible.sum(-1, keepdim=True)
    torch.testing.assert_close(out, mean, rtol=1e-13, atol=0)
    torch.testing.assert_close(lse, visible.sum(-1).log().expand_as(lse), rtol=1e-13, atol=1e-13)


def test_smoothing_makes_fp8_blind_to_a_common_key() -> None:
    resolved = resolved_plan(quant="fp8")
    q, k, v = (x.detach() for x in inputs(resolved, seed=7))
    k = k - k.mean(2, keepdim=True)
    common = torch.full((8,), 16.0, dtype=torch.float64)
    out, lse = attention(q, k, v, resolved=resolved, phase=[0], scale=0.25)
    moved, moved_lse = attention(q, k + common, v, resolved=resolved, phase=[0], scale=0.25)
    torch.testing.assert_close(moved, out, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(moved_lse, lse + 0.25 * (q @ common), rtol=1e-9, atol=1e-9)
    rough = resolved_plan(quant="fp8", smooth_k=False)
    assert relative(attention(q, k + common, v, resolved=rough, phase=[0], scale=0.25)[0], out) > 0.01


def test_a_mean_of_v_costs_nothing_with_smoothing() -> None:
    """The mean is added back whole: no output depends on it beyond float rounding, but those that see no key are 0."""
    resolved = resolved_plan(quant="fp8", smooth_v=True)
    q, k, v = (x.detach() for x in inputs(resolved, seed=12))
    v = v - v.mean(2, keepdim=True)
    common = torch.linspace(-40, 50, 6, dtype=torch.float64)
    key_mask = torch.ones(2, 1, 1, k.shape[2], dtype=torch.bool)
    key_mask[1] = False
    out, lse = attention(q, k, v, resolved=resolved, phase=[0], key_mask=key_mask)
    moved, moved_lse = attention(q, k, v + common, resolved=resolved, phase=[0], key_mask=key_mask)
    torch.testing.assert_close(moved[0], out[0] + common, rtol=1e-10, atol=1e-10)
    assert not moved[1].any()
    assert torch.equal(lse, moved_lse)
    rough, _ = attention(q, k, v + common, resolved=resolved_plan(quant="fp8"), phase=[0])
    assert (rough[0] - common - out[0]).norm() > 0.5 * out[0].norm()


def test_rotating_changes_rounding_only() -> None:
    resolved, turned = resolved_plan(quant="fp8"), resolved_plan(quant="fp8", hadamard=True)
    q, k, v = (x.detach() for x in inputs(resolved, seed=13, dim=12))
    exact, exact_lse = attention(q, k, v, resolved=resolved_plan(), phase=[1])
    out, lse = attention(q, k, v, resolved=turned, phase=[1])
    assert 1e-3 < relative(out, exact) < 0.06
    assert (lse - exact_lse).abs().max() < 0.15
    assert relative(out, attention(q, k, v, resolved=resolved, phase=[1])[0]) > 1e-3


@pytest.mark.parametrize("smooth", [True, False])
@pytest.mark.parametrize("hadamard", [True, False])
def test_fp8_gradients_are_straight_through(smooth: bool, hadamard: bool) -> None:
    before = {"smooth_k": smooth, "smooth_v": smooth, "hadamard": hadamard}
    resolved = resolved_plan(2, 3, quant="fp8", phases=(PhasePlan(density=1.0),), **before)
    q, k, v = inputs(resolved, seed=8, batch=1, heads=2, key_heads=2, dim=7)
    scale = 0.35
    out, _ = attention(q, k, v, resolved=resolved, phase=[0], scale=scale)
    grad = torch.randn(out.shape, dtype=out.dtype)
    dq, dk, dv = torch.autograd.grad(out, (q, k, v), grad)
    with torch.no_grad():
        fp8 = quantize_attention(q, k, v, resolved.q_layout, resolved.k_layout, "tile", **before)
        q_hat, k_hat, v_hat = fp8.q.dequantize(), fp8.k.dequantize(), fp8.v.dequantize()
        if hadamard:
            q_hat, k_hat = unrotate(q_hat, 8), unrotate(k_hat, 8)
        p = torch.softmax(q_hat @ k_hat.mT * scale, -1)
        dp = grad @ v_hat.mT
        ds = p * (dp - (p * dp).sum(-1, keepdim=True))
        torch.testing.assert_close(dq, (scale * ds @ k_hat)[..., :7], rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(dk, (scale * ds.mT @ q_hat)[..., :7], rtol=1e-10, atol=1e-12)
        # dV sees the rounded P: its weights make the output, and differ from the softmax.
        assert 1e-4 < relative(dv, p.mT @ grad) < 0.05
        # sum(dO * out) = sum(V_hat * dV) holds for the rounded weights alone.
        centred = out if fp8.v_mean is None else out - fp8.v_mean
        torch.testing.assert_close((v_hat * dv).sum(), (grad * centred).sum(), rtol=1e-10, atol=1e-10)


def test_block_mask_override_per_head() -> None:
    generator = torch.Generator().manual_seed(9)
    n = resolved_plan().k_layout.n_tiles
    dense = torch.rand(1, 4, n, n, generator=generator) < 0.5
    dense[0, 1, 2] = False
    for quant in ("none", "fp8"):
        plan = resolved_plan(quant=quant)
        q, k, v = inputs(plan, seed=10)
        mask = BlockMask.from_dense(dense)
        out, lse = attention(q, k, v, resolved=plan, phase=[0], block_mask=mask)
        visible = expand_mask(mask, plan.q_layout, plan.k_layout)
        expected = F.scaled_dot_product_attention(q, k, v, attn_mask=visible, enable_gqa=True)
        assert relative(out, expected) < (1e-12 if quant == "none" else 0.06)
        hidden = ~visible[0].any(-1)
        assert hidden.any()
        assert not out[:, hidden].any()
        assert lse[:, hidden].eq(float("-inf")).all()
