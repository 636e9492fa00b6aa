"""What a directory of comcat says of itself: how the model was made, what it costs, and what was measured then."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, NonNegativeFloat, NonNegativeInt

from ..compression import Report
from ..errors import CheckpointError
from ..evaluation.results import Evaluation
from ..evaluation.tasks import TASKS
from ..models.source import Source
from ..planning.plan import Plan
from ..storage.atomic import read_whole
from ..storage.checkpoint import TENSORS_NAME
from ..storage.description import Description, read_description
from ..storage.owned import CONFIG_NAME
from ..storage.reader import read_json, validated
from .tables import Measured

#: What ``comcat compress`` and ``comcat finetune`` write beside the model.
REPORT, FINETUNED = "report.json", "finetune.json"


class _Record(BaseModel):
    """Newer versions may say more."""

    model_config = ConfigDict(extra="ignore")


class EvaluationRecord(_Record):
    top1: float | None = None
    top5: float | None = None
    loss: float | None = None
    images: NonNegativeInt
    images_per_second: float | None = None
    outputs: str = "classes"
    metrics: dict[str, float] = Field(default_factory=dict)

    def evaluation(self, name: str) -> Evaluation:
        """
        Raises:
            CheckpointError: of a kind of outputs that this version does not know.
        """
        if self.outputs not in (*TASKS, "metric"):
            raise CheckpointError(f"{name} has outputs of kind '{self.outputs}', which is not known; upgrade comcat")
        return Evaluation.from_dict(self.model_dump(exclude_none=True))


class CostRecord(_Record):
    params: NonNegativeInt
    macs: NonNegativeInt
    bytes: NonNegativeInt
    images_per_second: NonNegativeFloat | None = None
    evaluation: EvaluationRecord | None = None

    def measured(self, label: str, name: str) -> Measured:
        evaluation = self.evaluation.evaluation(name) if self.evaluation else None
        return Measured(label, self.params, self.macs, self.bytes, evaluation, self.images_per_second)


class CalibrationRecord(_Record):
    images: NonNegativeInt
    fisher: bool


class LatencyRecord(_Record):
    """Milliseconds for a batch."""

    device: str
    batch_size: NonNegativeInt
    runtime: str | None = None
    precision: str | None = None
    planned_dense_ms: NonNegativeFloat
    planned_ms: NonNegativeFloat
    dense_ms: NonNegativeFloat | None = None
    compressed_ms: NonNegativeFloat | None = None


class CompressionRecord(_Record):
    """``report.json``."""

    model: str
    seed: int | None = None
    calibration: CalibrationRecord | None = None
    latency: LatencyRecord | None = None
    evaluated_on: str | None = None
    dense: CostRecord
    compressed: CostRecord
    report: Report
    command: str | None = None
    versions: dict[str, str] = Field(default_factory=dict)
    device: str | None = None


class MilestoneRecord(_Record):
    step: NonNegativeInt
    epoch: NonNegativeFloat
    evaluation: EvaluationRecord


class TrainingRecord(_Record):
    """``finetune.json``."""

    data: str
    train_split: str | None = None
    eval_split: str | None = None
    steps: NonNegativeInt
    epochs: NonNegativeFloat
    batch_size: NonNegativeInt | None = None
    config: dict[str, Any] = Field(default_factory=dict)
    history: list[MilestoneRecord] = Field(default_factory=list)
    command: str | None = None
    versions: dict[str, str] = Field(default_factory=dict)
    device: str | None = None

    @property
    def evaluated_on(self) -> str:
        return f"{self.data}, split {self.eval_split}" if self.eval_split else self.data


@dataclass(frozen=True)
class Facts:
    """A compressed model, as its directory describes it.

    Attributes:
        folder: the directory; stock: it is a model of its own library, written by ``comcat compress --stock``.
        name: the dense model, as it was typed, or its architecture.
        source: the architecture; None for stock models, whose library knows it.
        dense, small: costs, and what was measured of both when the model was made. Where nobody has weighed the dense
            model, its bytes are those of its parameters in the dtype of the compressed ones.
        evaluated_on: the data of these measurements; None where nothing was measured.
    """

    folder: Path
    stock: bool
    name: str
    source: Source | None
    plan: Plan
    report: Report
    dense: Measured
    small: Measured
    evaluated_on: str | None
    record: CompressionRecord | None
    training: TrainingRecord | None

    @property
    def load_line(self) -> str:
        """Python that loads the model."""
        if not self.stock:
            return f"model = comcat.load({self.folder.name!r})"
        kind = _transformers_class(self.folder)
        if kind is not None:
            return f"model = transformers.{kind}.from_pretrained({self.folder.name!r})"
        return f"model = timm.create_model({f'local-dir:{self.folder.name}'!r}, pretrained=True)"


def read_facts(folder: str | Path) -> Facts:
    """The facts in a directory that comcat wrote.

    Raises:
        CheckpointError: it is none, holds a dense model, or is damaged; the file is named.
    """
    path = Path(folder)
    return read_whole(path, lambda: _read(path))


def _read(folder: Path) -> Facts:
    record = _optional(CompressionRecord, folder / REPORT)
    training = _optional(TrainingRecord, folder / FINETUNED)
    if not (folder / CONFIG_NAME).exists() and record is not None and (folder / "plan.json").exists():
        return _stock(folder, record)
    description = read_description(folder)
    description.check_digest(f"'{folder / CONFIG_NAME}'")
    report = description.report
    if report is None:
        raise CheckpointError(
            f"'{folder}' holds a dense model, of which there is nothing to report; compress it: comcat compress"
        )
    facts = Facts(
        folder=folder,
        stock=False,
        name=record.model if record else description.architecture.name,
        source=_source(description),
        plan=Plan.from_dict(description.plan),
        report=report,
        dense=record.dense.measured("dense", f"'{folder / REPORT}'") if record else _dense(report, folder),
        small=record.compressed.measured("compressed", f"'{folder / REPORT}'") if record else _small(report, folder),
        evaluated_on=record.evaluated_on if record else None,
        record=record,
        training=training,
    )
    return _tuned(facts, training) if training is not None else facts


def _stock(folder: Path, record: CompressionRecord) -> Facts:
    name = f"'{folder / REPORT}'"
    return Facts(
        folder=folder,
        stock=True,
        name=record.model,
        source=None,
        plan=Plan.load(folder / "plan.json"),
        report=record.report,
        dense=record.dense.measured("dense", name),
        small=record.compressed.measured("compressed", name),
        evaluated_on=record.evaluated_on,
        record=record,
        training=None,
    )


def _tuned(facts: Facts, training: TrainingRecord) -> Facts:
    """With what fine-tuning came to, in place of what was measured before it."""
    if not training.history:
        return replace(facts, small=replace(facts.small, evaluation=None), evaluated_on=None)
    last = training.history[-1].evaluation.evaluation(f"'{facts.folder / FINETUNED}'")
    small = replace(facts.small, name="compressed, fine-tuned", evaluation=last)
    return replace(facts, small=small, evaluated_on=training.evaluated_on)


def _optional(kind: type[Any], file: Path) -> Any:
    return validated(kind, read_json(file), f"'{file}'") if file.exists() else None


def _source(description: Description) -> Source:
    architecture = description.architecture
    return Source(architecture.name, architecture.args, architecture.config, architecture.library)


def _dense(report: Report, folder: Path) -> Measured:
    each = _weight(folder) / max(report.params_after, 1)
    return Measured("dense", report.params_before, report.macs_before, round(each * report.params_before))


def _small(report: Report, folder: Path) -> Measured:
    return Measured("compressed", report.params_after, report.macs_after, _weight(folder))


def _weight(folder: Path) -> int:
    file = folder / TENSORS_NAME
    return file.stat().st_size if file.is_file() else 0


def _transformers_class(folder: Path) -> str | None:
    config = read_json(folder / "config.json") if (folder / "config.json").exists() else {}
    if not isinstance(config, dict) or "model_type" not in config:
        return None
    named = config.get("architectures")
    first = named[0] if isinstance(named, list) and named else None
    return first if isinstance(first, str) and first.isidentifier() else "AutoModel"
