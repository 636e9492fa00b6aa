"""Every family of pipelines: the denoiser is called as its pipeline calls it, and an adapter learns through it."""

import copy
from typing import Any

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    PixArtAlphaPipeline,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
)
from PIL import Image
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel

import diffusion
from comcat import DataError, ModelError
from comcat.customize import CustomizeConfig, generate, load_adapter, save_adapter, train
from comcat.customize.teaching.families import family_of
from comcat.customize.teaching.photos import Bucket, frame

NAMES = ("sd1", "sdxl", "sd3", "sd3-t5", "flux", "flux-guided", "alpha", "alpha-sized", "sigma")
PROMPT = "a photo of a dog"


def t5(width: int) -> dict[str, Any]:
    """A tiny T5 and a tokenizer of whole words, under no names yet."""
    words = {word: i for i, word in enumerate(("<pad>", "<unk>", "</s>", *diffusion.WORDS))}
    whole = Tokenizer(WordLevel(words, unk_token="<unk>"))
    whole.pre_tokenizer = Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=whole, pad_token="<pad>", unk_token="<unk>", eos_token="</s>", model_max_length=19
    )
    config = T5Config(
        vocab_size=len(words), d_model=width, d_kv=3, d_ff=11, num_layers=1, num_heads=2, feed_forward_proj="gated-gelu"
    )
    return {"encoder": diffusion.frozen(T5EncoderModel(config)), "tokenizer": tokenizer}


def vae(channels: int) -> Any:
    return diffusion.frozen(
        AutoencoderKL(
            block_out_channels=(6,),
            down_block_types=("DownEncoderBlock2D",),
            up_block_types=("UpDecoderBlock2D",),
            norm_num_groups=3,
            latent_channels=channels,
            scaling_factor=0.7,
            shift_factor=0.2,
        )
    )


def flux(guided: bool) -> Any:
    config = dict(diffusion.flux().config)
    text = t5(13)
    pipe = FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True, base_image_seq_len=4, max_image_seq_len=64
        ),
        vae=vae(1),
        text_encoder=diffusion.text_encoder(2, 5, hidden_act="gelu"),
        tokenizer=diffusion.tokenizer(),
        text_encoder_2=text["encoder"],
        tokenizer_2=text["tokenizer"],
        transformer=diffusion.frozen(
            FluxTransformer2DModel.from_config({**config, "guidance_embeds": guided, "pooled_projection_dim": 10})
        ),
    )
    pipe.default_sample_size = 8
    return pipe


def pixart(cls: Any, sized: bool) -> Any:
    config = {**diffusion.pixart().config, "use_additional_conditions": sized, "sample_size": 128 if sized else 8}
    text = t5(7)
    return cls(
        tokenizer=text["tokenizer"],
        text_encoder=text["encoder"],
        vae=vae(4),
        transformer=diffusion.frozen(PixArtTransformer2DModel.from_config(config)),
        scheduler=DDIMScheduler(steps_offset=1, clip_sample=False),
    )


def build(name: str) -> Any:
    """A tiny random pipeline."""
    if name in ("sd1", "sdxl", "sd3"):
        return diffusion.pipeline(name)
    if name == "sd3-t5":
        pipe = diffusion.pipeline("sd3")
        text = t5(31)
        pipe.register_modules(text_encoder_3=text["encoder"], tokenizer_3=text["tokenizer"])
        return pipe
    kinds = {
        "flux": lambda: flux(False),
        "flux-guided": lambda: flux(True),
        "alpha": lambda: pixart(PixArtAlphaPipeline, False),
        "alpha-sized": lambda: pixart(PixArtAlphaPipeline, True),
        "sigma": lambda: pixart(PixArtSigmaPipeline, False),
    }
    pipe = kinds[name]()
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module", params=NAMES)
def made(request):
    return request.param, build(request.param)


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    for i, size in enumerate([(8, 8), (11, 9)]):
        noise = torch.randint(0, 256, (*size, 3), generator=torch.Generator().manual_seed(i), dtype=torch.uint8)
        Image.fromarray(noise.numpy()).save(folder / f"{i}.png")
    return folder


def own_call(pipe: Any, latents: Tensor, size: tuple[int, int], **options: Any) -> tuple[Tensor, Tensor]:
    """(time step, output) of the denoiser when the pipeline itself calls it first."""
    seen: list[tuple[Tensor, Tensor]] = []

    def record(_: nn.Module, args: tuple, kwargs: dict, out: Any) -> None:
        seen.append((kwargs.get("timestep", args[1] if len(args) > 1 else None), out[0]))

    hook = family_of(pipe).model.register_forward_hook(record, with_kwargs=True)
    try:
        pipe(
            PROMPT,
            num_inference_steps=3,
            guidance_scale=1.0,
            latents=latents,
            output_type="latent",
            height=size[0],
            width=size[1],
            **options,
        )
    finally:
        hook.remove()
    return seen[0]


@torch.no_grad()
def test_the_denoiser_is_called_as_by_its_pipeline(made):
    name, pipe = made
    family = family_of(pipe)
    channels = family.vae.config.latent_channels
    size = (8, 4) if name.startswith("sd3") else (8, 16)
    latents = torch.randn(1, channels, *size, generator=torch.Generator().manual_seed(2))
    framing = frame((20, 47), Bucket(*size), crop=(0.5, 0.25))
    options: dict[str, Any] = {}
    given = latents
    if name == "sdxl":
        options = {
            "original_size": framing.original_size,
            "crops_coords_top_left": framing.crop_top_left,
            "target_size": framing.target_size,
        }
    if name.startswith("flux"):
        given = pipe._pack_latents(latents, 1, channels, *size)
    if name in ("alpha", "alpha-sized", "sigma"):
        options = {"use_resolution_binning": False, "clean_caption": False}
    time, wanted = own_call(pipe, given, size, **options)
    if name.startswith("flux"):
        time = time * 1000
        wanted = pipe._unpack_latents(wanted, *size, 1)
    got = family.predict(
        latents, time.reshape(-1), family.encode_text([PROMPT]), torch.tensor([framing.time_ids], dtype=torch.float32)
    )
    assert got.shape == latents.shape
    torch.testing.assert_close(got, wanted[:, :channels], rtol=1e-5, atol=1e-5)
    other = torch.tensor([framing.time_ids[::-1]], dtype=torch.float32)
    moved = family.predict(latents, time.reshape(-1), family.encode_text([PROMPT]), other)
    assert torch.equal(moved, got) == (name not in ("sdxl", "alpha-sized"))


@torch.no_grad()
def test_images_become_the_latents_that_are_decoded(made):
    _, pipe = made
    family = family_of(pipe)
    images = torch.randn(2, 3, 8, 12, generator=torch.Generator().manual_seed(1))
    mean, std = family.encode_images(images)
    distribution = pipe.vae.encode(images).latent_dist
    config = pipe.vae.config
    back = mean / config.scaling_factor + (config.shift_factor or 0.0)  # what the pipelines decode
    torch.testing.assert_close(back, distribution.mean)
    torch.testing.assert_close(std, distribution.std * config.scaling_factor)


def tensors(pipe: Any) -> dict[str, Tensor]:
    parts = {k: v for k, v in pipe.components.items() if isinstance(v, nn.Module)}
    return {f"{key}.{name}": t for key, part in parts.items() for name, t in part.state_dict().items()}


def test_two_steps(made, photos, tmp_path):
    name, pipe = made
    before = copy.deepcopy(tensors(pipe))
    losses = []
    config = CustomizeConfig(steps=2, rank=2, resolution=8, lr=1e-2, log_every=1, batch_size=2, buckets=1)
    adapter = train(pipe, photos, PROMPT, config, cpu=True, note=losses.append)
    assert adapter.info["training"]["final_loss"] < float("inf")
    products = {key: value.clone() for key, value in adapter.state_dict().items()}
    # Keys see no gradient through a softmax over tokens that are all alike; outputs always do.
    assert all(value.any() for key, value in products.items() if key.endswith("output.weight")), name
    now = {key: value for key, value in tensors(pipe).items() if "adapters" not in key}
    assert now.keys() == before.keys()
    assert all(torch.equal(before[key], value) for key, value in now.items())
    assert not any(p.requires_grad or p.grad is not None for p in adapter.parameters())

    family = family_of(pipe)
    time_ids = torch.tensor([[8.0, 8, 0, 0, 8, 8]])
    x = torch.randn(1, family.vae.config.latent_channels, 8, 8, generator=torch.Generator().manual_seed(3))

    def out() -> Tensor:
        with torch.no_grad():
            return family.predict(x, torch.tensor([500]), family.encode_text([PROMPT]), time_ids)

    path = save_adapter(pipe, tmp_path / "a.safetensors")
    wanted = out()
    adapter.remove()
    base = out()
    assert not torch.equal(base, wanted)
    again = load_adapter(pipe, path)
    assert torch.equal(out(), wanted)
    again.remove()
    assert torch.equal(out(), base)
    assert tensors(pipe).keys() == before.keys()


@pytest.mark.parametrize("name", ["sd3-t5", "flux"])
def test_a_token_leaves_t5_alone(name, photos):
    """T5 is read with gradients on where a CLIP beside it learns a word: it must not collect any."""
    pipe = build(name)
    encoder = pipe.text_encoder_3 if name == "sd3-t5" else pipe.text_encoder_2
    for part in (encoder, pipe.vae):
        part.requires_grad_(True).train()
    config = CustomizeConfig(steps=2, rank=1, resolution=8, buckets=1, text_encoder_rank=1, token_lr=0.1)
    adapter = train(pipe, photos, "a photo of V*", config, cpu=True)
    assert all(p.grad is None for p in encoder.parameters())
    assert all(p.requires_grad for part in (encoder, pipe.vae) for p in part.parameters())
    assert all(module.training for part in (encoder, pipe.vae) for module in part.modules())
    assert set(adapter.token.vectors) == ({"text_encoder", "text_encoder_2"} if name == "sd3-t5" else {"text_encoder"})
    adapter.remove()


def test_what_cannot_be_trained(photos):
    pipe = diffusion.pipeline()
    with pytest.raises(ModelError, match="needs the whole pipeline"):
        train(pipe.unet, photos, PROMPT)
    pipe.__class__ = type("KandinskyPipeline", (type(pipe),), {})
    with pytest.raises(ModelError, match="KandinskyPipeline cannot be trained; known are StableDiffusionPipeline"):
        train(pipe, photos, PROMPT)


def test_options_that_a_pipeline_does_not_have():
    # Its call takes one, and ignores it without another option.
    with pytest.raises(DataError, match="FluxPipeline takes no negative prompt; leave it out"):
        generate(build("flux"), [PROMPT], negative_prompt="a cat")
    with pytest.raises(DataError, match=r"StableDiffusionPipeline cannot draw this: .*divisible by 8") as refusal:
        generate(build("sd1"), [PROMPT], height=9, width=8, steps=1)
    assert "\n" not in str(refusal.value)
