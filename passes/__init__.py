"""Graph passes: find every 3D attention of a captured graph and rewrite it. See README.md beside this file."""

if __name__ == "passes":
    raise ImportError(
        "import fpscompile.passes, not passes: the folder lies at the top of the repository for readers, "
        "and importing it under its bare name would make a second copy of every class"
    )

from fpscompile.passes.base import GraphState, Pass
from fpscompile.passes.pipeline import PIPELINE, run_pipeline

__all__ = ["PIPELINE", "GraphState", "Pass", "run_pipeline"]
