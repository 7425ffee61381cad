"""Which nodes of a captured graph write, and into what."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import fx
from torch.nn.functional import dropout, leaky_relu
from torch.utils.checkpoint import checkpoint

from fpscompile.passes.aliasing import held_by, mutates, targets_of
from fpscompile.passes.base import target_name

Tensor = torch.Tensor


def captured(function: Callable[..., object], *args: Tensor) -> fx.Graph:
    graphs: list[fx.GraphModule] = []

    def backend(gm: fx.GraphModule, inputs: list[Tensor]) -> Callable[..., object]:
        graphs.append(gm)
        return gm.forward

    torch._dynamo.reset()
    torch.compile(function, backend=backend, fullgraph=True)(*args)
    (gm,) = graphs
    return gm.graph


def own_buffer(x: Tensor) -> Tensor:
    out = torch.empty_like(x)
    out[..., 0::2] = x[..., 1::2]
    out[..., 1::2] = x[..., 0::2]
    return out


WRITES = {
    "add_": lambda x: x.add_(1.0),
    "setitem": lambda x: x.__setitem__(0, 1.0),
    "out": lambda x: torch.sin(torch.ones_like(x), out=x),
    "inplace": lambda x: leaky_relu(x, inplace=True),
    "inplace by position": lambda x: leaky_relu(x, 0.1, True),
    "dropout by position": lambda x: dropout(x, 0.5, True, True),
    "a checkpoint of a write": lambda x: checkpoint(lambda y: y.add_(1.0).sum(), x, use_reentrant=False),
    "a checkpoint of a write into a view": lambda x: checkpoint(
        lambda y: torch.einsum("ab->ba", y).add_(1.0).sum(), x, use_reentrant=False
    ),
}
READS = {
    "add": lambda x: x.add(1.0),
    "not inplace": lambda x: leaky_relu(x, inplace=False),
    "not inplace by position": lambda x: leaky_relu(x, 0.1, False),
    "a checkpoint": lambda x: checkpoint(lambda y: y.sin().sum(), x, use_reentrant=False),
    "a checkpoint that writes a tensor of its own": lambda x: checkpoint(own_buffer, x, use_reentrant=False),
}


@pytest.mark.parametrize("name", [*WRITES, *READS])
@torch.no_grad()
def test_writes(name: str) -> None:
    graph = captured(lambda x: ({**WRITES, **READS}[name](x), x + 1.0)[1], torch.rand(4, 6))
    writers = [node for node in graph.nodes if mutates(node)]
    assert bool(writers) == (name in WRITES)
    (given,) = [node for node in graph.nodes if node.op == "placeholder"]
    assert all(given in targets_of(node) for node in writers)


VIEWS = {
    "transpose": lambda x: x.transpose(0, 1),
    "einsum": lambda x: torch.einsum("ab->ba", x),
    "sum_to_size": lambda x: x.sum_to_size(4, 6),
    "as_tensor": lambda x: torch.as_tensor(x),
    "aten": lambda x: torch.ops.aten.slice.Tensor(x, 0, 1, 2),
    "the second result": lambda x: torch.broadcast_tensors(torch.zeros(4, 6), x)[1],
}


@pytest.mark.parametrize("name", VIEWS)
@torch.no_grad()
def test_views_share_memory_whatever_makes_them(name: str) -> None:
    graph = captured(lambda x: (VIEWS[name](x).cos(), x.clone().cos()), torch.rand(4, 6))
    (given,) = [node for node in graph.nodes if node.op == "placeholder"]
    view, copy = [node.args[0] for node in graph.nodes if target_name(node) == "cos"]
    assert held_by([given])(view)
    assert not held_by([given])(copy)


@torch.no_grad()
def test_inputs_may_share_memory() -> None:
    x = torch.rand(4, 6)
    first, second, third = [
        node
        for node in captured(lambda a, b, c: a + b + c, x, x[:, :1], torch.rand(6)).nodes
        if node.op == "placeholder"
    ]
    assert held_by([first])(second)
    assert not held_by([first])(third)
