"""comcat: make attention-based vision models small.

Per head, attention is two bilinear products, and those are low-rank even where the single matrices are not
(COMCAT, ICML 2023, arXiv 2305.17235). ``calibrate`` -> ``plan`` -> ``compress`` -> ``save``.
"""

from typing import TYPE_CHECKING

from . import _lazy
from ._moved import install as _install_old_names
from ._version import __version__
from .errors import (
    BudgetError,
    CalibrationError,
    CheckpointError,
    ComcatError,
    DataError,
    ExportError,
    MetricError,
    ModelError,
    PlanError,
    TrainingError,
)

if TYPE_CHECKING:
    from .calibration.collect import calibrate
    from .calibration.statistics import Calibration
    from .compression import LayerReport, Report, compress, compress_, restore_
    from .evaluation.measure import agreement, evaluate
    from .evaluation.results import Agreement, Evaluation
    from .evaluation.speed import throughput
    from .evaluation.zero_shot import ZeroShot
    from .exporting.exporter import ExportReport, export
    from .models.opening import load_model
    from .models.profile import Profile, profile
    from .planning.latency import LatencyTable
    from .planning.plan import Budget, Plan, full_rank_plan
    from .planning.planner import check_budget, plan
    from .planning.spectra import Spectrum, spectra
    from .planning.timing import measure_latency
    from .prepared import Prepared, prepare
    from .rank_search.run import search
    from .rank_search.search_config import SearchConfig
    from .report.page import write_report
    from .runtimes.bench import Bench, bench
    from .sharing.push import push
    from .stock_export import Stock, export_stock
    from .storage.checkpoint import load, save
    from .training.finetuning import FinetuneConfig, FinetuneResult, finetune

__all__ = [
    "Agreement",
    "Bench",
    "Budget",
    "BudgetError",
    "Calibration",
    "CalibrationError",
    "CheckpointError",
    "ComcatError",
    "DataError",
    "Evaluation",
    "ExportError",
    "ExportReport",
    "FinetuneConfig",
    "FinetuneResult",
    "LatencyTable",
    "LayerReport",
    "MetricError",
    "ModelError",
    "Plan",
    "PlanError",
    "Prepared",
    "Profile",
    "Report",
    "SearchConfig",
    "Spectrum",
    "Stock",
    "TrainingError",
    "ZeroShot",
    "__version__",
    "agreement",
    "bench",
    "calibrate",
    "check_budget",
    "compress",
    "compress_",
    "evaluate",
    "export",
    "export_stock",
    "finetune",
    "full_rank_plan",
    "load",
    "load_model",
    "measure_latency",
    "plan",
    "prepare",
    "profile",
    "push",
    "restore_",
    "save",
    "search",
    "spectra",
    "throughput",
    "write_report",
]

# Where the names above live; they are imported on first use, PyTorch and timm with them.
_lazy.package(
    __name__,
    {
        "Agreement": "evaluation.results",
        "Bench": "runtimes.bench",
        "Budget": "planning.plan",
        "Calibration": "calibration.statistics",
        "Evaluation": "evaluation.results",
        "ExportReport": "exporting.exporter",
        "FinetuneConfig": "training.finetuning",
        "FinetuneResult": "training.finetuning",
        "LatencyTable": "planning.latency",
        "LayerReport": "compression",
        "Plan": "planning.plan",
        "Prepared": "prepared",
        "Profile": "models.profile",
        "Report": "compression",
        "SearchConfig": "rank_search.search_config",
        "Spectrum": "planning.spectra",
        "Stock": "stock_export",
        "ZeroShot": "evaluation.zero_shot",
        "agreement": "evaluation.measure",
        "bench": "runtimes.bench",
        "calibrate": "calibration.collect",
        "check_budget": "planning.planner",
        "compress": "compression",
        "compress_": "compression",
        "evaluate": "evaluation.measure",
        "export": "exporting.exporter",
        "export_stock": "stock_export",
        "finetune": "training.finetuning",
        "full_rank_plan": "planning.plan",
        "load": "storage.checkpoint",
        "load_model": "models.opening",
        "measure_latency": "planning.timing",
        "plan": "planning.planner",
        "prepare": "prepared",
        "profile": "models.profile",
        "push": "sharing.push",
        "restore_": "compression",
        "save": "storage.checkpoint",
        "search": "rank_search.run",
        "spectra": "planning.spectra",
        "throughput": "evaluation.speed",
        "write_report": "report.page",
    },
)

del TYPE_CHECKING  # no name of ours
_install_old_names()
