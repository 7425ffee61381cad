"""``fps::attention``: schema, fake, autograd, autocast, compile, and every way to call it wrongly."""

from __future__ import annotations

import contextlib
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.testing import CompileCounterWithBackend

from fpscompile import lowerings, ops, reference
from fpscompile.errors import GridError, OptionError, UnsupportedError
from fpscompile.plan import PhasePlan, Plan, resolve
from fpscompile.windows import TopK

GRID = (3, 4, 5)
TEXT = 2
PLAN = Plan((2, 2, 2), (PhasePlan((1, 1, 2)), PhasePlan((9, 9, 9)), PhasePlan((2, 2, 1))))

attention = torch.ops.fps.attention


def make_args(
    *,
    batch: int = 2,
    heads: int = 2,
    key_heads: int | None = None,
    d: int = 8,
    grid: tuple[int, int, int] = GRID,
    dtype: torch.dtype = torch.float32,
    phase: tuple[int, ...] = (0, 2),
    published: bool = False,
    mask: torch.Tensor | None = None,
    lowering: str = "boxes",
    grad: bool = True,
) -> list[Any]:
    """Positional arguments of the op: text first, then the video."""
    video = math.prod(grid)
    length = TEXT + video
    q, k, v = (
        torch.randn(batch, length, n, d, dtype=dtype).transpose(1, 2).requires_grad_(grad)
        for n in (heads, key_heads or heads, key_heads or heads)
    )
    plan = Plan(PLAN.tile, PLAN.phases, lowering=lowering).to_json()
    return [
        q,
        k,
        v,
        mask,
        torch.tensor(phase, dtype=torch.int32),
        [] if published else list(grid),
        torch.tensor(grid) if published else None,
        [TEXT, video],
        [TEXT, video],
        None,
        plan,
    ]


def expected(args: list[Any]) -> tuple[torch.Tensor, torch.Tensor]:
    q, k, v, mask, phase, grid, published, q_span, k_span, scale, plan = args
    sizes = tuple(grid) if published is None else tuple(published.tolist())
    resolved = resolve(Plan.from_json(plan), sizes, q.shape[2], k.shape[2], q_span[0], k_span[0])
    return reference.attention(q, k, v, resolved=resolved, phase=phase, key_mask=mask, scale=scale)


def close(actual: torch.Tensor, wanted: torch.Tensor, tolerance: float = 1e-5) -> None:
    actual, wanted = actual.detach().double(), wanted.detach().double()
    assert (actual - wanted).norm() <= tolerance * wanted.norm()


@pytest.mark.parametrize("lowering", ["boxes", "gather", "reference"])
@pytest.mark.parametrize("published", [False, True])
@pytest.mark.parametrize("mask", [None, "bool", "float"])
def test_opcheck(lowering, published, mask):
    key_mask = None if mask is None else torch.rand(2, 1, 1, TEXT + math.prod(GRID)) < 0.7
    if mask == "float":
        key_mask = torch.where(key_mask, 0.5, -torch.inf)
    args = make_args(lowering=lowering, published=published, mask=key_mask)
    torch.library.opcheck(attention.default, tuple(args))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_opcheck_dtypes_and_grouped_queries(dtype):
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(attention.default, tuple(make_args(dtype=dtype, heads=4, key_heads=2)), test_utils=tests)


def test_opcheck_backward():
    args = make_args(grad=False)
    out, lse = attention(*args)
    q, k, v, mask, phase, *rest = args
    torch.library.opcheck(
        torch.ops.fps.attention_backward.default,
        (torch.randn_like(out), q, k, v, mask, out, lse, phase, *rest),
        test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
    )


@pytest.mark.parametrize("lowering", ["boxes", "gather", "reference"])
def test_values_and_gradients(lowering):
    args = make_args(lowering=lowering, dtype=torch.float64)
    out, lse = attention(*args)
    wanted, wanted_lse = expected(args)
    close(out, wanted, 1e-12)
    close(lse, wanted_lse, 1e-12)
    grad = torch.randn_like(out)
    for actual, exact in zip(
        torch.autograd.grad(out, args[:3], grad), torch.autograd.grad(wanted, args[:3], grad), strict=True
    ):
        close(actual, exact, 1e-12)


def test_gradcheck():
    args = make_args(batch=1, heads=1, d=2, grid=(2, 2, 3), dtype=torch.float64, phase=(0,))
    assert torch.autograd.gradcheck(lambda q, k, v: attention(q, k, v, *args[3:])[0], tuple(args[:3]))


def test_lse_carries_no_gradient_and_other_gradients_are_none():
    mask = torch.zeros(1, 1, 1, TEXT + math.prod(GRID), requires_grad=True)
    args = make_args(mask=mask)
    out, lse = attention(*args)
    assert not lse.requires_grad
    out.sum().backward()
    assert mask.grad is None
    assert all(x.grad is not None for x in args[:3])


def test_second_derivative_is_refused():
    args = make_args()
    out, _ = attention(*args)
    (first,) = torch.autograd.grad(out.square().sum(), args[0], create_graph=True)
    with pytest.raises(UnsupportedError, match="second derivative"):
        first.sum().backward()


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, contextlib.nullcontext])
def test_grad_modes(mode):
    args = make_args(grad=False)
    with mode():
        out, lse = attention(*args)
    wanted, wanted_lse = expected(args)
    close(out, wanted)
    close(lse, wanted_lse)


@pytest.mark.parametrize("given", [torch.float32, torch.float16, torch.float64])
@pytest.mark.parametrize("autocast", [torch.bfloat16, torch.float16])
def test_autocast_is_that_of_sdpa(given, autocast):
    args = make_args(dtype=given)
    with torch.autocast("cpu", autocast):
        out, lse = attention(*args)
        peer = F.scaled_dot_product_attention(*args[:3])
    assert out.dtype == peer.dtype
    assert lse.dtype == (torch.float64 if given == torch.float64 else torch.float32)
    close(out, expected(args)[0], 3e-2)
    out.float().sum().backward()
    assert all(x.grad.dtype == given for x in args[:3])


@pytest.mark.parametrize("lowering", ["boxes", "gather", "reference"])
def test_a_backward_inside_autocast_is_that_outside(lowering):
    """Autocast is for the operations of the model: gradients are of the dtypes that were saved."""
    given = make_args(lowering=lowering)
    grads = {}
    for inside in (True, False):
        with torch.autocast("cpu", torch.bfloat16):
            out, _ = attention(*given)
        with torch.autocast("cpu", torch.bfloat16) if inside else contextlib.nullcontext():
            grads[inside] = torch.autograd.grad(out.float().square().sum(), given[:3])
    for one, other in zip(grads[True], grads[False], strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(
    ("backend", "dynamic"),
    [
        ("aot_eager", False),
        ("aot_eager", True),
        pytest.param("inductor", False, marks=pytest.mark.slow),
        ("inductor", True),
    ],
)
def test_compile(backend, dynamic):
    """One graph; with dynamic shapes, one graph for several grids; forward and backward."""
    if backend == "inductor":
        inductor_compiler_or_skip()
    plan = PLAN.to_json()

    def function(x: torch.Tensor, phase: torch.Tensor, t: int, h: int, w: int) -> torch.Tensor:
        q, k, v = (y.transpose(1, 2) for y in (x * 2).chunk(3, -1))
        video = t * h * w
        out, lse = attention(q, k, v, None, phase, [t, h, w], None, [TEXT, video], [TEXT, video], None, plan)
        return out.transpose(1, 2).flatten(2) + 1 + lse.amax()

    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(function, backend=counter, fullgraph=True, dynamic=dynamic)
    grids = [(3, 4, 5), (4, 5, 6), (5, 6, 4)] if dynamic else [GRID]
    for grid in grids:
        x = torch.randn(2, TEXT + math.prod(grid), 2, 24)
        for phase in (torch.tensor([0], dtype=torch.int32), torch.tensor([1], dtype=torch.int32)):
            ours, eager = x.clone().requires_grad_(), x.clone().requires_grad_()
            out, wanted = compiled(ours, phase, *grid), function(eager, phase, *grid)
            close(out, wanted)
            out.square().sum().backward()
            wanted.square().sum().backward()
            close(ours.grad, eager.grad)
    assert counter.frame_count == 1


def inductor_compiler_or_skip() -> None:
    from torch._inductor.cpp_builder import get_cpp_compiler

    try:
        get_cpp_compiler()
    except Exception:
        pytest.skip("no C++ compiler")


def test_inductor_keeps_the_layouts_the_fake_promises():
    args = make_args(grad=False)
    with torch._subclasses.FakeTensorMode() as mode:
        fake = attention(*(mode.from_tensor(x) if isinstance(x, torch.Tensor) else x for x in args))
    for real, promised in zip(attention(*args), fake, strict=True):
        assert real.shape == promised.shape
        assert real.stride() == promised.stride()
        assert real.dtype == promised.dtype


@pytest.mark.parametrize("strict", [False, True])
def test_export(strict):
    args = make_args(grad=False)

    class Model(torch.nn.Module):
        def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            return attention(q, k, v, *args[3:])[0]

    program = torch.export.export(Model(), tuple(args[:3]), strict=strict)
    close(program.module()(*args[:3]), attention(*args)[0])


def replaced(position: int, value: Any, **fields: Any) -> list[Any]:
    args = make_args(grad=False, **fields)
    args[position] = value
    return args


VIDEO = math.prod(GRID)
LENGTH = TEXT + VIDEO


@pytest.mark.parametrize(
    ("position", "value", "error", "message"),
    [
        (5, [3, 6, 9], GridError, r"grid \(3, 6, 9\) has 162 tokens, but the site's video has 60"),
        (5, [], GridError, r"grid \(\) must be three sizes"),
        (6, torch.zeros(3, dtype=torch.int64), GridError, r"no grid is published.*fpscompile\.attach"),
        (6, torch.tensor([3, 4]), GridError, r"published_grid has shape \(2,\)"),
        (7, [TEXT + 1, VIDEO], GridError, r"query_span \(3, 60\) is not inside a sequence of 62"),
        (8, [0, VIDEO + 1], GridError, r"60 tokens, but the site's video has 61 in the key sequence"),
        (4, torch.zeros(3, dtype=torch.int32), UnsupportedError, "3 phases for a batch of 2"),
        (4, torch.zeros(0, dtype=torch.int32), UnsupportedError, "0 phases for a batch of 2"),
        (4, torch.tensor([0, 3], dtype=torch.int32), OptionError, "phase 3 is out of range.*0 to 2"),
        (4, torch.tensor([-1], dtype=torch.int32), OptionError, "phase -1 is out of range"),
        (0, torch.zeros(2, LENGTH, 8), UnsupportedError, "query has shape.*four dimensions"),
        (0, torch.zeros(2, 2, LENGTH, 8, dtype=torch.int32), UnsupportedError, r"query is torch.int32; cast"),
        (0, torch.zeros(2, 2, LENGTH, 8).to(torch.float8_e4m3fn), UnsupportedError, "float8_e4m3fn; cast"),
        (1, torch.zeros(2, 2, LENGTH, 8, dtype=torch.float64), UnsupportedError, "key is torch.float64, but query"),
        (0, torch.zeros(2, 3, LENGTH, 8), UnsupportedError, "3 query heads are no multiple of 2 key heads"),
        (1, torch.zeros(2, 2, LENGTH, 4), UnsupportedError, "do not fit together"),
        (2, torch.zeros(2, 2, LENGTH - 1, 8), UnsupportedError, "do not fit together"),
        (3, torch.zeros(LENGTH), UnsupportedError, r"key_mask has shape \(62,\)"),
        (3, torch.zeros(2, 1, LENGTH, LENGTH), UnsupportedError, "one value per key"),
        (3, torch.zeros(1, 1, 1, LENGTH, dtype=torch.int64), UnsupportedError, "key_mask is torch.int64"),
        (10, Plan((2, 2, 2), PLAN.phases, lowering="magic").to_json(), UnsupportedError, "lowering 'magic'.*'boxes'"),
    ],
)
def test_bad_calls(position, value, error, message):
    args = replaced(position, value)
    if position == 6:
        args[5] = []
    with pytest.raises(error, match=message):
        attention(*args)


@pytest.mark.parametrize("lowering", ["boxes", "gather", "reference"])
@pytest.mark.parametrize(("quant", "remainder"), [("none", "none"), ("none", "means"), ("fp8", "means")])
@pytest.mark.parametrize("window", [(1, 1, 1), TopK(density=0.3)], ids=str)
def test_a_batch_of_nothing(lowering, quant, remainder, window):
    args = make_args(lowering=lowering, phase=(0,), mask=torch.ones(1, 1, 1, LENGTH, dtype=torch.bool))
    plan = Plan(PLAN.tile, (PhasePlan(window),), lowering=lowering, quant=quant, remainder=remainder)
    args[:3], args[10] = (x.detach()[:0].requires_grad_() for x in args[:3]), plan.to_json()
    out, lse = attention(*args)
    assert (out.shape, lse.shape) == ((0, 2, LENGTH, 8), (0, 2, LENGTH))
    grads = torch.autograd.grad(out.sum(), args[:3])
    assert [x.shape for x in grads] == [x.shape for x in args[:3]]
    args[4] = torch.zeros(0, dtype=torch.int32)
    with pytest.raises(UnsupportedError, match="0 phases for a batch of 0"):
        attention(*args)


def test_tiles_chosen_by_content_need_a_lowering_for_them():
    args = make_args(lowering="boxes", phase=(0,))
    args[10] = Plan(PLAN.tile, (PhasePlan(TopK(density=0.3)),), lowering="boxes").to_json()
    with pytest.raises(UnsupportedError, match=r"lowering 'boxes' serves products.*'topk 0.3' is none: use lowering="):
        attention(*args)


def test_every_lowering_has_the_interface():
    for name in lowerings.REGISTRY:
        module = lowerings.get(name)
        assert callable(module.forward)
        assert callable(module.backward)


def test_dtypes_are_documented():
    for dtype in ops.DTYPES:
        assert str(dtype).removeprefix("torch.") in (ops.__doc__ or "")
