"""A bench: which rows there are, what they are compared with, what is left out, the table, the picture, the command."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from torch import nn

import comcat
from comcat import runtimes
from comcat.errors import ComcatError, ModelError
from comcat.report.bench_figure import pareto
from comcat.report.bench_table import bench_tables
from comcat.runtimes import bench as bench_module
from comcat.runtimes.torch_runtime import TorchSession
from conftest import images, vit
from test_cli import ARGS, NAME, Result, compress, place  # noqa: F401 - a fixture
from test_cli_errors import refused
from test_runtimes import file, host, needs  # noqa: F401 - fixtures

HERE = Path(__file__)

# ruff: noqa: F811 - fixtures are named like what they are imported as


@pytest.fixture
def made_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every session takes 1 ms more than the one before it, and as many milliseconds as there are images."""

    def times(sessions: Any, inputs: Any, rounds: int, *_: Any) -> list[list[float]]:
        return [[1e-3 * (i + len(given[0]))] * rounds for i, given in enumerate(inputs)]

    monkeypatch.setattr(bench_module, "in_turns", times)


def small(host: nn.Module) -> nn.Module:
    return comcat.compress(host, comcat.Plan({"blocks.0.attn": {"qk": 2, "vo": 3}, "blocks.1.mlp": {"neurons": 5}}))


@pytest.mark.usefixtures("made_up")
def test_models_are_compared_with_the_first_in_the_same_runtime_and_precision(host: nn.Module) -> None:
    models = {"dense": host, "half": small(host)}
    found = comcat.bench(models, ["torch"], ["fp32", "bf16"], [1, 3], threads=1)
    assert [(row.batch_size, row.precision, row.model) for row in found.rows] == [
        (batch, precision, model) for batch in (1, 3) for precision in ("fp32", "bf16") for model in models
    ]
    for i, row in enumerate(found.rows):
        took = i % 4 + row.batch_size
        assert row.median_ms == row.low_ms == row.high_ms == pytest.approx(took)
        assert row.images_per_second == pytest.approx(1e3 * row.batch_size / took)
        assert row.speedup == pytest.approx((took - (row.model == "half")) / took)
    dense, half = found.rows[:2]
    assert (dense.mac_ratio, dense.bytes) == (1, sum(4 * t.numel() for t in host.state_dict().values()))
    assert half.mac_ratio == pytest.approx(dense.macs / half.macs)
    assert half.macs < dense.macs
    assert half.params < dense.params
    assert not found.left_out
    assert set(found.machine["runtimes"]) == {"torch"}


@pytest.mark.usefixtures("made_up")
def test_files_run_where_they_are_read(host: nn.Module, file: Path) -> None:
    needs("onnxruntime")
    found = comcat.bench({"dense": host, "file": file}, ["torch", "onnxruntime"], batch_sizes=[2])
    assert [(row.runtime, row.model) for row in found.rows] == [
        ("torch", "dense"),
        ("onnxruntime", "dense"),
        ("onnxruntime", "file"),
    ]
    assert found.rows[2].speedup == pytest.approx(3 / 4)
    assert found.rows[2].macs is None
    assert found.rows[2].bytes == sum(part.stat().st_size for part in file.parent.glob("model.onnx*"))


def test_scores_are_those_of_the_session(host: nn.Module) -> None:
    x = images(host, 12)
    with torch.no_grad():
        labels = host(x).argmax(1)
    labels[:3] = (labels[:3] + 1) % 11
    found = comcat.bench({"dense": host}, ["torch"], ["fp32"], [1], rounds=1, loader=[(x, labels)])
    assert (found.rows[0].accuracy, found.rows[0].metric, found.rows[0].unit, found.images) == (75.0, "top-1", "%", 12)


def test_times_are_measured(host: nn.Module) -> None:
    seen: list[Any] = []
    found = comcat.bench(
        {"a": host, "b": host}, ["torch"], batch_sizes=[2], rounds=3, progress=lambda *a: seen.append(a)
    )
    assert all(0 < row.low_ms <= row.median_ms <= row.high_ms for row in found.rows)
    assert seen[:2] == [("export and open", 1, 2), ("export and open", 2, 2)]
    assert ("warm up, batches of 2", 2, 2) in seen
    assert seen[-1] == ("batches of 2", 4, 4)


@pytest.mark.usefixtures("made_up")
def test_what_a_runtime_cannot_do_is_left_out_unless_it_was_asked_for(
    host: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any, **__: Any) -> Any:
        raise ModelError("no such thing")

    monkeypatch.setattr(bench_module, "available", lambda: ["torch", "onnxruntime"])
    monkeypatch.setattr("comcat.runtimes.bench_candidate.whole_session", broken)
    missing = "nothing to measure: a, b in torch in fp32: no such thing; a, b in onnxruntime in fp32: no such"
    with pytest.raises(ComcatError, match=missing):
        comcat.bench({"a": host, "b": host})
    with pytest.raises(ModelError, match=r"^no such thing"):
        comcat.bench({"dense": host}, ["torch"])
    monkeypatch.undo()
    assert comcat.bench({"dense": host}, ["torch"], ["int8", "fp32"], [1], rounds=1).left_out == [
        "torch in int8: give a file of comcat export --int8 beside the models"
    ]


@pytest.mark.usefixtures("made_up")
def test_a_session_that_fails_for_one_batch_size_costs_no_other_figure(
    host: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = TorchSession.__call__

    def flawed(self: TorchSession, *arrays: np.ndarray) -> Any:
        if self.precision == "bf16" and len(arrays[0]) == 3:
            raise ModelError("no batches of three")
        return run(self, *arrays)

    monkeypatch.setattr(bench_module, "available", lambda: ["torch"])
    monkeypatch.setattr(TorchSession, "__call__", flawed)
    found = comcat.bench({"dense": host}, None, ["fp32", "bf16"], [2, 3, 5])
    assert [(row.batch_size, row.precision) for row in found.rows] == [
        (2, "fp32"), (2, "bf16"), (3, "fp32"), (5, "fp32"), (5, "bf16"),
    ]  # fmt: skip
    assert found.left_out == ["dense in torch in bf16, batches of 3: no batches of three"]
    with pytest.raises(ModelError, match=r"^no batches of three"):
        comcat.bench({"dense": host}, ["torch"], ["bf16"], [3])


def test_more_images_than_memory(host: nn.Module) -> None:
    with pytest.raises(ModelError, match=r"batches of 100,000,000,000,000 images: choose smaller ones \(--batch\)"):
        comcat.bench({"dense": host}, ["torch"], batch_sizes=[10**14])


def test_files_of_one_batch_size_are_measured_with_it(host: nn.Module, tmp_path: Path) -> None:
    needs("onnxruntime")
    comcat.export(host, tmp_path / "three.onnx", dynamic_batch=False, batch_size=3)
    models = {"file": tmp_path / "three.onnx"}
    with pytest.raises(ModelError, match=r"three.onnx' takes batches of 3 alone, and 1, 8 are .* \(--batch 3\)"):
        comcat.bench(models)
    found = comcat.bench(models, ["onnxruntime"], batch_sizes=[3], rounds=1)
    assert [(row.batch_size, row.speedup) for row in found.rows] == [(3, 1)]


@pytest.mark.parametrize(
    ("models", "options", "message"),
    [
        ({}, {}, "a model or more"),
        ({"a": 1}, {"batch_sizes": [0]}, "batch sizes and rounds of 1 or more"),
        ({"a": "gone.onnx"}, {}, "'gone.onnx' is no exported file"),
        ({"a": "model.bin"}, {}, "'model.bin' is no exported file"),
        ({"a": 1, "b": 2}, {}, "different sizes: 'a' takes 3 x 14 x 21, 'b' takes 3 x 21 x 21; give models of one"),
    ],
)
def test_bad_arguments_are_refused(models: dict[str, Any], options: dict[str, Any], message: str) -> None:
    made = {1: vit(), 2: vit(img_size=(21, 21))}
    with pytest.raises(ModelError, match=message):
        comcat.bench({name: made.get(one, one) for name, one in models.items()}, ["torch"], **options)


def test_a_runtime_that_is_missing_says_how_to_get_it(host: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtimes.registry, "find_spec", lambda name: None if name == "openvino" else name)
    with pytest.raises(ComcatError, match=r"openvino is not installed: pip install 'comcat\[openvino\]'"):
        comcat.bench({"dense": host}, ["openvino"])


# -- what is shown ----------------------------------------------------------------------------------------------------


def test_the_pareto_front_is_what_nothing_beats() -> None:
    assert pareto([(3, 70), (1, 50), (2, 60), (2, 65), (4, 70), (5, 71)]) == [1, 3, 0, 5]
    points = [tuple(pair) for pair in np.random.default_rng(0).random((40, 2))]
    front = set(pareto(points))
    for i, (x, y) in enumerate(points):
        assert (i in front) == (not any(a <= x and b >= y and (a, b) != (x, y) for a, b in points))


@pytest.mark.usefixtures("made_up")
@pytest.mark.parametrize("scored", [False, True])
def test_the_table_and_the_picture_show_every_model(host: nn.Module, scored: bool, tmp_path: Path) -> None:
    x = images(host, 5)
    loader = [(x, torch.zeros(5, dtype=torch.long))] if scored else None
    found = comcat.bench({"dense": host, "half": small(host)}, ["torch"], loader=loader)
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(bench_tables(found))
    text = console.export_text()
    for row in found.rows:
        for cell in (f" {row.median_ms:.2f} ", f"{row.speedup:.2f} x", f"{row.speedup / row.mac_ratio:.0%}"):
            assert cell in text
    for word in ("torch, fp32", "dense", "half", "Single images", "Batches of 8", found.machine["device"]):
        assert word in text
    assert "…" not in text  # nothing is cut off in a terminal of the usual width
    assert ("top-1" in text) == scored
    found.draw(tmp_path / "bench.png")
    assert (tmp_path / "bench.png").read_bytes().startswith(b"\x89PNG")
    found.save(tmp_path / "bench.json")
    assert json.loads((tmp_path / "bench.json").read_text()) == found.to_dict()


# -- the command ------------------------------------------------------------------------------------------------------


def test_the_command_compares_a_directory_with_its_architecture(place: Path, tmp_path: Path) -> None:
    made = compress(place, tmp_path / "half", "--keep-macs", 0.5, "--data-free", "--method", "uniform", "--no-eval",
                    "--mean", 0.4, 0.5, 0.6, "--std", 0.2, 0.2, 0.2)  # fmt: skip
    assert made.code == 0, made.err
    options = ["--runtime", "torch,torch", "--batch", "2", "--rounds", 1, "--threads", 1]
    result = Result(
        ["bench", tmp_path / "half", *options, "--out", tmp_path / "a.json", "--picture", tmp_path / "a.png"]
    )
    assert result.code == 0, result.err
    assert "architecture with random weights" in result.err
    assert "half" in result.out
    assert [row["model"] for row in json.loads((tmp_path / "a.json").read_text())["rows"]] == ["dense", "half"]
    assert (tmp_path / "a.png").is_file()
    dense = ["--dense", NAME, "--dense-checkpoint", place / "dense.safetensors"]
    dense += [x for k, v in ARGS.items() for x in ("--dense-arg", f"{k}={v}")]
    scored = Result(["bench", tmp_path / "half", *dense, *options, "--data", place / "data", "--json",
                     "--mean", 0.4, 0.5, 0.6, "--std", 0.2, 0.2, 0.2])  # fmt: skip
    assert scored.code == 0, scored.err
    assert {row["metric"] for row in json.loads(scored.out)["rows"]} == {"top-1"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--runtime", "tensorrt"], "unknown runtime 'tensorrt'; choose from torch, torch-compile"),
        (["--precision", "fp64"], "unknown precision 'fp64'; choose from fp32, bf16, fp16, int8"),
        (["--batch", "1,x"], "'1,x' is no list of numbers such as 1,8"),
        (["--batch", "0"], "'0' is no list of numbers"),
        (["gone.onnx"], "there is no file 'gone.onnx'. Correct the name"),
        (["--out", "bench.txt"], "'bench.txt' does not end in .json, which --out writes"),
        (["--out", HERE.parent], "tests' is a directory; give --out the name of a file"),
        (["--picture", "bench.jpg"], "'bench.jpg' does not end in .png, which --picture writes"),
        (["--picture", HERE / "bench.png"], "test_bench.py' is a file; choose another place"),
        (["--checkpoint", "none.safetensors"], "there is no file none.safetensors. Correct --dense-checkpoint"),
    ],
)
def test_bad_options_are_refused(options: list[Any], message: str) -> None:
    result = Result(["bench", *([] if options == ["gone.onnx"] else ["b.onnx"]), *options])
    assert result.code != 0
    assert message in result.err.replace("│ │ ", "")


@pytest.fixture
def saved(host: nn.Module, tmp_path: Path) -> Path:
    """A dense and a compressed directory, which may be benched by their names."""
    comcat.save(host, tmp_path / "dense")
    comcat.save(small(host), tmp_path / "half")
    return tmp_path


def test_files_that_are_no_models(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut short, of something else, without their weights, of another runtime: one line, and nothing is written."""
    for runtime in ("onnxruntime", "openvino"):
        needs(runtime)
    monkeypatch.chdir(saved)
    for name in ("whole.onnx", "whole.xml"):
        comcat.export("half", name, to="onnx" if name.endswith("onnx") else "openvino")
    (saved / "cut.onnx").write_bytes((saved / "whole.onnx").read_bytes()[:999])
    (saved / "cut.xml").write_bytes((saved / "whole.xml").read_bytes()[:999])
    (saved / "alone.xml").write_bytes((saved / "whole.xml").read_bytes())
    for name in ("text.onnx", "text.xml", "other.pt2"):
        (saved / name).write_text("no model")
    before = sorted(saved.iterdir())
    for name, message in (
        ("cut.onnx", "onnxruntime cannot read 'cut.onnx': it is no ONNX file .* write it again with comcat export"),
        ("text.onnx", "onnxruntime cannot read 'text.onnx': it is no ONNX file"),
        ("cut.xml", "openvino cannot read 'cut.xml': (?!Exception from).* write it again with comcat export"),
        ("text.xml", "openvino cannot read 'text.xml': it is no XML"),
        ("alone.xml", "openvino cannot read 'alone.xml': .*bin file cannot be found"),
        ("other.pt2", "'other.pt2' is not timed here: a bench runs .onnx and .xml files"),
        (".", "'.' is not a model saved by comcat: it has no comcat.json. Give a directory that comcat compress"),
    ):
        refused(Result(["bench", name, "--batch", "2", "--out", "bench.json"]), message)
        assert sorted(saved.iterdir()) == before
    refused(Result(["bench", "whole.onnx", "--data", "x"]), "give --dense MODEL too")
    monkeypatch.setattr(runtimes.registry, "find_spec", lambda name: None if name == "openvino" else name)
    refused(Result(["bench", "whole.xml"]), r"openvino is not installed: pip install 'comcat\[openvino\]'")


@pytest.mark.usefixtures("made_up")
def test_the_first_is_a_dense_one_that_is_there(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(saved)
    options = ["--runtime", "torch", "--batch", 1, "--json"]

    def names(*models: object) -> list[str]:
        result = Result(["bench", *models, *options])
        assert result.code == 0, result.err
        return [row["model"] for row in json.loads(result.out)["rows"]]

    assert names("half", "dense") == ["dense", "half"]
    assert names("half") == ["dense", "half"]  # its architecture
    assert names("half", "--dense", "dense") == ["dense", "half"]
    assert names("dense", "half", "--dense", "dense") == ["dense, given", "dense", "half"]
