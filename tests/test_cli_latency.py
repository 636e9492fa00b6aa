"""``comcat compress`` to a latency: measured once, kept in a file, shown beside what was measured; made-up times."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import save_file
from torch import nn

import comcat
from comcat import runtimes
from comcat.models.opening import load_model
from comcat.planning import timing
from comcat.runtimes import realizing
from comcat.runtimes.realizing import RuntimeClock
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
        (["--keep", 0.5, "--runtime", "openvino"], "belongs to --keep-latency or --max-latency"),
        (["--keep-latency", 0.5, "--precision", "bf16"], "belong to --runtime"),
        (["--keep-latency", 0.5, "--runtime", "tensorrt"], "unknown runtime 'tensorrt'; choose from torch"),
        (["--keep-latency", 0.5, "--runtime", "torch", "--precision", "int8"], "torch does not compute in 'int8'"),
    ],
)
def test_bad_options_are_refused(place: Path, tmp_path: Path, options: list[Any], message: str) -> None:
    result = compress(place, tmp_path / "out", *options)
    assert result.code != 0
    assert message in result.err.replace("│ │ ", "")
    assert not (tmp_path / "out").exists()


class MadeUpClock(RuntimeClock):
    """A model takes a tenth more of the dense time than its share of MACs."""

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *_: object) -> None: ...

    def seconds(self, small: nn.Module) -> tuple[list[float], list[float]]:
        share = comcat.profile(small).macs / self.table.macs
        return [1.0, 1.0], [1.1 * share, 1.1 * share]


def test_a_budget_is_met_in_the_runtime(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first plan goes by a table that knows MACs, the next ones by what was measured."""
    original, file = timing.measure_latency, tmp_path / "latency.json"

    def made_up(model: Any, batch_size: int, runtime: str, precision: str, threads: int | None, **_: Any) -> Any:
        with pytest.MonkeyPatch.context() as patch:
            made = measure(patch, model, original, batch_size=batch_size, widths=5, rounds=1)
        return replace(made, runtime=runtime, precision=precision, threads=threads or 0)

    monkeypatch.setattr(timing, "measure_latency", made_up)
    monkeypatch.setattr(realizing, "RuntimeClock", MadeUpClock)
    options = ["--method", "uniform", "--data-free", "--no-eval", "--rank-multiple", 1, "--latency", file]
    runtime = ["--runtime", "onnxruntime", "--threads", 2]
    if "onnxruntime" not in runtimes.available():
        pytest.skip("onnxruntime is not installed")
    made = compress(place, tmp_path / "a", "--keep-latency", 0.7, *runtime, *options, "--json")
    assert made.code == 0, made.err
    latency = json.loads(made.out)["latency"]
    assert (latency["runtime"], latency["precision"], latency["threads"]) == ("onnxruntime", "fp32", 2)
    assert abs(latency["realized"]["kept"] / 0.7 - 1) <= 0.05 or len(latency["tried"]) == 3
    assert json.loads((tmp_path / "a" / "report.json").read_text())["latency"] == latency
    for wrong, message in (
        (["--runtime", "torch"], "was measured in onnxruntime and fp32, not in torch and fp32. Leave --runtime out"),
        (["--runtime", "onnxruntime", "--threads", 1], "was measured with 2 threads, not 1. Leave --threads out"),
    ):
        other = compress(place, tmp_path / "b", "--keep-latency", 0.7, *wrong, *options)
        assert (other.code, message in other.err) == (1, True), other.err
    again = compress(place, tmp_path / "c", "--keep-latency", 0.7, *options)
    assert again.code == 0, again.err
    assert "onnxruntime in fp32, batches of 1" in again.err
    assert "in onnxruntime, fp32:" in again.out
    assert "measured" in again.out


def test_a_missing_runtime_is_said_before_any_work(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runtimes.registry, "find_spec", lambda name: None)
    result = compress(place, tmp_path / "out", "--keep-latency", 0.5, "--runtime", "openvino")
    assert (result.code, "pip install 'comcat[openvino]'" in result.err) == (1, True), result.err
    assert not (tmp_path / "out").exists()
