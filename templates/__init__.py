"""Kernel sources and page templates, as readable files: see README.md for the glossary of their symbols."""

if __name__ == "templates":
    raise ImportError(
        "this folder installs as fpscompile.templates: import that name, so that there is one copy of it; "
        "'import templates' would create a second"
    )
