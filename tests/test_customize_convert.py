"""Adapters as LoRAs and back: errors are what they are said to be, also in the eyes of diffusers."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from comcat import CheckpointError, ModelError
from comcat.customize import Adapter, adapters, add_adapter, export_lora, import_lora
from comcat.customize.adapter.components import find_addable
from comcat.customize.lora.denoiser_moments import InputMoments, record
from comcat.customize.lora.denoiser_probe import denoiser_output, output_error
from comcat.customize.lora.exporting import as_lora, embedding_path
from comcat.customize.lora.keys import to_diffusers
from comcat.customize.teaching.families import family_of
from comcat_demos import digits

PROMPT = "a photo of the digit three"
HEADS = 4


@pytest.fixture(scope="module")
def pipe():
    """Shared: every test leaves it as it was."""
    return digits.build().to(torch.float32)


@pytest.fixture(autouse=True)
def clean(pipe):
    yield
    for handle in adapters(pipe).values():
        handle.remove()
    assert not hasattr(pipe.unet, "peft_config")


def random_adapter(pipe: Any, size: float = 0.3, **options: Any) -> Adapter:
    handle = add_adapter(pipe, **{"rank": 2, "scale": 0.7, **options}).requires_grad_(False)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in handle.named_parameters():
        if not name.startswith("token"):
            parameter.copy_(size * torch.randn(parameter.shape, generator=generator) / parameter.shape[1] ** 0.5)
    return handle


def parts_of(pipe: Any, handle: Adapter) -> Any:
    """(component, name, attention, layer) of all layers."""
    models = {"unet": pipe.unet, "text_encoder": pipe.text_encoder}
    for (component, name), layer in handle.layers.items():
        yield component, name, find_addable(component, models[component])[0][name], layer


def heads(weight: Tensor) -> Tensor:
    """(H d, D) to (H, D, d)."""
    return weight.detach().double().unflatten(0, (HEADS, -1)).mT


def with_bias(linear: Any, weight: Tensor) -> Tensor:
    """(H, D + 1, d) where there is a bias."""
    bias = linear.bias
    if bias is None:
        return heads(weight)
    return torch.cat([heads(weight), bias.detach().double().view(HEADS, 1, -1)], 1)


def measured(attention: Any, layer: Any, factors: dict, part: str) -> tuple[float, float]:
    """(error over effect, effect) of a product, from whole matrices."""
    (stream,) = attention.streams
    product, scale = layer[stream.name], layer.strength.scale
    names = (stream.query, stream.key) if part == "qk" else (stream.value, stream.output)

    def changed(name: str) -> Tensor:
        weight = attention.linear(name).weight.detach().double()
        path = f"{attention.name}.{name}"
        return weight + factors[path].up.double() @ factors[path].down.double() if path in factors else weight

    first, second = (attention.linear(name) for name in names)
    added = (product.query, product.key) if part == "qk" else (product.value, product.output)
    A = heads(added[0].weight) * scale
    if first.bias is not None:
        extra = added[0].bias if added[0].bias is not None else torch.zeros(len(added[0].weight))
        A = torch.cat([A, scale * extra.detach().double().view(HEADS, 1, -1)], 1)
    turn = heads if part == "qk" else lambda w: heads(w.mT)
    B = turn(added[1].weight)
    base = with_bias(first, first.weight) @ turn(second.weight).mT
    new = with_bias(first, changed(names[0])) @ turn(changed(names[1])).mT
    effect = (A @ B.mT).norm()
    return float((new - base - A @ B.mT).norm() / effect), float(effect)


@pytest.mark.parametrize("rank", [None, 5, 1])
@pytest.mark.parametrize("size", [0.1, 1.0])
def test_reported_errors_are_those_of_the_products(pipe, rank, size):
    handle = random_adapter(pipe, size, text_encoder_rank=1)
    factors, conversion = as_lora(handle, rank=rank)
    reported = {(e.component, e.layer, e.part): e for e in conversion.errors}
    for component, name, attention, layer in parts_of(pipe, handle):
        for part in ("qk", "vo"):
            error, effect = measured(attention, layer, factors[component], part)
            got = reported.pop((component, name, part))
            assert got.effect == pytest.approx(effect, rel=1e-9)
            assert got.relative == pytest.approx(error, rel=1e-4, abs=1e-6)
    assert not reported
    assert max(len(lora.down) for part in factors.values() for lora in part.values()) == (rank or 2 * HEADS)
    effects = torch.tensor([e.effect for e in conversion.errors])
    errors = effects * torch.tensor([e.relative for e in conversion.errors])
    assert conversion.relative == pytest.approx(float(errors.norm() / effects.norm()), rel=1e-5)
    assert not conversion.dropped


@pytest.mark.parametrize("side", ["left", "right"])
def test_an_adapter_in_the_span_of_the_layer_is_exact(pipe, side):
    """A B^T = L c B^T or A c^T R^T: a LoRA of one side alone."""
    handle = random_adapter(pipe)
    generator = torch.Generator().manual_seed(2)
    for _, _, attention, layer in parts_of(pipe, handle):
        (stream,) = attention.streams
        product = layer[stream.name]
        pairs = [(product.query, stream.query), (product.value, stream.value)]
        if side == "right":
            pairs = [(product.key, stream.key)]
            out = attention.linear(stream.output).weight.detach().unflatten(1, (HEADS, -1))  # (D, H, d)
            mix = torch.randn(HEADS, out.shape[2], 2, generator=generator)
            product.output.weight.copy_(torch.einsum("nhd,hdr->nhr", out, mix).flatten(1))
        for linear, name in pairs:
            weight = attention.linear(name).weight.detach().unflatten(0, (HEADS, -1))  # (H, d, D)
            mix = torch.randn(HEADS, 2, weight.shape[1], generator=generator)
            linear.weight.copy_((mix @ weight).flatten(0, 1))
    factors, conversion = as_lora(handle)
    assert conversion.relative < 1e-5
    assert output_error(handle, factors, PROMPT) < 1e-3


def loaded_error(pipe: Any, handle: Adapter, path: Path, prompt: str) -> float:
    """The error of the denoiser's output, where diffusers loads the file."""
    family = family_of(pipe)
    wanted = denoiser_output(family, prompt)
    handle.enabled = False
    plain = denoiser_output(family, prompt)
    pipe.load_lora_weights(path)
    try:
        got = denoiser_output(family, prompt)
    finally:
        pipe.unload_lora_weights()
        handle.enabled = True
    assert torch.equal(denoiser_output(family, prompt), wanted)
    return float((got - wanted).norm() / (wanted - plain).norm())


@pytest.mark.parametrize("layout", ["diffusers", "kohya"])
@pytest.mark.parametrize("options", [{}, {"text_encoder_rank": 2}])
def test_diffusers_loads_what_is_written(pipe, tmp_path, layout, options):
    handle = random_adapter(pipe, **options)
    path = tmp_path / "lora.safetensors"
    conversion = export_lora(pipe, path, layout=layout)
    factors, again = as_lora(handle)
    assert conversion == again
    error = output_error(handle, factors, PROMPT)
    assert 0.01 < error < 2
    assert loaded_error(pipe, handle, path, PROMPT) == pytest.approx(error, rel=1e-4)


def test_the_inputs_make_a_better_lora(pipe):
    handle = random_adapter(pipe)
    factors, _ = as_lora(handle)
    weighed, _ = as_lora(handle, roots=record(handle, [PROMPT], images=1, steps=3).roots)
    assert output_error(handle, weighed, PROMPT) < output_error(handle, factors, PROMPT)


def test_a_token_in_a_file_of_its_own(pipe, tmp_path):
    handle = random_adapter(pipe, token="V*", token_vectors=2)
    rows = handle.token.vectors["text_encoder"].detach().clone()
    path = tmp_path / "lora.safetensors"
    conversion = export_lora(pipe, path)
    assert conversion.dropped == ["the vectors of the token 'V*', which go into a file of their own"]
    handle.remove()
    fresh = digits.build()
    fresh.load_textual_inversion(embedding_path(path))
    ids = fresh.tokenizer.convert_tokens_to_ids(["V*", "V*_1"])
    assert torch.equal(fresh.text_encoder.get_input_embeddings().weight[ids], rows)


# Import


def write_lora(pipe: Any, path: Path, components: tuple[str, ...] = ("unet",), rank: int = 1) -> Path:
    """A random LoRA on every projection of every attention layer."""
    generator = torch.Generator().manual_seed(3)
    factors: dict[str, dict] = {}
    for component in components:
        for attention in find_addable(component, getattr(pipe, component))[0].values():
            (stream,) = attention.streams
            for name in (stream.query, stream.key, stream.value, stream.output):
                linear = attention.linear(name)
                down = torch.randn(rank, linear.in_features, generator=generator)
                up = torch.randn(linear.out_features, rank, generator=generator) * 0.1
                factors.setdefault(component, {})[f"{attention.name}.{name}"] = (down, up)
    save_file(to_diffusers(factors), path)
    return path


@torch.no_grad()
@pytest.mark.parametrize("components", [("unet",), ("unet", "text_encoder")])
def test_import_is_exact_at_twice_the_rank(pipe, tmp_path, components):
    path = write_lora(pipe, tmp_path / "lora.safetensors", components)
    family = family_of(pipe)
    plain = denoiser_output(family, PROMPT)
    pipe.load_lora_weights(path)
    wanted = denoiser_output(family, PROMPT)
    pipe.unload_lora_weights()
    assert (wanted - plain).norm() > 0.05 * plain.norm()
    errors = []
    for rank in (2, 1):
        handle, conversion = import_lora(pipe, path, rank=rank)
        errors.append(float((denoiser_output(family, PROMPT) - wanted).norm() / (wanted - plain).norm()))
        assert (conversion.relative < 1e-6) == (rank == 2)
        assert not conversion.dropped
        handle.scale = 0
        assert torch.equal(denoiser_output(family, PROMPT), plain)
        handle.remove()
    assert errors[0] < 1e-4 < errors[1] < 1


def test_an_imported_bias_is_counted_when_it_goes_back(pipe, tmp_path):
    """CLIP's projections have biases: an imported LoRA then has constants that no LoRA can hold."""
    handle, _ = import_lora(pipe, write_lora(pipe, tmp_path / "lora.safetensors", ("text_encoder",)), rank=2)
    assert any(name.endswith("bias") for name, _ in handle.named_parameters())
    factors, conversion = as_lora(handle)
    reported = {(e.layer, e.part): e.relative for e in conversion.errors}
    for component, name, attention, layer in parts_of(pipe, handle):
        for part in ("qk", "vo"):
            error, _ = measured(attention, layer, factors[component], part)
            assert reported[name, part] == pytest.approx(error, rel=1e-3, abs=1e-6)


def test_what_products_cannot_express(pipe, tmp_path):
    path = write_lora(pipe, tmp_path / "lora.safetensors")
    tensors = load_file(path)
    block = next(iter(tensors)).rpartition(".attn")[0]
    width = pipe.unet.get_submodule(block.removeprefix("unet.")).ff.net[2].weight.shape
    tensors[f"{block}.ff.net.2.lora_A.weight"] = torch.ones(1, width[1])
    tensors[f"{block}.ff.net.2.lora_B.weight"] = torch.ones(width[0], 1)
    save_file(tensors, path)
    with pytest.raises(CheckpointError, match=r"cannot express: \S*ff.net.2 \(1 in all\); take the rest .*--partial"):
        import_lora(pipe, path, rank=2)
    assert not adapters(pipe)
    _, conversion = import_lora(pipe, path, rank=2, partial=True)
    assert [name.rpartition(".attentions")[2][-8:] for name in conversion.dropped] == ["ff.net.2"]
    assert conversion.relative < 1e-6


def test_ranks_and_names_of_an_import(pipe, tmp_path):
    path = write_lora(pipe, tmp_path / "lora.safetensors")
    for rank in (0, 9, -1):
        with pytest.raises(ModelError, match=f"rank {rank}|rank is {rank}"):
            import_lora(pipe, path, rank=rank)
    with pytest.raises(ModelError, match="letters, digits"):
        import_lora(pipe, path, rank=2, name="a b")
    handle, _ = import_lora(pipe, path, rank=8)
    with pytest.raises(ModelError, match="there is an adapter 'lora' on this pipeline already"):
        import_lora(pipe, path, rank=2)
    handle.remove()
    tensors = {key.replace("attn", "other"): t for key, t in load_file(path).items()}
    save_file(tensors, path)
    for partial in (False, True):
        with pytest.raises(CheckpointError, match="nothing in the LoRA file belongs to this model"):
            import_lora(pipe, path, rank=2, partial=partial)
    with pytest.raises(CheckpointError, match="layout is 'a1111'; choose one of diffusers, kohya"):
        export_lora(pipe, path, layout="a1111")


# Moments


@torch.no_grad()
def test_roots_give_the_second_moments(pipe):
    handle = random_adapter(pipe, rank=1, targets="mid_block")
    moments, seen = InputMoments(handle), {}
    attentions = {name: attention for _, name, attention, _ in parts_of(pipe, handle)}

    def keep(key: tuple) -> Any:
        return lambda module, args: seen.setdefault(key, []).append(args[0].flatten(0, -2).double())

    hooks = [
        attention.linear(name).register_forward_pre_hook(keep((layer, name)))
        for layer, attention in attentions.items()
        for name in ("to_q", "to_k")
    ]
    with moments.recording():
        denoiser_output(family_of(pipe), PROMPT, 1)
        denoiser_output(family_of(pipe), "", 2)
    for hook in hooks:
        hook.remove()
    denoiser_output(family_of(pipe), PROMPT, 3)  # nothing is recorded any more
    for layer, attention in attentions.items():
        for part, names in (("qk", ("to_q", "to_k")), ("vo", ("to_k", None))):
            for root, name in zip(moments.roots("unet", attention, part), names, strict=True):
                if name is None:
                    assert root is None
                    continue
                x = torch.cat(seen[layer, name])
                moment = x.T @ x / len(x)
                ridge = 1e-4 * moment.diagonal().mean() * torch.eye(len(moment))
                torch.testing.assert_close(root.T @ root, moment + ridge, rtol=1e-6, atol=1e-9)
    assert moments._moments["unet", f"{layer}.to_q"].count == len(torch.cat(seen[layer, "to_q"]))
