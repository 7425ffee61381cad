"""The general lowering: each query tile gathers the key tiles listed for it. Any block mask, pure torch, any device.

Keys and values of a batch element are first laid out in tile slots, ``[Hk, k_tiles + 1, slots, D]``: zeros past a
ragged tile's end, and one empty tile at the end for lists that are shorter than their neighbours. Query tiles with
lists of similar length then go through one dense softmax together, in chunks of bounded memory. Empty slots get a
bias of -inf. Batch elements that are in the same phase go through all this together, as further heads.

With ``quant="fp8"`` the weights follow the rounding contract of :mod:`fpscompile.kernel_spec`. The running maximum
after block j is the cumulative maximum of the blocks' maxima, rounded up, so no loop over blocks is needed: with ``m``
the final maximum, block j's weights are ``P8_j * exp(m_j - m) / (p_scale * l)``. Gradients are those that
:mod:`fpscompile.reference` states.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from fpscompile.errors import UnsupportedError
from fpscompile.hadamard import unrotate
from fpscompile.kernel_spec import tile_slots
from fpscompile.masks import BlockMask
from fpscompile.plan import ResolvedPlan
from fpscompile.quant import place_of_token, quantize_attention, round_e4m3, rounding_base, work_dtype
from fpscompile.tiling import TileLayout

NEG_INF = float("-inf")

CHUNK_BYTES = {"cpu": 8 << 20, "cuda": 128 << 20}
"""Size aimed at for the scores of one chunk, by device: about a cache, or enough to fill a GPU. A single run of queries
may exceed it, when it sees very many keys."""

TOGETHER_BYTES = {"cpu": 4 << 20, "cuda": 64 << 20}
"""Batch elements go through together only while Q, K and V of all of them, in the dtype of the arithmetic, fit in this:
what is gained is the time of many small operations, which large elements do not notice."""

QUERY_RUN = 256
"""Longer query tiles are cut into runs of this many tokens, each with its own row of scores."""

FULLEST_PADDING = 0.25
"""Largest share of a list that may be filled up with empty tiles to join a chunk."""


@dataclass(frozen=True, eq=False)
class _Chunk:
    """Runs of queries of equal length, handled together."""

    tokens: torch.Tensor
    """int64 [runs, length]: query tokens, as sequence indices."""
    tiles: torch.Tensor
    """int64 [runs, capacity]: key tiles; the empty tile fills up short lists."""
    keys: torch.Tensor | None
    """int64 [n]: the listed slots to keep, those that hold a token for some run; None keeps all. Never set where
    the rounding of P counts slots."""
    masked: bool
    """Whether some of the kept slots are empty."""


@dataclass(frozen=True)
class _Heads:
    """Heads that share a block mask and are handled together: ``group`` query heads for each key head."""

    queries: slice
    keys: slice
    group: int
    mask: int
    """Index into the head axis of the block mask."""


@dataclass(frozen=True, eq=False)
class _Element:
    """Batch elements of one phase, their heads one after another, in the dtype of the arithmetic; dequantized when the
    plan quantizes. H and Hk count the heads of all of them."""

    q: torch.Tensor
    """[H, Lq, D], times the softmax scale. D is that of the rotated features where the plan rotates."""
    k: torch.Tensor
    """[Hk, k_tiles + 1, slots, D]."""
    v: torch.Tensor
    """[Hk, k_tiles + 1, slots, Dv]."""
    bias: torch.Tensor
    """[1 | H, k_tiles + 1, slots]: key mask, and -inf in empty slots."""
    key_mask: bool
    """Whether ``bias`` holds more than empty slots."""
    lse_shift: torch.Tensor | None
    """[H, Lq], or None."""
    v_mean: torch.Tensor | None = None
    """[Hk, 1, Dv]: what ``v`` is without, or None."""


@dataclass(frozen=True)
class _Together:
    """Batch elements of one phase."""

    elements: tuple[int, ...]

    def heads_of(self, x: torch.Tensor) -> torch.Tensor:
        """[B, H, ...] -> [n * H, ...]; a view where there is one element."""
        if len(self.elements) == 1:
            return x[self.elements[0]]
        return x[list(self.elements)].flatten(0, 1)

    def empty(self, x: torch.Tensor) -> torch.Tensor:
        """A place for the heads of these elements of ``x`` [B, H, ...], to be given to :meth:`store`."""
        if len(self.elements) == 1:
            return x[self.elements[0]]
        return x.new_empty(len(self.elements) * x.shape[1], *x.shape[2:])

    def store(self, x: torch.Tensor, heads: torch.Tensor) -> None:
        """Into ``x`` [B, H, ...]: what :meth:`heads_of` takes out."""
        if len(self.elements) > 1:
            x[list(self.elements)] = heads.unflatten(0, (len(self.elements), -1)).to(x.dtype)
        elif heads.data_ptr() != x[self.elements[0]].data_ptr():
            x[self.elements[0]] = heads


@torch.no_grad()
def forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    key_mask: torch.Tensor | None,
    phases: tuple[int, ...],
    resolved: ResolvedPlan,
    scale: float,
    block_mask: BlockMask | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention over the listed tiles.

    Args:
        q: [B, H, Lq, D].
        k, v: [B, Hk, Lk, D] and [B, Hk, Lk, Dv].
        key_mask: None or [B | 1, H | 1, 1, Lk]: bool (True keeps) or added to the scaled scores.
        phases: one per batch element.
        resolved: the plan on this grid.
        scale: factor on the scores.
        block_mask: instead of the plan's; its head axis has length 1 or H.

    Returns:
        output [B, H, Lq, Dv] in q's dtype, the transpose of a contiguous [B, Lq, H, Dv]; log-sum-exp [B, H, Lq],
        float32, or float64 for float64 inputs.
    """
    batch, heads, length, _ = q.shape
    dtype = work_dtype(q.dtype)
    out = _empty((batch, heads, length, v.shape[-1]), q)
    lse = torch.empty(batch, heads, length, dtype=dtype, device=q.device)
    for several, element, pieces in _work(q, k, v, key_mask, phases, resolved, scale, block_mask):
        part_out, part_lse = several.empty(out), several.empty(lse)
        for part, chunk in pieces:
            queries = _take(element.q[part.queries], chunk, part)
            keys, values = _keys(element, chunk, part)
            scores = _scores(element, queries, keys, chunk, part)
            if resolved.plan.quant == "fp8":
                _, weights, sums = _rounded(scores, resolved.plan.block_n, resolved.plan.p_scale)
                result = weights @ values
            else:
                maximum = _finite(scores.amax(-1, keepdim=True))
                weights = scores.sub_(maximum).exp_()
                total = weights.sum(-1, keepdim=True)
                sums = (maximum + total.log()).squeeze(-1)
                result = (weights @ values).div_(total.masked_fill(total == 0, 1.0))
            if element.v_mean is not None:
                mean = element.v_mean[part.keys].unsqueeze(1)  # [key heads, 1, 1, Dv]
                result = result + mean.masked_fill((sums == NEG_INF).unsqueeze(-1), 0.0)
            if element.lse_shift is not None:
                shift = _take(element.lse_shift[part.queries].unsqueeze(-1), chunk, part).squeeze(-1)
                sums = torch.where(sums == NEG_INF, sums, sums + shift)
            _put(part_out[part.queries], result, chunk, part)
            _put(part_lse[part.queries].unsqueeze(-1), sums.unsqueeze(-1), chunk, part)
        several.store(out, part_out)
        several.store(lse, part_lse)
    return out, lse


@torch.no_grad()
def backward(
    grad_out: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    *,
    key_mask: torch.Tensor | None,
    phases: tuple[int, ...],
    resolved: ResolvedPlan,
    scale: float,
    block_mask: BlockMask | None = None,
    delta: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of q, k and v in their shapes and dtypes, each the transpose of a contiguous [B, L, H, D].

    Args:
        grad_out: [B, H, Lq, Dv].
        out, lse: what :func:`forward` returned. ``out`` is not read, nor is ``lse`` with ``quant="fp8"``, which
            replays the rounding, unless there is a ``delta``.
        delta: [B, H, Lq]: ``lse`` covers more keys than the listed ones, and they add this to rowsum(P * dP), which
            is there afterwards. The gradients are those of the listed keys.
        The rest as in :func:`forward`.
    """
    dtype = work_dtype(q.dtype)
    rotated = resolved.plan.quant == "fp8" and resolved.plan.hadamard
    dq, dk, dv = (_empty(x.shape, x) for x in (q, k, v))
    for several, element, pieces in _work(q, k, v, key_mask, phases, resolved, scale, block_mask):
        part_grad, part_lse, part_dq = several.heads_of(grad_out), several.heads_of(lse), several.empty(dq)
        dk_slots, dv_slots = torch.zeros_like(element.k), torch.zeros_like(element.v)
        smoothed = (part_lse if element.lse_shift is None else part_lse - element.lse_shift).unsqueeze(-1)
        part_delta = None if delta is None else several.heads_of(delta)
        for part, chunk in pieces:
            queries = _take(element.q[part.queries], chunk, part)
            keys, values = _keys(element, chunk, part)
            scores = _scores(element, queries, keys, chunk, part)
            grad = _take(part_grad[part.queries], chunk, part).to(dtype)
            if resolved.plan.quant == "fp8":
                softmax, weights, own_lse = _rounded(scores, resolved.plan.block_n, resolved.plan.p_scale)
                if part_delta is not None:
                    held = (own_lse[..., None] - _finite(_take(smoothed[part.queries], chunk, part))).exp_()
                    softmax, weights = softmax * held, weights * held
            else:
                row_lse = _take(part_lse[part.queries].unsqueeze(-1), chunk, part)
                softmax = weights = scores.sub_(_finite(row_lse)).exp_()
            d_weights = grad @ values.mT
            # Not rowsum(dO * out): out carries its own rounding, to bf16 say, and a common part of all keys, which
            # cancels only while rows of dS sum to zero, would amplify it.
            row_delta = (softmax * d_weights).sum(-1, keepdim=True)
            if part_delta is not None:
                of_rows = part_delta[part.queries].unsqueeze(-1)
                row_delta += _take(of_rows, chunk, part)
                _put(of_rows, row_delta, chunk, part)
            d_scores = d_weights.sub_(row_delta).mul_(softmax)
            d_queries = (d_scores @ keys).mul_(scale)
            _put(part_dq[part.queries], unrotate(d_queries, q.shape[-1]) if rotated else d_queries, chunk, part)
            _add_listed(dk_slots[part.keys], d_scores.mT @ queries, chunk)  # the queries carry the softmax scale
            _add_listed(dv_slots[part.keys], weights.mT @ grad, chunk)
        d_keys = _from_slots(dk_slots, resolved.k_layout)
        if delta is not None and part_delta is not None:
            several.store(delta, part_delta)
        several.store(dq, part_dq)
        several.store(dk, unrotate(d_keys, k.shape[-1]) if rotated else d_keys)
        several.store(dv, _from_slots(dv_slots, resolved.k_layout))
    return dq, dk, dv


def _empty(shape: tuple[int, ...], like: torch.Tensor) -> torch.Tensor:
    """Uninitialized [B, H, L, D], laid out as the transpose of a contiguous [B, L, H, D]."""
    batch, heads, length, width = shape
    return like.new_empty(batch, length, heads, width).transpose(1, 2)


def _work(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    key_mask: torch.Tensor | None,
    phases: tuple[int, ...],
    resolved: ResolvedPlan,
    scale: float,
    block_mask: BlockMask | None,
) -> Iterator[tuple[_Together, _Element, list[tuple[_Heads, _Chunk]]]]:
    """The work in parts: (batch elements, their operands, pieces of heads and queries)."""
    if resolved.plan.quant == "int8":
        raise UnsupportedError(
            "lowering 'gather' does not compute in 8-bit integers: choose lowering='cpp' or quant='none'"
        )
    mask = (resolved.block_mask if block_mask is None else block_mask).to("cpu")
    slots = _slot_count(resolved)
    # A run's gathered keys outweigh its scores when it is shorter than a head is wide.
    rows = max(min(QUERY_RUN, int(resolved.q_layout.sizes().max())), q.shape[-1], v.shape[-1])
    budget = CHUNK_BYTES.get(q.device.type, 8 << 20) // (work_dtype(q.dtype).itemsize * rows * slots)  # key tiles
    for phase, several in _by_phase(q, k, v, phases, resolved):
        heads, key_heads = (len(several.elements) * x.shape[1] for x in (q, k))
        most = int(mask.kv_num_blocks[phase].max())
        pieces = [
            (part, chunk)
            for part in _head_parts(heads, key_heads, mask.kv_num_blocks.shape[1], budget // max(most, 1))
            for chunk in _chunks(
                mask, phase, part.mask, resolved, slots, budget // (part.queries.stop - part.queries.start)
            )
        ]
        yield several, _element(q, k, v, key_mask, several, phase, resolved, slots, scale), pieces


def _by_phase(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, phases: tuple[int, ...], resolved: ResolvedPlan
) -> Iterator[tuple[int, _Together]]:
    """(phase, batch elements that are in it), every element once."""
    size = max(1, work_dtype(q.dtype).itemsize * sum(x[0].numel() for x in (q, k, v)))
    most = max(1, TOGETHER_BYTES.get(q.device.type, 4 << 20) // size)
    of_phase: dict[int, list[int]] = {}
    for b, phase in zip(range(q.shape[0]), phases, strict=True):
        of_phase.setdefault(phase, []).append(b)
    for phase, elements in of_phase.items():
        # a scale that all heads of an element share must not be shared with another element
        shared = resolved.plan.quant == "fp8" and resolved.plan.phases[phase].granularity == "tensor"
        step = 1 if shared else most
        for start in range(0, len(elements), step):
            yield phase, _Together(tuple(elements[start : start + step]))


def _head_parts(heads: int, key_heads: int, mask_heads: int, at_once: int) -> Iterator[_Heads]:
    """Heads in groups of about ``at_once`` query heads; one by one when each of an element has its own mask."""
    group = heads // key_heads
    if mask_heads > 1:
        for head in range(heads):
            yield _Heads(slice(head, head + 1), slice(head // group, head // group + 1), 1, head % mask_heads)
        return
    step = max(1, at_once // group)
    for start in range(0, key_heads, step):
        stop = min(start + step, key_heads)
        yield _Heads(slice(start * group, stop * group), slice(start, stop), group, 0)


def _chunks(
    mask: BlockMask, phase: int, head: int, resolved: ResolvedPlan, slots: int, budget: int
) -> Iterator[_Chunk]:
    """All query tokens once, in chunks of at most ``budget`` listed key tiles (or a single run)."""
    order, sizes = resolved.q_layout.order(), resolved.q_layout.sizes()
    counts = mask.kv_num_blocks[phase, head].long()
    indices = mask.kv_indices[phase, head].long()
    empty_tile = resolved.k_layout.n_tiles
    listed = torch.arange(indices.shape[1]) < counts[:, None]
    indices = torch.where(listed, indices, empty_tile)
    held = torch.cat([resolved.k_layout.sizes(), torch.zeros(1, dtype=torch.int64)])  # the empty tile holds nothing

    first = (sizes.cumsum(0) - sizes).tolist()
    runs = [  # (length, key tiles, query tile, first query in tile order)
        (min(QUERY_RUN, size - start), count, tile, first[tile] + start)
        for tile, (size, count) in enumerate(zip(sizes.tolist(), counts.tolist(), strict=True))
        for start in range(0, size, QUERY_RUN)
    ]
    runs.sort(key=lambda run: (-run[0], -run[1], run[2], run[3]))
    begin = 0
    while begin < len(runs):
        length, capacity = runs[begin][0], max(runs[begin][1], 1)
        most = max(1, budget // capacity)
        end = begin + 1
        while (
            end < min(len(runs), begin + most)
            and runs[end][0] == length
            and runs[end][1] >= (1 - FULLEST_PADDING) * capacity
        ):
            end += 1
        starts = torch.tensor([run[3] for run in runs[begin:end]])
        tiles = indices[[run[2] for run in runs[begin:end]], :capacity]
        tokens = order[starts[:, None] + torch.arange(length)]
        valid = (torch.arange(slots) < held[tiles][..., None]).flatten(1)
        keys = None
        if resolved.plan.quant == "none" and not valid.all() and valid.any():
            keys = valid.any(0).nonzero().flatten()
            valid = valid[:, keys]
        yield _Chunk(tokens, tiles, keys, not valid.all())
        begin = end


def _element(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    key_mask: torch.Tensor | None,
    several: _Together,
    phase: int,
    resolved: ResolvedPlan,
    slots: int,
    scale: float,
) -> _Element:
    dtype, layout, plan = work_dtype(q.dtype), resolved.k_layout, resolved.plan
    heads = q.shape[1]
    q, k, v = (several.heads_of(x) for x in (q, k, v))
    if key_mask is not None:
        if key_mask.shape[0] > 1:
            count = heads if len(several.elements) > 1 else -1  # elements differ: a row for each of their heads
            key_mask = several.heads_of(key_mask.expand(-1, count, -1, -1))
        elif key_mask.shape[1] > 1:
            key_mask = key_mask[0].repeat(len(several.elements), 1, 1)
        else:
            key_mask = key_mask[0]
    shift = v_mean = None
    if plan.quant == "fp8":
        fp8 = quantize_attention(
            q[None], k[None], v[None], resolved.q_layout, layout, plan.phases[phase].granularity,
            smooth_k=plan.smooth_k, smooth_v=plan.smooth_v, hadamard=plan.hadamard,
            key_mask=None if key_mask is None else key_mask[None],
        )  # fmt: skip
        shift = fp8.lse_shift(q[None].to(dtype), scale)
        v_mean = None if fp8.v_mean is None else fp8.v_mean[0]
        q_b, k_b, v_b = fp8.q.dequantize()[0], fp8.k.dequantize()[0], fp8.v.dequantize()[0]
    else:
        q_b, k_b, v_b = q.to(dtype), k.to(dtype), v.to(dtype)
    if key_mask is None:
        bias = torch.zeros(1, layout.length, 1, dtype=dtype, device=q.device)
    elif key_mask.dtype == torch.bool:
        bias = torch.zeros(key_mask.shape, dtype=dtype, device=q.device).masked_fill_(~key_mask, NEG_INF).mT
    else:
        bias = key_mask.to(dtype).mT
    return _Element(
        q_b * scale,
        _to_slots(k_b, layout, slots, 0.0),
        _to_slots(v_b, layout, slots, 0.0),
        _to_slots(bias, layout, slots, NEG_INF).squeeze(-1),
        key_mask is not None,
        None if shift is None else shift[0],
        v_mean,
    )


def _keys(element: _Element, chunk: _Chunk, part: _Heads) -> tuple[torch.Tensor, torch.Tensor]:
    """K and V of the listed tiles: [key heads, runs, keys, D | Dv]."""
    return _listed(element.k[part.keys], chunk), _listed(element.v[part.keys], chunk)


def _listed(x: torch.Tensor, chunk: _Chunk) -> torch.Tensor:
    """[heads, k_tiles + 1, slots, D] -> the slots that each run sees: [heads, runs, keys, D]."""
    heads, _, slots, dim = x.shape
    runs, capacity = chunk.tiles.shape
    listed = x.index_select(1, chunk.tiles.flatten().to(x.device)).view(heads, runs, capacity * slots, dim)
    return listed if chunk.keys is None else listed.index_select(2, chunk.keys.to(x.device))


def _add_listed(total: torch.Tensor, term: torch.Tensor, chunk: _Chunk) -> None:
    """The transpose of :func:`_listed`: adds ``term`` [heads, runs, keys, D] where it came from."""
    heads, _, slots, dim = total.shape
    runs, capacity = chunk.tiles.shape
    if chunk.keys is not None:
        full = term.new_zeros(heads, runs, capacity * slots, dim)
        term = full.index_copy_(2, chunk.keys.to(term.device), term)
    index = chunk.tiles.flatten().to(term.device)
    total.index_add_(1, index, term.view(heads, runs * capacity, slots, dim))


def _scores(element: _Element, queries: torch.Tensor, keys: torch.Tensor, chunk: _Chunk, part: _Heads) -> torch.Tensor:
    """[key heads, runs, group * length, keys], masked."""
    scores = queries @ keys.mT
    if not (element.key_mask or chunk.masked):
        return scores
    bias = element.bias if element.bias.shape[0] == 1 else element.bias[part.queries]
    bias = _listed(bias.unsqueeze(-1), chunk).mT  # [1 | heads, runs, 1, keys]
    if len(bias) == 1:
        return scores.add_(bias)
    per_head = bias.unflatten(0, (-1, part.group)).transpose(1, 2)  # [key heads, runs, group, 1, keys]
    scores.unflatten(2, (part.group, -1)).add_(per_head)
    return scores


def _rounded(scores: torch.Tensor, block_n: int, p_scale: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(softmax, weights after P's rounding, log-sum-exp) of scores [..., keys]: [..., keys] twice, and [...]."""
    keys = scores.shape[-1]
    if keys % block_n:
        scores = torch.nn.functional.pad(scores, (0, block_n - keys % block_n), value=NEG_INF)
    blocks = scores.unflatten(-1, (-1, block_n))
    running = rounding_base(blocks.amax(-1)).cummax(-1).values  # [..., blocks]: m_j
    final = _finite(running[..., -1:])
    rescale = torch.exp(running - final)[..., None]
    p = torch.exp(blocks - _finite(running)[..., None])
    p8 = round_e4m3(p * p_scale)
    total = (p.sum(-1, keepdim=True) * rescale).sum(-2, keepdim=True)
    lse = final + total[..., 0, 0, None].log()
    factor = rescale / total.masked_fill(total == 0, 1.0)
    softmax, rounded = ((x * f).flatten(-2)[..., :keys] for x, f in ((p, factor), (p8, factor / p_scale)))
    return softmax, rounded, lse.squeeze(-1)


def _slot_count(resolved: ResolvedPlan) -> int:
    """Slots per key tile: what the rounding contract says, or just enough."""
    if resolved.plan.quant == "fp8":
        return tile_slots(resolved.plan.tile, resolved.plan.block_n)
    return int(resolved.k_layout.sizes().max())


def _to_slots(x: torch.Tensor, layout: TileLayout, slots: int, fill: float) -> torch.Tensor:
    """[H, L, D] -> [H, tiles + 1, slots, D]; ``fill`` in empty slots and in the tile behind the last."""
    tokens = torch.cat([layout.slots(slots), torch.full((1, slots), -1)]).flatten().to(x.device)
    placed = x.index_select(1, tokens.clamp(min=0))
    return placed.masked_fill_((tokens < 0)[:, None], fill).unflatten(1, (-1, slots))


def _from_slots(x: torch.Tensor, layout: TileLayout) -> torch.Tensor:
    """[H, tiles + 1, slots, D] -> [H, L, D]: the inverse of :func:`_to_slots`."""
    tile, slot = place_of_token(layout)
    return x.flatten(1, 2).index_select(1, (tile * x.shape[2] + slot).to(x.device))


def _take(x: torch.Tensor, chunk: _Chunk, part: _Heads) -> torch.Tensor:
    """Query-side rows of a chunk: [query heads, Lq, D] -> [key heads, runs, group * length, D]."""
    runs, length = chunk.tokens.shape
    taken = x.index_select(1, chunk.tokens.flatten().to(x.device))
    return (
        taken.view(-1, part.group, runs, length, x.shape[-1])
        .transpose(1, 2)
        .reshape(-1, runs, part.group * length, x.shape[-1])
    )


def _put(target: torch.Tensor, rows: torch.Tensor, chunk: _Chunk, part: _Heads) -> None:
    """The inverse of :func:`_take`, into ``target`` and its dtype."""
    runs, length = chunk.tokens.shape
    rows = rows.view(-1, runs, part.group, length, rows.shape[-1]).transpose(1, 2)
    rows = rows.reshape(-1, runs * length, rows.shape[-1])
    target.index_copy_(1, chunk.tokens.flatten().to(target.device), rows.to(target.dtype))


def _finite(maximum: torch.Tensor) -> torch.Tensor:
    """A row's maximum or log-sum-exp that is safe to subtract: 0 where the row has no key."""
    return maximum.masked_fill(maximum == NEG_INF, 0.0)
