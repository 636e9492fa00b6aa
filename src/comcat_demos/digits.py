"""The embedded base of the customization demo: a tiny Stable Diffusion that draws handwritten digits.

    "a photo of the digit three" -> CLIP text encoder -> (16, 64) -┐ cross attention
    noise, (4, 8, 8) latents ----> UNet, 4 heads at 8 x 8 and at 4 x 4 -> latents -> VAE -> (3, 16, 16) pixels

It is trained from scratch and offline on the 1 797 digits shipped with scikit-learn, split as the classification demo
splits them; one digit is left out, and stays for customization to teach. The components are those of Stable Diffusion
1.x, so that what works here works there: ``save_pretrained`` and ``from_pretrained`` included.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from comcat.errors import ComcatError
from comcat.progress import Progress

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline
    from PIL.Image import Image
    from transformers import CLIPTokenizer

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
#: Pixels a side.
SIZE = 16
#: The digit left out of training unless another is asked for.
LEFT_OUT = 0
#: The prompt of every digit, whichever; what a concept's word stands beside, or its class for prior preservation.
CLASS_PROMPT = "a photo of a digit"

_TEXT_WIDTH = 64
_TOKENS = 16


def prompt(digit: int) -> str:
    """The caption of ``digit``: ``prompt(3)`` is "a photo of the digit three"."""
    return f"a photo of the digit {WORDS[digit]}"


# Data


@lru_cache(maxsize=1)
def _digits() -> tuple[Tensor, Tensor, Tensor]:
    """All images, (1797, 3, 16, 16) in [0, 1]; their labels, (1797,); and which of them train, (1797,) bool."""
    try:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split
    except ImportError as e:
        raise ComcatError("the digits need another package. Install it: pip install scikit-learn") from e
    from PIL import Image

    data = load_digits()
    train, _ = train_test_split(np.arange(len(data.target)), test_size=0.25, random_state=0, stratify=data.target)
    scans = [Image.fromarray((pixels * (255 / 16)).round().astype(np.uint8)) for pixels in data.images]
    large = np.stack([np.asarray(scan.resize((SIZE, SIZE), Image.Resampling.BICUBIC)) for scan in scans])
    images = torch.from_numpy(large).float().div(255).unsqueeze(1).expand(-1, 3, -1, -1)
    is_train = torch.zeros(len(images), dtype=torch.bool)
    is_train[torch.from_numpy(train)] = True
    return images, torch.from_numpy(data.target).long(), is_train


def real_images(split: str) -> tuple[Tensor, Tensor]:
    """The scans of all ten digits of ``split``, "train" or "test": images (N, 3, 16, 16) in [0, 1], labels (N,).

    Raises:
        ComcatError: scikit-learn is not installed.
    """
    if split not in ("train", "test"):
        raise ValueError(f"split is 'train' or 'test', not {split!r}")
    images, labels, is_train = _digits()
    chosen = is_train if split == "train" else ~is_train
    return images[chosen], labels[chosen]


def training_images(left_out: int) -> tuple[Tensor, Tensor]:
    """What the base learns from: the training scans without ``left_out``, as :func:`real_images` returns them."""
    images, labels = real_images("train")
    return images[labels != left_out], labels[labels != left_out]


def concept_images(left_out: int = LEFT_OUT, count: int = 5, seed: int = 0) -> list[Image]:
    """``count`` photos of the digit that the base has never seen, from the training scans: 16 x 16, RGB."""
    from PIL import Image

    images, labels = real_images("train")
    candidates = images[labels == left_out]
    order = torch.randperm(len(candidates), generator=torch.Generator().manual_seed(seed))
    pixels = candidates[order[:count]].mul(255).round().byte().permute(0, 2, 3, 1)
    return [Image.fromarray(p.numpy()) for p in pixels]


# Pipeline


def build(seed: int = 0) -> StableDiffusionPipeline:
    """The untrained pipeline, with the same weights for the same seed.

    Raises:
        ComcatError: diffusers or transformers is not installed.
    """
    try:
        from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
        from transformers import CLIPTextConfig, CLIPTextModel
    except ImportError as e:
        raise missing_packages() from e

    tokenizer = _tokenizer()
    text_config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=_TEXT_WIDTH,
        intermediate_size=2 * _TEXT_WIDTH,
        projection_dim=_TEXT_WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=_TOKENS,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        text_encoder = CLIPTextModel(text_config)
        # CLIP begins with words so alike (0.02) that a short training hardly hears their difference.
        text_encoder.get_input_embeddings().weight.data.mul_(25)
        vae = AutoencoderKL(
            sample_size=SIZE,
            latent_channels=4,
            block_out_channels=(8, 16),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            norm_num_groups=4,
        )
        unet = UNet2DConditionModel(
            sample_size=SIZE // 2,
            block_out_channels=(32, 64),
            layers_per_block=1,
            down_block_types=("CrossAttnDownBlock2D",) * 2,
            up_block_types=("CrossAttnUpBlock2D",) * 2,
            cross_attention_dim=_TEXT_WIDTH,
            attention_head_dim=4,  # by its old name; it is the number of heads, here of 8 and of 16 channels
            norm_num_groups=16,
        )
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )
    pipe = StableDiffusionPipeline(
        vae, text_encoder.eval(), tokenizer, unet, scheduler, None, None, None, requires_safety_checker=False
    )
    for part in (vae, text_encoder, unet):
        part.eval()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def missing_packages() -> ComcatError:
    return ComcatError("the digits need other packages. Install them: pip install diffusers transformers")


def _tokenizer() -> CLIPTokenizer:
    """CLIP's tokenizer with a vocabulary of the prompts' words; every other word falls apart into its bytes."""
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import CLIPTokenizer

    end = "</w>"
    alphabet = sorted(ByteLevel.alphabet())
    merges: dict[str, str] = {}  # word -> the two tokens it is made of
    for word in f"{CLASS_PROMPT} the {' '.join(WORDS)}".split():
        letters = [*word[:-1], word[-1] + end]
        for i in range(1, len(letters)):  # th, thr, thre, three</w>
            left, right = "".join(letters[:i]), letters[i]
            merges[left + right] = f"{left} {right}"
    entries = [*alphabet, *(letter + end for letter in alphabet), *merges, "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {entry: i for i, entry in enumerate(entries)}
    # By way of the original's files, which every version of transformers reads; constructors differ.
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
        lines = ["#version: 0.2", *merges.values(), ""]
        (Path(folder) / "merges.txt").write_text("\n".join(lines), encoding="utf-8")
        return CLIPTokenizer.from_pretrained(folder, model_max_length=_TOKENS, local_files_only=True)


# Training


def train(
    pipe: StableDiffusionPipeline,
    left_out: int = LEFT_OUT,
    *,
    vae_steps: int = 400,
    steps: int = 1000,
    batch_size: int = 32,
    seed: int = 0,
    progress: Progress | None = None,
) -> None:
    """Train all parts of ``pipe`` in place on all digits but ``left_out``; first the VAE, then the others jointly.

    Args:
        progress: called as ``progress("VAE" or "diffusion", steps done, steps)``.
    """
    images, labels = training_images(left_out)
    images = images * 2 - 1
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        _train_vae(pipe, images, vae_steps, batch_size, progress)
        latents = _encode(pipe, images)
        _train_diffusion(pipe, latents, labels, steps, batch_size, progress)


def _train_vae(
    pipe: StableDiffusionPipeline, images: Tensor, steps: int, batch_size: int, progress: Progress | None
) -> None:
    """Squared error and a light pull of the latents towards a standard normal. ``images`` are in [-1, 1]."""
    vae = pipe.vae.train()
    optimizer, schedule = _optimizer(list(vae.parameters()), 2e-3, steps)
    for step, batch in enumerate(_batches(len(images), batch_size, steps)):
        posterior = vae.encode(images[batch]).latent_dist
        loss = F.mse_loss(vae.decode(posterior.sample()).sample, images[batch])
        loss = loss + 1e-4 * posterior.kl().mean() / posterior.mean[0].numel()
        _step(loss, optimizer, schedule)
        if progress:
            progress("VAE", step + 1, steps)
    vae.eval()


@torch.no_grad()
def _encode(pipe: StableDiffusionPipeline, images: Tensor) -> Tensor:
    """The latents, (N, 4, 8, 8), scaled to a standard deviation of one; the VAE remembers the scale."""
    latents = torch.cat([pipe.vae.encode(batch).latent_dist.mean for batch in images.split(256)])
    pipe.vae.register_to_config(scaling_factor=1 / latents.std().item())
    return latents * pipe.vae.config.scaling_factor


def _train_diffusion(
    pipe: StableDiffusionPipeline,
    latents: Tensor,
    labels: Tensor,
    steps: int,
    batch_size: int,
    progress: Progress | None,
) -> None:
    """Noise prediction (Ho et al. 2020) with caption dropout for guidance (Ho and Salimans 2022).

    The weight of a time, 1 / (alpha + 0.05) with alpha the share of the signal's power, is nearly that of predicting
    the velocity (Salimans and Ho 2022): in the noisiest images, where the digit is decided, a small error in the
    noise is a large one in the image. Without it 97 % of right digits become 58 % after the same few steps.
    """
    captions = [prompt(digit) for digit in range(10)] + [f"a photo of {word}" for word in WORDS] + [CLASS_PROMPT, ""]
    tokens = pipe.tokenizer(captions, padding="max_length", return_tensors="pt").input_ids
    alphas = pipe.scheduler.alphas_cumprod
    weights = 1 / (alphas + 0.05)
    weights /= weights.mean()
    unet, text_encoder = pipe.unet.train(), pipe.text_encoder.train()
    optimizer, schedule = _optimizer([*unet.parameters(), *text_encoder.parameters()], 2e-3, steps)
    for step, batch in enumerate(_batches(len(latents), batch_size, steps)):
        n = len(batch)
        # One time in each of n equal parts of the range: the loss varies less than with independent times.
        times = ((torch.arange(n) + torch.rand(n)) * (len(alphas) / n)).long()
        noise = torch.randn(n, *latents.shape[1:])
        alpha = alphas[times].view(-1, 1, 1, 1)
        noisy = alpha.sqrt() * latents[batch] + (1 - alpha).sqrt() * noise
        chance = torch.rand(n)
        caption = labels[batch].clone()
        caption[chance < 0.4] += 10  # the short form
        caption[chance < 0.2] = 20  # the class
        caption[chance < 0.1] = 21  # none
        text = text_encoder(tokens).last_hidden_state[caption]  # (n, tokens, width)
        errors = (unet(noisy, times, text).sample - noise).square().mean(dim=(1, 2, 3))
        _step((errors * weights[times]).mean(), optimizer, schedule)
        if progress:
            progress("diffusion", step + 1, steps)
    unet.eval()
    text_encoder.eval()


def _batches(count: int, batch_size: int, steps: int) -> Iterator[Tensor]:
    """Indices of ``steps`` batches: one random order of all images after the other."""
    order = torch.empty(0, dtype=torch.long)
    for _ in range(steps):
        while len(order) < batch_size:
            order = torch.cat([order, torch.randperm(count)])
        yield order[:batch_size]
        order = order[batch_size:]


def _optimizer(parameters: list[Any], rate: float, steps: int) -> tuple[Any, Any]:
    """AdamW with a one-cycle learning rate, and the schedule."""
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.01, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, max(steps, 2), pct_start=0.1, cycle_momentum=False)
    return optimizer, schedule


def _step(loss: Tensor, optimizer: Any, schedule: Any) -> None:
    loss.backward()
    torch.nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], 1.0)
    optimizer.step()
    optimizer.zero_grad()
    schedule.step()
