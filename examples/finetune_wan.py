"""Fine-tunes a diffusers Wan checkpoint with FP8 and sparse attention switched on.

    torchrun --nproc-per-node 8 examples/finetune_wan.py --model Wan2.1-T2V-1.3B-Diffusers --data clips --out out/tuned

``--model`` is a local pipeline folder, of which ``scheduler`` and ``transformer`` (``--part transformer_2``) are read.
``--data`` holds latents and prompt embeddings, a file per clip: see ``wan_recipe/clips.py``.

* Each block is compiled alone, then sharded (FSDP2). A sharded block's graph shows neither timestep nor grid, so
  ``fpscompile.attach`` tells both, per call: every batch trains one denoising step of the pipeline's own scheduler, in
  the phase of the schedule that inference will run at that step.
* ``--context-parallel ulysses --context-degree N`` shares each sequence between N ranks.
* ``--distill W`` adds W times the distance to the dense model's prediction (a second, frozen copy of the weights).
* ``--lora R`` trains adapters of rank R (peft) on attention and feed-forward layers instead of all weights.
* Interrupt and repeat: training goes on from the last save. ``OUT/last/transformer`` loads into plain diffusers.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from diffusers import WanTransformer3DModel
from rich.console import Console
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

import fpscompile
from fpscompile.backend import fps

sys.path.insert(0, str(Path(__file__).parent))
from wan_recipe import saving, ulysses
from wan_recipe.clips import Clips, Steps

LORA_LAYERS = ("to_q", "to_k", "to_v", "to_out.0", "ffn.net.0.proj", "ffn.net.2")

Evaluate = Callable[[int, Any], dict[str, float]]
"""(step, model) -> figures to log. The model is in evaluation mode and runs compiled, on all ranks."""


class DivergedError(RuntimeError):
    """The loss is not a finite number."""


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="folder of a diffusers pipeline")
    parser.add_argument("--part", default="transformer", choices=["transformer", "transformer_2"])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--held-out", type=Path, help="clips to evaluate on")
    parser.add_argument("--out", type=Path, default=Path("out/finetuned"))
    parser.add_argument("--steps", type=int, default=1000, help="in all, those already done included")
    parser.add_argument("--batch", type=int, default=1, help="clips per data-parallel rank")
    parser.add_argument("--lr", type=float, default=1e-5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save-every", type=int, default=100)
    parser.add_argument("--evaluate-every", type=int, default=100)
    parser.add_argument("--inference-steps", type=int, default=50, help="of the scheduler; these are what is trained")
    parser.add_argument("--schedule", default="paper", help="a preset, or a density such as 0.2")
    parser.add_argument("--tile", type=int, nargs=3, help="tokens of a tile along t, h and w")
    parser.add_argument("--quant", default="auto", choices=["auto", "fp8", "none"])
    parser.add_argument("--lowering", default="auto")
    parser.add_argument("--inner", default="inductor")
    parser.add_argument("--dense", action="store_true", help="without fpscompile: the control on equal data")
    parser.add_argument("--distill", type=float, default=0.0)
    parser.add_argument("--lora", type=int, default=0)
    parser.add_argument("--checkpointing", action="store_true", help="gradient checkpointing")
    parser.add_argument("--context-parallel", default="ulysses")
    parser.add_argument("--context-degree", type=int, default=1)
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"], help="of the computation")
    return parser.parse_args(argv)


def meshes(args: argparse.Namespace, device: str) -> DeviceMesh | None:
    """(data, context) ranks, or None alone. Parameters are sharded over all of them."""
    if "WORLD_SIZE" not in os.environ and not dist.is_initialized():
        return None
    if not dist.is_initialized():
        dist.init_process_group("nccl" if device == "cuda" else "gloo")
    world = dist.get_world_size()
    if device == "cuda":
        torch.cuda.set_device(dist.get_rank() % torch.cuda.device_count())
    if world % args.context_degree:
        raise ulysses.ParallelError(f"--context-degree {args.context_degree} does not divide the {world} ranks")
    return init_device_mesh(
        device, (world // args.context_degree, args.context_degree), mesh_dim_names=("data", "context")
    )


def options_of(args: argparse.Namespace) -> dict[str, Any]:
    """The backend's options."""
    try:
        kept: dict[str, Any] = {"density": float(args.schedule)}
    except ValueError:
        kept = {"schedule": args.schedule}
    if args.tile:
        kept["tile"] = tuple(args.tile)
    return {**kept, "quant": args.quant, "lowering": args.lowering, "inner": args.inner, "strict": True}


def prepare(args: argparse.Namespace, mesh: DeviceMesh | None, device: str) -> tuple[Any, Any]:
    """(the model to train, the dense teacher or None), compiled, adapted and sharded in the order that this needs."""
    model = WanTransformer3DModel.from_pretrained(args.model, subfolder=args.part, torch_dtype=torch.float32).to(device)
    ulysses.check(
        args.context_parallel, args.context_degree, mesh.size() if mesh else 1, model.config.num_attention_heads
    )
    teacher = None
    if args.distill:
        teacher = WanTransformer3DModel.from_pretrained(args.model, subfolder=args.part, torch_dtype=torch.float32)
        teacher = teacher.to(device).requires_grad_(False).eval()
    if args.lora:
        from peft import LoraConfig

        model.requires_grad_(False)
        # alpha = rank: the factor is 1, so that the adapters alone say everything
        model.add_adapter(LoraConfig(r=args.lora, lora_alpha=args.lora, target_modules=list(LORA_LAYERS)))
    if args.checkpointing:
        model.enable_gradient_checkpointing()
    for each in filter(None, (model, teacher)):
        if args.context_degree > 1:
            assert mesh is not None
            ulysses.apply(each, mesh["context"].get_group())
        for block in each.blocks:
            if each is model and not args.dense:
                block.compile(backend=fps, options=options_of(args), dynamic=False)
            if mesh is not None:
                _shard(block, mesh, args.dtype)
        if mesh is not None:
            _shard(each, mesh, args.dtype)
    return model.train(), teacher


def _shard(module: Any, mesh: DeviceMesh, dtype: str) -> None:
    policy = MixedPrecisionPolicy(param_dtype=getattr(torch, dtype), reduce_dtype=torch.float32)
    fully_shard(module, mesh=mesh._flatten("all") if mesh.ndim > 1 else mesh, mp_policy=policy)


class Trainer:
    """The parts of a run, and its steps."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.device = args, "cuda" if torch.cuda.is_available() else "cpu"
        self.mesh = meshes(args, self.device)
        self.model, self.teacher = prepare(args, self.mesh, self.device)
        self.steps = Steps(_scheduler(args.model), args.inference_steps, *_range(args))
        self.data = Clips(args.data, self.model.config.in_channels)
        self.attachment = fpscompile.attach(self.model, grid=self.grid)
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=args.lr, betas=(0.9, 0.95), weight_decay=0.0)

    @property
    def data_rank(self) -> int:
        return self.mesh["data"].get_local_rank() if self.mesh is not None else 0

    @property
    def first(self) -> bool:
        return self.mesh is None or dist.get_rank() == 0

    def grid(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[int, int, int]:
        """Tokens (t, h, w) of a call. Wan's latents are [B, C, T, H, W], which their sizes alone need not tell."""
        t, h, w = (n // p for n, p in zip(kwargs["hidden_states"].shape[2:], self.model.config.patch_size, strict=True))
        return (t, h, w)

    def facts(self, step: int) -> dict[str, Any]:
        """What a checkpoint must agree on, and the step."""
        config = {k: v for k, v in dict(self.model.config).items() if not k.startswith("_")}
        return json.loads(json.dumps({"config": config, "lora": self.args.lora, "part": self.args.part, "step": step}))

    def predict(self, model: Any, latents: Tensor, prompt_embeds: Tensor, step: int) -> Tensor:
        """The model's velocity at a denoising step."""
        timestep = self.steps.timesteps[step].expand(len(latents)).to(self.device)
        with torch.autocast(self.device, torch.bfloat16, enabled=self.mesh is None and self.args.dtype == "bfloat16"):
            out: Tensor = model(
                hidden_states=latents, timestep=timestep, encoder_hidden_states=prompt_embeds, return_dict=False
            )[0]
        return out.float()

    def loss(self, clips: Clips, number: int, distill: float = 0.0) -> Tensor:
        """Of batch ``number``: flow matching, and ``distill`` times the distance to the teacher."""
        batch = clips.batch(number, self.data_rank, self.args.batch, self.steps, self.args.seed)
        noisy, prompts = self.steps.noisy(batch).to(self.device), batch.prompt_embeds.to(self.device)
        self.attachment.step(batch.step, self.steps.count)
        velocity = self.predict(self.model, noisy, prompts, batch.step)
        loss = (velocity - (batch.noise - batch.latents).to(self.device)).square().mean()
        if self.teacher is not None and distill:
            with torch.no_grad():
                wanted = self.predict(self.teacher, noisy, prompts, batch.step)
            loss = loss + distill * (velocity - wanted).square().mean()
        return loss

    def train_step(self, number: int) -> float:
        """One optimiser step; returns the loss, averaged over ranks.

        Raises:
            DivergedError: the loss is not finite. No rank has stepped.
        """
        loss = self.loss(self.data, number, self.args.distill)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        value = self.mean(loss.detach())
        if not math.isfinite(value):
            raise DivergedError(
                f"loss is {value} at step {number}; resume from the save {self.args.out / 'last'} with a lower --lr"
            )
        torch.nn.utils.clip_grad_norm_([p for p in self.model.parameters() if p.requires_grad], 1.0)
        self.optimizer.step()
        return value

    def mean(self, value: Tensor) -> float:
        """Over all ranks."""
        value = value.clone()
        if self.mesh is not None:
            dist.all_reduce(value)
            value /= dist.get_world_size()
        return float(value)

    @torch.no_grad()
    def held_out(self, step: int, model: Any) -> dict[str, float]:
        """The default evaluation: the flow-matching loss on four fixed batches of the held-out folder."""
        if self.args.held_out is None:
            return {}
        clips = Clips(self.args.held_out, self.model.config.in_channels)
        return {"held_out": sum(self.mean(self.loss(clips, number)) for number in range(4)) / 4}


def _scheduler(folder: Path) -> Any:
    import diffusers

    config = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())
    return getattr(diffusers, config["_class_name"]).from_pretrained(folder, subfolder="scheduler")


def _range(args: argparse.Namespace) -> tuple[float, float]:
    """Timesteps that the part serves: in Wan 2.2, ``transformer`` the noisier ones and ``transformer_2`` the rest."""
    index = args.model / "model_index.json"
    ratio = json.loads(index.read_text()).get("boundary_ratio") if index.exists() else None
    if ratio is None:
        return 0.0, math.inf
    return (1000 * ratio, math.inf) if args.part == "transformer" else (0.0, 1000 * ratio)


def main(argv: Sequence[str] | None = None, evaluate: Evaluate | None = None) -> list[float]:
    """Trains as the options say; returns the losses of the steps of this call.

    Args:
        evaluate: called every ``--evaluate-every`` steps, instead of the loss on ``--held-out``.
    """
    args, console = arguments(argv), Console()
    torch.manual_seed(args.seed)
    run = Trainer(args)
    last = args.out / "last"
    begun = saving.resume(last, run.model, run.optimizer, run.facts(0), bool(args.lora))
    losses: list[float] = []
    for number in range(begun, args.steps):
        losses.append(run.train_step(number))
        done = number + 1
        report: dict[str, float] = {"step": done, "loss": losses[-1]}
        if done % args.evaluate_every == 0 or done == args.steps:
            run.model.eval()
            report |= (evaluate or run.held_out)(done, run.model)
            run.model.train()
        if done % args.save_every == 0 or done == args.steps:
            saving.save(last, run.model, run.optimizer, run.facts(done), bool(args.lora))
        if run.first:
            console.print_json(json.dumps(report), indent=None)
    run.attachment.detach()
    return losses


if __name__ == "__main__":
    main()
    if dist.is_initialized():
        dist.destroy_process_group()
