"""Reports: grouping, numbers, text, JSON, atomic files."""

from __future__ import annotations

import dataclasses
import json
import os
import random
from pathlib import Path

import pytest
from expecttest import assert_expected_inline
from report_records import cogvideox, declined_site, rewritten_site, wan
from rich.console import Console

from fpscompile.files import write_atomically
from fpscompile.records import GraphRecord, Note
from fpscompile.report import Report
from fpscompile.settings import Settings
from fpscompile.site_groups import name_pattern
from fpscompile.wording import flops_text, percent


def test_text_of_wan() -> None:
    assert_expected_inline(
        str(wan()),
        """\
40 of 80 attention calls rewritten: attention keeps 44% of its dense FLOPs, averaged over all steps.

                                                     heads                                      density         FLOPs
 n  sites                 kind   grid      segments  x dim         tokens  outcome              per phase        kept
---------------------------------------------------------------------------------------------------------------------
40  blocks.{0..39}.attn1  3d     21x30x52  video     40x128         32760  rewritten via boxes  1.00 0.34 0.25    44%
40  blocks.{0..39}.attn2  cross  -         -         12x128  32760 to 512  left: kind           1.00             100%

left as they are
  blocks.{0..39}.attn2  cross attention: keys come from other tokens than queries

schedule: training_free
phase  progress    window (tiles)  of     density  granularity  tile
---------------------------------------------------------------------
0      [0, 0.2)    6x4x7           6x4x7  1.000    -            4x8x8
1      [0.2, 0.6)  5x2x5           6x4x7  0.343    -            4x8x8
2      [0.6, 1]    3x2x6           6x4x7  0.250    -            4x8x8

grid      read from the graph
progress  read in the graph from input 'timestep' (1000 to 0, shift 1), unless fpscompile.attach publishes it
passes    0.174 s over 1 graph: normalize 0.021, trace_axes 0.153

notes
  warning  mind the step [stale]
  info     densities are of grid (21, 30, 52) [density]""",
    )


def test_text_of_cogvideox_with_text_first_and_unknown_progress() -> None:
    assert_expected_inline(
        str(cogvideox("unknown")),
        """\
3 of 3 attention calls rewritten: attention keeps 25% of its dense FLOPs, averaged over all steps.

                                                               heads                               density         FLOPs
n  sites                 kind  grid      segments              x dim  tokens  outcome              per phase        kept
------------------------------------------------------------------------------------------------------------------------
3  transformer_blocks.{  3d    13x30x45  other 226 + video     48x64   17776  rewritten via boxes  0.08 0.25 0.14    25%
   0..2}.attn1                           17550

schedule: paper
phase  progress    window (tiles)  of     density  granularity      tile
-------------------------------------------------------------------------
0      [0, 0.2)    2x2x2           7x4x6  0.079    fp8 per head     2x8x8
1      [0.2, 0.8)  3x4x3           7x4x6  0.248    fp8 per subtile  2x8x8
2      [0.8, 1]    2x3x3           7x4x6  0.142    fp8 per tile     2x8x8

grid          published by fpscompile.attach
progress      unknown: every step runs phase 1, the densest. Wrap the loop in fpscompile.attach(model), or name the
              timestep input in options["timestep"]
quantization  fp8, K without its mean""",
    )


def test_text_of_declined_sites() -> None:
    sites = [
        declined_site("token count 1024 is not known to be a grid: give options['grid']", "no-grid", module="a.attn"),
        declined_site("dropout_p=0.1: call model.eval()", "dropout", module="b.attn"),
        declined_site("spatial attention", "kind", kind="spatial", module="c.attn", k_length=77),
    ]
    report = Report([GraphRecord(sites=sites)], Settings())
    assert_expected_inline(
        str(report),
        """\
None of 3 attention calls was rewritten: the model runs as without fps.

                                    heads                              density    FLOPs
n  sites   kind     grid  segments  x dim       tokens  outcome        per phase   kept
---------------------------------------------------------------------------------------
1  a.attn  3d       -     -         12x128        1024  left: no-grid  1.00        100%
1  b.attn  3d       -     -         12x128        1024  left: dropout  1.00        100%
1  c.attn  spatial  -     -         12x128  1024 to 77  left: kind     1.00        100%

left as they are
  a.attn  token count 1024 is not known to be a grid: give options['grid']
  b.attn  dropout_p=0.1: call model.eval()
  c.attn  spatial attention""",
    )


def test_no_attention_says_so() -> None:
    assert_expected_inline(
        f"{Report([])}\n\n{Report([GraphRecord(), GraphRecord()])}",
        """\
No attention call reached the backend: no graph was captured.
The model did not run, ran under torch.compiler.disable, or broke at its first operation: TORCH_LOGS=graph_breaks shows
where.

No attention call reached the backend: 2 graphs captured, none contains attention.
It may have no softmax, as linear attention has none, hide in a custom op, or run outside the captured graphs:
TORCH_LOGS=graph_breaks shows what was left out.""",
    )


@pytest.mark.parametrize("width", [60, 80, 120, 200])
def test_text_keeps_to_its_width(width: int) -> None:
    lines = wan().to_text(width).splitlines()
    assert max(len(line) for line in lines) <= width
    assert any("44%" in line for line in lines), "the last column is lost"


def test_rich_print_has_colours() -> None:
    console = Console(force_terminal=True, color_system="truecolor", width=120)
    with console.capture() as capture:
        console.print(wan(1))
    assert "\x1b[32m" in capture.get()
    assert "\x1b" not in str(wan(1))


def test_markup_in_names_is_not_interpreted() -> None:
    site = declined_site("because of [bold]x[/bold] and [/]", "mask", module="m.[red]n[/red]")
    text = str(Report([GraphRecord(sites=[site], notes=[Note("info", "c", "a [/b] c")])]))
    for part in ("[bold]x[/bold] and [/]", "m.[red]n[/red]", "a [/b] c"):
        assert part in text


def test_groups_keep_unlike_sites_apart() -> None:
    settings = Settings(density=0.5)
    like = [rewritten_site((4, 16, 16), settings, heads=2, head_dim=8, module=f"blocks.{i}") for i in range(3)]
    unlike = [
        dataclasses.replace(like[0], head_dim=16),
        dataclasses.replace(like[0], dtype="float32"),
        dataclasses.replace(like[0], lowering="gather"),
        dataclasses.replace(like[0], density=(0.25,)),
    ]
    sites = like + unlike
    random.shuffle(sites)
    groups = Report([GraphRecord(sites=sites)], settings).groups
    assert sorted(len(group.sites) for group in groups) == [1, 1, 1, 1, 3]
    assert {group.name for group in groups if len(group.sites) == 3} == {"blocks.{0..2}"}


def test_reasons_that_differ_only_by_their_own_node_are_one_group() -> None:
    sites = [declined_site(f"call {node} has dropout", "dropout", node=node) for node in ("sdpa", "sdpa_1", "sdpa_2")]
    assert len(Report([GraphRecord(sites=sites)]).groups) == 1


@pytest.mark.parametrize(
    ("names", "pattern"),
    [
        (["a.0.b"], "a.0.b"),
        (["a.0.b", "a.0.b"], "a.0.b"),
        ([f"a.{i}.b" for i in range(40)], "a.{0..39}.b"),
        (["a.0.b", "a.2.b", "a.4.b"], "a.{0,2,4}.b"),
        ([f"a.{2 * i}.b" for i in range(9)], "a.*.b"),
        ([f"a.{i}.b.{j}" for i in range(2) for j in range(3)], "a.*.b.*"),
        (["down.0.attn", "up.attn"], "down.0.attn ... up.attn"),
        (["sdpa", "sdpa_1", "sdpa_2"], "sdpa ... sdpa_2"),
        (["down.0.attn", "side.0.attn"], "down.0.attn ... side.0.attn"),
    ],
)
def test_name_pattern(names: list[str], pattern: str) -> None:
    assert name_pattern(names) == pattern


def test_flops_are_weighted_by_range_and_by_size() -> None:
    schedule = [
        {"start": 0.0, "end": 0.1, "density": 1.0},
        {"start": 0.1, "end": 0.7, "density": 0.5},
        {"start": 0.7, "end": 1.0, "density": 0.25},
    ]
    settings = Settings(schedule=schedule, tile=(1, 4, 4))  # type: ignore[arg-type]
    site = dataclasses.replace(
        rewritten_site((4, 16, 16), settings, heads=2, head_dim=8), density=(1.0, 0.5, 0.25), conservative=0
    )
    left = declined_site("no", "mask", q_length=100, k_length=50)
    report = Report([GraphRecord(sites=[site, left], progress_source="attach")], settings)
    mean = 0.1 * 1.0 + 0.6 * 0.5 + 0.3 * 0.25
    dense = 4 * 2 * 1024**2 * 8
    other = 4 * 12 * 100 * 50 * 128
    assert report.flops_kept_rewritten == pytest.approx(mean, rel=1e-12)
    assert report.flops_kept == pytest.approx((dense * mean + other) / (dense + other), rel=1e-12)


def test_unknown_progress_keeps_the_conservative_phase() -> None:
    known, unknown = cogvideox("attach"), cogvideox("unknown")
    site = unknown.sites[0]
    assert unknown.flops_kept == pytest.approx(site.density[site.conservative])
    assert known.flops_kept < unknown.flops_kept


def test_grid_known_at_run_time_promises_no_number() -> None:
    site = dataclasses.replace(cogvideox().sites[0], grid=None, windows=(), density=(1.0,))
    report = Report([GraphRecord(sites=[site], progress_source="attach")], Settings(schedule="paper"))
    assert "known at run time" in report.headline
    assert "at run time" in str(report)
    assert "100%" not in str(report)


def test_strict_failures_are_those_of_the_requested_kind_and_warnings() -> None:
    sites = [
        declined_site("has dropout", "dropout", module="a"),
        declined_site("cross attention", "kind", kind="cross", module="b"),
    ]
    notes = [Note("info", "x", "harmless"), Note("warning", "y", "assumed")]
    failures = Report([GraphRecord(sites=sites, notes=notes)]).strict_failures
    assert failures == ["a (3d, 1024 tokens): has dropout", "assumed"]


def test_properties_join_graphs_in_order() -> None:
    note = Note("info", "same", "said twice")
    graphs = [
        GraphRecord(
            sites=[declined_site("r", "mask", node=f"n{i}")], notes=[note], graph_before=f"b{i}", graph_after="a"
        )
        for i in range(2)
    ]
    report = Report(graphs)
    assert [site.node for site in report.sites] == ["n0", "n1"]
    assert report.notes == [note]
    assert report.rewritten == 0
    assert report.graph_before == "# graph 1 of 2\nb0\n\n# graph 2 of 2\nb1"
    assert Report(graphs[:1]).graph_before == "b0"


def test_to_dict_survives_json() -> None:
    settings = Settings(inner=lambda gm, inputs: gm, inner_options={"depth": 2})  # type: ignore[arg-type]
    report = wan(2, settings)
    data = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert data["rewritten"] == 2
    assert data["sites"][0]["grid"] == [21, 30, 52]
    assert data["sites"][0]["plan"]["tile"] == [4, 8, 8]
    assert data["sites"][1]["reason_code"] == "kind"
    assert "lambda" in data["settings"]["inner"]
    assert data["graphs"][0]["neighbourhoods"][0][1]["edges"][0] == ["x", "q"]
    assert data["flops_kept"] == report.flops_kept


def test_files_are_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "new" / "folder" / "report.html"
    assert wan(1).save_html(target) == target
    old = target.read_text(encoding="utf-8")
    assert old.rstrip().endswith("</html>")

    def fail(*_: object) -> None:
        raise OSError("disk full")

    with pytest.raises(IsADirectoryError, match=r"folder, name a file in it: '.*folder'"):
        wan(1).save_html(target.parent)
    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        write_atomically(target, "half")
    assert target.read_text(encoding="utf-8") == old
    assert [path.name for path in target.parent.iterdir()] == ["report.html"]


@pytest.mark.parametrize(
    ("fraction", "text"),
    [(0.0, "0%"), (0.004, "0.4%"), (0.0994, "9.9%"), (0.0996, "10%"), (0.436, "44%"), (1.0, "100%")],
)
def test_percent(fraction: float, text: str) -> None:
    assert percent(fraction) == text


@pytest.mark.parametrize(
    ("flops", "text"),
    [(0.0, "0 FLOP"), (999.0, "999 FLOP"), (999.7, "1 KFLOP"), (8.44e12, "8.44 TFLOP"), (5e18, "5e+03 PFLOP")],
)
def test_flops_text(flops: float, text: str) -> None:
    assert flops_text(flops) == text
