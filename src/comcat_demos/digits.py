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
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from comcat.errors import ComcatError
from comcat.progress import Progress

from .digits_training import Course, train_parts

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
def _digits() -> tuple[np.ndarray, Tensor, Tensor]:
    """All scans, (1797, 8, 8) uint8; their labels, (1797,); and which of them train, (1797,) bool."""
    try:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split
    except ImportError as e:
        raise ComcatError("the digits need another package. Install it: pip install scikit-learn") from e
    data = load_digits()
    train, _ = train_test_split(np.arange(len(data.target)), test_size=0.25, random_state=0, stratify=data.target)
    is_train = torch.zeros(len(data.target), dtype=torch.bool)
    is_train[torch.from_numpy(train)] = True
    return (data.images * (255 / 16)).round().astype(np.uint8), torch.from_numpy(data.target).long(), is_train


def digit_scans(split: str) -> tuple[Tensor, Tensor]:
    """The scans of all ten digits as they are: (N, 8, 8) in [0, 1], labels (N,); see :func:`real_images`."""
    scans, labels, is_train = _digits()
    chosen = _chosen(split, is_train)
    return torch.from_numpy(scans).float().div(255)[chosen], labels[chosen]


def real_images(split: str) -> tuple[Tensor, Tensor]:
    """The scans of all ten digits of ``split``, "train" or "test": images (N, 3, 16, 16) in [0, 1], labels (N,).

    Raises:
        ComcatError: scikit-learn is not installed.
    """
    _, labels, is_train = _digits()
    chosen = _chosen(split, is_train)
    return _enlarged()[chosen], labels[chosen]


@lru_cache(maxsize=1)
def _enlarged() -> Tensor:
    from PIL import Image

    scans = [Image.fromarray(scan) for scan in _digits()[0]]
    large = np.stack([np.asarray(scan.resize((SIZE, SIZE), Image.Resampling.BICUBIC)) for scan in scans])
    return torch.from_numpy(large).float().div(255).unsqueeze(1).expand(-1, 3, -1, -1)


def _chosen(split: str, is_train: Tensor) -> Tensor:
    if split not in ("train", "test"):
        raise ValueError(f"split is 'train' or 'test', not {split!r}")
    return is_train if split == "train" else ~is_train


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


def build(seed: int = 0, words: Sequence[str] = (), vae_channels: tuple[int, int] = (8, 16)) -> StableDiffusionPipeline:
    """The untrained pipeline, with the same weights for the same seed.

    Args:
        words: that prompts have beside those of the digits. vae_channels: at 16 x 16 and at 8 x 8.

    Raises:
        ComcatError: diffusers or transformers is not installed.
    """
    try:
        from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
        from transformers import CLIPTextConfig, CLIPTextModel
    except ImportError as e:
        raise missing_packages() from e

    tokenizer = _tokenizer(words)
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
            block_out_channels=vae_channels,
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


def _tokenizer(words: Sequence[str]) -> CLIPTokenizer:
    """CLIP's tokenizer with a vocabulary of the prompts' words; every other word falls apart into its bytes."""
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import CLIPTokenizer

    end = "</w>"
    alphabet = sorted(ByteLevel.alphabet())
    merges: dict[str, str] = {}  # word -> the two tokens it is made of
    # Long words first: "to" of "top" would tear "bottom" apart.
    for word in [*CLASS_PROMPT.split(), "the", *WORDS, *sorted(words, key=len, reverse=True)]:
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
    seed: int = 0,
    progress: Progress | None = None,
) -> None:
    """Train all parts of ``pipe`` in place on all digits but ``left_out``; first the VAE, then the others jointly.

    Args:
        progress: called as ``progress("VAE" or "diffusion", steps done, steps)``.
    """
    images, labels = training_images(left_out)
    captions = [prompt(digit) for digit in range(10)] + [f"a photo of {word}" for word in WORDS] + [CLASS_PROMPT, ""]
    tokens = pipe.tokenizer(captions, padding="max_length", return_tensors="pt").input_ids

    def text(batch: Tensor) -> Tensor:
        chance = torch.rand(len(batch))
        caption = labels[batch].clone()
        caption[chance < 0.4] += 10  # the short form
        caption[chance < 0.2] = 20  # the class
        caption[chance < 0.1] = 21  # none
        embeds: Tensor = pipe.text_encoder(tokens).last_hidden_state
        return embeds[caption]

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        train_parts(pipe, images, text, Course(vae_steps, steps), progress)
