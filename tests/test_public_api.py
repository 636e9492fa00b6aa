"""The names that users rely on, and an import that costs little."""

import importlib
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import comcat
from comcat import errors

PUBLIC = [
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
    "save",
    "search",
    "spectra",
    "throughput",
]
MODULES = [m.name for m in pkgutil.walk_packages(comcat.__path__, "comcat.") if "._" not in m.name]


def test_the_public_names() -> None:
    assert comcat.__all__ == sorted(comcat.__all__)
    assert comcat.__all__ == PUBLIC


@pytest.mark.parametrize("name", PUBLIC)
def test_public_names_exist_and_are_documented(name: str) -> None:
    value = getattr(comcat, name)
    if name != "__version__":
        assert value.__module__.startswith("comcat.")
        assert value.__doc__
        assert not isinstance(value, type(sys))


def test_nothing_else_is_exported() -> None:
    submodules = {m.name.partition(".")[2].partition(".")[0] for m in pkgutil.walk_packages(comcat.__path__, "comcat.")}
    extra = {n for n in vars(comcat) if not n.startswith("_")} - set(PUBLIC) - submodules
    assert not extra


@pytest.mark.parametrize("name", MODULES)
def test_every_module_imports_and_says_what_it_is(name: str) -> None:
    assert importlib.import_module(name).__doc__


def test_errors_form_one_tree() -> None:
    found = [e for e in vars(errors).values() if isinstance(e, type)]
    assert len(found) == 8
    assert all(issubclass(e, comcat.ComcatError) and e.__doc__ for e in found)


def test_importing_comcat_is_light() -> None:
    code = "import sys, comcat; print(*{'matplotlib', 'datasets', 'sklearn', 'typer'} & set(sys.modules))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.split() == []


def test_types_are_shipped() -> None:
    assert (Path(comcat.__file__).parent / "py.typed").is_file()
