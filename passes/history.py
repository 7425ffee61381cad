"""History: earlier videos in front of the current one, in one sequence (FramePack, Helios).

By default each is seen by all tokens and sees all, as text is. With ``options["history"] = "windowed"``, the videos
that end where the largest one begins and have its (h, w) become a part of it: row-major tokens of the same rows and
columns, end to end, are one grid that is longer along t. Compressed history has another (h, w), is short, and stays as
it is.
"""

from __future__ import annotations

from dataclasses import dataclass

import sympy

from fpscompile.errors import OptionError
from fpscompile.ir import AttentionSite, Size
from fpscompile.passes.axes import ONE, Axis, axis_size, concat, root, same
from fpscompile.passes.base import GraphState
from fpscompile.passes.not_video import factor_kind
from fpscompile.passes.told_tokens import resumed

Grid = tuple[Size, Size, Size]
Runs = tuple[Axis, ...]
WINDOWED = "windowed"


@dataclass(frozen=True)
class Chosen:
    """The video of a sequence that is windowed, and the sequence cut so that it is one run."""

    run: Axis
    grid: Grid
    q_runs: Runs
    k_runs: Runs
    history: int = 0
    """How many videos in front became a part of it."""


def choose(state: GraphState, videos: list[tuple[Axis, Grid]], q_runs: Runs, k_runs: Runs) -> Chosen:
    """The video with most tokens; of equals the last, for history comes first. With its history, if options say so."""
    chosen = Chosen(*max(reversed(videos), key=lambda video: axis_size(video[0]).hint), q_runs, k_runs)
    if state.settings.history == WINDOWED:
        grids = dict(videos)
        while (longer := _with_the_one_before(state, chosen, grids)) is not None:
            chosen = longer
    sizes = "x".join(str(size.hint) for size in chosen.grid)
    if chosen.history:
        message = f"the window runs over {sizes} tokens, {chosen.history} earlier video(s) of the same (h, w) included"
        state.note("info", "history", f"{message}; all other history is seen by all")
    elif len(videos) > 1:
        message = (
            f"{len(videos)} videos share a sequence: the largest, {sizes}, is windowed; the others are seen by all"
        )
        state.note("info", "several-videos", message)
    return chosen


def _with_the_one_before(state: GraphState, chosen: Chosen, grids: dict[Axis, Grid]) -> Chosen | None:
    """``chosen`` and the video that ends where it begins, in queries and keys alike; None where that is none."""
    places = chosen.q_runs.index(chosen.run), chosen.k_runs.index(chosen.run)
    if 0 in places:
        return None
    before = chosen.q_runs[places[0] - 1]
    earlier = grids.get(before) or _frame(before)
    if chosen.k_runs[places[1] - 1] != before or earlier is None:
        return None
    (t, h, w), (frames, rows, columns) = chosen.grid, earlier
    if not (_equal(state, h, rows) and _equal(state, w, columns)):
        return None
    run = concat((before, chosen.run))
    q_runs, k_runs = (
        (*runs[: place - 1], run, *runs[place + 1 :])
        for runs, place in zip((chosen.q_runs, chosen.k_runs), places, strict=True)
    )
    longer = Size(sympy.Add(frames.expr, t.expr), frames.hint + t.hint)
    return Chosen(run, (longer, h, w), q_runs, k_runs, chosen.history + 1)


def _equal(state: GraphState, left: Size, right: Size) -> bool:
    """Whether two sizes are equal. Where they only are in this call, a guard makes the graph one for such calls."""
    if same(left, right):
        return True
    mode = state.fake_mode
    if left.hint != right.hint or mode is None or mode.shape_env is None:
        return False
    return bool(mode.shape_env.evaluate_expr(sympy.Eq(left.expr, right.expr)))


def _frame(run: Axis) -> Grid | None:
    """(1, h, w) of a single frame, which is a picture where it stands alone."""
    leads = [root((factor,)) for factor in run]
    if len(leads) != 2 or factor_kind(run, ()) != "spatial" or leads[0].dim >= leads[1].dim:  # type: ignore[union-attr]
        return None
    return (ONE, run[0].size, run[1].size)


def check(state: GraphState) -> None:
    """``options["history"]`` must have had an effect where there is a video to be windowed.

    Raises:
        OptionError: no video of the graph has a history that can be windowed with it.
    """
    sites = [site for site in state.sites if site.kind == "3d" and site.rejection is None]
    if state.settings.history != WINDOWED or not sites or any(site.history for site in sites):
        return
    message = _why_not(sites[0])
    if resumed():
        state.note("warning", "history", message)
        return
    raise OptionError(message)


def _why_not(site: AttentionSite) -> str:
    grid = tuple(size.hint for size in site.grid or ())
    segments = " + ".join(f"{segment.kind} {segment.length.hint}" for segment in site.segments)
    return (
        f"options['history']={WINDOWED!r}, but {site.node} ({segments}) has no video whose grid the graph shows with "
        f"the (h, w) of {grid}, ending where that one begins: nothing can be windowed with it; drop the option, "
        "history is then seen by all"
    )
