"""Files that are no adapter, or none for this model: refused by name, and nothing is put on."""

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

from comcat import customize
from comcat.errors import CheckpointError, ModelError
from diffusion import changed, fill, model, pipeline, refused
from diffusion import sd1 as sd1_unet


@pytest.fixture(scope="module")
def unet() -> Any:
    return model("sd1", torch.float32)


@pytest.fixture
def saved(unet: Any, tmp_path: Path) -> Path:
    adapter = fill(customize.add_adapter(unet, targets="mid_block", rank=2, name="dog", scale=0.7))
    path: Path = customize.save_adapter(unet, tmp_path / "dog.safetensors")
    adapter.remove()
    return path


# Files that are none


def _zip_pickle(path: Path) -> None:
    torch.save({"a": torch.zeros(2)}, path)


def _legacy_pickle(path: Path) -> None:
    torch.save({"a": torch.zeros(2)}, path, _use_new_zipfile_serialization=False)


NOT_ADAPTERS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "missing": (lambda path: None, "cannot read .*No such file"),
    "folder": (lambda path: path.mkdir(), "is a directory"),
    "empty": (lambda path: path.write_bytes(b""), "damaged or no safetensors"),
    "text": (lambda path: path.write_text("hello, this is no adapter"), "damaged or no safetensors"),
    "zip": (_zip_pickle, "is a pickle, .* never unpickled"),
    "legacy": (_legacy_pickle, "is a pickle, .* never unpickled"),
    "plain pickle": (lambda path: path.write_bytes(pickle.dumps([1, 2])), "is a pickle"),
    "other": (lambda path: save_file({"a": torch.zeros(2)}, path), "lack the entry 'comcat'"),
    "other metadata": (lambda path: save_file({"a": torch.zeros(2)}, path, {"format": "pt"}), "lack the entry"),
    "lora": (lambda path: save_file({"unet.to_q.lora_A.weight": torch.zeros(2)}, path), "is a LoRA.*convert"),
    "no JSON": (lambda path: save_file({"a": torch.zeros(2)}, path, {"comcat": "{"}), "metadata of .* not valid JSON"),
    "deep JSON": (lambda path: save_file({"a": torch.zeros(2)}, path, {"comcat": "[" * 100_000}), "nested too deeply"),
    "a field twice": (
        lambda path: save_file({"a": torch.zeros(2)}, path, {"comcat": '{"format": 1, "format": 1}'}),
        "metadata of .* there twice",
    ),
    "a list": (lambda path: save_file({"a": torch.zeros(2)}, path, {"comcat": "[1]"}), "is damaged"),
}


@pytest.mark.parametrize("case", NOT_ADAPTERS)
def test_not_an_adapter(unet: Any, case: str, tmp_path: Path) -> None:
    make, message = NOT_ADAPTERS[case]
    make(tmp_path / "x.safetensors")
    refused(unet, tmp_path / "x.safetensors", message)


@pytest.mark.parametrize("share", [0.0, 0.001, 0.1, 0.5, 0.999])
def test_truncated(unet: Any, saved: Path, share: float) -> None:
    content = saved.read_bytes()
    saved.write_bytes(content[: int(share * len(content))])
    refused(unet, saved, "damaged or no safetensors")


# Metadata of bad will

LAYER = "mid_block.attentions.0.transformer_blocks.0.attn1"


def entry(data: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = data["components"]["unet"]["layers"][LAYER]
    return found


METADATA: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "newer": (lambda d: d.update(format=3, comcat="9.9"), r"format 3 \(written by comcat 9.9\).*upgrade"),
    "format 0": (lambda d: d.update(format=0), "format 0"),
    "format true": (lambda d: d.update(format=True), "format True"),
    "format text": (lambda d: d.update(format="1"), "format 1"),
    "no format": (lambda d: d.pop("format"), "damaged.*format"),
    "unknown field": (lambda d: d.update(color=1), "damaged: color is not known"),
    "unknown storage": (lambda d: d.update(storage="int4"), "stored as 'int4'"),
    "list storage": (lambda d: d.update(storage=[]), r"stored as \[\]"),
    "no components": (lambda d: d.pop("components"), "damaged.*components"),
    "components": (lambda d: d.update(components=[1]), "damaged"),
    "component": (lambda d: d["components"].update(unet=3), "damaged"),
    "layers": (lambda d: d["components"]["unet"].update(layers=3), "damaged"),
    "layer": (lambda d: d["components"]["unet"]["layers"].update({LAYER: 3}), "damaged"),
    "layer field": (lambda d: entry(d).update(color=3), "damaged"),
    "model": (
        lambda d: d["components"]["unet"].update(model=3),
        r"components\.unet\.model is 3, but should",
    ),
    "scale text": (lambda d: d.update(scale="1"), "damaged: scale is '1', but should be a valid number"),
    "scale nan": (lambda d: d.update(scale=float("nan")), "metadata of .* NaN is no number"),
    "scale huge": (lambda d: d.update(scale=10**400), "metadata of .* does not fit into 64 bits"),
    "name": (lambda d: d.update(name=3), "damaged: name is 3, but should be a valid string"),
    "bad name": (lambda d: d.update(name="a/../b"), "damaged: name is 'a/../b', but should match"),
    "base": (lambda d: d.update(base=[]), r"damaged: base is \[\], but"),
    "base name": (lambda d: d.update(base={"name": 3}), r"damaged: base\.name is 3, but should be a valid string"),
    "token": (lambda d: d.update(token=[]), "damaged"),
    "token text": (
        lambda d: d.update(token={"text": 3, "vectors": 1}),
        r"token\.text is 3, but should",
    ),
    "token empty": (lambda d: d.update(token={}), "damaged"),
    "prompt": (lambda d: d.update(prompt=3), "damaged: prompt is 3, but should be a valid string"),
    "training": (lambda d: d.update(training=3), "damaged: training is 3, but"),
    "biases": (lambda d: entry(d).update(biases=3), r"\.biases is 3, but should be a valid array"),
    "unknown bias": (lambda d: entry(d).update(biases=["sample.query"]), "1 tensors missing .*query.bias"),
    "signature": (lambda d: entry(d).update(signature="0"), "1 of its 2 layers have other heads or widths"),
    "rank 0": (lambda d: entry(d).update(rank=0), "rank 0 .* must be 1 to 10"),
    "rank -1": (lambda d: entry(d).update(rank=-1), "rank -1 .* must be 1 to 10"),
    "rank huge": (lambda d: entry(d).update(rank=10**15), "must be 1 to 10"),
    "rank text": (lambda d: entry(d).update(rank="2"), r"\.rank is '2', but should be a valid integer"),
    "rank float": (lambda d: entry(d).update(rank=2.0), r"\.rank is 2\.0, but should be a valid integer"),
    "rank true": (lambda d: entry(d).update(rank=True), r"\.rank is True, but should be a valid integer"),
    "other rank": (lambda d: entry(d).update(rank=3), r"4 tensors of another shape .*\(4, 20\), not \(6, 20\)"),
    "no such layer": (
        lambda d: d["components"]["unet"]["layers"].update(x=entry(d)),
        "1 of its 3 layers are not there",
    ),
    "no such part": (lambda d: d.update(components={"vae": d["components"]["unet"]}), "another kind of model"),
    "no layers": (lambda d: d["components"]["unet"].update(layers={}), "8 tensors too many"),
}


@pytest.mark.parametrize("case", METADATA)
def test_metadata(unet: Any, saved: Path, case: str) -> None:
    edit, message = METADATA[case]
    refused(unet, changed(saved, lambda data, tensors: edit(data)), message)


# Tensors of bad will

KEY = f"unet.{LAYER}.sample.query.weight"
TENSORS: dict[str, tuple[Callable[[dict[str, Tensor]], Any], str]] = {
    "missing": (lambda t: t.pop(KEY), f"1 tensors missing \\({KEY}\\)"),
    "extra": (lambda t: t.update(x=torch.zeros(1)), r"1 tensors too many \(x\)"),
    "shape": (lambda t: t.update({KEY: torch.zeros(2, 2)}), r"of another shape .*is \(2, 2\), not \(4, 20\)"),
    "scalar": (lambda t: t.update({KEY: torch.zeros(())}), r"of another shape .*is \(\), not \(4, 20\)"),
    "nan": (lambda t: t[KEY].fill_(torch.nan), f"NaN or infinite values in {KEY}"),
    "inf": (lambda t: t[KEY][0].fill_(-torch.inf), f"NaN or infinite values in {KEY}"),
    "integers": (lambda t: t.update({KEY: torch.zeros(4, 20, dtype=torch.int64)}), f"does not write \\({KEY}\\)"),
    "complex": (lambda t: t.update({KEY: torch.zeros(4, 20, dtype=torch.complex64)}), "does not write"),
    "no scale": (lambda t: t.update({KEY: torch.zeros(4, 20, dtype=torch.int8)}), "lack their scales"),
    "lone scale": (lambda t: t.update({f"{KEY}.scale": torch.ones(4, 1)}), "does not write"),
    "broadcast": (
        lambda t: t.update(
            {KEY: torch.zeros(10**6, 1, dtype=torch.int8), f"{KEY}.scale": torch.ones(1, 10**6)}
        ),
        r"does not write .*scale",
    ),
    "integer scale": (
        lambda t: t.update(
            {KEY: torch.zeros(4, 20, dtype=torch.int8), f"{KEY}.scale": torch.ones(4, 1, dtype=torch.int8)}
        ),
        "lack their scales",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", TENSORS)
def test_tensors(unet: Any, saved: Path, case: str) -> None:
    edit, message = TENSORS[case]
    refused(unet, changed(saved, lambda data, tensors: edit(tensors)), message)


@pytest.mark.parametrize(
    ("edit", "message", "error"),
    [
        (lambda d, t: d["token"].update(text="dog"), "knows 'dog' already", ModelError),
        (
            lambda d, t: d["token"].update(text="a b"),
            r"token\.text is 'a b', but should",
            CheckpointError,
        ),
        (lambda d, t: d["token"].update(vectors=10**15), "are of shape", CheckpointError),
        (lambda d, t: d["token"].update(vectors=1), "are of shape", CheckpointError),
        (lambda d, t: t.pop("token.text_encoder"), "are missing", CheckpointError),
        (lambda d, t: t.update({"token.text_encoder": torch.zeros(2, 3)}), r"\(2, 3\).*\(2, 15\)", CheckpointError),
        (lambda d, t: t.update({"token.x": torch.zeros(2, 15)}), r"1 tensors too many \(token.x\)", CheckpointError),
        (lambda d, t: d.update(token=None), r"too many \(token.text_encoder\)", CheckpointError),
    ],
)
def test_tokens_of_bad_will(edit: Any, message: str, error: type[Exception], tmp_path: Path) -> None:
    pipe = pipeline()
    adapter = customize.add_adapter(pipe, targets="mid_block", token="V*", token_vectors=2)
    path = customize.save_adapter(pipe, tmp_path / "x.safetensors")
    adapter.remove()
    with pytest.raises(error, match=message):
        customize.load_adapter(pipe, changed(path, edit))
    assert customize.adapters(pipe) == {}
    assert "V*" not in pipe.tokenizer.get_vocab()


# Other models


@pytest.mark.parametrize("other", ["sdxl", "sd3", "flux", "pixart"])
def test_another_architecture(saved: Path, other: str) -> None:
    message = "layers have other heads or widths|layers are not there"
    if other != "sdxl":
        message = r"for the denoiser 'unet' \(UNet2DConditionModel\), and this one has transformer"
    refused(model(other, torch.float32), saved, message)


def test_other_heads_of_the_same_shapes(saved: Path) -> None:
    other: Any = sd1_unet(heads=5)
    assert other.get_submodule(LAYER).to_q.weight.shape == (20, 20)
    refused(other, saved, "2 of its 2 layers have other heads or widths")
