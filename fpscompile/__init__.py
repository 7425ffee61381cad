"""fpscompile: a ``torch.compile`` backend that makes the 3D attention of video diffusion models sparse and fast."""

from fpscompile.attach import Attachment, attach
from fpscompile.autotune import autotune
from fpscompile.backend import Backend
from fpscompile.calibrate import calibrate
from fpscompile.errors import FpsError
from fpscompile.explain import explain
from fpscompile.report import Report
from fpscompile.schedule import Phase, Schedule
from fpscompile.settings import Settings

__version__ = "0.1.0"

__all__ = [
    "Attachment",
    "Backend",
    "FpsError",
    "Phase",
    "Report",
    "Schedule",
    "Settings",
    "attach",
    "autotune",
    "calibrate",
    "explain",
]
