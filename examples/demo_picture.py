"""The demo's picture: frames of both runs side by side, and the seconds of each step coloured by phase."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

INK = "#1f2430"
GREY = "#b9bec8"
PHASES = ("#7a5195", "#0a7e8c", "#e07a1f", "#3a6fd8", "#b8336a", "#5b8c2a")


def draw(path: Path, clip: torch.Tensor, dense: torch.Tensor, fps: torch.Tensor, steps: Sequence[Any]) -> None:
    """Write the picture.

    Args:
        clip, dense, fps: float32 [T, 3, height, width] in [0, 1]: the clip, and where the two runs ended.
        steps: the demo's ``Step`` records.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    frames = [0, len(clip) // 2, len(clip) - 1]
    difference = (fps - dense).abs()
    gain = 10.0 ** math.floor(math.log10(1 / max(float(difference.mean()) * 4, 1e-6)))  # so that something is seen
    rows = [
        ("clip", clip),
        ("dense", dense),
        ("fps", fps),
        (f"|fps - dense| x {gain:g}", (difference * gain).clamp(0, 1)),
    ]
    with plt.rc_context({"font.size": 10, "text.color": INK, "axes.labelcolor": INK, "axes.edgecolor": GREY}):
        figure = plt.figure(figsize=(11, 12), layout="constrained")
        pictures, times, errors = figure.subfigures(3, 1, height_ratios=[8, 2.6, 2])
        axes = pictures.subplots(len(rows), len(frames), squeeze=False)
        for line, (name, video) in zip(axes, rows, strict=True):
            for axis, frame in zip(line, frames, strict=True):
                axis.imshow(video[frame].permute(1, 2, 0).numpy())
                axis.set(xticks=[], yticks=[])
                axis.spines[:].set_visible(False)
            line[0].set_ylabel(name)
        for axis, frame in zip(axes[0], frames, strict=True):
            axis.set_title(f"latent frame {frame}", fontsize=10)
        _times(times.subplots(), steps)
        _errors(errors.subplots(), steps)
        figure.suptitle("Wan transformer, random weights: dense and fps side by side", x=0.01, ha="left", fontsize=12)
        figure.savefig(path, dpi=110)
        plt.close(figure)


def _times(axis: Any, steps: Sequence[Any]) -> None:
    index = [step.index for step in steps]
    axis.set_xlim(-0.5, len(steps) - 0.5)
    axis.bar([i - 0.2 for i in index], [step.dense_s for step in steps], 0.38, color=GREY, label="dense")
    seen: set[int] = set()
    for step in steps:
        label = None if step.phase in seen else f"fps, phase {step.phase}: density {step.density:.2f}"
        seen.add(step.phase)
        axis.bar(step.index + 0.2, step.fps_s, 0.38, color=PHASES[step.phase % len(PHASES)], label=label)
        axis.text(
            step.index + 0.2, step.fps_s, f"{step.dense_s / step.fps_s:.1f}x", ha="center", va="bottom", fontsize=8
        )
    top = max(max(step.dense_s, step.fps_s) for step in steps)
    axis.set(ylabel="seconds per step", xticks=index, ylim=(0, 1.12 * top))
    axis.legend(ncols=4, frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1.0), fontsize=9)
    axis.spines[["top", "right"]].set_visible(False)


def _errors(axis: Any, steps: Sequence[Any]) -> None:
    shown = [step for step in steps if step.error > 0]  # dense phases may agree to the last bit
    axis.plot([step.index for step in shown], [step.error for step in shown], color=GREY, zorder=1)
    for step in shown:
        axis.scatter(step.index, step.error, color=PHASES[step.phase % len(PHASES)], zorder=2)
    axis.set(
        ylabel="rel. L2 of output", xlabel="step", xticks=[step.index for step in steps], xlim=(-0.5, len(steps) - 0.5)
    )
    if shown:
        axis.set(yscale="log")
    axis.spines[["top", "right"]].set_visible(False)
