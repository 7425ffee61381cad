"""One site as the tuner runs it: inputs of its shape, the plan's real mask, a clock, and a check of the result."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from fpscompile import lowerings
from fpscompile.masks import Window, with_others
from fpscompile.plan import PhasePlan, Plan, ResolvedPlan, resolve
from fpscompile.selection import masks_of_call, pack, select
from fpscompile.tiling import Grid
from fpscompile.tuning import clock
from fpscompile.tuning.signature import Signature, signature_of

SAMPLE_ROWS = 64
"""Query rows per phase on which a result is checked, where there are more than :data:`ALL_ROWS`."""

ALL_ROWS = 1024

TOLERANCE = {"float64": 1e-5, "float32": 1e-4, "float16": 5e-3, "bfloat16": 2e-2}
"""Largest relative error (norm over norm) of an unquantized output, by dtype."""

TOLERANCE_QUANTIZED = 0.12
"""With quantized operands, against exact attention under the same mask: FP8 of normal values errs by 4 to 8 %."""


@dataclass(frozen=True)
class Candidate:
    """One way to compute a site."""

    lowering: str
    config: tuple[tuple[str, Any], ...] = ()
    """(field, value) pairs of the lowering's config, sorted by name; () is its own rule."""
    tile: Grid | None = None
    """In place of the plan's, where the tile is free."""
    windows: tuple[Window, ...] = ()
    """With a tile: key tiles seen along (t, h, w), per phase."""

    def __str__(self) -> str:
        fields = [f"{name}={value}" for name, value in self.config]
        if self.tile is not None:
            fields.append(f"tile={'x'.join(map(str, self.tile))}")
        return f"{self.lowering}({', '.join(fields)})"

    def plan(self, plan: Plan) -> Plan:
        """``plan``, computed this way."""
        plan = dataclasses.replace(plan, lowering=self.lowering, config=self.config)
        if self.tile is None:
            return plan
        phases = tuple(
            PhasePlan(window, None, phase.granularity) for window, phase in zip(self.windows, plan.phases, strict=True)
        )
        return dataclasses.replace(plan, tile=self.tile, phases=phases)


@dataclass(frozen=True, eq=False)
class Problem:
    """A site's shape, plan and device."""

    resolved: ResolvedPlan
    heads: int
    key_heads: int
    head_dim: int
    value_dim: int
    dtype: torch.dtype
    device: torch.device
    key_mask: str = "none"
    """"none", "bool" or "float"."""
    weights: tuple[float, ...] = ()
    """Share of the denoising steps that runs each phase."""
    asked: str = "auto"
    """The lowering that was asked for."""
    references: tuple[tuple[torch.Tensor | None, ...], ...] = ()
    """(q, k, v, key mask) of real calls, batch of one: what the error of another tile is judged by."""
    free_tile: bool = False
    """Whether the tile may change."""

    @functools.cached_property
    def signature(self) -> Signature:
        return signature_of(
            self.resolved,
            heads=self.heads,
            key_heads=self.key_heads,
            head_dim=self.head_dim,
            value_dim=self.value_dim,
            dtype=str(self.dtype).removeprefix("torch."),
            key_mask=self.key_mask,
            asked=f"{self.asked}, any tile" if self.free_tile else self.asked,
            weights=self.phase_weights,
            device=self.device,
        )

    @property
    def phase_weights(self) -> tuple[float, ...]:
        count = len(self.resolved.windows)
        return self.weights if len(self.weights) == count else (1.0 / count,) * count

    @property
    def distinct(self) -> dict[int, float]:
        """Phases that differ, with their share of the steps: equal windows and scales are measured once."""
        found: dict[Any, tuple[int, float]] = {}
        for index, weight in enumerate(self.phase_weights):
            phase = self.resolved.plan.phases[index]
            key = (self.resolved.windows[index], phase.granularity if self.resolved.plan.quant != "none" else None)
            first, share = found.get(key, (index, 0.0))
            found[key] = (first, share + weight)
        return {index: share for index, share in found.values() if share > 0}

    def inputs(self, device: torch.device | str | None = None) -> tuple[torch.Tensor, ...]:
        """q, k, v [1, H, L, D] strided as models give them, and the key mask or None. Always the same values."""
        device = self.device if device is None else torch.device(device)
        q_length, k_length = self.resolved.q_layout.length, self.resolved.k_layout.length
        sizes = [
            (q_length, self.heads, self.head_dim),
            (k_length, self.key_heads, self.head_dim),
            (k_length, self.key_heads, self.value_dim),
        ]
        if device.type == "meta":
            made = [torch.empty(1, *size, dtype=self.dtype, device=device) for size in sizes]
            mask = torch.empty(1, 1, 1, k_length, dtype=torch.bool, device=device)
        else:
            generator = torch.Generator(device).manual_seed(0)
            made = [torch.randn(1, *size, generator=generator, device=device).to(self.dtype) for size in sizes]
            mask = torch.ones(1, 1, 1, k_length, dtype=torch.bool, device=device)
            mask[..., : self.resolved.k_layout.after // 2 + self.resolved.k_layout.before // 2] = False
        q, k, v = (x.transpose(1, 2) for x in made)
        if self.key_mask == "none":
            return q, k, v, None  # type: ignore[return-value]
        if self.key_mask == "bool" or device.type == "meta":
            return q, k, v, mask
        return q, k, v, torch.zeros(mask.shape, device=device).masked_fill(~mask, -torch.inf)

    def resolved_for(self, candidate: Candidate) -> ResolvedPlan:
        plan, q, k = candidate.plan(self.resolved.plan), self.resolved.q_layout, self.resolved.k_layout
        if candidate.tile is None:
            return dataclasses.replace(self.resolved, plan=plan)
        return resolve(plan, q.grid, q.length, k.length, q.before, k.before, self.heads)

    def runner(self, candidate: Candidate, tensors: tuple[torch.Tensor, ...]) -> Callable[[int], torch.Tensor]:
        """Phase index -> the output [1, H, Lq, Dv]."""
        resolved, module = self.resolved_for(candidate), lowerings.get(candidate.lowering)
        q, k, v, key_mask = tensors
        if resolved.dynamic:
            return self._chosen_runner(module, resolved, tensors)
        on_device = getattr(module, "PHASES_ON_DEVICE", False)

        @functools.cache  # a copy to a GPU waits for it, and is not what is timed
        def phases_of(phase: int) -> Any:
            return torch.tensor([phase], dtype=torch.int32, device=self.device) if on_device else (phase,)

        def run(phase: int) -> torch.Tensor:
            out, _ = module.forward(
                q, k, v, key_mask=key_mask, phases=phases_of(phase), resolved=resolved, scale=self.head_dim**-0.5
            )
            return out

        return run

    def _chosen_runner(
        self, module: lowerings.Lowering, resolved: ResolvedPlan, tensors: tuple[torch.Tensor, ...]
    ) -> Callable[[int], torch.Tensor]:
        """The same where content chooses tiles: as ``fps::attention`` does it, from a selection that is made before."""
        q, k, v, key_mask = tensors
        video = self.resolved.q_layout.video_tiles
        selections = {phase: pack(self._chosen(tensors, phase), video) for phase in self.distinct}
        scale = self.head_dim**-0.5

        def run(phase: int) -> torch.Tensor:
            one, mask = masks_of_call(selections[phase], q, k, key_mask, (phase,), resolved, scale)
            call: Any = {"key_mask": key_mask, "phases": (0,), "resolved": one, "scale": scale, "block_mask": mask}
            out, _ = module.forward(q, k, v, **call)
            return out

        return run

    def _chosen(self, tensors: tuple[torch.Tensor, ...], phase: int) -> torch.Tensor:
        """The tiles that the tensors choose in a phase."""
        q, k, _, key_mask = tensors
        return select(q, k, phase=(phase,), resolved=self.resolved, key_mask=key_mask)

    def timed(self, candidate: Candidate, tensors: tuple[torch.Tensor, ...]) -> Callable[[], float]:
        """A function that runs all phases once and returns the mean seconds of a denoising step."""
        run = self.runner(candidate, tensors)

        def once() -> float:
            return sum(
                share * clock.seconds(functools.partial(run, phase), self.device)
                for phase, share in self.distinct.items()
            )

        return once

    def error(self, candidate: Candidate, tensors: tuple[torch.Tensor, ...]) -> float:
        """The largest relative error over the phases, against exact attention at a sample of query rows."""
        run = self.runner(candidate, tensors)
        resolved, worst = self.resolved_for(candidate), 0.0
        for phase in self.distinct:
            out = run(phase)[0]
            rows = sample_rows(self.resolved.q_layout.length, SAMPLE_ROWS, ALL_ROWS).to(out.device)
            visible = self._visible(tensors, phase) if resolved.dynamic else None
            expected = exact_rows(*tensors, resolved=resolved, phase=phase, rows=rows, visible_tiles=visible)
            worst = max(worst, float((out[:, rows].to(expected.dtype) - expected).norm() / expected.norm()))
        return worst if math.isfinite(worst) else math.inf

    def _visible(self, tensors: tuple[torch.Tensor, ...], phase: int) -> torch.Tensor:
        """bool [H, query tiles, key tiles]: what the tensors choose in a phase, and what is seen always."""
        return with_others(self.resolved.q_layout, self.resolved.k_layout, self._chosen(tensors, phase))[0]

    def mask_errors(self, candidate: Candidate) -> list[float]:
        """Relative error that the candidate's mask makes in each real call and phase, against dense attention."""
        resolved, q, k = self.resolved_for(candidate), self.resolved.q_layout, self.resolved.k_layout
        full = Plan(self.resolved.plan.tile, (PhasePlan(density=1.0),))
        dense = resolve(full, q.grid, q.length, k.length, q.before, k.before)
        rows = sample_rows(q.length, SAMPLE_ROWS, ALL_ROWS)
        errors = []
        for call in self.references:
            expected = exact_rows(*call, resolved=dense, phase=0, rows=rows)  # type: ignore[arg-type]
            for phase in self.distinct:
                out = exact_rows(*call, resolved=resolved, phase=phase, rows=rows)  # type: ignore[arg-type]
                errors.append(float((out - expected).norm() / expected.norm()))
        return errors

    @property
    def tolerance(self) -> float:
        if self.resolved.plan.quant != "none":
            return TOLERANCE_QUANTIZED
        computed = TOLERANCE.get(getattr(self.resolved.plan, "compute", "auto"), 0.0)
        return max(TOLERANCE[str(self.dtype).removeprefix("torch.")], computed)


def sample_rows(length: int, count: int, all_up_to: int) -> torch.Tensor:
    """int64: every row of a short sequence; of a long one, ``count`` of them, always the same."""
    if length <= all_up_to:
        return torch.arange(length)
    return torch.randperm(length, generator=torch.Generator().manual_seed(1))[:count].sort().values


def exact_rows(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    key_mask: torch.Tensor | None,
    *,
    resolved: ResolvedPlan,
    phase: int,
    rows: torch.Tensor,
    scale: float | None = None,
    visible_tiles: torch.Tensor | None = None,
) -> torch.Tensor:
    """[H, rows, Dv]: the first batch element's exact output at some query rows, in float64 (float32 on a GPU).

    What the reference computes, without its whole score matrix: head by head, the listed tiles expanded over the keys.

    Args:
        visible_tiles: bool [1 | H, query tiles, key tiles], in place of the plan's mask.
    """
    dtype = torch.float64 if q.device.type == "cpu" else torch.float32
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    group = q.shape[1] // k.shape[1]
    q_tile, k_tile = tile_of_token(resolved.q_layout), tile_of_token(resolved.k_layout)
    dense = visible_tiles
    if dense is None:
        dense = resolved.block_mask.to_dense(resolved.k_layout.n_tiles)[phase]
    dense = dense.cpu()
    outputs = []
    for head in range(q.shape[1]):
        visible = dense[head if len(dense) > 1 else 0][q_tile[rows.cpu()]][:, k_tile].to(q.device)
        scores = q[0, head, rows].to(dtype) @ k[0, head // group].to(dtype).mT * scale
        if key_mask is not None:
            one = key_mask[0, head if key_mask.shape[1] > 1 else 0]
            scores = scores.masked_fill(~one, -torch.inf) if one.dtype == torch.bool else scores + one.to(dtype)
        weights = torch.softmax(scores.masked_fill(~visible, -torch.inf), -1).nan_to_num(0.0)
        outputs.append(weights @ v[0, head // group].to(dtype))
    return torch.stack(outputs)


def tile_of_token(layout: Any) -> torch.Tensor:
    """int64 [length]: the tile that holds each token of the sequence."""
    tiles = torch.repeat_interleave(torch.arange(layout.n_tiles), layout.sizes())
    return torch.empty_like(tiles).scatter_(0, layout.order(), tiles)
