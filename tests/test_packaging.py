"""The package as users get it: entry point, wheel, sdist, editable install, licence, types, guards."""

from __future__ import annotations

import importlib.metadata
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest
import torch

import fpscompile

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def run(*args: str | Path, cwd: Path) -> str:
    """Standard output of a command that must succeed."""
    done = subprocess.run([str(arg) for arg in args], cwd=cwd, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, f"{args}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def installed() -> bool:
    try:
        importlib.metadata.distribution("fpscompile")
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


needs_install = pytest.mark.skipif(not installed(), reason="fpscompile is not installed in this environment")

USE_WITHOUT_IMPORT = """
import sys, torch
class Block(torch.nn.Module):
    def forward(self, x):
        t = x.flatten(2).transpose(1, 2)
        q = t.unflatten(2, (2, 16)).transpose(1, 2)
        return torch.nn.functional.scaled_dot_product_attention(q, q, q)
options = {"inner": "eager", "window": (1, 1, 1), "tile": (2, 2, 2), "strict": True}
assert "fpscompile" not in sys.modules, "imported too early"
compiled = torch.compile(Block(), backend="fps", options=options)
x = torch.randn(1, 32, 4, 4, 4)
with torch.no_grad():
    assert not torch.allclose(compiled(x), Block()(x)), "the sparse window changed nothing: was it applied?"
assert "fpscompile" in sys.modules
import fpscompile.passes, fpscompile.templates
copies = [n for n in sys.modules if n.split(".")[0] in ("passes", "templates")]
assert not copies, f"a second copy: {copies}"
print("ok", fpscompile.__file__)
"""


@needs_install
def test_backend_is_listed() -> None:
    assert "fps" in torch.compiler.list_backends()


@needs_install
def test_backend_works_by_name_without_an_import(tmp_path: Path) -> None:
    """``backend="fps"`` is all a user types; sites are rewritten (``strict``) and no module is imported twice."""
    assert run(sys.executable, "-c", USE_WITHOUT_IMPORT, cwd=tmp_path).startswith("ok")


def test_entry_points_name_what_exists() -> None:
    for group in PROJECT["project"]["entry-points"].values():
        for target in group.values():
            assert callable(importlib.metadata.EntryPoint("x", target, "y").load())
    pytest.importorskip("typer")
    for target in PROJECT["project"]["scripts"].values():
        assert callable(importlib.metadata.EntryPoint("x", target, "y").load())


@pytest.mark.parametrize("name", ["passes", "templates"])
def test_bare_name_is_refused(name: str) -> None:
    """A second copy of the modules would have its own classes and registries."""
    done = subprocess.run([sys.executable, "-c", f"import {name}"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode != 0
    assert "ImportError" in done.stderr
    assert f"fpscompile.{name}" in done.stderr


@pytest.mark.parametrize("name", ["passes", "templates"])
def test_links_lead_to_the_top_level(name: str) -> None:
    link = ROOT / "fpscompile" / name
    assert link.is_symlink()
    assert link.resolve() == ROOT / name


def test_licence_and_type_marker() -> None:
    text = (ROOT / "LICENSE").read_text()
    assert "Apache License" in text
    assert "Version 2.0, January 2004" in text
    assert PROJECT["project"]["license"] == "Apache-2.0"
    assert (ROOT / "fpscompile" / "py.typed").exists()


def test_versions_agree() -> None:
    assert fpscompile.__version__ == PROJECT["project"]["version"]


def test_every_dependency_is_pinned() -> None:
    """Each requirement we name has an exact tested version in constraints.txt."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pinned = {line.split("==")[0].lower() for line in lines if line and not line.startswith("#")}
    groups = [PROJECT["project"]["dependencies"], *PROJECT["project"]["optional-dependencies"].values()]
    named = {re.split(r"[\[<>=~! ]", requirement, maxsplit=1)[0].lower() for group in groups for requirement in group}
    assert named - {"fpscompile"} <= pinned


# --- what gets built ---------------------------------------------------------------------------------------------


def data_files() -> set[str]:
    """Every file that an installed package must hold, as a path inside it."""
    kinds = {".py", ".jinja", ".html", ".css", ".js", ".json", ".cpp", ".h"}
    return {
        path.relative_to(ROOT).as_posix()
        for top in ("fpscompile", "fpscompile/passes", "fpscompile/templates")
        for path in (ROOT / top).rglob("*")
        if path.is_file() and (path.suffix in kinds or path.name == "py.typed") and "__pycache__" not in path.parts
    }


def copy_checkout(to: Path) -> Path:
    """A copy of the working tree, so that a build's by-products never land in it; links stay links."""
    skip = shutil.ignore_patterns(".git", ".venv*", "out", "build", "dist", "*.egg-info", "__pycache__", ".*_cache")
    return Path(shutil.copytree(ROOT, to, symlinks=True, ignore=skip))


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the sdist, and the wheel that is built from it: what a package index would serve."""
    pytest.importorskip("build")
    out = tmp_path_factory.mktemp("dist")
    source = copy_checkout(tmp_path_factory.mktemp("source") / "fpscompile")
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", out, source, cwd=out)
    return out


@pytest.mark.slow
def test_wheel_holds_everything_once(dist: Path) -> None:
    (wheel,) = dist.glob("*.whl")
    names = [name for name in zipfile.ZipFile(wheel).namelist() if not name.endswith("/")]
    inside = {name for name in names if ".dist-info/" not in name}
    assert data_files() <= inside, f"missing from the wheel: {sorted(data_files() - inside)}"
    assert not {name for name in inside if not name.startswith("fpscompile/")}, "something outside the package"
    assert any(name.endswith("/LICENSE") for name in names)
    assert len(names) == len(set(names))


@pytest.mark.slow
def test_sdist_holds_the_sources(dist: Path) -> None:
    (archive,) = dist.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        files = {member.name.split("/", 1)[1] for member in tar if member.isfile()}
    assert data_files() <= files
    assert {"LICENSE", "README.md", "pyproject.toml"} <= files


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["wheel", "editable"])
def test_install_works(dist: Path, tmp_path: Path, kind: str) -> None:
    """In a new environment that borrows only the dependencies, the installed package compiles a model by name."""
    env = tmp_path / "env"
    venv.create(env, with_pip=True)
    python = env / "bin" / "python"
    site = run(python, "-c", "import sysconfig; print(sysconfig.get_paths()['purelib'])", cwd=tmp_path).strip()
    mine = tmp_path / "dependencies"
    mine.mkdir()
    for entry in Path(torch.__file__).parent.parent.iterdir():  # every installed package but ours
        if "fpscompile" not in entry.name and entry.suffix != ".pth":
            (mine / entry.name).symlink_to(entry)
    Path(site, "dependencies.pth").write_text(f"import sys; sys.path.insert(0, {str(mine)!r})\n")
    if kind == "wheel":
        (wheel,) = dist.glob("*.whl")
        run(python, "-m", "pip", "install", "--no-deps", wheel, cwd=tmp_path)
    else:
        copy = copy_checkout(tmp_path / "checkout")
        run(python, "-m", "pip", "install", "--no-deps", "--no-build-isolation", "-e", copy, cwd=tmp_path)
    said = run(python, "-c", USE_WITHOUT_IMPORT, cwd=tmp_path)
    assert said.startswith(f"ok {site if kind == 'wheel' else tmp_path / 'checkout'}")
