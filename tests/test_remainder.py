"""``remainder="means"``: every lowering against the reference, gradients, masks, and what it is for."""

from __future__ import annotations

import math

import pytest
import torch
from models.zoo import ZOO, output, wan

from fpscompile import Backend, Settings, lowerings
from fpscompile import remainder as remainder_of
from fpscompile.calibration.candidates import candidates
from fpscompile.calibration.statistics import SiteStatistics, observe
from fpscompile.errors import OptionError
from fpscompile.lowerings import cpp
from fpscompile.plan import PhasePlan, Plan, resolve
from fpscompile.reference import attention
from fpscompile.remainder import extra_density
from fpscompile.report import Report
from fpscompile.selection import masks_of_call
from fpscompile.windows import Heads, pattern_of, window_of, with_density

GRIDS = {"even": ((4, 4, 4), (2, 2, 2)), "ragged": ((3, 5, 7), (2, 2, 4))}


def case(grid, tile, window, *, text=(0, 0), dtype=torch.float64, heads=(2, 2), dim=32, seed=0, batch=2, **fields):
    generator = torch.Generator().manual_seed(seed)
    length = math.prod(grid) + sum(text)
    plan = Plan(tile=tile, phases=(PhasePlan(window=window_of(window)),), remainder="means", **fields)
    resolved = resolve(plan, grid, length, length, text[0], text[0], heads=heads[0])
    shapes = ((heads[0], dim), (heads[1], dim), (heads[1], dim))
    q, k, v = (torch.randn(batch, h, length, d, generator=generator, dtype=dtype) for h, d in shapes)
    return q, k + torch.randn(1, heads[1], 1, dim, generator=generator, dtype=dtype), v, resolved


def test_a_mask_in_double_precision_stays_so():
    q, k, v, resolved = case((2, 4, 6), (2, 2, 2), (1, 1, 2))
    mask = torch.randn(1, 1, 1, k.shape[2], dtype=torch.float64)
    out, _ = run(q, k, v, resolved, mask)[:2]
    wanted, _ = expected(q, k, v, resolved, mask)[:2]
    assert (out - wanted).norm() <= 1e-12 * wanted.norm()


def run(q, k, v, resolved, key_mask=None, grad=None, scale=0.3):
    """(out, lse[, gradients]) of the plan's lowering."""
    lowering = lowerings.get(resolved.plan.lowering)
    call = {"key_mask": key_mask, "phases": (0,) * len(q), "resolved": resolved, "scale": scale}
    if resolved.dynamic:
        of_call, mask = masks_of_call(None, q, k, key_mask, call["phases"], resolved, scale)
        call |= {"resolved": of_call, "block_mask": mask, "phases": tuple(range(len(q)))}
    out, lse = lowerings.forward(lowering, q, k, v, **call)
    if grad is None:
        return out, lse
    if resolved.plan.quant == "fp8":
        lowering = lowerings.get("gather")
    return out, lse, lowerings.backward(lowering, grad, q, k, v, out, lse, **call)


def expected(q, k, v, resolved, key_mask=None, grad=None, scale=0.3):
    leaves = [x.detach().clone().requires_grad_(grad is not None) for x in (q, k, v)]
    mask, phases = None, (0,) * len(q)
    if resolved.dynamic:
        resolved, mask = masks_of_call(None, q, k, key_mask, phases, resolved, scale)
        phases = tuple(range(len(q)))
    out, lse = attention(*leaves, resolved=resolved, phase=phases, key_mask=key_mask, scale=scale, block_mask=mask)
    return (out, lse) if grad is None else (out.detach(), lse, torch.autograd.grad(out, leaves, grad))


def off(x, y):
    return float((x.double() - y.double()).norm() / y.double().norm())


def by_definition(q, k, v, resolved, scale):
    """The module's first formula, for tokens of a video alone: one softmax over seen tokens and means of others."""
    layout = resolved.k_layout
    tiles = layout.order().split(layout.sizes().tolist())
    seen = resolved.block_mask.to_dense(layout.n_tiles)[0, 0]
    out = torch.empty_like(q)
    for i, rows in enumerate(tiles):
        scores, values = [], []
        for j, tokens in enumerate(tiles):
            one = (k[:, :, tokens], v[:, :, tokens])
            if not seen[i, j]:
                one = tuple(x.mean(2, keepdim=True) for x in one)
            term = 0.0 if seen[i, j] else math.log(len(tokens))
            scores.append(q[:, :, rows] @ one[0].mT * scale + term)
            values.append(one[1])
        out[:, :, rows] = torch.cat(scores, -1).softmax(-1) @ torch.cat(values, 2)
    return out


@pytest.mark.parametrize("grid", GRIDS)
def test_reference_is_the_definition(grid):
    q, k, v, resolved = case(*GRIDS[grid], (1, 1, 1))
    torch.testing.assert_close(expected(q, k, v, resolved)[0], by_definition(q, k, v, resolved, 0.3))


@pytest.mark.parametrize("lowering", ["boxes", "gather"])
@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("text", [(0, 0), (3, 0), (0, 11)])
@pytest.mark.parametrize("heads", [(2, 2), (4, 2)])
def test_exact_lowerings(lowering, grid, text, heads):
    q, k, v, resolved = case(*GRIDS[grid], (2, 1, 1), text=text, heads=heads, lowering=lowering)
    grad = torch.randn_like(q)
    out, lse, grads = run(q, k, v, resolved, grad=grad)
    want, want_lse, want_grads = expected(q, k, v, resolved, grad=grad)
    torch.testing.assert_close(out, want)
    torch.testing.assert_close(lse, want_lse)
    for got, one in zip(grads, want_grads, strict=True):
        torch.testing.assert_close(got, one)


MASKS = {
    "bool": lambda shape: torch.rand(shape) > 0.4,
    "a tile": lambda shape: torch.arange(shape[-1]).expand(shape) >= 40,
    "float": lambda shape: torch.randn(shape).masked_fill(torch.rand(shape) > 0.6, -math.inf),
    "nothing": lambda shape: torch.zeros(shape, dtype=torch.bool),
}


@pytest.mark.parametrize("lowering", ["boxes", "gather"])
@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("mask_heads", [1, 4])
def test_key_masks(lowering, kind, mask_heads):
    q, k, v, resolved = case(*GRIDS["ragged"], (1, 1, 1), text=(0, 5), heads=(4, 2), lowering=lowering)
    torch.manual_seed(3)
    key_mask = MASKS[kind]((2, mask_heads, 1, k.shape[2]))
    hidden = ~key_mask if key_mask.dtype == torch.bool else key_mask == -math.inf
    if mask_heads == 1:  # what is hidden from all may be no number
        k, v = (x.masked_fill(hidden[:, :, 0, :, None], math.nan if kind == "a tile" else 7.0) for x in (k, v))
    if kind == "a tile" and mask_heads == 1:
        k, v = (x.nan_to_num(nan=1e3) for x in (k, v))
    grad = torch.randn_like(q)
    out, lse, grads = run(q, k, v, resolved, key_mask, grad)
    want, want_lse, want_grads = expected(q, k, v, resolved, key_mask, grad)
    torch.testing.assert_close(out, want, rtol=1e-6, atol=1e-6)  # float masks are float32
    torch.testing.assert_close(lse, want_lse, rtol=1e-6, atol=1e-6)
    for got, one in zip(grads, want_grads, strict=True):
        torch.testing.assert_close(got, one, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("smooth", [{}, {"smooth_k": False}, {"smooth_v": True}, {"smooth_v": True, "hadamard": True}])
@pytest.mark.parametrize("text", [(0, 0), (0, 7)])
def test_fp8(smooth, text):
    q, k, v, resolved = case(
        *GRIDS["ragged"], (1, 1, 1), text=text, dtype=torch.float32, quant="fp8", lowering="gather", **smooth
    )
    k, v = k + 1, v + 2  # what smoothing takes away
    grad = torch.randn_like(q)
    out, lse, grads = run(q, k, v, resolved, grad=grad)
    want, want_lse, want_grads = expected(q, k, v, resolved, grad=grad)
    assert off(out, want) < 1e-5
    torch.testing.assert_close(lse, want_lse)
    for got, one in zip(grads, want_grads, strict=True):
        assert off(got, one) < 1e-5


@pytest.mark.parametrize("quant", ["none", "int8", "fp8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_generated_cpu_kernel(quant, dtype):
    q, k, v, resolved = case(
        *GRIDS["ragged"], (1, 1, 1), text=(0, 5), dtype=dtype, heads=(4, 2), quant=quant, lowering="cpp"
    )
    if (reason := cpp.why_not(dtype, 32, 32, resolved.plan)) is not None:
        pytest.skip(reason)
    grad = torch.randn_like(q)
    out, lse, grads = run(q, k, v, resolved, grad=grad)
    want, want_lse, want_grads = expected(q, k, v, resolved, grad=grad)
    limit = 2e-2 if dtype == torch.bfloat16 else 5e-3
    assert off(out, want) < limit
    torch.testing.assert_close(lse, want_lse, rtol=limit, atol=limit)
    for got, one in zip(grads, want_grads, strict=True):
        assert off(got, one) < 2 * limit


@pytest.mark.parametrize("window", [{"window": "topk", "density": 0.3}, {"heads": {"0": (1, 1, 1)}, "rest": (2, 2, 1)}])
def test_other_masks(window):
    if "heads" in window:
        made = Heads({"0": pattern_of(window_of((1, 1, 1)))}, pattern_of(window_of((2, 2, 1))))
    else:
        made = with_density(pattern_of(window_of("topk")), 0.3)
    q, k, v, resolved = case(*GRIDS["even"], made, lowering="gather")
    grad = torch.randn_like(q)
    out, _, grads = run(q, k, v, resolved, grad=grad)
    want, _, want_grads = expected(q, k, v, resolved, grad=grad)
    torch.testing.assert_close(out, want)
    for got, one in zip(grads, want_grads, strict=True):
        torch.testing.assert_close(got, one)


@pytest.mark.parametrize(("quant", "kind"), [("none", None), ("none", "bool"), ("none", "float"), ("fp8", None)])
def test_calibration_predicts_the_error(quant, kind):
    """Statistics of every candidate against the lowering itself."""
    q, k, v, resolved = case(*GRIDS["ragged"], (1, 1, 1), text=(0, 5), heads=(4, 2), dtype=torch.float32, batch=1)
    torch.manual_seed(4)
    key_mask = None if kind is None else MASKS[kind]((1, 4, 1, k.shape[2]))
    beside = extra_density(resolved)
    known = candidates(resolved.q_layout, resolved.k_layout, (window_of("topk"),), beside)
    assert known.densities[-1] == 1.0
    assert all(density < 1.0 for density in known.densities[:-1])
    levels = ("tile",)
    site = SiteStatistics("site", 4, 32, resolved.q_layout, resolved.k_layout, known, levels, quant, "means")
    seen = observe(q[0], k[0], v[0], None if key_mask is None else key_mask[0], 0, 0.3, site, 10**6)
    plain = SiteStatistics("site", 4, 32, resolved.q_layout, resolved.k_layout, known, levels, quant)
    without = observe(q[0], k[0], v[0], None if key_mask is None else key_mask[0], 0, 0.3, plain, 10**6)
    torch.testing.assert_close(seen.recall, without.recall)
    exact = expected(*(x.double() for x in (q, k, v)), _with(resolved, window_of("dense"), "none"), key_mask)[0]
    for index, window in enumerate(known.windows):
        out = run(q, k, v, _with(resolved, window, quant), key_mask)[0]
        error = (out - exact).square().sum((0, 2, 3)) / exact.square().sum()
        torch.testing.assert_close(seen.error[:, index, 0], error, rtol=2e-3, atol=1e-6)


def _with(resolved, window, quant):
    layout = resolved.k_layout
    plan = Plan(tile=layout.tile, phases=(PhasePlan(window=window),), quant=quant, remainder="means", lowering="gather")
    return resolve(plan, layout.grid, layout.length, layout.length, layout.before, layout.before, heads=4)


def test_from_option_to_report():
    model, inputs = wan(layers=1, attention_head_dim=32).eval(), ZOO["wan"].inputs(dtype=torch.float32)
    options = {"window": (1, 1, 1), "tile": (2, 2, 4), "inner": "eager"}
    errors = {}
    with torch.no_grad():
        exact = output(model, **inputs)
        for remainder in ("none", "means"):
            torch._dynamo.reset()
            fps = Backend(Settings.from_options(options | {"remainder": remainder}))
            errors[remainder] = off(output(torch.compile(model, backend=fps), **inputs), exact)
            (site,) = [site for site in fps.graphs[0].sites if site.rewritten]
            assert site.plan.remainder == remainder
    assert errors["means"] < 0.7 * errors["none"]
    tiles = math.prod(-(-n // t) for n, t in zip(site.grid, (2, 2, 4), strict=True))
    assert site.kept_flops(0) == pytest.approx(site.dense_flops * (site.density[0] + tiles / site.k_length))
    report = Report(fps.graphs, fps.settings)
    assert report.flops_kept_rewritten == pytest.approx(site.kept_flops(0) / site.dense_flops)
    assert "take part as one key each" in str(report)


def test_dense_phases_are_left_alone(monkeypatch):
    q, k, v, resolved = case(*GRIDS["even"], (2, 2, 2), lowering="boxes")
    monkeypatch.setattr(remainder_of, "TileKeys", None)  # no means are taken
    torch.testing.assert_close(run(q, k, v, resolved)[0], torch.softmax(q @ k.mT * 0.3, -1) @ v)


def test_unknown_value():
    with pytest.raises(OptionError, match="remainder='mean' is unknown; choose one of 'none', 'means'"):
        Settings.from_options({"remainder": "mean"})


def test_training_through_the_op():
    """One compiled step: gradients of the model equal eager's through the reference lowering."""
    torch.manual_seed(0)
    grads = {}
    for lowering in ("reference", "boxes"):
        torch._dynamo.reset()
        torch.manual_seed(1)
        model, inputs = wan(layers=1, attention_head_dim=32).double(), ZOO["wan"].inputs(dtype=torch.float64)
        options = {"window": (1, 1, 1), "tile": (2, 2, 4), "inner": "aot_eager", "remainder": "means"}
        compiled = torch.compile(model, backend="fps", options=options | {"lowering": lowering})
        output(compiled, **inputs).square().mean().backward()
        grads[lowering] = [p.grad for p in model.parameters() if p.grad is not None]
    for got, want in zip(grads["boxes"], grads["reference"], strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("trained", [False, True])
def test_gradients_that_another_lowering_computes_are_on_record(trained):
    torch._dynamo.reset()
    model, inputs = wan(layers=1, attention_head_dim=32), ZOO["wan"].inputs(dtype=torch.float32)
    options = {"window": (1, 1, 1), "tile": (2, 2, 4), "inner": "eager", "remainder": "means", "quant": "fp8"}
    fps = Backend(Settings.from_options(options | {"lowering": "cpp"}))
    with torch.set_grad_enabled(trained):
        output(torch.compile(model, backend=fps), **inputs)
    notes = [note.message for note in fps.graphs[0].notes if note.code == "gradients"]
    assert len(notes) == trained
    assert all("come from lowering 'gather', which is slower than 'cpp'" in note for note in notes)
