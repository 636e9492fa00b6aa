"""A few damaged files of every kind: read, or refused by name; benchmarks/fuzz.py runs thousands of them."""

import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import fuzz


@pytest.fixture(scope="module")
def watch(tmp_path_factory: Any) -> Any:
    return fuzz.Watch(tmp_path_factory.getbasetemp())


@pytest.mark.filterwarnings("ignore")  # a damaged file may be read with a warning
@pytest.mark.parametrize("kind", fuzz.KINDS)
def test_damaged_files_are_read_or_refused(kind: str, watch: Any, tmp_path: Path) -> None:
    count = 6 if "checkpoint" in kind or kind == "parquet" else 15
    counts, bad = fuzz.fuzz(kind, count, 3, tmp_path, watch)
    assert not bad
    assert counts["accepted"] + counts["refused"] == count
