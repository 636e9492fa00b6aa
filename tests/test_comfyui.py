"""The node pack of ComfyUI, against a stand-in of what it meets there."""

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

import comfy_stand_in as comfy
from comcat import customize
from comcat.errors import CheckpointError, DataError, ModelError
from diffusion import fill, pipeline

PACK = Path(__file__).parent.parent / "integrations" / "comfyui"
SCALES = {"dog": 0.7, "cat": -0.4}
CLOSE: Any = {"rtol": 1e-4, "atol": 1e-5}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """(models, the pack's nodes, the pipeline with both adapters); shared, so tests must not change them."""
    models = tmp_path_factory.mktemp("models")
    for kind in ("comcat", "loras"):
        (models / kind).mkdir()
    pipe = pipeline()
    for name, more in {"dog": {"text_encoder_rank": 2, "token": "V*"}, "cat": {"rank": 1, "targets": "cross"}}.items():
        fill(customize.add_adapter(pipe, name=name, **more), seed=len(name) + ord(name[0]))
        customize.save_adapter(pipe, models / "comcat" / f"{name}.safetensors", name=name)
    with pytest.MonkeyPatch.context() as patch:
        comfy.install(patch, models)
        spec = importlib.util.spec_from_file_location(
            "comfyui_comcat", PACK / "__init__.py", submodule_search_locations=[str(PACK)]
        )
        assert spec is not None
        assert spec.loader is not None
        pack = importlib.util.module_from_spec(spec)
        patch.setitem(sys.modules, "comfyui_comcat", pack)
        spec.loader.exec_module(pack)
        yield models, pack, pipe
        for name in [name for name in sys.modules if name.startswith("comfyui_comcat.")]:
            del sys.modules[name]


def host(pipe: Any) -> tuple[comfy.ModelPatcher, comfy.CLIP]:
    """What a checkpoint loader gives, of the same weights without adapters."""
    bare = pipeline()
    return comfy.ModelPatcher(comfy.unet(bare.unet)), comfy.CLIP(bare.text_encoder)


def node(place: Any, name: str) -> Any:
    return place[1].NODE_CLASS_MAPPINGS[name]()


def stack(place: Any, model: Any, clip: Any, **more: Any) -> Any:
    given: dict[str, Any] = {f"adapter_{i}": "none" for i in range(1, 5)} | {f"strength_{i}": 1.0 for i in range(1, 5)}
    return node(place, "ComcatAdapterStack").load(model, clip=clip, **{**given, **more})


def latents() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(2, 4, 4, 6, generator=generator), torch.randn(2, 5, 15, generator=generator)


@torch.no_grad()
def drawn(patcher: comfy.ModelPatcher) -> Tensor:
    x, text = latents()
    with patcher.loaded() as model:
        found: Tensor = model.diffusion_model(x, torch.tensor([7, 7]), encoder_hidden_states=text).sample
    return found


@torch.no_grad()
def expected(pipe: Any, masks: dict[str, Any], scales: dict[str, float] | None = None) -> Tensor:
    customize.set_adapters(pipe, SCALES if scales is None else scales, masks)
    x, text = latents()
    found: Tensor = pipe.unet(x, torch.tensor([7, 7]), encoder_hidden_states=text).sample
    return found


LEFT = torch.cat([torch.ones(8, 6), torch.zeros(8, 6)], 1)


@pytest.mark.parametrize("masks", [{}, {"dog": LEFT, "cat": 1 - LEFT}, {"cat": LEFT * 0.3}])
def test_the_same_picture_as_in_diffusers(place: Any, masks: dict[str, Tensor]) -> None:
    """One by one and at once, on parts of the picture; and the base is what it was."""
    pipe = place[2]
    model, clip = host(pipe)
    plain = drawn(model)
    wanted = expected(pipe, masks)
    comfy_masks = {name: mask[None] for name, mask in masks.items()}
    files = {"adapter_1": "dog.safetensors", "strength_1": 0.7, "adapter_3": "cat.safetensors", "strength_3": -0.4}
    slots = {f"mask_{i}": comfy_masks[name] for i, name in ((1, "dog"), (3, "cat")) if name in masks}
    at_once, _ = stack(place, model, clip, **files, **slots)
    load = node(place, "ComcatLoadAdapter").load
    one, text = load(model, "dog.safetensors", 0.7, clip, comfy_masks.get("dog"))
    both, _ = load(one, "cat.safetensors", -0.4, text, comfy_masks.get("cat"))
    for patcher in (at_once, both):
        torch.testing.assert_close(drawn(patcher), wanted, **CLOSE)
    assert not torch.allclose(wanted, plain, rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(
        drawn(one), expected(pipe, {k: m for k, m in masks.items() if k == "dog"}, {"dog": 0.7}), **CLOSE
    )
    torch.testing.assert_close(drawn(model), plain)
    assert not model.object_patches
    assert stack(place, model, clip) == (model, clip)


def test_values_of_another_source(place: Any) -> None:
    """A hypernetwork gives a layer other values than keys."""
    model, clip = host(place[2])
    patched, _ = node(place, "ComcatLoadAdapter").load(model, "dog.safetensors", 0.7, clip)
    (_, forward), *_ = patched.object_patches.items()
    x = torch.randn(2, 5, forward.attn.to_q.in_features)
    context = torch.randn(2, 3, forward.attn.to_k.in_features)
    same = forward(x, context, context.clone())
    torch.testing.assert_close(same, forward(x, context))
    assert not torch.allclose(forward(x, context, context + 1), same)


def test_the_text_encoder(place: Any) -> None:
    pipe = place[2]
    model, clip = host(pipe)
    _, changed = node(place, "ComcatLoadAdapter").load(model, "dog.safetensors", 0.7, clip)
    customize.set_adapters(pipe, {"dog": 0.7}, {})
    x = torch.randn(2, 5, pipe.text_encoder.config.hidden_size, generator=torch.Generator().manual_seed(1))
    mask = torch.full((5, 5), float("-inf")).triu(1)
    layers = dict(pipe.text_encoder.named_modules())
    paths = sorted(changed.patcher.object_patches)
    assert len(paths) == 2
    for path in paths:
        name = path.removesuffix(".forward").partition("text_model.")[2]
        theirs: Any = next(module for key, module in layers.items() if key.endswith(name))
        with torch.no_grad(), changed.patcher.loaded() as loaded:
            ours = loaded.get_submodule(path.removesuffix(".forward"))(x, mask, comfy.optimized_attention)
            torch.testing.assert_close(ours, theirs(x, mask[None, None])[0], **CLOSE)
    assert not clip.patcher.object_patches


def test_learned_words(place: Any) -> None:
    model, clip = host(place[2])
    _, dog = node(place, "ComcatLoadAdapter").load(model, "dog.safetensors", 1.0, clip)
    _, both = node(place, "ComcatLoadAdapter").load(model, "dog.safetensors", 1.0, dog, None, "<dog>")
    vectors = load_file(place[0] / "comcat" / "dog.safetensors")["token.text_encoder"]

    def tokens(clip: Any, text: str) -> list[Any]:
        return [t if isinstance(t, str) else t.tolist() for t, _ in clip.tokenizer.clip_l.tokenize_with_weights(text)]

    row = vectors[0].tolist()
    assert tokens(dog, "a V*, and embedding:cat x") == ["a", row, ",", "and", [7.0] * 15, "x"]
    assert tokens(dog, "V* xV* <dog>") == [row, "xV*", "<dog>"]
    assert tokens(both, "V* on <dog>") == [row, "on", row]
    assert tokens(clip, "a V*") == ["a", "V*"]
    with pytest.raises(ModelError, match=r"two adapters have learned the word 'V\*'; give one of them another word"):
        node(place, "ComcatLoadAdapter").load(model, "dog.safetensors", 1.0, dog)


def test_as_a_lora(place: Any) -> None:
    models, _, pipe = place
    model, clip = host(pipe)
    result = node(place, "ComcatSaveLora").save(model, "dog.safetensors", 0.5, "dog", clip)
    path, error = result["result"]
    assert Path(path) == models / "loras" / "dog.safetensors"
    assert 0 < error < 1
    assert f"dog.safetensors: {100 * error:.1f} % off" in result["ui"]["text"][0]
    customize.set_adapters(pipe, {"dog": 0.5}, {})
    conversion = customize.export_lora(pipe, models / "other.safetensors", name="dog", layout="kohya")
    assert error == pytest.approx(conversion.relative, rel=1e-4)
    ours, theirs = load_file(path), load_file(models / "other.safetensors")
    assert ours.keys() == theirs.keys()
    products = [key.removesuffix(".lora_down.weight") for key in ours if key.endswith(".lora_down.weight")]
    for key in products:  # factors are given up to a change of basis
        found, wanted = (t[f"{key}.lora_up.weight"] @ t[f"{key}.lora_down.weight"] for t in (ours, theirs))
        torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-5)
    assert load_file(models / "loras" / "dog.embedding.safetensors")["V*"].shape == (1, 15)
    with pytest.raises(CheckpointError, match=r"'dog.safetensors' is there already in loras; choose another file_name"):
        node(place, "ComcatSaveLora").save(model, "dog.safetensors", 0.5, "dog", clip)
    for name in ("", "../dog", "a/b", ".dog"):
        with pytest.raises(CheckpointError, match="is no name of a file"):
            node(place, "ComcatSaveLora").save(model, "dog.safetensors", 0.5, name, clip)


# The contract


def test_what_nodes_say_of_themselves(place: Any) -> None:
    pack = place[1]
    assert pack.NODE_CLASS_MAPPINGS.keys() == pack.NODE_DISPLAY_NAME_MAPPINGS.keys()
    for kind in pack.NODE_CLASS_MAPPINGS.values():
        types = kind.INPUT_TYPES()
        assert set(types) <= {"required", "optional"}
        inputs = {name for group in types.values() for name in group}
        function = getattr(kind, kind.FUNCTION)
        code = function.__code__
        takes_all = bool(code.co_flags & 0x08)
        assert takes_all or inputs <= set(code.co_varnames[: code.co_argcount])
        assert isinstance(kind.RETURN_TYPES, tuple)
        assert kind.CATEGORY == "comcat"
    choices = pack.NODE_CLASS_MAPPINGS["ComcatLoadAdapter"].INPUT_TYPES()["required"]["adapter"][0]
    assert choices == ["cat.safetensors", "dog.safetensors"]


def test_a_changed_file_is_noticed(place: Any) -> None:
    models, pack, _ = place
    (models / "comcat" / "new.safetensors").write_bytes(b"1")
    changed = pack.NODE_CLASS_MAPPINGS["ComcatLoadAdapter"].IS_CHANGED
    before = changed(adapter="new.safetensors", strength=1.0)
    assert changed(adapter="new.safetensors", strength=2.0) == before
    (models / "comcat" / "new.safetensors").write_bytes(b"12")
    assert changed(adapter="new.safetensors") != before
    (models / "comcat" / "new.safetensors").unlink()


# Refused


def test_refusals(place: Any) -> None:
    model, clip = host(place[2])
    load = node(place, "ComcatLoadAdapter").load
    with pytest.raises(ModelError, match=r"'dog.safetensors' has text_encoder and a learned word: connect"):
        load(model, "dog.safetensors", 1.0)
    other = comfy.ModelPatcher(nn.Module())
    with pytest.raises(ModelError, match=r"UNets of SD 1.x, 2.x and XL, and this model is a Module. .* Load LoRA"):
        load(other, "cat.safetensors", 1.0)
    with pytest.raises(DataError, match="the mask is black everywhere"):
        load(model, "cat.safetensors", 1.0, None, torch.zeros(1, 8, 12))
    with pytest.raises(DataError, match=r"of the shape \(height, width\), not \(2, 8, 12\)"):
        load(model, "cat.safetensors", 1.0, None, torch.ones(2, 8, 12))
    with pytest.raises(ModelError, match="mask_2 is connected, and adapter_2 is 'none'"):
        stack(place, model, clip, mask_2=torch.ones(1, 1, 1))
    square, _ = load(model, "cat.safetensors", 1.0, None, torch.ones(1, 8, 8))
    with pytest.raises(DataError, match=r"the mask of 'cat' is 8 x 8 pixels .*, and the picture 48 x 32"):
        drawn(square)
    path = "diffusion_model.mid_block.attentions.0.transformer_blocks.0.attn2.attn.forward"
    model.add_object_patch(path, print)
    with pytest.raises(ModelError, match=r"another node has replaced the attention layer .*attn2.attn, which comcat"):
        load(model, "cat.safetensors", 1.0)


def test_a_model_of_another_width(place: Any, tmp_path: Path) -> None:
    pipe = place[2]
    model, _ = host(pipe)
    for layer in model.model.diffusion_model.modules():
        if isinstance(layer, comfy.CrossAttention):
            layer.heads, layer.dim_head = layer.heads // 2, layer.dim_head * 2
    with pytest.raises(CheckpointError, match=r"'cat.safetensors' does not fit this unet: .* other heads or widths"):
        node(place, "ComcatLoadAdapter").load(model, "cat.safetensors", 1.0)


def test_layers_that_another_node_goes_around(place: Any) -> None:
    """A node behind ours that replaces attention altogether would silently switch the products off."""
    model, _ = host(place[2])
    patched, _ = node(place, "ComcatLoadAdapter").load(model, "cat.safetensors", 1.0)
    again, _ = node(place, "ComcatLoadAdapter").load(patched, "cat.safetensors", 1.0)
    (watch,) = again.get_wrappers("diffusion_model", "comcat")
    options = {"sigmas": None, "patches_replace": {"attn2": {("middle", 0): print}}}
    assert watch(lambda *args, **kwargs: 5, 1, 2, {"sigmas": None}) == 5
    with pytest.raises(ModelError, match="another node replaces attn2 of this model"):
        watch(lambda *args, **kwargs: 5, 1, 2, options)
    with pytest.raises(ModelError, match="another node replaces attn2 of this model"):
        watch(lambda *args, **kwargs: 5, transformer_options=options)
