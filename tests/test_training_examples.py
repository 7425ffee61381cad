"""The small trained model's scripts run, and their statistics are what they say."""

from __future__ import annotations

import importlib
import json
import math
from pathlib import Path
from types import ModuleType

import pytest
import torch

for _module in ("diffusers", "av", "skvideo", "matplotlib", "PIL", "skimage"):
    pytest.importorskip(_module)

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


@pytest.fixture(autouse=True)
def _examples_on_path(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._dynamo.backends import registry

    from fpscompile.backend import fps

    monkeypatch.syspath_prepend(str(EXAMPLES))
    if "fps" not in torch.compiler.list_backends():
        registry.register_backend(fps, name="fps")


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file as examples/small_wan/data.py writes it, of noise: decoding takes seconds."""
    from safetensors.torch import save_file

    path = tmp_path_factory.mktemp("videos") / "videos.safetensors"
    generator = torch.Generator().manual_seed(0)
    scenes = ("bigbuckbunny", "bikes", "carphone_pristine")
    save_file({n: torch.randint(256, (24, 3, 96, 128), generator=generator).byte() for n in scenes}, path)
    return path


def load(name: str) -> ModuleType:
    return importlib.import_module(name)


def test_gap_closed_recovers_a_known_share() -> None:
    bootstrap = load("small_wan.bootstrap")
    dense = torch.rand(3, 2, 40, dtype=torch.float64)
    gap = 0.5 + torch.rand(3, 2, 40, dtype=torch.float64)
    share, low, high = bootstrap.closed(dense, dense + gap, dense + 0.25 * gap)
    assert (share, low, high) == pytest.approx((0.75, 0.75, 0.75), abs=1e-4)
    assert math.isnan(bootstrap.closed(dense, dense - gap, dense).value), "no gap, nothing to close"


def test_the_interval_is_as_wide_as_what_differs() -> None:
    """Clips that agree within a scene are no evidence beyond their scene: more of them narrow nothing."""
    interval = load("small_wan.bootstrap").interval
    noise = torch.randn(1, 1, 400, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    found = interval(noise)
    assert found.high - found.low == pytest.approx(2 * 1.96 * float(noise.std()) / 400**0.5, rel=0.1)
    by_scene = torch.tensor([0.0, 1.0], dtype=torch.float64)[:, None, None].expand(2, 2, 400)
    assert tuple(interval(by_scene)) == (0.5, 0.0, 1.0)


def test_psnr_and_ssim_of_known_pictures() -> None:
    report = load("small_wan.report")
    a = torch.rand(3, 2, 16, 16) - 0.5
    assert report.psnr(a + 0.2, a) == pytest.approx(20.0, abs=1e-3)
    assert report.ssim(a, a) == pytest.approx(1.0)
    assert report.ssim(0.4 + 0.5 * a, 0.4 - 0.5 * a) < 0, "the same mean, the opposite structure"


def test_a_pool_is_the_same_however_it_is_computed() -> None:
    data, size = load("small_wan.data"), load("small_wan.model").Size(frames=2, pixels=16)
    one = data.make_pool((), None, size, 300, seed=3)
    assert one.shape == (300, 3, 2, 16, 16)
    backwards = data.make_pool((), None, size, 300, seed=3, run=lambda f, x: [f(t) for t in x[::-1]][::-1])
    assert torch.equal(backwards, one)
    pool = data.Pool(one, seed=1)
    first, again, other = (pool.batch(number, 4)[0] for number in (0, 0, 1))
    torch.testing.assert_close(first, again)
    assert not torch.equal(first, other)


SMALL = ["--steps", "2", "--batch", "1", "--clips", "1", "--samples", "1", "--group", "1", "--pool", "4"]
SMALL += ["--sample-steps", "1"]


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, videos: Path) -> list[str]:
    """Options for a model of one layer, with weights drawn at random."""
    experiment, model, checkpoint = load("small_wan_experiment"), load("small_wan.model"), load("small_wan.checkpoint")
    size = model.Size(frames=4, layers=1, ffn=64)
    monkeypatch.setattr(experiment, "Size", lambda: size)
    base = tmp_path / "base.safetensors"
    checkpoint.save_weights(base, model.build(size).state_dict(), {"size": size.as_dict()})
    return [*SMALL, "--clips-file", str(videos), "--out", str(tmp_path / "out"), "--weights", str(base)]


def test_the_shipped_weights_are_trained(videos: Path) -> None:
    """Their loss on generated clips, which they never saw in this order, is far below an untrained model's 1.3."""
    data, flow, model = load("small_wan.data"), load("small_wan.flow"), load("small_wan.model")
    size = model.Size()
    net = model.build(size).eval()
    facts = load("small_wan.checkpoint").load_weights(load("train_small_wan").WEIGHTS, net, size.as_dict())
    assert facts["command"].startswith("python examples/train_small_wan.py")
    batch, generator = data.Clips((), size, seed=777).batch(0, 4)
    noise = torch.randn(batch.shape, generator=generator)
    with torch.no_grad():
        assert float(flow.losses(net, batch, noise, flow.draw_u(4, generator), size).mean()) < 0.5


def test_experiment_and_its_page(tmp_path: Path, small: list[str]) -> None:
    experiment = load("small_wan_experiment")
    experiment.main(["dense", "constant", *small])
    place = tmp_path / "out" / "carphone_pristine" / "0"
    names = ("dense", "free-constant", "joint-constant")
    found = {name: json.loads((place / f"{name}.json").read_text()) for name in names}
    losses = {name: torch.tensor(facts["generated"]) for name, facts in found.items()}
    assert losses["dense"].shape == (1, len(found["dense"]["levels"]))
    assert not torch.equal(losses["dense"], losses["free-constant"]), "sparsity costs something"
    assert not torch.equal(losses["joint-constant"], losses["free-constant"]), "training changes something"

    before = {path: path.stat().st_mtime_ns for path in place.iterdir()}
    experiment.main(["dense", "constant", *small])
    assert before == {path: path.stat().st_mtime_ns for path in place.iterdir()}, "finished work is kept"

    experiment.main(["--report", "--out", str(tmp_path / "out"), "--docs", str(tmp_path)])
    page = (tmp_path / "training_measured.md").read_text()
    assert page.count("| `joint-constant` |") == 4
    assert "1 natural scene(s) held out" in page
    assert (tmp_path / "training.png").stat().st_size > 1000


def test_training_that_ran_out_of_time_goes_on(tmp_path: Path, small: list[str]) -> None:
    experiment = load("small_wan_experiment")
    with pytest.raises(experiment.OutOfTimeError, match="1 of 2 steps"):
        experiment.main(["dense", *small, "--minutes", "0"])
    assert not list(tmp_path.glob("out/*/0/dense.json"))
    experiment.main(["dense", *small])
    assert list(tmp_path.glob("out/*/0/dense.json"))


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["fp9"], "variant 'fp9' is unknown"),
        (["--clips", "3", "--group", "2"], "--clips 3 is no positive multiple of --group 2"),
        (["--scenes", "bikes"], "give --base-steps"),
    ],
)
def test_wrong_arguments(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        load("small_wan_experiment").main(argv)
    assert message in capsys.readouterr().err


def test_no_report_without_the_control(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"run examples/small_wan_experiment\.py dense first"):
        load("small_wan_experiment").main(["--report", "--out", str(tmp_path)])


@pytest.mark.slow
def test_processes_and_a_base_of_its_own(tmp_path: Path, videos: Path) -> None:
    """As on a GPU: a base for each held-out scene, and several processes at a time."""
    argv = ["dense", "fp8", *SMALL, "--clips-file", str(videos), "--out", str(tmp_path), "--base-steps", "2"]
    load("small_wan_experiment").main([*argv, "--scenes", "bikes", "carphone_pristine", "--jobs", "2", "--seeds", "2"])
    assert len(list(tmp_path.glob("*/*/joint-fp8.json"))) == 4
    bases = [path.read_bytes() for path in sorted(tmp_path.glob("*/base/checkpoint.safetensors"))]
    assert len(bases) == 2
    assert bases[0] != bases[1], "each saw the scenes that it may see"


def test_video(tmp_path: Path) -> None:
    result = load("small_wan_video").main(["--out", str(tmp_path), "--steps", "2", "--clips", "1"])
    assert 5 < result["psnr_db"] < 80
    assert (tmp_path / "side_by_side.gif").read_bytes().startswith(b"GIF8")
