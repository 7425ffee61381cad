"""What FP8 and sparsity do to the small Wan, with and without training for them.

    python examples/small_wan_experiment.py                            every variant on this machine
    python examples/small_wan_experiment.py --preset gpu --jobs 14     a model trained anew for each scene, on a GPU
    python examples/small_wan_experiment.py --report                   docs/training_measured.md, from what ran

All variants start from the same base, see the same clips, noise and noise levels, and take equally many steps. A
variant named ``free-*`` is not trained for what it runs: it has the weights of ``dense``, the control that went on
training densely on equal data. With ``--base-steps`` each scene is held out in turn from a base of its own; without it,
all start from ``examples/small_wan/weights.safetensors``, which has seen all scenes but carphone. Interrupt and repeat
the command: finished work is kept, training goes on from its last checkpoint.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).parent))
import train_small_wan
from small_wan import checkpoint, data
from small_wan.model import Size
from small_wan.trial import Budget, OutOfTimeError, Place, evaluate, finished, train
from small_wan.variants import VARIANTS, Arithmetic

PRESETS: dict[str, dict[str, Any]] = {
    "cpu": {"steps": 150, "batch": 4, "clips": 16, "samples": 4, "group": 4, "pool": 1024, "seeds": 1},
    "gpu": {
        "steps": 800,
        "batch": 16,
        "clips": 64,
        "samples": 16,
        "group": 16,
        "pool": 6144,
        "seeds": 2,
        "base_steps": 4000,
        "scenes": data.SCENES,
        "ema": 0.995,
    },
}
"""Defaults of the options."""
BASE_BATCH = 64


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("variants", nargs="*", help=f"of dense, {', '.join(VARIANTS)}; none: all")
    parser.add_argument("--preset", choices=sorted(PRESETS), default="cpu", help="defaults of what is not given")
    parser.add_argument("--report", action="store_true", help="write the report instead of running anything")
    parser.add_argument("--out", type=Path, default=Path("out/small_wan_experiment"))
    parser.add_argument("--docs", type=Path, default=Path(__file__).parent.parent / "docs")
    parser.add_argument("--clips-file", type=Path, help="videos that examples/small_wan/data.py decoded")
    parser.add_argument("--weights", type=Path, default=train_small_wan.WEIGHTS, help="base, unless --base-steps")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--inner", default="aot_eager", help="compiler of the rest of the graph")
    parser.add_argument("--lowering", default="", help="lowering of the attention; default by device")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="stop training after this long")
    parser.add_argument("--jobs", type=int, default=1, help="processes that share the device")
    parser.add_argument("--scenes", nargs="+", choices=data.SCENES, default=data.HELD_OUT, help="held out, in turn")
    parser.add_argument("--base-steps", type=int, default=0, help="train a base for each scene, from nothing")
    parser.add_argument("--until", type=float, default=float("inf"), help=argparse.SUPPRESS)
    parser.add_argument("--part", choices=("base", "trained", "free"), help=argparse.SUPPRESS)
    parser.add_argument("--first-seed", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--seeds", type=int, help="seeds of training, from 0")
    parser.add_argument("--pool", type=int, help="training clips")
    for name in ("steps", "batch", "clips", "samples", "group"):
        parser.add_argument(f"--{name}", type=int)
    parser.add_argument("--sample-steps", type=int, default=Budget.sample_steps)
    parser.add_argument("--lr", type=float, default=Budget.lr)
    parser.add_argument("--ema", type=float, default=Budget.ema)
    known, _ = parser.parse_known_args(argv)
    parser.set_defaults(**PRESETS[known.preset])
    args = parser.parse_args(argv)
    for variant in args.variants:
        if variant not in ("dense", *VARIANTS):
            parser.error(f"variant {variant!r} is unknown; choose of dense, {', '.join(VARIANTS)}")
    for name in ("clips", "samples"):
        if getattr(args, name) < 1 or getattr(args, name) % args.group:
            parser.error(f"--{name} {getattr(args, name)} is no positive multiple of --group {args.group}")
    if not args.base_steps and tuple(args.scenes) != data.HELD_OUT:
        parser.error(f"the shipped base has seen {data.TRAIN}: give --base-steps to hold out {args.scenes}")
    args.until = min(args.until, time.time() + 60 * args.minutes)
    return args


def pools(args: argparse.Namespace, size: Size) -> None:
    """Writes the training clips of each held-out scene that has none yet."""
    missing = [scene for scene in args.scenes if not (args.out / scene / "pool.safetensors").exists()]
    if not missing:
        return
    executor = ProcessPoolExecutor(args.jobs, get_context("spawn")) if args.jobs > 1 else None
    for scene in missing:
        names = [name for name in data.SCENES if name != scene]
        run = executor.map if executor else map
        clips = data.make_pool(names, args.clips_file, size, args.pool, seed=11, run=run)
        (args.out / scene).mkdir(parents=True, exist_ok=True)
        save_file({"clips": clips}, args.out / scene / "pool.safetensors")
    if executor:
        executor.shutdown()


def base_of(scene: str, args: argparse.Namespace) -> Path:
    """The weights that every variant of a scene starts from, trained first where there are none.

    Raises:
        OutOfTimeError: the base needs another call.
    """
    if not args.base_steps:
        path: Path = args.weights
        return path
    out = args.out / scene / "base"
    path = out / "checkpoint.safetensors"
    if not path.exists() or checkpoint.read(path, Size().as_dict())[1]["step"] < args.base_steps:
        minutes = max(0.0, (args.until - time.time()) / 60)
        argv = ["--out", str(out), "--steps", str(args.base_steps), "--batch", str(BASE_BATCH), "--lr", "0.0015"]
        argv += ["--pool", str(args.out / scene / "pool.safetensors"), "--device", args.device]
        train_small_wan.main([*argv, "--minutes", str(minutes)])
        if checkpoint.read(path, Size().as_dict())[1]["step"] < args.base_steps:
            raise OutOfTimeError(f"{path}: the base needs {args.base_steps} steps; repeat the command to go on")
    return path


def run_variant(variant: str, scene: str, seeds: Sequence[int], args: argparse.Namespace, console: Console) -> None:
    """Trains and evaluates a variant; one that is not "dense" also on the dense control's weights."""
    size, base = Size(), base_of(scene, args)
    fields = ("steps", "batch", "lr", "ema", "clips", "samples", "group", "sample_steps")
    budget = Budget(**{name: getattr(args, name) for name in fields})
    how = Arithmetic(args.device, args.inner, args.lowering)
    jobs = {"trained": "dense" if variant == "dense" else f"joint-{variant}"}
    if variant != "dense":
        jobs["free"] = f"free-{variant}"
    for seed in seeds:
        place = Place(args.out, scene, seed, args.clips_file, args.until)
        for name in [name for part, name in jobs.items() if args.part in (None, part)]:
            if finished(name, place, budget):
                continue
            weights = train("dense" if name.startswith("free-") else variant, base, size, place, budget, how)
            started = time.time()
            facts = {"variant": name, "scene": scene, "seed": seed, "base": str(base)}
            evaluate(name, variant, weights, size, place, budget, how, facts)
            console.print(f"{scene} {seed} {name}: evaluated in {time.time() - started:.0f} s")


Task = tuple[str, str, int]
"""A variant, the scene that is held out, and the seed."""


def spread(part: str, tasks: Sequence[Task], argv: Sequence[str], args: argparse.Namespace) -> list[str]:
    """Runs a part of each (variant, scene, seed) in a process of its own, ``args.jobs`` at a time and GPUs in turn;
    returns what failed."""
    gpus = torch.cuda.device_count() if args.device == "cuda" else 0

    def one(number: int) -> str | None:
        variant, scene, seed = tasks[number]
        path = args.out / scene / f"{variant}.{seed}.log"
        own = [variant, *argv, "--jobs", "1", "--part", part, "--scenes", scene, "--until", str(args.until)]
        own += ["--first-seed", str(seed), "--seeds", "1"]
        env = {**os.environ, **({"CUDA_VISIBLE_DEVICES": str(number % gpus)} if gpus > 1 else {})}
        command = [sys.executable, __file__, *own]
        with path.open("a") as log:
            done = subprocess.run(command, env=env, stdout=log, stderr=subprocess.STDOUT, check=False)
        return None if done.returncode == 0 else f"{path}: {_last_line(path)}"

    with ThreadPoolExecutor(args.jobs) as executor:
        return [failure for failure in executor.map(one, range(len(tasks))) if failure]


def _last_line(path: Path) -> str:
    return (path.read_text().strip().splitlines() or ["nothing written"])[-1]


def main(argv: Sequence[str] | None = None) -> None:
    argv = list(sys.argv[1:] if argv is None else argv)
    args, console = arguments(argv), Console()
    if args.report:
        from small_wan.report import write_report

        write_report(args.out, args.docs)
        return
    args.out.mkdir(parents=True, exist_ok=True)
    started = time.time()
    pools(args, Size())
    variants = list(args.variants or ("dense", *VARIANTS))
    if args.jobs == 1:
        seeds = range(args.first_seed, args.first_seed + args.seeds)
        for scene in args.scenes:
            if args.part == "base":
                base_of(scene, args)
                continue
            for variant in variants:
                run_variant(variant, scene, seeds, args, console)
        return
    options = [a for a in argv if a not in args.variants]
    grid: list[Task] = [(v, scene, seed) for seed in range(args.seeds) for scene in args.scenes for v in variants]
    stages = {
        "base": [("dense", scene, 0) for scene in args.scenes],
        "trained": grid,
        "free": [task for task in grid if task[0] != "dense"],  # on the weights of the dense control
    }
    for part, tasks in stages.items():
        failed = spread(part, tasks, options, args)
        console.print(f"{part}: {len(tasks) - len(failed)} of {len(tasks)} done after {time.time() - started:.0f} s")
        if failed:
            console.print("\n".join(failed), markup=False)
            raise SystemExit(f"{len(failed)} of {len(tasks)} tasks are unfinished: repeat the command to go on")


if __name__ == "__main__":
    try:
        main()
    except OutOfTimeError as error:
        raise SystemExit(str(error)) from None
