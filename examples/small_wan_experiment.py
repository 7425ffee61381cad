"""What FP8 and sparsity do to the small trained Wan, with and without training for them.

    python examples/small_wan_experiment.py dense joint-paper ...     train and evaluate variants; no name: all
    python examples/small_wan_experiment.py --report                  docs/training_measured.md, from what ran

All variants start from ``examples/small_wan/weights.safetensors`` and see the same clips, noise and noise levels. A
variant named ``free-*`` is not trained for what it runs: it has the weights of ``dense``, the control that went on
training densely on equal data. Interrupt and repeat the command: finished work is kept, training goes on from its last
checkpoint.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

sys.path.insert(0, str(Path(__file__).parent))
from small_wan import checkpoint, data, flow
from small_wan.model import Size, build
from train_small_wan import WEIGHTS, follow

TILE = (2, 2, 2)
"""64 tiles on the 8 x 8 x 8 grid: small enough that a density of a tenth still means several tiles."""
REVERSED = [
    {"start": 0.0, "end": 0.2, "density": 0.45, "granularity": "subtile"},
    {"start": 0.2, "end": 0.8, "density": 0.10, "granularity": "head"},
    {"start": 0.8, "end": 1.0, "density": 0.25, "granularity": "tile"},
]
"""The paper's order turned round at its mean density: sparse and coarse in the middle, dense at the ends."""
JOINT: dict[str, dict[str, Any]] = {
    "paper": {"schedule": "paper"},
    "reversed": {"schedule": REVERSED},
    "constant": {"density": 0.2},
    "0.5": {"density": 0.5},
    "0.1": {"density": 0.1},
}
FORWARD: dict[str, dict[str, Any] | None] = {
    "dense": None,
    "free-fp8": {"density": 1.0, "quant": "fp8"},
    "free-sparse": {"schedule": "paper", "quant": "none"},
    "fp8": {"density": 1.0, "quant": "fp8"},
    "sparse": {"schedule": "paper", "quant": "none"},
    **{f"free-{name}": {**kept, "quant": "fp8"} for name, kept in JOINT.items()},
    **{f"joint-{name}": {**kept, "quant": "fp8"} for name, kept in JOINT.items()},
}
"""Options of each variant's attention."""
LEVELS = (0.1, 0.3, 0.5, 0.7, 0.9)
"""Remaining work at which the held-out loss is taken."""


def forward(model: torch.nn.Module, variant: str) -> Any:
    """``model``, or its compilation with the variant's options."""
    options = FORWARD[variant]
    if options is None:
        return model
    torch._dynamo.reset()
    common = {"tile": TILE, "timestep": {"shift": flow.SHIFT}, "inner": "aot_eager", "strict": True}
    lowering = "gather" if options["quant"] == "fp8" else "auto"
    return torch.compile(model, backend="fps", dynamic=False, options={**common, "lowering": lowering, **options})


def train(variant: str, size: Size, args: argparse.Namespace, console: Console) -> dict[str, torch.Tensor]:
    """The averaged weights after ``args.steps`` steps with the variant's forward."""
    model = build(size)
    checkpoint.load_weights(args.weights, model, size.as_dict())
    path, step = args.out / f"{variant}.safetensors", 0
    ema = {k: v.clone() for k, v in model.state_dict().items()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, 0.98), weight_decay=1e-4)
    if path.exists():
        tensors, facts = checkpoint.read(path, size.as_dict())
        checkpoint.unpack(tensors, model, ema, optimizer)
        step = int(facts["step"])
    if step >= args.steps:
        return ema
    run, clips, started = forward(model.train(), variant), data.Clips(data.TRAIN, size, seed=args.seed + 1), time.time()
    while step < args.steps:
        batch, generator = clips.batch(step, args.batch)
        noise = torch.randn(batch.shape, generator=generator)
        loss = flow.losses(run, batch, noise, flow.draw_u(args.batch, generator), size).mean()
        flow.check_finite(loss.detach(), step, path)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        step += 1
        follow(ema, model, args.ema)
        if step % 25 == 0 or step == args.steps:
            facts = {"size": size.as_dict(), "step": step, "variant": variant}
            checkpoint.write(path, checkpoint.pack(model, ema, optimizer), facts)
            console.print(f"{variant}: step {step}, loss {float(loss.detach()):.3f}, {time.time() - started:.0f} s")
    return ema


@torch.no_grad()
def evaluate(variant: str, weights: dict[str, torch.Tensor], size: Size, args: argparse.Namespace) -> dict[str, Any]:
    """Held-out losses [clip][level], and samples from common noise (saved beside), of one variant."""
    model = build(size).eval()
    model.load_state_dict(weights)
    run, losses = forward(model, variant), []
    for share in (0.0, 1.0):  # natural clips of the held-out scene, then generated ones
        clips = data.Clips(data.HELD_OUT, size, seed=777, generated_share=share)
        for number in range(args.clips // 4):
            batch, generator = clips.batch(number, 4)
            noise = torch.randn(batch.shape, generator=generator)
            losses.append(torch.stack([flow.losses(run, batch, noise, torch.full((4,), u), size) for u in LEVELS], 1))
    shape = (args.samples, 3, size.frames, size.pixels, size.pixels)
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(5))
    samples = torch.cat([flow.sample(run, piece, size, steps=10) for piece in noise.split(4)])
    torch.save(samples.half(), args.out / f"{variant}.samples.pt")
    return {
        "variant": variant,
        "levels": LEVELS,
        "natural": torch.cat(losses[: len(losses) // 2]).tolist(),
        "generated": torch.cat(losses[len(losses) // 2 :]).tolist(),
        "steps": args.steps,
        "batch": args.batch,
        "lr": args.lr,
    }


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("variants", nargs="*", help=f"of {', '.join(FORWARD)}")
    parser.add_argument("--report", action="store_true", help="write the report instead of running anything")
    parser.add_argument("--out", type=Path, default=Path("out/small_wan_experiment"))
    parser.add_argument("--docs", type=Path, default=Path(__file__).parent.parent / "docs")
    parser.add_argument("--weights", type=Path, default=WEIGHTS)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--lr", type=float, default=2e-4)
    parser.add_argument("--ema", type=float, default=0.98)
    parser.add_argument("--clips", type=int, default=16, help="held-out clips of each kind, a multiple of 4")
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    for variant in args.variants:
        if variant not in FORWARD:
            parser.error(f"variant {variant!r} is unknown; choose of {', '.join(FORWARD)}")
    if args.clips < 4 or args.clips % 4:
        parser.error(f"--clips {args.clips} is no positive multiple of 4")
    return args


def main(argv: list[str] | None = None) -> None:
    args, size, console = arguments(argv), Size(), Console()
    if args.report:
        from small_wan.report import write_report

        write_report(args.out, args.docs)
        return
    args.out.mkdir(parents=True, exist_ok=True)
    for variant in args.variants or FORWARD:
        result = args.out / f"{variant}.json"
        if result.exists() and json.loads(result.read_text())["steps"] >= args.steps:
            continue
        weights = train("dense" if variant.startswith("free-") else variant, size, args, console)
        result.write_text(json.dumps(evaluate(variant, weights, size, args)) + "\n")
        console.print(f"{variant}: evaluated")


if __name__ == "__main__":
    main()
