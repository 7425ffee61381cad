"""The tuning file on disk: read by anyone at any time, written by one process at a time, never half.

Readers take no lock, since a file is only ever replaced as a whole. A writer takes a lock beside the file, reads what
is there, merges and replaces. What cannot be read is told apart:

* *missing*: empty.
* *corrupt* (cut off, or no tuning file): warned about and read as empty; a writer first sets it aside under a name of
  its own, so nothing is lost.
* *foreign* version: read as empty, and never written over.
* *unreadable*: no permission, or a folder: read as empty.

What cannot be written is an error that names the file and the remedy; whoever measured keeps the results in hand.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from fpscompile.errors import FpsError
from fpscompile.files import cache_root, write_atomically
from fpscompile.tuning.format import Contents, CorruptError, ForeignVersionError, dumps, parse

logger = logging.getLogger("fpscompile.tuning")

LOCK_SECONDS = 60.0


class TuningFileError(FpsError, OSError):
    """A tuning file that cannot be written, or must not be."""


@dataclass(frozen=True)
class Loaded:
    """What reading a file gave."""

    contents: Contents
    outcome: str
    """"read", "missing", "corrupt", "foreign" or "unreadable"."""
    message: str = ""
    """What is wrong and what to do, a sentence that names the file; "" when nothing is."""


def default_path() -> Path:
    """``FPS_CACHE_DIR/tuning.json``; without the variable, in a folder inside Inductor's cache."""
    return cache_root() / "tuning.json"


def read(path: str | os.PathLike[str]) -> Loaded:
    """The contents of a file; never raises for what the file holds, and logs a warning for what is wrong with it."""
    loaded = load(path)
    if loaded.message:
        logger.warning("%s", loaded.message)
    return loaded


def load(path: str | os.PathLike[str]) -> Loaded:
    """:func:`read` for callers that pass on themselves what is wrong."""
    path = Path(path)
    try:
        state = os.stat(path)
        return _read(str(path), state.st_mtime_ns, state.st_size, state.st_ino)
    except FileNotFoundError:
        return Loaded(Contents(), "missing")
    except (OSError, UnicodeDecodeError) as error:
        reason = "it is not UTF-8 text" if isinstance(error, UnicodeDecodeError) else error.strerror
        outcome = "corrupt" if isinstance(error, UnicodeDecodeError) else "unreadable"
        return Loaded(Contents(), outcome, f"tuning file {path} cannot be read: {reason}")


@functools.lru_cache(maxsize=32)
def _read(path: str, changed: int, size: int, inode: int) -> Loaded:
    """Cached by what the file system says of the file's state, so that many sites cost one reading."""
    text = Path(path).read_text(encoding="utf-8")
    try:
        return Loaded(parse(text), "read")
    except CorruptError as error:
        return Loaded(
            Contents(),
            "corrupt",
            f"tuning file {path} is corrupt and ignored: {error}; the next time something is saved, it is set aside",
        )
    except ForeignVersionError as error:
        return Loaded(Contents(), "foreign", f"tuning file {path} is ignored: {error}; name another file")


def update(path: str | os.PathLike[str], news: Contents) -> Contents:
    """Merge ``news`` into a file, which is made if need be; returns what it then holds.

    Raises:
        TuningFileError: the file or its folder cannot be written, has a foreign version, or stays locked.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _locked(path):
            loaded = load(path)
            if loaded.outcome == "foreign":
                raise TuningFileError(loaded.message)
            if loaded.outcome == "unreadable":
                raise TuningFileError(f"{loaded.message}; name another file")
            if loaded.outcome == "corrupt":
                _set_aside(path)
            if path.exists() and not os.access(path, os.W_OK):
                raise PermissionError(13, "the file is read-only", str(path))
            contents = loaded.contents.merged(news)
            write_atomically(path, dumps(contents))
            return contents
    except TuningFileError:
        raise
    except OSError as error:
        raise TuningFileError(
            f"tuning file {path} cannot be written: {error.strerror or error}; name one in a writable folder, or set "
            "FPS_CACHE_DIR"
        ) from error


def check_writable(path: str | os.PathLike[str]) -> None:
    """Fail now rather than after an hour of measuring: :func:`update` with nothing, without making a file.

    Raises:
        TuningFileError: as :func:`update`.
    """
    path = Path(path)
    if path.exists():
        update(path, Contents())
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        writable = os.access(path.parent, os.W_OK | os.X_OK)
        reason = "its folder is read-only"
    except OSError as error:
        writable, reason = False, error.strerror or str(error)
    if not writable:
        raise TuningFileError(
            f"tuning file {path} cannot be written: {reason}; name one in a folder that can be, or set FPS_CACHE_DIR"
        )


def merge(paths: Sequence[str | os.PathLike[str]], into: str | os.PathLike[str]) -> Contents:
    """Merge whole files into one, for instance to ship with a checkpoint.

    Raises:
        TuningFileError: one of the files is missing, corrupt or foreign; or ``into`` cannot be written.
    """
    news = Contents()
    for path in paths:
        loaded = read(path)
        if loaded.outcome != "read":
            raise TuningFileError(loaded.message or f"tuning file {path} does not exist")
        news = news.merged(loaded.contents)
    return update(into, news)


def _set_aside(path: Path) -> Path:
    """Move a corrupt file to a name of its own: nobody's hand-edited entries are thrown away."""
    digest = hashlib.sha256(path.read_bytes()).hexdigest()[:8]
    aside = path.with_name(f"{path.name}.corrupt-{digest}")
    os.replace(path, aside)
    logger.warning("tuning file %s was corrupt; it is kept as %s", path, aside)
    return aside


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """One writer at a time. The system frees the lock of a process that dies."""
    from torch.utils._filelock import FileLock

    lock = path.with_name(f".{path.name}.lock")
    try:
        with FileLock(str(lock), timeout=LOCK_SECONDS):
            yield
    except TimeoutError as error:
        raise TuningFileError(
            f"tuning file {path} has been locked by another process for {LOCK_SECONDS:.0f} s ({lock}): name another"
        ) from error
