"""The exception tree: everything comcat raises on purpose derives from :class:`ComcatError`.

    ComcatError
    ├── ModelError          the model cannot be built or worked on as it is, has nothing to compress, or holds NaN
    ├── DataError           images are missing, unreadable or mislabelled
    ├── CalibrationError    statistics cannot be collected, or do not belong to this model
    ├── BudgetError         the budget is not a budget, or out of reach
    ├── PlanError           the plan does not fit the model
    ├── CheckpointError     a file or directory cannot be written or read back, or is not comcat's to replace
    ├── MetricError         a metric of the user's raises, or returns no number
    ├── ExportError         a model cannot be put into a file of another runtime, or computes something else there
    └── TrainingError       training cannot start, go on or be resumed

A message names the cause and the fix. The command line prints it without a traceback.
"""


class ComcatError(Exception):
    """Base of all errors raised on purpose."""


class ModelError(ComcatError):
    """The model cannot be built or worked on as it is, has nothing to compress, or holds non-finite weights."""


class DataError(ComcatError):
    """Images are missing, unreadable or mislabelled."""


class CalibrationError(ComcatError):
    """Statistics cannot be collected, or do not belong to this model."""


class BudgetError(ComcatError):
    """The budget is malformed or out of reach."""


class PlanError(ComcatError):
    """The plan is malformed or does not fit the model."""


class CheckpointError(ComcatError):
    """A file or directory cannot be written or read back, or is not comcat's to replace."""


class MetricError(ComcatError):
    """A metric of the user's cannot be found, raises, or returns no finite number."""


class ExportError(ComcatError):
    """A model cannot be put into a file of another runtime, or computes something else there."""


class TrainingError(ComcatError):
    """Training cannot start, go on or be resumed."""
