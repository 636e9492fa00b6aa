"""Modules that lie elsewhere since the tree shows the pipeline: their old names go on working for a while.

Only public names (``comcat.__all__``) are promised; this spares code that reached deeper.
"""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

#: Old name -> new name, inside comcat.
MOVED = {
    "added": "nn.added",
    "allocate": "planning.allocate",
    "arguments": "models.timm_arguments",
    "attention": "nn.low_rank_attention",
    "calibrate": "calibration.collect",
    "checkpoint": "storage.checkpoint",
    "cli.adapter": "cli.adapter_command",
    "cli.compress": "cli.compress_command",
    "cli.customize": "cli.customize_command",
    "cli.demo": "cli.demo_command",
    "cli.evaluate": "cli.evaluate_command",
    "cli.finetune": "cli.finetune_command",
    "cli.generate": "cli.generate_command",
    "cli.inspect": "cli.inspect_command",
    "cli.run": "cli.run_command",
    "compress": "compression",
    "cost": "layers.cost",
    "curves": "planning.curves",
    "customize.components": "customize.adapter.components",
    "customize.config": "customize.teaching.customize_config",
    "customize.contents": "customize.files.contents",
    "customize.convert": "customize.lora.exporting",
    "customize.digits": "comcat_demos.digits",
    "customize.digits_cache": "comcat_demos.digits_cache",
    "customize.digits_score": "comcat_demos.digits_score",
    "customize.examples": "customize.teaching.examples",
    "customize.families": "customize.teaching.families",
    "customize.formats": "customize.files.adapter_file",
    "customize.forms": "customize.lora.forms",
    "customize.generate": "customize.generation",
    "customize.guards": "customize.teaching.guards",
    "customize.header": "customize.files.header",
    "customize.lora_config": "customize.lora.lora_config",
    "customize.lora_import": "customize.lora.importing",
    "customize.lora_keys": "customize.lora.keys",
    "customize.lora_math": "customize.lora.algebra",
    "customize.material": "customize.teaching.material",
    "customize.moments": "customize.lora.denoiser_moments",
    "customize.objective": "customize.teaching.objective",
    "customize.opening": "customize.pipelines",
    "customize.photos": "customize.teaching.photos",
    "customize.probe": "customize.lora.denoiser_probe",
    "customize.restoring": "customize.files.restoring",
    "customize.targets": "customize.adapter.targets",
    "customize.tokens": "customize.adapter.tokens",
    "customize.train": "customize.teaching.teach",
    "customize.trainer": "customize.teaching.trainer",
    "customize.words": "customize.adapter.words",
    "data.training": "data.training_set",
    "description": "storage.description",
    "evaluate": "evaluation.measure",
    "exchange": "storage.exchange",
    "factorize": "linalg.factorize",
    "factors": "layers.factors",
    "files": "storage.atomic",
    "finetune": "training.finetuning",
    "fingerprint": "calibration.fingerprint",
    "heads": "layers.heads",
    "latency": "planning.latency",
    "linear": "nn.linear",
    "manifest": "storage.manifest",
    "modes": "models.modes",
    "outputs": "evaluation.outputs",
    "owned": "storage.owned",
    "plain": "models.wrappers",
    "plan": "planning.plan",
    "planner": "planning.planner",
    "probe": "planning.probe",
    "profile": "models.profile",
    "ranks": "rank_search",
    "ranks.alternation": "rank_search.alternation",
    "ranks.config": "rank_search.search_config",
    "ranks.data": "rank_search.halves",
    "ranks.distribution": "rank_search.distribution",
    "ranks.gates": "layers.gates",
    "ranks.space": "rank_search.space",
    "ranks.start": "rank_search.start",
    "reader": "storage.reader",
    "rebuilt": "storage.rebuilt",
    "report.customize": "report.adapter_tables",
    "report.search": "report.search_figure",
    "report.spectra": "report.spectra_figure",
    "running": "models.running",
    "scores": "evaluation.scores",
    "search": "rank_search.run",
    "sites": "layers.base",
    "source": "models.source",
    "spectra": "planning.spectra",
    "swap": "nn.swap",
    "temporary": "storage.temporary",
    "timing": "planning.timing",
    "training.config": "training.finetune_config",
    "training.evaluation": "training.validation",
    "training.features": "training.block_outputs",
    "training.loading": "training.loaders",
    "training.opening": "training.fresh_or_resumed",
    "training.run": "training.engine",
    "traits": "models.traits",
    "versions": "models.versions",
}


class _Moved(MetaPathFinder, Loader):
    """Finds what was moved; what is found is the module itself, under both names."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        known = fullname.startswith("comcat.") and fullname.removeprefix("comcat.") in MOVED
        return ModuleSpec(fullname, self) if known else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        place = MOVED[spec.name.removeprefix("comcat.")]
        place = place if place.startswith("comcat_demos") else f"comcat.{place}"
        warnings.warn(f"{spec.name} is {place} now; the old name will go", DeprecationWarning, stacklevel=2)
        module = importlib.import_module(place)
        self._spec = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__ = self._spec  # the import system has set that of the old name


def install() -> None:
    """Once."""
    if not any(isinstance(finder, _Moved) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Moved())  # before files of the same name in a package that has another name now
