"""The names that users rely on, and an import that costs little."""

import ast
import importlib
import pkgutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

import comcat
import comcat_demos
from comcat import customize, errors

PUBLIC = [
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
MODULES = [
    module.name
    for package in (comcat, comcat_demos)
    for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}.")
    if "._" not in module.name
]


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
    assert len(found) == 10
    assert all(issubclass(e, comcat.ComcatError) and e.__doc__ for e in found)


HEAVY = {"torch", "torchvision", "timm", "numpy", "PIL", "safetensors", "accelerate", "transformers", "diffusers"}
HEAVY |= {"peft", "datasets", "sklearn", "matplotlib", "tensorboard", "yaml"}


def loaded_by(code: str) -> set[str]:
    """The heavy packages that a fresh interpreter has imported after ``code``."""
    code += f"\nimport sys; print('loaded:', *(n for n in {HEAVY | {'typer', 'rich'}!r} if sys.modules.get(n)))"
    out = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, check=True)
    return set(out.stdout.rpartition("loaded:")[2].split())


def test_importing_comcat_is_light() -> None:
    code = "import comcat, comcat.customize; dir(comcat); hasattr(comcat, 'nonsense'); comcat.ComcatError"
    assert loaded_by(code) == set()


def test_help_and_mistyped_options_are_light() -> None:
    """Neither help nor a usage error of any command imports more than what reads the command line."""
    code = """
from typer.testing import CliRunner
import typer
from comcat.cli import app
root = typer.main.get_command(app)
def walk(command, words):
    yield words
    for name, child in getattr(command, "commands", {}).items():
        yield from walk(child, [*words, name])
lines = [(words + [last], code) for words in walk(root, []) for last, code in (("--help", 0), ("--nonsense", 2))]
lines += [(["nonsense"], 2), (["compres"], 2), (["--version"], 0), (["adapter", "nonsense"], 2), (["compress"], 2)]
assert len(lines) > 25
for words, code in lines:
    assert CliRunner().invoke(app, words).exit_code == code, words
"""
    assert loaded_by(code) == {"typer", "rich"}


def test_everything_but_the_extras_works_without_them() -> None:
    """Also where diffusers, data sets, pictures and TensorBoard are not installed."""
    extras = ["datasets", "matplotlib", "tensorboard", "diffusers", "transformers", "peft", "sklearn", "psutil"]
    code = f"""
import sys
sys.modules.update(dict.fromkeys({extras}))
import comcat
[getattr(comcat, name) for name in comcat.__all__]
import comcat.cli.compress_job, comcat.cli.finetune_job, comcat.data.training_set, comcat.report.tables
"""
    assert {"torch", "timm"} <= loaded_by(code)


@pytest.mark.parametrize("package", [comcat, customize], ids=lambda p: p.__name__)
def test_type_checkers_are_told_the_names_that_are_imported_on_first_use(package: ModuleType) -> None:
    tree = ast.parse(Path(package.__file__).read_text())
    block = next(node for node in tree.body if isinstance(node, ast.If) and node.test.id == "TYPE_CHECKING")
    assert {alias.name: node.module for node in block.body for alias in node.names} == package._homes
    assert {*package._homes} | {*vars(errors), "__version__"} >= {*package.__all__} <= {*dir(package)}


def test_types_are_shipped() -> None:
    assert (Path(comcat.__file__).parent / "py.typed").is_file()
