"""comcat: make attention-based vision models small.

Per head, attention is two bilinear products, and those are low-rank even where the single matrices are not
(COMCAT, ICML 2023, arXiv 2305.17235). ``calibrate`` -> ``plan`` -> ``compress`` -> ``save``.
"""

from ._version import __version__
from .calibrate import calibrate
from .calibration import Calibration
from .checkpoint import load, save
from .compress import LayerReport, Report, compress, compress_
from .errors import (
    BudgetError,
    CalibrationError,
    CheckpointError,
    ComcatError,
    DataError,
    ModelError,
    PlanError,
)
from .models import load_model
from .plan import Budget, Plan, full_rank_plan
from .planner import plan
from .profile import Profile, profile
from .spectra import Spectrum, spectra

__all__ = [
    "Budget",
    "BudgetError",
    "Calibration",
    "CalibrationError",
    "CheckpointError",
    "ComcatError",
    "DataError",
    "LayerReport",
    "ModelError",
    "Plan",
    "PlanError",
    "Profile",
    "Report",
    "Spectrum",
    "__version__",
    "calibrate",
    "compress",
    "compress_",
    "full_rank_plan",
    "load",
    "load_model",
    "plan",
    "profile",
    "save",
    "spectra",
]
