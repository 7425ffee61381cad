"""Tuning: the race finds the fastest beyond noise, winners are right, and what was measured is used and kept."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from models.structured import Structured
from torch import nn

from fpscompile import Backend, Settings
from fpscompile.autotune import autotune
from fpscompile.errors import OptionError, UnsupportedError
from fpscompile.lowerings import boxes, gather
from fpscompile.plan import PhasePlan, Plan, resolve
from fpscompile.reference import attention
from fpscompile.tuning import candidates as space
from fpscompile.tuning import read, tuner
from fpscompile.tuning.problem import Candidate, Problem, exact_rows
from fpscompile.tuning.race import EFFORTS, Effort, median_interval, race
from fpscompile.tuning.store import TuningFileError

OPTIONS = {"density": 0.3, "tile": (2, 4, 4), "inner": "eager", "quant": "none"}


class Model(nn.Module):
    """Blocks that attend over all (t, h, w) of a latent, each with a number of heads of its own."""

    def __init__(self, heads: tuple[int, ...] = (2, 2)) -> None:
        super().__init__()
        self.embed = nn.Conv3d(4, 64, (1, 2, 2), (1, 2, 2))
        self.blocks = nn.ModuleList(nn.Linear(64, 192) for _ in heads)
        self.heads = heads

    def forward(self, latent: torch.Tensor) -> torch.Tensor:
        x = self.embed(latent).flatten(2).transpose(1, 2)
        for heads, block in zip(self.heads, self.blocks, strict=True):
            q, k, v = (part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in block(x).chunk(3, -1))
            x = x + F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return x


def latent(t: int = 4, h: int = 8, w: int = 8) -> torch.Tensor:
    return torch.randn(1, 4, t, 2 * h, 2 * w)


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A tuning file to be made; the race is short, and no kernels are built for it."""
    monkeypatch.setattr(space, "CPP_CHOICES", {})
    monkeypatch.setitem(EFFORTS, "quick", Effort("quick", rounds=7, seconds=0.5, equal=0.02))
    monkeypatch.setitem(EFFORTS, "full", Effort("full", rounds=8, seconds=0.5, equal=0.01))
    return tmp_path / "tuning.json"


# The race


def noisy(seconds: float, sigma: float, load: list[float], spikes: float = 0.0) -> Callable[[], float]:
    """A function whose time is noisy and shares the machine's load, which drifts, with its rivals."""

    def run() -> float:
        load[0] *= random.lognormvariate(0, 0.03)
        spike = 3.0 if random.random() < spikes else 1.0
        return seconds * load[0] * spike * random.lognormvariate(0, sigma)

    return run


def test_the_fastest_wins_in_spite_of_load_and_spikes() -> None:
    wins = 0
    for _ in range(40):
        load = [1.0]
        times = {"default": 1.0, "a": 0.8, "b": 0.9, "c": 1.6, "d": 4.0}
        functions = {name: noisy(value, 0.05, load, spikes=0.05) for name, value in times.items()}
        result = race(functions, EFFORTS["full"], incumbent="default")
        wins += result.winner == "a"
        assert set(result.order) == set(times)
        assert result.seconds["d"] > result.seconds["a"]
    assert wins >= 36


def test_the_incumbent_stays_unless_another_is_faster_beyond_doubt() -> None:
    replaced = 0
    for _ in range(40):
        load = [1.0]
        functions = {name: noisy(1.0, 0.1, load) for name in ("default", "a", "b", "c")}
        replaced += race(functions, EFFORTS["quick"], incumbent="default").winner != "default"
    assert replaced <= 8


def test_what_is_clear_ends_soon_and_what_is_hopeless_does_not_start() -> None:
    calls = {"fast": 0, "slow": 0, "hopeless": 0}

    def counted(name: str, seconds: float) -> Callable[[], float]:
        def run() -> float:
            calls[name] += 1
            return seconds * random.uniform(1.0, 1.05)

        return run

    functions = {"slow": counted("slow", 2.0), "fast": counted("fast", 1.0), "hopeless": counted("hopeless", 9.0)}
    result = race(functions, EFFORTS["full"], incumbent="slow")
    assert result.winner == "fast"
    assert calls["hopeless"] == 1
    assert calls["slow"] <= 4
    assert result.measurements == sum(calls.values())


def test_seconds_bound_the_race() -> None:
    now = [0.0]

    def run() -> float:
        now[0] += 1.0
        return random.lognormvariate(0, 0.3)

    result = race({"a": run, "b": run}, Effort("x", 1000, 10.0, 0.0), incumbent="a", clock=lambda: now[0])
    assert result.rounds <= 7


def test_median_interval_holds_the_median() -> None:
    assert median_interval([1.0] * 5) is None, "no 95 % interval of five values"
    assert median_interval([3.0, 1.0, 2.0, 6.0, 5.0, 4.0]) == (1.0, 6.0)
    held = 0
    for _ in range(400):
        low, high = median_interval([random.expovariate(1.0) for _ in range(15)]) or (0.0, 0.0)
        held += low <= statistics.NormalDist().inv_cdf(0.5) + 0.6931 <= high
    assert held >= 0.92 * 400


# One site


def problem(dtype: torch.dtype = torch.float32, key_mask: str = "none", **plan: object) -> Problem:
    fields = {"tile": (2, 4, 4), "phases": (PhasePlan(density=0.3), PhasePlan(density=1.0))} | plan
    resolved = resolve(Plan(**fields), (4, 9, 8), 5 + 288 + 3, 5 + 288 + 3, 5, 5)  # type: ignore[arg-type]
    return Problem(resolved, 4, 2, 32, 32, dtype, torch.device("cpu"), key_mask, (0.8, 0.2))


@pytest.mark.parametrize("key_mask", ["none", "bool", "float"])
def test_exact_rows_are_the_references(key_mask: str) -> None:
    given = problem(key_mask=key_mask)
    q, k, v, mask = given.inputs()
    rows = torch.randperm(296)[:20]
    for phase in (0, 1):
        expected, _ = attention(
            q.double(), k.double(), v.double(), resolved=given.resolved, phase=[phase], key_mask=mask
        )
        actual = exact_rows(q, k, v, mask, resolved=given.resolved, phase=phase, rows=rows)
        assert (actual - expected[0, :, rows]).norm() / expected[0, :, rows].norm() < 1e-6


CHOSEN = {
    "topk": "topk",
    "static and topk": {"family": "union", "of": [[1, 1, 1], "topk"]},
}


def chosen_problem(window: Any = "topk", density: float = 0.3, **fields: Any) -> Problem:
    """Phases whose tiles content chooses, and a dense one."""
    schedule = Settings.from_options({"window": window, "density": density}).phases
    chosen = dataclasses.replace(schedule.phases[0])
    phases = (PhasePlan(window=chosen.window, density=chosen.density), PhasePlan(density=1.0))
    return dataclasses.replace(problem(phases=phases), **fields)


@pytest.mark.parametrize("name", CHOSEN)
@pytest.mark.parametrize("key_mask", ["none", "bool", "float"])
def test_tiles_chosen_by_content_are_those_of_the_op(name: str, key_mask: str) -> None:
    """The tuner runs what ``fps::attention`` runs, and checks it against the reference's arithmetic."""
    given = chosen_problem(CHOSEN[name], key_mask=key_mask)
    assert given.resolved.dynamic
    tensors = given.inputs()
    q, k, v, mask = tensors
    plan = dataclasses.replace(given.resolved.plan, lowering="gather").to_json()
    span, grid = [5, 288], list(given.resolved.q_layout.grid)
    for phase, dense in ((0, False), (1, True)):
        step = torch.tensor([phase], dtype=torch.int32)
        expected, _ = torch.ops.fps.attention(q, k, v, mask, step, grid, None, span, span, None, plan)
        actual = given.runner(Candidate("gather"), tensors)(phase)
        assert torch.equal(actual, expected)
        full = F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True)
        assert torch.allclose(actual, full, atol=1e-4) == dense
    assert given.error(Candidate("gather"), tensors) < 1e-6
    assert given.timed(Candidate("gather"), tensors)() > 0


def test_a_kernel_that_ignores_the_chosen_tiles_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    given, right = chosen_problem(), gather.forward

    def dense(*args: Any, block_mask: Any, **kwargs: Any) -> Any:
        seen = block_mask.to_dense(given.resolved.k_layout.n_tiles)
        return right(*args, block_mask=type(block_mask).from_dense(torch.ones_like(seen)), **kwargs)

    monkeypatch.setattr(gather, "forward", dense)
    assert given.error(Candidate("gather"), given.inputs()) > 0.1


def test_configs_of_a_gpu_are_those_of_the_sites_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors that only describe a site have no device whose architecture could be asked for."""
    asked = []

    def target_of(device: torch.device) -> str:
        asked.append(device.type)
        return "cuda:90"

    monkeypatch.setattr("fpscompile.gpu.call.target_of", target_of)
    monkeypatch.setattr("fpscompile.gpu.cost_model.rank", lambda spec, configs: ())
    given = dataclasses.replace(problem(), device=torch.device("cuda"))
    found = space.triton_configs(given, "quick")
    assert found == [Candidate("triton")]
    assert set(asked) == {"cuda"}


def test_a_signature_of_tiles_chosen_by_content_says_so() -> None:
    given = chosen_problem().signature
    static = problem().signature
    assert given == chosen_problem().signature
    assert " topk " in given.key
    assert "topk" not in static.key
    assert " topk, on" in given.describe()
    others = [chosen_problem(CHOSEN["static and topk"]).signature, chosen_problem(density=0.5).signature, static]
    assert len({given.key, *(other.key for other in others)}) == 4


@pytest.mark.parametrize("lowering", ["boxes", "gather"])
def test_error_is_small_for_right_kernels_and_large_for_wrong_ones(
    lowering: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = problem()
    assert given.error(Candidate(lowering), given.inputs()) < 1e-6
    module = {"boxes": boxes, "gather": gather}[lowering]
    right = module.forward
    wrong = lambda *args, **kwargs: (right(*args, **kwargs)[0] * 1.01, None)  # noqa: E731
    monkeypatch.setattr(module, "forward", wrong)
    assert given.error(Candidate(lowering), given.inputs()) == pytest.approx(0.01, rel=0.01)


def test_phases_that_are_equal_are_measured_once() -> None:
    phases = (PhasePlan(density=1.0), PhasePlan(density=0.3), PhasePlan(density=1.0))
    given = problem(phases=phases)
    given = dataclasses.replace(given, weights=(0.2, 0.5, 0.3))
    assert given.distinct == pytest.approx({0: 0.5, 1: 0.5})


def test_signature_says_what_the_measurement_depends_on() -> None:
    base = problem()
    assert problem().signature == base.signature
    window = base.resolved.windows[0]
    same = problem(phases=(PhasePlan(window=window), PhasePlan(density=1.0)))
    assert same.signature.key == base.signature.key, "a density and the window it resolves to"
    assert problem(lowering="gather").signature == base.signature, "what the tuner chooses does not enter"
    others = [
        problem(dtype=torch.bfloat16),
        problem(key_mask="bool"),
        problem(tile=(2, 4, 8)),
        problem(phases=(PhasePlan(density=0.6), PhasePlan(density=1.0))),
        problem(quant="fp8"),
        problem(quant="fp8", phases=(PhasePlan(density=0.3, granularity="head"), PhasePlan(density=1.0))),
        dataclasses.replace(base, asked="boxes"),
        dataclasses.replace(base, heads=2),
        dataclasses.replace(base, weights=(0.5, 0.5)),
    ]
    keys = {other.signature.key for other in others} | {base.signature.key}
    assert len(keys) == len(others) + 1
    json.dumps(base.signature.to_dict())


def test_candidates_keep_what_was_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    auto = problem()
    assert {item.lowering for item in space.candidates(auto, Candidate("boxes"), "quick")} >= {"boxes"}
    sparse = problem(phases=(PhasePlan(density=0.3),))
    found = space.candidates(sparse, Candidate("boxes"), "full")
    assert found[0] == Candidate("boxes")
    assert Candidate("gather") in found
    asked = dataclasses.replace(sparse, asked="gather")
    assert space.candidates(asked, Candidate("gather"), "full") == (Candidate("gather"),)
    assert Candidate("boxes") not in space.candidates(problem(quant="fp8"), Candidate("gather"), "full")


def test_cpp_configs_are_valid_and_more_of_them_for_a_full_search(monkeypatch: pytest.MonkeyPatch) -> None:
    from fpscompile.lowerings import cpp
    from fpscompile.render import CppConfig

    given = problem(phases=(PhasePlan(density=0.3),))
    if cpp.why_not(torch.float32, 32, 32, given.resolved.plan) is not None:
        pytest.skip("the generated kernel does not run here")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    blocks = space.cpp_configs(given, "full")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    quick, full = (space.cpp_configs(given, effort) for effort in ("quick", "full"))
    assert len(full) == len(blocks) + 3, "and fewer threads"
    assert set(quick) <= set(full)
    assert len(full) > len(quick) > 2
    default = cpp.spec_of(*given.inputs("meta"), given.resolved)
    for candidate in full:
        if candidate.config:
            config = candidate.plan(given.resolved.plan).config_as(CppConfig)
            assert config is not None
            assert config.is_valid(default)
            assert config.compute == "float32", "the precision stays"
            assert config.threads in ((0,) if candidate in blocks else (1, 2, 4))


def test_threads_of_a_config_reach_the_kernel_and_not_its_source(monkeypatch: pytest.MonkeyPatch) -> None:
    from fpscompile import cpp_build
    from fpscompile.lowerings import cpp
    from fpscompile.render import render

    given = problem()
    if cpp.why_not(torch.float32, 32, 32, given.resolved.plan) is not None:
        pytest.skip("the generated kernel does not run here")
    tensors = given.inputs()
    spec = cpp.spec_of(*tensors, given.resolved)
    default = cpp.config_of(spec, given.resolved.plan)
    calls = []
    run = cpp_build.run
    monkeypatch.setattr(cpp_build, "run", lambda kernel, call: calls.append(call.threads) or run(kernel, call))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    for threads in (0, 1, 9):
        config = dataclasses.replace(default, threads=threads)
        assert render(spec, config) == render(spec, default)
        assert given.error(Candidate("cpp", space.pairs(config)), tensors) < 1e-5
    assert calls == [2, 2, 1, 1, 2, 2], "two phases each"


def test_kernels_are_built_before_anything_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each source once, and one that fails leaves the others alone."""
    from fpscompile import cpp_build
    from fpscompile.lowerings import cpp

    given = problem(phases=(PhasePlan(density=0.3),))
    if cpp.why_not(torch.float32, 32, 32, given.resolved.plan) is not None:
        pytest.skip("the generated kernel does not run here")
    built: list[str] = []

    def load(source: str) -> None:
        built.append(source)
        if len(built) == 2:
            raise UnsupportedError("rejected")

    monkeypatch.setattr(cpp_build, "load", load)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    said: list[str] = []
    found = space.candidates(given, Candidate("cpp"), "quick")
    tuner.build(given, found, said.append)
    assert len(built) == len(set(built)) == len(said)
    threads = sum(dict(candidate.config).get("threads", 0) > 0 for candidate in found)
    assert threads == 1
    assert len(built) == sum(candidate.lowering == "cpp" for candidate in found) - threads


def test_a_quick_search_builds_no_configs_of_a_lowering_that_is_far_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    slow, fast, near = Candidate("cpp"), Candidate("boxes"), Candidate("gather")
    configs = [Candidate(name, (("n", n),)) for name in ("cpp", "gather") for n in (1, 2)]
    seconds = {"cpp": 2.0, "boxes": 1.0, "gather": 1.2}
    monkeypatch.setattr(tuner, "candidates", lambda *args: (slow, fast, near, *configs))
    monkeypatch.setattr(tuner, "build", lambda *args: None)
    monkeypatch.setattr(Problem, "timed", lambda self, candidate, _: lambda: seconds[candidate.lowering])
    monkeypatch.setattr(Problem, "error", lambda *args: 0.0)
    quick, full = (tuner.measure(problem(), slow, effort) for effort in ("quick", "full"))
    assert {name for name, _ in quick.tried} == {"cpp()", "boxes()", "gather()", "gather(n=1)", "gather(n=2)"}
    assert len(full.tried) == 7
    assert quick.candidate == full.candidate == fast
    assert quick.notes == ("configs of cpp are not tried: by its own rule it takes 2.0 times as long as boxes()",)


@pytest.mark.slow
def test_all_cpp_configs_compute_the_same() -> None:
    given = problem()
    tensors = given.inputs()
    for candidate in space.cpp_configs(given, "full"):
        assert given.error(candidate, tensors) < 1e-5, candidate


# A model


def test_second_run_measures_nothing_and_the_compilation_uses_the_file(path: Path) -> None:
    model, x = Model().eval(), latent()
    first = autotune(model, x, options=OPTIONS, path=path)
    assert first.measurements > 0
    assert [len(group.names) for group in first.groups] == [2], "both blocks have one signature"
    (group,) = first.groups
    assert group.tuned is not None
    assert group.tuned.error < 1e-5
    assert group.tuned.seconds <= 1.05 * group.tuned.default_seconds
    assert str(path) in str(first)

    second = autotune(model, x, options=OPTIONS, path=path)
    assert second.measurements == 0
    assert second.seconds < 0.1
    assert second.groups[0].tuned is not None
    assert second.groups[0].tuned.candidate == group.tuned.candidate

    backend = Backend(Settings.from_options(OPTIONS | {"tuning": str(path)}))
    with torch.no_grad():
        actual = torch.compile(model, backend=backend)(x)
        torch._dynamo.reset()
        untuned = Backend(Settings.from_options(OPTIONS | {"autotune": "off"}))
        expected = torch.compile(model, backend=untuned)(x)
    sites = backend.graphs[0].sites
    assert {site.lowering for site in sites} == {group.tuned.candidate.lowering}
    assert {site.plan.config for site in sites if site.plan} == {group.tuned.candidate.config}
    assert any(note.code == "tuned" and str(path) in note.message for note in backend.graphs[0].notes)
    assert all(note.code != "tuned" for note in untuned.graphs[0].notes)
    assert (actual - expected).norm() / expected.norm() < 1e-5


def test_sites_whose_tiles_content_chooses_are_tuned(path: Path) -> None:
    model, x, options = Model().eval(), latent(), OPTIONS | {"window": "topk"}
    report = autotune(model, x, options=options, path=path)
    (group,) = report.groups
    assert not report.declined
    assert len(group.names) == 2
    assert group.tuned is not None
    assert report.measurements > 0
    assert group.tuned.error < 1e-5
    (key,) = json.loads(path.read_text())["sites"]
    assert " topk " in key
    assert autotune(model, x, options=options, path=path).measurements == 0

    backend = Backend(Settings.from_options(options | {"tuning": str(path)}))
    untuned = Backend(Settings.from_options(options | {"autotune": "off"}))
    with torch.no_grad():
        actual = torch.compile(model, backend=backend)(x)
        torch._dynamo.reset()
        expected = torch.compile(model, backend=untuned)(x)
    assert {site.lowering for site in backend.graphs[0].sites} == {group.tuned.candidate.lowering}
    assert [note.message for note in backend.graphs[0].notes if note.code == "tuned" and " topk" in note.message]
    assert (actual - expected).norm() / expected.norm() < 1e-5
    # A file of static windows holds nothing for it.
    static = Backend(Settings.from_options(OPTIONS | {"tuning": str(path)}))
    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(model, backend=static)(x)
    assert any(note.code == "tuning-ignored" for note in static.graphs[0].notes)


def test_a_tuned_config_reaches_the_kernel(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The config in the file is the one that the lowering gets, through the graph and its text."""
    from fpscompile.lowerings import cpp

    if cpp.why_not(torch.float32, 32, 32, problem().resolved.plan) is not None:
        pytest.skip("the generated kernel does not run here")
    model, x = Model().eval(), latent()
    autotune(model, x, options=OPTIONS, path=path)
    data = json.loads(path.read_text())
    (entry,) = data["sites"].values()
    entry["lowering"], entry["versions"] = "cpp", tuner.versions("cpp")
    resolved = problem().resolved
    entry["config"] = dict(space.pairs(cpp.default_config(cpp.spec_of(*problem().inputs("meta"), resolved))))
    entry["config"]["block_n"] = 128
    path.write_text(json.dumps(data))
    seen = []
    kernel = cpp._kernel
    monkeypatch.setattr(cpp, "_kernel", lambda spec, config: seen.append(config) or kernel(spec, config))
    backend = Backend(Settings.from_options(OPTIONS | {"tuning": str(path)}))
    with torch.no_grad():
        torch.compile(model, backend=backend)(x)
    assert [config.block_n for config in seen] == [128, 128]


USER = """
import sys, time
sys.path.insert(0, sys.argv[1])
import torch
torch.set_num_threads(int(sys.argv[3]))
from fpscompile.autotune import autotune
from fpscompile.tuning import tuner
from test_autotune import OPTIONS, Model, latent
def forbidden(*args, **kwargs):
    raise AssertionError("measured")
tuner.measure = forbidden
report = autotune(Model().eval(), latent(), options=OPTIONS, path=sys.argv[2])
print(report.measurements, report.seconds < 0.5, report.groups[0].tuned.candidate)
"""


def test_another_process_uses_the_file_without_measuring(path: Path) -> None:
    report = autotune(Model().eval(), latent(), options=OPTIONS, path=path)
    command = [sys.executable, "-c", USER, Path(__file__).parent, path, str(torch.get_num_threads())]
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == f"0 True {report.groups[0].tuned.candidate}"  # type: ignore[union-attr]


def test_option_measures_while_compiling_once(path: Path) -> None:
    model, x = Model((2, 4)).eval(), latent()
    backend = Backend(Settings.from_options(OPTIONS | {"autotune": "quick", "tuning": str(path)}))
    state = torch.random.get_rng_state()
    with torch.no_grad():
        actual = torch.compile(model, backend=backend)(x)
    assert torch.equal(torch.random.get_rng_state(), state), "the user's random numbers are untouched"
    notes = [note.message for note in backend.graphs[0].notes if note.code == "tuned"]
    assert len(notes) == 2
    assert all("measurements, saved in" in note for note in notes)
    assert len(read(path).contents.sites) == 2
    torch._dynamo.reset()
    again = Backend(Settings.from_options(OPTIONS | {"autotune": "quick", "tuning": str(path)}))
    start = time.perf_counter()
    with torch.no_grad():
        assert torch.allclose(torch.compile(model, backend=again)(x), actual, atol=1e-5)
    assert all("as " in note.message for note in again.graphs[0].notes if note.code == "tuned")
    assert again.graphs[0].seconds <= time.perf_counter() - start


def test_interrupting_keeps_what_is_done(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured = []
    measure = tuner.measure

    def interrupted(problem: Problem, *args: object) -> tuner.Tuned:
        if measured:
            raise KeyboardInterrupt
        measured.append(problem.signature.key)
        return measure(problem, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(tuner, "measure", interrupted)
    with pytest.raises(KeyboardInterrupt):
        autotune(Model((2, 4)).eval(), latent(), options=OPTIONS, path=path)
    assert list(read(path).contents.sites) == measured
    monkeypatch.setattr(tuner, "measure", measure)
    report = autotune(Model((2, 4)).eval(), latent(), options=OPTIONS, path=path)
    assert [group.tuned.cached for group in report.groups if group.tuned] == [True, False]


def several_signatures() -> tuple[nn.Module, tuple[torch.Tensor], dict[str, Any]]:
    """For the command line."""
    return Model((1, 2, 4, 8)).eval(), (latent(8, 16, 16),), {}


@pytest.mark.slow
def test_ctrl_c_in_a_real_process(tmp_path: Path) -> None:
    """The terminal's signal, while the second signature or a later one is measured."""
    file = tmp_path / "tuning.json"
    command = [sys.executable, "-m", "fpscompile.cli", "tune", "test_autotune:several_signatures", "--file", str(file)]
    command += ["--option", "density=0.3", "--option", "tile=(2,4,4)", "--option", "quant=none"]
    tests = Path(__file__).parent
    # A result is good for a number of threads, and a test runner's worker has fewer than a process of its own.
    env = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    process = subprocess.Popen(
        command, cwd=tests, env=env, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True,
        # A job that a shell script has put in the background ignores the signal, and so would its children.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    until = time.monotonic() + 300
    while not file.exists() and process.poll() is None and time.monotonic() < until:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 130, err
    assert err == "interrupted: what was measured so far is kept\n"
    kept = set(read(file).contents.sites)
    assert 1 <= len(kept) < 4
    model, args, kwargs = several_signatures()
    options = {"density": 0.3, "tile": (2, 4, 4), "quant": "none"}
    report = autotune(model, *args, options=options, path=file, **kwargs)
    assert {group.signature.key for group in report.groups if group.tuned and group.tuned.cached} == kept
    assert len(read(file).contents.sites) == 4


def test_a_wrong_kernel_never_wins(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(q: torch.Tensor, *args: object, **kwargs: object) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.zeros_like(q), q.new_zeros(q.shape[:3])

    timed = Problem.timed

    def gather_is_fastest(
        self: Problem, candidate: Candidate, tensors: tuple[torch.Tensor, ...]
    ) -> Callable[[], float]:
        run = timed(self, candidate, tensors)
        return (lambda: 1e-9) if candidate.lowering == "gather" else run

    monkeypatch.setattr(Problem, "timed", gather_is_fastest)
    monkeypatch.setattr(gather, "forward", wrong)
    report = autotune(Model((2,)).eval(), latent(), options=OPTIONS, path=path)
    (group,) = report.groups
    assert group.tuned is not None
    assert group.tuned.candidate.lowering != "gather"
    assert group.tuned.tried[0][0] == "gather()"
    assert any("gather() is refused: relative error 1.0" in note for note in group.tuned.notes)


def test_when_nothing_is_right_nothing_is_saved(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Problem, "error", lambda self, candidate, tensors: 0.5)
    report = autotune(Model((2,)).eval(), latent(), options=OPTIONS, path=path)
    assert report.groups[0].tuned is None
    assert "no kernel is right for grid 4x8x8" in report.groups[0].problem
    assert not path.exists()


def test_a_full_search_is_not_satisfied_with_a_quick_one(path: Path) -> None:
    model, x = Model((2,)).eval(), latent()
    autotune(model, x, options=OPTIONS, path=path)
    assert autotune(model, x, options=OPTIONS, path=path, effort="full").measurements > 0
    assert autotune(model, x, options=OPTIONS, path=path, effort="full").measurements == 0
    assert autotune(model, x, options=OPTIONS, path=path, effort="quick").measurements == 0
    assert {entry["effort"] for entry in read(path).contents.sites.values()} == {"full"}


def compiled_notes(model: nn.Module, x: torch.Tensor, **options: object) -> dict[str, str]:
    torch._dynamo.reset()
    backend = Backend(Settings.from_options(OPTIONS | options))
    with torch.no_grad():
        torch.compile(model, backend=backend)(x)
    assert all(site.rewritten for site in backend.graphs[0].sites)
    return {note.code: note.message for note in backend.graphs[0].notes}


def test_files_that_do_not_fit_are_named_and_ignored(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = Model((2,)).eval()
    autotune(model, latent(), options=OPTIONS, path=path)
    for x, options in ((latent(3, 8, 10), {}), (latent(), {"density": 0.7})):
        notes = compiled_notes(model, x, tuning=str(path), **options)
        assert "tuned" not in notes
        assert f"tuning file {path} holds no entry" in notes["tuning-ignored"]
        assert "grids 4x8x8" in notes["tuning-ignored"]
    assert str(path) in caplog.text
    absent = compiled_notes(model, latent(), tuning=str(path.with_name("absent.json")))
    assert "does not exist" in absent["tuning-ignored"]
    path.write_text(path.read_text()[:100])
    assert "is corrupt" in compiled_notes(model, latent(), tuning=str(path))["tuning-ignored"]


@pytest.mark.parametrize("autotune", [None, "off"])
@pytest.mark.parametrize(("content", "words"), [(None, "does not exist"), ("{", "is corrupt")])
def test_a_file_that_cannot_be_used_is_warned_of_once(
    path: Path, caplog: pytest.LogCaptureFixture, content: str | None, words: str, autotune: str | None
) -> None:
    if content is not None:
        path.write_text(content)
    with caplog.at_level("INFO", "fpscompile"):
        compiled_notes(Model((2, 2)).eval(), latent(), tuning=str(path), autotune=autotune)
    records = [record for record in caplog.records if str(path) in record.getMessage()]
    assert [record.levelname for record in records] == ["WARNING"]
    assert words in records[0].getMessage()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"versions": {"torch": "1.0"}}, "made with torch 1.0; this is "),
        ({"lowering": "nothing", "config": {}}, "there is no such lowering"),
        ({"config": 3}, "not readable"),
        ({"lowering": "triton", "config": {}}, "cannot run here"),
        ({"lowering": "boxes", "config": {"block_m": 3}}, "boxes takes no config"),
        ({"lowering": "gather", "config": {"block_m": 3}}, "gather takes no config"),
    ],
)
def test_entries_that_do_not_fit_are_named_and_ignored(path: Path, change: dict, words: str) -> None:
    model, x = Model((2,)).eval(), latent()
    autotune(model, x, options=OPTIONS, path=path)
    data = json.loads(path.read_text())
    (entry,) = data["sites"].values()
    entry |= change
    if "lowering" in change:
        entry["versions"] = tuner.versions(entry["lowering"])
    path.write_text(json.dumps(data))
    notes = compiled_notes(model, x, tuning=str(path))
    assert "tuned" not in notes
    assert any(words in message for message in notes.values())


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"block_m": 64, "block_n": 512, "compute": "float32", "threads": 1}, None),
        ({"block_m": 64, "block_n": 512, "compute": "float32"}, None),
        ({"block_m": 40, "block_n": 512, "compute": "float32"}, "cannot be rendered"),
        ({"block_m": "64", "block_n": 512, "compute": "float32"}, "block_m='64' is no int"),
        ({"block_m": 64, "block_n": 512, "compute": "float32", "warps": 4}, "has no 'warps'"),
        ({"block_m": 64}, "block_n"),
        ({"block_m": 64, "block_n": 512, "compute": "bfloat16"}, "multiplies in bfloat16, and this machine in float32"),
    ],
)
def test_configs_that_a_file_may_hold(
    config: dict[str, Any], words: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the generated kernel, though the rule without tuning is boxes."""
    monkeypatch.setattr("fpscompile.cpp_build.unavailable", lambda compute="float32": None)
    reason = space.why_not(Candidate("cpp", tuple(sorted(config.items()))), problem(lowering="boxes"))
    assert (reason is None) == (words is None), reason
    assert words is None or words in reason


def test_gpu_configs_that_a_file_may_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fpscompile.gpu.call.target_of", lambda device: "cuda:90")
    given = problem(lowering="triton", quant="fp8", tile=(2, 8, 8), phases=(PhasePlan(density=1.0),))
    given = dataclasses.replace(given, device=torch.device("cuda"), head_dim=64, value_dim=64, weights=())

    def reason(**config: Any) -> str | None:
        return space.why_not(Candidate("triton", tuple(sorted(config.items()))), given)

    assert reason(block_m=128, num_warps=8, num_stages=2) is None
    assert "num_warps=3" in str(reason(block_m=128, num_warps=3, num_stages=2))
    assert "num_stages=2.0 is no int" in str(reason(block_m=128, num_warps=8, num_stages=2.0))
    wrong_phases = Candidate("triton", (), (2, 8, 8), ((1, 1, 1), (1, 1, 1)))
    assert "windows for 2 phases, and the schedule has 1" in str(space.why_not(wrong_phases, given))


def test_mistakes_are_found_before_anything_is_measured(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuner, "measure", lambda *args: pytest.fail("measured"))
    model, x = Model((2,)).eval(), latent()
    with pytest.raises(OptionError, match="effort='hard' is unknown"):
        autotune(model, x, path=path, effort="hard")
    with pytest.raises(OptionError, match="autotune='fast' is unknown"):
        autotune(model, x, path=path, options={"autotune": "fast"})
    with pytest.raises(OptionError, match="tuning=3 must be the path"):
        Settings.from_options({"tuning": 3})
    path.write_text("")
    with pytest.raises(TuningFileError, match="cannot be written"):
        autotune(model, x, path=path / "tuning.json")


def test_what_cannot_be_saved_is_still_used(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A compilation measures, and its result serves the other sites of that compilation."""
    path.mkdir()
    notes = compiled_notes(Model((2, 2)).eval(), latent(), tuning=str(path), autotune="quick")
    assert "tuned" in notes


def test_a_progress_bar_only_where_it_is_asked_for(
    path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TERM", "xterm")
    model, x = Model((2,)).eval(), latent()
    autotune(model, x, options=OPTIONS, path=path)
    assert capsys.readouterr() == ("", "")
    autotune(model, x, options=OPTIONS, path=path, effort="full", progress=True)
    out, err = capsys.readouterr()
    assert out == ""
    assert "tuning" in err


def test_what_the_processor_cannot_multiply_is_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    from fpscompile import cpp_build
    from fpscompile.capture import captured
    from fpscompile.tuning.capture import Collector

    lacks = "the processor lacks avx512f"
    monkeypatch.setattr(cpp_build, "unavailable", lambda compute="float32": None if compute == "float32" else lacks)
    monkeypatch.setattr(cpp_build, "slower_than_boxes", lambda *_: None)
    monkeypatch.setattr(cpp_build, "build_ahead", lambda source: None)
    notes = {}
    for dtype, options in ((torch.float32, {}), (torch.bfloat16, {}), (torch.float32, {"quant": "int8"})):
        key = (dtype, *options.values())
        look = lambda state, key=key: notes.update(  # noqa: E731
            {key: [note.message for note in state.notes if note.code != "window-apart"]}
        )
        settings = Settings.from_options(OPTIONS | {"autotune": "off"} | options)
        captured(Model((2,)).eval().to(dtype), Collector(settings, look))(latent().to(dtype))
    assert list(notes.values()) == [
        [],
        [f"bfloat16 operands are multiplied in float32: {lacks}"],
        [f"lowering 'boxes', without quantization, in place of the faster 'cpp': {lacks}"],
    ]


def test_declined_sites_are_listed(path: Path) -> None:
    class Dropping(Model):
        def forward(self, latent: torch.Tensor) -> torch.Tensor:
            x = self.embed(latent).flatten(2).transpose(1, 2)
            q, k, v = (part.unflatten(-1, (2, 32)).transpose(1, 2) for part in self.blocks[0](x).chunk(3, -1))
            return F.scaled_dot_product_attention(q, k, v, dropout_p=0.5)

    report = autotune(Dropping((2,)).eval(), latent(), options=OPTIONS, path=path)
    assert not report.groups
    assert "dropout" in report.declined[0][1]
    assert "left as it is" in str(report)


def test_a_model_without_3d_attention_is_told(path: Path) -> None:
    report = autotune(nn.Linear(2, 2), torch.ones(1, 2), options=OPTIONS, path=path)
    assert "no 3D attention call was seen: fpscompile.explain says" in str(report)
    assert not path.exists()


# Free tiles


def test_another_tile_keeps_no_less_and_errs_no_more(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever tile wins; here every one but the default is made to be the fastest."""
    monkeypatch.setitem(space.TILES, "quick", ((2, 2, 2), (1, 4, 4), (1, 2, 2), (4, 4, 4), (2, 2, 4)))
    options = OPTIONS | {"tile": "auto", "density": 0.3}
    grid = (8, 16, 16)
    model, x = Structured(grid, (("local",) * 2,) * 2).eval(), torch.randn(1, 4, *grid)
    step = torch.ones(1)
    timed = Problem.timed

    def biased(self: Problem, candidate: Candidate, tensors: object) -> Callable[[], float]:
        once = timed(self, candidate, tensors)  # type: ignore[arg-type]
        return lambda: once() * 0 + (1.0 if candidate.tile is None else 0.1) * random.uniform(1, 1.01)

    monkeypatch.setattr(Problem, "timed", biased)
    report = autotune(model, x, step, options=options, path=path)
    (group,) = report.groups
    assert group.tuned is not None
    winner = group.tuned.candidate
    assert winner.tile is not None, "the default tile is coarse: a finer one errs less"

    backends = {}
    for tuning in (path, path.with_name("none.json")):
        torch._dynamo.reset()
        backend = Backend(Settings.from_options(options | {"tuning": str(tuning)}))
        with torch.no_grad():
            output = torch.compile(model, backend=backend)(x, step)
        backends[tuning] = (backend.graphs[0], (output - model(x, step).detach()).norm())
    (tuned, tuned_error), (default, default_error) = backends.values()
    for ours, theirs in zip(tuned.sites, default.sites, strict=True):
        assert ours.plan is not None
        assert ours.plan.tile == winner.tile
        assert ours.density[0] >= theirs.density[0] - 1e-9
    assert tuned_error <= default_error * 1.05
    assert any("fpscompile.autotune chooses one" in note.message for note in default.notes)


def test_the_sites_that_judge_a_tile_are_spread_over_the_model() -> None:
    from fpscompile.autotune import spread

    names = [f"blocks.{index}" for index in range(30)]
    assert spread(names, 3) == ["blocks.0", "blocks.14", "blocks.29"]
    assert spread(names[:3], 3) == names[:3]


def test_real_calls_are_those_of_the_sites_of_the_signature(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four blocks of two kinds of heads: each kind is judged by its own blocks, and by each once."""
    grid = (8, 16, 16)
    model = Structured(grid, (("local",) * 2, ("local",) * 3, ("global",) * 2, ("global",) * 3)).eval()
    seen: list[Problem] = []
    monkeypatch.setattr(tuner.Tuner, "tune", lambda self, problem, default: seen.append(problem))
    autotune(model, torch.randn(1, 4, *grid), torch.ones(1), options=OPTIONS | {"tile": "auto"}, path=path)
    assert [given.heads for given in seen] == [2, 3]
    for given in seen:
        queries = [reference[0] for reference in given.references]
        assert [q.shape[1] for q in queries if q is not None] == [given.heads] * 2
        assert not torch.equal(*queries)  # type: ignore[arg-type]


def test_smallest_window_is_the_sparsest_that_keeps_enough() -> None:
    from fpscompile.masks import window_density

    layout = problem().resolved.q_layout
    windows = list(itertools.product(*(range(1, count + 1) for count in layout.counts)))
    for wanted in (0.05, 0.3, 0.61, 1.0):
        window = space.smallest_window(layout, layout, wanted)
        every = [window_density(layout, layout, other) for other in windows]
        assert window_density(layout, layout, window) == min(value for value in every if value >= wanted - 1e-12)


def test_a_fixed_tile_stays(path: Path) -> None:
    report = autotune(Model((2,)).eval(), latent(), options=OPTIONS, path=path)
    assert all("tile=" not in name for group in report.groups if group.tuned for name, _ in group.tuned.tried)


def test_gpu_configs_are_pruned_by_the_cost_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """The best by prediction stay; what must not be used goes."""
    from fpscompile.gpu import cost_model
    from fpscompile.gpu.config import KernelConfig, why_invalid

    given = problem(quant="fp8", tile=(2, 8, 8), phases=(PhasePlan(density=1.0),))
    given = dataclasses.replace(given, device=torch.device("cuda"), head_dim=64, value_dim=64, weights=())
    seen = []

    def rank(spec: Any, configs: Any) -> list[Any]:
        seen.append((spec, list(configs)))
        slowest_first = list(configs)[::-1]
        return [SimpleNamespace(config=c, prediction=None if c.num_stages == 2 else 1.0) for c in slowest_first]

    monkeypatch.setattr(cost_model, "rank", rank)
    monkeypatch.setattr("fpscompile.gpu.call.target_of", lambda device: "cuda:90")
    found = space.triton_configs(given, "quick")
    ((spec, configs),) = seen
    assert spec.target == "cuda:90"
    assert found[0] == Candidate("triton"), "the lowering's own rule"
    chosen = [candidate.plan(given.resolved.plan).config_as(KernelConfig) for candidate in found[1:]]
    expected = [config for config in configs[::-1] if config.num_stages != 2]
    assert chosen == expected[: space.PRUNED["quick"]]
    assert all(config is not None and why_invalid(config, spec) is None for config in chosen)

    def unknown(spec: Any, configs: Any) -> None:
        raise UnsupportedError("the cost model knows sm_90 only")

    monkeypatch.setattr(cost_model, "rank", unknown)
    assert len(space.triton_configs(given, "quick")) == 1 + min(space.PRUNED["quick"], len(configs))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["autotune_cpu", "calibrate_cpu"])
def test_benchmarks_run(name: str, tmp_path: Path) -> None:
    script = Path(__file__).resolve().parents[1] / "benchmarks" / f"{name}.py"
    result = tmp_path / "result.json"
    command = [sys.executable, str(script), "--quick", "--json", str(result)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    report = json.loads(result.read_text())
    assert report["benchmark"] == name
    assert len(report["rows"]) == 1
