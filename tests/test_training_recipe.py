"""The recipe for real checkpoints, in miniature: a random tiny pipeline, alone and on two gloo ranks."""

from __future__ import annotations

import importlib
import json
import os
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

for _module in ("diffusers", "rich"):
    pytest.importorskip(_module)

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
SHARED = [
    "--tile",
    "1",
    "2",
    "2",
    "--inner",
    "aot_eager",
    "--dtype",
    "float32",
    "--quant",
    "fp8",
    "--lowering",
    "gather",
]
SHARED += ["--inference-steps", "8", "--lr", "1e-3"]


@pytest.fixture(autouse=True)
def _examples_on_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    torch._dynamo.reset()


def load(name: str) -> ModuleType:
    return importlib.import_module(name)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline of random weights, and clips of noise, in four files."""
    from diffusers import FlowMatchEulerDiscreteScheduler, WanTransformer3DModel
    from safetensors.torch import save_file

    root = tmp_path_factory.mktemp("recipe")
    torch.manual_seed(0)
    model = WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        text_dim=16,
        freq_dim=32,
        ffn_dim=32,
        num_layers=2,
        in_channels=4,
        out_channels=4,
    )
    model.save_pretrained(root / "pipeline" / "transformer")
    FlowMatchEulerDiscreteScheduler(shift=3.0).save_pretrained(root / "pipeline" / "scheduler")
    (root / "clips").mkdir()
    for index in range(4):
        clip = {"latents": torch.randn(4, 4, 8, 8), "prompt_embeds": torch.randn(3, 16)}
        save_file(clip, root / "clips" / f"{index}.safetensors")
    return root


def argv(folder: Path, out: Path, *more: str) -> list[str]:
    return ["--model", str(folder / "pipeline"), "--data", str(folder / "clips"), "--out", str(out), *SHARED, *more]


def weights(out: Path) -> dict[str, Tensor]:
    """As plain diffusers loads them."""
    from diffusers import WanTransformer3DModel

    return WanTransformer3DModel.from_pretrained(out / "last", subfolder="transformer").state_dict()


def test_trains_resumes_and_saves_for_plain_diffusers(folder: Path, tmp_path: Path) -> None:
    recipe = load("finetune_wan")
    whole = recipe.main(argv(folder, tmp_path / "whole", "--steps", "3"))
    first = recipe.main(argv(folder, tmp_path / "parts", "--steps", "1"))
    rest = recipe.main(argv(folder, tmp_path / "parts", "--steps", "3"))
    assert first + rest == pytest.approx(whole, rel=1e-5)
    before = load("diffusers").WanTransformer3DModel.from_pretrained(folder / "pipeline", subfolder="transformer")
    after = weights(tmp_path / "whole")
    assert after.keys() == before.state_dict().keys()
    assert not torch.equal(after["blocks.0.attn1.to_q.weight"], before.state_dict()["blocks.0.attn1.to_q.weight"])
    for name, value in weights(tmp_path / "parts").items():
        torch.testing.assert_close(value, after[name], rtol=1e-4, atol=1e-6, msg=name)


def test_each_step_runs_the_phase_that_it_has_at_inference(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks are compiled alone, so what tells them the phase is the attachment."""
    from fpscompile.schedule import PRESETS

    recipe = load("finetune_wan")
    honest, phases = recipe.options_of, PRESETS["paper"].phases
    run = recipe.Trainer(recipe.arguments(argv(folder, tmp_path)))
    batch = run.data.batch(0, 0, 1, run.steps)

    @torch.no_grad()
    def predicted(trainer: Any, step: int) -> Tensor:
        trainer.attachment.step(step, trainer.steps.count)
        return trainer.predict(trainer.model, batch.latents, batch.prompt_embeds, step)

    steps = [next(i for i in range(8) if phase.start <= i / 8 < phase.end) for phase in phases]
    scheduled = [predicted(run, step) for step in steps]
    for number, phase in enumerate(phases):
        only = [{"start": 0.0, "end": 1.0, "density": phase.density, "granularity": phase.granularity}]
        monkeypatch.setattr(recipe, "options_of", lambda args, only=only: honest(args) | {"schedule": only})
        constant = recipe.Trainer(recipe.arguments(argv(folder, tmp_path)))
        for other, step in enumerate(steps):
            same = torch.allclose(predicted(constant, step), scheduled[other], rtol=1e-4, atol=1e-5)
            assert same == (other == number), (number, other)


def test_lora_trains_adapters_that_plain_diffusers_loads(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    from diffusers import WanTransformer3DModel

    recipe = load("finetune_wan")
    more = ("--lora", "2", "--lr", "0.05")
    whole = recipe.main(argv(folder, tmp_path / "whole", "--steps", "3", *more))
    recipe.main(argv(folder, tmp_path / "parts", "--steps", "2", *more))
    assert recipe.main(argv(folder, tmp_path / "parts", "--steps", "3", *more)) == pytest.approx(whole[2:], rel=1e-5)
    run = recipe.Trainer(recipe.arguments(argv(folder, tmp_path / "whole", "--dense", *more)))
    recipe.saving.resume(tmp_path / "whole" / "last", run.model, run.optimizer, run.facts(0), True)
    batch = run.data.batch(0, 0, 1, run.steps)
    with torch.no_grad():
        wanted = run.predict(run.model, batch.latents, batch.prompt_embeds, 3)
        plain = WanTransformer3DModel.from_pretrained(folder / "pipeline", subfolder="transformer")
        untuned = run.predict(plain, batch.latents, batch.prompt_embeds, 3)
        plain.load_lora_adapter(
            tmp_path / "whole" / "last", prefix=None, weight_name="pytorch_lora_weights.safetensors"
        )
        torch.testing.assert_close(run.predict(plain, batch.latents, batch.prompt_embeds, 3), wanted)
    assert float((untuned - wanted).norm() / wanted.norm()) > 1e-3, "the adapters do something"


def test_distillation_pulls_towards_the_dense_model(folder: Path, tmp_path: Path) -> None:
    recipe = load("finetune_wan")
    run = recipe.Trainer(recipe.arguments(argv(folder, tmp_path, "--distill", "1")))
    plain = recipe.Trainer(recipe.arguments(argv(folder, tmp_path)))
    with torch.no_grad():
        distance = float(run.loss(run.data, 0, 1.0) - plain.loss(plain.data, 0))
        batch = run.data.batch(0, 0, 1, run.steps)
        noisy = run.steps.noisy(batch)
        run.attachment.step(batch.step, run.steps.count)
        pair = [run.predict(m, noisy, batch.prompt_embeds, batch.step) for m in (run.model, run.teacher)]
    assert distance == pytest.approx(float((pair[0] - pair[1]).square().mean()), rel=1e-3)
    assert distance > 0


def test_evaluation_runs_when_asked_for(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = load("finetune_wan")
    more = ("--steps", "3", "--evaluate-every", "2", "--held-out", str(folder / "clips"), "--dense")
    recipe.main(argv(folder, tmp_path, *more))
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{")]
    assert [("held_out" in row) for row in rows] == [False, True, True]
    run = recipe.Trainer(recipe.arguments(argv(folder, tmp_path, *more)))
    recipe.saving.resume(tmp_path / "last", run.model, run.optimizer, run.facts(0), False)
    assert rows[-1]["held_out"] == pytest.approx(run.held_out(3, run.model)["held_out"], rel=1e-5)

    seen: list[tuple[int, bool]] = []

    def hook(step: int, model: torch.nn.Module) -> dict[str, float]:
        seen.append((step, model.training))
        return {"quality": 1.0}

    recipe.main(argv(folder, tmp_path / "again", *more), evaluate=hook)
    assert seen == [(2, False), (3, False)]
    assert '"quality": 1.0' in capsys.readouterr().out


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--context-parallel", "ring"], "ring attention is declined"),
        (["--context-parallel", "star"], "'star' is unknown"),
        (["--context-degree", "2"], "does not divide the 1 ranks"),
    ],
)
def test_parallelism_that_cannot_be(folder: Path, tmp_path: Path, more: list[str], message: str) -> None:
    recipe = load("finetune_wan")
    with pytest.raises(recipe.ulysses.ParallelError, match=message):
        recipe.main(argv(folder, tmp_path, *more))
    with pytest.raises(recipe.ulysses.ParallelError, match="does not divide the 3 heads"):
        recipe.ulysses.check("ulysses", 2, 4, 3)


def test_nan_stops_before_anything_is_spoilt(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = load("finetune_wan")
    recipe.main(argv(folder, tmp_path, "--steps", "1"))
    before = weights(tmp_path)
    honest = recipe.Trainer.loss
    monkeypatch.setattr(recipe.Trainer, "loss", lambda *args: honest(*args) * float("nan"))
    with pytest.raises(recipe.DivergedError, match=r"nan at step 1; resume from the save .*last with a lower --lr"):
        recipe.main(argv(folder, tmp_path, "--steps", "2"))
    for name, value in weights(tmp_path).items():
        assert torch.equal(value, before[name]), name


def test_a_save_of_another_run_is_refused(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    recipe = load("finetune_wan")
    recipe.main(argv(folder, tmp_path, "--steps", "1"))
    with pytest.raises(recipe.saving.CheckpointError, match="lora: saved 0, now 2"):
        recipe.main(argv(folder, tmp_path, "--steps", "2", "--lora", "2"))


@pytest.mark.parametrize("where", ["writing", "between the renames"])
def test_an_interrupted_save_loses_nothing(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    recipe = load("finetune_wan")
    recipe.main(argv(folder, tmp_path, "--steps", "1"))
    before = weights(tmp_path)

    def stop(*args: object) -> None:
        raise KeyboardInterrupt

    if where == "writing":
        monkeypatch.setattr(recipe.saving.torch, "save", stop)
    else:
        rename = Path.rename
        monkeypatch.setattr(Path, "rename", lambda self, to: stop() if "partial" in self.name else rename(self, to))
    with pytest.raises(KeyboardInterrupt):
        recipe.main(argv(folder, tmp_path, "--steps", "2"))
    monkeypatch.undo()
    sys.path.insert(0, str(EXAMPLES))
    run = recipe.Trainer(recipe.arguments(argv(folder, tmp_path)))
    assert recipe.saving.resume(tmp_path / "last", run.model, run.optimizer, run.facts(0), False) == 1
    for name, value in run.model.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_data_that_cannot_be_trained_on(folder: Path, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    recipe, clips = load("finetune_wan"), load("wan_recipe.clips")
    steps = clips.Steps(recipe._scheduler(folder / "pipeline"), 4)
    with pytest.raises(clips.DataError, match=r"holds no \.safetensors"):
        clips.Clips(tmp_path, 4)
    path = tmp_path / "a.safetensors"
    for content, message in (
        ({"latents": torch.zeros(4, 1, 2, 2)}, r"holds \['latents'\], not 'prompt_embeds'"),
        ({"latents": torch.zeros(3, 1, 2, 2), "prompt_embeds": torch.zeros(1, 16)}, r"should be \[4, T, H, W\]"),
    ):
        save_file(content, path)
        with pytest.raises(clips.DataError, match=message):
            clips.Clips(tmp_path, 4).batch(0, 0, 1, steps)
    path.write_bytes(b"cut")
    with pytest.raises(clips.DataError, match="no whole safetensors file"):
        clips.Clips(tmp_path, 4).batch(0, 0, 1, steps)
    with pytest.raises(clips.DataError, match="none of the 4 timesteps"):
        clips.Steps(recipe._scheduler(folder / "pipeline"), 4, 2000.0)


def _port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def _rank(rank: int, port: int, options: list[str], result: str) -> None:
    sys.path.insert(0, str(EXAMPLES))
    torch.set_num_threads(1)
    os.environ |= {"WORLD_SIZE": "2", "RANK": str(rank), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    try:
        losses = importlib.import_module("finetune_wan").main(options)
        if rank == 0:
            Path(result).write_text(json.dumps(losses))
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("more", [[], ["--context-degree", "2"], ["--lora", "2"]], ids=["fsdp2", "ulysses", "lora"])
@pytest.mark.slow
def test_two_ranks_equal_one(folder: Path, tmp_path: Path, more: list[str]) -> None:
    """Ulysses: both ranks share each clip. FSDP2: each has its own, so one rank sees both clips in two batches."""
    if "--lora" in more:
        pytest.importorskip("peft")
    start: Callable[..., Any] = mp.spawn
    common = ["--steps", "2", "--checkpointing", *more]
    two = argv(folder, tmp_path / "two", *common)
    start(_rank, args=(_port(), two, str(tmp_path / "losses.json")), nprocs=2, join=True)
    losses = json.loads((tmp_path / "losses.json").read_text())
    recipe = load("finetune_wan")
    if "--context-degree" in more:
        assert recipe.main(argv(folder, tmp_path / "one", "--steps", "2")) == pytest.approx(losses, rel=1e-4)
        one = weights(tmp_path / "one")
        for name, value in weights(tmp_path / "two").items():
            assert float((value - one[name]).norm() / one[name].norm().clamp(min=1e-3)) < 1e-3, name
        return
    options = recipe.arguments(argv(folder, tmp_path / "one", *(["--lora", "2"] if "--lora" in more else [])))
    run = recipe.Trainer(options)
    for number in range(2):
        run.optimizer.zero_grad()
        values = []
        for rank in range(2):
            batch = run.data.batch(number, rank, 1, run.steps)
            run.attachment.step(batch.step, run.steps.count)
            out = run.predict(run.model, run.steps.noisy(batch), batch.prompt_embeds, batch.step)
            loss = (out - (batch.noise - batch.latents)).square().mean()
            (loss / 2).backward()
            values.append(float(loss.detach()))
        assert losses[number] == pytest.approx(sum(values) / 2, rel=1e-4)
        torch.nn.utils.clip_grad_norm_([p for p in run.model.parameters() if p.requires_grad], 1.0)
        run.optimizer.step()
