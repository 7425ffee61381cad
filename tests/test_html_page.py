"""The HTML page: whole, self-contained, escaped, accessible, small."""

from __future__ import annotations

import base64
import dataclasses
import re
from html.parser import HTMLParser
from pathlib import Path

import networkx as nx
import pytest
from report_records import cogvideox, declined_site, rewritten_site, toy_picture, wan

from fpscompile.html import render
from fpscompile.html.page import CODE_LIMIT, layouts
from fpscompile.html.svg_graph import draw
from fpscompile.records import GraphRecord, Note
from fpscompile.report import Report
from fpscompile.settings import Settings

VOID = {"meta", "link", "br", "img", "input", "hr"}
HOSTILE = "<script>alert('x')</script>\"><img src=x onerror=y>&{{ 7*7 }}"


class Page(HTMLParser):
    """Collects what the tests ask for, and fails on tags that do not nest."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {name: value or "" for name, value in attrs}))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {name: value or "" for name, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag, f"</{tag}> at {self.getpos()} does not close the last open tag"

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.text += data

    def ids(self) -> list[str]:
        return [attributes["id"] for _, attributes in self.tags if "id" in attributes]

    def count(self, tag: str, kind: str = "") -> int:
        """Tags of a name, and of a class when ``kind`` is given."""
        return sum(name == tag and kind in ("", *attributes.get("class", "").split()) for name, attributes in self.tags)


@pytest.mark.parametrize(
    "report",
    [wan(), cogvideox(), cogvideox("unknown"), wan(0), Report([]), Report([GraphRecord()])],
    ids=["wan", "text first", "unknown progress", "no sites", "no graphs", "empty graph"],
)
def test_page_is_well_formed_and_self_contained(report: Report) -> None:
    text = render(report)
    page = Page(text)
    for tag, attributes in page.tags:
        assert tag not in ("script", "link", "iframe", "object", "base"), f"<{tag}> may load something"
        for name in ("src", "href", "xlink:href", "srcset"):
            assert attributes.get(name, "#").startswith(("#", "data:image/png;base64,"))
    assert not re.search(r"https?://|@import|url\(|//[a-z]+\.", re.sub(r"base64,[\w+/=]+", "", text))
    assert len(page.ids()) == len(set(page.ids()))
    targets = {attributes["href"][1:] for tag, attributes in page.tags if tag == "a"}
    assert targets <= set(page.ids()), "a link leads nowhere"


def test_every_section_is_there() -> None:
    page = Page(render(wan()))
    assert {"notes", "sites", "schedule", "graph", "details"} <= set(page.ids())
    for text in ("blocks.{0..39}.attn1", "rewritten via boxes", "mind the step", "trace_axes", "return fps(x)", "44%"):
        assert text in page.text
    assert page.count("svg", "timeline") == 1
    assert page.count("svg", "mask") == 3
    assert page.count("div", "slices") == 6, "the middle and the corner tile of three phases"
    assert page.count("svg", "graph") == 2


def test_unlike_plans_are_shown_apart() -> None:
    settings = Settings(density=0.4, tile=(2, 8, 8))
    grids = [(4, 16, 24), (4, 24, 16)]
    sites = [rewritten_site(grid, settings, heads=2, head_dim=8, module=f"b.{i}") for grid in grids for i in range(3)]
    page = Page(render(Report([GraphRecord(sites=sites, progress_source="constant")], settings)))
    assert page.count("article", "plan") == 2
    assert page.count("svg", "mask") == 2
    assert "Grid 4×16×24" in page.text
    assert "Grid 4×24×16" in page.text


def test_pictures_have_words() -> None:
    page = Page(render(cogvideox()))
    pictures = [attributes for tag, attributes in page.tags if tag == "svg"]
    assert all(attributes.get("aria-label") or attributes.get("aria-hidden") == "true" for attributes in pictures)
    labels = " ".join(attributes.get("aria-label", "") for _, attributes in page.tags)
    for index, density in enumerate(cogvideox().sites[0].density):
        assert f"phase {index} from" in labels
        assert f"density {density:.3f}" in labels


def test_unknown_progress_is_said_and_remedied() -> None:
    page = Page(render(cogvideox("unknown")))
    assert "every step runs phase 1" in page.text
    assert "fpscompile.attach(model)" in page.text
    assert page.count("rect", "unused") == 2
    assert "every step runs" not in Page(render(cogvideox("attach"))).text


def test_declined_sites_show_reason_and_remedy_first() -> None:
    reason = "token count 1024 is not known to be a grid: give options['grid']"
    report = Report([GraphRecord(sites=[declined_site(reason, "no-grid", module="a.attn")])])
    text = Page(render(report)).text
    assert text.index("not rewritten") < text.index(reason) < text.index("Attention calls", text.index(reason))


def test_hostile_names_are_text() -> None:
    picture = toy_picture(HOSTILE)
    picture.nodes["q"]["shape"] = HOSTILE
    picture.nodes["v"]["role"] = HOSTILE
    site = declined_site(HOSTILE, HOSTILE, node=HOSTILE, module=HOSTILE)
    graph = GraphRecord(
        sites=[site, dataclasses.replace(cogvideox().sites[0], module=HOSTILE, lowering=HOSTILE)],
        notes=[Note(HOSTILE, HOSTILE, HOSTILE)],
        graph_before=HOSTILE,
        graph_after=HOSTILE,
        neighbourhoods=[(HOSTILE, picture, picture)],
        progress_source=HOSTILE,
    )
    page = Page(render(Report([graph], Settings(schedule="paper"))))
    assert page.count("script") == page.count("img") == 0
    assert page.text.count(HOSTILE) >= 8


def test_size_is_bounded_with_thousands_of_tiles() -> None:
    report = wan(40, Settings(tile=(1, 4, 4)), grid=(21, 45, 80))
    code = "\n".join(f"    x{i} = torch.add(x{i - 1}, 1)" for i in range(60_000))
    report.graphs[0].graph_before = report.graphs[0].graph_after = code
    text = render(report)
    assert len(text.encode()) < 1_500_000
    assert "more lines are in" in text
    assert len(code) > CODE_LIMIT


def test_masks_are_png_of_the_right_size() -> None:
    text = render(cogvideox())
    pictures = [base64.b64decode(data) for data in re.findall(r"base64,([\w+/=]+)", text)]
    q_layout, k_layout = layouts(cogvideox().sites[0])
    assert len(pictures) == 3
    for picture in pictures:
        assert picture.startswith(b"\x89PNG\r\n\x1a\n")
        assert int.from_bytes(picture[16:20]) == k_layout.n_tiles == q_layout.n_tiles
        assert int.from_bytes(picture[20:24]) == q_layout.n_tiles


def test_layouts_place_the_other_tokens() -> None:
    site = cogvideox().sites[0]
    assert [(side.before, side.after) for side in layouts(site)] == [(226, 0), (226, 0)]
    last = rewritten_site((5, 6, 7), Settings(window=(1, 1, 1)), heads=1, head_dim=8, after=30)
    assert [(side.before, side.after) for side in layouts(last)] == [(0, 30), (0, 30)]
    more_keys = dataclasses.replace(last, q_length=210, segments=(("video", 210),), k_length=240)
    assert [(side.before, side.after) for side in layouts(more_keys)] == [(0, 0), (0, 30)]


def test_both_colour_schemes_and_no_scripts(tmp_path: Path) -> None:
    text = wan(1).save_html(tmp_path / "page.html").read_text(encoding="utf-8")
    assert "prefers-color-scheme: dark" in text
    assert '<html lang="en">' in text
    assert "width=device-width" in text


def test_empty_picture_is_words() -> None:
    assert "No picture" in draw(nx.DiGraph(), "nothing")
