"""Files of other runtimes: what they compute, what they say of themselves, and what cannot be one."""

import errno
import json
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typer.testing import CliRunner

import comcat
from comcat import CheckpointError, ExportError
from comcat.cli import app
from comcat.exporting import file_format as file_format_module
from comcat.exporting.file_metadata import KEY, SIDECAR
from comcat.exporting.formats import FORMAT_NAMES, file_format
from comcat.exporting.parity import compare
from comcat.exporting.resampling import products_for_resizing
from comcat.exporting.splits import slice_for_split
from comcat.exporting.tracing import blaming, layer_of
from comcat.runtimes import session
from conftest import images, randomize, swin, vit

F32 = MappingProxyType({"dtype": torch.float32})
#: Rounding of float32 through two layers, of the largest output.
ROUNDING = 2e-6


def compressed(model: nn.Module, qk: int = 2, vo: int = 4) -> nn.Module:
    layers = {name: {"qk": qk, "vo": vo} for name, m in model.named_modules() if name.endswith("attn")}
    return comcat.compress(model, comcat.Plan(layers)).eval()


@pytest.fixture(scope="module")
def small() -> nn.Module:
    model = compressed(vit(**F32))
    model.pretrained_cfg = {**model.pretrained_cfg, "mean": (0.1, 0.2, 0.3), "std": (0.5, 0.6, 0.7)}
    return model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("exported")


def exported(model: nn.Module, folder: Path, to: str, name: str = "small", **options: Any) -> comcat.ExportReport:
    if to != "torch":
        pytest.importorskip({"onnx": "onnxscript"}.get(to, to))
    return comcat.export(model, folder / f"{name}{file_format(to).suffix}", to, **options)


def run(report: comcat.ExportReport, x: Tensor, precision: str = "fp32") -> list[np.ndarray]:
    if report.format == "torch":
        return [t.numpy() for t in torch.export.load(report.path).module(check_guards=False)(x)]
    runtime = {"onnx": "onnxruntime"}.get(report.format, report.format)
    return session(report.path, runtime, precision)(x.numpy())


def assert_close(got: Any, wanted: Any, rounding: float = ROUNDING) -> None:
    assert got.shape == tuple(wanted.shape)
    np.testing.assert_allclose(got, wanted, rtol=0, atol=rounding * float(abs(wanted).max()))


def metadata(report: comcat.ExportReport) -> dict[str, str]:
    if report.format == "onnx":
        import onnx

        return {entry.key: entry.value for entry in onnx.load(report.path).metadata_props}
    if report.format == "openvino":
        from comcat.runtimes.openvino_runtime import openvino_module

        model = openvino_module().Core().read_model(report.path)
        return {key: value.astype(str) for key, value in model.get_rt_info([KEY]).astype(dict).items()}
    extra = {KEY + SIDECAR: ""}
    torch.export.load(report.path, extra_files=extra)
    return json.loads(extra[KEY + SIDECAR])


@pytest.mark.parametrize("to", ["onnx", "openvino", "torch"])
def test_a_file_computes_what_the_model_computes_and_says_what_it_is(small: nn.Module, folder: Path, to: str) -> None:
    report = exported(small, folder, to)
    assert dict(report.inputs) == {"images": ("batch", 3, 14, 21)}
    assert dict(report.outputs) == {"logits": ("batch", 11)}
    assert report.relative is not None
    assert report.relative <= ROUNDING
    assert (report.images, report.real, report.notes) == (8, False, [])
    files = sorted(folder.glob(f"small{file_format(to).suffix}")) + ([folder / "small.bin"] if to == "openvino" else [])
    assert report.bytes == sum(file.stat().st_size for file in files)
    x = images(small, 4)
    with torch.no_grad():
        assert_close(run(report, x)[0], small(x).numpy())
    said = metadata(report)
    assert said["comcat_version"] == comcat.__version__
    assert (said["format"], said["precision"], said["library"]) == (to, "fp32", "timm")
    assert said["source"] == "vit_tiny_patch16_224"
    prepared = json.loads(said["preprocessing"])
    assert (prepared["mean"], prepared["std"]) == ([0.1, 0.2, 0.3], [0.5, 0.6, 0.7])
    assert prepared["input_size"] == [3, 14, 21]
    assert (prepared["channel_order"], prepared["value_range"]) == ("RGB", [0, 1])


@pytest.mark.parametrize(
    ("to", "precision", "rounding"),
    [("onnx", "fp16", 4e-3), ("openvino", "fp16", 4e-3), ("openvino", "bf16", 3e-2), ("torch", "bf16", 3e-2)],
)
def test_short_precisions_halve_the_weights_and_round_the_outputs(
    folder: Path, to: str, precision: str, rounding: float
) -> None:
    model = vit(**F32, mlp_ratio=400)
    report = exported(model, folder, to, precision, precision=precision)
    assert report.relative is not None
    assert 1e-5 < report.relative <= rounding
    weights = sum(p.numel() for p in model.parameters())
    graph = 200_000  # the graph itself, whatever the weights
    assert 2 * weights < report.bytes < 2 * weights + graph < 4 * weights
    x = images(model, 4)
    with torch.no_grad():
        got = run(report, x, "bf16" if (to, precision) == ("openvino", "bf16") else "fp32")[0]
        assert got.dtype == np.float32
        assert_close(got, model(x).numpy(), rounding)


def test_narrow_heads_are_not_padded_where_the_runtime_takes_them(small: nn.Module, folder: Path) -> None:
    import onnx

    report = exported(small, folder, "onnx", "graph")
    graph = onnx.load(report.path).graph
    found = Counter(node.op_type for node in graph.node)
    assert not found["Pad"]
    assert found["Softmax"] == 2
    assert found["MatMul"] == 2 * (2 + 2 + 2)  # two blocks: attention, its projections, the MLP; the head is a Gemm
    assert not any(node.metadata_props or node.doc_string for node in graph.node)  # paths of this machine
    shapes = [[d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim] for v in (*graph.input, *graph.output)]
    assert shapes == [["batch", 3, 14, 21], ["batch", 11]]


def test_sequences_first_in_fp16(folder: Path) -> None:
    """ONNX Runtime ends the process over fp16 products of transposed sequences, and so there are none."""
    import onnx
    from torchvision.models import VisionTransformer

    model = randomize(VisionTransformer(14, 7, 2, 3, 15, 17, num_classes=11)).eval()
    report = exported(model, folder, "onnx", "sequences", precision="fp16")
    assert report.relative is not None
    assert report.relative <= 4e-3
    graph = onnx.load(report.path).graph
    makers = {name: node for node in graph.node for name in node.output}
    weights = {value.name for value in graph.initializer}
    products = [node for node in graph.node if node.op_type == "MatMul" and node.input[1] in weights]
    assert len(products) == 2 * 3  # input projection and MLP; the others are a Gemm
    assert not any(makers[node.input[0]].op_type == "Transpose" for node in products)


@pytest.mark.parametrize("name", ["vit features", "clip"])
def test_inputs_and_outputs_by_name(name: str, folder: Path) -> None:
    pytest.importorskip("transformers")
    from transformers_hosts import make

    report = exported(make(name), folder, "torch", name)
    if name == "clip":
        assert report.inputs == {"pixel_values": ("batch", 3, 14, 14), "input_ids": ("batch", 11)}
        assert report.outputs["logits_per_image"] == ("batch", "batch")
        assert report.outputs["vision_model_output.last_hidden_state"] == ("batch", 5, 15)
    else:
        assert report.inputs == {"pixel_values": ("batch", 3, 14, 14)}
        assert report.outputs == {"last_hidden_state": ("batch", 5, 15), "pooler_output": ("batch", 15)}
    assert report.notes == ["the model does not say how its images are normalized, and so the file does not"]


def test_a_saved_directory_with_images_and_a_fixed_batch(small: nn.Module, folder: Path) -> None:
    comcat.save(small, folder / "saved")
    given = [(images(small, 5), torch.zeros(5)), (images(small, 5, seed=3), torch.zeros(5))]
    report = exported(folder / "saved", folder, "torch", "fixed", dynamic_batch=False, batch_size=3, images=given)
    assert report.inputs == {"images": (3, 3, 14, 21)}
    assert (report.images, report.batches, report.real) == (9, (3, 3, 3), True)
    assert metadata(report)["source"] == "vit_tiny_patch16_224"


def test_images_of_any_size(folder: Path) -> None:
    model = vit(**F32, dynamic_img_size=True)
    report = exported(model, folder, "torch", "sizes", dynamic_size=True, input_size=(3, 28, 21))
    assert report.inputs == {"images": ("batch", 3, "height", "width")}
    x = torch.randn(2, 3, 14, 35)
    with torch.no_grad():
        assert_close(run(report, x)[0], model(x).numpy())


@pytest.mark.parametrize("name", ["vit", "dinov2"])
def test_models_of_transformers_take_any_size(name: str, folder: Path) -> None:
    pytest.importorskip("transformers")
    from transformers_hosts import make

    model = make(name)
    report = exported(model, folder, "torch", f"sizes {name}", dynamic_size=True)
    assert report.inputs == {"pixel_values": ("batch", 3, "height", "width")}
    assert report.batches[-1] == 1  # of another size
    x = torch.randn(2, 3, 14, 35)
    more = {} if name == "dinov2" else {"interpolate_pos_encoding": True}
    with torch.no_grad():
        assert_close(run(report, x)[0], model(x, **more)[0].numpy())


def test_positions_are_resized_where_the_runtime_has_no_operator_for_it(folder: Path) -> None:
    model = compressed(vit(**F32, dynamic_img_size=True))
    report = exported(model, folder, "openvino", "sizes", dynamic_size=True, input_size=(3, 28, 21))
    assert report.inputs == {"images": ("batch", 3, "height", "width")}
    for size in ((14, 35), (14, 21), (49, 7)):
        x = torch.randn(2, 3, *size)
        with torch.no_grad():
            assert_close(run(report, x)[0], model(x).numpy())


@pytest.mark.parametrize("mode", ["bilinear", "bicubic"])
@pytest.mark.parametrize("size", [(11, 13), (3, 5), (7, 2), (5, 7)])
def test_resizing_by_products(mode: str, size: tuple[int, int]) -> None:
    class Resize(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return F.interpolate(x, size, mode=mode, antialias=True)

    x = torch.randn(2, 3, 5, 7)
    program = products_for_resizing(torch.export.export(Resize(), (x,)))
    assert not any("upsample" in str(node.target) for node in program.graph.nodes)
    assert_close(program.module()(x), F.interpolate(x, size, mode=mode, antialias=True))


def test_shifted_windows(folder: Path) -> None:
    report = exported(compressed(swin(**F32), 2, 3), folder, "openvino", "swin")
    assert report.relative is not None
    assert report.relative <= ROUNDING


# -- refusals ---------------------------------------------------------------------------------------------------------


def left_behind(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize(
    ("name", "to", "options", "text"),
    [
        ("a.onnx", "tensorrt", {}, "unknown format 'tensorrt'; choose from onnx, openvino, torch"),
        ("a.pt", "onnx", {}, r"does not end in \.onnx"),
        ("a.onnx", "onnx", {"precision": "int4"}, "unknown precision 'int4'; choose from fp32, fp16, bf16, int8"),
        ("a.onnx", "onnx", {"precision": "bf16"}, "no bf16 kernels for processors.*choose fp32 or fp16"),
        ("a.pte", "executorch", {"precision": "bf16"}, "XNNPACK has no bf16 kernels"),
        ("a.tflite", "litert", {}, r"holds batches of one size: give dynamic_batch=False and batch_size \(--batch N\)"),
        ("a.tflite", "litert", {"dynamic_batch": False, "dynamic_size": True}, "images of one size"),
    ],
)
def test_what_a_format_cannot_be(
    small: nn.Module, tmp_path: Path, name: str, to: str, options: dict[str, Any], text: str
) -> None:
    with pytest.raises(ExportError, match=text):
        comcat.export(small, tmp_path / name, to, **options)
    assert left_behind(tmp_path) == []


@pytest.mark.parametrize("to", [name for name in FORMAT_NAMES if name != "torch"])
def test_a_missing_package_is_named_with_its_pip_line(to: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(file_format_module, "find_spec", lambda name: None)
    target = file_format(to)
    extra = {"onnx": "onnx", "openvino": "openvino"}.get(to, to)
    with pytest.raises(ExportError, match=rf"needs {target.packages[0]}.*pip install 'comcat\[{extra}\]'"):
        comcat.export("nothing", tmp_path / f"a{target.suffix}", to, dynamic_batch=False)


def test_places_that_cannot_be_written(small: nn.Module, tmp_path: Path) -> None:
    there = tmp_path / "a.pt2"
    there.write_text("mine")
    with pytest.raises(CheckpointError, match="exists already"):
        comcat.export(small, there, "torch")
    (tmp_path / "b.pt2").mkdir()
    with pytest.raises(CheckpointError, match="is a directory"):
        comcat.export(small, tmp_path / "b.pt2", "torch", overwrite=True)
    with pytest.raises(CheckpointError, match="is a file; choose another place"):
        comcat.export(small, there / "c.pt2", "torch")
    assert there.read_text() == "mine"


def test_a_full_disk(small: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(type(file_format("torch")), "write", full)
    with pytest.raises(CheckpointError, match="No space left on device; nothing was written there"):
        comcat.export(small, tmp_path / "new" / "a.pt2", "torch")
    assert left_behind(tmp_path) == []


def test_openvino_on_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("openvino")
    from comcat.runtimes.openvino_runtime import openvino_module

    def full(*_: Any, **__: Any) -> None:
        raise RuntimeError("basic_ios::clear: iostream error")

    monkeypatch.setattr(openvino_module(), "save_model", full)
    with pytest.raises(CheckpointError, match=r"iostream error\); is there space on the disk\?; nothing was written"):
        comcat.export(vit(**F32, depth=1), tmp_path / "a.xml", "openvino")
    assert left_behind(tmp_path) == []


def test_a_file_that_computes_something_else_is_not_written(
    small: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.pt2"
    comcat.export(small, path, "torch")
    before = path.read_bytes()
    right = type(file_format("torch")).opened

    def wrong(*args: Any) -> Any:
        run = right(*args)
        return lambda batch: [one * 1.01 for one in run(batch)]

    monkeypatch.setattr(type(file_format("torch")), "opened", wrong)
    with pytest.raises(ExportError, match=r"output 'logits' differs by 0\.01 of its.*nothing was written"):
        comcat.export(small, path, "torch", overwrite=True)
    assert path.read_bytes() == before
    assert left_behind(tmp_path) == ["a.pt2"]
    report = comcat.export(small, path, "torch", overwrite=True, tolerance=0.02)
    assert report.relative == pytest.approx(0.01, rel=1e-3)


def test_a_file_that_cannot_run_here_is_said_to_be_unchecked(
    small: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(type(file_format("torch")), "opened", lambda *_: None)
    report = comcat.export(small, tmp_path / "a.pt2", "torch")
    assert (report.absolute, report.relative, report.images) == (None, None, 0)
    assert report.notes == ["not compared with PyTorch: files of torch.export do not run on this machine"]


def test_differences() -> None:
    a = np.array([[1.0, -2.0]])
    assert compare("x", [[a]], [[a + 0.5]]).relative == 0.25
    assert compare("x", [[a]], [[a * np.inf]]).relative == np.inf
    assert compare("xy", [[a, 100 * a]], [[a, 101 * a]]).output == "y"
    with pytest.raises(ExportError, match="2 outputs, and the model 1"):
        compare("x", [[a]], [[a, a]])
    with pytest.raises(ExportError, match="output 'x' of the file is 2 x 1, and that of the model 1 x 2"):
        compare("x", [[a]], [[a.T]])


class Odd(nn.Module):
    """An operator that other runtimes do not have."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.special.bessel_j0(x)


class Decides(nn.Module):
    """A forward that looks at values."""

    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum() > 0 else -x


class DecidesBySize(nn.Module):
    """A forward that looks at the number of tokens."""

    def forward(self, x: Tensor) -> Tensor:
        return x if x.shape[1] == 7 else -x


class FirstThree(nn.Module):
    """A batch of three alone."""

    def forward(self, x: Tensor) -> Tensor:
        return x.reshape(3, -1, x.shape[-1])[:, :1].reshape(len(x), -1)


@pytest.mark.parametrize("to", ["onnx", "openvino"])
def test_an_unknown_operator_is_named_with_its_layer(to: str, tmp_path: Path) -> None:
    model = vit(**F32)
    model.blocks[1].mlp.act = Odd()
    with pytest.raises(ExportError, match=r"operator aten\.special_bessel_j0 in module 'blocks\.1\.mlp\.act'"):
        exported(model, tmp_path, to)
    assert left_behind(tmp_path) == []


def test_an_operator_that_a_converter_calls_otherwise_is_named() -> None:
    """What ``aten.erfinv`` is called where it is taken apart."""

    class Inner(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.special.erfinv(x).exp()

    program = torch.export.export(nn.Sequential(nn.Identity(), Inner()), (torch.zeros(2, 3),), strict=False)
    message = r"A cannot express operator aten\.(special_)?erfinv in module '1' \("
    with pytest.raises(ExportError, match=message), blaming(program, "A"):
        raise RuntimeError("No ONNX function found for <OpOverload(op='prims.erf_inv', overload='default')>")


def test_a_forward_that_is_no_graph_is_named_with_its_layer(tmp_path: Path) -> None:
    model = vit(**F32)
    model.blocks[1].mlp.act = Decides()
    with pytest.raises(ExportError, match=r"module 'blocks\.1\.mlp\.act' of the VisionTransformer cannot become one"):
        comcat.export(model, tmp_path / "a.pt2", "torch", dynamic_batch=False)


def test_sizes_that_the_model_does_not_take(small: nn.Module, tmp_path: Path) -> None:
    path = tmp_path / "a.pt2"
    with pytest.raises(comcat.ModelError, match="does not run on images of size"):
        comcat.export(small, path, "torch", input_size=(3, 28, 28))
    with pytest.raises(ExportError, match="images are of 3 x 28 x 28, and the file will take those of 3 x 14 x 21"):
        comcat.export(small, path, "torch", images=torch.zeros(2, 3, 28, 28))
    with pytest.raises(ExportError, match="there are no images"):
        comcat.export(small, path, "torch", images=[])
    with pytest.raises(ExportError, match="leave dynamic_size out"):
        comcat.export(small, path, "torch", dynamic_size=True)
    sized = vit(**F32, dynamic_img_size=True)
    sized.blocks[1].mlp.act = DecidesBySize()
    with pytest.raises(ExportError, match=r"does not take images of 3 x 28 x 42, .*decides by their size"):
        comcat.export(sized, path, "torch", dynamic_size=True)
    assert left_behind(tmp_path) == []


@pytest.mark.parametrize(
    "split",
    [
        lambda x: x.split([2, 3], -1),
        lambda x: x.split(2, dim=1)[:2],
        lambda x: x.chunk(3, -1)[::2],
        lambda x: x.tensor_split(2, 1),
        lambda x: torch.split_with_sizes(x, [4, 1], 1),
    ],
)
def test_slices_for_splits(split: Callable[[Tensor], Sequence[Tensor]]) -> None:
    class Split(nn.Module):
        def forward(self, x: Tensor) -> Sequence[Tensor]:
            a, b = split(x)
            return a + 1, b * 2

    x = torch.arange(10.0).view(2, 5)
    program = torch.export.export(Split(), (x,))
    slice_for_split(program.graph_module.graph)
    assert not any("split" in str(node.target) or "chunk" in str(node.target) for node in program.graph.nodes)
    for got, wanted in zip(program.module()(x), Split()(x), strict=True):
        assert torch.equal(got, wanted)
    assert {layer_of(node) for node in program.graph.nodes} == {""}


# -- the command ------------------------------------------------------------------------------------------------------


def test_the_command(small: nn.Module, folder: Path) -> None:
    comcat.save(small, folder / "command")
    target = folder / "command.pt2"
    words = ["export", str(folder / "command"), "--to", "torch", "--out", str(target), "--mean", "0.5", "0.5", "0.5"]
    result = CliRunner().invoke(app, [*words, "--json"])
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report["path"] == str(target)
    assert report["bytes"] == target.stat().st_size
    assert report["relative"] <= ROUNDING
    extra = {KEY + SIDECAR: ""}
    torch.export.load(target, extra_files=extra)
    assert json.loads(json.loads(extra[KEY + SIDECAR])["preprocessing"])["mean"] == [0.5, 0.5, 0.5]
    again = CliRunner().invoke(app, words)
    assert again.exit_code == 1
    assert "exists already" in again.output
    said = CliRunner().invoke(app, [*words, "--overwrite", "--batch", "2"])
    assert said.exit_code == 0, said.output
    assert "fp32" in said.output
    assert "images (2 x 3 x 14 x 21) to logits (2 x 11)" in said.output
    assert "on 8 random images" in said.output


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["--to", "onnx", "--out", "a.xml"], "does not end in .onnx"),
        (["--to", "litert", "--out", "a.tflite"], "holds batches of one size"),
        (["--to", "torch", "--out", "a.pt2", "--split", "test"], "belongs to --data"),
    ],
)
def test_the_command_refuses(words: list[str], text: str) -> None:
    result = CliRunner().invoke(app, ["export", "nothing", *words])
    assert result.exit_code in (1, 2)
    assert text in " ".join(result.output.replace("│", " ").split())
