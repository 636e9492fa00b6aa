"""Adapters: bitwise the base model at the start and when they are off; what they are put on; how strong they are."""

import functools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

from accelerate import init_empty_weights
from diffusers import FluxTransformer2DModel, SD3Transformer2DModel, UNet2DConditionModel

from comcat import customize
from comcat.errors import ModelError
from diffusion import MODELS, fill, inputs, model, output, picture, pipeline

DTYPES = [torch.float64, torch.float32, torch.bfloat16]


def loss(m: Any, x: dict[str, Any]) -> Tensor:
    found: Tensor = m(**x)[0]
    return found.square().mean()


def gradients(m: Any, x: dict[str, Any], adapter: customize.Adapter) -> dict[str, Tensor]:
    for parameter in adapter.parameters():
        parameter.grad = None
    loss(m, x).backward()
    return {name: p.grad for name, p in adapter.named_parameters() if p.grad is not None}


# The start


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_start_is_bitwise_the_base(name: str, dtype: torch.dtype) -> None:
    m = model(name, dtype)
    x = inputs(m, dtype)
    base = output(m, x)
    adapter = customize.add_adapter(m, rank=2, seed=3)
    for training in (False, True):
        m.train(training)
        assert torch.equal(output(m, x), base)
        with_grad = m(**x)[0]
        assert with_grad.requires_grad
        assert torch.equal(with_grad, base)
    assert {p.dtype for p in adapter.parameters()} == {dtype}


@pytest.mark.parametrize("name", MODELS)
def test_training_starts_at_once(name: str) -> None:
    m = model(name)
    x = inputs(m)
    base = output(m, x)
    adapter = customize.add_adapter(m, rank=2)
    found = gradients(m, x, adapter)
    for key, gradient in found.items():
        starts_at_zero = key.endswith(("key.weight", "output.weight"))
        assert bool(gradient.any()) == starts_at_zero, key
    assert found.keys() == dict(adapter.named_parameters()).keys()
    assert all(p.grad is None for key, p in m.named_parameters() if ".adapters." not in key)
    values = {key: p.detach().clone() for key, p in adapter.named_parameters()}
    for layer in adapter.layers.values():
        layer._started = True  # the widened attention itself, as in every later step
    for key, gradient in gradients(m, x, adapter).items():
        torch.testing.assert_close(found[key], gradient, atol=1e-10, rtol=1e-8)
    assert all(torch.equal(p, values[key]) for key, p in adapter.named_parameters())
    torch.optim.SGD(adapter.parameters(), lr=1e-3).step()
    after = output(m, x)
    assert not torch.equal(after, base)
    assert loss(m, x) < base.square().mean()
    torch.testing.assert_close(m(**x)[0].detach(), after, atol=0, rtol=0)


def _reentrant(function: Callable[..., Any], *args: Any) -> Any:
    return checkpoint(function, *args, use_reentrant=True)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_gradient_checkpointing(name: str, reentrant: bool) -> None:
    m = model(name).train()
    x = inputs(m)
    adapter = customize.add_adapter(m, rank=2)
    for step in range(2):
        plain = gradients(m, x, adapter)
        m.enable_gradient_checkpointing(_reentrant) if reentrant else m.enable_gradient_checkpointing()
        y = {
            k: v.clone().requires_grad_() if v is not None and k.endswith("hidden_states") else v for k, v in x.items()
        }
        if "sample" in y:
            y["sample"] = y["sample"].clone().requires_grad_()
        again = gradients(m, y, adapter)
        m.disable_gradient_checkpointing()
        assert again.keys() == plain.keys()
        for key in plain:
            torch.testing.assert_close(again[key], plain[key], atol=1e-12, rtol=1e-9)
        if step == 0:
            fill(adapter)


# Strength


@pytest.mark.parametrize("name", MODELS)
def test_off_is_bitwise_the_base(name: str) -> None:
    m = model(name, torch.float32)
    x = inputs(m, torch.float32)
    base = output(m, x)
    one, two = (fill(customize.add_adapter(m, rank=r, name=n), r) for n, r in (("one", 1), ("two", 2)))
    both = output(m, x)
    one.enabled = False
    only_two = output(m, x)
    one.enabled, two.scale = True, 0
    only_one = output(m, x)
    two.scale = 1
    assert len({t.sum().item() for t in (base, both, only_one, only_two)}) == 4
    customize.set_adapters(m, {"two": 1.0})
    assert torch.equal(output(m, x), only_two)
    customize.set_adapters(m, {"one": 1})
    assert torch.equal(output(m, x), only_one)
    customize.set_adapters(m, {"two": 1.0, "one": 1.0})
    assert torch.equal(output(m, x), both)
    customize.set_adapters(m, {})
    assert torch.equal(output(m, x), base)
    assert torch.equal(m(**x)[0], base)


@pytest.mark.parametrize("scale", [-0.5, 0.3, 2.0])
def test_scale_is_on_queries_and_values(scale: float) -> None:
    m = model("sd3")
    x = inputs(m)
    adapter = fill(customize.add_adapter(m, rank=2, scale=scale))
    found = output(m, x)
    adapter.scale = 1.0
    for key, parameter in adapter.named_parameters():
        if key.endswith(("query.weight", "value.weight")):
            parameter.data *= scale
    torch.testing.assert_close(output(m, x), found, atol=1e-10, rtol=0)


def test_setting_a_strength_touches_no_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    m = model("sdxl")
    adapter = customize.add_adapter(m)
    assert len(adapter.layers) > 10
    assert {id(layer.strength) for layer in adapter.layers.values()} == {id(adapter.strength)}
    touched: list[str] = []
    monkeypatch.setattr(nn.Module, "__getattr__", lambda self, key: touched.append(key))
    monkeypatch.setattr(nn.Module, "__setattr__", lambda self, key, value: touched.append(key))
    adapter.scale, adapter.enabled = 0.5, False
    monkeypatch.undo()
    assert touched == []
    assert {layer.strength.value for layer in adapter.layers.values()} == {0.0}


@pytest.mark.parametrize("scale", [math.nan, math.inf, True, "1", None, 10**400, [1.0]], ids=lambda s: str(s)[:9])
def test_a_strength_is_a_finite_number(scale: Any) -> None:
    m = model("sd3")
    with pytest.raises(ModelError, match="strength must be a finite number"):
        customize.add_adapter(m, scale=scale)
    adapter = customize.add_adapter(m)
    with pytest.raises(ModelError, match="strength must be a finite number"):
        adapter.scale = scale
    with pytest.raises(ModelError, match="strength must be a finite number"):
        customize.set_adapters(m, {"default": scale})
    assert adapter.scale == 1.0
    assert adapter.enabled


# Names


@pytest.mark.parametrize("name", ["", "a.b", "a b", 3, None, "type", "keys", "training"])
def test_names(name: Any) -> None:
    m = model("sd3")
    with pytest.raises(ModelError, match=r"letters, digits|word of torch's own"):
        customize.add_adapter(m, name=name)
    assert customize.adapters(m) == {}


def test_adapters_are_known_by_their_names() -> None:
    m = model("sd3")
    one, two = customize.add_adapter(m, name="one"), customize.add_adapter(m, name="two-2", rank=1)
    assert customize.adapters(m) == {"one": one, "two-2": two}
    assert customize.get_adapter(m, "one") is one
    with pytest.raises(ModelError, match="already"):
        customize.add_adapter(m, name="one")
    for call in (lambda: customize.get_adapter(m, "x"), lambda: customize.remove_adapter(m, "x")):
        with pytest.raises(ModelError, match=r"no adapter 'x'.*one, two-2"):
            call()
    with pytest.raises(ModelError, match="no adapter 'x'"):
        customize.set_adapters(m, {"one": 0.5, "x": 1.0})
    assert one.scale == 1.0
    one.remove()
    assert list(customize.adapters(m)) == ["two-2"]
    assert "two-2" in repr(two)
    assert f"{two.num_parameters:,}" in repr(two)


def test_no_denoiser() -> None:
    with pytest.raises(ModelError, match="neither a unet nor a transformer"):
        customize.add_adapter(object())
    with pytest.raises(ModelError, match="no attention layer"):
        customize.add_adapter(nn.Linear(2, 3))


# Where and how much


def chosen(name: str = "sdxl", **args: Any) -> dict[str, int]:
    m = model(name, torch.float32)
    adapter = customize.add_adapter(m, **args)
    (found,) = adapter.ranks.values()
    adapter.remove()
    return found


@pytest.mark.parametrize(
    ("targets", "count"),
    [
        (None, 16),
        ("self", 8),
        ("cross", 8),
        ("attn2", 8),
        ("mid_block", 4),
        ("down_blocks.1", 4),
        ("*.transformer_blocks.1.attn?", 8),
        (["mid_block", "down_blocks"], 8),
        (("self", "attn1"), 8),
        ("mid_block.attentions.0.transformer_blocks.0.attn1", 1),
    ],
)
def test_targets(targets: Any, count: int) -> None:
    found = chosen(targets=targets, rank=1)
    assert len(found) == count
    if isinstance(targets, str) and targets.islower() and targets.isalpha():
        assert all((".attn2" in name) == (targets == "cross") for name in found)


def test_kinds_of_joint_attention() -> None:
    assert list(chosen("sd35", targets="self")) == ["transformer_blocks.0.attn2"]
    assert len(chosen("sd35", targets="joint")) == 2
    assert len(chosen("flux", targets="joint")) == 2


def test_a_part_of_a_name_is_whole_between_dots() -> None:
    with pytest.raises(ModelError, match="no attention layer"):
        chosen(targets="attn")
    with pytest.raises(ModelError, match="no attention layer"):
        chosen(targets="blocks.1")


def test_rank_by_pattern_and_the_first_that_matches() -> None:
    found = chosen(rank={"mid_block": 3, "cross": 2, "*": 1})
    for name, rank in found.items():
        assert rank == (3 if name.startswith("mid_block") else 2 if name.endswith("attn2") else 1)
    assert set(chosen(rank={"cross": 2}).values()) == {2}
    assert len(chosen(rank={"cross": 2})) == 8
    assert len(chosen(rank={"cross": 2, "self": 1}, targets="mid_block")) == 4


@pytest.mark.parametrize("rank", [0, -1, True, 2.0, "2", None, [2]], ids=str)
def test_rank_is_a_whole_number(rank: Any) -> None:
    m = model("sdxl", torch.float32)
    with pytest.raises(ModelError, match="whole number from 1"):
        customize.add_adapter(m, rank=rank)
    with pytest.raises(ModelError, match="whole number from 1"):
        customize.add_adapter(m, rank={"self": rank, "*": 1})
    pipe = pipeline()
    if rank not in (0, None):
        with pytest.raises(ModelError, match="whole number from 1"):
            customize.add_adapter(pipe, text_encoder_rank=rank)
    assert customize.adapters(m) == customize.adapters(pipe) == {}


def test_rank_is_at_most_the_head_width() -> None:
    assert set(chosen("sd3", rank=4).values()) == {4}
    with pytest.raises(ModelError, match=r"rank 5 is above the head width 4 of 'transformer_blocks\.0\.attn'"):
        chosen("sd3", rank=5)
    with pytest.raises(ModelError, match="rank 6 is above the head width 5"):
        customize.add_adapter(pipeline(), text_encoder_rank=6)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"targets": ["self", "nothing"]}, "named by 'nothing'; layers are down_blocks"),
        ({"rank": {"self": 1, "nothing": 2}}, "named by 'nothing'"),
        ({"targets": "joint"}, "kinds are self, cross"),
        ({"targets": []}, "no attention layer of the unet"),
        ({"rank": {}}, "no attention layer of the unet"),
        ({"targets": "self", "rank": {"cross": 1}}, "no attention layer of the unet"),
        ({"targets": 3}, "targets are names"),
        ({"targets": [3]}, "targets are names"),
        ({"rank": {3: 1}}, "ranks are for names"),
    ],
)
def test_refusals_name_what_is_wrong(args: dict[str, Any], message: str) -> None:
    m = model("sdxl", torch.float32)
    with pytest.raises(ModelError, match=message):
        customize.add_adapter(m, **args)
    assert customize.adapters(m) == {}
    assert not any("adapters" in key for key in m.state_dict())


@pytest.mark.parametrize(("name", "layers"), [("sd1", 2), ("sdxl", 4), ("sd3", 4), ("flux", 2)])
def test_text_encoders(name: str, layers: int) -> None:
    pipe = pipeline(name)
    base = picture(pipe)
    adapter = customize.add_adapter(pipe, rank=1, text_encoder_rank=2)
    assert torch.equal(picture(pipe), base)
    counts = {component: len(ranks) for component, ranks in adapter.ranks.items()}
    assert sum(counts[key] for key in counts if key.startswith("text_encoder")) == layers
    assert all(r == (2 if c.startswith("text") else 1) for c, ranks in adapter.ranks.items() for r in ranks.values())
    for parameter_name, parameter in adapter.named_parameters():
        if parameter_name.startswith("text_encoder"):
            parameter.data.normal_(generator=torch.Generator().manual_seed(1))
    assert not torch.equal(picture(pipe), base)
    adapter.remove()
    assert torch.equal(picture(pipe), base)


def test_text_encoder_rank_needs_one() -> None:
    with pytest.raises(ModelError, match="needs a pipeline with a CLIP text encoder"):
        customize.add_adapter(model("sd1", torch.float32), text_encoder_rank=1)


# Sizes of the real ones

UNET_XL: dict[str, Any] = {
    "sample_size": 128,
    "cross_attention_dim": 2048,
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
REAL: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "SD 1.4": (
        functools.partial(UNet2DConditionModel, sample_size=64, cross_attention_dim=768),
        (795_648, 1_591_296),
    ),
    "SDXL": (functools.partial(UNet2DConditionModel, **UNET_XL), (14_924_800,)),
    "SD3 medium": (
        functools.partial(
            SD3Transformer2DModel, sample_size=128, in_channels=16, out_channels=16, num_layers=24,
            attention_head_dim=64, num_attention_heads=24, caption_projection_dim=1536, pos_embed_max_size=192,
        ),
        (7_041_024,),
    ),
    "FLUX.1": (functools.partial(FluxTransformer2DModel, guidance_embeds=True), (22_413_312,)),
}  # fmt: skip


@pytest.mark.parametrize("name", REAL)
def test_parameter_counts_of_the_published_models(name: str) -> None:
    build, counts = REAL[name]
    with init_empty_weights():
        m = build()
        for rank, count in enumerate(counts, 1):
            adapter = customize.add_adapter(m, rank=rank)
            assert adapter.num_parameters == count
            adapter.remove()
