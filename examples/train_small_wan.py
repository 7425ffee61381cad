"""Trains a small Wan on video, densely and from nothing: ``python examples/train_small_wan.py --minutes 30``.

Runs on two cores. Interrupt it whenever you like: the same command goes on where it was. What the other examples load
is ``examples/small_wan/weights.safetensors``, the moving average of the weights in half precision.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from safetensors.torch import load_file
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))
from small_wan import checkpoint, data, flow
from small_wan.model import Size, build

WEIGHTS = Path(__file__).parent / "small_wan" / "weights.safetensors"


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("out/small_wan"), help="folder of the checkpoint and the log")
    parser.add_argument("--steps", type=int, default=20_000, help="optimiser steps in all, those already done included")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="stop after this long")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--ema", type=float, default=0.995)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save-every", type=int, default=200)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--clips", type=Path, help="videos that examples/small_wan/data.py decoded")
    parser.add_argument(
        "--pool", type=Path, help="clips made beforehand by small_wan_experiment.py, instead of fresh ones"
    )
    parser.add_argument("--ship", type=Path, help=f"write the averaged weights here at the end, such as {WEIGHTS}")
    for name, value in Size().as_dict().items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=value)
    return parser.parse_args(argv)


def learning_rate(step: int, args: argparse.Namespace) -> float:
    """A short warm-up, then constant: training may stop anywhere, and the moving average does the annealing."""
    return float(args.lr * min(1.0, (step + 1) / 200))


def main(argv: list[str] | None = None) -> Path:
    args = arguments(argv)
    size = Size(**{name: getattr(args, name) for name in Size().as_dict()})
    model = build(size, args.seed).to(args.device).train()
    ema = {k: v.clone() for k, v in model.state_dict().items()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, 0.98), weight_decay=0.01)
    clips: data.Clips | data.Pool
    if args.pool:
        clips = data.Pool(load_file(args.pool, device=args.device)["clips"], args.seed)
    else:
        clips = data.Clips(data.videos(data.TRAIN, args.clips).values(), size, args.seed)
    path, step = args.out / "checkpoint.safetensors", 0
    if path.exists():
        tensors, facts = checkpoint.read(path, size.as_dict())
        checkpoint.unpack(tensors, model, ema, optimizer)
        step = int(facts["step"])

    def facts_now() -> dict[str, object]:
        command = "python examples/train_small_wan.py " + " ".join(argv if argv is not None else sys.argv[1:])
        return {"size": size.as_dict(), "step": step, "clips": step * args.batch, "seed": args.seed, "command": command}

    def save() -> None:
        checkpoint.write(path, checkpoint.pack(model, ema, optimizer), facts_now())

    args.out.mkdir(parents=True, exist_ok=True)
    started, since, total = time.perf_counter(), 0, torch.zeros(())
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    try:
        with Progress(*columns) as progress, (args.out / "log.jsonl").open("a") as log:
            bar = progress.add_task("training", total=args.steps, completed=step)
            while step < args.steps and time.perf_counter() - started < 60 * args.minutes:
                batch, generator = clips.batch(step, args.batch)
                batch = batch.to(args.device)
                noise = torch.randn(batch.shape, generator=generator).to(args.device)
                u = flow.draw_u(args.batch, generator).to(args.device)
                for group in optimizer.param_groups:
                    group["lr"] = learning_rate(step, args)
                loss = flow.losses(model, batch, noise, u, size).mean()
                flow.check_finite(loss.detach(), step, path)
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                follow(ema, model, min(args.ema, (step + 1) / (step + 10)))
                step, since, total = step + 1, since + 1, total + loss.detach().cpu()
                progress.update(bar, completed=step, description=f"loss {float(loss.detach()):.3f}")
                if step % args.save_every == 0:
                    save()
                    row = {"step": step, "loss": float(total) / since, "seconds": time.perf_counter() - started}
                    log.write(json.dumps(row) + "\n")
                    log.flush()
                    since, total = 0, torch.zeros(())
    except flow.DivergedError:
        raise
    except KeyboardInterrupt:
        pass
    save()
    if args.ship:
        checkpoint.save_weights(args.ship, ema, facts_now())
    return path


@torch.no_grad()
def follow(ema: dict[str, Tensor], model: torch.nn.Module, decay: float) -> None:
    """Moves the average towards the weights, in place."""
    for name, value in model.state_dict().items():
        ema[name].lerp_(value, 1 - decay)


if __name__ == "__main__":
    main()
