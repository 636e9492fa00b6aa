"""The pages: what is generated says what it is generated from, and code on the others is code."""

import ast
import json
import re
import sys
from pathlib import Path

import pytest
import typer

import comcat
from comcat import customize
from comcat.cli import app

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "docs_build"))

from commands import command_reference  # noqa: E402
from public_names import public_names, with_the_rest  # noqa: E402
from result_pages import SECTIONS, result_pages  # noqa: E402
from tables import pivot, split_key, spread  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results"
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def commands(group: object, name: str) -> dict[str, object]:
    found = {}
    for child, command in group.commands.items():
        found[f"{name} {child}"] = command
        if hasattr(command, "commands"):
            found |= commands(command, f"{name} {child}")
    return found


def test_every_command_and_option_is_described():
    page = command_reference()
    for name, command in commands(typer.main.get_command(app), "comcat").items():
        if hasattr(command, "commands") and not command.invoke_without_command:
            continue
        section = page.partition(f"## {name}\n")[2].partition("\n## ")[0]
        assert section, name
        for parameter in command.params:
            if parameter.param_type_name == "option" and not parameter.hidden:
                assert f"`{parameter.opts[0]}" in section, (name, parameter.opts)
        assert "[dim]" not in section
        assert "[bold]" not in section


def test_tables_are_the_figures():
    pages = result_pages(RESULTS)
    made = json.loads((RESULTS / "training_free.json").read_text())["cells"]
    page = pages["results/accuracy.md"]
    for row in ("calibrated, uniform", "loss-aware, probe"):
        values = [made[f"c/{row}/0.5/{seed}"] for seed in range(3)]
        line = next(line for line in page.splitlines() if line.startswith(f"| {row} "))
        assert f"| {spread(values)} |" in line
    assert f"Dense: {made['dense']:.4g}" in page
    tuned = json.loads((RESULTS / "finetuned.json").read_text())["cells"]["comcat, search/0.1/0"]
    assert f"{tuned['top-1 before']:.2f} → {tuned['top-1 after']:.2f}" in pages["results/finetuning.md"]
    for pattern, section in SECTIONS.items():
        assert list(RESULTS.glob(f"{pattern}.json")), pattern
        assert (ROOT / "benchmarks" / section.script).is_file()


def test_files_without_a_section_are_shown_as_they_are(tmp_path):
    (tmp_path / "new_thing.json").write_text(json.dumps({"rows": [{"model": "a|b", "ms": 1.25, "all": [1, 2]}]}))
    (tmp_path / "no_rows.json").write_text(json.dumps({"cells": {}}))
    page = result_pages(tmp_path)["results/more.md"]
    assert "## new thing" in page
    assert "| a\\|b | 1.25 |" in page
    assert "no rows" not in page


def test_pivot():
    cells = {"dense": 9.0, "a/0.5/0": 1.0, "a/0.5/1": 3.0, "a/0.25/0": 2.0, "b | c | 0.5 | 0": 4.0}
    assert pivot(cells, "kept", "kept").splitlines() == [
        "| kept | 50 % | 25 % |",
        "|---|--:|--:|",
        "| a | 2.00 ±1.41 | 2.00 |",
        "| b, c | 4.00 |  |",
    ]
    assert pivot({"a/0.2/0": 1.0}, "cut", "cut").startswith("| cut | 80 % |")
    assert split_key("dense | timm") == ("dense, timm", None)


@pytest.mark.parametrize(("package", "page"), [("comcat", "python"), ("comcat.customize", "customize")])
def test_no_public_name_is_left_out(package, page):
    module = {"comcat": comcat, "comcat.customize": customize}[package]
    names = [name for name in module.__all__ if not name.startswith("_")]
    assert public_names(package) == names
    text = (ROOT / "docs" / "reference" / f"{page}.md").read_text()
    whole = with_the_rest(text, package)
    for name in names:
        assert f"::: {package}.{name}\n" in whole or name.endswith("Error")
    described = re.findall(rf"^::: {package}\.(\w+)$", text, re.M)
    assert set(described) <= {*names, "errors"}


@pytest.mark.parametrize("page", PAGES, ids=[str(page.relative_to(ROOT)) for page in PAGES])
def test_python_on_pages_is_python(page):
    """It parses, and takes nothing of comcat that is not there."""
    for block in re.findall(r"```python\n(.*?)```", page.read_text(), re.S):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "comcat":
                assert hasattr(comcat, node.attr), node.attr
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "customize":
                assert hasattr(customize, node.attr), node.attr
