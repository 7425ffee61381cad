"""How fast a compiled kernel should be on H100 and H200: a static model of its main loop.

One *step* is one pass of the main loop by one warpgroup (four warps): a block of keys against the warpgroup's rows. Its
instructions are counted in the binary, and each unit of a multiprocessor (SM) gets the cycles that they occupy it:

    tensor     flops / (flops per cycle and SM)
    exp        special-function instructions (MUFU), 16 lanes per cycle
    issue      all instructions, 4 per cycle
    half       conversions, minima and maxima, selections: 64 lanes per cycle
    shared     bytes of operands that tensor cores fetch, and explicit loads and stores, 128 bytes per cycle
    l2         bytes of K and V that a program loads, through the level-2 cache

Warpgroups alternate between two stations, the tensor cores and the softmax (the slowest of exp, issue and half). In the
plain kernel a warpgroup waits for each product; the Hopper kernel has a product under way during the softmax and counts
as two customers. Mean-value analysis of this closed network (two stations, exponential service; Reiser and Lavenberg,
"Mean-Value Analysis of Closed Multichain Queuing Networks", 1980) gives the cycles per step. What such a model leaves
out (latencies, barriers, bank conflicts, clocks under load) is one factor, :data:`EFFICIENCY`, set between two
published figures. No step is faster than shared memory or the level-2 cache can feed it. Nothing is measured here; of
these kernels' measured times the model knows one figure, :data:`START_CYCLES`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

from fpscompile.errors import UnsupportedError
from fpscompile.gpu import offline
from fpscompile.gpu.binary import BinaryReport
from fpscompile.gpu.compilation import BinaryError
from fpscompile.gpu.config import KernelConfig, candidates, padded, rows_of
from fpscompile.kernel_spec import KernelSpec

EFFICIENCY = 0.57
"""Achieved over modelled speed. FlashAttention-3's FP8 forward (d = 128, 16k tokens, about 1008 TFLOP/s on an H100,
arXiv 2407.08608) is 0.65 of what this model, without the factor, gives the Hopper kernel; Triton's FP8 attention of
2024 (about 635 TFLOP/s) 0.49 of what it gives the plain one."""

START_CYCLES = 9000
"""Of a program, beside its steps: until its first product, and after its last. From the times of the FP8 kernel on an
H200 with tile 7x9x4 at densities 1.0 and 0.05; docs/performance_measured.md has what the other tiles' give."""


@dataclass(frozen=True)
class Gpu:
    """What a multiprocessor does per cycle, and how many there are."""

    name: str
    multiprocessors: int
    clock_hz: float
    """At which the datasheet's peak holds."""
    fp8_flops: int
    """Dense FP8 multiplications and additions per cycle and SM."""
    bf16_flops: int
    exp_lanes: int
    half_lanes: int
    """Lanes per cycle of conversions, minima, maxima, comparisons."""
    issue: int
    """Warp instructions per cycle."""
    shared_bytes: int
    """Per cycle."""
    l2_bytes_per_s: float
    hbm_bytes_per_s: float
    registers: int = 65_536
    shared_size: int = 228 * 1024
    shared_reserved: int = 1024
    """Of each program, by the driver."""
    max_warps: int = 64


H100 = Gpu(
    # NVIDIA H100 datasheet (SXM): 1979 TFLOP/s FP8 and 989 TFLOP/s BF16, dense; 3.35 TB/s; "H100 Tensor Core GPU
    # Architecture": 132 SMs, peaks at 1830 MHz, so 8192 and 4096 per cycle. Lanes per cycle: CUDA C++ Programming
    # Guide, "Throughput of Native Arithmetic Instructions", compute capability 9.0. The level-2 cache's rate is not
    # published: 5.5 TB/s is assumed.
    name="H100 SXM",
    multiprocessors=132,
    clock_hz=1.83e9,
    fp8_flops=8192,
    bf16_flops=4096,
    exp_lanes=16,
    half_lanes=64,
    issue=4,
    shared_bytes=128,
    l2_bytes_per_s=5.5e12,
    hbm_bytes_per_s=3.35e12,
)
H200 = replace(H100, name="H200 SXM", hbm_bytes_per_s=4.8e12)  # H200 datasheet: the same chip, 4.8 TB/s

GPUS = (H100, H200)


@dataclass(frozen=True)
class StepCycles:
    """Cycles of an SM's units for one step of one warpgroup."""

    tensor: float
    exp: float
    issue: float
    half: float
    shared: float
    l2: float

    @property
    def softmax(self) -> float:
        """The slowest of what the softmax needs."""
        return max(self.exp, self.issue, self.half)

    @property
    def limit(self) -> str:
        """Name of the busiest unit."""
        units = {name: getattr(self, name) for name in ("tensor", "exp", "issue", "half", "shared", "l2")}
        return max(units, key=lambda name: units[name])

    @property
    def bound(self) -> float:
        """Cycles of the busiest unit."""
        return max(self.tensor, self.softmax, self.shared, self.l2)


@dataclass(frozen=True)
class Prediction:
    """What the model says about one config on one GPU."""

    gpu: str
    config: KernelConfig
    programs_per_sm: int
    warpgroups_per_sm: int
    """That compute."""
    cycles: StepCycles
    cycles_per_step: float
    """Of an SM, per step of one of its warpgroups; :data:`EFFICIENCY` is included."""
    flops_per_step: int
    tflops: float
    """On kept blocks."""
    bound_tflops: float
    """If the busiest unit never waited."""


def predict(report: BinaryReport, spec: KernelSpec, config: KernelConfig, gpu: Gpu = H100) -> Prediction:
    """Speed of a binary's main loop.

    Raises:
        UnsupportedError: a binary for something other than sm_90, or without a loop of matrix products.
    """
    if report.target != "cuda:90":
        raise UnsupportedError(f"the cost model knows sm_90 (H100, H200), not {report.target}")
    try:
        loop = report.main_loop
    except BinaryError as error:
        raise UnsupportedError(str(error)) from error
    per_sm = programs_per_sm(report, gpu)
    if per_sm == 0:
        raise UnsupportedError(f"{report.kernel} with {config} does not fit a multiprocessor of {gpu.name}")
    hopper = config.variant == "hopper"
    rows = rows_of(config, spec)
    groups = max(1, -(-rows // 64)) if hopper else max(1, config.num_warps // 4)
    cycles = _cycles(report, spec, rows, groups, gpu)
    customers = groups * per_sm * (2 if hopper else 1)
    step = max(mva(cycles.tensor, cycles.softmax, customers) / EFFICIENCY, cycles.bound)
    flops = 4 * (loop.flops or 0)

    def tflops(cycles_per_step: float) -> float:
        return flops / cycles_per_step * gpu.multiprocessors * gpu.clock_hz / 1e12

    return Prediction(
        gpu=gpu.name,
        config=config,
        programs_per_sm=per_sm,
        warpgroups_per_sm=groups * per_sm,
        cycles=cycles,
        cycles_per_step=step,
        flops_per_step=flops,
        tflops=tflops(step),
        bound_tflops=tflops(cycles.bound),
    )


def programs_per_sm(report: BinaryReport, gpu: Gpu) -> int:
    """How many programs share a multiprocessor: by registers, shared memory and warps."""
    # Registers are handed out in units of 256 per warp, eight per thread.
    per_warp = -(-report.registers // 8) * 8 * 32
    return min(
        gpu.registers // (per_warp * report.num_warps),
        gpu.shared_size // (report.shared_bytes + gpu.shared_reserved),
        gpu.max_warps // report.num_warps,
    )


def mva(first: float, second: float, customers: int) -> float:
    """Cycles per visit of ``customers`` that alternate between two stations of these service times.

    One customer takes the sum; ever more approach the slower station's time.
    """
    times, queued, throughput = (first, second), [0.0, 0.0], 0.0
    for n in range(1, customers + 1):
        waits = [time * (1 + queue) for time, queue in zip(times, queued, strict=True)]
        throughput = n / sum(waits)
        queued = [throughput * wait for wait in waits]
    return 1 / throughput


def _cycles(report: BinaryReport, spec: KernelSpec, rows: int, groups: int, gpu: Gpu) -> StepCycles:
    loop = report.main_loop
    warps, every = 4, loop.every
    item = 1 if spec.quant == "fp8" else 2
    rate = gpu.fp8_flops if item == 1 else gpu.bf16_flops
    dims = padded(spec.head_dim) + padded(spec.value_dim)
    half = sum(every.get(kind, 0) for kind in ("convert", "minmax", "select"))
    explicit = every.get("shared_load", 0) + every.get("shared_store", 0)
    # Of the first product both operands come from shared memory, of the second only V.
    fetched = item * (64 * padded(spec.head_dim) + spec.block_n * dims)
    l2_rate = gpu.l2_bytes_per_s / (gpu.multiprocessors * gpu.clock_hz)
    return StepCycles(
        tensor=warps * (loop.flops or 0) / rate,
        exp=warps * every.get("mufu", 0) * 32 / gpu.exp_lanes,
        issue=warps * loop.total / gpu.issue,
        half=warps * half * 32 / gpu.half_lanes,
        shared=(fetched + warps * explicit * 32 * 4) / gpu.shared_bytes,
        l2=item * spec.block_n * dims / groups / l2_rate,
    )


@dataclass(frozen=True)
class Problem:
    """One call of the kernel, in the numbers that its time depends on."""

    tokens: int
    heads: int
    batch: int
    programs: int
    """Blocks of query rows of all heads and batch elements."""
    steps: int
    """Blocks of keys that these programs visit."""
    pairs: int
    """Query-key pairs of one head that the mask keeps, padding aside."""


def seconds(
    prediction: Prediction, spec: KernelSpec, problem: Problem, gpu: Gpu = H100, *, start_cycles: float = START_CYCLES
) -> tuple[float, float]:
    """(attention kernel, FP8 pre-pass): seconds.

    The kernel: steps at the predicted rate and what programs take beside them, which others on the same SM fill, plus
    the share of a last round of programs that leaves SMs idle. The pre-pass reads q, k and v in two bytes and writes
    them in one, at 80 % of the memory's peak; K and V are read twice, once for their statistics.
    """
    groups = prediction.warpgroups_per_sm // prediction.programs_per_sm
    per_sm_step = prediction.cycles_per_step / gpu.clock_hz
    slots = gpu.multiprocessors * prediction.programs_per_sm
    rounds = problem.programs / slots
    tail = math.ceil(rounds) / rounds
    starts = problem.programs * start_cycles / prediction.programs_per_sm / gpu.clock_hz
    kernel = (problem.steps * groups * per_sm_step + starts) / gpu.multiprocessors * tail
    if spec.quant != "fp8":
        return kernel, 0.0
    elements = problem.batch * problem.heads * problem.tokens
    bytes_moved = elements * (3 * spec.head_dim + 5 * (spec.head_dim + spec.value_dim) / spec.gqa_group)
    return kernel, bytes_moved / (0.8 * gpu.hbm_bytes_per_s)


@dataclass(frozen=True)
class Ranked:
    """One config with what it compiles to."""

    config: KernelConfig
    report: BinaryReport
    prediction: Prediction | None
    """None where the binary must not be used or does not fit; :attr:`reason` says why."""
    reason: str | None = None


def rank(spec: KernelSpec, configs: Iterable[KernelConfig] | None = None, gpu: Gpu = H100) -> tuple[Ranked, ...]:
    """All configs of a spec, compiled, the fastest by prediction first; those that must not be used come last.

    Raises:
        UnsupportedError: a target that the model does not know.
    """
    if spec.target != "cuda:90":
        raise UnsupportedError(f"the cost model knows sm_90 (H100, H200), not {spec.target}")
    found = []
    for config in configs if configs is not None else candidates(spec):
        report = offline.compile_forward(spec, config, allow_flaws=True)
        prediction, reason = None, None
        if report.spill_bytes:
            reason = f"it spills {report.spill_bytes} bytes"
        elif report.serialized:
            reason = "its matrix products wait for one another"
        elif report.damaged:
            reason = "ptxas gives its matrix products wrong operands"
        else:
            try:
                prediction = predict(report, spec, config, gpu)
            except UnsupportedError as error:
                reason = str(error)
        found.append(Ranked(config, report, prediction, reason))
    return tuple(sorted(found, key=lambda item: -(item.prediction.tflops if item.prediction else -1.0)))


def best(spec: KernelSpec, gpu: Gpu = H100) -> KernelConfig:
    """The config with the highest predicted speed.

    Raises:
        UnsupportedError: no candidate compiles into something usable.
    """
    first = rank(spec, gpu=gpu)[0]
    if first.prediction is None:
        raise UnsupportedError(f"no config of {spec} is usable: {first.reason}")
    return first.config
