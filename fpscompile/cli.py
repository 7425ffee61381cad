"""The command line. Needs the extra ``cli``; it only parses, calls the library and shows what came back."""

from __future__ import annotations

import ast
import importlib
import importlib.metadata
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, NoReturn

try:
    import typer
except ImportError as error:
    raise ImportError(
        'the fpscompile command line needs typer, which is not installed: pip install "fpscompile[cli]"'
    ) from error

import torch
from rich.console import Console

from fpscompile.errors import FpsError
from fpscompile.report import write_atomically

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)


class UsageError(Exception):
    """Something on the command line is wrong; the message says what, and what would be right."""


def main() -> None:
    """Entry point of the ``fpscompile`` command."""
    app()


def _version(asked: bool) -> None:
    if asked:
        try:
            version = importlib.metadata.version("fpscompile")
        except importlib.metadata.PackageNotFoundError:
            version = "(not installed)"
        typer.echo(f"fpscompile {version}, torch {torch.__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the versions and exit.")
    ] = False,
) -> None:
    """Block-sparse 3D attention for video diffusion transformers, as a torch.compile backend."""


@app.command()
def explain(
    factory: Annotated[
        str,
        typer.Argument(
            metavar="MODULE:FACTORY",
            help="A callable that returns (model, args, kwargs) or (model, kwargs) of one call.",
        ),
    ],
    option: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY=VALUE", help="An option of the backend; VALUE is a Python literal. Repeatable."),
    ] = None,
    html: Annotated[Path | None, typer.Option(help="Write the report as one self-contained page.")] = None,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write the report as JSON.")] = None,
    dtype: Annotated[
        str | None, typer.Option(help=f"Cast the model and its floating-point inputs: {', '.join(DTYPES)}.")
    ] = None,
    strict: Annotated[
        bool,
        typer.Option("--strict", help="Exit with 1 when a 3D attention call is not rewritten, or anything is assumed."),
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of any error.")] = False,
) -> None:
    """Show which attention calls of a model are rewritten, which are not and why."""
    try:
        options = _options(option or [])
        model, args, kwargs = _call(_factory(factory), factory)
        if dtype is not None:
            model, args, kwargs = _cast(dtype, model, args, kwargs)
        # Imported here: the backend takes a while to import, and --help should not.
        from fpscompile.explain import explain as run

        report = run(model, *args, options=options, **kwargs)
        Console().print(report)
        if json_path is not None:
            write_atomically(json_path, json.dumps(report.to_dict(), indent=1))
        if html is not None:
            report.save_html(html)
        failures = report.strict_failures if strict else []
    except Exception as error:
        if debug:
            raise
        _fail(error)
    for failure in failures:
        typer.echo(f"strict: {failure}", err=True)
    if failures:
        raise typer.Exit(1)


def _fail(error: Exception) -> NoReturn:
    """One line on stderr. Exit code 2 for what the user can mend, 1 for everything else."""
    known = _mendable(error)
    if known is not None:
        typer.echo(f"error: {' '.join(str(known).split())}", err=True)
        raise typer.Exit(2) from None
    text = " ".join(str(error).split())
    text = text if len(text) <= 300 else text[:300] + " …"
    typer.echo(f"error: {type(error).__name__}: {text} (--debug shows the traceback)", err=True)
    raise typer.Exit(1) from None


def _mendable(error: BaseException | None) -> BaseException | None:
    """The error made on purpose inside ``error``: compilers wrap what a backend raises."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        if isinstance(error, (FpsError, UsageError, OSError)):
            return error
        seen.add(id(error))
        error = getattr(error, "inner_exception", None) or error.__cause__
    return None


def _options(pairs: Sequence[str]) -> dict[str, Any]:
    """Options from "KEY=VALUE" texts; a bare word is text."""
    options: dict[str, Any] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or not key:
            raise UsageError(f"--option {pair!r} must be KEY=VALUE, for instance tile=(4,8,8) or schedule=paper")
        if key in options:
            raise UsageError(f"--option {key} is given twice")
        try:
            options[key] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            if not value.replace("_", "").isalnum():
                raise UsageError(
                    f"--option {key}: {value!r} is neither a word nor a Python literal, such as 0.25 or (4,8,8)"
                ) from None
            options[key] = value
    return options


def _factory(name: str) -> Callable[[], Any]:
    """The callable that ``name`` points to; modules of the working directory count."""
    module_name, colon, attribute = name.partition(":")
    if not colon or not module_name or not attribute:
        raise UsageError(f"{name!r} must be MODULE:FACTORY, for instance my_models:wan_480p")
    folder = str(Path.cwd())
    if folder not in sys.path:
        sys.path.insert(0, folder)
    try:
        target: Any = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        missing = error.name or module_name
        inside = (
            "" if module_name == missing or module_name.startswith(f"{missing}.") else f", imported by {module_name}"
        )
        raise UsageError(f"no module named {missing!r}{inside}: run from its folder, or set PYTHONPATH") from error
    for part in attribute.split("."):
        if not hasattr(target, part):
            raise UsageError(f"module {module_name!r} has no {attribute!r}")
        target = getattr(target, part)
    if not callable(target):
        raise UsageError(f"{name} is a {type(target).__name__}, not a callable that makes a model and its inputs")
    return target


def _call(factory: Callable[[], Any], name: str) -> tuple[torch.nn.Module, tuple[Any, ...], dict[str, Any]]:
    """(model, args, kwargs) from what the factory returns."""
    made = factory()
    if isinstance(made, tuple) and isinstance(made[0] if made else None, torch.nn.Module):
        if len(made) == 2 and isinstance(made[1], Mapping):
            return made[0], (), dict(made[1])
        if len(made) == 3 and isinstance(made[1], (tuple, list)) and isinstance(made[2], Mapping):
            return made[0], tuple(made[1]), dict(made[2])
    shape = f"({', '.join(type(item).__name__ for item in made)})" if isinstance(made, tuple) else type(made).__name__
    raise UsageError(f"{name} returned {shape}; it must return (model, args, kwargs) or (model, kwargs)")


def _cast(
    name: str, model: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[torch.nn.Module, tuple[Any, ...], dict[str, Any]]:
    if name not in DTYPES:
        raise UsageError(f"--dtype {name!r} is unknown; choose one of {', '.join(DTYPES)}")
    dtype = DTYPES[name]

    def cast(value: Any) -> Any:
        floating = isinstance(value, torch.Tensor) and value.is_floating_point()
        return value.to(dtype) if floating else value

    leaves = torch.utils._pytree.tree_map(cast, (args, kwargs))
    return model.to(dtype), leaves[0], leaves[1]


if __name__ == "__main__":
    main()
