"""Denoise a clip with a Wan transformer twice, dense and with fpscompile, step by step, side by side.

    make demo                      # or: python examples/demo_wan.py [--small] [--steps N] [--schedule paper]

The transformer is diffusers' own ``WanTransformer3DModel`` and the loop uses diffusers' own scheduler; nothing in
either is changed. The weights are **random**: the demo shows where the time goes, what was rewritten and how far the
sparse run moves from the dense one, and claims nothing about the quality of videos. So that there is something to
look at, each step's velocity is the exact one from the noise to the clip plus a share of what the network says.

It writes ``out/demo/report.html`` (what was found and rewritten), ``demo.png`` and ``result.json``.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from clip_latents import clip_latents
from demo_picture import draw
from diffusers import FlowMatchEulerDiscreteScheduler, WanTransformer3DModel
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

import fpscompile

SHIFT = 3.0
"""Flow shift of the scheduler, as Wan uses at 480p."""
NETWORK_SHARE = 0.5
"""How much of the random network's output enters the velocity."""


@dataclass(frozen=True)
class Size:
    """How large the demo is."""

    grid: tuple[int, int, int]
    """Latent grid (t, h, w); the transformer merges 2 x 2 latents into a token."""
    heads: int
    layers: int
    steps: int
    text_tokens: int = 128

    @property
    def tokens(self) -> int:
        t, h, w = self.grid
        return t * (h // 2) * (w // 2)


FULL = Size(grid=(13, 48, 80), heads=8, layers=2, steps=10)  # 12,480 tokens: 49 frames of 384 x 640
SMALL = Size(grid=(5, 24, 32), heads=2, layers=1, steps=5)  # 960 tokens


@dataclass
class Step:
    """One denoising step, both ways."""

    index: int
    phase: int
    density: float
    dense_s: float
    fps_s: float
    error: float
    """Norm of the difference of the two model outputs over the norm of the dense one. Each run continues from its own
    latents, so this holds the drift of all steps so far."""


def make_model(size: Size, dtype: torch.dtype) -> WanTransformer3DModel:
    """A Wan transformer, 64 features per head, with random weights from a fixed seed."""
    torch.manual_seed(0)
    model = WanTransformer3DModel(
        num_attention_heads=size.heads,
        attention_head_dim=64,
        text_dim=256,
        ffn_dim=4 * 64 * size.heads,
        num_layers=size.layers,
    )
    for name, parameter in model.named_parameters():  # as from_pretrained(torch_dtype=...) would: norms stay float32
        if not set(name.split(".")) & set(model._keep_in_fp32_modules):
            parameter.data = parameter.data.to(dtype)
    return model.eval().requires_grad_(False)


def make_scheduler(steps: int) -> FlowMatchEulerDiscreteScheduler:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=SHIFT)
    scheduler.set_timesteps(steps)
    return scheduler


class Run:
    """One of the two runs: a compiled model, its scheduler, its latents."""

    def __init__(self, model: Callable[..., Any], steps: int, noise: torch.Tensor, text: torch.Tensor) -> None:
        self.model = model
        self.scheduler = make_scheduler(steps)
        self.latents = noise.clone()
        self.text = text

    def predict(self, timestep: torch.Tensor) -> tuple[torch.Tensor, float]:
        """The network's output [1, 16, t, h, w] at the current latents, and its seconds."""
        started = time.perf_counter()
        latents = self.latents.to(self.text.dtype)
        with torch.no_grad():
            output = self.model(
                hidden_states=latents,
                timestep=timestep.expand(1),
                encoder_hidden_states=self.text,
                return_dict=False,
            )[0]
        return output.float(), time.perf_counter() - started

    def step(self, output: torch.Tensor, timestep: torch.Tensor, straight: torch.Tensor) -> None:
        """Move the latents along the velocity: the straight line to the clip, and a little where the network points."""
        velocity = straight + NETWORK_SHARE * output
        self.latents = self.scheduler.step(velocity, timestep, self.latents, return_dict=False)[0]


def denoise(
    dense: Run,
    fps: Run,
    straight: torch.Tensor,
    schedule: fpscompile.Schedule,
    densities: Sequence[float],
    console: Console,
) -> list[Step]:
    """Both runs, interleaved so that the machine's mood hits both alike."""
    steps: list[Step] = []
    count = len(dense.scheduler.timesteps)
    columns = (
        TextColumn("[bold]{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[state]}"),
    )
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("denoising", total=count, state="")
        for index, timestep in enumerate(dense.scheduler.timesteps):
            dense_output, dense_s = dense.predict(timestep)
            fps_output, fps_s = fps.predict(timestep)
            error = float((fps_output - dense_output).norm() / dense_output.norm())
            dense.step(dense_output, timestep, straight)
            fps.step(fps_output, timestep, straight)
            phase = schedule.phase_at(index / count)
            steps.append(Step(index, phase, densities[phase], dense_s, fps_s, error))
            state = f"phase {phase}: dense {dense_s:.2f} s, fps {fps_s:.2f} s, {dense_s / fps_s:.2f}x"
            progress.update(task, advance=1, state=state)
    return steps


def phase_table(steps: list[Step], schedule: fpscompile.Schedule) -> Table:
    """Time, density and error of each phase, and of the whole loop."""
    table = Table(title="Seconds per step of the whole transformer, compile time excluded")
    for name in ("phase", "progress", "steps", "density", "dense", "fps", "speed-up", "rel. L2 error"):
        table.add_column(name, justify="right")
    for number, phase in enumerate(schedule.phases):
        mine = [step for step in steps if step.phase == number]
        if not mine:
            continue
        dense, fps = (sum(getattr(step, name) for step in mine) / len(mine) for name in ("dense_s", "fps_s"))
        worst = max(step.error for step in mine)
        span = f"{phase.start:g} to {phase.end:g}"
        row = (f"{number}", span, f"{len(mine)}", f"{mine[0].density:.3f}", f"{dense:.2f}", f"{fps:.2f}")
        table.add_row(*row, f"{dense / fps:.2f}x", f"{worst:.1e}")
    dense, fps = sum(step.dense_s for step in steps), sum(step.fps_s for step in steps)
    mean = sum(step.density for step in steps) / len(steps)
    table.add_section()
    total = ("all", "0 to 1", f"{len(steps)}", f"{mean:.3f}", f"{dense:.1f} s", f"{fps:.1f} s", f"{dense / fps:.2f}x")
    table.add_row(*total, f"{steps[-1].error:.1e}", style="bold")
    return table


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--small", action="store_true", help="a few hundred tokens: to try, not to time")
    parser.add_argument("--steps", type=int, help="denoising steps")
    parser.add_argument("--schedule", default="training_free", choices=("training_free", "paper"))
    # Processors without AVX-512 emulate bfloat16 at a fraction of float32's speed.
    quick = "bfloat16" if torch.backends.cpu.get_cpu_capability().startswith("AVX512") else "float32"
    parser.add_argument("--dtype", default=quick, choices=("bfloat16", "float32"), help="default: the faster here")
    parser.add_argument("--inner", default="inductor", help="compiler of the dense run and of the rest of the graph")
    parser.add_argument("--out", type=Path, default=Path("out/demo"), help="folder for the page, picture and figures")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the demo; returns what ``result.json`` holds."""
    args = parse(argv)
    size = SMALL if args.small else FULL
    count = args.steps or size.steps
    dtype = getattr(torch, args.dtype)
    console = Console(width=None if sys.stdout.isatty() else 120)
    started = time.perf_counter()
    args.out.mkdir(parents=True, exist_ok=True)

    clean, codec = clip_latents(size.grid)
    generator = torch.Generator().manual_seed(1)
    noise = torch.randn(clean.shape, generator=generator)
    text = torch.randn(1, size.text_tokens, 256, generator=generator).to(dtype)  # no text encoder: random too
    model = make_model(size, dtype)
    parameters = sum(p.numel() for p in model.parameters()) / 1e6
    console.print(
        f"[bold]WanTransformer3DModel[/] {size.layers} layers, {size.heads} heads x 64, {parameters:.1f} M random "
        f"weights, {args.dtype}; {size.tokens:,} video tokens; {count} steps on {torch.get_num_threads()} threads"
    )

    schedule = fpscompile.Schedule.of(args.schedule)
    options = {
        "schedule": schedule,
        "inner": args.inner,
        "timestep": {"input": "timestep", "shift": SHIFT},  # attach tells the step; this is what is read without it
    }
    call = {
        "hidden_states": noise.to(dtype),
        "timestep": torch.tensor([1000.0]),
        "encoder_hidden_states": text,
        "return_dict": False,
    }
    with torch.no_grad():
        report = fpscompile.explain(model, options=options, **call)
    console.print(report)
    report.save_html(args.out / "report.html")
    rewritten = [site for site in report.sites if site.rewritten]
    if not rewritten:
        raise SystemExit("no site was rewritten: the table above says why")

    dense = Run(torch.compile(copy.deepcopy(model), backend=args.inner), count, noise, text)
    fps = Run(torch.compile(model, backend="fps", options=options), count, noise, text)
    with console.status("starting the compiler"):
        torch.compile(lambda x: x + 1, backend=args.inner)(torch.ones(8))  # imports and self-tests are nobody's cost
    with fpscompile.attach(fps.model, scheduler=fps.scheduler):
        first_s = {}
        for name, run in (("dense", dense), ("fps", fps)):
            with console.status(f"compiling, {name}: {args.inner}"):
                first_s[name] = run.predict(dense.scheduler.timesteps[0])[1]
        steps = denoise(dense, fps, noise - clean, schedule, rewritten[0].density, console)
    console.print(phase_table(steps, schedule))
    console.print(f"first call, compilation included: dense {first_s['dense']:.1f} s, fps {first_s['fps']:.1f} s")

    drift = float((fps.latents - dense.latents).norm() / dense.latents.norm())
    result = {
        "model": {"layers": size.layers, "heads": size.heads, "tokens": size.tokens, "dtype": args.dtype},
        "threads": torch.get_num_threads(),
        "schedule": schedule.name,
        "first_call_s": first_s,
        "steps": [asdict(step) for step in steps],
        "latents_rel_l2": drift,
        "seconds": time.perf_counter() - started,
    }
    (args.out / "result.json").write_text(json.dumps(result, indent=2) + "\n")
    draw(args.out / "demo.png", codec.decode(clean), codec.decode(dense.latents), codec.decode(fps.latents), steps)
    console.print(
        f"final latents differ by {drift:.1e} (relative L2). Random weights: this compares the two runs, not quality.\n"
        f"wrote {args.out}/report.html, demo.png, result.json in {result['seconds']:.0f} s"
    )
    return result


if __name__ == "__main__":
    main()
