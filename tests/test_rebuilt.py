"""What one evaluation does not show comes back from a saved model all the same, or its argument is asked for."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import timm
import tomllib
import torch
from packaging.requirements import Requirement
from packaging.version import Version
from torch import nn

import comcat
from comcat.errors import CheckpointError, ComcatError, ModelError
from comcat.models.opening import load_model
from comcat.models.traits import differences, restore_attributes
from comcat.models.versions import LEAST
from conftest import VIT, assert_same_outputs, images, make, swin, vit
from test_compress import half_plan

Change = Callable[[Any], Any]


def small(model: nn.Module) -> nn.Module:
    return comcat.compress(model, half_plan(model))


def returned(model: nn.Module, place: Path, **args: Any) -> nn.Module:
    comcat.save(model, place / "out", **args)
    return comcat.load(place / "out")


def check(model: nn.Module, place: Path) -> nn.Module:
    """Saved and loaded: the same classes, attributes and outputs; returns what was loaded."""
    again = returned(model, place)
    assert not differences(model, again)
    assert not differences(again, model)
    x = images(model, 3)
    with torch.no_grad():
        assert_same_outputs(model(x), again(x))
    return again


def forget(model: nn.Module) -> nn.Module:
    """As made by a version of timm that does not remember its arguments."""
    model.__dict__.pop("_model_args", None)
    return model


RATES = ("drop_path_rate", "proj_drop_rate", "attn_drop_rate", "drop_rate")
ARGS: list[tuple[Callable[..., nn.Module], dict[str, Any]]] = [
    *((host, {rate: 0.37}) for host in (vit, swin) for rate in RATES),
    (vit, {"pos_drop_rate": 0.05}),
    (vit, {"patch_drop_rate": 0.5}),
    (vit, {"dynamic_img_size": True}),
    (vit, {"dynamic_img_size": True, "dynamic_img_pad": True}),
    (vit, {"no_embed_class": True}),
    (vit, {"norm_layer": partial(nn.LayerNorm, eps=1e-3)}),
    (swin, {"always_partition": True}),
    (swin, {"strict_img_size": False}),
]


@pytest.mark.parametrize("remembered", [True, False])
@pytest.mark.parametrize(("host", "args"), ARGS, ids=lambda value: "-".join(value) if isinstance(value, dict) else None)
def test_arguments_that_leave_no_trace(
    host: Callable[..., nn.Module], args: dict[str, Any], remembered: bool, tmp_path: Path
) -> None:
    model = host(dtype=torch.float32, **args)
    if remembered is False:
        forget(model)
    plain = host(dtype=torch.float32)
    assert differences(model, plain)  # else this tests nothing
    check(small(model), tmp_path)


def test_rates_are_those_of_every_layer(tmp_path: Path) -> None:
    again = check(small(vit(dtype=torch.float32, depth=3, drop_path_rate=0.4)), tmp_path)
    found = [getattr(block.drop_path1, "drop_prob", 0.0) for block in again.blocks]
    assert found == pytest.approx([0.0, 0.2, 0.4])


CHANGES: dict[str, tuple[Callable[..., nn.Module], Change]] = {
    "one epsilon": (vit, lambda m: setattr(m.blocks[1].norm1, "eps", 0.01)),
    "one rate": (vit, lambda m: setattr(m.blocks[1].mlp.drop1, "p", 0.3)),
    "another size": (vit, lambda m: m.set_input_size(img_size=(28, 35))),
    "another size of patches": (vit, lambda m: m.set_input_size(img_size=(28, 40), patch_size=(4, 5))),
    "another size of windows": (swin, lambda m: m.set_input_size(img_size=16, window_size=4)),
    "gradient checkpointing": (vit, lambda m: m.set_grad_checkpointing(True)),
    "other classes": (vit, lambda m: m.reset_classifier(5)),
    "no classes": (swin, lambda m: m.reset_classifier(0)),
    "pooled by the mean": (vit, lambda m: m.reset_classifier(5, global_pool="avg")),
    "not pooled": (vit, lambda m: m.reset_classifier(5, global_pool="")),
    "a Swin pooled by the maximum": (swin, lambda m: m.reset_classifier(5, global_pool="max")),
    "no longer pooled by attention": (
        lambda **a: make("vit_base_patch16_siglip_224", **VIT, **a),
        lambda m: m.reset_classifier(5, global_pool="avg"),
    ),
}


@pytest.mark.filterwarnings("ignore::UserWarning:timm")  # of PyTorch, where timm interpolates the table of positions
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("change", CHANGES)
def test_what_is_changed_comes_back(change: str, when: str, tmp_path: Path) -> None:
    host, apply = CHANGES[change]
    model: nn.Module = host(dtype=torch.float32)
    if when == "before":
        apply(model)
        check(model, tmp_path / "dense")
    model = small(model)
    if when == "after":
        apply(model)
    check(model, tmp_path)


@pytest.mark.parametrize("args", [{"qk_norm": True}, {"pre_norm": True}, {"final_norm": False}, {"fc_norm": True}])
def test_arguments_that_cannot_be_read_off_are_asked_for(args: dict[str, Any], tmp_path: Path) -> None:
    model = small(forget(vit(dtype=torch.float32, **args)))
    with pytest.raises(CheckpointError, match=r"pass model_args=\{...\} with the arguments"):
        comcat.save(model, tmp_path / "out")
    assert not differences(model, returned(model, tmp_path, model_args=VIT | args))


def test_the_maps_of_chosen_layers(tmp_path: Path) -> None:
    args = VIT | {"features_only": True, "out_indices": (0, 1)}
    model = small(timm.create_model("vit_tiny_patch16_224", **args).eval())
    x = torch.randn(2, 3, *VIT["img_size"], generator=torch.Generator().manual_seed(0))
    again = returned(model, tmp_path, model_args=args)
    with torch.no_grad():
        for there, here in zip(model(x), again(x), strict=True):
            assert_same_outputs(there, here)


def test_classes_of_one_name_are_told_apart() -> None:
    class LayerNorm(nn.LayerNorm):
        pass

    a, b = nn.Sequential(nn.LayerNorm(3)), nn.Sequential(LayerNorm(3))
    assert [str(found) for found in differences(a, b)] == [
        f"'0' is a {nn.LayerNorm.__module__}.LayerNorm, but a {__name__}.{LayerNorm.__qualname__} when it is built anew"
    ]


@pytest.mark.parametrize(
    "attributes",
    [
        {"nowhere": {"p": 0.1}},
        {"blocks.0": {"nothing": 1}},
        {"blocks.0": {"attn": 1}},
        {"blocks.0": {"_modules": 1}},
        {"": {"training": True}},
        {"": {"forward": 1}},
        {"": {"comcat": "x"}},
    ],
)
def test_a_file_sets_plain_attributes_only(attributes: dict[str, dict[str, Any]]) -> None:
    with pytest.raises(CheckpointError, match=r"has no attribute .* that could be set"):
        restore_attributes(vit(), attributes)


def test_weights_that_are_no_numbers_are_not_saved(tmp_path: Path) -> None:
    model = vit(dtype=torch.float32)
    for value in (float("nan"), float("inf")):
        with torch.no_grad():
            model.blocks[0].mlp.fc1.weight[0, 0] = value
        with pytest.raises(ModelError, match=r"'blocks\.0\.mlp\.fc1\.weight' holds NaN or infinite"):
            comcat.save(model, tmp_path / "out")
    assert not any(tmp_path.iterdir())


def test_float8_is_not_saved(tmp_path: Path) -> None:
    model = vit(dtype=torch.float32)
    for block in model.blocks:
        block.mlp.fc1.weight = nn.Parameter(block.mlp.fc1.weight.to(torch.float8_e4m3fn), requires_grad=False)
    with pytest.raises(ComcatError, match=r"(?i)float8|F8_E4M3"):
        comcat.save(model, tmp_path / "out")
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(("name", "old"), [("timm", "1.0.20"), ("torch", "2.5.1+cpu")])
def test_libraries_that_are_not_safe_are_refused_in_one_line(
    name: str, old: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = vit(dtype=torch.float32)
    comcat.save(model, tmp_path / "out")
    monkeypatch.setattr({"timm": timm, "torch": torch}[name], "__version__", old)
    for use in (
        lambda: comcat.load(tmp_path / "out"),
        lambda: load_model("vit_tiny_patch16_224", pretrained=False),
        lambda: comcat.save(model, tmp_path / "again"),
        lambda: comcat.compress(model, half_plan(model)),
    ):
        with pytest.raises(ModelError, match=rf"{name} .* is installed, and comcat needs {LEAST[name]} or newer"):
            use()


def test_no_version_below_the_least_is_installed() -> None:
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    lowest = {r.name: min(Version(s.version) for s in r.specifier) for r in map(Requirement, project["dependencies"])}
    assert {name: lowest[name] for name, least in LEAST.items() if lowest[name] < Version(least)} == {}
