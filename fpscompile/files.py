"""Where files are kept between processes, and files that are whole at every moment.

Whoever reads one sees what was there before, or all of what is new.
"""

from __future__ import annotations

import errno
import os
import tempfile
from pathlib import Path


def cache_root() -> Path:
    """``FPS_CACHE_DIR``, "~" expanded and absolute; without the variable, the folder ``fps`` in Inductor's cache."""
    root = os.environ.get("FPS_CACHE_DIR")
    if not root:
        from torch._inductor.runtime.cache_dir_utils import cache_dir

        root = os.path.join(cache_dir(), "fps")
    return Path(root).expanduser().absolute()


def write_atomically(path: str | os.PathLike[str], text: str) -> Path:
    """Write ``text`` as UTF-8 beside ``path``, then move it there: readers see the old file or the new one.

    Raises:
        OSError: a folder is in that place, or it cannot be written.
    """
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, "This is a folder, name a file in it", str(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)  # mkstemp makes files that others cannot read
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    return path
