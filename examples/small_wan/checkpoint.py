"""Training state in one safetensors file: weights, their moving average, the optimiser's moments, step and size."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be used here; the message names what differs."""


def write(path: Path, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
    """Writes beside ``path`` first and renames: an interruption leaves the old file whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    try:
        save_file({k: v.detach().contiguous() for k, v in tensors.items()}, partial, {"facts": json.dumps(dict(facts))})
        with partial.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def read(path: Path, size: Mapping[str, int]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and facts of a checkpoint that :func:`write` made.

    Raises:
        CheckpointError: the file is missing, damaged or of a model of another size.
    """
    if not path.is_file():
        raise CheckpointError(f"{path}: no such checkpoint; examples/train_small_wan.py writes one")
    try:
        with safe_open(path, framework="pt") as file:
            facts = json.loads((file.metadata() or {}).get("facts", "{}"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
    except (SafetensorError, ValueError) as error:
        raise CheckpointError(f"{path} is no whole safetensors file ({error}); use an older checkpoint") from error
    theirs = facts.get("size")
    if theirs is None:
        raise CheckpointError(f"{path} says nothing of its model's size: it is not from examples/train_small_wan.py")
    differ = [
        f"{k}: checkpoint {theirs.get(k)}, here {size.get(k)}"
        for k in sorted({*theirs, *size})
        if theirs.get(k) != size.get(k)
    ]
    if differ:
        raise CheckpointError(f"{path} is of another model ({'; '.join(differ)}); build the model with its size")
    return tensors, facts


def pack(model: nn.Module, ema: Mapping[str, Tensor], optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Everything that training resumes from, by name."""
    out = {f"model.{k}": v for k, v in model.state_dict().items()}
    out |= {f"ema.{k}": v for k, v in ema.items()}
    for index, state in optimizer.state_dict()["state"].items():
        out |= {f"optimizer.{index}.{k}": torch.as_tensor(v) for k, v in state.items()}
    return out


def part(tensors: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    """The tensors under one prefix, the prefix taken off."""
    return {k.removeprefix(name + "."): v for k, v in tensors.items() if k.startswith(name + ".")}


def unpack(
    tensors: Mapping[str, Tensor], model: nn.Module, ema: dict[str, Tensor], optimizer: torch.optim.Optimizer
) -> None:
    """The inverse of :func:`pack`, in place."""
    model.load_state_dict(part(tensors, "model"))
    for name, value in part(tensors, "ema").items():
        ema[name].copy_(value)
    state: dict[int, dict[str, Tensor]] = {}
    for name, value in part(tensors, "optimizer").items():
        index, key = name.split(".", 1)
        state.setdefault(int(index), {})[key] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def save_weights(path: Path, weights: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
    """Weights alone, in half precision, as shipped. The size must be in ``facts``."""
    write(path, {k: v.half() for k, v in weights.items()}, facts)


def load_weights(path: Path, model: nn.Module, size: Mapping[str, int]) -> dict[str, Any]:
    """Reads weights that :func:`save_weights`, or a training checkpoint's moving average, holds; returns the facts."""
    tensors, facts = read(path, size)
    averaged = part(tensors, "ema")
    model.load_state_dict({k: v.float() for k, v in (averaged or tensors).items()})
    return facts
