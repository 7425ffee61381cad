"""The command line: what it shows, what it writes, and how it refuses."""

from __future__ import annotations

import importlib
import json
import re
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from fpscompile import cli
from fpscompile.errors import StrictError

FACTORIES = '''
import torch
from torch import nn
import torch.nn.functional as F


class Tiny(nn.Module):
    """A video transformer of one block: patches of a 5-D latent, full attention over (t, h, w)."""

    def __init__(self, dropout=0.0):
        super().__init__()
        self.embed = nn.Conv3d(4, 16, (1, 2, 2), (1, 2, 2))
        self.qkv = nn.ModuleList(nn.Linear(16, 16) for _ in range(3))
        self.dropout = dropout

    def forward(self, latent, timestep):
        x = self.embed(latent).flatten(2).transpose(1, 2)
        q, k, v = (layer(x).unflatten(-1, (2, 8)).transpose(1, 2) for layer in self.qkv)
        attended = F.scaled_dot_product_attention(q, k, v, dropout_p=self.dropout)
        return x + attended.transpose(1, 2).flatten(2)


def inputs():
    return torch.randn(1, 4, 4, 32, 32), torch.tensor([500])


def with_kwargs():
    latent, timestep = inputs()
    return Tiny().eval(), {"latent": latent, "timestep": timestep}


def with_args():
    latent, timestep = inputs()
    return Tiny().eval(), (latent,), {"timestep": timestep}


def with_dropout():
    return Tiny(dropout=0.5).eval(), inputs(), {}


class Nested:
    make = staticmethod(with_kwargs)


def with_samples():
    return Tiny().eval(), [dict(zip(("latent", "timestep"), inputs())) for _ in range(4)]


def list_instead():
    return [1, 2]


def no_model():
    return 1, {}


def broken():
    raise RuntimeError("the factory\\nis broken")


number = 3
'''


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):  # type: ignore[no-untyped-def]
    """Runs the command in a folder that holds ``factories.py``."""
    (tmp_path / "factories.py").write_text(FACTORIES)
    (tmp_path / "imports_nothing.py").write_text("import surely_not_a_module")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    for name in ("factories", "imports_nothing"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setenv("COLUMNS", "140")
    importlib.invalidate_caches()
    yield lambda *arguments: CliRunner().invoke(cli.app, list(arguments))
    for name in ("factories", "imports_nothing"):
        sys.modules.pop(name, None)


def test_version(run) -> None:  # type: ignore[no-untyped-def]
    result = run("--version")
    assert result.exit_code == 0
    assert re.fullmatch(r"fpscompile \S.*, torch \S+", result.output.strip())


def test_help_lists_the_commands(run) -> None:  # type: ignore[no-untyped-def]
    for command in ("tune", "calibrate", "explain", "bench", "doctor"):
        assert command in run("--help").output
        assert run(command, "--help").exit_code == 0
    assert "MODULE:FACTORY" in run("explain", "--help").output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["factories"], "'factories' must be MODULE:FACTORY"),
        (["nowhere_at_all:f"], "no module named 'nowhere_at_all'"),
        (["nowhere.at.all:f"], "no module named 'nowhere'"),
        (["./folder/my_models.py:f"], "'./folder/my_models.py' is a file: name the module, my_models, and run from"),
        (["imports_nothing:f"], "no module named 'surely_not_a_module', imported by imports_nothing"),
        (["factories:absent"], "module 'factories' has no 'absent'"),
        (["factories:number"], "factories:number is a int, not a callable"),
        (["factories:list_instead"], "returned list; it must return (model, args, kwargs) or (model, kwargs)"),
        (["factories:no_model"], "returned (int, dict); it must return"),
        (["factories:with_kwargs", "--dtype", "float7"], "--dtype 'float7' is unknown; choose one of float32"),
        (["factories:with_kwargs", "--option", "tile"], "--option 'tile' must be KEY=VALUE"),
        (["factories:with_kwargs", "--option", "tile=(4,"], "'(4,' is no whole Python literal"),
        (["factories:with_kwargs", "--option", "tile=1", "--option", "tile=2"], "--option tile is given twice"),
        (["factories:with_kwargs", "--option", "windw=(1,1,1)"], "did you mean 'window'?"),
        (["factories:with_kwargs", "--option", "tile=(0,1,1)"], "tile=(0, 1, 1) must be three integers >= 1"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(run, arguments: list[str], message: str) -> None:  # type: ignore[no-untyped-def]
    result = run("explain", *arguments)
    assert result.exit_code == 2, result.output
    assert message in result.stderr
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    assert result.stdout == ""


def test_bugs_are_one_line_without_debug_and_raised_with_it(run) -> None:  # type: ignore[no-untyped-def]
    result = run("explain", "factories:broken")
    assert result.exit_code == 1
    assert result.stderr == "error: RuntimeError: the factory is broken (--debug shows the traceback)\n"
    result = run("explain", "factories:broken", "--debug")
    assert isinstance(result.exception, RuntimeError)


def test_our_errors_are_found_inside_a_compilers() -> None:
    ours = StrictError("two calls left")
    compilers = RuntimeError("backend raised")
    compilers.inner_exception = ours  # type: ignore[attr-defined]
    assert cli._mendable(compilers) is ours
    chained = RuntimeError("outer")
    chained.__cause__ = compilers
    assert cli._mendable(chained) is ours
    assert cli._mendable(RuntimeError("other")) is None


@pytest.mark.parametrize(
    ("text", "value"),
    [("0.25", 0.25), ("(4,8,8)", (4, 8, 8)), ("paper", "paper"), ("'paper'", "paper"), ("None", None), ("True", True)]
    + [(text, text) for text in ("wan.json", "/tmp/a b/wan-2.json", "~/wan.json", "0.2x")],
)
def test_option_values_are_literals(text: str, value: object) -> None:
    assert cli._options([f"key={text}"]) == {"key": value}
    assert cli._options(["timestep={'input': 't=0'}"]) == {"timestep": {"input": "t=0"}}


def test_cast_leaves_integers_alone() -> None:
    model, inputs = torch.nn.Linear(2, 2), {"x": [torch.ones(2)], "step": torch.tensor([1]), "n": 3}
    model, args, kwargs = cli._cast("bfloat16", model, (torch.ones(1),), inputs)
    assert model.weight.dtype == args[0].dtype == kwargs["x"][0].dtype == torch.bfloat16
    assert kwargs["step"].dtype == torch.int64
    assert kwargs["n"] == 3


def test_missing_typer_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "typer", None)
    monkeypatch.delitem(sys.modules, "fpscompile.cli")
    with pytest.raises(ImportError, match=re.escape('pip install "fpscompile[cli]"')):
        importlib.import_module("fpscompile.cli")


@pytest.mark.parametrize("factory", ["with_kwargs", "with_args", "Nested.make"])
def test_explain_shows_the_sites_and_writes_files(run, tmp_path: Path, factory: str) -> None:  # type: ignore[no-untyped-def]
    html, data = tmp_path / "out" / "page.html", tmp_path / "out" / "report.json"
    options = ("--option", "window=(1,1,1)", "--option", "tile=(2,8,8)", "--option", "quant=none")
    result = run("explain", f"factories:{factory}", *options, "--html", str(html), "--json", str(data), "--strict")
    assert result.exit_code == 0, result.output
    assert "1 of 1 attention call rewritten" in result.stdout
    assert "4x16x16" in result.stdout
    record = json.loads(data.read_text())["sites"][0]
    assert record["kind"] == "3d"
    assert record["grid"] == [4, 16, 16]
    assert record["density"] == [0.125]
    assert "Grid 4×16×16" in html.read_text(encoding="utf-8")


def test_explain_casts(run, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    data = tmp_path / "report.json"
    result = run("explain", "factories:with_kwargs", "--dtype", "bfloat16", "--json", str(data))
    assert result.exit_code == 0, result.output
    assert json.loads(data.read_text())["sites"][0]["dtype"] == "bfloat16"


def test_strict_fails_after_showing_the_report(run) -> None:  # type: ignore[no-untyped-def]
    relaxed = run("explain", "factories:with_dropout")
    assert relaxed.exit_code == 0, relaxed.output
    assert "dropout" in relaxed.stdout
    strict = run("explain", "factories:with_dropout", "--strict")
    assert strict.exit_code == 1
    assert "None of 1 attention call was rewritten" in strict.stdout
    assert strict.stderr.startswith("strict: ")
    assert "dropout" in strict.stderr


SMALL = ("--option", "window=(1,1,1)", "--option", "tile=(2,8,8)", "--option", "quant=none", "--option", "inner=eager")


def test_tune_measures_once_and_keeps_the_result(run, tmp_path: Path, cold_caches: Path) -> None:  # type: ignore[no-untyped-def]
    file, data = tmp_path / "tuned.json", tmp_path / "result.json"
    result = run("tune", "factories:with_kwargs", *SMALL, "--file", str(file), "--json", str(data))
    assert result.exit_code == 0, result.output
    assert "4x16x16" in result.stdout
    first = json.loads(data.read_text())
    assert first["measurements"] > 0
    assert len(json.loads(file.read_text())["sites"]) == 1
    assert run("tune", "factories:with_args", *SMALL, "--file", str(file), "--json", str(data)).exit_code == 0
    again = json.loads(data.read_text())
    assert again["measurements"] == 0
    assert again["groups"][0]["result"]["lowering"] == first["groups"][0]["result"]["lowering"]


def test_tune_that_is_interrupted_says_what_is_kept(run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    from fpscompile.tuning import tuner

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(tuner, "measure", interrupt)
    result = run("tune", "factories:with_kwargs", *SMALL, "--file", str(tmp_path / "tuned.json"))
    assert result.exit_code == 130
    assert result.stderr == "interrupted: what was measured so far is kept\n"


def test_calibrate_saves_and_says_how_to_use_it(run, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    file, data = tmp_path / "tuned.json", tmp_path / "result.json"
    options = (
        "--option", "tile=(2,8,8)", "--max-error", "0.5", "--file", str(file), "--json", str(data), "--window", "topk"
    )  # fmt: skip
    result = run("calibrate", "factories:with_samples", *options)
    assert result.exit_code == 0, result.output
    assert f"options={{'tuning': '{file}'}}" in result.stdout.replace("\n", "")
    entry = json.loads(data.read_text())
    assert (entry["samples"], entry["held_out"]) == (2, 2)
    assert next(iter(json.loads(file.read_text())["calibrations"].values()))["options"] == entry["options"]
    explained = tmp_path / "report.json"
    assert run("explain", "factories:with_kwargs", "--option", f"tuning={str(file)!r}", "--json", str(explained))
    notes = {note["code"] for note in json.loads(explained.read_text())["notes"]}
    assert "calibrated" in notes


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["tune", "factories:with_kwargs", "--effort", "hard"], "effort='hard' is unknown"),
        (["tune", "factories:with_kwargs", "--file", "factories.py/x.json"], "cannot be written"),
        (["calibrate", "factories:with_kwargs"], "returned (Tiny, dict); it must return (model or pipeline, list"),
        (["calibrate", "factories:with_samples"], "calibrate needs max_error=, target_density= or both"),
        (["calibrate", "factories:with_samples", "--max-error", "1", "--window", "round"], "'round'"),
        (["bench", "factories:with_kwargs", "--rounds", "1"], "rounds=1 must be at least 3"),
        (["bench", "factories:with_kwargs", "--option", "inner=nothing"], "inner='nothing' is no registered backend"),
    ],
)
def test_mistakes_of_the_other_commands(run, arguments: list[str], message: str) -> None:  # type: ignore[no-untyped-def]
    result = run(*arguments)
    assert result.exit_code == 2, result.output
    assert message in result.stderr
    assert result.stderr.count("\n") == 1


def test_bench_compares_with_the_inner_compiler(run, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    data = tmp_path / "bench.json"
    result = run("bench", "factories:with_kwargs", *SMALL, "--rounds", "3", "--json", str(data))
    assert result.exit_code == 0, result.output
    assert "1 of 1 attention call rewritten" in result.stdout
    found = json.loads(data.read_text())
    assert (found["peer"], found["rounds"], found["rewritten"]) == ("eager", 3, 1)
    assert 0 < found["difference"] < 1
    assert found["speedup"] == pytest.approx(found["peer_seconds"] / found["seconds"])


def findings(run, tmp_path: Path, *arguments: str) -> dict[str, dict[str, str]]:  # type: ignore[no-untyped-def]
    data = tmp_path / "doctor.json"
    result = run("doctor", *arguments, "--json", str(data))
    found = {item["subject"]: item for item in json.loads(data.read_text())}
    assert result.exit_code == int(any(item["level"] == "error" for item in found.values())), result.output
    for item in found.values():
        assert item["text"] in result.stdout.replace("\n", "")
        assert item["remedy"] in result.stdout.replace("\n", "")
    return found


def test_doctor_says_what_this_machine_uses(run, tmp_path: Path, cold_caches: Path) -> None:  # type: ignore[no-untyped-def]
    from fpscompile import cpp_build
    from fpscompile.lowerings import cpp
    from fpscompile.plan import PhasePlan, Plan

    found = findings(run, tmp_path)
    assert torch.__version__ in found["versions"]["text"]
    runs = cpp.why_not(torch.float32, 64, 64, Plan((4, 8, 8), (PhasePlan(density=1.0),))) is None
    runs &= cpp_build.slower_than_boxes() is None
    assert ("'cpp'" in found["float32 on CPU"]["text"]) == runs
    assert ("boxes" in found["float32 on CPU"]["text"]) != runs
    assert str(cold_caches / "fps") in found["cache folder"]["text"]
    assert "fpscompile tune" in found["tuning file"]["remedy"]


def test_doctor_says_what_is_missing(run, tmp_path: Path, cold_caches: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    from fpscompile import cpp_build
    from fpscompile.errors import CompilerMissingError

    def no_compiler() -> None:
        raise CompilerMissingError("none")

    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FPS_CACHE_DIR", str(tmp_path / "file" / "cache"))
    monkeypatch.setenv("FPS_DISABLE", "1")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(cpp_build, "compiler", no_compiler)
    monkeypatch.setattr(cpp_build, "unavailable", lambda compute="float32": "no compiler")
    monkeypatch.setattr(torch.backends.mkldnn, "enabled", False, raising=False)
    found = findings(run, tmp_path)
    assert found["cache folder"]["level"] == "error"
    assert "FPS_CACHE_DIR" in found["cache folder"]["remedy"]
    assert "g++" in found["C++ compiler"]["remedy"]
    assert found["float32 on CPU"]["text"] == "lowering boxes: no compiler"
    assert found["FPS_DISABLE"]["level"] == found["TRITON_INTERPRET"]["level"] == "warning"


def test_doctor_says_in_words_what_the_processor_cannot_do(  # type: ignore[no-untyped-def]
    run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A processor with AVX2 alone: dense attention of boxes, and the generated kernel for what boxes cannot."""
    from fpscompile import cpp_build

    lacks = "the processor lacks avx512f"
    monkeypatch.setattr(cpp_build, "unavailable", lambda compute="float32": None if compute == "float32" else lacks)
    monkeypatch.setattr(cpp_build, "slower_than_boxes", lambda *_: lacks)
    found = findings(run, tmp_path)
    words = "the generated C++ kernel (lowering 'cpp')"
    assert found["float32 on CPU"]["text"] == found["bfloat16 on CPU"]["text"] == f"lowering boxes: {lacks}"
    assert found["fp8 on CPU"]["text"] == words
    assert found["int8 on CPU"]["text"] == f"lowering boxes, without quantization: {lacks}"
    monkeypatch.setattr(cpp_build, "slower_than_boxes", lambda *_: None)
    found = findings(run, tmp_path)
    assert found["float32 on CPU"]["text"] == words
    assert found["bfloat16 on CPU"]["text"] == f"{words}; it multiplies in float32, since {lacks}"


def test_doctor_builds_and_checks_a_kernel(run, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    found = findings(run, tmp_path, "--build")
    if "'cpp'" in found["float32 on CPU"]["text"]:
        assert "relative error" in found["trial, float32"]["text"]
