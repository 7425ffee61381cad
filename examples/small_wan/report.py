"""The experiment's results as a page: gaps with bootstrap intervals, losses by noise level, samples side by side."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

DRAWS = 4000


def interval(values: Tensor) -> tuple[float, float, float]:
    """Mean of ``values`` f32[n] and the 95 % percentile interval of its bootstrap over clips."""
    generator = torch.Generator().manual_seed(0)
    drawn = values[torch.randint(len(values), (DRAWS, len(values)), generator=generator)].mean(1)
    low, high = torch.quantile(drawn, torch.tensor([0.025, 0.975])).tolist()
    return float(values.mean()), low, high


def closed(dense: Tensor, free: Tensor, tuned: Tensor) -> tuple[float, float, float]:
    """Share of the training-free gap that training closed, ``(free - tuned) / (free - dense)``, paired over clips.

    NaN where the gap's own interval includes zero or lies below it: there is nothing to close.
    """
    if interval(free - dense)[1] <= 0:
        return (math.nan,) * 3
    generator = torch.Generator().manual_seed(0)
    index = torch.randint(len(dense), (DRAWS, len(dense)), generator=generator)
    shares = (free - tuned)[index].mean(1) / (free - dense)[index].mean(1)
    low, high = torch.quantile(shares, torch.tensor([0.025, 0.975])).tolist()
    return float((free - tuned).mean() / (free - dense).mean()), low, high


def psnr(a: Tensor, b: Tensor) -> float:
    """Of two clips in [-1, 1], in dB."""
    return float(10 * torch.log10(4 / (a.clamp(-1, 1) - b.clamp(-1, 1)).square().mean()))


def table(results: dict[str, dict[str, Any]], kind: str, folder: Path) -> list[str]:
    """Rows of the page's table for the clips of one ``kind``, "natural" or "generated"."""
    losses = {name: torch.tensor(result[kind]) for name, result in results.items()}
    dense = losses["dense"].mean(1)
    target = torch.load(folder / "dense.samples.pt").float()
    rows = [
        "| attention | held-out loss | more than dense | gap closed | PSNR of samples to dense's |",
        "|---|---|---|---|---|",
    ]
    for name, loss in losses.items():
        mean, low, high = interval(loss.mean(1) - dense)
        free = losses.get("free-" + name.removeprefix("joint-"))
        share = "" if name.startswith("free-") or free is None else "no gap"
        if share:
            part = closed(dense, free.mean(1), loss.mean(1))
            share = share if math.isnan(part[0]) else f"{part[0]:.0%} ({part[1]:.0%} to {part[2]:.0%})"
        sampled = torch.load(folder / f"{name}.samples.pt").float()
        quality = "" if name == "dense" else f"{psnr(sampled, target):.1f} dB"
        gap = "" if name == "dense" else f"{mean:+.4f} ({low:+.4f} to {high:+.4f})"
        rows.append(f"| `{name}` | {float(loss.mean()):.4f} | {gap} | {share} | {quality} |")
    return rows


def write_report(folder: Path, docs: Path) -> None:
    """Writes ``training_measured.md`` and ``training.png`` into ``docs`` from the results that ``folder`` holds.

    Raises:
        FileNotFoundError: the dense control has not run; everything is compared with it.
    """
    if not (folder / "dense.json").exists():
        raise FileNotFoundError(f"{folder}/dense.json: run examples/small_wan_experiment.py dense first")
    found = {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}
    results = {"dense": found.pop("dense"), **found}
    any_of = results["dense"]
    text = [
        f"{any_of['steps']} steps of {any_of['batch']} clips for each trained variant; one seed of training.",
        f"Held out: {len(any_of['natural'])} natural clips of one scene, {len(any_of['generated'])} generated ones.",
    ]
    for kind in ("natural", "generated"):
        text += ["", f"On {kind} clips:", "", *table(results, kind, folder)]
    docs.mkdir(parents=True, exist_ok=True)
    (docs / "training_measured.md").write_text("\n".join([*text, "", "![Losses and samples](training.png)", ""]))
    _draw(results, folder, docs / "training.png")


def _draw(results: dict[str, dict[str, Any]], folder: Path, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    dense = torch.tensor(results["dense"]["natural"])
    figure = plt.figure(figsize=(10, 3.2 + 1.1 * len(results)), layout="constrained")
    top, bottom = figure.subfigures(2, 1, height_ratios=[3.2, 1.1 * len(results)])
    axis = top.subplots()
    for name, result in results.items():
        if name != "dense":
            change = (torch.tensor(result["natural"]) - dense).mean(0)
            axis.plot(result["levels"], change, marker="o", markersize=3, label=name)
    axis.axhline(0, color="#b9bec8")
    axis.set(xlabel="remaining work (1 is pure noise)", ylabel="loss more than dense's", title="held-out natural clips")
    axis.legend(fontsize=7, frameon=False, ncols=2)
    pictures = bottom.subplots(len(results), 8, squeeze=False)
    for line, name in zip(pictures, results, strict=True):
        clip = torch.load(folder / f"{name}.samples.pt").float()[0]
        for frame, cell in enumerate(line):
            cell.imshow((clip[:, min(frame, clip.shape[1] - 1)].permute(1, 2, 0).clamp(-1, 1) + 1).numpy() / 2)
            cell.set(xticks=[], yticks=[])
        line[0].set_ylabel(name, fontsize=7, rotation=0, ha="right")
    figure.savefig(path, dpi=80)
    plt.close(figure)
