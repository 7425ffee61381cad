"""Say why attention may not show: a call that breaks the graph, a model without any, ops that hide it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import fx

from fpscompile.passes.base import fake_tensor, fake_value, size_of, target_name
from fpscompile.passes.spelling_flash import is_declared
from fpscompile.records import Note, SiteRecord

DATA_DEPENDENT = ("Dynamic shape", "Data dependent", "item()", "step_unsupported")
CAPTURE = (
    "set torch._dynamo.config.capture_dynamic_output_shape_ops and capture_scalar_outputs to True before the first "
    "call, so that sizes which depend on data are captured; where that does not help, call fpscompile.attach(model), "
    "which tells grid and step to attention behind a break"
)
PRODUCTS = frozenset(["linear", "matmul", "bmm", "conv2d", "conv3d", "einsum", "__matmul__"])
LARGE = 8
"""Matrix products from which on a graph is a model rather than a piece of one."""


ENCODER = (
    "call torch.backends.mha.set_fastpath_enabled(False) before compiling, so that the layer's attention is a call of "
    "its own"
)
EINOPS = (
    "PyTorch before 2.12 keeps calls of einops whole, so it is left as it is. Write torch.einsum and torch's views in "
    "their place, or compile with PyTorch 2.12 or later"
)
ATTENTION = ("attn", "attention", "attend", "sdpa", "mha")
OWN = ("hop::", "fps::", "prims::")
FUSED = {"_transformer_encoder_layer_fwd": ENCODER, "_native_multi_head_attention": ENCODER}
"""Ops of PyTorch that hold a whole attention layer, and what to do."""


def notes_on_breaks(gm: fx.GraphModule, sites: Sequence[SiteRecord], near_misses: Sequence[str] = ()) -> list[Note]:
    """Notes on a graph that ends early, that hides attention, or that is a whole model without any.

    A break is a warning where it left this graph without a rewritten call, otherwise information.

    Args:
        near_misses: what was said of arithmetic that resembles attention.
    """
    rewritten = any(site.rewritten for site in sites)
    reason = getattr(gm, "compile_subgraph_reason", None)
    notes = _hidden(gm)
    if getattr(reason, "graph_break", False):
        level = "info" if rewritten else "warning"
        return [*notes, Note(level, "graph-break", _message(reason))]
    products = sum(node.op == "call_function" and target_name(node) in PRODUCTS for node in gm.graph.nodes)
    if sites or notes:
        return notes
    if near_misses:
        more = f" (and {len(near_misses) - 1} more)" if len(near_misses) > 1 else ""
        message = f"nothing is rewritten in this graph, where no attention is understood: {near_misses[0]}{more}"
        return [Note("warning", "no-attention", message)]
    if products >= LARGE:
        message = (
            f"a graph of {products} matrix products shows no attention call: nothing is rewritten in it. Attention in "
            "functions that torch.compiler.disable keeps out cannot be seen"
        )
        return [Note("warning", "no-attention", message)]
    return notes


def _hidden(gm: fx.GraphModule) -> list[Note]:
    """Warnings of ops that hold attention, or look as if they did."""
    found: dict[str, str] = {}
    softmaxed = _softmaxed(gm)
    for node in gm.graph.nodes:
        if node.op != "call_function":
            continue
        name = target_name(node)
        if name.startswith("einops.") and name.endswith("::einsum"):
            if softmaxed.intersection(node.all_input_nodes):
                found[name] = f"{node} multiplies the weights of a softmax, as attention does: {EINOPS}"
        elif name in FUSED:
            found[name] = f"{name} holds attention that cannot be rewritten: {FUSED[name]}"
        elif "::" in name and not name.startswith(OWN) and not is_declared(name) and _takes_three(node):
            found[name] = (
                f"{name} takes queries, keys and values, as attention does, but is not known here: it is left as it "
                "is. Call torch.nn.functional.scaled_dot_product_attention in its place to have it rewritten"
            )
    return [Note("warning", "hidden-attention", message) for message in found.values()]


def _softmaxed(gm: fx.GraphModule) -> set[fx.Node]:
    """What a softmax gives, and what casts, dropout and products with one operand make of it."""
    found: set[fx.Node] = set()
    for node in gm.graph.nodes:
        tensors = [source for source in node.all_input_nodes if fake_tensor(source) is not None]
        carried = len(tensors) == 1 and tensors[0] in found and not target_name(node).endswith("::einsum")
        if target_name(node) in ("softmax", "_softmax") or (node.op != "output" and carried):
            found.add(node)
    return found


def _takes_three(node: fx.Node) -> bool:
    """Whether the first three tensors of a call could be q, k and v, and its result their attention."""
    tensors = [value for argument in node.all_input_nodes if (value := fake_tensor(argument)) is not None][:3]
    result = fake_tensor(node)
    if result is None:
        outputs = fake_value(node)
        result = outputs[0] if isinstance(outputs, (tuple, list)) and outputs else None
    if len(tensors) < 3 or not isinstance(result, torch.Tensor):
        return False
    _, key, value = tensors
    ranks = {tensor.ndim for tensor in (*tensors, result)}
    features = {size_of(tensor.shape[-1]).expr for tensor in tensors if tensor.ndim}
    floating = all(tensor.dtype.is_floating_point for tensor in tensors)
    if ranks not in ({3}, {4}) or len(features) != 1 or not floating:
        return False
    # Fused modulation and rotation take three tensors too, but of three ranks or shapes.
    paired = [size_of(size).expr for size in key.shape[:-1]] == [size_of(size).expr for size in value.shape[:-1]]
    return paired and (ranks == {4} or any(word in target_name(node).lower() for word in ATTENTION))


def _message(reason: Any) -> str:
    frames = list(getattr(reason, "user_stack", None) or ())
    place = (
        f"{Path(frames[-1].filename).name}:{frames[-1].lineno} ({frames[-1].line})" if frames else "an unknown place"
    )
    text = str(getattr(reason, "reason", "") or "")
    why = text.strip().splitlines()[0] if text.strip() else "unknown reason"
    if "torch.compiler.disable" in text:
        remedy = "compile that function too, by taking torch.compiler.disable off it"
    elif any(word in text for word in DATA_DEPENDENT):
        remedy = CAPTURE
    else:
        remedy = (
            "compile the model's blocks on their own (compile_repeated_blocks) and call fpscompile.attach(model) first"
        )
    return (
        f"the graph breaks at {place}: {why}. Attention behind it is compiled apart, where grid and step may not show; "
        f"{remedy}"
    )
