"""Pictures drawn with matplotlib: what is in them, and what happens without matplotlib."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import numpy as np
import pytest
import scripts

from fpscompile.pictures import MatplotlibMissingError, mask_figure, schedule_figure, window_figure
from fpscompile.plan import PhasePlan, Plan, ResolvedPlan, resolve
from fpscompile.schedule import PAPER
from fpscompile.windows import FAMILIES, Heads, TopK, pattern_of
from fpscompile.windows.base import walk

matplotlib = pytest.importorskip("matplotlib", reason="matplotlib comes with the extra `examples`")


@pytest.fixture
def resolved() -> ResolvedPlan:
    return resolve(Plan.of(PAPER, tile=(2, 4, 4)), (5, 10, 17), 850 + 20, 850 + 20, 20, 20)


def test_mask_figure_shows_each_phase(resolved: ResolvedPlan) -> None:
    figure = mask_figure(resolved)
    images = [axes.images[0].get_array() for axes in figure.axes]
    assert len(images) == 3
    dense = resolved.block_mask.to_dense(resolved.k_layout.n_tiles)[:, 0].numpy()
    for image, phase in zip(images, dense, strict=True):
        assert np.array_equal(np.asarray(image) == 255, phase)


def test_window_figure_counts_the_window(resolved: ResolvedPlan) -> None:
    n_t, n_h, n_w = resolved.q_layout.counts
    figure = window_figure(resolved, (0, 1, 2))
    assert len(figure.axes) == 3 * n_t
    for phase, window in enumerate(resolved.windows):
        cells = np.stack(
            [np.asarray(axes.collections[0].get_array()).reshape(n_h, n_w) for axes in figure.axes[phase * n_t :][:n_t]]
        )
        assert (cells > 0).sum() == np.prod(window)
        assert np.argwhere(cells == 1).tolist() == [[0, 1, 2]]


def test_window_figure_refuses_a_tile_outside(resolved: ResolvedPlan) -> None:
    with pytest.raises(ValueError, match=r"query tile \(9, 0, 0\) is outside the 3×3×5 tiles"):
        window_figure(resolved, (9, 0, 0))


def test_schedule_figure_bars_are_ranges(resolved: ResolvedPlan) -> None:
    figure = schedule_figure(PAPER, resolved.densities)
    bars = figure.axes[0].patches
    assert [bar.get_x() for bar in bars] == [phase.start for phase in PAPER.phases]
    assert [bar.get_height() for bar in bars] == list(resolved.densities)
    with pytest.raises(ValueError, match="2 densities for the 3 phases"):
        schedule_figure(PAPER, (0.1, 0.2))


def test_figures_render_and_leave_pyplot_alone(resolved: ResolvedPlan) -> None:
    for figure in (mask_figure(resolved), window_figure(resolved), schedule_figure(PAPER, resolved.densities)):
        file = io.BytesIO()
        figure.savefig(file, format="png", dpi=40)
        assert file.getvalue().startswith(b"\x89PNG")
    pyplot = sys.modules.get("matplotlib.pyplot")
    assert pyplot is None or not pyplot.get_fignums()


def test_figures_of_other_windows() -> None:
    """Cells are as pale as the share of heads that see them."""
    pattern = Heads({"0": "temporal", "1-3": "sink"}, "dense")  # type: ignore[arg-type]
    plan = Plan((2, 2, 2), (PhasePlan(pattern), PhasePlan(TopK(0.5))))
    resolved = resolve(plan, (6, 6, 6), 216, 216, heads=4)
    figure = window_figure(resolved, (1, 1, 1))
    rows = [np.asarray(axes.collections[0].get_array()).reshape(3, 3) for axes in figure.axes]
    levels = [sorted({round(float(x), 3) for x in row.flatten()}) for row in rows]
    assert levels[0] == [round(0.75 * 0.55, 3), 0.55]  # the sink's heads see the first slice, all heads the own place
    assert levels[2] == [0.0, round(0.25 * 0.55, 3)]
    assert levels[3] == [round(0.55 * 13 / 27, 3)]
    titles = [axes.get_title(loc="left") for axes in figure.axes[::3]]
    assert titles == ["phase 0: heads 0: temporal; heads 1-3: sink; else dense", "phase 1: topk 0.5"]
    masks = [np.asarray(axes.images[0].get_array()) for axes in mask_figure(resolved).axes]
    assert set(masks[0].flatten().tolist()) == {0, 64, 191, 255}
    assert set(masks[1].flatten().tolist()) == {round(255 * 13 / 27)}


def test_the_page_of_windows_is_up_to_date() -> None:
    """docs/make_windows.py makes what is in docs/, and little of it."""
    docs, module = scripts.ROOT / "docs", scripts.load("docs/make_windows.py")
    pages = module.pages()
    for path, text in pages.items():
        assert (docs / path).read_text(encoding="utf-8") == text, f"{path} is stale: run python docs/make_windows.py"
    assert sum(len(text) for text in pages.values()) < 300_000
    assert {path.name for path in (docs / "windows").iterdir()} == {Path(path).name for path in pages} - {"windows.md"}
    named = {part.family for example in module.EXAMPLES for part in walk(pattern_of(example.spec))}
    assert named == set(FAMILIES)


def test_missing_matplotlib_names_the_extra(resolved: ResolvedPlan, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(MatplotlibMissingError, match=r"fpscompile\[examples\]"):
        mask_figure(resolved)
