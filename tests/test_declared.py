"""The packages that are imported are the packages that are declared; library and demos are two packages."""

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src"
#: Imported under another name than they are installed by.
INSTALLED_AS = {"PIL": "pillow", "yaml": "pyyaml", "sklearn": "scikit-learn", "open_clip": "open-clip-torch"}
INSTALLED_AS |= {"onnx_ir": "onnxscript", "ai_edge_litert": "litert-torch"}  # they come with those
#: What only an option that names it needs, with a message that says how to install it.
ASKED_FOR = {"bitsandbytes", "xformers"}
#: Extras whose pins may disagree with ours; each has an environment of its own.
OTHERS = ("executorch", "litert", "coreml")
OURS = {"comcat", "comcat-demos"}


def installed(name: str) -> str:
    return INSTALLED_AS.get(name, name.replace("_", "-"))


def imports(package: str) -> Iterator[tuple[str, bool, Path]]:
    """(first part of the name, whether it is imported with its module, file) of every absolute import."""
    for file in sorted((SOURCE / package).rglob("*.py")):
        tree = ast.parse(file.read_text())
        lazy = {id(n) for f in ast.walk(tree) if isinstance(f, ast.FunctionDef) for n in ast.walk(f)}
        lazy |= {id(n) for f in tree.body if isinstance(f, ast.If) for n in ast.walk(f)}  # TYPE_CHECKING
        for node in ast.walk(tree):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
            for name in names:
                yield name.partition(".")[0], id(node) not in lazy, file.relative_to(SOURCE)


def requirements() -> dict[str, list[Requirement]]:
    """Names of extras, and ``""`` for what is always installed -> what they name, with versions."""
    text = (ROOT / "pyproject.toml").read_text()  # tomllib is as young as Python 3.11
    lists = {"": re.search(r"^dependencies = (\[.*?^\])", text, re.M | re.S)[1]}
    section = re.search(r"^\[project.optional-dependencies\]\n(.*?)\n\n", text, re.M | re.S)[1]
    lists |= dict(line.split(" = ", 1) for line in section.splitlines())
    return {extra: [Requirement(r) for r in ast.literal_eval(items)] for extra, items in lists.items()}


def declared() -> dict[str, set[str]]:
    """Names of extras, and ``""`` for what is always installed -> packages, those of extras in extras too."""
    found = requirements()

    def packages(extra: str) -> set[str]:
        own = {r.name.replace("_", "-") for r in found[extra] if r.name != "comcat"}
        return own.union(*(packages(e) for r in found[extra] if r.name == "comcat" for e in r.extras), set())

    return {extra: packages(extra) for extra in found}


@pytest.mark.parametrize(
    ("package", "extras"),
    [
        (
            "comcat",
            [
                *[
                    "data",
                    "plot",
                    "train",
                    "customize",
                    "transformers",
                    "openclip",
                    "detection",
                    "onnx",
                    "openvino",
                    "int8",
                    "ui",
                ],
                "",
                *OTHERS,
            ],
        ),
        ("comcat_demos", ["", "demo"]),
    ],
)
def test_what_is_imported_is_declared(package: str, extras: list[str]) -> None:
    known = set().union(*(packages for extra, packages in declared().items() if extra in extras), ASKED_FOR, OURS)
    found = {installed(name): file for name, _, file in imports(package) if name not in sys.stdlib_module_names}
    assert {name: file for name, file in found.items() if name not in known} == {}


def test_what_is_declared_is_imported() -> None:
    found = {installed(name) for package in ("comcat", "comcat_demos") for name, _, _ in imports(package)}
    # torch.utils.tensorboard writes with the one, torch.onnx with the second; the third is imported by its name, when a
    # model asks for it.
    assert (declared()["all"] | declared()[""]) - found <= {"tensorboard", "onnxscript", "open-clip-torch"}


def test_the_library_imports_the_demos_only_to_run_them() -> None:
    found = [(file, with_module) for name, with_module, file in imports("comcat") if name == "comcat_demos"]
    assert set(found) == {(Path("comcat/cli/demo_command.py"), False)}


def test_every_lower_bound_is_the_version_that_is_tested() -> None:
    """``make test-lowest`` runs with the versions of ``constraints-lowest.txt``."""
    lines = (ROOT / "constraints-lowest.txt").read_text().splitlines()
    pins = dict(line.split("==") for line in lines if not line.startswith("#"))
    bounds = {
        canonicalize_name(r.name): Version(s.version)
        for extra, found in requirements().items()
        for r in found
        for s in r.specifier
        if extra not in OTHERS and s.operator == ">="
    }
    assert {name: pins[name] for name, bound in bounds.items() if Version(pins[name]) != bound} == {}
