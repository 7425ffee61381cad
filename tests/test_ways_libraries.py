"""What libraries do to a model before or after it is compiled: caches of steps, offloading, quantized weights."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import accelerate
import pytest
import torch
from diffusers import hooks
from models.zoo import output, wan, wan_inputs
from torch import nn
from torchao.quantization import (
    Float8WeightOnlyConfig,
    Int8DynamicActivationInt8WeightConfig,
    Int8WeightOnlyConfig,
    quantize_,
)

import fpscompile
from fpscompile import Backend, Settings
from fpscompile.lowerings import boxes

WINDOWS = [{"start": start, "end": end, "window": (2, 3, 3)} for start, end in ((0.0, 0.2), (0.2, 0.7), (0.7, 1.0))]
"""Phases with one and the same window, of all tiles: results are dense."""
OPTIONS = {"quant": "none", "schedule": WINDOWS, "tile": (2, 2, 4), "inner": "eager", "lowering": "boxes"}
STEPS = (0, 4, 8)
"""Of ten: one in each phase."""


@pytest.fixture
def phases(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Phases that reach the kernels, one per attention call."""
    seen: list[int] = []
    forward = boxes.forward

    def recording(*args: Any, phases: tuple[int, ...], **kwargs: Any) -> Any:
        seen.extend(phases)
        return forward(*args, phases=phases, **kwargs)

    monkeypatch.setattr(boxes, "forward", recording)
    return seen


def relative(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual - expected).norm() / expected.norm())


def run(prepare: Callable[[nn.Module], Any], backend: Any = None, layers: int = 1) -> torch.Tensor:
    """Three steps of a prepared model; with a backend, its blocks compiled."""
    model = wan(layers=layers)
    prepare(model)
    results = []
    with torch.no_grad(), fpscompile.attach(model) as attachment:
        if backend is not None:
            model.compile_repeated_blocks(backend=backend)
        for step, scale in zip(STEPS, (1.0, 1.001, 3.0), strict=True):
            attachment.step(step, 10)
            inputs = wan_inputs(step=1000 - 100 * step)
            inputs["hidden_states"] = inputs["hidden_states"] * scale
            with model.cache_context("one"):
                results.append(output(model, **inputs))
    return torch.stack(results)


CACHES: dict[str, Callable[[], Any]] = {
    "first block": lambda: hooks.FirstBlockCacheConfig(threshold=0.5),
    "attention kept": lambda: hooks.PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2,
        spatial_attention_timestep_skip_range=(100, 900),
        current_timestep_callback=lambda: 500,
        spatial_attention_block_identifiers=("blocks.*attn1",),
    ),
}


@pytest.mark.parametrize("name", CACHES)
def test_caches_of_steps(name: str, phases: list[int]) -> None:
    """A cache skips blocks in some steps; those that run see the right phase."""

    def prepare(model: nn.Module) -> None:
        model.enable_cache(CACHES[name]())  # type: ignore[operator]

    fps = Backend(Settings.from_options(OPTIONS))
    expected = run(prepare, layers=3)
    assert relative(run(prepare, fps, layers=3), expected) <= 1e-5
    assert all(site.rewritten for graph in fps.graphs for site in graph.sites if site.kind != "cross")
    assert phases == sorted(phases)
    assert 0 in phases
    assert len(phases) < 9  # some step was cached


def kept_out(model: nn.Module) -> None:
    """MagCache keeps torch.compile out of the whole call of every block."""
    config = {"mag_ratios": [1.0] * 3, "num_inference_steps": 3, "retention_ratio": 0.3, "max_skip_steps": 1}
    model.enable_cache(hooks.MagCacheConfig(threshold=0.5, **config))  # type: ignore[operator]


@pytest.mark.parametrize("how", ["blocks", "whole"])
def test_a_cache_that_keeps_the_compiler_out_is_named_with_the_remedy(how: str, caplog: Any) -> None:
    model, fps = wan(layers=2), Backend(Settings.from_options(OPTIONS))
    kept_out(model)
    with torch.no_grad(), fpscompile.attach(model), caplog.at_level("WARNING", "fpscompile"):
        model.compile_repeated_blocks(backend=fps) if how == "blocks" else model.compile(backend=fps)
        for _ in range(2):
            with model.cache_context("one"):
                output(model, **wan_inputs())
    assert not any(graph.sites for graph in fps.graphs)
    (message,) = [record.getMessage() for record in caplog.records if record.name == "fpscompile.attach"]
    assert "torch.compiler.disable" in message
    assert "block.forward = torch.compile(block.forward" in message


def test_the_remedy_for_such_a_cache(phases: list[int]) -> None:
    fps = Backend(Settings.from_options(OPTIONS))

    def compiled(model: nn.Module) -> None:
        for block in model.blocks:  # type: ignore[union-attr]
            block.forward = torch.compile(block.forward, backend=fps)
        kept_out(model)

    assert relative(run(compiled, layers=3), run(kept_out, layers=3)) <= 1e-5
    assert len(fps.graphs) == 1
    assert all(site.rewritten for site in fps.graphs[0].sites if site.kind != "cross")
    assert phases == [0, 0, 0, 2, 2, 2]  # the second step was cached


def quantized(config: Any) -> Callable[[nn.Module], None]:
    def prepare(model: nn.Module) -> None:
        quantize_(model.blocks, config)

    return prepare


def offloaded(model: nn.Module) -> None:
    cpu = torch.device("cpu")
    model.enable_group_offload(cpu, cpu, offload_type="block_level", num_blocks_per_group=1)  # type: ignore[operator]


def offloaded_by_hooks(model: nn.Module) -> None:
    for block in model.blocks:  # type: ignore[union-attr]
        accelerate.cpu_offload(block, execution_device=torch.device("cpu"))


def stored_small(model: nn.Module) -> None:
    model.enable_layerwise_casting(torch.float8_e4m3fn, torch.float32)  # type: ignore[operator]


PREPARED: dict[str, Callable[[nn.Module], Any]] = {
    "torchao int8": quantized(Int8WeightOnlyConfig()),
    "torchao int8 activations": quantized(Int8DynamicActivationInt8WeightConfig()),
    "torchao float8": quantized(Float8WeightOnlyConfig()),
    "group offloading": offloaded,
    "accelerate offloading": offloaded_by_hooks,
    "layerwise casting": stored_small,
}


ROUNDED = {name for name in PREPARED if "offloading" not in name}
SELDOM = {"accelerate offloading", "layerwise casting"}
"""Their hooks break the graph at every layer, which takes long to compile."""


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * (n in SELDOM)) for n in PREPARED])
def test_weights_that_are_kept_otherwise(name: str, phases: list[int]) -> None:
    fps = Backend(Settings.from_options(OPTIONS))
    expected = run(PREPARED[name])
    assert relative(run(PREPARED[name], fps), expected) <= 1e-4
    assert (relative(expected, run(lambda model: None)) > 1e-4) == (name in ROUNDED)
    assert all(site.rewritten for graph in fps.graphs for site in graph.sites if site.kind != "cross")
    assert phases == [0, 1, 2]


def adapter(seed: int, rank: int = 4) -> dict[str, torch.Tensor]:
    """Weights of a LoRA as a file has them."""
    generator = torch.Generator().manual_seed(seed)
    return {
        f"blocks.{block}.attn1.{name}.lora_{which}.weight": 0.3 * torch.randn(shape, generator=generator)
        for block in range(2)
        for name in ("to_q", "to_k", "to_v")
        for which, shape in (("A", (rank, 32)), ("B", (32, rank)))
    }


@pytest.mark.parametrize("how", ["blocks", pytest.param("whole", marks=pytest.mark.slow)])
def test_loras_loaded_swapped_and_set_aside(how: str, phases: list[int]) -> None:
    """As a user of diffusers does it, on a model that is compiled already; a hot swap compiles nothing anew."""
    models, fps = [wan(layers=2), wan(layers=2)], Backend(Settings.from_options(OPTIONS))
    for model in models:
        model.enable_lora_hotswap(target_rank=4)
        model.load_lora_adapter(adapter(1), adapter_name="one", prefix=None)
    compiled, eager = models
    compiled.compile_repeated_blocks(backend=fps) if how == "blocks" else compiled.compile(backend=fps)
    results = []

    def both() -> None:
        actual, expected = output(compiled, **wan_inputs()), output(eager, **wan_inputs())
        assert relative(actual, expected) <= 1e-5
        results.append(expected)

    with torch.no_grad(), fpscompile.attach(compiled) as attachment:
        attachment.step(5, 10)
        both()
        with torch._dynamo.config.patch(error_on_recompile=True):
            for model in models:
                model.load_lora_adapter(adapter(2), adapter_name="one", prefix=None, hotswap=True)
            both()
        for model in models:
            model.disable_lora()
        both()
    assert all(relative(a, b) > 1e-3 for a, b in itertools.combinations(results, 2))
    assert all(site.rewritten for graph in fps.graphs for site in graph.sites if site.kind != "cross")
    assert phases == [1] * 6
