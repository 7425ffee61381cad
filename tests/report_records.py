"""Records of well-known models, made by hand: what the tests of reports render."""

from __future__ import annotations

import math

import networkx as nx

from fpscompile.plan import Plan, resolve
from fpscompile.records import GraphRecord, Note, PassRecord, SiteRecord
from fpscompile.report import Report
from fpscompile.settings import Settings


def rewritten_site(
    grid: tuple[int, int, int],
    settings: Settings,
    *,
    heads: int,
    head_dim: int,
    before: int = 0,
    after: int = 0,
    node: str = "scaled_dot_product_attention",
    module: str = "",
    grid_source: str = "graph",
) -> SiteRecord:
    plan = Plan.of(settings.phases, tile=settings.tile, quant=settings.quant)
    video = math.prod(grid)
    length = before + video + after
    resolved = resolve(plan, grid, length, length, before, before)
    segments = tuple((kind, size) for kind, size in (("other", before), ("video", video), ("other", after)) if size)
    return SiteRecord(
        node=node,
        module=module,
        kind="3d",
        batch=1,
        heads=heads,
        head_dim=head_dim,
        q_length=length,
        k_length=length,
        dtype="bfloat16",
        grid=grid,
        grid_source=grid_source,
        segments=segments,
        rewritten=True,
        reason=None,
        reason_code=None,
        plan=plan,
        lowering="boxes",
        windows=resolved.windows,
        density=resolved.densities,
        conservative=resolved.conservative,
    )


def declined_site(
    reason: str,
    code: str,
    *,
    kind: str = "3d",
    q_length: int = 1024,
    k_length: int = 1024,
    node: str = "scaled_dot_product_attention",
    module: str = "",
) -> SiteRecord:
    return SiteRecord(
        node=node,
        module=module,
        kind=kind,
        batch=1,
        heads=12,
        head_dim=128,
        q_length=q_length,
        k_length=k_length,
        dtype="bfloat16",
        grid=None,
        grid_source=None,
        segments=(),
        rewritten=False,
        reason=reason,
        reason_code=code,
        plan=None,
        lowering=None,
        windows=(),
        density=(1.0,),
        conservative=0,
    )


def wan(blocks: int = 40, settings: Settings | None = None, grid: tuple[int, int, int] = (21, 30, 52)) -> Report:
    """Wan 14B at 480p: self-attention and text cross attention in every block."""
    settings = settings or Settings(quant="none")
    sites = []
    for block in range(blocks):
        for index, kind in ((2 * block, "attn1"), (2 * block + 1, "attn2")):
            node = f"scaled_dot_product_attention_{index}" if index else "scaled_dot_product_attention"
            module = f"blocks.{block}.{kind}"
            if kind == "attn1":
                site = rewritten_site(grid, settings, heads=40, head_dim=128, node=node, module=module)
            else:
                site = declined_site(
                    "cross attention: keys come from other tokens than queries",
                    "kind",
                    kind="cross",
                    q_length=math.prod(grid),
                    k_length=512,
                    node=node,
                    module=module,
                )
            sites.append(site)
    graph = GraphRecord(
        sites=sites,
        notes=[
            Note("info", "density", "densities are of grid (21, 30, 52)"),
            Note("warning", "stale", "mind the step"),
        ],
        passes=[PassRecord("normalize", 0.021, True), PassRecord("trace_axes", 0.153, False)],
        graph_before="def forward(self, x):\n    return attention(x)",
        graph_after="def forward(self, x):\n    return fps(x)",
        neighbourhoods=[(sites[0].node, toy_picture("sdpa"), toy_picture("fps::attention"))] if sites else [],
        progress_source="input 'timestep'",
        settings=settings,
        seconds=0.174,
    )
    return Report([graph], settings)


def cogvideox(progress_source: str = "attach") -> Report:
    """CogVideoX: 226 text tokens ahead of a 13 x 30 x 45 video, in one joint attention."""
    settings = Settings(schedule="paper", quant="fp8", tile=(2, 8, 8))
    sites = [
        rewritten_site(
            (13, 30, 45),
            settings,
            heads=48,
            head_dim=64,
            before=226,
            module=f"transformer_blocks.{block}.attn1",
            grid_source="attach",
        )
        for block in range(3)
    ]
    return Report([GraphRecord(sites=sites, progress_source=progress_source, settings=settings)], settings)


def toy_picture(attention: str) -> nx.DiGraph:
    """linear -> q, k, v -> attention -> output, as :mod:`fpscompile.graph_view` makes it."""
    picture = nx.DiGraph(centre="attention")
    picture.add_node("x", label="x", shape="[1, 60, 8]", role="input", inputs=0)
    for name in "qkv":
        picture.add_node(name, label="linear", shape="[1, 60, 8]", role="op", inputs=3, params=2)
        picture.add_edge("x", name)
    picture.add_node("attention", label=attention, shape="[1, 2, 60, 4]", role="attention", inputs=3)
    picture.add_edges_from((name, "attention") for name in "qkv")
    picture.add_node("output", label="output", shape="", role="output", inputs=1)
    picture.add_edge("attention", "output")
    return picture
