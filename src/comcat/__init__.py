"""comcat: make attention-based vision models small.

Per head, attention is two bilinear products, and those are low-rank even where the single matrices are not
(COMCAT, ICML 2023, arXiv 2305.17235). ``calibrate`` -> ``plan`` -> ``compress`` -> ``save``.
"""

from typing import TYPE_CHECKING

from . import _lazy
from ._version import __version__
from .errors import (
    BudgetError,
    CalibrationError,
    CheckpointError,
    ComcatError,
    DataError,
    ModelError,
    PlanError,
    TrainingError,
)

if TYPE_CHECKING:
    from .calibrate import calibrate
    from .calibration import Calibration
    from .checkpoint import load, save
    from .compress import LayerReport, Report, compress, compress_, restore_
    from .evaluate import Agreement, Evaluation, agreement, evaluate, throughput
    from .finetune import FinetuneConfig, FinetuneResult, finetune
    from .latency import LatencyTable
    from .models import load_model
    from .plan import Budget, Plan, full_rank_plan
    from .planner import check_budget, plan
    from .profile import Profile, profile
    from .ranks.config import SearchConfig
    from .search import search
    from .spectra import Spectrum, spectra
    from .timing import measure_latency

__all__ = [
    "Agreement",
    "Budget",
    "BudgetError",
    "Calibration",
    "CalibrationError",
    "CheckpointError",
    "ComcatError",
    "DataError",
    "Evaluation",
    "FinetuneConfig",
    "FinetuneResult",
    "LatencyTable",
    "LayerReport",
    "ModelError",
    "Plan",
    "PlanError",
    "Profile",
    "Report",
    "SearchConfig",
    "Spectrum",
    "TrainingError",
    "__version__",
    "agreement",
    "calibrate",
    "check_budget",
    "compress",
    "compress_",
    "evaluate",
    "finetune",
    "full_rank_plan",
    "load",
    "load_model",
    "measure_latency",
    "plan",
    "profile",
    "restore_",
    "save",
    "search",
    "spectra",
    "throughput",
]

# Where the names above live; they are imported on first use, PyTorch and timm with them.
_lazy.package(
    __name__,
    {
        "Agreement": "evaluate",
        "Budget": "plan",
        "Calibration": "calibration",
        "Evaluation": "evaluate",
        "FinetuneConfig": "finetune",
        "FinetuneResult": "finetune",
        "LatencyTable": "latency",
        "LayerReport": "compress",
        "Plan": "plan",
        "Profile": "profile",
        "Report": "compress",
        "SearchConfig": "ranks.config",
        "Spectrum": "spectra",
        "agreement": "evaluate",
        "calibrate": "calibrate",
        "check_budget": "planner",
        "compress": "compress",
        "compress_": "compress",
        "evaluate": "evaluate",
        "finetune": "finetune",
        "full_rank_plan": "plan",
        "load": "checkpoint",
        "load_model": "models",
        "measure_latency": "timing",
        "plan": "planner",
        "profile": "profile",
        "restore_": "compress",
        "save": "checkpoint",
        "search": "search",
        "spectra": "spectra",
        "throughput": "evaluate",
    },
)

del TYPE_CHECKING  # no name of ours
