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


def test_help_lists_the_command(run) -> None:  # type: ignore[no-untyped-def]
    assert "explain" in run("--help").output
    assert "MODULE:FACTORY" in run("explain", "--help").output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["factories"], "'factories' must be MODULE:FACTORY"),
        (["nowhere_at_all:f"], "no module named 'nowhere_at_all'"),
        (["nowhere.at.all:f"], "no module named 'nowhere'"),
        (["imports_nothing:f"], "no module named 'surely_not_a_module', imported by imports_nothing"),
        (["factories:absent"], "module 'factories' has no 'absent'"),
        (["factories:number"], "factories:number is a int, not a callable"),
        (["factories:list_instead"], "returned list; it must return (model, args, kwargs) or (model, kwargs)"),
        (["factories:no_model"], "returned (int, dict); it must return"),
        (["factories:with_kwargs", "--dtype", "float7"], "--dtype 'float7' is unknown; choose one of float32"),
        (["factories:with_kwargs", "--option", "tile"], "--option 'tile' must be KEY=VALUE"),
        (["factories:with_kwargs", "--option", "tile=(4,"], "'(4,' is neither a word nor a Python literal"),
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
    [("0.25", 0.25), ("(4,8,8)", (4, 8, 8)), ("paper", "paper"), ("'paper'", "paper"), ("None", None), ("True", True)],
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
