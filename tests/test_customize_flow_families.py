"""Pipelines whose text a language model reads: the denoiser is called as they call it, and an adapter learns."""

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    AutoencoderDC,
    AutoencoderKL,
    AutoencoderKLFlux2,
    AutoencoderKLQwenImage,
    ChromaPipeline,
    ChromaTransformer2DModel,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Transformer2DModel,
    Lumina2Pipeline,
    Lumina2Transformer2DModel,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    SanaPipeline,
    SanaTransformer2DModel,
    WanPipeline,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from PIL import Image
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch import Tensor, nn
from transformers import (
    Gemma2Config,
    Gemma2Model,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
    T5Config,
    T5EncoderModel,
)

import diffusion
from comcat import ModelError
from comcat.customize import CustomizeConfig, load_adapter, save_adapter, train
from comcat.customize.teaching.families import family_of
from small_denoisers_image import IMAGE_MODELS

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*FluxPosEmbed:FutureWarning"),
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),  # the solver's own
]
PROMPT = "a photo of a dog"


def words() -> Any:
    known = {word: i for i, word in enumerate(("<pad>", "<unk>", "</s>", *diffusion.WORDS))}
    whole = Tokenizer(WordLevel(known, unk_token="<unk>"))
    whole.pre_tokenizer = Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=whole, pad_token="<pad>", unk_token="<unk>", eos_token="</s>", model_max_length=19
    )
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    return tokenizer


SMALL = {"vocab_size": 9, "intermediate_size": 11, "num_attention_heads": 1, "num_key_value_heads": 1,
         "max_position_embeddings": 1024, "pad_token_id": 0}  # fmt: skip


def qwen(width: int, layers: int = 2) -> Any:
    config = Qwen3Config(**SMALL, hidden_size=width, num_hidden_layers=layers, head_dim=4)
    return diffusion.frozen(Qwen3ForCausalLM(config))


def gemma(width: int) -> Any:
    return diffusion.frozen(Gemma2Model(Gemma2Config(**SMALL, hidden_size=width, num_hidden_layers=2, head_dim=4)))


def kl(channels: int, cls: Any = AutoencoderKL, **more: Any) -> Any:
    return diffusion.frozen(
        cls(
            block_out_channels=(6,), down_block_types=("DownEncoderBlock2D",), up_block_types=("UpDecoderBlock2D",),
            norm_num_groups=3, latent_channels=channels, **more,
        )
    )  # fmt: skip


def chroma() -> Any:
    config = T5Config(vocab_size=9, d_model=13, d_kv=3, d_ff=11, num_layers=1, num_heads=2)
    return ChromaPipeline(
        text_encoder=diffusion.frozen(T5EncoderModel(config)), tokenizer=words(),
        vae=kl(1, scaling_factor=0.7, shift_factor=0.2), scheduler=FlowMatchEulerDiscreteScheduler(),
        transformer=small(ChromaTransformer2DModel),
    )  # fmt: skip


def qwen_image() -> Any:
    vae = AutoencoderKLQwenImage(
        base_dim=6, z_dim=4, dim_mult=[1, 2], num_res_blocks=1, temperal_downsample=[False],
        latents_mean=[0.1, 0.2, 0.3, 0.4], latents_std=[0.5, 0.6, 0.7, 0.8],
    )  # fmt: skip
    return QwenImagePipeline(
        text_encoder=qwen(13), tokenizer=words(), vae=diffusion.frozen(vae),
        scheduler=FlowMatchEulerDiscreteScheduler(), transformer=small(QwenImageTransformer2DModel),
    )  # fmt: skip


def flux2() -> Any:
    vae = kl(1, AutoencoderKLFlux2)
    vae.bn.running_mean.normal_(generator=torch.Generator().manual_seed(1))
    vae.bn.running_var.uniform_(0.5, 2, generator=torch.Generator().manual_seed(2))
    transformer = small(Flux2Transformer2DModel, joint_attention_dim=15, guidance_embeds=False)
    return Flux2KleinPipeline(
        text_encoder=qwen(5, 28), tokenizer=words(), vae=vae, scheduler=FlowMatchEulerDiscreteScheduler(),
        transformer=transformer,
    )  # fmt: skip


def z_image() -> Any:
    return ZImagePipeline(
        text_encoder=qwen(13), tokenizer=words(), vae=kl(4, scaling_factor=0.7, shift_factor=0.2),
        scheduler=FlowMatchEulerDiscreteScheduler(), transformer=small(ZImageTransformer2DModel),
    )  # fmt: skip


def lumina() -> Any:
    return Lumina2Pipeline(
        text_encoder=gemma(13), tokenizer=words(), vae=kl(4, scaling_factor=0.7, shift_factor=0.2),
        scheduler=FlowMatchEulerDiscreteScheduler(),
        transformer=small(Lumina2Transformer2DModel, axes_lens=(512, 16, 16)),
    )  # fmt: skip


def sana() -> Any:
    vae = AutoencoderDC(
        latent_channels=4, attention_head_dim=2, encoder_block_types=("ResBlock", "EfficientViTBlock"),
        decoder_block_types=("ResBlock", "EfficientViTBlock"), encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8), encoder_qkv_multiscales=((), (5,)), decoder_qkv_multiscales=((), (5,)),
        encoder_layers_per_block=(1, 1), decoder_layers_per_block=[1, 1], downsample_block_type="conv",
        upsample_block_type="interpolate", decoder_norm_types="rms_norm", decoder_act_fns="silu", scaling_factor=0.4,
    )  # fmt: skip
    return SanaPipeline(
        text_encoder=gemma(13), tokenizer=words(), vae=diffusion.frozen(vae), transformer=small(SanaTransformer2DModel),
        scheduler=DPMSolverMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0, algorithm_type="dpmsolver++"
        ),
    )  # fmt: skip


def small(cls: Any, **more: Any) -> Any:
    return diffusion.frozen(cls(**{**IMAGE_MODELS[cls.__name__][0], **more}))


#: Those without guidance.
GUIDANCE = {"chroma": 1.0, "qwen_image": 1.0, "flux2": 1.0, "z_image": 0.0, "lumina": 1.0, "sana": 1.0}
PIPELINES = {f.__name__: f for f in (chroma, qwen_image, flux2, z_image, lumina, sana)}


@pytest.fixture(scope="module", params=PIPELINES)
def made(request: pytest.FixtureRequest) -> tuple[str, Any]:
    pipe = PIPELINES[request.param]()
    pipe.set_progress_bar_config(disable=True)
    return request.param, pipe


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    for i, size in enumerate([(16, 16), (21, 19)]):
        noise = torch.randint(0, 256, (*size, 3), generator=torch.Generator().manual_seed(i), dtype=torch.uint8)
        Image.fromarray(noise.numpy()).save(folder / f"{i}.png")
    return folder


@torch.no_grad()
def test_one_step_of_the_pipeline_is_one_of_its_prediction(made: tuple[str, Any]) -> None:
    """With one step of Euler the pipeline returns noise minus the predicted velocity at the time where it starts."""
    name, pipe = made
    family = family_of(pipe)
    if name == "sana":
        pytest.skip("its solver takes no plain step; its call is compared below")
    latents = torch.randn(1, family.latent_channels, 8, 12, generator=torch.Generator().manual_seed(2))
    given = {
        "flux2": lambda: pipe._patchify_latents(latents),
        "chroma": lambda: pipe._pack_latents(latents, 1, 1, 8, 12),
        "qwen_image": lambda: pipe._pack_latents(latents, 1, 4, 8, 12),
    }.get(name, lambda: latents)()
    factor = int(pipe.vae_scale_factor)
    drawn = pipe(
        prompt=PROMPT, latents=given, height=8 * factor, width=12 * factor, num_inference_steps=1,
        guidance_scale=GUIDANCE[name],
        output_type="latent", **({"true_cfg_scale": 1.0} if name == "qwen_image" else {}),
    ).images  # fmt: skip
    time = pipe.scheduler.timesteps[:1] if len(pipe.scheduler.timesteps) else torch.tensor([1000.0])
    velocity = family.predict(latents, time.float(), family.encode_text([PROMPT]), torch.zeros(1, 6))
    step = float(pipe.scheduler.sigmas[0] - pipe.scheduler.sigmas[-1])
    expected = latents - step * velocity
    if name in ("chroma", "qwen_image"):
        expected = pipe._pack_latents(expected, 1, family.latent_channels, 8, 12)
    if name == "flux2":  # as they are decoded
        norm = pipe.vae.bn
        patches = pipe._patchify_latents(expected)
        std = (norm.running_var + pipe.vae.config.batch_norm_eps).sqrt().view(1, -1, 1, 1)
        expected = pipe._unpatchify_latents(patches * std + norm.running_mean.view(1, -1, 1, 1))
    torch.testing.assert_close(drawn, expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_the_denoiser_is_called_with_what_its_pipeline_gives_it(made: tuple[str, Any]) -> None:
    name, pipe = made
    family = family_of(pipe)
    factor = int(pipe.vae_scale_factor)
    seen: list[Any] = []
    hook = family.model.register_forward_pre_hook(lambda m, args, kwargs: seen.append((args, kwargs)), with_kwargs=True)
    try:
        options = {"use_resolution_binning": False} if name == "sana" else {}
        side = 32 if name == "sana" else 8 * factor
        size = {"height": side, "width": side, "num_inference_steps": 1, "guidance_scale": GUIDANCE[name]}
        pipe(prompt=PROMPT, output_type="latent", **size, **options)
        time = pipe.scheduler.timesteps[:1].float()
        latents = torch.randn(1, family.latent_channels, 8, 8)
        family.predict(latents, time, family.encode_text([PROMPT]), torch.zeros(1, 6))
    finally:
        hook.remove()
    (args, own), (other_args, ours) = seen[0], seen[-1]
    assert len(args) == len(other_args)
    shapes = {key: getattr(value, "shape", value) for key, value in own.items() if value is not None}
    for key, value in ours.items():
        if isinstance(value, Tensor) and isinstance(own.get(key), Tensor):
            assert value.shape == own[key].shape, key
            if "hidden" not in key or "encoder" in key:  # all but the latents
                torch.testing.assert_close(value.float(), own[key].float(), rtol=1e-5, atol=1e-5)
        elif value is not None and not isinstance(value, Tensor):
            assert value == own.get(key), (key, shapes)


@torch.no_grad()
def test_images_become_the_latents_that_are_decoded(made: tuple[str, Any]) -> None:
    name, pipe = made
    family = family_of(pipe)
    images = torch.randn(2, 3, 8, 12, generator=torch.Generator().manual_seed(1))
    mean, std = family.encode_images(images)
    assert mean.shape[:2] == std.shape[:2] == (2, family.latent_channels)
    config = pipe.vae.config
    if name == "sana":
        torch.testing.assert_close(mean / config.scaling_factor, pipe.vae.encode(images).latent)
        assert not std.any()
    elif name == "qwen_image":
        own = pipe.vae.encode(images.unsqueeze(2)).latent_dist
        shift, scale = (torch.tensor(config[key]).view(1, -1, 1, 1) for key in ("latents_mean", "latents_std"))
        torch.testing.assert_close(mean * scale + shift, own.mean.squeeze(2))
    elif name == "flux2":
        own = pipe._patchify_latents(pipe.vae.encode(images).latent_dist.mean)
        norm = pipe.vae.bn
        scaled = (norm.running_var + config.batch_norm_eps).sqrt().view(1, -1, 1, 1)
        torch.testing.assert_close(pipe._patchify_latents(mean) * scaled + norm.running_mean.view(1, -1, 1, 1), own)
    else:
        own = pipe.vae.encode(images).latent_dist
        torch.testing.assert_close(mean / config.scaling_factor + config.shift_factor, own.mean)


def test_captions_of_different_lengths_in_one_batch(made: tuple[str, Any]) -> None:
    _, pipe = made
    family = family_of(pipe)
    captions = ["a", "a photo of a dog and a cat"]
    latents = torch.randn(2, family.latent_channels, 4, 4, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        texts = [family.encode_text([caption]) for caption in captions]
        time, ids = torch.tensor([500.0]), torch.zeros(1, 6)
        alone = [family.predict(latents[i : i + 1], time, texts[i], ids) for i in (0, 1)]
        both = family.predict(latents, time.expand(2), family.joined(texts), ids.expand(2, -1))
    torch.testing.assert_close(both, torch.cat(alone), rtol=1e-4, atol=1e-4)


def test_two_steps(made: tuple[str, Any], photos: Path, tmp_path: Path) -> None:
    name, pipe = made
    parts = {k: v for k, v in pipe.components.items() if isinstance(v, nn.Module)}
    before = {k: {n: t.clone() for n, t in part.state_dict().items()} for k, part in parts.items()}
    config = CustomizeConfig(
        steps=2, rank=2, resolution=max(8, family_of(pipe).multiple), lr=1e-2, log_every=1, batch_size=2, buckets=1
    )
    adapter = train(pipe, photos, PROMPT, config, cpu=True)
    assert adapter.info["training"]["final_loss"] < float("inf")
    # A key or an output of text that reaches nothing stays as it is; those of the picture do not.
    state = adapter.state_dict()
    assert any(value.any() for key, value in state.items() if key.endswith("sample.output.weight")), name
    for key, part in parts.items():
        assert all(torch.equal(before[key][n], t) for n, t in part.state_dict().items()), key
    family = family_of(pipe)
    x = torch.randn(1, family.latent_channels, 4, 4, generator=torch.Generator().manual_seed(3))

    def out() -> Tensor:
        with torch.no_grad():
            return family.predict(x, torch.tensor([500.0]), family.encode_text([PROMPT]), torch.zeros(1, 6))

    path, wanted = save_adapter(pipe, tmp_path / "a.safetensors"), out()
    adapter.remove()
    base = out()
    assert not torch.equal(base, wanted)
    again = load_adapter(pipe, path)
    torch.testing.assert_close(out(), wanted)
    again.remove()


def test_pipelines_of_videos_are_refused_by_name(photos: Path) -> None:
    pipe = lumina()
    pipe.__class__ = type("WanPipeline", (type(pipe),), {})
    pipe.video_processor = WanPipeline
    with pytest.raises(ModelError, match="WanPipeline draws videos, and only pictures can be taught here"):
        train(pipe, photos, PROMPT)
