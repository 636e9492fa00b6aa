"""comcat: make attention-based vision models small."""

from ._version import __version__
from .calibrate import calibrate
from .calibration import Calibration
from .compress import compress, compress_
from .plan import Budget, Plan, full_rank_plan
from .planner import plan
from .profile import profile

__all__ = ["Budget", "Calibration", "Plan", "__version__", "calibrate", "compress", "compress_", "full_rank_plan", "plan", "profile"]
