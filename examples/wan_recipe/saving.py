"""What training leaves on disk: one folder per save, whole or not there at all, and readable by plain diffusers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)


def _whole() -> StateDictOptions:
    """Whole tensors, on the first rank."""
    return StateDictOptions(full_state_dict=True, cpu_offload=True, broadcast_from_rank0=dist.is_initialized())


class CheckpointError(RuntimeError):
    """A checkpoint that does not belong to this run; the message names what differs."""


def save(folder: Path, model: Any, optimizer: torch.optim.Optimizer, facts: dict[str, Any], lora: bool) -> None:
    """Writes ``folder`` anew. The old one stays until the new one is whole. To be called by all ranks.

    ``transformer/`` is what ``WanTransformer3DModel.from_pretrained`` reads; with LoRA it is
    ``pytorch_lora_weights.safetensors``, for ``load_lora_adapter(folder, prefix=None)``.
    """
    weights = get_model_state_dict(model, options=_whole())
    moments = get_optimizer_state_dict(model, optimizer, options=_whole())
    if not dist.is_initialized() or dist.get_rank() == 0:
        partial = folder.with_name(folder.name + ".partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        if lora:
            adapters = {k.replace(".default.", "."): v for k, v in weights.items() if ".lora_" in k}
            save_file(_plain(adapters), partial / "pytorch_lora_weights.safetensors")
        else:
            (partial / "transformer").mkdir()
            save_file(
                _plain(weights), partial / "transformer" / "diffusion_pytorch_model.safetensors", {"format": "pt"}
            )
            model.save_config(partial / "transformer")
        torch.save(moments, partial / "optimizer.pt")
        (partial / "facts.json").write_text(json.dumps(facts) + "\n")
        old = folder.with_name(folder.name + ".old")
        shutil.rmtree(old, ignore_errors=True)
        if folder.exists():
            folder.rename(old)
        partial.rename(folder)
        shutil.rmtree(old, ignore_errors=True)
    if dist.is_initialized():
        dist.barrier()


def resume(folder: Path, model: Any, optimizer: torch.optim.Optimizer, facts: dict[str, Any], lora: bool) -> int:
    """Puts a saved state into ``model`` and ``optimizer``; returns the step reached, 0 where nothing was saved.

    Raises:
        CheckpointError: the folder is of another model or of other options.
    """
    old = folder.with_name(folder.name + ".old")
    if not folder.exists() and old.exists():  # interrupted between the two renames
        old.rename(folder)
    if not folder.exists():
        return 0
    theirs = json.loads((folder / "facts.json").read_text())
    differ = [f"{k}: saved {theirs.get(k)}, now {v}" for k, v in facts.items() if k != "step" and theirs.get(k) != v]
    if differ:
        raise CheckpointError(f"{folder} is of another run ({'; '.join(differ)}): give another --out, or its options")
    if lora:
        adapters = load_file(folder / "pytorch_lora_weights.safetensors")
        whole = get_model_state_dict(model, options=_whole())  # empty on all ranks but the first
        weights = {k: adapters.get(k.replace(".default.", "."), v) for k, v in whole.items()}
    else:
        weights = load_file(folder / "transformer" / "diffusion_pytorch_model.safetensors")
    set_model_state_dict(model, weights, options=_whole())
    set_optimizer_state_dict(model, optimizer, torch.load(folder / "optimizer.pt"), options=_whole())
    return int(theirs["step"])


def _plain(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: value.contiguous() for name, value in weights.items()}
