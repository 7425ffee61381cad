"""The report as one self-contained HTML page: no network, no fonts, no scripts to load."""

from fpscompile.html.page import render

__all__ = ["render"]
