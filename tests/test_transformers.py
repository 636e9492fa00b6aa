"""Models of transformers: saved and loaded, opened from their own directories, run by every command, and refusals."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from PIL import Image
from torch import Tensor, nn

import comcat
from comcat.data import load_dataset
from comcat.errors import CheckpointError, DataError, ModelError
from comcat.evaluation.outputs import Outputs
from comcat.models.libraries import said_classes
from comcat.models.preprocessing import configure
from comcat.models.profile import default_input_size
from comcat.models.source import describe
from comcat.storage.atomic import CONFIG_NAME
from conftest import assert_same_outputs, images
from test_checkpoint import edit
from test_cli import Result
from test_cli_errors import refused
from test_data import make_folder, picture
from transformers_hosts import HOSTS, TEXT, TOWER, make

TWO = ("clip", "siglip", "detr", "mae")  # that need more than images, return more than a tensor, or draw


def same_tensors(a: nn.Module, b: nn.Module) -> None:
    first, second = a.state_dict(), b.state_dict()
    assert first.keys() == second.keys()
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())


@pytest.mark.parametrize("name", HOSTS)
def test_save_then_load(name: str, tmp_path: Path) -> None:
    model = make(name)
    comcat.save(model, tmp_path / "out")
    again = comcat.load(tmp_path / "out")
    same_tensors(model, again)
    assert type(again) is type(model)
    if name not in TWO:
        x = images(model, 3)
        with torch.no_grad():
            assert_same_outputs(again(x)[0], model(x)[0])
    comcat.save(again, tmp_path / "again")
    assert (tmp_path / "again" / CONFIG_NAME).read_bytes() == (tmp_path / "out" / CONFIG_NAME).read_bytes()


@pytest.mark.parametrize("name", HOSTS)
def test_a_directory_of_save_pretrained(name: str, tmp_path: Path) -> None:
    model = make(name)
    model.save_pretrained(tmp_path / "hf", max_shard_size="9KB")
    assert len(list((tmp_path / "hf").glob("*.safetensors"))) > 1
    args = {"architecture": type(model).__name__} if name in ("clip", "siglip") else {}
    opened = comcat.load_model(str(tmp_path / "hf"), model_args=args)
    assert type(opened) is type(model)
    assert not opened.training
    same_tensors(model, opened)
    assert default_input_size(opened) == default_input_size(model)
    assert describe(opened).args == describe(model).args


def test_settings_of_a_run_come_back(tmp_path: Path) -> None:
    """Eager attention, and what somebody set after the model was built."""
    model = tf.ViTForImageClassification(tf.ViTConfig(**TOWER, num_labels=11, attn_implementation="eager")).eval()
    model.config.id2label = {n: f"class {n}" for n in range(11)}
    model.vit.embeddings.dropout.p = 0.25
    comcat.save(model, tmp_path / "out")
    again = comcat.load(tmp_path / "out")
    assert again.config._attn_implementation == "eager"
    assert again.config.id2label[7] == "class 7"
    assert again.comcat.source.config["label_names"][7] == "class 7"
    assert again.vit.embeddings.dropout.p == 0.25


def test_rotary_frequencies_stay_in_float32(tmp_path: Path) -> None:
    """As from_pretrained leaves them in a model of a shorter type."""
    model = make("dinov3", dtype=torch.bfloat16)
    wide = model.rope_embeddings.inv_freq = make("dinov3").rope_embeddings.inv_freq
    comcat.save(model, tmp_path / "out")
    again = comcat.load(tmp_path / "out")
    assert torch.equal(again.rope_embeddings.inv_freq, wide)
    assert {parameter.dtype for parameter in again.parameters()} == {torch.bfloat16}


def test_changed_models_are_refused(tmp_path: Path) -> None:
    model = make()
    model.vit.layernorm = nn.Identity()
    with pytest.raises(CheckpointError, match=r"'vit\.layernorm' is a Identity, but a LayerNorm when it is built anew"):
        comcat.save(model, tmp_path / "out")
    model = make()
    model.vit.layers[1].mlp.fc1.weight = model.vit.layers[0].mlp.fc1.weight
    with pytest.raises(CheckpointError, match="share weights in a way that its architecture does not"):
        comcat.save(model, tmp_path / "out")


def test_parts_and_derived_classes_have_no_source(tmp_path: Path) -> None:
    class Mine(tf.ViTModel):
        pass

    for model in (make().vit.layers[0], Mine(tf.ViTConfig(**TOWER))):
        assert describe(model) is None
        with pytest.raises(CheckpointError, match=r"does not come from timm\.create_model, nor is it one that comcat"):
            comcat.save(model, tmp_path / "out")


def test_a_dual_encoder_is_opened_as_its_image_tower(tmp_path: Path) -> None:
    for name, tower in (("clip", "CLIPVisionModelWithProjection"), ("siglip", "SiglipVisionModel")):
        model = make(name)
        model.save_pretrained(tmp_path / name)
        with pytest.warns(UserWarning, match=f"needs text beside images: its image tower {tower} is opened"):
            opened = comcat.load_model(str(tmp_path / name))
        assert type(opened).__name__ == tower
        x = images(opened, 2)
        with torch.no_grad():
            theirs = model.get_image_features(x)
            theirs = theirs if isinstance(theirs, Tensor) else theirs.pooler_output
            ours = opened(x)
        assert_same_outputs(ours.image_embeds if name == "clip" else ours.pooler_output, theirs)
        assert said_classes(opened) == 0


def test_another_number_of_classes(tmp_path: Path) -> None:
    model = make()
    model.save_pretrained(tmp_path / "hf")
    opened = comcat.load_model(str(tmp_path / "hf"), model_args={"num_classes": 5})
    assert opened.classifier.out_features == 5
    assert said_classes(opened) == 5
    assert torch.equal(opened.vit.layernorm.weight, model.vit.layernorm.weight)


def test_a_backbone_gets_a_classifier(tmp_path: Path) -> None:
    make("vit features").save_pretrained(tmp_path / "bare")
    _, found = tf.ViTForImageClassification.from_pretrained(tmp_path / "bare", output_loading_info=True)
    if any(name.startswith("vit.") for name in found["missing_keys"]):
        pytest.skip(f"transformers {tf.__version__} does not find the weights of its own backbone")
    opened = comcat.load_model(str(tmp_path / "bare"), model_args={"num_labels": 5})
    assert type(opened) is tf.ViTForImageClassification


def test_kinds_of_outputs() -> None:
    with torch.no_grad():
        for name, kind in (("vit", "classes"), ("vit features", "features"), ("clip image tower", "features")):
            model = make(name)
            read = Outputs(model, unknown="classes")
            read(model(images(model, 3)), 3)
            assert read.kind == kind


# -- how images are prepared ------------------------------------------------------------------------------------------

PROCESSORS: dict[str, Callable[[], Any]] = {
    "squashed": lambda: tf.ViTImageProcessor(size={"height": 14, "width": 14}, image_mean=[0.1, 0.2, 0.3]),
    "cropped": lambda: tf.CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 14, "width": 14}),
    "share": lambda: tf.ConvNextImageProcessor(size={"shortest_edge": 14}, crop_pct=0.875),
    "signed": lambda: tf.ViTImageProcessor(size={"height": 14, "width": 14}, rescale_factor=1 / 127.5, resample=3),
    "as they are": lambda: tf.ViTImageProcessor(size={"height": 14, "width": 14}, do_normalize=False),
}


@pytest.mark.parametrize("name", PROCESSORS)
def test_images_are_prepared_as_the_processor_does(name: str, tmp_path: Path) -> None:
    make().save_pretrained(tmp_path / "hf")
    processor = PROCESSORS[name]()
    processor.save_pretrained(tmp_path / "hf")
    model = comcat.load_model(str(tmp_path / "hf"))
    config = configure(model, {})
    assert config["input_size"] == (3, 14, 14)
    smooth = picture(3, 8).resize((40, 32), Image.Resampling.BICUBIC)
    (tmp_path / "data" / "a").mkdir(parents=True)
    smooth.save(tmp_path / "data" / "a" / "0.png")
    ours, _ = load_dataset(str(tmp_path / "data"), data_config=config)[0]
    theirs = processor(smooth, return_tensors="pt")["pixel_values"][0]
    unit = torch.tensor(config["std"]).mul(255)[:, None, None]
    # Pillow and torchvision round to whole grey levels, after steps of their own; sizes may be rounded by a pixel.
    assert ((ours - theirs) * unit).abs().mean() < (4 if name in ("cropped", "share") else 1)
    comcat.save(model, tmp_path / "out")
    assert configure(comcat.load(tmp_path / "out"), {}) == config


def test_a_missing_processor(tmp_path: Path) -> None:
    make().save_pretrained(tmp_path / "hf")
    model = comcat.load_model(str(tmp_path / "hf"))
    with pytest.raises(DataError, match=r"does not say how its images are normalized.*give --mean and --std"):
        configure(model, {})
    assert configure(model, {"mean": (0.1, 0.2, 0.3), "std": (1.0, 1.0, 1.0)})["mean"] == (0.1, 0.2, 0.3)
    comcat.save(model, tmp_path / "out")
    assert configure(comcat.load(tmp_path / "out"), {})["mean"] == (0.1, 0.2, 0.3)


# -- refusals ---------------------------------------------------------------------------------------------------------


def changed(path: Path, change: Callable[[dict[str, Any]], Any]) -> Path:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    return path


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.update(auto_map={"AutoModel": "evil.Model"}), r"run code that the repository .*\(auto_map\)"),
        (lambda c: c.update(model_type="evil"), "of the type 'evil', which transformers .* does not know"),
        (lambda c: c.update(architectures=["EvilModel"]), "has no architecture 'EvilModel'; .* is never run"),
        (lambda c: c.update(architectures=["AutoModel"]), "has no architecture 'AutoModel'"),
        (lambda c: c.update(architectures=["os.system"]), "has no architecture 'os.system'"),
        (lambda c: c.update(architectures=["SwinModel"]), "is of the type 'vit', and SwinModel needs 'swin'"),
        (lambda c: c.update(quantization_config={"bits": 4}), "is that of a quantized model"),
        (lambda c: c.update(hidden_size=10**7), "would take .* bytes, far beyond the"),
        (lambda c: c.update(num_hidden_layers=10**6), "no architecture has more than 1000 layers"),
        (lambda c: c.update(hidden_size=21), r"tensors are missing or of another shape"),
        (lambda c: c.update(num_hidden_layers=3), r"tensors are missing or of another shape \(vit\.layers\.2"),
        (lambda c: c.update(backbone="somebody/model"), "which would be looked for on the network"),
        (lambda c: c.update(to_dict="x"), "holds 'to_dict', which is no setting"),
    ],
)
def test_configurations_that_are_refused(
    change: Callable[[dict[str, Any]], Any], message: str, tmp_path: Path, sockets_blocked: list[Any]
) -> None:
    make().save_pretrained(tmp_path / "hf")
    changed(tmp_path / "hf" / "config.json", change)
    with pytest.raises(ModelError, match=message):
        comcat.load_model(str(tmp_path / "hf"))


def test_kernels_of_the_hub_are_not_followed(tmp_path: Path, sockets_blocked: list[Any]) -> None:
    make().save_pretrained(tmp_path / "hf")
    changed(tmp_path / "hf" / "config.json", lambda c: c.update(_attn_implementation="somebody/kernel"))
    assert comcat.load_model(str(tmp_path / "hf")).config._attn_implementation == "sdpa"


def test_directories_that_are_refused(tmp_path: Path) -> None:
    make().save_pretrained(tmp_path / "hf")
    weights = tmp_path / "hf" / "model.safetensors"
    with pytest.raises(ModelError, match="cannot be built with 'wheels', which is no setting"):
        comcat.load_model(str(tmp_path / "hf"), model_args={"wheels": 4})
    torch.save({}, tmp_path / "hf" / "pytorch_model.bin")
    weights.unlink()
    with pytest.raises(ModelError, match=r"holds no model\.safetensors, but pytorch_model\.bin: pickled weights"):
        comcat.load_model(str(tmp_path / "hf"))
    (tmp_path / "hf" / "pytorch_model.bin").unlink()
    with pytest.raises(ModelError, match="nor any other weights"):
        comcat.load_model(str(tmp_path / "hf"))
    index = tmp_path / "hf" / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "../../secret.safetensors"}}))
    with pytest.raises(ModelError, match="leads elsewhere"):
        comcat.load_model(str(tmp_path / "hf"))


def test_a_model_of_text(tmp_path: Path) -> None:
    text = {key: value for key, value in TEXT.items() if key != "max_position_embeddings"}
    tf.BertModel(tf.BertConfig(**text)).save_pretrained(tmp_path / "bert")
    with pytest.raises(ModelError, match="is that of BertModel, which takes no images"):
        comcat.load_model(str(tmp_path / "bert"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.update(auto_map={"AutoImageProcessor": "evil.Processor"}), r"\(auto_map\).*never does"),
        (
            lambda c: c.update(image_processor_type="EvilProcessor", model_type="x"),
            "is a 'EvilProcessor', which",
        ),
    ],
)
def test_processors_that_are_refused(change: Callable[[dict[str, Any]], Any], message: str, tmp_path: Path) -> None:
    make().save_pretrained(tmp_path / "hf")
    tf.ViTImageProcessor().save_pretrained(tmp_path / "hf")
    changed(tmp_path / "hf" / "preprocessor_config.json", change)
    with pytest.raises(ModelError, match=message):
        comcat.load_model(str(tmp_path / "hf"))


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("transformers") / "out"
    comcat.save(make(), path)
    return path


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: a.update(library="evil"), "comcat knows no library 'evil'"),
        (lambda a: a.update(name="EvilModel"), "has no architecture 'EvilModel'"),
        (lambda a: a.update(name="PreTrainedModel"), "has no architecture"),
        (lambda a: a["args"].update(extra=1), "is damaged: a model of transformers has"),
        (lambda a: a["args"].update(pooling=False), "ViTForImageClassification has no pooler that could be left out"),
        (lambda a: a["args"].update(pooling="no"), "has no pooler that could be left out"),
        (lambda a: a["args"].update(attention={"": "somebody/kernel"}), "an attention that is neither"),
        (lambda a: a["args"]["config"].update(attn_implementation="somebody/kernel"), "chosen where a model runs"),
        (lambda a: a["args"]["config"].update(auto_map={"AutoModel": "x.Y"}), "asks to run code"),
        (lambda a: a["args"]["config"].update(num_hidden_layers=10**6), "more than 1000 layers"),
        (lambda a: a["args"]["config"].update(hidden_size=10**7), "contradict the tensors"),
        (lambda a: a["args"]["config"].update(hidden_act="evil"), "transformers cannot build"),
        (lambda a: a["args"]["config"].update(hidden_dropout_prob=0.5), "does not match its checksum"),
        (lambda a: a["attributes"].update({"vit": {"config": 1}}), "checksum"),
    ],
)
def test_descriptions_that_are_refused(
    saved: Path, change: Callable[[dict[str, Any]], Any], message: str, tmp_path: Path, sockets_blocked: list[Any]
) -> None:
    for name in (CONFIG_NAME, "model.safetensors"):
        (tmp_path / name).write_bytes((saved / name).read_bytes())
    edit(tmp_path, lambda config: change(config["architecture"]))
    with pytest.raises(CheckpointError, match=message):
        comcat.load(tmp_path)


def test_versions_that_know_timm_alone_refuse_it_by_its_format(saved: Path, tmp_path: Path) -> None:
    assert json.loads((saved / CONFIG_NAME).read_text())["comcat_format"] == 2
    (tmp_path / CONFIG_NAME).write_bytes((saved / CONFIG_NAME).read_bytes())
    edit(tmp_path, lambda config: config.update(comcat_format=1))
    with pytest.raises(CheckpointError, match="has format 1, which holds models of timm alone"):
        comcat.load(tmp_path)


# -- the commands -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("cli")
    for split in ("train", "val"):
        make_folder(root / "data" / split, per_class=3)
    model = tf.ViTForImageClassification(tf.ViTConfig(**TOWER, num_labels=3))
    model.save_pretrained(root / "hf")
    tf.ViTImageProcessor(size={"height": 14, "width": 14}).save_pretrained(root / "hf")
    shape = {"hidden_sizes": [3, 5, 7, 11], "depths": [1, 1, 1, 1], "image_size": 32}
    tf.ConvNextForImageClassification(tf.ConvNextConfig(**shape, num_labels=3)).save_pretrained(root / "convnext")
    return root


@pytest.mark.parametrize("name", ["hf", "convnext"])
def test_compress_evaluate_and_finetune(place: Path, name: str, tmp_path: Path, sockets_blocked: list[Any]) -> None:
    data = ["--data", place / "data", "--device", "cpu", "--workers", 0, "--json", "--batch-size", 3]
    norm = [] if name == "hf" else ["--mean", 0.4, 0.5, 0.6, "--std", 1, 1, 1]
    result = Result(["evaluate", place / name, *data, *norm])
    assert result.code == 0, result.err
    dense = json.loads(result.out)
    result = Result(["compress", place / name, *data, *norm, "--keep", 0.7, "--out", tmp_path / "small", "--data-free"])
    assert result.code == 0, result.err
    small = json.loads(result.out)
    assert small["dense"]["params"] == dense["params"]
    assert 0.6 < small["compressed"]["params"] / dense["params"] <= 0.7
    train = ["--max-steps", 1, "--out", tmp_path / "tuned", "--teacher-checkpoint", place / name / "model.safetensors"]
    result = Result(["finetune", tmp_path / "small", *data, *train])
    assert result.code == 0, result.err
    result = Result(["evaluate", tmp_path / "tuned", *data])
    assert result.code == 0, result.err
    assert json.loads(result.out)["params"] == small["compressed"]["params"]


def test_inspect(place: Path, tmp_path: Path) -> None:
    result = Result(["inspect", place / "hf", "--out", tmp_path / "x.png", "--json"])
    assert result.code == 0, result.err
    assert json.loads(result.out)["spectra"]


def test_a_model_without_layers_to_reduce(tmp_path: Path) -> None:
    torch.manual_seed(0)  # its last bottleneck has one hidden unit, which never fires: that is no FFN either
    config = tf.ResNetConfig(embedding_size=4, hidden_sizes=[4, 4, 7, 7], depths=[1, 1, 1, 1])
    tf.ResNetModel(config).save_pretrained(tmp_path / "hf")
    result = Result(["compress", tmp_path / "hf", "--data-free", "--keep", 0.5, "--out", tmp_path / "out"])
    refused(result, "ResNetModel has no layer that comcat can compress")
    assert not (tmp_path / "out").exists()


def test_names_of_the_hub_that_cannot_be_had(tmp_path: Path) -> None:
    refused(
        Result(["inspect", "nobody/nothing", "--out", tmp_path / "x.png"]), "cannot load 'nobody/nothing' from the Hub"
    )
    refused(Result(["inspect", "transformers/vit", "--out", tmp_path / "x.png"]), "names no weights")
