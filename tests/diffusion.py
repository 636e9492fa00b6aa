"""Tiny random text-to-image models of every architecture that adapters know, and whole pipelines around them.

Head widths are no multiples of 8, and dimensions differ wherever an architecture lets them.
"""

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    PixArtTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tokenizers.pre_tokenizers import ByteLevel
from torch import Tensor, nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
)

from comcat import customize
from comcat.customize import Adapter
from comcat.errors import CheckpointError
from conftest import randomize

#: Words that the tokenizer has whole.
WORDS = ("a", "photo", "of", "dog", "cat")
TOKENS = 17


def sd1(cross: int = 7, heads: int = 2) -> nn.Module:
    return UNet2DConditionModel(
        sample_size=4,
        block_out_channels=(10, 20),
        layers_per_block=1,
        norm_num_groups=5,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=cross,
        attention_head_dim=heads,
    )


def sdxl(cross: int = 7, pooled: int = 11) -> nn.Module:
    return UNet2DConditionModel(
        sample_size=4,
        block_out_channels=(10, 20),
        layers_per_block=1,
        norm_num_groups=5,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=cross,
        attention_head_dim=(2, 4),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=2,
        transformer_layers_per_block=(1, 2),
        projection_class_embeddings_input_dim=6 * 2 + pooled,
    )


def sd3(joint: int = 13, pooled: int = 11, **args: Any) -> nn.Module:
    return SD3Transformer2DModel(
        sample_size=4,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=4,
        num_attention_heads=3,
        joint_attention_dim=joint,
        caption_projection_dim=12,
        pooled_projection_dim=pooled,
        pos_embed_max_size=4,
        **args,
    )


def sd35() -> nn.Module:
    return sd3(qk_norm="rms_norm", dual_attention_layers=(0,))


def flux(channels: int = 4, pooled: int = 11) -> nn.Module:
    return FluxTransformer2DModel(
        patch_size=1,
        in_channels=channels,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=10,
        num_attention_heads=3,
        joint_attention_dim=13,
        pooled_projection_dim=pooled,
        axes_dims_rope=(2, 4, 4),
        guidance_embeds=False,
    )


def pixart() -> nn.Module:
    return PixArtTransformer2DModel(
        num_attention_heads=3,
        attention_head_dim=4,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        cross_attention_dim=12,
        caption_channels=7,
        sample_size=4,
        patch_size=2,
        norm_num_groups=1,
        use_additional_conditions=False,
    )


MODELS: dict[str, Callable[[], nn.Module]] = {f.__name__: f for f in (sd1, sdxl, sd3, sd35, flux, pixart)}


def model(name: str, dtype: torch.dtype = torch.float64, seed: int = 0) -> Any:
    """A frozen random model in evaluation mode."""
    return randomize(MODELS[name](), seed).to(dtype).eval().requires_grad_(False)


def inputs(model: Any, dtype: torch.dtype = torch.float64, batch: int = 2) -> dict[str, Any]:
    """What ``model`` takes; with a mask over the text where it takes one."""
    generator = torch.Generator().manual_seed(3)

    def random(*shape: int) -> Tensor:
        return torch.randn(batch, *shape, generator=generator, dtype=torch.float64).to(dtype)

    mask = torch.ones(batch, 5, dtype=torch.bool)
    mask[0, 3:] = False
    kind = type(model).__name__
    if kind == "UNet2DConditionModel":
        found: dict[str, Any] = {
            "sample": random(4, 4, 4),
            "timestep": torch.tensor([7] * batch),
            "encoder_hidden_states": random(5, model.config.cross_attention_dim),
            "encoder_attention_mask": mask,
        }
        if model.config.addition_embed_type:
            found["added_cond_kwargs"] = {"text_embeds": random(11), "time_ids": random(6)}
        return found
    if kind == "PixArtTransformer2DModel":
        return {
            "hidden_states": random(4, 4, 4),
            "encoder_hidden_states": random(5, 7),
            "timestep": torch.tensor([7] * batch),
            "encoder_attention_mask": mask.to(dtype),
            "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
        }
    found = {
        "encoder_hidden_states": random(5, 13),
        "pooled_projections": random(11),
        "timestep": torch.tensor([0.7] * batch, dtype=dtype),
    }
    if kind == "SD3Transformer2DModel":
        return {**found, "hidden_states": random(4, 4, 4)}
    places = torch.cartesian_prod(torch.arange(1), torch.arange(2), torch.arange(3)).to(dtype)
    return {**found, "hidden_states": random(6, 4), "img_ids": places, "txt_ids": torch.zeros(5, 3, dtype=dtype)}


@torch.no_grad()
def output(model: Any, x: dict[str, Any]) -> Tensor:
    found: Tensor = model(**x)[0]
    return found


def fill(adapter: Adapter, seed: int = 1) -> Adapter:
    """Random factors in the place of the zeros."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in adapter.parameters():
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        parameter.data.copy_(noise / parameter.shape[-1] ** 0.5)
    return adapter


def snapshot(module: nn.Module) -> dict[str, tuple[Any, ...]]:
    """Everything by which one could see that something was changed: classes, attributes, processors, tensors."""
    found: dict[str, tuple[Any, ...]] = {}
    for name, part in module.named_modules():
        plain = {k: v for k, v in part.__dict__.items() if k not in ("_modules", "_parameters", "_buffers")}
        tensors = {k: (id(v), v._version) for k, v in part._parameters.items() if v is not None}
        found[name] = (type(part), sorted(plain), id(getattr(part, "processor", None)), list(part._modules), tensors)
    return found


# Pipelines


@cache
def _vocabulary() -> tuple[dict[str, int], list[tuple[str, str]]]:
    alphabet = sorted(ByteLevel.alphabet())
    entries = alphabet + [letter + "</w>" for letter in alphabet]
    merges = []
    for word in WORDS:
        letters = [*word[:-1], word[-1] + "</w>"]
        for i in range(1, len(letters)):
            merges.append(("".join(letters[:i]), letters[i]))
            entries.append("".join(merges[-1]))
    entries += ["<|startoftext|>", "<|endoftext|>"]
    return {entry: i for i, entry in enumerate(dict.fromkeys(entries))}, merges


def tokenizer() -> CLIPTokenizer:
    vocabulary, merges = _vocabulary()
    return CLIPTokenizer(dict(vocabulary), list(merges), model_max_length=TOKENS)


def text_encoder(
    heads: int = 3, width: int = 5, projection: int | None = None, old: bool = False, seed: int = 0, **args: Any
) -> Any:
    """``old``: a configuration in which ``eos_token_id`` is 2, as the first ones had it."""
    words = tokenizer()
    config = CLIPTextConfig(
        vocab_size=len(words),
        hidden_size=heads * width,
        intermediate_size=19,
        num_hidden_layers=2,
        num_attention_heads=heads,
        max_position_embeddings=TOKENS,
        projection_dim=projection or 11,
        bos_token_id=words.bos_token_id,
        eos_token_id=2 if old else words.eos_token_id,
        pad_token_id=words.pad_token_id,
        **args,
    )
    encoder = CLIPTextModel(config) if projection is None else CLIPTextModelWithProjection(config)
    return randomize(encoder, seed).eval().requires_grad_(False)


def _vae() -> Any:
    vae = AutoencoderKL(
        block_out_channels=(6,),
        down_block_types=("DownEncoderBlock2D",),
        up_block_types=("UpDecoderBlock2D",),
        norm_num_groups=3,
        latent_channels=4,
        sample_size=4,
    )
    return randomize(vae).eval().requires_grad_(False)


def _ddim() -> DDIMScheduler:
    return DDIMScheduler(steps_offset=1, clip_sample=False)


def pipeline(name: str = "sd1", **encoder: Any) -> Any:
    """A frozen pipeline whose text encoders are CLIP's; FLUX has a T5 as well."""
    first: dict[str, Any] = {"text_encoder": text_encoder(projection=13 if name == "sd3" else None, **encoder)}
    second = {"text_encoder_2": text_encoder(2, 7, 11, seed=1, **encoder), "tokenizer_2": tokenizer()}
    shared = {**first, "tokenizer": tokenizer(), "vae": _vae()}
    pipe: DiffusionPipeline
    if name == "sd1":
        extra: dict[str, Any] = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
        pipe = StableDiffusionPipeline(**shared, unet=frozen(sd1(15)), scheduler=_ddim(), **extra)
    elif name == "sdxl":
        unet = frozen(sdxl(29, 11))
        pipe = StableDiffusionXLPipeline(**shared, **second, unet=unet, scheduler=_ddim(), add_watermarker=False)
    elif name == "flux":
        t5 = T5Config(vocab_size=len(tokenizer()), d_model=13, d_kv=5, d_ff=17, num_layers=1, num_heads=2)
        pipe = FluxPipeline(
            **shared,
            text_encoder_2=frozen(T5EncoderModel(t5)),
            tokenizer_2=tokenizer(),
            transformer=frozen(flux(16, 15)),
            scheduler=FlowMatchEulerDiscreteScheduler(),
        )
    else:
        pipe = StableDiffusion3Pipeline(
            **shared,
            **second,
            text_encoder_3=None,
            tokenizer_3=None,
            transformer=frozen(sd3(31, 24)),
            scheduler=FlowMatchEulerDiscreteScheduler(),
        )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def frozen(module: nn.Module) -> Any:
    return randomize(module).eval().requires_grad_(False)


def picture(pipe: Any, prompt: str = "a photo of a dog", **args: Any) -> Tensor:
    """Latents after two steps."""
    generator = torch.Generator().manual_seed(5)
    found = pipe(prompt, height=8, width=8, num_inference_steps=2, generator=generator, output_type="latent", **args)
    latents: Tensor = found.images
    return latents


def on(host: str, dtype: torch.dtype = torch.float32, **args: Any) -> tuple[Any, dict[str, Any], Tensor, Any]:
    """A model, its inputs, its base output, and an adapter with random factors on it."""
    m = model(host, dtype)
    x = inputs(m, dtype)
    base = output(m, x)
    return m, x, base, fill(customize.add_adapter(m, **args))


def metadata(path: Path) -> dict[str, Any]:
    """What an adapter file says of itself."""
    with safe_open(path, "pt") as file:
        found: dict[str, Any] = json.loads(file.metadata()["comcat"])
    return found


def changed(path: Path, edit: Callable[[dict[str, Any], dict[str, Tensor]], Any]) -> Path:
    """The file with other metadata or tensors."""
    data, tensors = metadata(path), load_file(path)
    edit(data, tensors)
    save_file(tensors, path, {"comcat": json.dumps(data)})
    return path


def refused(m: Any, path: Path, message: str, error: type[Exception] = CheckpointError) -> None:
    """Loading the file fails with this message, and leaves nothing on the model."""
    with pytest.raises(error, match=message) as caught:
        customize.load_adapter(m, path)
    assert type(caught.value) is error
    assert customize.adapters(m) == {}
    assert not any("adapters" in key for key in m.state_dict())
