"""Weights trained for a variant at one place of the experiment (held-out scene, seed), and what they are worth."""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from small_wan import checkpoint, data, flow
from small_wan.model import Size, build
from small_wan.variants import Arithmetic, forward

LEVELS = (0.1, 0.3, 0.5, 0.7, 0.9)
"""Remaining work at which the held-out loss is taken."""


@dataclass(frozen=True)
class Budget:
    """How much each variant is trained and looked at: equal for all of them."""

    steps: int = 150
    batch: int = 4
    lr: float = 2e-4
    ema: float = 0.98
    clips: int = 16
    """Held-out clips of each kind, a multiple of ``group``."""
    samples: int = 4
    """Clips sampled, a multiple of ``group``."""
    group: int = 4
    """Clips per call in evaluation."""
    sample_steps: int = 20


@dataclass(frozen=True)
class Place:
    """Where a trial reads and writes."""

    out: Path
    scene: str
    """Held out."""
    seed: int
    clips: Path | None = None
    """Decoded videos."""
    until: float = float("inf")
    """Time (``time.time()``) at which training stops, to go on in another call."""

    @property
    def folder(self) -> Path:
        return self.out / self.scene / str(self.seed)

    @property
    def pool(self) -> Path:
        return self.out / self.scene / "pool.safetensors"


class OutOfTimeError(RuntimeError):
    """Training stopped before its last step; the checkpoint holds how far it came."""


def train(variant: str, base: Path, size: Size, place: Place, budget: Budget, how: Arithmetic) -> dict[str, Tensor]:
    """The averaged weights after ``budget.steps`` steps from ``base`` with the variant's attention.

    Raises:
        OutOfTimeError: ``place.until`` came first.
    """
    model = build(size).to(how.device)
    checkpoint.load_weights(base, model, size.as_dict())
    path, step = place.folder / f"{variant}.safetensors", 0
    ema = {k: v.clone() for k, v in model.state_dict().items()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=budget.lr, betas=(0.9, 0.98), weight_decay=1e-4)
    if path.exists():
        tensors, facts = checkpoint.read(path, size.as_dict())
        checkpoint.unpack(tensors, model, ema, optimizer)
        step = int(facts["step"])
    if step >= budget.steps:
        return ema
    pool = data.Pool(load_file(place.pool, device=how.device)["clips"], place.seed + 1)
    run, started, first = forward(model.train(), variant, how), time.time(), step
    while step < budget.steps:
        batch, generator = pool.batch(step, budget.batch)
        noise = torch.randn(batch.shape, generator=generator).to(how.device)
        u = flow.draw_u(budget.batch, generator).to(how.device)
        loss = flow.losses(run, batch, noise, u, size).mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        late = time.time() >= place.until
        last = late or step + 1 == budget.steps
        if last or (step + 1) % 25 == 0:  # and so whenever weights are written
            flow.check_finite(loss.detach(), step, path)
        optimizer.step()
        step += 1
        _follow(ema, model, budget.ema)
        if last or step % 200 == 0:
            checkpoint.write(path, checkpoint.pack(model, ema, optimizer), {"size": size.as_dict(), "step": step})
            _log(place, variant, step=step, loss=float(loss.detach()), seconds=time.time() - started, first=first)
        if late and step < budget.steps:
            raise OutOfTimeError(f"{path}: {step} of {budget.steps} steps; repeat the command to go on")
    return ema


@torch.no_grad()
def _follow(ema: dict[str, Tensor], model: torch.nn.Module, decay: float) -> None:
    state = model.state_dict()
    torch._foreach_lerp_(list(ema.values()), [state[name] for name in ema], 1 - decay)


def _log(place: Place, variant: str, **facts: float) -> None:
    place.folder.mkdir(parents=True, exist_ok=True)
    with (place.folder / "log.jsonl").open("a") as file:
        file.write(json.dumps({"variant": variant, **facts}) + "\n")


@torch.no_grad()
def evaluate(
    name: str,
    variant: str,
    weights: dict[str, Tensor],
    size: Size,
    place: Place,
    budget: Budget,
    how: Arithmetic,
    facts: dict[str, Any],
) -> None:
    """Writes ``name.json``, the held-out losses [clip][level], and ``name.samples``, clips from the common noise."""
    model = build(size).to(how.device).eval()
    model.load_state_dict(weights)
    run = forward(model, variant, how)
    kinds = {}
    for kind, share in (("natural", 0.0), ("generated", 1.0)):
        source = data.Clips(data.videos((place.scene,), place.clips).values(), size, seed=777, generated_share=share)
        rows = []
        for number in range(budget.clips // budget.group):
            batch, generator = source.batch(number, budget.group)
            noise = torch.randn(batch.shape, generator=generator)
            clips, noise = batch.to(how.device), noise.to(how.device)
            levels = [torch.full((budget.group,), u, device=how.device) for u in LEVELS]
            rows.append(torch.stack([flow.losses(run, clips, noise, u, size) for u in levels], 1).cpu())
        kinds[kind] = torch.cat(rows).tolist()
    shape = (budget.samples, 3, size.frames, size.pixels, size.pixels)
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(5)).to(how.device)
    pieces = [flow.sample(run, piece, size, steps=budget.sample_steps) for piece in noise.split(budget.group)]
    place.folder.mkdir(parents=True, exist_ok=True)
    save_file({"samples": torch.cat(pieces).half().cpu()}, place.folder / f"{name}.samples.safetensors")
    result = {**facts, "levels": LEVELS, **kinds, "budget": asdict(budget), "arithmetic": asdict(how)}
    (place.folder / f"{name}.json").write_text(json.dumps(result) + "\n")


def finished(name: str, place: Place, budget: Budget) -> bool:
    """Whether ``name`` was evaluated with this budget."""
    path = place.folder / f"{name}.json"
    return path.exists() and json.loads(path.read_text())["budget"] == asdict(budget)
