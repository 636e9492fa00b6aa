"""What MkDocs runs while it builds the site: pages that nobody writes by hand.

Tables come from ``benchmarks/results``, the reference of the command line from the commands themselves. Pages of the
runtimes are in the navigation where they are there.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(ROOT / "src"))

from commands import command_reference  # noqa: E402
from public_names import with_the_rest  # noqa: E402
from result_pages import result_pages  # noqa: E402

#: Pages of the reference, and the package whose public names they describe.
REFERENCES = {"reference/python.md": "comcat", "reference/customize.md": "comcat.customize"}
#: Pages about running models elsewhere, title by file.
RUNTIMES = {
    "export.md": "Export",
    "quantize.md": "Quantize",
    "how-to/quantize.md": "Quantize",
}


def on_config(config: Any) -> Any:
    """Add the pages of the runtimes behind those of the libraries, and those that no list names at the end."""
    folder = ROOT / "docs"
    found = [{title: name} for name, title in RUNTIMES.items() if (folder / name).is_file()]
    if found:
        config.nav.insert(2, {"Runtimes": found})
    listed = set(_names(config.nav))
    pages = sorted(file.relative_to(folder).as_posix() for file in folder.rglob("*.md"))
    pages += result_pages(ROOT / "benchmarks" / "results")
    if rest := [name for name in pages if name not in listed]:
        config.nav.append({"More": rest})
    return config


def _names(nav: Any) -> Iterator[str]:
    if isinstance(nav, str):
        yield nav
    for entry in nav.values() if isinstance(nav, dict) else nav if isinstance(nav, list) else ():
        yield from _names(entry)


def on_files(files: Files, config: Any) -> Files:
    """Add the pages that are made here."""
    pages = {"reference/cli.md": command_reference(), **result_pages(ROOT / "benchmarks" / "results")}
    for name, text in pages.items():
        files.append(File.generated(config, name, content=text))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """No public name is missing from the reference."""
    package = REFERENCES.get(page.file.src_uri)
    return markdown if package is None else with_the_rest(markdown, package)
