"""Pictures of graphs: roles, labels, shapes, bounds, cost."""

from __future__ import annotations

import time

import networkx as nx
import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn

from fpscompile.graph_view import MAX_NODES, ROLES, neighbourhood, to_networkx


class Block(nn.Module):
    """One attention block with a projection of each of q, k, v and a residual."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))
        self.out = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (layer(x).unflatten(-1, (2, 4)).transpose(1, 2) for layer in self.qkv)
        attended = F.scaled_dot_product_attention(q, k, v)
        return x + self.out(attended.transpose(1, 2).flatten(2))


def captured(model: nn.Module, *inputs: torch.Tensor, dynamic: bool = False) -> fx.Graph:
    """The graph that a backend receives."""
    graphs: list[fx.Graph] = []

    def backend(gm: fx.GraphModule, _: object) -> fx.GraphModule:
        graphs.append(gm.graph)
        return gm

    with torch.no_grad():
        torch.compile(model, backend=backend, dynamic=dynamic)(*inputs)
    assert len(graphs) == 1
    return graphs[0]


def attention_of(graph: fx.Graph) -> fx.Node:
    return next(node for node in graph.nodes if node.target is F.scaled_dot_product_attention)


def test_whole_graph_has_roles_and_shapes() -> None:
    graph = captured(Block(), torch.randn(2, 60, 8))
    picture = to_networkx(graph)
    assert set(picture) == {node.name for node in graph.nodes}
    assert nx.is_directed_acyclic_graph(picture)
    assert picture.number_of_edges() == sum(len(node.all_input_nodes) for node in graph.nodes)
    roles = [data["role"] for _, data in picture.nodes(data=True)]
    assert set(roles) == set(ROLES)
    assert roles.count("attention") == roles.count("output") == roles.count("input") == 1
    assert roles.count("param") == 8
    data = picture.nodes[attention_of(graph).name]
    assert data == {"label": "sdpa", "shape": "[2, 2, 60, 4]", "role": "attention", "inputs": 3}


def test_neighbourhood_leaves_parameters_out_and_counts_them() -> None:
    graph = captured(Block(), torch.randn(2, 60, 8))
    node = attention_of(graph)
    picture = neighbourhood(graph, node)
    assert picture.graph["centre"] == node.name
    assert "param" not in {data["role"] for _, data in picture.nodes(data=True)}
    linears = [data for _, data in picture.nodes(data=True) if data["label"] == "linear"]
    assert len(linears) == 4
    assert all(data["params"] == 2 for data in linears)
    assert set(nx.ancestors(picture, node.name)) >= {producer.name for producer in node.all_input_nodes}
    labels = {picture.nodes[name]["label"] for name in picture}
    assert {"x", "unflatten", "transpose", "flatten"} <= labels


def test_depth_is_respected() -> None:
    graph = captured(Block(), torch.randn(2, 60, 8))
    node = attention_of(graph)
    picture = neighbourhood(graph, node, up=1, down=1)
    assert {data["label"] for _, data in picture.nodes(data=True)} == {"transpose", "sdpa"}
    assert picture.number_of_nodes() == 5
    assert neighbourhood(graph, node, up=0, down=0).number_of_nodes() == 1


def test_symbolic_sizes_are_named_and_size_arithmetic_is_left_out() -> None:
    graph = captured(Block(), torch.randn(2, 60, 8), dynamic=True)
    picture = neighbourhood(graph, attention_of(graph))
    shape = picture.nodes[picture.graph["centre"]]["shape"]
    assert shape.startswith("[s")
    assert shape.endswith(", 4]")
    assert not any(name.startswith("s") and name[1:].isdigit() for name in picture)


def test_ops_are_named_with_their_namespace() -> None:
    library = torch.library.Library("fps_view", "DEF")  # dropped with the last reference, ops and all
    library.define("mean(Tensor q) -> Tensor")
    graph = fx.Graph()
    x = graph.placeholder("x")
    ours = graph.call_function(torch.ops.fps.attention.default, (x,))
    targets = [torch.ops.fps_view.mean.default, torch.ops.fps_view.mean, torch.ops.aten.relu.default, torch.relu]
    others = [graph.call_function(target, (ours,)) for target in targets]
    graph.output(others)
    picture = to_networkx(graph)
    assert picture.nodes[ours.name]["role"] == "attention"
    assert picture.nodes[ours.name]["label"] == "fps::attention"
    assert {picture.nodes[other.name]["role"] for other in others} == {"op"}
    labels = [picture.nodes[other.name]["label"] for other in others]
    assert labels == ["fps_view::mean", "fps_view::mean", "relu", "relu"]


def test_split_shapes_and_long_names_stay_short() -> None:
    graph = fx.Graph()
    x = graph.placeholder("l_kwargs_" + "hidden_" * 20)
    parts = graph.call_method("chunk", (x, 3))
    parts.meta["example_value"] = tuple(torch.empty(1, 60, 8) for _ in range(30))
    item = graph.call_function(torch.relu, (parts,))
    picture = neighbourhood(graph, item)
    assert picture.nodes[parts.name]["shape"] == "[1, 60, 8] +29"
    assert len(picture.nodes[x.name]["label"]) <= 22


def test_node_of_another_graph_is_refused() -> None:
    graph, other = fx.Graph(), fx.Graph()
    node = other.placeholder("x")
    with pytest.raises(ValueError, match="'x' is not in this graph"):
        neighbourhood(graph, node)


def _ladder(length: int) -> tuple[fx.Graph, fx.Node]:
    """A long graph whose middle node has many producers and very many consumers."""
    graph = fx.Graph()
    node = graph.placeholder("x")
    for index in range(length):
        if index == length // 2:
            wide = [graph.call_function(torch.relu, (node,)) for _ in range(50)]
            middle = node = graph.call_function(torch.cat, (wide,))
        node = graph.call_function(torch.add, (node, middle if index > length // 2 else node))
    graph.output(node)
    return graph, middle


def test_bounded_and_independent_of_graph_size() -> None:
    graph, middle = _ladder(10_000)
    picture = neighbourhood(graph, middle)
    assert picture.number_of_nodes() == MAX_NODES
    assert middle.name in picture
    assert nx.is_weakly_connected(picture)
    assert picture.nodes[middle.name]["inputs"] == 50
    began = time.perf_counter()
    for _ in range(80):
        neighbourhood(graph, middle)
    assert time.perf_counter() - began < 4.0, "80 sites of a large model"
    began = time.perf_counter()
    assert to_networkx(graph).number_of_nodes() == len(graph.nodes)
    assert time.perf_counter() - began < 4.0
