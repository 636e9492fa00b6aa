"""Models of transformers, torchvision and open_clip: exact at full rank, and what is built costs what was planned."""

import copy
import math
from collections.abc import Callable
from importlib import import_module
from typing import Any

import pytest
import torch
import transformers
from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg
from torch import Tensor, nn
from torchvision import models
from torchvision.models.swin_transformer import PatchMergingV2, SwinTransformerBlockV2

import comcat
from comcat.hosts.proof import NOT_CALLED, apart
from comcat.layers.cost import Shape
from comcat.models.example import Example, example_for, given_example
from comcat.prepared import Prepared
from conftest import randomize

pytestmark = pytest.mark.usefixtures("no_source")

#: 3 heads of width 8, 37 hidden units, 4 x 4 patches.
SIZES = {
    "hidden_size": 24,
    "num_attention_heads": 3,
    "num_hidden_layers": 2,
    "intermediate_size": 37,
    "image_size": 28,
    "patch_size": 7,
}
TEXT = {**SIZES, "vocab_size": 97, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
LLAMA = {**TEXT, "model_type": "llama", "num_key_value_heads": 3}
PLACED = {"image_token_index": 96, "vision_feature_layer": -1}
RESNET = {"embedding_size": 4, "hidden_sizes": [4, 4, 7, 9], "depths": [1, 1, 1, 1], "layer_type": "basic"}
DETR = {"layers": 2, "attention_heads": 4, "ffn_dim": 37}
STAGED = {"image_size": 32, "patch_size": 2, "embed_dim": 16, "depths": [2, 1], "num_heads": [2, 4], "window_size": 4}


def of(name: str, config: str | None = None, **sizes: Any) -> Callable[[], nn.Module]:
    """A model of transformers from its configuration."""

    def build() -> nn.Module:
        made = getattr(transformers, config or name.partition("For")[0].removesuffix("Model") + "Config")
        place = made.__module__.replace("configuration_", "modeling_")
        model: nn.Module = getattr(import_module(place), name)(made(**sizes))
        return model

    return build


def two_towers() -> nn.Module:
    return CLIP(
        24,
        CLIPVisionCfg(layers=2, width=24, head_width=8, patch_size=7, image_size=28),
        CLIPTextCfg(context_length=13, vocab_size=97, width=20, heads=2, layers=2),
    )


def windows(**later: Any) -> nn.Module:
    return models.SwinTransformer([4, 4], 16, [2, 1], [2, 4], [3, 3], num_classes=7, **later)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "vit": of("ViTForImageClassification", **SIZES),
    "deit": of("DeiTForImageClassification", **SIZES),
    "beit": of("BeitForImageClassification", **SIZES),
    "dinov2": of("Dinov2Model", **{**SIZES, "mlp_ratio": 2}),
    "dinov2 with registers": of("Dinov2WithRegistersModel", **{**SIZES, "mlp_ratio": 2}),
    "dinov3": of("DINOv3ViTModel", **SIZES),
    "swin": of("SwinForImageClassification", **STAGED),
    "swinv2": of("Swinv2ForImageClassification", **STAGED),
    "clip": of("CLIPModel", text_config=TEXT, vision_config=SIZES, projection_dim=11),
    "siglip": of("SiglipVisionModel", **SIZES),
    "siglip2": of("Siglip2VisionModel", **{**SIZES, "num_patches": 16}),
    "ijepa": of("IJepaModel", **SIZES),
    "yolos": of("YolosForObjectDetection", **{**SIZES, "image_size": [28, 28], "num_detection_tokens": 5}),
    "qwen2-vl": of(
        "Qwen2VisionTransformerPretrainedModel",
        "Qwen2VLVisionConfig",
        embed_dim=24,
        hidden_size=24,
        num_heads=3,
        depth=2,
        patch_size=7,
    ),
    "deformable detr": of(
        "DeformableDetrForObjectDetection",
        backbone_config={"model_type": "resnet", "out_features": ["stage3", "stage4"], **RESNET},
        d_model=32,
        **{f"{place}_{what}": n for place in ("encoder", "decoder") for what, n in DETR.items()},
        num_queries=5,
    ),
    "timesformer": of("TimesformerModel", **{**SIZES, "num_frames": 2}),
    "mllama": of(
        "MllamaVisionModel",
        **SIZES,
        attention_heads=3,
        num_global_layers=1,
        intermediate_layers_indices=[0, 1],
    ),
    "llava": of("LlavaModel", text_config=LLAMA, vision_config={"model_type": "clip_vision_model", **SIZES}, **PLACED),
    "torchvision vit": lambda: models.VisionTransformer(28, 7, 2, 3, 24, 37, num_classes=7),
    "torchvision swin": windows,
    "torchvision swin v2": lambda: windows(block=SwinTransformerBlockV2, downsample_layer=PatchMergingV2),
    "torchvision maxvit": lambda: models.MaxVit((64, 64), 8, 2, [16], [1], 8, 0.0),
    "open_clip": two_towers,
}
#: What comcat cannot read off a model yet: on what images it runs.
IMAGES = {"torchvision vit": (28, 28), "torchvision swin": (40, 44), "torchvision swin v2": (40, 44)}
IMAGES |= {"torchvision maxvit": (64, 64), "open_clip": (28, 28), "qwen2-vl": (28, 28), "deformable detr": (64, 96)}


def prepared(name: str) -> tuple[Prepared, Example]:
    """Looked at with the example that comcat makes."""
    model = randomize(MODELS[name]()).double().eval()
    if name not in IMAGES:
        ready = comcat.prepare(model)
        return ready, example_for(model, ready.size(), 2, seed=5)
    example = example_for(model, (3, *IMAGES[name]), 2, seed=5)
    return comcat.prepare(model, example=(example.args, example.kwargs)), example


def tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value] if value.is_floating_point() else []
    inner = value.values() if hasattr(value, "values") else value if isinstance(value, (tuple, list)) else ()
    return [tensor for one in inner for tensor in tensors(one)]


@pytest.mark.parametrize("name", MODELS)
def test_exact_and_planned(name: str) -> None:
    ready, example = prepared(name)
    kinds = {layer.kind for layer in ready.inventory.layers}
    assert {"attention", "ffn"} <= kinds
    with torch.no_grad():
        expected = tensors(example.run(ready.model))
        for ffn in ("low-rank", "neurons"):
            small = comcat.compress(ready, comcat.full_rank_plan(ready, ffn))
            for ours, theirs in zip(tensors(example.run(small)), expected, strict=True):
                # Rotary embeddings of Qwen are computed in float32, whatever the model's dtype is.
                close = 1e-5 if name == "qwen2-vl" else 1e-9
                torch.testing.assert_close(ours, theirs, rtol=0, atol=close * float(theirs.abs().max()))
    before = sum(p.numel() for p in ready.model.parameters())
    plan = comcat.plan(ready, comcat.Budget(params=0.7))
    small, report = ready.model, comcat.compress_(ready, plan)
    assert not report.notes  # such as of costs that are not what was planned
    assert sum(p.numel() for p in small.parameters()) == report.params_after <= 0.7 * before
    with torch.no_grad():
        again = tensors(example.run(copy.deepcopy(small)))
        for ours, theirs in zip(again, tensors(example.run(small)), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-9 * float(theirs.abs().max()))


def test_a_layer_that_fails_the_proof_is_named_with_its_difference() -> None:
    model = MODELS["vit"]()
    scores = model.get_submodule("vit.layers.1.attention")

    class Squared(type(scores)):  # type: ignore[misc]
        """Something acts behind the values that comcat cannot know of."""

        def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
            out, weights = super().forward(x, *args, **kwargs)
            return out + self.q_proj(x).square() + self.v_proj(x).square(), weights

    scores.__class__ = Squared
    inventory = comcat.prepare(randomize(model).double().eval()).inventory
    assert [layer.name for layer in inventory.layers if layer.kind == "attention"] == ["vit.layers.0.attention"]
    reason = next(entry.reason for entry in inventory.dense if entry.name == "vit.layers.1.attention")
    assert "difference" in reason


def test_a_layer_of_a_kind_of_which_others_are_not_called() -> None:
    """What is not called says nothing of what is, and is named."""

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.unused, self.used = MODELS["vit"](), MODELS["vit"]()

        def forward(self, x: Tensor) -> Any:
            return self.used(x)

    inventory = comcat.prepare(randomize(Two()).double().eval(), example=torch.randn(3, 3, 28, 28)).inventory
    assert {layer.name.partition(".")[0] for layer in inventory.layers} == {"used"}
    assert {entry.name.partition(".")[0] for entry in inventory.dense if NOT_CALLED in entry.reason} == {"unused"}


@pytest.mark.parametrize("width", [5, None])
def test_heads_that_are_told_by_their_width_or_not_at_all(width: int | None) -> None:
    """Where nothing says how many there are, there is one."""

    class Scores(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q_proj, self.k_proj, self.v_proj = (nn.Linear(15, 15) for _ in range(3))
            self.o_proj = nn.Linear(15, 15)
            if width is not None:
                self.head_dim = width

        def forward(self, x: Tensor) -> Tensor:
            heads = (one(x).unflatten(-1, (-1, width or 15)) for one in (self.q_proj, self.k_proj, self.v_proj))
            q, k, v = (one.transpose(1, 2) for one in heads)
            return self.o_proj(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))

    model = nn.Sequential(nn.Conv2d(3, 15, 7, 7), nn.Flatten(2), Turned(), Scores())
    (layer,) = comcat.prepare(randomize(model).double().eval(), example=torch.randn(3, 3, 14, 14)).inventory.layers
    assert layer.full == {"qk": width or 15, "vo": width or 15}


class Turned(nn.Module):
    """(B, D, tokens) to (B, tokens, D)."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mT


def test_differences_of_tensors() -> None:
    """Infinities at the same places are no difference; NaN where there was none is the largest."""
    inf, nan = math.inf, math.nan
    theirs = torch.tensor([2.0, inf, -inf, nan, -4.0])
    assert apart(theirs, theirs) == 0
    assert apart(torch.tensor([2.0, inf, -inf, nan, -3.0]), theirs) == 0.25
    for other in ([2.0, inf, -inf, nan, nan], [2.0, -inf, -inf, nan, -4.0], [2.0, inf, -inf, 0.0, -4.0]):
        assert apart(torch.tensor(other), theirs) == inf
    assert apart(torch.tensor([inf]), torch.tensor([1.0])) == inf
    assert apart(torch.empty(0), torch.empty(0)) == 0


def test_deformable_attention_costs_what_its_projections_cost() -> None:
    ready, _ = prepared("deformable detr")
    layer = next(one for one in ready.inventory.layers if "MultiscaleDeformable" in type(one.module).__name__)
    assert set(layer.full) == {"vo"}
    assert "scores do not come from" in layer.dense_parts["qk"]
    half, shape = layer.priced({"vo": 4}, Shape(5, 7, 11)), Shape(5, 7, 11)
    # From 11 tokens of values, and to 5 of the output.
    assert layer.priced({}, shape).macs - half.macs == 32 * 4 * 4 * (11 + 5)


def test_outputs_that_transformers_captures_are_captured_of_the_small_model_too() -> None:
    """Its hooks, which the first pass puts there, are no reason to refuse, and stay."""
    model = randomize(MODELS["vit"]()).double().eval()
    image = torch.randn(2, 3, 28, 28, dtype=torch.float64)
    with torch.no_grad():
        expected = model(image, output_hidden_states=True, output_attentions=True)
        ready = comcat.prepare(model)
        comcat.compress_(ready, comcat.full_rank_plan(ready))
        found = model(image, output_hidden_states=True, output_attentions=True)
    assert len(found.hidden_states) == len(expected.hidden_states) > 1
    for ours, theirs in zip(found.hidden_states, expected.hidden_states, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-9)
    assert len(found.attentions or ()) == len(expected.attentions or ())


def test_examples() -> None:
    """A dictionary without its labels, arguments, or a tensor; anything else is refused by name."""
    model = nn.Conv2d(3, 3, 1).double()
    image = torch.randn(2, 3, 5, 7)
    for given in ({"pixel_values": image, "labels": torch.zeros(2)}, ((image,), {}), (image,), image):
        example = given_example(given, model)
        assert example.images == 2
        assert example.pixels.dtype == torch.float64
        assert "labels" not in example.kwargs
    with pytest.raises(comcat.ModelError, match="a dictionary of the model's inputs"):
        given_example("image.png", model)
    with pytest.raises(comcat.ModelError, match="floating-point tensor"):
        given_example((torch.zeros(2, dtype=torch.int64),), model)
