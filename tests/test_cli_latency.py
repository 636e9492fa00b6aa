"""``comcat compress`` to a latency: measured once, kept in a file, shown beside what was measured; made-up times."""

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import save_file
from torch import nn

import comcat
from comcat.models.opening import load_model
from comcat.planning import timing
from conftest import randomize
from test_cli import ARGS, NAME, Result, compress, model_options, place  # noqa: F401 - a fixture
from test_latency import measure

# ruff: noqa: F811 - fixtures are named like what they are imported as


def test_the_command_measures_once(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "latency.json"
    original = timing.measure_latency
    made: list[comcat.LatencyTable] = []

    def made_up(model: nn.Module, batch_size: int, **_: Any) -> comcat.LatencyTable:
        with pytest.MonkeyPatch.context() as patch:
            made.append(measure(patch, model, original, batch_size=batch_size, widths=5, rounds=1))
        return made[-1]

    monkeypatch.setattr(timing, "measure_latency", made_up)
    options = ["--method", "spectrum", "--calibration", tmp_path / "stats", "--rank-multiple", 1, "--latency", file]
    first = compress(place, tmp_path / "a", "--keep-latency", 0.6, "--latency-batch", 3, *options, "--json")
    assert first.code == 0, first.err
    latency = json.loads(first.out)["latency"]
    assert latency["batch_size"] == 3
    assert 0.59 < latency["planned_ms"] / latency["planned_dense_ms"] <= 0.6
    assert latency["compressed_ms"] > 0
    second = compress(place, tmp_path / "b", "--max-latency", made[0].dense * 0.7e-6, *options)
    assert second.code == 0, second.err
    assert "latency read from" in second.err
    assert "batches of 3" in second.err
    assert "latency of a batch of 3" in second.out
    assert "measured" in second.out
    assert len(made) == 1
    other = compress(place, tmp_path / "c", "--keep-latency", 0.6, "--latency-batch", 5, *options)
    assert other.code == 1
    assert "measured with batches of 3, not 5. Leave --latency-batch out" in other.err
    short = randomize(load_model(NAME, model_args={**ARGS, "depth": 1}, pretrained=False))
    save_file(short.state_dict(), tmp_path / "other.safetensors")
    shape = ["--checkpoint", tmp_path / "other.safetensors", *model_options(place)[2:], "--model-arg", "depth=1",
             "--data-free"]  # fmt: skip
    foreign = Result(["compress", NAME, *shape, "--keep-latency", 0.6, "--latency", file, "--out", tmp_path / "d"])
    assert (foreign.code, "measured on another model" in foreign.err) == (1, True)
    far = compress(place, tmp_path / "e", "--keep-latency", 0.001, *options)
    assert (far.code, "out of reach" in far.err) == (1, True)
    assert not (tmp_path / "c").exists()
    assert not (tmp_path / "e").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--keep", 0.5, "--latency", "x.json"], "belongs to --keep-latency or --max-latency"),
        (["--keep", 0.5, "--keep-latency", 0.5], "exactly one of --keep, --keep-macs, --keep-latency"),
        (["--keep-latency", 0.5, "--of", "parts"], "leave of='parts' out"),
        (["--max-latency", 0], "--max-latency"),
    ],
)
def test_bad_options_are_refused(place: Path, tmp_path: Path, options: list[Any], message: str) -> None:
    result = compress(place, tmp_path / "out", *options)
    assert result.code != 0
    assert message in result.err.replace("│ │ ", "")
    assert not (tmp_path / "out").exists()
