"""Which layer a site is in: what ``options["layers"]`` needs, for whole models and for blocks compiled on their own.

A graph of a whole model names its modules. A block compiled on its own does not know its number, and Dynamo lets its
code serve every block of the class; the names of the weights, which an attachment knows, tell the block of each call.
Such a site gets a plan with the phases of all variants, and which of them is meant becomes an input of the graph.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch._dynamo.symbolic_convert import InstructionTranslator

from fpscompile import runtime
from fpscompile.errors import OptionError
from fpscompile.ir import AttentionSite
from fpscompile.overrides import block_of, check_named, siblings, variant_of
from fpscompile.passes.base import GraphState, Placed, module_path


def shared_block(names: Sequence[str]) -> str:
    """The one block that holds all these weights; "" when there is none."""
    blocks = {block_of(name) for name in names}
    found = blocks.pop() if len(blocks) == 1 else None
    return f"{found[0]}.{found[1]}" if found is not None else ""


def place(state: GraphState, sites: Sequence[AttentionSite]) -> None:
    """Fill ``state.layers`` for the sites that will be planned.

    Args:
        sites: all 3D attention of the graph, declined calls included.

    Raises:
        OptionError: a key that names nothing, or two that name one site.
    """
    keys = state.settings.layer_keys
    if not keys:
        return
    known: list[str] = []
    for site in sites:
        path = module_path(site.node)
        inside = None
        if state.block and not _within(path, state.block):
            inside = path
            path = f"{state.block}.{path}" if path else state.block
            known += siblings(path, state.weights)
        known.append(path)
        if site.rejection is None:
            state.layers[site.node] = Placed(path, variant_of(path, keys), inside)
    paths = list(dict.fromkeys(known))
    for path in paths:
        variant_of(path, keys)  # a block that shares this code would meet two keys only when it runs
    if sites and _is_whole(state):
        check_named(keys, paths, state.weights)
    elif sites:
        unseen = [key.text for key in keys if not any(key.matches(path) for path in paths)]
        if unseen:
            state.note(
                "info",
                "layers-elsewhere",
                f"layers {', '.join(map(repr, unseen))} name nothing in this part of a model that graph breaks cut",
            )


def _within(path: str, block: str) -> bool:
    return f".{path}.".find(f".{block}.") >= 0


def _is_whole(state: GraphState) -> bool:
    """Whether the graph is all that was compiled: no graph break cut it."""
    if getattr(getattr(state.gm, "compile_subgraph_reason", None), "graph_break", False):
        return False
    try:
        code = InstructionTranslator.current_tx().f_code
    except (AttributeError, AssertionError):
        return True
    return not code.co_name.startswith("torch_dynamo_resume_in")


class VariantsOfCall:
    """The phase offset of each shared site, for the block whose weights a call brings.

    Raises:
        OptionError: the weights belong to no attached model.
    """

    def __init__(self, state: GraphState) -> None:
        self.keys = state.settings.layer_keys
        self.phases = len(state.settings.phases.phases)
        self.inside = [placed.inside for placed in state.layers.values() if placed.inside is not None]
        self._known: dict[str, tuple[int, ...]] = {}

    def __call__(self, arguments: Sequence[Any]) -> tuple[int, ...]:
        block = block_of(next(runtime.weight_names(arguments), ""))
        if block is None:
            raise OptionError(
                "options['layers'] differ by layer, and this block belongs to no attached model: call "
                "fpscompile.attach(model) and keep it attached. Blocks under FSDP2 have weights without names: leave "
                "layers out"
            )
        name = f"{block[0]}.{block[1]}"
        if name not in self._known:
            paths = [f"{name}.{inside}" if inside else name for inside in self.inside]
            self._known[name] = tuple(self.phases * variant_of(path, self.keys) for path in paths)
        return self._known[name]
