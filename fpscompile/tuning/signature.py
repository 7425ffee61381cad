"""What a tuned entry is good for: the shape of a site, the mask it runs under, the machine it ran on.

Two sites of one signature run the same kernel over the same tiles, so one measurement serves both: all layers of a
model usually share one. The mask counts as the tiles it keeps, not as the options it came from: ``density=0.25`` and
the window that it resolves to are one signature.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import importlib.resources
import json
import math
import platform
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fpscompile.plan import Plan, ResolvedPlan

CPUINFO = Path("/proc/cpuinfo")


@dataclass(frozen=True)
class Signature:
    """Everything that the choice of a kernel depends on. Not in it: values, weights, and the batch size, which
    multiplies all candidates alike."""

    grid: tuple[int, int, int]
    """Video tokens along (t, h, w)."""
    q_others: tuple[int, int]
    """Other tokens (text) before and after the video in the query sequence."""
    k_others: tuple[int, int]
    tile: tuple[int, int, int]
    heads: int
    key_heads: int
    head_dim: int
    value_dim: int
    dtype: str
    key_mask: str
    """"none", "bool" or "float"."""
    quant: str
    asked: str
    """The lowering asked for; "auto" leaves the choice to the measurement."""
    density: tuple[float, ...]
    """Kept fraction of query-key pairs per phase, rounded; for readers."""
    mask: str
    """Digest of all phases' masks and scales; "topk" in front where content chooses tiles, and the digest is then over
    what every tile sees always, what it may choose, and how many."""
    weights: tuple[float, ...]
    """Share of the denoising steps that runs each phase, rounded."""
    device: str

    @property
    def key(self) -> str:
        """Readable, and unique by its last word."""
        text = json.dumps(dataclasses.asdict(self), sort_keys=True)
        digest = hashlib.sha256(text.encode()).hexdigest()[:12]
        grid = "x".join(map(str, self.grid))
        mean = sum(w * d for w, d in zip(self.weights, self.density, strict=True))
        return f"{grid} {self.heads}x{self.head_dim} {self.dtype} density {mean:.3f}{self._chosen} {digest}"

    def describe(self) -> str:
        """For messages."""
        grid, tile = ("x".join(map(str, sizes)) for sizes in (self.grid, self.tile))
        shape = f"grid {grid}, tile {tile}, {self.heads} heads x {self.head_dim}, {self.dtype}"
        return f"{shape}{self._chosen}, on {self.device}"

    @property
    def _chosen(self) -> str:
        return " topk" if self.mask.startswith("topk ") else ""

    def to_dict(self) -> dict[str, Any]:
        return {
            name: list(value) if isinstance(value, tuple) else value for name, value in dataclasses.asdict(self).items()
        }


def signature_of(
    resolved: ResolvedPlan,
    *,
    heads: int,
    key_heads: int,
    head_dim: int,
    value_dim: int,
    dtype: str,
    key_mask: str,
    asked: str,
    weights: tuple[float, ...],
    device: torch.device,
) -> Signature:
    """The signature of a site under a plan; the plan's lowering and config do not enter."""
    q, k = resolved.q_layout, resolved.k_layout
    return Signature(
        grid=q.grid,
        q_others=(q.before, q.after),
        k_others=(k.before, k.after),
        tile=resolved.plan.tile,
        heads=heads,
        key_heads=key_heads,
        head_dim=head_dim,
        value_dim=value_dim,
        dtype=dtype,
        key_mask=key_mask,
        quant=resolved.plan.quant,
        asked=asked,
        density=tuple(round(density, 4) for density in resolved.densities),
        mask=mask_digest(resolved),
        weights=tuple(round(weight, 4) for weight in weights),
        device=device_name(device),
    )


def mask_digest(resolved: ResolvedPlan) -> str:
    """16 hex digits over the listed tiles of all phases, and over what else of the plan decides what is computed; after
    "topk" where content chooses tiles."""
    chosen = "topk " if resolved.dynamic else ""
    return chosen + _digest(dataclasses.replace(resolved, plan=_neutral(resolved.plan)))


def _neutral(plan: Plan) -> Plan:
    """``plan`` without what the tuner chooses."""
    return dataclasses.replace(plan, lowering="", config=())


@functools.lru_cache(maxsize=512)
def _digest(resolved: ResolvedPlan) -> str:
    plan, found = resolved.plan, hashlib.sha256()
    for table in _tables(resolved):
        found.update(str(tuple(table.shape)).encode())
        found.update(table.to(torch.int32).cpu().contiguous().numpy().tobytes())
    rest = {name: value for name, value in vars(plan).items() if name not in ("tile", "phases", "clamp")}
    if plan.quant != "none":
        rest["granularities"] = [phase.granularity for phase in plan.phases]
    found.update(json.dumps(rest, sort_keys=True).encode())
    return found.hexdigest()[:16]


def _tables(resolved: ResolvedPlan) -> tuple[torch.Tensor, ...]:
    """What says which tiles all phases keep, or what they choose from."""
    if not resolved.dynamic:
        return resolved.block_mask.kv_num_blocks, resolved.block_mask.kv_indices
    sets = [resolved.tile_sets(phase) for phase in range(len(resolved.windows))]
    return tuple(table for part in sets for table in (part.always, part.eligible, part.extra))


@functools.lru_cache(maxsize=16)
def _gpu_name(device: torch.device) -> str:
    from fpscompile.gpu.call import target_of

    return f"{torch.cuda.get_device_name(device)} ({target_of(device)})"


def device_name(device: torch.device | str) -> str:
    """What a measurement is good for: the GPU's model, or the processor's with its instruction set and threads."""
    device = torch.device(device)
    if device.type == "cuda" and torch.cuda.is_available():
        return _gpu_name(device)
    if device.type != "cpu":
        return str(device)
    return f"{processor_name()} ({torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads)"


@functools.lru_cache(maxsize=1)
def processor_name() -> str:
    """Name, family and model of the first processor: clouds call several generations "AMD EPYC"."""
    try:
        first = CPUINFO.read_text().split("\n\n", 1)[0]
    except OSError:
        first = ""
    fields = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in first.splitlines())}
    name = fields.get("model name") or platform.processor() or platform.machine()
    if "cpu family" not in fields or "model" not in fields:
        return name
    return f"{name}, family {fields['cpu family']} model {fields['model']}"


def versions(lowering: str) -> dict[str, str]:
    """What a measurement of a lowering depends on besides its signature; other versions mean: measure again."""
    found = {"torch": ".".join(torch.__version__.split(".")[:2])}
    if lowering == "cpp":
        found["template"] = _templates("cpp")
    elif lowering == "triton":
        import triton

        found["triton"] = str(triton.__version__)
    return found


@functools.lru_cache(maxsize=4)
def _templates(folder: str) -> str:
    """12 hex digits over the texts of a folder of templates."""
    files = sorted(
        (importlib.resources.files("fpscompile") / "templates" / folder).iterdir(), key=lambda file: file.name
    )
    texts = [file.read_bytes() for file in files if file.is_file()]
    return hashlib.sha256(b"\0".join(texts)).hexdigest()[:12]


def phase_weights(ranges: list[tuple[float, float]]) -> tuple[float, ...]:
    """Lengths of the schedule's ranges: they sum to 1."""
    total = math.fsum(end - start for start, end in ranges)
    return tuple((end - start) / total for start, end in ranges)
