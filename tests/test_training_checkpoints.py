"""What the training example keeps on disk: nothing is lost, and what does not fit is refused by name."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import ModuleType

import pytest
import torch

pytest.importorskip("diffusers")
for _module in ("av", "skvideo"):
    pytest.importorskip(_module)

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
TINY = ["--frames", "2", "--pixels", "16", "--heads", "1", "--head-dim", "12", "--layers", "1", "--ffn", "16"]


@pytest.fixture(autouse=True)
def _examples_on_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES))


@pytest.fixture(autouse=True)
def _only_generated_clips(_examples_on_path: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading videos takes seconds and is not what is tested here."""
    monkeypatch.setattr(load("small_wan.data"), "TRAIN", ())


def load(name: str) -> ModuleType:
    return importlib.import_module(name)


def run(out: Path, steps: int, *more: str) -> dict[str, torch.Tensor]:
    argv = [*TINY, "--out", str(out), "--steps", str(steps), "--batch", "2", "--save-every", "2", *more]
    path = load("train_small_wan").main(argv)
    size = load("train_small_wan").arguments(argv)
    names = load("small_wan.model").Size().as_dict()
    return load("small_wan.checkpoint").read(path, {name: getattr(size, name) for name in names})[0]


def test_resuming_equals_going_on(tmp_path: Path) -> None:
    whole = run(tmp_path / "whole", 4)
    run(tmp_path / "parts", 2)
    parts = run(tmp_path / "parts", 4)
    assert whole.keys() == parts.keys()
    for name, value in whole.items():
        torch.testing.assert_close(parts[name], value, rtol=0, atol=0, msg=name)
    steps = [json.loads(row)["step"] for row in (tmp_path / "parts" / "log.jsonl").read_text().splitlines()]
    assert steps == [2, 4]


def test_a_checkpoint_of_another_size_is_refused_by_name(tmp_path: Path) -> None:
    run(tmp_path, 1)
    before = (tmp_path / "checkpoint.safetensors").read_bytes()
    with pytest.raises(load("small_wan.checkpoint").CheckpointError, match="layers: checkpoint 1, here 2"):
        run(tmp_path, 2, "--layers", "2")
    assert (tmp_path / "checkpoint.safetensors").read_bytes() == before


def test_nan_stops_and_keeps_the_last_good_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(tmp_path, 2)
    before = (tmp_path / "checkpoint.safetensors").read_bytes()
    flow = load("small_wan.flow")
    honest = flow.losses
    monkeypatch.setattr(flow, "losses", lambda *args: honest(*args) * float("nan"))
    with pytest.raises(flow.DivergedError, match=r"nan at step 2.*checkpoint\.safetensors.*lower --lr"):
        run(tmp_path, 4)
    assert (tmp_path / "checkpoint.safetensors").read_bytes() == before


def test_an_interrupted_save_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = load("small_wan.checkpoint")
    path, size = tmp_path / "w.safetensors", {"layers": 1}
    checkpoint.write(path, {"a": torch.ones(3)}, {"size": size})
    save_file = checkpoint.save_file

    def half(tensors: object, to: Path, metadata: object) -> None:
        save_file(tensors, to, metadata)
        to.write_bytes(to.read_bytes()[:20])
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "save_file", half)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.write(path, {"a": torch.zeros(3)}, {"size": size})
    assert torch.equal(checkpoint.read(path, size)[0]["a"], torch.ones(3))
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize("content", [b"", b'\x08\0\0\0\0\0\0\0{"a":1}', b"no checkpoint at all"])
def test_damaged_files_say_so(tmp_path: Path, content: bytes) -> None:
    checkpoint = load("small_wan.checkpoint")
    path = tmp_path / "w.safetensors"
    path.write_bytes(content)
    with pytest.raises(checkpoint.CheckpointError, match="no whole safetensors file"):
        checkpoint.read(path, {})
    with pytest.raises(checkpoint.CheckpointError, match="no such checkpoint"):
        checkpoint.read(tmp_path / "missing", {})


def test_batches_depend_on_their_number_alone() -> None:
    data, size = load("small_wan.data"), load("small_wan.model").Size(frames=3, pixels=16)
    clips = data.Clips((), size, seed=3)
    first, _ = clips.batch(7, 2)
    clips.batch(8, 2)
    again, _ = clips.batch(7, 2)
    assert torch.equal(first, again)
    assert first.shape == (2, 3, 3, 16, 16)
    assert float(first.abs().max()) <= 1
    assert not torch.equal(first, clips.batch(9, 2)[0])
