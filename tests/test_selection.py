"""Tiles chosen by content: the choice itself, the op, its gradients, and whole compiled models."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
from hypothesis import given, settings
from hypothesis import strategies as st
from models.zoo import ZOO, output, wan, wan_inputs
from torch._dynamo.backends.common import aot_autograd
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

import fpscompile
from fpscompile import Backend, Settings, selection
from fpscompile.errors import GridError, OptionError, UnsupportedError
from fpscompile.masks import expand_mask
from fpscompile.plan import PhasePlan, Plan, resolve
from fpscompile.windows import Dense, FirstFrame, Heads, Pattern, Sliding, TopK

Window = Pattern | tuple[int, int, int]


def brute(
    q: torch.Tensor,
    k: torch.Tensor,
    grid: tuple[int, int, int],
    tile: tuple[int, int, int],
    starts: tuple[int, int],
    count: int,
    always: torch.Tensor | None = None,
    hidden: torch.Tensor | None = None,
    sign: int = 1,
) -> torch.Tensor:
    """bool [B, H, Lq, Lk] token by token: the ``count`` best key tiles that are not in ``always`` [n, n], and those.

    Args:
        hidden: bool [Lk], keys that do not count.
    """
    counts = [-(-size // step) for size, step in zip(grid, tile, strict=True)]
    members: dict[int, list[int]] = {}
    for index, token in enumerate(itertools.product(*map(range, grid))):
        t, h, w = (x // step for x, step in zip(token, tile, strict=True))
        members.setdefault((t * counts[1] + h) * counts[2] + w, []).append(index)
    n, group = len(members), q.shape[1] // k.shape[1]
    mask = torch.ones(*q.shape[:3], k.shape[2], dtype=torch.bool)
    rows = [torch.tensor([starts[0] + x for x in members[i]]) for i in range(n)]
    columns = [torch.tensor([starts[1] + x for x in members[j]]) for j in range(n)]
    counted = [c if hidden is None else c[~hidden[c]] for c in columns]
    for b, head in itertools.product(range(q.shape[0]), range(q.shape[1])):
        queries = torch.stack([q[b, head, r].double().mean(0) for r in rows])
        keys = torch.stack([k[b, head // group, c].double().mean(0) for c in counted])
        scores = (sign * queries @ keys.mT).nan_to_num(-1e300)
        for i in range(n):
            fixed = set() if always is None else set(always[i].nonzero().flatten().tolist())
            ranked = sorted((-score, j) for j, score in enumerate(scores[i].tolist()) if j not in fixed)
            seen = {j for _, j in ranked[:count]} | fixed
            for j in set(range(n)) - seen:
                mask[b, head, rows[i][:, None], columns[j]] = False
    return mask


def resolved_plan(
    grid: tuple[int, int, int], *windows: Window, tile=(2, 2, 2), before=0, after=0, heads=None, **fields: Any
):
    length = grid[0] * grid[1] * grid[2] + before + after
    return resolve(Plan(tile, tuple(map(PhasePlan, windows)), **fields), grid, length, length, before, before, heads)


def chosen(selected: torch.Tensor, resolved: Any) -> torch.Tensor:
    """bool [B, H, Lq, Lk] of a selection."""
    return expand_mask(selection.block_mask(selected, resolved), resolved.q_layout, resolved.k_layout)


@settings(max_examples=12, deadline=None)
@given(
    st.tuples(st.integers(1, 4), st.integers(1, 5), st.integers(1, 5)),
    st.tuples(st.integers(1, 2), st.integers(1, 3), st.integers(1, 3)),
    st.integers(1, 5),
    st.integers(0, 4),
    st.integers(0, 2**20),
)
def test_the_best_tiles_are_chosen(grid, tile, count, before, seed) -> None:
    generator = torch.Generator().manual_seed(seed)
    resolved = resolved_plan(grid, TopK(tiles=count), tile=tile, before=before, after=3)
    length = resolved.q_layout.length
    # [B, L, H, D] memory seen as [B, H, L, D], as models have it
    q = torch.randn(2, length, 4, 8, generator=generator).transpose(1, 2)
    k = torch.randn(2, length, 2, 8, generator=generator).transpose(1, 2)
    hidden = torch.rand(length, generator=generator) < 0.3
    expected = brute(q, k, grid, tile, (before, before), count)
    assert torch.equal(chosen(selection.select(q, k, phase=[0], resolved=resolved), resolved), expected)
    k[:, :, hidden] = torch.nan
    for keep in (~hidden, torch.where(hidden, -torch.inf, 0.25)):
        seen = selection.select(q, k, phase=[0], resolved=resolved, key_mask=keep.view(1, 1, 1, -1))
        assert torch.equal(chosen(seen, resolved), brute(q, k, grid, tile, (before, before), count, hidden=hidden))
    k.nan_to_num_()
    expected_sign = brute(q, k, grid, tile, (before, before), count, sign=-1)
    seen = selection.select(q, k, phase=[0], resolved=resolved, scale=-2.0)
    assert torch.equal(chosen(seen, resolved), expected_sign)


def test_tile_means_of_any_dtype() -> None:
    resolved = resolved_plan((5, 7, 6), TopK(tiles=1), tile=(2, 3, 4), before=2)
    layout = resolved.q_layout
    x = torch.randn(2, layout.length, 3, 16, dtype=torch.float64).transpose(1, 2)
    tiles = torch.repeat_interleave(torch.arange(layout.n_tiles), layout.sizes())
    expected = torch.zeros(2, 3, layout.n_tiles, 16, dtype=torch.float64).index_add_(2, tiles, x[:, :, layout.order()])
    expected = (expected / layout.sizes()[:, None])[:, :, layout.before_tiles :]
    assert torch.allclose(selection.tile_means(x, layout), expected, rtol=1e-12)
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 2e-2)):
        means = selection.tile_means(x.to(dtype), layout)
        assert means.dtype == torch.float32
        assert torch.allclose(means.double(), expected, atol=tolerance)


def test_equal_scores_go_to_the_lower_index() -> None:
    resolved = resolved_plan((4, 2, 4), TopK(tiles=3), tile=(1, 1, 1))
    q = torch.ones(1, 1, 32, 4)
    seen = selection.select(q, torch.ones(1, 1, 32, 4), phase=[0], resolved=resolved)
    assert torch.equal(seen, (torch.arange(32) < 3).expand(1, 1, 32, 32))
    k = torch.ones(1, 1, 32, 4)
    k[0, 0, [5, 9, 20, 30]] = 2.0
    seen = selection.select(q, k, phase=[0], resolved=resolved)
    assert seen[0, 0, 7].nonzero().flatten().tolist() == [5, 9, 20]
    k[0, 0, 2] = torch.nan  # not a number: last of all
    seen = selection.select(q, k, phase=[0], resolved=resolved)
    assert seen[0, 0, 7].nonzero().flatten().tolist() == [5, 9, 20]


def test_static_plus_topk_and_phases_and_heads() -> None:
    grid, tile = (4, 4, 4), (1, 2, 2)
    q, k = torch.randn(4, 2, 64, 8), torch.randn(4, 2, 64, 8)
    windows = (Sliding((1, 2, 2)) | TopK(tiles=3), (1, 1, 2), Heads({"1": TopK(tiles=5)}, FirstFrame()))  # type: ignore[arg-type]
    resolved = resolved_plan(grid, *windows, tile=tile, heads=2)
    mask = chosen(selection.select(q, k, phase=[0, 1, 2, 0], resolved=resolved), resolved)
    static = [resolved.tile_sets(phase).always for phase in range(3)]
    for b in (0, 3):
        one = slice(b, b + 1)
        assert torch.equal(mask[one], brute(q[one], k[one], grid, tile, (0, 0), 3, always=static[0][0]))
    only = resolved_plan(grid, (1, 1, 2), FirstFrame(), tile=tile)
    expected = expand_mask(only.block_mask, only.q_layout, only.k_layout)
    assert torch.equal(mask[1], expected[0].expand(2, -1, -1))
    assert torch.equal(mask[2, 0], expected[1, 0])
    assert torch.equal(mask[2:3, 1:], brute(q[2:3, 1:], k[2:3, 1:], grid, tile, (0, 0), 5))
    # one phase for two samples each, read off a tensor and clamped into range
    pairs = selection.select(q, k, phase=torch.tensor([0, 7], dtype=torch.int32), resolved=resolved)
    assert torch.equal(pairs[1], selection.select(q, k, phase=[0] * 4, resolved=resolved)[1])
    assert torch.equal(pairs[2], selection.select(q, k, phase=[2] * 4, resolved=resolved)[2])


@pytest.mark.parametrize(("tiles", "capacity"), [(1, 1), (7, 7), (8, 8), (9, 20), (19, 24)])
def test_pack_round_trip(tiles: int, capacity: int) -> None:
    selected = torch.rand(2, 3, tiles, tiles) < 0.4
    packed = selection.pack(selected, capacity)
    assert packed.shape == (2, 3, selection.packed_bytes(capacity))
    assert torch.equal(selection.unpack(packed, tiles), selected)
    with pytest.raises(GridError, match=f"{tiles} tiles, but the graph was compiled for at most {tiles - 1}"):
        selection.pack(selected, tiles - 1)


GRID, TEXT = (3, 4, 5), 3
VIDEO = GRID[0] * GRID[1] * GRID[2]


def op_args(lowering: str, *, windows=None, published=False, **fields: Any) -> tuple[list[Any], list[Any]]:
    """((q, k, v), the arguments after them), two samples in two phases, one of them static."""
    windows = windows or (TopK(tiles=3) | FirstFrame(), (1, 2, 1))
    plan = Plan((2, 2, 2), tuple(map(PhasePlan, windows)), lowering=lowering, **fields)
    q, k, v = (torch.randn(2, h, VIDEO + TEXT, 32, requires_grad=True) for h in (4, 2, 2))
    span = [TEXT, VIDEO]
    grid = torch.tensor(GRID) if published else None
    phase = torch.tensor([0, 1], dtype=torch.int32)
    return [q, k, v], [None, phase, [] if published else list(GRID), grid, span, span, None, plan.to_json()]


def dense(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def mask_of(packed: torch.Tensor, plan: str) -> torch.Tensor:
    resolved = resolve(Plan.from_json(plan), GRID, VIDEO + TEXT, VIDEO + TEXT, TEXT, TEXT)
    return chosen(selection.unpack(packed, resolved.q_layout.video_tiles), resolved)


@pytest.mark.parametrize("lowering", ["gather", "reference", "cpp"])
def test_lowerings_attend_to_what_was_chosen(lowering: str) -> None:
    if lowering == "cpp":
        from fpscompile.lowerings import cpp

        reason = cpp.why_not(torch.float32, 32, 32, Plan((2, 2, 2), (PhasePlan((1, 1, 1)),)))
        if reason is not None:
            pytest.skip(reason)
    (q, k, v), rest = op_args(lowering)
    packed = torch.ops.fps.select_tiles(q, k, *rest, 12)
    assert not packed.requires_grad
    out, _ = torch.ops.fps.attention(q, k, v, *rest, packed)
    wanted = dense(q, k, v, mask_of(packed, rest[-1]))
    assert torch.allclose(out, wanted, atol=1e-5)
    assert torch.equal(out, torch.ops.fps.attention(q, k, v, *rest)[0])  # chosen again: the same
    grad = torch.randn_like(out)
    actual, exact = (torch.autograd.grad(x, (q, k, v), grad) for x in (out, wanted))
    for a, e in zip(actual, exact, strict=True):
        assert torch.allclose(a, e, atol=2e-5)


def test_backward_sees_the_tiles_that_forward_saw() -> None:
    """A selection that content would not make: forward and gradients are of exactly that one."""
    (q, k, v), rest = op_args("gather")
    own = torch.ops.fps.select_tiles(q, k, *rest, 12)
    other = torch.ops.fps.select_tiles(-q, k, *rest, 12)
    assert not torch.equal(own, other)
    out, _ = torch.ops.fps.attention(q, k, v, *rest, other)
    wanted = dense(q, k, v, mask_of(other, rest[-1]))
    grad = torch.randn_like(out)
    for a, e in zip(*(torch.autograd.grad(x, (q, k, v), grad) for x in (out, wanted)), strict=True):
        assert torch.allclose(a, e, atol=2e-5)


def test_fp8_with_chosen_tiles_equals_the_reference() -> None:
    windows = (TopK(tiles=4), TopK(tiles=2))
    (q, k, v), rest = op_args("gather", windows=windows, quant="fp8")
    (_, _, _), reference = op_args("reference", windows=windows, quant="fp8")
    packed = torch.ops.fps.select_tiles(q, k, *rest, 12)
    out, lse = torch.ops.fps.attention(q, k, v, *rest, packed)
    wanted, wanted_lse = torch.ops.fps.attention(q, k, v, *reference, packed)
    assert torch.allclose(out, wanted, atol=1e-5)
    assert torch.allclose(lse, wanted_lse, atol=1e-5)


@pytest.mark.parametrize("window", [(1, 2, 2), TopK(tiles=3)], ids=str)
@pytest.mark.parametrize(("quant", "lowering"), [("fp8", "gather"), ("fp8", "reference"), ("int8", "reference")])
def test_what_hidden_keys_hold_changes_nothing(quant: str, lowering: str, window: Window) -> None:
    """NaN neither moves the choice nor comes through, forward and backward: with quantizers, hidden keys are absent."""
    generator = torch.Generator().manual_seed(0)
    resolved = resolved_plan((2, 4, 6), window, quant=quant, lowering=lowering)
    q, k, v = (torch.randn(1, 2, 48, 16, generator=generator) for _ in range(3))
    keep = torch.ones(1, 1, 1, 48, dtype=torch.bool)
    keep[..., 20] = False
    results = []
    for held in (0.0, float("nan"), float("inf")):
        k[:, :, 20] = v[:, :, 20] = held
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        phase = torch.zeros(1, dtype=torch.int32)
        call = (*leaves, keep, phase, (2, 4, 6), None, (0, 48), (0, 48), None, resolved.plan.to_json())
        out = torch.ops.fps.attention(*call)[0]
        results.append((out, *torch.autograd.grad(out.square().sum(), leaves)))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_opcheck() -> None:
    (q, k, v), rest = op_args("gather", published=True)
    torch.library.opcheck(torch.ops.fps.select_tiles.default, (q, k, *rest, 12))
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    packed = torch.ops.fps.select_tiles(q, k, *rest, 12)
    torch.library.opcheck(torch.ops.fps.attention.default, (q, k, v, *rest, packed), test_utils=tests)


def test_selection_of_another_call() -> None:
    (q, k, v), rest = op_args("gather")
    with pytest.raises(UnsupportedError, match="2 phases for a batch of 1"):
        torch.ops.fps.select_tiles(q[:1], k[:1], *rest, 12)
    packed = torch.ops.fps.select_tiles(q, k, *rest, 12)
    with pytest.raises(UnsupportedError, match="does not belong to queries"):
        torch.ops.fps.attention(q, k, v, *rest, packed[:, :1])


# --- compiled models -------------------------------------------------------------------------------------------------

TILE = (2, 2, 4)
OPTIONS = {"window": "topk", "density": 0.3, "tile": TILE, "inner": "eager", "quant": "none"}


class ChoosingAttention(TorchFunctionMode):
    """Eager: every SDPA call over the video and itself sees the tiles that :func:`brute` chooses."""

    def __init__(self, grid: tuple[int, int, int], start: int, count: int) -> None:
        super().__init__()
        self.grid, self.start, self.count, self.calls = grid, start, count, 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        video = self.grid[0] * self.grid[1] * self.grid[2]
        if func is F.scaled_dot_product_attention:
            q, k = (kwargs.get(name, args[i] if len(args) > i else None) for i, name in enumerate(("query", "key")))
            if min(q.shape[2], k.shape[2]) >= video:
                self.calls += 1
                with torch.no_grad():
                    mask = brute(q, k, self.grid, TILE, (self.start, self.start), self.count)
                kwargs["attn_mask"] = mask
        return func(*args, **kwargs)


def counted(grid: tuple[int, int, int], text: int = 0, share: float = 0.3) -> int:
    """Tiles that density 0.3 lets each tile choose."""
    n = 1
    for size, step in zip(grid, TILE, strict=True):
        n *= -(-size // step)
    video = grid[0] * grid[1] * grid[2]
    pairs = (video + text) ** 2
    return int((share * pairs - (pairs - video**2)) / (video**2 / n) + 1e-9)


def relative(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual - expected).detach().norm() / expected.detach().norm())


def test_whole_model_and_gradients_without_recomputing_the_choice() -> None:
    """The backward graph gets the choice as it was made, though min-cut computes much else anew."""
    graphs: list[torch.fx.GraphModule] = []

    def keep(gm: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(gm)
        return make_boxed_func(gm.forward)

    inner = aot_autograd(fw_compiler=keep, bw_compiler=keep, partition_fn=min_cut_rematerialization_partition)
    model, grid = wan(layers=1), (3, 6, 10)
    fps = Backend(Settings.from_options(OPTIONS | {"inner": inner}))
    with ChoosingAttention(grid, 0, counted(grid)) as mode:
        expected = output(model, **wan_inputs())
        wanted = torch.autograd.grad(expected.square().sum(), list(model.parameters()), allow_unused=True)
    assert mode.calls == 1
    actual = output(torch.compile(model, backend=fps, fullgraph=True), **wan_inputs())
    assert relative(actual, expected) <= 1e-5
    grads = torch.autograd.grad(actual.square().sum(), list(model.parameters()), allow_unused=True)
    flat = [torch.cat([g.flatten() for g in found if g is not None]) for found in (grads, wanted)]
    assert relative(*flat) <= 1e-4
    targets = [[str(node.target) for node in gm.graph.nodes] for gm in graphs]
    forward, backward = (" ".join(names) for names in targets)
    assert "fps.select_tiles" in forward
    assert "fps.select_tiles" not in backward
    assert "fps.attention_backward" in backward


@pytest.mark.parametrize("how", [pytest.param("whole", marks=pytest.mark.slow), "blocks"])
def test_grids_and_steps_without_recompiling(how: str) -> None:
    """Two resolutions, read in the graph or published; steps change the phase; nothing recompiles for a step."""
    model, eager = wan(layers=2), wan(layers=2)
    schedule = [
        {"start": 0.0, "end": 0.5, "window": "dense"},
        {"start": 0.5, "end": 1.0, "window": "topk", "density": 0.3},
    ]
    options = {key: value for key, value in OPTIONS.items() if key not in ("window", "density")} | {
        "schedule": schedule
    }
    fps = Backend(Settings.from_options(options))
    if how == "blocks":
        model.compile_repeated_blocks(backend=fps, fullgraph=True, dynamic=True)
    compiled = model if how == "blocks" else torch.compile(model, backend=fps, fullgraph=True, dynamic=True)
    with torch.no_grad(), fpscompile.attach(compiled) as attachment:
        for number, grid in enumerate([(3, 6, 10), (4, 5, 7)]):
            inputs = wan_inputs(grid)
            attachment.step(9, 10)
            with ChoosingAttention(grid, 0, counted(grid)) as mode:
                expected = output(eager, **inputs)
            assert mode.calls == 2
            assert relative(output(compiled, **inputs), expected) <= 1e-5
            attachment.step(0, 10)
            with torch._dynamo.config.patch(error_on_recompile=number > 0):
                assert relative(output(compiled, **inputs), output(eager, **inputs)) <= 1e-5
    assert len(fps.graphs) <= 2
    site = next(site for graph in fps.graphs for site in graph.sites if site.kind == "3d")
    assert site.windows == ((2, 3, 3), TopK(0.3))
    assert site.density[1] <= 0.3


def test_text_and_report() -> None:
    entry, grid = ZOO["hunyuan"], (3, 6, 10)
    report = fpscompile.explain(entry.build(), **entry.inputs(grid), options=OPTIONS)
    site = next(site for site in report.sites if site.kind == "3d")
    assert site.rewritten
    assert 0.2 < site.density[0] <= 0.3
    assert "topk 0.3" in str(report)
    assert report.to_dict()["sites"][report.sites.index(site)]["windows"] == [{"family": "topk", "density": 0.3}]
    assert "fps.select_tiles" in report.graph_after


def test_a_lowering_that_cannot_is_named() -> None:
    for lowering, words in (("boxes", "products of the axes"), ("triton", "triton")):
        with pytest.raises(Exception, match=words) as caught:
            fpscompile.explain(wan(layers=1), **wan_inputs(), options=OPTIONS | {"lowering": lowering})
        assert isinstance(getattr(caught.value, "inner_exception", caught.value), (UnsupportedError, OptionError))


@pytest.mark.slow
def test_inductor() -> None:
    model, grid = wan(layers=2, attention_head_dim=32), (3, 6, 10)
    fps = Backend(Settings.from_options(OPTIONS | {"inner": "inductor", "window": TopK() | Dense() & FirstFrame()}))
    actual = output(torch.compile(model, backend=fps, fullgraph=True), **wan_inputs(grid))
    actual.square().sum().backward()
    fps_eager = Backend(Settings.from_options(OPTIONS | {"window": TopK() | Dense() & FirstFrame()}))
    torch._dynamo.reset()
    expected = output(torch.compile(model, backend=fps_eager, fullgraph=True), **wan_inputs(grid))
    assert relative(actual, expected) <= 1e-4
