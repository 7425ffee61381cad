"""The inner compiler: what compiles a rewritten graph, Inductor unless the settings say otherwise."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import fx

from fpscompile.errors import CompilerMissingError, OptionError, UnsupportedError
from fpscompile.passes.base import GraphState, device_type
from fpscompile.plan import Plan
from fpscompile.settings import Settings

Compiled = Callable[..., Any]

ANNOTATION = "cudagraph_annotation"
"""Where ``torch._dynamo.override_cudagraphs`` leaves its wish in a graph's ``meta``; it wins over the option."""


def inner_compiler(settings: Settings, mode: str | None) -> Callable[[fx.GraphModule, list[Any]], Compiled]:
    """The compiler for everything else.

    Raises:
        OptionError: an unknown inner name or mode, or a mode for a compiler that has none.
        UnsupportedError, while compiling: no CUDA graph is possible, under Inductor's ``triton.cudagraph_or_error``.
    """
    inner, options = settings.inner, dict(settings.inner_options)
    if inner == "inductor":
        return _inductor(_patches(options, mode))
    if mode not in (None, "default"):
        raise OptionError(f"mode={mode!r} is Inductor's; it cannot be combined with inner={inner!r}")
    if callable(inner):
        function = inner
    else:
        try:
            function = torch._dynamo.lookup_backend(inner)
        except Exception as error:
            known = sorted({*torch.compiler.list_backends(), "eager", "aot_eager"} - {"fps"})
            raise OptionError(
                f"inner={inner!r} is no registered backend; choose one of {', '.join(known)}, or pass a callable "
                f"({error})"
            ) from None
    if options:
        return lambda gm, inputs: function(gm, inputs, options=options)
    return function


def _patches(options: dict[str, Any], mode: str | None) -> dict[str, Any]:
    """Values of Inductor's options that a mode and ``inner_options`` ask for."""
    import torch._inductor

    patches: dict[str, Any] = {}
    if mode not in (None, "default"):
        modes = torch._inductor.list_mode_options()
        if mode not in modes:
            raise OptionError(f"mode={mode!r} is unknown; Inductor has {', '.join(map(repr, modes))}")
        patches |= modes[mode]
    known = torch._inductor.config.get_config_copy()
    for key, value in options.items():
        name = key.replace("-", "_")
        if name not in known:
            raise OptionError(f"inner_options has no key {key!r}: it is not an option of Inductor")
        patches[name] = value
    return patches


def _inductor(patches: dict[str, Any]) -> Callable[[fx.GraphModule, list[Any]], Compiled]:
    from torch._inductor import compile_fx, config

    def inductor(gm: fx.GraphModule, inputs: list[Any]) -> Compiled:
        own = {**_memory_options(gm), **patches}
        refused = _refused_graphs(gm, patches)
        if refused:
            if patches.get("triton.cudagraph_or_error", config.triton.cudagraph_or_error):
                raise UnsupportedError(refused[0])
            own["triton.cudagraphs"] = False
            gm.meta.pop(ANNOTATION, None)
        compiled: Any = compile_fx.compile_fx(gm, inputs, config_patches=own or None)
        return compiled  # type: ignore[no-any-return]

    return inductor


def _memory_options(gm: fx.GraphModule) -> dict[str, Any]:
    """Inductor's option that frees buffers as soon as they are read, for graphs whose attention runs on a GPU.

    By default Inductor keeps a buffer for a later one of its size where it expects a higher peak elsewhere. It does not
    see the buffers that attention allocates inside, and overrates elementwise operations that it then does in place: in
    Wan it kept the blocks' normalized input through attention, the true peak. PyTorch's allocator for GPUs hands out
    freed memory at once; on CPUs it would come as new pages, to be zeroed by the kernel, so there nothing changes.
    """
    return {"allow_buffer_reuse": False} if any(_on_gpu(gm)) else {}


def _on_gpu(gm: fx.GraphModule) -> Iterator[fx.Node]:
    """Calls of ``fps::attention`` on GPUs."""
    graphs = (module.graph for module in gm.modules() if isinstance(module, fx.GraphModule))
    attention = (node for graph in graphs for node in graph.nodes if node.target is torch.ops.fps.attention.default)
    return (node for node in attention if device_type(node.args[0]) == "cuda")


def _refused_graphs(gm: fx.GraphModule, patches: dict[str, Any]) -> list[str]:
    """Why Inductor makes no CUDA graph of ``gm``, though it was asked to; empty where it was not, or makes one."""
    from torch._inductor import config

    wish = getattr(gm.meta.get(ANNOTATION), "fwd", None)
    if not (patches.get("triton.cudagraphs", config.triton.cudagraphs) if wish is None else wish):
        return []
    reasons = dict.fromkeys(filter(None, map(why_no_graph, _on_gpu(gm))))
    return [f"Inductor makes no CUDA graph of this graph: {reason}" for reason in reasons]


def why_no_graph(attention: fx.Node) -> str | None:
    """Why a call of ``fps::attention`` cannot be in a CUDA graph, which does what the host did at its capture.

    To cut graphs around attention is no way out: Inductor hands an op's two results across the cut as one, and fails.
    """
    phase, published_grid, plan = attention.args[4], attention.args[6], Plan.from_json(attention.args[10])  # type: ignore[arg-type]
    if getattr(published_grid, "target", None) is torch.ops.fps.rotary_grid.default:
        return "the grid of the video is read from a rotary table at every call"
    if published_grid is not None:
        return (
            "the grid of the video is looked up at every call; give it as options={'grid': (t, h, w)}, or compile the "
            "whole model if that shows it"
        )
    if len(attention.args) > 11:
        return "the host reads which tiles were chosen by content; windows of fixed tiles need no such look"
    if plan.lowering != "triton":
        return f"lowering {plan.lowering!r} copies from the host at every call; lowering='triton' does not"
    if device_type(phase) == "cpu":
        return "the denoising step is on the CPU; move the timestep input to the GPU ahead of the call"
    return None


def note_on_graphs(state: GraphState, mode: str | None) -> None:
    """Note that Inductor was asked for CUDA graphs and makes none."""
    if state.settings.inner == "inductor":
        for refusal in _refused_graphs(state.gm, _patches(dict(state.settings.inner_options), mode)):
            state.note("info", "cuda-graphs", refusal)


def check_cpp_compiler(gm: fx.GraphModule) -> None:
    """Inductor's own message does not say what to do instead."""
    if not any(device_type(node) == "cpu" for node in gm.graph.nodes):
        return
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler as error:
        raise CompilerMissingError(
            'inner="inductor" needs a C++ compiler for CPU graphs and found none: install g++ or clang, or pass '
            f"options={{'inner': 'aot_eager'}}, which needs none ({error})"
        ) from None
