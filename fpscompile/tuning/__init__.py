"""What was measured, kept: the tuning file, its format, and how a compilation finds its entries in it."""

from fpscompile.tuning.format import VERSION, Contents
from fpscompile.tuning.store import Loaded, default_path, merge, read, update

__all__ = ["VERSION", "Contents", "Loaded", "default_path", "merge", "read", "update"]
