"""The experiment's results as a page: gaps with bootstrap intervals, losses by noise level, samples side by side."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from small_wan.bootstrap import Interval, closed, interval


def psnr(a: Tensor, b: Tensor) -> float:
    """Of two clips in [-1, 1], in dB."""
    return float(10 * torch.log10(4 / (a.clamp(-1, 1) - b.clamp(-1, 1)).square().mean().clamp(min=1e-10)))


def ssim(a: Tensor, b: Tensor) -> float:
    """scikit-image's structural similarity of two clips f32[3, frames, height, width] in [-1, 1], mean over frames."""
    from skimage.metrics import structural_similarity

    pairs = zip(a.clamp(-1, 1).unbind(1), b.clamp(-1, 1).unbind(1), strict=True)
    values = [structural_similarity(x.numpy(), y.numpy(), channel_axis=0, data_range=2.0) for x, y in pairs]
    return float(sum(values) / len(values))


@dataclass(frozen=True)
class Results:
    """What a folder of the experiment holds, where every scene and seed has it."""

    folder: Path
    scenes: list[str]
    seeds: list[str]
    names: list[str]
    """Variants, "dense" first."""
    facts: dict[str, Any]
    """The dense control's file of the first scene and seed."""

    def losses(self, name: str, kind: str) -> Tensor:
        """Of "natural" or "generated" clips: f64[scenes, seeds, clips, levels]."""
        read = [
            [json.loads((self.folder / c / s / f"{name}.json").read_text())[kind] for s in self.seeds]
            for c in self.scenes
        ]
        return torch.tensor(read, dtype=torch.float64)

    def samples(self, name: str, scene: str, seed: str) -> Tensor:
        """f32[samples, 3, frames, height, width]."""
        return load_file(self.folder / scene / seed / f"{name}.samples.safetensors")["samples"].float()

    def likeness(self, name: str) -> dict[str, Interval]:
        """PSNR and SSIM of samples to the dense control's from the same noise."""
        out = {}
        for metric, of in (("psnr", psnr), ("ssim", ssim)):
            values = [
                [
                    [of(a, b) for a, b in zip(self.samples(name, c, s), self.samples("dense", c, s), strict=True)]
                    for s in self.seeds
                ]
                for c in self.scenes
            ]
            out[metric] = interval(torch.tensor(values, dtype=torch.float64))
        return out


def read_results(folder: Path) -> Results:
    """What ran in ``folder``.

    Raises:
        FileNotFoundError: the dense control has not run; everything is compared with it.
    """
    places = sorted({path.parent for path in folder.glob("*/*/dense.json")})
    if not places:
        raise FileNotFoundError(f"{folder}/SCENE/SEED/dense.json: run examples/small_wan_experiment.py dense first")
    scenes = sorted({place.parent.name for place in places})
    seeds = sorted(set.intersection(*({p.name for p in places if p.parent.name == s} for s in scenes)))
    whole = [{path.stem for path in (folder / c / s).glob("*.json")} for c in scenes for s in seeds]
    names = sorted(set.intersection(*whole) - {"dense"}, key=lambda n: (not n.startswith("free-"), n))
    facts = json.loads((folder / scenes[0] / seeds[0] / "dense.json").read_text())
    return Results(folder, scenes, seeds, ["dense", *names], facts)


def table(results: Results, kind: str) -> list[str]:
    """The page's table for clips of one ``kind``, "natural" or "generated"."""
    dense = results.losses("dense", kind).mean(-1)
    rows = ["| attention | held-out loss | more than dense | relative | gap closed |", "|---|---|---|---|---|"]
    for name in results.names:
        loss = results.losses(name, kind).mean(-1)
        gap, share = "", ""
        if name != "dense":
            more = interval(loss - dense)
            gap = f"{more.value:+.5f} ({more.low:+.5f} to {more.high:+.5f}) | {more.value / float(dense.mean()):+.1%}"
        free = "free-" + name.removeprefix("joint-")
        if name.startswith("joint-") and free in results.names:
            part = closed(dense, results.losses(free, kind).mean(-1), loss)
            share = "no gap" if math.isnan(part.value) else f"{part.value:.0%} ({part.low:.0%} to {part.high:.0%})"
        rows.append(f"| `{name}` | {float(loss.mean()):.5f} | {gap or ' | '} | {share} |")
    return rows


def by_level(results: Results, kind: str) -> list[str]:
    """A table of how much more than dense's the loss is, at each noise level."""
    levels = results.facts["levels"]
    dense = results.losses("dense", kind).mean((0, 1, 2))
    rows = ["| attention | " + " | ".join(f"u = {u}" for u in levels) + " |", "|---|" + "---|" * len(levels)]
    rows.append("| `dense` (loss) | " + " | ".join(f"{x:.4f}" for x in dense.tolist()) + " |")
    for name in results.names[1:]:
        more = results.losses(name, kind).mean((0, 1, 2)) / dense - 1
        rows.append(f"| `{name}` | " + " | ".join(f"{x:+.1%}" for x in more.tolist()) + " |")
    return rows


def likeness(results: Results) -> list[str]:
    """The table of samples."""
    rows = ["| attention | PSNR to dense's | SSIM to dense's |", "|---|---|---|"]
    for name in results.names[1:]:
        found = results.likeness(name)
        p, s = found["psnr"], found["ssim"]
        like = f"{s.value:.3f} ({s.low:.3f} to {s.high:.3f})"
        rows.append(f"| `{name}` | {p.value:.1f} dB ({p.low:.1f} to {p.high:.1f}) | {like} |")
    return rows


def write_report(folder: Path, docs: Path) -> None:
    """Writes ``training_measured.md`` and ``training.png`` into ``docs`` from the results that ``folder`` holds.

    Raises:
        FileNotFoundError: the dense control has not run; everything is compared with it.
    """
    results = read_results(folder)
    budget, how = results.facts["budget"], results.facts["arithmetic"]
    text = [
        f"{budget['steps']} steps of {budget['batch']} clips, learning rate {budget['lr']}, for each trained variant.",
        f"{len(results.seeds)} seed(s) of training, on {how['device']}.",
        f"{len(results.scenes)} natural scene(s) held out, each in turn: {', '.join(results.scenes)}.",
        f"{budget['clips']} crops of each, and {budget['clips']} generated clips.",
        f"{budget['samples']} clips sampled in {budget['sample_steps']} steps.",
        "Intervals: 95 %, paired, bootstrap over scenes x crops x seeds.",
    ]
    for kind in ("natural", "generated"):
        text += ["", f"Held-out loss on {kind} clips:", "", *table(results, kind)]
    text += ["", "By remaining work u (1 is pure noise), natural clips, more than dense's:", ""]
    text += by_level(results, "natural")
    text += ["", "Samples from the same noise, compared with those of the dense control (tuned on equal data):", ""]
    text += likeness(results)
    docs.mkdir(parents=True, exist_ok=True)
    (docs / "training_measured.md").write_text("\n".join([*text, "", "![Losses and samples](training.png)", ""]))
    _draw(results, docs / "training.png")


def _draw(results: Results, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    dense = results.losses("dense", "natural").mean((0, 1, 2))
    height = 0.75 * len(results.names)
    figure = plt.figure(figsize=(11, 3.4 + height), layout="constrained")
    top, bottom = figure.subfigures(2, 1, height_ratios=[3.4, height])
    axes = top.subplots(1, 2, sharey=True)
    for axis, prefix, title in zip(axes, ("free-", "joint-"), ("training-free", "trained with it"), strict=True):
        for name in results.names:
            if name.startswith(prefix):
                change = results.losses(name, "natural").mean((0, 1, 2)) / dense - 1
                axis.plot(
                    results.facts["levels"], 100 * change, marker="o", markersize=3, label=name.removeprefix(prefix)
                )
        axis.axhline(0, color="#b9bec8")
        axis.set(xlabel="remaining work u (1 is pure noise)", title=f"{title}, held-out natural clips")
    axes[0].set_ylabel("loss more than dense's, %")
    axes[0].legend(fontsize=7, frameon=False, ncols=2)
    clips = {name: results.samples(name, results.scenes[0], results.seeds[0])[:2] for name in results.names}
    length = clips["dense"].shape[2]
    shown = [
        (clip, frame) for clip in range(len(clips["dense"])) for frame in (0, length // 3, 2 * length // 3, length - 1)
    ]
    pictures = bottom.subplots(len(clips), len(shown), squeeze=False)
    for line, (name, clip) in zip(pictures, clips.items(), strict=True):
        for (which, frame), cell in zip(shown, line, strict=True):
            cell.imshow((clip[which, :, frame].permute(1, 2, 0).clamp(-1, 1) + 1).numpy() / 2)
            cell.set(xticks=[], yticks=[])
        line[0].set_ylabel(name, fontsize=7, rotation=0, ha="right", va="center")
    figure.savefig(path, dpi=80)
    plt.close(figure)
