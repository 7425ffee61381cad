"""restore: a call that was not rewritten becomes the author's own again; of a rewritten one, the author's is erased.

Runs last, when both are known. Until then the canonical call and the author's spelling stand side by side
(:mod:`fpscompile.passes.canonical`), the latter unread. Newest replacements first: one may stand on another.
"""

from __future__ import annotations

from dataclasses import dataclass

from fpscompile.passes.base import GraphState, Replacement


@dataclass(frozen=True)
class Restore:
    name: str = "restore"

    def run(self, state: GraphState) -> bool:
        settled = [item for graph in state.everywhere() for item in graph.replaced]
        for item in reversed(settled):
            _settle(item, kept=item.call in state.rewritten or item.call._erased)
        for graph in state.everywhere():
            graph.replaced.clear()
        return bool(settled)


def _settle(item: Replacement, kept: bool) -> None:
    if not kept:
        item.result.replace_all_uses_with(item.original)
    doomed = item.covered if kept else tuple(reversed(item.added))
    for node in doomed:
        if not node._erased and not node.users:
            item.state.graph.erase_node(node)
