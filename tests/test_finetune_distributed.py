"""Two processes: as exact as one, and as exact after one of them was killed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "finetune_distributed.py"


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="forks and kills processes")
def test_two_processes(tmp_path):
    arguments = [sys.executable, SCRIPT, "--steps", "16", "--batch", "4", "--json", tmp_path / "result.json"]
    done = subprocess.run([*map(str, arguments)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["exit_codes"] == {"one": [0], "two": [0, 0], "killed": [1, -9], "resumed": [0, 0]}
    assert result["largest_loss_difference"] < 1e-5
    assert "another process of this run has ended" in result["survivor_said"]
    assert "--resume" in result["survivor_said"]
    assert result["resumed_bitwise_equal"]
    assert result["resumed_log_equal"]
