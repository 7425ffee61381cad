"""Overrides by layer and by head: how they are written, what they change, and that they refuse to name nothing."""

from __future__ import annotations

import functools
import json
from typing import Any

import pytest
import torch
from models.oracle import window_mask
from models.toys import HEADS, SPARSE, D, heads, latent
from models.zoo import output, wan, wan_inputs
from torch import nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

import fpscompile
from fpscompile import Backend, Settings
from fpscompile.errors import OptionError
from fpscompile.overrides import LayerKey, block_of, check_named, siblings, variant_of
from fpscompile.ranges import Ranges
from fpscompile.schedule import Phase, Schedule
from fpscompile.windows import Dense, FirstFrame, Heads, Sliding, SpatialBand, TopK

HUNYUAN = [f"transformer_blocks.{i}.attn" for i in range(4)] + [f"single_transformer_blocks.{i}.attn" for i in range(3)]
WAN = [f"blocks.{i}.attn1" for i in range(12)]


@pytest.mark.parametrize(
    ("text", "members"),
    [("5", [5]), (5, [5]), ("0-2", [0, 1, 2]), ("0 - 1, 7", [0, 1, 7]), ("8-", [8, 9]), ("3,1", [1, 3])],
)
def test_ranges(text: Any, members: list[int]) -> None:
    ranges = Ranges.parse(text, "layers")
    assert ranges.members(10) == members
    assert [index in ranges for index in range(10)] == [index in members for index in range(10)]


@pytest.mark.parametrize("text", ["", "a", "-1", "1-0", "1,1", "0-3,2", "2-,5", 1.5, True, None, "1--2"])
def test_bad_ranges(text: Any) -> None:
    with pytest.raises(OptionError, match="layers"):
        Ranges.parse(text, "layers")


def test_ranges_beyond_and_meeting() -> None:
    assert Ranges.parse("0-3,8", "x").beyond(8) == 8
    assert Ranges.parse("0-3,7", "x").beyond(8) is None
    assert Ranges.parse("9-", "x").beyond(8) == 9
    assert Ranges.parse("0-3", "x").meets(Ranges.parse("3", "x"))
    assert not Ranges.parse("0-3", "x").meets(Ranges.parse("4-", "x"))


@pytest.mark.parametrize(
    ("path", "block"),
    [
        ("blocks.3.attn1", ("blocks", 3)),
        ("model.blocks.12", ("model.blocks", 12)),
        ("down_blocks.1.attentions.0.attn", ("down_blocks", 1)),
        ("attn1.to_q.weight", None),
        ("linear_1.weight", None),
        ("", None),
    ],
)
def test_block_of(path: str, block: tuple[str, int] | None) -> None:
    assert block_of(path) == block


@pytest.mark.parametrize(
    ("key", "named"),
    [
        ("0-1", [0, 1, 4, 5]),
        ("transformer_blocks.0-1", [0, 1]),
        ("single_transformer_blocks.2", [6]),
        ("transformer_blocks.3.attn", [3]),
        ("single_transformer_blocks", [4, 5, 6]),
        ("*.attn", list(range(7))),
        ("transformer_blocks.*.attn", [0, 1, 2, 3]),
        ("blocks.0", []),
        ("attn", list(range(7))),
    ],
)
def test_keys_name_sites(key: str, named: list[int]) -> None:
    assert [i for i, path in enumerate(HUNYUAN) if LayerKey.parse(key).matches(path)] == named


@pytest.mark.parametrize(
    ("key", "paths", "words"),
    [
        ("12", WAN, "names layer 12, but 'blocks' has layers 0 to 11"),
        ("10-12", WAN, "names layer 12"),
        ("blocks.12-", WAN, "names layer 12"),
        ("blks.0", WAN, "'blks.0' names no 3D attention of the model, which has blocks.0.attn1, blocks.1.attn1"),
        ("blocks.3.attn2", WAN, "names no 3D attention"),
        ("0", HUNYUAN, 'write "single_transformer_blocks.0"'),
        ("0", ["attn1"], r"call fpscompile.attach\(model\) first"),
        ("0", [], "which has none"),
        ("0", [""], "which has one in the model itself, which layers cannot name"),
    ],
)
def test_keys_that_name_nothing(key: str, paths: list[str], words: str) -> None:
    with pytest.raises(OptionError, match=words):
        check_named([LayerKey.parse(key)], paths)


def test_keys_that_name_something() -> None:
    check_named([LayerKey.parse(key) for key in ("0-3", "11", "4-", "blocks.5.attn1", "blocks.2-4")], WAN)
    check_named([LayerKey.parse("transformer_blocks.0-3")], HUNYUAN)
    weights = [f"single_transformer_blocks.{i}.attn.to_q.weight" for i in range(3)]
    check_named([LayerKey.parse("single_transformer_blocks.0-2")], HUNYUAN[:4], weights)
    with pytest.raises(OptionError, match="names layer 3"):
        check_named([LayerKey.parse("single_transformer_blocks.0-3")], HUNYUAN[:4], weights)


def test_one_site_is_named_once() -> None:
    keys = [LayerKey.parse("0-3"), LayerKey.parse("blocks.5.attn1")]
    assert [variant_of(path, keys) for path in WAN[:7]] == [1, 1, 1, 1, 0, 2, 0]
    with pytest.raises(OptionError, match=r"'0-3' and 'blocks.2' both name blocks.2.attn1"):
        variant_of("blocks.2.attn1", [*keys, LayerKey.parse("blocks.2")])


def test_siblings() -> None:
    weights = [f"{path}.to_q.weight" for path in HUNYUAN] + ["transformer_blocks.0.ff.net.0.proj.weight"]
    assert siblings("transformer_blocks.0.attn", weights) == sorted(HUNYUAN)
    assert siblings("transformer_blocks.1.ff", weights) == ["transformer_blocks.0.ff", "transformer_blocks.1.ff"]
    assert siblings("attn", weights) == ["attn"]


def test_settings_from_json() -> None:
    """Options are plain data; every variant has the ranges of all."""
    options = {
        "density": 0.4,
        "heads": {"0-1": "spatial"},
        "layers": {
            "0-1": "dense",
            "blocks.5": {"heads": {"3": "topk"}},
            "6": {
                "schedule": [{"start": 0, "end": 0.3, "density": 1.0}, {"start": 0.3, "end": 1, "window": [1, 2, 3]}]
            },
            "7": {"window": "topk", "density": 0.2, "granularity": "head"},
            "8": {"granularity": "subtile"},
        },
    }
    settings = Settings.from_options(json.loads(json.dumps(options)))
    assert hash(settings) == hash(Settings.from_options(options))
    base, first, fifth, sixth, seventh, eighth = settings.variants
    spatial = Heads({"0-1": SpatialBand()}, Sliding(density=0.4))  # type: ignore[arg-type]
    for schedule in settings.variants:
        assert schedule.boundaries == (0.3,)
    assert base is settings.phases
    assert [phase.window for phase in base.phases] == [spatial] * 2
    assert [phase.window for phase in first.phases] == [Dense()] * 2
    heads = Heads({"3": TopK(0.4)}, Sliding(density=0.4))  # type: ignore[arg-type]
    assert [phase.window for phase in fifth.phases] == [heads] * 2
    assert sixth.phases == (Phase(0, 0.3, density=1.0), Phase(0.3, 1, window=(1, 2, 3)))
    assert [(phase.window, phase.granularity) for phase in seventh.phases] == [(TopK(0.2), "head")] * 2
    assert [(phase.window, phase.granularity) for phase in eighth.phases] == [(spatial, "subtile")] * 2
    assert Settings.from_options({"density": 0.4}).phases == Schedule.constant(density=0.4)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"layers": "dense"}, "must be a dict"),
        ({"layers": {"0": "dnse"}}, "did you mean 'dense'"),
        ({"layers": {"0": {}}}, "is empty"),
        ({"layers": {"0": {"density": None, "heads": None}}}, "overrides nothing: density, heads is None; leave"),
        ({"layers": {"0": {"tile": (1, 1, 1)}}}, "has no key 'tile'"),
        ({"layers": {"0": {"window": "dense", "density": 0.5}}}, r"layers\['0'\]: give one of"),
        ({"layers": {"0": {"granularity": "pixel"}}}, "granularity='pixel'"),
        ({"layers": {"0": {"window": "topk"}}}, "needs a density"),
        ({"layers": {"1-0": "dense"}}, "backwards"),
        ({"layers": {"": "dense"}}, "write indices"),
        ({"layers": {"blocks.0": {"heads": {"0": "topk"}}}, "window": (1, 1, 1)}, "needs a density"),
        ({"heads": "dense"}, "must be a dict"),
        ({"heads": {}}, "must be a dict"),
        ({"heads": {"0": "dense", "0-1": "text"}}, "same head"),
        ({"heads": {"0": "dense"}, "window": {"family": "heads", "of": {"0": "dense"}}}, "differs by head as well"),
        ({"window": "topk"}, "needs a density"),
        ({"window": "radial", "density": 0.5}, "window and density together"),
    ],
)
def test_bad_options(options: dict[str, Any], words: str) -> None:
    with pytest.raises(OptionError, match=words):
        Settings.from_options(options)


# --- models ----------------------------------------------------------------------------------------------------------

GRID, TILE = (5, 6, 10), (1, 2, 4)
OPTIONS = {
    "window": (1, 2, 2),
    "tile": TILE,
    "inner": "eager",
    "quant": "none",
    "layers": {
        "0": "dense",
        "blocks.2": {
            "schedule": [{"start": 0, "end": 0.5, "window": [3, 3, 1]}, {"start": 0.5, "end": 1, "window": "sink"}],
            "heads": {"1": "temporal"},
        },
    },
}


def mask(window: tuple[int, int, int]) -> torch.Tensor:
    return window_mask(GRID, TILE, window, 300, 0)


def masks(late: bool) -> list[torch.Tensor]:
    """What OPTIONS mean for three layers: [heads, L, L]."""
    sink = torch.zeros(300, 300, dtype=torch.bool)
    sink[:, :60] = True
    first = sink if late else mask((3, 3, 1))
    everything = torch.ones(300, 300, dtype=torch.bool)
    return [everything[None], mask((1, 2, 2))[None], torch.stack([first, mask((5, 1, 1))])]


class LayeredAttention(TorchFunctionMode):
    """Eager: the n-th attention of 300 tokens sees the n-th mask."""

    def __init__(self, of_layer: list[torch.Tensor]) -> None:
        super().__init__()
        self.masks = iter(of_layer)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if (
            func is F.scaled_dot_product_attention
            and kwargs.get("key", args[1] if len(args) > 1 else None).shape[2] == 300
        ):
            kwargs["attn_mask"] = next(self.masks)
        return func(*args, **kwargs)


def relative(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual - expected).norm() / expected.norm())


@pytest.mark.parametrize("how", ["whole", "blocks"])
def test_layers_and_heads_of_a_model(how: str) -> None:
    """Blocks share one compiled code; which layer runs is told by its weights, and nothing recompiles."""
    model, eager, fps = wan(layers=3), wan(layers=3), Backend(Settings.from_options(OPTIONS))
    inputs = wan_inputs(GRID)
    if how == "blocks":
        model.compile_repeated_blocks(backend=fps, fullgraph=True)
    compiled = model if how == "blocks" else torch.compile(model, backend=fps, fullgraph=True)
    with torch.no_grad(), fpscompile.attach(compiled) as attachment:
        for step in (0, 9):
            attachment.step(step, 10)
            with LayeredAttention(masks(late=step == 9)):
                expected = output(eager, **inputs)
            with torch._dynamo.config.patch(error_on_recompile=True):
                assert relative(output(compiled, **inputs), expected) <= 1e-5
    assert len(fps.graphs) == 1
    sites = [site for site in fps.graphs[0].sites if site.kind == "3d"]
    assert [site.module for site in sites] == [f"blocks.{i}.attn1" for i in range(3 if how == "whole" else 1)]
    assert sites[0].density == (1.0, 1.0)
    if how == "whole":
        assert sites[1].windows == ((1, 2, 2), (1, 2, 2))
        assert sites[2].density == tuple(float(masks(late)[2].double().mean()) for late in (False, True))
        assert sites[2].windows[1].rest == FirstFrame()


def test_blocks_of_another_model_and_detached_blocks() -> None:
    """Dynamo runs one code for both models; each layer is still its own, and without an attachment it is refused."""
    first, second, eager = wan(layers=3), wan(layers=3), wan(layers=3)
    fps = Backend(Settings.from_options(OPTIONS | {"grid": GRID}))
    inputs = wan_inputs(GRID)
    for model in (first, second):
        model.compile_repeated_blocks(backend=fps, fullgraph=True)
    with torch.no_grad():
        with fpscompile.attach(first), fpscompile.attach(second) as attachment:
            output(first, **inputs)
            attachment.step(9, 10)
            with LayeredAttention(masks(late=True)):
                expected = output(eager, **inputs)
            assert relative(output(second, **inputs), expected) <= 1e-5
        with pytest.raises(OptionError, match="belongs to no attached model"):
            output(first, **inputs)
    assert len(fps.graphs) == 1


def test_a_loop_over_blocks_that_breaks() -> None:
    """Dynamo then compiles each block alone; with an attachment they know their layer all the same."""
    model, eager, fps = wan(layers=3), wan(layers=3), Backend(Settings.from_options(OPTIONS))
    model.blocks[1].register_forward_pre_hook(lambda *_: torch._dynamo.graph_break())  # type: ignore[union-attr, operator]
    inputs = wan_inputs(GRID)
    with torch.no_grad(), fpscompile.attach(model) as attachment:
        attachment.step(9, 10)
        with LayeredAttention(masks(late=True)):
            expected = output(eager, **inputs)
        assert relative(output(torch.compile(model, backend=fps), **inputs), expected) <= 1e-5
    assert len(fps.graphs) > 1


class Block(nn.Module):
    """Attention of a small latent over itself."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.ModuleList(nn.Conv3d(HEADS * D, HEADS * D, 1) for _ in range(3))

    def forward(self, video: torch.Tensor) -> torch.Tensor:
        out = F.scaled_dot_product_attention(*(heads(project(video)) for project in self.qkv))
        return video + out.transpose(1, 2).flatten(2).transpose(1, 2).unflatten(2, video.shape[2:])


@pytest.mark.parametrize(
    ("options", "noted"),
    [
        ({"density": 0.2}, [("window-apart", "density 0.20 on grid")]),
        ({"density": 0.2, "heads": {"1": "dense"}}, [("window-apart", "density 0.20 for heads 0 on grid")]),
        ({"density": 0.2, "heads": {"0-1": "dense"}}, []),
        (
            {"window": (9, 9, 9), "heads": {"1": {"family": "sliding", "density": 0.2}}},
            [("window-apart", "density 0.20 for heads 1 on grid")],
        ),
        (
            {"schedule": "paper", "tile": (2, 4, 4), "heads": {"1": "dense"}},
            [("density-floor", "density 0.10 for heads 0"), ("density-floor", "density 0.25 for heads 0")],
        ),
    ],
)
def test_notes_on_windows_of_a_density_know_the_heads(options: dict[str, Any], noted: list[tuple[str, str]]) -> None:
    fps = Backend(Settings.from_options(SPARSE | {"window": None, "lowering": "gather"} | options))
    with torch.no_grad():
        torch.compile(Block(), backend=fps)(latent())
    notes = [(note.code, note.message) for note in fps.graphs[0].notes]
    for code, words in noted:
        assert any(code == found and words in message for found, message in notes), notes
    assert bool(noted) == any(code in ("density-floor", "window-apart") for code, _ in notes)


class Broken(nn.Module):
    """Two blocks and a graph break between them."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block()])

    def forward(self, video: torch.Tensor) -> torch.Tensor:
        video = self.blocks[0](video)
        torch._dynamo.graph_break()
        return self.blocks[1](video)


def test_pieces_of_a_model_say_what_they_did_not_meet() -> None:
    options = SPARSE | {"layers": {"1": "dense", "blocks.7": "dense"}}
    fps = Backend(Settings.from_options(options))
    with torch.no_grad():
        torch.compile(Broken(), backend=fps)(latent())
    found = [
        ([site.module for site in graph.sites], [n.message for n in graph.notes if n.code == "layers-elsewhere"])
        for graph in fps.graphs
    ]
    assert [modules for modules, _ in found] == [["blocks.0"], ["blocks.1"]]
    assert "'1', 'blocks.7' name nothing in this part" in found[0][1][0]
    assert "layers 'blocks.7' name nothing" in found[1][1][0]
    assert [graph.sites[0].density for graph in fps.graphs][1] == (1.0,)
    assert fps.graphs[0].sites[0].density[0] < 0.5


@pytest.mark.parametrize("how", ["explain", "blocks"])
@pytest.mark.parametrize(
    ("layers", "words"),
    [
        ({"1-2": "dense"}, "names layer 2, but 'blocks' has layers 0 to 1"),
        ({"blocks.0": "dense", "0-1": "dense"}, "both name blocks.0.attn1"),
        ({"blocks.0.attn2": "dense"}, "names no 3D attention"),
        ({"0": {"heads": {"1-2": "dense"}}}, "'1-2' names head 2, but the site has 2 heads"),
    ],
)
def test_models_refuse_what_names_nothing(how: str, layers: dict[str, Any], words: str) -> None:
    model, options = wan(layers=2), OPTIONS | {"layers": layers}
    if how == "blocks":
        model.compile_repeated_blocks(backend="fps", fullgraph=True, options=options)
    run = output if how == "blocks" else functools.partial(fpscompile.explain, options=options)
    with torch.no_grad(), fpscompile.attach(model), pytest.raises(Exception, match=words) as caught:
        run(model, **wan_inputs(GRID))
    assert isinstance(getattr(caught.value, "inner_exception", caught.value), OptionError)


def test_blocks_alone_do_not_know_their_number() -> None:
    model = wan(layers=2)
    model.compile_repeated_blocks(backend="fps", fullgraph=True, options=OPTIONS | {"grid": GRID})
    with torch.no_grad(), pytest.raises(Exception, match=r"call fpscompile.attach\(model\) first"):
        output(model, **wan_inputs(GRID))
