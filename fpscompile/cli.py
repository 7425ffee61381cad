"""The command line. Needs the extra ``cli``; it only parses, calls the library and shows what came back."""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import importlib
import importlib.metadata
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
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
from fpscompile.files import write_atomically

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


Factory = Annotated[
    str,
    typer.Argument(
        metavar="MODULE:FACTORY", help="A callable that returns (model, args, kwargs) or (model, kwargs) of one call."
    ),
]
Options = Annotated[
    list[str] | None,
    typer.Option(
        "--option",
        metavar="KEY=VALUE",
        help="An option of the backend; VALUE is a Python literal or a text. Repeatable.",
    ),
]
Dtype = Annotated[str | None, typer.Option(help=f"Cast the model and its floating-point inputs: {', '.join(DTYPES)}.")]
Json = Annotated[Path | None, typer.Option("--json", help="Write the result as JSON.")]
File = Annotated[
    Path | None,
    typer.Option(
        "--file", help="The tuning file to save in; default: --option tuning=..., or the one in the cache folder."
    ),
]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of any error.")]


@app.command()
def explain(
    factory: Factory,
    option: Options = None,
    html: Annotated[Path | None, typer.Option(help="Write the report as one self-contained page.")] = None,
    json_path: Json = None,
    dtype: Dtype = None,
    strict: Annotated[
        bool,
        typer.Option("--strict", help="Exit with 1 when a 3D attention call is not rewritten, or anything is assumed."),
    ] = False,
    debug: Debug = False,
) -> None:
    """Show which attention calls of a model are rewritten, which are not and why."""
    with _errors(debug):
        model, args, kwargs = _model(factory, dtype)
        # Imported here: the backend takes a while to import, and --help should not.
        from fpscompile.explain import explain as run

        report = run(model, *args, options=_options(option or []), **kwargs)
        Console().print(report)
        if json_path is not None:
            write_atomically(json_path, json.dumps(report.to_dict(), indent=1))
        if html is not None:
            report.save_html(html)
        failures = report.strict_failures if strict else []
    for failure in failures:
        typer.echo(f"strict: {failure}", err=True)
    if failures:
        raise typer.Exit(1)


@app.command()
def tune(
    factory: Factory,
    option: Options = None,
    effort: Annotated[str, typer.Option(help="quick (seconds for each kind of site) or full (minutes).")] = "quick",
    file: File = None,
    json_path: Json = None,
    dtype: Dtype = None,
    debug: Debug = False,
) -> None:
    """Measure which kernels are the fastest for a model on this machine, and keep them."""
    with _errors(debug, interrupted="what was measured so far is kept"):
        model, args, kwargs = _model(factory, dtype)
        from fpscompile.autotune import autotune

        report = autotune(model, *args, effort=effort, options=_options(option or []), path=file, **kwargs)
        _show(report, json_path)
        if report.unsaved:
            raise UsageError(report.unsaved)


@app.command()
def calibrate(
    factory: Annotated[
        str,
        typer.Argument(
            metavar="MODULE:FACTORY",
            help="A callable that returns (model or pipeline, samples): a list of calls, each keyword arguments.",
        ),
    ],
    max_error: Annotated[float | None, typer.Option(help="Largest relative error of any site's output.")] = None,
    target_density: Annotated[float | None, typer.Option(help="Kept fraction of the attention, whole model.")] = None,
    held_out: Annotated[float, typer.Option(help="Share of the samples that only check the choice.")] = 0.5,
    window: Annotated[
        list[str] | None, typer.Option(help="A further candidate, as options spell it; topk lets content choose.")
    ] = None,
    denoiser: Annotated[str | None, typer.Option(help="Which of a pipeline's, where it has several.")] = None,
    option: Options = None,
    file: File = None,
    json_path: Json = None,
    debug: Debug = False,
) -> None:
    """Find the sparsest windows that keep a model's attention within an error."""
    with _errors(debug):
        made = _factory(factory)()
        if not isinstance(made, tuple) or len(made) != 2 or not isinstance(made[1], (list, tuple)):
            raise UsageError(f"{factory} returned {_shape(made)}; it must return (model or pipeline, list of samples)")
        from fpscompile.calibrate import calibrate as run

        report = run(
            made[0], made[1], max_error=max_error, target_density=target_density, held_out=held_out,
            options=_options(option or []), path=file,
            windows=[_options([f"window={text}"])["window"] for text in window or []], denoiser=denoiser,
        )  # fmt: skip
        _show(report, json_path)
        typer.echo(f"saved as {report.key!r} in {report.path}; compile with options={{'tuning': '{report.path}'}}")


@app.command()
def bench(
    factory: Factory,
    option: Options = None,
    rounds: Annotated[int, typer.Option(help="Turns that the medians are taken of.")] = 7,
    json_path: Json = None,
    dtype: Dtype = None,
    debug: Debug = False,
) -> None:
    """Time a model compiled with fps and without, in turns."""
    with _errors(debug):
        model, args, kwargs = _model(factory, dtype)
        from fpscompile.bench import bench as run

        _show(run(model, *args, options=_options(option or []), rounds=rounds, **kwargs), json_path)


@app.command()
def doctor(
    build: Annotated[bool, typer.Option("--build", help="Also build a small kernel, run it and check it.")] = False,
    json_path: Json = None,
    debug: Debug = False,
) -> None:
    """Say what this machine will use, and what is missing. Exits with 1 when something would fail."""
    with _errors(debug):
        from fpscompile.doctor import examine

        found = examine(build=build)
        marks = {"ok": "+", "info": "-", "warning": "!", "error": "X"}
        for finding in found:
            typer.echo(f"{marks[finding.level]} {finding.subject}: {finding.text}")
            if finding.remedy:
                typer.echo(f"    -> {finding.remedy}")
        if json_path is not None:
            write_atomically(json_path, json.dumps([dataclasses.asdict(finding) for finding in found], indent=1))
    if any(finding.level == "error" for finding in found):
        raise typer.Exit(1)


@contextlib.contextmanager
def _errors(debug: bool, interrupted: str = "") -> Iterator[None]:
    """Errors become one line and an exit code; Ctrl-C exits with 130."""
    try:
        yield
    except KeyboardInterrupt:
        typer.echo(f"interrupted{f': {interrupted}' if interrupted else ''}", err=True)
        raise typer.Exit(130) from None
    except Exception as error:
        if debug:
            raise
        _fail(error)


def _model(factory: str, dtype: str | None) -> tuple[torch.nn.Module, tuple[Any, ...], dict[str, Any]]:
    """(model, args, kwargs) of the call that a factory makes."""
    model, args, kwargs = _call(_factory(factory), factory)
    return (model, args, kwargs) if dtype is None else _cast(dtype, model, args, kwargs)


def _show(report: Any, json_path: Path | None) -> None:
    """A report on the terminal, and in a file if asked."""
    Console().print(report if hasattr(report, "__rich__") else str(report), markup=False)
    if json_path is not None:
        data = report.to_dict() if hasattr(report, "to_dict") else report.entry()
        write_atomically(json_path, json.dumps(data, indent=1))


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
    """Options from "KEY=VALUE" texts; what is no Python literal, such as a word or a path, is text."""
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
            # Options say themselves what is wrong with a text; what was begun as a literal is told here.
            if not value or value[0] in "([{'\"":
                raise UsageError(
                    f"--option {key}: {value!r} is no whole Python literal, such as 0.25 or (4,8,8)"
                ) from None
            options[key] = value
    return options


def _factory(name: str) -> Callable[[], Any]:
    """The callable that ``name`` points to; modules of the working directory count."""
    module_name, colon, attribute = name.partition(":")
    if not colon or not module_name or not attribute:
        raise UsageError(f"{name!r} must be MODULE:FACTORY, for instance my_models:wan_480p")
    if module_name.endswith(".py") or "/" in module_name:
        raise UsageError(
            f"{module_name!r} is a file: name the module, {Path(module_name).stem}, and run from its folder"
        )
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
    raise UsageError(f"{name} returned {_shape(made)}; it must return (model, args, kwargs) or (model, kwargs)")


def _shape(made: Any) -> str:
    """What a factory returned, by types."""
    return f"({', '.join(type(item).__name__ for item in made)})" if isinstance(made, tuple) else type(made).__name__


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
