"""Check and time the Hopper attention kernel on a GPU, next to what the machine can do.

    python benchmarks/gpu/hopper_probe.py [--parts ceilings checks times] [--quick] [--timeout 120]

checks    every feature of the kernel against float32 on small random cases, several processes at a time
times     variants of the schedule, then features, on video shapes, one process at a time
ceilings  matrix products, a copy, and PyTorch's attention

Every run has a process of its own under a time limit, so that a kernel that hangs costs
that limit and no more; two in a row end the run. Results: a table, and ``hopper_probe.json`` in ``$OUT`` (or here).
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import json
import math
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from fpscompile.gpu import hopper

KERNEL = Path(__file__).resolve().parents[2] / "templates" / "triton" / "attention_hopper.py"
DEVICE = "cuda"
BLOCK = 128
SUBTILE = 32
P_SHIFT = 8
TOLERANCE = 1e-2
"""Relative error (L2) against float32 with the same rounding of P: leaves room for FP8 products' short sums."""


def load_kernel() -> ModuleType:
    spec = importlib.util.spec_from_file_location("attention_hopper", KERNEL)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


# ------------------------------------------------------------------------------------------------------------- cases


@dataclass
class Packed:
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    q_scale: torch.Tensor
    k_scale: torch.Tensor
    v_scale: torch.Tensor
    lse_shift: torch.Tensor
    v_mean: torch.Tensor | None = None


@dataclass
class Units:
    count: torch.Tensor
    index: torch.Tensor
    valid: torch.Tensor


@dataclass
class Tables:
    slots: int
    unit: int
    q_token: torch.Tensor
    keys: Units


@dataclass
class KeyBias:
    bias: torch.Tensor
    state: torch.Tensor


@dataclass
class Case:
    packed: Packed
    tables: Tables
    q_blocks: torch.Tensor
    phase: torch.Tensor
    bias: KeyBias | None
    sizes: torch.Tensor
    """Tokens of each tile, on the host."""
    visible: torch.Tensor
    """bool [phases, 1 | heads, tiles, tiles], on the host."""
    length: int
    dim: int
    value_dim: int

    @property
    def scale(self) -> float:
        return self.dim**-0.5

    def outputs(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(out, lse) of NaN."""
        batch, heads = self.packed.q.shape[:2]
        out = torch.full((batch, self.length, heads, self.value_dim), math.nan, dtype=torch.bfloat16, device=DEVICE)
        return out, torch.full((batch, heads, self.length), math.nan, device=DEVICE)

    def launch(self, kernel: ModuleType, out: torch.Tensor, lse: torch.Tensor, options: dict[str, Any]) -> None:
        hopper.launch(
            kernel, self.packed, self.tables, self.q_blocks, self.phase, out, lse, self.scale, bias=self.bias, **options
        )

    def flops(self, tokens: bool) -> float:
        """Of both products: of the tokens that meet, or of the units that the kernel works through."""
        unit = self.tables.unit
        work = self.sizes.double() if tokens else (self.sizes / unit).ceil() * unit
        batch, heads = self.packed.q.shape[:2]
        visible = self.visible[self.phase.cpu().long()].double()  # [n, 1 | heads, tiles, tiles]
        pairs = torch.einsum("nhij,i,j->", visible, work.double(), work.double()).item()
        pairs *= (batch // self.phase.numel()) * (heads // visible.shape[1])
        return 2.0 * (self.dim + self.value_dim) * pairs


def to_e4m3(x: torch.Tensor) -> torch.Tensor:
    return x.clamp(-448.0, 448.0).to(torch.float8_e4m3fn)


def padded(dim: int) -> int:
    return max(32, 1 << (dim - 1).bit_length())


def key_positions(slot: torch.Tensor) -> torch.Tensor:
    """Where V keeps the key of each slot: 16g + 8a + 2c + b lies at 16g + 4c + 2a + b."""
    a, c, b = slot // 8 % 2, slot // 2 % 4, slot % 2
    return slot // 16 * 16 + 4 * c + 2 * a + b


def make_case(
    sizes: torch.Tensor,
    slots: int,
    visible: torch.Tensor,
    phase: list[int],
    heads: int,
    key_heads: int,
    batch: int = 1,
    dim: int = 128,
    value_dim: int | None = None,
    subtile: bool = False,
    bias: str = "",
    consumers: int | None = None,
) -> Case:
    """Random operands: what E4M3 makes of normal q, k, v whose tiles differ in size by a factor of up to four.

    Args:
        bias: "" for none; which of the axes "batch", "head" it has; or "text" for one that hides the last few keys.
        consumers: of the kernel's programs, 64 rows each.
    """
    tiles = len(sizes)
    total = tiles * slots
    value_dim = dim if value_dim is None else value_dim
    held = (torch.arange(slots) < sizes[:, None]).flatten().to(DEVICE)
    length = int(sizes.sum())
    # Tokens are dealt out at random: where they end up says whether the scatter is right.
    token = torch.full((total,), -1, dtype=torch.int32, device=DEVICE)
    token[held] = torch.randperm(length, dtype=torch.int32, device=DEVICE)

    def values(n: int, features: int) -> torch.Tensor:
        x = torch.zeros(batch, n, total, padded(features), dtype=torch.uint8, device=DEVICE)
        for b, h in itertools.product(range(batch), range(n)):
            normal = 100.0 * torch.randn(total, features, device=DEVICE) * held[:, None]
            x[b, h, :, :features] = to_e4m3(normal).view(torch.uint8)
        return x.view(torch.float8_e4m3fn)

    def scales(n: int) -> torch.Tensor:
        # Scores up to about 17. Of scores up to 65 (twice as large here), the 13 or 14 bits in which FP8 products are
        # summed leave an error of 2e-2: more than the checks allow.
        return 0.005 * 4.0 ** torch.rand(batch, n, tiles, slots // SUBTILE if subtile else 1, device=DEVICE)

    v = values(key_heads, value_dim)
    stored = torch.empty(batch, key_heads, v.shape[-1], total, dtype=torch.float8_e4m3fn, device=DEVICE)
    place = key_positions(torch.arange(total, device=DEVICE))
    for b, h in itertools.product(range(batch), range(key_heads)):
        stored[b, h].view(torch.uint8)[:, place] = v[b, h].view(torch.uint8).T
    packed = Packed(
        q=values(heads, dim), k=values(key_heads, dim), v=stored, q_scale=scales(heads), k_scale=scales(key_heads),
        v_scale=0.01 * torch.rand(batch, key_heads, v.shape[-1], device=DEVICE) + 0.005,
        lse_shift=torch.randn(batch, heads, total, device=DEVICE),
    )  # fmt: skip

    unit = min(BLOCK, slots)
    per_tile = slots // unit
    valid = (sizes[:, None] - unit * torch.arange(per_tile)).clamp(0, unit).flatten()
    listed = visible.repeat_interleave(per_tile, -1) & (valid > 0)
    count = listed.sum(-1, dtype=torch.int32)
    index = listed.to(torch.int8).argsort(dim=-1, descending=True, stable=True)[..., : max(1, int(count.max()))]
    keys = Units(count.to(DEVICE), index.to(DEVICE, torch.int32).contiguous(), valid.to(DEVICE, torch.int32))
    rows = min(64 * (consumers or (2 if slots >= BLOCK else 1)), slots)
    blocks = [
        (tile, tile * slots + at, min(rows, size - at))
        for tile, size in enumerate(sizes.tolist())
        for at in range(0, size, rows)
    ]
    return Case(
        packed, Tables(slots, unit, token, keys), torch.tensor(blocks, dtype=torch.int32, device=DEVICE),
        torch.tensor(phase, dtype=torch.int32, device=DEVICE), key_bias(bias, held, unit, batch, heads),
        sizes, visible, length, dim, value_dim,
    )  # fmt: skip


def key_bias(kind: str, held: torch.Tensor, unit: int, batch: int, heads: int) -> KeyBias | None:
    """Finite values, -inf, units without any, and a batch element (or head) to which every key is hidden."""
    if not kind:
        return None
    shape = (batch if "batch" in kind else 1, heads if "head" in kind else 1, len(held))
    if kind == "text":
        bias = torch.zeros(shape, device=DEVICE)
        bias[:, :, held.cumsum(0) > 0.99 * held.sum()] = -math.inf
    else:
        bias = 2.0 * torch.randn(shape, device=DEVICE)
        bias[torch.rand(shape, device=DEVICE) < 0.2] = -math.inf
        units = bias.view(*shape[:2], -1, unit)
        chance = torch.rand(units.shape[:3], device=DEVICE)
        units[chance < 0.5] = 0.0
        units[chance > 0.85] = -math.inf
        bias[-1, -1] = -math.inf
    bias.masked_fill_(~held, -math.inf)
    state = (bias != 0).unflatten(-1, (-1, unit)).any(-1)
    return KeyBias(bias, state.to(torch.uint8))


def small_case(slots: int = 256, **features: Any) -> Case:
    """Two phases, two samples, grouped key heads, ragged tiles, units that are empty, a tile that sees nothing."""
    sizes = torch.tensor([slots, slots - 56 if slots > 56 else 9, slots // 2, slots // 3, slots, 1, slots // 2 + 1])
    visible = torch.rand(2, 4, 7, 7) < 0.6
    visible[0, :, 2] = False
    visible[1, :, 1] = True
    visible[0, :, 3] = torch.arange(7) == 5  # a single key
    return make_case(sizes, slots, visible, [1, 0], heads=4, key_heads=2, batch=2, **features)


def video_case(
    grid: tuple[int, int, int],
    window: tuple[int, int, int],
    heads: int,
    tile: tuple[int, int, int] = (4, 8, 8),
    **features: Any,
) -> Case:
    """Tiles clipped at the far edges; windows of whole tiles, shifted inwards at the borders."""
    extents = [[min(t, n - at) for at in range(0, n, t)] for n, t in zip(grid, tile, strict=True)]
    sizes = torch.tensor([math.prod(e) for e in itertools.product(*extents)])
    visible = torch.ones(1, 1, 1, 1, dtype=torch.bool)
    for extent, w in zip(extents, window, strict=True):
        n = len(extent)
        w = min(w, n)
        start = (torch.arange(n) - w // 2).clamp(0, n - w)[:, None]
        near = (torch.arange(n) >= start) & (torch.arange(n) < start + w)
        before = visible.shape[-1]
        visible = (visible[..., :, None, :, None] & near[:, None, :]).reshape(1, 1, before * n, before * n)
    slots = math.prod(tile)
    slots = slots if slots in (32, 64) else -(-slots // BLOCK) * BLOCK
    return make_case(sizes, slots, visible, [0], heads, heads, **features)


# --------------------------------------------------------------------------------------------------------- reference


def columns(x: torch.Tensor, index: torch.Tensor, axis: int) -> torch.Tensor:
    """float32 of some rows or columns of an E4M3 tensor."""
    return x.view(torch.uint8).index_select(axis, index).view(torch.float8_e4m3fn).float()


def reference(case: Case, batch: int, head: int, block: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(token, out [rows, value_dim], lse [rows]) of one block of queries in float32, with the kernel's rounding."""
    packed, tables = case.packed, case.tables
    tile, first, rows = case.q_blocks[block].tolist()
    key_head = head // (packed.q.shape[1] // packed.k.shape[1])
    phase = int(case.phase[batch // (packed.q.shape[0] // case.phase.numel())])
    line = min(head, case.visible.shape[1] - 1)
    listed = tables.keys.index[phase, line, tile, : int(tables.keys.count[phase, line, tile])].long()
    q = packed.q[batch, head, first : first + rows].float()
    run = tables.slots // packed.q_scale.shape[-1]  # slots that share a scale
    row_factor = case.scale * packed.q_scale[batch, head].flatten()[torch.arange(first, first + rows) // run]
    m = torch.full((rows, 1), -math.inf, device=DEVICE)
    total = torch.zeros(rows, 1, device=DEVICE)
    acc = torch.zeros(rows, packed.v.shape[2], device=DEVICE)
    for units in listed.split(BLOCK // tables.unit) if len(listed) else ():
        slot = (units[:, None] * tables.unit + torch.arange(tables.unit, device=DEVICE)).flatten()
        k = columns(packed.k[batch, key_head], slot, 0)
        v = columns(packed.v[batch, key_head], key_positions(slot), 1).T
        s = (q @ k.T) * (row_factor[:, None] * packed.k_scale[batch, key_head].flatten()[slot // run])
        if case.bias is not None:
            bias = case.bias.bias
            s += bias[min(batch, bias.shape[0] - 1), min(head, bias.shape[1] - 1), slot]
        s[:, slot % tables.unit >= tables.keys.valid[slot // tables.unit]] = -math.inf
        m_new = torch.maximum(m, (s.amax(1, keepdim=True) / math.log(2.0)).ceil() * math.log(2.0))
        safe = m_new.masked_fill(m_new == -math.inf, 0.0)
        p = torch.exp(s - safe)
        alpha = torch.exp(m - safe)
        acc = acc * alpha + to_e4m3(p * 2.0**P_SHIFT).float() @ v
        total = total * alpha + p.sum(1, keepdim=True)
        m = m_new
    out = torch.where(total > 0, acc / (total * 2.0**P_SHIFT), 0.0) * packed.v_scale[batch, key_head]
    lse = (m + total.log()).squeeze(1) + packed.lse_shift[batch, head, first : first + rows]
    return tables.q_token[first : first + rows].long(), out[:, : case.value_dim], lse


def check(kernel: ModuleType, case: Case, options: dict[str, Any], samples: int | None) -> dict[str, Any]:
    """Worst errors over all blocks, or over some taken at random. Outputs start as NaN: every row must be written."""
    batch, heads = case.packed.q.shape[:2]
    out, lse = case.outputs()
    case.launch(kernel, out, lse, options)
    torch.cuda.synchronize()
    places = list(itertools.product(range(batch), range(heads), range(len(case.q_blocks))))
    if samples is not None:
        places = [places[i] for i in torch.randperm(len(places))[:samples].tolist()]
    worst_out = worst_lse = 0.0
    blind = 0
    for b, h, block in places:
        token, expected, expected_lse = reference(case, b, h, block)
        got, got_lse = out[b, token, h].float(), lse[b, h, token]
        norm = expected.norm()
        error = ((got - expected).norm() / norm if norm > 0 else got.abs().max()).item()
        empty = expected_lse == -math.inf
        blind += int(empty.sum())
        if (got[empty] != 0).any():
            error = math.inf
        lse_error = (got_lse - expected_lse)[~empty].abs().max().item() if (~empty).any() else 0.0
        if not torch.equal(got_lse == -math.inf, empty):
            lse_error = math.inf
        worst_out = max(worst_out, math.inf if math.isnan(error) else error)
        worst_lse = max(worst_lse, math.inf if math.isnan(lse_error) else lse_error)
    unwritten = int(out.isnan().sum()) + int(lse.isnan().sum())
    ok = worst_out < TOLERANCE and worst_lse < 1e-2 and unwritten == 0
    return {
        "ok": ok, "out": worst_out, "lse": worst_lse, "unwritten": unwritten, "blocks": len(places), "blind": blind
    }  # fmt: skip


# ------------------------------------------------------------------------------------------------------------ timing


def milliseconds(run: Any, repeats: int = 10) -> float:
    """Median of single launches, warmed up."""
    for _ in range(2):
        run()
    times = []
    for _ in range(repeats):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        run()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return sorted(times)[len(times) // 2]


WAN = (21, 45, 80)
FULL = (24, 48, 80)
VIDEO: dict[str, dict[str, Any]] = {
    "dense": {"grid": WAN, "window": (99, 99, 99), "heads": 4},
    "window 3x5x5": {"grid": WAN, "window": (3, 5, 5), "heads": 40},
    "window 3x3x4": {"grid": WAN, "window": (3, 3, 4), "heads": 40},
    "full tiles 3x5x5": {"grid": FULL, "window": (3, 5, 5), "heads": 40},
    "bias": {"grid": WAN, "window": (3, 5, 5), "heads": 40, "bias": "text"},
    "subtile": {"grid": WAN, "window": (3, 5, 5), "heads": 40, "subtile": True},
    "D=64": {"grid": WAN, "window": (3, 5, 5), "heads": 40, "dim": 64},
    "D=64, dense": {"grid": WAN, "window": (99, 99, 99), "heads": 8, "dim": 64},
    "D=64, tiles of 384": {"grid": FULL, "window": (3, 5, 5), "heads": 40, "dim": 64, "tile": (6, 8, 8)},
    "tiles of 64": {"grid": WAN, "window": (3, 9, 9), "heads": 40, "tile": (4, 4, 4)},
}
SMALL: dict[str, dict[str, Any]] = {
    "base": {},
    "bias": {"bias": "batch"},
    "bias of heads": {"bias": "head", "slots": 128},
    "D=64": {"dim": 64},
    "D=80, DV=36": {"dim": 80, "value_dim": 36},
    "D=20, DV=128": {"dim": 20, "value_dim": 128},
    "subtile": {"subtile": True, "slots": 384},
    "subtile, bias": {"subtile": True, "bias": "batch head"},
    "tiles of 64": {"slots": 64},
    "tiles of 64, subtile": {"slots": 64, "subtile": True},
    "tiles of 64, bias": {"slots": 64, "bias": "batch"},
    "tiles of 64, D=64": {"slots": 64, "dim": 64},
    "tiles of 32, subtile, bias": {"slots": 32, "subtile": True, "bias": "head"},
    "one consumer": {"consumers": 1},
    "three consumers": {"consumers": 3, "slots": 384, "dim": 64},
}


def emit(**record: Any) -> None:
    print(json.dumps(record), flush=True)


def run_checks(names: list[str], options: dict[str, Any]) -> None:
    kernel = load_kernel()
    torch.manual_seed(int(time.time()))
    for name in names:
        features = SMALL[name]
        own = {"consumers": features["consumers"]} if "consumers" in features else {}
        emit(kind="check", case=name, **check(kernel, small_case(**features), {**options, **own}, None))


def run_times(names: list[str], options: dict[str, Any]) -> None:
    kernel = load_kernel()
    torch.manual_seed(int(time.time()))
    for name in names:
        case = video_case(**VIDEO[name], consumers=options.get("consumers"))
        emit(kind="check", case=name, **check(kernel, case, options, 8))
        out, lse = case.outputs()
        for padding in [None, 0] if int(case.tables.keys.valid.min()) == case.tables.unit else [None]:

            def run(case: Case = case, out: Any = out, lse: Any = lse, padding: int | None = padding) -> None:
                case.launch(kernel, out, lse, {"padding": padding, **options})

            ms = milliseconds(run)
            heads = case.packed.q.shape[1]
            dense = 2.0 * (case.dim + case.value_dim) * heads * case.length**2
            emit(
                kind="time", case=name + ("" if padding is None else ", no mask"), ms=ms,
                tflops_blocks=case.flops(tokens=False) / ms / 1e9, tflops_tokens=case.flops(tokens=True) / ms / 1e9,
                density=case.flops(tokens=True) / dense, heads=heads, tokens=case.length,
            )  # fmt: skip
        del case, out, lse
        torch.cuda.empty_cache()


def run_ceilings() -> None:
    n = 8192
    a = torch.randn(n, n, device=DEVICE, dtype=torch.bfloat16)
    b = torch.randn(n, n, device=DEVICE, dtype=torch.bfloat16)
    ms = milliseconds(lambda: a @ b, 20)
    emit(kind="ceiling", name="bf16 matmul", ms=ms, tflops=2 * n**3 / ms / 1e9)
    a8, b8 = to_e4m3(100 * a.float()), to_e4m3(100 * b.float())
    one = torch.ones((), device=DEVICE)
    for fast in (False, True):
        try:
            ms = milliseconds(
                lambda fast=fast: torch._scaled_mm(
                    a8, b8.t(), scale_a=one, scale_b=one, out_dtype=torch.bfloat16, use_fast_accum=fast
                ),
                20,
            )
            emit(kind="ceiling", name=f"fp8 scaled_mm, fast_accum={fast}", ms=ms, tflops=2 * n**3 / ms / 1e9)
        except RuntimeError as error:
            emit(kind="ceiling", name=f"fp8 scaled_mm, fast_accum={fast}", error=str(error)[:200])
    x = torch.randint(0, 255, (2**32,), dtype=torch.uint8, device=DEVICE)
    y = torch.empty_like(x)
    ms = milliseconds(lambda x=x, y=y: y.copy_(x))
    emit(kind="ceiling", name="copy", ms=ms, tb_per_s=2 * x.numel() / ms / 1e9)
    del x, y
    length, heads = math.prod(WAN), 4
    q, k, v = (torch.randn(1, heads, length, 128, device=DEVICE, dtype=torch.bfloat16) for _ in range(3))
    backends = torch.nn.attention.SDPBackend
    for backend in (backends.CUDNN_ATTENTION, backends.FLASH_ATTENTION):
        name = f"SDPA bf16 {backend.name}, {length} x {heads}"
        try:
            with torch.nn.attention.sdpa_kernel(backend):
                ms = milliseconds(lambda: torch.nn.functional.scaled_dot_product_attention(q, k, v), 5)
            emit(kind="ceiling", name=name, ms=ms, tflops=4.0 * 128 * heads * length**2 / ms / 1e9)
        except RuntimeError as error:
            emit(kind="ceiling", name=name, error=str(error)[:200])


# ------------------------------------------------------------------------------------------------------------ parent


def in_process(arguments: list[str], timeout: float) -> tuple[list[dict[str, Any]], str]:
    """(records, how it ended) of this script run with ``arguments``."""
    try:
        done = subprocess.run(
            [sys.executable, __file__, *arguments], capture_output=True, text=True, timeout=timeout, check=False
        )
        text, end = done.stdout, "ok" if done.returncode == 0 else f"exit {done.returncode}: {done.stderr[-2000:]}"
    except subprocess.TimeoutExpired as error:
        text = error.stdout.decode() if isinstance(error.stdout, bytes) else error.stdout or ""
        end = f"no end within {timeout:.0f} s"
    records = []
    for line in text.splitlines():
        if line.startswith("{"):
            records.append(json.loads(line))
        elif line.strip():
            print("   ", line)
    return records, end


def check_jobs() -> list[dict[str, Any]]:
    jobs = [{"part": "checks", "cases": ["base"], "options": {"overlap": overlap}} for overlap in (False, True)]
    jobs += [{"part": "checks", "cases": [name], "options": {}} for name in SMALL if name != "base"]
    jobs += [{"part": "checks", "cases": [name], "options": {"overlap": False}} for name in ("bias", "tiles of 64")]
    return jobs


def time_jobs(quick: bool) -> list[dict[str, Any]]:
    if quick:
        runs: list[tuple[list[str], dict[str, Any]]] = [(["window 3x5x5"], {}), (["bias", "D=64", "tiles of 64"], {})]
    else:
        base = list(VIDEO)[:4]
        runs = [
            (base, {"overlap": overlap, "stages": stages})
            for overlap, stages in itertools.product((False, True), (4, 3))
        ]
        runs += [(["window 3x5x5"], {"consumers": 1}), (["bias", "subtile"], {})]
        runs += [(["D=64", "D=64, dense", "D=64, tiles of 384"], {"consumers": n}) for n in (2, 1)]
        runs += [(["D=64, tiles of 384"], {"consumers": 3}), (["D=64"], {"stages": 6})]
        runs += [(["tiles of 64"], {}), (["tiles of 64"], {"programs": 1, "stages": 4})]
    return [{"part": "times", "cases": cases, "options": options} for cases, options in runs]


def main() -> None:
    parts = ("ceilings", "checks", "times")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=parts, default=parts)
    parser.add_argument("--quick", action="store_true", help="few timed cases")
    parser.add_argument("--timeout", type=float, default=120.0, help="seconds for each process")
    parser.add_argument("--processes", type=int, default=6, help="of checks, at a time")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if not options.worker:
        run_everything(options)
        return
    job = json.loads(options.worker)
    if job["part"] == "ceilings":
        run_ceilings()
    else:
        {"checks": run_checks, "times": run_times}[job["part"]](job["cases"], job["options"])


def show(job: dict[str, Any], records: list[dict[str, Any]], end: str) -> None:
    print(f"\n{job['part']} {job.get('cases', '')} {job.get('options', '')}  {end}", flush=True)
    for r in records:
        if r["kind"] == "check":
            print(
                f"    {'ok ' if r['ok'] else 'BAD'} {r['case']}: out {r['out']:.2e}, lse {r['lse']:.2e}, "
                f"unwritten {r['unwritten']}, blocks {r['blocks']}, rows without a key {r['blind']}"
            )
        elif r["kind"] == "time":
            print(
                f"    {r['case']:28} {r['ms']:8.3f} ms  {r['tflops_blocks']:7.1f} TFLOP/s of blocks  "
                f"{r['tflops_tokens']:7.1f} of tokens  density {r['density']:.3f}  heads {r['heads']}"
            )
        else:
            print("   ", {k: round(v, 3) if isinstance(v, float) else v for k, v in r.items() if k != "kind"})


def run_everything(options: argparse.Namespace) -> None:
    results: list[dict[str, Any]] = []
    path = Path(os.environ.get("OUT", ".")) / "hopper_probe.json"
    late = 0

    def work(job: dict[str, Any]) -> tuple[list[dict[str, Any]], str]:
        return ([], "skipped") if late >= 2 else in_process(["--worker", json.dumps(job)], options.timeout)

    groups = {
        "ceilings": ([{"part": "ceilings"}], 1),
        "checks": (check_jobs(), options.processes),
        "times": (time_jobs(options.quick), 1),
    }
    for part in options.parts:
        jobs, processes = groups[part]
        with ThreadPoolExecutor(processes) as pool:
            for job, (records, end) in zip(jobs, pool.map(work, jobs), strict=True):
                results.append({**job, "end": end, "records": records})
                path.write_text(json.dumps(results, indent=1))
                show(job, records, end)
                late = late + 1 if end.startswith("no end") else 0 if end != "skipped" else late
    if late >= 2:
        print("two processes in a row did not end: the rest was skipped")
    bad = [r for result in results for r in result["records"] if not r.get("ok", True)]
    ended = sum(result["end"] == "ok" for result in results)
    print(f"\n{ended} of {len(results)} processes ended well; {len(bad)} checks failed")


if __name__ == "__main__":
    main()
