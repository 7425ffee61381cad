"""The benchmark scripts run, small; their JSON has what the README's figures are made of. No time is asserted here."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import scripts

ROOT = Path(__file__).resolve().parent.parent
BENCHMARKS = ROOT / "benchmarks"


def script(name: str, *args: str | Path) -> dict[str, Any]:
    """What the script wrote to its JSON file, run as a user runs it."""
    path = Path(args[-1])
    command = [sys.executable, str(BENCHMARKS / f"{name}.py"), *map(str, args)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    report: dict[str, Any] = json.loads(path.read_text())
    assert report["benchmark"] == Path(name).name
    assert report["machine"]["torch"]
    return report


@pytest.fixture
def figures() -> ModuleType:
    return scripts.load("benchmarks/readme_figures.py")


@pytest.mark.slow
def test_attention(tmp_path: Path, figures: ModuleType) -> None:
    report = script("attention_cpu", "--quick", "--rounds", "3", "--json", tmp_path / "attention_cpu.json")
    assert all(row["error"] < 2e-2 for row in report["rows"])
    assert "of the ideal" in figures.block(tmp_path)


@pytest.mark.slow
def test_attention_backward_beside_boxes(tmp_path: Path, figures: ModuleType) -> None:
    path = tmp_path / "attention_cpu_backward.json"
    report = script("attention_cpu", "--quick", "--rounds", "3", "--lowering", "cpp", "--backward", "--boxes",
                    "--density", "0.25", "--json", path)  # fmt: skip
    assert all(row["direction"] == "forward+backward" for row in report["rows"])
    assert all(row["boxes_ms"] > 0 for row in report["rows"])
    assert "forward and backward, `cpp` in float32 and bfloat16 against `boxes`" in figures.block(tmp_path)


@pytest.mark.slow
def test_model(tmp_path: Path, figures: ModuleType) -> None:
    report = script("model_cpu", "--quick", "--rounds", "3", "--json", tmp_path / "model_cpu.json")
    exact = {row["dtype"]: row["difference_at_density_1"] for row in report["rows"]}
    assert exact["float32"] <= 1e-5
    assert exact["bfloat16"] <= 2e-2
    assert all(row["density"] <= 0.3 for row in report["rows"])
    assert "Wan transformer" in figures.block(tmp_path)


@pytest.mark.slow
def test_training(tmp_path: Path, figures: ModuleType) -> None:
    report = script("training_cpu", "--quick", "--rounds", "3", "--json", tmp_path / "training_cpu.json")
    assert [(row["what"], row["dtype"]) for row in report["rows"]] == [
        (what, dtype) for dtype in ("float32", "bfloat16") for what in ("attention", "module")
    ]
    for row in report["rows"]:
        assert row["difference_at_density_1"] <= (1e-5 if row["dtype"] == "float32" else 2e-2)
        assert row["density"] <= 0.3
    assert "forward + backward" in figures.block(tmp_path)


@pytest.mark.slow
def test_compile_time(tmp_path: Path, figures: ModuleType) -> None:
    report = script("compile_time", "--quick", "--json", tmp_path / "compile_time.json")
    rewritten = [row["rewritten"] for row in report["rows"] if row["job"] == "passes"]
    assert rewritten == [1, 2], "one 3D site per block"
    assert report["summary"]["warm_fxgraph_cache_hits"] >= 1, "the second process reuses the first one's graphs"
    assert report["summary"]["warm_fxgraph_cache_misses"] == 0
    assert "share of Inductor" in figures.block(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "figure"),
    [
        ("scaling_cpu", "time of a kept pair"),
        ("topk_cost", "choosing tiles by content"),
        ("autotune_cpu", "exhaustive search"),
        ("small_grids_cpu", "over_dense_at_density_1"),
        ("calibrate_trained", "the trained small Wan"),
        ("remainder", "the means over with them"),
    ],
)
def test_quick_runs(name: str, figure: str, tmp_path: Path, figures: ModuleType) -> None:
    report = script(name, "--quick", "--json", tmp_path / f"{name}.json")
    assert report["rows"]
    assert figure in figures.block(tmp_path) + json.dumps(report["summary"])


@pytest.mark.slow
def test_tuning_as_on_a_gpu(tmp_path: Path) -> None:
    small = ("--models", "1.3B", "--sizes", "480p", "--latents", "4", "16", "16", "--tile", "2", "4", "4")
    report = script("gpu/tune_gpu", *small, "--device", "cpu", "--json", tmp_path / "tune_gpu.json")
    (row,) = report["rows"]
    assert row["winner_ms"] <= row["default_ms"]
    assert row["error"] < 2e-2
    assert len(row["tried"]) > 1


def test_pages_of_figures_are_up_to_date(figures: ModuleType) -> None:
    """README.md and docs/figures.md show what benchmarks/results holds."""
    assert figures.main(["--check"]) == 0


def test_every_headline_is_a_figure(figures: ModuleType) -> None:
    """A row that is called something else must not vanish from README.md."""
    sections = figures.SECTIONS | figures.GPU_SECTIONS
    for name, parts in figures.HEADLINES.items():
        rows = sections[name](json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text()))
        for part in parts:
            assert any(part in what for what, _, _ in rows), (name, part)


def test_the_picture_has_every_case(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    picture = scripts.load("benchmarks/speed_picture.py")
    picture.draw(tmp_path / "speed.svg")
    drawn, stored = ((folder / "speed.svg").read_text() for folder in (tmp_path, ROOT / "docs"))
    speed = picture.speedups()
    for case, (variant, density, _) in itertools.product(picture.CASES, picture.BARS):
        text = f">{speed[*case, variant, density]:.2f}x<"
        assert text in drawn
        assert text in stored


def test_measured_page_is_up_to_date(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    outcomes = scripts.load("benchmarks/gpu/outcomes.py")
    monkeypatch.setattr(outcomes, "PAGE", tmp_path / "page.md")
    outcomes.main()
    assert (tmp_path / "page.md").read_text() == (ROOT / "docs" / "performance_measured.md").read_text()


def flex_rows(tile: list[int], ours: float, plain: float | None, tuned: float) -> list[dict[str, Any]]:
    times = {"fps fp8 (hopper)": ours, "FlexAttention bf16": plain, "FlexAttention bf16, autotuned": tuned}
    alike = {"case": "Wan 14B 720p", "tile": tile, "density": 0.2, "pre_share": 0.1, "error": 0.05}
    refused = {"case": "Wan 14B 720p", "tile": tile, "density": 0.2, "failed": "ValueError"}
    return [
        {"kernel": kernel} | (refused if ms is None else alike | {"ms": ms}) for kernel, ms in times.items()
    ]  # fmt: skip


def test_flex_attention_is_compared_at_its_best(figures: ModuleType) -> None:
    """Of the two ways to compile it the faster counts, and a mask that one refuses is still compared."""
    outcomes = scripts.load("benchmarks/gpu/outcomes.py")
    report = {"rows": flex_rows([4, 4, 4], 10, None, 30) + flex_rows([7, 9, 4], 10, 15, 20)}
    *_, refused, both = outcomes.flex_table(report).splitlines()
    assert "| 4x4x4 | 0.200 | 10.00 | refused | 30.00 | 3.00x |" in refused
    assert "| 7x9x4 | 0.200 | 10.00 | 15.00 | 20.00 | 1.50x |" in both
    ((what, figure, _),) = figures.flex_gpu(report)
    assert "tile 7x9x4" in what
    assert figure == "2.00x (20.0 ms to 10.0 ms), 2.00x to 3.00x over 2 tiles"


def test_fill_keeps_the_rest(figures: ModuleType) -> None:
    text = f"before\n{figures.START}\nold\n{figures.END}\nafter\n"
    assert figures.fill(text, "new") == text.replace("old", "new")
    with pytest.raises(SystemExit, match="markers"):
        figures.fill("no markers", "new")


def test_no_result_says_how(figures: ModuleType, tmp_path: Path) -> None:
    assert "make bench" in figures.block(tmp_path)
