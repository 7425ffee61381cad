"""What the passes say to one another: sizes, segments, sites, rejections."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Any

import sympy
from torch import fx


class Reason(enum.StrEnum):
    """Why a site was not rewritten. Stable codes: tests, reports and users match on them."""

    KIND = "kind"  # spatial, temporal, cross or other attention: not asked for
    NO_GRID = "no-grid"  # the graph does not show (t, h, w) and nothing else told it
    GRID_MISMATCH = "grid-mismatch"  # the grid told is not the one that a table of positions shows
    TOKEN_ORDER = "token-order"  # the tokens are not in row-major (t, h, w) order
    SEGMENTS = "segments"  # several videos in one sequence, or parts that cannot be told apart
    DROPOUT = "dropout"
    CAUSAL = "causal"
    MASK = "mask"  # a mask that is not a key mask
    DTYPE = "dtype"
    LAYOUT = "layout"  # q, k, v are not [B, heads, tokens, features]
    SPELLING = "spelling"  # attention-like arithmetic that is not exactly attention
    SUBGRAPH = "subgraph"  # inside a higher-order op that is not looked into
    DISABLED = "disabled"  # FPS_DISABLE


@dataclass(frozen=True)
class Rejection:
    """A declined site: a code, a sentence a user can act on, the guilty value and node."""

    code: Reason
    message: str
    value: Any = None
    node: fx.Node | None = None


@dataclass(frozen=True)
class Size:
    """A dimension that may be symbolic. Comparing sizes installs no guard."""

    expr: sympy.Expr
    hint: int
    """Its value in the call that is being compiled."""

    def __str__(self) -> str:
        return str(self.hint) if self.expr.is_number else f"{self.expr} (now {self.hint})"


@dataclass(frozen=True)
class Segment:
    """A run of tokens in a sequence."""

    kind: str
    """"video" or "other" (text, registers: seen by all, sees all)."""
    length: Size


@dataclass(frozen=True)
class Span:
    """Where the video's tokens lie in a sequence. ``None`` nodes stand for the constant in ``hint``/``expr``."""

    start: Size
    length: Size


@dataclass(frozen=True, eq=False)
class AttentionSite:
    """One attention call of the graph, canonicalised by ``normalize`` and placed by ``find_sites``."""

    node: fx.Node
    """The canonical ``scaled_dot_product_attention`` call."""
    kind: str
    """"3d", "spatial", "temporal", "cross" or "other"."""
    shape: tuple[Size, Size, Size, Size, Size]
    """(B, heads, Lq, Lk, features per head)."""
    dtype: str = ""
    """Of the queries: "float32", "bfloat16", ..."""
    grid: tuple[Size, Size, Size] | None = None
    """Video tokens along (t, h, w); None when unknown, or known only at run time (``grid_source`` "attach" or
    "rotary": then that of the call being compiled)."""
    grid_source: str | None = None
    """"graph", "options", "attach", or "rotary": the values of a rotary table."""
    segments: tuple[Segment, ...] = ()
    """Query sequence, in order."""
    query_span: Span | None = None
    key_span: Span | None = None
    query_runs: tuple[Any, ...] = ()
    """Labels of the runs of the query sequence, in order; a span begins where one of them does."""
    key_runs: tuple[Any, ...] = ()
    history: int = 0
    """How many earlier videos in front of the current one are a part of ``grid`` (``options["history"]``)."""
    table: tuple[fx.Node, int, Size, Size] | None = None
    """With ``grid_source="rotary"``: the table, its token dimension, and which of its rows are the video's."""
    head_part: tuple[int, int] | None = None
    """Where ranks share out the heads: (the first that this rank has, of how many)."""
    rejection: Rejection | None = None

    @property
    def all_heads(self) -> int:
        """Heads of all ranks."""
        return self.head_part[1] if self.head_part is not None else self.shape[1].hint
