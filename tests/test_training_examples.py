"""The small trained model's scripts run, and their statistics are what they say."""

from __future__ import annotations

import importlib
import json
import math
from pathlib import Path
from types import ModuleType

import pytest
import torch

for _module in ("diffusers", "av", "skvideo", "matplotlib", "PIL"):
    pytest.importorskip(_module)

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


@pytest.fixture(autouse=True)
def _examples_on_path(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._dynamo.backends import registry

    from fpscompile.backend import fps

    monkeypatch.syspath_prepend(str(EXAMPLES))
    if "fps" not in torch.compiler.list_backends():
        registry.register_backend(fps, name="fps")


def load(name: str) -> ModuleType:
    return importlib.import_module(name)


def test_gap_closed_recovers_a_known_share() -> None:
    report = load("small_wan.report")
    dense = torch.rand(40)
    gap = 0.5 + torch.rand(40)
    share, low, high = report.closed(dense, dense + gap, dense + 0.25 * gap)
    assert (share, low, high) == pytest.approx((0.75, 0.75, 0.75), abs=1e-4)
    assert math.isnan(report.closed(dense, dense - gap, dense)[0]), "no gap, nothing to close"


def test_experiment_and_its_page(tmp_path: Path) -> None:
    experiment = load("small_wan_experiment")
    small = ["--steps", "1", "--batch", "1", "--clips", "4", "--samples", "1", "--out", str(tmp_path)]
    experiment.main(["dense", "free-constant", *small])
    names = ("dense", "free-constant")
    losses = {n: torch.tensor(json.loads((tmp_path / f"{n}.json").read_text())["natural"]) for n in names}
    assert losses["dense"].shape == (4, len(experiment.LEVELS))
    assert float(losses["dense"].mean()) < 0.5, "an untrained model has about 1.3"
    assert not torch.equal(*losses.values())
    with pytest.raises(SystemExit):
        experiment.main(["fp9", *small])
    experiment.main(["--report", "--out", str(tmp_path), "--docs", str(tmp_path)])
    assert "| `free-constant` |" in (tmp_path / "training_measured.md").read_text()
    assert (tmp_path / "training.png").stat().st_size > 1000


def test_video(tmp_path: Path) -> None:
    result = load("small_wan_video").main(["--out", str(tmp_path), "--steps", "2", "--clips", "1"])
    assert 5 < result["psnr_db"] < 80
    assert (tmp_path / "side_by_side.gif").read_bytes().startswith(b"GIF8")
